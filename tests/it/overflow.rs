//! Values that are not finite: refused with their place, or allowed and counted; never left behind.

use std::path::{Path, PathBuf};

use loratool::notice::NoticeKind;
use loratool::ops::merge::Options;
use loratool::{Error, Kind, Reason};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::oracle::{self, Stored};
use crate::support::{merge, options, selection, write_adapter, write_base};

fn write(
    folder: &Path,
    config: Value,
    base: &[(&str, Stored)],
    adapter: &[(&str, Stored)],
) -> Options {
    write_base(&folder.join("base"), None, base);
    write_adapter(&folder.join("adapter"), &config, adapter);
    let output = folder.join("parent/out");
    std::fs::create_dir_all(folder.join("parent")).unwrap();
    options(&folder.join("base"), &folder.join("adapter"), &output)
}

fn single(shape: &[usize], values: &[f64]) -> Stored {
    Stored::of(Dtype::F32, shape, values)
}

fn rank_one() -> Value {
    json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
}

/// Refuses, and leaves the folder of the output as it was.
fn refused(options: &Options) -> Error {
    let parent = options.output.parent().unwrap();
    let entries = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(parent).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let before = entries();
    let error = merge(options).expect_err("it must be refused");
    assert_eq!(entries(), before, "left behind after {error}");
    error
}

fn merged(options: &Options, name: &str) -> Stored {
    oracle::read(&options.output.join("model.safetensors"))[name].clone()
}

/// A 3 × 4 weight in which a delta of 32 takes [1, 2] and [2, 0] over the edge of f16 and [0, 3] just not.
fn over_the_edge(folder: &Path) -> Options {
    let mut weight = vec![1.0; 12];
    weight[3] = 65472.0;
    weight[6] = 65504.0;
    weight[8] = 65504.0;
    let weight = Stored::of(Dtype::F16, &[3, 4], &weight);
    write(
        folder,
        rank_one(),
        &[
            ("first.weight", Stored::of(Dtype::F16, &[2], &[1.0; 2])),
            ("m.weight", weight),
        ],
        &[
            (
                "base_model.model.m.lora_A.weight",
                single(&[1, 4], &[32.0; 4]),
            ),
            (
                "base_model.model.m.lora_B.weight",
                single(&[3, 1], &[1.0; 3]),
            ),
        ],
    )
}

#[test]
fn an_overflow_is_refused_with_tensor_index_and_count() {
    let folder = tempfile::tempdir().unwrap();
    let error = refused(&over_the_edge(folder.path()));
    assert_eq!(error.kind(), Kind::NonFinite);
    assert_eq!(error.item(), Some("m.weight"));
    match error.reason() {
        Reason::ValuesNotFinite { count, first } => {
            assert_eq!((*count, first.as_str()), (2, "[1, 2]"));
        }
        _ => panic!("{error:?}"),
    }
}

#[test]
fn an_overflow_that_is_allowed_is_written_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = over_the_edge(folder.path());
    options.allow_nonfinite = true;
    let report = merge(&options).unwrap();
    assert_eq!(report.not_finite, 2);
    let infinite: Vec<usize> = merged(&options, "m.weight")
        .values()
        .iter()
        .enumerate()
        .filter(|(_, value)| **value == f64::INFINITY)
        .map(|(index, _)| index)
        .collect();
    assert_eq!(infinite, [6, 8]);
}

#[test]
fn a_wider_output_has_room_for_what_overflows() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = over_the_edge(folder.path());
    options.dtype = Some(loratool::tensor::Float::F32);
    assert_eq!(merge(&options).unwrap().not_finite, 0);
    assert_eq!(merged(&options, "m.weight").values()[6], 65536.0);
}

#[test]
fn the_count_is_that_of_the_whole_tensor_however_large() {
    // More than one chunk of the run; the first and the last element overflow.
    let folder = tempfile::tempdir().unwrap();
    let (rows, columns) = (4100, 1024);
    let mut bytes = vec![0; rows * columns * 2];
    bytes[0..2].copy_from_slice(&0x7bff_u16.to_le_bytes());
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&0x7bff_u16.to_le_bytes());
    let weight = Stored {
        dtype: Dtype::F16,
        shape: vec![rows, columns],
        bytes,
    };
    let options = write(
        folder.path(),
        rank_one(),
        &[("m.weight", weight)],
        &[
            (
                "base_model.model.m.lora_A.weight",
                single(&[1, columns], &vec![64.0; columns]),
            ),
            (
                "base_model.model.m.lora_B.weight",
                single(&[rows, 1], &vec![1.0; rows]),
            ),
        ],
    );
    let error = refused(&options);
    match error.reason() {
        Reason::ValuesNotFinite { count, first } => {
            assert_eq!((*count, first.as_str()), (2, "[0, 0]"));
        }
        _ => panic!("{error:?}"),
    }
}

#[test]
fn the_index_of_a_convolution_has_all_its_axes() {
    let folder = tempfile::tempdir().unwrap();
    let mut weight = vec![0.0; 2 * 3 * 2 * 2];
    weight[12 + 2 * 4 + 2] = 65504.0; // [1, 2, 1, 0]
    let options = write(
        folder.path(),
        rank_one(),
        &[("m.weight", Stored::of(Dtype::F16, &[2, 3, 2, 2], &weight))],
        &[
            (
                "base_model.model.m.lora_A.weight",
                single(&[1, 3, 2, 2], &[100.0; 12]),
            ),
            (
                "base_model.model.m.lora_B.weight",
                single(&[2, 1, 1, 1], &[1.0; 2]),
            ),
        ],
    );
    let error = refused(&options);
    assert!(error.to_string().contains("[1, 2, 1, 0]"), "{error}");
}

#[test]
fn factors_that_are_not_finite_are_refused_before_anything_is_written() {
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for dtype in [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16] {
            let folder = tempfile::tempdir().unwrap();
            let up = Stored::of(dtype, &[3, 1], &[1.0, odd, odd]);
            let mut options = write(
                folder.path(),
                rank_one(),
                &[("m.weight", single(&[3, 2], &[1.0; 6]))],
                &[
                    (
                        "base_model.model.m.lora_A.weight",
                        single(&[1, 2], &[1.0; 2]),
                    ),
                    ("base_model.model.m.lora_B.weight", up),
                ],
            );
            let error = refused(&options);
            assert!(
                matches!(error.reason(), Reason::FactorNotFinite { count: 2 }),
                "{error}"
            );
            assert_eq!(error.item(), Some("base_model.model.m.lora_B.weight"));
            let planned = loratool::ops::merge::plan(&options);
            assert!(planned.is_err(), "the plan alone finds it");
            options.allow_nonfinite = true;
            let report = merge(&options).unwrap();
            assert_eq!(report.not_finite, 4, "{odd} in {dtype}");
            let noticed = |notice: &loratool::notice::Notice| notice.kind == NoticeKind::NotFinite;
            assert!(report.notices.iter().any(noticed));
        }
    }
}

#[test]
fn a_nan_that_arithmetic_makes_is_the_same_on_every_machine() {
    // ∞ − ∞: x86 gives a NaN with the sign set, ARM one without.
    for dtype in [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16] {
        let folder = tempfile::tempdir().unwrap();
        let wide = |shape: &[usize], value: f64| Stored::of(Dtype::F64, shape, &[value]);
        let mut options = write(
            folder.path(),
            rank_one(),
            &[("m.weight", Stored::of(dtype, &[1, 1], &[1.0]))],
            &[
                ("base_model.model.m.lora_A.weight", wide(&[1, 1], 1e300)),
                ("base_model.model.m.lora_B.weight", wide(&[1, 1], 1e300)),
            ],
        );
        let path = options.adapters[0].path.clone();
        options.adapters.push(selection(&path, -1.0));
        options.allow_nonfinite = true;
        merge(&options).unwrap();
        let nan = oracle::round(dtype, f64::NAN);
        assert_eq!(merged(&options, "m.weight").bits(), [nan], "{dtype}");
    }
}

#[test]
fn a_norm_of_zero_is_refused_unless_the_strength_is_zero() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = write(
        folder.path(),
        json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_dora": true}),
        // The second row is zero and stays zero: its direction is 0 / 0.
        &[("m.weight", single(&[2, 2], &[1.0, 2.0, 0.0, 0.0]))],
        &[
            (
                "base_model.model.m.lora_A.weight",
                single(&[1, 2], &[1.0; 2]),
            ),
            (
                "base_model.model.m.lora_B.weight",
                single(&[2, 1], &[1.0, 0.0]),
            ),
            (
                "base_model.model.m.lora_magnitude_vector",
                single(&[2], &[1.0; 2]),
            ),
        ],
    );
    let error = refused(&options);
    match error.reason() {
        Reason::ValuesNotFinite { count, first } => {
            assert_eq!((*count, first.as_str()), (2, "[1, 0]"));
        }
        _ => panic!("{error:?}"),
    }
    options.adapters[0].strength = 0.0;
    merge(&options).unwrap();
    assert_eq!(merged(&options, "m.weight").values(), [1.0, 2.0, 0.0, 0.0]);
}

#[test]
fn what_is_not_finite_in_the_base_keeps_its_bits_with_a_notice() {
    for dtype in [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16] {
        let folder = tempfile::tempdir().unwrap();
        let infinity = oracle::infinity(dtype);
        let sign = 1u64 << (dtype.bitsize() - 1);
        let odd = [infinity, infinity | sign, infinity + 1, infinity | sign | 3];
        let one = oracle::round(dtype, 1.0);
        let weight = Stored::of_bits(dtype, &[2, 3], &[odd[0], one, odd[1], odd[2], odd[3], one]);
        let options = write(
            folder.path(),
            rank_one(),
            &[
                ("m.weight", weight),
                (
                    "untouched.weight",
                    Stored::of_bits(dtype, &[1], &[infinity]),
                ),
            ],
            &[
                (
                    "base_model.model.m.lora_A.weight",
                    single(&[1, 3], &[1.0; 3]),
                ),
                (
                    "base_model.model.m.lora_B.weight",
                    single(&[2, 1], &[1.0; 2]),
                ),
            ],
        );
        let report = merge(&options).unwrap();
        let two = oracle::round(dtype, 2.0);
        assert_eq!(
            merged(&options, "m.weight").bits(),
            [odd[0], two, odd[1], odd[2], odd[3], two],
            "{dtype}"
        );
        assert_eq!(report.not_finite, 0);
        let notices: Vec<_> = report
            .notices
            .iter()
            .filter(|notice| notice.kind == NoticeKind::BaseNotFinite)
            .collect();
        // Only the tensor that is touched was looked at.
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert_eq!(notices[0].item.as_deref(), Some("m.weight"));
        assert!(notices[0].text.starts_with("4 values"), "{}", notices[0]);
    }
}

#[test]
fn a_refusal_leaves_an_existing_output_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = over_the_edge(folder.path());
    write_base(
        &options.output,
        None,
        &[("old.weight", single(&[1], &[7.0]))],
    );
    options.force = true;
    let before = std::fs::read(options.output.join("model.safetensors")).unwrap();
    refused(&options);
    let after = std::fs::read(options.output.join("model.safetensors")).unwrap();
    assert_eq!(before, after);
}

#[test]
fn a_shape_that_overflows_behind_a_zero_is_malformed() {
    let folder = tempfile::tempdir().unwrap();
    let huge = 1 << 40;
    let empty = |shape: &[usize]| Stored {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: Vec::new(),
    };
    for (down, other) in [([0, huge, huge], [0, 1, 1]), ([0, 1, 1], [0, huge, huge])] {
        let options = write(
            folder.path(),
            rank_one(),
            &[("m.weight", empty(&[0, 1])), ("n.weight", empty(&other))],
            &[
                ("base_model.model.m.lora_A.weight", empty(&down)),
                ("base_model.model.m.lora_B.weight", empty(&[0, 0, 1])),
            ],
        );
        let error = refused(&options);
        assert!(
            matches!(error.reason(), Reason::ShapeOverflow { .. }),
            "{error:?}"
        );
    }
}

#[test]
fn layers_without_rows_or_columns_and_factors_without_a_rank_are_merged() {
    let config =
        |dora: bool| json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_dora": dora});
    for (outputs, inputs, rank) in [(0, 3, 2), (3, 0, 2), (2, 3, 0), (0, 0, 0)] {
        for (dora, embedding) in [(false, false), (false, true), (true, true)] {
            let folder = tempfile::tempdir().unwrap();
            let zeros = |shape: &[usize]| single(shape, &vec![1.5; shape.iter().product()]);
            let (a, b, shape) = match embedding {
                true => ("lora_embedding_A", "lora_embedding_B", [inputs, outputs]),
                false => ("lora_A.weight", "lora_B.weight", [outputs, inputs]),
            };
            let key = |tail: &str| format!("base_model.model.m.{tail}");
            let (a, b, norm) = (key(a), key(b), key("lora_magnitude_vector"));
            let mut tensors = vec![
                (a.as_str(), zeros(&[rank, inputs])),
                (b.as_str(), zeros(&[outputs, rank])),
            ];
            if dora {
                tensors.push((norm.as_str(), zeros(&[outputs])));
            }
            let options = write(
                folder.path(),
                config(dora),
                &[("m.weight", zeros(&shape)), ("other.weight", zeros(&[1]))],
                &tensors,
            );
            merge(&options).unwrap();
            let merged = merged(&options, "m.weight");
            if dora && outputs > 0 && inputs > 0 {
                // W' = m · W / ‖W‖ per output.
                let norm = (inputs as f64 * 2.25).sqrt();
                let expected = single(&shape, &vec![1.5 / norm * 1.5; outputs * inputs]);
                assert_eq!(merged, expected);
            } else {
                assert_eq!(merged, zeros(&shape));
            }
        }
    }
}
