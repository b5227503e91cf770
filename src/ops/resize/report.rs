//! What resizing did, as a value that serialises (schema in `docs/report.md`).

use std::time::Duration;

use serde::Serialize;

use super::super::convert;
use super::super::device::DeviceReport;
use crate::formats::Loss;

/// A resizing, told: the document of a conversion, and what became of the ranks.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was written.
    #[serde(flatten)]
    pub conversion: convert::Report,
    /// Every module that has a rank and was chosen.
    pub resized: Vec<ResizedReport>,
    /// Modules that have no rank, or were not chosen, and why they are as they were.
    pub kept: Vec<Loss>,
    /// The sums over all of the first.
    pub total: Total,
    /// Bytes of the adapter's file of tensors.
    pub adapter_bytes: u64,
    /// How long it took to make.
    pub seconds: f64,
    /// Where products of decompositions were computed, if that was to be chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceReport>,
}

/// A module and what became of it. Norms are Frobenius norms of what it adds at strength 1; of DoRA that is Δ in
/// `V = W + Δ`.
#[derive(Clone, Debug, Serialize)]
pub struct ResizedReport {
    /// Path of the layer.
    pub path: String,
    /// Paths of the other modules that are parts of one fused layer in the file, and have one factor with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
    /// The weight's shape as stored, as far as the module tells; of a fused layer that of all parts.
    pub shape: Vec<usize>,
    /// The rank before.
    pub old_rank: usize,
    /// The rank.
    pub rank: usize,
    /// Whether it is the rank that was asked for, rather than the largest allowed.
    pub reached: bool,
    /// How it was made.
    pub how: How,
    /// ‖Δ‖
    pub norm: f64,
    /// The share of ‖Δ‖² that the rank keeps, before the factors are rounded.
    pub energy: f64,
    /// What is left out, of the factors as they are rounded to their type, over ‖Δ‖.
    pub residual: f64,
    /// What rounding the factors adds to the residual, over ‖Δ‖.
    pub rounding: f64,
    /// The singular values of Δ, falling.
    pub singular_values: Vec<f64>,
}

/// How a module of another rank was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// Its rank is the one that it had: no bit is another.
    Same,
    /// Zeros stand behind its factors.
    Filled,
    /// Its factors are the first singular triplets.
    Decomposed,
}

/// Sums over all modules.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Total {
    /// The share of Σ‖Δ‖² that the ranks keep.
    pub energy: f64,
    /// What is left out over the root of that, of the factors as they are rounded.
    pub residual: f64,
    /// Modules whose rank is the largest allowed and not the one that was asked for.
    pub not_reached: usize,
    /// Ranks before, all together.
    pub old_ranks: u64,
    /// Ranks, all together.
    pub ranks: u64,
}

/// What was found on the way.
#[derive(Default)]
pub(super) struct Found {
    pub(super) resized: Vec<ResizedReport>,
    pub(super) kept: Vec<Loss>,
}

impl Report {
    pub(super) fn new(conversion: &convert::Plan, found: Found, took: Duration) -> Self {
        Report {
            total: total(&found.resized),
            conversion: conversion.report().clone(),
            resized: found.resized,
            kept: found.kept,
            adapter_bytes: conversion.adapter_bytes(),
            seconds: took.as_secs_f64(),
            device: None,
        }
    }
}

fn total(modules: &[ResizedReport]) -> Total {
    let (mut all, mut outside, mut left) = (0.0, 0.0, 0.0);
    let mut total = Total::default();
    for module in modules {
        let square = module.norm * module.norm;
        all += square;
        outside += square * (1.0 - module.energy).max(0.0);
        left += square * module.residual * module.residual;
        total.not_reached += usize::from(!module.reached);
        total.old_ranks += module.old_rank as u64;
        total.ranks += module.rank as u64;
    }
    let share = |part: f64| if all > 0.0 { part / all } else { 0.0 };
    total.energy = 1.0 - share(outside);
    total.residual = share(left).sqrt();
    total
}
