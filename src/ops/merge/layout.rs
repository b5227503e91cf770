//! Which tensors go into which file.

use std::collections::HashSet;
use std::path::Path;

use super::plan::PlannedTensor;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::sink::Shape;
use crate::containers::{Entry, Header};
use crate::error::{Error, Reason, Result};

/// A file of the output: its header is final.
pub(super) struct File {
    pub(super) name: String,
    /// The part of the base whose tensors it holds.
    pub(super) part: usize,
    pub(super) header: Header,
    pub(super) tensors: Vec<PlannedTensor>,
}

impl File {
    pub(super) fn bytes(&self) -> u64 {
        let data = |tensor: &PlannedTensor| tensor.bytes() + self.padding(tensor);
        self.header.bytes.len() as u64 + self.tensors.iter().map(data).sum::<u64>()
    }

    /// Zeros behind a tensor.
    pub(super) fn padding(&self, tensor: &PlannedTensor) -> u64 {
        tensor.bytes().next_multiple_of(self.header.alignment) - tensor.bytes()
    }
}

/// Tensors of one file: its name, and the shard whose metadata it takes over.
type Group = (String, usize, Vec<PlannedTensor>);

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
    let groups: Vec<Group> = match (shape, shard_size) {
        (Shape::File, Some(_)) => {
            let problem = "shards need an output folder, not a file".to_owned();
            return Err(Error::new(Reason::BadOption {
                text: "--shard-size".to_owned(),
                problem,
            }));
        }
        (_, Some(size)) => sized(base, tensors, size),
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
        let part = base.part_of(shard);
        let entries: Vec<Entry<'_>> = tensors.iter().map(|tensor| tensor.entry(part)).collect();
        // What the header of a safetensors file cannot name.
        let mut names = entries.iter().map(|entry| entry.name);
        if let Some(foul) = names.find(|name| ["", "__metadata__"].contains(name)) {
            let name = foul.to_owned();
            return Err(Error::new(Reason::NameReserved { name }));
        }
        let header = base.writer().header(&base.shards[shard].file, &entries)?;
        files.push(File {
            name,
            part: base.shards[shard].part,
            header,
            tensors,
        });
    }
    Ok(files)
}

/// The base's own shards.
fn by_shard(base: &Checkpoint, tensors: Vec<PlannedTensor>) -> Vec<Group> {
    let mut groups: Vec<_> = (0..base.shards.len())
        .map(|shard| (base.result_place(shard), shard, Vec::new()))
        .collect();
    for tensor in tensors {
        groups[tensor.shard].2.push(tensor);
    }
    groups.retain(|(_, _, tensors)| !tensors.is_empty());
    groups
}

/// New shards of at most `size` bytes of data, or of one larger tensor.
fn sized(base: &Checkpoint, tensors: Vec<PlannedTensor>, size: u64) -> Vec<Group> {
    let mut by_part: Vec<Vec<PlannedTensor>> = vec![Vec::new(); base.parts.len()];
    for tensor in tensors {
        by_part[base.shards[tensor.shard].part].push(tensor);
    }
    let mut files = Vec::new();
    for (number, (part, tensors)) in base.parts.iter().zip(by_part).enumerate() {
        let first = base.shards.iter().position(|shard| shard.part == number);
        let groups = cut(tensors, size);
        let (count, extension) = (groups.len(), base.writer().extension());
        for (index, tensors) in groups.into_iter().enumerate() {
            let name = match count {
                1 => part.single_place(extension),
                _ => part.shard_place(index + 1, count, extension),
            };
            files.push((name, first.unwrap_or(0), tensors));
        }
    }
    files
}

fn cut(tensors: Vec<PlannedTensor>, size: u64) -> Vec<Vec<PlannedTensor>> {
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
    groups
}
