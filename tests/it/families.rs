//! The tables of families against what the peers' own converters did with numbered rows
//! (`fixtures/make_families.py`).

use std::ops::Range;

use loratool::containers::TensorFile;
use loratool::naming::families::{Layout, Match, Side, find};
use loratool::naming::{Attention, Rows};
use serde_json::Value;

use crate::hostile_support::Room;
use crate::oracle::{Stored, read};
use crate::support::{Random, fixture, merge, options, write_adapter, write_base};

/// The file, the family, and how many layers it names at least.
const FAMILIES: &[(&str, &str, usize)] = &[
    ("sd1", "sd1", 180),
    ("sd2", "sd1", 180),
    ("sdxl", "sdxl", 200),
    ("sd3", "sd3", 30),
    ("flux1", "flux1", 50),
    ("flux2", "flux2", 25),
    ("hunyuan-video", "hunyuan-video", 50),
    ("wan", "wan", 20),
    ("anima", "anima", 20),
    ("qwen-image", "qwen-image", 20),
    ("ltx", "ltx", 20),
    ("lumina2", "lumina2", 40),
    ("z-image", "z-image", 40),
    ("openclip", "openclip", 15),
    ("t5", "t5", 14),
    ("llama-gguf", "llama", 17),
    ("mistral-gguf", "llama", 17),
    ("qwen2-gguf", "qwen2", 17),
    ("qwen3-gguf", "qwen3", 17),
    ("mixtral-gguf", "llama", 30),
    ("qwen2moe-gguf", "qwen2moe", 40),
    ("gemma2-gguf", "gemma2", 15),
    ("gemma3-gguf", "gemma3", 14),
    ("phi3-gguf", "phi3", 15),
    ("starcoder2-gguf", "starcoder2", 18),
    ("gptneox-gguf", "gptneox", 15),
    ("bloom-gguf", "bloom", 15),
    ("falcon-gguf", "falcon", 10),
    ("falcon-new-gguf", "falcon", 10),
    ("gpt2-gguf", "gpt2", 15),
    ("bert-gguf", "bert", 20),
    ("t5-gguf", "t5", 50),
    ("cohere-gguf", "command-r", 18),
    ("stablelm-gguf", "stablelm", 21),
    ("olmo2-gguf", "olmo2", 25),
    ("glm4-gguf", "glm4", 23),
    ("gpt-oss-gguf", "gpt-oss", 17),
];

fn ranges(value: &Value) -> Option<Vec<Range<usize>>> {
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    let range = |pair: &Value| number(&pair[0])..number(&pair[1]);
    Some(value.as_array()?.iter().map(range).collect())
}

/// The single rows of ranges, which may be cut in different ways.
fn rows_of(ranges: &[Range<usize>]) -> Vec<usize> {
    ranges.iter().cloned().flatten().collect()
}

fn inverse(rows: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; rows.len()];
    for (place, row) in rows.iter().enumerate() {
        inverse[*row] = place;
    }
    inverse
}

#[test]
fn every_family_places_layers_as_the_peers_converters_do() {
    for (file, family, least) in FAMILIES {
        let text = std::fs::read(fixture(&format!("families/{file}.json"))).unwrap();
        let all: Value = serde_json::from_slice(&text).unwrap();
        let config = &all["config"];
        let count = |name: &str| config[name].as_u64().map(|count| count as usize);
        let attention = Attention {
            query: count("num_attention_heads").or(count("n_head")),
            key: count("num_key_value_heads").or(count("num_kv_heads")),
        };
        let mut known = 0;
        for (hub, told) in all["tensors"].as_object().unwrap() {
            let Some(path) = hub.strip_suffix(".weight") else {
                continue;
            };
            let told = told.get(0).unwrap_or(told);
            let Some(original) = told["original"].as_str().or(told["gguf"].as_str()) else {
                continue; // made by the converter
            };
            let found = find(path, false);
            let is_own = |found: &&Match| {
                let of_llama_cpp = found.family.layout == Layout::Gguf;
                found.family.name == *family
                    && found.side == Side::Hub
                    && of_llama_cpp == all["architecture"].is_string()
            };
            let found: Vec<_> = found.iter().filter(is_own).collect();
            let [found] = found.as_slice() else {
                assert!(found.is_empty(), "{file}: {hub}: {found:?}");
                continue;
            };
            known += 1;
            let name = found.name(Side::Other);
            let wanted = ["weight", "in_proj_weight", "scale"]
                .iter()
                .find_map(|parameter| original.strip_suffix(&format!(".{parameter}")))
                .unwrap_or(original);
            assert!(
                wanted == name || wanted.ends_with(&format!(".{name}")),
                "{file}: {hub} is {wanted}, not {name}"
            );
            let rows = found.rows().unwrap();
            if let Rows::Expert { expert, .. } = rows {
                assert_eq!(
                    told["expert"].as_u64(),
                    Some(expert as u64),
                    "{file}: {hub}"
                );
                assert!(told.get("rows").is_none() && told.get("at").is_none());
                continue;
            }
            assert!(told.get("expert").is_none(), "{file}: {hub}");
            let transposed = told["transposed"] == true;
            let turned = matches!(rows, Rows::Transposed | Rows::Conv1D);
            assert_eq!(turned, transposed, "{file}: {hub}");
            let shape: Vec<usize> = told["shape"]
                .as_array()
                .unwrap()
                .iter()
                .map(|size| size.as_u64().unwrap() as usize)
                .collect();
            // Nothing is told of rows that are all, in order.
            let Some(told) = ranges(&told["rows"]) else {
                let ours = rows.ranges(shape[0], shape.get(1).copied().unwrap_or(1), attention);
                let all: Vec<usize> = (0..shape[0]).collect();
                assert_eq!(rows_of(&ours.unwrap()), all, "{file}: {hub}: {rows:?}");
                continue;
            };
            let height = match rows {
                Rows::Block { of, .. } => shape[0] * of,
                Rows::Blocks { count, of, .. } => shape[0] * of / count,
                Rows::Square { .. } => 7 * shape[1],
                Rows::Rest { after } => shape[0] + after * shape[1],
                _ => shape[0],
            };
            let ours = rows.ranges(height, shape[1], attention).unwrap();
            let told = match all["architecture"].is_string() {
                // llama.cpp's rows are told in its own order.
                true => inverse(&rows_of(&told)),
                false => rows_of(&told),
            };
            assert_eq!(rows_of(&ours), told, "{file}: {hub}");
        }
        assert!(known >= *least, "{file}: {known}");
    }
}

#[test]
fn adapters_and_models_of_llama_cpp_merge_as_their_originals_do() {
    let values = |path: &std::path::Path| -> std::collections::BTreeMap<String, Vec<f64>> {
        let file = TensorFile::open(path).unwrap();
        let tensors = file.directory.tensors.iter();
        tensors
            .map(|tensor| (tensor.name.clone(), tensor.to_f64().unwrap()))
            .collect()
    };
    for model in ["llama", "qwen2"] {
        let file = |name: &str| fixture("formats/gguf").join(model).join(name);
        for (base, adapter, expected, output) in [
            ("base", "plain.gguf", "plain-merged.safetensors", "merged"),
            ("base", "plain", "plain-merged.safetensors", "merged"),
            (
                "base-f32.gguf",
                "plain.gguf",
                "plain-merged.gguf",
                "merged.gguf",
            ),
            ("base-f32.gguf", "plain", "plain-merged.gguf", "merged.gguf"),
        ] {
            let room = tempfile::tempdir().unwrap();
            let output = room.path().join(output);
            let options = options(&file(base), &file(adapter), &output);
            merge(&options).unwrap_or_else(|e| panic!("{model}, {base}, {adapter}: {e:?}"));
            let output = match output.is_dir() {
                true => output.join("model.safetensors"),
                false => output,
            };
            let (ours, theirs) = (values(&output), values(&file(expected)));
            assert!(theirs.len() > 15);
            for (name, theirs) in theirs {
                let ours = &ours[&name];
                let largest = theirs
                    .iter()
                    .fold(0.0, |all: f64, value| all.max(value.abs()));
                let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6 * largest;
                assert!(
                    ours.iter().zip(&theirs).all(close),
                    "{model}, {base}, {adapter}: {name}"
                );
            }
        }
    }
}

#[test]
fn one_flux_in_any_spelling_becomes_what_diffusers_computes() {
    for name in [
        "xlabs",
        "bfl-control",
        "kohya",
        "kohya-split",
        "diffusers",
        "diffusers-dora",
        "diffusers-rslora",
        "diffusers-patterns",
        "diffusers-bare",
    ] {
        let file = |name: &str| fixture(&format!("formats/flux/{name}.safetensors"));
        let room = tempfile::tempdir().unwrap();
        let output = room.path().join("merged.safetensors");
        merge(&options(&file("base"), &file(name), &output))
            .unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let ours = TensorFile::open(&output).unwrap();
        let expected = TensorFile::open(file(&format!("{name}-changed"))).unwrap();
        assert!(expected.directory.tensors.len() >= 8, "{name}");
        for theirs in &expected.directory.tensors {
            let ours = ours.tensor(&theirs.name).unwrap().to_f64().unwrap();
            let theirs_values = theirs.to_f64().unwrap();
            let largest = theirs_values
                .iter()
                .fold(0.0, |all: f64, value| all.max(value.abs()));
            let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6 * largest;
            assert_eq!(ours.len(), theirs_values.len());
            assert!(
                ours.iter().zip(&theirs_values).all(close),
                "{name}: {}",
                theirs.name
            );
        }
    }
}

/// Rows of a matrix, or slices of a stack, in another order.
fn picked(from: &Stored, rows: &[usize]) -> Stored {
    let line = from.bytes.len() / from.shape[0];
    let mut shape = from.shape.clone();
    shape[0] = rows.len();
    Stored {
        dtype: from.dtype,
        shape,
        bytes: rows
            .iter()
            .flat_map(|row| from.bytes[row * line..][..line].to_vec())
            .collect(),
    }
}

fn random(random: &mut Random, shape: &[usize]) -> Stored {
    let values = random.floats(shape.iter().product());
    Stored::of(loratool::tensor::DType::F32, shape, &values)
}

/// An adapter of rank 2 for one layer.
fn adapter(room: &Room, numbers: &mut Random, path: &str, outputs: usize, inputs: usize) {
    let config = serde_json::json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 3 });
    let key = |factor: &str| format!("base_model.model.{path}.lora_{factor}.weight");
    let down = random(numbers, &[2, inputs]);
    let up = random(numbers, &[outputs, 2]);
    let tensors = [(&*key("A"), down), (&*key("B"), up)];
    write_adapter(&room.path("adapter"), &config, &tensors);
}

fn merged(room: &Room, base: &str, tensor: &str) -> Stored {
    let output = room.path(&format!("{base} merged"));
    let mut options = options(&room.path(base), &room.path("adapter"), &output);
    options.force = true;
    merge(&options).unwrap();
    read(&output.join("model.safetensors"))[tensor].clone()
}

#[test]
fn fused_layers_that_llama_cpp_keeps_by_kind_get_the_rows_of_every_head() {
    let falcon = |keys: usize, multi_query: bool, new: bool| {
        serde_json::json!({
            "model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": keys,
            "multi_query": multi_query, "new_decoder_architecture": new,
        })
    };
    let neox = serde_json::json!({ "model_type": "gpt_neox", "num_attention_heads": 4 });
    let by_head = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11];
    let falcon_layer = "transformer.h.0.self_attention.query_key_value";
    // Where each head of GGUF is on the hub.
    for (config, path, heads) in [
        (
            neox,
            "gpt_neox.layers.0.attention.query_key_value",
            &by_head[..],
        ),
        (falcon(4, false, false), falcon_layer, &by_head),
        (
            falcon(2, true, true),
            falcon_layer,
            &[0, 1, 4, 5, 2, 6, 3, 7],
        ),
        // There its number of keys says nothing.
        (falcon(4, true, false), falcon_layer, &[0, 1, 2, 3, 4, 5]),
    ] {
        let room = Room::new();
        let numbers = &mut Random(7);
        let size = 2;
        let rows: Vec<usize> = heads
            .iter()
            .flat_map(|head| head * size..(head + 1) * size)
            .collect();
        let hub = random(numbers, &[rows.len(), 6]);
        let (name, other) = (format!("{path}.weight"), "blk.0.attn_qkv.weight");
        let fused = picked(&hub, &rows);
        write_base(&room.path("hub"), Some(&config), &[(&name, hub.clone())]);
        write_base(
            &room.path("llama.cpp"),
            Some(&config),
            &[(other, fused.clone())],
        );
        adapter(&room, numbers, path, rows.len(), 6);
        let expected = picked(&merged(&room, "hub", &name), &rows);
        let found = merged(&room, "llama.cpp", other);
        assert_ne!(found.bytes, fused.bytes);
        assert_eq!(found.bytes, expected.bytes, "{config}");
    }
}

#[test]
fn an_expert_changes_its_slice_of_a_stack_of_llama_cpp_and_no_other() {
    let room = Room::new();
    let numbers = &mut Random(8);
    let path = "model.layers.0.block_sparse_moe.experts.1.w1";
    let stack = random(numbers, &[3, 4, 6]);
    let slice = Stored {
        shape: vec![4, 6],
        ..picked(&stack, &[1])
    };
    let (name, other) = (format!("{path}.weight"), "blk.0.ffn_gate_exps.weight");
    write_base(&room.path("hub"), None, &[(&name, slice)]);
    write_base(&room.path("llama.cpp"), None, &[(other, stack.clone())]);
    adapter(&room, numbers, path, 4, 6);
    let found = merged(&room, "llama.cpp", other);
    assert_eq!(found.shape, [3, 4, 6]);
    let one = |stack: &Stored, slice: usize| picked(stack, &[slice]).bytes;
    assert_eq!(one(&found, 1), merged(&room, "hub", &name).bytes);
    assert_ne!(one(&found, 1), one(&stack, 1));
    assert_eq!(one(&found, 0), one(&stack, 0));
    assert_eq!(one(&found, 2), one(&stack, 2));
}

/// Layers of the hub, what they are together in another layout, and whose rows its rows are.
struct Fused {
    hub: &'static [(&'static str, usize)],
    other: &'static str,
    order: Vec<usize>,
}

impl Fused {
    /// The rows of the hub's layers, in the order of the other layout.
    fn fuse(&self, parts: &[Stored]) -> Stored {
        let mut all = parts[0].clone();
        all.bytes = parts.iter().flat_map(|part| part.bytes.clone()).collect();
        all.shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        picked(&all, &self.order)
    }

    fn outputs(&self, path: &str) -> usize {
        let all = || self.order.len();
        let known = self.hub.iter().find(|(name, _)| *name == path);
        known.map_or_else(all, |(_, outputs)| *outputs)
    }
}

/// A merged weight and bias.
fn both(room: &Room, base: &str, path: &str) -> [Stored; 2] {
    ["weight", "bias"].map(|parameter| merged(room, base, &format!("{path}.{parameter}")))
}

#[test]
fn a_bias_of_a_part_of_a_fused_layer_changes_the_entries_of_its_rows() {
    const WIDTH: usize = 4;
    let heads = |heads: &[usize]| {
        let rows = heads.iter().flat_map(|head| head * 2..(head + 1) * 2);
        rows.collect::<Vec<_>>()
    };
    let to = [
        ("single_transformer_blocks.0.attn.to_q", WIDTH),
        ("single_transformer_blocks.0.attn.to_k", WIDTH),
        ("single_transformer_blocks.0.attn.to_v", WIDTH),
        ("single_transformer_blocks.0.proj_mlp", 5),
    ];
    let layers = [
        Fused {
            hub: &[("gpt_neox.layers.0.attention.query_key_value", 24)],
            other: "blk.0.attn_qkv",
            order: heads(&[0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]),
        },
        Fused {
            hub: &[
                ("transformer_blocks.0.attn.add_q_proj", 6),
                ("transformer_blocks.0.attn.add_k_proj", 6),
                ("transformer_blocks.0.attn.add_v_proj", 6),
            ],
            other: "double_blocks.0.txt_attn.qkv",
            order: (0..18).collect(),
        },
        Fused {
            hub: Vec::leak(to.to_vec()),
            other: "single_blocks.0.linear1",
            order: (0..17).collect(),
        },
        Fused {
            hub: &[("norm_out.linear", 6)],
            other: "final_layer.adaLN_modulation.1",
            order: vec![3, 4, 5, 0, 1, 2],
        },
        Fused {
            hub: &[
                ("encoder.layer.0.mlp.gate_proj", 5),
                ("encoder.layer.0.mlp.up_proj", 5),
            ],
            other: "encoder.layer.0.mlp.weights_in",
            order: (0..10).collect(),
        },
    ];
    for layer in layers {
        let room = Room::new();
        let numbers = &mut Random(9);
        let config = match layer.hub[0].0.starts_with("gpt_neox") {
            true => serde_json::json!({ "model_type": "gpt_neox", "num_attention_heads": 4 }),
            false => serde_json::json!({}),
        };
        let mut hub = Vec::new();
        for (path, outputs) in layer.hub {
            hub.push((
                format!("{path}.weight"),
                random(numbers, &[*outputs, WIDTH]),
            ));
            hub.push((format!("{path}.bias"), random(numbers, &[*outputs])));
        }
        let of = |at: usize| -> Vec<Stored> {
            let tensors = hub.iter().skip(at).step_by(2);
            tensors.map(|(_, tensor)| tensor.clone()).collect()
        };
        let names = ["weight", "bias"].map(|parameter| format!("{}.{parameter}", layer.other));
        let other = [
            (&*names[0], layer.fuse(&of(0))),
            (&*names[1], layer.fuse(&of(1))),
        ];
        let named: Vec<_> = hub
            .iter()
            .map(|(name, tensor)| (&**name, tensor.clone()))
            .collect();
        write_base(&room.path("hub"), Some(&config), &named);
        write_base(&room.path("other"), Some(&config), &other);
        let paths = layer.hub.iter().map(|(path, _)| *path);
        for path in paths.chain([layer.other]) {
            let outputs = layer.outputs(path);
            for method in ["LORA", "IA3"] {
                let config = serde_json::json!({
                    "peft_type": method, "r": 2, "lora_alpha": 3, "lora_bias": true,
                    "target_modules": [path], "feedforward_modules": [],
                });
                let key = |suffix: &str| format!("base_model.model.{path}.{suffix}");
                let tensors = match method {
                    "LORA" => vec![
                        (key("lora_A.weight"), random(numbers, &[2, WIDTH])),
                        (key("lora_B.weight"), random(numbers, &[outputs, 2])),
                        (key("lora_B.bias"), random(numbers, &[outputs])),
                    ],
                    _ => vec![(key("ia3_l"), random(numbers, &[outputs, 1]))],
                };
                let tensors: Vec<_> = tensors.iter().map(|(n, t)| (&**n, t.clone())).collect();
                write_adapter(&room.path("adapter"), &config, &tensors);
                let parts = layer.hub.iter().map(|(path, _)| both(&room, "hub", path));
                let (weights, biases): (Vec<_>, Vec<_>) = parts.map(|[w, b]| (w, b)).unzip();
                let [weight, bias] = both(&room, "other", layer.other);
                assert_ne!(bias.bytes, other[1].1.bytes, "{method}, {path}");
                assert_eq!(layer.fuse(&weights).bytes, weight.bytes, "{method}, {path}");
                assert_eq!(layer.fuse(&biases).bytes, bias.bytes, "{method}, {path}");
            }
        }
    }
}

#[test]
fn layers_of_gpt2_change_alike_on_the_hub_and_in_llama_cpp_which_transposes_them() {
    let room = Room::new();
    let numbers = &mut Random(11);
    let config = serde_json::json!({ "model_type": "gpt2" });
    // Also square, where no shape tells.
    for (path, other, outputs, inputs) in [
        ("transformer.h.0.attn.c_attn", "blk.0.attn_qkv", 12, 4),
        ("transformer.h.0.attn.c_proj", "blk.0.attn_output", 4, 4),
    ] {
        let turned = |weight: &Stored| {
            let (rows, columns) = (weight.shape[0], weight.shape[1]);
            let element = |at: usize| weight.bytes[4 * at..4 * at + 4].to_vec();
            let places = (0..columns).flat_map(|column| (0..rows).map(move |row| (row, column)));
            Stored {
                dtype: weight.dtype,
                shape: vec![columns, rows],
                bytes: places
                    .flat_map(|(row, column)| element(row * columns + column))
                    .collect(),
            }
        };
        let hub = [
            random(numbers, &[inputs, outputs]),
            random(numbers, &[outputs]),
        ];
        let names = |path: &str| [format!("{path}.weight"), format!("{path}.bias")];
        let [weight, bias] = &names(path);
        let of_hub = [(&**weight, hub[0].clone()), (&**bias, hub[1].clone())];
        write_base(&room.path("hub"), Some(&config), &of_hub);
        let [weight, bias] = &names(other);
        let of_other = [(&**weight, turned(&hub[0])), (&**bias, hub[1].clone())];
        write_base(&room.path("other"), Some(&config), &of_other);
        let lora = serde_json::json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_bias": true,
        });
        let key = |suffix: &str| format!("base_model.model.{path}.{suffix}");
        let tensors = [
            (&*key("lora_A.weight"), random(numbers, &[2, inputs])),
            (&*key("lora_B.weight"), random(numbers, &[outputs, 2])),
            (&*key("lora_B.bias"), random(numbers, &[outputs])),
        ];
        write_adapter(&room.path("adapter"), &lora, &tensors);
        let [weight, bias] = both(&room, "hub", path);
        assert!(weight.bytes != hub[0].bytes && bias.bytes != hub[1].bytes);
        assert_eq!(
            both(&room, "other", other),
            [turned(&weight), bias],
            "{path}"
        );
        // A whole weight would have to be transposed.
        let saved = [(&*key("modules_to_save.weight"), hub[0].clone())];
        write_adapter(&room.path("adapter"), &lora, &saved);
        let output = room.path("never");
        let error = merge(&options(
            &room.path("other"),
            &room.path("adapter"),
            &output,
        ));
        assert_eq!(error.unwrap_err().kind(), loratool::Kind::Unresolved);
    }
}

/// Of torchtune and LitGPT, whose fixtures (`make_families_llm.py`) tell the rows as they lie there.
const LANGUAGE: &[(&str, &str, Layout, usize)] = &[
    ("llama-torchtune", "llama", Layout::Torchtune, 9),
    ("gemma-torchtune", "gemma", Layout::Torchtune, 9),
    ("gemma2-torchtune", "gemma2", Layout::Torchtune, 9),
    ("qwen2-torchtune", "qwen2", Layout::Torchtune, 9),
    ("llama-litgpt", "llama", Layout::Litgpt, 9),
    ("mixtral-litgpt", "llama", Layout::Litgpt, 13),
    ("gemma-litgpt", "gemma", Layout::Litgpt, 9),
    ("gemma2-litgpt", "gemma2", Layout::Litgpt, 9),
    ("gemma3-litgpt", "gemma3", Layout::Litgpt, 9),
    ("qwen2-litgpt", "qwen2", Layout::Litgpt, 9),
    ("qwen3-litgpt", "qwen3", Layout::Litgpt, 9),
    ("qwen3moe-litgpt", "qwen3moe", Layout::Litgpt, 13),
    ("olmo2-litgpt", "olmo2", Layout::Litgpt, 9),
    ("phi2-litgpt", "phi2", Layout::Litgpt, 8),
    ("phi3-litgpt", "phi3", Layout::Litgpt, 5),
    ("gptneox-litgpt", "gptneox", Layout::Litgpt, 6),
    ("falcon-litgpt", "falcon", Layout::Litgpt, 6),
];

#[test]
fn torchtune_and_litgpt_have_every_row_where_their_own_converters_put_it() {
    for (file, family, layout, count) in LANGUAGE {
        let text = std::fs::read(fixture(&format!("families/{file}.json"))).unwrap();
        let all: Value = serde_json::from_slice(&text).unwrap();
        let number = |value: &Value| value.as_u64().map(|number| number as usize);
        let attention = Attention {
            query: number(&all["heads"][0]),
            key: number(&all["heads"][1]),
        };
        let tensors = all["tensors"].as_object().unwrap();
        assert_eq!(tensors.len(), *count, "{file}");
        for (hub, told) in tensors {
            // Transformers 5 has experts in a stack; these names are those of files.
            let path = hub.strip_suffix(".weight").unwrap();
            let found = find(path, false);
            let is_own = |found: &&Match| {
                let (own, side) = (found.family, found.side);
                own.name == *family && own.layout == *layout && side == Side::Hub
            };
            let found: Vec<_> = found.iter().filter(is_own).collect();
            let [found] = found.as_slice() else {
                panic!("{file}: {hub}: {found:?}");
            };
            let other = told["other"].as_str().unwrap();
            assert_eq!(
                format!("{}.weight", found.name(Side::Other)),
                other,
                "{file}"
            );
            let height = number(&told["height"])
                .or(number(&told["shape"][0]))
                .unwrap();
            let columns = number(&told["shape"][1]).unwrap();
            let ours = found.row.rows.ranges(height, columns, attention);
            let ours = rows_of(&ours.unwrap_or_else(|| panic!("{file}: {hub}")));
            let told = ranges(&told["rows"]).map_or((0..height).collect(), |told| rows_of(&told));
            assert_eq!(ours, told, "{file}: {hub}");
        }
    }
}
