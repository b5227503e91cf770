//! Every adapter of PEFT's goldens in every format that can say it.

use std::collections::BTreeMap;
use std::path::Path;

use loratool::containers::TensorFile;
use loratool::ops::convert::{self, Options, Report};
use loratool::ops::merge::Control;
use loratool::{Kind, Reason};

use crate::goldens::{NOT_A_TARGET, cases};
use crate::hostile_support::assert_reason;
use crate::support::{fixture, merge, options, write_adapter};

fn convert(from: &Path, to: &str, base: &Path, output: &Path) -> Result<Report, loratool::Error> {
    let options = Options {
        adapter: from.to_owned(),
        to: to.to_owned(),
        output: output.to_owned(),
        base: Some(base.to_owned()),
        ..Options::default()
    };
    convert::plan(&options)?.run(&Control::default())
}

fn merged(
    base: &Path,
    adapter: &Path,
    alpha: Option<f64>,
) -> BTreeMap<String, (Vec<u8>, Vec<f64>)> {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("merged");
    let mut options = options(base, adapter, &output);
    options.read.alpha = alpha;
    merge(&options).unwrap_or_else(|error| panic!("{adapter:?}: {error:?}"));
    let file = TensorFile::open(output.join("model.safetensors")).unwrap();
    let tensors = file.directory.tensors.iter();
    let read = |tensor: &loratool::tensor::Tensor| {
        (
            tensor.bytes().unwrap().into_owned(),
            tensor.to_f64().unwrap(),
        )
    };
    tensors
        .map(|tensor| (tensor.name.clone(), read(tensor)))
        .collect()
}

#[test]
fn every_golden_of_peft_merges_alike_in_every_format_that_can_say_it() {
    let mut written: BTreeMap<&str, usize> = BTreeMap::new();
    for case in cases() {
        if NOT_A_TARGET.contains(&case.name.as_str()) {
            continue;
        }
        let from = case.folder.join("adapter");
        let source = merged(&case.base, &from, None);
        for target in convert::targets() {
            let name = format!("{} to {}", case.name, target.id());
            let room = tempfile::tempdir().unwrap();
            let output = room.path().join("converted");
            let report = match convert(&from, target.id(), &case.base, &output) {
                Ok(report) => report,
                Err(error) => {
                    let kinds = [Kind::Unsupported, Kind::Unresolved];
                    assert!(kinds.contains(&error.kind()), "{name}: {error:?}");
                    assert!(
                        !error.cases().is_empty() || error.kind() == Kind::Unresolved,
                        "{name}"
                    );
                    assert!(!output.exists(), "{name}");
                    continue;
                }
            };
            *written.entry(target.id()).or_default() += 1;
            let ours = merged(&case.base, &output, report.alpha);
            assert_eq!(ours.len(), source.len(), "{name}");
            for (tensor, (bytes, values)) in &source {
                let (our_bytes, our_values) = &ours[tensor];
                if report.folded.is_empty() {
                    assert_eq!(our_bytes, bytes, "{name}: {tensor}");
                }
                let largest = values
                    .iter()
                    .fold(0.0, |all: f64, value| all.max(value.abs()));
                let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-2 * largest;
                assert!(our_values.iter().zip(values).all(close), "{name}: {tensor}");
            }
        }
    }
    assert_every_language_format(&written);
}

/// Every format of language models was written at least five times.
pub(crate) fn assert_every_language_format(written: &BTreeMap<&str, usize>) {
    println!("{written:?}");
    for id in [
        "peft",
        "gguf",
        "mlx",
        "mlx-npz",
        "torchtune",
        "litgpt",
        "loralib",
        "adapterhub",
    ] {
        assert!(
            written.get(id).is_some_and(|count| *count >= 5),
            "{id}: {written:?}"
        );
    }
}

#[test]
fn rows_of_an_adapter_of_llama_cpp_are_not_guessed_for_a_model_that_is_not_known() {
    let room = tempfile::tempdir().unwrap();
    let file = |name: &str| fixture("formats/gguf/llama").join(name);
    let base = room.path().join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::copy(
        file("base/model.safetensors"),
        base.join("model.safetensors"),
    )
    .unwrap();
    let replaced = |name: &str, to: &Path| {
        let mut bytes = std::fs::read(file(name)).unwrap();
        let places: Vec<usize> = (0..bytes.len() - 5)
            .filter(|at| &bytes[*at..at + 5] == b"llama")
            .collect();
        assert!(!places.is_empty());
        for at in places {
            bytes[at..at + 5].copy_from_slice(b"other");
        }
        std::fs::write(to, bytes).unwrap();
    };
    replaced("base/config.json", &base.join("config.json"));
    // The adapter says what it is.
    let output = room.path().join("converted");
    convert(&file("plain.gguf"), "peft", &base, &output).unwrap();
    // Nothing does.
    let adapter = room.path().join("other.gguf");
    replaced("plain.gguf", &adapter);
    let output = room.path().join("none");
    let error = convert(&adapter, "peft", &base, &output).unwrap_err();
    assert_eq!(error.kind(), Kind::Unresolved);
    // Its name is the same in every architecture.
    let mut cases = error.cases().iter();
    assert!(cases.any(|case| case.starts_with("blk.0.attn_q: ")));
    assert!(!output.exists());
}

#[test]
fn an_adapter_of_llama_cpp_without_its_model_needs_to_be_told_which_it_is() {
    let room = tempfile::tempdir().unwrap();
    let from = fixture("peft/cases/lora_all_linear/adapter");
    let to = |family: Option<&str>, output: &str| {
        let options = Options {
            adapter: from.clone(),
            to: "gguf".to_owned(),
            output: room.path().join(output),
            family: family.map(str::to_owned),
            ..Options::default()
        };
        convert::plan(&options).map(|plan| plan.report().tensors)
    };
    assert_eq!(to(None, "a.gguf").unwrap_err().kind(), Kind::Unresolved);
    // Rotary pairs need the number of heads as well.
    assert_eq!(
        to(Some("llama"), "b.gguf").unwrap_err().kind(),
        Kind::Unresolved
    );
    assert_eq!(to(Some("qwen2"), "c.gguf").unwrap(), 28);
    assert_eq!(
        to(Some("no such"), "d.gguf").unwrap_err().kind(),
        Kind::Usage
    );
}

#[test]
fn what_is_written_for_llama_cpp_is_what_its_own_converter_writes() {
    for model in ["llama", "qwen2"] {
        let file = |name: &str| fixture("formats/gguf").join(model).join(name);
        let room = tempfile::tempdir().unwrap();
        let options = Options {
            adapter: file("plain"),
            to: "gguf".to_owned(),
            output: room.path().join("adapter.gguf"),
            base: Some(file("base")),
            ..Options::default()
        };
        let report = convert::plan(&options)
            .unwrap()
            .run(&Control::default())
            .unwrap();
        assert!(report.folded.is_empty());
        // A copy of the base's output layer, which the converter leaves out as well, is no loss.
        let stored = TensorFile::open(file("plain").join("adapter_model.safetensors")).unwrap();
        let mut names = stored.directory.tensors.iter().map(|tensor| &tensor.name);
        let copied = names.any(|name| name.ends_with("lm_head.base_layer.weight"));
        let told = report
            .notices
            .iter()
            .any(|notice| notice.text.contains("copy"));
        assert_eq!(copied, told);
        let bytes = |path: &Path| {
            let file = TensorFile::open(path).unwrap();
            let tensors = file.directory.tensors.iter();
            let all: BTreeMap<_, _> = tensors
                .map(|tensor| (tensor.name.clone(), tensor.bytes().unwrap().into_owned()))
                .collect();
            let told = |key: &str| {
                file.directory
                    .metadata
                    .iter()
                    .find(|(name, _)| name == key)
                    .cloned()
            };
            (
                all,
                told("adapter.lora.alpha"),
                told("general.architecture"),
            )
        };
        let (ours, theirs) = (bytes(&options.output), bytes(&file("plain.gguf")));
        assert!(ours.0.len() >= 28);
        assert_eq!(ours, theirs, "{model}");
    }
}

#[test]
fn what_looks_like_a_part_of_a_pipeline_may_be_a_name_of_the_model() {
    let room = tempfile::tempdir().unwrap();
    let from = room.path().join("adapter");
    let path = "base_model.model.transformer.h.0.attn.c_attn";
    let factor = |shape: [usize; 2]| crate::oracle::Stored {
        dtype: loratool::tensor::DType::F32,
        shape: shape.to_vec(),
        bytes: vec![0; 4 * shape[0] * shape[1]],
    };
    let keys = ["A", "B"].map(|factor| format!("{path}.lora_{factor}.weight"));
    let config = serde_json::json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 2 });
    let tensors = [(&*keys[0], factor([2, 6])), (&*keys[1], factor([18, 2]))];
    crate::support::write_adapter(&from, &config, &tensors);
    let output = room.path().join("again");
    let options = Options {
        adapter: from,
        to: "peft".to_owned(),
        output: output.clone(),
        ..Options::default()
    };
    convert::plan(&options)
        .unwrap()
        .run(&Control::default())
        .unwrap();
    let file = TensorFile::open(output.join("adapter_model.safetensors")).unwrap();
    let tensors = file.directory.tensors.iter();
    let names: Vec<_> = tensors.map(|tensor| tensor.name.clone()).collect();
    assert_eq!(names, keys);
}

#[test]
fn names_that_stay_are_never_ambiguous() {
    let room = tempfile::tempdir().unwrap();
    let from = room.path().join("pytorch_lora_weights.safetensors");
    // In FLUX.1, FLUX.2, SD3, HunyuanVideo and Qwen-Image alike.
    let path = "transformer.transformer_blocks.0.attn.to_q";
    let factor = |shape: [usize; 2]| crate::oracle::Stored {
        dtype: loratool::tensor::DType::F32,
        shape: shape.to_vec(),
        bytes: vec![0; 4 * shape[0] * shape[1]],
    };
    let (down, up) = (
        format!("{path}.lora_A.weight"),
        format!("{path}.lora_B.weight"),
    );
    crate::support::write_safetensors(&from, &[(&down, factor([2, 6])), (&up, factor([6, 2]))]);
    let plan = |to: &str| {
        convert::plan(&Options {
            adapter: from.clone(),
            to: to.to_owned(),
            output: room.path().join(to),
            ..Options::default()
        })
    };
    for to in ["diffusers", "diffusers-mid", "peft", "onetrainer"] {
        assert_eq!(
            plan(to).map(|plan| plan.report().modules).unwrap(),
            1,
            "{to}"
        );
    }
    assert_eq!(
        plan("kohya").map(drop).unwrap_err().kind(),
        Kind::Unresolved
    );
}

#[test]
fn vectors_of_prompts_are_carried_with_their_configuration_and_never_merged() {
    let room = tempfile::tempdir().unwrap();
    let from = room.path().join("prompt");
    let config = serde_json::json!({
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "token_dim": 3, "prefix_projection": false,
        "base_model_name_or_path": "org/model", "nested": {"a": [1, 2.5, null, true]},
    });
    let vectors = crate::oracle::Stored {
        dtype: loratool::tensor::DType::F32,
        shape: vec![2, 3],
        bytes: (0..24).collect(),
    };
    write_adapter(&from, &config, &[("prompt_embeddings", vectors.clone())]);
    let base = fixture("peft/bases/llama");
    let output = room.path().join("carried");
    let report = convert(&from, "peft", &base, &output).unwrap();
    assert_eq!((report.tensors, report.losses.len()), (1, 0));
    let written = crate::oracle::read(&output.join("adapter_model.safetensors"));
    assert_eq!(written["prompt_embeddings"], vectors);
    assert_eq!(
        crate::oracle::json(&output.join("adapter_config.json")),
        config
    );
    // cloneofsimo's numbers are asked for first.
    for target in convert::targets().filter(|target| !["peft", "simo"].contains(&target.id())) {
        let output = room.path().join(target.id());
        let error = convert(&from, target.id(), &base, &output).unwrap_err();
        assert_reason!(error, Reason::Losses { .. });
    }
    let error = merge(&options(&base, &from, &room.path().join("merged"))).unwrap_err();
    assert_reason!(error, Reason::InputVectors { .. });
}
