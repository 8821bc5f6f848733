//! `kiln tabpfn sample-prior`

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use serde_json::json;

use super::Prior;
use super::graph_drawing;
use crate::prior::{DataSet, Extents};

#[derive(Debug, Args)]
pub(super) struct SamplePriorArgs {
    /// Number of data sets
    #[arg(long, default_value_t = 16)]
    n: usize,
    /// Rows of each
    #[arg(long, default_value_t = 200)]
    rows: usize,
    /// Most columns
    #[arg(long, default_value_t = 100)]
    max_features: usize,
    /// Most classes
    #[arg(long, default_value_t = 10)]
    max_classes: usize,
    /// Where data sets come from
    #[arg(long, value_enum, default_value = "mix")]
    prior: Prior,
    /// Share of data sets whose classes are regions in a space of several values, not slices of one
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    regions: f64,
    /// Also draw the first two columns of each, and the graph that made it
    #[arg(long)]
    plot: bool,
    /// Folder to write, with one CSV file a data set
    #[arg(long)]
    out: PathBuf,
}

/// Writes synthetic data sets, as the network is trained on them.
pub(super) fn run(args: &SamplePriorArgs, cx: &Context) -> Result<()> {
    let extents = Extents {
        rows: args.rows,
        labelled: args.rows / 2,
        max_features: args.max_features,
        max_classes: args.max_classes,
    };
    let prior = args.prior.bag(args.regions);
    prior.check()?;
    std::fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    let bar = cx.progress(args.n as u64, "drawing");
    let mut listing = Vec::with_capacity(args.n);
    for index in 0..args.n {
        let set = prior.sample(&extents, &mut cx.rng("sample", index as u64))?;
        let file = |ending: &str| args.out.join(format!("set-{index:03}{ending}"));
        write_atomic(&file(".csv"), &csv(&set, &file(".csv"))?)?;
        if args.plot {
            scatter(&set, index).save(&file("-rows.svg"))?;
            write_atomic(&file("-graph.svg"), graph_drawing::svg(&set.mechanism).as_bytes())?;
        }
        listing.push(json!({
            "file": file(".csv"),
            "features": set.features,
            "classes": set.classes,
            "prior": if set.mechanism.nodes.is_some() { "scm" } else { "bnn" },
        }));
        bar.inc(1);
    }
    cx.emit(&listing, |listing| format!("{} data sets in {}\n", listing.len(), args.out.display()))
}

/// A header, the columns, and the class as `target`.
fn csv(set: &DataSet, path: &Path) -> Result<Vec<u8>> {
    let failed = |e: csv::Error| Error::work(format!("cannot write {}", path.display())).caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let header = (1..=set.features).map(|column| format!("x{column}")).chain(["target".into()]);
    writer.write_record(header).map_err(failed)?;
    for (row, class) in set.x.chunks(set.features).zip(&set.y) {
        writer.write_record(row.iter().map(f32::to_string).chain([class.to_string()])).map_err(failed)?;
    }
    writer
        .into_inner()
        .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e.into_error()))
}

/// The rows by their first two columns, or by their number and the only one.
fn scatter(set: &DataSet, index: usize) -> Plot {
    let plot = match set.features {
        1 => Plot::points(format!("Data set {index}"), "row", "x1"),
        _ => Plot::points(format!("Data set {index}"), "x1", "x2"),
    };
    let at = |number: usize, row: &[f32]| match row {
        [only] => (number as f64, f64::from(*only)),
        _ => (f64::from(row[0]), f64::from(row[1])),
    };
    (0..set.classes).fold(plot, |plot, class| {
        let rows = set.x.chunks(set.features).zip(&set.y).enumerate().filter(|(_, (_, y))| **y == class);
        plot.series(format!("class {class}"), rows.map(|(number, (row, _))| at(number, row)).collect())
    })
}
