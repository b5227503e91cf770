//! Qwen-Image, which has the same names everywhere; here so that flattened ones can be looked up.
//!
//! Source: `huggingface/diffusers` 0.42.1, `models/transformers/transformer_qwenimage.py`.

use super::{Denoiser, Family, Kind, Layout, Row, whole};

pub(super) const QWEN_IMAGE: Family = Family {
    name: "qwen-image",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["qwen-image", "qwen_image"],
        ..Denoiser::TRANSFORMER
    }),
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for name in [
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
        "img_mod.1",
        "txt_mod.1",
    ] {
        let block = "transformer_blocks.*.";
        whole(&mut rows, block, block, &[(name, name)]);
    }
    for name in [
        "img_in",
        "txt_in",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
    ] {
        whole(&mut rows, "", "", &[(name, name)]);
    }
    rows
}
