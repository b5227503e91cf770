//! One table over every library of dense linear algebra, in both types of numbers.
//!
//! Vectors of a factorisation are not unique: what is compared is what they make, and the values.

use loratool::Reason;
use loratool::linalg::dense::{Dense, Into, Real, Svd};
use ndarray::{Array2, ArrayBase, ArrayView2, Ix2, RawData, s};

use crate::support::{Random, algebras};

/// Runs a check with every library and type.
macro_rules! everywhere {
    ($check:ident) => {
        for algebra in algebras() {
            $check::<f32>(algebra, &format!("{}, f32", algebra.name()));
            $check::<f64>(algebra, &format!("{}, f64", algebra.name()));
        }
    };
}

/// Rounding errors that add up like a random walk over so many terms, with room for the constants of algorithms.
fn allowance<T: Real>(terms: usize) -> f64 {
    20.0 * T::ROUNDOFF * (terms.max(1) as f64).sqrt()
}

fn random<T: Real>(seed: u64, rows: usize, columns: usize) -> Array2<T> {
    let mut random = Random(seed);
    Array2::from_shape_simple_fn((rows, columns), || T::rounded(random.float()))
}

fn widened<T: Real>(a: ArrayView2<'_, T>) -> Array2<f64> {
    a.mapv(T::widened)
}

fn rounded<T: Real>(a: &Array2<f64>) -> Array2<T> {
    a.mapv(T::rounded)
}

/// A plain loop.
fn product(a: &Array2<f64>, b: &Array2<f64>) -> Array2<f64> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    for i in 0..a.nrows() {
        for k in 0..a.ncols() {
            let factor = a[(i, k)];
            let (mut row, terms) = (c.row_mut(i), b.row(k));
            row.zip_mut_with(&terms, |sum: &mut f64, term| *sum += factor * term);
        }
    }
    c
}

fn norm(a: &Array2<f64>) -> f64 {
    a.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Reflects the columns of a matrix: `(I − 2 v vᵀ / vᵀ v) · a`.
fn reflect(a: &mut Array2<f64>, v: &[f64]) {
    let square: f64 = v.iter().map(|value| value * value).sum();
    for mut column in a.columns_mut() {
        let along: f64 = column.iter().zip(v).map(|(a, v)| a * v).sum();
        for (value, v) in column.iter_mut().zip(v) {
            *value -= 2.0 * along / square * v;
        }
    }
}

/// A matrix with these singular values: a diagonal between products of reflections.
fn with_values(seed: u64, rows: usize, columns: usize, values: &[f64]) -> Array2<f64> {
    let mut random = Random(seed);
    let mut a = Array2::zeros((rows, columns));
    a.diag_mut().assign(&ndarray::aview1(values));
    for _ in 0..values.len().min(12) {
        reflect(&mut a, &random.floats(rows));
        a = a.reversed_axes();
        reflect(&mut a, &random.floats(columns));
        a = a.reversed_axes();
    }
    a
}

/// A symmetric matrix with these eigenvalues.
fn symmetric(seed: u64, values: &[f64]) -> Array2<f64> {
    let mut random = Random(seed);
    let mut a = Array2::from_diag(&ndarray::aview1(values));
    for _ in 0..values.len().min(12) {
        let v = random.floats(values.len());
        reflect(&mut a, &v);
        a = a.reversed_axes();
        reflect(&mut a, &v);
    }
    a
}

fn assert_orthonormal<T: Real>(q: &Array2<T>, what: &str) {
    let q = widened(q.view());
    let mut rest = product(&q.t().to_owned(), &q);
    for value in rest.diag_mut() {
        *value -= 1.0;
    }
    let (rest, allowed) = (norm(&rest), allowance::<T>(q.len()));
    assert!(rest <= allowed, "{what}: qᵀq is {rest:e} from one");
}

fn assert_falling<T: Real>(values: &[T], what: &str) {
    assert!(values.is_sorted_by(|a, b| a >= b), "{what}: {values:?}");
}

/// Values as they should be, to a share of the largest.
fn assert_values<T: Real>(found: &[T], expected: &[f64], share: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected
        .iter()
        .fold(0.0, |all: f64, value| all.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let error = (found.widened() - expected).abs();
        assert!(
            error <= share * largest,
            "{what}: {found:?} for {expected:e}, {:e} of the largest",
            error / largest
        );
    }
}

/// Ways in which a matrix lies in memory.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Rows,
    Columns,
    ColumnSlice,
    Strided,
    Reversed,
}

impl Layout {
    const ALL: [Layout; 5] = [
        Layout::Rows,
        Layout::Columns,
        Layout::ColumnSlice,
        Layout::Strided,
        Layout::Reversed,
    ];

    /// The matrix within the memory that holds it.
    fn within<S: RawData>(self, memory: ArrayBase<S, Ix2>) -> ArrayBase<S, Ix2> {
        match self {
            Layout::Rows => memory,
            Layout::Columns => memory.reversed_axes(),
            Layout::ColumnSlice => {
                let end = memory.ncols() - 3;
                memory.slice_move(s![.., 2..end])
            }
            Layout::Strided => memory.slice_move(s![..;2, ..;3]),
            Layout::Reversed => memory.slice_move(s![..;-1, ..;-1]),
        }
    }

    /// Memory that holds a matrix, and [`AROUND`] around it.
    fn memory<T: Real>(self, a: &Array2<T>) -> Array2<T> {
        let (rows, columns) = a.dim();
        let size = match self {
            Layout::Rows | Layout::Reversed => (rows, columns),
            Layout::Columns => (columns, rows),
            Layout::ColumnSlice => (rows, columns + 5),
            Layout::Strided => (2 * rows, 3 * columns),
        };
        let mut memory = Array2::from_elem(size, T::rounded(AROUND));
        self.within(memory.view_mut()).assign(a);
        memory
    }
}

/// What lies around a matrix.
const AROUND: f64 = 7.5;

/// A product in every layout, replaced and summed, against a plain loop in f64.
fn check_product<T: Real>(library: &dyn Dense<T>, [m, k, n]: [usize; 3], what: &str) {
    let (a, b, before) = (random(1, m, k), random(2, k, n), random(3, m, n));
    let (wide_a, wide_b) = (widened(a.view()), widened(b.view()));
    let expected = product(&wide_a, &wide_b);
    let magnitude = product(&wide_a.mapv(f64::abs), &wide_b.mapv(f64::abs));
    for (index, layout) in Layout::ALL.into_iter().enumerate() {
        let other = |step: usize| Layout::ALL[(index + step) % Layout::ALL.len()];
        let (of_a, of_b) = (other(1), other(2));
        let (in_a, in_b) = (of_a.memory(&a), of_b.memory(&b));
        for how in [Into::Place, Into::Sum] {
            let what = format!("{what}: {m} × {k} × {n}, {how:?}, {layout:?}");
            let (held, kept) = match how {
                Into::Sum => (before.clone(), 1.0),
                // What is replaced is not read.
                Into::Place => (Array2::from_elem((m, n), T::rounded(f64::NAN)), 0.0),
            };
            let mut memory = layout.memory(&held);
            let product = library.multiply(
                of_a.within(in_a.view()),
                of_b.within(in_b.view()),
                layout.within(memory.view_mut()),
                how,
            );
            product.expect("products do not fail");
            for (at, found) in layout.within(memory.view()).indexed_iter() {
                let kept = kept * before[at].widened();
                let error = (found.widened() - (expected[at] + kept)).abs();
                let allowed = allowance::<T>(k + 1) * (magnitude[at] + kept.abs());
                assert!(
                    error <= allowed,
                    "{what}: {error:e} at {at:?}, {allowed:e} are allowed"
                );
            }
            layout.within(memory.view_mut()).fill(T::rounded(AROUND));
            assert!(
                memory.iter().all(|value| value.widened() == AROUND),
                "{what}: memory around the result changed"
            );
        }
    }
}

fn check_products<T: Real>(library: &dyn Dense<T>, what: &str) {
    let sizes = [
        [1, 1, 1],
        [5, 3, 4],
        [33, 17, 65],
        [1, 300, 7],
        [64, 1, 64],
        [40, 5000, 3],
        [300, 200, 260],
        [3, 60, 40_000],
    ];
    for sizes in sizes {
        check_product(library, sizes, what);
    }
}

#[test]
fn products_are_those_of_a_plain_loop_whatever_the_layout() {
    everywhere!(check_products);
}

/// A product with a matrix that is held, where there is a place to hold it.
fn check_held<T: Real>(library: &dyn Dense<T>, what: &str) {
    for [m, k, n] in [
        [1, 1, 1],
        [5, 3, 4],
        [33, 17, 65],
        [300, 200, 260],
        [40, 1, 3],
    ] {
        let (a, b) = (random::<T>(1, m, k), random::<T>(2, k, n));
        let (wide_a, wide_b) = (widened(a.view()), widened(b.view()));
        let expected = product(&wide_a, &wide_b);
        let magnitude = product(&wide_a.mapv(f64::abs), &wide_b.mapv(f64::abs));
        for layout in Layout::ALL {
            let (in_a, in_b) = (layout.memory(&a), layout.memory(&b));
            let (a, b) = (layout.within(in_a.view()), layout.within(in_b.view()));
            let (Some(left), Some(right)) = (library.hold(a).unwrap(), library.hold(b).unwrap())
            else {
                assert!(!what.contains("candle"), "{what}: there is room");
                continue;
            };
            let single = right.after_in_single(a).unwrap().mapv(f64::from);
            let found = [
                (left.before(b).unwrap().mapv(T::widened), T::ROUNDOFF),
                (right.after(a).unwrap().mapv(T::widened), T::ROUNDOFF),
                (single, f32::ROUNDOFF),
            ];
            for (found, roundoff) in found {
                assert_eq!(found.dim(), (m, n));
                for (at, found) in found.indexed_iter() {
                    let error = (found - expected[at]).abs();
                    let allowed = (k + 1) as f64 * roundoff * magnitude[at];
                    assert!(error <= allowed, "{what}: {layout:?}, {at:?}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn products_with_a_held_matrix_are_those_of_a_plain_loop() {
    everywhere!(check_held);
}

/// QR of a matrix.
fn check_qr<T: Real>(library: &dyn Dense<T>, layout: Layout, a: &Array2<T>, what: &str) {
    let what = format!("{what}, {:?}, {layout:?}", a.dim());
    let memory = layout.memory(a);
    let (q, r) = library.thin_qr(layout.within(memory.view())).unwrap();
    assert_eq!(q.dim(), a.dim(), "{what}");
    assert_eq!(r.dim(), (a.ncols(), a.ncols()), "{what}");
    for ((i, j), value) in r.indexed_iter() {
        assert!(i <= j || value.is_zero(), "{what}: {value:?} at {i}, {j}");
    }
    assert_orthonormal(&q, &what);
    let made = product(&widened(q.view()), &widened(r.view()));
    let rest = widened(a.view()) - made;
    // Every column on its own: what is small beside others, or nearly the same, has its direction too.
    for (index, (column, rest)) in a.columns().into_iter().zip(rest.columns()).enumerate() {
        let column = column.mapv(T::widened);
        let (error, length) = (rest.dot(&rest).sqrt(), column.dot(&column).sqrt());
        let allowed = allowance::<T>(a.nrows()) * length;
        assert!(
            error <= allowed,
            "{what}: column {index} is wrong by {error:e}, {allowed:e} are allowed"
        );
    }
}

fn check_qrs<T: Real>(library: &dyn Dense<T>, what: &str) {
    let mut layouts = Layout::ALL.into_iter().cycle();
    for (rows, columns) in [(1, 1), (7, 1), (5, 5), (64, 64), (300, 40), (2000, 48)] {
        let any = random::<T>(4, rows, columns);
        let rank = columns.div_ceil(3);
        let (left, right) = (random::<T>(5, rows, rank), random::<T>(6, rank, columns));
        let low = product(&widened(left.view()), &widened(right.view()));
        let mut graded = widened(any.view());
        for (index, mut column) in graded.columns_mut().into_iter().enumerate() {
            column *= 10f64.powi(20 - index as i32 % 40);
        }
        let near = 1e-3 * widened(any.view()) + widened(any.slice(s![.., ..1]));
        let cases = [
            ("any", any),
            ("zero", Array2::zeros((rows, columns))),
            ("of low rank", rounded(&low)),
            ("graded", rounded(&graded)),
            ("nearly one direction", rounded(&near)),
        ];
        for ((name, a), layout) in cases.iter().zip(&mut layouts) {
            check_qr(library, layout, a, &format!("{what}, {name}"));
        }
        // Every kind of matrix meets every layout.
        layouts.next();
    }
}

#[test]
fn qr_gives_orthonormal_columns_and_a_triangle_that_make_the_matrix() {
    everywhere!(check_qrs);
}

fn check_wide<T: Real>(library: &dyn Dense<T>, what: &str) {
    for (rows, columns) in [(2, 3), (0, 3)] {
        let error = library
            .thin_qr(random(7, rows, columns).view())
            .unwrap_err();
        assert!(
            matches!(error.reason(), Reason::Factorisation { .. }),
            "{what}: {error}"
        );
    }
}

#[test]
fn qr_refuses_a_matrix_that_is_wider_than_tall() {
    everywhere!(check_wide);
}

fn check_endless<T: Real>(library: &dyn Dense<T>, what: &str) {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut a = random::<T>(17, 9, 9);
        a[(6, 4)] = T::rounded(value);
        let errors = [
            library.thin_qr(a.view()).unwrap_err(),
            library.thin_svd(a.view()).unwrap_err(),
            library.eigh(a.view()).unwrap_err(),
            library.eigenvalues(a.view()).unwrap_err(),
        ];
        for error in errors {
            assert!(error.to_string().contains("(6, 4)"), "{what}: {error}");
        }
    }
}

#[test]
fn factorisations_refuse_what_is_not_finite() {
    everywhere!(check_endless);
}

/// The decomposition of a matrix, and its values.
fn check_svd<T: Real>(
    library: &dyn Dense<T>,
    layout: Layout,
    a: &Array2<T>,
    expected: &[f64],
    what: &str,
) {
    let what = format!("{what}, {:?}, {layout:?}", a.dim());
    let wide = widened(a.view());
    let memory = layout.memory(a);
    let found = library.thin_svd(layout.within(memory.view())).unwrap();
    let size = a.nrows().min(a.ncols());
    assert_eq!(found.u.dim(), (a.nrows(), size), "{what}");
    assert_eq!(found.v.dim(), (a.ncols(), size), "{what}");
    assert_orthonormal(&found.u, &what);
    assert_orthonormal(&found.v, &what);
    assert_falling(&found.s, &what);
    assert!(found.s.iter().all(|value| *value >= T::zero()), "{what}");
    assert_values(&found.s, expected, allowance::<T>(a.len()), &what);
    let mut scaled = widened(found.u.view());
    for (mut column, value) in scaled.columns_mut().into_iter().zip(&found.s) {
        column *= value.widened();
    }
    let error = norm(&(product(&scaled, &widened(found.v.t())) - &wide));
    let allowed = allowance::<T>(a.len()) * norm(&wide);
    assert!(
        error <= allowed,
        "{what}: wrong by {error:e}, {allowed:e} are allowed"
    );
}

/// Spectra with which decompositions have trouble.
fn spectra(size: usize) -> Vec<(&'static str, Vec<f64>)> {
    let from = |value: &dyn Fn(f64) -> f64| -> Vec<f64> {
        let last = (size.max(2) - 1) as f64;
        (0..size).map(|index| value(index as f64 / last)).collect()
    };
    vec![
        ("flat", from(&|_| 3.0)),
        ("steep", from(&|share| 10f64.powf(-12.0 * share))),
        ("slow", from(&|share| 5.0 - 4.0 * share)),
        (
            "clusters",
            from(&|share| 1.0 / (1.0 + (3.0 * share).floor()) + 1e-9 * (1.0 - share)),
        ),
        (
            "low rank",
            from(&|share| if share < 0.2 { 2.0 - share } else { 0.0 }),
        ),
        ("zero", from(&|_| 0.0)),
        (
            "one large",
            from(&|share| if share == 0.0 { 1e6 } else { 1.0 }),
        ),
        ("small", from(&|share| 1e-20 * (2.0 - share))),
        ("large", from(&|share| 1e25 * (2.0 - share))),
    ]
}

fn check_svds<T: Real>(library: &dyn Dense<T>, what: &str) {
    let shapes = [
        (1, 1),
        (1, 9),
        (9, 1),
        (30, 30),
        (150, 140),
        (200, 24),
        (24, 200),
        (70, 50),
        (2000, 48),
    ];
    let mut layouts = Layout::ALL.into_iter().cycle();
    for (rows, columns) in shapes {
        for ((name, values), layout) in spectra(rows.min(columns)).into_iter().zip(&mut layouts) {
            let a = rounded(&with_values(8, rows, columns, &values));
            check_svd::<T>(library, layout, &a, &values, &format!("{what}, {name}"));
        }
    }
}

#[test]
fn singular_values_are_those_the_matrix_was_made_with_and_vectors_make_it() {
    everywhere!(check_svds);
}

/// Eigenvalues and vectors of a symmetric matrix, of which half is hidden.
fn check_eigen<T: Real>(
    library: &dyn Dense<T>,
    layout: Layout,
    a: &Array2<T>,
    expected: &[f64],
    what: &str,
) {
    let mut lower = a.clone();
    for ((i, j), value) in lower.indexed_iter_mut() {
        if i < j {
            *value = T::rounded(f64::NAN);
        }
    }
    let wide = widened(a.view());
    let what = format!("{what}, {:?}, {layout:?}", a.dim());
    let memory = layout.memory(&lower);
    let (values, vectors) = library.eigh(layout.within(memory.view())).unwrap();
    let alone = library.eigenvalues(layout.within(memory.view())).unwrap();
    assert_eq!(vectors.dim(), a.dim(), "{what}");
    assert_orthonormal(&vectors, &what);
    for values in [&values, &alone] {
        assert_falling(values, &what);
        assert_values(values, expected, allowance::<T>(a.len()), &what);
    }
    let vectors = widened(vectors.view());
    let mut scaled = vectors.clone();
    for (mut column, value) in scaled.columns_mut().into_iter().zip(&values) {
        column *= value.widened();
    }
    let error = norm(&(product(&wide, &vectors) - scaled));
    let allowed = allowance::<T>(a.len()) * norm(&wide);
    assert!(
        error <= allowed,
        "{what}: wrong by {error:e}, {allowed:e} are allowed"
    );
}

fn check_eigens<T: Real>(library: &dyn Dense<T>, what: &str) {
    let mut layouts = Layout::ALL.into_iter().cycle();
    for size in [1, 2, 9, 64, 150] {
        for ((name, mut values), layout) in spectra(size).into_iter().zip(&mut layouts) {
            let a = rounded(&symmetric(9, &values));
            check_eigen::<T>(library, layout, &a, &values, &format!("{what}, {name}"));
            // Positive: singular values are the same.
            let Svd { s, .. } = library.thin_svd(a.view()).unwrap();
            let s: Vec<f64> = s.into_iter().map(T::widened).collect();
            let found = library.eigenvalues(a.view()).unwrap();
            assert_values(&found, &s, allowance::<T>(a.len()), what);

            for value in values.iter_mut().skip(1).step_by(2) {
                *value = -*value;
            }
            let a = rounded(&symmetric(10, &values));
            values.sort_by(|a, b| b.total_cmp(a));
            check_eigen::<T>(
                library,
                layout,
                &a,
                &values,
                &format!("{what}, {name}, both signs"),
            );
        }
    }
}

#[test]
fn eigenvalues_of_half_a_symmetric_matrix_fall_and_keep_their_signs() {
    everywhere!(check_eigens);
}

fn check_empty<T: Real>(library: &dyn Dense<T>, what: &str) {
    for sizes in [[0, 3, 4], [3, 0, 4], [3, 4, 0], [0, 0, 0], [1, 0, 1]] {
        check_product(library, sizes, what);
    }
    for (rows, columns) in [(0, 0), (3, 0)] {
        check_qr(library, Layout::Rows, &Array2::zeros((rows, columns)), what);
    }
    for (rows, columns) in [(0, 0), (3, 0), (0, 3)] {
        check_svd(
            library,
            Layout::Rows,
            &Array2::zeros((rows, columns)),
            &[],
            what,
        );
    }
    check_eigen(library, Layout::Rows, &Array2::zeros((0, 0)), &[], what);
}

#[test]
fn empty_matrices_have_empty_factors() {
    everywhere!(check_empty);
}

/// The bits of numbers.
fn bits<'a, T: Real>(values: impl IntoIterator<Item = &'a T>) -> Vec<u64> {
    let bits = |value: &T| value.widened().to_bits();
    values.into_iter().map(bits).collect()
}

/// The same bits in pools of one, two and three threads.
fn assert_same_bits(what: &str, compute: impl Fn() -> Vec<u64> + Sync) {
    let in_pool = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(&compute)
    };
    let one = in_pool(1);
    assert!(!one.is_empty());
    for threads in [2, 3] {
        assert!(in_pool(threads) == one, "{what}: {threads} threads");
    }
}

fn check_bits_of_products<T: Real>(library: &dyn Dense<T>, what: &str) {
    let sizes = [
        [512, 700, 512],
        [1500, 16, 900],
        [300, 5000, 48],
        [48, 5000, 300],
        [48, 2048, 1500],
    ];
    for [m, k, n] in sizes {
        let (a, b) = (random::<T>(11, m, k), random::<T>(12, k, n));
        let flipped = b.t().as_standard_layout().into_owned();
        for b in [b.view(), flipped.t()] {
            assert_same_bits(&format!("{what}: {m} × {k} × {n}"), || {
                let mut c = random(13, m, n);
                let product = library.multiply(a.view(), b, c.view_mut(), Into::Sum);
                product.expect("products do not fail");
                bits(&c)
            });
        }
    }
}

#[test]
fn products_have_the_same_bits_with_any_number_of_threads() {
    everywhere!(check_bits_of_products);
}

fn check_bits_of_factors<T: Real>(library: &dyn Dense<T>, what: &str) {
    let tall = random::<T>(14, 3000, 64);
    assert_same_bits(&format!("{what}: QR"), || {
        let (q, r) = library.thin_qr(tall.view()).unwrap();
        bits(q.iter().chain(&r))
    });
    for a in [
        tall.view(),
        tall.slice(s![..400, ..]),
        random(15, 200, 300).view(),
    ] {
        assert_same_bits(&format!("{what}: SVD"), || {
            let Svd { u, s, v } = library.thin_svd(a).unwrap();
            bits(u.iter().chain(&s).chain(&v))
        });
    }
    let square = random::<T>(16, 256, 256);
    assert_same_bits(&format!("{what}: eigh"), || {
        let (values, vectors) = library.eigh(square.view()).unwrap();
        let alone = library.eigenvalues(square.view()).unwrap();
        bits(values.iter().chain(&vectors).chain(&alone))
    });
}

#[test]
fn factors_have_the_same_bits_with_any_number_of_threads() {
    everywhere!(check_bits_of_factors);
}
