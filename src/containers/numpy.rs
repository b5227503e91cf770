//! Arrays of numpy: `.npy` holds one, `.npz` is a zip archive of them.
//!
//! Source: `numpy/lib/_format_impl.py`: six bytes of magic, two of version, the length of the header, and a
//! Python literal with the keys `descr`, `fortran_order` and `shape`, which is read here by hand; then the
//! elements. Arrays of objects and records, and big-endian ones, are refused by name.
//!
//! Arrays in Fortran order and members that are compressed do not lie in the file as a tensor does; they are
//! unpacked into memory when the file is opened, within a limit.

use std::sync::Arc;

use super::archive::Archive as Written;
use super::strided::gather;
use super::zip::{Archive, MEMORY_LIMIT, Member, beyond_memory, first_name};
use super::{Container, DIMENSION_LIMIT, Directory, Entry, NAME_LIMIT};
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::{DType, Tensor, elements};

const MAGIC: &[u8] = b"\x93NUMPY";

/// The name of the container of several arrays.
pub const NPZ: &str = "npz";

/// The name of an array that has none.
const ONLY: &str = "array";

/// Longest header; numpy itself reads 10,000 characters from files it does not trust.
const HEADER_LIMIT: u64 = 64 << 10;

/// Types of elements under numpy's names; the first name of each is written.
const TYPES: &[(&str, DType)] = &[
    ("<f8", DType::F64),
    ("<f4", DType::F32),
    ("<f2", DType::F16),
    ("<i8", DType::I64),
    ("<i4", DType::I32),
    ("<i2", DType::I16),
    ("|i1", DType::I8),
    ("<i1", DType::I8),
    ("<u8", DType::U64),
    ("<u4", DType::U32),
    ("<u2", DType::U16),
    ("|u1", DType::U8),
    ("<u1", DType::U8),
    ("|b1", DType::BOOL),
    ("<c8", DType::C64),
];

/// What `numpy.savez` writes of these arrays.
///
/// # Errors
/// [`Reason::Stored`] for a type that numpy does not have.
pub fn archive(tensors: &[Entry<'_>]) -> Result<Written> {
    let mut archive = Written::new(1);
    for (index, entry) in tensors.iter().enumerate() {
        let found = TYPES.iter().find(|(_, dtype)| *dtype == entry.dtype);
        let Some((name, _)) = found else {
            let problem = format!("numpy has no type for {}", entry.dtype);
            return Err(Error::new(Reason::Stored { problem }).on(entry.name));
        };
        let sizes: Vec<String> = entry.shape.iter().map(usize::to_string).collect();
        let comma = if sizes.len() == 1 { "," } else { "" };
        let shape = format!("({}{comma})", sizes.join(", "));
        let text = format!("{{'descr': '{name}', 'fortran_order': False, 'shape': {shape}, }}");
        // Spaces and a line feed fill it up, so that the elements start at a multiple of 64.
        let end = (10 + text.len() + 1).next_multiple_of(64);
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&[1, 0]);
        head.extend_from_slice(&((end - 10) as u16).to_le_bytes());
        head.extend_from_slice(text.as_bytes());
        head.resize(end - 1, b' ');
        head.push(b'\n');
        archive.add(format!("{}.npy", entry.name), head, Some(index));
    }
    Ok(archive)
}

/// One array in a file, named `array`.
pub(super) struct Npy;

impl Container for Npy {
    fn name(&self) -> &'static str {
        "numpy array"
    }

    fn detects(&self, head: &[u8], _length: u64) -> bool {
        head.starts_with(MAGIC)
    }

    fn open(&self, input: Arc<Input>) -> Result<Directory> {
        let length = input.len();
        let mut head = vec![0; length.min(HEADER_LIMIT + 12) as usize];
        input.read_at(&mut head, 0)?;
        let header = Header::read(&head, length)?;
        let mut memory_left = MEMORY_LIMIT;
        let tensor = if header.fortran {
            spend(&mut memory_left, length)?;
            spend(&mut memory_left, length)?; // the elements in order
            let bytes = input.read_all(length)?;
            header.tensor(ONLY, &input, 0, length, Some(bytes))?
        } else {
            header.tensor(ONLY, &input, 0, length, None)?
        };
        Ok(Directory {
            tensors: vec![tensor],
            metadata: Vec::new(),
        })
    }
}

/// An archive of arrays, named as its members without `.npy`.
pub(super) struct Npz;

impl Container for Npz {
    fn name(&self) -> &'static str {
        NPZ
    }

    fn detects(&self, head: &[u8], _length: u64) -> bool {
        first_name(head).is_some_and(|name| name.ends_with(b".npy"))
    }

    fn verify(&self, input: Arc<Input>, watch: &dyn Fn() -> Result<()>) -> Result<()> {
        Archive::read(input)?.verify(watch)
    }

    fn open(&self, input: Arc<Input>) -> Result<Directory> {
        let mut memory_left = MEMORY_LIMIT;
        let mut tensors = Vec::new();
        let archive = Archive::read(input)?;
        for member in &archive.members {
            let tensor = open_member(&archive, member, &mut memory_left)
                .map_err(|error| error.on(&*member.name))?;
            tensors.push(tensor);
        }
        tensors.sort_by(|a: &Tensor, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
        Ok(Directory {
            tensors,
            metadata: Vec::new(),
        })
    }
}

fn open_member(archive: &Archive, member: &Member, memory_left: &mut u64) -> Result<Tensor> {
    let input = archive.input();
    let Some(name) = member.name.strip_suffix(".npy") else {
        return Err(malformed("a member of the archive is not an array"));
    };
    if name.is_empty() {
        return Err(Error::new(Reason::EmptyName));
    }
    if name.len() > NAME_LIMIT {
        return Err(Error::new(Reason::NameTooLong {
            bytes: name.len(),
            limit: NAME_LIMIT,
        }));
    }
    if member.deflated {
        let bytes = archive.bytes(member, memory_left)?;
        let header = Header::read(&bytes, member.size)?;
        if header.fortran {
            spend(memory_left, member.size)?;
        }
        return header.tensor(name, input, member.start, member.size, Some(bytes));
    }
    let mut head = vec![0; member.size.min(HEADER_LIMIT + 12) as usize];
    // Most headers are short; a file of many small arrays is read once per array.
    head.truncate(4096);
    input.read_at(&mut head, member.start)?;
    if Header::end(&head).is_some_and(|end| end > head.len() as u64) {
        head.resize(member.size.min(HEADER_LIMIT + 12) as usize, 0);
        input.read_at(&mut head, member.start)?;
    }
    let header = Header::read(&head, member.size)?;
    if header.fortran {
        spend(memory_left, member.size)?; // the elements in order
        let bytes = archive.bytes(member, memory_left)?;
        return header.tensor(name, input, member.start, member.size, Some(bytes));
    }
    header.tensor(name, input, member.start, member.size, None)
}

fn spend(left: &mut u64, bytes: u64) -> Result<()> {
    match left.checked_sub(bytes) {
        Some(rest) => *left = rest,
        None => {
            return Err(Error::new(beyond_memory()));
        }
    }
    Ok(())
}

fn malformed(problem: impl Into<String>) -> Error {
    Error::new(Reason::Structure {
        problem: problem.into(),
    })
}

/// What an array says about itself.
#[derive(Debug)]
struct Header {
    dtype: DType,
    shape: Vec<usize>,
    fortran: bool,
    /// Where the elements start.
    data: u64,
}

impl Header {
    /// Where the header ends by its own word.
    fn end(head: &[u8]) -> Option<u64> {
        match head.get(6)? {
            1 => Some(10 + u64::from(u16::from_le_bytes(head.get(8..10)?.try_into().ok()?))),
            _ => Some(12 + u64::from(u32::from_le_bytes(head.get(8..12)?.try_into().ok()?))),
        }
    }

    /// Reads the header of an array of `length` bytes.
    fn read(head: &[u8], length: u64) -> Result<Self> {
        if !head.starts_with(MAGIC) {
            return Err(malformed("a member of the archive is not an array"));
        }
        let version = (head.get(6).copied(), head.get(7).copied());
        let (Some(major), Some(minor)) = version else {
            return Err(Error::new(Reason::HeaderCut { length }));
        };
        if !(1..=3).contains(&major) || minor != 0 {
            let problem = format!("version {major}.{minor} of the array format is not known");
            return Err(Error::new(Reason::Stored { problem }));
        }
        let start = if major == 1 { 10 } else { 12 };
        let Some(end) = Self::end(head) else {
            return Err(Error::new(Reason::HeaderCut { length }));
        };
        if end > length {
            return Err(Error::new(Reason::HeaderBeyondFile {
                header: end,
                length,
            }));
        }
        if end - start > HEADER_LIMIT {
            return Err(Error::new(Reason::HeaderTooLarge {
                bytes: end - start,
                limit: HEADER_LIMIT,
            }));
        }
        let text = head
            .get(start as usize..end as usize)
            .ok_or_else(|| Error::new(Reason::HeaderCut { length }))?;
        let text = std::str::from_utf8(text).map_err(|e| {
            Error::new(Reason::NotUtf8 {
                at: e.valid_up_to() + start as usize,
            })
        })?;
        let (dtype, fortran, shape) = Literal(text).header()?;
        Ok(Header {
            dtype,
            shape,
            fortran,
            data: end,
        })
    }

    /// The tensor of an array that lies at `offset` and has `length` bytes, which `bytes` are if it does
    /// not lie there as it is.
    fn tensor(
        self,
        name: &str,
        input: &Arc<Input>,
        offset: u64,
        length: u64,
        bytes: Option<Vec<u8>>,
    ) -> Result<Tensor> {
        let size = self.dtype.bitsize() / 8;
        let fail = |reason| Err(Error::new(reason).on(name));
        let Some(needed) = elements(&self.shape).and_then(|count| count.checked_mul(size)) else {
            return fail(Reason::ShapeOverflow { shape: self.shape });
        };
        let found = length - self.data;
        if needed as u64 != found {
            return fail(Reason::SizeMismatch {
                expected: needed as u64,
                found,
            });
        }
        let memory = match bytes {
            Some(bytes) => Some(Arc::new(self.unpacked(bytes, size)?)),
            None => None,
        };
        Ok(Tensor {
            name: name.to_owned(),
            dtype: self.dtype,
            shape: self.shape,
            input: input.clone(),
            offset: if memory.is_some() {
                offset
            } else {
                offset + self.data
            },
            length: found,
            memory,
            made: None,
            blocks: None,
        })
    }

    /// The elements alone, in the order of a tensor.
    fn unpacked(&self, mut bytes: Vec<u8>, size: usize) -> Result<Vec<u8>> {
        let start = self.data as usize;
        if !self.fortran || self.shape.len() < 2 {
            bytes.drain(..start.min(bytes.len()));
            return Ok(bytes);
        }
        // The first index is the fastest.
        let mut stride = size;
        let axes = self.shape.iter().map(|length| {
            let axis = (*length, stride);
            stride *= length.max(&1);
            axis
        });
        gather(&bytes, start, &axes.collect::<Vec<_>>(), size).ok_or_else(|| {
            let length = bytes.len() as u64;
            Error::new(Reason::HeaderCut { length })
        })
    }
}

/// What is left of the text of a header.
struct Literal<'a>(&'a str);

impl<'a> Literal<'a> {
    fn header(mut self) -> Result<(DType, bool, Vec<usize>)> {
        let (mut dtype, mut fortran, mut shape) = (None, None, None);
        self.expect("{")?;
        while !self.accept("}") {
            let key = self.text()?;
            self.expect(":")?;
            let twice = match key {
                "descr" => dtype.replace(self.dtype()?).is_some(),
                "fortran_order" => fortran.replace(self.boolean()?).is_some(),
                "shape" => shape.replace(self.shape()?).is_some(),
                _ => return Err(malformed(format!("the array's header has a key `{key}`"))),
            };
            if twice {
                return Err(Error::new(Reason::DuplicateKey { key: key.into() }));
            }
            if !self.accept(",") {
                self.expect("}")?;
                break;
            }
        }
        if !self.0.trim_matches([' ', '\n', '\0']).is_empty() {
            return Err(malformed("something follows the array's header"));
        }
        match (dtype, fortran, shape) {
            (Some(dtype), Some(fortran), Some(shape)) => Ok((dtype, fortran, shape)),
            (None, ..) => Err(Error::new(Reason::FieldMissing { field: "descr" })),
            (_, None, _) => Err(Error::new(Reason::FieldMissing {
                field: "fortran_order",
            })),
            _ => Err(Error::new(Reason::FieldMissing { field: "shape" })),
        }
    }

    fn accept(&mut self, token: &str) -> bool {
        self.0 = self.0.trim_start_matches(' ');
        match self.0.strip_prefix(token) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        match self.accept(token) {
            true => Ok(()),
            false => Err(malformed(format!("the array's header lacks a `{token}`"))),
        }
    }

    /// A text without escapes.
    fn text(&mut self) -> Result<&'a str> {
        let quote = if self.accept("'") {
            '\''
        } else {
            self.expect("\"")?;
            '"'
        };
        let text = self.0.split_once(quote);
        let (text, rest) = text
            .filter(|(text, _)| !text.contains('\\'))
            .ok_or_else(|| malformed("a text in the array's header does not end"))?;
        self.0 = rest;
        Ok(text)
    }

    fn boolean(&mut self) -> Result<bool> {
        if self.accept("True") {
            return Ok(true);
        }
        self.expect("False").map(|()| false)
    }

    fn shape(&mut self) -> Result<Vec<usize>> {
        self.expect("(")?;
        let mut shape = Vec::new();
        while !self.accept(")") {
            self.0 = self.0.trim_start_matches(' ');
            let digits = self.0.bytes().take_while(u8::is_ascii_digit).count();
            let (number, rest) = self.0.split_at(digits);
            let size = number
                .parse()
                .map_err(|_| malformed("a dimension of the array is not a whole number"))?;
            // Python 2 wrote long numbers with an L.
            self.0 = rest.strip_prefix('L').unwrap_or(rest);
            if shape.len() == DIMENSION_LIMIT {
                return Err(Error::new(Reason::TooMany {
                    what: "dimensions",
                    limit: DIMENSION_LIMIT,
                }));
            }
            shape.push(size);
            if !self.accept(",") {
                if shape.len() == 1 {
                    return Err(malformed("the shape of the array is not a tuple"));
                }
                self.expect(")")?;
                break;
            }
        }
        Ok(shape)
    }

    fn dtype(&mut self) -> Result<DType> {
        let refused = |problem: String| Err(Error::new(Reason::Stored { problem }));
        if self.accept("[") || self.accept("(") || self.accept("{") {
            return refused("arrays of records are not supported".into());
        }
        let text = self.text()?;
        let found = TYPES.iter().find(|(name, _)| *name == text);
        Ok(match found {
            Some((_, dtype)) => *dtype,
            _ if text.ends_with('O') => {
                return refused("arrays of Python objects are never unpickled".into());
            }
            _ if text.starts_with('>') => {
                return refused(format!("big-endian arrays ({text}) are not supported"));
            }
            _ => return refused(format!("arrays of type {text} are not supported")),
        })
    }
}
