//! One verb per file: options in, report out. Nothing here names a format or a method, and nothing
//! prints.

mod budget;
pub mod check;
pub mod combine;
pub mod convert;
pub mod device;
pub mod extract;
pub mod inspect;
pub mod merge;
mod outgoing;
pub mod rescale;
pub mod resize;
mod spool;
pub mod switch;
pub(crate) mod undo;
pub mod unmerge;
mod workers;
