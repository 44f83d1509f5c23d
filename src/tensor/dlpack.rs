//! Borrowing tensors: PyTorch's through the DLPack 1.3 C exchange table, everybody else's through
//! `__dlpack__`. No copy, no synchronization. The only file that knows PyTorch.

use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;

use pyo3::inspect::PyStaticExpr;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};
use pyo3::{ffi, intern};

use super::{Arg, DType, Device, MAX_RANK, TensorView};

#[repr(C)]
struct DlDevice {
    kind: i32,
    id: i32,
}

#[repr(C)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlDataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlVersion {
    major: u32,
    minor: u32,
}

#[repr(C)]
struct DlManagedTensor {
    tensor: DlTensor,
    _context: *mut c_void,
    _deleter: *const c_void,
}

#[repr(C)]
struct DlManagedTensorVersioned {
    version: DlVersion,
    _context: *mut c_void,
    _deleter: *const c_void,
    flags: u64,
    tensor: DlTensor,
}

#[repr(C)]
struct ExchangeTable {
    version: DlVersion,
    _previous: *const c_void,
    _allocate: *const c_void,
    _managed_from_py: *const c_void,
    _managed_to_py: *const c_void,
    view_from_py: Option<ViewFromPy>,
    current_stream: Option<CurrentStream>,
}

type ViewFromPy = unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int;
type CurrentStream = unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int;

const KDL_CPU: i32 = 1;
const KDL_CUDA: i32 = 2;
const FLAG_READ_ONLY: u64 = 1;

struct Torch {
    tensor: Py<PyAny>,
    parameter: Py<PyAny>,
    get_num_threads: Py<PyAny>,
    out_of_memory: Py<PyType>,
    view_from_py: Option<ViewFromPy>,
    current_stream: Option<CurrentStream>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

fn torch(py: Python<'_>) -> PyResult<&Torch> {
    TORCH.get_or_try_init(py, || {
        let module = py.import("torch")?;
        let tensor = module.getattr("Tensor")?;
        let table = exchange_table(&tensor)?;
        Ok(Torch {
            parameter: module.getattr("nn")?.getattr("Parameter")?.unbind(),
            get_num_threads: module.getattr("get_num_threads")?.unbind(),
            out_of_memory: module.getattr("OutOfMemoryError")?.cast_into()?.unbind(),
            view_from_py: table.and_then(|table| table.view_from_py),
            current_stream: table.and_then(|table| table.current_stream),
            tensor: tensor.unbind(),
        })
    })
}

/// The type's exchange table, where it has one of the version known here.
fn exchange_table(tensor_type: &Bound<'_, PyAny>) -> PyResult<Option<&'static ExchangeTable>> {
    let Ok(capsule) = tensor_type.getattr("__dlpack_c_exchange_api__") else { return Ok(None) };
    // SAFETY: `capsule` is a live object; a wrong kind or name sets an exception and gives null.
    let table =
        unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr()) };
    if table.is_null() {
        return Err(PyErr::fetch(tensor_type.py()));
    }
    let table: *const ExchangeTable = table.cast();
    // SAFETY: the version comes first in every revision of the table, which is static data.
    let major = unsafe { (*table).version.major };
    // SAFETY: version 1 of the table has this layout.
    Ok((major == 1).then(|| unsafe { &*table }))
}

/// The number of threads PyTorch allows itself.
pub fn torch_num_threads(py: Python<'_>) -> PyResult<usize> {
    torch(py)?.get_num_threads.call0(py)?.extract(py)
}

/// PyTorch's current stream of a CUDA device, as the driver's pointer.
pub fn current_stream(py: Python<'_>, ordinal: usize) -> PyResult<usize> {
    if let (Some(query), Ok(id)) = (torch(py)?.current_stream, i32::try_from(ordinal)) {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` is writable.
        if unsafe { query(KDL_CUDA, id, &mut raw) } == 0 {
            return Ok(raw as usize);
        }
        // What went wrong is found again below, in Python's words.
        drop(PyErr::take(py));
    }
    let stream = py.import("torch.cuda")?.call_method1("current_stream", (ordinal,))?;
    stream.getattr("cuda_stream")?.extract()
}

/// PyTorch's exception for exhausted memory of a device, which training loops know how to catch.
pub fn out_of_memory(text: String) -> PyErr {
    Python::attach(|py| match torch(py) {
        Ok(torch) => PyErr::from_type(torch.out_of_memory.bind(py).clone(), text),
        Err(error) => error,
    })
}

impl<'a, 'py> FromPyObject<'a, 'py> for Arg {
    type Error = PyErr;
    const INPUT_TYPE: PyStaticExpr =
        PyStaticExpr::Attribute { value: &PyStaticExpr::Name { id: "typing" }, attr: "Any" };

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let torch = torch(object.py())?;
        let kind = object.get_type();
        if kind.is(&torch.tensor) || kind.is(&torch.parameter) {
            return Ok(Self(from_torch(object, torch)?));
        }
        if kind.is_subclass(torch.tensor.bind(object.py()))? {
            let name = kind.name()?;
            return Ok(Self(Err(format!(
                "got the subclass {name}, which holds no memory of its own kind"
            ))));
        }
        if object.hasattr(intern!(object.py(), "__dlpack__"))? {
            return Ok(Self(from_capsule(object)?));
        }
        Ok(Self(Err(format!("got {}", kind.name()?))))
    }
}

type Borrow = Result<TensorView, String>;

fn from_torch(object: Borrowed<'_, '_, PyAny>, torch: &Torch) -> PyResult<Borrow> {
    let py = object.py();
    let Some(view_from_py) = torch.view_from_py else { return from_capsule(object) };
    let mut raw = MaybeUninit::<DlTensor>::uninit();
    // SAFETY: `object` is a live torch.Tensor and `raw` is writable.
    if unsafe { view_from_py(object.as_ptr().cast(), raw.as_mut_ptr()) } != 0 {
        let text = PyErr::fetch(py).value(py).to_string();
        // What follows the first line is PyTorch's own stack trace.
        let reason = text.lines().next().unwrap_or_default();
        return Ok(Err(format!("got one that PyTorch cannot lend: {reason}")));
    }
    // SAFETY: the call reported success, so it filled the structure.
    let view = describe(&unsafe { raw.assume_init() }, false, None);
    let shares_no_memory = view.as_ref().is_ok_and(|v| v.data.is_null() && v.numel() > 0);
    if shares_no_memory {
        return Ok(Err("got one without memory (meta or fake)".into()));
    }
    // The table does not tell a lazily negated view, and would show values of the wrong sign. Such
    // a view is the imaginary part of a complex tensor, whose elements do not lie side by side, so
    // the question, which costs more than all the rest, is spared tensors with dense strides.
    let may_be_negated = view.as_ref().is_ok_and(|v| v.rank == 0 || !v.has_dense_strides());
    if may_be_negated && object.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
        return Ok(Err("got a lazily negated view; call resolve_neg() first".into()));
    }
    Ok(view)
}

fn from_capsule(object: Borrowed<'_, '_, PyAny>) -> PyResult<Borrow> {
    let py = object.py();
    let options = PyDict::new(py);
    options.set_item(intern!(py, "max_version"), (1, 0))?;
    if let Some(stream) = stream_for(object) {
        options.set_item(intern!(py, "stream"), stream)?;
    }
    let method = object.getattr(intern!(py, "__dlpack__"))?;
    let capsule = match method.call((), Some(&options)) {
        // Producers from before DLPack 1.0 know no `max_version`.
        Err(error) if error.is_instance_of::<pyo3::exceptions::PyTypeError>(py) => {
            options.del_item(intern!(py, "max_version"))?;
            method.call((), Some(&options))
        }
        other => other,
    };
    let capsule = match capsule {
        Ok(capsule) => capsule,
        Err(error) => return Ok(Err(format!("its __dlpack__ failed: {}", error.value(py)))),
    };
    // The capsule is kept, not consumed: its own destructor releases the memory after the call.
    let owner = Some(capsule.clone().unbind());
    if let Some(pointer) = capsule_pointer(&capsule, c"dltensor_versioned") {
        // SAFETY: a capsule of this name holds this structure; the version comes first.
        let managed = unsafe { &*pointer.cast::<DlManagedTensorVersioned>() };
        if managed.version.major != 1 {
            let DlVersion { major, minor } = managed.version;
            return Ok(Err(format!("got one of DLPack {major}.{minor}, this build speaks 1.x")));
        }
        return Ok(describe(&managed.tensor, managed.flags & FLAG_READ_ONLY != 0, owner));
    }
    if let Some(pointer) = capsule_pointer(&capsule, c"dltensor") {
        // SAFETY: a capsule of this name holds this structure.
        let managed = unsafe { &*pointer.cast::<DlManagedTensor>() };
        return Ok(describe(&managed.tensor, false, owner));
    }
    Ok(Err("its __dlpack__ gave no DLPack capsule".into()))
}

/// The stream that a producer on a CUDA device has to be ready for; 1 is the protocol's name for the
/// default one.
fn stream_for(object: Borrowed<'_, '_, PyAny>) -> Option<usize> {
    let py = object.py();
    let device = object.call_method0(intern!(py, "__dlpack_device__")).ok()?;
    match device.extract::<(i32, i32)>().ok()? {
        // Where there is no stream, dispatching says why.
        (KDL_CUDA, id) => current_stream(py, usize::try_from(id).ok()?).ok().map(|raw| raw.max(1)),
        _ => None,
    }
}

fn capsule_pointer(capsule: &Bound<'_, PyAny>, name: &CStr) -> Option<*const c_void> {
    // SAFETY: `capsule` is a live object; the check accepts any object.
    let valid = unsafe { ffi::PyCapsule_IsValid(capsule.as_ptr(), name.as_ptr()) } == 1;
    // SAFETY: the capsule was just found valid under this name.
    valid
        .then(|| unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr()) }.cast_const())
}

fn describe(raw: &DlTensor, read_only: bool, owner: Option<Py<PyAny>>) -> Borrow {
    let device = match raw.device.kind {
        KDL_CPU => Device::Cpu,
        KDL_CUDA => Device::Cuda(usize::try_from(raw.device.id).map_err(|e| e.to_string())?),
        kind => return Err(format!("got one on an unknown device (DLPack type {kind})")),
    };
    let DlDataType { code, bits, lanes } = raw.dtype;
    let dtype = DType::from_dlpack(code, bits, lanes).ok_or_else(|| {
        format!("got an element type that is not known here (DLPack code {code}, {bits} bits, {lanes} lanes)")
    })?;
    let rank = usize::try_from(raw.ndim).map_err(|e| e.to_string())?;
    if rank > MAX_RANK {
        return Err(format!("got {rank} dimensions, at most {MAX_RANK} are supported"));
    }
    let (mut shape, mut strides) = ([0usize; MAX_RANK], [0isize; MAX_RANK]);
    let mut dense = 1isize;
    for i in (0..rank).rev() {
        // SAFETY: both arrays have `ndim` entries where they are given. They are copied because
        // another thread may resize the tensor once the interpreter is released.
        let (n, stride) = unsafe {
            let stride = if raw.strides.is_null() { dense } else { *raw.strides.add(i) as isize };
            (*raw.shape.add(i), stride)
        };
        shape[i] = usize::try_from(n).map_err(|e| e.to_string())?;
        strides[i] = stride;
        dense *= n as isize;
    }
    let data = raw.data.cast::<u8>().wrapping_add(raw.byte_offset as usize);
    Ok(TensorView {
        data,
        dtype,
        device,
        read_only,
        rank: rank as u8,
        shape,
        strides,
        _owner: owner,
    })
}
