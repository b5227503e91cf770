//! FLUX.1 (and Chroma): Black Forest Labs' names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_flux_transformer_checkpoint_to_diffusers`).

use super::{Denoiser, Family, Kind, Layout, Row, joint_attention, row, squares, whole};
use crate::naming::rows::Rows;

pub(super) const FLUX1: Family = Family {
    name: "flux1",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["flux1", "flux-1", "flux.1", "chroma"],
        stated_by_sd_scripts: Some("flux1"),
        network_of_sd_scripts: "networks.lora_flux",
        ..Denoiser::TRANSFORMER
    }),
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let (hub, other) = ("transformer_blocks.*.", "double_blocks.*.");
    joint_attention(
        &mut rows,
        hub,
        "double_blocks.*.img_attn.qkv",
        "double_blocks.*.txt_attn.qkv",
    );
    let layers = [
        ("attn.to_out.0", "img_attn.proj"),
        ("attn.to_add_out", "txt_attn.proj"),
        ("ff.net.0.proj", "img_mlp.0"),
        ("ff.net.2", "img_mlp.2"),
        ("ff_context.net.0.proj", "txt_mlp.0"),
        ("ff_context.net.2", "txt_mlp.2"),
        ("norm1.linear", "img_mod.lin"),
        ("norm1_context.linear", "txt_mod.lin"),
        ("attn.norm_q", "img_attn.norm.query_norm"),
        ("attn.norm_k", "img_attn.norm.key_norm"),
        ("attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("attn.norm_added_k", "txt_attn.norm.key_norm"),
    ];
    whole(&mut rows, hub, other, &layers);
    let (hub, other) = ("single_transformer_blocks.*.", "single_blocks.*.");
    squares(&mut rows, hub, "proj_mlp", "single_blocks.*.linear1");
    let layers = [
        ("proj_out", "linear2"),
        ("norm.linear", "modulation.lin"),
        ("attn.norm_q", "norm.query_norm"),
        ("attn.norm_k", "norm.key_norm"),
    ];
    whole(&mut rows, hub, other, &layers);
    let layers = [
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        (
            "time_text_embed.timestep_embedder.linear_1",
            "time_in.in_layer",
        ),
        (
            "time_text_embed.timestep_embedder.linear_2",
            "time_in.out_layer",
        ),
        (
            "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.in_layer",
        ),
        (
            "time_text_embed.guidance_embedder.linear_2",
            "guidance_in.out_layer",
        ),
        (
            "time_text_embed.text_embedder.linear_1",
            "vector_in.in_layer",
        ),
        (
            "time_text_embed.text_embedder.linear_2",
            "vector_in.out_layer",
        ),
        ("proj_out", "final_layer.linear"),
    ];
    whole(&mut rows, "", "", &layers);
    // Shift and scale change places.
    rows.push(row(
        "norm_out.linear",
        "final_layer.adaLN_modulation.1",
        Rows::Swapped,
    ));
    rows
}
