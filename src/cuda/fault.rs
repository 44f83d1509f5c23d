//! What can go wrong in the CUDA runtime, before it is known for which op it worked.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;
use cudarc::nvrtc::result::NvrtcError;

use crate::error::Error;

pub type Result<T> = std::result::Result<T, Fault>;

#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("{0}")]
    Missing(String),
    /// Printed by its name, which needs no further call of the driver.
    #[error("{call} failed with {code:?}")]
    Driver { call: &'static str, code: CUresult },
    #[error("NVRTC {version} cannot compile {file} for sm_{architecture}:\n{log}")]
    Compile { version: String, file: String, architecture: u32, log: String },
    #[error("{0}")]
    Refused(String),
    #[error("the emulator: {0}")]
    Emulator(String),
    /// A panic of the bindings, such as a driver that lacks a function.
    #[error("the CUDA runtime gave up: {0}")]
    Panic(String),
}

impl Fault {
    /// The error of the op that met this fault.
    pub fn of(self, op: &'static str) -> Error {
        let what = self.to_string();
        match self {
            Self::Driver { code: CUresult::CUDA_ERROR_OUT_OF_MEMORY, .. } => {
                Error::OutOfMemory { op, what }
            }
            _ => Error::Runtime { op, what },
        }
    }
}

/// Names the call behind a driver's status.
pub fn driver<T>(call: &'static str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|DriverError(code)| Fault::Driver { call, code })
}

/// Names the call behind a status of NVRTC.
pub fn nvrtc<T>(call: &str, result: std::result::Result<T, NvrtcError>) -> Result<T> {
    result.map_err(|NvrtcError(code)| Fault::Refused(format!("{call} failed with {code:?}")))
}
