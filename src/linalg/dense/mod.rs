//! Dense linear algebra: products, QR, singular values, eigenvalues; one library per file.
//!
//! [`ALGEBRAS`] is the only list, and one table of tests runs over it. Products use the threads of rayon's
//! current pool and have the same bits with any number of them; factorisations use one thread of it, because those
//! of all libraries depend on the number. A LAPACK may have threads beside rayon's: see `lapack.rs`. Bits differ
//! between libraries, and between machines.

use std::fmt::Debug;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, LinalgScalar};

use crate::error::{Error, Reason, Result};

mod faer;
#[cfg(feature = "lapack")]
mod lapack;

pub use faer::FAER;
#[cfg(feature = "lapack")]
pub use lapack::LAPACK;

/// Real numbers that matrices are made of.
pub trait Real: LinalgScalar + PartialOrd + Debug + Send + Sync {
    /// The unit roundoff.
    const ROUNDOFF: f64;

    /// Widens exactly.
    fn widened(self) -> f64;

    /// Rounds to nearest.
    fn rounded(value: f64) -> Self;
}

impl Real for f32 {
    const ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

    fn widened(self) -> f64 {
        f64::from(self)
    }

    fn rounded(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    const ROUNDOFF: f64 = 1.0 / (1u64 << 53) as f64;

    fn widened(self) -> f64 {
        self
    }

    fn rounded(value: f64) -> Self {
        value
    }
}

/// What factorisations need, for one type of numbers. They refuse numbers that are not finite; products do not.
pub trait Dense<T: Real>: Send + Sync {
    /// `c = a · b`, or `c += a · b`.
    ///
    /// # Errors
    /// [`crate::Reason::DeviceFailed`] and [`crate::Reason::DeviceMemory`], where a device computes it.
    fn multiply(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        c: ArrayViewMut2<'_, T>,
        how: Into,
    ) -> Result<()>;

    /// A copy of a matrix in memory that is nearer to where products are computed; nothing where there is no such
    /// memory, or no room in it.
    ///
    /// # Errors
    /// [`crate::Reason::DeviceFailed`].
    fn hold<'a>(&'a self, _matrix: ArrayView2<'_, T>) -> Result<Option<Box<dyn Held<T> + 'a>>> {
        Ok(None)
    }

    /// `a = q · r` of a matrix with at least as many rows as columns; q has orthonormal columns.
    ///
    /// # Errors
    /// [`crate::Reason::Factorisation`], also for a wide matrix.
    fn thin_qr(&self, a: ArrayView2<'_, T>) -> Result<(Array2<T>, Array2<T>)>;

    /// `a = u · diag(s) · vᵀ` with as many columns of u and v as the smaller side has, s falling.
    ///
    /// # Errors
    /// [`crate::Reason::Factorisation`] where it does not converge.
    fn thin_svd(&self, a: ArrayView2<'_, T>) -> Result<Svd<T>>;

    /// Eigenvalues, falling, and eigenvectors (columns) of a symmetric matrix, of which the lower half is read.
    ///
    /// # Errors
    /// [`crate::Reason::Factorisation`] where it does not converge.
    fn eigh(&self, a: ArrayView2<'_, T>) -> Result<(Vec<T>, Array2<T>)>;

    /// Eigenvalues alone.
    ///
    /// # Errors
    /// As [`Dense::eigh`].
    fn eigenvalues(&self, a: ArrayView2<'_, T>) -> Result<Vec<T>>;
}

/// A matrix beside the place where products with it are computed.
pub trait Held<T: Real>: Send + Sync {
    /// `matrix · x`.
    ///
    /// # Errors
    /// As [`Dense::multiply`].
    fn before(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>>;

    /// `x · matrix`.
    ///
    /// # Errors
    /// As [`Dense::multiply`].
    fn after(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>>;

    /// `x · matrix`, and each element of it rounded to the nearest f32: half as much to carry.
    ///
    /// # Errors
    /// As [`Dense::multiply`].
    fn after_in_single(&self, x: ArrayView2<'_, T>) -> Result<Array2<f32>> {
        Ok(self.after(x)?.mapv(|value| value.widened() as f32))
    }
}

/// A matrix beside the place where products with it are computed: held there, or here where that cannot be.
///
/// # Errors
/// As [`Dense::hold`].
pub fn held<'a, T: Real>(
    library: &'a dyn Dense<T>,
    matrix: ArrayView2<'a, T>,
) -> Result<Box<dyn Held<T> + 'a>> {
    Ok(match library.hold(matrix)? {
        Some(held) => held,
        None => Box::new(Here { library, matrix }),
    })
}

/// A matrix in the memory of the processor.
struct Here<'a, T: Real> {
    library: &'a dyn Dense<T>,
    matrix: ArrayView2<'a, T>,
}

impl<T: Real> Here<'_, T> {
    fn product(&self, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Result<Array2<T>> {
        let mut product = Array2::from_elem((a.nrows(), b.ncols()), T::zero());
        self.library
            .multiply(a, b, product.view_mut(), Into::Place)?;
        Ok(product)
    }
}

impl<T: Real> Held<T> for Here<'_, T> {
    fn before(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        self.product(self.matrix.view(), x)
    }

    fn after(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        self.product(x, self.matrix.view())
    }
}

/// What becomes of what a result held before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// It is replaced.
    Place,
    /// It is added to.
    Sum,
}

/// A singular value decomposition.
#[derive(Clone, Debug)]
pub struct Svd<T> {
    /// Left singular vectors, as columns.
    pub u: Array2<T>,
    /// Singular values, falling.
    pub s: Vec<T>,
    /// Right singular vectors, as columns.
    pub v: Array2<T>,
}

/// A library of dense linear algebra.
pub trait Algebra: Dense<f32> + Dense<f64> + Send {
    /// Its name in options and reports.
    fn name(&self) -> &str;

    /// Whether its products of f64 are as near to it as those of f32; a device may have none.
    fn has_doubles(&self) -> bool {
        true
    }

    /// Whether its products use the threads of rayon's current pool.
    fn uses_threads(&self) -> bool {
        true
    }
}

/// Every library that is compiled in; the first is the default.
pub static ALGEBRAS: &[&dyn Algebra] = &[
    &FAER,
    #[cfg(feature = "lapack")]
    &LAPACK,
];

/// The library of a name, or the first.
///
/// # Errors
/// [`Reason::BadOption`], with all names that there are.
pub fn named(name: Option<&str>) -> Result<&'static dyn Algebra> {
    let Some(name) = name else {
        return Ok(ALGEBRAS[0]);
    };
    let found = ALGEBRAS
        .iter()
        .copied()
        .find(|algebra| algebra.name() == name);
    found.ok_or_else(|| {
        let all: Vec<&str> = ALGEBRAS.iter().map(|algebra| algebra.name()).collect();
        Error::new(Reason::BadOption {
            text: name.to_owned(),
            problem: format!(
                "no such linear algebra in this build; there are {}",
                all.join(", ")
            ),
        })
    })
}

/// The decomposition of a matrix by way of its triangle, for decompositions that are made for squares.
fn by_triangle<T: Real>(
    library: &impl Dense<T>,
    a: ArrayView2<'_, T>,
    svd: impl FnOnce(ArrayView2<'_, T>) -> Result<Svd<T>>,
) -> Result<Svd<T>> {
    if a.nrows() < a.ncols() {
        let Svd { u: v, s, v: u } = by_triangle(library, a.reversed_axes(), svd)?;
        return Ok(Svd { u, s, v });
    }
    let (q, r) = library.thin_qr(a)?;
    let Svd { u: turned, s, v } = svd(r.view())?;
    let mut u = Array2::zeros(q.dim());
    library.multiply(q.view(), turned.view(), u.view_mut(), Into::Place)?;
    Ok(Svd { u, s, v })
}

/// The largest magnitude among the entries that count. With one that is not finite some libraries iterate for hours,
/// and some print.
fn largest<T: Real>(a: ArrayView2<'_, T>, counts: fn((usize, usize)) -> bool) -> Result<f64> {
    let mut largest = 0.0f64;
    for (at, value) in a.indexed_iter().filter(|(at, _)| counts(*at)) {
        let magnitude = value.widened().abs();
        if !magnitude.is_finite() {
            return Err(failed(&format!(
                "a matrix that is to be factorised holds {value:?} at {at:?}"
            )));
        }
        largest = largest.max(magnitude);
    }
    Ok(largest)
}

fn anywhere(_: (usize, usize)) -> bool {
    true
}

fn in_lower_half((row, column): (usize, usize)) -> bool {
    row >= column
}

fn refuse_wide((rows, columns): (usize, usize)) -> Result<()> {
    match rows < columns {
        true => Err(failed("QR of a matrix that is wider than tall")),
        false => Ok(()),
    }
}

fn failed(problem: &str) -> Error {
    Error::new(Reason::Factorisation {
        problem: problem.to_owned(),
    })
}
