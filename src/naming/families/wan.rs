//! Wan 2.x: its authors' names. `norm2` and `norm3` change places.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_wan_transformer_to_diffusers`). Not here: the animation and VACE models.

use super::{Denoiser, Family, Kind, Layout, Row, whole};

pub(super) const WAN: Family = Family {
    name: "wan",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["wan"],
        ..Denoiser::TRANSFORMER
    }),
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (ours, theirs) in [("attn1", "self_attn"), ("attn2", "cross_attn")] {
        let (hub, other) = (format!("blocks.*.{ours}."), format!("blocks.*.{theirs}."));
        let layers = [
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        ];
        whole(&mut rows, &hub, &other, &layers);
    }
    let layers = [
        ("attn2.add_k_proj", "cross_attn.k_img"),
        ("attn2.add_v_proj", "cross_attn.v_img"),
        ("attn2.norm_added_k", "cross_attn.norm_k_img"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        ("norm2", "norm3"),
    ];
    whole(&mut rows, "blocks.*.", "blocks.*.", &layers);
    let layers = [
        ("patch_embedding", "patch_embedding"),
        (
            "condition_embedder.time_embedder.linear_1",
            "time_embedding.0",
        ),
        (
            "condition_embedder.time_embedder.linear_2",
            "time_embedding.2",
        ),
        (
            "condition_embedder.text_embedder.linear_1",
            "text_embedding.0",
        ),
        (
            "condition_embedder.text_embedder.linear_2",
            "text_embedding.2",
        ),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        (
            "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.1",
        ),
        (
            "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.3",
        ),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("proj_out", "head.head"),
    ];
    whole(&mut rows, "", "", &layers);
    rows
}
