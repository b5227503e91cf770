//! diffusers: three spellings of one file, `pytorch_lora_weights.safetensors`.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/lora_base.py`, `loaders/lora_conversion_utils.py`,
//! `utils/state_dict_utils.py`, `utils/peft_utils.py`. Paths are dotted, perhaps behind the name of a part
//! of the pipeline. The scale is that of `lora_adapter_metadata` (PEFT's configuration by part), or of a
//! tensor `alpha`, or 1.

use super::peft::Told as Configuration;
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{CONFIG_VALUES, Format, Found, ReadOptions, Summary};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};
use crate::json::{Object, parse_object};
use crate::methods::{dora, lora};
use crate::naming::path::without_wrappers;
use crate::naming::{Spelling, component};

/// One of the spellings; every one is read by the same rules.
pub(super) struct Diffusers {
    name: &'static str,
    recognises: fn(&Found) -> bool,
}

/// Attention processors: `….attn1.processor.to_q_lora.down.weight`.
pub(super) static OLD: Diffusers = Diffusers {
    name: "diffusers (attention processors)",
    recognises: |found| {
        found
            .names()
            .any(|name| name.contains(".processor.") && name.contains("_lora."))
    },
};

/// `….attn1.to_q.lora.down.weight`.
pub(super) static MID: Diffusers = Diffusers {
    name: "diffusers (lora.down, lora.up)",
    recognises: |found| {
        found.names().any(|name| {
            name.ends_with(".lora.down.weight") || name.ends_with(".lora_linear_layer.down.weight")
        })
    },
};

/// `….attn1.to_q.lora_A.weight`.
pub(super) static NEW: Diffusers = Diffusers {
    name: "diffusers (PEFT names)",
    recognises: |found| {
        found.metadata(METADATA).is_some()
            || found.names().any(|name| {
                let starts = |prefix: &&str| name.starts_with(*prefix);
                (of_part(name).is_some() || BARE.iter().any(starts))
                    && (name.contains(".lora_A.") || name.contains(".lora_down."))
            })
    },
};

/// PEFT's configuration, as JSON in the header.
const METADATA: &str = "lora_adapter_metadata";

/// How paths start where the name of the part was left out.
const BARE: &[&str] = &[
    "transformer_blocks.",
    "single_transformer_blocks.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
];

/// What follows the module.
const SUFFIXES: &[(&str, Piece)] = &[
    (".lora_A.weight", Piece::Factor(lora::DOWN)),
    (".lora_B.weight", Piece::Factor(lora::UP)),
    (".lora_A.default.weight", Piece::Factor(lora::DOWN)),
    (".lora_B.default.weight", Piece::Factor(lora::UP)),
    (".lora_B.bias", Piece::Factor(lora::BIAS)),
    (".lora_magnitude_vector", Piece::Factor(dora::MAGNITUDE)),
    (
        ".lora_magnitude_vector.weight",
        Piece::Factor(dora::MAGNITUDE),
    ),
    (".lora_down.weight", Piece::Factor(lora::DOWN)),
    (".lora_up.weight", Piece::Factor(lora::UP)),
    (".dora_scale", Piece::DoraScale),
    (".lora.down.weight", Piece::Factor(lora::DOWN)),
    (".lora.up.weight", Piece::Factor(lora::UP)),
    (".lora_linear_layer.down.weight", Piece::Factor(lora::DOWN)),
    (".lora_linear_layer.up.weight", Piece::Factor(lora::UP)),
    ("_lora.down.weight", Piece::Factor(lora::DOWN)),
    ("_lora.up.weight", Piece::Factor(lora::UP)),
    (".lora.alpha", Piece::Alpha),
    (".lora_linear_layer.alpha", Piece::Alpha),
    ("_lora.alpha", Piece::Alpha),
    (".alpha", Piece::Alpha),
];

impl Format for Diffusers {
    fn name(&self) -> &'static str {
        self.name
    }

    fn recognises(&self, found: &Found) -> bool {
        (self.recognises)(found)
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            match parse(&tensor.name) {
                Some((path, piece)) => pieces.add(path, piece, tensor),
                None => pieces.unknown(tensor.name.clone()),
            }
        }
        let configurations = configurations(found, options).map_err(|e| e.on(METADATA))?;
        for (_, configuration) in &configurations {
            pieces.notices(configuration.notices().iter().cloned());
        }
        pieces.finish(found, facts("diffusers", self.summary(found)), |path| {
            let (component, rest) = apart(path);
            let own = configurations.iter().find(|(name, _)| name == component);
            // A file of one part may leave its name out on either side.
            let own = own.or(configurations.iter().find(|(name, _)| name.is_empty()));
            match own {
                None if configurations.is_empty() => Ok(Told::default()),
                None => {
                    let problem = format!("`{METADATA}` says nothing about its part");
                    Err(Error::new(Reason::FieldValue { problem }).on(path))
                }
                Some((_, configuration)) => Ok(Told {
                    scale: Some(configuration.scale(rest)?),
                    dora: configuration.dora(),
                    ..Told::default()
                }),
            }
        })
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, DOWN)
    }
}

/// The name of the part, perhaps none, and the path in it.
fn apart(path: &str) -> (&str, &str) {
    path.split_at(of_part(path).map_or(0, str::len))
}

/// The name of a part of a pipeline, with its dot, in front of a path.
fn of_part(path: &str) -> Option<&str> {
    let prefix = component::split(path, false).prefix;
    PARTS.contains(&prefix).then_some(prefix)
}

/// The names that diffusers gives to parts that have adapters.
const PARTS: &[&str] = &[
    "unet.",
    "transformer.",
    "prior.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
];

/// The module and the piece of it that a key names.
fn parse(name: &str) -> Option<(String, Piece)> {
    let (suffix, piece) = SUFFIXES
        .iter()
        .filter(|(suffix, _)| name.ends_with(suffix))
        .max_by_key(|(suffix, _)| suffix.len())?;
    let path = &name[..name.len() - suffix.len()];
    if path.is_empty() {
        return None;
    }
    let path = match suffix.strip_prefix("_lora") {
        Some(_) => of_processor(path),
        None => path.to_owned(),
    };
    Some((without_wrappers(&path), *piece))
}

/// `attn1.processor.to_out` is the layer `attn1.to_out.0`; in text encoders `to_q` is `q_proj`.
fn of_processor(path: &str) -> String {
    let (owner, leaf) = path.rsplit_once('.').unwrap_or(("", path));
    let owner = owner.strip_suffix(".processor").unwrap_or(owner);
    let leaf = match (path.starts_with("text_encoder"), leaf) {
        (true, "to_q") => "q_proj",
        (true, "to_k") => "k_proj",
        (true, "to_v") => "v_proj",
        (true, "to_out") => "out_proj",
        (false, "to_out") => "to_out.0",
        (_, leaf) => leaf,
    };
    format!("{owner}.{leaf}")
}

/// The configurations in the metadata by the part that they are for.
fn configurations(found: &Found, options: &ReadOptions) -> Result<Vec<(String, Configuration)>> {
    let Some(text) = found.metadata(METADATA) else {
        return Ok(Vec::new());
    };
    let all = parse_object(text.as_bytes(), CONFIG_VALUES)?;
    let mut parts: Vec<(String, Object)> = Vec::new();
    for (key, value) in all.0 {
        let (component, field) = apart(&key);
        let entry = (field.to_owned(), value);
        match parts.iter_mut().find(|(name, _)| name == component) {
            Some((_, object)) => object.0.push(entry),
            None => parts.push((component.to_owned(), Object(vec![entry]))),
        }
    }
    let read = |(component, object): (String, Object)| {
        let configuration = Configuration::read(&object, &options.allow_unknown_config);
        let configuration = configuration.map_err(|e: Error| match e.item() {
            Some(_) => e,
            None => e.on(component.trim_end_matches('.')),
        });
        Ok((component, configuration?))
    };
    parts.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> Option<String> {
        parse(name).map(|(path, _)| path)
    }

    #[test]
    fn all_spellings_give_the_same_path() {
        for name in [
            "unet.a.attn1.to_q.lora_A.weight",
            "unet.a.attn1.to_q.lora.down.weight",
            "unet.a.attn1.processor.to_q_lora.down.weight",
            "unet.a.attn1.to_q.lora_up.weight",
            "unet.a.attn1.to_q.alpha",
        ] {
            assert_eq!(path(name).as_deref(), Some("unet.a.attn1.to_q"), "{name}");
        }
        let name = "unet.a.attn1.processor.to_out_lora.up.weight";
        assert_eq!(path(name).as_deref(), Some("unet.a.attn1.to_out.0"));
        let name = "text_encoder.l.0.self_attn.to_out_lora.up.weight";
        let found = path(name);
        assert_eq!(
            found.as_deref(),
            Some("text_encoder.l.0.self_attn.out_proj")
        );
        assert_eq!(path("unet.a.attn1.to_q.hada_w1_a"), None);
        assert_eq!(path(".alpha"), None);
    }
}
