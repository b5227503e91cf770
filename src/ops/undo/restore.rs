//! The base of a merge, put together from the result, the adapters and the undo file.

use std::cell::RefCell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::code::{Memory, decode, read_varint};
use super::directory::{Coded, Directory, How, ModuleEntry};
use super::file::{Undo, hash_of, hashes};
use crate::adapter::evaluate::{Recipe, Step};
use crate::adapter::preimage::Merge;
use crate::adapter::{Adapter, BiasUse, Order, Part};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Reason, Result};
use crate::formats::{Found, ReadOptions};
use crate::linalg::Kernel;
use crate::mapped::Input;
use crate::tensor::{Float, Origin, Parts, Tensor};

/// An adapter that was merged.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// An adapter folder or its file of tensors.
    pub path: PathBuf,
    /// The strength at which it was merged. With an undo file it is known, and only compared; otherwise it is 1 if
    /// absent.
    pub strength: Option<f64>,
    /// Other strengths for modules whose path a regular expression finds; the first match counts.
    pub strength_for: Vec<(String, f64)>,
}

/// A base that can be read.
pub(crate) struct Restoring {
    shared: Arc<Shared>,
    pub(crate) merged: Checkpoint,
    founds: Vec<Found>,
}

/// What the tensors of a restored base have in common.
struct Shared {
    undo: Undo,
    adapters: Vec<Adapter>,
    /// The merged tensors, by the numbers of those that they restore.
    merged: Vec<Option<Tensor>>,
    kernel: &'static Kernel,
    /// The tensor that was asked for last, so that no more than its factors are in memory.
    ready: Mutex<Option<(usize, Arc<Ready>)>>,
}

/// What it takes to restore blocks of one tensor.
struct Ready {
    /// None where it is kept as it is.
    recipe: Option<Recipe>,
    /// Where the blocks begin in the payload, and where the last ends.
    starts: Vec<u64>,
    from: Float,
    to: Float,
}

impl Restoring {
    /// Opens everything and checks that it belongs together: every byte of adapters and merged tensors is what it was.
    ///
    /// # Errors
    /// [`Reason::NotMerged`] with all tensors, [`Reason::NotTheAdapter`], [`Reason::AdapterNotMerged`],
    /// [`Reason::OtherStrength`], and what opening gives.
    pub(crate) fn open(
        undo: &Path,
        merged: &Path,
        given: &[Taken],
        read: &ReadOptions,
        kernel: &'static Kernel,
    ) -> Result<Self> {
        let undo = Undo::open(undo)?;
        let merged = Checkpoint::open(merged)?;
        let (founds, adapters) = adapters(&undo.directory, given, read)?;
        let tensors = tensors(&undo.directory, &merged)?;
        Ok(Restoring {
            shared: Arc::new(Shared {
                undo,
                adapters,
                merged: tensors,
                kernel,
                ready: Mutex::default(),
            }),
            merged,
            founds,
        })
    }

    /// What is said of the base.
    pub(crate) fn directory(&self) -> &Directory {
        &self.shared.undo.directory
    }

    /// The undo file.
    pub(crate) fn undo(&self) -> &Undo {
        &self.shared.undo
    }

    /// The adapters that were merged.
    pub(crate) fn founds(&self) -> &[Found] {
        &self.founds
    }

    /// Every file that is read.
    pub(crate) fn inputs(&self) -> impl Iterator<Item = &Arc<Input>> {
        let adapters = self.founds.iter().flat_map(Found::inputs);
        let undo = std::iter::once(&self.shared.undo.input);
        self.merged.inputs().chain(adapters).chain(undo)
    }

    /// A tensor of the base by its number: its bytes are restored when they are read.
    pub(crate) fn tensor(&self, number: usize) -> Option<Tensor> {
        let entry = self.directory().tensors.get(number)?;
        let merged = self.shared.merged.get(number)?.as_ref();
        match &entry.how {
            How::Same(_) => merged.cloned(),
            How::Kept(kept) => Some(Tensor {
                name: entry.name.clone(),
                dtype: crate::tensor::DType::U8,
                shape: vec![usize::try_from(entry.bytes).ok()?],
                input: self.shared.undo.input.clone(),
                offset: kept.offset,
                length: entry.bytes,
                memory: None,
                made: None,
                blocks: None,
            }),
            How::Coded(coded) => {
                let merged = merged?;
                Some(Tensor {
                    name: entry.name.clone(),
                    dtype: coded.from()?.dtype(),
                    length: entry.bytes,
                    memory: None,
                    made: Some(Origin::Parts(Arc::new(Restored {
                        shared: self.shared.clone(),
                        number,
                    }))),
                    ..merged.clone()
                })
            }
        }
    }
}

/// Opens the adapters that were given, in the order in which they were merged.
fn adapters(
    directory: &Directory,
    given: &[Taken],
    read: &ReadOptions,
) -> Result<(Vec<Found>, Vec<Adapter>)> {
    let mut open = Vec::new();
    for given in given {
        let found = Found::open(&given.path)?;
        let hashes = hashes(found.inputs())?;
        open.push((found, hashes, given));
    }
    let (mut founds, mut adapters) = (Vec::new(), Vec::new());
    for entry in &directory.adapters {
        let at = open
            .iter()
            .position(|(_, hashes, _)| *hashes == entry.hashes);
        let Some(at) = at else {
            let name = entry.name.clone();
            return Err(Error::new(Reason::NotTheAdapter { name }));
        };
        let (found, _, given) = open.remove(at);
        if let Some(strength) = given.strength.filter(|given| *given != entry.strength) {
            let (given, merged) = (strength, entry.strength);
            let error = Error::new(Reason::OtherStrength { given, merged });
            return Err(error.in_file(&found.path));
        }
        if !given.strength_for.is_empty() && given.strength_for != entry.strength_for {
            return Err(Error::new(Reason::OtherPatterns).in_file(&found.path));
        }
        adapters.push(found.read(read)?);
        found.file.verify()?;
        founds.push(found);
    }
    match open.first() {
        Some((found, ..)) => Err(Error::new(Reason::AdapterNotMerged).in_file(&found.path)),
        None => Ok((founds, adapters)),
    }
}

/// The merged tensors that the entries of a directory need.
fn tensors(directory: &Directory, checkpoint: &Checkpoint) -> Result<Vec<Option<Tensor>>> {
    let mut found = Vec::new();
    let mut wrong = Vec::new();
    for entry in &directory.tensors {
        let Some(merged) = entry.how.merged() else {
            found.push(None);
            continue;
        };
        let tensor = checkpoint.tensor(&merged.name);
        let size = entry.bytes;
        let is_same = matches!(entry.how, How::Same(_));
        match tensor {
            None => wrong.push(format!("{}: it is not there", merged.name)),
            Some(tensor) if (tensor.dtype, &tensor.shape) != (merged.dtype, &merged.shape) => wrong
                .push(format!(
                    "{}: {} {:?} instead of {} {:?}",
                    merged.name, tensor.dtype, tensor.shape, merged.dtype, merged.shape
                )),
            Some(tensor) if is_same && tensor.length != size || !tensor.lies_in_file() => {
                wrong.push(format!("{}: it has {} bytes", merged.name, tensor.length));
            }
            Some(_) => {}
        }
        found.push(tensor.cloned().map(|tensor| (tensor, &merged.hash)));
    }
    if wrong.is_empty() {
        let other = |(tensor, hash): &(Tensor, &String)| -> Result<Option<String>> {
            let own = hash_of(&tensor.input, tensor.offset, tensor.length)?;
            Ok((own.to_string() != **hash).then(|| format!("{}: other values", tensor.name)))
        };
        let checked: Vec<Option<String>> = found
            .par_iter()
            .flatten()
            .map(other)
            .collect::<Result<_>>()?;
        wrong.extend(checked.into_iter().flatten());
    }
    if !wrong.is_empty() {
        let count = wrong.len();
        return Err(Error::new(Reason::NotMerged { count })
            .in_file(&checkpoint.path)
            .with_cases(wrong)
            .with_hint("the undo file belongs to one result, down to the last byte"));
    }
    let tensors = found.into_iter();
    Ok(tensors
        .map(|found| found.map(|(tensor, _)| tensor))
        .collect())
}

impl Shared {
    fn coded(&self, number: usize) -> Result<&Coded> {
        match self
            .undo
            .directory
            .tensors
            .get(number)
            .map(|entry| &entry.how)
        {
            Some(How::Coded(coded)) => Ok(coded),
            _ => Err(Error::new(Reason::NotRestored)),
        }
    }

    /// Reads what it takes to restore a tensor, unless it is the one of the last call.
    fn ready(&self, number: usize) -> Result<Arc<Ready>> {
        let mut kept = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((own, ready)) = &*kept
            && *own == number
        {
            return Ok(ready.clone());
        }
        *kept = None;
        let coded = self.coded(number)?;
        let damaged = || Error::new(Reason::NotRestored).in_file(self.undo.input.path());
        let (from, to) = coded
            .from()
            .zip(Float::of(coded.merged.dtype))
            .ok_or_else(damaged)?;
        let lengths = self.undo.section(coded.lengths)?;
        let (mut rest, mut starts, mut at) = (&*lengths, vec![0], 0u64);
        for _ in 0..coded.blocks() {
            let length = read_varint(&mut rest).ok_or_else(damaged)?;
            at = at.checked_add(length).ok_or_else(damaged)?;
            starts.push(at);
        }
        if at != coded.payload.length || !rest.is_empty() {
            return Err(damaged());
        }
        let ready = Arc::new(Ready {
            recipe: self.recipe(coded, to)?,
            starts,
            from,
            to,
        });
        *kept = Some((number, ready.clone()));
        Ok(ready)
    }

    /// The steps of the merge, where they are all additions.
    fn recipe(&self, coded: &Coded, to: Float) -> Result<Option<Recipe>> {
        let mut steps = Vec::new();
        for entry in &coded.modules {
            match self.step(entry)? {
                Some(step) => steps.push(step),
                None => return Ok(None),
            }
        }
        Ok(Some(Recipe {
            columns: coded.columns,
            to,
            steps,
        }))
    }

    fn step(&self, entry: &ModuleEntry) -> Result<Option<Step>> {
        let modules = self.adapters.get(entry.adapter).map(|own| &own.modules);
        let module = modules.and_then(|modules| entry.find(modules));
        let module = module.ok_or_else(|| {
            let name = entry.path.clone();
            Error::new(Reason::NotTheAdapter { name })
                .with_hint("give the options with which it was read for the merge")
        })?;
        if module.method.order() != Order::Additive {
            return Ok(None);
        }
        let taken = match &entry.outputs {
            Some(outputs) => {
                let all = module.method.extent(module).outputs.unwrap_or(0);
                if outputs
                    .iter()
                    .any(|rows| rows.start > rows.end || rows.end > all)
                {
                    return Err(module.error(Reason::NotRestored));
                }
                Some(module.outputs(outputs)?)
            }
            None => None,
        };
        let module = taken.as_ref().unwrap_or(module);
        module.check_on(&entry.geometry)?;
        let has_part = match entry.geometry.part {
            Part::Weight => module.method.weight(module),
            Part::Bias => module.method.bias(module) != BiasUse::No,
        };
        if !has_part {
            return Err(module.error(Reason::NotRestored));
        }
        let update = module
            .method
            .update(module, &entry.geometry, entry.strength)?;
        let rows = entry.rows.clone();
        Ok(Some(Step { rows, update }))
    }

    /// Restores one block of rows.
    fn block(&self, number: usize, block: usize, ready: &Ready, base: &mut [u8]) -> Result<()> {
        thread_local! {
            static MEMORY: RefCell<Memory> = RefCell::default();
        }
        let coded = self.coded(number)?;
        let entry = &self.undo.directory.tensors[number];
        let failed = || Error::new(Reason::NotRestored).on(&*entry.name);
        let rows = self.rows(coded, block);
        let merged = self.merged[number].as_ref().ok_or_else(failed)?;
        let mut values = vec![0; rows.len() * coded.columns * ready.to.size()];
        let start = rows.start * coded.columns * ready.to.size();
        merged.read(start, &mut values)?;
        let (start, end) = (ready.starts[block], ready.starts[block + 1]);
        // A block is never longer than itself and a byte.
        if end - start > base.len() as u64 + 1 {
            return Err(failed());
        }
        let mut payload = vec![0; (end - start) as usize];
        self.undo
            .input
            .read_at(&mut payload, coded.payload.offset + start)?;
        let recipe = ready.recipe.as_ref();
        let terms = recipe.map(|recipe| recipe.terms(rows, self.kernel));
        let terms = terms.transpose()?.flatten();
        let merge = terms.as_ref().map(|terms| Merge {
            from: ready.from,
            to: ready.to,
            terms,
            kernel: self.kernel,
        });
        let decoded = MEMORY.with_borrow_mut(|memory| {
            decode(merge.as_ref(), ready.from, &payload, &values, base, memory)
        });
        decoded.ok_or_else(failed)
    }

    fn rows(&self, coded: &Coded, block: usize) -> Range<usize> {
        let start = block * coded.height;
        start..(start + coded.height).min(coded.rows())
    }
}

/// The bytes of one tensor of the base.
struct Restored {
    shared: Arc<Shared>,
    number: usize,
}

impl Parts for Restored {
    fn read(&self, start: usize, buffer: &mut [u8]) -> Result<()> {
        let coded = self.shared.coded(self.number)?;
        let ready = self.shared.ready(self.number)?;
        let row = coded.columns * ready.from.size();
        let (block_bytes, end) = (coded.height * row, start + buffer.len());
        let mut at = start;
        let mut whole = Vec::new();
        while at < end {
            let block = at / block_bytes;
            let first = block * block_bytes;
            let last = first + self.shared.rows(coded, block).len() * row;
            let part = &mut buffer[at - start..end.min(last) - start];
            if part.len() == last - first {
                self.shared.block(self.number, block, &ready, part)?;
            } else {
                whole.resize(last - first, 0);
                self.shared.block(self.number, block, &ready, &mut whole)?;
                part.copy_from_slice(&whole[at - first..at - first + part.len()]);
            }
            at += part.len();
        }
        Ok(())
    }

    fn block(&self) -> usize {
        let coded = self.shared.coded(self.number).ok();
        let bytes =
            coded.and_then(|coded| Some(coded.height * coded.columns * coded.from()?.size()));
        bytes.unwrap_or(1)
    }

    fn verify(&self, hash: &[u8; 32]) -> Result<()> {
        let entry = &self.shared.undo.directory.tensors[self.number];
        match blake3::Hash::from_bytes(*hash).to_string() == entry.hash {
            true => Ok(()),
            false => Err(Error::new(Reason::NotRestored).on(&*entry.name)),
        }
    }
}
