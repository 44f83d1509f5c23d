//! Plain float32 products by cuBLAS, on a borrowed stream, with a workspace of the caller's.

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

use cudarc::cublas::result::{CublasError, create_handle, set_stream, sgemm};
use cudarc::cublas::sys::{self, cublasHandle_t, cublasOperation_t as Operation};
use cudarc::driver::sys::CUstream;

use super::fault::{Fault, Result};
use super::launch::Pointer;

/// Bytes of workspace that NVIDIA recommends for its largest devices; others need less.
pub const WORKSPACE: usize = 32 << 20;
/// `0` leaves products to the kernels of this crate.
const SWITCH: &str = "GRADPRESS_CUBLAS";

/// `out [m, n] = a [m, k] b [k, n]` in float32: `b` by rows, `a` with strides along m and k of which
/// one is 1, `out` by rows or by columns.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    pub a: Pointer,
    pub strides: (usize, usize),
    pub b: Pointer,
    pub out: Pointer,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub by_columns: bool,
    /// [`WORKSPACE`] bytes.
    pub workspace: Pointer,
}

/// A product as the library takes it, whose matrices are stored by columns.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Call {
    transposed: [bool; 2],
    m: c_int,
    n: c_int,
    k: c_int,
    factors: [(Pointer, c_int); 2],
    leading: c_int,
}

impl Gemm {
    /// None where a size is beyond what the library takes.
    ///
    /// A matrix by rows is its transpose by columns: `out` by rows is `b^T a^T` by columns.
    fn call(&self) -> Option<Call> {
        let Self { a, strides, b, out: _, m, n, k, by_columns, workspace: _ } = *self;
        let number = |size: usize| c_int::try_from(size).ok();
        let (m, n, k) = (number(m)?, number(n)?, number(k)?);
        // The leading dimension of `a`, and whether its rows lie one after the other.
        let (a_by_rows, a_leading) = if strides.1 == 1 {
            (true, number(strides.0.max(self.k))?)
        } else {
            (false, number(strides.1.max(self.m))?)
        };
        let (a, b) = ((a, a_leading), (b, n));
        Some(if by_columns {
            Call { transposed: [a_by_rows, true], m, n, k, factors: [a, b], leading: m }
        } else {
            let transposed = [false, !a_by_rows];
            Call { transposed, m: n, n: m, k, factors: [b, a], leading: n }
        })
    }
}

/// A handle of the library's, for one call at a time.
struct Handle(cublasHandle_t);

// SAFETY: a handle may be used from every thread, by one at a time; it is moved, never shared.
unsafe impl Send for Handle {}

/// Handles that nobody uses at the moment, by device. They are kept until the process ends.
static IDLE: LazyLock<Mutex<HashMap<usize, Vec<Handle>>>> = LazyLock::new(Mutex::default);

fn idle<T>(work: impl FnOnce(&mut HashMap<usize, Vec<Handle>>) -> T) -> T {
    work(&mut IDLE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether the library is there, and wanted.
fn is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads and unloads a library by name, no more.
    let look =
        || std::env::var_os(SWITCH).is_none_or(|v| v != "0") && unsafe { sys::is_culib_present() };
    *PRESENT.get_or_init(look)
}

fn named<T>(call: &str, result: std::result::Result<T, CublasError>) -> Result<T> {
    result.map_err(|CublasError(code)| Fault::Refused(format!("{call} failed with {code:?}")))
}

/// A handle of the current context's device.
fn take(ordinal: usize) -> Result<Handle> {
    if let Some(handle) = idle(|handles| handles.get_mut(&ordinal).and_then(Vec::pop)) {
        return Ok(handle);
    }
    Ok(Handle(named("cublasCreate", create_handle())?))
}

fn give_back(ordinal: usize, handle: Handle) {
    idle(|handles| handles.entry(ordinal).or_default().push(handle));
}

/// Makes a handle for a device, whose context is current, so that the first product need not.
pub fn load(ordinal: usize) -> Result<()> {
    if is_present() {
        give_back(ordinal, take(ordinal)?);
    }
    Ok(())
}

/// Launches a product on a stream of device `ordinal`, whose context is current; false where the
/// library is missing or does not take such sizes.
///
/// # Safety
/// The matrices and the workspace are on the device, of these sizes, and `out` overlaps none.
pub unsafe fn multiply(ordinal: usize, stream: CUstream, gemm: Gemm) -> Result<bool> {
    let Some(call) = gemm.call().filter(|_| is_present()) else { return Ok(false) };
    let handle = take(ordinal)?;
    // SAFETY: a live handle and stream; the rest by the caller's word.
    let done = unsafe { launch(&handle, stream, gemm, call) };
    give_back(ordinal, handle);
    done.map(|()| true)
}

/// # Safety
/// As for [`multiply`], of whose handle this is.
unsafe fn launch(handle: &Handle, stream: CUstream, gemm: Gemm, call: Call) -> Result<()> {
    let Call {
        transposed,
        m,
        n,
        k,
        factors: [(left, left_leading), (right, right_leading)],
        leading,
    } = call;
    let [left_op, right_op] =
        transposed.map(|t| if t { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N });
    let workspace = gemm.workspace.address() as *mut _;
    // SAFETY: by the caller's word. Setting the stream forgets the workspace, so it comes after.
    unsafe {
        named("cublasSetStream", set_stream(handle.0, stream.cast()))?;
        let status = sys::cublasSetWorkspace_v2(handle.0, workspace, WORKSPACE).result();
        named("cublasSetWorkspace", status)?;
        let product = sgemm(
            handle.0,
            left_op,
            right_op,
            m,
            n,
            k,
            &1.0,
            left.address() as *const f32,
            left_leading,
            right.address() as *const f32,
            right_leading,
            &0.0,
            gemm.out.address() as *mut f32,
            leading,
        );
        named("cublasSgemm", product)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: u64) -> Pointer {
        Pointer::new(address, 4)
    }

    #[test]
    fn products_by_rows_become_products_by_columns() {
        let gemm = Gemm {
            a: at(1),
            strides: (7, 1),
            b: at(2),
            out: at(3),
            m: 5,
            n: 3,
            k: 7,
            by_columns: false,
            workspace: at(4),
        };
        let want = Call {
            transposed: [false, false],
            m: 3,
            n: 5,
            k: 7,
            factors: [(at(2), 3), (at(1), 7)],
            leading: 3,
        };
        assert_eq!(gemm.call(), Some(want));
        let turned = Gemm { strides: (1, 5), ..gemm };
        let factors = [(at(2), 3), (at(1), 5)];
        assert_eq!(turned.call(), Some(Call { transposed: [false, true], factors, ..want }));
        let columns = Gemm { by_columns: true, ..turned };
        let want = Call {
            transposed: [false, true],
            m: 5,
            n: 3,
            k: 7,
            factors: [(at(1), 5), (at(2), 3)],
            leading: 5,
        };
        assert_eq!(columns.call(), Some(want));
        assert_eq!(Gemm { m: 1 << 31, ..gemm }.call(), None);
    }
}
