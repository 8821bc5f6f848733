//! Verbs for the parts on their own: `shp` and `forward`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, Result, write_atomic};
use kiln_data::{Cells, Table, TableOptions, read_tensors, write_tensors};
use serde_json::json;

use crate::forward::{ForwardConfig, recompute};
use crate::shp::{Distances, Metric, ShpSolver};

#[derive(Debug, Args)]
pub(super) struct ShpArgs {
    /// Cities: a .csv with one row a city, or FILE.safetensors:NAME with one row (of all later axes) a city
    #[arg(long)]
    cities: String,
    /// How far they are apart
    #[arg(long, value_enum, default_value = "l1")]
    metric: Given,
    /// CSV file to write: the cities' numbers, from 0, in their order
    #[arg(long)]
    to: Option<PathBuf>,
}

/// What the rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Given {
    /// Points; distances are sums of absolute differences
    L1,
    /// Points; distances are Euclid's
    L2,
    /// Distances themselves, a square table
    Table,
}

pub(super) fn shp(args: &ShpArgs, cx: &Context) -> Result<()> {
    let (values, rows) = read_rows(&args.cities)?;
    let place = |error: Error| match error.hint_text() {
        Some(hint) => Error::input(&args.cities, &error).hint(hint),
        None => Error::input(&args.cities, &error),
    };
    let distances = match args.metric {
        Given::L1 => Distances::of_points(&values, values.len() / rows, Metric::L1),
        Given::L2 => Distances::of_points(&values, values.len() / rows, Metric::L2),
        Given::Table => Distances::of_table(values, rows),
    };
    let found = ShpSolver::default().solve(&distances.map_err(place)?, cx)?;
    if let Some(to) = &args.to {
        let lines: String = found.path.iter().map(|city| format!("{city}\n")).collect();
        write_atomic(to, format!("city\n{lines}").as_bytes())?;
    }
    cx.emit(&found, |found| serde_json::to_string(found).map_or_else(|e| e.to_string(), |text| text + "\n"))
}

/// Numbers in rows, and how many rows there are.
fn read_rows(cities: &str) -> Result<(Vec<f32>, usize)> {
    let empty = || Error::input(cities, "holds no cities");
    if let Some((path, name)) =
        cities.rsplit_once(':').filter(|(path, _)| path.ends_with(".safetensors") || path.ends_with(".npz"))
    {
        let tensor = read_tensors(Path::new(path))?.take(name)?;
        let values = match tensor.as_floats() {
            Some(floats) => floats.to_vec(),
            None => tensor.as_ints().unwrap_or_default().iter().map(|&x| x as f32).collect(),
        };
        let rows = tensor.shape.first().copied().filter(|_| !values.is_empty()).ok_or_else(empty)?;
        return Ok((values, rows));
    }
    if cities.ends_with(".safetensors") || cities.ends_with(".npz") {
        return Err(
            Error::usage(format!("--cities {cities} names no tensor")).hint("write FILE.safetensors:NAME")
        );
    }
    let path = Path::new(cities);
    let table = Table::read(path, TableOptions::default())?;
    let columns: Vec<&[f64]> = table
        .columns()
        .iter()
        .map(|column| match &column.cells {
            Cells::Numbers(numbers) => Ok(&numbers[..]),
            Cells::Words { .. } => {
                Err(Error::input(path.display(), format!("column \"{}\" holds words", column.name))
                    .hint("every column must hold numbers, one row a city, below a header"))
            }
        })
        .collect::<Result<_>>()?;
    if columns.is_empty() || table.rows() == 0 {
        return Err(empty());
    }
    let mut values = Vec::with_capacity(table.rows() * columns.len());
    for row in 0..table.rows() {
        for (column, named) in columns.iter().zip(table.columns()) {
            if !column[row].is_finite() {
                let found = format!("row {}, column \"{}\" has no number", row + 1, named.name);
                return Err(Error::input(path.display(), found));
            }
            values.push(column[row] as f32);
        }
    }
    Ok((values, table.rows()))
}

#[derive(Debug, Args)]
pub(super) struct ForwardArgs {
    /// Weights of the function and pictures, .safetensors or .npz
    #[arg(long)]
    weights: PathBuf,
    /// JSON with norm, num_freqs, hidden, num_layers, kmax, net, classes and widths
    #[arg(long)]
    config: PathBuf,
    /// .safetensors or .npz file to write
    #[arg(long)]
    to: PathBuf,
}

pub(super) fn forward(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let text = std::fs::read_to_string(&args.config).map_err(Error::io("read", &args.config))?;
    let config: ForwardConfig = serde_json::from_str(&text)
        .map_err(|e| Error::input(args.config.display(), "describes no implicit function").caused_by(e))?;
    let output = recompute(read_tensors(&args.weights)?, &config, &cx.device)?;
    write_tensors(&args.to, &output)?;
    let names: Vec<&str> = output.names().collect();
    let result = json!({ "to": args.to, "tensors": names });
    cx.emit(&result, |_| format!("{} tensors in {}\n", names.len(), args.to.display()))
}
