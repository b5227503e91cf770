//! AdapterHub: `….query.loras.<name>.lora_A` beside an `adapter_config.json` of its own.
//!
//! Source: `adapter-hub/adapters`, `src/adapters/methods/lora.py` (`LoRA`, `IA3`), `configuration/adapter_config.py`
//! (`LoRAConfig`) and `loading.py`. With `composition_mode` `add` it is LoRA, scaled by α/r; with `scale`,
//! `lora_B · α` multiplies the outputs, which is IA3. Other architectures are no change of weights.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::blocks::block_diagonal;
use super::draft::{Draft, LowRank, Named, Part, Writer, Written, joined, reshaped};
use super::peft::write::number;
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Facts, Layer, Method, Module, Role, Scale};
use crate::error::{Error, Reason, Result};
use crate::json::{Object, Value};
use crate::mapped::is_there;
use crate::methods::{ia3, lora};
use crate::naming::families::Layout;
use crate::naming::path::{leaf, without_wrappers};
use crate::notice::{Notice, NoticeKind};
use crate::tensor::{Tensor, narrow};

/// The format.
pub(super) struct AdapterHub;

/// What stands between a layer and the name of the adapter.
const MARK: &str = ".loras.";

/// Why other architectures cannot be merged.
const NO_WEIGHTS: &[(&str, &str)] = &[
    (
        "bottleneck",
        "a bottleneck adapter is a layer of its own with an activation between its two matrices",
    ),
    (
        "prefix_tuning",
        "a prefix is keys and values for the attention rather than a change of weights",
    ),
    (
        "prompt_tuning",
        "a prompt is vectors for the input rather than a change of weights",
    ),
    (
        "reft",
        "ReFT changes hidden states at chosen positions rather than weights",
    ),
    ("union", "several methods in one adapter are not supported"),
];

/// Fields of a LoRA configuration that are read below or told by the names.
const FIELDS: &[&str] = &[
    "architecture",
    "selfattn_lora",
    "intermediate_lora",
    "output_lora",
    "leave_out",
    "r",
    "alpha",
    "dropout",
    "attn_matrices",
    "composition_mode",
    "init_weights",
    "use_gating",
    "dtype",
];

impl Format for AdapterHub {
    fn id(&self) -> &'static str {
        "adapterhub"
    }

    fn name(&self) -> &'static str {
        "AdapterHub"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        settings(found).is_some_and(|settings| settings.get("architecture").is_some())
            || found.names().any(|name| {
                name.contains(MARK) && name.contains(".lora_")
                    || name.contains(".adapters.") && name.contains(".adapter_down.")
            })
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let Some(settings) = settings(found) else {
            return Err(Error::new(Reason::NoAdapterConfig));
        };
        let place = found.config.as_ref().map(|config| config.input.path());
        let in_config = |e: Error| e.in_file(place.unwrap_or(&found.path));
        let is_old = is_old(found);
        let kind =
            Kind::read(settings, is_old, &options.allow_unknown_config).map_err(in_config)?;
        let adapted = adapted(settings).map_err(in_config)?;
        let mut adapter = modules(found, kind, adapted)?;
        if is_old && settings.get("r") != settings.get("alpha") {
            let text = "written before adapters 1.1.0, which scaled by 1 whatever alpha says; so it is read, as adapters does";
            let notice = Notice::new(NoticeKind::Contradiction, text).on("config.alpha");
            adapter.notices.push(notice);
        }
        let text = |key: &str| found.configured(key).and_then(Value::as_str);
        adapter.facts = Facts {
            base: text("model_name").map(str::to_owned),
            tool: Some(match text("version") {
                Some(version) => format!("adapters {version}"),
                None => "adapters".to_owned(),
            }),
            ..Facts::default()
        };
        if found.path.is_dir() && is_there(&found.folder.join("head_config.json")) {
            let text = "a prediction head lies beside the adapter, which is not part of the result";
            adapter
                .notices
                .push(Notice::new(NoticeKind::LeftOut, text).on("head_config.json"));
        }
        let file: &Path = found.file.input.path();
        for notice in &mut adapter.notices {
            *notice = notice.clone().in_file(file);
        }
        Ok(adapter)
    }

    fn summary(&self, found: &Found) -> Summary {
        let mut summary = summarise(found, &[(".lora_A", 0)]);
        let architecture = settings(found).and_then(|settings| settings.get("architecture"));
        if let Some(value) = architecture {
            let name = value.as_str().unwrap_or("bottleneck");
            summary
                .facts
                .insert("architecture".to_owned(), name.to_owned());
        }
        summary
    }
}

fn settings(found: &Found) -> Option<&Object> {
    // PEFT has a file of the same name.
    if found.configured("peft_type").is_some() {
        return None;
    }
    found.configured("config").and_then(Value::as_object)
}

/// Whether it was written when LoRA was not scaled as configured (`_fix_backward_compat`).
fn is_old(found: &Found) -> bool {
    let version = found.configured("version").and_then(Value::as_str);
    let version = version.and_then(|version| version.strip_prefix("adapters."));
    let mut numbers = version.into_iter().flat_map(|text| text.split('.'));
    let mut next = || numbers.next().and_then(|text| text.parse::<u32>().ok());
    matches!((next(), next()), (Some(major), minor) if (major, minor.unwrap_or(0)) < (1, 1))
}

/// Which of queries, keys and values are adapted.
fn adapted(settings: &Object) -> Result<[bool; 3]> {
    let matrices = match settings.get("attn_matrices") {
        Some(Value::Array(matrices)) => matrices.as_slice(),
        None | Some(Value::Null) => &[],
        Some(_) => {
            let expected = "a list of texts";
            return Err(Error::new(Reason::FieldType { expected }).on("config.attn_matrices"));
        }
    };
    let has = |letter| {
        matrices
            .iter()
            .any(|matrix| matrix.as_str() == Some(letter))
    };
    Ok(MATRICES.map(has))
}

/// Queries, keys and values in `attn_matrices`, in the order of fused layers.
const MATRICES: [&str; 3] = ["q", "k", "v"];

/// Layers that are all three (`LoRAMergedLinear`: GPT-2, DeBERTa).
const FUSED: &[&str] = &["c_attn", "in_proj"];

/// What the vectors mean.
#[derive(Clone, Copy)]
enum Kind {
    Add(Scale),
    Multiply,
}

impl Kind {
    fn read(settings: &Object, is_old: bool, allowed: &[String]) -> Result<Self> {
        let refused = |field: &str, value: &Value, why| {
            Error::new(Reason::ConfigField {
                field: format!("config.{field}"),
                value: value.to_string(),
                why,
            })
        };
        let vacant = Value::Null;
        let get = |field: &str| settings.get(field).unwrap_or(&vacant);
        let architecture = get("architecture");
        let name = architecture.as_str().unwrap_or("bottleneck");
        if name != "lora" {
            let known = NO_WEIGHTS.iter().find(|(known, _)| *known == name);
            let why = known.map_or("this architecture is not known", |(_, why)| why);
            return Err(refused("architecture", architecture, why));
        }
        for (field, value) in &settings.0 {
            let full = format!("config.{field}");
            if !FIELDS.contains(&field.as_str()) && !value.is_vacant() && !allowed.contains(&full) {
                let value = value.to_string();
                return Err(Error::new(Reason::UnknownConfigField {
                    field: full,
                    value,
                }));
            }
        }
        if !get("use_gating").is_vacant() {
            let why = "a gate makes the change depend on the input";
            return Err(refused("use_gating", get("use_gating"), why));
        }
        let number = |field: &'static str| {
            let expected = "a finite number";
            let value = get(field).as_f64().filter(|value| value.is_finite());
            value.ok_or_else(|| Error::new(Reason::FieldType { expected }).on(field))
        };
        let (rank, alpha) = (number("r")?, number("alpha")?);
        let alpha = if is_old { rank } else { alpha };
        match get("composition_mode").as_str() {
            Some("add") if (1.0..=1e9).contains(&rank) && rank.fract() == 0.0 => {
                Ok(Kind::Add(Scale::of(alpha, rank as usize, false)))
            }
            Some("add") => {
                let expected = "a positive whole number";
                Err(Error::new(Reason::FieldType { expected }).on("r"))
            }
            Some("scale") if alpha == 1.0 => Ok(Kind::Multiply),
            Some("scale") => {
                let why = "vectors that multiply are read only with an alpha of 1";
                Err(refused("alpha", get("alpha"), why))
            }
            _ => {
                let why = "only add and scale are defined";
                Err(refused("composition_mode", get("composition_mode"), why))
            }
        }
    }
}

/// The path of the layer in a key.
fn path_of(key: &str) -> &str {
    key.rsplit_once(MARK).map_or(key, |(path, _)| path)
}

/// The rows of the three parts of a fused layer, and which of them are adapted.
fn thirds(tensor: &Tensor, adapted: [bool; 3]) -> Result<[(usize, bool); 3]> {
    let (rows, count) = (
        tensor.dimension(0),
        adapted.iter().filter(|on| **on).count(),
    );
    if count == 0 || !rows.is_multiple_of(count) {
        let problem = format!("{rows} rows are not those of {count} parts (`attn_matrices`)");
        return Err(tensor.error(Reason::FactorShape { problem }));
    }
    Ok(adapted.map(|on| (rows / count, on)))
}

/// The factors of a whole fused layer: 1 where it is not adapted.
fn with_ones(factors: &Tensor, parts: &[(usize, bool); 3]) -> Result<Tensor> {
    let float = factors.float()?;
    if factors.elements() != factors.dimension(0) {
        let problem = format!("factors of shape {:?} instead of one column", factors.shape);
        return Err(factors.error(Reason::FactorShape { problem }));
    }
    let rows = parts.iter().map(|part| part.0).sum();
    let (source, parts) = (factors.clone(), *parts);
    let made = move || {
        let bytes = source.bytes()?;
        let mut one = vec![0; float.size()];
        narrow(float, &[1.0], &mut one);
        let mut rest = &*bytes;
        let mut whole = Vec::new();
        for (rows, adapted) in parts {
            let own = if adapted { rows * float.size() } else { 0 };
            let (taken, others) = rest.split_at(own.min(rest.len()));
            rest = others;
            match adapted {
                true => whole.extend_from_slice(taken),
                false => whole.extend(one.iter().copied().cycle().take(rows * float.size())),
            }
        }
        Ok(whole)
    };
    Ok(factors.derived(factors.dtype, vec![rows, 1], Arc::new(made)))
}

fn modules(found: &Found, kind: Kind, adapted: [bool; 3]) -> Result<Adapter> {
    let mut parts: Vec<(String, Vec<(Role, Tensor)>)> = Vec::new();
    let mut order: HashMap<String, usize> = HashMap::new();
    let (mut unknown, mut names) = (Vec::new(), BTreeSet::new());
    for tensor in &found.file.directory.tensors {
        let split = tensor.name.rsplit_once(MARK).and_then(|(path, rest)| {
            let (name, parameter) = rest.split_once('.')?;
            let role = match (parameter, kind) {
                ("lora_A", Kind::Add(_)) => lora::DOWN,
                ("lora_B", Kind::Add(_)) => lora::UP,
                ("lora_B", Kind::Multiply) => ia3::OUTPUT_SCALE,
                _ => return None,
            };
            Some((without_wrappers(path), name, role))
        });
        let Some((path, name, role)) = split else {
            unknown.push(tensor.name.clone());
            continue;
        };
        names.insert(name);
        let index = *order.entry(path.clone()).or_insert_with(|| {
            parts.push((path, Vec::new()));
            parts.len() - 1
        });
        let list = &mut parts[index].1;
        if list.iter().any(|(known, _)| *known == role) {
            unknown.push(format!("{} (a second tensor in one place)", tensor.name));
        }
        let fused = FUSED.contains(&leaf(path_of(&tensor.name)));
        list.push(match (fused, role) {
            (true, lora::UP) => (role, block_diagonal(tensor, &thirds(tensor, adapted)?)?),
            (true, ia3::OUTPUT_SCALE) => (role, with_ones(tensor, &thirds(tensor, adapted)?)?),
            _ => (role, tensor.clone()),
        });
    }
    if !unknown.is_empty() {
        let count = unknown.len();
        return Err(Error::new(Reason::UnknownKeys { count }).with_cases(unknown));
    }
    if names.len() > 1 {
        let names: Vec<&str> = names.into_iter().collect();
        let problem = format!("the file holds several adapters: {}", names.join(", "));
        return Err(Error::new(Reason::FieldValue { problem }));
    }
    let mut adapter = Adapter::default();
    let mut problems = Vec::new();
    for (path, list) in parts {
        let made = match kind {
            Kind::Add(scale) => Module::new(path, &lora::LORA, list, scale, Layer::Dense),
            Kind::Multiply => Module::new(path, &ia3::IA3, list, Scale::ONE, Layer::Dense),
        };
        match made {
            Ok(module) => adapter.modules.push(module),
            Err(error) => problems.push(error),
        }
    }
    Error::of_all(problems)?;
    Ok(adapter)
}

/// A layer that adapters has a place for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spot {
    /// One of [`MATRICES`].
    Attention(usize),
    /// All three in one layer.
    Fused,
    /// The first layer of a feed-forward block.
    Intermediate,
    /// The last one.
    Output,
}

/// Ends of paths, and what adapters takes the layer for (`models/*/mixin_*.py`; of Llama and Mistral it takes
/// `down_proj` for the first layer and `up_proj` for the last one).
const SPOTS: &[(&str, Spot)] = &[
    ("query", Spot::Attention(0)),
    ("q_proj", Spot::Attention(0)),
    ("q_lin", Spot::Attention(0)),
    ("q", Spot::Attention(0)),
    ("key", Spot::Attention(1)),
    ("k_proj", Spot::Attention(1)),
    ("k_lin", Spot::Attention(1)),
    ("k", Spot::Attention(1)),
    ("value", Spot::Attention(2)),
    ("v_proj", Spot::Attention(2)),
    ("v_lin", Spot::Attention(2)),
    ("v", Spot::Attention(2)),
    ("c_attn", Spot::Fused),
    ("in_proj", Spot::Fused),
    ("intermediate.dense", Spot::Intermediate),
    ("mlp.c_fc", Spot::Intermediate),
    ("ffn.lin1", Spot::Intermediate),
    ("fc1", Spot::Intermediate),
    ("DenseReluDense.wi", Spot::Intermediate),
    ("DenseReluDense.wi_1", Spot::Intermediate),
    ("mlp.down_proj", Spot::Intermediate),
    ("output.dense", Spot::Output),
    ("mlp.c_proj", Spot::Output),
    ("ffn.lin2", Spot::Output),
    ("fc2", Spot::Output),
    ("DenseReluDense.wo", Spot::Output),
    ("mlp.up_proj", Spot::Output),
];

/// The output of an attention, which ends as that of a block does.
const ATTENTION_OUTPUT: &str = "attention.output.dense";

impl Spot {
    fn of(path: &str) -> Option<Self> {
        let ends = |(end, _): &&(&str, Spot)| {
            let rest = path.strip_suffix(end);
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let found = SPOTS.iter().find(ends)?;
        (!path.ends_with(ATTENTION_OUTPUT)).then_some(found.1)
    }
}

/// The name of the adapter.
const NAME: &str = "default";

impl Writer for AdapterHub {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    /// LoRA, or IA3 where most modules are that: one configuration is for one of them.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: "adapter.safetensors",
            folder: true,
            ..Written::default()
        };
        let mut spots = Vec::new();
        let mut known = Vec::new();
        for named in &draft.modules {
            match Spot::of(&named.path) {
                Some(spot) => known.push((named, spot)),
                None => {
                    let text = "a layer that adapters does not adapt";
                    written.lose(&*named.module.path, text);
                }
            }
        }
        let vectors = known
            .iter()
            .filter(|(named, _)| named.module.method.name() == ia3::IA3.name());
        let multiplies = vectors.count() * 2 > known.len();
        let (rank, alpha) = match multiplies {
            true => {
                scales(draft, &known, &mut written, &mut spots);
                (1, 1.0)
            }
            false => factors(draft, &known, &mut written, &mut spots)?,
        };
        written.lose_rest(draft);
        let has = |spot| spots.contains(&spot);
        let attention = [0, 1, 2].map(|matrix| has(Spot::Attention(matrix)));
        let matrices = MATRICES.iter().zip(attention).filter(|(_, on)| *on);
        let matrices: Vec<&str> = matrices.map(|(matrix, _)| *matrix).collect();
        written.config = Some(json!({
            "config": {
                "alpha": number(alpha),
                "architecture": "lora",
                "attn_matrices": matrices,
                "composition_mode": if multiplies { "scale" } else { "add" },
                "dropout": 0.0,
                "dtype": null,
                "init_weights": if multiplies { "ia3" } else { "lora" },
                "init_weights_seed": null,
                "intermediate_lora": has(Spot::Intermediate),
                "leave_out": [],
                "output_lora": has(Spot::Output),
                "r": rank,
                "selfattn_lora": attention.contains(&true),
                "use_dora": false,
                "use_gating": false,
                "vera_b": null,
                "vera_d": null,
            },
            "model_name": draft.adapter.facts.base,
            "name": NAME,
            "version": "adapters.1.3.0",
        }));
        Ok(written)
    }
}

fn key(path: &str, parameter: &str) -> String {
    format!("{path}{MARK}{NAME}.{parameter}")
}

/// LoRA, with one rank and one α; fused layers by their parts, of which every layer has the same.
fn factors(
    draft: &Draft<'_>,
    known: &[(&Named, Spot)],
    written: &mut Written,
    spots: &mut Vec<Spot>,
) -> Result<(usize, f64)> {
    let mut parts = Vec::new();
    for (named, _) in known.iter().filter(|(_, spot)| *spot == Spot::Fused) {
        let module = &named.module;
        let rows = module.method.extent(module).outputs.unwrap_or(0);
        if !rows.is_multiple_of(3) || module.method.name() != lora::LORA.name() {
            written.lose(
                &*module.path,
                "a fused layer that is not LoRA of three parts",
            );
            continue;
        }
        for matrix in 0..3 {
            let range = matrix * (rows / 3)..(matrix + 1) * (rows / 3);
            let part = module.outputs(std::slice::from_ref(&range))?;
            let part = module.method.without_zeros(part)?;
            parts.extend(part.map(|module| {
                let named = Named {
                    module,
                    ..(*named).clone()
                };
                (named, Some(matrix))
            }));
        }
    }
    let single = known.iter().filter(|(_, spot)| *spot != Spot::Fused);
    let places: Vec<(&Named, (Option<usize>, Spot))> = single
        .map(|(named, spot)| (*named, (None, *spot)))
        .chain(parts.iter().map(|(named, matrix)| {
            let spot = Spot::Attention(matrix.unwrap_or(0));
            (named, (*matrix, spot))
        }))
        .collect();
    let alike = written.alike(draft, places, false);
    let mut fused: Vec<(&str, [Option<&LowRank>; 3])> = Vec::new();
    for (named, factors, (matrix, spot)) in &alike.modules {
        spots.push(*spot);
        let Some(matrix) = matrix else {
            written.put(draft, key(&named.path, "lora_A"), &factors.down);
            written.put(draft, key(&named.path, "lora_B"), &factors.up);
            continue;
        };
        match fused.iter_mut().find(|(path, _)| *path == named.path) {
            Some((_, parts)) => parts[*matrix] = Some(factors),
            None => {
                let mut parts = [None; 3];
                parts[*matrix] = Some(factors);
                fused.push((&named.path, parts));
            }
        }
    }
    for (path, parts) in fused {
        let rows = parts.iter().flatten().next();
        let rows = rows.map_or(0, |factors| factors.up.dimension(0));
        let part = |(matrix, own): (usize, &Option<&LowRank>)| Part {
            rows,
            adapted: spots.contains(&Spot::Attention(matrix)),
            factors: own.map(|factors| (factors.down.clone(), factors.up.clone())),
        };
        let parts: Vec<Part> = parts.iter().enumerate().map(part).collect();
        if let Some((down, up)) = joined(&parts, draft.dtype) {
            written.put(draft, key(path, "lora_A"), &down);
            written.put(draft, key(path, "lora_B"), &up);
        }
    }
    Ok((alike.rank, alike.alpha))
}

/// IA3 on outputs. Of a fused layer all three parts are written.
fn scales(
    draft: &Draft<'_>,
    known: &[(&Named, Spot)],
    written: &mut Written,
    spots: &mut Vec<Spot>,
) {
    for (named, spot) in known {
        let module = &named.module;
        if module.method.name() != ia3::IA3.name() {
            let text = format!("the method {} beside IA3", module.method.name());
            written.lose(&*module.path, text);
            continue;
        }
        let Some(factors) = module.get(ia3::OUTPUT_SCALE) else {
            written.lose(&*module.path, "factors on inputs");
            continue;
        };
        match spot {
            Spot::Fused => spots.extend([0, 1, 2].map(Spot::Attention)),
            spot => spots.push(*spot),
        }
        let factors = reshaped(factors, vec![factors.elements(), 1]);
        written.put(draft, key(&named.path, "lora_B"), &factors);
    }
}
