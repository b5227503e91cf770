//! torchtune: `layers.0.attn.q_proj.lora_a.weight` in `adapter_model.pt`, with PEFT's configuration beside it.
//!
//! Sources: `pytorch/torchtune`, `torchtune/modules/peft/lora.py` and `dora.py` (parameters),
//! `torchtune/models/convert_weights.py` (`tune_to_peft_adapter_config`). A is r × in, B is out × r; `magnitude`
//! is one norm per output. Rows of q and k are rotary pairs, as those of torchtune's weights.

use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary, peft};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::methods::{dora, lora};
use crate::naming::{Spelling, path};

/// The format.
pub(super) struct Torchtune;

const SUFFIXES: &[(&str, Piece)] = &[
    (".lora_a.weight", Piece::Factor(lora::DOWN)),
    (".lora_b.weight", Piece::Factor(lora::UP)),
    (".magnitude", Piece::Factor(dora::MAGNITUDE)),
];

impl Format for Torchtune {
    fn id(&self) -> &'static str {
        "torchtune"
    }

    fn name(&self) -> &'static str {
        "torchtune"
    }

    fn recognises(&self, found: &Found) -> bool {
        let ends = |end: &str| found.names().any(|name| name.ends_with(end));
        ends(".lora_a.weight") && ends(".lora_b.weight")
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::Dotted);
        for tensor in &found.file.directory.tensors {
            let mut known = SUFFIXES.iter();
            match known.find_map(|(end, piece)| Some((tensor.name.strip_suffix(end)?, *piece))) {
                Some((path, piece)) => pieces.add(path::without_wrappers(path), piece, tensor),
                None => pieces.unknown(tensor),
            }
        }
        let facts = facts("torchtune", self.summary(found));
        let Some(config) = &found.config else {
            let alpha = options.alpha()?;
            return pieces.finish(found, facts, |_| {
                Ok(Told {
                    alpha: Some(alpha),
                    ..Told::default()
                })
            });
        };
        let place = config.input.path();
        let settings = peft::Told::read(&config.object, &options.allow_unknown_config)
            .map_err(|e| e.in_file(place))?;
        pieces.notices(settings.notices().iter().cloned());
        pieces.finish(found, facts, |path| {
            Ok(Told {
                scale: Some(settings.scale(path).map_err(|e| e.in_file(place))?),
                dora: settings.dora(),
                ..Told::default()
            })
        })
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, &[(".lora_a.weight", 0)])
    }
}
