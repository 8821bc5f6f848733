//! `kiln tabpfn boundary` and `kiln tabpfn explain`

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, Plot, Result, Table as Listing, write_atomic};
use kiln_data::Matrix;
use rand::seq::SliceRandom;
use serde_json::json;

use super::ModelArgs;
use super::tables::{EnsembleArgs, TrainArgs, note_all};
use crate::boundary::Boundary;
use crate::classifier::TabPfnClassifier;
use crate::evaluate::{Labelled, Protocol};
use crate::explain::{Importance, PartialDependence, partial_dependence, permutation_importance};

/// Rows over which partial dependence is averaged.
const DEPENDENCE_ROWS: usize = 100;
/// Values of a column at which it is computed.
const DEPENDENCE_POINTS: usize = 20;
/// Bars of the importance plot.
const BARS: usize = 12;

#[derive(Debug, Args)]
pub(super) struct BoundaryArgs {
    #[command(flatten)]
    train: TrainArgs,
    /// Column along the horizontal axis
    #[arg(long, value_name = "COLUMN")]
    x: String,
    /// Column along the vertical axis
    #[arg(long, value_name = "COLUMN")]
    y: String,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ensemble: EnsembleArgs,
    /// SVG file to write
    #[arg(long, default_value = "boundary.svg")]
    out: PathBuf,
}

/// Draws decision regions over two columns.
pub(super) fn boundary(args: &BoundaryArgs, cx: &Context) -> Result<()> {
    if args.out.extension().is_none_or(|extension| extension != "svg") {
        return Err(Error::usage(format!("--out {} must end in .svg", args.out.display())));
    }
    let (table, target, _) = args.train.read()?;
    let network = args.model.open(cx)?;
    let options = args.ensemble.options()?;
    let boundary = Boundary::new(&network, &table, &target, [&args.x, &args.y], options, cx)?;
    write_atomic(&args.out, boundary.to_svg().as_bytes())?;
    let agreement = boundary.agreement();
    let result = json!({ "out": args.out, "agreement": agreement });
    cx.emit(&result, |_| {
        let percent = 100.0 * agreement;
        format!("{percent:.1} % of the labelled rows lie in their class's region: {}\n", args.out.display())
    })
}

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    train: TrainArgs,
    /// Labelled rows to explain; by default half of the labelled rows are held out
    #[arg(long, value_name = "FILE")]
    test: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ensemble: EnsembleArgs,
    /// How often each column is shuffled
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Columns whose partial dependence is drawn: these, or the most important
    #[arg(long, value_name = "COL,..", value_delimiter = ',')]
    columns: Vec<String>,
    /// Number of the most important columns to draw
    #[arg(long, default_value_t = 3)]
    top: usize,
    /// Folder to write: importance.csv, importance.svg and one SVG file a column
    #[arg(long)]
    out: PathBuf,
}

/// Tells what predictions hang on.
pub(super) fn explain(args: &ExplainArgs, cx: &Context) -> Result<()> {
    if args.repeats == 0 {
        return Err(Error::usage("--repeats must be at least 1"));
    }
    let (mut train, target, _) = args.train.read()?;
    let test = match &args.test {
        Some(path) => args.train.reading.read(path, true)?,
        None => {
            let labelled = Labelled::new(&args.train.train.display().to_string(), train.clone(), &target)?;
            let split = Protocol::default().split(&labelled, 0, cx)?;
            let test = train.select(&split.test);
            train = train.select(&split.train);
            test
        }
    };
    let network = args.model.open(cx)?;
    let classifier = TabPfnClassifier::fit(&network, train, &target, args.ensemble.options()?, cx)?;
    let encoded = classifier.encoder().encode(&test)?;
    let mut notices = classifier.notices.clone();
    // That the target is not among the columns goes without saying.
    notices.extend(encoded.notices.into_iter().filter(|notice| !notice.contains("left out")));
    note_all(&notices, cx);
    let column = test.column(&target).ok_or_else(|| test.no_column(&target))?;
    let known = classifier.labels(column, test.source())?;
    let rows: Vec<usize> = (0..known.len()).filter(|&row| known[row].is_some()).collect();
    let labels: Vec<usize> = known.into_iter().flatten().collect();
    if labels.is_empty() {
        return Err(
            Error::input(test.source(), "has no row with a class").hint("explanations need labelled rows")
        );
    }
    let rows = encoded.matrix.select_rows(&rows);
    let importances = permutation_importance(&classifier, &rows, &labels, args.repeats, cx)?;
    let drawn: Vec<String> = match args.columns.is_empty() {
        true => importances.iter().take(args.top).map(|importance| importance.column.clone()).collect(),
        false => args.columns.clone(),
    };
    let dependences =
        drawn.iter().map(|name| dependence(&classifier, &rows, name, cx)).collect::<Result<Vec<_>>>()?;

    std::fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    write_atomic(&args.out.join("importance.csv"), &importance_csv(&importances)?)?;
    importance_plot(&importances).save(&args.out.join("importance.svg"))?;
    for (place, dependence) in dependences.iter().enumerate() {
        let plot = dependence_plot(dependence, classifier.classes());
        plot.save(&args.out.join(format!("dependence-{:02}-{}.svg", place + 1, plot.file_stem())))?;
    }
    let result = json!({ "importance": importances, "dependence": dependences, "rows": labels.len(), "out": args.out });
    cx.emit(&result, |_| {
        let mut listing = Listing::new("", &["column", "rise of log-loss", "±", "fall of accuracy"]);
        for importance in &importances {
            listing.row([
                importance.column.clone(),
                format!("{:.4}", importance.loss),
                format!("{:.4}", importance.deviation),
                format!("{:.4}", importance.accuracy),
            ]);
        }
        let (rows, out) = (labels.len(), args.out.display());
        format!(
            "When a column's values change places, over {rows} rows:\n{}\nplots in {out}\n",
            listing.to_text()
        )
    })
}

fn dependence(
    classifier: &TabPfnClassifier,
    rows: &Matrix,
    name: &str,
    cx: &Context,
) -> Result<PartialDependence> {
    let columns = &classifier.encoder().columns;
    let column = columns.iter().position(|column| column.name == name).ok_or_else(|| {
        let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        Error::usage(format!("--columns names \"{name}\"")).hint(format!("there are {}", names.join(", ")))
    })?;
    let mut sample: Vec<usize> = (0..rows.rows).collect();
    sample.shuffle(&mut cx.rng("dependence", 0));
    sample.truncate(DEPENDENCE_ROWS);
    partial_dependence(classifier, &rows.select_rows(&sample), column, DEPENDENCE_POINTS, cx)
}

fn importance_csv(importances: &[Importance]) -> Result<Vec<u8>> {
    let numbers = |name: &str, figure: fn(&Importance) -> f64| {
        kiln_data::Column::numbers(name, importances.iter().map(figure).collect())
    };
    let columns = vec![
        kiln_data::Column::words("column", importances.iter().map(|i| Some(&i.column))),
        numbers("log_loss_rise", |i| i.loss),
        numbers("deviation", |i| i.deviation),
        numbers("accuracy_fall", |i| i.accuracy),
    ];
    Ok(kiln_data::Table::from_columns("importances", columns)?.to_text(b','))
}

fn importance_plot(importances: &[Importance]) -> Plot {
    let shown = &importances[..importances.len().min(BARS)];
    let names = shown.iter().map(|importance| importance.column.as_str());
    let losses = shown.iter().map(|importance| importance.loss).collect();
    Plot::bars("Importance of columns", "rise of log-loss, nats", names, [("shuffled", losses)])
}

fn dependence_plot(dependence: &PartialDependence, classes: &[String]) -> Plot {
    let title = format!("Probabilities by {}", dependence.column);
    let of_class = |class: usize| dependence.probabilities.iter().map(move |p| p[class]);
    match &dependence.words {
        Some(words) => {
            let series = classes.iter().enumerate().take(6);
            let series = series.map(|(class, name)| (name.as_str(), of_class(class).collect::<Vec<_>>()));
            Plot::bars(title, "mean probability", words.iter().map(String::as_str), series)
        }
        None => {
            let plot = Plot::lines(title, &dependence.column, "mean probability");
            classes.iter().enumerate().take(6).fold(plot, |plot, (class, name)| {
                plot.series(name, dependence.values.iter().copied().zip(of_class(class)).collect())
            })
        }
    }
}
