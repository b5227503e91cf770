//! GGUF, the format of llama.cpp, versions 2 and 3, little-endian.
//!
//! Source: `ggml-org/ggml`, `docs/gguf.md` and `src/gguf.cpp`: magic, version, counts, metadata, tensor infos,
//! padding up to the alignment, data. Dimensions are written innermost first; tensors here have them
//! outermost first. Tensors that are quantised by blocks have no type here, so a file with one is refused
//! with all of them listed.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Container, Directory, NAME_LIMIT};
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::{DType, Tensor, elements};

const MAGIC: &[u8] = b"GGUF";

/// Largest header: metadata with its vocabulary, and tensor infos.
const HEADER_LIMIT: u64 = 100_000_000;

/// Most tensors of a file.
const TENSOR_LIMIT: usize = 200_000;

/// Most dimensions of a tensor (`ggml.h`, `GGML_MAX_DIMS`).
const DIMENSION_LIMIT: usize = 4;

/// Most keys of the metadata.
const KEY_LIMIT: usize = 65_536;

/// Most elements of arrays whose elements have no fixed size.
const ELEMENT_LIMIT: usize = 10_000_000;

/// Most arrays in one another; ggml itself writes none in another.
const DEPTH_LIMIT: usize = 4;

/// Bytes that are read at a time.
const PIECE: u64 = 64 << 10;

/// Alignment of tensors where the metadata names none.
const ALIGNMENT: u64 = 32;

/// The container.
pub(super) struct Gguf;

impl Container for Gguf {
    fn name(&self) -> &'static str {
        "GGUF"
    }

    fn detects(&self, head: &[u8], _length: u64) -> bool {
        head.starts_with(MAGIC)
    }

    fn open(&self, input: Arc<Input>) -> Result<Directory> {
        let mut reader = Reader::new(&input);
        reader.skip(MAGIC.len() as u64)?;
        let version = reader.u32()?;
        if version == 2u32.swap_bytes() || version == 3u32.swap_bytes() {
            return Err(stored("big-endian GGUF files are not supported"));
        }
        if !(2..=3).contains(&version) {
            return Err(stored(format!("version {version} of GGUF is not known")));
        }
        let (tensors, keys) = (reader.u64()?, reader.u64()?);
        // An info has a name's length, the number of dimensions, a type and an offset.
        let tensors = reader.count(tensors, 24, "tensors", TENSOR_LIMIT)?;
        let keys = reader.count(keys, 13, "metadata keys", KEY_LIMIT)?;
        let (metadata, alignment) = read_metadata(&mut reader, keys)?;
        let infos = read_infos(&mut reader, tensors)?;
        let start = reader.at.next_multiple_of(alignment);
        Ok(Directory {
            tensors: place(infos, &input, start, alignment)?,
            metadata,
        })
    }
}

fn stored(problem: impl Into<String>) -> Error {
    let problem = problem.into();
    Error::new(Reason::Stored { problem })
}

fn structure(problem: impl Into<String>) -> Error {
    let problem = problem.into();
    Error::new(Reason::Structure { problem })
}

/// Reads a header from front to back without ever passing the end of the file.
struct Reader<'a> {
    input: &'a Input,
    at: u64,
    buffer: Vec<u8>,
    /// Where the buffer starts in the file.
    start: u64,
    elements_left: usize,
}

impl<'a> Reader<'a> {
    fn new(input: &'a Input) -> Self {
        Reader {
            input,
            at: 0,
            buffer: Vec::new(),
            start: 0,
            elements_left: ELEMENT_LIMIT,
        }
    }

    fn left(&self) -> u64 {
        self.input.len() - self.at
    }

    fn skip(&mut self, length: u64) -> Result<()> {
        if length > self.left() {
            let length = self.input.len();
            return Err(Error::new(Reason::HeaderCut { length }));
        }
        if self.at + length > HEADER_LIMIT {
            return Err(Error::new(Reason::HeaderTooLarge {
                bytes: self.at + length,
                limit: HEADER_LIMIT,
            }));
        }
        self.at += length;
        Ok(())
    }

    fn bytes(&mut self, length: u64) -> Result<&[u8]> {
        let at = self.at;
        self.skip(length)?;
        if at < self.start || self.at > self.start + self.buffer.len() as u64 {
            let piece = length.max(PIECE).min(self.input.len() - at);
            self.buffer.resize(piece as usize, 0);
            self.input.read_at(&mut self.buffer, at)?;
            self.start = at;
        }
        let taken = self.buffer.get((at - self.start) as usize..);
        let taken = taken.and_then(|rest| rest.get(..length as usize));
        taken.ok_or_else(|| {
            let length = self.input.len();
            Error::new(Reason::HeaderCut { length })
        })
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into().expect("four")))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(
            self.bytes(8)?.try_into().expect("eight"),
        ))
    }

    /// A count of things of at least `size` bytes each, compared with what is left of the file.
    fn count(&self, count: u64, size: u64, what: &'static str, limit: usize) -> Result<usize> {
        if count > self.left() / size {
            return Err(structure(format!(
                "it claims {count} {what}, more than the file has room for"
            )));
        }
        if count > limit as u64 {
            return Err(Error::new(Reason::TooMany { what, limit }));
        }
        Ok(count as usize)
    }

    fn text(&mut self) -> Result<String> {
        let length = self.u64()?;
        self.text_of(length)
    }

    fn text_of(&mut self, length: u64) -> Result<String> {
        let at = self.at;
        let bytes = if length <= PIECE {
            self.bytes(length)?.to_vec()
        } else {
            // Past the buffer: a long text is in memory once.
            self.skip(length)?;
            let mut bytes = vec![0; length as usize];
            self.input.read_at(&mut bytes, at)?;
            bytes
        };
        String::from_utf8(bytes).map_err(|e| {
            Error::new(Reason::NotUtf8 {
                at: at as usize + e.utf8_error().valid_up_to(),
            })
        })
    }

    fn name(&mut self) -> Result<String> {
        match self.u64()? {
            0 => Err(Error::new(Reason::EmptyName)),
            length if length <= NAME_LIMIT as u64 => {
                let name = self.text_of(length)?;
                match name.contains('\0') {
                    // ggml ends a name there.
                    true => Err(structure("a name holds a zero byte")),
                    false => Ok(name),
                }
            }
            length => {
                self.skip(length)?;
                Err(Error::new(Reason::NameTooLong {
                    bytes: length as usize,
                    limit: NAME_LIMIT,
                }))
            }
        }
    }

    /// A value of the metadata as text; of a list its length.
    fn value(&mut self, kind: u32) -> Result<String> {
        macro_rules! number {
            ($type:ty) => {{
                let bytes = self.bytes(size_of::<$type>() as u64)?;
                <$type>::from_le_bytes(bytes.try_into().expect("as many bytes")).to_string()
            }};
        }
        Ok(match kind {
            0 => number!(u8),
            1 => number!(i8),
            2 => number!(u16),
            3 => number!(i16),
            4 => number!(u32),
            5 => number!(i32),
            6 => number!(f32),
            7 => match self.bytes(1)? {
                [0] => "false".to_owned(),
                [1] => "true".to_owned(),
                _ => return Err(structure("a truth value is neither 0 nor 1")),
            },
            8 => self.text()?,
            9 => {
                let count = self.list(1)?;
                format!("[{count} values]")
            }
            10 => number!(u64),
            11 => number!(i64),
            12 => number!(f64),
            _ => return Err(structure(format!("a value has the unknown type {kind}"))),
        })
    }

    /// Passes over a list and gives its length.
    fn list(&mut self, depth: usize) -> Result<u64> {
        if depth > DEPTH_LIMIT {
            return Err(Error::new(Reason::TooDeep { limit: DEPTH_LIMIT }));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => 8,
            9 => 12,
            _ => return Err(structure(format!("a list has the unknown type {kind}"))),
        };
        let elements = self.count(count, size, "values of a list", usize::MAX)?;
        if kind != 8 && kind != 9 {
            self.skip(count * size)?;
            return Ok(count);
        }
        let Some(left) = self.elements_left.checked_sub(elements) else {
            return Err(Error::new(Reason::TooMany {
                what: "values of lists",
                limit: ELEMENT_LIMIT,
            }));
        };
        self.elements_left = left;
        for _ in 0..elements {
            if kind == 9 {
                self.list(depth + 1)?;
            } else {
                let length = self.u64()?;
                self.skip(length)?;
            }
        }
        Ok(count)
    }
}

type Metadata = Vec<(String, String)>;

fn read_metadata(reader: &mut Reader, count: usize) -> Result<(Metadata, u64)> {
    let (mut metadata, mut alignment) = (Vec::with_capacity(count), ALIGNMENT);
    let mut seen = HashSet::new();
    for _ in 0..count {
        let key = reader.name()?;
        let kind = reader.u32()?;
        let value = reader.value(kind).map_err(|error| error.on(&*key))?;
        if !seen.insert(key.clone()) {
            return Err(Error::new(Reason::DuplicateKey { key }));
        }
        if key == "general.alignment" {
            // Of type u32, and what ggml accepts; the upper bound keeps the padding a padding.
            alignment = value
                .parse()
                .ok()
                .filter(|size: &u64| kind == 4 && size.is_power_of_two() && *size <= 1 << 20)
                .ok_or_else(|| structure(format!("{value} is no alignment")).on(&*key))?;
        }
        metadata.push((key, value));
    }
    Ok((metadata, alignment))
}

/// What a header says about a tensor.
struct Info {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    offset: u64,
}

fn read_infos(reader: &mut Reader, count: usize) -> Result<Vec<Info>> {
    let mut infos = Vec::with_capacity(count);
    let (mut quantised, mut seen) = (Vec::new(), HashSet::new());
    for _ in 0..count {
        let name = reader.name()?;
        let dimensions = reader.u32()? as usize;
        if dimensions > DIMENSION_LIMIT {
            let reason = Reason::TooMany {
                what: "dimensions",
                limit: DIMENSION_LIMIT,
            };
            return Err(Error::new(reason).on(name));
        }
        let mut shape = Vec::with_capacity(dimensions);
        for _ in 0..dimensions {
            let size = reader.u64()?;
            shape.push(usize::try_from(size).unwrap_or(usize::MAX));
        }
        shape.reverse();
        let (kind, offset) = (reader.u32()?, reader.u64()?);
        if !seen.insert(name.clone()) {
            return Err(Error::new(Reason::DuplicateKey { key: name }));
        }
        match (plain(kind), block_name(kind)) {
            (Some(dtype), _) => infos.push(Info {
                name,
                dtype,
                shape,
                offset,
            }),
            (None, Some(block)) => quantised.push(format!("{name}: {block} {shape:?}")),
            (None, None) => {
                let problem = format!("the tensor has the unknown type {kind}");
                return Err(structure(problem).on(name));
            }
        }
    }
    if quantised.is_empty() {
        return Ok(infos);
    }
    let count = quantised.len();
    Err(Error::new(Reason::QuantisedTensors { count }).with_cases(quantised))
}

/// The types that have one element to a few bytes (`ggml.h`, `enum ggml_type`).
fn plain(kind: u32) -> Option<DType> {
    Some(match kind {
        0 => DType::F32,
        1 => DType::F16,
        24 => DType::I8,
        25 => DType::I16,
        26 => DType::I32,
        27 => DType::I64,
        28 => DType::F64,
        30 => DType::BF16,
        _ => return None,
    })
}

/// The types that have a scale to a block of elements.
fn block_name(kind: u32) -> Option<&'static str> {
    Some(match kind {
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return None,
    })
}

/// Lays the tensors out: each starts at the next multiple of the alignment behind the one before, so that
/// nothing overlaps and nothing but padding is left over.
fn place(
    mut infos: Vec<Info>,
    input: &Arc<Input>,
    start: u64,
    alignment: u64,
) -> Result<Vec<Tensor>> {
    infos.sort_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
    let data = input.len().saturating_sub(start);
    let mut tensors: Vec<Tensor> = Vec::with_capacity(infos.len());
    let mut end = 0u64;
    for info in infos {
        let fail = |reason| Err(Error::new(reason).on(&*info.name));
        let bits = elements(&info.shape).and_then(|n| n.checked_mul(info.dtype.bitsize()));
        let Some(length) = bits.map(|bits| bits as u64 / 8) else {
            return fail(Reason::ShapeOverflow { shape: info.shape });
        };
        let padded = end.next_multiple_of(alignment);
        if info.offset < end {
            let other = tensors.last().map(|last| last.name.clone());
            let other = other.unwrap_or_default();
            return fail(Reason::Overlap { other });
        }
        if info.offset != padded {
            return fail(Reason::Hole {
                start: end,
                end: info.offset,
            });
        }
        end = match info.offset.checked_add(length) {
            Some(end) if end <= data => end,
            _ => {
                return fail(Reason::OffsetsBeyondFile {
                    end: info.offset.saturating_add(length),
                    length: data,
                });
            }
        };
        tensors.push(Tensor {
            name: info.name,
            dtype: info.dtype,
            shape: info.shape,
            input: input.clone(),
            offset: start + info.offset,
            length,
            memory: None,
            made: None,
        });
    }
    // Most writers pad the last tensor as well.
    if data > end.next_multiple_of(alignment) {
        return Err(Error::new(Reason::TrailingBytes { count: data - end }));
    }
    Ok(tensors)
}
