//! Adapters side by side: their modules under the names of one layout, layer by layer.

use std::collections::BTreeSet;

use indexmap::IndexMap;

use super::Options;
use super::whole::{self, Whole};
use crate::adapter::{Adapter, Facts, Module};
use crate::error::{Error, Reason, Result};
use crate::formats::{Format, Named};
use crate::notice::{Notice, NoticeKind};
use crate::ops::merge::Opened;
use crate::ops::outgoing::{Base, Known, Wish, family, is_denoiser, known};
use crate::pattern::Choice;

/// What one adapter does to a layer.
pub(super) struct Part {
    /// Index of the adapter.
    pub(super) adapter: usize,
    pub(super) module: Module,
    pub(super) strength: f64,
}

/// A layer that some adapters change.
pub(super) struct Layer {
    /// Its name in the layout of the target, with the first module on it.
    pub(super) named: Named,
    pub(super) parts: Vec<Part>,
    /// The sum of the magnitudes of the strengths of all adapters there.
    pub(super) whole: f64,
}

impl Layer {
    /// The part of the pipeline, if any, and the path.
    pub(super) fn name(&self) -> String {
        name(&self.named)
    }
}

fn name(named: &Named) -> String {
    match named.component {
        Some(component) => format!("{}.{}", component.name, named.path),
        None => named.path.clone(),
    }
}

/// Adapters that were joined.
pub(super) struct Joined {
    pub(super) layers: Vec<Layer>,
    /// What is known of the names; the modules are those of the layers.
    pub(super) known: Known,
    /// Everything but modules.
    pub(super) rest: Adapter,
    pub(super) metadata: Vec<(String, String)>,
    /// Names of tensors of which the average was taken.
    pub(super) averaged: Vec<String>,
}

/// Joins adapters under the names that a format wants.
///
/// # Errors
/// Names that are not unambiguous, adapters of different models, parts that do not go together: all listed.
pub(super) fn joined(
    options: &Options,
    opened: &mut [Opened],
    target: &'static dyn Format,
    base: Option<&Base>,
) -> Result<Joined> {
    let choice = Choice::new(&options.conversion.only, &options.conversion.skip)?;
    for own in opened.iter_mut() {
        let mut kept = Vec::new();
        for module in std::mem::take(&mut own.adapter.modules) {
            if choice.keeps(&module.path)? {
                kept.push(module);
            }
        }
        own.adapter.modules = kept;
    }
    let whole = whole::together(opened, &choice, options.average_full)?;
    if opened.iter().all(|own| own.adapter.modules.is_empty())
        && whole.replacements.is_empty()
        && whole.tokens.is_empty()
    {
        return Err(Error::new(Reason::NothingSelected));
    }
    let families = families(options, opened, base)?;
    let mut all = Vec::new();
    for (own, family) in opened.iter().zip(&families) {
        all.push(names(options, own, target, base, *family)?);
    }
    let layers = layers(opened, &mut all)?;
    if !options.allow_unrelated {
        related(opened, &layers)?;
    }
    shapes(opened, &layers)?;
    let denoiser = all.iter().find_map(|known| known.denoiser);
    let attention = all.iter().map(|known| known.attention);
    let attention = attention
        .max_by_key(|heads| heads.query.is_some())
        .unwrap_or_default();
    let folded = all.into_iter().flat_map(|known| known.folded).collect();
    let averaged = whole.averaged.clone();
    Ok(Joined {
        layers,
        known: Known {
            modules: Vec::new(),
            folded,
            family: families.into_iter().flatten().next(),
            denoiser,
            attention,
        },
        metadata: common(opened.iter().map(|own| &*own.found.file.directory.metadata)),
        rest: rest(opened, whole),
        averaged,
    })
}

/// The family that each adapter is of; of those whose names fit several the one of the others.
fn families(
    options: &Options,
    opened: &[Opened],
    base: Option<&Base>,
) -> Result<Vec<Option<&'static str>>> {
    let mut all = Vec::new();
    for own in opened {
        let named = options.conversion.family.as_deref();
        all.push(family(&own.adapter, base, named).map_err(|e| e.in_file(&own.found.path))?);
    }
    let known = || all.iter().flatten().copied();
    let first = known().next();
    if known().any(|family| Some(family) != first) {
        let both = opened.iter().zip(&all);
        let case = |(own, family): (&Opened, &Option<&str>)| {
            Some(format!("{}: {}", own.found.path.display(), (*family)?))
        };
        let cases = both.filter_map(case).collect();
        return Err(Error::new(Reason::OtherModel).with_cases(cases));
    }
    for (own, family) in opened.iter().zip(&mut all) {
        if family.is_none() && is_denoiser(&own.adapter) {
            *family = first;
        }
    }
    Ok(all)
}

/// The modules of one adapter under the names of the target.
fn names(
    options: &Options,
    own: &Opened,
    target: &'static dyn Format,
    base: Option<&Base>,
    family: Option<&str>,
) -> Result<Known> {
    let conversion = &options.conversion;
    let wish = Wish {
        family,
        component: conversion.component.as_deref(),
        names: conversion.names,
        ..Wish::default()
    };
    let named = known(&own.adapter, target, base, wish);
    let named = match named {
        // One whose names say their part needs no help.
        Err(error) if matches!(error.reason(), Reason::BadOption { text, .. } if Some(&**text) == wish.component) => {
            known(
                &own.adapter,
                target,
                base,
                Wish {
                    component: None,
                    ..wish
                },
            )
        }
        named => named,
    };
    let named = named.map_err(|e| e.in_file(&own.found.path))?;
    let fused = named.modules.len() < own.adapter.modules.len();
    if fused && !own.is_uniform() {
        let text = "--strength-for".to_owned();
        let problem = "the format fuses layers that would have strengths of their own".to_owned();
        return Err(Error::new(Reason::BadOption { text, problem })
            .in_file(&own.found.path)
            .with_hint("--to names a format that keeps them apart"));
    }
    Ok(named)
}

/// What stands for a layer: its part, its path, and what else two modules on one path must have in common.
type Key = (Option<&'static str>, String, Option<&'static str>);

/// Puts the modules on one layer together.
fn layers(opened: &[Opened], all: &mut [Known]) -> Result<Vec<Layer>> {
    let mut layers: IndexMap<Key, Layer> = IndexMap::new();
    for (index, (own, known)) in opened.iter().zip(all).enumerate() {
        for named in std::mem::take(&mut known.modules) {
            let method = named.module.method;
            // What changes the bias alone stays by itself.
            let alone = (!method.weight(&named.module)).then(|| method.name());
            let component = named.component.map(|component| component.name);
            let key = (component, named.path.clone(), alone);
            let mut strength = own.strength_of(&named.module.path)?;
            if method.ignores_strength() && strength != 0.0 {
                strength = 1.0;
            }
            let mut whole = 0.0;
            for other in opened {
                whole += other.strength_of(&named.module.path)?.abs();
            }
            let part = Part {
                adapter: index,
                module: named.module.clone(),
                strength,
            };
            let layer = layers.entry(key).or_insert_with(|| Layer {
                named,
                parts: Vec::new(),
                whole,
            });
            let twice = |other: &Part| {
                other.adapter == index && other.module.method.name() == method.name()
            };
            if layer.parts.iter().any(twice) {
                let name = layer.name();
                return Err(Error::new(Reason::OutputNameTwice { name }).in_file(&own.found.path));
            }
            layer.parts.push(part);
        }
    }
    Ok(layers.into_values().collect())
}

/// Refuses adapters that nothing connects: no common layer, and not the same stack of layers either.
fn related(opened: &[Opened], layers: &[Layer]) -> Result<()> {
    let mut places: Vec<BTreeSet<String>> = vec![BTreeSet::new(); opened.len()];
    for layer in layers {
        let path = name(&layer.named);
        let stack = path
            .split('.')
            .take_while(|part| part.parse::<usize>().is_err());
        let stack = stack.collect::<Vec<_>>().join(".");
        // Parts of a pipeline belong together.
        let pipeline = layer.named.component.map(|_| "pipeline".to_owned());
        for part in &layer.parts {
            places[part.adapter].extend([path.clone(), stack.clone()]);
            places[part.adapter].extend(pipeline.clone());
        }
    }
    let some: Vec<usize> = (0..opened.len())
        .filter(|index| !places[*index].is_empty())
        .collect();
    let Some((first, others)) = some.split_first() else {
        return Ok(());
    };
    let mut known = places[*first].clone();
    let mut open: Vec<usize> = others.to_vec();
    while let Some(at) = open
        .iter()
        .position(|index| !known.is_disjoint(&places[*index]))
    {
        known.append(&mut places[open.swap_remove(at)]);
    }
    if open.is_empty() {
        return Ok(());
    }
    open.sort_unstable();
    let strangers = open
        .iter()
        .map(|index| opened[*index].found.path.display().to_string());
    let case = |path: String| {
        format!(
            "{path}: no layer in common with {}",
            opened[*first].found.path.display()
        )
    };
    Err(Error::new(Reason::OtherModel)
        .with_cases(strangers.map(case).collect())
        .with_hint("--allow-unrelated writes them into one file all the same"))
}

/// Refuses layers that adapters see with different sizes.
fn shapes(opened: &[Opened], layers: &[Layer]) -> Result<()> {
    let mut cases = Vec::new();
    for layer in layers {
        let extent = |part: &Part| part.module.method.extent(&part.module);
        let first = extent(&layer.parts[0]);
        let other = layer.parts[1..].iter().find(|part| {
            let own = extent(part);
            own.as_stored == first.as_stored
                && part.module.layer == layer.parts[0].module.layer
                && (own.outputs, own.inputs) != (first.outputs, first.inputs)
        });
        if let Some(other) = other {
            let size = |part: &Part| {
                let own = extent(part);
                let text =
                    |size: Option<usize>| size.map_or("?".to_owned(), |size| size.to_string());
                let path = opened[part.adapter].found.path.display();
                format!("{} × {} in {path}", text(own.outputs), text(own.inputs))
            };
            let (a, b) = (size(&layer.parts[0]), size(other));
            cases.push(format!("{}: {a}, {b}", layer.name()));
        }
    }
    if cases.is_empty() {
        return Ok(());
    }
    let count = cases.len();
    Err(Error::new(Reason::NotTogether { count })
        .with_cases(cases)
        .with_hint("these adapters are for models of different sizes"))
}

/// What all of several lists say alike.
fn common<'a>(mut all: impl Iterator<Item = &'a [(String, String)]>) -> Vec<(String, String)> {
    let mut common = all.next().unwrap_or(&[]).to_vec();
    for other in all {
        common.retain(|entry| other.contains(entry));
    }
    common
}

/// Everything but modules, of all adapters.
fn rest(opened: &[Opened], whole: Whole) -> Adapter {
    let first = &opened[0].adapter;
    let mut notices: Vec<Notice> = Vec::new();
    for own in opened {
        let path = &own.found.path;
        notices.extend(
            own.adapter
                .notices
                .iter()
                .map(|notice| notice.clone().in_file(path)),
        );
        if let (Some(own_base), Some(base)) = (&own.adapter.facts.base, &first.facts.base)
            && own_base != base
        {
            let text = format!("it names the base {own_base}, the first adapter {base}");
            notices.push(Notice::new(NoticeKind::OtherBase, text).in_file(path));
        }
    }
    notices.extend(whole.notices);
    let mut other = first.facts.other.clone();
    other.retain(|key, value| {
        opened
            .iter()
            .all(|own| own.adapter.facts.other.get(key) == Some(value))
    });
    Adapter {
        replacements: whole.replacements,
        tokens: whole.tokens,
        paddings: whole.paddings,
        replication: first.replication.clone(),
        tied: first.tied,
        keeps_ties: first.keeps_ties,
        attention: first.attention,
        facts: Facts {
            base: opened.iter().find_map(|own| own.adapter.facts.base.clone()),
            tool: None,
            other,
        },
        notices,
        ..Adapter::default()
    }
}
