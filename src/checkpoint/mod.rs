//! The base model: shards in, shards out.

pub mod companions;
pub mod config;
mod index;
pub mod sink;
mod source;
mod system;

pub use source::{Checkpoint, Shard};

/// What a folder with one file of weights calls it.
const SINGLE: &str = "model.safetensors";

/// What a folder with several calls the map of them.
const INDEX: &str = "model.safetensors.index.json";
