//! The low-rank family on CUDA devices: which launches, in which order, with which workspace. The
//! kernels are described in `kernels/lowrank/README.md`.

mod back;
mod dense;
mod factors;
mod product;
mod search;
mod space;

pub use back::{add, requantize, requantize_workspace};
pub use factors::{project_factors, project_factors_workspace};
pub use product::{project, project_workspace};
pub use search::{refresh, refresh_factors_workspace, refresh_workspace, svd, svd_workspace};

use super::bases::Bases;
use crate::cuda::{Module, Pointer};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorView};

/// A module for each float dtype.
type ByElement = [Module; 3];

macro_rules! module {
    ($file:literal $(, $define:literal)*) => {
        Module { file: concat!("lowrank/", $file), defines: &[$($define),*], lists: false }
    };
}

/// Modules of a file for float32, float16 and bfloat16, each with bases of 32, 8 and 4 bits; the
/// second and the third on tensor cores.
macro_rules! products {
    ($file:literal) => {
        [
            [
                module!($file, "ELEM=f32", "BASIS_BITS=32", "TENSOR=0"),
                module!($file, "ELEM=f16", "BASIS_BITS=32", "TENSOR=1"),
                module!($file, "ELEM=bf16", "BASIS_BITS=32", "TENSOR=1"),
            ],
            [
                module!($file, "ELEM=f32", "BASIS_BITS=8", "TENSOR=0"),
                module!($file, "ELEM=f16", "BASIS_BITS=8", "TENSOR=1"),
                module!($file, "ELEM=bf16", "BASIS_BITS=8", "TENSOR=1"),
            ],
            [
                module!($file, "ELEM=f32", "BASIS_BITS=4", "TENSOR=0"),
                module!($file, "ELEM=f16", "BASIS_BITS=4", "TENSOR=1"),
                module!($file, "ELEM=bf16", "BASIS_BITS=4", "TENSOR=1"),
            ],
        ]
    };
}

const PROJECT: [ByElement; 3] = products!("project.cu");
const BACK_ADD: [ByElement; 3] = products!("project_back_add.cu");
/// For bases of 32, 8 and 4 bits, on tensor cores: a quantized weight is coarser than what these
/// leave out.
const BACK_REQUANTIZE: [Module; 3] = [
    module!("project_back_requantize.cu", "BASIS_BITS=32", "TENSOR=1"),
    module!("project_back_requantize.cu", "BASIS_BITS=8", "TENSOR=1"),
    module!("project_back_requantize.cu", "BASIS_BITS=4", "TENSOR=1"),
];
const BACK: [Module; 3] = [
    module!("project_back.cu", "BASIS_BITS=32", "TENSOR=1"),
    module!("project_back.cu", "BASIS_BITS=8", "TENSOR=1"),
    module!("project_back.cu", "BASIS_BITS=4", "TENSOR=1"),
];
const REFRESH: ByElement = [
    module!("refresh.cu", "ELEM=f32"),
    module!("refresh.cu", "ELEM=f16"),
    module!("refresh.cu", "ELEM=bf16"),
];
const SPAN: Module = module!("requantize_span.cu");
const ORTHONORMAL: Module = module!("orthonormal.cu");
const EIGEN: Module = module!("eigen.cu");

/// Every module of the family with its kernels.
pub fn kernels() -> Vec<(Module, &'static [&'static str])> {
    let project: &[_] = &["project", "project_reduce"];
    let refresh: &[_] = &[
        "square_norm",
        "captured_norm",
        "refresh_begin",
        "random_matrix",
        "start_basis",
        "largest_magnitude",
        "scale_to_unit",
        "refresh_decide",
        "refresh_commit",
        "probe_signs",
        "refresh_end",
        "refresh_outcome",
        "svd_commit",
    ];
    let orthonormal: &[_] =
        &["gram", "gram_reduce", "cholesky_panel", "cholesky_update", "replace_dependent"];
    let mut list = vec![
        (ORTHONORMAL, orthonormal),
        (EIGEN, &["jacobi_solve", "jacobi_update", "eigen_order"][..]),
        (SPAN, &["requantize_span"]),
    ];
    list.extend(PROJECT.as_flattened().iter().map(|&module| (module, project)));
    list.push((factors::WIDE[1], project));
    list.extend(BACK_ADD.as_flattened().iter().map(|&m| (m, &["project_back_add"][..])));
    list.extend(BACK_REQUANTIZE.map(|module| (module, &["project_back_requantize"][..])));
    list.extend(BACK.map(|module| (module, &["project_back"][..])));
    list.extend(REFRESH.map(|module| (module, refresh)));
    list
}

/// Which of the modules by element fits a tensor.
fn of_element(op: &'static str, modules: ByElement, tensor: &TensorView) -> Result<Module> {
    match tensor.dtype() {
        DType::F32 => Ok(modules[0]),
        DType::F16 => Ok(modules[1]),
        DType::BF16 => Ok(modules[2]),
        dtype => Err(Error::Unsupported { op, device: tensor.device(), dtype }),
    }
}

/// A basis as the kernels of products take it.
#[derive(Clone, Copy)]
struct Basis {
    values: Pointer,
    scale: Pointer,
    zero_point: Pointer,
    bits: u8,
    group_size: i64,
}

impl Basis {
    /// A float32 matrix.
    fn dense(values: impl Into<Pointer>) -> Self {
        let (scale, zero_point) = (Pointer::NULL, Pointer::NULL);
        Self { values: values.into(), scale, zero_point, bits: 32, group_size: 1 }
    }

    /// Entry `i` of a call's bases, which has `numel` elements.
    fn of(bases: &Bases, i: usize, numel: usize) -> Self {
        let values = &bases.values[i];
        let Some(packing) = bases.packing else { return Self::dense(values) };
        Self {
            values: values.into(),
            scale: bases.scales.get(i).into(),
            zero_point: bases.zero_points.get(i).into(),
            bits: packing.format.bits,
            // So that it never overflows.
            group_size: packing.group_size.min(numel) as i64,
        }
    }

    /// The modules for bases of its kind.
    fn choose<T: Copy>(self, modules: [T; 3]) -> T {
        match self.bits {
            8 => modules[1],
            4 => modules[2],
            _ => modules[0],
        }
    }
}
