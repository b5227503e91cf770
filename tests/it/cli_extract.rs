//! `loratool extract`, as people and scripts meet it.

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use crate::oracle;
use crate::support::{fixture, program, text};

fn extract(output: &Path, more: &[&str]) -> Output {
    let pair = fixture("extract/llama");
    program()
        .arg("extract")
        .args(["--rank", "4", "--base"])
        .arg(pair.join("base"))
        .arg("--tuned")
        .arg(pair.join("tuned"))
        .arg("--output")
        .arg(output)
        .args(more)
        .output()
        .unwrap()
}

#[test]
fn people_get_a_line_for_each_kind_of_layer_and_the_proof() {
    let folder = TempDir::new().unwrap();
    let run = extract(&folder.path().join("out"), &[]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let said = text(&run.stdout);
    for wanted in [
        "13 fitted, 4 whole, 4 identical, 0 left out",
        "model.layers.*.mlp.gate_proj (2): rank 4, changed by",
        "the best possible at these ranks",
        "the full difference",
    ] {
        assert!(said.contains(wanted), "{wanted:?} is not in\n{said}");
    }
    assert!(run.stderr.is_empty(), "{}", text(&run.stderr));
}

#[test]
fn scripts_get_one_document_with_every_layer() {
    let folder = TempDir::new().unwrap();
    let run = extract(&folder.path().join("out"), &["--json", "--dry-run"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["dry_run"], true);
    let modules = report["modules"].as_array().unwrap();
    assert_eq!(modules.len(), 13);
    for module in modules {
        assert_eq!(module["proof"], "complete");
        assert_eq!(module["rank"], 4);
        assert!(module["singular_values"].as_array().unwrap().len() > 4);
        let share = |field: &str| module[field].as_f64().unwrap();
        let left = (1.0 - share("energy")).sqrt();
        assert!((share("residual") - left).abs() < 1e-5, "{module}");
    }
    assert!(std::fs::read_dir(folder.path()).unwrap().all(|entry| {
        entry
            .unwrap()
            .file_name()
            .to_string_lossy()
            .ends_with("lock")
    }));
}

#[test]
fn a_drawing_has_a_line_and_a_bar_for_each_layer() {
    let folder = TempDir::new().unwrap();
    let drawing = folder.path().join("spectra.svg");
    let plot = drawing.to_str().unwrap();
    let run = extract(&folder.path().join("out"), &["--dry-run", "--plot", plot]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let drawn = std::fs::read_to_string(&drawing).unwrap();
    assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"));
    // The axes are lines as well.
    assert!(drawn.matches("<polyline").count() > 13);
    assert_eq!(drawn.matches("<circle").count(), 13);
    assert!(drawn.matches("<rect").count() > 13);
    assert!(drawn.contains("model.layers.0.self_attn.q_proj"));
    // It is not replaced without being asked, and is no input.
    let again = extract(&folder.path().join("out"), &["--dry-run", "--plot", plot]);
    assert_eq!(again.status.code(), Some(9), "{}", text(&again.stderr));
    let base = fixture("extract/llama/base");
    let into = base.join("spectra.svg");
    let inside = extract(
        &folder.path().join("out"),
        &["--dry-run", "--plot", into.to_str().unwrap()],
    );
    assert_eq!(inside.status.code(), Some(9), "{}", text(&inside.stderr));
    assert!(!into.exists());
}

#[test]
fn contradicting_and_meaningless_options_are_wrong_calls() {
    let folder = TempDir::new().unwrap();
    for more in [
        &["--energy", "0.9"][..],
        &["--budget", "1MB"],
        &["--sv-ratio", "2"],
        &["--tolerance", "much"],
        &["--tolerance", "-1"],
        &["--rank-for", "q_proj"],
        &["--method", "ia3"],
    ] {
        let run = extract(&folder.path().join("out"), more);
        assert_eq!(
            run.status.code(),
            Some(2),
            "{more:?}: {}",
            text(&run.stderr)
        );
    }
}

#[test]
fn the_largest_element_of_each_up_vector_is_positive() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    assert!(extract(&out, &[]).status.success());
    let tensors = oracle::read(&out.join("adapter_model.safetensors"));
    let mut vectors = 0;
    for (name, up) in tensors
        .iter()
        .filter(|(name, _)| name.ends_with("lora_B.weight"))
    {
        let rank = up.shape[1];
        let values = up.values();
        for column in 0..rank {
            let vector: Vec<f64> = values.iter().skip(column).step_by(rank).copied().collect();
            let largest = vector.iter().fold(0.0f64, |largest, value| {
                if value.abs() > largest.abs() {
                    *value
                } else {
                    largest
                }
            });
            assert!(largest > 0.0, "{name} {column}");
            vectors += 1;
        }
    }
    assert_eq!(vectors, 12 * 4);
}
