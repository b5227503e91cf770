//! How the elements of several changes become one. Definitions and their sources: `docs/combining.md`.

use std::ops::Range;

use rayon::prelude::*;

use super::recipes::{Majority, Tuning};
use super::sparsify::{Masked, pieces};
use crate::error::{Error, Reason, Result};
use crate::linalg::truncated::Blocks;

/// One element of several.
pub(super) trait Blend: Send + Sync {
    /// The element of the result from those of all matrices; may change their order.
    fn of(&self, values: &mut [f64]) -> f64;
}

/// Matrices that are to be put together, with their strengths.
pub(super) struct Panel<'a> {
    pub(super) matrices: &'a [Masked<'a>],
    pub(super) strengths: &'a [f64],
    /// The sum of the magnitudes of all strengths, also of adapters that do not have the layer.
    pub(super) whole: f64,
    pub(super) tuning: &'a Tuning,
}

/// A way to put matrices together.
pub(super) type Consensus = fn(&Panel<'_>) -> Result<Box<dyn Blend>>;

/// Σ mₖxₖ, perhaps divided by Σ|mₖ|.
pub(super) fn sum(panel: &Panel<'_>) -> Result<Box<dyn Blend>> {
    let total: f64 = panel.strengths.iter().map(|own| own.abs()).sum();
    let divisor = if panel.tuning.normalize && total > 0.0 {
        total
    } else {
        1.0
    };
    Ok(Box::new(Weighted(
        panel.strengths.iter().map(|own| own / divisor).collect(),
    )))
}

/// The mean of the mₖxₖ whose sign the majority has.
pub(super) fn elected(panel: &Panel<'_>) -> Result<Box<dyn Blend>> {
    Ok(Box::new(Elected {
        voices: panel.strengths.to_vec(),
        strengths: panel.strengths.to_vec(),
        majority: panel.tuning.majority,
        normalize: panel.tuning.normalize,
    }))
}

/// The same where the vote and the signs are those of xₖ, whatever the strengths.
pub(super) fn elected_without_strengths(panel: &Panel<'_>) -> Result<Box<dyn Blend>> {
    Ok(Box::new(Elected {
        voices: vec![1.0; panel.strengths.len()],
        strengths: panel.strengths.to_vec(),
        majority: panel.tuning.majority,
        normalize: panel.tuning.normalize,
    }))
}

/// The median of mₖxₖ.
pub(super) fn median(panel: &Panel<'_>) -> Result<Box<dyn Blend>> {
    Ok(Box::new(Median(panel.strengths.to_vec())))
}

/// On the great circle between two matrices, as far from the first as the strengths say.
pub(super) fn spherical(panel: &Panel<'_>) -> Result<Box<dyn Blend>> {
    let forward = panel.strengths.iter().all(|own| *own >= 0.0);
    let moves = panel.matrices.len() == 1 || panel.strengths.iter().any(|own| *own > 0.0);
    if !forward || !moves || panel.whole <= 0.0 {
        return Err(Error::new(Reason::BadOption {
            text: format!("{:?}", panel.strengths),
            problem: "slerp takes strengths that are not negative and not all 0".to_owned(),
        }));
    }
    let [first, second] = panel.matrices else {
        // Between something and nothing there is a line.
        let lone = panel.strengths.iter().map(|own| own / panel.whole);
        return Ok(Box::new(Weighted(lone.collect())));
    };
    let step = panel.strengths[1] / (panel.strengths[0] + panel.strengths[1]);
    let products = pieces(first).into_par_iter().map(|rows| {
        let count = rows.len() * first.columns();
        let (mut a, mut b) = (vec![0.0; count], vec![0.0; count]);
        first.fill(rows.clone(), &mut a)?;
        second.fill(rows, &mut b)?;
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        Ok([dot(&a, &a), dot(&b, &b), dot(&a, &b)])
    });
    let products: Vec<[f64; 3]> = products.collect::<Result<_>>()?;
    let total = |index: usize| products.iter().map(|own| own[index]).sum::<f64>();
    let norms = (total(0) * total(1)).sqrt();
    let cosine = if norms > 0.0 { total(2) / norms } else { 1.0 };
    let line = [1.0 - step, step];
    let weights = match cosine.abs() > PARALLEL {
        true => line,
        false => {
            let angle = cosine.acos();
            line.map(|part| (part * angle).sin() / angle.sin())
        }
    };
    Ok(Box::new(Weighted(weights.to_vec())))
}

/// From this cosine on there is no plane that a circle could lie in.
const PARALLEL: f64 = 0.9995;

struct Weighted(Vec<f64>);

impl Blend for Weighted {
    fn of(&self, values: &mut [f64]) -> f64 {
        let both = values.iter().zip(&self.0);
        both.fold(0.0, |sum, (value, weight)| weight.mul_add(*value, sum))
    }
}

struct Elected {
    /// What an element is multiplied by before it votes.
    voices: Vec<f64>,
    strengths: Vec<f64>,
    majority: Majority,
    normalize: bool,
}

impl Blend for Elected {
    fn of(&self, values: &mut [f64]) -> f64 {
        let spoken = || {
            values
                .iter()
                .zip(&self.voices)
                .map(|(value, by)| value * by)
        };
        let votes: f64 = match self.majority {
            Majority::Total => spoken().sum(),
            Majority::Frequency => spoken().map(sign).sum(),
        };
        let elected = if votes >= 0.0 { 1.0 } else { -1.0 };
        let (mut sum, mut count) = (0.0, 0.0);
        for ((spoken, value), strength) in spoken().zip(values.iter()).zip(&self.strengths) {
            if sign(spoken) == elected {
                sum = strength.mul_add(*value, sum);
                count += if self.normalize { strength.abs() } else { 1.0 };
            }
        }
        if count > 0.0 { sum / count } else { sum }
    }
}

/// −1, 0 or 1.
fn sign(value: f64) -> f64 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

struct Median(Vec<f64>);

impl Blend for Median {
    fn of(&self, values: &mut [f64]) -> f64 {
        for (value, strength) in values.iter_mut().zip(&self.0) {
            *value *= strength;
        }
        values.sort_unstable_by(f64::total_cmp);
        let middle = values.len() / 2;
        match values {
            [] => 0.0,
            _ if values.len() % 2 == 1 => values[middle],
            _ => (values[middle - 1] + values[middle]) / 2.0,
        }
    }
}

/// Several matrices put together, formed block by block.
pub(super) struct Blended<'a> {
    pub(super) parts: Vec<Masked<'a>>,
    pub(super) blend: Box<dyn Blend>,
    /// What the result is multiplied by.
    pub(super) by: f64,
}

impl Blocks for Blended<'_> {
    fn rows(&self) -> usize {
        self.parts[0].rows()
    }

    fn columns(&self) -> usize {
        self.parts[0].columns()
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let count = values.len();
        let mut all = vec![0.0; count * self.parts.len()];
        for (part, own) in self.parts.iter().zip(all.chunks_exact_mut(count.max(1))) {
            part.fill(rows.clone(), own)?;
        }
        let mut column = vec![0.0; self.parts.len()];
        for (index, value) in values.iter_mut().enumerate() {
            for (part, own) in column.iter_mut().enumerate() {
                *own = all[part * count + index];
            }
            *value = self.by * self.blend.of(&mut column);
        }
        Ok(())
    }
}
