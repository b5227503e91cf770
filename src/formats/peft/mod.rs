//! PEFT: `adapter_config.json` beside `adapter_model.safetensors`.
//!
//! Source: `huggingface/peft` 0.21.2, `src/peft/utils/save_and_load.py` (names), `src/peft/tuners/lora/config.py`
//! and `layer.py`, `src/peft/tuners/ia3/`. Keys are `base_model.model.` + module path + tuner tensor; the
//! adapter's own name, which raw state dicts keep, is one segment after the tuner tensor.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use super::blocks::block_diagonal;
use super::draft::Writer;
use super::pieces::{self, Pieces};
use super::spellings::summarise;
use super::{Format, Found, ReadOptions, Summary, torchtune};
use crate::adapter::{
    Adapter, Facts, Layer, Module, Order, Replacement, ReplacementKind, Role, Scale, TokenRows,
};
use crate::error::{Error, Reason, Result};
use crate::json::{Object, Value};
use crate::methods::lora;
use crate::naming::{Spelling, families, path};
use crate::notice::{Notice, NoticeKind};
use crate::printable::acts_on_a_terminal;
use crate::tensor::Tensor;

mod config;
mod key;
mod tuners;
pub(super) mod write;

use config::Settings;
use key::{Key, Tail};
use tuners::{Reads, Tuner};

/// The format.
pub(super) struct Peft;

impl Format for Peft {
    fn id(&self) -> &'static str {
        "peft"
    }

    fn name(&self) -> &'static str {
        "PEFT"
    }

    fn writer(&self) -> Option<&dyn Writer> {
        Some(self)
    }

    fn recognises(&self, found: &Found) -> bool {
        found.configured("peft_type").is_some()
            || found.configured("r").is_some() && found.configured("lora_alpha").is_some()
            || found.names().any(|name| name.starts_with(key::PREFIX))
    }

    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter> {
        let Some(config) = &found.config else {
            return without_configuration(found, options);
        };
        let path = config.input.path();
        if options.carry_vectors && config::holds_vectors(&config.object) {
            return Ok(Adapter {
                unused: found.file.directory.tensors.clone(),
                configuration: Some((&config.object).into()),
                ..Adapter::default()
            });
        }
        let settings = Settings::read(&config.object, &options.allow_unknown_config)
            .map_err(|e| e.in_file(path))?;
        torchtune::refuse_translated(found)?;
        Reader::new(&settings, path).read(found, &config.object)
    }

    fn summary(&self, found: &Found) -> Summary {
        let rank = [
            (".lora_A.weight", 0),
            (".lora_embedding_A", 0),
            (".lora_A", 0),
        ];
        let mut summary = summarise(found, &rank);
        if let Some(kind) = found.configured("peft_type").and_then(Value::as_str) {
            summary.facts.insert("peft_type".into(), kind.into());
            if let Some([count, width]) = found
                .file
                .tensor("prompt_embeddings")
                .map(|tensor| &*tensor.shape)
            {
                let text = format!("vectors: {count}, of width {width}");
                summary.facts.insert("prompt_embeddings".into(), text);
            }
        }
        summary
    }
}

/// Factors of LoRA whose configuration was lost: the caller states alpha. Of image and video models such files are
/// passed around as they are (fal's for FLUX.1), and diffusers and ComfyUI scale them by 1.
fn without_configuration(found: &Found, options: &ReadOptions) -> Result<Adapter> {
    let mut pieces = Pieces::new(Spelling::Dotted);
    let mut of_image_model = true;
    for tensor in &found.file.directory.tensors {
        let path = tensor.name.strip_prefix(key::PREFIX);
        match path.and_then(super::diffusers::parse) {
            Some((path, piece)) => {
                let known = families::find(&path, false);
                of_image_model &= known.iter().any(|found| found.family.denoiser().is_some());
                pieces.add(path, piece, tensor);
            }
            None => pieces.unknown(tensor),
        }
    }
    let (alpha, text) = match options.alpha {
        None if !of_image_model => {
            let hint =
                "--adapter-alpha states its alpha, if it is a LoRA without rsLoRA or patterns";
            return Err(Error::new(Reason::NoAdapterConfig).with_hint(hint));
        }
        None => (None, "its scale is 1, as in other files of image models"),
        Some(_) => (Some(options.alpha()?), "alpha is what the caller states"),
    };
    let text = format!("there is no `adapter_config.json`: {text}");
    pieces.notices([Notice::new(NoticeKind::ConfigMissing, text)]);
    let facts = pieces::facts("PEFT", Peft.summary(found));
    pieces.finish(found, facts, |_| {
        Ok(pieces::Told {
            alpha,
            ..pieces::Told::default()
        })
    })
}

/// What a configuration of LoRA says where it stands alone, in the metadata of diffusers.
pub(super) struct Told(Settings);

impl Told {
    pub(super) fn read(object: &Object, allowed: &[String]) -> Result<Self> {
        let settings = Settings::read(object, allowed)?;
        if settings.tuner.name != "LORA" {
            let name = settings.tuner.name.to_owned();
            return Err(Error::new(Reason::Method { name }).on("peft_type"));
        }
        if !settings.replication.is_empty() {
            let problem = "layer replication is not supported here".to_owned();
            return Err(Error::new(Reason::FieldValue { problem }).on("layer_replication"));
        }
        Ok(Told(settings))
    }

    pub(super) fn scale(&self, path: &str) -> Result<Scale> {
        self.0.scale(path)
    }

    pub(super) fn dora(&self) -> bool {
        self.0.tuner.dora
    }

    pub(super) fn notices(&self) -> &[Notice] {
        &self.0.notices
    }
}

/// The tensors of one module as they come in.
#[derive(Default)]
struct Parts {
    parameters: Vec<(Role, Tensor)>,
    embedding: bool,
    output_projection: bool,
}

struct Reader<'a> {
    settings: &'a Settings,
    config: &'a Path,
    adapter: Adapter,
    parts: BTreeMap<usize, (String, Parts)>,
    order: HashMap<String, usize>,
    unknown: Vec<String>,
    problems: Vec<Error>,
    adapter_names: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    fn new(settings: &'a Settings, config: &'a Path) -> Self {
        Reader {
            settings,
            config,
            adapter: Adapter::default(),
            parts: BTreeMap::new(),
            order: HashMap::new(),
            unknown: Vec::new(),
            problems: Vec::new(),
            adapter_names: BTreeSet::new(),
        }
    }

    fn read(mut self, found: &Found, object: &Object) -> Result<Adapter> {
        for tensor in &found.file.directory.tensors {
            self.sort(tensor);
        }
        if !self.unknown.is_empty() {
            let reason = Reason::UnknownKeys {
                count: self.unknown.len(),
            };
            return Err(Error::new(reason).with_cases(self.unknown));
        }
        if self.adapter_names.len() > 1 {
            let names: Vec<String> = self.adapter_names.into_iter().collect();
            let problem = format!("the file holds several adapters: {}", names.join(", "));
            return Err(Error::new(Reason::FieldValue { problem }));
        }
        for (path, parts) in std::mem::take(&mut self.parts).into_values() {
            match self.module(path, parts) {
                Ok(module) => self.adapter.modules.push(module),
                Err(error) => self.problems.push(error),
            }
        }
        Error::of_all(std::mem::take(&mut self.problems))?;
        self.adapter.replication = self.settings.replication.clone();
        self.adapter.tied = self.settings.ensure_weight_tying;
        self.adapter.facts = facts(object);
        self.notices(found);
        Ok(self.adapter)
    }

    /// Finds the place of one tensor in the adapter.
    fn sort(&mut self, tensor: &Tensor) {
        let key = Key::parse(&tensor.name);
        self.adapter_names.extend(key.adapter_name.clone());
        if let Tail::Tuner { token, end } = &key.tail
            && let Some(spelled) = self.settings.tuner.spelled(token, end)
        {
            let role = match spelled.reads {
                Reads::As(role) => Ok(Some(role)),
                Reads::If(holds, role) => Ok(holds(self.settings).then_some(role)),
                Reads::By(role) => role(self.settings, &key.path, tensor).map(Some),
            };
            match role {
                Ok(Some(role)) => self.parameter(key, role, spelled.layer, tensor),
                Ok(None) => self.unknown.push(tensor.name.clone()),
                Err(error) => self.problems.push(error.in_file(self.config)),
            }
            return;
        }
        match key.tail {
            Tail::Whole(parameter) => self.replace(key.path, parameter, key.base_layer, tensor),
            Tail::Tokens => match self.settings.tokens_of(&key.path) {
                Some(indices) => self.tokens(key.path, indices, tensor),
                None => self.unknown.push(format!(
                    "{} (no `trainable_token_indices` for it)",
                    tensor.name
                )),
            },
            Tail::Original => self.adapter.unused.push(tensor.clone()),
            Tail::TrainingState if self.settings.training_state => {
                self.adapter.unused.push(tensor.clone())
            }
            _ => self.unknown.push(tensor.name.clone()),
        }
    }

    fn parameter(&mut self, key: Key, role: Role, layer: Layer, tensor: &Tensor) {
        let next = self.order.len();
        let index = *self.order.entry(key.path.clone()).or_insert(next);
        let (_, parts) = self
            .parts
            .entry(index)
            .or_insert_with(|| (key.path, Parts::default()));
        if parts.parameters.iter().any(|(known, _)| *known == role) {
            self.unknown
                .push(format!("{} (a second {} factor)", tensor.name, role.name()));
            return;
        }
        parts.embedding |= layer == Layer::Embedding;
        parts.output_projection |= key.output_projection;
        parts.parameters.push((role, tensor.clone()));
    }

    fn replace(&mut self, path: String, parameter: String, base_layer: bool, tensor: &Tensor) {
        let kind = if parameter == "bias" && (base_layer || self.settings.trains_biases) {
            ReplacementKind::Bias
        } else if base_layer {
            ReplacementKind::BaseLayer
        } else {
            ReplacementKind::Module
        };
        let name = if path.is_empty() {
            parameter
        } else {
            format!("{path}.{parameter}")
        };
        self.adapter.replacements.push(Replacement {
            name,
            tensor: tensor.clone(),
            kind,
        });
    }

    fn tokens(&mut self, path: String, indices: Vec<usize>, tensor: &Tensor) {
        if tensor.dimension(0) != indices.len() || tensor.shape.len() != 2 {
            let reason = Reason::TokenCount {
                indices: indices.len(),
                rows: tensor.dimension(0),
            };
            self.problems.push(tensor.error(reason));
            return;
        }
        self.adapter.tokens.push(TokenRows {
            path,
            indices,
            rows: tensor.clone(),
        });
    }

    fn module(&mut self, path: String, mut parts: Parts) -> Result<Module> {
        if !self.settings.merged.is_empty() {
            self.unmerge(&mut parts)?;
        }
        let Tuner { method, scaled, .. } = *self.settings.tuner;
        let layer = if parts.embedding {
            Layer::Embedding
        } else {
            Layer::Dense
        };
        let scale = match scaled {
            false => Scale::ONE,
            true => {
                // The output projection of nn.MultiheadAttention shares the patterns of its parent, and
                // PEFT adds its delta twice, in the forward pass and in the merge alike
                // (tuners/lora/layer.py, MultiheadAttention).
                let owner = path
                    .strip_suffix(".out_proj")
                    .filter(|_| parts.output_projection);
                let scale = self.settings.scale(owner.unwrap_or(&path));
                let mut scale = scale.map_err(|e| e.in_file(self.config))?;
                if parts.output_projection {
                    scale.value *= 2.0;
                }
                scale
            }
        };
        let module = Module::new(path, method, parts.parameters, scale, layer)?;
        if parts.output_projection && method.order() == Order::Sequential {
            let reason = Reason::MethodOnTarget {
                method: method.name(),
                what: "nn.MultiheadAttention",
            };
            return Err(module.error(reason));
        }
        if let (Some(stored), Some(configured)) = (method.rank(&module), scale.rank)
            && stored != configured * self.merged_parts()
        {
            self.notice(
                Notice::new(
                    NoticeKind::RankDiffers,
                    format!("the tensors have rank {stored}, the configuration says {configured}; the scale follows the configuration"),
                )
                .on(&*module.path),
            );
        }
        if scale.value < 0.0 {
            self.notice(
                Notice::new(NoticeKind::NegativeAlpha, "alpha is negative").on(&*module.path),
            );
        }
        Ok(module)
    }

    /// How many factors the down factor of a module holds.
    fn merged_parts(&self) -> usize {
        let adapted = self.settings.merged.iter().filter(|adapted| **adapted);
        adapted.count().max(1)
    }

    /// Writes the factors of a `MergedLinear` as those of one layer (PEFT 0.2, `src/peft/tuners/lora.py`): A holds
    /// the factors of the adapted parts one below the other, B is the weight of a convolution with as many
    /// groups, and the parts are equal shares of the outputs (`zero_pad`).
    fn unmerge(&self, parts: &mut Parts) -> Result<()> {
        let count = self.merged_parts();
        let down = parts
            .parameters
            .iter()
            .find(|(role, _)| *role == lora::DOWN);
        let rank = down.map(|(_, down)| down.dimension(0));
        for (role, up) in &mut parts.parameters {
            if *role != lora::UP {
                continue;
            }
            let (rows, grouped) = (up.dimension(0), up.dimension(1));
            let fits = up.shape.len() == 3 && rows.is_multiple_of(count);
            if !fits || grouped.checked_mul(count) != rank {
                let problem = format!(
                    "factors of rank {grouped} in {:?} and {} in all are not those of {count} parts (`enable_lora`)",
                    up.shape,
                    rank.unwrap_or(0)
                );
                return Err(up.error(Reason::FactorShape { problem }));
            }
            let adapted = self.settings.merged.iter();
            let shares: Vec<_> = adapted.map(|adapted| (rows / count, *adapted)).collect();
            *up = block_diagonal(up, &shares)?;
        }
        Ok(())
    }

    fn notice(&mut self, notice: Notice) {
        self.adapter.notices.push(notice);
    }

    fn notices(&mut self, found: &Found) {
        let file = found.file.input.path();
        self.adapter
            .notices
            .extend(self.settings.notices.iter().cloned());
        for tensor in &found.file.directory.tensors {
            if tensor.elements() == 0 {
                let text = format!("the tensor has no elements: shape {:?}", tensor.shape);
                self.notice(Notice::new(NoticeKind::ZeroSized, text).on(&*tensor.name));
            }
            if tensor
                .name
                .chars()
                .any(|c| acts_on_a_terminal(c) || c.is_whitespace())
            {
                let text = "the name holds characters that are not those of a module path";
                self.notice(Notice::new(NoticeKind::OddName, text).on(&*tensor.name));
            }
        }
        for tensor in self.adapter.unused.clone() {
            let text = "training state, which the merged weights do not depend on";
            self.notice(Notice::new(NoticeKind::Unused, text).on(&*tensor.name));
        }
        let biases = self
            .adapter
            .replacements
            .iter()
            .any(|r| r.kind == ReplacementKind::Bias);
        if self.settings.trains_biases && !biases {
            self.notice(
                Notice::new(
                    NoticeKind::BiasMissing,
                    "the configuration trains biases, but the file holds none",
                )
                .on("bias"),
            );
        }
        for replacement in &self.adapter.replacements {
            let declared = replacement.kind != ReplacementKind::Module
                || self.settings.declares(&replacement.name);
            if !declared {
                let text =
                    "a whole tensor that the configuration does not announce (modules_to_save)";
                self.adapter
                    .notices
                    .push(Notice::new(NoticeKind::Contradiction, text).on(&*replacement.name));
            }
        }
        if let Some(base) = &self.adapter.facts.base
            && config::names_quantised_base(base)
        {
            let text = format!(
                "it was trained on a quantised base ({base}); merging into the 16-bit original differs by the quantisation error"
            );
            self.notice(
                Notice::new(NoticeKind::QuantisedTraining, text).on("base_model_name_or_path"),
            );
        }
        for notice in &mut self.adapter.notices {
            *notice = notice.clone().in_file(file);
        }
    }
}

fn facts(object: &Object) -> Facts {
    let text = |key: &str| {
        object
            .get(key)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    };
    let mut facts = Facts {
        base: text("base_model_name_or_path").map(str::to_owned),
        tool: Some(match text("peft_version") {
            Some(version) => format!("PEFT {version}"),
            None => "PEFT".to_owned(),
        }),
        other: BTreeMap::new(),
    };
    for key in ["task_type", "revision", "bias", "peft_type"] {
        if let Some(value) = text(key) {
            facts.other.insert(key.to_owned(), value.to_owned());
        }
    }
    if let Some(Value::Object(mapping)) = object.get("auto_mapping")
        && let Some(class) = mapping.get("base_model_class").and_then(Value::as_str)
    {
        facts
            .other
            .insert("base_model_class".to_owned(), class.to_owned());
    }
    facts
}

/// The path with the wrappers of compilers and sharders taken out.
fn unwrapped(path: &str) -> String {
    path::without_wrappers(path)
}
