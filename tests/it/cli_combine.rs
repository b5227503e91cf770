//! `loratool combine`, as people and scripts meet it.

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{fixture, program, text};

fn combine(output: &Path, more: &[&str]) -> Output {
    let folder = fixture("combine/peft/w_ties");
    let mut command = program();
    command.arg("combine");
    for (name, strength) in [("a0", "0.7"), ("a1", "-0.3")] {
        command.arg("--adapter").arg(folder.join(name));
        command.args(["--strength", strength]);
    }
    let command = command.arg("--output").arg(output).args(more);
    command.output().unwrap()
}

#[test]
fn people_are_told_what_was_combined_and_what_is_left() {
    let folder = TempDir::new().unwrap();
    let run = combine(&folder.path().join("out"), &["--rank", "3"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let said = text(&run.stdout);
    for wanted in [
        "strength 0.7",
        "strength -0.3",
        "linear",
        "rank 3 of 2, residual",
        "residual",
    ] {
        assert!(said.contains(wanted), "{wanted:?} is not in\n{said}");
    }
    assert!(run.stderr.is_empty(), "{}", text(&run.stderr));
}

#[test]
fn scripts_get_one_document_and_a_dry_run_writes_nothing() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("out");
    let run = combine(
        &output,
        &[
            "--how",
            "ties",
            "--density",
            "0.5",
            "--energy",
            "0.9",
            "--json",
            "-n",
        ],
    );
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["dry_run"], true);
    assert_eq!(report["how"], "ties");
    assert_eq!(report["to"], "peft");
    assert_eq!(report["exact"], 0);
    for module in report["modules"].as_array().unwrap() {
        assert!(module["fit"]["energy"].as_f64().unwrap() >= 0.9);
    }
    assert!(!output.exists());
}

#[test]
fn the_known_errors_of_another_tool_are_warnings() {
    let folder = TempDir::new().unwrap();
    let run = combine(&folder.path().join("out"), &["--compat", "peft"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert!(
        text(&run.stderr).contains("products of the factors"),
        "{}",
        text(&run.stderr)
    );
}

#[test]
fn wrong_calls_exit_with_2() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("out");
    for more in [
        &["--how", "nonsense"][..],
        &["--how", "ties"],
        &["--rank", "3", "--energy", "0.5"],
        &["--rank", "0"],
        &["--strength", "1"],
        &["--budget", "much"],
        &["--dtype", "keep"],
        &["--compat", "peft", "--how", "dare_ties"],
    ] {
        let run = combine(&output, more);
        assert_eq!(
            run.status.code(),
            Some(2),
            "{more:?}: {}",
            text(&run.stderr)
        );
    }
    assert!(!output.exists());
}
