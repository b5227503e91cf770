//! What files of weights are called in a folder, and which of several are meant.
//!
//! Sources: `huggingface/transformers`, `modeling_utils.py` (`_add_variant`, `save_pretrained`,
//! `_get_resolved_checkpoint_files`: safetensors before torch); `huggingface/diffusers`,
//! `utils/constants.py`, `utils/hub_utils.py` (`_add_variant`) and `models/model_loading_utils.py`
//! (`_fetch_index_file_legacy`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::companions::entries;
use crate::error::{Error, Reason, Result};
use crate::notice::{Notice, NoticeKind};

/// Which files are meant where a folder holds the same weights several times (`fp16`, `non_ema`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Variant {
    /// The only one; several are an error.
    #[default]
    Only,
    /// The one of a name, `default` for the one without; a component that lacks it gives its default.
    Named(String),
    /// The default, or else the first.
    Any,
}

/// The name of the variant without a name.
const DEFAULT: &str = "default";

/// What stands first in the name of a file: of safetensors, and of the same weights in a torch file.
const STEMS: &[(&str, &str)] = &[
    ("model", "pytorch_model"),
    ("diffusion_pytorch_model", "diffusion_pytorch_model"),
];

/// The parts of a name of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    /// As safetensors are called.
    stem: &'static str,
    /// Whether they lie in torch files.
    torch: bool,
    variant: Option<String>,
    is_index: bool,
}

/// `model.safetensors`
impl Default for Name {
    fn default() -> Self {
        Name {
            stem: STEMS[0].0,
            torch: false,
            variant: None,
            is_index: false,
        }
    }
}

impl Name {
    /// Reads the name of a file that holds all weights, or of an index. Shards have any names.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split('.').collect();
        let (stem, rest) = parts.split_first()?;
        let (ending, variant, is_index) = match *rest {
            [ending] => (ending, None, false),
            [ending, "index", "json"] => (ending, None, true),
            // Before 2024 diffusers had the name of the variant in front of `index`.
            [ending, "index", variant, "json"] | [ending, variant, "index", "json"] => {
                (ending, Some(variant), true)
            }
            [variant, ending] => (ending, Some(variant), false),
            _ => return None,
        };
        let torch = match ending {
            "safetensors" => false,
            "bin" => true,
            _ => return None,
        };
        let known = STEMS
            .iter()
            .find(|(safetensors, other)| stem == if torch { other } else { safetensors });
        if variant.is_some_and(|variant| variant.is_empty() || is_shard(variant)) {
            return None;
        }
        Some(Name {
            stem: known?.0,
            torch,
            variant: variant.map(str::to_owned),
            is_index,
        })
    }

    /// The file that holds all weights of a result.
    pub(super) fn single(&self, extension: &str) -> String {
        format!("{}{}.{extension}", self.stem, self.dotted())
    }

    /// One of several files of a result.
    pub(super) fn shard(&self, number: usize, of: usize, extension: &str) -> String {
        format!(
            "{}{}-{number:05}-of-{of:05}.{extension}",
            self.stem,
            self.dotted()
        )
    }

    /// The map of several files.
    pub(super) fn index(&self) -> String {
        format!("{}.safetensors.index{}.json", self.stem, self.dotted())
    }

    pub(super) fn is_variant(&self, name: &str) -> bool {
        self.variant() == name
    }

    fn dotted(&self) -> String {
        let variant = self.variant.as_ref();
        variant.map_or_else(String::new, |variant| format!(".{variant}"))
    }

    fn variant(&self) -> &str {
        self.variant.as_deref().unwrap_or(DEFAULT)
    }
}

/// Whether a part of a name ends as shards do: `-00001-of-00002`.
fn is_shard(text: &str) -> bool {
    let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((rest, of)) = text.rsplit_once("-of-") else {
        return false;
    };
    number(of) && rest.rsplit_once('-').is_some_and(|(_, at)| number(at))
}

/// The weights of a folder.
pub(super) struct Chosen {
    pub(super) name: Name,
    /// The one file, or the index.
    pub(super) path: PathBuf,
    pub(super) is_index: bool,
    /// The file beside an index that would hold all weights.
    pub(super) single: Option<PathBuf>,
}

/// Chooses the weights of a folder; nothing if it holds none that are known by name.
///
/// # Errors
/// [`Reason::SeveralVariants`], [`Reason::BothLayouts`].
pub(super) fn choose(
    folder: &Path,
    variant: &Variant,
    notices: &mut Vec<Notice>,
) -> Result<Option<Chosen>> {
    let mut found: Vec<(Name, PathBuf)> = entries(folder)?
        .into_iter()
        .filter_map(|(name, path)| Some((Name::parse(&name)?, path)))
        .collect();
    let variants: BTreeSet<String> = found
        .iter()
        .map(|(name, _)| name.variant().to_owned())
        .collect();
    let Some(first) = variants.first() else {
        return Ok(None);
    };
    let default = variants.contains(DEFAULT).then_some(DEFAULT);
    let several = || {
        let count = variants.len();
        let cases = variants.iter().cloned().collect();
        Error::new(Reason::SeveralVariants { count })
            .in_file(folder)
            .with_cases(cases)
    };
    let wanted = match variant {
        Variant::Only if variants.len() > 1 => return Err(several()),
        Variant::Only => first,
        Variant::Any => default.unwrap_or(first),
        Variant::Named(name) if variants.contains(name) => name,
        Variant::Named(_) => match default {
            Some(default) => default,
            None if variants.len() == 1 => first,
            None => return Err(several()),
        },
    };
    found.retain(|(name, _)| name.variant() == wanted);
    let others: Vec<&str> = variants
        .iter()
        .map(String::as_str)
        .filter(|name| *name != wanted)
        .collect();
    match variant {
        Variant::Named(name) if name != wanted => {
            let text = format!("it has no variant `{name}`; `{wanted}` is taken");
            notices.push(Notice::new(NoticeKind::BaseLayout, text).in_file(folder));
        }
        Variant::Any if !others.is_empty() => {
            let text = format!("`{wanted}` is read; other variants: {}", others.join(", "));
            notices.push(Notice::new(NoticeKind::BaseLayout, text).in_file(folder));
        }
        _ => {}
    }
    if found.iter().any(|(name, _)| !name.torch) {
        for (_, path) in found.iter().filter(|(name, _)| name.torch) {
            let text = "the same weights are there as safetensors, which count";
            notices.push(Notice::new(NoticeKind::BaseLayout, text).in_file(path));
        }
        found.retain(|(name, _)| !name.torch);
    }
    // An index may name the single file as its only shard; that is seen when it is read.
    found.sort_by_key(|(name, _)| !name.is_index);
    if let [(first, _), rest @ ..] = found.as_slice()
        && let Some((_, path)) = rest
            .iter()
            .find(|(other, _)| !first.is_index || other.is_index || other.stem != first.stem)
    {
        return Err(both(folder, &found[0].1, path));
    }
    let mut found = found.into_iter();
    let first = found.next();
    let single = found.next().map(|(_, path)| path);
    Ok(first.map(|(name, path)| Chosen {
        is_index: name.is_index,
        name,
        path,
        single,
    }))
}

/// Two layouts of one variant that are not one.
pub(super) fn both(folder: &Path, first: &Path, second: &Path) -> Error {
    let name = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let reason = Reason::BothLayouts {
        first: name(first),
        second: name(second),
    };
    Error::new(reason).in_file(folder)
}

/// What makes a folder one adapter: the files that formats write into one.
const OF_ADAPTERS: &[&str] = &[
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
    "adapters.safetensors",
    "adapters.npz",
    "adapter.gguf",
    "lora.pt",
    "lora_weight.safetensors",
    "pytorch_lora_weights.safetensors",
];

/// Whether a folder holds weights under the names of a result.
pub(super) fn holds_a_result(folder: &Path) -> bool {
    let is_one = |name: &str| {
        name == super::PIPELINE
            || name == "model.gguf"
            || OF_ADAPTERS.contains(&name)
            || Name::parse(name).is_some_and(|name| !name.torch)
    };
    entries(folder).is_ok_and(|entries| entries.iter().any(|(name, _)| is_one(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_weights_are_read_and_written() {
        for (text, single, index) in [
            (
                "model.safetensors",
                "model.safetensors",
                "model.safetensors.index.json",
            ),
            (
                "pytorch_model.bin.index.json",
                "model.safetensors",
                "model.safetensors.index.json",
            ),
            (
                "diffusion_pytorch_model.fp16.safetensors",
                "diffusion_pytorch_model.fp16.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ),
            (
                "diffusion_pytorch_model.safetensors.index.fp16.json",
                "diffusion_pytorch_model.fp16.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ),
            (
                "diffusion_pytorch_model.safetensors.fp16.index.json",
                "diffusion_pytorch_model.fp16.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ),
            (
                "diffusion_pytorch_model.bin",
                "diffusion_pytorch_model.safetensors",
                "diffusion_pytorch_model.safetensors.index.json",
            ),
        ] {
            let name = Name::parse(text).unwrap();
            assert_eq!(name.single("safetensors"), single, "{text}");
            assert_eq!(name.index(), index, "{text}");
        }
        let name = Name::parse("model.fp16.safetensors").unwrap();
        assert_eq!(
            name.shard(2, 3, "safetensors"),
            "model.fp16-00002-of-00003.safetensors"
        );
    }

    #[test]
    fn shards_and_other_files_are_no_names_of_weights() {
        for text in [
            "model-00001-of-00002.safetensors",
            "model.fp16-00001-of-00002.safetensors",
            "model..safetensors",
            "model.onnx",
            "model.bin",
            "pytorch_model.safetensors",
            "adapter_model.safetensors",
            "consolidated.safetensors",
            "model.a.b.c.safetensors",
            "safetensors",
            "",
        ] {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }
}
