//! `kiln tabpfn predict` and `kiln tabpfn preprocess`

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::{Column, Encoder, Matrix, Table, write_npz};
use serde_json::{Value, json};

use super::ModelArgs;
use super::tables::{EnsembleArgs, TrainArgs, note_all};
use crate::classifier::TabPfnClassifier;
use crate::metrics::Scores;
use crate::preprocess::{Mode, Preprocessor};

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    #[command(flatten)]
    train: TrainArgs,
    /// Rows to predict; if they have the target column, predictions are scored
    #[arg(long, value_name = "FILE")]
    test: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ensemble: EnsembleArgs,
    /// Column that names the rows; not used for predictions
    #[arg(long, value_name = "COL")]
    id: Option<String>,
    /// CSV file to write; standard output by default
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Predicts the classes of rows.
pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (mut train, target, own_test) = args.train.read()?;
    let mut test = match (&args.test, own_test) {
        (Some(path), _) => args.train.reading.read(path, false)?,
        (None, Some(test)) => test,
        (None, None) => {
            return Err(Error::usage("there are no rows to predict").hint("say --test FILE"));
        }
    };
    let id = match &args.id {
        Some(name) => {
            if train.column(name).is_some() {
                train.take(name)?;
            }
            test.take(name)?
        }
        None => Column::numbers("row", (1..=test.rows()).map(|row| row as f64).collect()),
    };
    let truth = if test.column(&target).is_some() { Some(test.take(&target)?) } else { None };
    let network = args.model.open(cx)?;
    let begun = Instant::now();
    let classifier = TabPfnClassifier::fit(&network, train, &target, args.ensemble.options()?, cx)?;
    let encoded = classifier.encoder().encode(&test)?;
    let notices = [classifier.notices.clone(), encoded.notices].concat();
    note_all(&notices, cx);
    let labels = truth.map(|column| classifier.labels(&column, test.source())).transpose()?;
    let (predicted, probabilities) = classifier.predict(&encoded.matrix, cx)?;
    let seconds = begun.elapsed().as_secs_f64();

    let table = predictions(&classifier, id, &predicted, &probabilities)?;
    let scores = labels.and_then(|labels| scores(&probabilities, &labels));
    if let Some(path) = &args.out {
        table.write(path)?;
    }
    let mut result = json!({
        "rows": predicted.len(),
        "classes": classifier.classes(),
        "members": classifier.members(),
        "calibration": classifier.calibration(),
        "seconds": seconds,
        "scores": scores,
        "notices": notices,
        "out": args.out,
    });
    if args.out.is_none() {
        result["predictions"] = as_json(&table);
    }
    let summary = scores.map(|scores| describe(&scores));
    if args.out.is_none() {
        // What is printed is the table alone.
        summary.iter().for_each(|summary| cx.note(summary));
        return cx.emit(&result, |_| String::from_utf8_lossy(&table.to_text(b',')).into());
    }
    cx.emit(&result, |_| {
        let (rows, members) = (predicted.len(), classifier.members());
        let out = args.out.as_deref().unwrap_or(std::path::Path::new(""));
        let summary = summary.map_or(String::new(), |summary| summary + "\n");
        format!("{rows} rows predicted by {members} members in {seconds:.2} s: {}\n{summary}", out.display())
    })
}

/// The name of a row, its class, and a probability for each class.
pub(super) fn predictions(
    classifier: &TabPfnClassifier,
    mut id: Column,
    predicted: &[usize],
    probabilities: &Matrix,
) -> Result<Table> {
    let classes = classifier.classes();
    let mut names: Vec<String> = vec!["prediction".into()];
    names.extend(classes.iter().map(|class| format!("proba_{class}")));
    if names.contains(&id.name) {
        id.name += " (id)";
    }
    let prediction = Column::words(&names[0], predicted.iter().map(|&class| Some(&classes[class])));
    // Six digits: more would be noise.
    let column = |class: usize| probabilities.column(class).iter().map(|p| (p * 1e6).round() / 1e6).collect();
    let columns = (0..classes.len()).map(|class| Column::numbers(&names[class + 1], column(class)));
    Table::from_columns("predictions", [id, prediction].into_iter().chain(columns).collect())
}

/// Figures over the rows that have a label; `None` where none has.
pub(super) fn scores(probabilities: &Matrix, labels: &[Option<usize>]) -> Option<Scores> {
    let rows: Vec<usize> = (0..labels.len()).filter(|&row| labels[row].is_some()).collect();
    let known: Vec<usize> = labels.iter().copied().flatten().collect();
    (!rows.is_empty()).then(|| Scores::new(&probabilities.select_rows(&rows), &known))
}

pub(super) fn describe(scores: &Scores) -> String {
    format!(
        "accuracy {:.4}, ROC AUC (one class against one) {:.4}, log-loss {:.4}, calibration error {:.4}",
        scores.accuracy, scores.roc_auc, scores.log_loss, scores.calibration_error
    )
}

fn as_json(table: &Table) -> Value {
    let cell = |column: &Column, row: usize| match &column.cells {
        kiln_data::Cells::Numbers(numbers) => json!(numbers[row]),
        kiln_data::Cells::Words { .. } => json!(column.text(row)),
    };
    let row = |row: usize| -> Value {
        let cells = table.columns().iter().map(|column| (column.name.clone(), cell(column, row)));
        Value::Object(cells.collect())
    };
    (0..table.rows()).map(row).collect()
}

#[derive(Debug, Args)]
pub(super) struct PreprocessArgs {
    #[command(flatten)]
    train: TrainArgs,
    /// Rows to bring into the same form
    #[arg(long, value_name = "FILE")]
    test: Option<PathBuf>,
    /// What the columns go through
    #[arg(long, value_enum, default_value = "none")]
    mode: Mode,
    /// Columns of the network's input, to which the values are scaled
    #[arg(long, default_value_t = 100)]
    max_features: usize,
    /// NPZ file to write: X_train, y_train, X_test, columns (their places in the table)
    #[arg(long)]
    out: PathBuf,
}

/// Writes what the network would see of a table, apart from rotation and padding.
pub(super) fn preprocess(args: &PreprocessArgs, cx: &Context) -> Result<()> {
    let (mut train, target, own_test) = args.train.read()?;
    let (classes, labels) = crate::classifier::classes(&train.take(&target)?, train.source())?;
    let encoder = Encoder::fit(&train);
    let encoded = encoder.encode(&train)?;
    note_all(&encoded.notices, cx);
    let varying = (0..encoded.matrix.columns)
        .filter(|&column| !crate::preprocess::is_constant(&encoded.matrix.column(column)))
        .count();
    if varying == 0 || varying > args.max_features {
        let found = format!("{varying} columns vary, must be 1 to {}", args.max_features);
        return Err(Error::input(train.source(), found).hint("--drop leaves columns out"));
    }
    let steps = Preprocessor::fit(&encoded.matrix, args.mode, args.max_features);
    let array = |matrix: &Matrix| {
        HostTensor::float([matrix.rows, matrix.columns], matrix.values.iter().map(|&x| x as f32).collect())
    };
    let mut file = TensorFile::new();
    file.insert("X_train", array(&steps.apply(&encoded.matrix)));
    file.insert("y_train", HostTensor::int([labels.len()], labels.iter().map(|&y| y as i64).collect()));
    let columns = steps.columns();
    file.insert("columns", HostTensor::int([columns.len()], columns.iter().map(|&c| c as i64).collect()));
    let test = match &args.test {
        Some(path) => Some(args.train.reading.read(path, false)?),
        None => own_test,
    };
    if let Some(mut test) = test {
        if test.column(&target).is_some() {
            test.take(&target)?;
        }
        let encoded = encoder.encode(&test)?;
        note_all(&encoded.notices, cx);
        file.insert("X_test", array(&steps.apply(&encoded.matrix)));
    }
    write_npz(&args.out, &file)?;
    let result = json!({ "out": args.out, "classes": classes, "columns": columns });
    cx.emit(&result, |_| format!("{} columns in {}\n", columns.len(), args.out.display()))
}
