//! `kiln oneflow train` and `predict`

use std::path::PathBuf;
use std::sync::Mutex;

use clap::Args;
use kiln_cluster::ClusterArgs;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use kiln_data::write_tensors;
use serde_json::json;

use super::graphs::{PlanArgs, named};
use super::{CaseArgs, told_bytes};
use crate::case::{Columns, Examples};
use crate::execute::Run;
use crate::model::Model;
use crate::optimiser::{Kind, Optimiser};
use crate::train::train;

#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    case: CaseArgs,
    /// Examples: a CSV for wide-deep, a text for hybrid-gpt, x and y of an .npz for the others [default: generated]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// wide-deep: a TOML file with label, numeric and categorical columns [default: as in Criteo's data]
    #[arg(long, value_name = "FILE")]
    columns: Option<PathBuf>,
    #[command(flatten)]
    plan: PlanArgs,
    /// Steps in all
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// How weights change
    #[arg(long, value_enum, default_value = "adam")]
    optimiser: Kind,
    /// Learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Registers of every value; 0 runs one operation after another, without actors
    #[arg(long, default_value_t = 2)]
    registers: usize,
    /// Go on from what --out holds
    #[arg(long)]
    resume: bool,
    /// Folder for the model, its log and plots
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl TrainArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let case = self.case.case()?.ok_or_else(|| {
            Error::usage("--case is needed").hint("mlp, softmax-head, wide-deep or hybrid-gpt")
        })?;
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(Error::usage(format!("--lr is {}, but must be above 0", self.lr)));
        }
        if self.steps == 0 {
            return Err(Error::usage("--steps is 0, but must be at least 1"));
        }
        let columns = self.columns.as_deref().map_or_else(|| Ok(Columns::default()), Columns::read)?;
        let examples = match &self.data {
            Some(path) => Examples::read(path, &case, &columns)?,
            None => Examples::generated(&case),
        };
        let batch = self.case.batch;
        let mut logical = case.logical(batch, &case.initial(cx.seed))?;
        let mut first = 0;
        let mut log = String::from("step,loss\n");
        if self.resume {
            let before = Model::open(&self.out)?;
            if before.case != case {
                return Err(Error::usage(format!(
                    "{} holds {:?}, but {case:?} is asked for",
                    self.out.display(),
                    before.case
                )));
            }
            first = Model::restore(&self.out, &mut logical.variables)?;
            let path = self.out.join("log.csv");
            log = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            log = log.lines().take(first + 1).map(|line| format!("{line}\n")).collect();
        } else if self.out.join("config.json").exists() {
            return Err(Error::usage(format!("{} holds a model already", self.out.display()))
                .hint("add --resume to go on from it, or name another folder"));
        }
        if first >= self.steps {
            return Err(Error::usage(format!(
                "{first} steps were made, which is not below --steps {}",
                self.steps
            )));
        }
        let physical = self.plan.compile(&logical, false, cx)?;
        let ranks = self.plan.mesh.len();
        cx.note(format!(
            "{}: {} operations on each of {ranks} ranks, {} a step",
            case.name(),
            physical.nodes.len(),
            told_bytes(physical.bytes() as f64)
        ));
        let run = Run {
            pieces: self.steps - first,
            first,
            registers: (self.registers > 0).then_some(self.registers),
            optimiser: Optimiser { kind: self.optimiser, lr: self.lr },
            seed: cx.seed,
            checked: false,
            traced: true,
        };
        let progress = cx.progress((self.steps - first) as u64, "steps");
        let bar = Mutex::new(progress);
        let feed = |step: usize| Ok(examples.batch(&case, batch, cx.seed, step as u64));
        let mut results = self.cluster.run(ranks, cx, |world| {
            train(&physical, &logical, &world, &run, &feed, cx, &|losses| {
                let bar = bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                bar.inc(losses.len() as u64);
                if let Some(loss) = losses.last() {
                    bar.message(format!("loss {loss:.4}"));
                }
            })
            .map(|trained| (world.rank(), trained))
        })?;
        let sent: u64 = results.iter().map(|(_, trained)| trained.bytes_sent).sum();
        let peaks: Vec<usize> = results.iter().map(|(_, trained)| trained.peak_bytes).collect();
        if results.first().is_none_or(|(rank, _)| *rank != 0) {
            return Ok(());
        }
        let (_, trained) = results.swap_remove(0);
        let made = first + trained.losses.len();
        let rows = trained.losses.iter().enumerate().map(|(at, loss)| format!("{},{loss}\n", first + at + 1));
        log.extend(rows);
        Model::save(&self.out, &case, &columns, made, &trained.variables)?;
        write_atomic(&self.out.join("log.csv"), log.as_bytes())?;
        let points: Vec<(f64, f64)> = log
            .lines()
            .skip(1)
            .filter_map(|line| {
                line.split_once(',').and_then(|(step, loss)| Some((step.parse().ok()?, loss.parse().ok()?)))
            })
            .collect();
        Plot::lines("Training loss", "step", "loss")
            .series(case.name(), points)
            .save(&self.out.join("loss.svg"))?;
        if let Some(course) = &trained.course {
            write_atomic(&self.out.join("trace.svg"), course.trace.to_svg().as_bytes())?;
            write_atomic(&self.out.join("trace.json"), course.trace.to_chrome().to_string().as_bytes())?;
        }
        let predicted = physical.bytes() * trained.losses.len() as u64;
        let (start, end) = (trained.losses.first().copied(), trained.losses.last().copied());
        let shown = json!({
            "case": case.name(), "ranks": ranks, "steps": made, "first_loss": start, "loss": end, "bytes_sent": sent,
            "bytes_predicted": predicted, "peak_register_bytes": peaks, "seconds": trained.seconds, "out": self.out,
            "stored": physical.stored().iter().map(|(name, _, sbp)| json!({"tensor": name, "sbp": sbp})).collect::<Vec<_>>(),
        });
        cx.emit(&shown, |_| {
            format!(
                "step {made}: loss {:.4}, {:.1} ms a step, {} sent ({} predicted for all ranks)\n{}\n",
                end.unwrap_or(f32::NAN),
                1e3 * trained.seconds / trained.losses.len().max(1) as f64,
                told_bytes(sent as f64),
                told_bytes(predicted as f64),
                self.out.display()
            )
        })?;
        match trained.stopped {
            true => Err(Error::interrupted(format!(
                "stopped after step {made}; repeat the line with --resume to go on"
            ))),
            false => Ok(()),
        }
    }
}

#[derive(Debug, Args)]
pub struct PredictArgs {
    /// Folder that `kiln oneflow train` wrote
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Examples as for training; what is to be predicted scores the result
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// File for the scores, .npz or .safetensors
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl PredictArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let Model { case, columns, weights, .. } = Model::open(&self.model)?;
        let examples = Examples::read(&self.data, &case, &columns)?;
        let rows = examples.samples(&case);
        let mut data = examples.at(&case, &(0..rows).collect::<Vec<_>>());
        let target = data.pop().ok_or_else(|| Error::work("there are no examples"))?;
        let graph = case.predictor(rows, weights)?.graph()?;
        let outputs = graph.run(&data)?;
        let scores = &outputs[0];
        let width = scores.shape()[1];
        let values: Vec<f32> = scores.iter::<f32>().collect();
        let targets: Vec<f64> = target.iter::<f64>().collect();
        let right = values.chunks(width).zip(&targets).filter(|(row, target)| {
            let found = match row {
                [odds] => f64::from(u8::from(*odds > 0.0)),
                row => row
                    .iter()
                    .enumerate()
                    .max_by(|a, b| a.1.total_cmp(b.1))
                    .map_or(-1.0, |(class, _)| class as f64),
            };
            found == **target
        });
        let accuracy = right.count() as f64 / targets.len().max(1) as f64;
        if let Some(path) = &self.out {
            write_tensors(path, &named(&graph, &outputs))?;
        }
        let shown =
            json!({"case": case.name(), "rows": targets.len(), "accuracy": accuracy, "out": self.out});
        cx.emit(&shown, |_| {
            format!(
                "{} of {} right ({:.1} %)\n",
                (accuracy * targets.len() as f64).round(),
                targets.len(),
                100.0 * accuracy
            )
        })
    }
}
