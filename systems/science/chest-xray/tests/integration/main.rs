//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod command;
mod networks;
mod reference;
mod resume;
mod rotation;
