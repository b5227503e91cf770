//! A checkpoint that is read: one file, a folder with one file or an index and its shards, or a
//! pipeline of such folders.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::companions::stays;
use super::index::{CONFIG, Index, is_plain_file_name, model_config};
use super::names::{self, Name, Variant, choose};
use super::{PIPELINE, training};
use crate::containers::{TensorFile, Writer};
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
    /// The files of tensors, by part and name.
    pub shards: Vec<Shard>,
    /// The one model, or the components of a pipeline.
    pub parts: Vec<Part>,
    /// What is odd.
    pub notices: Vec<Notice>,
    /// `model_index.json` of a pipeline.
    pipeline: Option<Document>,
    writer: &'static dyn Writer,
    /// The output embedding, where a torch file gave it as another name of the input embedding.
    tied: Option<String>,
    places: HashMap<String, (usize, usize)>,
}

/// One model.
pub struct Part {
    /// The folder of a component; nothing where the checkpoint is one model.
    pub name: String,
    /// `config.json`, if it is known to belong to the weights.
    pub config: Option<Document>,
    files: Name,
    index: Option<Index>,
    unindexed: HashSet<String>,
}

/// One file of a checkpoint.
pub struct Shard {
    /// Its name in the folder of its part.
    pub name: String,
    /// The part that it belongs to.
    pub part: usize,
    /// Its content; in a pipeline the name of the component stands before those of its tensors.
    pub file: TensorFile,
}

/// Checkpoints that are recognised in a folder but cannot be read yet.
const OTHERS: &[&str] = &[
    "consolidated.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
];

/// Most values of a `model_index.json`.
const PIPELINE_VALUES: usize = 10_000;

impl Part {
    /// Where a file of its folder is in the checkpoint.
    pub fn place(&self, file: &str) -> String {
        match self.name.is_empty() {
            true => file.to_owned(),
            false => format!("{}/{file}", self.name),
        }
    }

    /// The name of a tensor in its file.
    pub fn own_name<'a>(&self, tensor: &'a str) -> &'a str {
        self.own(tensor, '.')
    }

    /// The name of a file in its folder.
    pub(crate) fn own_file<'a>(&self, place: &'a str) -> &'a str {
        self.own(place, '/')
    }

    fn own<'a>(&self, name: &'a str, separator: char) -> &'a str {
        let own = || name.strip_prefix(&self.name)?.strip_prefix(separator);
        match self.name.is_empty() {
            true => name,
            false => own().unwrap_or(name),
        }
    }

    /// Whether its weights are in shards with an index.
    pub(crate) fn has_index(&self) -> bool {
        self.index.is_some()
    }

    /// Where its index is in the checkpoint.
    pub(crate) fn index_place(&self) -> String {
        self.place(&self.files.index())
    }

    /// Where the only file of a result is in it.
    pub(crate) fn single_place(&self, extension: &str) -> String {
        self.place(&self.files.single(extension))
    }

    /// Where one of several files of a result is in it.
    pub(crate) fn shard_place(&self, number: usize, of: usize, extension: &str) -> String {
        self.place(&self.files.shard(number, of, extension))
    }

    /// The text of an index for other shards, its other statements kept.
    pub(crate) fn index_text(
        &self,
        bytes: u64,
        parameters: u64,
        map: &BTreeMap<&str, &str>,
    ) -> String {
        let none = Object::default();
        let metadata = self.index.as_ref().map_or(&none, |index| &index.metadata);
        super::index::text(metadata, bytes, parameters, map)
    }

    /// Whether the index leaves out a tensor, by its own name, that its shard holds.
    pub(crate) fn is_unindexed(&self, name: &str) -> bool {
        self.unindexed.contains(name)
    }

    fn configured(&self, key: &str) -> Option<&Value> {
        let config = &self.config.as_ref()?.object;
        config
            .get(key)
            .or_else(|| config.get("text_config")?.as_object()?.get(key))
    }

    /// Opens the weights of a folder; nothing where it holds none.
    fn open(
        name: &str,
        folder: &Path,
        variant: &Variant,
        notices: &mut Vec<Notice>,
    ) -> Result<Option<Opened>> {
        let Some(chosen) = choose(folder, variant, notices)? else {
            return Ok(None);
        };
        let mut part = Part {
            name: name.to_owned(),
            config: model_config(folder)?,
            files: chosen.name,
            index: None,
            unindexed: HashSet::new(),
        };
        let mut shards = Vec::new();
        if chosen.is_index {
            let index = Index::read(&chosen.path)?;
            let names: BTreeSet<&str> = index
                .weight_map
                .iter()
                .map(|(_, shard)| shard.as_str())
                .collect();
            if let Some(single) = &chosen.single
                && !names.contains(&*file_name(single))
            {
                return Err(names::both(folder, single, &chosen.path));
            }
            for name in names {
                let file = folder.join(name);
                if !is_there(&file) {
                    let name = name.to_owned();
                    let reason = Reason::ShardMissing { name };
                    return Err(Error::new(reason).in_file(index.input.path()));
                }
                shards.push((name.to_owned(), TensorFile::open(file)?));
            }
            part.index = Some(index);
        } else {
            shards.push((file_name(&chosen.path), TensorFile::open(&chosen.path)?));
        }
        Ok(Some((part, shards)))
    }

    fn compare_with_index(&mut self, shards: &[(String, TensorFile)]) -> Result<Vec<Notice>> {
        let Some(index) = &self.index else {
            return Ok(Vec::new());
        };
        let files: HashMap<&str, &TensorFile> = shards
            .iter()
            .map(|(name, file)| (name.as_str(), file))
            .collect();
        let holds = |shard: &str, tensor: &str| {
            let file = files.get(shard);
            file.is_some_and(|file| file.tensor(tensor).is_some())
        };
        let missing: Vec<_> = index
            .weight_map
            .iter()
            .filter(|(tensor, shard)| !holds(shard, tensor))
            .collect();
        if let Some((tensor, shard)) = missing.first() {
            let cases = missing
                .iter()
                .map(|(tensor, shard)| format!("{tensor}: {shard}"))
                .collect();
            let reason = Reason::NotInShard {
                shard: shard.clone(),
            };
            return Err(Error::new(reason)
                .in_file(index.input.path())
                .on(&**tensor)
                .with_cases(cases));
        }
        let indexed: HashSet<&str> = index
            .weight_map
            .iter()
            .map(|(tensor, _)| tensor.as_str())
            .collect();
        let mut notices = Vec::new();
        for (shard, file) in shards {
            let names = file.directory.tensors.iter().map(|tensor| &tensor.name);
            for name in names.filter(|name| !indexed.contains(name.as_str())) {
                self.unindexed.insert(name.clone());
                let text = format!(
                    "`{shard}` holds it, but the index does not name it; loaders ignore it"
                );
                let notice = Notice::new(NoticeKind::Contradiction, text).on(&**name);
                notices.push(notice.in_file(index.input.path()));
            }
        }
        notices.sort_by(|a, b| a.item.cmp(&b.item));
        Ok(notices)
    }
}

/// A part and its files, which may still be named otherwise.
type Opened = (Part, Vec<(String, TensorFile)>);

/// The components that a `model_index.json` names: fields with a library and a class.
fn components(pipeline: &Document) -> Result<Vec<&str>> {
    let is_component = |value: &Value| matches!(value, Value::Array(items) if matches!(items.as_slice(), [Value::String(_), Value::String(_), ..]));
    let fields = &pipeline.object.0;
    let mut names = Vec::new();
    for (name, _) in fields.iter().filter(|(_, value)| is_component(value)) {
        if !is_plain_file_name(name) || name.starts_with('.') {
            let name = name.clone();
            let error = Error::new(Reason::ComponentName { name });
            return Err(error.in_file(pipeline.input.path()));
        }
        names.push(name.as_str());
    }
    Ok(names)
}

/// Opens a component of a pipeline; nothing where it has no weights.
fn component(
    root: &Path,
    name: &str,
    variant: &Variant,
    notices: &mut Vec<Notice>,
) -> Result<Option<Opened>> {
    let folder = root.join(name);
    if !folder.is_dir() {
        let text = format!("it names the component `{name}`, which is not there");
        let notice = Notice::new(NoticeKind::Contradiction, text).on(name);
        notices.push(notice.in_file(root.join(PIPELINE)));
        return Ok(None);
    }
    if !stays(&folder, root) {
        return Err(Error::new(Reason::LinkOutside).in_file(folder));
    }
    Part::open(name, &folder, variant, notices)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

impl Checkpoint {
    /// A checkpoint of one file that is open already.
    ///
    /// # Errors
    /// [`Reason::NoTensors`], and what reading the configuration gives.
    pub fn of_file(path: &Path, file: TensorFile) -> Result<Self> {
        let name = file_name(path);
        // Only a conventional name ties a configuration beside it to the weights.
        let folder = path.parent().filter(|_| Name::parse(&name).is_some());
        let part = Part {
            name: String::new(),
            config: folder.map(model_config).transpose()?.flatten(),
            files: Name::default(),
            index: None,
            unindexed: HashSet::new(),
        };
        let opened = vec![(part, vec![(name, file)])];
        Self::assemble(path, false, None, opened, Vec::new())
    }

    /// Opens a checkpoint that is there once; only headers are read.
    ///
    /// # Errors
    /// As [`Checkpoint::open_variant`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_variant(path, &Variant::Only)
    }

    /// Opens a checkpoint; only headers are read.
    ///
    /// # Errors
    /// [`Reason::NoCheckpoint`], [`Reason::BaseIsAdapter`], [`Reason::SeveralVariants`], disagreements
    /// between index and shards (all of them listed), and what opening the files gives.
    pub fn open_variant(path: impl AsRef<Path>, variant: &Variant) -> Result<Self> {
        let path = path.as_ref();
        let metadata =
            std::fs::metadata(path).map_err(|e| Error::io(Reason::Open, e).in_file(path))?;
        let mut notices = Vec::new();
        let mut opened = Vec::new();
        let index = path.join(PIPELINE);
        let mut pipeline = None;
        let checkpoint = if !metadata.is_dir() {
            Self::of_file(path, TensorFile::open(path)?)?
        } else {
            if is_there(&index) {
                let document = Document::read(&index, PIPELINE_VALUES)?;
                for name in components(&document)? {
                    opened.extend(component(path, name, variant, &mut notices)?);
                }
                pipeline = Some(document);
            } else {
                opened.extend(Part::open("", path, variant, &mut notices)?);
            }
            if opened.is_empty() {
                return Err(Self::not_here(path));
            }
            Self::assemble(path, true, pipeline, opened, notices)?
        };
        let is = |name: &String| {
            checkpoint
                .parts
                .iter()
                .any(|part| part.files.is_variant(name))
        };
        match variant {
            Variant::Named(name) if !is(name) => {
                let name = name.clone();
                Err(Error::new(Reason::NoVariant { name }).in_file(path))
            }
            _ => Ok(checkpoint),
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
        pipeline: Option<Document>,
        opened: Vec<Opened>,
        notices: Vec<Notice>,
    ) -> Result<Self> {
        let mut writer: Option<&'static dyn Writer> = None;
        for (_, file) in opened.iter().flat_map(|(_, shards)| shards) {
            let name = file.container.name();
            match (file.container.result(), writer) {
                (Some(found), None) => writer = Some(found),
                (Some(found), Some(first)) if found.name() == first.name() => {}
                _ => {
                    let reason = Reason::BaseContainer { name };
                    return Err(Error::new(reason).in_file(file.input.path()));
                }
            }
        }
        let Some(writer) = writer else {
            return Err(Error::new(Reason::NoTensors).in_file(path));
        };
        let mut checkpoint = Checkpoint {
            path: path.to_owned(),
            is_folder,
            shards: Vec::new(),
            parts: Vec::new(),
            notices,
            pipeline,
            writer,
            tied: None,
            places: HashMap::new(),
        };
        for part in opened {
            checkpoint.add(part)?;
        }
        for (s, shard) in checkpoint.shards.iter().enumerate() {
            for (t, tensor) in shard.file.directory.tensors.iter().enumerate() {
                checkpoint.places.insert(tensor.name.clone(), (s, t));
            }
        }
        if checkpoint.places.is_empty() {
            return Err(Error::new(Reason::NoTensors).in_file(path));
        }
        Ok(checkpoint)
    }

    fn add(&mut self, (mut part, mut shards): Opened) -> Result<()> {
        let mut first: HashMap<&str, &str> = HashMap::new();
        for (shard, file) in &shards {
            for tensor in &file.directory.tensors {
                if let Some(first) = first.insert(&tensor.name, shard) {
                    let reason = Reason::TwoShards {
                        first: first.to_owned(),
                        second: shard.clone(),
                    };
                    return Err(Error::new(reason).in_file(&self.path).on(&*tensor.name));
                }
            }
        }
        drop(first);
        self.notices.extend(part.compare_with_index(&shards)?);
        let untied = matches!(
            part.configured("tie_word_embeddings"),
            Some(Value::Bool(false))
        );
        let alone = part.index.is_none();
        let is_foreign = |file: &TensorFile| file.container.name() != self.writer.name();
        for (_, file) in shards.iter_mut().filter(|(_, file)| is_foreign(file)) {
            if alone {
                training::unwrap(file, &mut self.notices);
            }
            let dropped = training::unshare(file, untied, &part.unindexed, &mut self.notices);
            let head = dropped.into_iter().find(|name| is_output_embedding(name));
            // Components of pipelines have no output embedding.
            let head = head.filter(|_| part.name.is_empty());
            self.tied = self.tied.take().or(head);
        }
        if !part.name.is_empty() {
            for tensors in shards.iter_mut().map(|(_, file)| file) {
                tensors.arrange(|directory| {
                    for tensor in &mut directory.tensors {
                        tensor.name = format!("{}.{}", part.name, tensor.name);
                    }
                });
            }
        }
        let number = self.parts.len();
        self.shards
            .extend(shards.into_iter().map(|(name, file)| Shard {
                name,
                part: number,
                file,
            }));
        self.parts.push(part);
        Ok(())
    }

    /// Has tensors read from elsewhere, where `of` says so; names, types and shapes stay.
    pub(crate) fn redirect(&mut self, of: impl Fn(&Tensor) -> Option<Tensor>) {
        for shard in &mut self.shards {
            for tensor in &mut shard.file.directory.tensors {
                if let Some(found) = of(tensor) {
                    *tensor = found;
                }
            }
        }
    }

    /// The container of the result of a merge.
    pub fn writer(&self) -> &'static dyn Writer {
        self.writer
    }

    /// `config.json`, where the checkpoint is one model that has one.
    pub fn config(&self) -> Option<&Document> {
        match self.parts.as_slice() {
            [part] if part.name.is_empty() => part.config.as_ref(),
            _ => None,
        }
    }

    /// Every `config.json`, with its place in the checkpoint.
    pub(crate) fn configs(&self) -> impl Iterator<Item = (String, &Document)> {
        let of = |part| Some((Part::place(part, CONFIG), part.config.as_ref()?));
        self.parts.iter().filter_map(of)
    }

    /// The folders of the components of a pipeline, also of those without weights.
    pub(super) fn components(&self) -> Vec<&str> {
        let names = self.pipeline.as_ref().map(components);
        names.and_then(Result::ok).unwrap_or_default()
    }

    /// The part of a shard.
    pub fn part_of(&self, shard: usize) -> &Part {
        &self.parts[self.shards[shard].part]
    }

    /// The last shard of the part that a new tensor of a name belongs to.
    pub fn home(&self, name: &str) -> Option<usize> {
        let is_home = |part: &Part| part.name.is_empty() || part.own_name(name) != name;
        let part = self.parts.iter().position(is_home)?;
        self.shards.iter().rposition(|shard| shard.part == part)
    }

    /// Where the file of a shard is in a result.
    pub(crate) fn result_place(&self, shard: usize) -> String {
        let (part, extension) = (self.part_of(shard), self.writer.extension());
        let own = &self.shards[shard];
        if !self.is_folder {
            return part.single_place(extension);
        }
        if own.file.container.name() == self.writer.name() {
            return part.place(&own.name);
        }
        let siblings: Vec<usize> = (0..self.shards.len())
            .filter(|other| self.shards[*other].part == own.part)
            .collect();
        match siblings.as_slice() {
            [_] => part.single_place(extension),
            several => {
                let number = several.iter().position(|other| *other == shard);
                part.shard_place(number.unwrap_or(0) + 1, several.len(), extension)
            }
        }
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
        let configs = self.configs().map(|(_, config)| config);
        let documents = configs.chain(&self.pipeline);
        self.weights().chain(documents.map(|read| &read.input))
    }

    /// Every index, with its place in the checkpoint.
    pub(crate) fn indices(&self) -> impl Iterator<Item = (String, &Arc<Input>)> {
        let indexed = self.parts.iter();
        let indexed = indexed.filter_map(|part| Some((part, &part.index.as_ref()?.input)));
        indexed.map(|(part, input)| (part.place(&file_name(input.path())), input))
    }

    /// The files of tensors, and the maps of them.
    pub(super) fn weights(&self) -> impl Iterator<Item = &Arc<Input>> {
        let indices = self.parts.iter().filter_map(|part| part.index.as_ref());
        let shards = self.shards.iter().map(|shard| &shard.file.input);
        shards.chain(indices.map(|index| &index.input))
    }

    /// A value of `config.json`, of its `text_config` where the top level has none; or of the
    /// `model_index.json` of a pipeline.
    pub fn configured(&self, key: &str) -> Option<&Value> {
        match self.parts.as_slice() {
            [part] if part.name.is_empty() => part.configured(key),
            _ => self.pipeline.as_ref()?.object.get(key),
        }
    }

    /// How the weights are quantised, if they are.
    pub fn quantisation(&self) -> Option<String> {
        let configured = |part: &'_ Part| match part.configured("quantization_config") {
            Some(Value::Object(quantisation)) => Some(quantisation.clone()),
            _ => None,
        };
        if let Some(quantisation) = self.parts.iter().find_map(configured) {
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
            _ if self.tied.is_some() => true,
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
        let named = |end| self.tensors().find(|tensor| is_output(&tensor.name, end));
        OUTPUTS.iter().find_map(|end| named(*end))
    }

    /// The name of the output embedding, where a torch file gave it as another name of the input
    /// embedding.
    pub fn dropped_output_embedding(&self) -> Option<&str> {
        self.tied.as_deref()
    }
}

/// Names of output embeddings.
const OUTPUTS: &[&str] = &[
    "lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "proj_out.weight",
];

fn is_output(name: &str, end: &str) -> bool {
    name.strip_suffix(end)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with("model."))
}

/// Whether a name is that of an output embedding.
pub(super) fn is_output_embedding(name: &str) -> bool {
    OUTPUTS.iter().any(|end| is_output(name, end))
}
