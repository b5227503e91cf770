//! GGUF files: broken ones are refused, and what the `gguf` package wrote is read.

use loratool::containers::TensorFile;
use loratool::ops::inspect::inspect;
use loratool::tensor::DType;
use loratool::{Error, Kind, Reason};

use crate::hostile_support::{
    Difference, Room, assert_printable, assert_reason, change_every_byte, open_as, refused_as,
};
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
fn what_ggml_does_not_read_is_refused() {
    // More dimensions than it has.
    open(gguf(&[], &[info("w", &[1; 4], 0, 0)], 32)).unwrap();
    for count in 5..=9 {
        let error = refused(gguf(&[], &[info("w", &vec![1; count], 0, 0)], 32));
        assert_reason!(
            error,
            Reason::TooMany {
                what: "dimensions",
                limit: 4
            }
        );
    }
    let mut most = gguf(&[], &[info("w", &[8], 0, 0)], 32);
    let dimensions = 24 + 8 + 1;
    most[dimensions..dimensions + 4].fill(0xff);
    assert_reason!(refused(most), Reason::TooMany { .. });
    // Sizes that are negative there.
    for size in [1 << 63, u64::MAX] {
        for sizes in [&[size][..], &[size, 1], &[1, size], &[0, size]] {
            let error = refused(gguf(&[], &[info("w", sizes, 0, 0)], 32));
            assert_reason!(error, Reason::ShapeOverflow { .. });
        }
    }
    // Other versions, and the byte order of others.
    for version in (0..=16u32).filter(|version| !(2..=3).contains(version)) {
        for bytes in [version.to_le_bytes(), version.to_be_bytes()] {
            let mut file = gguf(&[], &[info("w", &[8], 0, 0)], 32);
            file[4..8].copy_from_slice(&bytes);
            assert_reason!(refused(file), Reason::Stored { .. });
        }
    }
    for version in [2u32, 3] {
        let mut file = gguf(&[], &[info("w", &[8], 0, 0)], 32);
        file[4..8].copy_from_slice(&version.to_be_bytes());
        assert_reason!(refused(file), Reason::Stored { problem } if problem.contains("big-endian"));
    }
    // A name ends at a zero.
    for (keys, infos) in [
        (vec![key("k\0", 7, &[1])], vec![]),
        (vec![], vec![info("w\0x", &[8], 0, 0)]),
    ] {
        assert_reason!(refused(gguf(&keys, &infos, 32)), Reason::Structure { .. });
    }
}

#[test]
fn alignments_that_are_none_are_refused() {
    let file = |alignment: Vec<u8>| gguf(&[alignment], &[], 0);
    let aligned = |kind, bytes: &[u8]| file(key("general.alignment", kind, bytes));
    for power in 0..=20 {
        let alignment = 1u32 << power;
        let alignment_key = key("general.alignment", 4, &alignment.to_le_bytes());
        let end = 24 + alignment_key.len();
        let opened = open(&file(alignment_key)[..end]);
        assert!(opened.is_ok(), "{alignment}");
    }
    for alignment in [
        0u32,
        3,
        12,
        33,
        48,
        (1 << 20) + 1,
        1 << 21,
        1 << 31,
        u32::MAX,
    ] {
        let error = refused(aligned(4, &alignment.to_le_bytes()));
        assert_reason!(error, Reason::Structure { .. });
        assert_eq!(error.item(), Some("general.alignment"));
    }
    let list = [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[32, 0, 0, 0]].concat();
    let others: &[(u32, &[u8])] = &[
        (0, &[32]),
        (2, &[32, 0]),
        (5, &[32, 0, 0, 0]),
        (6, &32f32.to_le_bytes()),
        (8, &text("32")),
        (9, &list),
        (10, &[32, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (kind, bytes) in others {
        let error = refused(aligned(*kind, bytes));
        assert_reason!(error, Reason::Structure { .. });
    }
    // Tensors that keep to another one.
    let keys = [key("general.alignment", 4, &64u32.to_le_bytes())];
    let infos = |second| [info("a", &[8], 0, 0), info("b", &[8], 0, second)];
    for (second, reason) in [
        (32, "belong to no tensor"),
        (31, "overlap"),
        (96, "belong to no tensor"),
    ] {
        let error = refused(gguf(&keys, &infos(second), 160));
        assert_eq!(error.kind(), Kind::Malformed);
        assert!(error.to_string().contains(reason), "{error}");
    }
    for (second, sizes) in [(64, 9), (64, 1 << 40), (1 << 20, 8)] {
        let infos = [info("a", &[8], 0, 0), info("b", &[sizes], 0, second)];
        let error = refused(gguf(&keys, &infos, 64 + 32));
        assert_reason!(
            error,
            Reason::OffsetsBeyondFile { .. } | Reason::Hole { .. }
        );
        assert_eq!(error.item(), Some("b"));
    }
}

#[test]
fn lengths_that_lie_are_refused_before_anything_is_read() {
    let mut files = Vec::new();
    for length in [1 << 20, 1 << 32, 1 << 63, u64::MAX - 24, u64::MAX] {
        let length = u64::to_le_bytes(length);
        // Of a key, of a text, of a text in a list, of the name of a tensor.
        let list = [
            &8u32.to_le_bytes()[..],
            &2u64.to_le_bytes(),
            &text("x"),
            &length,
        ];
        files.push(gguf(&[[&length[..], &[b'k'; 64]].concat()], &[], 0));
        files.push(gguf(
            &[key("k", 8, &[&length[..], &[b'v'; 64]].concat())],
            &[],
            0,
        ));
        files.push(gguf(&[key("k", 9, &list.concat())], &[], 0));
        files.push(gguf(&[], &[[&length[..], &[b'w'; 64]].concat()], 0));
    }
    for file in files {
        assert_reason!(refused(file), Reason::HeaderCut { .. });
    }
    let long = "n".repeat(4097);
    for (keys, infos) in [
        (vec![key(&long, 7, &[1])], vec![]),
        (vec![], vec![info(&long, &[8], 0, 0)]),
    ] {
        let error = refused(gguf(&keys, &infos, 32));
        assert_reason!(error, Reason::NameTooLong { bytes: 4097, .. });
    }
    // As many as it says, and more than there may be.
    let keys: Vec<Vec<u8>> = (0..65_537).map(|n| key(&n.to_string(), 7, &[1])).collect();
    let error = refused(gguf(&keys, &[], 0));
    assert_reason!(
        error,
        Reason::TooMany {
            what: "metadata keys",
            ..
        }
    );
    let infos = vec![info("w", &[], 0, 0); 200_001];
    let error = refused(gguf(&[], &infos, 0));
    assert_reason!(
        error,
        Reason::TooMany {
            what: "tensors",
            ..
        }
    );
    // A header larger than there may be; the file has holes instead of bytes.
    let room = Room::new();
    let path = room.write(
        "x.gguf",
        gguf(&[key("k", 8, &(1u64 << 32).to_le_bytes())], &[], 0),
    );
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 33).unwrap();
    let error = TensorFile::open(&path).map(drop).unwrap_err();
    assert_reason!(error, Reason::HeaderTooLarge { .. });
    // Ten million texts of no length, and one more.
    for (count, sound) in [(10_000_000u64, true), (10_000_001, false)] {
        let mut list = [8u32.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()].concat();
        list.resize(list.len() + 8 * count as usize, 0);
        let opened = open(gguf(&[key("k", 9, &list)], &[], 0));
        match opened {
            Ok(_) => assert!(sound),
            Err(error) => {
                assert!(!sound, "{error:?}");
                assert_reason!(error, Reason::TooMany { .. });
            }
        }
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
fn what_the_gguf_package_wrote_is_read_and_refused_when_it_is_cut() {
    for (name, what, tensors) in [("adapter", "adapter", 4), ("model", "checkpoint", 3)] {
        let path = fixture("gguf").join(format!("{name}.gguf"));
        let found = inspect(&path, &Default::default()).unwrap();
        assert_eq!((found.what.as_str(), found.tensors), (what, tensors));
        assert_eq!(found.container, "GGUF");
        if name == "adapter" {
            assert_eq!(
                found.format_name.as_deref(),
                Some("GGUF adapter (llama.cpp)")
            );
            let adapter = found.adapter.unwrap();
            assert_eq!(adapter.ranks.into_iter().collect::<Vec<_>>(), [(2, 2)]);
            assert_eq!(adapter.facts.other["adapter.lora.alpha"], "16");
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
    }
}

/// What a byte of a file is part of: nothing that may be different, something of one key or of one tensor, or
/// the data.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Fixed,
    Key(usize),
    Value(usize),
    Name(usize),
    Shape(usize),
    Type(usize),
    Data,
}

/// The part that each byte of a sound file is of, by the specification (`docs/gguf.md` of ggml).
fn parts(bytes: &[u8]) -> Vec<Part> {
    struct Walk<'a>(&'a [u8], Vec<Part>);

    impl Walk<'_> {
        fn number(&mut self, size: usize, part: Part) -> usize {
            let mut bytes = [0; 8];
            let at = self.1.len();
            bytes[..size].copy_from_slice(&self.0[at..at + size]);
            self.pass(size, part);
            u64::from_le_bytes(bytes) as usize
        }

        fn pass(&mut self, size: usize, part: Part) {
            self.1.extend(std::iter::repeat_n(part, size));
        }

        fn text(&mut self, part: Part) {
            let length = self.number(8, Part::Fixed);
            self.pass(length, part);
        }

        fn value(&mut self, kind: usize, part: Part) {
            match kind {
                8 => self.text(part),
                9 => {
                    let kind = self.number(4, part);
                    for _ in 0..self.number(8, part) {
                        self.value(kind, part);
                    }
                }
                0 | 1 | 7 => self.pass(1, part),
                2 | 3 => self.pass(2, part),
                4..=6 => self.pass(4, part),
                _ => self.pass(8, part),
            }
        }
    }

    let mut walk = Walk(bytes, Vec::new());
    walk.pass(8, Part::Fixed);
    let (tensors, keys) = (walk.number(8, Part::Fixed), walk.number(8, Part::Fixed));
    for key in 0..keys {
        walk.text(Part::Key(key));
        let kind = walk.number(4, Part::Value(key));
        walk.value(kind, Part::Value(key));
    }
    for tensor in 0..tensors {
        walk.text(Part::Name(tensor));
        let dimensions = walk.number(4, Part::Shape(tensor));
        walk.pass(8 * dimensions, Part::Shape(tensor));
        walk.pass(4, Part::Type(tensor));
        walk.pass(8, Part::Fixed);
    }
    walk.pass(bytes.len() - walk.1.len(), Part::Data);
    walk.1
}

#[test]
fn a_changed_byte_is_refused_or_changes_only_what_it_encodes() {
    let alignment = key("general.alignment", 4, &64u32.to_le_bytes());
    let list = [&5u32.to_le_bytes()[..], &3u64.to_le_bytes(), &[7; 12]].concat();
    let keys = [
        alignment,
        key("n", 4, &7u32.to_le_bytes()),
        key("b", 7, &[1]),
        key("l", 9, &list),
        key("w", 8, &text("word")),
    ];
    let infos = [info("a", &[3, 2], 1, 0), info("b", &[8], 0, 64)];
    let mut own = gguf(&keys, &infos, 96);
    let start = own.len() - 96;
    own.resize(start.next_multiple_of(64) + 96, 0);
    let mut files = vec![own];
    for name in ["adapter", "model"] {
        files.push(std::fs::read(fixture(&format!("gguf/{name}.gguf"))).unwrap());
    }
    for whole in files {
        let parts = parts(&whole);
        let [refused, same, other] = change_every_byte(&whole, |at, difference| {
            match (parts[at], difference) {
                (Part::Key(part), Difference::Key(here))
                | (Part::Value(part), Difference::Value(here))
                | (Part::Name(part), Difference::Name(here))
                // Another shape or type has the same bytes, or fewer or more of the padding behind them.
                | (Part::Shape(part), Difference::Shape(here) | Difference::Bytes(here))
                | (Part::Type(part), Difference::Type(here) | Difference::Bytes(here)) => part == here,
                (Part::Data, Difference::Bytes(_)) => true,
                _ => false,
            }
        });
        assert!(
            refused > 1000 && same > 0 && other > 100,
            "{refused}, {same}, {other}"
        );
    }
}
