//! `merge --undo`, `unmerge` and `switch`, as people and scripts meet them.

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{contents, fixture, program, text};

/// Runs in a folder; words are separated by spaces, `@name` is an adapter of the fixtures.
fn loratool(folder: &Path, call: &str) -> Output {
    let word = |word: &str| match word.strip_prefix('@') {
        Some(name) => fixture("peft/cases")
            .join(name)
            .join("adapter")
            .into_os_string(),
        None => word.into(),
    };
    program()
        .current_dir(folder)
        .args(call.split_whitespace().map(word))
        .output()
        .unwrap()
}

fn done(folder: &Path, call: &str) -> String {
    let run = loratool(folder, call);
    assert!(run.status.success(), "{call}: {}", text(&run.stderr));
    text(&run.stdout)
}

/// A folder with a base, and the merge of two adapters with its undo file.
fn merged() -> TempDir {
    let folder = TempDir::new().unwrap();
    let base = fixture("peft/bases/llama").join("model.safetensors");
    std::fs::copy(base, folder.path().join("base.safetensors")).unwrap();
    let call = "merge --base base.safetensors --adapter @lora --strength 0.7 --adapter @ia3 \
                --strength-for v_proj=0.5 -o m.safetensors --undo m.undo";
    let said = done(folder.path(), call);
    assert!(
        said.contains("m.undo (") && said.contains("% of what changed"),
        "{said}"
    );
    folder
}

#[test]
fn a_merge_is_taken_back_without_its_strengths() {
    let folder = merged();
    let call = "unmerge --merged m.safetensors --adapter @ia3 --adapter @lora --undo m.undo -o back.safetensors";
    let said = done(folder.path(), call);
    assert!(said.contains("every byte is that of the base"), "{said}");
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert!(read("base.safetensors") == read("back.safetensors"));
    let again = loratool(folder.path(), call);
    assert_eq!(again.status.code(), Some(9), "{}", text(&again.stderr));
}

#[test]
fn a_strength_belongs_to_the_adapter_before_it() {
    let folder = merged();
    let call = |strengths: &str| {
        let call =
            format!("unmerge --merged m.safetensors {strengths} --undo m.undo -o b.safetensors -n");
        loratool(folder.path(), &call)
    };
    assert!(
        call("--adapter @lora --strength 0.7 --adapter @ia3 --strength 1")
            .status
            .success()
    );
    let wrong = call("--adapter @lora --strength 1 --adapter @ia3");
    assert_eq!(wrong.status.code(), Some(6));
    let said = text(&wrong.stderr);
    assert!(said.contains("strength 0.7, not 1"), "{said}");
    assert_eq!(
        call("--strength 0.7 --adapter @lora --adapter @ia3")
            .status
            .code(),
        Some(2)
    );
    let patterns = call("--adapter @lora --adapter @ia3 --strength-for v_proj=0.5");
    assert!(patterns.status.success(), "{}", text(&patterns.stderr));
}

#[test]
fn a_dry_run_writes_nothing_and_scripts_get_one_document() {
    let folder = merged();
    let before = std::fs::read_dir(folder.path()).unwrap().count();
    let call = "unmerge --merged m.safetensors --adapter @lora --adapter @ia3 --undo m.undo -o b --json -n";
    let report: Value = serde_json::from_str(&done(folder.path(), call)).unwrap();
    assert_eq!(report["dry_run"], true);
    assert_eq!(report["exact"], true);
    assert_eq!(report["adapters"][0]["strength"], 0.7);
    assert_eq!(report["files"][0]["name"], "base.safetensors");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before);
    let failed = loratool(folder.path(), &call.replace("@ia3", "@lora_bf16"));
    assert_eq!(failed.status.code(), Some(6));
    let report: Value = serde_json::from_slice(&failed.stdout).unwrap();
    assert_eq!(report["error"]["kind"], "mismatch");
}

#[test]
fn a_switch_is_what_a_merge_gives_and_leaves_nothing_else_behind() {
    let folder = merged();
    let call = "switch --merged m.safetensors --undo m.undo --adapter @lora --adapter @ia3 \
                --to-adapter @lora_all_linear --strength -0.25 --undo-out n.undo -o n.safetensors";
    done(folder.path(), call);
    let direct = "merge --base base.safetensors --adapter @lora_all_linear --strength -0.25 -o d.safetensors";
    done(folder.path(), direct);
    let read = |name: &str| contents(&folder.path().join(name));
    assert!(read("n.safetensors") == read("d.safetensors"));
    let back =
        "unmerge --merged n.safetensors --adapter @lora_all_linear --undo n.undo -o b.safetensors";
    done(folder.path(), back);
    let bytes = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert!(bytes("base.safetensors") == bytes("b.safetensors"));
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with('.'), "{name}");
    }
}

#[test]
fn without_an_undo_file_people_get_the_bound_of_each_tensor() {
    let folder = TempDir::new().unwrap();
    let base = fixture("peft/bases/llama_bfloat16");
    let merge = format!(
        "merge --base {} --adapter @lora_bf16 --strength 0.8 -o m",
        base.display()
    );
    done(folder.path(), &merge);
    let said = done(
        folder.path(),
        "unmerge --merged m --adapter @lora_bf16 --strength 0.8 -o b",
    );
    for wanted in ["to the bounds below", "at most", "% expected to differ"] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let refused = loratool(
        folder.path(),
        "unmerge --merged m --adapter @lora_dora -o c",
    );
    assert_eq!(refused.status.code(), Some(5));
    let said = text(&refused.stderr);
    assert!(
        said.contains("DoRA has no inverse") && said.contains("--allow-kept"),
        "{said}"
    );
}
