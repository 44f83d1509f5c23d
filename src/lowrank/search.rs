//! The projectors of gradients, found anew.

use pyo3::prelude::*;

use super::bases::check_basis;
use super::factors::{Factored, check_factors};
use super::refresh::{self, Size};
use super::source::Source;
use super::{Side, check_workspace, cuda, floats, named};
use crate::cpu::product::Matrix;
use crate::cpu::threads::Threads;
use crate::dispatch::dispatch;
use crate::error::{Name, Result};
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, TensorView, TensorViewMut};

/// What is known of a gradient.
pub enum Gradient {
    Dense(TensorView),
    Factors(Factored),
}

impl Gradient {
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense(grad) => (grad.shape()[0], grad.shape()[1]),
            Self::Factors(factors) => factors.shape(),
        }
    }

    fn named(gradients: &[Self]) -> Vec<(Name, &TensorView)> {
        let mut all = Vec::new();
        for (i, gradient) in gradients.iter().enumerate() {
            match gradient {
                Self::Dense(grad) => all.push((("grads", i).into(), grad)),
                Self::Factors(factors) => all.extend(factors.named(i)),
            }
        }
        all
    }
}

/// The arguments of a refresh.
pub struct Refresh {
    pub gradients: Vec<Gradient>,
    pub bases: Vec<TensorViewMut>,
    pub vectors: Vec<TensorViewMut>,
    pub outcomes: TensorViewMut,
    pub workspace: Option<TensorViewMut>,
    pub warm: Vec<bool>,
    pub keys: Vec<Key>,
    /// Rows, columns, rank.
    pub shapes: Vec<(usize, usize, usize)>,
}

/// The arguments besides the gradients, as they come from Python.
struct Given {
    bases: Vec<Arg>,
    vectors: Vec<Arg>,
    outcomes: Arg,
    warm: Vec<bool>,
    seed: u64,
    tensor_ids: Vec<u32>,
    steps: Vec<u32>,
    workspace: Option<Arg>,
}

/// Finds the projectors of gradients anew.
///
/// `bases` (`[min(m, n), rank]`, float32) and `vectors` (`[min(m, n)]`, the leading direction) are
/// read where `warm` says that they hold an earlier basis, and written. So is a row of `outcomes`
/// (`[gradients, 3]`, float64) for each gradient: a status (0 refreshed, 1 zero gradient, 2 kept
/// because of NaN or infinite values), the cosine of the leading directions before and after, and
/// the share of the squared norm captured. `workspace` (uint8) has the size of
/// `refresh_basis_workspace` on devices.
#[pyfunction]
#[pyo3(signature = (
    grads, bases, vectors, outcomes, warm, seed, tensor_ids, steps, workspace=None
))]
#[allow(clippy::too_many_arguments)]
pub fn refresh_basis(
    py: Python<'_>,
    grads: Vec<Arg>,
    bases: Vec<Arg>,
    vectors: Vec<Arg>,
    outcomes: Arg,
    warm: Vec<bool>,
    seed: u64,
    tensor_ids: Vec<u32>,
    steps: Vec<u32>,
    workspace: Option<Arg>,
) -> PyResult<()> {
    let check = Check { op: "refresh_basis" };
    let grads = check.inputs("grads", grads)?;
    for (i, grad) in grads.iter().enumerate() {
        check.float(("grads", i), grad)?;
        check.contiguous(("grads", i), grad)?;
        check.matrix(("grads", i), grad)?;
    }
    let gradients = grads.into_iter().map(Gradient::Dense).collect();
    let given = Given { bases, vectors, outcomes, warm, seed, tensor_ids, steps, workspace };
    refresh_all(py, check, "grads", gradients, given)
}

/// `refresh_basis` of gradients that are products, ``grad_outputs.T @ inputs``, and never formed.
///
/// `grad_outputs` (`[tokens, m]`) and `inputs` (`[tokens, n]`) have one dtype. `workspace` (uint8)
/// has the size of `refresh_basis_factors_workspace` on devices.
#[pyfunction]
#[pyo3(signature = (
    grad_outputs, inputs, bases, vectors, outcomes, warm, seed, tensor_ids, steps, workspace=None
))]
#[allow(clippy::too_many_arguments)]
pub fn refresh_basis_factors(
    py: Python<'_>,
    grad_outputs: Vec<Arg>,
    inputs: Vec<Arg>,
    bases: Vec<Arg>,
    vectors: Vec<Arg>,
    outcomes: Arg,
    warm: Vec<bool>,
    seed: u64,
    tensor_ids: Vec<u32>,
    steps: Vec<u32>,
    workspace: Option<Arg>,
) -> PyResult<()> {
    let check = Check { op: "refresh_basis_factors" };
    let factors = check_factors(check, grad_outputs, inputs)?;
    let gradients = factors.into_iter().map(Gradient::Factors).collect();
    let given = Given { bases, vectors, outcomes, warm, seed, tensor_ids, steps, workspace };
    refresh_all(py, check, "grad_outputs", gradients, given)
}

fn refresh_all(
    py: Python<'_>,
    check: Check,
    name: &'static str,
    gradients: Vec<Gradient>,
    given: Given,
) -> PyResult<()> {
    let Given { bases, vectors, outcomes, warm, seed, tensor_ids, steps, workspace } = given;
    let (bases, vectors) = (check.outputs("bases", bases)?, check.outputs("vectors", vectors)?);
    let outcomes = check.output("outcomes", outcomes)?;
    let workspace = check_workspace(check, workspace)?;
    for (list, got) in [
        ("bases", bases.len()),
        ("vectors", vectors.len()),
        ("warm", warm.len()),
        ("tensor_ids", tensor_ids.len()),
        ("steps", steps.len()),
    ] {
        check.length(list, got, name, gradients.len())?;
    }
    check.dtype("outcomes", &outcomes, DType::F64)?;
    check.shape("outcomes", &outcomes, &[gradients.len(), 3])?;
    let mut shapes = Vec::with_capacity(gradients.len());
    for (i, gradient) in gradients.iter().enumerate() {
        let (rows, columns) = gradient.shape();
        let rank = check_basis(check, i, &bases[i], rows, columns)?;
        check.dtype(("vectors", i), &vectors[i], DType::F32)?;
        check.shape(("vectors", i), &vectors[i], &[rows.min(columns)])?;
        shapes.push((rows, columns, rank));
    }
    let device = {
        let mut written: Vec<_> = named("bases", &bases).collect();
        written.extend(named("vectors", &vectors));
        written.push(("outcomes".into(), &outcomes));
        written.extend(workspace.iter().map(|view| ("workspace".into(), view)));
        check.one_device(&written, &Gradient::named(&gradients))?
    };
    let key = |(id, step)| Key::new(seed, Stream::Sketch, id, step);
    let keys = tensor_ids.into_iter().zip(steps).map(key).collect();
    let args = Refresh { gradients, bases, vectors, outcomes, workspace, warm, keys, shapes };
    let cpu = |args: &mut Refresh, threads| refresh_on_cpu(check.op, args, threads);
    dispatch(py, check.op, device, args, cpu, cuda::refresh)
}

fn refresh_on_cpu(op: &'static str, args: &mut Refresh, threads: Threads) -> Result<()> {
    let Refresh { gradients, bases, vectors, outcomes, warm, keys, shapes, .. } = args;
    // SAFETY: contiguous float64 on the CPU, which overlaps nothing.
    let outcomes = unsafe { outcomes.as_mut_slice::<f64>() };
    let rows_of = outcomes.as_chunks_mut::<3>().0;
    for (i, (basis, vector)) in bases.iter_mut().zip(vectors).enumerate() {
        let (rows, columns, _) = shapes[i];
        // SAFETY: contiguous float32 on the CPU; they overlap nothing.
        let (basis, vector) =
            unsafe { (basis.as_mut_slice::<f32>(), vector.as_mut_slice::<f32>()) };
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let (a, elements) = match &gradients[i] {
            Gradient::Dense(grad) => {
                let grad = floats(op, grad)?.values(0, rows * columns, &mut first);
                (Source::Dense(Matrix::rows(grad, rows, columns)), Some(grad))
            }
            Gradient::Factors(factors) => {
                let [left, right] = factors.matrices(op, &mut first, &mut second)?;
                (Source::Factors { left: left.transposed(), right }, None)
            }
        };
        let a = if Side::of(rows, columns) == Side::Right { a } else { a.transposed() };
        let size = match elements {
            Some(elements) => Size::of_elements(threads, elements),
            None => Size::of_product(threads, a, keys[i]),
        };
        let outcome = refresh::refresh(threads, a, &size, basis, vector, warm[i], keys[i]);
        let refresh::Outcome { status, cosine, energy } = outcome;
        rows_of[i] = [f64::from(status as u8), f64::from(cosine), energy];
    }
    Ok(())
}
