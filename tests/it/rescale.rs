//! An adapter times a number: merging it is merging the adapter with that strength.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::ops::convert::{self, Report};
use loratool::ops::merge::Control;
use loratool::ops::rescale::{By, Options, plan};
use loratool::{Error, Kind, Reason};
use safetensors::Dtype;
use serde_json::json;

use crate::goldens::{NOT_A_TARGET, cases};
use crate::oracle::{self, Stored};
use crate::support::{fixture, merge, options, write_adapter, write_base};

fn rescale(adapter: &Path, by: By, output: &Path) -> Result<Report, Error> {
    let conversion = convert::Options {
        adapter: adapter.to_owned(),
        output: output.to_owned(),
        ..convert::Options::default()
    };
    plan(&Options { conversion, by })?.run(&Control::default())
}

/// The values of a merge.
fn merged(base: &Path, adapter: &Path, strength: f64, output: &Path) -> oracle::Tensors {
    let mut options = options(base, adapter, output);
    options.adapters[0].strength = strength;
    options.force = true;
    let report = merge(&options).unwrap_or_else(|e| panic!("{}: {e}", adapter.display()));
    let files = report.files.iter();
    let files: Vec<PathBuf> = match output.is_dir() {
        true => files.map(|file| output.join(&file.name)).collect(),
        false => vec![output.to_owned()],
    };
    files.iter().flat_map(|file| oracle::read(file)).collect()
}

#[test]
fn merging_a_scaled_golden_of_peft_is_merging_it_with_that_strength() {
    let (mut to_the_bit, mut refused) = (0, Vec::new());
    for case in cases() {
        if NOT_A_TARGET.contains(&&*case.name) {
            continue;
        }
        let room = tempfile::tempdir().unwrap();
        for factor in [0.5, -0.3, 3.0] {
            let scaled = room.path().join(format!("scaled{factor}"));
            let report = match rescale(&case.folder.join("adapter"), By::Factor(factor), &scaled) {
                Ok(report) => report,
                Err(error) if matches!(error.reason(), Reason::NotScaled { .. }) => {
                    assert!(!error.cases().is_empty(), "{}", case.name);
                    refused.push(case.name.clone());
                    continue;
                }
                // What PEFT's own spelling cannot say is told as a conversion tells it.
                Err(error) if matches!(error.reason(), Reason::Losses { .. }) => continue,
                Err(error) => panic!("{}: {error}", case.name),
            };
            let output = room.path().join("out");
            let once = merged(&case.base, &scaled, 1.0, &output);
            let with_strength = merged(&case.base, &case.folder.join("adapter"), factor, &output);
            assert_eq!(
                once.keys().collect::<Vec<_>>(),
                with_strength.keys().collect::<Vec<_>>(),
                "{}",
                case.name
            );
            for (name, tensor) in &once {
                let other = &with_strength[name];
                if report.folded.is_empty() {
                    assert_eq!(
                        tensor.bits(),
                        other.bits(),
                        "{} {factor}: {name}",
                        case.name
                    );
                    to_the_bit += 1;
                } else {
                    for (a, b) in tensor.values().iter().zip(other.values()) {
                        let bound = 1e-5 * (1.0 + b.abs());
                        assert!((a - b).abs() <= bound, "{} {factor}: {name}", case.name);
                    }
                }
            }
        }
    }
    assert!(to_the_bit > 1000, "{to_the_bit}");
    refused.dedup();
    assert!(
        refused.iter().any(|name| name == "lora_dora"),
        "{refused:?}"
    );
    assert!(!refused.iter().any(|name| name == "lora"), "{refused:?}");
}

#[test]
fn in_every_format_a_scaled_adapter_merges_as_with_that_strength() {
    let (mut written, mut to_the_bit) = (BTreeSet::new(), 0);
    for target in convert::targets() {
        for (source, base, family) in crate::resize::origins() {
            let unet = fixture("lycoris/unet_attn/unet.safetensors");
            let base = base.unwrap_or(unet);
            let room = tempfile::tempdir().unwrap();
            let there = convert::Options {
                adapter: source,
                to: target.id().to_owned(),
                output: room.path().join("there"),
                base: Some(base.clone()),
                family: family.map(str::to_owned),
                ..convert::Options::default()
            };
            let Ok(plan_there) = convert::plan(&there) else {
                continue;
            };
            let alpha = plan_there.run(&Control::default()).unwrap().alpha;
            for factor in [0.5, -0.7] {
                let name = format!("{} {factor}", target.id());
                let mut conversion = there.clone();
                conversion.adapter = there.output.clone();
                conversion.to = String::new();
                conversion.output = room.path().join(format!("scaled{factor}"));
                conversion.read.alpha = alpha;
                let by = By::Factor(factor);
                let options = Options { conversion, by };
                let scaled = plan(&options).and_then(|plan| plan.run(&Control::default()));
                let scaled = match scaled {
                    Err(error) if matches!(error.reason(), Reason::NotScaled { .. }) => continue,
                    scaled => scaled.unwrap_or_else(|e| panic!("{name}: {e:?}")),
                };
                let values = |adapter: &Path, strength: f64, alpha: Option<f64>| {
                    let output = match base.is_dir() {
                        true => room.path().join("out"),
                        false => room.path().join("out.safetensors"),
                    };
                    let mut options = crate::support::options(&base, adapter, &output);
                    options.adapters[0].strength = strength;
                    options.read.alpha = alpha;
                    options.force = true;
                    merge(&options).unwrap_or_else(|e| panic!("{name}: {e:?}"));
                    match base.is_dir() {
                        true => oracle::read(&output.join("model.safetensors")),
                        false => oracle::read(&output),
                    }
                };
                let once = values(&options.conversion.output, 1.0, scaled.alpha);
                let wanted = values(&there.output, factor, alpha);
                for (tensor, value) in &once {
                    if scaled.folded.is_empty() {
                        assert_eq!(value.bits(), wanted[tensor].bits(), "{name}: {tensor}");
                        to_the_bit += 1;
                    }
                    let largest = value.values().iter().fold(0.0, |a: f64, b| a.max(b.abs()));
                    let close = |(a, b): (f64, f64)| (a - b).abs() <= 1e-2 * largest;
                    let pairs = value.values().into_iter().zip(wanted[tensor].values());
                    assert!(pairs.into_iter().all(close), "{name}: {tensor}");
                }
                written.insert(target.id());
            }
        }
    }
    assert!(to_the_bit > 1000, "{to_the_bit}");
    let missing = convert::targets().filter(|target| !written.contains(target.id()));
    let missing: Vec<&str> = missing.map(|target| target.id()).collect();
    // Control adapters of BFL replace norms, which no number scales.
    let no_strength = ["simo", "bfl", "textual-inversion", "webui-embedding"];
    assert_eq!(missing, no_strength);
}

#[test]
fn no_bit_of_a_factor_changes_where_the_format_keeps_a_scale() {
    let room = tempfile::tempdir().unwrap();
    let adapter = fixture("peft/cases/lora_patterns/adapter");
    rescale(&adapter, By::Factor(0.7), &room.path().join("out")).unwrap();
    let values = |folder: &Path| -> Vec<(String, Vec<u64>)> {
        let read = oracle::read(&folder.join("adapter_model.safetensors"));
        read.iter()
            .map(|(name, tensor)| (name.clone(), tensor.bits()))
            .collect()
    };
    assert_eq!(values(&adapter), values(&room.path().join("out")));
}

/// A file of kohya with one layer of rank 2.
fn kohya(folder: &Path, alpha: f64) -> PathBuf {
    let path = folder.join("kohya.safetensors");
    let layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
    let (down, up, key) = (
        format!("{layer}.lora_down.weight"),
        format!("{layer}.lora_up.weight"),
        format!("{layer}.alpha"),
    );
    crate::support::write_safetensors(
        &path,
        &[
            (
                &*down,
                Stored::of(
                    Dtype::F16,
                    &[2, 4],
                    &[0.5, -0.25, 1.0, 2.0, 0.125, 3.0, -1.0, 0.75],
                ),
            ),
            (
                &*up,
                Stored::of(
                    Dtype::F16,
                    &[4, 2],
                    &[1.0, 2.0, -3.0, 0.5, 0.25, -0.125, 4.0, 1.5],
                ),
            ),
            (&*key, Stored::of(Dtype::F16, &[], &[alpha])),
        ],
    );
    path
}

#[test]
fn the_alpha_of_a_file_of_kohya_is_set_and_a_sign_goes_into_the_up_factor() {
    let room = tempfile::tempdir().unwrap();
    let adapter = kohya(room.path(), 4.0);
    let before = oracle::read(&adapter);
    for (by, alpha, sign) in [
        (By::Alpha(1.0), 1.0, 1.0),
        (By::Alpha(-8.0), 8.0, -1.0),
        (By::Factor(-0.5), 2.0, -1.0),
    ] {
        let output = room.path().join(format!("{alpha}.safetensors"));
        let report = rescale(&adapter, by, &output).unwrap();
        assert!(report.folded.is_empty(), "{:?}", report.folded);
        let after = oracle::read(&output);
        assert_eq!(before.len(), after.len());
        for (name, tensor) in &after {
            let old = before[name].values();
            let wanted: Vec<f64> = match name.rsplit_once('.').map(|(_, end)| end) {
                Some("alpha") => vec![alpha],
                _ if name.contains("lora_up") => old.iter().map(|value| sign * value).collect(),
                _ => old,
            };
            assert_eq!(tensor.values(), wanted, "{by:?} {name}");
        }
    }
}

#[test]
fn what_is_not_chosen_stays_and_is_written_as_it_is() {
    let room = tempfile::tempdir().unwrap();
    let config =
        json!({"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["a", "b"]});
    let weight = Stored::of(Dtype::F32, &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let (base, adapter) = (room.path().join("base"), room.path().join("adapter"));
    write_base(
        &base,
        None,
        &[("a.weight", weight.clone()), ("b.weight", weight)],
    );
    let down = Stored::of(Dtype::F32, &[1, 2], &[1.0, -1.0]);
    let up = Stored::of(Dtype::F32, &[2, 1], &[0.5, 0.25]);
    write_adapter(
        &adapter,
        &config,
        &[
            ("base_model.model.a.lora_A.weight", down.clone()),
            ("base_model.model.a.lora_B.weight", up.clone()),
            ("base_model.model.b.lora_A.weight", down),
            ("base_model.model.b.lora_B.weight", up),
        ],
    );
    let conversion = convert::Options {
        adapter: adapter.clone(),
        output: room.path().join("out"),
        only: vec!["^a$".to_owned()],
        ..convert::Options::default()
    };
    let by = By::Factor(4.0);
    let run = |conversion| plan(&Options { conversion, by })?.run(&Control::default());
    run(conversion.clone()).unwrap();
    let ours = merged(&base, &conversion.output, 1.0, &room.path().join("merged"));
    assert_eq!(ours["a.weight"].values(), [5.0, -2.0, 5.0, 2.0]);
    assert_eq!(ours["b.weight"].values(), [2.0, 1.0, 3.5, 3.5]);
    let nothing = convert::Options {
        only: vec!["nowhere".to_owned()],
        output: room.path().join("none"),
        ..conversion
    };
    let error = run(nothing).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NothingSelected),
        "{error:?}"
    );
    assert!(!room.path().join("none").exists());
}

#[test]
fn whole_tensors_are_kept_and_that_is_told() {
    let room = tempfile::tempdir().unwrap();
    let adapter = fixture("peft/cases/lora_modules_to_save/adapter");
    let report = rescale(&adapter, By::Factor(2.0), &room.path().join("out")).unwrap();
    let told = report.notices.iter().map(|notice| notice.text.as_str());
    assert!(
        told.into_iter()
            .any(|text| text.contains("which are not scaled")),
        "{:?}",
        report.notices
    );
}

#[test]
fn numbers_that_mean_nothing_are_wrong_calls() {
    let room = tempfile::tempdir().unwrap();
    let adapter = fixture("peft/cases/lora/adapter");
    for number in [0.0, f64::NAN, f64::INFINITY] {
        for by in [By::Factor(number), By::Alpha(number)] {
            let error = rescale(&adapter, by, &room.path().join("out")).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{error:?}");
        }
    }
    assert_eq!(std::fs::read_dir(room.path()).unwrap().count(), 0);
}

#[test]
fn an_alpha_is_asked_of_modules_that_have_none() {
    let room = tempfile::tempdir().unwrap();
    let adapter = fixture("peft/cases/ia3/adapter");
    let error = rescale(&adapter, By::Alpha(8.0), &room.path().join("out")).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NotScaled { .. }),
        "{error:?}"
    );
    assert!(error.cases()[0].contains("no alpha"), "{:?}", error.cases());
    // A factor can be said.
    rescale(&adapter, By::Factor(0.5), &room.path().join("out")).unwrap();
    let file = TensorFile::open(room.path().join("out/adapter_model.safetensors")).unwrap();
    let types: Vec<Dtype> = file
        .directory
        .tensors
        .iter()
        .map(|tensor| tensor.dtype)
        .collect();
    assert!(types.iter().all(|dtype| *dtype == Dtype::F32), "{types:?}");
}
