//! The safetensors container.
//!
//! Source: <https://github.com/huggingface/safetensors>, README ("Format") and `safetensors/src/tensor.rs`:
//! eight bytes of length, a JSON header, then the data, which the tensors cover without hole or overlap.
//! Types come from the `safetensors` crate. The header is read here because the crate's own `Metadata`
//! keeps the last of two equal keys, allocates shapes of any length, and names no tensor in most of its
//! errors.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

use super::{
    Container, DIMENSION_LIMIT, Directory, Entry, Header, NAME_LIMIT, TensorFile, Writer,
    count_text,
};
use crate::error::{Error, Reason, Result};
use crate::json::{Budget, TextMap};
use crate::mapped::Input;
use crate::tensor::{DType, Tensor, elements};

/// The container.
pub struct Safetensors;

/// Largest header, as in the safetensors crate.
pub const HEADER_LIMIT: u64 = 100_000_000;

/// Most tensors in one file; the largest published checkpoints hold about that many in all shards.
pub const TENSOR_LIMIT: usize = 200_000;

impl Container for Safetensors {
    fn name(&self) -> &'static str {
        "safetensors"
    }

    fn detects(&self, head: &[u8], length: u64) -> bool {
        // The length of a header is below 2³². This must be asked before the pickles: a header of 640
        // bytes starts with 80 02, as they do. GGUF has its version where the zeros are.
        match head.get(4..8) {
            Some([0, 0, 0, 0]) => head.get(8).is_none_or(|first| {
                *first == b'{' || header_length(head) <= length.saturating_sub(8)
            }),
            Some(_) => false,
            // Cut inside the length, past the part that can tell.
            None => head.len() > 4 && head.iter().skip(4).all(|byte| *byte == 0),
        }
    }

    fn result(&self) -> Option<&'static dyn Writer> {
        Some(&Safetensors)
    }

    fn open(&self, input: Arc<Input>) -> Result<Directory> {
        let length = input.len();
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(Error::new(Reason::HeaderCut { length }));
        }
        input.read_at(&mut prefix, 0)?;
        let header = u64::from_le_bytes(prefix);
        if header > length - 8 {
            return Err(Error::new(Reason::HeaderBeyondFile { header, length }));
        }
        if header > HEADER_LIMIT {
            return Err(Error::new(Reason::HeaderTooLarge {
                bytes: header,
                limit: HEADER_LIMIT,
            }));
        }
        let mut bytes = vec![0; header as usize];
        input.read_at(&mut bytes, 8)?;
        let (entries, metadata) = parse(&bytes)?;
        drop(bytes);
        let data_start = 8 + header;
        let tensors = place(entries, input, data_start, length - data_start)?;
        Ok(Directory { tensors, metadata })
    }
}

impl Writer for Safetensors {
    fn extension(&self) -> &'static str {
        "safetensors"
    }

    fn header(&self, base: &TensorFile, tensors: &[Entry<'_>]) -> Result<Header> {
        let entries: Vec<_> = tensors
            .iter()
            .map(|entry| (entry.name, entry.dtype, entry.shape))
            .collect();
        Ok(Header {
            bytes: header(&base.directory.metadata, &entries)?,
            alignment: 1,
        })
    }
}

/// The header of a safetensors file, padded to a multiple of eight bytes, its length in front.
///
/// `tensors` are name, type and shape in the order of their data, which lie back to back.
///
/// # Errors
/// [`Reason::OutputHeaderTooLarge`].
pub fn header(
    metadata: &[(String, String)],
    tensors: &[(&str, DType, &[usize])],
) -> Result<Vec<u8>> {
    let mut text = String::from("{");
    if !metadata.is_empty() {
        let entries: Vec<String> = metadata
            .iter()
            .map(|(key, value)| format!("{}:{}", quoted(key), quoted(value)))
            .collect();
        text.push_str(&format!("\"__metadata__\":{{{}}}", entries.join(",")));
    }
    let mut offset = 0;
    for (name, dtype, shape) in tensors {
        if text.len() > 1 {
            text.push(',');
        }
        let end = offset + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
        text.push_str(&format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{offset},{end}]}}",
            quoted(name),
            shape.join(","),
        ));
        offset = end;
    }
    text.push('}');
    let padded = text.len().next_multiple_of(8);
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    if text.len() as u64 > HEADER_LIMIT {
        return Err(Error::new(Reason::OutputHeaderTooLarge {
            bytes: text.len() as u64,
        }));
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    Ok(bytes)
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn header_length(head: &[u8]) -> u64 {
    head.get(..8).map_or(0, |bytes| {
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    })
}

type Entries = Vec<(String, Info)>;
type Metadata = Vec<(String, String)>;

/// What a header says about a tensor.
#[derive(serde::Deserialize)]
struct Info {
    dtype: DType,
    #[serde(deserialize_with = "dimensions")]
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Keeps one dimension more than there may be: enough to refuse the shape, however long it is.
fn dimensions<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct Dimensions;

    impl<'de> Visitor<'de> for Dimensions {
        type Value = Vec<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<usize>, A::Error> {
            let mut shape = Vec::new();
            while let Some(size) = sequence.next_element()? {
                if shape.len() <= DIMENSION_LIMIT {
                    shape.push(size);
                }
            }
            Ok(shape)
        }
    }

    deserializer.deserialize_seq(Dimensions)
}

fn parse(bytes: &[u8]) -> Result<(Entries, Metadata)> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        Error::new(Reason::NotUtf8 {
            at: e.valid_up_to() + 8,
        })
    })?;
    if !text.starts_with('{') {
        return Err(Error::new(Reason::HeaderStart));
    }
    let budget = Budget::new(TENSOR_LIMIT);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parsed = deserializer
        .deserialize_map(HeaderVisitor(&budget))
        .and_then(|parsed| deserializer.end().map(|()| parsed));
    parsed.map_err(|problem| budget.explain(problem))
}

struct HeaderVisitor<'a>(&'a Budget);

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = (Entries, Metadata);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a safetensors header")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut metadata = Vec::new();
        let mut seen = HashSet::new();
        let mut text = 0;
        let mut count = |bytes| count_text(&mut text, bytes);
        while let Some(key) = map.next_key::<String>()? {
            self.0.spend("tensors")?;
            if key.len() > NAME_LIMIT {
                let reason = Reason::NameTooLong {
                    bytes: key.len(),
                    limit: NAME_LIMIT,
                };
                return Err(self.0.stop(reason));
            }
            count(key.len()).map_err(|reason| self.0.stop(reason))?;
            if !seen.insert(key.clone()) {
                return Err(self.0.stop(Reason::DuplicateKey { key }));
            }
            if key == "__metadata__" {
                metadata = map.next_value_seed(TextMap(self.0, &mut count))?;
            } else {
                entries.push((key, map.next_value()?));
            }
        }
        Ok((entries, metadata))
    }
}

fn place(
    mut entries: Entries,
    input: Arc<Input>,
    data_start: u64,
    data: u64,
) -> Result<Vec<Tensor>> {
    entries.sort_by(|(left, a), (right, b)| (a.data_offsets, left).cmp(&(b.data_offsets, right)));
    let mut tensors: Vec<Tensor> = Vec::with_capacity(entries.len());
    let mut end_of_last = 0u64;
    for (name, info) in entries {
        let (start, end) = info.data_offsets;
        let fail = |reason| Err(Error::new(reason).on(name.clone()));
        if name.is_empty() {
            return fail(Reason::EmptyName);
        }
        if info.shape.len() > DIMENSION_LIMIT {
            return fail(Reason::TooMany {
                what: "dimensions",
                limit: DIMENSION_LIMIT,
            });
        }
        if end < start {
            return fail(Reason::OffsetsReversed { start, end });
        }
        if end > data {
            return fail(Reason::OffsetsBeyondFile { end, length: data });
        }
        if start < end_of_last {
            let other = tensors
                .last()
                .map_or_else(String::new, |last| last.name.clone());
            return fail(Reason::Overlap { other });
        }
        if start > end_of_last {
            return fail(Reason::Hole {
                start: end_of_last,
                end: start,
            });
        }
        let Some(bits) =
            elements(&info.shape).and_then(|count| count.checked_mul(info.dtype.bitsize()))
        else {
            return fail(Reason::ShapeOverflow { shape: info.shape });
        };
        if bits % 8 != 0 {
            return fail(Reason::PartialByte { shape: info.shape });
        }
        if bits as u64 / 8 != end - start {
            return fail(Reason::SizeMismatch {
                expected: bits as u64 / 8,
                found: end - start,
            });
        }
        end_of_last = end;
        tensors.push(Tensor {
            name,
            dtype: info.dtype,
            shape: info.shape,
            input: input.clone(),
            offset: data_start + start,
            length: end - start,
            memory: None,
            made: None,
            blocks: None,
        });
    }
    if end_of_last < data {
        return Err(Error::new(Reason::TrailingBytes {
            count: data - end_of_last,
        }));
    }
    Ok(tensors)
}
