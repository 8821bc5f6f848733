//! Code that runs on many ranks, written once: threads of one process, processes joined by TCP, or MPI processes.
//!
//! A rank talks to the others through its [`Communicator`]. [`run_threads`] and [`ClusterArgs::run`] start the ranks.

mod call;
mod collectives;
mod communicator;
mod element;
mod emulate;
mod error;
mod groups;
mod launch;
mod mailbox;
mod options;
mod run;
mod tcp;
mod threads;
mod traffic;
mod transport;

pub use call::{Algorithm, Operation};
pub use collectives::{chunk, cost};
pub use communicator::{Communicator, Receiving, Sending};
pub use element::{Element, ElementKind, Op};
pub use emulate::EmulatedLink;
pub use error::ClusterError;
pub use groups::Mesh;
pub use run::{Backend, ClusterArgs, run_over_loopback, run_threads};
pub use traffic::{Exchange, Traffic};
