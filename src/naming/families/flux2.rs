//! FLUX.2: Black Forest Labs' names. `linear1` of the single blocks is one layer in both.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_flux2_transformer_checkpoint_to_diffusers`).

use super::{Denoiser, Family, Kind, Layout, Row, joint_attention, row, whole};
use crate::naming::rows::Rows;

pub(super) const FLUX2: Family = Family {
    name: "flux2",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["flux2", "flux-2", "flux.2"],
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
        ("ff.linear_in", "img_mlp.0"),
        ("ff.linear_out", "img_mlp.2"),
        ("ff_context.linear_in", "txt_mlp.0"),
        ("ff_context.linear_out", "txt_mlp.2"),
    ];
    whole(&mut rows, hub, other, &layers);
    let layers = [
        ("attn.to_qkv_mlp_proj", "linear1"),
        ("attn.to_out", "linear2"),
    ];
    whole(
        &mut rows,
        "single_transformer_blocks.*.",
        "single_blocks.*.",
        &layers,
    );
    let layers = [
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        (
            "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.in_layer",
        ),
        (
            "time_guidance_embed.timestep_embedder.linear_2",
            "time_in.out_layer",
        ),
        (
            "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.in_layer",
        ),
        (
            "time_guidance_embed.guidance_embedder.linear_2",
            "guidance_in.out_layer",
        ),
        (
            "double_stream_modulation_img.linear",
            "double_stream_modulation_img.lin",
        ),
        (
            "double_stream_modulation_txt.linear",
            "double_stream_modulation_txt.lin",
        ),
        (
            "single_stream_modulation.linear",
            "single_stream_modulation.lin",
        ),
        ("proj_out", "final_layer.linear"),
    ];
    whole(&mut rows, "", "", &layers);
    rows.push(row(
        "norm_out.linear",
        "final_layer.adaLN_modulation.1",
        Rows::Swapped,
    ));
    rows
}
