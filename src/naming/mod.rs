//! From a module path in a trained model to a place in a checkpoint. Names only: no tensor data, no I/O.

pub mod component;
pub mod families;
pub mod fold;
pub mod path;
mod resolver;
mod rows;

pub use resolver::{Place, Resolution, Resolver, Spelling};
pub use rows::{Attention, Heads, Rows};
