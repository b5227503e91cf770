//! What an adapter asks of a method.

use std::fmt::Debug;
use std::ops::Range;

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::candidates::Candidates;
use super::fit::{Change, Fitted};
use super::module::{Module, Role};
use crate::error::{Error, Reason, Result};
use crate::linalg::Kernel;
use crate::linalg::truncated::Truncation;
use crate::tensor::{Float, Tensor};

/// The mathematics of one kind of adapter. The shelf `methods` implements it, one file each.
pub trait Method: Sync + Debug {
    /// Its name in the field.
    fn name(&self) -> &'static str;

    /// The tensors it is made of, each with its customary suffix.
    fn roles(&self) -> &'static [RoleUse];

    /// Whether its delta adds up with others, or needs its place in the order.
    fn order(&self) -> Order;

    /// Whether its result is the same at any strength but 0.
    fn ignores_strength(&self) -> bool {
        false
    }

    /// Checks that the shapes of a module agree with each other.
    ///
    /// # Errors
    /// [`Reason::FactorShape`].
    fn check(&self, module: &Module) -> Result<()>;

    /// The layer that the parameters are made for, as far as they tell.
    fn extent(&self, module: &Module) -> Extent;

    /// The inner dimension of the parameters, where there is one.
    fn rank(&self, module: &Module) -> Option<usize>;

    /// Whether it changes the layer's weight.
    fn weight(&self, _module: &Module) -> bool {
        true
    }

    /// Whether it changes the layer's bias as well.
    fn bias(&self, module: &Module) -> BiasUse;

    /// Whether `other` adds the transpose of what `module` adds, bit for bit in its parameters: a power
    /// that additive methods may have, asked where an embedding and an output share one tensor.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn is_transpose(&self, _module: &Module, _other: &Module) -> Result<bool> {
        Ok(false)
    }

    /// One module of the parts of a fused layer of `outputs`, each on its rows: a power that additive
    /// methods may have. Outputs of no part stay as they are.
    ///
    /// # Errors
    /// [`Reason::MethodOnTarget`] where the method has no such module.
    fn fuse(&self, parts: &[(&Module, Vec<Range<usize>>)], _outputs: usize) -> Result<Module> {
        let reason = Reason::MethodOnTarget {
            method: self.name(),
            what: "a part of a fused layer",
        };
        Err(match parts.first() {
            Some((module, _)) => module.error(reason),
            None => Error::new(reason),
        })
    }

    /// The module without what its parameters multiply by zero, where a part of a fused layer was taken from it;
    /// nothing where that is all of it.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn without_zeros(&self, module: Module) -> Result<Option<Module>> {
        Ok(Some(module))
    }

    /// The parameters that add whole differences to a weight and a bias: a power of the method that is made of them.
    fn of_difference(
        &self,
        _weight: Option<Tensor>,
        _bias: Option<Tensor>,
    ) -> Option<Vec<(Role, Tensor)>> {
        None
    }

    /// The parameters whose effect on a weight is nearest to a change of it: a power that methods may have.
    ///
    /// # Errors
    /// [`Reason::NotFitted`] where the method does not have it; what reading and decomposing gives.
    fn fit(&self, _change: &Change<'_>) -> Result<Fitted> {
        let method = self.name();
        Err(Error::new(Reason::NotFitted { method }))
    }

    /// Whether it has that power.
    fn fits(&self) -> bool {
        false
    }

    /// The module, and its strength, that takes away what this one does at a strength, but for rounding: a power that
    /// methods may have. What adds takes away at the opposite strength.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn inverse(&self, module: &Module, strength: f64) -> Result<Option<(Module, f64)>> {
        Ok(match self.order() {
            Order::Additive => Some((module.clone(), -strength)),
            Order::Sequential => None,
        })
    }

    /// The shape of the weight that it is made for, as it is stored: inputs first for embeddings, otherwise outputs
    /// first as far as its parameters tell.
    fn shape(&self, _module: &Module) -> Option<Vec<usize>> {
        None
    }

    /// One module that changes any weight at strength 1 by Σ factor · (the change of the part), to the rounding of its
    /// parameters, which are as wide as that takes: a power that methods may have. All parts are of this method and on
    /// one layer.
    ///
    /// # Errors
    /// [`Reason::FactorShape`] where they are made for different weights; what reading the parameters gives.
    fn sum(&self, parts: &[(&Module, f64)]) -> Result<Option<Module>> {
        Ok(match parts {
            [(module, factor)] if *factor == 1.0 => Some((*module).clone()),
            _ => None,
        })
    }

    /// Two matrices whose product, rows × columns of the stored matrix, is the part of low rank of what it does at
    /// strength 1, which is all of it for additive methods: a power that methods may have.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn factors(
        &self,
        _module: &Module,
        _on: &Geometry,
    ) -> Result<Option<(Array2<f64>, Array2<f64>)>> {
        Ok(None)
    }

    /// The module with its part of low rank replaced by the product of two matrices, as [`Method::factors`] gives them;
    /// the multiplier is then 1. A power of methods that have factors.
    fn of_factors(
        &self,
        _module: &Module,
        _left: Array2<f64>,
        _right: Array2<f64>,
    ) -> Option<Module> {
        None
    }

    /// The module with zeros behind its factors, so that it has a rank; no bit of a value and no change of a weight
    /// is another. Nothing where a factor is wider. A power of methods that have factors.
    fn filled(&self, _module: &Module, _rank: usize) -> Option<Module> {
        None
    }

    /// The module with its part of low rank as decomposed, in f64; the multiplier is the same. A power of methods that
    /// have factors. Uses the vectors up.
    fn of_triplets(&self, _module: &Module, _found: &mut Truncation) -> Option<Module> {
        None
    }

    /// What it does to one tensor of the base, ready to be applied to blocks of rows.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn update(&self, module: &Module, on: &Geometry, strength: f64) -> Result<Box<dyn Update>>;
}

/// A role with its customary suffix in files.
#[derive(Clone, Copy, Debug)]
pub struct RoleUse {
    /// What the tensor is.
    pub role: Role,
    /// How it is usually spelled after the module path.
    pub suffix: &'static str,
    /// Whether a module without it is broken.
    pub required: bool,
    /// What its elements are numbered by.
    pub along: Along,
}

/// What the elements of a parameter are numbered by, so that some outputs of a layer can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// Its first axis, or its only one, is that of the outputs.
    Outputs,
    /// It says the same of every output.
    Others,
    /// It follows from all outputs together: it means something else for some of them.
    AllOutputs,
}

/// How a method combines with others on one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Its delta does not depend on the weight: any number add up in one rounding.
    Additive,
    /// It transforms the weight: adapters apply in the order given.
    Sequential,
}

/// Features of the layer that a module is made for; `None` where its parameters do not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Output features.
    pub outputs: Option<usize>,
    /// Input features, times the kernel size where `kernel` says so.
    pub inputs: Option<usize>,
    /// Whether `inputs` counts each element of a convolution's kernel.
    pub with_kernel: bool,
    /// Whether these are rows and columns of the weight as it is stored, of whatever number of axes,
    /// rather than outputs and inputs.
    pub as_stored: bool,
}

/// Whether a method changes the bias of its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasUse {
    /// It does not.
    No,
    /// It does if there is one.
    IfPresent,
    /// It does, and there must be one.
    Required,
}

/// The tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The weight.
    Weight,
    /// The bias: outputs × 1.
    Bias,
}

/// Which axis of the stored matrix is which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Orientation {
    /// Rows are outputs: Linear, convolutions (inputs and kernel flattened to columns).
    OutputsFirst,
    /// Rows are inputs: GPT-2's Conv1D, embeddings.
    InputsFirst,
}

/// A stored tensor, or a slice of its rows, seen as a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Weight or bias.
    pub part: Part,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Which axis is which.
    pub orientation: Orientation,
    /// Elements per input along the input axis (the kernel size of a convolution, otherwise 1).
    pub kernel: usize,
}

/// What one module does to one matrix, block of rows by block of rows.
///
/// Row numbers are those of the matrix in [`Geometry`]; a block holds whole rows.
pub trait Update: Send + Sync {
    /// Whether [`Update::survey`] must see the whole base before anything is applied.
    fn surveys(&self) -> bool {
        false
    }

    /// Sees the base, rows ascending, once.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn survey(&mut self, _rows: Range<usize>, _base: &[f64], _kernel: &Kernel) -> Result<()> {
        Ok(())
    }

    /// Changes `value`, the rows as the updates before this one left them; `base` holds the rows as
    /// they were.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn apply(
        &self,
        rows: Range<usize>,
        base: &[f64],
        value: &mut [f64],
        workspace: &mut Workspace,
        kernel: &Kernel,
    ) -> Result<()>;

    /// Whether the delta of an element is not exactly zero. Asked only where the base is −0 and the
    /// value came out as zero, because a delta of zero must leave even the sign alone.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn touches(&self, row: usize, column: usize) -> Result<bool> {
        match self.multiplier() {
            Some(c) => Ok(c != 0.0 && self.chain(row, column)? != 0.0),
            None => Ok(false),
        }
    }

    /// `c`, where all that it does to an element is `value = fma(c, chain, value)`: then what was added can be taken
    /// out again.
    fn multiplier(&self) -> Option<f64> {
        None
    }

    /// The chains of the rows of a block, where it has a multiplier.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn chains(&self, _rows: Range<usize>, _chains: &mut [f64], _kernel: &Kernel) -> Result<()> {
        Ok(())
    }

    /// The chain of one element, where it has a multiplier.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn chain(&self, _row: usize, _column: usize) -> Result<f64> {
        Ok(0.0)
    }

    /// What gives candidates for its chains on a library of linear algebra that has products of f64, or has not; `to`
    /// is the type of the result. Nothing where it has no bound for them, or the bound would settle nothing.
    ///
    /// # Errors
    /// What reading the parameters gives.
    fn candidates(&self, _to: Float, _has_doubles: bool) -> Result<Option<Candidates<'_>>> {
        Ok(None)
    }
}

/// Memory that a thread keeps between blocks.
#[derive(Debug, Default)]
pub struct Workspace {
    /// A copy of the block, for methods that need an intermediate matrix.
    pub matrix: Vec<f64>,
}
