//! The few verbs of arithmetic that merging needs, with one result on every machine.
//!
//! The definition is in `docs/numerics.md`: chains of fused multiply-adds in f64, indices ascending.
//! Every entry of [`KERNELS`] computes exactly that; they differ in the instructions they may use, and
//! the tests compare them byte for byte.

pub mod dense;
pub mod device;
mod lanes;
mod panels;
pub mod random;
pub mod truncated;

pub use lanes::{ChainBound, KERNELS, Kernel, Survey};
pub use panels::{LANES, Panels};
