//! `loratool resize`

use clap::{Args, ValueEnum};
use loratool::ops::resize::{Counting, How, Options, Ranks, Report, ResizedReport, plan};
use loratool::{Error, Reason};

use super::convert::{Changing, Writing};
use super::plot;
use super::render::{self, Fields, Stderr, bytes, folded, with_progress};
use super::table::{kinds, numbers, percent, shares};
use super::{DECOMPOSED_ON, Devices, Outcome, Path, Workers, size};

/// Give an adapter other ranks, with the least that they can leave out.
///
/// What a module adds is decomposed by its factors, never as the whole matrix; the first singular values are
/// kept. A larger rank is zeros behind the factors. Scales stay what they are; of DoRA the magnitudes stay,
/// and what is added to the weight is resized.
#[derive(Args, Debug)]
#[command(mut_arg("device", |device| device.help(DECOMPOSED_ON)), after_help = "\
Examples:
  loratool resize my-lora/ --rank 8 --output small/
  loratool resize my-lora/ --energy 0.95 --output small/ --dry-run
  loratool resize style.safetensors --sv-fro 0.9 --conv-rank 4 --output small.safetensors
  loratool resize style.safetensors --budget 20MB --dtype f16 --output small.safetensors
  loratool resize style.safetensors --rank 16 --sv-ratio 4 --compat kohya --output small.safetensors
  loratool resize my-lora/ --rank 64 --only q_proj --output wider/")]
pub(super) struct Resize {
    /// An adapter folder, or its file of tensors
    adapter: Path,
    /// Rank of every module; with --compat kohya and a rule the largest rank that the rule may choose
    #[arg(long, value_name = "R", required_unless_present_any = ["energy", "sv_ratio", "sv_fro", "sv_cumulative", "budget"])]
    rank: Option<usize>,
    /// The smallest rank that keeps this share of the sum of squared singular values
    #[arg(
        long,
        value_name = "SHARE",
        group = "rule",
        allow_negative_numbers = true
    )]
    energy: Option<f64>,
    /// As many ranks as there are singular values above the largest divided by this
    #[arg(
        long,
        value_name = "RATIO",
        group = "rule",
        allow_negative_numbers = true
    )]
    sv_ratio: Option<f64>,
    /// The smallest rank that keeps this share of the Frobenius norm
    #[arg(
        long,
        value_name = "SHARE",
        group = "rule",
        allow_negative_numbers = true
    )]
    sv_fro: Option<f64>,
    /// The smallest rank that keeps this share of the sum of singular values
    #[arg(
        long,
        value_name = "SHARE",
        group = "rule",
        allow_negative_numbers = true
    )]
    sv_cumulative: Option<f64>,
    /// The best ranks that a file of this size holds, such as 20MB
    #[arg(long, value_name = "SIZE", group = "rule")]
    budget: Option<String>,
    /// Rank of convolutions; with a rule the largest that it may choose for them
    #[arg(long, value_name = "R")]
    conv_rank: Option<usize>,
    /// Largest rank that a rule may choose [default: the rank that a module has]
    #[arg(long, value_name = "R", requires = "rule")]
    max_rank: Option<usize>,
    /// Count singular values as another tool does
    #[arg(long, value_enum)]
    compat: Option<Compat>,
    #[command(flatten)]
    changing: Changing,
    #[command(flatten)]
    workers: Workers,
    /// Library of linear algebra, where the build has several
    #[arg(long, value_name = "NAME")]
    algebra: Option<String>,
    #[command(flatten)]
    devices: Devices,
    /// Draw the singular values and what is left of each module into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<Path>,
    #[command(flatten)]
    pub(super) writing: Writing,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Compat {
    /// resize_lora.py of sd-scripts: one rank more than the rule says
    Kohya,
}

impl Resize {
    pub(super) fn run(&self) -> Outcome {
        let options = self.options()?;
        let writing = &self.writing;
        let inputs = [self.adapter.as_path()];
        let drawing =
            plot::destination(self.plot.as_deref(), &writing.output, writing.force, inputs)?;
        let hidden = writing.is_quiet();
        let plan = with_progress(hidden, |control| plan(&options, control))?;
        let stderr = Stderr::new();
        stderr.notices(&plan.report().conversion.notices);
        let report = match writing.dry_run {
            true => plan.report().clone(),
            false => with_progress(hidden, |control| plan.run(control))?,
        };
        if let Some(drawing) = drawing {
            let title = format!(
                "{} → {}",
                report.conversion.adapter, report.conversion.output
            );
            let layers = report.resized.iter().map(|module| plot::Layer {
                path: &module.path,
                rank: module.rank,
                residual: module.residual,
                values: &module.singular_values,
            });
            drawing.write(plot::spectra(&title, &layers.collect::<Vec<_>>())?.as_bytes())?;
        }
        if writing.common.json {
            render::json(&report);
            return Ok(0);
        }
        if !writing.quiet {
            print(&report);
        }
        writing.tell_people(&report.conversion);
        Ok(0)
    }

    fn options(&self) -> Result<Options, Error> {
        let rule = match (self.energy, self.sv_ratio, self.sv_fro, self.sv_cumulative) {
            (Some(share), ..) => Some(Ranks::Energy(share)),
            (_, Some(ratio), ..) => Some(Ranks::Ratio(ratio)),
            (_, _, Some(share), _) => Some(Ranks::Norm(share)),
            (.., Some(share)) => Some(Ranks::Sum(share)),
            _ => None,
        };
        let budget = self.budget.as_deref().map(size).transpose()?;
        let rule = rule.or(budget.map(Ranks::Budget));
        let (ranks, max_rank) = match (rule, self.rank, self.compat, self.max_rank) {
            (Some(rule), None, _, most) => (rule, most),
            (Some(rule), Some(most), Some(Compat::Kohya), None) => (rule, Some(most)),
            (Some(_), Some(rank), ..) => {
                return Err(Error::new(Reason::BadOption {
                    text: format!("--rank {rank}"),
                    problem: "the rule chooses the rank; --max-rank limits it".to_owned(),
                }));
            }
            (None, rank, ..) => (Ranks::Fixed(rank.unwrap_or(0)), None),
        };
        Ok(Options {
            conversion: self.changing.options(&self.adapter, &self.writing)?,
            ranks,
            conv_rank: self.conv_rank,
            max_rank,
            counting: match self.compat {
                Some(Compat::Kohya) => Counting::SdScripts,
                None => Counting::Exact,
            },
            threads: self.workers.count(),
            algebra: self.algebra.clone(),
            device: self.devices.choice(self.algebra.as_deref())?,
        })
    }
}

/// The report for people: a line for each kind of module, the total, and what stays as it was.
fn print(report: &Report) {
    let total = &report.total;
    let done = match report.conversion.dry_run {
        true => "would resize",
        false => "resized",
    };
    let mut fields = Fields::new(&format!(
        "{done} {} ({} modules of {})",
        report.conversion.adapter,
        report
            .resized
            .iter()
            .map(|module| 1 + module.parts.len())
            .sum::<usize>(),
        report.conversion.modules
    ));
    fields.list("layer", &table(&report.resized));
    fields.add(
        "ranks",
        format!("{} → {}, all together", total.old_ranks, total.ranks),
    );
    fields.add("energy kept", percent(total.energy));
    fields.add(
        "residual",
        format!("{} of what is added", percent(total.residual)),
    );
    if total.not_reached > 0 {
        let text = format!(
            "{} modules have the largest rank allowed, and not what was asked for",
            total.not_reached
        );
        fields.add("not reached", text);
    }
    let kept: Vec<String> = report
        .kept
        .iter()
        .map(|kept| format!("{}: {}", kept.item, kept.text))
        .collect();
    fields.list("as it was", &folded(&kept));
    fields.add(
        "size",
        format!(
            "{} → {}",
            bytes(report.adapter_bytes),
            bytes(report.conversion.bytes)
        ),
    );
    fields.add("time", format!("{:.1} s", report.seconds));
    fields.add_device(report.device.as_ref());
    fields.print();
}

/// Lines of which each stands for the modules of one kind: what all have, or the range.
fn table(modules: &[ResizedReport]) -> Vec<String> {
    let lines = kinds(modules, |module| &module.path).into_iter();
    let lines: Vec<String> = lines
        .map(|(kind, group)| {
            let (old, new) = (
                numbers(group.iter().map(|module| module.old_rank)),
                numbers(group.iter().map(|module| module.rank)),
            );
            let is_same = group.iter().all(|module| module.how == How::Same);
            if is_same {
                return format!("{kind} ({}): rank {old}, as it was", group.len());
            }
            format!(
                "{kind} ({}): rank {old} → {new}, energy {}, residual {}",
                group.len(),
                shares(group.iter().map(|module| module.energy)),
                shares(group.iter().map(|module| module.residual)),
            )
        })
        .collect();
    folded(&lines)
}
