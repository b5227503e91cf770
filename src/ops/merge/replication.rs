//! Layers that an adapter repeats before anything is merged.

use super::plan::{Opened, PlannedTensor};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::Edit;
use crate::containers::safetensors::TENSOR_LIMIT;
use crate::error::{Error, Reason, Result};
use crate::json::Value;

/// The tensors of the output before anything is merged: the base's, its layers perhaps repeated.
///
/// PEFT lets repeated layers share their storage and then adds every replica's delta to it, which is
/// not what the trained model computes; here each replica is a layer of its own.
pub(super) fn replicate(
    base: &Checkpoint,
    adapters: &[Opened],
    edits: &mut Vec<Edit>,
) -> Result<Vec<PlannedTensor>> {
    let mut tensors = Vec::new();
    let replicated: Vec<&Opened> = adapters
        .iter()
        .filter(|opened| !opened.adapter.replication.is_empty())
        .collect();
    let all = base.shards.iter().enumerate().flat_map(|(index, shard)| {
        shard
            .file
            .directory
            .tensors
            .iter()
            .map(move |tensor| (index, tensor))
    });
    let replication = match replicated.as_slice() {
        [] => {
            tensors.extend(
                all.map(|(shard, tensor)| PlannedTensor::of(tensor, tensor.name.clone(), shard)),
            );
            return Ok(tensors);
        }
        [only] if adapters.len() == 1 => only,
        [first, ..] => {
            return Err(Error::new(Reason::ReplicationTwice).in_file(&first.found.path));
        }
    };
    let fail = |reason| {
        Error::new(reason)
            .in_file(&replication.found.path)
            .on("layer_replication")
    };
    let prefix = layer_prefix(base).map_err(fail)?;
    let layer_of = |name: &str| {
        let rest = name.strip_prefix(&prefix)?;
        let (number, rest) = rest.split_once('.')?;
        Some((number.parse::<usize>().ok()?, rest.to_owned()))
    };
    let layers = base
        .tensors()
        .filter_map(|tensor| layer_of(&tensor.name))
        .map(|(n, _)| n + 1)
        .max()
        .unwrap_or(0);
    let sources = sources(&replication.adapter.replication, layers).map_err(fail)?;
    for (shard, tensor) in all {
        if tensors.len() > TENSOR_LIMIT {
            return Err(fail(Reason::TooMany {
                what: "tensors",
                limit: TENSOR_LIMIT,
            }));
        }
        match layer_of(&tensor.name) {
            None => tensors.push(PlannedTensor::of(tensor, tensor.name.clone(), shard)),
            Some((layer, rest)) => {
                let copies = sources
                    .iter()
                    .enumerate()
                    .filter(|(_, from)| **from == layer);
                tensors.extend(copies.map(|(new, _)| {
                    PlannedTensor::of(tensor, format!("{prefix}{new}.{rest}"), shard)
                }));
            }
        }
    }
    for field in ["num_hidden_layers", "n_layer", "num_layers"] {
        edits.push(Edit {
            field,
            value: sources.len().to_string(),
            insert: false,
        });
    }
    edits.extend(
        PER_LAYER
            .iter()
            .filter_map(|field| repeated(base, field, layers, &sources)),
    );
    Ok(tensors)
}

/// The layer of the base that each layer of the result is.
fn sources(ranges: &[(usize, usize)], layers: usize) -> Result<Vec<usize>, Reason> {
    let mut sources = Vec::new();
    for (first, end) in ranges {
        if *end > layers {
            return Err(Reason::ReplicationRange {
                first: *first,
                last: *end,
                layers,
            });
        }
        // Before the range is spelled out: it is a number from a file.
        if sources.len() + (end - first) > LAYER_LIMIT {
            return Err(Reason::TooMany {
                what: "layers",
                limit: LAYER_LIMIT,
            });
        }
        sources.extend(*first..*end);
    }
    Ok(sources)
}

/// Most layers of a result; the deepest published model has 126.
const LAYER_LIMIT: usize = 2_000;

/// Lists in `config.json` with one entry per layer; transformers refuses them if their length is not
/// the number of layers.
const PER_LAYER: &[&str] = &["layer_types", "mlp_layer_types", "no_rope_layers"];

/// The list of a configuration, repeated as the layers are.
fn repeated(
    base: &Checkpoint,
    field: &'static str,
    layers: usize,
    sources: &[usize],
) -> Option<Edit> {
    let Some(Value::Array(values)) = base.configured(field) else {
        return None;
    };
    if values.len() != layers {
        return None;
    }
    let texts: Option<Vec<String>> = sources
        .iter()
        .map(|layer| match &values[*layer] {
            Value::String(text) => Some(serde_json::Value::from(text.as_str()).to_string()),
            value @ (Value::Integer(_) | Value::Bool(_)) => Some(value.to_string()),
            _ => None,
        })
        .collect();
    Some(Edit {
        field,
        value: format!("[{}]", texts?.join(", ")),
        insert: false,
    })
}

/// The one list of layers of a model: what comes before the number.
fn layer_prefix(base: &Checkpoint) -> Result<String, Reason> {
    let mut prefixes: Vec<&str> = base
        .tensors()
        .filter_map(|tensor| {
            // The lists that PEFT's `replicate_layers` knows.
            ["layers.", "encoder.layer.", "h."].iter().find_map(|list| {
                let at = tensor.name.find(list)?;
                let whole = at == 0 || tensor.name.as_bytes()[at - 1] == b'.';
                let rest = &tensor.name[at + list.len()..];
                let numbered = rest
                    .split('.')
                    .next()
                    .is_some_and(|number| number.parse::<usize>().is_ok());
                (whole && numbered).then(|| &tensor.name[..at + list.len()])
            })
        })
        .collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    match prefixes.as_slice() {
        [only] => Ok((*only).to_owned()),
        _ => Err(Reason::FieldValue {
            problem: format!(
                "the base has {} lists of layers, one is needed",
                prefixes.len()
            ),
        }),
    }
}
