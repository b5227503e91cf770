//! `loratool unmerge`

use clap::{ArgMatches, Args};
use loratool::Error;
use loratool::ops::unmerge::{Options, Report, Taken, plan};

use super::adapters::{Adapters, Said};
use super::render::{self, Fields, Stderr, bytes, folded, grouped, with_progress};
use super::{Common, Outcome, Path, Type, Workers, kernel};

/// Take adapters out of a merged checkpoint again.
///
/// With the undo file of the merge the result is the base bit for bit: files, names, types, metadata. The result of the
/// merge, the adapters and the strengths must be those of the merge, down to the last byte. Without it what was added
/// is subtracted, and a bound says how far each tensor may be from the base.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loratool unmerge --merged merged/ --adapter my-lora/ --undo merged.undo --output base/
  loratool unmerge --merged merged/ --adapter my-lora/ --strength 0.8 --output about-the-base/
  loratool unmerge --merged merged/ --adapter my-lora/ --undo merged.undo -o base/ --dry-run

An undo file is written by `loratool merge --undo`. It knows the strengths; one that is
given must be that of the merge.")]
pub(super) struct Unmerge {
    /// The result of the merge
    #[arg(long, value_name = "PATH")]
    merged: Path,
    #[command(flatten)]
    adapters: Adapters,
    /// What the merge wrote beside its result
    #[arg(long, value_name = "FILE")]
    undo: Option<Path>,
    /// A folder; or a file, if the base was a file and this ends as it does
    #[arg(long, short, value_name = "PATH")]
    output: Path,
    /// Without --undo: leave what cannot be taken out as it is in the result
    #[arg(long)]
    allow_kept: bool,
    /// Without --undo: type of all floating tensors of the base
    #[arg(long, value_enum, default_value_t = Type::Keep)]
    dtype: Type,
    /// Replace an existing output, in one step at the end
    #[arg(long)]
    force: bool,
    /// Check that everything belongs together, and write nothing
    #[arg(long, short = 'n')]
    dry_run: bool,
    #[command(flatten)]
    workers: Workers,
    /// Print warnings and errors only
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    pub(super) common: Common,
}

impl Unmerge {
    pub(super) fn run(self, matches: &ArgMatches) -> Outcome {
        let plan = plan(&self.options(matches)?)?;
        let quiet = self.quiet || self.common.json;
        let report = match self.dry_run {
            true => plan.report(),
            false => with_progress(quiet, |control| plan.run(control))?,
        };
        Stderr::new().notices(&report.notices);
        if self.common.json {
            render::json(&report);
        } else if !self.quiet {
            print(&report);
        }
        Ok(0)
    }

    fn options(&self, matches: &ArgMatches) -> Result<Options, Error> {
        let [said] = self.adapters.strengths.of(matches, ["adapter"])?;
        Ok(Options {
            merged: self.merged.clone(),
            adapters: taken(&self.adapters.adapter, said),
            undo: self.undo.clone(),
            output: self.output.clone(),
            allow_kept: self.allow_kept,
            dtype: self.dtype.float(),
            force: self.force,
            threads: self.workers.count(),
            read: self.common.reading()?,
            kernel: kernel(),
        })
    }
}

/// Adapters that were merged, with what is said of their strengths.
pub(super) fn taken(paths: &[Path], said: Vec<Said>) -> Vec<Taken> {
    let taken = |(path, said): (&Path, Said)| Taken {
        path: path.clone(),
        strength: said.strength,
        strength_for: said.strength_for,
    };
    paths.iter().zip(said).map(taken).collect()
}

fn print(report: &Report) {
    let title = match report.dry_run {
        true => "would restore",
        false => "restored",
    };
    let mut fields = Fields::new(&format!("{title} {}", report.output));
    fields.add("merged", &report.merged);
    for adapter in &report.adapters {
        let text = format!("{}, strength {}", adapter.path, adapter.strength);
        fields.add("without", text);
    }
    let exact = match report.exact {
        true => "every byte is that of the base",
        false => "to the bounds below",
    };
    fields.add("exact", exact);
    fields.add(
        "restored",
        format!("{} tensors", grouped(report.tensors as u64)),
    );
    fields.add(
        "copied",
        format!("{} tensors", grouped(report.copied_tensors as u64)),
    );
    let bounds: Vec<String> = report
        .bounds
        .iter()
        .map(|bound| {
            let impossible = match bound.impossible {
                0 => String::new(),
                count => format!(", {} elements were not merged like this", grouped(count)),
            };
            format!(
                "{}: at most {:.3e} off, {:.3} % expected to differ{impossible}",
                bound.tensor,
                bound.most,
                bound.differing * 100.0
            )
        })
        .collect();
    fields.list("bounds", &bounds);
    let file =
        |file: &loratool::ops::merge::FileReport| format!("{} ({})", file.name, bytes(file.bytes));
    fields.list(
        "files",
        &folded(&report.files.iter().map(file).collect::<Vec<_>>()),
    );
    fields.list("beside", &folded(&report.copied));
    fields.add("disk", bytes(report.disk));
    if let Some(seconds) = report.seconds {
        let (threads, kernel) = (report.threads, &report.kernel);
        fields.add(
            "time",
            format!("{seconds:.2} s with {threads} threads ({kernel})"),
        );
    }
    fields.print();
}
