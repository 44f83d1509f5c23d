//! Which instruction set the kernels use, chosen at run time.
//!
//! A kernel is written once, as plain loops over slices that the compiler turns into vector code,
//! and compiled once for each level. No level contracts a product and a sum into one rounding, so
//! that all of them give the same bits; the scalar level is the reference.

use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction sets, from the least to the most capable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    Scalar = 1,
    Avx2 = 2,
    Avx512 = 3,
}

impl Level {
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// The most capable level of this processor.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Self::Scalar)
    }

    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Self::Scalar => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        return self == Self::Scalar;
    }
}

/// 0 until first asked.
static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The level in use: the best one, unless [`set_level`] or `GRADPRESS_SIMD` asked for less.
pub fn level() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        3 => Level::Avx512,
        2 => Level::Avx2,
        1 => Level::Scalar,
        _ => {
            let wanted = std::env::var("GRADPRESS_SIMD").ok();
            let level = wanted
                .and_then(|name| Level::from_name(&name))
                .filter(|level| level.is_available())
                .unwrap_or_else(Level::best);
            set_level(level);
            level
        }
    }
}

/// Uses `level`, which must be available, from now on.
pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Defines `$name`, which runs the inlined kernel `$kernel` compiled for the level in use.
#[macro_export]
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$($generic:tt)*])? ($($arg:ident: $ty:ty),* $(,)?)
        $(-> $ret:ty)? = $kernel:path) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($generic)*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$($generic)*>)? ($($arg: $ty),*) $(-> $ret)? { $kernel($($arg),*) }
                #[target_feature(
                    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt"
                )]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$($generic)*>)? ($($arg: $ty),*) $(-> $ret)? { $kernel($($arg),*) }
                match $crate::cpu::simd::level() {
                    // SAFETY: the level in use is available on this processor.
                    $crate::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the level in use is available on this processor.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Level::Scalar => {}
                }
            }
            $kernel($($arg),*)
        }
    };
}
