//! draft
pub mod actor;
pub mod boxing;
pub mod compile;
pub mod exchange;
pub mod execute;
pub mod graph;
pub mod linear;
pub mod local;
pub mod optimiser;
pub mod physical;
pub mod sbp;
pub mod select;
pub mod signature;
pub mod soundness;
