//! CLIP text encoders under OpenCLIP's names (SD2, the second encoder of SDXL).
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/single_file_utils.py`
//! (`convert_open_clip_checkpoint`): one parameter holds the three input projections, and
//! `text_projection` is the transpose of a linear layer's weight.

use super::{Family, Kind, Layout, Row, row};
use crate::naming::rows::Rows;

pub(super) const OPENCLIP: Family = Family {
    name: "openclip",
    layout: Layout::Original,
    kind: Kind::TextEncoder,
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let (hub, other) = ("text_model.encoder.layers.*", "transformer.resblocks.*");
    for (index, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
        let hub = format!("{hub}.self_attn.{name}");
        rows.push(row(
            hub,
            format!("{other}.attn"),
            Rows::Block { index, of: 3 },
        ));
    }
    for (ours, theirs) in [
        ("self_attn.out_proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
    ] {
        let (hub, other) = (format!("{hub}.{ours}"), format!("{other}.{theirs}"));
        rows.push(row(hub, other, Rows::Whole));
    }
    for (hub, other) in [
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
    ] {
        rows.push(row(hub, other, Rows::Whole));
    }
    rows.push(row("text_projection", "text_projection", Rows::Transposed));
    rows
}
