//! A closed reader of pickles: a list of instructions, a table of names, and nothing that runs.
//!
//! Source: CPython, `Lib/pickletools.py` (instructions of protocol 2 to 5), and `torch/_utils.py` and
//! `torch/serialization.py` (what a checkpoint asks for). Objects lie in one arena and refer to each
//! other by number: sharing costs nothing, cycles are harmless, and nothing recurses when it is dropped.

use std::collections::HashMap;

use crate::containers::DIMENSION_LIMIT;
use crate::error::{Error, Reason, Result};
use crate::tensor::DType;

/// Most instructions of one pickle.
pub(super) const INSTRUCTION_LIMIT: usize = 1_000_000;

/// Longest name of a module or class, and longest key of a storage.
const WORD_LIMIT: usize = 256;

/// A value: small ones themselves, the others by their number in the arena.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Global(Global),
    Object(usize),
}

/// What lies in the arena.
#[derive(Debug)]
pub(super) enum Object<'a> {
    /// A text, which lies in the pickle.
    Text(&'a str),
    /// Bytes, which lie in the pickle.
    Bytes(&'a [u8]),
    /// Bytes that are spelled as a text, a character for each.
    Spelled(&'a str),
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    /// A storage, by its number.
    Storage(usize),
    Tensor(View),
    /// A device: without meaning here.
    Device,
    /// The type of a number of numpy.
    Number(Number),
}

/// The types of numbers of numpy that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    F64,
    F32,
    I64,
    I32,
}

/// What a checkpoint may ask for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildTensorV2,
    RebuildTensorV3,
    RebuildParameter,
    Size,
    Device,
    /// A class of storages and the type of their elements; none where they are bytes.
    Storage(Option<DType>),
    /// A type of elements.
    Type(DType),
    /// `numpy.dtype`, `numpy.core.multiarray.scalar`, and what spells their bytes in protocol 2.
    NumpyType,
    NumpyScalar,
    Encode,
    /// A class that is a key in the state of a training, and never called.
    Label(&'static str),
}

/// The class of storages of a type.
pub(super) fn storage_class(dtype: DType) -> Option<&'static str> {
    let mut known = GLOBALS.iter();
    let found = known.find(|(.., global)| *global == Global::Storage(Some(dtype)));
    found.map(|(_, class, _)| *class)
}

/// The only names that are known.
const GLOBALS: &[(&str, &str, Global)] = &[
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch._utils", "_rebuild_tensor", Global::RebuildTensor),
    (
        "torch._utils",
        "_rebuild_tensor_v2",
        Global::RebuildTensorV2,
    ),
    (
        "torch._utils",
        "_rebuild_tensor_v3",
        Global::RebuildTensorV3,
    ),
    (
        "torch._utils",
        "_rebuild_parameter",
        Global::RebuildParameter,
    ),
    ("torch", "Size", Global::Size),
    ("torch", "device", Global::Device),
    ("torch", "DoubleStorage", Global::Storage(Some(DType::F64))),
    ("torch", "FloatStorage", Global::Storage(Some(DType::F32))),
    ("torch", "HalfStorage", Global::Storage(Some(DType::F16))),
    (
        "torch",
        "BFloat16Storage",
        Global::Storage(Some(DType::BF16)),
    ),
    ("torch", "LongStorage", Global::Storage(Some(DType::I64))),
    ("torch", "IntStorage", Global::Storage(Some(DType::I32))),
    ("torch", "ShortStorage", Global::Storage(Some(DType::I16))),
    ("torch", "CharStorage", Global::Storage(Some(DType::I8))),
    ("torch", "ByteStorage", Global::Storage(Some(DType::U8))),
    ("torch", "BoolStorage", Global::Storage(Some(DType::BOOL))),
    ("torch.storage", "UntypedStorage", Global::Storage(None)),
    ("torch.storage", "TypedStorage", Global::Storage(None)),
    ("torch", "UntypedStorage", Global::Storage(None)),
    ("torch", "float64", Global::Type(DType::F64)),
    ("torch", "float32", Global::Type(DType::F32)),
    ("torch", "float16", Global::Type(DType::F16)),
    ("torch", "bfloat16", Global::Type(DType::BF16)),
    ("torch", "float8_e4m3fn", Global::Type(DType::F8_E4M3)),
    ("torch", "float8_e5m2", Global::Type(DType::F8_E5M2)),
    ("torch", "int64", Global::Type(DType::I64)),
    ("torch", "int32", Global::Type(DType::I32)),
    ("torch", "int16", Global::Type(DType::I16)),
    ("torch", "int8", Global::Type(DType::I8)),
    ("torch", "uint64", Global::Type(DType::U64)),
    ("torch", "uint32", Global::Type(DType::U32)),
    ("torch", "uint16", Global::Type(DType::U16)),
    ("torch", "uint8", Global::Type(DType::U8)),
    ("torch", "bool", Global::Type(DType::BOOL)),
    // What the checkpoints of latent diffusion hold besides their weights.
    ("numpy", "dtype", Global::NumpyType),
    ("numpy.core.multiarray", "scalar", Global::NumpyScalar),
    ("numpy._core.multiarray", "scalar", Global::NumpyScalar),
    ("_codecs", "encode", Global::Encode),
    (
        "pytorch_lightning.callbacks.model_checkpoint",
        "ModelCheckpoint",
        Global::Label("ModelCheckpoint"),
    ),
];

/// A run of elements that a pickle refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    /// Its key: a number in practice.
    pub(super) key: &'a str,
    /// Type of its elements; none where it is only bytes.
    pub(super) dtype: Option<DType>,
    /// Number of elements, or of bytes.
    pub(super) count: u64,
}

impl Storage<'_> {
    /// Bytes of one element.
    pub(super) fn size(&self) -> u64 {
        self.dtype.map_or(1, |dtype| dtype.bitsize() as u64 / 8)
    }
}

/// A tensor as it lies in a storage; nothing of it is compared with the storage yet.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) storage: usize,
    pub(super) dtype: DType,
    /// First element.
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<u64>,
}

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    bytes: &'a [u8],
    objects: Vec<Object<'a>>,
    pub(super) storages: Vec<Storage<'a>>,
    by_key: HashMap<&'a str, usize>,
    pub(super) result: Value,
    /// The first byte behind it.
    pub(super) end: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that starts at a byte.
    ///
    /// # Errors
    /// [`Reason::PickleCut`], [`Reason::Pickle`], [`Reason::PickleName`],
    /// [`Reason::PickleInstruction`], [`Reason::TooMany`].
    pub(super) fn read(bytes: &'a [u8], start: usize) -> Result<Self> {
        let pickle = Pickle {
            bytes,
            objects: Vec::new(),
            storages: Vec::new(),
            by_key: HashMap::new(),
            result: Value::None,
            end: start,
        };
        let mut machine = Machine {
            pickle,
            at: start,
            started: start,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        machine.run()?;
        Ok(machine.pickle)
    }

    /// An object, where the value is one.
    pub(super) fn object(&self, value: Value) -> Option<&Object<'a>> {
        match value {
            Value::Object(number) => self.objects.get(number),
            _ => None,
        }
    }

    /// A text, where the value is one.
    pub(super) fn text(&self, value: Value) -> Option<&'a str> {
        match self.object(value)? {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    fn tuple(&self, value: Value) -> Option<&[Value]> {
        match self.object(value)? {
            Object::Tuple(items) => Some(items),
            _ => None,
        }
    }
}

struct Machine<'a> {
    pickle: Pickle<'a>,
    at: usize,
    /// First byte of the instruction, for errors.
    started: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<()> {
        if self.byte()? != 0x80 || !(2..=5).contains(&self.byte()?) {
            return self.wrong("it does not start with protocol 2 to 5");
        }
        for _ in 0..INSTRUCTION_LIMIT {
            self.started = self.at;
            let instruction = self.byte()?;
            if instruction == b'.' {
                let result = self.pop()?;
                if !self.stack.is_empty() || !self.marks.is_empty() {
                    return self.wrong("values are left over at its end");
                }
                self.pickle.result = result;
                self.pickle.end = self.at;
                return Ok(());
            }
            self.step(instruction)?;
        }
        Err(Error::new(Reason::TooMany {
            what: "instructions in the pickle",
            limit: INSTRUCTION_LIMIT,
        }))
    }

    fn step(&mut self, instruction: u8) -> Result<()> {
        match instruction {
            // FRAME: where a buffered reader may stop; only its length can be wrong.
            0x95 => {
                let length = self.number(8)?;
                if length > self.left().len() as u64 {
                    return Err(Error::new(Reason::PickleCut));
                }
            }
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' => self.integer(1)?,
            b'M' => self.integer(2)?,
            b'J' => {
                let value = self.number(4)? as u32 as i32;
                self.stack.push(Value::Int(value.into()));
            }
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            b'G' => {
                let value = f64::from_bits(self.number(8)?.swap_bytes());
                self.stack.push(Value::Float(value));
            }
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8, SHORT_BINSTRING, BINSTRING
            0x8c | b'U' => self.text(1)?,
            b'X' | b'T' => self.text(4)?,
            0x8d => self.text(8)?,
            // SHORT_BINBYTES, BINBYTES, BINBYTES8
            b'C' => self.raw(1)?,
            b'B' => self.raw(4)?,
            0x8e => self.raw(8)?,
            b'}' => self.object(Object::Dict(Vec::new())),
            b']' => self.object(Object::List(Vec::new())),
            b')' => self.object(Object::Tuple(Vec::new())),
            b't' => {
                let items = self.since_mark()?;
                self.object(Object::Tuple(items));
            }
            0x85..=0x87 => self.tuple_of(usize::from(instruction - 0x84))?,
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.append(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.put_items(vec![key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.put_items(items)?;
            }
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' | b'r' => {
                let place = self.number(if instruction == b'q' { 1 } else { 4 })?;
                self.remember(place)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.global(module, name)?;
            }
            0x93 => self.global_of_texts()?,
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?;
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)?;
            }
            b'b' => self.build()?,
            other => {
                return Err(Error::new(Reason::PickleInstruction {
                    code: other,
                    at: self.started,
                }));
            }
        }
        Ok(())
    }

    fn tuple_of(&mut self, count: usize) -> Result<()> {
        let start = self.stack.len().checked_sub(count);
        let floor = self.marks.last().copied().unwrap_or(0);
        let Some(start) = start.filter(|start| *start >= floor) else {
            return self.wrong("a value is missing");
        };
        let items = self.stack.split_off(start);
        self.object(Object::Tuple(items));
        Ok(())
    }

    /// State of an object: `_metadata` of a state dictionary, which says nothing about tensors.
    fn build(&mut self) -> Result<()> {
        let state = self.pop()?;
        let target = self.top()?;
        let is = |value, test: fn(&Object) -> bool| self.pickle.object(value).is_some_and(test);
        let dict = |object: &Object| matches!(object, Object::Dict(_));
        let number = |object: &Object| matches!(object, Object::Number(_));
        if is(target, number) {
            // Version, order of the bytes, and what only structures have.
            let order = self.pickle.tuple(state).and_then(|items| items.get(1));
            let order = order.and_then(|order| self.pickle.text(*order));
            if order != Some("<") {
                return self.wrong("a number that is not in little-endian order");
            }
        } else if !is(target, dict) || !is(state, dict) {
            return self.wrong("state for something that is no state dictionary");
        }
        Ok(())
    }

    fn wrong<T>(&self, problem: &'static str) -> Result<T> {
        Err(Error::new(Reason::Pickle {
            at: self.started,
            problem: problem.to_owned(),
        }))
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.number(1)? as u8)
    }

    fn left(&self) -> &'a [u8] {
        self.pickle.bytes.get(self.at..).unwrap_or_default()
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let taken = usize::try_from(count)
            .ok()
            .and_then(|count| self.left().get(..count));
        let taken = taken.ok_or_else(|| Error::new(Reason::PickleCut))?;
        self.at += taken.len();
        Ok(taken)
    }

    /// An unsigned number of one to eight bytes.
    fn number(&mut self, size: u64) -> Result<u64> {
        let bytes = self.take(size)?.iter().rev();
        Ok(bytes.fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn integer(&mut self, size: u64) -> Result<()> {
        let value = self.number(size)?;
        self.stack.push(Value::Int(value.into()));
        Ok(())
    }

    fn long(&mut self, size: u64) -> Result<()> {
        let length = self.number(size)?;
        let taken = self.take(length)?;
        if taken.len() > 16 {
            return self.wrong("an integer of more than 16 bytes");
        }
        let sign = taken
            .last()
            .map_or(0, |last| if *last >= 0x80 { 0xff } else { 0 });
        let mut bytes = [sign; 16];
        for (byte, taken) in bytes.iter_mut().zip(taken) {
            *byte = *taken;
        }
        self.stack.push(Value::Int(i128::from_le_bytes(bytes)));
        Ok(())
    }

    fn text(&mut self, size: u64) -> Result<()> {
        let length = self.number(size)?;
        let Ok(text) = std::str::from_utf8(self.take(length)?) else {
            return self.wrong("a text is not valid UTF-8");
        };
        self.object(Object::Text(text));
        Ok(())
    }

    fn raw(&mut self, size: u64) -> Result<()> {
        let length = self.number(size)?;
        let bytes = self.take(length)?;
        self.object(Object::Bytes(bytes));
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str> {
        let mut window = self.left().iter().take(WORD_LIMIT + 1);
        let Some(end) = window.position(|byte| *byte == b'\n') else {
            if self.left().len() <= WORD_LIMIT {
                return Err(Error::new(Reason::PickleCut));
            }
            return self.wrong("a name is too long");
        };
        let line = self.take(end as u64)?;
        self.at += 1;
        match std::str::from_utf8(line) {
            Ok(text) => Ok(text),
            Err(_) => self.wrong("a name is not valid UTF-8"),
        }
    }

    fn object(&mut self, object: Object<'a>) {
        self.stack.push(Value::Object(self.pickle.objects.len()));
        self.pickle.objects.push(object);
    }

    fn pop(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(value) if self.stack.len() >= floor => Ok(value),
            _ => self.wrong("a value is missing"),
        }
    }

    fn top(&self) -> Result<Value> {
        match self.stack.last() {
            Some(value) if self.stack.len() > self.marks.last().copied().unwrap_or(0) => Ok(*value),
            _ => self.wrong("a value is missing"),
        }
    }

    fn since_mark(&mut self) -> Result<Vec<Value>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => self.wrong("a mark is missing"),
        }
    }

    fn append(&mut self, items: Vec<Value>) -> Result<()> {
        if let Value::Object(number) = self.top()?
            && let Some(Object::List(list)) = self.pickle.objects.get_mut(number)
        {
            list.extend(items);
            return Ok(());
        }
        self.wrong("something is appended to what is no list")
    }

    fn put_items(&mut self, items: Vec<Value>) -> Result<()> {
        let (pairs, []) = items.as_chunks() else {
            return self.wrong("a key without a value");
        };
        if let Value::Object(number) = self.top()?
            && let Some(Object::Dict(dict)) = self.pickle.objects.get_mut(number)
        {
            dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
            return Ok(());
        }
        self.wrong("an item for what is no dictionary")
    }

    fn remember(&mut self, place: u64) -> Result<()> {
        let value = self.top()?;
        self.memo.insert(place, value);
        Ok(())
    }

    fn recall(&mut self, size: u64) -> Result<()> {
        let place = self.number(size)?;
        match self.memo.get(&place) {
            Some(value) => self.stack.push(*value),
            None => return self.wrong("it refers to what it has not defined"),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
        let known = GLOBALS.iter().find(|(m, n, _)| (*m, *n) == (module, name));
        let Some((_, _, global)) = known else {
            let short = |text: &str| text.chars().take(WORD_LIMIT).collect::<String>();
            return Err(Error::new(Reason::PickleName {
                name: format!("{}.{}", short(module), short(name)),
            }));
        };
        self.stack.push(Value::Global(*global));
        Ok(())
    }

    fn global_of_texts(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (self.pickle.text(module), self.pickle.text(name)) {
            (Some(module), Some(name)) => self.global(module, name),
            _ => self.wrong("a name is no text"),
        }
    }

    /// A persistent id: `('storage', class, key, device, count)`, and in old files a view of it.
    fn storage(&mut self, id: Value) -> Result<()> {
        let storage = self.pickle.tuple(id).and_then(|items| {
            let (head, view) = items.split_at_checked(5)?;
            if !matches!(view, [] | [Value::None]) {
                return None;
            }
            let [
                kind,
                Value::Global(Global::Storage(dtype)),
                key,
                device,
                Value::Int(count),
            ] = head
            else {
                return None;
            };
            self.pickle.text(*device)?;
            let key = self.pickle.text(*key)?;
            let sound = self.pickle.text(*kind)? == "storage" && key.len() <= WORD_LIMIT;
            sound.then_some(Storage {
                key,
                dtype: *dtype,
                count: u64::try_from(*count).ok()?,
            })
        });
        let Some(storage) = storage else {
            return self.wrong("a reference that is no storage");
        };
        let number = match self.pickle.by_key.get(storage.key) {
            Some(number) if self.pickle.storages.get(*number) == Some(&storage) => *number,
            Some(_) => return self.wrong("one storage with two types or lengths"),
            None => {
                let number = self.pickle.storages.len();
                self.pickle.by_key.insert(storage.key, number);
                self.pickle.storages.push(storage);
                number
            }
        };
        self.object(Object::Storage(number));
        Ok(())
    }

    fn call(&mut self, function: Value, arguments: Value) -> Result<()> {
        let Value::Global(function) = function else {
            return self.wrong("a call of what is no function");
        };
        let Some(items) = self.pickle.tuple(arguments) else {
            return self.wrong("a call without arguments");
        };
        match (function, items) {
            (Global::OrderedDict, []) => self.object(Object::Dict(Vec::new())),
            (Global::Device, _) => self.object(Object::Device),
            (Global::Size, [sizes]) if self.pickle.tuple(*sizes).is_some() => {
                let sizes = *sizes;
                self.stack.push(sizes);
            }
            // Data, whether it needs gradients, and hooks.
            (Global::RebuildParameter, [data, Value::Bool(_), _])
                if matches!(self.pickle.object(*data), Some(Object::Tensor(_))) =>
            {
                let data = *data;
                self.stack.push(data);
            }
            (Global::RebuildTensor, [storage, offset, shape, strides]) => {
                let view = self.view(*storage, *offset, *shape, *strides, None)?;
                self.object(Object::Tensor(view));
            }
            (
                Global::RebuildTensorV2,
                [
                    storage,
                    offset,
                    shape,
                    strides,
                    Value::Bool(_),
                    _,
                    rest @ ..,
                ],
            ) if self.plain(rest) => {
                let view = self.view(*storage, *offset, *shape, *strides, None)?;
                self.object(Object::Tensor(view));
            }
            (
                Global::RebuildTensorV3,
                [
                    storage,
                    offset,
                    shape,
                    strides,
                    Value::Bool(_),
                    _,
                    Value::Global(Global::Type(dtype)),
                    rest @ ..,
                ],
            ) if self.plain(rest) => {
                let view = self.view(*storage, *offset, *shape, *strides, Some(*dtype))?;
                self.object(Object::Tensor(view));
            }
            // The text of a type, and two flags about copying it.
            (Global::NumpyType, [code, Value::Bool(_), Value::Bool(_)]) => {
                let number = match self.pickle.text(*code) {
                    Some("f8") => Number::F64,
                    Some("f4") => Number::F32,
                    Some("i8") => Number::I64,
                    Some("i4") => Number::I32,
                    _ => return self.wrong("a number of a type that is not read"),
                };
                self.object(Object::Number(number));
            }
            (Global::Encode, [text, encoding]) if self.pickle.text(*encoding) == Some("latin1") => {
                let Some(text) = self.pickle.text(*text) else {
                    return self.wrong("bytes that are spelled by no text");
                };
                self.object(Object::Spelled(text));
            }
            (Global::NumpyScalar, [number, bytes]) => {
                let value = self.scalar(*number, *bytes);
                match value {
                    Some(value) => self.stack.push(value),
                    None => return self.wrong("a number of numpy without its bytes"),
                }
            }
            _ => return self.wrong("a call with other arguments than torch gives it"),
        }
        Ok(())
    }

    fn scalar(&self, number: Value, bytes: Value) -> Option<Value> {
        let Some(Object::Number(number)) = self.pickle.object(number) else {
            return None;
        };
        let bytes: Vec<u8> = match self.pickle.object(bytes)? {
            Object::Bytes(bytes) if bytes.len() <= 8 => bytes.to_vec(),
            // Characters of one or two bytes each.
            Object::Spelled(text) if text.len() <= 16 => {
                let bytes = text.chars().map(|c| u8::try_from(u32::from(c)).ok());
                bytes.collect::<Option<_>>()?
            }
            _ => return None,
        };
        Some(match number {
            Number::F64 => Value::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            Number::F32 => Value::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            Number::I64 => Value::Int(i64::from_le_bytes(bytes.try_into().ok()?).into()),
            Number::I32 => Value::Int(i32::from_le_bytes(bytes.try_into().ok()?).into()),
        })
    }

    /// Whether a tensor has no marks such as "conjugate" or "negative", which change its values.
    fn plain(&self, metadata: &[Value]) -> bool {
        match metadata {
            [] | [Value::None] => true,
            [one] => {
                matches!(self.pickle.object(*one), Some(Object::Dict(marks)) if marks.is_empty())
            }
            _ => false,
        }
    }

    fn view(
        &self,
        storage: Value,
        offset: Value,
        shape: Value,
        strides: Value,
        dtype: Option<DType>,
    ) -> Result<View> {
        let Some(Object::Storage(storage)) = self.pickle.object(storage) else {
            return self.wrong("a tensor without a storage");
        };
        let known = self.pickle.storages.get(*storage);
        let dtype = match (known.and_then(|known| known.dtype), dtype) {
            (Some(known), None) => known,
            (None, Some(dtype)) => dtype,
            (Some(known), Some(dtype)) if known == dtype => dtype,
            _ => return self.wrong("a tensor without one type"),
        };
        let (Some(shape), Some(strides)) = (self.pickle.tuple(shape), self.pickle.tuple(strides))
        else {
            return self.wrong("a tensor without a shape");
        };
        if shape.len() != strides.len() {
            return self.wrong("a shape and strides of different lengths");
        }
        if shape.len() > DIMENSION_LIMIT {
            return Err(Error::new(Reason::TooMany {
                what: "dimensions",
                limit: DIMENSION_LIMIT,
            }));
        }
        let number = |value: &Value| match value {
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        };
        let sizes: Option<Vec<usize>> = shape
            .iter()
            .map(|value| usize::try_from(number(value)?).ok())
            .collect();
        let strides: Option<Vec<u64>> = strides.iter().map(number).collect();
        match (number(&offset), sizes, strides) {
            (Some(offset), Some(shape), Some(strides)) => Ok(View {
                storage: *storage,
                dtype,
                offset,
                shape,
                strides,
            }),
            _ => self.wrong("a size, stride or offset that is no number from 0 to 2⁶⁴"),
        }
    }
}
