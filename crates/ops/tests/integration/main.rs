//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod attention;
mod batch_norm;
mod conv;
mod cross_entropy;
mod dilated_conv;
mod dropout;
mod fft;
mod linear;
mod norm;
mod optimiser;
mod pool;
mod quantised;
mod rows;
mod short_conv;
mod softmax;
#[path = "../support/mod.rs"]
mod support;
