//! `loratool switch`

use clap::{ArgMatches, Args};
use loratool::Error;
use loratool::ops::merge;
use loratool::ops::switch::{Options, plan};
use loratool::ops::unmerge;

use super::adapters::{Strengths, selections};
use super::merge::finish;
use super::unmerge::taken;
use super::{Common, Outcome, Path, Type, kernel, size};

/// Put other adapters in the place of those that were merged, in one pass.
///
/// The result is that of `unmerge` followed by `merge`, byte for byte, without the base on the disk.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loratool switch --merged merged/ --undo a.undo --adapter a/ --to-adapter b/ --undo-out b.undo --output with-b/
  loratool switch --merged merged/ --undo a.undo --adapter a/ --to-adapter b/ --strength 0.7 --to-adapter c/ -o new/

Each --strength and --strength-for belongs to the adapter before it. Behind --adapter it must
be that of the merge, which the undo file knows.")]
pub(super) struct Switch {
    /// The result of the merge
    #[arg(long, value_name = "PATH")]
    merged: Path,
    /// What the merge wrote beside its result
    #[arg(long, value_name = "FILE")]
    undo: Path,
    /// An adapter that was merged (repeatable)
    #[arg(long, value_name = "PATH", required = true)]
    adapter: Vec<Path>,
    /// An adapter to merge instead (repeatable)
    #[arg(long, value_name = "PATH", required = true)]
    to_adapter: Vec<Path>,
    #[command(flatten)]
    strengths: Strengths,
    /// Merge only modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    only: Vec<String>,
    /// Leave out modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    skip: Vec<String>,
    /// A folder; or a file, if the base was a file and this ends as it does
    #[arg(long, short, value_name = "PATH")]
    output: Path,
    /// Also write what takes the new result back to the base, bit for bit
    #[arg(long, value_name = "FILE")]
    undo_out: Option<Path>,
    /// Type of all floating tensors of the result
    #[arg(long, value_enum, default_value_t = Type::Keep)]
    dtype: Type,
    /// Cut the result into shards of at most this size, such as 5GB or 512MiB
    #[arg(long, value_name = "SIZE")]
    shard_size: Option<String>,
    /// Replace existing outputs, in one step at the end
    #[arg(long)]
    force: bool,
    /// Print the plan and write nothing
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Leave out what has no place in the base
    #[arg(long)]
    allow_unmatched: bool,
    /// Write NaN and infinities where the base is finite
    #[arg(long)]
    allow_nonfinite: bool,
    /// Print warnings and errors only
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    pub(super) common: Common,
}

impl Switch {
    pub(super) fn run(self, matches: &ArgMatches) -> Outcome {
        let plan = plan(&self.options(matches)?)?;
        let (quiet, json) = (self.quiet, self.common.json);
        finish(
            self.dry_run,
            quiet,
            json,
            || plan.report(),
            |control| plan.run(control),
        )
    }

    fn options(&self, matches: &ArgMatches) -> Result<Options, Error> {
        let [old, new] = self.strengths.of(matches, ["adapter", "to_adapter"])?;
        let read = self.common.reading()?;
        Ok(Options {
            from: unmerge::Options {
                merged: self.merged.clone(),
                adapters: taken(&self.adapter, old),
                undo: Some(self.undo.clone()),
                read: read.clone(),
                ..unmerge::Options::default()
            },
            to: merge::Options {
                adapters: selections(&self.to_adapter, new),
                output: self.output.clone(),
                only: self.only.clone(),
                skip: self.skip.clone(),
                dtype: self.dtype.float(),
                undo: self.undo_out.clone(),
                force: self.force,
                shard_size: self.shard_size.as_deref().map(size).transpose()?,
                threads: self.threads.map(usize::from),
                allow_unmatched: self.allow_unmatched,
                allow_nonfinite: self.allow_nonfinite,
                read,
                kernel: kernel(),
                ..merge::Options::default()
            },
        })
    }
}
