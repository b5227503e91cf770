//! Families of models whose layers have two names: that of the hub and that of another layout.
//!
//! [`FAMILIES`] is the only list. A family is data: rows of two patterns, in which `*` stands for a
//! number, and the part of the other's rows that the hub's layer is. What transformers itself changed
//! is a list of its own (`transformers`), because it holds behind any prefix.

use std::collections::{HashMap, HashSet};
use std::iter;
use std::sync::LazyLock;

use super::path;
use super::rows::{Heads, Rows};

mod anima;
mod bert_gguf;
mod flux1;
mod flux2;
mod gpt2_gguf;
mod hunyuan_video;
mod litgpt;
mod llama_gguf;
mod ltx;
mod lumina;
mod neox_gguf;
mod openclip;
mod qwen_image;
mod sd3;
mod sd_unet;
mod t5;
mod t5_gguf;
mod torchtune;
pub(super) mod transformers;
mod wan;

/// A way to name the layers of a model, other than the hub's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layout {
    /// The model's first publication: LDM, BFL, Wan …
    Original,
    /// llama.cpp.
    Gguf,
    /// torchtune.
    Torchtune,
    /// LitGPT.
    Litgpt,
    /// transformers 5, where it differs from the names in files.
    Transformers,
}

impl Layout {
    /// Whether models have the same names in it and differ in their rows, so that the model has to be known.
    pub fn of_language_models(self) -> bool {
        matches!(self, Layout::Gguf | Layout::Torchtune | Layout::Litgpt)
    }
}

/// Longer than any path that a row describes.
pub(super) const LONGEST: usize = 256;

/// A family under one other layout.
#[derive(Debug)]
pub struct Family {
    /// Its name in options and reports.
    pub name: &'static str,
    /// The layout of the other names.
    pub layout: Layout,
    /// What its models are.
    pub kind: Kind,
    /// The layers.
    pub rows: fn() -> Vec<Row>,
}

/// What the models of a family are.
#[derive(Debug)]
pub enum Kind {
    /// Language models.
    Language,
    /// Text encoders, which pipelines of several families have.
    TextEncoder,
    /// The denoisers of pipelines.
    Denoiser(Denoiser),
}

/// What tools call a denoiser.
#[derive(Debug)]
pub struct Denoiser {
    /// What stands before its layers in diffusers.
    pub part: &'static str,
    /// How statements about the base of an adapter begin: `ss_base_model_version` and `modelspec.architecture` of
    /// `kohya-ss/sd-scripts` (`library/model_util.py`, `library/sai_model_spec.py`) and `kohya-ss/musubi-tuner`
    /// (`utils/sai_model_spec.py`); `ostris/ai-toolkit`.
    pub stated: &'static [&'static str],
    /// What sd-scripts itself states as `ss_base_model_version`.
    pub stated_by_sd_scripts: Option<&'static str>,
    /// `ss_network_module` of sd-scripts.
    pub network_of_sd_scripts: &'static str,
}

impl Denoiser {
    const TRANSFORMER: Denoiser = Denoiser {
        part: "transformer.",
        stated: &[],
        stated_by_sd_scripts: None,
        network_of_sd_scripts: "networks.lora",
    };
}

impl Family {
    /// The family of a name.
    pub fn named(name: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| family.name == name)
    }

    /// What tools call it, where it is a denoiser.
    pub fn denoiser(&self) -> Option<&Denoiser> {
        match &self.kind {
            Kind::Denoiser(denoiser) => Some(denoiser),
            _ => None,
        }
    }
}

/// A layer under both names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The name in diffusers or transformers.
    pub hub: String,
    /// The name in the other layout.
    pub other: String,
    /// Where the rows of the hub's layer lie in the other.
    pub rows: Rows,
}

impl Row {
    fn name(&self, side: Side) -> &str {
        match side {
            Side::Hub => &self.hub,
            Side::Other => &self.other,
        }
    }
}

/// Every family.
pub static FAMILIES: &[Family] = &[
    sd_unet::SD1,
    sd_unet::SDXL,
    openclip::OPENCLIP,
    t5::T5,
    sd3::SD3,
    flux1::FLUX1,
    flux2::FLUX2,
    wan::WAN,
    hunyuan_video::HUNYUAN_VIDEO,
    qwen_image::QWEN_IMAGE,
    anima::ANIMA,
    ltx::LTX,
    lumina::LUMINA2,
    lumina::Z_IMAGE,
    llama_gguf::LLAMA_GGUF,
    llama_gguf::QWEN2_GGUF,
    llama_gguf::QWEN3_GGUF,
    llama_gguf::QWEN2MOE_GGUF,
    llama_gguf::QWEN3MOE_GGUF,
    llama_gguf::GEMMA2_GGUF,
    llama_gguf::GEMMA3_GGUF,
    llama_gguf::PHI3_GGUF,
    llama_gguf::STARCODER2_GGUF,
    llama_gguf::STABLELM_GGUF,
    llama_gguf::COMMAND_R_GGUF,
    llama_gguf::OLMO2_GGUF,
    llama_gguf::GLM4_GGUF,
    llama_gguf::GPT_OSS_GGUF,
    neox_gguf::GPTNEOX_GGUF,
    neox_gguf::BLOOM_GGUF,
    neox_gguf::FALCON_GGUF,
    gpt2_gguf::GPT2_GGUF,
    bert_gguf::BERT_GGUF,
    t5_gguf::T5_GGUF,
    t5_gguf::T5_ENCODER_GGUF,
    torchtune::LLAMA_TORCHTUNE,
    torchtune::GEMMA_TORCHTUNE,
    torchtune::GEMMA2_TORCHTUNE,
    torchtune::QWEN2_TORCHTUNE,
    torchtune::PHI3_TORCHTUNE,
    litgpt::LLAMA_LITGPT,
    litgpt::QWEN2_LITGPT,
    litgpt::QWEN3_LITGPT,
    litgpt::QWEN3MOE_LITGPT,
    litgpt::GEMMA_LITGPT,
    litgpt::GEMMA2_LITGPT,
    litgpt::GEMMA3_LITGPT,
    litgpt::OLMO2_LITGPT,
    litgpt::PHI_LITGPT,
    litgpt::PHI3_LITGPT,
    litgpt::GPTNEOX_LITGPT,
    litgpt::FALCON_LITGPT,
];

/// Layers that are whole under both names, below a path of either side.
fn whole(rows: &mut Vec<Row>, hub: &str, other: &str, layers: &[(&str, &str)]) {
    for (ours, theirs) in layers {
        let (hub, other) = (format!("{hub}{ours}"), format!("{other}{theirs}"));
        rows.push(row(hub, other, Rows::Whole));
    }
}

/// Three layers of the hub that are one: query, key and value.
fn thirds(rows: &mut Vec<Row>, hub: &str, layers: [&str; 3], other: &str) {
    for (index, layer) in layers.into_iter().enumerate() {
        rows.push(row(
            format!("{hub}{layer}"),
            other,
            Rows::Block { index, of: 3 },
        ));
    }
}

/// Queries, keys and values of the hub that are one layer, all heads of a kind one below the other.
fn thirds_of_heads(rows: &mut Vec<Row>, hub: &str, layers: [&str; 3], other: &str) {
    let kinds = [Heads::Query, Heads::Key, Heads::Value];
    for (layer, heads) in layers.into_iter().zip(kinds) {
        rows.push(row(format!("{hub}{layer}"), other, Rows::Stacked(heads)));
    }
}

/// The projections of an attention of diffusers.
const PROJECTIONS: [&str; 3] = ["attn.to_q", "attn.to_k", "attn.to_v"];

/// The projections of an attention over image and text, fused for each of the two.
fn joint_attention(rows: &mut Vec<Row>, hub: &str, image: &str, text: &str) {
    thirds(rows, hub, PROJECTIONS, image);
    let added = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"];
    thirds(rows, hub, added, text);
}

/// Three projections as tall as the layer is wide, and a rest.
fn squares(rows: &mut Vec<Row>, hub: &str, rest: &str, other: &str) {
    for (index, layer) in PROJECTIONS.into_iter().enumerate() {
        rows.push(row(format!("{hub}{layer}"), other, Rows::Square { index }));
    }
    rows.push(row(format!("{hub}{rest}"), other, Rows::Rest { after: 3 }));
}

/// One expert's layers, each a slice of a stack of all experts.
fn experts(rows: &mut Vec<Row>, hub: &str, other: &str, layers: &[(&str, &str)]) {
    for (ours, theirs) in layers {
        let slice = Rows::Expert {
            expert: 0, // the last number of the hub's name tells
            part: 0,
            of: 1,
        };
        let (hub, other) = (format!("{hub}{ours}"), format!("{other}{theirs}"));
        rows.push(row(hub, other, slice));
    }
}

/// Kinds of models (`model_type` of transformers) that llama.cpp has under another architecture.
const ARCHITECTURES: &[(&str, &str)] = &[
    ("mistral", "llama"),
    ("mixtral", "llama"),
    ("qwen2_moe", "qwen2moe"),
    ("qwen3_moe", "qwen3moe"),
    ("gemma3_text", "gemma3"),
    ("gpt_neox", "gptneox"),
    ("cohere", "command-r"),
    ("gpt_oss", "gpt-oss"),
    ("phi", "phi2"),
];

/// llama.cpp's architecture of a kind of model.
pub fn architecture(model_type: &str) -> &str {
    let found = ARCHITECTURES.iter().find(|(known, _)| *known == model_type);
    found.map_or(model_type, |(_, architecture)| architecture)
}

/// The family that a statement about the base of an adapter means.
pub fn stated(text: &str) -> Option<&'static str> {
    let text = text.to_ascii_lowercase();
    let means = |family: &&Family| {
        let denoiser = family.denoiser();
        denoiser.is_some_and(|own| own.stated.iter().any(|start| text.starts_with(start)))
    };
    FAMILIES.iter().find(means).map(|family| family.name)
}

/// A row.
fn row(hub: impl Into<String>, other: impl Into<String>, rows: Rows) -> Row {
    Row {
        hub: hub.into(),
        other: other.into(),
        rows,
    }
}

/// Which of the two names of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The hub's.
    Hub,
    /// The other layout's.
    Other,
}

/// A path that a row describes.
#[derive(Clone, Debug)]
pub struct Match {
    /// The family.
    pub family: &'static Family,
    /// The row.
    pub row: &'static Row,
    /// All rows of the family.
    rows: &'static [Row],
    /// Which name of the row the path is.
    pub side: Side,
    /// The numbers in it.
    pub numbers: Vec<String>,
}

impl Match {
    /// The name on one side, with the numbers of the path.
    pub fn name(&self, side: Side) -> String {
        fill(self.row.name(side), &self.numbers)
    }

    /// The name on the other side than the path's.
    pub(super) fn renamed(&self) -> String {
        self.name(match self.side {
            Side::Hub => Side::Other,
            Side::Other => Side::Hub,
        })
    }

    /// Where the rows of the hub's layer lie in the other, with the number of its expert.
    pub fn rows(&self) -> Option<Rows> {
        match self.row.rows {
            Rows::Expert { part, of, .. } => {
                let expert = path::number(self.numbers.last()?)?;
                Some(Rows::Expert { expert, part, of })
            }
            rows => Some(rows),
        }
    }

    /// All rows of the family that share this row's other name, in the order of the table: itself
    /// where it is whole, or all parts of a fused layer.
    pub fn siblings(&self) -> Vec<Match> {
        let rows = self.rows.iter();
        rows.filter(|row| row.other == self.row.other)
            .map(|row| Match {
                row,
                ..self.clone()
            })
            .collect()
    }
}

/// Every row that a path fits, dotted or with every dot written as `_`.
pub fn find(path: &str, flattened: bool) -> Vec<Match> {
    ALL.find(path, flattened)
}

/// Whether any name of a family may start so.
pub(super) fn may_start(prefix: &str) -> bool {
    prefix.is_empty() || ALL.firsts.contains(first(prefix))
}

static ALL: LazyLock<Index> = LazyLock::new(|| Index::new(FAMILIES));

/// Every row that the end of a path fits, of those that transformers 4 and 5 name differently, and what
/// stands before it.
pub(super) fn ends(path: &str) -> Vec<(&str, Match)> {
    static ENDS: LazyLock<Index> = LazyLock::new(|| Index::new(transformers::TRANSFORMERS));
    const SEGMENTS: usize = 6; // of the longest name
    let starts = path.rmatch_indices('.').map(|(at, _)| at + 1);
    let splits = starts.chain(iter::once(0)).take(SEGMENTS);
    let all = splits.map(|at| path.split_at(at));
    all.flat_map(|(head, end)| ENDS.find(end, false).into_iter().map(move |m| (head, m)))
        .collect()
}

struct Entry {
    family: &'static Family,
    rows: &'static [Row],
    row: &'static Row,
    side: Side,
    /// What stands for numbers in the name: stars, or numbers of its own.
    numbers: Vec<String>,
}

/// The rows of families by their patterns.
struct Index {
    patterns: HashMap<String, Vec<Entry>>,
    /// What patterns start with, up to a dot or underscore: most paths are none of them.
    firsts: HashSet<String>,
}

impl Index {
    fn new(families: &'static [Family]) -> Self {
        let mut patterns = HashMap::<String, Vec<Entry>>::new();
        for family in families {
            // Made once for the life of the program.
            let rows: &'static [Row] = Vec::leak((family.rows)());
            for row in rows {
                for (side, name) in [(Side::Hub, &row.hub), (Side::Other, &row.other)] {
                    // A stack is not the layer of one expert.
                    if side == Side::Other && matches!(row.rows, Rows::Expert { .. }) {
                        continue;
                    }
                    let (pattern, numbers) = wildcards(name);
                    let numbers = numbers.into_iter().map(str::to_owned).collect();
                    patterns.entry(pattern).or_default().push(Entry {
                        family,
                        rows,
                        row,
                        side,
                        numbers,
                    });
                }
            }
        }
        let firsts = patterns.keys().map(|pattern| first(pattern).to_owned());
        Index {
            firsts: firsts.collect(),
            patterns,
        }
    }

    fn find(&self, path: &str, flattened: bool) -> Vec<Match> {
        if path.len() > LONGEST || !self.firsts.contains(first(path)) {
            return Vec::new();
        }
        let (pattern, found) = wildcards(path);
        let entries = self.patterns.get(&pattern).into_iter().flatten();
        let fits = |entry: &Entry| {
            let name = entry.row.name(entry.side);
            let numbers = numbers(&entry.numbers, &found)?;
            let name = fill(name, &numbers);
            let same = match flattened {
                true => name.replace('.', "_") == path,
                false => name == path,
            };
            same.then_some(Match {
                family: entry.family,
                row: entry.row,
                rows: entry.rows,
                side: entry.side,
                numbers,
            })
        };
        entries.filter_map(fits).collect()
    }
}

fn first(name: &str) -> &str {
    name.split(['.', '_']).next().unwrap_or(name)
}

/// A name with every number between dots or underscores replaced by `*`, and those numbers.
fn wildcards(name: &str) -> (String, Vec<&str>) {
    let mut found = Vec::new();
    let piece = |piece: &'_ str| !piece.is_empty() && piece.bytes().all(|b| b.is_ascii_digit());
    let pieces: Vec<&str> = name
        .split(['.', '_'])
        .map(|text| match piece(text) || text == "*" {
            true => {
                found.push(text);
                "*"
            }
            false => text,
        })
        .collect();
    (pieces.join("_"), found)
}

/// The numbers of a path at the places where a pattern has `*`; elsewhere they must be the same.
fn numbers(wanted: &[String], found: &[&str]) -> Option<Vec<String>> {
    let mut numbers = Vec::new();
    for (wanted, found) in wanted.iter().zip(found) {
        match wanted == "*" {
            true => numbers.push((*found).to_owned()),
            false if wanted == found => {}
            false => return None,
        }
    }
    Some(numbers)
}

fn fill(pattern: &str, numbers: &[String]) -> String {
    let mut numbers = numbers.iter();
    let mut name = String::with_capacity(pattern.len() + 8);
    for piece in pattern.split_inclusive('*') {
        match piece.strip_suffix('*') {
            Some(text) => {
                name.push_str(text);
                name.push_str(numbers.next().map_or("*", String::as_str));
            }
            None => name.push_str(piece),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_names_of_a_row_have_the_same_numbers() {
        for family in FAMILIES {
            for row in (family.rows)() {
                let stars = |name: &str| name.matches('*').count();
                let expert = usize::from(matches!(row.rows, Rows::Expert { .. }));
                assert_eq!(
                    stars(&row.hub),
                    stars(&row.other) + expert,
                    "{}: {row:?}",
                    family.name
                );
            }
        }
    }

    #[test]
    fn every_row_is_found_by_either_name_in_either_spelling() {
        for family in FAMILIES {
            for row in (family.rows)() {
                let sides = match row.rows {
                    Rows::Expert { .. } => vec![(Side::Hub, &row.hub)],
                    _ => vec![(Side::Hub, &row.hub), (Side::Other, &row.other)],
                };
                for (side, name) in sides {
                    let name = name.replace('*', "3");
                    for (path, flattened) in [(name.clone(), false), (name.replace('.', "_"), true)]
                    {
                        let found = find(&path, flattened);
                        let is_it = |m: &Match| {
                            m.family.name == family.name
                                && m.side == side
                                && *m.row == row
                                && m.name(side) == name
                        };
                        assert!(found.iter().any(is_it), "{}: {path}", family.name);
                    }
                }
            }
        }
    }

    #[test]
    fn a_family_has_one_row_for_each_layer_of_the_hub() {
        for family in FAMILIES {
            let mut known = std::collections::HashSet::new();
            for row in (family.rows)() {
                assert!(known.insert(row.hub.clone()), "{}: {row:?}", family.name);
            }
        }
    }

    #[test]
    fn the_rows_of_a_fused_layer_are_covered_once() {
        let attention = crate::naming::Attention {
            query: Some(4),
            key: Some(2),
        };
        for family in FAMILIES {
            let rows = (family.rows)();
            for first in &rows {
                let parts = rows.iter().filter(|row| row.other == first.other);
                let mut covered: Vec<usize> = match first.rows {
                    Rows::Expert { .. } => continue,
                    // Tall enough for three blocks as tall as it is wide and a rest, also of halves and fifths.
                    _ => parts
                        .flat_map(|row| row.rows.ranges(480, 16, attention).expect("it divides"))
                        .flatten()
                        .collect(),
                };
                covered.sort_unstable();
                let all: Vec<usize> = (0..480).collect();
                assert_eq!(covered, all, "{}: {}", family.name, first.other);
            }
        }
    }

    #[test]
    fn names_outside_the_tables_are_not_found() {
        for path in [
            "",
            "*",
            "double_blocks.x.img_attn.qkv",
            "double_blocks_*_img_attn_qkv",
        ] {
            assert!(find(path, false).is_empty(), "{path}");
        }
        assert!(find("double_blocks.0.img_attn.qkv", true).is_empty());
    }
}
