//! One pass over quantized weights: dequantize, decay, add an update, find the new grid, round.

use super::cpu::{Rounding, dequantize_run, dithers_of, round_changed};
use super::pack;

/// Elements in flight, so that all buffers stay in the first-level cache.
const SPAN: usize = 2048;

/// Scratch of one thread.
#[derive(Default)]
pub struct Scratch {
    values: Vec<f32>,
    dithers: Vec<u16>,
    codes: Vec<u8>,
    changed: Vec<bool>,
}

/// What happens to a weight: `weight * keep + alpha * update`.
#[derive(Clone, Copy)]
pub struct Change {
    pub keep: f32,
    pub alpha: f32,
}

/// Updates a run of whole groups that begins at element `first` of its tensor.
///
/// An update that is not finite counts as zero. A group in which nothing changes keeps its codes
/// and its grid bit for bit; so does everything when nothing is asked for.
#[allow(clippy::too_many_arguments)]
pub fn update_run(
    update: &[f32],
    first: usize,
    rounding: Rounding,
    change: Change,
    codes: &mut [u8],
    scale: &mut [f32],
    zero_point: &mut [u8],
    scratch: &mut Scratch,
) {
    let size = rounding.group_size;
    let packed = rounding.format.bits == 4;
    let groups = (SPAN / size).max(1).next_multiple_of(2);
    let span = groups * size;
    let stored = if packed { span.div_ceil(2) } else { span };
    let mut zero_points = zero_point.chunks_mut(groups);
    let spans =
        update.chunks(span).zip(codes.chunks_mut(stored)).zip(scale.chunks_mut(groups)).enumerate();
    for (i, ((update, codes), scale)) in spans {
        let zero_point = zero_points.next().unwrap_or_default();
        let Scratch { values, dithers, codes: unpacked, changed } = scratch;
        values.resize(update.len(), 0.0);
        dequantize_run::<f32>(codes, scale, zero_point, rounding.format, size, values);
        changed.clear();
        for (values, update) in values.chunks_mut(size).zip(update.chunks(size)) {
            changed.push(add(values, update, change));
        }
        if !changed.contains(&true) {
            continue;
        }
        let dithers = match rounding.key {
            Some(key) => dithers_of(key, first + i * span, update.len(), dithers),
            None => &[],
        };
        if packed {
            unpacked.resize(update.len(), 0);
            pack::unpack(codes, rounding.format.nibble_offset() as u8, unpacked);
            round_changed(values, dithers, changed, rounding, unpacked, scale, zero_point);
            pack::pack(unpacked, rounding.format.nibble_offset() as u8, codes);
        } else {
            round_changed(values, dithers, changed, rounding, codes, scale, zero_point);
        }
    }
}

#[inline(always)]
fn add_kernel(values: &mut [f32], update: &[f32], change: Change) -> bool {
    let mut difference = 0u32;
    for (value, &update) in values.iter_mut().zip(update) {
        let new = *value * change.keep + change.alpha * update;
        let new = if new.abs() < f32::INFINITY { new } else { *value };
        // Adding zero turns -0 into 0, which is no change.
        difference |= (new + 0.0).to_bits() ^ (*value + 0.0).to_bits();
        *value = new;
    }
    difference != 0
}

crate::multiversion! {
    fn add(values: &mut [f32], update: &[f32], change: Change) -> bool = add_kernel
}
