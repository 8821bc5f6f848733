//! `kiln hypernet advise`, `table` and `forward`

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, Result, Table, TensorFile, write_atomic};
use serde_json::{Value, json};

use crate::advise::{Problem, advise};
use crate::golden;
use crate::table::{Sizes, table};
use crate::target::Target;

#[derive(Debug, Args)]
pub(super) struct AdviseArgs {
    /// Related tasks
    #[arg(long, default_value_t = 1)]
    tasks: usize,
    /// Rows of each task
    #[arg(long)]
    samples: usize,
    /// Weights of the network that would solve one task
    #[arg(long)]
    params: usize,
    /// Data change over time, or weights should follow the input
    #[arg(long)]
    changing_data: bool,
    /// Predictions must tell how sure they are
    #[arg(long)]
    uncertainty: bool,
    /// Tasks will come that have only a description
    #[arg(long)]
    described_tasks: bool,
    /// Few parameters may be stored
    #[arg(long)]
    compression: bool,
}

#[derive(Debug, Args)]
pub(super) struct TableArgs {
    /// Network whose weights are made: mlp:64-32-10, lenet, or a .json file
    #[arg(long, default_value = "mlp:64-32-10")]
    target: String,
    /// Width of the hidden layer
    #[arg(long, default_value_t = 32)]
    hidden: usize,
    /// Numbers in a chunk
    #[arg(long, default_value_t = 256)]
    chunk: usize,
    /// Width of embeddings and codes
    #[arg(long, default_value_t = 8)]
    emb_dim: usize,
    /// Tasks
    #[arg(long, default_value_t = 5)]
    tasks: usize,
    /// CSV file to write
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ForwardArgs {
    /// .safetensors file with the tensors of one or more schemes
    #[arg(long)]
    weights: PathBuf,
    /// Network whose weights are made
    #[arg(long, default_value = "mlp:5-7-3")]
    target: String,
    /// .safetensors file to write
    #[arg(long)]
    to: PathBuf,
}

/// Recommends a kind of hypernetwork, or none.
pub(super) fn run_advise(args: &AdviseArgs, cx: &Context) -> Result<()> {
    let advice = advise(&Problem {
        tasks: args.tasks,
        samples: args.samples,
        params: args.params,
        changing_data: args.changing_data,
        uncertainty: args.uncertainty,
        described_tasks: args.described_tasks,
        compression: args.compression,
    })?;
    cx.emit(&advice, |advice| {
        let mut text = match advice.use_hypernetwork {
            true => {
                format!("--cond {} --scheme {} --arch {}\n", advice.conditioning, advice.scheme, advice.arch)
            }
            false => "a plain network\n".to_string(),
        };
        for reason in &advice.reasons {
            text += &format!("- {reason}\n");
        }
        let mut table =
            Table::new("Weights of the output layer (hidden 32, chunk 256)", &["scheme", "weights"]);
        for (scheme, count) in &advice.output_parameters {
            table.row([scheme.to_string(), count.to_string()]);
        }
        text + &format!("\n{}\n{}", table.title, table.to_text())
    })
}

/// Counts the parameters of every cell of the taxonomy.
pub(super) fn run_table(args: &TableArgs, cx: &Context) -> Result<()> {
    let sizes = Sizes { hidden: args.hidden, chunk: args.chunk, emb_dim: args.emb_dim, tasks: args.tasks };
    let table = table(&Target::parse(&args.target)?, sizes, cx)?;
    if let Some(out) = &args.out {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let failed = |e: csv::Error| Error::work("cannot lay out the table").caused_by(e);
        writer.write_record(&table.columns).map_err(failed)?;
        for row in &table.rows {
            writer.write_record(row).map_err(failed)?;
        }
        let bytes = writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the table: {e}")))?;
        write_atomic(out, &bytes)?;
    }
    cx.emit(&table, |table| format!("{}\n{}", table.title, table.to_text()))
}

/// Runs the schemes with the weights of a file.
pub(super) fn run_forward(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let target = Target::parse(&args.target)?;
    let result = golden::forward(TensorFile::read(&args.weights)?, &target, cx)?;
    result.write(&args.to)?;
    let names: Vec<Value> = result.names().map(Value::from).collect();
    cx.emit(&json!({ "file": args.to, "tensors": names }), |_| {
        let names: Vec<&str> = result.names().collect();
        format!("{} in {}\n", names.join(", "), args.to.display())
    })
}
