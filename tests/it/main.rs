//! One integration binary, a module per room.

#[cfg(feature = "cli")]
mod cli;
mod convert;
mod definition;
mod goldens;
mod kernels;
mod laws;
mod oracle;
mod overflow;
mod real_adapters;
mod hostile_config;
mod hostile_index;
mod hostile_safetensors;
mod hostile_support;
mod names;
mod output;
mod support;
mod tied;
