//! What the extension says about itself, and the switches that tests and users may set.

use std::collections::BTreeSet;
use std::path::PathBuf;

use pyo3::prelude::*;

use crate::cpu::simd::{self, Level};
use crate::cuda::emulator::{self, Emulator};
use crate::cuda::{self, Module, Stream};
use crate::dispatch::dispatch;
use crate::tensor::{Check, Device};
use crate::{lowrank, optim, quant};

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

/// Devices, driver and compiler of CUDA, or why there are none, as text.
#[pyfunction]
pub fn cuda_status(py: Python<'_>) -> String {
    py.detach(cuda::status)
}

/// Every module with kernels of it; some modules come twice.
fn kernels() -> Vec<(Module, &'static [&'static str])> {
    [quant::cuda::kernels(), optim::cuda::kernels(), lowrank::cuda::kernels()].concat()
}

/// Every module that the CUDA halves of the ops may need: file of `kernels/`, defines, kernels.
#[pyfunction]
pub fn kernel_modules() -> Vec<(String, Vec<String>, Vec<String>)> {
    let mut list: Vec<(Module, Vec<String>)> = Vec::new();
    for (module, names) in kernels() {
        let names = names.iter().map(ToString::to_string);
        match list.iter_mut().find(|(known, _)| *known == module) {
            Some((_, known)) => known.extend(names),
            None => list.push((module, names.collect())),
        }
    }
    let text = |(module, names): (Module, _)| {
        (module.file.into(), module.defines(cuda::DEFAULT_LIST_CAPACITY), names)
    };
    list.into_iter().map(text).collect()
}

/// Compiles and loads all kernels for CUDA device `ordinal`.
#[pyfunction]
pub fn warmup(py: Python<'_>, ordinal: usize) -> PyResult<()> {
    let load = |_: &mut (), stream: &Stream| {
        kernels().into_iter().try_for_each(|(module, names)| {
            names.iter().try_for_each(|name| stream.load(module, name))
        })
    };
    dispatch(py, "warmup", Device::Cuda(ordinal), (), |_, _| Ok(()), load)
}

/// Compiles modules for `sm_{architecture}` into the cache, for which no device is needed.
///
/// `files` of `kernels/` are compiled, or all of them. Returns the file, the defines and the size
/// of each module.
#[pyfunction]
#[pyo3(signature = (architecture, files=None))]
pub fn compile_kernels(
    py: Python<'_>,
    architecture: u32,
    files: Option<Vec<String>>,
) -> PyResult<Vec<(String, Vec<String>, usize)>> {
    const OP: &str = "compile_kernels";
    let mut modules: Vec<Module> = Vec::new();
    for (module, _) in kernels() {
        if !modules.contains(&module) {
            modules.push(module);
        }
    }
    if let Some(files) = files {
        let check = Check { op: OP };
        for file in &files {
            let known = modules.iter().any(|module| module.file == file);
            let names: BTreeSet<_> = modules.iter().map(|module| module.file).collect();
            check.value("files", known, format!("some of {names:?}"), file)?;
        }
        modules.retain(|module| files.iter().any(|file| file == module.file));
    }
    let compile = |module: Module| {
        let size = cuda::compile(OP, module, architecture)?;
        Ok((module.file.into(), module.defines.iter().map(ToString::to_string).collect(), size))
    };
    py.detach(|| modules.into_iter().map(compile).collect())
}

/// Makes ops on CPU tensors take their CUDA half, on kernels compiled for the CPU: for tests.
///
/// `build` is called with a file of `kernels/` and defines, and returns the path of a library that
/// `tests/emulator/build.py` made; None switches back. `order` and `seed` decide which thread runs
/// when (the emulator's README); `list_capacity` is how many tensors one launch takes.
#[pyfunction]
#[pyo3(signature = (build, order=0, seed=0, list_capacity=cuda::DEFAULT_LIST_CAPACITY))]
pub fn set_emulator(
    build: Option<Py<PyAny>>,
    order: i32,
    seed: u32,
    list_capacity: usize,
) -> PyResult<()> {
    let check = Check { op: "set_emulator" };
    check.value("list_capacity", list_capacity > 0, "at least 1", list_capacity)?;
    emulator::set(build.map(|build| {
        let call = move |file: &str, defines: &[String]| {
            let path = Python::attach(|py| {
                build.call1(py, (file, defines.to_vec()))?.extract::<PathBuf>(py)
            });
            path.map_err(|error| error.to_string())
        };
        Emulator::new(Box::new(call), order, seed, list_capacity)
    }));
    Ok(())
}
