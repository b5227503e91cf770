//! Spellings that can be recognised and described, but not read yet.
//!
//! Each row says how its names look and where a rank can be seen. Sources: `kohya-ss/sd-scripts`
//! (`networks/lora.py`), `huggingface/diffusers` (`loaders/lora_conversion_utils.py`). A row becomes a file of
//! its own when its format can be read.

use std::collections::{BTreeMap, BTreeSet};

use super::{Format, Found, ReadOptions};
use crate::adapter::Adapter;
use crate::error::{Error, Reason, Result};

/// What names and shapes alone tell.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Summary {
    /// Number of adapted modules.
    pub modules: usize,
    /// How many modules have which rank.
    pub ranks: BTreeMap<usize, usize>,
    /// Methods whose names appear.
    pub methods: BTreeSet<String>,
    /// Statements of the metadata and the configuration.
    pub facts: BTreeMap<String, String>,
}

/// A recognised spelling.
pub(super) struct Spelling {
    id: &'static str,
    name: &'static str,
    recognises: fn(&Found) -> bool,
    /// Suffix of the factor that shows the rank, and the axis that is the rank.
    rank: &'static [(&'static str, usize)],
}

impl Format for Spelling {
    fn id(&self) -> &'static str {
        self.id
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn recognises(&self, found: &Found) -> bool {
        (self.recognises)(found)
    }

    fn read(&self, _found: &Found, _options: &ReadOptions) -> Result<Adapter> {
        Err(Error::new(Reason::Format { name: self.name }))
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, self.rank)
    }
}

/// Counts modules, ranks and methods by suffix.
pub(super) fn summarise(found: &Found, rank: &[(&str, usize)]) -> Summary {
    let mut summary = Summary::default();
    for tensor in &found.file.directory.tensors {
        if let Some((_, axis)) = rank
            .iter()
            .find(|(suffix, _)| tensor.name.ends_with(suffix))
        {
            summary.modules += 1;
            *summary.ranks.entry(tensor.dimension(*axis)).or_default() += 1;
        }
        for (mark, method) in METHOD_MARKS {
            if tensor.name.contains(mark) {
                summary.methods.insert((*method).to_owned());
            }
        }
    }
    for (key, value) in &found.file.directory.metadata {
        if FACT_KEYS.contains(&key.as_str()) || key.starts_with("modelspec.") {
            summary
                .facts
                .insert(key.clone(), value.chars().take(200).collect());
        }
    }
    summary
}

/// A piece of a name, and the method it belongs to.
const METHOD_MARKS: &[(&str, &str)] = &[
    ("lora_", "LoRA"),
    (".lora.", "LoRA"),
    ("_lora.", "LoRA"),
    (":up", "LoRA"),
    ("dora_scale", "DoRA"),
    ("lora_magnitude", "DoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("boft_", "BOFT"),
    ("ia3_l", "IA3"),
    ("vera_", "VeRA"),
    ("lora_E", "AdaLoRA"),
    ("lora_mid", "LoCon (Tucker)"),
    ("prompt_embeddings", "prompt tuning"),
    (".diff", "full difference"),
    ("set_weight", "replaced weight"),
    ("_norm.scale", "replaced weight"),
];

/// Metadata worth showing.
const FACT_KEYS: &[&str] = &[
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_output_name",
    "sshs_model_hash",
    "software",
    "format",
    "ot_branch",
    "ot_revision",
    "training_info",
    "general.type",
    "general.architecture",
    "general.name",
    "adapter.type",
    "adapter.lora.alpha",
];

fn any(found: &Found, test: impl Fn(&str) -> bool) -> bool {
    found.names().any(test)
}

pub(super) const DOWN: &[(&str, usize)] = &[
    (".lora_down.weight", 0),
    ("_lora_down.weight", 0),
    (".lora_A.weight", 0),
    (".lora.down.weight", 0),
    ("_lora.down.weight", 0),
    (".down.weight", 0),
    (".lora_A", 0),
    (".hada_w1_b", 0),
    (".lokr_w1_b", 0),
];

pub(super) static KOHYA_DOUBLED: Spelling = Spelling {
    id: "kohya-doubled",
    name: "almost kohya (prefix written twice)",
    recognises: |found| any(found, |name| name.starts_with("lora_unet_unet_")),
    rank: DOWN,
};

pub(super) static HOME_MADE: Spelling = Spelling {
    id: "home-made",
    name: "home-made (factors by number, without module names)",
    recognises: |found| {
        any(found, |name| name.starts_with("w_a_")) && any(found, |name| name.starts_with("w_b_"))
    },
    rank: &[],
};
