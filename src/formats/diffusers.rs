//! diffusers: three spellings of one file, `pytorch_lora_weights.safetensors`.
//!
//! Source: `huggingface/diffusers` 0.42.1, `loaders/lora_base.py`, `loaders/lora_conversion_utils.py`,
//! `utils/state_dict_utils.py`, `utils/peft_utils.py`. Paths are dotted, perhaps behind the name of a part
//! of the pipeline. The scale is that of `lora_adapter_metadata` (PEFT's configuration by part), or of a
//! tensor `alpha`, or 1.

use serde_json::Value;

use super::draft::{Draft, Named, Writer, Written};
use super::peft::Told as Configuration;
use super::peft::write::low_rank;
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::{DOWN, summarise};
use super::{CONFIG_VALUES, Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Layer};
use crate::error::{Error, Reason, Result};
use crate::json::{Object, parse_object};
use crate::methods::{dora, lora};
use crate::naming::families::Layout;
use crate::naming::path::is_embedding;
use crate::naming::path::without_wrappers;
use crate::naming::{Spelling, component};
use crate::notice::{Notice, NoticeKind};

/// One of the spellings; every one is read by the same rules.
pub(super) struct Diffusers {
    id: &'static str,
    name: &'static str,
    recognises: fn(&Found) -> bool,
    write: fn(&Draft<'_>, &mut Written),
}

/// Attention processors: `….attn1.processor.to_q_lora.down.weight`.
pub(super) static OLD: Diffusers = Diffusers {
    id: "diffusers-old",
    name: "diffusers (attention processors)",
    recognises: |found| {
        // Those of a text encoder have no processors.
        let is_projection = |name: &str| {
            let owner = name.strip_suffix("_lora.down.weight");
            let leaf = owner.and_then(|owner| owner.rsplit_once('.'));
            leaf.is_some_and(|(_, leaf)| ["to_q", "to_k", "to_v", "to_out"].contains(&leaf))
        };
        found.names().any(|name| {
            name.contains(".processor.") && name.contains("_lora.") || is_projection(name)
        })
    },
    write: |draft, written| folded(true, draft, written),
};

/// `….attn1.to_q.lora.down.weight`.
pub(super) static MID: Diffusers = Diffusers {
    id: "diffusers-mid",
    name: "diffusers (lora.down, lora.up)",
    recognises: |found| {
        found.names().any(|name| {
            name.ends_with(".lora.down.weight") || name.ends_with(".lora_linear_layer.down.weight")
        })
    },
    write: |draft, written| folded(false, draft, written),
};

/// `….attn1.to_q.lora_A.weight`.
pub(super) static NEW: Diffusers = Diffusers {
    id: "diffusers",
    name: "diffusers (PEFT names)",
    recognises: |found| {
        found.metadata(METADATA).is_some()
            || found.names().any(|name| {
                let starts = |prefix: &&str| name.starts_with(*prefix);
                (of_part(name).is_some() || BARE.iter().any(starts))
                    && (name.contains(".lora_A.") || name.contains(".lora_down."))
            })
    },
    write: with_metadata,
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
    fn id(&self) -> &'static str {
        self.id
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        (self.recognises)(found)
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::InComponent);
        for tensor in &found.file.directory.tensors {
            match parse(&tensor.name) {
                Some((path, piece)) => pieces.add(path, piece, tensor),
                None => pieces.unknown(tensor),
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

impl Writer for Diffusers {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: "pytorch_lora_weights.safetensors",
            ..Written::default()
        };
        (self.write)(draft, &mut written);
        if draft.modules.iter().any(|named| named.component.is_none()) {
            let text = "the names do not say which part of a pipeline they are of, as in files of \
                        `save_lora_adapter`; pipelines load nothing of them, --component NAME says it";
            let notice = Notice::new(NoticeKind::LoadedByFew, text);
            written.notices.push(notice);
        }
        written.lose_rest(draft);
        Ok(written)
    }
}

/// The name of the part that a module is written under: what it had, or that of its pipeline.
fn part(draft: &Draft<'_>, named: &Named) -> String {
    if PARTS.contains(&named.prefix.as_str()) {
        return named.prefix.clone();
    }
    match named.component.map(|component| component.dotted) {
        Some(["unet.", ..]) => draft.denoiser.unwrap_or("transformer.").to_owned(),
        // The second encoder of FLUX is what others call the third.
        Some(["text_encoder_3.", ..]) if draft.family == Some("flux1") => {
            "text_encoder_2.".to_owned()
        }
        Some([first, ..]) => (*first).to_owned(),
        _ => String::new(),
    }
}

/// PEFT's names, and its configuration by part in the metadata.
fn with_metadata(draft: &Draft<'_>, written: &mut Written) {
    // diffusers does not read factors of embeddings.
    let is_table =
        |named: &&Named| named.module.layer == Layer::Embedding || is_embedding(&named.path);
    for named in draft.modules.iter().filter(is_table) {
        written.lose(&*named.module.path, "LoRA on an embedding");
    }
    let modules = || draft.modules.iter().filter(|named| !is_table(named));
    let mut parts: Vec<String> = modules().map(|named| part(draft, named)).collect();
    parts.sort();
    parts.dedup();
    let mut all = serde_json::Map::new();
    for part_name in parts {
        let own = Draft {
            modules: modules()
                .filter(|named| part(draft, named) == part_name)
                .cloned()
                .collect(),
            ..*draft
        };
        let (_, mut config) = low_rank(&own, written, |path| format!("{part_name}{path}"));
        if part_name.starts_with("text_encoder") {
            in_any_transformers(&mut config);
        }
        config.insert("peft_type".to_owned(), "LORA".into());
        config.insert("bias".to_owned(), "none".into());
        for (field, value) in config {
            all.insert(format!("{part_name}{field}"), value);
        }
    }
    let text = Value::Object(all).to_string();
    written.metadata = vec![
        ("format".to_owned(), "pt".to_owned()),
        (METADATA.to_owned(), text),
    ];
}

/// transformers 5.6 took `text_model.` out of its CLIP. diffusers takes it from the keys of tensors, but not from the
/// configuration (`loaders/lora_base.py`, `_load_lora_into_text_encoder`); PEFT compares the ends of paths, so a path
/// without it is found in both.
fn in_any_transformers(config: &mut serde_json::Map<String, Value>) {
    let short = |path: &str| path.strip_prefix("text_model.").unwrap_or(path).to_owned();
    for value in config.values_mut() {
        match value {
            Value::Array(paths) => {
                for path in paths {
                    if let Some(path_in_both) = path.as_str().map(short) {
                        *path = path_in_both.into();
                    }
                }
            }
            Value::Object(pattern) => {
                let all = std::mem::take(pattern);
                pattern.extend(all.into_iter().map(|(path, value)| (short(&path), value)));
            }
            _ => {}
        }
    }
}

/// The spellings without a scale: all of it goes into the up factor.
fn folded(processors: bool, draft: &Draft<'_>, written: &mut Written) {
    written.metadata = vec![("format".to_owned(), "pt".to_owned())];
    for named in &draft.modules {
        let item = &*named.module.path;
        let Some(mut factors) = written.two_factors(named) else {
            continue;
        };
        let part = part(draft, named);
        let text = part.starts_with("text_encoder");
        let owner = match (processors, text) {
            (false, false) => format!("{part}{}.lora", named.path),
            (false, true) => format!("{part}{}.lora_linear_layer", named.path),
            (true, _) => match to_processor(&named.path, text) {
                Some(path) => format!("{part}{path}_lora"),
                None => {
                    written.lose(item, "a layer that is no projection of an attention");
                    continue;
                }
            },
        };
        let by = factors.scale.value;
        written.fold(draft, named, &mut factors, by);
        written.put(draft, format!("{owner}.down.weight"), &factors.down);
        written.put(draft, format!("{owner}.up.weight"), &factors.up);
    }
}

/// The inverse of [`of_processor`].
fn to_processor(path: &str, text: bool) -> Option<String> {
    if text {
        let (owner, leaf) = path.rsplit_once('.')?;
        let leaf = match leaf {
            "q_proj" => "to_q",
            "k_proj" => "to_k",
            "v_proj" => "to_v",
            "out_proj" => "to_out",
            _ => return None,
        };
        return Some(format!("{owner}.{leaf}"));
    }
    let path = path
        .strip_suffix(".to_out.0")
        .map_or_else(|| path.to_owned(), |owner| format!("{owner}.to_out"));
    let (owner, leaf) = path.rsplit_once('.')?;
    ["to_q", "to_k", "to_v", "to_out"]
        .contains(&leaf)
        .then(|| format!("{owner}.processor.{leaf}"))
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
pub(super) fn parse(name: &str) -> Option<(String, Piece)> {
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
