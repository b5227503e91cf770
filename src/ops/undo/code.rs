//! What a block of the base needs beside the merged block: which candidate it was, where there is more than one.
//!
//! A block that needs nothing takes no byte. Otherwise the first byte says how it is kept: `0`, as it is; `1`, as runs
//! of elements that are no candidates (variable-length gap and length, then their bits) and a range-coded stream of the
//! places of the others (crate `constriction`: Martin's range coder).

use constriction::UnwrapInfallible;
use constriction::stream::model::{DefaultContiguousCategoricalEntropyModel, DefaultUniformModel};
use constriction::stream::queue::{DefaultRangeDecoder, DefaultRangeEncoder};
use constriction::stream::{Decode, Encode};

use crate::adapter::preimage::{
    Candidates, Merge, Scratch, bits_at, bits_of_place, place, set_bits, zero,
};
use crate::tensor::Float;

/// As it is.
const RAW: u8 = 0;

/// By candidates.
const CODED: u8 = 1;

/// More candidates than this are not numbered.
const MOST: u64 = 1 << 24;

/// Memory of one thread.
#[derive(Default)]
pub(crate) struct Memory {
    scratch: Scratch,
    open: Vec<usize>,
}

/// A block that is kept as it is.
pub(crate) fn raw(base: &[u8]) -> Vec<u8> {
    [&[RAW], base].concat()
}

/// How often zeros were zeros so far, as the probability that the next one is.
struct Zeros {
    seen: u32,
    all: u32,
}

impl Zeros {
    fn new() -> Self {
        Zeros { seen: 1, all: 2 }
    }

    fn model(&self) -> DefaultContiguousCategoricalEntropyModel {
        const WHOLE: u64 = 1 << 24;
        let share = u64::from(self.seen) * WHOLE / u64::from(self.all);
        let share = share.clamp(1, WHOLE - 1) as u32;
        DefaultContiguousCategoricalEntropyModel::from_nonzero_fixed_point_probabilities(
            [WHOLE as u32 - share, share],
            false,
        )
        .expect("both are positive and add up")
    }

    fn count(&mut self, is_zero: bool) {
        self.seen += u32::from(is_zero);
        self.all += 1;
    }
}

/// Whether zero is asked for first: a pruned weight is zero far more often than any of its neighbours.
fn asks_for_zero(candidates: &Candidates, zero: u64) -> bool {
    candidates.count > 2 && candidates.hold(zero)
}

/// Writes down what the block needs.
pub(crate) fn encode(
    merge: &Merge<'_>,
    base: &[u8],
    merged: &[u8],
    memory: &mut Memory,
) -> Vec<u8> {
    let Memory { scratch, open } = memory;
    merge.settle(merged, scratch);
    let (float, zero) = (merge.from, zero(merge.from));
    scratch.list_open(float, Some(base), open);
    let size = float.size();
    let mut encoder = DefaultRangeEncoder::new();
    let mut zeros = Zeros::new();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for index in open.iter().copied() {
        let candidates = merge.candidates(merged, scratch, index);
        let own = place(float, bits_at(float, base, index));
        if !candidates.hold(own) || candidates.count > MOST {
            match runs.last_mut() {
                Some((start, length)) if *start + *length == index => *length += 1,
                _ => runs.push((index, 1)),
            }
            continue;
        }
        let mut which = own - candidates.first;
        let mut count = candidates.count;
        if asks_for_zero(&candidates, zero) {
            let symbol = usize::from(own == zero);
            encoder
                .encode_symbol(symbol, zeros.model())
                .expect("the symbol is one of two");
            zeros.count(own == zero);
            if own == zero {
                continue;
            }
            which -= u64::from(own > zero);
            count -= 1;
        }
        if count > 1 {
            encoder
                .encode_symbol(which as usize, DefaultUniformModel::new(count as usize))
                .expect("the symbol is one of as many");
        }
    }
    let words = encoder.into_compressed().unwrap_infallible();
    if runs.is_empty() && words.is_empty() {
        return Vec::new();
    }
    let mut payload = vec![CODED];
    varint(&mut payload, runs.len() as u64);
    let mut at = 0;
    for (start, length) in runs {
        varint(&mut payload, (start - at) as u64);
        varint(&mut payload, length as u64);
        payload.extend_from_slice(&base[start * size..(start + length) * size]);
        at = start + length;
    }
    payload.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    match payload.len() <= base.len() {
        true => payload,
        false => raw(base),
    }
}

/// Restores a block; nothing where the payload is none that [`encode`] writes.
pub(super) fn decode(
    merge: Option<&Merge<'_>>,
    from: Float,
    payload: &[u8],
    merged: &[u8],
    base: &mut [u8],
    memory: &mut Memory,
) -> Option<()> {
    if let Some((&RAW, bytes)) = payload.split_first() {
        return (bytes.len() == base.len()).then(|| base.copy_from_slice(bytes));
    }
    let merge = merge?;
    let Memory { scratch, open } = memory;
    merge.settle(merged, scratch);
    base.copy_from_slice(scratch.guess());
    scratch.list_open(from, None, open);
    let zero = zero(from);
    let mut rest = match payload.split_first() {
        None => &[][..],
        Some((&CODED, rest)) => rest,
        Some(_) => return None,
    };
    let runs = match payload.is_empty() {
        true => 0,
        false => read_varint(&mut rest)?,
    };
    let mut given = vec![false; base.len() / from.size()];
    let mut at = 0usize;
    for _ in 0..runs {
        let gap = usize::try_from(read_varint(&mut rest)?).ok()?;
        let length = usize::try_from(read_varint(&mut rest)?).ok()?;
        let start = at.checked_add(gap)?;
        at = start.checked_add(length)?;
        given.get_mut(start..at)?.fill(true);
        let bytes = rest.split_off(..length.checked_mul(from.size())?)?;
        base[start * from.size()..at * from.size()].copy_from_slice(bytes);
    }
    let (words, odd) = rest.as_chunks::<4>();
    if !odd.is_empty() {
        return None;
    }
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let mut decoder = DefaultRangeDecoder::from_compressed(words).unwrap_infallible();
    let mut zeros = Zeros::new();
    for index in open.iter().copied().filter(|index| !given[*index]) {
        let candidates = merge.candidates(merged, scratch, index);
        if candidates.count == 0 || candidates.count > MOST {
            return None;
        }
        let (mut which, mut count, mut skip) = (0, candidates.count, None);
        if asks_for_zero(&candidates, zero) {
            let is_zero = decoder.decode_symbol(zeros.model()).ok()? == 1;
            zeros.count(is_zero);
            if is_zero {
                set_bits(from, base, index, bits_of_place(from, zero));
                continue;
            }
            (count, skip) = (count - 1, Some(zero - candidates.first));
        }
        if count > 1 {
            let model = DefaultUniformModel::new(count as usize);
            which = decoder.decode_symbol(model).ok()? as u64;
        }
        which += u64::from(skip.is_some_and(|skip| which >= skip));
        let place = candidates.first + which;
        set_bits(from, base, index, bits_of_place(from, place));
    }
    decoder.maybe_exhausted().then_some(())
}

/// Seven bits in a byte, the lowest first; the highest bit says that more follow.
pub(crate) fn varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Takes a number from the front; nothing where there is none below 2⁶³.
pub(super) fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::adapter::preimage::Term;
    use crate::linalg::Kernel;
    use crate::tensor::{narrow, widen};

    const FLOATS: [Float; 4] = [Float::F64, Float::F32, Float::BF16, Float::F16];

    /// Base bytes of any bits at all, and mostly ones that weights have.
    fn bases(float: Float, seeds: &[(u64, i16)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (bits, small) in seeds {
            let mut element = [0; 8];
            match bits % 8 {
                0 => element = bits.to_le_bytes(),
                1 | 2 => {}
                _ => narrow(
                    float,
                    &[f64::from(*small) / 4096.0],
                    &mut element[..float.size()],
                ),
            }
            bytes.extend_from_slice(&element[..float.size()]);
        }
        bytes
    }

    proptest! {
        #[test]
        fn a_block_comes_back_bit_for_bit(
            seeds in prop::collection::vec((any::<u64>(), any::<i16>()), 1..200),
            chains in prop::collection::vec(-0.02f64..0.02, 200),
            (from, to) in (0..4usize, 0..4usize),
            c in -3.0f64..3.0,
        ) {
            let (from, to) = (FLOATS[from], FLOATS[to]);
            let base = bases(from, &seeds);
            let terms = [Term { elements: 0..seeds.len(), c, chains: chains[..seeds.len()].to_vec() }];
            let mut values = vec![0.0; seeds.len()];
            widen(from, &base, &mut values);
            Kernel::best().accumulate(c, &terms[0].chains, &mut values);
            let mut merged = vec![0; seeds.len() * to.size()];
            narrow(to, &values, &mut merged);
            let merge = Merge { from, to, terms: &terms, kernel: Kernel::best() };
            let mut memory = Memory::default();
            let payload = encode(&merge, &base, &merged, &mut memory);
            prop_assert!(payload.len() <= base.len() + 1);
            let mut restored = vec![0; base.len()];
            let done = decode(Some(&merge), from, &payload, &merged, &mut restored, &mut memory);
            prop_assert!(done.is_some());
            prop_assert_eq!(&restored, &base);
        }

        #[test]
        fn a_payload_of_any_bytes_restores_or_is_refused(
            payload in prop::collection::vec(any::<u8>(), 0..80),
            merged in prop::collection::vec(any::<u8>(), 64),
            chains in prop::collection::vec(any::<f64>(), 32),
        ) {
            let terms = [Term { elements: 0..32, c: 1.0, chains }];
            let (from, to) = (Float::F32, Float::BF16);
            let merge = Merge { from, to, terms: &terms, kernel: Kernel::best() };
            let mut base = vec![0; 128];
            let _ = decode(Some(&merge), from, &payload, &merged, &mut base, &mut Memory::default());
        }
    }

    #[test]
    fn a_pruned_block_costs_a_fraction_of_a_bit_for_each_zero() {
        let count = 8192;
        let base: Vec<u8> = (0..count)
            .flat_map(|index| {
                (if index % 2 == 0 {
                    0
                } else {
                    0x3d80 + index as u16 % 64
                })
                .to_le_bytes()
            })
            .collect();
        let chains: Vec<f64> = (0..count).map(|i| 1e-3 * (1.0 + (i % 7) as f64)).collect();
        let terms = [Term {
            elements: 0..count,
            c: 1.0,
            chains,
        }];
        let (from, to) = (Float::BF16, Float::BF16);
        let merge = Merge {
            from,
            to,
            terms: &terms,
            kernel: Kernel::best(),
        };
        let mut values = vec![0.0; count];
        widen(from, &base, &mut values);
        Kernel::best().accumulate(1.0, &terms[0].chains, &mut values);
        let mut merged = vec![0; 2 * count];
        narrow(to, &values, &mut merged);
        let payload = encode(&merge, &base, &merged, &mut Memory::default());
        assert!(payload.len() * 8 < count / 4, "{}", payload.len());
    }
}
