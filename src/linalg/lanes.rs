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
}

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
}

#[inline(always)]
fn survey(base: &[f64], value: &[f64], limit: f64) -> Survey {
    // Magnitudes as integers, NaN above everything: a difference is negative where a bound is reached,
    // and the sign bit of `care` collects them all. A base and a value that are both zero need care
    // because of −0.
    let magnitude = |value: f64| (value.to_bits() & !(1 << 63)) as i64;
    let (limit, infinity) = (magnitude(limit), magnitude(f64::INFINITY));
    let mut care = 0i64;
    for (base, value) in base.iter().zip(value) {
        let (base, value) = (magnitude(*base), magnitude(*value));
        care |= (limit - 1 - value) | (infinity - 1 - base) | ((base - 1) & (value - 1));
    }
    let (base_rows, base_rest) = base.as_chunks::<8>();
    let (value_rows, value_rest) = value.as_chunks::<8>();
    let (mut deltas, mut bases) = ([0.0; 8], [0.0; 8]);
    for (base, value) in base_rows.iter().zip(value_rows) {
        for lane in 0..8 {
            let delta = value[lane] - base[lane];
            deltas[lane] += delta * delta;
            bases[lane] += base[lane] * base[lane];
        }
    }
    for (lane, (base, value)) in base_rest.iter().zip(value_rest).enumerate() {
        deltas[lane] += (value - base) * (value - base);
        bases[lane] += base * base;
    }
    Survey {
        care: care < 0,
        delta: deltas.iter().sum(),
        base: bases.iter().sum(),
    }
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
};

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Intrinsics for the chains, because the compiler's own vectorisation reaches a third of their
    //! speed (`docs/design.md`); everything else is the generic body, compiled for more registers.

    use std::arch::x86_64::*;

    use super::{Kernel, LANES, LowRank, Survey, survey};
    use crate::tensor::{self, Float};

    pub(super) const AVX2: Kernel = Kernel {
        name: "avx2",
        available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        add_low_rank: add_low_rank_avx2,
        widen: widen_avx2,
        narrow: narrow_avx2,
        survey: survey_avx2,
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
    fn survey_avx2(base: &[f64], value: &[f64], limit: f64) -> Survey {
        survey(base, value, limit)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn widen_avx512(float: Float, bytes: &[u8], values: &mut [f64]) {
        tensor::widen(float, bytes, values);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn narrow_avx512(float: Float, values: &[f64], bytes: &mut [u8]) {
        tensor::narrow(float, values, bytes);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn survey_avx512(base: &[f64], value: &[f64], limit: f64) -> Survey {
        survey(base, value, limit)
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
