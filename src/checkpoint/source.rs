//! A checkpoint that is read: one file, or a folder with one file or an index and its shards.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::index::{Index, model_config};
use super::{INDEX, SINGLE};
use crate::containers::TensorFile;
use crate::error::{Error, Reason, Result};
use crate::json::{Document, Object, Value};
use crate::mapped::{Input, is_there};
use crate::notice::{Notice, NoticeKind};
use crate::tensor::{DType, Tensor};

/// A checkpoint, open.
pub struct Checkpoint {
    /// The path that was given.
    pub path: PathBuf,
    /// Whether that is a folder.
    pub is_folder: bool,
    /// The files of tensors, by name.
    pub shards: Vec<Shard>,
    /// `config.json`, if it is known to belong to the weights.
    pub config: Option<Document>,
    /// What is odd.
    pub notices: Vec<Notice>,
    index: Option<Index>,
    unindexed: HashSet<String>,
    places: HashMap<String, (usize, usize)>,
}

/// One file of a checkpoint.
pub struct Shard {
    /// Its name in the folder.
    pub name: String,
    /// Its content.
    pub file: TensorFile,
}

/// Checkpoints that are recognised in a folder but cannot be read yet.
const OTHERS: &[&str] = &[
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_index.json",
    "diffusion_pytorch_model.safetensors",
    "consolidated.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
];

impl Checkpoint {
    /// A checkpoint of one file that is open already.
    ///
    /// # Errors
    /// [`Reason::NoTensors`], and what reading the configuration gives.
    pub fn of_file(path: &Path, file: TensorFile) -> Result<Self> {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        // Only the conventional name ties a configuration beside it to the weights.
        let folder = path.parent().filter(|_| name == SINGLE);
        let config = folder.map(model_config).transpose()?.flatten();
        Self::assemble(path, false, vec![Shard { name, file }], config, None)
    }

    /// Opens a checkpoint; only headers are read.
    ///
    /// # Errors
    /// [`Reason::NoCheckpoint`], [`Reason::BaseIsAdapter`], disagreements between index and shards
    /// (all of them listed), and what opening the files gives.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata =
            std::fs::metadata(path).map_err(|e| Error::io(Reason::Open, e).in_file(path))?;
        if !metadata.is_dir() {
            return Self::of_file(path, TensorFile::open(path)?);
        }
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        let index = if is_there(&index) {
            Some(Index::read(&index)?)
        } else {
            None
        };
        let config = model_config(path)?;
        match index {
            Some(index) => {
                let names: BTreeSet<&str> = index
                    .weight_map
                    .iter()
                    .map(|(_, shard)| shard.as_str())
                    .collect();
                if is_there(&single) && !names.contains(SINGLE) {
                    return Err(Error::new(Reason::BothLayouts).in_file(path));
                }
                let mut shards = Vec::new();
                for name in names {
                    let file = path.join(name);
                    if !is_there(&file) {
                        let reason = Reason::ShardMissing {
                            name: name.to_owned(),
                        };
                        return Err(Error::new(reason).in_file(index.input.path()));
                    }
                    shards.push(Shard {
                        name: name.to_owned(),
                        file: TensorFile::open(file)?,
                    });
                }
                Self::assemble(path, true, shards, config, Some(index))
            }
            None if is_there(&single) => {
                let shard = Shard {
                    name: SINGLE.to_owned(),
                    file: TensorFile::open(single)?,
                };
                Self::assemble(path, true, vec![shard], config, None)
            }
            None => Err(Self::not_here(path)),
        }
    }

    fn not_here(path: &Path) -> Error {
        if path.join("adapter_config.json").exists() {
            return Error::new(Reason::BaseIsAdapter).in_file(path);
        }
        match OTHERS.iter().find(|name| path.join(name).exists()) {
            Some(found) => Error::new(Reason::OtherCheckpoint {
                found: (*found).to_owned(),
            })
            .in_file(path),
            None => Error::new(Reason::NoCheckpoint).in_file(path),
        }
    }

    fn assemble(
        path: &Path,
        is_folder: bool,
        shards: Vec<Shard>,
        config: Option<Document>,
        index: Option<Index>,
    ) -> Result<Self> {
        for shard in &shards {
            let name = shard.file.container.name();
            if !shard.file.container.is_base() {
                return Err(
                    Error::new(Reason::BaseContainer { name }).in_file(shard.file.input.path())
                );
            }
        }
        let mut places = HashMap::new();
        let mut checkpoint = Checkpoint {
            path: path.to_owned(),
            is_folder,
            shards,
            config,
            notices: Vec::new(),
            index,
            unindexed: HashSet::new(),
            places: HashMap::new(),
        };
        for (s, shard) in checkpoint.shards.iter().enumerate() {
            for (t, tensor) in shard.file.directory.tensors.iter().enumerate() {
                if let Some((first, _)) = places.insert(tensor.name.clone(), (s, t)) {
                    let first = checkpoint.shards[first].name.clone();
                    let reason = Reason::TwoShards {
                        first,
                        second: shard.name.clone(),
                    };
                    return Err(Error::new(reason).in_file(path).on(&*tensor.name));
                }
            }
        }
        checkpoint.places = places;
        if checkpoint.places.is_empty() {
            return Err(Error::new(Reason::NoTensors).in_file(path));
        }
        checkpoint.compare_with_index()?;
        Ok(checkpoint)
    }

    fn compare_with_index(&mut self) -> Result<()> {
        let Some(index) = &self.index else {
            return Ok(());
        };
        let mut missing = Vec::new();
        for (tensor, shard) in &index.weight_map {
            let found = self
                .places
                .get(tensor)
                .map(|(s, _)| self.shards[*s].name.as_str());
            if found != Some(shard) {
                missing.push((tensor, shard));
            }
        }
        if let Some((tensor, shard)) = missing.first() {
            let cases = missing
                .iter()
                .map(|(tensor, shard)| format!("{tensor}: {shard}"))
                .collect();
            let reason = Reason::NotInShard {
                shard: (*shard).clone(),
            };
            return Err(Error::new(reason)
                .in_file(index.input.path())
                .on(&**tensor)
                .with_cases(cases));
        }
        let indexed: BTreeSet<&str> = index
            .weight_map
            .iter()
            .map(|(tensor, _)| tensor.as_str())
            .collect();
        for (name, (s, _)) in &self.places {
            if !indexed.contains(name.as_str()) {
                self.unindexed.insert(name.clone());
                let text = format!(
                    "`{}` holds it, but the index does not name it; loaders ignore it",
                    self.shards[*s].name
                );
                self.notices.push(
                    Notice::new(NoticeKind::Contradiction, text)
                        .on(&**name)
                        .in_file(index.input.path()),
                );
            }
        }
        self.notices.sort_by(|a, b| a.item.cmp(&b.item));
        Ok(())
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let (shard, tensor) = self.places.get(name)?;
        self.shards[*shard].file.directory.tensors.get(*tensor)
    }

    /// All tensors, shard by shard, in the order of their data.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.shards
            .iter()
            .flat_map(|shard| &shard.file.directory.tensors)
    }

    /// Every open file.
    pub fn inputs(&self) -> impl Iterator<Item = &Arc<Input>> {
        self.shards
            .iter()
            .map(|shard| &shard.file.input)
            .chain(self.config.iter().map(|config| &config.input))
            .chain(self.index.iter().map(|index| &index.input))
    }

    /// A value of `config.json`; of its `text_config` where the top level has none.
    pub fn configured(&self, key: &str) -> Option<&Value> {
        let config = &self.config.as_ref()?.object;
        config
            .get(key)
            .or_else(|| config.get("text_config")?.as_object()?.get(key))
    }

    /// The statements of the index besides the map.
    pub(crate) fn index_metadata(&self) -> Option<&Object> {
        self.index.as_ref().map(|index| &index.metadata)
    }

    /// The text of an index for other shards, its other statements kept.
    pub(crate) fn index_text(
        &self,
        bytes: u64,
        parameters: u64,
        map: &BTreeMap<&str, &str>,
    ) -> String {
        let none = Object::default();
        super::index::text(
            self.index_metadata().unwrap_or(&none),
            bytes,
            parameters,
            map,
        )
    }

    /// Whether the index leaves a tensor out that its shard holds.
    pub(crate) fn is_unindexed(&self, name: &str) -> bool {
        self.unindexed.contains(name)
    }

    /// How the weights are quantised, if they are.
    pub fn quantisation(&self) -> Option<String> {
        if let Some(Value::Object(quantisation)) = self.configured("quantization_config") {
            let method = quantisation
                .get("quant_method")
                .and_then(Value::as_str)
                .unwrap_or("quantization_config");
            return Some(method.to_owned());
        }
        const MARKS: &[(&str, &str)] = &[
            (".qweight", "packed qweight"),
            (".qzeros", "packed qzeros"),
            (".absmax", "bitsandbytes absmax"),
            (".quant_map", "bitsandbytes quant_map"),
            (".SCB", "bitsandbytes SCB"),
            (".weight_scale_inv", "FP8 weight_scale_inv"),
            (".weight_scale", "weight_scale"),
            (".scale_weight", "scale_weight"),
            (".weight_packed", "weight_packed"),
            (".W_q", "HQQ W_q"),
            ("_blocks", "MXFP4 blocks"),
        ];
        for tensor in self.tensors() {
            if let Some((suffix, how)) = MARKS
                .iter()
                .find(|(suffix, _)| tensor.name.ends_with(suffix))
            {
                let packed = *suffix != "_blocks"
                    || matches!(tensor.dtype, DType::U8)
                        && self
                            .tensor(&tensor.name.replace("_blocks", "_scales"))
                            .is_some();
                if packed {
                    return Some((*how).to_owned());
                }
            }
        }
        None
    }

    /// Whether the model shares the input embedding with the output (`tie_word_embeddings`).
    ///
    /// Where the configuration does not say, a causal model without an output embedding in its files
    /// shares it: transformers leaves the field out where it has its default.
    pub fn ties_embeddings(&self) -> bool {
        match self.configured("tie_word_embeddings") {
            Some(Value::Bool(tied)) => *tied,
            _ => {
                let causal = match self.configured("architectures") {
                    Some(Value::Array(names)) => {
                        names.iter().filter_map(Value::as_str).any(|name| {
                            ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration"]
                                .iter()
                                .any(|end| name.ends_with(end))
                        })
                    }
                    _ => false,
                };
                causal && self.output_embedding().is_none()
            }
        }
    }

    /// The input embedding.
    pub fn input_embedding(&self) -> Option<&Tensor> {
        const NAMES: &[&str] = &[
            "embed_tokens.weight",
            "wte.weight",
            "word_embeddings.weight",
            "embed_in.weight",
            "tok_embeddings.weight",
            "shared.weight",
            "embeddings.weight",
        ];
        NAMES.iter().find_map(|name| {
            self.tensors().find(|tensor| {
                tensor
                    .name
                    .strip_suffix(name)
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })
        })
    }

    /// The output embedding, where the files hold one.
    pub fn output_embedding(&self) -> Option<&Tensor> {
        const NAMES: &[&str] = &[
            "lm_head.weight",
            "embed_out.weight",
            "output.weight",
            "proj_out.weight",
        ];
        NAMES.iter().find_map(|name| {
            self.tensors().find(|tensor| {
                tensor
                    .name
                    .strip_suffix(name)
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with("model."))
            })
        })
    }
}
