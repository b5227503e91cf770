//! The libraries of dense linear algebra side by side, in rounds that take turns.
//!
//!     cargo bench --bench dense --features lapack-openblas-system
//!
//! What counts are ratios to the first library: medians of the ratios of single rounds.

use std::time::Instant;

use loratool::linalg::dense::{Dense, Into, Real};
use loratool::linalg::random::Random;
use ndarray::{Array2, s};

mod libraries;

use libraries::libraries;

const ROUNDS: usize = 9;

/// What is measured.
struct Case<T> {
    what: &'static str,
    run: fn(&dyn Dense<T>, &Array2<T>),
    rows: usize,
    columns: usize,
}

fn cases<T: Real>() -> Vec<Case<T>> {
    vec![
        Case {
            what: "product, 4096 x 4096 x 48",
            run: |library, a| {
                let b = a.slice(s![.., ..48]);
                let mut c = Array2::zeros((a.nrows(), 48));
                library
                    .multiply(a.view(), b, c.view_mut(), Into::Place)
                    .expect("products do not fail");
            },
            rows: 4096,
            columns: 4096,
        },
        Case {
            what: "thin QR, 4096 x 48",
            run: |library, a| drop(library.thin_qr(a.view()).unwrap()),
            rows: 4096,
            columns: 48,
        },
        Case {
            what: "thin SVD, 1024 x 1024",
            run: |library, a| drop(library.thin_svd(a.view()).unwrap()),
            rows: 1024,
            columns: 1024,
        },
        Case {
            what: "eigh, 512",
            run: |library, a| drop(library.eigh(a.view()).unwrap()),
            rows: 512,
            columns: 512,
        },
    ]
}

fn measure<T: Real>(name: &str, libraries: &[(&str, &dyn Dense<T>)]) {
    for case in cases::<T>() {
        let normals = Random::new(1).normals(case.rows * case.columns);
        let a = Array2::from_shape_vec((case.rows, case.columns), normals).unwrap();
        let a = a.mapv(T::rounded);
        let mut times = vec![Vec::new(); libraries.len()];
        for _ in 0..ROUNDS {
            for ((_, library), times) in libraries.iter().zip(&mut times) {
                let start = Instant::now();
                (case.run)(*library, &a);
                times.push(start.elapsed().as_secs_f64());
            }
        }
        for ((library, _), own) in libraries.iter().zip(&times) {
            let ratios = own.iter().zip(&times[0]).map(|(own, first)| own / first);
            println!(
                "{name} {}: {library} {:.2} ms, {:.2} of {}",
                case.what,
                1e3 * median(own.clone()),
                median(ratios.collect()),
                libraries[0].0,
            );
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let all = libraries();
    let single: Vec<(&str, &dyn Dense<f32>)> = all.iter().map(|a| (a.name(), *a as _)).collect();
    measure("f32", &single);
    let double: Vec<(&str, &dyn Dense<f64>)> = all.iter().map(|a| (a.name(), *a as _)).collect();
    measure("f64", &double);
}
