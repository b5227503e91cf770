//! The names of the target: the hub's, or another layout's, looked up in the families or in a base.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use indexmap::IndexSet;

use super::Base;
use crate::adapter::{Adapter, Module};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Reason, Result};
use crate::formats::{Loss, Named};
use crate::naming::component::{self, Component, InPart, split};
use crate::naming::families::{FAMILIES, Family, Kind, Layout, Match, Side, find, stated};
use crate::naming::{Attention, Place, Resolution, Resolver, Rows, Spelling};
use crate::ops::merge::{architecture, attention};

/// The family of the denoiser (or of the only model): the one that is named, or the only one that knows
/// every module that any family knows. `None` where no family is needed.
///
/// # Errors
/// [`Reason::BadOption`] for a name that is none.
pub(super) fn family(
    adapter: &Adapter,
    base: Option<&Base>,
    named: Option<&str>,
) -> Result<Option<&'static str>> {
    let architecture_stated = adapter.facts.other.get("general.architecture").cloned();
    let is_known = |told: &String| {
        let of_language = |family: &&Family| family.layout.of_language_models();
        let mut families = FAMILIES.iter().filter(of_language);
        families.any(|family| family.name == *told)
    };
    // llama.cpp has more models under one architecture than `architecture` knows; the adapter says it.
    let told = base
        .and_then(|base| architecture(&base.checkpoint))
        .filter(is_known);
    let told = told.or(architecture_stated.filter(is_known));
    if let Some(named) = named.or(told.as_deref()) {
        let found = Family::named(named);
        return found.map(|family| Some(family.name)).ok_or_else(|| {
            let all: IndexSet<&str> = FAMILIES.iter().map(|family| family.name).collect();
            let all: Vec<&str> = all.into_iter().collect();
            Error::new(Reason::BadOption {
                text: named.to_owned(),
                problem: format!("no such family; there are {}", all.join(", ")),
            })
        });
    }
    let mut counts: HashMap<&'static str, usize> = HashMap::new();
    let mut known = 0;
    for module in &adapter.modules {
        let parts = parts_of(module);
        if parts.component.is_some_and(|component| component.is_text) {
            continue;
        }
        let mut names: Vec<&str> = matches(module)
            .into_iter()
            .filter(|found| found.family.denoiser().is_some())
            .map(|found| found.family.name)
            .collect();
        names.sort_unstable();
        names.dedup();
        known += usize::from(!names.is_empty());
        for name in names {
            *counts.entry(name).or_default() += 1;
        }
    }
    let mut all: Vec<&'static str> = counts
        .into_iter()
        .filter(|(_, count)| *count == known && known > 0)
        .map(|(name, _)| name)
        .collect();
    if let Some(base) = base.filter(|_| !all.is_empty()) {
        let of_base = denoisers_of(&base.checkpoint);
        let has = |name: &str| of_base.get(name).copied().unwrap_or(0);
        // The base has names of one of them.
        let best = all.iter().map(|name| has(name)).max();
        if best == Some(0)
            && let Some((of_base, _)) = of_base.iter().max_by_key(|(_, count)| **count)
        {
            return Err(Error::new(Reason::BadOption {
                text: "--base".to_owned(),
                problem: format!(
                    "the base is of {of_base}, and the adapter's names are of {}",
                    all.join(" or ")
                ),
            }));
        }
        all.retain(|name| Some(has(name)) == best);
    }
    if all.len() > 1 {
        // Statements decide among families whose names fit alone: some tools state a wrong one.
        let told = STATEMENTS.iter().find_map(|key| {
            let told = stated(adapter.facts.other.get(*key)?)?;
            all.contains(&told).then_some(told)
        });
        all.retain(|name| told.is_none_or(|told| told == *name));
    }
    Ok(match all.as_slice() {
        [only] => Some(only),
        _ => None,
    })
}

/// The families of denoisers that know names of a base, and how many.
fn denoisers_of(base: &Checkpoint) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for tensor in base.tensors() {
        let path = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let found = find(split(path, false).path, false);
        let names: BTreeSet<&str> = found
            .iter()
            .filter(|found| found.family.denoiser().is_some())
            .map(|found| found.family.name)
            .collect();
        for name in names {
            *counts.entry(name).or_default() += 1;
        }
    }
    counts
}

/// The metadata that state the base, as sd-scripts writes them.
const STATEMENTS: &[&str] = &["ss_base_model_version", "modelspec.architecture"];

/// What diffusers calls the denoiser: its family says it, or all families that know one of its modules agree.
pub(super) fn denoiser(adapter: &Adapter, family: Option<&str>) -> Option<&'static str> {
    if let Some(family) = family {
        return Some(Family::named(family)?.denoiser()?.part);
    }
    let mut agreed: Option<BTreeSet<&str>> = None;
    for module in &adapter.modules {
        let parts = parts_of(module);
        if parts.component.is_some_and(|component| component.is_text) {
            continue;
        }
        let found: BTreeSet<&str> = matches(module)
            .iter()
            .filter_map(|found| Some(found.family.denoiser()?.part))
            .collect();
        if !found.is_empty() {
            agreed = Some(agreed.map_or(found.clone(), |agreed| &agreed & &found));
        }
    }
    let agreed = agreed.into_iter().flatten().collect::<Vec<_>>();
    match agreed.as_slice() {
        [only] => Some(only),
        _ => None,
    }
}

/// The part that bare names are of, and what stands before them: what the caller says, or the denoiser.
///
/// # Errors
/// [`Reason::BadOption`] for a name that is none, and where no name is bare.
pub(super) fn part(
    adapter: &Adapter,
    stated: Option<&str>,
    denoiser: Option<&'static str>,
) -> Result<Option<(&'static Component, &'static str)>> {
    let Some(stated) = stated else {
        return Ok(denoiser.and_then(|part| component::named(part.trim_end_matches('.'))));
    };
    let bad = |problem: String| {
        let text = stated.to_owned();
        Error::new(Reason::BadOption { text, problem })
    };
    let part = component::named(stated).ok_or_else(|| {
        let all = component::COMPONENTS.iter().flat_map(|part| part.dotted);
        let all: Vec<&str> = all.map(|prefix| prefix.trim_end_matches('.')).collect();
        bad(format!("no such part; there are {}", all.join(", ")))
    })?;
    let mut modules = adapter.modules.iter();
    let is_bare = |module: &Module| parts_of(module).component.is_none();
    match modules.any(is_bare) {
        true => Ok(Some(part)),
        false => Err(bad("every name says its part already".to_owned())),
    }
}

/// The rows that count where a layer goes from one layout into another: models of llama.cpp have the same
/// names and differ in them.
fn moved(layout: Option<Layout>, found: &Match) -> Vec<Rows> {
    match (layout, found.side) {
        (None, Side::Other) => found.siblings().iter().map(|part| part.row.rows).collect(),
        (Some(_), Side::Hub) => vec![found.row.rows],
        (None, Side::Hub) | (Some(_), Side::Other) => Vec::new(),
    }
}

/// The part that a path names. What looks like one may be a model's own name (`transformer.h.0` of GPT-2): in the paths
/// of whole models it is one where a family of a pipeline knows the rest.
fn parts_of(module: &Module) -> InPart<'_> {
    let parts = split(&module.path, module.spelling == Spelling::Flattened);
    let of_pipeline = |found: &Match| found.family.layout == Layout::Original;
    let own = module.spelling == Spelling::Dotted
        && parts.component.is_some()
        && !find(parts.path, false).iter().any(of_pipeline);
    match own {
        true => InPart::bare(&module.path),
        false => parts,
    }
}

fn matches(module: &Module) -> Vec<Match> {
    let flattened = module.spelling == Spelling::Flattened;
    let parts = parts_of(module);
    let mut found = Vec::new();
    for path in parts.spellings(flattened) {
        found.extend(find(&path, flattened));
    }
    found
}

/// The modules under the flattened names that they have; bare ones are of the `part`.
pub(super) fn own(adapter: &Adapter, part: Option<(&'static Component, &'static str)>) -> Renamed {
    let named = |module: &Module| {
        let parts = parts_of(module);
        Named {
            component: parts.component.or(part.map(|(component, _)| component)),
            prefix: parts.prefix.to_owned(),
            path: parts.path.to_owned(),
            module: module.clone(),
        }
    };
    Renamed {
        modules: adapter.modules.iter().map(named).collect(),
        folded: Vec::new(),
    }
}

/// The modules under the names of a layout (the hub's if `None`), split or fused where layers are; bare ones are
/// of the `part`.
///
/// # Errors
/// Flattened names that no family and no base tells, names that the base does not have, fused layers whose
/// parts cannot be told: all listed.
pub(super) fn renamed(
    adapter: &Adapter,
    layout: Option<Layout>,
    family: Option<&str>,
    part: Option<(&'static Component, &'static str)>,
    base: Option<&Base>,
) -> Result<Renamed> {
    let known = Known {
        from: adapter.layout,
        attention: heads(adapter, base),
        // Repeated layers have numbers beyond the base's.
        all_layers: adapter.replication.is_empty(),
        part,
    };
    // No table leads from one layout of language models to another: the hub's is between them.
    if layout.is_some() && adapter.layout.is_some_and(|own| Some(own) != layout) {
        let hub = in_layout(&adapter.modules, None, family, base, known)?;
        let modules: Vec<Module> = hub
            .modules
            .into_iter()
            .map(|named| Module {
                path: format!("{}{}", named.prefix, named.path),
                ..named.module
            })
            .collect();
        let known = Known {
            from: None,
            ..known
        };
        let mut renamed = in_layout(&modules, layout, family, base, known)?;
        renamed.folded.splice(0..0, hub.folded);
        return Ok(renamed);
    }
    in_layout(&adapter.modules, layout, family, base, known)
}

/// Modules under the names of a layout.
pub(super) struct Renamed {
    pub(super) modules: Vec<Named>,
    /// Scales that were multiplied into the factors of fused layers.
    pub(super) folded: Vec<Loss>,
}

/// The heads of the model: those of the base, or what the adapter's files tell.
pub(super) fn heads(adapter: &Adapter, base: Option<&Base>) -> Attention {
    let stated = base
        .map(|base| attention(&base.checkpoint))
        .filter(|heads| heads.query.is_some());
    stated.unwrap_or(adapter.attention)
}

/// What is known of the model besides its names.
#[derive(Clone, Copy)]
struct Known {
    /// The layout of language models that the names are of.
    from: Option<Layout>,
    attention: Attention,
    /// Whether the base has every layer that the adapter may name.
    all_layers: bool,
    /// The part of a pipeline that bare names are of.
    part: Option<(&'static Component, &'static str)>,
}

fn in_layout(
    modules: &[Module],
    layout: Option<Layout>,
    family: Option<&str>,
    base: Option<&Base>,
    known: Known,
) -> Result<Renamed> {
    let mut renaming = Renaming {
        layout,
        family,
        known,
        base,
        done: Vec::new(),
        folded: Vec::new(),
        waiting: Vec::new(),
        unknown: Vec::new(),
        ambiguous: Vec::new(),
        absent: Vec::new(),
        experts: Vec::new(),
    };
    for module in modules {
        renaming.module(module)?;
    }
    let fail = |reason, cases| Err(Error::new(reason).with_cases(cases));
    if !renaming.ambiguous.is_empty() {
        let count = renaming.ambiguous.len();
        return fail(Reason::NamesAmbiguous { count }, renaming.ambiguous);
    }
    if !renaming.unknown.is_empty() {
        let count = renaming.unknown.len();
        return fail(Reason::NamesUnknown { count }, renaming.unknown);
    }
    if !renaming.absent.is_empty() {
        let count = renaming.absent.len();
        return fail(Reason::Modules { count }, renaming.absent);
    }
    if !renaming.experts.is_empty() {
        let reason = Reason::MethodOnTarget {
            method: "LoRA of GGUF",
            what: "a mixture of experts (factors of three axes)",
        };
        return fail(reason, renaming.experts);
    }
    renaming.fuse()?;
    let mut done = renaming.done;
    done.sort_by_key(|(order, _)| *order);
    Ok(Renamed {
        modules: done.into_iter().map(|(_, named)| named).collect(),
        folded: renaming.folded,
    })
}

/// A part of a fused layer that waits for the others.
struct Waiting {
    order: usize,
    rows: Rows,
    other: String,
    siblings: Vec<Match>,
    named: Named,
}

struct Renaming<'a> {
    layout: Option<Layout>,
    family: Option<&'a str>,
    known: Known,
    base: Option<&'a Base>,
    done: Vec<(usize, Named)>,
    folded: Vec<Loss>,
    waiting: Vec<Waiting>,
    unknown: Vec<String>,
    ambiguous: Vec<String>,
    /// Modules that the base does not have.
    absent: Vec<String>,
    /// Modules of one expert, for which the target has a stack of all.
    experts: Vec<String>,
}

impl Renaming<'_> {
    fn module(&mut self, module: &Module) -> Result<()> {
        let flattened = module.spelling == Spelling::Flattened;
        let mut parts = parts_of(module);
        if let (None, Some((component, prefix))) = (parts.component, self.known.part) {
            (parts.component, parts.prefix) = (Some(component), prefix);
        }
        let named = |path: String, module: Module| Named {
            component: parts.component,
            prefix: match flattened {
                true => String::new(),
                false => parts.prefix.to_owned(),
            },
            path,
            module,
        };
        let order = self.done.len() + self.waiting.len();
        // What names it: the family's tables first, because they tell the other name as well.
        let mut found: Vec<Match> = matches(module)
            .into_iter()
            .filter(|found| self.fits(found, parts))
            .collect();
        let hub = |found: &Match| found.side == Side::Hub;
        // Text encoders have one name everywhere but in single files of latent diffusion.
        let layout = match parts.component {
            Some(component) if component.is_text => None,
            _ => self.layout,
        };
        if found.is_empty() && self.is_of_another_family(module, parts) {
            self.unknown.push(module.path.clone());
            return Ok(());
        }
        if layout.is_none() && found.iter().any(hub) {
            found.retain(hub);
        }
        let wanted = |found: &&Match| match layout {
            None => true,
            Some(layout) => found.family.layout == layout,
        };
        let mut names: Vec<(Vec<String>, Match)> = Vec::new();
        for found in found.iter().filter(wanted) {
            let all = match (layout, found.side) {
                (None, Side::Other) => {
                    let siblings = found.siblings();
                    siblings.iter().map(|part| part.name(Side::Hub)).collect()
                }
                (None, Side::Hub) => vec![found.name(Side::Hub)],
                (Some(_), _) => vec![found.name(Side::Other)],
            };
            let same = |(known, first): &(Vec<String>, Match)| {
                let rows = moved(layout, first) == moved(layout, found);
                // A layer of one name in both layouts is found on both sides.
                let one = |found: &Match| {
                    found.row.rows == Rows::Whole && found.row.hub == found.row.other
                };
                let side = first.side == found.side && rows || one(first) && one(found);
                *known == all && side
            };
            if !names.iter().any(same) {
                names.push((all, found.clone()));
            }
        }
        match names.as_slice() {
            [] => {
                let path = match (layout, flattened) {
                    // Names of another kind than the model's own are those of a table.
                    (Some(layout), _) if layout != Layout::Original => None,
                    (_, false) => Some(parts.path.to_owned()),
                    (_, true) => self.in_base(module),
                };
                match path {
                    // One that names a part of a pipeline may be of another part than the base.
                    Some(_)
                        if !flattened
                            && parts.component.is_none()
                            && self.is_absent(&module.path, module.spelling) =>
                    {
                        self.absent.push(module.path.clone());
                    }
                    Some(path) => self.done.push((order, named(path, module.clone()))),
                    None => self.unknown.push(module.path.clone()),
                }
                Ok(())
            }
            [(all, found)] => self.by_family(module, (layout, &all[0]), found, order, named),
            several => {
                let name = |(all, found): &(Vec<String>, Match)| {
                    format!("{} ({})", all.join(" + "), found.family.name)
                };
                let all: Vec<String> = several.iter().map(name).collect();
                let case = format!("{}: {}", module.path, all.join(", or "));
                self.ambiguous.push(case);
                Ok(())
            }
        }
    }

    /// Whether a layer of a denoiser is known, but not to the family that the adapter is said to be of.
    fn is_of_another_family(&self, module: &Module, parts: InPart<'_>) -> bool {
        let text = parts.component.is_some_and(|component| component.is_text);
        let of_denoiser = |found: &Match| found.family.denoiser().is_some();
        let own = self.family.and_then(Family::named);
        own.is_some_and(|own| own.denoiser().is_some())
            && !text
            && matches(module).iter().any(of_denoiser)
    }

    /// Whether a family may name a module: the one of the denoiser, or any for a text encoder.
    fn fits(&self, found: &Match, parts: InPart<'_>) -> bool {
        let text = parts.component.is_some_and(|component| component.is_text);
        // Names that only one tool has are its own in no other adapter.
        let layout = found.family.layout;
        if found.side == Side::Other
            && layout.of_language_models()
            && self.known.from != Some(layout)
        {
            return false;
        }
        match self.family {
            Some(family) if !text => {
                found.family.name == family || matches!(found.family.kind, Kind::TextEncoder)
            }
            _ => true,
        }
    }

    fn by_family(
        &mut self,
        module: &Module,
        (layout, name): (Option<Layout>, &str),
        found: &Match,
        order: usize,
        named: impl Fn(String, Module) -> Named,
    ) -> Result<()> {
        let siblings = found.siblings();
        let whole = |name: String| (order, named(name, module.clone()));
        match (layout, found.side) {
            // It has the name that is wanted.
            (None, Side::Hub) | (Some(_), Side::Other) => self.done.push(whole(name.to_owned())),
            (None, Side::Other) => {
                let absent = |part: &Match| {
                    found.family.layout.of_language_models()
                        && self.is_absent_or_fused(&part.name(Side::Hub))
                };
                if siblings.iter().any(absent) {
                    self.absent.push(module.path.clone());
                    return Ok(());
                }
                let parts = siblings.len();
                for part in siblings {
                    let taken = match part.row.rows {
                        Rows::Whole => Some(module.clone()),
                        _ if !module.is_along_outputs() => Some(module.clone()),
                        rows => {
                            let taken = module.outputs(&self.rows_of(module, rows)?)?;
                            match parts {
                                1 => Some(taken),
                                // Parts that were trained apart lie block by block in one of the whole.
                                _ => module.method.without_zeros(taken)?,
                            }
                        }
                    };
                    let name = part.name(Side::Hub);
                    self.done
                        .extend(taken.map(|module| (order, named(name, module))));
                }
            }
            (Some(_), Side::Hub) if found.row.rows == Rows::Whole => {
                self.done.push(whole(name.to_owned()));
            }
            (Some(_), Side::Hub) if matches!(found.row.rows, Rows::Expert { .. }) => {
                self.experts.push(module.path.clone());
            }
            (Some(_), Side::Hub) if siblings.len() == 1 && !module.is_along_outputs() => {
                self.done.push(whole(name.to_owned()));
            }
            (Some(_), Side::Hub) if siblings.len() == 1 => {
                let module = match module.method.extent(module).outputs {
                    Some(_) => {
                        let rows = inverse(&self.rows_of(module, found.row.rows)?);
                        module.outputs(&rows)?
                    }
                    // It changes inputs, which stay where they are.
                    None => module.clone(),
                };
                self.done.push((order, named(name.to_owned(), module)));
            }
            (Some(_), Side::Hub) => self.waiting.push(Waiting {
                order,
                rows: found.row.rows,
                other: name.to_owned(),
                siblings,
                named: named(name.to_owned(), module.clone()),
            }),
        }
        Ok(())
    }

    fn rows_of(&self, module: &Module, rows: Rows) -> Result<Vec<Range<usize>>> {
        let extent = module.method.extent(module);
        let inputs = extent.inputs.or((!rows.needs_columns()).then_some(0));
        let ranges = extent
            .outputs
            .zip(inputs)
            .and_then(|(outputs, inputs)| rows.ranges(outputs, inputs, self.known.attention));
        ranges.ok_or_else(|| {
            if rows.needs_heads() && self.known.attention == Attention::default() {
                return module.error(Reason::HeadsNeeded);
            }
            let (outputs, inputs) = (extent.outputs.unwrap_or(0), extent.inputs.unwrap_or(0));
            module.error(Reason::FactorShape {
                problem: format!(
                    "{outputs} outputs and {inputs} inputs are no fused layer of its family"
                ),
            })
        })
    }

    fn resolver(&self) -> Option<&Resolver> {
        self.base.map(|base| &base.resolver)
    }

    /// Whether the base is known and lacks a module.
    fn is_absent(&self, path: &str, spelling: Spelling) -> bool {
        let lacks = |base: &Resolver| base.resolve(path, spelling) == Resolution::Unresolved;
        self.known.all_layers && self.resolver().is_some_and(lacks)
    }

    /// Whether the base is known and lacks a layer of the hub, or has it as a part of another one.
    fn is_absent_or_fused(&self, path: &str) -> bool {
        let found = self.resolver();
        let found = found.map(|base| base.resolve(path, Spelling::Dotted));
        let fused = match &found {
            Some(Resolution::Exact(places) | Resolution::Renamed(places)) => {
                let part = |rows| matches!(rows, Rows::Stacked(_) | Rows::Block { .. });
                places
                    .iter()
                    .any(|place| !place.of_module && part(place.rows))
            }
            _ => false,
        };
        fused || self.is_absent(path, Spelling::Dotted)
    }

    /// The dotted path of a flattened one, as the base names it.
    fn in_base(&self, module: &Module) -> Option<String> {
        let resolver = self.resolver()?;
        match resolver.resolve(&module.path, module.spelling) {
            Resolution::Exact(places) if places.len() == 1 && places[0].rows == Rows::Whole => {
                let path = places[0].tensor.strip_suffix(".weight")?;
                let parts = split(&module.path, true);
                let roots = parts.roots();
                let root = roots
                    .iter()
                    .filter(|root| path.starts_with(**root))
                    .max_by_key(|root| root.len());
                Some(path[root.map_or(0, |root| root.len())..].to_owned())
            }
            _ => None,
        }
    }

    /// Puts the parts of fused layers together: block by block, or stacked where all share one down.
    fn fuse(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        let mut groups: Vec<(String, Vec<Waiting>)> = Vec::new();
        for part in waiting {
            let key = format!("{:?} {}", part.named.component.map(|c| c.name), part.other);
            match groups.iter_mut().find(|(known, _)| *known == key) {
                Some((_, group)) => group.push(part),
                None => groups.push((key, vec![part])),
            }
        }
        let mut problems = Vec::new();
        for (_, group) in groups {
            let modules = group.iter().map(|part| &part.named.module);
            self.folded
                .extend(Loss::of_scales(&group[0].other, modules));
            match self.fused(group) {
                Ok(done) => self.done.push(done),
                Err(error) => problems.push(error),
            }
        }
        Error::of_all(problems)
    }

    fn fused(&self, group: Vec<Waiting>) -> Result<(usize, Named)> {
        let first = &group[0];
        let sizes: Vec<(Rows, usize)> = group
            .iter()
            .map(|part| {
                let extent = part.named.module.method.extent(&part.named.module);
                (part.rows, extent.outputs.unwrap_or(0))
            })
            .collect();
        let inputs = first.named.module.method.extent(&first.named.module).inputs;
        let total = self.height(&first.siblings, &sizes, inputs.unwrap_or(0));
        let total = total.or_else(|| self.height_in_base(&first.other));
        let error = |problem: &str| {
            let problem = format!("{problem}: it would be a part of `{}`", first.other);
            first.named.module.error(Reason::FactorShape { problem })
        };
        let total = total.ok_or_else(|| {
            let layer = first.other.clone();
            first.named.module.error(Reason::HeightNeeded { layer })
        })?;
        let mut parts = Vec::new();
        for (part, (rows, outputs)) in group.iter().zip(&sizes) {
            let ranges = rows.ranges(total, inputs.unwrap_or(0), self.known.attention);
            let ranges = ranges.ok_or_else(|| error("its rows cannot be told"))?;
            if ranges.iter().map(Range::len).sum::<usize>() != *outputs {
                return Err(error("its outputs are not those of its part"));
            }
            parts.push((&part.named.module, ranges));
        }
        let module = first.named.module.method.fuse(&parts, total)?;
        let order = first.order;
        let named = Named {
            module,
            ..first.named.clone()
        };
        Ok((order, named))
    }

    /// The height of a fused layer in the base, where it may lie in parts.
    fn height_in_base(&self, path: &str) -> Option<usize> {
        let found = self.resolver()?.resolve(path, Spelling::InComponent);
        let (Resolution::Exact(places) | Resolution::Renamed(places)) = found else {
            return None;
        };
        let height =
            |place: &Place| Some(self.base?.checkpoint.tensor(&place.tensor)?.dimension(0));
        places.iter().map(height).sum()
    }

    /// The height of a fused layer from the parts that are there.
    fn height(&self, siblings: &[Match], sizes: &[(Rows, usize)], inputs: usize) -> Option<usize> {
        let (_, first) = sizes.first()?;
        let siblings: Vec<Rows> = siblings.iter().map(|part| part.row.rows).collect();
        let all_there = siblings
            .iter()
            .all(|rows| sizes.iter().any(|(known, _)| known == rows));
        if all_there {
            return Some(sizes.iter().map(|(_, size)| size).sum());
        }
        match siblings.first()? {
            Rows::Block { of, .. } => first.checked_mul(*of),
            Rows::Blocks { of, .. } => {
                let (Rows::Blocks { count, .. }, rows) = sizes.first()? else {
                    return None;
                };
                rows.checked_mul(*of)?.checked_div(*count)
            }
            // Blocks as tall as the layer is wide, and a rest that only the part itself tells.
            Rows::Square { .. } => {
                let rest = sizes
                    .iter()
                    .find(|(rows, _)| matches!(rows, Rows::Rest { .. }))?;
                let squares = siblings
                    .iter()
                    .filter(|rows| matches!(rows, Rows::Square { .. }));
                Some(rest.1 + squares.count() * inputs)
            }
            _ => None,
        }
    }
}

/// The permutation that undoes a list of ranges which are all rows.
fn inverse(ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut at = 0;
    let mut placed: Vec<(usize, Range<usize>)> = ranges
        .iter()
        .map(|range| {
            let here = at..at + range.len();
            at = here.end;
            (range.start, here)
        })
        .collect();
    placed.sort_by_key(|(start, _)| *start);
    placed.into_iter().map(|(_, range)| range).collect()
}
