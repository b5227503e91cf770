//! From one spelling to another: read, rename, write; what the target cannot say is listed.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::merge::{Control, architecture};
use crate::adapter::{Adapter, ReplacementKind};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::sink::{Destination, Shape};
use crate::containers::TensorFile;
use crate::error::{Error, Reason, Result};
use crate::formats::{CONFIG, Draft, FORMATS, Format, Found, Loss, ReadOptions, Written};
use crate::naming::families::Layout;
use crate::naming::{Resolution, Resolver, Rows};
use crate::notice::{Notice, NoticeKind};
use crate::pattern::Choice;
use crate::tensor::Float;

mod file;
mod names;

use file::{Frame, Hashes};

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

/// The names of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// Those of diffusers and transformers.
    Hub,
    /// Those of the model's first publication.
    Original,
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
    written: Written,
    frame: Frame,
    shape: Shape,
    report: Report,
}

/// A base that tells names and heads, and where its layers are.
pub struct Base {
    checkpoint: Checkpoint,
    resolver: Resolver,
}

impl Base {
    /// Opens a base; only headers are read.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let names = checkpoint.tensors().map(|tensor| tensor.name.clone());
        let resolver = Resolver::new(names).of_architecture(architecture(&checkpoint));
        Ok(Base {
            checkpoint,
            resolver,
        })
    }
}

/// The format of a short name.
///
/// # Errors
/// [`Reason::BadOption`], with all names that there are.
pub fn format(id: &str) -> Result<&'static dyn Format> {
    let found = FORMATS.iter().copied().find(|format| format.id() == id);
    found.ok_or_else(|| {
        let all: Vec<&str> = targets().map(Format::id).collect();
        Error::new(Reason::BadOption {
            text: id.to_owned(),
            problem: format!("no such format; there are {}", all.join(", ")),
        })
    })
}

/// The formats that can be written.
pub fn targets() -> impl Iterator<Item = &'static dyn Format> {
    FORMATS
        .iter()
        .copied()
        .filter(|format| format.writer().is_some())
}

/// Reads, renames and checks; writes nothing.
///
/// # Errors
/// What reading gives, names that are not unambiguous, and losses that were not allowed, all listed.
pub fn plan(options: &Options) -> Result<Plan> {
    let target = format(&options.to)?;
    let found = Found::open(&options.adapter)?;
    let source = found.format().map_or("", Format::id);
    let mut adapter = found.read(&ReadOptions {
        carry_vectors: true,
        ..options.read.clone()
    })?;
    found.file.verify()?;
    let base = options.base.as_deref().map(Base::open).transpose()?;
    select(&mut adapter, options)?;
    let metadata = &found.file.directory.metadata;
    let (mut written, family) = write(&adapter, metadata, target, base.as_ref(), options)?;
    if let Some(base) = &base {
        forgive_copies(&adapter, base, &mut written)?;
    }
    // As safetensors lays them out: the widest types first, so that all of them are aligned.
    written.tensors.sort_by(|a, b| {
        b.dtype
            .bitsize()
            .cmp(&a.dtype.bitsize())
            .then(a.name.cmp(&b.name))
    });
    check_prefix(options, &written)?;
    let nothing_left = written.tensors.is_empty();
    if !written.losses.is_empty() && (nothing_left || !options.allow_losses) {
        let reason = Reason::Losses {
            format: target.name(),
            count: written.losses.len(),
        };
        let cases = written
            .losses
            .iter()
            .map(|loss| format!("{}: {}", loss.item, loss.text));
        return Err(Error::new(reason)
            .in_file(&options.adapter)
            .with_cases(cases.collect())
            .with_hint(match nothing_left {
                true => "nothing would be left; choose another format",
                false => "--allow-losses writes the rest without these parts",
            }));
    }
    if nothing_left {
        return Err(Error::new(Reason::NothingSelected).in_file(&options.adapter));
    }
    let mut names: Vec<&str> = written
        .tensors
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let name = twice[0].to_owned();
        return Err(Error::new(Reason::OutputNameTwice { name }).in_file(&options.adapter));
    }
    if written.hashes {
        Hashes::announce(&mut written.metadata);
    }
    let frame = Frame::of(&written)?;
    let extension = Path::new(written.name).extension();
    let as_file = !written.folder
        && options
            .output
            .extension()
            .is_some_and(|e| Some(e) == extension);
    let shape = if as_file { Shape::File } else { Shape::Folder };
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
        bytes: frame.length(&written.tensors)?,
        losses: written.losses.clone(),
        folded: written.folded.clone(),
        alpha: written.alpha,
        notices: [&*adapter.notices, &written.notices].concat(),
    };
    let plan = Plan {
        options: options.clone(),
        found,
        base,
        written,
        frame,
        shape,
        report,
    };
    plan.destination(&Control::default())?
        .check_space(plan.report.bytes)?;
    Ok(plan)
}

/// Refuses a prefix that nothing is written behind, and one that would not end where names begin.
fn check_prefix(options: &Options, written: &Written) -> Result<()> {
    let Some(prefix) = &options.prefix else {
        return Ok(());
    };
    let problem = if !prefix
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || c == '_')
        || prefix.trim_matches('_').is_empty()
    {
        "a prefix is letters, digits and underscores"
    } else if written
        .tensors
        .iter()
        .any(|tensor| tensor.name.starts_with(prefix))
    {
        return Ok(());
    } else {
        "only flattened names have a prefix, as --to kohya writes them"
    };
    Err(Error::new(Reason::BadOption {
        text: prefix.clone(),
        problem: problem.to_owned(),
    }))
}

/// What a format could not say of an adapter, and what would be multiplied into factors.
///
/// # Errors
/// Names that cannot be told, with what would tell them; a format that is not written.
pub fn outlook(
    adapter: &Adapter,
    target: &'static dyn Format,
    base: Option<&Base>,
    family: Option<&str>,
) -> Result<(Vec<Loss>, Vec<Loss>)> {
    let options = Options {
        family: family.map(str::to_owned),
        ..Options::default()
    };
    let (written, _) = write(adapter, &[], target, base, &options)?;
    Ok((written.losses, written.folded))
}

fn write(
    adapter: &Adapter,
    metadata: &[(String, String)],
    target: &'static dyn Format,
    base: Option<&Base>,
    options: &Options,
) -> Result<(Written, Option<&'static str>)> {
    let writer = target.writer().ok_or_else(|| {
        let name = target.name();
        Error::new(Reason::NotWritten { name })
    })?;
    let family = names::family(adapter, base, options.family.as_deref())?;
    let layout = match options.names {
        Some(Names::Hub) => None,
        Some(Names::Original) => Some(Layout::Original),
        None => writer.layout(family),
    };
    let denoiser = names::denoiser(adapter, family);
    let part = names::part(adapter, options.component.as_deref(), denoiser)?;
    let renamed = names::renamed(adapter, layout, family, part, base)?;
    let draft = Draft {
        modules: renamed.modules,
        adapter,
        dtype: options.dtype,
        family,
        denoiser,
        metadata,
        order: options.read.order.as_ref(),
        prefix: options.prefix.as_deref(),
        attention: names::heads(adapter, base),
    };
    let mut written = writer.write(&draft)?;
    written.folded.splice(0..0, renamed.folded);
    Ok((written, family))
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
        Destination::check(
            &self.options.output,
            self.shape,
            self.options.force,
            inputs,
            control.faults.clone(),
        )
    }

    /// Writes the output, complete or not at all.
    ///
    /// # Errors
    /// Those of kinds Output, Io, Changed and Interrupted; the output is then as it was.
    pub fn run(mut self, control: &Control<'_>) -> Result<Report> {
        let sink = self.destination(control)?.begin()?;
        let mut file = sink.create(self.written.name)?;
        file::write(&mut self.written, &self.frame, &mut file, control)?;
        let path = file.finish()?;
        if let Some(config) = &self.written.config {
            let text = serde_json::to_string_pretty(config).unwrap_or_default();
            let mut file = sink.create(CONFIG)?;
            file.write(text.as_bytes())?;
            file.write(b"\n")?;
            file.finish()?;
        }
        for (name, text) in &self.written.beside {
            let mut file = sink.create(name)?;
            file.write(text.as_bytes())?;
            file.finish()?;
        }
        for input in self.found.inputs() {
            input.verify_unchanged()?;
        }
        let read = TensorFile::open(&path)?;
        if read.directory.tensors.len() != self.written.tensors.len() {
            return Err(Error::new(Reason::ReadBack).in_file(&self.options.output));
        }
        control.check()?;
        sink.publish()?;
        self.report.dry_run = false;
        Ok(self.report)
    }
}
