//! Formats of language models: the same numbers, however they are spelled, give the same bytes.

use std::path::Path;

use loratool::Reason;
use loratool::containers::{Entry, gguf};
use loratool::formats::{Found, ReadOptions};
use loratool::ops::inspect::inspect;
use loratool::ops::merge::Options;

use crate::hostile_support::{Room, assert_reason, tensors};
use crate::oracle::Stored;
use crate::support::{
    Random, fixture, merge, options, write_adapter, write_base, write_safetensors,
};

const INPUTS: usize = 6;
const RANK: usize = 2;
const ALPHA: f64 = 3.0;

fn matrix(random: &mut Random, rows: usize, columns: usize) -> Stored {
    let values = random.floats(rows * columns);
    Stored::of(loratool::tensor::DType::F32, &[rows, columns], &values)
}

/// Rows of some matrices below one another.
fn stacked(matrices: &[&Stored]) -> Stored {
    let bytes = matrices.iter().flat_map(|m| m.bytes.iter().copied());
    let rows = matrices.iter().map(|m| m.shape[0]).sum();
    Stored {
        dtype: matrices[0].dtype,
        shape: vec![rows, matrices[0].shape[1]],
        bytes: bytes.collect(),
    }
}

fn turned(matrix: &Stored) -> Stored {
    let (rows, columns) = (matrix.shape[0], matrix.shape[1]);
    let element = |at: usize| matrix.bytes[at * 4..at * 4 + 4].iter().copied();
    let order = (0..columns).flat_map(|column| (0..rows).map(move |row| row * columns + column));
    Stored {
        dtype: matrix.dtype,
        shape: vec![columns, rows],
        bytes: order.flat_map(element).collect(),
    }
}

/// Merges with this alpha and gives the tensor `name` of the result.
fn merged(base: &Path, adapter: &Path, output: &Path, alpha: Option<f64>, name: &str) -> Stored {
    let options = Options {
        read: ReadOptions {
            alpha,
            ..ReadOptions::default()
        },
        ..options(base, adapter, output)
    };
    merge(&options).unwrap_or_else(|error| panic!("{}: {error:?}", adapter.display()));
    let all = crate::oracle::read(&output.join("model.safetensors"));
    all.get(name).unwrap_or_else(|| panic!("{name}")).clone()
}

fn peft(rank: usize, alpha: f64) -> serde_json::Value {
    serde_json::json!({ "peft_type": "LORA", "r": rank, "lora_alpha": alpha })
}

/// The factors of one layer under their names in a format, with what lies beside them.
struct Spelled {
    path: &'static str,
    down: &'static str,
    up: &'static str,
    file: &'static str,
    beside: &'static [(&'static str, &'static str)],
    alpha: Option<f64>,
}

const SPELLED: &[Spelled] = &[
    Spelled {
        path: "roberta.encoder.layer.0.attention.self.query",
        down: ".lora_A",
        up: ".lora_B",
        file: "lora.safetensors",
        beside: &[],
        alpha: Some(ALPHA),
    },
    Spelled {
        path: "layers.0.attn.v_proj",
        down: ".lora_a.weight",
        up: ".lora_b.weight",
        file: "adapter_model.pt",
        beside: &[(
            "adapter_config.json",
            r#"{"r": 2, "lora_alpha": 3, "peft_type": "LORA", "target_modules": ["v_proj"]}"#,
        )],
        alpha: None,
    },
    Spelled {
        path: "layers.0.attn.v_proj",
        down: ".lora_a.weight",
        up: ".lora_b.weight",
        file: "adapter_model.pt",
        beside: &[],
        alpha: Some(ALPHA),
    },
    Spelled {
        path: "transformer.h.0.mlp.fc_1",
        down: ".lora_A",
        up: ".lora_B",
        file: "lit_model.pth.lora",
        beside: &[("hyperparameters.yaml", "lora_r: 2\nlora_alpha: 3\n")],
        alpha: None,
    },
    Spelled {
        path: "bert.encoder.layer.0.attention.self.query",
        down: ".loras.mine.lora_A",
        up: ".loras.mine.lora_B",
        file: "adapter.safetensors",
        beside: &[("adapter_config.json", HUB)],
        alpha: None,
    },
];

const HUB: &str = r#"{"config": {"architecture": "lora", "alpha": 3, "r": 2, "composition_mode": "add",
    "attn_matrices": ["q"], "use_gating": false, "dropout": 0.0, "init_weights": "lora"},
    "model_type": "bert", "version": "1.0.0"}"#;

#[test]
fn the_same_factors_merge_to_the_same_bytes_in_every_spelling() {
    for spelled in SPELLED {
        let room = Room::new();
        let random = &mut Random(7);
        let base = matrix(random, 4, INPUTS);
        let (down, up) = (matrix(random, RANK, INPUTS), matrix(random, 4, RANK));
        let weight = format!("{}.weight", spelled.path);
        write_base(&room.path("base"), None, &[(&weight, base.clone())]);
        let key = |part: &str| format!("base_model.model.{}.{part}.weight", spelled.path);
        write_adapter(
            &room.path("peft"),
            &peft(RANK, ALPHA),
            &[(&key("lora_A"), down.clone()), (&key("lora_B"), up.clone())],
        );
        room.folder("other");
        let names = [spelled.down, spelled.up].map(|end| format!("{}{end}", spelled.path));
        let file = room.path("other").join(spelled.file);
        write_safetensors(&file, &[(&names[0], down), (&names[1], up)]);
        for (name, text) in spelled.beside {
            room.write(&format!("other/{name}"), text);
        }
        let (base_path, other) = (room.path("base"), room.path("other"));
        let expected = merged(
            &base_path,
            &room.path("peft"),
            &room.path("1"),
            None,
            &weight,
        );
        let found = merged(&base_path, &other, &room.path("2"), spelled.alpha, &weight);
        assert_eq!(found.bytes, expected.bytes, "{}", spelled.file);
        assert_ne!(found.bytes, base.bytes);
    }
}

/// Queries and values of a fused layer, as two layers of their own and as one.
struct Fused {
    base: Stored,
    expected: Stored,
    downs: Stored,
    ups: Stored,
}

/// Merges the parts one by one into the rows of the fused weight.
fn fused(room: &Room, sizes: [usize; 3]) -> Fused {
    let random = &mut Random(11);
    let parts = sizes.map(|rows| matrix(random, rows, INPUTS));
    let downs = [0, 1].map(|_| matrix(random, RANK, INPUTS));
    let ups = [0, 2].map(|part: usize| matrix(random, sizes[part], RANK));
    let [q, k, v] = &parts;
    let names = ["q.weight", "k.weight", "v.weight"];
    write_base(
        &room.path("parts"),
        None,
        &[
            (names[0], q.clone()),
            (names[1], k.clone()),
            (names[2], v.clone()),
        ],
    );
    let key = |path: &str, part: &str| format!("base_model.model.{path}.lora_{part}.weight");
    write_adapter(
        &room.path("of-parts"),
        &peft(RANK, ALPHA),
        &[
            (&key("q", "A"), downs[0].clone()),
            (&key("q", "B"), ups[0].clone()),
            (&key("v", "A"), downs[1].clone()),
            (&key("v", "B"), ups[1].clone()),
        ],
    );
    let output = room.path("merged-parts");
    merge(&options(
        &room.path("parts"),
        &room.path("of-parts"),
        &output,
    ))
    .unwrap();
    let all = crate::oracle::read(&output.join("model.safetensors"));
    let [q, k, v] = names.map(|name| &all[name]);
    let [a, b, c] = &parts;
    Fused {
        base: stacked(&[a, b, c]),
        expected: stacked(&[q, k, v]),
        downs: stacked(&[&downs[0], &downs[1]]),
        ups: stacked(&[&ups[0], &ups[1]]),
    }
}

#[test]
fn parts_of_a_merged_linear_land_on_their_rows() {
    let room = Room::new();
    let mut numbers = fused(&room, [4, 4, 4]);
    let weight = "transformer.h.0.self_attention.query_key_value.weight";
    write_base(&room.path("base"), None, &[(weight, numbers.base)]);
    numbers.ups.shape.push(1);
    let mut config = peft(RANK, ALPHA);
    config["enable_lora"] = serde_json::json!([true, false, true]);
    let key = |part: &str| {
        format!(
            "base_model.model.transformer.h.0.self_attention.query_key_value.lora_{part}.weight"
        )
    };
    let factors = [
        (key("A"), numbers.downs.clone()),
        (key("B"), numbers.ups.clone()),
    ];
    let factors: Vec<_> = factors
        .iter()
        .map(|(k, t)| (k.as_str(), t.clone()))
        .collect();
    write_adapter(&room.path("a"), &config, &factors);
    let found = merged(
        &room.path("base"),
        &room.path("a"),
        &room.path("out"),
        None,
        weight,
    );
    assert_eq!(found.bytes, numbers.expected.bytes);
    let refused = |config: &serde_json::Value, factors: &[(&str, Stored)]| {
        write_adapter(&room.path("b"), config, factors);
        let read = Found::open(&room.path("b"))
            .unwrap()
            .read(&ReadOptions::default());
        assert_reason!(read.unwrap_err(), Reason::FactorShape { .. });
    };
    let mut flat = factors.clone();
    flat[1].1.shape.pop();
    refused(&config, &flat);
    config["enable_lora"] = serde_json::json!([true, true, true]);
    refused(&config, &factors);
}

const HEADS: &str = "name: tiny\nn_head: 2\nn_query_groups: 1\nhead_size: 2\n";
const PARTS: &str =
    "lora_r: 2\nlora_alpha: 3\nlora_query: true\nlora_key: false\nlora_value: true\n";

#[test]
fn a_fused_layer_of_litgpt_lands_on_its_rows() {
    let room = Room::new();
    let numbers = fused(&room, [4, 2, 2]);
    let weight = "transformer.h.0.attn.qkv.weight";
    write_base(&room.path("base"), None, &[(weight, numbers.base)]);
    room.folder("a");
    let path = room.path("a/lit_model.pth.lora");
    let factors = [
        ("model.transformer.h.0.attn.qkv.lora_A", numbers.downs),
        ("model.transformer.h.0.attn.qkv.lora_B", numbers.ups),
    ];
    write_safetensors(&path, &factors);
    let read = || {
        let found = Found::open(&room.path("a"))?;
        assert_eq!(found.format().unwrap().name(), "LitGPT");
        found.read(&ReadOptions::default()).map(drop)
    };
    room.write("a/hyperparameters.yaml", PARTS);
    assert_reason!(
        read().unwrap_err(),
        Reason::FieldMissing { field: "head_size" }
    );
    room.write("a/model_config.yaml", HEADS);
    let found = merged(
        &room.path("base"),
        &room.path("a"),
        &room.path("out"),
        None,
        weight,
    );
    assert_eq!(found.bytes, numbers.expected.bytes);
    room.write(
        "a/hyperparameters.yaml",
        PARTS.replace("key: false", "key: true"),
    );
    assert_reason!(read().unwrap_err(), Reason::FactorShape { .. });
    // Keys and values fill the factor, but the queries beside them would take gigabytes of zeros.
    let others = PARTS
        .replace("false", "true")
        .replace("query: true", "query: false");
    room.write("a/hyperparameters.yaml", others);
    let vast = "n_head: 900000000\nn_query_groups: 3\nhead_size: 1\n";
    room.write("a/model_config.yaml", vast);
    assert_reason!(read().unwrap_err(), Reason::FileTooLarge { .. });
    room.write(
        "a/hyperparameters.yaml",
        PARTS.replace("key: false", "key: no"),
    );
    assert_reason!(read().unwrap_err(), Reason::FieldType { .. });
}

const ADAPTER: &[(&str, &str)] = &[("general.type", "adapter"), ("adapter.type", "lora")];

/// A GGUF adapter of these tensors.
fn write_gguf(path: &Path, keys: &[(&str, &str)], alpha: Option<f32>, tensors: &[(&str, &Stored)]) {
    let texts = keys.iter();
    let mut metadata: Vec<(String, gguf::Value)> = texts
        .map(|(key, value)| ((*key).to_owned(), gguf::Value::Text((*value).to_owned())))
        .collect();
    metadata.extend(alpha.map(|alpha| ("adapter.lora.alpha".to_owned(), gguf::Value::F32(alpha))));
    let entries: Vec<Entry<'_>> = tensors
        .iter()
        .map(|(name, tensor)| Entry {
            name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            blocks: None,
        })
        .collect();
    let header = gguf::header(&metadata, &entries).unwrap();
    let mut bytes = header.bytes;
    for (_, tensor) in tensors {
        bytes.extend(&tensor.bytes);
        bytes.resize(bytes.len().next_multiple_of(header.alignment as usize), 0);
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_gguf_adapter_merges_like_the_same_numbers_of_peft() {
    // α, and the α of PEFT that gives the same scale at rank 2.
    for (alpha, same) in [(Some(3.0), 3.0), (Some(0.0), 2.0), (None, 2.0)] {
        let room = Room::new();
        let random = &mut Random(5);
        let (layer, embedding) = (matrix(random, 4, INPUTS), matrix(random, 5, INPUTS));
        let weights = ["blk.0.attn_v.weight", "token_embd.weight"];
        // Without it the embedding would be the output as well.
        let output = matrix(random, 5, INPUTS);
        write_base(
            &room.path("base"),
            None,
            &[
                (weights[0], layer),
                (weights[1], embedding),
                ("output.weight", output),
            ],
        );
        let (down, up) = (matrix(random, RANK, INPUTS), matrix(random, 4, RANK));
        let (tokens, width) = (matrix(random, RANK, 5), matrix(random, INPUTS, RANK));
        write_adapter(
            &room.path("peft"),
            &peft(RANK, same),
            &[
                ("base_model.model.blk.0.attn_v.lora_A.weight", down.clone()),
                ("base_model.model.blk.0.attn_v.lora_B.weight", up.clone()),
                (
                    "base_model.model.token_embd.lora_embedding_A",
                    tokens.clone(),
                ),
                (
                    "base_model.model.token_embd.lora_embedding_B",
                    width.clone(),
                ),
            ],
        );
        let adapter = room.path("adapter.gguf");
        write_gguf(
            &adapter,
            ADAPTER,
            alpha,
            &[
                ("blk.0.attn_v.weight.lora_a", &down),
                ("blk.0.attn_v.weight.lora_b", &up),
                ("token_embd.weight.lora_a", &turned(&tokens)),
                ("token_embd.weight.lora_b", &width),
            ],
        );
        let base = room.path("base");
        for (number, weight) in weights.iter().enumerate() {
            let output = |kind: &str| room.path(&format!("{kind}{number}"));
            let expected = merged(&base, &room.path("peft"), &output("p"), None, weight);
            let found = merged(&base, &adapter, &output("g"), None, weight);
            assert_eq!(found.bytes, expected.bytes, "{weight} {alpha:?}");
        }
    }
}

#[test]
fn rotary_pairs_of_a_gguf_adapter_land_on_the_halves_of_the_hub() {
    let room = Room::new();
    let random = &mut Random(3);
    let (heads, size) = (2, 4);
    let weight = "model.layers.0.self_attn.q_proj.weight";
    let config = serde_json::json!({
        "model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": heads
    });
    let base = matrix(random, heads * size, heads * size);
    write_base(&room.path("base"), Some(&config), &[(weight, base)]);
    let down = matrix(random, RANK, heads * size);
    let up = matrix(random, heads * size, RANK);
    write_adapter(
        &room.path("peft"),
        &peft(RANK, ALPHA),
        &[
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                down.clone(),
            ),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                up.clone(),
            ),
        ],
    );
    // Row (head, half, place) of the hub is row (head, place, half) here.
    let line = RANK * 4;
    let row = |to: usize| {
        let (head, place, half) = (to / size, to % size / 2, to % 2);
        head * size + half * size / 2 + place
    };
    let lines = (0..heads * size).flat_map(|to| up.bytes[row(to) * line..][..line].to_vec());
    let pairs = Stored {
        bytes: lines.collect(),
        ..up.clone()
    };
    let adapter = room.path("adapter.gguf");
    let factors = [
        ("blk.0.attn_q.weight.lora_a", &down),
        ("blk.0.attn_q.weight.lora_b", &pairs),
    ];
    write_gguf(&adapter, ADAPTER, Some(ALPHA as f32), &factors);
    let base = room.path("base");
    let expected = merged(&base, &room.path("peft"), &room.path("1"), None, weight);
    let found = merged(&base, &adapter, &room.path("2"), None, weight);
    assert_eq!(found.bytes, expected.bytes);
}

#[test]
fn what_a_gguf_adapter_holds_besides_is_refused_by_name() {
    let room = Room::new();
    let path = room.path("x.gguf");
    let one = &matrix(&mut Random(1), 2, 2);
    let pair = [("m.weight.lora_a", one), ("m.weight.lora_b", one)];
    let read = |keys: &[(&str, &str)], alpha, more: &[(&str, &Stored)]| {
        write_gguf(
            &path,
            &[ADAPTER, keys].concat(),
            alpha,
            &[&pair, more].concat(),
        );
        Found::open(&path)?.read(&ReadOptions::default()).map(drop)
    };
    read(&[], Some(1.0), &[]).unwrap();
    let norm = ("blk.0.attn_norm.weight", one);
    assert_reason!(read(&[], None, &[norm]).unwrap_err(), Reason::Stored { .. });
    let other = ("blk.0.attn_q.bias", one);
    assert_reason!(
        read(&[], None, &[other]).unwrap_err(),
        Reason::UnknownKeys { count: 1 }
    );
    let mut stack = one.clone();
    stack.shape = vec![1, 2, 2];
    let experts = ("blk.0.ffn_up_exps.weight.lora_a", &stack);
    assert_reason!(
        read(&[], None, &[experts]).unwrap_err(),
        Reason::MethodOnTarget { .. }
    );
    let activated = ("adapter.alora.invocation_tokens", "1 2");
    assert_reason!(
        read(&[activated], None, &[]).unwrap_err(),
        Reason::ConfigField { .. }
    );
    let infinite = Some(f32::INFINITY);
    assert_reason!(
        read(&[], infinite, &[]).unwrap_err(),
        Reason::AlphaNotFinite { .. }
    );
}

/// Reads a file of these tensors with what lies beside it.
fn read(
    content: &[(&str, &[usize])],
    beside: &[(&str, &str)],
    alpha: Option<f64>,
) -> loratool::Result<loratool::adapter::Adapter> {
    let room = Room::new();
    room.write("a.safetensors", tensors(content));
    for (name, text) in beside {
        room.write(name, text);
    }
    let options = ReadOptions {
        alpha,
        ..ReadOptions::default()
    };
    Found::open(&room.path("a.safetensors"))?.read(&options)
}

const PAIR: &[(&str, &[usize])] = &[("q.lora_A", &[2, 6]), ("q.lora_B", &[4, 2])];

#[test]
fn loralib_asks_for_its_alpha_and_refuses_what_its_file_does_not_tell() {
    assert_reason!(read(PAIR, &[], None).unwrap_err(), Reason::AlphaMissing);
    let error = read(PAIR, &[], None).unwrap_err();
    assert!(error.hint().unwrap().contains("--adapter-alpha"));
    let infinite = read(PAIR, &[], Some(f64::NAN)).unwrap_err();
    assert_reason!(infinite, Reason::AlphaNotFinite { .. });
    let more: &[(&str, &[usize])] = &[("q.bias", &[4]), ("classifier.weight", &[3, 4])];
    let adapter = read(&[PAIR, more].concat(), &[], Some(4.0)).unwrap();
    assert_eq!(adapter.modules[0].scale.value, 2.0);
    assert_eq!(adapter.replacements.len(), 2);
    let whole: &[(&str, &[usize])] = &[("q.weight", &[4, 6])];
    let error = read(&[PAIR, whole].concat(), &[], Some(4.0)).unwrap_err();
    assert_reason!(error, Reason::Stored { .. });
    assert_eq!(error.cases(), ["q.weight"]);
    let merged: &[(&str, &[usize])] = &[("qkv.lora_A", &[4, 6]), ("qkv.lora_B", &[8, 2])];
    assert_reason!(
        read(merged, &[], Some(4.0)).unwrap_err(),
        Reason::Stored { .. }
    );
}

#[test]
fn torchtune_norms_make_dora() {
    let content: &[(&str, &[usize])] = &[
        ("layers.0.mlp.w1.lora_a.weight", &[2, 6]),
        ("layers.0.mlp.w1.lora_b.weight", &[4, 2]),
        ("layers.0.mlp.w1.magnitude", &[4]),
    ];
    let adapter = read(content, &[], Some(4.0)).unwrap();
    assert_eq!(adapter.modules[0].method.name(), "DoRA");
    assert_eq!(adapter.modules[0].path, "layers.0.mlp.w1");
    assert_reason!(read(content, &[], None).unwrap_err(), Reason::AlphaMissing);
    let odd: &[(&str, &[usize])] = &[("layers.0.norm.scale", &[4])];
    let error = read(&[content, odd].concat(), &[], Some(4.0)).unwrap_err();
    assert_reason!(error, Reason::UnknownKeys { count: 1 });
}

#[test]
fn of_adapterhub_only_changes_of_weights_are_read() {
    let pair: &[(&str, &[usize])] = &[
        ("bert.query.loras.mine.lora_A", &[2, 6]),
        ("bert.query.loras.mine.lora_B", &[4, 2]),
    ];
    let with = |from: &str, to: &str| {
        let text = HUB.replace(from, to);
        read(pair, &[("adapter_config.json", &text)], None)
    };
    assert_eq!(with("", "").unwrap().modules[0].scale.value, 1.5);
    for (from, to) in [
        ("\"lora\", \"alpha\"", "null, \"alpha\""),
        ("\"lora\", \"alpha\"", "\"prefix_tuning\", \"alpha\""),
        ("\"use_gating\": false", "\"use_gating\": true"),
        ("\"add\"", "\"scale\""),
    ] {
        assert_reason!(with(from, to).unwrap_err(), Reason::ConfigField { .. });
    }
    let unknown = with("\"dropout\"", "\"vera_d\": 1.0, \"dropout\"").unwrap_err();
    assert_reason!(unknown, Reason::UnknownConfigField { .. });
    assert_reason!(read(pair, &[], None).unwrap_err(), Reason::NoAdapterConfig);
    let two: &[(&str, &[usize])] = &[("bert.key.loras.yours.lora_A", &[2, 6])];
    let config = [("adapter_config.json", HUB)];
    let error = read(&[pair, two].concat(), &config, None).unwrap_err();
    assert_reason!(error, Reason::FieldValue { .. });
    let scales: &[(&str, &[usize])] = &[("bert.query.loras.mine.lora_B", &[4, 1])];
    let text = HUB
        .replace("\"add\"", "\"scale\"")
        .replace("\"alpha\": 3", "\"alpha\": 1");
    let adapter = read(scales, &[("adapter_config.json", &text)], None).unwrap();
    assert_eq!(adapter.modules[0].method.name(), "IA3");
    let bottleneck: &[(&str, &[usize])] = &[("l.adapters.mine.adapter_down.0.weight", &[2, 6])];
    let text = HUB.replace("\"lora\", \"alpha\"", "null, \"alpha\"");
    let error = read(bottleneck, &[("adapter_config.json", &text)], None).unwrap_err();
    assert!(error.to_string().contains("activation"), "{error}");
}

#[test]
fn factors_by_number_and_vectors_are_described_and_refused_with_the_reason() {
    let numbered: &[(&str, &[usize])] = &[
        ("<s1>", &[6]),
        ("unet:0:down", &[1, 6]),
        ("unet:0:up", &[4, 1]),
    ];
    assert_reason!(read(numbered, &[], None).unwrap_err(), Reason::Ordinals);
    let vectors: &[(&str, &[usize])] = &[("emb_params", &[5, 6])];
    let error = read(vectors, &[], None).unwrap_err();
    assert_reason!(error, Reason::InputVectors { .. });
    let room = Room::new();
    let path = room.write("a.safetensors", tensors(numbered));
    let facts = inspect(&path, &Default::default()).unwrap();
    let facts = facts.summary.unwrap().facts;
    assert_eq!(facts["token <s1>"], "vectors: 1, of width 6");
    assert_eq!(facts["unet"], "1 layers by number");
}

#[test]
fn the_adapter_of_the_gguf_library_is_read() {
    let found = inspect(&fixture("gguf/adapter.gguf"), &Default::default()).unwrap();
    let adapter = found.adapter.unwrap();
    assert_eq!(adapter.modules.len(), 2);
    assert_eq!(adapter.modules[0].path, "blk.0.attn_q");
    assert_eq!(adapter.modules[0].scale.value, 8.0);
}
