//! Block-wise quantization on the CPU.

use std::cell::RefCell;

use super::grid::{Format, Grid, Range, dequantize, round_nearest, round_stochastic, sanitize};
use super::pack;
use crate::cpu::threads::Threads;
use crate::multiversion;
use crate::rng::{DITHER_BLOCK, Key, fill_dithers};
use crate::tensor::Float;

/// Elements of one task: enough to outweigh handing it out, few enough to balance two threads.
const TASK: usize = 1 << 16;
/// Elements in flight inside a task, so that all their buffers stay in the first-level cache.
const SPAN: usize = 2048;

/// Groups that make up about `elements`, at least one; even in number when `even`, so that packed
/// bytes never straddle two runs of groups.
fn groups_in(elements: usize, group_size: usize, even: bool) -> usize {
    let groups = (elements / group_size).max(1);
    if even { groups.next_multiple_of(2) } else { groups }
}

/// Everything that stays the same over a call.
#[derive(Clone, Copy)]
pub struct Rounding {
    pub format: Format,
    pub group_size: usize,
    /// The dithers' key; none rounds to nearest.
    pub key: Option<Key>,
}

/// Scratch of one thread.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    dithers: Vec<u16>,
    codes: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[inline(always)]
fn round_groups_kernel(
    x: &[f32],
    dithers: &[u16],
    rounding: Rounding,
    codes: &mut [u8],
    scale: &mut [f32],
    zero_point: &mut [u8],
) -> bool {
    let size = rounding.group_size;
    let mut finite = true;
    for (group, ((x, codes), scale)) in
        x.chunks(size).zip(codes.chunks_mut(size)).zip(scale).enumerate()
    {
        let range = Range::of(x);
        finite &= range.finite;
        let grid = Grid::covering(range, rounding.format);
        *scale = grid.scale;
        if let Some(zero_point) = zero_point.get_mut(group) {
            *zero_point = grid.zero_point as u8;
        }
        if dithers.is_empty() {
            round_nearest(x, grid, rounding.format, codes);
        } else {
            let start = group * size;
            let dithers = &dithers[start..start + x.len()];
            round_stochastic(x, dithers, grid, rounding.format, codes);
        }
    }
    finite
}

multiversion! {
    /// Quantizes whole groups; false when a value is not finite, and the result then means nothing.
    fn round_groups(
        x: &[f32],
        dithers: &[u16],
        rounding: Rounding,
        codes: &mut [u8],
        scale: &mut [f32],
        zero_point: &mut [u8],
    ) -> bool = round_groups_kernel
}

#[inline(always)]
fn round_changed_kernel(
    x: &[f32],
    dithers: &[u16],
    changed: &[bool],
    rounding: Rounding,
    codes: &mut [u8],
    scale: &mut [f32],
    zero_point: &mut [u8],
) {
    let size = rounding.group_size;
    for (group, &changed) in changed.iter().enumerate() {
        if changed {
            let range = group * size..((group + 1) * size).min(x.len());
            let dithers = if dithers.is_empty() { dithers } else { &dithers[range.clone()] };
            let zero_point =
                if zero_point.is_empty() { &mut [] } else { &mut zero_point[group..=group] };
            let (x, codes) = (&x[range.clone()], &mut codes[range]);
            let scale = &mut scale[group..=group];
            round_groups_kernel(x, dithers, rounding, codes, scale, zero_point);
        }
    }
}

multiversion! {
    /// Quantizes those groups of finite values that changed, and leaves the others alone.
    pub fn round_changed(
        x: &[f32],
        dithers: &[u16],
        changed: &[bool],
        rounding: Rounding,
        codes: &mut [u8],
        scale: &mut [f32],
        zero_point: &mut [u8],
    ) = round_changed_kernel
}

/// Dithers of `count` elements from `first` on, in `buffer`.
pub fn dithers_of(key: Key, first: usize, count: usize, buffer: &mut Vec<u16>) -> &[u16] {
    let skip = first % DITHER_BLOCK;
    buffer.resize(skip + count, 0);
    fill_dithers(key, (first / DITHER_BLOCK) as u64, buffer);
    &buffer[skip..]
}

/// Quantizes a run of whole groups that begins at element `first`.
///
/// `codes` is packed when the format has 4 bits. Returns the number of values not finite.
pub fn quantize_run<T: Float>(
    x: &[T],
    first: usize,
    rounding: Rounding,
    codes: &mut [u8],
    scale: &mut [f32],
    zero_point: &mut [u8],
) -> usize {
    let packed = rounding.format.bits == 4;
    let groups = groups_in(SPAN, rounding.group_size, packed);
    let span = groups * rounding.group_size;
    let stored = if packed { span.div_ceil(2) } else { span };
    SCRATCH.with_borrow_mut(|scratch| {
        let mut replaced = 0;
        let mut zero_points = zero_point.chunks_mut(groups);
        for (i, ((x, codes), scale)) in
            x.chunks(span).zip(codes.chunks_mut(stored)).zip(scale.chunks_mut(groups)).enumerate()
        {
            let zero_point = zero_points.next().unwrap_or_default();
            replaced +=
                quantize_span(x, first + i * span, rounding, codes, scale, zero_point, scratch);
        }
        replaced
    })
}

fn quantize_span<T: Float>(
    x: &[T],
    first: usize,
    rounding: Rounding,
    codes: &mut [u8],
    scale: &mut [f32],
    zero_point: &mut [u8],
    scratch: &mut Scratch,
) -> usize {
    let Scratch { values, dithers, codes: unpacked } = scratch;
    let dithers = match rounding.key {
        Some(key) => dithers_of(key, first, x.len(), dithers),
        None => &[],
    };
    let packed = rounding.format.bits == 4;
    unpacked.resize(x.len(), 0);
    let rounded = if packed { &mut unpacked[..] } else { &mut *codes };
    let mut replaced = 0;
    let direct = T::as_f32(x);
    if direct.is_none() {
        values.resize(x.len(), 0.0);
        T::widen(x, values);
    }
    let input = direct.unwrap_or(values);
    if !round_groups(input, dithers, rounding, rounded, scale, zero_point) {
        values.resize(x.len(), 0.0);
        T::widen(x, values);
        replaced = values.chunks_mut(rounding.group_size).map(sanitize).sum();
        round_groups(values, dithers, rounding, rounded, scale, zero_point);
    }
    if packed {
        pack::pack(unpacked, rounding.format.nibble_offset() as u8, codes);
    }
    replaced
}

/// Quantizes a contiguous tensor. Returns the number of values not finite.
pub fn quantize_blockwise<T: Float>(
    threads: Threads,
    x: &[T],
    rounding: Rounding,
    codes: &mut [u8],
    scale: &mut [f32],
    zero_point: &mut [u8],
) -> usize {
    let packed = rounding.format.bits == 4;
    let groups = groups_in(TASK, rounding.group_size, packed);
    let run = groups * rounding.group_size;
    let stored = if packed { run.div_ceil(2) } else { run };
    let mut zero_points = zero_point.chunks_mut(groups);
    let tasks: Vec<_> = x
        .chunks(run)
        .zip(codes.chunks_mut(stored))
        .zip(scale.chunks_mut(groups))
        .enumerate()
        .map(|(i, ((x, codes), scale))| {
            (i * run, x, codes, scale, zero_points.next().unwrap_or_default())
        })
        .collect();
    threads
        .map(x.len(), tasks, |(first, x, codes, scale, zero_point)| {
            quantize_run(x, first, rounding, codes, scale, zero_point)
        })
        .into_iter()
        .sum()
}

#[inline(always)]
fn dequantize_groups_kernel(
    codes: &[u8],
    scale: &[f32],
    zero_point: &[u8],
    symmetric: bool,
    group_size: usize,
    values: &mut [f32],
) {
    for (group, ((codes, values), &scale)) in
        codes.chunks(group_size).zip(values.chunks_mut(group_size)).zip(scale).enumerate()
    {
        let zero_point = zero_point.get(group).copied().map_or(0, i32::from);
        dequantize(codes, Grid { scale, zero_point }, symmetric, values);
    }
}

multiversion! {
    fn dequantize_groups(
        codes: &[u8],
        scale: &[f32],
        zero_point: &[u8],
        symmetric: bool,
        group_size: usize,
        values: &mut [f32],
    ) = dequantize_groups_kernel
}

/// Dequantizes a run of whole groups; `codes` is packed when the format has 4 bits.
pub fn dequantize_run<T: Float>(
    codes: &[u8],
    scale: &[f32],
    zero_point: &[u8],
    format: Format,
    group_size: usize,
    out: &mut [T],
) {
    let packed = format.bits == 4;
    let groups = groups_in(SPAN, group_size, packed);
    let span = groups * group_size;
    let stored = if packed { span.div_ceil(2) } else { span };
    let mut zero_points = zero_point.chunks(groups);
    SCRATCH.with_borrow_mut(|Scratch { values, codes: unpacked, .. }| {
        for ((codes, scale), out) in
            codes.chunks(stored).zip(scale.chunks(groups)).zip(out.chunks_mut(span))
        {
            let zero_point = zero_points.next().unwrap_or_default();
            let codes = if packed {
                unpacked.resize(out.len(), 0);
                pack::unpack(codes, format.nibble_offset() as u8, unpacked);
                &unpacked[..]
            } else {
                codes
            };
            match T::as_f32_mut(out) {
                Some(out) => {
                    dequantize_groups(codes, scale, zero_point, format.symmetric, group_size, out);
                }
                None => {
                    values.resize(out.len(), 0.0);
                    let symmetric = format.symmetric;
                    dequantize_groups(codes, scale, zero_point, symmetric, group_size, values);
                    T::narrow(values, out);
                }
            }
        }
    });
}

/// Dequantizes a whole tensor.
pub fn dequantize_blockwise<T: Float>(
    threads: Threads,
    codes: &[u8],
    scale: &[f32],
    zero_point: &[u8],
    format: Format,
    group_size: usize,
    out: &mut [T],
) {
    let packed = format.bits == 4;
    let groups = groups_in(TASK, group_size, packed);
    let run = groups * group_size;
    let stored = if packed { run.div_ceil(2) } else { run };
    let elements = out.len();
    let mut zero_points = zero_point.chunks(groups);
    let tasks: Vec<_> = codes
        .chunks(stored)
        .zip(scale.chunks(groups))
        .zip(out.chunks_mut(run))
        .map(|((codes, scale), out)| (codes, scale, zero_points.next().unwrap_or_default(), out))
        .collect();
    threads.for_each(elements, tasks, |(codes, scale, zero_point, out)| {
        dequantize_run(codes, scale, zero_point, format, group_size, out);
    });
}
