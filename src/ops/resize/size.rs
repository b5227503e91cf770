//! Ranks for a size of file: singular values first, then what a file of some ranks would take, which needs no factors.

use std::sync::Arc;

use ndarray::Array2;
use rayon::prelude::*;

use super::super::budget::{Attempts, Candidate, spent, within};
use super::super::convert;
use super::measure::{Layer, is_new, own_type};
use super::report::Found;
use super::work::{Work, layers};
use crate::adapter::{Adapter, Module};
use crate::error::{Error, Reason, Result};
use crate::linalg::truncated::{Proof, Rank, Truncation};
use crate::tensor::{Float, narrow};

/// Most sizes that are looked at.
const ATTEMPTS: usize = 24;

/// The share of the size that may be left when no more are looked at.
const ENOUGH: u64 = 1000;

/// Most times that modules are made because a file is larger than was foreseen.
const MADE: usize = 3;

impl Work<'_> {
    /// The best ranks that a file of so many bytes holds; every module has at least one.
    pub(super) fn within(&self, budget: u64) -> Result<(convert::Plan, Found)> {
        let candidates = self.candidates()?;
        let least = self.bytes(&vec![1; candidates.len()])?;
        let mut target = budget;
        for _ in 0..MADE {
            let room = target
                .checked_sub(least)
                .ok_or_else(|| too_small(budget, least))?;
            let attempts = Attempts {
                most: ATTEMPTS,
                enough: budget / ENOUGH,
            };
            let ranks = within(target, room, &attempts, |room| {
                let more = spent(&candidates, room).into_iter();
                let ranks: Vec<usize> = more.map(|rank| rank + 1).collect();
                let bytes = self.bytes(&ranks)?;
                Ok((ranks, bytes))
            })?;
            let ranks = ranks.unwrap_or_else(|| vec![1; candidates.len()]);
            let (plan, found) = self.resized(Some(&ranks))?;
            match plan.report().bytes.checked_sub(budget) {
                None | Some(0) => return Ok((plan, found)),
                Some(over) => target = target.saturating_sub(over),
            }
        }
        Err(too_small(budget, least))
    }

    /// The spectra of all layers behind their first singular value, weighed by what their scale makes of them.
    fn candidates(&self) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        convert::planned(self.conversion, |adapter| {
            let chosen = self.chosen(adapter, &mut Vec::new())?;
            let layers = layers(&chosen);
            let made = layers.par_iter().map(|layer| self.candidate(layer));
            candidates = made.collect::<Result<_>>()?;
            Ok(Vec::new())
        })?;
        Ok(candidates)
    }

    fn candidate(&self, layer: &Layer<'_>) -> Result<Candidate> {
        let check = || self.control.check();
        let found = layer.decomposed(&self.settings(Rank::Fixed(0), &check))?;
        let values = found.spectrum.iter().take(self.most(layer)).skip(1);
        let factor = layer.module.scale.value;
        let sizes = layer.module.parameters.first().map(|(role, _)| *role);
        let size = sizes.map(|role| own_type(layer.module, role, self.conversion.dtype));
        Ok(Candidate {
            squares: values.map(|value| (value * factor).powi(2)).collect(),
            cost: (layer.on.rows + layer.on.columns) * size.transpose()?.map_or(1, Float::size),
        })
    }

    /// Bytes of a file of some ranks.
    fn bytes(&self, ranks: &[usize]) -> Result<u64> {
        let plan = convert::planned(self.conversion, |adapter: &mut Adapter| {
            let chosen = self.chosen(adapter, &mut Vec::new())?;
            let made = layers(&chosen).into_iter().zip(ranks).enumerate();
            let made = made.map(|(number, (layer, rank))| self.outline(&layer, *rank, number));
            let made: Vec<Module> = made.collect::<Result<_>>()?;
            for (whole, module) in chosen.iter().zip(&made) {
                whole.put(module, adapter)?;
            }
            Ok(Vec::new())
        })?;
        Ok(plan.report().bytes)
    }

    /// A module of a rank with the shapes and types that it will have; its values are no zeros, and those of no other
    /// near it, so that a format makes of it what it will make of the real one.
    fn outline(&self, layer: &Layer<'_>, rank: usize, number: usize) -> Result<Module> {
        if rank == layer.rank {
            return Ok(layer.module.clone());
        }
        let mut one = Truncation {
            left: Array2::zeros((1, layer.on.rows)),
            right: Array2::zeros((1, layer.on.columns)),
            values: vec![0.0],
            spectrum: Vec::new(),
            square: 0.0,
            reached: true,
            proof: Proof::None,
        };
        let one = layer.of_triplets(&mut one)?;
        let filled = one.method.filled(&one, rank);
        let mut outline = filled.ok_or_else(|| layer.module.error(Reason::NothingSelected))?;
        for (role, tensor) in &mut outline.parameters {
            let old = layer.module.get(*role);
            if old.is_some_and(|_| !is_new(layer.module, *role, tensor)) {
                continue;
            }
            let float = own_type(layer.module, *role, self.conversion.dtype)?;
            let mut element = vec![0; float.size()];
            narrow(float, &[(1 + number % 1000) as f64], &mut element);
            let count = tensor.elements();
            let made = Arc::new(move || Ok(element.repeat(count)));
            *tensor = tensor.derived(float.dtype(), tensor.shape.clone(), made);
        }
        outline.scale = layer.module.scale.at_rank(rank);
        Ok(outline)
    }
}

fn too_small(budget: u64, least: u64) -> Error {
    let text = budget.to_string();
    let problem = format!("with one rank for each module the file has {least} bytes");
    Error::new(Reason::BadOption { text, problem })
}
