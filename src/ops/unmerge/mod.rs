//! An adapter out of a merged checkpoint: bit for bit with the undo file of the merge, by subtraction without.

use std::path::PathBuf;

use super::merge::Control;
use crate::error::{Error, Reason, Result};
use crate::formats::ReadOptions;

mod exact;
mod report;

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
    /// Replaces an existing output.
    pub force: bool,
    /// Worker threads; one per core if absent.
    pub threads: Option<usize>,
    /// How adapters are read.
    pub read: ReadOptions,
    /// Forces one of [`crate::linalg::KERNELS`], for tests.
    pub kernel: Option<String>,
}

/// An adapter that was merged.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// An adapter folder or its file of tensors.
    pub path: PathBuf,
    /// The strength at which it was merged. With an undo file it is known, and only compared; otherwise it is 1 if
    /// absent.
    pub strength: Option<f64>,
    /// Other strengths for modules whose path a regular expression finds; the first match counts.
    pub strength_for: Vec<(String, f64)>,
}

/// A base that can be restored.
pub struct Plan(exact::Plan);

/// Opens everything and checks that it belongs together; nothing is written.
///
/// # Errors
/// A result, an adapter or a strength that is not that of the merge; an undo file that is damaged; an output that
/// cannot be written.
pub fn plan(options: &Options) -> Result<Plan> {
    if options.adapters.is_empty() {
        return Err(Error::new(Reason::NoAdapter));
    }
    let strengths = options.adapters.iter().filter_map(|own| own.strength);
    for strength in strengths {
        if !strength.is_finite() {
            return Err(Error::new(Reason::StrengthNotFinite { strength }));
        }
    }
    exact::plan(options).map(Plan)
}

impl Plan {
    /// Tells what a run would do.
    pub fn report(&self) -> Report {
        self.0.report()
    }

    /// Writes the base.
    ///
    /// # Errors
    /// Those of kinds Output, Io, Changed and Interrupted; the output is then as it was.
    pub fn run(&self, control: &Control<'_>) -> Result<Report> {
        self.0.run(control)
    }
}
