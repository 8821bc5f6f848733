//! A network's computation as data.
//!
//! [`capture`] runs a network's forward function on Burn's capture device, which records operations
//! instead of computing them, and returns a [`Graph`]: operations of Burn's own intermediate
//! representation ([`burn::backend::ir`]) in execution order, with the parameters apart as constants. A graph is
//! run by [`Graph::run`], rewritten by a [`GraphPass`], printed and drawn. [`loops`] is the
//! level below: programs of loops over buffers, with an interpreter that defines what they mean.

mod capture;
mod cpu;
mod disk;
mod draw;
mod execute;
mod graph;
pub mod loops;
mod rewrite;

pub use capture::capture;
pub use cpu::{Executor, Footprint};
pub use graph::{Boundary, Graph};
pub use rewrite::GraphPass;
