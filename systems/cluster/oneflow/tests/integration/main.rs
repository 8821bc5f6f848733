//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod actors;
mod boxing;
mod command;
mod global;
mod golden;
mod network;
mod pipeline;
mod samples;
mod signatures;
mod train;
