//! Stochastic rounding of float32 to bfloat16.

use half::bf16;

use super::cpu::dithers_of;
use crate::cpu::threads::Threads;
use crate::multiversion;
use crate::rng::Key;

const TASK: usize = 1 << 16;
const SPAN: usize = 2048;

#[inline(always)]
fn round_kernel(x: &[f32], dithers: &[u16], out: &mut [bf16]) {
    for ((&value, &dither), out) in x.iter().zip(dithers).zip(out) {
        let bits = value.to_bits();
        let dropped = bits.wrapping_add(u32::from(dither)) >> 16;
        // A carry out of the largest finite value would make an infinity.
        let dropped = if dropped & 0x7fff == 0x7f80 { dropped - 1 } else { dropped };
        let special = (bits >> 16) | if bits & 0x007f_ffff != 0 { 0x40 } else { 0 };
        let finite = bits & 0x7f80_0000 != 0x7f80_0000;
        *out = bf16::from_bits(if finite { dropped } else { special } as u16);
    }
}

multiversion! {
    /// Rounds `x` to one of the two nearest bfloat16, with the probability that keeps the mean:
    /// the lower 16 bits of the float32 are the chance of the one further from zero. Infinities
    /// and NaNs stay; a finite value stays finite.
    pub fn round_stochastic(x: &[f32], dithers: &[u16], out: &mut [bf16]) = round_kernel
}

/// Rounds a contiguous tensor.
pub fn round_bf16_stochastic(threads: Threads, x: &[f32], key: Key, out: &mut [bf16]) {
    let tasks: Vec<_> = x.chunks(TASK).zip(out.chunks_mut(TASK)).enumerate().collect();
    threads.for_each(x.len(), tasks, |(task, (x, out))| {
        let mut buffer = Vec::new();
        for (i, (x, out)) in x.chunks(SPAN).zip(out.chunks_mut(SPAN)).enumerate() {
            let dithers = dithers_of(key, task * TASK + i * SPAN, x.len(), &mut buffer);
            round_stochastic(x, dithers, out);
        }
    });
}
