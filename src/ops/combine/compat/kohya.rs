//! `networks/merge_lora.py` of sd-scripts, for adapters into an adapter.
//!
//! Source: `kohya-ss/sd-scripts`, `networks/merge_lora.py` (`merge_lora_models`). Not here: `--shuffle`.

use super::{Factors, Peer, Row, others_than_factors, unequal_ranks};
use crate::adapter::{Module, Scale};
use crate::error::Result;
use crate::linalg::truncated::Settings;
use crate::ops::combine::join::{Layer, Part};
use crate::ops::combine::layer::Task;

pub(super) static KOHYA: Peer = Peer {
    name: "kohya",
    rows: &[
        Row {
            name: "linear",
            takes: &[],
            takes_rank: false,
            blend: None,
            wrong: &[
                "sd-scripts multiplies both factors by the ratio, so that what an adapter adds is multiplied by its square",
                "sd-scripts adds factors, so that the result holds the products of the factors of different adapters",
            ],
            refused: unequal,
            make: added,
        },
        Row {
            name: "concat",
            takes: &[],
            takes_rank: false,
            blend: None,
            wrong: &[
                "sd-scripts multiplies both factors by the ratio, so that what an adapter adds is multiplied by its square",
                "sd-scripts keeps the first alpha over the sum of the ranks, so that two adapters of one rank count half",
            ],
            refused: without_root,
            make: side_by_side,
        },
    ],
    one_is_usual: false,
    rank: |_, _| 0,
    wrong: |_| Vec::new(),
};

/// The alpha that a file of sd-scripts would state.
fn alpha(module: &Module) -> f64 {
    let rank = module.method.rank(module).unwrap_or(1);
    match module.scale.alpha {
        Some(alpha) if alpha / rank as f64 == module.scale.value => alpha,
        _ => module.scale.value * rank as f64,
    }
}

/// Layers that it fails on, whatever the ranks.
fn without_root(layers: &[Layer]) -> Result<Vec<String>> {
    let mut cases = others_than_factors(layers);
    cases.extend(layers.iter().filter_map(|layer| {
        let first = alpha(&layer.parts[0].module);
        let ratio = |part: &Part| alpha(&part.module) / first;
        let odd = layer
            .parts
            .iter()
            .map(ratio)
            .any(|ratio| !(ratio >= 0.0 && ratio.is_finite()));
        odd.then(|| format!("{}: the ratio of its alphas has no root", layer.name()))
    }));
    Ok(cases)
}

fn unequal(layers: &[Layer]) -> Result<Vec<String>> {
    let mut cases = without_root(layers)?;
    cases.extend(unequal_ranks(layers, "which only --how concat takes"));
    Ok(cases)
}

/// Both factors of each part, multiplied by `√(α / α of the first) · ratio`; the up factor by its magnitude.
fn scaled(layer: &Layer) -> Result<Vec<Factors>> {
    let first = alpha(&layer.parts[0].module);
    let scaled = layer.parts.iter().map(|part| {
        let Factors { up, down } = Factors::of(&part.module)?;
        let by = (alpha(&part.module) / first).sqrt() * part.strength;
        Ok(Factors {
            up: up.mapv_into(|value| by.abs() * value),
            down: down.mapv_into(|value| by * value),
        })
    });
    scaled.collect()
}

/// The first alpha over the rank of the result.
fn scale(layer: &Layer, rank: usize) -> Scale {
    Scale::of(alpha(&layer.parts[0].module), rank, false)
}

fn added(
    layer: &Layer,
    _row: &'static Row,
    _task: &Task<'_>,
    _settings: &Settings<'_>,
) -> Result<Module> {
    let mut parts = scaled(layer)?.into_iter();
    let first = parts
        .next()
        .map(Ok)
        .unwrap_or_else(|| Factors::of(&layer.parts[0].module))?;
    let sum = parts.fold(first, |sum, part| Factors {
        up: sum.up + part.up,
        down: sum.down + part.down,
    });
    let rank = sum.down.nrows();
    sum.module(&layer.parts[0].module, scale(layer, rank))
}

fn side_by_side(
    layer: &Layer,
    _row: &'static Row,
    _task: &Task<'_>,
    _settings: &Settings<'_>,
) -> Result<Module> {
    let factors = Factors::side_by_side(&scaled(layer)?, layer)?;
    let rank = factors.down.nrows();
    factors.module(&layer.parts[0].module, scale(layer, rank))
}
