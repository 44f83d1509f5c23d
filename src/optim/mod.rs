//! Fused update rules over lists of tensors.

pub mod cpu;

use pyo3::prelude::*;

use crate::dispatch::dispatch;
use crate::error::{Error, Name, Result};
use crate::quant::dynamic::codec::Codec;
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, Floats, FloatsMut, TensorView, TensorViewMut};
use cpu::{Item, Moments, Step, Target};

/// The numbers that all tensors of a call share.
struct Hyper {
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    maximize: bool,
    grad_scale: f64,
    seed: Option<u64>,
}

impl Hyper {
    fn check(&self, check: Check) -> Result<()> {
        check.value("beta1", (0.0..1.0).contains(&self.beta1), "in [0, 1)", self.beta1)?;
        check.value("beta2", (0.0..1.0).contains(&self.beta2), "in [0, 1)", self.beta2)?;
        check.value("lr", self.lr.is_finite(), "finite", self.lr)?;
        let ok = self.grad_scale.is_finite() && self.grad_scale > 0.0;
        check.value("grad_scale", ok, "positive and finite", self.grad_scale)
    }

    fn step(&self, count: u32, tensor_id: u32) -> Step {
        let correction = |beta: f64| 1.0 - beta.powf(f64::from(count));
        let sign = if self.maximize { -1.0 } else { 1.0 };
        Step {
            step_size: (self.lr / correction(self.beta1)) as f32,
            root: (1.0 / correction(self.beta2).sqrt()) as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            eps: self.eps as f32,
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            factor: (sign / self.grad_scale) as f32,
            key: self.seed.map(|seed| Key::new(seed, Stream::Bfloat16, tensor_id, count)),
        }
    }
}

/// Moments as they come from Python, one entry for each tensor.
enum States {
    Codes { views: [Vec<TensorViewMut>; 4], bits: u8, block_size: usize },
    Floats { views: [Vec<TensorViewMut>; 2] },
}

impl States {
    fn codes(check: Check, lists: [Vec<Arg>; 4], bits: u8, block_size: usize) -> Result<Self> {
        Codec::check(check, bits, block_size)?;
        let [m, ms, v, vs] = lists;
        let views = [
            check.outputs("exp_avg_codes", m)?,
            check.outputs("exp_avg_scale", ms)?,
            check.outputs("exp_avg_sq_codes", v)?,
            check.outputs("exp_avg_sq_scale", vs)?,
        ];
        Ok(Self::Codes { views, bits, block_size })
    }

    fn floats(check: Check, lists: [Vec<Arg>; 2]) -> Result<Self> {
        let [m, v] = lists;
        Ok(Self::Floats { views: [check.outputs("exp_avg", m)?, check.outputs("exp_avg_sq", v)?] })
    }

    const CODES: [&'static str; 4] =
        ["exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"];
    const FLOATS: [&'static str; 2] = ["exp_avg", "exp_avg_sq"];

    fn check(&self, check: Check, targets: &[TensorViewMut]) -> Result<()> {
        let named: Vec<_> = self.named();
        for (name, views) in &named {
            check.length(name, views.len(), "params", targets.len())?;
        }
        for (name, views) in named {
            for (i, (view, target)) in views.iter().zip(targets).enumerate() {
                let (dtype, shape) = match self {
                    Self::Codes { block_size, .. } if name.ends_with("scale") => {
                        (DType::F32, vec![target.numel().div_ceil(*block_size)])
                    }
                    Self::Codes { bits: 4, .. } => (DType::U8, vec![target.numel().div_ceil(2)]),
                    Self::Codes { .. } => (DType::U8, target.shape().to_vec()),
                    Self::Floats { .. } => (DType::F32, target.shape().to_vec()),
                };
                check.dtype((name, i), view, dtype)?;
                check.shape((name, i), view, &shape)?;
            }
        }
        Ok(())
    }

    fn named(&self) -> Vec<(&'static str, &Vec<TensorViewMut>)> {
        match self {
            Self::Codes { views, .. } => Self::CODES.into_iter().zip(views).collect(),
            Self::Floats { views } => Self::FLOATS.into_iter().zip(views).collect(),
        }
    }

    /// # Safety
    /// The views passed [`States::check`], lie on the CPU, and nothing else refers to their memory.
    unsafe fn moments(&mut self) -> Vec<Moments<'_>> {
        match self {
            Self::Codes { views: [m, ms, v, vs], bits, block_size } => m
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
            Self::Floats { views: [m, v] } => m
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
}

fn names<'a, T>(name: &'static str, views: &'a [T]) -> impl Iterator<Item = (Name, &'a T)> {
    views.iter().enumerate().map(move |(i, view)| (Name::from((name, i)), view))
}

/// Checks everything, then steps; `grads` is none when the targets are gradients themselves.
#[allow(clippy::too_many_arguments)]
fn step(
    py: Python<'_>,
    op: &'static str,
    targets: Vec<Arg>,
    grads: Option<Vec<Arg>>,
    states: Result<States>,
    steps: &[u32],
    tensor_ids: &[u32],
    nonfinite: Arg,
    hyper: &Hyper,
) -> PyResult<()> {
    let check = Check { op };
    let target_name = if grads.is_some() { "params" } else { "grads" };
    let mut targets = check.outputs(target_name, targets)?;
    let grads = grads.map(|grads| check.inputs("grads", grads)).transpose()?;
    let mut states = states?;
    let mut nonfinite = check.output("nonfinite", nonfinite)?;
    hyper.check(check)?;
    check.dtype("nonfinite", &nonfinite, DType::I64)?;
    check.shape("nonfinite", &nonfinite, &[1])?;
    check.length("steps", steps.len(), target_name, targets.len())?;
    check.length("tensor_ids", tensor_ids.len(), target_name, targets.len())?;
    check.value(
        "steps",
        steps.iter().all(|&count| count > 0),
        "at least 1",
        format!("{steps:?}"),
    )?;
    states.check(check, &targets)?;
    if let Some(grads) = &grads {
        check.length("grads", grads.len(), "params", targets.len())?;
        for (i, (grad, target)) in grads.iter().zip(&targets).enumerate() {
            check.float(("params", i), target)?;
            check.float(("grads", i), grad)?;
            check.shape(("grads", i), grad, target.shape())?;
            check.contiguous(("grads", i), grad)?;
        }
    } else {
        for (name, target) in names(target_name, &targets) {
            check.dtype(name, target, DType::F32)?;
        }
    }
    let device = {
        let mut written: Vec<(Name, &TensorViewMut)> = names(target_name, &targets).collect();
        for (name, views) in states.named() {
            written.extend(names(name, views));
        }
        written.push(("nonfinite".into(), &nonfinite));
        let read: Vec<(Name, &TensorView)> =
            grads.iter().flat_map(|grads| names("grads", grads)).collect();
        check.disjoint(&written, &read)?;
        let all: Vec<_> = written.iter().map(|&(n, t)| (n, &**t)).chain(read).collect();
        check.same_device(&all)?
    };
    dispatch(py, op, device, |threads| {
        // SAFETY: all views are contiguous, on the CPU, of the checked dtypes and shapes, and no
        // written one overlaps any other.
        let (moments, count) = unsafe { (states.moments(), nonfinite.as_mut_slice::<i64>()) };
        let mut items = Vec::with_capacity(moments.len());
        for (i, (target, moments)) in targets.iter_mut().zip(moments).enumerate() {
            let unsupported =
                Error::Unsupported { op, device: target.device(), dtype: target.dtype() };
            // SAFETY: as above.
            let target = unsafe {
                match &grads {
                    Some(grads) => FloatsMut::of(target)
                        .zip(Floats::of(&grads[i]))
                        .map(|(p, g)| Target::Parameter(p, g)),
                    None => Some(Target::Direction(target.as_mut_slice())),
                }
            };
            let target = target.ok_or(unsupported)?;
            items.push(Item { target, moments, step: hyper.step(steps[i], tensor_ids[i]) });
        }
        count[0] += cpu::adamw(threads, items);
        Ok(())
    })
}

/// Steps parameters in place by AdamW with moments of 8 or 4 bits.
///
/// Elements whose gradient is not finite keep parameter and moments, and are added to `nonfinite`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn adamw_blockwise_step(
    py: Python<'_>,
    params: Vec<Arg>,
    grads: Vec<Arg>,
    exp_avg_codes: Vec<Arg>,
    exp_avg_scale: Vec<Arg>,
    exp_avg_sq_codes: Vec<Arg>,
    exp_avg_sq_scale: Vec<Arg>,
    steps: Vec<u32>,
    tensor_ids: Vec<u32>,
    nonfinite: Arg,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    maximize: bool,
    grad_scale: f64,
    stochastic_rounding: bool,
    seed: u64,
    bits: u8,
    block_size: usize,
) -> PyResult<()> {
    let op = "adamw_blockwise_step";
    let lists = [exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale];
    let states = States::codes(Check { op }, lists, bits, block_size);
    let seed = stochastic_rounding.then_some(seed);
    let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, seed };
    step(py, op, params, Some(grads), states, &steps, &tensor_ids, nonfinite, &hyper)
}

/// Steps parameters in place by AdamW with float32 moments; see `adamw_blockwise_step`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn adamw_step(
    py: Python<'_>,
    params: Vec<Arg>,
    grads: Vec<Arg>,
    exp_avg: Vec<Arg>,
    exp_avg_sq: Vec<Arg>,
    steps: Vec<u32>,
    tensor_ids: Vec<u32>,
    nonfinite: Arg,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    maximize: bool,
    grad_scale: f64,
    stochastic_rounding: bool,
    seed: u64,
) -> PyResult<()> {
    let op = "adamw_step";
    let states = States::floats(Check { op }, [exp_avg, exp_avg_sq]);
    let seed = stochastic_rounding.then_some(seed);
    let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, seed };
    step(py, op, params, Some(grads), states, &steps, &tensor_ids, nonfinite, &hyper)
}

/// Turns float32 gradients into AdamW's update without decay, times minus the learning rate.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn adamw_blockwise_direction(
    py: Python<'_>,
    grads: Vec<Arg>,
    exp_avg_codes: Vec<Arg>,
    exp_avg_scale: Vec<Arg>,
    exp_avg_sq_codes: Vec<Arg>,
    exp_avg_sq_scale: Vec<Arg>,
    steps: Vec<u32>,
    nonfinite: Arg,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    maximize: bool,
    grad_scale: f64,
    bits: u8,
    block_size: usize,
) -> PyResult<()> {
    let op = "adamw_blockwise_direction";
    let lists = [exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale];
    let states = States::codes(Check { op }, lists, bits, block_size);
    let hyper =
        Hyper { lr, beta1, beta2, eps, weight_decay: 0.0, maximize, grad_scale, seed: None };
    let ids = vec![0; steps.len()];
    step(py, op, grads, None, states, &steps, &ids, nonfinite, &hyper)
}

/// `adamw_blockwise_direction` with float32 moments.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn adamw_direction(
    py: Python<'_>,
    grads: Vec<Arg>,
    exp_avg: Vec<Arg>,
    exp_avg_sq: Vec<Arg>,
    steps: Vec<u32>,
    nonfinite: Arg,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    maximize: bool,
    grad_scale: f64,
) -> PyResult<()> {
    let op = "adamw_direction";
    let states = States::floats(Check { op }, [exp_avg, exp_avg_sq]);
    let hyper =
        Hyper { lr, beta1, beta2, eps, weight_decay: 0.0, maximize, grad_scale, seed: None };
    let ids = vec![0; steps.len()];
    step(py, op, grads, None, states, &steps, &ids, nonfinite, &hyper)
}
