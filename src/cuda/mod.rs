//! The CUDA runtime: devices shared with PyTorch, borrowed streams, compiled modules, one launch
//! path. No algorithm lives here, no memory is allocated on a device, nothing waits for one.

mod arena;
mod blas;
mod cache;
mod driver;
pub mod emulator;
mod fault;
mod launch;
pub mod list;
mod nvrtc;
mod sources;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::error::Result;
pub use arena::Arena;
pub use blas::{Gemm, WORKSPACE as BLAS_WORKSPACE};
use emulator::Emulator;
use fault::Fault;
pub use launch::{Args, Module, Parameter, Pointer, Shape};

/// Entries of a list in a kernel's parameters, unless the device takes fewer.
pub const DEFAULT_LIST_CAPACITY: usize = 400;

enum Target {
    Device(driver::Borrowed),
    Emulated(Arc<Emulator>),
}

/// Where kernels are launched for one call of an op. There is no other way to launch one.
pub struct Stream {
    op: &'static str,
    target: Target,
}

impl Stream {
    /// A stream of PyTorch's: its device is the current one as long as the value lives.
    ///
    /// # Safety
    /// `raw` is a live stream of device `ordinal`, or 0 for the default one, and stays so.
    pub unsafe fn borrow(op: &'static str, ordinal: usize, raw: usize) -> Result<Self> {
        // SAFETY: by the caller's word.
        let borrowed = unsafe { driver::Borrowed::new(ordinal, raw) };
        Ok(Self { op, target: Target::Device(borrowed.map_err(|fault| fault.of(op))?) })
    }

    /// The test device.
    pub fn emulated(op: &'static str, emulator: Arc<Emulator>) -> Self {
        Self { op, target: Target::Emulated(emulator) }
    }

    /// The op that launches here, for messages.
    pub fn op(&self) -> &'static str {
        self.op
    }

    /// How many entries a list in a kernel's parameters has.
    pub fn list_capacity(&self) -> usize {
        match &self.target {
            Target::Device(device) => device.list_capacity(),
            Target::Emulated(emulator) => emulator.list_capacity,
        }
    }

    /// Compiles and loads a kernel, so that its first launch does not.
    pub fn load(&self, module: Module, kernel: &'static str) -> Result<()> {
        match &self.target {
            Target::Device(device) => {
                device.function(module, kernel).map(drop).map_err(|fault| fault.of(self.op))
            }
            Target::Emulated(_) => Ok(()),
        }
    }

    /// Readies the vendor's library for products, where there is one.
    pub fn load_blas(&self) -> Result<()> {
        match &self.target {
            Target::Device(device) => device.load_blas().map_err(|fault| fault.of(self.op)),
            Target::Emulated(_) => Ok(()),
        }
    }

    /// Launches a product by the vendor's library; false where there is none, or it does not take
    /// such sizes. The emulator has none: kernels of this crate stand in.
    ///
    /// # Safety
    /// The matrices and the workspace are on this stream's device, of these sizes, and `out`
    /// overlaps none.
    pub unsafe fn multiply(&self, gemm: Gemm) -> Result<bool> {
        match &self.target {
            Target::Device(device) => {
                // SAFETY: by the caller's word.
                let done = unsafe { device.multiply(gemm) };
                done.map_err(|fault| fault.of(self.op))
            }
            Target::Emulated(_) => Ok(false),
        }
    }

    /// Launches a kernel and returns at once; a grid without blocks launches nothing.
    ///
    /// # Safety
    /// The arguments are those of the kernel (`kernels/README.md`), and what they point to is on
    /// this stream's device and large enough for the grid.
    pub unsafe fn launch(
        &self,
        module: Module,
        kernel: &'static str,
        shape: Shape,
        mut args: Args,
    ) -> Result<()> {
        if shape.is_empty() {
            return Ok(());
        }
        let done = shape.check().and_then(|shape| {
            let mut pointers = args.pointers();
            match &self.target {
                // SAFETY: by the caller's word; `args` outlives the launch, which copies it.
                Target::Device(device) => unsafe {
                    device.launch(module, kernel, shape, &mut pointers)
                },
                // SAFETY: as above.
                Target::Emulated(emulator) => unsafe {
                    emulator.launch(module, kernel, shape, args.kinds(), &mut pointers)
                },
            }
        });
        done.map_err(|fault| fault.of(self.op))
    }
}

/// The machine code of a module, from the cache or from the compiler.
fn image(module: Module, device: u32, list_capacity: usize) -> fault::Result<Vec<u8>> {
    let Module { file, .. } = module;
    let source =
        sources::find(file).ok_or_else(|| Fault::Refused(format!("no source named {file}")))?;
    let architecture = nvrtc::architecture_for(device)?;
    let options = nvrtc::options(architecture, &module.defines(list_capacity));
    let version = nvrtc::version_text()?;
    let texts = sources::HEADERS.iter().chain([source]).flat_map(|s| [s.file, s.text]);
    let parts = [env!("CARGO_PKG_VERSION"), &version].into_iter();
    let key = cache::key(parts.chain(options.iter().map(String::as_str)).chain(texts));
    let family = file.trim_end_matches(".cu").replace('/', "-");
    let name = format!("{family}-sm{architecture}-{key}.cubin");
    let path = cache::folder().map(|folder| folder.join(name));
    if let Some(image) = path.as_deref().and_then(cache::load) {
        return Ok(image);
    }
    let image = nvrtc::compile(source, sources::HEADERS, architecture, &options)?;
    if let Some(path) = path {
        cache::store(&path, &image);
    }
    Ok(image)
}

/// Compiles a module into the cache; needs NVRTC, but no device. Returns its size in bytes.
pub fn compile(op: &'static str, module: Module, architecture: u32) -> Result<usize> {
    let image = guarded(|| image(module, architecture, DEFAULT_LIST_CAPACITY));
    image.map(|image| image.len()).map_err(|fault| fault.of(op))
}

/// Finds out whether there are devices, without a panic where there is no driver.
pub fn probe(op: &'static str) -> Result<usize> {
    guarded(driver::probe).map_err(|fault| fault.of(op))
}

/// What [`probe`] finds, and the compiler, as text.
pub fn status() -> String {
    let devices = guarded(|| {
        let count = driver::probe()?;
        let names: Vec<String> = (0..count)
            .map(|i| Ok(format!("cuda:{i} (sm_{})", driver::architecture(i)?)))
            .collect::<fault::Result<_>>()?;
        let version = driver::version()?;
        let list = if count == 0 { "no devices".into() } else { names.join(", ") };
        Ok(format!("{list}; driver for CUDA {}.{}", version / 1000, version % 1000 / 10))
    });
    let compiler = guarded(|| nvrtc::version_text().map(|version| format!("NVRTC {version}")));
    let text = |found: fault::Result<String>| found.unwrap_or_else(|fault| fault.to_string());
    format!("{}; {}", text(devices), text(compiler))
}

/// Runs `work` so that a panic of the bindings is a fault: a second line, behind the probes.
fn guarded<T>(work: impl FnOnce() -> fault::Result<T>) -> fault::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Fault::Panic(text.unwrap_or("no message").into()))
    })
}

/// As [`guarded`], for the CUDA half of an op.
pub fn run<T>(op: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    guarded(|| Ok(work())).unwrap_or_else(|fault| Err(fault.of(op)))
}
