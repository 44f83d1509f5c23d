//! AdamW steps on CUDA devices: one launch for each pair of dtypes, whatever the number of tensors.

use super::call::{Call, Friction, States, Step, Steps};
use crate::cuda::list::{Entry, Part, parts};
use crate::cuda::{Args, Module, Parameter, Shape, Stream};
use crate::error::Result;
use crate::quant::blocks::{self, Cut, EACH};
use crate::tensor::DType;

/// The numbers of one tensor's step.
#[derive(Clone, Copy)]
#[repr(C)]
struct AdamNumbers {
    step: u32,
    step_size: f32,
    root: f32,
    keep: f32,
}

/// The numbers, or where the device finds the one that it computes them from.
#[derive(Clone, Copy)]
#[repr(C)]
union AdamCount {
    numbers: AdamNumbers,
    /// An address, and nothing.
    counter: [u64; 2],
}

/// A tensor as the kernels take it.
#[derive(Clone, Copy)]
#[repr(C)]
struct AdamTensor {
    /// Of a direction the gradient of the step before, or null.
    param: *mut u8,
    /// Overwritten by a direction.
    grad: *mut u8,
    exp_avg: *mut u8,
    exp_avg_sq: *mut u8,
    /// Null for float32 moments.
    exp_avg_scale: *mut u8,
    exp_avg_sq_scale: *mut u8,
    numel: i64,
    first_block: u32,
    tensor_id: u32,
    count: AdamCount,
}

// SAFETY: 80 bytes without padding, as the kernels' `AdamTensor`.
unsafe impl Parameter for AdamTensor {
    const KIND: u8 = b's';
}

impl Entry for AdamTensor {
    fn set_first_block(&mut self, blocks: u32) {
        self.first_block = blocks;
    }
}

/// What the device computes the numbers of a step from where the host does not know them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct AdamRates {
    lr: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    /// In place of `lr`, unless null.
    lr_at: *const u8,
    /// Whether tensors have counters.
    counted: i32,
    unused: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct AdamShared {
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    eps: f32,
    factor: f32,
    key: [u32; 2],
    stochastic: i32,
    friction: Friction,
    /// Whether gradients of the step before are bfloat16.
    narrow: i32,
    rates: AdamRates,
}

// SAFETY: 104 bytes without padding, as the kernels' `AdamShared`.
unsafe impl Parameter for AdamShared {
    const KIND: u8 = b's';
}

type Dtypes = (DType, DType);

/// The modules of parameters and gradients of all dtypes.
const STEPS: [(Dtypes, Module); 9] = {
    use DType::{BF16, F16, F32};
    const fn entry(
        param: DType,
        grad: DType,
        defines: &'static [&'static str],
    ) -> (Dtypes, Module) {
        ((param, grad), Module { file: "optim.cu", defines, lists: true })
    }
    [
        entry(F32, F32, &["PARAM=f32", "GRAD=f32"]),
        entry(F32, F16, &["PARAM=f32", "GRAD=f16"]),
        entry(F32, BF16, &["PARAM=f32", "GRAD=bf16"]),
        entry(F16, F32, &["PARAM=f16", "GRAD=f32"]),
        entry(F16, F16, &["PARAM=f16", "GRAD=f16"]),
        entry(F16, BF16, &["PARAM=f16", "GRAD=bf16"]),
        entry(BF16, F32, &["PARAM=bf16", "GRAD=f32"]),
        entry(BF16, F16, &["PARAM=bf16", "GRAD=f16"]),
        entry(BF16, BF16, &["PARAM=bf16", "GRAD=bf16"]),
    ]
};
const DIRECTION: Module = Module { file: "direction.cu", defines: &[], lists: true };

const STEP_KERNELS: [&str; 3] = ["adamw_step", "adamw_blockwise_step", "adamw_blockwise_step_any"];
const DIRECTION_KERNELS: [&str; 3] =
    ["adamw_direction", "adamw_blockwise_direction", "adamw_blockwise_direction_any"];

/// Every module of the family with its kernels.
pub fn kernels() -> Vec<(Module, &'static [&'static str])> {
    let steps = STEPS.iter().map(|&(_, module)| (module, &STEP_KERNELS[..]));
    steps.chain([(DIRECTION, &DIRECTION_KERNELS[..])]).collect()
}

/// How the tensors of a call are cut into blocks.
#[derive(Clone, Copy)]
enum Layout {
    Floats,
    Codes { cut: Cut, bits: u8 },
}

impl Layout {
    fn of(call: &Call) -> Self {
        match call.states {
            States::Floats { .. } => Self::Floats,
            States::Codes { bits, block_size, .. } => {
                let largest = call.targets.iter().map(|t| t.numel()).max().unwrap_or(0);
                // Blocks of packed codes begin at whole bytes.
                Self::Codes { cut: Cut::new(block_size, largest, false), bits }
            }
        }
    }

    fn blocks(self, numel: usize) -> u64 {
        match self {
            Self::Floats => blocks::each(numel, EACH).grid[0],
            Self::Codes { cut, .. } => cut.blocks(numel),
        }
    }

    fn threads(self) -> u32 {
        match self {
            Self::Floats => 256,
            Self::Codes { cut, .. } => cut.threads(),
        }
    }

    fn kernel(self, [floats, plain, any]: [&'static str; 3]) -> &'static str {
        match self {
            Self::Floats => floats,
            Self::Codes { cut, .. } => cut.pick(plain, any),
        }
    }
}

fn entry(call: &mut Call, i: usize) -> AdamTensor {
    let target = &mut call.targets[i];
    let numel = target.numel() as i64;
    let (param, grad) = match &call.grads {
        Some(grads) => (target.ptr_mut(), grads[i].ptr().cast_mut()),
        None => {
            let previous = call.previous.as_mut().map(|(views, _)| views[i].ptr_mut());
            (previous.unwrap_or(std::ptr::null_mut()), target.ptr_mut())
        }
    };
    let [exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale] = match &mut call.states {
        States::Floats { views: [m, v] } => {
            [m[i].ptr_mut(), v[i].ptr_mut(), std::ptr::null_mut(), std::ptr::null_mut()]
        }
        States::Codes { views: [m, ms, v, vs], .. } => {
            [m[i].ptr_mut(), v[i].ptr_mut(), ms[i].ptr_mut(), vs[i].ptr_mut()]
        }
    };
    let tensor_id = call.tensor_ids[i];
    let count = match &call.steps {
        Steps::Counters(views) => AdamCount { counter: [views[i].ptr() as u64, 0] },
        Steps::Numbers(counts) => {
            let Step { step_size, root, keep, .. } = call.hyper.step(counts[i], tensor_id);
            AdamCount { numbers: AdamNumbers { step: counts[i], step_size, root, keep } }
        }
    };
    AdamTensor {
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        exp_avg_scale,
        exp_avg_sq_scale,
        numel,
        first_block: 0,
        tensor_id,
        count,
    }
}

/// Steps every tensor of the call.
pub fn adamw(call: &mut Call, stream: &Stream) -> Result<()> {
    if call.grads.is_none() {
        // In one launch the gradients of the step before are of one dtype.
        let narrow = |&i: &usize| {
            call.previous.as_ref().is_some_and(|(views, _)| views[i].dtype() == DType::BF16)
        };
        let (first, rest): (Vec<_>, Vec<_>) = (0..call.targets.len()).partition(narrow);
        launch(call, stream, DIRECTION, DIRECTION_KERNELS, first)?;
        return launch(call, stream, DIRECTION, DIRECTION_KERNELS, rest);
    }
    for (dtypes, module) in STEPS {
        let has = |&i: &usize| {
            let grad = call.grads.as_ref().map(|grads| grads[i].dtype());
            (Some(dtypes.0), Some(dtypes.1)) == (Some(call.targets[i].dtype()), grad)
        };
        let chosen = (0..call.targets.len()).filter(has).collect();
        launch(call, stream, module, STEP_KERNELS, chosen)?;
    }
    Ok(())
}

fn launch(
    call: &mut Call,
    stream: &Stream,
    module: Module,
    kernels: [&'static str; 3],
    chosen: Vec<usize>,
) -> Result<()> {
    let Some(&one) = chosen.first() else { return Ok(()) };
    let previous = call.previous.as_ref();
    let narrow = previous.is_some_and(|(views, _)| views[one].dtype() == DType::BF16);
    let friction = previous.map(|&(_, friction)| friction);
    let layout = Layout::of(call);
    let capacity = stream.list_capacity();
    let entries = chosen.into_iter().map(|i| {
        let entry = entry(call, i);
        (entry, layout.blocks(entry.numel as usize))
    });
    let parts = parts(entries, capacity);
    // Its key without the parts that depend on a tensor.
    let step = call.hyper.step(1, 0);
    let shared = AdamShared {
        beta1: step.beta1,
        beta2: step.beta2,
        rest1: step.rest1,
        rest2: step.rest2,
        eps: step.eps,
        factor: step.factor,
        key: step.key.map_or([0; 2], |key| key.seed_words()),
        stochastic: i32::from(step.key.is_some()),
        friction: friction.unwrap_or(Friction { mask: 0, slope: 0.0, height: 0.0, base: 0.0 }),
        narrow: i32::from(narrow),
        rates: AdamRates {
            lr: call.hyper.lr,
            beta1: call.hyper.beta1,
            beta2: call.hyper.beta2,
            weight_decay: call.hyper.weight_decay,
            lr_at: call.lr.as_ref().map_or(std::ptr::null(), |view| view.ptr()),
            counted: i32::from(matches!(call.steps, Steps::Counters(_))),
            unused: 0,
        },
    };
    for Part { entries, blocks } in parts {
        let args = Args::new()
            .list(&entries, capacity)
            .value(entries.len() as i32)
            .value(shared)
            .read_some(call.grad_scale.as_ref())
            .read_some(call.found_inf.as_ref())
            .write(&mut call.nonfinite);
        let args = match layout {
            Layout::Floats => args,
            Layout::Codes { cut, bits } => {
                args.value(cut.size()).value(i32::from(bits)).value_some(cut.team())
            }
        };
        let shape = Shape::line(blocks, layout.threads());
        // SAFETY: as kernels/README.md lists them; the call has checked all views.
        unsafe { stream.launch(module, layout.kernel(kernels), shape, args)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<AdamTensor>(), 80);
        assert_eq!(std::mem::offset_of!(AdamTensor, first_block), 56);
        assert_eq!(std::mem::offset_of!(AdamTensor, count), 64);
        assert_eq!(size_of::<AdamShared>(), 104);
        assert_eq!(std::mem::offset_of!(AdamShared, rates), 56);
        // The longest argument list of a driver, and that of one before CUDA 12.1.
        for (capacity, most) in [(400, 32_764), (48, 4096)] {
            let others = 8 + size_of::<AdamShared>() + 3 * 8 + 8 + 2 * 4;
            assert!(capacity * size_of::<AdamTensor>() + others <= most);
        }
    }
}
