//! Ranks as sd-scripts counts them.
//!
//! Source: `kohya-ss/sd-scripts`, `networks/resize_lora.py` (`index_sv_cumulative`, `index_sv_fro`, `index_sv_ratio`,
//! `rank_resize`). Each rule finds a number of singular values of `B · A` without its scale, which is kept between one
//! and all but one of them, and then one more is taken, so that the rank is one above what the rule says. There the
//! values are those of the whole matrix in f32: where a sum comes within its rounding of the share, the count may be
//! another.

use super::Ranks;

/// Largest singular values up to this are those of a module that adds nothing.
const SMALLEST: f64 = 1e-6;

/// The rank for the singular values of `B · A`, falling; those up to the smaller side of the matrix that are not given
/// are zeros.
pub(super) fn count(values: &[f64], smaller_side: usize, ranks: Ranks, most: usize) -> usize {
    if values.first().is_none_or(|first| *first <= SMALLEST) {
        return 1;
    }
    // How many from the first on reach a share of the sum.
    let until = |share: f64, number: &dyn Fn(&f64) -> f64| {
        let wanted = share * values.iter().map(number).sum::<f64>();
        let mut kept = 0.0;
        let before = values.iter().take_while(|value| {
            kept += number(value);
            kept < wanted
        });
        before.count() + 1
    };
    let index = match ranks {
        Ranks::Fixed(rank) => return rank,
        Ranks::Ratio(ratio) => {
            let least = values[0] / ratio;
            values.iter().filter(|value| **value > least).count()
        }
        Ranks::Sum(share) => until(share, &|value| *value),
        Ranks::Norm(share) => until(share * share, &|value| value * value),
        // Refused before: it has no such rules.
        Ranks::Energy(_) | Ranks::Budget(_) => most,
    };
    let index = index.min(smaller_side.saturating_sub(1)).max(1);
    (index + 1).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_is_taken_than_the_rule_says() {
        let values = [4.0, 3.0, 2.0, 1.0];
        for (ranks, rank) in [
            (Ranks::Ratio(1.9), 3),
            (Ranks::Ratio(1.0), 2),
            (Ranks::Sum(0.65), 3),
            (Ranks::Norm(0.8), 3),
            (Ranks::Norm(0.72), 2),
        ] {
            assert_eq!(count(&values, 8, ranks, 99), rank, "{ranks:?}");
            assert_eq!(count(&values, 8, ranks, 2), 2, "{ranks:?}");
        }
        // All but one of the values of the matrix, and one more.
        assert_eq!(count(&values, 4, Ranks::Sum(1.0), 99), 4);
        assert_eq!(count(&values, 8, Ranks::Sum(1.0), 99), 5);
        assert_eq!(count(&[1e-6], 8, Ranks::Fixed(7), 99), 1);
        assert_eq!(count(&[], 8, Ranks::Ratio(2.0), 99), 1);
    }
}
