//! Lanczos runs in lockstep: the norm of what is outside a Krylov space.

use ndarray::Array2;

use super::krylov::Krylov;
use crate::error::Result;
use crate::linalg::dense::{Dense, Real};
use crate::linalg::random::Random;

/// Several runs of A on the complement of a basis, each from a random start of its own.
///
/// As far as rounding makes a run lose orthogonality, Ritz values are repeated, and the largest remains one (Paige,
/// "Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem", 1980).
pub(super) struct Lanczos<T> {
    now: Array2<T>,
    before: Array2<T>,
    /// The diagonals of the tridiagonal matrices, step by step.
    diagonal: Vec<Vec<f64>>,
    /// What stands beside them.
    beside: Vec<Vec<f64>>,
}

impl<T: Real> Lanczos<T> {
    /// Starts so many runs.
    pub(super) fn new(krylov: &Krylov<'_, T>, runs: usize, random: &mut Random) -> Result<Self> {
        let mut now = krylov.random_outside(runs, random)?;
        normalise(&mut now);
        Ok(Lanczos {
            before: Array2::from_elem(now.dim(), T::zero()),
            now,
            diagonal: Vec::new(),
            beside: Vec::new(),
        })
    }

    /// One more step of all runs.
    pub(super) fn step(&mut self, krylov: &Krylov<'_, T>) -> Result<()> {
        let mut next = krylov.outside(self.now.view())?;
        let alphas = products(&next, &self.now);
        let betas = self.beside.last().cloned();
        for (run, alpha) in alphas.iter().enumerate() {
            let alpha = T::rounded(*alpha);
            let beta = T::rounded(betas.as_ref().map_or(0.0, |betas| betas[run]));
            let others = self.now.row(run).into_iter().zip(self.before.row(run));
            for (value, (now, before)) in next.row_mut(run).iter_mut().zip(others) {
                *value = *value - alpha * *now - beta * *before;
            }
        }
        self.diagonal.push(alphas);
        self.beside.push(normalise(&mut next));
        self.before = std::mem::replace(&mut self.now, next);
        Ok(())
    }

    /// The largest Ritz value of all runs so far, and a little more for the rounding of f32.
    pub(super) fn largest(&self, wide: &dyn Dense<f64>) -> Result<f64> {
        let size = self.diagonal.len();
        let mut largest = 0.0f64;
        for run in 0..self.now.nrows() {
            let tridiagonal = Array2::from_shape_fn((size, size), |(i, j)| match i.abs_diff(j) {
                0 => self.diagonal[i][run],
                1 => self.beside[i.min(j)][run],
                _ => 0.0,
            });
            let values = wide.eigenvalues(tridiagonal.view())?;
            largest = largest.max(values.first().copied().unwrap_or(0.0));
        }
        Ok(largest * (1.0 + 1e-5))
    }
}

/// Scales rows to length one, and tells what their length was; rows of zeros stay.
fn normalise<T: Real>(block: &mut Array2<T>) -> Vec<f64> {
    let norms: Vec<f64> = products(block, block).into_iter().map(f64::sqrt).collect();
    for (mut row, norm) in block.rows_mut().into_iter().zip(&norms) {
        if *norm > 0.0 {
            row.mapv_inplace(|value| T::rounded(value.widened() / norm));
        }
    }
    norms
}

/// The inner product of each pair of rows, in f64.
fn products<T: Real>(a: &Array2<T>, b: &Array2<T>) -> Vec<f64> {
    let rows = a.rows().into_iter().zip(b.rows());
    rows.map(|(a, b)| {
        a.iter()
            .zip(b)
            .fold(0.0, |sum, (a, b)| sum + a.widened() * b.widened())
    })
    .collect()
}
