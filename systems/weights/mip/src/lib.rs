//! Hypernetworks whose weights do not scale with their input.

pub mod convert;
pub mod encoding;
pub mod hypernet;

pub use convert::{MipConfig, MipHyper, Parametrisation};
pub use encoding::Encoding;
pub use hypernet::{HyperNet, HyperNetConfig};
