//! How far what was taken out of a merged tensor may be from the base.
//!
//! A merged value M stands for everything that rounds to it. The inverse of a merge is monotone in each element, so the
//! base lies between what it makes of the two ends of that interval, in f64 before rounding.

use std::ops::Range;

use super::evaluate::{Elements, Recipe, Scratch};
use super::preimage::{bits_at, bits_of_place, place, rounded, value_of};
use crate::error::Result;
use crate::linalg::Kernel;
use crate::tensor::Float;

/// What is known of a block, or of all of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bound {
    /// No element is further from that of the base.
    pub most: f64,
    /// Expected number of elements that are not those of the base: of n values that became the merged one, each is as
    /// likely.
    pub differing: f64,
    /// Elements that no value of the base became.
    pub impossible: u64,
    /// All elements.
    pub elements: u64,
}

impl Bound {
    /// Adds the next block.
    pub fn add(&mut self, next: &Bound) {
        self.most = self.most.max(next.most);
        self.differing += next.differing;
        self.impossible += next.impossible;
        self.elements += next.elements;
    }
}

/// The ends of the values that round to a stored one; nothing where it is not finite.
fn ends(float: Float, bits: u64) -> Option<(f64, f64)> {
    let value = value_of(float, bits);
    if !value.is_finite() {
        return None;
    }
    let own = place(float, bits);
    let [below, above] = [own - 1, own + 1].map(|at| value_of(float, bits_of_place(float, at)));
    let half = |neighbour: f64, other: f64| match neighbour.is_finite() {
        true => neighbour / 2.0 - value / 2.0,
        // Beyond the largest finite value the steps would go on as before it.
        false => value / 2.0 - other / 2.0,
    };
    Some((value + half(below, above), value + half(above, below)))
}

/// Compares rows that an inverse restored with the ends of what they may have been.
///
/// # Errors
/// What reading the parameters gives.
pub fn measure(
    inverse: &Recipe,
    rows: Range<usize>,
    merged: Elements<'_>,
    restored: &[u8],
    scratch: &mut Scratch,
    kernel: &Kernel,
) -> Result<Bound> {
    let count = rows.len() * inverse.columns;
    let intervals: Vec<Option<(f64, f64)>> = (0..count)
        .map(|index| ends(merged.float, bits_at(merged.float, merged.bytes, index)))
        .collect();
    let side = |end: fn((f64, f64)) -> f64| -> Vec<f64> {
        let ends = intervals.iter().map(|ends| ends.map_or(0.0, end));
        ends.collect()
    };
    let (mut low, mut high) = (side(|ends| ends.0), side(|ends| ends.1));
    inverse.apply(rows.clone(), &mut low, scratch, kernel)?;
    inverse.apply(rows, &mut high, scratch, kernel)?;
    let mut bound = Bound {
        elements: count as u64,
        ..Bound::default()
    };
    for (index, interval) in intervals.iter().enumerate() {
        let own = value_of(inverse.to, bits_at(inverse.to, restored, index));
        if interval.is_none() || !own.is_finite() {
            continue;
        }
        let (low, high) = match low[index] <= high[index] {
            true => (low[index], high[index]),
            false => (high[index], low[index]),
        };
        // The ends themselves are rounded to f64.
        let far = (own - low).abs().max((high - own).abs());
        bound.most = bound.most.max(far * (1.0 + 2f64.powi(-48)));
        let first = place(inverse.to, rounded(inverse.to, low));
        let first = first + u64::from(value_of(inverse.to, bits_of_place(inverse.to, first)) < low);
        let last = place(inverse.to, rounded(inverse.to, high));
        let last = last - u64::from(value_of(inverse.to, bits_of_place(inverse.to, last)) > high);
        match (last + 1).checked_sub(first) {
            None | Some(0) => bound.impossible += 1,
            Some(count) => bound.differing += 1.0 - 1.0 / count as f64,
        }
    }
    Ok(bound)
}
