//! HunyuanVideo: Tencent's names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_hunyuan_video_transformer_to_diffusers`).

use super::{
    Denoiser, Family, Kind, Layout, PROJECTIONS, Row, joint_attention, row, squares, thirds, whole,
};
use crate::naming::rows::Rows;

pub(super) const HUNYUAN_VIDEO: Family = Family {
    name: "hunyuan-video",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["hunyuan-video", "hunyuanvideo"],
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
        "double_blocks.*.img_attn_qkv",
        "double_blocks.*.txt_attn_qkv",
    );
    let layers = [
        ("attn.to_out.0", "img_attn_proj"),
        ("attn.to_add_out", "txt_attn_proj"),
        ("ff.net.0.proj", "img_mlp.fc1"),
        ("ff.net.2", "img_mlp.fc2"),
        ("ff_context.net.0.proj", "txt_mlp.fc1"),
        ("ff_context.net.2", "txt_mlp.fc2"),
        ("norm1.linear", "img_mod.linear"),
        ("norm1_context.linear", "txt_mod.linear"),
        ("attn.norm_q", "img_attn_q_norm"),
        ("attn.norm_k", "img_attn_k_norm"),
        ("attn.norm_added_q", "txt_attn_q_norm"),
        ("attn.norm_added_k", "txt_attn_k_norm"),
    ];
    whole(&mut rows, hub, other, &layers);
    let (hub, other) = ("single_transformer_blocks.*.", "single_blocks.*.");
    squares(&mut rows, hub, "proj_mlp", "single_blocks.*.linear1");
    let layers = [
        ("proj_out", "linear2"),
        ("norm.linear", "modulation.linear"),
        ("attn.norm_q", "q_norm"),
        ("attn.norm_k", "k_norm"),
    ];
    whole(&mut rows, hub, other, &layers);
    let hub = "context_embedder.token_refiner.refiner_blocks.*.";
    let other = "txt_in.individual_token_refiner.blocks.*.";
    thirds(
        &mut rows,
        hub,
        PROJECTIONS,
        &format!("{other}self_attn_qkv"),
    );
    let layers = [
        ("attn.to_out.0", "self_attn_proj"),
        ("ff.net.0.proj", "mlp.fc1"),
        ("ff.net.2", "mlp.fc2"),
        ("norm_out.linear", "adaLN_modulation.1"),
    ];
    whole(&mut rows, hub, other, &layers);
    let layers = [
        ("x_embedder.proj", "img_in.proj"),
        ("context_embedder.proj_in", "txt_in.input_embedder"),
        (
            "context_embedder.time_text_embed.timestep_embedder.linear_1",
            "txt_in.t_embedder.mlp.0",
        ),
        (
            "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.t_embedder.mlp.2",
        ),
        (
            "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.0",
        ),
        (
            "time_text_embed.timestep_embedder.linear_2",
            "time_in.mlp.2",
        ),
        (
            "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.0",
        ),
        (
            "time_text_embed.guidance_embedder.linear_2",
            "guidance_in.mlp.2",
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
    rows.push(row(
        "norm_out.linear",
        "final_layer.adaLN_modulation.1",
        Rows::Swapped,
    ));
    rows
}
