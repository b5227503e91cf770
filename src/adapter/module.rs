//! One adapted layer.

use super::factor::Factor;
use super::method::Method;
use crate::error::{Error, Reason, Result};
use crate::naming::Spelling;
use crate::tensor::{Tensor, transposed};

/// What a tensor is to its method. Each method defines its own, in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Role(&'static str);

impl Role {
    /// A role by the word for it.
    pub const fn new(name: &'static str) -> Self {
        Role(name)
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        self.0
    }
}

/// What kind of layer a module says it adapts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Linear, Conv1D or convolution: the base's shape decides.
    Dense,
    /// An embedding, whose weight is stored input first.
    Embedding,
}

/// How the factors of a module lie in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stored {
    /// As the method defines them.
    #[default]
    AsDefined,
    /// Each factor of two axes with its axes exchanged; nothing is moved, methods read it transposed.
    Transposed,
}

/// α/r (or α/√r), with what it is made of. Part of the adapter, unlike the user's strength.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Scale {
    /// The multiplier of the delta.
    pub value: f64,
    /// The stored numerator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// The rank that the scale is computed with: the configuration's, not the tensor's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Whether the rank enters by its square root (rsLoRA).
    pub root: bool,
}

impl Scale {
    /// The scale of a method that has none.
    pub const ONE: Scale = Scale {
        value: 1.0,
        alpha: None,
        rank: None,
        root: false,
    };

    /// α/r, or α/√r for rsLoRA.
    pub fn of(alpha: f64, rank: usize, root: bool) -> Self {
        Scale {
            value: alpha / divisor(rank, root),
            alpha: Some(alpha),
            rank: Some(rank),
            root,
        }
    }

    /// A multiplier for a rank, with the numerator that makes it.
    pub fn of_value(value: f64, rank: usize, root: bool) -> Self {
        let divisor = divisor(rank, root);
        let alpha = numerator(value, divisor, value * divisor);
        Scale {
            value,
            ..Scale::of(alpha, rank, root)
        }
    }

    /// The scale times a number. The numerator gives the product as it is rounded here where some numerator does.
    #[must_use]
    pub fn times(self, by: f64) -> Self {
        let value = by * self.value;
        let divisor = divisor(self.rank.unwrap_or(1), self.root);
        let alpha = self
            .alpha
            .map(|alpha| numerator(value, divisor, by * alpha));
        Scale {
            value,
            alpha,
            ..self
        }
    }

    /// The same multiplier where the rank is another.
    #[must_use]
    pub fn at_rank(self, rank: usize) -> Self {
        match self.rank == Some(rank) {
            true => self,
            false => Scale::of_value(self.value, rank, self.root),
        }
    }
}

/// What the numerator is divided by.
fn divisor(rank: usize, root: bool) -> f64 {
    let rank = rank as f64;
    if root { rank.sqrt() } else { rank }
}

/// A number that is `value` when it is divided: the first guess, or a neighbour of the product.
fn numerator(value: f64, divisor: f64, guess: f64) -> f64 {
    let product = value * divisor;
    [guess, product, product.next_up(), product.next_down()]
        .into_iter()
        .find(|alpha| alpha / divisor == value)
        .unwrap_or(guess)
}

/// One adapted layer: a path, a method, its parameters and its scale.
#[derive(Clone, Debug)]
pub struct Module {
    /// Path in the model that was trained.
    pub path: String,
    /// How the path is spelled.
    pub spelling: Spelling,
    /// The mathematics.
    pub method: &'static dyn Method,
    /// The tensors, by role.
    pub parameters: Vec<(Role, Tensor)>,
    /// The adapter's own multiplier.
    pub scale: Scale,
    /// What it says it adapts.
    pub layer: Layer,
    /// How its factors lie in the file.
    pub stored: Stored,
}

impl Module {
    /// Bytes of its parameters.
    pub fn bytes(&self) -> u64 {
        self.parameters
            .iter()
            .map(|(_, tensor)| tensor.length)
            .sum()
    }

    /// Makes a module after checking roles and shapes, so that an invalid one cannot exist.
    ///
    /// # Errors
    /// [`Reason::RoleMissing`], or what the method finds wrong with the shapes.
    pub fn new(
        path: String,
        method: &'static dyn Method,
        parameters: Vec<(Role, Tensor)>,
        scale: Scale,
        layer: Layer,
    ) -> Result<Self> {
        Self::stored(path, method, parameters, scale, layer, Stored::AsDefined)
    }

    /// The same for factors that lie otherwise than the method defines them.
    ///
    /// # Errors
    /// As [`Module::new`].
    pub fn stored(
        path: String,
        method: &'static dyn Method,
        parameters: Vec<(Role, Tensor)>,
        scale: Scale,
        layer: Layer,
        stored: Stored,
    ) -> Result<Self> {
        let module = Module {
            path,
            spelling: Spelling::Dotted,
            method,
            parameters,
            scale,
            layer,
            stored,
        };
        for role in method.roles().iter().filter(|role| role.required) {
            if module.get(role.role).is_none() {
                let reason = Reason::RoleMissing {
                    role: role.role.name(),
                    suffix: role.suffix.to_owned(),
                };
                return Err(module.error(reason));
            }
        }
        for (role, tensor) in &module.parameters {
            tensor.float()?;
            if !method.roles().iter().any(|known| known.role == *role) {
                let problem = format!("{} does not define a {}", method.name(), role.name());
                return Err(module.error(Reason::FactorShape { problem }));
            }
        }
        method.check(&module)?;
        Ok(module)
    }

    /// The module with its path spelled otherwise.
    #[must_use]
    pub fn spelled(mut self, spelling: Spelling) -> Self {
        self.spelling = spelling;
        self
    }

    /// The tensor in a role.
    pub fn get(&self, role: Role) -> Option<&Tensor> {
        self.parameters
            .iter()
            .find(|(name, _)| *name == role)
            .map(|(_, tensor)| tensor)
    }

    /// The tensor in a role that the method requires.
    pub fn require(&self, role: Role) -> Result<&Tensor> {
        self.get(role).ok_or_else(|| {
            self.error(Reason::RoleMissing {
                role: role.name(),
                suffix: role.name().to_owned(),
            })
        })
    }

    /// The shape of the tensor in a role, as the method defines it.
    pub fn shape(&self, role: Role) -> Option<Vec<usize>> {
        self.get(role)
            .map(|tensor| match (self.stored, &*tensor.shape) {
                (Stored::Transposed, [outer, inner]) => vec![*inner, *outer],
                (_, shape) => shape.to_vec(),
            })
    }

    /// The tensor in a role as a matrix of its first axis and the rest, as the method defines it.
    ///
    /// # Errors
    /// As [`Module::require`] and [`Factor::new`].
    pub fn factor(&self, role: Role) -> Result<Factor> {
        let tensor = self.require(role)?;
        let factor = Factor::new(tensor, tensor.dimension(0))?;
        Ok(match (self.stored, tensor.shape.len()) {
            (Stored::Transposed, 2) => factor.t(),
            _ => factor,
        })
    }

    /// The tensor in a role with its axes as the method defines them.
    pub fn defined(&self, role: Role) -> Option<Tensor> {
        let tensor = self.get(role)?;
        Some(match (self.stored, tensor.shape.len()) {
            (Stored::Transposed, 2) => transposed(tensor),
            _ => tensor.clone(),
        })
    }

    /// An error about this module.
    pub fn error(&self, reason: Reason) -> Error {
        let error = Error::new(reason).on(&*self.path);
        match self.parameters.first() {
            Some((_, tensor)) => error.in_file(tensor.input.path()),
            None => error,
        }
    }
}
