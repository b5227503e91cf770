//! One FLUX.1 adapter in the spellings of many tools, converted to every format and merged again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::ops::convert::{self, Options, Report};
use loratool::ops::merge::Control;
use loratool::{Error, Kind, Reason};

use crate::support::{fixture, merge, options};

/// Adapters, and what diffusers made of the base with them.
const ADAPTERS: &[(&str, &str)] = &[
    ("bfl-control", "bfl-control"),
    ("bfl-names-in-peft", "bfl-names-in-peft"),
    ("diffusers", "diffusers"),
    ("diffusers-bare", "diffusers-bare"),
    ("diffusers-dora", "diffusers-dora"),
    ("diffusers-patterns", "diffusers-patterns"),
    ("diffusers-rslora", "diffusers-rslora"),
    ("kohya", "kohya"),
    ("kohya-split", "kohya-split"),
    ("onetrainer-comfy", "onetrainer"),
    ("onetrainer-diffusers", "onetrainer"),
    ("onetrainer-kohya", "onetrainer"),
    ("onetrainer-legacy", "onetrainer"),
    ("onetrainer-original", "onetrainer"),
    ("xlabs", "xlabs"),
];

/// Formats that have a place for every adapter but those named.
const COMPLETE: &[(&str, &[&str])] = &[
    ("comfyui", &["diffusers-dora"]),
    ("diffusers", &["bfl-control"]),
    ("ai-toolkit", &["bfl-control", "diffusers-dora"]),
    ("omi", &["bfl-control"]),
    ("onetrainer", &["bfl-control"]),
    ("onetrainer-original", &["bfl-control", "diffusers-dora"]),
    ("kohya", &["bfl-control", "diffusers-dora"]),
    ("peft", &["bfl-control"]),
];

fn file(name: &str) -> PathBuf {
    fixture(&format!("formats/flux/{name}.safetensors"))
}

fn convert(from: &Path, to: &str, output: &Path, more: Options) -> Result<Report, Error> {
    let options = Options {
        adapter: from.to_owned(),
        to: to.to_owned(),
        output: output.to_owned(),
        ..more
    };
    convert::plan(&options)?.run(&Control::default())
}

fn merged(adapter: &Path, alpha: Option<f64>) -> TensorFile {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("merged.safetensors");
    let mut options = options(&file("base"), adapter, &output);
    options.read.alpha = alpha;
    merge(&options).unwrap_or_else(|error| panic!("{adapter:?}: {error:?}"));
    TensorFile::open(&output).unwrap()
}

fn assert_is(ours: &TensorFile, expected: &str, name: &str) {
    let expected = TensorFile::open(file(&format!("{expected}-changed"))).unwrap();
    for theirs in &expected.directory.tensors {
        let ours = ours.tensor(&theirs.name).unwrap().to_f64().unwrap();
        let wanted = theirs.to_f64().unwrap();
        let largest = wanted.iter().fold(0.0, |all: f64, one| all.max(one.abs()));
        let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 2e-6 * largest;
        assert_eq!(ours.len(), wanted.len(), "{name}: {}", theirs.name);
        assert!(
            ours.iter().zip(&wanted).all(close),
            "{name}: {}",
            theirs.name
        );
    }
}

#[test]
fn one_flux_converted_to_any_format_is_what_diffusers_computes() {
    let mut written: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (adapter, expected) in ADAPTERS {
        for target in convert::targets() {
            let name = format!("{adapter} to {}", target.id());
            let room = tempfile::tempdir().unwrap();
            let output = room.path().join("converted");
            let more = Options {
                base: Some(file("base")),
                ..Options::default()
            };
            let done = convert(&file(adapter), target.id(), &output, more);
            if let Err(error) = &done {
                // These two have no names for image models; DoRA and rows of zeros are not fused.
                let said = matches!(
                    error.reason(),
                    Reason::Losses { .. } | Reason::MethodOnTarget { .. }
                );
                let nameless = ["gguf", "torchtune", "simo"].contains(&target.id());
                let unnamed = nameless && error.kind() == Kind::Unresolved;
                assert!(said || unnamed, "{name}: {error:?}");
                assert!(!output.exists(), "{name}");
                continue;
            }
            let alpha = done.unwrap().alpha;
            assert_is(&merged(&output, alpha), expected, &name);
            written.entry(target.id()).or_default().push(adapter);
        }
    }
    for (target, without) in COMPLETE {
        let all = ADAPTERS.iter().map(|(adapter, _)| *adapter);
        let wanted: Vec<&str> = all.filter(|adapter| !without.contains(adapter)).collect();
        assert_eq!(written[target], wanted, "{target}");
    }
    // A part of an adapter of kohya's `linear1` belongs to the MLP, which XLabs does not adapt.
    assert_eq!(written["bfl"], ["bfl-control"]);
    assert_eq!(written["xlabs"], ["xlabs"]);
}

/// The names of the tensors that a conversion writes.
fn names(from: &Path, to: &str, more: Options) -> Vec<String> {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("converted.safetensors");
    let name = format!("{from:?} to {to}");
    convert(from, to, &output, more).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    let tensors = TensorFile::open(&output).unwrap().directory.tensors;
    tensors.into_iter().map(|tensor| tensor.name).collect()
}

#[test]
fn a_linear_layer_is_no_embedding_for_its_name() {
    for to in ["diffusers", "ai-toolkit"] {
        let names = names(&file("diffusers"), to, Options::default());
        assert!(
            names.contains(&"transformer.x_embedder.lora_A.weight".to_owned()),
            "{to}"
        );
        assert!(
            !names.iter().any(|name| name.contains("lora_embedding")),
            "{to}"
        );
    }
}

#[test]
fn names_of_a_known_denoiser_say_so_in_files_of_pipelines() {
    for adapter in [
        "xlabs",
        "diffusers-bare",
        "bfl-names-in-peft",
        "onetrainer-original",
        "kohya",
    ] {
        for to in ["diffusers", "diffusers-mid"] {
            let names = names(&file(adapter), to, Options::default());
            let prefixed = |name: &String| name.starts_with("transformer.");
            assert!(names.iter().all(prefixed), "{adapter} to {to}: {names:?}");
        }
    }
}

fn low_rank(path: &Path, modules: &[&str]) {
    let mut tensors = Vec::new();
    for module in modules {
        for (tail, shape) in [("lora_A.weight", [2, 6]), ("lora_B.weight", [6, 2])] {
            let factor = crate::oracle::Stored {
                dtype: loratool::tensor::DType::F32,
                shape: shape.to_vec(),
                bytes: vec![0; 48],
            };
            tensors.push((format!("{module}.{tail}"), factor));
        }
    }
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    crate::support::write_safetensors(path, &tensors);
}

#[test]
fn ai_toolkit_calls_the_layers_of_each_model_as_the_tool_does() {
    let room = tempfile::tempdir().unwrap();
    let from = room.path().join("a.safetensors");
    for (family, path, expected) in [
        (
            "flux1",
            "transformer.transformer_blocks.0.attn.to_q",
            "transformer.transformer_blocks.0.attn.to_q",
        ),
        (
            "sd3",
            "transformer.transformer_blocks.0.attn.to_q",
            "transformer.transformer_blocks.0.attn.to_q",
        ),
        (
            "flux2",
            "transformer.transformer_blocks.0.attn.to_out.0",
            "diffusion_model.double_blocks.0.img_attn.proj",
        ),
        (
            "wan",
            "transformer.blocks.0.attn1.to_q",
            "diffusion_model.blocks.0.self_attn.q",
        ),
        (
            "qwen-image",
            "transformer.transformer_blocks.0.attn.to_q",
            "diffusion_model.transformer_blocks.0.attn.to_q",
        ),
        (
            "sdxl",
            "unet.down_blocks.1.attentions.0.proj_in",
            "lora_unet_down_blocks_1_attentions_0_proj_in",
        ),
    ] {
        low_rank(
            &from,
            &[
                path,
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            ],
        );
        let more = Options {
            family: Some(family.to_owned()),
            ..Options::default()
        };
        let text = match family {
            "sdxl" => "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            _ => "lora_te1.text_model.encoder.layers.0.self_attn.q_proj",
        };
        for name in names(&from, "ai-toolkit", more) {
            let known = [expected, text]
                .iter()
                .any(|path| name.starts_with(&format!("{path}.")));
            assert!(known, "{family}: {name}");
        }
    }
}

#[test]
fn what_names_do_not_say_the_caller_says() {
    let room = tempfile::tempdir().unwrap();
    let from = room.path().join("a.safetensors");
    low_rank(
        &from,
        &["base_model.model.text_model.encoder.layers.0.self_attn.q_proj"],
    );
    let more = |component: Option<&str>| {
        let mut more = Options {
            component: component.map(str::to_owned),
            ..Options::default()
        };
        more.read.alpha = Some(2.0);
        more
    };
    let bare = convert(&from, "diffusers", &room.path().join("bare"), more(None)).unwrap();
    assert!(
        bare.notices
            .iter()
            .any(|notice| notice.text.contains("--component"))
    );
    let path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj";
    for (to, owner) in [
        ("diffusers", path),
        (
            "kohya",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (
            "comfyui",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        ),
    ] {
        for name in names(&from, to, more(Some("text_encoder"))) {
            assert!(name.starts_with(owner), "{to}: {name}");
        }
    }
    let output = room.path().join("none");
    for (from, component) in [(from.clone(), "no such"), (file("diffusers"), "unet")] {
        let error = convert(&from, "diffusers", &output, more(Some(component))).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{component}");
    }
}

#[test]
fn an_adapter_of_peft_that_lost_its_configuration_needs_an_alpha() {
    let room = tempfile::tempdir().unwrap();
    let from = room.path().join("a.safetensors");
    low_rank(&from, &["base_model.model.model.layers.0.self_attn.q_proj"]);
    let found = || loratool::formats::Found::open(&from).unwrap();
    let mut options = loratool::formats::ReadOptions::default();
    let error = found().read(&options).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NoAdapterConfig),
        "{error:?}"
    );
    assert!(error.to_string().contains("config"));
    options.alpha = Some(3.0);
    let adapter = found().read(&options).unwrap();
    assert_eq!(adapter.modules[0].scale.value, 1.5);
    assert_eq!(adapter.notices.len(), 1);
    // Files of image models come without one, and their scale is 1 everywhere.
    low_rank(&from, &["base_model.model.double_blocks.0.img_attn.qkv"]);
    let adapter = found()
        .read(&loratool::formats::ReadOptions::default())
        .unwrap();
    assert_eq!(adapter.modules[0].scale.value, 1.0);
}

/// A file of one large layer of FLUX.1 in kohya's names, with metadata.
fn large(path: &Path, metadata: &[(&str, &str)]) {
    let values = crate::support::Random(5).floats(64 * 6144);
    let factor = |shape: [usize; 2]| {
        crate::oracle::Stored::of(loratool::tensor::DType::F32, &shape, &values)
    };
    let (down, up) = (factor([64, 6144]), factor([6144, 64]));
    let view = |stored: &crate::oracle::Stored| {
        let (shape, bytes) = (stored.shape.clone(), stored.bytes.clone());
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes.leak()).unwrap()
    };
    let owner = "lora_unet_double_blocks_0_img_attn_proj";
    let tensors = [
        ("lora_down.weight", view(&down)),
        ("lora_up.weight", view(&up)),
    ];
    let tensors = tensors.map(|(tail, view)| (format!("{owner}.{tail}"), view));
    let metadata = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    safetensors::serialize_to_file(tensors, Some(metadata.collect()), path).unwrap();
}

#[test]
fn hashes_of_a_written_file_are_its_own_and_statements_of_the_source_stay() {
    let room = tempfile::tempdir().unwrap();
    let (from, output) = (
        room.path().join("a.safetensors"),
        room.path().join("b.safetensors"),
    );
    large(
        &from,
        &[
            ("ss_base_model_version", "flux1"),
            ("ss_network_dim", "7"),
            ("ss_network_args", "{}"),
            ("ss_tag_frequency", "{\"a\": 1}"),
            ("modelspec.author", "somebody"),
            ("modelspec.architecture", "flux-1-dev/lora"),
            ("modelspec.hash_sha256", "0x12"),
            ("sshs_model_hash", "34"),
            ("sshs_legacy_hash", "56"),
            ("other", "78"),
        ],
    );
    let more = Options {
        dtype: Some(loratool::tensor::Float::F32),
        ..Options::default()
    };
    convert(&from, "kohya", &output, more).unwrap();
    let written = TensorFile::open(&output).unwrap().directory.metadata;
    let told: BTreeMap<&str, &str> = written
        .iter()
        .map(|(key, value)| (&**key, &**value))
        .collect();
    let bytes = std::fs::read(&output).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let digits = |bytes: &[u8]| -> String {
        use sha2::Digest;
        let digest = sha2::Sha256::digest(bytes);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    assert_eq!(told["sshs_model_hash"], digits(&bytes[header..]));
    // As if the metadata of sd-scripts were the only ones.
    let own = told.iter().filter(|(key, _)| key.starts_with("ss_"));
    let own = own.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let alone = safetensors::serialize(file.tensors(), Some(own.collect())).unwrap();
    assert_eq!(
        told["sshs_legacy_hash"],
        &digits(&alone[0x10_0000..0x11_0000])[..8]
    );
    let expected = [
        ("ss_base_model_version", "flux1"),
        ("ss_network_dim", "64"),
        ("ss_tag_frequency", "{\"a\": 1}"),
        ("modelspec.author", "somebody"),
        ("modelspec.architecture", "flux-1-dev/lora"),
    ];
    for (key, value) in expected {
        assert_eq!(told[key], value, "{key}");
    }
    for key in ["ss_network_args", "modelspec.hash_sha256", "other"] {
        assert!(!told.contains_key(key), "{key}");
    }
}

#[test]
fn the_base_that_a_file_states_decides_among_families_that_fit() {
    let room = tempfile::tempdir().unwrap();
    let from = room.path().join("a.safetensors");
    for (metadata, family) in [
        (("other", "flux1"), None),
        // It has no such layer.
        (("ss_base_model_version", "sdxl_base_v1-0"), None),
        (("ss_base_model_version", "flux1"), Some("flux1")),
        (("modelspec.architecture", "Flux-2/lora"), Some("flux2")),
    ] {
        large(&from, &[metadata]);
        let output = room.path().join("b.safetensors");
        let more = Options {
            force: true,
            ..Options::default()
        };
        match convert(&from, "kohya", &output, more) {
            Ok(report) => assert_eq!(report.family.as_deref(), family, "{metadata:?}"),
            Err(error) => {
                assert_eq!(
                    (error.kind(), family),
                    (Kind::Unresolved, None),
                    "{metadata:?}"
                );
            }
        }
    }
}

#[test]
fn a_file_is_its_own_conversion() {
    for (adapter, to) in [
        ("bfl-control", "bfl"),
        ("xlabs", "xlabs"),
        ("kohya", "kohya"),
        ("onetrainer-original", "onetrainer-original"),
        ("onetrainer-legacy", "onetrainer"),
        ("diffusers", "diffusers"),
    ] {
        let room = tempfile::tempdir().unwrap();
        let output = room.path().join("converted.safetensors");
        convert(&file(adapter), to, &output, Options::default()).unwrap();
        assert_eq!(tensors(&output), tensors(&file(adapter)), "{adapter}");
    }
}

fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let tensors = TensorFile::open(path).unwrap().directory.tensors;
    let read = |tensor: loratool::tensor::Tensor| {
        let bytes = tensor.bytes().unwrap().into_owned();
        (tensor.name, (tensor.shape, bytes))
    };
    tensors.into_iter().map(read).collect()
}

#[test]
fn vectors_of_tokens_go_from_one_spelling_to_the_other_and_nowhere_else() {
    let room = tempfile::tempdir().unwrap();
    let path = |name: &str| room.path().join(name);
    let vectors = || crate::oracle::Stored::of(loratool::tensor::DType::F32, &[2, 3], &[1.0; 6]);
    let token = path("cat.safetensors");
    crate::support::write_safetensors(&token, &[("emb_params", vectors())]);
    let go = |from: &Path, to: &str, name: &str| {
        convert(from, to, &path(name), Options::default()).map(|_| tensors(&path(name)))
    };
    let there = go(&token, "textual-inversion", "there.safetensors").unwrap();
    assert_eq!(there.keys().collect::<Vec<_>>(), ["<cat>"]);
    let back = go(
        &path("there.safetensors"),
        "webui-embedding",
        "back.safetensors",
    )
    .unwrap();
    assert_eq!(back, tensors(&token));
    let same = go(&token, "webui-embedding", "same.safetensors").unwrap();
    assert_eq!(same, back);
    // Those of SDXL have no spelling of one file in diffusers.
    let two = path("two.safetensors");
    crate::support::write_safetensors(&two, &[("clip_g", vectors()), ("clip_l", vectors())]);
    assert_eq!(
        go(&two, "webui-embedding", "both.safetensors").unwrap(),
        tensors(&two)
    );
    for (from, to) in [
        (&two, "textual-inversion"),
        (&token, "kohya"),
        (&token, "peft"),
    ] {
        let error = go(from, to, "none").unwrap_err();
        assert!(
            matches!(error.reason(), Reason::Losses { .. }),
            "{to}: {error:?}"
        );
    }
    let lora = convert(
        &file("kohya"),
        "webui-embedding",
        &path("none"),
        Options::default(),
    );
    assert!(matches!(lora.unwrap_err().reason(), Reason::Losses { .. }));
    let error = merge(&options(&file("base"), &token, &path("none"))).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::InputVectors { .. }),
        "{error:?}"
    );
}
