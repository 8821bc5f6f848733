//! Motifs.

pub mod affinity;
pub mod atlas;
pub mod baselines;
pub mod blockmodel;
pub mod generate;
pub mod graph;
pub mod ntf;
pub mod score;
pub mod tensor;
pub mod traces;
