//! `loratool inspect`

use clap::Args;
use loratool::adapter::Scale;
use loratool::ops::convert::targets;
use loratool::ops::inspect::{AdapterView, Conversion, Inspection, Options, inspect};

use super::render::{self, Fields, Stderr, bytes, counts, folded, grouped};
use super::{Common, Outcome, Path};

/// Say what a file or folder is: container, format, methods, ranks and scales, targets, extras.
///
/// Reads headers and configuration only, never tensor data.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loratool inspect my-adapter/
  loratool inspect adapter_model.safetensors --json | jq .adapter.scales
  loratool inspect my-lora.safetensors --to all
  loratool inspect flux-lora.safetensors --to kohya --to xlabs --family flux1
  loratool inspect my-lora/ --to gguf --base llama/
  loratool inspect simo.safetensors --order sd1")]
pub(super) struct Inspect {
    /// An adapter folder, a checkpoint folder, or a file of tensors
    path: Path,
    #[command(flatten)]
    targets: Targets,
    /// A base that tells the names that --to needs
    #[arg(long, value_name = "BASE", requires = "to")]
    base: Option<Path>,
    #[command(flatten)]
    pub(super) common: Common,
}

/// What would be lost in other formats.
#[derive(Args, Debug)]
pub(super) struct Targets {
    /// List what this format cannot say (repeatable; `all`: each that is written)
    #[arg(long, value_name = "FORMAT", value_parser = super::targets(["all"]), hide_possible_values = true)]
    to: Vec<String>,
    /// The family of the model, where names alone do not tell it
    #[arg(long, value_name = "NAME", requires = "to")]
    family: Option<String>,
}

impl Targets {
    pub(super) fn options(
        &self,
        common: &Common,
        base: Option<&Path>,
    ) -> loratool::Result<Options> {
        let all = self.to.iter().any(|to| to == "all");
        Ok(Options {
            read: common.reading()?,
            to: match all {
                true => targets().map(|format| format.id().to_owned()).collect(),
                false => self.to.clone(),
            },
            base: base.cloned(),
            family: self.family.clone(),
        })
    }
}

impl Inspect {
    pub(super) fn run(self) -> Outcome {
        let options = self.targets.options(&self.common, self.base.as_ref())?;
        let inspection = inspect(&self.path, &options)?;
        if self.common.json {
            render::json(&inspection);
        } else {
            print(&inspection);
        }
        Stderr::new().notices(&inspection.notices);
        Ok(inspection.exit_code())
    }
}

/// The description, for people.
pub(super) fn print(inspection: &Inspection) {
    let mut fields = Fields::new(&format!("{}: {}", inspection.path, inspection.what));
    fields.add("container", &inspection.container);
    if let Some(format) = &inspection.format_name {
        fields.add("format", format);
    }
    if let Some(adapter) = &inspection.adapter {
        of_adapter(&mut fields, adapter);
    }
    if let Some(summary) = &inspection.summary {
        fields.add(
            "methods",
            summary
                .methods
                .iter()
                .cloned()
                .collect::<Vec<_>>()
                .join(", "),
        );
        fields.add("modules", grouped(summary.modules as u64));
        if !summary.ranks.is_empty() {
            fields.add(
                "rank",
                counts(summary.ranks.iter().map(|(rank, count)| (rank, *count))),
            );
        }
        for (name, value) in &summary.facts {
            fields.add("says", format!("{name} = {value}"));
        }
    }
    if let Some(checkpoint) = &inspection.checkpoint {
        fields.list("shards", &folded(&checkpoint.shards));
        for (name, value) in &checkpoint.config {
            fields.add("config", format!("{name} = {value}"));
        }
        if let Some(quantisation) = &checkpoint.quantisation {
            fields.add("quantised", quantisation);
        }
    }
    fields.add(
        "types",
        counts(
            inspection
                .dtypes
                .iter()
                .map(|(dtype, count)| (dtype, *count)),
        ),
    );
    fields.add(
        "size",
        format!(
            "{} parameters in {} tensors, {}",
            grouped(inspection.parameters),
            grouped(inspection.tensors as u64),
            bytes(inspection.bytes)
        ),
    );
    for conversion in &inspection.conversions {
        fields.list(&format!("to {}", conversion.to), &of_conversion(conversion));
    }
    if let Some(problem) = &inspection.problem {
        fields.add("problem", &problem.text);
    }
    fields.print();
}

fn of_adapter(fields: &mut Fields, adapter: &AdapterView) {
    fields.add(
        "methods",
        counts(
            adapter
                .methods
                .iter()
                .map(|(method, count)| (method, *count)),
        ),
    );
    if !adapter.ranks.is_empty() {
        fields.add(
            "rank",
            counts(adapter.ranks.iter().map(|(rank, count)| (rank, *count))),
        );
    }
    let scales: Vec<String> = adapter
        .scales
        .iter()
        .map(|(scale, count)| format!("{} ({count})", scale_text(scale)))
        .collect();
    if !adapter.ranks.is_empty() {
        fields.list("scale", &folded(&scales));
    }
    let paths: Vec<&str> = adapter
        .modules
        .iter()
        .map(|module| module.path.as_str())
        .collect();
    fields.list("targets", &folded(&paths));
    let replacements: Vec<String> = adapter
        .replacements
        .iter()
        .map(|replacement| {
            format!(
                "{} {:?} ({})",
                replacement.name, replacement.shape, replacement.kind
            )
        })
        .collect();
    fields.list("replaces", &folded(&replacements));
    let tokens: Vec<String> = adapter
        .tokens
        .iter()
        .map(|(path, indices)| format!("{} rows of {path}", indices.len()))
        .collect();
    fields.list("tokens", &folded(&tokens));
    if !adapter.layer_replication.is_empty() {
        let ranges: Vec<String> = adapter
            .layer_replication
            .iter()
            .map(|(a, b)| format!("{a}..{b}"))
            .collect();
        fields.add("layers", format!("repeated: {}", ranges.join(", ")));
    }
    if let Some(base) = &adapter.facts.base {
        fields.add("base", base);
    }
    if let Some(tool) = &adapter.facts.tool {
        fields.add("tool", tool);
    }
    for (name, value) in &adapter.facts.other {
        fields.add("says", format!("{name} = {value}"));
    }
}

fn of_conversion(conversion: &Conversion) -> Vec<String> {
    if let Some(problem) = &conversion.problem {
        let hint = problem.hint.iter().map(|hint| format!("({hint})"));
        return std::iter::once(problem.text.clone()).chain(hint).collect();
    }
    let lost = conversion
        .losses
        .iter()
        .map(|loss| format!("loses {}: {}", loss.item, loss.text));
    let mut lines = folded(&lost.collect::<Vec<_>>());
    if !conversion.folded.is_empty() {
        lines.push(format!(
            "scales multiplied into factors: {}",
            conversion.folded.len()
        ));
    }
    if lines.is_empty() {
        lines.push("everything".to_owned());
    }
    lines
}

/// `2 = 32/16`, `8 = 32/√16`
fn scale_text(scale: &Scale) -> String {
    match (scale.alpha, scale.rank) {
        (Some(alpha), Some(rank)) => {
            let root = if scale.root { "√" } else { "" };
            let doubled = if scale.value == 2.0 * Scale::of(alpha, rank, scale.root).value {
                "2 · "
            } else {
                ""
            };
            format!("{} = {doubled}{alpha}/{root}{rank}", scale.value)
        }
        _ => scale.value.to_string(),
    }
}
