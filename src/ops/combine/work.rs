//! The work of a combination: layer by layer, then the format writes what came of it.

use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;

use super::join::Layer;
use super::layer::{Made, Task, Way};
use super::report::{Combined, ModuleReport, Report};
use super::{Plan, Ranks};
use crate::error::{Error, Reason, Result};
use crate::formats::{Format, Loss, Named};
use crate::linalg::random::seed_of;
use crate::linalg::truncated::{Rank, Settings};
use crate::ops::budget::{Attempts, Candidate, spent, within};
use crate::ops::merge::{Control, Opened};
use crate::ops::outgoing::{Known, Outgoing, Wish, draft};
use crate::ops::spool::Spool;

/// Bytes that a combined change may take; a larger one is formed anew for every product.
const MEMORY: usize = 512 << 20;

/// Residuals are proved at most this share above the best, where not all singular values are computed.
const TOLERANCE: f64 = 1e-3;

/// Most times that ranks are chosen anew because a format takes more than its factors.
const ATTEMPTS: usize = 4;

/// Bytes of a header for each module, beside its name.
const ENTRY: usize = 250;

/// The work, with what is asked of it.
pub(super) struct Work<'a> {
    plan: &'a Plan,
    control: &'a Control<'a>,
    check: Box<dyn Fn() -> Result<()> + Sync + 'a>,
    task: Task<'a>,
    start: Instant,
}

/// A layer of the result.
struct Done {
    named: Named,
    report: ModuleReport,
}

impl<'a> Work<'a> {
    pub(super) fn new(plan: &'a Plan, control: &'a Control<'a>) -> Self {
        Work {
            plan,
            control,
            check: Box::new(|| control.check()),
            task: Task {
                way: plan.way,
                tuning: &plan.tuning,
                dtype: plan.dtype(),
                peer_rank: plan.peer_rank,
            },
            start: Instant::now(),
        }
    }

    /// Combines everything and lets the format say it.
    pub(super) fn run(self, folder: &Path) -> Result<(Outgoing, Report)> {
        let rank = match self.plan.options.ranks {
            Some(Ranks::Budget(budget)) => return self.within(budget, folder),
            Some(Ranks::Fixed(rank)) => Some(Rank::Fixed(rank)),
            Some(Ranks::Energy(share)) => Some(Rank::Energy {
                share,
                most: usize::MAX,
            }),
            None => None,
        };
        self.all(folder, |_| Choice::Rank(rank))
    }

    /// Spectra first, then ranks that a file of so many bytes holds.
    fn within(self, budget: u64, folder: &Path) -> Result<(Outgoing, Report)> {
        let layers = &self.plan.joined.layers;
        let size = self.task.dtype.size() as u64;
        let mut candidates = Vec::new();
        let mut ranked = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            (self.check)()?;
            let settings = Settings {
                tolerance: None,
                ..self.settings(layer, Rank::Fixed(self.most(layer, budget)))
            };
            if let Some((spectrum, cost)) = self.task.spectrum(layer, &settings)? {
                let squares = spectrum.iter().map(|value| value * value).collect();
                candidates.push(Candidate { squares, cost });
                ranked.push(index);
            }
        }
        let names = layers
            .iter()
            .map(|layer| (ENTRY + layer.name().len()) as u64);
        let room = budget.saturating_sub(names.sum());
        let attempts = Attempts {
            most: ATTEMPTS,
            enough: budget / 50,
        };
        let found = within(budget, room, &attempts, |room| {
            let ranks = spent(&candidates, room / size);
            let made = self.all(folder, |index| match ranked.binary_search(&index) {
                Ok(at) if ranks[at] == 0 => Choice::LeftOut,
                Ok(at) => Choice::Rank(Some(Rank::Fixed(ranks[at]))),
                Err(_) => Choice::Rank(None),
            })?;
            let bytes = made.1.bytes;
            Ok((made, bytes))
        })?;
        found.ok_or_else(|| {
            let text = budget.to_string();
            let problem = "the format needs more than this for what has no rank".to_owned();
            Error::new(Reason::BadOption { text, problem })
        })
    }

    /// The largest rank that a layer may get from a budget.
    fn most(&self, layer: &Layer, budget: u64) -> usize {
        let extents = layer
            .parts
            .iter()
            .map(|part| part.module.method.extent(&part.module));
        let sides = extents.map(|extent| extent.outputs.unwrap_or(0) + extent.inputs.unwrap_or(0));
        let cost = (sides.max().unwrap_or(1).max(1) * self.task.dtype.size()) as u64;
        usize::try_from(budget / cost).unwrap_or(usize::MAX).max(1)
    }

    fn settings(&self, layer: &Layer, rank: Rank) -> Settings<'_> {
        Settings {
            algebra: self.plan.algebra(layer).0,
            rank,
            tolerance: Some(TOLERANCE),
            exact: false,
            seed: seed_of(0, &layer.name()),
            memory: MEMORY,
            check: &*self.check,
        }
    }

    /// Combines every layer, puts the factors that were found away, and lets the format say it.
    fn all(
        &self,
        folder: &Path,
        choice: impl Fn(usize) -> Choice + Sync,
    ) -> Result<(Outgoing, Report)> {
        let layers = &self.plan.joined.layers;
        let mut spool = Spool::new(folder)?;
        let (mut done, mut left_out) = (Vec::new(), Vec::new());
        let total = layers.iter().map(size).sum();
        let mut bytes = 0;
        let indices: Vec<usize> = (0..layers.len()).collect();
        for chunk in indices.chunks(self.at_once()) {
            (self.check)()?;
            let made = chunk.par_iter().map(|index| {
                let layer = &layers[*index];
                match choice(*index) {
                    Choice::LeftOut => Ok(Err("the size leaves no rank for it")),
                    Choice::Rank(rank) => {
                        let made =
                            self.task
                                .made(layer, rank, &self.settings(layer, Rank::Fixed(1)))?;
                        Ok(made.ok_or("its strengths are 0"))
                    }
                }
            });
            let made: Vec<_> = made.collect::<Result<_>>()?;
            for (index, made) in chunk.iter().zip(made) {
                let layer = &layers[*index];
                match made {
                    Ok(made) => done.push(self.kept(layer, made, &mut spool)?),
                    Err(why) => left_out.push(Loss {
                        item: layer.name(),
                        text: why.to_owned(),
                    }),
                }
            }
            let chunk = chunk.iter().map(|index| size(&layers[*index]));
            bytes += chunk.sum::<u64>();
            self.control.progress(bytes, total);
        }
        self.written(done, left_out)
    }

    /// Layers at once: sums and factors are small, changes are not. On a device it is one, because what it has room for,
    /// and with it every bit, is to depend on the layer alone.
    fn at_once(&self) -> usize {
        let mut layers = self.plan.joined.layers.iter();
        match self.plan.way {
            Way::Recipe(recipe)
                if recipe.on_changes.is_none()
                    && !layers.any(|layer| self.plan.algebra(layer).1) =>
            {
                rayon::current_num_threads().max(1)
            }
            _ => 1,
        }
    }

    /// Puts factors in memory away until the format is written.
    fn kept(&self, layer: &Layer, made: Made, spool: &mut Spool) -> Result<Done> {
        let Made { mut module, fit } = made;
        for (_, tensor) in &mut module.parameters {
            if tensor.memory.is_some() {
                *tensor = spool.keep(tensor)?;
            }
        }
        let exact = fit.is_none() && matches!(self.plan.way, Way::Recipe(_));
        let report = ModuleReport {
            path: layer.name(),
            method: module.method.name().to_owned(),
            adapters: layer.parts.len(),
            rank: module.method.rank(&module),
            exact,
            fit,
        };
        let named = Named {
            module,
            ..layer.named.clone()
        };
        Ok(Done { named, report })
    }

    fn written(&self, done: Vec<Done>, left_out: Vec<Loss>) -> Result<(Outgoing, Report)> {
        let (plan, options) = (self.plan, &self.plan.options);
        let conversion = &options.conversion;
        let (modules, reports): (Vec<Named>, Vec<ModuleReport>) = done
            .into_iter()
            .map(|done| (done.named, done.report))
            .unzip();
        let known = Known {
            modules,
            folded: plan.joined.known.folded.clone(),
            ..plan.joined.known
        };
        let wish = Wish {
            dtype: conversion.dtype,
            prefix: conversion.prefix.as_deref(),
            order: conversion.read.order.as_ref(),
            ..Wish::default()
        };
        let rest = &plan.joined.rest;
        let written = draft(rest, known, &plan.joined.metadata, plan.target, wish)?;
        let first = &options.adapters[0].path;
        let outgoing = Outgoing::new(
            written,
            plan.target,
            (first, &conversion.output),
            conversion.prefix.as_deref(),
            conversion.allow_losses,
        )?;
        let written = &outgoing.written;
        let report = Report {
            schema: 1,
            dry_run: false,
            adapters: plan.opened.iter().map(told).collect(),
            how: match plan.way {
                Way::Recipe(recipe) => recipe.name,
                Way::Peer(row) => row.name,
            }
            .to_owned(),
            compat: options.compat.clone(),
            to: Format::id(plan.target).to_owned(),
            output: conversion.output.to_string_lossy().into_owned(),
            exact: reports.iter().filter(|module| module.exact).count(),
            residual: residual(&reports),
            modules: reports,
            averaged: plan.joined.averaged.clone(),
            left_out,
            losses: written.losses.clone(),
            folded: written.folded.clone(),
            alpha: written.alpha,
            tensors: written.tensors.len(),
            bytes: outgoing.bytes()?,
            seconds: self.start.elapsed().as_secs_f64(),
            device: plan.device(),
            notices: [&*plan.notices, &written.notices].concat(),
        };
        Ok((outgoing, report))
    }
}

/// Bytes of the parameters of a layer.
fn size(layer: &Layer) -> u64 {
    layer.parts.iter().map(|part| part.module.bytes()).sum()
}

/// What is told of an adapter.
fn told(own: &Opened) -> Combined {
    Combined {
        path: own.found.path.to_string_lossy().into_owned(),
        format: own.format.id().to_owned(),
        strength: own.strength,
    }
}

/// What is done with a layer.
enum Choice {
    /// It is combined, perhaps at a rank.
    Rank(Option<Rank>),
    LeftOut,
}

/// What is left over the norm, over all modules that are not exact.
fn residual(modules: &[ModuleReport]) -> Option<f64> {
    let fits = modules.iter().filter_map(|module| module.fit.as_ref());
    let (mut left, mut all, mut some) = (0.0, 0.0, false);
    for fit in fits {
        let square = fit.norm * fit.norm;
        all += square;
        left += square * fit.residual * fit.residual;
        some = true;
    }
    some.then(|| {
        if all > 0.0 {
            f64::sqrt(left / all)
        } else {
            0.0
        }
    })
}
