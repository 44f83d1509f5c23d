//! The bases of a call: float32, or the codes that `quantize_blockwise` made of them.

use std::borrow::Cow;

use super::{Side, named};
use crate::cpu::threads::Threads;
use crate::error::{Name, Result};
use crate::quant::cpu::dequantize_blockwise;
use crate::quant::grid::Format;
use crate::quant::{bytes, check_grids};
use crate::tensor::{Arg, Check, DType, TensorView};

/// What codes come with: scales, zero points (none for symmetric codes), bits, and group size.
pub type Grids = (Vec<Arg>, Vec<Arg>, u8, usize);

/// How codes stand for numbers.
#[derive(Clone, Copy)]
pub struct Packing {
    pub format: Format,
    pub group_size: usize,
}

pub struct Bases {
    pub values: Vec<TensorView>,
    pub scales: Vec<TensorView>,
    pub zero_points: Vec<TensorView>,
    /// None for float32.
    pub packing: Option<Packing>,
}

impl Bases {
    /// Checks what does not depend on shapes; without grids the bases are float32.
    pub fn new(check: Check, bases: Vec<Arg>, grids: Option<Grids>) -> Result<Self> {
        let values = check.inputs("bases", bases)?;
        let Some((scales, zero_points, bits, group_size)) = grids else {
            return Ok(Self { values, scales: vec![], zero_points: vec![], packing: None });
        };
        let scales = check.inputs("basis_scales", scales)?;
        let zero_points = check.inputs("basis_zero_points", zero_points)?;
        check.value("basis_bits", bits == 8 || bits == 4, "4 or 8", bits)?;
        check.length("basis_scales", scales.len(), "bases", values.len())?;
        if !zero_points.is_empty() {
            check.length("basis_zero_points", zero_points.len(), "bases", values.len())?;
        }
        let format = Format { bits, symmetric: zero_points.is_empty() };
        let packing = Some(Packing { format, group_size });
        Ok(Self { values, scales, zero_points, packing })
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Every tensor with its name.
    pub fn named(&self) -> impl Iterator<Item = (Name, &TensorView)> {
        let grids = named("basis_scales", &self.scales)
            .chain(named("basis_zero_points", &self.zero_points));
        named("bases", &self.values).chain(grids)
    }

    /// The rank of basis `i`, which must be `[min(rows, columns), rank]`; of codes, which may be
    /// packed, `projected` tells the rank.
    pub fn rank(
        &self,
        check: Check,
        i: usize,
        rows: usize,
        columns: usize,
        projected: (Name, &TensorView),
    ) -> Result<usize> {
        let (name, basis) = (("bases", i), &self.values[i]);
        let short = rows.min(columns);
        let Some(Packing { format, group_size }) = self.packing else {
            return check_basis(check, i, basis, rows, columns);
        };
        let (first, second) = check.matrix(projected.0, projected.1)?;
        let rank = if Side::of(rows, columns) == Side::Right { second } else { first };
        check_rank(check, rank, short)?;
        let signed = format.symmetric && format.bits == 8;
        check.dtype(name, basis, if signed { DType::I8 } else { DType::U8 })?;
        let stored = match format.bits {
            4 => vec![(short * rank).div_ceil(2)],
            _ => vec![short, rank],
        };
        check.shape(name, basis, &stored)?;
        let (scale, zero_point) = (&self.scales[i], self.zero_points.get(i));
        check_grids(check, scale, zero_point, short * rank, group_size)?;
        for (name, view) in [("bases", Some(basis)), ("basis_scales", Some(scale))]
            .into_iter()
            .chain([("basis_zero_points", zero_point)])
        {
            view.iter().try_for_each(|view| check.contiguous((name, i), view))?;
        }
        Ok(rank)
    }

    /// The numbers of basis `i`, `[short, rank]` by rows, on the CPU.
    ///
    /// # Safety
    /// As for [`TensorView::as_slice`], after [`Self::rank`].
    pub unsafe fn numbers(
        &self,
        threads: Threads,
        i: usize,
        short: usize,
        rank: usize,
    ) -> Cow<'_, [f32]> {
        let basis = &self.values[i];
        let Some(Packing { format, group_size }) = self.packing else {
            // SAFETY: by the caller's word; float32 as checked.
            return Cow::Borrowed(unsafe { basis.as_slice() });
        };
        // SAFETY: by the caller's word; of these dtypes as checked.
        let (codes, scale, zero_point) = unsafe {
            let zero_point = self.zero_points.get(i).map(|t| t.as_slice()).unwrap_or_default();
            (bytes(basis), self.scales[i].as_slice(), zero_point)
        };
        let mut out = vec![0f32; short * rank];
        dequantize_blockwise(threads, codes, scale, zero_point, format, group_size, &mut out);
        Cow::Owned(out)
    }
}

fn check_rank(check: Check, rank: usize, short: usize) -> Result<()> {
    check.value("rank", rank >= 1 && rank <= short, format!("from 1 to {short}"), rank)
}

/// The rank of float32 basis `i`, which must be `[min(rows, columns), rank]`.
pub fn check_basis(
    check: Check,
    i: usize,
    basis: &TensorView,
    rows: usize,
    columns: usize,
) -> Result<usize> {
    let name = ("bases", i);
    check.dtype(name, basis, DType::F32)?;
    check.contiguous(name, basis)?;
    let (_, rank) = check.matrix(name, basis)?;
    let short = rows.min(columns);
    check.shape(name, basis, &[short, rank])?;
    check_rank(check, rank, short)?;
    Ok(rank)
}
