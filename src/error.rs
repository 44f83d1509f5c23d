//! The one error type, and the one place where it becomes a Python exception.

use std::fmt;

use pyo3::PyErr;
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};

use crate::tensor::{DType, Device, out_of_memory};

pub type Result<T> = std::result::Result<T, Error>;

/// An argument's name, with its place when it is one of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    pub base: &'static str,
    pub index: Option<usize>,
}

impl From<&'static str> for Name {
    fn from(base: &'static str) -> Self {
        Self { base, index: None }
    }
}

impl From<(&'static str, usize)> for Name {
    fn from((base, index): (&'static str, usize)) -> Self {
        Self { base, index: Some(index) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            None => f.write_str(self.base),
            Some(i) => write!(f, "{}[{i}]", self.base),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{op}: {name} must be a tensor, {reason}")]
    NotTensor { op: &'static str, name: Name, reason: String },
    #[error("{op}: {name} must have dtype {expected}, got {got}")]
    DType { op: &'static str, name: Name, expected: &'static str, got: DType },
    #[error("{op}: {name} must have shape {expected:?}, got {got:?}")]
    Shape { op: &'static str, name: Name, expected: Vec<usize>, got: Vec<usize> },
    #[error("{op}: {name} must have {expected}, got shape {got:?}")]
    Rank { op: &'static str, name: Name, expected: &'static str, got: Vec<usize> },
    #[error("{op}: {name} must hold {expected} tensors, one for each of {of}, got {got}")]
    Length { op: &'static str, name: Name, of: &'static str, expected: usize, got: usize },
    #[error("{op}: {name} must be contiguous, got strides {strides:?} for shape {shape:?}")]
    NotContiguous { op: &'static str, name: Name, shape: Vec<usize>, strides: Vec<isize> },
    #[error("{op}: {name} is written and must not be read-only")]
    ReadOnly { op: &'static str, name: Name },
    #[error("{op}: {name} is written and shares memory with {other}")]
    Overlap { op: &'static str, name: Name, other: Name },
    #[error("{op}: all tensors must be on one device, got {name} on {right} beside {left}")]
    DeviceMismatch { op: &'static str, name: Name, left: Device, right: Device },
    #[error("{op}: {name} must be {expected}, got {got}")]
    Value { op: &'static str, name: &'static str, expected: String, got: String },
    #[error("{op}: not implemented for {dtype} on {device}")]
    Unsupported { op: &'static str, device: Device, dtype: DType },
    #[error("{op}: {what}")]
    Runtime { op: &'static str, what: String },
    #[error("{op}: {what}")]
    OutOfMemory { op: &'static str, what: String },
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::NotTensor { .. } | Error::DType { .. } => PyTypeError::new_err(text),
            Error::Shape { .. }
            | Error::Rank { .. }
            | Error::Length { .. }
            | Error::NotContiguous { .. }
            | Error::ReadOnly { .. }
            | Error::Overlap { .. }
            | Error::DeviceMismatch { .. }
            | Error::Value { .. } => PyValueError::new_err(text),
            Error::Unsupported { .. } => PyNotImplementedError::new_err(text),
            Error::Runtime { .. } => PyRuntimeError::new_err(text),
            Error::OutOfMemory { .. } => out_of_memory(text),
        }
    }
}
