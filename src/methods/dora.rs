//! DoRA: W' = m / ‖V‖ ∘ V with V = W + scale · B · A, norms per output, or per input.
//!
//! Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024; as PEFT computes it
//! (`peft/tuners/lora/dora.py`, `peft/tuners/lora/variants.py`): no epsilon, the norm over everything but
//! the output axis, which for Conv1D and embeddings is the *columns* of the stored matrix. With several
//! adapters on one weight the norm is that of the unmerged base plus this delta, and the factor applies to
//! the running weight (PEFT 0.21; earlier versions took the norm of the running weight).
//!
//! Norms per input, over outputs and kernel, are LyCORIS' `wd_on_output=false` (`lycoris/modules/base.py`,
//! `apply_weight_decompose`) and what OneTrainer writes. LyCORIS adds 1.2e-7 to every norm; nothing is
//! added here.
//!
//! Evaluated in f64: squares are rounded and added in index order, then the square root, the quotient
//! and the product, each rounded once.

use std::ops::Range;

use ndarray::{Array2, s};

use super::lora::{
    DOWN, MID, UP, balanced, check_factors, extent_of_factors, factors_of, inputs_of_down,
    of_triplets, product, rank_of_factors, shape_of_factors, with_rank,
};
use crate::adapter::factor::Product;
use crate::adapter::fit::{Change, Difference, Fitted};
use crate::adapter::{
    Along, BiasUse, Extent, Geometry, Method, Module, Order, Orientation, Part, Role, RoleUse,
    Update, Workspace,
};
use crate::error::{Error, Reason, Result};
use crate::linalg::Kernel;
use crate::linalg::truncated::{Blocks, Truncation, truncated};

/// The learned norms, one per output.
pub const MAGNITUDE: Role = Role::new("magnitude");

/// The learned norms, one per input.
pub const INPUT_MAGNITUDE: Role = Role::new("input magnitude");

/// The method.
pub static DORA: Dora = Dora;

const MAGNITUDE_SUFFIX: &str = "dora_scale";

/// LoRA with learned norms.
#[derive(Debug)]
pub struct Dora;

impl Method for Dora {
    fn name(&self) -> &'static str {
        "DoRA"
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
                role: MAGNITUDE,
                suffix: MAGNITUDE_SUFFIX,
                required: false,
                along: Along::Outputs,
            },
            RoleUse {
                role: INPUT_MAGNITUDE,
                suffix: MAGNITUDE_SUFFIX,
                required: false,
                along: Along::AllOutputs,
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
        Order::Sequential
    }

    fn check(&self, module: &Module) -> Result<()> {
        check_factors(module)?;
        let outputs = || extent_of_factors(module).outputs.unwrap_or(0);
        let (magnitude, count, what) = match (module.get(MAGNITUDE), module.get(INPUT_MAGNITUDE)) {
            (Some(magnitude), None) => (magnitude, outputs(), "outputs"),
            (None, Some(magnitude)) => (magnitude, inputs_of_down(module), "inputs"),
            (None, None) => {
                return Err(module.error(Reason::RoleMissing {
                    role: MAGNITUDE.name(),
                    suffix: MAGNITUDE_SUFFIX.to_owned(),
                }));
            }
            (Some(_), Some(_)) => {
                let problem = "there are magnitudes for outputs and for inputs".to_owned();
                return Err(module.error(Reason::FactorShape { problem }));
            }
        };
        if magnitude.elements() != count {
            let problem = format!(
                "the magnitude has shape {:?}, the {what} are {count}",
                magnitude.shape
            );
            return Err(module.error(Reason::FactorShape { problem }));
        }
        Ok(())
    }

    fn extent(&self, module: &Module) -> Extent {
        extent_of_factors(module)
    }

    fn rank(&self, module: &Module) -> Option<usize> {
        rank_of_factors(module)
    }

    fn bias(&self, _module: &Module) -> BiasUse {
        BiasUse::No
    }

    fn shape(&self, module: &Module) -> Option<Vec<usize>> {
        shape_of_factors(module)
    }

    fn factors(
        &self,
        module: &Module,
        on: &Geometry,
    ) -> Result<Option<(Array2<f64>, Array2<f64>)>> {
        factors_of(module, on.orientation).map(Some)
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

    /// Finds `W' ≈ s ∘ W + L` of one factor s for each output and a matrix L of the rank, in turns: each step makes the
    /// residual smaller, and the first is the fit of LoRA, for s = 1. Then `V = W + L / s` has the direction, and m is
    /// what brings `m / ‖V‖ ∘ V` nearest to W'.
    fn fit(&self, change: &Change<'_>) -> Result<Fitted> {
        // Its norms are those of the weight.
        let Some(sides) = change.sides else {
            let method = self.name();
            return Err(Error::new(Reason::NotFitted { method }));
        };
        let on = &change.geometry;
        let mut sizes = vec![1.0; outputs_of(on)];
        let by_row = on.orientation == Orientation::OutputsFirst;
        let decomposed = |sizes: &[f64]| {
            let scaled = Scaled {
                sides,
                by_row,
                sizes,
            };
            truncated(&scaled, &change.settings)
        };
        let mut found = decomposed(&sizes)?;
        for _ in 0..ROUNDS {
            sizes = nearest_sizes(sides, on, &found)?;
            found = decomposed(&sizes)?;
        }
        let outputs = match on.orientation {
            Orientation::OutputsFirst => &mut found.left,
            Orientation::InputsFirst => &mut found.right,
        };
        for (mut column, size) in outputs.columns_mut().into_iter().zip(&sizes) {
            column.mapv_inplace(|element| element / size);
        }
        let magnitude = nearest_magnitudes(sides, on, &found)?;
        let scale = change.scale(found.values.len());
        let factors = balanced(on.orientation, change.shape, &mut found, scale.value);
        let mut parameters: Vec<_> = factors.into();
        parameters.push((MAGNITUDE, vec![magnitude.len()], magnitude));
        Ok(Fitted {
            parameters,
            scale,
            truncation: found,
        })
    }

    fn update(&self, module: &Module, on: &Geometry, strength: f64) -> Result<Box<dyn Update>> {
        debug_assert_eq!(on.part, Part::Weight);
        let (magnitude, kernel) = match module.get(INPUT_MAGNITUDE) {
            Some(magnitude) => (magnitude, on.kernel.max(1)),
            None => (module.require(MAGNITUDE)?, 1),
        };
        let by_output = module.get(INPUT_MAGNITUDE).is_none();
        let by_row = by_output == (on.orientation == Orientation::OutputsFirst);
        let count = if by_row { on.rows } else { on.columns / kernel };
        if magnitude.elements() != count {
            let problem = format!(
                "the magnitude has shape {:?}, the base {count} norms",
                magnitude.shape
            );
            return Err(module.error(Reason::FactorShape { problem }));
        }
        Ok(Box::new(Normalised {
            product: product(module, on.orientation, module.scale.value)?,
            magnitude: magnitude.to_f64()?,
            squares: (!by_row).then(|| vec![0.0; on.columns / kernel]),
            kernel,
            columns: on.columns.max(1), // a chunk has a size even where there is none
            strength,
        }))
    }
}

/// Turns of the sizes of outputs and the matrix of low rank.
const ROUNDS: usize = 2;

/// Sizes below this would make the direction depend on rounding.
const LEAST_SIZE: f64 = 1e-3;

/// Elements that are looked at in one block.
const BLOCK: usize = 1 << 20;

fn outputs_of(on: &Geometry) -> usize {
    match on.orientation {
        Orientation::OutputsFirst => on.rows,
        Orientation::InputsFirst => on.columns,
    }
}

/// `W' − s ∘ W`
struct Scaled<'a> {
    sides: &'a Difference<'a>,
    /// Whether outputs are rows.
    by_row: bool,
    /// One for each output.
    sizes: &'a [f64],
}

impl Blocks for Scaled<'_> {
    fn rows(&self) -> usize {
        self.sides.rows()
    }

    fn columns(&self) -> usize {
        self.sides.columns()
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let mut base = vec![0.0; values.len()];
        self.sides.base.fill(rows.clone(), &mut base)?;
        self.sides.tuned.fill(rows.clone(), values)?;
        let columns = self.columns().max(1);
        let lines = values
            .chunks_exact_mut(columns)
            .zip(base.chunks_exact(columns));
        for (row, (values, base)) in rows.zip(lines) {
            for (column, (value, base)) in values.iter_mut().zip(base).enumerate() {
                let size = self.sizes[if self.by_row { row } else { column }];
                *value = size.mul_add(-base, *value);
            }
        }
        Ok(())
    }
}

/// Sums of two products for each output, over all elements of base, tuned and `Σ values · left · right`.
fn by_output(
    sides: &Difference<'_>,
    on: &Geometry,
    found: &Truncation,
    pair: impl Fn(f64, f64, f64) -> (f64, f64),
) -> Result<(Vec<f64>, Vec<f64>)> {
    let by_row = on.orientation == Orientation::OutputsFirst;
    let (mut first, mut second) = (vec![0.0; outputs_of(on)], vec![0.0; outputs_of(on)]);
    let step = (BLOCK / on.columns.max(1)).max(1);
    let mut weighted = found.left.clone();
    for (mut row, value) in weighted.rows_mut().into_iter().zip(&found.values) {
        row.mapv_inplace(|element| element * value);
    }
    for start in (0..on.rows).step_by(step) {
        let rows = start..(start + step).min(on.rows);
        let (mut base, mut tuned) = (
            vec![0.0; rows.len() * on.columns],
            vec![0.0; rows.len() * on.columns],
        );
        sides.base.fill(rows.clone(), &mut base)?;
        sides.tuned.fill(rows.clone(), &mut tuned)?;
        let low = weighted.slice(s![.., rows.clone()]).t().dot(&found.right);
        for ((row, column), low) in low.indexed_iter() {
            let at = row * on.columns + column;
            let (a, b) = pair(base[at], tuned[at], *low);
            let output = if by_row { rows.start + row } else { column };
            first[output] += a;
            second[output] += b;
        }
    }
    Ok((first, second))
}

/// `⟨W' − L, W⟩ / ‖W‖²` of each output; 1 where that says nothing.
fn nearest_sizes(sides: &Difference<'_>, on: &Geometry, found: &Truncation) -> Result<Vec<f64>> {
    let (over, under) = by_output(sides, on, found, |base, tuned, low| {
        ((tuned - low) * base, base * base)
    })?;
    let size = |(over, under): (f64, f64)| match under > 0.0 && over / under > LEAST_SIZE {
        true => over / under,
        false => 1.0,
    };
    Ok(over.into_iter().zip(under).map(size).collect())
}

/// `⟨W', V⟩ / ‖V‖` of each output, with V = W + L.
fn nearest_magnitudes(
    sides: &Difference<'_>,
    on: &Geometry,
    found: &Truncation,
) -> Result<Vec<f64>> {
    let (over, under) = by_output(sides, on, found, |base, tuned, low| {
        let direction = base + low;
        (tuned * direction, direction * direction)
    })?;
    match under.iter().position(|square| *square == 0.0) {
        Some(output) => Err(Error::new(Reason::NoDirection { output })),
        None => Ok(over
            .iter()
            .zip(&under)
            .map(|(over, under)| over / under.sqrt())
            .collect()),
    }
}

struct Normalised {
    product: Product,
    magnitude: Vec<f64>,
    /// Sums of squares per column (or `kernel` neighbouring columns), where norms are not those of rows.
    squares: Option<Vec<f64>>,
    kernel: usize,
    columns: usize,
    strength: f64,
}

impl Update for Normalised {
    fn surveys(&self) -> bool {
        self.squares.is_some()
    }

    fn survey(&mut self, rows: Range<usize>, base: &[f64], kernel: &Kernel) -> Result<()> {
        let mut matrix = base.to_vec();
        self.product.add(rows, &mut matrix, kernel)?;
        if let Some(squares) = &mut self.squares {
            for row in matrix.chunks_exact(self.columns) {
                for (sum, values) in squares.iter_mut().zip(row.chunks(self.kernel)) {
                    for value in values {
                        *sum += value * value;
                    }
                }
            }
        }
        Ok(())
    }

    fn apply(
        &self,
        rows: Range<usize>,
        base: &[f64],
        value: &mut [f64],
        workspace: &mut Workspace,
        kernel: &Kernel,
    ) -> Result<()> {
        let matrix = &mut workspace.matrix;
        matrix.clear();
        matrix.extend_from_slice(base);
        self.product.add(rows.clone(), matrix, kernel)?;
        let factors: Vec<f64> = match &self.squares {
            Some(squares) => factors(&self.magnitude, squares.iter().copied()),
            None => {
                let sums = matrix
                    .chunks_exact(self.columns)
                    .map(|row| row.iter().fold(0.0, |sum, v| sum + v * v));
                factors(&self.magnitude[rows.clone()], sums)
            }
        };
        if value != base {
            // The running weight plus this delta.
            matrix.clear();
            matrix.extend_from_slice(value);
            self.product.add(rows, matrix, kernel)?;
        }
        for (row, (value, matrix)) in value
            .chunks_exact_mut(self.columns)
            .zip(matrix.chunks_exact(self.columns))
            .enumerate()
        {
            for (column, (value, merged)) in value.iter_mut().zip(matrix).enumerate() {
                let factor = if self.squares.is_some() {
                    factors[column / self.kernel]
                } else {
                    factors[row]
                };
                *value = interpolate(*value, factor * merged, self.strength);
            }
        }
        Ok(())
    }
}

fn factors(magnitude: &[f64], sums: impl Iterator<Item = f64>) -> Vec<f64> {
    magnitude
        .iter()
        .zip(sums)
        .map(|(magnitude, sum)| magnitude / sum.sqrt())
        .collect()
}

/// `weight + strength · (merged − weight)`, which at strength 1 is `merged` itself.
#[inline(always)]
pub(super) fn interpolate(weight: f64, merged: f64, strength: f64) -> f64 {
    if strength == 1.0 {
        merged
    } else {
        strength.mul_add(merged - weight, weight)
    }
}
