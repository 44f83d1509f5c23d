//! The driver: devices, primary contexts, loaded modules, and the launch itself.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::result::{self, ctx, device, function, module, primary_ctx};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute};

use super::blas::{self, Gemm};
use super::fault::{Fault, Result, driver};
use super::launch::{Checked, Module};
use super::{DEFAULT_LIST_CAPACITY, image};

/// Dynamic shared memory beyond this has to be asked for.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;
/// Drivers before CUDA 12.1 take 4 KiB of parameters, which is less than a full list.
const LARGE_PARAMETERS_SINCE: i32 = 12_010;
const SMALL_LIST_CAPACITY: usize = 48;

/// A pointer of the driver's.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Handle<T>(*mut T);

// SAFETY: the driver's handles may be used from every thread; nothing here looks behind them.
unsafe impl<T> Send for Handle<T> {}

/// A device whose primary context, the one that PyTorch uses, is kept until the process ends: if it
/// were released, PyTorch's memory would go with it.
#[derive(Clone, Copy)]
struct Device {
    context: Handle<sys::CUctx_st>,
    architecture: u32,
    list_capacity: usize,
}

#[derive(Default)]
struct State {
    devices: HashMap<usize, Device>,
    modules: HashMap<(usize, Module), Handle<sys::CUmod_st>>,
    functions: HashMap<(usize, Module, &'static str), Handle<sys::CUfunc_st>>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

/// Never held while something is compiled or loaded.
fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of devices, found without a panic on a machine that has no driver.
///
/// Only success is remembered: a library that is loaded later is found.
pub fn probe() -> Result<usize> {
    static COUNT: OnceLock<usize> = OnceLock::new();
    if let Some(&count) = COUNT.get() {
        return Ok(count);
    }
    // SAFETY: loads and unloads a library by name, no more. Without this check the bindings panic.
    if !unsafe { sys::is_culib_present() } {
        let what = "no CUDA driver was found (libcuda.so.1); the CPU kernels do not need it";
        return Err(Fault::Missing(what.into()));
    }
    driver("cuInit", result::init())?;
    let count = driver("cuDeviceGetCount", device::get_count())?;
    Ok(*COUNT.get_or_init(|| usize::try_from(count).unwrap_or(0)))
}

/// The driver's CUDA version, as in 12080.
pub fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: `version` is writable.
    driver("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
    Ok(version)
}

/// The architecture of a device, as in 90 for `sm_90`; needs no context.
pub fn architecture(ordinal: usize) -> Result<u32> {
    let id = driver("cuDeviceGet", device::get(ordinal as i32))?;
    let number = |attribute| {
        // SAFETY: `id` comes from `cuDeviceGet`.
        let result = unsafe { device::get_attribute(id, attribute) };
        driver("cuDeviceGetAttribute", result)
    };
    let major = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok((10 * major + minor) as u32)
}

fn open(ordinal: usize) -> Result<Device> {
    if let Some(&device) = state().devices.get(&ordinal) {
        return Ok(device);
    }
    let count = probe()?;
    if ordinal >= count {
        let what = format!("there is no device cuda:{ordinal}, only {count} in all");
        return Err(Fault::Missing(what));
    }
    let id = driver("cuDeviceGet", device::get(ordinal as i32))?;
    let list_capacity = match version()? >= LARGE_PARAMETERS_SINCE {
        true => DEFAULT_LIST_CAPACITY,
        false => SMALL_LIST_CAPACITY,
    };
    let architecture = architecture(ordinal)?;
    // SAFETY: `id` comes from `cuDeviceGet`. A context that two threads retain is the same one.
    let context = driver("cuDevicePrimaryCtxRetain", unsafe { primary_ctx::retain(id) })?;
    let device = Device { context: Handle(context), architecture, list_capacity };
    state().devices.insert(ordinal, device);
    Ok(device)
}

/// A stream of somebody else's, whose device's context is current as long as this lives.
pub struct Borrowed {
    ordinal: usize,
    device: Device,
    stream: sys::CUstream,
    /// What was current before, where that was something else.
    previous: Option<sys::CUcontext>,
}

impl Borrowed {
    /// # Safety
    /// `stream` is a live stream of this device, or null for its default one, and stays so.
    pub unsafe fn new(ordinal: usize, stream: usize) -> Result<Self> {
        let device = open(ordinal)?;
        let current = driver("cuCtxGetCurrent", ctx::get_current())?;
        let current = current.unwrap_or(std::ptr::null_mut());
        let mut borrowed =
            Self { ordinal, device, stream: stream as sys::CUstream, previous: None };
        if current != device.context.0 {
            // SAFETY: a primary context that is never released.
            driver("cuCtxSetCurrent", unsafe { ctx::set_current(device.context.0) })?;
            borrowed.previous = Some(current);
        }
        Ok(borrowed)
    }

    pub fn list_capacity(&self) -> usize {
        self.device.list_capacity
    }

    pub fn load_blas(&self) -> Result<()> {
        blas::load(self.ordinal)
    }

    /// # Safety
    /// As for [`blas::multiply`].
    pub unsafe fn multiply(&self, gemm: Gemm) -> Result<bool> {
        // SAFETY: by the caller's word; this device's context is current.
        unsafe { blas::multiply(self.ordinal, self.stream, gemm) }
    }

    /// The kernel's handle; its module is compiled and loaded when it is used for the first time.
    pub fn function(&self, module: Module, kernel: &'static str) -> Result<sys::CUfunction> {
        let key = (self.ordinal, module, kernel);
        if let Some(function) = state().functions.get(&key) {
            return Ok(function.0);
        }
        let name = CString::new(kernel).map_err(|e| Fault::Refused(e.to_string()))?;
        let handle = self.load(module)?;
        // SAFETY: the module stays loaded until the process ends.
        let result = unsafe { module::get_function(handle, name) };
        let function = driver("cuModuleGetFunction", result)?;
        state().functions.insert(key, Handle(function));
        Ok(function)
    }

    fn load(&self, module: Module) -> Result<sys::CUmodule> {
        let key = (self.ordinal, module);
        if let Some(handle) = state().modules.get(&key) {
            return Ok(handle.0);
        }
        let Device { architecture, list_capacity, .. } = self.device;
        let image = image(module, architecture, list_capacity)?;
        // SAFETY: a whole cubin, which the driver copies.
        let result = unsafe { module::load_data(image.as_ptr().cast()) };
        let fresh = driver("cuModuleLoadData", result)?;
        // Where two threads loaded it, the first one's stays and the other is of no use.
        let kept = state().modules.entry(key).or_insert(Handle(fresh)).0;
        if kept != fresh {
            // SAFETY: nobody has seen this one.
            driver("cuModuleUnload", unsafe { module::unload(fresh) })?;
        }
        Ok(kept)
    }

    /// # Safety
    /// `arguments` are those of the kernel, which may be run with them.
    pub unsafe fn launch(
        &self,
        module: Module,
        kernel: &'static str,
        shape: Checked,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let function = self.function(module, kernel)?;
        let Checked { grid: [gx, gy, gz], block: [bx, by, bz], shared } = shape;
        if shared > SHARED_WITHOUT_ASKING {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a live function.
            let result =
                unsafe { function::set_function_attribute(function, attribute, shared as i32) };
            driver("cuFuncSetAttribute", result)?;
        }
        // SAFETY: a live function and stream of the current context; the rest by the caller's word.
        let result = unsafe {
            result::launch_kernel(
                function,
                (gx, gy, gz),
                (bx, by, bz),
                shared,
                self.stream,
                arguments,
            )
        };
        driver("cuLaunchKernel", result)
    }
}

impl Drop for Borrowed {
    /// PyTorch reads its current device off the current context, so that has to be as it was.
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // SAFETY: it was current on this thread when this value was made.
            let _ = unsafe { ctx::set_current(previous) };
        }
    }
}
