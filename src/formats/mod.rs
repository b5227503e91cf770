//! What the names in an adapter's files mean: one community's spelling per file.
//!
//! [`FORMATS`] is the only list. A format judges by names and configuration, never by tensor data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::adapter::Adapter;
use crate::containers::TensorFile;
use crate::error::{Error, Reason, Result};
use crate::json::{Document, Value};
use crate::mapped::{Input, is_there};

mod adapterhub;
mod bfl;
mod blocks;
mod diffusers;
mod dotted;
mod draft;
mod gguf;
mod kohya;
mod litgpt;
mod loralib;
mod mlx;
mod onetrainer;
mod peft;
mod pieces;
mod simo;
mod spellings;
mod textual_inversion;
mod torchtune;
mod xlabs;
mod yaml;

pub use draft::{Draft, Loss, Named, Writer, Written};
pub use simo::Order;
pub use spellings::Summary;

/// One community's spelling of adapters.
pub trait Format: Sync {
    /// Its short name, for options and scripts.
    fn id(&self) -> &'static str;

    /// Its name in the field.
    fn name(&self) -> &'static str;

    /// Whether an adapter is spelled this way.
    fn recognises(&self, found: &Found) -> bool;

    /// Reads the adapter; nothing in the files is left out.
    ///
    /// # Errors
    /// What is wrong with names, shapes or configuration, all cases listed;
    /// [`Reason::Format`] where the format can be recognised but not read yet.
    fn read(&self, found: &Found, options: &ReadOptions) -> Result<Adapter>;

    /// What can be said from names and shapes alone.
    fn summary(&self, found: &Found) -> Summary;

    /// How it is written, if it can be.
    fn writer(&self) -> Option<&dyn Writer> {
        None
    }
}

/// The format that tools for a kind of model read most: that of PEFT for language models, that of kohya for the layers
/// of a denoiser, of which it says more than others do.
pub fn customary(denoiser: bool) -> &'static dyn Format {
    match denoiser {
        true => &kohya::Kohya,
        false => &peft::Peft,
    }
}

/// Every format, in the order they are asked.
pub static FORMATS: &[&dyn Format] = &[
    &torchtune::Torchtune,
    &peft::Peft,
    &adapterhub::AdapterHub,
    &simo::Numbered,
    &simo::Listed,
    &gguf::Gguf,
    &mlx::MLX,
    &mlx::MLX_NPZ,
    &xlabs::XLabs,
    &dotted::AI_TOOLKIT,
    &diffusers::OLD,
    &diffusers::MID,
    &spellings::KOHYA_DOUBLED,
    &onetrainer::OneTrainer,
    &kohya::Kohya,
    &dotted::COMFYUI,
    &dotted::OMI,
    &diffusers::NEW,
    &bfl::Bfl,
    &dotted::ORIGINAL,
    &litgpt::Litgpt,
    &loralib::Loralib,
    &textual_inversion::TextualInversion,
    &textual_inversion::WebUi,
    &spellings::HOME_MADE,
];

/// What a caller accepts when an adapter is read.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// Configuration fields that are accepted although they are unknown.
    pub allow_unknown_config: Vec<String>,
    /// The numerator of the scale of adapters whose files do not state it.
    pub alpha: Option<f64>,
    /// Reads vectors for the input as unused tensors, which can be written again and never merged.
    pub carry_vectors: bool,
    /// Which layers the numbers of cloneofsimo's files mean.
    pub order: Option<Order>,
}

impl ReadOptions {
    /// The table of layers that the caller gives, where factors have numbers alone.
    fn order(&self) -> Result<&Order> {
        self.order
            .as_ref()
            .ok_or_else(|| Error::new(Reason::Ordinals))
    }

    /// The alpha that the caller states, where no file does.
    fn alpha(&self) -> Result<f64> {
        match self.alpha {
            Some(alpha) if alpha.is_finite() => Ok(alpha),
            Some(alpha) => {
                let value = alpha.to_string();
                Err(Error::new(Reason::AlphaNotFinite { value }))
            }
            None => Err(Error::new(Reason::AlphaMissing)),
        }
    }
}

/// The files of an adapter, open but not yet understood.
pub struct Found {
    /// The path that was given.
    pub path: PathBuf,
    /// The file of tensors.
    pub file: TensorFile,
    /// The configuration beside it.
    pub config: Option<Document>,
    /// Settings that LitGPT writes beside its factors.
    settings: Vec<yaml::Settings>,
    /// The folder that holds both.
    pub folder: PathBuf,
}

/// The name that PEFT, AdapterHub and MLX all use.
pub(crate) const CONFIG: &str = "adapter_config.json";

/// Names of weight files in a folder, in the order of preference. What torchtune trained comes before what it
/// translated for PEFT beside it, where it moves rows of some models wrongly (docs/formats/torchtune.md).
const WEIGHTS: &[&str] = &[
    torchtune::FILE,
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "adapters.safetensors",
    "adapters.npz",
    "lit_model.pth.lora",
    "adapter.safetensors",
    "pytorch_adapter.bin",
];

/// Most values of a configuration.
const CONFIG_VALUES: usize = 200_000;

impl Found {
    /// Finds and opens the files of an adapter: a folder, or the file of tensors itself.
    ///
    /// # Errors
    /// [`Reason::NoAdapterWeights`] and what opening the files gives.
    pub fn open(path: &Path) -> Result<Self> {
        let is_folder = std::fs::metadata(path)
            .map_err(|e| Error::io(Reason::Open, e).in_file(path))?
            .is_dir();
        let (folder, weights) = if is_folder {
            (path.to_owned(), weights_in(path)?)
        } else {
            let folder = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            (folder.unwrap_or(Path::new(".")).to_owned(), path.to_owned())
        };
        let config = folder.join(CONFIG);
        let config = is_there(&config)
            .then(|| Document::read(&config, CONFIG_VALUES))
            .transpose()?;
        let file = TensorFile::open(&weights)?;
        if file.directory.tensors.is_empty() {
            return Err(Error::new(Reason::NoTensors).in_file(weights));
        }
        let fused = |tensor: &crate::tensor::Tensor| tensor.name.ends_with(".lora_A");
        let settings = match file.directory.tensors.iter().any(fused) {
            true => litgpt::SETTINGS.iter(),
            false => [].iter(),
        };
        let settings = settings
            .map(|name| folder.join(name))
            .filter(|path| is_there(path))
            .map(|path| yaml::Settings::read(&path))
            .collect::<Result<_>>()?;
        Ok(Found {
            path: path.to_owned(),
            file,
            config,
            settings,
            folder,
        })
    }

    /// The format that these files are spelled in.
    pub fn format(&self) -> Option<&'static dyn Format> {
        FORMATS
            .iter()
            .copied()
            .find(|format| format.recognises(self))
    }

    /// Whether the names and metadata of the file are those of an adapter, whatever lies beside it.
    pub(crate) fn spells_an_adapter(mut self) -> bool {
        (self.config, self.settings) = (None, Vec::new());
        self.format().is_some()
    }

    /// Recognises and reads the adapter.
    ///
    /// # Errors
    /// [`Reason::NotAnAdapter`], [`Reason::FormatUnknown`], and those of [`Format::read`].
    pub fn read(&self, options: &ReadOptions) -> Result<Adapter> {
        match self.format() {
            Some(format) => format
                .read(self, options)
                .map_err(|e| e.in_file(self.file.input.path())),
            None if self.looks_like_checkpoint() => {
                Err(Error::new(Reason::NotAnAdapter).in_file(self.file.input.path()))
            }
            None => Err(Error::new(Reason::FormatUnknown).in_file(self.file.input.path())),
        }
    }

    /// Whether the names are those of whole weights.
    pub fn looks_like_checkpoint(&self) -> bool {
        let names = || {
            self.file
                .directory
                .tensors
                .iter()
                .map(|tensor| tensor.name.as_str())
        };
        names().any(|name| name.ends_with(".weight")) && self.format().is_none()
    }

    /// Every open file.
    pub fn inputs(&self) -> impl Iterator<Item = &Arc<Input>> {
        std::iter::once(&self.file.input)
            .chain(self.config.iter().map(|config| &config.input))
            .chain(self.settings.iter().map(|settings| &settings.input))
    }

    /// The names of the tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.file
            .directory
            .tensors
            .iter()
            .map(|tensor| tensor.name.as_str())
    }

    /// A metadata value.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        let entries = &self.file.directory.metadata;
        entries
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// A value of the settings of LitGPT.
    pub(crate) fn settings(&self, key: &str) -> Option<&str> {
        self.settings.iter().find_map(|settings| settings.get(key))
    }

    /// A configuration value.
    pub(crate) fn configured(&self, key: &str) -> Option<&Value> {
        self.config
            .as_ref()
            .and_then(|config| config.object.get(key))
    }
}

/// The file of tensors in a folder.
fn weights_in(folder: &Path) -> Result<PathBuf> {
    if let Some(name) = WEIGHTS.iter().find(|name| is_there(&folder.join(name))) {
        return Ok(folder.join(name));
    }
    let fail = || Error::new(Reason::NoAdapterWeights).in_file(folder);
    let entries =
        std::fs::read_dir(folder).map_err(|e| Error::io(Reason::Open, e).in_file(folder))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            let extension = path
                .extension()
                .and_then(|extension| extension.to_str())
                .unwrap_or("");
            [
                "safetensors",
                "bin",
                "pt",
                "pth",
                "ckpt",
                "npz",
                "gguf",
                "lora",
            ]
            .contains(&extension)
        })
        .collect();
    found.sort();
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(fail()),
        several => {
            let names = several
                .iter()
                .map(|path| path.to_string_lossy().into_owned())
                .collect();
            Err(fail()
                .with_cases(names)
                .with_hint("name one of these files"))
        }
    }
}
