//! Everything is opened, resolved and checked before the first byte is written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::place::{Area, on_weight};
use super::{Options, embeddings, layout};
use crate::adapter::{
    Adapter, BiasUse, Geometry, Module, Order, Orientation, Part, Replacement, ReplacementKind,
};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::companions::{Companions, companions, has_tokenizer};
use crate::checkpoint::config::{self, Edit};
use crate::checkpoint::sink::{Destination, Faults, Shape};
use crate::error::{Error, Reason, Result};
use crate::formats::{Format, Found};
use crate::json::Value;
use crate::linalg::Kernel;
use crate::naming::{Resolution, Resolver, Rows};
use crate::notice::{Notice, NoticeKind};
use crate::pattern::Pattern;
use crate::printable::acts_on_a_terminal;
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
}

/// An adapter that was opened and read.
pub(super) struct Opened {
    pub(super) found: Found,
    pub(super) format: &'static dyn Format,
    pub(super) adapter: Adapter,
    pub(super) strength: f64,
    pub(super) strength_for: Vec<(Pattern, f64)>,
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
}

impl PlannedTensor {
    pub(super) fn of(tensor: &Tensor, name: String, shard: usize) -> Self {
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
        // A vector is one row: a bias has outputs along its columns, and is merged as such.
        match (self.modules.first(), self.shape.as_slice()) {
            (Some(module), _) if module.geometry.columns > 0 => {
                (elements / module.geometry.columns, module.geometry.columns)
            }
            (_, [_]) | (_, []) => (1, elements),
            (_, [outer, ..]) => (*outer, elements.checked_div(*outer).unwrap_or(0)),
        }
    }
}

/// What has no place in the base.
#[derive(Default)]
struct Missing {
    unresolved: Vec<String>,
    ambiguous: Vec<String>,
    names: Vec<String>,
}

pub(super) fn plan(options: &Options) -> Result<Plan> {
    let kernel = kernel(options)?;
    let base = open_base(options)?;
    let adapters = open_adapters(options)?;
    let Resolved {
        tensors,
        edits,
        mut notices,
        left_out,
    } = resolve(options, &base, &adapters)?;
    let shape = output_shape(&base, &options.output);
    let companions = match (base.is_folder, shape) {
        (true, Shape::Folder) => companions(&base.path)?,
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
    };
    plan.destination(Faults::default())?
        .check_space(plan.disk_needed())?;
    Ok(plan)
}

/// Plans as far as an output is not needed, and returns what is odd.
pub(super) fn fits(options: &Options) -> Result<Vec<Notice>> {
    let base = open_base(options)?;
    let adapters = open_adapters(options)?;
    Ok(resolve(options, &base, &adapters)?.notices)
}

/// Every tensor of the output, with what happens to it.
struct Resolved {
    tensors: Vec<PlannedTensor>,
    edits: Vec<Edit>,
    notices: Vec<Notice>,
    left_out: Vec<String>,
}

fn resolve(options: &Options, base: &Checkpoint, adapters: &[Opened]) -> Result<Resolved> {
    if let Some(how) = base.quantisation() {
        return Err(Error::new(Reason::QuantisedBase { how }).in_file(&base.path));
    }
    let mut planner = Planner::new(options, base, adapters)?;
    planner.read_notices();
    for index in 0..adapters.len() {
        planner.replacements(index)?;
    }
    if let Some(ties) = &planner.ties {
        ties.share(&mut planner.tensors);
    }
    for index in 0..adapters.len() {
        planner.modules(index)?;
        planner.tokens(index)?;
    }
    planner.report_missing()?;
    planner.nothing_selected()?;
    let Planner {
        mut tensors,
        mut notices,
        mut edits,
        missing,
        ties,
        ..
    } = planner;
    if let Some(ties) = ties {
        embeddings::settle(ties, adapters, &mut tensors, &mut notices, &mut edits)?;
    }
    convert(options, &mut tensors, &mut edits)?;
    notices.extend(scan(options, adapters)?);
    notices.extend(base.notices.iter().cloned());
    Ok(Resolved {
        tensors,
        edits,
        notices,
        left_out: missing.names,
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
    pub fn module(&self, planned: &PlannedModule) -> &Module {
        &self.adapters[planned.adapter].adapter.modules[planned.module]
    }

    /// The output path, checked again.
    pub(super) fn destination(&self, faults: Faults) -> Result<Destination> {
        let files = self.base.inputs().map(|input| input.path());
        let folders = self.adapters.iter().flat_map(|opened| {
            let folder = opened
                .found
                .path
                .is_dir()
                .then_some(opened.found.path.as_path());
            opened
                .found
                .inputs()
                .map(|input| input.path())
                .chain(folder)
        });
        let inputs: Vec<&Path> = std::iter::once(self.base.path.as_path())
            .chain(files)
            .chain(folders)
            .collect();
        Destination::check(
            &self.options.output,
            self.shape,
            self.options.force,
            inputs,
            faults,
        )
    }
}

fn kernel(options: &Options) -> Result<&'static Kernel> {
    match &options.kernel {
        None => Ok(Kernel::best()),
        Some(name) => Kernel::named(name).ok_or_else(|| {
            let problem = "this machine has no such kernel".to_owned();
            Error::new(Reason::BadOption {
                text: name.clone(),
                problem,
            })
        }),
    }
}

fn open_base(options: &Options) -> Result<Checkpoint> {
    let base = Checkpoint::open(&options.base);
    let is_adapter = |path: &Path| Found::open(path).is_ok_and(|found| found.format().is_some());
    let looks_wrong = match &base {
        Ok(base) => !base.is_folder && is_adapter(&options.base),
        Err(error) => matches!(error.reason(), Reason::BaseIsAdapter),
    };
    if !looks_wrong {
        return base;
    }
    let swapped = options
        .adapters
        .iter()
        .any(|adapter| Checkpoint::open(&adapter.path).is_ok() && !is_adapter(&adapter.path));
    let reason = if swapped {
        Reason::SwappedArguments
    } else {
        Reason::BaseIsAdapter
    };
    Err(Error::new(reason).in_file(&options.base))
}

fn open_adapters(options: &Options) -> Result<Vec<Opened>> {
    if options.adapters.is_empty() {
        return Err(Error::new(Reason::NoAdapter));
    }
    let mut opened = Vec::new();
    for selection in &options.adapters {
        if !selection.strength.is_finite() {
            return Err(Error::new(Reason::StrengthNotFinite {
                strength: selection.strength,
            }));
        }
        let found = match Found::open(&selection.path) {
            Err(error)
                if matches!(error.reason(), Reason::NoAdapterWeights)
                    && Checkpoint::open(&selection.path).is_ok() =>
            {
                return Err(Error::new(Reason::NotAnAdapter).in_file(&selection.path));
            }
            found => found?,
        };
        let adapter = found.read(&options.read)?;
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
        });
    }
    Ok(opened)
}

fn output_shape(base: &Checkpoint, output: &Path) -> Shape {
    let named_file = output
        .extension()
        .is_some_and(|extension| extension == "safetensors");
    if !base.is_folder && named_file {
        Shape::File
    } else {
        Shape::Folder
    }
}

impl Opened {
    /// The strength of a module.
    pub(super) fn strength_of(&self, path: &str) -> Result<f64> {
        for (pattern, strength) in &self.strength_for {
            if pattern.matches(path)? {
                return Ok(*strength);
            }
        }
        Ok(self.strength)
    }
}

struct Planner<'a> {
    base: &'a Checkpoint,
    adapters: &'a [Opened],
    options: &'a Options,
    only: Vec<Pattern>,
    skip: Vec<Pattern>,
    tensors: Vec<PlannedTensor>,
    by_name: HashMap<String, usize>,
    resolver: Resolver,
    ties: Option<embeddings::Ties>,
    edits: Vec<Edit>,
    notices: Vec<Notice>,
    missing: Missing,
    selected: usize,
}

impl<'a> Planner<'a> {
    fn new(options: &'a Options, base: &'a Checkpoint, adapters: &'a [Opened]) -> Result<Self> {
        let patterns = |texts: &[String]| {
            texts
                .iter()
                .map(|text| Pattern::search(text))
                .collect::<Result<Vec<_>>>()
        };
        let mut edits = Vec::new();
        let mut tensors = replicate(base, adapters, &mut edits)?;
        let ties = embeddings::Ties::find(base, adapters, &mut tensors);
        let by_name: HashMap<String, usize> = tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.clone(), index))
            .collect();
        Ok(Planner {
            base,
            adapters,
            options,
            only: patterns(&options.only)?,
            skip: patterns(&options.skip)?,
            resolver: Resolver::new(by_name.keys().cloned()),
            tensors,
            by_name,
            ties,
            edits,
            notices: Vec::new(),
            missing: Missing::default(),
            selected: 0,
        })
    }

    fn read_notices(&mut self) {
        for opened in self.adapters {
            self.notices.extend(opened.adapter.notices.iter().cloned());
            self.notices.extend(other_base(self.base, opened));
        }
        for tensor in self.base.tensors() {
            if tensor.name.chars().any(acts_on_a_terminal) {
                let text = "the name holds characters that could act on a terminal";
                let notice = Notice::new(NoticeKind::OddName, text).on(&*tensor.name);
                self.notices.push(notice.in_file(tensor.input.path()));
            }
        }
    }

    fn is_selected(&self, path: &str) -> Result<bool> {
        let any = |patterns: &[Pattern]| -> Result<bool> {
            for pattern in patterns {
                if pattern.matches(path)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        Ok((self.only.is_empty() || any(&self.only)?) && !any(&self.skip)?)
    }

    /// Whole tensors take the place of the base's before any delta is added.
    fn replacements(&mut self, index: usize) -> Result<()> {
        let adapters = self.adapters;
        let opened = &adapters[index];
        for replacement in &opened.adapter.replacements {
            if !self.is_selected(&replacement.name)? {
                continue;
            }
            self.selected += 1;
            let (path, parameter) = replacement
                .name
                .rsplit_once('.')
                .unwrap_or(("", &replacement.name));
            let replaced = match self.resolver.resolve(path, parameter) {
                Resolution::Exact(place) | Resolution::Renamed(place) => {
                    self.replace(index, replacement, &place.tensor)?
                }
                Resolution::Ambiguous(names) => {
                    self.missing.ambiguous(&replacement.name, &names);
                    false
                }
                // Another adapter may have added the same head.
                Resolution::Unresolved if self.by_name.contains_key(&replacement.name) => {
                    self.replace(index, replacement, &replacement.name)?
                }
                Resolution::Unresolved => self.add(index, replacement),
            };
            let strength = opened.strength_of(&replacement.name)?;
            if replaced && strength != 1.0 {
                let text = format!(
                    "it replaces a whole tensor, to which the strength {strength} does not apply"
                );
                self.notices
                    .push(Notice::new(NoticeKind::StrengthIgnored, text).on(&*replacement.name));
            }
        }
        Ok(())
    }

    /// Returns whether the base's tensor had to give way.
    fn replace(&mut self, index: usize, replacement: &Replacement, name: &str) -> Result<bool> {
        let tensor = &mut self.tensors[self.by_name[name]];
        let new = &replacement.tensor;
        let fail = |reason| Err(new.error(reason));
        Float::of(new.dtype).ok_or_else(|| {
            new.error(Reason::AdapterType {
                dtype: new.dtype.to_string(),
            })
        })?;
        if let Some(first) = tensor.replaced_by {
            if tensor.source.equals(new)? {
                return Ok(true);
            }
            let path = |index: usize| {
                self.adapters[index]
                    .found
                    .path
                    .to_string_lossy()
                    .into_owned()
            };
            let (first, second) = (path(first), path(index));
            return fail(Reason::TwoReplacements { first, second });
        }
        if tensor.shape != new.shape {
            let rows_only = tensor.shape.len() == new.shape.len()
                && !tensor.shape.is_empty()
                && tensor.shape[1..] == new.shape[1..];
            if !rows_only {
                return fail(Reason::ReplacementShape {
                    adapter: new.shape.clone(),
                    base: tensor.shape.clone(),
                });
            }
            let text = format!(
                "the adapter's version has {} rows, the base's {}",
                new.dimension(0),
                tensor.shape[0]
            );
            self.notices
                .push(Notice::new(NoticeKind::RowsDiffer, text).on(name));
            let embeds = [self.base.input_embedding(), self.base.output_embedding()]
                .into_iter()
                .flatten()
                .any(|embedding| embedding.name == name);
            if embeds || self.ties.as_ref().is_some_and(|ties| ties.head == name) {
                self.edits.retain(|edit| edit.field != "vocab_size");
                self.edits.push(Edit {
                    field: "vocab_size",
                    value: new.dimension(0).to_string(),
                    insert: false,
                });
            }
        }
        // The copy below an adapter is usually the base's own tensor: then nothing is replaced.
        if replacement.kind == ReplacementKind::BaseLayer
            && tensor.shape == new.shape
            && tensor.source.dtype == new.dtype
            && tensor.source.equals(new)?
        {
            return Ok(false);
        }
        tensor.shape.clone_from(&new.shape);
        tensor.source = new.clone();
        tensor.replaced_by = Some(index);
        tensor.replaced_below = replacement.kind == ReplacementKind::BaseLayer;
        Ok(true)
    }

    /// A whole tensor that the base does not have: a head that the task added.
    fn add(&mut self, index: usize, replacement: &Replacement) -> bool {
        let announced = !self.adapters[index].adapter.notices.iter().any(|notice| {
            notice.kind == NoticeKind::Contradiction
                && notice.item.as_deref() == Some(replacement.name.as_str())
        });
        if !announced {
            self.missing.unresolved(&self.resolver, &replacement.name);
            return false;
        }
        let text = "the base does not have this tensor; it is added to the result";
        self.notices
            .push(Notice::new(NoticeKind::AddedTensor, text).on(&*replacement.name));
        let shard = self.base.shards.len() - 1;
        let mut tensor = PlannedTensor::of(&replacement.tensor, replacement.name.clone(), shard);
        tensor.in_base = false;
        tensor.replaced_by = Some(index);
        self.by_name
            .insert(replacement.name.clone(), self.tensors.len());
        self.tensors.push(tensor);
        true
    }

    fn modules(&mut self, index: usize) -> Result<()> {
        let adapters = self.adapters;
        let opened = &adapters[index];
        let mut problems = Vec::new();
        for (number, module) in opened.adapter.modules.iter().enumerate() {
            if !self.is_selected(&module.path)? {
                continue;
            }
            self.selected += 1;
            let (place, renamed) = match self.resolver.resolve(&module.path, "weight") {
                Resolution::Exact(place) => (place, false),
                Resolution::Renamed(place) => (place, true),
                Resolution::Ambiguous(names) => {
                    self.missing.ambiguous(&module.path, &names);
                    continue;
                }
                Resolution::Unresolved => {
                    self.missing.unresolved(&self.resolver, &module.path);
                    continue;
                }
            };
            if let Err(error) = self.module(index, number, &place.tensor, place.rows, renamed) {
                problems.push(error);
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        let cases = problems.iter().map(Error::to_string).collect();
        Err(problems.swap_remove(0).with_cases(cases))
    }

    fn module(
        &mut self,
        index: usize,
        number: usize,
        name: &str,
        rows: Rows,
        renamed: bool,
    ) -> Result<()> {
        let opened = &self.adapters[index];
        let module = &opened.adapter.modules[number];
        let strength = opened.strength_of(&module.path)?;
        let target = self.by_name[name];
        let shape = self.tensors[target].shape.clone();
        let area = Area::of(rows, &shape).ok_or_else(|| {
            module.error(Reason::Shape {
                adapter: "a single expert".to_owned(),
                base: format!("shape {shape:?}"),
            })
        })?;
        touchable(&self.tensors[target])?;
        let geometry = on_weight(self.base, module, name, &shape, &area)?;
        // PEFT defines neither DoRA nor IA3 there.
        if name.ends_with("in_proj_weight") && module.method.order() == Order::Sequential {
            let reason = Reason::MethodOnTarget {
                method: module.method.name(),
                what: "nn.MultiheadAttention",
            };
            return Err(module.error(reason));
        }
        let planned = PlannedModule {
            adapter: index,
            module: number,
            strength,
            rows: area.rows,
            geometry,
            renamed,
        };
        let twice = self.tensors[target].modules.iter().find(|other| {
            let rows = other.rows.start < planned.rows.end && planned.rows.start < other.rows.end;
            other.adapter == index && other.geometry.part == Part::Weight && rows
        });
        if let Some(other) = twice {
            let first = opened.adapter.modules[other.module].path.clone();
            return Err(module.error(Reason::TwoModules {
                first,
                tensor: name.to_owned(),
            }));
        }
        self.tensors[target].modules.push(planned);
        if module.method.order() == Order::Sequential && strength != 1.0 {
            let text = format!(
                "{} at strength {strength} interpolates between the base and the full result; PEFT scales inside the formula",
                module.method.name()
            );
            self.notices
                .push(Notice::new(NoticeKind::StrengthInterpolates, text).on(&*module.path));
        }
        let bias = name
            .strip_suffix("weight")
            .map(|owner| format!("{owner}bias"));
        let bias = bias.and_then(|bias| self.by_name.get(&bias).copied());
        match (module.method.bias(module), bias) {
            (BiasUse::No, _) | (BiasUse::IfPresent, None) => Ok(()),
            (BiasUse::Required, None) => Err(module.error(Reason::NoBias)),
            (BiasUse::Required, Some(_)) if name.ends_with("in_proj_weight") => {
                Err(module.error(Reason::MethodOnTarget {
                    method: "lora_bias",
                    what: "nn.MultiheadAttention",
                }))
            }
            (_, Some(bias)) => self.bias(index, number, strength, bias, renamed),
        }
    }

    fn bias(
        &mut self,
        index: usize,
        number: usize,
        strength: f64,
        target: usize,
        renamed: bool,
    ) -> Result<()> {
        let module = &self.adapters[index].adapter.modules[number];
        let tensor = &mut self.tensors[target];
        touchable(tensor)?;
        let outputs = module.method.extent(module).outputs;
        if tensor.shape.len() != 1 || outputs != Some(tensor.shape[0]) {
            let adapter = format!("a bias of {} outputs", outputs.unwrap_or(0));
            return Err(module.error(Reason::Shape {
                adapter,
                base: format!("shape {:?}", tensor.shape),
            }));
        }
        let geometry = Geometry {
            part: Part::Bias,
            rows: 1,
            columns: tensor.shape[0],
            orientation: Orientation::InputsFirst,
            kernel: 1,
        };
        tensor.modules.push(PlannedModule {
            adapter: index,
            module: number,
            strength,
            rows: 0..1,
            geometry,
            renamed,
        });
        Ok(())
    }

    /// Rows of embeddings; a shared output embedding follows (PEFT wraps both).
    fn tokens(&mut self, index: usize) -> Result<()> {
        let adapters = self.adapters;
        for tokens in &adapters[index].adapter.tokens {
            if !self.is_selected(&tokens.path)? {
                continue;
            }
            self.selected += 1;
            let name = match self.resolver.resolve(&tokens.path, "weight") {
                Resolution::Exact(place) | Resolution::Renamed(place) => place.tensor,
                Resolution::Ambiguous(names) => {
                    self.missing.ambiguous(&tokens.path, &names);
                    continue;
                }
                Resolution::Unresolved => {
                    self.missing.unresolved(&self.resolver, &tokens.path);
                    continue;
                }
            };
            let mut names = vec![name.clone()];
            if let Some(ties) = &self.ties
                && ties.embedding == name
                && !adapters[index]
                    .adapter
                    .tokens
                    .iter()
                    .any(|other| other.path.ends_with("lm_head"))
            {
                names.push(ties.head.clone());
            }
            for name in names {
                let tensor = &mut self.tensors[self.by_name[&name]];
                touchable(tensor)?;
                if tensor.shape.len() != 2 || tensor.shape[1] != tokens.rows.dimension(1) {
                    let reason = Reason::ReplacementShape {
                        adapter: tokens.rows.shape.clone(),
                        base: tensor.shape.clone(),
                    };
                    return Err(tokens.rows.error(reason));
                }
                for (from, row) in tokens.indices.iter().enumerate() {
                    if *row >= tensor.shape[0] {
                        let reason = Reason::TokenRow {
                            row: *row,
                            rows: tensor.shape[0],
                        };
                        return Err(tokens.rows.error(reason));
                    }
                    if let Some((other, other_row)) =
                        tensor.rows.insert(*row, (tokens.rows.clone(), from))
                        && !same_row(&other, other_row, &tokens.rows, from)?
                    {
                        let first = other.input.path().to_string_lossy().into_owned();
                        let second = tokens.rows.input.path().to_string_lossy().into_owned();
                        return Err(Error::new(Reason::TwoReplacements { first, second })
                            .on(format!("{name}, row {row}")));
                    }
                }
            }
            let strength = adapters[index].strength_of(&tokens.path)?;
            if strength != 1.0 {
                let text = format!(
                    "it replaces whole rows, to which the strength {strength} does not apply"
                );
                self.notices
                    .push(Notice::new(NoticeKind::StrengthIgnored, text).on(&*tokens.path));
            }
        }
        Ok(())
    }

    fn report_missing(&mut self) -> Result<()> {
        let missing = &mut self.missing;
        if !missing.ambiguous.is_empty() {
            let reason = Reason::Ambiguous {
                count: missing.ambiguous.len(),
            };
            return Err(Error::new(reason)
                .in_file(&self.base.path)
                .with_cases(std::mem::take(&mut missing.ambiguous)));
        }
        if missing.unresolved.is_empty() {
            return Ok(());
        }
        if !self.options.allow_unmatched {
            let reason = Reason::Modules {
                count: missing.unresolved.len(),
            };
            return Err(Error::new(reason)
                .in_file(&self.base.path)
                .with_cases(std::mem::take(&mut missing.unresolved))
                .with_hint(
                    "is this the base the adapter was trained on? --allow-unmatched leaves these parts out",
                ));
        }
        self.selected = self.selected.saturating_sub(missing.names.len());
        for name in &missing.names {
            let text = "it has no place in the base and was left out";
            self.notices
                .push(Notice::new(NoticeKind::LeftOut, text).on(&**name));
        }
        Ok(())
    }

    fn nothing_selected(&self) -> Result<()> {
        match self.selected {
            0 => Err(Error::new(Reason::NothingSelected).in_file(&self.adapters[0].found.path)),
            _ => Ok(()),
        }
    }
}

impl Missing {
    fn unresolved(&mut self, resolver: &Resolver, name: &str) {
        // Looking for near names costs a walk over the base, so only the first cases get it.
        let near = if self.unresolved.len() < 20 {
            resolver.nearest(name, 3)
        } else {
            Vec::new()
        };
        self.names.push(name.to_owned());
        self.unresolved.push(match near.is_empty() {
            true => name.to_owned(),
            false => format!("{name} (nearest: {})", near.join(", ")),
        });
    }

    fn ambiguous(&mut self, name: &str, names: &[String]) {
        self.ambiguous.push(format!("{name}: {}", names.join(", ")));
    }
}

fn touchable(tensor: &PlannedTensor) -> Result<()> {
    match Float::of(tensor.source.dtype) {
        Some(_) => Ok(()),
        None => {
            let reason = Reason::TensorType {
                dtype: tensor.source.dtype.to_string(),
            };
            Err(tensor.source.error(reason))
        }
    }
}

fn same_row(a: &Tensor, row_a: usize, b: &Tensor, row_b: usize) -> Result<bool> {
    let width = a.dimension(1);
    a.equals_in(row_a * width..(row_a + 1) * width, b, row_b * width)
}

/// The tensors of the output before anything is merged: the base's, its layers perhaps repeated.
///
/// PEFT lets repeated layers share their storage and then adds every replica's delta to it, which is
/// not what the trained model computes; here each replica is a layer of its own.
fn replicate(
    base: &Checkpoint,
    adapters: &[Opened],
    edits: &mut Vec<Edit>,
) -> Result<Vec<PlannedTensor>> {
    let mut tensors = Vec::new();
    let replicated: Vec<&Opened> = adapters
        .iter()
        .filter(|opened| !opened.adapter.replication.is_empty())
        .collect();
    let all = base.shards.iter().enumerate().flat_map(|(index, shard)| {
        shard
            .file
            .directory
            .tensors
            .iter()
            .map(move |tensor| (index, tensor))
    });
    let replication = match replicated.as_slice() {
        [] => {
            tensors.extend(
                all.map(|(shard, tensor)| PlannedTensor::of(tensor, tensor.name.clone(), shard)),
            );
            return Ok(tensors);
        }
        [only] if adapters.len() == 1 => only,
        [first, ..] => {
            return Err(Error::new(Reason::ReplicationTwice).in_file(&first.found.path));
        }
    };
    let fail = |reason| {
        Error::new(reason)
            .in_file(&replication.found.path)
            .on("layer_replication")
    };
    let prefix = layer_prefix(base).map_err(fail)?;
    let layer_of = |name: &str| {
        let rest = name.strip_prefix(&prefix)?;
        let (number, rest) = rest.split_once('.')?;
        Some((number.parse::<usize>().ok()?, rest.to_owned()))
    };
    let layers = base
        .tensors()
        .filter_map(|tensor| layer_of(&tensor.name))
        .map(|(n, _)| n + 1)
        .max()
        .unwrap_or(0);
    let mut sources = Vec::new();
    for (first, end) in &replication.adapter.replication {
        if *end > layers {
            return Err(fail(Reason::ReplicationRange {
                first: *first,
                last: *end,
                layers,
            }));
        }
        sources.extend(*first..*end);
        if sources.len() > 10_000 {
            return Err(fail(Reason::TooMany {
                what: "layers",
                limit: 10_000,
            }));
        }
    }
    for (shard, tensor) in all {
        match layer_of(&tensor.name) {
            None => tensors.push(PlannedTensor::of(tensor, tensor.name.clone(), shard)),
            Some((layer, rest)) => {
                for (new, _) in sources
                    .iter()
                    .enumerate()
                    .filter(|(_, source)| **source == layer)
                {
                    tensors.push(PlannedTensor::of(
                        tensor,
                        format!("{prefix}{new}.{rest}"),
                        shard,
                    ));
                }
            }
        }
    }
    for field in ["num_hidden_layers", "n_layer", "num_layers"] {
        edits.push(Edit {
            field,
            value: sources.len().to_string(),
            insert: false,
        });
    }
    edits.extend(
        PER_LAYER
            .iter()
            .filter_map(|field| repeated(base, field, layers, &sources)),
    );
    Ok(tensors)
}

/// Lists in `config.json` with one entry per layer; transformers refuses them if their length is not
/// the number of layers.
const PER_LAYER: &[&str] = &["layer_types", "mlp_layer_types", "no_rope_layers"];

/// The list of a configuration, repeated as the layers are.
fn repeated(
    base: &Checkpoint,
    field: &'static str,
    layers: usize,
    sources: &[usize],
) -> Option<Edit> {
    let Some(Value::Array(values)) = base.configured(field) else {
        return None;
    };
    if values.len() != layers {
        return None;
    }
    let texts: Option<Vec<String>> = sources
        .iter()
        .map(|layer| match &values[*layer] {
            Value::String(text) => Some(serde_json::Value::from(text.as_str()).to_string()),
            value @ (Value::Integer(_) | Value::Bool(_)) => Some(value.to_string()),
            _ => None,
        })
        .collect();
    Some(Edit {
        field,
        value: format!("[{}]", texts?.join(", ")),
        insert: false,
    })
}

/// The one list of layers of a model: what comes before the number.
fn layer_prefix(base: &Checkpoint) -> Result<String, Reason> {
    let mut prefixes: Vec<&str> = base
        .tensors()
        .filter_map(|tensor| {
            // The lists that PEFT's `replicate_layers` knows.
            ["layers.", "encoder.layer.", "h."].iter().find_map(|list| {
                let at = tensor.name.find(list)?;
                let whole = at == 0 || tensor.name.as_bytes()[at - 1] == b'.';
                let rest = &tensor.name[at + list.len()..];
                let numbered = rest
                    .split('.')
                    .next()
                    .is_some_and(|number| number.parse::<usize>().is_ok());
                (whole && numbered).then(|| &tensor.name[..at + list.len()])
            })
        })
        .collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    match prefixes.as_slice() {
        [only] => Ok((*only).to_owned()),
        _ => Err(Reason::FieldValue {
            problem: format!(
                "the base has {} lists of layers, one is needed",
                prefixes.len()
            ),
        }),
    }
}

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
        for field in ["torch_dtype", "dtype"] {
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
fn scan(options: &Options, adapters: &[Opened]) -> Result<Vec<Notice>> {
    let mut notices = Vec::new();
    for opened in adapters {
        let tensors: Vec<&Tensor> = opened.adapter.tensors().collect();
        let scans: Vec<Scan> = tensors
            .par_iter()
            .map(|tensor| Scan::of(tensor))
            .collect::<Result<_>>()?;
        for (tensor, scan) in tensors.iter().zip(&scans) {
            if scan.not_finite > 0 && !options.allow_nonfinite {
                return Err(tensor
                    .error(Reason::FactorNotFinite {
                        count: scan.not_finite,
                    })
                    .with_hint("training diverged; --allow-nonfinite merges it anyway"));
            }
        }
        notices.extend(scan_notices(&opened.adapter, &tensors, &scans));
    }
    Ok(notices)
}

/// What the values of a tensor are like.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::ops) struct Scan {
    pub(in crate::ops) not_finite: u64,
    pub(in crate::ops) all_zero: bool,
}

impl Scan {
    pub(in crate::ops) fn of(tensor: &Tensor) -> Result<Self> {
        let mut scan = Scan {
            not_finite: 0,
            all_zero: tensor.elements() > 0,
        };
        let Some(float) = Float::of(tensor.dtype) else {
            return Ok(Scan::default());
        };
        const PIECE: usize = 1 << 16;
        let mut values = Vec::new();
        for first in (0..tensor.elements()).step_by(PIECE) {
            let count = PIECE.min(tensor.elements() - first);
            values.resize(count, 0.0);
            let bytes = tensor.bytes_of(first * float.size(), count * float.size())?;
            crate::tensor::widen(float, &bytes, &mut values);
            scan.not_finite += values.iter().filter(|value| !value.is_finite()).count() as u64;
            scan.all_zero &= values.iter().all(|value| *value == 0.0);
        }
        Ok(scan)
    }
}

/// The notices that values give rise to.
pub(in crate::ops) fn scan_notices(
    adapter: &Adapter,
    tensors: &[&Tensor],
    scans: &[Scan],
) -> Vec<Notice> {
    let mut notices = Vec::new();
    let factors: HashSet<&str> = adapter
        .modules
        .iter()
        .flat_map(|module| {
            module
                .parameters
                .iter()
                .map(|(_, tensor)| tensor.name.as_str())
        })
        .collect();
    for (tensor, scan) in tensors.iter().zip(scans) {
        let notice = |kind, text: String| {
            Notice::new(kind, text)
                .on(&*tensor.name)
                .in_file(tensor.input.path())
        };
        if scan.all_zero && factors.contains(tensor.name.as_str()) {
            notices.push(notice(
                NoticeKind::AllZero,
                "every value is zero".to_owned(),
            ));
        }
        if scan.not_finite > 0 {
            notices.push(notice(
                NoticeKind::NotFinite,
                format!("{} values are NaN or infinite", scan.not_finite),
            ));
        }
    }
    notices
}

/// A notice if the adapter names a base that nothing about this base agrees with.
pub(in crate::ops) fn other_base_of(base: &Checkpoint, adapter: &Adapter) -> Option<Notice> {
    let named = adapter.facts.base.as_deref()?;
    let leaf = |text: &str| {
        text.trim_end_matches(['/', '\\'])
            .rsplit(['/', '\\'])
            .next()
            .unwrap_or("")
            .to_lowercase()
    };
    let wanted = leaf(named);
    let mut candidates: Vec<String> = Vec::new();
    if let Some(Ok(path)) = Some(base.path.canonicalize()) {
        // A hub cache: models--owner--name/snapshots/<commit>.
        let parts = path.iter().map(|part| part.to_string_lossy().into_owned());
        candidates.extend(parts.map(|part| part.rsplit("--").next().unwrap_or("").to_lowercase()));
    }
    candidates.extend(
        base.configured("_name_or_path")
            .and_then(Value::as_str)
            .map(leaf),
    );
    let known = candidates.iter().any(|candidate| {
        *candidate == wanted || candidate.strip_suffix(".safetensors") == Some(&wanted)
    });
    (!known).then(|| {
        let here = base.path.to_string_lossy();
        Notice::new(
            NoticeKind::OtherBase,
            format!(
                "the adapter names the base `{named}`; nothing says that `{here}` is that model"
            ),
        )
    })
}

fn other_base(base: &Checkpoint, opened: &Opened) -> Option<Notice> {
    other_base_of(base, &opened.adapter).map(|notice| notice.in_file(&opened.found.path))
}

/// The changes that the copied configuration really gets.
fn applied(
    base: &Checkpoint,
    shape: Shape,
    edits: Vec<Edit>,
    notices: &mut Vec<Notice>,
) -> Result<Vec<Edit>> {
    if let Some(config) = base
        .config
        .as_ref()
        .filter(|_| base.is_folder && shape == Shape::Folder)
    {
        let text = config.input.read_all(64 << 20)?;
        let changes =
            |edit: &Edit| config::edit(&text, std::slice::from_ref(edit)).map(|new| new != text);
        let mut kept = Vec::new();
        for edit in edits {
            if changes(&edit).map_err(|e| e.in_file(config.input.path()))? {
                kept.push(edit);
            }
        }
        return Ok(kept);
    }
    for edit in edits
        .iter()
        .filter(|edit| edit.insert || edit.field == "vocab_size")
    {
        let text = format!(
            "no config.json is written beside the result; set {} to {} in yours",
            edit.field, edit.value
        );
        notices.push(Notice::new(NoticeKind::Untied, text).on(edit.field));
    }
    Ok(Vec::new())
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
