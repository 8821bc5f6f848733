//! What every back end must do, written once. A case gets a function that runs a body on some ranks.

pub mod case;
pub mod program;

use kiln_cluster::Communicator;
use kiln_core::Result;

/// Starts ranks on one back end.
pub trait Engine: Sync {
    /// Numbers of ranks that a case runs on.
    fn sizes(&self) -> &[usize];

    /// Runs `body` on ranks; gives the first error of any.
    fn run(&self, ranks: usize, body: &(dyn Fn(Communicator) -> Result<()> + Sync)) -> Result<()>;
}
