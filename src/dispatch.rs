//! The one place where a device is chosen and the interpreter released.

use pyo3::marker::Ungil;
use pyo3::prelude::*;

use crate::cpu::threads::Threads;
use crate::cuda::{self, Stream, emulator};
use crate::error::{Error, Result};
use crate::tensor::{Device, current_stream, torch_num_threads};

/// Runs the half of an op that fits the device, detached from the Python interpreter.
///
/// `cpu` gets as many threads as PyTorch takes. `cuda` gets PyTorch's current stream of the
/// tensors' device, where its work waits its turn: nothing here waits for a device. Both halves
/// work on `args`, of which only one is run.
pub fn dispatch<A, T, C, G>(
    py: Python<'_>,
    op: &'static str,
    device: Device,
    mut args: A,
    cpu: C,
    cuda: G,
) -> PyResult<T>
where
    A: Ungil + Send,
    T: Ungil + Send,
    C: FnOnce(&mut A, Threads) -> Result<T> + Ungil + Send,
    G: FnOnce(&mut A, &Stream) -> Result<T> + Ungil + Send,
{
    let args = &mut args;
    match device {
        Device::Cpu => match emulator::active() {
            None => {
                let threads = Threads::new(torch_num_threads(py)?);
                Ok(py.detach(|| cpu(args, threads))?)
            }
            Some(emulator) => Ok(py.detach(|| cuda(args, &Stream::emulated(op, emulator)))?),
        },
        Device::Cuda(ordinal) => {
            // First, because PyTorch's own complaint names neither the op nor the remedy.
            cuda::probe(op)?;
            let raw = current_stream(py, ordinal).map_err(|error| Error::Runtime {
                op,
                what: format!("PyTorch gives no stream of {device}: {}", error.value(py)),
            })?;
            let work = || {
                // SAFETY: PyTorch keeps its streams alive until the process ends.
                let stream = unsafe { Stream::borrow(op, ordinal, raw) }?;
                cuda(args, &stream)
            };
            Ok(py.detach(|| cuda::run(op, work))?)
        }
    }
}
