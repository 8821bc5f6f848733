//! `kiln oneflow train`

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use burn::tensor::TensorData;
use clap::Args;
use kiln_cluster::ClusterArgs;
use kiln_compiler::Graph;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use serde_json::json;

use super::plan::{PlanArgs, StageArgs};
use super::{CaseArgs, Source, told_bytes};
use crate::actor::Trace;
use crate::case::{Case, Columns, Examples};
use crate::execute::Run;
use crate::graph::{Logical, Variable};
use crate::model::Model;
use crate::network::{Loss, Rows, Trainee, is_trained};
use crate::optimiser::{Kind, Optimiser};
use crate::parts;
use crate::pipeline::{self, Flow, cut};
use crate::sbp::{NdSbp, Region};
use crate::train::{Trained, train};

#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    case: CaseArgs,
    /// Examples: x and y of an .npz; a CSV for wide-deep, a text for hybrid-gpt [default for cases: generated]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// --model and --graph: what becomes small [default: by the type of y]
    #[arg(long, value_enum)]
    loss: Option<Loss>,
    /// --model and --graph: the output that predicts y [default: the first]
    #[arg(long, value_name = "NAME")]
    output: Option<String>,
    /// --model and --graph: weights whose names begin so stay as they are; may be repeated
    #[arg(long, value_name = "NAME")]
    freeze: Vec<String>,
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
    #[command(flatten)]
    stages: StageArgs,
    /// Parts of a batch that go through one after another; their gradients are added up
    #[arg(long, default_value_t = 1)]
    micro_batches: usize,
    /// Go on from what --out holds
    #[arg(long)]
    resume: bool,
    /// Folder for the model, its log and plots
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Gives the batch of a step.
type Batches = Box<dyn Fn(usize) -> Result<Vec<TensorData>> + Sync>;
/// Writes what was trained, after so many steps.
type Save = Box<dyn Fn(usize, &[Variable]) -> Result<()> + Sync>;

/// What the ranks in this process gave, the bytes that all ranks should send in a step, and how many ranks there are.
struct Ran {
    results: Vec<(usize, Trained)>,
    predicted: u64,
    ranks: usize,
    stored: Vec<(String, Vec<usize>, NdSbp)>,
}

/// What is trained, on what.
struct Task {
    name: String,
    /// The loss of a batch; weights are inputs.
    objective: Graph,
    /// The same with gradients, and the weights as they are.
    logical: Logical,
    /// Steps that were made before.
    first: usize,
    batches: Batches,
    save: Save,
}

impl TrainArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(Error::usage(format!("--lr is {}, but must be above 0", self.lr)));
        }
        if self.steps == 0 {
            return Err(Error::usage("--steps is 0, but must be at least 1"));
        }
        if self.micro_batches == 0 {
            return Err(Error::usage("--micro-batches is 0, but must be at least 1"));
        }
        let task = match (self.case.case()?, self.source.is_given()) {
            (Some(case), false) => self.of_case(case, cx)?,
            (None, true) => self.of_network(cx)?,
            _ => {
                return Err(Error::usage("one of --case, --model and --graph is needed")
                    .hint("cases are mlp, softmax-head, wide-deep and hybrid-gpt"));
            }
        };
        let first = task.first;
        if first >= self.steps {
            return Err(Error::usage(format!(
                "{first} steps were made, which is not below --steps {}",
                self.steps
            )));
        }
        let mut log = String::from("step,loss\n");
        if self.resume {
            let path = self.out.join("log.csv");
            log = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            log = log.lines().take(first + 1).map(|line| format!("{line}\n")).collect();
        }
        let bar = Mutex::new(cx.progress((self.steps - first) as u64, "steps"));
        let seen = |losses: &[f32]| {
            let bar = bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            bar.inc(losses.len() as u64);
            if let Some(loss) = losses.last() {
                bar.message(format!("loss {loss:.4}"));
            }
        };
        let run = Run {
            pieces: self.steps - first,
            first,
            registers: self.stages.registers()?,
            optimiser: Optimiser { kind: self.optimiser, lr: self.lr },
            seed: cx.seed,
            traced: true,
            ..Run::default()
        };
        let Ran { mut results, predicted, ranks, stored } =
            if self.stages.stages > 1 || self.micro_batches > 1 {
                self.in_stages(&task, run, cx, &seen)?
            } else {
                self.at_once(&task, run, cx, &seen)?
            };
        let sent: u64 = results.iter().map(|(_, trained)| trained.bytes_sent).sum();
        let peaks: Vec<usize> = results.iter().map(|(_, trained)| trained.peak_bytes).collect();
        if results.first().is_none_or(|(rank, _)| *rank != 0) {
            return Ok(());
        }
        let trace = Trace::together(
            results.iter().filter_map(|(_, trained)| trained.course.as_ref()).map(|course| &course.trace),
        );
        let (_, trained) = results.swap_remove(0);
        let made = first + trained.losses.len();
        let rows = trained.losses.iter().enumerate().map(|(at, loss)| format!("{},{loss}\n", first + at + 1));
        log.extend(rows);
        (task.save)(made, &trained.variables)?;
        write_atomic(&self.out.join("log.csv"), log.as_bytes())?;
        plot_losses(&log, &task.name, &self.out.join("loss.svg"))?;
        if trained.course.is_some() {
            write_atomic(&self.out.join("trace.svg"), trace.to_svg().as_bytes())?;
            write_atomic(&self.out.join("trace.json"), trace.to_chrome().to_string().as_bytes())?;
        }
        let predicted = predicted * trained.losses.len() as u64;
        let (start, end) = (trained.losses.first().copied(), trained.losses.last().copied());
        let shown = json!({
            "network": task.name, "ranks": ranks, "steps": made, "first_loss": start, "loss": end, "bytes_sent": sent,
            "bytes_predicted": predicted, "peak_register_bytes": peaks, "seconds": trained.seconds, "out": self.out,
            "stored": stored.iter().map(|(name, _, sbp)| json!({"tensor": name, "sbp": sbp})).collect::<Vec<_>>(),
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

    /// Trains on one mesh, a batch at once.
    fn at_once(&self, task: &Task, run: Run, cx: &Context, seen: &(dyn Fn(&[f32]) + Sync)) -> Result<Ran> {
        let physical = self.plan.compile(&task.logical, false, cx)?;
        let ranks = self.plan.mesh.len();
        let nodes = physical.nodes.len();
        cx.note(format!(
            "{}: {nodes} operations on each of {ranks} ranks, {} a step",
            task.name,
            told_bytes(physical.bytes() as f64)
        ));
        let results = self.cluster.run(ranks, cx, |world| {
            train(&physical, &task.logical, &world, &run, &task.batches, cx, seen)
                .map(|trained| (world.rank(), trained))
        })?;
        Ok(Ran { results, predicted: physical.bytes(), ranks, stored: physical.stored() })
    }

    /// Trains in stages, a batch in parts.
    fn in_stages(&self, task: &Task, run: Run, cx: &Context, seen: &(dyn Fn(&[f32]) + Sync)) -> Result<Ran> {
        let variables = &task.logical.variables;
        let stages = cut(&task.objective, variables, Some("loss"), self.stages.stages, &self.stages.pins)?;
        let pipeline = self.plan.compile_stages(stages, cx)?;
        let (ranks, count) = (pipeline.ranks(), self.micro_batches);
        let predicted = pipeline.bytes() * count as u64 + pipeline.step_bytes();
        cx.note(format!(
            "{}: {} stages of {} ranks, {count} micro-batches and {} a step",
            task.name,
            self.stages.stages,
            pipeline.width(),
            told_bytes(predicted as f64)
        ));
        let flow = Flow { steps: run.pieces, first: run.first, run: Run { pieces: count, ..run } };
        let batch = Mutex::new((usize::MAX, Vec::new()));
        let feed = |piece: usize| {
            let mut batch = batch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if batch.0 != piece / count {
                *batch = (piece / count, (task.batches)(piece / count)?);
            }
            batch.1.iter().map(|data| part_of(data, piece % count, count)).collect()
        };
        let results = self.cluster.run(ranks, cx, |world| {
            pipeline::train(&pipeline, &world, &flow, &feed, cx, &|loss| seen(&[loss]))
                .map(|trained| (world.rank(), trained))
        })?;
        let stored = pipeline.physical.iter().flat_map(|physical| physical.stored()).collect();
        Ok(Ran { results, predicted, ranks, stored })
    }

    /// Examples of a micro-batch.
    fn micro_batch(&self, batch: usize) -> Result<usize> {
        match self.micro_batches {
            count if !batch.is_multiple_of(count) => {
                Err(Error::usage(format!("a batch of {batch} cannot be cut into {count} micro-batches"))
                    .hint("--batch must be a multiple of --micro-batches"))
            }
            count => Ok(batch / count),
        }
    }

    /// Refuses a folder in which there is something already.
    fn refuse_full(&self, full: bool) -> Result<()> {
        match full && !self.resume {
            true => Err(Error::usage(format!("{} holds a model already", self.out.display()))
                .hint("add --resume to go on from it, or name another folder")),
            false => Ok(()),
        }
    }

    fn of_case(&self, case: Case, cx: &Context) -> Result<Task> {
        if self.loss.is_some() || self.output.is_some() || !self.freeze.is_empty() {
            return Err(Error::usage("--loss, --output and --freeze are for --model and --graph")
                .hint("a case has its own loss"));
        }
        self.refuse_full(self.out.join("config.json").exists())?;
        let columns = self.columns.as_deref().map_or_else(|| Ok(Columns::default()), Columns::read)?;
        let examples = match &self.data {
            Some(path) => Examples::read(path, &case, &columns)?,
            None => Examples::generated(&case),
        };
        let batch = self.case.batch()?;
        let objective = case.objective(self.micro_batch(batch)?)?;
        let mut logical = Logical::training(&objective, "loss", &case.initial(cx.seed))?;
        let mut first = 0;
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
        }
        let (seed, out, of_batches) = (cx.seed, self.out.clone(), case.clone());
        Ok(Task {
            name: case.name().into(),
            objective,
            logical,
            first,
            batches: Box::new(move |step| Ok(examples.batch(&of_batches, batch, seed, step as u64))),
            save: Box::new(move |made, variables| Model::save(&out, &case, &columns, made, variables)),
        })
    }

    fn of_network(&self, cx: &Context) -> Result<Task> {
        let is_graph = self.source.graph.is_some();
        let holds = if is_graph { "graph.json" } else { "config.json" };
        self.refuse_full(self.out.join(holds).exists())?;
        if self.resume && !is_trained(&self.out) {
            return Err(Error::usage(format!("{} holds nothing to go on from", self.out.display()))
                .hint("leave out --resume"));
        }
        let from = if self.resume { Some(self.out.as_path()) } else { None };
        let micro_batch = match (&self.source.model, self.case.batch) {
            (Some(_), _) => Some(self.micro_batch(self.case.batch()?)?),
            (None, Some(batch)) => Some(self.micro_batch(batch)?),
            (None, None) => None,
        };
        let mut trainee = self.source.trainee(from, micro_batch, cx)?;
        trainee.freeze(&self.freeze)?;
        let data = self.data.as_ref().ok_or_else(|| {
            Error::usage("--data is needed").hint("an .npz with x and y, the first axis counting examples")
        })?;
        let rows = Rows::read(data, &trainee.graph)?;
        let output = trainee.output(self.output.as_deref())?;
        let port = trainee.graph.outputs[output].port.clone();
        let loss = self.loss.map_or_else(|| rows.usual_loss(&port), Ok)?;
        rows.check(&port, loss)?;
        let batch = trainee.batch()? * self.micro_batches;
        let (objective, values) = trainee.objective(output, loss)?;
        let mut logical = Logical::training(&objective, "loss", &values).map_err(|error| {
            error.hint(
                "what cannot be trained through must lie before everything that is trained: see --freeze",
            )
        })?;
        let first = if self.resume { Trainee::restore(&self.out, &mut logical.variables)? } else { 0 };
        cx.note(format!(
            "{} weights of {} tensors, {} of {} examples at once, {}",
            values.values().map(TensorData::num_elements).sum::<usize>(),
            values.len(),
            batch,
            rows.count,
            loss.name()
        ));
        let (seed, out) = (cx.seed, self.out.clone());
        let trainee = Mutex::new(trainee);
        Ok(Task {
            name: objective.kind.clone(),
            objective,
            logical,
            first,
            batches: Box::new(move |step| Ok(rows.batch(batch, &port, loss, seed, step as u64))),
            save: Box::new(move |made, variables| {
                let mut trainee = trainee.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                trainee.set(variables);
                trainee.save(&out, made, variables)
            }),
        })
    }
}

/// Part `index` of `count` equal parts along the first axis.
fn part_of(data: &TensorData, index: usize, count: usize) -> Result<TensorData> {
    parts::cut(data, &Region::whole(data.shape()).split(0, count, index))
}

fn plot_losses(log: &str, name: &str, path: &Path) -> Result<()> {
    let points: Vec<(f64, f64)> = log
        .lines()
        .skip(1)
        .filter_map(|line| {
            line.split_once(',').and_then(|(step, loss)| Some((step.parse().ok()?, loss.parse().ok()?)))
        })
        .collect();
    Plot::lines("Training loss", "step", "loss").series(name, points).save(path)
}
