//! LitGPT: `transformer.h.0.attn.qkv.lora_A` in `lit_model.pth.lora`, with settings in two YAML files.
//!
//! Source: `Lightning-AI/litgpt`, `litgpt/lora.py` (`LoRALinear`, `LoRAQKVLinear`) and
//! `litgpt/scripts/merge_lora.py`. `attn.qkv` is fused: A holds one block of r rows for each adapted part, B the
//! rows of these parts, r columns each. Which parts are adapted says `hyperparameters.yaml`, how many rows a part
//! has `model_config.yaml`. Before the layer was called `qkv` it was `attn.attn`, with heads of one group side by
//! side; that order is not read.

use super::blocks::block_diagonal;
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};
use crate::methods::lora;
use crate::naming::Spelling;

/// The format.
pub(super) struct Litgpt;

/// Where the settings are.
pub(super) const SETTINGS: &[&str] = &["hyperparameters.yaml", "model_config.yaml"];

/// Layers whose names no other tool has.
const MARKS: &[&str] = &[
    ".attn.qkv.lora_A",
    ".attn.attn.lora_A",
    ".attn.proj.lora_A",
    ".mlp.fc.lora_A",
    ".mlp.fc_1.lora_A",
    ".mlp.fc_2.lora_A",
    ".mlp.proj.lora_A",
];

impl Format for Litgpt {
    fn id(&self) -> &'static str {
        "litgpt"
    }

    fn name(&self) -> &'static str {
        "LitGPT"
    }

    fn recognises(&self, found: &Found) -> bool {
        found
            .names()
            .any(|name| MARKS.iter().any(|mark| name.ends_with(mark)))
            || found.settings("lora_r").is_some()
                && found.names().any(|name| name.ends_with(".lora_A"))
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::Dotted);
        let mut old = Vec::new();
        for tensor in &found.file.directory.tensors {
            // Fabric saves the state under the name of the model.
            let name = tensor.name.strip_prefix("model.").unwrap_or(&tensor.name);
            let (path, role) = match name.rsplit_once('.') {
                Some((path, "lora_A")) => (path, lora::DOWN),
                Some((path, "lora_B")) => (path, lora::UP),
                _ => {
                    pieces.unknown(tensor);
                    continue;
                }
            };
            if path.ends_with(".attn.attn") {
                old.push(tensor.name.clone());
            } else if role == lora::UP && path.ends_with(".attn.qkv") {
                let whole = block_diagonal(tensor, &parts(found)?)?;
                pieces.add(path.to_owned(), Piece::Factor(role), &whole);
            } else {
                pieces.add(path.to_owned(), Piece::Factor(role), tensor);
            }
        }
        if !old.is_empty() {
            let problem = "its fused layers are those of an old release, in another order of rows (`attn.attn`), which is not supported".to_owned();
            return Err(Error::new(Reason::Stored { problem }).with_cases(old));
        }
        let alpha = match found.settings("lora_alpha") {
            Some(_) => number(found, "lora_alpha")?,
            None => options.alpha()?,
        };
        pieces.finish(found, facts("LitGPT", self.summary(found)), |path| {
            Ok(Told {
                alpha: Some(alpha),
                // The divisor is the rank of one part.
                parts: match path.ends_with(".attn.qkv") {
                    true => parts(found)?.iter().filter(|part| part.1).count(),
                    false => 1,
                },
                ..Told::default()
            })
        })
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, &[(".lora_B", 1)])
    }
}

/// The rows of queries, keys and values, and which of them are adapted.
fn parts(found: &Found) -> Result<[(usize, bool); 3]> {
    let count = |key| {
        let value = number(found, key)?;
        let whole = (0.0..=1e9).contains(&value) && value.fract() == 0.0;
        let expected = "a whole number";
        match whole {
            true => Ok(value as usize),
            false => Err(Error::new(Reason::FieldType { expected }).on(key)),
        }
    };
    let flag = |key| match stated(found, key)? {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => {
            let expected = "true or false";
            Err(Error::new(Reason::FieldType { expected }).on(key))
        }
    };
    let size = count("head_size")?;
    let rows = |heads: usize| heads.saturating_mul(size);
    let (query, key) = (rows(count("n_head")?), rows(count("n_query_groups")?));
    Ok([
        (query, flag("lora_query")?),
        (key, flag("lora_key")?),
        (key, flag("lora_value")?),
    ])
}

fn stated<'a>(found: &'a Found, key: &'static str) -> Result<&'a str> {
    found.settings(key).ok_or_else(|| {
        Error::new(Reason::FieldMissing { field: key })
            .with_hint("put `hyperparameters.yaml` and `model_config.yaml`, which LitGPT writes with the adapter, beside it")
    })
}

fn number(found: &Found, key: &'static str) -> Result<f64> {
    let expected = "a number";
    let value = stated(found, key)?.parse().ok();
    value
        .filter(|value: &f64| value.is_finite())
        .ok_or_else(|| Error::new(Reason::FieldType { expected }).on(key))
}
