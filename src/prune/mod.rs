//! Pruning: how much weights matter, which of them stay, and what the others' loss costs the rest.

pub mod columns;
pub mod cpu;
pub mod cuda;
pub mod gradients;
pub mod matrix;
pub mod score;
pub mod select;
pub mod threshold;

use pyo3::prelude::*;

use crate::dispatch::dispatch;
use crate::error::{Name, Result};
use crate::match_float;
use crate::tensor::{Arg, Check, DType, Device, TensorView, TensorViewMut};
use columns::{Block, Pattern};
use matrix::Drop;
use score::{Kind, Score};

pub use gradients::accumulate_gradients;
pub use threshold::{
    score_histogram, select_below, select_below_workspace, select_matrix_workspace,
};

/// The most columns of a block of `prune_columns`.
const MOST_COLUMNS: usize = 256;

/// Weights and what they are scored by.
pub struct Scored {
    weight: TensorView,
    scale: Option<TensorView>,
    grad: Option<TensorView>,
    alpha: f32,
    kind: Kind,
    rows: usize,
    columns: usize,
}

impl Scored {
    #[allow(clippy::too_many_arguments)]
    fn new(
        check: Check,
        weight: Arg,
        scale: Option<Arg>,
        grad: Option<Arg>,
        alpha: f32,
        given: bool,
        half: bool,
    ) -> Result<Self> {
        let weight = check.input("weight", weight)?;
        let scale = scale.map(|arg| check.input("scale", arg)).transpose()?;
        let grad = grad.map(|arg| check.input("grad", arg)).transpose()?;
        check.float("weight", &weight)?;
        let (rows, columns) = check.matrix("weight", &weight)?;
        check.contiguous("weight", &weight)?;
        if let Some(scale) = &scale {
            check.dtype("scale", scale, DType::F32)?;
            check.shape("scale", scale, &[columns])?;
            check.contiguous("scale", scale)?;
        }
        if let Some(grad) = &grad {
            check.dtype("grad", grad, DType::F32)?;
            check.shape("grad", grad, &[rows, columns])?;
            check.contiguous("grad", grad)?;
        }
        check.value("alpha", alpha >= 0.0 && alpha.is_finite(), "finite and at least 0", alpha)?;
        check.value(
            "given",
            !given || (scale.is_none() && grad.is_none()),
            "false beside a scale or a gradient",
            given,
        )?;
        let kind = match (given, half && grad.is_some()) {
            (true, _) => Kind::Given,
            (false, true) => Kind::Half,
            (false, false) => Kind::Weight,
        };
        Ok(Self { weight, scale, grad, alpha, kind, rows, columns })
    }

    /// # Safety
    /// The tensors are on the CPU, and nobody writes to them.
    unsafe fn score<'a>(&'a self) -> Score<'a> {
        // SAFETY: by the caller's word; dtype and strides were checked.
        let values = |tensor: Option<&'a TensorView>| unsafe {
            tensor.map(|tensor| tensor.as_slice::<f32>()).unwrap_or_default()
        };
        Score {
            kind: self.kind,
            columns: self.columns.max(1),
            scale: values(self.scale.as_ref()),
            grad: values(self.grad.as_ref()),
            alpha: self.alpha,
        }
    }

    /// The one device of this, of written tensors, which overlap nothing, and of others.
    fn device(
        &self,
        check: Check,
        written: &[(Name, &TensorViewMut)],
        others: &[(Name, &TensorView)],
    ) -> Result<Device> {
        let mut read: Vec<(Name, &TensorView)> = vec![("weight".into(), &self.weight)];
        read.extend(others);
        read.extend(self.scale.as_ref().map(|t| (Name::from("scale"), t)));
        read.extend(self.grad.as_ref().map(|t| (Name::from("grad"), t)));
        check.one_device(written, &read)
    }
}

/// Writes the scores of a matrix: `|weight|`, times `scale` of the column plus `alpha |grad|`.
///
/// `half` rounds the gradient's product to float16 and leaves `alpha` out, as the papers' code.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn score_weights(
    py: Python<'_>,
    weight: Arg,
    scale: Option<Arg>,
    grad: Option<Arg>,
    out: Arg,
    alpha: f32,
    half: bool,
) -> PyResult<()> {
    const OP: &str = "score_weights";
    let check = Check { op: OP };
    let scored = Scored::new(check, weight, scale, grad, alpha, false, half)?;
    let out = check.output("out", out)?;
    check.dtype("out", &out, DType::F32)?;
    check.shape("out", &out, &[scored.rows, scored.columns])?;
    let device = scored.device(check, &[("out".into(), &out)], &[])?;
    let cpu = |(scored, out): &mut (Scored, TensorViewMut), threads| {
        // SAFETY: on the CPU, contiguous float32, and disjoint.
        let (score, out) = unsafe { (scored.score(), out.as_mut_slice()) };
        match_float!(scored.weight, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            let weights = unsafe { scored.weight.as_slice::<T>() };
            cpu::score_weights(threads, weights, score, out);
            Ok(())
        })
    };
    dispatch(py, OP, device, (scored, out), cpu, cuda::score_weights)
}

/// Among which weights the least are dropped.
pub enum Among {
    Row,
    Matrix { through: bool, workspace: TensorViewMut },
    Columns { size: usize },
}

/// The arguments of one selection.
pub struct Selection {
    scored: Scored,
    among: Among,
    drop: usize,
    mask: TensorViewMut,
    nan: TensorViewMut,
}

fn select(
    py: Python<'_>,
    op: &'static str,
    scored: Scored,
    among: Among,
    drop: usize,
    mask: Arg,
    nan: Arg,
) -> PyResult<()> {
    let check = Check { op };
    let (of, most) = match &among {
        Among::Row => ("from 0 to the number of columns", scored.columns),
        Among::Matrix { workspace, .. } => {
            let numel = scored.weight.numel();
            check.dtype("workspace", workspace, DType::I64)?;
            check.shape("workspace", workspace, &[select_matrix_workspace(numel)])?;
            ("from 0 to the number of elements", numel)
        }
        &Among::Columns { size } => {
            let whole = size > 0 && scored.columns.is_multiple_of(size);
            check.value("size", whole, format!("a divisor of {} columns", scored.columns), size)?;
            ("from 0 to size", size)
        }
    };
    check.value("drop", drop <= most, of, drop)?;
    let mask = check.output("mask", mask)?;
    check.dtype("mask", &mask, DType::U8)?;
    check.shape("mask", &mask, &[scored.rows, scored.columns])?;
    let nan = check.output("nan", nan)?;
    check.dtype("nan", &nan, DType::I64)?;
    check.shape("nan", &nan, &[1])?;
    let mut written: Vec<(Name, _)> = vec![("mask".into(), &mask), ("nan".into(), &nan)];
    if let Among::Matrix { workspace, .. } = &among {
        written.push(("workspace".into(), workspace));
    }
    let device = scored.device(check, &written, &[])?;
    let args = Selection { scored, among, drop, mask, nan };
    let cpu = move |args: &mut Selection, threads| {
        let Selection { scored, among, drop, mask, nan } = args;
        let drop = *drop;
        // SAFETY: on the CPU, contiguous, of these dtypes, and disjoint.
        let (score, mask, nan) =
            unsafe { (scored.score(), mask.as_mut_slice::<u8>(), nan.as_mut_slice::<i64>()) };
        let found = match_float!(scored.weight, op, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            let weights = unsafe { scored.weight.as_slice::<T>() };
            Ok(match among {
                Among::Row => cpu::select_rows(threads, weights, score, drop, mask),
                Among::Matrix { through, .. } => {
                    let drop = Drop { count: drop, through: *through };
                    matrix::select_matrix(threads, weights, score, drop, mask)
                }
                &mut Among::Columns { size } => {
                    cpu::select_groups(threads, weights, score, size, drop, mask)
                }
            })
        })?;
        nan[0] += found as i64;
        Ok(())
    };
    dispatch(py, op, device, args, cpu, cuda::select)
}

/// Marks in `mask` (uint8) all but the `drop` least scores of every row, of equal ones the later.
///
/// `given` takes `weight` for the scores themselves. A score that is not a number is kept like an
/// infinite one, and `nan` (int64) increased by one.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn select_rows(
    py: Python<'_>,
    weight: Arg,
    scale: Option<Arg>,
    grad: Option<Arg>,
    mask: Arg,
    nan: Arg,
    alpha: f32,
    given: bool,
    half: bool,
    drop: usize,
) -> PyResult<()> {
    const OP: &str = "select_rows";
    let scored = Scored::new(Check { op: OP }, weight, scale, grad, alpha, given, half)?;
    select(py, OP, scored, Among::Row, drop, mask, nan)
}

/// The same among all weights of a matrix; `through` drops one more, and all that equal the last.
///
/// `workspace` (int64) holds zeros, as many as `select_matrix_workspace` says.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn select_matrix(
    py: Python<'_>,
    weight: Arg,
    scale: Option<Arg>,
    grad: Option<Arg>,
    mask: Arg,
    nan: Arg,
    workspace: Arg,
    alpha: f32,
    given: bool,
    half: bool,
    drop: usize,
    through: bool,
) -> PyResult<()> {
    const OP: &str = "select_matrix";
    let scored = Scored::new(Check { op: OP }, weight, scale, grad, alpha, given, half)?;
    let workspace = Check { op: OP }.output("workspace", workspace)?;
    select(py, OP, scored, Among::Matrix { through, workspace }, drop, mask, nan)
}

/// The same among every `size` consecutive columns of a row.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn select_groups(
    py: Python<'_>,
    weight: Arg,
    scale: Option<Arg>,
    grad: Option<Arg>,
    mask: Arg,
    nan: Arg,
    alpha: f32,
    given: bool,
    half: bool,
    drop: usize,
    size: usize,
) -> PyResult<()> {
    const OP: &str = "select_groups";
    let scored = Scored::new(Check { op: OP }, weight, scale, grad, alpha, given, half)?;
    select(py, OP, scored, Among::Columns { size }, drop, mask, nan)
}

/// The arguments of one block of columns.
pub struct Columns {
    factor: TensorView,
    weight: TensorViewMut,
    mask: TensorViewMut,
    errors: TensorViewMut,
    loss: TensorViewMut,
    pattern: Pattern,
}

/// Zeroes weights of a block of columns, one column after the other, and adds what later columns
/// of the block make up for it; `factor` is the block of the upper Cholesky factor of the inverse
/// Hessian.
///
/// Where `mask` is 0 a weight goes; with `size` the mask is written: all but the `drop` least of
/// `|weight| / factor[j, j]` in every `size` columns, at the time the first of them is reached.
/// `errors` gets what the columns after the block have to make up for, `loss` the sum of their
/// squares in each row.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn prune_columns(
    py: Python<'_>,
    weight: Arg,
    factor: Arg,
    mask: Arg,
    errors: Arg,
    loss: Arg,
    size: Option<usize>,
    drop: usize,
) -> PyResult<()> {
    const OP: &str = "prune_columns";
    let check = Check { op: OP };
    let weight = check.output("weight", weight)?;
    let factor = check.input("factor", factor)?;
    let (mask, errors) = (check.output("mask", mask)?, check.output("errors", errors)?);
    let loss = check.output("loss", loss)?;
    check.dtype("weight", &weight, DType::F32)?;
    let (rows, width) = check.matrix("weight", &weight)?;
    let allowed = format!("at most {MOST_COLUMNS} columns wide");
    check.value("weight", width <= MOST_COLUMNS, allowed, width)?;
    check.dtype("factor", &factor, DType::F32)?;
    check.shape("factor", &factor, &[width, width])?;
    check.contiguous("factor", &factor)?;
    check.dtype("mask", &mask, DType::U8)?;
    check.shape("mask", &mask, &[rows, width])?;
    check.dtype("errors", &errors, DType::F32)?;
    check.shape("errors", &errors, &[rows, width])?;
    check.dtype("loss", &loss, DType::F32)?;
    check.shape("loss", &loss, &[rows])?;
    let pattern = match size {
        None => Pattern::Given,
        Some(size) => {
            let whole = size > 0 && width.is_multiple_of(size);
            check.value("size", whole, format!("a divisor of {width} columns"), size)?;
            check.value("drop", drop <= size, "from 0 to size", drop)?;
            Pattern::Groups { size, drop }
        }
    };
    let device = check.one_device(
        &[
            ("weight".into(), &weight),
            ("mask".into(), &mask),
            ("errors".into(), &errors),
            ("loss".into(), &loss),
        ],
        &[("factor".into(), &factor)],
    )?;
    let args = Columns { factor, weight, mask, errors, loss, pattern };
    let cpu = |args: &mut Columns, threads| {
        let Columns { factor, weight, mask, errors, loss, pattern } = args;
        let width = factor.shape()[0];
        // SAFETY: on the CPU, contiguous, of these dtypes, and disjoint.
        let (factor, block) = unsafe {
            let block = Block {
                weight: weight.as_mut_slice(),
                mask: mask.as_mut_slice(),
                errors: errors.as_mut_slice(),
                loss: loss.as_mut_slice(),
            };
            (factor.as_slice(), block)
        };
        columns::prune_columns(threads, width, factor, *pattern, block);
        Ok(())
    };
    dispatch(py, OP, device, args, cpu, cuda::prune_columns)
}
