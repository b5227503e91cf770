//! A basis of a block Krylov space, with what a Rayleigh–Ritz step and its certificate need.
//!
//! Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
//! decomposition", 2015. Everything lives on the smaller side of Δ: for the Gram matrix `A` of that side the space is
//! `[X, A·X, A²·X, …]`, every block made orthogonal to all before it, twice.

use ndarray::{Array2, ArrayView2, Axis, concatenate, s};

use super::matrix::Matrix;
use crate::error::Result;
use crate::linalg::dense::{Dense, Into, Real};
use crate::linalg::random::Random;

/// Columns that are widened to f64 at a time.
const STRIP: usize = 4096;

/// The basis. Vectors are rows.
pub(super) struct Krylov<'a, T> {
    matrix: &'a Matrix<'a, T>,
    algebra: &'a dyn Dense<T>,
    wide: &'a dyn Dense<f64>,
    /// Whether the smaller side is that of the rows.
    by_rows: bool,
    /// The basis Q.
    basis: Array2<T>,
    /// `Δᵀ·Q` (or `Δ·Q` where the smaller side is that of the columns).
    images: Array2<T>,
    /// `A·Q`.
    applied: Array2<T>,
    /// `QᵀAQ`, from the images.
    projected: Array2<f64>,
    /// Whether the space is exhausted: A maps it into itself, to rounding.
    pub(super) invariant: bool,
}

/// The solution of the projected problem.
pub(super) struct Ritz {
    /// Ritz values of A, falling.
    pub(super) values: Vec<f64>,
    /// Their vectors in the basis, as columns.
    vectors: Array2<f64>,
}

impl<'a, T: Real> Krylov<'a, T> {
    /// Starts with `A^½` of random vectors.
    pub(super) fn new(
        matrix: &'a Matrix<'a, T>,
        algebra: &'a dyn Dense<T>,
        wide: &'a dyn Dense<f64>,
        width: usize,
        random: &mut Random,
    ) -> Result<Self> {
        let by_rows = matrix.rows() <= matrix.columns();
        let (size, other) = match by_rows {
            true => (matrix.rows(), matrix.columns()),
            false => (matrix.columns(), matrix.rows()),
        };
        let empty = |columns| Array2::from_elem((0, columns), T::zero());
        let mut krylov = Krylov {
            matrix,
            algebra,
            wide,
            by_rows,
            basis: empty(size),
            images: empty(other),
            applied: empty(size),
            projected: Array2::zeros((0, 0)),
            invariant: false,
        };
        let start = gaussian(width.min(size), other, random);
        let start = krylov.back(start.view())?;
        krylov.extend(start)?;
        Ok(krylov)
    }

    /// Length of the vectors.
    pub(super) fn size(&self) -> usize {
        self.basis.ncols()
    }

    /// Number of vectors.
    pub(super) fn len(&self) -> usize {
        self.basis.nrows()
    }

    /// From the smaller side to the larger.
    fn over(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        match self.by_rows {
            true => self.matrix.to_columns(x),
            false => self.matrix.to_rows(x),
        }
    }

    /// From the larger side to the smaller.
    fn back(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        match self.by_rows {
            true => self.matrix.to_rows(x),
            false => self.matrix.to_columns(x),
        }
    }

    /// One more block: the images of the last one under A, and `fresh` random vectors.
    pub(super) fn grow(&mut self, last: usize, fresh: usize, random: &mut Random) -> Result<()> {
        let from = self.len() - last.min(self.len());
        let mut block = self.applied.slice(s![from.., ..]).to_owned();
        if fresh > 0 {
            let start = gaussian(fresh, self.images.ncols(), random);
            let start = self.back(start.view())?;
            block = stacked(&block, &start);
        }
        self.extend(block)
    }

    /// Takes the part of a block that is new.
    fn extend(&mut self, mut block: Array2<T>) -> Result<()> {
        let room = self.size() - self.len();
        if block.nrows() > room {
            block = block.slice(s![..room, ..]).to_owned();
        }
        if block.nrows() == 0 {
            self.invariant = true;
            return Ok(());
        }
        for _ in 0..2 {
            self.remove_basis(&mut block);
            let (q, _) = self.algebra.thin_qr(block.t())?;
            block = q.reversed_axes();
        }
        let images = self.over(block.view())?;
        let applied = self.back(images.view())?;
        let (old, new) = (self.len(), block.nrows());
        self.basis = stacked(&self.basis, &block);
        self.images = stacked(&self.images, &images);
        self.applied = stacked(&self.applied, &applied);
        let mut projected = Array2::zeros((old + new, old + new));
        projected
            .slice_mut(s![..old, ..old])
            .assign(&self.projected);
        let cross = gram(
            self.wide,
            self.images.slice(s![old.., ..]),
            self.images.view(),
        );
        projected.slice_mut(s![old.., ..]).assign(&cross);
        projected
            .slice_mut(s![..old, old..])
            .assign(&cross.slice(s![.., ..old]).t());
        self.projected = projected;
        Ok(())
    }

    /// Makes vectors orthogonal to the basis, once.
    fn remove_basis(&self, block: &mut Array2<T>) {
        if self.len() == 0 {
            return;
        }
        let mut parts = Array2::from_elem((block.nrows(), self.len()), T::zero());
        let (algebra, basis) = (self.algebra, &self.basis);
        algebra.multiply(block.view(), basis.t(), parts.view_mut(), Into::Place);
        parts.mapv_inplace(|part| T::zero() - part);
        algebra.multiply(parts.view(), basis.view(), block.view_mut(), Into::Sum);
    }

    /// Solves the projected problem.
    pub(super) fn ritz(&self) -> Result<Ritz> {
        let (mut values, vectors) = self.wide.eigh(self.projected.view())?;
        values.iter_mut().for_each(|value| *value = value.max(0.0));
        Ok(Ritz { values, vectors })
    }

    /// `G = ZᵀZ` of `Z = AQ − QH`, in Ritz coordinates.
    pub(super) fn defect(&self, ritz: &Ritz) -> Array2<f64> {
        let length = self.len();
        let mut defect = Array2::zeros((length, length));
        let mut minus = self.projected.clone();
        minus.mapv_inplace(|value| -value);
        for first in (0..self.size()).step_by(STRIP) {
            let strip = s![.., first..(first + STRIP).min(self.size())];
            let mut z = self.applied.slice(strip).mapv(T::widened);
            let basis = self.basis.slice(strip).mapv(T::widened);
            self.wide
                .multiply(minus.view(), basis.view(), z.view_mut(), Into::Sum);
            self.wide
                .multiply(z.view(), z.t(), defect.view_mut(), Into::Sum);
        }
        let mut half = Array2::zeros((length, length));
        self.wide.multiply(
            ritz.vectors.t(),
            defect.view(),
            half.view_mut(),
            Into::Place,
        );
        self.wide.multiply(
            half.view(),
            ritz.vectors.view(),
            defect.view_mut(),
            Into::Place,
        );
        defect
    }

    /// The largest Ritz value of several Lanczos runs of A on the complement of the basis, after each number of steps
    /// up to `steps`.
    ///
    /// The runs go in lockstep, each with a start of its own. As far as rounding makes them lose orthogonality, Ritz
    /// values are repeated, and the largest remains one (Paige, 1980).
    pub(super) fn complement(
        &self,
        runs: usize,
        steps: usize,
        random: &mut Random,
    ) -> Result<Vec<f64>> {
        let mut now = gaussian(runs, self.size(), random);
        self.remove_basis(&mut now);
        self.remove_basis(&mut now);
        normalise(&mut now);
        let mut before = Array2::from_elem(now.dim(), T::zero());
        let (mut diagonal, mut beside): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
        let mut largest = Vec::new();
        for _ in 0..steps {
            let image = self.over(now.view())?;
            let mut next = self.back(image.view())?;
            self.remove_basis(&mut next);
            let alphas = products(&next, &now);
            let betas = beside.last().cloned().unwrap_or_else(|| vec![0.0; runs]);
            for run in 0..runs {
                let (alpha, beta) = (T::rounded(alphas[run]), T::rounded(betas[run]));
                let others = now.row(run).into_iter().zip(before.row(run));
                for (value, (now, before)) in next.row_mut(run).iter_mut().zip(others) {
                    *value = *value - alpha * *now - beta * *before;
                }
            }
            diagonal.push(alphas);
            beside.push(normalise(&mut next));
            (before, now) = (now, next);
            let size = diagonal.len();
            let mut top = 0.0f64;
            for run in 0..runs {
                let tridiagonal =
                    Array2::from_shape_fn((size, size), |(i, j)| match i.abs_diff(j) {
                        0 => diagonal[i][run],
                        1 => beside[i.min(j)][run],
                        _ => 0.0,
                    });
                let values = self.wide.eigenvalues(tridiagonal.view())?;
                top = top.max(values.first().copied().unwrap_or(0.0));
            }
            largest.push(top);
        }
        Ok(largest)
    }

    /// The first singular triplets: vectors of the rows and of the columns of Δ (as rows), and singular values.
    pub(super) fn triplets(
        &self,
        ritz: &Ritz,
        rank: usize,
    ) -> (Array2<f64>, Vec<f64>, Array2<f64>) {
        let chosen = ritz.vectors.slice(s![.., ..rank]);
        let near = self.combined(chosen, &self.basis);
        let mut far = self.combined(chosen, &self.images);
        let values: Vec<f64> = far
            .rows_mut()
            .into_iter()
            .map(|mut row| {
                let norm = row.dot(&row).sqrt();
                if norm > 0.0 {
                    row.mapv_inplace(|value| value / norm);
                }
                norm
            })
            .collect();
        match self.by_rows {
            true => (near, values, far),
            false => (far, values, near),
        }
    }

    /// Combinations of vectors, in f64.
    fn combined(&self, chosen: ArrayView2<'_, f64>, vectors: &Array2<T>) -> Array2<f64> {
        let mut result = Array2::zeros((chosen.ncols(), vectors.ncols()));
        for first in (0..vectors.ncols()).step_by(STRIP) {
            let strip = s![.., first..(first + STRIP).min(vectors.ncols())];
            let wide = vectors.slice(strip).mapv(T::widened);
            self.wide.multiply(
                chosen.t(),
                wide.view(),
                result.slice_mut(strip),
                Into::Place,
            );
        }
        result
    }
}

/// `a · bᵀ` in f64.
fn gram<T: Real>(wide: &dyn Dense<f64>, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<f64> {
    let mut result = Array2::zeros((a.nrows(), b.nrows()));
    for first in (0..a.ncols()).step_by(STRIP) {
        let strip = s![.., first..(first + STRIP).min(a.ncols())];
        let (a, b) = (
            a.slice(strip).mapv(T::widened),
            b.slice(strip).mapv(T::widened),
        );
        wide.multiply(a.view(), b.t(), result.view_mut(), Into::Sum);
    }
    result
}

fn stacked<T: Real>(above: &Array2<T>, below: &Array2<T>) -> Array2<T> {
    concatenate(Axis(0), &[above.view(), below.view()]).expect("both have as many columns")
}

fn gaussian<T: Real>(rows: usize, columns: usize, random: &mut Random) -> Array2<T> {
    let values = random
        .normals(rows * columns)
        .into_iter()
        .map(T::rounded)
        .collect();
    Array2::from_shape_vec((rows, columns), values).expect("as many values as elements")
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
