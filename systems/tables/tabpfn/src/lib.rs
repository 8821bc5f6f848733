//! Class probabilities for small tables in one forward pass.

pub mod checkpoint;
pub mod fit;
pub mod network;
pub mod prior;

pub use network::{LabelledRows, TabPfn, TabPfnConfig};
