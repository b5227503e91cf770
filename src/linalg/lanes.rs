//! The kernels: one generic body, compiled for several instruction sets.
//!
//! Same bytes everywhere: every operation below is an IEEE 754 operation with one result, each output
//! element has its own chain, and nothing here may be reassociated or contracted by the compiler
//! (Rust never does). Where a machine lacks a fused multiply-add, products of factors that were f32
//! or narrower are exact in f64, so multiply-then-add gives the same bits; the last step and f64
//! factors take the correctly rounded `f64::mul_add` of the standard library.
//!
//! This is one of the three rooms that may say `unsafe`: a function compiled for an instruction set
//! may only be called on a machine that has it.

use super::panels::{LANES, Panels};
use crate::tensor::{self, Float};

/// One way to do the arithmetic.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// The name by which it can be forced.
    pub name: &'static str,
    /// Whether this machine can run it.
    pub available: fn() -> bool,
    add_low_rank: unsafe fn(LowRank<'_>, &mut [f64]),
    widen: unsafe fn(Float, &[u8], &mut [f64]),
    narrow: unsafe fn(Float, &[f64], &mut [u8]),
    survey: unsafe fn(&[f64], &[f64], f64) -> Survey,
    accumulate: unsafe fn(f64, &[f64], &mut [f64]),
    accumulate_bounded: unsafe fn(f64, &[f64], &ChainBound<'_>, &mut [f64], &mut [f64]),
    interval: unsafe fn(&[f64], &mut [f64], &mut [f64]) -> bool,
}

/// How far the chains of a row may be from those of the definition: chain `j` by
/// `row · columns[j] + relative · |chain[j]| + floor`.
#[derive(Clone, Copy, Debug)]
pub struct ChainBound<'a> {
    /// The share of the row.
    pub row: f64,
    /// The shares of the columns.
    pub columns: &'a [f64],
    /// By the magnitude of the chain itself.
    pub relative: f64,
    /// At any rate.
    pub floor: f64,
}

/// Four roundings of f64: twice what the steps below need at most.
const ROUNDINGS: f64 = 4.0 / (1u64 << 53) as f64;

/// More than all roundings of a bound itself make of it.
const INFLATION: f64 = 1.0 + 1.0 / (1u64 << 30) as f64;

/// What one pass over a row of base and value tells.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Survey {
    /// Whether some element must be looked at by itself: a base that is not finite, a value at or
    /// beyond the limit or NaN, a base of zero whose value is zero.
    pub care: bool,
    /// Σ (value − base)².
    pub delta: f64,
    /// Σ base².
    pub base: f64,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Every kernel, fastest first; the last one runs anywhere.
pub static KERNELS: &[Kernel] = &[
    #[cfg(target_arch = "x86_64")]
    x86::AVX512,
    #[cfg(target_arch = "x86_64")]
    x86::AVX2,
    PORTABLE,
];

/// What [`Kernel::add_low_rank`] adds: `c · left · right`.
#[derive(Clone, Copy)]
struct LowRank<'a> {
    left: &'a [f64],
    right: &'a Panels,
    first: usize,
    columns: usize,
    c: f64,
    exact_products: bool,
}

impl LowRank<'_> {
    /// The values of a row under a panel: sixteen, fewer at the end.
    #[inline(always)]
    fn lanes<'v>(&self, row: usize, panel: usize, value: &'v mut [f64]) -> &'v mut [f64] {
        let width = (self.right.columns() - panel * LANES).min(LANES);
        let at = row * self.columns + self.first + panel * LANES;
        &mut value[at..at + width]
    }
}

/// `value = fma(c, acc, value)`
#[inline(always)]
fn finish(c: f64, acc: &[f64; LANES], value: &mut [f64]) {
    match <&mut [f64; LANES]>::try_from(&mut *value) {
        Ok(value) => {
            for j in 0..LANES {
                value[j] = c.mul_add(acc[j], value[j]);
            }
        }
        Err(_) => {
            for (value, acc) in value.iter_mut().zip(acc) {
                *value = c.mul_add(*acc, *value);
            }
        }
    }
}

impl Kernel {
    /// The fastest kernel of this machine.
    pub fn best() -> &'static Kernel {
        KERNELS
            .iter()
            .find(|kernel| (kernel.available)())
            .expect("the portable kernel runs anywhere")
    }

    /// The kernel of a name, if this machine can run it.
    pub fn named(name: &str) -> Option<&'static Kernel> {
        KERNELS
            .iter()
            .find(|kernel| kernel.name == name && (kernel.available)())
    }

    /// For each row `i` and column `j`: `acc = +0; acc = fma(left[i,k], right[k,j], acc)` for ascending
    /// `k`, then `value[i,j] = fma(c, acc, value[i,j])`.
    ///
    /// `left` is rows × rank; `value` is rows × `stride`, of which the columns
    /// `first .. first + right.columns()` are changed. `exact_products` says that both factors hold values of
    /// f32 or narrower, so that products are exact in f64.
    #[expect(
        clippy::too_many_arguments,
        reason = "two matrices, their product's place and what is known of it"
    )]
    pub fn add_low_rank(
        &self,
        left: &[f64],
        right: &Panels,
        c: f64,
        exact_products: bool,
        value: &mut [f64],
        first: usize,
        stride: usize,
    ) {
        assert!((self.available)());
        assert!(first + right.columns() <= stride || value.is_empty());
        assert_eq!(left.len() * stride, value.len() * right.rank());
        let low_rank = LowRank {
            left,
            right,
            first,
            columns: stride,
            c,
            exact_products,
        };
        // SAFETY: `available` was asked.
        unsafe { (self.add_low_rank)(low_rank, value) }
    }

    /// Widens stored elements exactly to f64, as [`tensor::widen`].
    pub fn widen(&self, float: Float, bytes: &[u8], values: &mut [f64]) {
        assert!((self.available)());
        // SAFETY: `available` was asked.
        unsafe { (self.widen)(float, bytes, values) }
    }

    /// Rounds f64 to stored elements, as [`tensor::narrow`].
    pub fn narrow(&self, float: Float, values: &[f64], bytes: &mut [u8]) {
        assert!((self.available)());
        // SAFETY: `available` was asked.
        unsafe { (self.narrow)(float, values, bytes) }
    }

    /// Looks over a row; sums run in eight interleaved partial sums, an order that vectorises.
    pub fn survey(&self, base: &[f64], value: &[f64], limit: f64) -> Survey {
        assert!((self.available)());
        assert_eq!(base.len(), value.len());
        // SAFETY: `available` was asked.
        unsafe { (self.survey)(base, value, limit) }
    }

    /// `value[i] = fma(c, chain[i], value[i])`.
    pub fn accumulate(&self, c: f64, chain: &[f64], value: &mut [f64]) {
        assert!((self.available)());
        assert_eq!(chain.len(), value.len());
        // SAFETY: `available` was asked.
        unsafe { (self.accumulate)(c, chain, value) }
    }
}

impl Kernel {
    /// `value[i] += c · chain[i]` with two roundings, and `bound[i]` grows by how far that may be from
    /// `fma(c, chain, value)` with the definition's chain and a value that was within the bound before.
    ///
    /// Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, §2.2: each operation is off by at most the
    /// unit roundoff times the magnitude of its result.
    pub fn accumulate_bounded(
        &self,
        c: f64,
        chain: &[f64],
        of_chain: &ChainBound<'_>,
        value: &mut [f64],
        bound: &mut [f64],
    ) {
        assert!((self.available)());
        assert_eq!(chain.len(), value.len());
        assert_eq!(chain.len(), bound.len());
        assert_eq!(chain.len(), of_chain.columns.len());
        // SAFETY: `available` was asked.
        unsafe { (self.accumulate_bounded)(c, chain, of_chain, value, bound) }
    }

    /// The ends of intervals that hold the definition's values and are never empty: `low = value − bound`, and `bound`
    /// becomes `value + bound`. Whether all bounds are finite.
    pub fn interval(&self, value: &[f64], bound: &mut [f64], low: &mut [f64]) -> bool {
        assert!((self.available)());
        assert_eq!(value.len(), bound.len());
        assert_eq!(value.len(), low.len());
        // SAFETY: `available` was asked.
        unsafe { (self.interval)(value, bound, low) }
    }
}

/// A magnitude as an integer, NaN above everything.
fn magnitude(value: f64) -> i64 {
    (value.to_bits() & !(1 << 63)) as i64
}

/// A pass over a row: eight partial sums of each kind, and the flags of all elements in one sign bit.
struct Pass {
    limit: i64,
    care: i64,
    deltas: [f64; 8],
    bases: [f64; 8],
}

impl Pass {
    fn new(limit: f64) -> Self {
        Pass {
            limit: magnitude(limit),
            care: 0,
            deltas: [0.0; 8],
            bases: [0.0; 8],
        }
    }

    /// Adds elements, the first of them to the first lane.
    #[inline(always)]
    fn add(&mut self, base: &[f64], value: &[f64]) {
        let infinity = magnitude(f64::INFINITY);
        for (base, value) in base.chunks(8).zip(value.chunks(8)) {
            for (lane, (base, value)) in base.iter().zip(value).enumerate() {
                let delta = value - base;
                self.deltas[lane] += delta * delta;
                self.bases[lane] += base * base;
                // A difference is negative where a bound is reached. A base and a value that are both
                // zero need care because of −0.
                let (base, value) = (magnitude(*base), magnitude(*value));
                self.care |=
                    (self.limit - 1 - value) | (infinity - 1 - base) | ((base - 1) & (value - 1));
            }
        }
    }

    fn survey(self) -> Survey {
        let (delta, base) = (self.deltas.iter().sum(), self.bases.iter().sum());
        Survey {
            care: self.care < 0,
            delta,
            base,
        }
    }
}

fn survey(base: &[f64], value: &[f64], limit: f64) -> Survey {
    let mut pass = Pass::new(limit);
    pass.add(base, value);
    pass.survey()
}

#[inline(always)]
fn accumulate(c: f64, chain: &[f64], value: &mut [f64]) {
    for (value, chain) in value.iter_mut().zip(chain) {
        *value = c.mul_add(*chain, *value);
    }
}

#[inline(always)]
fn accumulate_bounded(
    c: f64,
    chain: &[f64],
    of_chain: &ChainBound<'_>,
    value: &mut [f64],
    bound: &mut [f64],
) {
    let (row, floor) = (c.abs() * of_chain.row, c.abs() * of_chain.floor);
    let relative = of_chain.relative + ROUNDINGS;
    let elements = value.iter_mut().zip(bound);
    for ((value, bound), (chain, column)) in elements.zip(chain.iter().zip(of_chain.columns)) {
        let term = c * chain;
        *value += term;
        *bound += row * column + floor + relative * term.abs() + ROUNDINGS * value.abs();
    }
}

#[inline(always)]
fn interval(value: &[f64], bound: &mut [f64], low: &mut [f64]) -> bool {
    let mut finite = true;
    for ((value, bound), low) in value.iter().zip(bound).zip(low) {
        // Never nothing: a value of zero lies between a negative and a positive end, whose bits differ.
        let error = *bound * INFLATION + f64::MIN_POSITIVE;
        finite &= error < f64::INFINITY;
        *low = value - error;
        *bound = value + error;
    }
    finite
}

/// One link of a chain: `a · b + acc`, rounded once.
trait Link {
    fn link(a: f64, b: f64, acc: f64) -> f64;
}

/// A true fused multiply-add.
struct Fused;

impl Link for Fused {
    #[inline(always)]
    fn link(a: f64, b: f64, acc: f64) -> f64 {
        a.mul_add(b, acc)
    }
}

/// Multiply, then add; equal to [`Fused`] where the product is exact.
struct Separate;

impl Link for Separate {
    #[inline(always)]
    fn link(a: f64, b: f64, acc: f64) -> f64 {
        a * b + acc
    }
}

#[inline(always)]
fn add_low_rank<L: Link, const ROWS: usize>(job: LowRank<'_>, value: &mut [f64]) {
    let (rank, stride) = (job.right.rank(), job.columns);
    if stride == 0 || value.is_empty() {
        return;
    }
    let rows = value.len() / stride;
    let mut row = 0;
    while row + ROWS <= rows {
        tile::<L, ROWS>(job, rank, row, value);
        row += ROWS;
    }
    while row < rows {
        tile::<L, 1>(job, rank, row, value);
        row += 1;
    }
}

#[inline(always)]
fn tile<L: Link, const ROWS: usize>(job: LowRank<'_>, rank: usize, row: usize, value: &mut [f64]) {
    let left: [&[f64]; ROWS] =
        std::array::from_fn(|i| &job.left[(row + i) * rank..(row + i + 1) * rank]);
    for panel in 0..job.right.columns().div_ceil(LANES) {
        let right = &job.right.values()[panel * rank * LANES..(panel + 1) * rank * LANES];
        let mut acc = [[0.0f64; LANES]; ROWS];
        for (k, right) in right.chunks_exact(LANES).enumerate() {
            for i in 0..ROWS {
                let b = left[i][k];
                for j in 0..LANES {
                    acc[i][j] = L::link(b, right[j], acc[i][j]);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            finish(job.c, acc, job.lanes(row + i, panel, value));
        }
    }
}

const PORTABLE: Kernel = Kernel {
    name: "portable",
    available: || true,
    add_low_rank: |job, value| match job.exact_products {
        true => add_low_rank::<Separate, 2>(job, value),
        false => add_low_rank::<Fused, 2>(job, value),
    },
    widen: tensor::widen,
    narrow: tensor::narrow,
    survey,
    accumulate,
    accumulate_bounded,
    interval,
};

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Intrinsics for the chains, because the compiler's own vectorisation reaches a third of their
    //! speed (`docs/design.md`); everything else is the generic body, compiled for more registers.

    use std::arch::x86_64::*;

    use super::{ChainBound, Kernel, LANES, LowRank, Pass, Survey};
    use crate::tensor::{self, Float};

    pub(super) const AVX2: Kernel = Kernel {
        name: "avx2",
        available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        add_low_rank: add_low_rank_avx2,
        widen: widen_avx2,
        narrow: narrow_avx2,
        survey: survey_avx2,
        accumulate: accumulate_avx2,
        accumulate_bounded: accumulate_bounded_avx2,
        interval: interval_avx2,
    };

    pub(super) const AVX512: Kernel = Kernel {
        name: "avx512",
        available: || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("fma")
        },
        add_low_rank: add_low_rank_avx512,
        widen: widen_avx512,
        narrow: narrow_avx512,
        survey: survey_avx512,
        accumulate: accumulate_avx512,
        accumulate_bounded: accumulate_bounded_avx512,
        interval: interval_avx512,
    };

    #[target_feature(enable = "avx2,fma")]
    fn widen_avx2(float: Float, bytes: &[u8], values: &mut [f64]) {
        tensor::widen(float, bytes, values);
    }

    #[target_feature(enable = "avx2,fma")]
    fn narrow_avx2(float: Float, values: &[f64], bytes: &mut [u8]) {
        tensor::narrow(float, values, bytes);
    }

    #[target_feature(enable = "avx2,fma")]
    fn accumulate_avx2(c: f64, chain: &[f64], value: &mut [f64]) {
        super::accumulate(c, chain, value);
    }

    #[target_feature(enable = "avx2,fma")]
    fn accumulate_bounded_avx2(
        c: f64,
        chain: &[f64],
        of_chain: &ChainBound<'_>,
        value: &mut [f64],
        bound: &mut [f64],
    ) {
        super::accumulate_bounded(c, chain, of_chain, value, bound);
    }

    #[target_feature(enable = "avx2,fma")]
    fn interval_avx2(value: &[f64], bound: &mut [f64], low: &mut [f64]) -> bool {
        super::interval(value, bound, low)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn accumulate_avx512(c: f64, chain: &[f64], value: &mut [f64]) {
        super::accumulate(c, chain, value);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn accumulate_bounded_avx512(
        c: f64,
        chain: &[f64],
        of_chain: &ChainBound<'_>,
        value: &mut [f64],
        bound: &mut [f64],
    ) {
        super::accumulate_bounded(c, chain, of_chain, value, bound);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn interval_avx512(value: &[f64], bound: &mut [f64], low: &mut [f64]) -> bool {
        super::interval(value, bound, low)
    }

    #[target_feature(enable = "avx2,fma")]
    fn survey_avx2(base: &[f64], value: &[f64], limit: f64) -> Survey {
        let mut pass = Pass::new(limit);
        let (bases, base_rest) = base.as_chunks::<4>();
        let (values, value_rest) = value.as_chunks::<4>();
        let pairs = bases.len() / 2;
        let mask = _mm256_set1_epi64x(i64::MAX);
        let last = _mm256_set1_epi64x(pass.limit - 1);
        let finite = _mm256_set1_epi64x(super::magnitude(f64::INFINITY) - 1);
        let one = _mm256_set1_epi64x(1);
        let mut care = _mm256_setzero_si256();
        let mut sums = [[_mm256_setzero_pd(); 2]; 2];
        for index in 0..2 * pairs {
            let [deltas, squares] = &mut sums[index % 2];
            // SAFETY: both loads lie inside the four values.
            let (base, value) = unsafe {
                (
                    _mm256_loadu_pd(bases[index].as_ptr()),
                    _mm256_loadu_pd(values[index].as_ptr()),
                )
            };
            let delta = _mm256_sub_pd(value, base);
            *deltas = _mm256_add_pd(*deltas, _mm256_mul_pd(delta, delta));
            *squares = _mm256_add_pd(*squares, _mm256_mul_pd(base, base));
            let base = _mm256_and_si256(_mm256_castpd_si256(base), mask);
            let value = _mm256_and_si256(_mm256_castpd_si256(value), mask);
            let bounds = _mm256_or_si256(
                _mm256_sub_epi64(last, value),
                _mm256_sub_epi64(finite, base),
            );
            let zeros = _mm256_and_si256(_mm256_sub_epi64(base, one), _mm256_sub_epi64(value, one));
            care = _mm256_or_si256(care, _mm256_or_si256(bounds, zeros));
        }
        // The sign bits of the lanes are those of `care`.
        pass.care = -i64::from(_mm256_movemask_pd(_mm256_castsi256_pd(care)) != 0);
        for (half, [deltas, squares]) in sums.into_iter().enumerate() {
            // SAFETY: the stores lie inside four of the eight lanes.
            unsafe {
                _mm256_storeu_pd(pass.deltas[4 * half..4 * half + 4].as_mut_ptr(), deltas);
                _mm256_storeu_pd(pass.bases[4 * half..4 * half + 4].as_mut_ptr(), squares);
            }
        }
        let odd = bases.len() % 2 * 4;
        let rest = base.len() - base_rest.len() - odd;
        debug_assert_eq!(base_rest.len(), value_rest.len());
        pass.add(&base[rest..], &value[rest..]);
        pass.survey()
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn widen_avx512(float: Float, bytes: &[u8], values: &mut [f64]) {
        tensor::widen(float, bytes, values);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn narrow_avx512(float: Float, values: &[f64], bytes: &mut [u8]) {
        if float != Float::BF16 {
            return tensor::narrow(float, values, bytes);
        }
        let (rows, rest) = values.as_chunks::<8>();
        let (full, tail) = bytes.split_at_mut(rows.len() * 16);
        let one = _mm256_set1_epi32(1);
        for (value, bytes) in rows.iter().zip(full.as_chunks_mut::<16>().0) {
            // SAFETY: the load lies inside the eight values.
            let value = unsafe { _mm512_loadu_pd(value.as_ptr()) };
            // To f32 by rounding to odd, as `tensor::narrow` does: where the nearest is inexact and even,
            // its neighbour on the other side of the value is odd.
            let nearest = _mm512_cvtpd_ps(value);
            let back = _mm512_cvtps_pd(nearest);
            let bits = _mm256_castps_si256(nearest);
            let inexact = _mm512_cmp_pd_mask::<_CMP_NEQ_OQ>(back, value);
            let even = _mm256_testn_epi32_mask(bits, one);
            let beyond =
                _mm512_cmp_pd_mask::<_CMP_GT_OQ>(_mm512_abs_pd(back), _mm512_abs_pd(value));
            let bits = _mm256_mask_add_epi32(bits, inexact & even & !beyond, bits, one);
            let bits = _mm256_mask_sub_epi32(bits, inexact & even & beyond, bits, one);
            // To bf16, to nearest even; NaN becomes quiet.
            let upper = _mm256_srli_epi32::<16>(bits);
            let tie = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(upper, one));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, tie));
            let nan = _mm256_cmp_ps_mask::<_CMP_UNORD_Q>(nearest, nearest);
            let rounded = _mm256_mask_or_epi32(rounded, nan, upper, _mm256_set1_epi32(0x40));
            // SAFETY: the store fills the sixteen bytes.
            unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm256_cvtepi32_epi16(rounded)) };
        }
        tensor::narrow(float, rest, tail);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn survey_avx512(base: &[f64], value: &[f64], limit: f64) -> Survey {
        let mut pass = Pass::new(limit);
        let (bases, base_rest) = base.as_chunks::<8>();
        let (values, value_rest) = value.as_chunks::<8>();
        let mask = _mm512_set1_epi64(i64::MAX);
        let last = _mm512_set1_epi64(pass.limit - 1);
        let finite = _mm512_set1_epi64(super::magnitude(f64::INFINITY) - 1);
        let one = _mm512_set1_epi64(1);
        let mut care = _mm512_setzero_si512();
        let (mut deltas, mut squares) = (_mm512_setzero_pd(), _mm512_setzero_pd());
        for (base, value) in bases.iter().zip(values) {
            // SAFETY: both loads lie inside the eight values.
            let (base, value) = unsafe {
                (
                    _mm512_loadu_pd(base.as_ptr()),
                    _mm512_loadu_pd(value.as_ptr()),
                )
            };
            let delta = _mm512_sub_pd(value, base);
            deltas = _mm512_add_pd(deltas, _mm512_mul_pd(delta, delta));
            squares = _mm512_add_pd(squares, _mm512_mul_pd(base, base));
            let base = _mm512_and_si512(_mm512_castpd_si512(base), mask);
            let value = _mm512_and_si512(_mm512_castpd_si512(value), mask);
            let bounds = _mm512_or_si512(
                _mm512_sub_epi64(last, value),
                _mm512_sub_epi64(finite, base),
            );
            let zeros = _mm512_and_si512(_mm512_sub_epi64(base, one), _mm512_sub_epi64(value, one));
            care = _mm512_or_si512(care, _mm512_or_si512(bounds, zeros));
        }
        pass.care = _mm512_reduce_or_epi64(care);
        // SAFETY: the stores lie inside the eight lanes.
        unsafe {
            _mm512_storeu_pd(pass.deltas.as_mut_ptr(), deltas);
            _mm512_storeu_pd(pass.bases.as_mut_ptr(), squares);
        }
        pass.add(base_rest, value_rest);
        pass.survey()
    }

    /// Walks rows in tiles of 8, 4, 2 and 1, and panels within them.
    macro_rules! walk {
        ($job:expr, $value:expr, $tile:ident) => {{
            let (job, value) = ($job, $value);
            if job.columns == 0 {
                return;
            }
            let rows = value.len() / job.columns;
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    8.. => $tile::<8>(&job, row, value),
                    4.. => $tile::<4>(&job, row, value),
                    2.. => $tile::<2>(&job, row, value),
                    _ => $tile::<1>(&job, row, value),
                };
            }
        }};
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn add_low_rank_avx512(job: LowRank<'_>, value: &mut [f64]) {
        walk!(job, value, tile_avx512);
    }

    #[target_feature(enable = "avx2,fma")]
    fn add_low_rank_avx2(job: LowRank<'_>, value: &mut [f64]) {
        walk!(job, value, tile_avx2);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn tile_avx512<const ROWS: usize>(job: &LowRank<'_>, row: usize, value: &mut [f64]) -> usize {
        let rank = job.right.rank();
        let left = &job.left[row * rank..(row + ROWS) * rank];
        let c = _mm512_set1_pd(job.c);
        for panel in 0..job.right.columns().div_ceil(LANES) {
            let right = &job.right.values()[panel * rank * LANES..(panel + 1) * rank * LANES];
            let mut acc = [[_mm512_setzero_pd(); 2]; ROWS];
            for k in 0..rank {
                let lanes: &[f64; LANES] = right[k * LANES..(k + 1) * LANES]
                    .try_into()
                    .expect("one row");
                // SAFETY: both loads lie inside the sixteen values.
                let (low, high) = unsafe {
                    (
                        _mm512_loadu_pd(lanes.as_ptr()),
                        _mm512_loadu_pd(lanes.as_ptr().add(8)),
                    )
                };
                for (i, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: i < ROWS and k < rank, and `left` holds ROWS · rank values.
                    let b = _mm512_set1_pd(unsafe { *left.get_unchecked(i * rank + k) });
                    acc[0] = _mm512_fmadd_pd(b, low, acc[0]);
                    acc[1] = _mm512_fmadd_pd(b, high, acc[1]);
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                let value = job.lanes(row + i, panel, value);
                if let Ok(value) = <&mut [f64; LANES]>::try_from(&mut *value) {
                    let value = value.as_mut_ptr();
                    // SAFETY: loads and stores lie inside the sixteen values.
                    unsafe {
                        let high = value.add(8);
                        _mm512_storeu_pd(value, _mm512_fmadd_pd(c, acc[0], _mm512_loadu_pd(value)));
                        _mm512_storeu_pd(high, _mm512_fmadd_pd(c, acc[1], _mm512_loadu_pd(high)));
                    }
                } else {
                    let mut lanes = [0.0; LANES];
                    // SAFETY: the stores lie inside the sixteen values.
                    unsafe {
                        _mm512_storeu_pd(lanes.as_mut_ptr(), acc[0]);
                        _mm512_storeu_pd(lanes.as_mut_ptr().add(8), acc[1]);
                    }
                    super::finish(job.c, &lanes, value);
                }
            }
        }
        ROWS
    }

    #[target_feature(enable = "avx2,fma")]
    fn tile_avx2<const ROWS: usize>(job: &LowRank<'_>, row: usize, value: &mut [f64]) -> usize {
        // Sixteen registers hold four rows of half a panel; eight rows take two turns.
        if ROWS > 4 {
            tile_avx2::<4>(job, row, value);
            tile_avx2::<4>(job, row + 4, value);
            return ROWS;
        }
        let rank = job.right.rank();
        let left = &job.left[row * rank..(row + ROWS) * rank];
        for panel in 0..job.right.columns().div_ceil(LANES) {
            let right = &job.right.values()[panel * rank * LANES..(panel + 1) * rank * LANES];
            let mut lanes = [[0.0; LANES]; ROWS];
            for half in [0, 8] {
                let mut acc = [[_mm256_setzero_pd(); 2]; ROWS];
                for k in 0..rank {
                    let at = k * LANES + half;
                    let row: &[f64; 8] = right[at..at + 8].try_into().expect("half a row");
                    // SAFETY: both loads lie inside the eight values.
                    let (low, high) = unsafe {
                        (
                            _mm256_loadu_pd(row.as_ptr()),
                            _mm256_loadu_pd(row.as_ptr().add(4)),
                        )
                    };
                    for (i, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: i < ROWS and k < rank, and `left` holds ROWS · rank values.
                        let b = _mm256_set1_pd(unsafe { *left.get_unchecked(i * rank + k) });
                        acc[0] = _mm256_fmadd_pd(b, low, acc[0]);
                        acc[1] = _mm256_fmadd_pd(b, high, acc[1]);
                    }
                }
                for (lanes, acc) in lanes.iter_mut().zip(&acc) {
                    let half: &mut [f64; 8] =
                        (&mut lanes[half..half + 8]).try_into().expect("half a row");
                    // SAFETY: both stores lie inside the eight values.
                    unsafe {
                        _mm256_storeu_pd(half.as_mut_ptr(), acc[0]);
                        _mm256_storeu_pd(half.as_mut_ptr().add(4), acc[1]);
                    }
                }
            }
            for (i, lanes) in lanes.iter().enumerate() {
                super::finish(job.c, lanes, job.lanes(row + i, panel, value));
            }
        }
        ROWS
    }
}
