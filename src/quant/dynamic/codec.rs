//! Optimizer states of 8 and of 4 bits behind one interface.

use super::{four, map};
use crate::error::Result;
use crate::quant::pack;
use crate::tensor::Check;

/// How the blocks of one kind of moment are stored.
#[derive(Clone, Copy, Debug)]
pub struct Codec {
    pub bits: u8,
    /// First moments have a sign, second moments none.
    pub signed: bool,
}

impl Codec {
    /// Checks what describes codes; blocks of packed codes begin at whole bytes.
    pub fn check(check: Check, bits: u8, block_size: usize) -> Result<()> {
        check.value("bits", bits == 4 || bits == 8, "4 or 8", bits)?;
        check.value("block_size", block_size > 0, "at least 1", block_size)?;
        let whole_bytes = bits == 8 || block_size.is_multiple_of(2);
        check.value("block_size", whole_bytes, "even for 4 bits", block_size)
    }

    /// Bytes that hold the codes of `count` elements.
    pub fn stored(self, count: usize) -> usize {
        if self.bits == 4 { count.div_ceil(2) } else { count }
    }

    /// The code of zero.
    pub fn zero(self) -> u8 {
        match (self.bits, self.signed) {
            (8, _) => map(self.signed).zero,
            (_, true) => four::SIGNED_ZERO,
            (_, false) => 0,
        }
    }

    /// The values behind the codes of one block; `scratch` is for unpacking.
    pub fn decode(self, codes: &[u8], scale: f32, values: &mut [f32], scratch: &mut Vec<u8>) {
        if self.bits == 8 {
            return map(self.signed).decode_block(codes, scale, values);
        }
        scratch.resize(values.len(), 0);
        pack::unpack(codes, 0, scratch);
        four::decode_block(scratch, scale, self.signed, values);
    }

    /// Stores one block of finite values; returns its scale, the largest magnitude.
    pub fn encode(self, values: &[f32], codes: &mut [u8], scratch: &mut Vec<u8>) -> f32 {
        if self.bits == 8 {
            return map(self.signed).encode_block(values, codes);
        }
        scratch.resize(values.len(), 0);
        let scale = four::encode_block(values, self.signed, scratch);
        pack::pack(scratch, 0, codes);
        scale
    }
}
