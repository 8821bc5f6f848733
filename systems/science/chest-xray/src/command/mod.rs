//! The verbs of `kiln chest-xray`.

mod forward;

use clap::{Parser, Subcommand};
use kiln_core::{Context, Result};

/// `kiln chest-xray …`
#[derive(Debug, Parser)]
#[command(name = "chest-xray", about = "Tuberculosis in chest X-rays; for research use, not a medical device")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// How many parameters a network has
    Params(forward::ParamsArgs),
    /// Run a network on tensors of a formula
    Forward(forward::ForwardArgs),
}

impl Command {
    /// Runs the verb.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Params(args) => forward::params(&args, cx),
            Verb::Forward(args) => forward::forward(&args, cx),
        }
    }
}
