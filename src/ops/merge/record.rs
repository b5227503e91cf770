//! Writes the undo file while a merge runs.

use std::collections::HashMap;
use std::path::Path;

use super::pipeline::Record;
use super::plan::{Opened, Plan, PlannedModule, PlannedTensor};
use crate::checkpoint::sink::{Destination, Faults, Shape, Sink};
use crate::error::{Error, Reason, Result};
use crate::ops::undo::{
    AdapterEntry, Coded, CopyEntry, Directory, FileEntry, How, Merged, ModuleEntry, Piece,
    TensorEntry, TextEntry, Writer, hash_of, hashes,
};
use crate::tensor::Tensor;

/// Most bytes between tensors that are one section.
const GAP: u64 = 32 << 20;

/// Most bytes of a file of text.
const TEXT: u64 = 64 << 20;

/// An undo file that is being written.
pub(super) struct Recorder<'a> {
    plan: &'a Plan,
    pub(super) writer: Writer,
    sink: Sink,
    tensors: HashMap<String, TensorEntry>,
    /// Bytes of the merged tensors that are not copies.
    pub(super) merged: u64,
}

/// Checks where an undo file goes.
///
/// # Errors
/// As [`Destination::check`]; [`Reason::BadOption`] where it would lie in the output.
pub(super) fn destination(
    plan: &Plan,
    path: &Path,
    inputs: &[&Path],
    faults: Faults,
) -> Result<Destination> {
    let destination = Destination::check(
        path,
        Shape::File,
        plan.options.force,
        inputs.iter().copied(),
        faults.clone(),
    )?;
    let output = plan.destination(faults)?;
    if destination.target().starts_with(output.target()) {
        return Err(Error::new(Reason::BadOption {
            text: path.to_string_lossy().into_owned(),
            problem: "the undo file cannot be the output or lie in it".to_owned(),
        }));
    }
    Ok(destination)
}

/// Whether two tensors have their bytes from one place.
fn is_one(a: &Tensor, b: &Tensor) -> bool {
    use std::sync::Arc;
    let restored = match (a.parts(), b.parts()) {
        (None, None) => a.lies_in_file() && b.lies_in_file(),
        (Some(a), Some(b)) => std::ptr::eq(Arc::as_ptr(a).cast::<()>(), Arc::as_ptr(b).cast()),
        _ => false,
    };
    restored
        && Arc::ptr_eq(&a.input, &b.input)
        && (a.offset, a.length, a.dtype) == (b.offset, b.length, b.dtype)
}

impl<'a> Recorder<'a> {
    /// Begins an undo file.
    ///
    /// # Errors
    /// What creating it gives.
    pub(super) fn new(plan: &'a Plan, destination: Destination) -> Result<Self> {
        let name = destination.target().file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let sink = destination.begin()?;
        Ok(Recorder {
            plan,
            writer: Writer::new(&sink, &name)?,
            sink,
            tensors: HashMap::new(),
            merged: 0,
        })
    }

    /// Whether a tensor of the result restores one of the base that nothing else restored yet.
    pub(super) fn wants(&self, tensor: &PlannedTensor) -> bool {
        let base = self.plan.base.tensor(&tensor.source.name);
        let is_its = tensor.in_base && tensor.replaced_by.is_none();
        is_its
            && base.is_some_and(|base| is_one(base, &tensor.source))
            && !self.tensors.contains_key(&tensor.source.name)
    }

    fn merged(tensor: &PlannedTensor, hash: blake3::Hash) -> Merged {
        Merged {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            hash: hash.to_string(),
        }
    }

    fn enter(&mut self, tensor: &PlannedTensor, hash: blake3::Hash, how: How) {
        let entry = TensorEntry {
            name: tensor.source.name.clone(),
            bytes: tensor.source.length,
            hash: hash.to_string(),
            how,
        };
        self.tensors.insert(entry.name.clone(), entry);
    }

    /// Notes a tensor that is in the result as it was.
    ///
    /// # Errors
    /// What reading gives.
    pub(super) fn copied(&mut self, tensor: &PlannedTensor) -> Result<()> {
        if self.wants(tensor) {
            let source = &tensor.source;
            let hash = hash_of(&source.input, source.offset, source.length)?;
            self.enter(tensor, hash, How::Same(Self::merged(tensor, hash)));
        }
        Ok(())
    }

    /// Notes a tensor that was evaluated.
    pub(super) fn evaluated(&mut self, tensor: &PlannedTensor, record: Record) {
        let merged = Self::merged(tensor, record.merged);
        if tensor.is_copy() {
            return self.enter(tensor, record.base, How::Same(merged));
        }
        self.merged += tensor.bytes();
        let modules = tensor.modules.iter().filter(|m| m.strength != 0.0);
        let coded = Coded {
            merged,
            dtype: tensor.source.dtype,
            columns: record.columns,
            height: record.height,
            payload: record.payload,
            lengths: record.lengths,
            modules: modules.map(|planned| self.module(planned)).collect(),
        };
        self.enter(tensor, record.base, How::Coded(Box::new(coded)));
    }

    fn module(&self, planned: &PlannedModule) -> ModuleEntry {
        let module = &self.plan.adapters[planned.adapter].adapter.modules[planned.module];
        ModuleEntry {
            adapter: planned.adapter,
            module: planned.module,
            path: module.path.clone(),
            scale: module.scale.value,
            strength: planned.strength,
            rows: planned.rows.clone(),
            geometry: planned.geometry,
            outputs: planned.outputs.clone(),
        }
    }

    /// Adds what no tensor of the result restores, and makes the file durable under its hidden name.
    ///
    /// # Errors
    /// What reading and writing give.
    pub(super) fn finish(mut self) -> Result<(Sink, u64)> {
        let plan = self.plan;
        let mut directory = Directory {
            writer: concat!("loratool ", env!("CARGO_PKG_VERSION")).to_owned(),
            adapters: plan.adapters.iter().map(adapter).collect::<Result<_>>()?,
            folder: plan.base.is_folder,
            files: Vec::new(),
            tensors: Vec::new(),
            texts: Vec::new(),
            companions: Vec::new(),
        };
        for frame in &plan.frames {
            let mut pieces = Vec::new();
            for (name, range) in frame.stretches() {
                if let Some(name) = name {
                    pieces.push(Piece::Tensor(directory.tensors.len()));
                    directory.tensors.push(self.tensor(name)?);
                    continue;
                }
                for start in range.clone().step_by(GAP as usize) {
                    let mut bytes = vec![0; (range.end - start).min(GAP) as usize];
                    frame.input.read_at(&mut bytes, start)?;
                    pieces.push(Piece::Bytes(self.writer.deflated(&bytes)?));
                }
            }
            directory.files.push(FileEntry {
                place: frame.place.clone(),
                bytes: frame.input.len(),
                pieces,
            });
        }
        self.beside(&mut directory)?;
        let bytes = self.writer.finish(&directory)?;
        Ok((self.sink, bytes))
    }

    /// What restores a tensor of the base.
    fn tensor(&mut self, name: &str) -> Result<TensorEntry> {
        if let Some(entry) = self.tensors.remove(name) {
            return Ok(entry);
        }
        let tensor = self.plan.base.tensor(name);
        let tensor = tensor.ok_or_else(|| Error::new(Reason::NotRestored).on(name))?;
        let (offset, mut hasher) = (self.writer.at(), blake3::Hasher::new());
        let mut buffer = Vec::new();
        for start in (0..tensor.length).step_by(GAP as usize) {
            buffer.resize((tensor.length - start).min(GAP) as usize, 0);
            tensor.read(start as usize, &mut buffer)?;
            hasher.update_rayon(&buffer);
            self.writer.append(&buffer)?;
        }
        Ok(TensorEntry {
            name: name.to_owned(),
            bytes: tensor.length,
            hash: hasher.finalize().to_string(),
            how: How::Kept(self.writer.since(offset)),
        })
    }

    /// The files beside the weights.
    fn beside(&mut self, directory: &mut Directory) -> Result<()> {
        let base = &self.plan.base;
        let configs = base.configs().map(|(place, config)| (place, &config.input));
        let texts: Vec<_> = match base.is_folder {
            true => configs.chain(base.indices()).collect(),
            false => Vec::new(),
        };
        for (place, input) in &texts {
            let text = self.writer.deflated(&input.read_all(TEXT)?)?;
            directory.texts.push(TextEntry {
                place: place.clone(),
                text,
            });
        }
        let copied = self.plan.companions.copied.iter();
        for companion in copied.filter(|own| texts.iter().all(|(place, _)| *place != own.name)) {
            let hash = hash_of(&companion.input, 0, companion.input.len())?;
            directory.companions.push(CopyEntry {
                place: companion.name.clone(),
                hash: hash.to_string(),
            });
        }
        Ok(())
    }
}

fn adapter(opened: &Opened) -> Result<AdapterEntry> {
    let name = opened.found.path.file_name().unwrap_or_default();
    let strength_for = opened.strength_for.iter();
    Ok(AdapterEntry {
        name: name.to_string_lossy().into_owned(),
        hashes: hashes(opened.found.inputs())?,
        strength: opened.strength,
        strength_for: strength_for
            .map(|(pattern, strength)| (pattern.text().to_owned(), *strength))
            .collect(),
    })
}
