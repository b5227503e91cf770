//! The run: reading, arithmetic and writing overlap, in memory bounded by a few chunks.
//!
//! One thread writes; the others evaluate blocks of rows of the next chunk, each reading its own rows.
//! Chunks and blocks are cut by shape alone, so neither bytes nor sums depend on the number of threads.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Instant;

use rayon::prelude::*;

use super::Control;
use super::layout::File;
use super::plan::{Plan, PlannedTensor};
use super::report::Report;
use crate::adapter::evaluate::{Elements, Recipe, Scratch, Step, Sums};
use crate::checkpoint::config;
use crate::checkpoint::sink::{OutputFile, Shape, Sink};
use crate::containers::TensorFile;
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::{DType, Float, Tensor};

/// Bytes of output that are computed before they are handed to the writer.
pub(super) const CHUNK: usize = 8 << 20;

/// Elements that one task evaluates: base and value in f64 stay in the second-level cache.
pub(super) const BLOCK: usize = 32 << 10;

/// Rows that a block has at least: the kernels work on tiles of eight.
const TILE: usize = 8;

/// Chunks that wait for the writer, so that a slow moment of the disk does not stop the arithmetic.
const QUEUE: usize = 3;

/// Longest copy between two looks at the cancel flag.
const COPY: u64 = 64 << 20;

impl Plan {
    /// Tells what a run would do.
    pub fn report(&self) -> Report {
        Report::of(self, threads(self))
    }

    /// Runs the plan.
    ///
    /// # Errors
    /// Those of kinds Output, Io, NonFinite, Changed and Interrupted; the output is then as it was.
    pub fn run(&self, control: &Control<'_>) -> Result<Report> {
        let start = Instant::now();
        let destination = self.destination(control.faults.clone())?;
        destination.check_space(self.disk_needed())?;
        let sink = destination.begin()?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads(self))
            .build()
            .map_err(|e| {
                Error::new(Reason::ThreadPool {
                    problem: e.to_string(),
                })
            })?;
        for shard in &self.base.shards {
            shard.file.verify_while(&|| control.check())?;
        }
        let mut run = Run {
            plan: self,
            control,
            total: self.disk_needed(),
            done: 0,
            sums: Vec::new(),
        };
        let written = pool.install(|| run.files(&sink))?;
        run.companions(&sink)?;
        run.indices(&sink)?;
        verify(self, &written)?;
        control.check()?;
        sink.publish()?;
        control.progress(run.total, run.total);
        let mut report = self.report();
        report.dry_run = false;
        report.not_finite = run.sums.iter().map(|(_, sums)| sums.not_finite).sum();
        report.notices.extend(base_notices(&run.sums));
        report.set_changes(&run.sums);
        report.seconds = Some(start.elapsed().as_secs_f64());
        Ok(report)
    }
}

fn threads(plan: &Plan) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    plan.options.threads.unwrap_or_else(cores).clamp(1, 256)
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
fn verify(plan: &Plan, written: &[std::path::PathBuf]) -> Result<()> {
    let adapters = plan
        .adapters
        .iter()
        .flat_map(|opened| opened.found.inputs());
    let companions = plan
        .companions
        .copied
        .iter()
        .map(|companion| &companion.input);
    for input in plan.base.inputs().chain(adapters).chain(companions) {
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
    total: u64,
    done: u64,
    sums: Vec<(String, Sums)>,
}

/// What the writer is told, in order.
enum Message {
    Begin(OutputFile),
    Bytes(Vec<u8>),
    Copy(Arc<Input>, u64, u64),
    End,
}

/// The computing side of the channel to the writer.
struct Writer {
    messages: SyncSender<Message>,
    buffers: Receiver<Vec<u8>>,
}

impl Writer {
    /// Fails if the writer stopped; its own error is found when it is joined.
    fn send(&self, message: Message) -> Result<()> {
        self.messages
            .send(message)
            .map_err(|_| Error::new(Reason::Write))
    }

    /// A buffer that the writer is done with, or a new one.
    fn buffer(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.buffers.try_recv().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }
}

impl Run<'_> {
    /// Writes all files of tensors and returns their hidden paths.
    fn files(&mut self, sink: &Sink) -> Result<Vec<std::path::PathBuf>> {
        let (messages, inbox) = sync_channel(QUEUE);
        let (returns, buffers) = channel();
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || write(&inbox, &returns));
            let outbox = Writer { messages, buffers };
            let computed = self.compute(sink, &outbox);
            drop(outbox);
            let written = writer
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // The writer's error is the cause of ours, if it has one.
            let written = written?;
            computed.map(|()| written)
        })
    }

    fn compute(&mut self, sink: &Sink, writer: &Writer) -> Result<()> {
        let plan = self.plan;
        for file in &plan.files {
            writer.send(Message::Begin(sink.create(&file.name)?))?;
            writer.send(Message::Bytes(file.header.bytes.clone()))?;
            self.advance(file.header.bytes.len() as u64)?;
            self.tensors(file, writer)?;
            writer.send(Message::End)?;
        }
        Ok(())
    }

    fn tensors(&mut self, file: &File, writer: &Writer) -> Result<()> {
        // Neighbours in the base that stay neighbours are copied in one go.
        let mut pending: Option<(Arc<Input>, Range<u64>)> = None;
        for tensor in &file.tensors {
            if let (true, Some(memory)) = (tensor.is_copy(), &tensor.source.memory) {
                self.copy(pending.take(), writer)?;
                writer.send(Message::Bytes(memory.to_vec()))?;
                self.advance(tensor.bytes())?;
            } else if tensor.is_copy() {
                let source = &tensor.source;
                let range = source.offset..source.offset + source.length;
                match &mut pending {
                    Some((input, open))
                        if Arc::ptr_eq(input, &source.input) && open.end == range.start =>
                    {
                        open.end = range.end;
                    }
                    _ => {
                        self.copy(pending.take(), writer)?;
                        pending = Some((source.input.clone(), range));
                    }
                }
            } else {
                self.copy(pending.take(), writer)?;
                let sums = self.evaluate(tensor, writer)?;
                self.sums.push((tensor.name.clone(), sums));
            }
            let padding = file.padding(tensor);
            if padding > 0 {
                self.copy(pending.take(), writer)?;
                writer.send(Message::Bytes(vec![0; padding as usize]))?;
                self.advance(padding)?;
            }
        }
        self.copy(pending, writer)
    }

    fn copy(&mut self, pending: Option<(Arc<Input>, Range<u64>)>, writer: &Writer) -> Result<()> {
        let Some((input, range)) = pending else {
            return Ok(());
        };
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(COPY);
            writer.send(Message::Copy(input.clone(), at, length))?;
            at += length;
            self.advance(length)?;
        }
        Ok(())
    }

    fn evaluate(&mut self, tensor: &PlannedTensor, writer: &Writer) -> Result<Sums> {
        let plan = self.plan;
        let source = Source::of(tensor)?;
        let to = float(tensor.dtype, &tensor.source)?;
        let (rows, columns) = tensor.matrix();
        let mut steps = Vec::new();
        // At strength 0 any method is the base, even where its own formula would have no value.
        for planned in tensor.modules.iter().filter(|m| m.strength != 0.0) {
            let module = plan.module(planned);
            let update = module
                .method
                .update(module, &planned.geometry, planned.strength)?;
            steps.push(Step {
                rows: planned.rows.clone(),
                update,
            });
        }
        let mut recipe = Recipe { columns, to, steps };
        let height = (BLOCK / columns.max(1)).max(TILE);
        if recipe.surveys() {
            self.survey(&mut recipe, &source, rows, height)?;
        }
        let row_bytes = columns * to.size();
        let chunk_rows = (CHUNK / row_bytes.max(1)).max(1).next_multiple_of(height);
        let mut total = Sums::default();
        for first in (0..rows).step_by(chunk_rows) {
            let count = chunk_rows.min(rows - first);
            let mut buffer = writer.buffer(count * row_bytes);
            let blocks: Vec<Sums> = buffer
                .par_chunks_mut((height * row_bytes).max(1))
                .enumerate()
                .map(|(index, result)| {
                    let start = first + index * height;
                    let rows = start..start + result.len() / row_bytes;
                    SCRATCH.with_borrow_mut(|(bytes, scratch)| {
                        let mut sums = Sums::default();
                        let mut rest = result;
                        for (rows, float) in source.runs(rows) {
                            let result = rest.split_off_mut(..rows.len() * row_bytes);
                            let result = result.expect("the runs are the rows of the block");
                            source.read(rows.clone(), float, columns, bytes)?;
                            let source = Elements { float, bytes };
                            sums.add(&recipe.evaluate(
                                rows,
                                source,
                                result,
                                scratch,
                                plan.kernel,
                            )?);
                        }
                        Ok(sums)
                    })
                })
                .collect::<Result<_>>()?;
            blocks.iter().for_each(|sums| total.add(sums));
            if total.not_finite > 0 && !plan.options.allow_nonfinite {
                // Nothing more is written, but the count is that of the whole tensor.
                self.control.check()?;
                continue;
            }
            let length = buffer.len() as u64;
            writer.send(Message::Bytes(buffer))?;
            self.advance(length)?;
        }
        if total.not_finite > 0 && !plan.options.allow_nonfinite {
            let (row, column) = total.first.unwrap_or_default();
            let reason = Reason::ValuesNotFinite {
                count: total.not_finite,
                first: place(tensor, row, column),
            };
            return Err(Error::new(reason)
                .in_file(&plan.base.path)
                .on(&*tensor.name));
        }
        Ok(total)
    }

    fn survey(
        &self,
        recipe: &mut Recipe,
        source: &Source<'_>,
        rows: usize,
        height: usize,
    ) -> Result<()> {
        let mut bytes = Vec::new();
        for first in (0..rows).step_by(height) {
            self.control.check()?;
            let rows = first..(first + height).min(rows);
            for (rows, float) in source.runs(rows) {
                source.read(rows.clone(), float, recipe.columns, &mut bytes)?;
                let bytes = &bytes;
                recipe.survey(rows, Elements { float, bytes }, self.plan.kernel)?;
            }
        }
        Ok(())
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

thread_local! {
    static SCRATCH: RefCell<(Vec<u8>, Scratch)> = RefCell::default();
}

/// The writer: one thread, strictly in order.
fn write(inbox: &Receiver<Message>, returns: &Sender<Vec<u8>>) -> Result<Vec<std::path::PathBuf>> {
    let mut open: Option<OutputFile> = None;
    let mut finished = Vec::new();
    for message in inbox {
        match (message, &mut open) {
            (Message::Begin(file), open) => *open = Some(file),
            (Message::Bytes(bytes), Some(file)) => {
                file.write(&bytes)?;
                // The other side may be gone already.
                let _ = returns.send(bytes);
            }
            (Message::Copy(input, offset, length), Some(file)) => {
                file.copy(&input, offset, length)?
            }
            (Message::End, open) => {
                if let Some(file) = open.take() {
                    finished.push(file.finish()?);
                }
            }
            (_, None) => unreachable!("a file begins before its bytes"),
        }
    }
    Ok(finished)
}

/// Where the rows of a tensor come from.
struct Source<'a> {
    tensor: &'a PlannedTensor,
    /// The type of all rows but those that an adapter brings in another one.
    float: Float,
}

impl<'a> Source<'a> {
    fn of(tensor: &'a PlannedTensor) -> Result<Self> {
        let float = float(tensor.source.dtype, &tensor.source)?;
        for (rows, _) in tensor.rows.values() {
            rows.float()?;
        }
        Ok(Source { tensor, float })
    }

    /// Rows cut into runs of one type.
    fn runs(&self, rows: Range<usize>) -> Vec<(Range<usize>, Float)> {
        let mut runs = Vec::new();
        let mut start = rows.start;
        for (row, (tensor, _)) in self.tensor.rows.range(rows.clone()) {
            if let Some(float) = Float::of(tensor.dtype)
                && float != self.float
            {
                runs.push((start..*row, self.float));
                runs.push((*row..row + 1, float));
                start = row + 1;
            }
        }
        runs.push((start..rows.end, self.float));
        runs.retain(|(rows, _)| !rows.is_empty());
        runs
    }

    /// Reads a run.
    fn read(
        &self,
        rows: Range<usize>,
        float: Float,
        columns: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let row_bytes = columns * float.size();
        bytes.resize(rows.len() * row_bytes, 0);
        if float == self.float {
            let source = &self.tensor.source;
            source.read(rows.start * row_bytes, bytes)?;
        }
        for (row, (tensor, from)) in self.tensor.rows.range(rows.clone()) {
            let new = tensor.bytes_of(from * row_bytes, row_bytes)?;
            let at = (row - rows.start) * row_bytes;
            bytes[at..at + row_bytes].copy_from_slice(&new);
        }
        Ok(())
    }
}

fn float(dtype: DType, tensor: &Tensor) -> Result<Float> {
    Float::of(dtype).ok_or_else(|| {
        tensor.error(Reason::TensorType {
            dtype: dtype.to_string(),
        })
    })
}

/// The index of an element in the tensor's own shape.
fn place(tensor: &PlannedTensor, row: usize, column: usize) -> String {
    let mut flat = row * tensor.matrix().1 + column;
    let mut index = Vec::new();
    for size in tensor.shape.iter().rev() {
        index.push(flat % size.max(&1));
        flat /= size.max(&1);
    }
    index.reverse();
    format!("{index:?}")
}
