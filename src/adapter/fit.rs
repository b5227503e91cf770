//! A change of a weight, for methods that find the parameters of it.

use std::ops::Range;

use super::method::Geometry;
use super::module::{Role, Scale};
use crate::error::Result;
use crate::linalg::truncated::{Blocks, Settings, Truncation};
use crate::tensor::{Float, Tensor, widen};

/// A stored tensor as blocks of whole rows, widened exactly.
pub struct Stored<'a> {
    tensor: &'a Tensor,
    float: Float,
    rows: usize,
    columns: usize,
}

impl<'a> Stored<'a> {
    /// Sees a tensor as a matrix of its first axis and the rest.
    ///
    /// # Errors
    /// [`crate::Reason::AdapterType`] for types without arithmetic.
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (rows, inner) = tensor
            .shape
            .split_first()
            .map_or((1, &[][..]), |(rows, inner)| (*rows, inner));
        Ok(Stored {
            tensor,
            float: tensor.float()?,
            rows,
            columns: inner.iter().product(),
        })
    }
}

impl Blocks for Stored<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let size = self.columns * self.float.size();
        let bytes = self.tensor.bytes_of(rows.start * size, rows.len() * size)?;
        widen(self.float, &bytes, values);
        Ok(())
    }
}

/// What is added to a weight, and how that is to be approximated.
pub struct Change<'a> {
    /// What is added, rows as stored.
    pub difference: &'a dyn Blocks,
    /// The weight before and after, where they are known.
    pub sides: Option<&'a Difference<'a>>,
    /// How a module lies on it.
    pub geometry: Geometry,
    /// The shape of the stored weight.
    pub shape: &'a [usize],
    /// How matrices are decomposed.
    pub settings: Settings<'a>,
    /// The numerator of the scale; the rank if absent, so that the scale is 1.
    pub alpha: Option<f64>,
}

impl Change<'_> {
    /// α/r for a rank that came out.
    pub fn scale(&self, rank: usize) -> Scale {
        Scale::of(self.alpha.unwrap_or(rank as f64), rank, false)
    }
}

/// The difference of two matrices, exact for types up to f32 and rounded once for f64.
pub struct Difference<'a> {
    /// The one that is taken away.
    pub base: &'a dyn Blocks,
    /// The one that it is taken from.
    pub tuned: &'a dyn Blocks,
}

impl Blocks for Difference<'_> {
    fn rows(&self) -> usize {
        self.base.rows()
    }

    fn columns(&self) -> usize {
        self.base.columns()
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let mut base = vec![0.0; values.len()];
        self.base.fill(rows.clone(), &mut base)?;
        self.tuned.fill(rows, values)?;
        for (value, base) in values.iter_mut().zip(&base) {
            *value -= base;
        }
        Ok(())
    }
}

/// Values of parameters, row-major, in the shapes that the method defines.
pub type Parameters = Vec<(Role, Vec<usize>, Vec<f64>)>;

/// Parameters that were found for a change.
pub struct Fitted {
    /// Their values.
    pub parameters: Parameters,
    /// The multiplier that they are meant for.
    pub scale: Scale,
    /// The decomposition behind them; its vectors have been used up.
    pub truncation: Truncation,
}
