//! The binary, as people and scripts meet it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{contents, fixture, program, text};

const LLAMA: &str = "peft/bases/llama";
const LORA: &str = "peft/cases/lora/adapter";

fn loratool<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Output {
    program().args(arguments).output().unwrap()
}

fn path(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// `merge --base … --adapter … --output …` with more arguments behind.
fn merge(base: &Path, adapter: &Path, output: &Path, more: &[&str]) -> Output {
    let (base, adapter, output) = (path(base), path(adapter), path(output));
    let mut arguments = vec![
        "merge",
        "--base",
        &base,
        "--adapter",
        &adapter,
        "--output",
        &output,
    ];
    arguments.extend(more);
    loratool(&arguments)
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A base of square f32 layers and a rank-4 adapter for all of them.
fn model(folder: &Path, layers: usize, width: usize) -> (PathBuf, PathBuf) {
    let (base, adapter) = (folder.join("base"), folder.join("adapter"));
    std::fs::create_dir_all(&base).unwrap();
    std::fs::create_dir_all(&adapter).unwrap();
    let values = |count: usize, seed: usize| -> Vec<u8> {
        (0..count)
            .flat_map(|i| (((i * 31 + seed * 17) % 1009) as f32 / 1009.0 - 0.5).to_le_bytes())
            .collect()
    };
    let weights: Vec<(String, Vec<usize>, Vec<u8>)> = (0..layers)
        .map(|layer| {
            (
                format!("layers.{layer}.proj.weight"),
                vec![width, width],
                values(width * width, layer),
            )
        })
        .collect();
    let factors: Vec<(String, Vec<usize>, Vec<u8>)> = (0..layers)
        .flat_map(|layer| {
            let name =
                |factor: &str| format!("base_model.model.layers.{layer}.proj.lora_{factor}.weight");
            [
                (name("A"), vec![4, width], values(4 * width, layer + 1)),
                (name("B"), vec![width, 4], values(4 * width, layer + 2)),
            ]
        })
        .collect();
    write(&base.join("model.safetensors"), &weights);
    write(&adapter.join("adapter_model.safetensors"), &factors);
    let config = json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 8 });
    std::fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    (base, adapter)
}

fn write(path: &Path, tensors: &[(String, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.as_str(), view.unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn merge_writes_the_result_and_tells_what_it_did() {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("merged");
    let run = merge(&fixture(LLAMA), &fixture(LORA), &output, &[]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    let told = text(&run.stdout);
    for word in [
        "merged into",
        "model.layers.{0..1}.self_attn.q_proj",
        "change",
        "config.json",
        "time",
    ] {
        assert!(told.contains(word), "{word} is missing from\n{told}");
    }
    assert_eq!(entries(&output), ["config.json", "model.safetensors"]);
    assert_eq!(entries(out.path()), ["merged"]);
}

#[test]
fn the_json_report_is_the_whole_truth() {
    let out = tempfile::tempdir().unwrap();
    let run = merge(
        &fixture(LLAMA),
        &fixture(LORA),
        &out.path().join("merged"),
        &["--json", "--strength", "0.5"],
    );
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(report["dry_run"], false);
    assert_eq!(report["adapters"][0]["strength"], 0.5);
    assert_eq!(report["modules"].as_array().unwrap().len(), 6);
    assert_eq!(report["modules"][0]["scale"]["value"], 2.5);
    assert!(report["changes"][0]["relative"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_dry_run_prints_every_module_and_writes_nothing() {
    let out = tempfile::tempdir().unwrap();
    let run = merge(
        &fixture(LLAMA),
        &fixture(LORA),
        &out.path().join("merged"),
        &["--dry-run"],
    );
    assert_eq!(run.status.code(), Some(0));
    let told = text(&run.stdout);
    for layer in 0..2 {
        assert!(
            told.contains(&format!(
                "model.layers.{layer}.mlp.down_proj.weight rows 0..32"
            )),
            "{told}"
        );
    }
    assert!(told.contains("memory") && told.contains("disk"));
    assert!(entries(out.path()).is_empty());
}

#[test]
fn quiet_prints_nothing_when_all_is_well() {
    let out = tempfile::tempdir().unwrap();
    let run = merge(
        &fixture(LLAMA),
        &fixture(LORA),
        &out.path().join("merged"),
        &["--quiet"],
    );
    assert_eq!(
        (run.stdout.len(), run.stderr.len()),
        (0, 0),
        "{}",
        text(&run.stderr)
    );
}

#[test]
fn each_strength_belongs_to_the_adapter_before_it() {
    let out = tempfile::tempdir().unwrap();
    let (base, lora, rslora) = (
        path(&fixture(LLAMA)),
        path(&fixture(LORA)),
        path(&fixture("peft/cases/lora_rslora/adapter")),
    );
    let output = path(&out.path().join("merged"));
    let strengths = |arguments: &[&str]| -> Value {
        let run = loratool(
            &[
                &[
                    "merge",
                    "--base",
                    &base,
                    "--output",
                    &output,
                    "--dry-run",
                    "--json",
                ],
                arguments,
            ]
            .concat(),
        );
        assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        report["adapters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|adapter| adapter["strength"].clone())
            .collect()
    };
    let both = strengths(&[
        "--adapter",
        &lora,
        "--strength",
        "0.7",
        "--adapter",
        &rslora,
        "--weight",
        "-0.3",
    ]);
    assert_eq!(both, json!([0.7, -0.3]));
    assert_eq!(
        strengths(&["--adapter", &lora, "--adapter", &rslora, "--ratio", "2"]),
        json!([1.0, 2.0])
    );
    assert_eq!(
        strengths(&["--adapter", &lora, "--adapter", &rslora]),
        json!([1.0, 1.0])
    );
}

#[test]
fn a_strength_without_an_adapter_of_its_own_is_a_wrong_call() {
    let (base, lora) = (path(&fixture(LLAMA)), path(&fixture(LORA)));
    for arguments in [
        vec!["--strength", "2", "--adapter", &lora],
        vec!["--adapter", &lora, "--strength", "2", "--strength", "3"],
        vec!["--adapter", &lora, "--strength", "much"],
        vec!["--adapter", &lora, "--strength", "NaN"],
        vec!["--adapter", &lora, "--strength-for", "q_proj"],
        vec!["--adapter", &lora, "--strength-for", "(=1"],
        vec!["--adapter", &lora, "--only", "("],
        vec!["--adapter", &lora, "--only", "no such module"],
        vec!["--adapter", &lora, "--shard-size", "5 bananas"],
        vec!["--adapter", &lora, "--threads", "0"],
        vec![],
    ] {
        let run = loratool(
            &[
                vec!["merge", "--base", &base, "--output", "x", "-n"],
                arguments.clone(),
            ]
            .concat(),
        );
        assert_eq!(
            run.status.code(),
            Some(2),
            "{arguments:?}: {}",
            text(&run.stderr)
        );
    }
}

#[test]
fn strength_for_and_only_and_skip_choose_modules() {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("merged");
    let rows = |more: &[&str]| -> Vec<(String, f64)> {
        let run = merge(
            &fixture(LLAMA),
            &fixture(LORA),
            &output,
            &[&["-n", "--json"], more].concat(),
        );
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        let row = |module: &Value| {
            (
                module["path"].as_str().unwrap().to_owned(),
                module["strength"].as_f64().unwrap(),
            )
        };
        report["modules"]
            .as_array()
            .unwrap()
            .iter()
            .map(row)
            .collect()
    };
    let all = rows(&[
        "--strength-for",
        r"layers\.1\.=0.25",
        "--strength-for",
        "q_proj=4",
    ]);
    for (path, strength) in all {
        let expected = if path.contains("layers.1.") {
            0.25
        } else if path.ends_with("q_proj") {
            4.0
        } else {
            1.0
        };
        assert_eq!(strength, expected, "{path}");
    }
    assert_eq!(rows(&["--only", "q_proj"]).len(), 2);
    assert_eq!(rows(&["--skip", "q_proj", "--skip", r"layers\.0"]).len(), 2);
}

#[test]
fn errors_have_documented_codes_a_place_a_reason_and_a_hint() {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("merged");
    std::fs::create_dir(&output).unwrap();
    let run = merge(&fixture(LLAMA), &fixture(LORA), &output, &[]);
    assert_eq!(run.status.code(), Some(9));
    let told = text(&run.stderr);
    assert!(
        told.starts_with("error: ") && told.contains("merged") && told.contains("hint: "),
        "{told}"
    );

    let other = out.path().join("other");
    let run = merge(&fixture("peft/bases/gpt2"), &fixture(LORA), &other, &[]);
    assert_eq!(run.status.code(), Some(7));
    let told = text(&run.stderr);
    assert!(
        told.contains("model.layers.{0..1}.self_attn.q_proj") && told.contains("--allow-unmatched"),
        "{told}"
    );

    let run = merge(&fixture(LORA), &fixture(LLAMA), &other, &[]);
    assert_eq!(run.status.code(), Some(6), "{}", text(&run.stderr));
    assert!(text(&run.stderr).contains("exchange --base and --adapter"));

    let run = merge(&out.path().join("nowhere"), &fixture(LORA), &other, &[]);
    assert_eq!(run.status.code(), Some(3));
    let run = merge(
        &fixture(LLAMA),
        &fixture("peft/cases/lora_pissa/adapter"),
        &other,
        &[],
    );
    assert_eq!(run.status.code(), Some(5));
    assert_eq!(entries(out.path()), ["merged"]);
}

#[test]
fn an_error_is_json_when_json_was_asked_for() {
    let run = loratool(&["inspect", "/nowhere/at/all", "--json"]);
    let document: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(document["error"]["kind"], "io");
    assert_eq!(run.status.code(), Some(3));
    let run = loratool(&["merge", "--json"]);
    let document: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(
        (document["error"]["kind"].as_str(), run.status.code()),
        (Some("usage"), Some(2))
    );
    let run = loratool(&["check", "/nowhere/at/all", "--json"]);
    let document: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(document["clean"], false);
    assert_eq!(document["exit_code"], 3);
}

#[test]
fn a_thousand_problems_fit_on_one_screen() {
    let out = tempfile::tempdir().unwrap();
    let (_, adapter) = model(out.path(), 2000, 4);
    let run = merge(&fixture(LLAMA), &adapter, &out.path().join("merged"), &[]);
    assert_eq!(run.status.code(), Some(7));
    assert!(run.stderr.len() < 16_000, "{} bytes", run.stderr.len());
    let run = merge(
        &fixture(LLAMA),
        &adapter,
        &out.path().join("merged"),
        &["--json"],
    );
    let document: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(document["error"]["cases"].as_array().unwrap().len(), 2000);
}

#[test]
fn nothing_from_a_file_reaches_the_terminal_unescaped() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 1, 4);
    let evil = "x\u{1b}[31m\u{202e}\n\u{7}\u{9b}y".to_owned();
    let factor = |name: &str, shape: [usize; 2]| {
        (
            format!("base_model.model.{evil}.lora_{name}.weight"),
            shape.to_vec(),
            vec![0u8; 64],
        )
    };
    write(
        &adapter.join("adapter_model.safetensors"),
        &[factor("A", [4, 4]), factor("B", [4, 4])],
    );
    let config = json!({ "peft_type": "LORA", "r": 4, "lora_alpha": -8, "base_model_name_or_path": evil, "task_type": evil });
    std::fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let (adapter, base) = (path(&adapter), path(&base));
    for arguments in [
        vec!["inspect", &adapter],
        vec!["inspect", &adapter, "--json"],
        vec!["check", &adapter],
        vec!["check", &adapter, "--base", &base],
        vec!["check", &adapter, "--base", &base, "--json"],
        vec![
            "merge",
            "--base",
            &base,
            "--adapter",
            &adapter,
            "--output",
            "x",
            "-n",
        ],
        vec![
            "merge",
            "--base",
            &base,
            "--adapter",
            &adapter,
            "--output",
            "x",
            "-n",
            "--allow-unmatched",
        ],
    ] {
        let run = loratool(&arguments);
        for bytes in [&run.stdout, &run.stderr] {
            let odd = text(bytes)
                .chars()
                .find(|c| c.is_control() && *c != '\n' || *c == '\u{202e}');
            assert_eq!(odd, None, "{arguments:?}: {}", text(bytes));
        }
        assert!(
            !text(&run.stderr).contains("\ny"),
            "a line was forged by {arguments:?}"
        );
    }
}

#[test]
fn inspect_warns_and_check_fails_about_the_same_oddities() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 1, 4);
    let config = json!({ "peft_type": "LORA", "r": 4, "lora_alpha": -8, "unheard_of": null,
        "base_model_name_or_path": "somebody/model-bnb-4bit" });
    std::fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let inspected = loratool(&["inspect", &path(&adapter)]);
    assert_eq!(inspected.status.code(), Some(0));
    let told = text(&inspected.stderr);
    for oddity in ["alpha is negative", "unheard_of", "quantised"] {
        assert!(
            told.lines()
                .any(|line| line.starts_with("warning: ") && line.contains(oddity)),
            "{oddity}: {told}"
        );
    }
    let checked = loratool(&["check", &path(&adapter), "--base", &path(&base), "--json"]);
    assert_eq!(checked.status.code(), Some(1));
    let verdict: Value = serde_json::from_slice(&checked.stdout).unwrap();
    let kinds: Vec<&str> = verdict["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|finding| finding["kind"].as_str().unwrap())
        .collect();
    for kind in [
        "negative-alpha",
        "unknown-field",
        "quantised-training",
        "other-base",
    ] {
        assert!(kinds.contains(&kind), "{kind} is not in {kinds:?}");
    }
    let merged = merge(&base, &adapter, &out.path().join("merged"), &[]);
    assert_eq!(merged.status.code(), Some(0));
    assert!(
        text(&merged.stderr)
            .lines()
            .any(|line| line.starts_with("warning: ") && line.contains("names the base"))
    );
}

#[test]
fn inspect_tells_what_each_format_could_not_say_and_check_makes_it_a_finding() {
    let adapter = path(&fixture("peft/cases/lora_dora/adapter"));
    let output = loratool(&[
        "inspect", &adapter, "--to", "peft", "--to", "mlx", "--to", "kohya", "--json",
    ]);
    assert_eq!(output.status.code(), Some(0));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let conversions = document["conversions"].as_array().unwrap();
    let losses = |at: usize| conversions[at]["losses"].as_array().unwrap().len();
    assert_eq!(conversions[0]["to"], "peft");
    assert_eq!(losses(0), 0);
    assert!(losses(2) > 0);
    let shown = text(&loratool(&["inspect", &adapter, "--to", "all"]).stdout);
    for format in loratool::ops::convert::targets() {
        assert!(shown.contains(&format!("to {} ", format.id())), "{shown}");
    }
    assert!(shown.contains("to peft       everything"), "{shown}");
    // What can be said whole is clean, a loss is not, and neither is a name that cannot be told.
    let code = |to: &str, base: &[&str]| {
        let arguments = [&["check", adapter.as_str(), "--quiet", "--to", to], base].concat();
        let output = loratool(&arguments);
        (output.status.code(), text(&output.stdout))
    };
    assert_eq!(code("peft", &[]), (Some(0), String::new()));
    let (exit, findings) = code("kohya", &[]);
    assert_eq!(exit, Some(1));
    assert!(findings.starts_with("loss: "), "{findings}");
    assert_eq!(code("gguf", &[]).0, Some(7));
    let base = path(&fixture(LLAMA));
    let (exit, findings) = code("gguf", &["--base", &base]);
    assert_eq!(exit, Some(1), "{findings}");
    assert!(findings.contains("gguf cannot say it: "), "{findings}");
    assert_eq!(
        loratool(&["inspect", &adapter, "--to", "none"])
            .status
            .code(),
        Some(2)
    );
    assert_eq!(
        loratool(&["check", &adapter, "--to", "none"]).status.code(),
        Some(2)
    );
}

#[test]
fn check_is_clean_only_when_nothing_at_all_is_odd() {
    let clean = loratool(&[
        "check",
        &path(&fixture(LORA)),
        "--base",
        &path(&fixture(LLAMA)),
    ]);
    assert_eq!(clean.status.code(), Some(0), "{}", text(&clean.stdout));
    assert!(text(&clean.stdout).ends_with("clean\n"));
    let wrong_base = loratool(&[
        "check",
        &path(&fixture(LORA)),
        "--base",
        &path(&fixture("peft/bases/gpt2")),
    ]);
    assert_eq!(wrong_base.status.code(), Some(7));
    let base = loratool(&["check", &path(&fixture(LLAMA))]);
    assert_eq!(base.status.code(), Some(0), "{}", text(&base.stdout));
}

#[test]
fn a_linked_file_outside_the_base_is_not_carried_into_the_result() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 1, 4);
    let secret = out.path().join("id_rsa");
    std::fs::write(&secret, "secret").unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&secret, base.join("tokenizer.json")).unwrap();
        let run = merge(&base, &adapter, &out.path().join("merged"), &[]);
        assert_eq!(run.status.code(), Some(4), "{}", text(&run.stderr));
        assert!(text(&run.stderr).contains("tokenizer.json"));
        assert!(!out.path().join("merged").exists());
    }
}

#[test]
fn two_modules_or_two_tensors_for_one_place_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 1, 4);
    let factors = |path: &str| {
        ["A", "B"].map(|factor| {
            (
                format!("base_model.model.{path}.lora_{factor}.weight"),
                vec![4, 4],
                vec![0u8; 64],
            )
        })
    };
    let file = adapter.join("adapter_model.safetensors");
    write(
        &file,
        &[factors("layers.0.proj"), factors("model.layers.0.proj")].concat(),
    );
    let run = merge(&base, &adapter, &out.path().join("merged"), &[]);
    assert_eq!(run.status.code(), Some(6), "{}", text(&run.stderr));
    assert!(text(&run.stderr).contains("both land on `layers.0.proj.weight`"));
    let whole = |name: &str, byte: u8| {
        (
            format!("base_model.model.layers.0.proj.{name}"),
            vec![4, 4],
            vec![byte; 64],
        )
    };
    write(
        &file,
        &[
            whole("weight", 1),
            whole("modules_to_save.default.weight", 2),
        ],
    );
    let run = merge(&base, &adapter, &out.path().join("merged"), &[]);
    assert_eq!(run.status.code(), Some(6), "{}", text(&run.stderr));
}

#[test]
fn a_single_expert_is_not_merged_into_a_transposed_stack() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 1, 4);
    let experts = |name: &str, shape: [usize; 3]| {
        (
            format!("layers.0.mlp.experts.{name}"),
            shape.to_vec(),
            vec![0u8; 4 * shape.iter().product::<usize>()],
        )
    };
    let factors = ["A", "B"].map(|factor| {
        (
            format!("base_model.model.layers.0.mlp.experts.1.w2.lora_{factor}.weight"),
            vec![4, 4],
            vec![0u8; 64],
        )
    });
    write(&adapter.join("adapter_model.safetensors"), &factors);
    let output = out.path().join("merged");
    for (up, code) in [([2, 8, 4], 0), ([2, 4, 8], 6)] {
        let tensors = [experts("gate_up_proj", up), experts("down_proj", [2, 4, 4])];
        write(&base.join("model.safetensors"), &tensors);
        let run = merge(&base, &adapter, &output, &["-n"]);
        assert_eq!(run.status.code(), Some(code), "{}", text(&run.stderr));
    }
}

#[test]
fn every_command_has_help_with_examples_a_manual_page_and_completions() {
    for command in [
        "merge",
        "unmerge",
        "switch",
        "convert",
        "rescale",
        "resize",
        "extract",
        "inspect",
        "check",
        "completions",
        "man",
    ] {
        let help = text(&loratool(&[command, "--help"]).stdout);
        assert!(
            help.contains("Example") && help.contains(&format!("loratool {command}")),
            "{command}: {help}"
        );
        let page = text(&loratool(&["man", command]).stdout);
        assert!(
            page.contains(".TH") && page.contains("SYNOPSIS"),
            "{command}"
        );
    }
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(
            text(&loratool(&["completions", shell]).stdout).contains("loratool"),
            "{shell}"
        );
    }
    assert!(text(&loratool(&["--help"]).stdout).contains("Exit codes"));
    assert_eq!(loratool(&["man", "nothing"]).status.code(), Some(2));
}

#[test]
fn every_kernel_gives_the_same_file() {
    let out = tempfile::tempdir().unwrap();
    let mut first: Option<Vec<u8>> = None;
    for kernel in loratool::linalg::KERNELS {
        if !(kernel.available)() {
            println!("skipped: this machine has no {}", kernel.name);
            continue;
        }
        let output = out.path().join(kernel.name);
        let run = Command::new(env!("CARGO_BIN_EXE_loratool"))
            .args([
                "merge",
                "--base",
                &path(&fixture("peft/bases/llama_bfloat16")),
                "--adapter",
                &path(&fixture("peft/cases/lora_bf16/adapter")),
            ])
            .args(["--output", &path(&output), "--json"])
            .env("LORATOOL_KERNEL", kernel.name)
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        assert_eq!(report["kernel"], kernel.name);
        let bytes = std::fs::read(output.join("model.safetensors")).unwrap();
        assert_eq!(
            first.get_or_insert_with(|| bytes.clone()),
            &bytes,
            "{}",
            kernel.name
        );
    }
    let run = Command::new(env!("CARGO_BIN_EXE_loratool"))
        .args([
            "merge",
            "--base",
            &path(&fixture(LLAMA)),
            "--adapter",
            &path(&fixture(LORA)),
            "--output",
            "x",
            "-n",
        ])
        .env("LORATOOL_KERNEL", "abacus")
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(2));
}

#[cfg(unix)]
fn spawn(base: &Path, adapter: &Path, output: &Path) -> std::process::Child {
    Command::new(env!("CARGO_BIN_EXE_loratool"))
        .args([
            "merge",
            "--base",
            &path(base),
            "--adapter",
            &path(adapter),
            "--output",
            &path(output),
            "--force",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Sends a signal with the `kill` of the system.
#[cfg(unix)]
fn send(signal: &str, child: &std::process::Child) {
    let status = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

/// Waits until the hidden sibling has content, so that the run is in its middle.
#[cfg(unix)]
fn wait_for_work(parent: &Path, name: &str) {
    let hidden = parent.join(format!(".{name}.loratool-tmp"));
    let start = Instant::now();
    while !hidden.join("model.safetensors").exists() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "the run never began"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(unix)]
#[test]
fn a_signal_stops_the_run_and_leaves_everything_as_it_was() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 24, 1024);
    let before = entries(out.path());
    for signal in ["-INT", "-TERM", "-HUP"] {
        let child = spawn(&base, &adapter, &out.path().join("merged"));
        wait_for_work(out.path(), "merged");
        send(signal, &child);
        let start = Instant::now();
        let run = child.wait_with_output().unwrap();
        assert!(start.elapsed() < Duration::from_secs(5));
        if run.status.code() == Some(0) {
            // The run was faster than the signal; try the next one on a clean slate.
            std::fs::remove_dir_all(out.path().join("merged")).unwrap();
            continue;
        }
        assert_eq!(run.status.code(), Some(12), "{signal}");
        assert!(text(&run.stderr).contains("nothing was changed"));
        assert_eq!(entries(out.path()), before, "{signal}");
    }
}

#[cfg(unix)]
#[test]
fn a_kill_at_any_moment_leaves_the_old_output_or_the_new_one() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 8, 512);
    let output = out.path().join("merged");
    let start = Instant::now();
    assert_eq!(merge(&base, &adapter, &output, &[]).status.code(), Some(0));
    let whole = start.elapsed();
    let new = contents(&output.join("model.safetensors"));
    let old = contents(&base.join("model.safetensors"));
    let (mut kept, mut replaced) = (0, 0);
    for moment in 0..48u32 {
        // Every other round starts without an output, the rest over an old one.
        std::fs::remove_dir_all(&output).ok();
        let had_old = moment % 2 == 0;
        if had_old {
            std::fs::create_dir(&output).unwrap();
            std::fs::copy(
                base.join("model.safetensors"),
                output.join("model.safetensors"),
            )
            .unwrap();
        }
        let mut child = spawn(&base, &adapter, &output);
        std::thread::sleep(whole * (moment * 37 % 48) / 44);
        child.kill().unwrap();
        child.wait().unwrap();
        if !output.exists() {
            assert!(!had_old, "the old output is gone");
            kept += 1;
            continue;
        }
        let found = contents(&output.join("model.safetensors"));
        assert!(
            found == new || had_old && found == old,
            "neither the old output nor the new one"
        );
        if found == new {
            replaced += 1
        } else {
            kept += 1
        }
    }
    println!("killed 48 runs: {kept} before the output was replaced, {replaced} after");
    assert_eq!(
        merge(&base, &adapter, &output, &["--force"]).status.code(),
        Some(0)
    );
    assert_eq!(contents(&output.join("model.safetensors")), new);
    assert_eq!(
        entries(out.path()),
        ["adapter", "base", "merged"],
        "something was left behind"
    );
}

#[cfg(unix)]
#[test]
fn of_two_runs_onto_one_output_one_wins_and_the_other_says_so() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 16, 1024);
    let output = out.path().join("merged");
    let runs = [
        spawn(&base, &adapter, &output),
        spawn(&base, &adapter, &output),
    ];
    let runs: Vec<Output> = runs
        .into_iter()
        .map(|child| child.wait_with_output().unwrap())
        .collect();
    let codes: Vec<Option<i32>> = runs.iter().map(|run| run.status.code()).collect();
    assert!(codes.contains(&Some(0)), "{codes:?}");
    for run in runs.iter().filter(|run| run.status.code() != Some(0)) {
        assert_eq!(run.status.code(), Some(9));
        assert!(
            text(&run.stderr).contains("another run is writing it"),
            "{}",
            text(&run.stderr)
        );
    }
    assert_eq!(contents(&output.join("model.safetensors")).len(), 16);
    assert_eq!(entries(out.path()), ["adapter", "base", "merged"]);
}

#[cfg(unix)]
#[test]
fn a_limit_on_file_size_is_an_error_of_the_write() {
    let out = tempfile::tempdir().unwrap();
    let (base, adapter) = model(out.path(), 4, 256);
    let command = format!(
        "ulimit -f 100; exec {} merge --base {} --adapter {} --output {}",
        env!("CARGO_BIN_EXE_loratool"),
        base.display(),
        adapter.display(),
        out.path().join("merged").display()
    );
    let run = Command::new("bash")
        .args(["-c", &command])
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(3), "{}", text(&run.stderr));
    assert!(
        text(&run.stderr).contains("cannot write"),
        "{}",
        text(&run.stderr)
    );
    assert_eq!(entries(out.path()), ["adapter", "base"]);
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_error() {
    let command = format!(
        "{} completions zsh | head -c 10",
        env!("CARGO_BIN_EXE_loratool")
    );
    let run = Command::new("bash")
        .args(["-c", &format!("set -o pipefail; {command}")])
        .output()
        .unwrap();
    assert!(
        run.status.success(),
        "{:?} {}",
        run.status,
        text(&run.stderr)
    );
    assert!(run.stderr.is_empty(), "{}", text(&run.stderr));
}

#[test]
fn an_alpha_that_no_file_states_is_stated_on_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let content: &[(&str, &[usize])] = &[("q.lora_A", &[2, 3]), ("q.lora_B", &[4, 2])];
    for file in ["lora.bin", "lit_model.pth.lora"] {
        let adapter = folder.path().join(file.replace('.', "-"));
        std::fs::create_dir(&adapter).unwrap();
        std::fs::write(adapter.join(file), crate::hostile_support::tensors(content)).unwrap();
        let adapter = path(&adapter);
        let without = loratool(&["check", &adapter]);
        assert_eq!(without.status.code(), Some(5), "{file}");
        let with = loratool(&["inspect", &adapter, "--adapter-alpha", "-6", "--json"]);
        assert_eq!(
            with.status.code(),
            Some(0),
            "{file}: {}",
            text(&with.stderr)
        );
        let report: Value = serde_json::from_slice(&with.stdout).unwrap();
        assert_eq!(report["adapter"]["modules"][0]["scale"]["value"], -3.0);
    }
}
