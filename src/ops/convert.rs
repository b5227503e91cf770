//! From one spelling to another: read, rename, write; what the target cannot say is listed.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::merge::Control;
use super::outgoing::{Base, Outgoing, Wish, writable, write};
use crate::adapter::{Adapter, ReplacementKind};
use crate::checkpoint::sink::Destination;
use crate::error::Result;
use crate::formats::{Format, Found, Loss, ReadOptions, Written};
use crate::naming::{Resolution, Rows};
use crate::notice::{Notice, NoticeKind};
use crate::pattern::Choice;
use crate::tensor::Float;

pub use super::outgoing::{Names, format, targets};

/// What to convert into what, and what to accept.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// An adapter folder, or its file of tensors.
    pub adapter: PathBuf,
    /// The short name of the target format.
    pub to: String,
    /// A folder; or a file, where the format is one file and the name ends as it does.
    pub output: PathBuf,
    /// A base that tells names and numbers of heads.
    pub base: Option<PathBuf>,
    /// The family of the model, where names alone do not tell it.
    pub family: Option<String>,
    /// Writes what can be said and leaves out the rest.
    pub allow_losses: bool,
    /// The part of a pipeline (`unet`, `text_encoder`) that names are of which do not say it.
    pub component: Option<String>,
    /// The type of the factors; their own if absent.
    pub dtype: Option<Float>,
    /// What stands before flattened names (`lycoris_`).
    pub prefix: Option<String>,
    /// `diffusers` or `ldm`: the names of layers, where the format has both.
    pub names: Option<Names>,
    /// Regular expressions (searched anywhere in a module path): only these modules.
    pub only: Vec<String>,
    /// Regular expressions: not these modules.
    pub skip: Vec<String>,
    /// Replaces an existing output.
    pub force: bool,
    /// How the adapter is read.
    pub read: ReadOptions,
}

/// What a conversion did, or would do.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this schema.
    pub schema: u32,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// The adapter.
    pub adapter: String,
    /// The short name of its format.
    pub from: String,
    /// The short name of the target format.
    pub to: String,
    /// The output.
    pub output: String,
    /// The family that names were looked up in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Modules in the adapter.
    pub modules: usize,
    /// Tensors in the output.
    pub tensors: usize,
    /// Bytes of the output's file of tensors.
    pub bytes: u64,
    /// What the target cannot say.
    pub losses: Vec<Loss>,
    /// Scales that were multiplied into factors.
    pub folded: Vec<Loss>,
    /// The alpha that has to be stated when the output is read, where its format has no place for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// What is odd about the adapter.
    pub notices: Vec<Notice>,
}

/// A conversion that can be run.
pub struct Plan {
    options: Options,
    found: Found,
    base: Option<Base>,
    outgoing: Outgoing,
    report: Report,
}

/// Reads, renames and checks; writes nothing.
///
/// # Errors
/// What reading gives, names that are not unambiguous, and losses that were not allowed, all listed.
pub fn plan(options: &Options) -> Result<Plan> {
    planned(options, |adapter| {
        select(adapter, options)?;
        Ok(Vec::new())
    })
}

/// The options with the adapter's own format, and its own names, where they name none.
///
/// # Errors
/// [`Reason::NotWritten`] where that is not written; what reading gives for what no format recognises.
pub(super) fn in_own_format(options: &Options) -> Result<Options> {
    let mut conversion = options.clone();
    if !conversion.to.is_empty() {
        return Ok(conversion);
    }
    let found = Found::open(&conversion.adapter)?;
    conversion.names = conversion.names.or(Some(Names::Own));
    match found.format() {
        Some(format) => conversion.to = writable(format, &conversion.adapter)?.id().to_owned(),
        // What no format recognises is told as reading tells it.
        None => drop(found.read(&conversion.read)?),
    }
    Ok(conversion)
}

/// The same for an adapter that is changed on the way; the change tells what it multiplied into parameters.
pub(super) fn planned(
    options: &Options,
    change: impl FnOnce(&mut Adapter) -> Result<Vec<Loss>>,
) -> Result<Plan> {
    let target = format(&options.to)?;
    let found = Found::open(&options.adapter)?;
    let source = found.format().map_or("", Format::id);
    let mut adapter = found.read(&ReadOptions {
        carry_vectors: true,
        ..options.read.clone()
    })?;
    found.file.verify()?;
    let base = options.base.as_deref().map(Base::open).transpose()?;
    let multiplied = change(&mut adapter)?;
    let metadata = &found.file.directory.metadata;
    let wish = Wish {
        family: options.family.as_deref(),
        component: options.component.as_deref(),
        dtype: options.dtype,
        prefix: options.prefix.as_deref(),
        names: options.names,
        order: options.read.order.as_ref(),
    };
    let (mut written, family) = write(&adapter, metadata, target, base.as_ref(), wish)?;
    if let Some(base) = &base {
        forgive_copies(&adapter, base, &mut written)?;
    }
    let outgoing = Outgoing::new(
        written,
        target,
        (&options.adapter, &options.output),
        options.prefix.as_deref(),
        options.allow_losses,
    )?;
    let written = &outgoing.written;
    let report = Report {
        schema: 1,
        dry_run: true,
        adapter: options.adapter.to_string_lossy().into_owned(),
        from: source.to_owned(),
        to: options.to.clone(),
        output: options.output.to_string_lossy().into_owned(),
        family: family.map(str::to_owned),
        modules: adapter.modules.len(),
        tensors: written.tensors.len(),
        bytes: outgoing.bytes()?,
        losses: written.losses.clone(),
        folded: [&*multiplied, &written.folded].concat(),
        alpha: written.alpha,
        notices: [&*adapter.notices, &written.notices].concat(),
    };
    let plan = Plan {
        options: options.clone(),
        found,
        base,
        outgoing,
        report,
    };
    plan.destination(&Control::default())?
        .check_space(plan.report.bytes)?;
    Ok(plan)
}

/// Takes copies of the base's own weights from what cannot be said: PEFT writes them beside new tokens.
fn forgive_copies(adapter: &Adapter, base: &Base, written: &mut Written) -> Result<()> {
    let mut copies = Vec::new();
    for replacement in &adapter.replacements {
        let name = &*replacement.name;
        if !written.losses.iter().any(|loss| loss.item == name) {
            continue;
        }
        let (path, parameter) = name.rsplit_once('.').unwrap_or(("", name));
        let places = match base.resolver.resolve_parameter(path, parameter) {
            Resolution::Exact(places) | Resolution::Renamed(places) => places,
            _ => continue,
        };
        let own = match places.as_slice() {
            [place] if place.rows == Rows::Whole => base.checkpoint.tensor(&place.tensor),
            _ => None,
        };
        if let Some(own) = own.filter(|own| Float::of(own.dtype).is_some())
            && own.equals(&replacement.tensor)?
        {
            copies.push(name);
        }
    }
    written.losses.retain(|loss| !copies.contains(&&*loss.item));
    written.notices.extend(copies.into_iter().map(|name| {
        let text = "a copy of the base's own weight, which is left out";
        Notice::new(NoticeKind::BaseCopy, text).on(name)
    }));
    Ok(())
}

fn select(adapter: &mut Adapter, options: &Options) -> Result<()> {
    let choice = Choice::new(&options.only, &options.skip)?;
    let mut failed = None;
    let mut keep = |path: &str| {
        choice.keeps(path).unwrap_or_else(|error| {
            failed.get_or_insert(error);
            false
        })
    };
    adapter.modules.retain(|module| keep(&module.path));
    adapter.replacements.retain(|replacement| {
        replacement.kind == ReplacementKind::BaseLayer || keep(&replacement.name)
    });
    adapter.tokens.retain(|tokens| keep(&tokens.path));
    adapter.paddings.retain(|padding| keep(&padding.path));
    failed.map_or(Ok(()), Err)
}

impl Plan {
    /// Tells what a run would do.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Bytes of the file of tensors that is read.
    pub(super) fn adapter_bytes(&self) -> u64 {
        self.found.file.input.len()
    }

    fn destination(&self, control: &Control<'_>) -> Result<Destination> {
        let files = self.found.inputs().map(|input| input.path());
        let base = self
            .base
            .iter()
            .flat_map(|base| base.checkpoint.inputs())
            .map(|input| input.path());
        let folder = self
            .found
            .path
            .is_dir()
            .then_some(self.found.path.as_path());
        let inputs: Vec<&Path> = files.chain(base).chain(folder).collect();
        self.outgoing
            .destination(&self.options.output, self.options.force, inputs, control)
    }

    /// Writes the output, complete or not at all.
    ///
    /// # Errors
    /// Those of kinds Output, Io, Changed and Interrupted; the output is then as it was.
    pub fn run(mut self, control: &Control<'_>) -> Result<Report> {
        let sink = self.destination(control)?.begin()?;
        let inputs = self.found.inputs();
        self.outgoing.publish(sink, control, || {
            inputs
                .into_iter()
                .try_for_each(|input| input.verify_unchanged())
        })?;
        self.report.dry_run = false;
        Ok(self.report)
    }
}
