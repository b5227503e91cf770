//! `loratool check`

use clap::Args;
use loratool::ops::check::check;
use loratool::printable;

use super::{Common, Outcome, Path, inspect, render};

/// Decide whether a file may ship: everything `inspect` knows, plus the laws. Made for CI.
///
/// Reads all values. Exit code 0 only if nothing at all is odd; 1 if the file can be read but something
/// is odd; otherwise the code of the first error.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loratool check my-adapter/
  loratool check my-adapter/ --base base-model/ --json > verdict.json
  loratool check my-lora.safetensors --to comfyui      # nothing may be lost there
  loratool check flux-lora.safetensors --to kohya --family flux1 --quiet
  loratool check lora.pt --base roberta/ --adapter-alpha 16")]
pub(super) struct Check {
    /// An adapter folder, a checkpoint folder, or a file of tensors
    path: Path,
    /// Check also that every module has its place in this base
    #[arg(long, value_name = "BASE")]
    base: Option<Path>,
    #[command(flatten)]
    targets: inspect::Targets,
    /// Print nothing but findings
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    pub(super) common: Common,
}

impl Check {
    pub(super) fn run(self) -> Outcome {
        let options = self.targets.options(&self.common, self.base.as_ref())?;
        let verdict = check(&self.path, &options);
        if self.common.json {
            render::json(&verdict);
            return Ok(verdict.exit_code);
        }
        if let Some(inspection) = verdict.inspection.as_ref().filter(|_| !self.quiet) {
            inspect::print(inspection);
        }
        for finding in &verdict.findings {
            let place = [&finding.file, &finding.item];
            let mut line = format!("{}: ", finding.kind);
            for part in place.into_iter().flatten() {
                line.push_str(&format!("{part}: "));
            }
            line.push_str(&finding.text);
            render::out(&printable(&line));
        }
        if !self.quiet {
            render::out(match verdict.clean {
                true => "clean",
                false => "not clean",
            });
        }
        Ok(verdict.exit_code)
    }
}
