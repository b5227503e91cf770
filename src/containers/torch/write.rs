//! What `torch.save` writes of a dictionary of tensors, with the same bytes every time.
//!
//! Source: `torch/serialization.py` of PyTorch 2.15 (`_save`) and `torch/_utils.py` (`_rebuild_tensor_v2`). The pickle
//! has the instructions of torch's own, but for its memo, which nothing here refers to.

use super::pickle::storage_class;
use crate::containers::archive::Archive;
use crate::containers::{DIMENSION_LIMIT, Entry, NAME_LIMIT};
use crate::error::{Error, Reason, Result};

/// Where torch lets the data of a tensor start (`storage_alignment`).
const ALIGNMENT: usize = 64;

/// An archive of these tensors, each with a storage of its own.
///
/// # Errors
/// [`Reason::Stored`] for a type that torch has no storage for; [`Reason::NameTooLong`], [`Reason::TooMany`].
pub fn archive(tensors: &[Entry<'_>]) -> Result<Archive> {
    let mut archive = Archive::new(ALIGNMENT);
    archive.add("archive/data.pkl".to_owned(), pickle(tensors)?, None);
    archive.add("archive/byteorder".to_owned(), b"little".to_vec(), None);
    for index in 0..tensors.len() {
        archive.add(format!("archive/data/{index}"), Vec::new(), Some(index));
    }
    archive.add("archive/version".to_owned(), b"3\n".to_vec(), None);
    Ok(archive)
}

fn pickle(tensors: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut bytes = b"\x80\x02}(".to_vec(); // protocol 2, a dictionary, its items from here
    for (index, entry) in tensors.iter().enumerate() {
        let fail = |reason| Err(Error::new(reason).on(entry.name));
        let Some(storage) = storage_class(entry.dtype) else {
            let problem = format!("torch has no storage for {}", entry.dtype);
            return fail(Reason::Stored { problem });
        };
        if entry.name.len() > NAME_LIMIT {
            let (bytes, limit) = (entry.name.len(), NAME_LIMIT);
            return fail(Reason::NameTooLong { bytes, limit });
        }
        if entry.shape.len() > DIMENSION_LIMIT {
            let (what, limit) = ("dimensions", DIMENSION_LIMIT);
            return fail(Reason::TooMany { what, limit });
        }
        text(&mut bytes, entry.name);
        bytes.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut bytes, "storage");
        bytes.extend_from_slice(format!("ctorch\n{storage}\n").as_bytes());
        text(&mut bytes, &index.to_string());
        text(&mut bytes, "cpu");
        integer(&mut bytes, entry.shape.iter().product());
        bytes.extend_from_slice(b"tQ"); // the tuple says which storage
        integer(&mut bytes, 0);
        tuple(&mut bytes, entry.shape);
        tuple(&mut bytes, &strides(entry.shape));
        // It needs no gradient and has no hooks.
        bytes.extend_from_slice(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    bytes.extend_from_slice(b"u.");
    Ok(bytes)
}

/// How many elements each axis steps over, outermost first.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut step = 1;
    let mut strides: Vec<usize> = shape
        .iter()
        .rev()
        .map(|size| {
            let stride = step;
            step *= size.max(&1);
            stride
        })
        .collect();
    strides.reverse();
    strides
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(b'X');
    bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

fn integer(bytes: &mut Vec<u8>, value: usize) {
    if let Ok(value) = u8::try_from(value) {
        bytes.extend_from_slice(&[b'K', value]);
    } else if let Ok(value) = u16::try_from(value) {
        bytes.push(b'M');
        bytes.extend_from_slice(&value.to_le_bytes());
    } else if let Ok(value) = i32::try_from(value) {
        bytes.push(b'J');
        bytes.extend_from_slice(&value.to_le_bytes());
    } else {
        // A long integer of nine bytes, so that it has a sign.
        bytes.extend_from_slice(&[0x8a, 9]);
        bytes.extend_from_slice(&(value as u64).to_le_bytes());
        bytes.push(0);
    }
}

fn tuple(bytes: &mut Vec<u8>, values: &[usize]) {
    if values.len() > 3 {
        bytes.push(b'(');
    }
    values.iter().for_each(|value| integer(bytes, *value));
    bytes.push(match values.len() {
        0 => b')',
        1 => 0x85,
        2 => 0x86,
        3 => 0x87,
        _ => b't',
    });
}
