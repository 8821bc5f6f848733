//! Gated linear attention. (In progress.)
mod kernel;
pub mod op;
