//! The UNets of Stable Diffusion 1, 2 and XL: LDM's names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_ldm_unet_checkpoint`). Blocks have two layers, those on the way up three; a block that has
//! attention keeps it after each of them.

use super::{Denoiser, Family, Kind, Layout, Row, row};
use crate::naming::rows::Rows;

/// Also of 2.x: the blocks are the same.
pub(super) const SD1: Family = Family {
    name: "sd1",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &[
            "sd_v1",
            "sd_v2",
            "sd_1",
            "sd_2",
            "stable-diffusion-v1",
            "stable-diffusion-v2",
        ],
        part: "unet.",
        stated_by_sd_scripts: Some("sd_v1"),
        ..Denoiser::TRANSFORMER
    }),
    rows: || rows(&[true, true, true, false]),
};

pub(super) const SDXL: Family = Family {
    name: "sdxl",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["sdxl", "stable-diffusion-xl"],
        part: "unet.",
        stated_by_sd_scripts: Some("sdxl_base_v1-0"),
        ..Denoiser::TRANSFORMER
    }),
    rows: || rows(&[false, true, true]),
};

const RESNET: &[(&str, &str)] = &[
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// The same in both layouts.
const ATTENTION: &[&str] = &[
    "norm",
    "proj_in",
    "proj_out",
    "transformer_blocks.*.norm1",
    "transformer_blocks.*.norm2",
    "transformer_blocks.*.norm3",
    "transformer_blocks.*.attn1.to_q",
    "transformer_blocks.*.attn1.to_k",
    "transformer_blocks.*.attn1.to_v",
    "transformer_blocks.*.attn1.to_out.0",
    "transformer_blocks.*.attn2.to_q",
    "transformer_blocks.*.attn2.to_k",
    "transformer_blocks.*.attn2.to_v",
    "transformer_blocks.*.attn2.to_out.0",
    "transformer_blocks.*.ff.net.0.proj",
    "transformer_blocks.*.ff.net.2",
];

/// `attention`: which blocks on the way down have it; on the way up the order is reversed.
fn rows(attention: &[bool]) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |hub: String, other: String| rows.push(row(hub, other, Rows::Whole));
    for (hub, other) in [
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ] {
        add(hub.to_owned(), other.to_owned());
    }
    let resnet = |hub: &str, other: &str, add: &mut dyn FnMut(String, String)| {
        for (ours, theirs) in RESNET {
            add(format!("{hub}.{ours}"), format!("{other}.{theirs}"));
        }
    };
    let attend = |hub: &str, other: &str, add: &mut dyn FnMut(String, String)| {
        for name in ATTENTION {
            add(format!("{hub}.{name}"), format!("{other}.{name}"));
        }
    };
    let last = attention.len() - 1;
    for (block, attends) in attention.iter().enumerate() {
        let hub = format!("down_blocks.{block}");
        for layer in 0..2 {
            let other = format!("input_blocks.{}", 1 + 3 * block + layer);
            resnet(
                &format!("{hub}.resnets.{layer}"),
                &format!("{other}.0"),
                &mut add,
            );
            if *attends {
                attend(
                    &format!("{hub}.attentions.{layer}"),
                    &format!("{other}.1"),
                    &mut add,
                );
            }
        }
        if block < last {
            let other = format!("input_blocks.{}.0.op", 3 * (block + 1));
            add(format!("{hub}.downsamplers.0.conv"), other);
        }
    }
    resnet("mid_block.resnets.0", "middle_block.0", &mut add);
    attend("mid_block.attentions.0", "middle_block.1", &mut add);
    resnet("mid_block.resnets.1", "middle_block.2", &mut add);
    for (block, attends) in attention.iter().rev().enumerate() {
        let hub = format!("up_blocks.{block}");
        for layer in 0..3 {
            let other = format!("output_blocks.{}", 3 * block + layer);
            resnet(
                &format!("{hub}.resnets.{layer}"),
                &format!("{other}.0"),
                &mut add,
            );
            if *attends {
                attend(
                    &format!("{hub}.attentions.{layer}"),
                    &format!("{other}.1"),
                    &mut add,
                );
            }
        }
        if block < last {
            let place = if *attends { 2 } else { 1 };
            let other = format!("output_blocks.{}.{place}.conv", 3 * block + 2);
            add(format!("{hub}.upsamplers.0.conv"), other);
        }
    }
    rows
}
