//! Some outputs of a module, in another order: what a fused layer and its parts have in common.

use std::ops::Range;
use std::sync::Arc;

use super::method::Along;
use super::module::{Module, Stored};
use crate::error::{Reason, Result};
use crate::tensor::Tensor;

impl Module {
    /// Whether a parameter differs from one output of the layer to another.
    pub fn is_along_outputs(&self) -> bool {
        let roles = self.method.roles().iter();
        roles
            .filter(|known| self.get(known.role).is_some())
            .any(|known| known.along != Along::Others)
    }

    /// The module of some of the outputs, in the order of `rows`. Nothing is read before it is used.
    ///
    /// # Errors
    /// [`Reason::OutputsTogether`] where a parameter follows from all outputs together and not all are
    /// asked for.
    pub fn outputs(&self, rows: &[Range<usize>]) -> Result<Module> {
        let count: usize = rows.iter().map(Range::len).sum();
        let all = self.method.extent(self).outputs;
        let mut module = self.clone();
        for (role, tensor) in &mut module.parameters {
            let along = self.method.roles().iter().find(|known| known.role == *role);
            match along.map(|known| known.along) {
                Some(Along::Outputs) => *tensor = taken(tensor, self.stored, rows, count),
                Some(Along::AllOutputs) if Some(count) != all => {
                    let role = role.name();
                    return Err(self.error(Reason::OutputsTogether { role }));
                }
                _ => {}
            }
        }
        Ok(module)
    }
}

/// The slices of a tensor along its outputs.
fn taken(tensor: &Tensor, stored: Stored, rows: &[Range<usize>], count: usize) -> Tensor {
    let mut shape = tensor.shape.clone();
    // Vectors of any number of axes have one that counts.
    let axis = match (stored, shape.len()) {
        (Stored::Transposed, 2) => 1,
        _ if tensor.dimension(0) == 1 => shape.iter().position(|size| *size != 1).unwrap_or(0),
        _ => 0,
    };
    let outer: usize = shape[..axis].iter().product();
    let inner: usize = shape[axis + 1..].iter().product();
    let width = inner * tensor.dtype.bitsize() / 8;
    let length = shape[axis] * width;
    shape[axis] = count;
    let (source, rows) = (tensor.clone(), rows.to_vec());
    let made = move || {
        let bytes = source.bytes()?;
        let mut taken = Vec::with_capacity(outer * count * width);
        for block in bytes.chunks_exact(length.max(1)) {
            for rows in &rows {
                taken.extend_from_slice(&block[rows.start * width..rows.end * width]);
            }
        }
        Ok(taken)
    };
    tensor.derived(tensor.dtype, shape, Arc::new(made))
}
