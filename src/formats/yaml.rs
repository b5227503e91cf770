//! The plain lines `key: value` of a YAML file; everything nested is passed over.
//!
//! Source: `Lightning-AI/litgpt`, `litgpt/utils.py` (`save_hyperparameters`, `save_config`): block style, one
//! setting a line. Nothing else of YAML is understood, and no value has a type.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

/// Largest file.
const BYTES: u64 = 1 << 20;

/// A file of settings.
pub(super) struct Settings {
    pub(super) input: Arc<Input>,
    values: BTreeMap<String, String>,
}

impl Settings {
    /// Reads a file of at most 1 MiB.
    ///
    /// # Errors
    /// What opening it gives; [`Reason::NotUtf8`], [`Reason::DuplicateKey`].
    pub(super) fn read(path: &Path) -> Result<Self> {
        let input = Arc::new(Input::open(path)?);
        let bytes = input.read_all(BYTES)?;
        let values = parse(&bytes).map_err(|e| e.in_file(path))?;
        Ok(Settings { input, values })
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }
}

fn parse(bytes: &[u8]) -> Result<BTreeMap<String, String>> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        Error::new(Reason::NotUtf8 { at })
    })?;
    let mut values = BTreeMap::new();
    for line in text.lines() {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        // Indented lines, list items and comments have no plain key.
        if key.is_empty() || !key.chars().all(plain) {
            continue;
        }
        let value = value.split(" #").next().unwrap_or("").trim();
        if values.insert(key.to_owned(), value.to_owned()).is_some() {
            let key = key.to_owned();
            return Err(Error::new(Reason::DuplicateKey { key }));
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_are_settings_and_nested_ones_are_passed_over() {
        let text =
            b"lora_r: 8\n# lora_r: 9\ndata:\n  lora_r: 10\n- lora_r: 11\nlora_query: true # q\n";
        let values = parse(text).unwrap();
        let get = |key: &str| values.get(key).map(String::as_str);
        assert_eq!(get("lora_r"), Some("8"));
        assert_eq!(get("lora_query"), Some("true"));
        assert_eq!(values.len(), 3);
    }

    #[test]
    fn a_setting_that_is_there_twice_is_refused() {
        let error = parse(b"lora_r: 8\nlora_r: 9\n").unwrap_err();
        assert!(matches!(error.reason(), Reason::DuplicateKey { .. }));
    }
}
