//! Reading, arithmetic and writing overlap, in memory bounded by a few chunks.
//!
//! One thread writes; the others evaluate blocks of rows of the next chunk, each reading its own rows. Chunks and blocks
//! are cut by shape alone, so neither bytes nor sums depend on the number of threads.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use rayon::prelude::*;

use super::Control;
use super::plan::PlannedTensor;
use crate::adapter::bound::Bound;
use crate::adapter::candidates::Chains;
use crate::adapter::evaluate::{Recipe, Step, Sums};
use crate::checkpoint::sink::OutputFile;
use crate::error::{Error, Reason, Result};
use crate::linalg::Kernel;
use crate::mapped::Input;
use crate::ops::device::Tally;
use crate::ops::undo;
use crate::tensor::{Parts, Tensor};

mod ahead;
mod block;
mod source;
mod watch;

use ahead::{Ahead, Place, Work};
use block::{Block, Done};
use source::{Source, float};
use watch::Watch;

pub(crate) use ahead::Aside;
pub(crate) use watch::Record;

/// Bytes of output that are computed before they are handed to the writer.
pub(in crate::ops::merge) const CHUNK: usize = 8 << 20;

/// Elements that one task evaluates: base and value in f64 stay in the second-level cache.
pub(in crate::ops::merge) const BLOCK: usize = 32 << 10;

/// Rows that a block has at least: the kernels work on tiles of eight.
const TILE: usize = 8;

/// Chunks that wait for the writer, so that a slow moment of the disk does not stop the arithmetic.
const QUEUE: usize = 3;

/// Longest copy between two looks at the cancel flag.
const COPY: u64 = 64 << 20;

/// What the writer is told, in order.
enum Message {
    Begin(OutputFile),
    Bytes(Vec<u8>),
    Copy(Arc<Input>, u64, u64),
    End,
}

/// How values are computed, and who watches.
#[derive(Clone, Copy)]
pub(crate) struct Settings<'a> {
    pub(crate) control: &'a Control<'a>,
    pub(crate) kernel: &'static Kernel,
    /// Writes values that are not finite.
    pub(crate) allow_nonfinite: bool,
    /// The base, for errors.
    pub(crate) base: &'a Path,
    /// Bytes that will be written.
    pub(crate) total: u64,
    /// Where products may be computed beside the processor.
    pub(crate) aside: Option<Aside<'a>>,
}

/// The computing side of the channel to the writer.
pub(crate) struct Pipeline<'a> {
    settings: Settings<'a>,
    done: u64,
    tally: Tally,
    /// Neighbours in a file that stay neighbours are copied in one go.
    pending: Option<(Arc<Input>, Range<u64>)>,
    messages: SyncSender<Message>,
    buffers: Receiver<Vec<u8>>,
}

/// What else is done with a tensor that is evaluated.
pub(crate) enum Watching<'a> {
    /// Nothing.
    Nothing,
    /// What restores its source is written down.
    Undo(&'a mut undo::Writer),
    /// The steps are inverses, and how far the result may be from the base is measured.
    Bounds,
}

/// A tensor that was evaluated.
pub(crate) struct Evaluated {
    pub(crate) sums: Sums,
    pub(crate) record: Option<Record>,
    pub(crate) bound: Bound,
}

/// Starts the writer, does the work, and returns the hidden paths of the files.
///
/// # Errors
/// What the work and writing give.
pub(crate) fn run<T>(
    settings: Settings<'_>,
    work: impl FnOnce(&mut Pipeline<'_>) -> Result<T>,
) -> Result<(T, Vec<PathBuf>)> {
    let (messages, inbox) = sync_channel(QUEUE);
    let (returns, buffers) = channel();
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write(&inbox, &returns));
        let mut pipeline = Pipeline {
            settings,
            done: 0,
            tally: Tally::default(),
            pending: None,
            messages,
            buffers,
        };
        let computed = work(&mut pipeline);
        drop(pipeline);
        let written = writer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // The writer's error is the cause of ours, if it has one.
        let written = written?;
        computed.map(|value| (value, written))
    })
}

impl Pipeline<'_> {
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

    /// Begins a file.
    pub(crate) fn begin(&mut self, file: OutputFile) -> Result<()> {
        self.send(Message::Begin(file))
    }

    /// Ends it.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.flush()?;
        self.send(Message::End)
    }

    /// Appends bytes at hand.
    pub(crate) fn bytes(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.flush()?;
        let length = bytes.len() as u64;
        self.send(Message::Bytes(bytes))?;
        self.advance(length)
    }

    /// Appends a range of an input.
    pub(crate) fn copy(&mut self, input: &Arc<Input>, range: Range<u64>) -> Result<()> {
        if let Some((open, before)) = &mut self.pending
            && Arc::ptr_eq(open, input)
            && before.end == range.start
        {
            before.end = range.end;
            return Ok(());
        }
        self.flush()?;
        self.pending = Some((input.clone(), range));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let Some((input, range)) = self.pending.take() else {
            return Ok(());
        };
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(COPY);
            self.send(Message::Copy(input.clone(), at, length))?;
            at += length;
            self.advance(length)?;
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        let Settings { control, total, .. } = self.settings;
        self.done += bytes;
        control.progress(self.done.min(total), total);
        control.check()
    }

    /// Bytes that were appended so far.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    /// What a device did so far.
    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Appends a tensor as it is, whose bytes are made in parts; they are compared with their hash.
    ///
    /// # Errors
    /// What making them gives; [`Reason::NotRestored`].
    pub(crate) fn restore(&mut self, tensor: &Tensor, parts: &dyn Parts) -> Result<()> {
        self.flush()?;
        let mut hasher = blake3::Hasher::new();
        let block = parts.block();
        let size = (CHUNK / block.max(1)).max(1) * block.max(1);
        for start in (0..tensor.length as usize).step_by(size) {
            let mut buffer = self.buffer(size.min(tensor.length as usize - start));
            let blocks = buffer.par_chunks_mut(block.max(1)).enumerate();
            blocks.try_for_each(|(index, bytes)| parts.read(start + index * block, bytes))?;
            hasher.update_rayon(&buffer);
            let length = buffer.len() as u64;
            self.send(Message::Bytes(buffer))?;
            self.advance(length)?;
        }
        parts.verify(hasher.finalize().as_bytes())
    }

    /// Appends a tensor that follows from its source by steps.
    ///
    /// # Errors
    /// What reading gives; [`Reason::ValuesNotFinite`]; [`Reason::NotRestored`].
    pub(crate) fn evaluate(
        &mut self,
        tensor: &PlannedTensor,
        steps: Vec<Step>,
        watching: Watching<'_>,
    ) -> Result<Evaluated> {
        self.flush()?;
        let Settings {
            control,
            kernel,
            aside,
            ..
        } = self.settings;
        let source = Source::of(tensor)?;
        let to = float(tensor.dtype, &tensor.source)?;
        let (rows, columns) = tensor.matrix();
        let mut recipe = Recipe { columns, to, steps };
        let height = (BLOCK / columns.max(1)).max(TILE);
        if recipe.surveys() {
            source.survey(&mut recipe, rows, height, kernel, control)?;
        }
        let measures = matches!(watching, Watching::Bounds);
        let mut undo = match watching {
            Watching::Undo(undo) => Some(undo),
            Watching::Nothing | Watching::Bounds => None,
        };
        let mut watch = Watch::new(undo.as_deref(), &source);
        let block = Block {
            recipe: &recipe,
            source: &source,
            kernel,
            writes_undo: undo.is_some(),
            measures,
        };
        let chunk_rows = (CHUNK / (columns * to.size()).max(1)).max(1);
        let chunk_rows = chunk_rows.next_multiple_of(height);
        let firsts = (0..rows).step_by(chunk_rows);
        let chunks: Vec<_> = firsts
            .map(|first| first..(first + chunk_rows).min(rows))
            .collect();
        let aside = aside.filter(|_| !recipe.steps.is_empty());
        let place = aside.map(|aside| Work::of(aside, &recipe, rows, undo.is_some()));
        let place = place.transpose()?;
        let (sums, bound) = std::thread::scope(|scope| {
            let ahead = match &place {
                Some(Place::Device(work)) => Some(work.start(scope, &recipe, &chunks)),
                Some(Place::Processor(_)) | None => None,
            };
            let watching = (watch.as_mut(), undo.as_deref_mut());
            self.chunks(&block, &chunks, height, ahead.as_ref(), watching)
        })?;
        match place {
            Some(Place::Device(_)) => {
                let elements = (rows * columns) as u64;
                self.tally.on_device(elements, sums.recomputed);
            }
            Some(Place::Processor(reason)) => self.tally.on_processor(reason),
            None => {}
        }
        let record = watch.map(|watch| watch.finish(&tensor.source, undo, columns, height));
        Ok(Evaluated {
            sums,
            record: record.transpose()?.flatten(),
            bound,
        })
    }

    /// Evaluates a tensor chunk by chunk, and hands them to the writer.
    fn chunks(
        &mut self,
        block: &Block<'_>,
        chunks: &[Range<usize>],
        height: usize,
        ahead: Option<&Ahead<'_>>,
        (mut watch, mut undo): (Option<&mut Watch>, Option<&mut undo::Writer>),
    ) -> Result<(Sums, Bound)> {
        let Settings {
            control,
            allow_nonfinite,
            base,
            ..
        } = self.settings;
        let columns = block.recipe.columns;
        let row_bytes = columns * block.recipe.to.size();
        let base_bytes = columns * block.source.float.size();
        let (mut total, mut bound) = (Sums::default(), Bound::default());
        let mut bases = Vec::new();
        for (number, rows) in chunks.iter().enumerate() {
            let mut buffer = self.buffer(rows.len() * row_bytes);
            let watched = if watch.is_some() { rows.len() } else { 0 };
            bases.resize(watched * base_bytes, 0);
            let candidates = ahead.map(|ahead| ahead.next(number)).transpose()?;
            let candidates = candidates.as_deref();
            let results = (&mut buffer[..], &mut bases[..]);
            let blocks = chunk(block, rows.start, height, candidates, results)?;
            for done in &blocks {
                total.add(&done.sums);
                bound.add(&done.bound);
                if let (Some(watch), Some(undo)) = (&mut watch, undo.as_deref_mut()) {
                    watch.payload(&done.payload, undo)?;
                }
            }
            if let Some(watch) = &mut watch {
                watch.base.update_rayon(&bases);
                watch.merged.update_rayon(&buffer);
            }
            if total.not_finite > 0 && !allow_nonfinite {
                // Nothing more is written, but the count is that of the whole tensor.
                control.check()?;
                continue;
            }
            let length = buffer.len() as u64;
            self.send(Message::Bytes(buffer))?;
            self.advance(length)?;
        }
        if total.not_finite > 0 && !allow_nonfinite {
            let tensor = block.source.tensor;
            let (row, column) = total.first.unwrap_or_default();
            let reason = Reason::ValuesNotFinite {
                count: total.not_finite,
                first: place(tensor, row, column),
            };
            return Err(Error::new(reason).in_file(base).on(&*tensor.name));
        }
        Ok((total, bound))
    }
}

/// Evaluates the blocks of a chunk, each on a thread of its own. `bases` takes the rows of the base, where it has room.
fn chunk(
    block: &Block<'_>,
    first: usize,
    height: usize,
    candidates: Option<&[Option<Chains>]>,
    (buffer, bases): (&mut [u8], &mut [u8]),
) -> Result<Vec<Done>> {
    let (columns, to) = (block.recipe.columns, block.recipe.to);
    let (row_bytes, base_bytes) = (columns * to.size(), columns * block.source.float.size());
    let block_bytes = (height * row_bytes).max(1);
    let mut parts: Vec<&mut [u8]> = bases.chunks_mut((height * base_bytes).max(1)).collect();
    parts.resize_with(buffer.len().div_ceil(block_bytes), Default::default);
    let blocks = buffer.par_chunks_mut(block_bytes).zip(parts).enumerate();
    blocks
        .map(|(index, (result, base))| {
            let start = first + index * height;
            let rows = start..start + result.len() / row_bytes;
            block.evaluate(rows, candidates, base, result)
        })
        .collect()
}

/// The writer: one thread, strictly in order.
fn write(inbox: &Receiver<Message>, returns: &Sender<Vec<u8>>) -> Result<Vec<PathBuf>> {
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
