//! How named tensors lie in bytes. A container has never heard of adapters.
//!
//! [`CONTAINERS`] is the only list: the bytes of a file, never its name, decide which one opens it.

// Every number in a file may lie: what it selects is asked for, never taken for granted.
#![deny(clippy::indexing_slicing, clippy::string_slice)]

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::{Blocks, DType, Tensor};

pub mod archive;
mod foreign;
pub mod gguf;
pub mod numpy;
pub mod safetensors;
mod strided;
pub mod torch;
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

    /// Compares the data with the checksums that the file states, if it states any; reads all of it,
    /// and asks `watch` between pieces whether to go on.
    ///
    /// # Errors
    /// [`Reason::Checksum`], with the place; what `watch` says.
    fn verify(&self, input: Arc<Input>, watch: &dyn Fn() -> Result<()>) -> Result<()> {
        let _ = (input, watch);
        Ok(())
    }

    /// What a merge into a checkpoint in this container is written as; nothing where it is no base.
    fn result(&self) -> Option<&'static dyn Writer> {
        None
    }
}

/// A container that results are written in.
pub trait Writer: Container {
    /// How the names of its files end.
    fn extension(&self) -> &'static str;

    /// What stands before the data in a file of these tensors, in the order of their data, that takes
    /// the place of `base`.
    ///
    /// # Errors
    /// What the container cannot hold.
    fn header(&self, base: &TensorFile, tensors: &[Entry<'_>]) -> Result<Header>;

    /// Why a result has to have the tensors of its base with their types and shapes in one file, if so.
    fn fixed_because(&self) -> Option<&'static str> {
        None
    }
}

/// What stands before the data of a file.
pub struct Header {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Behind each tensor zeros follow up to a multiple of this.
    pub alignment: u64,
}

/// A tensor of a file that is to be written.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type.
    pub dtype: DType,
    /// Its shape, outermost first.
    pub shape: &'a [usize],
    /// What it is, where it is quantised by blocks.
    pub blocks: Option<&'a Blocks>,
}

/// Most dimensions of a tensor.
const DIMENSION_LIMIT: usize = 8;

/// Longest name of a tensor, in bytes.
const NAME_LIMIT: usize = 4096;

/// Most bytes of all names and metadata of a file together; those of dictionaries and lists count.
const TEXT_LIMIT: usize = 32 << 20;

/// Counts names and metadata.
///
/// # Errors
/// [`Reason::TooMany`].
fn count_text(sum: &mut usize, bytes: usize) -> Result<(), Reason> {
    *sum = sum.saturating_add(bytes);
    match *sum <= TEXT_LIMIT {
        true => Ok(()),
        false => Err(Reason::TooMany {
            what: "bytes of names and metadata",
            limit: TEXT_LIMIT,
        }),
    }
}

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
        Ok(TensorFile {
            input,
            container,
            by_name: by_name(&directory.tensors),
            directory,
        })
    }

    /// Compares the data with the checksums of the file, where its container has them.
    ///
    /// # Errors
    /// Those of [`Container::verify`].
    pub fn verify(&self) -> Result<()> {
        self.verify_while(&|| Ok(()))
    }

    /// The same, as long as `watch` lets it go on.
    ///
    /// # Errors
    /// Those of [`Container::verify`].
    pub fn verify_while(&self, watch: &dyn Fn() -> Result<()>) -> Result<()> {
        let checked = self.container.verify(self.input.clone(), watch);
        checked.map_err(|e| e.in_file(self.input.path()))
    }

    /// Changes what it is taken to hold.
    pub(crate) fn arrange(&mut self, change: impl FnOnce(&mut Directory)) {
        change(&mut self.directory);
        self.by_name = by_name(&self.directory.tensors);
    }

    /// Refuses tensors that are quantised by blocks, which have no values here.
    ///
    /// # Errors
    /// [`Reason::QuantisedTensors`], all of them listed.
    pub fn refuse_blocks(&self) -> Result<()> {
        let quantised = self.directory.tensors.iter().filter_map(|tensor| {
            let blocks = tensor.blocks.as_ref()?;
            Some(format!(
                "{}: {} {:?}",
                tensor.name, blocks.name, blocks.shape
            ))
        });
        let cases: Vec<String> = quantised.collect();
        if cases.is_empty() {
            return Ok(());
        }
        let count = cases.len();
        let error = Error::new(Reason::QuantisedTensors { count });
        Err(error.in_file(self.input.path()).with_cases(cases))
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

fn by_name(tensors: &[Tensor]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..tensors.len()).collect();
    places.sort_by_key(|place| name_at(tensors, *place));
    places
}

fn name_at(tensors: &[Tensor], place: usize) -> Option<&str> {
    tensors.get(place).map(|tensor| tensor.name.as_str())
}
