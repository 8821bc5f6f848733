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
mod measure;
#[cfg(feature = "mpi")]
mod mpi;
mod options;
mod patience;
mod run;
mod tcp;
mod tensor;
mod threads;
mod traffic;
mod transport;
mod wire;

pub use call::{Algorithm, Operation};
pub use collectives::{chunk, cost};
pub use communicator::{Communicator, Receiving, Sending};
pub use element::{Element, ElementKind, Op};
pub use emulate::EmulatedLink;
pub use error::ClusterError;
pub use groups::Mesh;
pub use launch::{Launch, launch, started_ranks};
pub use measure::{Link, MEASURED, Timing, time};
pub use options::{parse_bytes, parse_duration};
pub use run::{Backend, ClusterArgs, run_over_loopback, run_threads};
pub use traffic::{Exchange, Traffic};
