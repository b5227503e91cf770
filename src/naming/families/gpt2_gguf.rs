//! GPT-2 under llama.cpp's names: its layers are Conv1D, whose weights llama.cpp transposes.
//!
//! Source: `ggml-org/llama.cpp`, `gguf-py/gguf/tensor_mapping.py` (names) and `conversion/gpt2.py`
//! (`GPT2Model.modify_tensors`).

use super::{Family, Kind, Layout, row, whole};
use crate::naming::rows::Rows;

pub(super) const GPT2_GGUF: Family = Family {
    name: "gpt2",
    layout: Layout::Gguf,
    kind: Kind::Language,
    rows: || {
        let mut rows = Vec::new();
        let (hub, other) = ("transformer.h.*.", "blk.*.");
        for (ours, theirs) in [
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ] {
            let (hub, other) = (format!("{hub}{ours}"), format!("{other}{theirs}"));
            rows.push(row(hub, other, Rows::Conv1D));
        }
        let norms = [("ln_1", "attn_norm"), ("ln_2", "ffn_norm")];
        whole(&mut rows, hub, other, &norms);
        let ends = [
            ("transformer.wte", "token_embd"),
            ("transformer.wpe", "position_embd"),
            ("transformer.ln_f", "output_norm"),
            ("lm_head", "output"),
        ];
        whole(&mut rows, "", "", &ends);
        rows
    },
};
