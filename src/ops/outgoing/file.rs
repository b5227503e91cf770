//! The file of tensors: what stands around the data, and hashes of data that are stated before them.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use sha2::{Digest, Sha256};

use crate::checkpoint::sink::OutputFile;
use crate::containers::archive::{Archive, Checksum, Pieces};
use crate::containers::{Entry, Header, safetensors};
use crate::error::Result;
use crate::formats::Written;
use crate::ops::merge::Control;
use crate::tensor::{DType, Tensor};

/// What stands around the data.
pub(super) enum Frame {
    /// Bytes before them.
    Header(Header),
    /// A member for each tensor.
    Archive(Archive),
}

impl Frame {
    pub(super) fn of(written: &Written) -> Result<Self> {
        if let Some(header) = &written.header {
            return Ok(Frame::Header(header(&written.tensors)?));
        }
        if let Some(archive) = written.archive {
            let entries: Vec<Entry<'_>> = written.tensors.iter().map(entry).collect();
            return Ok(Frame::Archive(archive(&entries)?));
        }
        Ok(Frame::Header(Header {
            bytes: safetensors::header(&written.metadata, &entries(written))?,
            alignment: 1,
        }))
    }

    /// Bytes of the whole file.
    pub(super) fn length(&self, tensors: &[Tensor]) -> Result<u64> {
        Ok(self.count(tensors)?.bytes)
    }

    fn count<'a>(&self, tensors: &'a [Tensor]) -> Result<Count<'a>> {
        let mut count = Count {
            tensors,
            bytes: 0,
            order: Vec::new(),
        };
        self.put(tensors, &mut count)?;
        Ok(count)
    }

    /// Gives everything, data and what stands around them.
    fn put(&self, tensors: &[Tensor], pieces: &mut dyn Pieces) -> Result<()> {
        let header = match self {
            Frame::Archive(archive) => return archive.write(pieces),
            Frame::Header(header) => header,
        };
        pieces.bytes(&header.bytes)?;
        for (index, tensor) in tensors.iter().enumerate() {
            pieces.tensor(index, None)?;
            let padded = tensor.length.next_multiple_of(header.alignment.max(1));
            pieces.bytes(&vec![0; (padded - tensor.length) as usize])?;
        }
        Ok(())
    }
}

/// Writes the file of tensors. Each is made once, by a thread that is one tensor ahead.
pub(super) fn write(
    written: &mut Written,
    frame: &Frame,
    file: &mut OutputFile,
    control: &Control<'_>,
) -> Result<()> {
    let mut hashes = written.hashes.then(|| Hashes::new(written)).transpose()?;
    let tensors = &*written.tensors;
    let Count { bytes, order, .. } = frame.count(tensors)?;
    thread::scope(|scope| {
        let (sender, made) = sync_channel(1);
        let hashes = &mut hashes;
        scope.spawn(move || make(tensors, &order, hashes.as_mut(), &sender));
        let mut output = Output {
            tensors,
            bytes,
            made,
            file,
            control,
        };
        frame.put(tensors, &mut output)
    })?;
    if let Some(hashes) = hashes {
        hashes.state(&mut written.metadata);
        // Digests have one length, so the header has the one that it had.
        file.overwrite_start(&safetensors::header(&written.metadata, &entries(written))?)?;
    }
    Ok(())
}

/// The bytes of a tensor; nothing for one that lies in a file.
type Made = Result<Option<Vec<u8>>>;

fn make(
    tensors: &[Tensor],
    order: &[usize],
    mut hashes: Option<&mut Hashes>,
    sender: &SyncSender<Made>,
) {
    for index in order {
        let tensor = &tensors[*index];
        let mut made = || {
            let lies_in_file = tensor.lies_in_file();
            if lies_in_file && hashes.is_none() {
                return Ok(None);
            }
            let bytes = tensor.bytes()?;
            if let Some(hashes) = &mut hashes {
                hashes.data(&bytes);
            }
            Ok((!lies_in_file).then(|| bytes.into_owned()))
        };
        // Where nobody listens any more, writing has failed.
        if sender.send(made()).is_err() {
            return;
        }
    }
}

/// Name, type and shape of all tensors.
fn entries(written: &Written) -> Vec<(&str, DType, &[usize])> {
    let tensors = written.tensors.iter();
    tensors
        .map(|tensor| (tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice()))
        .collect()
}

fn entry(tensor: &Tensor) -> Entry<'_> {
    Entry {
        name: &tensor.name,
        dtype: tensor.dtype,
        shape: &tensor.shape,
        blocks: None,
    }
}

/// The hashes of sd-scripts: that of everything behind the header, and eight digits of that of 64 KiB from 1 MiB on,
/// as if its own metadata were the only ones.
///
/// Source: `kohya-ss/sd-scripts`, `library/train_util.py` (`precalculate_safetensors_hashes`).
pub(super) struct Hashes {
    model: Sha256,
    legacy: Sha256,
    /// Bytes of the file that the older hash is of.
    at: usize,
}

/// Where the hashes are stated, and their digits.
const STATED: [(&str, usize); 2] = [("sshs_legacy_hash", 8), ("sshs_model_hash", 64)];

/// The bytes of a file that the older hash is of.
const LEGACY: Range<usize> = 0x10_0000..0x11_0000;

impl Hashes {
    /// Makes room in the metadata.
    pub(super) fn announce(metadata: &mut Vec<(String, String)>) {
        metadata.extend(STATED.map(|(key, digits)| (key.to_owned(), "0".repeat(digits))));
    }

    fn new(written: &Written) -> Result<Self> {
        let own = written.metadata.iter();
        let own: Vec<_> = own
            .filter(|(key, _)| key.starts_with("ss_"))
            .cloned()
            .collect();
        let mut hashes = Hashes {
            model: Sha256::new(),
            legacy: Sha256::new(),
            at: 0,
        };
        hashes.pass(&safetensors::header(&own, &entries(written))?);
        Ok(hashes)
    }

    fn data(&mut self, bytes: &[u8]) {
        self.model.update(bytes);
        self.pass(bytes);
    }

    fn pass(&mut self, bytes: &[u8]) {
        let within = |place: usize| place.saturating_sub(self.at).min(bytes.len());
        self.legacy
            .update(&bytes[within(LEGACY.start)..within(LEGACY.end)]);
        self.at += bytes.len();
    }

    fn state(self, metadata: &mut [(String, String)]) {
        for ((key, digits), hasher) in STATED.into_iter().zip([self.legacy, self.model]) {
            let digest = hasher.finalize();
            let text: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            for (_, value) in metadata.iter_mut().filter(|(known, _)| known == key) {
                value.replace_range(.., &text[..digits]);
            }
        }
    }
}

/// Counts instead of writing.
struct Count<'a> {
    tensors: &'a [Tensor],
    bytes: u64,
    /// The tensors as they are asked for.
    order: Vec<usize>,
}

impl Pieces for Count<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn tensor(&mut self, index: usize, _checksum: Option<&mut Checksum>) -> Result<u64> {
        let length = self.tensors[index].length;
        self.bytes += length;
        self.order.push(index);
        Ok(length)
    }
}

/// Writes to the file of tensors.
struct Output<'a> {
    tensors: &'a [Tensor],
    bytes: u64,
    made: Receiver<Made>,
    file: &'a mut OutputFile,
    control: &'a Control<'a>,
}

impl Pieces for Output<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write(bytes)
    }

    /// Copies what lies in a file; takes what was made.
    fn tensor(&mut self, index: usize, checksum: Option<&mut Checksum>) -> Result<u64> {
        self.control.check()?;
        let tensor = &self.tensors[index];
        // The maker ends early only where it panicked, and the scope passes that on.
        let made = self.made.recv().unwrap_or(Ok(None))?;
        match (made, checksum) {
            (None, None) => self
                .file
                .copy(&tensor.input, tensor.offset, tensor.length)?,
            (made, checksum) => {
                let bytes = made.map_or_else(|| tensor.bytes(), |bytes| Ok(bytes.into()))?;
                if let Some(checksum) = checksum {
                    checksum.update(&bytes);
                }
                self.file.write(&bytes)?;
            }
        }
        let written = self.file.written().min(self.bytes);
        self.control.progress(written, self.bytes);
        Ok(tensor.length)
    }
}
