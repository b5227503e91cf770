//! The numbers of PEFT's `add_weighted_adapter` and sd-scripts' `merge_lora`, as these tools computed them.

use std::path::{Path, PathBuf};

use loratool::Reason;
use loratool::notice::NoticeKind;
use loratool::ops::combine::{Knobs, Majority, Options, Ranks};
use serde_json::json;

use crate::combine::{assert_close, cases, changes, combination, combine};
use crate::oracle;
use crate::support::fixture;

#[test]
fn every_case_of_peft_without_random_numbers_is_reproduced() {
    let (mut factors, mut products) = (0, 0);
    for case in cases() {
        let room = tempfile::tempdir().unwrap();
        let output = room.path().join("out");
        let args = &case.case["args"];
        let how = args["combination_type"].as_str().unwrap();
        let mut options = combination(&case.adapters, &output);
        options.compat = Some("peft".to_owned());
        options.how = Some(how.to_owned());
        options.ranks = args["svd_rank"]
            .as_u64()
            .map(|rank| Ranks::Fixed(rank as usize));
        options.knobs = Knobs {
            density: args["density"].as_f64(),
            majority: (args["majority_sign_method"] == "frequency").then_some(Majority::Frequency),
            ..Knobs::default()
        };
        let result = combine(&options);
        if case.case["needs_torch_rng"] == true {
            let error = result.unwrap_err();
            assert!(
                matches!(error.reason(), Reason::BadOption { .. }),
                "{error:?}"
            );
            continue;
        }
        if case.name == "w_linear_dora" {
            assert!(matches!(
                result.unwrap_err().reason(),
                Reason::NotCombined { .. }
            ));
            continue;
        }
        result.unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        let theirs = case.folder.join("comb");
        assert_close(&changes(&output), &changes(&theirs), 1e-5, &case.name);
        products += 1;
        if how.ends_with("svd") && case.adapters.len() > 1 {
            continue;
        }
        let read = |folder: &Path| oracle::read(&folder.join("adapter_model.safetensors"));
        let (ours, theirs) = (read(&output), read(&theirs));
        assert_eq!(
            ours.keys().collect::<Vec<_>>(),
            theirs.keys().collect::<Vec<_>>(),
            "{}",
            case.name
        );
        for (name, tensor) in &theirs {
            assert_eq!(ours[name].shape, tensor.shape, "{}: {name}", case.name);
            for (a, b) in ours[name].values().iter().zip(tensor.values()) {
                assert!(
                    (a - b).abs() <= 1e-6 * (1.0 + b.abs()),
                    "{}: {name}: {a} {b}",
                    case.name
                );
            }
        }
        factors += 1;
    }
    assert_eq!((products, factors), (20, 13));
}

#[test]
fn what_is_wrong_with_the_numbers_of_a_tool_is_told() {
    let room = tempfile::tempdir().unwrap();
    let case = cases()
        .into_iter()
        .find(|case| case.name == "w_linear")
        .unwrap();
    let told = |options: &Options| -> Vec<String> {
        let report = combine(options).unwrap();
        let told = report
            .notices
            .into_iter()
            .filter(|notice| notice.kind == NoticeKind::KnownWrong);
        told.map(|notice| notice.text).collect()
    };
    let mut options = combination(&case.adapters, &room.path().join("out"));
    options.conversion.force = true;
    assert!(told(&options).is_empty());
    options.compat = Some("peft".to_owned());
    let texts = told(&options);
    assert!(
        texts.len() == 1 && texts[0].contains("twice the adapter"),
        "{texts:?}"
    );
    options.how = Some("cat".to_owned());
    assert!(told(&options).is_empty());
    options.compat = Some("kohya".to_owned());
    options.how = None;
    let texts = told(&options);
    assert!(
        texts.iter().any(|text| text.contains("square")),
        "{texts:?}"
    );
}

#[test]
fn root_scales_give_the_result_of_peft_the_root_of_its_rank() {
    let room = tempfile::tempdir().unwrap();
    let adapter = fixture("peft/cases/lora_rslora/adapter");
    let output = room.path().join("out");
    let mut options = combination(&[(adapter.clone(), 0.5), (adapter, 0.5)], &output);
    combine(&options).unwrap();
    let right = changes(&output);
    options.compat = Some("peft".to_owned());
    options.how = Some("cat".to_owned());
    options.conversion.force = true;
    let report = combine(&options).unwrap();
    let config = oracle::json(&output.join("adapter_config.json"));
    assert_eq!(config["use_rslora"], json!(true));
    let rank = config["r"].as_f64().unwrap();
    let ours = changes(&output);
    for (path, values) in &right {
        for (a, b) in ours[path].iter().zip(values) {
            assert!(
                (a - rank.sqrt() * b).abs() < 1e-5 * (1.0 + a.abs()),
                "{path}: {a} {b}"
            );
        }
    }
    assert!(
        report
            .notices
            .iter()
            .any(|notice| notice.text.contains("too strong"))
    );
}

#[test]
fn the_numbers_of_sd_scripts_are_reproduced() {
    let room = tempfile::tempdir().unwrap();
    let file = |name: &str| fixture(&format!("combine/kohya/{name}.safetensors"));
    let all: Vec<(PathBuf, f64)> = vec![(file("a"), 0.7), (file("b"), -0.4), (file("c"), 1.3)];
    for (how, count) in [("linear", 2), ("concat", 3)] {
        let output = room.path().join(format!("{how}.safetensors"));
        let mut options = combination(&all[..count], &output);
        options.compat = Some("kohya".to_owned());
        options.how = Some(how.to_owned());
        combine(&options).unwrap();
        let (ours, theirs) = (oracle::read(&output), oracle::read(&file(how)));
        assert_eq!(
            ours.keys().collect::<Vec<_>>(),
            theirs.keys().collect::<Vec<_>>()
        );
        for (name, tensor) in &theirs {
            assert_eq!(ours[name].shape, tensor.shape, "{how}: {name}");
            for (a, b) in ours[name].values().iter().zip(tensor.values()) {
                assert!(
                    (a - b).abs() <= 1e-6 * (1.0 + b.abs()),
                    "{how}: {name}: {a} {b}"
                );
            }
        }
    }
    let mut options = combination(&all, &room.path().join("none.safetensors"));
    options.compat = Some("kohya".to_owned());
    let error = combine(&options).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NotCombined { .. }),
        "{error:?}"
    );
    assert!(
        error.cases()[0].contains("--how concat"),
        "{:?}",
        error.cases()
    );
}

#[test]
fn a_tool_takes_its_own_ways_and_numbers() {
    let room = tempfile::tempdir().unwrap();
    let case = cases()
        .into_iter()
        .find(|case| case.name == "w_cat")
        .unwrap();
    let with = |compat: &str, how: &str, ranks, knobs| {
        let mut options = combination(&case.adapters, &room.path().join("out"));
        (options.compat, options.how) = (Some(compat.to_owned()), Some(how.to_owned()));
        (options.ranks, options.knobs) = (ranks, knobs);
        let error = combine(&options).unwrap_err();
        assert!(
            matches!(error.reason(), Reason::BadOption { .. }),
            "{error:?}"
        );
        error.to_string()
    };
    let none = Knobs::default();
    let lambda = Knobs {
        lambda: Some(2.0),
        ..none
    };
    assert!(with("peft", "breadcrumbs", None, none).contains("magnitude_prune_svd"));
    assert!(with("peft", "dare_ties", None, none).contains("ties_svd"));
    assert!(with("somebody", "linear", None, none).contains("kohya"));
    assert!(with("peft", "linear", Some(Ranks::Fixed(3)), none).contains("no rank"));
    assert!(with("peft", "svd", Some(Ranks::Energy(0.9)), none).contains("--rank alone"));
    assert!(with("peft", "ties", None, none).contains("--density"));
    assert!(with("kohya", "linear", None, lambda).contains("--lambda"));
}
