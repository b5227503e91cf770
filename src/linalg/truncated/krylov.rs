//! A basis of a block Krylov space, with what a Rayleigh–Ritz step and its certificate need.
//!
//! Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
//! decomposition", 2015. Everything lives on the smaller side of Δ: for the Gram matrix `A` of that side the space is
//! `[X, A·X, A²·X, …]`, every block made orthogonal to all before it, twice.

use ndarray::{Array2, ArrayView2, Axis, s};

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
    /// Vectors in the last block.
    last: usize,
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
        let by_rows = matrix.rows() < matrix.columns();
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
            last: 0,
            invariant: false,
        };
        let start = gaussian(width.min(size), other, random);
        let start = krylov.back(start.view())?;
        krylov.extend(start)?;
        Ok(krylov)
    }

    /// The same matrix with no vector in the basis.
    pub(super) fn without_basis(&self) -> Self {
        let empty = |columns| Array2::from_elem((0, columns), T::zero());
        Krylov {
            basis: empty(self.size()),
            images: empty(self.images.ncols()),
            applied: empty(self.size()),
            projected: Array2::zeros((0, 0)),
            ..*self
        }
    }

    /// Length of the vectors.
    pub(super) fn size(&self) -> usize {
        self.basis.ncols()
    }

    /// Number of vectors.
    pub(super) fn len(&self) -> usize {
        self.basis.nrows()
    }

    /// From the larger side to the smaller.
    fn back(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        match self.by_rows {
            true => self.matrix.to_rows(x),
            false => self.matrix.to_columns(x),
        }
    }

    /// One more block: what A makes of the last one.
    pub(super) fn grow(&mut self) -> Result<()> {
        let last = self.len() - self.last;
        let block = self.applied.slice(s![last.., ..]).to_owned();
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
            self.remove_basis(&mut block)?;
            let (q, _) = self.algebra.thin_qr(block.t())?;
            block = q.reversed_axes();
        }
        let (images, applied) = self.matrix.both(block.view())?;
        let (old, new) = (self.len(), block.nrows());
        for (all, new) in [
            (&mut self.basis, &block),
            (&mut self.images, &images),
            (&mut self.applied, &applied),
        ] {
            all.append(Axis(0), new.view())
                .expect("both have as many columns");
        }
        self.last = new;
        let mut projected = Array2::zeros((old + new, old + new));
        projected
            .slice_mut(s![..old, ..old])
            .assign(&self.projected);
        let cross = gram(
            self.wide,
            self.images.slice(s![old.., ..]),
            self.images.view(),
        )?;
        projected.slice_mut(s![old.., ..]).assign(&cross);
        projected
            .slice_mut(s![..old, old..])
            .assign(&cross.slice(s![.., ..old]).t());
        self.projected = projected;
        Ok(())
    }

    /// Makes vectors orthogonal to the basis, once.
    fn remove_basis(&self, block: &mut Array2<T>) -> Result<()> {
        if self.len() == 0 {
            return Ok(());
        }
        let mut parts = Array2::from_elem((block.nrows(), self.len()), T::zero());
        let (algebra, basis) = (self.algebra, &self.basis);
        algebra.multiply(block.view(), basis.t(), parts.view_mut(), Into::Place)?;
        parts.mapv_inplace(|part| T::zero() - part);
        algebra.multiply(parts.view(), basis.view(), block.view_mut(), Into::Sum)
    }

    /// Solves the projected problem.
    pub(super) fn ritz(&self) -> Result<Ritz> {
        let (mut values, vectors) = self.wide.eigh(self.projected.view())?;
        values.iter_mut().for_each(|value| *value = value.max(0.0));
        Ok(Ritz { values, vectors })
    }

    /// Ẑ of `ẐᵀẐ = ZᵀZ` for `Z = AQ − QH`, in Ritz coordinates, and its norm.
    ///
    /// What A makes of every block but the last is in the space, because the next block was made of it: there Z is
    /// rounding.
    pub(super) fn coupling(&self, ritz: &Ritz) -> Result<(Array2<f64>, f64)> {
        let length = self.len();
        let last = length - self.last;
        let mut coupling = Array2::zeros((self.last, self.last));
        let mut minus = self.projected.slice(s![last.., ..]).to_owned();
        minus.mapv_inplace(|value| -value);
        for first in (0..self.size()).step_by(STRIP) {
            let columns = first..(first + STRIP).min(self.size());
            let mut z = self
                .applied
                .slice(s![last.., columns.clone()])
                .mapv(T::widened);
            let basis = self.basis.slice(s![.., columns]).mapv(T::widened);
            self.wide
                .multiply(minus.view(), basis.view(), z.view_mut(), Into::Sum)?;
            self.wide
                .multiply(z.view(), z.t(), coupling.view_mut(), Into::Sum)?;
        }
        // The root of the small matrix, by its eigenvectors.
        let (values, vectors) = self.wide.eigh(coupling.view())?;
        let mut root = vectors.t().to_owned();
        for (mut row, value) in root.rows_mut().into_iter().zip(&values) {
            row *= value.max(0.0).sqrt();
        }
        let own = ritz.vectors.slice(s![last.., ..]);
        let mut coupling = Array2::zeros((self.last, length));
        self.wide
            .multiply(root.view(), own, coupling.view_mut(), Into::Place)?;
        let norm = values.first().copied().unwrap_or(0.0).max(0.0).sqrt();
        Ok((coupling, norm))
    }

    /// The Gram matrix A of the smaller side, on the complement of the basis, of vectors in it.
    pub(super) fn outside(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        let (_, mut applied) = self.matrix.both(x)?;
        self.remove_basis(&mut applied)?;
        Ok(applied)
    }

    /// Random vectors of the complement.
    pub(super) fn random_outside(&self, count: usize, random: &mut Random) -> Result<Array2<T>> {
        let mut vectors = gaussian(count, self.size(), random);
        self.remove_basis(&mut vectors)?;
        self.remove_basis(&mut vectors)?;
        Ok(vectors)
    }

    /// The first singular triplets: vectors of the rows and of the columns of Δ (as rows), and singular values.
    pub(super) fn triplets(
        &self,
        ritz: &Ritz,
        rank: usize,
    ) -> Result<(Array2<f64>, Vec<f64>, Array2<f64>)> {
        let chosen = ritz.vectors.slice(s![.., ..rank]);
        let near = self.combined(chosen, &self.basis)?;
        let mut far = self.combined(chosen, &self.images)?;
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
        Ok(match self.by_rows {
            true => (near, values, far),
            false => (far, values, near),
        })
    }

    /// Combinations of vectors, in f64.
    fn combined(&self, chosen: ArrayView2<'_, f64>, vectors: &Array2<T>) -> Result<Array2<f64>> {
        let mut result = Array2::zeros((chosen.ncols(), vectors.ncols()));
        for first in (0..vectors.ncols()).step_by(STRIP) {
            let strip = s![.., first..(first + STRIP).min(vectors.ncols())];
            let wide = vectors.slice(strip).mapv(T::widened);
            self.wide.multiply(
                chosen.t(),
                wide.view(),
                result.slice_mut(strip),
                Into::Place,
            )?;
        }
        Ok(result)
    }
}

/// `a · bᵀ` in f64.
fn gram<T: Real>(
    wide: &dyn Dense<f64>,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
) -> Result<Array2<f64>> {
    let mut result = Array2::zeros((a.nrows(), b.nrows()));
    for first in (0..a.ncols()).step_by(STRIP) {
        let strip = s![.., first..(first + STRIP).min(a.ncols())];
        let (a, b) = (
            a.slice(strip).mapv(T::widened),
            b.slice(strip).mapv(T::widened),
        );
        wide.multiply(a.view(), b.t(), result.view_mut(), Into::Sum)?;
    }
    Ok(result)
}

fn gaussian<T: Real>(rows: usize, columns: usize, random: &mut Random) -> Array2<T> {
    let values = random
        .normals(rows * columns)
        .into_iter()
        .map(T::rounded)
        .collect();
    Array2::from_shape_vec((rows, columns), values).expect("as many values as elements")
}
