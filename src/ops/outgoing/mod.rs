//! An adapter on its way out: named as the target wants it, checked, written complete or not at all.

use std::path::Path;
use std::sync::Arc;

use super::merge::{Control, architecture};
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::sink::{Destination, Shape, Sink};
use crate::containers::TensorFile;
use crate::error::{Error, Reason, Result};
use crate::formats::{CONFIG, Draft, FORMATS, Format, Loss, Named, Order, Writer, Written};
use crate::mapped::Input;
use crate::naming::families::Layout;
use crate::naming::{Attention, Resolver};
use crate::tensor::Float;

mod file;
mod names;

use file::{Frame, Hashes};

/// The names of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// Those of diffusers and transformers.
    Hub,
    /// Those of the model's first publication.
    Original,
    /// Those that the adapter has, where the format writes a flattened name as it is.
    Own,
}

/// What the target's names and types are to be.
#[derive(Clone, Copy, Default)]
pub(super) struct Wish<'a> {
    /// The family of the model, where names alone do not tell it.
    pub(super) family: Option<&'a str>,
    /// The part of a pipeline that names are of which do not say it.
    pub(super) component: Option<&'a str>,
    /// The type of the factors; their own if absent.
    pub(super) dtype: Option<Float>,
    /// What stands before flattened names.
    pub(super) prefix: Option<&'a str>,
    /// The names of layers, where the format has both.
    pub(super) names: Option<Names>,
    /// Which layers have which numbers, where the format numbers them.
    pub(super) order: Option<&'a Order>,
}

/// A base that tells names and heads, and where its layers are.
pub(super) struct Base {
    pub(super) checkpoint: Checkpoint,
    pub(super) resolver: Resolver,
}

impl Base {
    /// Opens a base; only headers are read.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub(super) fn open(path: &Path) -> Result<Self> {
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

/// A format that an adapter is spelled in, and is to be written in.
///
/// # Errors
/// [`Reason::NotWritten`] where it is only read.
pub(super) fn writable(format: &'static dyn Format, adapter: &Path) -> Result<&'static dyn Format> {
    match format.writer() {
        Some(_) => Ok(format),
        None => {
            let name = format.name();
            Err(Error::new(Reason::NotWritten { name })
                .in_file(adapter)
                .with_hint("--to names a format that is written"))
        }
    }
}

/// What a format could not say of an adapter, and what would be multiplied into factors.
///
/// # Errors
/// Names that cannot be told, with what would tell them; a format that is not written.
pub(super) fn outlook(
    adapter: &Adapter,
    target: &'static dyn Format,
    base: Option<&Base>,
    family: Option<&str>,
) -> Result<(Vec<Loss>, Vec<Loss>)> {
    let wish = Wish {
        family,
        ..Wish::default()
    };
    let (written, _) = write(adapter, &[], target, base, wish)?;
    Ok((written.losses, written.folded))
}

/// Renames the modules of an adapter and lets the format write them: recipes, no data.
///
/// # Errors
/// [`Reason::NotWritten`], and names that are not unambiguous, all listed.
pub(super) fn write(
    adapter: &Adapter,
    metadata: &[(String, String)],
    target: &'static dyn Format,
    base: Option<&Base>,
    wish: Wish<'_>,
) -> Result<(Written, Option<&'static str>)> {
    let known = known(adapter, target, base, wish)?;
    let family = known.family;
    Ok((draft(adapter, known, metadata, target, wish)?, family))
}

/// What is known of the names of an adapter in the layout of a target.
pub(super) struct Known {
    /// The modules under these names.
    pub(super) modules: Vec<Named>,
    /// Scales that were multiplied into the factors of fused layers.
    pub(super) folded: Vec<Loss>,
    /// The family of the denoiser, where there is one.
    pub(super) family: Option<&'static str>,
    /// What diffusers calls the denoiser.
    pub(super) denoiser: Option<&'static str>,
    /// The heads of the model.
    pub(super) attention: Attention,
}

/// The writer of a format.
fn writer(target: &'static dyn Format) -> Result<&'static dyn Writer> {
    target.writer().ok_or_else(|| {
        let name = target.name();
        Error::new(Reason::NotWritten { name })
    })
}

/// The family of the denoiser, where there is one: the one that is named, or what names tell.
///
/// # Errors
/// [`Reason::BadOption`] for a name that is none.
pub(super) fn family(
    adapter: &Adapter,
    base: Option<&Base>,
    named: Option<&str>,
) -> Result<Option<&'static str>> {
    names::family(adapter, base, named)
}

/// Whether the names of modules are those of some denoiser.
pub(super) fn is_denoiser(adapter: &Adapter) -> bool {
    names::denoiser(adapter, None).is_some()
}

/// Renames the modules of an adapter as a format wants them.
///
/// # Errors
/// [`Reason::NotWritten`], and names that are not unambiguous, all listed.
pub(super) fn known(
    adapter: &Adapter,
    target: &'static dyn Format,
    base: Option<&Base>,
    wish: Wish<'_>,
) -> Result<Known> {
    let writer = writer(target)?;
    let family = names::family(adapter, base, wish.family)?;
    let layout = match wish.names {
        Some(Names::Hub) => None,
        Some(Names::Original) => Some(Layout::Original),
        None | Some(Names::Own) => writer.layout(family),
    };
    let denoiser = names::denoiser(adapter, family);
    let part = names::part(adapter, wish.component, denoiser)?;
    let renamed = match wish.names == Some(Names::Own) && writer.keeps_flattened() {
        true => names::own(adapter, part),
        false => names::renamed(adapter, layout, family, part, base)?,
    };
    Ok(Known {
        modules: renamed.modules,
        folded: renamed.folded,
        family,
        denoiser,
        attention: names::heads(adapter, base),
    })
}

/// Lets a format write modules whose names are known, and the rest of the adapter.
///
/// # Errors
/// [`Reason::NotWritten`].
pub(super) fn draft(
    adapter: &Adapter,
    known: Known,
    metadata: &[(String, String)],
    target: &'static dyn Format,
    wish: Wish<'_>,
) -> Result<Written> {
    let draft = Draft {
        modules: known.modules,
        adapter,
        dtype: wish.dtype,
        family: known.family,
        denoiser: known.denoiser,
        metadata,
        order: wish.order,
        prefix: wish.prefix,
        attention: known.attention,
    };
    let mut written = writer(target)?.write(&draft)?;
    written.folded.splice(0..0, known.folded);
    Ok(written)
}

/// Files that are ready to be written.
pub(super) struct Outgoing {
    pub(super) written: Written,
    frame: Frame,
    shape: Shape,
}

impl Outgoing {
    /// Checks what a format made of an adapter, and lays its file out.
    ///
    /// # Errors
    /// Losses that are not allowed, all listed; nothing left; a name twice; a prefix that nothing stands behind.
    pub(super) fn new(
        mut written: Written,
        target: &dyn Format,
        (adapter, output): (&Path, &Path),
        prefix: Option<&str>,
        allow_losses: bool,
    ) -> Result<Self> {
        // As safetensors lays them out: the widest types first, so that all of them are aligned.
        written.tensors.sort_by(|a, b| {
            b.dtype
                .bitsize()
                .cmp(&a.dtype.bitsize())
                .then(a.name.cmp(&b.name))
        });
        check_prefix(prefix, &written)?;
        let nothing_left = written.tensors.is_empty();
        if !written.losses.is_empty() && (nothing_left || !allow_losses) {
            let reason = Reason::Losses {
                format: target.name(),
                count: written.losses.len(),
            };
            let cases = written
                .losses
                .iter()
                .map(|loss| format!("{}: {}", loss.item, loss.text));
            return Err(Error::new(reason)
                .in_file(adapter)
                .with_cases(cases.collect())
                .with_hint(match nothing_left {
                    true => "nothing would be left; choose another format",
                    false => "--allow-losses writes the rest without these parts",
                }));
        }
        if nothing_left {
            return Err(Error::new(Reason::NothingSelected).in_file(adapter));
        }
        let mut names: Vec<&str> = written
            .tensors
            .iter()
            .map(|tensor| tensor.name.as_str())
            .collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let name = twice[0].to_owned();
            return Err(Error::new(Reason::OutputNameTwice { name }).in_file(adapter));
        }
        if written.hashes {
            Hashes::announce(&mut written.metadata);
        }
        Ok(Outgoing {
            frame: Frame::of(&written)?,
            shape: shape(written.name, written.folder, output),
            written,
        })
    }

    /// Bytes of the file of tensors.
    ///
    /// # Errors
    /// What laying it out gives.
    pub(super) fn bytes(&self) -> Result<u64> {
        self.frame.length(&self.written.tensors)
    }

    /// Where it goes.
    ///
    /// # Errors
    /// As [`Destination::check`].
    pub(super) fn destination<'a>(
        &self,
        output: &Path,
        force: bool,
        inputs: impl IntoIterator<Item = &'a Path>,
        control: &Control<'_>,
    ) -> Result<Destination> {
        Destination::check(output, self.shape, force, inputs, control.faults.clone())
    }

    /// Checks where it goes and that there is room, and writes all files without telling how far that is; `inputs` must
    /// be as they were before the output appears.
    ///
    /// # Errors
    /// Those of [`Outgoing::destination`] and [`Outgoing::publish`].
    pub(super) fn publish_to<'a>(
        self,
        (output, force): (&Path, bool),
        places: Vec<&Path>,
        inputs: impl IntoIterator<Item = &'a Arc<Input>>,
        control: &Control<'_>,
    ) -> Result<()> {
        let destination = self.destination(output, force, places, control)?;
        destination.check_space(self.bytes()?)?;
        // The whole way was told already.
        let quiet = Control {
            progress: None,
            ..control.clone()
        };
        let mut inputs = inputs.into_iter();
        self.publish(destination.begin()?, &quiet, || {
            inputs.try_for_each(|input| input.verify_unchanged())
        })
    }

    /// Writes all files; `verify` is asked before the output appears.
    ///
    /// # Errors
    /// Those of kinds Output, Io, Changed and Interrupted; the output is then as it was.
    pub(super) fn publish(
        mut self,
        sink: Sink,
        control: &Control<'_>,
        verify: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
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
        verify()?;
        let read = TensorFile::open(&path)?;
        if read.directory.tensors.len() != self.written.tensors.len() {
            return Err(Error::new(Reason::ReadBack).in_file(&path));
        }
        control.check()?;
        sink.publish()
    }
}

/// Whether an output is a file or a folder: a file where the format is one and the name ends as it does.
fn shape(name: &str, folder: bool, output: &Path) -> Shape {
    let extension = Path::new(name).extension();
    match !folder && output.extension().is_some_and(|e| Some(e) == extension) {
        true => Shape::File,
        false => Shape::Folder,
    }
}

/// The same as far as a format tells it without an adapter.
pub(super) fn expected_shape(target: &'static dyn Format, output: &Path) -> Shape {
    match write(&Adapter::default(), &[], target, None, Wish::default()) {
        Ok((written, _)) => shape(written.name, written.folder, output),
        Err(_) => shape("", false, output),
    }
}

/// Refuses a prefix that nothing is written behind, and one that would not end where names begin.
fn check_prefix(prefix: Option<&str>, written: &Written) -> Result<()> {
    let Some(prefix) = prefix else {
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
        text: prefix.to_owned(),
        problem: problem.to_owned(),
    }))
}
