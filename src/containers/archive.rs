//! Zip archives of tensors that are written, with the same bytes every time.
//!
//! Source: PKWARE APPNOTE 6.3.10, and `caffe2/serialize/inline_container.cc` of PyTorch (`getPadding`): members are
//! stored as they are, checksum and sizes follow their data, and an extra field lets the data start at a multiple
//! of what the reader wants. Every member has the earliest date that zip knows.

pub use crc32fast::Hasher as Checksum;

use super::Entry;
use crate::error::{Error, Reason, Result};

/// Largest archive, and most members: sizes of 64 bits are not written.
const LIMIT: u64 = u32::MAX as u64;
const MEMBER_LIMIT: usize = u16::MAX as usize;

/// Version 2.0; sizes follow the data, names are UTF-8.
const VERSION: u16 = 20;
const FLAGS: u16 = 1 << 3 | 1 << 11;

/// 1980-01-01.
const DATE: u16 = 1 << 5 | 1;

/// The extra field that torch pads with, and the bytes in it.
const PADDING: u16 = 0x4246;
const FILLER: u8 = b'Z';

/// A member: its own bytes, and behind them perhaps the data of a tensor.
struct Member {
    name: String,
    head: Vec<u8>,
    tensor: Option<usize>,
}

/// An archive that is to be written.
pub struct Archive {
    members: Vec<Member>,
    alignment: usize,
}

/// Puts an archive of tensors together.
pub type Assemble = fn(&[Entry<'_>]) -> Result<Archive>;

/// Takes an archive piece by piece.
pub trait Pieces {
    /// Bytes.
    ///
    /// # Errors
    /// What writing them gives.
    fn bytes(&mut self, bytes: &[u8]) -> Result<()>;

    /// The data of a tensor, with which it goes on computing `checksum`; gives their length.
    ///
    /// # Errors
    /// What reading or writing it gives.
    fn tensor(&mut self, index: usize, checksum: Option<&mut Checksum>) -> Result<u64>;
}

impl Archive {
    /// One without members, in which data start at multiples of `alignment`.
    pub(super) fn new(alignment: usize) -> Self {
        Archive {
            members: Vec::new(),
            alignment,
        }
    }

    /// A member of these bytes, with a tensor behind them.
    pub(super) fn add(&mut self, name: String, head: Vec<u8>, tensor: Option<usize>) {
        self.members.push(Member { name, head, tensor });
    }

    /// Gives all of it, from the first byte to the last.
    ///
    /// # Errors
    /// [`Reason::FileTooLarge`], [`Reason::TooMany`], and what `pieces` gives.
    pub fn write(&self, pieces: &mut dyn Pieces) -> Result<()> {
        if self.members.len() > MEMBER_LIMIT {
            let (what, limit) = ("members of an archive", MEMBER_LIMIT);
            return Err(Error::new(Reason::TooMany { what, limit }));
        }
        let mut at = 0u64;
        let mut directory = Vec::new();
        for member in &self.members {
            let start = within(at)?;
            let local = member.local(at, self.alignment)?;
            let mut checksum = Checksum::new();
            checksum.update(&member.head);
            pieces.bytes(&local)?;
            pieces.bytes(&member.head)?;
            let data = match member.tensor {
                Some(index) => pieces.tensor(index, Some(&mut checksum))?,
                None => 0,
            };
            let size = within(member.head.len() as u64 + data)?;
            let checksum = checksum.finalize();
            let mut after = b"PK\x07\x08".to_vec();
            numbers(&mut after, &[checksum, size, size]);
            pieces.bytes(&after)?;
            at += (local.len() + after.len()) as u64 + u64::from(size);
            member.central(&mut directory, checksum, size, start);
        }
        let (start, length) = (within(at)?, within(directory.len() as u64)?);
        let mut end = b"PK\x05\x06".to_vec();
        let count = self.members.len() as u16;
        shorts(&mut end, &[0, 0, count, count]);
        numbers(&mut end, &[length, start]);
        shorts(&mut end, &[0]);
        pieces.bytes(&directory)?;
        pieces.bytes(&end)
    }
}

impl Member {
    /// The header before its data, which is padded so that these start where they should.
    fn local(&self, at: u64, alignment: usize) -> Result<Vec<u8>> {
        const FIXED: usize = 30;
        const EXTRA: usize = 4;
        let start = at as usize + FIXED + self.name.len() + EXTRA;
        let filler = start.next_multiple_of(alignment.max(1)) - start;
        let extra = if alignment > 1 { EXTRA + filler } else { 0 };
        let mut bytes = b"PK\x03\x04".to_vec();
        shorts(&mut bytes, &[VERSION, FLAGS, 0, 0, DATE]);
        numbers(&mut bytes, &[0, 0, 0]); // they follow the data
        shorts(&mut bytes, &[self.name_length()?, extra as u16]);
        bytes.extend_from_slice(self.name.as_bytes());
        if alignment > 1 {
            shorts(&mut bytes, &[PADDING, filler as u16]);
            bytes.resize(bytes.len() + filler, FILLER);
        }
        Ok(bytes)
    }

    /// What the directory at the end says of it.
    fn central(&self, directory: &mut Vec<u8>, checksum: u32, size: u32, start: u32) {
        directory.extend_from_slice(b"PK\x01\x02");
        shorts(directory, &[VERSION, VERSION, FLAGS, 0, 0, DATE]);
        numbers(directory, &[checksum, size, size]);
        shorts(directory, &[self.name.len() as u16, 0, 0, 0, 0]);
        numbers(directory, &[0, start]);
        directory.extend_from_slice(self.name.as_bytes());
    }

    fn name_length(&self) -> Result<u16> {
        u16::try_from(self.name.len()).map_err(|_| {
            let (bytes, limit) = (self.name.len(), usize::from(u16::MAX));
            Error::new(Reason::NameTooLong { bytes, limit })
        })
    }
}

fn within(bytes: u64) -> Result<u32> {
    u32::try_from(bytes).map_err(|_| {
        let limit = LIMIT;
        Error::new(Reason::FileTooLarge { bytes, limit })
    })
}

fn shorts(bytes: &mut Vec<u8>, all: &[u16]) {
    bytes.extend(all.iter().flat_map(|number| number.to_le_bytes()));
}

fn numbers(bytes: &mut Vec<u8>, all: &[u32]) {
    bytes.extend(all.iter().flat_map(|number| number.to_le_bytes()));
}
