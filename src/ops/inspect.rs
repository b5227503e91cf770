//! What a path is, from headers and configuration alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::merge::holds_an_adapter;
use super::outgoing::{Base, format, outlook};
use crate::adapter::{Adapter, Facts, ReplacementKind, Scale};
use crate::checkpoint::{Checkpoint, Variant};
use crate::error::{Error, Kind, Reason, Result};
use crate::formats::{Found, Loss, ReadOptions, Summary};
use crate::notice::{Notice, NoticeKind};
use crate::tensor::Tensor;

/// How to read a path, and what to tell of an adapter besides what it is.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How the adapter is read.
    pub read: ReadOptions,
    /// Short names of formats: what each could not say.
    pub to: Vec<String>,
    /// A base that tells the names of other formats; `check` looks for the places of the modules in it too.
    pub base: Option<PathBuf>,
    /// The family of the model, where names alone do not tell it.
    pub family: Option<String>,
}

/// A path, described.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Version of this schema.
    pub schema: u32,
    /// The path that was given.
    pub path: String,
    /// `adapter`, `checkpoint`, or `tensors` where names tell neither.
    pub what: String,
    /// The files that were read.
    pub files: Vec<String>,
    /// How the tensors lie in the file.
    pub container: String,
    /// How the adapter is spelled: the short name of the format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// The format's name in the field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_name: Option<String>,
    /// Number of tensors.
    pub tensors: usize,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of tensors by type.
    pub dtypes: BTreeMap<String, usize>,
    /// The adapter, where it could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterView>,
    /// What names and shapes tell, where it could only be recognised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
    /// The checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointView>,
    /// What other formats could not say of it, as far as it was asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conversions: Vec<Conversion>,
    /// Why it could not be read whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// What is odd.
    pub notices: Vec<Notice>,
}

/// An adapter, as it will be applied.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterView {
    /// Number of modules by method.
    pub methods: BTreeMap<String, usize>,
    /// Number of modules by rank.
    pub ranks: BTreeMap<usize, usize>,
    /// Different scales, with the number of modules.
    pub scales: Vec<(Scale, usize)>,
    /// The modules.
    pub modules: Vec<ModuleView>,
    /// Whole tensors that replace the base's.
    pub replacements: Vec<ReplacementView>,
    /// Embedding rows that are replaced, by module.
    pub tokens: BTreeMap<String, Vec<usize>>,
    /// Training state without a part in the result.
    pub unused: Vec<String>,
    /// Ranges of layers that are repeated.
    pub layer_replication: Vec<(usize, usize)>,
    /// Weights that are widened with zeros, and to which shapes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub widened: Vec<(String, Vec<usize>)>,
    /// What the files say about themselves.
    pub facts: Facts,
}

/// A module.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleView {
    /// Path in the model that was trained.
    pub path: String,
    /// The method.
    pub method: String,
    /// Rank of the tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// The multiplier.
    pub scale: Scale,
}

/// A whole tensor in an adapter.
#[derive(Clone, Debug, Serialize)]
pub struct ReplacementView {
    /// Name in the model that was trained.
    pub name: String,
    /// `module`, `bias` or `base-layer`.
    pub kind: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// A checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct CheckpointView {
    /// Files of tensors.
    pub shards: Vec<String>,
    /// What `config.json` says: model type, architectures, ties, vocabulary.
    pub config: BTreeMap<String, String>,
    /// How it is quantised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantisation: Option<String>,
}

/// What would become of an adapter in another format.
#[derive(Clone, Debug, Serialize)]
pub struct Conversion {
    /// The short name of the format.
    pub to: String,
    /// What it cannot say.
    pub losses: Vec<Loss>,
    /// What would be multiplied into factors.
    pub folded: Vec<Loss>,
    /// Why nothing can be written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}

/// Why something could be recognised but not read.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// Kind of the error.
    pub kind: String,
    /// Its exit code.
    pub exit_code: u8,
    /// The error in words.
    pub text: String,
    /// All cases, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cases: Vec<String>,
    /// What to do next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Problem {
    /// An error as a value that serialises.
    pub fn of(error: Error) -> Self {
        Problem {
            kind: error.kind().name().to_owned(),
            exit_code: error.kind().exit_code(),
            text: error.to_string(),
            hint: error.hint().map(str::to_owned),
            cases: error.into_cases(),
        }
    }
}

/// Describes a file or folder.
///
/// # Errors
/// What opening it gives, and the name of a format that is none. An adapter that is recognised but
/// cannot be read is described, with a [`Problem`].
pub fn inspect(path: &Path, options: &Options) -> Result<Inspection> {
    match open(path)? {
        Opened::Checkpoint(checkpoint) => Ok(of_checkpoint(path, &checkpoint)),
        Opened::Tensors(found) => Ok(of_tensors(path, &found, options)?.0),
    }
}

/// What a path turned out to be.
pub(super) enum Opened {
    Checkpoint(Box<Checkpoint>),
    Tensors(Box<Found>),
}

pub(super) fn open(path: &Path) -> Result<Opened> {
    if path.is_dir() {
        match Checkpoint::open_variant(path, &Variant::Any) {
            Ok(checkpoint) if holds_an_adapter(&checkpoint) => {
                let found = Found::open(checkpoint.shards[0].file.input.path())?;
                return Ok(Opened::Tensors(Box::new(found)));
            }
            Ok(checkpoint) => return Ok(Opened::Checkpoint(Box::new(checkpoint))),
            Err(error) => match error.reason() {
                // Perhaps an adapter, or a folder with one file of tensors.
                Reason::NoCheckpoint | Reason::BaseIsAdapter => {}
                _ => return Err(error),
            },
        }
    }
    let found = Found::open(path)?;
    let may_be_base = found.file.container.result().is_some();
    if may_be_base && found.looks_like_checkpoint() && !path.is_dir() {
        return Checkpoint::of_file(path, found.file)
            .map(|checkpoint| Opened::Checkpoint(Box::new(checkpoint)));
    }
    Ok(Opened::Tensors(Box::new(found)))
}

pub(super) fn of_checkpoint(path: &Path, checkpoint: &Checkpoint) -> Inspection {
    let container = checkpoint.shards[0].file.container.name();
    let files = checkpoint
        .inputs()
        .map(|input| input.path().to_string_lossy().into_owned())
        .collect();
    let mut view = CheckpointView {
        shards: checkpoint
            .shards
            .iter()
            .map(|shard| checkpoint.parts[shard.part].place(&shard.name))
            .collect(),
        config: BTreeMap::new(),
        quantisation: checkpoint.quantisation(),
    };
    for key in [
        "_class_name",
        "model_type",
        "vocab_size",
        "tie_word_embeddings",
        "torch_dtype",
        "dtype",
        "num_hidden_layers",
    ] {
        if let Some(value) = checkpoint.configured(key) {
            view.config.insert(
                key.to_owned(),
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned),
            );
        }
    }
    let mut inspection = describe(path, "checkpoint", container, files, checkpoint.tensors());
    inspection.checkpoint = Some(view);
    inspection.notices.clone_from(&checkpoint.notices);
    inspection
}

/// The description, and the adapter if it could be read.
pub(super) fn of_tensors(
    path: &Path,
    found: &Found,
    options: &Options,
) -> Result<(Inspection, Option<Adapter>)> {
    let files = found
        .inputs()
        .map(|input| input.path().to_string_lossy().into_owned())
        .collect();
    let format = found.format();
    let what = match format {
        Some(_) => "adapter",
        None if found.looks_like_checkpoint() => "checkpoint",
        None => "tensors",
    };
    let container = found.file.container.name();
    let mut inspection = describe(
        path,
        what,
        container,
        files,
        found.file.directory.tensors.iter(),
    );
    inspection.format = format.map(|format| format.id().to_owned());
    inspection.format_name = format.map(|format| format.name().to_owned());
    let adapter = found
        .file
        .refuse_blocks()
        .and_then(|()| found.read(&options.read));
    match adapter {
        Ok(adapter) => {
            inspection.adapter = Some(view(&adapter));
            inspection.notices.clone_from(&adapter.notices);
            inspection.conversions = conversions(&adapter, options)?;
            Ok((inspection, Some(adapter)))
        }
        Err(error) => {
            inspection.summary = format.map(|format| format.summary(found));
            if format.is_some() {
                let text = format!("it cannot be merged: {error}");
                inspection
                    .notices
                    .push(Notice::new(NoticeKind::NotMergeable, text));
            }
            inspection.problem = Some(Problem::of(error));
            Ok((inspection, None))
        }
    }
}

fn conversions(adapter: &Adapter, options: &Options) -> Result<Vec<Conversion>> {
    if options.to.is_empty() {
        return Ok(Vec::new());
    }
    let base = options.base.as_deref().map(Base::open).transpose()?;
    let outlook = |to: &String| {
        let target = format(to)?;
        let found = outlook(adapter, target, base.as_ref(), options.family.as_deref());
        let (losses, folded, problem) = match found {
            Ok((losses, folded)) => (losses, folded, None),
            Err(error) => (Vec::new(), Vec::new(), Some(Problem::of(error))),
        };
        Ok(Conversion {
            to: to.clone(),
            losses,
            folded,
            problem,
        })
    };
    options.to.iter().map(outlook).collect()
}

impl Inspection {
    /// The exit code of a description: that of the problem, unless the file is sound and only not
    /// supported, or has no configuration beside it.
    pub fn exit_code(&self) -> u8 {
        match &self.problem {
            None => 0,
            Some(problem) if problem.kind == Kind::Unsupported.name() => 0,
            Some(_) if self.files.len() == 1 && self.format.is_some() => 0,
            Some(problem) => problem.exit_code,
        }
    }
}

fn describe<'a>(
    path: &Path,
    what: &str,
    container: &str,
    files: Vec<String>,
    tensors: impl Iterator<Item = &'a Tensor>,
) -> Inspection {
    let mut inspection = Inspection {
        schema: 1,
        path: path.to_string_lossy().into_owned(),
        what: what.to_owned(),
        files,
        container: container.to_owned(),
        format: None,
        format_name: None,
        tensors: 0,
        parameters: 0,
        bytes: 0,
        dtypes: BTreeMap::new(),
        adapter: None,
        summary: None,
        checkpoint: None,
        conversions: Vec::new(),
        problem: None,
        notices: Vec::new(),
    };
    for tensor in tensors {
        inspection.tensors += 1;
        inspection.parameters += tensor.parameters() as u64;
        inspection.bytes += tensor.length;
        *inspection.dtypes.entry(tensor.type_name()).or_default() += 1;
    }
    inspection
}

fn view(adapter: &Adapter) -> AdapterView {
    let mut view = AdapterView {
        methods: BTreeMap::new(),
        ranks: BTreeMap::new(),
        scales: Vec::new(),
        modules: Vec::new(),
        replacements: Vec::new(),
        tokens: adapter
            .tokens
            .iter()
            .map(|tokens| (tokens.path.clone(), tokens.indices.clone()))
            .collect(),
        unused: adapter
            .unused
            .iter()
            .map(|tensor| tensor.name.clone())
            .collect(),
        layer_replication: adapter.replication.clone(),
        widened: adapter
            .paddings
            .iter()
            .map(|padding| (padding.path.clone(), padding.shape.clone()))
            .collect(),
        facts: adapter.facts.clone(),
    };
    for module in &adapter.modules {
        *view
            .methods
            .entry(module.method.name().to_owned())
            .or_default() += 1;
        let rank = module.method.rank(module);
        if let Some(rank) = rank {
            *view.ranks.entry(rank).or_default() += 1;
        }
        match view
            .scales
            .iter_mut()
            .find(|(scale, _)| *scale == module.scale)
        {
            Some((_, count)) => *count += 1,
            None => view.scales.push((module.scale, 1)),
        }
        view.modules.push(ModuleView {
            path: module.path.clone(),
            method: module.method.name().to_owned(),
            rank,
            scale: module.scale,
        });
    }
    for replacement in &adapter.replacements {
        let kind = match replacement.kind {
            ReplacementKind::Module => "module",
            ReplacementKind::Bias => "bias",
            ReplacementKind::BaseLayer => "base-layer",
        };
        view.replacements.push(ReplacementView {
            name: replacement.name.clone(),
            kind: kind.to_owned(),
            shape: replacement.tensor.shape.clone(),
        });
    }
    view
}

impl AdapterView {
    /// The names of the adapted layers without their numbers.
    pub fn targets(&self) -> BTreeSet<String> {
        self.modules
            .iter()
            .map(|module| crate::naming::path::leaf(&module.path).to_owned())
            .collect()
    }
}
