//! Gradients of weights as products of what a backward pass has at hand: those with respect to a
//! layer's outputs, and the layer's inputs.

use pyo3::prelude::*;

use super::bases::{Bases, Grids};
use super::source::product;
use super::{Side, check_workspace, cuda, floats, named};
use crate::cpu::product::{Matrix, multiply};
use crate::cpu::threads::Threads;
use crate::dispatch::dispatch;
use crate::error::{Name, Result};
use crate::tensor::{Arg, Check, DType, TensorView, TensorViewMut};

/// A gradient `grad_output^T input`, which is never formed.
pub struct Factored {
    /// `[tokens, rows]`
    pub grad_output: TensorView,
    /// `[tokens, columns]`
    pub input: TensorView,
}

impl Factored {
    pub fn shape(&self) -> (usize, usize) {
        (self.grad_output.shape()[1], self.input.shape()[1])
    }

    pub fn tokens(&self) -> usize {
        self.input.shape()[0]
    }

    pub fn named(&self, i: usize) -> [(Name, &TensorView); 2] {
        [(("grad_outputs", i).into(), &self.grad_output), (("inputs", i).into(), &self.input)]
    }

    /// Both factors in float32 on the CPU, widened into the buffers only where they have to be.
    pub fn matrices<'a>(
        &'a self,
        op: &'static str,
        first: &'a mut Vec<f32>,
        second: &'a mut Vec<f32>,
    ) -> Result<[Matrix<'a>; 2]> {
        let (tokens, (rows, columns)) = (self.tokens(), self.shape());
        let left = floats(op, &self.grad_output)?.values(0, tokens * rows, first);
        let right = floats(op, &self.input)?.values(0, tokens * columns, second);
        Ok([Matrix::rows(left, tokens, rows), Matrix::rows(right, tokens, columns)])
    }
}

/// Checks the factors of gradients.
pub fn check_factors(
    check: Check,
    grad_outputs: Vec<Arg>,
    inputs: Vec<Arg>,
) -> Result<Vec<Factored>> {
    let grad_outputs = check.inputs("grad_outputs", grad_outputs)?;
    let inputs = check.inputs("inputs", inputs)?;
    check.length("inputs", inputs.len(), "grad_outputs", grad_outputs.len())?;
    let mut factors = Vec::with_capacity(inputs.len());
    for (i, (grad_output, input)) in grad_outputs.into_iter().zip(inputs).enumerate() {
        check.float(("grad_outputs", i), &grad_output)?;
        for (name, view) in [("grad_outputs", &grad_output), ("inputs", &input)] {
            check.contiguous((name, i), view)?;
            check.matrix((name, i), view)?;
        }
        check.dtype(("inputs", i), &input, grad_output.dtype())?;
        let tokens = grad_output.shape()[0];
        check.value("tokens", tokens >= 1, "at least 1", tokens)?;
        check.shape(("inputs", i), &input, &[tokens, input.shape()[1]])?;
        factors.push(Factored { grad_output, input });
    }
    Ok(factors)
}

/// The arguments of a projection of products.
pub struct ProjectFactors {
    pub factors: Vec<Factored>,
    pub bases: Bases,
    pub outs: Vec<TensorViewMut>,
    pub workspace: Option<TensorViewMut>,
    /// Rows, columns, rank.
    pub shapes: Vec<(usize, usize, usize)>,
}

/// `project` of gradients that are products, ``grad_outputs.T @ inputs``, and never formed.
///
/// `grad_outputs` (`[tokens, m]`) and `inputs` (`[tokens, n]`) have one dtype. For m >= n an output
/// is `grad_outputs.T @ (inputs @ basis)`; otherwise `(grad_outputs @ basis).T @ inputs`.
/// `workspace` (uint8) has the size of `project_factors_workspace` on devices.
#[pyfunction]
#[pyo3(signature = (grad_outputs, inputs, bases, outs, basis_grids=None, workspace=None))]
pub fn project_factors(
    py: Python<'_>,
    grad_outputs: Vec<Arg>,
    inputs: Vec<Arg>,
    bases: Vec<Arg>,
    outs: Vec<Arg>,
    basis_grids: Option<Grids>,
    workspace: Option<Arg>,
) -> PyResult<()> {
    const OP: &str = "project_factors";
    let check = Check { op: OP };
    let factors = check_factors(check, grad_outputs, inputs)?;
    let bases = Bases::new(check, bases, basis_grids)?;
    let outs = check.outputs("outs", outs)?;
    let workspace = check_workspace(check, workspace)?;
    check.length("bases", bases.len(), "grad_outputs", factors.len())?;
    check.length("outs", outs.len(), "grad_outputs", factors.len())?;
    let mut shapes = Vec::with_capacity(factors.len());
    for (i, (factors, out)) in factors.iter().zip(&outs).enumerate() {
        let (rows, columns) = factors.shape();
        let rank = bases.rank(check, i, rows, columns, (("outs", i).into(), out))?;
        check.dtype(("outs", i), out, DType::F32)?;
        check.shape(("outs", i), out, &Side::projected(rows, columns, rank))?;
        shapes.push((rows, columns, rank));
    }
    let device = {
        let mut written: Vec<_> = named("outs", &outs).collect();
        written.extend(workspace.iter().map(|view| ("workspace".into(), view)));
        let factors = factors.iter().enumerate().flat_map(|(i, factors)| factors.named(i));
        let read: Vec<_> = factors.chain(bases.named()).collect();
        check.one_device(&written, &read)?
    };
    let cpu = |args: &mut ProjectFactors, threads| project_on_cpu(OP, args, threads);
    let args = ProjectFactors { factors, bases, outs, workspace, shapes };
    dispatch(py, OP, device, args, cpu, cuda::project_factors)
}

fn project_on_cpu(op: &'static str, args: &mut ProjectFactors, threads: Threads) -> Result<()> {
    let ProjectFactors { factors, bases, outs, shapes, .. } = args;
    for (i, (factors, out)) in factors.iter().zip(outs).enumerate() {
        let (rows, columns, rank) = shapes[i];
        let short = rows.min(columns);
        // SAFETY: on the CPU, and nothing writes to it.
        let basis = unsafe { bases.numbers(threads, i, short, rank) };
        let basis = Matrix::rows(&basis, short, rank);
        // SAFETY: contiguous float32 on the CPU; the outputs overlap nothing.
        let out = unsafe { out.as_mut_slice::<f32>() };
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let [grad_output, input] = factors.matrices(op, &mut first, &mut second)?;
        let tokens = factors.tokens();
        match Side::of(rows, columns) {
            Side::Right => {
                let inner = product(threads, input, basis);
                let inner = Matrix::rows(&inner, tokens, rank);
                multiply(threads, grad_output.transposed(), inner, out);
            }
            Side::Left => {
                let inner = product(threads, grad_output, basis);
                let inner = Matrix::rows(&inner, tokens, rank);
                multiply(threads, inner.transposed(), input, out);
            }
        }
    }
    Ok(())
}
