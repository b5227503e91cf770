//! Which tensors go into which file.

use std::collections::HashSet;
use std::path::Path;

use super::plan::PlannedTensor;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::sink::Shape;
use crate::containers::safetensors;
use crate::error::{Error, Reason, Result};
use crate::tensor::DType;

/// A file of the output: its header is final.
pub(super) struct File {
    pub(super) name: String,
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<PlannedTensor>,
}

impl File {
    pub(super) fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensors.iter().map(PlannedTensor::bytes).sum::<u64>()
    }
}

const SINGLE: &str = "model.safetensors";

pub(super) fn files(
    base: &Checkpoint,
    tensors: Vec<PlannedTensor>,
    shard_size: Option<u64>,
    shape: Shape,
    output: &Path,
) -> Result<Vec<File>> {
    let mut names = HashSet::new();
    if let Some(twice) = tensors
        .iter()
        .find(|tensor| !names.insert(tensor.name.as_str()))
    {
        return Err(Error::new(Reason::NameTaken {
            name: twice.name.clone(),
        }));
    }
    // What the header of a safetensors file cannot name.
    if let Some(foul) = names
        .iter()
        .find(|name| ["", "__metadata__"].contains(name))
    {
        return Err(Error::new(Reason::NameReserved {
            name: (*foul).to_owned(),
        }));
    }
    let groups: Vec<(String, usize, Vec<PlannedTensor>)> = match (shape, shard_size) {
        (Shape::File, Some(_)) => {
            let problem = "shards need an output folder, not a .safetensors file".to_owned();
            return Err(Error::new(Reason::BadOption {
                text: "--shard-size".to_owned(),
                problem,
            }));
        }
        (_, Some(size)) => sized(tensors, size),
        (Shape::File, None) => {
            let name = output
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            vec![(name.unwrap_or_default(), 0, tensors)]
        }
        (Shape::Folder, None) => by_shard(base, tensors),
    };
    let mut files = Vec::new();
    for (name, shard, tensors) in groups {
        let entries: Vec<(&str, DType, &[usize])> = tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice()))
            .collect();
        let header = safetensors::header(&base.shards[shard].file.directory.metadata, &entries)?;
        files.push(File {
            name,
            header,
            tensors,
        });
    }
    Ok(files)
}

/// The base's own shards.
fn by_shard(
    base: &Checkpoint,
    tensors: Vec<PlannedTensor>,
) -> Vec<(String, usize, Vec<PlannedTensor>)> {
    let name = |shard: usize| match base.is_folder {
        true => base.shards[shard].name.clone(),
        false => SINGLE.to_owned(),
    };
    let mut groups: Vec<_> = (0..base.shards.len())
        .map(|shard| (name(shard), shard, Vec::new()))
        .collect();
    for tensor in tensors {
        groups[tensor.shard].2.push(tensor);
    }
    groups.retain(|(_, _, tensors)| !tensors.is_empty());
    groups
}

/// New shards of at most `size` bytes of data, or of one larger tensor.
fn sized(tensors: Vec<PlannedTensor>, size: u64) -> Vec<(String, usize, Vec<PlannedTensor>)> {
    let mut groups: Vec<Vec<PlannedTensor>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        match groups.last_mut() {
            Some(last) if filled + bytes <= size => {
                filled += bytes;
                last.push(tensor);
            }
            _ => {
                filled = bytes;
                groups.push(vec![tensor]);
            }
        }
    }
    let count = groups.len();
    let name = |index: usize| match count {
        1 => SINGLE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    groups
        .into_iter()
        .enumerate()
        .map(|(index, tensors)| (name(index), 0, tensors))
        .collect()
}
