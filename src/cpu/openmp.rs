//! The threads that PyTorch's own operations run on, where its OpenMP runtime is GNU's or speaks
//! its language.
//!
//! They spin for milliseconds after each of PyTorch's operations: another pool's threads would have
//! to share the cores with them, while they themselves begin at once.

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `GOMP_parallel`: calls the function with the data on a team of threads, this one among them, and
/// returns when all have.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

static PROCESS: OnceLock<u32> = OnceLock::new();

/// Remembers this process. A fork of it has none of its threads, and the runtime would wait for
/// them.
pub fn belong_to_this_process() {
    PROCESS.get_or_init(std::process::id);
}

struct Job<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Calls `work` on a team of so many threads, and waits for them; a panic is passed on. False where
/// there is no such runtime, and nothing was called.
pub fn together(threads: usize, work: &(dyn Fn() + Sync)) -> bool {
    let is_own = *PROCESS.get_or_init(std::process::id) == std::process::id();
    let (Some(parallel), true, Ok(threads)) = (runtime(), is_own, c_uint::try_from(threads)) else {
        return false;
    };
    let job = Job { work, panic: Mutex::new(None) };
    // SAFETY: the runtime calls `enter` with this pointer until it returns, and no longer; the job
    // is borrowed all that time and shared as `Sync` allows.
    unsafe { parallel(enter, (&raw const job).cast_mut().cast(), threads, 0) };
    if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
    true
}

extern "C" fn enter(job: *mut c_void) {
    // SAFETY: the job that `together` holds, which nobody writes to but through its lock.
    let job = unsafe { &*job.cast_const().cast::<Job<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(job.work)) {
        *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}

/// The runtime among what PyTorch has loaded for all to see.
#[cfg(unix)]
fn runtime() -> Option<Parallel> {
    static RUNTIME: OnceLock<Option<Parallel>> = OnceLock::new();
    *RUNTIME.get_or_init(|| {
        let loaded = libloading::os::unix::Library::this();
        // SAFETY: the name stands for this function in every OpenMP runtime that has it.
        let found = unsafe { loaded.get::<Parallel>(b"GOMP_parallel\0") };
        found.ok().map(|symbol| *symbol)
    })
}

#[cfg(not(unix))]
fn runtime() -> Option<Parallel> {
    None
}
