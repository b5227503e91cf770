//! Llama and its relatives under llama.cpp's names.
//!
//! Source: `ggml-org/llama.cpp`, `gguf-py/gguf/tensor_mapping.py` (names) and `convert_hf_to_gguf.py`
//! (`LlamaModel.permute`: the rows of q and k are stored as rotary pairs).

use super::{Family, Layout, Row, row};
use crate::naming::rows::{Heads, Rows};

/// Also Mistral and Mixtral.
pub(super) const LLAMA_GGUF: Family = Family {
    name: "llama",
    layout: Layout::Gguf,
    is_text: false,
    rows: || rows(Rows::Pairs(Heads::Query), Rows::Pairs(Heads::Key)),
};

/// `Qwen2Model` does not permute.
pub(super) const QWEN2_GGUF: Family = Family {
    name: "qwen2",
    layout: Layout::Gguf,
    is_text: false,
    rows: || rows(Rows::Whole, Rows::Whole),
};

/// Nor does `Qwen3Model`.
pub(super) const QWEN3_GGUF: Family = Family {
    name: "qwen3",
    ..QWEN2_GGUF
};

fn rows(query: Rows, key: Rows) -> Vec<Row> {
    let (hub, other) = ("model.layers.*", "blk.*");
    let mut rows: Vec<Row> = [
        ("self_attn.q_proj", "attn_q", query),
        ("self_attn.k_proj", "attn_k", key),
        ("self_attn.v_proj", "attn_v", Rows::Whole),
        ("self_attn.o_proj", "attn_output", Rows::Whole),
        ("mlp.gate_proj", "ffn_gate", Rows::Whole),
        ("mlp.up_proj", "ffn_up", Rows::Whole),
        ("mlp.down_proj", "ffn_down", Rows::Whole),
        ("input_layernorm", "attn_norm", Rows::Whole),
        ("post_attention_layernorm", "ffn_norm", Rows::Whole),
    ]
    .into_iter()
    .map(|(ours, theirs, part)| row(format!("{hub}.{ours}"), format!("{other}.{theirs}"), part))
    .collect();
    for (hub, other) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ] {
        rows.push(row(hub, other, Rows::Whole));
    }
    rows
}
