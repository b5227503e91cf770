//! The truncated SVD against the full one: never better than the best, never worse than it says.

use std::ops::Range;

use loratool::Result;
use loratool::linalg::dense::{ALGEBRAS, Algebra};
use loratool::linalg::random::Random;
use loratool::linalg::truncated::{Blocks, Proof, Rank, Settings, Truncation, truncated};
use ndarray::{Array2, s};

use crate::devices_support::{Twist, Twisted};
use crate::support::algebras;

struct Matrix(Array2<f64>);

impl Blocks for Matrix {
    fn rows(&self) -> usize {
        self.0.nrows()
    }

    fn columns(&self) -> usize {
        self.0.ncols()
    }

    fn fill(&self, rows: Range<usize>, values: &mut [f64]) -> Result<()> {
        let wanted = self.0.slice(s![rows, ..]);
        values
            .iter_mut()
            .zip(wanted)
            .for_each(|(value, stored)| *value = *stored);
        Ok(())
    }
}

fn normal(rows: usize, columns: usize, random: &mut Random) -> Array2<f64> {
    Array2::from_shape_vec((rows, columns), random.normals(rows * columns)).expect("as many values")
}

/// A matrix of singular values `value(0), value(1) …` and random singular vectors, and noise on top.
fn of_spectrum(
    (rows, columns): (usize, usize),
    value: impl Fn(usize) -> f64,
    noise: f64,
) -> Array2<f64> {
    let mut random = Random::new(7);
    let side = rows.min(columns);
    let algebra = ALGEBRAS[0];
    let mut orthonormal = |size: usize| -> Array2<f64> {
        let start = normal(size, side, &mut random);
        algebra.thin_qr(start.view()).expect("it is tall").0
    };
    let (mut left, right) = (orthonormal(rows), orthonormal(columns));
    for (index, mut column) in left.columns_mut().into_iter().enumerate() {
        column *= value(index);
    }
    left.dot(&right.t()) + noise * normal(rows, columns, &mut random)
}

/// Matrices by what is hard about them.
fn matrices() -> Vec<(&'static str, Array2<f64>)> {
    let shape = (300, 420);
    vec![
        ("decay", of_spectrum(shape, |i| 1.0 / (i + 1) as f64, 0.0)),
        (
            "slow decay",
            of_spectrum(shape, |i| 1.0 / ((i + 1) as f64).sqrt(), 0.0),
        ),
        ("steep", of_spectrum(shape, |i| 0.3f64.powi(i as i32), 0.0)),
        ("flat", of_spectrum(shape, |_| 1.0, 0.0)),
        (
            "cluster",
            of_spectrum(shape, |i| if i < 24 { 1.0 } else { 0.01 }, 1e-4),
        ),
        (
            "cluster across the rank",
            of_spectrum(
                shape,
                |i| {
                    if i < 6 {
                        3.0
                    } else {
                        1.0 / (1.0 + i as f64 / 1e3)
                    }
                },
                0.0,
            ),
        ),
        (
            "exactly of low rank",
            of_spectrum(shape, |i| if i < 5 { (5 - i) as f64 } else { 0.0 }, 0.0),
        ),
        (
            "of exactly the rank",
            of_spectrum(shape, |i| if i < 8 { (9 - i) as f64 } else { 0.0 }, 0.0),
        ),
        ("zero", Array2::zeros(shape)),
        ("noise", of_spectrum(shape, |_| 0.0, 1.0)),
        (
            "decay into noise",
            of_spectrum(shape, |i| 1.0 / (i + 1) as f64, 2e-3),
        ),
        (
            "tall",
            of_spectrum((900, 260), |i| 1.0 / (i + 1) as f64, 1e-4),
        ),
        (
            "wide",
            of_spectrum((250, 1000), |i| 1.0 / (i + 1) as f64, 1e-4),
        ),
        ("tall noise", of_spectrum((700, 240), |_| 0.0, 1.0)),
        ("tiny", of_spectrum((3, 5), |i| (i + 1) as f64, 0.0)),
        ("a row", of_spectrum((1, 400), |_| 2.0, 0.0)),
        ("a column", of_spectrum((400, 1), |_| 2.0, 0.0)),
        (
            "large numbers",
            of_spectrum(shape, |i| 1e12 / (i + 1) as f64, 0.0),
        ),
        (
            "small numbers",
            of_spectrum(shape, |i| 1e-12 / (i + 1) as f64, 0.0),
        ),
    ]
}

fn settings(
    algebra: &'static dyn Algebra,
    rank: Rank,
    tolerance: Option<f64>,
) -> Settings<'static> {
    Settings {
        algebra,
        rank,
        tolerance,
        exact: false,
        seed: 3,
        memory: 1 << 30,
        check: &|| Ok(()),
    }
}

/// ‖Δ − Σ σ u vᵀ‖²
fn left_over(matrix: &Array2<f64>, found: &Truncation) -> f64 {
    let mut left = found.left.clone();
    for (mut row, value) in left.rows_mut().into_iter().zip(&found.values) {
        row *= *value;
    }
    let rest = matrix - &left.t().dot(&found.right);
    rest.iter().map(|value| value * value).sum()
}

fn orthonormal(vectors: &Array2<f64>, what: &str) {
    let gram = vectors.dot(&vectors.t());
    for ((i, j), value) in gram.indexed_iter() {
        let wanted = if i == j { 1.0 } else { 0.0 };
        assert!(
            (value - wanted).abs() < 1e-4,
            "{what}: {i} and {j} give {value}"
        );
    }
}

#[test]
fn the_residual_is_within_what_is_proved_of_the_best() {
    let mut proved = 0;
    // The allowance for rounding is to be enough in whatever order a library or a device sums.
    let plain: &'static dyn Algebra = Box::leak(Box::new(Twisted {
        twist: Twist::OneByOne,
        ..Twisted::of(ALGEBRAS[0])
    }));
    let mut libraries = algebras();
    libraries.push(plain);
    for (what, matrix) in matrices() {
        let exact = ALGEBRAS[0].thin_svd(matrix.view()).expect("it converges");
        let square: f64 = matrix.iter().map(|value| value * value).sum();
        for algebra in libraries.iter().copied() {
            for rank in [1, 8, 20] {
                for tolerance in [Some(0.3), Some(1e-2), Some(1e-3), None] {
                    // Loops as plain as that take long.
                    if algebra.name() == plain.name() && (rank, tolerance) != (8, Some(1e-3)) {
                        continue;
                    }
                    let what = format!("{what}, {}, rank {rank}, {tolerance:?}", algebra.name());
                    let blocks = Matrix(matrix.clone());
                    let found =
                        truncated(&blocks, &settings(algebra, Rank::Fixed(rank), tolerance))
                            .unwrap_or_else(|e| panic!("{what}: {e}"));
                    let best: f64 = exact.s.iter().skip(rank).map(|value| value * value).sum();
                    let left = left_over(&matrix, &found);
                    assert!((found.square - square).abs() <= 1e-12 * square, "{what}");
                    assert!(
                        left >= best * (1.0 - 1e-6) - 1e-12 * square,
                        "{what}: {left} is below the best {best}"
                    );
                    // What the first triplets leave is what they say that they leave.
                    let said = square - found.values.iter().map(|value| value * value).sum::<f64>();
                    assert!(
                        (left - said).abs() <= 1e-5 * square * found.values.len() as f64,
                        "{what}: {left} {said}"
                    );
                    let excess = (left / best.max(1e-300)).sqrt() - 1.0;
                    match found.proof {
                        Proof::Within(bound) => {
                            proved += 1;
                            assert!(excess <= bound + 1e-6, "{what}: {excess} is above {bound}");
                            let tolerance = tolerance.expect("nothing is proved without");
                            assert!(bound <= tolerance, "{what}: {bound}");
                        }
                        Proof::Complete => {
                            assert!(
                                left <= best * (1.0 + 1e-9) + 1e-20 * square,
                                "{what}: {left} {best}"
                            );
                        }
                        Proof::Rounding => assert!(left <= 1e-9 * square, "{what}: {left}"),
                        Proof::None => assert!(tolerance.is_none(), "{what}: not proved"),
                    }
                    orthonormal(&found.left, &what);
                    orthonormal(&found.right, &what);
                    assert!(
                        found.values.is_sorted_by(|a, b| a >= b),
                        "{what}: {:?}",
                        found.values
                    );
                }
            }
        }
    }
    assert!(proved > 100, "only {proved} certificates were tried");
}

#[test]
fn a_wrong_certificate_would_be_found() {
    // Of noise, a Krylov space of one round is far from the best: what is claimed of it must say so.
    let matrix = of_spectrum((300, 420), |_| 0.0, 1.0);
    let loose = truncated(
        &Matrix(matrix.clone()),
        &settings(ALGEBRAS[0], Rank::Fixed(8), Some(0.5)),
    );
    let tight = truncated(
        &Matrix(matrix.clone()),
        &settings(ALGEBRAS[0], Rank::Fixed(8), Some(1e-3)),
    );
    let (loose, tight) = (loose.expect("it ends"), tight.expect("it ends"));
    assert!(left_over(&matrix, &loose) > left_over(&matrix, &tight));
    let (Proof::Within(loose), Proof::Within(tight)) = (loose.proof, tight.proof) else {
        panic!("{:?} {:?}", loose.proof, tight.proof);
    };
    assert!(loose > tight, "{loose} {tight}");
}

#[test]
fn a_matrix_that_is_not_kept_has_the_same_values() {
    let matrix = of_spectrum((700, 260), |i| 1.0 / (i + 1) as f64, 1e-4);
    let kept = truncated(
        &Matrix(matrix.clone()),
        &settings(ALGEBRAS[0], Rank::Fixed(8), Some(1e-3)),
    );
    for algebra in algebras() {
        for exact in [false, true] {
            let streamed = Settings {
                memory: 0,
                exact,
                ..settings(algebra, Rank::Fixed(8), Some(1e-3))
            };
            let streamed = truncated(&Matrix(matrix.clone()), &streamed).expect("it ends");
            let kept = kept.as_ref().expect("it ends");
            for (a, b) in streamed.values.iter().zip(&kept.values) {
                assert!((a - b).abs() <= 1e-3 * b, "{a} {b}");
            }
        }
    }
}

#[test]
fn a_matrix_that_is_held_in_several_blocks_has_the_same_values() {
    // Blocks have 32 MiB.
    for shape in [(2100, 4100), (4100, 2100)] {
        let mut random = Random::new(5);
        let mut normal = |rows, columns| {
            Array2::from_shape_vec((rows, columns), random.normals(rows * columns)).unwrap()
        };
        let (left, right) = (normal(shape.0, 4), normal(4, shape.1));
        let matrix = Matrix(left.dot(&right) + normal(shape.0, shape.1));
        let mut values = Vec::new();
        for algebra in algebras() {
            let settings = Settings {
                memory: 0,
                ..settings(algebra, Rank::Fixed(3), None)
            };
            values.push(truncated(&matrix, &settings).expect("it ends").values);
        }
        for found in &values {
            for (a, b) in found.iter().zip(&values[0]) {
                assert!((a - b).abs() <= 1e-5 * b, "{shape:?}: {a} {b}");
            }
        }
    }
}

#[test]
fn ranks_follow_energy_and_ratio() {
    let value = |i: usize| 0.5f64.powi(i as i32);
    let matrix = of_spectrum((300, 420), value, 0.0);
    let find = |rank| {
        truncated(
            &Matrix(matrix.clone()),
            &settings(ALGEBRAS[0], rank, Some(1e-3)),
        )
        .expect("it ends")
    };
    let total: f64 = (0..300).map(|i| value(i) * value(i)).sum();
    for share in [0.5, 0.9, 0.99, 0.999] {
        let mut kept = 0.0;
        let wanted = (0..300).take_while(|i| {
            let before = kept;
            kept += value(*i) * value(*i);
            before < share * total
        });
        let wanted = wanted.count();
        let found = find(Rank::Energy { share, most: 64 });
        assert_eq!(
            (found.values.len(), found.reached),
            (wanted, true),
            "{share}"
        );
    }
    let found = find(Rank::Energy {
        share: 1.0,
        most: 4,
    });
    assert_eq!((found.values.len(), found.reached), (4, false));
    for (ratio, rank) in [(3.0, 2), (5.0, 3), (100.0, 7)] {
        let found = find(Rank::Ratio { ratio, most: 64 });
        assert_eq!((found.values.len(), found.reached), (rank, true), "{ratio}");
    }
    let found = find(Rank::Ratio {
        ratio: 1e6,
        most: 4,
    });
    assert_eq!((found.values.len(), found.reached), (4, false));
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for (what, matrix) in matrices()
        .into_iter()
        .filter(|(what, _)| !what.contains("flat"))
    {
        let bits = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            let found = pool.install(|| {
                truncated(
                    &Matrix(matrix.clone()),
                    &settings(ALGEBRAS[0], Rank::Fixed(8), Some(1e-2)),
                )
            });
            let found = found.expect("it ends");
            let all = found.left.iter().chain(&found.right).chain(&found.values);
            all.map(|value| value.to_bits()).collect::<Vec<u64>>()
        };
        let one = bits(1);
        assert!(
            [2, 3].into_iter().all(|threads| bits(threads) == one),
            "{what}"
        );
    }
}

#[test]
fn a_value_that_is_not_finite_is_an_error() {
    for (rows, columns) in [(300, 420), (4, 6)] {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut matrix = of_spectrum((rows, columns), |i| 1.0 / (i + 1) as f64, 0.0);
            matrix[(2, 3)] = bad;
            let found = truncated(
                &Matrix(matrix),
                &settings(ALGEBRAS[0], Rank::Fixed(2), Some(1e-3)),
            );
            let error = found.expect_err("it is not finite");
            assert_eq!(error.kind(), loratool::Kind::NonFinite);
        }
    }
}

#[test]
fn the_work_ends_when_it_is_asked_to() {
    let matrix = of_spectrum((300, 420), |i| 1.0 / (i + 1) as f64, 0.0);
    let settings = Settings {
        check: &|| Err(loratool::Error::new(loratool::Reason::Stopped)),
        ..settings(ALGEBRAS[0], Rank::Fixed(2), Some(1e-3))
    };
    let error = truncated(&Matrix(matrix), &settings).expect_err("it was stopped");
    assert_eq!(error.kind(), loratool::Kind::Interrupted);
}

/// A matrix that is known as a product.
struct Factored(Array2<f64>, Array2<f64>);

impl Blocks for Factored {
    fn rows(&self) -> usize {
        self.0.nrows()
    }

    fn columns(&self) -> usize {
        self.1.ncols()
    }

    fn fill(&self, _rows: Range<usize>, _values: &mut [f64]) -> Result<()> {
        panic!("a product is not formed")
    }

    fn factors(&self) -> Result<Option<(Array2<f64>, Array2<f64>)>> {
        Ok(Some((self.0.clone(), self.1.clone())))
    }
}

#[test]
fn a_product_is_decomposed_by_its_factors_as_well_as_whole() {
    let mut random = Random::new(3);
    let mut pairs: Vec<(&str, Factored)> = [
        ("tall", 90, 5, 20),
        ("wide", 12, 4, 70),
        ("square", 40, 8, 40),
        ("more terms than a side", 10, 24, 30),
        ("more terms than both sides", 6, 30, 9),
        ("a row", 1, 3, 50),
    ]
    .into_iter()
    .map(|(name, rows, terms, columns)| {
        let left = normal(rows, terms, &mut random);
        (name, Factored(left, normal(terms, columns, &mut random)))
    })
    .collect();
    let (a, b) = (normal(30, 3, &mut random), normal(3, 20, &mut random));
    let twice = |m: &Array2<f64>, sign: f64, axis| {
        ndarray::concatenate(ndarray::Axis(axis), &[m.view(), (sign * m).view()]).unwrap()
    };
    pairs.push((
        "terms twice",
        Factored(twice(&a, 1.0, 1), twice(&b, 1.0, 0)),
    ));
    pairs.push((
        "no terms",
        Factored(Array2::zeros((7, 0)), Array2::zeros((0, 5))),
    ));
    pairs.push((
        "zeros",
        Factored(Array2::zeros((7, 2)), Array2::zeros((2, 5))),
    ));
    for algebra in algebras() {
        for (name, pair) in &pairs {
            let whole = pair.0.dot(&pair.1);
            let full = algebra.thin_svd(whole.view()).unwrap();
            let largest = full.s.first().copied().unwrap_or(0.0);
            for rank in [
                Rank::Fixed(2),
                Rank::Fixed(99),
                Rank::Energy {
                    share: 0.9,
                    most: 99,
                },
                Rank::Ratio {
                    ratio: 2.0,
                    most: 99,
                },
                Rank::Sum {
                    share: 0.7,
                    most: 99,
                },
            ] {
                let settings = Settings {
                    algebra,
                    rank,
                    tolerance: Some(1e-3),
                    exact: false,
                    seed: 0,
                    memory: 1 << 20,
                    check: &|| Ok(()),
                };
                let ours = truncated(pair, &settings).unwrap();
                let theirs = truncated(
                    &Matrix(whole.clone()),
                    &Settings {
                        exact: true,
                        ..settings
                    },
                )
                .unwrap();
                assert_eq!(ours.proof, Proof::Complete, "{name}");
                let tiny = |value: &&f64| **value <= 1e-12 * largest;
                let count = |values: &[f64]| values.len() - values.iter().filter(tiny).count();
                assert_eq!(
                    count(&ours.values),
                    count(&theirs.values),
                    "{name} {rank:?}"
                );
                for (a, b) in ours.values.iter().zip(&full.s) {
                    assert!((a - b).abs() <= 1e-12 * largest, "{name} {rank:?}");
                }
                let made = |found: &Truncation| {
                    let mut left = found.left.t().to_owned();
                    for (mut column, value) in left.columns_mut().into_iter().zip(&found.values) {
                        column *= *value;
                    }
                    left.dot(&found.right)
                };
                let difference = made(&ours) - made(&theirs);
                let off = difference
                    .iter()
                    .fold(0.0f64, |off, value| off.max(value.abs()));
                assert!(off <= 1e-11 * largest, "{name} {rank:?}: {off}");
            }
        }
    }
}

#[test]
fn a_share_of_the_sum_of_all_singular_values_is_the_least_rank_that_has_it() {
    let matrix = Matrix(Array2::from_diag(&ndarray::arr1(&[
        8.0, 4.0, 2.0, 1.0, 0.5, 0.25,
    ])));
    for (share, rank) in [(0.5, 1), (0.75, 2), (0.9, 4), (1.0, 6)] {
        let settings = Settings {
            algebra: ALGEBRAS[0],
            rank: Rank::Sum { share, most: 99 },
            tolerance: None,
            exact: false,
            seed: 0,
            memory: 1 << 20,
            check: &|| Ok(()),
        };
        let found = truncated(&matrix, &settings).unwrap();
        assert_eq!(found.values.len(), rank, "{share}");
        assert!(found.reached);
    }
}
