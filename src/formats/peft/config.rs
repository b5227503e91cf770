//! `adapter_config.json`: every field is supported, harmless, or refused by name.
//!
//! Sources: `LoraConfig`, `IA3Config` and `PeftConfigMixin` of PEFT 0.1 to 0.21.2.

use std::collections::HashMap;

use super::tuners::{TUNERS, Tuner};
use crate::adapter::Scale;
use crate::error::{Error, Reason, Result};
use crate::json::{Object, Value};
use crate::notice::{Notice, NoticeKind};
use crate::pattern::Pattern;

/// What a configuration says, checked.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) tuner: &'static Tuner,
    pub(super) lora_bias: bool,
    pub(super) trains_biases: bool,
    pub(super) ensure_weight_tying: bool,
    /// VeLoRA or MonteCLoRA, which leave training state in the file.
    pub(super) training_state: bool,
    pub(super) replication: Vec<(usize, usize)>,
    /// Which parts of fused layers are adapted (the `MergedLinear` of PEFT 0.2); none elsewhere.
    pub(super) merged: Vec<bool>,
    pub(super) notices: Vec<Notice>,
    rank: usize,
    alpha: f64,
    root: bool,
    ranks: PatternMap,
    alphas: PatternMap,
    feedforward: Targets,
    saved: Vec<String>,
    tokens: Vec<(Option<String>, Vec<usize>)>,
}

/// What a field is to the result.
enum Effect {
    /// Read below.
    Read,
    /// Cannot change the merged weights.
    None,
    /// Changes them in a way that is not supported; refused unless vacant.
    Refuse(&'static str),
}

/// Every known field: the only list.
const FIELDS: &[(&str, Effect)] = &[
    ("peft_type", Effect::Read),
    ("r", Effect::Read),
    ("lora_alpha", Effect::Read),
    ("use_rslora", Effect::Read),
    ("use_dora", Effect::Read),
    ("lora_bias", Effect::Read),
    ("bias", Effect::Read),
    ("rank_pattern", Effect::Read),
    ("alpha_pattern", Effect::Read),
    ("modules_to_save", Effect::Read),
    ("trainable_token_indices", Effect::Read),
    ("ensure_weight_tying", Effect::Read),
    ("layer_replication", Effect::Read),
    ("init_lora_weights", Effect::Read),
    ("feedforward_modules", Effect::Read),
    ("task_type", Effect::Read),
    ("enable_lora", Effect::Read),
    ("velora_config", Effect::Read),
    ("monteclora_config", Effect::Read),
    // Which modules were adapted is told by the keys themselves.
    ("target_modules", Effect::None),
    ("exclude_modules", Effect::None),
    ("layers_to_transform", Effect::None),
    ("layers_pattern", Effect::None),
    // The module's type decides in PEFT, its shape here; the flag is often wrong.
    ("fan_in_fan_out", Effect::None),
    ("base_model_name_or_path", Effect::None),
    ("revision", Effect::None),
    ("inference_mode", Effect::None),
    ("auto_mapping", Effect::None),
    ("peft_version", Effect::None),
    ("lora_dropout", Effect::None),
    ("megatron_config", Effect::None),
    ("megatron_core", Effect::None),
    ("loftq_config", Effect::None),
    ("eva_config", Effect::None),
    ("corda_config", Effect::None),
    ("lora_ga_config", Effect::None),
    ("runtime_config", Effect::None),
    ("qalora_group_size", Effect::None),
    ("init_ia3_weights", Effect::None),
    ("merge_weights", Effect::None),
    (
        "use_qalora",
        Effect::Refuse("QA-LoRA acts on pooled inputs and cannot be merged"),
    ),
    (
        "alora_invocation_tokens",
        Effect::Refuse(
            "an activated LoRA works only after its invocation tokens and cannot be merged",
        ),
    ),
    (
        "arrow_config",
        Effect::Refuse("Arrow routes between adapters by the input and cannot be merged"),
    ),
    (
        "kasa_config",
        Effect::Refuse("KaSA truncates the base weight first, which is not supported yet"),
    ),
    (
        "use_bdlora",
        Effect::Refuse("block-diagonal LoRA is not supported yet"),
    ),
    (
        "target_parameters",
        Effect::Refuse("adapters on bare parameters are not supported yet"),
    ),
];

/// Values of `peft_type` that put learned vectors before the input or into the attention.
pub(super) const INPUT_VECTORS: &[&str] = &[
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CARTRIDGE",
    "CPT",
];

/// Whether a configuration is that of prompts, prefixes and the like.
pub(super) fn holds_vectors(object: &Object) -> bool {
    let kind = object.get("peft_type").and_then(Value::as_str);
    kind.is_some_and(|kind| INPUT_VECTORS.contains(&kind))
}

/// Values of `init_lora_weights` that leave the base alone.
const HARMLESS_INITIALISATIONS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

/// Heads that PEFT trains whole for a task, without always saying so in `modules_to_save`
/// (`peft_model.py`, the classes for sequence and token classification and question answering).
const TASK_HEADS: &[(&str, &[&str])] = &[
    ("SEQ_CLS", &["classifier", "score"]),
    ("TOKEN_CLS", &["classifier", "score"]),
    ("QUESTION_ANS", &["qa_outputs"]),
    ("QUESTION_ANSWERING", &["qa_outputs"]),
];

/// Most entries of a pattern dictionary.
const PATTERN_LIMIT: usize = 20_000;

/// Most of them that need a compiled regular expression.
const REGEX_LIMIT: usize = 500;

/// Most of those that cost more than linear time on every module.
const LOOK_AROUND_LIMIT: usize = 20;

impl Settings {
    pub(super) fn read(object: &Object, allowed: &[String]) -> Result<Self> {
        let kind = match object.get("peft_type") {
            Some(Value::String(kind)) => kind.as_str(),
            Some(_) => return Err(wrong("peft_type", "a text")),
            None => "LORA", // PEFT's own earliest files, and tools that write only r and lora_alpha
        };
        let dora = flag(object, "use_dora")?;
        let tuner = TUNERS
            .iter()
            .find(|tuner| tuner.name == kind && tuner.dora == dora)
            .ok_or_else(|| {
                let name = kind.to_owned();
                let reason = match INPUT_VECTORS.contains(&kind) {
                    true => Reason::InputVectors { what: name },
                    false => Reason::Method { name },
                };
                Error::new(reason).on("peft_type")
            })?;
        let notices = check_fields(object, allowed)?;
        let flag = |name| flag(object, name);
        let bias = match object.get("bias") {
            None | Some(Value::Null) => "none",
            Some(Value::String(bias)) => bias.as_str(),
            Some(_) => return Err(wrong("bias", "a text")),
        };
        if !["none", "all", "lora_only"].contains(&bias) {
            return Err(refused(
                "bias",
                &Value::String(bias.to_owned()),
                "only none, all and lora_only are defined",
            ));
        }
        check_initialisation(object)?;
        let (rank, alpha) = match tuner.scaled {
            true => (rank(object)?, alpha(object)?),
            false => (1, 1.0),
        };
        let vacant = |name: &str| object.get(name).is_none_or(Value::is_vacant);
        Ok(Settings {
            tuner,
            lora_bias: flag("lora_bias")?,
            trains_biases: bias != "none",
            ensure_weight_tying: flag("ensure_weight_tying")?,
            training_state: !vacant("velora_config") || !vacant("monteclora_config"),
            replication: replication(object)?,
            merged: merged(object)?,
            notices,
            rank,
            alpha,
            root: flag("use_rslora")?,
            ranks: PatternMap::read(object, "rank_pattern")?,
            alphas: PatternMap::read(object, "alpha_pattern")?,
            feedforward: Targets::read(object, "feedforward_modules")?,
            saved: saved(object)?,
            tokens: tokens(object)?,
        })
    }

    /// α/r of a module: both looked up independently, first matching pattern in file order.
    pub(super) fn scale(&self, path: &str) -> Result<Scale> {
        let look_up = |map: &PatternMap, field| map.get(path).map_err(|e: Error| e.on(field));
        let rank = match look_up(&self.ranks, "rank_pattern")? {
            Some(rank) => positive(rank).ok_or_else(|| {
                let problem = format!("the rank {rank} is not a positive whole number");
                Error::new(Reason::FieldValue { problem }).on("rank_pattern")
            })?,
            None => self.rank,
        };
        let alpha = look_up(&self.alphas, "alpha_pattern")?.unwrap_or(self.alpha);
        if !alpha.is_finite() {
            return Err(Error::new(Reason::AlphaNotFinite {
                value: alpha.to_string(),
            })
            .on(path));
        }
        Ok(Scale::of(alpha, rank, self.root))
    }

    pub(super) fn is_feedforward(&self, path: &str) -> Result<bool> {
        let contains = self.feedforward.contains(path);
        contains.map_err(|e| e.on("feedforward_modules"))
    }

    /// Whether the configuration announces that a whole tensor is in the file.
    pub(super) fn declares(&self, name: &str) -> bool {
        // PEFT wraps by plain `endswith`, and children of a wrapped module come along.
        let owner = name.rsplit_once('.').map_or(name, |(owner, _)| owner);
        let mut paths = std::iter::successors(Some(owner), |path| Some(path.rsplit_once('.')?.0));
        let embedding = owner.ends_with("embed_tokens") || owner.ends_with("lm_head");
        embedding
            || paths.any(|path| {
                self.saved
                    .iter()
                    .any(|saved| path.ends_with(saved.as_str()))
            })
    }

    /// The token rows of an embedding.
    pub(super) fn tokens_of(&self, path: &str) -> Option<Vec<usize>> {
        let matches = |name: &Option<String>| {
            name.as_ref()
                .is_none_or(|name| path.ends_with(name.as_str()))
        };
        self.tokens
            .iter()
            .find(|(name, _)| matches(name))
            .map(|(_, indices)| indices.clone())
    }
}

/// Whether the name of a base says that it is quantised.
pub(super) fn names_quantised_base(base: &str) -> bool {
    let name = base.to_ascii_lowercase();
    [
        "bnb-4bit",
        "4bit",
        "8bit",
        "-gptq",
        "-awq",
        "int4",
        "int8",
        "-nf4",
        "-fp8",
        "quantized",
    ]
    .iter()
    .any(|mark| name.contains(mark))
}

/// Refuses what is unknown and could matter; reports what is unknown and cannot.
fn check_fields(object: &Object, allowed: &[String]) -> Result<Vec<Notice>> {
    let mut notices = Vec::new();
    let mut unknown = Vec::new();
    for (name, value) in &object.0 {
        match FIELDS.iter().find(|(known, _)| known == name) {
            Some((_, Effect::Refuse(why))) if !value.is_vacant() => {
                return Err(refused(name, value, why));
            }
            Some(_) => {}
            None if value.is_vacant() => notices.push(
                Notice::new(
                    NoticeKind::UnknownField,
                    format!("an unknown field, {value}"),
                )
                .on(name.as_str()),
            ),
            None if allowed.contains(name) => notices.push(
                Notice::new(
                    NoticeKind::UnknownField,
                    format!("an unknown field, {value}, accepted by the caller"),
                )
                .on(name.as_str()),
            ),
            None => unknown.push((name, value)),
        }
    }
    if let Some((name, value)) = unknown.first() {
        let cases = unknown
            .iter()
            .map(|(name, value)| format!("{name}: {value}"))
            .collect();
        let reason = Reason::UnknownConfigField {
            field: (*name).clone(),
            value: value.to_string(),
        };
        return Err(Error::new(reason).with_cases(cases));
    }
    Ok(notices)
}

fn check_initialisation(object: &Object) -> Result<()> {
    let value = match object.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => return Ok(()),
        Some(Value::String(value)) => value,
        Some(_) => return Err(wrong("init_lora_weights", "a text, true or false")),
    };
    let name = value.to_ascii_lowercase();
    if HARMLESS_INITIALISATIONS.contains(&name.as_str()) {
        return Ok(());
    }
    let why = if name.starts_with("pissa") {
        "PiSSA takes the largest singular directions out of the base first, which is not supported yet"
    } else if name == "olora" {
        "OLoRA takes a QR factor out of the base first, which is not supported yet"
    } else if name.starts_with("corda") || name == "lora_ga" {
        "it changes the base by what it saw in training data, which the files do not hold"
    } else if name == "loftq" {
        "it was trained on a base quantised by LoftQ, which the files do not hold"
    } else {
        "this initialisation is unknown and may have changed the base"
    };
    Err(Error::new(Reason::Initialisation { value: value.clone(), why })
        .on("init_lora_weights")
        .with_hint("convert the adapter with PEFT's `path_initial_model_for_weight_conversion`, which makes it a plain LoRA"))
}

fn rank(object: &Object) -> Result<usize> {
    let value = object
        .get("r")
        .ok_or_else(|| Error::new(Reason::FieldMissing { field: "r" }))?;
    value
        .as_f64()
        .and_then(positive)
        .ok_or_else(|| wrong("r", "a positive whole number"))
}

fn alpha(object: &Object) -> Result<f64> {
    let value = object.get("lora_alpha").ok_or_else(|| {
        Error::new(Reason::FieldMissing {
            field: "lora_alpha",
        })
    })?;
    let alpha = value
        .as_f64()
        .ok_or_else(|| wrong("lora_alpha", "a number"))?;
    if !alpha.is_finite() {
        return Err(Error::new(Reason::AlphaNotFinite {
            value: alpha.to_string(),
        })
        .on("lora_alpha"));
    }
    Ok(alpha)
}

fn positive(value: f64) -> Option<usize> {
    ((1.0..=1e9).contains(&value) && value.fract() == 0.0).then_some(value as usize)
}

fn flag(object: &Object, name: &'static str) -> Result<bool> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(wrong(name, "true or false")),
    }
}

fn replication(object: &Object) -> Result<Vec<(usize, usize)>> {
    let fail = || wrong("layer_replication", "a list of pairs [first, end]");
    let ranges = match object.get("layer_replication") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(ranges)) => ranges,
        Some(_) => return Err(fail()),
    };
    let index = |value: &Value| match value {
        Value::Integer(index) => usize::try_from(*index).ok(),
        _ => None,
    };
    let mut pairs = Vec::new();
    for range in ranges {
        let Value::Array(range) = range else {
            return Err(fail());
        };
        match range
            .iter()
            .map(index)
            .collect::<Option<Vec<_>>>()
            .as_deref()
        {
            Some(&[first, end]) if first <= end => pairs.push((first, end)),
            _ => return Err(fail()),
        }
    }
    Ok(pairs)
}

fn merged(object: &Object) -> Result<Vec<bool>> {
    let fail = || wrong("enable_lora", "a list of true and false");
    let values = match object.get("enable_lora") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(values)) => values,
        Some(_) => return Err(fail()),
    };
    let flag = |value: &Value| match value {
        Value::Bool(flag) => Ok(*flag),
        _ => Err(fail()),
    };
    let flags: Vec<bool> = values.iter().map(flag).collect::<Result<_>>()?;
    match flags.is_empty() || flags.contains(&true) {
        true => Ok(flags),
        false => Err(fail()),
    }
}

fn saved(object: &Object) -> Result<Vec<String>> {
    let mut saved = match object.get("modules_to_save") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(values)) => values
            .iter()
            .map(|value| value.as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| wrong("modules_to_save", "a list of texts"))?,
        Some(_) => return Err(wrong("modules_to_save", "a list of texts")),
    };
    if let Some(task) = object.get("task_type").and_then(Value::as_str)
        && let Some((_, heads)) = TASK_HEADS.iter().find(|(name, _)| *name == task)
    {
        saved.extend(heads.iter().map(|head| (*head).to_owned()));
    }
    saved.sort();
    saved.dedup(); // training loops that wrap again and again repeat the names
    Ok(saved)
}

fn tokens(object: &Object) -> Result<Vec<(Option<String>, Vec<usize>)>> {
    let fail = || {
        wrong(
            "trainable_token_indices",
            "a list of token numbers, or such lists by module",
        )
    };
    let indices = |value: &Value| -> Result<Vec<usize>> {
        let Value::Array(values) = value else {
            return Err(fail());
        };
        let index = |value: &Value| match value {
            Value::Integer(index) => usize::try_from(*index).ok(),
            _ => None,
        };
        let indices: Option<Vec<usize>> = values.iter().map(index).collect();
        let indices = indices.ok_or_else(fail)?;
        let mut sorted = indices.clone();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::new(Reason::FieldValue {
                problem: format!("token {} appears twice", pair[0]),
            })
            .on("trainable_token_indices")),
            None => Ok(indices),
        }
    };
    match object.get("trainable_token_indices") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(by_module)) => by_module
            .0
            .iter()
            .map(|(name, value)| Ok((Some(name.clone()), indices(value)?)))
            .collect(),
        Some(list) => Ok(vec![(None, indices(list)?)]),
    }
}

fn wrong(field: &str, expected: &'static str) -> Error {
    Error::new(Reason::FieldType { expected }).on(field)
}

fn refused(field: &str, value: &Value, why: &'static str) -> Error {
    let (field, value) = (field.to_owned(), value.to_string());
    Error::new(Reason::ConfigField { field, value, why })
}

/// A list of names, or one pattern.
#[derive(Debug, Default)]
enum Targets {
    #[default]
    Nothing,
    Suffixes(Vec<String>),
    Pattern(Pattern),
}

impl Targets {
    fn read(object: &Object, field: &'static str) -> Result<Self> {
        Ok(match object.get(field) {
            None | Some(Value::Null) => Targets::Nothing,
            Some(Value::String(pattern)) => {
                Targets::Pattern(Pattern::full(pattern).map_err(|e| e.on(field))?)
            }
            Some(Value::Array(values)) => {
                let names: Option<Vec<String>> = values
                    .iter()
                    .map(|value| value.as_str().map(str::to_owned))
                    .collect();
                Targets::Suffixes(names.ok_or_else(|| wrong(field, "a list of texts"))?)
            }
            Some(_) => return Err(wrong(field, "a list of texts, or a pattern")),
        })
    }

    fn contains(&self, path: &str) -> Result<bool> {
        match self {
            Targets::Nothing => Ok(false),
            Targets::Suffixes(names) => Ok(names.iter().any(|name| path.ends_with(name.as_str()))),
            Targets::Pattern(pattern) => pattern.matches(path),
        }
    }
}

/// `rank_pattern` or `alpha_pattern`: regular expressions in file order, first match wins.
///
/// Tools write one entry per module (thousands for mixtures of experts), nearly all of them plain
/// paths. Those are looked up by length; only the others are compiled.
#[derive(Debug, Default)]
struct PatternMap {
    values: Vec<f64>,
    plain: HashMap<usize, Vec<(usize, String)>>,
    compiled: Vec<(usize, Pattern)>,
}

impl PatternMap {
    fn read(object: &Object, field: &'static str) -> Result<Self> {
        let entries = match object.get(field) {
            None | Some(Value::Null) => return Ok(PatternMap::default()),
            Some(Value::Object(entries)) => &entries.0,
            Some(_) => return Err(wrong(field, "an object of numbers by pattern")),
        };
        if entries.len() > PATTERN_LIMIT {
            return Err(Error::new(Reason::TooMany {
                what: "patterns",
                limit: PATTERN_LIMIT,
            })
            .on(field));
        }
        let mut map = PatternMap::default();
        let mut look_around = 0;
        for (index, (key, value)) in entries.iter().enumerate() {
            let number = value
                .as_f64()
                .ok_or_else(|| wrong(field, "an object of numbers by pattern"))?;
            map.values.push(number);
            if key
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
            {
                map.plain
                    .entry(key.len())
                    .or_default()
                    .push((index, key.clone()));
            } else if map.compiled.len() == REGEX_LIMIT {
                return Err(Error::new(Reason::TooMany {
                    what: "regular expressions",
                    limit: REGEX_LIMIT,
                })
                .on(field));
            } else {
                let pattern = Pattern::suffix(key).map_err(|e| e.on(field))?;
                look_around += usize::from(!pattern.is_linear());
                if look_around > LOOK_AROUND_LIMIT {
                    return Err(Error::new(Reason::TooMany {
                        what: "patterns with look-around",
                        limit: LOOK_AROUND_LIMIT,
                    })
                    .on(field));
                }
                map.compiled.push((index, pattern));
            }
        }
        Ok(map)
    }

    fn get(&self, path: &str) -> Result<Option<f64>> {
        let mut first = usize::MAX;
        let starts = std::iter::once(0).chain(path.match_indices('.').map(|(at, _)| at + 1));
        for suffix in starts.map(|start| &path[start..]) {
            for (index, key) in self.plain.get(&suffix.len()).into_iter().flatten() {
                // In a regular expression the dot stands for any character.
                let matches = key
                    .bytes()
                    .zip(suffix.bytes())
                    .all(|(k, s)| k == s || k == b'.');
                if matches {
                    first = first.min(*index);
                    break;
                }
            }
        }
        for (index, pattern) in self.compiled.iter().take_while(|(index, _)| *index < first) {
            if pattern.matches(path)? {
                first = *index;
                break;
            }
        }
        Ok(self.values.get(first).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(json: &str) -> PatternMap {
        let object = crate::json::parse_object(json.as_bytes(), 1000).unwrap();
        PatternMap::read(&object, "rank_pattern").unwrap()
    }

    #[test]
    fn the_first_matching_pattern_in_file_order_wins() {
        let ranks = map(r#"{"rank_pattern": {"layers.0.q_proj": 2, ".*q_proj": 3, "q_proj": 4}}"#);
        assert_eq!(ranks.get("model.layers.0.q_proj").unwrap(), Some(2.0));
        assert_eq!(ranks.get("model.layers.1.q_proj").unwrap(), Some(3.0));
        assert_eq!(ranks.get("q_proj").unwrap(), Some(3.0));
        assert_eq!(ranks.get("model.layers.1.v_proj").unwrap(), None);
    }

    #[test]
    fn patterns_match_whole_segments_from_a_dot_on() {
        let ranks = map(r#"{"rank_pattern": {"proj": 2, "^model.k": 3, "a.b": 4}}"#);
        assert_eq!(ranks.get("m.q_proj").unwrap(), None);
        assert_eq!(ranks.get("m.proj").unwrap(), Some(2.0));
        assert_eq!(ranks.get("model.k").unwrap(), Some(3.0));
        assert_eq!(ranks.get("x.model.k").unwrap(), None);
        assert_eq!(
            ranks.get("m.a_b").unwrap(),
            Some(4.0),
            "a dot is any character"
        );
    }

    #[test]
    fn look_around_is_matched_and_explosions_are_errors() {
        let ranks = map(r#"{"rank_pattern": {"^(?!.*lm_head).*proj": 2}}"#);
        assert_eq!(ranks.get("model.q_proj").unwrap(), Some(2.0));
        assert_eq!(ranks.get("lm_head.q_proj").unwrap(), None);
        let evil = map(r#"{"rank_pattern": {"(?=x)(x+x+)+y": 2}}"#);
        let error = evil.get(&"x".repeat(60)).unwrap_err();
        assert!(
            matches!(error.reason(), Reason::TooManyPatternSteps { .. }),
            "{error}"
        );
    }
}
