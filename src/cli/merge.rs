//! `loratool merge`

use clap::{ArgMatches, Args};
use loratool::Error;
use loratool::checkpoint::Variant;
use loratool::ops::merge::{Control, MergeDevice, Options, Report, plan};

use super::adapters::Adapters;
use super::render::{self, Fields, Stderr, bytes, folded, grouped, with_progress};
use super::{Common, Devices, Outcome, Path, Type, Workers, kernel, size};

/// Write adapters into a base, so that serving the result costs nothing extra.
///
/// The result is the exact sum, rounded once to the type of each tensor; the same bytes on every machine
/// and with any number of threads. It appears complete or not at all, and inputs are never changed.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loratool merge --base llama/ --adapter my-lora/ --output merged/
  loratool merge --base llama/ --adapter a/ --strength 0.7 --adapter b/ --strength -0.3 -o merged/
  loratool merge --base model.safetensors --adapter lora/ --output merged.safetensors --dtype f16
  loratool merge --base llama/ --adapter my-lora/ --output merged/ --undo merged.undo
  loratool merge --base llama/ --adapter my-lora/ --output merged/ --dry-run

Each --strength and --strength-for belongs to the --adapter before it; a --strength-for
before the first --adapter belongs to all of them.")]
pub(super) struct Merge {
    /// A file of tensors, or a folder with one or with an index and its shards
    #[arg(long, value_name = "PATH")]
    base: Path,
    /// Which weights, where the base has several (fp16, non_ema; default for those without a name)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    #[command(flatten)]
    adapters: Adapters,
    #[command(flatten)]
    merging: Merging,
    /// Also write what takes the result back to the base, bit for bit (see `unmerge`)
    #[arg(long, value_name = "FILE")]
    undo: Option<Path>,
}

/// How adapters are merged, whatever the base.
#[derive(Args, Debug)]
pub(super) struct Merging {
    /// Merge only modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    only: Vec<String>,
    /// Leave out modules whose path the pattern finds (repeatable)
    #[arg(long, value_name = "REGEX")]
    skip: Vec<String>,
    /// A folder; or a file, if the base is a file and this ends as the result does (.safetensors)
    #[arg(long, short, value_name = "PATH")]
    output: Path,
    /// Type of all floating tensors of the result
    #[arg(long, value_enum, default_value_t = Type::Keep)]
    dtype: Type,
    /// Cut the result into shards of at most this size, such as 5GB or 512MiB
    #[arg(long, value_name = "SIZE")]
    shard_size: Option<String>,
    /// Replace an existing output, in one step at the end
    #[arg(long)]
    force: bool,
    /// Print the plan and write nothing
    #[arg(long, short = 'n')]
    dry_run: bool,
    #[command(flatten)]
    workers: Workers,
    #[command(flatten)]
    devices: Devices,
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

impl Merge {
    /// Whether one JSON document is wanted.
    pub(super) fn json(&self) -> bool {
        self.merging.common.json
    }

    pub(super) fn run(self, matches: &ArgMatches) -> Outcome {
        let plan = plan(&self.options(matches)?)?;
        let run = |control: &Control<'_>| plan.run(control);
        self.merging.finish(|| plan.report(), run)
    }

    fn options(&self, matches: &ArgMatches) -> Result<Options, Error> {
        Ok(Options {
            base: self.base.clone(),
            variant: self.variant.clone().map_or(Variant::Only, Variant::Named),
            adapters: self.adapters.selections(matches)?,
            undo: self.undo.clone(),
            ..self.merging.options()?
        })
    }
}

impl Merging {
    /// The options, but for what is merged into what.
    pub(super) fn options(&self) -> Result<Options, Error> {
        Ok(Options {
            output: self.output.clone(),
            only: self.only.clone(),
            skip: self.skip.clone(),
            dtype: self.dtype.float(),
            force: self.force,
            shard_size: self.shard_size.as_deref().map(size).transpose()?,
            threads: self.workers.count(),
            allow_unmatched: self.allow_unmatched,
            allow_nonfinite: self.allow_nonfinite,
            read: self.common.reading()?,
            device: self.devices.choice(None)?,
            kernel: kernel(),
            ..Options::default()
        })
    }

    /// Runs a plan, or tells it alone.
    pub(super) fn finish(
        &self,
        report: impl Fn() -> Report,
        run: impl FnOnce(&Control<'_>) -> Result<Report, Error>,
    ) -> Outcome {
        let (quiet, json) = (self.quiet, self.common.json);
        let stderr = Stderr::new();
        let report = match self.dry_run {
            true => report(),
            false => {
                let result = with_progress(quiet || json, run);
                result.inspect_err(|_| stderr.notices(&report().notices))?
            }
        };
        stderr.notices(&report.notices);
        if json {
            render::json(&report);
        } else if !quiet {
            print(&report);
        }
        Ok(0)
    }
}

fn print(report: &Report) {
    let title = if report.dry_run {
        "would merge into"
    } else {
        "merged into"
    };
    let mut fields = Fields::new(&format!("{title} {}", report.output));
    fields.add("base", &report.base);
    for (index, adapter) in report.adapters.iter().enumerate() {
        let name = if report.adapters.len() == 1 {
            "adapter".to_owned()
        } else {
            format!("adapter {}", index + 1)
        };
        fields.add(
            &name,
            format!(
                "{} ({}), strength {}",
                adapter.path, adapter.format, adapter.strength
            ),
        );
    }
    add_modules(&mut fields, report);
    for change in &report.changes {
        if let Some(relative) = change.relative {
            let text = format!(
                "{:>9.3} %  {} ({})",
                relative * 100.0,
                change.kind,
                change.tensors
            );
            fields.add("change", text);
        }
    }
    fields.list("replaced", &folded(&report.replaced));
    fields.list("added", &folded(&report.added));
    for (tensor, rows) in &report.token_rows {
        fields.add("token rows", format!("{} of {tensor}", rows.len()));
    }
    fields.list("left out", &folded(&report.left_out));
    for edit in &report.config {
        fields.add("config", format!("{} = {}", edit.field, edit.value));
    }
    fields.list("copied", &folded(&report.copied));
    fields.list("not copied", &folded(&report.not_copied));
    let files: Vec<String> = report
        .files
        .iter()
        .map(|file| format!("{} ({})", file.name, bytes(file.bytes)))
        .collect();
    fields.list("files", &folded(&files));
    if report.not_finite > 0 {
        fields.add(
            "not finite",
            format!("{} values", grouped(report.not_finite)),
        );
    }
    if let Some(undo) = &report.undo {
        let share = undo
            .share
            .map(|share| format!(", {:.3} % of what changed", share * 100.0));
        let text = format!(
            "{} ({}{})",
            undo.path,
            bytes(undo.bytes),
            share.unwrap_or_default()
        );
        fields.add("undo", text);
    }
    if let Some(device) = &report.device {
        add_device(&mut fields, device);
    }
    fields.add("disk", bytes(report.disk));
    if report.dry_run {
        fields.add("memory", format!("about {}", bytes(report.memory)));
    }
    if let Some(seconds) = report.seconds {
        fields.add(
            "time",
            format!(
                "{seconds:.2} s with {} threads ({})",
                report.threads, report.kernel
            ),
        );
    }
    fields.print();
}

fn add_device(fields: &mut Fields, device: &MergeDevice) {
    fields.add_device(Some(&device.chosen));
    let Some(work) = &device.work else { return };
    if work.tensors > 0 {
        let text = format!(
            "{} tensors on it, {} of {} values by the definition",
            work.tensors,
            grouped(work.recomputed),
            grouped(work.elements)
        );
        fields.add("", text);
    }
    for (reason, tensors) in &work.processor {
        fields.add("", format!("{tensors} tensors without it: {reason}"));
    }
}

fn add_modules(fields: &mut Fields, report: &Report) {
    let paths: Vec<String> = report
        .modules
        .iter()
        .filter(|module| module.part == "weight")
        .map(|module| match module.rank {
            Some(rank) => format!(
                "{} {} rank {rank}, scale {}",
                module.path, module.method, module.scale.value
            ),
            None => format!("{} {}", module.path, module.method),
        })
        .collect();
    fields.add("modules", grouped(paths.len() as u64));
    if report.dry_run {
        let plan: Vec<String> = report
            .modules
            .iter()
            .map(|module| {
                format!(
                    "{} -> {} rows {}..{} {} {} x {}",
                    module.path,
                    module.tensor,
                    module.rows[0],
                    module.rows[1],
                    module.method,
                    module.strength,
                    module.scale.value
                )
            })
            .collect();
        // Every line: that is what a dry run is for.
        fields.list("plan", &plan);
    } else {
        fields.list("", &folded(&paths));
    }
}
