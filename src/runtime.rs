//! What the extension says about itself, and the switches that tests and users may set.

use std::collections::BTreeSet;
use std::path::PathBuf;

use pyo3::prelude::*;

use crate::cpu::openmp;
use crate::cpu::simd::{self, Level};
use crate::cuda::emulator::{self, Emulator};
use crate::cuda::{self, Module, Stream};
use crate::dispatch::dispatch;
use crate::error::Result;
use crate::tensor::{Check, Device};
use crate::{lowrank, optim, prune, quant};

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

/// Says that PyTorch's threads belong to this process. Called when the package is imported: a fork
/// from then on has none of them, and does not wait for them.
#[pyfunction]
pub fn own_threads() {
    openmp::belong_to_this_process();
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

/// Every module that the CUDA halves of the ops may need, with its kernels.
fn modules() -> Vec<(Module, Vec<&'static str>)> {
    let families = [
        quant::cuda::kernels(),
        optim::cuda::kernels(),
        lowrank::cuda::kernels(),
        prune::cuda::kernels(),
    ];
    let mut list: Vec<(Module, Vec<_>)> = Vec::new();
    for (module, names) in families.concat() {
        match list.iter_mut().find(|(known, _)| *known == module) {
            Some((_, known)) => known.extend(names),
            None => list.push((module, names.to_vec())),
        }
    }
    list
}

/// Every module that the CUDA halves of the ops may need: file of `kernels/`, defines, kernels.
#[pyfunction]
pub fn kernel_modules() -> Vec<(String, Vec<String>, Vec<&'static str>)> {
    let text = |(module, names): (Module, Vec<&'static str>)| {
        (module.file.into(), module.defines(cuda::DEFAULT_LIST_CAPACITY), names)
    };
    modules().into_iter().map(text).collect()
}

/// The modules of some files of `kernels/`, or all of them, each once with its kernels.
fn modules_of(
    op: &'static str,
    files: Option<Vec<String>>,
) -> Result<Vec<(Module, Vec<&'static str>)>> {
    let mut list = modules();
    let Some(files) = files else { return Ok(list) };
    let check = Check { op };
    for file in &files {
        let known = list.iter().any(|(module, _)| module.file == file);
        let names: BTreeSet<_> = list.iter().map(|(module, _)| module.file).collect();
        check.value("files", known, format!("some of {names:?}"), file)?;
    }
    list.retain(|(module, _)| files.iter().any(|file| file == module.file));
    Ok(list)
}

/// Compiles and loads kernels for CUDA device `ordinal`: those of some files, or all of them.
#[pyfunction]
#[pyo3(signature = (ordinal, files=None))]
pub fn warmup(py: Python<'_>, ordinal: usize, files: Option<Vec<String>>) -> PyResult<()> {
    let modules = modules_of("warmup", files)?;
    let load = |modules: &mut Vec<(Module, Vec<&'static str>)>, stream: &Stream| {
        stream.load_blas()?;
        modules.iter().try_for_each(|(module, names)| {
            names.iter().try_for_each(|name| stream.load(*module, name))
        })
    };
    dispatch(py, "warmup", Device::Cuda(ordinal), modules, |_, _| Ok(()), load)
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
    let modules = modules_of(OP, files)?;
    let compile = |(module, _): (Module, _)| {
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
