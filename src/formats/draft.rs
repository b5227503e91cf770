//! What a format is given to write, and what it makes of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Order;
use crate::adapter::{Adapter, Layer, Method, Module, Scale};
use crate::containers::Header;
use crate::containers::archive::Assemble;
use crate::error::Result;
use crate::methods::{dora, lora};
use crate::naming::Attention;
use crate::naming::component::Component;
use crate::naming::families::Layout;
use crate::notice::Notice;
use crate::tensor::{DType, Float, Tensor, filled, narrow, widen};

pub(super) use crate::tensor::{scaled, transposed, typed};

/// A power of a format: writing.
pub trait Writer: Sync {
    /// The names of layers that it writes; the hub's where there is none.
    fn layout(&self, family: Option<&str>) -> Option<Layout>;

    /// Whether a flattened name is written as it is, of whichever layout.
    fn keeps_flattened(&self) -> bool {
        false
    }

    /// Turns an adapter into files. What the format cannot say becomes a loss, never less than all.
    ///
    /// # Errors
    /// What the adapter makes impossible.
    fn write(&self, draft: &Draft<'_>) -> Result<Written>;
}

/// An adapter with the names of the layout that the writer asked for.
pub struct Draft<'a> {
    /// The modules.
    pub modules: Vec<Named>,
    /// The rest of the adapter; its modules are not to be looked at.
    pub adapter: &'a Adapter,
    /// The type of the factors; their own if absent.
    pub dtype: Option<Float>,
    /// The family of the denoiser, where there is one.
    pub family: Option<&'static str>,
    /// What diffusers calls the denoiser (`unet.`, `transformer.`), where a family tells it.
    pub denoiser: Option<&'static str>,
    /// The metadata of the source's file.
    pub metadata: &'a [(String, String)],
    /// Which layers have which numbers, where the format numbers them.
    pub order: Option<&'a Order>,
    /// What stands before flattened names instead of the usual.
    pub prefix: Option<&'a str>,
    /// The heads of the model, as far as they are known.
    pub attention: Attention,
}

/// A module with its dotted path within its part.
#[derive(Clone, Debug)]
pub struct Named {
    /// The part of the pipeline: the source named it, or the caller, or the family, of which bare names are those
    /// of the denoiser.
    pub component: Option<&'static Component>,
    /// What the source wrote in front, where it was dotted, or the caller or diffusers for bare names.
    pub prefix: String,
    /// The dotted path.
    pub path: String,
    /// The module.
    pub module: Module,
}

/// Files that are to be written.
#[derive(Default)]
pub struct Written {
    /// The tensors under their keys, in the order of their data.
    pub tensors: Vec<Tensor>,
    /// The metadata, where the container is safetensors.
    pub metadata: Vec<(String, String)>,
    /// Whether the metadata state the hashes of sd-scripts, which are known last.
    pub hashes: bool,
    /// Makes the header, where the container is another.
    #[allow(clippy::type_complexity, reason = "a constructor of one header")]
    pub header: Option<Box<dyn Fn(&[Tensor]) -> Result<Header> + Send + Sync>>,
    /// Puts the archive together, where the container is one.
    pub archive: Option<Assemble>,
    /// The name of the file of tensors in a folder.
    pub name: &'static str,
    /// The configuration beside it.
    pub config: Option<serde_json::Value>,
    /// Other texts beside it, by name.
    pub beside: Vec<(&'static str, String)>,
    /// The numerator of every scale, where the format leaves it to whoever loads the file.
    pub alpha: Option<f64>,
    /// Whether it is a folder even if the output looks like a file.
    pub folder: bool,
    /// What the format cannot say, and which part of the adapter it is.
    pub losses: Vec<Loss>,
    /// What was multiplied into the factors, and whether that rounds.
    pub folded: Vec<Loss>,
    /// What is said besides modules: paths of widened weights, names of unused tensors.
    pub said: BTreeSet<String>,
    /// What is odd about the result.
    pub notices: Vec<Notice>,
}

/// A part of an adapter, and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Loss {
    /// The module, tensor or field.
    pub item: String,
    /// Why.
    pub text: String,
}

impl Loss {
    /// What becomes of the scales of modules that are put together, where they differ.
    pub fn of_scales<'a>(
        item: &str,
        mut modules: impl Iterator<Item = &'a Module>,
    ) -> Option<Loss> {
        let first = modules.next()?.scale.value;
        modules
            .any(|module| module.scale.value != first)
            .then(|| Loss {
                item: item.to_owned(),
                text: "the scales of its parts are multiplied into the up factor and rounded once"
                    .to_owned(),
            })
    }
}

impl Written {
    /// A safetensors file of a name, whose metadata say what those of PyTorch do.
    pub(super) fn safetensors(name: &'static str) -> Self {
        Written {
            name,
            metadata: vec![("format".to_owned(), "pt".to_owned())],
            ..Written::default()
        }
    }

    /// Takes a tensor under a key, in the type that was asked for.
    pub(super) fn put(&mut self, draft: &Draft<'_>, key: String, tensor: &Tensor) {
        self.tensors.push(renamed(&typed(tensor, draft.dtype), key));
    }

    /// Takes a tensor under a key, in its own type.
    pub(super) fn put_as_is(&mut self, key: String, tensor: &Tensor) {
        self.tensors.push(renamed(tensor, key));
    }

    /// Notes what cannot be said.
    pub(super) fn lose(&mut self, item: impl Into<String>, text: impl Into<String>) {
        self.losses.push(Loss {
            item: item.into(),
            text: text.into(),
        });
    }

    /// Notes a module that no prefix can be written for.
    pub(super) fn lose_unnamed(&mut self, named: &Named) {
        let text = "no prefix names its part of the pipeline";
        self.lose(&*named.module.path, text);
    }

    /// Notes weights that are widened as lost.
    pub(super) fn lose_paddings(&mut self, draft: &Draft<'_>) {
        for padding in &draft.adapter.paddings {
            if !self.said.contains(&padding.path) {
                self.lose(&*padding.path, "a weight that is widened with zeros");
            }
        }
    }

    /// Notes everything besides modules as lost.
    pub(super) fn lose_rest(&mut self, draft: &Draft<'_>) {
        for replacement in &draft.adapter.replacements {
            self.lose(&*replacement.name, "a whole tensor of the base");
        }
        self.lose_unless_whole(draft);
    }

    /// Notes everything besides modules and whole tensors as lost.
    pub(super) fn lose_unless_whole(&mut self, draft: &Draft<'_>) {
        let adapter = draft.adapter;
        for tokens in &adapter.tokens {
            self.lose(&*tokens.path, "rows of an embedding");
        }
        self.lose_paddings(draft);
        if !adapter.replication.is_empty() {
            self.lose("layer_replication", "repeated layers");
        }
        let said = std::mem::take(&mut self.said);
        let unused = adapter.unused.iter();
        for tensor in unused.filter(|tensor| !said.contains(&tensor.name)) {
            self.lose(&*tensor.name, "state without a part in the weights");
        }
    }

    /// The factors of a module whose method is known to the format; `None`, and a loss, otherwise.
    pub(super) fn low_rank(&mut self, named: &Named, with_norms: bool) -> Option<LowRank> {
        let module = &named.module;
        let known: &[&str] = match with_norms {
            true => &[lora::LORA.name(), dora::DORA.name()],
            false => &[lora::LORA.name()],
        };
        if !known.contains(&module.method.name()) {
            let text = format!("the method {}", module.method.name());
            self.lose(&*module.path, text);
            return None;
        }
        Some(LowRank {
            down: module.defined(lora::DOWN)?,
            up: module.defined(lora::UP)?,
            mid: module.get(lora::MID).cloned(),
            bias: module.get(lora::BIAS).cloned(),
            magnitude: module.get(dora::MAGNITUDE).cloned(),
            input_magnitude: module.get(dora::INPUT_MAGNITUDE).cloned(),
            scale: module.scale,
        })
    }

    /// The factors of a LoRA on a layer that is no embedding, if it has two and nothing else; `None`, and a loss,
    /// otherwise.
    pub(super) fn two_factors(&mut self, named: &Named) -> Option<LowRank> {
        let factors = self.low_rank(named, false)?;
        if named.module.layer == Layer::Embedding {
            self.lose(&*named.module.path, "LoRA on an embedding");
            return None;
        }
        if factors.mid.is_some() || factors.bias.is_some() {
            self.lose(&*named.module.path, "a Tucker core or a trained bias");
            return None;
        }
        Some(factors)
    }

    /// Multiplies the up factor (and the bias) and notes it.
    pub(super) fn fold(
        &mut self,
        draft: &Draft<'_>,
        named: &Named,
        factors: &mut LowRank,
        by: f64,
    ) {
        if by == 1.0 {
            return;
        }
        let exact = by == 0.0 || by.abs().log2().fract() == 0.0;
        self.folded.push(Loss {
            item: named.module.path.clone(),
            text: match exact {
                true => format!("the scale {by} is multiplied into the up factor, exactly"),
                false => {
                    format!("the scale {by} is multiplied into the up factor and rounded once")
                }
            },
        });
        factors.up = scaled(&factors.up, by, draft.dtype);
        if let Some(bias) = &mut factors.bias {
            *bias = scaled(bias, by, draft.dtype);
        }
    }
}

/// Modules of a format that has one rank and one α for all of them.
pub(super) struct Alike<'a, T> {
    /// The modules, their factors, and where the format has them.
    pub(super) modules: Vec<(&'a Named, LowRank, T)>,
    pub(super) rank: usize,
    pub(super) alpha: f64,
    pub(super) dora: bool,
}

impl Written {
    /// Modules of two factors (and norms), with the largest rank and the most common α: smaller
    /// factors are filled up with zeros, what is left of a scale is multiplied into the up factor.
    pub(super) fn alike<'a, T>(
        &mut self,
        draft: &Draft<'_>,
        modules: impl IntoIterator<Item = (&'a Named, T)>,
        with_norms: bool,
    ) -> Alike<'a, T> {
        let mut all: Vec<(&Named, LowRank, T)> = Vec::new();
        for (named, place) in modules {
            let Some(factors) = self.low_rank(named, with_norms) else {
                continue;
            };
            let layer = named.module.layer == Layer::Dense && factors.down.shape.len() == 2;
            if !layer
                || factors.mid.is_some()
                || factors.bias.is_some()
                || factors.input_magnitude.is_some()
            {
                let text = "anything but two factors of a linear layer";
                self.lose(&*named.module.path, text);
                continue;
            }
            all.push((named, factors, place));
        }
        let norms = all
            .iter()
            .filter(|(_, factors, _)| factors.magnitude.is_some());
        let dora = norms.count() * 2 > all.len();
        all.retain(|(named, factors, _)| {
            let same = factors.magnitude.is_some() == dora;
            if !same {
                let text = "a mixture of LoRA and DoRA in one configuration";
                self.lose(&*named.module.path, text);
            }
            same
        });
        let rank = all.iter().map(|(_, factors, _)| factors.rank()).max();
        let rank = rank.unwrap_or(1);
        let alphas = all.iter().map(|(_, factors, _)| {
            let Scale {
                alpha,
                rank: own,
                value,
                ..
            } = factors.scale;
            let stated = alpha.filter(|alpha| own == Some(rank) && alpha / rank as f64 == value);
            stated.unwrap_or(value * rank as f64)
        });
        let alpha = common(alphas).unwrap_or(rank as f64);
        for (named, factors, _) in &mut all {
            let by = factors.scale.value / (alpha / rank as f64);
            self.fold(draft, named, factors, by);
            factors.fill(rank);
        }
        Alike {
            modules: all,
            rank,
            alpha,
            dora,
        }
    }
}

/// The number that most modules have, of which those of the others are multiples: never zero, which has none.
pub(super) fn common(numbers: impl Iterator<Item = f64>) -> Option<f64> {
    let usable = numbers.filter(|number| number.is_finite() && *number != 0.0);
    most_common(usable.map(f64::to_bits)).map(f64::from_bits)
}

/// A part of a fused layer.
pub(super) struct Part {
    pub(super) rows: usize,
    /// Whether it is adapted anywhere.
    pub(super) adapted: bool,
    /// Its factors, down and up, where it is adapted here.
    pub(super) factors: Option<(Tensor, Tensor)>,
}

/// The factors of the adapted parts of a fused layer, one kind below the other; zeros where this layer lacks one.
pub(super) fn joined(parts: &[Part], dtype: Option<Float>) -> Option<(Tensor, Tensor)> {
    let (first_down, first_up) = parts.iter().find_map(|part| part.factors.clone())?;
    let adapted = parts.iter().filter(|part| part.adapted);
    let factors = adapted.map(|part| match &part.factors {
        Some(own) => own.clone(),
        None => {
            let down = zeros(&first_down, first_down.shape.clone());
            let shape = vec![part.rows, first_up.dimension(1)];
            (down, zeros(&first_up, shape))
        }
    });
    let (downs, ups): (Vec<Tensor>, Vec<Tensor>) = factors.unzip();
    Some((stacked(&downs, dtype)?, stacked(&ups, dtype)?))
}

/// Zeros in the type of another tensor.
pub(super) fn zeros(like: &Tensor, shape: Vec<usize>) -> Tensor {
    let bytes = shape.iter().product::<usize>() * like.dtype.bitsize() / 8;
    like.derived(like.dtype, shape, Arc::new(move || Ok(vec![0; bytes])))
}

/// Matrices of one width, one below the other, in a type that holds all of them.
fn stacked(parts: &[Tensor], dtype: Option<Float>) -> Option<Tensor> {
    let first = parts.first()?;
    let floats: Vec<Option<Float>> = parts.iter().map(|part| Float::of(part.dtype)).collect();
    let common = match floats.iter().all(|float| *float == floats[0]) {
        true => floats[0],
        false if floats.contains(&Some(Float::F64)) => Some(Float::F64),
        false => Some(Float::F32), // holds both kinds of sixteen bits
    };
    let parts: Vec<Tensor> = parts
        .iter()
        .map(|part| typed(part, dtype.or(common)))
        .collect();
    let rows = parts.iter().map(|part| part.dimension(0)).sum();
    let (dtype, shape) = (parts[0].dtype, vec![rows, first.dimension(1)]);
    let made = move || {
        let mut bytes = Vec::new();
        for part in &parts {
            bytes.extend_from_slice(&part.bytes()?);
        }
        Ok(bytes)
    };
    Some(first.derived(dtype, shape, Arc::new(made)))
}

/// The tensors of LoRA or DoRA as their method defines them.
pub(super) struct LowRank {
    pub(super) down: Tensor,
    pub(super) up: Tensor,
    pub(super) mid: Option<Tensor>,
    pub(super) bias: Option<Tensor>,
    pub(super) magnitude: Option<Tensor>,
    pub(super) input_magnitude: Option<Tensor>,
    pub(super) scale: Scale,
}

impl LowRank {
    /// The rank of the tensors.
    pub(super) fn rank(&self) -> usize {
        self.down.dimension(0)
    }

    /// Fills the factors of a smaller rank up with zeros, which changes no product.
    pub(super) fn fill(&mut self, rank: usize) {
        if self.rank() < rank {
            self.down = filled(&self.down, 0, rank);
            self.up = filled(&self.up, 1, rank);
        }
    }

    /// The α of which α/rank is the scale: the stored one where the rank is that of the tensors.
    pub(super) fn alpha(&self) -> f64 {
        match self.scale {
            Scale {
                value,
                alpha: Some(alpha),
                ..
            } if alpha / self.rank() as f64 == value => alpha,
            Scale { value, .. } => value * self.rank() as f64,
        }
    }
}

/// The same elements under another shape.
pub(super) fn reshaped(tensor: &Tensor, shape: Vec<usize>) -> Tensor {
    debug_assert_eq!(shape.iter().product::<usize>(), tensor.elements());
    Tensor {
        shape,
        ..tensor.clone()
    }
}

/// The value that appears most; of several the smallest, whatever the order of the modules.
pub(super) fn most_common<T: Copy + Ord>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    let rank = |(value, count): &(T, usize)| (*count, std::cmp::Reverse(*value));
    counts.into_iter().max_by_key(rank).map(|(value, _)| value)
}

/// A number as a tensor without axes, in the type of `like` where that holds it exactly.
pub(super) fn number(like: &Tensor, value: f64) -> Tensor {
    let holds = |float: Float| {
        let mut bytes = vec![0; float.size()];
        narrow(float, &[value], &mut bytes);
        let mut back = [0.0];
        widen(float, &bytes, &mut back);
        (back == [value]).then_some((float, bytes))
    };
    let own = Float::of(like.dtype).and_then(holds);
    let (float, bytes) = own
        .or_else(|| holds(Float::F32))
        .unwrap_or_else(|| (Float::F64, value.to_le_bytes().to_vec()));
    like.derived(
        float.dtype(),
        Vec::new(),
        Arc::new(move || Ok(bytes.clone())),
    )
}

/// A shape as a tensor.
pub(super) fn sizes(like: &Tensor, shape: &[usize]) -> Tensor {
    let bytes: Vec<u8> = shape
        .iter()
        .flat_map(|size| (*size as i64).to_le_bytes())
        .collect();
    let made = move || Ok(bytes.clone());
    like.derived(DType::I64, vec![shape.len()], Arc::new(made))
}

fn renamed(tensor: &Tensor, name: String) -> Tensor {
    Tensor {
        name,
        ..tensor.clone()
    }
}
