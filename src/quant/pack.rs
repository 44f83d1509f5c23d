//! Two 4-bit codes to the byte, the first in the low nibble.

use crate::multiversion;

#[inline(always)]
fn pack_kernel(codes: &[u8], offset: u8, packed: &mut [u8]) {
    let pairs = codes.len() / 2;
    for (pair, byte) in codes.chunks_exact(2).zip(&mut *packed) {
        let (low, high) = (pair[0].wrapping_add(offset), pair[1].wrapping_add(offset));
        *byte = (low & 15) | (high << 4);
    }
    if let (&[last], Some(byte)) = (codes.chunks_exact(2).remainder(), packed.get_mut(pairs)) {
        *byte = last.wrapping_add(offset) & 15;
    }
}

#[inline(always)]
fn unpack_kernel(packed: &[u8], offset: u8, codes: &mut [u8]) {
    let pairs = codes.len() / 2;
    for (pair, &byte) in codes.chunks_exact_mut(2).zip(packed) {
        pair[0] = (byte & 15).wrapping_sub(offset);
        pair[1] = (byte >> 4).wrapping_sub(offset);
    }
    if let ([last], Some(&byte)) = (codes.chunks_exact_mut(2).into_remainder(), packed.get(pairs)) {
        *last = (byte & 15).wrapping_sub(offset);
    }
}

multiversion! {
    /// Packs the low nibbles of `codes + offset` into `packed`, of half the length, rounded up.
    pub fn pack(codes: &[u8], offset: u8, packed: &mut [u8]) = pack_kernel
}
multiversion! {
    /// The inverse of [`pack`].
    pub fn unpack(packed: &[u8], offset: u8, codes: &mut [u8]) = unpack_kernel
}
