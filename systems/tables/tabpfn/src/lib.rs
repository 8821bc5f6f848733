//! TabPFN: class probabilities for small tables in one forward pass.

pub mod baselines;
pub mod checkpoint;
pub mod classifier;
pub mod ensemble;
pub mod examples;
pub mod metrics;
pub mod network;
pub mod preprocess;
mod trees;

pub use classifier::{ClassifierOptions, TabPfnClassifier};
pub use network::{LabelledRows, TabPfn, TabPfnConfig};
