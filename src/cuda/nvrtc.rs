//! CUDA C++ to machine code of one architecture, by NVRTC.
//!
//! A cubin needs no second compilation in the driver and never fails because the compiler is newer
//! than the driver, which PTX does.

use std::ffi::{CString, c_char, c_int};
use std::sync::OnceLock;

use cudarc::nvrtc::{result, sys};

use super::fault::{Fault, Result, nvrtc};
use super::sources::Source;

/// Major and minor version; the fault says that NVRTC is missing.
pub fn version() -> Result<(i32, i32)> {
    static VERSION: OnceLock<(i32, i32)> = OnceLock::new();
    if let Some(&version) = VERSION.get() {
        return Ok(version);
    }
    // SAFETY: loads and unloads a library by name, no more. Without this check the bindings panic.
    if !unsafe { sys::is_culib_present() } {
        let what = "NVRTC, CUDA's compiler, was not found; PyTorch's builds for CUDA bring it, and \
                    so does the package nvidia-cuda-nvrtc";
        return Err(Fault::Missing(what.into()));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are writable.
    nvrtc("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result())?;
    Ok(*VERSION.get_or_init(|| (major, minor)))
}

/// The version as text.
pub fn version_text() -> Result<String> {
    version().map(|(major, minor)| format!("{major}.{minor}"))
}

/// The architectures that this NVRTC compiles for, as in `90` for `sm_90`, in ascending order.
fn architectures() -> Result<Vec<u32>> {
    version()?;
    let mut count: c_int = 0;
    // SAFETY: `count` is writable.
    let status = unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result();
    nvrtc("nvrtcGetNumSupportedArchs", status)?;
    let mut list = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: the list has as many elements as were asked for.
    let status = unsafe { sys::nvrtcGetSupportedArchs(list.as_mut_ptr()) }.result();
    nvrtc("nvrtcGetSupportedArchs", status)?;
    let mut list: Vec<u32> = list.into_iter().filter_map(|a| u32::try_from(a).ok()).collect();
    list.sort_unstable();
    Ok(list)
}

/// What to compile for, so that it runs on a device of architecture `device`.
pub fn architecture_for(device: u32) -> Result<u32> {
    let known = architectures()?;
    choose(&known, device).ok_or_else(|| {
        let version = version_text().unwrap_or_default();
        Fault::Refused(format!("NVRTC {version} knows no sm_{device}, only {known:?}"))
    })
}

/// Machine code runs on later devices of the same major architecture.
fn choose(known: &[u32], device: u32) -> Option<u32> {
    known.iter().copied().filter(|&a| a <= device && a / 10 == device / 10).max()
}

/// The options of a compilation, which are part of the cache's key.
///
/// No product and sum become one rounding: element-wise kernels give the bits of the CPU.
pub fn options(architecture: u32, defines: &[String]) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture=sm_{architecture}"),
        "--std=c++17".into(),
        "--fmad=false".into(),
    ];
    options.extend(defines.iter().map(|define| format!("-D{define}")));
    options
}

/// Destroys the program when done, on every path.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `nvrtcCreateProgram` and destroyed only here.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program lives.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn image(&self) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program lives, and `size` is writable.
        let status = unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) }.result();
        nvrtc("nvrtcGetCUBINSize", status)?;
        let mut image = vec![0u8; size];
        // SAFETY: the buffer has the size that was asked for.
        let status = unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) }.result();
        nvrtc("nvrtcGetCUBIN", status)?;
        Ok(image)
    }
}

fn strings<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<CString>> {
    let zero = |_| Fault::Refused("a source holds a zero byte".into());
    texts.map(|text| CString::new(text).map_err(zero)).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

/// Compiles one file, with its headers in memory, for a real architecture.
pub fn compile(
    source: &Source,
    headers: &[Source],
    architecture: u32,
    options: &[String],
) -> Result<Vec<u8>> {
    let version = version_text()?;
    let own = strings([source.text, source.file].into_iter())?;
    let texts = strings(headers.iter().map(|header| header.text))?;
    let names = strings(headers.iter().map(|header| header.file))?;
    let mut raw = std::ptr::null_mut();
    // SAFETY: all strings end with a zero and outlive the program, which is dropped before them.
    let status = unsafe {
        sys::nvrtcCreateProgram(
            &mut raw,
            own[0].as_ptr(),
            own[1].as_ptr(),
            texts.len() as c_int,
            pointers(&texts).as_ptr(),
            pointers(&names).as_ptr(),
        )
    };
    nvrtc("nvrtcCreateProgram", status.result())?;
    let program = Program(raw);
    let options = strings(options.iter().map(String::as_str))?;
    let list = pointers(&options);
    // SAFETY: the program lives, and the list has this many strings.
    let status = unsafe { sys::nvrtcCompileProgram(program.0, list.len() as c_int, list.as_ptr()) };
    if status.result().is_err() {
        let (file, log) = (source.file.into(), program.log());
        return Err(Fault::Compile { version, file, architecture, log });
    }
    program.image()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Maps the NVRTC of Python's packages, as `import torch` does; false where there is none.
    fn available() -> bool {
        let code = "import glob, sys; [print(f) for p in sys.path for f in \
                    glob.glob(p + '/nvidia/*/lib/libnvrtc.so.*')]";
        let found = Command::new("python3").args(["-c", code]).output();
        let paths = found.map(|done| String::from_utf8_lossy(&done.stdout).into_owned());
        for path in paths.unwrap_or_default().lines() {
            // SAFETY: the library's initialization has no requirements.
            if let Ok(library) = unsafe { libloading::Library::new(path) } {
                std::mem::forget(library);
            }
        }
        version().is_ok()
    }

    #[test]
    fn errors_hold_the_log() {
        if !available() {
            return;
        }
        let text = "#include \"one.cuh\"\nextern \"C\" __global__ void f(int* x) { *x = ONE + Y; }";
        let source = Source { file: "bad.cu", text };
        let headers = [Source { file: "one.cuh", text: "#define ONE 1\n" }];
        let image = compile(&source, &headers, 90, &options(90, &["Y=2".into()])).unwrap();
        assert!(image.starts_with(b"\x7fELF"));
        let error = compile(&source, &headers, 90, &options(90, &[])).unwrap_err().to_string();
        assert!(error.starts_with("NVRTC "), "{error}");
        assert!(error.contains("cannot compile bad.cu for sm_90:\nbad.cu(2): error:"), "{error}");
        assert!(error.contains("\"Y\" is undefined"), "{error}");
        let error = compile(&source, &[], 90, &options(90, &[])).unwrap_err().to_string();
        assert!(error.contains("one.cuh"), "{error}");
        let error = architecture_for(30).unwrap_err().to_string();
        assert!(error.contains("knows no sm_30, only [75, "), "{error}");
    }

    #[test]
    fn later_devices_run_earlier_code_of_their_kind() {
        let known = [75, 80, 86, 90, 100, 103, 120];
        assert_eq!(choose(&known, 90), Some(90));
        assert_eq!(choose(&known, 89), Some(86));
        assert_eq!(choose(&known, 121), Some(120));
        assert_eq!(choose(&known, 110), None);
        assert_eq!(choose(&known, 70), None);
    }
}
