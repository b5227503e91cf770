//! Certified rounding: candidates whose bound settles what they round to, and the definition for the others.
//!
//! Where both ends of an interval that holds a value round to the same bits, so does the value, because rounding is
//! monotone.

use std::ops::Range;

use super::candidates::Chains;
use super::evaluate::{Recipe, overlap};
use crate::error::Result;
use crate::linalg::{ChainBound, Kernel};
use crate::tensor::Float;

/// The share of a block that may be left to the definition element by element; beyond it the kernel is faster.
const SHARE: usize = 16;

/// Memory of one thread.
#[derive(Default)]
pub(super) struct Memory {
    bound: Vec<f64>,
    low: Vec<f64>,
    chains: Vec<f64>,
    exact: Vec<f64>,
    zeros: Vec<f64>,
    ends: [Vec<u8>; 2],
    open: Vec<usize>,
}

impl Recipe {
    /// Brings rows, which hold the base, to values that round as the definition's: candidates where their bound says
    /// so, the definition's own where it does not. Returns how many those are; nothing where they are too many.
    ///
    /// # Errors
    /// What reading the parameters gives.
    pub(super) fn settle(
        &self,
        rows: &Range<usize>,
        chains: &[Option<Chains>],
        base: &[f64],
        value: &mut [f64],
        memory: &mut Memory,
        kernel: &Kernel,
    ) -> Result<Option<u64>> {
        let touched = self.approximate(rows, chains, value, memory, kernel)?;
        let Memory {
            bound,
            low,
            ends,
            open,
            ..
        } = memory;
        let columns = self.columns;
        low.resize(columns, 0.0);
        open.clear();
        for end in &mut *ends {
            end.resize(columns * self.to.size(), 0);
        }
        for (row, _) in touched.iter().enumerate().filter(|(_, touched)| **touched) {
            let range = row * columns..(row + 1) * columns;
            let high = &mut bound[range.clone()];
            let finite = kernel.interval(&value[range.clone()], high, low);
            kernel.narrow(self.to, low, &mut ends[0]);
            kernel.narrow(self.to, high, &mut ends[1]);
            if finite && ends[0] == ends[1] {
                continue;
            }
            for (column, index) in range.enumerate() {
                let settled = (high[column] - low[column]).is_finite()
                    && is_same(self.to, &ends[0], &ends[1], column);
                // What is not finite in the base stays, whatever the value.
                if !settled && base[index].is_finite() {
                    open.push(index);
                }
            }
            if open.len() > value.len() / SHARE {
                return Ok(None);
            }
        }
        for index in &*open {
            let (row, column) = (rows.start + index / columns, index % columns);
            value[*index] = self.element(row, column, base[*index])?;
        }
        Ok(Some(open.len() as u64))
    }

    /// Adds candidates, and bounds how far each value may be from the definition's; which rows of the block that is
    /// about.
    fn approximate(
        &self,
        rows: &Range<usize>,
        chains: &[Option<Chains>],
        value: &mut [f64],
        memory: &mut Memory,
        kernel: &Kernel,
    ) -> Result<Vec<bool>> {
        let columns = self.columns;
        memory.bound.clear();
        memory.bound.resize(value.len(), 0.0);
        memory.zeros.resize(columns, 0.0);
        let mut touched = vec![false; rows.len()];
        for (step, chains) in self.steps.iter().zip(chains) {
            let Some((local, within)) = overlap(rows, &step.rows) else {
                continue;
            };
            let c = step.update.multiplier().unwrap_or_default();
            if chains.is_none() {
                memory.exact.resize(within.len() * columns, 0.0);
                step.update
                    .chains(local.clone(), &mut memory.exact, kernel)?;
            }
            for (index, (row, own)) in local.zip(within).enumerate() {
                touched[own] = true;
                let exact = index * columns..(index + 1) * columns;
                let (chain, of_chain) = match chains {
                    Some(chains) => chains.row(row, &mut memory.chains),
                    None => (&memory.exact[exact], exact_chain(&memory.zeros)),
                };
                let range = own * columns..(own + 1) * columns;
                let (value, bound) = (&mut value[range.clone()], &mut memory.bound[range]);
                kernel.accumulate_bounded(c, chain, &of_chain, value, bound);
            }
        }
        Ok(touched)
    }

    /// One element, by the definition.
    fn element(&self, row: usize, column: usize, base: f64) -> Result<f64> {
        let mut value = base;
        for step in self.steps.iter().filter(|step| step.rows.contains(&row)) {
            let c = step.update.multiplier().unwrap_or_default();
            let chain = step.update.chain(row - step.rows.start, column)?;
            value = c.mul_add(chain, value);
        }
        Ok(value)
    }
}

/// The bound of chains that are those of the definition.
fn exact_chain(zeros: &[f64]) -> ChainBound<'_> {
    ChainBound {
        row: 0.0,
        columns: zeros,
        relative: 0.0,
        floor: 0.0,
    }
}

fn is_same(float: Float, low: &[u8], high: &[u8], column: usize) -> bool {
    let range = column * float.size()..(column + 1) * float.size();
    low[range.clone()] == high[range]
}
