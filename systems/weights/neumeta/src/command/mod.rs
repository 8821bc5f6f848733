//! The verbs of `kiln neumeta`.

use clap::{Parser, Subcommand};
use kiln_core::{Context, Result};

/// `kiln neumeta …`
#[derive(Debug, Parser)]
#[command(name = "neumeta", about = "One implicit function that writes a network of any width")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// x
    Shp,
}

impl Command {
    pub fn run(self, _cx: &Context) -> Result<()> {
        match self.verb { Verb::Shp => Ok(()) }
    }
}
