//! `kiln hypernet predict` and `eval`

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Result, write_atomic};
use kiln_nn::likeliest;
use serde::Serialize;
use serde_json::json;

use crate::apps::continual;
use crate::apps::uncertainty::{calibration_error, mean_nll};
use crate::data::{Coded, Rows};
use crate::hypernet::HyperNet;
use crate::model::{self, Config, mean};
use crate::training::accuracy;

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .csv or .npz file of rows
    #[arg(long)]
    data: PathBuf,
    /// All rows belong to this task, whatever the table says
    #[arg(long)]
    task: Option<String>,
    /// Draws of the weights, where they depend on noise
    #[arg(long, default_value_t = 20)]
    samples: usize,
    /// CSV file to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .csv or .npz file of labelled rows
    #[arg(long)]
    data: PathBuf,
    /// Draws of the weights, where they depend on noise
    #[arg(long, default_value_t = 20)]
    samples: usize,
}

/// How well predictions agree with classes.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Scores {
    rows: usize,
    pub accuracy: f64,
    /// Mean negative log-likelihood, nats.
    nll: f64,
    /// Expected calibration error over 15 bins.
    calibration_error: f64,
    /// Accuracy of every task, where weights depend on tasks.
    tasks: Vec<TaskScore>,
}

#[derive(Debug, Clone, Serialize)]
struct TaskScore {
    task: String,
    rows: usize,
    accuracy: f64,
}

impl Scores {
    /// The figures in sentences.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "accuracy {:.4} on {} rows, negative log-likelihood {:.4}, calibration error {:.4}\n",
            self.accuracy, self.rows, self.nll, self.calibration_error
        );
        for task in &self.tasks {
            text += &format!("  task {}: {:.4} on {} rows\n", task.task, task.accuracy, task.rows);
        }
        text
    }
}

/// Scores a model.
pub(super) fn score(
    config: &Config,
    hyper: &HyperNet,
    rows: &Coded,
    samples: usize,
    cx: &Context,
) -> Result<Scores> {
    let p = mean(&model::predict(config, hyper, rows, samples, cx)?);
    let classes = config.coding.classes.len();
    let mut tasks = Vec::new();
    for (number, name) in config.coding.tasks.iter().enumerate() {
        let of_task: Vec<usize> = (0..rows.len()).filter(|&row| rows.tasks[row] == number).collect();
        if of_task.is_empty() {
            continue;
        }
        let p: Vec<f32> =
            of_task.iter().flat_map(|&row| p[row * classes..(row + 1) * classes].to_vec()).collect();
        let y: Vec<usize> = of_task.iter().map(|&row| rows.y[row]).collect();
        tasks.push(TaskScore { task: name.clone(), rows: y.len(), accuracy: accuracy(&p, &y) });
    }
    Ok(Scores {
        rows: rows.len(),
        accuracy: accuracy(&p, &rows.y),
        nll: mean_nll(&p, &rows.y),
        calibration_error: calibration_error(&p, &rows.y, 15),
        tasks,
    })
}

/// Rows of a file for a trained model; with `task`, all of that task.
fn read_rows(config: &Config, path: &Path, task: Option<&str>, labelled: bool) -> Result<Coded> {
    let mut columns = config.coding.columns.clone();
    if task.is_some() {
        if columns.task.is_none() {
            return Err(Error::usage("the model's weights depend on no task").hint("leave --task out"));
        }
        columns.task = None;
    }
    let mut rows = Rows::read(path, &columns, Some(&config.coding.features), labelled)?;
    if let Some(task) = task {
        rows.tasks = vec![task.to_string(); rows.count];
    }
    config.coding.encode(&rows, path)
}

/// Writes the probabilities of all classes for every row.
pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    if args.samples == 0 {
        return Err(Error::usage("--samples must be at least 1"));
    }
    let (config, hyper) = model::open(&args.model, cx)?;
    let rows = read_rows(&config, &args.data, args.task.as_deref(), false)?;
    let draws = model::predict(&config, &hyper, &rows, args.samples, cx)?;
    let p = mean(&draws);
    let names = &config.coding.classes;
    let classes = names.len();

    let failed = |e: csv::Error| Error::work("cannot lay out the predictions").caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut heads = vec!["row".to_string(), "class".into()];
    heads.extend(names.iter().map(|name| format!("p_{name}")));
    if draws.len() > 1 {
        heads.extend(names.iter().map(|name| format!("std_{name}")));
    }
    heads.push("entropy".into());
    writer.write_record(&heads).map_err(failed)?;
    for (row, p) in p.chunks(classes).enumerate() {
        let mut cells = vec![(row + 1).to_string(), names[likeliest(p)].clone()];
        cells.extend(p.iter().map(|p| format!("{p:.6}")));
        if draws.len() > 1 {
            for (class, mean) in p.iter().enumerate() {
                let square = |draw: &Vec<f32>| f64::from(draw[row * classes + class] - mean).powi(2);
                let variance = draws.iter().map(square).sum::<f64>() / draws.len() as f64;
                cells.push(format!("{:.6}", variance.sqrt()));
            }
        }
        cells.push(format!("{:.6}", continual::entropy(p)));
        writer.write_record(&cells).map_err(failed)?;
    }
    let bytes =
        writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the predictions: {e}")))?;
    write_atomic(&args.out, &bytes)?;
    let result = json!({ "rows": rows.len(), "draws": draws.len(), "out": args.out });
    cx.emit(&result, |_| format!("{} rows in {}\n", rows.len(), args.out.display()))
}

/// Scores a trained model on labelled rows.
pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    if args.samples == 0 {
        return Err(Error::usage("--samples must be at least 1"));
    }
    let (config, hyper) = model::open(&args.model, cx)?;
    let rows = read_rows(&config, &args.data, None, true)?;
    cx.emit(&score(&config, &hyper, &rows, args.samples, cx)?, Scores::to_text)
}
