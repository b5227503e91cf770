//! Adapters into a base: `plan`, then `run`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::checkpoint::Variant;
use crate::checkpoint::sink::Faults;
use crate::error::{Error, Reason, Result};
use crate::formats::ReadOptions;
use crate::linalg::device::Choice;
use crate::notice::Notice;
use crate::tensor::Float;

mod embeddings;
mod layout;
mod missing;
mod padding;
pub(crate) mod pipeline;
mod place;
mod plan;
mod planner;
mod record;
mod replication;
mod report;
mod run;

pub(crate) use place::{architecture, attention, layout, stores_inputs_first};
pub(crate) use plan::{
    OpenBase, Opened, holds_an_adapter, kernel, look, open_adapters, plan_inverse, plan_onto,
};
pub use plan::{Plan, PlannedModule, PlannedTensor};
pub use report::{AdapterReport, Change, FileReport, MergeDevice, ModuleReport, Report};

/// What to merge into what, and what to accept.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A checkpoint: a file of tensors, or a folder of one model or of a pipeline.
    pub base: PathBuf,
    /// Which weights, where the base has several variants of them.
    pub variant: Variant,
    /// In the order in which they apply.
    pub adapters: Vec<Selection>,
    /// A folder, or a file where the base is a file and the name ends as those of the result.
    pub output: PathBuf,
    /// Regular expressions (searched anywhere in a module path): only these modules.
    pub only: Vec<String>,
    /// Regular expressions: not these modules.
    pub skip: Vec<String>,
    /// Type of all floating tensors of the output; each tensor's own if absent.
    pub dtype: Option<Float>,
    /// Writes beside it what takes the result back to the base, bit for bit.
    pub undo: Option<PathBuf>,
    /// Replaces an existing output.
    pub force: bool,
    /// Largest shard of the output, in bytes of tensor data; the base's shards if absent.
    pub shard_size: Option<u64>,
    /// Worker threads; one per core if absent.
    pub threads: Option<usize>,
    /// Leaves out what has no place in the base, and says so.
    pub allow_unmatched: bool,
    /// Writes values that are not finite, and says so.
    pub allow_nonfinite: bool,
    /// How adapters are read.
    pub read: ReadOptions,
    /// Where products are computed; by the processor's own kernels if absent. The bytes are the same.
    pub device: Option<Choice>,
    /// Forces one of [`crate::linalg::KERNELS`], for tests.
    pub kernel: Option<String>,
}

/// An adapter with its strength.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// An adapter folder or its file of tensors.
    pub path: PathBuf,
    /// The multiplier of everything it adds; 1 is the adapter as trained.
    pub strength: f64,
    /// Other strengths for modules whose path a regular expression finds; the first match counts.
    pub strength_for: Vec<(String, f64)>,
}

/// Hands between a run and its caller.
#[derive(Clone, Default)]
pub struct Control<'a> {
    /// Called with bytes written and bytes in all.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    /// Set from outside to stop the run.
    pub cancel: Arc<AtomicBool>,
    /// Made-up failures, for tests.
    pub faults: Faults,
}

impl Control<'_> {
    pub(crate) fn check(&self) -> Result<()> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(Error::new(Reason::Stopped)),
            false => Ok(()),
        }
    }

    pub(crate) fn progress(&self, done: u64, total: u64) {
        if let Some(progress) = self.progress {
            progress(done, total);
        }
    }
}

/// Plans a merge: opens everything, resolves every module, checks every shape, writes nothing.
///
/// # Errors
/// Whatever is wrong, with all cases listed: see [`crate::Kind`].
pub fn plan(options: &Options) -> Result<Plan> {
    plan::plan(options)
}

/// Checks that adapters fit a base, as [`plan`] does, without an output; returns what is odd.
///
/// # Errors
/// As [`plan`], less what concerns the output.
pub fn fits(options: &Options) -> Result<Vec<Notice>> {
    plan::fits(options)
}
