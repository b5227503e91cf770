//! Files that `torch.save` wrote, read without running anything.
//!
//! Source: `torch/serialization.py` of PyTorch 2.15 (`_save`, `_legacy_save`, `_legacy_load`). A checkpoint
//! since 1.6 is a zip archive with `data.pkl` and one member for each storage; before it was five pickles
//! (magic number, protocol, system, object, keys) and the storages one behind the other.

use std::collections::HashMap;
use std::sync::Arc;

use super::safetensors::Safetensors;
use super::zip::{Archive, MEMORY_LIMIT, beyond_memory, first_name};
use super::{Container, Directory, Writer};
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

mod pickle;
mod state;
mod write;

pub use write::archive;

use pickle::{Object, Pickle, Value};
use state::Bytes;

/// Largest pickle.
const PICKLE_LIMIT: u64 = 64 << 20;

/// First pickle of an old file (`MAGIC_NUMBER`).
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;

/// Second pickle of an old file (`PROTOCOL_VERSION`).
const PROTOCOL: i128 = 1001;

/// A checkpoint since torch 1.6: a zip archive.
pub(super) struct TorchZip;

impl Container for TorchZip {
    fn name(&self) -> &'static str {
        "torch checkpoint (zip)"
    }

    fn detects(&self, head: &[u8], _length: u64) -> bool {
        const NAMES: &[&str] = &[
            "/data.pkl",
            "/version",
            "/byteorder",
            "/.format_version",
            "/.storage_alignment",
            "/.data/serialization_id",
        ];
        let name = first_name(head).map(String::from_utf8_lossy);
        name.is_some_and(|name| {
            NAMES.iter().any(|end| name.ends_with(end))
                || name
                    .rsplit_once("/data/")
                    .is_some_and(|(_, key)| key.bytes().all(|byte| byte.is_ascii_digit()))
        })
    }

    fn open(&self, input: Arc<Input>) -> Result<Directory> {
        let archive = Archive::read(input.clone())?;
        let mut pickles = archive.members.iter().filter_map(|member| {
            let root = member.name.strip_suffix("data.pkl")?;
            // Below one folder, as torch writes it.
            (root.find('/') == root.len().checked_sub(1) && root.len() > 1)
                .then_some((root, member))
        });
        let (Some((root, member)), None) = (pickles.next(), pickles.next()) else {
            return Err(Error::new(Reason::Zip {
                problem: "it holds no `data.pkl`, or more than one",
            }));
        };
        let mut budget = MEMORY_LIMIT;
        if let Some(order) = archive.member(&format!("{root}byteorder")) {
            let order = archive.bytes(order, &mut budget)?;
            if order != b"little" {
                let problem = "its bytes are not in little-endian order".to_owned();
                return Err(Error::new(Reason::FieldValue { problem }));
            }
        }
        if member.size > PICKLE_LIMIT {
            return Err(Error::new(Reason::HeaderTooLarge {
                bytes: member.size,
                limit: PICKLE_LIMIT,
            }));
        }
        let mut own = PICKLE_LIMIT.max(MEMORY_LIMIT);
        let text = archive.bytes(member, &mut own)?;
        let pickle = Pickle::read(&text, 0)?;
        if pickle.end != text.len() {
            return Err(Error::new(Reason::TrailingBytes {
                count: (text.len() - pickle.end) as u64,
            }));
        }
        let mut storages = Vec::with_capacity(pickle.storages.len());
        for storage in &pickle.storages {
            let name = format!("{root}data/{}", storage.key);
            let Some(member) = archive.member(&name) else {
                return Err(Error::new(Reason::StorageMissing).on(name));
            };
            check_size(storage, member.size).map_err(|e| e.on(name))?;
            storages.push(if member.deflated {
                Bytes::Memory(Arc::new(archive.bytes(member, &mut budget)?))
            } else {
                Bytes::File {
                    start: member.start,
                    length: member.size,
                }
            });
        }
        state::directory(&pickle, &storages, &input, &mut budget)
    }

    fn verify(&self, input: Arc<Input>, watch: &dyn Fn() -> Result<()>) -> Result<()> {
        Archive::read(input)?.verify(watch)
    }

    fn result(&self) -> Option<&'static dyn Writer> {
        Some(&Safetensors)
    }
}

/// Compares the length that a storage should have with the one that it has.
fn check_size(storage: &pickle::Storage<'_>, found: u64) -> Result<()> {
    match storage.count.checked_mul(storage.size()) {
        Some(expected) if expected == found => Ok(()),
        expected => Err(Error::new(Reason::StorageSize {
            expected: expected.unwrap_or(u64::MAX),
            found,
        })),
    }
}

/// A checkpoint before torch 1.6: pickles, then storages.
pub(super) struct LegacyPickle;

impl Container for LegacyPickle {
    fn name(&self) -> &'static str {
        "torch checkpoint (before 1.6)"
    }

    fn detects(&self, head: &[u8], _length: u64) -> bool {
        matches!(head, [0x80, 2..=5, ..])
    }

    fn open(&self, input: Arc<Input>) -> Result<Directory> {
        // The length of the pickles is known only when they are read: as much as it takes.
        let mut window = 1 << 20;
        loop {
            let length = input.len().min(window);
            let mut text = vec![0; length as usize];
            input.read_at(&mut text, 0)?;
            match legacy(&text, &input) {
                Err(error)
                    if matches!(error.reason(), Reason::PickleCut) && length < input.len() =>
                {
                    if window >= PICKLE_LIMIT {
                        return Err(Error::new(Reason::HeaderTooLarge {
                            bytes: input.len(),
                            limit: PICKLE_LIMIT,
                        }));
                    }
                    window *= 8;
                }
                result => return result,
            }
        }
    }

    fn result(&self) -> Option<&'static dyn Writer> {
        Some(&Safetensors)
    }
}

fn legacy(text: &[u8], input: &Arc<Input>) -> Result<Directory> {
    let wrong = |at: usize, problem: &str| {
        Err(Error::new(Reason::Pickle {
            at,
            problem: problem.to_owned(),
        }))
    };
    let magic = Pickle::read(text, 0)?;
    if !matches!(magic.result, Value::Int(MAGIC)) {
        return wrong(0, "it does not start with the magic number of torch");
    }
    let protocol = Pickle::read(text, magic.end)?;
    if !matches!(protocol.result, Value::Int(PROTOCOL)) {
        return wrong(magic.end, "another protocol than 1001");
    }
    let system = Pickle::read(text, protocol.end)?;
    let little = match system.object(system.result) {
        Some(Object::Dict(items)) => items.iter().any(|(key, value)| {
            system.text(*key) == Some("little_endian") && matches!(value, Value::Bool(true))
        }),
        _ => false,
    };
    if !little {
        return wrong(protocol.end, "its bytes are not in little-endian order");
    }
    let object = Pickle::read(text, system.end)?;
    let keys = Pickle::read(text, object.end)?;
    let Some(Object::List(list)) = keys.object(keys.result) else {
        return wrong(object.end, "the keys of the storages are no list");
    };
    let numbers: HashMap<&str, usize> = object
        .storages
        .iter()
        .enumerate()
        .map(|(number, storage)| (storage.key, number))
        .collect();
    let mut places = vec![None; object.storages.len()];
    let mut at = keys.end as u64;
    for key in list {
        let number = keys.text(*key).and_then(|key| numbers.get(key));
        let storage = number.and_then(|number| {
            let place = places.get_mut(*number)?;
            Some((object.storages.get(*number)?, place))
        });
        let Some((storage, found)) = storage else {
            return wrong(object.end, "a storage that nothing refers to");
        };
        let fail = |reason| Err(Error::new(reason).on(format!("storage {}", storage.key)));
        let mut count = [0; 8];
        let left = input.len() - at;
        if left < 8 {
            return fail(Reason::StorageMissing);
        }
        input.read_at(&mut count, at)?;
        if u64::from_le_bytes(count) != storage.count {
            return fail(Reason::StorageSize {
                expected: storage.count,
                found: u64::from_le_bytes(count),
            });
        }
        let length = storage.count.checked_mul(storage.size());
        let Some(length) = length.filter(|length| *length <= left - 8) else {
            return fail(Reason::OutsideStorage { bytes: left - 8 });
        };
        let place = Bytes::File {
            start: at + 8,
            length,
        };
        if found.replace(place).is_some() {
            return wrong(object.end, "a storage that is there twice");
        }
        at += 8 + length;
    }
    if at != input.len() {
        return Err(Error::new(Reason::TrailingBytes {
            count: input.len() - at,
        }));
    }
    let places: Option<Vec<Bytes>> = places.into_iter().collect();
    let Some(places) = places else {
        return wrong(object.end, "a storage that is not there");
    };
    state::directory(&object, &places, input, &mut MEMORY_LIMIT.clone())
}
