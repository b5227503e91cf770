//! The canonical model of an adapter, whatever its spelling: modules, replacements, tokens, facts.

use std::collections::BTreeMap;

use crate::naming::families::Layout;
use crate::naming::{Attention, Spelling};
use crate::notice::Notice;
use crate::tensor::Tensor;

pub mod bound;
pub mod candidates;
mod certified;
pub mod delta;
pub mod evaluate;
pub mod factor;
pub mod fit;
mod method;
mod module;
mod outputs;
pub mod preimage;
pub mod scan;

pub use method::{
    Along, BiasUse, Extent, Geometry, Method, Order, Orientation, Part, RoleUse, Update, Workspace,
};
pub use module::{Layer, Module, Role, Scale, Stored};

/// An adapter as its format describes it. Nothing in the file is left out: a tensor is a parameter of
/// a module, a replacement, a set of token rows, or listed among the unused.
#[derive(Debug, Default)]
pub struct Adapter {
    /// Adapted layers, in file order.
    pub modules: Vec<Module>,
    /// Whole tensors that take the place of the base's (PEFT `modules_to_save`, biases, embeddings).
    pub replacements: Vec<Replacement>,
    /// Rows of embeddings that take the place of the base's.
    pub tokens: Vec<TokenRows>,
    /// Training state that has no part in the merged weights by the method's own definition.
    pub unused: Vec<Tensor>,
    /// The configuration without which the unused tensors mean nothing: vectors for the input (PEFT's prompts).
    pub configuration: Option<serde_json::Value>,
    /// Layers to repeat before anything is merged: ranges of the base's layers.
    pub replication: Vec<(usize, usize)>,
    /// Weights to widen with zeros before anything is added (ComfyUI `reshape_weight`).
    pub paddings: Vec<Padding>,
    /// The output embedding shares one adapter with the input embedding (PEFT `ensure_weight_tying`).
    pub tied: bool,
    /// What changes a shared embedding was trained on both of its uses, so that it stays shared (MLX).
    pub keeps_ties: bool,
    /// The names of its layers, where they are those of one tool alone.
    pub layout: Option<Layout>,
    /// The heads of its model, as far as its files tell.
    pub attention: Attention,
    /// What the files say about themselves.
    pub facts: Facts,
    /// What is odd but readable.
    pub notices: Vec<Notice>,
}

/// A whole tensor of the base that the adapter brings its own version of.
#[derive(Clone, Debug)]
pub struct Replacement {
    /// Module path and parameter: the name in the wrapped model.
    pub name: String,
    /// The new value.
    pub tensor: Tensor,
    /// Why it is there.
    pub kind: ReplacementKind,
}

/// Why a replacement is in the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplacementKind {
    /// A module that was trained whole (`modules_to_save`), or a head that the task adds.
    Module,
    /// A trained bias (`bias = "all"` or `"lora_only"`).
    Bias,
    /// The base weight below an adapter (`base_layer.weight`), possibly with another number of rows.
    BaseLayer,
}

/// A weight of the base that the adapter was trained on a larger version of: zeros follow along each axis.
#[derive(Clone, Debug)]
pub struct Padding {
    /// Path of the module.
    pub path: String,
    /// How the path is spelled.
    pub spelling: Spelling,
    /// The shape to widen to.
    pub shape: Vec<usize>,
    /// The tensor that says so.
    pub tensor: Tensor,
}

/// Rows of an embedding.
#[derive(Clone, Debug)]
pub struct TokenRows {
    /// Module path of the embedding.
    pub path: String,
    /// Row numbers.
    pub indices: Vec<usize>,
    /// New rows, one per index.
    pub rows: Tensor,
}

/// What the files of an adapter say about themselves; none of it changes the result.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Facts {
    /// The base that the adapter names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The tool that wrote it, with its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// Other statements, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub other: BTreeMap<String, String>,
}

impl Adapter {
    /// Every tensor of the adapter.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let parameters = self
            .modules
            .iter()
            .flat_map(|module| module.parameters.iter().map(|(_, t)| t));
        parameters
            .chain(
                self.replacements
                    .iter()
                    .map(|replacement| &replacement.tensor),
            )
            .chain(self.tokens.iter().map(|tokens| &tokens.rows))
            .chain(&self.unused)
    }
}
