//! PEFT's `add_weighted_adapter`.
//!
//! Source: `huggingface/peft` 0.21.2, `src/peft/tuners/lora/model.py` (`add_weighted_adapter` and what it calls),
//! `src/peft/utils/merge_utils.py`. Not here: `dare_*`, whose masks come from torch's generator, and `svd_clamp`.

use ndarray::Array2;

use super::{Factors, Held, Peer, Row, others_than_factors, unequal_ranks};
use crate::adapter::delta::Delta;
use crate::adapter::{Module, Orientation, Scale};
use crate::error::{Error, Result};
use crate::linalg::truncated::{Blocks, Rank, Settings, truncated};
use crate::ops::combine::consensus::{self, Blended};
use crate::ops::combine::join::{Layer, Part};
use crate::ops::combine::layer::{Task, geometry};
use crate::ops::combine::recipes::{Changes, Knob, Pair, blended};
use crate::ops::combine::sparsify;

pub(super) static PEFT: Peer = Peer {
    name: "peft",
    rows: &[
        Row {
            name: "linear",
            takes: &[],
            takes_rank: false,
            blend: Some(SUM),
            wrong: &[CROSS_TERMS],
            refused: unequal,
            make: of_each_factor,
        },
        Row {
            name: "cat",
            takes: &[],
            takes_rank: false,
            blend: None,
            wrong: &[],
            refused: factors_alone,
            make: side_by_side,
        },
        Row {
            name: "svd",
            takes: &[],
            takes_rank: true,
            blend: None,
            wrong: &[],
            refused: factors_alone,
            make: of_the_change,
        },
        Row {
            name: "ties",
            takes: &[Knob::Density, Knob::Majority],
            takes_rank: false,
            blend: Some(TIES),
            wrong: &[CROSS_TERMS, VOTE],
            refused: unequal,
            make: of_each_factor,
        },
        Row {
            name: "ties_svd",
            takes: &[Knob::Density, Knob::Majority],
            takes_rank: true,
            blend: Some(TIES),
            wrong: &[VOTE],
            refused: factors_alone,
            make: of_the_change,
        },
        Row {
            name: "magnitude_prune",
            takes: &[Knob::Density],
            takes_rank: false,
            blend: Some(PRUNED),
            wrong: &[CROSS_TERMS],
            refused: unequal,
            make: of_each_factor,
        },
        Row {
            name: "magnitude_prune_svd",
            takes: &[Knob::Density],
            takes_rank: true,
            blend: Some(PRUNED),
            wrong: &[],
            refused: factors_alone,
            make: of_the_change,
        },
    ],
    one_is_usual: true,
    rank,
    wrong,
};

const SUM: Pair = (sparsify::everything, consensus::sum);
const TIES: Pair = (sparsify::largest, consensus::elected_without_strengths);
const PRUNED: Pair = (sparsify::largest, consensus::sum);

const CROSS_TERMS: &str = "PEFT combines each factor by itself, so that the result holds the products of the factors of \
    different adapters as well: two equal adapters at 0.5 each give twice the adapter";
const VOTE: &str = "PEFT lets signs be elected whatever the strengths, also negative ones, and divides by the number of \
    adapters that agree";
const ROOT: &str = "PEFT takes the first adapter's `use_rslora` with alpha = rank, so that the result is the root of its \
    rank times too strong";

fn wrong(layers: &[Layer]) -> Vec<&'static str> {
    match has_root(layers) {
        true => vec![ROOT],
        false => Vec::new(),
    }
}

/// Whether the first adapter divides by the root of the rank.
fn has_root(layers: &[Layer]) -> bool {
    layers.iter().any(|layer| layer.parts.iter().any(is_root))
}

fn is_root(part: &Part) -> bool {
    part.adapter == 0 && part.module.scale.root
}

/// The rank that an adapter's configuration states for a module.
fn stated(part: &Part) -> usize {
    let own = part.module.method.rank(&part.module).unwrap_or(0);
    part.module.scale.rank.unwrap_or(own).max(own)
}

/// The largest rank of each adapter.
fn ranks(layers: &[Layer]) -> Vec<usize> {
    let mut ranks = Vec::new();
    for part in layers.iter().flat_map(|layer| &layer.parts) {
        ranks.resize(ranks.len().max(part.adapter + 1), 0);
        ranks[part.adapter] = stated(part).max(ranks[part.adapter]);
    }
    ranks
}

/// What `_check_add_weighted_adapter` says: of `cat` the sum, of others the largest.
fn rank(row: &'static Row, layers: &[Layer]) -> usize {
    let ranks = ranks(layers);
    match (row.blend, row.takes_rank) {
        (None, false) => ranks.iter().sum(),
        _ => ranks.iter().copied().max().unwrap_or(1),
    }
}

fn factors_alone(layers: &[Layer]) -> Result<Vec<String>> {
    Ok(others_than_factors(layers))
}

/// The same, and layers of different ranks.
fn unequal(layers: &[Layer]) -> Result<Vec<String>> {
    let mut cases = others_than_factors(layers);
    cases.extend(unequal_ranks(layers, "which this way wants to be equal"));
    Ok(cases)
}

/// α = rank, so that the scale is 1; or the root of it, where the configuration says rsLoRA.
fn scale(layer: &Layer, rank: usize) -> Scale {
    Scale::of(rank as f64, rank, layer.parts.iter().any(is_root))
}

/// `_generalized_task_arithmetic_weighted_adapter`: `A = Σ ±√|c| A` and `B = Σ √|c| B`, c = weight · scale.
fn of_each_factor(
    layer: &Layer,
    row: &'static Row,
    task: &Task<'_>,
    _settings: &Settings<'_>,
) -> Result<Module> {
    let (mut ups, mut downs) = (Vec::new(), Vec::new());
    for part in &layer.parts {
        let Factors { up, down } = Factors::of(&part.module)?;
        let c = part.strength * part.module.scale.value;
        let root = c.abs().sqrt();
        ups.push((Held(up), root, part.adapter));
        downs.push((Held(down), if c < 0.0 { -root } else { root }, part.adapter));
    }
    let blend = |matrices: &[(Held, f64, usize)]| -> Result<Array2<f64>> {
        let parts = matrices
            .iter()
            .map(|(held, by, adapter)| (held as &dyn Blocks, *by, *adapter));
        let blended = combined(parts.collect(), layer, row, task)?;
        let (rows, columns) = (blended.rows(), blended.columns());
        let mut values = vec![0.0; rows * columns];
        blended.fill(0..rows, &mut values)?;
        let whole = Array2::from_shape_vec((rows, columns), values);
        Ok(whole.expect("as many as there are elements"))
    };
    let factors = Factors {
        up: blend(&ups)?,
        down: blend(&downs)?,
    };
    let rank = factors.down.nrows();
    factors.module(&layer.parts[0].module, scale(layer, rank))
}

/// What a way makes of matrices.
fn combined<'a>(
    parts: Vec<(&'a dyn Blocks, f64, usize)>,
    layer: &Layer,
    row: &'static Row,
    task: &Task<'_>,
) -> Result<Blended<'a>> {
    let pair = row.blend.unwrap_or(SUM);
    let changes = Changes {
        parts,
        whole: layer.whole,
        name: layer.name(),
    };
    blended(&changes, pair, task.tuning)
}

/// `cat`: the whole weight on A, zeros up to the sum of all ranks.
fn side_by_side(
    layer: &Layer,
    _row: &'static Row,
    task: &Task<'_>,
    _settings: &Settings<'_>,
) -> Result<Module> {
    let weighed = layer.parts.iter().map(|part| {
        let Factors { up, down } = Factors::of(&part.module)?;
        let c = part.strength * part.module.scale.value;
        let down = down.mapv_into(|value| c * value);
        Ok(Factors { up, down })
    });
    let factors = Factors::side_by_side(&weighed.collect::<Result<Vec<_>>>()?, layer)?;
    let like = &layer.parts[0].module;
    let module = factors.module(like, scale(layer, task.peer_rank))?;
    let filled = module.method.filled(&module, task.peer_rank);
    Ok(Module {
        scale: module.scale,
        ..filled.unwrap_or(module)
    })
}

/// `_svd_generalized_task_arithmetic_weighted_adapter`: `B = U·S` and `A = Vᵀ` of the combined changes.
fn of_the_change(
    layer: &Layer,
    row: &'static Row,
    task: &Task<'_>,
    settings: &Settings<'_>,
) -> Result<Module> {
    let like = &layer.parts[0].module;
    let on = geometry(like)?;
    let terms = layer.parts.iter().map(|part| (&part.module, part.strength));
    let deltas = layer
        .parts
        .iter()
        .map(|part| Delta::of(&[(&part.module, 1.0)], on));
    let deltas: Vec<Delta<'_>> = deltas.collect::<Result<_>>()?;
    let change: Box<dyn Blocks> = match row.blend {
        None => Box::new(Delta::of(&terms.collect::<Vec<_>>(), on)?),
        Some(_) => {
            let parts = deltas.iter().zip(&layer.parts);
            let parts =
                parts.map(|(delta, part)| (delta as &dyn Blocks, part.strength, part.adapter));
            Box::new(combined(parts.collect(), layer, row, task)?)
        }
    };
    let settings = Settings {
        rank: Rank::Fixed(task.peer_rank),
        exact: true,
        ..*settings
    };
    let mut found = truncated(&*change, &settings).map_err(|e: Error| e.on(layer.name()))?;
    found.fill(task.peer_rank.min(on.rows.min(on.columns)));
    let (mut up, down) = match on.orientation {
        Orientation::OutputsFirst => (found.left, found.right),
        Orientation::InputsFirst => (found.right, found.left),
    };
    for (mut vector, value) in up.outer_iter_mut().zip(&found.values) {
        vector.mapv_inplace(|element| value * element);
    }
    let factors = Factors {
        up: up.reversed_axes(),
        down,
    };
    let rank = factors.down.nrows();
    factors.module(like, scale(layer, rank))
}
