//! The work of resizing: module by module, in memory bounded by a few of them.

use std::path::Path;

use rayon::prelude::*;

use super::super::convert;
use super::super::spool::Spool;
use super::measure::{Layer, Resized, is_new, resized};
use super::report::{Found, How};
use super::whole::Whole;
use super::{Counting, Options, Ranks, sd_scripts};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};
use crate::formats::Loss;
use crate::linalg::dense::Algebra;
use crate::linalg::truncated::{Rank, Settings};
use crate::ops::merge::Control;
use crate::pattern::Choice;

/// The work, with what is asked of it.
pub(super) struct Work<'a> {
    pub(super) options: &'a Options,
    pub(super) conversion: &'a convert::Options,
    pub(super) choice: Choice,
    pub(super) algebra: &'a dyn Algebra,
    pub(super) control: &'a Control<'a>,
}

impl Work<'_> {
    /// Resizes and lets the format say it.
    pub(super) fn run(&self) -> Result<(convert::Plan, Found)> {
        if let Ranks::Budget(budget) = self.options.ranks {
            return self.within(budget);
        }
        self.resized(None)
    }

    /// The same for ranks that are known, one for each layer.
    pub(super) fn resized(&self, ranks: Option<&[usize]>) -> Result<(convert::Plan, Found)> {
        let output = self.conversion.output.parent();
        let folder = output.filter(|folder| !folder.as_os_str().is_empty());
        let mut spool = Spool::new(folder.unwrap_or(Path::new(".")))?;
        let mut found = Found::default();
        let plan = convert::planned(self.conversion, |adapter| {
            let chosen = self.chosen(adapter, &mut found.kept)?;
            self.replace(adapter, &chosen, ranks, (&mut spool, &mut found))?;
            Ok(Vec::new())
        })?;
        Ok((plan, found))
    }

    /// The modules that have a rank and are chosen; the others with a reason.
    pub(super) fn chosen(&self, adapter: &Adapter, kept: &mut Vec<Loss>) -> Result<Vec<Whole>> {
        let mut chosen = Vec::new();
        for (index, module) in adapter.modules.iter().enumerate() {
            let why = match self.choice.keeps(&module.path)? {
                true => Layer::of(module).err(),
                false => Some("it was not chosen".to_owned()),
            };
            match why {
                None => chosen.push(index),
                Some(text) => kept.push(Loss {
                    item: module.path.clone(),
                    text,
                }),
            }
        }
        match chosen.is_empty() {
            true => Err(Error::new(Reason::NothingSelected)
                .in_file(&self.conversion.adapter)
                .with_hint("modules without a rank cannot be resized")),
            false => Ok(Whole::all(adapter, &chosen)),
        }
    }

    /// Puts resized modules in the place of the chosen ones, a few at a time.
    fn replace(
        &self,
        adapter: &mut Adapter,
        chosen: &[Whole],
        ranks: Option<&[usize]>,
        (spool, found): (&mut Spool, &mut Found),
    ) -> Result<()> {
        let layers = layers(chosen);
        let total = layers.iter().map(|layer| layer.module.bytes()).sum();
        let mut done = 0;
        let mut all = Vec::new();
        let step = rayon::current_num_threads().max(1);
        for start in (0..layers.len()).step_by(step) {
            let part = start..(start + step).min(layers.len());
            let made = part.clone().into_par_iter();
            let made = made.map(|at| self.one(&layers[at], ranks.map(|ranks| ranks[at])));
            let made: Vec<Resized> = made.collect::<Result<_>>()?;
            for (layer, mut made) in layers[part].iter().zip(made) {
                for (role, tensor) in &mut made.module.parameters {
                    // Zeros behind factors are made when they are written.
                    if tensor.memory.is_some() && is_new(layer.module, *role, tensor) {
                        *tensor = spool.keep(tensor)?;
                    }
                }
                all.push(made);
                done += layer.module.bytes();
                self.control.progress(done, total);
            }
        }
        for (whole, Resized { module, mut report }) in chosen.iter().zip(all) {
            report.parts = whole.others(adapter);
            if report.how != How::Same {
                whole.put(&module, adapter)?;
            }
            found.resized.push(report);
        }
        Ok(())
    }

    /// One module, of a rank that is known or as the options say.
    fn one(&self, layer: &Layer<'_>, known: Option<usize>) -> Result<Resized> {
        let rank = known.map_or_else(|| self.rank(layer), Rank::Fixed);
        let check = || self.control.check();
        let found = layer.decomposed(&self.settings(rank, &check))?;
        let (side, most) = (layer.smaller_side(), self.most(layer));
        let (rank, reached) = match (rank, self.options.counting) {
            (Rank::Fixed(_), Counting::SdScripts) => {
                let ranks = match self.options.ranks {
                    Ranks::Fixed(_) => Ranks::Fixed(most),
                    other => other,
                };
                let count = |most| sd_scripts::count(&found.spectrum, side, ranks, most);
                (count(most), count(usize::MAX) <= most)
            }
            (Rank::Fixed(rank), Counting::Exact) => (rank, true),
            _ => (found.values.len().max(1), found.reached),
        };
        resized(
            layer,
            found,
            (rank, reached),
            self.conversion.dtype,
            self.algebra,
        )
    }

    pub(super) fn settings<'s>(
        &'s self,
        rank: Rank,
        check: &'s (dyn Fn() -> Result<()> + Sync),
    ) -> Settings<'s> {
        Settings {
            algebra: self.algebra,
            rank,
            tolerance: None,
            exact: true,
            seed: 0,
            memory: 0,
            check,
        }
    }

    /// What is asked for a layer; for a count of its own, as many triplets as that may take.
    fn rank(&self, layer: &Layer<'_>) -> Rank {
        let most = self.most(layer);
        if self.options.counting == Counting::SdScripts {
            return Rank::Fixed(most);
        }
        match self.options.ranks {
            Ranks::Fixed(_) | Ranks::Budget(_) => Rank::Fixed(most),
            Ranks::Energy(share) => Rank::Energy { share, most },
            Ranks::Norm(share) => Rank::Energy {
                share: share * share,
                most,
            },
            Ranks::Sum(share) => Rank::Sum { share, most },
            Ranks::Ratio(ratio) => Rank::Ratio { ratio, most },
        }
    }

    /// The largest rank that a layer may have.
    pub(super) fn most(&self, layer: &Layer<'_>) -> usize {
        match self.options.ranks {
            Ranks::Fixed(rank) => self.of_kind(layer, Some(rank)).unwrap_or(rank),
            _ => {
                let most = self.of_kind(layer, self.options.max_rank);
                match self.options.counting {
                    Counting::Exact => most.unwrap_or(layer.rank).min(layer.rank),
                    Counting::SdScripts => most.unwrap_or(layer.rank),
                }
            }
        }
    }

    /// What is said of convolutions where it is one, otherwise of all.
    fn of_kind(&self, layer: &Layer<'_>, all: Option<usize>) -> Option<usize> {
        let is_convolution = match self.options.counting {
            Counting::Exact => layer.on.kernel > 1,
            Counting::SdScripts => {
                let shape = layer.module.method.shape(layer.module);
                shape.is_some_and(|shape| shape.len() > 2)
            }
        };
        match is_convolution {
            true => self.options.conv_rank.or(all),
            false => all,
        }
    }
}

/// The chosen modules, which are known to have a rank.
pub(super) fn layers(chosen: &[Whole]) -> Vec<Layer<'_>> {
    let modules = chosen.iter().map(|whole| &whole.module);
    modules
        .filter_map(|module| Layer::of(module).ok())
        .collect()
}
