//! Chains as a library of linear algebra computes them, in any order and on any device, and how far each may be from
//! that of the definition.
//!
//! Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, §3.1: an inner product of length r, summed in
//! any order, fused or not, is off by at most `γ · Σ|b||a|` with `γ = r·u / (1 − r·u)`, and `Σ|b||a| ≤ ‖b‖ · ‖a‖`. To
//! that comes what underflow takes; devices that flush subnormal numbers to zero lose up to the smallest normal one
//! wherever one is read or made. Nothing is claimed for formats that round inputs first (TF32, bf16).

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2, Axis};

use super::factor::Factor;
use crate::error::Result;
use crate::linalg::ChainBound;
use crate::linalg::dense::{Algebra, Dense, Held, Real, held};

/// In which numbers chains are computed, and carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// In f64.
    Doubles,
    /// Computed in f64 and rounded to f32: half as much to carry.
    DoublesToSingles,
    /// In f32, by short chains that are added up in f64; the factors hold values of f32 or narrower.
    Singles,
}

/// Length of the chains of f32: their bound grows with it.
const SHORT: usize = 32;

/// More than the rounding of a bound makes of it.
const INFLATION: f64 = 1.0 + 1.0 / (1u64 << 30) as f64;

/// The bound of a relative error of a sum of so many products.
fn gamma(roundoff: f64, length: usize) -> f64 {
    let share = length as f64 * roundoff;
    // Beyond that nothing is known.
    match share < 0.5 {
        true => share / (1.0 - share) * INFLATION,
        false => f64::INFINITY,
    }
}

/// The Euclidean norms of the lines along an axis, rounded up, and a little more where squares may underflow.
fn norms(matrix: ArrayView2<'_, f64>, axis: Axis, more: f64) -> Vec<f64> {
    let largest = matrix.fold(0.0, |largest: f64, value| largest.max(value.abs()));
    // A power of two that brings the largest near one; what then still underflows is below 2⁻⁵¹¹ of it.
    let exponent = match largest > 0.0 && largest.is_finite() {
        true => largest.log2().floor().clamp(-1000.0, 1000.0),
        false => 0.0,
    };
    let scale = 2f64.powi(-exponent as i32);
    let length = matrix.len_of(axis) as f64;
    let more = more + largest * length * 2f64.powi(-500);
    let squares = matrix.fold_axis(axis, 0.0, |sum: &f64, value| {
        let scaled = value * scale;
        sum + scaled * scaled
    });
    let norm = |square: &f64| (square.sqrt() / scale) * INFLATION + more;
    squares.iter().map(norm).collect()
}

/// A product whose chains a library can approximate, with the right factor at hand.
pub struct Candidates<'a> {
    left: &'a Factor,
    right: Right,
    length: usize,
    /// The shares of the columns in the bound.
    columns: Arc<[f64]>,
    /// The share of a row is this times its norm.
    gamma: f64,
    relative: f64,
    floor: f64,
    /// What is added to a norm for what underflow takes.
    more: f64,
}

enum Right {
    Doubles(Array2<f64>),
    DoublesToSingles(Array2<f64>),
    /// Of so many rows each.
    Singles(Vec<Array2<f32>>),
}

impl<'a> Candidates<'a> {
    /// Those of `left · right`.
    ///
    /// # Errors
    /// Those of [`Factor::block`].
    pub fn of_product(left: &'a Factor, right: &Factor, precision: Precision) -> Result<Self> {
        let length = right.rows();
        let mut matrix = right.block(0..length, 0..right.columns())?;
        if !matrix.is_standard_layout() {
            matrix = matrix.as_standard_layout().into_owned();
        }
        let of_doubles = gamma(f64::ROUNDOFF, length);
        // The definition's own error counts as well; and where short chains are added up, that of their sum. An entry that
        // becomes zero takes at most the smallest normal number of its type times each entry of the other factor, which
        // `γ · more` covers.
        let (gamma, more) = match precision {
            Precision::Doubles | Precision::DoublesToSingles => (2.0 * of_doubles, 2f64.powi(-960)),
            Precision::Singles => {
                let of_singles = gamma(f32::ROUNDOFF, SHORT.min(length));
                (of_singles + 3.0 * of_doubles, 2f64.powi(-90))
            }
        };
        // What becomes zero among results, and what carrying rounds.
        let (smallest, relative) = match precision {
            Precision::Doubles => (f64::MIN_POSITIVE, 0.0),
            Precision::DoublesToSingles => (f32::MIN_POSITIVE.into(), f32::ROUNDOFF * INFLATION),
            Precision::Singles => (f32::MIN_POSITIVE.into(), 0.0),
        };
        let columns = norms(matrix.view(), Axis(0), more).into();
        let right = match precision {
            Precision::Doubles => Right::Doubles(matrix),
            Precision::DoublesToSingles => Right::DoublesToSingles(matrix),
            Precision::Singles => {
                let parts = matrix.axis_chunks_iter(Axis(0), SHORT);
                Right::Singles(parts.map(|part| part.mapv(|value| value as f32)).collect())
            }
        };
        Ok(Candidates {
            left,
            right,
            length,
            columns,
            gamma,
            relative,
            floor: 4.0 * (length + 1) as f64 * smallest,
            more,
        })
    }

    /// The length of a chain.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Bytes that are carried for each element.
    pub fn carried(&self) -> usize {
        match &self.right {
            Right::Doubles(_) => size_of::<f64>(),
            Right::DoublesToSingles(_) => size_of::<f32>(),
            Right::Singles(parts) => size_of::<f32>() * parts.len(),
        }
    }

    /// Brings the right factor to where products with it are computed.
    ///
    /// # Errors
    /// Those of [`Dense::hold`].
    pub fn on<'b>(&'b self, library: &'b dyn Algebra) -> Result<OnLibrary<'b>> {
        let (doubles, singles): (&dyn Dense<f64>, &dyn Dense<f32>) = (library, library);
        let right = match &self.right {
            Right::Doubles(matrix) => RightThere::Doubles(held(doubles, matrix.view())?),
            Right::DoublesToSingles(matrix) => {
                RightThere::DoublesToSingles(held(doubles, matrix.view())?)
            }
            Right::Singles(parts) => {
                let parts = parts.iter().map(|part| held(singles, part.view()));
                RightThere::Singles(parts.collect::<Result<_>>()?)
            }
        };
        Ok(OnLibrary { of: self, right })
    }
}

/// A product with its right factor in place.
pub struct OnLibrary<'a> {
    of: &'a Candidates<'a>,
    right: RightThere<'a>,
}

enum RightThere<'a> {
    Doubles(Box<dyn Held<f64> + 'a>),
    DoublesToSingles(Box<dyn Held<f64> + 'a>),
    Singles(Vec<Box<dyn Held<f32> + 'a>>),
}

impl OnLibrary<'_> {
    /// The chains of some rows.
    ///
    /// # Errors
    /// Those of [`Factor::block`] and of [`Dense::multiply`].
    pub fn chains(&self, rows: Range<usize>) -> Result<Chains> {
        let of = self.of;
        let left = of.left.block(rows.clone(), 0..of.length)?;
        let shares = norms(left.view(), Axis(1), of.more);
        let values = match &self.right {
            RightThere::Doubles(right) => Values::Doubles(right.after(left.view())?),
            RightThere::DoublesToSingles(right) => {
                Values::Singles(right.after_in_single(left.view())?)
            }
            RightThere::Singles(parts) => {
                let left = left.mapv(|value| value as f32);
                let pieces = left.axis_chunks_iter(Axis(1), SHORT).zip(parts);
                let mut products = pieces.map(|(left, right)| {
                    let left = left.as_standard_layout();
                    right.after(left.view())
                });
                match (products.next(), parts.len()) {
                    (Some(only), 1) => Values::Singles(only?),
                    (first, _) => {
                        let mut sum = Array2::zeros((rows.len(), of.columns.len()));
                        for product in first.into_iter().chain(products) {
                            sum.zip_mut_with(&product?, |sum, term| *sum += f64::from(*term));
                        }
                        Values::Doubles(sum)
                    }
                }
            }
        };
        Ok(Chains {
            rows,
            values,
            shares: shares.iter().map(|norm| of.gamma * norm).collect(),
            columns: of.columns.clone(),
            relative: of.relative,
            floor: of.floor,
        })
    }
}

/// Chains of some rows, and their bounds.
pub struct Chains {
    rows: Range<usize>,
    values: Values,
    shares: Vec<f64>,
    columns: Arc<[f64]>,
    relative: f64,
    floor: f64,
}

enum Values {
    Doubles(Array2<f64>),
    Singles(Array2<f32>),
}

impl Chains {
    /// The chains of one row, and their bound; `memory` may be used for them.
    pub fn row<'a>(&'a self, row: usize, memory: &'a mut Vec<f64>) -> (&'a [f64], ChainBound<'a>) {
        let index = row - self.rows.start;
        let bound = ChainBound {
            row: self.shares[index],
            columns: &self.columns,
            relative: self.relative,
            floor: self.floor,
        };
        let columns = self.columns.len();
        let range = index * columns..(index + 1) * columns;
        let lie = "products lie row by row";
        match &self.values {
            Values::Doubles(values) => (&values.as_slice().expect(lie)[range], bound),
            Values::Singles(values) => {
                let row = &values.as_slice().expect(lie)[range];
                memory.clear();
                memory.extend(row.iter().map(|value| f64::from(*value)));
                (memory, bound)
            }
        }
    }
}
