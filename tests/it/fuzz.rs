//! Arbitrary bytes for every parser: it may refuse, it may not panic, hang or contradict itself.
//!
//! Each target takes a moment here; `cargo bolero test fuzz::NAME` runs it for as long as one likes.

use std::panic::AssertUnwindSafe;

use bolero::{TypeGenerator, check};
use loratool::checkpoint::Checkpoint;
use loratool::containers::TensorFile;
use loratool::formats::{Found, ReadOptions};
use loratool::json::{Value, parse_object};
use loratool::{Error, printable, printable_json};

use crate::hostile_support::{
    Room, SMALL_CONFIG, Slot, assert_clean, assert_printable, file_of, small_adapter, tensors,
};

/// A few changes to something sound: far more of the parser is reached than by noise.
#[derive(Clone, Debug, TypeGenerator)]
enum Change {
    Set(u16, u8),
    Insert(u16, u8),
    Remove(u16, u8),
    /// One of the words that mean something.
    Word(u16, u8),
    /// A piece again, somewhere else.
    Copy(u16, u16, u8),
    Cut(u16),
    /// Another digit where there is one.
    Digit(u16, u8),
}

const WORDS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "null",
    "true",
    "-",
    "1e999",
    "0",
    "9",
    ".",
    "NaN",
    "\"a\":",
    "18446744073709551615",
    "9223372036854775808",
    "\\u0000",
    "\\ud800",
    "\u{feff}",
    "\u{202e}",
    "\u{1b}[2J",
    "../",
    "(",
    ")",
    "*",
    "+",
    "?",
    "{1000}",
    "|",
    "(?=",
    "(?!",
    "\\\\1",
    ".weight",
    ".bias",
    ".lora_A",
    ".lora_B",
    "base_model.model.",
    ".modules_to_save.",
    ".default",
    ".base_layer",
    ".original_module",
    ".token_adapter",
    "trainable_tokens_delta",
    "lora_embedding_A",
    "__metadata__",
    "\"shape\":[0]",
    "\"dtype\":\"F4\"",
    "\"data_offsets\":[0,0]",
];

fn changed(sound: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    // Few at a time: of many, one is nearly always fatal at once.
    for change in changes.iter().take(1 + changes.len() % 3) {
        let at = |place: u16| usize::from(place) % (bytes.len() + 1);
        match *change {
            Change::Set(place, byte) => {
                let place = at(place);
                if let Some(old) = bytes.get_mut(place) {
                    *old = byte;
                }
            }
            Change::Insert(place, byte) => bytes.insert(at(place), byte),
            Change::Remove(place, count) => {
                let start = at(place);
                let end = bytes.len().min(start + usize::from(count % 16));
                drop(bytes.drain(start..end));
            }
            Change::Word(place, word) => {
                let (place, word) = (at(place), WORDS[usize::from(word) % WORDS.len()]);
                drop(bytes.splice(place..place, word.bytes()));
            }
            Change::Copy(from, to, count) => {
                let start = at(from);
                let end = bytes.len().min(start + usize::from(count));
                let (piece, to) = (bytes[start..end].to_vec(), at(to));
                drop(bytes.splice(to..to, piece));
            }
            Change::Cut(place) => bytes.truncate(at(place)),
            Change::Digit(place, digit) => {
                let digits = bytes.iter_mut().filter(|byte| byte.is_ascii_digit());
                let mut digits: Vec<&mut u8> = digits.collect();
                let count = digits.len().max(1);
                if let Some(old) = digits.get_mut(usize::from(place) % count) {
                    **old = b'0' + digit % 10;
                }
            }
        }
    }
    bytes
}

/// Asserts what every refusal owes its reader.
fn assert_decent(error: &Error) {
    assert_printable(error);
    assert!(error.file().is_some(), "{error:?}");
    assert!((1..=99).contains(&error.kind().exit_code()));
}

/// Opens a file of tensors and, where it is accepted, checks that all of it is told and told once.
fn open_tensors(slot: &Slot, bytes: &[u8]) -> bool {
    slot.put(bytes);
    let file = match TensorFile::open(&slot.0) {
        Ok(file) => file,
        Err(error) => {
            assert_decent(&error);
            return false;
        }
    };
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let mut end = 8 + header;
    for tensor in &file.directory.tensors {
        assert_eq!(tensor.offset, end, "a hole or an overlap");
        end += tensor.length;
        let found = file.tensor(&tensor.name).unwrap();
        assert_eq!(found.offset, tensor.offset, "a name that is there twice");
        assert_eq!(tensor.bytes().unwrap().len() as u64, tensor.length);
    }
    assert_eq!(end, bytes.len() as u64, "bytes of no tensor");
    // Whoever reads the file by the reference must find the same.
    let reference = safetensors::SafeTensors::deserialize(bytes).unwrap();
    assert_eq!(reference.len(), file.directory.tensors.len());
    for tensor in &file.directory.tensors {
        let view = reference.tensor(&tensor.name).unwrap();
        assert_eq!(view.shape(), tensor.shape);
        assert_eq!(view.dtype(), tensor.dtype);
        assert_eq!(view.data(), &*tensor.bytes().unwrap());
    }
    true
}

#[test]
fn noise_is_no_file_of_tensors() {
    let room = Room::new();
    let slot = AssertUnwindSafe(Slot::new(&room, "x.safetensors"));
    check!()
        .with_iterations(3000)
        .with_type::<Vec<u8>>()
        .for_each(|bytes| {
            assert!(!open_tensors(&slot, bytes));
            // The same noise as a header.
            open_tensors(&slot, &file_of(bytes, []));
        });
}

#[test]
fn a_changed_file_of_tensors_is_refused_or_read_as_the_reference_reads_it() {
    let odd = r#"{"__metadata__":{"format":"pt","é":"\n"},"b.c":{"dtype":"BF16","shape":[2,1],"data_offsets":[3,7]},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"":{"dtype":"F32","shape":[0],"data_offsets":[7,7]}}  "#;
    let odd = odd.replace("\"\":", "\"e\":");
    let room = Room::new();
    let slot = AssertUnwindSafe(Slot::new(&room, "x.safetensors"));
    let data = [1, 2, 3, 4, 5, 6, 7];
    assert!(open_tensors(&slot, &file_of(&odd, data)));
    check!()
        .with_iterations(8000)
        .with_type::<(bool, Vec<Change>)>()
        .for_each(|(whole, changes)| {
            // Of the header the length follows, so that more than the length is looked at.
            let bytes = match whole {
                true => changed(&file_of(&odd, data), changes),
                false => file_of(changed(odd.as_bytes(), changes), data),
            };
            open_tensors(&slot, &bytes);
        });
}

/// The value as `serde_json` has it.
fn plain(value: &Value) -> serde_json::Value {
    match value {
        Value::Null => serde_json::Value::Null,
        Value::Bool(value) => (*value).into(),
        Value::Integer(value) => (*value).into(),
        Value::Float(value) => (*value).into(),
        Value::String(value) => value.as_str().into(),
        Value::Array(values) => values.iter().map(plain).collect(),
        Value::Object(object) => object
            .0
            .iter()
            .map(|(key, value)| (key.clone(), plain(value)))
            .collect(),
    }
}

fn read_json(bytes: &[u8]) {
    let plainly: Result<serde_json::Value, _> =
        serde_json::from_slice(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes));
    match parse_object(bytes, 100_000) {
        Ok(object) => {
            let ours = plain(&Value::Object(object));
            let theirs = plainly.unwrap();
            // Whole numbers beyond 63 bits are floats here.
            let big = bytes.windows(18).any(|w| w.iter().all(u8::is_ascii_digit));
            assert!(big || ours == theirs, "{ours} {theirs}");
        }
        Err(error) => {
            assert_printable(&error);
            let twice = matches!(error.reason(), loratool::Reason::DuplicateKey { .. });
            let other = plainly.is_ok_and(|value| value.is_object());
            assert!(
                twice || !other,
                "{error:?} for {:?}",
                String::from_utf8_lossy(bytes)
            );
        }
    }
}

#[test]
fn json_is_refused_or_read_as_serde_json_reads_it() {
    let sound =
        br#"{"a": [1, -2.5e3, null, true, false, {"b": "\u00e9\n"}], "c": {}, "d": "x", "e": 12}"#;
    check!()
        .with_iterations(20_000)
        .with_type::<Vec<Change>>()
        .for_each(|changes| read_json(&changed(sound, changes)));
    check!()
        .with_iterations(3000)
        .with_type::<Vec<u8>>()
        .for_each(|bytes| read_json(bytes));
}

const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4.5, "bias": "none",
    "rank_pattern": {"m": 2, "^x.*": 3}, "alpha_pattern": {"(?!q)m": 1}, "use_dora": false,
    "modules_to_save": ["a"], "trainable_token_indices": {"e": [1, 2]}, "use_rslora": true,
    "layer_replication": [[0, 1]], "init_lora_weights": "gaussian", "target_modules": ".*"}"#;

/// Reads an adapter and, where it is accepted, checks that nothing of it was dropped.
fn read_adapter(room: &Room) -> bool {
    let found = match Found::open(room.root()) {
        Ok(found) => found,
        Err(error) => {
            assert_decent(&error);
            return false;
        }
    };
    match found.read(&ReadOptions::default()) {
        Ok(adapter) => {
            let told = adapter
                .modules
                .iter()
                .map(|m| m.parameters.len())
                .sum::<usize>()
                + adapter.replacements.len()
                + adapter.tokens.len()
                + adapter.unused.len();
            assert_eq!(
                told,
                found.file.directory.tensors.len(),
                "something was dropped"
            );
            for module in &adapter.modules {
                assert!(module.scale.value.is_finite(), "{:?}", module.scale);
            }
            for notice in &adapter.notices {
                assert_clean(&notice.to_string());
            }
            true
        }
        Err(error) => {
            assert_decent(&error);
            false
        }
    }
}

#[test]
fn a_changed_configuration_is_refused_or_read_with_a_finite_scale() {
    let room = Room::new();
    room.write("adapter_model.safetensors", small_adapter());
    let slot = AssertUnwindSafe(Slot::new(&room, "adapter_config.json"));
    let room = AssertUnwindSafe(room);
    slot.put(CONFIG.as_bytes());
    assert!(read_adapter(&room));
    check!()
        .with_iterations(8000)
        .with_type::<Vec<Change>>()
        .for_each(|changes| {
            slot.put(&changed(CONFIG.as_bytes(), changes));
            read_adapter(&room);
        });
}

#[test]
fn any_name_of_a_tensor_is_understood_or_refused_and_never_dropped() {
    let seeds = [
        "base_model.model.m.lora_A.default.weight",
        "base_model.model.m.base_layer.out_proj.lora_B.weight",
        "base_model.model.classifier.modules_to_save.default.dense.bias",
        "base_model.model.e.token_adapter.trainable_tokens_delta",
        "base_model.model.e.lora_embedding_A",
        "base_model.model.m.lora_magnitude_vector.weight",
        "m.original_module._orig_mod.weight",
    ];
    let room = Room::new();
    room.write("adapter_config.json", SMALL_CONFIG);
    let slot = AssertUnwindSafe(Slot::new(&room, "adapter_model.safetensors"));
    let room = AssertUnwindSafe(room);
    check!()
        .with_iterations(8000)
        .with_type::<(u8, Vec<Change>, u8, Vec<Change>)>()
        .for_each(|(first, one, second, two)| {
            let name = |seed: &u8, changes: &[Change]| {
                let seed = seeds[usize::from(*seed) % seeds.len()];
                String::from_utf8_lossy(&changed(seed.as_bytes(), changes)).into_owned()
            };
            let (first, second) = (name(first, one), name(second, two));
            let second = if first == second {
                second + "2"
            } else {
                second
            };
            slot.put(&tensors(&[(&first, &[2, 2]), (&second, &[2, 2])]));
            read_adapter(&room);
        });
}

#[test]
fn any_pattern_is_matched_or_refused() {
    let seeds = [
        ".*\\.layers\\.(0|1)\\..*q_proj",
        "^(?!.*lm_head).*proj$",
        "m+|(a*)*b",
        "[a-z]{1,9}m?",
    ];
    let room = Room::new();
    room.write("adapter_model.safetensors", small_adapter());
    let slot = AssertUnwindSafe(Slot::new(&room, "adapter_config.json"));
    let room = AssertUnwindSafe(room);
    check!()
        .with_iterations(2000)
        .with_type::<(u8, Vec<Change>)>()
        .for_each(|(seed, changes)| {
            let seed = seeds[usize::from(*seed) % seeds.len()];
            let pattern = changed(seed.as_bytes(), changes);
            let pattern = serde_json::Value::from(String::from_utf8_lossy(&pattern).into_owned());
            let config = format!(
                "{{\"r\": 2, \"lora_alpha\": 4, \"rank_pattern\": {{{pattern}: 2}}, \"feedforward_modules\": {pattern}}}"
            );
            slot.put(config.as_bytes());
            read_adapter(&room);
        });
}

#[test]
fn a_changed_index_is_refused_or_opens_nothing_outside() {
    let sound = r#"{"metadata": {"total_size": 20}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    let room = Room::new();
    // What a step out of the folder would find.
    room.write("one.safetensors", tensors(&[("a", &[2])]));
    room.write("two.safetensors", tensors(&[("b", &[3])]));
    room.write("base/one.safetensors", tensors(&[("a", &[2])]));
    room.write("base/two.safetensors", tensors(&[("b", &[3])]));
    let slot = AssertUnwindSafe(Slot::new(&room, "base/model.safetensors.index.json"));
    let base = room.path("base");
    check!()
        .with_iterations(8000)
        .with_type::<Vec<Change>>()
        .for_each(|changes| {
            slot.put(&changed(sound.as_bytes(), changes));
            match Checkpoint::open(&base) {
                Ok(checkpoint) => {
                    for input in checkpoint.inputs() {
                        assert_eq!(input.path().parent(), Some(base.as_path()));
                    }
                    for notice in &checkpoint.notices {
                        assert_clean(&notice.to_string());
                    }
                }
                Err(error) => assert_decent(&error),
            }
        });
}

#[test]
fn any_text_is_made_printable() {
    check!()
        .with_iterations(5000)
        .with_type::<(String, Vec<Change>)>()
        .for_each(|(text, changes)| {
            let text = changed(text.as_bytes(), changes);
            let text = String::from_utf8_lossy(&text);
            let shown = printable(&text);
            assert_clean(&shown);
            assert!(!shown.contains('\n'));
            let json = serde_json::to_string(&*text).unwrap();
            let json = printable_json(&json);
            assert_clean(&json);
            let back: String = serde_json::from_str(&json).unwrap();
            assert_eq!(back, text);
        });
}
