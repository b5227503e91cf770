//! Finds the tensor of a module among the names of a base.
//!
//! The exact name always wins. Otherwise every rule below is tried; exactly one name of the base must
//! come out, or the module is ambiguous. Nothing is guessed: shapes are checked afterwards.
//!
//! Rules: prefixes that exports add or drop (`huggingface/transformers`, `base_model_prefix` of each
//! model), names that transformers 5 changed when loading (`conversion_mapping.py`), and experts that it
//! fused into one tensor.

use std::collections::{BTreeSet, HashSet};
use std::sync::OnceLock;

use super::component::{self, Flattened};
use super::path::leaf;

/// Where a module lands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Name of the tensor in the base.
    pub tensor: String,
    /// The part of its rows.
    pub rows: Rows,
}

/// A part of the rows of a tensor, seen as (all axes but the last) × (last axis).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rows {
    /// All of them.
    All,
    /// One expert of a stack [experts, rows, columns], and one of `of` equal parts of its rows.
    Expert {
        /// The expert.
        expert: usize,
        /// Which part.
        part: usize,
        /// How many parts.
        of: usize,
    },
}

/// The answer for one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The base has it under the very name.
    Exact(Place),
    /// The base has it under another spelling.
    Renamed(Place),
    /// Several names fit.
    Ambiguous(Vec<String>),
    /// None does.
    Unresolved,
}

/// The names of a base.
#[derive(Debug)]
pub struct Resolver {
    names: HashSet<String>,
    /// Made when the first flattened name is asked for.
    flattened: OnceLock<Flattened>,
}

/// Prefixes that differ between exports of the same model.
const PREFIXES: &[&str] = &[
    "",
    "model.",
    "model.model.",
    "model.language_model.",
    "model.text_model.",
    "language_model.",
    "language_model.model.",
    "model.decoder.",
    "decoder.",
    "transformer.",
    "gpt_neox.",
    "backbone.",
    "bert.",
    "roberta.",
    "distilbert.",
    "electra.",
    "albert.",
    "deberta.",
    "esm.",
    "vit.",
    "text_model.",
    "vision_model.",
    "auto_model.",
    "0.auto_model.",
    "base_model.model.",
    "module.",
    "_orig_mod.",
];

/// Ends of prefixes that name a part of a model, where the others only wrap the whole.
const TOWERS: &[&str] = &["text_model.", "vision_model.", "decoder."];

/// Pieces of names that transformers 5 changed: on disk, in memory.
const RENAMES: &[&[(&str, &str)]] = &[
    // mixtral, minimax, phimoe
    &[(".block_sparse_moe.", ".mlp.")],
    // gpt_neox
    &[("embed_out", "lm_head")],
    // vit, deit, beit, vivit, ast
    &[
        ("encoder.layer.", "layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ],
];

/// Names of single experts: which fused tensor they are in, which part of its rows, of how many.
const EXPERT_PARTS: &[(&str, &str, usize, usize)] = &[
    ("w1", "gate_up_proj", 0, 2),
    ("w3", "gate_up_proj", 1, 2),
    ("w2", "down_proj", 0, 1),
    ("gate_proj", "gate_up_proj", 0, 2),
    ("up_proj", "gate_up_proj", 1, 2),
    ("down_proj", "down_proj", 0, 1),
];

impl Resolver {
    /// Takes the names of a base.
    pub fn new<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Resolver {
            names: names.into_iter().map(Into::into).collect(),
            flattened: OnceLock::new(),
        }
    }

    /// Finds a parameter (`weight` or `bias`) of a module.
    pub fn resolve(&self, path: &str, parameter: &str) -> Resolution {
        if let Some(place) = self.named(path, parameter) {
            return Resolution::Exact(place);
        }
        let mut found = BTreeSet::new();
        for path in spellings(path) {
            found.extend(self.named(&path, parameter));
        }
        match found.len() {
            0 => Resolution::Unresolved,
            1 => Resolution::Renamed(found.pop_first().expect("one place")),
            _ => Resolution::Ambiguous(found.into_iter().map(|place| place.tensor).collect()),
        }
    }

    /// Finds the weight of a module whose path may start with the name of a part of a pipeline.
    pub fn resolve_in_component(&self, path: &str) -> Resolution {
        if let Some(place) = self.named(path, "weight") {
            return Resolution::Exact(place);
        }
        let spellings = component::spellings(path);
        one_of(
            spellings
                .filter_map(|path| self.named(&path, "weight"))
                .collect(),
        )
    }

    /// Finds the weight of a module whose path is flattened, dots and underscores alike, by flattening
    /// the names of the base.
    pub fn resolve_flattened(&self, path: &str) -> Resolution {
        let flattened = self.flattened.get_or_init(|| Flattened::new(&self.names));
        let place = |tensor: &str| Place {
            tensor: tensor.to_owned(),
            rows: Rows::All,
        };
        one_of(flattened.find(path).into_iter().map(place).collect())
    }

    /// The tensor of a module under exactly this path.
    fn named(&self, path: &str, parameter: &str) -> Option<Place> {
        let whole = |tensor: String| {
            self.names.contains(&tensor).then_some(Place {
                tensor,
                rows: Rows::All,
            })
        };
        whole(join(path, parameter))
            // nn.MultiheadAttention keeps the three input projections in one parameter of its own.
            .or_else(|| whole(join(path, &format!("in_proj_{parameter}"))))
            .or_else(|| self.expert(path, parameter))
    }

    /// `….experts.3.w1` of transformers 4 in the fused `….experts.gate_up_proj` of transformers 5.
    fn expert(&self, path: &str, parameter: &str) -> Option<Place> {
        if parameter != "weight" {
            return None;
        }
        let (owner, part) = path.rsplit_once('.')?;
        let (owner, expert) = owner.rsplit_once('.')?;
        let expert = expert.parse().ok().filter(|_| leaf(owner) == "experts")?;
        let (_, fused, part, of) = EXPERT_PARTS.iter().find(|(name, ..)| *name == part)?;
        let tensor = join(owner, fused);
        let rows = Rows::Expert {
            expert,
            part: *part,
            of: *of,
        };
        self.names
            .contains(&tensor)
            .then_some(Place { tensor, rows })
    }

    /// The names that end most like a path, for a message.
    pub fn nearest(&self, path: &str, count: usize) -> Vec<String> {
        let wanted: Vec<&str> = path.split('.').collect();
        let mut scored: Vec<(usize, &String)> = self
            .names
            .iter()
            .map(|name| (likeness(&wanted, name), name))
            .filter(|(score, _)| *score > 0)
            .collect();
        scored.sort_by(|(a, left), (b, right)| b.cmp(a).then(left.cmp(right)));
        scored
            .into_iter()
            .take(count)
            .map(|(_, name)| name.clone())
            .collect()
    }
}

/// The answer to names that are no guesses: one is exact, more are too many.
fn one_of(mut found: BTreeSet<Place>) -> Resolution {
    match found.len() {
        0 => Resolution::Unresolved,
        1 => Resolution::Exact(found.pop_first().expect("one place")),
        _ => Resolution::Ambiguous(found.into_iter().map(|place| place.tensor).collect()),
    }
}

/// How alike two names are: their common segments, those at the end counting double.
fn likeness(wanted: &[&str], name: &str) -> usize {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let found: Vec<&str> = name.split('.').collect();
    let tail = wanted
        .iter()
        .rev()
        .zip(found.iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    let shared = wanted
        .iter()
        .filter(|segment| found.contains(segment))
        .count();
    if tail == 0 && shared < 2 {
        0
    } else {
        2 * tail + shared
    }
}

/// Every other spelling of a path.
fn spellings(path: &str) -> BTreeSet<String> {
    let mut renamed = vec![path.to_owned()];
    for group in RENAMES {
        let forth = group.iter().fold(path.to_owned(), |path, (disk, memory)| {
            path.replace(memory, disk)
        });
        let back = group.iter().fold(path.to_owned(), |path, (disk, memory)| {
            path.replace(disk, memory)
        });
        renamed.extend([forth, back].into_iter().filter(|renamed| renamed != path));
    }
    let mut all = BTreeSet::new();
    for path in renamed {
        for old in PREFIXES {
            let Some(rest) = path.strip_prefix(old).filter(|rest| !rest.is_empty()) else {
                continue;
            };
            // The towers of one model are not spellings of each other.
            let other_tower =
                |new: &str| matches!((tower(old), tower(new)), (Some(a), Some(b)) if a != b);
            all.extend(
                PREFIXES
                    .iter()
                    .filter(|new| !other_tower(new))
                    .map(|new| format!("{new}{rest}")),
            );
        }
    }
    all.remove(path);
    all
}

fn tower(prefix: &str) -> Option<&'static str> {
    TOWERS.iter().copied().find(|tower| prefix.ends_with(tower))
}

fn join(path: &str, parameter: &str) -> String {
    if path.is_empty() {
        parameter.to_owned()
    } else {
        format!("{path}.{parameter}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(tensor: &str) -> Place {
        Place {
            tensor: tensor.into(),
            rows: Rows::All,
        }
    }

    #[test]
    fn the_exact_name_wins_over_any_spelling() {
        let base = Resolver::new(["model.q.weight", "q.weight"]);
        assert_eq!(
            base.resolve("q", "weight"),
            Resolution::Exact(place("q.weight"))
        );
    }

    #[test]
    fn prefixes_are_added_dropped_and_exchanged() {
        let base = Resolver::new(["encoder.layer.0.query.weight", "lm_head.weight"]);
        let found = base.resolve("bert.encoder.layer.0.query", "weight");
        assert_eq!(
            found,
            Resolution::Renamed(place("encoder.layer.0.query.weight"))
        );
        let found = base.resolve("language_model.lm_head", "weight");
        assert_eq!(found, Resolution::Renamed(place("lm_head.weight")));
        let base = Resolver::new(["model.language_model.layers.0.q.weight"]);
        let found = base.resolve("language_model.model.layers.0.q", "weight");
        assert_eq!(
            found,
            Resolution::Renamed(place("model.language_model.layers.0.q.weight"))
        );
    }

    #[test]
    fn two_fitting_names_are_ambiguous() {
        let base = Resolver::new(["bert.a.weight", "model.a.weight"]);
        assert!(
            matches!(base.resolve("a", "weight"), Resolution::Ambiguous(names) if names.len() == 2)
        );
    }

    #[test]
    fn single_experts_land_in_the_fused_tensor() {
        let base = Resolver::new([
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.gate.weight",
        ]);
        let found = base.resolve("model.layers.0.block_sparse_moe.experts.3.w3", "weight");
        let rows = Rows::Expert {
            expert: 3,
            part: 1,
            of: 2,
        };
        let tensor = "model.layers.0.mlp.experts.gate_up_proj".into();
        assert_eq!(found, Resolution::Renamed(Place { tensor, rows }));
        let found = base.resolve("model.layers.0.block_sparse_moe.gate", "weight");
        assert_eq!(
            found,
            Resolution::Renamed(place("model.layers.0.mlp.gate.weight"))
        );
    }

    #[test]
    fn one_tower_of_a_model_never_stands_for_another() {
        let base = Resolver::new(["vision_model.encoder.layers.0.q.weight"]);
        assert_eq!(
            base.resolve("text_model.encoder.layers.0.q", "weight"),
            Resolution::Unresolved
        );
    }

    #[test]
    fn an_unknown_module_has_no_place_but_near_names() {
        let base = Resolver::new([
            "model.layers.0.self_attn.q_proj.weight",
            "model.norm.weight",
        ]);
        assert_eq!(
            base.resolve("model.layers.9.self_attn.q_proj", "weight"),
            Resolution::Unresolved
        );
        let near = base.nearest("model.layers.9.self_attn.q_proj", 3);
        assert_eq!(near, ["model.layers.0.self_attn.q_proj.weight"]);
    }
}
