//! The undo file: sections one behind the other, then the directory of them, then where that lies and a hash of
//! everything.
//!
//! `magic (15) version (1) | sections | directory | offset u64, stored u64, length u64 | BLAKE3 of all before (32)`,
//! numbers with the lowest byte first.

use std::path::Path;
use std::sync::Arc;

use miniz_oxide::deflate::compress_to_vec;
use miniz_oxide::inflate::decompress_to_vec_with_limit;

use super::directory::{Directory, Section};
use crate::checkpoint::sink::{OutputFile, Sink};
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

/// How the file begins.
const MAGIC: &[u8; 15] = b"loratool undo\r\n";

/// The version of what follows.
const VERSION: u8 = 1;

/// Bytes before the first section.
const START: u64 = 16;

/// Bytes behind the directory.
const FOOTER: u64 = 24 + 32;

/// Most bytes of a directory, and of a section that is deflated.
const LIMIT: u64 = 256 << 20;

/// Bytes that are read at once.
const PIECE: usize = 8 << 20;

/// An undo file that is being written.
pub(crate) struct Writer {
    file: OutputFile,
    hasher: blake3::Hasher,
}

impl Writer {
    /// Begins one.
    ///
    /// # Errors
    /// Those of [`Sink::create`] and of writing.
    pub(crate) fn new(sink: &Sink, name: &str) -> Result<Self> {
        let mut writer = Writer {
            file: sink.create(name)?,
            hasher: blake3::Hasher::new(),
        };
        writer.append(MAGIC)?;
        writer.append(&[VERSION])?;
        Ok(writer)
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.file.write(bytes)
    }

    /// Where the next byte goes.
    pub(crate) fn at(&self) -> u64 {
        self.file.written()
    }

    /// The section of everything since a place.
    pub(crate) fn since(&self, offset: u64) -> Section {
        let stored = self.at() - offset;
        Section {
            offset,
            stored,
            length: stored,
        }
    }

    /// Appends bytes deflated, where that makes them fewer.
    ///
    /// # Errors
    /// Those of writing.
    pub(crate) fn deflated(&mut self, bytes: &[u8]) -> Result<Section> {
        let offset = self.at();
        let small = compress_to_vec(bytes, 6);
        match small.len() < bytes.len() {
            true => self.append(&small)?,
            false => self.append(bytes)?,
        }
        Ok(Section {
            length: bytes.len() as u64,
            ..self.since(offset)
        })
    }

    /// Appends the directory and makes the file durable.
    ///
    /// # Errors
    /// Those of writing; [`Reason::OutputHeaderTooLarge`].
    pub(crate) fn finish(mut self, directory: &Directory) -> Result<u64> {
        let text = serde_json::to_vec(directory).expect("the directory is plain data");
        if text.len() as u64 > LIMIT {
            let bytes = text.len() as u64;
            return Err(Error::new(Reason::OutputHeaderTooLarge { bytes }));
        }
        let section = self.deflated(&text)?;
        for number in [section.offset, section.stored, section.length] {
            self.append(&number.to_le_bytes())?;
        }
        let hash = self.hasher.finalize();
        self.file.write(hash.as_bytes())?;
        let bytes = self.file.written();
        self.file.finish()?;
        Ok(bytes)
    }
}

/// An undo file that is open: its hash is right, and so is everything that its directory says of it.
pub(crate) struct Undo {
    pub(crate) input: Arc<Input>,
    pub(crate) directory: Directory,
}

impl Undo {
    /// Opens and checks one.
    ///
    /// # Errors
    /// [`Reason::NotUndo`], [`Reason::UndoVersion`], [`Reason::UndoHash`], [`Reason::Structure`], and what reading
    /// gives.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let input = Arc::new(Input::open(path)?);
        Self::read(&input)
            .map(|directory| Undo {
                input: input.clone(),
                directory,
            })
            .map_err(|e| e.in_file(path))
    }

    fn read(input: &Input) -> Result<Directory> {
        let cut = || Error::new(Reason::UndoHash);
        let mut magic = [0; START as usize];
        if input.len() < START {
            return Err(Error::new(Reason::NotUndo));
        }
        input.read_at(&mut magic, 0)?;
        match magic.split_last() {
            Some((&version, start)) if start == MAGIC => {
                if version != VERSION {
                    return Err(Error::new(Reason::UndoVersion { version }));
                }
            }
            _ => return Err(Error::new(Reason::NotUndo)),
        }
        if input.len() < START + FOOTER {
            return Err(cut());
        }
        let hash = hash_of(input, 0, input.len() - 32)?;
        let mut footer = [0; FOOTER as usize];
        input.read_at(&mut footer, input.len() - FOOTER)?;
        if hash.as_bytes() != &footer[24..] {
            return Err(cut());
        }
        let number =
            |at: usize| u64::from_le_bytes(footer[at..at + 8].try_into().expect("eight bytes"));
        let section = Section {
            offset: number(0),
            stored: number(8),
            length: number(16),
        };
        let end = section.offset.checked_add(section.stored);
        if section.offset < START || end != Some(input.len() - FOOTER) {
            return Err(cut());
        }
        let text = inflated(input, section)?;
        let directory: Directory = serde_json::from_slice(&text).map_err(|e| {
            let problem = format!("its directory: {e}");
            Error::new(Reason::Structure { problem })
        })?;
        directory.check(START, section.offset)?;
        // What restores a model is smaller than the model, but for what is said of each tensor.
        let model: u64 = directory
            .files
            .iter()
            .map(|file| file.bytes)
            .fold(0, u64::saturating_add);
        let most = model.saturating_mul(2).saturating_add(16 << 20);
        if input.len() > most {
            let problem = "it is larger than the model that it restores".to_owned();
            return Err(Error::new(Reason::Structure { problem }));
        }
        Ok(directory)
    }

    /// The bytes of a section that is kept in memory.
    ///
    /// # Errors
    /// What reading gives; [`Reason::Structure`].
    pub(crate) fn section(&self, section: Section) -> Result<Vec<u8>> {
        inflated(&self.input, section).map_err(|e| e.in_file(self.input.path()))
    }
}

fn inflated(input: &Input, section: Section) -> Result<Vec<u8>> {
    if section.length > LIMIT || section.stored > LIMIT {
        let (bytes, limit) = (section.length.max(section.stored), LIMIT);
        return Err(Error::new(Reason::FileTooLarge { bytes, limit }));
    }
    let mut stored = vec![0; section.stored as usize];
    input.read_at(&mut stored, section.offset)?;
    if section.stored == section.length {
        return Ok(stored);
    }
    let bytes = decompress_to_vec_with_limit(&stored, section.length as usize);
    match bytes {
        Ok(bytes) if bytes.len() as u64 == section.length => Ok(bytes),
        _ => {
            let problem = "a section is not what it was deflated from".to_owned();
            Err(Error::new(Reason::Structure { problem }))
        }
    }
}

/// BLAKE3 of a range of a file, by all threads.
///
/// # Errors
/// What reading gives.
pub(crate) fn hash_of(input: &Input, offset: u64, length: u64) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < length {
        let count = (length - done).min(PIECE as u64) as usize;
        buffer.resize(count, 0);
        input.read_at(&mut buffer, offset + done)?;
        hasher.update_rayon(&buffer);
        done += count as u64;
    }
    Ok(hasher.finalize())
}

/// BLAKE3 of whole files.
///
/// # Errors
/// What reading gives.
pub(crate) fn hashes<'a>(inputs: impl Iterator<Item = &'a Arc<Input>>) -> Result<Vec<String>> {
    let hash = |input: &Arc<Input>| Ok(hash_of(input, 0, input.len())?.to_string());
    inputs.map(hash).collect()
}
