//! A device for tests: the CUDA kernels compiled for the CPU (`tests/emulator/`).
//!
//! While it is switched on, every op takes the CUDA half for tensors on the CPU: the same grids and
//! arguments, through the same launch path, with the last call exchanged.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use libloading::Library;

use super::fault::{Fault, Result};
use super::launch::{Checked, Kind, Module};

/// Builds a file with defines as a shared library and says where that is.
pub type Build = dyn Fn(&str, &[String]) -> std::result::Result<PathBuf, String> + Send + Sync;

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    c_uint,
    *mut *mut c_void,
    c_int,
    c_uint,
) -> *const c_char;
type SignatureFn = unsafe extern "C" fn(*const c_char) -> *const c_char;

#[derive(Clone, Copy)]
struct Entries {
    launch: LaunchFn,
    signature: SignatureFn,
}

pub struct Emulator {
    pub build: Box<Build>,
    /// Which thread goes on where several can; see the emulator's README.
    pub order: i32,
    pub seed: u32,
    /// Fewer than on devices show that long lists are cut.
    pub list_capacity: usize,
    libraries: Mutex<HashMap<Module, Entries>>,
}

static ACTIVE: RwLock<Option<Arc<Emulator>>> = RwLock::new(None);

/// The emulator in use.
pub fn active() -> Option<Arc<Emulator>> {
    ACTIVE.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Switches the emulator on, or off.
pub fn set(emulator: Option<Emulator>) {
    *ACTIVE.write().unwrap_or_else(PoisonError::into_inner) = emulator.map(Arc::new);
}

impl Emulator {
    pub fn new(build: Box<Build>, order: i32, seed: u32, list_capacity: usize) -> Self {
        Self { build, order, seed, list_capacity, libraries: Mutex::default() }
    }

    fn entries(&self, module: Module) -> Result<Entries> {
        let lock = || self.libraries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&entries) = lock().get(&module) {
            return Ok(entries);
        }
        // The lock is not held: building calls Python, which may wait for another thread.
        let defines = module.defines(self.list_capacity);
        let path = (self.build)(module.file, &defines).map_err(Fault::Emulator)?;
        let entries = open(&path).map_err(Fault::Emulator)?;
        lock().insert(module, entries);
        Ok(entries)
    }

    /// # Safety
    /// `arguments` are those of the kernel, which may be run with them. Their kinds are compared
    /// with the kernel's own parameters first.
    pub unsafe fn launch(
        &self,
        module: Module,
        kernel: &'static str,
        shape: Checked,
        kinds: impl Iterator<Item = Kind>,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let Entries { launch, signature } = self.entries(module)?;
        let name = CString::new(kernel).map_err(|e| Fault::Emulator(e.to_string()))?;
        // SAFETY: a name that ends with a zero; the result lives until this thread's next call.
        if let Some(signature) = unsafe { text(signature(name.as_ptr())) } {
            compare(kernel, &signature, kinds).map_err(Fault::Emulator)?;
        }
        let Checked { grid, block, shared } = shape;
        let (grid, block) = (grid.as_ptr(), block.as_ptr());
        let (order, seed) = (self.order, self.seed);
        // SAFETY: the argument layout of `cuLaunchKernel`, by the caller's word and as compared.
        let message = unsafe {
            let arguments = arguments.as_mut_ptr();
            text(launch(name.as_ptr(), grid, block, shared, arguments, order, seed))
        };
        message.map_or(Ok(()), |message| Err(Fault::Emulator(message)))
    }
}

/// # Safety
/// Null, or a string that ends with a zero and lives until it is copied here.
unsafe fn text(raw: *const c_char) -> Option<String> {
    // SAFETY: by the caller's word.
    (!raw.is_null()).then(|| unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned())
}

/// Opens a library for good: it installs handlers of signals, which outlive it.
fn open(path: &Path) -> std::result::Result<Entries, String> {
    // The loader's own words are the cause of its error.
    let text = |error: libloading::Error| match std::error::Error::source(&error) {
        Some(cause) => format!("{}: {error}: {cause}", path.display()),
        None => format!("{}: {error}", path.display()),
    };
    // SAFETY: a library of `tests/emulator/`, whose initialization has no requirements.
    let library = unsafe { Library::new(path) }.map_err(text)?;
    // SAFETY: the type is that of its interface (runtime/launch.cpp).
    let launch = unsafe { library.get::<LaunchFn>(b"cuemu_launch\0") }.map(|f| *f).map_err(text)?;
    // SAFETY: as above.
    let signature = unsafe { library.get::<SignatureFn>(b"cuemu_signature\0") };
    let signature = signature.map(|f| *f).map_err(text)?;
    std::mem::forget(library);
    Ok(Entries { launch, signature })
}

/// Arguments against the kernel's parameters, written as `p4 f4 i8`; size 0 fits every pointer.
fn compare(
    kernel: &str,
    signature: &str,
    kinds: impl Iterator<Item = Kind>,
) -> std::result::Result<(), String> {
    let given: Vec<String> = kinds.map(|Kind(kind, n)| format!("{}{n}", kind as char)).collect();
    let wanted: Vec<&str> = signature.split_whitespace().collect();
    let fits = |(given, wanted): (&String, &&str)| {
        given == wanted
            || (given.starts_with('p') && wanted.starts_with('p') && {
                given.len() == 2 && (given == "p0" || *wanted == "p0")
            })
    };
    if given.len() == wanted.len() && given.iter().zip(&wanted).all(fits) {
        return Ok(());
    }
    Err(format!("{kernel} takes ({signature}), and is given ({})", given.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_compared_with_parameters() {
        let kinds = |list: &[(char, usize)]| -> Vec<Kind> {
            list.iter().map(|&(kind, size)| Kind(kind as u8, size)).collect()
        };
        let compare =
            |list: &[(char, usize)]| compare("f", "p4 p0 i8 s16", kinds(list).into_iter());
        assert!(compare(&[('p', 4), ('p', 1), ('i', 8), ('s', 16)]).is_ok());
        assert!(compare(&[('p', 0), ('p', 0), ('i', 8), ('s', 16)]).is_ok());
        for wrong in [
            &[('p', 2), ('p', 1), ('i', 8), ('s', 16)][..],
            &[('p', 4), ('p', 1), ('i', 4), ('s', 16)],
            &[('p', 4), ('p', 1), ('u', 8), ('s', 16)],
            &[('p', 4), ('p', 1), ('i', 8), ('s', 12)],
            &[('p', 4), ('p', 1), ('i', 8)],
        ] {
            let message = compare(wrong).unwrap_err();
            assert!(message.starts_with("f takes (p4 p0 i8 s16), and is given ("), "{message}");
        }
    }
}
