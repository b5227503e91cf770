//! The type of the output, and new shards.

use std::collections::BTreeMap;
use std::path::Path;

use loratool::Reason;
use loratool::ops::merge::{Options, plan};
use loratool::tensor::Float;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::oracle::{self, Delta, Stored, Tensors};
use crate::support::{Random, fixture, merge, options, write_adapter, write_base};

const TARGETS: [Float; 3] = [Float::F32, Float::BF16, Float::F16];

/// A base with an adapted tensor `m.weight` and others of many types; the delta of `m.weight`.
fn mixed(folder: &Path) -> (Options, Tensors, Delta) {
    let mut random = Random(1);
    let mut tensor =
        |dtype, shape: &[usize]| Stored::of(dtype, shape, &random.floats(shape.iter().product()));
    let integers = Stored {
        dtype: Dtype::I64,
        shape: vec![3],
        bytes: (0..24).collect(),
    };
    // Values that a detour through f32 rounds twice, and specials.
    let awkward = [
        1.0 + 2f64.powi(-8) + 2f64.powi(-45),
        1.0 + 2f64.powi(-11) + 2f64.powi(-45),
        -0.0,
        f64::NAN,
        f64::NEG_INFINITY,
        2f64.powi(-149),
        -2f64.powi(-25),
    ];
    let base = [
        ("m.weight", tensor(Dtype::F32, &[5, 7])),
        ("single.weight", tensor(Dtype::F32, &[11])),
        ("brain.weight", tensor(Dtype::BF16, &[3, 5])),
        ("half.bias", tensor(Dtype::F16, &[5])),
        ("awkward", Stored::of(Dtype::F64, &[7], &awkward)),
        ("scalar", tensor(Dtype::F32, &[])),
        ("empty", tensor(Dtype::F32, &[0, 4])),
        ("position_ids", integers),
        (
            "mask",
            Stored {
                dtype: Dtype::BOOL,
                shape: vec![2],
                bytes: vec![0, 1],
            },
        ),
    ];
    let (down, up) = (tensor(Dtype::F32, &[2, 7]), tensor(Dtype::F32, &[5, 2]));
    let acc = oracle::product(&up.values(), &down.values(), 2, 7);
    let config =
        json!({"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vocab_size": 5});
    write_base(&folder.join("base"), Some(&config), &base);
    write_adapter(
        &folder.join("adapter"),
        &json!({"peft_type": "LORA", "r": 2, "lora_alpha": 1}),
        &[
            ("base_model.model.m.lora_A.weight", down),
            ("base_model.model.m.lora_B.weight", up),
        ],
    );
    let options = options(
        &folder.join("base"),
        &folder.join("adapter"),
        &folder.join("out"),
    );
    let base = base
        .into_iter()
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .collect();
    (options, base, Delta { c: 0.5, acc })
}

#[test]
fn every_floating_tensor_is_converted_in_one_rounding_and_no_other() {
    for target in TARGETS {
        let folder = tempfile::tempdir().unwrap();
        let (mut options, base, delta) = mixed(folder.path());
        options.dtype = Some(target);
        merge(&options).unwrap();
        let ours = oracle::read(&options.output.join("model.safetensors"));
        assert_eq!(ours.len(), base.len());
        for (name, tensor) in &base {
            let expected = match name.as_str() {
                "position_ids" | "mask" => tensor.clone(),
                "m.weight" => oracle::merged(tensor, target.dtype(), std::slice::from_ref(&delta)),
                _ => oracle::merged(tensor, target.dtype(), &[]),
            };
            assert_eq!(ours[name], expected, "{name} to {target:?}");
        }
        let config = oracle::json(&options.output.join("config.json"));
        let name = target.torch_name();
        assert_eq!(
            config,
            json!({"torch_dtype": name, "text_config": {"dtype": name}, "vocab_size": 5})
        );
    }
}

#[test]
fn without_a_wish_every_tensor_keeps_its_type_and_the_configuration_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (options, base, delta) = mixed(folder.path());
    merge(&options).unwrap();
    let ours = oracle::read(&options.output.join("model.safetensors"));
    for (name, tensor) in &base {
        let expected = match name.as_str() {
            "m.weight" => oracle::merged(tensor, tensor.dtype, std::slice::from_ref(&delta)),
            _ => tensor.clone(),
        };
        assert_eq!(ours[name], expected, "{name}");
    }
    let text = |path: &Path| std::fs::read(path.join("config.json")).unwrap();
    assert_eq!(text(&options.output), text(&options.base));
}

#[test]
fn a_bf16_model_can_be_written_as_any_type() {
    let base = fixture("peft/bases/llama_bfloat16");
    let adapter = fixture("peft/cases/lora_bf16/adapter");
    let stored = oracle::read(&base.join("model.safetensors"));
    let config = oracle::json(&adapter.join("adapter_config.json"));
    let factors = oracle::read(&adapter.join("adapter_model.safetensors"));
    let deltas = oracle::deltas(&factors, &config, &stored, "llama");
    for target in TARGETS {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(&base, &adapter, &folder.path().join("out"));
        options.dtype = Some(target);
        merge(&options).unwrap();
        let ours = oracle::read(&options.output.join("model.safetensors"));
        for (name, tensor) in &stored {
            let delta = deltas.get(name).map_or(&[][..], std::slice::from_ref);
            let expected = oracle::merged(tensor, target.dtype(), delta);
            assert_eq!(ours[name], expected, "{name} to {target:?}");
        }
    }
}

#[test]
fn an_overflow_of_the_conversion_alone_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (mut options, _, _) = mixed(folder.path());
    let large = Stored::of(Dtype::F32, &[2, 2], &[1.0, 1.0, 1.0, 70000.0]);
    let mut random = Random(2);
    let weight = Stored::of(Dtype::F32, &[5, 7], &random.floats(35));
    write_base(
        &options.base,
        None,
        &[("m.weight", weight), ("z.large", large)],
    );
    options.dtype = Some(Float::F16);
    let error = merge(&options).err().unwrap();
    assert_eq!(error.item(), Some("z.large"), "{error}");
    assert!(error.to_string().contains("[1, 1]"), "{error}");
    options.dtype = Some(Float::BF16);
    merge(&options).unwrap();
}

#[test]
fn floating_types_without_arithmetic_are_not_converted() {
    let folder = tempfile::tempdir().unwrap();
    let (mut options, mut base, _) = mixed(folder.path());
    let eight = Stored {
        dtype: Dtype::F8_E4M3,
        shape: vec![4],
        bytes: vec![1, 2, 3, 4],
    };
    base.insert("eight".to_owned(), eight.clone());
    let tensors: Vec<(&str, Stored)> = base
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    write_base(&options.base, None, &tensors);
    options.dtype = Some(Float::BF16);
    let error = plan(&options).err().unwrap();
    assert!(
        matches!(error.reason(), Reason::ConvertType { .. }),
        "{error}"
    );
    assert_eq!(error.item(), Some("eight"));
    options.dtype = None;
    merge(&options).unwrap();
    let ours = oracle::read(&options.output.join("model.safetensors"));
    assert_eq!(ours["eight"], eight);
}

/// All tensors of a sharded folder, each in the file that the index names, and the index.
fn sharded(folder: &Path) -> (Tensors, Value, BTreeMap<String, u64>) {
    let index = oracle::json(&folder.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    let mut tensors = Tensors::new();
    let mut sizes = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.ends_with(".safetensors") {
            continue;
        }
        for (tensor, stored) in oracle::read(&path) {
            assert_eq!(map[&tensor], name, "{tensor}");
            *sizes.entry(name.clone()).or_default() += stored.bytes.len() as u64;
            assert!(
                tensors.insert(tensor.clone(), stored).is_none(),
                "{tensor} twice"
            );
        }
    }
    assert_eq!(map.len(), tensors.len());
    (tensors, index, sizes)
}

#[test]
fn new_shards_hold_every_tensor_once_and_the_same_bytes() {
    let base = fixture("peft/bases/llama");
    let adapter = fixture("peft/cases/lora/adapter");
    let folder = tempfile::tempdir().unwrap();
    let whole = options(&base, &adapter, &folder.path().join("whole"));
    merge(&whole).unwrap();
    let expected = oracle::read(&whole.output.join("model.safetensors"));
    let bytes: u64 = expected
        .values()
        .map(|tensor| tensor.bytes.len() as u64)
        .sum();
    let largest = expected
        .values()
        .map(|tensor| tensor.bytes.len() as u64)
        .max()
        .unwrap();
    for limit in [1, 5000, largest, 20_000, bytes - 1] {
        let mut options = options(
            &base,
            &adapter,
            &folder.path().join(format!("shards{limit}")),
        );
        options.shard_size = Some(limit);
        let report = merge(&options).unwrap();
        let (tensors, index, sizes) = sharded(&options.output);
        assert_eq!(tensors, expected, "{limit}");
        assert_eq!(index["metadata"]["total_size"], bytes, "{limit}");
        assert_eq!(sizes.len(), report.files.len(), "{limit}");
        assert!(sizes.len() > 1);
        let count = sizes.len();
        for (number, (name, size)) in sizes.iter().enumerate() {
            assert_eq!(
                name,
                &format!("model-{:05}-of-{count:05}.safetensors", number + 1)
            );
            assert!(*size <= limit.max(largest), "{limit}: {name} has {size}");
        }
        if limit == 1 {
            assert_eq!(count, expected.len());
        }
        // The shards are a base again, and going back to one file gives the same bytes.
        let zero = fixture("peft/cases/lora_rslora/adapter");
        let mut back = crate::support::options(
            &options.output,
            &zero,
            &folder.path().join(format!("back{limit}")),
        );
        back.adapters[0].strength = 0.0;
        back.shard_size = Some(bytes);
        merge(&back).unwrap();
        assert_eq!(
            oracle::read(&back.output.join("model.safetensors")),
            expected
        );
        assert!(!back.output.join("model.safetensors.index.json").exists());
        // Without a wish the shards are those of the base.
        back.output = folder.path().join(format!("same{limit}"));
        back.shard_size = None;
        merge(&back).unwrap();
        let (tensors, again, same) = sharded(&back.output);
        assert_eq!((tensors, again, same), (expected.clone(), index, sizes));
    }
}

#[test]
fn converted_shards_have_the_sizes_of_the_new_type() {
    let base = fixture("peft/bases/llama");
    let adapter = fixture("peft/cases/lora/adapter");
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(&base, &adapter, &folder.path().join("out"));
    options.shard_size = Some(8000);
    options.dtype = Some(Float::BF16);
    merge(&options).unwrap();
    let (tensors, index, _) = sharded(&options.output);
    let bytes: usize = tensors.values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    assert!(tensors.values().all(|tensor| tensor.dtype == Dtype::BF16));
}

#[test]
fn shards_of_a_single_output_file_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(
        &fixture("peft/bases/llama/model.safetensors"),
        &fixture("peft/cases/lora/adapter"),
        &folder.path().join("out.safetensors"),
    );
    options.shard_size = Some(1000);
    let error = merge(&options).err().unwrap();
    assert_eq!(error.kind(), loratool::Kind::Usage, "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
