//! LTX-Video: Lightricks' names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_ltx_transformer_checkpoint_to_diffusers`). Not here: LTX-2, which hears as well.

use super::{Denoiser, Family, Kind, Layout, Row, whole};

pub(super) const LTX: Family = Family {
    name: "ltx",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["ltx"],
        ..Denoiser::TRANSFORMER
    }),
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let block = "transformer_blocks.*.";
    for attention in ["attn1", "attn2"] {
        let path = format!("{block}{attention}.");
        let layers = [
            ("to_q", "to_q"),
            ("to_k", "to_k"),
            ("to_v", "to_v"),
            ("to_out.0", "to_out.0"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ];
        whole(&mut rows, &path, &path, &layers);
    }
    let layers = [("ff.net.0.proj", "ff.net.0.proj"), ("ff.net.2", "ff.net.2")];
    whole(&mut rows, block, block, &layers);
    let layers = [
        ("proj_in", "patchify_proj"),
        ("proj_out", "proj_out"),
        ("caption_projection.linear_1", "caption_projection.linear_1"),
        ("caption_projection.linear_2", "caption_projection.linear_2"),
        ("time_embed.linear", "adaln_single.linear"),
        (
            "time_embed.emb.timestep_embedder.linear_1",
            "adaln_single.emb.timestep_embedder.linear_1",
        ),
        (
            "time_embed.emb.timestep_embedder.linear_2",
            "adaln_single.emb.timestep_embedder.linear_2",
        ),
    ];
    whole(&mut rows, "", "", &layers);
    rows
}
