//! One integration binary, a module per room.

#[cfg(feature = "cli")]
mod cli;
mod convert;
mod definition;
mod goldens;
mod real_adapters;
mod definition;
mod kernels;
mod laws;
mod oracle;
mod overflow;
mod support;
mod tied;
