//! GGUF files: broken ones are refused, and what the `gguf` package wrote is read.

use loratool::containers::TensorFile;
use loratool::formats::ReadOptions;
use loratool::ops::inspect::inspect;
use loratool::tensor::DType;
use loratool::{Error, Kind, Reason};

use crate::hostile_support::{Room, assert_printable, assert_reason, open_as, refused_as};
use crate::support::fixture;

pub(crate) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A key with a value of a type.
pub(crate) fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&*text(name), &kind.to_le_bytes(), value].concat()
}

pub(crate) fn info(name: &str, sizes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((sizes.len() as u32).to_le_bytes());
    for size in sizes {
        bytes.extend(size.to_le_bytes());
    }
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// A file of these keys, these tensors, and so many bytes of data.
pub(crate) fn gguf(keys: &[Vec<u8>], infos: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((infos.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    bytes.extend(keys.concat());
    bytes.extend(infos.concat());
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn open(bytes: impl AsRef<[u8]>) -> loratool::Result<TensorFile> {
    open_as("x.gguf", bytes)
}

fn refused(bytes: impl AsRef<[u8]>) -> Error {
    refused_as("x.gguf", bytes)
}

#[test]
fn tensors_and_metadata_of_every_plain_type_are_read() {
    let keys = [
        key("a", 4, &7u32.to_le_bytes()),
        key("b", 8, &text("word")),
        key("c", 7, &[1]),
        key("d", 6, &0.5f32.to_le_bytes()),
        key(
            "e",
            9,
            &[
                &8u32.to_le_bytes()[..],
                &2u64.to_le_bytes(),
                &text("x"),
                &text("yz"),
            ]
            .concat(),
        ),
    ];
    let infos = [
        info("w", &[3, 2], 1, 0),
        info("s", &[], 0, 32),
        info("z", &[0], 26, 64),
    ];
    let file = open(gguf(&keys, &infos, 64)).unwrap();
    assert_eq!(file.container.name(), "GGUF");
    let w = file.tensor("w").unwrap();
    assert_eq!(
        (w.dtype, &*w.shape, w.length),
        (DType::F16, &[2, 3][..], 12)
    );
    assert_eq!(file.tensor("s").unwrap().elements(), 1);
    assert_eq!(file.tensor("z").unwrap().elements(), 0);
    let said: Vec<&str> = file
        .directory
        .metadata
        .iter()
        .map(|(_, value)| &**value)
        .collect();
    assert_eq!(said, ["7", "word", "true", "0.5", "[2 values]"]);
}

#[test]
fn counts_and_sizes_that_lie_are_refused() {
    let mut many = gguf(&[], &[info("w", &[2], 0, 0)], 32);
    // 123 tensors put a brace where the header of a safetensors file has it.
    for count in [2u64.pow(40), u64::MAX, 3, 123] {
        many[8..16].copy_from_slice(&count.to_le_bytes());
        assert_eq!(refused(&many).kind(), Kind::Malformed);
    }
    let long = key("k", 8, &u64::MAX.to_le_bytes());
    assert_reason!(refused(gguf(&[long], &[], 0)), Reason::HeaderCut { .. });
    for kind in [0u32, 8, 9, 12] {
        let list = [&kind.to_le_bytes()[..], &(u64::MAX / 2).to_le_bytes()].concat();
        assert_reason!(
            refused(gguf(&[key("k", 9, &list)], &[], 0)),
            Reason::Structure { .. }
        );
    }
    for sizes in [&[1 << 40, 1 << 40, 16][..], &[u64::MAX], &[0, 1 << 63, 4]] {
        let error = refused(gguf(&[], &[info("w", sizes, 0, 0)], 32));
        assert_reason!(error, Reason::ShapeOverflow { .. });
    }
    let error = refused(gguf(&[], &[info("w", &[1; 9], 0, 0)], 32));
    assert_reason!(error, Reason::TooMany { .. });
    let error = refused(gguf(&[], &[info("w", &[1 << 40], 0, 0)], 32));
    assert_reason!(error, Reason::OffsetsBeyondFile { .. });
    let error = refused(gguf(&[], &[info("w", &[0], 0, u64::MAX - 31)], 32));
    assert_reason!(error, Reason::Hole { .. });
}

#[test]
fn nested_lists_end() {
    let mut bytes = Vec::new();
    for _ in 0..100_000 {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    assert_reason!(
        refused(gguf(&[key("k", 9, &bytes)], &[], 0)),
        Reason::TooDeep { .. }
    );
    // A million empty lists in one are as many as they say.
    let mut bytes = [&9u32.to_le_bytes()[..], &1_000_000u64.to_le_bytes()].concat();
    for _ in 0..1_000_000 {
        bytes.extend([&0u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat());
    }
    assert!(open(gguf(&[key("k", 9, &bytes)], &[], 0)).is_ok());
}

#[test]
fn names_places_and_types_have_one_reading() {
    let (a, b) = (info("a", &[8], 0, 0), info("b", &[8], 0, 32));
    assert!(open(gguf(&[], &[b.clone(), a.clone()], 64)).is_ok());
    let error = refused(gguf(&[], &[a.clone(), info("a", &[8], 0, 32)], 64));
    assert_reason!(error, Reason::DuplicateKey { .. });
    let twice = [key("k", 7, &[0]), key("k", 7, &[1])];
    assert_reason!(refused(gguf(&twice, &[], 0)), Reason::DuplicateKey { .. });
    let error = refused(gguf(&[], &[a.clone(), info("b", &[8], 0, 0)], 64));
    assert_reason!(error, Reason::Overlap { .. });
    let error = refused(gguf(&[], &[a.clone(), info("b", &[8], 0, 64)], 96));
    assert_reason!(error, Reason::Hole { .. });
    let error = refused(gguf(&[], &[info("", &[8], 0, 0)], 32));
    assert_reason!(error, Reason::EmptyName);
    let error = refused(gguf(&[], std::slice::from_ref(&a), 96));
    assert_reason!(error, Reason::TrailingBytes { .. });
    for (kind, value) in [(4, 0u32), (4, 3), (4, 1 << 30), (5, 32)] {
        let alignment = key("general.alignment", kind, &value.to_le_bytes());
        assert_reason!(
            refused(gguf(&[alignment], &[], 0)),
            Reason::Structure { .. }
        );
    }
    let odd = [key("k", 7, &[2]), key("k", 13, &[])];
    for key in odd {
        assert_reason!(refused(gguf(&[key], &[], 0)), Reason::Structure { .. });
    }
    let mut version = gguf(&[], &[], 0);
    for wrong in [[1, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 3]] {
        version[4..8].copy_from_slice(&wrong);
        assert_reason!(refused(&version), Reason::Stored { .. });
    }
}

#[test]
fn quantised_tensors_are_bytes_that_say_what_they_are() {
    let infos = [
        info("a", &[32], 2, 0),
        info("b", &[8], 0, 32),
        info("c", &[256, 2], 14, 64),
    ];
    let file = open(gguf(&[], &infos, 512)).unwrap();
    let c = file.tensor("c").unwrap();
    assert_eq!((c.dtype, &*c.shape), (DType::U8, &[420][..]));
    assert_eq!((c.type_name().as_str(), c.parameters()), ("Q6_K", 512));
    let error = file.refuse_blocks().unwrap_err();
    assert_reason!(error, Reason::QuantisedTensors { count: 2 });
    assert_eq!(error.cases(), ["a: Q4_0 [32]", "c: Q6_K [2, 256]"]);
    let error = refused(gguf(&[], &[info("a", &[32], 999, 0)], 32));
    assert_reason!(error, Reason::Structure { .. });
}

#[test]
fn what_the_gguf_package_wrote_is_read_cut_and_changed() {
    for (name, what, tensors) in [("adapter", "adapter", 4), ("model", "checkpoint", 3)] {
        let path = fixture("gguf").join(format!("{name}.gguf"));
        let found = inspect(&path, &ReadOptions::default()).unwrap();
        assert_eq!((found.what.as_str(), found.tensors), (what, tensors));
        assert_eq!(found.container, "GGUF");
        if name == "adapter" {
            assert_eq!(found.format.as_deref(), Some("GGUF adapter (llama.cpp)"));
            let summary = found.summary.unwrap();
            assert_eq!(summary.ranks.into_iter().collect::<Vec<_>>(), [(2, 2)]);
            assert_eq!(summary.facts["adapter.lora.alpha"], "16");
        } else {
            // As fixtures/make_gguf.py counts: 0, 1, 2 … in rows of four.
            let file = TensorFile::open(&path).unwrap();
            let tensor = file.tensor("blk.0.attn_q.weight").unwrap();
            assert_eq!(tensor.shape, [3, 4]);
            let expected: Vec<f64> = (0..12).map(f64::from).collect();
            assert_eq!(tensor.to_f64().unwrap(), expected);
        }
        let whole = std::fs::read(&path).unwrap();
        let room = Room::new();
        let path = room.write("x.gguf", &whole);
        let last = TensorFile::open(&path).unwrap();
        let end = last
            .directory
            .tensors
            .last()
            .map(|t| t.offset + t.length)
            .unwrap() as usize;
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for length in (0..end).rev() {
            file.set_len(length as u64).unwrap();
            let error = TensorFile::open(&path).map(drop).unwrap_err();
            assert_eq!(error.kind(), Kind::Malformed, "{length}: {error:?}");
            assert_printable(&error);
        }
        for at in 0..end.min(1024) {
            for value in [0, 1, 0x7f, 0x80, 0xff, whole[at] ^ 1, whole[at] ^ 0x20] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                std::fs::write(&path, &bytes).unwrap();
                match TensorFile::open(&path) {
                    Err(error) => assert_printable(&error),
                    Ok(file) => assert!(file.directory.tensors.len() <= tensors),
                }
            }
        }
    }
}
