//! OneTrainer's former output: kohya's tails and prefixes, but `lora_transformer_` before the names of
//! diffusers, and `lora_te2_` before those of T5 where CLIP-G is not there.
//!
//! Source: `Nerogar/OneTrainer`, `modules/util/convert_lora_util.py` (`convert_to_mixture`) and
//! `modules/util/convert/lora/convert_flux_lora.py`.

use super::kohya::Kohya;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::Result;

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
