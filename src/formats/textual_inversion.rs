//! Textual inversion: vectors of new tokens, which are described and carried, and never merged.
//!
//! Sources: `huggingface/diffusers` 0.42.1, `loaders/textual_inversion.py` (`<token>`, `string_to_param`,
//! `emb_params`, `clip_l` with `clip_g`); `AUTOMATIC1111/stable-diffusion-webui`,
//! `modules/textual_inversion/textual_inversion.py` (`create_embedding_from_data`; the name of the file is the word);
//! `cloneofsimo/lora`, `lora_diffusion/lora.py` (`<s1>` beside factors).

use super::draft::{Draft, Writer, Written};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};
use crate::naming::families::Layout;
use crate::tensor::Tensor;

/// Every spelling is read; written is that of diffusers: one tensor, called as its token.
pub(super) struct TextualInversion;

/// The same as the web UI writes it: `emb_params`, or `clip_l` and `clip_g`.
pub(super) struct WebUi;

/// Most tensors of such a file.
const TENSORS: usize = 16;

/// Vectors for one encoder, and for the two of SDXL.
const ONE: &str = "emb_params";
const TWO: &[&str] = &["clip_l", "clip_g"];

impl Format for TextualInversion {
    fn id(&self) -> &'static str {
        "textual-inversion"
    }

    fn name(&self) -> &'static str {
        "textual inversion"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        found.file.directory.tensors.len() <= TENSORS && found.names().any(is_vectors)
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        if !options.carry_vectors {
            let what = "a textual inversion".to_owned();
            return Err(Error::new(Reason::InputVectors { what }));
        }
        Ok(Adapter {
            unused: found.file.directory.tensors.clone(),
            ..Adapter::default()
        })
    }

    fn summary(&self, found: &Found) -> Summary {
        let mut summary = summarise(found, &[]);
        summary.methods.insert("textual inversion".to_owned());
        summary.facts.extend(vectors(found));
        summary
    }
}

impl Format for WebUi {
    fn id(&self) -> &'static str {
        "webui-embedding"
    }

    fn name(&self) -> &'static str {
        "textual inversion of the web UI"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    /// The other spelling's reader knows all.
    fn recognises(&self, _found: &Found) -> bool {
        false
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        TextualInversion.read(found, options)
    }

    fn summary(&self, found: &Found) -> Summary {
        TextualInversion.summary(found)
    }
}

impl Writer for TextualInversion {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = carried(draft, "learned_embeds.safetensors", |tensor| {
            if TWO.contains(&&*tensor.name) {
                return None;
            }
            Some(token(tensor))
        });
        written.lose_rest(draft);
        Ok(written)
    }
}

impl Writer for WebUi {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = carried(draft, "embedding.safetensors", |tensor| {
            let two = TWO.iter().find(|name| **name == tensor.name);
            Some((*two.unwrap_or(&ONE)).to_owned())
        });
        written.lose_rest(draft);
        Ok(written)
    }
}

/// The vectors under the names of a spelling, each name once; modules as lost.
fn carried(
    draft: &Draft<'_>,
    name: &'static str,
    key: impl Fn(&Tensor) -> Option<String>,
) -> Written {
    let mut written = Written::safetensors(name);
    for named in &draft.modules {
        written.lose(&*named.module.path, "a change of weights");
    }
    for tensor in &draft.adapter.unused {
        let Some(key) = key(tensor).filter(|_| is_vectors(&tensor.name)) else {
            continue;
        };
        if written.tensors.iter().all(|other| other.name != key) {
            written.put(draft, key, tensor);
            written.said.insert(tensor.name.clone());
        }
    }
    written
}

/// The token that vectors are for: their own name, or, where the word is the name of the file, that one.
fn token(tensor: &Tensor) -> String {
    if tensor.name.starts_with('<') {
        return tensor.name.clone();
    }
    let stem = tensor.input.path().file_stem().unwrap_or_default();
    format!("<{}>", stem.to_string_lossy())
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
