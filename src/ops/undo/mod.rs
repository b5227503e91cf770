//! What a merge writes beside its result so that it can be taken back bit for bit: the format of the file, and the
//! checkpoint that it restores.

mod code;
mod directory;
mod file;
mod frame;
mod restore;

pub(crate) use code::{Memory, encode, raw, varint};
pub(crate) use directory::{
    AdapterEntry, Coded, CopyEntry, Directory, FileEntry, How, Merged, ModuleEntry, Piece, Section,
    TensorEntry, TextEntry,
};
pub(crate) use file::{Writer, hash_of, hashes};
pub(crate) use frame::Frame;
pub(crate) use restore::Restoring;
pub use restore::Taken;
