//! The value of a merged tensor, block of rows by block of rows, rounded once.
//!
//! `docs/numerics.md` is the definition: widen exactly, apply the updates in order in f64, round once to
//! the type of the output. An element that no delta touches keeps its bits, and so does one that is NaN
//! or infinite in the base.

use std::ops::Range;

use super::candidates::Chains;
use super::certified;
use super::method::{Update, Workspace};
use super::preimage::Term;
use crate::error::Result;
use crate::linalg::Kernel;
use crate::tensor::{Float, is_finite_at};

/// An update on a range of rows of a matrix.
pub struct Step {
    /// The rows, in those of the whole matrix.
    pub rows: Range<usize>,
    /// What happens to them; counts rows from the first of `rows`.
    pub update: Box<dyn Update>,
}

/// Rows of the source as they are stored.
#[derive(Clone, Copy)]
pub struct Elements<'a> {
    /// Their type.
    pub float: Float,
    /// Their bytes.
    pub bytes: &'a [u8],
}

/// How one matrix is made from another.
pub struct Recipe {
    /// Columns of the matrix.
    pub columns: usize,
    /// Type of the result.
    pub to: Float,
    /// What is applied, in order.
    pub steps: Vec<Step>,
}

/// Sums over a block: added up in the order of the blocks, they do not depend on the threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    /// Σ (value − base)², before rounding.
    pub delta: f64,
    /// Σ base².
    pub base: f64,
    /// Elements that came out NaN or infinite while the base is finite.
    pub not_finite: u64,
    /// The first of them: row and column.
    pub first: Option<(usize, usize)>,
    /// Elements that are NaN or infinite in the base.
    pub base_not_finite: u64,
    /// Elements that candidates left to the definition.
    pub recomputed: u64,
}

impl Sums {
    /// Adds the sums of the next block.
    pub fn add(&mut self, next: &Sums) {
        self.delta += next.delta;
        self.base += next.base;
        self.not_finite += next.not_finite;
        self.first = self.first.or(next.first);
        self.base_not_finite += next.base_not_finite;
        self.recomputed += next.recomputed;
    }
}

/// Memory of one thread.
#[derive(Default)]
pub struct Scratch {
    base: Vec<f64>,
    value: Vec<f64>,
    workspace: Workspace,
    certified: certified::Memory,
}

/// By what values are made.
#[derive(Clone, Copy)]
pub enum Means<'a> {
    /// The updates.
    Updates,
    /// What they add to the block, known already.
    Terms(&'a [Term]),
    /// Candidates for the chains of the updates, where there are any of an update.
    Candidates(&'a [Option<Chains>]),
}

impl Recipe {
    /// Whether some step must see the whole source first.
    pub fn surveys(&self) -> bool {
        self.steps.iter().any(|step| step.update.surveys())
    }

    /// Shows the next rows of the source to the steps that asked for it.
    ///
    /// # Errors
    /// What reading the parameters gives.
    pub fn survey(
        &mut self,
        rows: Range<usize>,
        source: Elements<'_>,
        kernel: &Kernel,
    ) -> Result<()> {
        let mut base = vec![0.0; rows.len() * self.columns];
        kernel.widen(source.float, source.bytes, &mut base);
        for step in self.steps.iter_mut().filter(|step| step.update.surveys()) {
            if let Some((local, within)) = overlap(&rows, &step.rows) {
                let base = &base[within.start * self.columns..within.end * self.columns];
                step.update.survey(local, base, kernel)?;
            }
        }
        Ok(())
    }

    /// What is added to the rows `rows`, where adding is all that happens to them.
    ///
    /// # Errors
    /// What reading the parameters gives.
    pub fn terms(&self, rows: Range<usize>, kernel: &Kernel) -> Result<Option<Vec<Term>>> {
        let mut terms = Vec::new();
        for step in &self.steps {
            let Some((local, within)) = overlap(&rows, &step.rows) else {
                continue;
            };
            let Some(c) = step.update.multiplier() else {
                return Ok(None);
            };
            let mut chains = vec![0.0; within.len() * self.columns];
            step.update.chains(local, &mut chains, kernel)?;
            terms.push(Term {
                elements: within.start * self.columns..within.end * self.columns,
                c,
                chains,
            });
        }
        Ok(Some(terms))
    }

    /// Evaluates the rows `rows`: `source` holds them, `result` takes them. The bytes are the same by any means; the
    /// sums are those of the values that the means give.
    ///
    /// # Errors
    /// What reading the parameters gives.
    pub fn evaluate(
        &self,
        rows: Range<usize>,
        source: Elements<'_>,
        means: Means<'_>,
        result: &mut [u8],
        scratch: &mut Scratch,
        kernel: &Kernel,
    ) -> Result<Sums> {
        let count = rows.len() * self.columns;
        let Scratch {
            base,
            value,
            workspace,
            certified,
        } = scratch;
        base.resize(count, 0.0);
        kernel.widen(source.float, source.bytes, base);
        value.clear();
        value.extend_from_slice(base);
        let mut sums = Sums::default();
        let settled = match means {
            Means::Updates => false,
            Means::Terms(terms) => {
                for term in terms {
                    kernel.accumulate(term.c, &term.chains, &mut value[term.elements.clone()]);
                }
                true
            }
            Means::Candidates(chains) => {
                let open = self.settle(&rows, chains, base, value, certified, kernel)?;
                sums.recomputed = open.unwrap_or(count as u64);
                open.is_some()
            }
        };
        if !settled {
            value.copy_from_slice(base);
            self.change(&rows, base, value, workspace, kernel)?;
        }
        kernel.narrow(self.to, value, result);
        let limit = overflow(self.to);
        for (index, row) in rows.enumerate() {
            let range = index * self.columns..(index + 1) * self.columns;
            let mut survey = kernel.survey(&base[range.clone()], &value[range.clone()], limit);
            if survey.care {
                self.keep_bits(row, range.clone(), source, result, base, value, &mut sums)?;
                survey = kernel.survey(&base[range.clone()], &value[range], limit);
            }
            sums.delta += survey.delta;
            sums.base += survey.base;
        }
        Ok(sums)
    }

    /// Applies the steps to values of rows that are their own base; nothing is rounded.
    ///
    /// # Errors
    /// What reading the parameters gives.
    pub fn apply(
        &self,
        rows: Range<usize>,
        value: &mut [f64],
        scratch: &mut Scratch,
        kernel: &Kernel,
    ) -> Result<()> {
        let Scratch {
            base, workspace, ..
        } = scratch;
        base.clear();
        base.extend_from_slice(value);
        self.change(&rows, base, value, workspace, kernel)
    }

    /// The steps, in order.
    fn change(
        &self,
        rows: &Range<usize>,
        base: &[f64],
        value: &mut [f64],
        workspace: &mut Workspace,
        kernel: &Kernel,
    ) -> Result<()> {
        for step in &self.steps {
            if let Some((local, within)) = overlap(rows, &step.rows) {
                let within = within.start * self.columns..within.end * self.columns;
                let base = &base[within.clone()];
                step.update
                    .apply(local, base, &mut value[within], workspace, kernel)?;
            }
        }
        Ok(())
    }

    /// Gives elements their bits back that must keep them, and counts what is not finite.
    #[allow(
        clippy::too_many_arguments,
        reason = "one row of five parallel buffers"
    )]
    fn keep_bits(
        &self,
        row: usize,
        range: Range<usize>,
        source: Elements<'_>,
        result: &mut [u8],
        base: &mut [f64],
        value: &mut [f64],
        sums: &mut Sums,
    ) -> Result<()> {
        for (column, index) in range.enumerate() {
            if !base[index].is_finite() {
                sums.base_not_finite += 1;
                self.copy_element(index, source, result);
                // They have no part in the norms.
                (base[index], value[index]) = (0.0, 0.0);
            } else if is_negative_zero(base[index]) && value[index] == 0.0 {
                if !self.touches(row, column)? {
                    self.copy_element(index, source, result);
                }
            } else if !is_finite_at(self.to, result, index) {
                sums.not_finite += 1;
                sums.first = sums.first.or(Some((row, column)));
                if value[index].is_nan() {
                    // Processors differ in the sign and payload of the NaN that an operation gives.
                    self.store(f64::from_bits(0x7ff8 << 48), index, result);
                }
            }
        }
        Ok(())
    }

    fn copy_element(&self, index: usize, source: Elements<'_>, result: &mut [u8]) {
        let size = source.float.size();
        let element = &source.bytes[index * size..(index + 1) * size];
        if source.float == self.to {
            result[index * size..(index + 1) * size].copy_from_slice(element);
        } else {
            let mut value = [0.0];
            crate::tensor::widen(source.float, element, &mut value);
            self.store(value[0], index, result);
        }
    }

    fn store(&self, value: f64, index: usize, result: &mut [u8]) {
        let size = self.to.size();
        let result = &mut result[index * size..(index + 1) * size];
        crate::tensor::narrow(self.to, &[value], result);
    }

    fn touches(&self, row: usize, column: usize) -> Result<bool> {
        for step in self.steps.iter().filter(|step| step.rows.contains(&row)) {
            if step.update.touches(row - step.rows.start, column)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The rows that a block and a step share: counted from the step's first row, and from the block's.
pub(super) fn overlap(
    block: &Range<usize>,
    step: &Range<usize>,
) -> Option<(Range<usize>, Range<usize>)> {
    let start = block.start.max(step.start);
    let end = block.end.min(step.end);
    (start < end).then(|| {
        (
            start - step.start..end - step.start,
            start - block.start..end - block.start,
        )
    })
}

/// The smallest magnitude that rounds to infinity: the tie above the largest finite value.
fn overflow(to: Float) -> f64 {
    match to {
        Float::F64 => f64::INFINITY,
        Float::F32 => 2f64.powi(128) - 2f64.powi(103),
        Float::BF16 => 2f64.powi(128) - 2f64.powi(119),
        Float::F16 => 65520.0,
    }
}

fn is_negative_zero(value: f64) -> bool {
    value.to_bits() == 1 << 63
}
