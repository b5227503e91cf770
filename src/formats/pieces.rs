//! Modules put together from tensors that come in any order, for formats that name each tensor's part.

use std::collections::HashMap;

use super::{Found, Summary};
use crate::adapter::{Adapter, Facts, Layer, Method, Module, Padding, Replacement, Role, Scale};
use crate::error::{Error, Reason, Result};
use crate::methods::{dora, full, lora, replaced};
use crate::naming::Spelling;
use crate::notice::{Notice, NoticeKind};
use crate::printable::acts_on_a_terminal;
use crate::tensor::{DType, Float, Tensor, widen};

/// What a tensor is to its module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Piece {
    /// A factor of LoRA or DoRA.
    Factor(Role),
    /// A whole difference.
    Whole(Role),
    /// The numerator of the scale: one element.
    Alpha,
    /// Learned norms, whose shape tells the axis.
    DoraScale,
    /// What takes the place of the weight.
    Value,
    /// The shape that the weight is widened to with zeros: integers.
    Shape,
    /// A tensor of a method that is not read.
    Other(&'static str),
}

impl Piece {
    pub(super) const DOWN: Piece = Piece::Factor(lora::DOWN);
    pub(super) const UP: Piece = Piece::Factor(lora::UP);
}

/// Keys that belong to no module, how they start, and what they are: OneTrainer's embeddings, and the
/// notes that tools for sliders keep.
const ASIDE: &[(&str, &str)] = &[
    (
        "bundle_emb.",
        "an embedding in the file, which is not merged",
    ),
    ("_aux.", "a note of a training tool"),
];

/// Most axes of a weight.
const AXES: usize = 8;

/// Tensors as they come in, and what they make.
pub(super) struct Pieces {
    spelling: Spelling,
    modules: Vec<Parts>,
    order: HashMap<String, usize>,
    unknown: Vec<String>,
    adapter: Adapter,
}

#[derive(Default)]
struct Parts {
    path: String,
    factors: Vec<(Role, Tensor)>,
    whole: Vec<(Role, Tensor)>,
    alpha: Option<Tensor>,
    dora_scale: Option<Tensor>,
    value: Option<Tensor>,
    shape: Option<Tensor>,
    other: Option<&'static str>,
}

/// What a configuration says about a module.
#[derive(Default)]
pub(super) struct Told {
    pub(super) scale: Option<Scale>,
    /// The numerator of the scale, over the rank of the tensors; the rank itself where there is none.
    pub(super) alpha: Option<f64>,
    /// How many factors the down factor of a fused layer holds, each of the rank that counts.
    pub(super) parts: usize,
    pub(super) dora: bool,
    pub(super) embedding: bool,
}

impl Pieces {
    pub(super) fn new(spelling: Spelling) -> Self {
        Pieces {
            spelling,
            modules: Vec::new(),
            order: HashMap::new(),
            unknown: Vec::new(),
            adapter: Adapter::default(),
        }
    }

    /// A tensor whose key no rule takes apart.
    pub(super) fn unknown(&mut self, tensor: &Tensor) {
        let aside = ASIDE
            .iter()
            .find(|(start, _)| tensor.name.starts_with(start));
        match aside {
            Some((_, what)) => self.aside(tensor, what),
            None => self.unknown.push(tensor.name.clone()),
        }
    }

    /// A tensor that belongs to no module, and what it is.
    pub(super) fn aside(&mut self, tensor: &Tensor, what: &str) {
        self.adapter.unused.push(tensor.clone());
        self.notices([Notice::new(NoticeKind::Unused, what).on(&*tensor.name)]);
    }

    /// A weight that is widened with zeros, as a tensor tells.
    pub(super) fn pad(&mut self, path: String, shape: Vec<usize>, tensor: &Tensor) {
        self.adapter.paddings.push(Padding {
            path,
            spelling: self.spelling,
            shape,
            tensor: tensor.clone(),
        });
    }

    /// What is odd.
    pub(super) fn notices(&mut self, notices: impl IntoIterator<Item = Notice>) {
        self.adapter.notices.extend(notices);
    }

    /// A whole tensor in place of the base's.
    pub(super) fn replace(&mut self, replacement: Replacement) {
        self.adapter.replacements.push(replacement);
    }

    /// A tensor of a module.
    pub(super) fn add(&mut self, path: String, piece: Piece, tensor: &Tensor) {
        let index = *self.order.entry(path.clone()).or_insert_with(|| {
            self.modules.push(Parts {
                path,
                ..Parts::default()
            });
            self.modules.len() - 1
        });
        let parts = &mut self.modules[index];
        let place = |list: &mut Vec<(Role, Tensor)>, role: Role| {
            let free = list.iter().all(|(known, _)| *known != role);
            list.push((role, tensor.clone()));
            free
        };
        let free = match piece {
            Piece::Factor(role) => place(&mut parts.factors, role),
            Piece::Whole(role) => place(&mut parts.whole, role),
            Piece::Alpha => parts.alpha.replace(tensor.clone()).is_none(),
            Piece::DoraScale => parts.dora_scale.replace(tensor.clone()).is_none(),
            Piece::Value => parts.value.replace(tensor.clone()).is_none(),
            Piece::Shape => parts.shape.replace(tensor.clone()).is_none(),
            Piece::Other(method) => {
                parts.other = Some(method);
                true
            }
        };
        if !free {
            let key = format!("{} (a second tensor in one place)", tensor.name);
            self.unknown.push(key);
        }
    }

    /// The adapter.
    ///
    /// # Errors
    /// All keys that are not understood, all modules of other methods, or all modules that are broken.
    pub(super) fn finish(
        mut self,
        found: &Found,
        facts: Facts,
        told: impl Fn(&str) -> Result<Told>,
    ) -> Result<Adapter> {
        if !self.unknown.is_empty() {
            let reason = Reason::UnknownKeys {
                count: self.unknown.len(),
            };
            return Err(Error::new(reason).with_cases(self.unknown));
        }
        let others = self.modules.iter().filter_map(|parts| {
            let method = parts.other?;
            Some((method, format!("{}: {method}", parts.path)))
        });
        let (mut methods, cases): (Vec<&str>, Vec<String>) = others.unzip();
        if !cases.is_empty() {
            methods.sort_unstable();
            methods.dedup();
            let name = methods.join(", ");
            return Err(Error::new(Reason::Method { name }).with_cases(cases));
        }
        let mut problems = Vec::new();
        for parts in std::mem::take(&mut self.modules) {
            if let Err(error) = self.module(parts, &told) {
                problems.push(error);
            }
        }
        Error::of_all(problems)?;
        self.adapter.facts = facts;
        self.adapter.notices.extend(oddities(found));
        for notice in &mut self.adapter.notices {
            *notice = notice.clone().in_file(found.file.input.path());
        }
        Ok(self.adapter)
    }

    fn module(&mut self, parts: Parts, told: &impl Fn(&str) -> Result<Told>) -> Result<()> {
        let Parts {
            path,
            mut factors,
            whole,
            alpha,
            dora_scale,
            value,
            shape,
            ..
        } = parts;
        if let Some(shape) = &shape {
            self.pad(path.clone(), integers(shape)?, shape);
        }
        let spelling = self.spelling;
        let mut push = |method: &'static dyn Method, parameters, scale| -> Result<()> {
            let module = Module::new(path.clone(), method, parameters, scale, Layer::Dense)?;
            self.adapter.modules.push(module.spelled(spelling));
            Ok(())
        };
        let replaced = value.is_some();
        if let Some(value) = value {
            push(
                &replaced::REPLACED,
                vec![(replaced::VALUE, value)],
                Scale::ONE,
            )?;
        }
        let low_rank = !factors.is_empty() || dora_scale.is_some();
        if !whole.is_empty() {
            push(&full::FULL, whole, Scale::ONE)?;
        } else if !low_rank && !replaced && shape.is_none() {
            // An alpha alone: let the method say what is missing.
            push(&lora::LORA, factors.clone(), Scale::ONE)?;
        }
        if !low_rank {
            // Differences have no scale.
            self.adapter.unused.extend(alpha.inspect(|alpha| {
                let text = "an alpha, which whole differences and values do not have";
                let notice = Notice::new(NoticeKind::Unused, text).on(&*alpha.name);
                self.adapter.notices.push(notice);
            }));
            return Ok(());
        }
        let get = |role| factors.iter().find(|(known, _)| *known == role);
        let rank = get(lora::DOWN).map(|(_, down)| down.dimension(0));
        let told = told(&path)?;
        let rank = rank.map(|rank| rank / told.parts.max(1));
        let scale = match (alpha, told.scale, rank) {
            (Some(alpha), Some(_), _) => {
                let problem = "both the file's metadata and a tensor state its alpha".to_owned();
                return Err(alpha.error(Reason::FieldValue { problem }));
            }
            (_, _, Some(0)) => {
                let problem = "the down factor has rank 0".to_owned();
                return Err(Error::new(Reason::FactorShape { problem }).on(&*path));
            }
            (Some(alpha), None, Some(rank)) => Scale::of(self.alpha(&alpha)?, rank, false),
            (None, Some(scale), _) => scale,
            (None, None, Some(rank)) => Scale::of(told.alpha.unwrap_or(rank as f64), rank, false),
            (_, None, None) => Scale::ONE, // the method will miss the factor
        };
        if let Some(norms) = dora_scale {
            let role = axis_of(&norms, &factors)?;
            factors.push((role, norms));
        }
        let has_norms = [dora::MAGNITUDE, dora::INPUT_MAGNITUDE]
            .iter()
            .any(|role| factors.iter().any(|(known, _)| known == role));
        let method: &'static dyn Method = match told.dora || has_norms {
            true => &dora::DORA,
            false => &lora::LORA,
        };
        let layer = match told.embedding {
            true => Layer::Embedding,
            false => Layer::Dense,
        };
        let module = Module::new(path, method, factors, scale, layer)?;
        self.adapter.modules.push(module.spelled(spelling));
        Ok(())
    }

    fn alpha(&mut self, tensor: &Tensor) -> Result<f64> {
        let alpha = one_element(tensor)?;
        if !alpha.is_finite() {
            let value = alpha.to_string();
            return Err(tensor.error(Reason::AlphaNotFinite { value }));
        }
        let notice = |kind, text: &str| Notice::new(kind, text).on(&*tensor.name);
        if alpha == 0.0 {
            let text = "alpha is zero: the module does nothing";
            self.adapter.notices.push(notice(NoticeKind::AllZero, text));
        } else if alpha < 0.0 {
            let text = "alpha is negative";
            self.adapter
                .notices
                .push(notice(NoticeKind::NegativeAlpha, text));
        }
        Ok(alpha)
    }
}

/// The value of a tensor of one element, of any rank and any ordinary type.
fn one_element(tensor: &Tensor) -> Result<f64> {
    if tensor.elements() != 1 {
        let problem = format!(
            "alpha has shape {:?}; one element was expected",
            tensor.shape
        );
        return Err(tensor.error(Reason::FactorShape { problem }));
    }
    let bytes = tensor.bytes()?;
    if let Some(float) = Float::of(tensor.dtype) {
        let mut value = [0.0];
        widen(float, &bytes, &mut value);
        return Ok(value[0]);
    }
    integer(tensor, &bytes)
}

/// The value of an integer of any ordinary type.
fn integer(tensor: &Tensor, bytes: &[u8]) -> Result<f64> {
    let mut wide = [0; 8];
    wide[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
    let (signed, unused_bits) = (i64::from_le_bytes(wide), 64 - 8 * bytes.len().min(8) as u32);
    Ok(match tensor.dtype {
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => u64::from_le_bytes(wide) as f64,
        // Shifted up and down again, so that the sign spreads.
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => {
            ((signed << unused_bits) >> unused_bits) as f64
        }
        _ => {
            let dtype = tensor.dtype.to_string();
            return Err(tensor.error(Reason::AdapterType { dtype }));
        }
    })
}

/// A shape: a tensor of one axis of a few integers that are not negative.
fn integers(tensor: &Tensor) -> Result<Vec<usize>> {
    let fail = || {
        let problem = "a shape is one axis of up to 8 integers from 1 on".to_owned();
        tensor.error(Reason::FactorShape { problem })
    };
    if tensor.shape.len() != 1 || !(1..=AXES).contains(&tensor.elements()) {
        return Err(fail());
    }
    let bytes = tensor.bytes()?;
    let sizes = bytes.chunks_exact((tensor.dtype.bitsize() / 8).max(1));
    let size = |bytes: &[u8]| {
        let size = integer(tensor, bytes)?;
        // Exact in f64 as well.
        let fits = size >= 1.0 && size < (1u64 << 53) as f64;
        fits.then_some(size as usize).ok_or_else(fail)
    };
    sizes.map(size).collect()
}

/// Whether norms are those of outputs or of inputs: the axis that is not 1 tells, even where both have
/// the same size (`[o, 1, …]` or `[1, i, 1, …]`).
fn axis_of(norms: &Tensor, factors: &[(Role, Tensor)]) -> Result<Role> {
    let get = |role| factors.iter().find(|(known, _)| *known == role);
    let outputs = get(lora::UP).map(|(_, up)| up.dimension(0));
    let inputs = get(lora::DOWN).map(|(_, down)| down.dimension(1));
    let count = norms.elements();
    let (of_outputs, of_inputs) = (outputs == Some(count), inputs == Some(count));
    let first = norms.shape.first() == Some(&count);
    let second = norms.shape.first() == Some(&1) && norms.dimension(1) == count;
    match norms.shape.len() {
        // Without a second axis only the size can tell.
        1 if of_outputs != of_inputs => Ok(match of_outputs {
            true => dora::MAGNITUDE,
            false => dora::INPUT_MAGNITUDE,
        }),
        2.. if first && of_outputs => Ok(dora::MAGNITUDE),
        2.. if second && of_inputs => Ok(dora::INPUT_MAGNITUDE),
        _ => {
            let problem = format!(
                "norms of shape {:?} for {} outputs and {} inputs: which axis they belong to cannot be told",
                norms.shape,
                outputs.map_or("?".to_owned(), |count| count.to_string()),
                inputs.map_or("?".to_owned(), |count| count.to_string()),
            );
            Err(norms.error(Reason::FactorShape { problem }))
        }
    }
}

fn oddities(found: &Found) -> Vec<Notice> {
    let mut notices = Vec::new();
    for tensor in &found.file.directory.tensors {
        if tensor.elements() == 0 {
            let text = format!("the tensor has no elements: shape {:?}", tensor.shape);
            notices.push(Notice::new(NoticeKind::ZeroSized, text).on(&*tensor.name));
        }
        let odd = |c: char| acts_on_a_terminal(c) || c.is_whitespace();
        if tensor.name.chars().any(odd) {
            let text = "the name holds characters that are not those of a module path";
            notices.push(Notice::new(NoticeKind::OddName, text).on(&*tensor.name));
        }
    }
    notices
}

/// What the metadata say, none of which changes the result.
pub(super) fn facts(tool: &str, summary: Summary) -> Facts {
    Facts {
        base: None,
        tool: Some(tool.to_owned()),
        other: summary.facts,
    }
}
