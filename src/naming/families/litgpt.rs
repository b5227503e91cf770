//! Language models under LitGPT's names: queries, keys and values are one layer, one kind below the other.
//!
//! Source: `Lightning-AI/litgpt` 0.5.13, `litgpt/scripts/convert_hf_checkpoint.py` (`copy_weights_*`,
//! `qkv_reassemble`). Of Phi-3 and Phi-4 LitGPT has halves of `gate_up_proj`, under the names of a Llama
//! (`copy_weights_phi`). Norms have no adapters there.

use super::{Family, Kind, Layout, Row, row, thirds_of_heads, whole};
use crate::naming::rows::Rows;

/// Also Mistral and Mixtral.
pub(super) const LLAMA_LITGPT: Family = Family {
    name: "llama",
    layout: Layout::Litgpt,
    kind: Kind::Language,
    rows: || {
        let mut rows = model("self_attn.o_proj", GATED);
        let experts = [("w1", "fc_1"), ("w2", "proj"), ("w3", "fc_2")];
        mixture(&mut rows, "block_sparse_moe", &experts);
        rows
    },
};

pub(super) const QWEN2_LITGPT: Family = Family {
    name: "qwen2",
    rows: || model("self_attn.o_proj", GATED),
    ..LLAMA_LITGPT
};

pub(super) const QWEN3_LITGPT: Family = Family {
    name: "qwen3",
    ..QWEN2_LITGPT
};

pub(super) const QWEN3MOE_LITGPT: Family = Family {
    name: "qwen3moe",
    rows: || {
        let mut rows = model("self_attn.o_proj", &[]);
        let experts = [
            ("gate_proj", "fc_1"),
            ("down_proj", "proj"),
            ("up_proj", "fc_2"),
        ];
        mixture(&mut rows, "mlp", &experts);
        rows
    },
    ..LLAMA_LITGPT
};

pub(super) const GEMMA_LITGPT: Family = Family {
    name: "gemma",
    ..QWEN2_LITGPT
};

pub(super) const GEMMA2_LITGPT: Family = Family {
    name: "gemma2",
    ..QWEN2_LITGPT
};

pub(super) const GEMMA3_LITGPT: Family = Family {
    name: "gemma3",
    ..QWEN2_LITGPT
};

pub(super) const OLMO2_LITGPT: Family = Family {
    name: "olmo2",
    ..QWEN2_LITGPT
};

/// Phi-1 and Phi-2.
pub(super) const PHI_LITGPT: Family = Family {
    name: "phi2",
    rows: || {
        let layers = [("mlp.fc1", "mlp.fc"), ("mlp.fc2", "mlp.proj")];
        model("self_attn.dense", &layers)
    },
    ..LLAMA_LITGPT
};

/// Also Phi-4; the names of the halves lead to the fused layer (`transformers`).
pub(super) const PHI3_LITGPT: Family = Family {
    name: "phi3",
    rows: || {
        let mut rows = Vec::new();
        let attention = [
            ("self_attn.qkv_proj", "attn.qkv"),
            ("self_attn.o_proj", "attn.proj"),
        ];
        whole(&mut rows, HUB, OTHER, &attention);
        whole(&mut rows, HUB, OTHER, GATED);
        whole(&mut rows, "", "", ENDS);
        rows
    },
    ..LLAMA_LITGPT
};

/// Pythia; on the hub by head, here by kind.
pub(super) const GPTNEOX_LITGPT: Family = Family {
    name: "gptneox",
    rows: || {
        let ends = [
            ("gpt_neox.embed_in", "transformer.wte"),
            ("embed_out", "lm_head"),
        ];
        by_head("gpt_neox.layers.*.", "attention", &ends)
    },
    ..LLAMA_LITGPT
};

pub(super) const FALCON_LITGPT: Family = Family {
    name: "falcon",
    rows: || {
        let ends = [
            ("transformer.word_embeddings", "transformer.wte"),
            ("lm_head", "lm_head"),
        ];
        by_head("transformer.h.*.", "self_attention", &ends)
    },
    ..LLAMA_LITGPT
};

const HUB: &str = "model.layers.*.";
const OTHER: &str = "transformer.h.*.";

const GATED: &[(&str, &str)] = &[
    ("mlp.gate_proj", "mlp.fc_1"),
    ("mlp.up_proj", "mlp.fc_2"),
    ("mlp.down_proj", "mlp.proj"),
];

const ENDS: &[(&str, &str)] = &[
    ("model.embed_tokens", "transformer.wte"),
    ("lm_head", "lm_head"),
];

fn model(output: &str, layers: &[(&str, &str)]) -> Vec<Row> {
    let mut rows = Vec::new();
    let projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
    thirds_of_heads(&mut rows, HUB, projections, &format!("{OTHER}attn.qkv"));
    whole(&mut rows, HUB, OTHER, &[(output, "attn.proj")]);
    whole(&mut rows, HUB, OTHER, layers);
    whole(&mut rows, "", "", ENDS);
    rows
}

/// The router and the experts, each of them a layer of its own under both names.
fn mixture(rows: &mut Vec<Row>, hub: &str, layers: &[(&str, &str)]) {
    let (hub, other) = (format!("{HUB}{hub}."), format!("{OTHER}mlp."));
    whole(rows, &hub, &other, &[("gate", "gate")]);
    let (hub, other) = (format!("{hub}experts.*."), format!("{other}experts.*."));
    whole(rows, &hub, &other, layers);
}

fn by_head(hub: &str, attention: &str, ends: &[(&str, &str)]) -> Vec<Row> {
    let mut rows = Vec::new();
    let fused = format!("{hub}{attention}.query_key_value");
    rows.push(row(fused, format!("{OTHER}attn.qkv"), Rows::Regrouped));
    let output = format!("{attention}.dense");
    let layers = [
        (&*output, "attn.proj"),
        ("mlp.dense_h_to_4h", "mlp.fc"),
        ("mlp.dense_4h_to_h", "mlp.proj"),
    ];
    whole(&mut rows, hub, OTHER, &layers);
    whole(&mut rows, "", "", ends);
    rows
}
