//! From what a pickle describes to named tensors: names of nested dictionaries, bounds, strides.

use std::collections::HashSet;
use std::sync::Arc;

use super::beyond_memory;
use super::pickle::{Global, Object, Pickle, Value, View};
use crate::containers::safetensors::TENSOR_LIMIT;
use crate::containers::strided::gather;
use crate::containers::{Directory, NAME_LIMIT, count_text};
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::{DType, Tensor, elements};

/// Deepest nesting of dictionaries and lists.
const DEPTH_LIMIT: usize = 64;

/// Most values that are looked at; shared ones count each time.
const VALUE_LIMIT: usize = 1_000_000;

/// Longest text that becomes metadata.
const SMALL: usize = 4096;

/// Where the bytes of a storage are.
#[derive(Clone)]
pub(super) enum Bytes {
    File { start: u64, length: u64 },
    Memory(Arc<Vec<u8>>),
}

impl Bytes {
    fn length(&self) -> u64 {
        match self {
            Bytes::File { length, .. } => *length,
            Bytes::Memory(bytes) => bytes.len() as u64,
        }
    }
}

/// A dictionary or list that is being walked through.
struct Frame {
    object: Value,
    next: usize,
    /// How long the name was outside.
    prefix: usize,
}

/// Names and places all tensors; `storages` are those of the pickle, in its order.
pub(super) fn directory(
    pickle: &Pickle<'_>,
    storages: &[Bytes],
    input: &Arc<Input>,
    budget: &mut u64,
) -> Result<Directory> {
    let mut walk = Walk {
        pickle,
        storages,
        input,
        budget,
        directory: Directory::default(),
        seen: HashSet::new(),
        text: 0,
    };
    walk.all()?;
    let mut directory = walk.directory;
    directory
        .tensors
        .sort_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
    Ok(directory)
}

struct Walk<'a> {
    pickle: &'a Pickle<'a>,
    storages: &'a [Bytes],
    input: &'a Arc<Input>,
    budget: &'a mut u64,
    directory: Directory,
    seen: HashSet<String>,
    text: usize,
}

impl Walk<'_> {
    fn all(&mut self) -> Result<()> {
        let mut name = String::new();
        let mut frames: Vec<Frame> = Vec::new();
        let root = self.pickle.result;
        match self.pickle.object(root) {
            // A tensor alone is a list of one.
            Some(Object::Tensor(view)) => return self.tensor("0", view),
            Some(Object::Dict(_) | Object::List(_) | Object::Tuple(_)) => frames.push(Frame {
                object: root,
                next: 0,
                prefix: 0,
            }),
            _ => return self.plain("value", root),
        }
        let mut values = 0;
        while let Some(frame) = frames.last_mut() {
            let (place, prefix) = (frame.next, frame.prefix);
            frame.next += 1;
            let value = match self.pickle.object(frame.object) {
                Some(Object::Dict(items)) => {
                    items.get(place).map(|(key, value)| (Some(*key), *value))
                }
                Some(Object::List(items) | Object::Tuple(items)) => {
                    items.get(place).map(|value| (None, *value))
                }
                _ => None,
            };
            let Some((key, value)) = value else {
                frames.pop();
                name.truncate(prefix);
                continue;
            };
            values += 1;
            if values > VALUE_LIMIT {
                return Err(Error::new(Reason::TooMany {
                    what: "values in the pickle",
                    limit: VALUE_LIMIT,
                }));
            }
            let outside = name.len();
            if frames.len() > 1 {
                name.push('.');
            }
            match key {
                None => name.push_str(&place.to_string()),
                Some(Value::Int(number)) => name.push_str(&number.to_string()),
                Some(Value::Global(Global::Label(label))) => name.push_str(label),
                Some(key) => match self.pickle.text(key) {
                    Some(text) if !text.is_empty() => name.push_str(text),
                    Some(_) => return Err(Error::new(Reason::EmptyName).on(name)),
                    None => {
                        let problem =
                            "a key of a dictionary is neither text nor integer".to_owned();
                        return Err(Error::new(Reason::FieldValue { problem }).on(name));
                    }
                },
            }
            if name.len() > NAME_LIMIT {
                return Err(Error::new(Reason::NameTooLong {
                    bytes: name.len(),
                    limit: NAME_LIMIT,
                }));
            }
            self.count_text(name.len())?;
            match self.pickle.object(value) {
                Some(Object::Tensor(view)) => self.tensor(&name, view)?,
                Some(Object::Dict(_) | Object::List(_) | Object::Tuple(_)) => {
                    if frames.len() >= DEPTH_LIMIT {
                        return Err(Error::new(Reason::TooDeep { limit: DEPTH_LIMIT }));
                    }
                    frames.push(Frame {
                        object: value,
                        next: 0,
                        prefix: outside,
                    });
                    continue;
                }
                _ => self.plain(&name, value)?,
            }
            name.truncate(outside);
        }
        Ok(())
    }

    /// Takes a name, which must be new.
    fn take(&mut self, name: &str, count: usize) -> Result<()> {
        if count >= TENSOR_LIMIT {
            return Err(Error::new(Reason::TooMany {
                what: "tensors",
                limit: TENSOR_LIMIT,
            }));
        }
        if !self.seen.insert(name.to_owned()) {
            let key = name.to_owned();
            return Err(Error::new(Reason::DuplicateKey { key }));
        }
        Ok(())
    }

    fn count_text(&mut self, bytes: usize) -> Result<()> {
        count_text(&mut self.text, bytes).map_err(Error::new)
    }

    /// A value without tensors becomes metadata.
    fn plain(&mut self, name: &str, value: Value) -> Result<()> {
        let shown = match (value, self.pickle.object(value)) {
            (Value::None, _) => "None".to_owned(),
            (Value::Bool(value), _) => value.to_string(),
            (Value::Int(value), _) => value.to_string(),
            (Value::Float(value), _) => value.to_string(),
            (Value::Global(global), _) => format!("{global:?}"),
            (_, Some(Object::Text(text))) if text.len() > SMALL => {
                format!("(a text of {} bytes)", text.len())
            }
            (_, Some(Object::Text(text))) => (*text).to_owned(),
            (_, Some(Object::Bytes(bytes))) => format!("({} bytes)", bytes.len()),
            (_, Some(Object::Device)) => "(a device)".to_owned(),
            (_, Some(Object::Spelled(_))) => "(bytes)".to_owned(),
            (_, Some(Object::Number(_))) => "(a type of numbers)".to_owned(),
            _ => "(a storage)".to_owned(),
        };
        self.count_text(shown.len())?;
        self.take(name, self.directory.metadata.len())?;
        self.directory.metadata.push((name.to_owned(), shown));
        Ok(())
    }

    fn tensor(&mut self, name: &str, view: &View) -> Result<()> {
        self.take(name, self.directory.tensors.len())?;
        let placed = self.place(name, view).map_err(|e| e.on(name))?;
        self.directory.tensors.push(placed);
        Ok(())
    }

    /// Compares a tensor with its storage; what does not lie there in one piece is gathered.
    fn place(&mut self, name: &str, view: &View) -> Result<Tensor> {
        let Some(bytes) = self.storages.get(view.storage) else {
            return Err(Error::new(Reason::StorageMissing));
        };
        let outside = || {
            Error::new(Reason::OutsideStorage {
                bytes: bytes.length(),
            })
        };
        let size = view.dtype.bitsize() as u64 / 8;
        let overflow = || {
            Error::new(Reason::ShapeOverflow {
                shape: view.shape.clone(),
            })
        };
        let count = elements(&view.shape).ok_or_else(overflow)? as u64;
        let length = count.checked_mul(size).ok_or_else(overflow)?;
        // Behind the last element.
        let end = view
            .shape
            .iter()
            .zip(&view.strides)
            .try_fold(view.offset, |end, (size, stride)| {
                end.checked_add((*size as u64).saturating_sub(1).checked_mul(*stride)?)
            })
            .and_then(|last| last.checked_add(1))
            .and_then(|end| end.checked_mul(size));
        match end {
            _ if count == 0 => {}
            Some(end) if end <= bytes.length() => {}
            _ => return Err(outside()),
        }
        let mut tensor = Tensor {
            name: name.to_owned(),
            dtype: view.dtype,
            shape: view.shape.clone(),
            input: self.input.clone(),
            offset: 0,
            length,
            memory: None,
            made: None,
            blocks: None,
        };
        let first = if count == 0 { 0 } else { view.offset * size };
        if let Bytes::File { start, .. } = bytes {
            tensor.offset = start + first;
        }
        if count == 0 || is_contiguous(view) {
            if let Bytes::Memory(bytes) = bytes {
                tensor.memory = Some(if length == bytes.len() as u64 {
                    bytes.clone()
                } else {
                    self.spend(length)?;
                    let piece = bytes.get(first as usize..(first + length) as usize);
                    Arc::new(piece.ok_or_else(outside)?.to_vec())
                });
            }
            return Ok(tensor);
        }
        self.spend(length)?;
        let whole = Tensor {
            name: name.to_owned(),
            dtype: DType::U8,
            shape: vec![bytes.length() as usize],
            input: self.input.clone(),
            offset: match bytes {
                Bytes::File { start, .. } => *start,
                Bytes::Memory(_) => 0,
            },
            length: bytes.length(),
            memory: match bytes {
                Bytes::File { .. } => None,
                Bytes::Memory(bytes) => Some(bytes.clone()),
            },
            made: None,
            blocks: None,
        };
        let axes = view.shape.iter().zip(&view.strides);
        let axes: Vec<_> = axes
            .map(|(length, stride)| (*length, (*stride as usize).wrapping_mul(size as usize)))
            .collect();
        let gathered = gather(&whole.bytes()?, first as usize, &axes, size as usize);
        tensor.memory = Some(Arc::new(gathered.ok_or_else(outside)?));
        Ok(tensor)
    }

    fn spend(&mut self, bytes: u64) -> Result<()> {
        *self.budget = self
            .budget
            .checked_sub(bytes)
            .ok_or_else(|| Error::new(beyond_memory()))?;
        Ok(())
    }
}

/// Whether the elements lie one behind the other; the stride of a dimension of one says nothing.
fn is_contiguous(view: &View) -> bool {
    let mut expected = 1;
    for (size, stride) in view.shape.iter().zip(&view.strides).rev() {
        if *size != 1 && *stride != expected {
            return false;
        }
        // Cannot overflow: the product of all sizes was taken.
        expected *= *size as u64;
    }
    true
}
