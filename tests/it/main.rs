//! One integration binary, a module per room.

#[cfg(feature = "cli")]
mod cli;
mod goldens;
mod real_adapters;
mod definition;
mod kernels;
mod laws;
mod oracle;
mod support;
mod tied;
