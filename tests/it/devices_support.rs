//! Devices that need no hardware: libraries whose products are those of another, twisted, or fail on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use loratool::linalg::dense::{ALGEBRAS, Algebra, Dense, Held, Into, Real, Svd};
use loratool::linalg::device::{Choice, Device, LANES};
use loratool::{Error, Reason, Result};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2};

use crate::support::Random;

/// What becomes of products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Twist {
    /// They are those of the library inside.
    Nothing,
    /// Every element moves by nearly as much as the bound of its error allows, up or down.
    Noise,
    /// Subnormal numbers are taken for zero, wherever they are read or made.
    Flushes,
    /// Factors are rounded to eleven digits first, as by TF32.
    Short,
    /// One term is added after the other, the last first.
    OneByOne,
}

/// A library whose products another makes, twisted, until one fails as on a device. It holds what it is given.
pub(crate) struct Twisted {
    pub(crate) inner: &'static dyn Algebra,
    pub(crate) twist: Twist,
    pub(crate) has_doubles: bool,
    /// The product that fails, and all behind it.
    pub(crate) fails_at: usize,
    /// How many products there were.
    pub(crate) products: Arc<AtomicUsize>,
}

impl Twisted {
    /// The library as it is.
    pub(crate) fn of(inner: &'static dyn Algebra) -> Self {
        Twisted {
            inner,
            twist: Twist::Nothing,
            has_doubles: true,
            fails_at: usize::MAX,
            products: Arc::default(),
        }
    }

    /// A device of such lanes.
    pub(crate) fn device(name: &str, lane: impl Fn() -> Twisted) -> Device {
        let boxed = |_| -> Box<dyn Algebra> { Box::new(lane()) };
        Device::new(name, (0..LANES).map(boxed).collect())
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

    fn product<T: Real>(
        &self,
        inner: &dyn Dense<T>,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        mut c: ArrayViewMut2<'_, T>,
        how: Into,
    ) -> Result<()> {
        self.next()?;
        let smallest = match T::ROUNDOFF == f32::ROUNDOFF {
            true => f64::from(f32::MIN_POSITIVE),
            false => f64::MIN_POSITIVE,
        };
        let flushed = |value: T| match value.widened().abs() < smallest {
            true => T::zero(),
            false => value,
        };
        match self.twist {
            Twist::Nothing => inner.multiply(a, b, c, how)?,
            Twist::Noise => {
                inner.multiply(a, b, c.view_mut(), how)?;
                add_noise(a, b, c);
            }
            Twist::Flushes => {
                let (a, b) = (a.mapv(flushed), b.mapv(flushed));
                inner.multiply(a.view(), b.view(), c.view_mut(), how)?;
                c.mapv_inplace(flushed);
            }
            Twist::Short => {
                let (a, b) = (a.mapv(shortened), b.mapv(shortened));
                inner.multiply(a.view(), b.view(), c, how)?;
            }
            Twist::OneByOne => one_by_one(a, b, c, how),
        }
        Ok(())
    }
}

/// To eleven binary digits.
fn shortened<T: Real>(value: T) -> T {
    let unit = 2f64.powi(value.widened().abs().log2().floor().max(-900.0) as i32 - 10);
    T::rounded((value.widened() / unit).round() * unit)
}

/// A device of one lane that fails at a product, and how many products there were.
pub(crate) fn faulty(fails_at: usize) -> (Device, Arc<AtomicUsize>) {
    let lane = Twisted {
        fails_at,
        ..Twisted::of(ALGEBRAS[0])
    };
    let products = lane.products.clone();
    (Device::new("faulty", vec![Box::new(lane)]), products)
}

/// Devices that do not fail: one in every build, and those of the build.
pub(crate) fn devices() -> Vec<Device> {
    let mut devices = vec![faulty(usize::MAX).0];
    if cfg!(feature = "candle") {
        devices.push(Device::open("candle-cpu", None, ALGEBRAS[0]).expect("it is in this build"));
    }
    devices.extend(gpu());
    devices
}

/// The GPU that the build and the machine have; a failure without one where `LORATOOL_REQUIRE_GPU` is 1.
pub(crate) fn gpu() -> Option<Device> {
    let name = match cfg!(feature = "metal") {
        true => "metal",
        false => "cuda",
    };
    match Device::open(name, None, ALGEBRAS[0]) {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var("LORATOOL_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "a GPU is required: {error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// A device that is used where something gains by it.
pub(crate) fn automatic(device: Option<Device>) -> Choice {
    Choice {
        device,
        only_if_faster: true,
        reason: "as the test has it".to_owned(),
    }
}

impl Algebra for Twisted {
    fn name(&self) -> &str {
        "twisted"
    }

    fn has_doubles(&self) -> bool {
        self.has_doubles
    }

    fn uses_threads(&self) -> bool {
        self.inner.uses_threads()
    }
}

macro_rules! of_numbers {
    ($number:ty) => {
        impl Dense<$number> for Twisted {
            fn multiply(
                &self,
                a: ArrayView2<'_, $number>,
                b: ArrayView2<'_, $number>,
                c: ArrayViewMut2<'_, $number>,
                how: Into,
            ) -> Result<()> {
                let inner: &dyn Dense<$number> = self.inner;
                self.product(inner, a, b, c, how)
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

/// Nine tenths of what products and sums of this length may be off, with either sign.
fn add_noise<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, mut c: ArrayViewMut2<'_, T>) {
    let norm = |line: ArrayView1<'_, T>| {
        let squares = line.iter().map(|value| value.widened().powi(2));
        squares.sum::<f64>().sqrt()
    };
    let (rows, columns): (Vec<f64>, Vec<f64>) = (
        a.rows().into_iter().map(norm).collect(),
        b.columns().into_iter().map(norm).collect(),
    );
    let mut random = Random(7);
    // The inner product's own error, and the rounding of what is added here, need room in a short chain.
    let share = (0.9 * a.ncols() as f64 - 1.0).max(0.0) * T::ROUNDOFF / 2.0;
    for ((row, column), value) in c.indexed_iter_mut() {
        let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
        let noise = sign * share * rows[row] * columns[column];
        *value = T::rounded(value.widened() + noise);
    }
}

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
