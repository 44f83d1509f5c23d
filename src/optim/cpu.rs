//! Fused AdamW steps over lists of tensors on the CPU.

use std::cell::RefCell;

use super::call::{Call, Friction, Hyper, States, Step, Steps, count_of};
use crate::cpu::threads::Threads;
use crate::error::{Error, Result};
use crate::multiversion;
use crate::quant::bfloat16::round_stochastic;
use crate::quant::cpu::dithers_of;
use crate::quant::dynamic::codec::Codec;
use crate::tensor::{Floats, FloatsMut, TensorView};

/// Elements of one task, and of one pass over buffers that stay in the first-level cache.
const TASK: usize = 1 << 15;
const SPAN: usize = 1024;

/// The two moments of a run of elements.
enum Moments<'a> {
    Codes {
        exp_avg: &'a mut [u8],
        exp_avg_scale: &'a mut [f32],
        exp_avg_sq: &'a mut [u8],
        exp_avg_sq_scale: &'a mut [f32],
        bits: u8,
        block_size: usize,
    },
    Floats {
        exp_avg: &'a mut [f32],
        exp_avg_sq: &'a mut [f32],
    },
}

/// What is stepped: parameters with their gradients, or gradients that become updates.
enum Target<'a> {
    Parameter(FloatsMut<'a>, Floats<'a>),
    Direction(&'a mut [f32], Option<(FloatsMut<'a>, Friction)>),
}

/// One tensor's part in a call.
struct Item<'a> {
    target: Target<'a>,
    moments: Moments<'a>,
    step: Step,
}

struct Task<'a> {
    first: usize,
    item: Item<'a>,
}

impl<'a> Moments<'a> {
    fn split_at(self, middle: usize) -> (Self, Self) {
        match self {
            Self::Floats { exp_avg, exp_avg_sq } => {
                let (m, m_rest) = exp_avg.split_at_mut(middle);
                let (v, v_rest) = exp_avg_sq.split_at_mut(middle);
                (
                    Self::Floats { exp_avg: m, exp_avg_sq: v },
                    Self::Floats { exp_avg: m_rest, exp_avg_sq: v_rest },
                )
            }
            Self::Codes {
                exp_avg,
                exp_avg_scale,
                exp_avg_sq,
                exp_avg_sq_scale,
                bits,
                block_size,
            } => {
                let blocks = middle / block_size;
                let stored = Codec { bits, signed: true }.stored(middle);
                let (m, m_rest) = exp_avg.split_at_mut(stored);
                let (v, v_rest) = exp_avg_sq.split_at_mut(stored);
                let (ms, ms_rest) = exp_avg_scale.split_at_mut(blocks);
                let (vs, vs_rest) = exp_avg_sq_scale.split_at_mut(blocks);
                let part = |m, ms, v, vs| Self::Codes {
                    exp_avg: m,
                    exp_avg_scale: ms,
                    exp_avg_sq: v,
                    exp_avg_sq_scale: vs,
                    bits,
                    block_size,
                };
                (part(m, ms, v, vs), part(m_rest, ms_rest, v_rest, vs_rest))
            }
        }
    }
}

impl<'a> Target<'a> {
    fn len(&self) -> usize {
        match self {
            Self::Parameter(p, _) => p.len(),
            Self::Direction(g, _) => g.len(),
        }
    }

    fn split_at(self, middle: usize) -> (Self, Self) {
        match self {
            Self::Parameter(p, g) => {
                let ((p, p_rest), (g, g_rest)) = (p.split_at(middle), g.split_at(middle));
                (Self::Parameter(p, g), Self::Parameter(p_rest, g_rest))
            }
            Self::Direction(g, previous) => {
                let (g, g_rest) = g.split_at_mut(middle);
                let (here, rest) = previous
                    .map(|(p, friction)| {
                        let (p, p_rest) = p.split_at(middle);
                        ((p, friction), (p_rest, friction))
                    })
                    .unzip();
                (Self::Direction(g, here), Self::Direction(g_rest, rest))
            }
        }
    }
}

/// Cuts an item into tasks of whole blocks.
fn cut<'a>(mut item: Item<'a>, tasks: &mut Vec<Task<'a>>) {
    let unit = match item.moments {
        Moments::Codes { block_size, .. } => block_size,
        Moments::Floats { .. } => SPAN,
    };
    let run = TASK.div_ceil(unit) * unit;
    let mut first = 0;
    while item.target.len() > run {
        let (target, target_rest) = item.target.split_at(run);
        let (moments, moments_rest) = item.moments.split_at(run);
        tasks.push(Task { first, item: Item { target, moments, step: item.step } });
        item = Item { target: target_rest, moments: moments_rest, step: item.step };
        first += run;
    }
    if item.target.len() > 0 {
        tasks.push(Task { first, item });
    }
}

/// # Safety
/// The views passed the checks of [`Call::new`], lie on the CPU, and nothing else refers to their
/// memory.
unsafe fn moments(states: &mut States) -> Vec<Moments<'_>> {
    match states {
        States::Codes { views: [m, ms, v, vs], bits, block_size } => m
            .iter_mut()
            .zip(ms)
            .zip(v.iter_mut().zip(vs))
            .map(|((m, ms), (v, vs))| {
                // SAFETY: by the caller's word.
                unsafe {
                    Moments::Codes {
                        exp_avg: m.as_mut_slice(),
                        exp_avg_scale: ms.as_mut_slice(),
                        exp_avg_sq: v.as_mut_slice(),
                        exp_avg_sq_scale: vs.as_mut_slice(),
                        bits: *bits,
                        block_size: *block_size,
                    }
                }
            })
            .collect(),
        States::Floats { views: [m, v] } => m
            .iter_mut()
            .zip(v)
            .map(|(m, v)| {
                // SAFETY: by the caller's word.
                unsafe {
                    Moments::Floats { exp_avg: m.as_mut_slice(), exp_avg_sq: v.as_mut_slice() }
                }
            })
            .collect(),
    }
}

/// Steps every tensor of the call.
pub fn adamw(call: &mut Call, threads: Threads) -> Result<()> {
    // SAFETY: one float32 each, on the CPU.
    let number = |view: &TensorView| unsafe { view.as_slice::<f32>()[0] };
    if call.found_inf.as_ref().is_some_and(|view| number(view) != 0.0) {
        return Ok(());
    }
    let grad_scale = call.grad_scale.as_ref().map_or(1.0, number);
    let lr = call.lr.as_ref().map_or(call.hyper.lr, |view| f64::from(number(view)));
    let hyper = Hyper { lr, ..call.hyper };
    // SAFETY: all views are contiguous, on the CPU, of the checked dtypes and shapes, and no
    // written one overlaps any other.
    let moments = unsafe { moments(&mut call.states) };
    let mut items = Vec::with_capacity(moments.len());
    let (previous, friction) = match &mut call.previous {
        Some((views, friction)) => (views.as_mut_slice(), Some(*friction)),
        None => (&mut [][..], None),
    };
    let mut previous = previous.iter_mut();
    for (i, (target, moments)) in call.targets.iter_mut().zip(moments).enumerate() {
        let (device, dtype) = (target.device(), target.dtype());
        // SAFETY: as above.
        let target = unsafe {
            match &call.grads {
                Some(grads) => FloatsMut::of(target)
                    .zip(Floats::of(&grads[i]))
                    .map(|(p, g)| Target::Parameter(p, g)),
                None => {
                    let previous = previous.next().and_then(|view| FloatsMut::of(view));
                    Some(Target::Direction(target.as_mut_slice(), previous.zip(friction)))
                }
            }
        };
        let target = target.ok_or(Error::Unsupported { op: call.op, device, dtype })?;
        let count = match &call.steps {
            Steps::Numbers(counts) => counts[i],
            Steps::Counters(views) => count_of(number(&views[i])),
        };
        let mut step = hyper.step(count, call.tensor_ids[i]);
        step.factor /= grad_scale;
        items.push(Item { target, moments, step });
    }
    let replaced = step_items(threads, items);
    // SAFETY: one int64, which overlaps nothing.
    unsafe { call.nonfinite.as_mut_slice::<i64>()[0] += replaced };
    Ok(())
}

/// Steps every item; returns how many gradient elements were not finite.
fn step_items(threads: Threads, items: Vec<Item<'_>>) -> i64 {
    let elements = items.iter().map(|item| item.target.len()).sum();
    let mut tasks = Vec::new();
    for item in items {
        cut(item, &mut tasks);
    }
    threads.map(elements, tasks, run).into_iter().sum()
}

/// Scratch of one thread.
#[derive(Default)]
struct Scratch {
    grad: Vec<f32>,
    param: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    dithers: Vec<u16>,
    codes: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn run(task: Task<'_>) -> i64 {
    let Task { first, item: Item { mut target, moments, step } } = task;
    SCRATCH.with_borrow_mut(|scratch| match moments {
        Moments::Floats { exp_avg, exp_avg_sq } => {
            let mut nonfinite = 0;
            for (i, (m, v)) in exp_avg.chunks_mut(SPAN).zip(exp_avg_sq.chunks_mut(SPAN)).enumerate()
            {
                nonfinite += step_span(&mut target, i * SPAN, first, m, v, step, scratch);
            }
            nonfinite
        }
        Moments::Codes {
            exp_avg,
            exp_avg_scale,
            exp_avg_sq,
            exp_avg_sq_scale,
            bits,
            block_size,
        } => {
            let (first_moment, second_moment) =
                (Codec { bits, signed: true }, Codec { bits, signed: false });
            let stored = first_moment.stored(block_size);
            let elements = target.len();
            let mut nonfinite = 0;
            let blocks = exp_avg
                .chunks_mut(stored)
                .zip(exp_avg_scale)
                .zip(exp_avg_sq.chunks_mut(stored).zip(exp_avg_sq_scale));
            for (i, ((m_codes, m_scale), (v_codes, v_scale))) in blocks.enumerate() {
                let at = i * block_size;
                let count = block_size.min(elements - at);
                let mut m = std::mem::take(&mut scratch.exp_avg);
                let mut v = std::mem::take(&mut scratch.exp_avg_sq);
                m.resize(count, 0.0);
                v.resize(count, 0.0);
                first_moment.decode(m_codes, *m_scale, &mut m, &mut scratch.codes);
                second_moment.decode(v_codes, *v_scale, &mut v, &mut scratch.codes);
                nonfinite += step_span(&mut target, at, first, &mut m, &mut v, step, scratch);
                *m_scale = first_moment.encode(&m, m_codes, &mut scratch.codes);
                *v_scale = second_moment.encode(&v, v_codes, &mut scratch.codes);
                (scratch.exp_avg, scratch.exp_avg_sq) = (m, v);
            }
            nonfinite
        }
    })
}

/// Steps the elements of `target` from `at` on, whose moments are `m` and `v`; the target begins
/// at element `first` of its tensor.
fn step_span(
    target: &mut Target<'_>,
    at: usize,
    first: usize,
    m: &mut [f32],
    v: &mut [f32],
    step: Step,
    scratch: &mut Scratch,
) -> i64 {
    let len = m.len();
    match target {
        Target::Direction(g, None) => direction(&mut g[at..at + len], m, v, step),
        Target::Direction(g, Some((previous, friction))) => {
            let before = &mut scratch.param;
            before.resize(len, 0.0);
            previous.widen(at, before);
            let nonfinite = rubbed(&mut g[at..at + len], before, m, v, step, *friction);
            previous.narrow(at, before);
            nonfinite
        }
        Target::Parameter(p, g) => {
            let Scratch { grad, param, dithers, .. } = scratch;
            let grad = g.values(at, len, grad);
            if let FloatsMut::F32(p) = p {
                return update(&mut p[at..at + len], grad, m, v, step);
            }
            param.resize(len, 0.0);
            p.widen(at, param);
            let nonfinite = update(param, grad, m, v, step);
            match (&mut *p, step.key) {
                (FloatsMut::BF16(p), Some(key)) => {
                    let dithers = dithers_of(key, first + at, len, dithers);
                    round_stochastic(param, dithers, &mut p[at..at + len]);
                }
                (p, _) => p.narrow(at, param),
            }
            nonfinite
        }
    }
}

/// New moments and Adam's update, and whether the gradient is finite.
#[inline(always)]
fn adam(g: f32, m: f32, v: f32, step: Step) -> (f32, f32, f32, bool) {
    let g = g * step.factor;
    let finite = g.to_bits() & 0x7f80_0000 != 0x7f80_0000;
    let new_m = step.beta1 * m + step.rest1 * g;
    // The square of a gradient above 1e19 overflows; infinity would poison the whole block.
    let new_v = step.beta2 * v + step.rest2 * g * g;
    let new_v = if new_v < f32::MAX { new_v } else { f32::MAX };
    let update = step.step_size * new_m / (new_v.sqrt() * step.root + step.eps);
    (if finite { new_m } else { m }, if finite { new_v } else { v }, update, finite)
}

#[inline(always)]
fn update_kernel(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: Step) -> i64 {
    let mut nonfinite = 0i32;
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let (new_m, new_v, update, finite) = adam(g, *m, *v, step);
        let new_p = *p * step.keep - update;
        *p = if finite { new_p } else { *p };
        (*m, *v) = (new_m, new_v);
        nonfinite += i32::from(!finite);
    }
    i64::from(nonfinite)
}

#[inline(always)]
fn direction_kernel(g: &mut [f32], m: &mut [f32], v: &mut [f32], step: Step) -> i64 {
    let mut nonfinite = 0i32;
    for ((g, m), v) in g.iter_mut().zip(m).zip(v) {
        let (new_m, new_v, update, finite) = adam(*g, *m, *v, step);
        *g = if finite { -update } else { 0.0 };
        (*m, *v) = (new_m, new_v);
        nonfinite += i32::from(!finite);
    }
    i64::from(nonfinite)
}

/// The exponential function in float32 arithmetic alone, so that all devices have its bits; for
/// magnitudes up to 87, within two units in the last place. Cephes' polynomial (Moshier, `expf`).
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUNDER: f32 = 12_582_912.0; // adding it leaves an integer in the last bits
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power = (shifted.to_bits() - ROUNDER.to_bits()).wrapping_add(127) << 23;
    (p * r * r + r + 1.0) * f32::from_bits(power)
}

impl Friction {
    #[inline(always)]
    fn of(self, difference: f32) -> f32 {
        let x = f32::from_bits(difference.to_bits() & self.mask) * self.slope;
        let x = if x < 87.0 { x } else { 87.0 };
        let x = if x > -87.0 { x } else { -87.0 };
        self.height * (1.0 / (1.0 + exp(-x))) + self.base
    }
}

#[inline(always)]
fn rubbed_kernel(
    g: &mut [f32],
    before: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    step: Step,
    friction: Friction,
) -> i64 {
    let mut nonfinite = 0i32;
    for (((g, before), m), v) in g.iter_mut().zip(before).zip(m).zip(v) {
        let (new_m, new_v, update, finite) = adam(*g, *m, *v, step);
        let now = *g * step.factor;
        let share = friction.of(*before - now);
        *g = if finite { -update * share } else { 0.0 };
        *before = if finite { now } else { *before };
        (*m, *v) = (new_m, new_v);
        nonfinite += i32::from(!finite);
    }
    i64::from(nonfinite)
}

multiversion! {
    fn rubbed(
        g: &mut [f32], before: &mut [f32], m: &mut [f32], v: &mut [f32], step: Step,
        friction: Friction,
    ) -> i64 = rubbed_kernel
}
multiversion! {
    fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: Step) -> i64
        = update_kernel
}
multiversion! {
    fn direction(g: &mut [f32], m: &mut [f32], v: &mut [f32], step: Step) -> i64 = direction_kernel
}
