//! A network's computation as data.
//!
//! [`capture`] runs a network's forward function on Burn's capture device, which records operations
//! instead of computing them, and returns a [`Graph`]: operations of Burn's own intermediate
//! representation ([`burn::backend::ir`]) in execution order, with the parameters apart as constants. A graph is
//! run by [`Graph::run`], rewritten by a [`GraphPass`], differentiated by [`Graph::gradient`], printed and drawn, and goes to
//! and comes from ONNX files. [`loops`] is the level below: programs of loops over buffers, with an interpreter that
//! defines what they mean.

pub mod builder;
mod capture;
mod cpu;
mod disk;
mod draw;
mod execute;
mod graph;
pub mod loops;
mod onnx;
mod quiet;
mod reverse;
mod rewrite;

pub use capture::capture;
pub use cpu::{Executor, Footprint, StepKind};
pub use graph::{Boundary, Graph, operation_name};
pub use onnx::{OnnxOptions, onnx_operators};
pub use quiet::catch_panic;
pub use rewrite::GraphPass;
