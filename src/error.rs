//! What can go wrong, where, and who has to act.
//!
//! An [`Error`] is a [`Reason`] with a place (file, and tensor, key or field), the whole list of
//! cases where there are several, and a hint. The reasons are one table, grouped by [`Kind`]; a kind
//! is what a caller can act on, and what the command line maps to its exit code.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::printable::printable;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Something that failed: reason, place, cases and hint.
pub struct Error(Box<Inner>);

struct Inner {
    reason: Reason,
    file: Option<PathBuf>,
    item: Option<String>,
    cases: Vec<String>,
    hint: Option<String>,
    source: Option<std::io::Error>,
}

/// Who has to act, and therefore the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The call itself is wrong (exit code 2).
    Usage,
    /// The operating system refused to read or write (3).
    Io,
    /// A file is not what its bytes claim to be (4).
    Malformed,
    /// A file is sound, but holds something that is not supported (5).
    Unsupported,
    /// Parts that should agree do not: shapes, types, adapter and base (6).
    Mismatch,
    /// A module or tensor of the adapter has no place in the base (7).
    Unresolved,
    /// A stated limit was reached (8).
    Limit,
    /// The output cannot be written there (9).
    Output,
    /// The result would hold a NaN or an infinity that the base did not hold (10).
    NonFinite,
    /// An input changed while it was being read (11).
    Changed,
    /// The run was interrupted; nothing changed (12).
    Interrupted,
}

impl Kind {
    /// The process exit code that stands for this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::Io => 3,
            Kind::Malformed => 4,
            Kind::Unsupported => 5,
            Kind::Mismatch => 6,
            Kind::Unresolved => 7,
            Kind::Limit => 8,
            Kind::Output => 9,
            Kind::NonFinite => 10,
            Kind::Changed => 11,
            Kind::Interrupted => 12,
        }
    }

    /// The name of the kind in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Usage => "usage",
            Kind::Io => "io",
            Kind::Malformed => "malformed",
            Kind::Unsupported => "unsupported",
            Kind::Mismatch => "mismatch",
            Kind::Unresolved => "unresolved",
            Kind::Limit => "limit",
            Kind::Output => "output",
            Kind::NonFinite => "non-finite",
            Kind::Changed => "changed",
            Kind::Interrupted => "interrupted",
        }
    }

    /// Every kind, in the order of the exit codes.
    pub const ALL: &'static [Kind] = &[
        Kind::Usage,
        Kind::Io,
        Kind::Malformed,
        Kind::Unsupported,
        Kind::Mismatch,
        Kind::Unresolved,
        Kind::Limit,
        Kind::Output,
        Kind::NonFinite,
        Kind::Changed,
        Kind::Interrupted,
    ];
}

/// Makes [`Reason`], its texts and its kinds from one table.
macro_rules! reasons {
    ($( $kind:ident { $( $name:ident $({ $($field:ident : $type:ty),* })? => $text:literal, )* } )*) => {
        /// Why something failed; the texts are fragments that read well after "file: place: ".
        #[derive(Debug)]
        #[non_exhaustive]
        #[allow(missing_docs, reason = "the text beside each name says it")]
        pub enum Reason { $($( $name $({ $($field: $type),* })?, )*)* }

        impl Reason {
            /// Who has to act.
            pub fn kind(&self) -> Kind {
                match self { $($( Reason::$name $({ $($field: _),* })? => Kind::$kind, )*)* }
            }
        }

        impl fmt::Display for Reason {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self { $($( Reason::$name $({ $($field),* })? => write!(f, $text), )*)* }
            }
        }
    };
}

reasons! {
    Usage {
        NoAdapter => "no adapter was given",
        BadPattern { pattern: String, problem: String } => "the pattern `{pattern}` is not a regular expression: {problem}",
        NothingSelected => "no module of the adapter is selected",
        StrengthNotFinite { strength: f64 } => "strength must be a finite number, not {strength}",
        BadSize { text: String } => "`{text}` is not a size such as 5GB or 512MiB",
        BadOption { text: String, problem: String } => "`{text}`: {problem}",
        SeveralVariants { count: usize } => "the weights are there in {count} variants",
        NoVariant { name: String } => "no weights are there in the variant `{name}`",
        ThreadPool { problem: String } => "cannot start the worker threads: {problem}",
    }
    Io {
        Open => "cannot open",
        Read => "cannot read",
        Write => "cannot write",
        Create => "cannot create",
        Sync => "cannot make durable",
        Rename => "cannot move into place",
        Inspect => "cannot look at",
        Lock => "cannot lock",
        DeviceFailed { device: String, problem: String } => "the device {device} failed: {problem}",
        ReadBack => "what was read back is not what was written",
    }
    Malformed {
        Empty => "the file is empty",
        LfsPointer => "this is a Git LFS pointer, not the file that it stands for",
        Html => "this is a web page, not a model file",
        Json => "this is a JSON text, not a file of tensors",
        UnknownContainer => "no known kind of tensor file starts with these bytes",
        HeaderCut { length: u64 } => "the file ends after {length} bytes, before its header does",
        HeaderBeyondFile { header: u64, length: u64 } => "the header claims {header} bytes, the whole file has {length}",
        HeaderStart => "the header does not start with `{{`",
        NotJson { problem: String } => "not valid JSON: {problem}",
        NotUtf8 { at: usize } => "not valid UTF-8 at byte {at}",
        DuplicateKey { key: String } => "the key `{key}` appears twice",
        NotAnObject => "expected a JSON object",
        FieldType { expected: &'static str } => "expected {expected}",
        FieldMissing { field: &'static str } => "the field `{field}` is missing",
        FieldValue { problem: String } => "{problem}",
        ShapeOverflow { shape: Vec<usize> } => "the shape {shape:?} overflows the address space",
        OffsetsReversed { start: u64, end: u64 } => "the data offsets [{start}, {end}] run backwards",
        OffsetsBeyondFile { end: u64, length: u64 } => "the data ends at {end}, but the file has only {length} bytes of data",
        SizeMismatch { expected: u64, found: u64 } => "shape and type need {expected} bytes, the data offsets span {found}",
        PartialByte { shape: Vec<usize> } => "the shape {shape:?} does not fill whole bytes",
        Overlap { other: String } => "its data overlap those of `{other}`",
        Hole { start: u64, end: u64 } => "the bytes {start} to {end} of the data belong to no tensor",
        TrailingBytes { count: u64 } => "{count} bytes follow the last tensor",
        EmptyName => "a tensor has an empty name",
        Structure { problem: String } => "{problem}",
        NoTensors => "the file holds no tensor",
        ShardName { name: String } => "the index names the shard `{name}`, which is not a plain file name",
        ComponentName { name: String } => "it names the component `{name}`, which is not a plain folder name",
        ShardMissing { name: String } => "the index names the shard `{name}`, which is not there",
        NotInShard { shard: String } => "the index places it in `{shard}`, which does not hold it",
        TwoShards { first: String, second: String } => "it is in both `{first}` and `{second}`",
        LinkOutside => "it is a link that leads out of the folder; what it leads to is not copied into a result",
        NoAdapterConfig => "there is no `adapter_config.json` beside the weights",
        NoAdapterWeights => "no `adapter_model.safetensors` and no other single file of tensors is in this folder",
        RoleMissing { role: &'static str, suffix: String } => "the {role} factor (`{suffix}`) is missing",
        UnknownKeys { count: usize } => "{count} keys are not understood",
        FactorShape { problem: String } => "{problem}",
        Zip { problem: &'static str } => "the zip archive is damaged: {problem}",
        DuplicateMember => "the archive holds it twice",
        Checksum => "its bytes do not have the checksum that the archive states",
        Pickle { at: usize, problem: String } => "the pickle is wrong at byte {at}: {problem}",
        PickleCut => "the pickle ends before it is complete",
        StorageMissing => "the pickle refers to it, but it is not in the file",
        StorageSize { expected: u64, found: u64 } => "the pickle says {expected}, the file {found} bytes or elements",
        NotUndo => "this is no undo file of a merge",
        UndoHash => "the undo file is cut or damaged: its hash is not that of its bytes",
        OutsideStorage { bytes: u64 } => "it does not lie within the {bytes} bytes of its storage",
    }
    Unsupported {
        NoDevice { device: String, problem: String } => "there is no device `{device}`: {problem}",
        Factorisation { problem: String } => "{problem}",
        Drawing { problem: String } => "it cannot be drawn: {problem}",
        NoDirection { output: usize } => "output {output} is zero, so it has no direction that DoRA could scale",
        NotFitted { method: &'static str } => "{method} cannot be fitted to a change of weights",
        NotScaled { count: usize } => "{count} modules cannot be scaled without their base",
        UndoVersion { version: u8 } => "an undo file of version {version}, which this program does not know",
        NoInverse { count: usize } => "{count} parts of the adapters cannot be taken out again without an undo file",
        NotARegularFile { what: &'static str } => "this is {what}, not a regular file",
        Container { name: &'static str } => "this is a {name}, which cannot be read yet",
        BaseContainer { name: &'static str } => "this is a {name}, which cannot be a base",
        ZipMember { what: &'static str } => "it is {what}, which is not read",
        PickleName { name: String } => "the pickle asks for `{name}`; only tensors and plain values are read, and nothing is ever executed",
        PickleInstruction { code: u8, at: usize } => "the pickle holds the instruction {code:#04x} at byte {at}, which no torch checkpoint needs",
        Stored { problem: String } => "{problem}",
        ScaleMissing => "no file says the scale of this adapter (`lora_parameters.scale`)",
        AlphaMissing => "no file says the alpha of this adapter, and so not its scale",
        Ordinals => "its factors are numbered in the order in which a training script met the layers; which layers these are no file says",
        InputVectors { what: String } => "{what} holds vectors for the input rather than a change of weights: there is nothing to merge",
        QuantisedTensors { count: usize } => "{count} tensors are quantised by blocks, which an adapter cannot be",
        Format { name: &'static str } => "this adapter is spelled as {name}, which can be inspected but not merged yet",
        FormatUnknown => "the spelling of this adapter is not recognised",
        NotAnAdapter => "this is a full checkpoint, not an adapter",
        Method { name: String } => "the method {name} is not supported",
        ConfigField { field: String, value: String, why: &'static str } => "`{field}` is {value}: {why}",
        UnknownConfigField { field: String, value: String } => "the field `{field}` ({value}) is unknown and may change the result",
        Initialisation { value: String, why: &'static str } => "`init_lora_weights` is {value}: {why}",
        QuantisedBase { how: String } => "the base is quantised ({how}); merge into the 16-bit original instead",
        TensorType { dtype: String } => "tensors of type {dtype} cannot be merged into",
        AdapterType { dtype: String } => "adapter tensors of type {dtype} are not supported",
        SharedEmbedding => "the file has no `output.weight`, so this tensor is the output embedding as well, which the adapter does not change",
        BothLayouts { first: String, second: String } => "both `{first}` and `{second}` are there, and they are not one layout",
        NoCheckpoint => "neither weights nor an index under a known name (`model.safetensors`, `pytorch_model.bin`, …) in this folder",
        OtherCheckpoint { found: String } => "only `{found}` is here, and this kind of checkpoint cannot be read yet",
        Losses { format: &'static str, count: usize } => "{format} cannot say {count} parts of the adapter",
        NotCombined { count: usize } => "{count} modules cannot be combined in this way",
        NotWritten { name: &'static str } => "{name} can be read, but is not written",
        ReplicationTwice => "an adapter with layer replication cannot be merged together with others",
        HeadsUnknown { tensor: String } => "how its rows lie in `{tensor}` depends on the number of heads, which no configuration beside the base tells",
        GroupedConvolution { adapter: usize, base: usize } => "a grouped convolution: the adapter sees {adapter} input channels, the base weight has {base}",
        OutputsTogether { role: &'static str } => "its {role} follows from all outputs together, which the base keeps in several places",
        MethodOnTarget { method: &'static str, what: &'static str } => "{method} on {what} is not supported",
        ConvertType { dtype: String } => "tensors of type {dtype} cannot be converted",
    }
    Mismatch {
        NotMerged { count: usize } => "{count} tensors are not those that the merge wrote",
        NotTheAdapter { name: String } => "no adapter that was given is `{name}`, which was merged",
        AdapterNotMerged => "this adapter is none of those that were merged",
        OtherStrength { given: f64, merged: f64 } => "it was merged at the strength {merged}, not {given}",
        OtherPatterns => "it was merged with other strengths by pattern",
        NotRestored => "what was restored is not what the base held",
        NotTuned { problem: String } => "it was not made from the base: {problem}",
        NotTogether { count: usize } => "{count} parts of the adapters do not go together",
        OtherModel => "the adapters are not of one model",
        Unmatched { count: usize } => "{count} tensors of base and tuned checkpoint have no difference",
        Shape { adapter: String, base: String } => "the adapter is for a weight of {adapter}, the base has {base}",
        NoBias => "the adapter changes its bias, but the base has none",
        ReplacementShape { adapter: Vec<usize>, base: Vec<usize> } => "the adapter replaces it with shape {adapter:?}, the base has {base:?}",
        PaddedShape { adapter: Vec<usize>, base: Vec<usize> } => "the adapter widens it to shape {adapter:?}, which the base's shape {base:?} cannot be widened to",
        TwoReplacements { first: String, second: String } => "`{first}` and `{second}` replace it differently",
        TwoModules { first: String, tensor: String } => "it and `{first}` both land on `{tensor}`",
        TokenRow { row: usize, rows: usize } => "token {row} is out of range: the embedding has {rows} rows",
        TokenCount { indices: usize, rows: usize } => "{indices} token indices, but {rows} rows of values",
        ReplicationRange { first: usize, last: usize, layers: usize } => "layer replication asks for layers {first}..{last}, the base has {layers}",
        SwappedArguments => "the base is an adapter and the adapter is a checkpoint: the two are swapped",
        BaseIsAdapter => "the base is an adapter, not a checkpoint",
        NameReserved { name: String } => "the result would hold a tensor named `{name}`, which a header cannot name",
        NameTaken { name: String } => "the result would hold two tensors named `{name}`",
    }
    Unresolved {
        NamesUnknown { count: usize } => "{count} modules have no known name in the target; --base or --family tells which model it is",
        NamesAmbiguous { count: usize } => "{count} modules have several names in the target; --family or --base tells which model it is",
        ArchitectureUnknown => "llama.cpp stores the rows of some models otherwise; --base or --family tells which model it is",
        OrderNeeded => "this format numbers its layers; --order says in which order (sd1, or a file)",
        HeadsNeeded => "how its rows are split depends on the number of heads; --base gives it",
        HeightNeeded { layer: String } => "it would be a part of `{layer}`, whose other parts are not there to tell its height; --base gives it",
        Modules { count: usize } => "{count} parts of the adapter have no place in the base",
        Ambiguous { count: usize } => "{count} parts of the adapter fit several tensors of the base",
    }
    Limit {
        DeviceMemory { device: String, bytes: usize } => "the device {device} has no room for {bytes} bytes, and they cannot be cut smaller",
        HeaderTooLarge { bytes: u64, limit: u64 } => "the header has {bytes} bytes, the limit is {limit}",
        FileTooLarge { bytes: u64, limit: u64 } => "{bytes} bytes, the limit is {limit}",
        TooDeep { limit: usize } => "nested deeper than {limit} levels",
        TooMany { what: &'static str, limit: usize } => "more than {limit} {what}",
        NameTooLong { bytes: usize, limit: usize } => "a name of {bytes} bytes, the limit is {limit}",
        PatternTooLarge { pattern: String } => "the pattern `{pattern}` is too large to compile",
        OutputHeaderTooLarge { bytes: u64 } => "the header of the output would have {bytes} bytes, more than readers accept",
        TooManyPatternSteps { pattern: String } => "matching the pattern `{pattern}` takes too many steps",
    }
    Output {
        OutputNameTwice { name: String } => "two modules would be written as `{name}`",
        Exists => "it is there already",
        IsInput { input: String } => "it is the input {input}",
        InsideInput { input: String } => "it lies inside the input {input}",
        ContainsInput { input: String } => "it contains the input {input}",
        IsLink => "it is a symbolic link; nothing is written through a link",
        WrongKind { found: &'static str, wanted: &'static str } => "it is {found}, the result is {wanted}",
        NotACheckpoint => "the folder that would be replaced does not look like a checkpoint",
        NoParent => "the folder that should hold it does not exist",
        NotWritable => "the folder that should hold it cannot be written to",
        NoSpace { needed: u64, free: u64 } => "{needed} bytes are needed, {free} are free",
        Busy => "another run is writing it",
        Appeared => "it was created by somebody else during the run; the result was discarded",
        BadName => "it has no usable file name",
    }
    NonFinite {
        DifferenceNotFinite => "the change of the weight holds NaN or infinity",
        ValuesNotFinite { count: u64, first: String } => "{count} values of the result are NaN or infinite where the base is finite, the first at {first}",
        AlphaNotFinite { value: String } => "alpha is {value}",
        FactorNotFinite { count: u64 } => "{count} values are NaN or infinite",
        FactorOverflow { count: usize, dtype: String } => "{count} values are too large for {dtype}, the type that they would be written in",
    }
    Changed {
        InputChanged => "the file changed while it was being read",
        InputShrank { wanted: u64, length: u64 } => "the file shrank while it was being read: byte {wanted} was wanted, {length} are left",
    }
    Interrupted {
        Stopped => "interrupted; nothing was changed",
    }
}

impl Error {
    /// An error without a place yet.
    pub fn new(reason: Reason) -> Self {
        Error(Box::new(Inner {
            reason,
            file: None,
            item: None,
            cases: Vec::new(),
            hint: None,
            source: None,
        }))
    }

    /// One error for several: the first of them, with all as its cases. Nothing if there are none.
    ///
    /// # Errors
    /// That one.
    pub fn of_all(mut problems: Vec<Error>) -> Result<()> {
        if problems.is_empty() {
            return Ok(());
        }
        let cases = problems.iter().map(Error::to_string).collect();
        Err(problems.swap_remove(0).with_cases(cases))
    }

    /// An error of the operating system.
    pub fn io(reason: Reason, source: std::io::Error) -> Self {
        let mut error = Error::new(reason);
        error.0.source = Some(source);
        error
    }

    /// Names the file, unless one is named already.
    pub fn in_file(mut self, file: impl AsRef<Path>) -> Self {
        self.0.file.get_or_insert_with(|| file.as_ref().to_owned());
        self
    }

    /// Names the tensor, key, field or module, unless one is named already.
    pub fn on(mut self, item: impl Into<String>) -> Self {
        self.0.item.get_or_insert_with(|| item.into());
        self
    }

    /// Lists all cases that the reason counts.
    pub fn with_cases(mut self, cases: Vec<String>) -> Self {
        self.0.cases = cases;
        self
    }

    /// Says what to do next.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Why it failed.
    pub fn reason(&self) -> &Reason {
        &self.0.reason
    }

    /// Who has to act.
    pub fn kind(&self) -> Kind {
        self.0.reason.kind()
    }

    /// The reason with the operating system's own words, without the place.
    pub fn cause(&self) -> String {
        match &self.0.source {
            Some(source) => format!("{}: {source}", self.0.reason),
            None => self.0.reason.to_string(),
        }
    }

    /// The file in question.
    pub fn file(&self) -> Option<&Path> {
        self.0.file.as_deref()
    }

    /// The tensor, key, field or module in question.
    pub fn item(&self) -> Option<&str> {
        self.0.item.as_deref()
    }

    /// All cases, where the reason stands for several.
    pub fn cases(&self) -> &[String] {
        &self.0.cases
    }

    /// All cases, where nothing else of the error is wanted any more.
    pub(crate) fn into_cases(self) -> Vec<String> {
        self.0.cases
    }

    /// What to do next.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref().or_else(|| self.0.reason.hint())
    }
}

impl Reason {
    /// The next step that a reason always has.
    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Reason::LfsPointer => "fetch the real file with `git lfs pull`",
            Reason::Html => "download the file itself instead of its page",
            Reason::Exists => "use --force to replace it, or name another output",
            Reason::Busy => "wait for the other run, or name another output",
            Reason::ValuesNotFinite { .. } => {
                "the adapter or its strength overflows the output type; --allow-nonfinite writes the values anyway, --dtype f32 gives them room"
            }
            Reason::OutputNameTwice { .. } => {
                "a format that does not name the parts of a pipeline holds one of them: choose it with --only"
            }
            Reason::FactorOverflow { .. } => "--dtype f32 gives them room",
            Reason::UnknownConfigField { .. } => {
                "if you know that it does not matter, accept it with --allow-unknown-config NAME"
            }
            Reason::UnknownKeys { .. } => {
                "nothing of an adapter is left out in silence; these keys belong to a method or a version that is not supported"
            }
            Reason::NoAdapterConfig => {
                "PEFT writes the two files together; the config holds rank and alpha"
            }
            Reason::NotACheckpoint => "remove the folder yourself, or name another output",
            Reason::ScaleMissing => {
                "if you know the scale, write it into an `adapter_config.json` beside the weights: {\"lora_parameters\": {\"scale\": 20.0}}; the scripts of MLX used 20.0, the oldest 2.0"
            }
            Reason::AlphaMissing => "if you know it, state it with --adapter-alpha",
            Reason::Ordinals => {
                "--order sd1 says it for Stable Diffusion 1 and 2; --order FILE names a file with the path of a layer on each line (`unet.down_blocks.0…`)"
            }
            Reason::InputVectors { .. } => {
                "load it beside the model, in the tool that runs the model"
            }
            Reason::SeveralVariants { .. } => {
                "name one with --variant; `default` is the one without a name"
            }
            Reason::SharedEmbedding => {
                "merge into the safetensors model, which can untie the two, and convert the result"
            }
            Reason::DeviceFailed { .. } | Reason::DeviceMemory { .. } => {
                "nothing was written; `--device cpu` does without the device"
            }
            Reason::SwappedArguments => "exchange --base and --adapter",
            _ => return None,
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Part by part, so that a name of any length leaves the reason in sight.
        if let Some(file) = &self.0.file {
            write!(f, "{}: ", printable(&file.to_string_lossy()))?;
        }
        if let Some(item) = &self.0.item {
            write!(f, "{}: ", printable(item))?;
        }
        f.write_str(&printable(&self.0.reason.to_string()))?;
        if let Some(source) = &self.0.source {
            write!(f, ": {}", printable(&source.to_string()))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} [{}]", self.kind().name())?;
        for case in &self.0.cases {
            write!(f, "\n  {}", printable(case))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}
