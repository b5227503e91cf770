//! Devices that need no hardware: what computes elsewhere, may fail on the way, and sums in the plainest order.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use loratool::linalg::dense::{ALGEBRAS, Algebra, Dense, Held, Into, Real, Svd};
use loratool::linalg::device::{Choice, Device};
use loratool::{Error, Reason, Result};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// A library that computes as another does, until a product fails as on a device. It holds what it is given.
pub(crate) struct Faulty {
    inner: &'static dyn Algebra,
    /// The product that fails, and all behind it.
    fails_at: usize,
    /// Adds one product of elements after the other, the last first, instead of what the other library does.
    one_by_one: bool,
    products: Arc<AtomicUsize>,
}

impl Faulty {
    /// The library's products before `fails_at`.
    pub(crate) fn new(inner: &'static dyn Algebra, fails_at: usize) -> Self {
        Faulty {
            inner,
            fails_at,
            one_by_one: false,
            products: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// One that never fails, and whose sums round as much as any order makes them.
    pub(crate) fn one_by_one() -> Self {
        Faulty {
            one_by_one: true,
            ..Faulty::new(ALGEBRAS[0], usize::MAX)
        }
    }

    /// How many products there were.
    pub(crate) fn products(&self) -> Arc<AtomicUsize> {
        self.products.clone()
    }

    /// Counts a product.
    fn next(&self) -> Result<()> {
        let before = self.products.fetch_add(1, Ordering::Relaxed);
        match before < self.fails_at {
            true => Ok(()),
            false => Err(Error::new(Reason::DeviceFailed {
                device: "faulty".to_owned(),
                problem: format!("product {before} is one too many"),
            })),
        }
    }
}

/// A device of one lane that fails at a product, and how many products there were.
pub(crate) fn faulty(fails_at: usize) -> (Device, Arc<AtomicUsize>) {
    let lane = Faulty::new(ALGEBRAS[0], fails_at);
    let products = lane.products();
    (Device::new("faulty", vec![Box::new(lane)]), products)
}

/// Devices that do not fail: one in every build, and those of the build.
pub(crate) fn devices() -> Vec<Device> {
    let mut devices = vec![faulty(usize::MAX).0];
    if cfg!(feature = "candle") {
        devices.push(Device::open("candle-cpu", None, ALGEBRAS[0]).expect("it is in this build"));
    }
    devices
}

/// A device that is used where something gains by it.
pub(crate) fn automatic(device: Option<Device>) -> Choice {
    Choice {
        device,
        only_if_faster: true,
        reason: "as the test has it".to_owned(),
    }
}

impl Algebra for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }
}

macro_rules! of_numbers {
    ($number:ty) => {
        impl Dense<$number> for Faulty {
            fn multiply(
                &self,
                a: ArrayView2<'_, $number>,
                b: ArrayView2<'_, $number>,
                c: ArrayViewMut2<'_, $number>,
                how: Into,
            ) -> Result<()> {
                self.next()?;
                match self.one_by_one {
                    true => one_by_one(a, b, c, how),
                    false => self.inner.multiply(a, b, c, how)?,
                }
                Ok(())
            }

            fn hold<'a>(
                &'a self,
                matrix: ArrayView2<'_, $number>,
            ) -> Result<Option<Box<dyn Held<$number> + 'a>>> {
                let matrix = matrix.to_owned();
                Ok(Some(Box::new(Kept {
                    library: self,
                    matrix,
                })))
            }

            fn thin_qr(
                &self,
                a: ArrayView2<'_, $number>,
            ) -> Result<(Array2<$number>, Array2<$number>)> {
                self.inner.thin_qr(a)
            }

            fn thin_svd(&self, a: ArrayView2<'_, $number>) -> Result<Svd<$number>> {
                self.inner.thin_svd(a)
            }

            fn eigh(&self, a: ArrayView2<'_, $number>) -> Result<(Vec<$number>, Array2<$number>)> {
                self.inner.eigh(a)
            }

            fn eigenvalues(&self, a: ArrayView2<'_, $number>) -> Result<Vec<$number>> {
                self.inner.eigenvalues(a)
            }
        }
    };
}

of_numbers!(f32);
of_numbers!(f64);

/// Sums that begin at the end, one term after the other.
fn one_by_one<T: Real>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
    how: Into,
) {
    if how == Into::Place {
        c.fill(T::zero());
    }
    for (row, mut sums) in a.rows().into_iter().zip(c.rows_mut()) {
        for (factor, terms) in row.iter().zip(b.rows()).rev() {
            sums.zip_mut_with(&terms, |sum, term| *sum = *sum + *factor * *term);
        }
    }
}

/// A matrix that a library holds.
struct Kept<'a, T> {
    library: &'a dyn Dense<T>,
    matrix: Array2<T>,
}

impl<T: Real> Held<T> for Kept<'_, T> {
    fn before(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        product(self.library, self.matrix.view(), x)
    }

    fn after(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        product(self.library, x, self.matrix.view())
    }
}

fn product<T: Real>(
    library: &dyn Dense<T>,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
) -> Result<Array2<T>> {
    let mut c = Array2::from_elem((a.nrows(), b.ncols()), T::zero());
    library.multiply(a, b, c.view_mut(), Into::Place)?;
    Ok(c)
}
