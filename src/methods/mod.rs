//! What the parameters of an adapter mean: one method per file.

use crate::adapter::Method;

mod dora;
mod ia3;
mod lora;

pub use dora::DORA;
pub use ia3::IA3;
pub use lora::LORA;

/// Every method.
pub static METHODS: &[&dyn Method] = &[&LORA, &DORA, &IA3];
