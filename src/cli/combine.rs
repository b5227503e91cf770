//! `loratool combine`

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, ValueEnum};
use loratool::ops::combine::{
    Fit, Knobs, Majority, ModuleReport, Options, PEERS, RECIPES, Ranks, Report, plan,
};
use loratool::ops::convert;
use loratool::{Error, Reason, printable};

use super::adapters::Adapters;
use super::convert::Writing;
use super::render::{self, Fields, Stderr, bytes, folded, grouped, with_progress};
use super::{DECOMPOSED_ON, Devices, Outcome, Workers, size, targets};

/// Make one adapter of several.
///
/// The usual way is the exact sum of strength times change, by factors side by side; it is made shorter only where
/// --rank, --energy or --budget ask for it, and the report says what is left. Ways that look at single elements work on
/// the changes themselves, never on factors.
#[derive(Args, Debug)]
#[command(after_help = AFTER, mut_arg("dtype", |dtype| dtype
    .help("Type of all tensors [default: f32 for factors, whole tensors in their own]")
    .hide_default_value(true)), mut_arg("device", |device| device.help(DECOMPOSED_ON)))]
pub(super) struct Combine {
    #[command(flatten)]
    adapters: Adapters,
    /// The way [default: linear]
    #[arg(long, value_name = "WAY", value_parser = ways())]
    how: Option<String>,
    /// Reproduce the numbers of another tool; --how is then one of its own ways
    #[arg(long, value_name = "TOOL", value_parser = PossibleValuesParser::new(PEERS.iter().map(|peer| peer.name)))]
    compat: Option<String>,
    /// The largest rank of a layer
    #[arg(long, value_name = "R", conflicts_with_all = ["energy", "budget"])]
    rank: Option<usize>,
    /// The smallest rank that keeps this share of the squared norm of each layer
    #[arg(long, value_name = "SHARE", conflicts_with = "budget")]
    energy: Option<f64>,
    /// Ranks that leave the least error in a file of this size, such as 20MB
    #[arg(long, value_name = "SIZE")]
    budget: Option<String>,
    /// The share of each change that stays
    #[arg(long, value_name = "SHARE")]
    density: Option<f64>,
    /// Which sign the majority has
    #[arg(long, value_enum)]
    majority: Option<Election>,
    /// The share of the largest elements that breadcrumbs leaves out [default: 0.01]
    #[arg(long, value_name = "SHARE")]
    gamma: Option<f64>,
    /// How far the probabilities of della differ from the density [default: 0.15]
    #[arg(long, value_name = "SHARE")]
    epsilon: Option<f64>,
    /// Multiply the result by this
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    lambda: Option<f64>,
    /// Seed of what is drawn [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Divide by the strengths that took part
    #[arg(long)]
    normalize: bool,
    /// Average whole tensors that differ, by strength
    #[arg(long)]
    average_full: bool,
    /// The format to write [default: that of the first adapter]
    #[arg(long, value_name = "FORMAT", value_parser = targets([]))]
    to: Option<String>,
    /// Combine only modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    only: Vec<String>,
    /// Leave out modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    skip: Vec<String>,
    /// Combine adapters that have no layer in common
    #[arg(long)]
    allow_unrelated: bool,
    #[command(flatten)]
    workers: Workers,
    #[command(flatten)]
    devices: Devices,
    #[command(flatten)]
    pub(super) writing: Writing,
}

const AFTER: &str = "\
Examples:
  loratool combine --adapter a/ --strength 0.7 --adapter b/ --strength -0.3 --output both/
  loratool combine --adapter a/ --adapter b/ --adapter c/ --rank 32 --output short/
  loratool combine --adapter a/ --adapter b/ --how ties --density 0.2 --energy 0.99 --output agreed/
  loratool combine --adapter a.safetensors --adapter peft/ --to kohya --output both.safetensors
  loratool combine --adapter a/ --adapter b/ --compat peft --how svd --rank 16 --output as-peft/

Each --strength and --strength-for belongs to the --adapter before it; a --strength-for
before the first --adapter belongs to all of them.";

/// Ways of our own, and of other tools under their names.
fn ways() -> PossibleValuesParser {
    let own = RECIPES
        .iter()
        .map(|recipe| PossibleValue::new(recipe.name).help(recipe.text));
    let mut ways: Vec<PossibleValue> = own.collect();
    for peer in PEERS {
        for name in peer.ways() {
            if !ways.iter().any(|way| way.matches(name, false)) {
                ways.push(PossibleValue::new(name).help(format!("with --compat {}", peer.name)));
            }
        }
    }
    PossibleValuesParser::new(ways)
}

/// How a sign is elected.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Election {
    /// That of the sum
    Total,
    /// That which more have
    Frequency,
}

impl Combine {
    pub(super) fn run(self, matches: &ArgMatches) -> Outcome {
        let plan = plan(&self.options(matches)?)?;
        let stderr = Stderr::new();
        let quiet = self.writing.is_quiet();
        let result = with_progress(quiet, |control| match self.writing.dry_run {
            true => plan.measure(control),
            false => plan.run(control),
        });
        let report = result.inspect_err(|_| stderr.notices(plan.notices()))?;
        stderr.notices(&report.notices);
        if self.writing.common.json {
            render::json(&report);
        } else if !quiet {
            print(&report);
        }
        Ok(0)
    }

    fn options(&self, matches: &ArgMatches) -> Result<Options, Error> {
        let budget = self.budget.as_deref().map(size).transpose()?;
        let conversion = self.writing.options()?;
        let given = matches.value_source("dtype") == Some(ValueSource::CommandLine);
        if given && conversion.dtype.is_none() {
            return Err(Error::new(Reason::BadOption {
                text: "--dtype keep".to_owned(),
                problem: "a sum has no type of its own: f32, bf16 or f16".to_owned(),
            }));
        }
        Ok(Options {
            adapters: self.adapters.selections(matches)?,
            conversion: convert::Options {
                to: self.to.clone().unwrap_or_default(),
                only: self.only.clone(),
                skip: self.skip.clone(),
                ..conversion
            },
            how: self.how.clone(),
            compat: self.compat.clone(),
            ranks: (self.rank.map(Ranks::Fixed))
                .or(self.energy.map(Ranks::Energy))
                .or(budget.map(Ranks::Budget)),
            knobs: Knobs {
                density: self.density,
                gamma: self.gamma,
                epsilon: self.epsilon,
                majority: self.majority.map(|majority| match majority {
                    Election::Total => Majority::Total,
                    Election::Frequency => Majority::Frequency,
                }),
                normalize: self.normalize,
                lambda: self.lambda,
                seed: self.seed,
            },
            average_full: self.average_full,
            allow_unrelated: self.allow_unrelated,
            threads: self.workers.count(),
            device: self.devices.choice(None)?,
        })
    }
}

fn print(report: &Report) {
    let done = if report.dry_run {
        "would write"
    } else {
        "wrote"
    };
    let title = format!("{done} {} ({})", report.output, report.to);
    let mut fields = Fields::new(&printable(&title));
    for adapter in &report.adapters {
        let text = format!(
            "{} ({}), strength {}",
            adapter.path, adapter.format, adapter.strength
        );
        fields.add("adapter", printable(&text));
    }
    let how = match &report.compat {
        Some(tool) => format!("{} of {tool}", report.how),
        None => report.how.clone(),
    };
    fields.add("way", how);
    let count = format!(
        "{} ({} exact)",
        grouped(report.modules.len() as u64),
        report.exact
    );
    fields.add("modules", count);
    let lines: Vec<String> = report.modules.iter().map(line).collect();
    fields.list("", &folded(&lines));
    if let Some(residual) = report.residual {
        fields.add(
            "residual",
            format!("{:.3} % of what was asked for", residual * 100.0),
        );
    }
    fields.list("averaged", &folded(&report.averaged));
    let loss = |loss: &loratool::formats::Loss| format!("{}: {}", loss.item, loss.text);
    for (name, losses) in [
        ("left out", &report.left_out),
        ("not said", &report.losses),
        ("folded", &report.folded),
    ] {
        let lines: Vec<String> = losses.iter().map(loss).collect();
        fields.list(name, &folded(&lines));
    }
    if let Some(alpha) = report.alpha {
        fields.add(
            "alpha",
            format!("{alpha}, to be stated with --adapter-alpha"),
        );
    }
    let size = format!("{} ({} tensors)", bytes(report.bytes), report.tensors);
    fields.add("size", size);
    fields.add("time", format!("{:.2} s", report.seconds));
    fields.add_device(report.device.as_ref());
    fields.print();
}

fn line(module: &ModuleReport) -> String {
    let rank = module
        .rank
        .map_or_else(String::new, |rank| format!(" rank {rank}"));
    let fit = match &module.fit {
        Some(Fit { residual, .. }) => format!(", residual {:.1} %", residual * 100.0),
        None => String::new(),
    };
    format!(
        "{} {}{rank} of {}{fit}",
        module.path, module.method, module.adapters
    )
}
