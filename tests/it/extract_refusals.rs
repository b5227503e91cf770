//! What extraction refuses, and that nothing is left behind.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use loratool::checkpoint::sink::{Faults, Operation};
use loratool::ops::extract::{Options, Ranks, Report, Whole, plan};
use loratool::ops::merge::Control;
use loratool::{Error, Kind};
use safetensors::Dtype;
use tempfile::TempDir;

use crate::oracle::Stored;
use crate::support::{Random, fixture, write_safetensors};

const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";
const NORM: &str = "model.norm.weight";

/// A base and what was tuned from it, in files of their own.
struct Pair {
    folder: TempDir,
    base: Vec<(&'static str, Stored)>,
    tuned: Vec<(&'static str, Stored)>,
}

impl Pair {
    fn new() -> Self {
        let mut random = Random(5);
        let weight = random.floats(12 * 8);
        let moved: Vec<f64> = weight.iter().map(|value| value * 1.01 + 0.001).collect();
        let of = |values: &[f64]| Stored::of(Dtype::F32, &[12, 8], values);
        Pair {
            folder: TempDir::new().unwrap(),
            base: vec![
                (WEIGHT, of(&weight)),
                (NORM, Stored::of(Dtype::F32, &[8], &[1.0; 8])),
            ],
            tuned: vec![
                (WEIGHT, of(&moved)),
                (NORM, Stored::of(Dtype::F32, &[8], &[1.5; 8])),
            ],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes both files and gives options for them.
    fn options(&self) -> Options {
        write_safetensors(&self.path("base.safetensors"), &self.base);
        write_safetensors(&self.path("tuned.safetensors"), &self.tuned);
        Options {
            base: self.path("base.safetensors"),
            tuned: self.path("tuned.safetensors"),
            output: self.path("out"),
            ranks: Ranks::Fixed(2),
            ..Options::default()
        }
    }

    /// Runs, and checks that only the inputs are there if it fails.
    fn run(&self, options: &Options, control: &Control<'_>) -> Result<Report, Error> {
        let before = entries(self.folder.path());
        let result = plan(options).and_then(|plan| plan.run(control));
        if result.is_err() {
            assert_eq!(entries(self.folder.path()), before);
        }
        result
    }

    fn refused(&self, options: &Options) -> Error {
        self.run(options, &Control::default())
            .expect_err("it is refused")
    }
}

fn entries(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    // The lock of an output stays.
    names.filter(|name| !name.ends_with("-lock")).collect()
}

#[test]
fn an_unharmed_pair_is_extracted() {
    let pair = Pair::new();
    let report = pair.run(&pair.options(), &Control::default()).unwrap();
    assert_eq!((report.modules.len(), report.whole.len()), (1, 1));
}

#[test]
fn a_value_that_is_not_finite_is_named() {
    for bad in [f64::NAN, f64::INFINITY] {
        for tuned in [false, true] {
            let mut pair = Pair::new();
            let side = if tuned {
                &mut pair.tuned
            } else {
                &mut pair.base
            };
            let mut values = side[0].1.values();
            values[5] = bad;
            side[0].1 = Stored::of(Dtype::F32, &[12, 8], &values);
            let error = pair.refused(&pair.options());
            assert_eq!(error.kind(), Kind::NonFinite, "{error}");
            assert!(error.to_string().contains(WEIGHT), "{error}");
        }
    }
}

#[test]
fn tensors_without_a_counterpart_are_listed_and_a_flag_leaves_them_out() {
    let other = "model.layers.1.mlp.up_proj.weight";
    let weight = || Stored::of(Dtype::F32, &[12, 8], &[0.5; 96]);
    for change in 0..3 {
        let mut pair = Pair::new();
        let wanted = match change {
            0 => {
                pair.base.push((other, weight()));
                "only in the base"
            }
            1 => {
                pair.tuned.push((other, weight()));
                "only in the tuned checkpoint"
            }
            _ => {
                pair.base.push((other, weight()));
                pair.tuned
                    .push((other, Stored::of(Dtype::F32, &[8, 12], &[0.25; 96])));
                "its shape is [12, 8] in the base and [8, 12] in the tuned checkpoint"
            }
        };
        let options = pair.options();
        let error = pair.refused(&options);
        assert_eq!(error.kind(), Kind::Mismatch, "{error}");
        assert_eq!(error.cases(), [format!("{other}: {wanted}")]);
        assert!(error.hint().unwrap().contains("--allow-unmatched"));
        let accepted = Options {
            allow_unmatched: true,
            ..options
        };
        let report = pair.run(&accepted, &Control::default()).unwrap();
        assert_eq!(report.left_out.len(), 1);
        assert_eq!(report.left_out[0].item, other);
    }
}

/// Two whole numbers.
fn numbers(last: i64) -> Stored {
    Stored {
        dtype: Dtype::I64,
        shape: vec![2],
        bytes: [7i64, last]
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    }
}

#[test]
fn types_without_a_difference_are_listed() {
    let mut pair = Pair::new();
    for (side, bits) in [(&mut pair.base, 1), (&mut pair.tuned, 2)] {
        side.push(("model.ids", numbers(bits)));
    }
    let error = pair.refused(&pair.options());
    assert!(
        error.cases()[0].starts_with("model.ids: it is I64"),
        "{:?}",
        error.cases()
    );
    // Equal ones are no difference.
    let mut pair = Pair::new();
    for side in [&mut pair.base, &mut pair.tuned] {
        side.push(("model.ids", numbers(1)));
    }
    let report = pair.run(&pair.options(), &Control::default()).unwrap();
    assert_eq!(report.identical, 1);
}

#[test]
fn a_checkpoint_that_was_not_made_from_the_base_is_recognised() {
    let mut pair = Pair::new();
    pair.tuned[0].1 = Stored::of(Dtype::F32, &[12, 8], &Random(77).floats(96));
    let options = pair.options();
    let error = pair.refused(&options);
    assert_eq!(error.kind(), Kind::Mismatch);
    assert!(
        error.to_string().contains("it was not made from the base"),
        "{error}"
    );
    let accepted = Options {
        allow_unrelated: true,
        ..options
    };
    pair.run(&accepted, &Control::default()).unwrap();
    // Other shapes everywhere are another model.
    let mut pair = Pair::new();
    pair.tuned = vec![
        (WEIGHT, Stored::of(Dtype::F32, &[10, 6], &[0.5; 60])),
        (NORM, Stored::of(Dtype::F32, &[6], &[0.5; 6])),
    ];
    let error = pair.refused(&pair.options());
    assert!(
        error
            .to_string()
            .contains("2 of 2 tensors have other shapes"),
        "{error}"
    );
}

#[test]
fn broken_and_quantised_sides_are_refused() {
    let copied = |from: &str, to: &Path| {
        std::fs::create_dir(to).unwrap();
        for entry in std::fs::read_dir(fixture("extract/llama").join(from)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    };
    type Damage = (&'static str, Kind, fn(&Path));
    let damage: [Damage; 3] = [
        ("a missing shard", Kind::Malformed, |tuned| {
            std::fs::remove_file(shards(tuned).pop().unwrap()).unwrap();
        }),
        ("a truncated shard", Kind::Malformed, |tuned| {
            let shard = shards(tuned).pop().unwrap();
            let bytes = std::fs::read(&shard).unwrap();
            std::fs::write(&shard, &bytes[..bytes.len() - 10]).unwrap();
        }),
        ("a quantised side", Kind::Unsupported, |tuned| {
            let path = tuned.join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            let text = text.replacen(
                '{',
                r#"{"quantization_config": {"quant_method": "gptq"},"#,
                1,
            );
            std::fs::write(&path, text).unwrap();
        }),
    ];
    for (what, kind, harm) in damage {
        let pair = Pair::new();
        let tuned = pair.path("tuned");
        copied("tuned", &tuned);
        harm(&tuned);
        let error = pair.refused(&Options {
            base: fixture("extract/llama/base"),
            tuned,
            output: pair.path("out"),
            ..Options::default()
        });
        assert_eq!(error.kind(), kind, "{what}: {error}");
    }
}

fn shards(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut shards: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .collect();
    shards.sort();
    assert!(shards.len() > 1, "the tuned side has shards");
    shards
}

#[test]
fn outputs_that_are_inputs_or_there_already_are_refused() {
    let pair = Pair::new();
    let options = pair.options();
    let with = |output: PathBuf, force| Options {
        output,
        force,
        to: Some("kohya".to_owned()),
        prefix: Some("lycoris_".to_owned()),
        ..options.clone()
    };
    for path in ["base.safetensors", "tuned.safetensors"] {
        assert_eq!(
            pair.refused(&with(pair.path(path), true)).kind(),
            Kind::Output
        );
    }
    std::fs::write(pair.path("old.safetensors"), b"old").unwrap();
    assert_eq!(
        pair.refused(&with(pair.path("old.safetensors"), false))
            .kind(),
        Kind::Output
    );
    assert_eq!(std::fs::read(pair.path("old.safetensors")).unwrap(), b"old");
    pair.run(
        &with(pair.path("old.safetensors"), true),
        &Control::default(),
    )
    .unwrap();
    assert_eq!(
        pair.refused(&with(pair.path("no/where.safetensors"), false))
            .kind(),
        Kind::Output
    );
}

#[test]
fn a_folder_that_is_an_adapter_is_replaced_where_that_is_asked_for() {
    let pair = Pair::new();
    let options = pair.options();
    pair.run(&options, &Control::default()).unwrap();
    assert_eq!(pair.refused(&options).kind(), Kind::Output);
    let forced = Options {
        force: true,
        ranks: Ranks::Fixed(1),
        ..options
    };
    assert_eq!(
        pair.run(&forced, &Control::default()).unwrap().modules[0].rank,
        1
    );
    let other = pair.path("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("notes.txt"), "mine").unwrap();
    let forced = Options {
        output: other,
        ..forced
    };
    assert_eq!(pair.refused(&forced).kind(), Kind::Output);
}

#[test]
fn options_that_mean_nothing_are_wrong_calls() {
    let pair = Pair::new();
    let options = pair.options();
    let wrong: Vec<(&str, Options)> = vec![
        (
            "rank",
            Options {
                ranks: Ranks::Fixed(0),
                ..options.clone()
            },
        ),
        (
            "energy",
            Options {
                ranks: Ranks::Energy(1.5),
                ..options.clone()
            },
        ),
        (
            "ratio",
            Options {
                ranks: Ranks::Ratio(0.5),
                ..options.clone()
            },
        ),
        (
            "budget",
            Options {
                ranks: Ranks::Budget(10),
                ..options.clone()
            },
        ),
        (
            "largest rank",
            Options {
                max_rank: 0,
                ..options.clone()
            },
        ),
        (
            "rank for",
            Options {
                rank_for: vec![("up".to_owned(), 0)],
                ..options.clone()
            },
        ),
        (
            "pattern",
            Options {
                rank_for: vec![("(".to_owned(), 1)],
                ..options.clone()
            },
        ),
        (
            "alpha",
            Options {
                alpha: Some(0.0),
                ..options.clone()
            },
        ),
        (
            "tolerance",
            Options {
                tolerance: Some(-1.0),
                ..options.clone()
            },
        ),
        (
            "method",
            Options {
                method: Some("ia3".to_owned()),
                ..options.clone()
            },
        ),
        (
            "format",
            Options {
                to: Some("nothing".to_owned()),
                ..options.clone()
            },
        ),
        (
            "algebra",
            Options {
                algebra: Some("nothing".to_owned()),
                ..options.clone()
            },
        ),
        (
            "selection",
            Options {
                only: vec!["nothing".to_owned()],
                ..options.clone()
            },
        ),
    ];
    for (what, options) in wrong {
        assert_eq!(pair.refused(&options).kind(), Kind::Usage, "{what}");
    }
}

#[test]
fn what_a_format_cannot_say_is_listed_with_the_flags_that_leave_it_out() {
    let pair = Pair::new();
    let options = Options {
        to: Some("mlx".to_owned()),
        ..pair.options()
    };
    let error = pair.refused(&options);
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    assert!(error.cases()[0].contains("norm"), "{:?}", error.cases());
    assert!(error.hint().unwrap().contains("--norms skip"));
    let report = pair.run(
        &Options {
            norms: Whole::Skip,
            ..options
        },
        &Control::default(),
    );
    assert_eq!(report.unwrap().left_out.len(), 1);
}

#[test]
fn an_interrupted_or_failing_run_leaves_nothing() {
    let pair = Pair::new();
    let options = pair.options();
    let control = Control {
        cancel: Arc::new(AtomicBool::new(true)),
        ..Control::default()
    };
    let error = pair.run(&options, &control).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted);
    for operation in [
        Operation::Create,
        Operation::Write,
        Operation::Sync,
        Operation::Rename,
    ] {
        let asked = Arc::new(AtomicBool::new(false));
        let seen = asked.clone();
        let fault = move |now| match now == operation {
            true => {
                seen.store(true, Ordering::Relaxed);
                Err(std::io::Error::other("no"))
            }
            false => Ok(()),
        };
        let control = Control {
            faults: Faults(Some(Arc::new(fault))),
            ..Control::default()
        };
        pair.run(&options, &control).unwrap_err();
        assert!(asked.load(Ordering::Relaxed), "{operation:?}");
    }
}

#[test]
fn a_dry_run_reports_the_same_and_writes_nothing() {
    let pair = Pair::new();
    let options = pair.options();
    let before = entries(pair.folder.path());
    let told = plan(&options)
        .unwrap()
        .measure(&Control::default())
        .unwrap();
    assert_eq!(entries(pair.folder.path()), before);
    let report = pair.run(&options, &Control::default()).unwrap();
    assert!(told.dry_run && !report.dry_run);
    assert_eq!((told.bytes, told.tensors), (report.bytes, report.tensors));
    assert_eq!(told.modules[0].residual, report.modules[0].residual);
}
