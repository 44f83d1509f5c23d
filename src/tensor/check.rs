//! Checks on the arguments of one operation. Every op starts with these, before any dispatch.

use super::{Arg, DType, Device, TensorView, TensorViewMut};
use crate::error::{Error, Name, Result};

/// The checks of one op; every message begins with its name.
#[derive(Clone, Copy)]
pub struct Check {
    pub op: &'static str,
}

impl Check {
    /// The view behind an argument that is read.
    pub fn input(&self, name: impl Into<Name>, arg: Arg) -> Result<TensorView> {
        arg.0.map_err(|reason| Error::NotTensor { op: self.op, name: name.into(), reason })
    }

    /// The view behind an argument that is written; it must be contiguous.
    pub fn output(&self, name: impl Into<Name>, arg: Arg) -> Result<TensorViewMut> {
        let name = name.into();
        let view = self.input(name, arg)?;
        if view.read_only {
            return Err(Error::ReadOnly { op: self.op, name });
        }
        self.contiguous(name, &view)?;
        Ok(TensorViewMut(view))
    }

    pub fn inputs(&self, name: &'static str, args: Vec<Arg>) -> Result<Vec<TensorView>> {
        args.into_iter().enumerate().map(|(i, arg)| self.input((name, i), arg)).collect()
    }

    pub fn outputs(&self, name: &'static str, args: Vec<Arg>) -> Result<Vec<TensorViewMut>> {
        args.into_iter().enumerate().map(|(i, arg)| self.output((name, i), arg)).collect()
    }

    pub fn dtype(&self, name: impl Into<Name>, t: &TensorView, want: DType) -> Result<()> {
        self.dtype_in(name, t, &[want], want.name())
    }

    /// `expected` spells the allowed dtypes out for the message.
    pub fn dtype_in(
        &self,
        name: impl Into<Name>,
        t: &TensorView,
        allowed: &[DType],
        expected: &'static str,
    ) -> Result<()> {
        if allowed.contains(&t.dtype) {
            return Ok(());
        }
        Err(Error::DType { op: self.op, name: name.into(), expected, got: t.dtype })
    }

    /// One of the dtypes whose arithmetic is float32.
    pub fn float(&self, name: impl Into<Name>, t: &TensorView) -> Result<()> {
        let allowed = [DType::F32, DType::F16, DType::BF16];
        self.dtype_in(name, t, &allowed, "float32, float16 or bfloat16")
    }

    pub fn shape(&self, name: impl Into<Name>, t: &TensorView, want: &[usize]) -> Result<()> {
        if t.shape() == want {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op,
            name: name.into(),
            expected: want.to_vec(),
            got: t.shape().to_vec(),
        })
    }

    /// A tensor of one element, whatever its number of dimensions.
    pub fn scalar(&self, name: impl Into<Name>, t: &TensorView, want: DType) -> Result<()> {
        let name = name.into();
        self.dtype(name, t, want)?;
        if t.numel() == 1 {
            return Ok(());
        }
        Err(Error::Rank { op: self.op, name, expected: "one element", got: t.shape().to_vec() })
    }

    /// The shape of a matrix.
    pub fn matrix(&self, name: impl Into<Name>, t: &TensorView) -> Result<(usize, usize)> {
        match *t.shape() {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(Error::Rank {
                op: self.op,
                name: name.into(),
                expected: "two dimensions",
                got: t.shape().to_vec(),
            }),
        }
    }

    pub fn contiguous(&self, name: impl Into<Name>, t: &TensorView) -> Result<()> {
        if t.is_contiguous() {
            return Ok(());
        }
        Err(Error::NotContiguous {
            op: self.op,
            name: name.into(),
            shape: t.shape().to_vec(),
            strides: t.strides().to_vec(),
        })
    }

    /// `name` must hold one entry for each of the `expected` entries of `of`.
    pub fn length(
        &self,
        name: &'static str,
        got: usize,
        of: &'static str,
        expected: usize,
    ) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(Error::Length { op: self.op, name: name.into(), of, expected, got })
    }

    /// A scalar's range; `expected` says it in words.
    pub fn value(
        &self,
        name: &'static str,
        ok: bool,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Result<()> {
        if ok {
            return Ok(());
        }
        Err(Error::Value { op: self.op, name, expected: expected.into(), got: got.to_string() })
    }

    /// The one device of all tensors.
    pub fn same_device(&self, tensors: &[(Name, &TensorView)]) -> Result<Device> {
        let Some((_, first)) = tensors.first() else { return Ok(Device::Cpu) };
        match tensors.iter().find(|(_, t)| t.device != first.device) {
            None => Ok(first.device),
            Some((name, t)) => Err(Error::DeviceMismatch {
                op: self.op,
                name: *name,
                left: first.device,
                right: t.device,
            }),
        }
    }

    /// The one device of a call whose written tensors overlap nothing.
    pub fn one_device(
        &self,
        written: &[(Name, &TensorViewMut)],
        read: &[(Name, &TensorView)],
    ) -> Result<Device> {
        self.disjoint(written, read)?;
        let written = written.iter().map(|&(name, t)| (name, &**t));
        let all: Vec<_> = written.chain(read.iter().copied()).collect();
        self.same_device(&all)
    }

    /// No written tensor may share memory with any other tensor of the call.
    pub fn disjoint(
        &self,
        written: &[(Name, &TensorViewMut)],
        read: &[(Name, &TensorView)],
    ) -> Result<()> {
        let mut spans: Vec<(usize, usize, Name, bool)> =
            Vec::with_capacity(written.len() + read.len());
        let write = written.iter().map(|&(name, t)| (name, &**t, true));
        for (name, t, is_written) in write.chain(read.iter().map(|&(name, t)| (name, t, false))) {
            let (start, end) = t.span();
            if start < end {
                spans.push((start, end, name, is_written));
            }
        }
        spans.sort_unstable_by_key(|&(start, ..)| start);
        // The reach of what came before, once over all tensors and once over the written ones.
        let mut any: Option<(usize, Name)> = None;
        let mut out: Option<(usize, Name)> = None;
        for (start, end, name, is_written) in spans {
            let clash = if is_written { any } else { out };
            if let Some((reach, other)) = clash
                && start < reach
            {
                let (name, other) = if is_written { (name, other) } else { (other, name) };
                return Err(Error::Overlap { op: self.op, name, other });
            }
            if any.is_none_or(|(reach, _)| end > reach) {
                any = Some((end, name));
            }
            if is_written && out.is_none_or(|(reach, _)| end > reach) {
                out = Some((end, name));
            }
        }
        Ok(())
    }
}
