//! How far a truncation can be above the best possible one: `docs/certificate.md` has the derivation.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::error::Result;
use crate::linalg::dense::{Dense, Into};

/// Independent runs of Lanczos.
pub(super) const RUNS: usize = 16;

/// How often any statement about one matrix may be wrong, over our own random numbers.
const FAILURE: f64 = 1e-9;

/// How often what is looked at in one try may be wrong: tries halve what is left, and a try looks several times.
pub(super) fn failure(tries: i32) -> f64 {
    FAILURE / 2f64.powi(tries) / STEPS.len() as f64
}

/// Most steps of Lanczos.
pub(super) const MOST_STEPS: usize = 28;

/// Most steps of Lanczos for a bound of the first eigenvalue.
pub(super) const ENOUGH: usize = 40;

/// After which steps of Lanczos the bound is looked at.
pub(super) const STEPS: &[usize] = &[5, 7, 10, 14, 20, MOST_STEPS];

/// The ε for which all of [`RUNS`] runs of as many steps miss `‖C‖ ≤ t/(1 − ε)` with a probability of at most
/// `failure`; C has `size` rows.
///
/// Source: Kuczyński and Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
/// random start", SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.1: one run misses with a probability of at most
/// 1.648·√n·exp(−√ε·(2k − 1)).
fn shortfall(size: usize, steps: usize, failure: f64) -> f64 {
    let exponent = (1.648 * (size as f64).sqrt()).ln() - failure.ln() / RUNS as f64;
    (exponent / (2 * steps - 1) as f64).powi(2)
}

/// The bound of the norm that Lanczos gives where the largest Ritz value of all runs is `largest`; infinite where the
/// steps are too few for any.
pub(super) fn bound(largest: f64, size: usize, steps: usize, failure: f64) -> f64 {
    match shortfall(size, steps, failure) {
        short if short < 1.0 => largest / (1.0 - short),
        _ => f64::INFINITY,
    }
}

/// How the space and what is outside are coupled, in Ritz coordinates.
pub(super) struct Outside<'a> {
    pub(super) algebra: &'a dyn Dense<f64>,
    /// Ritz values, falling.
    pub(super) ritz: &'a [f64],
    /// A matrix Ẑ of which `ẐᵀẐ` is G, with as few rows as there are.
    pub(super) coupling: ArrayView2<'a, f64>,
    /// Its norm.
    pub(super) norm: f64,
    /// A bound of the largest eigenvalue of A; infinite where none is known.
    pub(super) cap: f64,
}

/// How often an interval is halved.
const HALVINGS: usize = 2;

/// Eigenvalues that are bounded at a time.
const CHUNK: usize = 8;

impl Outside<'_> {
    /// At most how many eigenvalues of A are above ν, where `‖C‖ ≤ c < ν`: those of `H + G/(ν − c)`.
    ///
    /// With `D = diag(θ) − ν` these are the positive ones of `D + ẐᵀẐ/(ν − c)`, which are as many as D has, and as
    /// `(ν − c)·I + Ẑ·D⁻¹·Ẑᵀ` has negative ones (Haynsworth, 1968, on the matrix of which both are Schur complements).
    fn above(&self, nu: f64, c: f64) -> Result<usize> {
        let mut weighted = self.coupling.to_owned();
        for (mut column, theta) in weighted.columns_mut().into_iter().zip(self.ritz) {
            let distance = theta - nu;
            column.mapv_inplace(|value| value / distance);
        }
        let rows = self.coupling.nrows();
        let mut small = Array2::zeros((rows, rows));
        self.algebra.multiply(
            weighted.view(),
            self.coupling.t(),
            small.view_mut(),
            Into::Place,
        )?;
        small.diag_mut().mapv_inplace(|value| value + nu - c);
        let values = self.algebra.eigenvalues(small.view())?;
        let negative = values.iter().filter(|value| **value < 0.0).count();
        let positive = self.ritz.iter().take_while(|theta| **theta > nu).count();
        Ok(positive + negative)
    }

    /// At most what the first `count` eigenvalues of A are above their Ritz values, all together, where `‖C‖ ≤ c`;
    /// nothing as soon as that is more than `allowed`. Bounds that are closer than `step` are not looked for.
    pub(super) fn gap(&self, c: f64, count: usize, allowed: f64, step: f64) -> Result<Option<f64>> {
        let step = step.min(self.norm);
        let mut sum = 0.0;
        // The last ones have the widest gaps.
        let indices: Vec<usize> = (0..count).rev().collect();
        for some in indices.chunks(CHUNK) {
            let gaps = some
                .par_iter()
                .map(|index| self.gap_of(*index, c, allowed, step));
            for gap in gaps.collect::<Result<Vec<f64>>>()? {
                sum += gap;
            }
            if sum > allowed {
                return Ok(None);
            }
        }
        Ok(Some(sum))
    }

    /// At most what an eigenvalue is above its Ritz value; at least `allowed` where it may be more.
    fn gap_of(&self, index: usize, c: f64, allowed: f64, step: f64) -> Result<f64> {
        let theta = self.ritz[index];
        // No eigenvalue is above the first.
        if c >= self.cap {
            return Ok((self.cap - theta).max(0.0));
        }
        // Weyl: the coupling moves no eigenvalue by more than its norm.
        let (start, most) = (theta.max(c), self.norm);
        let holds = |more: f64| -> Result<bool> {
            let mut nu = start + more;
            while self.ritz.contains(&nu) {
                nu = nu.next_up();
            }
            Ok(nu > c && self.above(nu, c)? <= index)
        };
        let (mut low, mut high) = (0.0, step);
        while high < most && !holds(high)? {
            (low, high) = (high, 4.0 * high);
            if start + low - theta > allowed {
                break;
            }
        }
        high = high.min(most);
        if low > 0.0 && start + low - theta <= allowed {
            for _ in 0..HALVINGS {
                let middle = (low + high) / 2.0;
                match holds(middle)? {
                    true => high = middle,
                    false => low = middle,
                }
            }
        }
        Ok((start + high).min(self.cap.max(theta)) - theta)
    }
}

/// What is to be proved of one space.
pub(super) struct Goal<'a> {
    /// The Ritz values of the rank, falling.
    pub(super) ritz: &'a [f64],
    pub(super) tolerance: f64,
    /// The squared residual.
    pub(super) residual: f64,
    /// What the rounding of products may have added to the Ritz values.
    pub(super) rounding: f64,
    /// Whether more than the tolerance is to be told as well.
    pub(super) at_any_rate: bool,
}

impl Goal<'_> {
    /// What the squared residual may be above the best one.
    pub(super) fn allowed(&self) -> f64 {
        self.residual * (1.0 - (1.0 + self.tolerance).powi(-2)) - self.rounding
    }

    /// How far all eigenvalues are above their Ritz values together, if each is at `c` or at its own.
    pub(super) fn gaps(&self, c: f64) -> f64 {
        self.ritz.iter().map(|theta| (c - theta).max(0.0)).sum()
    }
}

/// A goal, and what is known of the space.
pub(super) struct Certificate<'a> {
    goal: Goal<'a>,
    outside: Outside<'a>,
    /// The largest c that is known to be small enough, and the smallest that is known not to be.
    known: (f64, f64),
}

impl<'a> Certificate<'a> {
    pub(super) fn new(goal: Goal<'a>, outside: Outside<'a>) -> Self {
        Certificate {
            goal,
            outside,
            known: (0.0, f64::INFINITY),
        }
    }

    /// The share that the residual is at most above the best one where `‖C‖ ≤ c`; nothing where that is not proved, or
    /// above the tolerance and not asked for.
    pub(super) fn excess(&self, c: f64) -> Result<Option<f64>> {
        let (goal, allowed) = (&self.goal, self.goal.allowed());
        let most = match goal.at_any_rate {
            true => goal.residual - goal.rounding,
            false => allowed,
        };
        if allowed <= 0.0 || goal.gaps(c.min(self.outside.cap)) > most {
            return Ok(None);
        }
        let (count, step) = (goal.ritz.len(), allowed / goal.ritz.len() as f64 / 8.0);
        let gap = self.outside.gap(c, count, most, step)?;
        let least = gap.map(|gap| goal.residual - gap - goal.rounding);
        let least = least.filter(|least| *least > 0.0);
        Ok(least.map(|least| (goal.residual / least).sqrt() - 1.0))
    }

    /// Whether `‖C‖ ≤ c` proves enough. The less is outside the more is proved, so what is known of some numbers tells
    /// of others.
    pub(super) fn is_enough(&mut self, c: f64) -> Result<bool> {
        let (enough, too_much) = self.known;
        if c > enough && c < too_much {
            let proves = |excess: f64| excess <= self.goal.tolerance;
            match self.excess(c)?.is_some_and(proves) {
                true => self.known.0 = c,
                false => self.known.1 = c,
            }
        }
        Ok(c <= self.known.0)
    }

    /// Takes a bound of the first eigenvalue; what was not enough before may be now.
    pub(super) fn cap(&mut self, cap: f64) {
        self.outside.cap = cap;
        self.known.1 = f64::INFINITY;
    }
}
