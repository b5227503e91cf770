//! Where the tensors of a file lie, so that the file can be put together again.

use std::ops::Range;
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::mapped::Input;

/// A file of tensors of a base.
pub(crate) struct Frame {
    /// Its place in the checkpoint.
    pub(crate) place: String,
    /// The file.
    pub(crate) input: Arc<Input>,
    /// Names of tensors that lie in it as they are, with their bytes; in order, none twice.
    pub(crate) regions: Vec<(String, Range<u64>)>,
}

impl Frame {
    /// Those of a checkpoint.
    pub(crate) fn of(base: &Checkpoint) -> Vec<Self> {
        let frame = |(number, shard): (usize, &crate::checkpoint::Shard)| {
            let tensors = &shard.file.directory.tensors;
            let lying = tensors
                .iter()
                .filter(|tensor| tensor.lies_in_file() && tensor.length > 0);
            let mut regions: Vec<(String, Range<u64>)> = lying
                .map(|tensor| {
                    (
                        tensor.name.clone(),
                        tensor.offset..tensor.offset + tensor.length,
                    )
                })
                .collect();
            regions.sort_by_key(|(_, range)| (range.start, range.end));
            let mut end = 0;
            regions.retain(|(_, range)| {
                let is_free = range.start >= end;
                end = end.max(range.end);
                is_free
            });
            Frame {
                place: base.part_of(number).place(&shard.name),
                input: shard.file.input.clone(),
                regions,
            }
        };
        base.shards.iter().enumerate().map(frame).collect()
    }

    /// The file in order: what lies between tensors (no name), and tensors.
    pub(crate) fn stretches(&self) -> Vec<(Option<&str>, Range<u64>)> {
        let mut stretches = Vec::new();
        let mut at = 0;
        for (name, range) in &self.regions {
            stretches.push((None, at..range.start));
            stretches.push((Some(name.as_str()), range.clone()));
            at = range.end;
        }
        stretches.push((None, at..self.input.len()));
        stretches.retain(|(_, range)| !range.is_empty());
        stretches
    }
}
