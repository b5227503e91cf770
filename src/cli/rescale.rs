//! `loratool rescale`

use clap::Args;
use loratool::ops::rescale::{By, Options, plan};

use super::convert::{Changing, Writing};
use super::{Outcome, Path};

/// Make an adapter stronger or weaker, without its base.
///
/// Where the format keeps a scale only that changes, and no bit of a factor; otherwise values are
/// multiplied and rounded once, and the report says so. Merging the result is merging the adapter with
/// that strength.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loratool rescale my-lora/ --factor 0.5 --output weaker/
  loratool rescale style.safetensors --alpha 8 --output style8.safetensors
  loratool rescale my-lora/ --factor -1 --only 'layers.[0-7].' --output flipped/
  loratool rescale my-lora/ --factor 2 --to kohya --output twice.safetensors")]
pub(super) struct Rescale {
    /// An adapter folder, or its file of tensors
    adapter: Path,
    /// Multiply what the adapter adds by this; a negative one takes away
    #[arg(
        long,
        value_name = "NUMBER",
        allow_negative_numbers = true,
        required_unless_present = "alpha"
    )]
    factor: Option<f64>,
    /// Set the alpha of every module: what it adds changes by this over the old one
    #[arg(
        long,
        value_name = "ALPHA",
        allow_negative_numbers = true,
        conflicts_with = "factor"
    )]
    alpha: Option<f64>,
    #[command(flatten)]
    changing: Changing,
    #[command(flatten)]
    pub(super) writing: Writing,
}

impl Rescale {
    pub(super) fn run(self) -> Outcome {
        let by = match (self.factor, self.alpha) {
            (Some(factor), _) => By::Factor(factor),
            (None, alpha) => By::Alpha(alpha.unwrap_or(f64::NAN)),
        };
        let conversion = self.changing.options(&self.adapter, &self.writing)?;
        self.writing.run(plan(&Options { conversion, by })?)
    }
}
