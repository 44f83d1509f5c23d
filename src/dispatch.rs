//! The one place where a device is chosen and the interpreter released.

use pyo3::marker::Ungil;
use pyo3::prelude::*;

use crate::cpu::threads::Threads;
use crate::error::{Error, Result};
use crate::tensor::{Device, torch_num_threads};

/// Runs `cpu` detached from the Python interpreter, on at most as many threads as PyTorch takes.
pub fn dispatch<T, F>(py: Python<'_>, op: &'static str, device: Device, cpu: F) -> PyResult<T>
where
    T: Ungil + Send,
    F: FnOnce(Threads) -> Result<T> + Ungil + Send,
{
    match device {
        Device::Cpu => {
            let threads = Threads::new(torch_num_threads(py)?);
            Ok(py.detach(|| cpu(threads))?)
        }
        Device::Cuda(_) => Err(Error::Device { op, device }.into()),
    }
}
