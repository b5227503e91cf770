//! What other tools compute, where it is not the sum: their numbers, and what is known to be wrong with them.

use std::ops::Range;

use ndarray::{Array2, Axis, concatenate, s};

use super::join::{Layer, Part};
use super::layer::{Task, geometry};
use super::recipes::Knob;
use crate::adapter::{BiasUse, Module, Order, Orientation, Scale};
use crate::error::{Error, Reason, Result};
use crate::linalg::truncated::{Blocks, Settings};

mod kohya;
mod peft;

/// A tool with its ways.
pub struct Peer {
    /// Its name.
    pub name: &'static str,
    /// Its ways; the first is the usual one.
    pub(super) rows: &'static [Row],
    /// Whether one adapter alone goes the usual way, whatever is asked for.
    pub(super) one_is_usual: bool,
    /// The rank of the result of a way.
    pub(super) rank: fn(&'static Row, &[Layer]) -> usize,
    /// What is wrong beyond what each way gets wrong, for these adapters.
    pub(super) wrong: fn(&[Layer]) -> Vec<&'static str>,
}

/// Every tool whose numbers are reproduced.
pub static PEERS: &[&Peer] = &[&peft::PEFT, &kohya::KOHYA];

impl Peer {
    /// The names of its ways.
    pub fn ways(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.rows.iter().map(|row| row.name)
    }
}

/// A way of another tool.
pub(super) struct Row {
    /// Its name there.
    pub(super) name: &'static str,
    /// Numbers that it takes.
    pub(super) takes: &'static [Knob],
    /// Whether a rank is chosen.
    pub(super) takes_rank: bool,
    /// Which functions make it, where it is made of matrices.
    pub(super) blend: Option<super::recipes::Pair>,
    /// What is known to be wrong with it.
    pub(super) wrong: &'static [&'static str],
    /// What it cannot combine, one case each.
    pub(super) refused: fn(&[Layer]) -> Result<Vec<String>>,
    /// The module of a layer.
    pub(super) make: Make,
}

/// Makes the module of a layer.
type Make = fn(&Layer, &'static Row, &Task<'_>, &Settings<'_>) -> Result<Module>;

/// The tool and the way of these names; without a name of a way the usual one.
///
/// # Errors
/// [`Reason::BadOption`], with all names that there are.
pub(super) fn named(peer: &str, way: Option<&str>) -> Result<(&'static Peer, &'static Row)> {
    let bad = |text: &str, what: &str, all: Vec<&str>| {
        Error::new(Reason::BadOption {
            text: text.to_owned(),
            problem: format!("no such {what}; there are {}", all.join(", ")),
        })
    };
    let found = PEERS.iter().copied().find(|known| known.name == peer);
    let found =
        found.ok_or_else(|| bad(peer, "tool", PEERS.iter().map(|peer| peer.name).collect()))?;
    let row = match way {
        None => found.rows.first(),
        Some(way) => found.rows.iter().find(|row| row.name == way),
    };
    let row = row.ok_or_else(|| {
        bad(
            way.unwrap_or(""),
            "way of that tool",
            found.ways().collect(),
        )
    })?;
    Ok((found, row))
}

/// The two factors of a module without its scale.
pub(super) struct Factors {
    /// Outputs × rank.
    up: Array2<f64>,
    /// Rank × inputs.
    down: Array2<f64>,
}

impl Factors {
    fn of(module: &Module) -> Result<Self> {
        let on = geometry(module)?;
        let bare = Module {
            scale: Scale::ONE,
            ..module.clone()
        };
        let (left, right) = bare.method.factors(&bare, &on)?.ok_or_else(|| {
            let (method, what) = (module.method.name(), "a tool that knows two factors");
            module.error(Reason::MethodOnTarget { method, what })
        })?;
        Ok(match on.orientation {
            Orientation::OutputsFirst => Factors {
                up: left,
                down: right,
            },
            Orientation::InputsFirst => Factors {
                up: right.reversed_axes(),
                down: left.reversed_axes(),
            },
        })
    }

    /// Several side by side.
    fn side_by_side(parts: &[Factors], layer: &Layer) -> Result<Self> {
        let stacked = |axis, side: fn(&Factors) -> &Array2<f64>| {
            let views: Vec<_> = parts.iter().map(|part| side(part).view()).collect();
            concatenate(Axis(axis), &views).map_err(|_| {
                let problem = "the factors are for layers of different sizes".to_owned();
                layer.parts[0].module.error(Reason::FactorShape { problem })
            })
        };
        Ok(Factors {
            up: stacked(1, |part| &part.up)?,
            down: stacked(0, |part| &part.down)?,
        })
    }

    /// A module like another with these factors and a scale.
    fn module(self, like: &Module, scale: Scale) -> Result<Module> {
        let on = geometry(like)?;
        let (left, right) = match on.orientation {
            Orientation::OutputsFirst => (self.up, self.down),
            Orientation::InputsFirst => (self.down.reversed_axes(), self.up.reversed_axes()),
        };
        let made = like.method.of_factors(like, left, right);
        let made = made.ok_or_else(|| {
            Error::new(Reason::NotFitted {
                method: like.method.name(),
            })
        })?;
        Ok(Module { scale, ..made })
    }
}

/// Why a tool that knows two factors cannot take a part of a layer.
fn not_two_factors(part: &Part) -> Option<String> {
    let (module, method) = (&part.module, part.module.method);
    let two = method.rank(module).is_some() && module.parameters.len() == 2;
    match two && method.order() == Order::Additive && method.bias(module) == BiasUse::No {
        true => None,
        false => Some(format!("{}, and it knows two factors alone", method.name())),
    }
}

/// Layers with a part that is not two factors.
fn others_than_factors(layers: &[Layer]) -> Vec<String> {
    let case = |layer: &Layer| {
        let why = layer.parts.iter().find_map(not_two_factors)?;
        Some(format!("{}: {why}", layer.name()))
    };
    layers.iter().filter_map(case).collect()
}

/// Layers of which the parts have different ranks.
fn unequal_ranks(layers: &[Layer], why: &str) -> Vec<String> {
    let case = |layer: &Layer| {
        let ranks = layer
            .parts
            .iter()
            .map(|part| part.module.method.rank(&part.module));
        let ranks: Vec<usize> = ranks.flatten().collect();
        let differ = ranks.iter().any(|rank| *rank != ranks[0]);
        differ.then(|| format!("{}: the ranks {ranks:?}, {why}", layer.name()))
    };
    layers.iter().filter_map(case).collect()
}

/// A matrix in memory.
pub(super) struct Held(pub(super) Array2<f64>);

impl Blocks for Held {
    fn rows(&self) -> usize {
        self.0.nrows()
    }

    fn columns(&self) -> usize {
        self.0.ncols()
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let block = self.0.slice(s![rows, ..]);
        values
            .iter_mut()
            .zip(block)
            .for_each(|(value, own)| *value = *own);
        Ok(())
    }
}
