//! What an undo file says: the base, piece by piece, and how it was merged.

use std::collections::HashSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::adapter::{Geometry, Module};
use crate::error::{Error, Reason, Result};
use crate::tensor::{DType, Float, elements};

/// Rows that a block has at least, as merges cut them: a claim of more blocks would cost more memory than it is worth.
const LEAST_HEIGHT: usize = 8;

/// BLAKE3 as 64 hexadecimal digits.
pub(crate) type Hash = String;

/// Bytes in the undo file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Section {
    pub(crate) offset: u64,
    /// As they lie there.
    pub(crate) stored: u64,
    /// As they are; deflated where that differs.
    pub(crate) length: u64,
}

/// All of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Directory {
    /// Who wrote it.
    pub(crate) writer: String,
    /// In the order in which they were merged.
    pub(crate) adapters: Vec<AdapterEntry>,
    /// Whether the base is a folder.
    pub(crate) folder: bool,
    /// The files of tensors of the base.
    pub(crate) files: Vec<FileEntry>,
    /// The tensors of the base.
    pub(crate) tensors: Vec<TensorEntry>,
    /// Files of text of the base that the result has otherwise or not at all.
    pub(crate) texts: Vec<TextEntry>,
    /// Files that were copied.
    pub(crate) companions: Vec<CopyEntry>,
}

/// An adapter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdapterEntry {
    pub(crate) name: String,
    /// Of its files.
    pub(crate) hashes: Vec<Hash>,
    pub(crate) strength: f64,
    /// Other strengths, by pattern.
    pub(crate) strength_for: Vec<(String, f64)>,
}

/// A file of tensors, from its first byte to its last.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    pub(crate) place: String,
    pub(crate) bytes: u64,
    pub(crate) pieces: Vec<Piece>,
}

/// A stretch of a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Piece {
    /// Headers, and whatever else belongs to no tensor.
    Bytes(Section),
    /// A tensor, by its number.
    Tensor(usize),
}

/// A tensor of the base.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) hash: Hash,
    pub(crate) how: How,
}

/// How a tensor of the base is restored.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum How {
    /// It is the merged one.
    Same(Merged),
    /// It lies here.
    Kept(Section),
    /// From the merged one and what was added.
    Coded(Box<Coded>),
}

impl How {
    /// The tensor of the result that it needs.
    pub(crate) fn merged(&self) -> Option<&Merged> {
        match self {
            How::Same(merged) => Some(merged),
            How::Coded(coded) => Some(&coded.merged),
            How::Kept(_) => None,
        }
    }
}

/// A tensor of the result.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Merged {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) hash: Hash,
}

/// A tensor whose blocks of rows are kept as what tells candidates apart.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Coded {
    pub(crate) merged: Merged,
    /// The type of the base.
    pub(crate) dtype: DType,
    /// Columns of the matrix, and rows of a block.
    pub(crate) columns: usize,
    pub(crate) height: usize,
    /// The blocks, one behind the other, and their lengths.
    pub(crate) payload: Section,
    pub(crate) lengths: Section,
    /// What was added, in order.
    pub(crate) modules: Vec<ModuleEntry>,
}

/// A module on rows of a tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModuleEntry {
    pub(crate) adapter: usize,
    pub(crate) module: usize,
    pub(crate) path: String,
    pub(crate) scale: f64,
    pub(crate) strength: f64,
    pub(crate) rows: Range<usize>,
    pub(crate) geometry: Geometry,
    pub(crate) outputs: Option<Vec<Range<usize>>>,
}

/// A file of text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextEntry {
    pub(crate) place: String,
    pub(crate) text: Section,
}

/// A file that the result has as it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CopyEntry {
    pub(crate) place: String,
    pub(crate) hash: Hash,
}

impl Coded {
    /// The type of the base.
    pub(crate) fn from(&self) -> Option<Float> {
        Float::of(self.dtype)
    }

    /// Rows of the matrix.
    pub(crate) fn rows(&self) -> usize {
        let elements: usize = self.merged.shape.iter().product();
        elements.checked_div(self.columns).unwrap_or(0)
    }

    /// Blocks of rows.
    pub(crate) fn blocks(&self) -> usize {
        self.rows().div_ceil(self.height.max(1))
    }
}

/// Whether a text is the path of a file in a checkpoint: a plain name, perhaps in one plain folder.
fn is_place(place: &str) -> bool {
    let plain = |name: &str| {
        !name.is_empty()
            && !name.starts_with('.')
            && !name.contains(['/', '\\', '\0', ':'])
            && name.len() < 256
    };
    let mut parts = place.split('/');
    let (first, second, third) = (parts.next(), parts.next(), parts.next());
    first.is_some_and(plain) && second.is_none_or(plain) && third.is_none()
}

/// What is wrong with a directory.
fn wrong<T>(problem: impl Into<String>) -> Result<T> {
    let problem = problem.into();
    Err(Error::new(Reason::Structure { problem }))
}

impl Directory {
    /// Checks that everything refers to what is there, before anything is allocated for it. `end` is where the
    /// sections of the file end.
    ///
    /// # Errors
    /// [`Reason::Structure`].
    pub(crate) fn check(&self, start: u64, end: u64) -> Result<()> {
        let section = |section: &Section| {
            let inside = section.offset >= start
                && section
                    .offset
                    .checked_add(section.stored)
                    .is_some_and(|last| last <= end);
            match inside && section.stored <= section.length {
                true => Ok(()),
                false => wrong("a section lies outside the file"),
            }
        };
        let places = self.files.iter().map(|file| &file.place);
        let places = places.chain(self.texts.iter().map(|text| &text.place));
        let mut seen = HashSet::new();
        for place in places.chain(self.companions.iter().map(|copy| &copy.place)) {
            if !is_place(place) || !seen.insert(place) {
                return wrong(format!("`{place}` is no place of a file, or one twice"));
            }
        }
        let mut used = vec![false; self.tensors.len()];
        for file in &self.files {
            let mut sum = 0u64;
            for piece in &file.pieces {
                let bytes = match piece {
                    Piece::Bytes(bytes) => {
                        section(bytes)?;
                        bytes.length
                    }
                    Piece::Tensor(number) => match self.tensors.get(*number) {
                        Some(tensor) if !std::mem::replace(&mut used[*number], true) => {
                            tensor.bytes
                        }
                        _ => return wrong("a piece is of no tensor, or of one twice"),
                    },
                };
                sum = match sum.checked_add(bytes) {
                    Some(sum) => sum,
                    None => return wrong("the pieces of a file overflow"),
                };
            }
            if sum != file.bytes {
                return wrong(format!("the pieces of `{}` are not the file", file.place));
            }
        }
        for text in &self.texts {
            section(&text.text)?;
        }
        for tensor in &self.tensors {
            tensor
                .check(&section, &self.adapters)
                .map_err(|e| e.on(&*tensor.name))?;
        }
        Ok(())
    }
}

impl TensorEntry {
    fn check(
        &self,
        section: &dyn Fn(&Section) -> Result<()>,
        adapters: &[AdapterEntry],
    ) -> Result<()> {
        match &self.how {
            How::Same(_) => Ok(()),
            How::Kept(kept) => {
                section(kept)?;
                match kept.stored == kept.length && kept.length == self.bytes {
                    true => Ok(()),
                    false => wrong("what is kept of a tensor is not the tensor"),
                }
            }
            How::Coded(coded) => {
                section(&coded.payload)?;
                section(&coded.lengths)?;
                let (Some(from), Some(_)) = (coded.from(), Float::of(coded.merged.dtype)) else {
                    return wrong("a coded tensor has no arithmetic");
                };
                let count = elements(&coded.merged.shape).unwrap_or(usize::MAX);
                let fits = coded.height >= LEAST_HEIGHT
                    && coded.columns > 0
                    && coded.columns.checked_mul(coded.height).is_some_and(|block| block < 1 << 31)
                    && count.is_multiple_of(coded.columns)
                    && count.checked_mul(from.size()).map(|bytes| bytes as u64) == Some(self.bytes)
                    // Every block has a length of a byte at least.
                    && coded.blocks() as u64 <= coded.lengths.length
                    && coded.payload.stored == coded.payload.length;
                if !fits {
                    return wrong("the blocks of a coded tensor are not the tensor");
                }
                let rows = coded.rows();
                let inside = |module: &ModuleEntry| {
                    module.adapter < adapters.len()
                        && module.rows.start <= module.rows.end
                        && module.rows.end <= rows
                        && module.geometry.rows == module.rows.len()
                        && module.geometry.columns == coded.columns
                        && module.strength.is_finite()
                };
                match coded.modules.iter().all(inside) {
                    true => Ok(()),
                    false => wrong("a module lies outside its tensor"),
                }
            }
        }
    }
}

impl ModuleEntry {
    /// The module among those of its adapter: at its number, where that is still its path, or the only one of its path.
    pub(crate) fn find<'a>(&self, modules: &'a [Module]) -> Option<&'a Module> {
        let is_it = |module: &&Module| module.path == self.path && module.scale.value == self.scale;
        modules.get(self.module).filter(is_it)
    }
}
