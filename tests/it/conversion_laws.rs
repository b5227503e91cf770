//! What must hold for every format that is written and every adapter it can express: what is written is read
//! as the same, and merging does not notice the way it came.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loratool::Kind;
use loratool::ops::convert::{self, Options, Report};
use loratool::ops::merge::Control;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use safetensors::Dtype;
use serde_json::json;

use crate::oracle::{self, Stored};
use crate::support::{Random, merge, options, write_adapter, write_base, write_safetensors};

/// A model: what tells its family, and layers with the shapes of their weights.
struct Model {
    config: Option<&'static str>,
    /// What the names of its layers do not tell.
    family: Option<&'static str>,
    /// The part of a pipeline in front of flattened names.
    flattened: Option<&'static str>,
    layers: &'static [(&'static str, &'static [usize])],
}

const LLAMA: Model = Model {
    config: Some(
        r#"{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}"#,
    ),
    family: None,
    flattened: None,
    layers: &[
        ("model.layers.0.self_attn.q_proj", &[16, 16]),
        ("model.layers.0.self_attn.k_proj", &[8, 16]),
        ("model.layers.0.self_attn.v_proj", &[8, 16]),
        ("model.layers.0.self_attn.o_proj", &[16, 16]),
        ("model.layers.0.mlp.gate_proj", &[12, 16]),
        ("model.layers.0.mlp.up_proj", &[12, 16]),
        ("model.layers.0.mlp.down_proj", &[16, 12]),
        ("model.layers.1.self_attn.q_proj", &[16, 16]),
        ("model.layers.1.self_attn.k_proj", &[8, 16]),
        ("model.layers.1.self_attn.v_proj", &[8, 16]),
        ("model.layers.1.self_attn.o_proj", &[16, 16]),
        ("model.layers.1.mlp.gate_proj", &[12, 16]),
        ("model.layers.1.mlp.up_proj", &[12, 16]),
        ("model.layers.1.mlp.down_proj", &[16, 12]),
    ],
};

const UNET: Model = Model {
    config: Some(r#"{"_class_name": "UNet2DConditionModel"}"#),
    family: None,
    flattened: Some("lora_unet_"),
    layers: &[
        ("conv_in", &[8, 4, 3, 3]),
        ("time_embedding.linear_1", &[8, 6]),
        ("down_blocks.0.resnets.0.conv1", &[8, 8, 3, 3]),
        ("down_blocks.0.resnets.0.time_emb_proj", &[8, 8]),
        ("down_blocks.0.attentions.0.proj_in", &[8, 8, 1, 1]),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            &[8, 8],
        ),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
            &[8, 8],
        ),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
            &[8, 6],
        ),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
            &[8, 8],
        ),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
            &[16, 8],
        ),
        ("mid_block.resnets.0.conv2", &[8, 8, 3, 3]),
    ],
};

const FLUX: Model = Model {
    config: Some(r#"{"_class_name": "FluxTransformer2DModel"}"#),
    family: None,
    flattened: None,
    layers: &[
        ("transformer_blocks.0.attn.to_q", &[8, 8]),
        ("transformer_blocks.0.attn.to_k", &[8, 8]),
        ("transformer_blocks.0.attn.to_v", &[8, 8]),
        ("transformer_blocks.0.attn.add_q_proj", &[8, 8]),
        ("transformer_blocks.0.attn.add_k_proj", &[8, 8]),
        ("transformer_blocks.0.attn.add_v_proj", &[8, 8]),
        ("transformer_blocks.0.attn.to_out.0", &[8, 8]),
        ("single_transformer_blocks.0.attn.to_q", &[8, 8]),
        ("single_transformer_blocks.0.attn.to_k", &[8, 8]),
        ("single_transformer_blocks.0.attn.to_v", &[8, 8]),
        ("single_transformer_blocks.0.proj_out", &[8, 40]),
        // Up to here what `ATTENTION` has as well.
        ("x_embedder", &[8, 4]),
        ("transformer_blocks.0.ff.net.0.proj", &[32, 8]),
        ("single_transformer_blocks.0.proj_mlp", &[32, 8]),
        ("norm_out.linear", &[16, 8]),
        ("proj_out", &[4, 8]),
    ],
};

/// The layers that XLabs and the processors of old diffusers have.
const ATTENTION: Model = Model {
    layers: FLUX.layers.split_at(11).0,
    // FLUX.2 has layers of the same names.
    family: Some("flux1"),
    ..FLUX
};

const MODELS: [&Model; 4] = [&LLAMA, &UNET, &FLUX, &ATTENTION];
const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

/// What one layer of an adapter is made of.
#[derive(Clone, Debug)]
struct Adapted {
    layer: usize,
    rank: usize,
    alpha: f64,
    method: usize,
    seed: u64,
}

fn adapted() -> impl Strategy<Value = Vec<Adapted>> {
    let alphas = prop::sample::select(vec![0.5, 1.0, 2.0, 3.0, 4.0, 7.0]);
    let one = (0usize..99, 1usize..5, alphas, 0usize..6, any::<u64>());
    let one = one.prop_map(|(layer, rank, alpha, method, seed)| Adapted {
        layer,
        rank,
        alpha,
        method,
        seed,
    });
    prop::collection::vec(one, 1..9)
}

/// The layers of a model that are adapted, each once.
fn chosen<'a>(model: &Model, adapted: &'a [Adapted]) -> BTreeMap<usize, &'a Adapted> {
    let place = |adapted: &'a Adapted| (adapted.layer % model.layers.len(), adapted);
    adapted.iter().map(place).collect()
}

fn base(model: &Model, folder: &Path) -> PathBuf {
    let mut random = Random(7);
    let weights: Vec<(String, Stored)> = model
        .layers
        .iter()
        .flat_map(|(name, shape)| {
            let count = shape.iter().product();
            let weight = Stored::of(Dtype::F32, shape, &random.floats(count));
            let bias = Stored::of(Dtype::F32, &shape[..1], &random.floats(shape[0]));
            [
                (format!("{name}.weight"), weight),
                (format!("{name}.bias"), bias),
            ]
        })
        .collect();
    let weights: Vec<(&str, Stored)> = weights
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    let config = model.config.map(|text| serde_json::from_str(text).unwrap());
    let folder = folder.join("base");
    write_base(&folder, config.as_ref(), &weights);
    folder
}

/// As PEFT writes it: LoRA and DoRA, a rank and an alpha for each module.
fn peft(model: &Model, adapted: &[Adapted], dtype: Dtype, folder: &Path) -> PathBuf {
    let all = chosen(model, adapted);
    let with_norms = all.values().any(|adapted| adapted.method == 1);
    let (mut ranks, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
    let mut tensors = Vec::new();
    for (index, adapted) in all {
        let (name, shape) = model.layers[index];
        let mut random = Random(adapted.seed);
        let (outputs, inputs) = (shape[0], shape[1]);
        let kernel = &shape[2..];
        let ones: Vec<usize> = kernel.iter().map(|_| 1).collect();
        let down = [&[adapted.rank, inputs], kernel].concat();
        let up = [&[outputs, adapted.rank], &*ones].concat();
        let mut put = |end: &str, shape: &[usize]| {
            let values = random.floats(shape.iter().product());
            let key = format!("base_model.model.{name}.{end}");
            tensors.push((key, Stored::of(dtype, shape, &values)));
        };
        put("lora_A.weight", &down);
        put("lora_B.weight", &up);
        if with_norms {
            let magnitude = match kernel.is_empty() {
                true => vec![outputs],
                false => [&[1, outputs], &*ones].concat(),
            };
            put("lora_magnitude_vector", &magnitude);
        }
        ranks.insert(name.to_owned(), json!(adapted.rank));
        alphas.insert(name.to_owned(), json!(adapted.alpha));
    }
    let config = json!({
        "peft_type": "LORA", "r": 64, "lora_alpha": 64, "use_dora": with_norms,
        "target_modules": ranks.keys().collect::<Vec<_>>(),
        "rank_pattern": ranks, "alpha_pattern": alphas,
    });
    let tensors: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    let folder = folder.join("source");
    write_adapter(&folder, &config, &tensors);
    folder
}

/// As LyCORIS writes it: Tucker cores, norms, whole differences.
fn kohya(model: &Model, adapted: &[Adapted], dtype: Dtype, folder: &Path) -> PathBuf {
    let prefix = model.flattened.unwrap();
    let mut tensors = Vec::new();
    for (index, adapted) in chosen(model, adapted) {
        let (name, shape) = model.layers[index];
        let name = format!("{prefix}{}", name.replace('.', "_"));
        let mut random = Random(adapted.seed);
        let kernel = &shape[2..];
        let ones: Vec<usize> = kernel.iter().map(|_| 1).collect();
        let mut put = |end: &str, shape: &[usize]| {
            let values = random.floats(shape.iter().product());
            tensors.push((format!("{name}.{end}"), Stored::of(dtype, shape, &values)));
        };
        if adapted.method == 2 {
            put("diff", shape);
            put("diff_b", &shape[..1]);
            continue;
        }
        let is_tucker = adapted.method == 3 && kernel.iter().any(|size| *size > 1);
        let size = if is_tucker { &*ones } else { kernel };
        let down = [&[adapted.rank, shape[1]], size].concat();
        put("lora_down.weight", &down);
        put(
            "lora_up.weight",
            &[&[shape[0], adapted.rank], &*ones].concat(),
        );
        if is_tucker {
            put(
                "lora_mid.weight",
                &[&[adapted.rank, adapted.rank], kernel].concat(),
            );
        }
        match adapted.method {
            4 => put("dora_scale", &[&[shape[0], 1], &*ones].concat()),
            5 => put("dora_scale", &[&[1, shape[1]], &*ones].concat()),
            _ => {}
        }
        let alpha = Stored::of(Dtype::F32, &[], &[adapted.alpha]);
        tensors.push((format!("{name}.alpha"), alpha));
    }
    let tensors: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    let path = folder.join("source.safetensors");
    write_safetensors(&path, &tensors);
    path
}

/// An adapter, and the alpha that its files have no place for.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    alpha: Option<f64>,
}

fn convert(
    from: &Place,
    to: &str,
    (model, base): (&Model, &Path),
    output: &Path,
) -> loratool::Result<Report> {
    let mut options = Options {
        adapter: from.path.clone(),
        to: to.to_owned(),
        output: output.to_owned(),
        base: Some(base.to_owned()),
        family: model.family.map(str::to_owned),
        ..Options::default()
    };
    options.read.alpha = from.alpha;
    convert::plan(&options)?.run(&Control::default())
}

fn merged(base: &Path, adapter: &Place, name: &str) -> oracle::Tensors {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("merged");
    let mut options = options(base, &adapter.path, &output);
    options.read.alpha = adapter.alpha;
    merge(&options).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    oracle::read(&output.join("model.safetensors"))
}

/// Every file below a folder, with its bytes.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap();
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        (name, std::fs::read(entry.path()).unwrap())
    };
    entries.map(read).collect()
}

/// Converts along a path of formats, leaving out those that cannot say the adapter, and merges each; says
/// which were written.
fn travels(
    model: &Model,
    base: &Path,
    source: &Path,
    path: &[&'static str],
    room: &Path,
) -> Vec<&'static str> {
    let mut at = Place {
        path: source.to_owned(),
        alpha: None,
    };
    let expected = merged(base, &at, "the source");
    let mut is_folded = false;
    let mut written = Vec::new();
    for (step, to) in path.iter().enumerate() {
        let name = format!("{:?}, step {step} from {at:?} to {to}", model.config);
        let output = room.join(format!("step{step}"));
        let report = match convert(&at, to, (model, base), &output) {
            Ok(report) => report,
            Err(error) => {
                let kinds = [Kind::Unsupported, Kind::Unresolved];
                assert!(kinds.contains(&error.kind()), "{name}: {error:?}");
                assert!(!output.exists(), "{name}");
                continue;
            }
        };
        written.push(*to);
        is_folded |= !report.folded.is_empty();
        let there = Place {
            path: output.clone(),
            alpha: report.alpha,
        };
        // Written, read and written again: nothing is left to change.
        let again = room.join(format!("again{step}"));
        let report = convert(&there, to, (model, base), &again)
            .unwrap_or_else(|error| panic!("{name}, again: {error:?}"));
        assert!(
            report.folded.is_empty(),
            "{name}, again: {:?}",
            report.folded
        );
        for (file, bytes) in files(&output) {
            let again = std::fs::read(again.join(&file)).unwrap();
            let start = |bytes: &[u8]| {
                String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).into_owned()
            };
            assert!(
                bytes == again,
                "{name}, again: {file}\n{}\n{}",
                start(&bytes),
                start(&again)
            );
        }
        // Merging does not notice the way it came.
        let ours = merged(base, &there, &name);
        assert_eq!(ours.len(), expected.len(), "{name}");
        for (tensor, expected) in &expected {
            if !is_folded {
                assert_eq!(ours[tensor], *expected, "{name}: {tensor}");
            }
            let (ours, theirs) = (ours[tensor].values(), expected.values());
            let largest = theirs.iter().fold(0.0, |all: f64, v| all.max(v.abs()));
            let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 3e-2 * largest;
            assert!(ours.iter().zip(&theirs).all(close), "{name}: {tensor}");
        }
        at = there;
    }
    written
}

fn targets() -> Vec<&'static str> {
    convert::targets().map(|format| format.id()).collect()
}

/// The same few in every run of the gate; `PROPTEST_CASES` asks for others, and as many as it says.
fn some() -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok();
    ProptestConfig {
        cases: asked.as_ref().map_or(32, |count| count.parse().unwrap()),
        rng_seed: match asked {
            Some(_) => RngSeed::Random,
            None => RngSeed::Fixed(5),
        },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

#[test]
fn along_any_path_of_formats_every_adapter_stays_what_it_is() {
    let path = prop::collection::vec(prop::sample::select(targets()), 4..9);
    proptest!(some(), |(
        adapted in adapted(), model in 0usize..4, as_lycoris: bool, float in 0usize..3, path in path,
    )| {
        let model = MODELS[model];
        let room = tempfile::tempdir().unwrap();
        let base = base(model, room.path());
        let source = match model.flattened {
            Some(_) if as_lycoris => kohya(model, &adapted, FLOATS[float], room.path()),
            _ => peft(model, &adapted, FLOATS[float], room.path()),
        };
        travels(model, &base, &source, &path, room.path());
    });
}

/// Formats that hold something else than LoRA of some layers: a control adapter has norms beside all of them, and
/// cloneofsimo numbers the layers of a table.
const NO_LAYERS: &[&str] = &["bfl", "simo", "textual-inversion", "webui-embedding"];

#[test]
fn every_format_that_is_written_is_read_as_what_was_written() {
    let mut written: BTreeMap<&str, usize> = BTreeMap::new();
    for model in MODELS {
        let one = |layer: usize| Adapted {
            layer,
            rank: 2,
            alpha: 4.0,
            method: 0,
            seed: layer as u64,
        };
        let all: Vec<Adapted> = (0..model.layers.len()).map(one).collect();
        for adapted in all.chunks(1).chain([&*all]) {
            for target in targets() {
                let room = tempfile::tempdir().unwrap();
                let base = base(model, room.path());
                let source = peft(model, adapted, Dtype::F32, room.path());
                let done = travels(model, &base, &source, &[target], room.path());
                *written.entry(target).or_default() += done.len();
            }
        }
    }
    for (target, count) in written {
        let is_other = NO_LAYERS.contains(&target);
        assert!(is_other || count >= 2, "{target} was written {count} times");
    }
}
