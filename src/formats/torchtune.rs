//! torchtune: `layers.0.attn.q_proj.lora_a.weight` in `adapter_model.pt`, with PEFT's configuration beside it.
//!
//! Sources: `pytorch/torchtune`, `torchtune/modules/peft/lora.py` and `dora.py` (parameters),
//! `torchtune/models/convert_weights.py` (`tune_to_peft_adapter_config`). A is r × in, B is out × r; `magnitude`
//! is one norm per output. Rows of q and k are rotary pairs, as those of torchtune's weights.

use std::collections::BTreeSet;

use serde_json::json;

use super::draft::{Draft, Writer, Written, reshaped};
use super::peft::write::number;
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary, peft};
use crate::adapter::Adapter;
use crate::containers::torch;
use crate::error::{Error, Reason, Result};
use crate::mapped::is_there;
use crate::methods::{dora, lora};
use crate::naming::families::Layout;
use crate::naming::{Spelling, path};

/// The format.
pub(super) struct Torchtune;

/// Where the factors are.
pub(super) const FILE: &str = "adapter_model.pt";

const SUFFIXES: &[(&str, Piece)] = &[
    (".lora_a.weight", Piece::Factor(lora::DOWN)),
    (".lora_b.weight", Piece::Factor(lora::UP)),
    (".magnitude", Piece::Factor(dora::MAGNITUDE)),
];

/// Refuses what torchtune translated for PEFT where it left norms in its own order: it moves the rows of
/// `lora_B` of q and k, and not those of `magnitude`. Nothing but its own file beside it tells where it is from.
pub(super) fn refuse_translated(found: &Found) -> Result<()> {
    let is_left = |name: &&str| {
        let path = name.strip_suffix(".lora_magnitude_vector");
        path.is_some_and(|path| ["q_proj", "k_proj"].contains(&path::leaf(path)))
    };
    let left: Vec<String> = found.names().filter(is_left).map(str::to_owned).collect();
    if left.is_empty() || !is_there(&found.folder.join(FILE)) {
        return Ok(());
    }
    let problem = "torchtune translated it and left these norms in the order of its own rows, so that they scale other outputs than those trained".to_owned();
    Err(Error::new(Reason::Stored { problem })
        .with_cases(left)
        .with_hint("take `adapter_model.pt` beside it, which holds what was trained"))
}

impl Format for Torchtune {
    fn id(&self) -> &'static str {
        "torchtune"
    }

    fn name(&self) -> &'static str {
        "torchtune"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        let ends = |end: &str| found.names().any(|name| name.ends_with(end));
        ends(".lora_a.weight") && ends(".lora_b.weight")
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let mut pieces = Pieces::new(Spelling::Dotted);
        for tensor in &found.file.directory.tensors {
            let mut known = SUFFIXES.iter();
            match known.find_map(|(end, piece)| Some((tensor.name.strip_suffix(end)?, *piece))) {
                Some((path, piece)) => pieces.add(path::without_wrappers(path), piece, tensor),
                None => pieces.unknown(tensor),
            }
        }
        let facts = facts("torchtune", self.summary(found));
        let mut adapter = match &found.config {
            None => {
                let alpha = options.alpha()?;
                pieces.finish(found, facts, |_| {
                    Ok(Told {
                        alpha: Some(alpha),
                        ..Told::default()
                    })
                })?
            }
            Some(config) => {
                let place = config.input.path();
                let settings = peft::Told::read(&config.object, &options.allow_unknown_config)
                    .map_err(|e| e.in_file(place))?;
                pieces.notices(settings.notices().iter().cloned());
                pieces.finish(found, facts, |path| {
                    Ok(Told {
                        scale: Some(settings.scale(path).map_err(|e| e.in_file(place))?),
                        dora: settings.dora(),
                        ..Told::default()
                    })
                })?
            }
        };
        adapter.layout = Some(Layout::Torchtune);
        Ok(adapter)
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, &[(".lora_a.weight", 0)])
    }
}

/// Layers that torchtune adapts, and what it calls them in its configuration for PEFT (`_TO_PEFT_TARGET_MODULES`).
const TARGETS: &[(&str, &str)] = &[
    ("q_proj", "q_proj"),
    ("k_proj", "k_proj"),
    ("v_proj", "v_proj"),
    ("output_proj", "o_proj"),
    ("w1", "gate_proj"),
    ("w2", "down_proj"),
    ("w3", "up_proj"),
    ("output", "lm_head"),
];

impl Writer for Torchtune {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        Some(Layout::Torchtune)
    }

    /// One rank and one α for all modules, in the configuration that torchtune writes for PEFT.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: FILE,
            archive: Some(torch::archive),
            folder: true,
            ..Written::default()
        };
        let mut known = Vec::new();
        for named in &draft.modules {
            let leaf = path::leaf(&named.path);
            match TARGETS.iter().find(|(own, _)| *own == leaf) {
                Some((_, target)) => known.push((named, *target)),
                None => {
                    let text = "a layer that torchtune does not adapt";
                    written.lose(&*named.module.path, text);
                }
            }
        }
        let alike = written.alike(draft, known, true);
        let mut targets = BTreeSet::new();
        for (named, factors, target) in &alike.modules {
            targets.insert(*target);
            let key = |end: &str| format!("{}.{end}", named.path);
            written.put(draft, key("lora_a.weight"), &factors.down);
            written.put(draft, key("lora_b.weight"), &factors.up);
            if let Some(magnitude) = &factors.magnitude {
                let magnitude = reshaped(magnitude, vec![magnitude.elements()]);
                written.put(draft, key("magnitude"), &magnitude);
            }
        }
        written.lose_rest(draft);
        let mut config = json!({
            "r": alike.rank,
            "lora_alpha": number(alike.alpha),
            "target_modules": targets,
            "peft_type": "LORA",
            "use_dora": alike.dora,
        });
        if let Some(base) = &draft.adapter.facts.base {
            config["base_model_name_or_path"] = json!(base);
        }
        written.config = Some(config);
        Ok(written)
    }
}
