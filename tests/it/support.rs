//! What the tests share.

use std::path::{Path, PathBuf};

use loratool::containers::TensorFile;
use loratool::ops::merge::{Control, Options, Report, Selection, plan};
use loratool::tensor::Tensor;

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

/// Names and bytes of all tensors.
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
