//! Pipelines of diffusers as bases: every component in its folder, variants, shards, companions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loratool::checkpoint::sink::Operation;
use loratool::checkpoint::{Checkpoint, Variant};
use loratool::notice::NoticeKind;
use loratool::ops::check::check;
use loratool::ops::inspect::inspect;
use loratool::ops::merge::{Options, Report};
use loratool::tensor::Float;
use loratool::{Kind, Reason};
use safetensors::Dtype;
use serde_json::json;

use crate::hostile_support::{Room, assert_reason, names_in, small_base, tensors, tree};
use crate::oracle::{self, Stored, Tensors};
use crate::output::{Failing, fail_everywhere, faulty};
use crate::support::{Random, fixture, merge, options, write_adapter};

/// Names of modules and the shapes of their weights.
type Modules = &'static [(&'static str, [usize; 2])];

const UNET: Modules = &[
    (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        [8, 8],
    ),
    ("time_embedding.linear_1", [16, 4]),
];
const TEXT: Modules = &[("encoder.layers.0.mlp.fc1", [8, 8])];

/// Every file below a folder, by its place there.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let all = tree(folder).into_iter();
    all.map(|(place, bytes)| (place.components().collect(), bytes))
        .collect()
}

/// A copy of the fixture, of the files whose place there passes.
fn pipeline(room: &Room, passes: impl Fn(&str) -> bool) -> PathBuf {
    for (place, bytes) in files(&fixture("bases/pipeline")) {
        let place = place.to_str().unwrap();
        if passes(place) {
            room.write(&format!("base/{place}"), bytes);
        }
    }
    room.path("base")
}

fn default_only(place: &str) -> bool {
    !place.contains("fp16")
}

/// A LoRA of rank 2 for modules of these weights, each below a prefix.
fn adapter(room: &Room, name: &str, modules: &[(&str, Modules)]) -> PathBuf {
    let mut all = Vec::new();
    for (prefix, modules) in modules {
        // The same factors whatever the prefix.
        let mut random = Random(7);
        for (module, [outputs, inputs]) in *modules {
            for (factor, shape) in [("lora_A", [2, *inputs]), ("lora_B", [*outputs, 2])] {
                let values = random.floats(shape[0] * shape[1]);
                let name = format!("base_model.model.{prefix}{module}.{factor}.weight");
                all.push((name, Stored::of(Dtype::F32, &shape, &values)));
            }
        }
    }
    let all: Vec<(&str, Stored)> = all.iter().map(|(n, t)| (n.as_str(), t.clone())).collect();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3});
    write_adapter(&room.path(name), &config, &all);
    room.path(name)
}

/// Every tensor of a result, by its file.
fn by_file(folder: &Path, report: &Report) -> BTreeMap<String, Tensors> {
    let files = report.files.iter();
    files
        .map(|file| (file.name.clone(), oracle::read(&folder.join(&file.name))))
        .collect()
}

fn places(folder: &Path) -> Vec<String> {
    let all = files(folder).into_iter();
    all.map(|(place, _)| place.to_str().unwrap().replace('\\', "/"))
        .collect()
}

#[test]
fn a_pipeline_is_written_file_by_file_with_the_tensors_of_its_components() {
    let room = Room::new();
    let base = pipeline(&room, default_only);
    let both = adapter(&room, "both", &[("unet.", UNET), ("text_encoder.", TEXT)]);
    let options = options(&base, &both, &room.path("out"));
    let report = merge(&options).unwrap();
    assert_eq!(report.modules.len(), 3);
    assert_eq!(places(&options.output), places(&base));
    assert!(report.not_copied.is_empty(), "{:?}", report.not_copied);
    let found = by_file(&options.output, &report);
    assert_eq!(found.len(), 3);
    for (component, modules) in [("unet", UNET), ("text_encoder", TEXT)] {
        // The component alone is a base as well.
        let alone = adapter(&room, component, &[("", modules)]);
        let alone = crate::support::options(&base.join(component), &alone, &room.path("alone"));
        let report = merge(&Options {
            force: true,
            ..alone.clone()
        })
        .unwrap();
        for (file, expected) in by_file(&alone.output, &report) {
            assert_eq!(found[&format!("{component}/{file}")], expected);
            let before = oracle::read(&base.join(component).join(&file));
            for (module, _) in modules {
                let weight = format!("{module}.weight");
                assert_ne!(expected[&weight], before[&weight]);
            }
            let changed = expected.iter().filter(|(name, new)| before[*name] != **new);
            assert_eq!(changed.count(), modules.len());
        }
    }
    for (place, bytes) in files(&base) {
        let same = std::fs::read(options.output.join(&place)).unwrap() == bytes;
        let touched = ["unet/diffusion_pytorch_model", "text_encoder/model"];
        let place = place.to_str().unwrap();
        let is_touched = touched.iter().any(|start| place.starts_with(start));
        assert_eq!(same, !is_touched, "{place}");
    }
}

#[test]
fn every_tensor_of_a_pipeline_is_named_with_its_component() {
    let room = Room::new();
    let base = pipeline(&room, default_only);
    let checkpoint = Checkpoint::open(&base).unwrap();
    assert!(checkpoint.notices.is_empty());
    for name in [
        "unet.conv_in.weight",
        "vae.decoder.conv_in.weight",
        "text_encoder.encoder.layers.0.mlp.fc1.weight",
    ] {
        assert!(checkpoint.tensor(name).is_some(), "{name}");
    }
    let found = inspect(&base, &Default::default()).unwrap();
    assert_eq!(found.what, "checkpoint");
    assert_eq!(found.tensors, checkpoint.tensors().count());
    let view = found.checkpoint.unwrap();
    assert_eq!(view.config["_class_name"], "StableDiffusionPipeline");
    assert_eq!(
        view.shards,
        [
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors"
        ]
    );
    assert!(check(&base, &Default::default()).clean);
}

#[test]
fn several_variants_are_refused_until_one_is_named() {
    let room = Room::new();
    let base = pipeline(&room, |_| true);
    let unet = adapter(&room, "unet", &[("unet.", UNET)]);
    let options = options(&base, &unet, &room.path("out"));
    let error = merge(&options).unwrap_err();
    assert_reason!(error, Reason::SeveralVariants { count: 2 });
    assert_eq!(error.cases(), ["default", "fp16"]);
    assert!(error.hint().unwrap().contains("--variant"));
    let named = |name: &str| Options {
        variant: Variant::Named(name.to_owned()),
        output: room.path(name),
        ..options.clone()
    };
    let error = merge(&named("bf16")).unwrap_err();
    assert_reason!(error, Reason::NoVariant { name } if name == "bf16");
    for variant in ["fp16", "default"] {
        let report = merge(&named(variant)).unwrap();
        let written = places(&room.path(variant));
        for place in places(&base) {
            let is_weights = place.contains("safetensors");
            let wanted = !is_weights || place.contains("fp16") == (variant == "fp16");
            assert_eq!(written.contains(&place), wanted, "{variant}: {place}");
            // What is not written is told.
            assert_eq!(report.not_copied.contains(&place), !wanted, "{place}");
        }
        assert!(
            report
                .notices
                .iter()
                .all(|n| n.kind != NoticeKind::BaseLayout)
        );
    }
    let index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json";
    assert!(room.path("fp16").join(index).exists());
    // A component without the variant gives its default, as in diffusers.
    std::fs::remove_file(base.join("vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    let report = merge(&Options {
        force: true,
        ..named("fp16")
    })
    .unwrap();
    let notices: Vec<_> = report
        .notices
        .iter()
        .filter(|notice| notice.kind == NoticeKind::BaseLayout)
        .collect();
    assert_eq!(notices.len(), 1);
    assert!(notices[0].text.contains("`fp16`") && notices[0].text.contains("`default`"));
    // To look at one is enough.
    let found = inspect(&base, &Default::default()).unwrap();
    assert!(
        found
            .notices
            .iter()
            .all(|n| n.kind == NoticeKind::BaseLayout)
    );
    assert_eq!(found.dtypes.keys().collect::<Vec<_>>(), ["F32"]);
}

#[test]
fn shards_of_a_variant_keep_their_names_and_their_index_its_sums() {
    let room = Room::new();
    let base = fixture("bases/pipeline/unet");
    let unet = adapter(&room, "unet", &[("", UNET)]);
    let mut options = Options {
        variant: Variant::Named("fp16".into()),
        ..options(&base, &unet, &room.path("out"))
    };
    let name = "diffusion_pytorch_model.safetensors.index.fp16.json";
    let before = oracle::json(&base.join(name));
    let report = merge(&options).unwrap();
    assert_eq!(oracle::json(&options.output.join(name)), before);
    let whole: Tensors = by_file(&options.output, &report)
        .into_values()
        .flatten()
        .collect();
    // Other sizes, another type: the index follows.
    options.dtype = Some(Float::F32);
    options.shard_size = Some(30_000);
    options.output = room.path("cut");
    let report = merge(&options).unwrap();
    let index = oracle::json(&options.output.join(name));
    let bytes = before["metadata"]["total_size"].as_u64().unwrap() * 2;
    assert_eq!(index["metadata"]["total_size"], bytes);
    let count = report.files.len();
    assert!(count > 2);
    let found = by_file(&options.output, &report);
    for (number, (file, tensors)) in found.iter().enumerate() {
        let number = number + 1;
        let expected =
            format!("diffusion_pytorch_model.fp16-{number:05}-of-{count:05}.safetensors");
        assert_eq!(*file, expected);
        for tensor in tensors.keys() {
            assert_eq!(index["weight_map"][tensor], **file);
            assert!(whole.contains_key(tensor));
        }
    }
    assert_eq!(found.values().map(Tensors::len).sum::<usize>(), whole.len());
}

#[test]
fn the_type_of_a_pipeline_changes_in_every_configuration_that_names_it() {
    let room = Room::new();
    let base = pipeline(&room, default_only);
    let unet = adapter(&room, "unet", &[("unet.", UNET)]);
    let options = Options {
        dtype: Some(Float::BF16),
        ..options(&base, &unet, &room.path("out"))
    };
    let report = merge(&options).unwrap();
    for (file, tensors) in by_file(&options.output, &report) {
        for (name, tensor) in tensors {
            let is_whole = tensor.dtype == Dtype::I64;
            assert!(is_whole || tensor.dtype == Dtype::BF16, "{file}: {name}");
        }
    }
    let config = oracle::json(&options.output.join("text_encoder/config.json"));
    assert_eq!(config["dtype"], "bfloat16");
    assert_eq!(config["vocab_size"], 16);
    let fields: Vec<&str> = report.config.iter().map(|edit| edit.field).collect();
    assert_eq!(fields, ["dtype"]);
}

#[test]
fn a_component_in_torch_files_becomes_safetensors() {
    let room = Room::new();
    let is_text = |place: &str| place.starts_with("text_encoder/");
    let base = pipeline(&room, |place| default_only(place) && !is_text(place));
    let file = std::fs::read(fixture("bases/torch/zip/pytorch_model.bin")).unwrap();
    room.write("base/text_encoder/pytorch_model.bin", file);
    let module: Modules = &[("m", [4, 3])];
    let text = adapter(&room, "text", &[("text_encoder.", module)]);
    let options = options(&base, &text, &room.path("out"));
    merge(&options).unwrap();
    assert_eq!(
        names_in(&options.output.join("text_encoder")),
        ["model.safetensors"]
    );
    let plain = crate::support::options(
        &fixture("bases/torch/plain"),
        &adapter(&room, "plain", &[("", module)]),
        &room.path("plain-out"),
    );
    merge(&plain).unwrap();
    assert_eq!(
        oracle::read(&options.output.join("text_encoder/model.safetensors")),
        oracle::read(&plain.output.join("model.safetensors"))
    );
}

/// A pipeline of two small models and a tokenizer.
fn small(room: &Room) -> Options {
    let index = r#"{"_class_name": "Small", "unet": ["a", "B"], "tokenizer": ["a", "T"],
        "vae": ["a", "V"], "none": [null, null], "flag": true}"#;
    room.write("base/model_index.json", index);
    room.write("base/unet/config.json", "{}");
    room.write(
        "base/unet/diffusion_pytorch_model.safetensors",
        small_base(),
    );
    room.write("base/vae/model.safetensors", tensors(&[("v", &[2])]));
    room.write("base/tokenizer/vocab.json", "{}");
    let module: Modules = &[("m", [4, 3])];
    let adapter = self::adapter(room, "adapter", &[("unet.", module)]);
    Options {
        force: true,
        ..options(&room.path("base"), &adapter, &room.path("out"))
    }
}

#[test]
fn only_known_files_of_named_components_are_copied_and_the_rest_is_told() {
    let room = Room::new();
    let options = small(&room);
    for extra in [
        "base/secret.txt",
        "base/all-in-one.safetensors",
        "base/logs/events.json",
        "base/unet/notes.txt",
        "base/unet/credentials.json",
        "base/unet/deep/config.json",
        "base/unet/model.onnx",
        "base/tokenizer/.hidden",
    ] {
        room.write(extra, "x");
    }
    let report = merge(&options).unwrap();
    assert_eq!(
        report.not_copied,
        [
            "all-in-one.safetensors",
            "secret.txt",
            "logs/",
            "unet/credentials.json",
            "unet/deep/",
            "unet/model.onnx",
            "unet/notes.txt"
        ]
    );
    assert_eq!(
        places(&options.output),
        [
            "model_index.json",
            "tokenizer/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/model.safetensors"
        ]
    );
}

#[test]
fn names_of_components_are_names_of_folders_here() {
    for name in ["../base", "a/b", ".", "..", ".git", "", "a\\b", "/etc"] {
        let room = Room::new();
        small(&room);
        let index = json!({ "_class_name": "x", name: ["a", "B"] });
        room.write("base/model_index.json", index.to_string());
        let error = Checkpoint::open(room.path("base")).map(drop).unwrap_err();
        assert_reason!(error, Reason::ComponentName { .. });
        assert!(error.file().unwrap().ends_with("model_index.json"));
    }
}

#[test]
fn a_component_that_is_not_there_is_noticed_and_a_pipeline_without_weights_refused() {
    let room = Room::new();
    small(&room);
    std::fs::remove_dir_all(room.path("base/vae")).unwrap();
    let base = Checkpoint::open(room.path("base")).unwrap();
    let kinds: Vec<_> = base
        .notices
        .iter()
        .map(|n| (n.kind, n.item.as_deref()))
        .collect();
    assert_eq!(kinds, [(NoticeKind::Contradiction, Some("vae"))]);
    std::fs::remove_dir_all(room.path("base/unet")).unwrap();
    let error = Checkpoint::open(room.path("base")).map(drop).unwrap_err();
    assert_reason!(error, Reason::NoCheckpoint);
}

#[test]
#[cfg(unix)]
fn links_out_of_a_pipeline_are_not_followed_and_those_of_the_hub_are() {
    use std::os::unix::fs::symlink;
    let room = Room::new();
    let options = small(&room);
    room.write("elsewhere/vocab.json", "private");
    for (link, target) in [
        ("base/vae", "../elsewhere"),
        ("base/tokenizer", "../elsewhere"),
        ("base/tokenizer/vocab.json", "../../elsewhere/vocab.json"),
    ] {
        let path = room.path(link);
        let aside = room.path("aside");
        std::fs::rename(&path, &aside).unwrap();
        symlink(target, &path).unwrap();
        let error = merge(&options).unwrap_err();
        assert_reason!(error, Reason::LinkOutside);
        assert!(!options.output.exists());
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(&aside, &path).unwrap();
    }
    // A snapshot of the hub: real folders, links to blobs.
    let hub = Room::new();
    for (number, (place, bytes)) in files(&options.base).into_iter().enumerate() {
        let blob = hub.write(&format!("models--a--b/blobs/{number}"), bytes);
        let link = hub.path("models--a--b/snapshots/0").join(place);
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(blob, link).unwrap();
    }
    let snapshot = Options {
        base: hub.path("models--a--b/snapshots/0"),
        output: room.path("hub-out"),
        ..options.clone()
    };
    merge(&snapshot).unwrap();
    merge(&options).unwrap();
    assert_eq!(tree(&snapshot.output), tree(&options.output));
}

#[test]
fn a_failure_of_any_operation_leaves_no_half_pipeline() {
    let room = Room::new();
    let options = small(&room);
    fail_everywhere(&options, None);
    let old = [(PathBuf::from("model_index.json"), b"the old one".to_vec())];
    fail_everywhere(&options, Some(&old));
}

#[test]
fn every_folder_of_a_pipeline_is_synced_before_the_rename() {
    let room = Room::new();
    let options = small(&room);
    let (result, operations) = faulty(&options, Failing::Only(usize::MAX));
    result.unwrap();
    let count = |wanted| operations.iter().filter(|o| **o == wanted).count();
    let files = places(&options.output).len();
    // The output, its three folders and its files; at the end the folder that holds all.
    assert_eq!(count(Operation::Create), files + 4);
    assert_eq!(count(Operation::Sync), files + 4 + 1);
    let renamed = operations.iter().position(|o| *o == Operation::Rename);
    assert_eq!(renamed, Some(operations.len() - 2));
}

#[test]
fn a_variant_of_a_base_that_is_one_file_is_a_wrong_call() {
    let room = Room::new();
    let options = small(&room);
    let options = Options {
        base: room.path("base/unet/diffusion_pytorch_model.safetensors"),
        variant: Variant::Named("fp16".into()),
        ..options
    };
    let error = merge(&options).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage, "{error}");
}
