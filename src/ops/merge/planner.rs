//! Gives every part of the adapters its place in the base: whole tensors, modules, token rows.

use std::collections::HashMap;
use std::sync::Arc;

use super::missing::Missing;
use super::padding::{not_padded, padded};
use super::place::{Area, architecture, attention, on_weight, stacks_outputs_first};
use super::plan::{Opened, PlannedModule, PlannedTensor};
use super::replication::replicate;
use super::{Options, embeddings};
use crate::adapter::{
    BiasUse, Geometry, Module, Order, Orientation, Part, Replacement, ReplacementKind,
};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::Edit;
use crate::error::{Error, Reason, Result};
use crate::json::Value;
use crate::naming::{Attention, Place, Resolution, Resolver, Rows};
use crate::notice::{Notice, NoticeKind};
use crate::pattern::Choice;
use crate::printable::acts_on_a_terminal;
use crate::tensor::{Float, Tensor};

/// Every tensor of the output, with what happens to it.
pub(super) struct Placed {
    pub(super) tensors: Vec<PlannedTensor>,
    pub(super) edits: Vec<Edit>,
    pub(super) notices: Vec<Notice>,
    pub(super) left_out: Vec<String>,
}

/// Whole tensors first, because modules add to what they leave; then modules and token rows.
///
/// # Errors
/// What has no place or does not fit, all cases listed.
pub(super) fn place(options: &Options, base: &Checkpoint, adapters: &[Opened]) -> Result<Placed> {
    let mut planner = Planner::new(options, base, adapters)?;
    planner.read_notices();
    for index in 0..adapters.len() {
        planner.replacements(index)?;
    }
    if let Some(ties) = &planner.ties {
        ties.share(&mut planner.tensors);
    }
    for index in 0..adapters.len() {
        planner.paddings(index)?;
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
    embeddings::refuse_shared(base, adapters, &tensors)?;
    if let Some(ties) = ties {
        embeddings::settle(ties, adapters, &mut tensors, &mut notices, &mut edits)?;
    }
    Ok(Placed {
        tensors,
        edits,
        notices,
        left_out: missing.names,
    })
}

struct Planner<'a> {
    base: &'a Checkpoint,
    adapters: &'a [Opened],
    options: &'a Options,
    choice: Choice,
    attention: Attention,
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
        let mut edits = Vec::new();
        let mut tensors = replicate(base, adapters, &mut edits)?;
        let ties = embeddings::Ties::find(base, adapters, &mut tensors)?;
        let by_name: HashMap<String, usize> = tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.clone(), index))
            .collect();
        Ok(Planner {
            base,
            adapters,
            options,
            choice: Choice::new(&options.only, &options.skip)?,
            attention: attention(base),
            resolver: Resolver::new(by_name.keys().cloned()).of_architecture(architecture(base)),
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

    /// Whole tensors take the place of the base's before any delta is added.
    fn replacements(&mut self, index: usize) -> Result<()> {
        let adapters = self.adapters;
        let opened = &adapters[index];
        for replacement in &opened.adapter.replacements {
            if !self.choice.keeps(&replacement.name)? {
                continue;
            }
            self.selected += 1;
            let (path, parameter) = replacement
                .name
                .rsplit_once('.')
                .unwrap_or(("", &replacement.name));
            let replaced = match self.resolver.resolve_parameter(path, parameter) {
                Resolution::Exact(places) | Resolution::Renamed(places) => {
                    self.replace(index, replacement, &places[0].tensor)?
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
        if tensor.source.blocks.is_some() {
            return touchable(tensor).map(|()| false);
        }
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
            if !rows_only || self.base.writer().fixed_because().is_some() {
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
        let home = self.base.home(&replacement.name);
        let home = home.filter(|_| self.base.writer().fixed_because().is_none());
        let Some(shard) = home else {
            self.missing.unresolved(&self.resolver, &replacement.name);
            return false;
        };
        let text = "the base does not have this tensor; it is added to the result";
        self.notices
            .push(Notice::new(NoticeKind::AddedTensor, text).on(&*replacement.name));
        let mut tensor = PlannedTensor::of(&replacement.tensor, replacement.name.clone(), shard);
        tensor.in_base = false;
        tensor.replaced_by = Some(index);
        self.by_name
            .insert(replacement.name.clone(), self.tensors.len());
        self.tensors.push(tensor);
        true
    }

    /// Weights that are widened with zeros, so that the adapter's modules fit them.
    fn paddings(&mut self, index: usize) -> Result<()> {
        let adapters = self.adapters;
        for padding in &adapters[index].adapter.paddings {
            if !self.choice.keeps(&padding.path)? {
                continue;
            }
            let places = match self.resolver.resolve(&padding.path, padding.spelling) {
                Resolution::Exact(places) | Resolution::Renamed(places) => places,
                Resolution::Ambiguous(names) => {
                    self.missing.ambiguous(&padding.path, &names);
                    continue;
                }
                // What is to be added to it is reported.
                Resolution::Unresolved => continue,
            };
            let [place] = places.as_slice() else {
                return Err(not_padded(padding, &[]));
            };
            let tensor = &mut self.tensors[self.by_name[&place.tensor]];
            if tensor.shape == padding.shape {
                continue;
            }
            self.selected += 1;
            touchable(tensor)?;
            let fixed = self.base.writer().fixed_because().is_some();
            if place.rows != Rows::Whole || fixed || !tensor.modules.is_empty() {
                return Err(not_padded(padding, &tensor.shape));
            }
            let source = padded(&tensor.source, &padding.shape);
            tensor.source = source?.ok_or_else(|| not_padded(padding, &tensor.shape))?;
            let old = std::mem::replace(&mut tensor.shape, padding.shape.clone());
            self.widened(&place.tensor, &old, &padding.shape);
        }
        Ok(())
    }

    /// Tells of a widened weight. The configuration of a denoiser states the inputs of its first layer, and perhaps by them alone
    /// its outputs (diffusers, `FluxTransformer2DModel`).
    fn widened(&mut self, name: &str, old: &[usize], new: &[usize]) {
        let text = format!("widened with zeros from shape {old:?} to {new:?}");
        self.notices
            .push(Notice::new(NoticeKind::RowsDiffer, text).on(name));
        let (Some(before), Some(after)) = (old.get(1), new.get(1)) else {
            return;
        };
        let stated = self.base.configured("in_channels");
        let is_stated =
            matches!(stated, Some(Value::Integer(n)) if usize::try_from(*n) == Ok(*before));
        if !name.ends_with("x_embedder.weight") || !is_stated {
            return;
        }
        let mut edit = |field, value: &usize| {
            self.edits.push(Edit {
                field,
                value: value.to_string(),
                insert: true,
            });
        };
        edit("in_channels", after);
        let outputs = self.base.configured("out_channels");
        if outputs.is_none_or(|outputs| matches!(outputs, Value::Null)) {
            edit("out_channels", before);
        }
    }

    fn modules(&mut self, index: usize) -> Result<()> {
        let adapters = self.adapters;
        let opened = &adapters[index];
        let mut problems = Vec::new();
        for (number, module) in opened.adapter.modules.iter().enumerate() {
            if !self.choice.keeps(&module.path)? {
                continue;
            }
            self.selected += 1;
            let (places, renamed) = match self.resolver.resolve(&module.path, module.spelling) {
                Resolution::Exact(places) => (places, false),
                Resolution::Renamed(places) => (places, true),
                Resolution::Ambiguous(names) => {
                    self.missing.ambiguous(&module.path, &names);
                    continue;
                }
                Resolution::Unresolved => {
                    self.missing.unresolved(&self.resolver, &module.path);
                    continue;
                }
            };
            for place in &places {
                if let Err(error) = self.module(index, number, place, renamed) {
                    problems.push(error);
                }
            }
        }
        Error::of_all(problems)
    }

    fn module(&mut self, index: usize, number: usize, place: &Place, renamed: bool) -> Result<()> {
        let opened = &self.adapters[index];
        let module = &opened.adapter.modules[number];
        let name = place.tensor.as_str();
        let strength = opened.strength_of_module(number, &module.path)?;
        let areas = self.areas(module, place)?;
        if !module.method.weight(module) {
            return self.bias_of(index, number, strength, place, &areas, renamed);
        }
        let tensor = &mut self.tensors[self.by_name[name]];
        touchable(tensor)?;
        for area in &areas {
            let taken = taken(module, area)?;
            let part = taken.as_deref().unwrap_or(module);
            let geometry = on_weight(self.base, part, name, &tensor.shape, area, place.rows)?;
            // PEFT defines neither DoRA nor IA3 there.
            let together = name.ends_with("in_proj_weight") && place.rows == Rows::Whole;
            if together && module.method.order() == Order::Sequential {
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
                rows: area.rows.clone(),
                geometry,
                renamed,
                outputs: area.outputs.clone(),
                taken,
            };
            let twice = tensor.modules.iter().find(|other| {
                let rows =
                    other.rows.start < planned.rows.end && planned.rows.start < other.rows.end;
                other.adapter == index && other.geometry.part == Part::Weight && rows
            });
            if let Some(other) = twice {
                let first = opened.adapter.modules[other.module].path.clone();
                return Err(module.error(Reason::TwoModules {
                    first,
                    tensor: name.to_owned(),
                }));
            }
            tensor.modules.push(planned);
        }
        self.notices.extend(not_scaled(module, strength));
        self.bias_of(index, number, strength, place, &areas, renamed)
    }

    /// The rows of a tensor that a module owns.
    fn areas(&self, module: &Module, place: &Place) -> Result<Vec<Area>> {
        let shape = &self.tensors[self.by_name[&place.tensor]].shape;
        let extent = module.method.extent(module);
        let is_expert = matches!(place.rows, Rows::Expert { .. });
        let areas = Area::all(place, shape, &extent, self.attention)
            .filter(|_| !is_expert || stacks_outputs_first(self.base, &place.tensor));
        areas.ok_or_else(|| {
            if place.rows.needs_heads() && self.attention == Attention::default() {
                let tensor = place.tensor.clone();
                return module.error(Reason::HeadsUnknown { tensor });
            }
            let adapter = match is_expert {
                true => "a single expert".to_owned(),
                false => format!(
                    "a part of the rows ({} outputs)",
                    extent.outputs.unwrap_or(0)
                ),
            };
            module.error(Reason::Shape {
                adapter,
                base: format!("shape {shape:?}"),
            })
        })
    }

    /// What a module does to the bias beside a weight.
    fn bias_of(
        &mut self,
        index: usize,
        number: usize,
        strength: f64,
        place: &Place,
        areas: &[Area],
        renamed: bool,
    ) -> Result<()> {
        let module = &self.adapters[index].adapter.modules[number];
        let name = place.tensor.as_str();
        let bias = name
            .strip_suffix("weight")
            .map(|owner| format!("{owner}bias"));
        let bias = bias.and_then(|bias| self.by_name.get(&bias).copied());
        let target = match (module.method.bias(module), bias) {
            (BiasUse::No, _) | (BiasUse::IfPresent, None) => return Ok(()),
            (BiasUse::Required, None) => return Err(module.error(Reason::NoBias)),
            (BiasUse::Required, Some(_))
                if name.ends_with("in_proj_weight") && place.rows == Rows::Whole =>
            {
                return Err(module.error(Reason::MethodOnTarget {
                    method: "lora_bias",
                    what: "nn.MultiheadAttention",
                }));
            }
            (_, Some(bias)) => bias,
        };
        let weight_rows = self.tensors[self.by_name[name]].shape.first().copied();
        let tensor = &mut self.tensors[target];
        touchable(tensor)?;
        let all = tensor.shape.first().copied().unwrap_or(0);
        for area in areas {
            let taken = taken(module, area)?;
            let part = taken.as_deref().unwrap_or(module);
            // Of a weight that is covered whole the rows may be its inputs.
            let rows = match Some(area.rows.len()) == weight_rows {
                true => 0..all,
                false => area.rows.clone(),
            };
            let fits = tensor.shape.len() == 1 && (rows.end == all || Some(all) == weight_rows);
            if !fits || part.method.extent(part).outputs != Some(rows.len()) {
                let outputs = module.method.extent(module).outputs;
                let adapter = format!("a bias of {} outputs", outputs.unwrap_or(0));
                return Err(module.error(Reason::Shape {
                    adapter,
                    base: format!("shape {:?}", tensor.shape),
                }));
            }
            let geometry = Geometry {
                part: Part::Bias,
                rows: rows.len(),
                columns: 1,
                orientation: Orientation::OutputsFirst,
                kernel: 1,
            };
            tensor.modules.push(PlannedModule {
                adapter: index,
                module: number,
                strength,
                rows,
                geometry,
                renamed,
                outputs: area.outputs.clone(),
                taken,
            });
        }
        Ok(())
    }

    /// Rows of embeddings; a shared output embedding follows (PEFT wraps both).
    fn tokens(&mut self, index: usize) -> Result<()> {
        let adapters = self.adapters;
        for tokens in &adapters[index].adapter.tokens {
            if !self.choice.keeps(&tokens.path)? {
                continue;
            }
            self.selected += 1;
            let name = match self.resolver.resolve_parameter(&tokens.path, "weight") {
                Resolution::Exact(places) | Resolution::Renamed(places) => places[0].tensor.clone(),
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
        let left_out = self
            .missing
            .report(&self.base.path, self.options.allow_unmatched)?;
        self.selected = self.selected.saturating_sub(left_out.len());
        self.notices.extend(left_out);
        Ok(())
    }

    fn nothing_selected(&self) -> Result<()> {
        match self.selected {
            0 => Err(Error::new(Reason::NothingSelected).in_file(&self.adapters[0].found.path)),
            _ => Ok(()),
        }
    }
}

/// A notice if a strength does not scale what a module does.
fn not_scaled(module: &Module, strength: f64) -> Option<Notice> {
    let (kind, text) = if strength == 1.0 {
        return None;
    } else if module.method.ignores_strength() {
        (
            NoticeKind::StrengthIgnored,
            format!("it replaces a whole weight, to which the strength {strength} does not apply"),
        )
    } else if module.method.order() == Order::Sequential {
        (
            NoticeKind::StrengthInterpolates,
            format!(
                "{} at strength {strength} interpolates between the base and the full result; PEFT scales inside the formula",
                module.method.name()
            ),
        )
    } else {
        return None;
    };
    Some(Notice::new(kind, text).on(&*module.path))
}

/// The module of the rows of an area alone, where they are not all of its outputs in order.
fn taken(module: &Module, area: &Area) -> Result<Option<Arc<Module>>> {
    let taken = area.outputs.as_deref().map(|rows| module.outputs(rows));
    Ok(taken.transpose()?.map(Arc::new))
}

fn touchable(tensor: &PlannedTensor) -> Result<()> {
    match Float::of(tensor.source.dtype) {
        Some(_) => Ok(()),
        None => {
            let reason = Reason::TensorType {
                dtype: tensor.source.type_name(),
            };
            let error = tensor.source.error(reason);
            Err(match tensor.source.blocks {
                Some(_) => {
                    error.with_hint("merge into the model in 16 bits, and quantise the result")
                }
                None => error,
            })
        }
    }
}

fn same_row(a: &Tensor, row_a: usize, b: &Tensor, row_b: usize) -> Result<bool> {
    let width = a.dimension(1);
    a.equals_in(row_a * width..(row_a + 1) * width, b, row_b * width)
}

/// A notice if the adapter names a base that nothing about this base agrees with.
fn other_base(base: &Checkpoint, opened: &Opened) -> Option<Notice> {
    let named = opened.adapter.facts.base.as_deref()?;
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
        .in_file(&opened.found.path)
    })
}
