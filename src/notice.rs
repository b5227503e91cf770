//! What is odd but readable: a warning when inspecting and merging, a failure when checking.

use std::fmt;

use crate::printable::printable;

/// One oddity, with its place.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Notice {
    /// What kind of oddity.
    pub kind: NoticeKind,
    /// The file, as it was named by the caller.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The tensor, module or field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub item: Option<String>,
    /// What it is, in words.
    pub text: String,
}

/// The kinds of oddities; their names are stable, for scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NoticeKind {
    /// A factor has no elements.
    ZeroSized,
    /// Every value of an up factor (or of a factor of products) is zero: the module does nothing.
    AllZero,
    /// A NaN or an infinity in the adapter.
    NotFinite,
    /// A configuration field that is unknown, with a value that cannot matter.
    UnknownField,
    /// A replacement with another number of rows than the base's tensor.
    RowsDiffer,
    /// A whole tensor that the base does not have.
    AddedTensor,
    /// A name with characters that could act on a terminal.
    OddName,
    /// A negative alpha.
    NegativeAlpha,
    /// The adapter names another base than the one given.
    OtherBase,
    /// The adapter was trained on a quantised base.
    QuantisedTraining,
    /// A touched tensor of the base holds NaN or infinity.
    BaseNotFinite,
    /// The rank of the tensors is not the rank of the configuration.
    RankDiffers,
    /// The configuration asks for biases that the file does not hold.
    BiasMissing,
    /// Something in the configuration contradicts the tensors.
    Contradiction,
    /// Training state that has no part in the result.
    Unused,
    /// The strength does not apply to whole replacements.
    StrengthIgnored,
    /// The strength interpolates where other tools scale inside the formula.
    StrengthInterpolates,
    /// Tied embeddings had to be untied.
    Untied,
    /// Something of the adapter was left out because a flag allowed it.
    LeftOut,
    /// The adapter folder brings its own tokenizer.
    OwnTokenizer,
    /// How the layout of the base was understood.
    BaseLayout,
    /// Names of the base that stand for a tensor which is kept under another name.
    SharedTensor,
    /// What a file of the base holds besides weights, and is not in the result.
    NotWeights,
    /// The averaged copy of changed weights in a checkpoint of a training was left alone.
    EmaCopy,
    /// There is no configuration beside the weights, and its scale was taken otherwise.
    ConfigMissing,
    /// A copy of the base's own weight in the adapter, which a format that cannot hold it need not say.
    BaseCopy,
    /// A result that some readers of its format load nothing, or not all of.
    LoadedByFew,
    /// What is known to be wrong with the numbers of another tool, which were asked for.
    KnownWrong,
    /// The method can be described but not merged.
    NotMergeable,
    /// What an adapter changed without an inverse stays in the result.
    NotTakenOut,
    /// Values that no base becomes by the merge that was stated.
    NotThisMerge,
}

impl NoticeKind {
    /// Whether it makes `check` fail. The others report what was done, not what is odd about a file.
    pub fn is_finding(self) -> bool {
        !matches!(
            self,
            NoticeKind::StrengthIgnored
                | NoticeKind::StrengthInterpolates
                | NoticeKind::Untied
                | NoticeKind::OwnTokenizer
                | NoticeKind::BaseLayout
                | NoticeKind::SharedTensor
                | NoticeKind::NotWeights
                | NoticeKind::EmaCopy
                | NoticeKind::LoadedByFew
                | NoticeKind::BaseCopy
                | NoticeKind::NotTakenOut
                | NoticeKind::NotThisMerge
                | NoticeKind::KnownWrong
        )
    }
}

impl fmt::Display for NoticeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The name that it has in JSON.
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => f.write_str(&name),
            _ => Err(fmt::Error),
        }
    }
}

impl Notice {
    /// A notice without a place.
    pub fn new(kind: NoticeKind, text: impl Into<String>) -> Self {
        Notice {
            kind,
            file: None,
            item: None,
            text: text.into(),
        }
    }

    /// Names the tensor, module or field.
    pub fn on(mut self, item: impl Into<String>) -> Self {
        self.item = Some(item.into());
        self
    }

    /// Names the file.
    pub fn in_file(mut self, file: impl AsRef<std::path::Path>) -> Self {
        self.file
            .get_or_insert_with(|| file.as_ref().to_string_lossy().into_owned());
        self
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Part by part, so that a name of any length leaves the text in sight.
        for part in [&self.file, &self.item].into_iter().flatten() {
            write!(f, "{}: ", printable(part))?;
        }
        f.write_str(&printable(&self.text))
    }
}
