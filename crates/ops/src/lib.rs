//! Fast CPU kernels beneath the systems' differentiable operations.
//!
//! [`simd`] runs a loop with the widest vector instructions of the machine at hand, [`vector`] has the
//! elementary functions that such loops need, [`gemm`] multiplies matrices held in slices, and [`flex`]
//! is the way between Burn's CPU tensors and slices.

pub mod flex;
pub mod gemm;
pub mod vector;

pub use gemm::{Mat, gemm};
pub use vector::simd;
