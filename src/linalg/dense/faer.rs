//! `faer`: pure Rust, always there.
//!
//! Parallelism is always said: faer's own setting is one for the whole process.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_on_the_left_in_place_with_conj as apply,
    apply_block_householder_transpose_on_the_left_in_place_with_conj as apply_transpose,
    make_householder_in_place,
};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::traits::RealField;
use faer::{Accum, Conj, Mat, MatMut, MatRef, Par};
use faer_ext::IntoFaer;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, ShapeBuilder};

use super::{
    Algebra, Dense, Into, Real, Svd, anywhere, by_triangle, failed, in_lower_half, largest,
    refuse_wide,
};
use crate::error::Result;

/// The library.
pub static FAER: Faer = Faer;

/// `faer`.
#[derive(Debug)]
pub struct Faer;

impl Algebra for Faer {
    fn name(&self) -> &str {
        "faer"
    }
}

impl<T: Real + RealField> Dense<T> for Faer {
    fn multiply(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        c: ArrayViewMut2<'_, T>,
        how: Into,
    ) -> Result<()> {
        let accumulate = match how {
            Into::Place => Accum::Replace,
            Into::Sum => Accum::Add,
        };
        let (a, b) = (a.into_faer(), b.into_faer());
        matmul(c.into_faer(), accumulate, a, b, T::one(), Par::rayon(0));
        Ok(())
    }

    fn thin_qr(&self, a: ArrayView2<'_, T>) -> Result<(Array2<T>, Array2<T>)> {
        refuse_wide(a.dim())?;
        largest(a, anywhere)?;
        let (rows, columns) = a.dim();
        let mut factored = a.into_faer().to_owned();
        let mut triangle = Mat::zeros(columns, columns);
        let mut memory = MemBuffer::new(apply_scratch::<T>(rows, columns, columns));
        let stack = MemStack::new(&mut memory);
        reflect(factored.as_mut(), triangle.as_mut(), stack);
        let mut q = Mat::identity(rows, columns);
        let (vectors, triangle) = (factored.as_ref(), triangle.as_ref());
        apply(vectors, triangle, Conj::No, q.as_mut(), Par::Seq, stack);
        let r = Array2::from_shape_fn((columns, columns), |(i, j)| match i <= j {
            true => factored[(i, j)],
            false => T::zero(),
        });
        Ok((owned(q.as_ref()), r))
    }

    fn thin_svd(&self, a: ArrayView2<'_, T>) -> Result<Svd<T>> {
        let (rows, columns) = a.dim();
        // faer would take its own QR from 11 rows for 6 columns.
        if 2 * rows.max(columns) > 3 * rows.min(columns) {
            return by_triangle(self, a, |r| self.thin_svd(r));
        }
        let (a, scale) = scaled(a, anywhere)?;
        let size = rows.min(columns);
        let (mut u, mut v) = (Mat::zeros(rows, size), Mat::zeros(columns, size));
        let mut s = Diag::<T>::zeros(size);
        let thin = ComputeSvdVectors::Thin;
        let scratch = svd_scratch::<T>(rows, columns, thin, thin, Par::Seq, Default::default());
        svd(
            a.as_ref(),
            s.as_mut(),
            Some(u.as_mut()),
            Some(v.as_mut()),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        )
        .map_err(|_| failed("the singular value decomposition did not converge"))?;
        Ok(Svd {
            u: owned(u.as_ref()),
            s: s.column_vector().iter().map(unscaled(scale)).collect(),
            v: owned(v.as_ref()),
        })
    }

    fn eigh(&self, a: ArrayView2<'_, T>) -> Result<(Vec<T>, Array2<T>)> {
        let mut vectors = Mat::zeros(a.nrows(), a.nrows());
        let values = eigen(a, Some(&mut vectors))?;
        // faer's rise.
        let vectors = owned(vectors.as_ref().reverse_cols());
        Ok((values, vectors))
    }

    fn eigenvalues(&self, a: ArrayView2<'_, T>) -> Result<Vec<T>> {
        eigen(a, None)
    }
}

/// Eigenvalues, falling; eigenvectors for rising ones.
fn eigen<T: Real + RealField>(
    a: ArrayView2<'_, T>,
    vectors: Option<&mut Mat<T>>,
) -> Result<Vec<T>> {
    let size = a.nrows();
    if size == 0 {
        return Ok(Vec::new());
    }
    let wanted = match vectors {
        Some(_) => ComputeEigenvectors::Yes,
        None => ComputeEigenvectors::No,
    };
    let (a, scale) = scaled(a, in_lower_half)?;
    let mut values = Diag::<T>::zeros(size);
    let scratch = self_adjoint_evd_scratch::<T>(size, wanted, Par::Seq, Default::default());
    self_adjoint_evd(
        a.as_ref(),
        values.as_mut(),
        vectors.map(|vectors| vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| failed("the eigenvalue decomposition did not converge"))?;
    let rising: Vec<T> = values.column_vector().iter().map(unscaled(scale)).collect();
    Ok(rising.into_iter().rev().collect())
}

/// QR in place: r, and below it the vectors of reflections whose product is `I − V · T⁻¹ · Vᵀ`; `triangle` becomes T.
///
/// Recursive, as in Elmroth and Gustavson, "Applying recursion to serial and parallel QR factorization leads to better
/// performance" (2000). faer's own QR takes what is left of a column for zero below `16 · rows · ε` of its length,
/// 0.8 % in f32 with 4,096 rows, and with it drops directions that a range finder is after.
fn reflect<T: RealField>(a: MatMut<'_, T>, mut triangle: MatMut<'_, T>, stack: &mut MemStack) {
    let columns = a.ncols();
    if columns == 1 {
        let (mut head, tail) = a.col_mut(0).split_at_row_mut(1);
        triangle[(0, 0)] = make_householder_in_place(&mut head[0], tail).tau;
    } else if columns > 1 {
        let half = columns / 2;
        let (mut left, mut right) = a.split_at_col_mut(half);
        let (mut first, between, _, second) = triangle.split_at_mut(half, half);
        reflect(left.as_mut(), first.as_mut(), stack);
        let vectors = left.as_ref();
        apply_transpose(
            vectors,
            first.as_ref(),
            Conj::No,
            right.as_mut(),
            Par::Seq,
            stack,
        );
        reflect(right.as_mut().split_at_row_mut(half).1, second, stack);
        // Where vectors of both halves are, those on the right begin with a triangle.
        let (_, left) = vectors.split_at_row(half);
        let (_, right) = right.as_ref().split_at_row(half);
        let (left_top, left_rest) = left.split_at_row(columns - half);
        let (right_top, right_rest) = right.split_at_row(columns - half);
        let mut between = between;
        triangular::matmul(
            between.as_mut(),
            BlockStructure::Rectangular,
            Accum::Replace,
            left_top.transpose(),
            BlockStructure::Rectangular,
            right_top,
            BlockStructure::UnitTriangularLower,
            T::one(),
            Par::Seq,
        );
        matmul(
            between,
            Accum::Add,
            left_rest.transpose(),
            right_rest,
            T::one(),
            Par::Seq,
        );
    }
}

/// The entries that count, times a power of two that brings the largest near one: faer 0.24.4 compares some of what it
/// computes with ε alone, where LAPACK scales first.
fn scaled<T: Real + RealField>(
    a: ArrayView2<'_, T>,
    counts: fn((usize, usize)) -> bool,
) -> Result<(Mat<T>, f64)> {
    // Of zero the logarithm is infinite.
    let exponent = largest(a, counts)?.log2().floor().clamp(-1000.0, 1000.0);
    let scale = 2f64.powi(-exponent as i32);
    let entry = |row, column| match counts((row, column)) {
        true => T::rounded(a[(row, column)].widened() * scale),
        false => T::zero(),
    };
    Ok((Mat::from_fn(a.nrows(), a.ncols(), entry), scale))
}

/// Undoes [`scaled`].
fn unscaled<T: Real>(scale: f64) -> impl Fn(&T) -> T {
    move |value| T::rounded(value.widened() / scale)
}

/// A copy that lies column by column, as the matrix does.
fn owned<T: Copy>(matrix: MatRef<'_, T>) -> Array2<T> {
    let mut values = Vec::with_capacity(matrix.nrows() * matrix.ncols());
    for column in matrix.col_iter() {
        values.extend(column.iter().copied());
    }
    let shape = (matrix.nrows(), matrix.ncols()).f();
    Array2::from_shape_vec(shape, values).expect("as many values as elements")
}
