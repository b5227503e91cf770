//! How far what was taken out of a merged tensor may be from the base.
//!
//! A merged value M stands for everything that rounds to it. The inverse of a merge is monotone in each element, so the
//! base lies between what it makes of the two ends of that interval, in f64 before rounding.

use std::ops::Range;

use super::evaluate::{Elements, Recipe, Scratch};
use super::preimage::{bits_of_place, place, rounded, shifted, value_of};
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

/// Memory of one thread.
#[derive(Default)]
pub struct Memory {
    neighbours: Vec<u8>,
    ends: [Vec<f64>; 2],
    own: Vec<f64>,
    beside: [Vec<f64>; 2],
}

impl Memory {
    /// The middles between merged values and their neighbours away from zero, and towards it.
    fn set_ends(&mut self, merged: Elements<'_>, count: usize, kernel: &Kernel) {
        let Memory {
            neighbours,
            ends,
            own,
            ..
        } = self;
        neighbours.resize(merged.bytes.len(), 0);
        own.resize(count, 0.0);
        kernel.widen(merged.float, merged.bytes, own);
        for (ends, step) in ends.iter_mut().zip([1, -1]) {
            shifted(merged.float, merged.bytes, step, neighbours);
            ends.resize(count, 0.0);
            kernel.widen(merged.float, neighbours, ends);
            for (end, own) in ends.iter_mut().zip(&*own) {
                *end = *end / 2.0 + own / 2.0;
            }
        }
        // Zero has its neighbours on both sides, and behind the last finite value steps go on as before it.
        let smallest = value_of(merged.float, 1) / 2.0;
        for (index, own) in own.iter().enumerate() {
            if *own == 0.0 {
                (ends[0][index], ends[1][index]) = (smallest, -smallest);
            } else if !ends[0][index].is_finite() && own.is_finite() {
                ends[0][index] = own + (own - ends[1][index]);
            }
        }
    }
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
    (scratch, memory): (&mut Scratch, &mut Memory),
    kernel: &Kernel,
) -> Result<Bound> {
    let count = rows.len() * inverse.columns;
    let to = inverse.to;
    memory.set_ends(merged, count, kernel);
    let Memory {
        neighbours,
        ends,
        own,
        beside,
    } = memory;
    neighbours.resize(restored.len(), 0);
    for ((ends, beside), step) in ends.iter_mut().zip(&mut *beside).zip([1, -1]) {
        inverse.apply(rows.clone(), ends, scratch, kernel)?;
        shifted(to, restored, step, neighbours);
        beside.resize(count, 0.0);
        kernel.widen(to, neighbours, beside);
    }
    kernel.widen(to, restored, own);
    let mut bound = Bound {
        elements: count as u64,
        ..Bound::default()
    };
    let mut most = 0.0f64;
    for (index, own) in own.iter().enumerate() {
        let (low, high) = (
            ends[0][index].min(ends[1][index]),
            ends[0][index].max(ends[1][index]),
        );
        // What is not finite was so in the base, and compares as false.
        let far = (own - low).abs().max((high - own).abs());
        most = if far > most && far.is_finite() {
            far
        } else {
            most
        };
        let holds = |value: f64| (value >= low) & (value <= high);
        let [above, below] = [beside[0][index], beside[1][index]];
        let is_one = holds(*own) & !holds(above) & !holds(below) & (*own != 0.0);
        if !is_one && low.is_finite() && high.is_finite() && own.is_finite() {
            match within(to, low, high) {
                0 => bound.impossible += 1,
                count => bound.differing += 1.0 - 1.0 / count as f64,
            }
        }
    }
    // The ends themselves are rounded to f64.
    bound.most = most * (1.0 + 2f64.powi(-48));
    Ok(bound)
}

/// How many values of a type lie between two numbers, or are one of them.
fn within(float: Float, low: f64, high: f64) -> u64 {
    let at = |value| place(float, rounded(float, value));
    let value = |place| value_of(float, bits_of_place(float, place));
    let first = at(low) + u64::from(value(at(low)) < low);
    let last = at(high) - u64::from(value(at(high)) > high);
    (last + 1).saturating_sub(first)
}
