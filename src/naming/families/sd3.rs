//! Stable Diffusion 3 and 3.5: Stability's names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_sd3_transformer_checkpoint_to_diffusers`). The context of the last block is modulated by scale
//! and shift alone, which change places; its layer is told by its height.

use super::{Denoiser, Family, Kind, Layout, Row, joint_attention, row, thirds, whole};
use crate::naming::rows::Rows;

pub(super) const SD3: Family = Family {
    name: "sd3",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["sd3", "stable-diffusion-3"],
        stated_by_sd_scripts: None,
        network_of_sd_scripts: "networks.lora_sd3",
        ..Denoiser::TRANSFORMER
    }),
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let (hub, other) = ("transformer_blocks.*.", "joint_blocks.*.");
    let image = "joint_blocks.*.x_block.attn.qkv";
    joint_attention(
        &mut rows,
        hub,
        image,
        "joint_blocks.*.context_block.attn.qkv",
    );
    let second = ["attn2.to_q", "attn2.to_k", "attn2.to_v"];
    thirds(&mut rows, hub, second, "joint_blocks.*.x_block.attn2.qkv");
    let layers = [
        ("attn.to_out.0", "x_block.attn.proj"),
        ("attn.to_add_out", "context_block.attn.proj"),
        ("attn2.to_out.0", "x_block.attn2.proj"),
        ("ff.net.0.proj", "x_block.mlp.fc1"),
        ("ff.net.2", "x_block.mlp.fc2"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("attn.norm_q", "x_block.attn.ln_q"),
        ("attn.norm_k", "x_block.attn.ln_k"),
        ("attn.norm_added_q", "context_block.attn.ln_q"),
        ("attn.norm_added_k", "context_block.attn.ln_k"),
        ("attn2.norm_q", "x_block.attn2.ln_q"),
        ("attn2.norm_k", "x_block.attn2.ln_k"),
    ];
    whole(&mut rows, hub, other, &layers);
    rows.push(row(
        format!("{hub}norm1_context.linear"),
        format!("{other}context_block.adaLN_modulation.1"),
        Rows::SwappedPair,
    ));
    let layers = [
        ("pos_embed.proj", "x_embedder.proj"),
        ("context_embedder", "context_embedder"),
        (
            "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.0",
        ),
        (
            "time_text_embed.timestep_embedder.linear_2",
            "t_embedder.mlp.2",
        ),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
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
