//! An adapter of other ranks: `plan` decomposes what its modules add, `run` writes.
//!
//! A product `B · A` is decomposed by the triangles of its factors and the singular values of what is between them,
//! never as the matrix that it is (`linalg/truncated`). What is cut off is the least that a module of the rank can leave
//! out (Eckart and Young, 1936); a larger rank is zeros behind the factors.

use std::time::Instant;

use super::convert;
use super::device::{self, DeviceReport};
use super::merge::Control;
use super::workers::workers;
use crate::error::{Error, Kind, Reason, Result};
use crate::linalg::{dense, device::Choice};
use crate::pattern;

mod measure;
mod report;
mod sd_scripts;
mod size;
mod whole;
mod work;

use work::Work;

pub use report::{How, Report, ResizedReport, Total};

/// What to resize, and to which ranks.
#[derive(Clone, Debug)]
pub struct Options {
    /// The adapter and its output. Without a format it is the adapter's own; `only` and `skip` choose what is resized,
    /// and everything else is written as it is.
    pub conversion: convert::Options,
    /// How ranks are chosen.
    pub ranks: Ranks,
    /// The rank of convolutions, or the largest that they may have where it is chosen by the spectrum.
    pub conv_rank: Option<usize>,
    /// The largest rank where it is chosen by the spectrum; that of each module if absent.
    pub max_rank: Option<usize>,
    /// How singular values are counted.
    pub counting: Counting,
    /// Worker threads; one per core if absent.
    pub threads: Option<usize>,
    /// One of [`crate::linalg::dense::ALGEBRAS`] by name; the first if absent.
    pub algebra: Option<String>,
    /// A device for the products of decompositions; the processor if absent. What is proved is the same, but not every
    /// bit.
    pub device: Option<Choice>,
}

/// How ranks are chosen. σ are the singular values of what a module adds, falling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ranks {
    /// One for all.
    Fixed(usize),
    /// The smallest that keeps this share of Σσ².
    Energy(f64),
    /// The smallest that keeps this share of √Σσ², the Frobenius norm.
    Norm(f64),
    /// The smallest that keeps this share of Σσ.
    Sum(f64),
    /// As many as there are singular values above the largest divided by this.
    Ratio(f64),
    /// The best that a file of so many bytes holds.
    Budget(u64),
}

/// How singular values are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counting {
    /// As the rule says, and at least one. A convolution is what has a kernel of more than one element, and no rank
    /// grows.
    #[default]
    Exact,
    /// As sd-scripts does: one more than the rule says. A convolution is whatever has more than two axes.
    SdScripts,
}

/// The largest rank that may be asked for.
const MOST: usize = 1 << 20;

/// A resized adapter that can be written.
pub struct Plan {
    conversion: convert::Plan,
    report: Report,
}

/// Reads, decomposes, names and checks; the output is not touched, beside which factors wait in a file without a name.
///
/// # Errors
/// [`Reason::BadOption`] for numbers that mean nothing, [`Reason::FactorNotFinite`], [`Reason::NothingSelected`], a size
/// that has no room for one rank of each module, and those of [`convert::plan`].
pub fn plan(options: &Options, control: &Control<'_>) -> Result<Plan> {
    let start = Instant::now();
    checked(options)?;
    let processor = dense::named(options.algebra.as_deref())?;
    let device = options.device.as_ref();
    let (algebra, _) = device::algebra(device, processor, false);
    let conversion = convert::in_own_format(&options.conversion)?;
    let choice = pattern::Choice::new(&conversion.only, &conversion.skip)?;
    // An output that cannot be written is told before the arithmetic.
    match convert::planned(&conversion, |_| Ok(Vec::new())) {
        Err(error) if error.kind() == Kind::Output => return Err(error),
        _ => {}
    }
    let work = Work {
        options,
        conversion: &conversion,
        choice,
        algebra,
        control,
    };
    let (conversion, found) = workers(options.threads)?.install(|| work.run())?;
    let mut report = Report::new(&conversion, found, start.elapsed());
    let why = Err("products of factors are too small to gain by it");
    report.device = device.map(|choice| DeviceReport::of(choice, why));
    Ok(Plan { conversion, report })
}

/// Refuses numbers that mean nothing.
fn checked(options: &Options) -> Result<()> {
    let bad = |text: String, problem: &str| {
        let problem = problem.to_owned();
        Err(Error::new(Reason::BadOption { text, problem }))
    };
    let fixed = match options.ranks {
        Ranks::Fixed(rank) => Some(rank),
        _ => None,
    };
    let ranks = [fixed, options.conv_rank, options.max_rank];
    if let Some(rank) = ranks
        .into_iter()
        .flatten()
        .find(|rank| !(1..=MOST).contains(rank))
    {
        return bad(
            rank.to_string(),
            "a rank is at least 1, and at most 1048576",
        );
    }
    let counts_otherwise = options.counting == Counting::SdScripts;
    match options.ranks {
        Ranks::Energy(share) | Ranks::Norm(share) | Ranks::Sum(share)
            if !(share > 0.0 && share <= 1.0) =>
        {
            bad(share.to_string(), "a share is more than 0 and at most 1")
        }
        Ranks::Ratio(ratio) if !(ratio >= 1.0 && ratio.is_finite()) => bad(
            ratio.to_string(),
            "a ratio of singular values is at least 1",
        ),
        Ranks::Energy(share) if counts_otherwise => bad(
            share.to_string(),
            "sd-scripts has no share of the energy; its share of the norm is the root of that",
        ),
        Ranks::Budget(bytes) if counts_otherwise => {
            bad(bytes.to_string(), "sd-scripts has no rule for a size")
        }
        _ => Ok(()),
    }
}

impl Plan {
    /// Tells what a run would do.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Writes the output, complete or not at all.
    ///
    /// # Errors
    /// Those of [`convert::Plan::run`].
    pub fn run(mut self, control: &Control<'_>) -> Result<Report> {
        self.report.conversion = self.conversion.run(control)?;
        Ok(self.report)
    }
}
