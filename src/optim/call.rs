//! What all steps share: their arguments, checked.

use crate::error::{Name, Result};
use crate::quant::dynamic::codec::Codec;
use crate::quant::{counter, one_device};
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

    pub fn step(&self, count: u32, tensor_id: u32) -> Step {
        let correction = |beta: f64| 1.0 - beta.powf(f64::from(count));
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

/// The arguments of one step over a list of tensors.
pub struct Call {
    pub op: &'static str,
    /// Parameters, or gradients that become updates where `grads` is none.
    pub targets: Vec<TensorViewMut>,
    pub grads: Option<Vec<TensorView>>,
    pub states: States,
    pub steps: Vec<u32>,
    pub tensor_ids: Vec<u32>,
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
        let Given { steps, tensor_ids, hyper, .. } = given;
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
        hyper.check(check)?;
        check.length("steps", steps.len(), name, targets.len())?;
        check.length("tensor_ids", tensor_ids.len(), name, targets.len())?;
        let counted = steps.iter().all(|&count| count > 0);
        check.value("steps", counted, "at least 1", format!("{steps:?}"))?;
        states.check(check, &targets)?;
        check_targets(check, name, &targets, grads.as_deref())?;
        let call = Self {
            op: check.op,
            targets,
            grads,
            states,
            steps,
            tensor_ids,
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
        let read: Vec<(Name, &TensorView)> = grads.chain(grad_scale).chain(found_inf).collect();
        one_device(check, &written, &read)
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
