//! Differentiable tensor operations with fast CPU kernels.
//!
//! Every operation takes and returns Burn tensors. For single precision on the CPU it runs a kernel of this
//! crate, forward and backward; on other devices, in other precisions and under capture it is composed of
//! Burn's own operations, so that the same network runs everywhere.
//!
//! Beneath: [`simd()`] runs a loop with the widest vector instructions of the machine at hand, [`vector`]
//! has the elementary functions that such loops need, [`gemm`] multiplies matrices held in slices, [`flex`]
//! is the way between Burn's CPU tensors and slices, and [`function`] gives a kernel its place in the
//! autodiff graph.
//!
//! Kernels divide their work into pieces whose size does not depend on the number of threads, so that a
//! result repeats bit for bit.

mod activation;
mod attention;
mod cross_entropy;
mod embedding;
pub mod flex;
pub mod function;
pub mod gemm;
mod linear;
mod rows;
mod segment;
mod simd;
mod softmax;
pub mod vector;

pub use activation::{Activation, activate};
pub use attention::{AttentionOptions, attention};
pub use cross_entropy::{CrossEntropyOptions, cross_entropy};
pub use embedding::{Pooling, embedding, embedding_bag};
pub use function::{Function, apply, runs_natively};
pub use gemm::{Mat, gemm};
pub use linear::linear;
pub use segment::{index_add, index_select, segment_max, segment_mean, segment_sum};
pub use simd::{LEVEL_VARIABLE, level, simd};
pub use softmax::{log_softmax, softmax};
