//! Random numbers that are the same for a seed in every version and on every machine.

use std::f64::consts::TAU;

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

/// What a state is from the next: a counter, so that any number of the sequence can be had at once.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl Random {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// As if so many numbers had been drawn.
    #[must_use]
    pub fn after(self, count: u64) -> Self {
        Random(self.0.wrapping_add(STEP.wrapping_mul(count)))
    }

    /// Sixty-four random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Two independent numbers of the standard normal distribution (Box and Muller, 1958).
    pub fn normal_pair(&mut self) -> [f64; 2] {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        let (sine, cosine) = (TAU * self.uniform()).sin_cos();
        [radius * cosine, radius * sine]
    }

    /// As many numbers of the standard normal distribution.
    pub fn normals(&mut self, count: usize) -> Vec<f64> {
        let pairs = (0..count.div_ceil(2)).flat_map(|_| self.normal_pair());
        pairs.take(count).collect()
    }
}

/// A seed of its own for each name (FNV-1a).
pub fn seed_of(seed: u64, name: &str) -> u64 {
    name.bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}
