//! Files of `torch.save`: what they hold, and every way in which they are refused.

use std::path::Path;

use loratool::containers::TensorFile;
use loratool::ops::check::check;
use loratool::{Error, Kind, Reason};

use crate::hostile_support::{
    self, Member, Room, assert_printable, assert_reason, change_every_byte, open_as,
    within_a_second,
};
use crate::support::{fixture, merge, options};

const NAMES: &[&str] = &[
    "types",
    "new_types",
    "strides",
    "shared",
    "nested",
    "list",
    "module",
];

fn same(found: &Path, expected: &Path) {
    let (found, expected) = (
        TensorFile::open(found).unwrap(),
        TensorFile::open(expected).unwrap(),
    );
    let tensors = &expected.directory.tensors;
    assert_eq!(found.directory.tensors.len(), tensors.len());
    for tensor in tensors {
        let ours = found
            .tensor(&tensor.name)
            .unwrap_or_else(|| panic!("{}", tensor.name));
        assert_eq!(
            (ours.dtype, &ours.shape),
            (tensor.dtype, &tensor.shape),
            "{ours:?}"
        );
        assert_eq!(ours.bytes().unwrap(), tensor.bytes().unwrap(), "{ours:?}");
        let mut read = vec![0; ours.length as usize];
        ours.read(0, &mut read).unwrap();
        assert_eq!(read, *tensor.bytes().unwrap(), "{ours:?}");
    }
    found.verify().unwrap();
}

#[test]
fn every_file_of_torch_holds_what_torch_put_into_it() {
    let folder = fixture("torch");
    let mut count = 0;
    for name in NAMES {
        let expected = folder.join(format!("{name}.safetensors"));
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if file.ends_with(".pt") && file.starts_with(&format!("{name}.")) {
                same(&path, &expected);
                count += 1;
            }
        }
    }
    assert_eq!(count, 18);
}

#[test]
fn plain_values_become_metadata() {
    for name in ["nested.pt", "nested.legacy.pt", "nested.protocol4.pt"] {
        let file = TensorFile::open(fixture("torch").join(name)).unwrap();
        let metadata: Vec<(&str, &str)> = file
            .directory
            .metadata
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let expected = [
            ("lr", "0.5"),
            ("step", "12"),
            ("name", "x"),
            ("none", "None"),
            ("list.1", "3"),
        ];
        assert_eq!(metadata, expected, "{name}");
    }
}

#[test]
fn an_adapter_of_torch_merges_to_the_same_bytes_as_that_of_safetensors() {
    let room = Room::new();
    let (base, case) = (
        fixture("peft/bases/llama"),
        fixture("peft/cases/lora/adapter"),
    );
    let config = std::fs::read(case.join("adapter_config.json")).unwrap();
    room.write("adapter/adapter_config.json", config);
    let weights = std::fs::read(fixture("torch/adapter_model.bin")).unwrap();
    room.write("adapter/adapter_model.bin", weights);
    merge(&options(&base, &case, &room.path("one"))).unwrap();
    merge(&options(&base, &room.path("adapter"), &room.path("two"))).unwrap();
    let bytes = |name: &str| std::fs::read(room.path(name).join("model.safetensors")).unwrap();
    assert!(bytes("one") == bytes("two"));
}

/// The refusal of these bytes, within a second, with the file named.
pub(crate) fn refused(bytes: impl AsRef<[u8]>) -> Error {
    let room = Room::new();
    let path = room.write("x.bin", bytes);
    let owned = path.clone();
    let error = within_a_second(move || TensorFile::open(owned).map(drop)).unwrap_err();
    assert_eq!(error.file(), Some(path.as_path()), "{error:?}");
    assert_printable(&error);
    error
}

fn stored(name: &str, bytes: impl AsRef<[u8]>) -> Member {
    Member::stored(format!("x/{name}"), bytes)
}

fn deflated(name: &str, bytes: impl AsRef<[u8]>) -> Member {
    Member::deflated(format!("x/{name}"), bytes)
}

fn zip(members: &[Member]) -> Vec<u8> {
    hostile_support::zip(members).bytes
}

/// An archive with this pickle (without protocol and end) and a storage of 24 bytes.
pub(crate) fn archive(pickle: impl AsRef<[u8]>) -> Vec<u8> {
    let pickle = [b"\x80\x02", pickle.as_ref(), b"."].concat();
    zip(&[stored("data.pkl", pickle), stored("data/0", [1; 24])])
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [
        b"X",
        &(text.len() as u32).to_le_bytes()[..],
        text.as_bytes(),
    ]
    .concat()
}

pub(crate) fn integer(value: i128) -> Vec<u8> {
    [b"\x8a\x10", &value.to_le_bytes()[..]].concat()
}

pub(crate) fn integers(values: &[i128]) -> Vec<u8> {
    let items: Vec<u8> = values.iter().flat_map(|value| integer(*value)).collect();
    [b"(", &items[..], b"t"].concat()
}

/// A tensor of f32 in a storage of `count` elements.
pub(crate) fn tensor(count: i128, offset: i128, shape: &[i128], strides: &[i128]) -> Vec<u8> {
    let storage = [
        b"(",
        &text("storage")[..],
        b"ctorch\nFloatStorage\n",
        &text("0"),
        &text("cuda:0"),
        &integer(count),
        b"tQ",
    ]
    .concat();
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n(",
        &storage[..],
        &integer(offset),
        &integers(shape),
        &integers(strides),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

pub(crate) fn named(tensor: &[u8]) -> Vec<u8> {
    [b"}", &text("a")[..], tensor, b"s"].concat()
}

#[test]
fn the_archives_of_these_tests_are_sound() {
    let room = Room::new();
    let path = room.write("x.bin", archive(named(&tensor(6, 1, &[2, 2], &[2, 1]))));
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.tensor("a").unwrap().bytes().unwrap().len(), 16);
    file.verify().unwrap();
    let sound = named(&tensor(6, 1, &[2, 2], &[1, 2]));
    let pickle = [b"\x80\x02", &sound[..], b"."].concat();
    let members = [
        deflated("data.pkl", pickle),
        deflated("data/0", [1; 24]),
        stored("byteorder", "little"),
    ];
    TensorFile::open(room.write("y.bin", zip(&members))).unwrap();
}

#[test]
fn names_of_other_things_are_refused_and_told() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "exec"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("pytorch_lightning.callbacks", "ModelCheckpoint"),
        ("torch", "load"),
        ("torch.FloatStorage", "x"),
        ("collections", "OrderedDict.fromkeys"),
        ("\u{1b}[2J", "\u{202e}"),
    ] {
        let by_line = format!("c{module}\n{name}\n");
        let by_stack = [&text(module)[..], &text(name), b"\x93"].concat();
        for pickle in [by_line.as_bytes(), &by_stack] {
            let call = [pickle, &b"("[..], &text("id"), b"tR"].concat();
            let expected = format!("{module}.{name}");
            assert_reason!(refused(archive(&call)), Reason::PickleName { name } if *name == expected);
            let alone = [b"\x80\x02", &call[..], b"."].concat();
            assert_reason!(refused(alone), Reason::PickleName { name } if *name == expected);
        }
    }
}

#[test]
fn every_instruction_that_is_not_listed_is_refused() {
    let listed =
        b".(NKMJGXTUCB}])taesuqrhjcQRb\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94\x95";
    let mut count = 0;
    for code in 0..=255u8 {
        if code == 0x80 || !listed.contains(&code) {
            let error = refused(archive([code]));
            assert_reason!(error, Reason::PickleInstruction { code: found, at: 2 } if *found == code);
            count += 1;
        } else if let Err(error) = open_as("x.bin", archive([code])) {
            // Known, and it lacks something else.
            assert_reason!(error, Reason::Pickle { .. } | Reason::PickleCut);
        }
    }
    assert!(count > 210, "{count}");
}

#[test]
fn pickles_that_make_no_sense_are_refused() {
    for pickle in [
        &b""[..],
        b"t",
        b"s",
        b"u",
        b"a",
        b"e",
        b"R",
        b"Q",
        b"b",
        b"\x93",
        b"q\0",
        b"h\0",
        b"\x85",
        b"(",
        b"NN",
        b"}(Nu",
        b"Na",
        b"(NN\x86",
        b"]N)R",
        b")R",
        b"N)R",
        b"NQ",
        b")Q",
        b"}}b}b)b",
        b"ccollections\nOrderedDict\n(NtR",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ctorch\nFloatStorage\n)R",
        b"cnumpy\ndtype\n(U\x02O8\x89\x88tR",
        b"cnumpy\ndtype\n(U\x02f8\x89\x88tR(K\x03U\x01>tb",
        b"cnumpy\ndtype\n(U\x02f8\x89\x88tRNb",
        b"c_codecs\nencode\n(U\x01xU\x05utf-8tR",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02f8\x89\x88tRC\x07sevenbytR",
        b"cnumpy.core.multiarray\nscalar\n(NC\x08eight_ontR",
        b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)R",
        b"X\x01\0\0\0\xff",
        b"\x8a\x11AAAAAAAAAAAAAAAAA",
    ] {
        assert_reason!(refused(archive(pickle)), Reason::Pickle { .. });
    }
    for pickle in [
        &b"X\xff\xff\xff\xff"[..],
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x8e\0\0\0\0\0\0\0\x80",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x8b\xff\xff\xff\xff",
        b"G",
        b"M",
        b"cos",
    ] {
        assert_reason!(refused(archive(pickle)), Reason::PickleCut);
    }
}

#[test]
fn bombs_are_refused_in_time() {
    // A list of two of a list of two of …
    let mut bomb = b"](]q\0".to_vec();
    for level in 1..=60u8 {
        bomb.extend([
            b']',
            b'q',
            level,
            b'(',
            b'h',
            level - 1,
            b'h',
            level - 1,
            b'e',
        ]);
    }
    bomb.push(b'e');
    let error = refused(archive(&bomb));
    assert_reason!(error, Reason::TooMany { .. } | Reason::TooDeep { .. });
    // A list in itself.
    assert_reason!(
        refused(archive(b"]q\0(h\0h\0e")),
        Reason::TooMany { .. } | Reason::TooDeep { .. }
    );
    let deep = [vec![b']'; 100_000], vec![b'a'; 99_999]].concat();
    assert_reason!(refused(archive(deep)), Reason::TooDeep { limit: 64 });
    let long = [vec![b'N'; 1_000_001], vec![b'a'; 10]].concat();
    assert_reason!(
        refused(archive(long)),
        Reason::TooMany {
            limit: 1_000_000,
            ..
        }
    );
    let wide = [b"](".to_vec(), vec![b'N'; 300_000], vec![b'e']].concat();
    assert_reason!(
        refused(archive(wide)),
        Reason::TooMany { limit: 200_000, .. }
    );
}

#[test]
fn tensors_stay_within_their_storages() {
    const HUGE: i128 = i64::MAX as i128;
    type Case<'a> = (i128, i128, &'a [i128], &'a [i128]);
    let outside: &[Case<'_>] = &[
        (6, 0, &[7], &[1]),
        (6, 6, &[1], &[1]),
        (6, 3, &[2, 2], &[2, 1]),
        (6, 0, &[2], &[6]),
        (6, HUGE, &[1], &[1]),
        (6, 0, &[2], &[HUGE]),
        (6, 1, &[3, 3], &[HUGE, HUGE]),
        (6, u64::MAX as i128, &[], &[]),
    ];
    for (count, offset, shape, strides) in outside {
        let error = refused(archive(named(&tensor(*count, *offset, shape, strides))));
        assert_reason!(error, Reason::OutsideStorage { bytes: 24 });
        assert_eq!(error.item(), Some("a"));
    }
    for shape in [[HUGE, HUGE], [1 << 40, 1 << 40], [0, HUGE]] {
        let error = refused(archive(named(&tensor(6, 0, &shape, &[0, 0]))));
        assert_reason!(error, Reason::ShapeOverflow { .. });
    }
    let expanded = refused(archive(named(&tensor(6, 0, &[1 << 30, 1 << 20], &[0, 0]))));
    assert_eq!(expanded.kind(), Kind::Limit);
    let wrong: &[Case<'_>] = &[
        (6, -1, &[1], &[1]),
        (6, 0, &[-1], &[1]),
        (6, 5, &[2], &[-1]),
        (6, 0, &[1], &[]),
        (-6, 0, &[1], &[1]),
        (6, i128::MAX, &[1], &[1]),
    ];
    for (count, offset, shape, strides) in wrong {
        let error = refused(archive(named(&tensor(*count, *offset, shape, strides))));
        assert_reason!(error, Reason::Pickle { .. });
    }
    for count in [0, 5, 7, HUGE] {
        let error = refused(archive(named(&tensor(count, 0, &[1], &[1]))));
        assert_reason!(error, Reason::StorageSize { .. });
    }
    let nine = [1; 9];
    assert_reason!(
        refused(archive(named(&tensor(6, 0, &nine, &nine)))),
        Reason::TooMany {
            what: "dimensions",
            ..
        }
    );
    // A stride of a dimension of one says nothing.
    let room = Room::new();
    let odd = archive(named(&tensor(6, 0, &[2, 1, 2], &[1, u64::MAX as i128, 2])));
    TensorFile::open(room.write("x.bin", odd)).unwrap();
}

#[test]
fn two_tensors_of_one_name_are_refused() {
    let one = tensor(6, 0, &[1], &[1]);
    let twice = [b"}(", &text("a")[..], &one, &text("a"), &one, b"u"].concat();
    assert_reason!(refused(archive(&twice)), Reason::DuplicateKey { .. });
    let inner = [b"}", &text("b")[..], &one, b"s"].concat();
    let dotted = [b"}(", &text("a")[..], &inner, &text("a.b"), &one, b"u"].concat();
    assert_reason!(refused(archive(&dotted)), Reason::DuplicateKey { .. });
    assert_reason!(
        refused(archive([b"}", &text("")[..], b"Ns"].concat())),
        Reason::EmptyName
    );
}

#[test]
fn archives_that_can_be_read_in_two_ways_are_refused() {
    let pickle = [b"\x80\x02", &named(&tensor(6, 0, &[6], &[1]))[..], b"."].concat();
    let data = || stored("data.pkl", &pickle);
    let storage = || stored("data/0", [1; 24]);
    let duplicate = zip(&[data(), storage(), stored("data/0", [2; 24])]);
    assert_reason!(refused(duplicate), Reason::DuplicateMember);
    let letters = zip(&[data(), storage(), stored("DATA/0", [2; 24])]);
    assert_reason!(refused(letters), Reason::DuplicateMember);
    let two = zip(&[data(), storage(), Member::stored("y/data.pkl", &pickle)]);
    assert_reason!(refused(two), Reason::Zip { .. });
    assert_reason!(refused(zip(&[data()])), Reason::StorageMissing);
    assert_reason!(refused(zip(&[stored("version", "3")])), Reason::Zip { .. });
    let big = zip(&[data(), storage(), stored("byteorder", "big")]);
    assert_reason!(refused(big), Reason::FieldValue { .. });
    let sound = zip(&[data(), storage()]);
    for (at, byte) in [(6, 1), (8, 8), (14, 1), (18, 1), (22, 1), (30, b'y')] {
        let mut changed = sound.clone();
        changed[at] ^= byte;
        assert!(matches!(
            refused(changed).kind(),
            Kind::Malformed | Kind::Unsupported
        ));
    }
    assert_reason!(refused([&sound[..], b"x"].concat()), Reason::Zip { .. });
    let mut commented = [&sound[..], b"x"].concat();
    let end = sound.len() - 2;
    commented[end] = 1;
    assert_reason!(refused(commented), Reason::Zip { .. });
    // More in the pickle than the pickle.
    let long = zip(&[stored("data.pkl", [&pickle[..], b"."].concat()), storage()]);
    assert_reason!(refused(long), Reason::TrailingBytes { count: 1 });
}

#[test]
fn checksums_and_sizes_are_compared() {
    let pickle = [b"\x80\x02", &named(&tensor(6, 0, &[6], &[1]))[..], b"."].concat();
    let lying = |member| Member {
        checksum: 1,
        ..member
    };
    let wrong = lying(stored("data.pkl", &pickle));
    assert_reason!(
        refused(zip(&[wrong, stored("data/0", [1; 24])])),
        Reason::Checksum
    );
    let packed = lying(deflated("data/0", [1; 24]));
    assert_reason!(
        refused(zip(&[stored("data.pkl", &pickle), packed])),
        Reason::Checksum
    );
    // The data that stay in the file are compared by `check`, and before a merge.
    let room = Room::new();
    let wrong = lying(stored("data/0", [1; 24]));
    let path = room.write("x.bin", zip(&[stored("data.pkl", &pickle), wrong]));
    let file = TensorFile::open(&path).unwrap();
    let error = file.verify().unwrap_err();
    assert_reason!(error, Reason::Checksum);
    assert_eq!(error.item(), Some("x/data/0"));
    assert_eq!(
        check(&path, &Default::default()).exit_code,
        Kind::Malformed.exit_code()
    );
    // Compressed members that are larger or smaller than they claim, and bombs.
    for claim in [0, 23, 25, 1 << 26] {
        let packed = Member {
            size: claim,
            ..deflated("data/0", [1; 24])
        };
        let error = refused(zip(&[stored("data.pkl", &pickle), packed]));
        assert_reason!(error, Reason::StorageSize { .. });
    }
    let bomb = deflated("data.pkl", vec![b'N'; 130 << 20]);
    assert_eq!(refused(zip(&[bomb])).kind(), Kind::Limit);
}

#[test]
fn a_file_of_torch_cut_at_any_length_is_refused() {
    let room = Room::new();
    for name in [
        "list.pt",
        "strides.deflated.pt",
        "nested.protocol4.pt",
        "types.legacy.pt",
        "nested.legacy.pt",
    ] {
        let whole = std::fs::read(fixture("torch").join(name)).unwrap();
        let path = room.write("x.pt", &whole);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for length in (0..whole.len()).rev() {
            file.set_len(length as u64).unwrap();
            let error = match TensorFile::open(&path) {
                Err(error) => error,
                Ok(_) => panic!("{name} cut at {length} was accepted"),
            };
            assert!(
                matches!(error.kind(), Kind::Malformed | Kind::Unsupported),
                "{length}: {error:?}"
            );
            // Only where the first name is cut is it no checkpoint yet.
            assert!(
                error.kind() == Kind::Malformed || length < 64,
                "{length}: {error:?}"
            );
            assert_printable(&error);
        }
    }
}

#[test]
fn a_changed_byte_of_an_archive_is_refused_or_changes_nothing() {
    for name in ["list.pt", "strides.deflated.pt"] {
        let whole = std::fs::read(fixture("torch").join(name)).unwrap();
        let [refused, same, other] = change_every_byte(&whole, |_, _| false);
        // Versions, times, attributes and padding say nothing about the tensors.
        assert!(refused > same && same > 0, "{refused}, {same}");
        assert_eq!(other, 0);
    }
}

#[test]
fn a_changed_byte_of_an_old_file_is_refused_or_says_as_much_as_there_is() {
    // Without checksums a changed number is another place, type, shape or value; each tensor lies within the
    // file all the same.
    for name in ["strides.legacy.pt", "nested.legacy.pt"] {
        let whole = std::fs::read(fixture("torch").join(name)).unwrap();
        let [refused, _, other] = change_every_byte(&whole, |_, _| true);
        assert!(refused > other && other > 0, "{refused}, {other}");
    }
}

#[test]
fn old_files_of_torch_state_their_storages_once() {
    let sound = std::fs::read(fixture("torch/list.legacy.pt")).unwrap();
    assert_reason!(
        refused([&sound[..], b"x"].concat()),
        Reason::TrailingBytes { count: 1 }
    );
    let magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.";
    assert!(sound.starts_with(magic));
    assert_reason!(refused(&magic[..]), Reason::PickleCut);
    assert_reason!(refused(b"\x80\x02}."), Reason::Pickle { .. });
    let other = [&magic[..], b"\x80\x02M\xe8\x03."].concat();
    assert_reason!(refused(other), Reason::Pickle { .. });
    // The count before the last storage.
    let mut lying = sound.clone();
    let at = sound.len() - 16 - 8;
    assert_eq!(lying[at], 4);
    lying[at] = 5;
    assert_reason!(
        refused(lying),
        Reason::StorageSize {
            expected: 4,
            found: 5
        }
    );
}
