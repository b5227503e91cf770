//! How named tensors lie in bytes. A container has never heard of adapters.
//!
//! [`CONTAINERS`] is the only list: the bytes of a file, never its name, decide which one opens it.

// Every number in a file may lie: what it selects is asked for, never taken for granted.
#![deny(clippy::indexing_slicing, clippy::string_slice)]

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::Tensor;

mod foreign;
mod gguf;
mod numpy;
pub mod safetensors;
mod strided;
mod torch;
mod zip;

/// A kind of file that holds named tensors.
pub trait Container: Sync {
    /// Its name in the field.
    fn name(&self) -> &'static str;

    /// Whether a file of `length` bytes that starts with `head` (at most 512 bytes) is of this kind.
    fn detects(&self, head: &[u8], length: u64) -> bool;

    /// Reads the directory of tensors, checking every claim of the file against its length.
    ///
    /// # Errors
    /// What the bytes get wrong, with the tensor in question.
    fn open(&self, input: Arc<Input>) -> Result<Directory>;

    /// Compares the data with the checksums that the file states, if it states any; reads all of it.
    ///
    /// # Errors
    /// [`Reason::Checksum`], with the place.
    fn verify(&self, input: Arc<Input>) -> Result<()> {
        let _ = input;
        Ok(())
    }

    /// Whether a checkpoint in it can be the base of a merge, whose result is a safetensors file.
    fn is_base(&self) -> bool {
        false
    }
}

/// Most dimensions of a tensor.
const DIMENSION_LIMIT: usize = 8;

/// Longest name of a tensor, in bytes.
const NAME_LIMIT: usize = 4096;

/// Every container, in the order they are asked.
pub static CONTAINERS: &[&dyn Container] = &[
    &safetensors::Safetensors,
    &torch::TorchZip,
    &torch::LegacyPickle,
    &numpy::Npz,
    &foreign::Zip,
    &numpy::Npy,
    &gguf::Gguf,
];

/// What a container says about its content.
#[derive(Debug, Default)]
pub struct Directory {
    /// Tensors by ascending offset, equal offsets by name.
    pub tensors: Vec<Tensor>,
    /// Metadata in file order.
    pub metadata: Vec<(String, String)>,
}

/// An open file of tensors.
pub struct TensorFile {
    /// The file.
    pub input: Arc<Input>,
    /// The kind of file.
    pub container: &'static dyn Container,
    /// Tensors and metadata.
    pub directory: Directory,
    /// Places in the directory, by name.
    by_name: Vec<usize>,
}

impl TensorFile {
    /// Opens a file by what its first bytes are.
    ///
    /// # Errors
    /// [`Reason::Open`], [`Reason::NotARegularFile`], the container's own, or what the file is instead:
    /// empty, a Git LFS pointer, a web page, a JSON text.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::of(Arc::new(Input::open(path)?))
    }

    /// Opens a file that is open already.
    ///
    /// # Errors
    /// As [`TensorFile::open`].
    pub fn of(input: Arc<Input>) -> Result<Self> {
        let mut head = vec![0; input.len().min(512) as usize];
        input.read_at(&mut head, 0)?;
        if let Some(reason) = foreign::not_a_tensor_file(&head) {
            return Err(Error::new(reason).in_file(input.path()));
        }
        let container = *CONTAINERS
            .iter()
            .find(|container| container.detects(&head, input.len()))
            .ok_or_else(|| Error::new(Reason::UnknownContainer).in_file(input.path()))?;
        let directory = container
            .open(input.clone())
            .map_err(|e| e.in_file(input.path()))?;
        let tensors = &directory.tensors;
        let mut by_name: Vec<usize> = (0..tensors.len()).collect();
        by_name.sort_by_key(|place| name_at(tensors, *place));
        Ok(TensorFile {
            input,
            container,
            directory,
            by_name,
        })
    }

    /// Compares the data with the checksums of the file, where its container has them.
    ///
    /// # Errors
    /// Those of [`Container::verify`].
    pub fn verify(&self) -> Result<()> {
        let checked = self.container.verify(self.input.clone());
        checked.map_err(|e| e.in_file(self.input.path()))
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let tensors = &self.directory.tensors;
        let place = self
            .by_name
            .binary_search_by_key(&Some(name), |place| name_at(tensors, *place));
        tensors.get(*self.by_name.get(place.ok()?)?)
    }
}

fn name_at(tensors: &[Tensor], place: usize) -> Option<&str> {
    tensors.get(place).map(|tensor| tensor.name.as_str())
}
