//! Sequence models of dilated convolutions and chunked attention.

pub mod ema;
mod long_conv;
pub mod tcn;
mod tcn_kernel;
