//! Adapters of torchtune, LitGPT, loralib and AdapterHub against what these libraries merged themselves
//! (`fixtures/make_formats_llm.py`), onto bases in their own names and in the hub's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::formats::ReadOptions;
use loratool::ops::convert::{self, Report};
use loratool::ops::merge::{Control, Options};
use loratool::{Kind, Reason};

use crate::support::{fixture, merge, options};

/// The numerator of every scale in these fixtures.
const ALPHA: f64 = 6.0;

/// f32 sums in another order.
const CLOSE: f64 = 2e-6;

/// An adapter, a base, and the tensors that the peer changed.
struct Golden {
    adapter: PathBuf,
    base: PathBuf,
    changed: PathBuf,
}

fn golden(adapter: &str, base: &str, changed: &str) -> Golden {
    let path = |name: &str| fixture("formats").join(name);
    Golden {
        adapter: path(adapter),
        base: path(base),
        changed: path(&format!("{changed}.safetensors")),
    }
}

const HUB: &str = "gguf/llama/base";

fn goldens() -> Vec<Golden> {
    let mut all = Vec::new();
    for name in ["lora", "dora"] {
        let adapter = format!("torchtune/{name}");
        let changed = format!("torchtune/{name}-changed");
        all.push(golden(&adapter, "torchtune/base.safetensors", &changed));
        all.push(golden(&adapter, HUB, &format!("{changed}-hub")));
    }
    let translated = "torchtune/lora/adapter_model.safetensors";
    all.push(golden(translated, HUB, "torchtune/lora-changed-hub"));
    for name in ["default", "all", "key", "query_key"] {
        let adapter = format!("litgpt/{name}");
        let changed = format!("litgpt/{name}-changed");
        all.push(golden(&adapter, "litgpt/base.safetensors", &changed));
        all.push(golden(&adapter, HUB, &format!("{changed}-hub")));
    }
    for name in ["plain", "lora_only"] {
        let base = format!("loralib/{name}-base.safetensors");
        let changed = format!("loralib/{name}-changed");
        all.push(golden(&format!("loralib/{name}.pt"), &base, &changed));
    }
    for (model, names) in [
        ("bert", ["lora", "lora-default", "ia3"]),
        ("gpt2", ["lora", "lora-all", "ia3"]),
    ] {
        for name in names {
            let adapter = format!("adapterhub/{model}-{name}");
            let base = format!("adapterhub/{model}-base");
            // Its merge of IA3 leaves out the biases that the active adapter scales.
            let kind = if name == "ia3" { "function" } else { "changed" };
            let file = format!("{adapter}/pytorch_adapter.bin");
            let changed = format!("{adapter}-{kind}");
            all.push(golden(&adapter, &base, &changed));
            all.push(golden(&file, &base, &changed));
        }
    }
    all
}

fn with_alpha() -> ReadOptions {
    ReadOptions {
        alpha: Some(ALPHA),
        ..ReadOptions::default()
    }
}

type Tensors = BTreeMap<String, (Vec<u8>, Vec<f64>)>;

fn tensors(path: &Path) -> Tensors {
    let file = TensorFile::open(path).unwrap();
    let read = |tensor: &loratool::tensor::Tensor| {
        let bytes = tensor.bytes().unwrap().into_owned();
        (tensor.name.clone(), (bytes, tensor.to_f64().unwrap()))
    };
    file.directory.tensors.iter().map(read).collect()
}

fn weights(base: &Path) -> PathBuf {
    match base.is_dir() {
        true => base.join("model.safetensors"),
        false => base.to_owned(),
    }
}

fn merged(base: &Path, adapter: &Path, read: ReadOptions) -> Tensors {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("merged");
    let options = Options {
        read,
        ..options(base, adapter, &output)
    };
    merge(&options).unwrap_or_else(|error| panic!("{adapter:?} on {base:?}: {error:?}"));
    tensors(&output.join("model.safetensors"))
}

/// Compares with what the peer changed, and with the base otherwise.
fn compare(name: &str, ours: &Tensors, golden: &Golden, tolerance: f64) {
    let (before, changed) = (tensors(&weights(&golden.base)), tensors(&golden.changed));
    assert!(changed.keys().all(|tensor| before.contains_key(tensor)));
    for (tensor, (bytes, before)) in &before {
        let (our_bytes, ours) = &ours[tensor];
        let Some((_, expected)) = changed.get(tensor) else {
            assert_eq!(our_bytes, bytes, "{name}: {tensor}");
            continue;
        };
        let largest = expected.iter().fold(0.0, |all: f64, v| all.max(v.abs()));
        let close = |(a, b): (&f64, &f64)| (a - b).abs() <= tolerance * largest;
        assert!(ours.iter().zip(expected).all(close), "{name}: {tensor}");
        assert!(!before.iter().zip(expected).all(close), "{name}: {tensor}");
    }
}

#[test]
fn every_golden_merges_as_its_own_library_merged_it() {
    for golden in goldens() {
        let name = format!("{:?} on {:?}", golden.adapter, golden.base);
        let ours = merged(&golden.base, &golden.adapter, with_alpha());
        compare(&name, &ours, &golden, CLOSE);
    }
}

fn convert(from: &Path, to: &str, base: &Path, output: &Path) -> Result<Report, loratool::Error> {
    let options = convert::Options {
        adapter: from.to_owned(),
        to: to.to_owned(),
        output: output.to_owned(),
        base: Some(base.to_owned()),
        read: with_alpha(),
        ..convert::Options::default()
    };
    convert::plan(&options)?.run(&Control::default())
}

#[test]
fn every_golden_merges_alike_in_every_format_that_can_say_it() {
    let mut written: BTreeMap<&str, usize> = BTreeMap::new();
    for golden in goldens() {
        for target in convert::targets() {
            let name = format!(
                "{:?} on {:?} to {}",
                golden.adapter,
                golden.base,
                target.id()
            );
            let room = tempfile::tempdir().unwrap();
            let output = room.path().join("converted");
            let report = match convert(&golden.adapter, target.id(), &golden.base, &output) {
                Ok(report) => report,
                Err(error) => {
                    let kinds = [Kind::Unsupported, Kind::Unresolved];
                    assert!(kinds.contains(&error.kind()), "{name}: {error:?}");
                    continue;
                }
            };
            *written.entry(target.id()).or_default() += 1;
            let read = ReadOptions {
                alpha: report.alpha,
                ..ReadOptions::default()
            };
            let ours = merged(&golden.base, &output, read);
            let tolerance = if report.folded.is_empty() {
                CLOSE
            } else {
                1e-5
            };
            compare(&name, &ours, &golden, tolerance);
        }
    }
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
fn what_torchtune_translated_without_moving_its_norms_is_refused() {
    let room = tempfile::tempdir().unwrap();
    let from = fixture("formats/torchtune/dora");
    let base = fixture("formats").join(HUB);
    let output = room.path().join("merged");
    let file = from.join("adapter_model.safetensors");
    let error = merge(&options(&base, &file, &output)).unwrap_err();
    assert!(matches!(error.reason(), Reason::Stored { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("adapter_model.pt"));
    assert!(
        error
            .cases()
            .iter()
            .all(|case| case.contains("_proj.lora_magnitude"))
    );
}

#[test]
fn names_that_the_base_does_not_have_are_no_result_of_a_conversion() {
    let room = tempfile::tempdir().unwrap();
    let base = fixture("peft/bases/gpt2");
    for from in ["formats/torchtune/lora", "formats/litgpt/all"] {
        let output = room.path().join("converted");
        let error = convert(&fixture(from), "peft", &base, &output).unwrap_err();
        assert_eq!(error.kind(), Kind::Unresolved, "{from}: {error:?}");
        assert!(!error.cases().is_empty() && !output.exists());
    }
}

#[test]
fn without_its_model_the_rows_of_torchtune_are_not_guessed() {
    let room = tempfile::tempdir().unwrap();
    let to = |family: Option<&str>, only: &str| {
        let options = convert::Options {
            adapter: fixture("formats/torchtune/lora"),
            to: "peft".to_owned(),
            output: room.path().join("converted"),
            family: family.map(str::to_owned),
            only: vec![only.to_owned()],
            ..convert::Options::default()
        };
        convert::plan(&options).map(|plan| plan.report().modules)
    };
    // Of these every model has the same rows.
    assert_eq!(to(None, "v_proj|mlp|output").unwrap(), 11);
    assert!(matches!(
        to(None, "q_proj").unwrap_err().reason(),
        Reason::NamesAmbiguous { .. }
    ));
    let error = to(Some("llama"), "q_proj").unwrap_err();
    assert!(matches!(error.reason(), Reason::HeadsNeeded), "{error:?}");
    assert_eq!(to(Some("qwen2"), "q_proj").unwrap(), 2);
}
