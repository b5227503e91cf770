//! `loratool switch`

use clap::{ArgMatches, Args};
use loratool::Error;
use loratool::ops::merge;
use loratool::ops::switch::{Options, plan};
use loratool::ops::unmerge;

use super::adapters::{Strengths, selections};
use super::merge::Merging;
use super::unmerge::taken;
use super::{Outcome, Path};

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
    #[command(flatten)]
    merging: Merging,
    /// Also write what takes the new result back to the base, bit for bit
    #[arg(long, value_name = "FILE")]
    undo_out: Option<Path>,
}

impl Switch {
    /// Whether one JSON document is wanted.
    pub(super) fn json(&self) -> bool {
        self.merging.common.json
    }

    pub(super) fn run(self, matches: &ArgMatches) -> Outcome {
        let plan = plan(&self.options(matches)?)?;
        let run = |control: &merge::Control<'_>| plan.run(control);
        self.merging.finish(|| plan.report(), run)
    }

    fn options(&self, matches: &ArgMatches) -> Result<Options, Error> {
        let [old, new] = self.strengths.of(matches, ["adapter", "to_adapter"])?;
        let to = self.merging.options()?;
        Ok(Options {
            from: unmerge::Options {
                merged: self.merged.clone(),
                adapters: taken(&self.adapter, old),
                undo: Some(self.undo.clone()),
                read: to.read.clone(),
                ..unmerge::Options::default()
            },
            to: merge::Options {
                adapters: selections(&self.to_adapter, new),
                undo: self.undo_out.clone(),
                ..to
            },
        })
    }
}
