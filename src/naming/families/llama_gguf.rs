//! Llama and models with its names under llama.cpp's names.
//!
//! Source: `ggml-org/llama.cpp`, `gguf-py/gguf/tensor_mapping.py` (names) and `convert_hf_to_gguf.py`
//! (`LlamaModel.permute`: the rows of q and k are stored as rotary pairs; no other model here permutes).

use super::{Family, Kind, Layout, Row, experts, row, whole};
use crate::naming::rows::{Heads, Rows};

/// Also Mistral and Mixtral.
pub(super) const LLAMA_GGUF: Family = Family {
    name: "llama",
    layout: Layout::Gguf,
    kind: Kind::Language,
    rows: || {
        let mut rows = model(&[VALUES, GATED, NORMS].concat());
        for (ours, theirs, heads) in [
            ("self_attn.q_proj", "attn_q", Heads::Query),
            ("self_attn.k_proj", "attn_k", Heads::Key),
        ] {
            let (hub, other) = (format!("{HUB}{ours}"), format!("{OTHER}{theirs}"));
            rows.push(row(hub, other, Rows::Pairs(heads)));
        }
        whole(&mut rows, "", "", &[FINAL_NORM]);
        let router = [("block_sparse_moe.gate", "ffn_gate_inp")];
        whole(&mut rows, HUB, OTHER, &router);
        let hub = format!("{HUB}block_sparse_moe.experts.*.");
        let layers = [("w1", "gate"), ("w2", "down"), ("w3", "up")];
        stacks(&mut rows, &hub, &layers);
        rows
    },
};

pub(super) const QWEN2_GGUF: Family = Family {
    name: "qwen2",
    rows: || {
        let mut rows = model(&[QUERIES, VALUES, GATED, NORMS].concat());
        whole(&mut rows, "", "", &[FINAL_NORM]);
        rows
    },
    ..LLAMA_GGUF
};

pub(super) const QWEN3_GGUF: Family = Family {
    name: "qwen3",
    ..QWEN2_GGUF
};

pub(super) const QWEN2MOE_GGUF: Family = Family {
    name: "qwen2moe",
    rows: || {
        let mut rows = (QWEN2_GGUF.rows)();
        let layers = [
            ("mlp.gate", "ffn_gate_inp"),
            ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
            ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
            ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
            ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
        ];
        whole(&mut rows, HUB, OTHER, &layers);
        let hub = format!("{HUB}mlp.experts.*.");
        let layers = [
            ("gate_proj", "gate"),
            ("up_proj", "up"),
            ("down_proj", "down"),
        ];
        stacks(&mut rows, &hub, &layers);
        rows
    },
    ..LLAMA_GGUF
};

/// `Qwen3MoeModel` is a `Qwen2MoeModel`.
pub(super) const QWEN3MOE_GGUF: Family = Family {
    name: "qwen3moe",
    ..QWEN2MOE_GGUF
};

/// Without its norms: GGUF stores them with 1 added (`norm_shift`).
pub(super) const GEMMA2_GGUF: Family = Family {
    name: "gemma2",
    rows: || model(&[QUERIES, VALUES, GATED].concat()),
    ..LLAMA_GGUF
};

pub(super) const GEMMA3_GGUF: Family = Family {
    name: "gemma3",
    ..GEMMA2_GGUF
};

pub(super) const PHI3_GGUF: Family = Family {
    name: "phi3",
    rows: || {
        let layers = [
            ("self_attn.qkv_proj", "attn_qkv"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ];
        let mut rows = model(&[&layers, NORMS].concat());
        whole(&mut rows, "", "", &[FINAL_NORM]);
        rows
    },
    ..LLAMA_GGUF
};

pub(super) const STARCODER2_GGUF: Family = Family {
    name: "starcoder2",
    rows: || {
        let layers = [("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down")];
        let mut rows = model(&[QUERIES, VALUES, &layers, NORMS].concat());
        whole(&mut rows, "", "", &[FINAL_NORM]);
        rows
    },
    ..LLAMA_GGUF
};

pub(super) const STABLELM_GGUF: Family = Family {
    name: "stablelm",
    ..QWEN2_GGUF
};

/// Command-R.
pub(super) const COMMAND_R_GGUF: Family = Family {
    name: "command-r",
    rows: || {
        let norm = [("input_layernorm", "attn_norm")];
        let mut rows = model(&[QUERIES, VALUES, GATED, &norm].concat());
        whole(&mut rows, "", "", &[FINAL_NORM]);
        rows
    },
    ..LLAMA_GGUF
};

pub(super) const OLMO2_GGUF: Family = Family {
    name: "olmo2",
    rows: || {
        let norms = [
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ];
        let mut rows = model(&[QUERIES, VALUES, GATED, &norms].concat());
        whole(&mut rows, "", "", &[FINAL_NORM]);
        rows
    },
    ..LLAMA_GGUF
};

pub(super) const GLM4_GGUF: Family = Family {
    name: "glm4",
    rows: || {
        let layers = [
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("post_self_attn_layernorm", "post_attention_norm"),
            ("post_mlp_layernorm", "post_ffw_norm"),
        ];
        let mut rows = model(&[QUERIES, VALUES, &layers, NORMS].concat());
        whole(&mut rows, "", "", &[FINAL_NORM]);
        rows
    },
    ..LLAMA_GGUF
};

/// Without its experts, which are one tensor on the hub as well, with gate and up interleaved.
pub(super) const GPT_OSS_GGUF: Family = Family {
    name: "gpt-oss",
    rows: || {
        let layers = [
            ("mlp.router", "ffn_gate_inp"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
        ];
        let mut rows = model(&[QUERIES, VALUES, &layers].concat());
        whole(&mut rows, "", "", &[FINAL_NORM]);
        rows
    },
    ..LLAMA_GGUF
};

const HUB: &str = "model.layers.*.";
const OTHER: &str = "blk.*.";

const QUERIES: &[(&str, &str)] = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
];
const VALUES: &[(&str, &str)] = &[
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
];
const GATED: &[(&str, &str)] = &[
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
const NORMS: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];
const FINAL_NORM: (&str, &str) = ("model.norm", "output_norm");

/// The layers of a block, and both embeddings.
fn model(layers: &[(&str, &str)]) -> Vec<Row> {
    let mut rows = Vec::new();
    whole(&mut rows, HUB, OTHER, layers);
    let ends = [("model.embed_tokens", "token_embd"), ("lm_head", "output")];
    whole(&mut rows, "", "", &ends);
    rows
}

fn stacks(rows: &mut Vec<Row>, hub: &str, layers: &[(&str, &str)]) {
    for (ours, theirs) in layers {
        experts(rows, hub, OTHER, &[(ours, &format!("ffn_{theirs}_exps"))]);
    }
}
