//! `loratool resize`, as people and scripts meet it.

use std::path::Path;
use std::process::{Command, Output};

use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::oracle::Stored;
use crate::support::{Random, fixture, program, text, write_adapter};

fn resize(adapter: &Path, output: &Path, more: &[&str]) -> Output {
    program()
        .arg("resize")
        .arg(adapter)
        .arg("--output")
        .arg(output)
        .args(more)
        .output()
        .unwrap()
}

#[test]
fn people_get_a_line_for_each_kind_of_module_and_the_size() {
    let folder = TempDir::new().unwrap();
    let adapter = fixture("peft/cases/lora_all_linear/adapter");
    let run = resize(&adapter, &folder.path().join("out"), &["--rank", "2"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let said = text(&run.stdout);
    for wanted in [
        "(14 modules of 14)",
        "model.layers.*.mlp.gate_proj (2): rank 4 → 2, energy ",
        "56 → 28, all together",
        "energy kept",
        "wrote ",
    ] {
        assert!(said.contains(wanted), "{wanted:?} is not in\n{said}");
    }
    assert!(run.stderr.is_empty(), "{}", text(&run.stderr));
    let quiet = resize(
        &adapter,
        &folder.path().join("quiet"),
        &["--rank", "2", "--quiet"],
    );
    assert!(quiet.status.success() && quiet.stdout.is_empty());
}

#[test]
fn scripts_get_one_document_and_a_dry_run_writes_nothing() {
    let folder = TempDir::new().unwrap();
    let adapter = fixture("peft/cases/lora/adapter");
    let out = folder.path().join("out");
    let more = ["--energy", "0.9", "--json", "--dry-run"];
    let run = resize(&adapter, &out, &more);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["dry_run"], true);
    let modules = report["resized"].as_array().unwrap();
    assert_eq!(modules.len(), 6);
    for module in modules {
        assert!(module["energy"].as_f64().unwrap() >= 0.9, "{module}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let wrong = resize(&adapter, &out, &["--energy", "2", "--json"]);
    assert_eq!(wrong.status.code(), Some(2));
    let error: Value = serde_json::from_slice(&wrong.stdout).unwrap();
    assert_eq!(error["error"]["kind"], "usage");
}

#[test]
fn a_drawing_has_a_line_and_a_bar_for_each_module() {
    let folder = TempDir::new().unwrap();
    let drawing = folder.path().join("spectra.svg");
    let more = [
        "--rank",
        "2",
        "--dry-run",
        "--plot",
        drawing.to_str().unwrap(),
    ];
    let adapter = fixture("peft/cases/lora/adapter");
    let run = resize(&adapter, &folder.path().join("out"), &more);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let drawn = std::fs::read_to_string(&drawing).unwrap();
    assert_eq!(drawn.matches("<circle").count(), 6);
    assert!(drawn.contains("model.layers.0.self_attn.q_proj"));
}

#[test]
fn contradicting_and_meaningless_options_are_wrong_calls() {
    let folder = TempDir::new().unwrap();
    let adapter = fixture("peft/cases/lora/adapter");
    let out = folder.path().join("out");
    for more in [
        &[][..],
        &["--rank", "0"],
        &["--rank", "-1"],
        &["--rank", "2", "--energy", "0.9"],
        &["--rank", "2", "--max-rank", "2"],
        &["--energy", "0.9", "--sv-fro", "0.9"],
        &["--energy", "0"],
        &["--energy", "-1"],
        &["--energy", "nan"],
        &["--sv-ratio", "0.1"],
        &["--sv-cumulative", "inf"],
        &["--budget", "much"],
        &["--budget", "1B"],
        &["--energy", "0.9", "--compat", "kohya"],
        &[
            "--sv-fro",
            "0.9",
            "--rank",
            "2",
            "--max-rank",
            "2",
            "--compat",
            "kohya",
        ],
        &["--rank", "2", "--compat", "other"],
        &["--rank", "2", "--to", "nothing"],
    ] {
        let run = resize(&adapter, &out, more);
        let said = text(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{more:?}: {said}");
        assert!(said.contains("error"), "{more:?}: {said}");
    }
    assert!(!out.exists());
    // The rank is the largest that sd-scripts may choose.
    let more = [
        "--sv-fro", "0.9", "--rank", "2", "--compat", "kohya", "--json",
    ];
    let run = resize(&fixture("resize/kohya.safetensors"), &out, &more);
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    let modules = report["resized"].as_array().unwrap();
    assert!(
        modules
            .iter()
            .all(|module| module["rank"].as_u64() <= Some(2))
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_layer_is_never_formed() {
    const SIDE: usize = 60_000;
    let folder = TempDir::new().unwrap();
    let adapter = folder.path().join("adapter");
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]});
    let mut random = Random(5);
    let mut factor = |shape: [usize; 2]| Stored::of(Dtype::F32, &shape, &random.floats(2 * SIDE));
    let tensors = [
        ("base_model.model.a.lora_A.weight", factor([2, SIDE])),
        ("base_model.model.a.lora_B.weight", factor([SIDE, 2])),
    ];
    write_adapter(&adapter, &config, &tensors);
    // One hundredth of what the matrix would take in f32.
    let limits =
        "ulimit -d 150000 && exec \"$0\" resize \"$1\" --rank 1 --threads 2 --output \"$2\"";
    let run = Command::new("sh")
        .args(["-c", limits, env!("CARGO_BIN_EXE_loratool")])
        .arg(&adapter)
        .arg(folder.path().join("out"))
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
}
