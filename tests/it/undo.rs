//! Taking a merge back, bit for bit: `merge --undo`, `unmerge`, `switch`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loratool::checkpoint::{Checkpoint, Variant};
use loratool::linalg::device::Choice;
use loratool::ops::merge::{Control, Options, Report, plan};
use loratool::ops::{switch, unmerge};
use loratool::tensor::Float;
use loratool::{Kind, Reason, Result};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;

use crate::hostile_support::{Room, names_in, tree};
use crate::oracle::Stored;
use crate::output::Failing;
use crate::support::{Random, fixture, merge, options, selection, write_adapter, write_base};

const FLOATS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16];

/// Every file below a path by its place there, or the file itself.
fn bytes(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let all = tree(path).into_iter();
    all.map(|(place, bytes)| (place.components().collect(), bytes))
        .collect()
}

/// Names of the first weights of a base that a LoRA can be on, with their shapes.
fn weights(base: &Path, count: usize) -> Vec<(String, [usize; 2])> {
    let base = Checkpoint::open_variant(base, &Variant::Any).unwrap();
    let is_one = |name: &str| !name.contains("norm") && !name.contains("embed");
    base.tensors()
        .filter(|tensor| Float::of(tensor.dtype).is_some() && is_one(&tensor.name))
        .filter_map(|tensor| {
            let path = tensor.name.strip_suffix(".weight")?.to_owned();
            Some((path, <[usize; 2]>::try_from(tensor.shape.as_slice()).ok()?))
        })
        .take(count)
        .collect()
}

/// A LoRA of PEFT on weights.
fn lora(folder: &Path, weights: &[(String, [usize; 2])], seed: u64) {
    let mut random = Random(seed);
    let mut all = Vec::new();
    for (path, [outputs, inputs]) in weights {
        for (factor, shape) in [("lora_A", [2, *inputs]), ("lora_B", [*outputs, 2])] {
            let values: Vec<f64> = random.floats(shape[0] * shape[1]);
            let values: Vec<f64> = values.iter().map(|value| value / 16.0).collect();
            let name = format!("base_model.model.{path}.{factor}.weight");
            all.push((name, Stored::of(Dtype::F32, &shape, &values)));
        }
    }
    let all: Vec<(&str, Stored)> = all.iter().map(|(n, t)| (n.as_str(), t.clone())).collect();
    write_adapter(
        folder,
        &json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3}),
        &all,
    );
}

/// The options that take a merge back.
fn back(merge: &Options, output: &Path) -> unmerge::Options {
    unmerge::Options {
        merged: merge.output.clone(),
        adapters: merge
            .adapters
            .iter()
            .map(|own| unmerge::Taken {
                path: own.path.clone(),
                ..unmerge::Taken::default()
            })
            .collect(),
        undo: merge.undo.clone(),
        output: output.to_owned(),
        ..unmerge::Options::default()
    }
}

fn unmerged(options: &unmerge::Options) -> Result<unmerge::Report> {
    unmerge::plan(options)?.run(&Control::default())
}

/// Merges with an undo file, and takes it back.
fn there_and_back(room: &Room, options: &Options) -> (Report, BTreeMap<PathBuf, Vec<u8>>) {
    let options = Options {
        undo: Some(room.path("side.undo")),
        force: true,
        ..options.clone()
    };
    let report = merge(&options).unwrap_or_else(|e| panic!("{}: {e:?}", options.base.display()));
    let extension = options.base.extension().filter(|_| options.base.is_file());
    let output = room.path(&match extension {
        None => "back".to_owned(),
        Some(extension) => format!("back.{}", extension.to_str().unwrap()),
    });
    let mut back = back(&options, &output);
    back.force = true;
    let restored = unmerged(&back).unwrap_or_else(|e| panic!("{}: {e:?}", options.base.display()));
    assert!(restored.exact);
    let bytes = bytes(&output);
    let _ = std::fs::remove_dir_all(&output);
    let _ = std::fs::remove_dir_all(&options.output);
    (report, bytes)
}

/// Asserts that the base comes back as it is, but for files that a merge does not copy.
fn comes_back(room: &Room, options: &Options) -> Report {
    let (report, found) = there_and_back(room, options);
    let mut expected = bytes(&options.base);
    if options.base.is_dir() {
        expected.retain(|place, _| found.contains_key(place));
        assert!(!expected.is_empty());
    }
    let base = options.base.display();
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>(),
        "{base}"
    );
    for (place, bytes) in &found {
        assert!(*bytes == expected[place], "{base}: {}", place.display());
    }
    report
}

#[test]
fn every_adapter_of_peft_is_taken_out_bit_for_bit() {
    let room = Room::new();
    let mut coded = 0;
    for case in crate::goldens::cases() {
        let mut options = options(
            &case.base,
            &case.folder.join("adapter"),
            &room.path("merged"),
        );
        for (strength, dtype) in [(1.0, None), (0.7, Some(Float::BF16)), (-1.5, None)] {
            options.adapters[0].strength = strength;
            options.dtype = dtype;
            let report = comes_back(&room, &options);
            coded += report.modules.len();
        }
    }
    assert!(coded > 100);
}

#[test]
fn every_adapter_of_lycoris_is_taken_out_bit_for_bit() {
    let room = Room::new();
    let mut count = 0;
    for folder in std::fs::read_dir(fixture("lycoris")).unwrap() {
        let folder = folder.unwrap().path();
        let (base, adapter) = (
            folder.join("base.safetensors"),
            folder.join("adapter.safetensors"),
        );
        if base.exists() && adapter.exists() {
            let mut options = options(&base, &adapter, &room.path("merged.safetensors"));
            for (strength, dtype) in [(1.0, None), (0.7, Some(Float::F16))] {
                options.adapters[0].strength = strength;
                options.dtype = dtype;
                comes_back(&room, &options);
                count += 1;
            }
        }
    }
    assert!(count > 20, "{count}");
}

#[test]
fn every_kind_of_base_comes_back_as_it_was() {
    let room = Room::new();
    let bases = [
        "bases/torch/plain",
        "bases/torch/zip",
        "bases/torch/legacy",
        "bases/torch/shards",
        "bases/torch/deflated.pt",
        "bases/torch/lightning.ckpt",
        "bases/ldm.ckpt",
        "bases/ldm.safetensors",
        "bases/pipeline/unet",
        "gguf/base.gguf",
        "lycoris/unet_full/unet.safetensors",
        "lycoris/flux_fused/base_bfl.safetensors",
        "peft/bases/llama_bfloat16",
        "peft/bases/llama_tied",
        "peft/bases/gpt2",
    ];
    for base in bases.map(fixture) {
        let weights = weights(&base, 3);
        assert!(!weights.is_empty(), "{}", base.display());
        lora(&room.path("adapter"), &weights, 3);
        let output = match base.is_dir() {
            true => "out".to_owned(),
            false => {
                let writer = Checkpoint::open(&base).unwrap().writer().extension();
                format!("out.{writer}")
            }
        };
        let mut options = options(&base, &room.path("adapter"), &room.path(&output));
        if base.ends_with("unet") {
            options.variant = Variant::Named("fp16".to_owned());
        }
        comes_back(&room, &options);
        if Checkpoint::open_variant(&base, &options.variant)
            .unwrap()
            .writer()
            .fixed_because()
            .is_none()
            && base.is_dir()
        {
            options.shard_size = Some(200);
            comes_back(&room, &options);
        }
    }
}

#[test]
fn a_pipeline_comes_back_with_every_component() {
    let room = Room::new();
    for (place, bytes) in bytes(&fixture("bases/pipeline")) {
        let place = place.to_str().unwrap().to_owned();
        if !place.contains("fp16") {
            room.write(&format!("base/{place}"), bytes);
        }
    }
    let weights = weights(&room.path("base"), 4);
    lora(&room.path("adapter"), &weights, 3);
    let options = options(&room.path("base"), &room.path("adapter"), &room.path("out"));
    let report = comes_back(&room, &options);
    assert!(report.modules.len() >= 4);
}

#[test]
fn several_adapters_with_strengths_by_pattern_come_out_in_one_step() {
    let room = Room::new();
    let base = fixture("peft/bases/llama_float16");
    let case = |name: &str| fixture("peft/cases").join(name).join("adapter");
    let mut options = options(&base, &case("lora_all_linear"), &room.path("out"));
    options.adapters[0].strength = 0.25;
    options.adapters[0].strength_for = vec![("mlp".to_owned(), -0.5), ("q_proj".to_owned(), 0.0)];
    options.adapters.push(selection(&case("ia3"), 0.5));
    options.adapters.push(selection(&case("lora_dora"), 0.5));
    options
        .adapters
        .push(selection(&case("lora_modules_to_save"), 1.0));
    options.skip = vec![r"layers\.1\.self_attn\.v_proj".to_owned()];
    comes_back(&room, &options);
}

pub(crate) fn few(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Elements of every kind: zeros of both signs, subnormals, the largest, infinities, NaN, and ordinary ones.
pub(crate) fn elements(dtype: Dtype, seeds: &[(u64, i16)]) -> Vec<u64> {
    let bits = dtype.bitsize() as u32;
    let mask = u64::MAX >> (64 - bits);
    let sign = 1u64 << (bits - 1);
    let infinity = crate::oracle::infinity(dtype);
    seeds
        .iter()
        .map(|(seed, small)| match seed % 16 {
            0 => 0,
            1 => sign,
            2 => seed >> 60,
            3 => infinity - 1 - (seed >> 62),
            4 => infinity | (seed & sign),
            5 => (infinity + 1 + (seed >> 61)) | (seed & sign),
            6 => seed & mask,
            _ => Stored::of(dtype, &[1], &[f64::from(*small) / 8192.0]).bits()[0],
        })
        .collect()
}

proptest! {
    #![proptest_config(few(48))]

    #[test]
    fn a_merge_comes_back_whatever_the_bits_of_the_base_and_the_types(
        seeds in prop::collection::vec((any::<u64>(), any::<i16>()), 12 * 20),
        (from, to) in (0..4usize, 0..5usize),
        strength in -2.0f64..2.0,
        large in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let room = Room::new();
        let from = FLOATS[from];
        let weight = Stored::of_bits(from, &[12, 20], &elements(from, &seeds));
        write_base(&room.path("base"), Some(&json!({})), &[("m.weight", weight)]);
        lora(&room.path("adapter"), &[("m".to_owned(), [12, 20])], seed);
        let mut options = options(&room.path("base"), &room.path("adapter"), &room.path("out"));
        options.adapters[0].strength = if large { strength * 1e4 } else { strength };
        options.allow_nonfinite = true;
        options.dtype = FLOATS.get(to).and_then(|to| Float::of(*to));
        comes_back(&room, &options);
    }

    #[test]
    fn a_switch_is_an_unmerge_and_a_merge(seed in any::<u64>(), dtype in 0..4usize) {
        let room = Room::new();
        let dtype = FLOATS[dtype];
        let mut random = Random(seed);
        let mut tensor = |shape: &[usize]| {
            let values = random.floats(shape.iter().product());
            Stored::of(dtype, shape, &values)
        };
        let base = [
            ("a.weight", tensor(&[24, 40])),
            ("b.weight", tensor(&[40, 24])),
            ("c.weight", tensor(&[8, 8])),
            ("d.bias", tensor(&[8])),
        ];
        write_base(&room.path("base"), Some(&json!({"x": 1})), &base);
        let on = |names: &[(&str, [usize; 2])]| -> Vec<(String, [usize; 2])> {
            names.iter().map(|(name, shape)| ((*name).to_owned(), *shape)).collect()
        };
        lora(&room.path("old"), &on(&[("a", [24, 40]), ("b", [40, 24])]), seed ^ 1);
        lora(&room.path("new"), &on(&[("b", [40, 24]), ("c", [8, 8])]), seed ^ 2);
        let mut first = options(&room.path("base"), &room.path("old"), &room.path("with_old"));
        first.undo = Some(room.path("old.undo"));
        merge(&first).unwrap();
        let mut second = options(&room.path("base"), &room.path("new"), &room.path("with_new"));
        second.adapters[0].strength = -0.5;
        second.undo = Some(room.path("new.undo"));
        merge(&second).unwrap();
        let switched = switch::Options {
            from: back(&first, Path::new("")),
            to: Options {
                output: room.path("switched"),
                undo: Some(room.path("switched.undo")),
                ..second.clone()
            },
        };
        switch::plan(&switched).unwrap().run(&Control::default()).unwrap();
        prop_assert_eq!(bytes(&room.path("switched")), bytes(&room.path("with_new")));
        let third = Options { output: room.path("switched"), undo: Some(room.path("switched.undo")), ..second };
        unmerged(&back(&third, &room.path("back"))).unwrap();
        prop_assert_eq!(bytes(&room.path("back")), bytes(&room.path("base")));
        let hidden = names_in(&room.path("")).into_iter().filter(|name| name.starts_with('.'));
        prop_assert_eq!(hidden.count(), 0);
    }
}

#[test]
fn adapters_of_every_kind_are_switched() {
    let room = Room::new();
    let base = fixture("peft/bases/llama");
    let case = |name: &str| fixture("peft/cases").join(name).join("adapter");
    let names = [
        "lora",
        "ia3",
        "lora_dora",
        "lora_modules_to_save",
        "lora_trainable_tokens",
    ];
    for (from, to) in names.iter().zip(names.iter().cycle().skip(1)) {
        let mut first = options(&base, &case(from), &room.path("old"));
        first.undo = Some(room.path("old.undo"));
        first.force = true;
        merge(&first).unwrap();
        let mut second = options(&base, &case(to), &room.path("direct"));
        second.force = true;
        merge(&second).unwrap();
        for device in [None, Some(Choice::of(crate::devices::plain()))] {
            let switched = switch::Options {
                from: back(&first, Path::new("")),
                to: Options {
                    output: room.path("switched"),
                    device,
                    ..second.clone()
                },
            };
            let plan = switch::plan(&switched).unwrap();
            plan.run(&Control::default()).unwrap();
            assert!(
                bytes(&room.path("switched")) == bytes(&room.path("direct")),
                "{from} to {to}"
            );
        }
    }
}

/// A base, an adapter, and the merge of both with its undo file.
struct Merged {
    room: Room,
    options: Options,
}

impl Merged {
    fn new() -> Self {
        let room = Room::new();
        let base = fixture("peft/bases/llama_bfloat16");
        let adapter = fixture("peft/cases/lora_bf16/adapter");
        let mut options = options(&base, &adapter, &room.path("merged"));
        options.undo = Some(room.path("side.undo"));
        options.adapters[0].strength = 0.8;
        merge(&options).unwrap();
        Merged { room, options }
    }

    fn back(&self) -> unmerge::Options {
        back(&self.options, &self.room.path("back"))
    }

    /// Asserts that nothing is written, and returns the error.
    fn refused(&self, options: &unmerge::Options) -> loratool::Error {
        let error = unmerged(options).map(drop).unwrap_err();
        assert!(!options.output.exists());
        error
    }
}

#[test]
fn a_strength_that_is_given_must_be_that_of_the_merge() {
    let merged = Merged::new();
    let mut options = merged.back();
    options.adapters[0].strength = Some(0.8);
    unmerge::plan(&options).unwrap();
    options.adapters[0].strength = Some(0.8000001);
    let error = merged.refused(&options);
    assert!(
        matches!(error.reason(), Reason::OtherStrength { .. }),
        "{error}"
    );
    options.adapters[0].strength = None;
    options.adapters[0].strength_for = vec![("q".to_owned(), 0.5)];
    assert!(matches!(
        merged.refused(&options).reason(),
        Reason::OtherPatterns
    ));
    options.adapters[0].strength_for.clear();
    options.adapters[0].strength = Some(f64::NAN);
    assert_eq!(merged.refused(&options).kind(), Kind::Usage);
    options.adapters.clear();
    assert!(matches!(
        merged.refused(&options).reason(),
        Reason::NoAdapter
    ));
}

#[test]
fn another_adapter_than_the_merged_one_is_refused_and_one_too_many() {
    let merged = Merged::new();
    let mut options = merged.back();
    let other = fixture("peft/cases/lora/adapter");
    options.adapters[0].path.clone_from(&other);
    assert!(matches!(
        merged.refused(&options).reason(),
        Reason::NotTheAdapter { .. }
    ));
    let mut options = merged.back();
    options.adapters.push(unmerge::Taken {
        path: other,
        ..unmerge::Taken::default()
    });
    assert!(matches!(
        merged.refused(&options).reason(),
        Reason::AdapterNotMerged
    ));
}

#[test]
fn a_result_with_one_other_bit_is_refused_and_named() {
    let merged = Merged::new();
    let path = merged.options.output.join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bad).unwrap();
    let error = merged.refused(&merged.back());
    assert!(
        matches!(error.reason(), Reason::NotMerged { count: 1 }),
        "{error}"
    );
    assert_eq!(error.cases().len(), 1);
    // Of another model altogether.
    let mut options = merged.back();
    options.merged = fixture("peft/bases/gpt2");
    assert!(matches!(
        merged.refused(&options).reason(),
        Reason::NotMerged { .. }
    ));
    std::fs::write(&path, &good).unwrap();
    unmerged(&merged.back()).unwrap();
}

#[test]
fn an_undo_file_that_is_cut_or_has_one_other_bit_is_refused() {
    let merged = Merged::new();
    let path = merged.options.undo.clone().unwrap();
    let good = std::fs::read(&path).unwrap();
    for length in (0..good.len())
        .step_by(7)
        .chain([15, 16, 17, good.len() - 1])
    {
        std::fs::write(&path, &good[..length]).unwrap();
        let error = merged.refused(&merged.back());
        assert_eq!(error.kind(), Kind::Malformed, "{length}: {error}");
    }
    for at in (0..good.len()).step_by(3) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        let error = merged.refused(&merged.back());
        let kind = if at == 15 {
            Kind::Unsupported
        } else {
            Kind::Malformed
        };
        assert_eq!(error.kind(), kind, "{at}: {error}");
    }
    std::fs::write(&path, [&good[..], b"more"].concat()).unwrap();
    assert_eq!(merged.refused(&merged.back()).kind(), Kind::Malformed);
}

/// The undo file with its directory changed and its hash right.
fn forged(good: &[u8], change: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
    let footer = good.len() - 56;
    let number = |at: usize| {
        u64::from_le_bytes(good[footer + at..footer + at + 8].try_into().unwrap()) as usize
    };
    let (offset, stored) = (number(0), number(8));
    let text = &good[offset..offset + stored];
    let text = miniz_oxide::inflate::decompress_to_vec(text).unwrap();
    let mut directory: serde_json::Value = serde_json::from_slice(&text).unwrap();
    change(&mut directory);
    let text = serde_json::to_vec(&directory).unwrap();
    let small = miniz_oxide::deflate::compress_to_vec(&text, 6);
    let mut bytes = good[..offset].to_vec();
    bytes.extend_from_slice(&small);
    for number in [offset, small.len(), text.len()] {
        bytes.extend_from_slice(&(number as u64).to_le_bytes());
    }
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

#[test]
fn a_forged_directory_is_refused_whatever_it_says() {
    let merged = Merged::new();
    let path = merged.options.undo.clone().unwrap();
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, forged(&good, |_| {})).unwrap();
    unmerge::plan(&merged.back()).unwrap();
    let coded = |directory: &serde_json::Value| {
        let tensors = directory["tensors"].as_array().unwrap();
        tensors
            .iter()
            .position(|own| own["how"]["coded"].is_object())
            .unwrap()
    };
    type Change = Box<dyn Fn(&mut serde_json::Value)>;
    let of_coded = |field: &'static str, value: serde_json::Value| -> Change {
        Box::new(move |directory| {
            let at = coded(directory);
            directory["tensors"][at]["how"]["coded"][field] = value.clone();
        })
    };
    let of_module = |field: &'static str, value: serde_json::Value| -> Change {
        Box::new(move |directory| {
            let at = coded(directory);
            directory["tensors"][at]["how"]["coded"]["modules"][0][field] = value.clone();
        })
    };
    let geometry = |rows: u64, columns: u64| json!({"part": "weight", "rows": rows, "columns": columns, "orientation": "outputs-first", "kernel": 1});
    let place = |text: &str| -> Change {
        let text = text.to_owned();
        Box::new(move |directory| directory["files"][0]["place"] = json!(text))
    };
    let changes: Vec<Change> = vec![
        of_coded("columns", json!(0)),
        of_coded("columns", json!(7)),
        of_coded("height", json!(0)),
        of_coded("height", json!(1)),
        of_coded("height", json!(u64::MAX)),
        of_coded("dtype", json!("I64")),
        of_coded("dtype", json!("F32")),
        of_coded(
            "payload",
            json!({"offset": 16, "stored": 1u64 << 60, "length": 1u64 << 60}),
        ),
        of_coded(
            "lengths",
            json!({"offset": 16, "stored": 1, "length": 1u64 << 50}),
        ),
        of_coded(
            "merged",
            json!({"name": "x", "dtype": "BF16", "shape": [1u64 << 40, 1u64 << 40], "hash": ""}),
        ),
        of_module("adapter", json!(9)),
        of_module("module", json!(1000)),
        of_module("path", json!("nothing")),
        of_module("scale", json!(17.0)),
        of_module("rows", json!({"start": 0, "end": 1u64 << 40})),
        of_module("rows", json!({"start": 5, "end": 1})),
        of_module("geometry", geometry(1, 1)),
        of_module("outputs", json!([{"start": 0, "end": 1u64 << 50}])),
        of_module("outputs", json!([{"start": 9, "end": 2}])),
        of_module("strength", json!(0.5)),
        place("../evil"),
        place("/etc/evil"),
        place("a/b/c"),
        place(".hidden"),
        place(""),
        Box::new(|directory| directory["files"][0]["bytes"] = json!(1u64 << 62)),
        Box::new(|directory| directory["files"][0]["pieces"][0] = json!({"tensor": 1u64 << 40})),
        Box::new(|directory| {
            let piece = directory["files"][0]["pieces"][1].clone();
            directory["files"][0]["pieces"]
                .as_array_mut()
                .unwrap()
                .push(piece);
        }),
        Box::new(|directory| directory["more"] = json!(1)),
        Box::new(
            |directory| directory["texts"] = json!([{"place": "model.safetensors", "text": {"offset": 16, "stored": 1, "length": 1}}]),
        ),
    ];
    for (number, change) in changes.iter().enumerate() {
        std::fs::write(&path, forged(&good, change)).unwrap();
        let error = merged.refused(&merged.back());
        let malformed = matches!(error.kind(), Kind::Malformed | Kind::Mismatch | Kind::Limit);
        assert!(malformed, "{number}: {error:?}");
    }
}

#[test]
fn an_undo_file_larger_than_its_model_is_refused() {
    let merged = Merged::new();
    let path = merged.options.undo.clone().unwrap();
    let good = std::fs::read(&path).unwrap();
    let end = good.len() - 56;
    let mut large = good[..end].to_vec();
    large.splice(16..16, std::iter::repeat_n(0, 17 << 20));
    let tail = &good[end..end + 24];
    let numbers: Vec<u64> = tail
        .chunks(8)
        .map(|number| u64::from_le_bytes(number.try_into().unwrap()))
        .collect();
    large.extend_from_slice(&(numbers[0] + (17 << 20)).to_le_bytes());
    large.extend_from_slice(&tail[8..]);
    let hash = blake3::hash(&large);
    large.extend_from_slice(hash.as_bytes());
    std::fs::write(&path, large).unwrap();
    let error = merged.refused(&merged.back());
    assert!(
        error.to_string().contains("larger than the model"),
        "{error}"
    );
}

#[test]
fn the_undo_file_is_no_output_and_lies_in_none() {
    let room = Room::new();
    let base = fixture("peft/bases/llama");
    let adapter = fixture("peft/cases/lora/adapter");
    let mut options = options(&base, &adapter, &room.path("out"));
    options.force = true;
    merge(&options).unwrap();
    options.undo = Some(room.path("out/side.undo"));
    assert_eq!(plan(&options).map(drop).unwrap_err().kind(), Kind::Usage);
    options.undo = Some(base.join("config.json"));
    assert_eq!(plan(&options).map(drop).unwrap_err().kind(), Kind::Output);
    options.undo = Some(room.path("nowhere/side.undo"));
    assert_eq!(plan(&options).map(drop).unwrap_err().kind(), Kind::Output);
}

#[test]
fn no_failure_leaves_a_result_without_its_undo_file() {
    let room = Room::new();
    let base = fixture("peft/bases/llama_bfloat16");
    let adapter = fixture("peft/cases/lora_bf16/adapter");
    let mut options = options(&base, &adapter, &room.path("out"));
    options.undo = Some(room.path("side.undo"));
    let (result, operations) = crate::output::faulty(&options, Failing::Only(usize::MAX));
    result.unwrap();
    for number in 0..operations.len() {
        let _ = std::fs::remove_dir_all(&options.output);
        let _ = std::fs::remove_file(room.path("side.undo"));
        let (result, _) = crate::output::faulty(&options, Failing::Only(number));
        result.unwrap_err();
        if options.output.exists() {
            unmerge::plan(&back(&options, &room.path("back"))).unwrap();
        }
        let hidden = names_in(&room.path(""))
            .into_iter()
            .filter(|name| name.starts_with('.'));
        assert_eq!(hidden.count(), 0, "{number}");
    }
}

#[test]
fn a_merge_has_the_same_bytes_with_and_without_an_undo_file() {
    let room = Room::new();
    for case in crate::goldens::cases() {
        let mut options = options(&case.base, &case.folder.join("adapter"), &room.path("out"));
        options.force = true;
        merge(&options).unwrap();
        let without = bytes(&options.output);
        options.undo = Some(room.path("side.undo"));
        merge(&options).unwrap();
        assert!(bytes(&options.output) == without, "{}", case.name);
    }
}

#[test]
fn undo_files_are_the_same_with_any_threads_and_kernel_and_all_read_them() {
    let merged = Merged::new();
    let wanted = std::fs::read(merged.options.undo.as_ref().unwrap()).unwrap();
    let kernels = loratool::linalg::KERNELS.iter();
    for kernel in kernels.filter(|kernel| (kernel.available)()) {
        for threads in [1, 3] {
            let mut options = merged.options.clone();
            options.force = true;
            options.kernel = Some(kernel.name.to_owned());
            options.threads = Some(threads);
            options.undo = Some(merged.room.path("other.undo"));
            merge(&options).unwrap();
            let written = std::fs::read(merged.room.path("other.undo")).unwrap();
            assert!(written == wanted, "{} {threads}", kernel.name);
            let mut back = merged.back();
            back.force = true;
            back.kernel = Some(kernel.name.to_owned());
            back.threads = Some(threads);
            unmerged(&back).unwrap();
            assert!(
                bytes(&back.output) == bytes(&options.base),
                "{}",
                kernel.name
            );
        }
    }
}

#[test]
fn the_undo_file_of_small_changes_takes_a_few_thousandths_of_what_changed() {
    let room = Room::new();
    let mut random = Random(5);
    // Normal by the sum of twelve, and a delta of 1.4 % of that.
    let mut normal = |count: usize| -> Vec<f64> {
        (0..count)
            .map(|_| (0..12).map(|_| random.float()).sum::<f64>() / 2.0)
            .collect()
    };
    let (outputs, inputs, rank) = (1024, 2048, 16);
    let mut base = Vec::new();
    let mut factors = Vec::new();
    for layer in 0..4 {
        let weight: Vec<f64> = normal(outputs * inputs).iter().map(|v| v * 0.02).collect();
        let name = format!("layers.{layer}.m.weight");
        base.push((name, Stored::of(Dtype::BF16, &[outputs, inputs], &weight)));
        for (factor, shape, scale) in [
            ("lora_A", [rank, inputs], 0.02),
            ("lora_B", [outputs, rank], 0.014 / 4.0),
        ] {
            let values: Vec<f64> = normal(shape[0] * shape[1])
                .iter()
                .map(|v| v * scale)
                .collect();
            let name = format!("base_model.model.layers.{layer}.m.{factor}.weight");
            factors.push((name, Stored::of(Dtype::F32, &shape, &values)));
        }
    }
    fn refer(all: &[(String, Stored)]) -> Vec<(&str, Stored)> {
        let all = all.iter();
        all.map(|(name, tensor)| (name.as_str(), tensor.clone()))
            .collect()
    }
    write_base(&room.path("base"), Some(&json!({})), &refer(&base));
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank});
    write_adapter(&room.path("adapter"), &config, &refer(&factors));
    let options = options(&room.path("base"), &room.path("adapter"), &room.path("out"));
    let report = comes_back(&room, &options);
    let relative = report.changes[0].relative.unwrap();
    assert!((0.012..0.016).contains(&relative), "{relative}");
    let share = report.undo.unwrap().share.unwrap();
    assert!(share < 0.0035, "{share}");
    assert!(share > 0.001, "{share}");
}
