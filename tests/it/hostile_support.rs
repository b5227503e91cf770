//! Files made by hand: right, wrong, and nearly right.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use loratool::containers::TensorFile;
use loratool::tensor::DType;
use loratool::{Error, Kind};

/// Asserts the reason of an error by pattern, and that its exit code is one of the documented ones.
macro_rules! assert_reason {
    ($error:expr, $pattern:pat $(if $guard:expr)?) => {{
        let error: &loratool::Error = &$error;
        assert!(
            matches!(error.reason(), $pattern $(if $guard)?),
            "expected {}, got {:?}: {error:?}",
            stringify!($pattern $(if $guard)?),
            error.reason(),
        );
        let code = error.kind().exit_code();
        assert!((1..=99).contains(&code), "exit code {code}: {error:?}");
    }};
}
pub(crate) use assert_reason;

/// A folder of its own for one test.
pub(crate) struct Room(tempfile::TempDir);

impl Room {
    pub(crate) fn new() -> Self {
        Room(tempfile::tempdir().unwrap())
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file, and the folders above it.
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Names of everything at the top, hidden ones too.
    pub(crate) fn names(&self) -> Vec<String> {
        names_in(self.root())
    }
}

/// Names of everything in a folder, hidden ones too.
pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Every file below a path with its bytes, or the one file.
pub(crate) fn tree(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    if !path.is_dir() {
        return vec![(PathBuf::new(), std::fs::read(path).unwrap())];
    }
    let mut all = Vec::new();
    for name in names_in(path) {
        for (below, bytes) in tree(&path.join(&name)) {
            all.push((Path::new(&name).join(below), bytes));
        }
    }
    all
}

/// A safetensors file of any header text and any data.
pub(crate) fn file_of(header: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data.as_ref()].concat()
}

/// A sound safetensors file of f32 tensors whose values are small and all different.
pub(crate) fn tensors(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (name, shape) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            data.extend_from_slice(&(data.len() as f32 / 1024.0).to_le_bytes());
        }
        entries.push(format!(
            "{}:{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{start},{}]}}",
            serde_json::Value::from(*name),
            data.len(),
        ));
    }
    file_of(format!("{{{}}}", entries.join(",")), data)
}

/// The factors of a LoRA of rank 2 on the module `m`.
pub(crate) fn small_adapter() -> Vec<u8> {
    tensors(&[
        ("base_model.model.m.lora_A.weight", &[2, 3]),
        ("base_model.model.m.lora_B.weight", &[4, 2]),
    ])
}

/// A base that [`small_adapter`] fits.
pub(crate) fn small_base() -> Vec<u8> {
    tensors(&[("m.weight", &[4, 3]), ("other.weight", &[2])])
}

/// A configuration that [`small_adapter`] fits.
pub(crate) const SMALL_CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#;

/// Runs something that must answer within a second, in a thread, so that a hang fails the test.
pub(crate) fn within_a_second<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    // Unoptimised code gets more of them, and a machine that is busy with something else patience.
    const LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 3 } else { 1 });
    const PATIENCE: Duration = Duration::from_secs(20);
    let (sender, receiver) = channel();
    let start = Instant::now();
    let thread = std::thread::spawn(move || {
        let before = cpu_time();
        let value = work();
        // The receiver is gone only when the test has failed already.
        let _ = sender.send((value, cpu_time().saturating_sub(before)));
    });
    match receiver.recv_timeout(PATIENCE) {
        Ok((value, spent)) => {
            assert!(spent <= LIMIT, "it took {spent:?}");
            value
        }
        Err(RecvTimeoutError::Timeout) => panic!("no answer after {:?}", start.elapsed()),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("a thread that ends in peace has sent its value"),
        },
    }
}

/// Processor time of this thread: what a test may spend, however busy the machine is.
pub(crate) fn cpu_time() -> Duration {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(spent.tv_sec as u64, spent.tv_nsec as u32)
}

/// Asserts that nothing in an error could drive a terminal, in any of its texts.
pub(crate) fn assert_printable(error: &Error) {
    for text in [error.to_string(), format!("{error:?}")] {
        assert_clean(&text);
    }
}

/// Asserts that a text holds no control character (line breaks of a list excepted), no
/// bidirectional mark and no invisible character.
pub(crate) fn assert_clean(text: &str) {
    for character in text.chars() {
        let foul = character.is_control() && character != '\n'
            || matches!(character, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' | '\u{ad}');
        assert!(!foul, "{character:?} in {text:?}");
    }
}

/// A member of an archive, and what both of its headers say.
#[derive(Clone, Default)]
pub(crate) struct Member {
    pub(crate) name: Vec<u8>,
    /// The bytes as they lie in the file.
    pub(crate) data: Vec<u8>,
    pub(crate) flags: u16,
    pub(crate) method: u16,
    pub(crate) checksum: u32,
    pub(crate) size: u32,
    /// Extra fields of the local header, and of that in the directory.
    pub(crate) extra: [Vec<u8>; 2],
    /// What follows the data.
    pub(crate) behind: Vec<u8>,
}

impl Member {
    pub(crate) fn stored(name: impl AsRef<[u8]>, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        Member {
            name: name.as_ref().to_vec(),
            data: bytes.to_vec(),
            checksum: crc32fast::hash(bytes),
            size: bytes.len() as u32,
            ..Default::default()
        }
    }

    pub(crate) fn deflated(name: impl AsRef<[u8]>, bytes: impl AsRef<[u8]>) -> Self {
        Member {
            data: miniz_oxide::deflate::compress_to_vec(bytes.as_ref(), 6),
            method: 8,
            ..Member::stored(name, bytes)
        }
    }
}

/// An archive, and where its headers start.
#[derive(Clone)]
pub(crate) struct Zip {
    pub(crate) bytes: Vec<u8>,
    pub(crate) locals: Vec<usize>,
    pub(crate) entries: Vec<usize>,
    pub(crate) end: usize,
}

/// A zip archive, written here from the specification (PKWARE APPNOTE, 4.3).
pub(crate) fn zip(members: &[Member]) -> Zip {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    let (mut locals, mut entries) = (Vec::new(), Vec::new());
    for member in members {
        let start = bytes.len();
        let header = |extra: &[u8]| {
            let mut header = vec![20, 0];
            header.extend(member.flags.to_le_bytes());
            header.extend(member.method.to_le_bytes());
            header.extend([0; 4]);
            header.extend(member.checksum.to_le_bytes());
            header.extend((member.data.len() as u32).to_le_bytes());
            header.extend(member.size.to_le_bytes());
            header.extend((member.name.len() as u16).to_le_bytes());
            header.extend((extra.len() as u16).to_le_bytes());
            header
        };
        let [local, central] = &member.extra;
        locals.push(start);
        for part in [b"PK\x03\x04", &*header(local), &member.name, local] {
            bytes.extend(part);
        }
        bytes.extend(&member.data);
        bytes.extend(&member.behind);
        entries.push(directory.len());
        for part in [b"PK\x01\x02\x14\0", &*header(central), &[0; 10]] {
            directory.extend(part);
        }
        directory.extend((start as u32).to_le_bytes());
        directory.extend(&member.name);
        directory.extend(central);
    }
    let start = bytes.len();
    bytes.extend(&directory);
    let end = bytes.len();
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend([(members.len() as u16).to_le_bytes(); 2].concat());
    bytes.extend((directory.len() as u32).to_le_bytes());
    bytes.extend((start as u32).to_le_bytes());
    bytes.extend([0, 0]);
    Zip {
        bytes,
        locals,
        entries: entries.into_iter().map(|entry| start + entry).collect(),
        end,
    }
}

/// Opens bytes as a file of a name, within a second.
pub(crate) fn open_as(name: &str, bytes: impl AsRef<[u8]>) -> loratool::Result<TensorFile> {
    let room = Room::new();
    let path = room.write(name, bytes);
    // The file stays open and mapped after its folder is gone.
    within_a_second(move || TensorFile::open(path))
}

/// The error that opening bytes gives: it names the file, and is fit for a terminal.
pub(crate) fn refused_as(name: &str, bytes: impl AsRef<[u8]>) -> Error {
    let error = match open_as(name, bytes) {
        Err(error) => error,
        Ok(file) => panic!("accepted: {:?}", file.directory),
    };
    assert!(error.file().is_some(), "{error:?}");
    assert_printable(&error);
    error
}

/// A file that is written again and again, in place: anew would cost a flush each time.
pub(crate) struct Slot(pub(crate) PathBuf, File);

impl Slot {
    pub(crate) fn new(room: &Room, name: &str) -> Self {
        let path = room.write(name, "");
        let file = File::options().write(true).open(&path).unwrap();
        Slot(path, file)
    }

    pub(crate) fn put(&self, bytes: &[u8]) {
        self.cut(bytes.len());
        self.change(0, bytes);
    }

    pub(crate) fn cut(&self, length: usize) {
        self.1.set_len(length as u64).unwrap();
    }

    pub(crate) fn change(&self, at: usize, bytes: &[u8]) {
        let mut file = &self.1;
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(bytes).unwrap();
    }
}

/// What a file says: name, type, shape and bytes of each tensor, and the metadata.
#[derive(Debug, PartialEq)]
pub(crate) struct Said {
    tensors: Vec<(String, DType, Vec<usize>, Vec<u8>)>,
    metadata: Vec<(String, String)>,
}

/// Opens a file of tensors, and compares it with the checksums that it states.
pub(crate) fn said(path: &Path) -> loratool::Result<Said> {
    let file = TensorFile::open(path)?;
    file.verify()?;
    let tensors = file.directory.tensors.iter().map(|tensor| {
        let bytes = tensor.bytes().unwrap().into_owned();
        assert_eq!(bytes.len() as u64, tensor.length, "{tensor:?}");
        let bits = tensor.elements() * tensor.dtype.bitsize();
        assert_eq!(bits, 8 * bytes.len(), "{tensor:?}");
        let shape = tensor.shape.clone();
        (tensor.name.clone(), tensor.dtype, shape, bytes)
    });
    Ok(Said {
        tensors: tensors.collect(),
        metadata: file.directory.metadata.clone(),
    })
}

/// One thing that two files of the same kind say differently; of tensors and metadata the number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Difference {
    Name(usize),
    Type(usize),
    Shape(usize),
    Bytes(usize),
    Key(usize),
    Value(usize),
    /// More or fewer tensors, or metadata.
    Count,
}

impl Said {
    fn differences(&self, other: &Said) -> Vec<Difference> {
        let mut found = Vec::new();
        let mut add = |same: bool, difference| {
            if !same {
                found.push(difference);
            }
        };
        let (ours, theirs) = (&self.tensors, &other.tensors);
        add(ours.len() == theirs.len(), Difference::Count);
        for (number, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            add(ours.0 == theirs.0, Difference::Name(number));
            add(ours.1 == theirs.1, Difference::Type(number));
            add(ours.2 == theirs.2, Difference::Shape(number));
            add(ours.3 == theirs.3, Difference::Bytes(number));
        }
        let (ours, theirs) = (&self.metadata, &other.metadata);
        add(ours.len() == theirs.len(), Difference::Count);
        for (number, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            add(ours.0 == theirs.0, Difference::Key(number));
            add(ours.1 == theirs.1, Difference::Value(number));
        }
        found
    }
}

/// Changes every byte of a sound file in several ways. Each file is refused, or says the same, or says
/// something else that `explains` finds in the byte at this place. Returns how many were refused, how many
/// said the same, and how many something else.
pub(crate) fn change_every_byte(
    whole: &[u8],
    explains: impl Fn(usize, Difference) -> bool,
) -> [usize; 3] {
    let room = Room::new();
    let slot = Slot::new(&room, "x");
    slot.put(whole);
    let before = said(&slot.0).unwrap();
    let mut counts = [0; 3];
    for (at, old) in whole.iter().enumerate() {
        let flipped = (0..8).map(|bit| old ^ 1 << bit);
        for value in flipped.chain([0, 0xff]).filter(|value| value != old) {
            slot.change(at, &[value]);
            match said(&slot.0) {
                Err(error) => {
                    assert_printable(&error);
                    assert_eq!(error.file(), Some(&*slot.0), "{error:?}");
                    let kind = error.kind();
                    assert!(
                        matches!(kind, Kind::Malformed | Kind::Unsupported | Kind::Limit),
                        "{at}, {value}: {error:?}"
                    );
                    counts[0] += 1;
                }
                Ok(after) => {
                    let differences = before.differences(&after);
                    for difference in &differences {
                        assert!(
                            explains(at, *difference),
                            "{at}, {value}: {difference:?} in {after:?}"
                        );
                    }
                    counts[1 + usize::from(!differences.is_empty())] += 1;
                }
            }
        }
        slot.change(at, &[*old]);
    }
    counts
}
