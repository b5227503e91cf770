//! Everything is opened, resolved and checked before the first byte is written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::planner::{self, Placed};
use super::{Options, Selection, layout, record};
use crate::adapter::scan::{self, Scan};
use crate::adapter::{Adapter, Geometry, Module};
use crate::checkpoint::companions::{Companions, companions, has_tokenizer};
use crate::checkpoint::config::{self, Edit};
use crate::checkpoint::sink::{Destination, Faults, Shape};
use crate::checkpoint::{Checkpoint, Part, Variant};
use crate::containers::Entry;
use crate::error::{Error, Reason, Result};
use crate::formats::{Format, Found, ReadOptions};
use crate::linalg::Kernel;
use crate::mapped::Input;
use crate::notice::{Notice, NoticeKind};
use crate::ops::undo::Frame;
use crate::pattern::Pattern;
use crate::tensor::{DType, Float, Tensor, is_floating};

/// A merge that can be run: every decision is taken.
pub struct Plan {
    pub(super) options: Options,
    pub(super) base: Checkpoint,
    pub(super) adapters: Vec<Opened>,
    pub(super) files: Vec<layout::File>,
    pub(super) edits: Vec<Edit>,
    pub(super) companions: Companions,
    pub(super) kernel: &'static Kernel,
    pub(super) shape: Shape,
    pub(super) notices: Vec<Notice>,
    pub(super) left_out: Vec<String>,
    /// Where the tensors of the base lie in its files, if that is to be written down.
    pub(super) frames: Vec<Frame>,
    /// What a restored base is made from; nothing where the base is there.
    pub(super) behind: Vec<Arc<Input>>,
}

/// An adapter that was opened and read.
pub(crate) struct Opened {
    pub(crate) found: Found,
    pub(crate) format: &'static dyn Format,
    pub(crate) adapter: Adapter,
    pub(crate) strength: f64,
    pub(super) strength_for: Vec<(Pattern, f64)>,
    /// The strength of each module by its number, where it is not that of the caller.
    pub(crate) of_modules: Option<Vec<f64>>,
}

/// A tensor of the output.
#[derive(Clone, Debug)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type.
    pub dtype: DType,
    /// Where its values start from: the base, or what an adapter replaced it by.
    pub source: Tensor,
    /// The shard of the base that it belongs to.
    pub shard: usize,
    /// Whether the base has it.
    pub in_base: bool,
    /// Which adapter replaced it whole.
    pub replaced_by: Option<usize>,
    /// Whether that is a copy of the weight below an adapter (PEFT `base_layer.weight`).
    pub replaced_below: bool,
    /// Rows taken from elsewhere: row, tensor, row there.
    pub rows: BTreeMap<usize, (Tensor, usize)>,
    /// What is applied, in order.
    pub modules: Vec<PlannedModule>,
}

/// One module on one tensor.
#[derive(Clone, Debug)]
pub struct PlannedModule {
    /// Index of the adapter.
    pub adapter: usize,
    /// Index of the module in the adapter.
    pub module: usize,
    /// The user's multiplier.
    pub strength: f64,
    /// The rows it owns, in those of the matrix.
    pub rows: Range<usize>,
    /// How it lies there.
    pub geometry: Geometry,
    /// Whether the base spells its name otherwise.
    pub renamed: bool,
    /// The outputs of the module that these rows are, where they are not all of them in order.
    pub outputs: Option<Vec<Range<usize>>>,
    /// The module of these outputs alone.
    pub(super) taken: Option<Arc<Module>>,
}

impl PlannedTensor {
    pub(crate) fn of(tensor: &Tensor, name: String, shard: usize) -> Self {
        PlannedTensor {
            name,
            shape: tensor.shape.clone(),
            dtype: tensor.dtype,
            source: tensor.clone(),
            shard,
            in_base: true,
            replaced_by: None,
            replaced_below: false,
            rows: BTreeMap::new(),
            modules: Vec::new(),
        }
    }

    /// What a header says about it.
    pub(super) fn entry<'a>(&'a self, part: &Part) -> Entry<'a> {
        Entry {
            name: part.own_name(&self.name),
            dtype: self.dtype,
            shape: &self.shape,
            blocks: self.source.blocks.as_ref(),
        }
    }

    /// Whether its bytes are those of its source.
    pub fn is_copy(&self) -> bool {
        self.modules.is_empty() && self.rows.is_empty() && self.dtype == self.source.dtype
    }

    /// Bytes in the output.
    pub fn bytes(&self) -> u64 {
        let elements: usize = self.shape.iter().product();
        (elements * self.dtype.bitsize() / 8) as u64
    }

    /// Rows and columns of the matrix that it is evaluated as.
    pub fn matrix(&self) -> (usize, usize) {
        let elements: usize = self.shape.iter().product();
        // A vector is one row, but a bias that is merged is a column: then it has rows as its weight has.
        match (self.modules.first(), self.shape.as_slice()) {
            (Some(module), _) if module.geometry.columns > 0 => {
                (elements / module.geometry.columns, module.geometry.columns)
            }
            (_, [_]) | (_, []) => (1, elements),
            (_, [outer, ..]) => (*outer, elements.checked_div(*outer).unwrap_or(0)),
        }
    }
}

/// A base that is open, and need not lie in files as it is read.
pub(crate) struct OpenBase {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) frames: Vec<Frame>,
    pub(crate) behind: Vec<Arc<Input>>,
}

impl OpenBase {
    /// The one that the options name.
    fn of(options: &Options) -> Result<Self> {
        let checkpoint = open_base(options)?;
        let frames = match options.undo {
            Some(_) => Frame::of(&checkpoint),
            None => Vec::new(),
        };
        Ok(OpenBase {
            checkpoint,
            frames,
            behind: Vec::new(),
        })
    }
}

pub(super) fn plan(options: &Options) -> Result<Plan> {
    plan_onto(options, OpenBase::of(options)?)
}

/// Plans onto a base that is open.
///
/// # Errors
/// As [`super::plan`].
pub(crate) fn plan_onto(options: &Options, base: OpenBase) -> Result<Plan> {
    let adapters = open_adapters(&options.adapters, &options.read)?;
    planned(options, base, adapters)
}

/// Plans with the inverses of adapters.
///
/// # Errors
/// As [`super::plan`].
pub(crate) fn plan_inverse(options: &Options, inverses: Vec<Opened>) -> Result<Plan> {
    planned(options, OpenBase::of(options)?, inverses)
}

fn planned(options: &Options, base: OpenBase, adapters: Vec<Opened>) -> Result<Plan> {
    let kernel = kernel(options.kernel.as_deref())?;
    let OpenBase {
        checkpoint: base,
        frames,
        behind,
    } = base;
    let Placed {
        tensors,
        edits,
        mut notices,
        left_out,
    } = resolve(options, &base, &adapters)?;
    let shape = output_shape(&base, &options.output)?;
    if let Some(why) = base.writer().fixed_because() {
        let asked = [
            (options.dtype.is_some(), "--dtype"),
            (options.shard_size.is_some(), "--shard-size"),
        ];
        if let Some((_, text)) = asked.into_iter().find(|(asked, _)| *asked) {
            let (text, problem) = (text.to_owned(), why.to_owned());
            return Err(Error::new(Reason::BadOption { text, problem }).in_file(&base.path));
        }
    }
    let companions = match (base.is_folder, shape) {
        (true, Shape::Folder) => companions(&base)?,
        _ => Companions::default(),
    };
    if shape == Shape::Folder {
        own_tokenizers(&adapters, &mut notices);
    }
    let edits = applied(&base, shape, edits, &mut notices)?;
    let files = layout::files(&base, tensors, options.shard_size, shape, &options.output)?;
    let options = options.clone();
    let plan = Plan {
        options,
        base,
        adapters,
        files,
        edits,
        companions,
        kernel,
        shape,
        notices,
        left_out,
        frames,
        behind,
    };
    plan.destination(Faults::default())?
        .check_space(plan.disk_needed())?;
    plan.undo_destination(Faults::default())?;
    Ok(plan)
}

/// Plans as far as an output is not needed, and returns what is odd.
pub(super) fn fits(options: &Options) -> Result<Vec<Notice>> {
    let base = open_base(options)?;
    let adapters = open_adapters(&options.adapters, &options.read)?;
    Ok(resolve(options, &base, &adapters)?.notices)
}

fn resolve(options: &Options, base: &Checkpoint, adapters: &[Opened]) -> Result<Placed> {
    if let Some(how) = base.quantisation() {
        return Err(Error::new(Reason::QuantisedBase { how }).in_file(&base.path));
    }
    let mut placed = planner::place(options, base, adapters)?;
    convert(options, &mut placed.tensors, &mut placed.edits)?;
    placed
        .notices
        .extend(look(adapters, options.allow_nonfinite)?);
    placed.notices.extend(base.notices.iter().cloned());
    placed.notices.extend(average(base, &placed.tensors));
    Ok(placed)
}

/// A notice if a model of latent diffusion changes and the average over its training does not.
///
/// `model_ema.` has the names of `model.` without their dots (`LitEma` of `CompVis/latent-diffusion`); it
/// is another model, and loaders that ask for it would not see the adapter.
fn average(base: &Checkpoint, tensors: &[PlannedTensor]) -> Option<Notice> {
    let has_average = base.tensors().any(|t| t.name.starts_with("model_ema."));
    let changes = |tensor: &PlannedTensor| {
        tensor.name.starts_with("model.diffusion_model.")
            && (tensor.replaced_by.is_some()
                || !tensor.rows.is_empty()
                || !tensor.modules.is_empty())
    };
    (has_average && tensors.iter().any(changes)).then(|| {
        let text = "the averaged copy of the weights (`model_ema.`) is not changed";
        Notice::new(NoticeKind::EmaCopy, text)
            .on("model_ema")
            .in_file(&base.path)
    })
}

impl Plan {
    /// Every tensor of the output, file by file.
    pub fn tensors(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.files.iter().flat_map(|file| &file.tensors)
    }

    /// Bytes that the output takes.
    pub fn disk_needed(&self) -> u64 {
        let files: u64 = self.files.iter().map(layout::File::bytes).sum();
        let companions: u64 = self
            .companions
            .copied
            .iter()
            .map(|companion| companion.input.len())
            .sum();
        files + companions
    }

    /// The module that a planned module stands for.
    pub fn module<'a>(&'a self, planned: &'a PlannedModule) -> &'a Module {
        match &planned.taken {
            Some(module) => module,
            None => &self.adapters[planned.adapter].adapter.modules[planned.module],
        }
    }

    /// Adds what is odd about a base that is restored.
    pub(crate) fn notice(&mut self, notices: Vec<Notice>) {
        self.notices.extend(notices);
    }

    /// The files and folders that are read.
    fn places(&self) -> Vec<&Path> {
        let files = self.base.inputs().chain(&self.behind);
        let folders = self.adapters.iter().flat_map(|opened| {
            let path = opened.found.path.as_path();
            let files = opened.found.inputs().map(|input| input.path());
            files.chain(path.is_dir().then_some(path))
        });
        let bases = [self.base.path.as_path(), &self.options.base].into_iter();
        bases
            .chain(files.map(|input| input.path()))
            .chain(folders)
            .collect()
    }

    /// The output path, checked again.
    pub(super) fn destination(&self, faults: Faults) -> Result<Destination> {
        Destination::check(
            &self.options.output,
            self.shape,
            self.options.force,
            self.places(),
            faults,
        )
    }

    /// Where the undo file goes, if one is wanted.
    pub(super) fn undo_destination(&self, faults: Faults) -> Result<Option<Destination>> {
        let undo = self.options.undo.as_deref();
        undo.map(|undo| record::destination(self, undo, &self.places(), faults))
            .transpose()
    }
}

/// The kernel of a name, or the fastest.
///
/// # Errors
/// [`Reason::BadOption`].
pub(crate) fn kernel(name: Option<&str>) -> Result<&'static Kernel> {
    match name {
        None => Ok(Kernel::best()),
        Some(name) => Kernel::named(name).ok_or_else(|| {
            let problem = "this machine has no such kernel".to_owned();
            Error::new(Reason::BadOption {
                text: name.to_owned(),
                problem,
            })
        }),
    }
}

fn open_base(options: &Options) -> Result<Checkpoint> {
    let base = Checkpoint::open_variant(&options.base, &options.variant);
    let is_adapter = |path: &Path| Found::open(path).is_ok_and(|found| found.format().is_some());
    let looks_wrong = match &base {
        Ok(base) => holds_an_adapter(base) || !base.is_folder && is_adapter(&options.base),
        Err(error) => matches!(error.reason(), Reason::BaseIsAdapter),
    };
    if !looks_wrong {
        return base;
    }
    let swapped = options
        .adapters
        .iter()
        .any(|adapter| is_checkpoint(&adapter.path) && !is_adapter(&adapter.path));
    let reason = if swapped {
        Reason::SwappedArguments
    } else {
        Reason::BaseIsAdapter
    };
    Err(Error::new(reason).in_file(&options.base))
}

fn is_checkpoint(path: &Path) -> bool {
    let opened = Checkpoint::open_variant(path, &Variant::Any);
    opened.is_ok_and(|checkpoint| !holds_an_adapter(&checkpoint))
}

/// Whether what is called as weights of a model are is an adapter: `pytorch_model.lora.bin`.
pub(crate) fn holds_an_adapter(checkpoint: &Checkpoint) -> bool {
    match checkpoint.shards.as_slice() {
        [only] => Found::open(only.file.input.path()).is_ok_and(Found::spells_an_adapter),
        _ => false,
    }
}

/// Opens the adapters of a merge.
///
/// # Errors
/// What is no adapter, and what reading gives.
pub(crate) fn open_adapters(adapters: &[Selection], read: &ReadOptions) -> Result<Vec<Opened>> {
    if adapters.is_empty() {
        return Err(Error::new(Reason::NoAdapter));
    }
    let mut opened = Vec::new();
    for selection in adapters {
        if !selection.strength.is_finite() {
            return Err(Error::new(Reason::StrengthNotFinite {
                strength: selection.strength,
            }));
        }
        let found = match Found::open(&selection.path) {
            Err(error)
                if matches!(error.reason(), Reason::NoAdapterWeights)
                    && is_checkpoint(&selection.path) =>
            {
                return Err(Error::new(Reason::NotAnAdapter).in_file(&selection.path));
            }
            found => found?,
        };
        found.file.refuse_blocks()?;
        let adapter = found.read(read)?;
        found.file.verify()?;
        let format = found.format().expect("it was read by a format");
        let mut strength_for = Vec::new();
        for (pattern, strength) in &selection.strength_for {
            if !strength.is_finite() {
                return Err(Error::new(Reason::StrengthNotFinite {
                    strength: *strength,
                }));
            }
            strength_for.push((Pattern::search(pattern)?, *strength));
        }
        opened.push(Opened {
            found,
            format,
            adapter,
            strength: selection.strength,
            strength_for,
            of_modules: None,
        });
    }
    Ok(opened)
}

fn output_shape(base: &Checkpoint, output: &Path) -> Result<Shape> {
    /// How files of tensors are called: hardly the name of a folder.
    const FILES: &[&str] = &["safetensors", "gguf", "bin", "pt", "pth", "ckpt"];
    let written = base.writer().extension();
    match output.extension().and_then(|extension| extension.to_str()) {
        _ if base.is_folder => Ok(Shape::Folder),
        Some(extension) if extension == written => Ok(Shape::File),
        Some(extension) if FILES.contains(&extension) => {
            let problem = format!(
                "the result is a {} file: let its name end in .{written}, or name a folder",
                base.writer().name()
            );
            let text = output.to_string_lossy().into_owned();
            Err(Error::new(Reason::BadOption { text, problem }))
        }
        _ => Ok(Shape::Folder),
    }
}

impl Opened {
    /// The strength of a module of a number and a path.
    pub(super) fn strength_of_module(&self, number: usize, path: &str) -> Result<f64> {
        match &self.of_modules {
            Some(strengths) => Ok(strengths.get(number).copied().unwrap_or(1.0)),
            None => self.strength_of(path),
        }
    }

    /// Whether all modules have one strength.
    pub(crate) fn is_uniform(&self) -> bool {
        self.strength_for.is_empty()
    }

    /// The strength of what has a path.
    pub(crate) fn strength_of(&self, path: &str) -> Result<f64> {
        for (pattern, strength) in &self.strength_for {
            if pattern.matches(path)? {
                return Ok(*strength);
            }
        }
        Ok(self.strength)
    }
}

/// Fields of a configuration that name the type of the weights.
const TYPES: [&str; 2] = ["torch_dtype", "dtype"];

/// Gives every tensor its type in the output, and lets the configuration follow.
fn convert(options: &Options, tensors: &mut [PlannedTensor], edits: &mut Vec<Edit>) -> Result<()> {
    for tensor in tensors.iter_mut() {
        let own = tensor.dtype;
        tensor.dtype = match options.dtype {
            None => own,
            Some(wanted) if Float::of(own).is_some() => wanted.dtype(),
            Some(_) if is_floating(own) => {
                return Err(tensor.source.error(Reason::ConvertType {
                    dtype: own.to_string(),
                }));
            }
            Some(_) => own,
        };
        let convertible = tensor.dtype == tensor.source.dtype
            || Float::of(tensor.dtype).is_some() && Float::of(tensor.source.dtype).is_some();
        if !convertible {
            let reason = Reason::ConvertType {
                dtype: tensor.source.dtype.to_string(),
            };
            return Err(tensor.source.error(reason));
        }
    }
    if let Some(wanted) = options.dtype {
        for field in TYPES {
            edits.push(Edit {
                field,
                value: format!("\"{}\"", wanted.torch_name()),
                insert: false,
            });
        }
    }
    Ok(())
}

/// Looks at the values of the adapters: what is not finite stops, what is all zero is odd.
///
/// # Errors
/// [`Reason::FactorNotFinite`], unless that is allowed.
pub(crate) fn look(adapters: &[Opened], allow_nonfinite: bool) -> Result<Vec<Notice>> {
    let mut notices = Vec::new();
    for opened in adapters {
        let tensors: Vec<&Tensor> = opened.adapter.tensors().collect();
        let scans = Scan::all(&tensors)?;
        for (tensor, scan) in tensors.iter().zip(&scans) {
            if scan.not_finite > 0 && !allow_nonfinite {
                return Err(tensor
                    .error(Reason::FactorNotFinite {
                        count: scan.not_finite,
                    })
                    .with_hint("training diverged; --allow-nonfinite merges it anyway"));
            }
        }
        notices.extend(scan::notices(&opened.adapter, &tensors, &scans));
    }
    Ok(notices)
}

/// The changes that the copied configurations really get.
fn applied(
    base: &Checkpoint,
    shape: Shape,
    edits: Vec<Edit>,
    notices: &mut Vec<Notice>,
) -> Result<Vec<Edit>> {
    let copied = base.is_folder && shape == Shape::Folder;
    // Of a pipeline every component has its own: only types change there alike.
    let is_written =
        |edit: &Edit| copied && (base.config().is_some() || TYPES.contains(&edit.field));
    let (kept, told): (Vec<Edit>, Vec<Edit>) = edits.into_iter().partition(is_written);
    let mut texts = Vec::new();
    for (_, config) in base.configs().filter(|_| copied) {
        texts.push((config.input.path(), config.input.read_all(64 << 20)?));
    }
    let mut changes = Vec::new();
    for edit in kept {
        let mut changed = false;
        for (path, text) in &texts {
            let new = config::edit(text, std::slice::from_ref(&edit));
            changed |= new.map_err(|e| e.in_file(path))? != *text;
        }
        if changed {
            changes.push(edit);
        }
    }
    for edit in told
        .iter()
        .filter(|edit| edit.insert || edit.field == "vocab_size")
    {
        let text = format!(
            "no config.json is written that gets it; set {} to {} in yours",
            edit.field, edit.value
        );
        notices.push(Notice::new(NoticeKind::Untied, text).on(edit.field));
    }
    Ok(changes)
}

fn own_tokenizers(adapters: &[Opened], notices: &mut Vec<Notice>) {
    for opened in adapters.iter().filter(|opened| opened.found.path.is_dir()) {
        if has_tokenizer(&opened.found.path) {
            let text =
                "the adapter brings its own tokenizer; the base's was copied, so compare the two";
            notices.push(
                Notice::new(NoticeKind::OwnTokenizer, text)
                    .in_file(PathBuf::from(&opened.found.path)),
            );
        }
    }
}
