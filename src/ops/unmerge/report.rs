//! What was taken out, as a value that serialises (schema in `docs/report.md`).

use serde::Serialize;

use crate::notice::Notice;
use crate::ops::merge::FileReport;

/// A base that was restored.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this schema.
    pub schema: u32,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// The checkpoint that the adapters were merged into.
    pub merged: String,
    /// The output.
    pub output: String,
    /// Whether every byte is that of the base.
    pub exact: bool,
    /// The adapters, in the order in which they were merged.
    pub adapters: Vec<AdapterReport>,
    /// Tensors that were restored.
    pub tensors: usize,
    /// Tensors that were taken as they are.
    pub copied_tensors: usize,
    /// Files of tensors.
    pub files: Vec<FileReport>,
    /// Files that were copied.
    pub copied: Vec<String>,
    /// How far tensors may be from those of the base, without an undo file.
    pub bounds: Vec<BoundReport>,
    /// Bytes of the output.
    pub disk: u64,
    /// Worker threads.
    pub threads: usize,
    /// The arithmetic kernel.
    pub kernel: String,
    /// How long it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// What is odd.
    pub notices: Vec<Notice>,
}

/// An adapter that was taken out.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// The path that was given.
    pub path: String,
    /// The strength at which it was merged.
    pub strength: f64,
}

/// What is known of a tensor that was restored by subtraction.
#[derive(Clone, Debug, Serialize)]
pub struct BoundReport {
    /// The tensor.
    pub tensor: String,
    /// No element is further from that of the base.
    pub most: f64,
    /// The share of elements that is expected to differ from those of the base.
    pub differing: f64,
    /// Elements that no base value could have become: not merged from this, or not like this.
    pub impossible: u64,
}
