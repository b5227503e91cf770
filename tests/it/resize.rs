//! Adapters of other ranks: what is left out is the least possible, and nothing else changes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use loratool::adapter::delta::Delta;
use loratool::adapter::{Adapter, Module, Order};
use loratool::formats::{Found, ReadOptions};
use loratool::linalg::dense::{ALGEBRAS, Dense};
use loratool::linalg::truncated::Blocks;
use loratool::ops::convert;
use loratool::ops::merge::Control;
use loratool::ops::resize::{Counting, How, Options, Ranks, Report, plan};
use loratool::{Error, Kind, Reason};
use ndarray::{Array2, Axis};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::goldens::{NOT_A_TARGET, cases};
use crate::oracle::{self, Stored};
use crate::support::{Random, fixture, merge, options, write_adapter, write_safetensors};

/// Options for one rule.
pub(crate) fn by(adapter: &Path, ranks: Ranks, output: &Path) -> Options {
    Options {
        conversion: convert::Options {
            adapter: adapter.to_owned(),
            output: output.to_owned(),
            ..convert::Options::default()
        },
        ranks,
        conv_rank: None,
        max_rank: None,
        counting: Counting::Exact,
        threads: None,
        algebra: None,
        device: None,
    }
}

fn run(options: &Options) -> Result<Report, Error> {
    plan(options, &Control::default())?.run(&Control::default())
}

fn resize(adapter: &Path, ranks: Ranks, output: &Path) -> Result<Report, Error> {
    run(&by(adapter, ranks, output))
}

fn read(adapter: &Path, alpha: Option<f64>) -> Adapter {
    let options = ReadOptions {
        alpha,
        ..ReadOptions::default()
    };
    let found = Found::open(adapter).unwrap();
    found
        .read(&options)
        .unwrap_or_else(|e| panic!("{}: {e:?}", adapter.display()))
}

/// What a module adds, as a matrix; of DoRA what it adds before it is scaled.
fn dense(module: &Module) -> Array2<f64> {
    let on = module.geometry().expect("it tells its shape");
    if module.method.order() != Order::Additive {
        let (left, right) = module.method.factors(module, &on).unwrap().unwrap();
        return left.dot(&right);
    }
    let delta = Delta::of(&[(module, 1.0)], on).unwrap();
    let mut values = vec![0.0; on.rows * on.columns];
    delta.fill(0..on.rows, &mut values).unwrap();
    Array2::from_shape_vec((on.rows, on.columns), values).unwrap()
}

fn norm(matrix: &Array2<f64>) -> f64 {
    matrix.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// All singular values, by the full decomposition of the matrix.
fn spectrum(matrix: &Array2<f64>) -> Vec<f64> {
    let algebra: &dyn Dense<f64> = ALGEBRAS[0];
    algebra.thin_svd(matrix.view()).unwrap().s
}

/// The least that a rank can leave out.
fn least(spectrum: &[f64], rank: usize) -> f64 {
    let outside = spectrum.iter().skip(rank).map(|value| value * value);
    outside.sum::<f64>().sqrt()
}

/// Every module with a rank has the ranks that are told, and leaves out what the report says: the least.
fn assert_least(name: &str, old: &Adapter, new: &Adapter, report: &Report) -> usize {
    let mut seen = 0;
    for told in &report.resized {
        let name = format!("{name}: {}", told.path);
        // The parts of a layer that is fused in the file are one below the other.
        let paths: Vec<&String> = std::iter::once(&told.path).chain(&told.parts).collect();
        let of = |adapter: &Adapter, rank: usize| {
            let modules = paths.iter().map(|path| {
                let mut modules = adapter.modules.iter();
                let module = modules
                    .find(|module| module.path == **path && module.method.rank(module).is_some());
                let module = module.unwrap_or_else(|| {
                    let paths = adapter.modules.iter().map(|module| &module.path);
                    panic!("{name} is not in {:?}", paths.collect::<Vec<_>>())
                });
                let known = module.method.rank(module).unwrap();
                // LitGPT has a pair of factors for each part of a fused layer.
                let is_fused = told.path.ends_with("attn.qkv")
                    && adapter.facts.tool.as_deref() == Some("LitGPT");
                let parts = if is_fused { 1..=3 } else { 1..=1 };
                assert!(
                    parts.contains(&(known / rank)) && known % rank == 0,
                    "{name}: {known} {rank}"
                );
                (module.method.name(), dense(module))
            });
            let (methods, matrices): (Vec<_>, Vec<_>) = modules.unzip();
            let views: Vec<_> = matrices.iter().map(|matrix| matrix.view()).collect();
            (methods, ndarray::concatenate(Axis(0), &views).unwrap())
        };
        let ((method, before), (same, after)) = (of(old, told.old_rank), of(new, told.rank));
        assert_eq!(method, same, "{name}");
        let (whole, values) = (norm(&before), spectrum(&before));
        let (left, least) = (norm(&(&before - &after)), least(&values, told.rank));
        // Factors of f32 leave at least this.
        let rounding = 1e-6 * whole;
        let allowed = match least > 1e-2 * whole {
            true => least * (1.0 + 1e-6),
            false => least + rounding,
        };
        assert!(
            left <= allowed,
            "{name}: {left:e}, at least {least:e} of {whole:e}"
        );
        let said = told.residual * whole;
        assert!((said - left).abs() <= rounding, "{name}: {said:e} {left:e}");
        assert!((told.norm - whole).abs() <= 1e-9 * whole, "{name}");
        for (ours, value) in told.singular_values.iter().zip(&values) {
            assert!((ours - value).abs() <= 1e-9 * whole, "{name}");
        }
        let kept = 1.0 - (least / whole).powi(2);
        assert!(whole == 0.0 || (told.energy - kept).abs() <= 1e-9, "{name}");
        seen += usize::from(told.how == How::Decomposed);
    }
    seen
}

/// Folders of PEFT and files of LyCORIS that have modules with a rank, f32.
fn sources() -> Vec<(String, PathBuf)> {
    let peft = cases().into_iter();
    let mut sources: Vec<(String, PathBuf)> = peft
        .map(|case| (case.name.clone(), case.folder.join("adapter")))
        .collect();
    for entry in std::fs::read_dir(fixture("lycoris")).unwrap() {
        let folder = entry.unwrap().path();
        let file = folder.join("adapter.safetensors");
        if file.exists() {
            let name = folder.file_name().unwrap().to_str().unwrap();
            sources.push((name.to_owned(), file));
        }
    }
    for folder in ["lora", "dora"] {
        let path = fixture("mlx").join(folder).join("adapter");
        sources.push((format!("mlx {folder}"), path));
    }
    sources.sort();
    sources
}

/// Whether there is nothing that could be resized, or what the format cannot write in any rank.
fn is_no_matter(error: &Error) -> bool {
    matches!(
        error.reason(),
        Reason::NothingSelected | Reason::Losses { .. } | Reason::NotWritten { .. }
    )
}

#[test]
fn what_is_left_out_is_the_least_possible() {
    let (mut seen, mut done) = (0, BTreeSet::new());
    for (name, source) in sources() {
        let room = tempfile::tempdir().unwrap();
        for rank in [1, 2, 3] {
            let output = room.path().join(format!("rank{rank}"));
            let mut options = by(&source, Ranks::Fixed(rank), &output);
            options.conversion.dtype = Some(loratool::tensor::Float::F32);
            let report = match run(&options) {
                Ok(report) => report,
                Err(error) => {
                    assert!(is_no_matter(&error), "{name}: {error:?}");
                    continue;
                }
            };
            assert!(report.resized.iter().all(|module| module.rank == rank));
            let (old, new) = (read(&source, None), read(&output, report.conversion.alpha));
            seen += assert_least(&format!("{name}, {rank}"), &old, &new, &report);
            done.insert(name.clone());
        }
    }
    assert!(seen > 500, "{seen}");
    for name in [
        "lora_conv",
        "lora_embedding",
        "lora_dora_conv1d",
        "lora_patterns",
        "lora_rslora",
        "lora_conv3",
        "lora_conv3_tucker",
        "lora_conv3_tucker_dora_out",
        "lora_square_dora_in",
        "mlx dora",
        "lora_mha",
    ] {
        assert!(done.contains(name), "{name} is not in {done:?}");
    }
}

/// All bits of all tensors of a file, by name.
fn bits(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = match path.is_dir() {
        true => path.join("adapter_model.safetensors"),
        false => path.to_owned(),
    };
    let tensors = oracle::read(&file).into_iter();
    tensors.map(|(name, tensor)| (name, tensor.bytes)).collect()
}

/// The bytes of a merge.
fn merged(base: &Path, adapter: &Path, output: &Path) -> oracle::Tensors {
    let mut options = options(base, adapter, output);
    options.force = true;
    let report = merge(&options).unwrap_or_else(|e| panic!("{}: {e:?}", adapter.display()));
    let files = report.files.iter().map(|file| match output.is_dir() {
        true => output.join(&file.name),
        false => output.to_owned(),
    });
    files.flat_map(|file| oracle::read(&file)).collect()
}

#[test]
fn at_its_own_rank_no_bit_of_an_adapter_changes() {
    let mut seen = 0;
    for (name, source) in sources() {
        let room = tempfile::tempdir().unwrap();
        let output = room.path().join("out.safetensors");
        let report = match resize(&source, Ranks::Energy(1.0), &output) {
            Ok(report) => report,
            Err(error) => {
                assert!(is_no_matter(&error), "{name}: {error:?}");
                continue;
            }
        };
        // A factor that is wider than a side of its layer has nothing to say there; PEFT has two names for a layer.
        let same = report.resized.iter().all(|module| module.how == How::Same);
        if !same || name.starts_with("mlx") || name == "lora_mha" {
            assert!(report.total.residual < 1e-6, "{name}");
            continue;
        }
        let (old, mut new) = (bits(&source), bits(&output));
        // What PEFT and kohya leave unsaid is said.
        new.retain(|key, _| old.contains_key(key) || !key.ends_with("alpha"));
        assert_eq!(
            old.keys().collect::<Vec<_>>(),
            new.keys().collect::<Vec<_>>(),
            "{name}"
        );
        assert!(old == new, "{name}");
        seen += 1;
    }
    assert!(seen > 40, "{seen}");
}

#[test]
fn a_larger_rank_is_zeros_and_merges_to_the_same_bytes() {
    let mut seen = 0;
    for case in cases() {
        if NOT_A_TARGET.contains(&&*case.name) {
            continue;
        }
        let room = tempfile::tempdir().unwrap();
        let (source, output) = (case.folder.join("adapter"), room.path().join("out"));
        let report = match resize(&source, Ranks::Fixed(9), &output) {
            Ok(report) => report,
            Err(error) => {
                assert!(is_no_matter(&error), "{}: {error:?}", case.name);
                continue;
            }
        };
        let larger = |module: &loratool::ops::resize::ResizedReport| {
            (module.how == How::Filled) == (module.old_rank < 9) && module.residual == 0.0
        };
        assert!(report.resized.iter().all(larger), "{}", case.name);
        let to = room.path().join("merged");
        let (ours, before) = (
            merged(&case.base, &output, &to),
            merged(&case.base, &source, &to),
        );
        assert!(ours == before, "{}", case.name);
        // And back again, by the decomposition.
        let back = room.path().join("back");
        let rank = report.resized.iter().map(|module| module.old_rank).max();
        let report = resize(&output, Ranks::Fixed(rank.unwrap()), &back).unwrap();
        let residual = report.total.residual;
        assert!(residual < 4e-3, "{}: {residual:e}", case.name);
        seen += 1;
    }
    assert!(seen > 30, "{seen}");
}

#[test]
fn what_has_no_rank_stays_and_is_told() {
    let mut kinds = BTreeSet::new();
    for (case, part) in [
        ("lora_modules_to_save", "lm_head"),
        ("lora_bias_all", "bias"),
        ("lora_trainable_tokens", "token_adapter"),
        ("lora_lora_bias", "lora_B.bias"),
        ("lora_dora", "magnitude"),
    ] {
        let room = tempfile::tempdir().unwrap();
        let source = fixture(&format!("peft/cases/{case}/adapter"));
        let output = room.path().join("out");
        resize(&source, Ranks::Fixed(2), &output).unwrap();
        let (old, new) = (bits(&source), bits(&output));
        assert_eq!(
            old.keys().collect::<Vec<_>>(),
            new.keys().collect::<Vec<_>>(),
            "{case}"
        );
        for (name, bytes) in &old {
            let is_factor = name.contains("lora_A") || name.ends_with("lora_B.weight");
            assert_eq!(new[name] == *bytes, !is_factor, "{case}: {name}");
            kinds.extend(name.contains(part).then_some(case));
        }
    }
    assert_eq!(kinds.len(), 5, "{kinds:?}");
    // Differences and norms of LyCORIS beside factors, and factors that were not chosen.
    let room = tempfile::tempdir().unwrap();
    let (file, output) = (
        room.path().join("in.safetensors"),
        room.path().join("out.safetensors"),
    );
    let layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to";
    let mut random = Random(3);
    let mut tensor = |shape: &[usize]| {
        let values = random.floats(shape.iter().product());
        Stored::of(Dtype::F32, shape, &values)
    };
    let mut tensors = vec![(format!("{layer}_out_0.diff"), tensor(&[4, 4]))];
    for end in ["q", "k"] {
        tensors.push((format!("{layer}_{end}.lora_down.weight"), tensor(&[3, 4])));
        tensors.push((format!("{layer}_{end}.lora_up.weight"), tensor(&[4, 3])));
        let alpha = Stored::of(Dtype::F32, &[], &[1.5]);
        tensors.push((format!("{layer}_{end}.alpha"), alpha));
    }
    let all: Vec<(&str, Stored)> = tensors.iter().map(|(n, t)| (&**n, t.clone())).collect();
    write_safetensors(&file, &all);
    let mut options = by(&file, Ranks::Fixed(2), &output);
    options.conversion.only = vec!["to_(q|out)".to_owned()];
    let report = run(&options).unwrap();
    let kept: Vec<(&str, &str)> = report.kept.iter().map(|k| (&*k.item, &*k.text)).collect();
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert!(
        kept.iter()
            .any(|(item, text)| item.ends_with("out_0") && text.contains("no rank"))
    );
    assert!(
        kept.iter()
            .any(|(item, text)| item.ends_with("to_k") && text.contains("not chosen"))
    );
    let (old, new) = (oracle::read(&file), oracle::read(&output));
    for (name, tensor) in &old {
        assert_eq!(new[name] != *tensor, name.contains("to_q"), "{name}");
    }
    // The multiplier stays.
    assert_eq!(new[&format!("{layer}_q.alpha")].values(), [1.0]);
}

/// An adapter of PEFT with one layer of singular values 8, 4, 2 and 1, times the scale.
fn known(folder: &Path) -> PathBuf {
    let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["a"]});
    let place = |rows: usize, columns: usize, values: [f64; 4]| {
        let mut all = vec![0.0; rows * columns];
        for (index, value) in values.into_iter().enumerate() {
            all[index * columns + index] = value;
        }
        Stored::of(Dtype::F32, &[rows, columns], &all)
    };
    let path = folder.join("known");
    // A column of B and a row of A exchanged: the order in the file says nothing.
    write_adapter(
        &path,
        &config,
        &[
            (
                "base_model.model.a.lora_A.weight",
                place(4, 6, [1.0, -2.0, 1.0, 4.0]),
            ),
            (
                "base_model.model.a.lora_B.weight",
                place(5, 4, [1.0, 1.0, 4.0, 2.0]),
            ),
        ],
    );
    path
}

#[test]
fn rules_take_exactly_the_ranks_that_they_are_defined_by() {
    let room = tempfile::tempdir().unwrap();
    let adapter = known(room.path());
    // Squares 64, 16, 4 and 1 of 85; values 8, 4, 2 and 1 of 15.
    let rules = [
        (Ranks::Energy(0.75), 1),
        (Ranks::Energy(0.76), 2),
        (Ranks::Energy(0.94), 2),
        (Ranks::Energy(0.95), 3),
        (Ranks::Energy(0.988), 3),
        (Ranks::Energy(0.989), 4),
        (Ranks::Energy(1e-9), 1),
        (Ranks::Norm(0.867), 1),
        (Ranks::Norm(0.868), 2),
        (Ranks::Norm(0.97), 2),
        (Ranks::Norm(0.971), 3),
        (Ranks::Norm(1.0), 4),
        (Ranks::Sum(0.53), 1),
        (Ranks::Sum(0.54), 2),
        (Ranks::Sum(0.79), 2),
        (Ranks::Sum(0.81), 3),
        (Ranks::Sum(0.93), 3),
        (Ranks::Sum(0.94), 4),
        (Ranks::Ratio(1.0), 1),
        (Ranks::Ratio(1.99), 1),
        (Ranks::Ratio(2.01), 2),
        (Ranks::Ratio(3.99), 2),
        (Ranks::Ratio(4.01), 3),
        (Ranks::Ratio(7.99), 3),
        (Ranks::Ratio(8.01), 4),
    ];
    for (ranks, rank) in rules {
        let mut options = by(&adapter, ranks, &room.path().join("out"));
        options.conversion.force = true;
        let report = run(&options).unwrap();
        let told = &report.resized[0];
        assert_eq!((told.rank, told.reached), (rank, true), "{ranks:?}");
        let wanted: Vec<f64> = [8.0, 4.0, 2.0, 1.0].map(|value| 2.0 * value).to_vec();
        for (ours, wanted) in told.singular_values.iter().zip(&wanted) {
            assert!((ours - wanted).abs() < 1e-13);
        }
        // No more than is allowed, and that is told.
        options.max_rank = Some(2);
        let told = &run(&options).unwrap().resized[0];
        assert_eq!(
            (told.rank, told.reached),
            (rank.min(2), rank <= 2),
            "{ranks:?}"
        );
    }
}

#[test]
fn convolutions_have_a_rank_of_their_own() {
    let room = tempfile::tempdir().unwrap();
    let source = fixture("resize/kohya.safetensors");
    let mut options = by(
        &source,
        Ranks::Fixed(4),
        &room.path().join("out.safetensors"),
    );
    options.conv_rank = Some(2);
    let rank = |report: &Report, end: &str| {
        let mut modules = report.resized.iter();
        modules
            .find(|module| module.path.ends_with(end))
            .unwrap()
            .rank
    };
    let report = run(&options).unwrap();
    assert_eq!(rank(&report, "conv1"), 2);
    assert_eq!(rank(&report, "proj_in"), 4, "its kernel is one element");
    assert_eq!(rank(&report, "to_q"), 4);
    options.conversion.force = true;
    options.ranks = Ranks::Energy(1.0);
    let report = run(&options).unwrap();
    assert_eq!((rank(&report, "conv1"), rank(&report, "to_k")), (2, 8));
    // What adds nothing has one rank.
    assert_eq!(rank(&report, "to_out_0"), 1);
    options.max_rank = Some(3);
    let report = run(&options).unwrap();
    assert_eq!((rank(&report, "conv1"), rank(&report, "to_k")), (2, 3));
    options.conv_rank = None;
    assert_eq!(rank(&run(&options).unwrap(), "conv1"), 3);
}

#[test]
fn ranks_and_products_are_those_of_sd_scripts_where_it_is_asked_for() {
    let room = tempfile::tempdir().unwrap();
    let source = fixture("resize/kohya.safetensors");
    let expected = oracle::json(&fixture("resize/expected.json"));
    let products = oracle::read(&fixture("resize/expected.safetensors"));
    let (mut seen, mut grown) = (0, 0);
    for (number, asked) in expected["runs"].as_array().unwrap().iter().enumerate() {
        let value = asked["value"].as_f64().unwrap_or(f64::NAN);
        let whole = |field: &str| asked[field].as_u64().map(|number| number as usize);
        let ranks = match asked["rule"].as_str() {
            Some("sv_ratio") => Ranks::Ratio(value),
            Some("sv_fro") => Ranks::Norm(value),
            Some("sv_cumulative") => Ranks::Sum(value),
            _ => Ranks::Fixed(whole("rank").unwrap()),
        };
        let output = room.path().join(format!("{number}.safetensors"));
        let mut options = by(&source, ranks, &output);
        options.counting = Counting::SdScripts;
        options.max_rank = whole("rank");
        options.conv_rank = whole("conv_rank");
        let report = run(&options).unwrap();
        let resized = read(&output, None);
        assert_eq!(report.resized.len(), 6);
        for told in &report.resized {
            let name = format!("{ranks:?}: {}", told.path);
            assert_eq!(asked["ranks"][&told.path], told.rank, "{name}");
            let mut modules = resized.modules.iter();
            let module = modules.find(|module| module.path == told.path).unwrap();
            let theirs = products[&format!("{number}/{}", told.path)].values();
            let ours = dense(module);
            let largest = theirs
                .iter()
                .fold(0.0f64, |all, value| all.max(value.abs()));
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= 2e-6 * largest, "{name}: {a} {b}");
            }
            grown += usize::from(told.rank > told.old_rank);
            seen += 1;
        }
    }
    assert_eq!((seen, grown > 0), (66, true));
}

/// One adapter of a few kinds of models, and what tells its names.
pub(crate) fn origins() -> Vec<(PathBuf, Option<PathBuf>, Option<&'static str>)> {
    let flux = |name: &str| fixture("formats/flux").join(name);
    let case = |name: &str| fixture("peft/cases").join(name).join("adapter");
    let llama = || Some(fixture("peft/bases/llama"));
    vec![
        (case("lora_all_linear"), llama(), None),
        (case("lora"), llama(), None),
        (fixture("lycoris/unet_attn/kohya.safetensors"), None, None),
        (
            flux("diffusers.safetensors"),
            Some(flux("base.safetensors")),
            Some("flux1"),
        ),
        (
            flux("xlabs.safetensors"),
            Some(flux("base.safetensors")),
            Some("flux1"),
        ),
        (
            flux("bfl-control.safetensors"),
            Some(flux("base.safetensors")),
            Some("flux1"),
        ),
    ]
}

#[test]
fn every_format_that_is_written_comes_out_as_it_went_in() {
    let mut done = BTreeSet::new();
    for target in convert::targets() {
        for (source, base, family) in origins() {
            let room = tempfile::tempdir().unwrap();
            let name = format!("{} as {}", source.display(), target.id());
            let there = convert::Options {
                adapter: source.clone(),
                to: target.id().to_owned(),
                output: room.path().join("there"),
                base: base.clone(),
                family: family.map(str::to_owned),
                ..convert::Options::default()
            };
            let Ok(written) = convert::plan(&there) else {
                continue;
            };
            let alpha = written.run(&Control::default()).unwrap().alpha;
            let mut options = by(&there.output, Ranks::Fixed(2), &room.path().join("out"));
            options.conversion.base = base;
            options.conversion.family = there.family;
            options.conversion.read.alpha = alpha;
            let report = run(&options).unwrap_or_else(|e| panic!("{name}: {e:?}"));
            let told = &report.conversion;
            assert_eq!(told.from, told.to, "{name}");
            // A file of one spelling may be one of another as well, which has other names.
            if told.from != target.id() {
                continue;
            }
            assert!(told.bytes < report.adapter_bytes, "{name}");
            let (old, new) = (
                read(&there.output, alpha),
                read(&options.conversion.output, told.alpha),
            );
            if assert_least(&name, &old, &new, &report) > 0 {
                done.insert(target.id());
            }
        }
    }
    let missing = convert::targets().filter(|target| !done.contains(target.id()));
    let missing: Vec<&str> = missing.map(|target| target.id()).collect();
    assert_eq!(missing, ["simo", "textual-inversion", "webui-embedding"]);
}

#[test]
fn names_of_layers_stay_in_their_own_format() {
    for source in [
        "lycoris/unet_attn/kohya.safetensors",
        "lycoris/unet_attn/kohya_sgm.safetensors",
        "lycoris/unet_attn/diffusers_mid.safetensors",
        "formats/flux/kohya.safetensors",
        "formats/flux/kohya-split.safetensors",
        "formats/flux/onetrainer-kohya.safetensors",
        "lycoris/lora_conv3_dora_in/adapter.safetensors",
    ] {
        let room = tempfile::tempdir().unwrap();
        let source = fixture(source);
        let output = room.path().join("out.safetensors");
        let report = resize(&source, Ranks::Fixed(1), &output).unwrap();
        let name = source.display();
        assert!(report.conversion.bytes < report.adapter_bytes, "{name}");
        let (old, mut new) = (bits(&source), bits(&output));
        new.retain(|key, _| old.contains_key(key) || !key.ends_with(".alpha"));
        assert_eq!(
            old.keys().collect::<Vec<_>>(),
            new.keys().collect::<Vec<_>>(),
            "{name}"
        );
    }
}

#[test]
fn another_format_is_written_where_it_is_asked_for() {
    let room = tempfile::tempdir().unwrap();
    let source = fixture("lycoris/unet_attn/kohya.safetensors");
    let mut options = by(&source, Ranks::Fixed(2), &room.path().join("out"));
    options.conversion.to = "peft".to_owned();
    let report = run(&options).unwrap();
    let config = oracle::json(&room.path().join("out/adapter_config.json"));
    assert_eq!((&*report.conversion.to, &config["r"]), ("peft", &json!(2)));
}

#[test]
fn patterns_of_ranks_and_alphas_say_what_the_factors_are() {
    let room = tempfile::tempdir().unwrap();
    for case in cases() {
        if !["lora_patterns", "lora_rslora", "lora_all_linear"].contains(&&*case.name) {
            continue;
        }
        let output = room.path().join(&case.name);
        resize(&case.folder.join("adapter"), Ranks::Energy(0.85), &output).unwrap();
        let config = oracle::json(&output.join("adapter_config.json"));
        let tensors = oracle::read(&output.join("adapter_model.safetensors"));
        let patterns = config["rank_pattern"].as_object().unwrap();
        assert!(!patterns.is_empty());
        let mut ranks = BTreeSet::new();
        for (name, tensor) in tensors.iter().filter(|(name, _)| name.contains("lora_A")) {
            let path = name.strip_prefix("base_model.model.").unwrap();
            let path = path.strip_suffix(".lora_A.weight").unwrap();
            let said = patterns.get(path).unwrap_or(&config["r"]);
            assert_eq!(*said, json!(tensor.shape[0]), "{name}");
            ranks.insert(tensor.shape[0]);
        }
        assert!(ranks.len() > 1, "{ranks:?}");
        // The definition of a merge agrees, with scales from the configuration alone.
        let base = oracle::read(&case.base.join("model.safetensors"));
        let ours = merged(&case.base, &output, &room.path().join("merged"));
        let deltas = oracle::deltas(&tensors, &config, &base, "llama");
        assert!(!deltas.is_empty());
        for (name, delta) in &deltas {
            let expected =
                oracle::merged(&base[name], ours[name].dtype, std::slice::from_ref(delta));
            assert_eq!(
                oracle::off(&ours[name], &expected),
                0,
                "{}: {name}",
                case.name
            );
        }
    }
}

#[test]
fn a_size_of_file_is_kept_and_nearly_used() {
    let room = tempfile::tempdir().unwrap();
    let sources = [
        fixture("peft/cases/lora_all_linear/adapter"),
        fixture("peft/cases/lora_dora/adapter"),
        fixture("lycoris/unet_attn/kohya.safetensors"),
        fixture("mlx/lora/adapter"),
    ];
    for source in sources {
        let output = room.path().join("out");
        let at = |ranks| {
            let mut options = by(&source, ranks, &output);
            options.conversion.force = true;
            run(&options).unwrap()
        };
        let (smallest, whole) = (at(Ranks::Fixed(1)), at(Ranks::Energy(1.0)));
        let (least, most) = (smallest.conversion.bytes, whole.conversion.bytes);
        let mut before = 0.0;
        for budget in [
            least,
            (2 * least + most) / 3,
            (least + most) / 2,
            (least + 3 * most) / 4,
        ] {
            let report = at(Ranks::Budget(budget));
            let name = format!("{}, {budget}", source.display());
            let (bytes, told) = (report.conversion.bytes, &report.resized);
            assert!(bytes <= budget, "{name}: {bytes}");
            assert_eq!(
                std::fs::metadata(output.join(file_in(&output)))
                    .unwrap()
                    .len(),
                bytes
            );
            // The cheapest rank that is not taken does not fit; a format of one rank takes one of each.
            let one = |module: &loratool::ops::resize::ResizedReport| {
                let inner: usize = module.shape[1..].iter().product();
                4 * (module.shape[0] + inner) as u64
            };
            let steps = told
                .iter()
                .filter(|module| module.rank < module.old_rank)
                .map(one);
            let step = match report.conversion.to.starts_with("mlx") {
                true => steps.sum::<u64>(),
                false => steps.max().unwrap_or(0),
            };
            assert!(budget - bytes <= step + 64, "{name}: {bytes}, {step}");
            let energy = report.total.energy;
            assert!(energy >= before, "{name}: {energy} after {before}");
            before = energy;
        }
        assert_eq!(at(Ranks::Budget(most)).conversion.bytes, most);
        // A rank of each module is the least that there is.
        let mut options = by(&source, Ranks::Budget(least - 1), &room.path().join("none"));
        options.conversion.force = true;
        let error = run(&options).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error:?}");
        assert!(error.to_string().contains(&least.to_string()), "{error}");
        assert!(!room.path().join("none").exists());
    }
}

/// The name of the file of tensors in a folder.
fn file_in(folder: &Path) -> PathBuf {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| PathBuf::from(entry.unwrap().file_name()));
    let mut files = names.filter(|name| name.extension().is_some_and(|e| e == "safetensors"));
    files.next().unwrap()
}

#[test]
fn a_size_leaves_out_less_than_one_rank_for_all() {
    let room = tempfile::tempdir().unwrap();
    let source = fixture("peft/cases/lora_all_linear/adapter");
    let fixed = resize(&source, Ranks::Fixed(2), &room.path().join("fixed")).unwrap();
    let size = Ranks::Budget(fixed.conversion.bytes);
    let chosen = resize(&source, size, &room.path().join("chosen")).unwrap();
    let (fixed, chosen) = (fixed.total.residual, chosen.total.residual);
    assert!(chosen < fixed, "{chosen} {fixed}");
}

#[test]
fn shared_embeddings_stay_shared() {
    for case in cases() {
        if !NOT_A_TARGET.contains(&&*case.name) {
            continue;
        }
        let room = tempfile::tempdir().unwrap();
        let (source, output) = (case.folder.join("adapter"), room.path().join("out"));
        let to = room.path().join("merged");
        let try_merge = |adapter: &Path| {
            let mut options = options(&case.base, adapter, &to);
            options.force = true;
            merge(&options).map(|report| {
                let kinds = report.notices.iter().map(|notice| notice.kind);
                kinds.collect::<BTreeSet<_>>()
            })
        };
        resize(&source, Ranks::Fixed(2), &output).unwrap();
        match (try_merge(&source), try_merge(&output)) {
            (Ok(before), Ok(after)) => assert_eq!(before, after, "{}", case.name),
            (Err(before), Err(after)) => assert_eq!(before.kind(), after.kind(), "{}", case.name),
            (before, after) => panic!("{}: {before:?} {after:?}", case.name),
        }
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let room = tempfile::tempdir().unwrap();
    let source = fixture("peft/cases/lora_all_linear/adapter");
    let with = |threads: usize| {
        let output = room.path().join(format!("{threads}"));
        let mut options = by(&source, Ranks::Energy(0.8), &output);
        options.threads = Some(threads);
        run(&options).unwrap();
        std::fs::read(output.join("adapter_model.safetensors")).unwrap()
    };
    assert!(with(1) == with(3));
}

#[test]
fn numbers_that_mean_nothing_are_wrong_calls() {
    let room = tempfile::tempdir().unwrap();
    let source = fixture("peft/cases/lora/adapter");
    let wrong = [
        Ranks::Fixed(0),
        Ranks::Fixed(usize::MAX),
        Ranks::Energy(0.0),
        Ranks::Energy(1.5),
        Ranks::Energy(f64::NAN),
        Ranks::Norm(-0.5),
        Ranks::Norm(f64::NAN),
        Ranks::Sum(1.01),
        Ranks::Ratio(0.5),
        Ranks::Ratio(f64::INFINITY),
        Ranks::Ratio(f64::NAN),
        Ranks::Budget(10),
    ];
    let output = room.path().join("out");
    let refused = |options: &Options| {
        let error = run(options).unwrap_err();
        assert!(
            matches!(error.reason(), Reason::BadOption { .. }),
            "{error:?}"
        );
        assert_eq!(error.kind(), Kind::Usage, "{error:?}");
    };
    for ranks in wrong {
        refused(&by(&source, ranks, &output));
    }
    let good = by(&source, Ranks::Energy(0.9), &output);
    refused(&Options {
        conv_rank: Some(0),
        ..good.clone()
    });
    refused(&Options {
        max_rank: Some(0),
        ..good.clone()
    });
    refused(&Options {
        algebra: Some("none".to_owned()),
        ..good.clone()
    });
    refused(&Options {
        counting: Counting::SdScripts,
        ..good.clone()
    });
    let mut nothing = good.clone();
    nothing.conversion.only = vec!["nowhere".to_owned()];
    let error = run(&nothing).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NothingSelected),
        "{error:?}"
    );
    let vectors = by(&fixture("peft/cases/ia3/adapter"), Ranks::Fixed(2), &output);
    let error = run(&vectors).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::NothingSelected),
        "{error:?}"
    );
    assert_eq!(std::fs::read_dir(room.path()).unwrap().count(), 0);
    // What is there is not replaced, and that is told before the arithmetic.
    std::fs::write(&output, "mine").unwrap();
    assert_eq!(run(&good).unwrap_err().kind(), Kind::Output);
    assert_eq!(std::fs::read(&output).unwrap(), b"mine");
}

#[test]
fn values_that_are_not_finite_are_an_error_that_names_the_module() {
    let room = tempfile::tempdir().unwrap();
    let config =
        json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a", "b"]});
    for wrong in [f64::NAN, f64::INFINITY] {
        let adapter = room.path().join(format!("{wrong}"));
        let down = |value| Stored::of(Dtype::F32, &[2, 3], &[1.0, 2.0, value, 4.0, 5.0, 6.0]);
        let up = Stored::of(Dtype::F32, &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        write_adapter(
            &adapter,
            &config,
            &[
                ("base_model.model.a.lora_A.weight", down(3.0)),
                ("base_model.model.a.lora_B.weight", up.clone()),
                ("base_model.model.b.lora_A.weight", down(wrong)),
                ("base_model.model.b.lora_B.weight", up),
            ],
        );
        for ranks in [
            Ranks::Fixed(1),
            Ranks::Fixed(2),
            Ranks::Fixed(3),
            Ranks::Energy(0.9),
        ] {
            let error = resize(&adapter, ranks, &room.path().join("out")).unwrap_err();
            assert_eq!(error.kind(), Kind::NonFinite, "{error:?}");
            assert_eq!(error.item(), Some("b"), "{error:?}");
        }
        assert!(!room.path().join("out").exists());
    }
}

#[test]
fn a_stopped_run_leaves_nothing() {
    let room = tempfile::tempdir().unwrap();
    let control = Control::default();
    control
        .cancel
        .store(true, std::sync::atomic::Ordering::Relaxed);
    let options = by(
        &fixture("peft/cases/lora/adapter"),
        Ranks::Fixed(2),
        &room.path().join("out"),
    );
    let error = plan(&options, &control).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted, "{error:?}");
    assert_eq!(std::fs::read_dir(room.path()).unwrap().count(), 0);
}

#[test]
fn the_report_is_a_conversion_with_ranks() {
    let room = tempfile::tempdir().unwrap();
    let source = fixture("peft/cases/lora_patterns/adapter");
    let report = resize(&source, Ranks::Fixed(2), &room.path().join("out")).unwrap();
    let said: Value = serde_json::to_value(&report).unwrap();
    assert_eq!((&said["to"], &said["schema"]), (&json!("peft"), &json!(1)));
    let modules = said["resized"].as_array().unwrap();
    assert_eq!(json!(modules.len()), said["modules"]);
    let hows: BTreeSet<&str> = modules.iter().map(|m| m["how"].as_str().unwrap()).collect();
    assert_eq!(hows, BTreeSet::from(["decomposed", "same"]));
    assert_eq!(said["total"]["ranks"], json!(2 * modules.len()));
}
