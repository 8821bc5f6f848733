//! Differentiable tensor operations with fast CPU kernels.
//!
//! Every operation takes and returns Burn tensors. For single precision on the CPU it runs a kernel of this
//! crate, forward and backward; on other devices, in other precisions and under capture it is composed of
//! Burn's own operations, so that the same network runs everywhere.
//!
//! Beneath: [`simd()`] runs a loop with the widest vector instructions of the machine at hand, [`vector`]
//! has the elementary functions that such loops need, [`gemm`] multiplies matrices held in slices, [`mod@dilated_conv`] convolves rows of
//! channels, [`flex`]
//! is the way between Burn's CPU tensors and slices, and [`function`] gives a kernel its place in the
//! autodiff graph.
//!
//! Kernels divide their work into pieces that are combined in a fixed order, so that a result repeats bit for bit
//! on the same number of threads; on another number it may differ by rounding.

mod activation;
mod attention;
mod batch_norm;
mod blocks;
mod conv;
mod cross_entropy;
pub mod dilated_conv;
mod dropout;
mod embedding;
mod fft;
pub mod flex;
pub mod function;
mod gated;
pub mod gemm;
mod linear;
mod matmul;
mod memory;
mod norm;
mod optimiser;
mod packed;
mod pool;
pub mod quantised;
mod rows;
mod segment;
mod short_conv;
mod simd;
mod softmax;
pub mod vector;

pub use activation::{Activation, activate};
pub use attention::{AttentionOptions, attention};
pub use batch_norm::{BatchNormOutput, batch_norm, batch_norm_train, group_norm};
pub use conv::{conv_transpose1d, conv_transpose2d, conv_transpose3d, conv1d, conv2d, conv3d};
pub use cross_entropy::{CrossEntropyOptions, cross_entropy};
pub use dilated_conv::{DilatedConvOptions, dilated_conv};
pub use dropout::dropout;
pub use embedding::{Pooling, embedding, embedding_bag};
pub use fft::{fft, ifft, irfft, irfft2, rfft, rfft2};
pub use function::{Function, apply, runs_natively};
pub use gated::gated;
pub use gemm::{Mat, gemm};
pub use linear::linear;
pub use matmul::matmul;
pub use memory::{TensorAllocator, keep_freed_memory, release_freed_memory};
pub use norm::{layer_norm, rms_norm};
pub use optimiser::{AdagradStep, AdamWStep, Parameter, SgdStep, gradient_norm};
pub use pool::{adaptive_avg_pool1d, adaptive_avg_pool2d, avg_pool1d, avg_pool2d, max_pool1d, max_pool2d};
pub use segment::{index_add, index_select, segment_max, segment_mean, segment_sum};
pub use short_conv::short_conv;
pub use simd::{LEVEL_VARIABLE, simd};
pub use softmax::{log_softmax, softmax};

/// Kernels over slices, for programs that plan their memory themselves.
pub mod kernels {
    pub use crate::attention::{AttentionExtents, AttentionInputs, Heads, attend};
    pub use crate::conv::{Finish, FixedConv, FreeConv};
    pub use crate::norm::{layer_norm_rows, rms_norm_rows};
    pub use crate::packed::RightFactor;
    pub use crate::pool::{FixedPool, PoolOptions};
    pub use crate::softmax::{log_softmax_rows, softmax_rows};
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
