//! `model.safetensors.index.json`: which shard holds which tensor.
//!
//! Source: `huggingface/transformers`, `src/transformers/modeling_utils.py` (`save_pretrained`): two
//! spaces of indentation, keys sorted, a newline at the end.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use crate::error::{Error, Reason, Result};
use crate::json::{Document, Object, Value};
use crate::mapped::{Input, is_there};
use crate::printable::acts_on_a_terminal;

/// Most values of an index.
const VALUES: usize = 1_000_000;

/// Most values of a `config.json` (label lists can be long).
const CONFIG_VALUES: usize = 200_000;

/// The configuration of a model.
pub(super) const CONFIG: &str = "config.json";

/// An index that was read.
pub(super) struct Index {
    /// The file.
    pub(super) input: std::sync::Arc<Input>,
    /// Tensor to shard, in file order.
    pub(super) weight_map: Vec<(String, String)>,
    /// The other statements.
    pub(super) metadata: Object,
}

impl Index {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let Document { input, object } = Document::read(path, VALUES)?;
        let (weight_map, metadata) = Self::parse(object).map_err(|e| e.in_file(path))?;
        Ok(Index {
            input,
            weight_map,
            metadata,
        })
    }

    fn parse(mut object: Object) -> Result<(Vec<(String, String)>, Object)> {
        let metadata = match object.get("metadata") {
            Some(Value::Object(metadata)) => metadata.clone(),
            None | Some(Value::Null) => Object::default(),
            Some(_) => {
                return Err(Error::new(Reason::FieldType {
                    expected: "an object",
                })
                .on("metadata"));
            }
        };
        let position = object.0.iter().position(|(key, _)| key == "weight_map");
        let map = match position.map(|at| object.0.swap_remove(at).1) {
            Some(Value::Object(map)) => map.0,
            Some(_) => {
                return Err(Error::new(Reason::FieldType {
                    expected: "an object",
                })
                .on("weight_map"));
            }
            None => {
                return Err(Error::new(Reason::FieldMissing {
                    field: "weight_map",
                }));
            }
        };
        let mut weight_map = Vec::with_capacity(map.len());
        for (tensor, shard) in map {
            let Value::String(shard) = shard else {
                return Err(Error::new(Reason::FieldType {
                    expected: "a file name",
                })
                .on(tensor));
            };
            if !is_plain_file_name(&shard) {
                return Err(Error::new(Reason::ShardName { name: shard }).on(tensor));
            }
            weight_map.push((tensor, shard));
        }
        Ok((weight_map, metadata))
    }
}

/// A name in this folder: no separators, no parents, no drive, nothing a terminal would act on.
pub(super) fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name
            .chars()
            .any(|c| matches!(c, '/' | '\\' | ':' | '\0') || acts_on_a_terminal(c))
}

/// The text of an index.
pub(super) fn text(
    metadata: &Object,
    total_size: u64,
    total_parameters: u64,
    weight_map: &BTreeMap<&str, &str>,
) -> String {
    let mut entries = Map::new();
    let mut statements: Vec<&(String, Value)> = metadata.0.iter().collect();
    statements.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, value) in statements {
        // Totals are recomputed; what else is stated (a string or a number) is kept.
        match value {
            Value::String(text) => entries.insert(name.clone(), json!(text)),
            Value::Integer(number) => entries.insert(name.clone(), json!(number)),
            Value::Float(number) => entries.insert(name.clone(), json!(number)),
            Value::Bool(value) => entries.insert(name.clone(), json!(value)),
            _ => None,
        };
    }
    if entries.contains_key("total_parameters") {
        entries.insert("total_parameters".into(), json!(total_parameters));
    }
    entries.insert("total_size".into(), json!(total_size));
    let map: Map<String, Json> = weight_map
        .iter()
        .map(|(tensor, shard)| ((*tensor).to_owned(), json!(shard)))
        .collect();
    let index = json!({ "metadata": entries, "weight_map": map });
    let mut text = serde_json::to_string_pretty(&index).expect("an index is plain JSON");
    text.push('\n');
    text
}

/// Reads `config.json`.
pub(super) fn model_config(folder: &Path) -> Result<Option<Document>> {
    let path = folder.join(CONFIG);
    if is_there(&path) {
        Document::read(&path, CONFIG_VALUES).map(Some)
    } else {
        Ok(None)
    }
}
