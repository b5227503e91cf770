//! The files beside the weights that a copy of a model needs.
//!
//! An allow-list: a folder may also hold what must not be published with the result (keys, logs,
//! notebooks, other weights). What is left behind is reported.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Checkpoint;
use super::index::is_plain_file_name;
use crate::error::{Error, Reason, Result};
use crate::json::Value;
use crate::mapped::{Input, is_there};

/// A file that is copied.
pub struct Companion {
    /// Its path in the folder, with `/`.
    pub name: String,
    /// The file.
    pub input: Arc<Input>,
}

/// What a folder holds beside the weights.
#[derive(Default)]
pub struct Companions {
    /// Copied.
    pub copied: Vec<Companion>,
    /// Left behind.
    pub left: Vec<String>,
}

/// Largest companion; a tokenizer has some tens of megabytes.
const LIMIT: u64 = 2 << 30;

/// Names that are copied.
const NAMES: &[&str] = &[
    "config.json",
    "model_index.json",
    "scheduler_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "normalizer.json",
    "tekken.json",
    "params.json",
    "modules.json",
    "sentence_bert_config.json",
    "sentence_xlnet_config.json",
    "config_sentence_transformers.json",
    "quant_strategy.json",
    "label_map.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENCE",
    "NOTICE",
    "NOTICE.txt",
    "COPYING",
    "USE_POLICY.md",
];

/// Code that some models need to load, by prefix; all end in `.py`.
const CODE: &[&str] = &[
    "configuration_",
    "modeling_",
    "tokenization_",
    "processing_",
    "image_processing_",
    "feature_extraction_",
    "video_processing_",
    "generation_",
];

fn is_companion(name: &str) -> bool {
    NAMES.contains(&name)
        || name.ends_with(".tiktoken")
        || name.ends_with(".jinja")
        || name.ends_with(".py") && CODE.iter().any(|prefix| name.starts_with(prefix))
}

/// Lists and opens the companions in a checkpoint's folder.
///
/// # Errors
/// What listing the folder and opening the files gives; [`Reason::FileTooLarge`].
pub fn companions(base: &Checkpoint) -> Result<Companions> {
    let folder = base.path.as_path();
    let mut found = Companions::default();
    // The weights themselves are written anew.
    let read: HashSet<&Path> = base.weights().map(|input| input.path()).collect();
    let mut folders = Vec::new();
    for (name, path) in entries(folder)? {
        if path.is_dir() {
            folders.push((name, path));
        } else if is_companion(&name) {
            found.copy(name, &path, folder)?;
        } else if !read.contains(path.as_path()) {
            found.left.push(name);
        }
    }
    let (parts, components) = (sentence_transformer_parts(folder)?, base.components());
    let is_small = |file: &str| {
        let ends = [".json", ".safetensors", ".txt", ".model", ".jinja"];
        ends.iter().any(|end| file.ends_with(end))
    };
    for (name, path) in folders {
        let wanted: &dyn Fn(&str) -> bool = if components.contains(&&*name) {
            &is_companion
        } else if parts.contains(&name) || name == "chat_templates" {
            // A part of a sentence-transformers pipeline, or chat templates: small files only.
            &is_small
        } else {
            found.left.push(format!("{name}/"));
            continue;
        };
        for (file, path) in entries(&path)? {
            let name = format!("{name}/{file}");
            if path.is_dir() {
                found.left.push(format!("{name}/"));
            } else if !read.contains(path.as_path()) {
                match wanted(&file) {
                    true => found.copy(name, &path, folder)?,
                    false => found.left.push(name),
                }
            }
        }
    }
    Ok(found)
}

impl Companions {
    fn copy(&mut self, name: String, path: &Path, folder: &Path) -> Result<()> {
        if !stays(path, folder) {
            return Err(Error::new(Reason::LinkOutside)
                .in_file(path)
                .with_hint("put the file itself there, or remove the link"));
        }
        let input = Arc::new(Input::open(path)?);
        if input.len() > LIMIT {
            let reason = Reason::FileTooLarge {
                bytes: input.len(),
                limit: LIMIT,
            };
            return Err(Error::new(reason).in_file(path));
        }
        self.copied.push(Companion { name, input });
        Ok(())
    }
}

/// Whether a path leads to a file of the folder, or of the hub cache that the folder is a snapshot of.
///
/// A link out of a stranger's folder could carry any file of this machine into a published result.
pub(super) fn stays(path: &Path, folder: &Path) -> bool {
    let (Ok(real), Ok(folder)) = (path.canonicalize(), folder.canonicalize()) else {
        return false;
    };
    let blobs = folder
        .parent()
        .and_then(Path::parent)
        .map(|repository| repository.join("blobs"));
    real.starts_with(&folder) || blobs.is_some_and(|blobs| real.parent() == Some(&blobs))
}

/// Entries of a folder by name, hidden ones left out.
pub(super) fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let fail = |e| Error::io(Reason::Read, e).in_file(folder);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            entries.push((name, entry.path()));
        }
    }
    entries.sort();
    Ok(entries)
}

/// Sub-folders that `modules.json` of a sentence-transformers model names.
fn sentence_transformer_parts(folder: &Path) -> Result<Vec<String>> {
    let path = folder.join("modules.json");
    if !is_there(&path) {
        return Ok(Vec::new());
    }
    // It is a list, so it is wrapped to be read as an object.
    let bytes = Input::open(&path)?.read_all(1 << 20)?;
    let list = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let wrapped = [b"{\"modules\":", list, b"}"].concat();
    let object = crate::json::parse_object(&wrapped, 10_000).map_err(|e| e.in_file(&path))?;
    let Some(Value::Array(modules)) = object.get("modules") else {
        return Ok(Vec::new());
    };
    let part = |module: &Value| module.as_object()?.get("path")?.as_str().map(str::to_owned);
    Ok(modules
        .iter()
        .filter_map(part)
        .filter(|path| is_plain_file_name(path))
        .collect())
}

/// Whether a folder brings a tokenizer.
pub fn has_tokenizer(folder: &Path) -> bool {
    [
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
    ]
    .iter()
    .any(|name| folder.join(name).exists())
}
