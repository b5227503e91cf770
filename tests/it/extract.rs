//! Extraction against numpy's full SVD, and against merging what was extracted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loratool::Kind;
use loratool::checkpoint::Checkpoint;
use loratool::ops::convert::targets;
use loratool::ops::extract::{
    Embeddings, FittedReport, Options, Proved, Ranks, Report, Whole, plan,
};
use loratool::ops::merge::Control;
use loratool::tensor::Float;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{self, fixture, merge};

/// The pairs, with what each is there for.
const PAIRS: &[&str] = &[
    "llama", "lowrank", "qwen2", "gpt2", "grown", "unet", "pipeline", "mixed",
];

fn side(pair: &str, side: &str) -> PathBuf {
    fixture("extract").join(pair).join(side)
}

fn options(pair: &str, output: &Path) -> Options {
    Options {
        base: side(pair, "base"),
        tuned: side(pair, "tuned"),
        output: output.to_owned(),
        ..Options::default()
    }
}

fn run(options: &Options) -> loratool::Result<Report> {
    plan(options)?.run(&Control::default())
}

fn measure(options: &Options) -> Report {
    let plan =
        plan(options).unwrap_or_else(|e| panic!("{}: {e} {:?}", options.base.display(), e.cases()));
    plan.measure(&Control::default())
        .unwrap_or_else(|e| panic!("{}: {e} {:?}", options.base.display(), e.cases()))
}

fn expected(pair: &str) -> BTreeMap<String, Value> {
    let text =
        std::fs::read_to_string(fixture("extract").join(pair).join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// The weight that numpy's values are of.
fn weight<'a>(expected: &'a BTreeMap<String, Value>, path: &str) -> &'a Value {
    let name = format!("{path}.weight");
    // Of a pipeline the part is a folder.
    let name = match expected.contains_key(&name) {
        true => name,
        false => name.replacen('.', "/", 1),
    };
    expected
        .get(&name)
        .unwrap_or_else(|| panic!("{name} is not expected"))
}

/// Merges an adapter into the base of a pair, and gives the tensors of the result and of the tuned side.
fn merged(pair: &str, adapter: &Path, folder: &Path) -> (Checkpoint, Checkpoint) {
    let output = folder.join("merged");
    let options = support::options(&side(pair, "base"), adapter, &output);
    merge(&options).unwrap_or_else(|e| panic!("{pair}: {e} {:?}", e.cases()));
    (
        Checkpoint::open(&output).unwrap(),
        Checkpoint::open(side(pair, "tuned")).unwrap(),
    )
}

#[test]
fn singular_values_and_residuals_are_those_of_the_full_decomposition() {
    let folder = TempDir::new().unwrap();
    let mut layers = 0;
    for pair in PAIRS {
        let expected = expected(pair);
        for rank in [1, 2, 4, 8] {
            for exact in [false, true] {
                let report = measure(&Options {
                    ranks: Ranks::Fixed(rank),
                    exact,
                    ..options(pair, &folder.path().join("out"))
                });
                for module in &report.modules {
                    layers += 1;
                    let what = format!("{pair} {} rank {rank}", module.path);
                    let known = weight(&expected, &module.path);
                    let norm = number(&known["difference"]).sqrt();
                    assert!(
                        (module.norm - norm).abs() <= 1e-9 * norm,
                        "{what}: {} {norm}",
                        module.norm
                    );
                    let values = known["singular_values"].as_array().unwrap();
                    for (found, known) in module.singular_values.iter().zip(values) {
                        let known = number(known);
                        assert!(
                            (found - known).abs() <= 1e-6 * norm,
                            "{what}: {found} {known}"
                        );
                    }
                    // Of a smaller matrix the rank is its side.
                    let best = known["best_residual"][rank.to_string()].as_f64();
                    let best = best.unwrap_or(0.0) / norm;
                    assert!(
                        best > 0.0 || module.rank < rank || rank == values.len(),
                        "{what}"
                    );
                    assert!(
                        module.residual >= best - 1e-7,
                        "{what}: {} is better than {best}",
                        module.residual
                    );
                    assert!(
                        module.residual <= best * 1.001 + 1e-7,
                        "{what}: {} {best}",
                        module.residual
                    );
                    assert_ne!(module.proof, Proved::NotProved, "{what}");
                }
            }
        }
    }
    assert!(layers > 500, "only {layers} layers were compared");
}

#[test]
fn every_tensor_is_fitted_whole_identical_or_listed() {
    let folder = TempDir::new().unwrap();
    for pair in PAIRS {
        for (norms, embeddings) in [
            (Whole::Full, Embeddings::Fitted),
            (Whole::Skip, Embeddings::Skip),
        ] {
            let report = measure(&Options {
                norms,
                biases: norms,
                embeddings,
                ..options(pair, &folder.path().join("out"))
            });
            let all = Checkpoint::open(side(pair, "base"))
                .unwrap()
                .tensors()
                .count();
            let told = report.modules.len()
                + report.whole.len()
                + report.identical
                + report.left_out.len();
            assert_eq!(told, all, "{pair}");
            if norms == Whole::Skip {
                assert!(report.whole.iter().all(|whole| whole.name.contains("embed") || whole.name.contains("lm_head")), "{pair}: {:?}", report.whole);
            }
        }
    }
}

#[test]
fn full_rank_gives_the_tuned_checkpoint_again() {
    for pair in PAIRS {
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("out");
        let report = run(&Options {
            ranks: Ranks::Fixed(10_000),
            ..options(pair, &out)
        });
        let report = report.unwrap_or_else(|e| panic!("{pair}: {e} {:?}", e.cases()));
        let bounds: BTreeMap<&str, f64> = report
            .modules
            .iter()
            .map(|module| (module.path.as_str(), module.largest_error))
            .collect();
        let (merged, tuned) = merged(pair, &out, folder.path());
        let base = Checkpoint::open(side(pair, "base")).unwrap();
        let whole = report
            .whole
            .iter()
            .filter(|whole| whole.form == "difference");
        let differences: Vec<&str> = whole.map(|whole| whole.name.as_str()).collect();
        let mut exact = 0;
        for wanted in tuned.tensors() {
            let Some(found) = merged.tensor(&wanted.name) else {
                panic!("{pair}: {} is not in the result", wanted.name);
            };
            assert_eq!(found.shape, wanted.shape, "{pair}: {}", wanted.name);
            let Some(path) = wanted
                .name
                .strip_suffix(".weight")
                .filter(|path| bounds.contains_key(path))
            else {
                if !differences.contains(&wanted.name.as_str()) {
                    assert!(found.equals(wanted).unwrap(), "{pair}: {}", wanted.name);
                    continue;
                }
                // The difference was rounded, and the sum.
                let old = base.tensor(&wanted.name).unwrap().to_f64().unwrap();
                let (found, wanted) = (found.to_f64().unwrap(), wanted.to_f64().unwrap());
                for ((found, wanted), old) in found.iter().zip(&wanted).zip(&old) {
                    let unit =
                        half_a_unit(Float::F32, wanted - old) + half_a_unit(Float::F32, *wanted);
                    assert!((found - wanted).abs() <= unit, "{pair}: {found} {wanted}");
                }
                continue;
            };
            let bound = bounds[path];
            let (found, wanted) = (found.to_f64().unwrap(), wanted.to_f64().unwrap());
            let float = Float::of(tuned.tensor(&format!("{path}.weight")).unwrap().dtype).unwrap();
            let of_base = Float::of(base.tensor(&format!("{path}.weight")).unwrap().dtype).unwrap();
            for (found, wanted) in found.iter().zip(&wanted) {
                let half = half_a_unit(of_base, *wanted);
                assert!(
                    (found - wanted).abs() <= bound + half,
                    "{pair} {path}: {found} {wanted} {bound}"
                );
                if half > bound && float == of_base {
                    assert_eq!(found, wanted, "{pair} {path}: {bound}");
                    exact += 1;
                }
            }
        }
        assert!(
            exact > 1000 || *pair == "mixed",
            "{pair}: {exact} elements had to be equal"
        );
    }
}

/// Half the distance to the next number of a type below in magnitude.
fn half_a_unit(float: Float, value: f64) -> f64 {
    let digits = match float {
        Float::F64 => 53,
        Float::F32 => 24,
        Float::BF16 => 8,
        Float::F16 => 11,
    };
    match value == 0.0 {
        true => 0.0,
        false => 2f64.powi(value.abs().log2().floor() as i32 - digits),
    }
}

#[test]
fn a_difference_of_low_rank_is_recovered_to_the_rounding_of_the_factors() {
    let folder = TempDir::new().unwrap();
    let report = measure(&Options {
        ranks: Ranks::Fixed(4),
        only: vec!["proj".to_owned()],
        ..options("lowrank", &folder.path().join("out"))
    });
    assert!(!report.modules.is_empty());
    for module in &report.modules {
        // The tuned side was rounded to f32 when it was made.
        let known = number(&weight(&expected("lowrank"), &module.path)["best_residual"]["4"]);
        let bound = known / module.norm + 4.0 * 2f64.powi(-24);
        assert!(
            module.residual <= bound * 1.01,
            "{}: {} {bound}",
            module.path,
            module.residual
        );
    }
}

/// What a merge leaves of each difference is what the report states.
fn leaves_what_is_stated<'a>(
    what: &str,
    modules: impl IntoIterator<Item = &'a FittedReport>,
    (merged, pair): (&Path, &str),
    within: f64,
) {
    let merged = Checkpoint::open(merged).unwrap();
    let tuned = Checkpoint::open(side(pair, "tuned")).unwrap();
    for module in modules {
        let name = format!("{}.weight", module.path);
        let found = merged.tensor(&name).unwrap().to_f64().unwrap();
        let wanted = tuned.tensor(&name).unwrap().to_f64().unwrap();
        let squares = found.iter().zip(&wanted).map(|(a, b)| (a - b) * (a - b));
        let left = squares.sum::<f64>().sqrt() / module.norm;
        assert!(
            (left - module.residual).abs() <= within,
            "{what} {name}: {left} {}",
            module.residual
        );
    }
}

#[test]
fn a_merged_extract_leaves_the_residual_that_the_report_states() {
    for (pair, method, dtype) in [
        ("llama", "lora", Float::F32),
        ("llama", "lora", Float::BF16),
        ("lowrank", "dora", Float::F32),
        ("gpt2", "dora", Float::F32),
        ("unet", "lora", Float::F16),
        ("mixed", "lora", Float::F32),
    ] {
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("out");
        let report = run(&Options {
            ranks: Ranks::Fixed(4),
            method: Some(method.to_owned()),
            dtype,
            alpha: Some(3.0),
            ..options(pair, &out)
        });
        let report = report.unwrap_or_else(|e| panic!("{pair}: {e} {:?}", e.cases()));
        let merging = loratool::ops::merge::Options {
            dtype: Some(Float::F32),
            ..support::options(&side(pair, "base"), &out, &folder.path().join("merged"))
        };
        merge(&merging).unwrap_or_else(|e| panic!("{pair}: {e} {:?}", e.cases()));
        let what = format!("{pair} {method}");
        leaves_what_is_stated(&what, &report.modules, (&merging.output, pair), 1e-4);
    }
}

#[test]
fn dora_leaves_no_more_than_lora() {
    let folder = TempDir::new().unwrap();
    for pair in ["llama", "qwen2", "gpt2", "unet"] {
        let of = |method: &str| {
            let report = measure(&Options {
                ranks: Ranks::Fixed(2),
                method: Some(method.to_owned()),
                skip: vec!["embed|wte|wpe".to_owned()],
                ..options(pair, &folder.path().join("out"))
            });
            let modules = report.modules.into_iter();
            modules
                .map(|module| (module.path, module.residual))
                .collect::<BTreeMap<_, _>>()
        };
        let (lora, dora) = (of("LoRA"), of("dora"));
        assert_eq!(lora.len(), dora.len());
        for (path, residual) in &dora {
            assert!(
                *residual <= lora[path] + 1e-6,
                "{pair} {path}: {residual} {}",
                lora[path]
            );
        }
        let sum = |of: &BTreeMap<String, f64>| of.values().sum::<f64>();
        assert!(sum(&dora) < sum(&lora) * 0.999, "{pair}");
    }
}

#[test]
fn every_format_says_the_same_or_lists_what_it_cannot() {
    let mut written = 0;
    for pair in ["llama", "gpt2", "unet", "pipeline"] {
        for target in targets() {
            let folder = TempDir::new().unwrap();
            let out = folder.path().join("out");
            let report = plan(&Options {
                ranks: Ranks::Fixed(4),
                to: Some(target.id().to_owned()),
                allow_losses: true,
                ..options(pair, &out)
            })
            .and_then(|plan| plan.run(&Control::default()));
            let report = match report {
                Ok(report) => report,
                // A format of one family, or one that needs a table.
                Err(error) => {
                    assert!(!out.exists(), "{pair} {}", target.id());
                    assert!(
                        matches!(
                            error.kind(),
                            Kind::Unsupported | Kind::Unresolved | Kind::Usage | Kind::Mismatch
                        ),
                        "{pair} {}: {error}",
                        target.id()
                    );
                    continue;
                }
            };
            written += 1;
            let lost: Vec<&str> = report
                .losses
                .iter()
                .map(|loss| loss.item.as_str())
                .collect();
            let kept = report
                .modules
                .iter()
                .filter(|module| !lost.contains(&&*module.path));
            let mut merging =
                support::options(&side(pair, "base"), &out, &folder.path().join("merged"));
            merging.dtype = Some(Float::F32);
            merging.read.alpha = report.alpha;
            if let Err(error) = merge(&merging) {
                if *pair == *"pipeline" && error.kind() == Kind::Unresolved {
                    // Names of several models without their parts: nothing tells them apart any more.
                    continue;
                }
                panic!("{pair} {}: {error} {:?}", target.id(), error.cases());
            }
            let what = format!("{pair} {}", target.id());
            leaves_what_is_stated(&what, kept, (&merging.output, pair), 1e-3);
        }
    }
    assert!(written > 25, "only {written} adapters were written");
}

#[test]
fn ranks_are_what_was_asked_for() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let known = expected("llama");
    let of = |ranks: Ranks| {
        measure(&Options {
            ranks,
            max_rank: 20,
            ..options("llama", &out)
        })
    };
    for module in &of(Ranks::Energy(0.9)).modules {
        let values: Vec<f64> = weight(&known, &module.path)["singular_values"]
            .as_array()
            .unwrap()
            .iter()
            .map(number)
            .collect();
        let total: f64 = values.iter().map(|value| value * value).sum();
        let mut kept = 0.0;
        let wanted = values.iter().take_while(|value| {
            let before = kept;
            kept += *value * *value;
            before < 0.9 * total
        });
        assert_eq!(module.rank, wanted.count().min(20), "{}", module.path);
        assert_eq!(module.reached, module.energy >= 0.9, "{}", module.path);
    }
    for module in &of(Ranks::Ratio(4.0)).modules {
        let values = weight(&known, &module.path)["singular_values"]
            .as_array()
            .unwrap();
        let above = values
            .iter()
            .filter(|value| number(value) > number(&values[0]) / 4.0)
            .count();
        assert_eq!(module.rank, above.min(20), "{}", module.path);
    }
    let report = measure(&Options {
        rank_for: vec![("q_proj".to_owned(), 3), ("self_attn".to_owned(), 5)],
        ..options("llama", &out)
    });
    for module in &report.modules {
        let wanted = match &*module.path {
            path if path.contains("q_proj") => 3,
            path if path.contains("self_attn") => 5,
            _ => 32.min(*module.shape.iter().min().unwrap()),
        };
        assert_eq!(module.rank, wanted, "{}", module.path);
    }
}

#[test]
fn a_budget_is_kept_and_spent_where_it_removes_most() {
    for (pair, to) in [
        ("llama", "peft"),
        ("qwen2", "peft"),
        ("unet", "kohya"),
        ("llama", "mlx"),
    ] {
        let folder = TempDir::new().unwrap();
        let uniform = folder.path().join("uniform");
        let common = Options {
            to: Some(to.to_owned()),
            allow_losses: true,
            ..options(pair, &folder.path().join("out"))
        };
        let even = run(&Options {
            ranks: Ranks::Fixed(3),
            output: uniform,
            ..common.clone()
        });
        let even = even.unwrap_or_else(|e| panic!("{pair} {to}: {e} {:?}", e.cases()));
        let best = run(&Options {
            ranks: Ranks::Budget(even.bytes),
            ..common
        });
        let best = best.unwrap_or_else(|e| panic!("{pair} {to}: {e} {:?}", e.cases()));
        assert!(
            best.bytes <= even.bytes,
            "{pair} {to}: {} {}",
            best.bytes,
            even.bytes
        );
        let left = |report: &Report| -> f64 {
            let fitted = report.modules.iter();
            let kept: f64 = fitted
                .map(|module| module.norm.powi(2) * (1.0 - module.residual.powi(2)))
                .sum();
            -kept
        };
        if to == "peft" {
            assert!(
                best.bytes * 10 >= even.bytes * 7,
                "{pair}: {} of {}",
                best.bytes,
                even.bytes
            );
            assert!(
                left(&best) < left(&even),
                "{pair}: {} {}",
                left(&best),
                left(&even)
            );
        }
    }
}

#[test]
fn any_number_of_threads_writes_the_same_bytes() {
    let folder = TempDir::new().unwrap();
    let bytes = |threads: usize| {
        let output = folder.path().join(threads.to_string());
        run(&Options {
            ranks: Ranks::Fixed(4),
            threads: Some(threads),
            ..options("llama", &output)
        })
        .unwrap();
        std::fs::read(output.join("adapter_model.safetensors")).unwrap()
    };
    let one = bytes(1);
    assert!([2, 3].into_iter().all(|threads| bytes(threads) == one));
}

#[test]
fn both_sides_may_be_the_same() {
    let folder = TempDir::new().unwrap();
    let error = run(&Options {
        tuned: side("llama", "base"),
        ..options("llama", &folder.path().join("out"))
    })
    .unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
}
