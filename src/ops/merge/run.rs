//! The run: files of tensors, the files beside them, then all of it at once into its place.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use super::Control;
use super::layout::File;
use super::pipeline::{self, Aside, Pipeline, Settings, Watching};
use super::plan::{Plan, PlannedModule, PlannedTensor};
use super::record::Recorder;
use super::report::{Report, UndoReport};
use crate::adapter::bound::Bound;
use crate::adapter::evaluate::{Step, Sums};
use crate::checkpoint::config;
use crate::checkpoint::sink::{Shape, Sink};
use crate::containers::TensorFile;
use crate::error::{Error, Reason, Result};
use crate::ops::device::Tally;
use crate::ops::workers::{threads, workers};
use crate::tensor::Tensor;

impl Plan {
    /// Tells what a run would do.
    pub fn report(&self) -> Report {
        Report::of(self, threads(self.options.threads))
    }

    /// Runs the plan.
    ///
    /// # Errors
    /// Those of kinds Output, Io, NonFinite, Changed and Interrupted; the output is then as it was.
    pub fn run(&self, control: &Control<'_>) -> Result<Report> {
        Ok(self.carried_out(control, false)?.0)
    }

    /// Runs a plan of inverses, and tells how far each tensor may be from the base.
    ///
    /// # Errors
    /// As [`Plan::run`].
    pub(crate) fn run_inverse(
        &self,
        control: &Control<'_>,
    ) -> Result<(Report, Vec<(String, Bound)>)> {
        self.carried_out(control, true)
    }

    fn carried_out(
        &self,
        control: &Control<'_>,
        is_inverse: bool,
    ) -> Result<(Report, Vec<(String, Bound)>)> {
        let start = Instant::now();
        let destination = self.destination(control.faults.clone())?;
        destination.check_space(self.disk_needed())?;
        let sink = destination.begin()?;
        let undo = self.undo_destination(control.faults.clone())?;
        let pool = workers(self.options.threads)?;
        // What is restored has no checksums but its own.
        for shard in self.base.shards.iter().filter(|_| self.behind.is_empty()) {
            shard.file.verify_while(&|| control.check())?;
        }
        let choice = self.options.device.as_ref();
        let mut run = Run {
            plan: self,
            control,
            recorder: undo.map(|undo| Recorder::new(self, undo)).transpose()?,
            total: self.disk_needed(),
            done: 0,
            sums: Vec::new(),
            bounds: is_inverse.then(Vec::new),
            aside: choice.and_then(|choice| Aside::of(choice, &pool)),
            tally: None,
        };
        let written = pool.install(|| run.files(&sink))?;
        run.companions(&sink)?;
        run.indices(&sink)?;
        let recorded = run.recorder.take().map(|recorder| {
            let merged = recorder.merged;
            let (sink, bytes) = pool.install(|| recorder.finish())?;
            Ok((sink, UndoReport::new(self, bytes, merged)))
        });
        let recorded: Option<(Sink, UndoReport)> = recorded.transpose()?;
        verify(self, &written)?;
        control.check()?;
        // A result without what undoes it is never there.
        let undo = match recorded {
            Some((sink, report)) => sink.publish().map(|()| Some(report))?,
            None => None,
        };
        sink.publish()?;
        control.progress(run.total, run.total);
        let mut report = self.report();
        report.dry_run = false;
        report.not_finite = run.sums.iter().map(|(_, sums)| sums.not_finite).sum();
        report.notices.extend(base_notices(&run.sums));
        report.set_changes(&run.sums);
        if let Some(device) = &mut report.device {
            device.work = run.tally;
        }
        report.undo = undo;
        report.seconds = Some(start.elapsed().as_secs_f64());
        Ok((report, run.bounds.unwrap_or_default()))
    }
}

fn base_notices(sums: &[(String, Sums)]) -> Vec<crate::notice::Notice> {
    use crate::notice::{Notice, NoticeKind};
    sums.iter()
        .filter(|(_, sums)| sums.base_not_finite > 0)
        .map(|(name, sums)| {
            let text = format!(
                "{} values of the base are NaN or infinite; they keep their bits",
                sums.base_not_finite
            );
            Notice::new(NoticeKind::BaseNotFinite, text).on(&**name)
        })
        .collect()
}

/// Reads the headers back, and checks that no input changed meanwhile.
fn verify(plan: &Plan, written: &[PathBuf]) -> Result<()> {
    let adapters = plan
        .adapters
        .iter()
        .flat_map(|opened| opened.found.inputs());
    let companions = plan
        .companions
        .copied
        .iter()
        .map(|companion| &companion.input);
    let base = plan.base.inputs().chain(&plan.behind);
    for input in base.chain(adapters).chain(companions) {
        input.verify_unchanged()?;
    }
    for (file, path) in plan.files.iter().zip(written) {
        let found = TensorFile::open(path)?;
        let read: HashMap<&str, &Tensor> = found
            .directory
            .tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor))
            .collect();
        let part = &plan.base.parts[file.part];
        let same = read.len() == file.tensors.len()
            && file.tensors.iter().all(|wanted| {
                let wanted = wanted.entry(part);
                read.get(wanted.name).is_some_and(|found| {
                    found.shape == wanted.shape
                        && found.dtype == wanted.dtype
                        && found.blocks.as_ref() == wanted.blocks
                })
            });
        if !same {
            return Err(Error::new(Reason::ReadBack).in_file(path));
        }
    }
    Ok(())
}

struct Run<'a> {
    plan: &'a Plan,
    control: &'a Control<'a>,
    recorder: Option<Recorder<'a>>,
    total: u64,
    done: u64,
    sums: Vec<(String, Sums)>,
    /// Of tensors that an inverse changed, where that is what happens.
    bounds: Option<Vec<(String, Bound)>>,
    aside: Option<Aside<'a>>,
    /// What a device did, where one was asked for.
    tally: Option<Tally>,
}

impl Run<'_> {
    /// Writes all files of tensors and returns their hidden paths.
    fn files(&mut self, sink: &Sink) -> Result<Vec<PathBuf>> {
        let settings = Settings {
            control: self.control,
            kernel: self.plan.kernel,
            allow_nonfinite: self.plan.options.allow_nonfinite,
            base: &self.plan.base.path,
            total: self.total,
            aside: self.aside,
        };
        let ((done, tally), written) = pipeline::run(settings, |pipeline| {
            for file in &self.plan.files {
                pipeline.begin(sink.create(&file.name)?)?;
                pipeline.bytes(file.header.bytes.clone())?;
                self.tensors(file, pipeline)?;
                pipeline.end()?;
            }
            Ok((pipeline.done(), pipeline.tally().clone()))
        })?;
        self.done = done;
        self.tally = self.aside.map(|_| tally);
        Ok(written)
    }

    fn tensors(&mut self, file: &File, pipeline: &mut Pipeline<'_>) -> Result<()> {
        for tensor in &file.tensors {
            let source = &tensor.source;
            if tensor.is_copy() && source.parts().is_none() {
                match source.lies_in_file() {
                    true => {
                        let range = source.offset..source.offset + source.length;
                        pipeline.copy(&source.input, range)?;
                    }
                    false => pipeline.bytes(source.bytes()?.into_owned())?,
                }
                if let Some(recorder) = &mut self.recorder {
                    recorder.copied(tensor)?;
                }
            } else if let (true, None, Some(parts)) =
                (tensor.is_copy(), &self.recorder, source.parts())
            {
                pipeline.restore(source, &**parts)?;
            } else {
                let steps = self.steps(tensor)?;
                let recorder = self.recorder.as_mut();
                let mut recorder = recorder.filter(|recorder| recorder.wants(tensor));
                let watching = match (&mut recorder, &self.bounds) {
                    (Some(recorder), _) => Watching::Undo(&mut recorder.writer),
                    (None, Some(_)) => Watching::Bounds,
                    (None, None) => Watching::Nothing,
                };
                let evaluated = pipeline.evaluate(tensor, steps, watching)?;
                if let (Some(recorder), Some(record)) = (recorder, evaluated.record) {
                    recorder.evaluated(tensor, record);
                }
                if let Some(bounds) = &mut self.bounds {
                    bounds.push((tensor.name.clone(), evaluated.bound));
                }
                let sums = evaluated.sums;
                if !tensor.is_copy() {
                    self.sums.push((tensor.name.clone(), sums));
                }
            }
            let padding = file.padding(tensor);
            if padding > 0 {
                pipeline.bytes(vec![0; padding as usize])?;
            }
        }
        Ok(())
    }

    /// What happens to a tensor, in order.
    fn steps(&self, tensor: &PlannedTensor) -> Result<Vec<Step>> {
        // At strength 0 any method is the base, even where its own formula would have no value.
        let modules = tensor.modules.iter().filter(|m| m.strength != 0.0);
        let step = |planned: &PlannedModule| {
            let module = self.plan.module(planned);
            let (on, strength) = (&planned.geometry, planned.strength);
            Ok(Step {
                rows: planned.rows.clone(),
                update: module.method.update(module, on, strength)?,
            })
        };
        modules.map(step).collect()
    }

    fn companions(&mut self, sink: &Sink) -> Result<()> {
        for companion in &self.plan.companions.copied {
            let mut file = sink.create(&companion.name)?;
            let configs = || self.plan.base.configs();
            if configs().any(|(place, _)| place == companion.name) {
                let text = companion.input.read_all(64 << 20)?;
                let edited = config::edit(&text, &self.plan.edits)
                    .map_err(|e| e.in_file(companion.input.path()))?;
                file.write(&edited)?;
            } else {
                file.copy(&companion.input, 0, companion.input.len())?;
            }
            file.finish()?;
            self.advance(companion.input.len())?;
        }
        Ok(())
    }

    fn indices(&self, sink: &Sink) -> Result<()> {
        let plan = self.plan;
        if plan.shape == Shape::File {
            return Ok(());
        }
        for (number, part) in plan.base.parts.iter().enumerate() {
            let files = || plan.files.iter().filter(move |file| file.part == number);
            let had_index = part.has_index() && plan.options.shard_size.is_none();
            if files().count() <= 1 && !had_index {
                continue;
            }
            let listed = || {
                files()
                    .flat_map(|file| file.tensors.iter().map(move |tensor| (file, tensor)))
                    .filter(|(_, tensor)| !part.is_unindexed(part.own_name(&tensor.name)))
            };
            let map: BTreeMap<&str, &str> = listed()
                .map(|(file, tensor)| (part.own_name(&tensor.name), part.own_file(&file.name)))
                .collect();
            let bytes = listed().map(|(_, tensor)| tensor.bytes()).sum();
            let parameters = listed()
                .map(|(_, tensor)| tensor.shape.iter().product::<usize>() as u64)
                .sum();
            let text = part.index_text(bytes, parameters, &map);
            let mut file = sink.create(&part.index_place())?;
            file.write(text.as_bytes())?;
            file.finish()?;
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        self.control.progress(self.done.min(self.total), self.total);
        self.control.check()
    }
}
