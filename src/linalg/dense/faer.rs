//! `faer`: pure Rust, always there.
//!
//! Parallelism is always said: faer's own setting is one for the whole process.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply,
};
use faer::linalg::matmul::matmul;
use faer::linalg::qr::no_pivoting::factor::{
    qr_in_place, qr_in_place_scratch, recommended_block_size,
};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::traits::RealField;
use faer::{Accum, Conj, Mat, MatRef, Par};
use faer_ext::IntoFaer;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, ShapeBuilder};

use super::{Algebra, Dense, Into, Real, Svd};
use crate::error::{Error, Reason, Result};

/// The library.
pub static FAER: Faer = Faer;

/// `faer`.
#[derive(Debug)]
pub struct Faer;

impl Algebra for Faer {
    fn name(&self) -> &'static str {
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
    ) {
        let accumulate = match how {
            Into::Place => Accum::Replace,
            Into::Sum => Accum::Add,
        };
        let (a, b) = (a.into_faer(), b.into_faer());
        matmul(c.into_faer(), accumulate, a, b, T::one(), Par::rayon(0));
    }

    fn thin_qr(&self, a: ArrayView2<'_, T>) -> Result<(Array2<T>, Array2<T>)> {
        let (rows, columns) = a.dim();
        if rows < columns {
            return Err(failed("QR of a matrix that is wider than tall"));
        }
        let mut factored = a.into_faer().to_owned();
        let block = recommended_block_size::<T>(rows, columns);
        let mut coefficients = Mat::zeros(block, columns);
        let scratch = qr_in_place_scratch::<T>(rows, columns, block, Par::Seq, Default::default());
        qr_in_place(
            factored.as_mut(),
            coefficients.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        );
        let r = Array2::from_shape_fn((columns, columns), |(i, j)| match i <= j {
            true => factored[(i, j)],
            false => T::rounded(0.0),
        });
        let mut q = Mat::identity(rows, columns);
        apply(
            factored.as_ref(),
            coefficients.as_ref(),
            Conj::No,
            q.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(apply_scratch::<T>(
                rows, block, columns,
            ))),
        );
        Ok((owned(q.as_ref()), r))
    }

    fn thin_svd(&self, a: ArrayView2<'_, T>) -> Result<Svd<T>> {
        let (rows, columns) = a.dim();
        let size = rows.min(columns);
        let (mut u, mut v) = (Mat::zeros(rows, size), Mat::zeros(columns, size));
        let mut s = Diag::<T>::zeros(size);
        let thin = ComputeSvdVectors::Thin;
        let scratch = svd_scratch::<T>(rows, columns, thin, thin, Par::Seq, Default::default());
        svd(
            a.into_faer(),
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
            s: s.column_vector().iter().copied().collect(),
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
    let wanted = match vectors {
        Some(_) => ComputeEigenvectors::Yes,
        None => ComputeEigenvectors::No,
    };
    let mut values = Diag::<T>::zeros(size);
    let scratch = self_adjoint_evd_scratch::<T>(size, wanted, Par::Seq, Default::default());
    self_adjoint_evd(
        a.into_faer(),
        values.as_mut(),
        vectors.map(|vectors| vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| failed("the eigenvalue decomposition did not converge"))?;
    let rising: Vec<T> = values.column_vector().iter().copied().collect();
    Ok(rising.into_iter().rev().collect())
}

fn failed(problem: &str) -> Error {
    Error::new(Reason::Factorisation {
        problem: problem.to_owned(),
    })
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
