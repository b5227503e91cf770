//! Arrays of numpy and archives of them: broken ones are refused, odd ones are read.

use std::path::Path;

use loratool::containers::TensorFile;
use loratool::{Error, Kind, Reason};

use crate::hostile_support::{
    self, Difference, Member, Room, assert_printable, assert_reason, change_every_byte, open_as,
    refused_as,
};
use crate::support::fixture;

/// An array of this header and data.
fn npy(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\0".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn header(dtype: &str, fortran: &str, shape: &str) -> String {
    format!("{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n")
}

fn array(dtype: &str, shape: &str, data: usize) -> Vec<u8> {
    npy(&header(dtype, "False", shape), &vec![0; data])
}

fn zip(members: &[Member]) -> Vec<u8> {
    hostile_support::zip(members).bytes
}

fn open(bytes: impl AsRef<[u8]>) -> loratool::Result<TensorFile> {
    open_as("x", bytes)
}

fn refused(bytes: impl AsRef<[u8]>) -> Error {
    refused_as("x", bytes)
}

#[test]
fn arrays_of_plain_types_are_read_in_place() {
    for (dtype, size) in [
        ("<f8", 8),
        ("<f4", 4),
        ("<f2", 2),
        ("<i8", 8),
        ("<u4", 4),
        ("|i1", 1),
        ("|b1", 1),
    ] {
        let file = open(array(dtype, "(2, 3)", 6 * size)).unwrap();
        let tensor = file.tensor("array").unwrap();
        assert_eq!(
            (tensor.shape.as_slice(), tensor.length),
            (&[2, 3][..], 6 * size as u64)
        );
        assert!(tensor.memory.is_none());
    }
    for (shape, elements) in [
        ("()", 1),
        ("(3,)", 3),
        ("(0, 4)", 0),
        ("(4096L, 1, )", 4096),
    ] {
        let file = open(array("<f4", shape, elements * 4)).unwrap();
        assert_eq!(
            file.tensor("array").unwrap().elements(),
            elements,
            "{shape}"
        );
    }
}

#[test]
fn an_array_in_fortran_order_is_read_like_its_twin() {
    let values = |order: &[usize]| -> Vec<u8> {
        order
            .iter()
            .flat_map(|v| (*v as f32).to_le_bytes())
            .collect()
    };
    // a[i][j][k] = 12 i + 4 j + k, stored with i fastest.
    let mut order = Vec::new();
    for k in 0..4 {
        for j in 0..3 {
            order.extend((0..2).map(|i| 12 * i + 4 * j + k));
        }
    }
    let bytes = npy(&header("<f4", "True", "(2, 3, 4)"), &values(&order));
    let expected: Vec<f64> = (0..24).map(f64::from).collect();
    for file in [
        open(&bytes).unwrap(),
        open(zip(&[Member::stored("array.npy", &bytes)])).unwrap(),
        open(zip(&[Member::deflated("array.npy", &bytes)])).unwrap(),
    ] {
        assert_eq!(file.tensor("array").unwrap().to_f64().unwrap(), expected);
    }
}

#[test]
fn members_are_read_stored_and_deflated() {
    let (a, b) = (array("<f4", "(2, 3)", 24), array("<i4", "(5,)", 20));
    let file = open(zip(&[
        Member::stored("a.npy", &a),
        Member::deflated("b.c.npy", &b),
    ]))
    .unwrap();
    assert_eq!(file.container.name(), "npz");
    assert!(file.tensor("a").unwrap().memory.is_none());
    assert_eq!(
        file.tensor("b.c").unwrap().bytes().unwrap().as_ref(),
        [0; 20]
    );
}

#[test]
fn headers_that_lie_are_refused() {
    for shape in [
        "(4294967296, 4294967296, 16)",
        "(18446744073709551615, 2)",
        "(0, 9223372036854775807, 4)",
    ] {
        assert_reason!(
            refused(array("<f4", shape, 16)),
            Reason::ShapeOverflow { .. }
        );
    }
    for shape in ["(1099511627776,)", "(3, 3)", "(2,)"] {
        assert_reason!(
            refused(array("<f4", shape, 16)),
            Reason::SizeMismatch { .. }
        );
    }
    for shape in [
        "(-1,)",
        "(2.0,)",
        "[4]",
        "(4)",
        "4",
        "((4,),)",
        "(1e3,)",
        "(99999999999999999999,)",
    ] {
        assert_reason!(refused(array("<f4", shape, 16)), Reason::Structure { .. });
    }
    let many = format!("({})", "1,".repeat(9));
    assert_reason!(refused(array("<f4", &many, 4)), Reason::TooMany { .. });
    for dtype in ["|O", ">f4", "<V2", "<U3", "<c16", "<f16", "<M8[s]"] {
        assert_reason!(refused(array(dtype, "(2,)", 8)), Reason::Stored { .. });
    }
    for text in [
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
        "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (2,)}",
    ] {
        assert_reason!(refused(npy(text, &[0; 8])), Reason::Stored { .. });
    }
    for text in [
        "",
        "{",
        "{'descr': '<f4'",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)} + 1",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}",
        "{'descr': '<f4' 'fortran_order': False}",
        "{'de\\x73cr': '<f4', 'fortran_order': False, 'shape': (2,)}",
    ] {
        assert_reason!(refused(npy(text, &[0; 8])), Reason::Structure { .. });
    }
    let twice = "{'shape': (2,), 'descr': '<f4', 'fortran_order': False, 'shape': (2,)}";
    assert_reason!(refused(npy(twice, &[0; 8])), Reason::DuplicateKey { .. });
    let without = "{'descr': '<f4', 'shape': (2,)}";
    assert_reason!(refused(npy(without, &[0; 8])), Reason::FieldMissing { .. });
    let nested = format!("{{'shape': {}", "(".repeat(60_000));
    assert_reason!(refused(npy(&nested, &[0; 8])), Reason::Structure { .. });
    let mut long = b"\x93NUMPY\x02\0\xff\xff\xff\xff".to_vec();
    assert_reason!(refused(&long), Reason::HeaderBeyondFile { .. });
    long.splice(8..12, 70_000u32.to_le_bytes());
    long.resize(80_000, b' ');
    assert_reason!(refused(&long), Reason::HeaderTooLarge { .. });
    assert_reason!(refused(b"\x93NUMPY\x04\0\0\0"), Reason::Stored { .. });
}

#[test]
fn archives_that_lie_are_refused() {
    let a = array("<f4", "(2, 3)", 24);
    let twice = [Member::stored("a.npy", &a), Member::stored("a.npy", &a)];
    assert_reason!(refused(zip(&twice)), Reason::DuplicateMember);
    let other = [
        Member::stored("a.npy", &a),
        Member::stored("readme.txt", b"hello"),
    ];
    assert_reason!(refused(zip(&other)), Reason::Structure { .. });
    assert_reason!(
        refused(zip(&[Member::stored(".npy", &a)])),
        Reason::EmptyName
    );
    let mut wrong = Member::deflated("a.npy", &a);
    wrong.checksum ^= 1;
    assert_reason!(refused(zip(&[wrong])), Reason::Checksum);
    for size in [a.len() as u32 - 1, a.len() as u32 + 1, 4_000_000_000] {
        let mut wrong = Member::deflated("a.npy", &a);
        wrong.size = size;
        assert_reason!(
            refused(zip(&[wrong])),
            Reason::Zip { .. } | Reason::TooMany { .. }
        );
        let mut wrong = Member::stored("a.npy", &a);
        wrong.size = size;
        assert_reason!(refused(zip(&[wrong])), Reason::Zip { .. });
    }
    let mut method = Member::stored("a.npy", &a);
    method.method = 93;
    assert_reason!(refused(zip(&[method])), Reason::ZipMember { .. });
    // Two entries of the directory for the same bytes.
    let mut bytes = zip(&[Member::stored("a.npy", &a), Member::stored("b.npy", &a)]);
    let second = bytes.len() - 22 - 5 - 4;
    bytes[second..second + 4].fill(0);
    assert_reason!(refused(&bytes), Reason::Zip { .. });
    // One entry fewer than the end says.
    let mut bytes = zip(&[Member::stored("a.npy", &a)]);
    let end = bytes.len() - 22;
    bytes[end + 8] = 2;
    bytes[end + 10] = 2;
    assert_reason!(refused(&bytes), Reason::Zip { .. });
}

#[test]
fn a_bomb_is_refused_before_it_is_unpacked() {
    // Many members of 16 MiB of zeros, 16 KiB each: more than is unpacked for one file.
    let bytes = array("<f4", "(4194304,)", 16 << 20);
    let names: Vec<String> = (0..64).map(|n| format!("{n}.npy")).collect();
    let bomb = Member::deflated("", &bytes);
    let all = |size: u32| -> Vec<Member> {
        let named = |name: &String| Member {
            name: name.as_bytes().to_vec(),
            size,
            ..bomb.clone()
        };
        names.iter().map(named).collect()
    };
    // One that lies about its size is refused at once.
    assert_reason!(refused(zip(&all(4 * bomb.size))), Reason::Zip { .. });
    for size in [bomb.size, 300 << 20] {
        assert_reason!(refused(zip(&all(size))), Reason::TooMany { .. });
    }
}

fn cut_everywhere(path: &Path) {
    let whole = std::fs::read(path).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    assert!(TensorFile::open(path).is_ok());
    for length in (0..whole.len()).rev() {
        file.set_len(length as u64).unwrap();
        let error = match TensorFile::open(path) {
            Err(error) => error,
            Ok(_) => panic!("cut at {length} was accepted"),
        };
        // A zip archive that ends inside the first name could be any.
        let any = whole.starts_with(b"PK") && length < 80;
        assert!(
            error.kind() == Kind::Malformed || any && error.kind() == Kind::Unsupported,
            "{length}: {error:?}"
        );
        assert_eq!(error.file(), Some(path));
        assert_printable(&error);
    }
}

#[test]
fn arrays_and_archives_cut_at_any_length_are_refused() {
    let room = Room::new();
    let a = array("<f4", "(2, 3)", 24);
    cut_everywhere(&room.write("a", &a));
    cut_everywhere(&room.write(
        "b",
        zip(&[Member::stored("a.npy", &a), Member::deflated("b.npy", &a)]),
    ));
    let npz = std::fs::read(fixture("mlx/lora/adapters.npz")).unwrap();
    cut_everywhere(&room.write("c", npz));
}

#[test]
fn a_changed_byte_of_an_array_is_refused_or_changes_only_what_it_encodes() {
    // Numbers that fit several types, a shape that can be another, a dimension of two digits.
    for (dtype, fortran, shape) in [("<f4", "False", "(2, 6)"), ("<i8", "True ", "(10, 1)")] {
        let header = header(dtype, fortran, shape);
        let size = if dtype == "<f4" { 48 } else { 80 };
        let whole = npy(&header, &(0..size).collect::<Vec<u8>>());
        let within = |text: &str| {
            let start = 10 + header.find(text).unwrap();
            start..start + text.len()
        };
        let (dtype, shape) = (within(dtype), within(shape));
        let [refused, same, other] = change_every_byte(&whole, |at, difference| match difference {
            Difference::Type(0) => dtype.contains(&at),
            Difference::Shape(0) => shape.contains(&at),
            Difference::Bytes(0) => at >= 10 + header.len(),
            _ => false,
        });
        assert!(refused > 500 && same > 0, "{refused}, {same}, {other}");
        assert!(other >= usize::from(size) * 8, "{other}");
    }
}

#[test]
fn a_changed_byte_of_an_archive_is_refused_or_changes_nothing() {
    let a = array("<f4", "(2, 3)", 24);
    let mut files = vec![zip(&[
        Member::stored("a.npy", &a),
        Member::deflated("b.npy", &a),
    ])];
    for name in ["long", "forced", "streamed", "compressed"] {
        let path = fixture(&format!("numpy/{name}.npz"));
        files.push(std::fs::read(path).unwrap());
    }
    for whole in files {
        let [refused, same, other] = change_every_byte(&whole, |_, _| false);
        // Versions, times and attributes say nothing about the arrays.
        assert!(refused > 3 * same && same > 0, "{refused}, {same}");
        assert_eq!(other, 0);
    }
}

#[test]
fn an_array_ends_where_its_member_does() {
    // Its header reaches into the next member, which would complete it.
    let header = header("<f4", "False", "(2,)");
    let short = npy(&header, &[]);
    for length in 10..short.len() {
        let members = |name| Member::stored(name, &short[..length]);
        let next = Member::stored("z.npy", array("<f4", "(2,)", 8));
        for member in [
            members("a.npy"),
            Member::deflated("a.npy", &short[..length]),
        ] {
            let error = refused(zip(&[member, next.clone()]));
            assert_reason!(error, Reason::HeaderBeyondFile { .. });
            assert_eq!(error.item(), Some("a.npy"));
        }
    }
    for data in [0, 7, 9, 4096] {
        let member = Member::stored("a.npy", npy(&header, &vec![0; data]));
        let error = refused(zip(&[member]));
        assert_reason!(error, Reason::SizeMismatch { expected: 8, found } if *found == data as u64);
    }
    let longest = [
        &b"\x93NUMPY\x02\0"[..],
        &u32::MAX.to_le_bytes(),
        &[b' '; 99],
    ]
    .concat();
    let error = refused(zip(&[Member::stored("a.npy", longest)]));
    assert_reason!(error, Reason::HeaderBeyondFile { .. });
}

#[test]
fn arrays_of_versions_1_to_3_are_read_and_no_others() {
    let header = header("<f4", "False", "(2,)");
    for (major, minor) in (0..=5).flat_map(|major| [(major, 0), (major, 1)]) {
        let mut bytes = [b"\x93NUMPY", &[major, minor][..]].concat();
        match major {
            1 => bytes.extend((header.len() as u16).to_le_bytes()),
            _ => bytes.extend((header.len() as u32).to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend([0; 8]);
        match (major, minor) {
            (1..=3, 0) => drop(open(&bytes).unwrap()),
            _ => assert_reason!(refused(&bytes), Reason::Stored { .. }),
        }
    }
}

#[test]
fn arrays_in_fortran_order_lie_as_little_as_others() {
    let fortran = |shape: &str, data: usize| npy(&header("<f4", "True", shape), &vec![0; data]);
    for shape in [
        "(4294967296, 4294967296, 16)",
        "(0, 9223372036854775807, 4)",
        "(4611686018427387904, 4)",
    ] {
        for bytes in [
            fortran(shape, 16),
            zip(&[Member::deflated("a.npy", fortran(shape, 16))]),
        ] {
            assert_reason!(refused(bytes), Reason::ShapeOverflow { .. });
        }
    }
    for shape in ["(3, 3)", "(1099511627776, 4)", "(2, 1)"] {
        let error = refused(fortran(shape, 16));
        assert_reason!(error, Reason::SizeMismatch { .. });
    }
    for (shape, data) in [("(0, 5)", 0), ("(5, 0, 3)", 0), ("()", 4), ("(1, 1, 2)", 8)] {
        let file = open(fortran(shape, data)).unwrap();
        assert_eq!(file.tensor("array").unwrap().bytes().unwrap().len(), data);
    }
}
