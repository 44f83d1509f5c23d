//! Element types that cross the border, and the Rust types behind them.

use std::fmt;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::multiversion;

/// Element types that cross the border.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I8,
    U8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// The name used in messages, which is PyTorch's.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::I8 => "int8",
            Self::U8 => "uint8",
        }
    }

    pub(super) const fn from_dlpack(code: u8, bits: u8, lanes: u16) -> Option<Self> {
        Some(match (code, bits, lanes) {
            (2, 64, 1) => Self::F64,
            (2, 32, 1) => Self::F32,
            (2, 16, 1) => Self::F16,
            (4, 16, 1) => Self::BF16,
            (0, 64, 1) => Self::I64,
            (0, 32, 1) => Self::I32,
            (0, 8, 1) => Self::I8,
            (1, 8, 1) => Self::U8,
            _ => return None,
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that is the element of some [`DType`].
pub trait Element: Copy + Send + Sync + 'static {
    const DTYPE: DType;
}

macro_rules! element {
    ($($rust:ty => $dtype:ident),* $(,)?) => {
        $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })*
    };
}
element!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, i8 => I8, u8 => U8);

/// A floating element whose arithmetic is done in `f32`.
pub trait Float: Element {
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;
    /// Widens `src` into `dst`, which has the same length.
    fn widen(src: &[Self], dst: &mut [f32]);
    /// Rounds `src` to nearest even into `dst`, which has the same length.
    fn narrow(src: &[f32], dst: &mut [Self]);
    /// The elements as they are when they need no widening.
    fn as_f32(_elements: &[Self]) -> Option<&[f32]> {
        None
    }
    /// The elements themselves, for writing, when they need no rounding.
    fn as_f32_mut(_elements: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

impl Float for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(x: f32) -> Self {
        x
    }
    fn widen(src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn narrow(src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
    fn as_f32(elements: &[Self]) -> Option<&[f32]> {
        Some(elements)
    }
    fn as_f32_mut(elements: &mut [Self]) -> Option<&mut [f32]> {
        Some(elements)
    }
}

macro_rules! half_float {
    ($rust:ty) => {
        impl Float for $rust {
            fn to_f32(self) -> f32 {
                <$rust>::to_f32(self)
            }
            fn from_f32(x: f32) -> Self {
                <$rust>::from_f32(x)
            }
            fn widen(src: &[Self], dst: &mut [f32]) {
                src.convert_to_f32_slice(dst);
            }
            fn narrow(src: &[f32], dst: &mut [Self]) {
                dst.convert_from_f32_slice(src);
            }
        }
    };
}
half_float!(f16);

impl Float for bf16 {
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn widen(src: &[Self], dst: &mut [f32]) {
        widen_bf16(src, dst);
    }
    fn narrow(src: &[f32], dst: &mut [Self]) {
        narrow_bf16(src, dst);
    }
}

#[inline(always)]
fn widen_bf16_kernel(src: &[bf16], dst: &mut [f32]) {
    for (src, dst) in src.iter().zip(dst) {
        *dst = f32::from_bits(u32::from(src.to_bits()) << 16);
    }
}

#[inline(always)]
fn narrow_bf16_kernel(src: &[f32], dst: &mut [bf16]) {
    for (src, dst) in src.iter().zip(dst) {
        let bits = src.to_bits();
        let nearest = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
        // A NaN stays one, whatever the bits that are dropped.
        let quiet = (bits >> 16) | 0x40;
        let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
        *dst = bf16::from_bits(if is_nan { quiet } else { nearest } as u16);
    }
}

multiversion! {
    fn widen_bf16(src: &[bf16], dst: &mut [f32]) = widen_bf16_kernel
}
multiversion! {
    fn narrow_bf16(src: &[f32], dst: &mut [bf16]) = narrow_bf16_kernel
}

/// Runs `$body` with `$T` bound to the float type of `$view`, or returns `Error::Unsupported`.
#[macro_export]
macro_rules! match_float {
    ($view:expr, $op:expr, |$T:ident| $body:expr) => {
        match $view.dtype() {
            $crate::tensor::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::tensor::DType::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::tensor::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            dtype => {
                Err($crate::error::Error::Unsupported { op: $op, device: $view.device(), dtype })
            }
        }
    };
}
