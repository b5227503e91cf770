//! The rows that a tensor starts from: those of the base, and those that adapters bring.

use std::ops::Range;

use crate::adapter::evaluate::{Elements, Recipe};
use crate::error::{Reason, Result};
use crate::linalg::Kernel;
use crate::ops::merge::Control;
use crate::ops::merge::plan::PlannedTensor;
use crate::tensor::{DType, Float, Tensor};

/// Where the rows of a tensor come from.
pub(super) struct Source<'a> {
    pub(super) tensor: &'a PlannedTensor,
    /// The type of all rows but those that an adapter brings in another one.
    pub(super) float: Float,
}

impl<'a> Source<'a> {
    pub(super) fn of(tensor: &'a PlannedTensor) -> Result<Self> {
        let float = float(tensor.source.dtype, &tensor.source)?;
        for (rows, _) in tensor.rows.values() {
            rows.float()?;
        }
        Ok(Source { tensor, float })
    }

    /// Rows cut into runs of one type.
    pub(super) fn runs(&self, rows: Range<usize>) -> Vec<(Range<usize>, Float)> {
        let mut runs = Vec::new();
        let mut start = rows.start;
        for (row, (tensor, _)) in self.tensor.rows.range(rows.clone()) {
            if let Some(float) = Float::of(tensor.dtype)
                && float != self.float
            {
                runs.push((start..*row, self.float));
                runs.push((*row..row + 1, float));
                start = row + 1;
            }
        }
        runs.push((start..rows.end, self.float));
        runs.retain(|(rows, _)| !rows.is_empty());
        runs
    }

    /// Shows all rows to the steps that ask for it.
    pub(super) fn survey(
        &self,
        recipe: &mut Recipe,
        rows: usize,
        height: usize,
        kernel: &Kernel,
        control: &Control<'_>,
    ) -> Result<()> {
        let mut bytes = Vec::new();
        for first in (0..rows).step_by(height) {
            control.check()?;
            let rows = first..(first + height).min(rows);
            for (rows, float) in self.runs(rows) {
                self.read(rows.clone(), float, recipe.columns, &mut bytes)?;
                let bytes = &bytes;
                recipe.survey(rows, Elements { float, bytes }, kernel)?;
            }
        }
        Ok(())
    }

    /// Reads a run.
    pub(super) fn read(
        &self,
        rows: Range<usize>,
        float: Float,
        columns: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let row_bytes = columns * float.size();
        bytes.resize(rows.len() * row_bytes, 0);
        if float == self.float {
            let source = &self.tensor.source;
            source.read(rows.start * row_bytes, bytes)?;
        }
        for (row, (tensor, from)) in self.tensor.rows.range(rows.clone()) {
            let new = tensor.bytes_of(from * row_bytes, row_bytes)?;
            let at = (row - rows.start) * row_bytes;
            bytes[at..at + row_bytes].copy_from_slice(&new);
        }
        Ok(())
    }
}

/// The float that a type is.
pub(super) fn float(dtype: DType, tensor: &Tensor) -> Result<Float> {
    Float::of(dtype).ok_or_else(|| {
        tensor.error(Reason::TensorType {
            dtype: dtype.to_string(),
        })
    })
}
