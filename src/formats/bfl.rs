//! Black Forest Labs' control adapters for FLUX.1: the original names without a prefix.
//!
//! Sources: `black-forest-labs/flux`, `src/flux/modules/lora.py` (`lora_B` has a bias; the scale is 1);
//! `comfyanonymous/ComfyUI`, `comfy/lora_convert.py` (norms are replaced, `img_in` is widened).

use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::methods::lora;
use crate::naming::Spelling;

/// The format.
pub(super) struct Bfl;

const SUFFIXES: &[(&str, Piece)] = &[
    (".lora_A.weight", Piece::DOWN),
    (".lora_B.weight", Piece::UP),
    (".lora_B.bias", Piece::Factor(lora::BIAS)),
];

/// The layer that sees the control image beside the latents.
const WIDENED: &str = "img_in";

impl Format for Bfl {
    fn id(&self) -> &'static str {
        "bfl"
    }

    fn name(&self) -> &'static str {
        "BFL control LoRA"
    }

    fn recognises(&self, found: &Found) -> bool {
        let any = |test: fn(&str) -> bool| found.names().any(test);
        any(|name| name.starts_with("double_blocks.") && name.contains(".lora_A."))
            && any(|name| name.ends_with(".norm.key_norm.scale"))
    }

    fn read(&self, found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            match parse(&tensor.name) {
                Some((path, piece)) => pieces.add(path.to_owned(), piece, tensor),
                None => pieces.unknown(tensor),
            }
        }
        let factor = |suffix| found.file.tensor(&format!("{WIDENED}.{suffix}"));
        if let (Some(down), Some(up)) = (factor("lora_A.weight"), factor("lora_B.weight")) {
            let shape = vec![up.dimension(0), down.dimension(1)];
            pieces.pad(WIDENED.to_owned(), shape, up);
        }
        let facts = facts(self.name(), self.summary(found));
        pieces.finish(found, facts, |_| Ok(Told::default()))
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, DOWN)
    }
}

fn parse(name: &str) -> Option<(&str, Piece)> {
    let cut = |(suffix, piece): &(&str, Piece)| Some((name.strip_suffix(suffix)?, *piece));
    let norm = || {
        let path = name.strip_suffix(".scale")?;
        path.ends_with("_norm").then_some((path, Piece::Value))
    };
    SUFFIXES.iter().find_map(cut).or_else(norm)
}
