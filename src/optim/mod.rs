//! Fused update rules over lists of tensors.

mod call;
pub mod cpu;
pub mod cuda;

use pyo3::prelude::*;

use crate::dispatch::dispatch;
use crate::tensor::{Arg, Check};
use call::{Call, Given, Hyper, States};

fn step(py: Python<'_>, op: &'static str, given: Given) -> PyResult<()> {
    let (call, device) = Call::new(Check { op }, given)?;
    dispatch(py, op, device, call, cpu::adamw, cuda::adamw)
}

/// Steps parameters in place by AdamW with moments of 8 or 4 bits.
///
/// Elements whose gradient is not finite keep parameter and moments, and are added to `nonfinite`.
/// Gradients are divided by `grad_scale` and, where it is given, by the one float32 of
/// `grad_scale_tensor`; where the one of `found_inf` is not zero nothing is written. The one float32
/// of `lr_tensor` takes the place of `lr`, and those of `step_tensors`, of which each tensor has
/// one, that of `steps`, which is empty then. All of them are read where the tensors are: nobody
/// waits for a device.
#[pyfunction]
#[pyo3(signature = (
    params, grads, exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale, steps,
    tensor_ids, nonfinite, lr, beta1, beta2, eps, weight_decay, maximize, grad_scale,
    stochastic_rounding, seed, bits, block_size, grad_scale_tensor=None, found_inf=None,
    lr_tensor=None, step_tensors=None
))]
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
    grad_scale_tensor: Option<Arg>,
    found_inf: Option<Arg>,
    lr_tensor: Option<Arg>,
    step_tensors: Option<Vec<Arg>>,
) -> PyResult<()> {
    let op = "adamw_blockwise_step";
    let lists = [exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale];
    let states = States::codes(Check { op }, lists, bits, block_size);
    let seed = stochastic_rounding.then_some(seed);
    let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, seed };
    let (grads, grad_scale) = (Some(grads), grad_scale_tensor);
    let given = Given {
        targets: params,
        grads,
        states,
        steps,
        step_tensors,
        lr: lr_tensor,
        tensor_ids,
        previous: (None, None),
        nonfinite,
        grad_scale,
        found_inf,
        hyper,
    };
    step(py, op, given)
}

/// Steps parameters in place by AdamW with float32 moments; see `adamw_blockwise_step`.
#[pyfunction]
#[pyo3(signature = (
    params, grads, exp_avg, exp_avg_sq, steps, tensor_ids, nonfinite, lr, beta1, beta2, eps,
    weight_decay, maximize, grad_scale, stochastic_rounding, seed, grad_scale_tensor=None,
    found_inf=None, lr_tensor=None, step_tensors=None
))]
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
    grad_scale_tensor: Option<Arg>,
    found_inf: Option<Arg>,
    lr_tensor: Option<Arg>,
    step_tensors: Option<Vec<Arg>>,
) -> PyResult<()> {
    let op = "adamw_step";
    let states = States::floats(Check { op }, [exp_avg, exp_avg_sq]);
    let seed = stochastic_rounding.then_some(seed);
    let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, seed };
    let (grads, grad_scale) = (Some(grads), grad_scale_tensor);
    let given = Given {
        targets: params,
        grads,
        states,
        steps,
        step_tensors,
        lr: lr_tensor,
        tensor_ids,
        previous: (None, None),
        nonfinite,
        grad_scale,
        found_inf,
        hyper,
    };
    step(py, op, given)
}

/// Turns float32 gradients into AdamW's update without decay, times minus the learning rate.
///
/// With `previous_grads` and a `friction` the update is diffGrad's: less of a step is taken where
/// the gradient has changed little since the step before. The gradients become the previous ones.
#[pyfunction]
#[pyo3(signature = (
    grads, exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale, steps, nonfinite,
    lr, beta1, beta2, eps, maximize, grad_scale, bits, block_size, grad_scale_tensor=None,
    found_inf=None, previous_grads=None, friction=None, lr_tensor=None, step_tensors=None
))]
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
    grad_scale_tensor: Option<Arg>,
    found_inf: Option<Arg>,
    previous_grads: Option<Vec<Arg>>,
    friction: Option<String>,
    lr_tensor: Option<Arg>,
    step_tensors: Option<Vec<Arg>>,
) -> PyResult<()> {
    let op = "adamw_blockwise_direction";
    let lists = [exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale];
    let states = States::codes(Check { op }, lists, bits, block_size);
    let hyper =
        Hyper { lr, beta1, beta2, eps, weight_decay: 0.0, maximize, grad_scale, seed: None };
    let (tensor_ids, grad_scale) = (vec![0; grads.len()], grad_scale_tensor);
    let given = Given {
        targets: grads,
        grads: None,
        states,
        steps,
        step_tensors,
        lr: lr_tensor,
        tensor_ids,
        previous: (previous_grads, friction),
        nonfinite,
        grad_scale,
        found_inf,
        hyper,
    };
    step(py, op, given)
}

/// `adamw_blockwise_direction` with float32 moments.
#[pyfunction]
#[pyo3(signature = (
    grads, exp_avg, exp_avg_sq, steps, nonfinite, lr, beta1, beta2, eps, maximize, grad_scale,
    grad_scale_tensor=None, found_inf=None, previous_grads=None, friction=None, lr_tensor=None,
    step_tensors=None
))]
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
    grad_scale_tensor: Option<Arg>,
    found_inf: Option<Arg>,
    previous_grads: Option<Vec<Arg>>,
    friction: Option<String>,
    lr_tensor: Option<Arg>,
    step_tensors: Option<Vec<Arg>>,
) -> PyResult<()> {
    let op = "adamw_direction";
    let states = States::floats(Check { op }, [exp_avg, exp_avg_sq]);
    let hyper =
        Hyper { lr, beta1, beta2, eps, weight_decay: 0.0, maximize, grad_scale, seed: None };
    let (tensor_ids, grad_scale) = (vec![0; grads.len()], grad_scale_tensor);
    let given = Given {
        targets: grads,
        grads: None,
        states,
        steps,
        step_tensors,
        lr: lr_tensor,
        tensor_ids,
        previous: (previous_grads, friction),
        nonfinite,
        grad_scale,
        found_inf,
        hyper,
    };
    step(py, op, given)
}
