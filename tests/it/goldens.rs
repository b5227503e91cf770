//! What PEFT computed, against what we compute.

use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::tensor::Float;

use crate::support::{fixture, merge, options, tensor};

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    pub(crate) base: PathBuf,
    tolerance: f64,
    /// PEFT rounded more than once: 16-bit factors, `safe_merge`, embeddings.
    several_roundings: bool,
}

pub(crate) fn cases() -> Vec<Case> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(fixture("peft/cases"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    names.sort();
    names
        .into_iter()
        .filter(|folder| folder.join("merged.safetensors").exists())
        .map(|folder| {
            let text = std::fs::read(folder.join("case.json")).unwrap();
            let case: serde_json::Value = serde_json::from_slice(&text).unwrap();
            Case {
                name: folder.file_name().unwrap().to_str().unwrap().to_owned(),
                base: fixture("peft").join(case["base"].as_str().unwrap()),
                tolerance: case["tolerance"].as_f64().unwrap(),
                several_roundings: case["safe_merge"] == true
                    || case["autocast_adapter_dtype"] == false
                    || folder.ends_with("lora_embedding_bf16"),
                folder,
            }
        })
        .collect()
}

/// Cases in which PEFT's own merge changes the function (`function_gap` in their `case.json`): the
/// result is checked against what the adapted model computes, in tests of their own.
pub(crate) const NOT_A_TARGET: &[&str] = &[
    "lora_embed_tied",
    "lora_lm_head_tied",
    "lora_both_tied",
    "lora_ensure_tying",
    "lora_layer_replication",
];

/// The largest |value| of a tensor.
fn largest(values: &[f64]) -> f64 {
    values
        .iter()
        .fold(0.0, |largest, value| value.abs().max(largest))
}

/// Units in the last place between two stored 16-bit floats.
fn ulps(a: &[u8], b: &[u8]) -> i32 {
    let order = |bytes: &[u8]| {
        let bits = i32::from(i16::from_le_bytes([bytes[0], bytes[1]]));
        if bits < 0 {
            i32::from(i16::MIN) - bits
        } else {
            bits
        }
    };
    (order(a) - order(b)).abs()
}

fn compare(case: &Case, ours: &Path, theirs: &Path) {
    let (name, tolerance) = (&case.name, case.tolerance);
    let (ours, theirs) = (
        TensorFile::open(ours).unwrap(),
        TensorFile::open(theirs).unwrap(),
    );
    let names = |file: &TensorFile| {
        let mut names: Vec<String> = file
            .directory
            .tensors
            .iter()
            .map(|t| t.name.clone())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&ours), names(&theirs), "{name}");
    for expected in &theirs.directory.tensors {
        let found = tensor(&ours, &expected.name);
        assert_eq!(
            (found.dtype, &found.shape),
            (expected.dtype, &expected.shape),
            "{name}: {}",
            expected.name
        );
        if Float::of(found.dtype).is_some_and(|float| float.size() == 2) {
            let (found, expected_bytes) = (found.bytes().unwrap(), expected.bytes().unwrap());
            let worst = found
                .chunks(2)
                .zip(expected_bytes.chunks(2))
                .map(|(a, b)| ulps(a, b))
                .max()
                .unwrap();
            let scale = largest(&expected.to_f64().unwrap());
            let gap = largest(&difference(
                &tensor(&ours, &expected.name).to_f64().unwrap(),
                &expected.to_f64().unwrap(),
            ));
            let near = case.several_roundings && gap <= scale * 2f64.powi(-6);
            assert!(
                worst <= 1 || near,
                "{name}: {} is {worst} ulp off, {gap:e} of {scale:e}",
                expected.name
            );
        } else {
            let (found, expected_values) = (found.to_f64().unwrap(), expected.to_f64().unwrap());
            let gap = largest(&difference(&found, &expected_values));
            let limit = tolerance.max(1e-5) * largest(&expected_values).max(1e-30);
            assert!(
                gap <= limit,
                "{name}: {} differs by {gap:e}, allowed {limit:e}",
                expected.name
            );
        }
    }
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

#[test]
fn every_golden_of_peft_is_met() {
    let mut met = 0;
    for case in cases()
        .iter()
        .filter(|case| !NOT_A_TARGET.contains(&case.name.as_str()))
    {
        let out = tempfile::tempdir().unwrap();
        let output = out.path().join("merged");
        let options = options(&case.base, &case.folder.join("adapter"), &output);
        merge(&options).unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        compare(
            case,
            &output.join("model.safetensors"),
            &case.folder.join("merged.safetensors"),
        );
        met += 1;
    }
    assert!(met >= 39, "only {met} cases were found");
}
