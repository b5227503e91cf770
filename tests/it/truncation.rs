//! Files cut at every length, and headers with every byte changed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use loratool::checkpoint::Checkpoint;
use loratool::containers::TensorFile;
use loratool::formats::{Found, ReadOptions};
use loratool::json::parse_object;
use loratool::tensor::DType;
use loratool::{Kind, Result};

use crate::hostile_support::{self, Room, Slot, assert_printable, file_of, tensors, tree};
use crate::support::fixture;

/// What a file of tensors says, without its data.
type Said = Vec<(String, DType, Vec<usize>, u64, u64)>;

fn said(path: &Path) -> Result<Said> {
    let file = TensorFile::open(path)?;
    let entries = file.directory.tensors.iter().map(|tensor| {
        let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
        let bits = shape.iter().product::<usize>() * tensor.dtype.bitsize();
        assert_eq!(bits as u64, tensor.length * 8, "{tensor:?}");
        (name, tensor.dtype, shape, tensor.offset, tensor.length)
    });
    Ok(entries.collect())
}

/// Cuts a file at every length, shortest last, and hands each to `open`, which must refuse it.
fn cut_everywhere<T>(path: &Path, open: impl Fn() -> Result<T>) {
    let whole = std::fs::read(path).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    assert!(open().is_ok(), "the whole {} is sound", path.display());
    for length in (0..whole.len()).rev() {
        file.set_len(length as u64).unwrap();
        let error = match open() {
            Err(error) => error,
            Ok(_) => panic!("{} cut at {length} was accepted", path.display()),
        };
        assert_eq!(error.kind(), Kind::Malformed, "{length}: {error:?}");
        assert_eq!(error.file(), Some(path), "{length}: {error:?}");
        assert_printable(&error);
    }
    std::fs::write(path, whole).unwrap();
}

#[test]
fn a_file_of_tensors_cut_at_any_length_is_refused() {
    let mut count = 0;
    for name in [
        "peft/cases/ia3/adapter/adapter_model.safetensors",
        "peft/cases/lora/adapter/adapter_model.safetensors",
        "peft/cases/lora_dora/adapter/adapter_model.safetensors",
        "peft/cases/lora_bias_all/adapter/adapter_model.safetensors",
        "peft/cases/lora_trainable_tokens/adapter/adapter_model.safetensors",
        "peft/bases/conv/model.safetensors",
        "peft/bases/mha/model.safetensors",
        "peft/bases/llama_bfloat16/model.safetensors",
    ] {
        let bytes = std::fs::read(fixture(name)).unwrap();
        assert!(bytes.len() <= 64 << 10, "{name}");
        let room = Room::new();
        let path = room.write("x.safetensors", bytes);
        cut_everywhere(&path, || TensorFile::open(&path));
        count += 1;
    }
    assert_eq!(count, 8);
}

/// Where the header of a file ends: that of safetensors says so, others are cut everywhere up to a limit.
fn end_of_header(bytes: &[u8]) -> usize {
    const LIMIT: u64 = 16 << 10;
    let said = bytes.first_chunk().map(|said| u64::from_le_bytes(*said));
    let length = bytes.len() as u64;
    let end = match said.and_then(|said| said.checked_add(8)) {
        Some(end) if end <= length => end,
        _ => length.min(LIMIT),
    };
    end as usize
}

#[test]
fn every_fixture_cut_anywhere_is_refused_or_says_the_same() {
    const SPREAD: usize = 500;
    let room = Room::new();
    let slot = Slot::new(&room, "x");
    let (mut opened, mut refused, mut same) = (0, 0, 0);
    let mut seen = BTreeSet::new();
    for (path, whole) in tree(&fixture("")) {
        let json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        if json {
            // What is cut from a text of JSON may be nothing but the end of its last line.
            for length in 0..whole.trim_ascii_end().len() {
                let error = parse_object(&whole[..length], 100_000).unwrap_err();
                assert_eq!(
                    error.kind(),
                    Kind::Malformed,
                    "{}: {length}",
                    path.display()
                );
                refused += 1;
            }
            continue;
        }
        let end = end_of_header(&whole);
        // Many hold other values in the same places.
        if !seen.insert((whole.len(), whole[..end].to_vec())) {
            continue;
        }
        // Every length of the header, and some of the data with the last ones.
        let step = (whole.len() - end).div_ceil(SPREAD).max(1);
        let data = (end..whole.len()).step_by(step);
        let last = whole.len().saturating_sub(8).max(end)..whole.len();
        let cuts = (0..end).chain(data.chain(last).collect::<BTreeSet<usize>>());
        slot.put(&whole);
        let before = hostile_support::said(&slot.0).ok();
        opened += usize::from(before.is_some());
        for length in cuts.collect::<Vec<_>>().into_iter().rev() {
            slot.cut(length);
            match hostile_support::said(&slot.0) {
                Err(error) => {
                    assert!(
                        matches!(error.kind(), Kind::Malformed | Kind::Unsupported),
                        "{}: {length}: {error:?}",
                        path.display()
                    );
                    assert_eq!(error.file(), Some(&*slot.0));
                    assert_printable(&error);
                    refused += 1;
                }
                // Padding behind the last tensor of GGUF.
                Ok(after) => {
                    assert_eq!(
                        before.as_ref(),
                        Some(&after),
                        "{}: {length}",
                        path.display()
                    );
                    same += 1;
                }
            }
        }
    }
    assert!(opened > 100 && refused > 300_000, "{opened}, {refused}");
    assert!(same < 100, "{same}");
}

#[test]
fn an_adapter_cut_at_any_length_is_refused_whichever_of_its_files_it_is() {
    for case in ["ia3", "lora_patterns", "lora_trainable_tokens"] {
        let room = Room::new();
        let folder = fixture(&format!("peft/cases/{case}/adapter"));
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            room.write(name, std::fs::read(folder.join(name)).unwrap());
        }
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            // A text without the line break at its end is whole.
            let path = room.path(name);
            let text = std::fs::read(&path).unwrap();
            if name.ends_with("json") {
                std::fs::write(&path, text.trim_ascii_end()).unwrap();
            }
            cut_everywhere(&path, || {
                Found::open(room.root())?.read(&ReadOptions::default())
            });
        }
    }
}

#[test]
fn an_index_and_its_shards_cut_at_any_length_are_refused() {
    let room = Room::new();
    room.write("one.safetensors", tensors(&[("a", &[2])]));
    room.write("two.safetensors", tensors(&[("b", &[3])]));
    room.write(
        "model.safetensors.index.json",
        r#"{"metadata": {"total_size": 20}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#,
    );
    room.write("config.json", r#"{"model_type": "x", "vocab_size": 7}"#);
    for name in room.names() {
        cut_everywhere(&room.path(&name), || Checkpoint::open(room.root()));
    }
}

/// Files whose every byte of the header is worth changing.
fn small_files() -> Vec<Vec<u8>> {
    let odd = r#"{"__metadata__":{"format":"pt"},"b.c":{"dtype":"BF16","shape":[2,1],"data_offsets":[3,7]},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"e":{"dtype":"F32","shape":[0],"data_offsets":[7,7]}}  "#;
    vec![
        file_of(odd, [1, 2, 3, 4, 5, 6, 7]),
        tensors(&[
            ("base_model.model.m.lora_A.weight", &[2, 3]),
            ("base_model.model.m.lora_B.weight", &[4, 2]),
        ]),
    ]
}

/// Writes one byte into a file that exists; writing all of it anew costs a flush each time.
fn put(file: &mut File, at: usize, byte: u8) {
    file.seek(SeekFrom::Start(at as u64)).unwrap();
    file.write_all(&[byte]).unwrap();
}

/// Whether two descriptions differ in no more than one byte's worth: a letter of one name, or one
/// type or number of one tensor for another that covers the same bytes.
fn differ_in_one_thing(before: &Said, after: &Said) -> bool {
    if before.len() != after.len() {
        return false;
    }
    let (before, after): (BTreeSet<_>, BTreeSet<_>) = (
        before.iter().map(|t| format!("{t:?}")).collect(),
        after.iter().map(|t| format!("{t:?}")).collect(),
    );
    before.difference(&after).count() <= 1 && after.difference(&before).count() <= 1
}

#[test]
fn a_changed_byte_in_a_header_is_refused_or_changes_only_what_it_encodes() {
    let room = Room::new();
    let path = room.path("x.safetensors");
    let (mut refused, mut accepted) = (0, 0);
    for whole in small_files() {
        std::fs::write(&path, &whole).unwrap();
        let before = said(&path).unwrap();
        let end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let mut file = File::options().write(true).open(&path).unwrap();
        for (at, old) in whole[..end].iter().enumerate() {
            for value in 0..=255 {
                if value == *old {
                    continue;
                }
                put(&mut file, at, value);
                match said(&path) {
                    Err(error) => {
                        assert!(
                            matches!(
                                error.kind(),
                                Kind::Malformed | Kind::Unsupported | Kind::Limit
                            ),
                            "{at}, {value}: {error:?}"
                        );
                        assert_eq!(error.file(), Some(path.as_path()));
                        refused += 1;
                    }
                    Ok(after) => {
                        assert!(
                            at >= 8,
                            "another length of the header was accepted: {value}"
                        );
                        assert!(
                            differ_in_one_thing(&before, &after),
                            "{at}, {value}: {after:?}"
                        );
                        accepted += 1;
                    }
                }
            }
            put(&mut file, at, whole[at]);
        }
    }
    assert!(refused > 10_000 && accepted > 1000, "{refused}, {accepted}");
}

/// Reads an adapter and describes it wholly.
fn described(folder: &Path) -> Result<String> {
    let adapter = Found::open(folder)?.read(&ReadOptions::default())?;
    Ok(format!("{:?}", adapter.modules))
}

#[test]
fn a_changed_byte_in_a_configuration_is_refused_or_read_as_what_it_says() {
    let room = Room::new();
    let text = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"rank_pattern":{"m":2},"bias":"none"}"#;
    room.write("adapter_model.safetensors", &small_files()[1]);
    let path: PathBuf = room.write("adapter_config.json", text);
    let before = described(room.root()).unwrap();
    let (mut refused, mut same, mut other) = (0, 0, BTreeSet::new());
    let mut file = File::options().write(true).open(&path).unwrap();
    for at in 0..text.len() {
        for value in 0..=255 {
            if value == text.as_bytes()[at] {
                continue;
            }
            put(&mut file, at, value);
            match described(room.root()) {
                Err(error) => {
                    assert_printable(&error);
                    assert_eq!(error.file(), Some(path.as_path()), "{error:?}");
                    refused += 1;
                }
                Ok(after) if after == before => same += 1,
                Ok(_) => {
                    other.insert(at);
                }
            }
        }
        put(&mut file, at, text.as_bytes()[at]);
    }
    // Only a digit of the alpha and of the rank in the pattern, and the pattern itself, have a say.
    let digits = [text.find(":4").unwrap() + 1, text.find(":2}").unwrap() + 1];
    let pattern = text.find("\"m\"").unwrap() + 1;
    assert!(digits.iter().all(|at| other.contains(at)), "{other:?}");
    let allowed: BTreeSet<usize> = digits.into_iter().chain([pattern]).collect();
    assert!(other.is_subset(&allowed), "{other:?}");
    assert!(refused > 10_000 && same > 0, "{refused}, {same}");
}
