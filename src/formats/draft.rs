//! What a format is given to write, and what it makes of it.

use std::sync::Arc;

use crate::adapter::{Adapter, Method, Module, Role, Scale, Stored};
use crate::containers::Header;
use crate::error::Result;
use crate::methods::{dora, lora};
use crate::naming::component::Component;
use crate::naming::families::{FAMILIES, Family, Layout};
use crate::naming::path;
use crate::tensor::{Float, Tensor, narrow, widen};

/// A power of a format: writing.
pub trait Writer: Sync {
    /// The names of layers that it writes; the hub's where there is none.
    fn layout(&self, family: Option<&str>) -> Option<Layout>;

    /// Turns an adapter into files. What the format cannot say becomes a loss, never less than all.
    ///
    /// # Errors
    /// What the adapter makes impossible.
    fn write(&self, draft: &Draft<'_>) -> Result<Written>;
}

/// An adapter with the names of the layout that the writer asked for.
pub struct Draft<'a> {
    /// The modules.
    pub modules: Vec<Named>,
    /// The rest of the adapter; its modules are not to be looked at.
    pub adapter: &'a Adapter,
    /// The type of the factors; their own if absent.
    pub dtype: Option<Float>,
    /// The family of the denoiser, where there is one.
    pub family: Option<&'static str>,
    /// What stands before flattened names instead of the usual.
    pub prefix: Option<&'a str>,
}

impl Draft<'_> {
    /// Whether it is known which part of a pipeline a module is of: its name says so, or its family, of
    /// which bare names are those of the denoiser.
    pub(super) fn names_part(&self, named: &Named) -> bool {
        let of_pipeline = |family: &&Family| family.layout == Layout::Original;
        let mut families = FAMILIES.iter().filter(of_pipeline);
        named.component.is_some() || families.any(|family| Some(family.name) == self.family)
    }
}

/// A module with its dotted path within its part.
#[derive(Clone, Debug)]
pub struct Named {
    /// The part of the pipeline, where the source named one.
    pub component: Option<&'static Component>,
    /// What the source wrote in front, where it was dotted.
    pub prefix: String,
    /// The dotted path.
    pub path: String,
    /// The module.
    pub module: Module,
}

/// Files that are to be written.
#[derive(Default)]
pub struct Written {
    /// The tensors under their keys, in the order of their data.
    pub tensors: Vec<Tensor>,
    /// The metadata, where the container is safetensors.
    pub metadata: Vec<(String, String)>,
    /// The key of the metadata that states the SHA-256 of all data, which is known last.
    pub digest: Option<&'static str>,
    /// Makes the header, where the container is another.
    #[allow(clippy::type_complexity, reason = "a constructor of one header")]
    pub header: Option<Box<dyn Fn(&[Tensor]) -> Result<Header>>>,
    /// The name of the file of tensors in a folder.
    pub name: &'static str,
    /// The configuration beside it.
    pub config: Option<serde_json::Value>,
    /// Whether it is a folder even if the output looks like a file.
    pub folder: bool,
    /// What the format cannot say, and which part of the adapter it is.
    pub losses: Vec<Loss>,
    /// What was multiplied into the factors, and whether that rounds.
    pub folded: Vec<Loss>,
}

/// A part of an adapter, and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Loss {
    /// The module, tensor or field.
    pub item: String,
    /// Why.
    pub text: String,
}

impl Written {
    /// Takes a tensor under a key, in the type that was asked for.
    pub(super) fn put(&mut self, draft: &Draft<'_>, key: String, tensor: &Tensor) {
        self.tensors.push(renamed(&typed(tensor, draft.dtype), key));
    }

    /// Takes a tensor under a key, in its own type.
    pub(super) fn put_as_is(&mut self, key: String, tensor: &Tensor) {
        self.tensors.push(renamed(tensor, key));
    }

    /// Notes what cannot be said.
    pub(super) fn lose(&mut self, item: impl Into<String>, text: impl Into<String>) {
        self.losses.push(Loss {
            item: item.into(),
            text: text.into(),
        });
    }

    /// Notes a module that no prefix can be written for.
    pub(super) fn lose_unnamed(&mut self, named: &Named) {
        let text = "no prefix names its part of the pipeline";
        self.lose(&*named.module.path, text);
    }

    /// Notes weights that are widened as lost.
    pub(super) fn lose_paddings(&mut self, draft: &Draft<'_>) {
        for padding in &draft.adapter.paddings {
            self.lose(&*padding.path, "a weight that is widened with zeros");
        }
    }

    /// Notes everything besides modules as lost.
    pub(super) fn lose_rest(&mut self, draft: &Draft<'_>) {
        let adapter = draft.adapter;
        for replacement in &adapter.replacements {
            self.lose(&*replacement.name, "a whole tensor of the base");
        }
        for tokens in &adapter.tokens {
            self.lose(&*tokens.path, "rows of an embedding");
        }
        self.lose_paddings(draft);
        if !adapter.replication.is_empty() {
            self.lose("layer_replication", "repeated layers");
        }
        for tensor in &adapter.unused {
            self.lose(&*tensor.name, "state without a part in the weights");
        }
    }

    /// The factors of a module whose method is known to the format; `None`, and a loss, otherwise.
    pub(super) fn low_rank(&mut self, named: &Named, with_norms: bool) -> Option<LowRank> {
        let module = &named.module;
        let known: &[&str] = match with_norms {
            true => &[lora::LORA.name(), dora::DORA.name()],
            false => &[lora::LORA.name()],
        };
        if !known.contains(&module.method.name()) {
            let text = format!("the method {}", module.method.name());
            self.lose(&*module.path, text);
            return None;
        }
        Some(LowRank {
            down: defined(module, lora::DOWN)?,
            up: defined(module, lora::UP)?,
            mid: module.get(lora::MID).cloned(),
            bias: module.get(lora::BIAS).cloned(),
            magnitude: module.get(dora::MAGNITUDE).cloned(),
            input_magnitude: module.get(dora::INPUT_MAGNITUDE).cloned(),
            scale: module.scale,
        })
    }

    /// The factors of a LoRA that has two and nothing else; `None`, and a loss, otherwise.
    pub(super) fn two_factors(&mut self, named: &Named) -> Option<LowRank> {
        let factors = self.low_rank(named, false)?;
        if factors.mid.is_some() || factors.bias.is_some() {
            self.lose(&*named.module.path, "a Tucker core or a trained bias");
            return None;
        }
        Some(factors)
    }

    /// Multiplies the up factor (and the bias) and notes it.
    pub(super) fn fold(
        &mut self,
        draft: &Draft<'_>,
        named: &Named,
        factors: &mut LowRank,
        by: f64,
    ) {
        if by == 1.0 {
            return;
        }
        let exact = by.abs().log2().fract() == 0.0;
        self.folded.push(Loss {
            item: named.module.path.clone(),
            text: match exact {
                true => format!("the scale {by} is multiplied into the up factor, exactly"),
                false => {
                    format!("the scale {by} is multiplied into the up factor and rounded once")
                }
            },
        });
        factors.up = scaled(&factors.up, by, draft.dtype);
        if let Some(bias) = &mut factors.bias {
            *bias = scaled(bias, by, draft.dtype);
        }
    }
}

/// The tensors of LoRA or DoRA as their method defines them.
pub(super) struct LowRank {
    pub(super) down: Tensor,
    pub(super) up: Tensor,
    pub(super) mid: Option<Tensor>,
    pub(super) bias: Option<Tensor>,
    pub(super) magnitude: Option<Tensor>,
    pub(super) input_magnitude: Option<Tensor>,
    pub(super) scale: Scale,
}

impl LowRank {
    /// The rank of the tensors.
    pub(super) fn rank(&self) -> usize {
        self.down.dimension(0)
    }

    /// The α of which α/rank is the scale: the stored one where the rank is that of the tensors.
    pub(super) fn alpha(&self) -> f64 {
        match self.scale {
            Scale {
                value,
                alpha: Some(alpha),
                ..
            } if alpha / self.rank() as f64 == value => alpha,
            Scale { value, .. } => value * self.rank() as f64,
        }
    }
}

/// A factor in the axes of its method.
fn defined(module: &Module, role: Role) -> Option<Tensor> {
    let tensor = module.get(role)?;
    Some(match (module.stored, tensor.shape.len()) {
        (Stored::Transposed, 2) => transposed(tensor),
        _ => tensor.clone(),
    })
}

/// Whether a path is that of an embedding: names alone tell, for the factors of a square weight do not.
pub(super) fn is_embedding(module: &str) -> bool {
    let leaf = path::leaf(module);
    leaf.contains("embed") || leaf == "wte" || leaf == "wpe"
}

/// A matrix with its axes exchanged.
pub(super) fn transposed(tensor: &Tensor) -> Tensor {
    let (rows, columns) = (tensor.dimension(0), tensor.dimension(1));
    let size = tensor.dtype.bitsize() / 8;
    let source = tensor.clone();
    let made = move || {
        let bytes = source.bytes()?;
        let mut taken = Vec::with_capacity(bytes.len());
        for column in 0..columns {
            for row in 0..rows {
                let at = (row * columns + column) * size;
                taken.extend_from_slice(&bytes[at..at + size]);
            }
        }
        Ok(taken)
    };
    tensor.derived(tensor.dtype, vec![columns, rows], Arc::new(made))
}

/// The tensor in another type, each value rounded once.
pub(super) fn typed(tensor: &Tensor, dtype: Option<Float>) -> Tensor {
    match dtype {
        Some(float) if float.dtype() != tensor.dtype => scaled(tensor, 1.0, dtype),
        _ => tensor.clone(),
    }
}

/// The tensor multiplied by a number, each product rounded once to the type.
pub(super) fn scaled(tensor: &Tensor, by: f64, dtype: Option<Float>) -> Tensor {
    let Some(float) = dtype.or_else(|| Float::of(tensor.dtype)) else {
        return tensor.clone();
    };
    let source = tensor.clone();
    let made = move || {
        let mut values = source.to_f64()?;
        values.iter_mut().for_each(|value| *value *= by);
        let mut bytes = vec![0; values.len() * float.size()];
        narrow(float, &values, &mut bytes);
        Ok(bytes)
    };
    tensor.derived(float.dtype(), tensor.shape.clone(), Arc::new(made))
}

/// The same elements under another shape.
pub(super) fn reshaped(tensor: &Tensor, shape: Vec<usize>) -> Tensor {
    debug_assert_eq!(shape.iter().product::<usize>(), tensor.elements());
    Tensor {
        shape,
        ..tensor.clone()
    }
}

/// A number as a tensor without axes, in the type of `like` where that holds it exactly.
pub(super) fn number(like: &Tensor, value: f64) -> Tensor {
    let holds = |float: Float| {
        let mut bytes = vec![0; float.size()];
        narrow(float, &[value], &mut bytes);
        let mut back = [0.0];
        widen(float, &bytes, &mut back);
        (back == [value]).then_some((float, bytes))
    };
    let own = Float::of(like.dtype).and_then(holds);
    let (float, bytes) = own
        .or_else(|| holds(Float::F32))
        .unwrap_or_else(|| (Float::F64, value.to_le_bytes().to_vec()));
    like.derived(
        float.dtype(),
        Vec::new(),
        Arc::new(move || Ok(bytes.clone())),
    )
}

fn renamed(tensor: &Tensor, name: String) -> Tensor {
    Tensor {
        name,
        ..tensor.clone()
    }
}
