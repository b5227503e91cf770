//! With the undo file: the very bytes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::Options;
use super::report::{AdapterReport, Report};
use crate::checkpoint::companions::{Companion, companions};
use crate::checkpoint::sink::{Destination, Faults, Shape, Sink};
use crate::error::{Error, Reason, Result};
use crate::linalg::Kernel;
use crate::mapped::Input;
use crate::notice::{Notice, NoticeKind};
use crate::ops::merge::pipeline::{self, Pipeline, Settings};
use crate::ops::merge::{Control, FileReport, kernel};
use crate::ops::undo::{FileEntry, How, Piece, Restoring, hash_of};
use crate::ops::workers::{threads, workers};

/// A base that can be restored bit for bit.
pub(super) struct Plan {
    options: Options,
    restoring: Restoring,
    companions: Vec<Companion>,
    shape: Shape,
    kernel: &'static Kernel,
    notices: Vec<Notice>,
}

pub(super) fn plan(options: &Options) -> Result<Plan> {
    let kernel = kernel(options.kernel.as_deref())?;
    let pool = workers(options.threads)?;
    let restoring = pool.install(|| restoring(options, kernel))?;
    let shape = shape(options, &restoring);
    let (companions, notices) = beside(&restoring)?;
    let plan = Plan {
        options: options.clone(),
        restoring,
        companions,
        shape,
        kernel,
        notices,
    };
    plan.destination(Faults::default())?
        .check_space(plan.disk())?;
    Ok(plan)
}

/// Opens what the base is restored from.
pub(crate) fn restoring(options: &Options, kernel: &'static Kernel) -> Result<Restoring> {
    let undo = options.undo.as_deref().unwrap_or(Path::new(""));
    Restoring::open(
        undo,
        &options.merged,
        &options.adapters,
        &options.read,
        kernel,
    )
}

/// A file where the base is one and the output is called as it is.
fn shape(options: &Options, restoring: &Restoring) -> Shape {
    let directory = restoring.directory();
    let extension = |path: &Path| path.extension().map(|end| end.to_ascii_lowercase());
    match directory.files.as_slice() {
        [only]
            if !directory.folder
                && extension(Path::new(&only.place)) == extension(&options.output)
                && options.output.extension().is_some() =>
        {
            Shape::File
        }
        _ => Shape::Folder,
    }
}

/// The files beside the weights that the result has as the base had them; what is missing or other is told.
pub(crate) fn beside(restoring: &Restoring) -> Result<(Vec<Companion>, Vec<Notice>)> {
    let (directory, merged) = (restoring.directory(), &restoring.merged);
    let mut notices = Vec::new();
    let mut copied = match merged.is_folder && directory.folder {
        true => companions(merged)?.copied,
        false => Vec::new(),
    };
    let notice = |text: &str, place: &str| {
        Notice::new(NoticeKind::Contradiction, text)
            .on(place)
            .in_file(&merged.path)
    };
    for entry in &directory.companions {
        match copied
            .iter()
            .find(|companion| companion.name == entry.place)
        {
            None => notices.push(notice(
                "the base had this file, the result has not",
                &entry.place,
            )),
            Some(own) => {
                let hash = hash_of(&own.input, 0, own.input.len())?.to_string();
                if hash != entry.hash {
                    let text = "this file is not what it was in the base; it is copied as it is";
                    notices.push(notice(text, &entry.place));
                }
            }
        }
    }
    let known: HashSet<&str> = directory
        .companions
        .iter()
        .map(|entry| entry.place.as_str())
        .collect();
    copied.retain(|companion| known.contains(companion.name.as_str()));
    Ok((copied, notices))
}

impl Plan {
    fn disk(&self) -> u64 {
        let directory = self.restoring.directory();
        let files = directory.files.iter().map(|file| file.bytes);
        let texts = directory.texts.iter().map(|text| text.text.length);
        let copied = self.companions.iter().map(|own| own.input.len());
        files
            .chain(texts)
            .chain(copied)
            .fold(0, u64::saturating_add)
    }

    fn inputs(&self) -> impl Iterator<Item = &Arc<Input>> {
        let companions = self.companions.iter().map(|own| &own.input);
        self.restoring.inputs().chain(companions)
    }

    fn destination(&self, faults: Faults) -> Result<Destination> {
        let folders = self.options.adapters.iter().map(|own| &own.path);
        let folders = folders.chain([&self.options.merged]).map(PathBuf::as_path);
        let folders = folders.filter(|path| path.is_dir());
        let files = self.inputs().map(|input| input.path());
        let places: Vec<&Path> = files.chain(folders).collect();
        let Options { output, force, .. } = &self.options;
        Destination::check(output, self.shape, *force, places, faults)
    }

    pub(super) fn report(&self) -> Report {
        let directory = self.restoring.directory();
        let is_copied = |how: &How| !matches!(how, How::Coded(_));
        let copied = directory
            .tensors
            .iter()
            .filter(|entry| is_copied(&entry.how))
            .count();
        let tensors = |file: &FileEntry| {
            let is_tensor = |piece: &&Piece| matches!(piece, Piece::Tensor(_));
            file.pieces.iter().filter(is_tensor).count()
        };
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let adapters = directory.adapters.iter().zip(self.restoring.founds());
        Report {
            schema: 1,
            dry_run: true,
            merged: text(&self.options.merged),
            output: text(&self.options.output),
            exact: true,
            adapters: adapters
                .map(|(entry, found)| AdapterReport {
                    path: text(&found.path),
                    strength: entry.strength,
                })
                .collect(),
            tensors: directory.tensors.len() - copied,
            copied_tensors: copied,
            files: directory
                .files
                .iter()
                .map(|file| FileReport {
                    name: file.place.clone(),
                    bytes: file.bytes,
                    tensors: tensors(file),
                })
                .collect(),
            copied: self.companions.iter().map(|own| own.name.clone()).collect(),
            bounds: Vec::new(),
            disk: self.disk(),
            threads: threads(self.options.threads),
            kernel: self.kernel.name.to_owned(),
            seconds: None,
            notices: self.notices.clone(),
        }
    }

    pub(super) fn run(&self, control: &Control<'_>) -> Result<Report> {
        let start = Instant::now();
        let destination = self.destination(control.faults.clone())?;
        destination.check_space(self.disk())?;
        let sink = destination.begin()?;
        let settings = Settings {
            control,
            kernel: self.kernel,
            allow_nonfinite: false,
            base: &self.options.merged,
            total: self.disk(),
            aside: None,
        };
        workers(self.options.threads)?.install(|| {
            pipeline::run(settings, |pipeline| {
                let mut files = self.restoring.directory().files.iter();
                files.try_for_each(|file| self.file(file, &sink, pipeline))
            })
        })?;
        self.beside(&sink)?;
        self.inputs()
            .try_for_each(|input| input.verify_unchanged())?;
        control.check()?;
        sink.publish()?;
        control.progress(self.disk(), self.disk());
        let mut report = self.report();
        report.dry_run = false;
        report.seconds = Some(start.elapsed().as_secs_f64());
        Ok(report)
    }

    fn file(&self, file: &FileEntry, sink: &Sink, pipeline: &mut Pipeline<'_>) -> Result<()> {
        pipeline.begin(sink.create(&file.place)?)?;
        for piece in &file.pieces {
            match piece {
                Piece::Bytes(section) => {
                    pipeline.bytes(self.restoring.undo().section(*section)?)?
                }
                Piece::Tensor(number) => {
                    let tensor = self.restoring.tensor(*number);
                    let tensor = tensor.ok_or_else(|| Error::new(Reason::NotRestored))?;
                    if let Some(parts) = tensor.parts() {
                        pipeline.restore(&tensor, &**parts)?;
                    } else {
                        let range = tensor.offset..tensor.offset + tensor.length;
                        pipeline.copy(&tensor.input, range)?;
                    }
                }
            }
        }
        pipeline.end()
    }

    fn beside(&self, sink: &Sink) -> Result<()> {
        if self.shape == Shape::File {
            return Ok(());
        }
        for text in &self.restoring.directory().texts {
            let mut file = sink.create(&text.place)?;
            file.write(&self.restoring.undo().section(text.text)?)?;
            file.finish()?;
        }
        for companion in &self.companions {
            let mut file = sink.create(&companion.name)?;
            file.copy(&companion.input, 0, companion.input.len())?;
            file.finish()?;
        }
        Ok(())
    }
}
