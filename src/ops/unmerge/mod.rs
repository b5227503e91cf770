//! An adapter out of a merged checkpoint: bit for bit with the undo file of the merge, by subtraction without.

use std::path::PathBuf;

use super::merge::Control;
use crate::error::{Error, Reason, Result};
use crate::formats::ReadOptions;
use crate::tensor::Float;

mod approximate;
mod exact;
mod report;

pub use super::undo::Taken;
pub(crate) use exact::{beside, restoring};
pub use report::{BoundReport, Report};

/// What to take out of what.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The result of a merge.
    pub merged: PathBuf,
    /// What was merged.
    pub adapters: Vec<Taken>,
    /// What the merge wrote beside its result.
    pub undo: Option<PathBuf>,
    /// A folder, or a file where the base was one.
    pub output: PathBuf,
    /// Without an undo file: leaves what cannot be taken out as it is in the result.
    pub allow_kept: bool,
    /// Without an undo file: the type of all floating tensors of the base; each tensor's own if absent.
    pub dtype: Option<Float>,
    /// Replaces an existing output.
    pub force: bool,
    /// Worker threads; one per core if absent.
    pub threads: Option<usize>,
    /// How adapters are read.
    pub read: ReadOptions,
    /// Forces one of [`crate::linalg::KERNELS`], for tests.
    pub kernel: Option<String>,
}

/// A base that can be restored.
pub struct Plan(Way);

enum Way {
    Exact(Box<exact::Plan>),
    Approximate(Box<approximate::Plan>),
}

/// Opens everything and checks that it belongs together; nothing is written.
///
/// # Errors
/// A result, an adapter or a strength that is not that of the merge; an undo file that is damaged; an output that
/// cannot be written.
pub fn plan(options: &Options) -> Result<Plan> {
    if options.undo.is_some() && options.dtype.is_some() {
        return Err(Error::new(Reason::BadOption {
            text: "--dtype".to_owned(),
            problem: "the undo file knows the types of the base".to_owned(),
        }));
    }
    if options.adapters.is_empty() {
        return Err(Error::new(Reason::NoAdapter));
    }
    let strengths = options.adapters.iter().filter_map(|own| own.strength);
    for strength in strengths {
        if !strength.is_finite() {
            return Err(Error::new(Reason::StrengthNotFinite { strength }));
        }
    }
    let way = match options.undo {
        Some(_) => Way::Exact(Box::new(exact::plan(options)?)),
        None => Way::Approximate(Box::new(approximate::plan(options)?)),
    };
    Ok(Plan(way))
}

impl Plan {
    /// Tells what a run would do.
    pub fn report(&self) -> Report {
        match &self.0 {
            Way::Exact(plan) => plan.report(),
            Way::Approximate(plan) => plan.report(),
        }
    }

    /// Writes the base.
    ///
    /// # Errors
    /// Those of kinds Output, Io, Changed and Interrupted; the output is then as it was.
    pub fn run(&self, control: &Control<'_>) -> Result<Report> {
        match &self.0 {
            Way::Exact(plan) => plan.run(control),
            Way::Approximate(plan) => plan.run(control),
        }
    }
}
