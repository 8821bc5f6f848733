//! Options that several verbs share: the labelled table, and how predictions are made.

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Result, TensorFile};
use kiln_data::{Column, Table, TableOptions, read_npz};

use crate::calibration::Calibrate;
use crate::classifier::ClassifierOptions;

/// The target column of NPZ files.
const NPZ_TARGET: &str = "y";

/// The labelled table.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// Labelled rows: .csv, .tsv, .arff (each also .gz), or .npz with X_train, y_train and X_test
    #[arg(long, value_name = "FILE")]
    pub train: PathBuf,
    /// Column that holds the classes [default: y for .npz]
    #[arg(long, value_name = "COLUMN")]
    pub target: Option<String>,
    #[command(flatten)]
    pub reading: ReadArgs,
}

/// How files are read.
#[derive(Debug, Args)]
pub(super) struct ReadArgs {
    /// Columns to leave out
    #[arg(long, value_name = "COL,..", value_delimiter = ',')]
    pub drop: Vec<String>,
    /// Numbers have a comma for the decimal point
    #[arg(long)]
    pub decimal_comma: bool,
}

impl ReadArgs {
    /// Reads a table and leaves out what is not wanted. Of a table that `must_have` them, the columns must be there.
    pub fn read(&self, path: &Path, must_have: bool) -> Result<Table> {
        let mut table = Table::read(path, TableOptions { decimal_comma: self.decimal_comma })?;
        for column in &self.drop {
            if must_have || table.column(column).is_some() {
                table.take(column)?;
            }
        }
        Ok(table)
    }
}

impl TrainArgs {
    /// The labelled table, the name of its target column, and the rows to predict where the same file holds them.
    pub fn read(&self) -> Result<(Table, String, Option<Table>)> {
        if self.train.extension().is_some_and(|extension| extension == "npz") {
            let (train, test) = from_arrays(&self.train)?;
            return Ok((train, NPZ_TARGET.into(), test));
        }
        let table = self.reading.read(&self.train, true)?;
        let target = target(&table, self.target.as_deref())?;
        Ok((table, target, None))
    }
}

/// The target column: the one named, which must be there, or one that is called so.
pub(super) fn target(table: &Table, named: Option<&str>) -> Result<String> {
    match named {
        Some(name) if table.column(name).is_some() => Ok(name.into()),
        Some(name) => Err(table.no_column(name)),
        None => {
            let usual = ["target", "class", "label", "y"];
            let found = table.columns().iter().find(|c| usual.contains(&c.name.to_lowercase().as_str()));
            let missing = || {
                let error = table.no_column("target");
                let columns = error.hint_text().unwrap_or_default().to_string();
                Error::usage("which column holds the classes?")
                    .hint(format!("say --target COLUMN; {columns}"))
            };
            found.map(|column| column.name.clone()).ok_or_else(missing)
        }
    }
}

/// `X_train [rows, columns]`, `y_train [rows]` and perhaps `X_test [rows, columns]`, with columns named `x1, x2, ..`.
fn from_arrays(path: &Path) -> Result<(Table, Option<Table>)> {
    let mut file = read_npz(path)?;
    let wrong = |found: String| {
        Error::input(path.display(), found)
            .hint("expected X_train [rows, columns], y_train [rows] and X_test [rows, columns]")
    };
    let matrix = |file: &mut TensorFile, name: &str| -> Result<Vec<Column>> {
        let array = file.take(name)?;
        let &[rows, width] = &array.shape[..] else {
            return Err(wrong(format!("\"{name}\" has the shape {:?}", array.shape)));
        };
        let values: Vec<f64> = match &array.values {
            kiln_core::Values::Float(values) => values.iter().map(|&x| f64::from(x)).collect(),
            kiln_core::Values::Int(values) => values.iter().map(|&x| x as f64).collect(),
        };
        if let Some(at) = values.iter().position(|x| x.is_infinite()) {
            return Err(wrong(format!(
                "\"{name}\" is infinite at row {}, column {}",
                at / width,
                at % width
            )));
        }
        let column = |c: usize| (0..rows).map(|row| values[row * width + c]).collect();
        Ok((0..width).map(|c| Column::numbers(format!("x{}", c + 1), column(c))).collect())
    };
    let mut train = matrix(&mut file, "X_train")?;
    let test = if file.get("X_test").is_some() { Some(matrix(&mut file, "X_test")?) } else { None };
    let labels = file.take("y_train")?;
    let numbers: Vec<f64> = match &labels.values {
        kiln_core::Values::Int(values) => values.iter().map(|&y| y as f64).collect(),
        kiln_core::Values::Float(values) => values.iter().map(|&y| f64::from(y)).collect(),
    };
    train.push(Column::numbers(NPZ_TARGET, numbers));
    let source = path.display().to_string();
    let test = test.map(|columns| Table::from_columns(&format!("{source}, X_test"), columns)).transpose()?;
    Ok((Table::from_columns(&source, train)?, test))
}

/// How predictions are made.
#[derive(Debug, Args)]
pub(super) struct EnsembleArgs {
    /// Forward passes that are averaged: a number, or `all` combinations of shifts
    #[arg(long, default_value = "32")]
    members: String,
    /// No member sees power-transformed columns
    #[arg(long)]
    no_power: bool,
    /// Divides the logits
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Average over samples of so many labelled rows, where there are more
    #[arg(long, value_name = "ROWS")]
    sample_rows: Option<usize>,
    /// Take more than 1000 labelled rows, and more columns than the model has inputs
    #[arg(long)]
    allow_large: bool,
    /// Take more classes than the model has outputs
    #[arg(long)]
    many_class: bool,
    /// Tell apart at most so many classes in one pass, and more by code words: slower, often better for many classes
    #[arg(long, value_name = "CLASSES")]
    groups: Option<usize>,
    /// Calibrate probabilities on the labelled rows, which predict each other in three parts
    #[arg(long, value_enum, default_value = "auto")]
    calibrate: Calibrate,
}

impl EnsembleArgs {
    pub fn options(&self) -> Result<ClassifierOptions> {
        let members =
            match self.members.as_str() {
                "all" => None,
                number => Some(number.parse().map_err(|_| {
                    Error::usage(format!("--members {number} is neither `all` nor a number"))
                })?),
            };
        let options = ClassifierOptions {
            members,
            power: !self.no_power,
            temperature: self.temperature,
            sample_rows: self.sample_rows,
            allow_large: self.allow_large,
            many_class: self.many_class,
            groups: self.groups,
            calibrate: self.calibrate,
            cache: true,
        };
        options.check()?;
        Ok(options)
    }
}

/// Tells the person what was made of the tables.
pub(super) fn note_all(notices: &[String], cx: &Context) {
    notices.iter().for_each(|notice| cx.note(format!("note: {notice}")));
}
