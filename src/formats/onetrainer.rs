//! OneTrainer's former output: kohya's tails and prefixes, but `lora_transformer_` before the names of
//! diffusers, and `lora_te2_` before those of T5 where CLIP-G is not there.
//!
//! Source: `Nerogar/OneTrainer`, `modules/util/convert_lora_util.py` (`convert_to_mixture`) and
//! `modules/util/convert/lora/convert_flux_lora.py`.

use super::draft::{Draft, Writer, Written};
use super::kohya::{self, Kohya};
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::naming::families::Layout;

/// The format.
pub(super) struct OneTrainer;

/// Prefixes that no other tool writes.
const PREFIXES: &[&str] = &["lora_transformer_", "lora_te2_encoder_block_"];

impl Format for OneTrainer {
    fn id(&self) -> &'static str {
        "onetrainer"
    }

    fn name(&self) -> &'static str {
        "OneTrainer"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        let starts = |name: &str| PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        found.names().any(starts)
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let mut adapter = Kohya.read(found, options)?;
        adapter.facts.tool = Some(self.name().to_owned());
        Ok(adapter)
    }

    fn summary(&self, found: &Found) -> Summary {
        Kohya.summary(found)
    }
}

impl Writer for OneTrainer {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written::safetensors("adapter.safetensors");
        for named in &draft.modules {
            let Some(component) = named.component else {
                written.lose_unnamed(named);
                continue;
            };
            let prefix = match component.flattened {
                _ if !component.is_text => match draft.denoiser {
                    Some("unet.") => "lora_unet_",
                    _ => "lora_transformer_",
                },
                // The second encoder of FLUX is T5, which others call the third.
                ["lora_te3_"] if draft.family == Some("flux1") => "lora_te2_",
                all if draft.family != Some("sd1") && all.contains(&"lora_te1_") => "lora_te1_",
                all => all.first().copied().unwrap_or("lora_te_"),
            };
            let owner = format!("{prefix}{}", named.path.replace('.', "_"));
            kohya::suffixed(draft, named, &mut written, |tail| format!("{owner}.{tail}"));
        }
        written.lose_rest(draft);
        Ok(written)
    }
}
