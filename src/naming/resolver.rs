//! Finds the tensor of a module among the names of a base.
//!
//! The exact name always wins. Otherwise every rule below is tried; exactly one name of the base must
//! come out, or the module is ambiguous. Nothing is guessed: shapes are checked afterwards.
//!
//! The rules are data: prefixes, and the names of families in their layouts (`families/`).

use std::collections::{BTreeSet, HashSet};
use std::sync::OnceLock;

use super::component::{self, Flattened, InPart};
use super::families::transformers::{PREFIXES, prefixed};
use super::families::{self, Match, Side};
use super::rows::Rows;

/// How the path of a module is spelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spelling {
    /// Dotted, in the model that was trained.
    #[default]
    Dotted,
    /// Dotted, perhaps behind the name of a part of a pipeline: `unet.down_blocks.0…`.
    InComponent,
    /// Every dot written as `_`, behind a prefix that names the part: `lora_unet_down_blocks_0…`.
    Flattened,
}

/// Where a module, or some of its rows, lands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Name of the tensor in the base.
    pub tensor: String,
    /// How the rows of one lie in the other.
    pub rows: Rows,
    /// Whether the part is one of the module, and the tensor is covered whole; otherwise the module is
    /// used whole on a part of the tensor.
    pub of_module: bool,
}

impl Place {
    /// A module on all of a tensor.
    pub fn whole(tensor: impl Into<String>) -> Self {
        Place {
            tensor: tensor.into(),
            rows: Rows::Whole,
            of_module: false,
        }
    }
}

/// The answer for one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The base has it under the very name; several places where it is fused and the base's layers are not.
    Exact(Vec<Place>),
    /// The base has it under another spelling.
    Renamed(Vec<Place>),
    /// Several names fit.
    Ambiguous(Vec<String>),
    /// None does.
    Unresolved,
}

/// The names of a base.
#[derive(Debug)]
pub struct Resolver {
    names: HashSet<String>,
    /// llama.cpp's architecture of the model: its layouts differ under the same names.
    architecture: Option<String>,
    /// Made when the first flattened name is asked for.
    flattened: OnceLock<Flattened>,
    /// What names may start with, of prefixes and roots; made when first asked for.
    starts: OnceLock<HashSet<&'static str>>,
}

impl Resolver {
    /// Takes the names of a base.
    pub fn new<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Resolver {
            names: names.into_iter().map(Into::into).collect(),
            architecture: None,
            flattened: OnceLock::new(),
            starts: OnceLock::new(),
        }
    }

    /// Says what model it is, in llama.cpp's words.
    #[must_use]
    pub fn of_architecture(mut self, architecture: Option<String>) -> Self {
        self.architecture = architecture;
        self
    }

    /// Finds the weight of a module.
    pub fn resolve(&self, path: &str, spelling: Spelling) -> Resolution {
        let parts = component::split(path, spelling == Spelling::Flattened);
        let found = match spelling {
            Spelling::Dotted => return self.dotted(path, "weight"),
            Spelling::InComponent => self.in_part(path, parts),
            Spelling::Flattened => {
                let flattened = self.flattened.get_or_init(|| Flattened::new(&self.names));
                let found = flattened.find(parts, &self.roots(parts)).into_iter();
                one_list(found.map(|name| vec![Place::whole(name)]).collect())
            }
        };
        match found {
            // Without the name of a part it may be any model's own.
            Resolution::Unresolved
                if spelling == Spelling::InComponent && parts.component.is_none() =>
            {
                self.dotted(path, "weight")
            }
            Resolution::Unresolved => {
                let flattened = spelling == Spelling::Flattened;
                let mut found = BTreeSet::new();
                if parts.component.is_some() || !flattened {
                    self.in_families(parts, flattened, "weight", &mut found);
                }
                one_list(found)
            }
            found => found,
        }
    }

    /// Finds a parameter (`weight` or `bias`) that is a tensor of its own under every name.
    pub fn resolve_parameter(&self, path: &str, parameter: &str) -> Resolution {
        match self.dotted(path, parameter) {
            Resolution::Exact(places) | Resolution::Renamed(places) if !matches!(&*places, [only] if only.rows == Rows::Whole) => {
                Resolution::Unresolved
            }
            found => found,
        }
    }

    fn dotted(&self, path: &str, parameter: &str) -> Resolution {
        if path.len() > families::LONGEST && self.named(path, parameter).is_none() {
            return Resolution::Unresolved;
        }
        let ends = families::ends(path);
        match self.by_hub(path, &ends, parameter) {
            Resolution::Unresolved => {}
            found => return found,
        }
        // The families know one prefix of each model, and one version.
        let mut found = BTreeSet::new();
        let whole = ends.iter().filter(|(_, m)| m.row.rows == Rows::Whole);
        let renamed = whole.map(|(head, m)| format!("{head}{}", m.renamed()));
        for path in prefixed(path, families::may_start).chain(renamed) {
            let parts = component::split(&path, false);
            self.in_families(parts, false, parameter, &mut found);
            if parts.component.is_some() {
                // What looks like the name of a part may be a model's own.
                self.in_families(InPart::bare(&path), false, parameter, &mut found);
            }
        }
        one_list(found)
    }

    /// Finds a parameter under the names that the hub has for it.
    fn by_hub(&self, path: &str, ends: &[(&str, Match)], parameter: &str) -> Resolution {
        if let Some(name) = self.named(path, parameter) {
            return Resolution::Exact(vec![Place::whole(name)]);
        }
        let mut found = BTreeSet::new();
        let occurs = |prefix: &str| self.occurs(prefix);
        for path in prefixed(path, occurs) {
            let named = self.named(&path, parameter);
            found.extend(named.map(|name| vec![Place::whole(name)]));
        }
        for (head, matched) in ends {
            for head in prefixed(head, occurs) {
                found.extend(self.matched(&head, matched, parameter));
            }
        }
        match one_list(found) {
            Resolution::Exact(places) => Resolution::Renamed(places),
            found => found,
        }
    }

    /// The place of a layer of the hub, which is some outputs of a module.
    fn on_hub(&self, path: &str, parameter: &str, rows: Rows) -> Option<Place> {
        let found = self.by_hub(path, &families::ends(path), parameter);
        let (Resolution::Exact(places) | Resolution::Renamed(places)) = found else {
            return None;
        };
        match (places.as_slice(), rows) {
            // Perhaps a single expert of a stack; how the hub stores a Conv1D its own configuration tells.
            ([place], Rows::Whole | Rows::Conv1D) => Some(place.clone()),
            ([place], _) if place.rows == Rows::Whole => Some(Place {
                rows,
                of_module: true,
                ..place.clone()
            }),
            _ => None,
        }
    }

    fn in_part(&self, path: &str, parts: InPart<'_>) -> Resolution {
        if let Some(name) = self.named(path, "weight") {
            return Resolution::Exact(vec![Place::whole(name)]);
        }
        let mut found = BTreeSet::new();
        for root in self.roots(parts) {
            for path in parts.spellings(false) {
                let named = self.named(&format!("{root}{path}"), "weight");
                found.extend(named.map(|name| vec![Place::whole(name)]));
            }
        }
        one_list(found)
    }

    /// Every way in which a family places a module.
    fn in_families(
        &self,
        parts: InPart<'_>,
        flattened: bool,
        parameter: &str,
        found: &mut BTreeSet<Vec<Place>>,
    ) {
        let matches = parts
            .spellings(flattened)
            .into_iter()
            .flat_map(|path| families::find(&path, flattened))
            .filter(|found| match &self.architecture {
                Some(own) if found.family.layout.of_language_models() => found.family.name == own,
                _ => true,
            });
        let matches: Vec<Match> = matches.collect();
        if matches.is_empty() {
            return;
        }
        let roots = self.roots(parts);
        for matched in matches {
            for root in &roots {
                found.extend(self.matched(root, &matched, parameter));
            }
        }
    }

    /// The places of a module that a row knows, behind what stands before its names: its other name, or,
    /// where it is named so itself, the layers of the hub that it is made of.
    fn matched(&self, root: &str, matched: &Match, parameter: &str) -> Option<Vec<Place>> {
        let find = |name: &str, rows: Rows, of_module: bool| {
            let path = format!("{root}{name}");
            // The hub has several names for the layers of one language model.
            if of_module && matched.family.layout.of_language_models() {
                return self.on_hub(&path, parameter, rows);
            }
            // A stack of experts and OpenCLIP's `text_projection` are parameters without a module.
            let bare = || {
                (rows != Rows::Whole && !of_module && parameter == "weight")
                    .then_some(path.as_str())
            };
            let tensor = self
                .named(&path, parameter)
                .or_else(|| self.has(bare()?.to_owned()))?;
            Some(Place {
                tensor,
                rows,
                of_module,
            })
        };
        match matched.side {
            Side::Hub => find(&matched.name(Side::Other), matched.rows()?, false).map(|p| vec![p]),
            Side::Other => {
                let all = matched.siblings();
                let places = all
                    .iter()
                    .map(|m| find(&m.name(Side::Hub), m.row.rows, true));
                places.collect()
            }
        }
    }

    /// The tensor of a module under exactly this path.
    fn named(&self, path: &str, parameter: &str) -> Option<String> {
        self.has(join(path, parameter))
            // nn.MultiheadAttention keeps the three input projections in one parameter of its own.
            .or_else(|| self.has(join(path, &format!("in_proj_{parameter}"))))
            // FLUX's RMSNorm calls its weight `scale`.
            .or_else(|| {
                let is_norm = parameter == "weight" && path.ends_with("_norm");
                is_norm.then(|| self.has(join(path, "scale"))).flatten()
            })
    }

    /// Where this base may keep a part.
    fn roots(&self, parts: InPart<'_>) -> Vec<&'static str> {
        let roots = parts.roots().into_iter();
        roots.filter(|root| self.occurs(root)).collect()
    }

    /// Whether any name starts so.
    fn occurs(&self, start: &str) -> bool {
        let starts = self.starts.get_or_init(|| {
            let roots = InPart::bare("").roots().into_iter();
            let all = roots.chain(PREFIXES.iter().copied());
            let occurs = |start: &&str| self.names.iter().any(|name| name.starts_with(start));
            all.filter(occurs).collect()
        });
        starts.contains(start)
    }

    fn has(&self, name: String) -> Option<String> {
        self.names.contains(&name).then_some(name)
    }

    /// The names that end most like a path, for a message.
    pub fn nearest(&self, path: &str, count: usize) -> Vec<String> {
        // No name of a model has as many segments; a path may have thousands.
        const SEGMENTS: usize = 64;
        let mut wanted: Vec<&str> = path.rsplit('.').take(SEGMENTS).collect();
        wanted.reverse();
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

/// The answer to lists of places of which each would do alone: one is exact, more are too many.
fn one_list(mut found: BTreeSet<Vec<Place>>) -> Resolution {
    match found.len() {
        0 => Resolution::Unresolved,
        1 => Resolution::Exact(found.pop_first().expect("one list")),
        _ => {
            let places = found.into_iter().flatten();
            Resolution::Ambiguous(places.map(|place| place.tensor).collect())
        }
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

    fn place(tensor: &str) -> Vec<Place> {
        vec![Place::whole(tensor)]
    }

    #[test]
    fn the_exact_name_wins_over_any_spelling() {
        let base = Resolver::new(["model.q.weight", "q.weight"]);
        assert_eq!(
            base.resolve_parameter("q", "weight"),
            Resolution::Exact(place("q.weight"))
        );
    }

    #[test]
    fn prefixes_are_added_dropped_and_exchanged() {
        let base = Resolver::new(["encoder.layer.0.query.weight", "lm_head.weight"]);
        let found = base.resolve_parameter("bert.encoder.layer.0.query", "weight");
        assert_eq!(
            found,
            Resolution::Renamed(place("encoder.layer.0.query.weight"))
        );
        let found = base.resolve_parameter("language_model.lm_head", "weight");
        assert_eq!(found, Resolution::Renamed(place("lm_head.weight")));
        let base = Resolver::new(["model.language_model.layers.0.q.weight"]);
        let found = base.resolve_parameter("language_model.model.layers.0.q", "weight");
        assert_eq!(
            found,
            Resolution::Renamed(place("model.language_model.layers.0.q.weight"))
        );
    }

    #[test]
    fn two_fitting_names_are_ambiguous() {
        let base = Resolver::new(["bert.a.weight", "model.a.weight"]);
        assert!(
            matches!(base.resolve_parameter("a", "weight"), Resolution::Ambiguous(names) if names.len() == 2)
        );
    }

    #[test]
    fn single_experts_land_in_the_fused_tensor() {
        let base = Resolver::new([
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.gate.weight",
        ]);
        let found = base.resolve(
            "model.layers.0.block_sparse_moe.experts.3.w3",
            Spelling::Dotted,
        );
        let place = Place {
            rows: Rows::Expert {
                expert: 3,
                part: 1,
                of: 2,
            },
            ..Place::whole("model.layers.0.mlp.experts.gate_up_proj")
        };
        assert_eq!(found, Resolution::Renamed(vec![place]));
        let found = base.resolve("model.layers.0.block_sparse_moe.gate", Spelling::Dotted);
        let whole = "model.layers.0.block_sparse_moe.experts.3";
        assert_eq!(
            base.resolve_parameter(&format!("{whole}.w3"), "weight"),
            Resolution::Unresolved,
            "a whole tensor is not a part of another"
        );
        let gate = Place::whole("model.layers.0.mlp.gate.weight");
        assert_eq!(found, Resolution::Renamed(vec![gate]));
    }

    #[test]
    fn single_experts_land_in_the_stacks_of_llama_cpp() {
        let base = Resolver::new(["blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_inp.weight"]);
        let found = |path: &str| base.resolve(path, Spelling::Dotted);
        let place = Place {
            rows: Rows::Expert {
                expert: 12,
                part: 0,
                of: 1,
            },
            ..Place::whole("blk.1.ffn_up_exps.weight")
        };
        for path in [
            "model.layers.1.block_sparse_moe.experts.12.w3",
            "model.layers.1.mlp.experts.12.up_proj",
        ] {
            assert_eq!(
                found(path),
                Resolution::Exact(vec![place.clone()]),
                "{path}"
            );
        }
        assert_eq!(
            found("model.layers.1.mlp.gate"),
            Resolution::Exact(self::place("blk.1.ffn_gate_inp.weight"))
        );
    }

    #[test]
    fn numbers_of_experts_are_digits_without_leading_zeros() {
        let base = Resolver::new([
            "model.layers.0.mlp.experts.down_proj",
            "blk.0.ffn_down_exps.weight",
        ]);
        for expert in ["+3", "03", "-3", "", "99999999999999999999999"] {
            let path = format!("model.layers.0.mlp.experts.{expert}.down_proj");
            let found = base.resolve(&path, Spelling::Dotted);
            assert_eq!(found, Resolution::Unresolved, "{expert}");
        }
    }

    #[test]
    fn a_family_places_a_module_on_its_part_of_a_fused_layer() {
        let base = Resolver::new([
            "model.diffusion_model.double_blocks.1.img_attn.qkv.weight",
            "model.diffusion_model.final_layer.adaLN_modulation.1.weight",
        ]);
        let found = base.resolve(
            "transformer.transformer_blocks.1.attn.to_k",
            Spelling::InComponent,
        );
        let place = Place {
            rows: Rows::Block { index: 1, of: 3 },
            ..Place::whole("model.diffusion_model.double_blocks.1.img_attn.qkv.weight")
        };
        assert_eq!(found, Resolution::Exact(vec![place]));
        let found = base.resolve("lora_transformer_norm_out_linear", Spelling::Flattened);
        assert!(matches!(found, Resolution::Exact(places) if places[0].rows == Rows::Swapped));
    }

    #[test]
    fn a_parameter_that_is_transposed_under_the_same_name_is_seen_as_such() {
        let base = Resolver::new(["conditioner.embedders.1.model.text_projection"]);
        let found = base.resolve("text_encoder_2.text_projection", Spelling::InComponent);
        assert!(matches!(found, Resolution::Exact(places) if places[0].rows == Rows::Transposed));
    }

    #[test]
    fn a_fused_module_needs_all_the_layers_it_is_made_of() {
        let names =
            ["to_q", "to_k", "to_v"].map(|leaf| format!("transformer_blocks.0.attn.{leaf}.weight"));
        let base = Resolver::new(names.clone());
        let find = |base: &Resolver| {
            base.resolve(
                "lora_unet_double_blocks_0_img_attn_qkv",
                Spelling::Flattened,
            )
        };
        let Resolution::Exact(places) = find(&base) else {
            panic!("{:?}", find(&base));
        };
        assert!(places.iter().all(|place| place.of_module));
        assert_eq!(
            places.iter().map(|place| &place.tensor).collect::<Vec<_>>(),
            names.iter().collect::<Vec<_>>()
        );
        assert_eq!(
            find(&Resolver::new(names[..2].to_vec())),
            Resolution::Unresolved
        );
    }

    #[test]
    fn one_tower_of_a_model_never_stands_for_another() {
        let base = Resolver::new(["vision_model.encoder.layers.0.q.weight"]);
        assert_eq!(
            base.resolve_parameter("text_model.encoder.layers.0.q", "weight"),
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
            base.resolve_parameter("model.layers.9.self_attn.q_proj", "weight"),
            Resolution::Unresolved
        );
        let near = base.nearest("model.layers.9.self_attn.q_proj", 3);
        assert_eq!(near, ["model.layers.0.self_attn.q_proj.weight"]);
    }
}
