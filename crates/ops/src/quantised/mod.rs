//! Integer arithmetic for quantised networks: exact products of bytes, and the way between floats and bytes.
//!
//! A number `x` is stored as `q` with `x ≈ s (q - z)`: activations as unsigned bytes with a zero point `z`
//! ([`Affine`]), weights as signed bytes around zero with one scale a row. A product then is
//!
//! ```text
//! Σ_k s_x (q_k - z) s_w w_k = s_x s_w (Σ_k q_k w_k - z Σ_k w_k)
//! ```
//!
//! The sums are exact: with AVX-512 by `vpdpbusd`, with AVX2 on pairs widened to 16 bits (its `maddubs` would
//! saturate), elsewhere plainly, and all three give the same bits. [`Panels`] holds the weights of a [`Product`] as the kernels read
//! them, eight or four bits each; [`Conv`] convolves images of bytes.

mod affine;
mod conv;
mod kernel;
mod panels;
mod product;

pub use affine::{Affine, Ends, Requantise, round_even, rounded};
pub use conv::{Conv, ConvShape};
pub use kernel::{Level, level};
pub use panels::{Panels, pack_nibbles, unpack_nibbles};
pub use product::{Bytes, Product};
