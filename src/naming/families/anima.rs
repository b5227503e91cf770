//! Anima and Cosmos 2: NVIDIA's names.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_cosmos_transformer_checkpoint_to_diffusers`, the names of 2.0).

use super::{Denoiser, Family, Kind, Layout, Row, whole};

pub(super) const ANIMA: Family = Family {
    name: "anima",
    layout: Layout::Original,
    kind: Kind::Denoiser(Denoiser {
        stated: &["anima"],
        ..Denoiser::TRANSFORMER
    }),
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let (hub, other) = ("transformer_blocks.*.", "blocks.*.");
    for (ours, theirs) in [("attn1", "self_attn"), ("attn2", "cross_attn")] {
        let (hub, other) = (format!("{hub}{ours}."), format!("{other}{theirs}."));
        let layers = [
            ("to_q", "q_proj"),
            ("to_k", "k_proj"),
            ("to_v", "v_proj"),
            ("to_out.0", "output_proj"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ];
        whole(&mut rows, &hub, &other, &layers);
    }
    let layers = [
        ("ff.net.0.proj", "mlp.layer1"),
        ("ff.net.2", "mlp.layer2"),
        ("norm1.linear_1", "adaln_modulation_self_attn.1"),
        ("norm1.linear_2", "adaln_modulation_self_attn.2"),
        ("norm2.linear_1", "adaln_modulation_cross_attn.1"),
        ("norm2.linear_2", "adaln_modulation_cross_attn.2"),
        ("norm3.linear_1", "adaln_modulation_mlp.1"),
        ("norm3.linear_2", "adaln_modulation_mlp.2"),
    ];
    whole(&mut rows, hub, other, &layers);
    let layers = [
        ("patch_embed.proj", "x_embedder.proj.1"),
        ("time_embed.t_embedder.linear_1", "t_embedder.1.linear_1"),
        ("time_embed.t_embedder.linear_2", "t_embedder.1.linear_2"),
        ("norm_out.linear_1", "final_layer.adaln_modulation.1"),
        ("norm_out.linear_2", "final_layer.adaln_modulation.2"),
        ("proj_out", "final_layer.linear"),
    ];
    whole(&mut rows, "", "", &layers);
    rows
}
