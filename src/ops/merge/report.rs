//! What a merge did, or would do, as a value that serialises (schema in `docs/report.md`).

use std::collections::BTreeMap;

use serde::Serialize;

use super::plan::{Plan, PlannedModule, PlannedTensor};
use crate::adapter::evaluate::Sums;
use crate::adapter::{Facts, Orientation, Part, Scale};
use crate::checkpoint::config::Edit;
use crate::linalg::device;
use crate::naming::path;
use crate::notice::Notice;
use crate::ops::device::{DeviceReport, Tally};

/// A merge, told.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this schema.
    pub schema: u32,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// The base that was read.
    pub base: String,
    /// The output.
    pub output: String,
    /// The adapters, in the order in which they apply.
    pub adapters: Vec<AdapterReport>,
    /// Every module, with its place.
    pub modules: Vec<ModuleReport>,
    /// Tensors that an adapter replaced whole.
    pub replaced: Vec<String>,
    /// Tensors that the base does not have.
    pub added: Vec<String>,
    /// Embedding rows that were replaced, by tensor.
    pub token_rows: BTreeMap<String, Vec<usize>>,
    /// Parts of the adapters that a flag allowed to leave out.
    pub left_out: Vec<String>,
    /// Fields of `config.json` that change.
    pub config: Vec<Edit>,
    /// Files of the output.
    pub files: Vec<FileReport>,
    /// Files copied from the base's folder.
    pub copied: Vec<String>,
    /// Files of the base's folder that were not copied.
    pub not_copied: Vec<String>,
    /// Relative size of the change, per kind of tensor; after a run only.
    pub changes: Vec<Change>,
    /// Values written although they are not finite.
    pub not_finite: u64,
    /// Largest number of bytes that are in memory at once, estimated.
    pub memory: u64,
    /// Bytes of the output.
    pub disk: u64,
    /// The undo file; after a run only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoReport>,
    /// Worker threads.
    pub threads: usize,
    /// The arithmetic kernel.
    pub kernel: String,
    /// The device, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<MergeDevice>,
    /// How long it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// What is odd.
    pub notices: Vec<Notice>,
}

/// The device of a merge, and what it did.
#[derive(Clone, Debug, Serialize)]
pub struct MergeDevice {
    /// Which, and why.
    #[serde(flatten)]
    pub chosen: DeviceReport,
    /// What it did; after a run only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub work: Option<Tally>,
}

/// What takes a result back to its base.
#[derive(Clone, Debug, Serialize)]
pub struct UndoReport {
    /// Its path.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// Its length by that of the tensors that changed.
    pub share: Option<f64>,
}

impl UndoReport {
    pub(super) fn new(plan: &Plan, bytes: u64, merged: u64) -> Self {
        let path = plan.options.undo.as_deref();
        UndoReport {
            path: path.map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
            bytes,
            share: (merged > 0).then(|| bytes as f64 / merged as f64),
        }
    }
}

/// An adapter of a merge.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// The path that was given.
    pub path: String,
    /// Its format.
    pub format: String,
    /// The user's multiplier.
    pub strength: f64,
    /// Number of modules in the file.
    pub modules: usize,
    /// What it says about itself.
    pub facts: Facts,
}

/// A module and where it lands.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleReport {
    /// Index of the adapter.
    pub adapter: usize,
    /// Path in the model that was trained.
    pub path: String,
    /// The method.
    pub method: String,
    /// Rank of the tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// The adapter's own multiplier.
    pub scale: Scale,
    /// The user's.
    pub strength: f64,
    /// The tensor of the output.
    pub tensor: String,
    /// Weight or bias.
    pub part: String,
    /// First row and the row after the last, in the tensor as a matrix.
    pub rows: [usize; 2],
    /// `outputs-first` or `inputs-first`.
    pub orientation: String,
    /// Whether the base spells the name otherwise.
    pub renamed: bool,
}

/// A file of the output.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    /// Name in the output.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
}

/// How much a kind of tensor changed.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// The names, numbers replaced by `*`.
    pub kind: String,
    /// How many tensors.
    pub tensors: usize,
    /// ‖Δ‖ / ‖W‖ over all of them (Frobenius); absent where W is zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative: Option<f64>,
}

impl Report {
    pub(super) fn of(plan: &Plan, threads: usize) -> Self {
        let tensors = || plan.tensors();
        let names = |test: &dyn Fn(&PlannedTensor) -> bool| {
            tensors()
                .filter(|tensor| test(tensor))
                .map(|tensor| tensor.name.clone())
                .collect()
        };
        Report {
            schema: 1,
            dry_run: true,
            base: plan.base.path.to_string_lossy().into_owned(),
            output: plan.options.output.to_string_lossy().into_owned(),
            adapters: plan
                .adapters
                .iter()
                .map(|opened| AdapterReport {
                    path: opened.found.path.to_string_lossy().into_owned(),
                    format: opened.format.name().to_owned(),
                    strength: opened.strength,
                    modules: opened.adapter.modules.len(),
                    facts: opened.adapter.facts.clone(),
                })
                .collect(),
            modules: tensors()
                .flat_map(|tensor| tensor.modules.iter().map(move |planned| (tensor, planned)))
                .map(|(tensor, planned)| module(plan, tensor, planned))
                .collect(),
            replaced: names(&|tensor| tensor.replaced_by.is_some() && tensor.in_base),
            added: names(&|tensor| plan.base.tensor(&tensor.name).is_none()),
            token_rows: tensors()
                .filter(|tensor| !tensor.rows.is_empty())
                .map(|tensor| (tensor.name.clone(), tensor.rows.keys().copied().collect()))
                .collect(),
            left_out: plan.left_out.clone(),
            config: plan.edits.clone(),
            files: plan
                .files
                .iter()
                .map(|file| FileReport {
                    name: file.name.clone(),
                    bytes: file.bytes(),
                    tensors: file.tensors.len(),
                })
                .collect(),
            copied: plan
                .companions
                .copied
                .iter()
                .map(|companion| companion.name.clone())
                .collect(),
            not_copied: plan.companions.left.clone(),
            changes: Vec::new(),
            not_finite: 0,
            memory: memory(plan, threads),
            disk: plan.disk_needed(),
            threads,
            kernel: plan.kernel.name.to_owned(),
            device: plan.options.device.as_ref().map(|choice| MergeDevice {
                chosen: DeviceReport::of(choice, Ok(())),
                work: None,
            }),
            undo: None,
            seconds: None,
            notices: plan.notices.clone(),
        }
    }

    pub(super) fn set_changes(&mut self, sums: &[(String, Sums)]) {
        let mut kinds: BTreeMap<String, (usize, Sums)> = BTreeMap::new();
        for (name, sums) in sums {
            let owner = name.strip_suffix(".weight").unwrap_or(name);
            let (count, total) = kinds.entry(path::kind(owner)).or_default();
            *count += 1;
            total.add(sums);
        }
        self.changes = kinds
            .into_iter()
            .map(|(kind, (tensors, sums))| Change {
                kind,
                tensors,
                relative: (sums.base > 0.0).then(|| (sums.delta / sums.base).sqrt()),
            })
            .collect();
    }
}

fn module(plan: &Plan, tensor: &PlannedTensor, planned: &PlannedModule) -> ModuleReport {
    let module = plan.module(planned);
    ModuleReport {
        adapter: planned.adapter,
        path: module.path.clone(),
        method: module.method.name().to_owned(),
        rank: module.method.rank(module),
        scale: module.scale,
        strength: planned.strength,
        tensor: tensor.name.clone(),
        part: match planned.geometry.part {
            Part::Weight => "weight",
            Part::Bias => "bias",
        }
        .to_owned(),
        rows: [planned.rows.start, planned.rows.end],
        orientation: match planned.geometry.orientation {
            Orientation::OutputsFirst => "outputs-first",
            Orientation::InputsFirst => "inputs-first",
        }
        .to_owned(),
        renamed: planned.renamed,
    }
}

/// The buffers of a run: chunks on their way, a block per thread, and the widened factors of the
/// tensor that needs most.
fn memory(plan: &Plan, threads: usize) -> u64 {
    let factors = plan
        .tensors()
        .map(|tensor| {
            let of = |planned: &PlannedModule| {
                let module = plan.module(planned);
                let rank = module.method.rank(module).unwrap_or(1) as u64;
                (rank * planned.geometry.columns as u64 * 8).min(64 << 20)
            };
            tensor.modules.iter().map(of).sum::<u64>()
        })
        .max()
        .unwrap_or(0);
    let widest = plan
        .tensors()
        .filter(|t| !t.is_copy())
        .map(|t| t.matrix().1 as u64)
        .max()
        .unwrap_or(0);
    // What does not lie in its file as it is (strided, compressed) is in memory from the start.
    let gathered: u64 = plan
        .base
        .tensors()
        .filter_map(|tensor| Some(tensor.memory.as_ref()?.len() as u64))
        .sum();
    let blocks = threads as u64 * 4 * 8 * widest.max(super::pipeline::BLOCK as u64);
    // Chains that lanes of a device compute, have waiting, and that are rounded.
    let chains = plan.options.device.as_ref().map_or(0, |_| {
        (2 * device::LANES as u64 + 1) * 2 * super::pipeline::CHUNK as u64
    });
    gathered + factors + blocks + chains + 4 * (super::pipeline::CHUNK as u64 + widest * 8)
}
