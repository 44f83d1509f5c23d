//! The CPU runtime that all families share.

mod crew;
pub mod openmp;
pub mod product;
pub mod simd;
pub mod threads;
