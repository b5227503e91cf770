//! GPT-NeoX, Bloom and Falcon under llama.cpp's names: query, key and value are one layer, whose rows the
//! hub has by head, and GGUF by kind.
//!
//! Source: `ggml-org/llama.cpp`, `gguf-py/gguf/tensor_mapping.py` (names) and `convert_hf_to_gguf.py`
//! (`GPTNeoXModel`, `BloomModel` and `FalconModel`, `modify_tensors`).

use super::{Family, Kind, Layout, Row, row, whole};
use crate::naming::rows::Rows;

pub(super) const GPTNEOX_GGUF: Family = Family {
    name: "gptneox",
    layout: Layout::Gguf,
    kind: Kind::Language,
    rows: || {
        let mut rows = model("gpt_neox.layers.*.", "attention");
        let norms = [
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ];
        whole(&mut rows, "gpt_neox.layers.*.", "blk.*.", &norms);
        let ends = [
            ("gpt_neox.embed_in", "token_embd"),
            ("gpt_neox.final_layer_norm", "output_norm"),
            ("embed_out", "output"),
        ];
        whole(&mut rows, "", "", &ends);
        rows
    },
};

pub(super) const BLOOM_GGUF: Family = Family {
    name: "bloom",
    rows: || {
        let mut rows = model("transformer.h.*.", "self_attention");
        let norms = [
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ];
        whole(&mut rows, "transformer.h.*.", "blk.*.", &norms);
        let first = [("word_embeddings_layernorm", "token_embd_norm")];
        whole(&mut rows, "transformer.", "", &first);
        whole(&mut rows, "", "", ENDS);
        rows
    },
    ..GPTNEOX_GGUF
};

/// Without the norms of its blocks, whose names depend on the kind of decoder.
pub(super) const FALCON_GGUF: Family = Family {
    name: "falcon",
    rows: || {
        let mut rows = model("transformer.h.*.", "self_attention");
        whole(&mut rows, "", "", ENDS);
        rows
    },
    ..GPTNEOX_GGUF
};

const ENDS: &[(&str, &str)] = &[
    ("transformer.word_embeddings", "token_embd"),
    ("transformer.ln_f", "output_norm"),
    ("lm_head", "output"),
];

fn model(hub: &str, attention: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let fused = format!("{hub}{attention}.query_key_value");
    rows.push(row(fused, "blk.*.attn_qkv", Rows::Regrouped));
    let output = format!("{hub}{attention}.dense");
    rows.push(row(output, "blk.*.attn_output", Rows::Whole));
    let layers = [
        ("mlp.dense_h_to_4h", "ffn_up"),
        ("mlp.dense_4h_to_h", "ffn_down"),
    ];
    whole(&mut rows, hub, "blk.*.", &layers);
    rows
}
