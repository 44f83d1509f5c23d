//! One threshold for many matrices: the keys of each are counted, and each is compared with it.

use pyo3::prelude::*;

use super::matrix::{self, BINS, SHIFTS, Ties, key_of, ordered};
use super::{Scored, cuda};
use crate::dispatch::dispatch;
use crate::error::Result;
use crate::match_float;
use crate::tensor::{Arg, Check, DType, TensorView, TensorViewMut};

/// Numbers that say where a selection is: the known bits of the threshold's key, then its rank
/// among those that have them, or how many keys that equal it are to be dropped, and of how many.
pub const STATE: usize = 3;

/// Elements of `workspace` of `select_below` for a matrix of so many.
#[pyfunction]
pub fn select_below_workspace(numel: usize) -> usize {
    numel.div_ceil(cuda::SPAN)
}

/// Elements of `workspace` of `select_matrix` for a matrix of so many.
#[pyfunction]
pub fn select_matrix_workspace(numel: usize) -> usize {
    STATE + BINS + select_below_workspace(numel)
}

/// The arguments of one count.
pub struct Histogram {
    pub scored: Scored,
    pub state: TensorView,
    pub counts: TensorViewMut,
    pub shift: usize,
}

/// Adds to `counts` (int64, 2048) how many scores' keys have which digit: the bits from `shift` on,
/// which is 21, 10 or 0, up to the next of them, of keys whose bits above are those of `state[0]`.
///
/// A key is the score's bits as an unsigned integer, in the order of the scores.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn score_histogram(
    py: Python<'_>,
    weight: Arg,
    scale: Option<Arg>,
    grad: Option<Arg>,
    state: Arg,
    counts: Arg,
    alpha: f32,
    given: bool,
    half: bool,
    shift: usize,
) -> PyResult<()> {
    const OP: &str = "score_histogram";
    let check = Check { op: OP };
    let scored = Scored::new(check, weight, scale, grad, alpha, given, half)?;
    let state = check.input("state", state)?;
    let counts = check.output("counts", counts)?;
    check.dtype("state", &state, DType::I64)?;
    check.shape("state", &state, &[STATE])?;
    check.contiguous("state", &state)?;
    check.dtype("counts", &counts, DType::I64)?;
    check.shape("counts", &counts, &[BINS])?;
    check.value("shift", SHIFTS.contains(&shift), "21, 10 or 0", shift)?;
    let read = [("state".into(), &state)];
    let device = scored.device(check, &[("counts".into(), &counts)], &read)?;
    let args = Histogram { scored, state, counts, shift };
    let cpu = |args: &mut Histogram, threads| {
        let Histogram { scored, state, counts, shift } = args;
        // SAFETY: on the CPU, contiguous, of these dtypes, and disjoint.
        let (score, state, counts) =
            unsafe { (scored.score(), state.as_slice::<i64>(), counts.as_mut_slice::<i64>()) };
        match_float!(scored.weight, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            let weights = unsafe { scored.weight.as_slice::<T>() };
            matrix::score_histogram(threads, weights, score, state[0] as u32, *shift, counts);
            Ok(())
        })
    };
    dispatch(py, OP, device, args, cpu, cuda::score_histogram)
}

/// The arguments of one comparison.
pub struct Below {
    pub scored: Scored,
    pub state: TensorViewMut,
    pub mask: TensorViewMut,
    pub nan: TensorViewMut,
    pub workspace: TensorViewMut,
}

/// Marks in `mask` (uint8) the scores whose keys are above `state[0]`, and those that equal it but
/// for the first `state[1]` of them, of the `state[2]` that this matrix and the following have.
///
/// Both numbers are decreased by what this matrix has; they stay where none is dropped, or all.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn select_below(
    py: Python<'_>,
    weight: Arg,
    scale: Option<Arg>,
    grad: Option<Arg>,
    state: Arg,
    mask: Arg,
    nan: Arg,
    workspace: Arg,
    alpha: f32,
    given: bool,
    half: bool,
) -> PyResult<()> {
    const OP: &str = "select_below";
    let check = Check { op: OP };
    let scored = Scored::new(check, weight, scale, grad, alpha, given, half)?;
    let (state, mask) = (check.output("state", state)?, check.output("mask", mask)?);
    let (nan, workspace) = (check.output("nan", nan)?, check.output("workspace", workspace)?);
    check.dtype("state", &state, DType::I64)?;
    check.shape("state", &state, &[STATE])?;
    check.dtype("mask", &mask, DType::U8)?;
    check.shape("mask", &mask, &[scored.rows, scored.columns])?;
    check.dtype("nan", &nan, DType::I64)?;
    check.shape("nan", &nan, &[1])?;
    check.dtype("workspace", &workspace, DType::I64)?;
    check.shape("workspace", &workspace, &[select_below_workspace(scored.weight.numel())])?;
    let written = [
        ("state".into(), &state),
        ("mask".into(), &mask),
        ("nan".into(), &nan),
        ("workspace".into(), &workspace),
    ];
    let device = scored.device(check, &written, &[])?;
    let args = Below { scored, state, mask, nan, workspace };
    let cpu = |args: &mut Below, threads| -> Result<()> {
        let Below { scored, state, mask, nan, .. } = args;
        // SAFETY: on the CPU, contiguous, of these dtypes, and disjoint.
        let (score, state, mask, nan) = unsafe {
            let state = state.as_mut_slice::<i64>();
            (scored.score(), state, mask.as_mut_slice::<u8>(), nan.as_mut_slice::<i64>())
        };
        let mut ties = Ties {
            key: key_of(state[0] as u32),
            dropped: state[1].max(0) as usize,
            equal: state[2].max(0) as usize,
        };
        let found = match_float!(scored.weight, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            let weights = unsafe { scored.weight.as_slice::<T>() };
            Ok(matrix::select_below(threads, weights, score, &mut ties, mask))
        })?;
        state.copy_from_slice(&[
            i64::from(ordered(ties.key)),
            ties.dropped as i64,
            ties.equal as i64,
        ]);
        nan[0] += found as i64;
        Ok(())
    };
    dispatch(py, OP, device, args, cpu, cuda::select_below)
}
