//! Class probabilities for small tables in one forward pass.

pub mod checkpoint;
pub mod network;

pub use network::{LabelledRows, TabPfn, TabPfnConfig};
