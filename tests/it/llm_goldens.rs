//! Adapters of torchtune, LitGPT, loralib and AdapterHub against what these libraries merged themselves
//! (`fixtures/make_formats_llm.py`), onto bases in their own names and in the hub's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::formats::{Found, ReadOptions};
use loratool::ops::convert::{self, Report};
use loratool::ops::merge::{Control, Options};
use loratool::tensor::DType;
use loratool::{Kind, Reason};

use crate::conversions::assert_every_language_format;
use crate::oracle::Stored;
use crate::support::{fixture, merge, options, write_adapter, write_base, write_safetensors};

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
    assert_every_language_format(&written);
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

#[test]
fn layers_of_a_llama_land_on_the_fused_ones_of_phi_3() {
    let room = tempfile::tempdir().unwrap();
    let split = fixture("formats").join(HUB);
    let adapter = fixture("formats/gguf/llama/plain");
    let expected = merged(&split, &adapter, ReadOptions::default());
    let fused_of = |all: &Tensors| {
        let mut fused = BTreeMap::new();
        for (name, (_, values)) in all {
            let path = name.trim_end_matches(".weight");
            let (owner, leaf) = path.rsplit_once('.').unwrap_or(("", path));
            let parts = match leaf {
                "q_proj" => ("qkv_proj", &["q_proj", "k_proj", "v_proj"][..]),
                "gate_proj" => ("gate_up_proj", &["gate_proj", "up_proj"][..]),
                "k_proj" | "v_proj" | "up_proj" => continue,
                _ => {
                    fused.insert(name.clone(), values.clone());
                    continue;
                }
            };
            let values = parts
                .1
                .iter()
                .flat_map(|part| &all[&format!("{owner}.{part}.weight")].1);
            fused.insert(
                format!("{owner}.{}.weight", parts.0),
                values.copied().collect(),
            );
        }
        fused
    };
    let before = tensors(&weights(&split));
    let shape = |name: &str, count: usize| match name.contains("norm") {
        true => vec![count],
        false if name.contains("down_proj") => vec![count / 48, 48],
        false => vec![count / 32, 32],
    };
    let stored: Vec<(String, Stored)> = fused_of(&before)
        .into_iter()
        .map(|(name, values)| {
            let shape = shape(&name, values.len());
            (name, Stored::of(DType::F32, &shape, &values))
        })
        .collect();
    let stored: Vec<(&str, Stored)> = stored
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    let config = serde_json::json!({
        "model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2
    });
    let base = room.path().join("phi3");
    write_base(&base, Some(&config), &stored);
    let found = merged(&base, &adapter, ReadOptions::default());
    let wanted = fused_of(&expected);
    assert_eq!(found.len(), wanted.len());
    let mut changed = 0;
    for (name, values) in &wanted {
        assert_eq!(&found[name].1, values, "{name}");
        changed += usize::from(name.contains("qkv") && *values != fused_of(&before)[name]);
    }
    assert_eq!(changed, 2);
    // Under torchtune's names, whose rows are those of the hub for this model; `lora` was made for another.
    let (from, renamed) = (
        fixture("formats/torchtune/lora"),
        room.path().join("renamed"),
    );
    let file = TensorFile::open(from.join("adapter_model.pt")).unwrap();
    let keys: Vec<(String, Stored)> = file
        .directory
        .tensors
        .iter()
        .map(|tensor| {
            let mut key = format!("base_model.model.{}", tensor.name);
            for (own, hub) in [
                (".layers.", ".model.layers."),
                (".attn.output_proj.", ".self_attn.o_proj."),
                (".attn.", ".self_attn."),
                (".w1.", ".gate_proj."),
                (".w2.", ".down_proj."),
                (".w3.", ".up_proj."),
                (".output.", ".lm_head."),
                (".lora_a.", ".lora_A."),
                (".lora_b.", ".lora_B."),
            ] {
                key = key.replace(own, hub);
            }
            let (dtype, shape) = (DType::F32, tensor.shape.clone());
            let bytes = tensor.bytes().unwrap().into_owned();
            (
                key,
                Stored {
                    dtype,
                    shape,
                    bytes,
                },
            )
        })
        .collect();
    let keys: Vec<(&str, Stored)> = keys.iter().map(|(k, t)| (k.as_str(), t.clone())).collect();
    let config = serde_json::json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 6 });
    write_adapter(&renamed, &config, &keys);
    let expected = merged(&base, &renamed, ReadOptions::default());
    let ours = merged(&base, &from, ReadOptions::default());
    assert!(ours == expected);
    let error = convert(&from, "peft", &base, &room.path().join("peft")).unwrap_err();
    assert_eq!(error.kind(), Kind::Unresolved);
}

/// Converts to PEFT and from there to another format, and gives what that holds.
fn there_and_back(from: &Path, to: &str, base: &Path) -> Tensors {
    let room = tempfile::tempdir().unwrap();
    let (peft, back) = (room.path().join("peft"), room.path().join("back"));
    convert(from, "peft", base, &peft).unwrap();
    convert(&peft, to, base, &back).unwrap();
    tensors(Found::open(&back).unwrap().file.input.path())
}

#[test]
fn the_tensors_of_every_library_come_back_from_peft_bit_for_bit() {
    let path = |name: &str| fixture("formats").join(name);
    let mut cases = Vec::new();
    for name in ["default", "all", "key", "query_key"] {
        let file = format!("litgpt/{name}/lit_model.pth.lora");
        cases.push((
            path(&format!("litgpt/{name}")),
            "litgpt",
            HUB.to_owned(),
            path(&file),
        ));
    }
    for name in ["lora", "dora"] {
        let file = format!("torchtune/{name}/adapter_model.pt");
        cases.push((
            path(&format!("torchtune/{name}")),
            "torchtune",
            HUB.to_owned(),
            path(&file),
        ));
    }
    for name in ["plain", "lora_only"] {
        let file = path(&format!("loralib/{name}.pt"));
        let base = format!("loralib/{name}-base.safetensors");
        cases.push((file.clone(), "loralib", base, file));
    }
    for name in ["bert-lora", "bert-ia3", "gpt2-lora", "gpt2-lora-all"] {
        let base = format!("adapterhub/{}-base", &name[..4]);
        let file = path(&format!("adapterhub/{name}/adapter.safetensors"));
        cases.push((
            path(&format!("adapterhub/{name}")),
            "adapterhub",
            base,
            file,
        ));
    }
    for (from, to, base, file) in cases {
        let found = there_and_back(&from, to, &path(&base));
        let wanted: BTreeMap<String, Vec<u8>> = tensors(&file)
            .into_iter()
            .map(|(name, (bytes, _))| {
                let name = name.strip_prefix("model.").unwrap_or(&name);
                (name.replace(".loras.task.", ".loras.default."), bytes)
            })
            .collect();
        let found: BTreeMap<String, Vec<u8>> = found
            .into_iter()
            .map(|(name, (bytes, _))| (name, bytes))
            .collect();
        assert!(
            found.keys().eq(wanted.keys()),
            "{from:?}: {:?}",
            found.keys()
        );
        assert!(found == wanted, "{from:?}");
    }
}

#[test]
fn what_litgpt_writes_beside_its_factors_is_written_too() {
    let room = tempfile::tempdir().unwrap();
    for name in ["all", "key"] {
        let from = fixture("formats/litgpt").join(name);
        let output = room.path().join(name);
        convert(&from, "litgpt", &fixture("formats").join(HUB), &output).unwrap();
        let lines = |path: &Path, wanted: &str| -> Vec<String> {
            let text = std::fs::read_to_string(path).unwrap();
            let lines = text.lines().filter(|line| line.starts_with(wanted));
            lines.map(str::to_owned).collect()
        };
        let file = "hyperparameters.yaml";
        let mut theirs = lines(&from.join(file), "lora_");
        theirs.retain(|line| !line.starts_with("lora_dropout"));
        let mut ours = lines(&output.join(file), "lora_");
        ours.retain(|line| !line.starts_with("lora_dropout"));
        ours.sort();
        assert_eq!(ours, theirs, "{name}");
        for key in ["head_size", "n_head", "n_query_groups"] {
            let file = "model_config.yaml";
            assert_eq!(
                lines(&output.join(file), key),
                lines(&from.join(file), key),
                "{name}"
            );
        }
    }
}

#[test]
fn an_archive_that_is_written_has_the_same_bytes_every_time_and_aligned_data() {
    let room = tempfile::tempdir().unwrap();
    let base = fixture("formats").join(HUB);
    let written = |to: &str, file: &str, number: usize| {
        let output = room.path().join(format!("{to}{number}"));
        let report = convert(&fixture("formats/torchtune/lora"), to, &base, &output).unwrap();
        let path = output.join(file);
        assert_eq!(
            std::fs::metadata(&path).unwrap().len(),
            report.bytes,
            "{to}"
        );
        let file = TensorFile::open(&path).unwrap();
        file.verify().unwrap();
        (std::fs::read(&path).unwrap(), file)
    };
    for (to, file, alignment) in [
        ("torchtune", "adapter_model.pt", 64),
        ("loralib", "lora.pt", 64),
        ("mlx-npz", "adapters.npz", 1),
    ] {
        let (first, read) = written(to, file, 0);
        let (second, _) = written(to, file, 1);
        assert!(first == second, "{to}");
        assert_eq!(read.directory.tensors.len(), 30, "{to}");
        let tensors = &read.directory.tensors;
        assert!(
            tensors.iter().all(|tensor| tensor.offset % alignment == 0),
            "{to}"
        );
    }
}

#[test]
fn modules_of_several_ranks_get_the_one_rank_that_mlx_loads() {
    let room = tempfile::tempdir().unwrap();
    let golden = golden("gguf/llama/patterns", HUB, "gguf/llama/patterns-changed");
    let ranks = |file: &Path, key: &str, axis: usize| {
        let file = TensorFile::open(file).unwrap();
        let tensors = file.directory.tensors.iter();
        let factors = tensors.filter(|tensor| tensor.name.contains(key));
        factors.map(|tensor| tensor.shape[axis]).collect()
    };
    let source = golden.adapter.join("adapter_model.safetensors");
    let own: BTreeSet<usize> = ranks(&source, ".lora_A", 0);
    assert!(own.len() > 1, "{own:?}");
    let largest = own.last().copied().into_iter().collect();
    for (to, file) in [("mlx", "adapters.safetensors"), ("mlx-npz", "adapters.npz")] {
        let output = room.path().join(to);
        convert(&golden.adapter, to, &golden.base, &output).unwrap();
        assert_eq!(ranks(&output.join(file), ".lora_a", 1), largest, "{to}");
        assert_eq!(ranks(&output.join(file), ".lora_b", 0), largest, "{to}");
        let ours = merged(&golden.base, &output, ReadOptions::default());
        compare(to, &ours, &golden, 1e-5);
    }
}

#[test]
fn an_npz_holds_the_values_of_bf16_as_f32() {
    let room = tempfile::tempdir().unwrap();
    let base = fixture("formats").join(HUB);
    let half = room.path().join("half");
    let options = convert::Options {
        adapter: fixture("formats/torchtune/lora"),
        to: "peft".to_owned(),
        output: half.clone(),
        base: Some(base.clone()),
        dtype: Some(loratool::tensor::Float::BF16),
        ..convert::Options::default()
    };
    convert::plan(&options)
        .unwrap()
        .run(&Control::default())
        .unwrap();
    let (npz, plain) = (room.path().join("npz"), room.path().join("plain"));
    convert(&half, "mlx-npz", &base, &npz).unwrap();
    convert(&half, "mlx", &base, &plain).unwrap();
    let (npz, plain) = (
        tensors(&npz.join("adapters.npz")),
        tensors(&plain.join("adapters.safetensors")),
    );
    assert_eq!(npz.len(), plain.len());
    for (name, (bytes, values)) in &plain {
        assert_eq!(&npz[name].1, values, "{name}");
        assert_eq!(npz[name].0.len(), 2 * bytes.len(), "{name}");
    }
}

/// The factors of AdapterHub in a folder of their own, and the text of the configuration that they lack.
fn copied(from: &Path) -> (tempfile::TempDir, String) {
    let room = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    std::fs::copy(
        from.join("adapter.safetensors"),
        room.path().join("adapter.safetensors"),
    )
    .unwrap();
    (room, text)
}

#[test]
fn adapters_before_1_1_are_read_with_the_scale_that_they_had() {
    let (room, text) = copied(&fixture("formats/adapterhub/bert-lora"));
    for (version, scale) in [("0.1.2", 1.0), ("1.0.1", 1.0), ("1.1.0", 1.5), ("2.0", 1.5)] {
        let text = text.replace("adapters.1.3.0", &format!("adapters.{version}"));
        std::fs::write(room.path().join("adapter_config.json"), text).unwrap();
        let adapter = Found::open(room.path())
            .unwrap()
            .read(&ReadOptions::default())
            .unwrap();
        assert!(
            adapter
                .modules
                .iter()
                .all(|module| module.scale.value == scale),
            "{version}"
        );
        assert_eq!(adapter.notices.is_empty(), scale == 1.5, "{version}");
    }
}

#[test]
fn the_thirds_of_a_fused_layer_are_those_that_the_configuration_names() {
    let (room, text) = copied(&fixture("formats/adapterhub/gpt2-lora"));
    for (matrices, fits) in [("\"q\",\n      \"v\"", true), ("\"q\"", false), ("", false)] {
        let text = text.replace("\"q\",\n      \"v\"", matrices);
        std::fs::write(room.path().join("adapter_config.json"), text).unwrap();
        let read = Found::open(room.path())
            .unwrap()
            .read(&ReadOptions::default());
        match read {
            Ok(adapter) => {
                assert!(fits, "{matrices}");
                let shape = |role| adapter.modules[0].get(role).unwrap().shape.clone();
                assert_eq!(shape(loratool::methods::lora::UP), [48, 8]);
            }
            Err(error) => {
                assert!(!fits, "{matrices}: {error:?}");
                assert!(
                    matches!(error.reason(), Reason::FactorShape { .. }),
                    "{error:?}"
                );
            }
        }
    }
}

/// A folder of LitGPT with the names of old releases.
fn old_litgpt(name: &str, room: &Path) -> PathBuf {
    let from = fixture("formats/litgpt").join(name);
    let folder = room.join(name);
    std::fs::create_dir(&folder).unwrap();
    for file in ["hyperparameters.yaml", "model_config.yaml"] {
        std::fs::copy(from.join(file), folder.join(file)).unwrap();
    }
    let all = tensors(&from.join("lit_model.pth.lora"));
    let file = TensorFile::open(from.join("lit_model.pth.lora")).unwrap();
    let stored: Vec<(String, Stored)> = all
        .into_iter()
        .map(|(name, (bytes, _))| {
            let shape = file.tensor(&name).unwrap().shape.clone();
            let dtype = DType::F32;
            (
                name.replace(".attn.qkv.", ".attn.attn."),
                Stored {
                    dtype,
                    shape,
                    bytes,
                },
            )
        })
        .collect();
    let stored: Vec<(&str, Stored)> = stored
        .iter()
        .map(|(n, t)| (n.as_str(), t.clone()))
        .collect();
    write_safetensors(&folder.join("lit_model.pth.lora"), &stored);
    folder
}

#[test]
fn parts_of_old_releases_of_litgpt_are_those_of_new_ones() {
    let room = tempfile::tempdir().unwrap();
    for name in ["default", "key", "query_key"] {
        let changed = format!("litgpt/{name}-changed-hub");
        let golden = Golden {
            adapter: old_litgpt(name, room.path()),
            ..golden("", HUB, &changed)
        };
        let ours = merged(&golden.base, &golden.adapter, ReadOptions::default());
        compare(name, &ours, &golden, CLOSE);
    }
}

#[test]
fn an_old_release_of_litgpt_added_all_three_parts_to_the_rows_as_they_lay() {
    const WIDTH: usize = 32;
    const HEAD: usize = 8;
    let room = tempfile::tempdir().unwrap();
    let base = fixture("formats").join(HUB);
    let folder = old_litgpt("all", room.path());
    let ours = merged(&base, &folder, ReadOptions::default());
    let factors = tensors(&folder.join("lit_model.pth.lora"));
    let before = tensors(&weights(&base));
    let factor = |name: &str| &factors[&format!("model.transformer.h.1.attn.attn.{name}")].1;
    let (down, up) = (factor("lora_A"), factor("lora_B"));
    // Four queries and two keys: rows 0..32 of the factor are for the first A, 16 each for the others.
    let delta = |row: usize, column: usize| {
        let part = [0, 0, 1, 2][row / 16];
        let sum = (0..4).map(|r| up[row * 4 + r] * down[(part * 4 + r) * WIDTH + column]);
        1.5 * sum.sum::<f64>()
    };
    for (layer, heads, first, group) in [
        ("q_proj", 4, 0, 2),
        ("k_proj", 2, 2, 1),
        ("v_proj", 2, 3, 1),
    ] {
        let name = format!("model.layers.1.self_attn.{layer}.weight");
        for head in 0..heads {
            let start = (head / group * 4 + first + head % group) * HEAD;
            for (row, column) in (0..HEAD * WIDTH).map(|at| (at / WIDTH, at % WIDTH)) {
                let at = (head * HEAD + row) * WIDTH + column;
                let expected = before[&name].1[at] + delta(start + row, column);
                assert!(
                    (ours[&name].1[at] - expected).abs() < 1e-6,
                    "{name} {head} {row} {column}"
                );
            }
        }
    }
}
