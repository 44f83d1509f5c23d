//! What a tensor is inside this crate: a borrowed, typed, device-tagged view.

mod check;
mod dlpack;
mod dtype;
mod floats;

use std::fmt;

use pyo3::{Py, PyAny};

pub use check::Check;
pub use dlpack::{current_stream, out_of_memory, torch_num_threads};
pub use dtype::{DType, Element, Float};
pub use floats::{Floats, FloatsMut};

/// The highest number of dimensions a view may have.
pub const MAX_RANK: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    Cpu,
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// An argument as it came from Python: a view, or the reason why there is none.
///
/// The reason is reported by [`Check::input`] and [`Check::output`], which know the names of the
/// op and of the argument.
pub struct Arg(Result<TensorView, String>);

/// A tensor owned by the caller, borrowed for one call.
///
/// Shape and strides (in elements) are copies; only `data` points into the caller's memory. The
/// Python object outlives the call: pyo3 holds a function's arguments, and `owner` holds the
/// capsule of a producer that is not PyTorch.
pub struct TensorView {
    data: *mut u8,
    dtype: DType,
    device: Device,
    read_only: bool,
    rank: u8,
    shape: [usize; MAX_RANK],
    strides: [isize; MAX_RANK],
    _owner: Option<Py<PyAny>>,
}

// SAFETY: a view is a plain description; dereferencing it is what needs care, and is `unsafe`.
unsafe impl Send for TensorView {}
// SAFETY: as above; a shared view offers reads of plain fields only.
unsafe impl Sync for TensorView {}

impl TensorView {
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape[..usize::from(self.rank)]
    }

    pub fn strides(&self) -> &[isize] {
        &self.strides[..usize::from(self.rank)]
    }

    pub fn numel(&self) -> usize {
        self.shape().iter().product()
    }

    /// The address of the first element.
    pub fn ptr(&self) -> *const u8 {
        self.data
    }

    pub fn is_contiguous(&self) -> bool {
        if self.numel() == 0 {
            return true;
        }
        let mut want = 1isize;
        self.shape().iter().zip(self.strides()).rev().all(|(&n, &stride)| {
            let fits = n == 1 || stride == want;
            want *= n as isize;
            fits
        })
    }

    /// Contiguous in the strict sense: the strides are dense even where they do not matter.
    fn has_dense_strides(&self) -> bool {
        let mut want = 1isize;
        self.shape().iter().zip(self.strides()).rev().all(|(&n, &stride)| {
            let dense = stride == want;
            want *= n as isize;
            dense
        })
    }

    /// First and one-past-last address of the memory the elements lie in; empty for no elements.
    fn span(&self) -> (usize, usize) {
        let base = self.data as usize;
        if self.numel() == 0 {
            return (base, base);
        }
        let (mut low, mut high) = (0isize, 0isize);
        for (&n, &stride) in self.shape().iter().zip(self.strides()) {
            let reach = (n as isize - 1) * stride;
            low += reach.min(0);
            high += reach.max(0);
        }
        let size = self.dtype.size() as isize;
        (base.wrapping_add_signed(low * size), base.wrapping_add_signed((high + 1) * size))
    }

    /// The elements as a slice.
    ///
    /// # Safety
    /// The view is contiguous, on the CPU, of dtype `T`, and nobody writes to the memory while the
    /// slice is in use.
    pub unsafe fn as_slice<T: Element>(&self) -> &[T] {
        debug_assert!(self.device == Device::Cpu && self.dtype == T::DTYPE && self.is_contiguous());
        if self.numel() == 0 {
            return &[];
        }
        // SAFETY: by the caller's word the memory is readable and holds `numel` elements of `T`.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.numel()) }
    }
}

/// A [`TensorView`] the operation writes. The type makes a signature say which arguments change.
pub struct TensorViewMut(TensorView);

impl std::ops::Deref for TensorViewMut {
    type Target = TensorView;

    fn deref(&self) -> &TensorView {
        &self.0
    }
}

impl TensorViewMut {
    /// The address of the first element.
    pub fn ptr_mut(&mut self) -> *mut u8 {
        self.0.data
    }

    /// The elements as a mutable slice.
    ///
    /// # Safety
    /// The view is contiguous, on the CPU, of dtype `T`, and this is the only reference to its
    /// memory (see [`Check::disjoint`]).
    pub unsafe fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        debug_assert!(self.device == Device::Cpu && self.dtype == T::DTYPE && self.is_contiguous());
        if self.numel() == 0 {
            return &mut [];
        }
        // SAFETY: by the caller's word the memory is writable, unaliased, and holds `numel`
        // elements of `T`.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.numel()) }
    }
}
