//! Files that are recognised so that the refusal can name them.
//!
//! The containers here cannot be read yet; each will move to a file of its own when it can.

use std::sync::Arc;

use super::{Container, Directory};
use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

/// What a file is, if it is plainly no file of tensors at all.
pub(super) fn not_a_tensor_file(head: &[u8]) -> Option<Reason> {
    let text = head.trim_ascii_start();
    let starts = |with: &[u8]| {
        let start = text.get(..with.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(with))
    };
    if head.is_empty() {
        Some(Reason::Empty)
    } else if head.starts_with(b"version https://git-lfs.github.com/spec/") {
        Some(Reason::LfsPointer)
    } else if starts(b"<!doctype html") || starts(b"<html") || starts(b"<?xml") {
        Some(Reason::Html)
    } else if head.first() == Some(&b'{') {
        // A safetensors file whose length starts with the byte of `{` would have a header of 123
        // bytes modulo 256; its ninth byte is `{` as well, which no JSON text has there by chance
        // often enough to matter. Both are asked.
        let binary = head
            .get(3..9)
            .is_some_and(|bytes| bytes.ends_with(b"{") && bytes.contains(&0));
        (!binary).then_some(Reason::Json)
    } else {
        None
    }
}

/// Declares a container that is recognised by its first bytes and refused by name.
macro_rules! recognised {
    ($($(#[$doc:meta])* $type:ident $name:literal $magic:expr;)*) => {$(
        $(#[$doc])*
        pub(super) struct $type;

        impl Container for $type {
            fn name(&self) -> &'static str {
                $name
            }

            fn detects(&self, head: &[u8], _length: u64) -> bool {
                let magic: &[&[u8]] = &$magic;
                magic.iter().any(|magic| head.starts_with(magic))
            }

            fn open(&self, _input: Arc<Input>) -> Result<Directory> {
                Err(Error::new(Reason::Container { name: $name }))
            }
        }
    )*};
}

recognised! {
    /// A zip archive that holds neither a torch checkpoint nor numpy arrays.
    Zip "zip archive" [b"PK\x03\x04", b"PK\x05\x06"];
}
