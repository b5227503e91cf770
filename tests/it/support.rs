//! What the tests share.

use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::ops::merge::{Control, Options, Report, Selection, plan};
use loratool::tensor::Tensor;

pub(crate) use crate::libraries::libraries as algebras;
use crate::oracle::Stored;

/// A path below `fixtures/`.
pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

/// Options for one adapter at strength 1.
pub(crate) fn options(base: &Path, adapter: &Path, output: &Path) -> Options {
    Options {
        base: base.to_owned(),
        adapters: vec![selection(adapter, 1.0)],
        output: output.to_owned(),
        ..Options::default()
    }
}

/// An adapter with its strength.
pub(crate) fn selection(adapter: &Path, strength: f64) -> Selection {
    Selection {
        path: adapter.to_owned(),
        strength,
        strength_for: Vec::new(),
    }
}

/// Plans and runs.
pub(crate) fn merge(options: &Options) -> loratool::Result<Report> {
    plan(options)?.run(&Control::default())
}

/// The tensor of a name.
pub(crate) fn tensor(file: &TensorFile, name: &str) -> Tensor {
    file.tensor(name)
        .unwrap_or_else(|| panic!("{name} is not in {}", file.input.path().display()))
        .clone()
}

/// The program, with nothing on its standard input.
#[cfg(feature = "cli")]
pub(crate) fn program() -> std::process::Command {
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_loratool"));
    program.stdin(std::process::Stdio::null());
    program
}

/// What a program said.
#[cfg(feature = "cli")]
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Names and bytes of all tensors.
#[cfg(feature = "cli")]
pub(crate) fn contents(path: &Path) -> Vec<(String, Vec<u8>)> {
    let file = TensorFile::open(path).unwrap();
    let mut all: Vec<_> = file
        .directory
        .tensors
        .iter()
        .map(|tensor| (tensor.name.clone(), tensor.bytes().unwrap().into_owned()))
        .collect();
    all.sort();
    all
}

/// Writes a file of tensors in the order given.
pub(crate) fn write_safetensors(path: &Path, tensors: &[(&str, Stored)]) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, tensor) in tensors {
        let start = end;
        end += tensor.bytes.len();
        let entry = serde_json::json!({
            "dtype": tensor.dtype.to_string(),
            "shape": tensor.shape,
            "data_offsets": [start, end],
        });
        header.insert((*name).to_owned(), entry);
    }
    let mut header = serde_json::to_string(&header).unwrap();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    for (_, tensor) in tensors {
        bytes.extend_from_slice(&tensor.bytes);
    }
    std::fs::write(path, bytes).unwrap();
}

/// Writes an adapter folder of PEFT.
pub(crate) fn write_adapter(folder: &Path, config: &serde_json::Value, tensors: &[(&str, Stored)]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    write_safetensors(&folder.join("adapter_model.safetensors"), tensors);
}

/// Writes a checkpoint folder of one shard.
pub(crate) fn write_base(
    folder: &Path,
    config: Option<&serde_json::Value>,
    tensors: &[(&str, Stored)],
) {
    std::fs::create_dir_all(folder).unwrap();
    if let Some(config) = config {
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    }
    write_safetensors(&folder.join("model.safetensors"), tensors);
}

/// Numbers that are the same on every run (SplitMix64, Steele et al. 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A number between −1 and 1.
    pub(crate) fn float(&mut self) -> f64 {
        (self.next() >> 11) as f64 / 2f64.powi(52) - 1.0
    }

    /// Numbers between −1 and 1.
    pub(crate) fn floats(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.float()).collect()
    }
}
