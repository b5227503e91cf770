//! How far a truncation can be above the best possible one: `docs/certificate.md` has the derivation.

use ndarray::{Array2, ArrayView2};

use crate::error::Result;
use crate::linalg::dense::Dense;

/// Independent runs of Lanczos.
pub(super) const RUNS: usize = 16;

/// How often any statement about one matrix may be wrong, over our own random numbers.
pub(super) const FAILURE: f64 = 1e-9;

/// Numbers of steps of Lanczos that are tried.
pub(super) const STEPS: &[usize] = &[5, 7, 10, 14, 20];

/// The ε for which all of [`RUNS`] runs of as many steps miss `‖C‖ ≤ t/(1 − ε)` with a probability of at most
/// `failure`; C has `size` rows.
///
/// Source: Kuczyński and Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
/// random start", SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.1: one run misses with a probability of at most
/// 1.648·√n·exp(−√ε·(2k − 1)).
pub(super) fn shortfall(size: usize, steps: usize, failure: f64) -> f64 {
    let exponent = (1.648 * (size as f64).sqrt()).ln() - failure.ln() / RUNS as f64;
    (exponent / (2 * steps - 1) as f64).powi(2)
}

/// Upper bounds of the first `count` eigenvalues of A, from Ritz values, the defect G in Ritz coordinates and
/// `c ≥ ‖C‖`.
///
/// For every ν > c, `λᵢ ≤ max(ν, λᵢ(H + G/(ν − c)))`: one decomposition bounds all of them, and of several the
/// smallest bound counts. The ν that matter lie between c and the last eigenvalue asked for.
pub(super) fn bounds(
    algebra: &dyn Dense<f64>,
    ritz: &[f64],
    defect: ArrayView2<'_, f64>,
    c: f64,
    count: usize,
) -> Result<Vec<f64>> {
    // Without a better one: the norm of the coupling adds at most its size (Weyl).
    let coupling = algebra
        .eigenvalues(defect)?
        .first()
        .copied()
        .unwrap_or(0.0)
        .max(0.0)
        .sqrt();
    let mut best: Vec<f64> = ritz[..count]
        .iter()
        .map(|value| value.max(c) + coupling)
        .collect();
    let Some(last) = count.checked_sub(1) else {
        return Ok(best);
    };
    let (mut low, mut high) = (c, best[last]);
    for _ in 0..6 {
        let nu = if high > 4.0 * low && low > 0.0 {
            (low * high).sqrt()
        } else {
            (low + high) / 2.0
        };
        if nu <= c || !nu.is_finite() {
            break;
        }
        let mut shifted: Array2<f64> = defect.mapv(|value| value / (nu - c));
        for (index, value) in ritz.iter().enumerate() {
            shifted[(index, index)] += value;
        }
        let values = algebra.eigenvalues(shifted.view())?;
        for (bound, value) in best.iter_mut().zip(&values) {
            *bound = bound.min(value.max(nu));
        }
        match values[last] > nu {
            true => low = nu,
            false => high = nu,
        }
        if high - low <= 1e-3 * high {
            break;
        }
    }
    Ok(best)
}
