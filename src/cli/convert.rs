//! `loratool convert`

use clap::Args;
use loratool::ops::convert::{Options, Plan, Report, plan};
use loratool::ops::merge::Control;
use loratool::{Error, printable};

use super::render::{self, Stderr, bytes};
use super::{Common, LayerNames, Outcome, Path, Type, cancel_flag, prefix, targets};

/// Write an adapter in another spelling, with everything the target cannot say listed.
///
/// A scale is never changed in silence: where the target has no place for it, it is multiplied into a
/// factor, and the report says so.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loratool convert my-lora/ --to kohya --output my-lora.safetensors
  loratool convert kohya.safetensors --to diffusers --output out/
  loratool convert unet-lora.safetensors --to peft --output peft/ --base unet/
  loratool convert unet-only.safetensors --to diffusers --output out/ --component unet
  loratool convert flux.safetensors --to kohya --output k.safetensors --family flux1 --dtype bf16
  loratool convert sdxl.safetensors --to kohya --output l.safetensors --names ldm --prefix lycoris
  loratool convert simo.safetensors --to peft --output peft/ --order sd1 --only 'attn1'
  loratool convert lora.pt --to peft --output peft/ --adapter-alpha 16
  loratool convert my-lora/ --to mlx --output mlx/ --dry-run")]
pub(super) struct Convert {
    /// An adapter folder, or its file of tensors
    adapter: Path,
    /// The format to write
    #[arg(long, value_name = "FORMAT", value_parser = targets([]))]
    to: String,
    /// Convert only modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    only: Vec<String>,
    /// Leave out modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    skip: Vec<String>,
    #[command(flatten)]
    pub(super) writing: Writing,
}

/// What of an adapter is changed, and into which format it is written.
#[derive(Args, Debug)]
pub(super) struct Changing {
    /// The format to write [default: that of the adapter]
    #[arg(long, value_name = "FORMAT", value_parser = targets([]))]
    to: Option<String>,
    /// Change only modules whose path the pattern finds; the others stay as they are (repeatable)
    #[arg(long, value_name = "REGEX")]
    only: Vec<String>,
    /// Leave modules as they are whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    skip: Vec<String>,
}

impl Changing {
    /// The options of a conversion that changes an adapter.
    pub(super) fn options(&self, adapter: &Path, writing: &Writing) -> Result<Options, Error> {
        Ok(Options {
            adapter: adapter.clone(),
            to: self.to.clone().unwrap_or_default(),
            only: self.only.clone(),
            skip: self.skip.clone(),
            ..writing.options()?
        })
    }
}

/// How an adapter is written.
#[derive(Args, Debug)]
pub(super) struct Writing {
    /// A folder, or a file where the format is one file
    #[arg(long, short, value_name = "PATH")]
    pub(super) output: Path,
    /// A base that tells the names of layers and the number of heads
    #[arg(long, value_name = "PATH")]
    base: Option<Path>,
    /// The family of the model, where its names alone do not tell it
    #[arg(long, value_name = "NAME")]
    family: Option<String>,
    /// The part of a pipeline that names are of which do not say it: unet, transformer, text_encoder, …
    #[arg(long, value_name = "NAME")]
    component: Option<String>,
    /// Leave out what the format cannot say
    #[arg(long)]
    allow_losses: bool,
    /// Type of the factors
    #[arg(long, value_enum, default_value_t = Type::Keep)]
    dtype: Type,
    /// What stands before flattened names, such as `lycoris`
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Names of layers, where the format has both
    #[arg(long, value_enum)]
    names: Option<LayerNames>,
    /// Replace an existing output, in one step at the end
    #[arg(long)]
    pub(super) force: bool,
    /// Print the plan and write nothing
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
    /// Print warnings and errors only
    #[arg(long, short)]
    pub(super) quiet: bool,
    #[command(flatten)]
    pub(super) common: Common,
}

impl Convert {
    pub(super) fn run(self) -> Outcome {
        let options = Options {
            adapter: self.adapter,
            to: self.to,
            only: self.only,
            skip: self.skip,
            ..self.writing.options()?
        };
        self.writing.run(plan(&options)?)
    }
}

impl Writing {
    /// The options of a conversion, less which adapter, what of it, and into what.
    pub(super) fn options(&self) -> Result<Options, Error> {
        Ok(Options {
            output: self.output.clone(),
            base: self.base.clone(),
            family: self.family.clone(),
            component: self.component.clone(),
            allow_losses: self.allow_losses,
            dtype: self.dtype.float(),
            prefix: self.prefix.as_deref().map(prefix),
            names: self.names.map(LayerNames::names),
            force: self.force,
            read: self.common.reading()?,
            ..Options::default()
        })
    }

    /// Whether only warnings and errors are to be printed, or one document.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet || self.common.json
    }

    /// Runs a plan, or prints it.
    pub(super) fn run(&self, plan: Plan) -> Outcome {
        let stderr = Stderr::new();
        stderr.notices(&plan.report().notices);
        if self.dry_run {
            self.tell(plan.report());
            return Ok(0);
        }
        let control = Control {
            cancel: cancel_flag(),
            ..Control::default()
        };
        self.tell(&plan.run(&control)?);
        Ok(0)
    }

    /// Tells what was done.
    fn tell(&self, report: &Report) {
        if self.common.json {
            return render::json(report);
        }
        self.tell_people(report);
    }

    /// The same for people.
    pub(super) fn tell_people(&self, report: &Report) {
        render::losses("left out", &report.losses);
        render::losses("folded", &report.folded);
        if let Some(alpha) = report.alpha {
            let text =
                "its files have no place for it; --adapter-alpha states it where they are read";
            render::out(&format!("alpha: {alpha} ({text})"));
        }
        if !self.quiet {
            let done = if report.dry_run {
                "would write"
            } else {
                "wrote"
            };
            let line = format!(
                "{done} {} ({} → {}): {} modules, {} tensors, {}",
                report.output,
                report.from,
                report.to,
                report.modules,
                report.tensors,
                bytes(report.bytes)
            );
            render::out(&printable(&line));
        }
    }
}
