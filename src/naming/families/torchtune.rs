//! Llama and models with its names under torchtune's names.
//!
//! Source: `pytorch/torchtune`, `torchtune/models/convert_weights.py` (`_FROM_HF`, `hf_to_tune`: rows of q and k are
//! rotary pairs), `models/gemma2/_convert_weights.py` (as Llama but for norms) and
//! `models/qwen2/_convert_weights.py` (no row moves). Of Phi-3 and Phi-4 torchtune has parts of what is fused on the
//! hub, under the names of a Llama (`models/phi3/_convert_weights.py`). Norms have no adapters there.

use super::{Family, Kind, Layout, Row, row, whole};
use crate::naming::rows::{Heads, Rows};

/// Also Mistral.
pub(super) const LLAMA_TORCHTUNE: Family = Family {
    name: "llama",
    layout: Layout::Torchtune,
    kind: Kind::Language,
    rows: || model(Rows::Pairs),
};

pub(super) const GEMMA_TORCHTUNE: Family = Family {
    name: "gemma",
    ..LLAMA_TORCHTUNE
};

pub(super) const GEMMA2_TORCHTUNE: Family = Family {
    name: "gemma2",
    ..LLAMA_TORCHTUNE
};

pub(super) const QWEN2_TORCHTUNE: Family = Family {
    name: "qwen2",
    rows: || model(|_| Rows::Whole),
    ..LLAMA_TORCHTUNE
};

/// Also Phi-4; the names of its parts lead to the fused layers (`transformers`).
pub(super) const PHI3_TORCHTUNE: Family = Family {
    name: "phi3",
    ..QWEN2_TORCHTUNE
};

fn model(rotary: fn(Heads) -> Rows) -> Vec<Row> {
    const HUB: &str = "model.layers.*.";
    const OTHER: &str = "layers.*.";
    let mut rows = Vec::new();
    for (ours, theirs, heads) in [
        ("self_attn.q_proj", "attn.q_proj", Heads::Query),
        ("self_attn.k_proj", "attn.k_proj", Heads::Key),
    ] {
        let (hub, other) = (format!("{HUB}{ours}"), format!("{OTHER}{theirs}"));
        rows.push(row(hub, other, rotary(heads)));
    }
    let layers = [
        ("self_attn.v_proj", "attn.v_proj"),
        ("self_attn.o_proj", "attn.output_proj"),
        ("mlp.gate_proj", "mlp.w1"),
        ("mlp.down_proj", "mlp.w2"),
        ("mlp.up_proj", "mlp.w3"),
    ];
    whole(&mut rows, HUB, OTHER, &layers);
    let ends = [
        ("model.embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    ];
    whole(&mut rows, "", "", &ends);
    rows
}
