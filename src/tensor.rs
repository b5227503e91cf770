//! Named tensors in files: type, shape, and where the bytes lie.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::error::{Error, Reason, Result};
use crate::mapped::Input;

pub use safetensors::Dtype as DType;

/// The element types that arithmetic is defined on; each widens exactly to f64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// IEEE binary64
    F64,
    /// IEEE binary32
    F32,
    /// bfloat16
    BF16,
    /// IEEE binary16
    F16,
}

impl Float {
    /// The float that a stored type is, if it is one.
    pub fn of(dtype: DType) -> Option<Self> {
        Some(match dtype {
            DType::F64 => Float::F64,
            DType::F32 => Float::F32,
            DType::BF16 => Float::BF16,
            DType::F16 => Float::F16,
            _ => return None,
        })
    }

    /// The stored type.
    pub fn dtype(self) -> DType {
        match self {
            Float::F64 => DType::F64,
            Float::F32 => DType::F32,
            Float::BF16 => DType::BF16,
            Float::F16 => DType::F16,
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Float::F64 => 8,
            Float::F32 => 4,
            Float::BF16 | Float::F16 => 2,
        }
    }

    /// The name that a model's `config.json` uses.
    pub fn torch_name(self) -> &'static str {
        match self {
            Float::F64 => "float64",
            Float::F32 => "float32",
            Float::BF16 => "bfloat16",
            Float::F16 => "float16",
        }
    }
}

/// Number of elements of a shape; `None` on overflow, also of what a dimension of zero hides: products
/// of some of the dimensions are taken everywhere.
pub fn elements(shape: &[usize]) -> Option<usize> {
    const LIMIT: usize = usize::MAX >> 12;
    let visible = shape.iter().filter(|size| **size != 0);
    let product = visible.copied().try_fold(1usize, usize::checked_mul)?;
    match shape.contains(&0) {
        true => Some(0).filter(|_| product <= LIMIT),
        false => Some(product),
    }
}

/// Whether a type is a floating-point number of any width.
pub fn is_floating(dtype: DType) -> bool {
    !matches!(
        dtype,
        DType::BOOL
            | DType::U8
            | DType::I8
            | DType::I16
            | DType::U16
            | DType::I32
            | DType::U32
            | DType::I64
            | DType::U64
            | DType::C64
    )
}

/// A type that has a scale to a block of elements; it is stored and copied, and has no arithmetic here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The type's name in the field.
    pub name: &'static str,
    /// Its number in the file.
    pub code: u32,
    /// The shape in elements, outermost first.
    pub shape: Vec<usize>,
}

/// A tensor in an open file. Its container has checked that shape, type and bytes agree.
#[derive(Clone)]
pub struct Tensor {
    /// Name in the file.
    pub name: String,
    /// Stored element type.
    pub dtype: DType,
    /// Dimensions, outermost first; row-major.
    pub shape: Vec<usize>,
    /// The file.
    pub input: Arc<Input>,
    /// First byte in the file.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// The bytes themselves, where they do not lie in the file as they are (compressed or strided
    /// members of archives); otherwise `offset` says where they lie.
    pub memory: Option<Arc<Vec<u8>>>,
    /// What makes the bytes, where they follow from other tensors.
    pub made: Option<Origin>,
    /// What it is, where it is quantised by blocks; then type and shape are those of its bytes.
    pub blocks: Option<Blocks>,
}

/// Makes the bytes of a tensor when they are asked for, so that no more than one need be in memory.
pub type Made = Arc<dyn Fn() -> Result<Vec<u8>> + Send + Sync>;

/// What the bytes of a tensor follow from.
#[derive(Clone)]
pub enum Origin {
    /// They are made all at once.
    Whole(Made),
    /// Any of them are made alone.
    Parts(Arc<dyn Parts>),
}

/// Makes bytes of a tensor from any place on.
pub trait Parts: Send + Sync {
    /// Fills `buffer` with the bytes from `start` on.
    ///
    /// # Errors
    /// What making them gives.
    fn read(&self, start: usize, buffer: &mut [u8]) -> Result<()>;

    /// Bytes that are made together.
    fn block(&self) -> usize;

    /// Compares the BLAKE3 hash of all bytes with what it must be.
    ///
    /// # Errors
    /// [`Reason::NotRestored`].
    fn verify(&self, hash: &[u8; 32]) -> Result<()>;
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The name is quoted, which escapes what could act on a terminal.
        write!(
            f,
            "{:?} {} {:?} at {}",
            self.name, self.dtype, self.shape, self.offset
        )
    }
}

impl Tensor {
    /// A tensor that follows from this one: of its file and name, with bytes that `made` gives.
    #[must_use]
    pub fn derived(&self, dtype: DType, shape: Vec<usize>, made: Made) -> Self {
        let elements: usize = shape.iter().product();
        Tensor {
            name: self.name.clone(),
            dtype,
            length: (elements * dtype.bitsize() / 8) as u64,
            shape,
            input: self.input.clone(),
            offset: 0,
            memory: None,
            made: Some(Origin::Whole(made)),
            blocks: None,
        }
    }

    /// A tensor that follows from this one: of its file and name, with bytes at hand.
    #[must_use]
    pub fn holding(&self, dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Self {
        Tensor {
            memory: Some(Arc::new(bytes)),
            made: None,
            ..self.derived(dtype, shape, Arc::new(|| Ok(Vec::new())))
        }
    }

    /// The tensor with its bytes at hand, for readers of many small pieces.
    ///
    /// # Errors
    /// What making the bytes gives.
    pub fn settled(&self) -> Result<Cow<'_, Self>> {
        let Some(Origin::Whole(made)) = &self.made else {
            return Ok(Cow::Borrowed(self));
        };
        let memory = Some(Arc::new(made()?));
        Ok(Cow::Owned(Tensor {
            memory,
            made: None,
            ..self.clone()
        }))
    }

    /// What makes any of its bytes alone, where something does.
    pub fn parts(&self) -> Option<&Arc<dyn Parts>> {
        match &self.made {
            Some(Origin::Parts(parts)) => Some(parts),
            _ => None,
        }
    }

    /// Whether its bytes lie in its file as they are.
    pub fn lies_in_file(&self) -> bool {
        self.memory.is_none() && self.made.is_none()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The name of its type.
    pub fn type_name(&self) -> String {
        let blocks = self.blocks.as_ref();
        blocks.map_or_else(|| self.dtype.to_string(), |blocks| blocks.name.to_owned())
    }

    /// Number of elements that the model has, also where they are quantised.
    pub fn parameters(&self) -> usize {
        let shape = self
            .blocks
            .as_ref()
            .map_or(&self.shape, |blocks| &blocks.shape);
        shape.iter().product()
    }

    /// The size of one dimension; 1 for a dimension that is not there.
    pub fn dimension(&self, axis: usize) -> usize {
        self.shape.get(axis).copied().unwrap_or(1)
    }

    /// The float type.
    ///
    /// # Errors
    /// [`Reason::AdapterType`] for types without arithmetic.
    pub fn float(&self) -> Result<Float> {
        Float::of(self.dtype).ok_or_else(|| {
            self.error(Reason::AdapterType {
                dtype: self.type_name(),
            })
        })
    }

    /// An error about this tensor.
    pub fn error(&self, reason: Reason) -> Error {
        Error::new(reason)
            .in_file(self.input.path())
            .on(&*self.name)
    }

    /// All bytes, mapped where the file system can, read otherwise.
    ///
    /// # Errors
    /// Those of [`Input::read_at`].
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        self.bytes_of(0, self.length as usize)
    }

    /// Some bytes, mapped where the file system can, read otherwise.
    ///
    /// # Errors
    /// Those of [`Input::read_at`].
    pub fn bytes_of(&self, start: usize, length: usize) -> Result<Cow<'_, [u8]>> {
        debug_assert!((start + length) as u64 <= self.length);
        if let Some(memory) = &self.memory {
            return Ok(Cow::Borrowed(&memory[start..start + length]));
        }
        match &self.made {
            Some(Origin::Whole(made)) => {
                let mut bytes = made()?;
                bytes.truncate(start + length);
                bytes.drain(..start);
                return Ok(Cow::Owned(bytes));
            }
            Some(Origin::Parts(parts)) => {
                let mut bytes = vec![0; length];
                parts.read(start, &mut bytes)?;
                return Ok(Cow::Owned(bytes));
            }
            None => {}
        }
        let offset = self.offset + start as u64;
        if let Some(map) = self.input.map()
            && let Some(bytes) = map.get(offset as usize..offset as usize + length)
        {
            return Ok(Cow::Borrowed(bytes));
        }
        let mut bytes = vec![0; length];
        self.input.read_at(&mut bytes, offset)?;
        Ok(Cow::Owned(bytes))
    }

    /// Fills `buffer` with the bytes from `start` on; read, never mapped.
    ///
    /// # Errors
    /// Those of [`Input::read_at`].
    pub fn read(&self, start: usize, buffer: &mut [u8]) -> Result<()> {
        if let (None, Some(parts)) = (&self.memory, self.parts()) {
            return parts.read(start, buffer);
        }
        if self.memory.is_some() || self.made.is_some() {
            buffer.copy_from_slice(&self.bytes_of(start, buffer.len())?);
            return Ok(());
        }
        self.input.read_at(buffer, self.offset + start as u64)
    }

    /// Whether two tensors hold equal values in equal shapes, whatever their types; compared piece by
    /// piece, so that neither is ever in memory whole.
    ///
    /// # Errors
    /// As [`Tensor::to_f64`].
    pub fn equals(&self, other: &Tensor) -> Result<bool> {
        let all = 0..self.elements();
        Ok(self.shape == other.shape && self.equals_in(all, other, 0)?)
    }

    /// Whether the elements of a range equal as many of another tensor from `start` on.
    ///
    /// # Errors
    /// As [`Tensor::to_f64`].
    pub fn equals_in(&self, range: Range<usize>, other: &Tensor, start: usize) -> Result<bool> {
        const PIECE: usize = 1 << 16;
        let (ours, theirs) = (self.float()?, other.float()?);
        let (this, other) = (self.settled()?, other.settled()?);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for first in range.clone().step_by(PIECE) {
            let count = PIECE.min(range.end - first);
            let at = start + first - range.start;
            let left = this.bytes_of(first * ours.size(), count * ours.size())?;
            let right = other.bytes_of(at * theirs.size(), count * theirs.size())?;
            if ours == theirs && left == right {
                continue;
            }
            a.resize(count, 0.0);
            b.resize(count, 0.0);
            widen(ours, &left, &mut a);
            widen(theirs, &right, &mut b);
            if a != b {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// All elements, widened exactly to f64.
    ///
    /// # Errors
    /// [`Reason::AdapterType`] for types without arithmetic; those of [`Input::read_at`].
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        let float = self.float()?;
        let bytes = self.bytes()?;
        let mut values = vec![0.0; self.elements()];
        widen(float, &bytes, &mut values);
        Ok(values)
    }
}

/// Widens stored elements exactly to f64. `bytes` holds `values.len()` elements.
#[inline(always)]
pub fn widen(float: Float, bytes: &[u8], values: &mut [f64]) {
    debug_assert_eq!(bytes.len(), values.len() * float.size());
    match float {
        Float::F64 => {
            for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(8)) {
                *value = f64::from_bits(u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
            }
        }
        Float::F32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
                let bits = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
                *value = f64::from(f32::from_bits(bits));
            }
        }
        Float::BF16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                let bits = u16::from_le_bytes(bytes.try_into().expect("two bytes"));
                // The upper half of an f32, so no table or branch is needed.
                *value = f64::from(f32::from_bits(u32::from(bits) << 16));
            }
        }
        Float::F16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                let bits = u16::from_le_bytes(bytes.try_into().expect("two bytes"));
                *value = f64::from(widen_f16(bits));
            }
        }
    }
}

/// Widens one binary16 to f32 without branches, so that loops vectorise.
///
/// The exponent is rebiased by multiplication, which also normalises subnormals exactly; infinities
/// and NaNs keep their payload.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    // 2^112 moves the bias from 15 to 127.
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    let special = magnitude | 0x7f80_0000;
    let finite = scaled.to_bits();
    f32::from_bits(
        sign | if bits & 0x7c00 == 0x7c00 {
            special
        } else {
            finite
        },
    )
}

/// Rounds to the stored type: to nearest, ties to even, once. NaN stays NaN.
///
/// `half`'s own `from_f64` truncates to 32 bits before it rounds and is wrong close to ties
/// (half 2.7.1: 1 + 2⁻⁸ + 2⁻⁴⁵ becomes bf16 1.0), so f64 goes to f32 *by rounding to odd*, after
/// which the second rounding cannot err (Boldo and Melquiond, "Emulation of a FMA and correctly
/// rounded sums", 2008: the wider type has at least two more bits).
#[inline(always)]
pub fn narrow(float: Float, values: &[f64], bytes: &mut [u8]) {
    debug_assert_eq!(bytes.len(), values.len() * float.size());
    match float {
        Float::F64 => {
            for (value, bytes) in values.iter().zip(bytes.chunks_exact_mut(8)) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        Float::F32 => {
            for (value, bytes) in values.iter().zip(bytes.chunks_exact_mut(4)) {
                bytes.copy_from_slice(&(*value as f32).to_le_bytes());
            }
        }
        Float::BF16 => {
            for (value, bytes) in values.iter().zip(bytes.chunks_exact_mut(2)) {
                bytes.copy_from_slice(&narrow_bf16(round_to_odd(*value)).to_le_bytes());
            }
        }
        Float::F16 => {
            for (value, bytes) in values.iter().zip(bytes.chunks_exact_mut(2)) {
                bytes.copy_from_slice(&narrow_f16(round_to_odd(*value)).to_le_bytes());
            }
        }
    }
}

/// f64 to f32, rounded to odd: inexact results get an odd last bit, on the true side of nearest.
#[inline(always)]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let bits = nearest.to_bits();
    let back = f64::from(nearest);
    let toward_zero = back.abs() > value.abs();
    let inexact = (back != value) & !value.is_nan();
    let odd = if toward_zero {
        bits.wrapping_sub(1)
    } else {
        bits.wrapping_add(1)
    };
    f32::from_bits(if inexact & (bits & 1 == 0) { odd } else { bits })
}

/// f32 to bf16, to nearest even; NaN keeps sign and upper payload and becomes quiet.
#[inline(always)]
fn narrow_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 {
        quiet
    } else {
        rounded
    }) as u16
}

/// f32 to binary16, to nearest even, without branches; NaN becomes quiet.
#[inline(always)]
fn narrow_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    // Normal results: rebias the exponent (127 − 15 = 112) and round the 13 lost bits to even.
    let rebiased = magnitude.wrapping_sub(112 << 23);
    let normal = rebiased.wrapping_add(0xfff + ((rebiased >> 13) & 1)) >> 13;
    // Subnormal results: adding 0.5 lets the hardware round at the last place of binary16 (2⁻²⁴).
    let subnormal = (f32::from_bits(magnitude) + 0.5)
        .to_bits()
        .wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 113 << 23 {
        subnormal
    } else {
        normal
    };
    // 65520 = 2¹⁶ − 2⁴ is the tie between the largest finite value and infinity; it rounds up.
    let large = if magnitude >= 0x477f_f000 {
        0x7c00
    } else {
        finite
    };
    let nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    (sign | if magnitude > 0x7f80_0000 { nan } else { large }) as u16
}

/// Whether the stored element at `index` is NaN or infinite.
pub fn is_finite_at(float: Float, bytes: &[u8], index: usize) -> bool {
    let at = index * float.size();
    let element = &bytes[at..at + float.size()];
    match float {
        Float::F64 => f64::from_le_bytes(element.try_into().expect("eight bytes")).is_finite(),
        Float::F32 => f32::from_le_bytes(element.try_into().expect("four bytes")).is_finite(),
        Float::BF16 => bf16::from_le_bytes(element.try_into().expect("two bytes")).is_finite(),
        Float::F16 => f16::from_le_bytes(element.try_into().expect("two bytes")).is_finite(),
    }
}

/// Rounds values to a type that must have room for them.
///
/// # Errors
/// [`Reason::FactorOverflow`] where finite values would become infinite.
pub fn narrowed(float: Float, values: &[f64]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; values.len() * float.size()];
    narrow(float, values, &mut bytes);
    let lost = |index: &usize| values[*index].is_finite() && !is_finite_at(float, &bytes, *index);
    match (0..values.len()).filter(lost).count() {
        0 => Ok(bytes),
        count => {
            let dtype = float.dtype().to_string();
            Err(Error::new(Reason::FactorOverflow { count, dtype }))
        }
    }
}

/// The tensor with zeros behind its elements along an axis, up to a size; as it is where it has as many.
pub fn filled(tensor: &Tensor, axis: usize, size: usize) -> Tensor {
    let size = size.max(tensor.dimension(axis));
    let mut shape = tensor.shape.clone();
    let inner: usize = shape[axis + 1..].iter().product::<usize>() * tensor.dtype.bitsize() / 8;
    let (own, whole) = (shape[axis] * inner, size * inner);
    let length = shape[..axis].iter().product::<usize>() * whole;
    shape[axis] = size;
    let source = tensor.clone();
    let made = move || {
        let bytes = source.bytes()?;
        let mut all = vec![0; length];
        let lines = bytes.chunks_exact(own.max(1));
        for (target, line) in all.chunks_exact_mut(whole.max(1)).zip(lines) {
            target[..line.len()].copy_from_slice(line);
        }
        Ok(all)
    };
    tensor.derived(tensor.dtype, shape, Arc::new(made))
}

/// A matrix with its axes exchanged.
pub fn transposed(tensor: &Tensor) -> Tensor {
    let (rows, columns) = (tensor.dimension(0), tensor.dimension(1));
    let size = tensor.dtype.bitsize() / 8;
    let source = tensor.clone();
    let made = move || {
        let bytes = source.bytes()?;
        let mut taken = Vec::with_capacity(bytes.len());
        for column in 0..columns {
            for row in 0..rows {
                let at = (row * columns + column) * size;
                taken.extend_from_slice(&bytes[at..at + size]);
            }
        }
        Ok(taken)
    };
    tensor.derived(tensor.dtype, vec![columns, rows], Arc::new(made))
}

/// The tensor in another type, each value rounded once.
pub fn typed(tensor: &Tensor, dtype: Option<Float>) -> Tensor {
    match dtype {
        Some(float) if float.dtype() != tensor.dtype => scaled(tensor, 1.0, dtype),
        _ => tensor.clone(),
    }
}

/// The tensor multiplied by a number, each product rounded once to the type.
pub fn scaled(tensor: &Tensor, by: f64, dtype: Option<Float>) -> Tensor {
    let Some(float) = dtype.or_else(|| Float::of(tensor.dtype)) else {
        return tensor.clone();
    };
    let source = tensor.clone();
    let made = move || {
        let mut values = source.to_f64()?;
        values.iter_mut().for_each(|value| *value *= by);
        narrowed(float, &values).map_err(|e| e.in_file(source.input.path()).on(&*source.name))
    };
    tensor.derived(float.dtype(), tensor.shape.clone(), Arc::new(made))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dimension_of_zero_hides_no_overflow() {
        let huge = 1 << (usize::BITS / 2);
        assert_eq!(elements(&[]), Some(1));
        assert_eq!(elements(&[3, 5]), Some(15));
        assert_eq!(elements(&[3, 0, 5]), Some(0));
        for shape in [[huge, huge, 0], [0, huge, huge], [huge, 0, huge]] {
            assert_eq!(elements(&shape), None, "{shape:?}");
        }
    }

    #[test]
    fn every_half_widens_like_the_half_crate() {
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            let mut value = [0.0];
            widen(Float::F16, &bytes, &mut value);
            let expected = f16::from_bits(bits).to_f64();
            assert!(
                value[0] == expected || value[0].is_nan() && expected.is_nan(),
                "{bits:#x}"
            );
            widen(Float::BF16, &bytes, &mut value);
            let expected = bf16::from_bits(bits).to_f64();
            assert!(
                value[0] == expected || value[0].is_nan() && expected.is_nan(),
                "{bits:#x}"
            );
        }
    }

    #[test]
    fn narrowing_from_f32_values_equals_the_half_crate() {
        for step in 0..(1u32 << 24) {
            let value = f32::from_bits(step.wrapping_mul(257));
            let (mut ours, theirs) = ([0; 2], bf16::from_f32(value));
            narrow(Float::BF16, &[f64::from(value)], &mut ours);
            let ours = bf16::from_le_bytes(ours);
            assert!(
                ours == theirs || ours.is_nan() && theirs.is_nan(),
                "{value:e}"
            );
            let (mut ours, theirs) = ([0; 2], f16::from_f32(value));
            narrow(Float::F16, &[f64::from(value)], &mut ours);
            let ours = f16::from_le_bytes(ours);
            assert!(
                ours == theirs || ours.is_nan() && theirs.is_nan(),
                "{value:e}"
            );
        }
    }

    #[test]
    fn narrowing_rounds_once_beside_every_tie() {
        for bits in (0..0x7c00u16).step_by(1) {
            check_tie(
                Float::F16,
                bits,
                f16::from_bits(bits).to_f64(),
                f16::from_bits(bits + 1).to_f64(),
            );
        }
        for bits in 0..0x7f7fu16 {
            check_tie(
                Float::BF16,
                bits,
                bf16::from_bits(bits).to_f64(),
                bf16::from_bits(bits + 1).to_f64(),
            );
        }
    }

    fn check_tie(float: Float, bits: u16, low: f64, high: f64) {
        if !high.is_finite() {
            return;
        }
        let tie = low + (high - low) / 2.0; // exact: one more bit than the type has
        let even = if bits & 1 == 0 { bits } else { bits + 1 };
        for (value, expected) in [
            (tie.next_down(), bits),
            (tie, even),
            (tie.next_up(), bits + 1),
        ] {
            for sign in [1.0, -1.0] {
                let mut bytes = [0; 2];
                narrow(float, &[sign * value], &mut bytes);
                let expected = if sign < 0.0 {
                    expected | 0x8000
                } else {
                    expected
                };
                assert_eq!(u16::from_le_bytes(bytes), expected, "{float:?} {value:e}");
            }
        }
    }

    #[test]
    fn the_value_that_half_gets_wrong_rounds_up() {
        let mut bytes = [0; 2];
        narrow(
            Float::BF16,
            &[1.0 + 2f64.powi(-8) + 2f64.powi(-45)],
            &mut bytes,
        );
        assert_eq!(bf16::from_le_bytes(bytes).to_f32(), 1.0078125);
    }

    #[test]
    fn overflow_rounds_to_infinity_only_beyond_the_last_tie() {
        let mut bytes = [0; 2];
        narrow(Float::F16, &[65519.999], &mut bytes);
        assert_eq!(f16::from_le_bytes(bytes), f16::MAX);
        narrow(Float::F16, &[65520.0], &mut bytes);
        assert_eq!(f16::from_le_bytes(bytes), f16::INFINITY);
        narrow(Float::F16, &[1e300], &mut bytes);
        assert_eq!(f16::from_le_bytes(bytes), f16::INFINITY);
        narrow(Float::BF16, &[-1e300], &mut bytes);
        assert_eq!(bf16::from_le_bytes(bytes), bf16::NEG_INFINITY);
    }
}
