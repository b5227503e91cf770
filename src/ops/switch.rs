//! Other adapters in place of those that were merged, in one pass: the base is restored block by block on the way.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::merge::{Control, OpenBase, Report};
use super::undo::{Frame, Piece, Restoring};
use super::workers::workers;
use super::{merge, unmerge};
use crate::checkpoint::{Checkpoint, Variant};
use crate::error::{Error, Reason, Result};
use crate::tensor::Tensor;

/// What to take out, and what to merge instead.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The merged checkpoint, its adapters and its undo file. The output and what else is to be written are those of
    /// `to`.
    pub from: unmerge::Options,
    /// The new merge; its base is not read.
    pub to: merge::Options,
}

/// A switch that can be run.
pub struct Plan {
    plan: merge::Plan,
    // The frames of the base's files, as long as they are read.
    _frames: tempfile::TempDir,
}

/// Restores the base as far as its headers, and plans the new merge onto it.
///
/// # Errors
/// As [`unmerge::plan`] and [`merge::plan`].
pub fn plan(options: &Options) -> Result<Plan> {
    let (from, to) = (&options.from, &options.to);
    if from.undo.is_none() {
        return Err(Error::new(Reason::BadOption {
            text: "--undo".to_owned(),
            problem: "a switch needs the undo file of the merge".to_owned(),
        }));
    }
    let kernel = merge::kernel(to.kernel.as_deref())?;
    let pool = workers(to.threads)?;
    let restoring = pool.install(|| unmerge::restoring(from, kernel))?;
    let frames = tempfile::Builder::new().prefix("loratool-").tempdir();
    let frames = frames.map_err(|e| Error::io(Reason::Create, e).in_file(std::env::temp_dir()))?;
    let (companions, notices) = unmerge::beside(&restoring)?;
    lay_out(&restoring, frames.path())?;
    for companion in &companions {
        let path = place(frames.path(), &companion.name)?;
        std::fs::copy(companion.input.path(), &path)
            .map_err(|e| Error::io(Reason::Write, e).in_file(path))?;
        companion.input.verify_unchanged()?;
    }
    let base = restored(&restoring, frames.path())?;
    let onto = merge::Options {
        base: from.merged.clone(),
        ..to.clone()
    };
    let mut plan = pool.install(|| merge::plan_onto(&onto, base))?;
    plan.notice(notices);
    Ok(Plan {
        plan,
        _frames: frames,
    })
}

impl Plan {
    /// Tells what a run would do.
    pub fn report(&self) -> Report {
        self.plan.report()
    }

    /// Writes the new result.
    ///
    /// # Errors
    /// As [`merge::Plan::run`].
    pub fn run(&self, control: &Control<'_>) -> Result<Report> {
        self.plan.run(control)
    }
}

/// Where a file of the base is in a folder; its own folder is made.
fn place(folder: &Path, place: &str) -> Result<PathBuf> {
    let path = folder.join(place);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|e| Error::io(Reason::Create, e).in_file(parent))?;
    }
    Ok(path)
}

/// Writes what does not follow from the result: headers in files with holes where the tensors are, and texts.
fn lay_out(restoring: &Restoring, folder: &Path) -> Result<()> {
    let (directory, undo) = (restoring.directory(), restoring.undo());
    for file in &directory.files {
        let path = place(folder, &file.place)?;
        let fail = |e| Error::io(Reason::Write, e).in_file(&path);
        let mut frame = std::fs::File::create_new(&path).map_err(fail)?;
        frame.set_len(file.bytes).map_err(fail)?;
        for piece in &file.pieces {
            match piece {
                Piece::Bytes(section) => frame.write_all(&undo.section(*section)?),
                Piece::Tensor(number) => {
                    let bytes = directory.tensors[*number].bytes;
                    frame.seek(SeekFrom::Current(bytes as i64)).map(drop)
                }
            }
            .map_err(fail)?;
        }
    }
    for text in &directory.texts {
        let path = place(folder, &text.place)?;
        std::fs::write(&path, undo.section(text.text)?)
            .map_err(|e| Error::io(Reason::Write, e).in_file(path))?;
    }
    Ok(())
}

/// The base, its tensors read through what restores them.
fn restored(restoring: &Restoring, folder: &Path) -> Result<OpenBase> {
    let directory = restoring.directory();
    let path = match (directory.folder, directory.files.as_slice()) {
        (false, [only]) => folder.join(&only.place),
        _ => folder.to_owned(),
    };
    let mut checkpoint = Checkpoint::open_variant(&path, &Variant::Any)?;
    let frames = Frame::of(&checkpoint);
    let mut numbers = std::collections::HashMap::new();
    for piece in directory.files.iter().flat_map(|file| &file.pieces) {
        if let Piece::Tensor(number) = piece {
            numbers.insert(directory.tensors[*number].name.clone(), *number);
        }
    }
    checkpoint.redirect(|tensor| {
        let number = numbers.get(&tensor.name)?;
        let found = restoring.tensor(*number)?;
        Some(Tensor {
            input: found.input,
            offset: found.offset,
            memory: None,
            made: found.made,
            ..tensor.clone()
        })
    });
    let missing = frames
        .iter()
        .flat_map(|frame| &frame.regions)
        .find(|(name, _)| !numbers.contains_key(name));
    match missing {
        Some((name, _)) => Err(Error::new(Reason::NotRestored).on(name.clone())),
        None => Ok(OpenBase {
            checkpoint,
            frames,
            behind: restoring.inputs().cloned().collect(),
        }),
    }
}
