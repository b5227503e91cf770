//! Textual inversion: vectors of new tokens, which are described and never merged.
//!
//! Sources: `huggingface/diffusers`, `loaders/textual_inversion.py` (`<token>`, `string_to_param`, `emb_params`,
//! `clip_l` with `clip_g`); `cloneofsimo/lora`, `lora_diffusion/lora.py` (`<s1>` beside factors).

use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};

/// The format.
pub(super) struct TextualInversion;

/// Most tensors of such a file.
const TENSORS: usize = 16;

impl Format for TextualInversion {
    fn id(&self) -> &'static str {
        "textual-inversion"
    }

    fn name(&self) -> &'static str {
        "textual inversion"
    }

    fn recognises(&self, found: &Found) -> bool {
        found.file.directory.tensors.len() <= TENSORS && found.names().any(is_vectors)
    }

    fn read(&self, _found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        let what = "a textual inversion".to_owned();
        Err(Error::new(Reason::InputVectors { what }))
    }

    fn summary(&self, found: &Found) -> Summary {
        let mut summary = summarise(found, &[]);
        summary.methods.insert("textual inversion".to_owned());
        summary.facts.extend(vectors(found));
        summary
    }
}

pub(super) fn is_vectors(name: &str) -> bool {
    matches!(name, "emb_params" | "string_to_param" | "clip_l" | "clip_g")
        || name.starts_with("string_to_param.")
        || name.starts_with('<')
}

/// Each token with the number and width of its vectors.
pub(super) fn vectors(found: &Found) -> impl Iterator<Item = (String, String)> {
    let all = found.file.directory.tensors.iter();
    let tokens = all.filter(|tensor| is_vectors(&tensor.name));
    tokens.map(|tensor| {
        let (count, width) = match *tensor.shape {
            [width] => (1, width),
            [count, width] => (count, width),
            _ => (tensor.dimension(0), tensor.dimension(1)),
        };
        let text = format!("vectors: {count}, of width {width}");
        (format!("token {}", tensor.name), text)
    })
}
