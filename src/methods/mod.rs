//! What the parameters of an adapter mean: one method per file.

use crate::adapter::Method;

pub mod dora;
pub mod full;
pub mod ia3;
pub mod lora;
pub mod replaced;

/// Every method.
pub static METHODS: &[&dyn Method] = &[
    &lora::LORA,
    &dora::DORA,
    &ia3::IA3,
    &full::FULL,
    &replaced::REPLACED,
];
