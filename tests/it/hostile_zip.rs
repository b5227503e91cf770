//! Archives that say one thing to one reader and another to the next, or more than they hold.
//!
//! The archives are of numpy: one array to a member is the least that can be wrong. Those of torch go through
//! the same reader.

use loratool::containers::TensorFile;
use loratool::{Error, Kind, Reason};

use crate::hostile_support::{Member, Zip, assert_reason, open_as, refused_as, zip};
use crate::support::fixture;

/// Fields of a local header and of an entry of the directory: place and size.
const FLAGS: [usize; 2] = [6, 8];
const METHOD: [usize; 2] = [8, 10];
const CHECKSUM: [usize; 2] = [14, 16];
const PACKED: [usize; 2] = [18, 20];
const SIZE: [usize; 2] = [22, 24];
const NAME_LENGTH: [usize; 2] = [26, 28];
const EXTRA_LENGTH: [usize; 2] = [28, 30];
const NAME: [usize; 2] = [30, 46];
/// Of an entry alone.
const COMMENT_LENGTH: usize = 32;
const DISK: usize = 34;
const HEADER: usize = 42;
/// Of the end.
const COUNTS: usize = 8;
const LENGTH: usize = 12;
const START: usize = 16;

fn array() -> Vec<u8> {
    let mut header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }".to_owned();
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\0".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(0..24);
    bytes
}

fn two() -> Vec<Member> {
    vec![
        Member::stored("a.npy", array()),
        Member::deflated("k.npy", array()),
    ]
}

fn open(bytes: impl AsRef<[u8]>) -> loratool::Result<TensorFile> {
    open_as("x.npz", bytes)
}

fn refused(bytes: impl AsRef<[u8]>) -> Error {
    refused_as("x.npz", bytes)
}

/// Opens an archive in which every array is the one of these tests.
fn sound(bytes: impl AsRef<[u8]>) -> TensorFile {
    let file = open(bytes).unwrap();
    for tensor in &file.directory.tensors {
        assert_eq!(*tensor.bytes().unwrap(), (0..24).collect::<Vec<u8>>());
    }
    file.verify().unwrap();
    file
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn add(bytes: &mut [u8], at: usize, by: i16) {
    let old = i16::from_le_bytes([bytes[at], bytes[at + 1]]);
    put(bytes, at, &old.wrapping_add(by).to_le_bytes());
}

#[test]
fn both_headers_of_a_member_agree_in_every_field() {
    let whole = zip(&two());
    sound(&whole.bytes);
    for member in 0..2 {
        for field in [
            FLAGS,
            METHOD,
            CHECKSUM,
            PACKED,
            SIZE,
            NAME_LENGTH,
            EXTRA_LENGTH,
            NAME,
        ] {
            let places = [
                whole.locals[member] + field[0],
                whole.entries[member] + field[1],
            ];
            for at in places {
                for by in [-1, 1, 2, 256] {
                    let mut changed = whole.bytes.clone();
                    add(&mut changed, at, by);
                    let error = refused(&changed);
                    // The first name says what the archive is.
                    let named = member == 0 && [NAME, NAME_LENGTH].contains(&field);
                    match error.reason() {
                        Reason::Zip { .. } | Reason::ZipMember { .. } => {}
                        Reason::Container { .. } if named => {}
                        _ => panic!("{at} {by}: {error:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn encrypted_members_and_other_methods_are_refused_by_name() {
    for flags in [1, 1 << 6 | 1, 1 << 13, 1 << 13 | 1] {
        let member = Member {
            flags,
            ..Member::stored("a.npy", array())
        };
        assert_reason!(
            refused(zip(&[member]).bytes),
            Reason::ZipMember { what: "encrypted" }
        );
    }
    for method in (0..=100).filter(|method| ![0, 8].contains(method)) {
        let member = Member {
            method,
            ..Member::stored("a.npy", array())
        };
        let error = refused(zip(&[member]).bytes);
        assert_reason!(error, Reason::ZipMember { what } if what.contains("deflate"));
        assert_eq!(error.item(), Some("a.npy"));
    }
}

#[test]
fn a_member_has_one_name() {
    let named = |name: &[u8]| Member::stored(name, array());
    // Python's reader ends a name at a zero.
    let error = refused(zip(&[named(b"a.npy\0b.npy")]).bytes);
    assert!(matches!(
        error.reason(),
        Reason::Zip { .. } | Reason::Container { .. }
    ));
    let error = refused(zip(&[named(b"a.npy"), named(b"a.npy\0.npy")]).bytes);
    assert_reason!(error, Reason::Zip { problem } if problem.contains("name"));
    // Code page 437 or UTF-8.
    let word = "\u{e9}.npy";
    let error = refused(zip(&[named(b"a.npy"), named(word.as_bytes())]).bytes);
    assert_reason!(error, Reason::Zip { problem } if problem.contains("name"));
    let mut said = named(word.as_bytes());
    said.flags = 1 << 11;
    assert!(sound(zip(&[said]).bytes).tensor("\u{e9}").is_some());
    let mut cut = named(b"\xc3.npy");
    cut.flags = 1 << 11;
    assert_reason!(refused(zip(&[cut]).bytes), Reason::Zip { .. });
    // The field of Info-ZIP in which another name follows (0x7075).
    let other = [b"\x75\x70\x0a\0\x01", &[0; 4][..], b"b.npy"].concat();
    for extra in [[other.clone(), Vec::new()], [Vec::new(), other]] {
        let member = Member {
            extra,
            ..named(b"a.npy")
        };
        let error = refused(zip(&[member]).bytes);
        assert_reason!(error, Reason::Zip { problem } if problem.contains("name"));
    }
    let error = refused(zip(&[named(b"a.npy"), named(b"A.NPY")]).bytes);
    assert_reason!(error, Reason::DuplicateMember);
    let long = [&[b'a'; 4093][..], b".npy"].concat();
    assert_reason!(
        refused(zip(&[named(&long)]).bytes),
        Reason::NameTooLong { .. } | Reason::Container { .. }
    );
    let error = refused(zip(&[named(b"a.npy"), named(&long)]).bytes);
    assert_reason!(error, Reason::NameTooLong { .. });
}

/// What a stored member of the array says again behind its data.
fn descriptor(signed: bool, wide: bool) -> Vec<u8> {
    let (checksum, size) = (crc32fast::hash(&array()), array().len() as u32);
    let mut bytes = if signed {
        b"PK\x07\x08".to_vec()
    } else {
        Vec::new()
    };
    bytes.extend(checksum.to_le_bytes());
    for _ in 0..2 {
        bytes.extend(size.to_le_bytes());
        bytes.extend(if wide { &[0; 4][..] } else { &[] });
    }
    bytes
}

#[test]
fn what_follows_the_data_of_a_member_is_said_and_agrees() {
    let followed = |behind: Vec<u8>| {
        let member = Member {
            flags: 1 << 3,
            behind,
            ..Member::stored("a.npy", array())
        };
        zip(&[member, Member::stored("b.npy", array())])
    };
    for signed in [false, true] {
        for wide in [false, true] {
            let behind = descriptor(signed, wide);
            let whole = followed(behind.clone());
            sound(&whole.bytes);
            // Torch says nothing before the data.
            let mut silent = whole.bytes.clone();
            put(&mut silent, CHECKSUM[0], &[0; 12]);
            sound(&silent);
            for at in 0..behind.len() {
                for bit in 0..8 {
                    let mut lying = behind.clone();
                    lying[at] ^= 1 << bit;
                    assert_reason!(refused(followed(lying).bytes), Reason::Zip { .. });
                }
            }
        }
    }
    for length in (0..40).filter(|length| ![12, 16, 20, 24].contains(length)) {
        let mut behind = descriptor(true, true);
        behind.resize(length, 0);
        assert_reason!(refused(followed(behind).bytes), Reason::Zip { .. });
    }
    // Behind a member that says all before its data nothing is left over, least of all another file.
    for behind in [vec![0], descriptor(true, true), zip(&two()).bytes] {
        let member = Member {
            behind,
            ..Member::stored("a.npy", array())
        };
        assert_reason!(refused(zip(&[member]).bytes), Reason::Zip { .. });
    }
}

#[test]
fn compressed_data_are_as_long_as_they_say() {
    let member = Member::deflated("a.npy", array());
    sound(zip(std::slice::from_ref(&member)).bytes);
    // Something behind the end of the stream, inside the member.
    for more in [&b"\0"[..], b"hidden", &member.data] {
        let mut longer = member.clone();
        longer.data.extend(more);
        assert_reason!(refused(zip(&[longer]).bytes), Reason::Zip { .. });
    }
    for length in 0..member.data.len() {
        let mut shorter = member.clone();
        shorter.data.truncate(length);
        assert_reason!(refused(zip(&[shorter]).bytes), Reason::Zip { .. });
    }
    for size in [0, 1, member.size - 1, member.size + 1, 2 * member.size] {
        let lying = Member {
            size,
            ..member.clone()
        };
        assert_reason!(refused(zip(&[lying]).bytes), Reason::Zip { .. });
    }
    let empty = Member {
        data: Vec::new(),
        size: 0,
        ..member.clone()
    };
    assert_reason!(refused(zip(&[empty]).bytes), Reason::Zip { .. });
}

#[test]
fn bombs_are_refused_before_they_are_unpacked() {
    // More than deflate can make of so little: nothing is allocated.
    let small = Member::deflated("a.npy", array());
    for size in [
        small.data.len() as u32 * 1032 + 1032,
        (128 << 20) - small.data.len() as u32,
    ] {
        let claim = Member {
            size,
            ..small.clone()
        };
        let error = refused(zip(&[claim]).bytes);
        assert_reason!(error, Reason::Zip { problem } if problem.contains("hold"));
    }
    for size in [(128 << 20) + 1, u32::MAX - 1] {
        let claim = Member {
            size,
            ..small.clone()
        };
        assert_eq!(refused(zip(&[claim]).bytes).kind(), Kind::Limit);
    }
    // As high a ratio as there is, once and twice: zeros in an archive, and such an archive in another.
    let zeros = Member::deflated("a.npy", vec![0; 64 << 20]);
    assert!(zeros.data.len() * 1000 < 64 << 20, "{}", zeros.data.len());
    let inner = zip(&[zeros]).bytes;
    assert_reason!(refused(&inner), Reason::Structure { .. });
    let outer = zip(&[Member::deflated("b.npy", &inner)]).bytes;
    assert!(outer.len() < 4096, "{}", outer.len());
    assert_reason!(refused(outer), Reason::Structure { .. });
    // Members that share one body, so that each costs an entry only.
    let whole = zip(&two());
    let mut shared = whole.bytes.clone();
    put(&mut shared, whole.entries[1] + HEADER, &[0; 4]);
    assert_reason!(refused(shared), Reason::Zip { .. });
    // A header that lies in the data of the member before it.
    let body = zip(&[Member::stored("b.npy", array())]);
    let quoting = Member::stored("a.npy", &body.bytes[..body.entries[0]]);
    let mut nested = zip(&[quoting, Member::stored("b.npy", array())]);
    let place = NAME[0] as u32 + 5;
    put(
        &mut nested.bytes,
        nested.entries[1] + HEADER,
        &place.to_le_bytes(),
    );
    assert_reason!(refused(nested.bytes), Reason::Zip { .. });
}

#[test]
fn a_directory_is_where_and_as_long_as_its_end_says() {
    let whole = zip(&two());
    let changed = |at: usize, value: &[u8]| {
        let mut changed = whole.bytes.clone();
        put(&mut changed, at, value);
        changed
    };
    for count in [0u16, 1, 3, 255, u16::MAX] {
        let both = [count.to_le_bytes(); 2].concat();
        let error = refused(changed(whole.end + COUNTS, &both));
        assert_reason!(error, Reason::Zip { .. });
        let one = refused(changed(whole.end + COUNTS, &count.to_le_bytes()));
        assert_reason!(one, Reason::Zip { .. });
    }
    for at in [LENGTH, START] {
        for by in [-46, -1, 1, 46] {
            let mut lying = whole.bytes.clone();
            add(&mut lying, whole.end + at, by);
            assert_reason!(refused(lying), Reason::Zip { .. });
        }
        let most = refused(changed(whole.end + at, &[0xff; 4]));
        assert_reason!(most, Reason::Zip { .. });
    }
    for at in [4, 6, 20] {
        assert_reason!(refused(changed(whole.end + at, &[1])), Reason::Zip { .. });
    }
    for entry in &whole.entries {
        for field in [NAME_LENGTH[1], EXTRA_LENGTH[1], COMMENT_LENGTH, DISK] {
            for length in [1u16, u16::MAX] {
                let error = refused(changed(entry + field, &length.to_le_bytes()));
                assert_reason!(error, Reason::Zip { .. });
            }
        }
        for place in [1, whole.entries[0] as u32, whole.end as u32, u32::MAX] {
            let error = refused(changed(entry + HEADER, &place.to_le_bytes()));
            assert_reason!(error, Reason::Zip { .. });
        }
    }
    // Before, behind and between.
    let second = whole.locals[1];
    for at in [0, second, whole.entries[0], whole.entries[1], whole.end] {
        for count in [1, 22, 30, 46] {
            let mut longer = whole.bytes.clone();
            longer.splice(at..at, vec![0; count]);
            let error = refused(longer);
            assert!(
                matches!(error.reason(), Reason::Zip { .. })
                    || at == 0 && error.kind() == Kind::Malformed,
                "{at}: {error:?}"
            );
        }
    }
    assert_reason!(
        refused([&whole.bytes[..], b"\0"].concat()),
        Reason::Zip { .. }
    );
    assert_reason!(
        refused([&whole.bytes[..], &whole.bytes].concat()),
        Reason::Zip { .. }
    );
}

fn long(values: &[u64]) -> Vec<u8> {
    let mut extra = vec![1, 0];
    extra.extend((8 * values.len() as u16).to_le_bytes());
    extra.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    extra
}

/// An archive of one stored array whose header and entry put their sizes into these extra fields.
fn widened(local: Vec<u8>, central: Vec<u8>) -> Zip {
    let mut whole = zip(&[Member {
        extra: [local, central],
        ..Member::stored("a.npy", array())
    }]);
    let (local, entry) = (whole.locals[0], whole.entries[0]);
    for at in [local + PACKED[0], entry + PACKED[1]] {
        put(&mut whole.bytes, at, &[0xff; 8]);
    }
    put(&mut whole.bytes, entry + HEADER, &[0xff; 4]);
    whole
}

#[test]
fn sizes_of_64_bits_are_read_and_compared() {
    let size = array().len() as u64;
    let (local, central) = (long(&[size, size]), long(&[size, size, 0]));
    sound(widened(local.clone(), central.clone()).bytes);
    // Other extra fields before it and behind it.
    let between = [b"FB\x03\0abc", &*central, b"\0\0\0\0\0"].concat();
    sound(widened(local.clone(), between).bytes);
    for lie in [0, size - 1, size + 1, 1 << 32, u64::MAX - 8, u64::MAX] {
        for (local, central) in [
            (long(&[lie, size]), central.clone()),
            (long(&[size, lie]), central.clone()),
            (local.clone(), long(&[lie, size, 0])),
            (local.clone(), long(&[size, lie, 0])),
            (local.clone(), long(&[lie, lie, 0])),
            (long(&[lie, lie]), long(&[lie, lie, 0])),
            (local.clone(), long(&[size, size, lie.max(1)])),
        ] {
            let error = refused(widened(local, central).bytes);
            assert_reason!(error, Reason::Zip { .. });
        }
    }
    for (local, central) in [
        (Vec::new(), central.clone()),
        (local.clone(), Vec::new()),
        (long(&[size]), central.clone()),
        (local.clone(), long(&[size, size])),
        (local.clone(), [&*central, &*central].concat()),
        ([&*local, &*local].concat(), central.clone()),
        (local[..19].to_vec(), central.clone()),
        (local.clone(), central[..27].to_vec()),
        (local.clone(), [b"FB\x40\0", &*central].concat()),
    ] {
        let error = refused(widened(local, central).bytes);
        assert_reason!(error, Reason::Zip { .. });
    }
}

/// The archive with an end of 64 bits that says these values: members twice, length and start of the directory.
fn with_long_end(whole: &Zip, values: impl Fn([u64; 4]) -> [u64; 4], short: bool) -> Vec<u8> {
    let start = whole.entries[0] as u64;
    let (length, count) = (whole.end as u64 - start, whole.entries.len() as u64);
    let mut bytes = whole.bytes[..whole.end].to_vec();
    bytes.extend(b"PK\x06\x06");
    bytes.extend(44u64.to_le_bytes());
    bytes.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for value in values([count, count, length, start]) {
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend(b"PK\x06\x07\0\0\0\0");
    bytes.extend((whole.end as u64).to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    let mut end = whole.bytes[whole.end..].to_vec();
    if short {
        end[COUNTS..START + 4].fill(0xff);
    }
    bytes.extend(end);
    bytes
}

#[test]
fn an_end_of_64_bits_is_read_and_compared() {
    let whole = zip(&two());
    let same = |values| values;
    for short in [false, true] {
        let sound_one = with_long_end(&whole, same, short);
        sound(&sound_one);
        for lie in [0, 1, 3, 1 << 20, u64::MAX - 100, u64::MAX] {
            for which in 0..4 {
                let lying = |mut values: [u64; 4]| {
                    values[which] = lie;
                    values
                };
                let error = refused(with_long_end(&whole, lying, short));
                assert_reason!(error, Reason::Zip { .. });
            }
            let counts = |[_, _, length, start]: [u64; 4]| [lie, lie, length, start];
            let error = refused(with_long_end(&whole, counts, short));
            assert!(
                matches!(error.reason(), Reason::Zip { .. } | Reason::TooMany { .. }),
                "{error:?}"
            );
        }
        // Signature, own length, disks; the locator's signature, disk and place.
        for at in [0, 4, 11, 16, 20, 56, 60, 64, 71] {
            let mut lying = sound_one.clone();
            lying[whole.end + at] ^= 1;
            assert_reason!(refused(lying), Reason::Zip { .. });
        }
    }
}

#[test]
fn an_archive_that_python_wrote_with_64_bits_everywhere_is_read() {
    for name in ["long", "forced", "streamed", "streamed_long", "compressed"] {
        let path = fixture("numpy").join(format!("{name}.npz"));
        let file = TensorFile::open(&path).unwrap();
        file.verify().unwrap();
        let names: Vec<&str> = file.directory.tensors.iter().map(|t| &*t.name).collect();
        assert_eq!(names, ["a", "b.c"], "{name}");
        // As fixtures/make_numpy.py counts.
        let a: Vec<f64> = (0..6).map(f64::from).collect();
        assert_eq!(file.tensor("a").unwrap().shape, [2, 3]);
        assert_eq!(file.tensor("a").unwrap().to_f64().unwrap(), a);
        let b: Vec<f64> = (0..12).map(f64::from).collect();
        assert_eq!(file.tensor("b.c").unwrap().shape, [3, 4]);
        assert_eq!(file.tensor("b.c").unwrap().to_f64().unwrap(), b);
    }
    let bytes = std::fs::read(fixture("numpy/long.npz")).unwrap();
    let has = |signature: &[u8]| bytes.windows(4).any(|window| window == signature);
    assert!(has(b"PK\x06\x06") && has(b"PK\x06\x07"));
}
