//! FLUX.1 (and Chroma): Black Forest Labs' names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_flux_transformer_checkpoint_to_diffusers`).

use super::{Family, Layout, Row, row};
use crate::naming::rows::Rows;

pub(super) const FLUX1: Family = Family {
    name: "flux1",
    layout: Layout::Original,
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let third = |index| Rows::Block { index, of: 3 };
    let (hub, other) = ("transformer_blocks.*", "double_blocks.*");
    for (index, name) in ["to_q", "to_k", "to_v"].into_iter().enumerate() {
        let hub = format!("{hub}.attn.{name}");
        rows.push(row(hub, format!("{other}.img_attn.qkv"), third(index)));
    }
    for (index, name) in ["add_q_proj", "add_k_proj", "add_v_proj"]
        .into_iter()
        .enumerate()
    {
        let hub = format!("{hub}.attn.{name}");
        rows.push(row(hub, format!("{other}.txt_attn.qkv"), third(index)));
    }
    for (ours, theirs) in [
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
    ] {
        let (hub, other) = (format!("{hub}.{ours}"), format!("{other}.{theirs}"));
        rows.push(row(hub, other, Rows::Whole));
    }
    let (hub, other) = ("single_transformer_blocks.*", "single_blocks.*");
    for (name, part) in [
        ("attn.to_q", Rows::Square { index: 0 }),
        ("attn.to_k", Rows::Square { index: 1 }),
        ("attn.to_v", Rows::Square { index: 2 }),
        ("proj_mlp", Rows::Rest { after: 3 }),
    ] {
        rows.push(row(
            format!("{hub}.{name}"),
            format!("{other}.linear1"),
            part,
        ));
    }
    for (ours, theirs) in [
        ("proj_out", "linear2"),
        ("norm.linear", "modulation.lin"),
        ("attn.norm_q", "norm.query_norm"),
        ("attn.norm_k", "norm.key_norm"),
    ] {
        let (hub, other) = (format!("{hub}.{ours}"), format!("{other}.{theirs}"));
        rows.push(row(hub, other, Rows::Whole));
    }
    for (hub, other) in [
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
    ] {
        rows.push(row(hub, other, Rows::Whole));
    }
    // Shift and scale change places.
    rows.push(row(
        "norm_out.linear",
        "final_layer.adaLN_modulation.1",
        Rows::Swapped,
    ));
    rows
}
