//! Ways that look at single elements of changes, against the functions that define them.

use std::path::PathBuf;

use loratool::ops::combine::{Knobs, Majority, Options, RECIPES, Ranks};
use loratool::{Kind, Reason};

use crate::combine::{changes, combination, combine};
use crate::oracle;
use crate::support::fixture;

fn adapters() -> Vec<(PathBuf, f64)> {
    let folder = fixture("combine/peft/w_ties");
    let strengths = [0.7, 0.5, 0.4].into_iter().enumerate();
    strengths
        .map(|(index, by)| (folder.join(format!("a{index}")), by))
        .collect()
}

/// Options at full rank.
fn whole(adapters: &[(PathBuf, f64)], how: &str, knobs: Knobs, output: PathBuf) -> Options {
    Options {
        how: Some(how.to_owned()),
        ranks: Some(Ranks::Fixed(64)),
        knobs,
        ..combination(adapters, &output)
    }
}

#[test]
fn every_way_is_what_the_functions_of_peft_and_mergekit_make_of_the_changes() {
    let expected = oracle::read(&fixture("combine/changes.safetensors"));
    let density = |density| Knobs {
        density: Some(density),
        ..Knobs::default()
    };
    let frequency = Some(Majority::Frequency);
    let all = adapters();
    let equal: Vec<(PathBuf, f64)> = all.iter().map(|(path, _)| (path.clone(), 1.0)).collect();
    let two = vec![(all[0].0.clone(), 0.75), (all[1].0.clone(), 0.25)];
    let mut seen = 0;
    for (name, adapters, how, knobs) in [
        ("ties", &equal, "ties", density(0.3)),
        (
            "ties-frequency",
            &equal,
            "ties",
            Knobs {
                majority: frequency,
                ..density(0.3)
            },
        ),
        (
            "ties-normalize",
            &all,
            "ties",
            Knobs {
                normalize: true,
                ..density(0.3)
            },
        ),
        (
            "ties-frequency-normalize",
            &all,
            "ties",
            Knobs {
                normalize: true,
                majority: frequency,
                ..density(0.3)
            },
        ),
        ("magnitude-prune", &all, "magnitude-prune", density(0.3)),
        (
            "breadcrumbs",
            &all,
            "breadcrumbs",
            Knobs {
                gamma: Some(0.1),
                ..density(0.4)
            },
        ),
        ("median", &all, "median", Knobs::default()),
        ("slerp", &two, "slerp", Knobs::default()),
    ] {
        let room = tempfile::tempdir().unwrap();
        let output = room.path().join("out");
        combine(&whole(adapters, how, knobs, output.clone())).unwrap();
        let ours = changes(&output);
        for (key, wanted) in &expected {
            let Some(path) = key.strip_prefix(&format!("{name}/")) else {
                continue;
            };
            let wanted = wanted.values();
            let largest = wanted
                .iter()
                .fold(0.0f64, |most, value| most.max(value.abs()));
            for (a, b) in ours[path].iter().zip(&wanted) {
                assert!((a - b).abs() <= 2e-6 * largest, "{name}: {path}: {a} {b}");
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 16);
}

#[test]
fn what_is_drawn_depends_on_the_seed_alone() {
    let room = tempfile::tempdir().unwrap();
    let run = |how: &str, seed, threads, name: &str| {
        let output = room.path().join(name);
        let knobs = Knobs {
            density: Some(0.5),
            seed: Some(seed),
            ..Knobs::default()
        };
        let mut options = whole(&adapters(), how, knobs, output.clone());
        options.threads = Some(threads);
        options.conversion.force = true;
        combine(&options).unwrap();
        std::fs::read(output.join("adapter_model.safetensors")).unwrap()
    };
    for how in ["dare-linear", "dare-ties", "della"] {
        let first = run(how, 1, 1, "a");
        assert_eq!(first, run(how, 1, 3, "b"), "{how}");
        assert_ne!(first, run(how, 2, 1, "c"), "{how}");
    }
}

#[test]
fn elements_that_are_drawn_are_divided_by_their_probability() {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("out");
    let knobs = Knobs {
        density: Some(0.5),
        ..Knobs::default()
    };
    let one = vec![(adapters()[0].0.clone(), 1.0)];
    combine(&whole(&one, "dare-linear", knobs, output.clone())).unwrap();
    let (ours, before) = (changes(&output), changes(&one[0].0));
    let (mut kept, mut count) = (0, 0);
    for (path, values) in &ours {
        let largest = before[path]
            .iter()
            .fold(0.0f64, |most, value| most.max(value.abs()));
        for (value, old) in values.iter().zip(&before[path]) {
            let close = |wanted: f64| (value - wanted).abs() < 1e-5 * largest;
            assert!(close(0.0) || close(2.0 * old), "{path}: {value} of {old}");
            kept += usize::from(!close(0.0));
            count += 1;
        }
    }
    let share = kept as f64 / count as f64;
    assert!((share - 0.5).abs() < 0.05, "{share}");
}

#[test]
fn nothing_pruned_is_the_sum_and_lambda_multiplies_it() {
    let room = tempfile::tempdir().unwrap();
    let (ours, wanted) = (room.path().join("ours"), room.path().join("wanted"));
    combine(&combination(&adapters(), &wanted)).unwrap();
    let wanted = changes(&wanted);
    for (how, gamma) in [
        ("magnitude-prune", None),
        ("dare-linear", None),
        ("breadcrumbs", Some(0.0)),
    ] {
        let knobs = Knobs {
            density: Some(1.0),
            lambda: Some(-2.0),
            gamma,
            ..Knobs::default()
        };
        let mut options = whole(&adapters(), how, knobs, ours.clone());
        options.conversion.force = true;
        combine(&options).unwrap();
        for (path, values) in changes(&ours) {
            let largest = wanted[&path]
                .iter()
                .fold(0.0f64, |most, value| most.max(value.abs()));
            for (a, b) in values.iter().zip(&wanted[&path]) {
                assert!((a + 2.0 * b).abs() < 4e-6 * largest, "{how}: {path}");
            }
        }
    }
}

#[test]
fn each_way_takes_its_own_numbers_and_needs_a_rank() {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("out");
    let refused = |options: &Options, wanted: &str| {
        let error = combine(options).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error:?}");
        assert!(
            matches!(error.reason(), Reason::BadOption { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains(wanted), "{error:?}: {wanted}");
    };
    let density = Knobs {
        density: Some(0.5),
        ..Knobs::default()
    };
    for recipe in RECIPES.iter().skip(1) {
        let mut options = whole(
            &adapters()[..2],
            recipe.name,
            Knobs::default(),
            output.clone(),
        );
        options.ranks = None;
        let needs = !["median", "slerp"].contains(&recipe.name);
        refused(&options, if needs { "--density" } else { "--rank" });
        options.knobs = density;
        refused(&options, if needs { "--rank" } else { "--density" });
    }
    let mut linear = combination(&adapters(), &output);
    linear.knobs = density;
    refused(&linear, "--density");
    refused(
        &whole(&adapters(), "slerp", Knobs::default(), output.clone()),
        "two adapters",
    );
    let backwards = vec![
        (adapters()[0].0.clone(), 1.0),
        (adapters()[1].0.clone(), -0.5),
    ];
    refused(
        &whole(&backwards, "slerp", Knobs::default(), output.clone()),
        "not negative",
    );
    for number in [-0.1, 1.1, f64::NAN, 0.0] {
        let knobs = Knobs {
            density: Some(number),
            ..Knobs::default()
        };
        assert_eq!(
            combine(&whole(&adapters(), "ties", knobs, output.clone()))
                .unwrap_err()
                .kind(),
            Kind::Usage
        );
    }
    let knobs = Knobs {
        epsilon: Some(0.6),
        ..density
    };
    refused(
        &whole(&adapters(), "della", knobs, output.clone()),
        "probabilities",
    );
    refused(
        &whole(&adapters(), "votes", density, output.clone()),
        "breadcrumbs",
    );
    assert!(!output.exists());
}
