//! What is noted of a tensor while it is evaluated block by block.

use super::source::Source;
use crate::error::Result;
use crate::ops::undo;
use crate::tensor::Tensor;

/// What was written down of a tensor.
pub(crate) struct Record {
    pub(crate) base: blake3::Hash,
    pub(crate) merged: blake3::Hash,
    pub(crate) columns: usize,
    pub(crate) height: usize,
    pub(crate) payload: undo::Section,
    pub(crate) lengths: undo::Section,
}

/// Hashes of both sides of a tensor, and the lengths of what restores its blocks.
pub(super) struct Watch {
    pub(super) base: blake3::Hasher,
    pub(super) merged: blake3::Hasher,
    start: u64,
    lengths: Vec<u8>,
}

impl Watch {
    /// Where somebody wants to know: an undo file, or a source that is restored from one.
    pub(super) fn new(undo: Option<&undo::Writer>, source: &Source<'_>) -> Option<Self> {
        let wanted = undo.is_some() || source.tensor.source.parts().is_some();
        wanted.then(|| Watch {
            base: blake3::Hasher::new(),
            merged: blake3::Hasher::new(),
            start: undo.map_or(0, undo::Writer::at),
            lengths: Vec::new(),
        })
    }

    pub(super) fn payload(&mut self, payload: &[u8], undo: &mut undo::Writer) -> Result<()> {
        undo::varint(&mut self.lengths, payload.len() as u64);
        undo.append(payload)
    }

    pub(super) fn finish(
        self,
        source: &Tensor,
        undo: Option<&mut undo::Writer>,
        columns: usize,
        height: usize,
    ) -> Result<Option<Record>> {
        let base = self.base.finalize();
        if let Some(parts) = source.parts() {
            parts.verify(base.as_bytes())?;
        }
        let Some(undo) = undo else {
            return Ok(None);
        };
        let payload = undo.since(self.start);
        Ok(Some(Record {
            base,
            merged: self.merged.finalize(),
            columns,
            height,
            payload,
            lengths: undo.deflated(&self.lengths)?,
        }))
    }
}
