//! Weights that are widened with zeros, so that an adapter fits them.

use std::sync::Arc;

use crate::adapter::Padding;
use crate::error::{Error, Reason, Result};
use crate::tensor::{Tensor, elements};

/// Most bytes of a widened weight, which is kept in memory.
const PADDED: usize = 1 << 28;

/// A tensor with zeros behind it along every axis; `None` where it does not fit in or gets too large.
pub(super) fn padded(tensor: &Tensor, shape: &[usize]) -> Result<Option<Tensor>> {
    let old = &tensor.shape;
    let fits = old.len() == shape.len() && old.iter().zip(shape).all(|(old, new)| old <= new);
    let size = tensor.dtype.bitsize() / 8;
    let length = elements(shape).and_then(|count| count.checked_mul(size));
    let (Some(length), Some(width)) = (length.filter(|l| fits && *l <= PADDED), old.last()) else {
        return Ok(None);
    };
    let mut padded = vec![0; length];
    let bytes = tensor.bytes()?;
    for (row, bytes) in bytes.chunks_exact((width * size).max(1)).enumerate() {
        // The place of the row in both shapes, from the last axis but one outwards.
        let (mut row, mut at, mut stride) = (row, 0, size * shape[shape.len() - 1]);
        for axis in (0..shape.len() - 1).rev() {
            at += row % old[axis] * stride;
            (row, stride) = (row / old[axis], stride * shape[axis]);
        }
        padded[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Ok(Some(Tensor {
        shape: shape.to_vec(),
        offset: 0,
        length: length as u64,
        memory: Some(Arc::new(padded)),
        made: None,
        ..tensor.clone()
    }))
}

pub(super) fn not_padded(padding: &Padding, base: &[usize]) -> Error {
    let reason = Reason::PaddedShape {
        adapter: padding.shape.clone(),
        base: base.to_vec(),
    };
    padding.tensor.error(reason).on(&*padding.path)
}
