//! Files of tensors that are refused, each for its own reason, and odd ones that are sound.

use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::tensor::DType;
use loratool::{Error, Reason};

use crate::hostile_support::{
    Room, assert_printable, assert_reason, file_of, tensors, within_a_second,
};

/// Opens a path that must be refused, within a second, with the file named.
fn refusal(path: &Path) -> Error {
    let owned = path.to_owned();
    let error = within_a_second(move || TensorFile::open(owned).map(drop)).unwrap_err();
    assert_eq!(error.file(), Some(path), "{error:?}");
    assert_printable(&error);
    error
}

/// The refusal of a file with these bytes.
fn refused(bytes: impl AsRef<[u8]>) -> Error {
    let room = Room::new();
    refusal(&room.write("model.safetensors", bytes))
}

/// The refusal of a file with this header and so many bytes of data.
fn refused_header(header: impl AsRef<[u8]>, data: usize) -> Error {
    refused(file_of(header, vec![0; data]))
}

fn entry(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

fn header(entries: &[String]) -> String {
    format!("{{{}}}", entries.join(","))
}

#[test]
fn rejects_an_empty_file() {
    assert_reason!(refused(""), Reason::Empty);
}

#[test]
fn rejects_a_pointer_of_git_lfs() {
    let text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    let error = refused(text);
    assert_reason!(error, Reason::LfsPointer);
    assert!(error.hint().unwrap().contains("git lfs pull"));
}

#[test]
fn rejects_a_web_page() {
    for page in [
        "<!DOCTYPE html><html>",
        "\n  <html lang=en>",
        "<?xml version",
    ] {
        assert_reason!(refused(page), Reason::Html);
    }
}

#[test]
fn rejects_a_json_text() {
    assert_reason!(
        refused(r#"{"error": "Repository not found"}"#),
        Reason::Json
    );
    assert_reason!(refused("{}"), Reason::Json);
}

#[test]
fn rejects_bytes_of_no_known_kind() {
    for bytes in [&b"MZ\x90\0abcdefgh"[..], b"x", b"hello", b"Not found\n"] {
        assert_reason!(refused(bytes), Reason::UnknownContainer);
    }
}

#[test]
fn rejects_other_containers_by_their_names() {
    let zip = "zip archive";
    let cases: &[(&[u8], &str)] = &[
        (b"PK\x03\x04\0\0\x08\x08\0\0", zip),
        // A version of 2.0 and no flags look like the zeros of a length.
        (b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0", zip),
        (b"PK\x05\x06\0\0\0\0\0\0\0\0", zip),
    ];
    for (bytes, expected) in cases {
        assert_reason!(refused(bytes), Reason::Container { name } if name == expected);
    }
}

#[test]
fn rejects_a_file_that_ends_inside_the_length_of_its_header() {
    let whole = tensors(&[("a", &[2])]);
    for length in 5..8 {
        let error = refused(&whole[..length as usize]);
        assert_reason!(error, Reason::HeaderCut { length: found } if *found == length);
    }
}

#[test]
fn rejects_a_header_that_reaches_beyond_the_file() {
    let whole = tensors(&[("a", &[2])]);
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap());
    for length in [8, 9, header + 7] {
        assert_reason!(
            refused(&whole[..length as usize]),
            Reason::HeaderBeyondFile { header: claimed, length: found }
                if (*claimed, *found) == (header, length)
        );
    }
}

#[test]
fn rejects_a_header_that_is_larger_than_the_limit_before_reading_it() {
    let room = Room::new();
    let path = room.path("large.safetensors");
    let file = std::fs::File::create(&path).unwrap();
    let bytes = 100_000_001u64;
    std::io::Write::write_all(&mut &file, &bytes.to_le_bytes()).unwrap();
    std::io::Write::write_all(&mut &file, b"{").unwrap();
    file.set_len(8 + bytes).unwrap();
    assert_reason!(
        refusal(&path),
        Reason::HeaderTooLarge { bytes: found, limit: 100_000_000 } if *found == bytes
    );
}

#[test]
fn rejects_a_header_that_does_not_start_with_a_brace() {
    for header in ["[]", " {}", "\u{feff}{}", "null"] {
        assert_reason!(refused_header(header, 0), Reason::HeaderStart);
    }
    assert_reason!(refused([0; 64]), Reason::HeaderStart);
}

#[test]
fn rejects_a_header_that_is_not_json() {
    let comma = header(&[entry("a", "U8", "[1]", 0, 1)]).replace("}}", "},}");
    for text in [comma.as_str(), "{", "{}{}", "{} x", "{\"a\"}", "{'a': 1}"] {
        assert_reason!(
            refused_header(text, 1),
            Reason::NotJson { problem } if problem.contains("line")
        );
    }
}

#[test]
fn rejects_an_entry_that_does_not_describe_a_tensor() {
    let whole = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let changes = [
        (r#""U8""#, r#""u8""#),
        (r#""U8""#, "3"),
        ("[1]", "[-1]"),
        ("[1]", "[1.0]"),
        ("[1]", "[1e0]"),
        ("[1]", "[18446744073709551616]"),
        ("[1]", "1"),
        ("[0,1]", "[0]"),
        ("[0,1]", "[0,1,2]"),
        ("[0,1]", "[-1,1]"),
        ("[0,1]", "[0,18446744073709551616]"),
        (r#""shape":[1],"#, ""),
        (r#""dtype":"U8","#, ""),
        (r#","data_offsets":[0,1]"#, ""),
        (r#""shape":[1]"#, r#""shape":[1],"shape":[1]"#),
        (r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#, "null"),
    ];
    for (from, to) in changes {
        let changed = whole.replace(from, to);
        assert_ne!(changed, whole);
        assert_reason!(
            refused_header(header(&[changed]), 1),
            Reason::NotJson { .. }
        );
    }
}

#[test]
fn rejects_a_header_that_is_not_utf_8() {
    let error = refused_header(b"{\"a\xff\":1}", 0);
    assert_reason!(error, Reason::NotUtf8 { at: 11 });
}

#[test]
fn rejects_a_name_that_appears_twice() {
    let twice = [entry("a", "U8", "[1]", 0, 1), entry("a", "U8", "[1]", 1, 2)];
    assert_reason!(
        refused_header(header(&twice), 2),
        Reason::DuplicateKey { key } if key == "a"
    );
    // The same name, spelled with an escape.
    let escaped = [
        entry("a", "U8", "[1]", 0, 1),
        entry("\\u0061", "U8", "[1]", 1, 2),
    ];
    assert_reason!(
        refused_header(header(&escaped), 2),
        Reason::DuplicateKey { key } if key == "a"
    );
    assert_reason!(
        refused_header(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
        Reason::DuplicateKey { key } if key == "__metadata__"
    );
}

#[test]
fn rejects_metadata_that_say_something_twice() {
    assert_reason!(
        refused_header(r#"{"__metadata__":{"format":"pt","format":"np"}}"#, 0),
        Reason::DuplicateKey { key } if key == "format"
    );
}

#[test]
fn rejects_metadata_that_are_not_texts() {
    for metadata in ["1", "[]", r#"{"a":1}"#, r#"{"a":null}"#, r#"{"a":{}}"#] {
        let header = format!(r#"{{"__metadata__":{metadata}}}"#);
        assert_reason!(refused_header(header, 0), Reason::NotJson { .. });
    }
}

#[test]
fn rejects_tensors_that_overlap() {
    for second in [
        entry("b", "U8", "[4]", 2, 6),
        entry("b", "U8", "[4]", 0, 4),
        entry("b", "U8", "[0]", 2, 2),
    ] {
        let error = refused_header(header(&[entry("a", "U8", "[4]", 0, 4), second]), 6);
        assert_reason!(error, Reason::Overlap { other } if other == "a");
        assert_eq!(error.item(), Some("b"));
    }
}

#[test]
fn rejects_a_hole_in_the_data() {
    let gap = [entry("a", "U8", "[1]", 0, 1), entry("b", "U8", "[1]", 3, 4)];
    let error = refused_header(header(&gap), 4);
    assert_reason!(error, Reason::Hole { start: 1, end: 3 });
    assert_eq!(error.item(), Some("b"));
    let error = refused_header(header(&[entry("a", "U8", "[1]", 1, 2)]), 2);
    assert_reason!(error, Reason::Hole { start: 0, end: 1 });
}

#[test]
fn rejects_bytes_behind_the_last_tensor() {
    let one = header(&[entry("a", "U8", "[1]", 0, 1)]);
    assert_reason!(refused_header(one, 4), Reason::TrailingBytes { count: 3 });
    assert_reason!(refused_header("{}", 1), Reason::TrailingBytes { count: 1 });
}

#[test]
fn rejects_offsets_that_run_backwards() {
    let error = refused_header(header(&[entry("a", "U8", "[1]", 2, 1)]), 2);
    assert_reason!(error, Reason::OffsetsReversed { start: 2, end: 1 });
    assert_eq!(error.item(), Some("a"));
}

#[test]
fn rejects_data_that_end_behind_the_file() {
    let error = refused_header(header(&[entry("a", "U8", "[9]", 0, 9)]), 8);
    assert_reason!(error, Reason::OffsetsBeyondFile { end: 9, length: 8 });
    assert_eq!(error.item(), Some("a"));
    let far = header(&[entry("a", "U8", "[1]", 0, u64::MAX)]);
    assert_reason!(refused_header(far, 8), Reason::OffsetsBeyondFile { .. });
}

#[test]
fn rejects_a_shape_that_does_not_fit_its_bytes() {
    let error = refused_header(header(&[entry("a", "F32", "[2]", 0, 4)]), 4);
    assert_reason!(
        error,
        Reason::SizeMismatch {
            expected: 8,
            found: 4
        }
    );
    assert_eq!(error.item(), Some("a"));
}

#[test]
fn rejects_a_shape_that_overflows() {
    // Each is 4 bytes modulo 2⁶⁴: a product without checks would accept it.
    for (dtype, shape) in [
        ("U8", "[9223372036854775808,2,4]"),
        ("U8", "[4611686018427387905,4]"),
        ("F32", "[4611686018427387905]"),
        ("U8", "[2305843009213693952,8]"),
        ("U8", "[2305843009213693956]"),
    ] {
        let overflows = header(&[entry("a", dtype, shape, 0, 4)]);
        let error = refused_header(overflows, 4);
        assert_reason!(error, Reason::ShapeOverflow { .. });
        assert_eq!(error.item(), Some("a"));
    }
}

#[test]
fn rejects_a_shape_that_ends_inside_a_byte() {
    let error = refused_header(header(&[entry("a", "F4", "[3]", 0, 2)]), 2);
    assert_reason!(error, Reason::PartialByte { shape } if shape == &[3]);
    assert_eq!(error.item(), Some("a"));
}

#[test]
fn rejects_a_tensor_without_a_name() {
    let unnamed = header(&[entry("", "U8", "[1]", 0, 1)]);
    assert_reason!(refused_header(unnamed, 1), Reason::EmptyName);
}

#[test]
fn rejects_more_than_eight_dimensions() {
    let nine = header(&[entry("a", "U8", "[1,1,1,1,1,1,1,1,1]", 0, 1)]);
    let error = refused_header(nine, 1);
    assert_reason!(
        error,
        Reason::TooMany {
            what: "dimensions",
            limit: 8
        }
    );
    assert_eq!(error.item(), Some("a"));
    let million = format!("[{}1]", "1,".repeat(1_000_000));
    let error = refused_header(header(&[entry("a", "U8", &million, 0, 1)]), 1);
    assert_reason!(
        error,
        Reason::TooMany {
            what: "dimensions",
            ..
        }
    );
}

#[test]
fn rejects_a_name_of_more_than_4096_bytes() {
    let long = header(&[entry(&"n".repeat(4097), "U8", "[1]", 0, 1)]);
    let error = refused_header(long, 1);
    assert_reason!(
        error,
        Reason::NameTooLong {
            bytes: 4097,
            limit: 4096
        }
    );
}

#[test]
fn rejects_more_tensors_than_the_limit() {
    let entries: Vec<String> = (0..400_001)
        .map(|n| entry(&n.to_string(), "U8", "[0]", 0, 0))
        .collect();
    let error = refused_header(header(&entries), 0);
    assert_reason!(
        error,
        Reason::TooMany {
            what: "tensors",
            limit: 200_000
        }
    );
}

#[test]
fn rejects_more_metadata_than_the_limit() {
    // The key that holds them counts as well.
    let entries: Vec<String> = (0..200_000).map(|n| format!("\"{n}\":\"\"")).collect();
    let header = format!("{{\"__metadata__\":{{{}}}}}", entries.join(","));
    let error = refused_header(header, 0);
    assert_reason!(
        error,
        Reason::TooMany {
            what: "metadata entries",
            limit: 200_000
        }
    );
}

#[test]
fn rejects_deep_nesting_without_exhausting_the_stack() {
    let deep = |open: &str, close: &str| open.repeat(1_000_000) + &close.repeat(1_000_000);
    for nested in [deep("[", "]"), "[".repeat(1_000_000), deep("{\"a\":", "}")] {
        for header in [
            format!("{{\"a\":{nested}}}"),
            format!("{{\"__metadata__\":{{\"a\":{nested}}}}}"),
            format!("{{\"a\":{{\"dtype\":{nested}}}}}"),
            format!("{{\"a\":{{\"other\":{nested}}}}}"),
        ] {
            assert_reason!(refused_header(header, 0), Reason::NotJson { .. });
        }
    }
}

#[test]
fn rejects_a_folder_a_device_and_a_link_to_nothing() {
    let room = Room::new();
    assert_reason!(
        refusal(&room.folder("model.safetensors")),
        Reason::NotARegularFile { what: "a folder" }
    );
    assert_reason!(refusal(&room.path("nothing")), Reason::Open);
    #[cfg(unix)]
    {
        assert_reason!(
            refusal(Path::new("/dev/zero")),
            Reason::NotARegularFile {
                what: "a pipe, device or socket"
            }
        );
        let link = room.path("link");
        std::os::unix::fs::symlink(room.path("nothing"), &link).unwrap();
        assert_reason!(refusal(&link), Reason::Open);
        let round = room.path("round");
        std::os::unix::fs::symlink(&round, &round).unwrap();
        assert_reason!(refusal(&round), Reason::Open);
    }
}

#[test]
#[cfg(unix)]
fn rejects_a_pipe_without_waiting_for_a_writer() {
    let room = Room::new();
    let pipe = room.path("pipe.safetensors");
    make_pipe(&pipe);
    assert_reason!(
        refusal(&pipe),
        Reason::NotARegularFile {
            what: "a pipe, device or socket"
        }
    );
}

#[cfg(unix)]
fn make_pipe(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

/// Opens a file that must be accepted and gives its tensors as (name, type, shape, bytes).
fn accepted(path: PathBuf) -> Vec<(String, DType, Vec<usize>, Vec<u8>)> {
    let file = within_a_second(move || TensorFile::open(path)).unwrap();
    let tensors = &file.directory.tensors;
    tensors
        .iter()
        .map(|tensor| {
            let bytes = tensor.bytes().unwrap().into_owned();
            (
                tensor.name.clone(),
                tensor.dtype,
                tensor.shape.clone(),
                bytes,
            )
        })
        .collect()
}

fn accepted_bytes(bytes: impl AsRef<[u8]>) -> Vec<(String, DType, Vec<usize>, Vec<u8>)> {
    let room = Room::new();
    accepted(room.write("model.safetensors", bytes))
}

#[test]
fn accepts_data_that_are_not_aligned() {
    let odd = header(&[
        entry("a", "U8", "[1]", 0, 1),
        entry("b", "F32", "[1]", 1, 5),
    ]);
    assert_ne!((8 + odd.len() + 1) % 4, 0);
    let data = [&[7][..], &1.5f32.to_le_bytes()].concat();
    let room = Room::new();
    let file = TensorFile::open(room.write("x", file_of(odd, data))).unwrap();
    assert_eq!(file.tensor("b").unwrap().to_f64().unwrap(), [1.5]);
}

#[test]
fn accepts_any_order_in_the_header_and_gives_the_order_of_the_data() {
    let backwards = header(&[
        entry("c", "U8", "[1]", 2, 3),
        entry("a", "U8", "[1]", 1, 2),
        entry("b", "U8", "[1]", 0, 1),
    ]);
    let found = accepted_bytes(file_of(backwards, [1, 2, 3]));
    let found: Vec<_> = found.iter().map(|t| (t.0.as_str(), t.3[0])).collect();
    assert_eq!(found, [("b", 1), ("a", 2), ("c", 3)]);
}

#[test]
fn accepts_every_order_of_the_fields_of_an_entry() {
    let entry = r#"{"a":{"data_offsets":[0,2],"shape":[1],"dtype":"F16"}}"#;
    assert_eq!(accepted_bytes(file_of(entry, [0, 60]))[0].1, DType::F16);
}

#[test]
fn accepts_scalars_and_empty_tensors() {
    let entries = header(&[
        entry("scalar", "F32", "[]", 0, 4),
        entry("empty", "F32", "[0]", 4, 4),
        entry("flat", "F32", "[3,0,5]", 4, 4),
        entry("none", "F32", "[0]", 0, 0),
    ]);
    let found = accepted_bytes(file_of(entries, 2.0f32.to_le_bytes()));
    let names: Vec<_> = found.iter().map(|t| t.0.as_str()).collect();
    assert_eq!(names, ["none", "scalar", "empty", "flat"]);
    assert_eq!(found[1].2, [0usize; 0]);
    assert_eq!(found[1].3, 2.0f32.to_le_bytes());
}

#[test]
fn accepts_a_file_without_tensors_and_one_with_metadata_alone() {
    assert!(accepted_bytes(file_of("{}", [])).is_empty());
    let room = Room::new();
    let text = r#"{"__metadata__":{"b":"1","a":"\u001b"}}"#;
    let file = TensorFile::open(room.write("x", file_of(text, []))).unwrap();
    let metadata = [("b", "1"), ("a", "\u{1b}")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    assert_eq!(file.directory.metadata, metadata);
}

#[test]
fn accepts_every_type_of_the_format() {
    let types = [
        ("BOOL", 1),
        ("U8", 1),
        ("I8", 1),
        ("F8_E5M2", 1),
        ("F8_E4M3", 1),
        ("F8_E8M0", 1),
        ("I16", 2),
        ("U16", 2),
        ("F16", 2),
        ("BF16", 2),
        ("I32", 4),
        ("U32", 4),
        ("F32", 4),
        ("F64", 8),
        ("I64", 8),
        ("U64", 8),
        ("C64", 8),
    ];
    let mut offset = 0;
    let entries: Vec<String> = types
        .iter()
        .map(|(dtype, size)| {
            offset += 2 * size;
            entry(dtype, dtype, "[2]", offset - 2 * size, offset)
        })
        .collect();
    let found = accepted_bytes(file_of(header(&entries), vec![1; offset as usize]));
    assert_eq!(found.len(), types.len());
    for (name, dtype, _, bytes) in found {
        assert_eq!(dtype.to_string(), name);
        assert_eq!(bytes.len() * 8, 2 * dtype.bitsize());
    }
    let halves = header(&[entry("a", "F4", "[2]", 0, 1)]);
    assert_eq!(accepted_bytes(file_of(halves, [0x21]))[0].1, DType::F4);
}

#[test]
fn accepts_exactly_the_limits() {
    let name = "n".repeat(4096);
    let found = accepted_bytes(file_of(
        header(&[entry(&name, "U8", "[1,1,1,1,1,1,1,1]", 0, 1)]),
        [9],
    ));
    assert_eq!((&found[0].0, found[0].2.len()), (&name, 8));
}

#[test]
fn accepts_spaces_behind_and_inside_the_header() {
    let spaced = header(&[entry("a", "U8", "[1]", 0, 1)]).replace(':', " :\n\t ") + "   \n ";
    assert_eq!(accepted_bytes(file_of(spaced, [5]))[0].3, [5]);
}

/// A sound file whose header has exactly this length.
fn with_header_of(length: usize) -> Vec<u8> {
    let mut text = header(&[entry("a", "U8", "[1]", 0, 1)]);
    assert!(text.len() <= length);
    text.push_str(&" ".repeat(length - text.len()));
    file_of(text, [5])
}

#[test]
fn accepts_a_header_whose_length_looks_like_another_kind_of_file() {
    // 80 02, the start of a pickle; `{`, the start of a JSON text; PK 03 04, the start of a zip.
    let lengths: [usize; 6] = [0x280, 0x480, 0x7b, 0x7b7b, 0x200a, 0x0403_4b50];
    for length in lengths {
        let bytes = with_header_of(length);
        assert_eq!(accepted_bytes(&bytes)[0].3, [5], "{length:#x}");
    }
}

#[test]
#[cfg(unix)]
fn accepts_links_to_a_file() {
    let room = Room::new();
    let file = room.write("blobs/0123", tensors(&[("a", &[2])]));
    let (link, second) = (room.path("model.safetensors"), room.path("second"));
    std::os::unix::fs::symlink(&file, &link).unwrap();
    std::os::unix::fs::symlink("model.safetensors", &second).unwrap();
    assert_eq!(accepted(second), accepted(file));
}

#[test]
fn finds_each_of_many_tensors_by_name_quickly() {
    let count = 100_000;
    let entries: Vec<String> = (0..count)
        .map(|n| entry(&format!("t{n}"), "U8", "[1]", n, n + 1))
        .collect();
    let bytes = file_of(header(&entries), vec![0; count as usize]);
    let room = Room::new();
    let path = room.write("many.safetensors", bytes);
    within_a_second(move || {
        let file = TensorFile::open(path).unwrap();
        let start = file.tensor("t0").unwrap().offset;
        for n in 0..count {
            assert_eq!(file.tensor(&format!("t{n}")).unwrap().offset, start + n);
        }
        assert!(file.tensor("t").is_none());
    });
}
