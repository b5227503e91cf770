//! `loratool extract`

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, ValueEnum};
use loratool::methods::METHODS;
use loratool::ops::extract::{
    Embeddings, FittedReport, Options, Proved, Ranks, Report, Whole, plan,
};
use loratool::tensor::Float;
use loratool::{Error, Reason};

use super::plot;
use super::render::{self, Fields, Stderr, bytes, folded, grouped, with_progress};
use super::table::{kinds, numbers, percent, shares};
use super::{DECOMPOSED_ON, Devices, LayerNames, Outcome, Path, Workers, prefix, size, targets};

/// Make an adapter from a base and what was tuned from it, with a proof of how good it is.
///
/// The difference of every layer is decomposed; the first singular values are kept. The report says what is
/// left of the difference, and how far that is at most above the best possible at the rank.
#[derive(Args, Debug)]
#[command(mut_arg("device", |device| device.help(DECOMPOSED_ON)), after_help = "\
Examples:
  loratool extract --base llama/ --tuned my-llama/ --output lora/
  loratool extract --base llama/ --tuned my-llama/ --energy 0.95 --max-rank 128 --output lora/
  loratool extract --base llama/ --tuned my-llama/ --budget 100MB --dtype bf16 --output lora/
  loratool extract --base sd15/ --tuned mine/ --to kohya --rank 64 --output lora.safetensors
  loratool extract --base llama/ --tuned my-llama/ --method dora --norms skip --output dora/
  loratool extract --base llama/ --tuned my-llama/ --dry-run --plot spectra.svg --output lora/")]
pub(super) struct Extract {
    /// The checkpoint before: a file of tensors, or a folder
    #[arg(long, value_name = "PATH")]
    base: Path,
    /// The checkpoint after, of the same layout
    #[arg(long, value_name = "PATH")]
    tuned: Path,
    /// A folder, or a file where the format is one file
    #[arg(long, short, value_name = "PATH")]
    output: Path,
    /// Rank of every layer; the smaller side of a layer where that is less
    #[arg(long, value_name = "R", default_value_t = 32)]
    rank: usize,
    /// The smallest rank that keeps this share of the squared difference
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["rank", "sv_ratio", "budget"])]
    energy: Option<f64>,
    /// As many ranks as there are singular values above the largest divided by this
    #[arg(long, value_name = "RATIO", conflicts_with_all = ["rank", "budget"])]
    sv_ratio: Option<f64>,
    /// The best ranks that a file of this size holds, such as 100MB
    #[arg(long, value_name = "SIZE", conflicts_with = "rank")]
    budget: Option<String>,
    /// Largest rank that --energy, --sv-ratio or --budget may choose
    #[arg(long, value_name = "R", default_value_t = 256)]
    max_rank: usize,
    /// Rank of layers whose path the pattern finds; the first match counts (repeatable)
    #[arg(long, value_name = "REGEX=R")]
    rank_for: Vec<String>,
    /// The format to write [default: peft, or kohya for image models]
    #[arg(long, value_name = "FORMAT", value_parser = targets([]))]
    to: Option<String>,
    /// Numerator of the scale, which the factors then make up for [default: the rank]
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true)]
    alpha: Option<f64>,
    /// Extract only tensors whose name the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    only: Vec<String>,
    /// Leave out tensors whose name the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    skip: Vec<String>,
    /// What becomes of embeddings
    #[arg(long, value_enum, default_value_t = OfEmbeddings::Lora)]
    embeddings: OfEmbeddings,
    /// What becomes of norms
    #[arg(long, value_enum, default_value_t = OfWhole::Full)]
    norms: OfWhole,
    /// What becomes of biases
    #[arg(long, value_enum, default_value_t = OfWhole::Full)]
    biases: OfWhole,
    /// The method to fit [default: lora]
    #[arg(long, value_name = "METHOD", ignore_case = true, value_parser = methods())]
    method: Option<String>,
    /// Prove residuals to be at most this share above the best; `none` proves nothing
    #[arg(long, value_name = "SHARE", default_value = "1e-3", value_parser = tolerance)]
    tolerance: Tolerance,
    /// Compute all singular values
    #[arg(long)]
    exact: bool,
    /// Type of the factors
    #[arg(long, value_enum, default_value_t = OfFactors::F32)]
    dtype: OfFactors,
    /// Seed of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    workers: Workers,
    /// Library of linear algebra, where the build has several
    #[arg(long, value_name = "NAME")]
    algebra: Option<String>,
    #[command(flatten)]
    devices: Devices,
    /// The family of the model, where its names alone do not tell it
    #[arg(long, value_name = "NAME")]
    family: Option<String>,
    /// The part of a pipeline that names are of which do not say it: unet, transformer, text_encoder, …
    #[arg(long, value_name = "NAME")]
    component: Option<String>,
    /// What stands before flattened names, such as `lycoris`
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Names of layers, where the format has both
    #[arg(long, value_enum)]
    names: Option<LayerNames>,
    /// Leave out tensors that only one side has or that differ in shape
    #[arg(long)]
    allow_unmatched: bool,
    /// Leave out what the format cannot say
    #[arg(long)]
    allow_losses: bool,
    /// Extract although the two seem to have nothing to do with each other
    #[arg(long)]
    allow_unrelated: bool,
    /// Replace an existing output, in one step at the end
    #[arg(long)]
    force: bool,
    /// Draw the singular values and what is left of each layer into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<Path>,
    /// Compute and report everything, and write no adapter
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// Print warnings and errors only
    #[arg(long, short)]
    quiet: bool,
    /// Print one JSON document on standard output (schema in docs/report.md)
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OfEmbeddings {
    /// The method is fitted to them
    Lora,
    /// They are taken whole
    Full,
    /// They are left out
    Skip,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OfWhole {
    /// They are taken whole
    Full,
    /// They are left out
    Skip,
}

impl OfWhole {
    fn whole(self) -> Whole {
        match self {
            OfWhole::Full => Whole::Full,
            OfWhole::Skip => Whole::Skip,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OfFactors {
    F32,
    F16,
    Bf16,
}

/// The methods that can be fitted.
fn methods() -> PossibleValuesParser {
    let fitted = METHODS.iter().filter(|method| method.fits());
    PossibleValuesParser::new(fitted.map(|method| PossibleValue::new(method.name().to_lowercase())))
}

/// A share, or nothing.
#[derive(Clone, Copy, Debug)]
struct Tolerance(Option<f64>);

fn tolerance(text: &str) -> Result<Tolerance, String> {
    if text == "none" {
        return Ok(Tolerance(None));
    }
    let share = text.parse().map_err(|_| "expected a number or `none`")?;
    Ok(Tolerance(Some(share)))
}

fn rank_for(text: &str) -> Result<(String, usize), Error> {
    let found = text
        .rsplit_once('=')
        .and_then(|(pattern, rank)| Some((pattern, rank.parse().ok()?)));
    found
        .map(|(pattern, rank)| (pattern.to_owned(), rank))
        .ok_or_else(|| {
            Error::new(Reason::BadOption {
                text: text.to_owned(),
                problem: "expected REGEX=R".to_owned(),
            })
        })
}

impl Extract {
    pub(super) fn run(&self) -> Outcome {
        let plan = plan(&self.options()?)?;
        let inputs = [self.base.as_path(), self.tuned.as_path()];
        let drawing = plot::destination(self.plot.as_deref(), &self.output, self.force, inputs)?;
        let stderr = Stderr::new();
        let result = with_progress(self.quiet || self.json, |control| match self.dry_run {
            true => plan.measure(control),
            false => plan.run(control),
        });
        let report = result.inspect_err(|_| stderr.notices(plan.notices()))?;
        if let Some(drawing) = drawing {
            let title = format!("{} → {}", report.base, report.tuned);
            let layers = report.modules.iter().map(|module| plot::Layer {
                path: &module.path,
                rank: module.rank,
                residual: module.residual,
                values: &module.singular_values,
            });
            drawing.write(plot::spectra(&title, &layers.collect::<Vec<_>>())?.as_bytes())?;
        }
        stderr.notices(&report.notices);
        if self.json {
            render::json(&report);
        } else if !self.quiet {
            print(&report);
        }
        Ok(0)
    }

    fn options(&self) -> Result<Options, Error> {
        let ranks = match (self.energy, self.sv_ratio, &self.budget) {
            (Some(share), ..) => Ranks::Energy(share),
            (_, Some(ratio), _) => Ranks::Ratio(ratio),
            (.., Some(budget)) => Ranks::Budget(size(budget)?),
            _ => Ranks::Fixed(self.rank),
        };
        Ok(Options {
            base: self.base.clone(),
            tuned: self.tuned.clone(),
            output: self.output.clone(),
            ranks,
            max_rank: self.max_rank,
            rank_for: self
                .rank_for
                .iter()
                .map(|text| rank_for(text))
                .collect::<Result<_, _>>()?,
            to: self.to.clone(),
            alpha: self.alpha,
            only: self.only.clone(),
            skip: self.skip.clone(),
            embeddings: match self.embeddings {
                OfEmbeddings::Lora => Embeddings::Fitted,
                OfEmbeddings::Full => Embeddings::Full,
                OfEmbeddings::Skip => Embeddings::Skip,
            },
            norms: self.norms.whole(),
            biases: self.biases.whole(),
            method: self.method.clone(),
            tolerance: self.tolerance.0,
            exact: self.exact,
            dtype: match self.dtype {
                OfFactors::F32 => Float::F32,
                OfFactors::F16 => Float::F16,
                OfFactors::Bf16 => Float::BF16,
            },
            seed: self.seed,
            threads: self.workers.count(),
            algebra: self.algebra.clone(),
            device: self.devices.choice(self.algebra.as_deref())?,
            allow_unmatched: self.allow_unmatched,
            allow_losses: self.allow_losses,
            allow_unrelated: self.allow_unrelated,
            force: self.force,
            family: self.family.clone(),
            component: self.component.clone(),
            prefix: self.prefix.as_deref().map(prefix),
            names: self.names.map(LayerNames::names),
        })
    }
}

/// The report for people: a line for each kind of layer, the total, and what is left out.
fn print(report: &Report) {
    let done = if report.dry_run {
        "would write"
    } else {
        "wrote"
    };
    let mut fields = Fields::new(&format!(
        "{done} {} ({}, {})",
        report.output, report.method, report.to
    ));
    fields.add("base", &report.base);
    fields.add("tuned", &report.tuned);
    let modules = report.modules.len();
    fields.add(
        "layers",
        format!(
            "{modules} fitted, {} whole, {} identical, {} left out",
            report.whole.len(),
            report.identical,
            report.left_out.len()
        ),
    );
    if modules > 0 {
        fields.list("layer", &table(&report.modules));
        let total = &report.total;
        fields.add("change", percent(total.change));
        fields.add("energy kept", percent(total.energy));
        fields.add(
            "residual",
            format!("{} of the difference", percent(total.residual)),
        );
        fields.add(
            "proof",
            match total.excess {
                Some(0.0) => {
                    "the best possible at these ranks: all singular values were computed".to_owned()
                }
                Some(excess) => format!(
                    "at most {} above the best possible at these ranks",
                    percent(excess)
                ),
                None => format!("{} of {modules} layers not proved", total.not_proved),
            },
        );
        if total.not_reached > 0 {
            let text = format!(
                "{} layers have the largest rank allowed, and not what was asked for",
                total.not_reached
            );
            fields.add("not reached", text);
        }
    }
    fields.add(
        "size",
        format!(
            "{} ({} numbers in factors), the full difference {}",
            bytes(report.bytes),
            grouped(report.total.parameters),
            bytes(report.difference_bytes)
        ),
    );
    fields.add("time", format!("{:.1} s", report.seconds));
    fields.add_device(report.device.as_ref());
    if let Some(alpha) = report.alpha {
        fields.add(
            "alpha",
            format!("{alpha}: --adapter-alpha states it where the files are read"),
        );
    }
    fields.print();
    render::losses("left out", &report.left_out);
    render::losses("left out", &report.losses);
    render::losses("folded", &report.folded);
}

/// Lines of which each stands for the layers of one kind: what all have, or the range.
fn table(modules: &[FittedReport]) -> Vec<String> {
    let lines = kinds(modules, |module| &module.path).into_iter();
    let lines: Vec<String> = lines
        .map(|(kind, group)| {
            let unproved = group
                .iter()
                .filter(|module| module.proof == Proved::NotProved)
                .count();
            format!(
                "{kind} ({}): rank {}, changed by {}, residual {}{}",
                group.len(),
                numbers(group.iter().map(|module| module.rank)),
                shares(group.iter().map(|module| module.change)),
                shares(group.iter().map(|module| module.residual)),
                if unproved > 0 {
                    format!(", {unproved} not proved")
                } else {
                    String::new()
                },
            )
        })
        .collect();
    folded(&lines)
}
