//! LAPACK by way of `ndarray-linalg`, in whatever library the program is linked with.
//!
//! Factorisations are the library's: `geqrf` and `orgqr`, `gesdd`, `syev`. Products are `matrixmultiply`'s, by way of
//! `ndarray`, in blocks on rayon's threads: `ndarray/blas` would send them to the library, and with them the products
//! of every other crate in the program.
//!
//! Bits do not depend on rayon's threads. OpenBLAS has threads of its own, one for every core or as many as
//! `OPENBLAS_NUM_THREADS` says, and another number makes other bits. The variable is read when the program is loaded;
//! from within nothing safe changes the number. `docs/design.md` has what was measured.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, ShapeBuilder, s};
use ndarray_linalg::error::LinalgError;
use ndarray_linalg::layout::{AllocatedArray, AllocatedArrayMut};
use ndarray_linalg::{EighInto, JobSvd, QRInto, SVDDCInto, SVDInto, Scalar, UPLO};

use super::{
    Algebra, Dense, Into, Real, Svd, anywhere, by_triangle, failed, in_lower_half, largest,
    refuse_wide,
};
use crate::error::{Error, Result};

const _: () = assert!(
    cfg!(feature = "lapack-openblas-system") as u8
        + cfg!(feature = "lapack-openblas-static") as u8
        + cfg!(feature = "lapack-netlib-system") as u8
        + cfg!(feature = "lapack-mkl-static") as u8
        <= 1,
    "a program is linked with one LAPACK: choose one of the features `lapack-*`"
);

/// Multiplications that one call does; smaller pieces are not worth a thread.
const BLOCK: usize = 1 << 22;

/// The library.
pub static LAPACK: Lapack = Lapack;

/// LAPACK.
#[derive(Debug)]
pub struct Lapack;

impl Algebra for Lapack {
    fn name(&self) -> &str {
        "lapack"
    }
}

impl<T: Real + Scalar<Real = T> + ndarray_linalg::Lapack> Dense<T> for Lapack {
    fn multiply(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        c: ArrayViewMut2<'_, T>,
        how: Into,
    ) -> Result<()> {
        let kept = match how {
            Into::Place => T::zero(),
            Into::Sum => T::one(),
        };
        multiply(a, b, c, kept);
        Ok(())
    }

    fn thin_qr(&self, a: ArrayView2<'_, T>) -> Result<(Array2<T>, Array2<T>)> {
        refuse_wide(a.dim())?;
        check(a, anywhere)?;
        if a.is_empty() {
            return Ok((Array2::zeros(a.dim()), Array2::zeros((0, 0))));
        }
        column_major(a)
            .qr_into()
            .map_err(|error| told("QR", &error))
    }

    fn thin_svd(&self, a: ArrayView2<'_, T>) -> Result<Svd<T>> {
        let (rows, columns) = a.dim();
        check(a, anywhere)?;
        if a.is_empty() {
            return Ok(Svd {
                u: Array2::zeros((rows, 0)),
                s: Vec::new(),
                v: Array2::zeros((columns, 0)),
            });
        }
        // Where divide and conquer fails, plain iteration may not.
        match column_major(a).svddc_into(JobSvd::Some) {
            Ok(found) => Ok(asked_for(found)),
            Err(_) => svd_by_iteration(a),
        }
    }

    fn eigh(&self, a: ArrayView2<'_, T>) -> Result<(Vec<T>, Array2<T>)> {
        check(a, in_lower_half)?;
        if a.is_empty() {
            return Ok((Vec::new(), Array2::zeros((0, 0))));
        }
        let (rising, vectors) = column_major(a)
            .eigh_into(UPLO::Lower)
            .map_err(|error| told("the eigenvalue decomposition", &error))?;
        let vectors = column_major(vectors.slice(s![.., ..;-1]));
        Ok((rising.iter().rev().copied().collect(), vectors))
    }

    fn eigenvalues(&self, a: ArrayView2<'_, T>) -> Result<Vec<T>> {
        check(a, in_lower_half)?;
        if a.is_empty() {
            return Ok(Vec::new());
        }
        // `EigValsh` computes the vectors too.
        let mut a = column_major(a);
        let rising = a
            .square_layout()
            .and_then(|layout| Ok(T::eigh(false, layout, UPLO::Lower, a.as_allocated_mut()?)?))
            .map_err(|error| told("the eigenvalue decomposition", &error))?;
        Ok(rising.into_iter().rev().collect())
    }
}

/// `c = a · b + kept · c`, cut in halves along the longer side of c. Shapes alone decide where, so that bits do not
/// depend on threads.
fn multiply<T: Real>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
    kept: T,
) {
    let (rows, columns) = c.dim();
    if c.len().saturating_mul(a.ncols()) <= BLOCK || c.len() == 1 {
        general_mat_mul(T::one(), &a, &b, kept, &mut c);
    } else if rows >= columns {
        let (above, below) = a.split_at(Axis(0), rows / 2);
        let (first, second) = c.split_at(Axis(0), rows / 2);
        rayon::join(
            || multiply(above, b, first, kept),
            || multiply(below, b, second, kept),
        );
    } else {
        let (left, right) = b.split_at(Axis(1), columns / 2);
        let (first, second) = c.split_at(Axis(1), columns / 2);
        rayon::join(
            || multiply(a, left, first, kept),
            || multiply(a, right, second, kept),
        );
    }
}

/// By `gesvd`, of which `ndarray-linalg` asks all vectors: a square matrix has no more than the thin ones.
fn svd_by_iteration<T: Real + Scalar<Real = T> + ndarray_linalg::Lapack>(
    a: ArrayView2<'_, T>,
) -> Result<Svd<T>> {
    by_triangle(&LAPACK, a, |r| {
        let found = column_major(r).svd_into(true, true);
        found
            .map(asked_for)
            .map_err(|error| told("the singular value decomposition", &error))
    })
}

/// What `ndarray-linalg` gives where it was asked for vectors of both sides.
fn asked_for<T: Real>(found: (Option<Array2<T>>, Array1<T>, Option<Array2<T>>)) -> Svd<T> {
    let (u, s, vt) = found;
    Svd {
        u: u.expect("left vectors were asked for"),
        s: s.to_vec(),
        v: vt.expect("right vectors were asked for").reversed_axes(),
    }
}

/// A copy with the layout of Fortran. `ndarray-linalg` would read other layouts as transposes, or not at all.
fn column_major<T: Real>(a: ArrayView2<'_, T>) -> Array2<T> {
    let mut copy = Array2::zeros(a.dim().f());
    copy.assign(&a);
    copy
}

/// Sizes are 32 bits wide in LAPACK and in its bindings, and `gesdd` asks for a workspace of up to `4k² + O(k)`.
fn check<T: Real>(a: ArrayView2<'_, T>, counts: fn((usize, usize)) -> bool) -> Result<()> {
    let (rows, columns) = a.dim();
    let smaller = rows.min(columns);
    let workspace = smaller.saturating_mul(smaller).saturating_mul(5);
    if rows.saturating_mul(columns).max(workspace) > i32::MAX as usize {
        return Err(failed(&format!(
            "a matrix of {rows} × {columns} is too large for LAPACK; faer takes it"
        )));
    }
    largest(a, counts).map(drop)
}

fn told(what: &str, error: &LinalgError) -> Error {
    failed(&format!("{what} failed in LAPACK: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_decomposition_finds_the_same_values() {
        for (rows, columns) in [(40, 7), (7, 40), (9, 9)] {
            let value = |(i, j)| ((i * i + 3 * j + i * j) % 17) as f64 - 8.0;
            let a = Array2::from_shape_fn((rows, columns), value);
            let first = LAPACK.thin_svd(a.view()).unwrap();
            let second = svd_by_iteration(a.view()).unwrap();
            for (first, second) in first.s.iter().zip(&second.s) {
                assert!((first - second).abs() < 1e-12 * first, "{first} {second}");
            }
            let made = (&second.u * &Array1::from(second.s.clone())).dot(&second.v.t());
            assert!(
                (&made - &a).iter().all(|error| error.abs() < 1e-12),
                "{rows} × {columns}"
            );
        }
    }

    #[test]
    fn what_lapack_cannot_count_is_refused() {
        let wide = Array2::<f32>::zeros((1, 1));
        let wide = wide.broadcast((1 << 16, 1 << 15)).unwrap();
        assert!(LAPACK.thin_qr(wide).is_err());
        let square = wide.slice_move(s![..1 << 15, ..]);
        let error = LAPACK.thin_svd(square).unwrap_err();
        assert!(error.to_string().contains("32768 × 32768"), "{error}");
    }
}
