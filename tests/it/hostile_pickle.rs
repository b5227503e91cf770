//! Pickles that ask for more than tensors, or for tensors that are not there; and old files made of them.

use loratool::{Kind, Reason};

use crate::hostile_support::{Member, assert_reason, open_as, zip};
use crate::torch_files::{archive, integer, integers, named, refused, tensor, text};

/// A pickle without protocol and end, whole.
fn whole(protocol: u8, body: &[u8]) -> Vec<u8> {
    [&[0x80, protocol], body, b"."].concat()
}

/// An archive with this pickle, protocol and end included, and a storage of 24 bytes.
fn archive_of(pickle: &[u8]) -> Vec<u8> {
    zip(&[
        Member::stored("x/data.pkl", pickle),
        Member::stored("x/data/0", [1; 24]),
    ])
    .bytes
}

/// A persistent id with these five or more items, and a tensor in that storage.
fn tensor_in(items: &[&[u8]]) -> Vec<u8> {
    let items = items.concat();
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &items[..],
        b"tQ",
        &integer(0),
        &integers(&[2]),
        &integers(&[1]),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

/// The five items of a sound persistent id.
fn id() -> [Vec<u8>; 5] {
    [
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        integer(6),
    ]
}

fn slices(items: &[Vec<u8>]) -> Vec<&[u8]> {
    items.iter().map(Vec::as_slice).collect()
}

#[test]
fn protocols_2_to_5_are_read_and_no_others() {
    let body = named(&tensor(6, 0, &[2], &[1]));
    for protocol in 0..=255 {
        let pickle = whole(protocol, &body);
        if (2..=5).contains(&protocol) {
            let file = open_as("x.bin", archive_of(&pickle)).unwrap();
            assert!(file.tensor("a").is_some());
            // By itself it is no file of torch.
            assert_reason!(refused(pickle), Reason::Pickle { at: 0, .. });
        } else {
            assert_reason!(refused(archive_of(&pickle)), Reason::Pickle { .. });
            assert_reason!(refused(pickle), Reason::UnknownContainer);
        }
    }
    // Protocols 0 and 1 do not say so; their instructions are text, or are not listed.
    for pickle in [&b"(dp0\nVa\np1\nI1\ns."[..], b"}q\0X\x01\0\0\0aK\x01s."] {
        assert_reason!(refused(archive_of(pickle)), Reason::Pickle { .. });
        assert_reason!(refused(pickle), Reason::UnknownContainer);
        // Nor may they follow a protocol that is read.
        let mixed = whole(2, &[pickle, pickle].concat());
        assert!(matches!(
            refused(archive_of(&mixed)).kind(),
            Kind::Malformed | Kind::Unsupported
        ));
    }
    assert_reason!(
        refused(archive_of(&whole(2, b"Va\n"))),
        Reason::PickleInstruction { code: b'V', .. }
    );
}

#[test]
fn only_known_functions_are_called_with_what_torch_gives_them() {
    let tensor = tensor(6, 0, &[2], &[1]);
    let functions: &[&[u8]] = &[
        b"ctorch\nFloatStorage\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"ctorch\nfloat32\n",
        b"N",
        b"K\x01",
        b"}",
        b"]",
        b")",
        b"X\x02\0\0\0os",
        &tensor,
    ];
    let arguments: &[&[u8]] = &[b")", b"N\x85", b"NN\x86", b"](N\x85e\x85"];
    for function in functions {
        for arguments in arguments {
            let call = [*function, *arguments, b"R"].concat();
            assert_reason!(refused(archive(call)), Reason::Pickle { .. });
        }
    }
    let functions: &[&[u8]] = &[
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        b"ctorch._utils\n_rebuild_tensor\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v3\n",
        b"ctorch._utils\n_rebuild_parameter\n",
    ];
    let arguments: &[&[u8]] = &[
        b"N",
        b"]",
        b"}",
        b"N\x85",
        b"NN\x86",
        b"NNN\x87",
        b"(NNNNt",
        b"(NNNNNNt",
        b"(NNNNNNNt",
        b"X\x02\0\0\0id\x85",
    ];
    for function in functions {
        for arguments in arguments {
            let call = [*function, *arguments, b"R"].concat();
            assert_reason!(refused(archive(call)), Reason::Pickle { .. });
        }
    }
}

#[test]
fn state_is_taken_by_dictionaries_only() {
    let tensor = tensor(6, 0, &[2], &[1]);
    let others: &[&[u8]] = &[
        b"N",
        b"]",
        b")",
        b"K\x01",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        b"ctorch\nFloatStorage\n",
        &tensor,
    ];
    for other in others {
        for build in [[*other, b"}b"], [b"}", &[other, &b"b"[..]].concat()]] {
            assert_reason!(refused(archive(build.concat())), Reason::Pickle { .. });
        }
    }
}

#[test]
fn numbers_and_texts_are_as_long_as_they_say() {
    for code in [b'U', b'C', 0x8c] {
        assert_reason!(refused(archive([code, 4, b'a', b'b'])), Reason::PickleCut);
    }
    for code in [b'X', b'T', b'B', 0x8b] {
        // One more than there is, and what is negative to who reads it with a sign.
        for length in [4u32, 1 << 31, u32::MAX] {
            let bytes = [&[code], &length.to_le_bytes()[..], b"ab"].concat();
            assert_reason!(refused(archive(bytes)), Reason::PickleCut);
        }
    }
    for code in [0x8d, 0x8e, 0x95] {
        for length in [4u64, 1 << 31, 1 << 63, u64::MAX] {
            let bytes = [&[code], &length.to_le_bytes()[..], b"ab"].concat();
            assert_reason!(refused(archive(bytes)), Reason::PickleCut);
        }
    }
    // The data of an integer that are there, but are no number of anything.
    let long = [&b"\x8a\xff"[..], &[0x7f; 255]].concat();
    assert_reason!(refused(archive(long)), Reason::Pickle { at: 2, .. });
    let count = 32u32 << 20;
    let longest = [
        b"\x8b",
        &count.to_le_bytes()[..],
        &vec![0x7f; count as usize],
    ]
    .concat();
    assert_reason!(refused(archive(longest)), Reason::Pickle { at: 2, .. });
    // A pickle in a pickle's text is a text.
    let nested = text(std::str::from_utf8(b"cos\nsystem\n(X\x02\0\0\0idtR.").unwrap());
    let file = open_as(
        "x.bin",
        archive([b"}", &text("a")[..], &nested, b"s"].concat()),
    )
    .unwrap();
    assert!(file.directory.tensors.is_empty());
}

#[test]
fn references_that_are_no_storages_are_refused() {
    let sound = id();
    open_as("x.bin", archive(named(&tensor_in(&slices(&sound))))).unwrap();
    let other: &[(usize, Vec<u8>)] = &[
        (0, text("module")),
        (0, text("Storage")),
        (0, b"N".to_vec()),
        (1, text("FloatStorage")),
        (1, b"ctorch\nfloat32\n".to_vec()),
        (1, b"ccollections\nOrderedDict\n".to_vec()),
        (2, b"K\0".to_vec()),
        (2, b"N".to_vec()),
        (2, text(&"0".repeat(257))),
        (3, b"N".to_vec()),
        (3, b"K\0".to_vec()),
        (4, b"\x88".to_vec()),
        (4, text("6")),
        (4, integer(-1)),
        (4, integer(1 << 64)),
        (4, [b"G", &6f64.to_be_bytes()[..]].concat()),
    ];
    for (place, item) in other {
        let mut items = sound.to_vec();
        items[*place] = item.clone();
        let error = refused(archive(named(&tensor_in(&slices(&items)))));
        assert_reason!(error, Reason::Pickle { .. });
    }
    for count in [0, 1, 4] {
        let error = refused(archive(named(&tensor_in(&slices(&sound[..count])))));
        assert_reason!(error, Reason::Pickle { .. });
    }
    // The view of old files, and more than that.
    for more in [&b"K\0"[..], b"NN", b"(K\0K\0K\x02t"] {
        let mut items = sound.to_vec();
        items.push(more.to_vec());
        let error = refused(archive(named(&tensor_in(&slices(&items)))));
        assert_reason!(error, Reason::Pickle { .. });
    }
    // Names that lead somewhere else on a disk lead nowhere here.
    for key in [
        "",
        "1",
        "00",
        "0\0",
        "../x/data/0",
        "./0",
        "/etc/passwd",
        "0/",
        "\u{ff10}",
    ] {
        let mut items = sound.to_vec();
        items[2] = text(key);
        let error = refused(archive(named(&tensor_in(&slices(&items)))));
        assert_reason!(error, Reason::StorageMissing);
    }
    // One storage of two types, and of two lengths that are as many bytes.
    for (class, count) in [("DoubleStorage", 3), ("IntStorage", 6), ("ByteStorage", 24)] {
        let mut items = sound.to_vec();
        items[1] = format!("ctorch\n{class}\n").into_bytes();
        items[4] = integer(count);
        let (one, two) = (tensor_in(&slices(&sound)), tensor_in(&slices(&items)));
        let both = [b"}(", &text("a")[..], &one, &text("b"), &two, b"u"].concat();
        assert_reason!(refused(archive(both)), Reason::Pickle { .. });
    }
    // Bytes without a type of elements.
    for class in ["torch\nUntypedStorage", "torch.storage\nTypedStorage"] {
        let mut items = sound.to_vec();
        items[1] = format!("c{class}\n").into_bytes();
        items[4] = integer(24);
        let error = refused(archive(named(&tensor_in(&slices(&items)))));
        assert_reason!(error, Reason::Pickle { .. });
    }
}

/// A pickle that remembers something long and asks for it again and again.
fn again(long: &[u8], each: &[u8], count: usize) -> Vec<u8> {
    // `long` is remembered as 1 and left in a list of its own.
    [b"](](", long, b"q\x01e(", &each.repeat(count), b"ee"].concat()
}

#[test]
fn what_is_long_and_asked_for_often_is_looked_at_once() {
    let long = "0".repeat(16 << 20);
    let mut items = id().to_vec();
    items[2] = text(&long);
    let reference = [b"(", &items.concat()[..], b"t"].concat();
    let error = refused(archive(again(&reference, b"h\x01Q", 300_000)));
    assert_reason!(error, Reason::Pickle { .. });
    let reference = [b"(", &id().concat()[..], b"t"].concat();
    let error = refused(archive(again(&reference, b"h\x01Q", 300_000)));
    assert_eq!(error.kind(), Kind::Limit);
    // A text of any length among the values, and as a name.
    let file = archive(again(&text(&long), b"h\x01", 150_000));
    assert!(open_as("x.bin", file).unwrap().directory.tensors.is_empty());
    let error = refused(archive(again(&text(&long), b"}h\x01Ns", 100_000)));
    assert_reason!(error, Reason::NameTooLong { .. });
    let key = "k".repeat(4000);
    for value in [&b"N"[..], b"]", b"}", b")"] {
        let each = [b"h\x01", value].concat();
        let items = [
            b"](",
            &text(&key)[..],
            b"q\x01}(",
            &each.repeat(300_000),
            b"ue",
        ]
        .concat();
        assert_reason!(
            refused(archive(items)),
            Reason::TooMany { .. } | Reason::DuplicateKey { .. }
        );
    }
    let error = refused(archive(again(&text(&key), b"h\x01", 199_000)));
    assert_reason!(
        error,
        Reason::TooMany {
            what: "bytes of names and metadata",
            ..
        }
    );
}

#[test]
fn a_million_of_anything_is_refused_in_time() {
    for each in [
        &b"("[..],
        b"]",
        b"}",
        b")",
        b"N",
        b"\x94",
        b"\x85",
        b"(t",
        b"K\x01",
        b"]a",
        b"}}b",
        b"\x95\0\0\0\0\0\0\0\0",
    ] {
        let error = refused(archive([b"](}]", &each.repeat(1_000_000)[..]].concat()));
        assert_reason!(
            error,
            Reason::TooMany {
                what: "instructions in the pickle",
                limit: 1_000_000
            }
        );
    }
    // Places of the memo that are far apart.
    let mut places = b"N".to_vec();
    for place in 0..300_000u32 {
        places.extend([b"r", &(place.wrapping_mul(0x9e37_79b9)).to_le_bytes()[..]].concat());
    }
    places.extend(b"0");
    assert_reason!(
        refused(archive(places)),
        Reason::PickleInstruction { code: b'0', .. }
    );
    // Tensors that are nothing but a name.
    let view = tensor(6, 0, &[1; 8], &[1; 8]);
    let function = b"ctorch._utils\n_rebuild_tensor_v2\n";
    let arguments = &view[function.len()..view.len() - 1];
    let many = [
        b"](",
        &function[..],
        b"q\x01",
        arguments,
        b"q\x02R",
        &b"h\x01h\x02R".repeat(250_000),
        b"e",
    ]
    .concat();
    let error = refused(archive(many));
    assert_reason!(
        error,
        Reason::TooMany {
            what: "tensors",
            limit: 200_000
        }
    );
}

/// A file of torch before 1.6: the object, the list of keys, and what follows.
fn old(little: &[u8], object: &[u8], keys: &[u8], data: &[u8]) -> Vec<u8> {
    let system = [b"}(", &text("little_endian")[..], little, b"u"].concat();
    [
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
        &whole(2, &system)[..],
        &whole(2, object),
        &whole(2, keys),
        data,
    ]
    .concat()
}

fn storage(count: u64, bytes: usize) -> Vec<u8> {
    [&count.to_le_bytes()[..], &vec![1; bytes]].concat()
}

fn keys(keys: &[&str]) -> Vec<u8> {
    let keys: Vec<u8> = keys.iter().flat_map(|key| text(key)).collect();
    [b"](", &keys[..], b"e"].concat()
}

#[test]
fn old_files_hold_the_storages_that_they_name() {
    let one = named(&tensor(6, 0, &[2], &[1]));
    let object = one.as_slice();
    let sound = old(b"\x88", object, &keys(&["0"]), &storage(6, 24));
    let file = open_as("x.bin", &sound).unwrap();
    assert_eq!(file.tensor("a").unwrap().bytes().unwrap().len(), 8);
    for little in [&b"\x89"[..], b"N", b"K\x01"] {
        let big = old(little, object, &keys(&["0"]), &storage(6, 24));
        assert_reason!(refused(big), Reason::Pickle { .. });
    }
    for wrong in [
        keys(&["1"]),
        keys(&[""]),
        keys(&["0", "0"]),
        keys(&["0", "1"]),
        b"N".to_vec(),
        b"}".to_vec(),
        b"](K\0e".to_vec(),
    ] {
        let data = [storage(6, 24), storage(6, 24)].concat();
        let error = refused(old(b"\x88", object, &wrong, &data));
        assert_reason!(error, Reason::Pickle { .. });
    }
    assert_reason!(
        refused(old(b"\x88", object, &keys(&[]), &[])),
        Reason::Pickle { .. }
    );
    for count in [0, 5, 7, 1 << 32, 1 << 62, u64::MAX] {
        let error = refused(old(b"\x88", object, &keys(&["0"]), &storage(count, 24)));
        assert_reason!(error, Reason::StorageSize { expected: 6, found } if *found == count);
        assert_eq!(error.item(), Some("storage 0"));
    }
    // Both agree, and the file has less, or the product overflows.
    for (count, bytes) in [
        (6, 0),
        (6, 23),
        (1 << 40, 24),
        (1 << 62, 24),
        (u64::MAX, 24),
    ] {
        let object = named(&tensor(count.into(), 0, &[2], &[1]));
        let error = refused(old(b"\x88", &object, &keys(&["0"]), &storage(count, bytes)));
        assert_reason!(error, Reason::OutsideStorage { bytes: left } if *left == bytes as u64);
    }
    for length in 0..8 {
        let error = refused(old(b"\x88", object, &keys(&["0"]), &vec![6; length]));
        assert_reason!(error, Reason::StorageMissing);
    }
    for more in [1, 7, 8, 32] {
        let longer = [&sound[..], &vec![0; more as usize]].concat();
        assert_reason!(refused(longer), Reason::TrailingBytes { count } if *count == more);
    }
    // What runs code is refused in each of the pickles.
    let call = b"cos\nsystem\n(X\x02\0\0\0idtR";
    for (little, object, list) in [
        (&call[..], object, keys(&["0"])),
        (b"\x88", call, keys(&["0"])),
        (b"\x88", object, call.to_vec()),
    ] {
        let error = refused(old(little, object, &list, &storage(6, 24)));
        assert_reason!(error, Reason::PickleName { name } if name == "os.system");
    }
}
