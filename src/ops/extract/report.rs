//! What an extraction found, as a value that serialises (schema in `docs/report.md`).

use serde::Serialize;

use super::DeviceReport;
use super::pairs::What;
use crate::formats::Loss;
use crate::linalg::truncated::Proof;
use crate::notice::Notice;

/// An extraction, told.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this schema.
    pub schema: u32,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// The base.
    pub base: String,
    /// The tuned checkpoint.
    pub tuned: String,
    /// The output.
    pub output: String,
    /// The method that was fitted.
    pub method: String,
    /// The short name of the format.
    pub to: String,
    /// The type of the factors.
    pub dtype: String,
    /// Every layer that a module was fitted to.
    pub modules: Vec<FittedReport>,
    /// Tensors that are taken whole.
    pub whole: Vec<WholeReport>,
    /// Tensors that are equal on both sides.
    pub identical: usize,
    /// Tensors that differ and are left out, and why.
    pub left_out: Vec<Loss>,
    /// What the format cannot say.
    pub losses: Vec<Loss>,
    /// Scales that the format made to be multiplied into factors, after the residuals were measured.
    pub folded: Vec<Loss>,
    /// The sums over all modules.
    pub total: Total,
    /// The alpha that has to be stated when the output is read, where its format has no place for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Tensors of the output.
    pub tensors: usize,
    /// Bytes of the output's file of tensors.
    pub bytes: u64,
    /// Bytes of the tensors that differ, as the tuned checkpoint stores them.
    pub difference_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Where products of decompositions were computed, if that was to be chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceReport>,
    /// What is odd.
    pub notices: Vec<Notice>,
}

/// A layer and its module. Norms are Frobenius norms.
#[derive(Clone, Debug, Serialize)]
pub struct FittedReport {
    /// Path of the layer.
    pub path: String,
    /// The weight's shape as stored.
    pub shape: Vec<usize>,
    /// The rank.
    pub rank: usize,
    /// Whether it is the rank that was asked for, rather than the largest allowed.
    pub reached: bool,
    /// ‖Δ‖ / ‖W‖
    pub change: f64,
    /// ‖Δ‖
    pub norm: f64,
    /// The share of ‖Δ‖² that the rank keeps, before the factors are rounded.
    pub energy: f64,
    /// What is left of the difference where the module as it is written is merged, over ‖Δ‖.
    pub residual: f64,
    /// What rounding the factors adds to the residual, over ‖Δ‖.
    pub rounding: f64,
    /// The largest error of one element where the module as it is written is merged, before that is rounded.
    pub largest_error: f64,
    /// How good the rank's approximation is.
    pub proof: Proved,
    /// At most this share above the best residual there is at this rank, before the factors are rounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub excess: Option<f64>,
    /// The singular values of the difference that were found, falling; those behind the rank may be too small.
    pub singular_values: Vec<f64>,
    /// How long it took.
    pub seconds: f64,
}

/// How good an approximation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proved {
    /// It is proved to be within `excess` of the best.
    Within,
    /// All singular values were computed.
    Complete,
    /// The residual is below what rounding allows to tell.
    Rounding,
    /// Nothing was proved.
    NotProved,
}

impl Proved {
    /// What is told of a proof.
    pub(in crate::ops) fn of(proof: Proof) -> (Self, Option<f64>) {
        match proof {
            Proof::Within(excess) => (Proved::Within, Some(excess)),
            Proof::Complete => (Proved::Complete, Some(0.0)),
            Proof::Rounding => (Proved::Rounding, None),
            Proof::None => (Proved::NotProved, None),
        }
    }
}

/// A tensor that is taken whole.
#[derive(Clone, Debug, Serialize)]
pub struct WholeReport {
    /// Its name.
    pub name: String,
    /// What it is.
    pub what: What,
    /// `value` or `difference`, as the format can say it.
    #[serde(rename = "as")]
    pub form: &'static str,
}

/// Sums over all modules.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Total {
    /// ‖Δ‖ / ‖W‖
    pub change: f64,
    /// The share of Σ‖Δ‖² that the ranks keep.
    pub energy: f64,
    /// What is left over ‖Δ‖, of the modules as they are written.
    pub residual: f64,
    /// At most this share above the best that these ranks allow, before rounding; nothing where some module is not
    /// proved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub excess: Option<f64>,
    /// Modules of which nothing is proved.
    pub not_proved: usize,
    /// Modules whose rank is the largest allowed and not the one that was asked for.
    pub not_reached: usize,
    /// Numbers in the factors.
    pub parameters: u64,
}
