//! Devices that compute products beside the processor: which there are, and how one is opened.
//!
//! A device is one or more [`Algebra`]s, its lanes: each has a queue of its own, so that one can carry while another
//! computes. [`KINDS`] is the only list. This room alone knows the library that drives them (`candle.rs`, compiled
//! with the feature of that name). `docs/devices.md` says what is promised.
//!
//! Any library of linear algebra can be a device. A merge has the same bytes on all of them:
//!
//! ```
//! use loratool::linalg::dense::ALGEBRAS;
//! use loratool::linalg::device::{Choice, Device};
//! use loratool::ops::merge::{Control, Options, Selection, plan};
//!
//! # fn main() -> loratool::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! // A GPU where the build and the machine have one; lanes of your own make one with `Device::new`.
//! let device = match Device::open("cuda", Some(8 << 30), ALGEBRAS[0]) {
//!     Ok(device) => Some(Choice::of(device)),
//!     Err(error) => {
//!         println!("on the processor: {error}");
//!         None
//!     }
//! };
//! let options = Options {
//!     base: "fixtures/peft/bases/llama".into(),
//!     adapters: vec![Selection {
//!         path: "fixtures/peft/cases/lora/adapter".into(),
//!         strength: 1.0,
//!         ..Selection::default()
//!     }],
//!     output: folder.path().join("merged"),
//!     device,
//!     ..Options::default()
//! };
//! let report = plan(&options)?.run(&Control::default())?;
//! if let Some(work) = report.device.and_then(|device| device.work) {
//!     println!("{} of {} elements by the definition", work.recomputed, work.elements);
//! }
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::sync::Arc;

use ndarray::{Array2, ArrayView1};

use super::dense::{Algebra, Dense, Real, held};
use super::random::Random;
use crate::error::{Error, Reason, Result};

#[cfg(feature = "candle")]
mod candle;

#[cfg(not(feature = "candle"))]
use self::{absent as cuda, absent as metal, absent as processor};
#[cfg(feature = "candle")]
use candle::{cuda, metal, processor};

/// Lanes of a device: one computes and carries while another's results are taken up.
pub const LANES: usize = 2;

/// The least memory that can be asked for, in bytes.
pub const LEAST_MEMORY: u64 = 64 << 10;

/// What opens of a device.
type Lanes = Result<Vec<Box<dyn Algebra>>>;

/// A kind of device.
pub struct Kind {
    /// Its name in options, without a number.
    pub name: &'static str,
    /// The feature of the package that drives it.
    pub feature: &'static str,
    /// Whether this build has that feature.
    pub built: bool,
    /// Whether there can be several, told apart by a number.
    pub numbered: bool,
    /// Whether it is faster than the processor where there is enough to do.
    pub faster: bool,
    /// Variables of the environment that make its library compute with less than the format that is asked for, where
    /// they are not 0. Nothing here reads the environment: see [`Choice::checked`].
    pub shortening: &'static [&'static str],
    open: fn(usize, &Opening<'_>) -> Lanes,
}

/// Every kind of device beside the processor; `auto` tries them in this order.
pub static KINDS: &[Kind] = &[
    Kind {
        name: "cuda",
        feature: "cuda",
        built: cfg!(feature = "cuda"),
        numbered: true,
        faster: true,
        shortening: &[
            "NVIDIA_TF32_OVERRIDE",
            "CUBLAS_EMULATE_SINGLE_PRECISION",
            "CUBLAS_EMULATE_DOUBLE_PRECISION",
        ],
        open: cuda,
    },
    Kind {
        name: "metal",
        feature: "metal",
        built: cfg!(feature = "metal"),
        numbered: true,
        faster: true,
        shortening: &[],
        open: metal,
    },
    Kind {
        name: "candle-cpu",
        feature: "candle",
        built: cfg!(feature = "candle"),
        numbered: false,
        faster: false,
        shortening: &[],
        open: processor,
    },
];

/// Stands for what opens a device in builds without any; the table says so before it is called.
#[cfg(not(feature = "candle"))]
fn absent(_number: usize, opening: &Opening<'_>) -> Lanes {
    Err(Error::new(Reason::NoDevice {
        device: opening.name.to_owned(),
        problem: "it is not in this build".to_owned(),
    }))
}

/// The name of the processor, which is no device.
pub const PROCESSOR: &str = "cpu";

/// The name of whichever device there is.
pub const AUTO: &str = "auto";

/// How a device is opened.
#[cfg_attr(
    not(feature = "candle"),
    expect(dead_code, reason = "nothing opens in such a build")
)]
struct Opening<'a> {
    /// As it was named.
    name: &'a str,
    /// Bytes of it that may be used.
    memory: Option<u64>,
    /// What factorises, which is not for devices.
    factorisations: &'static dyn Algebra,
}

/// A device that is open.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    name: String,
    lanes: Vec<Box<dyn Algebra>>,
}

impl Device {
    /// Any libraries of linear algebra as lanes of a device; there is at least one.
    pub fn new(name: impl Into<String>, lanes: Vec<Box<dyn Algebra>>) -> Self {
        assert!(!lanes.is_empty(), "a device has a lane");
        let name = name.into();
        Device(Arc::new(Inner { name, lanes }))
    }

    /// Opens the device of a name: `cuda`, `cuda:1`, `candle-cpu` …
    ///
    /// `memory` is how many bytes of it may be used, as many as are free if absent; `factorisations` does what is not
    /// for devices.
    ///
    /// # Errors
    /// [`Reason::BadOption`] for a name that means nothing; [`Reason::NoDevice`] where the build or the machine does not
    /// have it.
    pub fn open(
        name: &str,
        memory: Option<u64>,
        factorisations: &'static dyn Algebra,
    ) -> Result<Self> {
        let (kind, number) = find(name)?;
        if let Some(memory) = memory.filter(|memory| *memory < LEAST_MEMORY) {
            let problem = format!("a device needs at least {LEAST_MEMORY} bytes");
            let text = memory.to_string();
            return Err(Error::new(Reason::BadOption { text, problem }));
        }
        if !kind.built {
            let reason = Reason::NoDevice {
                device: name.to_owned(),
                problem: format!("this build is without the feature `{}`", kind.feature),
            };
            let feature = kind.feature;
            let hint = format!("build it with `cargo build --release --features {feature}`");
            return Err(Error::new(reason).with_hint(hint));
        }
        let opening = Opening {
            name,
            memory,
            factorisations,
        };
        Device::new(name, (kind.open)(number, &opening)?).proved()
    }

    /// The device, if its products are as near to the exact ones as the formats of their factors promise. Drivers and
    /// variables of the environment can make a GPU round its inputs to less (TF32), or emulate a format by others.
    ///
    /// # Errors
    /// [`Reason::NoDevice`] where an element is further off than rounding explains; what a product gives.
    pub fn proved(self) -> Result<Self> {
        for lane in self.lanes() {
            let mut off = (!are_near::<f32>(lane)?).then_some("f32");
            if off.is_none() && lane.has_doubles() && !are_near::<f64>(lane)? {
                off = Some("f64");
            }
            if let Some(format) = off {
                let problem = format!("its products of {format} are off by more than rounding");
                let device = self.name().to_owned();
                let hint = "if NVIDIA_TF32_OVERRIDE, CUBLAS_EMULATE_SINGLE_PRECISION or CUBLAS_EMULATE_DOUBLE_PRECISION is set, unset it";
                let error = Error::new(Reason::NoDevice { device, problem });
                return Err(error.with_hint(hint));
            }
        }
        Ok(self)
    }

    /// Its name in reports.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its lanes, of which there is at least one.
    pub fn lanes(&self) -> impl ExactSizeIterator<Item = &dyn Algebra> {
        self.0.lanes.iter().map(|lane| &**lane)
    }

    /// The first of its lanes.
    pub fn algebra(&self) -> &dyn Algebra {
        &*self.0.lanes[0]
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether every element of a product, whose factors have entries of very different sizes, is as near to its chain in
/// f64 as any order of sums allows: twice `k · u · ‖row‖ · ‖column‖` (Higham, "Accuracy and Stability of Numerical
/// Algorithms", 2nd edition, §3.1), the chain's own error included.
fn are_near<T: Real>(lane: &dyn Dense<T>) -> Result<bool> {
    const LENGTH: usize = 96;
    let mut random = Random::new(1);
    let mut matrix = |rows, columns| {
        let values = random.normals(rows * columns);
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            let size = 2f64.powi((i + 2 * j) as i32 % 7 * 3 - 9);
            T::rounded(values[i * columns + j] * size)
        })
    };
    let (a, b) = (matrix(40, LENGTH), matrix(LENGTH, 56));
    let product = held(lane, b.view())?.after(a.view())?;
    let norm = |line: ArrayView1<'_, T>| {
        let squares = line.iter().map(|value| value.widened() * value.widened());
        squares.sum::<f64>().sqrt()
    };
    Ok(product.indexed_iter().all(|((i, j), found)| {
        let (row, column) = (a.row(i), b.column(j));
        let pairs = row.iter().zip(column);
        let chain = pairs.fold(0.0, |sum, (a, b)| a.widened().mul_add(b.widened(), sum));
        let allowed = 2.0 * LENGTH as f64 * T::ROUNDOFF * norm(row) * norm(column);
        (found.widened() - chain).abs() <= allowed
    }))
}

/// The kind of a name, and the number behind it.
fn find(name: &str) -> Result<(&'static Kind, usize)> {
    let unknown = |problem: String| {
        let text = name.to_owned();
        Error::new(Reason::BadOption { text, problem })
    };
    let (stem, number) = match name.split_once(':') {
        Some((stem, number)) => (stem, Some(number)),
        None => (name, None),
    };
    let kind = KINDS.iter().find(|kind| kind.name == stem);
    let kind = kind.ok_or_else(|| unknown(format!("no such device; there are {}", names())))?;
    let number = match number {
        None => 0,
        Some(_) if !kind.numbered => return Err(unknown("there is only one of it".to_owned())),
        Some(number) => number
            .parse()
            .map_err(|_| unknown("behind the colon stands the number of the device".to_owned()))?,
    };
    Ok((kind, number))
}

/// Every name that can be asked for, as text.
pub fn names() -> String {
    let kinds = KINDS.iter().map(|kind| match kind.numbered {
        true => format!("{}[:N]", kind.name),
        false => kind.name.to_owned(),
    });
    let all: Vec<String> = [PROCESSOR.to_owned()]
        .into_iter()
        .chain(kinds)
        .chain([AUTO.to_owned()])
        .collect();
    all.join(", ")
}

/// What was asked for, and what there is.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The device; none where there is none.
    pub device: Option<Device>,
    /// Whether it is to be used for what gains by it only.
    pub only_if_faster: bool,
    /// Why it is that one, or none.
    pub reason: String,
}

impl Choice {
    /// This device, for everything that it can do.
    pub fn of(device: Device) -> Self {
        Choice {
            device: Some(device),
            only_if_faster: false,
            reason: "asked for".to_owned(),
        }
    }

    /// What a name means: nothing for `cpu`; for `auto` the first device that opens, for work that gains by it.
    ///
    /// # Errors
    /// As [`Device::open`]; `auto` has none.
    pub fn named(
        name: &str,
        memory: Option<u64>,
        factorisations: &'static dyn Algebra,
    ) -> Result<Option<Self>> {
        match name {
            PROCESSOR => Ok(None),
            AUTO => Ok(Some(Self::automatic(memory, factorisations))),
            name => Ok(Some(Self::of(Device::open(name, memory, factorisations)?))),
        }
    }

    /// Refuses a device whose library the environment tells to compute with less than the format that is asked for, of
    /// which no bound of an error holds; `auto` does without it. `is_on` says whether a variable is set, and not to 0.
    ///
    /// # Errors
    /// [`Reason::NoDevice`].
    pub fn checked(self, is_on: impl Fn(&str) -> bool) -> Result<Self> {
        let device = self.device.as_ref().map(Device::name).unwrap_or_default();
        let shortening = find(device).map_or(&[][..], |(kind, _)| kind.shortening);
        let Some(variable) = shortening.iter().find(|name| is_on(name)) else {
            return Ok(self);
        };
        let reason = Reason::NoDevice {
            device: device.to_owned(),
            problem: format!("the variable {variable} makes it round more than its formats do"),
        };
        match self.only_if_faster {
            true => Ok(Choice {
                device: None,
                reason: reason.to_string(),
                ..self
            }),
            false => Err(Error::new(reason).with_hint(format!("run it with {variable}=0"))),
        }
    }

    fn automatic(memory: Option<u64>, factorisations: &'static dyn Algebra) -> Self {
        let mut missing = Vec::new();
        for kind in KINDS.iter().filter(|kind| kind.faster) {
            match Device::open(kind.name, memory, factorisations) {
                Ok(device) => {
                    let reason = "it is the first that opened".to_owned();
                    return Choice {
                        device: Some(device),
                        only_if_faster: true,
                        reason,
                    };
                }
                Err(error) => missing.push(error.cause()),
            }
        }
        Choice {
            device: None,
            only_if_faster: true,
            reason: missing.join("; "),
        }
    }
}
