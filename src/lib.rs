//! Merge, inspect and check LoRA adapters on checkpoint files: exact, crash-safe, in bounded memory.
//!
//! # The map
//!
//! In reading order; every arrow points down this list (a test keeps it so).
//!
//! * [`ops`] — one verb per file: [`ops::merge`], [`ops::inspect`], [`ops::check`]. Options in, report out.
//! * [`formats`] — what the names in an adapter's files mean, one community's spelling per file.
//! * [`methods`] — what the parameters mean: LoRA, DoRA, IA3, one per file.
//! * [`adapter`] — the canonical model: an adapter is modules, replacements, token rows and facts.
//! * [`checkpoint`] — the base model: shards in, a crash-safe output out.
//! * [`containers`] — how named tensors lie in bytes; has never heard of adapters.
//! * [`naming`] — from module paths to names in a checkpoint.
//! * [`linalg`] — the arithmetic, with one result on every machine; libraries and devices for the rest.
//! * [`tensor`], [`mapped`], [`json`], [`notice`], [`error`] — the shared ground.
//!
//! The library never prints, prompts or reads the environment; the command line does.
//!
//! # A merge in ten lines
//!
//! ```
//! use loratool::ops::merge::{Control, Options, Selection, plan};
//!
//! # let out = tempfile::tempdir()?;
//! let options = Options {
//!     base: "fixtures/peft/bases/llama".into(),
//!     adapters: vec![Selection { path: "fixtures/peft/cases/lora/adapter".into(), strength: 1.0, ..Default::default() }],
//!     output: out.path().join("merged"),
//!     ..Default::default()
//! };
//! let report = plan(&options)?.run(&Control::default())?;
//! assert_eq!(report.modules.len(), 6);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod adapter;
pub mod checkpoint;
pub mod containers;
pub mod error;
pub mod formats;
pub mod json;
pub mod linalg;
pub mod mapped;
pub mod methods;
pub mod naming;
pub mod notice;
pub mod ops;
mod pattern;
mod printable;
pub mod tensor;

pub use error::{Error, Kind, Reason, Result};
pub use printable::{printable, printable_json};
