//! `kiln tabpfn serve`

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Result};

use super::ModelArgs;
use super::tables::{EnsembleArgs, ReadArgs, target};
use crate::examples;
use crate::server::{self, Server};

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Table that the page shows first; by default an example
    #[arg(long, value_name = "FILE")]
    train: Option<PathBuf>,
    /// Its column that holds the classes
    #[arg(long, value_name = "COLUMN")]
    target: Option<String>,
    #[command(flatten)]
    reading: ReadArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ensemble: EnsembleArgs,
    /// Port on 127.0.0.1; 0 takes any that is free
    #[arg(long, default_value_t = 8081)]
    port: u16,
}

/// Serves the page until Ctrl-C.
pub(super) fn run(args: &ServeArgs, cx: &Context) -> Result<()> {
    let table = match &args.train {
        Some(path) => args.reading.read(path, true)?,
        None => examples::table("iris")?,
    };
    let target = target(&table, args.target.as_deref())?;
    let options = args.ensemble.options()?;
    let server = Server::new(args.model.open(cx)?, &table, &target, options, cx);
    server::serve(server, args.port, cx)
}
