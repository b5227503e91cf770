//! Lumina-Image 2.0, and Z-Image, which has its blocks: their authors' names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py` (`convert_lumina2_to_diffusers`,
//! `convert_z_image_transformer_checkpoint_to_diffusers`). Lumina has 24 heads of queries and 8 of keys, which its
//! converter has built in.

use super::{Denoiser, Family, Kind, Layout, Row, row, whole};
use crate::naming::rows::Rows;

pub(super) const LUMINA2: Family = Family {
    name: "lumina2",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["lumina2", "lumina-2"],
        ..Denoiser::TRANSFORMER
    }),
    rows: lumina,
};

pub(super) const Z_IMAGE: Family = Family {
    name: "z-image",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["z-image", "zimage"],
        ..Denoiser::TRANSFORMER
    }),
    rows: z_image,
};

/// The stacks of blocks, and whether the blocks see the time.
const STACKS: &[(&str, bool)] = &[
    ("layers.*.", true),
    ("noise_refiner.*.", true),
    ("context_refiner.*.", false),
];

/// An attention with the shares of query, key and value in the rows of `qkv`.
fn attention(rows: &mut Vec<Row>, stack: &str, hub: &str, shares: [usize; 3]) {
    let (hub, other) = (format!("{stack}{hub}."), format!("{stack}attention."));
    let of = shares.iter().sum();
    let mut index = 0;
    for (layer, count) in ["to_q", "to_k", "to_v"].into_iter().zip(shares) {
        let part = match count {
            1 if of == 3 => Rows::Block { index, of },
            _ => Rows::Blocks { index, count, of },
        };
        rows.push(row(format!("{hub}{layer}"), format!("{other}qkv"), part));
        index += count;
    }
    let layers = [
        ("to_out.0", "out"),
        ("norm_q", "q_norm"),
        ("norm_k", "k_norm"),
    ];
    whole(rows, &hub, &other, &layers);
}

fn lumina() -> Vec<Row> {
    let mut rows = Vec::new();
    for (stack, sees_time) in STACKS {
        attention(&mut rows, stack, "attn", [3, 1, 1]);
        let layers = [
            ("feed_forward.linear_1", "feed_forward.w1"),
            ("feed_forward.linear_2", "feed_forward.w2"),
            ("feed_forward.linear_3", "feed_forward.w3"),
            ("ffn_norm1", "ffn_norm1"),
            ("ffn_norm2", "ffn_norm2"),
            ("norm2", "attention_norm2"),
        ];
        whole(&mut rows, stack, stack, &layers);
        let layers: &[_] = match sees_time {
            true => &[
                ("norm1.linear", "adaLN_modulation.1"),
                ("norm1.norm", "attention_norm1"),
            ],
            false => &[("norm1", "attention_norm1")],
        };
        whole(&mut rows, stack, stack, layers);
    }
    let layers = [
        ("x_embedder", "x_embedder"),
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.linear"),
        ("time_caption_embed.caption_embedder.0", "cap_embedder.0"),
        ("time_caption_embed.caption_embedder.1", "cap_embedder.1"),
        (
            "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.0",
        ),
        (
            "time_caption_embed.timestep_embedder.linear_2",
            "t_embedder.mlp.2",
        ),
    ];
    whole(&mut rows, "", "", &layers);
    rows
}

fn z_image() -> Vec<Row> {
    let mut rows = Vec::new();
    for (stack, sees_time) in STACKS {
        attention(&mut rows, stack, "attention", [1, 1, 1]);
        for name in [
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
            "ffn_norm1",
            "ffn_norm2",
            "attention_norm1",
            "attention_norm2",
        ] {
            whole(&mut rows, stack, stack, &[(name, name)]);
        }
        if *sees_time {
            let name = "adaLN_modulation.0";
            whole(&mut rows, stack, stack, &[(name, name)]);
        }
    }
    let layers = [
        ("all_x_embedder.2-1", "x_embedder"),
        (
            "all_final_layer.2-1.adaLN_modulation.1",
            "final_layer.adaLN_modulation.1",
        ),
        ("all_final_layer.2-1.linear", "final_layer.linear"),
        ("cap_embedder.0", "cap_embedder.0"),
        ("cap_embedder.1", "cap_embedder.1"),
        ("t_embedder.mlp.0", "t_embedder.mlp.0"),
        ("t_embedder.mlp.2", "t_embedder.mlp.2"),
    ];
    whole(&mut rows, "", "", &layers);
    rows
}
