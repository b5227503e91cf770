//! LoRA: ΔW = scale · B · A.
//!
//! Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; as PEFT computes it
//! (`peft/tuners/lora/layer.py`, `get_delta_weight`). Convolutions: A is r × in × kernel, B is
//! out × r × 1…, so that A flattened to r × (in · kernel) gives the flattened weight.
//!
//! With a core (LoCon of LyCORIS, "Tucker" or CP: `lycoris/modules/locon.py`, `functional/general.py`):
//! `ΔW[o,i,·] = scale · Σ_p B[o,p] · Σ_q M[p,q,·] · A[q,i]`. The inner sum is taken first, in f64, and the
//! result takes the place of A.
//! Not here: grouped convolutions.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2};

use super::full::{Add, weighted};
use crate::adapter::candidates::Candidates;
use crate::adapter::factor::{Factor, Product};
use crate::adapter::fit::{Change, Fitted};
use crate::adapter::{
    Along, BiasUse, Extent, Geometry, Layer, Method, Module, Order, Orientation, Part, Role,
    RoleUse, Scale, Stored, Update, Workspace,
};
use crate::error::{Error, Reason, Result};
use crate::linalg::Kernel;
use crate::linalg::truncated::{Truncation, truncated};
use crate::tensor::{DType, Float, Tensor, filled, narrowed, transposed, typed};

/// A, r × in (× kernel): maps inputs to the rank.
pub const DOWN: Role = Role::new("down");

/// B, out × r (× 1…): maps the rank to outputs.
pub const UP: Role = Role::new("up");

/// M, r × r × kernel: the core between A and B of a convolution.
pub const MID: Role = Role::new("mid");

/// What is added to the bias, one value per output.
pub const BIAS: Role = Role::new("bias");

/// The method.
pub static LORA: Lora = Lora;

/// LoRA on Linear, Conv1D, convolutions and embeddings.
#[derive(Debug)]
pub struct Lora;

impl Method for Lora {
    fn name(&self) -> &'static str {
        "LoRA"
    }

    fn roles(&self) -> &'static [RoleUse] {
        &[
            RoleUse {
                role: DOWN,
                suffix: "lora_down.weight",
                required: true,
                along: Along::Others,
            },
            RoleUse {
                role: UP,
                suffix: "lora_up.weight",
                required: true,
                along: Along::Outputs,
            },
            RoleUse {
                role: BIAS,
                suffix: "lora_up.bias",
                required: false,
                along: Along::Outputs,
            },
            RoleUse {
                role: MID,
                suffix: "lora_mid.weight",
                required: false,
                along: Along::Others,
            },
        ]
    }

    fn order(&self) -> Order {
        Order::Additive
    }

    fn check(&self, module: &Module) -> Result<()> {
        check_factors(module)
    }

    fn extent(&self, module: &Module) -> Extent {
        extent_of_factors(module)
    }

    fn rank(&self, module: &Module) -> Option<usize> {
        rank_of_factors(module)
    }

    fn bias(&self, module: &Module) -> BiasUse {
        match module.get(BIAS) {
            Some(_) => BiasUse::Required,
            None => BiasUse::No,
        }
    }

    fn is_transpose(&self, module: &Module, other: &Module) -> Result<bool> {
        let equal = |a: Role, b: Role| -> Result<bool> {
            let (a, b) = (module.factor(a)?, other.factor(b)?.t());
            if (a.rows(), a.columns()) != (b.rows(), b.columns()) {
                return Ok(false);
            }
            let all = |factor: &Factor| factor.block(0..factor.rows(), 0..factor.columns());
            Ok(all(&a)? == all(&b)?)
        };
        Ok(module.parameters.len() == 2 && equal(DOWN, UP)? && equal(UP, DOWN)?)
    }

    fn fuse(&self, parts: &[(&Module, Vec<Range<usize>>)], outputs: usize) -> Result<Module> {
        fused(parts, outputs)
    }

    fn without_zeros(&self, module: Module) -> Result<Option<Module>> {
        let (down, up) = (module.require(DOWN)?, module.require(UP)?);
        let two = module.parameters.len() == 2 && down.shape.len() == 2 && up.shape.len() == 2;
        if !two || module.stored != Stored::AsDefined {
            return Ok(Some(module));
        }
        let rank = up.dimension(1);
        let values = up.to_f64()?;
        let used = |column: &usize| values.iter().skip(*column).step_by(rank).any(|v| *v != 0.0);
        let used: Vec<usize> = (0..rank).filter(used).collect();
        if used.len() == rank {
            return Ok(Some(module));
        }
        let parameters = vec![(DOWN, kept(down, 0, &used)), (UP, kept(up, 1, &used))];
        let module = Module {
            parameters,
            ..module
        };
        Ok((!used.is_empty()).then_some(module))
    }

    fn shape(&self, module: &Module) -> Option<Vec<usize>> {
        shape_of_factors(module)
    }

    fn sum(&self, parts: &[(&Module, f64)]) -> Result<Option<Module>> {
        Ok(match parts {
            [] => None,
            [(module, factor)] => Some(times(module, *factor)),
            several => Some(side_by_side(several)?),
        })
    }

    fn factors(
        &self,
        module: &Module,
        on: &Geometry,
    ) -> Result<Option<(Array2<f64>, Array2<f64>)>> {
        factors_of(module, on.orientation).map(Some)
    }

    fn of_factors(&self, module: &Module, left: Array2<f64>, right: Array2<f64>) -> Option<Module> {
        Some(of_factors(module, left, right))
    }

    fn filled(&self, module: &Module, rank: usize) -> Option<Module> {
        with_rank(module, rank)
    }

    fn of_triplets(&self, module: &Module, found: &mut Truncation) -> Option<Module> {
        Some(of_triplets(module, found))
    }

    fn fits(&self) -> bool {
        true
    }

    fn fit(&self, change: &Change<'_>) -> Result<Fitted> {
        let mut truncation = truncated(change.difference, &change.settings)?;
        // A module has a rank, also where there is nothing to say.
        if truncation.values.is_empty() {
            truncation.fill(1);
        }
        let scale = change.scale(truncation.values.len());
        let orientation = change.geometry.orientation;
        let parameters = balanced(orientation, change.shape, &mut truncation, scale.value).into();
        Ok(Fitted {
            parameters,
            scale,
            truncation,
        })
    }

    fn update(&self, module: &Module, on: &Geometry, strength: f64) -> Result<Box<dyn Update>> {
        let c = strength * module.scale.value;
        Ok(match on.part {
            Part::Weight => Box::new(Sum(product(module, on.orientation, c)?)),
            // A chain of one link: the bias itself.
            Part::Bias => Box::new(Add {
                difference: Factor::new(module.require(BIAS)?, on.rows)?,
                strength: c,
            }),
        })
    }
}

/// A and B of singular triplets, whose roots they share: `scale · B · A` is their sum. The element of a vector of the
/// rows that is largest in magnitude (the first of several) is positive, times the sign of the scale where the rows are
/// outputs; so a matrix that is stored once and used in both ways has the same factors in both.
pub(super) fn balanced(
    orientation: Orientation,
    shape: &[usize],
    truncation: &mut Truncation,
    scale: f64,
) -> [(Role, Vec<usize>, Vec<f64>); 2] {
    let (left, right) = (&mut truncation.left, &mut truncation.right);
    let (mut left, mut right) = (std::mem::take(left), std::mem::take(right));
    for (index, value) in truncation.values.iter().enumerate() {
        let largest = left.row(index).iter().fold(0.0f64, |largest, element| {
            match element.abs() > largest.abs() {
                true => *element,
                false => largest,
            }
        });
        // A scale of zero has no values.
        let share = match *value > 0.0 {
            true => (value / scale.abs()).sqrt(),
            false => 0.0,
        };
        let share = if largest < 0.0 { -share } else { share };
        for vectors in [&mut left, &mut right] {
            vectors
                .row_mut(index)
                .mapv_inplace(|element| element * share);
        }
    }
    let (mut up, down) = match orientation {
        Orientation::OutputsFirst => (left, right),
        Orientation::InputsFirst => (right, left),
    };
    if scale < 0.0 {
        up.mapv_inplace(|element| -element);
    }
    shaped(shape, down.view(), up.t())
}

/// A (rank × inputs) and B (outputs × rank) in their shapes for a weight of a shape.
fn shaped(
    shape: &[usize],
    down: ArrayView2<'_, f64>,
    up: ArrayView2<'_, f64>,
) -> [(Role, Vec<usize>, Vec<f64>); 2] {
    let (outputs, rank, inputs) = (up.nrows(), up.ncols(), down.ncols());
    let (mut down_shape, mut up_shape) = (vec![rank, inputs], vec![outputs, rank]);
    if shape.len() > 2 {
        down_shape.splice(1.., shape[1..].iter().copied());
        up_shape.resize(shape.len(), 1);
    }
    let values = |factor: ArrayView2<'_, f64>| factor.iter().copied().collect();
    [(DOWN, down_shape, values(down)), (UP, up_shape, values(up))]
}

/// The shape of the weight that factors are made for.
pub(super) fn shape_of_factors(module: &Module) -> Option<Vec<usize>> {
    let (mut shape, up) = (module.shape(DOWN)?, module.shape(UP)?);
    if let Some(mid) = module.get(MID) {
        shape.splice(2.., mid.shape[2..].iter().copied());
    }
    shape[0] = *up.first()?;
    if module.layer == Layer::Embedding {
        shape.swap(0, 1);
    }
    Some(shape)
}

/// `scale · B` and A with its core, or the transposes of A and of `scale · B`.
pub(super) fn factors_of(
    module: &Module,
    orientation: Orientation,
) -> Result<(Array2<f64>, Array2<f64>)> {
    let whole = |factor: Factor| factor.block(0..factor.rows(), 0..factor.columns());
    let mut up = whole(module.factor(UP)?)?;
    let down = whole(whole_down(module)?)?;
    up.mapv_inplace(|value| value * module.scale.value);
    Ok(match orientation {
        Orientation::OutputsFirst => (up, down),
        Orientation::InputsFirst => (down.reversed_axes(), up.reversed_axes()),
    })
}

/// The module with zeros behind its factors; nothing where one of them is wider than the rank.
pub(super) fn with_rank(module: &Module, rank: usize) -> Option<Module> {
    let mut wider = module.clone();
    for (role, tensor) in &mut wider.parameters {
        let Some(own) = module.defined(*role) else {
            continue;
        };
        let axes: &[usize] = match *role {
            DOWN => &[0],
            UP => &[1],
            MID => &[0, 1],
            _ => &[],
        };
        if axes.iter().any(|axis| own.dimension(*axis) > rank) {
            return None;
        }
        *tensor = axes
            .iter()
            .fold(own, |tensor, axis| filled(&tensor, *axis, rank));
    }
    wider.stored = Stored::AsDefined;
    wider.scale = module.scale.at_rank(rank);
    Some(wider)
}

/// The module with its factors, and the core between them, replaced.
pub(super) fn of_triplets(module: &Module, found: &mut Truncation) -> Module {
    let orientation = match module.layer {
        Layer::Dense => Orientation::OutputsFirst,
        Layer::Embedding => Orientation::InputsFirst,
    };
    let shape = shape_of_factors(module).unwrap_or_default();
    let rank = found.values.len();
    let factors = balanced(orientation, &shape, found, module.scale.value);
    with_factors(module, factors, module.scale.at_rank(rank))
}

/// The module with its factors, and the core between them, replaced by a product.
fn of_factors(module: &Module, left: Array2<f64>, right: Array2<f64>) -> Module {
    let (down, up) = match module.layer {
        Layer::Dense => (right, left),
        Layer::Embedding => (left.reversed_axes(), right.reversed_axes()),
    };
    let shape = shape_of_factors(module).unwrap_or_default();
    let rank = down.nrows();
    let factors = shaped(&shape, down.view(), up.view());
    with_factors(module, factors, Scale::of(rank as f64, rank, false))
}

fn with_factors(
    module: &Module,
    factors: [(Role, Vec<usize>, Vec<f64>); 2],
    scale: Scale,
) -> Module {
    let mut parameters = Vec::new();
    for (role, shape, values) in factors {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let like = module.get(role).or(module.get(DOWN));
        parameters.extend(like.map(|like| (role, like.holding(DType::F64, shape, bytes))));
    }
    let others = module.parameters.iter();
    parameters.extend(
        others
            .filter(|(role, _)| ![DOWN, UP, MID].contains(role))
            .cloned(),
    );
    Module {
        parameters,
        scale,
        stored: Stored::AsDefined,
        ..module.clone()
    }
}

/// The module times a number: its magnitude goes into the scale, its sign into the up factor.
fn times(module: &Module, factor: f64) -> Module {
    let mut module = module.clone();
    if factor.abs() != 1.0 {
        module.scale = module.scale.times(factor.abs());
    }
    if factor < 0.0 {
        for (role, tensor) in &mut module.parameters {
            if [UP, BIAS].contains(role) {
                *tensor = negated(tensor);
            }
        }
    }
    module
}

/// The tensor with all signs exchanged.
fn negated(tensor: &Tensor) -> Tensor {
    let source = tensor.clone();
    let size = tensor.dtype.bitsize() / 8;
    let made = move || {
        let mut bytes = source.bytes()?.into_owned();
        // The sign is the highest bit of a float.
        bytes
            .iter_mut()
            .skip(size - 1)
            .step_by(size)
            .for_each(|byte| *byte ^= 0x80);
        Ok(bytes)
    };
    tensor.derived(tensor.dtype, tensor.shape.clone(), Arc::new(made))
}

/// `Σ factor · scale · B · A` by factors side by side. Where all multipliers have one magnitude it stays the scale;
/// otherwise they are multiplied into the up factors, which are then in f64.
fn side_by_side(parts: &[(&Module, f64)]) -> Result<Module> {
    let (first, _) = parts[0];
    let multiplier = |(module, factor): &(&Module, f64)| factor * module.scale.value;
    let magnitude = multiplier(&parts[0]).abs();
    let same = parts.iter().all(|part| multiplier(part).abs() == magnitude);
    let (mut downs, mut ups, mut weighed) = (Vec::new(), Vec::new(), Vec::new());
    let mut rank = 0;
    for part in parts {
        let (module, multiplier) = (part.0, multiplier(part));
        let by = if same {
            1f64.copysign(multiplier)
        } else {
            multiplier
        };
        let missing = |role: Role| module.require(role).cloned();
        let mut up = module.defined(UP).map_or_else(|| missing(UP), Ok)?;
        let mut down = match module.get(MID) {
            Some(mid) => folded(module.require(DOWN)?, mid),
            None => module.defined(DOWN).map_or_else(|| missing(DOWN), Ok)?,
        };
        // The other way to see an embedding.
        if module.layer != first.layer && down.shape.len() == 2 && up.shape.len() == 2 {
            (down, up) = (transposed(&up), transposed(&down));
        }
        weighed.push((module, by));
        let (outputs, width) = (up.dimension(0), up.dimension(1));
        let all = std::iter::once(0..outputs).collect();
        ups.push((up, all, rank, width, by));
        downs.push(down);
        rank += width;
    }
    let outputs = ups[0].0.dimension(0);
    // Of several shapes of one layer the one that tells the kernel.
    let tails = downs.iter().map(|down| &down.shape[1..]);
    let tail = tails.max_by_key(|tail| tail.len()).unwrap_or(&[]).to_vec();
    let inputs: usize = tail.iter().product();
    for ((up, ..), down) in ups.iter().zip(&downs) {
        let own: usize = down.shape[1..].iter().product();
        if up.dimension(0) != outputs || own != inputs {
            let problem = format!(
                "modules for {outputs} outputs and {inputs} inputs, and for {} and {own}",
                up.dimension(0)
            );
            return Err(first.error(Reason::FactorShape { problem }));
        }
    }
    let narrow = common_type(downs.iter())?;
    let (down_shape, mut up_shape) = ([&[rank], &*tail].concat(), vec![outputs, rank]);
    up_shape.resize(down_shape.len(), 1);
    let like = first.require(DOWN)?;
    let stacked = move || {
        let mut bytes = Vec::new();
        for down in &downs {
            bytes.extend_from_slice(&typed(down, Some(narrow)).bytes()?);
        }
        Ok(bytes)
    };
    let down = like.derived(narrow.dtype(), down_shape, Arc::new(stacked));
    let float = match same {
        true => common_type(ups.iter().map(|(up, ..)| up))?,
        false => Float::F64,
    };
    let made = move || blocks(&ups, outputs, rank, float, false);
    let up = first
        .require(UP)?
        .derived(float.dtype(), up_shape, Arc::new(made));
    let mut parameters = vec![(DOWN, down), (UP, up)];
    if let Some(bias) = weighted(&weighed, BIAS, 0.0)? {
        parameters.push((BIAS, bias));
    }
    let module = Module {
        parameters,
        scale: Scale::of_value(if same { magnitude } else { 1.0 }, rank, false),
        stored: Stored::AsDefined,
        ..first.clone()
    };
    module.method.check(&module)?;
    Ok(module)
}

/// The narrowest type that holds all values.
fn common_type<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Float> {
    let mut common = None;
    for tensor in tensors {
        let own = tensor.float()?;
        common = Some(match common {
            None => own,
            Some(known) if known == own => own,
            Some(Float::F64) => Float::F64,
            Some(_) if own == Float::F64 => Float::F64,
            // Two of sixteen bits have no common type but this.
            Some(_) => Float::F32,
        });
    }
    Ok(common.unwrap_or(Float::F32))
}

/// Checks A (r × in × kernel…) against B (out × r × 1…).
pub(super) fn check_factors(module: &Module) -> Result<()> {
    let (module_down, module_up) = (module.require(DOWN)?, module.require(UP)?);
    let shape = |role| module.shape(role).unwrap_or_default();
    let (down, up) = (shape(DOWN), shape(UP));
    let fail = |problem: String| Err(module.error(Reason::FactorShape { problem }));
    if down.len() < 2 || up.len() < 2 {
        return fail(format!(
            "the factors have shapes {down:?} and {up:?}; a factor of one axis is a leftover of sharded training, not an adapter",
        ));
    }
    if let Some(mid) = module.get(MID) {
        check_core(module, module_down, mid, module_up)?;
    } else if down[0] != up[1] {
        return fail(format!(
            "the down factor {:?} has rank {}, the up factor {:?} has rank {}",
            module_down.shape, down[0], module_up.shape, up[1]
        ));
    }
    if up[2..].iter().any(|size| *size != 1) {
        return fail(format!("the up factor {up:?} has a kernel of its own"));
    }
    if let Some(bias) = module.get(BIAS)
        && bias.shape != [up[0]]
    {
        return fail(format!(
            "the bias has shape {:?}, the outputs are {}",
            bias.shape, up[0]
        ));
    }
    Ok(())
}

/// Most elements of A with the core folded into it: 1 GiB in f64.
const FOLDED_LIMIT: usize = 1 << 27;

/// Checks A (r × in × 1…) and M (r × r × kernel…) against each other and B.
fn check_core(module: &Module, down: &Tensor, mid: &Tensor, up: &Tensor) -> Result<()> {
    let fits = mid.shape.len() >= 2
        && mid.dimension(0) == up.dimension(1)
        && mid.dimension(1) == down.dimension(0)
        && down.shape[2..].iter().all(|size| *size == 1);
    if !fits {
        let problem = format!(
            "the factors have shapes {:?}, {:?} and {:?}, which do not go together",
            down.shape, mid.shape, up.shape
        );
        return Err(module.error(Reason::FactorShape { problem }));
    }
    let kernel: usize = mid.shape[2..].iter().product();
    let columns = down.dimension(1).checked_mul(kernel);
    match columns.and_then(|columns| columns.checked_mul(mid.dimension(0))) {
        Some(elements) if elements <= FOLDED_LIMIT => Ok(()),
        _ => Err(module.error(Reason::TooMany {
            what: "elements in the product of down and mid",
            limit: FOLDED_LIMIT,
        })),
    }
}

/// `C[p, (i,k)] = Σ_q M[p,q,k] · A[q,i]`, each a chain of fused multiply-adds in the order of q.
fn folded(down: &Tensor, mid: &Tensor) -> Tensor {
    let (outer, inner, inputs) = (mid.dimension(0), mid.dimension(1), down.dimension(1));
    let kernel: usize = mid.shape[2..].iter().product();
    let (core, factor) = (mid.clone(), down.clone());
    let made = move || {
        let (core, factor) = (core.to_f64()?, factor.to_f64()?);
        let mut bytes = Vec::with_capacity(outer * inputs * kernel * 8);
        for p in 0..outer {
            for i in 0..inputs {
                for k in 0..kernel {
                    let chain = (0..inner).fold(0.0, |acc, q| {
                        core[(p * inner + q) * kernel + k].mul_add(factor[q * inputs + i], acc)
                    });
                    bytes.extend_from_slice(&f64::to_le_bytes(chain));
                }
            }
        }
        Ok(bytes)
    };
    let shape = [&[outer, inputs], &mid.shape[2..]].concat();
    down.derived(DType::F64, shape, Arc::new(made))
}

/// One module of the parts of a fused layer of `outputs`, each on its rows; outputs of no part stay as
/// they are.
///
/// Parts that share one down factor and one scale are stacked; otherwise the down factors are stacked and
/// the up factors stand block by block, each multiplied by its own scale.
///
/// # Errors
/// [`Reason::MethodOnTarget`] for anything but two factors.
fn fused(parts: &[(&Module, Vec<Range<usize>>)], outputs: usize) -> Result<Module> {
    let (first, _) = parts
        .first()
        .ok_or_else(|| Error::new(Reason::NothingSelected))?;
    for (module, _) in parts {
        let plain = module.method.name() == LORA.name()
            && module.stored == Stored::AsDefined
            && module.parameters.len() == 2;
        if !plain {
            return Err(module.error(Reason::MethodOnTarget {
                method: module.method.name(),
                what: "a part of a fused layer",
            }));
        }
    }
    let mut shared = true;
    for (module, _) in &parts[1..] {
        let (a, b) = (first.require(DOWN)?, module.require(DOWN)?);
        shared &= module.scale == first.scale && a.dtype == b.dtype && a.equals(b)?;
    }
    let mut ups = Vec::new();
    let mut rank = 0;
    for (module, rows) in parts {
        let up = module.require(UP)?.clone();
        let width = up.dimension(1);
        ups.push((
            up,
            rows.clone(),
            if shared { 0 } else { rank },
            width,
            module.scale.value,
        ));
        rank = if shared { width } else { rank + width };
    }
    let float = common_type(ups.iter().map(|(up, ..)| up))?;
    let same = parts
        .iter()
        .all(|(module, _)| module.scale.value == first.scale.value);
    let scale = match (shared, same) {
        (true, _) => first.scale,
        (false, true) => Scale {
            value: first.scale.value,
            ..Scale::of(first.scale.value * rank as f64, rank, false)
        },
        (false, false) => Scale::of(rank as f64, rank, false),
    };
    let exact = same && ups.iter().all(|(up, ..)| up.dtype == float.dtype());
    let made = move || match exact {
        true => blocks_of_bytes(&ups, outputs, rank, float.size()),
        false => blocks(&ups, outputs, rank, float, same),
    };
    let (down, up) = (first.require(DOWN)?, first.require(UP)?);
    let up = up.derived(float.dtype(), vec![outputs, rank], Arc::new(made));
    let down = match shared {
        true => down.clone(),
        false => stacked(parts)?,
    };
    let mut module = (*first).clone();
    module.parameters = vec![(DOWN, down), (UP, up)];
    module.scale = scale;
    module.method.check(&module)?;
    Ok(module)
}

/// An up factor with its rows and first column in that of a fused layer, its width, and its scale.
type PartOfUp = (Tensor, Vec<Range<usize>>, usize, usize, f64);

/// The up factors in their places, and zeros around them.
fn blocks(
    ups: &[PartOfUp],
    outputs: usize,
    rank: usize,
    float: Float,
    same: bool,
) -> Result<Vec<u8>> {
    let mut values = vec![0.0; outputs * rank];
    for (up, rows, offset, width, own) in ups {
        let factor = up.to_f64()?;
        let by = if same { 1.0 } else { *own };
        let lines = factor.chunks_exact((*width).max(1));
        for (row, line) in rows.iter().cloned().flatten().zip(lines) {
            for (column, value) in line.iter().enumerate() {
                values[row * rank + offset + column] = value * by;
            }
        }
    }
    let first = &ups[0].0;
    narrowed(float, &values).map_err(|e| e.in_file(first.input.path()).on(&*first.name))
}

/// The same where no element changes.
fn blocks_of_bytes(ups: &[PartOfUp], outputs: usize, rank: usize, size: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; outputs * rank * size];
    for (up, rows, offset, width, _) in ups {
        let factor = up.bytes()?;
        let lines = factor.chunks_exact((width * size).max(1));
        for (row, line) in rows.iter().cloned().flatten().zip(lines) {
            let at = (row * rank + offset) * size;
            bytes[at..at + line.len()].copy_from_slice(line);
        }
    }
    Ok(bytes)
}

/// Some rows (0) or columns (1) of a matrix.
fn kept(tensor: &Tensor, axis: usize, which: &[usize]) -> Tensor {
    let (rows, columns) = (tensor.dimension(0), tensor.dimension(1));
    let shape = match axis {
        0 => vec![which.len(), columns],
        _ => vec![rows, which.len()],
    };
    let (source, which) = (tensor.clone(), which.to_vec());
    let size = tensor.dtype.bitsize() / 8;
    let made = move || {
        let bytes = source.bytes()?;
        let part = |at: usize, length: usize| &bytes[at * size..(at + length) * size];
        Ok(match axis {
            0 => which
                .iter()
                .flat_map(|row| part(row * columns, columns))
                .copied()
                .collect(),
            _ => (0..rows)
                .flat_map(|row| which.iter().map(move |column| row * columns + column))
                .flat_map(|at| part(at, 1))
                .copied()
                .collect(),
        })
    };
    tensor.derived(tensor.dtype, shape, Arc::new(made))
}

/// The down factors, one below the other.
fn stacked(parts: &[(&Module, Vec<Range<usize>>)]) -> Result<Tensor> {
    let downs = parts
        .iter()
        .map(|(module, _)| module.require(DOWN).cloned());
    let downs: Vec<Tensor> = downs.collect::<Result<_>>()?;
    let first = downs[0].clone();
    let mut shape = first.shape.clone();
    for down in &downs {
        if down.dtype != first.dtype || down.shape[1..] != first.shape[1..] {
            let problem = "the parts of a fused layer have factors of different types or inputs";
            return Err(down.error(Reason::FactorShape {
                problem: problem.to_owned(),
            }));
        }
    }
    shape[0] = downs.iter().map(|down| down.dimension(0)).sum();
    let made = move || {
        let mut bytes = Vec::new();
        for down in &downs {
            bytes.extend_from_slice(&down.bytes()?);
        }
        Ok(bytes)
    };
    Ok(first.derived(first.dtype, shape, Arc::new(made)))
}

pub(super) fn rank_of_factors(module: &Module) -> Option<usize> {
    module.shape(DOWN)?.first().copied()
}

/// Input features, without the kernel of a convolution.
pub(super) fn inputs_of_down(module: &Module) -> usize {
    module
        .shape(DOWN)
        .and_then(|down| down.get(1).copied())
        .unwrap_or(0)
}

pub(super) fn extent_of_factors(module: &Module) -> Extent {
    let core: usize = module
        .get(MID)
        .map_or(1, |mid| mid.shape[2..].iter().product());
    let inputs = module
        .shape(DOWN)
        .map(|down| down[1..].iter().product::<usize>() * core);
    let outputs = module.shape(UP).map(|up| up[0]);
    Extent {
        outputs,
        inputs,
        with_kernel: true,
        ..Extent::default()
    }
}

/// A, with the core folded into it.
fn whole_down(module: &Module) -> Result<Factor> {
    match module.get(MID) {
        Some(mid) => Factor::new(&folded(module.require(DOWN)?, mid), mid.dimension(0)),
        None => module.factor(DOWN),
    }
}

/// B · A as rows × columns of the stored matrix.
pub(super) fn product(module: &Module, orientation: Orientation, c: f64) -> Result<Product> {
    let (down, up) = (whole_down(module)?, module.factor(UP)?);
    match orientation {
        Orientation::OutputsFirst => Product::new(up, down, c),
        Orientation::InputsFirst => Product::new(down.t(), up.t(), c),
    }
}

/// Adds a product.
struct Sum(Product);

impl Update for Sum {
    fn apply(
        &self,
        rows: Range<usize>,
        _base: &[f64],
        value: &mut [f64],
        _workspace: &mut Workspace,
        kernel: &Kernel,
    ) -> Result<()> {
        self.0.add(rows, value, kernel)
    }

    fn chain(&self, row: usize, column: usize) -> Result<f64> {
        self.0.chain(row, column)
    }

    fn candidates(&self, to: Float, has_doubles: bool) -> Result<Option<Candidates<'_>>> {
        self.0.candidates(to, has_doubles)
    }

    fn multiplier(&self) -> Option<f64> {
        Some(self.0.c())
    }

    fn chains(&self, rows: Range<usize>, chains: &mut [f64], kernel: &Kernel) -> Result<()> {
        self.0.chains(rows, chains, kernel)
    }
}
