//! BERT encoders under llama.cpp's names.
//!
//! Source: `ggml-org/llama.cpp`, `gguf-py/gguf/tensor_mapping.py` (names) and `conversion/bert.py` (`BertModel`,
//! which leaves the pooler out).

use super::{Family, Kind, Layout, whole};

pub(super) const BERT_GGUF: Family = Family {
    name: "bert",
    layout: Layout::Gguf,
    kind: Kind::Language,
    rows: || {
        let mut rows = Vec::new();
        let layers = [
            ("attention.self.query", "attn_q"),
            ("attention.self.key", "attn_k"),
            ("attention.self.value", "attn_v"),
            ("attention.output.dense", "attn_output"),
            ("attention.output.LayerNorm", "attn_output_norm"),
            ("intermediate.dense", "ffn_up"),
            ("output.dense", "ffn_down"),
            ("output.LayerNorm", "layer_output_norm"),
        ];
        whole(&mut rows, "encoder.layer.*.", "blk.*.", &layers);
        let first = [
            ("word_embeddings", "token_embd"),
            ("position_embeddings", "position_embd"),
            ("token_type_embeddings", "token_types"),
            ("LayerNorm", "token_embd_norm"),
        ];
        whole(&mut rows, "embeddings.", "", &first);
        rows
    },
};
