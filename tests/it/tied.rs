//! Shared embeddings, replicated layers and whole replacements: what the adapted model computes.

use std::path::{Path, PathBuf};

use loratool::notice::NoticeKind;
use loratool::ops::merge::{Report, plan};
use loratool::{Kind, Reason};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::oracle::{self, Delta, Stored, Tensors};
use crate::support::{Random, fixture, merge, options, selection, write_adapter, write_base};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// What came out of a merge.
struct Outcome {
    tensors: Tensors,
    config: Value,
    report: Report,
    _folder: tempfile::TempDir,
}

impl Outcome {
    fn of(base: &Path, adapters: &[(PathBuf, f64)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let mut options = options(base, Path::new(""), &output);
        options.adapters = adapters
            .iter()
            .map(|(path, strength)| selection(path, *strength))
            .collect();
        let report = merge(&options).unwrap();
        Outcome {
            tensors: oracle::read(&output.join("model.safetensors")),
            config: oracle::json(&output.join("config.json")),
            report,
            _folder: folder,
        }
    }

    fn has(&self, kind: NoticeKind, item: &str) -> bool {
        self.report
            .notices
            .iter()
            .any(|notice| notice.kind == kind && notice.item.as_deref() == Some(item))
    }

    fn has_any(&self, kind: NoticeKind) -> bool {
        self.report.notices.iter().any(|notice| notice.kind == kind)
    }
}

fn assert_tensors(ours: &Tensors, expected: &Tensors) {
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, expected) in expected {
        assert_eq!(oracle::off(&ours[name], expected), 0, "{name}");
    }
}

/// A golden on the tied base: what came out, the base with its head written out, and every delta.
fn golden(name: &str) -> (Outcome, Tensors, std::collections::BTreeMap<String, Delta>) {
    let base = fixture("peft/bases/llama_tied");
    let adapter = fixture("peft/cases").join(name).join("adapter");
    let mut untied = oracle::read(&base.join("model.safetensors"));
    untied.insert(HEAD.to_owned(), untied[EMBEDDING].clone());
    let tensors = oracle::read(&adapter.join("adapter_model.safetensors"));
    let config = oracle::json(&adapter.join("adapter_config.json"));
    let deltas = oracle::deltas(&tensors, &config, &untied, "llama");
    (Outcome::of(&base, &[(adapter, 1.0)]), untied, deltas)
}

fn with_deltas(starts: &Tensors, deltas: &std::collections::BTreeMap<String, Delta>) -> Tensors {
    starts
        .iter()
        .map(|(name, start)| {
            let delta = deltas.get(name);
            let merged =
                oracle::merged(start, start.dtype, delta.map_or(&[], std::slice::from_ref));
            (name.clone(), merged)
        })
        .collect()
}

#[test]
fn an_adapter_on_one_side_of_tied_embeddings_unties_them() {
    for (case, changed, kept) in [
        ("lora_embed_tied", EMBEDDING, HEAD),
        ("lora_lm_head_tied", HEAD, EMBEDDING),
    ] {
        let (ours, untied, deltas) = golden(case);
        assert!(deltas.contains_key(changed) && !deltas.contains_key(kept));
        assert_tensors(&ours.tensors, &with_deltas(&untied, &deltas));
        assert_ne!(ours.tensors[EMBEDDING], ours.tensors[HEAD], "{case}");
        assert_eq!(ours.tensors[kept], untied[kept], "{case}");
        assert_eq!(ours.config["tie_word_embeddings"], false, "{case}");
        assert!(ours.has(NoticeKind::Untied, HEAD), "{case}");
        assert_eq!(ours.report.added, [HEAD], "{case}");
    }
}

#[test]
fn an_adapter_with_a_delta_for_each_side_unties_them() {
    let (ours, untied, deltas) = golden("lora_both_tied");
    assert!(deltas.contains_key(EMBEDDING) && deltas.contains_key(HEAD));
    assert_tensors(&ours.tensors, &with_deltas(&untied, &deltas));
    assert_eq!(ours.config["tie_word_embeddings"], false);
    assert!(ours.has(NoticeKind::Untied, HEAD));
}

#[test]
fn one_adapter_shared_by_both_sides_is_added_once_and_they_stay_tied() {
    let (ours, mut tied, deltas) = golden("lora_ensure_tying");
    let merged = with_deltas(&tied, &deltas);
    assert_eq!(
        merged[EMBEDDING], merged[HEAD],
        "the example is one delta, spelled twice"
    );
    tied.remove(HEAD);
    assert_tensors(&ours.tensors, &with_deltas(&tied, &deltas));
    assert_eq!(ours.config["tie_word_embeddings"], true);
    assert!(!ours.has_any(NoticeKind::Untied));
    assert!(ours.report.added.is_empty());
}

#[test]
fn one_adapter_at_two_strengths_is_no_shared_change() {
    let (base, folder) = (
        fixture("peft/bases/llama_tied"),
        fixture("peft/cases/lora_ensure_tying/adapter"),
    );
    let out = tempfile::tempdir().unwrap();
    let mut options = options(&base, &folder, &out.path().join("out"));
    options.adapters[0].strength_for = vec![("lm_head".to_owned(), 0.5)];
    merge(&options).unwrap();
    let (_, untied, shared) = golden("lora_ensure_tying");
    let ours = oracle::read(&options.output.join("model.safetensors"));
    for (name, strength) in [(EMBEDDING, 1.0), (HEAD, 0.5)] {
        let Delta { c, acc } = shared[name].clone();
        let delta = Delta {
            c: strength * c,
            acc,
        };
        let expected = oracle::merged(&untied[name], Dtype::F32, &[delta]);
        assert_eq!(ours[name], expected, "{name}");
    }
}

#[test]
fn a_second_adapter_keeps_its_own_delta_beside_a_shared_one() {
    // Of the shared adapter both sides get the delta, of the other one only the head.
    let base = fixture("peft/bases/llama_tied");
    let folder = |name: &str| fixture("peft/cases").join(name).join("adapter");
    let (_, untied, shared) = golden("lora_ensure_tying");
    for (other, side) in [("lora_lm_head_tied", HEAD), ("lora_embed_tied", EMBEDDING)] {
        let (_, _, single) = golden(other);
        let ours = Outcome::of(
            &base,
            &[(folder("lora_ensure_tying"), 1.0), (folder(other), 1.0)],
        );
        for name in [EMBEDDING, HEAD] {
            let mut deltas = vec![shared[name].clone()];
            if name == side {
                deltas.push(single[name].clone());
            }
            let expected = oracle::merged(&untied[name], Dtype::F32, &deltas);
            assert_eq!(
                oracle::off(&ours.tensors[name], &expected),
                0,
                "{other}: {name}"
            );
        }
        assert_eq!(ours.config["tie_word_embeddings"], false, "{other}");
    }
}

#[test]
fn replicated_layers_are_written_out_each_with_its_own_delta() {
    let (base, folder) = (
        fixture("peft/bases/llama"),
        fixture("peft/cases/lora_layer_replication/adapter"),
    );
    let stored = oracle::read(&base.join("model.safetensors"));
    // [[0, 2], [1, 2]]: layers 0, 1 and 1 again.
    let mut replicated = stored.clone();
    for (name, tensor) in &stored {
        if let Some(rest) = name.strip_prefix("model.layers.1.") {
            replicated.insert(format!("model.layers.2.{rest}"), tensor.clone());
        }
    }
    let adapter = oracle::read(&folder.join("adapter_model.safetensors"));
    let config = oracle::json(&folder.join("adapter_config.json"));
    let deltas = oracle::deltas(&adapter, &config, &replicated, "llama");
    assert_eq!(deltas.len(), 3);
    let ours = Outcome::of(&base, &[(folder, 1.0)]);
    assert_tensors(&ours.tensors, &with_deltas(&replicated, &deltas));
    let layer =
        |number: usize| &ours.tensors[&format!("model.layers.{number}.self_attn.q_proj.weight")];
    assert_ne!(layer(1), layer(2));
    assert_eq!(ours.config["num_hidden_layers"], 3);
}

#[test]
fn replicated_layers_keep_their_types_and_the_lists_of_the_configuration_follow() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(1);
    let mut tensor = |dtype| Stored::of(dtype, &[2, 3], &random.floats(6));
    let base = [
        ("model.layers.0.q.weight", tensor(Dtype::F32)),
        ("model.layers.1.q.weight", tensor(Dtype::BF16)),
    ];
    let model = json!({
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "no_rope_layers": [0, 1],
    });
    write_base(&folder.path().join("base"), Some(&model), &base);
    let adapter = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "layer_replication": [[1, 2], [0, 2]]});
    let factors = [
        (
            "base_model.model.model.layers.0.q.lora_A.weight",
            Stored::of(Dtype::F32, &[1, 3], &[0.0; 3]),
        ),
        (
            "base_model.model.model.layers.0.q.lora_B.weight",
            Stored::of(Dtype::F32, &[2, 1], &[0.0; 2]),
        ),
    ];
    write_adapter(&folder.path().join("adapter"), &adapter, &factors);
    let ours = Outcome::of(
        &folder.path().join("base"),
        &[(folder.path().join("adapter"), 1.0)],
    );
    let [first, second] = base.map(|(_, tensor)| tensor);
    let expected = [
        ("model.layers.0.q.weight".to_owned(), second.clone()),
        ("model.layers.1.q.weight".to_owned(), first),
        ("model.layers.2.q.weight".to_owned(), second),
    ];
    assert_tensors(&ours.tensors, &expected.into_iter().collect());
    assert_eq!(
        ours.config,
        json!({
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "no_rope_layers": [1, 0, 1],
        })
    );
}

/// A small tied model of six tokens and four features.
fn small(random: &mut Random, folder: &Path) -> Stored {
    let embedding = Stored::of(Dtype::BF16, &[6, 4], &random.floats(24));
    let q = Stored::of(Dtype::BF16, &[4, 4], &random.floats(16));
    let config =
        json!({"model_type": "llama", "tie_word_embeddings": true, "vocab_size": 6, "other": 1.50});
    let tensors = [
        (EMBEDDING, embedding.clone()),
        ("model.layers.0.self_attn.q_proj.weight", q),
    ];
    write_base(&folder.join("base"), Some(&config), &tensors);
    embedding
}

fn key(name: &str) -> String {
    format!("base_model.model.{name}")
}

fn write(folder: &Path, name: &str, config: Value, tensors: &[(String, Stored)]) -> PathBuf {
    let path = folder.join(name);
    let mut all = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3});
    for (field, value) in config.as_object().unwrap() {
        all[field] = value.clone();
    }
    let tensors: Vec<(&str, Stored)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    write_adapter(&path, &all, &tensors);
    path
}

/// Factors of rank 2 for q_proj, so that an adapter is never without a module.
fn q_factors(random: &mut Random) -> Vec<(String, Stored)> {
    let path = "model.layers.0.self_attn.q_proj";
    vec![
        (
            key(&format!("{path}.lora_A.weight")),
            Stored::of(Dtype::F32, &[2, 4], &random.floats(8)),
        ),
        (
            key(&format!("{path}.lora_B.weight")),
            Stored::of(Dtype::F32, &[4, 2], &random.floats(8)),
        ),
    ]
}

#[test]
fn a_saved_copy_of_one_side_unties_and_equal_copies_of_both_stay_tied() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(2);
    let embedding = small(&mut random, folder.path());
    let new = Stored::of(Dtype::BF16, &[6, 4], &random.floats(24));
    let base = folder.path().join("base");
    for (saved, changed) in [
        (vec![HEAD], vec![HEAD]),
        (vec![EMBEDDING], vec![EMBEDDING]),
        (vec![EMBEDDING, HEAD], vec![EMBEDDING, HEAD]),
    ] {
        let mut tensors = q_factors(&mut random);
        tensors.extend(saved.iter().map(|name| (key(name), new.clone())));
        let config = json!({"modules_to_save": ["embed_tokens", "lm_head"]});
        let adapter = write(
            folder.path(),
            &format!("saved{}", saved.join("+")),
            config,
            &tensors,
        );
        let ours = Outcome::of(&base, &[(adapter, 1.0)]);
        let expected = |name: &str| {
            if changed.contains(&name) {
                &new
            } else {
                &embedding
            }
        };
        assert_eq!(&ours.tensors[EMBEDDING], expected(EMBEDDING), "{saved:?}");
        let tied = saved.len() == 2;
        assert_eq!(ours.config["tie_word_embeddings"], tied, "{saved:?}");
        assert_eq!(ours.has_any(NoticeKind::Untied), !tied, "{saved:?}");
        match ours.tensors.get(HEAD) {
            Some(head) => assert_eq!(head, expected(HEAD), "{saved:?}"),
            None => assert!(tied, "{saved:?}"),
        }
    }
}

#[test]
fn trained_tokens_of_a_tied_embedding_stay_tied_and_untouched_rows_keep_their_bits() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(3);
    let mut embedding = small(&mut random, folder.path());
    // A signalling NaN, an infinity and a minus zero in rows that stay.
    embedding.bytes[0..6].copy_from_slice(&[0x81, 0x7f, 0x80, 0xff, 0x00, 0x80]);
    let config = oracle::json(&folder.path().join("base/config.json"));
    let base = folder.path().join("base");
    write_base(
        &base,
        Some(&config),
        &[
            (EMBEDDING, embedding.clone()),
            (
                "model.layers.0.self_attn.q_proj.weight",
                Stored::of(Dtype::BF16, &[4, 4], &[0.5; 16]),
            ),
        ],
    );
    for dtype in [Dtype::BF16, Dtype::F32] {
        let rows = Stored::of(dtype, &[2, 4], &random.floats(8));
        let mut tensors = q_factors(&mut random);
        let name = "model.embed_tokens.token_adapter.trainable_tokens_delta";
        tensors.push((key(name), rows.clone()));
        let config = json!({"trainable_token_indices": [4, 1]});
        let adapter = write(folder.path(), &format!("tokens{dtype}"), config, &tensors);
        let ours = Outcome::of(&base, &[(adapter, 1.0)]);
        let rounded = oracle::merged(&rows, Dtype::BF16, &[]);
        let mut expected = embedding.clone();
        expected.bytes[32..40].copy_from_slice(&rounded.bytes[0..8]);
        expected.bytes[8..16].copy_from_slice(&rounded.bytes[8..16]);
        assert_eq!(ours.tensors[EMBEDDING], expected, "{dtype}");
        assert_eq!(ours.config["tie_word_embeddings"], true);
        assert!(!ours.tensors.contains_key(HEAD));
        let reported: Vec<_> = ours.report.token_rows.iter().collect();
        assert_eq!(reported, [(&EMBEDDING.to_owned(), &vec![1, 4])]);
    }
}

#[test]
fn a_resized_vocabulary_comes_with_its_rows_and_the_delta_on_top() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(4);
    small(&mut random, folder.path());
    let resized = Stored::of(Dtype::F32, &[9, 4], &random.floats(36));
    let down = Stored::of(Dtype::F32, &[2, 9], &random.floats(18));
    let up = Stored::of(Dtype::F32, &[4, 2], &random.floats(8));
    let tensors = [
        (key("model.embed_tokens.base_layer.weight"), resized.clone()),
        (key("model.embed_tokens.lora_embedding_A"), down.clone()),
        (key("model.embed_tokens.lora_embedding_B"), up.clone()),
    ];
    let adapter = write(folder.path(), "resized", json!({}), &tensors);
    let base = folder.path().join("base");
    let ours = Outcome::of(&base, &[(adapter.clone(), 1.0)]);
    let acc = oracle::transposed(&oracle::product(&up.values(), &down.values(), 2, 9), 9);
    let delta = |strength: f64| Delta {
        c: strength * 1.5,
        acc: acc.clone(),
    };
    // The type is the base's, reached in one rounding; the head shares the resized rows, not the delta.
    let expected = oracle::merged(&resized, Dtype::BF16, &[delta(1.0)]);
    assert_eq!(ours.tensors[EMBEDDING], expected);
    assert_eq!(
        ours.tensors[HEAD],
        oracle::merged(&resized, Dtype::BF16, &[])
    );
    assert_eq!(ours.config["vocab_size"], 9);
    assert_eq!(ours.config["tie_word_embeddings"], false);
    assert_eq!(ours.config["other"], 1.5);
    assert!(ours.has(NoticeKind::RowsDiffer, EMBEDDING));
    assert!(!ours.has_any(NoticeKind::StrengthIgnored));
    let half = Outcome::of(&base, &[(adapter, 0.5)]);
    let expected = oracle::merged(&resized, Dtype::BF16, &[delta(0.5)]);
    assert_eq!(half.tensors[EMBEDDING], expected);
    assert!(half.has(NoticeKind::StrengthIgnored, EMBEDDING));
}

#[test]
fn both_sides_of_a_resized_vocabulary_get_the_new_rows_from_either_copy() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(5);
    small(&mut random, folder.path());
    let resized = Stored::of(Dtype::F32, &[9, 4], &random.floats(36));
    // Only the embedding's copy is in the file, and both sides are adapted.
    let tensors = [
        (key("model.embed_tokens.base_layer.weight"), resized.clone()),
        (
            key("model.embed_tokens.lora_embedding_A"),
            Stored::of(Dtype::F32, &[2, 9], &random.floats(18)),
        ),
        (
            key("model.embed_tokens.lora_embedding_B"),
            Stored::of(Dtype::F32, &[4, 2], &random.floats(8)),
        ),
        (
            key("lm_head.lora_A.weight"),
            Stored::of(Dtype::F32, &[2, 4], &random.floats(8)),
        ),
        (
            key("lm_head.lora_B.weight"),
            Stored::of(Dtype::F32, &[9, 2], &random.floats(18)),
        ),
    ];
    let adapter = write(folder.path(), "both", json!({}), &tensors);
    let ours = Outcome::of(&folder.path().join("base"), &[(adapter, 1.0)]);
    let values = |index: usize| tensors[index].1.values();
    let embedding = oracle::transposed(&oracle::product(&values(2), &values(1), 2, 9), 9);
    let head = oracle::product(&values(4), &values(3), 2, 4);
    for (name, acc) in [(EMBEDDING, embedding), (HEAD, head)] {
        let expected = oracle::merged(&resized, Dtype::BF16, &[Delta { c: 1.5, acc }]);
        assert_eq!(ours.tensors[name], expected, "{name}");
    }
}

#[test]
fn a_copy_that_is_the_base_s_own_is_no_replacement() {
    let ours = Outcome::of(
        &fixture("peft/bases/llama"),
        &[(fixture("peft/cases/lora_lm_head/adapter"), 0.5)],
    );
    let adapter = oracle::read(&fixture(
        "peft/cases/lora_lm_head/adapter/adapter_model.safetensors",
    ));
    assert!(adapter.contains_key(&key("lm_head.base_layer.weight")));
    assert!(ours.report.replaced.is_empty());
    assert!(!ours.has_any(NoticeKind::StrengthIgnored));
}

#[test]
fn a_head_that_the_base_lacks_is_added_with_a_notice() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(6);
    small(&mut random, folder.path());
    let score = Stored::of(Dtype::F32, &[3, 4], &random.floats(12));
    let mut tensors = q_factors(&mut random);
    tensors.push((key("score.weight"), score.clone()));
    let base = folder.path().join("base");
    let config = json!({"task_type": "SEQ_CLS"});
    let adapter = write(folder.path(), "scored", config, &tensors);
    let ours = Outcome::of(&base, &[(adapter, 1.0)]);
    assert_eq!(ours.tensors["score.weight"], score);
    assert_eq!(ours.report.added, ["score.weight"]);
    assert!(ours.has(NoticeKind::AddedTensor, "score.weight"));
    // Without a word in the configuration it is a part without a place.
    let adapter = write(folder.path(), "unannounced", json!({}), &tensors);
    let error = plan(&options(&base, &adapter, &folder.path().join("out")))
        .err()
        .unwrap();
    assert_eq!(error.kind(), Kind::Unresolved, "{error}");
    assert!(error.cases()[0].contains("score.weight"), "{error:?}");
}

#[test]
fn a_replacement_with_other_rows_is_noticed_and_with_another_width_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(7);
    small(&mut random, folder.path());
    let base = folder.path().join("base");
    let save = |name: &str, random: &mut Random, shape: &[usize]| {
        let mut tensors = q_factors(random);
        let new = Stored::of(Dtype::F32, shape, &random.floats(shape.iter().product()));
        tensors.push((key(EMBEDDING), new.clone()));
        (
            write(
                folder.path(),
                name,
                json!({"modules_to_save": ["embed_tokens"]}),
                &tensors,
            ),
            new,
        )
    };
    let (adapter, new) = save("taller", &mut random, &[7, 4]);
    let ours = Outcome::of(&base, &[(adapter, 0.25)]);
    assert_eq!(
        ours.tensors[EMBEDDING],
        oracle::merged(&new, Dtype::BF16, &[]),
        "whole, whatever the strength"
    );
    assert!(ours.has(NoticeKind::RowsDiffer, EMBEDDING));
    assert!(ours.has(NoticeKind::StrengthIgnored, EMBEDDING));
    assert_eq!(ours.report.replaced, [EMBEDDING]);
    assert_eq!(ours.config["vocab_size"], 7);
    let (adapter, _) = save("wider", &mut random, &[6, 5]);
    let error = plan(&options(&base, &adapter, &folder.path().join("out")))
        .err()
        .unwrap();
    assert!(
        matches!(error.reason(), Reason::ReplacementShape { .. }),
        "{error}"
    );
}

#[test]
fn a_strength_for_the_replaced_module_is_noticed_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(8);
    small(&mut random, folder.path());
    let mut tensors = q_factors(&mut random);
    tensors.push((
        key(EMBEDDING),
        Stored::of(Dtype::F32, &[6, 4], &random.floats(24)),
    ));
    let config = json!({"modules_to_save": ["embed_tokens"]});
    let adapter = write(folder.path(), "saved", config, &tensors);
    let mut options = options(
        &folder.path().join("base"),
        &adapter,
        &folder.path().join("out"),
    );
    let noticed = |options: &loratool::ops::merge::Options| {
        let report = plan(options).unwrap().report();
        let kind = NoticeKind::StrengthIgnored;
        report.notices.iter().any(|notice| notice.kind == kind)
    };
    assert!(!noticed(&options));
    options.adapters[0].strength_for = vec![("q_proj".to_owned(), 0.5)];
    assert!(!noticed(&options));
    options.adapters[0].strength_for = vec![("embed".to_owned(), 0.5)];
    assert!(noticed(&options));
}

#[test]
fn two_adapters_may_replace_a_tensor_alike_but_not_differently() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(9);
    small(&mut random, folder.path());
    let values = random.floats(24);
    let mut save = |name: &str, stored: Stored| {
        let mut tensors = q_factors(&mut random);
        tensors.push((key(EMBEDDING), stored));
        write(
            folder.path(),
            name,
            json!({"modules_to_save": ["embed_tokens"]}),
            &tensors,
        )
    };
    let first = save("first", Stored::of(Dtype::F32, &[6, 4], &values));
    let alike = save("alike", Stored::of(Dtype::F32, &[6, 4], &values));
    let mut moved = values.clone();
    moved[23] += 0.001;
    let other = save("other", Stored::of(Dtype::F32, &[6, 4], &moved));
    let base = folder.path().join("base");
    Outcome::of(&base, &[(first.clone(), 1.0), (alike, 1.0)]);
    let output = folder.path().join("out");
    let mut options = options(&base, &first, &output);
    options.adapters.push(selection(&other, 1.0));
    let error = merge(&options).err().unwrap();
    match error.reason() {
        Reason::TwoReplacements { first, second } => {
            assert!(
                first.ends_with("first") && second.ends_with("other"),
                "{error}"
            );
        }
        _ => panic!("{error:?}"),
    }
    assert!(!output.exists());
}

#[test]
fn dora_on_both_sides_is_never_one_shared_change() {
    // On the embedding it normalises columns, on the head rows: equal factors do not mean equal results.
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(10);
    small(&mut random, folder.path());
    let (a, b) = (random.floats(12), random.floats(8));
    let stored = |shape: &[usize], values: &[f64]| Stored::of(Dtype::F32, shape, values);
    let tensors = [
        (
            key("model.embed_tokens.lora_embedding_A"),
            stored(&[2, 6], &a),
        ),
        (
            key("model.embed_tokens.lora_embedding_B"),
            stored(&[4, 2], &b),
        ),
        (
            key("model.embed_tokens.lora_magnitude_vector"),
            stored(&[4], &[1.0; 4]),
        ),
        (
            key("lm_head.lora_A.weight"),
            stored(&[2, 4], &oracle::transposed(&b, 2)),
        ),
        (
            key("lm_head.lora_B.weight"),
            stored(&[6, 2], &oracle::transposed(&a, 6)),
        ),
        (
            key("lm_head.lora_magnitude_vector"),
            stored(&[6], &[1.0; 6]),
        ),
    ];
    let config = json!({"use_dora": true, "ensure_weight_tying": true});
    let adapter = write(folder.path(), "dora", config, &tensors);
    let ours = Outcome::of(&folder.path().join("base"), &[(adapter, 1.0)]);
    assert_eq!(ours.config["tie_word_embeddings"], false);
    let norms = |stored: &Stored, rows: bool| -> Vec<f64> {
        let values = stored.values();
        let values = if rows {
            values
        } else {
            oracle::transposed(&values, 4)
        };
        let width = if rows { 4 } else { 6 };
        let norm = |row: &[f64]| row.iter().map(|v| v * v).sum::<f64>().sqrt();
        values.chunks(width).map(norm).collect()
    };
    for norm in [
        norms(&ours.tensors[EMBEDDING], false),
        norms(&ours.tensors[HEAD], true),
    ]
    .concat()
    {
        assert!((norm - 1.0).abs() < 0.01, "{norm}");
    }
}

#[test]
fn two_adapters_may_train_a_token_alike_but_not_differently() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(11);
    small(&mut random, folder.path());
    let base = folder.path().join("base");
    let (first, second) = (random.floats(4), random.floats(4));
    let mut tokens = |name: &str, indices: [usize; 2], rows: [&[f64]; 2]| {
        let mut tensors = q_factors(&mut random);
        let key = key("model.embed_tokens.token_adapter.trainable_tokens_delta");
        tensors.push((key, Stored::of(Dtype::F32, &[2, 4], &rows.concat())));
        let config = json!({"trainable_token_indices": indices});
        write(folder.path(), name, config, &tensors)
    };
    let one = tokens("one", [2, 5], [&first, &second]);
    let alike = tokens("alike", [5, 0], [&second, &first]);
    let other = tokens("other", [0, 2], [&first, &second]);
    let beyond = tokens("beyond", [2, 6], [&first, &second]);
    let ours = Outcome::of(&base, &[(one.clone(), 1.0), (alike, 1.0)]);
    let rows: Vec<_> = ours.report.token_rows.values().collect();
    assert_eq!(rows, [&vec![0, 2, 5]]);
    let refuse = |adapters: &[&PathBuf]| {
        let mut options = options(&base, &one, &folder.path().join("out"));
        options.adapters = adapters.iter().map(|path| selection(path, 1.0)).collect();
        merge(&options).err().unwrap()
    };
    let error = refuse(&[&one, &other]);
    assert!(
        matches!(error.reason(), Reason::TwoReplacements { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("row 2"), "{error}");
    let error = refuse(&[&beyond]);
    assert!(
        matches!(error.reason(), Reason::TokenRow { row: 6, rows: 6 }),
        "{error}"
    );
}
