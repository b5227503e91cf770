//! Which tensor of one checkpoint is which of the other, and what each of them is.

use std::collections::HashSet;

use super::{Embeddings, Options, Whole};
use crate::adapter::fit::Stored;
use crate::adapter::{Geometry, Layer, Orientation, Part};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Reason, Result};
use crate::linalg::truncated::Blocks;
use crate::naming::{Resolution, Rows, component, path};
use crate::ops::merge::stores_inputs_first;
use crate::ops::outgoing::Base;
use crate::pattern::Choice;
use crate::tensor::{Float, Tensor};

/// What a tensor is to its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The weight of a linear layer, of a Conv1D or of a convolution.
    Layer,
    /// An embedding.
    Embedding,
    /// The weight or the bias of a norm, or anything else of one axis.
    Norm,
    /// The bias of a layer.
    Bias,
    /// A parameter that is no layer's weight (stacked experts, tokens, tables).
    Parameter,
}

impl What {
    /// The word for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            What::Layer => "a layer",
            What::Embedding => "an embedding",
            What::Norm => "a norm",
            What::Bias => "a bias",
            What::Parameter => "a parameter",
        }
    }
}

/// What becomes of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A module is fitted to it.
    Fitted,
    /// The tensor is taken whole.
    Whole,
    /// It is left out, as the caller asked.
    LeftOut,
}

/// A tensor on both sides.
pub(super) struct Pair {
    /// The path of its layer, as adapters name it.
    pub(super) path: String,
    /// Its name in the layer (`weight`, `bias`); empty where it is a parameter of its own.
    pub(super) parameter: String,
    /// Whether the path starts with the name of a part of a pipeline.
    pub(super) in_part: bool,
    pub(super) base: Tensor,
    pub(super) tuned: Tensor,
    pub(super) what: What,
    pub(super) way: Way,
    /// Whether it has other rows than before, of the same width.
    pub(super) grown: bool,
    pub(super) orientation: Orientation,
}

impl Pair {
    /// The name that a whole tensor has.
    pub(super) fn name(&self) -> String {
        match self.parameter.is_empty() {
            true => self.path.clone(),
            false => format!("{}.{}", self.path, self.parameter),
        }
    }

    pub(super) fn layer(&self) -> Layer {
        match self.what {
            What::Embedding => Layer::Embedding,
            _ => Layer::Dense,
        }
    }

    /// How a module lies on it.
    pub(super) fn geometry(&self) -> Geometry {
        let shape = &self.base.shape;
        Geometry {
            part: Part::Weight,
            rows: self.base.dimension(0),
            columns: shape.iter().skip(1).product(),
            orientation: self.orientation,
            kernel: shape.iter().skip(2).product(),
        }
    }
}

/// Everything that two checkpoints have, paired.
pub(super) struct Paired {
    pub(super) pairs: Vec<Pair>,
    /// Tensors without a counterpart, and why.
    pub(super) unmatched: Vec<String>,
}

/// Pairs tensors by name, then by what the base calls a layer of another name.
pub(super) fn pair(options: &Options, base: &Base, tuned: &Checkpoint) -> Result<Paired> {
    let choice = Choice::new(&options.only, &options.skip)?;
    let mut paired = Paired {
        pairs: Vec::new(),
        unmatched: Vec::new(),
    };
    let mut seen: HashSet<String> = HashSet::new();
    let mut shapes = 0;
    let mut both = 0;
    for trained in tuned.tensors() {
        let Some(own) = counterpart(base, trained) else {
            // A copy of the embedding that the base shares.
            if tied_copy(base, tuned, trained)? {
                continue;
            }
            if choice.keeps(&trained.name)? {
                paired
                    .unmatched
                    .push(format!("{}: only in the tuned checkpoint", trained.name));
            }
            continue;
        };
        seen.insert(own.name.clone());
        both += 1;
        let mut found = described(base, own, trained);
        let same = own.shape == trained.shape;
        found.grown =
            !same && matches!(found.what, What::Embedding | What::Layer) && only_rows(own, trained);
        if !same {
            shapes += 1;
        }
        if !choice.keeps(&found.name())? {
            continue;
        }
        if !same && !found.grown {
            let text = format!(
                "{}: its shape is {:?} in the base and {:?} in the tuned checkpoint",
                own.name, own.shape, trained.shape
            );
            paired.unmatched.push(text);
            continue;
        }
        if let Some(problem) = no_difference(own, trained)? {
            paired.unmatched.push(format!("{}: {problem}", own.name));
            continue;
        }
        found.way = way(options, &found);
        paired.pairs.push(found);
    }
    for own in base
        .checkpoint
        .tensors()
        .filter(|own| !seen.contains(&own.name))
    {
        if choice.keeps(&own.name)? {
            paired
                .unmatched
                .push(format!("{}: only in the base", own.name));
        }
    }
    let (of_base, of_tuned) = (base.checkpoint.tensors().count(), tuned.tensors().count());
    let stranger =
        |problem: String| Err(Error::new(Reason::NotTuned { problem }).in_file(&tuned.path));
    if both * 2 < of_base.min(of_tuned) {
        return stranger(format!("{both} of {of_base} tensors are in both"));
    }
    if shapes * 2 > both {
        return stranger(format!("{shapes} of {both} tensors have other shapes"));
    }
    Ok(paired)
}

/// The tensor of the base that a tuned one was made from.
fn counterpart<'a>(base: &'a Base, trained: &Tensor) -> Option<&'a Tensor> {
    if let Some(own) = base.checkpoint.tensor(&trained.name) {
        return Some(own);
    }
    let (path, parameter) = trained.name.rsplit_once('.')?;
    let places = match base.resolver.resolve_parameter(path, parameter) {
        Resolution::Exact(places) | Resolution::Renamed(places) => places,
        Resolution::Ambiguous(_) | Resolution::Unresolved => return None,
    };
    match places.as_slice() {
        [place] if place.rows == Rows::Whole => base.checkpoint.tensor(&place.tensor),
        _ => None,
    }
}

/// Whether a tensor is the output embedding that the base shares with its input, unchanged on the tuned side.
fn tied_copy(base: &Base, tuned: &Checkpoint, trained: &Tensor) -> Result<bool> {
    let is_output = tuned
        .output_embedding()
        .is_some_and(|output| output.name == trained.name);
    match tuned.input_embedding() {
        Some(input)
            if is_output
                && base.checkpoint.ties_embeddings()
                && Float::of(input.dtype).is_some() =>
        {
            input.equals(trained)
        }
        _ => Ok(false),
    }
}

fn only_rows(own: &Tensor, trained: &Tensor) -> bool {
    own.shape.len() == 2 && trained.shape.len() == 2 && own.shape[1] == trained.shape[1]
}

/// Why two tensors have no difference, where they are not equal.
fn no_difference(own: &Tensor, trained: &Tensor) -> Result<Option<String>> {
    if Float::of(own.dtype).is_some() && Float::of(trained.dtype).is_some() {
        return Ok(None);
    }
    if own.dtype == trained.dtype
        && own.blocks == trained.blocks
        && own.bytes()? == trained.bytes()?
    {
        return Ok(None);
    }
    let (own, trained) = (own.type_name(), trained.type_name());
    Ok(Some(format!(
        "it is {own} in the base and {trained} in the tuned checkpoint, which have no difference"
    )))
}

/// What a tensor is, by its name and shape.
fn described(base: &Base, own: &Tensor, trained: &Tensor) -> Pair {
    let (owner, parameter) = match own.name.rsplit_once('.') {
        Some((owner, parameter)) if matches!(parameter, "weight" | "bias") => (owner, parameter),
        _ => (own.name.as_str(), ""),
    };
    let weight = base.checkpoint.tensor(&format!("{owner}.weight"));
    let of_layer = weight.is_some_and(|weight| weight.shape.len() > 1);
    let input = base.checkpoint.input_embedding();
    let embeds = own.shape.len() == 2
        && (path::is_embedding(owner) || input.is_some_and(|input| input.name == own.name));
    let what = match (parameter, own.shape.len()) {
        ("weight", 2) if embeds => What::Embedding,
        ("weight", 2..) => What::Layer,
        ("bias", 1) if of_layer => What::Bias,
        (_, 1) => What::Norm,
        _ => What::Parameter,
    };
    let orientation = match what {
        What::Embedding => Orientation::InputsFirst,
        What::Layer if own.shape.len() == 2 && stores_inputs_first(&base.checkpoint, &own.name) => {
            Orientation::InputsFirst
        }
        _ => Orientation::OutputsFirst,
    };
    let (path, in_part) = component::of_base(owner);
    Pair {
        in_part: in_part
            || base
                .checkpoint
                .parts
                .iter()
                .any(|part| !part.name.is_empty()),
        path,
        parameter: parameter.to_owned(),
        base: own.clone(),
        tuned: trained.clone(),
        what,
        way: Way::Whole,
        grown: false,
        orientation,
    }
}

fn way(options: &Options, pair: &Pair) -> Way {
    let whole = |choice: Whole| match choice {
        Whole::Full => Way::Whole,
        Whole::Skip => Way::LeftOut,
    };
    match pair.what {
        What::Layer | What::Embedding if pair.grown => match (pair.what, options.embeddings) {
            (What::Embedding, Embeddings::Skip) => Way::LeftOut,
            _ => Way::Whole,
        },
        What::Layer => Way::Fitted,
        What::Embedding => match options.embeddings {
            Embeddings::Fitted => Way::Fitted,
            Embeddings::Full => Way::Whole,
            Embeddings::Skip => Way::LeftOut,
        },
        What::Norm => whole(options.norms),
        What::Bias => whole(options.biases),
        What::Parameter => Way::Whole,
    }
}

/// Refuses a pair of which most weights have nothing to do with each other.
///
/// Weights of one size that were made independently differ by at least their own norm; a fine-tune changes them by a
/// few percent. Some rows of each weight are enough to tell.
pub(super) fn refuse_strangers(pairs: &[Pair], tuned: &Checkpoint) -> Result<()> {
    const ROWS: usize = 16;
    const STRANGE: f64 = 0.9;
    let mut ratios = Vec::new();
    for pair in pairs.iter().filter(|pair| pair.way == Way::Fitted) {
        let (base, trained) = (Stored::new(&pair.base)?, Stored::new(&pair.tuned)?);
        let step = (base.rows() / ROWS).max(1);
        let (mut difference, mut whole) = (0.0, 0.0);
        let (mut a, mut b) = (vec![0.0; base.columns()], vec![0.0; base.columns()]);
        for row in (0..base.rows()).step_by(step).take(ROWS) {
            base.fill(row..row + 1, &mut a)?;
            trained.fill(row..row + 1, &mut b)?;
            for (a, b) in a.iter().zip(&b) {
                difference += (b - a) * (b - a);
                whole += a * a;
            }
        }
        // What is not finite is told when it is decomposed.
        if whole > 0.0 && (difference / whole).is_finite() {
            ratios.push((difference / whole).sqrt());
        }
    }
    ratios.sort_by(f64::total_cmp);
    let Some(middle) = ratios
        .get(ratios.len() / 2)
        .filter(|middle| **middle >= STRANGE)
    else {
        return Ok(());
    };
    let problem = format!("half of its weights differ by {middle:.2} of their own norm or more");
    Err(Error::new(Reason::NotTuned { problem })
        .in_file(&tuned.path)
        .with_hint("--allow-unrelated extracts the difference nevertheless"))
}
