//! The library against the definition, element by element: no byte may differ.

use std::path::Path;

use loratool::tensor::Float;
use safetensors::Dtype;
use serde_json::json;

use crate::goldens::{NOT_A_TARGET, cases};
use crate::oracle::{self, Delta, Stored, Tensors};
use crate::support::{Random, merge, options, selection, write_adapter, write_base};

/// Merges a folder's adapter and compares every tensor with the definition.
fn check(name: &str, base: &Path, folder: &Path) -> usize {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("merged");
    let adapter_folder = folder.join("adapter");
    merge(&options(base, &adapter_folder, &output)).unwrap();
    let ours = oracle::read(&output.join("model.safetensors"));
    let stored = oracle::read(&base.join("model.safetensors"));
    let adapter = oracle::read(&adapter_folder.join("adapter_model.safetensors"));
    let config = oracle::json(&adapter_folder.join("adapter_config.json"));
    let model = match base.join("config.json").exists() {
        true => oracle::json(&base.join("config.json")),
        false => json!({}),
    };
    let starts = oracle::starts(&stored, &adapter, &config);
    let model_type = model["model_type"].as_str().unwrap_or("");
    let deltas = oracle::deltas(&adapter, &config, &starts, model_type);
    assert!(!deltas.is_empty(), "{name}");
    let names = |tensors: &Tensors| tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&starts), "{name}");
    let mut compared = 0;
    for (tensor, start) in &starts {
        let to = stored
            .get(tensor)
            .map_or(start.dtype, |stored| stored.dtype);
        let delta = deltas.get(tensor);
        let expected = oracle::merged(start, to, delta.map_or(&[], std::slice::from_ref));
        assert_eq!(
            oracle::off(&ours[tensor], &expected),
            0,
            "{name}: elements of {tensor} off the definition"
        );
        compared += usize::from(delta.is_some());
    }
    assert_eq!(
        compared,
        deltas.len(),
        "{name}: every delta has its place in the base"
    );
    compared
}

#[test]
fn no_element_of_an_additive_golden_is_off_the_definition() {
    let mut met = Vec::new();
    for case in cases() {
        let config = oracle::json(&case.folder.join("adapter/adapter_config.json"));
        let additive = config["peft_type"] == "LORA" && config["use_dora"] != true;
        if additive && !NOT_A_TARGET.contains(&case.name.as_str()) {
            check(&case.name, &case.base, &case.folder);
            met.push(case.name);
        }
    }
    assert!(met.len() >= 29, "only {} of them: {met:?}", met.len());
}

/// Patterns that a rule of their own applies to, and their neighbours.
fn special(dtype: Dtype) -> Vec<u64> {
    let infinity = oracle::infinity(dtype);
    let magnitudes = [
        0,
        1,
        2,
        infinity - 1,
        infinity,
        infinity + 1,               // signalling, in the lowest bit of the payload
        infinity | (infinity >> 2), // some payload
        infinity | (infinity & !(infinity << 1)), // quiet or not, the highest payload bits
    ];
    let sign = 1u64 << (dtype.bitsize() - 1);
    magnitudes
        .into_iter()
        .map(|bits| bits & (sign - 1))
        .flat_map(|bits| [bits, bits | sign])
        .collect()
}

#[test]
fn zeros_nans_and_infinities_of_the_base_follow_their_rules() {
    // A base of special patterns under rows of a delta that is zero, minus zero, tiny, ordinary.
    for dtype in [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16] {
        for to in [None, Some(Float::F32), Some(Float::BF16), Some(Float::F16)] {
            let patterns = special(dtype);
            let columns = patterns.len();
            let row = vec![1.0; columns];
            let up = [0.0, -0.0, 1e-45, 1e-3, -1e-3];
            let base = Stored::of_bits(dtype, &[up.len(), columns], &patterns.repeat(up.len()));
            let up = Stored::of(Dtype::F32, &[up.len(), 1], &up);
            let down = Stored::of(Dtype::F32, &[1, columns], &row);
            let folder = tempfile::tempdir().unwrap();
            write_base(
                &folder.path().join("base"),
                None,
                &[("m.weight", base.clone())],
            );
            write_adapter(
                &folder.path().join("adapter"),
                &json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1}),
                &[
                    ("base_model.model.m.lora_A.weight", down.clone()),
                    ("base_model.model.m.lora_B.weight", up.clone()),
                ],
            );
            let output = folder.path().join("out");
            let mut options = options(
                &folder.path().join("base"),
                &folder.path().join("adapter"),
                &output,
            );
            options.dtype = to;
            // The largest f64 does not fit a narrower type.
            options.allow_nonfinite = true;
            merge(&options).unwrap();
            let to = to.map_or(dtype, Float::dtype);
            let acc = oracle::product(&up.values(), &down.values(), 1, columns);
            let expected = oracle::merged(&base, to, &[Delta { c: 1.0, acc }]);
            let ours = &oracle::read(&output.join("model.safetensors"))["m.weight"];
            assert_eq!(oracle::off(ours, &expected), 0, "{dtype} to {to}");
        }
    }
}

#[test]
fn the_order_of_the_adapters_is_the_order_of_the_chain() {
    // (w + 2⁶⁰) − 2⁶⁰ forgets w, w + (2⁶⁰ − 2⁶⁰) would not: the sums commute in value, not in bytes.
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(3);
    let base = Stored::of(
        Dtype::F32,
        &[3, 5],
        &std::array::from_fn::<f64, 15, _>(|_| random.float()),
    );
    write_base(
        &folder.path().join("base"),
        None,
        &[("m.weight", base.clone())],
    );
    let mut deltas = Vec::new();
    let mut selections = Vec::new();
    for (index, factor) in [2f64.powi(60), 3.0, -2f64.powi(60)].into_iter().enumerate() {
        let up = Stored::of(Dtype::F32, &[3, 1], &[factor; 3]);
        let down = Stored::of(Dtype::F32, &[1, 5], &[1.0; 5]);
        let path = folder.path().join(format!("adapter{index}"));
        write_adapter(
            &path,
            &json!({"peft_type": "LORA", "r": 1, "lora_alpha": 0.7}),
            &[
                ("base_model.model.m.lora_A.weight", down.clone()),
                ("base_model.model.m.lora_B.weight", up.clone()),
            ],
        );
        selections.push(selection(&path, 0.3));
        let acc = oracle::product(&up.values(), &down.values(), 1, 5);
        let c = 0.3 * (0.7 / 1.0);
        deltas.push(Delta { c, acc });
    }
    let mut outcomes = Vec::new();
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2]] {
        let output = folder.path().join(format!("out{order:?}"));
        let mut options = options(&folder.path().join("base"), Path::new(""), &output);
        options.adapters = order.map(|index| selections[index].clone()).to_vec();
        merge(&options).unwrap();
        let ordered = order.map(|index| deltas[index].clone());
        let expected = oracle::merged(&base, Dtype::F32, &ordered);
        let ours = oracle::read(&output.join("model.safetensors"))["m.weight"].clone();
        assert_eq!(oracle::off(&ours, &expected), 0, "{order:?}");
        outcomes.push(ours);
    }
    assert_ne!(
        outcomes[0], outcomes[1],
        "the example must tell orders apart"
    );
}

#[test]
fn a_minus_zero_stays_unless_a_delta_touches_it() {
    // Deltas that cancel, that underflow on either side of zero, and that are zero.
    let folder = tempfile::tempdir().unwrap();
    let rows = [
        ([1.0, 1.0], [1.0, -1.0]),
        ([1e-200, 0.0], [1.0, 1.0]),
        ([0.0, -1e-200], [1.0, 1.0]),
        ([0.0, 0.0], [1.0, -1.0]),
        ([0.0, -0.0], [-1.0, 1.0]),
    ];
    let base = Stored::of(Dtype::F32, &[rows.len(), 1], &[-0.0; 5]);
    write_base(
        &folder.path().join("base"),
        None,
        &[("m.weight", base.clone())],
    );
    let strength = 1e-200;
    let mut options = options(
        &folder.path().join("base"),
        Path::new(""),
        &folder.path().join("out"),
    );
    options.adapters.clear();
    let mut deltas = Vec::new();
    for side in 0..2 {
        let factors: Vec<f64> = rows
            .iter()
            .map(|(up, sign)| up[side] * sign[side])
            .collect();
        let up = Stored::of(Dtype::F64, &[rows.len(), 1], &factors);
        let path = folder.path().join(format!("adapter{side}"));
        write_adapter(
            &path,
            &json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1}),
            &[
                (
                    "base_model.model.m.lora_A.weight",
                    Stored::of(Dtype::F64, &[1, 1], &[1.0]),
                ),
                ("base_model.model.m.lora_B.weight", up.clone()),
            ],
        );
        options.adapters.push(selection(&path, strength));
        let acc = oracle::product(&up.values(), &[1.0], 1, 1);
        deltas.push(Delta { c: strength, acc });
    }
    merge(&options).unwrap();
    let expected = oracle::merged(&base, Dtype::F32, &deltas);
    let negative = 1 << 31;
    assert_eq!(expected.bits(), [0, 0, negative, negative, negative]);
    let ours = oracle::read(&options.output.join("model.safetensors"));
    assert_eq!(ours["m.weight"], expected);
}
