//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod command;
mod invariance;
mod model_golden;
mod op_golden;
mod selective_scan;
mod server;
