//! From what a pickle describes to named tensors: names of nested dictionaries, bounds, strides.

use std::collections::HashSet;
use std::sync::Arc;

use super::beyond_memory;
use super::pickle::{Global, Object, Pickle, Value, View};
use crate::containers::Directory;
use crate::containers::safetensors::TENSOR_LIMIT;
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;
use crate::tensor::{DType, Tensor, elements};

/// Deepest nesting of dictionaries and lists.
const DEPTH_LIMIT: usize = 64;

/// Most values that are looked at; shared ones count each time.
const VALUE_LIMIT: usize = 1_000_000;

/// Longest name of a tensor.
const NAME_LIMIT: usize = 4096;

/// Most bytes of all names and metadata together.
const TEXT_LIMIT: usize = 64 << 20;

/// Longest text that becomes metadata.
const SMALL: usize = 4096;

/// Where the bytes of a storage are.
#[derive(Clone)]
pub(super) enum Bytes {
    File { start: u64, length: u64 },
    Memory(Arc<[u8]>),
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
    object: usize,
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
        match self.pickle.result {
            // A tensor alone is a list of one.
            root @ Value::Object(number) => match &self.pickle.objects[number] {
                Object::Tensor(view) => return self.tensor("0", view),
                Object::Dict(_) | Object::List(_) | Object::Tuple(_) => frames.push(Frame {
                    object: number,
                    next: 0,
                    prefix: 0,
                }),
                _ => return self.plain("value", root),
            },
            root => return self.plain("value", root),
        }
        let mut values = 0;
        while let Some(frame) = frames.last_mut() {
            let (place, prefix) = (frame.next, frame.prefix);
            frame.next += 1;
            let value = match &self.pickle.objects[frame.object] {
                Object::Dict(items) => items.get(place).map(|(key, value)| (Some(*key), *value)),
                Object::List(items) | Object::Tuple(items) => {
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
            match (value, self.pickle.object(value)) {
                (_, Some(Object::Tensor(view))) => self.tensor(&name, view)?,
                (
                    Value::Object(object),
                    Some(Object::Dict(_) | Object::List(_) | Object::Tuple(_)),
                ) => {
                    if frames.len() >= DEPTH_LIMIT {
                        return Err(Error::new(Reason::TooDeep { limit: DEPTH_LIMIT }));
                    }
                    frames.push(Frame {
                        object,
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
    fn take(&mut self, name: &str, count: usize, text: usize) -> Result<()> {
        if count >= TENSOR_LIMIT {
            return Err(Error::new(Reason::TooMany {
                what: "tensors",
                limit: TENSOR_LIMIT,
            }));
        }
        self.text += name.len() + text;
        if self.text > TEXT_LIMIT {
            return Err(Error::new(Reason::TooMany {
                what: "bytes of names",
                limit: TEXT_LIMIT,
            }));
        }
        if !self.seen.insert(name.to_owned()) {
            let key = name.to_owned();
            return Err(Error::new(Reason::DuplicateKey { key }));
        }
        Ok(())
    }

    /// A value without tensors becomes metadata.
    fn plain(&mut self, name: &str, value: Value) -> Result<()> {
        let shown = match (value, self.pickle.object(value)) {
            (Value::None, _) => "None".to_owned(),
            (Value::Bool(value), _) => value.to_string(),
            (Value::Int(value), _) => value.to_string(),
            (Value::Float(value), _) => value.to_string(),
            (Value::Global(global), _) => format!("{global:?}"),
            (_, Some(Object::Text(range))) if range.len() > SMALL => {
                format!("(a text of {} bytes)", range.len())
            }
            (_, Some(Object::Text(_))) => self.pickle.text(value).unwrap_or_default().to_owned(),
            (_, Some(Object::Bytes(range))) => format!("({} bytes)", range.len()),
            (_, Some(Object::Device)) => "(a device)".to_owned(),
            (_, Some(Object::Spelled(_))) => "(bytes)".to_owned(),
            (_, Some(Object::Number(_))) => "(a type of numbers)".to_owned(),
            _ => "(a storage)".to_owned(),
        };
        self.take(name, self.directory.metadata.len(), shown.len())?;
        self.directory.metadata.push((name.to_owned(), shown));
        Ok(())
    }

    fn tensor(&mut self, name: &str, view: &View) -> Result<()> {
        self.take(name, self.directory.tensors.len(), 0)?;
        let placed = self.place(name, view).map_err(|e| e.on(name))?;
        self.directory.tensors.push(placed);
        Ok(())
    }

    /// Compares a tensor with its storage; what does not lie there in one piece is gathered.
    fn place(&mut self, name: &str, view: &View) -> Result<Tensor> {
        let bytes = &self.storages[view.storage];
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
            _ => {
                return Err(Error::new(Reason::OutsideStorage {
                    bytes: bytes.length(),
                }));
            }
        }
        let mut tensor = Tensor {
            name: name.to_owned(),
            dtype: view.dtype,
            shape: view.shape.clone(),
            input: self.input.clone(),
            offset: 0,
            length,
            memory: None,
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
                    bytes[first as usize..(first + length) as usize].into()
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
            blocks: None,
        };
        tensor.memory = Some(gather(view, &whole.bytes()?, size as usize).into());
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

/// The elements in the order of their indices. Every one of them was found to lie in `bytes`.
fn gather(view: &View, bytes: &[u8], size: usize) -> Vec<u8> {
    let count: usize = view.shape.iter().product();
    let mut gathered = Vec::with_capacity(count * size);
    let mut index = vec![0usize; view.shape.len()];
    let mut at = view.offset as usize * size;
    for _ in 0..count {
        gathered.extend_from_slice(&bytes[at..at + size]);
        for axis in (0..index.len()).rev() {
            // The stride of a dimension of one may be anything.
            let step = (view.strides[axis] as usize).wrapping_mul(size);
            index[axis] += 1;
            if index[axis] < view.shape[axis] {
                at += step;
                break;
            }
            index[axis] = 0;
            at -= step * (view.shape[axis] - 1);
        }
    }
    gathered
}
