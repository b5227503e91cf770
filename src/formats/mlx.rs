//! MLX: `adapter_config.json` beside `adapters.safetensors`, or an old `adapters.npz` without one.
//!
//! Source: `ml-explore/mlx-lm`, `mlx_lm/tuner/lora.py`, `dora.py` and `utils.py` (`load_adapters`). A linear
//! layer has `lora_a` of in × r and `lora_b` of r × out: the transposes of LoRA's factors, and read as such.
//! An embedding has `lora_a` of vocabulary × r and `lora_b` of r × dim, which are the factors of its weight as
//! it is stored. `scale` multiplies the product; an `alpha` beside it is not read by MLX either. DoRA adds `m`,
//! one norm per row. `full` holds whole tensors.

use std::collections::BTreeMap;
use std::path::Path;

use super::draft::{Draft, Writer, Written, common, reshaped, transposed, typed};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary};
use crate::adapter::{
    Adapter, Facts, Layer, Method, Module, Replacement, ReplacementKind, Role, Scale, Stored,
};
use crate::containers::numpy;
use crate::error::{Error, Reason, Result};
use crate::json::{Object, Value};
use crate::methods::{dora, lora};
use crate::naming::families::Layout;
use crate::naming::path::is_embedding;
use crate::notice::{Notice, NoticeKind};
use crate::tensor::{DType, Float, Tensor};

/// The format, in one of its two containers.
pub(super) struct Mlx {
    npz: bool,
}

pub(super) static MLX: Mlx = Mlx { npz: false };

/// What MLX wrote before safetensors, and still loads.
pub(super) static MLX_NPZ: Mlx = Mlx { npz: true };

impl Format for Mlx {
    fn id(&self) -> &'static str {
        if self.npz { "mlx-npz" } else { "mlx" }
    }

    fn name(&self) -> &'static str {
        if self.npz { "MLX (npz)" } else { "MLX" }
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        let ends = |end: &str| found.names().any(|name| name.ends_with(end));
        let is_npz = found.file.container.name() == numpy::NPZ;
        is_npz == self.npz
            && (found.configured("lora_parameters").is_some()
                || found.configured("fine_tune_type").is_some()
                || ends(".lora_a") && ends(".lora_b"))
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let config = found
            .config
            .as_ref()
            .ok_or_else(|| Error::new(Reason::ScaleMissing))?;
        let path = config.input.path();
        let settings = Settings::read(&config.object, &options.allow_unknown_config)
            .map_err(|e| e.in_file(path))?;
        let mut adapter = match settings.kind {
            Kind::Full => whole(found)?,
            Kind::Factors(method) => modules(found, &settings, method)?,
        };
        adapter.facts = facts(&config.object);
        // `LoRAEmbedding.as_linear` adapts the output as well, and a tied model has one tensor.
        adapter.keeps_ties = true;
        for tensor in &found.file.directory.tensors {
            if tensor.elements() == 0 {
                let text = format!("the tensor has no elements: shape {:?}", tensor.shape);
                let notice = Notice::new(NoticeKind::ZeroSized, text).on(&*tensor.name);
                adapter.notices.push(notice);
            }
        }
        let file: &Path = found.file.input.path();
        for notice in &mut adapter.notices {
            *notice = notice.clone().in_file(file);
        }
        Ok(adapter)
    }

    fn summary(&self, found: &Found) -> Summary {
        summarise(found, &[(".lora_a", 1)])
    }
}

impl Writer for Mlx {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    /// One scale for all modules; what is different is multiplied into `lora_b`.
    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            name: "adapters.safetensors",
            folder: true,
            ..Written::default()
        };
        let of_dora = |named: &&super::Named| named.module.method.name() == dora::DORA.name();
        let dora = draft.modules.iter().filter(of_dora).count() * 2 > draft.modules.len();
        let scale = common(draft.modules.iter().map(|n| n.module.scale.value)).unwrap_or(1.0);
        let mut all = Vec::new();
        for named in &draft.modules {
            let item = &*named.module.path;
            let Some(factors) = written.low_rank(named, true) else {
                continue;
            };
            if factors.down.shape.len() != 2 || factors.mid.is_some() {
                written.lose(item, "LoRA on a convolution");
                continue;
            }
            if factors.bias.is_some() || factors.input_magnitude.is_some() {
                written.lose(item, "a trained bias, or norms per input");
                continue;
            }
            if factors.magnitude.is_some() != dora {
                written.lose(item, "a mixture of LoRA and DoRA in one configuration");
                continue;
            }
            // Those of MLX are norms of the vectors of tokens (mlx-lm, `tuner/dora.py`).
            if factors.magnitude.is_some() && named.module.layer == Layer::Embedding {
                written.lose(item, "DoRA of an embedding with norms per feature");
                continue;
            }
            all.push((named, factors));
        }
        // MLX gives all layers one rank and loads no other.
        let rank = all.iter().map(|(_, factors)| factors.rank()).max();
        let mut keys = std::collections::BTreeSet::new();
        for (named, mut factors) in all {
            if let Some(rank) = rank {
                factors.fill(rank);
            }
            if named.module.scale.value != scale {
                let by = named.module.scale.value / scale;
                written.fold(draft, named, &mut factors, by);
            }
            // An embedding of PEFT is the transpose of its weight; one of MLX lies as the weight does.
            let as_stored = named.module.layer != Layer::Embedding && is_embedding(&named.path);
            let (a, b) = match as_stored {
                true => (factors.up.clone(), factors.down.clone()),
                false => (transposed(&factors.down), transposed(&factors.up)),
            };
            written.put(draft, format!("{}.lora_a", named.path), &a);
            written.put(draft, format!("{}.lora_b", named.path), &b);
            if let Some(magnitude) = &factors.magnitude {
                let magnitude = reshaped(magnitude, vec![magnitude.elements()]);
                written.put(draft, format!("{}.m", named.path), &magnitude);
            }
            // Keys are those within a block.
            let inner = named
                .path
                .split_once("layers.")
                .and_then(|(_, rest)| rest.split_once('.'));
            keys.insert(inner.map_or(named.path.as_str(), |(_, key)| key).to_owned());
        }
        written.lose_rest(draft);
        if self.npz {
            written.name = "adapters.npz";
            written.archive = Some(numpy::archive);
            for tensor in &mut written.tensors {
                if tensor.dtype == DType::BF16 {
                    // Numpy has no such type, and this one holds each of its values.
                    *tensor = typed(tensor, Some(Float::F32));
                }
            }
        }
        written.config = Some(serde_json::json!({
            "fine_tune_type": if dora { "dora" } else { "lora" },
            // All of them; a layer without factors here keeps factors that do nothing.
            "num_layers": -1,
            "lora_parameters": {
                "rank": rank.unwrap_or(8),
                "scale": scale,
                "dropout": 0.0,
                "keys": keys,
            },
        }));
        Ok(written)
    }
}

/// What was trained.
enum Kind {
    /// Whole tensors.
    Full,
    /// The factors of a method.
    Factors(&'static dyn Method),
}

struct Settings {
    kind: Kind,
    scale: f64,
    rank: Option<usize>,
}

/// What MLX knows of `lora_parameters`. All other fields of the file are those of the training command.
const PARAMETERS: &[&str] = &["rank", "scale", "dropout", "keys", "alpha"];

impl Settings {
    fn read(config: &Object, allowed: &[String]) -> Result<Self> {
        let kind = match config.get("fine_tune_type") {
            Some(Value::String(kind)) => match kind.as_str() {
                "lora" => Kind::Factors(&lora::LORA),
                "dora" => Kind::Factors(&dora::DORA),
                "full" => Kind::Full,
                _ => {
                    let name = format!("`{kind}` (fine_tune_type)");
                    return Err(Error::new(Reason::Method { name }));
                }
            },
            // Before it had a name, DoRA was a flag.
            None | Some(Value::Null) => match config.get("use_dora") {
                Some(Value::Bool(true)) => Kind::Factors(&dora::DORA),
                None | Some(Value::Null | Value::Bool(false)) => Kind::Factors(&lora::LORA),
                Some(_) => return Err(wrong_type("use_dora", "true or false")),
            },
            Some(_) => return Err(wrong_type("fine_tune_type", "a text")),
        };
        if let Kind::Full = kind {
            return Ok(Settings {
                kind,
                scale: 1.0,
                rank: None,
            });
        }
        let parameters = match config.get("lora_parameters") {
            Some(Value::Object(parameters)) => parameters,
            None | Some(Value::Null) => return Err(Error::new(Reason::ScaleMissing)),
            Some(_) => return Err(wrong_type("lora_parameters", "an object")),
        };
        for (name, value) in &parameters.0 {
            let field = format!("lora_parameters.{name}");
            if !PARAMETERS.contains(&name.as_str()) && !allowed.contains(&field) {
                let value = value.to_string();
                return Err(Error::new(Reason::UnknownConfigField { field, value }));
            }
        }
        let scale = match parameters.get("scale") {
            None => return Err(Error::new(Reason::ScaleMissing)),
            Some(value) => value
                .as_f64()
                .ok_or_else(|| wrong_type("lora_parameters.scale", "a number"))?,
        };
        if !scale.is_finite() {
            let value = scale.to_string();
            return Err(Error::new(Reason::AlphaNotFinite { value }).on("lora_parameters.scale"));
        }
        let rank = match parameters.get("rank") {
            Some(Value::Integer(rank)) => usize::try_from(*rank).ok(),
            _ => None,
        };
        Ok(Settings { kind, scale, rank })
    }
}

fn wrong_type(field: &str, expected: &'static str) -> Error {
    Error::new(Reason::FieldType { expected }).on(field)
}

/// Every tensor takes the place of the base's.
fn whole(found: &Found) -> Result<Adapter> {
    let mut adapter = Adapter::default();
    for tensor in &found.file.directory.tensors {
        if tensor.shape.len() > 2 {
            // MLX stores the channels of a convolution last.
            let reason = Reason::MethodOnTarget {
                method: "a full fine-tune of MLX",
                what: "a tensor of three axes or more",
            };
            return Err(tensor.error(reason));
        }
        adapter.replacements.push(Replacement {
            name: tensor.name.clone(),
            tensor: tensor.clone(),
            kind: ReplacementKind::Module,
        });
    }
    Ok(adapter)
}

fn modules(found: &Found, settings: &Settings, method: &'static dyn Method) -> Result<Adapter> {
    let mut order = Vec::new();
    let mut parts: BTreeMap<&str, Vec<(&str, &Tensor)>> = BTreeMap::new();
    let mut unknown = Vec::new();
    for tensor in &found.file.directory.tensors {
        match tensor.name.rsplit_once('.') {
            Some((path, part @ ("lora_a" | "lora_b" | "m"))) if !path.is_empty() => {
                let parts = parts.entry(path).or_insert_with(|| {
                    order.push(path);
                    Vec::new()
                });
                parts.push((part, tensor));
            }
            _ => unknown.push(tensor.name.clone()),
        }
    }
    if !unknown.is_empty() {
        let reason = Reason::UnknownKeys {
            count: unknown.len(),
        };
        return Err(Error::new(reason)
            .with_cases(unknown)
            .with_hint("MLX does not load an adapter with such keys either"));
    }
    let mut adapter = Adapter::default();
    let mut problems = Vec::new();
    for path in order {
        match module(path, &parts[path], settings, method) {
            Ok(module) => {
                if let (Some(stored), Some(configured)) = (method.rank(&module), settings.rank)
                    && stored != configured
                {
                    let text = format!(
                        "the tensors have rank {stored}, the configuration says {configured}; the scale does not depend on it"
                    );
                    let notice = Notice::new(NoticeKind::RankDiffers, text).on(path);
                    adapter.notices.push(notice);
                }
                adapter.modules.push(module);
            }
            Err(error) => problems.push(error),
        }
    }
    Error::of_all(problems)?;
    Ok(adapter)
}

fn module(
    path: &str,
    parts: &[(&str, &Tensor)],
    settings: &Settings,
    method: &'static dyn Method,
) -> Result<Module> {
    if let Some((_, tensor)) = parts.iter().find(|(_, tensor)| tensor.shape.len() > 2) {
        let reason = Reason::MethodOnTarget {
            method: "LoRA of MLX",
            what: "a mixture of experts (a factor of three axes)",
        };
        return Err(tensor.error(reason));
    }
    let embedding = is_embedding(path);
    let role = |part: &str| -> Role {
        match (part, embedding) {
            ("m", _) => dora::MAGNITUDE,
            ("lora_a", false) | ("lora_b", true) => lora::DOWN,
            _ => lora::UP,
        }
    };
    let parameters = parts
        .iter()
        .map(|(part, tensor)| (role(part), (*tensor).clone()))
        .collect();
    let stored = match embedding {
        true => Stored::AsDefined,
        false => Stored::Transposed,
    };
    let scale = Scale {
        value: settings.scale,
        ..Scale::ONE
    };
    Module::stored(
        path.to_owned(),
        method,
        parameters,
        scale,
        Layer::Dense,
        stored,
    )
}

fn facts(config: &Object) -> Facts {
    let text = |key: &str| config.get(key).and_then(Value::as_str).map(str::to_owned);
    let mut facts = Facts {
        base: text("model"),
        tool: Some("MLX".to_owned()),
        other: BTreeMap::new(),
    };
    if let Some(kind) = text("fine_tune_type") {
        facts.other.insert("fine_tune_type".to_owned(), kind);
    }
    facts
}
