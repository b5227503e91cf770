//! Elements that do not lie one behind the other, brought into the order of a tensor.

/// Elements of `size` bytes from byte `first` on, the last axis fastest; an axis has a length and the bytes
/// from one index to the next. Nothing where one of them lies outside of `bytes`.
pub(super) fn gather(
    bytes: &[u8],
    first: usize,
    axes: &[(usize, usize)],
    size: usize,
) -> Option<Vec<u8>> {
    let count: usize = axes.iter().map(|(length, _)| length).product();
    let mut gathered = Vec::with_capacity(count.checked_mul(size)?);
    let mut index = vec![0; axes.len()];
    let mut at = first;
    for _ in 0..count {
        gathered.extend_from_slice(bytes.get(at..)?.get(..size)?);
        for (index, (length, stride)) in index.iter_mut().zip(axes).rev() {
            // Wrapping, as the stride of an axis of one may be anything.
            *index += 1;
            if *index < *length {
                at = at.wrapping_add(*stride);
                break;
            }
            *index = 0;
            at = at.wrapping_sub(stride.wrapping_mul(length - 1));
        }
    }
    Some(gathered)
}
