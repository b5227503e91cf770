//! Changes to a model's `config.json`, keeping every other byte of its values.

use indexmap::IndexMap;
use serde_json::value::RawValue;

use crate::error::{Error, Reason, Result};

/// A change: the field, its new JSON text, and whether the field is added where it is missing.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Edit {
    /// The field, at the top level; the same field of `text_config` follows where it is there.
    pub field: &'static str,
    /// Its new value, as JSON.
    pub value: String,
    /// Whether the top level gets it where nobody has it.
    pub insert: bool,
}

/// Sub-configurations whose fields follow.
const NESTED: &[&str] = &["text_config", "llm_config", "language_config"];

/// Applies changes to the text of a `config.json`.
///
/// Returns the text unchanged if no change applies. Values that are not changed keep their text.
///
/// # Errors
/// [`Reason::NotJson`].
pub fn edit(text: &[u8], edits: &[Edit]) -> Result<Vec<u8>> {
    let text_without_mark = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let fail = |problem: serde_json::Error| {
        Error::new(Reason::NotJson {
            problem: problem.to_string(),
        })
    };
    let mut object: IndexMap<String, Box<RawValue>> =
        serde_json::from_slice(text_without_mark).map_err(fail)?;
    let mut changed = false;
    for change in edits {
        let value = RawValue::from_string(change.value.clone()).map_err(fail)?;
        let mut placed = false;
        for nested in NESTED {
            let Some(raw) = object.get(*nested) else {
                continue;
            };
            let Ok(mut inner) = serde_json::from_str::<IndexMap<String, Box<RawValue>>>(raw.get())
            else {
                continue;
            };
            if let Some(old) = inner.get_mut(change.field) {
                placed = true;
                if old.get() != value.get() {
                    *old = value.clone();
                    let text = written(&inner, 1);
                    object.insert(
                        (*nested).to_owned(),
                        RawValue::from_string(text).map_err(fail)?,
                    );
                    changed = true;
                }
            }
        }
        match object.get_mut(change.field) {
            Some(old) if old.get() != value.get() => {
                *old = value;
                changed = true;
            }
            Some(_) => {}
            None if change.insert && !placed => {
                object.insert(change.field.to_owned(), value);
                changed = true;
            }
            None => {}
        }
    }
    if !changed {
        return Ok(text.to_vec());
    }
    let mut text = written(&object, 0);
    text.push('\n');
    Ok(text.into_bytes())
}

/// An object with two spaces of indentation, as transformers writes it.
fn written(object: &IndexMap<String, Box<RawValue>>, depth: usize) -> String {
    let indent = "  ".repeat(depth + 1);
    let entries: Vec<String> = object
        .iter()
        .map(|(key, value)| {
            format!(
                "{indent}{}: {}",
                serde_json::Value::from(key.as_str()),
                value.get()
            )
        })
        .collect();
    format!("{{\n{}\n{}}}", entries.join(",\n"), "  ".repeat(depth))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(field: &'static str, value: &str, insert: bool) -> Edit {
        Edit {
            field,
            value: value.into(),
            insert,
        }
    }

    #[test]
    fn only_the_named_fields_change() {
        let text = "{\n  \"eps\": 1e-05,\n  \"rope\": {\n    \"theta\": 10000.0\n  },\n  \"vocab_size\": 64\n}\n";
        let edited = edit(text.as_bytes(), &[change("vocab_size", "70", false)]).unwrap();
        assert_eq!(String::from_utf8(edited).unwrap(), text.replace("64", "70"));
    }

    #[test]
    fn nothing_to_change_returns_the_very_bytes() {
        let text = b"{\"a\":1,   \"b\":[2]}";
        assert_eq!(
            edit(text, &[change("a", "1", true), change("c", "2", false)]).unwrap(),
            text
        );
    }

    #[test]
    fn a_nested_text_configuration_follows() {
        let text = b"{\"text_config\": {\"vocab_size\": 5}, \"model_type\": \"x\"}";
        let edited = edit(text, &[change("vocab_size", "6", true)]).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&edited).unwrap();
        assert_eq!(value["text_config"]["vocab_size"], 6);
        assert!(value.get("vocab_size").is_none());
    }
}
