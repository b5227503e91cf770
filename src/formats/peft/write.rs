//! Writing PEFT: the keys and the configuration that `save_pretrained` gives.
//!
//! Source: `huggingface/peft` 0.21.2, `src/peft/utils/save_and_load.py` and `src/peft/tuners/lora/config.py`.
//! Modules are named whole in `target_modules`, so that none is meant that has no factors.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::Peft;
use crate::adapter::{Layer, Method, ReplacementKind};
use crate::error::Result;
use crate::formats::draft::{
    Draft, LowRank, Named, Writer, Written, most_common, reshaped, transposed,
};
use crate::methods::ia3;
use crate::naming::families::Layout;
use crate::naming::path::is_embedding;
use crate::notice::{Notice, NoticeKind};

impl Writer for Peft {
    fn layout(&self, _family: Option<&str>) -> Option<Layout> {
        None
    }

    fn write(&self, draft: &Draft<'_>) -> Result<Written> {
        let mut written = Written {
            folder: true,
            ..Written::safetensors("adapter_model.safetensors")
        };
        if let Some(configuration) = &draft.adapter.configuration {
            for tensor in &draft.adapter.unused {
                written.put(draft, tensor.name.clone(), tensor);
            }
            written.config = Some(configuration.clone());
            return Ok(written);
        }
        let vectors = |named: &&Named| named.module.method.name() == ia3::IA3.name();
        let vectors = draft.modules.iter().filter(vectors).count() * 2 > draft.modules.len();
        let (modules, mut config) = match vectors {
            true => scales(draft, &mut written),
            false => low_rank(draft, &mut written, |path| {
                format!("{}{path}", super::key::PREFIX)
            }),
        };
        let parts = draft.modules.iter().map(|named| named.component);
        let parts: BTreeSet<&str> = parts.flatten().map(|part| part.name).collect();
        if parts.len() > 1 {
            let text = "modules of several parts of a pipeline, of which PEFT loads those of one model; --only \
                        chooses a part, --to diffusers keeps all";
            let notice = Notice::new(NoticeKind::LoadedByFew, text);
            written.notices.push(notice);
        }
        let kind = if vectors { "IA3" } else { "LORA" };
        config.insert("peft_type".to_owned(), json!(kind));
        config.insert(
            "base_model_name_or_path".to_owned(),
            json!(draft.adapter.facts.base),
        );
        written.lose_paddings(draft);
        let mut saved = BTreeSet::new();
        let mut biases = false;
        for replacement in &draft.adapter.replacements {
            let (owner, parameter) = replacement
                .name
                .rsplit_once('.')
                .unwrap_or(("", &replacement.name));
            let targeted = modules.contains(owner);
            let below = match replacement.kind {
                ReplacementKind::BaseLayer => true,
                ReplacementKind::Bias => targeted,
                ReplacementKind::Module => false,
            };
            match replacement.kind {
                ReplacementKind::Bias if vectors => {
                    written.lose(&*replacement.name, "a trained bias beside IA3");
                    continue;
                }
                ReplacementKind::Module => drop(saved.insert(owner.to_owned())),
                ReplacementKind::Bias => biases = true,
                ReplacementKind::BaseLayer => {}
            }
            let key = match below {
                true => format!("{}{owner}.base_layer.{parameter}", super::key::PREFIX),
                false => format!("{}{}", super::key::PREFIX, replacement.name),
            };
            written.put(draft, key, &replacement.tensor);
        }
        if !saved.is_empty() {
            config.insert("modules_to_save".to_owned(), json!(saved));
        }
        if !vectors {
            let bias = if biases { "all" } else { "none" };
            config.insert("bias".to_owned(), json!(bias));
        }
        let mut tokens = BTreeMap::new();
        for rows in &draft.adapter.tokens {
            let key = format!(
                "{}{}.token_adapter.trainable_tokens_delta",
                super::key::PREFIX,
                rows.path
            );
            written.put(draft, key, &rows.rows);
            tokens.insert(&rows.path, &rows.indices);
        }
        if !tokens.is_empty() {
            config.insert("trainable_token_indices".to_owned(), json!(tokens));
        }
        if !draft.adapter.replication.is_empty() {
            config.insert(
                "layer_replication".to_owned(),
                json!(draft.adapter.replication),
            );
        }
        if draft.adapter.tied {
            config.insert("ensure_weight_tying".to_owned(), json!(true));
        }
        for tensor in &draft.adapter.unused {
            written.lose(&*tensor.name, "state without a part in the weights");
        }
        written.config = Some(Value::Object(config));
        Ok(written)
    }
}

/// Puts the factors of IA3 under PEFT's names (`peft/tuners/ia3/layer.py`, `update_layer`) and gives the paths and
/// the configuration that they need.
fn scales(draft: &Draft<'_>, written: &mut Written) -> (BTreeSet<String>, Map<String, Value>) {
    let (mut paths, mut inputs) = (BTreeSet::new(), BTreeSet::new());
    for named in &draft.modules {
        let module = &named.module;
        let of_outputs = module.get(ia3::OUTPUT_SCALE);
        let Some(factors) = of_outputs.or_else(|| module.get(ia3::INPUT_SCALE)) else {
            let text = format!("the method {} beside IA3", module.method.name());
            written.lose(&*module.path, text);
            continue;
        };
        let count = factors.elements();
        let shape = match (factors.shape.len(), of_outputs) {
            (3.., _) => factors.shape.clone(), // of a convolution
            (_, Some(_)) => vec![count, 1],
            (_, None) => vec![1, count],
        };
        if of_outputs.is_none() {
            inputs.insert(named.path.clone());
        }
        paths.insert(named.path.clone());
        let key = format!("{}{}.ia3_l", super::key::PREFIX, named.path);
        written.put(draft, key, &reshaped(factors, shape));
    }
    let mut config = Map::new();
    for (field, value) in [
        ("target_modules", json!(paths)),
        ("feedforward_modules", json!(inputs)),
        ("fan_in_fan_out", json!(false)),
        ("init_ia3_weights", json!(true)),
        ("inference_mode", json!(true)),
        ("task_type", Value::Null),
    ] {
        config.insert(field.to_owned(), value);
    }
    (paths, config)
}

/// Puts the factors under PEFT's names and gives the paths and the configuration that they need; the
/// metadata of diffusers are the same.
pub(in crate::formats) fn low_rank(
    draft: &Draft<'_>,
    written: &mut Written,
    prefixed: impl Fn(&str) -> String,
) -> (BTreeSet<String>, Map<String, Value>) {
    // DoRA is a property of all modules or of none.
    let is_dora = |named: &&Named| named.module.method.name() == "DoRA";
    let dora = draft.modules.iter().filter(is_dora).count() * 2 > draft.modules.len();
    let mut ranks: Vec<(&str, usize, f64)> = Vec::new();
    let roots = draft.modules.iter().all(|named| named.module.scale.root);
    let mut lora_bias = false;
    for named in &draft.modules {
        let item = &*named.module.path;
        let Some(factors) = written.low_rank(named, true) else {
            continue;
        };
        let LowRank {
            down,
            up,
            mid,
            bias,
            magnitude,
            input_magnitude,
            ..
        } = &factors;
        if mid.is_some() {
            written.lose(item, "a Tucker core (`lora_mid`)");
            continue;
        }
        if input_magnitude.is_some() {
            written.lose(item, "DoRA with norms per input");
            continue;
        }
        if magnitude.is_some() != dora {
            written.lose(item, "a mixture of LoRA and DoRA in one configuration");
            continue;
        }
        let key = |end: &str| format!("{}.{end}", prefixed(&named.path));
        let embedding = match named.module.layer {
            Layer::Embedding => Some((down.clone(), up.clone())),
            // As it is stored, its rows are the vocabulary.
            Layer::Dense if is_embedding(&named.path) && up.dimension(0) > down.dimension(1) => {
                Some((transposed(up), transposed(down)))
            }
            Layer::Dense => None,
        };
        match embedding {
            Some((a, b)) => {
                written.put(draft, key("lora_embedding_A"), &a);
                written.put(draft, key("lora_embedding_B"), &b);
            }
            None => {
                written.put(draft, key("lora_A.weight"), down);
                written.put(draft, key("lora_B.weight"), up);
            }
        }
        if let Some(bias) = bias {
            lora_bias = true;
            written.put(draft, key("lora_B.bias"), bias);
        }
        if let Some(magnitude) = magnitude {
            let outputs = magnitude.elements();
            let mut shape = vec![1; down.shape.len()];
            let magnitude = match shape.get_mut(1) {
                Some(second) if down.shape.len() > 2 => {
                    *second = outputs;
                    reshaped(magnitude, shape)
                }
                _ => reshaped(magnitude, vec![outputs]),
            };
            written.put(draft, key("lora_magnitude_vector"), &magnitude);
        }
        let rank = factors.rank();
        let alpha = match (roots, factors.scale.alpha) {
            (true, Some(alpha)) if factors.scale.rank == Some(rank) => alpha,
            (true, _) => factors.scale.value * (rank as f64).sqrt(),
            (false, _) => factors.alpha(),
        };
        ranks.push((&named.path, rank, alpha));
    }
    ranks.sort_by_key(|(path, ..)| *path);
    let rank = most_common(ranks.iter().map(|(_, rank, _)| *rank)).unwrap_or(8);
    let alpha = most_common(ranks.iter().map(|(.., alpha)| alpha.to_bits()));
    let alpha = alpha.map_or(rank as f64, f64::from_bits);
    let mut config = Map::new();
    let other = |differs: &dyn Fn(usize, f64) -> Option<Value>| -> Map<String, Value> {
        let entries = ranks.iter().filter_map(|(path, rank, alpha)| {
            // Keys are regular expressions that may start anywhere after a dot.
            let also = |other: &&str| other.ends_with(&format!(".{path}"));
            let anchored = ranks.iter().any(|(other, ..)| also(other));
            let key = if anchored {
                format!("^{path}")
            } else {
                (*path).to_owned()
            };
            Some((key, differs(*rank, *alpha)?))
        });
        entries.collect()
    };
    let rank_pattern = other(&|own, _| (own != rank).then(|| json!(own)));
    let alpha_pattern = other(&|_, own| (own != alpha).then(|| json!(number(own))));
    let paths: BTreeSet<String> = ranks.iter().map(|(path, ..)| (*path).to_owned()).collect();
    for (field, value) in [
        ("r", json!(rank)),
        ("lora_alpha", number(alpha)),
        ("rank_pattern", Value::Object(rank_pattern)),
        ("alpha_pattern", Value::Object(alpha_pattern)),
        ("target_modules", json!(paths)),
        ("use_dora", json!(dora)),
        ("use_rslora", json!(roots && !ranks.is_empty())),
        ("lora_bias", json!(lora_bias)),
        ("lora_dropout", json!(0.0)),
        ("fan_in_fan_out", json!(false)),
        ("init_lora_weights", json!(true)),
        ("inference_mode", json!(true)),
        ("task_type", Value::Null),
    ] {
        config.insert(field.to_owned(), value);
    }
    (paths, config)
}

/// A whole number without a point, as PEFT writes its α.
pub(in crate::formats) fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}
