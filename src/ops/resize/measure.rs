//! One module: decomposed, cut, rounded and measured.

use std::sync::Arc;

use ndarray::{Array2, Axis, concatenate};

use super::report::{How, ResizedReport};
use crate::adapter::{Geometry, Module, Role, Scale};
use crate::error::{Error, Reason, Result};
use crate::linalg::dense::{Algebra, Dense, Into};
use crate::linalg::truncated::{Settings, Truncation, of_factors};
use crate::tensor::{Float, Tensor, narrowed};

/// A module that has a rank.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) module: &'a Module,
    pub(super) on: Geometry,
    pub(super) rank: usize,
}

impl<'a> Layer<'a> {
    /// The module as a layer, or why it has none.
    pub(super) fn of(module: &'a Module) -> std::result::Result<Self, String> {
        let why = |what: &str| format!("{} has {what}", module.method.name());
        let rank = module.method.rank(module).ok_or_else(|| why("no rank"))?;
        let on = module.geometry();
        let on = on.ok_or_else(|| why("parameters that do not tell the shape of their weight"))?;
        Ok(Layer { module, on, rank })
    }

    pub(super) fn smaller_side(&self) -> usize {
        self.on.rows.min(self.on.columns)
    }

    /// The same with a multiplier of 1, whose factors are those in the file.
    fn plain(&self) -> Module {
        Module {
            scale: Scale::ONE,
            ..self.module.clone()
        }
    }

    /// The first singular triplets of `B · A` without its scale.
    ///
    /// # Errors
    /// [`Reason::FactorNotFinite`]; what reading and decomposing gives.
    pub(super) fn decomposed(&self, settings: &Settings<'_>) -> Result<Truncation> {
        let place = |error: Error| self.placed(error);
        let factors = self.module.method.factors(&self.plain(), &self.on);
        let Some((left, right)) = factors.map_err(place)? else {
            let (method, what) = (self.module.method.name(), "a layer without its weight");
            return Err(self.module.error(Reason::MethodOnTarget { method, what }));
        };
        let all = left.iter().chain(&right);
        match all.filter(|value| !value.is_finite()).count() as u64 {
            0 => of_factors(left, right, settings).map_err(place),
            count => Err(self.module.error(Reason::FactorNotFinite { count })),
        }
    }

    fn placed(&self, error: Error) -> Error {
        match self.module.parameters.first() {
            Some((_, tensor)) => error.on(&*self.module.path).in_file(tensor.input.path()),
            None => error.on(&*self.module.path),
        }
    }

    /// The module with as many triplets as its rank is to be, in f64.
    pub(super) fn of_triplets(&self, found: &mut Truncation) -> Result<Module> {
        let rank = found.values.len();
        let made = self.module.method.of_triplets(&self.plain(), found);
        let made = made.ok_or_else(|| {
            let method = self.module.method.name();
            self.module.error(Reason::NotFitted { method })
        })?;
        Ok(Module {
            scale: self.module.scale.at_rank(rank),
            ..made
        })
    }
}

/// The type of a tensor that takes the place of one of the module's.
pub(super) fn own_type(module: &Module, role: Role, wanted: Option<Float>) -> Result<Float> {
    match wanted {
        Some(float) => Ok(float),
        None => module.require(role)?.float(),
    }
}

/// Whether a tensor of a changed module is not the one that it was.
pub(super) fn is_new(module: &Module, role: Role, tensor: &Tensor) -> bool {
    let same = |old: &Tensor| {
        let memory = match (&old.memory, &tensor.memory) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (old, new) => old.is_none() && new.is_none(),
        };
        memory && old.offset == tensor.offset && old.shape == tensor.shape
    };
    !module.get(role).is_some_and(same)
}

/// A module of another rank, and what is told of it.
pub(super) struct Resized {
    pub(super) module: Module,
    pub(super) report: ResizedReport,
}

/// A module of a rank, its new factors rounded to their type.
pub(super) fn resized(
    layer: &Layer<'_>,
    mut found: Truncation,
    (rank, reached): (usize, bool),
    dtype: Option<Float>,
    algebra: &dyn Algebra,
) -> Result<Resized> {
    let module = layer.module;
    let factor = module.scale.value.abs();
    let square: f64 = found.spectrum.iter().map(|value| value * value).sum();
    let share = |part: f64| if square > 0.0 { part / square } else { 0.0 };
    let mut report = ResizedReport {
        path: module.path.clone(),
        parts: Vec::new(),
        shape: module.method.shape(module).unwrap_or_default(),
        old_rank: layer.rank,
        rank,
        reached,
        how: How::Same,
        norm: square.sqrt() * factor,
        energy: 1.0,
        residual: 0.0,
        rounding: 0.0,
        singular_values: found.spectrum.iter().map(|value| value * factor).collect(),
    };
    if rank == layer.rank {
        let module = module.clone();
        return Ok(Resized { module, report });
    }
    if rank > layer.rank
        && let Some(module) = module.method.filled(module, rank)
    {
        report.how = How::Filled;
        return Ok(Resized { module, report });
    }
    report.how = How::Decomposed;
    found.cut(rank);
    let left: f64 = found
        .spectrum
        .iter()
        .skip(found.values.len())
        .map(|value| value * value)
        .sum();
    found.fill(rank);
    let exact = layer.of_triplets(&mut found)?;
    let rounded = rounded(layer, &exact, dtype)?;
    let rounding = apart(layer, &exact, &rounded, algebra)?;
    report.energy = 1.0 - share(left);
    report.residual = share(left + rounding).sqrt();
    report.rounding = report.residual - share(left).sqrt();
    Ok(Resized {
        module: rounded,
        report,
    })
}

/// The module with its new factors in the type that they are written in.
fn rounded(layer: &Layer<'_>, exact: &Module, dtype: Option<Float>) -> Result<Module> {
    let mut module = exact.clone();
    for (role, tensor) in &mut module.parameters {
        if !is_new(layer.module, *role, tensor) {
            continue;
        }
        let float = own_type(layer.module, *role, dtype)?;
        let bytes = narrowed(float, &tensor.to_f64()?).map_err(|e| layer.placed(e))?;
        *tensor = tensor.holding(float.dtype(), tensor.shape.clone(), bytes);
    }
    Ok(module)
}

/// The squared norm of the difference of two products of nearly the same factors, without their scale.
///
/// `L·R − L'·R' = (L − L')·R + L'·(R − R')`, of which both terms are as small as the rounding; and `‖X·Y‖²` is the sum
/// of the products of the elements of `Xᵀ·X` and `Y·Yᵀ`.
fn apart(
    layer: &Layer<'_>,
    exact: &Module,
    rounded: &Module,
    algebra: &dyn Algebra,
) -> Result<f64> {
    let factors = |module: &Module| {
        let scale = Scale::ONE;
        let plain = Module {
            scale,
            ..module.clone()
        };
        module.method.factors(&plain, &layer.on)
    };
    let (Some((left, right)), Some((rounded_left, rounded_right))) =
        (factors(exact)?, factors(rounded)?)
    else {
        return Ok(0.0);
    };
    let beside = |axis, parts: [&Array2<f64>; 2]| {
        let views = parts.map(|part| part.view());
        concatenate(Axis(axis), &views).expect("both are of one shape")
    };
    let x = beside(1, [&(left - &rounded_left), &rounded_left]);
    let y = beside(0, [&right, &(&right - rounded_right)]);
    let algebra: &dyn Dense<f64> = algebra;
    let mut sides = [x.ncols(), x.ncols()].map(|size| Array2::zeros((size, size)));
    algebra.multiply(x.t(), x.view(), sides[0].view_mut(), Into::Place)?;
    algebra.multiply(y.view(), y.t(), sides[1].view_mut(), Into::Place)?;
    let products = sides[0].iter().zip(&sides[1]).map(|(a, b)| a * b);
    Ok(products.sum::<f64>().max(0.0))
}
