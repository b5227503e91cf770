//! Taking adapters out without an undo file: one rounding, and a bound that holds.

use std::path::{Path, PathBuf};

use loratool::checkpoint::Checkpoint;
use loratool::notice::NoticeKind;
use loratool::ops::merge::{Control, Options};
use loratool::ops::unmerge::{self, Report, Taken};
use loratool::tensor::Float;
use loratool::{Kind, Reason, Result};

use crate::hostile_support::Room;
use crate::oracle::{self, Tensors};
use crate::support::{fixture, merge, options, selection};

fn taken(options: &Options, output: &Path) -> unmerge::Options {
    let adapters = options.adapters.iter().map(|own| Taken {
        path: own.path.clone(),
        strength: Some(own.strength),
        strength_for: own.strength_for.clone(),
    });
    unmerge::Options {
        merged: options.output.clone(),
        adapters: adapters.collect(),
        output: output.to_owned(),
        force: true,
        ..unmerge::Options::default()
    }
}

fn run(options: &unmerge::Options) -> Result<Report> {
    unmerge::plan(options)?.run(&Control::default())
}

fn case(name: &str) -> PathBuf {
    fixture("peft/cases").join(name).join("adapter")
}

/// All tensors of a checkpoint of one file.
fn tensors(folder: &Path) -> Tensors {
    oracle::read(&folder.join("model.safetensors"))
}

/// Asserts that every tensor lies within its bound, and that the share that differs is about the one that was
/// expected; returns elements and differing ones.
fn lies_within(base: &Tensors, restored: &Tensors, report: &Report) -> (f64, f64, f64) {
    let (mut all, mut differing, mut expected) = (0.0, 0.0, 0.0);
    for bound in &report.bounds {
        let (base, restored) = (&base[&bound.tensor], &restored[&bound.tensor]);
        assert_eq!(bound.impossible, 0, "{}", bound.tensor);
        let pairs = || base.values().into_iter().zip(restored.values());
        for (was, is) in pairs() {
            let off = (was - is).abs();
            assert!(
                off <= bound.most,
                "{}: {off:e} of {:e}",
                bound.tensor,
                bound.most
            );
        }
        let count = pairs().count() as f64;
        all += count;
        differing += pairs().filter(|(was, is)| was != is).count() as f64;
        expected += bound.differing * count;
    }
    (all, differing, expected)
}

#[test]
fn what_is_subtracted_lies_within_its_bound_of_the_base() {
    let room = Room::new();
    for (base, adapter) in [
        ("llama_bfloat16", "lora_bf16"),
        ("llama_float16", "lora_fp16"),
        ("llama", "lora_all_linear"),
        ("llama", "ia3"),
        ("gpt2", "ia3_conv1d"),
        ("gpt2", "lora_conv1d_gpt2"),
        ("conv", "lora_conv"),
    ] {
        let base = fixture("peft/bases").join(base);
        for strength in [1.0, 0.3, -1.0] {
            let mut options = options(&base, &case(adapter), &room.path("merged"));
            options.adapters[0].strength = strength;
            options.force = true;
            merge(&options).unwrap();
            let report = run(&taken(&options, &room.path("back"))).unwrap();
            assert!(!report.exact && !report.bounds.is_empty());
            let (base, restored) = (tensors(&base), tensors(&room.path("back")));
            let (all, differing, expected) = lies_within(&base, &restored, &report);
            let spread = 6.0 * (expected + 1.0).sqrt();
            assert!(
                differing <= expected + spread,
                "{adapter} {strength}: {differing} of {all} differ, {expected} were expected"
            );
            for (name, tensor) in &base {
                if !report.bounds.iter().any(|bound| bound.tensor == *name) {
                    assert!(tensor.bytes == restored[name].bytes, "{name}");
                }
            }
        }
    }
}

#[test]
fn several_adapters_come_out_in_the_order_opposite_to_the_merge() {
    let room = Room::new();
    let base = fixture("peft/bases/llama");
    let mut options = options(&base, &case("lora"), &room.path("merged"));
    options.adapters[0].strength = 0.5;
    options.adapters[0].strength_for = vec![("v_proj".to_owned(), 0.0)];
    options.adapters.push(selection(&case("ia3"), 0.7));
    options
        .adapters
        .push(selection(&case("lora_all_linear"), -0.2));
    merge(&options).unwrap();
    let report = run(&taken(&options, &room.path("back"))).unwrap();
    lies_within(&tensors(&base), &tensors(&room.path("back")), &report);
    assert_eq!(report.adapters.len(), 3);
}

#[test]
fn what_has_no_inverse_is_refused_by_name_or_left_as_it_is() {
    let room = Room::new();
    let base = fixture("peft/bases/llama");
    for (adapter, cases) in [
        ("lora_dora", "has no inverse"),
        ("lora_modules_to_save", "the whole tensor was replaced"),
        ("lora_trainable_tokens", "rows of it were replaced"),
    ] {
        let mut options = options(&base, &case(adapter), &room.path("merged"));
        options.force = true;
        merge(&options).unwrap();
        let mut back = taken(&options, &room.path("back"));
        let error = run(&back).map(drop).unwrap_err();
        assert!(
            matches!(error.reason(), Reason::NoInverse { .. }),
            "{error}"
        );
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(
            error.cases().iter().any(|case| case.contains(cases)),
            "{error:?}"
        );
        back.allow_kept = true;
        match run(&back) {
            Ok(report) => {
                let kept = |kind| report.notices.iter().any(|notice| notice.kind == kind);
                assert!(kept(NoticeKind::NotTakenOut));
            }
            // Nothing is left to take out.
            Err(error) => assert!(matches!(error.reason(), Reason::NothingSelected), "{error}"),
        }
    }
}

#[test]
fn another_strength_than_that_of_the_merge_is_told_where_no_base_could_give_the_values() {
    let room = Room::new();
    let base = fixture("peft/bases/llama_bfloat16");
    let mut options = options(&base, &case("lora_bf16"), &room.path("merged"));
    // In f32 hardly any value is what a base of 16 bits becomes.
    options.dtype = Some(Float::F32);
    merge(&options).unwrap();
    let mut back = taken(&options, &room.path("back"));
    back.dtype = Some(Float::BF16);
    let right = run(&back).unwrap();
    assert!(
        right
            .notices
            .iter()
            .all(|notice| notice.kind != NoticeKind::NotThisMerge)
    );
    assert_eq!(
        tensors(&room.path("back")).keys().count(),
        Checkpoint::open(&base).unwrap().tensors().count()
    );
    let (found, wanted) = (tensors(&room.path("back")), tensors(&base));
    for (name, tensor) in &wanted {
        assert!(found[name].bytes == tensor.bytes, "{name}");
    }
    back.adapters[0].strength = Some(0.9);
    let wrong = run(&back).unwrap();
    assert!(
        wrong
            .notices
            .iter()
            .any(|notice| notice.kind == NoticeKind::NotThisMerge)
    );
}
