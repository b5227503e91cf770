//! GGUF files as bases: the result is the base with other values, and nothing else changed.

use std::path::{Path, PathBuf};

use loratool::containers::{Entry, TensorFile, gguf};
use loratool::ops::check::check;
use loratool::ops::merge::{Options, plan};
use loratool::tensor::{DType, Float};
use loratool::{Kind, Reason};
use serde_json::json;

use crate::hostile_gguf::{gguf, info, key, text};
use crate::hostile_support::{Room, assert_reason, names_in, tensors};
use crate::oracle::{self, Stored};
use crate::output::fail_everywhere;
use crate::support::{fixture, merge, options, write_safetensors};

/// A LoRA of rank 2 for these modules, each with outputs and inputs.
fn adapter(room: &Room, modules: &[(&str, [usize; 2])]) -> PathBuf {
    let mut all: Vec<(String, [usize; 2])> = Vec::new();
    for (module, [outputs, inputs]) in modules {
        let name = |factor: &str| format!("base_model.model.{module}.{factor}.weight");
        all.push((name("lora_A"), [2, *inputs]));
        all.push((name("lora_B"), [*outputs, 2]));
    }
    let all: Vec<(&str, &[usize])> = all.iter().map(|(n, s)| (n.as_str(), &s[..])).collect();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 20_000});
    room.write("adapter/adapter_config.json", config.to_string());
    room.write("adapter/adapter_model.safetensors", tensors(&all));
    room.path("adapter")
}

fn attention(room: &Room) -> PathBuf {
    let modules = ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "output"];
    adapter(room, &modules.map(|module| (module, [3, 4])))
}

fn base() -> PathBuf {
    fixture("gguf/base.gguf")
}

/// Where the data begin.
fn data(path: &Path) -> usize {
    let file = TensorFile::open(path).unwrap();
    file.directory.tensors[0].offset as usize
}

/// A file of the same tensors in safetensors, those quantised by blocks as bytes.
fn twin(room: &Room, path: &Path) -> PathBuf {
    let file = TensorFile::open(path).unwrap();
    let stored: Vec<(&str, Stored)> = file
        .directory
        .tensors
        .iter()
        .map(|tensor| {
            let stored = Stored {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                bytes: tensor.bytes().unwrap().into_owned(),
            };
            (tensor.name.as_str(), stored)
        })
        .collect();
    let twin = room.path("twin.safetensors");
    write_safetensors(&twin, &stored);
    twin
}

#[test]
fn a_gguf_base_keeps_its_header_and_gets_the_values_of_the_same_base_in_safetensors() {
    let room = Room::new();
    let out = options(&base(), &attention(&room), &room.path("out.gguf"));
    let report = merge(&out).unwrap();
    assert_eq!(report.modules.len(), 4);
    let (before, after) = (
        std::fs::read(base()).unwrap(),
        std::fs::read(&out.output).unwrap(),
    );
    // Version, counts, metadata, descriptions and padding.
    let start = data(&base());
    assert!(after[..start] == before[..start]);
    assert_eq!(after.len(), before.len());
    assert_eq!(report.files[0].bytes, after.len() as u64);
    let other = options(
        &twin(&room, &base()),
        &attention(&room),
        &room.path("twin-out.safetensors"),
    );
    merge(&other).unwrap();
    let expected = oracle::read(&other.output);
    let found = TensorFile::open(&out.output).unwrap();
    assert_eq!(found.directory.tensors.len(), expected.len());
    let old = TensorFile::open(base()).unwrap();
    let mut changed = Vec::new();
    for tensor in &found.directory.tensors {
        let bytes = tensor.bytes().unwrap();
        assert_eq!(*bytes, expected[&tensor.name].bytes, "{}", tensor.name);
        if bytes != old.tensor(&tensor.name).unwrap().bytes().unwrap() {
            changed.push(tensor.name.as_str());
        }
    }
    let weights = [
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.attn_v.weight",
        "output.weight",
    ];
    assert_eq!(changed, weights);
    assert!(check(&base(), &Default::default()).clean);
}

#[test]
fn a_folder_gets_a_file_of_its_own_name_and_is_replaced_by_force() {
    let room = Room::new();
    let mut options = options(&base(), &attention(&room), &room.path("out"));
    merge(&options).unwrap();
    assert_eq!(names_in(&options.output), ["model.gguf"]);
    options.force = true;
    merge(&options).unwrap();
}

#[test]
fn version_two_becomes_version_three() {
    let room = Room::new();
    let mut bytes = std::fs::read(base()).unwrap();
    bytes[4] = 2;
    let old = room.write("two.gguf", &bytes);
    let adapter = attention(&room);
    let (two, three) = (
        options(&old, &adapter, &room.path("2.gguf")),
        options(&base(), &adapter, &room.path("3.gguf")),
    );
    merge(&two).unwrap();
    merge(&three).unwrap();
    let read = |options: &Options| std::fs::read(&options.output).unwrap();
    assert!(read(&two) == read(&three));
}

/// The tensors `q` and `k` described in the order in which they do not lie, the padding not empty.
fn disordered(keys: &[Vec<u8>]) -> Vec<u8> {
    let infos = [
        info("q.weight", &[4, 3], 0, 64),
        info("k.weight", &[4, 3], 0, 0),
    ];
    let mut bytes = gguf(keys, &infos, 128);
    let start = bytes.len() - 128;
    bytes[start + 48..start + 64].fill(7);
    bytes
}

#[test]
fn descriptions_keep_their_order_and_padding_becomes_zeros() {
    let room = Room::new();
    let bytes = disordered(&[key("k", 8, &text("v"))]);
    let path = room.write("x.gguf", &bytes);
    let adapter = adapter(&room, &[("q", [3, 4])]);
    let options = options(&path, &adapter, &room.path("out.gguf"));
    merge(&options).unwrap();
    let after = std::fs::read(&options.output).unwrap();
    let start = bytes.len() - 128;
    assert!(after[..start + 48] == bytes[..start + 48]);
    assert!(after[start + 48..start + 64] == [0; 16]);
    assert!(after[start + 64..start + 112] != bytes[start + 64..start + 112]);
    assert!(after[start + 112..] == [0; 16]);
}

#[test]
fn modules_on_quantised_tensors_are_refused_with_their_types() {
    let room = Room::new();
    let infos = [
        info("a.weight", &[32, 2], 8, 0),
        info("b.weight", &[256, 1], 12, 96),
        info("c.weight", &[4, 3], 0, 256),
    ];
    let path = room.write("x.gguf", gguf(&[], &infos, 320));
    let both = adapter(&room, &[("a", [2, 32]), ("b", [1, 256]), ("c", [3, 4])]);
    let options = options(&path, &both, &room.path("out.gguf"));
    let error = merge(&options).unwrap_err();
    assert_reason!(error, Reason::TensorType { dtype } if dtype == "Q8_0");
    let cases = error.cases();
    assert_eq!(cases.len(), 2, "{cases:?}");
    assert!(cases[0].contains("a.weight") && cases[0].contains("Q8_0"));
    assert!(cases[1].contains("b.weight") && cases[1].contains("Q4_K"));
    assert!(error.hint().is_some());
    // The one that is not quantised alone.
    let alone = Options {
        only: vec!["^c$".to_owned()],
        ..options
    };
    merge(&alone).unwrap();
    let found = TensorFile::open(&alone.output).unwrap();
    let blocks = found.tensor("b.weight").unwrap().blocks.clone().unwrap();
    assert_eq!((blocks.name, &*blocks.shape), ("Q4_K", &[1, 256][..]));
}

#[test]
fn every_type_with_blocks_has_the_size_that_the_package_gives_it() {
    let file = TensorFile::open(fixture("gguf/blocks.gguf")).unwrap();
    assert_eq!(file.directory.tensors.len(), 25);
    for tensor in &file.directory.tensors {
        let blocks = tensor.blocks.as_ref().unwrap();
        assert_eq!(blocks.name, tensor.name);
        assert_eq!(blocks.shape[0], 3);
        let bytes = tensor.bytes().unwrap();
        let counts = bytes.iter().enumerate().all(|(n, byte)| *byte == n as u8);
        assert!(
            counts && bytes.len() == tensor.elements(),
            "{}",
            tensor.name
        );
        assert!(tensor.float().is_err());
    }
}

#[test]
fn rows_that_are_no_whole_number_of_blocks_are_refused() {
    let room = Room::new();
    for sizes in [&[31, 32][..], &[1], &[]] {
        let path = room.write("x.gguf", gguf(&[], &[info("a", sizes, 2, 0)], 1024));
        let error = TensorFile::open(path).map(drop).unwrap_err();
        assert_reason!(error, Reason::Structure { .. });
        assert_eq!(error.item(), Some("a"));
    }
    let path = room.write(
        "x.gguf",
        gguf(&[], &[info("a", &[1 << 40, 1 << 40], 2, 0)], 0),
    );
    let error = TensorFile::open(path).map(drop).unwrap_err();
    assert_reason!(error, Reason::ShapeOverflow { .. });
}

#[test]
fn adapters_that_are_quantised_by_blocks_are_refused() {
    let room = Room::new();
    let options = options(
        &base(),
        &fixture("gguf/blocks.gguf"),
        &room.path("out.gguf"),
    );
    assert_reason!(
        merge(&options).unwrap_err(),
        Reason::QuantisedTensors { count: 25 }
    );
}

#[test]
fn what_the_metadata_would_contradict_is_refused() {
    let room = Room::new();
    let adapter = attention(&room);
    let plain = options(&base(), &adapter, &room.path("out.gguf"));
    let folder = options(&base(), &adapter, &room.path("out"));
    for (options, flag) in [
        (
            Options {
                dtype: Some(Float::F16),
                ..plain.clone()
            },
            "--dtype",
        ),
        (
            Options {
                shard_size: Some(1),
                ..folder
            },
            "--shard-size",
        ),
    ] {
        let error = plan(&options).map(drop).unwrap_err();
        assert_reason!(error, Reason::BadOption { text, .. } if text == flag);
        assert!(error.to_string().contains("GGUF"), "{error}");
    }
    let named = Options {
        output: room.path("out.safetensors"),
        ..plain
    };
    let error = plan(&named).map(drop).unwrap_err();
    assert_reason!(error, Reason::BadOption { .. });
    assert!(error.to_string().contains(".gguf"), "{error}");
}

#[test]
fn one_of_several_files_of_a_model_is_no_base() {
    let room = Room::new();
    let part = |count: u16| disordered(&[key("split.count", 2, &count.to_le_bytes())]);
    let adapter = adapter(&room, &[("q", [3, 4])]);
    let run = |count: u16| {
        let path = room.write("x.gguf", part(count));
        let out = room.path(&format!("out{count}.gguf"));
        merge(&options(&path, &adapter, &out)).map(drop)
    };
    run(1).unwrap();
    let error = run(3).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    assert!(error.to_string().contains("--merge"), "{error}");
}

#[test]
fn an_embedding_that_is_the_output_as_well_is_not_changed_on_one_side() {
    let room = Room::new();
    let factors = tensors(&[
        ("base_model.model.token_embd.lora_embedding_A", &[2, 3]),
        ("base_model.model.token_embd.lora_embedding_B", &[4, 2]),
    ]);
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4});
    room.write("adapter/adapter_config.json", config.to_string());
    room.write("adapter/adapter_model.safetensors", factors);
    let run = |architecture: &str, output: bool| {
        let mut infos = vec![info("token_embd.weight", &[4, 3], 0, 0)];
        if output {
            infos.push(info("output.weight", &[4, 3], 0, 64));
        }
        let keys = [key("general.architecture", 8, &text(architecture))];
        let bytes = gguf(&keys, &infos, infos.len() * 64);
        let path = room.write("x.gguf", bytes);
        let out = room.path(&format!("{architecture}{output}.gguf"));
        merge(&options(&path, &room.path("adapter"), &out)).map(drop)
    };
    assert_reason!(run("llama", false).unwrap_err(), Reason::SharedEmbedding);
    run("llama", true).unwrap();
    run("nomic-bert", false).unwrap();
}

#[test]
fn a_replacement_of_another_shape_and_a_tensor_more_are_refused() {
    let room = Room::new();
    let path = room.write("x.gguf", disordered(&[]));
    let config =
        json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["k", "new"]});
    for (name, shape, rank) in [("k", [5, 4], Some(())), ("new", [3, 4], None)] {
        let saved = format!("base_model.model.{name}.weight");
        let factors = tensors(&[
            ("base_model.model.q.lora_A.weight", &[2, 4]),
            ("base_model.model.q.lora_B.weight", &[3, 2]),
            (&saved, &shape),
        ]);
        room.write("adapter/adapter_config.json", config.to_string());
        room.write("adapter/adapter_model.safetensors", factors);
        let out = room.path("out.gguf");
        let error = merge(&options(&path, &room.path("adapter"), &out)).unwrap_err();
        match rank {
            Some(()) => assert_reason!(error, Reason::ReplacementShape { .. }),
            None => assert_reason!(error, Reason::Modules { count: 1 }),
        }
    }
}

#[test]
fn a_header_of_typed_values_is_read_back() {
    let named = |key: &str, value| (key.to_owned(), value);
    let metadata = [
        named("general.alignment", gguf::Value::U32(64)),
        named("a", gguf::Value::I32(-3)),
        named("b", gguf::Value::F32(0.5)),
        named("c", gguf::Value::Bool(true)),
        named("d", gguf::Value::Text("\u{e9}".into())),
        named("e", gguf::Value::U64(u64::MAX)),
        named("f", gguf::Value::U32s(vec![1, 2])),
        named("g", gguf::Value::I32s(vec![-1])),
        named("h", gguf::Value::F32s(vec![])),
        named("i", gguf::Value::Texts(vec!["x".into(), "yz".into()])),
    ];
    let entry = |name, dtype, shape| Entry {
        name,
        dtype,
        shape,
        blocks: None,
    };
    let entries = [
        entry("one", DType::F16, &[2usize, 3][..]),
        entry("two", DType::BF16, &[]),
        entry("three", DType::I64, &[0, 4]),
    ];
    let header = gguf::header(&metadata, &entries).unwrap();
    assert_eq!(header.alignment, 64);
    let mut bytes = header.bytes.clone();
    assert_eq!(bytes.len() % 64, 0);
    bytes.resize(bytes.len() + 128, 0);
    let room = Room::new();
    let file = TensorFile::open(room.write("x.gguf", bytes)).unwrap();
    let said: Vec<&str> = file.directory.metadata.iter().map(|(_, v)| &**v).collect();
    let max = u64::MAX.to_string();
    let values = ["64", "-3", "0.5", "true", "\u{e9}", &max];
    let lists = ["[2 values]", "[1 values]", "[0 values]", "[2 values]"];
    assert_eq!(said, [&values[..], &lists].concat());
    for wanted in &entries {
        let found = file.tensor(wanted.name).unwrap();
        assert_eq!((found.dtype, &*found.shape), (wanted.dtype, wanted.shape));
    }
}

#[test]
fn what_ggml_does_not_read_is_not_written() {
    let long = "n".repeat(64);
    let entry = |name, dtype, shape| Entry {
        name,
        dtype,
        shape,
        blocks: None,
    };
    let refused = |entry: Entry<'_>| gguf::header(&[], &[entry]).map(drop).unwrap_err();
    let error = refused(entry(&long, DType::F32, &[1]));
    assert_reason!(error, Reason::NameTooLong { limit: 63, .. });
    assert!(gguf::header(&[], &[entry(&long[1..], DType::F32, &[1; 4])]).is_ok());
    let error = refused(entry("a", DType::F32, &[1; 5]));
    assert_reason!(error, Reason::TooMany { limit: 4, .. });
    let error = refused(entry("a", DType::BOOL, &[1]));
    assert_reason!(error, Reason::Stored { .. });
    assert_eq!(error.item(), Some("a"));
    for value in [
        gguf::Value::U32(48),
        gguf::Value::U32(0),
        gguf::Value::I32(32),
    ] {
        let metadata = [("general.alignment".to_owned(), value)];
        let error = gguf::header(&metadata, &[]).map(drop).unwrap_err();
        assert_reason!(error, Reason::Structure { .. });
    }
}

#[test]
fn a_failure_of_any_operation_leaves_no_half_gguf_file() {
    let room = Room::new();
    for name in ["out.gguf", "out"] {
        let options = Options {
            force: true,
            ..options(&base(), &attention(&room), &room.path(name))
        };
        fail_everywhere(&options, None);
    }
}
