//! Factors of fused layers: one up factor for each part, stacked, and the down factors one below the other.
//!
//! `ΔW` of part j is `B_j · A_j`. With A as it is stored, r·n × in, the same product comes out of a B that
//! holds each `B_j` at the rows of its part and the columns of its `A_j`, and zeros elsewhere.

use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::tensor::Tensor;

/// Most parts of a fused layer.
const PARTS_LIMIT: usize = 16;

/// Most bytes of a factor with its zeros, unless its parts alone are that large: it is made in memory.
const BYTES_LIMIT: u64 = 256 << 20;

/// The up factor of a whole fused layer: `parts` are the rows of each part in their order, and whether the
/// part is adapted; `up` holds those that are, r columns each.
///
/// # Errors
/// [`Reason::FactorShape`] where the parts do not fill the factor; [`Reason::TooMany`].
pub(super) fn block_diagonal(up: &Tensor, parts: &[(usize, bool)]) -> Result<Tensor> {
    if parts.len() > PARTS_LIMIT {
        let (what, limit) = ("parts of a fused layer", PARTS_LIMIT);
        return Err(Error::new(Reason::TooMany { what, limit }));
    }
    let sum = |rows: &[usize]| rows.iter().copied().try_fold(0, usize::checked_add);
    let all: Vec<usize> = parts.iter().map(|part| part.0).collect();
    let adapted: Vec<usize> = parts.iter().filter(|part| part.1).map(|p| p.0).collect();
    let rank = up.dimension(1);
    let all = sum(&all);
    let fits = up.shape.len() >= 2
        && up.shape[2..].iter().all(|size| *size == 1)
        && sum(&adapted) == Some(up.dimension(0));
    let columns = rank.checked_mul(adapted.len());
    let (Some(rows), Some(columns), true) = (all, columns, fits) else {
        return Err(wrong(up, parts));
    };
    let size = up.float()?.size();
    // A part that is not adapted may be of any size.
    let bytes = rows
        .checked_mul(columns)
        .and_then(|count| count.checked_mul(size));
    let limit = BYTES_LIMIT.max(up.length.saturating_mul(PARTS_LIMIT as u64));
    let Some(bytes) = bytes.filter(|bytes| *bytes as u64 <= limit) else {
        let bytes = bytes.map_or(u64::MAX, |bytes| bytes as u64);
        return Err(up.error(Reason::FileTooLarge { bytes, limit }));
    };
    let (source, parts) = (up.clone(), parts.to_vec());
    let made = move || {
        let stacked = source.bytes()?;
        let mut whole = vec![0; bytes];
        let (line, wide) = (rank * size, columns * size);
        let mut lines = stacked.chunks_exact(line.max(1));
        let (mut row, mut at) = (0, 0);
        for (count, adapted) in &parts {
            if *adapted {
                let target = whole[row * wide..].chunks_exact_mut(wide.max(1));
                for (target, source) in target.take(*count).zip(&mut lines) {
                    target[at..at + line].copy_from_slice(source);
                }
                at += line;
            }
            row += count;
        }
        Ok(whole)
    };
    Ok(up.derived(up.dtype, vec![rows, columns], Arc::new(made)))
}

fn wrong(up: &Tensor, parts: &[(usize, bool)]) -> Error {
    let problem = format!(
        "an up factor of shape {:?} does not consist of the parts {parts:?} (rows, adapted)",
        up.shape
    );
    up.error(Reason::FactorShape { problem })
}
