//! The truncated singular value decomposition of a matrix that is formed block by block, with a bound on how far it
//! can be above the best possible one.
//!
//! Eckart and Young, 1936: of all matrices of rank r the sum of the first r singular triplets is nearest, and leaves
//! `F − Σλᵢ` of the squared norm F, where λᵢ are the squared singular values.

use ndarray::{Array2, Axis, s};

use super::dense::{Algebra, Dense, Into, Real, Svd};
use super::random::Random;
use crate::error::{Error, Reason, Result};

mod certificate;
mod krylov;
mod lanczos;
mod matrix;

use certificate::{Certificate, Goal, MOST_STEPS, Outside};
use krylov::{Krylov, Ritz};
use lanczos::Lanczos;
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
    /// The smallest that keeps a share of the sum of all singular values, for which all of them are computed.
    Sum {
        /// The share, of 1.
        share: f64,
        /// And no more than this.
        most: usize,
    },
}

impl Rank {
    /// The largest rank that may come out for a matrix.
    pub fn most(self, smaller_side: usize) -> usize {
        let (Rank::Fixed(most)
        | Rank::Energy { most, .. }
        | Rank::Ratio { most, .. }
        | Rank::Sum { most, .. }) = self;
        most.min(smaller_side)
    }

    /// The rank, and whether it is what was asked for; `squares` are the first squared singular values.
    fn choose(self, squares: &[f64], total: f64, smaller_side: usize) -> (usize, bool) {
        let most = self.most(smaller_side);
        match self {
            Rank::Fixed(_) => (most, squares.len() >= most),
            Rank::Energy { share, .. } => until(squares.iter().copied(), share * total, most),
            Rank::Sum { share, .. } => {
                let values = || squares.iter().map(|square| square.sqrt());
                until(values(), share * values().sum::<f64>(), most)
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

/// How many numbers from the first on add up to as much, and whether they do; at most as many as are allowed.
fn until(numbers: impl Iterator<Item = f64>, wanted: f64, most: usize) -> (usize, bool) {
    let mut kept = 0.0;
    for (index, number) in numbers.enumerate().take(most) {
        kept += number;
        if kept >= wanted {
            return (index + 1, true);
        }
    }
    (most, false)
}

/// How a decomposition is made.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// The library of dense linear algebra, or a device: what is proved assumes no order of sums. Bits are not the same.
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
    /// Whether the rank is the one that was asked for, or that of the matrix where that is less, rather than the largest
    /// allowed.
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

    /// Adds triplets of zeros, up to a rank.
    pub fn fill(&mut self, rank: usize) {
        for vectors in [&mut self.left, &mut self.right] {
            let more = rank.saturating_sub(vectors.nrows());
            let zeros = Array2::zeros((more, vectors.ncols()));
            vectors
                .append(Axis(0), zeros.view())
                .expect("both have as many columns");
        }
        self.values.resize(rank.max(self.values.len()), 0.0);
    }

    /// Takes triplets from the end, down to a rank.
    pub fn cut(&mut self, rank: usize) {
        for vectors in [&mut self.left, &mut self.right] {
            let rank = rank.min(vectors.nrows());
            *vectors = vectors.slice(s![..rank, ..]).to_owned();
        }
        self.values.truncate(rank);
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
    if let Some((left, right)) = blocks.factors()? {
        return of_factors(left, right, settings);
    }
    let side = blocks.rows().min(blocks.columns());
    let most = settings.rank.most(side);
    let whole = settings.exact || matches!(settings.rank, Rank::Sum { .. });
    if whole || side <= SMALL.max(2 * most) {
        return complete(blocks, settings);
    }
    let mut found = approximated::<f32>(blocks, settings, settings.algebra)?;
    if let Approximated::TooShort = found {
        found = approximated::<f64>(blocks, settings, settings.algebra)?;
    }
    match found {
        Approximated::Found(found) => Ok(*found),
        Approximated::TooShort | Approximated::Hard => complete(blocks, settings),
    }
}

/// What came of a Krylov space.
enum Approximated {
    /// A truncation.
    Found(Box<Truncation>),
    /// The numbers are too short for the residual.
    TooShort,
    /// All singular values are to be computed instead.
    Hard,
}

/// Decomposes a product by the triangles of both factors: no matrix is larger than they are.
///
/// `L = Q·R` and `Mᵀ = P·S`, so that `L·M = Q·(R·Sᵀ)·Pᵀ`, and the decomposition of what is between is that of the
/// product.
///
/// # Errors
/// [`crate::Reason::DifferenceNotFinite`] and [`crate::Reason::Factorisation`].
pub fn of_factors(
    left: Array2<f64>,
    right: Array2<f64>,
    settings: &Settings<'_>,
) -> Result<Truncation> {
    let algebra: &dyn Dense<f64> = settings.algebra;
    let (rows, columns) = (left.nrows(), right.ncols());
    let side = left.ncols().min(rows).min(columns);
    if side == 0 {
        return Ok(Truncation {
            left: Array2::zeros((0, rows)),
            right: Array2::zeros((0, columns)),
            values: Vec::new(),
            spectrum: Vec::new(),
            square: 0.0,
            reached: true,
            proof: Proof::Complete,
        });
    }
    let all = left.iter().chain(&right);
    finite(all.map(|value| value.abs()).fold(0.0, |a, b| a + b))?;
    let triangle = |factor| triangle(factor, settings);
    let (q, r) = triangle(left)?;
    let (p, t) = triangle(right.reversed_axes())?;
    let mut core = Array2::zeros((r.nrows(), t.nrows()));
    algebra.multiply(r.view(), t.t(), core.view_mut(), Into::Place)?;
    finite(core.iter().map(|value| value * value).sum())?;
    (settings.check)()?;
    let Svd { u, s: values, v } = algebra.thin_svd(core.view())?;
    let squares: Vec<f64> = values.iter().map(|value| value * value).collect();
    let square: f64 = squares.iter().sum();
    let (rank, reached) = settings.rank.choose(&squares, square, side);
    let rank = telling(&values, rank);
    let turned = |q: Option<Array2<f64>>, vectors: Array2<f64>| {
        let vectors = vectors.slice(s![.., ..rank]);
        let whole = match q {
            None => vectors.to_owned(),
            Some(q) => {
                let mut whole = Array2::zeros((q.nrows(), rank));
                algebra.multiply(q.view(), vectors, whole.view_mut(), Into::Place)?;
                whole
            }
        };
        Ok(whole.t().as_standard_layout().into_owned())
    };
    Ok(Truncation {
        left: turned(q, u)?,
        right: turned(p, v)?,
        values: values[..rank].to_vec(),
        spectrum: values,
        square,
        reached,
        proof: Proof::Complete,
    })
}

/// A factor with orthonormal columns, where that is not 1, and a triangle; one that is wider than tall is its own.
fn triangle(
    factor: Array2<f64>,
    settings: &Settings<'_>,
) -> Result<(Option<Array2<f64>>, Array2<f64>)> {
    (settings.check)()?;
    if factor.nrows() <= factor.ncols() {
        return Ok((None, factor));
    }
    let algebra: &dyn Dense<f64> = settings.algebra;
    let (q, r) = algebra.thin_qr(factor.view())?;
    Ok((Some(q), r))
}

/// The squared Frobenius norm of a product, without forming it: that of the product of the triangles.
///
/// # Errors
/// What the algebra gives.
pub fn product_square(
    left: Array2<f64>,
    right: Array2<f64>,
    settings: &Settings<'_>,
) -> Result<f64> {
    let algebra: &dyn Dense<f64> = settings.algebra;
    let (_, r) = triangle(left, settings)?;
    let (_, t) = triangle(right.reversed_axes(), settings)?;
    let mut core = Array2::zeros((r.nrows(), t.nrows()));
    algebra.multiply(r.view(), t.t(), core.view_mut(), Into::Place)?;
    Ok(core.iter().map(|value| value * value).sum())
}

/// How many of the first values have directions: those of zeros say nothing.
fn telling(values: &[f64], rank: usize) -> usize {
    let floor = values.first().copied().unwrap_or(0.0) * f64::ROUNDOFF;
    let some = values.iter().take(rank).take_while(|value| **value > floor);
    some.count()
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
    let rank = telling(&found.s, rank);
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

/// By a Krylov space.
fn approximated<T: Real>(
    blocks: &dyn Blocks,
    settings: &Settings<'_>,
    algebra: &dyn Dense<T>,
) -> Result<Approximated> {
    let matrix = Matrix::new(blocks, algebra, settings.memory)?;
    finite(matrix.square)?;
    if matrix.square == 0.0 {
        return Ok(Approximated::Hard);
    }
    let side = blocks.rows().min(blocks.columns());
    let mut random = Random::new(settings.seed);
    let width = (settings.rank.most(side) + OVERSAMPLING).min(WIDEST);
    let mut search = Search {
        settings,
        side,
        square: matrix.square,
        krylov: Krylov::new(&matrix, algebra, settings.algebra, width, &mut random)?,
        random,
        best: f64::INFINITY,
        cap: None,
        seen: None,
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
    /// The least bound so far of the norm outside the space, which only shrinks while the space grows.
    best: f64,
    /// A bound of the largest eigenvalue, where it was looked for.
    cap: Option<f64>,
    /// The largest value that Lanczos found outside, and how many vectors the space had then.
    seen: Option<(f64, usize)>,
    /// How often a bound was looked for.
    tries: i32,
    /// Whether products are in f32.
    single: bool,
}

impl<T: Real> Search<'_, T> {
    fn run(&mut self) -> Result<Approximated> {
        let mut before: Option<f64> = None;
        loop {
            (self.settings.check)()?;
            self.krylov.grow()?;
            let ritz = self.krylov.ritz()?;
            let (rank, reached) = self
                .settings
                .rank
                .choose(&ritz.values, self.square, self.side);
            let kept: f64 = ritz.values.iter().take(rank).sum();
            let residual = self.square - kept;
            if self.single && residual < SMALLEST_IN_F32 * self.square {
                return Ok(Approximated::TooShort);
            }
            let full = self.krylov.len() >= self.side / 2 || self.krylov.invariant;
            if ritz.values.len() < rank + 4 && !full {
                continue;
            }
            let found = |search: &Self, proof| search.taken(&ritz, rank, reached, proof);
            if residual <= self.square * self.side as f64 * 4.0 * T::ROUNDOFF {
                return found(self, Proof::Rounding);
            }
            let Some(tolerance) = self.settings.tolerance else {
                // Ritz values that no longer move.
                let moved = before.is_none_or(|before| kept - before > 1e-2 * residual);
                before = Some(kept);
                if !moved || full {
                    return found(self, Proof::None);
                }
                continue;
            };
            let excess = self.proved(&ritz, rank, tolerance, full)?;
            match excess {
                Some(excess) if excess <= tolerance => return found(self, Proof::Within(excess)),
                _ if !full => {}
                _ if self.side <= WHOLE => return Ok(Approximated::Hard),
                Some(excess) => return found(self, Proof::Within(excess)),
                None => return found(self, Proof::None),
            }
        }
    }

    fn taken(&self, ritz: &Ritz, rank: usize, reached: bool, proof: Proof) -> Result<Approximated> {
        // Directions of zeros say nothing.
        let floor = ritz.values.first().copied().unwrap_or(0.0) * T::ROUNDOFF * T::ROUNDOFF;
        let some = ritz
            .values
            .iter()
            .take(rank)
            .take_while(|value| **value > floor);
        let (left, values, right) = self.krylov.triplets(ritz, some.count())?;
        Ok(Approximated::Found(Box::new(Truncation {
            left,
            right,
            values,
            spectrum: ritz.values.iter().map(|value| value.sqrt()).collect(),
            square: self.square,
            reached,
            proof,
        })))
    }

    /// The excess that can be proved, where it is small enough (or there will be no better one).
    fn proved(
        &mut self,
        ritz: &Ritz,
        rank: usize,
        tolerance: f64,
        last: bool,
    ) -> Result<Option<f64>> {
        let values = &ritz.values;
        let kept: f64 = values[..rank].iter().sum();
        let outside = self.square - values.iter().sum::<f64>();
        self.best = self.best.min(outside.max(0.0) * (1.0 + 1e-6));
        let of_rounding = |value: &f64| 8.0 * T::ROUNDOFF * (values[0] * value).sqrt();
        let goal = Goal {
            ritz: &values[..rank],
            tolerance,
            residual: self.square - kept,
            rounding: values[..rank].iter().map(of_rounding).sum(),
            at_any_rate: last,
        };
        // Of a flat spectrum a bound of the first eigenvalue will do for all, perhaps soon.
        let first = values[0] * (1.0 + FLAT);
        let flat = self.cap.is_none() && goal.gaps(first) <= goal.allowed();
        let early = self.krylov.len() < 8 * (rank + OVERSAMPLING);
        let soon = early && self.cap.is_none() && goal.gaps(values[0]) <= 4.0 * goal.allowed();
        let hope = match soon && !last {
            true => None,
            false => self.hope(values, last),
        };
        let least = self.best.min(hope.unwrap_or(f64::INFINITY));
        let least = least.min(self.cap.unwrap_or(first));
        if !last && goal.gaps(least) > goal.allowed() {
            return Ok(None);
        }
        let (coupling, norm) = self.krylov.coupling(ritz)?;
        let outside = Outside {
            algebra: self.settings.algebra,
            ritz: values,
            coupling: coupling.view(),
            norm,
            cap: self.cap.unwrap_or(f64::INFINITY),
        };
        let mut certificate = Certificate::new(goal, outside);
        let mut enough = certificate.is_enough(self.best)?;
        if !enough && flat {
            let cap = self.first()?;
            self.cap = Some(cap);
            certificate.cap(cap);
            enough = certificate.is_enough(self.best)?;
        }
        if let Some(hope) = hope.filter(|_| !enough) {
            enough = self.look_outside(&mut certificate, hope, last)?;
        }
        match enough || last {
            true => certificate.excess(self.best),
            false => Ok(None),
        }
    }

    /// The norm outside the space, if it is as small as it may be by now; nothing where it was looked for not long ago.
    fn hope(&self, values: &[f64], last: bool) -> Option<f64> {
        let length = values.len();
        match self.seen {
            Some((_, before)) if length * 4 < before * 5 && !last => None,
            Some((seen, before)) => Some(seen * (before as f64 / length as f64).powf(0.1)),
            None => values.get(length / 3).copied(),
        }
    }

    /// An upper bound of the first eigenvalue, by Lanczos without a space: at most the share [`FLAT`] above it.
    fn first(&mut self) -> Result<f64> {
        self.tries += 1;
        let failure = certificate::failure(self.tries);
        let bound = |steps, largest| certificate::bound(largest, self.side, steps, failure);
        let close = |steps: &usize| bound(*steps, 1.0) <= 1.0 + FLAT;
        let steps = (1..certificate::ENOUGH)
            .find(close)
            .unwrap_or(certificate::ENOUGH);
        let whole = self.krylov.without_basis();
        let mut lanczos = Lanczos::new(&whole, certificate::RUNS, &mut self.random)?;
        for _ in 0..steps {
            lanczos.step(&whole)?;
        }
        Ok(bound(steps, lanczos.largest(self.settings.algebra)?))
    }

    /// Bounds the norm outside the space, as far as that may help; whether it is small enough.
    fn look_outside(
        &mut self,
        certificate: &mut Certificate<'_>,
        hope: f64,
        last: bool,
    ) -> Result<bool> {
        if !last && !certificate.is_enough(hope.min(self.best))? {
            return Ok(false);
        }
        self.tries += 1;
        let failure = certificate::failure(self.tries);
        let mut lanczos = Lanczos::new(&self.krylov, certificate::RUNS, &mut self.random)?;
        let mut steps = 0;
        for goal in certificate::STEPS {
            while steps < *goal {
                lanczos.step(&self.krylov)?;
                steps += 1;
            }
            let largest = lanczos.largest(self.settings.algebra)?;
            // Few steps find a few percent less than there is.
            let expected = largest * (1.0 + 0.8 * (steps as f64).powf(-1.5));
            self.seen = Some((expected, self.krylov.len()));
            let bound = |steps| certificate::bound(largest, self.side, steps, failure);
            self.best = self.best.min(bound(steps));
            if certificate.is_enough(self.best)? {
                return Ok(true);
            }
            // More steps find no smaller value, and cannot come closer to it than the last.
            if !last && !certificate.is_enough(bound(MOST_STEPS))? {
                return Ok(false);
            }
        }
        Ok(false)
    }
}

/// How far the bound of the first eigenvalue may be above it.
const FLAT: f64 = 0.02;

/// Smaller sides of which all singular values are computed where nothing else proves enough.
const WHOLE: usize = 1024;
