//! LitGPT: `transformer.h.0.attn.qkv.lora_A` in `lit_model.pth.lora`, with settings in two YAML files.
//!
//! Source: `Lightning-AI/litgpt`, `litgpt/lora.py` (`LoRALinear`, `LoRAQKVLinear`) and
//! `litgpt/scripts/merge_lora.py`. `attn.qkv` is fused: A holds one block of r rows for each adapted part, B the
//! rows of these parts, r columns each. Which parts are adapted says `hyperparameters.yaml`, how many rows a part
//! has `model_config.yaml`. Before the layer was called `qkv` it was `attn.attn`, with the heads of a group side by
//! side (commit fabf765b): then too the rows of the factor were those of its parts, but where all three were adapted
//! they were added to the weight as they lie (`zero_pad`).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::blocks::block_diagonal;
use super::draft::{Draft, LowRank, Named, Part, Writer, Written, joined, zeros};
use super::peft::write::number as whole_if_it_is;
use super::pieces::{Piece, Pieces, Told, facts};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Module};
use crate::containers::torch;
use crate::error::{Error, Reason, Result};
use crate::methods::lora;
use crate::naming::families::{Layout, Side, find};
use crate::naming::{Attention, Heads, Rows, Spelling};
use crate::tensor::Tensor;

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

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
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
            if role == lora::UP && is_fused(path) {
                let whole = block_diagonal(tensor, &parts(found)?)?;
                pieces.add(path.to_owned(), Piece::Factor(role), &whole);
            } else {
                pieces.add(path.to_owned(), Piece::Factor(role), tensor);
            }
        }
        let alpha = match found.settings("lora_alpha") {
            Some(_) => number(found, "lora_alpha")?,
            None => options.alpha()?,
        };
        let mut adapter = pieces.finish(found, facts("LitGPT", self.summary(found)), |path| {
            Ok(Told {
                alpha: Some(alpha),
                // The divisor is the rank of one part.
                parts: match is_fused(path) {
                    true => parts(found)?.iter().filter(|part| part.1).count(),
                    false => 1,
                },
                ..Told::default()
            })
        })?;
        adapter.layout = Some(Layout::Litgpt);
        let heads = |key| found.settings(key).and_then(|count| count.parse().ok());
        adapter.attention = Attention {
            query: heads("n_head"),
            key: heads("n_query_groups"),
        };
        for module in &mut adapter.modules {
            if let Some(owner) = module.path.strip_suffix(OLD) {
                let path = format!("{owner}{FUSED}");
                if parts(found)?.iter().all(|part| part.1) {
                    *module = by_kind(module, adapter.attention)?;
                }
                module.path = path;
            }
        }
        Ok(adapter)
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, &[(".lora_B", 1)])
    }
}

fn is_fused(path: &str) -> bool {
    path.ends_with(FUSED) || path.ends_with(OLD)
}

/// The module whose outputs are all queries, all keys, all values instead of those of each group in turn.
fn by_kind(module: &Module, attention: Attention) -> Result<Module> {
    let rows = module.method.extent(module).outputs.unwrap_or(0);
    let mut all = Vec::new();
    for (heads, _) in PARTS {
        let own = Rows::PerGroup(heads).ranges(rows, 0, attention);
        all.extend(own.ok_or_else(|| module.error(Reason::HeadsNeeded))?);
    }
    module.outputs(&all)
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

/// Which layers of a block a setting of the training adapts (`CausalSelfAttention`, `GptNeoxMLP`, `LLaMAMLP`), by the
/// ends of their names.
const SWITCHES: &[(&str, &[&str])] = &[
    ("lora_projection", &["attn.proj"]),
    ("lora_mlp", &["mlp.fc_1", "mlp.fc_2", "mlp.proj"]),
    ("lora_mlp", &["mlp.fc", "mlp.proj"]),
    ("lora_head", &["lm_head"]),
];

/// The fused layer.
const FUSED: &str = ".attn.qkv";

/// What it was called before its rows were ordered by kind.
const OLD: &str = ".attn.attn";

/// Its parts, and the settings that adapt them.
const PARTS: [(Heads, &str); 3] = [
    (Heads::Query, "lora_query"),
    (Heads::Key, "lora_key"),
    (Heads::Value, "lora_value"),
];

impl Writer for Litgpt {
    /// Models whose fused layer is one on the hub as well need their rows moved; of all others the parts are
    /// wanted.
    fn layout(&self, family: Option<&str>) -> Option<Layout> {
        family
            .filter(|family| ["gptneox", "falcon"].contains(family))
            .map(|_| Layout::Litgpt)
    }

    /// One rank and one α for all layers, in the two files of settings that its merge reads beside the factors.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: "lit_model.pth.lora",
            archive: Some(torch::archive),
            folder: true,
            ..Written::default()
        };
        let mut known = Vec::new();
        let mut parts = Vec::new();
        for named in &draft.modules {
            match place(named) {
                None => written.lose(&*named.module.path, "a layer that LitGPT does not adapt"),
                Some((name, Rows::Whole)) if name.ends_with(FUSED) => {
                    parts.extend(split(named, draft.attention)?);
                }
                Some((_, Rows::Regrouped)) => {
                    let text = "its rows are by head, which --base or --family tells";
                    written.lose(&*named.module.path, text);
                }
                Some(place) => known.push((named, place)),
            }
        }
        known.extend(parts.iter().map(|(named, place)| (named, place.clone())));
        let alike = written.alike(draft, known, false);
        let mut fused: BTreeMap<String, [Option<(Tensor, Tensor)>; 3]> = BTreeMap::new();
        let mut plain: Vec<(String, &LowRank)> = Vec::new();
        let mut shapes = None;
        for (named, factors, (name, rows)) in &alike.modules {
            let Rows::Stacked(heads) = rows else {
                plain.push((name.clone(), factors));
                continue;
            };
            let own = Shapes::of(draft.attention, *heads, factors.up.dimension(0));
            shapes = Some(own.ok_or_else(|| named.module.error(Reason::HeadsNeeded))?);
            let parts = fused.entry(name.clone()).or_default();
            parts[*heads as usize] = Some((factors.down.clone(), factors.up.clone()));
        }
        let switches = SWITCHES.iter().map(|(key, _)| (*key, false));
        let mut settings: BTreeMap<&str, bool> = switches.collect();
        let adapted = [0, 1, 2].map(|part| fused.values().any(|parts| parts[part].is_some()));
        settings.extend(PARTS.iter().zip(adapted).map(|((_, key), on)| (*key, on)));
        let mut all: Vec<Pair> = Vec::new();
        if let Some(shapes) = &shapes {
            for (name, parts) in &fused {
                let parts = PARTS.iter().zip(adapted).zip(parts);
                let parts: Vec<Part> = parts
                    .map(|(((heads, _), adapted), factors)| Part {
                        rows: shapes.rows(*heads),
                        adapted,
                        factors: factors.clone(),
                    })
                    .collect();
                let pair = joined(&parts, draft.dtype);
                all.extend(pair.map(|(down, up)| (name.clone(), down, up)));
            }
            written.beside.push((SETTINGS[1], shapes.text()));
        }
        for (name, factors) in plain {
            all.push((name, factors.down.clone(), factors.up.clone()));
        }
        // The hub's names tell which of the two kinds of blocks it is.
        let gated = alike
            .modules
            .iter()
            .any(|(named, _, (name, _))| name.contains(".mlp.") && named.path.ends_with("_proj"));
        for (key, ends) in SWITCHES {
            let has = |end: &str| all.iter().any(|(name, ..)| name.ends_with(end));
            let own_kind = *key != "lora_mlp" || gated == ends.contains(&"mlp.fc_1");
            if own_kind && ends.iter().any(|end| has(end)) {
                settings.insert(key, true);
                if *key != "lora_head" {
                    complete(&mut all, ends); // of every block
                }
            }
        }
        if all.iter().any(|(name, ..)| name.contains(".mlp.")) {
            settings.insert("lora_mlp", true);
        }
        complete(&mut all, &["attn.qkv"]);
        for (name, down, up) in &all {
            written.put(draft, format!("{name}.lora_A"), down);
            written.put(draft, format!("{name}.lora_B"), up);
        }
        let name = draft.adapter.facts.base.as_deref().unwrap_or("base");
        let mut text = format!("checkpoint_dir: {}\n", json!(format!("checkpoints/{name}")));
        text += &format!(
            "lora_alpha: {}\nlora_dropout: 0.0\n",
            whole_if_it_is(alike.alpha)
        );
        text += &format!("lora_r: {}\n", alike.rank);
        text.extend(settings.iter().map(|(key, on)| format!("{key}: {on}\n")));
        written.beside.push((SETTINGS[0], text));
        written.lose_rest(draft);
        Ok(written)
    }
}

/// The parts of a module on the whole fused layer.
fn split(named: &Named, attention: Attention) -> Result<Vec<(Named, (String, Rows))>> {
    let module = &named.module;
    let extent = module.method.extent(module);
    let mut parts = Vec::new();
    for (heads, _) in PARTS {
        let rows = Rows::Stacked(heads);
        let total = extent.outputs.unwrap_or(0);
        let ranges = rows.ranges(total, 0, attention);
        let ranges = ranges.ok_or_else(|| module.error(Reason::HeadsNeeded))?;
        let part = module.method.without_zeros(module.outputs(&ranges)?)?;
        parts.extend(part.map(|module| {
            let name = named.path.clone();
            let named = Named {
                module,
                ..named.clone()
            };
            (named, (name, rows))
        }));
    }
    Ok(parts)
}

/// What LitGPT calls a layer, and which part of that it is.
fn place(named: &Named) -> Option<(String, Rows)> {
    let ends = |name: &str| {
        let mut all = SWITCHES.iter().flat_map(|(_, ends)| ends.iter());
        // Of a mixture the router and every expert.
        name.ends_with(FUSED) || name.contains(".mlp.") || all.any(|end| name.ends_with(end))
    };
    let found = find(&named.path, false);
    let own = found.iter().find(|m| m.family.layout == Layout::Litgpt)?;
    let place = match own.side {
        Side::Other => (named.path.clone(), Rows::Whole),
        Side::Hub => (own.name(Side::Other), own.row.rows),
    };
    ends(&place.0).then_some(place)
}

/// A layer with its factors.
type Pair = (String, Tensor, Tensor);

/// Adds zeros for layers that a setting adapts too: LitGPT makes factors for all of them in every block, and does
/// not load a file that lacks some. Nothing is added where no other layer tells the shape.
fn complete(all: &mut Vec<Pair>, ends: &[&str]) {
    let block = |name: &str| {
        let at = name.find(".attn.").or(name.find(".mlp."))?;
        Some(name[..=at].to_owned())
    };
    let blocks: BTreeSet<String> = all.iter().filter_map(|(name, ..)| block(name)).collect();
    for end in ends {
        let like = |other: &str| all.iter().find(|(name, ..)| name.ends_with(other)).cloned();
        let turned = |(name, down, up): Pair| {
            let (inputs, outputs) = (down.dimension(1), up.dimension(0));
            // The last layer of a block leads back.
            match name.ends_with(".proj") == end.ends_with(".proj") {
                true => (down, up, inputs, outputs),
                false => (down, up, outputs, inputs),
            }
        };
        let Some((down, up, inputs, outputs)) = like(end)
            .or_else(|| ends.iter().find_map(|other| like(other)))
            .map(turned)
        else {
            continue;
        };
        for block in &blocks {
            let name = format!("{block}{end}");
            if all.iter().all(|(known, ..)| *known != name) {
                let ranks = [down.dimension(0), up.dimension(1)];
                let down = zeros(&down, vec![ranks[0], inputs]);
                all.push((name, down, zeros(&up, vec![outputs, ranks[1]])));
            }
        }
    }
}

/// The rows of the parts of a fused layer.
struct Shapes {
    attention: (usize, usize),
    size: usize,
}

impl Shapes {
    fn of(attention: Attention, heads: Heads, rows: usize) -> Option<Self> {
        let query = attention.query.filter(|count| *count > 0)?;
        let key = attention.key.unwrap_or(query);
        let count = if heads == Heads::Query { query } else { key };
        let size = rows.checked_div(count)?;
        (size * count == rows && size > 0).then_some(Shapes {
            attention: (query, key),
            size,
        })
    }

    fn rows(&self, heads: Heads) -> usize {
        let (query, key) = self.attention;
        self.size * if heads == Heads::Query { query } else { key }
    }

    /// As much of `model_config.yaml` as the factors depend on.
    fn text(&self) -> String {
        let (query, key) = self.attention;
        format!(
            "head_size: {}\nn_head: {query}\nn_query_groups: {key}\n",
            self.size
        )
    }
}
