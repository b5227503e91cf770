//! Files of other people: a right description or a clear refusal for each of them.

use std::path::{Path, PathBuf};

use loratool::Kind;
use loratool::formats::ReadOptions;
use loratool::ops::inspect::{Inspection, Options, inspect};

/// The folder with the files, which is shared beside the project and not part of it.
pub(crate) fn folder() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/real-adapters");
    if folder.is_dir() {
        return Some(folder);
    }
    println!("skipped: ../shared/real-adapters is not there");
    None
}

fn described(name: &str) -> Option<Inspection> {
    let folder = folder()?;
    Some(
        inspect(&folder.join(name), &Default::default())
            .unwrap_or_else(|error| panic!("{name}: {error}")),
    )
}

/// Name, modules, ranks, scale, and a word that some notice holds.
const READ: &[(&str, usize, &[usize], f64, &str)] = &[
    ("aitoolkit-flux-partial-f16", 4, &[16], 1.0, ""),
    ("diffusers-mid-sd15", 128, &[4], 1.0, ""),
    ("diffusers-new-sd15-metadata", 96, &[4], 4.0, ""),
    ("diffusers-new-sd15-peft-twin", 96, &[4], 4.0, ""),
    ("diffusers-old-sd15-st", 128, &[4], 1.0, ""),
    ("mlx-st-gemma2b-4layers", 8, &[8], 10.0, ""),
    ("peft-bert-r1-dupmods", 24, &[1], 1.0, ""),
    ("peft-bert-seqcls", 24, &[8], 4.0, ""),
    ("peft-bloom560m-r4", 24, &[4], 0.25, "trains biases"),
    ("peft-distilbert-020", 12, &[8], 2.0, ""),
    ("peft-distilbert-r4-nohead", 12, &[4], 4.0, ""),
    ("peft-distilgpt2-nofan", 6, &[8], 4.0, ""),
    ("peft-gemma3-270m", 72, &[4], 4.0, ""),
    ("peft-gpt2-dora", 24, &[8], 2.0, ""),
    ("peft-gpt2-noconfig", 12, &[8], 4.0, ""),
    ("peft-gpt2-r4-a16", 36, &[4], 4.0, "trains biases"),
    ("peft-gpt2-r8-a2", 12, &[8], 0.25, "trains biases"),
    ("peft-gpt2-seqcls", 36, &[8], 4.0, ""),
    ("peft-gpt2-seqcls-implicit-head", 12, &[8], 2.0, ""),
    ("peft-minilm", 12, &[8], 2.0, ""),
    ("peft-moe-attn-tokencls", 32, &[16], 2.0, ""),
    ("peft-opencalm1b-f16-r1", 24, &[1], 32.0, ""),
    ("peft-opt125m-bf16", 24, &[16], 2.0, ""),
    ("peft-roberta-feature-plus-head", 24, &[8], 2.0, ""),
    ("peft-sd15-unet", 128, &[4], 4.0, ""),
    ("peft-smollm2", 60, &[8], 2.0, ""),
    ("peft-t5small", 36, &[8], 2.0, ""),
    ("peft-tinyllama-bin", 44, &[4], 8.0, ""),
    ("peft-vit-fc", 36, &[8], 2.0, ""),
    ("peft-whisper-small", 72, &[8], 4.0, ""),
    ("peft02-bloom560m-mergedlinear", 24, &[16], 2.0, ""),
];

#[test]
fn every_adapter_that_is_read_is_described_as_it_will_be_applied() {
    for (name, modules, ranks, scale, word) in READ {
        let Some(found) = described(name) else { return };
        let adapter = found
            .adapter
            .as_ref()
            .unwrap_or_else(|| panic!("{name}: {:?}", found.problem));
        assert_eq!(adapter.modules.len(), *modules, "{name}");
        assert_eq!(
            adapter.ranks.keys().copied().collect::<Vec<_>>(),
            *ranks,
            "{name}"
        );
        assert!(
            adapter
                .scales
                .iter()
                .all(|(found, _)| found.value == *scale),
            "{name}: {:?}",
            adapter.scales
        );
        assert!(
            word.is_empty()
                || found
                    .notices
                    .iter()
                    .any(|notice| notice.text.contains(word)),
            "{name}"
        );
        assert_eq!(found.exit_code(), 0, "{name}");
    }
}

#[test]
fn other_spellings_are_named_and_described() {
    for (name, format, modules, rank) in [
        ("simo-disney-pti", "cloneofsimo", 192, 1),
        (
            "kohyaish-double-prefix",
            "almost kohya (prefix written twice)",
            128,
            4,
        ),
        ("loralib-roberta-mnli", "loralib", 24, 8),
        (
            "simo-kiriko2-te-list-pt",
            "cloneofsimo (list without module names)",
            48,
            4,
        ),
        ("mlx-npz-7b-16layers-r4", "MLX (npz)", 32, 4),
        ("peft-distilgpt2-adalora", "PEFT", 12, 12),
    ] {
        let Some(found) = described(name) else { return };
        assert_eq!(found.format_name.as_deref(), Some(format), "{name}");
        let summary = found
            .summary
            .as_ref()
            .unwrap_or_else(|| panic!("{name} has no summary"));
        assert_eq!(summary.modules, modules, "{name}");
        assert_eq!(
            summary.ranks.keys().copied().collect::<Vec<_>>(),
            [rank],
            "{name}"
        );
        assert_eq!(found.exit_code(), 0, "{name}: readable, only not mergeable");
        assert!(found.problem.is_some());
    }
    for name in ["custom-sam-lora-r4", "custom-sam-lora-zerob"] {
        let Some(found) = described(name) else { return };
        assert!(
            found
                .format_name
                .is_some_and(|format| format.starts_with("home-made")),
            "{name}"
        );
    }
    for name in [
        "ti-st-test-embedding",
        "ti-sd-birb-bin",
        "simo-kiriko2-ti-pt",
    ] {
        let Some(found) = described(name) else { return };
        assert_eq!(
            found.format_name.as_deref(),
            Some("textual inversion"),
            "{name}"
        );
    }
    for (name, word) in [
        ("peft-bloomz-prompt-tuning", "PROMPT_TUNING"),
        ("loralib-roberta-mnli", "alpha"),
        ("simo-disney-pti", "numbered"),
        ("ti-sd-birb-bin", "nothing to merge"),
    ] {
        let Some(found) = described(name) else { return };
        let problem = found.problem.expect(name);
        assert!(problem.text.contains(word), "{name}: {}", problem.text);
    }
}

#[test]
fn tokens_and_prompts_are_described_by_number_and_width() {
    for (name, fact, text) in [
        (
            "ti-sd-birb-bin",
            "token <birb-style>",
            "vectors: 1, of width 768",
        ),
        (
            "ti-st-test-embedding",
            "token emb_params",
            "vectors: 5, of width 768",
        ),
        ("simo-disney-pti", "token <s2>", "vectors: 1, of width 768"),
        (
            "peft-bloomz-prompt-tuning",
            "prompt_embeddings",
            "vectors: 32, of width 1024",
        ),
    ] {
        let Some(found) = described(name) else { return };
        assert_eq!(found.summary.unwrap().facts[fact], text, "{name}");
    }
}

#[test]
fn loralib_is_read_with_the_alpha_of_its_script() {
    let Some(folder) = folder() else { return };
    let options = Options {
        read: ReadOptions {
            alpha: Some(16.0),
            ..ReadOptions::default()
        },
        ..Options::default()
    };
    let found = inspect(&folder.join("loralib-roberta-mnli"), &options).unwrap();
    let adapter = found.adapter.unwrap();
    assert_eq!(adapter.modules.len(), 24);
    assert_eq!(adapter.modules[0].scale.value, 2.0);
    let names: Vec<&str> = adapter
        .replacements
        .iter()
        .map(|r| r.name.as_str())
        .collect();
    assert_eq!(names.len(), 4);
    assert!(names.contains(&"classifier.out_proj.weight"), "{names:?}");
}

#[test]
fn full_checkpoints_are_described_as_such() {
    for name in [
        "base-tinyllm-gpt2-a",
        "base-ttm-a",
        "base-ttm-b",
        "gguf-taesd-decoder/taesd-decoder.gguf",
    ] {
        let Some(found) = described(name) else { return };
        assert_eq!(found.what, "checkpoint", "{name}");
        assert!(found.adapter.is_none());
    }
    let Some(found) = described("gguf-taesd-decoder") else {
        return;
    };
    assert_eq!(found.container, "GGUF");
    assert_eq!((found.tensors, found.dtypes.len()), (67, 2));
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let Some(folder) = folder() else { return };
    for (name, kind, word) in [
        ("odd-empty-safetensors", Kind::Malformed, "no tensor"),
        ("odd-lfs-pointer", Kind::Malformed, "LFS"),
        (
            "odd-offsets-in-elements",
            Kind::Malformed,
            "need 1024 bytes",
        ),
    ] {
        let error = match inspect(&folder.join(name), &Default::default()) {
            Err(error) => error,
            Ok(found) => panic!("{name} was read: {found:?}"),
        };
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains(word), "{name}: {error}");
    }
}

#[test]
fn no_folder_is_forgotten() {
    let Some(folder) = folder() else { return };
    let text = include_str!("real_adapters.rs");
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let is_case = entry.path().is_dir() && name != "key-lists";
        assert!(
            !is_case || text.contains(&format!("\"{name}\"")),
            "{name} is tested nowhere"
        );
    }
}
