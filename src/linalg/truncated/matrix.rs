//! A matrix that is formed block of rows by block of rows, kept where it is small enough, and its products with a
//! few vectors.
//!
//! Vectors are rows of an array, so that a basis grows at its end.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use crate::error::Result;
use crate::linalg::dense::{Dense, Held, Into, Real, Svd};

/// A matrix that is formed when its rows are asked for.
pub trait Blocks: Sync {
    /// Rows.
    fn rows(&self) -> usize;

    /// Columns.
    fn columns(&self) -> usize;

    /// Fills whole rows.
    ///
    /// # Errors
    /// What reading gives.
    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()>;

    /// Two matrices whose product it is, where it is known as one: rows × any, and any × columns.
    ///
    /// # Errors
    /// What reading gives.
    fn factors(&self) -> Result<Option<(Array2<f64>, Array2<f64>)>> {
        Ok(None)
    }
}

/// Elements that one task forms: they stay in the second-level cache.
const PIECE: usize = 32 << 10;

/// Bytes of a piece that is used twice: it stays in the third-level cache.
const CACHED: usize = 4 << 20;

/// Bytes of a block of a matrix that is not kept.
const BLOCK: usize = 32 << 20;

/// A matrix in a type of numbers.
pub(super) struct Matrix<'a, T> {
    blocks: &'a dyn Blocks,
    algebra: &'a dyn Dense<T>,
    /// The squared Frobenius norm.
    pub(super) square: f64,
    kept: Option<Array2<T>>,
    /// All of it, by blocks of rows, in the memory of a device, where there is one and it has room.
    held: Vec<(Range<usize>, Box<dyn Held<T> + 'a>)>,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// Forms it once, and keeps it where it has at most `limit` bytes.
    pub(super) fn new(
        blocks: &'a dyn Blocks,
        algebra: &'a dyn Dense<T>,
        limit: usize,
    ) -> Result<Self> {
        let mut matrix = Matrix {
            blocks,
            algebra,
            square: 0.0,
            kept: None,
            held: Vec::new(),
        };
        let (rows, columns) = (blocks.rows(), blocks.columns());
        let (mut held, mut has_room) = (Vec::new(), true);
        let mut hold = |rows: Range<usize>, block: ArrayView2<'_, T>| -> Result<()> {
            let copy = if has_room { algebra.hold(block)? } else { None };
            has_room = copy.is_some();
            held.extend(copy.map(|copy| (rows, copy)));
            Ok(())
        };
        if rows * columns * size_of::<T>() <= limit {
            let (kept, square) = matrix.formed(0..rows)?;
            hold(0..rows, kept.view())?;
            (matrix.kept, matrix.square) = (Some(kept), square);
        } else {
            let mut square = 0.0;
            matrix.by_blocks(|rows, block, own| {
                square += own;
                hold(rows, block)
            })?;
            matrix.square = square;
        }
        if has_room {
            matrix.held = held;
        }
        Ok(matrix)
    }

    pub(super) fn rows(&self) -> usize {
        self.blocks.rows()
    }

    pub(super) fn columns(&self) -> usize {
        self.blocks.columns()
    }

    /// Some rows, and the sum of their squares in the order of pieces of a fixed size.
    fn formed(&self, rows: Range<usize>) -> Result<(Array2<T>, f64)> {
        let columns = self.columns();
        let mut values = Array2::from_elem((rows.len(), columns), T::zero());
        let step = (PIECE / columns.max(1)).max(1);
        let mut pieces: Vec<_> = values.axis_chunks_iter_mut(Axis(0), step).collect();
        let squares =
            pieces
                .par_iter_mut()
                .enumerate()
                .map_init(Vec::new, |wide, (index, piece)| {
                    let first = rows.start + index * step;
                    wide.clear();
                    wide.resize(piece.len(), 0.0);
                    self.blocks.fill(first..first + piece.nrows(), wide)?;
                    let mut square = 0.0;
                    for (value, wide) in piece.iter_mut().zip(wide.iter()) {
                        *value = T::rounded(*wide);
                        square += wide * wide;
                    }
                    Ok(square)
                });
        let squares: Vec<f64> = squares.collect::<Result<_>>()?;
        Ok((values, squares.iter().sum()))
    }

    /// All rows, block by block.
    fn by_blocks(
        &self,
        mut take: impl FnMut(Range<usize>, ArrayView2<'_, T>, f64) -> Result<()>,
    ) -> Result<()> {
        if let Some(kept) = &self.kept {
            return take(0..self.rows(), kept.view(), self.square);
        }
        let step = (BLOCK / size_of::<T>() / self.columns().max(1)).max(1);
        for first in (0..self.rows()).step_by(step) {
            let rows = first..(first + step).min(self.rows());
            let (values, square) = self.formed(rows.clone())?;
            take(rows, values.view(), square)?;
        }
        Ok(())
    }

    /// `x · Δᵀ` for vectors of as many elements as there are columns.
    ///
    /// faer is twice as fast where elements of different vectors lie side by side in the result.
    pub(super) fn to_rows(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        let mut beside = Array2::from_elem((self.rows(), x.nrows()), T::zero());
        for (rows, block) in &self.held {
            let rows = s![rows.clone(), ..];
            beside.slice_mut(rows).assign(&block.before(x.t())?);
        }
        if !self.held.is_empty() {
            return Ok(beside.t().as_standard_layout().into_owned());
        }
        self.by_blocks(|rows, block, _| {
            let part = beside.slice_mut(s![rows, ..]);
            self.algebra.multiply(block, x.t(), part, Into::Place)?;
            Ok(())
        })?;
        Ok(beside.t().as_standard_layout().into_owned())
    }

    /// `x · Δ` for vectors of as many elements as there are rows.
    pub(super) fn to_columns(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        let mut blocks = self.held.iter();
        if let Some((rows, first)) = blocks.next() {
            let part = |rows: &Range<usize>| x.slice(s![.., rows.clone()]);
            let mut sum = first.after(part(rows))?;
            for (rows, block) in blocks {
                let next = block.after(part(rows))?;
                sum.zip_mut_with(&next, |sum, term| *sum = *sum + *term);
            }
            return Ok(sum);
        }
        let x = x.t().as_standard_layout().into_owned();
        let mut beside = Array2::from_elem((self.columns(), x.ncols()), T::zero());
        self.by_blocks(|rows, block, _| {
            let part = x.slice(s![rows, ..]);
            self.algebra
                .multiply(block.t(), part, beside.view_mut(), Into::Sum)?;
            Ok(())
        })?;
        Ok(beside.t().as_standard_layout().into_owned())
    }

    /// `x · Δᵀ` and `x · Δᵀ · Δ` where x lies on the columns and there are no more columns than rows, otherwise
    /// `x · Δ` and `x · Δ · Δᵀ`: a piece of Δ is used for both while it is in the cache, and formed once.
    pub(super) fn both(&self, x: ArrayView2<'_, T>) -> Result<(Array2<T>, Array2<T>)> {
        let tall = self.columns() <= self.rows();
        if !self.held.is_empty() {
            return Ok(match tall {
                true => {
                    let images = self.to_rows(x)?;
                    let applied = self.to_columns(images.view())?;
                    (images, applied)
                }
                false => {
                    let images = self.to_columns(x)?;
                    let applied = self.to_rows(images.view())?;
                    (images, applied)
                }
            });
        }
        let (long, short) = match tall {
            true => (self.rows(), self.columns()),
            false => (self.columns(), self.rows()),
        };
        let mut images = Array2::from_elem((long, x.nrows()), T::zero());
        let mut applied = Array2::from_elem((short, x.nrows()), T::zero());
        let step = (CACHED / size_of::<T>() / short.max(1)).max(1);
        let mut take = |rows: Range<usize>, block: ArrayView2<'_, T>| -> Result<()> {
            for (index, piece) in block.axis_chunks_iter(Axis(0), step).enumerate() {
                let first = rows.start + index * step;
                let mut image = images.slice_mut(s![first..first + piece.nrows(), ..]);
                self.algebra
                    .multiply(piece, x.t(), image.view_mut(), Into::Place)?;
                self.algebra
                    .multiply(piece.t(), image.view(), applied.view_mut(), Into::Sum)?;
            }
            Ok(())
        };
        match &self.kept {
            _ if tall => self.by_blocks(|rows, block, _| take(rows, block))?,
            Some(kept) => take(0..long, kept.t())?,
            // Its columns are not at hand piece by piece.
            None => {
                let images = self.to_columns(x)?;
                let applied = self.to_rows(images.view())?;
                return Ok((images, applied));
            }
        }
        let turned = |beside: Array2<T>| beside.t().as_standard_layout().into_owned();
        Ok((turned(images), turned(applied)))
    }

    /// The matrix R of a QR decomposition, block by block (for a matrix that is at least as tall as wide).
    pub(super) fn triangle(&self) -> Result<Array2<T>> {
        let columns = self.columns();
        let mut triangle = Array2::from_elem((0, columns), T::zero());
        self.by_blocks(|_, block, _| {
            // A block may be lower than it is wide: then rows wait until there are enough.
            let stacked = ndarray::concatenate(Axis(0), &[triangle.view(), block])
                .expect("both have as many columns");
            triangle = match stacked.nrows() > columns {
                true => self.algebra.thin_qr(stacked.view())?.1,
                false => stacked,
            };
            Ok(())
        })?;
        Ok(triangle)
    }
}

impl Matrix<'_, f64> {
    /// All singular values, and the vectors of the smaller side (as columns of `v`).
    pub(super) fn singular(&self, check: &dyn Fn() -> Result<()>) -> Result<Svd<f64>> {
        let triangle = match (&self.kept, self.rows() >= self.columns()) {
            (_, true) => self.triangle()?,
            (Some(kept), false) => self.algebra.thin_qr(kept.t())?.1,
            (None, false) => unreachable!("a wide matrix is kept"),
        };
        check()?;
        self.algebra.thin_svd(triangle.view())
    }

    /// The first vectors of the rows and of the columns, as rows.
    pub(super) fn vectors(
        &self,
        found: &Svd<f64>,
        rank: usize,
    ) -> Result<(Array2<f64>, Array2<f64>)> {
        let near = found.v.slice(s![.., ..rank]).t().to_owned();
        let tall = self.rows() >= self.columns();
        let mut far = match tall {
            true => self.to_rows(near.view())?,
            false => self.to_columns(near.view())?,
        };
        for (mut vector, value) in far.rows_mut().into_iter().zip(&found.s) {
            vector.mapv_inplace(|element| element / value);
        }
        Ok(match tall {
            true => (far, near),
            false => (near, far),
        })
    }
}
