//! T5 encoders, which have the same names everywhere; here so that flattened ones can be looked up.
//!
//! Source: `huggingface/transformers` 5.23, `models/t5/modeling_t5.py`.

use super::{Family, Kind, Layout, Row, whole};

pub(super) const T5: Family = Family {
    name: "t5",
    layout: Layout::Original,
    kind: Kind::TextEncoder,
    rows,
};

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for name in [
        "layer.0.SelfAttention.q",
        "layer.0.SelfAttention.k",
        "layer.0.SelfAttention.v",
        "layer.0.SelfAttention.o",
        "layer.1.DenseReluDense.wi",
        "layer.1.DenseReluDense.wi_0",
        "layer.1.DenseReluDense.wi_1",
        "layer.1.DenseReluDense.wo",
    ] {
        let block = "encoder.block.*.";
        whole(&mut rows, block, block, &[(name, name)]);
    }
    rows
}
