//! What a combination did, as a value that serialises (schema in `docs/report.md`).

use serde::Serialize;

use crate::formats::Loss;
use crate::notice::Notice;
use crate::ops::device::DeviceReport;
use crate::ops::extract::Proved;

/// A combination, told.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this schema.
    pub schema: u32,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// The adapters, in order.
    pub adapters: Vec<Combined>,
    /// The way.
    pub how: String,
    /// Whose numbers were reproduced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<String>,
    /// The short name of the format.
    pub to: String,
    /// The output.
    pub output: String,
    /// Every module of the result.
    pub modules: Vec<ModuleReport>,
    /// Modules of the result that are the sum to the rounding of their factors.
    pub exact: usize,
    /// What is left of the changes over all modules that are not, over their norm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<f64>,
    /// Whole tensors and rows of which the average was taken.
    pub averaged: Vec<String>,
    /// Modules that are not in the result, and why.
    pub left_out: Vec<Loss>,
    /// What the format cannot say.
    pub losses: Vec<Loss>,
    /// Scales that were multiplied into factors for the format.
    pub folded: Vec<Loss>,
    /// The alpha that has to be stated when the output is read, where its format has no place for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Tensors of the output.
    pub tensors: usize,
    /// Bytes of the output's file of tensors.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Where products of decompositions were computed, if that was to be chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceReport>,
    /// What is odd.
    pub notices: Vec<Notice>,
}

/// An adapter that takes part.
#[derive(Clone, Debug, Serialize)]
pub struct Combined {
    /// Its path.
    pub path: String,
    /// The short name of its format.
    pub format: String,
    /// Its strength.
    pub strength: f64,
}

/// A module of the result. Norms are Frobenius norms.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleReport {
    /// Its path, behind the part of a pipeline.
    pub path: String,
    /// Its method.
    pub method: String,
    /// How many adapters have it.
    pub adapters: usize,
    /// Its rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Whether it is the sum to the rounding of its parameters.
    pub exact: bool,
    /// What was found where it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fit: Option<Fit>,
}

/// How well a module says what it should.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// The norm of what was asked for.
    pub norm: f64,
    /// The share of its square that the rank keeps, before factors are rounded.
    pub energy: f64,
    /// What is left of it by the module as it is written, over its norm.
    pub residual: f64,
    /// Whether the rank is the one that was asked for, rather than the largest allowed.
    pub reached: bool,
    /// How good the rank's approximation is.
    pub proof: Proved,
    /// At most this share above the best residual there is at this rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub excess: Option<f64>,
}
