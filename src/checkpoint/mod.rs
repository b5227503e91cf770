//! The base model: shards in, shards out.

pub mod companions;
pub mod config;
mod index;
mod names;
pub mod sink;
mod source;
mod system;
mod training;

pub use names::Variant;
pub use source::{Checkpoint, Part, Shard};

/// What makes a folder a pipeline of diffusers: which component is which class.
const PIPELINE: &str = "model_index.json";
