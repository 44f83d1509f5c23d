//! What the extension says about itself, and the switches that tests and users may set.

use pyo3::prelude::*;

use crate::cpu::simd::{self, Level};
use crate::tensor::Check;

/// The instruction set the CPU kernels use: "scalar", "avx2" or "avx512".
#[pyfunction]
pub fn simd_level() -> &'static str {
    simd::level().name()
}

/// The instruction sets that this processor offers.
#[pyfunction]
pub fn simd_levels() -> Vec<&'static str> {
    Level::ALL.into_iter().filter(|level| level.is_available()).map(Level::name).collect()
}

/// Makes the CPU kernels use an instruction set that this processor offers.
#[pyfunction]
pub fn set_simd_level(level: &str) -> PyResult<()> {
    let check = Check { op: "set_simd_level" };
    let known = Level::from_name(level).filter(|level| level.is_available());
    check.value("level", known.is_some(), format!("one of {:?}", simd_levels()), level)?;
    if let Some(level) = known {
        simd::set_level(level);
    }
    Ok(())
}

/// The version of the native core.
#[pyfunction]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}
