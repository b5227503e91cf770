//! JSON of strangers: one reading only.
//!
//! `serde_json` does the parsing. On top of it: a repeated key is an error (most readers keep the
//! last, some the first, and an attacker lives in the difference), order is kept (the first matching
//! `rank_pattern` wins), depth is capped by `serde_json` at 128, and the number of values is capped
//! before they are allocated.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

/// A JSON value whose objects keep their order and hold each key once.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A whole number that fits.
    Integer(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    String(String),
    /// A list.
    Array(Vec<Value>),
    /// Keys and values in file order.
    Object(Object),
}

/// The entries of a JSON object in file order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object(pub Vec<(String, Value)>);

impl Object {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value)
    }
}

impl Value {
    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The number, if it is one.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::Integer(number) => Some(number as f64),
            Value::Float(number) => Some(number),
            _ => None,
        }
    }

    /// The object, if it is one.
    pub fn as_object(&self) -> Option<&Object> {
        match self {
            Value::Object(object) => Some(object),
            _ => None,
        }
    }

    /// Whether it is null, false or empty: nothing that could matter.
    pub fn is_vacant(&self) -> bool {
        match self {
            Value::Null | Value::Bool(false) => true,
            Value::String(text) => text.is_empty(),
            Value::Array(values) => values.is_empty(),
            Value::Object(object) => object.0.is_empty(),
            _ => false,
        }
    }
}

impl From<&Value> for serde_json::Value {
    fn from(value: &Value) -> Self {
        match value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::String(value) => value.as_str().into(),
            Value::Array(values) => values.iter().map(serde_json::Value::from).collect(),
            Value::Object(object) => object.into(),
        }
    }
}

impl From<&Object> for serde_json::Value {
    fn from(object: &Object) -> Self {
        let entries = object.0.iter();
        entries
            .map(|(key, value)| (key.clone(), serde_json::Value::from(value)))
            .collect()
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::Integer(value) => write!(f, "{value}"),
            Value::Float(value) => write!(f, "{value}"),
            Value::String(value) => write!(f, "\"{value}\""),
            Value::Array(values) => write!(f, "a list of {}", values.len()),
            Value::Object(object) => write!(f, "an object of {}", object.0.len()),
        }
    }
}

/// A file that holds one JSON object.
#[derive(Debug)]
pub struct Document {
    /// The file.
    pub input: Arc<Input>,
    /// Its content.
    pub object: Object,
}

/// Largest JSON file, in bytes.
const BYTES: u64 = 64 << 20;

impl Document {
    /// Reads a file of at most 64 MiB with at most `limit` values.
    ///
    /// # Errors
    /// What opening the file or [`parse_object`] gives.
    pub fn read(path: impl AsRef<Path>, limit: usize) -> Result<Self> {
        let input = Arc::new(Input::open(path.as_ref())?);
        let bytes = input.read_all(BYTES)?;
        let object = parse_object(&bytes, limit).map_err(|e| e.in_file(path))?;
        Ok(Document { input, object })
    }
}

/// Parses a JSON object, allowing a byte order mark and at most `limit` values.
///
/// # Errors
/// [`Reason::NotUtf8`], [`Reason::NotJson`] (with line and column), [`Reason::DuplicateKey`],
/// [`Reason::TooMany`], [`Reason::TooDeep`], [`Reason::NotAnObject`].
pub fn parse_object(bytes: &[u8], limit: usize) -> Result<Object> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        Error::new(Reason::NotUtf8 {
            at: e.valid_up_to(),
        })
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let budget = Budget::new(limit);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parsed = Seed(&budget)
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    match parsed {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::new(Reason::NotAnObject)),
        Err(problem) => Err(budget.explain(problem)),
    }
}

/// Counts values, and keeps the reason why a parse was stopped by us rather than by `serde_json`.
pub(crate) struct Budget {
    left: Cell<usize>,
    limit: usize,
    stopped: Cell<Option<Reason>>,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Budget {
            left: Cell::new(limit),
            limit,
            stopped: Cell::new(None),
        }
    }

    pub(crate) fn spend<E: serde::de::Error>(&self, what: &'static str) -> Result<(), E> {
        match self.left.get().checked_sub(1) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => Err(self.stop(Reason::TooMany {
                what,
                limit: self.limit,
            })),
        }
    }

    pub(crate) fn stop<E: serde::de::Error>(&self, reason: Reason) -> E {
        let error = E::custom(&reason);
        self.stopped.set(Some(reason));
        error
    }

    pub(crate) fn explain(&self, problem: serde_json::Error) -> Error {
        if let Some(reason) = self.stopped.take() {
            return Error::new(reason);
        }
        let text = problem.to_string();
        Error::new(match text.starts_with("recursion limit exceeded") {
            true => Reason::TooDeep { limit: DEPTH },
            false => Reason::NotJson { problem: text },
        })
    }
}

/// The recursion limit that `serde_json` documents for its deserializer.
const DEPTH: usize = 128;

struct Seed<'a>(&'a Budget);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        self.0.spend("values")?;
        Ok(Value::Null)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        self.0.spend("values")?;
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        self.0.spend("values")?;
        Ok(Value::Integer(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        self.0.spend("values")?;
        Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        self.0.spend("values")?;
        Ok(Value::Float(value))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.0.spend("values")?;
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        self.0.spend("values")?;
        let mut values = Vec::new();
        while let Some(value) = sequence.next_element_seed(Seed(self.0))? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.0.spend("values")?;
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Seed(self.0))?;
            entries.push((key, value));
        }
        match repeated(&entries) {
            Some(key) => Err(self.0.stop(Reason::DuplicateKey { key })),
            None => Ok(Value::Object(Object(entries))),
        }
    }
}

/// The first key that was there before.
fn repeated<T>(entries: &[(String, T)]) -> Option<String> {
    let mut seen = HashSet::with_capacity(entries.len());
    let mut keys = entries.iter().map(|(key, _)| key);
    keys.find(|key| !seen.insert(key.as_str())).cloned()
}

/// A map of text to text (the metadata of a safetensors header) with each key once; the function counts
/// their bytes.
pub(crate) struct TextMap<'a>(
    pub(crate) &'a Budget,
    pub(crate) &'a mut dyn FnMut(usize) -> Result<(), Reason>,
);

impl<'de> DeserializeSeed<'de> for TextMap<'_> {
    type Value = Vec<(String, String)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        // MLX writes `null` where it has nothing to say, and the safetensors crate accepts it.
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for TextMap<'_> {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries: Vec<(String, String)> = Vec::new();
        while let Some(entry) = map.next_entry::<String, String>()? {
            self.0.spend("metadata entries")?;
            (self.1)(entry.0.len() + entry.1.len()).map_err(|reason| self.0.stop(reason))?;
            entries.push(entry);
        }
        match repeated(&entries) {
            Some(key) => Err(self.0.stop(Reason::DuplicateKey { key })),
            None => Ok(entries),
        }
    }
}
