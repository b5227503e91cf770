//! T5 (with gates: v1.1, Flan, UMT5) and its encoder alone under llama.cpp's names.
//!
//! Source: `ggml-org/llama.cpp`, `gguf-py/gguf/tensor_mapping.py` (names) and `conversion/t5.py`
//! (`T5Model`, `T5EncoderModel`).

use super::{Family, Kind, Layout, Row, whole};

pub(super) const T5_GGUF: Family = Family {
    name: "t5",
    layout: Layout::Gguf,
    kind: Kind::Language,
    rows: || {
        let mut rows = encoder();
        let layers = [
            ("layer.0.SelfAttention.", "attn_"),
            ("layer.1.EncDecAttention.", "cross_attn_"),
        ];
        for (ours, theirs) in layers {
            attention(
                &mut rows,
                &format!("decoder.block.*.{ours}"),
                &format!("dec.blk.*.{theirs}"),
            );
        }
        let norms = [
            ("layer.0.layer_norm", "attn_norm"),
            ("layer.1.layer_norm", "cross_attn_norm"),
        ];
        whole(&mut rows, "decoder.block.*.", "dec.blk.*.", &norms);
        gated(&mut rows, "decoder.block.*.layer.2.", "dec.blk.*.");
        let ends = [
            ("decoder.final_layer_norm", "dec.output_norm"),
            ("lm_head", "output"),
        ];
        whole(&mut rows, "", "", &ends);
        rows
    },
};

pub(super) const T5_ENCODER_GGUF: Family = Family {
    name: "t5encoder",
    rows: encoder,
    ..T5_GGUF
};

fn encoder() -> Vec<Row> {
    let mut rows = Vec::new();
    let (hub, other) = ("encoder.block.*.", "enc.blk.*.");
    attention(
        &mut rows,
        &format!("{hub}layer.0.SelfAttention."),
        &format!("{other}attn_"),
    );
    whole(
        &mut rows,
        hub,
        other,
        &[("layer.0.layer_norm", "attn_norm")],
    );
    gated(&mut rows, &format!("{hub}layer.1."), other);
    let ends = [
        ("encoder.final_layer_norm", "enc.output_norm"),
        ("shared", "token_embd"),
    ];
    whole(&mut rows, "", "", &ends);
    rows
}

fn attention(rows: &mut Vec<Row>, hub: &str, other: &str) {
    let layers = [
        ("q", "q"),
        ("k", "k"),
        ("v", "v"),
        ("o", "o"),
        ("relative_attention_bias", "rel_b"),
    ];
    whole(rows, hub, other, &layers);
}

fn gated(rows: &mut Vec<Row>, hub: &str, other: &str) {
    let layers = [
        ("DenseReluDense.wi_0", "ffn_gate"),
        ("DenseReluDense.wi_1", "ffn_up"),
        ("DenseReluDense.wo", "ffn_down"),
        ("layer_norm", "ffn_norm"),
    ];
    whole(rows, hub, other, &layers);
}
