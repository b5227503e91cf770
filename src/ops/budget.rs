//! Ranks for a size of file: a rank more where it removes most of the error for the numbers that it takes.
//!
//! The squared residual falls by σₖ² with the k-th rank of a matrix, and σ falls with k, so that taking the largest
//! gain for each number first is best up to the last step.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::error::Result;

/// A matrix that ranks can go to.
pub(super) struct Candidate {
    /// Squared singular values, falling, as far as ranks may go.
    pub(super) squares: Vec<f64>,
    /// Numbers (or bytes, where what may be spent is in bytes) that a rank takes.
    pub(super) cost: usize,
}

/// How often something is made anew until it fills a budget.
pub(super) struct Attempts {
    /// At most so often.
    pub(super) most: usize,
    /// And not again where no more bytes than this are left.
    pub(super) enough: u64,
}

/// Makes something in different rooms until it fills a budget: `make` is given what may be spent, and tells how many
/// bytes came of it. The last that fits; nothing where none does.
///
/// # Errors
/// What making gives.
pub(super) fn within<T>(
    budget: u64,
    mut room: u64,
    attempts: &Attempts,
    mut make: impl FnMut(u64) -> Result<(T, u64)>,
) -> Result<Option<T>> {
    let (mut best, mut last) = (None, None);
    // Rooms that are known to be small enough, and too large.
    let (mut small, mut large) = (0, u64::MAX);
    for _ in 0..attempts.most {
        let (made, bytes) = make(room)?;
        let Some(unused) = budget.checked_sub(bytes) else {
            large = large.min(room);
            room = room.saturating_sub(bytes - budget);
            if room <= small {
                room = small + (large - small) / 2;
            }
            continue;
        };
        best = Some(made);
        // More room that buys nothing means that there is nothing more to buy.
        if unused <= attempts.enough || last.replace(bytes) == Some(bytes) {
            break;
        }
        small = room;
        room = room.saturating_add(unused);
        if room >= large {
            room = small + (large - small) / 2;
        }
    }
    Ok(best)
}

/// The next rank of a matrix.
struct Step {
    gain: f64,
    index: usize,
    rank: usize,
}

impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        self.gain
            .total_cmp(&other.gain)
            .then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Step {}

/// A rank for each matrix, of which all together take at most `numbers`.
pub(super) fn spent(candidates: &[Candidate], numbers: u64) -> Vec<usize> {
    let step = |index: usize, rank: usize| {
        let candidate = &candidates[index];
        let square = candidate
            .squares
            .get(rank)
            .filter(|square| **square > 0.0)?;
        Some(Step {
            gain: square / candidate.cost.max(1) as f64,
            index,
            rank,
        })
    };
    let mut ranks = vec![0; candidates.len()];
    let mut left = numbers;
    let mut heap: BinaryHeap<Step> = (0..candidates.len())
        .filter_map(|index| step(index, 0))
        .collect();
    while let Some(Step { index, rank, .. }) = heap.pop() {
        let cost = candidates[index].cost as u64;
        // What does not fit any more may still fit elsewhere.
        if cost > left {
            continue;
        }
        left -= cost;
        ranks[index] = rank + 1;
        heap.extend(step(index, rank + 1));
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left by the best of all assignments.
    fn best(candidates: &[Candidate], numbers: u64) -> f64 {
        let Some((first, rest)) = candidates.split_first() else {
            return 0.0;
        };
        (0..=first.squares.len())
            .filter(|rank| (rank * first.cost) as u64 <= numbers)
            .map(|rank| {
                let left: f64 = first.squares[rank..].iter().sum();
                left + best(rest, numbers - (rank * first.cost) as u64)
            })
            .fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn the_error_that_is_left_is_the_least_up_to_the_last_step() {
        let candidates = [
            Candidate {
                squares: vec![9.0, 4.0, 1.0, 0.25],
                cost: 3,
            },
            Candidate {
                squares: vec![16.0, 1.0, 0.5],
                cost: 5,
            },
            Candidate {
                squares: vec![2.0, 1.5, 1.4, 1.3],
                cost: 2,
            },
        ];
        for numbers in 0..40 {
            let ranks = spent(&candidates, numbers);
            let cost: usize = ranks
                .iter()
                .zip(&candidates)
                .map(|(rank, own)| rank * own.cost)
                .sum();
            assert!(cost as u64 <= numbers, "{numbers}: {ranks:?}");
            let left: f64 = ranks
                .iter()
                .zip(&candidates)
                .flat_map(|(rank, own)| &own.squares[*rank..])
                .sum();
            let largest = candidates
                .iter()
                .map(|own| own.cost as u64)
                .max()
                .unwrap_or(0);
            let without_last = best(&candidates, numbers.saturating_sub(largest));
            assert!(
                left <= without_last,
                "{numbers}: {left} is left, {without_last} could be"
            );
        }
    }

    #[test]
    fn zeros_get_no_rank() {
        let candidates = [Candidate {
            squares: vec![1.0, 0.0],
            cost: 1,
        }];
        assert_eq!(spent(&candidates, 10), [1]);
    }
}
