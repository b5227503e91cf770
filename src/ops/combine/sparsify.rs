//! What stays of a change before changes are put together. Matrices are looked at block by block and never held.
//!
//! Definitions and their sources: `docs/combining.md`.

use std::ops::Range;

use rayon::prelude::*;

use super::recipes::Tuning;
use crate::error::{Error, Reason, Result};
use crate::linalg::random::{Random, seed_of};
use crate::linalg::truncated::Blocks;

/// What stays of one matrix.
pub(super) trait Mask: Send + Sync {
    /// Leaves of whole rows what stays.
    fn apply(&self, rows: Range<usize>, values: &mut [f64]);
}

/// A matrix that something is to be left of.
pub(super) struct Subject<'a> {
    pub(super) matrix: &'a dyn Blocks,
    /// Of the random numbers: its own for each adapter and layer.
    pub(super) seed: u64,
    pub(super) tuning: &'a Tuning,
}

/// A way to leave something of a matrix.
pub(super) type Sparsify = fn(&Subject<'_>) -> Result<Box<dyn Mask>>;

/// The seed for a layer of one adapter.
pub(super) fn seed(seed: u64, layer: &str, adapter: usize) -> u64 {
    Random::new(seed_of(seed, layer).wrapping_add(adapter as u64)).bits()
}

/// A matrix with what stays of it.
pub(super) struct Masked<'a> {
    pub(super) matrix: &'a dyn Blocks,
    pub(super) mask: Box<dyn Mask>,
}

impl Blocks for Masked<'_> {
    fn rows(&self) -> usize {
        self.matrix.rows()
    }

    fn columns(&self) -> usize {
        self.matrix.columns()
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        self.matrix.fill(rows.clone(), values)?;
        self.mask.apply(rows, values);
        Ok(())
    }
}

/// All of it.
pub(super) fn everything(_: &Subject<'_>) -> Result<Box<dyn Mask>> {
    Ok(Box::new(Between::ALL))
}

/// The share `density` that is largest in magnitude.
pub(super) fn largest(subject: &Subject<'_>) -> Result<Box<dyn Mask>> {
    let count = subject.matrix.rows() * subject.matrix.columns();
    let kept = share(subject.tuning.density, count);
    between(subject.matrix, count - kept..count)
}

/// The share `density` that is left of the smallest once the share `gamma` of the largest is gone.
pub(super) fn without_outliers(subject: &Subject<'_>) -> Result<Box<dyn Mask>> {
    let count = subject.matrix.rows() * subject.matrix.columns();
    let kept = share(subject.tuning.density, count);
    let outliers = share(subject.tuning.gamma, count).min(count - kept);
    between(subject.matrix, count - outliers - kept..count - outliers)
}

/// Each with the probability `density`, divided by it.
pub(super) fn random(subject: &Subject<'_>) -> Result<Box<dyn Mask>> {
    Ok(Box::new(Drawn {
        random: Random::new(subject.seed),
        columns: subject.matrix.columns(),
        density: subject.tuning.density,
        epsilon: 0.0,
    }))
}

/// Each with a probability that grows with its place in its row, divided by it.
pub(super) fn random_by_magnitude(subject: &Subject<'_>) -> Result<Box<dyn Mask>> {
    let Tuning {
        density, epsilon, ..
    } = *subject.tuning;
    if density < 1.0 && !(density - epsilon > 0.0 && density + epsilon <= 1.0) {
        return Err(Error::new(Reason::BadOption {
            text: format!("{density} ± {epsilon}"),
            problem: "density less and plus epsilon are probabilities".to_owned(),
        }));
    }
    Ok(Box::new(Drawn {
        random: Random::new(subject.seed),
        columns: subject.matrix.columns(),
        density,
        epsilon: if density < 1.0 { epsilon } else { 0.0 },
    }))
}

/// So much of a number of elements, rounded down.
fn share(of: f64, count: usize) -> usize {
    ((of * count as f64) as usize).min(count)
}

/// Magnitudes between two, both included; nothing where there are none.
struct Between(Option<(f64, f64)>);

impl Between {
    const ALL: Between = Between(Some((0.0, f64::INFINITY)));
}

impl Mask for Between {
    fn apply(&self, _rows: Range<usize>, values: &mut [f64]) {
        let (least, most) = self.0.unwrap_or((f64::INFINITY, 0.0));
        for value in values {
            if !(least..=most).contains(&value.abs()) {
                *value = 0.0;
            }
        }
    }
}

/// Elements that are drawn. The numbers depend on the seed and the place of an element alone.
struct Drawn {
    random: Random,
    columns: usize,
    density: f64,
    epsilon: f64,
}

impl Mask for Drawn {
    fn apply(&self, rows: Range<usize>, values: &mut [f64]) {
        let first = (rows.start * self.columns) as u64;
        let mut random = self.random.clone().after(first);
        let mut kept = |value: &mut f64, probability: f64| {
            *value = match random.uniform() <= probability {
                true => *value / probability,
                false => 0.0,
            };
        };
        if self.epsilon == 0.0 {
            values
                .iter_mut()
                .for_each(|value| kept(value, self.density));
            return;
        }
        let last = self.columns.saturating_sub(1).max(1) as f64;
        let mut places = vec![0; self.columns];
        for row in values.chunks_exact_mut(self.columns.max(1)) {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*a].abs().total_cmp(&row[*b].abs()));
            for (place, column) in order.into_iter().enumerate() {
                places[column] = place;
            }
            for (value, place) in row.iter_mut().zip(&places) {
                let above = self.epsilon * (2.0 * *place as f64 / last - 1.0);
                kept(value, self.density + above);
            }
        }
    }
}

/// The elements of some places, where magnitudes are put in order; equal ones stay together.
fn between(matrix: &dyn Blocks, places: Range<usize>) -> Result<Box<dyn Mask>> {
    let count = matrix.rows() * matrix.columns();
    if places.is_empty() {
        return Ok(Box::new(Between(None)));
    }
    if places == (0..count) {
        return Ok(Box::new(Between::ALL));
    }
    let ends = [places.start, places.end - 1];
    let [least, most] = order_statistics(matrix, ends)?;
    let most = if places.end == count {
        f64::INFINITY
    } else {
        most
    };
    let least = if places.start == 0 { 0.0 } else { least };
    Ok(Box::new(Between(Some((least, most)))))
}

/// Elements that one task looks at.
const PIECE: usize = 32 << 10;

/// Rows that a task has at least: the kernels work on tiles of eight.
const TILE: usize = 8;

/// Blocks of rows of a matrix, whatever the number of threads.
pub(super) fn pieces(matrix: &dyn Blocks) -> Vec<Range<usize>> {
    let (rows, columns) = (matrix.rows(), matrix.columns());
    let step = (PIECE / columns.max(1)).max(TILE);
    let starts = (0..rows).step_by(step);
    starts
        .map(|first| first..(first + step).min(rows))
        .collect()
}

/// Visits a matrix piece by piece on all threads.
fn visited<T: Send>(
    matrix: &dyn Blocks,
    start: impl Fn() -> T + Sync + Send,
    visit: impl Fn(&mut T, f64) + Sync + Send,
    join: impl Fn(T, T) -> T + Sync + Send,
) -> Result<T> {
    let folded = pieces(matrix)
        .into_par_iter()
        .try_fold(&start, |mut all, rows| {
            let mut values = vec![0.0; rows.len() * matrix.columns()];
            matrix.fill(rows, &mut values)?;
            for value in values {
                if !value.is_finite() {
                    return Err(Error::new(Reason::DifferenceNotFinite));
                }
                visit(&mut all, value.abs());
            }
            Ok(all)
        });
    folded.try_reduce(&start, |a, b| Ok(join(a, b)))
}

/// The leading bits of a magnitude: its exponent and five of its digits.
fn bin(magnitude: f64) -> usize {
    (magnitude.to_bits() >> 47) as usize
}

/// The magnitudes of two places in order: a histogram tells the bins that they are in, and these alone are sorted.
fn order_statistics(matrix: &dyn Blocks, places: [usize; 2]) -> Result<[f64; 2]> {
    let counts = visited(
        matrix,
        || vec![0usize; 1 << 16],
        |counts, value| counts[bin(value)] += 1,
        |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        },
    )?;
    let wanted = places.map(|place| {
        let mut before = 0;
        let found = counts.iter().position(|count| {
            before += count;
            before > place
        });
        let found = found.unwrap_or(0);
        (found, place - (before - counts[found]))
    });
    let bins = wanted.map(|(bin, _)| bin);
    let mut found = visited(
        matrix,
        || [Vec::new(), Vec::new()],
        |found: &mut [Vec<f64>; 2], value| {
            for (own, values) in bins.iter().zip(found) {
                if bin(value) == *own {
                    values.push(value);
                }
            }
        },
        |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| a.extend(b));
            a
        },
    )?;
    let mut chosen = [0.0; 2];
    for ((values, (_, place)), chosen) in found.iter_mut().zip(wanted).zip(&mut chosen) {
        *chosen = *values.select_nth_unstable_by(place, f64::total_cmp).1;
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix in memory.
    struct Matrix(usize, Vec<f64>);

    impl Blocks for Matrix {
        fn rows(&self) -> usize {
            self.1.len() / self.0
        }

        fn columns(&self) -> usize {
            self.0
        }

        fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
            values.copy_from_slice(&self.1[rows.start * self.0..rows.end * self.0]);
            Ok(())
        }
    }

    fn left(sparsify: Sparsify, matrix: &Matrix, tuning: &Tuning) -> Vec<f64> {
        let subject = Subject {
            matrix,
            seed: 7,
            tuning,
        };
        let mask = sparsify(&subject).unwrap();
        let mut values = matrix.1.clone();
        mask.apply(0..matrix.rows(), &mut values);
        // Block by block it is the same.
        for rows in (0..matrix.rows()).map(|row| row..row + 1) {
            let mut part = matrix.1[rows.start * matrix.0..rows.end * matrix.0].to_vec();
            mask.apply(rows.clone(), &mut part);
            assert_eq!(part, values[rows.start * matrix.0..rows.end * matrix.0]);
        }
        values
    }

    fn matrix() -> Matrix {
        let mut random = Random::new(3);
        Matrix(50, random.normals(5000))
    }

    #[test]
    fn the_largest_and_those_without_outliers_are_counted_exactly() {
        let matrix = matrix();
        let mut sorted: Vec<f64> = matrix.1.iter().map(|value| value.abs()).collect();
        sorted.sort_by(f64::total_cmp);
        for density in [0.0, 0.2, 0.5, 0.999, 1.0] {
            let tuning = Tuning {
                density,
                gamma: 0.1,
                ..Tuning::default()
            };
            let kept = (density * 5000.0) as usize;
            let top = left(largest, &matrix, &tuning);
            assert_eq!(top.iter().filter(|value| **value != 0.0).count(), kept);
            let least = top
                .iter()
                .map(|value| value.abs())
                .filter(|value| *value > 0.0);
            let least = least.fold(f64::INFINITY, f64::min);
            assert!(kept == 0 || least == sorted[5000 - kept]);
            let middle = left(without_outliers, &matrix, &tuning);
            assert_eq!(middle.iter().filter(|value| **value != 0.0).count(), kept);
            let most = middle
                .iter()
                .fold(0.0f64, |most, value| most.max(value.abs()));
            let outliers = 500.min(5000 - kept);
            assert!(
                kept == 0 || most == sorted[5000 - outliers - 1],
                "{density}"
            );
        }
    }

    #[test]
    fn what_is_drawn_has_the_expected_share_and_sum() {
        let ones = Matrix(100, vec![1.0; 40_000]);
        let mut steps = matrix();
        steps.1.iter_mut().for_each(|value| *value = value.abs());
        let tuning = Tuning {
            density: 0.3,
            epsilon: 0.2,
            ..Tuning::default()
        };
        for sparsify in [random as Sparsify, random_by_magnitude] {
            let drawn = left(sparsify, &ones, &tuning);
            let share = drawn.iter().filter(|value| **value != 0.0).count() as f64 / 40_000.0;
            assert!((share - 0.3).abs() < 0.01, "{share}");
            let (sum, whole): (f64, f64) = (
                left(sparsify, &steps, &tuning).iter().sum(),
                steps.1.iter().sum(),
            );
            assert!((sum / whole - 1.0).abs() < 0.1, "{sum} of {whole}");
        }
        // Larger ones stay more often.
        let drawn = left(random_by_magnitude, &steps, &tuning);
        let kept = |large: bool| {
            let some = steps.1.iter().zip(&drawn);
            let some = some.filter(|(value, _)| (**value > 0.67) == large);
            let (all, kept) = some.fold((0.0, 0.0), |(all, kept), (_, drawn)| {
                (all + 1.0, kept + f64::from(u8::from(*drawn != 0.0)))
            });
            kept / all
        };
        assert!(kept(true) > kept(false) + 0.1);
    }

    #[test]
    fn masks_are_the_same_in_every_version() {
        let ones = Matrix(8, vec![1.0; 16]);
        let tuning = Tuning {
            density: 0.5,
            ..Tuning::default()
        };
        let subject = Subject {
            matrix: &ones,
            seed: seed(0, "model.layers.0.self_attn.q_proj", 1),
            tuning: &tuning,
        };
        let mut values = ones.1.clone();
        random(&subject).unwrap().apply(0..2, &mut values);
        let bits = values
            .iter()
            .fold(0u32, |bits, value| bits << 1 | u32::from(*value != 0.0));
        assert_eq!(bits, EXPECTED, "{bits:#018b}");
    }

    /// Computed by `fixtures/make_combine.py` from the definition of SplitMix64 and FNV-1a.
    const EXPECTED: u32 = 0b0011_0011_1010_0001;
}
