//! What all steps share: their arguments, checked.

use crate::error::{Name, Result};
use crate::quant::counter;
use crate::quant::dynamic::codec::Codec;
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, Device, TensorView, TensorViewMut};

/// The numbers that all tensors of a call share.
pub struct Hyper {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub maximize: bool,
    pub grad_scale: f64,
    /// Rounds bfloat16 parameters stochastically.
    pub seed: Option<u64>,
}

/// The numbers of one tensor's step.
#[derive(Clone, Copy)]
pub struct Step {
    /// Learning rate over the first moment's bias correction.
    pub step_size: f32,
    /// One over the root of the second moment's bias correction.
    pub root: f32,
    pub beta1: f32,
    pub beta2: f32,
    /// One minus the decay rates, which float32 would not give: 1 - 0.999 is off by 5e-6 there.
    pub rest1: f32,
    pub rest2: f32,
    pub eps: f32,
    /// What the decay leaves of a parameter.
    pub keep: f32,
    /// Multiplies the gradient: sign and inverse of the gradient scale.
    pub factor: f32,
    /// Rounds bfloat16 parameters stochastically.
    pub key: Option<Key>,
}

impl Hyper {
    fn check(&self, check: Check) -> Result<()> {
        check.value("beta1", (0.0..1.0).contains(&self.beta1), "in [0, 1)", self.beta1)?;
        check.value("beta2", (0.0..1.0).contains(&self.beta2), "in [0, 1)", self.beta2)?;
        check.value("lr", self.lr.is_finite(), "finite", self.lr)?;
        let ok = self.grad_scale.is_finite() && self.grad_scale > 0.0;
        check.value("grad_scale", ok, "positive and finite", self.grad_scale)
    }

    /// The kernels compute these by the same operations in the same order (adamw.cuh).
    pub fn step(&self, count: u32, tensor_id: u32) -> Step {
        let correction = |beta: f64| 1.0 - power(beta, count);
        let sign = if self.maximize { -1.0 } else { 1.0 };
        Step {
            step_size: (self.lr / correction(self.beta1)) as f32,
            root: (1.0 / correction(self.beta2).sqrt()) as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            rest1: (1.0 - self.beta1) as f32,
            rest2: (1.0 - self.beta2) as f32,
            eps: self.eps as f32,
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            factor: (sign / self.grad_scale) as f32,
            key: self.seed.map(|seed| Key::new(seed, Stream::Bfloat16, tensor_id, count)),
        }
    }
}

/// By repeated squaring: the C library's power differs between systems and devices.
fn power(mut base: f64, mut exponent: u32) -> f64 {
    let mut result = 1.0;
    while exponent != 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// A counter as a number; below one, or without a value, it is taken for one, since nothing could
/// refuse it on a device.
pub fn count_of(counter: f32) -> u32 {
    (counter as u32).max(1)
}

/// How much of a step is taken, by how much the gradient has changed since the step before:
/// ``height * sigmoid(slope * d) + base`` of the difference d, or of its magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Friction {
    /// The bits of the difference that count: all, or all but the sign.
    pub mask: u32,
    pub slope: f32,
    pub height: f32,
    pub base: f32,
}

impl Friction {
    pub const NAMES: [&'static str; 3] = ["abs", "signed", "wide"];

    /// The variants of diffGrad's paper.
    pub fn named(check: Check, name: &str) -> Result<Self> {
        let (all, magnitude) = (u32::MAX, u32::MAX >> 1);
        check.value("friction", Self::NAMES.contains(&name), "abs, signed or wide", name)?;
        Ok(match name {
            "signed" => Self { mask: all, slope: 1.0, height: 1.0, base: 0.0 },
            "wide" => Self { mask: magnitude, slope: 0.5, height: 9.0, base: -4.0 },
            _ => Self { mask: magnitude, slope: 1.0, height: 1.0, base: 0.0 },
        })
    }
}

/// Moments as they come from Python, one entry for each tensor.
pub enum States {
    Codes { views: [Vec<TensorViewMut>; 4], bits: u8, block_size: usize },
    Floats { views: [Vec<TensorViewMut>; 2] },
}

impl States {
    pub fn codes(check: Check, lists: [Vec<Arg>; 4], bits: u8, block_size: usize) -> Result<Self> {
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

    pub fn floats(check: Check, lists: [Vec<Arg>; 2]) -> Result<Self> {
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
}

/// How often each tensor was stepped, this time included.
pub enum Steps {
    Numbers(Vec<u32>),
    /// One float32 each, read where the tensors are.
    Counters(Vec<TensorView>),
}

impl Steps {
    fn new(
        check: Check,
        numbers: Vec<u32>,
        counters: Option<Vec<Arg>>,
        of: &'static str,
        targets: usize,
    ) -> Result<Self> {
        let Some(counters) = counters else {
            check.length("steps", numbers.len(), of, targets)?;
            let counted = numbers.iter().all(|&count| count > 0);
            check.value("steps", counted, "at least 1", format!("{numbers:?}"))?;
            return Ok(Self::Numbers(numbers));
        };
        let name = "step_tensors";
        let got = format!("{numbers:?}");
        check.value("steps", numbers.is_empty(), "empty where step_tensors are given", got)?;
        let counters = check.inputs(name, counters)?;
        check.length(name, counters.len(), of, targets)?;
        for (i, counter) in counters.iter().enumerate() {
            check.scalar((name, i), counter, DType::F32)?;
        }
        Ok(Self::Counters(counters))
    }
}

/// The arguments of one step over a list of tensors.
pub struct Call {
    pub op: &'static str,
    /// Parameters, or gradients that become updates where `grads` is none.
    pub targets: Vec<TensorViewMut>,
    pub grads: Option<Vec<TensorView>>,
    pub states: States,
    pub steps: Steps,
    pub tensor_ids: Vec<u32>,
    /// One float32, the learning rate in place of the number's, read where the tensors are.
    pub lr: Option<TensorView>,
    /// Of directions: the gradients of the step before, which become these.
    pub previous: Option<(Vec<TensorViewMut>, Friction)>,
    /// Increased by the number of gradient elements that are not finite.
    pub nonfinite: TensorViewMut,
    /// One float32 that gradients are divided by, too, read where the tensors are.
    pub grad_scale: Option<TensorView>,
    /// One float32; where it is not zero nothing is written.
    pub found_inf: Option<TensorView>,
    pub hyper: Hyper,
}

/// The arguments as they come, those first that all steps have in common.
pub struct Given {
    pub targets: Vec<Arg>,
    pub grads: Option<Vec<Arg>>,
    pub states: Result<States>,
    pub steps: Vec<u32>,
    /// In place of `steps` and of the learning rate.
    pub step_tensors: Option<Vec<Arg>>,
    pub lr: Option<Arg>,
    pub tensor_ids: Vec<u32>,
    /// Together, or neither.
    pub previous: (Option<Vec<Arg>>, Option<String>),
    pub nonfinite: Arg,
    pub grad_scale: Option<Arg>,
    pub found_inf: Option<Arg>,
    pub hyper: Hyper,
}

fn names<'a, T>(name: &'static str, views: &'a [T]) -> impl Iterator<Item = (Name, &'a T)> {
    views.iter().enumerate().map(move |(i, view)| (Name::from((name, i)), view))
}

impl Call {
    /// Checks everything, and finds the device.
    pub fn new(check: Check, given: Given) -> Result<(Self, Device)> {
        let Given { tensor_ids, hyper, .. } = given;
        let scalar = |name, arg: Option<Arg>| {
            let view = arg.map(|arg| check.input(name, arg)).transpose()?;
            view.iter().try_for_each(|view| check.scalar(name, view, DType::F32))?;
            Ok(view)
        };
        let name = if given.grads.is_some() { "params" } else { "grads" };
        let targets = check.outputs(name, given.targets)?;
        let grads = given.grads.map(|grads| check.inputs("grads", grads)).transpose()?;
        let states = given.states?;
        let (previous, friction) = given.previous;
        let both = previous.is_some() == friction.is_some();
        let got = friction.clone().unwrap_or_else(|| "None".into());
        check.value("friction", both, "given where previous_grads is, and only there", got)?;
        let previous = previous
            .zip(friction)
            .map(|(args, friction)| -> Result<_> {
                let views = check.outputs("previous_grads", args)?;
                check_previous(check, name, &targets, &views)?;
                Ok((views, Friction::named(check, &friction)?))
            })
            .transpose()?;
        let nonfinite = counter(check, given.nonfinite)?;
        let grad_scale = scalar("grad_scale_tensor", given.grad_scale)?;
        let found_inf = scalar("found_inf", given.found_inf)?;
        let lr = scalar("lr_tensor", given.lr)?;
        hyper.check(check)?;
        let steps = Steps::new(check, given.steps, given.step_tensors, name, targets.len())?;
        check.length("tensor_ids", tensor_ids.len(), name, targets.len())?;
        states.check(check, &targets)?;
        check_targets(check, name, &targets, grads.as_deref())?;
        let call = Self {
            op: check.op,
            targets,
            grads,
            states,
            steps,
            tensor_ids,
            lr,
            previous,
            nonfinite,
            grad_scale,
            found_inf,
            hyper,
        };
        let device = call.device(check, name)?;
        Ok((call, device))
    }

    fn device(&self, check: Check, target_name: &'static str) -> Result<Device> {
        let mut written: Vec<(Name, &TensorViewMut)> = names(target_name, &self.targets).collect();
        for (name, views) in self.states.named() {
            written.extend(names(name, views));
        }
        if let Some((views, _)) = &self.previous {
            written.extend(names("previous_grads", views));
        }
        written.push(("nonfinite".into(), &self.nonfinite));
        let grads = self.grads.iter().flat_map(|grads| names("grads", grads));
        let grad_scale = self.grad_scale.iter().map(|view| ("grad_scale_tensor".into(), view));
        let found_inf = self.found_inf.iter().map(|view| ("found_inf".into(), view));
        let lr = self.lr.iter().map(|view| ("lr_tensor".into(), view));
        let counters = match &self.steps {
            Steps::Numbers(_) => &[][..],
            Steps::Counters(views) => views,
        };
        let numbers = grad_scale.chain(found_inf).chain(lr).chain(names("step_tensors", counters));
        let read: Vec<(Name, &TensorView)> = grads.chain(numbers).collect();
        check.one_device(&written, &read)
    }
}

fn check_previous(
    check: Check,
    name: &'static str,
    targets: &[TensorViewMut],
    previous: &[TensorViewMut],
) -> Result<()> {
    check.length("previous_grads", previous.len(), name, targets.len())?;
    for (i, (view, target)) in previous.iter().zip(targets).enumerate() {
        if view.dtype() != DType::BF16 {
            check.dtype(("previous_grads", i), view, DType::F32)?;
        }
        check.shape(("previous_grads", i), view, target.shape())?;
    }
    Ok(())
}

fn check_targets(
    check: Check,
    name: &'static str,
    targets: &[TensorViewMut],
    grads: Option<&[TensorView]>,
) -> Result<()> {
    let Some(grads) = grads else {
        return names(name, targets).try_for_each(|(name, t)| check.dtype(name, t, DType::F32));
    };
    check.length("grads", grads.len(), name, targets.len())?;
    for (i, (grad, target)) in grads.iter().zip(targets).enumerate() {
        check.float((name, i), target)?;
        check.float(("grads", i), grad)?;
        check.shape(("grads", i), grad, target.shape())?;
        check.contiguous(("grads", i), grad)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_formulas() {
        for (beta1, beta2) in [(0.9, 0.999), (0.0, 0.95), (0.99, 0.999_999)] {
            let (lr, eps, weight_decay) = (3e-4, 1e-8, 0.1);
            let (maximize, grad_scale, seed) = (false, 1.0, None);
            let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, seed };
            for count in [1, 2, 3, 10, 999, 1000, 65_535, 100_000, 16_777_216, u32::MAX] {
                let step = hyper.step(count, 0);
                // Of the C library; 1 - beta^n without the digits that the difference loses.
                let correction = |beta: f64| -(f64::from(count) * beta.ln()).exp_m1();
                let want = [lr / correction(beta1), 1.0 / correction(beta2).sqrt()];
                for (got, want) in [step.step_size, step.root].into_iter().zip(want) {
                    // Half a unit in the last place of float32, and what float64 has lost before:
                    // a beta of 0.999999 has 1 - beta with ten digits.
                    let off = (f64::from(got) / want - 1.0).abs();
                    assert!(off <= 6.1e-8, "{beta1} {beta2} {count}: {got} {want}");
                }
                assert_eq!(step.keep, (1.0 - lr * weight_decay) as f32);
            }
        }
    }

    #[test]
    fn counters_are_numbers_from_one_on() {
        let cases =
            [(f32::NAN, 1), (-3.0, 1), (0.0, 1), (1.0, 1), (2.0, 2), (16_777_216.0, 1 << 24)];
        for (counter, count) in cases {
            assert_eq!(count_of(counter), count);
        }
        assert_eq!(count_of(f32::INFINITY), u32::MAX);
    }
}
