//! GGUF, the format of llama.cpp, versions 2 and 3, little-endian.
//!
//! Source: `ggml-org/ggml`, `docs/gguf.md` and `src/gguf.cpp`: magic, version, counts, metadata, tensor infos,
//! padding up to the alignment, data. Dimensions are written innermost first; tensors here have them
//! outermost first. Tensors that are quantised by blocks are given as bytes, with what they are beside
//! them ([`Blocks`]).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{Container, Directory, Entry, Header, NAME_LIMIT, TensorFile, Writer, count_text};
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::{Blocks, DType, Tensor, elements};

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

/// The key that names another one.
const ALIGNMENT_KEY: &str = "general.alignment";

/// The container.
pub struct Gguf;

impl Container for Gguf {
    fn name(&self) -> &'static str {
        "GGUF"
    }

    fn detects(&self, head: &[u8], _length: u64) -> bool {
        head.starts_with(MAGIC)
    }

    fn open(&self, input: Arc<Input>) -> Result<Directory> {
        let read = Read::of(&input)?;
        Ok(Directory {
            tensors: place(read.infos, &input, read.data, read.alignment)?,
            metadata: read.metadata,
        })
    }

    fn result(&self) -> Option<&'static dyn Writer> {
        Some(&Gguf)
    }
}

impl Writer for Gguf {
    fn extension(&self) -> &'static str {
        "gguf"
    }

    /// Metadata byte for byte, and tensors in the order in which the base describes them.
    fn header(&self, base: &TensorFile, tensors: &[Entry<'_>]) -> Result<Header> {
        let fail = |error: Error| error.in_file(base.input.path());
        let read = Read::of(&base.input).map_err(fail)?;
        let is_part = |(key, value): &(String, String)| key == "split.count" && value != "1";
        if read.metadata.iter().any(is_part) {
            let problem =
                "it is one of several files of a model; `llama-gguf-split --merge` joins them";
            return Err(fail(stored(problem)));
        }
        let mut bytes = vec![0; (read.keys.1 - read.keys.0) as usize];
        base.input.read_at(&mut bytes, read.keys.0)?;
        let order: HashMap<&str, usize> = read
            .infos
            .iter()
            .enumerate()
            .map(|(place, info)| (info.name.as_str(), place))
            .collect();
        let place = |entry: &Entry<'_>| order.get(entry.name).copied().unwrap_or(usize::MAX);
        assemble(read.metadata.len(), &bytes, read.alignment, tensors, &place)
    }

    fn fixed_because(&self) -> Option<&'static str> {
        Some(
            "the metadata of a GGUF file describe its tensors, which keep their types and shapes, in one file",
        )
    }
}

/// A value of the metadata of a file that is written.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `uint32`
    U32(u32),
    /// `int32`
    I32(i32),
    /// `float32`
    F32(f32),
    /// `bool`
    Bool(bool),
    /// `string`
    Text(String),
    /// `uint64`
    U64(u64),
    /// `array` of `uint32`
    U32s(Vec<u32>),
    /// `array` of `int32`
    I32s(Vec<i32>),
    /// `array` of `float32`
    F32s(Vec<f32>),
    /// `array` of `string`
    Texts(Vec<String>),
}

impl Value {
    fn write(&self, bytes: &mut Vec<u8>) {
        fn list<T>(bytes: &mut Vec<u8>, code: u32, items: &[T], write: impl Fn(&mut Vec<u8>, &T)) {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(code.to_le_bytes());
            bytes.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| write(bytes, item));
        }
        fn one(bytes: &mut Vec<u8>, code: u32, value: &[u8]) {
            bytes.extend(code.to_le_bytes());
            bytes.extend(value);
        }
        match self {
            Value::U32(value) => one(bytes, 4, &value.to_le_bytes()),
            Value::I32(value) => one(bytes, 5, &value.to_le_bytes()),
            Value::F32(value) => one(bytes, 6, &value.to_le_bytes()),
            Value::Bool(value) => one(bytes, 7, &[u8::from(*value)]),
            Value::Text(value) => {
                one(bytes, 8, &[]);
                write_text(bytes, value);
            }
            Value::U64(value) => one(bytes, 10, &value.to_le_bytes()),
            Value::U32s(items) => list(bytes, 4, items, |b, item| b.extend(item.to_le_bytes())),
            Value::I32s(items) => list(bytes, 5, items, |b, item| b.extend(item.to_le_bytes())),
            Value::F32s(items) => list(bytes, 6, items, |b, item| b.extend(item.to_le_bytes())),
            Value::Texts(items) => list(bytes, 8, items, |b, item| write_text(b, item)),
        }
    }
}

fn write_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// Longest name of a tensor that ggml reads (`GGML_MAX_NAME` less the zero at its end).
const WRITTEN_NAME: usize = 63;

/// Most dimensions that ggml reads (`GGML_MAX_DIMS`).
const WRITTEN_DIMENSIONS: usize = 4;

/// The header of a GGUF file of version 3, padded to where its data begin. `tensors` are in the order of
/// their data.
///
/// # Errors
/// [`Reason::NameTooLong`], [`Reason::TooMany`], [`Reason::Stored`] for what ggml does not read;
/// [`Reason::OutputHeaderTooLarge`].
pub fn header(metadata: &[(String, Value)], tensors: &[Entry<'_>]) -> Result<Header> {
    for entry in tensors {
        let fail = |reason| Err(Error::new(reason).on(entry.name));
        if entry.name.len() > WRITTEN_NAME {
            return fail(Reason::NameTooLong {
                bytes: entry.name.len(),
                limit: WRITTEN_NAME,
            });
        }
        if entry.shape.len() > WRITTEN_DIMENSIONS {
            return fail(Reason::TooMany {
                what: "dimensions",
                limit: WRITTEN_DIMENSIONS,
            });
        }
    }
    let mut bytes = Vec::new();
    let mut alignment = ALIGNMENT;
    for (key, value) in metadata {
        if key == ALIGNMENT_KEY {
            alignment = match value {
                Value::U32(size) if is_alignment((*size).into()) => (*size).into(),
                _ => return Err(structure(format!("{value:?} is no alignment")).on(&**key)),
            };
        }
        write_text(&mut bytes, key);
        value.write(&mut bytes);
    }
    assemble(metadata.len(), &bytes, alignment, tensors, &|_| 0)
}

/// Puts a header together; `order` says which tensors are described first, equal ones as they lie.
fn assemble(
    keys: usize,
    metadata: &[u8],
    alignment: u64,
    tensors: &[Entry<'_>],
    order: &dyn Fn(&Entry<'_>) -> usize,
) -> Result<Header> {
    let mut offset = 0u64;
    let mut infos = Vec::with_capacity(tensors.len());
    for entry in tensors {
        let code = match entry.blocks {
            Some(blocks) => Some(blocks.code),
            None => PLAIN
                .iter()
                .find(|(_, dtype)| *dtype == entry.dtype)
                .map(|(code, _)| *code),
        };
        let code = code.ok_or_else(|| {
            stored(format!("GGUF has no type for {}", entry.dtype)).on(entry.name)
        })?;
        infos.push((entry, code, offset));
        let length = entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8;
        offset += (length as u64).next_multiple_of(alignment);
    }
    infos.sort_by_key(|(entry, ..)| order(entry));
    let mut bytes = MAGIC.to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys as u64).to_le_bytes());
    bytes.extend(metadata);
    for (entry, code, offset) in infos {
        let shape = entry.blocks.map_or(entry.shape, |blocks| &blocks.shape);
        write_text(&mut bytes, entry.name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            bytes.extend((*size as u64).to_le_bytes());
        }
        bytes.extend(code.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
    if bytes.len() as u64 > HEADER_LIMIT {
        return Err(Error::new(Reason::OutputHeaderTooLarge {
            bytes: bytes.len() as u64,
        }));
    }
    Ok(Header { bytes, alignment })
}

/// What stands before the data.
struct Read {
    metadata: Metadata,
    /// First byte of the metadata, and the first behind it.
    keys: (u64, u64),
    infos: Vec<Info>,
    alignment: u64,
    /// First byte of the data.
    data: u64,
}

impl Read {
    fn of(input: &Input) -> Result<Self> {
        let mut reader = Reader::new(input);
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
        let first = reader.at;
        let (metadata, alignment) = read_metadata(&mut reader, keys)?;
        let end = reader.at;
        let infos = read_infos(&mut reader, tensors)?;
        Ok(Read {
            metadata,
            keys: (first, end),
            infos,
            alignment,
            data: reader.at.next_multiple_of(alignment),
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
    /// Bytes of names and metadata so far.
    text: usize,
}

impl<'a> Reader<'a> {
    fn new(input: &'a Input) -> Self {
        Reader {
            input,
            at: 0,
            buffer: Vec::new(),
            start: 0,
            elements_left: ELEMENT_LIMIT,
            text: 0,
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
            let bytes = self.bytes(length)?.to_vec();
            count_text(&mut self.text, bytes.len()).map_err(Error::new)?;
            bytes
        } else {
            // Past the buffer: a long text is in memory once.
            self.skip(length)?;
            count_text(&mut self.text, length as usize).map_err(Error::new)?;
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
        if key == ALIGNMENT_KEY {
            alignment = value
                .parse()
                .ok()
                .filter(|size: &u64| kind == 4 && is_alignment(*size))
                .ok_or_else(|| structure(format!("{value} is no alignment")).on(&*key))?;
        }
        metadata.push((key, value));
    }
    Ok((metadata, alignment))
}

/// What ggml accepts; the upper bound keeps the padding a padding.
fn is_alignment(size: u64) -> bool {
    size.is_power_of_two() && size <= 1 << 20
}

/// What a header says about a tensor.
struct Info {
    name: String,
    kind: Kind,
    shape: Vec<usize>,
    offset: u64,
}

enum Kind {
    Plain(DType),
    Blocks(&'static Block),
}

impl Kind {
    fn of(code: u32) -> Option<Self> {
        let plain = PLAIN.iter().find(|(known, _)| *known == code);
        let blocks = || BLOCKS.iter().find(|block| block.code == code);
        match plain {
            Some((_, dtype)) => Some(Kind::Plain(*dtype)),
            None => blocks().map(Kind::Blocks),
        }
    }

    /// Bytes of a tensor.
    fn length(&self, shape: &[usize]) -> Result<usize> {
        let overflow = || {
            Error::new(Reason::ShapeOverflow {
                shape: shape.to_owned(),
            })
        };
        let elements = elements(shape).ok_or_else(overflow)?;
        match self {
            Kind::Plain(dtype) => {
                let bits = elements.checked_mul(dtype.bitsize()).ok_or_else(overflow)?;
                Ok(bits / 8)
            }
            Kind::Blocks(block) => {
                let row = shape.last().copied().unwrap_or(1);
                if !row.is_multiple_of(block.elements) {
                    return Err(structure(format!(
                        "rows of {row} elements are no whole number of blocks of {}",
                        block.name
                    )));
                }
                let blocks = elements / block.elements;
                blocks.checked_mul(block.bytes).ok_or_else(overflow)
            }
        }
    }
}

fn read_infos(reader: &mut Reader, count: usize) -> Result<Vec<Info>> {
    let mut infos = Vec::with_capacity(count);
    let mut seen = HashSet::new();
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
        let (code, offset) = (reader.u32()?, reader.u64()?);
        if !seen.insert(name.clone()) {
            return Err(Error::new(Reason::DuplicateKey { key: name }));
        }
        let Some(kind) = Kind::of(code) else {
            let problem = format!("the tensor has the unknown type {code}");
            return Err(structure(problem).on(name));
        };
        infos.push(Info {
            name,
            kind,
            shape,
            offset,
        });
    }
    Ok(infos)
}

/// The types that have one element to a few bytes (`ggml.h`, `enum ggml_type`).
const PLAIN: &[(u32, DType)] = &[
    (0, DType::F32),
    (1, DType::F16),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (30, DType::BF16),
];

/// A type that has a scale to a block of elements.
struct Block {
    code: u32,
    name: &'static str,
    elements: usize,
    bytes: usize,
}

/// All of them, with the sizes of `ggml-common.h`.
const BLOCKS: &[Block] = &[
    block(2, "Q4_0", 32, 18),
    block(3, "Q4_1", 32, 20),
    block(6, "Q5_0", 32, 22),
    block(7, "Q5_1", 32, 24),
    block(8, "Q8_0", 32, 34),
    block(9, "Q8_1", 32, 36),
    block(10, "Q2_K", 256, 84),
    block(11, "Q3_K", 256, 110),
    block(12, "Q4_K", 256, 144),
    block(13, "Q5_K", 256, 176),
    block(14, "Q6_K", 256, 210),
    block(15, "Q8_K", 256, 292),
    block(16, "IQ2_XXS", 256, 66),
    block(17, "IQ2_XS", 256, 74),
    block(18, "IQ3_XXS", 256, 98),
    block(19, "IQ1_S", 256, 50),
    block(20, "IQ4_NL", 32, 18),
    block(21, "IQ3_S", 256, 110),
    block(22, "IQ2_S", 256, 82),
    block(23, "IQ4_XS", 256, 136),
    block(29, "IQ1_M", 256, 56),
    block(34, "TQ1_0", 256, 54),
    block(35, "TQ2_0", 256, 66),
    block(39, "MXFP4", 32, 17),
    block(40, "NVFP4", 64, 36),
    block(41, "Q1_0", 128, 18),
];

const fn block(code: u32, name: &'static str, elements: usize, bytes: usize) -> Block {
    Block {
        code,
        name,
        elements,
        bytes,
    }
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
        let length = info.kind.length(&info.shape);
        let length = length.map_err(|e| e.on(&*info.name))?;
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
        end = match info.offset.checked_add(length as u64) {
            Some(end) if end <= data => end,
            _ => {
                return fail(Reason::OffsetsBeyondFile {
                    end: info.offset.saturating_add(length as u64),
                    length: data,
                });
            }
        };
        let (dtype, shape, blocks) = match info.kind {
            Kind::Plain(dtype) => (dtype, info.shape, None),
            Kind::Blocks(block) => {
                let blocks = Blocks {
                    name: block.name,
                    code: block.code,
                    shape: info.shape,
                };
                (DType::U8, vec![length], Some(blocks))
            }
        };
        tensors.push(Tensor {
            name: info.name,
            dtype,
            shape,
            input: input.clone(),
            offset: start + info.offset,
            length: length as u64,
            memory: None,
            made: None,
            blocks,
        });
    }
    // Most writers pad the last tensor as well.
    if data > end.next_multiple_of(alignment) {
        return Err(Error::new(Reason::TrailingBytes { count: data - end }));
    }
    Ok(tensors)
}
