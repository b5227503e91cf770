//! How long a certified truncated SVD takes: `cargo bench --bench truncated -- [SIZE RANK]`.
//!
//! Prints seconds, what is proved, and the number of singular values found, for spectra that decay, decay into
//! rounding noise, and are noise alone; and seconds of the full decomposition of the same library where SIZE is at most
//! 2048.

use std::ops::Range;
use std::time::Instant;

use loratool::Result;
use loratool::linalg::random::Random;
use loratool::linalg::truncated::{Blocks, Rank, Settings, truncated};
use ndarray::Array2;

mod libraries;

use libraries::libraries;

struct Dense(Array2<f32>);

impl Blocks for Dense {
    fn rows(&self) -> usize {
        self.0.nrows()
    }

    fn columns(&self) -> usize {
        self.0.ncols()
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let columns = self.0.ncols();
        let all = self.0.as_slice().unwrap_or_default();
        for (value, stored) in values.iter_mut().zip(&all[rows.start * columns..]) {
            *value = f64::from(*stored);
        }
        Ok(())
    }
}

/// `Σ 1/i · uᵢ · vᵢᵀ` with random vectors, and noise of a size.
fn matrix(size: usize, rank: usize, noise: f32) -> Dense {
    let mut random = Random::new(1);
    let mut normal = |rows, columns| {
        let values = random
            .normals(rows * columns)
            .into_iter()
            .map(|value| value as f32);
        Array2::from_shape_vec((rows, columns), values.collect()).unwrap_or_default()
    };
    let (mut left, right) = (normal(size, rank), normal(rank, size));
    for (index, mut column) in left.columns_mut().into_iter().enumerate() {
        column /= (index + 1) as f32;
    }
    Dense(left.dot(&right) + noise * normal(size, size))
}

fn main() {
    let numbers: Vec<usize> = std::env::args()
        .filter_map(|word| word.parse().ok())
        .collect();
    let (size, rank) = match numbers[..] {
        [size, rank, ..] => (size, rank),
        _ => (2048, 32),
    };
    for (what, signals, noise) in [
        ("decay", 512, 0.0),
        ("decay into noise", 512, 0.1),
        ("noise", 1, 1.0),
    ] {
        let matrix = matrix(size, signals, noise);
        for algebra in libraries() {
            for (how, tolerance, exact) in [
                ("certified", Some(1e-3), false),
                ("alone", None, false),
                ("full", None, true),
            ] {
                if exact && size > 2048 || std::env::var("ONLY").is_ok_and(|only| only != what) {
                    continue;
                }
                let settings = Settings {
                    algebra,
                    rank: Rank::Fixed(rank),
                    tolerance,
                    exact,
                    seed: 1,
                    memory: 256 << 20,
                    check: &|| Ok(()),
                };
                let start = Instant::now();
                let found = truncated(&matrix, &settings);
                let seconds = start.elapsed().as_secs_f64();
                match found {
                    Ok(found) => println!(
                        "{size} rank {rank} {what}, {}, {how}: {seconds:.3} s, {:?}, {} values, energy {:.6}",
                        algebra.name(),
                        found.proof,
                        found.spectrum.len(),
                        found.energy(),
                    ),
                    Err(error) => println!("{what}: {error}"),
                }
            }
        }
    }
}
