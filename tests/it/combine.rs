//! Several adapters as one: the exact sum, what is joined with what, and what is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loratool::ops::combine::{Options, Ranks, Report, plan};
use loratool::ops::convert;
use loratool::ops::merge::{Control, Selection};
use loratool::tensor::Float;
use loratool::{Error, Kind, Reason};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::oracle::{self, Stored};
use crate::support::{Random, fixture, merge, options, selection, write_adapter, write_base};

/// Options for adapters with their strengths.
pub(crate) fn combination(adapters: &[(PathBuf, f64)], output: &Path) -> Options {
    Options {
        adapters: adapters
            .iter()
            .map(|(path, strength)| selection(path, *strength))
            .collect(),
        conversion: convert::Options {
            output: output.to_owned(),
            ..convert::Options::default()
        },
        ..Options::default()
    }
}

/// Plans and runs.
pub(crate) fn combine(options: &Options) -> Result<Report, Error> {
    plan(options)?.run(&Control::default())
}

/// What an adapter of PEFT changes: outputs × inputs (tokens × width for embeddings), by layer.
pub(crate) fn changes(folder: &Path) -> BTreeMap<String, Vec<f64>> {
    let config = oracle::json(&folder.join("adapter_config.json"));
    let tensors = oracle::read(&folder.join("adapter_model.safetensors"));
    let number = |field: &str, pattern: &str, path: &str| {
        let own = config[pattern].as_object().into_iter().flatten();
        let mut own = own.filter(|(key, _)| path.ends_with(key.trim_start_matches('^')));
        own.next()
            .map_or(&config[field], |(_, value)| value)
            .as_f64()
            .unwrap()
    };
    let mut all = BTreeMap::new();
    for (key, down) in &tensors {
        let key = key.strip_prefix("base_model.model.").unwrap();
        let embedding = key.strip_suffix(".lora_embedding_A");
        let Some(path) = embedding.or(key.strip_suffix(".lora_A.weight")) else {
            continue;
        };
        let up = match embedding {
            Some(path) => &tensors[&format!("base_model.model.{path}.lora_embedding_B")],
            None => &tensors[&format!("base_model.model.{path}.lora_B.weight")],
        };
        let (rank, alpha) = (
            number("r", "rank_pattern", path),
            number("lora_alpha", "alpha_pattern", path),
        );
        let root = config["use_rslora"] == true;
        let scale = alpha / if root { rank.sqrt() } else { rank };
        let inputs = down.shape[1..].iter().product();
        let product = oracle::product(&up.values(), &down.values(), down.shape[0], inputs);
        let product: Vec<f64> = product.iter().map(|value| scale * value).collect();
        let product = match embedding {
            Some(_) => oracle::transposed(&product, inputs),
            None => product,
        };
        all.insert(path.to_owned(), product);
    }
    all
}

/// Compares by layer, relative to the largest element of the layer.
pub(crate) fn assert_close(
    ours: &BTreeMap<String, Vec<f64>>,
    wanted: &BTreeMap<String, Vec<f64>>,
    tolerance: f64,
    what: &str,
) {
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        wanted.keys().collect::<Vec<_>>(),
        "{what}"
    );
    for (path, wanted) in wanted {
        let largest = wanted
            .iter()
            .fold(1e-30f64, |most, value| most.max(value.abs()));
        assert_eq!(ours[path].len(), wanted.len(), "{what}: {path}");
        for (a, b) in ours[path].iter().zip(wanted) {
            let off = (a - b).abs() / largest;
            assert!(off <= tolerance, "{what}: {path} is off by {off:e}");
        }
    }
}

/// Σ strength · change.
fn sum(adapters: &[(PathBuf, f64)]) -> BTreeMap<String, Vec<f64>> {
    let mut all: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (folder, strength) in adapters {
        for (path, change) in changes(folder) {
            let sum = all.entry(path).or_insert_with(|| vec![0.0; change.len()]);
            sum.iter_mut()
                .zip(change)
                .for_each(|(sum, value)| *sum += strength * value);
        }
    }
    all
}

/// A case of PEFT's `add_weighted_adapter`.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    pub(crate) case: Value,
    pub(crate) adapters: Vec<(PathBuf, f64)>,
}

pub(crate) fn cases() -> Vec<Case> {
    let folders = std::fs::read_dir(fixture("combine/peft")).unwrap();
    let mut folders: Vec<PathBuf> = folders.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), 25);
    let cases = folders.into_iter().map(|folder| {
        let case = oracle::json(&folder.join("case.json"));
        let weights = case["weights"].as_array().unwrap().iter().enumerate();
        let adapters = weights
            .map(|(index, weight)| (folder.join(format!("a{index}")), weight.as_f64().unwrap()));
        Case {
            name: folder.file_name().unwrap().to_str().unwrap().to_owned(),
            adapters: adapters.collect(),
            folder,
            case,
        }
    });
    cases.collect()
}

#[test]
fn the_sum_of_every_case_of_peft_is_the_sum_of_what_the_adapters_change() {
    let mut seen = 0;
    for case in cases() {
        let room = tempfile::tempdir().unwrap();
        let output = room.path().join("out");
        let options = combination(&case.adapters, &output);
        match combine(&options) {
            Ok(report) => {
                assert_eq!(report.exact, report.modules.len(), "{}", case.name);
                assert_close(&changes(&output), &sum(&case.adapters), 1e-6, &case.name);
                seen += 1;
            }
            Err(error) => {
                assert_eq!(case.name, "w_linear_dora", "{error:?}");
                assert!(
                    matches!(error.reason(), Reason::NotCombined { .. }),
                    "{error:?}"
                );
                assert!(error.cases()[0].contains("DoRA"), "{:?}", error.cases());
            }
        }
    }
    assert_eq!(seen, 24);
}

#[test]
fn a_rank_as_large_as_the_sum_changes_nothing_and_a_smaller_one_leaves_the_least() {
    let case = cases()
        .into_iter()
        .find(|case| case.name == "w_svd_trunc")
        .unwrap();
    let room = tempfile::tempdir().unwrap();
    let wanted = sum(&case.adapters);
    let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
    for (rank, exact) in [(8, true), (3, false)] {
        let output = room.path().join(format!("{rank}"));
        let mut options = combination(&case.adapters, &output);
        options.ranks = Some(Ranks::Fixed(rank));
        let report = combine(&options).unwrap();
        assert_eq!(report.exact == report.modules.len(), exact);
        let ours = changes(&output);
        // PEFT's truncation has rank 3 as well: the best there is.
        let theirs = changes(&case.folder.join("comb"));
        for module in &report.modules {
            let left = |from: &BTreeMap<String, Vec<f64>>| {
                let both = from[&module.path].iter().zip(&wanted[&module.path]);
                norm(&both.map(|(a, b)| a - b).collect::<Vec<_>>()) / norm(&wanted[&module.path])
            };
            match &module.fit {
                Some(fit) => {
                    assert!((fit.residual - left(&ours)).abs() < 1e-6, "{}", module.path);
                    assert!(
                        (left(&theirs) - left(&ours)).abs() < 1e-6,
                        "{}",
                        module.path
                    );
                    assert_eq!(module.rank, Some(3));
                }
                None => assert!(left(&ours) < 1e-6),
            }
        }
    }
}

#[test]
fn energy_and_size_choose_ranks() {
    let case = cases()
        .into_iter()
        .find(|case| case.name == "w_svd")
        .unwrap();
    let room = tempfile::tempdir().unwrap();
    let run = |ranks, name: &str| {
        let output = room.path().join(name);
        let mut options = combination(&case.adapters, &output);
        options.ranks = Some(ranks);
        (combine(&options).unwrap(), output)
    };
    let (report, _) = run(Ranks::Energy(0.9), "energy");
    for module in &report.modules {
        let fit = module.fit.as_ref().unwrap();
        assert!(fit.energy >= 0.9 && fit.reached, "{fit:?}");
        assert!(module.rank < Some(8));
        assert!((fit.residual * fit.residual - (1.0 - fit.energy)).abs() < 1e-5);
    }
    for budget in [6000, 4000] {
        let (report, output) = run(Ranks::Budget(budget), &format!("{budget}"));
        let size = std::fs::metadata(output.join("adapter_model.safetensors"))
            .unwrap()
            .len();
        assert!(
            size <= budget && size * 3 > budget * 2,
            "{size} of {budget}"
        );
        assert_eq!(report.bytes, size);
    }
    let mut options = combination(&case.adapters, &room.path().join("none"));
    options.ranks = Some(Ranks::Budget(10));
    assert!(combine(&options).is_err());
}

/// A layer of an adapter for tests.
fn write_lora(
    folder: &Path,
    layers: &[(&str, usize, f64)],
    dtype: Dtype,
    random: &mut Random,
    root: bool,
) {
    let (rank, alpha) = (layers[0].1, layers[0].2);
    let mut config = json!({
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": root, "target_modules": [],
        "rank_pattern": {}, "alpha_pattern": {},
    });
    let mut tensors = Vec::new();
    for (path, rank, alpha) in layers {
        config["target_modules"]
            .as_array_mut()
            .unwrap()
            .push(json!(path));
        config["rank_pattern"][*path] = json!(rank);
        config["alpha_pattern"][*path] = json!(alpha);
        let down = Stored::of(dtype, &[*rank, 10], &random.floats(rank * 10));
        let up = Stored::of(dtype, &[8, *rank], &random.floats(rank * 8));
        tensors.push((format!("base_model.model.{path}.lora_A.weight"), down));
        tensors.push((format!("base_model.model.{path}.lora_B.weight"), up));
    }
    let tensors: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    write_adapter(folder, &config, &tensors);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn combining_is_linear_and_the_order_does_not_matter(
        seed: u64, ranks in prop::array::uniform3(1usize..5), strengths in prop::array::uniform3(-2.0f64..2.0),
    ) {
        let mut random = Random(seed);
        let room = tempfile::tempdir().unwrap();
        let types = [Dtype::F32, Dtype::BF16, Dtype::F16];
        let adapters: Vec<(PathBuf, f64)> = (0..3).map(|index| {
            let folder = room.path().join(format!("{index}"));
            let (first, second) = (["l.0.a", "l.0.b", "l.1.a"][index], "l.0.c");
            let layers = [(second, ranks[index], random.float() * 4.0), (first, 2, 3.0)];
            write_lora(&folder, &layers, types[index], &mut random, index == 1);
            (folder, strengths[index])
        }).collect();
        let output = room.path().join("out");
        combine(&combination(&adapters, &output)).unwrap();
        assert_close(&changes(&output), &sum(&adapters), 1e-6, "the sum");
        // In another order.
        let turned: Vec<(PathBuf, f64)> = adapters.iter().rev().cloned().collect();
        let other = room.path().join("turned");
        combine(&combination(&turned, &other)).unwrap();
        let scale = |values: &BTreeMap<String, Vec<f64>>| -> f64 {
            values.values().flatten().fold(1e-30f64, |most, value| most.max(value.abs()))
        };
        let (ours, turned) = (changes(&output), changes(&other));
        for (path, values) in &ours {
            for (a, b) in values.iter().zip(&turned[path]) {
                prop_assert!((a - b).abs() <= 1e-6 * scale(&ours));
            }
        }
        // Twice as strong, and in two steps.
        let nested = room.path().join("nested");
        let steps = [(output.clone(), 2.0), (adapters[0].0.clone(), -strengths[0])];
        combine(&combination(&steps, &nested)).unwrap();
        let once: Vec<(PathBuf, f64)> = adapters.iter().enumerate()
            .map(|(index, (path, by))| (path.clone(), if index == 0 { *by } else { 2.0 * by })).collect();
        let (ours, wanted) = (changes(&nested), sum(&once));
        for (path, values) in &wanted {
            for (a, b) in ours[path].iter().zip(values) {
                prop_assert!((a - b).abs() <= 4e-6 * scale(&sum(&steps)).max(scale(&wanted)));
            }
        }
    }
}

#[test]
fn merging_the_combination_is_merging_the_adapters() {
    let room = tempfile::tempdir().unwrap();
    let adapters = [
        (fixture("peft/cases/lora/adapter"), 0.7),
        (fixture("peft/cases/lora_rslora/adapter"), -0.4),
        (fixture("peft/cases/lora_patterns/adapter"), 1.3),
        (fixture("peft/cases/lora_bias_lora_only/adapter"), 1.0),
    ];
    let base = fixture("peft/bases/llama");
    let output = room.path().join("both");
    for count in 2..=3 {
        let mut options_ = combination(&adapters[..count], &output);
        options_.conversion.force = true;
        combine(&options_).unwrap();
        let merged = |adapters: &[(PathBuf, f64)], name: &str| {
            let out = room.path().join(name);
            let mut options = options(&base, &adapters[0].0, &out);
            options.force = true;
            options.adapters = adapters
                .iter()
                .map(|(path, by)| selection(path, *by))
                .collect();
            merge(&options).unwrap();
            oracle::read(&out.join("model.safetensors"))
        };
        let (once, all) = (
            merged(&[(output.clone(), 1.0)], "once"),
            merged(&adapters[..count], "all"),
        );
        for (name, tensor) in &once {
            let other = all[name].values();
            for (a, b) in tensor.values().iter().zip(&other) {
                assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{name}: {a} {b}");
            }
        }
    }
}

#[test]
fn spellings_of_one_layer_are_joined() {
    let room = tempfile::tempdir().unwrap();
    let kohya = fixture("lycoris/unet_attn/kohya.safetensors");
    let others = ["diffusers_new", "diffusers_mid", "diffusers_old"];
    for other in others {
        let other = fixture(&format!("lycoris/unet_attn/{other}.safetensors"));
        for to in ["kohya", "peft"] {
            let output = room.path().join(to);
            let mut options = combination(&[(kohya.clone(), 1.0), (other.clone(), -1.0)], &output);
            options.conversion.to = to.to_owned();
            options.conversion.force = true;
            let report = combine(&options).unwrap();
            // One adapter in two spellings: nothing is left, and every layer was found twice.
            assert!(
                report.modules.iter().all(|module| module.adapters == 2),
                "{to}"
            );
            let rank = report.modules[0].rank;
            options.ranks = Some(Ranks::Energy(0.5));
            let report = combine(&options).unwrap();
            for module in &report.modules {
                let fit = module.fit.as_ref().unwrap();
                assert!(fit.norm < 1e-9 && module.rank < rank, "{module:?}");
            }
        }
    }
}

#[test]
fn strengths_of_modules_and_filters_are_those_of_merge() {
    let case = cases()
        .into_iter()
        .find(|case| case.name == "w_linear")
        .unwrap();
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("out");
    let mut options = combination(&case.adapters, &output);
    options.adapters[0].strength_for = vec![("q_proj".to_owned(), 0.0), ("v_proj".to_owned(), 2.0)];
    options.adapters[1].strength_for = vec![("q_proj".to_owned(), 0.0)];
    options.conversion.skip = vec!["layers.1".to_owned()];
    let report = combine(&options).unwrap();
    let ours = changes(&output);
    let (first, second) = (changes(&case.adapters[0].0), changes(&case.adapters[1].0));
    assert_eq!(ours.len(), 1);
    for (path, values) in &ours {
        assert!(
            path.contains("layers.0") && path.contains("v_proj"),
            "{path}"
        );
        for ((value, a), b) in values.iter().zip(&first[path]).zip(&second[path]) {
            assert!((value - (2.0 * a + 0.5 * b)).abs() < 1e-5);
        }
    }
    assert_eq!(report.left_out.len(), 1, "{:?}", report.left_out);
}

#[test]
fn a_narrow_type_is_chosen_and_values_too_large_for_it_are_refused() {
    let case = cases()
        .into_iter()
        .find(|case| case.name == "w_linear")
        .unwrap();
    let room = tempfile::tempdir().unwrap();
    let mut options = combination(&case.adapters, &room.path().join("out"));
    options.conversion.dtype = Some(Float::BF16);
    combine(&options).unwrap();
    let tensors = oracle::read(&room.path().join("out/adapter_model.safetensors"));
    assert!(tensors.values().all(|tensor| tensor.dtype == Dtype::BF16));
    options.conversion.dtype = Some(Float::F16);
    options.conversion.output = room.path().join("large");
    options.adapters[0].strength = 1e9;
    let error = combine(&options).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::FactorOverflow { .. }),
        "{error:?}"
    );
    assert!(!room.path().join("large").exists());
}

/// An adapter with a head.
fn with_head(folder: &Path, head: &[f64], random: &mut Random) {
    write_lora(folder, &[("l.0.a", 1, 1.0)], Dtype::F32, random, false);
    let mut config = oracle::json(&folder.join("adapter_config.json"));
    config["modules_to_save"] = json!(["score"]);
    let mut tensors = oracle::read(&folder.join("adapter_model.safetensors"));
    let head = Stored::of(Dtype::F32, &[2, 2], head);
    tensors.insert("base_model.model.score.weight".to_owned(), head);
    let tensors: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(name, own)| (&**name, own.clone()))
        .collect();
    write_adapter(folder, &config, &tensors);
}

#[test]
fn whole_tensors_pass_where_they_are_equal_and_are_averaged_on_request_alone() {
    let mut random = Random(4);
    let room = tempfile::tempdir().unwrap();
    let folder = |name: &str| room.path().join(name);
    with_head(&folder("a"), &[1.0, 2.0, 3.0, 4.0], &mut random);
    with_head(&folder("b"), &[1.0, 2.0, 3.0, 4.0], &mut random);
    with_head(&folder("c"), &[5.0, 2.0, -1.0, 0.0], &mut random);
    let head = |name: &str| {
        let tensors = oracle::read(&folder(name).join("adapter_model.safetensors"));
        tensors["base_model.model.score.weight"].values()
    };
    combine(&combination(
        &[(folder("a"), 1.0), (folder("b"), 1.0)],
        &folder("same"),
    ))
    .unwrap();
    assert_eq!(head("same"), [1.0, 2.0, 3.0, 4.0]);
    let mut options = combination(&[(folder("a"), 3.0), (folder("c"), 1.0)], &folder("other"));
    let error = combine(&options).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NotTogether { .. }),
        "{error:?}"
    );
    assert!(
        error.cases()[0].contains("score.weight"),
        "{:?}",
        error.cases()
    );
    assert!(error.hint().unwrap().contains("--average-full"));
    options.average_full = true;
    let report = combine(&options).unwrap();
    assert_eq!(head("other"), [2.0, 2.0, 2.0, 3.0]);
    assert_eq!(report.averaged, ["score.weight"]);
    options.adapters[1].strength = -3.0;
    options.conversion.force = true;
    assert!(
        combine(&options).is_err(),
        "strengths that cancel have no average"
    );
}

#[test]
fn a_mixture_of_methods_goes_through_the_change_and_tells_what_is_left() {
    let room = tempfile::tempdir().unwrap();
    let key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
    let mut random = Random(8);
    let (down, up) = (random.floats(20), random.floats(16));
    let difference = random.floats(80);
    let write = |name: &str, tensors: &[(&str, Stored)]| {
        let path = room.path().join(name);
        let tensors: Vec<(String, Stored)> = tensors
            .iter()
            .map(|(end, own)| (format!("{key}.{end}"), own.clone()))
            .collect();
        let tensors: Vec<(&str, Stored)> = tensors
            .iter()
            .map(|(name, own)| (&**name, own.clone()))
            .collect();
        crate::support::write_safetensors(&path, &tensors);
        path
    };
    let lora = write(
        "lora.safetensors",
        &[
            ("lora_down.weight", Stored::of(Dtype::F64, &[2, 10], &down)),
            ("lora_up.weight", Stored::of(Dtype::F64, &[8, 2], &up)),
            ("alpha", Stored::of(Dtype::F32, &[], &[2.0])),
        ],
    );
    let full = write(
        "full.safetensors",
        &[("diff", Stored::of(Dtype::F64, &[8, 10], &difference))],
    );
    let output = room.path().join("out.safetensors");
    let mut options = combination(&[(lora, 0.5), (full, -1.0)], &output);
    let error = combine(&options).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NotCombined { .. }),
        "{error:?}"
    );
    assert!(error.cases()[0].contains("--rank"), "{:?}", error.cases());
    for (rank, whole) in [(8, true), (2, false)] {
        options.ranks = Some(Ranks::Fixed(rank));
        options.conversion.force = true;
        let report = combine(&options).unwrap();
        let fit = report.modules[0].fit.as_ref().unwrap();
        assert_eq!(fit.residual < 1e-6, whole, "{fit:?}");
        let tensors = oracle::read(&output);
        let of = |end: &str| tensors[&format!("{key}.{end}")].values();
        let scale = of("alpha")[0] / rank as f64;
        let ours = oracle::product(&of("lora_up.weight"), &of("lora_down.weight"), rank, 10);
        let wanted = oracle::product(&up, &down, 2, 10);
        let (mut left, mut all) = (0.0, 0.0);
        for ((ours, product), difference) in ours.iter().zip(&wanted).zip(&difference) {
            let wanted = 0.5 * product - difference;
            left += (scale * ours - wanted).powi(2);
            all += wanted * wanted;
        }
        assert!(((left / all).sqrt() - fit.residual).abs() < 1e-6);
    }
}

#[test]
fn wrong_calls_and_adapters_that_do_not_go_together_are_told() {
    let mut random = Random(6);
    let room = tempfile::tempdir().unwrap();
    let folder = |name: &str| room.path().join(name);
    write_lora(
        &folder("a"),
        &[("model.layers.0.a", 1, 1.0)],
        Dtype::F32,
        &mut random,
        false,
    );
    write_lora(
        &folder("b"),
        &[("model.layers.3.b", 1, 1.0)],
        Dtype::F32,
        &mut random,
        false,
    );
    write_lora(
        &folder("c"),
        &[("transformer.h.0.b", 1, 1.0)],
        Dtype::F32,
        &mut random,
        false,
    );
    let (a, b, c) = ((folder("a"), 1.0), (folder("b"), 1.0), (folder("c"), 1.0));
    // Other layers of one stack are of one model.
    combine(&combination(&[a.clone(), b], &folder("out"))).unwrap();
    let mut options = combination(&[a.clone(), c], &folder("none"));
    let error = combine(&options).unwrap_err();
    assert!(matches!(error.reason(), Reason::OtherModel), "{error:?}");
    assert!(error.cases()[0].contains("/c"), "{:?}", error.cases());
    options.allow_unrelated = true;
    combine(&options).unwrap();
    for strength in [f64::NAN, f64::INFINITY] {
        let error = combine(&combination(&[(a.0.clone(), strength)], &folder("no"))).unwrap_err();
        assert!(
            matches!(error.reason(), Reason::StrengthNotFinite { .. }),
            "{error:?}"
        );
    }
    let error = combine(&combination(&[], &folder("no"))).unwrap_err();
    assert!(matches!(error.reason(), Reason::NoAdapter), "{error:?}");
    for ranks in [
        Ranks::Fixed(0),
        Ranks::Energy(0.0),
        Ranks::Energy(1.5),
        Ranks::Energy(f64::NAN),
    ] {
        let mut options = combination(std::slice::from_ref(&a), &folder("no"));
        options.ranks = Some(ranks);
        assert_eq!(
            combine(&options).unwrap_err().kind(),
            Kind::Usage,
            "{ranks:?}"
        );
    }
    let mut options = combination(std::slice::from_ref(&a), &folder("no"));
    options.conversion.only = vec!["nowhere".to_owned()];
    let error = combine(&options).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NothingSelected),
        "{error:?}"
    );
    // Two adapters see one layer with different sizes.
    let wide = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]});
    write_adapter(
        &folder("wide"),
        &wide,
        &[
            (
                "base_model.model.model.layers.0.a.lora_A.weight",
                Stored::of(Dtype::F32, &[1, 20], &[0.5; 20]),
            ),
            (
                "base_model.model.model.layers.0.a.lora_B.weight",
                Stored::of(Dtype::F32, &[8, 1], &[0.5; 8]),
            ),
        ],
    );
    let error = combine(&combination(&[a, (folder("wide"), 1.0)], &folder("no"))).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NotTogether { .. }),
        "{error:?}"
    );
    assert!(
        error.cases()[0].contains("8 × 10") && error.cases()[0].contains("8 × 20"),
        "{error:?}"
    );
    assert!(!folder("no").exists());
}

#[test]
fn adapters_of_other_models_are_named() {
    let room = tempfile::tempdir().unwrap();
    let diffusion = fixture("combine/kohya/a.safetensors");
    for (other, what) in [
        (
            fixture("lycoris/flux_fused/kohya_dense.safetensors"),
            "flux1",
        ),
        (fixture("combine/peft/w_ties/a0"), "no layer in common"),
    ] {
        for adapters in [[&diffusion, &other], [&other, &diffusion]] {
            let adapters = adapters.map(|path| (path.clone(), 1.0));
            let mut options = combination(&adapters, &room.path().join("out"));
            options.conversion.to = "peft".to_owned();
            let error = combine(&options).unwrap_err();
            assert!(matches!(error.reason(), Reason::OtherModel), "{error:?}");
            let cases = error.cases().join(" ");
            assert!(cases.contains(what), "{cases}");
        }
    }
}

#[test]
fn what_depends_on_the_weight_passes_alone_and_is_refused_beside_others() {
    let room = tempfile::tempdir().unwrap();
    let dora = fixture("peft/cases/lora_dora/adapter");
    let ia3 = fixture("peft/cases/ia3/adapter");
    for (adapters, wanted) in [
        (vec![(dora.clone(), 1.0)], true),
        (vec![(dora.clone(), 0.5)], false),
        (vec![(ia3.clone(), 0.5)], true),
        (vec![(ia3.clone(), 0.5), (ia3, 0.5)], false),
        (
            vec![(dora, 1.0), (fixture("peft/cases/lora/adapter"), 1.0)],
            false,
        ),
    ] {
        let mut options = combination(&adapters, &room.path().join("out"));
        options.conversion.force = true;
        match combine(&options) {
            Ok(_) => assert!(wanted, "{adapters:?}"),
            Err(error) => {
                assert!(!wanted, "{error:?}");
                assert!(
                    matches!(error.reason(), Reason::NotCombined { .. }),
                    "{error:?}"
                );
            }
        }
    }
}

#[test]
fn layers_of_one_base_alone_need_no_base_and_a_selection_is_kept() {
    let room = tempfile::tempdir().unwrap();
    let mut random = Random(2);
    write_lora(
        &room.path().join("a"),
        &[("m", 2, 4.0)],
        Dtype::F32,
        &mut random,
        false,
    );
    let weight = Stored::of(Dtype::F32, &[8, 10], &random.floats(80));
    write_base(&room.path().join("base"), None, &[("m.weight", weight)]);
    let one = Selection {
        path: room.path().join("a"),
        strength: 1.0,
        strength_for: Vec::new(),
    };
    let mut options = combination(&[], &room.path().join("out"));
    options.adapters = vec![one.clone(), one];
    options.conversion.base = Some(room.path().join("base"));
    let report = combine(&options).unwrap();
    assert_eq!(report.modules[0].rank, Some(4));
    assert_eq!(report.modules[0].adapters, 2);
}
