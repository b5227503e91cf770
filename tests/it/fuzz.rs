//! Arbitrary bytes for every parser: it may refuse, it may not panic, hang or contradict itself.
//!
//! Each target takes a moment here; `cargo bolero test fuzz::NAME` runs it for as long as one likes.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use bolero::{TypeGenerator, check};
use loratool::checkpoint::Checkpoint;
use loratool::containers::TensorFile;
use loratool::formats::{Found, ReadOptions};
use loratool::json::{Value, parse_object};
use loratool::naming::{Resolution, Resolver, Spelling};
use loratool::{Error, printable, printable_json};

use crate::hostile_support::{
    Member, Room, SMALL_CONFIG, Slot, assert_clean, assert_printable, cpu_time, file_of,
    small_adapter, tensors, zip,
};
use crate::support::fixture;

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

/// A change to bytes rather than to text: a bit, or a number that may be a length or a place.
#[derive(Clone, Debug, TypeGenerator)]
enum Damage {
    Change(Change),
    Bit(u16, u8),
    Number(u16, u8, u8),
}

fn damaged(sound: &[u8], damages: &[Damage]) -> Vec<u8> {
    const NUMBERS: &[u64] = &[
        0,
        1,
        8,
        31,
        0x7f,
        0xff,
        0x1000,
        0xffff,
        1 << 20,
        i32::MAX as u64,
        1 << 31,
        u32::MAX as u64,
        1 << 32,
        1 << 61,
        i64::MAX as u64,
        1 << 63,
        u64::MAX - 7,
        u64::MAX,
    ];
    let mut bytes = sound.to_vec();
    for damage in damages.iter().take(1 + damages.len() % 3) {
        match damage {
            Damage::Change(change) => bytes = changed(&bytes, std::slice::from_ref(change)),
            Damage::Bit(place, bit) => {
                let length = bytes.len().max(1);
                if let Some(byte) = bytes.get_mut(usize::from(*place) % length) {
                    *byte ^= 1 << (bit % 8);
                }
            }
            Damage::Number(place, number, size) => {
                let number = NUMBERS[usize::from(*number) % NUMBERS.len()].to_le_bytes();
                let size = [1, 2, 4, 8][usize::from(size % 4)];
                let start = usize::from(*place) % (bytes.len() + 1);
                let end = bytes.len().min(start + size);
                bytes[start..end].copy_from_slice(&number[..end - start]);
            }
        }
    }
    bytes
}

/// Opens a file of any container and, where it is accepted, reads all of it: each tensor has as many bytes as
/// its shape and type, in the file or in memory, and a name of its own.
fn open_any(slot: &Slot, bytes: &[u8]) -> bool {
    slot.put(bytes);
    let file = match TensorFile::open(&slot.0) {
        Ok(file) => file,
        Err(error) => {
            assert_decent(&error);
            return false;
        }
    };
    let mut memory = HashMap::new();
    for tensor in &file.directory.tensors {
        assert!(!tensor.name.is_empty());
        let bits = tensor.elements() * tensor.dtype.bitsize();
        assert_eq!(bits as u64, 8 * tensor.length, "{tensor:?}");
        match &tensor.memory {
            Some(held) => drop(memory.insert(held.as_ptr(), held.len())),
            None => assert!(
                tensor.offset + tensor.length <= bytes.len() as u64,
                "{tensor:?}"
            ),
        }
        let read = tensor.bytes().unwrap();
        assert_eq!(read.len() as u64, tensor.length, "{tensor:?}");
        let found = file.tensor(&tensor.name).unwrap();
        assert_eq!(found.bytes().unwrap(), read, "a name that is there twice");
    }
    // Several tensors may share a storage.
    assert!(memory.values().sum::<usize>() <= 128 << 20);
    if let Err(error) = file.verify() {
        assert_decent(&error);
    }
    true
}

/// What a target does with one of several sound files and what is to be changed in it: the file is opened as
/// it is then, or as `wrap` wraps it.
fn opening(
    sound: Vec<Vec<u8>>,
    wrap: impl Fn(usize, Vec<u8>) -> Vec<u8>,
) -> AssertUnwindSafe<impl Fn(&(u8, Vec<Damage>))> {
    let room = Room::new();
    let slot = Slot::new(&room, "x");
    for (which, bytes) in sound.iter().enumerate() {
        assert!(open_any(&slot, &wrap(which, bytes.clone())), "{which}");
    }
    AssertUnwindSafe(move |(which, damages): &(u8, Vec<Damage>)| {
        // The folder lives as long as the target.
        assert!(room.path("x").exists());
        let which = usize::from(*which) % sound.len();
        open_any(&slot, &wrap(which, damaged(&sound[which], damages)));
    })
}

fn fixtures(names: &[&str]) -> Vec<Vec<u8>> {
    let read = |name: &&str| std::fs::read(fixture(name)).unwrap();
    names.iter().map(read).collect()
}

/// The stored members of a sound archive, by its directory.
fn members(bytes: &[u8]) -> Vec<Member> {
    let two = |at: usize| usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()));
    let four = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let end = bytes.len() - 22;
    let mut at = four(end + 16);
    let mut members = Vec::new();
    for _ in 0..two(end + 10) {
        let (name, size, header) = (
            &bytes[at + 46..][..two(at + 28)],
            four(at + 24),
            four(at + 42),
        );
        let start = header + 30 + two(header + 26) + two(header + 28);
        members.push(Member::stored(name, &bytes[start..start + size]));
        at += 46 + two(at + 28) + two(at + 30) + two(at + 32);
    }
    members
}

#[test]
fn noise_behind_the_first_bytes_of_any_container_is_refused_or_read() {
    let room = Room::new();
    let slot = AssertUnwindSafe(Slot::new(&room, "x"));
    let starts: &[&[u8]] = &[
        b"",
        b"GGUF\x03\0\0\0",
        b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0",
        b"\x93NUMPY\x01\0",
        b"\x93NUMPY\x01\0\x40\0{'descr': '<f4', ",
        b"\x80\x02",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02",
        b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0a.npy",
        b"PK\x05\x06",
    ];
    check!()
        .with_iterations(4000)
        .with_type::<(u8, Vec<u8>)>()
        .for_each(|(start, noise)| {
            let start = starts[usize::from(*start) % starts.len()];
            open_any(&slot, &[start, noise].concat());
            // The same noise as a pickle and as an array in a sound archive.
            for name in ["x/data.pkl", "a.npy"] {
                open_any(&slot, &zip(&[Member::stored(name, noise)]).bytes);
            }
        });
}

#[test]
fn a_changed_archive_is_refused_or_read_whole() {
    let sound = fixtures(&[
        "torch/list.pt",
        "torch/strides.deflated.pt",
        "numpy/long.npz",
        "numpy/streamed.npz",
        "numpy/compressed.npz",
    ]);
    let open = opening(sound, |_, bytes| bytes);
    check!()
        .with_iterations(8000)
        .with_type()
        .for_each(|input| (*open)(input));
}

#[test]
fn a_changed_pickle_in_a_sound_archive_is_refused_or_read_whole() {
    let names = [
        "nested.pt",
        "strides.pt",
        "new_types.pt",
        "nested.protocol5.pt",
        "shared.pt",
    ];
    let files = fixtures(
        &names
            .map(|name| ["torch/", name].concat())
            .each_ref()
            .map(|n| &**n),
    );
    let files: Vec<Vec<Member>> = files.iter().map(|bytes| members(bytes)).collect();
    let is_pickle = |member: &Member| member.name.ends_with(b"data.pkl");
    let pickles: Vec<Vec<u8>> = files
        .iter()
        .map(|file| {
            file.iter()
                .find(|member| is_pickle(member))
                .unwrap()
                .data
                .clone()
        })
        .collect();
    let open = opening(pickles, |which, bytes| {
        let mut members = files[which].clone();
        for member in members.iter_mut().filter(|member| is_pickle(member)) {
            *member = Member::stored(&member.name, &bytes);
        }
        zip(&members).bytes
    });
    check!()
        .with_iterations(8000)
        .with_type()
        .for_each(|input| (*open)(input));
}

#[test]
fn a_changed_file_of_old_torch_is_refused_or_read_whole() {
    let sound = fixtures(&[
        "torch/nested.legacy.pt",
        "torch/strides.legacy.pt",
        "torch/shared.legacy.pt",
        "torch/types.legacy.pt",
    ]);
    let open = opening(sound, |_, bytes| bytes);
    check!()
        .with_iterations(8000)
        .with_type()
        .for_each(|input| (*open)(input));
}

#[test]
fn a_changed_array_is_refused_or_read_whole() {
    let files = fixtures(&["numpy/forced.npz", "mlx/lora/adapters.npz"]);
    let arrays: Vec<Vec<u8>> = files
        .iter()
        .flat_map(|bytes| members(bytes))
        .take(4)
        .map(|member| member.data)
        .collect();
    // Each by itself, and as a member of an archive.
    let count = arrays.len();
    let open = opening([&arrays[..]; 3].concat(), |which, bytes| {
        match which / count {
            0 => bytes,
            1 => zip(&[Member::stored("a.npy", bytes)]).bytes,
            _ => zip(&[Member::deflated("a.npy", bytes)]).bytes,
        }
    });
    check!()
        .with_iterations(8000)
        .with_type()
        .for_each(|input| (*open)(input));
}

#[test]
fn a_changed_gguf_file_is_refused_or_read_whole() {
    let sound = fixtures(&["gguf/adapter.gguf", "gguf/model.gguf"]);
    let open = opening(sound, |_, bytes| bytes);
    check!()
        .with_iterations(8000)
        .with_type()
        .for_each(|input| (*open)(input));
}

/// Names of a base as there are: of a language model, of a UNet, and of a single file of both.
fn names_of_a_base() -> Vec<String> {
    let mut names = Vec::new();
    for layer in 0..60 {
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            names.push(format!("model.layers.{layer}.self_attn.{part}.weight"));
            names.push(format!("model.layers.{layer}.self_attn.{part}.bias"));
        }
        for part in ["gate_up_proj", "down_proj"] {
            names.push(format!("model.layers.{layer}.mlp.experts.{part}"));
        }
    }
    for block in 0..12 {
        for part in 0..30 {
            let path = format!("down_blocks.{block}.attentions.{part}.to_q");
            names.push(format!("{path}.weight"));
            names.push(format!("model.diffusion_model.{path}.weight"));
            names.push(format!(
                "text_model.encoder.layers.{block}.mlp.fc{part}.weight"
            ));
            names.push(format!(
                "conditioner.embedders.0.transformer.text_model.encoder.layers.{block}.mlp.fc{part}.weight"
            ));
            names.push(format!("blocks.{block}_{part}.q.weight"));
        }
    }
    names
}

/// Asks for a path in every spelling, within the time that one module may take.
fn ask(base: &[String], more: &str, path: &str) {
    const LIMIT: Duration = Duration::from_millis(50);
    let names = base.iter().map(String::as_str).chain([more]);
    let resolver = Resolver::new(names.clone());
    let before = cpu_time();
    let flattened = resolver.resolve(path, Spelling::Flattened);
    let answers = [
        resolver.resolve(path, Spelling::InComponent),
        resolver.resolve(path, Spelling::Dotted),
        resolver.resolve_parameter(path, "bias"),
        flattened.clone(),
    ];
    let near = resolver.nearest(path, 3);
    let spent = cpu_time() - before;
    assert!(spent < LIMIT, "{spent:?} for {path:?}");
    let is_there = |name: &str| assert!(names.clone().any(|there| there == name), "{name}");
    near.iter().for_each(|name| is_there(name));
    for answer in answers {
        match answer {
            Resolution::Exact(places) | Resolution::Renamed(places) => {
                places.iter().for_each(|place| is_there(&place.tensor));
            }
            Resolution::Ambiguous(names) => {
                // Experts of one tensor are told apart by their rows.
                assert!(names.len() > 1, "{names:?}");
                names.iter().for_each(|name| is_there(name));
            }
            Resolution::Unresolved => {}
        }
    }
    // What a flattened path means ends as it does.
    let meant = match flattened {
        Resolution::Exact(places) => places.into_iter().map(|place| place.tensor).collect(),
        Resolution::Renamed(places) => panic!("{places:?}"),
        Resolution::Ambiguous(names) => names,
        Resolution::Unresolved => Vec::new(),
    };
    for name in meant {
        let flat = name.strip_suffix(".weight").unwrap().replace('.', "_");
        let mut rest = flat.as_str();
        for part in [
            "model_diffusion_model_",
            "cond_stage_model_transformer_",
            "conditioner_embedders_0_transformer_",
            "text_model_",
        ] {
            rest = rest.strip_prefix(part).unwrap_or(rest);
        }
        assert!(path.ends_with(rest), "{name} for {path:?}");
    }
}

#[test]
fn any_path_means_names_of_the_base_in_any_spelling_and_in_time() {
    const STARTS: &[&str] = &[
        "",
        "lora_unet_",
        "lora_te_",
        "lora_te1_",
        "lora_te2_",
        "lycoris_",
        "unet.",
        "text_encoder.",
        "model.",
        "base_model.model.",
        "lora_unet_lora_te_",
    ];
    let base = names_of_a_base();
    assert_eq!(base.len(), 2400);
    check!()
        .with_iterations(600)
        .with_type::<(u16, u8, bool, Vec<Change>, Vec<Change>, String)>()
        .for_each(|(which, start, flat, one, two, noise)| {
            let name = &base[usize::from(*which) % base.len()];
            // Another name that is almost the same, perhaps when it is flattened.
            let more = String::from_utf8_lossy(&changed(name.as_bytes(), one)).into_owned();
            let path = changed(name.trim_end_matches(".weight").as_bytes(), two);
            let path = String::from_utf8_lossy(&path).into_owned();
            let path = match flat {
                true => path.replace('.', "_"),
                false => path,
            };
            let start = STARTS[usize::from(*start) % STARTS.len()];
            ask(&base, &more, &format!("{start}{path}"));
            ask(&base, noise, &format!("{start}{noise}"));
        });
}

#[test]
fn the_longest_paths_are_looked_up_in_time() {
    let base = names_of_a_base();
    for piece in [
        ".",
        "_",
        "layers.",
        "model.",
        "text_model.",
        "attention.output.dense.",
        "output.dense",
        "embed_out",
        ".block_sparse_moe.",
        "model.layers.0.self_attn.q_proj.",
        "experts.3.w1.",
        "\u{1f600}",
    ] {
        for start in ["", "lora_te_", "text_encoder.text_model.", "model.model."] {
            let path = [start, &piece.repeat(4096 / piece.len())].concat();
            ask(&base, &path, &path);
            ask(&base, "x.weight", &path);
        }
    }
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
