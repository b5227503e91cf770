//! What MLX fused, against what we compute.

use std::path::Path;

use loratool::containers::TensorFile;
use loratool::formats::{Found, ReadOptions};
use loratool::ops::inspect::inspect;
use loratool::{Kind, Reason};

use crate::hostile_support::{Room, assert_reason, tensors};
use crate::support::{fixture, merge, options};

fn compare(ours: &Path, theirs: &Path) {
    let (ours, theirs) = (
        TensorFile::open(ours).unwrap(),
        TensorFile::open(theirs).unwrap(),
    );
    assert_eq!(ours.directory.tensors.len(), theirs.directory.tensors.len());
    for expected in &theirs.directory.tensors {
        let found = ours.tensor(&expected.name).unwrap();
        assert_eq!(found.shape, expected.shape, "{}", expected.name);
        let pairs = found.to_f64().unwrap();
        for (a, b) in pairs.iter().zip(expected.to_f64().unwrap()) {
            assert!((a - b).abs() <= 1e-6, "{}: {a} and {b}", expected.name);
        }
    }
}

#[test]
fn every_golden_of_mlx_is_met() {
    for case in ["lora", "dora"] {
        let room = Room::new();
        let folder = fixture("mlx").join(case);
        let output = room.path("merged.safetensors");
        merge(&options(
            &folder.join("base.safetensors"),
            &folder.join("adapter"),
            &output,
        ))
        .unwrap_or_else(|error| panic!("{case}: {error:?}"));
        compare(&output, &folder.join("merged.safetensors"));
    }
}

#[test]
fn an_npz_with_a_configuration_merges_like_the_safetensors() {
    let room = Room::new();
    let folder = fixture("mlx/lora");
    for (from, to) in [
        ("adapters.npz", "a/adapters.npz"),
        ("adapter/adapter_config.json", "a/adapter_config.json"),
    ] {
        room.write(to, std::fs::read(folder.join(from)).unwrap());
    }
    let output = room.path("merged.safetensors");
    merge(&options(
        &folder.join("base.safetensors"),
        &room.path("a"),
        &output,
    ))
    .unwrap();
    compare(&output, &folder.join("merged.safetensors"));
}

#[test]
fn an_npz_without_a_configuration_is_described_and_its_missing_scale_named() {
    let path = fixture("mlx/lora/adapters.npz");
    let found = inspect(&path, &Default::default()).unwrap();
    assert_eq!(found.format_name.as_deref(), Some("MLX (npz)"));
    assert_eq!(found.container, "npz");
    assert_eq!(found.exit_code(), 0);
    let ranks = found.summary.unwrap().ranks;
    assert_eq!(ranks.keys().copied().collect::<Vec<_>>(), [3]);
    let problem = found.problem.unwrap();
    assert!(problem.text.contains("scale"), "{problem:?}");
    assert!(problem.hint.unwrap().contains("lora_parameters"));
}

/// Reads an adapter of these tensors under this configuration.
fn read(config: &str, content: &[(&str, &[usize])]) -> loratool::Result<usize> {
    let room = Room::new();
    room.write("adapters.safetensors", tensors(content));
    room.write("adapter_config.json", config);
    let adapter = Found::open(room.root())?.read(&ReadOptions::default())?;
    Ok(adapter.modules.len() + adapter.replacements.len())
}

const SCALE: &str = r#"{"lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}"#;
const PAIR: &[(&str, &[usize])] = &[("m.lora_a", &[3, 2]), ("m.lora_b", &[2, 4])];

#[test]
fn the_configuration_decides_and_what_it_cannot_mean_is_refused() {
    assert_eq!(read(SCALE, PAIR).unwrap(), 1);
    for config in [
        "{\"fine_tune_type\": \"lora\"}",
        "{\"lora_parameters\": {\"alpha\": 16, \"rank\": 2}}",
    ] {
        assert_reason!(read(config, PAIR).unwrap_err(), Reason::ScaleMissing);
    }
    let dora = SCALE.replacen('{', "{\"use_dora\": true, ", 1);
    assert_reason!(
        read(&dora, PAIR).unwrap_err(),
        Reason::RoleMissing {
            role: "magnitude",
            ..
        }
    );
    let with_norm = [PAIR, &[("m.m", &[4])]].concat();
    assert_eq!(read(&dora, &with_norm).unwrap(), 1);
    assert_reason!(
        read(SCALE, &with_norm).unwrap_err(),
        Reason::FactorShape { .. }
    );
    let odd = SCALE.replacen("\"rank\"", "\"rslora\": true, \"rank\"", 1);
    assert_reason!(
        read(&odd, PAIR).unwrap_err(),
        Reason::UnknownConfigField { .. }
    );
    let vera = SCALE.replacen('{', "{\"fine_tune_type\": \"vera\", ", 1);
    assert_reason!(read(&vera, PAIR).unwrap_err(), Reason::Method { .. });
}

#[test]
fn experts_and_foreign_tensors_are_refused_by_name() {
    let experts: &[(&str, &[usize])] = &[
        ("mlp.switch_mlp.up_proj.lora_a", &[2, 2, 3]),
        ("mlp.switch_mlp.up_proj.lora_b", &[2, 4, 2]),
    ];
    let error = read(SCALE, experts).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("switch_mlp"), "{error}");
    let more = [PAIR, &[("norm.weight", &[4])]].concat();
    assert_reason!(
        read(SCALE, &more).unwrap_err(),
        Reason::UnknownKeys { count: 1 }
    );
    let twisted: &[(&str, &[usize])] = &[("m.lora_a", &[2, 3]), ("m.lora_b", &[4, 2])];
    assert_reason!(
        read(SCALE, twisted).unwrap_err(),
        Reason::FactorShape { .. }
    );
}

#[test]
fn a_full_fine_tune_replaces_whole_tensors() {
    let config = r#"{"fine_tune_type": "full", "lora_parameters": {"rank": 8}}"#;
    let content: &[(&str, &[usize])] = &[("m.weight", &[4, 3]), ("norm.weight", &[2])];
    assert_eq!(read(config, content).unwrap(), 2);
    let room = Room::new();
    room.write("a/adapters.safetensors", tensors(content));
    room.write("a/adapter_config.json", config);
    let base = room.write("base.safetensors", tensors(&[content[1], content[0]]));
    let output = room.path("merged.safetensors");
    merge(&options(&base, &room.path("a"), &output)).unwrap();
    compare(&output, &room.path("a/adapters.safetensors"));
    assert_reason!(
        read(config, &[("conv.weight", &[4, 3, 2])]).unwrap_err(),
        Reason::MethodOnTarget { .. }
    );
}

#[test]
fn an_adapter_on_a_shared_embedding_leaves_it_shared() {
    let room = Room::new();
    room.write(
        "a/adapters.safetensors",
        tensors(&[
            ("model.embed_tokens.lora_a", &[5, 2]),
            ("model.embed_tokens.lora_b", &[2, 3]),
        ]),
    );
    room.write("a/adapter_config.json", SCALE);
    room.write(
        "base/model.safetensors",
        tensors(&[("model.embed_tokens.weight", &[5, 3])]),
    );
    let config = r#"{"model_type": "llama", "tie_word_embeddings": true}"#;
    room.write("base/config.json", config);
    let output = room.path("merged");
    merge(&options(&room.path("base"), &room.path("a"), &output)).unwrap();
    let merged = TensorFile::open(output.join("model.safetensors")).unwrap();
    assert_eq!(merged.directory.tensors.len(), 1);
    let written = std::fs::read_to_string(output.join("config.json")).unwrap();
    assert_eq!(written, config);
}
