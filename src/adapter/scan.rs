//! What the values of an adapter are like: not finite, or all zero.

use std::collections::HashSet;

use rayon::prelude::*;

use super::Adapter;
use crate::error::Result;
use crate::notice::{Notice, NoticeKind};
use crate::tensor::{Float, Tensor};

/// What the values of a tensor are like.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scan {
    /// How many are NaN or infinite.
    pub not_finite: u64,
    /// Whether there are values, and every one is zero.
    pub all_zero: bool,
}

impl Scan {
    /// Looks at several tensors at once, on all threads.
    ///
    /// # Errors
    /// What reading gives.
    pub fn all(tensors: &[&Tensor]) -> Result<Vec<Self>> {
        tensors.par_iter().map(|tensor| Scan::of(tensor)).collect()
    }

    fn of(tensor: &Tensor) -> Result<Self> {
        let mut scan = Scan {
            not_finite: 0,
            all_zero: tensor.elements() > 0,
        };
        let Some(float) = Float::of(tensor.dtype) else {
            return Ok(Scan::default());
        };
        const PIECE: usize = 1 << 16;
        let mut values = Vec::new();
        for first in (0..tensor.elements()).step_by(PIECE) {
            let count = PIECE.min(tensor.elements() - first);
            values.resize(count, 0.0);
            let bytes = tensor.bytes_of(first * float.size(), count * float.size())?;
            crate::tensor::widen(float, &bytes, &mut values);
            scan.not_finite += values.iter().filter(|value| !value.is_finite()).count() as u64;
            scan.all_zero &= values.iter().all(|value| *value == 0.0);
        }
        Ok(scan)
    }
}

/// The notices that values give rise to.
pub fn notices(adapter: &Adapter, tensors: &[&Tensor], scans: &[Scan]) -> Vec<Notice> {
    let mut notices = Vec::new();
    let factors: HashSet<&str> = adapter
        .modules
        .iter()
        .flat_map(|module| {
            module
                .parameters
                .iter()
                .map(|(_, tensor)| tensor.name.as_str())
        })
        .collect();
    for (tensor, scan) in tensors.iter().zip(scans) {
        let notice = |kind, text: String| {
            Notice::new(kind, text)
                .on(&*tensor.name)
                .in_file(tensor.input.path())
        };
        if scan.all_zero && factors.contains(tensor.name.as_str()) {
            notices.push(notice(
                NoticeKind::AllZero,
                "every value is zero".to_owned(),
            ));
        }
        if scan.not_finite > 0 {
            notices.push(notice(
                NoticeKind::NotFinite,
                format!("{} values are NaN or infinite", scan.not_finite),
            ));
        }
    }
    notices
}
