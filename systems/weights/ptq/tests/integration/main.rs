//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod command;
mod foreign;
mod golden;
mod invariance;
mod subject;
mod written;
