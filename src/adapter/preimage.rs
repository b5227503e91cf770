//! Which values of a base can have become a merged value.
//!
//! Where every step of a merge is `v = fma(c, chain, v)`, the merged value does not fall when the base's rises: each
//! fused multiply-add is monotone in its addend, and so is rounding. The values that become one merged value are
//! therefore neighbours in the order of the base's type, and found from `merged − Σ c · chain` by looking around.
//! Both who writes down which of them it was and who reads it ask the same question here, so whatever the
//! arithmetic does at its edges, they get the same answer.

use std::ops::Range;

use crate::linalg::Kernel;
use crate::tensor::{Float, narrow, widen};

/// What is added to some elements of a block: a multiplier times a chain each.
#[derive(Clone, Debug)]
pub struct Term {
    /// The elements, counted from the first of the block.
    pub elements: Range<usize>,
    /// The multiplier.
    pub c: f64,
    /// The chains of these elements.
    pub chains: Vec<f64>,
}

/// How a block was merged.
#[derive(Clone, Copy)]
pub struct Merge<'a> {
    /// The type of the base.
    pub from: Float,
    /// The type of the merged values.
    pub to: Float,
    /// What was added, in order.
    pub terms: &'a [Term],
    /// The arithmetic.
    pub kernel: &'a Kernel,
}

/// Neighbouring values of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidates {
    /// The place of the lowest in the order of the type.
    pub first: u64,
    /// How many there are.
    pub count: u64,
}

impl Candidates {
    /// Whether a place is that of one of them.
    pub fn hold(&self, place: u64) -> bool {
        place >= self.first && place - self.first < self.count
    }
}

/// Memory of one thread, and what was found for a block.
#[derive(Default)]
pub struct Scratch {
    values: Vec<f64>,
    probe: Vec<u8>,
    guess: Vec<u8>,
    merged: Vec<u8>,
    marks: Vec<u8>,
}

impl Scratch {
    /// For each element the only candidate, as stored bits; where there is more or less than one, anything.
    pub fn guess(&self) -> &[u8] {
        &self.guess
    }

    /// Lists the elements that have not one candidate, or whose base is not it where that is given.
    pub fn list_open(&mut self, float: Float, base: Option<&[u8]>, open: &mut Vec<usize>) {
        let mut settled = HIT;
        if let Some(base) = base {
            mark_same(float, base, &self.guess, BASE, &mut self.marks);
            settled |= BASE;
        }
        open.clear();
        // Few are open, so eight at a time are looked at.
        let all = u64::from_ne_bytes([settled; 8]);
        for (eight, marks) in self.marks.chunks(8).enumerate() {
            let word = <[u8; 8]>::try_from(marks).map(u64::from_ne_bytes);
            if word.is_ok_and(|word| word == all) {
                continue;
            }
            for (at, mark) in marks.iter().enumerate() {
                if *mark != settled {
                    open.push(8 * eight + at);
                }
            }
        }
    }
}

/// The stored bits of an element.
#[inline]
pub fn bits_at(float: Float, bytes: &[u8], index: usize) -> u64 {
    let size = float.size();
    let mut bits = [0; 8];
    bits[..size].copy_from_slice(&bytes[index * size..(index + 1) * size]);
    u64::from_le_bytes(bits)
}

/// Stores the bits of an element.
pub fn set_bits(float: Float, bytes: &mut [u8], index: usize, bits: u64) {
    let size = float.size();
    bytes[index * size..(index + 1) * size].copy_from_slice(&bits.to_le_bytes()[..size]);
}

#[inline]
fn sign_bit(float: Float) -> u64 {
    1 << (8 * float.size() - 1)
}

/// The place of stored bits in the order of a type: NaN, −∞ … −0, +0 … +∞, NaN.
#[inline]
pub fn place(float: Float, bits: u64) -> u64 {
    let sign = sign_bit(float);
    let all = sign | (sign - 1);
    match bits & sign {
        0 => bits | sign,
        _ => !bits & all,
    }
}

/// The stored bits at a place.
#[inline]
pub fn bits_of_place(float: Float, place: u64) -> u64 {
    let sign = sign_bit(float);
    let all = sign | (sign - 1);
    match place & sign {
        0 => !place & all,
        _ => place & !sign,
    }
}

/// The place of +0.
pub fn zero(float: Float) -> u64 {
    place(float, 0)
}

/// The value of stored bits.
#[inline]
pub fn value_of(float: Float, bits: u64) -> f64 {
    let mut value = [0.0];
    widen(float, &bits.to_le_bytes()[..float.size()], &mut value);
    value[0]
}

/// The stored bits of a value, rounded once.
#[inline]
pub fn rounded(float: Float, value: f64) -> u64 {
    let mut bytes = [0; 8];
    narrow(float, &[value], &mut bytes[..float.size()]);
    u64::from_le_bytes(bytes)
}

/// The places of the lowest and the highest finite value.
fn finite(float: Float) -> (u64, u64) {
    let infinity = place(float, rounded(float, f64::INFINITY));
    let lowest = place(float, rounded(float, f64::NEG_INFINITY));
    (lowest + 1, infinity - 1)
}

impl Merge<'_> {
    /// Guesses all elements of a block of merged values at once, and tries the guess and its neighbours.
    pub fn settle(&self, merged: &[u8], scratch: &mut Scratch) {
        let Scratch {
            values,
            probe,
            guess,
            merged: again,
            marks,
        } = scratch;
        let count = merged.len() / self.to.size();
        let size = self.from.size();
        values.resize(count, 0.0);
        guess.resize(count * size, 0);
        probe.resize(count * size, 0);
        again.resize(merged.len(), 0);
        marks.clear();
        marks.resize(count, 0);
        self.kernel.widen(self.to, merged, values);
        for term in self.terms.iter().rev() {
            let values = &mut values[term.elements.clone()];
            self.kernel.accumulate(-term.c, &term.chains, values);
        }
        self.kernel.narrow(self.from, values, guess);
        mark_odd(self.from, guess, marks);
        for (bit, step) in [(HIT, 0), (UP, 1), (DOWN, -1)] {
            shifted(self.from, guess, step, probe);
            self.kernel.widen(self.from, probe, values);
            for term in self.terms {
                let values = &mut values[term.elements.clone()];
                self.kernel.accumulate(term.c, &term.chains, values);
            }
            self.kernel.narrow(self.to, values, again);
            mark_same(self.to, merged, again, bit, marks);
        }
    }

    /// The candidates of an element that is open, by the scratch of its block.
    pub fn candidates(&self, merged: &[u8], scratch: &Scratch, index: usize) -> Candidates {
        let guess = place(self.from, bits_at(self.from, &scratch.guess, index));
        let merged = bits_at(self.to, merged, index);
        let mark = scratch.marks[index] & !BASE;
        match mark {
            HIT => Candidates {
                first: guess,
                count: 1,
            },
            _ if mark & (HIT | ODD) == HIT => self.around(index, merged, guess, mark),
            _ => self.searched(index, merged, guess),
        }
    }

    /// Goes on from a guess that is a candidate, in the directions in which its neighbour is one.
    fn around(&self, index: usize, merged: u64, guess: u64, mark: u8) -> Candidates {
        let (bounds, wanted) = (finite(self.from), place(self.to, merged));
        let becomes = |place: u64| self.merged(index, bits_of_place(self.from, place));
        // Below zero more magnitude is less.
        let (above, below) = match guess > zero(self.from) {
            true => (UP, DOWN),
            false => (DOWN, UP),
        };
        let (mut first, mut last) = (guess, guess);
        if mark & below != 0 {
            first -= 1;
            if first > bounds.0 && becomes(first - 1) == wanted {
                first = first_where(first - 1, bounds, |place| becomes(place) >= wanted);
            }
        }
        if mark & above != 0 {
            last += 1;
            if last < bounds.1 && becomes(last + 1) == wanted {
                last = first_where(last + 2, bounds, |place| becomes(place) > wanted) - 1;
            }
        }
        Candidates {
            first,
            count: last - first + 1,
        }
    }

    /// What a base of these bits becomes: the place of it in the order of the merged type.
    #[inline]
    fn merged(&self, index: usize, bits: u64) -> u64 {
        let base = value_of(self.from, bits);
        let (mut value, mut touched) = (base, false);
        for term in self.terms {
            if term.elements.contains(&index) {
                let chain = term.chains[index - term.elements.start];
                value = term.c.mul_add(chain, value);
                touched |= term.c != 0.0 && chain != 0.0;
            }
        }
        // A change of zero leaves even the sign of zero alone.
        let kept = value == 0.0 && base == 0.0 && !touched;
        place(self.to, rounded(self.to, if kept { base } else { value }))
    }

    /// Looks for the ends of the candidates of one element.
    fn searched(&self, index: usize, merged: u64, guess: u64) -> Candidates {
        if !value_of(self.to, merged).is_finite() {
            // It was so in the base.
            let first = place(self.from, rounded(self.from, value_of(self.to, merged)));
            return Candidates { first, count: 1 };
        }
        let bounds = finite(self.from);
        let wanted = place(self.to, merged);
        let (low, high) = self.ends(index, merged, guess, bounds);
        let at_least = |place: u64| self.merged(index, bits_of_place(self.from, place)) >= wanted;
        let above = |place: u64| self.merged(index, bits_of_place(self.from, place)) > wanted;
        let first = first_where(low, bounds, at_least);
        let end = first_where(high, bounds, above);
        Candidates {
            first,
            count: end.saturating_sub(first),
        }
    }

    /// Guesses of the ends: what rounds to the merged value lies between the middles to its neighbours.
    fn ends(&self, index: usize, merged: u64, guess: u64, bounds: (u64, u64)) -> (u64, u64) {
        let own = place(self.to, merged);
        let value = value_of(self.to, merged);
        let end = |neighbour: u64| {
            let neighbour = value_of(self.to, bits_of_place(self.to, neighbour));
            let mut middle = value / 2.0 + neighbour / 2.0;
            for term in self.terms.iter().rev() {
                if term.elements.contains(&index) {
                    middle = (-term.c).mul_add(term.chains[index - term.elements.start], middle);
                }
            }
            match middle.is_finite() {
                true => place(self.from, rounded(self.from, middle)),
                false => guess,
            }
            .clamp(bounds.0, bounds.1)
        };
        (end(own - 1), end(own + 1))
    }
}

/// The guess becomes the merged value.
const HIT: u8 = 1;

/// So does the value above it.
const UP: u8 = 2;

/// So does the value below it.
const DOWN: u8 = 4;

/// The guess is not finite, or so near to zero that its sign is more than arithmetic tells.
const ODD: u8 = 8;

/// The guess is the base.
const BASE: u8 = 16;

/// Runs code for each width of a stored element: `$word` is the unsigned integer of it.
macro_rules! by_width {
    ($float:expr, $word:ident => $body:block) => {
        match $float.size() {
            2 => {
                type $word = u16;
                $body
            }
            4 => {
                type $word = u32;
                $body
            }
            _ => {
                type $word = u64;
                $body
            }
        }
    };
}

/// The stored values one place up or down in magnitude, which around zero is no place.
pub(super) fn shifted(float: Float, bytes: &[u8], step: i64, result: &mut [u8]) {
    by_width!(float, Word => {
        let result = result.as_chunks_mut::<{ size_of::<Word>() }>().0;
        for (from, to) in bytes.as_chunks().0.iter().zip(result) {
            *to = Word::from_le_bytes(*from).wrapping_add(step as Word).to_le_bytes();
        }
    });
}

/// Marks the elements that two blocks share.
fn mark_same(float: Float, a: &[u8], b: &[u8], bit: u8, marks: &mut [u8]) {
    by_width!(float, Word => {
        let (a, b) = (a.as_chunks::<{ size_of::<Word>() }>().0, b.as_chunks().0);
        for ((a, b), mark) in a.iter().zip(b).zip(marks) {
            *mark |= bit * u8::from(Word::from_le_bytes(*a) == Word::from_le_bytes(*b));
        }
    });
}

/// Marks the elements that are no ordinary numbers.
fn mark_odd(float: Float, bytes: &[u8], marks: &mut [u8]) {
    let (sign, infinity) = (sign_bit(float), rounded(float, f64::INFINITY));
    by_width!(float, Word => {
        let (sign, infinity) = (sign as Word, infinity as Word);
        let bytes = bytes.as_chunks::<{ size_of::<Word>() }>().0;
        for (bytes, mark) in bytes.iter().zip(marks) {
            let magnitude = Word::from_le_bytes(*bytes) & !sign;
            *mark |= ODD * u8::from((magnitude <= 2) | (magnitude >= infinity));
        }
    });
}

/// The first place within bounds from which on a monotone question is answered with yes; the place behind the last
/// where it never is. Steps grow from a guess on, then halve.
fn first_where(guess: u64, bounds: (u64, u64), yes: impl Fn(u64) -> bool) -> u64 {
    let (mut below, mut from) = (bounds.0, bounds.1 + 1);
    let mut step = 1;
    if yes(guess) {
        from = guess;
        while from > bounds.0 {
            let next = from.saturating_sub(step).max(bounds.0);
            if !yes(next) {
                below = next + 1;
                break;
            }
            (from, step) = (next, step.saturating_mul(2));
        }
        below = below.min(from);
    } else {
        below = guess + 1;
        while below <= bounds.1 {
            let next = below.saturating_add(step).min(bounds.1);
            if yes(next) {
                from = next;
                break;
            }
            (below, step) = (next + 1, step.saturating_mul(2));
        }
    }
    // Everything before `below` says no, `from` says yes or is the end.
    while below < from {
        let middle = below + (from - below) / 2;
        match yes(middle) {
            true => from = middle,
            false => below = middle + 1,
        }
    }
    from
}

/// Whether candidates can be few: the merged type tells the base's apart up to three bits.
pub fn is_told_apart(from: Float, to: Float) -> bool {
    let bits = |float| match float {
        Float::F64 => 53,
        Float::F32 => 24,
        Float::F16 => 11,
        Float::BF16 => 8,
    };
    bits(from) <= bits(to) + 3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::KERNELS;

    /// Every finite value of 16 bits, asked directly.
    fn by_trying(merge: &Merge<'_>, merged: u64) -> Vec<u64> {
        let (low, high) = finite(merge.from);
        (low..=high)
            .filter(|at| {
                let bits = bits_of_place(merge.from, *at);
                merge.merged(0, bits) == place(merge.to, merged)
            })
            .collect()
    }

    /// Asks for the one element of a block.
    fn ask(merge: &Merge<'_>, merged: &[u8]) -> Candidates {
        let mut scratch = Scratch::default();
        merge.settle(merged, &mut scratch);
        let mut open = Vec::new();
        scratch.list_open(merge.from, None, &mut open);
        let found = merge.candidates(merged, &scratch, 0);
        assert!(open.len() == 1 || found.count == 1);
        found
    }

    fn agree(from: Float, to: Float, terms: &[Term], merged: u64) {
        let kernels = KERNELS.iter().filter(|kernel| (kernel.available)());
        let merge = |kernel| Merge {
            from,
            to,
            terms,
            kernel,
        };
        let expected = by_trying(&merge(Kernel::best()), merged);
        for kernel in kernels {
            let merge = merge(kernel);
            let found = ask(&merge, &merged.to_le_bytes()[..to.size()]);
            let all: Vec<u64> = (found.first..found.first + found.count).collect();
            assert_eq!(all, expected, "{from:?} {to:?} {merged:#x} {terms:?}");
        }
    }

    fn term(c: f64, chain: f64) -> Term {
        Term {
            elements: 0..1,
            c,
            chains: vec![chain],
        }
    }

    #[test]
    fn the_candidates_are_those_that_trying_all_values_finds() {
        let sixteen = [Float::BF16, Float::F16];
        let changes = [0.0, -0.0, 1e-3, -0.013, 0.4, 7.5e4, 3e-8, -1e-300];
        for from in sixteen {
            for to in [Float::BF16, Float::F16, Float::F32] {
                for change in changes {
                    for base in [0u64, 1, 0x8000, 0x3f80, 0xbc01, 0x0401, 0x7bff, 0x2a2a] {
                        let terms = [term(0.5, change), term(-1.25, 0.01)];
                        for terms in [&terms[..], &terms[..1], &[]] {
                            let merge = Merge {
                                from,
                                to,
                                terms,
                                kernel: Kernel::best(),
                            };
                            let merged = bits_of_place(to, merge.merged(0, base));
                            if value_of(to, merged).is_finite() {
                                agree(from, to, terms, merged);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_merged_value_that_nothing_becomes_has_no_candidate() {
        // 2 − 1 = 1 has no neighbour of sixteen bits that gives a value with more bits than it.
        let merge = Merge {
            from: Float::BF16,
            to: Float::F32,
            terms: &[term(1.0, 1.0)],
            kernel: Kernel::best(),
        };
        assert_eq!(ask(&merge, &2.000001f32.to_le_bytes()).count, 0);
    }

    #[test]
    fn what_is_not_finite_was_so() {
        for bits in [0x7f80u64, 0xff80, 0x7fc1] {
            let merge = Merge {
                from: Float::BF16,
                to: Float::BF16,
                terms: &[term(1.0, 1.0)],
                kernel: Kernel::best(),
            };
            let only = Candidates {
                first: place(Float::BF16, bits),
                count: 1,
            };
            assert_eq!(ask(&merge, &bits.to_le_bytes()[..2]), only);
        }
    }

    #[test]
    fn places_are_the_order_of_the_values() {
        for float in [Float::BF16, Float::F16] {
            let (low, high) = finite(float);
            let values: Vec<f64> = (low..=high)
                .map(|place| value_of(float, bits_of_place(float, place)))
                .collect();
            assert!(values.is_sorted());
            assert!(values.iter().all(|value| value.is_finite()));
            for at in low..=high {
                assert_eq!(place(float, bits_of_place(float, at)), at);
            }
        }
    }
}
