//! The base model: shards in, shards out.

pub mod companions;
pub mod config;
mod index;
pub mod sink;
mod source;
mod system;

pub use source::{Checkpoint, Shard};
