//! The truncated singular value decomposition of a matrix that is formed block by block, with a bound on how far it
//! can be above the best possible one.
//!
//! Eckart and Young, 1936: of all matrices of rank r the sum of the first r singular triplets is nearest, and leaves
//! `F − Σλᵢ` of the squared norm F, where λᵢ are the squared singular values.

use ndarray::Array2;

use super::dense::{Algebra, Dense, Real};
use super::random::Random;
use crate::error::{Error, Reason, Result};

mod certificate;
mod krylov;
mod matrix;

use krylov::{Krylov, Ritz};
use matrix::Matrix;

pub use matrix::Blocks;

/// Which rank is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rank {
    /// This one; the smaller side where that is less.
    Fixed(usize),
    /// The smallest that keeps a share of the squared norm.
    Energy {
        /// The share, of 1.
        share: f64,
        /// And no more than this.
        most: usize,
    },
    /// As many as there are singular values above the largest divided by a number.
    Ratio {
        /// The divisor.
        ratio: f64,
        /// And no more than this.
        most: usize,
    },
}

impl Rank {
    /// The largest rank that may come out for a matrix.
    pub fn most(self, smaller_side: usize) -> usize {
        let (Rank::Fixed(most) | Rank::Energy { most, .. } | Rank::Ratio { most, .. }) = self;
        most.min(smaller_side)
    }

    /// The rank, and whether it is what was asked for; `squares` are the first squared singular values.
    fn choose(self, squares: &[f64], total: f64, smaller_side: usize) -> (usize, bool) {
        let most = self.most(smaller_side);
        match self {
            Rank::Fixed(_) => (most, squares.len() >= most),
            Rank::Energy { share, .. } => {
                let mut kept = 0.0;
                for (index, square) in squares.iter().enumerate().take(most) {
                    kept += square;
                    if kept >= share * total {
                        return (index + 1, true);
                    }
                }
                (most, false)
            }
            Rank::Ratio { ratio, .. } => {
                let least = squares.first().map_or(0.0, |first| first / (ratio * ratio));
                let above = squares.iter().take_while(|square| **square > least).count();
                match above < squares.len() || above == smaller_side {
                    true => (above.min(most), above <= most),
                    false => (most, false),
                }
            }
        }
    }
}

/// How a decomposition is made.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// The library of dense linear algebra.
    pub algebra: &'a dyn Algebra,
    /// Which rank.
    pub rank: Rank,
    /// The residual is to be proved at most this share above the best one; nothing is proved if absent.
    pub tolerance: Option<f64>,
    /// Takes all singular values instead of the first.
    pub exact: bool,
    /// Of the random numbers.
    pub seed: u64,
    /// Bytes that a formed matrix may take; a larger one is formed anew for every product.
    pub memory: usize,
    /// Asked between products; an error ends the work.
    pub check: &'a (dyn Fn() -> Result<()> + Sync),
}

/// What is known of the distance to the best possible residual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Proof {
    /// The residual is at most this share above the best one.
    Within(f64),
    /// All singular values were computed: it is the best one, to rounding.
    Complete,
    /// The residual is below what rounding allows to tell.
    Rounding,
    /// Nothing was asked for, or nothing could be proved.
    None,
}

/// The first singular triplets: `Δ ≈ Σ values[i] · left[i] · right[i]ᵀ`.
#[derive(Clone, Debug)]
pub struct Truncation {
    /// Vectors of the rows of Δ, one in each row.
    pub left: Array2<f64>,
    /// Vectors of the columns of Δ, one in each row.
    pub right: Array2<f64>,
    /// Singular values, falling; as many as the rank.
    pub values: Vec<f64>,
    /// Every singular value that was found, falling; those behind the rank may be too small.
    pub spectrum: Vec<f64>,
    /// The squared Frobenius norm of Δ.
    pub square: f64,
    /// Whether the rank is the one that was asked for, rather than the largest allowed.
    pub reached: bool,
    /// How good it is.
    pub proof: Proof,
}

impl Truncation {
    /// The share of the squared norm that it keeps.
    pub fn energy(&self) -> f64 {
        let kept: f64 = self.values.iter().map(|value| value * value).sum();
        match self.square > 0.0 {
            true => (kept / self.square).min(1.0),
            false => 1.0,
        }
    }
}

/// Below this share of the squared norm, products in f32 do not tell the residual.
const SMALLEST_IN_F32: f64 = 1e-3;

/// Smaller sides that are decomposed whole.
const SMALL: usize = 96;

/// Vectors in a block beyond the rank.
const OVERSAMPLING: usize = 16;

/// Most vectors that a block starts with.
const WIDEST: usize = 64;

/// Decomposes a matrix.
///
/// # Errors
/// What forming the matrix gives, and [`crate::Reason::Factorisation`].
pub fn truncated(blocks: &dyn Blocks, settings: &Settings<'_>) -> Result<Truncation> {
    let side = blocks.rows().min(blocks.columns());
    let most = settings.rank.most(side);
    if settings.exact || side <= SMALL.max(2 * most) {
        return complete(blocks, settings);
    }
    if let Some(found) = approximated::<f32>(blocks, settings, settings.algebra)? {
        return Ok(found);
    }
    match approximated::<f64>(blocks, settings, settings.algebra)? {
        Some(found) => Ok(found),
        None => complete(blocks, settings),
    }
}

/// By all singular values.
fn complete(blocks: &dyn Blocks, settings: &Settings<'_>) -> Result<Truncation> {
    let algebra: &dyn Dense<f64> = settings.algebra;
    let (rows, columns) = (blocks.rows(), blocks.columns());
    let matrix = match rows >= columns {
        true => Matrix::new(blocks, algebra, settings.memory)?,
        // The blocks of its transpose are not at hand.
        false => Matrix::new(blocks, algebra, usize::MAX)?,
    };
    finite(matrix.square)?;
    let found = matrix.singular(&|| (settings.check)())?;
    let squares: Vec<f64> = found.s.iter().map(|value| value * value).collect();
    let side = rows.min(columns);
    let (rank, reached) = settings.rank.choose(&squares, matrix.square, side);
    // Directions of zeros say nothing.
    let floor = found.s.first().copied().unwrap_or(0.0) * f64::ROUNDOFF;
    let rank = found
        .s
        .iter()
        .take(rank)
        .take_while(|value| **value > floor)
        .count();
    let (left, right) = matrix.vectors(&found, rank)?;
    Ok(Truncation {
        left,
        right,
        values: found.s[..rank].to_vec(),
        spectrum: found.s,
        square: matrix.square,
        reached,
        proof: Proof::Complete,
    })
}

/// By a Krylov space; nothing where the numbers are too short for the residual.
fn approximated<T: Real>(
    blocks: &dyn Blocks,
    settings: &Settings<'_>,
    algebra: &dyn Dense<T>,
) -> Result<Option<Truncation>> {
    let matrix = Matrix::new(blocks, algebra, settings.memory)?;
    finite(matrix.square)?;
    let side = blocks.rows().min(blocks.columns());
    let mut random = Random::new(settings.seed);
    let width = (settings.rank.most(side) + OVERSAMPLING).min(WIDEST);
    let mut search = Search {
        settings,
        side,
        square: matrix.square,
        krylov: Krylov::new(&matrix, algebra, settings.algebra, width, &mut random)?,
        random,
        width,
        best: f64::INFINITY,
        tries: 0,
        single: T::ROUNDOFF > f64::ROUNDOFF,
    };
    search.run()
}

fn finite(square: f64) -> Result<()> {
    match square.is_finite() {
        true => Ok(()),
        false => Err(Error::new(Reason::DifferenceNotFinite)),
    }
}

/// A Krylov space that grows until the truncation is good enough.
struct Search<'a, T> {
    settings: &'a Settings<'a>,
    side: usize,
    square: f64,
    krylov: Krylov<'a, T>,
    random: Random,
    width: usize,
    /// The least bound so far of the norm outside the space, which only shrinks while the space grows.
    best: f64,
    /// How often a bound was looked for.
    tries: i32,
    /// Whether products are in f32.
    single: bool,
}

impl<T: Real> Search<'_, T> {
    fn run(&mut self) -> Result<Option<Truncation>> {
        let mut before: Option<f64> = None;
        loop {
            (self.settings.check)()?;
            self.krylov.grow(self.width, 0, &mut self.random)?;
            let ritz = self.krylov.ritz()?;
            let (rank, reached) = self
                .settings
                .rank
                .choose(&ritz.values, self.square, self.side);
            let kept: f64 = ritz.values.iter().take(rank).sum();
            let residual = self.square - kept;
            if self.single && residual < SMALLEST_IN_F32 * self.square {
                return Ok(None);
            }
            let full = self.krylov.len() >= self.side / 2 || self.krylov.invariant;
            if ritz.values.len() < rank + 4 && !full {
                continue;
            }
            if residual <= self.square * self.side as f64 * 4.0 * T::ROUNDOFF {
                return Ok(Some(self.taken(&ritz, rank, reached, Proof::Rounding)));
            }
            let Some(tolerance) = self.settings.tolerance else {
                // Ritz values that no longer move.
                let moved = before.is_none_or(|before| kept - before > 1e-3 * residual);
                before = Some(kept);
                if !moved || full {
                    return Ok(Some(self.taken(&ritz, rank, reached, Proof::None)));
                }
                continue;
            };
            if let Some(excess) = self.proved(&ritz, rank, tolerance, full)? {
                return Ok(Some(self.taken(
                    &ritz,
                    rank,
                    reached,
                    Proof::Within(excess),
                )));
            }
            if full {
                return match self.side <= WHOLE && !self.single {
                    true => Ok(None),
                    false => Ok(Some(self.taken(&ritz, rank, reached, Proof::None))),
                };
            }
        }
    }

    fn taken(&self, ritz: &Ritz, rank: usize, reached: bool, proof: Proof) -> Truncation {
        let (left, values, right) = self.krylov.triplets(ritz, rank.min(ritz.values.len()));
        Truncation {
            left,
            right,
            values,
            spectrum: ritz.values.iter().map(|value| value.sqrt()).collect(),
            square: self.square,
            reached,
            proof,
        }
    }

    /// The excess that can be proved, where it is small enough (or there will be no better one).
    fn proved(
        &mut self,
        ritz: &Ritz,
        rank: usize,
        tolerance: f64,
        last: bool,
    ) -> Result<Option<f64>> {
        let kept: f64 = ritz.values[..rank].iter().sum();
        let outside = self.square - ritz.values.iter().sum::<f64>();
        self.best = self.best.min(outside.max(0.0) * (1.0 + 1e-6));
        let defect = self.krylov.defect(ritz);
        let wide: &dyn Dense<f64> = self.settings.algebra;
        let slack = 8.0 * T::ROUNDOFF;
        let (square, values) = (self.square, &ritz.values);
        let excess = |c: f64| -> Result<Option<f64>> {
            let bounds = certificate::bounds(wide, values, defect.view(), c, rank)?;
            let rounding = values[..rank]
                .iter()
                .map(|value| slack * (values[0] * value).sqrt());
            let least = square - bounds.iter().sum::<f64>() - rounding.sum::<f64>();
            Ok((least > 0.0).then(|| ((square - kept) / least).sqrt() - 1.0))
        };
        let good = |found: Option<f64>| found.filter(|found| *found <= tolerance);
        if let Some(found) = good(excess(self.best)?) {
            return Ok(Some(found));
        }
        // What would be proved if the norm outside were as small as it can be.
        let hope = values[(values.len() / 3).min(values.len() - 1)].min(self.best);
        if good(excess(hope)?).is_none() && !last {
            return Ok(None);
        }
        self.tries += 1;
        let failure = certificate::FAILURE / 2f64.powi(self.tries);
        let most = certificate::STEPS.last().copied().unwrap_or(1);
        let steps = match last {
            true => most,
            false => self.steps_for(hope, &excess, tolerance, failure)?,
        };
        let (runs, size) = (certificate::RUNS, self.krylov.size());
        let largest = self.krylov.complement(runs, steps, &mut self.random)?;
        for (index, top) in largest.iter().enumerate() {
            let short = certificate::shortfall(size, index + 1, failure);
            if short < 1.0 {
                self.best = self.best.min(top * (1.0 + 1e-5) / (1.0 - short));
            }
        }
        let found = excess(self.best)?;
        Ok(if last { found } else { good(found) })
    }

    /// The fewest steps that are enough if the norm outside is as small as it can be.
    fn steps_for(
        &self,
        hope: f64,
        excess: &dyn Fn(f64) -> Result<Option<f64>>,
        tolerance: f64,
        failure: f64,
    ) -> Result<usize> {
        let mut most = 1;
        for steps in certificate::STEPS {
            most = *steps;
            let short = certificate::shortfall(self.side, most, failure);
            if short < 1.0 && excess(hope / (1.0 - short))?.is_some_and(|found| found <= tolerance)
            {
                break;
            }
        }
        Ok(most)
    }
}

/// Smaller sides of which all singular values are computed where nothing else proves enough.
const WHOLE: usize = 1024;
