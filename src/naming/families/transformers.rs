//! Names that transformers changed: those of its version 4, which files still have, and those of version 5,
//! where adapters are trained; and what exports put in front of either.
//!
//! Source: `huggingface/transformers` 5.23, `conversion_mapping.py` and `base_model_prefix` of the models.
//! Unlike the other tables this one describes the ends of paths, whatever stands before them.

use super::{Family, Kind, Layout, Row, row, thirds_of_heads, whole};
use crate::naming::rows::Rows;

/// Every family: the hub's names are those of files.
pub(super) static TRANSFORMERS: &[Family] = &[VIT, DINOV2, EXPERTS, GPT_NEOX, PHI3];

/// ViT, DeiT, BEiT, ViViT, AST.
const VIT: Family = Family {
    name: "vit",
    layout: Layout::Transformers,
    kind: Kind::Language,
    rows: || {
        let (hub, other) = ("encoder.layer.*", "layers.*");
        let mut rows = attention(&format!("{hub}."), &format!("{other}."));
        let layers = [
            (".intermediate.dense", ".mlp.fc1"),
            (".output.dense", ".mlp.fc2"),
            (".layernorm_before", ".layernorm_before"),
            (".layernorm_after", ".layernorm_after"),
            ("", ""), // parameters of the block itself
        ];
        whole(&mut rows, hub, other, &layers);
        rows
    },
};

const DINOV2: Family = Family {
    name: "dinov2",
    rows: || {
        let mut rows = attention("", "");
        // In files the two are one layer.
        for (index, layer) in ["mlp.gate_proj", "mlp.up_proj"].into_iter().enumerate() {
            rows.push(row(layer, "mlp.weights_in", Rows::Block { index, of: 2 }));
        }
        rows.push(row("mlp.down_proj", "mlp.weights_out", Rows::Whole));
        rows
    },
    ..VIT
};

/// Mixtral, MiniMax and PhiMoE, whose block of experts is called otherwise as well; Qwen and many others.
const EXPERTS: Family = Family {
    name: "experts",
    rows: || {
        let mut rows = Vec::new();
        let blocks = [("", ""), (".gate", ".gate"), (".gate", ".router")];
        whole(&mut rows, "block_sparse_moe", "mlp", &blocks);
        for (layer, fused, part, of) in [
            ("w1", "gate_up_proj", 0, 2),
            ("w3", "gate_up_proj", 1, 2),
            ("w2", "down_proj", 0, 1),
            ("gate_proj", "gate_up_proj", 0, 2),
            ("up_proj", "gate_up_proj", 1, 2),
            ("down_proj", "down_proj", 0, 1),
        ] {
            let expert = 0; // the last number of the hub's name tells
            for (hub, other) in [("", ""), ("block_sparse_moe.", "mlp.")] {
                rows.push(row(
                    format!("{hub}experts.*.{layer}"),
                    format!("{other}experts.{fused}"),
                    Rows::Expert { expert, part, of },
                ));
            }
        }
        rows
    },
    ..VIT
};

const GPT_NEOX: Family = Family {
    name: "gpt_neox",
    rows: || vec![row("embed_out", "lm_head", Rows::Whole)],
    ..VIT
};

/// Phi-3 and Phi-4, of which other libraries make a Llama, whose layers are not fused (`pytorch/torchtune`,
/// `models/phi3/_convert_weights.py`; `Lightning-AI/litgpt`, `copy_weights_phi`).
const PHI3: Family = Family {
    name: "phi3",
    rows: || {
        let mut rows = Vec::new();
        let projections = ["q_proj", "k_proj", "v_proj"];
        thirds_of_heads(&mut rows, "self_attn.", projections, "self_attn.qkv_proj");
        for (index, layer) in ["gate_proj", "up_proj"].into_iter().enumerate() {
            let (hub, halves) = (format!("mlp.{layer}"), Rows::Block { index, of: 2 });
            rows.push(row(hub, "mlp.gate_up_proj", halves));
        }
        rows
    },
    ..VIT
};

fn attention(hub: &str, other: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let layers = [
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ];
    whole(&mut rows, hub, other, &layers);
    rows
}

/// What differs in front of the names of one model: wrappers, and the name of the model in a larger one.
pub(in crate::naming) const PREFIXES: &[&str] = &[
    "",
    "model.",
    "model.model.",
    "model.language_model.",
    "model.text_model.",
    "language_model.",
    "language_model.model.",
    "model.decoder.",
    "decoder.",
    "transformer.",
    "gpt_neox.",
    "backbone.",
    "bert.",
    "roberta.",
    "distilbert.",
    "electra.",
    "albert.",
    "deberta.",
    "mpnet.",
    "esm.",
    "vit.",
    "deit.",
    "beit.",
    "vivit.",
    "audio_spectrogram_transformer.",
    "dinov2.",
    "text_model.",
    "vision_model.",
    "auto_model.",
    "0.auto_model.",
    "base_model.model.",
    "module.",
    "_orig_mod.",
];

/// Ends of prefixes that name a part of a model, where the others only wrap the whole.
const TOWERS: &[&str] = &["text_model.", "vision_model.", "decoder."];

/// A path under every prefix that may stand for its own and is wanted, itself first.
pub(in crate::naming) fn prefixed<'a>(
    path: &'a str,
    wanted: impl Fn(&str) -> bool + Copy + 'a,
) -> impl Iterator<Item = String> + 'a {
    let others = PREFIXES.iter().filter_map(move |old| {
        let rest = path.strip_prefix(old)?;
        // The towers of one model are not spellings of each other.
        let own = tower(old);
        let fits = move |new: &&&str| {
            wanted(new) && (own.is_none() || tower(new).is_none_or(|new| own == Some(new)))
        };
        let spelled = PREFIXES.iter().filter(fits);
        Some(spelled.map(move |new| format!("{new}{rest}")))
    });
    std::iter::once(path.to_owned()).chain(others.flatten())
}

fn tower(prefix: &str) -> Option<&'static str> {
    TOWERS.iter().copied().find(|tower| prefix.ends_with(tower))
}
