//! cloneofsimo: factors by number, `unet:0:up`, or a bare list of them; read as far as the names go.
//!
//! Source: `cloneofsimo/lora`, `lora_diffusion/lora.py` (`save_safeloras_with_embeds`, `save_lora_weight`,
//! `_find_modules_v2`). The number of a pair is that of the layer among those that the script walked through,
//! depth first through the modules of the diffusers of its time, below parents of the classes that the metadata
//! list. The file does not say which layers these are, so that nothing can be placed. No α: the scale is 1.

use std::collections::BTreeMap;

use super::spellings::summarise;
use super::textual_inversion;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};

/// `unet:0:up`, with classes and ranks in the metadata.
pub(super) struct Numbered;

impl Format for Numbered {
    fn id(&self) -> &'static str {
        "simo"
    }

    fn name(&self) -> &'static str {
        "cloneofsimo"
    }

    fn recognises(&self, found: &Found) -> bool {
        found
            .names()
            .any(|name| name.contains(':') && (name.ends_with(":up") || name.ends_with(":down")))
    }

    fn read(&self, _found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        Err(Error::new(Reason::Ordinals))
    }

    fn summary(&self, found: &Found) -> Summary {
        let mut summary = summarise(found, &[(":down", 0)]);
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for name in found.names().filter(|name| name.ends_with(":down")) {
            if let Some((component, _)) = name.split_once(':') {
                *counts.entry(component).or_default() += 1;
            }
        }
        for (component, count) in counts {
            let below = found.metadata(component);
            let below = below.map_or(String::new(), |classes| format!(", below {classes}"));
            let text = format!("{count} layers by number{below}");
            summary.facts.insert(component.to_owned(), text);
        }
        summary.facts.extend(textual_inversion::vectors(found));
        summary
    }
}

/// A bare list of factors, up and down in turn, as `.pt` files hold them.
pub(super) struct Listed;

impl Format for Listed {
    fn id(&self) -> &'static str {
        "simo-list"
    }

    fn name(&self) -> &'static str {
        "cloneofsimo (list without module names)"
    }

    fn recognises(&self, found: &Found) -> bool {
        let tensors = &found.file.directory.tensors;
        let pairs = tensors.len() / 2;
        let matrix = |number: usize| {
            let tensor = found.file.tensor(&number.to_string())?;
            (tensor.shape.len() >= 2).then_some(tensor)
        };
        pairs > 0
            && tensors.len() == 2 * pairs
            && (0..pairs).all(|pair| match (matrix(2 * pair), matrix(2 * pair + 1)) {
                (Some(up), Some(down)) => up.dimension(1) == down.dimension(0),
                _ => false,
            })
    }

    fn read(&self, _found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        Err(Error::new(Reason::Ordinals))
    }

    fn summary(&self, found: &Found) -> Summary {
        // The odd ones are "down".
        let odd = ["1", "3", "5", "7", "9"].map(|digit| (digit, 0));
        let mut summary = summarise(found, &odd);
        summary.methods.insert("LoRA".to_owned());
        summary
    }
}
