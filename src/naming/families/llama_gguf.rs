//! Llama, Mistral and Mixtral under llama.cpp's names.
//!
//! Source: `ggml-org/llama.cpp`, `gguf-py/gguf/tensor_mapping.py` (names) and `convert_hf_to_gguf.py`
//! (`LlamaModel.permute`: the rows of q and k are stored as rotary pairs).

use super::{Family, Layout, Row, row};
use crate::naming::rows::{Heads, Rows};

pub(super) const LLAMA_GGUF: Family = Family {
    name: "llama",
    layout: Layout::Gguf,
    is_text: false,
    rows,
};

fn rows() -> Vec<Row> {
    let (hub, other) = ("model.layers.*", "blk.*");
    let mut rows: Vec<Row> = [
        ("self_attn.q_proj", "attn_q", Rows::Pairs(Heads::Query)),
        ("self_attn.k_proj", "attn_k", Rows::Pairs(Heads::Key)),
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
