//! kohya: `lora_unet_down_blocks_0_….lora_down.weight`, and LyCORIS, which spells its methods alike.
//!
//! Sources: `kohya-ss/sd-scripts`, `networks/lora.py`; `KohakuBlueleaf/LyCORIS`, `lycoris/modules/` and
//! `lycoris/utils/__init__.py`. The first dot ends the module; alpha is a tensor of one element, and a
//! module without it is scaled by 1.

use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::methods::{full, lora};
use crate::naming::{Spelling, component};

/// The format.
pub(super) struct Kohya;

/// What follows the module, in full.
const SUFFIXES: &[(&str, Piece)] = &[
    ("lora_down.weight", Piece::Factor(lora::DOWN)),
    ("lora_up.weight", Piece::Factor(lora::UP)),
    ("lora_mid.weight", Piece::Factor(lora::MID)),
    ("alpha", Piece::Alpha),
    ("dora_scale", Piece::DoraScale),
    ("diff", Piece::Whole(full::DIFFERENCE)),
    ("diff_b", Piece::Whole(full::BIAS_DIFFERENCE)),
    ("w_norm", Piece::Whole(full::DIFFERENCE)),
    ("b_norm", Piece::Whole(full::BIAS_DIFFERENCE)),
];

/// How the tensors of methods that are not read start.
const OTHERS: &[(&str, &str)] = &[
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("rescale", "OFT"),
    ("a1.", "GLoRA"),
    ("a2.", "GLoRA"),
    ("b1.", "GLoRA"),
    ("b2.", "GLoRA"),
    ("bm.", "GLoRA"),
    ("on_input", "IA3"),
    ("weight", "IA3"),
    ("lambda_layer", "T-LoRA"),
    ("q_layer.", "T-LoRA"),
    ("p_layer.", "T-LoRA"),
    ("bias_", "sparse bias"),
    ("set_weight", "replaced weight"),
    ("reshape_weight", "padded weight"),
];

impl Format for Kohya {
    fn name(&self) -> &'static str {
        "kohya"
    }

    fn recognises(&self, found: &Found) -> bool {
        found.names().any(is_prefixed)
    }

    fn read(&self, found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::Flattened);
        for tensor in &found.file.directory.tensors {
            match parse(&tensor.name) {
                Some((path, piece)) => pieces.add(path.to_owned(), piece, tensor),
                None => pieces.unknown(tensor.name.clone()),
            }
        }
        let tool = found.metadata("ss_network_module").unwrap_or("kohya");
        let facts = facts(tool, self.summary(found));
        pieces.finish(found, facts, |_| Ok(Told::default()))
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, DOWN)
    }
}

fn is_prefixed(name: &str) -> bool {
    component::split(name, true).component.is_some()
}

fn parse(name: &str) -> Option<(&str, Piece)> {
    let (path, suffix) = name.split_once('.').filter(|(path, _)| is_prefixed(path))?;
    let whole = SUFFIXES.iter().find(|(known, _)| *known == suffix);
    let piece = whole.map(|(_, piece)| *piece).or_else(|| {
        let other = OTHERS.iter().find(|(start, _)| suffix.starts_with(start));
        other.map(|(_, method)| Piece::Other(method))
    });
    Some((path, piece?))
}
