//! AdapterHub: `….query.loras.<name>.lora_A` beside an `adapter_config.json` of its own.
//!
//! Source: `adapter-hub/adapters`, `src/adapters/methods/lora.py` (`LoRA`, `IA3`), `configuration/adapter_config.py`
//! (`LoRAConfig`) and `loading.py`. With `composition_mode` `add` it is LoRA, scaled by α/r; with `scale`,
//! `lora_B · α` multiplies the outputs, which is IA3. Other architectures are no change of weights.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{Adapter, Facts, Layer, Module, Role, Scale};
use crate::error::{Error, Reason, Result};
use crate::json::{Object, Value};
use crate::mapped::is_there;
use crate::methods::{ia3, lora};
use crate::naming::path::without_wrappers;
use crate::notice::{Notice, NoticeKind};
use crate::tensor::Tensor;

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
        let kind = Kind::read(settings, &options.allow_unknown_config)
            .map_err(|e| e.in_file(place.unwrap_or(&found.path)))?;
        let mut adapter = modules(found, kind)?;
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

/// What the vectors mean.
#[derive(Clone, Copy)]
enum Kind {
    Add(Scale),
    Multiply,
}

impl Kind {
    fn read(settings: &Object, allowed: &[String]) -> Result<Self> {
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

fn modules(found: &Found, kind: Kind) -> Result<Adapter> {
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
        list.push((role, tensor.clone()));
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
