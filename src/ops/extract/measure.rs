//! One layer: a module is fitted to its difference, rounded, and measured as it would be merged.

use std::time::Instant;

use rayon::prelude::*;

use super::pairs::Pair;
use super::report::{FittedReport, Proved};
use crate::adapter::fit::{Change, Difference, Stored};
use crate::adapter::{Geometry, Method, Module, Scale, Update, Workspace};
use crate::error::Result;
use crate::linalg::Kernel;
use crate::linalg::truncated::Settings;
use crate::naming::Spelling;
use crate::tensor::{Float, Tensor, narrowed};

/// Elements that one task compares.
const BLOCK: usize = 32 << 10;

/// Rows that a task has at least: the kernels work on tiles of eight.
const TILE: usize = 8;

/// A module with its factors in memory, and what is told of it.
pub(super) struct Measured {
    pub(super) module: Module,
    pub(super) report: FittedReport,
    /// ‖W‖²
    pub(super) base_square: f64,
}

/// Fits, rounds and measures.
pub(super) fn measured(
    pair: &Pair,
    method: &'static dyn Method,
    settings: Settings<'_>,
    (alpha, dtype): (Option<f64>, Float),
) -> Result<Measured> {
    let start = Instant::now();
    let (base, tuned) = (pair.base.settled()?, pair.tuned.settled()?);
    let (base, tuned) = (Stored::new(&base)?, Stored::new(&tuned)?);
    let sides = Difference {
        base: &base,
        tuned: &tuned,
    };
    let change = Change {
        difference: &sides,
        sides: Some(&sides),
        geometry: pair.geometry(),
        shape: &pair.base.shape,
        settings,
        alpha,
    };
    let fitted = method
        .fit(&change)
        .map_err(|e| e.on(&*pair.base.name).in_file(pair.tuned.input.path()))?;
    let mut parameters = Vec::new();
    for (role, shape, values) in fitted.parameters {
        let bytes = narrowed(dtype, &values).map_err(|e| e.on(&*pair.base.name))?;
        parameters.push((role, pair.base.holding(dtype.dtype(), shape, bytes)));
    }
    let module = module(pair, method, parameters, fitted.scale)?;
    (settings.check)()?;
    let sums = compared(&sides, &change.geometry, &module)?;
    let found = fitted.truncation;
    let norm = sums.change.sqrt();
    let (residual, energy) = (ratio(sums.left.sqrt(), norm), found.energy());
    let before_rounding = ratio((found.square * (1.0 - energy)).sqrt(), norm);
    let (proof, excess) = Proved::of(found.proof);
    Ok(Measured {
        base_square: sums.base,
        report: FittedReport {
            path: module.path.clone(),
            shape: pair.base.shape.clone(),
            rank: found.values.len(),
            reached: found.reached,
            change: ratio(norm, sums.base.sqrt()),
            norm,
            energy,
            residual,
            rounding: (residual - before_rounding).max(0.0),
            largest_error: sums.largest,
            proof,
            excess,
            singular_values: found.spectrum,
            seconds: start.elapsed().as_secs_f64(),
        },
        module,
    })
}

/// The singular values behind a fit.
pub(super) fn spectrum(
    pair: &Pair,
    method: &'static dyn Method,
    settings: Settings<'_>,
) -> Result<Vec<f64>> {
    let (base, tuned) = (pair.base.settled()?, pair.tuned.settled()?);
    let sides = Difference {
        base: &Stored::new(&base)?,
        tuned: &Stored::new(&tuned)?,
    };
    let fitted = method.fit(&Change {
        difference: &sides,
        sides: Some(&sides),
        geometry: pair.geometry(),
        shape: &pair.base.shape,
        settings,
        alpha: None,
    });
    Ok(fitted
        .map_err(|e| e.on(&*pair.base.name))?
        .truncation
        .spectrum)
}

/// A module on a layer.
pub(super) fn module(
    pair: &Pair,
    method: &'static dyn Method,
    parameters: Vec<(crate::adapter::Role, Tensor)>,
    scale: Scale,
) -> Result<Module> {
    let spelling = match pair.in_part {
        true => Spelling::InComponent,
        false => Spelling::Dotted,
    };
    let module = Module::new(pair.path.clone(), method, parameters, scale, pair.layer())?;
    Ok(module.spelled(spelling))
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// Sums over a weight, in f64.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// Σ(W' − merged)²
    left: f64,
    /// ΣΔ²
    change: f64,
    /// ΣW²
    base: f64,
    /// The largest |W' − merged|.
    largest: f64,
}

/// What a merge of the module would leave of the change, before it is rounded to the type of the weight.
fn compared(sides: &Difference<'_>, on: &Geometry, module: &Module) -> Result<Sums> {
    let mut update = module.method.update(module, on, 1.0)?;
    let kernel = Kernel::best();
    let step = (BLOCK / on.columns.max(1)).max(TILE);
    let starts: Vec<usize> = (0..on.rows).step_by(step).collect();
    if update.surveys() {
        for first in &starts {
            let rows = *first..(first + step).min(on.rows);
            let mut base = vec![0.0; rows.len() * on.columns];
            sides.base.fill(rows.clone(), &mut base)?;
            update.survey(rows, &base, kernel)?;
        }
    }
    let update: &dyn Update = &*update;
    let sums = starts
        .par_iter()
        .map_init(Default::default, |scratch: &mut Scratch, first| {
            let rows = *first..(first + step).min(on.rows);
            let count = rows.len() * on.columns;
            for buffer in [&mut scratch.base, &mut scratch.tuned] {
                buffer.clear();
                buffer.resize(count, 0.0);
            }
            sides.base.fill(rows.clone(), &mut scratch.base)?;
            sides.tuned.fill(rows.clone(), &mut scratch.tuned)?;
            scratch.value.clone_from(&scratch.base);
            update.apply(
                rows,
                &scratch.base,
                &mut scratch.value,
                &mut scratch.workspace,
                kernel,
            )?;
            let mut sums = Sums::default();
            for ((base, tuned), value) in
                scratch.base.iter().zip(&scratch.tuned).zip(&scratch.value)
            {
                let (left, difference) = (tuned - value, tuned - base);
                sums.left += left * left;
                sums.change += difference * difference;
                sums.base += base * base;
                sums.largest = sums.largest.max(left.abs());
            }
            Ok(sums)
        });
    let sums: Vec<Sums> = sums.collect::<Result<_>>()?;
    Ok(sums.iter().fold(Sums::default(), |all, part| Sums {
        left: all.left + part.left,
        change: all.change + part.change,
        base: all.base + part.base,
        largest: all.largest.max(part.largest),
    }))
}

/// Memory of one thread.
#[derive(Default)]
struct Scratch {
    base: Vec<f64>,
    tuned: Vec<f64>,
    value: Vec<f64>,
    workspace: Workspace,
}
