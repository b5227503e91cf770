//! Decompositions on devices: as good as on the processor, the same bits every time, and nothing where a device fails.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use loratool::linalg::dense::ALGEBRAS;
use loratool::linalg::device::{Choice, Device};
use loratool::ops::combine::{self, Knobs};
use loratool::ops::device::DeviceReport;
use loratool::ops::extract::{self, Options, Proved, Ranks, plan};
use loratool::ops::merge::Control;
use loratool::ops::resize;
use loratool::{Error, Reason};
use ndarray::Array2;
use safetensors::Dtype;
use tempfile::TempDir;

use crate::combine::{assert_close, changes, combination};
use crate::devices_support::{Twisted, automatic, devices, faulty};
use crate::oracle::Stored;
use crate::resize::by;
use crate::support::{Random, fixture, write_safetensors};

/// Layers whose smaller side is large enough for a Krylov space: as tall as wide, tall, and wide.
const LAYERS: &[(&str, [usize; 2])] = &[
    ("model.layers.0.self_attn.q_proj.weight", [150, 150]),
    ("model.layers.0.self_attn.k_proj.weight", [170, 130]),
    ("model.layers.0.mlp.up_proj.weight", [130, 210]),
];

const RANK: usize = 6;

/// A base and what was tuned from it; with the differences, as the files have them.
fn pair(folder: &Path, layers: &[(&'static str, [usize; 2])]) -> (Options, Vec<Array2<f64>>) {
    let mut random = Random(11);
    let (mut base, mut tuned, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    for (name, shape) in layers {
        let [rows, columns] = *shape;
        let of = |random: &mut Random, rows, columns| {
            Array2::from_shape_vec((rows, columns), random.floats(rows * columns)).unwrap()
        };
        let old = of(&mut random, rows, columns);
        let mut left = of(&mut random, rows, 12);
        for (index, mut column) in left.columns_mut().into_iter().enumerate() {
            column *= 0.3 / (index + 1) as f64;
        }
        let change = left.dot(&of(&mut random, 12, columns));
        let new = &old + &change + 0.05 * of(&mut random, rows, columns);
        let stored = [&old, &new].map(|values| {
            let values: Vec<f64> = values.iter().copied().collect();
            Stored::of(Dtype::F32, shape, &values)
        });
        let [old, new] = stored
            .each_ref()
            .map(|stored| Array2::from_shape_vec((rows, columns), stored.values()).unwrap());
        differences.push(new - old);
        let [old, new] = stored;
        base.push((*name, old));
        tuned.push((*name, new));
    }
    write_safetensors(&folder.join("base.safetensors"), &base);
    write_safetensors(&folder.join("tuned.safetensors"), &tuned);
    let options = Options {
        base: folder.join("base.safetensors"),
        tuned: folder.join("tuned.safetensors"),
        output: folder.join("out"),
        ranks: Ranks::Fixed(RANK),
        ..Options::default()
    };
    (options, differences)
}

fn extract(options: &Options) -> Result<extract::Report, Error> {
    plan(options)?.run(&Control::default())
}

fn on(device: &Device) -> Option<Choice> {
    Some(Choice::of(device.clone()))
}

/// Names in a folder; the lock of an output stays.
fn entries(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.ends_with("-lock")).collect()
}

/// Whether a report names a device, for a reason.
fn assert_told(told: Option<&DeviceReport>, device: &str, reason: &str) {
    let told = told.expect("a device was asked for");
    assert_eq!((&*told.device, &*told.reason), (device, reason));
}

#[test]
fn an_extraction_on_a_device_is_as_near_to_the_best() {
    for device in devices() {
        for tolerance in [Some(1e-3), None] {
            let folder = TempDir::new().unwrap();
            let (options, differences) = pair(folder.path(), LAYERS);
            let report = extract(&Options {
                device: on(&device),
                tolerance,
                ..options.clone()
            });
            let report = report.unwrap_or_else(|e| panic!("{device:?}: {e}"));
            assert_told(report.device.as_ref(), device.name(), "asked for");
            assert_eq!(report.modules.len(), LAYERS.len());
            for module in &report.modules {
                let what = format!("{device:?}, {}, {tolerance:?}", module.path);
                let index = LAYERS
                    .iter()
                    .position(|(name, _)| name.starts_with(&module.path));
                let difference = &differences[index.expect("it is a layer")];
                let square: f64 = difference.iter().map(|value| value * value).sum();
                assert!(
                    (module.norm - square.sqrt()).abs() <= 1e-9 * square.sqrt(),
                    "{what}"
                );
                let values = ALGEBRAS[0].thin_svd(difference.view()).unwrap().s;
                let best: f64 = values.iter().skip(RANK).map(|value| value * value).sum();
                let best = (best / square).sqrt();
                assert!(module.residual >= best - 1e-7, "{what}");
                let excess = module.residual / best - 1.0;
                match tolerance {
                    Some(tolerance) => {
                        assert_eq!(module.proof, Proved::Within, "{what}");
                        let proved = module.excess.expect("it is proved");
                        assert!(proved <= tolerance, "{what}: {proved}");
                        assert!(excess <= proved + 1e-6, "{what}: {excess} {proved}");
                    }
                    None => assert!(excess < 0.05, "{what}: {excess}"),
                }
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_what_a_device_makes() {
    for device in devices() {
        let folder = TempDir::new().unwrap();
        let (options, _) = pair(folder.path(), LAYERS);
        let bytes = |threads: usize| {
            let output = folder.path().join(threads.to_string());
            extract(&Options {
                output: output.clone(),
                threads: Some(threads),
                device: on(&device),
                ..options.clone()
            })
            .unwrap();
            std::fs::read(output.join("adapter_model.safetensors")).unwrap()
        };
        let one = bytes(1);
        for threads in [2, 3, 2] {
            std::fs::remove_dir_all(folder.path().join("2")).ok();
            assert!(bytes(threads) == one, "{device:?}: {threads} threads");
        }
    }
}

#[test]
fn a_device_that_the_environment_makes_round_more_is_refused() {
    let named = |name: &str| {
        let lane = Twisted::of(ALGEBRAS[0]);
        Device::new(name, vec![Box::new(lane)])
    };
    let shortens = |name: &str| name == "NVIDIA_TF32_OVERRIDE";
    for name in ["cuda", "cuda:1"] {
        let choice = || Choice::of(named(name));
        assert!(choice().checked(|_| false).unwrap().device.is_some());
        let error = choice().checked(shortens).unwrap_err();
        assert!(matches!(error.reason(), Reason::NoDevice { device, .. } if device == name));
        assert_eq!(error.hint(), Some("run it with NVIDIA_TF32_OVERRIDE=0"));
        let choice = automatic(Some(named(name))).checked(shortens).unwrap();
        assert!(choice.device.is_none());
        assert!(
            choice.reason.contains("NVIDIA_TF32_OVERRIDE"),
            "{}",
            choice.reason
        );
    }
    for name in ["metal", "candle-cpu", "faulty"] {
        let choice = Choice::of(named(name)).checked(|_| true).unwrap();
        assert!(choice.device.is_some(), "{name}");
    }
}

#[test]
fn without_a_device_a_report_says_nothing_of_any() {
    let folder = TempDir::new().unwrap();
    let (options, _) = pair(folder.path(), &LAYERS[..1]);
    let report = serde_json::to_value(extract(&options).unwrap()).unwrap();
    assert!(report.get("device").is_none(), "{report}");
}

/// Something that runs on a device and writes into a folder.
type Run<'a> = Box<dyn Fn(&Device) -> Result<Option<DeviceReport>, Error> + 'a>;

/// Each command that decomposes, with its output.
fn runs<'a>(folder: &'a Path, options: &'a Options) -> Vec<(&'static str, PathBuf, Run<'a>)> {
    let ties = fixture("combine/peft/w_ties");
    let adapters = [(ties.join("a0"), 0.7), (ties.join("a1"), 0.5)];
    let combined = move |output: &Path, how: Option<&str>| combine::Options {
        how: how.map(str::to_owned),
        ranks: Some(combine::Ranks::Fixed(3)),
        knobs: Knobs {
            density: how.map(|_| 0.3),
            ..Knobs::default()
        },
        ..combination(&adapters, output)
    };
    let forced = |output: &Path| loratool::ops::convert::Options {
        force: true,
        ..by(&ties.join("a0"), resize::Ranks::Fixed(2), output).conversion
    };
    let (extracted, resized) = (folder.join("extracted"), folder.join("resized"));
    let (changed, summed) = (folder.join("changed"), folder.join("summed"));
    let conversion = forced(&resized);
    let on_changes = combined(&changed, Some("ties"));
    let by_factors = combined(&summed, None);
    let combination = |options: combine::Options| -> Run<'a> {
        Box::new(move |device| {
            let mut options = options.clone();
            options.device = on(device);
            options.conversion.force = true;
            let report = combine::plan(&options)?.run(&Control::default())?;
            Ok(report.device)
        })
    };
    let output = extracted.clone();
    let extraction: Run<'a> = Box::new(move |device| {
        let report = extract(&Options {
            output: output.clone(),
            device: on(device),
            force: true,
            ..options.clone()
        })?;
        Ok(report.device)
    });
    let resizing: Run<'a> = Box::new(move |device| {
        let options = resize::Options {
            conversion: conversion.clone(),
            device: on(device),
            ..by(Path::new(""), resize::Ranks::Fixed(2), Path::new(""))
        };
        let plan = resize::plan(&options, &Control::default())?;
        Ok(plan.run(&Control::default())?.device)
    });
    vec![
        ("extract", extracted, extraction),
        ("resize", resized, resizing),
        ("combine --how ties", changed, combination(on_changes)),
        ("combine --rank", summed, combination(by_factors)),
    ]
}

#[test]
fn a_device_that_fails_on_the_way_is_the_error_and_nothing_is_written() {
    let folder = TempDir::new().unwrap();
    let (options, _) = pair(folder.path(), &LAYERS[1..2]);
    for (what, output, run) in runs(folder.path(), &options) {
        let (device, products) = faulty(usize::MAX);
        let told = run(&device).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_told(told.as_ref(), "faulty", "asked for");
        let count = products.load(Ordering::Relaxed);
        assert!(count > 2, "{what}: {count} products");
        let file = output.join("adapter_model.safetensors");
        let written = std::fs::read(&file).unwrap();
        let before = entries(folder.path());
        for is_there in [true, false] {
            if !is_there {
                std::fs::remove_dir_all(&output).unwrap();
            }
            for fails_at in [0, 1, count / 2, count - 1] {
                let what = format!("{what} fails at product {fails_at} of {count}");
                let error = run(&faulty(fails_at).0).expect_err(&what);
                let is_it = matches!(error.reason(), Reason::DeviceFailed { device, .. } if device == "faulty");
                assert!(is_it, "{what}: {error}");
                assert_eq!(error.kind().exit_code(), 3, "{what}");
                assert!(
                    error
                        .hint()
                        .is_some_and(|hint| hint.contains("--device cpu"))
                );
                match is_there {
                    true => {
                        assert!(std::fs::read(&file).unwrap() == written, "{what}");
                        assert_eq!(entries(folder.path()), before, "{what}");
                    }
                    false => assert!(!output.exists(), "{what}"),
                }
            }
        }
    }
}

#[test]
fn resizing_on_a_device_is_resizing() {
    let folder = TempDir::new().unwrap();
    let adapter = fixture("peft/cases/lora_all_linear/adapter");
    let resized = |name: &str, device: Option<Choice>| {
        let output = folder.path().join(name);
        let options = resize::Options {
            device,
            ..by(&adapter, resize::Ranks::Energy(0.7), &output)
        };
        let plan = resize::plan(&options, &Control::default()).unwrap();
        (
            plan.run(&Control::default()).unwrap(),
            changes(&output),
            std::fs::read(output.join("adapter_model.safetensors")).unwrap(),
        )
    };
    let (expected, known, bytes) = resized("processor", None);
    assert!(expected.device.is_none());
    for device in devices() {
        let (report, found, _) = resized(device.name(), on(&device));
        assert_told(report.device.as_ref(), device.name(), "asked for");
        assert_close(&found, &known, 2e-6, device.name());
        for (a, b) in report.resized.iter().zip(&expected.resized) {
            assert_eq!((&a.path, a.rank), (&b.path, b.rank));
            assert!((a.residual - b.residual).abs() < 1e-6, "{}", a.path);
        }
    }
    // By factors nothing gains.
    let (device, products) = faulty(usize::MAX);
    let (report, _, same) = resized("automatic", Some(automatic(Some(device))));
    let why = "products of factors are too small to gain by it";
    assert_told(report.device.as_ref(), "cpu", why);
    assert_eq!(products.load(Ordering::Relaxed), 0);
    assert!(same == bytes);
}

#[test]
fn combining_on_a_device_is_combining() {
    let folder = TempDir::new().unwrap();
    let ties = fixture("combine/peft/w_ties");
    let adapters = [(ties.join("a0"), 0.7), (ties.join("a1"), 0.5)];
    for (how, density, compat) in [
        (None, None, None),
        (Some("ties"), Some(0.3), None),
        (Some("svd"), None, Some("peft")),
    ] {
        let combined = |name: &str, device: Option<Choice>, threads: usize| {
            let output = folder.path().join(format!("{name}-{how:?}-{threads}"));
            let options = combine::Options {
                how: how.map(str::to_owned),
                compat: compat.map(str::to_owned),
                ranks: Some(combine::Ranks::Fixed(3)),
                knobs: Knobs {
                    density,
                    ..Knobs::default()
                },
                device,
                threads: Some(threads),
                ..combination(&adapters, &output)
            };
            let plan = combine::plan(&options).unwrap();
            let report = plan.run(&Control::default()).unwrap();
            let bytes = std::fs::read(output.join("adapter_model.safetensors")).unwrap();
            (report, changes(&output), bytes)
        };
        let (expected, known, same) = combined("processor", None, 2);
        assert!(expected.device.is_none());
        for device in devices() {
            let what = format!("{how:?} on {device:?}");
            let (report, found, bytes) = combined(device.name(), on(&device), 2);
            assert_told(report.device.as_ref(), device.name(), "asked for");
            assert_close(&found, &known, 2e-6, &what);
            match (report.residual, expected.residual) {
                (Some(a), Some(b)) => assert!((a - b).abs() < 1e-6, "{what}: {a} {b}"),
                (a, b) => assert_eq!(a, b, "{what}"),
            }
            for threads in [1, 3] {
                let (.., again) = combined(device.name(), on(&device), threads);
                assert!(again == bytes, "{what}: {threads} threads");
            }
        }
        let (device, products) = faulty(usize::MAX);
        let (report, _, bytes) = combined("automatic", Some(automatic(Some(device))), 2);
        let why = match how {
            Some("ties") => "no layer is large enough to gain by it",
            _ => "this way has no products that gain by it",
        };
        assert_told(report.device.as_ref(), "cpu", why);
        assert_eq!(products.load(Ordering::Relaxed), 0);
        assert!(bytes == same, "{how:?}");
    }
}

#[test]
fn automatically_large_layers_are_on_the_device_and_small_ones_are_not() {
    let large = ("model.layers.1.mlp.up_proj.weight", [1024, 1024]);
    let few = "all singular values are asked for, which takes few products";
    let small = "no layer is large enough to gain by it";
    for (layers, exact, used, name, reason) in [
        (
            &[LAYERS[0], large][..],
            false,
            true,
            "faulty",
            "as the test has it",
        ),
        (&[LAYERS[0], LAYERS[1]], false, false, "cpu", small),
        (&[LAYERS[0], LAYERS[1]], true, false, "cpu", few),
    ] {
        let folder = TempDir::new().unwrap();
        let (options, _) = pair(folder.path(), layers);
        let run = |device: Option<Choice>, output: &str, only: &[&str]| {
            let report = extract(&Options {
                device,
                exact,
                output: folder.path().join(output),
                only: only.iter().map(|only| (*only).to_owned()).collect(),
                ..options.clone()
            });
            report.unwrap()
        };
        let (device, products) = faulty(usize::MAX);
        let report = run(Some(automatic(Some(device))), "all", &[]);
        assert_told(report.device.as_ref(), name, reason);
        assert_eq!(products.load(Ordering::Relaxed) > 0, used);
        // The small ones are not on it even beside a large one.
        let (device, products) = faulty(usize::MAX);
        let alone = run(Some(automatic(Some(device))), "small", &["layers.0"]);
        assert_eq!(products.load(Ordering::Relaxed), 0);
        let plain = run(None, "plain", &["layers.0"]);
        for (a, b) in alone.modules.iter().zip(&plain.modules) {
            assert_eq!(a.singular_values, b.singular_values);
        }
        let beside = report
            .modules
            .iter()
            .find(|module| module.path == plain.modules[0].path);
        assert_eq!(
            beside.unwrap().singular_values,
            plain.modules[0].singular_values
        );
        // Where none opened that is what is told.
        let none = run(Some(automatic(None)), "none", &["layers.0"]);
        assert_told(none.device.as_ref(), "cpu", "as the test has it");
    }
}

#[cfg(feature = "cli")]
mod program {
    use std::process::Output;

    use loratool::linalg::device::KINDS;
    use serde_json::Value;

    use super::*;
    use crate::support::{program, text};

    /// Each command that decomposes, on small adapters and checkpoints.
    fn commands(folder: &Path, more: &[&str]) -> Vec<Output> {
        let ties = fixture("combine/peft/w_ties");
        let pair = fixture("extract/llama");
        let paths = |parts: &[(&str, PathBuf)]| -> Vec<std::ffi::OsString> {
            let parts = parts.iter();
            parts
                .flat_map(|(flag, path)| [flag.into(), path.clone().into()])
                .collect()
        };
        let (base, tuned) = (pair.join("base"), pair.join("tuned"));
        let commands = [
            ("extract", paths(&[("--base", base), ("--tuned", tuned)])),
            ("resize", vec![ties.join("a0").into()]),
            (
                "combine",
                paths(&[
                    ("--adapter", ties.join("a0")),
                    ("--adapter", ties.join("a1")),
                ]),
            ),
        ];
        let run = |(name, arguments): (&str, Vec<std::ffi::OsString>)| {
            let mut command = program();
            command.arg(name).args(arguments).args(["--rank", "2"]);
            command.arg("--output").arg(folder.join(name));
            command.args(more).output().unwrap()
        };
        commands.into_iter().map(run).collect()
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_what_to_do() {
        let folder = TempDir::new().unwrap();
        for (more, code, wanted) in [
            (
                &["--device", "abacus"][..],
                2,
                "there are cpu, cuda[:N], metal[:N], candle-cpu, auto",
            ),
            (&["--device", "candle-cpu:1"], 2, "there is only one of it"),
            (&["--device", "cuda:x"], 2, "the number of the device"),
            (
                &["--device", "candle-cpu", "--device-memory", "1kb"],
                2,
                "at least 65536 bytes",
            ),
            (
                &["--device", "candle-cpu", "--device-memory", "much"],
                2,
                "much",
            ),
        ] {
            for run in commands(folder.path(), more) {
                let said = text(&run.stderr);
                assert_eq!(run.status.code(), Some(code), "{more:?}: {said}");
                assert!(said.contains(wanted), "{more:?}: {said}");
            }
        }
        for kind in KINDS.iter().filter(|kind| !kind.built) {
            for run in commands(folder.path(), &["--device", kind.name]) {
                let said = text(&run.stderr);
                assert_eq!(run.status.code(), Some(5), "{}: {said}", kind.name);
                let hint = format!("cargo build --release --features {}", kind.feature);
                assert!(said.contains(&hint), "{said}");
            }
        }
        assert!(entries(folder.path()).is_empty());
    }

    #[test]
    fn a_device_is_told_to_people_and_to_scripts() {
        let without = TempDir::new().unwrap();
        for run in commands(without.path(), &[]) {
            assert!(run.status.success(), "{}", text(&run.stderr));
            assert!(
                !text(&run.stdout).contains("device"),
                "{}",
                text(&run.stdout)
            );
        }
        let bytes = |folder: &TempDir, name: &str| {
            std::fs::read(folder.path().join(name).join("adapter_model.safetensors")).unwrap()
        };
        // The processor is no device.
        let processor = TempDir::new().unwrap();
        for run in commands(processor.path(), &["--device", "cpu", "--json"]) {
            let report: Value = serde_json::from_slice(&run.stdout).unwrap();
            assert!(report.get("device").is_none(), "{report}");
        }
        // No layer of these gains by any device.
        let automatic = TempDir::new().unwrap();
        for run in commands(automatic.path(), &["--device", "auto"]) {
            let said = text(&run.stdout);
            assert!(run.status.success(), "{}", text(&run.stderr));
            assert!(said.contains("\n  device        cpu ("), "{said}");
            for kind in KINDS.iter().filter(|kind| kind.faster && !kind.built) {
                let why = format!("this build is without the feature `{}`", kind.feature);
                let nothing_opened = !KINDS.iter().any(|kind| kind.faster && kind.built);
                assert!(!nothing_opened || said.contains(&why), "{said}");
            }
        }
        for name in ["extract", "resize", "combine"] {
            assert!(bytes(&automatic, name) == bytes(&without, name), "{name}");
            assert!(bytes(&processor, name) == bytes(&without, name), "{name}");
        }
        if cfg!(feature = "candle") {
            let folder = TempDir::new().unwrap();
            let more = ["--device", "candle-cpu", "--device-memory", "1MB"];
            for run in commands(folder.path(), &more) {
                assert!(run.status.success(), "{}", text(&run.stderr));
                let said = text(&run.stdout);
                let line = "\n  device        candle-cpu (asked for)";
                assert!(said.contains(line), "{said}");
            }
        }
    }
}
