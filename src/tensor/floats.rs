//! Slices of any of the float dtypes, for kernels whose arguments mix them.

use half::{bf16, f16};

use super::{DType, Float, TensorView, TensorViewMut};

/// Elements that are read.
#[derive(Clone, Copy)]
pub enum Floats<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// Elements that are written.
pub enum FloatsMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    BF16(&'a mut [bf16]),
}

impl<'a> Floats<'a> {
    /// The elements of a view; none when its dtype is not one of these.
    ///
    /// # Safety
    /// As for [`TensorView::as_slice`], but for the dtype.
    pub unsafe fn of(view: &'a TensorView) -> Option<Self> {
        // SAFETY: by the caller's word, and the dtype is matched.
        unsafe {
            Some(match view.dtype() {
                DType::F32 => Self::F32(view.as_slice()),
                DType::F16 => Self::F16(view.as_slice()),
                DType::BF16 => Self::BF16(view.as_slice()),
                _ => return None,
            })
        }
    }

    pub fn split_at(self, middle: usize) -> (Self, Self) {
        match self {
            Self::F32(x) => (Self::F32(&x[..middle]), Self::F32(&x[middle..])),
            Self::F16(x) => (Self::F16(&x[..middle]), Self::F16(&x[middle..])),
            Self::BF16(x) => (Self::BF16(&x[..middle]), Self::BF16(&x[middle..])),
        }
    }

    /// `count` elements from `first` on, widened into `buffer` only where they have to be.
    pub fn values<'b>(self, first: usize, count: usize, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        if let Self::F32(x) = self {
            return &x[first..first + count];
        }
        buffer.resize(count, 0.0);
        self.widen(first, buffer);
        buffer
    }

    /// The elements from `first` on, as many as `out` holds, widened.
    pub fn widen(self, first: usize, out: &mut [f32]) {
        let range = first..first + out.len();
        match self {
            Self::F32(x) => f32::widen(&x[range], out),
            Self::F16(x) => f16::widen(&x[range], out),
            Self::BF16(x) => bf16::widen(&x[range], out),
        }
    }
}

impl<'a> FloatsMut<'a> {
    /// The elements of a view; none when its dtype is not one of these.
    ///
    /// # Safety
    /// As for [`TensorViewMut::as_mut_slice`], but for the dtype.
    pub unsafe fn of(view: &'a mut TensorViewMut) -> Option<Self> {
        // SAFETY: by the caller's word, and the dtype is matched.
        unsafe {
            Some(match view.dtype() {
                DType::F32 => Self::F32(view.as_mut_slice()),
                DType::F16 => Self::F16(view.as_mut_slice()),
                DType::BF16 => Self::BF16(view.as_mut_slice()),
                _ => return None,
            })
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::BF16(x) => x.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn split_at(self, middle: usize) -> (Self, Self) {
        match self {
            Self::F32(x) => {
                let (a, b) = x.split_at_mut(middle);
                (Self::F32(a), Self::F32(b))
            }
            Self::F16(x) => {
                let (a, b) = x.split_at_mut(middle);
                (Self::F16(a), Self::F16(b))
            }
            Self::BF16(x) => {
                let (a, b) = x.split_at_mut(middle);
                (Self::BF16(a), Self::BF16(b))
            }
        }
    }

    /// As [`Floats::widen`].
    pub fn widen(&self, first: usize, out: &mut [f32]) {
        match self {
            Self::F32(x) => Floats::F32(x).widen(first, out),
            Self::F16(x) => Floats::F16(x).widen(first, out),
            Self::BF16(x) => Floats::BF16(x).widen(first, out),
        }
    }

    /// Stores `values` from `first` on, rounded to nearest.
    pub fn narrow(&mut self, first: usize, values: &[f32]) {
        let range = first..first + values.len();
        match self {
            Self::F32(x) => f32::narrow(values, &mut x[range]),
            Self::F16(x) => f16::narrow(values, &mut x[range]),
            Self::BF16(x) => bf16::narrow(values, &mut x[range]),
        }
    }
}
