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
    let stride = job.columns;
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
        let width = (job.right.columns() - panel * LANES).min(LANES);
        for (i, acc) in acc.iter().enumerate() {
            let at = (row + i) * stride + job.first + panel * LANES;
            let value = &mut value[at..at + width];
            if let Ok(value) = <&mut [f64; LANES]>::try_from(&mut *value) {
                for j in 0..LANES {
                    value[j] = job.c.mul_add(acc[j], value[j]);
                }
            } else {
                for (value, acc) in value.iter_mut().zip(acc) {
                    *value = job.c.mul_add(*acc, *value);
                }
            }
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
};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Fused, Kernel, LowRank, add_low_rank};
    use crate::tensor::{self, Float};

    pub(super) const AVX2: Kernel = Kernel {
        name: "avx2",
        available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        add_low_rank: add_low_rank_avx2,
        widen: widen_avx2,
        narrow: narrow_avx2,
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
    };

    #[target_feature(enable = "avx2,fma")]
    fn add_low_rank_avx2(job: LowRank<'_>, value: &mut [f64]) {
        add_low_rank::<Fused, 2>(job, value);
    }

    #[target_feature(enable = "avx2,fma")]
    fn widen_avx2(float: Float, bytes: &[u8], values: &mut [f64]) {
        tensor::widen(float, bytes, values);
    }

    #[target_feature(enable = "avx2,fma")]
    fn narrow_avx2(float: Float, values: &[f64], bytes: &mut [u8]) {
        tensor::narrow(float, values, bytes);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn add_low_rank_avx512(job: LowRank<'_>, value: &mut [f64]) {
        add_low_rank::<Fused, 8>(job, value);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn widen_avx512(float: Float, bytes: &[u8], values: &mut [f64]) {
        tensor::widen(float, bytes, values);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn narrow_avx512(float: Float, values: &[f64], bytes: &mut [u8]) {
        tensor::narrow(float, values, bytes);
    }
}
