//! Values and scales that a conversion must not spoil: overflow, and scales of zero.

use std::path::{Path, PathBuf};

use loratool::ops::convert::{self, Options, Report};
use loratool::ops::merge::Control;
use loratool::tensor::Float;
use loratool::{Error, Kind, Reason};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::oracle::{self, Stored};
use crate::support::{merge, options, write_adapter, write_base};

/// An adapter of some modules, each of rank 2 on a 4 × 4 weight, whose up factors have one value.
fn adapter(folder: &Path, config: Value, dtype: Dtype, modules: &[(&str, f64)]) -> PathBuf {
    let mut tensors = Vec::new();
    for (path, up) in modules {
        let key = |end: &str| format!("base_model.model.{path}.lora_{end}.weight");
        tensors.push((key("A"), Stored::of(dtype, &[2, 4], &[0.25; 8])));
        tensors.push((key("B"), Stored::of(dtype, &[4, 2], &[*up; 8])));
    }
    let tensors: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    let path = folder.join("adapter");
    write_adapter(&path, &config, &tensors);
    path
}

fn convert(from: &Path, to: &str, dtype: Option<Float>) -> Result<Report, Error> {
    let options = Options {
        adapter: from.to_owned(),
        to: to.to_owned(),
        output: from.with_file_name("out"),
        dtype,
        ..Options::default()
    };
    convert::plan(&options)?.run(&Control::default())
}

fn assert_overflow(error: &Error, item: &str) {
    assert_eq!(error.kind(), Kind::NonFinite, "{error:?}");
    assert_eq!(error.item(), Some(item));
    assert!(
        matches!(error.reason(), Reason::FactorOverflow { count: 8, .. }),
        "{error:?}"
    );
    assert!(
        error
            .hint()
            .is_some_and(|hint| hint.contains("--dtype f32"))
    );
}

#[test]
fn values_that_the_type_asked_for_cannot_hold_are_refused_and_nothing_is_written() {
    let room = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2});
    let from = adapter(room.path(), config, Dtype::F32, &[("m", 1e6)]);
    let error = convert(&from, "peft", Some(Float::F16)).expect_err("it must be refused");
    assert_overflow(&error, "base_model.model.m.lora_B.weight");
    assert!(!room.path().join("out").exists());
    convert(&from, "peft", Some(Float::BF16)).unwrap();
}

#[test]
fn a_scale_that_takes_a_factor_over_the_edge_of_its_type_is_refused() {
    let room = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4});
    let path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    let from = adapter(room.path(), config, Dtype::F16, &[(path, 40000.0)]);
    let error = convert(&from, "diffusers-mid", None).expect_err("it must be refused");
    assert_overflow(&error, &format!("base_model.model.{path}.lora_B.weight"));
    convert(&from, "diffusers-mid", Some(Float::F32)).unwrap();
}

#[test]
fn a_scale_of_zero_beside_others_is_zero_in_formats_with_one_scale_for_all() {
    let modules = ["a.query", "b.query", "c.query"].map(|path| (path, 0.5));
    for others in [json!({"c.query": 3}), json!({})] {
        for target in ["mlx", "mlx-npz", "loralib"] {
            let room = tempfile::tempdir().unwrap();
            let config = json!({
                "peft_type": "LORA", "r": 2, "lora_alpha": 0, "alpha_pattern": others.clone(),
            });
            let from = adapter(room.path(), config, Dtype::F32, &modules);
            let report = convert(&from, target, None).unwrap();
            assert!(!report.folded.is_empty(), "{target}");
            let weight = || Stored::of(Dtype::F32, &[4, 4], &[1.0; 16]);
            let base = modules.map(|(path, _)| (format!("{path}.weight"), weight()));
            let base: Vec<(&str, Stored)> = base
                .iter()
                .map(|(name, tensor)| (name.as_str(), tensor.clone()))
                .collect();
            write_base(&room.path().join("base"), None, &base);
            let output = room.path().join("merged");
            let mut options = options(&room.path().join("base"), &room.path().join("out"), &output);
            options.read.alpha = report.alpha;
            merge(&options).unwrap_or_else(|error| panic!("{target}: {error:?}"));
            let merged = oracle::read(&output.join("model.safetensors"));
            let alpha = others.get("c.query").map_or(0.0, |_| 3.0);
            for (path, alpha) in [("a.query", 0.0), ("b.query", 0.0), ("c.query", alpha)] {
                let wanted = 1.0 + alpha / 2.0 * 2.0 * 0.25 * 0.5;
                let found = merged[&format!("{path}.weight")].values();
                assert!(
                    found.iter().all(|value| *value == wanted),
                    "{target} {path}: {found:?}"
                );
            }
        }
    }
}

#[test]
fn a_conversion_that_would_leave_nothing_lists_the_losses_even_where_they_are_allowed() {
    let room = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2});
    let from = adapter(
        room.path(),
        config,
        Dtype::F32,
        &[("model.layers.0.m", 0.5)],
    );
    let options = Options {
        adapter: from,
        to: "kohya".to_owned(),
        output: room.path().join("out"),
        allow_losses: true,
        ..Options::default()
    };
    let Err(error) = convert::plan(&options) else {
        panic!("it must be refused");
    };
    assert!(
        matches!(error.reason(), Reason::Losses { count: 1, .. }),
        "{error:?}"
    );
    assert_eq!(error.cases().len(), 1);
}
