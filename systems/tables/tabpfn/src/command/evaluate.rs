//! `kiln tabpfn eval` and `kiln tabpfn bench`

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Card, Context, Error, Report, Result, Table as Listing, html, write_atomic};
use kiln_data::{Column, Table};
use serde_json::json;

use super::ModelArgs;
use super::tables::{EnsembleArgs, ReadArgs, note_all, target};
use crate::baselines::Baseline;
use crate::evaluate::{Labelled, Method, Outcome, Protocol, evaluate};
use crate::results::{
    TableOutcome, areas_listing, reliability_plot, scores_listing, summaries, summary_listing,
};

/// How tables are split and with what the network is compared.
#[derive(Debug, Args)]
struct ComparisonArgs {
    /// How often a table is split
    #[arg(long, default_value_t = 5)]
    splits: usize,
    /// Share of the rows to learn from
    #[arg(long, default_value_t = 0.5)]
    train_fraction: f64,
    /// Most rows to learn from
    #[arg(long, default_value_t = 1000)]
    max_train_rows: usize,
    /// Who else predicts; `none` for nobody
    #[arg(long, value_name = "NAME,..", default_value = "logreg,knn,gbdt,rf")]
    baselines: String,
    /// Also tune boosted trees over so many random settings
    #[arg(long, value_name = "SETTINGS")]
    tune: Option<usize>,
}

impl ComparisonArgs {
    fn protocol(&self) -> Protocol {
        Protocol {
            splits: self.splits,
            train_fraction: self.train_fraction,
            max_train_rows: self.max_train_rows,
        }
    }

    fn methods(&self) -> Result<Vec<Method>> {
        let mut methods = vec![Method::TabPfn];
        for name in self.baselines.split(',').filter(|name| *name != "none") {
            let baseline = <Baseline as clap::ValueEnum>::from_str(name.trim(), true).map_err(|_| {
                Error::usage(format!("--baselines names \"{name}\""))
                    .hint("there are logreg, knn, gbdt and rf")
            })?;
            methods.push(Method::Baseline(baseline));
        }
        methods.extend(self.tune.map(Method::TunedBoosting));
        Ok(methods)
    }
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Labelled rows: .csv, .tsv or .arff, each also .gz
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Column that holds the classes
    #[arg(long, value_name = "COLUMN")]
    target: Option<String>,
    #[command(flatten)]
    reading: ReadArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ensemble: EnsembleArgs,
    #[command(flatten)]
    comparison: ComparisonArgs,
    /// Draw confidence against accuracy into this SVG or PNG file
    #[arg(long, value_name = "FILE")]
    reliability: Option<PathBuf>,
}

/// Compares classifiers on repeated splits of a table.
pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let table = args.reading.read(&args.data, true)?;
    let target = target(&table, args.target.as_deref())?;
    let labelled = Labelled::new(&args.data.display().to_string(), table, &target)?;
    let (methods, options) = (args.comparison.methods()?, args.ensemble.options()?);
    let network = args.model.open(cx)?;
    let outcomes = evaluate(&network, &labelled, &methods, options, &args.comparison.protocol(), cx)?;
    if let Some(path) = &args.reliability {
        reliability_plot(&outcomes).save(path)?;
    }
    let result = json!({
        "rows": labelled.rows.rows,
        "columns": labelled.rows.columns,
        "classes": labelled.classes,
        "protocol": args.comparison.protocol(),
        "methods": outcomes,
    });
    cx.emit(&result, |_| {
        let title = format!("{}: means of {} splits", labelled.name, args.comparison.splits);
        let listing = scores_listing(&title, &outcomes);
        let mut text = format!("{}\n{}", listing.title, listing.to_text());
        if let Some(path) = &args.reliability {
            text += &format!("\nconfidence against accuracy: {}\n", path.display());
        }
        text
    })
}

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Folder of labelled tables: .csv, .tsv or .arff, each also .gz
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    /// Column that holds the classes in every table [default: target, class, label or y, or the last]
    #[arg(long, value_name = "COLUMN")]
    target: Option<String>,
    #[command(flatten)]
    reading: ReadArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ensemble: EnsembleArgs,
    #[command(flatten)]
    comparison: ComparisonArgs,
    /// CSV file to write, one line a table and method; the page goes beside it
    #[arg(long, value_name = "FILE", default_value = "bench.csv")]
    out: PathBuf,
    /// Print the results as a Markdown table
    #[arg(long)]
    markdown: bool,
}

/// Compares classifiers on all tables of a folder.
pub(super) fn bench(args: &BenchArgs, card: Card, cx: &Context) -> Result<()> {
    let (methods, options) = (args.comparison.methods()?, args.ensemble.options()?);
    args.comparison.protocol().check()?;
    let network = args.model.open(cx)?;
    let files = tables_in(&args.folder)?;
    let progress = cx.progress(files.len() as u64, "tables");
    let (mut results, mut skipped) = (Vec::new(), Vec::new());
    for path in &files {
        progress.message(path.display().to_string());
        let outcome = read_labelled(path, args).and_then(|table| {
            let outcomes = evaluate(&network, &table, &methods, options, &args.comparison.protocol(), cx)?;
            let (rows, columns, classes) = (table.rows.rows, table.rows.columns, table.classes.len());
            Ok(TableOutcome { name: table.name, rows, columns, classes, outcomes })
        });
        match outcome {
            Ok(outcome) => results.push(outcome),
            Err(e) if e.kind() == kiln_core::ErrorKind::Interrupted => return Err(e),
            // One table that is not fit does not cost the others.
            Err(e) => {
                let name = path.display().to_string();
                let error = e.to_string();
                skipped.push(if error.contains(&name) { error } else { format!("{name}: {error}") });
            }
        }
        progress.inc(1);
    }
    drop(progress);
    let skipped_notes: Vec<String> = skipped.iter().map(|error| format!("left out: {error}")).collect();
    note_all(&skipped_notes, cx);
    if results.is_empty() {
        return Err(Error::input(args.folder.display(), "holds no table that could be evaluated")
            .hint(skipped.first().cloned().unwrap_or_default()));
    }
    csv_of(&results)?.write(&args.out)?;
    let page = args.out.with_extension("html");
    let mut report = Report::on_data(card);
    report.tables = vec![summary_listing(&results), areas_listing(&results)];
    report.notes = skipped_notes;
    write_atomic(&page, html::page("TabPFN beside other classifiers", &[report])?.as_bytes())?;
    let summaries = summaries(&results);
    let result = json!({
        "tables": results.iter().map(|r| json!({ "name": r.name, "methods": r.outcomes })).collect::<Vec<_>>(),
        "summary": summaries,
        "skipped": skipped,
        "out": args.out,
        "page": page,
    });
    cx.emit(&result, |_| {
        let listings = [areas_listing(&results), summary_listing(&results)];
        let text = |listing: &Listing| match args.markdown {
            true => markdown(listing),
            false => format!("{}\n{}", listing.title, listing.to_text()),
        };
        let text: Vec<String> = listings.iter().map(text).collect();
        format!("{}\n{} and {}\n", text.join("\n"), args.out.display(), page.display())
    })
}

fn read_labelled(path: &Path, args: &BenchArgs) -> Result<Labelled> {
    let table = args.reading.read(path, false)?;
    let last = table.columns().last().map(|column| column.name.clone()).unwrap_or_default();
    let target = match &args.target {
        Some(name) => target(&table, Some(name))?,
        None => target(&table, None).unwrap_or(last),
    };
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let name = name.split('.').next().unwrap_or_default().to_string();
    Labelled::new(&name, table, &target)
}

/// Files that hold tables, in the order of their names.
fn tables_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_table = |path: &Path| {
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
        let name = name.trim_end_matches(".gz");
        path.is_file() && [".csv", ".tsv", ".arff"].iter().any(|ending| name.ends_with(ending))
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if is_table(&path) {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::input(folder.display(), "holds no tables")
            .hint("read are files ending in .csv, .tsv, .arff, and these with .gz"));
    }
    files.sort();
    Ok(files)
}

/// One line a table and method.
fn csv_of(results: &[TableOutcome]) -> Result<Table> {
    let lines: Vec<(&TableOutcome, &Outcome)> =
        results.iter().flat_map(|r| r.outcomes.iter().map(move |o| (r, o))).collect();
    let words = |name: &str, word: fn(&(&TableOutcome, &Outcome)) -> String| {
        Column::words(name, lines.iter().map(|line| Some(word(line))))
    };
    let numbers = |name: &str, number: fn(&(&TableOutcome, &Outcome)) -> f64| {
        Column::numbers(name, lines.iter().map(number).collect())
    };
    let columns = vec![
        words("table", |(r, _)| r.name.clone()),
        words("method", |(_, o)| o.method.clone()),
        numbers("rows", |(r, _)| r.rows as f64),
        numbers("columns", |(r, _)| r.columns as f64),
        numbers("classes", |(r, _)| r.classes as f64),
        numbers("accuracy", |(_, o)| o.mean.accuracy),
        numbers("roc_auc", |(_, o)| o.mean.roc_auc),
        numbers("log_loss", |(_, o)| o.mean.log_loss),
        numbers("calibration_error", |(_, o)| o.mean.calibration_error),
        numbers("seconds", |(_, o)| o.seconds),
    ];
    Table::from_columns("results", columns)
}

/// The listing as a Markdown table.
fn markdown(listing: &Listing) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule = format!("|{}\n", "---|".repeat(listing.columns.len()));
    let rows: String = listing.rows.iter().map(|row| line(row)).collect();
    format!("**{}**\n\n{}{rule}{rows}", listing.title, line(&listing.columns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_tables_have_a_rule_below_their_heads() {
        let mut listing = Listing::new("T", &["a", "b"]);
        listing.row(["x", "1"]);
        assert_eq!(markdown(&listing), "**T**\n\n| a | b |\n|---|---|\n| x | 1 |\n");
    }
}
