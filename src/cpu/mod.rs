//! The CPU runtime that all families share.

pub mod product;
pub mod simd;
pub mod threads;
