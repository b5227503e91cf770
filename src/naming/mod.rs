//! From a module path in a trained model to a place in a checkpoint. Names only: no tensor data, no I/O.

mod component;
pub mod fold;
pub mod path;
mod resolver;

pub use component::COMPONENTS;
pub use resolver::{Place, Resolution, Resolver, Rows};
