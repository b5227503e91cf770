//! One integration binary, a module per room.

mod arrows;
mod bases_gguf;
mod bases_ldm;
mod bases_pipeline;
mod bases_torch;
#[cfg(feature = "cli")]
mod cli;
#[cfg(feature = "cli")]
mod cli_combine;
#[cfg(feature = "cli")]
mod cli_extract;
#[cfg(feature = "cli")]
mod cli_resize;
#[cfg(feature = "cli")]
mod cli_undo;
mod combine;
mod combine_changes;
mod combine_peers;
mod conversion_laws;
mod conversions;
mod convert;
mod convert_names;
mod convert_values;
mod definition;
mod dense;
mod devices;
mod devices_extract;
mod devices_support;
mod extract;
mod extract_refusals;
mod families;
mod flux;
mod fuzz;
mod goldens;
mod hostile_config;
mod hostile_gguf;
mod hostile_index;
mod hostile_numpy;
mod hostile_pickle;
mod hostile_safetensors;
mod hostile_support;
mod hostile_zip;
mod kernels;
mod key_lists;
mod laws;
#[path = "../../benches/libraries/mod.rs"]
mod libraries;
mod llm_formats;
mod llm_goldens;
mod lycoris;
#[cfg(all(feature = "cli", target_os = "linux"))]
mod memory;
mod mlx;
mod names;
mod oracle;
mod output;
mod overflow;
mod readme;
mod real_adapters;
mod rescale;
mod resize;
mod sums;
mod support;
mod tied;
mod torch_files;
mod transformers;
mod truncated;
mod truncation;
mod undo;
mod unmerge;
