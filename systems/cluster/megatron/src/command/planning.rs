//! `kiln megatron schedule`, `plan` and `perf`

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Result, Table, write_atomic};
use serde_json::json;

use crate::figures::Figure;
use crate::perf::{Cluster, GptShape, PerfModel, Plan, plan, table1};
use crate::schedule::{Kind, Schedule};
use crate::trace::Trace;

#[derive(Debug, Args)]
pub struct ScheduleArgs {
    /// Pipeline ranks
    #[arg(long)]
    pipeline: usize,
    /// Micro-batches of a batch
    #[arg(long)]
    microbatches: usize,
    /// Chunks of layers on each rank
    #[arg(long, default_value_t = 1)]
    chunks: usize,
    /// Order of passes
    #[arg(long, value_enum, default_value = "1f1b")]
    kind: Kind,
    /// Seconds of a stage's forward pass
    #[arg(long, default_value_t = 1.0)]
    forward: f64,
    /// Seconds of a stage's backward pass
    #[arg(long, default_value_t = 2.0)]
    backward: f64,
    /// SVG file to draw
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// More operations than anyone reads.
const MOST_OPERATIONS: usize = 1_000_000;

impl ScheduleArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let schedule = Schedule::new(self.kind, self.pipeline, self.microbatches, self.chunks)?;
        for (name, seconds) in [("--forward", self.forward), ("--backward", self.backward)] {
            if !(seconds.is_finite() && seconds > 0.0) {
                return Err(Error::usage(format!("{name} is {seconds}, but must be above 0")));
            }
        }
        let operations = [2, self.pipeline, self.microbatches, self.chunks]
            .iter()
            .try_fold(1usize, |n, &m| n.checked_mul(m));
        if operations.is_none_or(|n| n > MOST_OPERATIONS) {
            return Err(Error::usage(format!("that is more than {MOST_OPERATIONS} operations"))
                .hint("use fewer micro-batches, ranks or chunks"));
        }
        let trace = Trace::simulate(&schedule, self.forward, self.backward)?;
        if let Some(path) = &self.svg {
            write_atomic(path, trace.to_svg(&schedule.to_string()).as_bytes())?;
        }
        let orders: Vec<Vec<String>> = (0..self.pipeline)
            .map(|rank| schedule.operations(rank).iter().map(ToString::to_string).collect())
            .collect();
        let live: Vec<usize> = (0..self.pipeline).map(|rank| schedule.peak_in_flight(rank)).collect();
        let result = json!({
            "schedule": schedule,
            "order": orders,
            "makespan": trace.makespan(),
            "bubble": trace.bubble(),
            "bubble_formula": schedule.bubble(),
            "peak_in_flight": live,
        });
        cx.emit(&result, |_| {
            let mut text = String::new();
            for (rank, (order, live)) in orders.iter().zip(&live).enumerate() {
                text += &format!("rank {rank}, at most {live} in flight: {}\n", order.join(" "));
            }
            text + &format!(
                "{:.6} s in all, bubble {:.6} of the work (formula {:.6})\n",
                trace.makespan(),
                trace.bubble(),
                schedule.bubble()
            )
        })
    }
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// gpt2-small, gpt2-xl, gpt3-6.7b, gpt3-175b, gpt-530b or gpt-1t
    #[arg(long, conflicts_with_all = ["layers", "hidden", "heads"])]
    model: Option<String>,
    /// Layers
    #[arg(long, required_unless_present = "model")]
    layers: Option<usize>,
    /// Width
    #[arg(long, required_unless_present = "model")]
    hidden: Option<usize>,
    /// Attention heads
    #[arg(long, required_unless_present = "model")]
    heads: Option<usize>,
    /// Token ids there are [default: 51200]
    #[arg(long)]
    vocab: Option<usize>,
    /// Tokens of a sample [default: 2048]
    #[arg(long)]
    seq: Option<usize>,
    /// a100-selene, h100, loopback, or the path of a cluster.toml
    #[arg(long, default_value = "a100-selene")]
    cluster: String,
    /// Devices [default: those of the cluster.toml, or 64]
    #[arg(long)]
    gpus: Option<usize>,
    /// Samples of a step
    #[arg(long)]
    global_batch: usize,
    /// Tokens to train on
    #[arg(long, default_value_t = 300e9)]
    tokens: f64,
    /// Keep all activations instead of computing them again
    #[arg(long)]
    no_recompute: bool,
    /// Divide the optimiser's state over the data-parallel ranks
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false, value_name = "true|false")]
    distributed_optimizer: bool,
    /// How many to show
    #[arg(long, default_value_t = 10)]
    top: usize,
}

impl PlanArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let shape = self.shape()?;
        let cluster = self.cluster()?;
        if self.global_batch == 0 {
            return Err(Error::usage("--global-batch is 0, but must be at least 1"));
        }
        if !(self.tokens.is_finite() && self.tokens > 0.0) {
            return Err(Error::usage(format!("--tokens is {}, but must be above 0", self.tokens)));
        }
        let mut model = PerfModel::new(cluster, shape);
        model.recompute = !self.no_recompute;
        model.distributed_optimiser = self.distributed_optimizer;
        let mut plans = plan(&model, self.global_batch, self.tokens)?;
        let found = plans.len();
        plans.truncate(self.top.max(1));
        let remarks = takeaways(&plans[0], &model);
        let result = json!({
            "parameters": shape.parameters(), "cluster": model.cluster, "found": found, "plans": plans, "remarks": remarks,
        });
        cx.emit(&result, |_| {
            let title = format!(
                "{:.1} billion parameters on {} devices, {found} divisions fit",
                shape.parameters() / 1e9,
                model.cluster.gpus
            );
            let text = format!("{title}\n{}", plan_table(&title, &plans).to_text());
            remarks.iter().fold(text, |text, remark| text + remark + "\n")
        })
    }

    fn shape(&self) -> Result<GptShape> {
        let mut shape = match (&self.model, self.layers, self.hidden, self.heads) {
            (Some(name), ..) => GptShape::preset(name)?,
            (None, Some(layers), Some(hidden), Some(heads)) => {
                GptShape { layers, hidden, heads, vocab: 51200, seq: 2048 }
            }
            _ => return Err(Error::usage("--model, or --layers, --hidden and --heads are needed")),
        };
        shape.vocab = self.vocab.unwrap_or(shape.vocab);
        shape.seq = self.seq.unwrap_or(shape.seq);
        for (name, value) in [
            ("--layers", shape.layers),
            ("--hidden", shape.hidden),
            ("--heads", shape.heads),
            ("--vocab", shape.vocab),
            ("--seq", shape.seq),
        ] {
            if value == 0 {
                return Err(Error::usage(format!("{name} is 0, but must be at least 1")));
            }
        }
        Ok(shape)
    }

    fn cluster(&self) -> Result<Cluster> {
        let cluster = if self.cluster.ends_with(".toml") {
            let path = Path::new(&self.cluster);
            let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
            let mut cluster: Cluster = toml::from_str(&text).map_err(|e| {
                let found = e.to_string();
                Error::input(path.display(), format!("does not describe a cluster: {}", found.trim_end())).hint(
                    "it needs gpus, gpus_per_node, peak_tflops, memory_gb, hbm_gbps, intra_gbps, inter_gbps and latency_us",
                )
            })?;
            cluster.gpus = self.gpus.unwrap_or(cluster.gpus);
            cluster
        } else {
            Cluster::preset(&self.cluster, self.gpus.unwrap_or(64))?
        };
        cluster.check()?;
        const MOST: usize = 1 << 20;
        match cluster.gpus > MOST {
            true => Err(Error::usage(format!("{} devices are more than {MOST}", cluster.gpus))),
            false => Ok(cluster),
        }
    }
}

fn plan_table(title: &str, plans: &[Plan]) -> Table {
    let mut table = Table::new(
        title,
        &[
            "t",
            "p",
            "d",
            "b",
            "v",
            "TFLOP/s a device",
            "of the peak",
            "s an iteration",
            "bubble",
            "GB a device",
            "days",
        ],
    );
    for plan in plans {
        let d = &plan.division;
        table.row([
            d.tensor.to_string(),
            d.pipeline.to_string(),
            d.data.to_string(),
            d.micro_batch.to_string(),
            d.chunks.to_string(),
            format!("{:.1}", plan.iteration.tflops),
            format!("{:.1} %", 100.0 * plan.peak_share),
            format!("{:.3}", plan.iteration.seconds),
            format!("{:.1} %", 100.0 * plan.bubble_fraction),
            format!("{:.1}", plan.memory_gb),
            format!("{:.1}", plan.days),
        ]);
    }
    table
}

/// What the paper's three rules say about the best division.
fn takeaways(best: &Plan, model: &PerfModel) -> Vec<String> {
    let (d, node) = (&best.division, model.cluster.gpus_per_node);
    let mut remarks = Vec::new();
    remarks.push(if d.tensor <= node {
        format!("tensor parallelism stays within a node: {} of {node} devices", d.tensor)
    } else {
        format!(
            "tensor parallelism leaves the node: {} ranks in nodes of {node}, as nothing smaller is faster",
            d.tensor
        )
    });
    let model_parallel = d.tensor * d.pipeline;
    let smaller = (1..model_parallel).rev().find(|n| model.cluster.gpus.is_multiple_of(*n));
    remarks.push(format!(
        "t p = {model_parallel} devices hold the model, {} copies of it share the batch",
        d.data
    ));
    if let Some(smaller) = smaller {
        let state = 18.0 * model.shape.parameters() / smaller as f64 / 1e9;
        if state > model.cluster.memory_gb {
            remarks.push(format!(
                "{smaller} would not: {state:.0} GB of parameters and optimiser on each of {} GB",
                model.cluster.memory_gb
            ));
        }
    }
    remarks.push(format!(
        "micro-batches of {}: (b'/b + p - 1) (t_f + t_b) is least there, with {:.0} of them in flight through {} stages",
        d.micro_batch,
        d.micro_batches(),
        d.pipeline * d.chunks
    ));
    remarks
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["table", "figure"])))]
pub struct PerfArgs {
    /// 1: weak scaling from 1.7 billion to a trillion parameters
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=1))]
    table: Option<u8>,
    /// A figure of the paper, as SVG and CSV
    #[arg(long, value_enum)]
    figure: Option<Figure>,
    /// Folder for the figure's files
    #[arg(long, default_value = ".")]
    out: PathBuf,
}

impl PerfArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        match self.figure {
            Some(figure) => self.figure(figure, cx),
            None => self.table(cx),
        }
    }

    fn table(&self, cx: &Context) -> Result<()> {
        let rows: Vec<_> = table1()
            .into_iter()
            .map(|row| {
                let model = PerfModel::new(Cluster::a100_selene(row.gpus), row.shape);
                let iteration = model.iteration(&row.division);
                let memory = model.memory(&row.division) / 1e9;
                json!({
                    "billions": row.billions, "gpus": row.gpus, "division": row.division, "paper_tflops": row.paper_tflops,
                    "model_tflops": iteration.tflops, "difference": iteration.tflops / row.paper_tflops - 1.0,
                    "petaflops": iteration.tflops * row.gpus as f64 / 1e3, "memory_gb": memory,
                })
            })
            .collect();
        cx.emit(&rows, |_| {
            let title = "TFLOP/s a GPU: the paper's Table 1 and the model";
            let mut table = Table::new(
                title,
                &[
                    "10⁹ parameters",
                    "GPUs",
                    "t",
                    "p",
                    "d",
                    "b",
                    "v",
                    "paper",
                    "model",
                    "difference",
                    "PFLOP/s in all",
                    "GB a GPU",
                ],
            );
            for (row, value) in table1().iter().zip(&rows) {
                let d = &row.division;
                let number = |key: &str| value[key].as_f64().unwrap_or(f64::NAN);
                table.row([
                    row.billions.to_string(),
                    row.gpus.to_string(),
                    d.tensor.to_string(),
                    d.pipeline.to_string(),
                    d.data.to_string(),
                    d.micro_batch.to_string(),
                    d.chunks.to_string(),
                    format!("{:.0}", row.paper_tflops),
                    format!("{:.1}", number("model_tflops")),
                    format!("{:+.1} %", 100.0 * number("difference")),
                    format!("{:.1}", number("petaflops")),
                    format!("{:.1}", number("memory_gb")),
                ]);
            }
            format!("{title}\n{}", table.to_text())
        })
    }

    fn figure(&self, figure: Figure, cx: &Context) -> Result<()> {
        let curves = figure.curves();
        fs::create_dir_all(&self.out).map_err(Error::io("create", &self.out))?;
        let svg = self.out.join(format!("{}.svg", figure.name()));
        figure.plot(&curves).save(&svg)?;
        let failed = |e: csv::Error| Error::work("cannot write the figure as CSV").caused_by(e);
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record([figure.axis(), "configuration", "tflops_per_gpu"]).map_err(failed)?;
        for curve in &curves {
            for (x, y) in &curve.points {
                let y = y.map_or("does not fit".to_string(), |y| format!("{y:.3}"));
                writer.write_record([x.to_string(), curve.name.clone(), y]).map_err(failed)?;
            }
        }
        let bytes = writer
            .into_inner()
            .map_err(|e| Error::work("cannot write the figure as CSV").caused_by(e.into_error()))?;
        let table = self.out.join(format!("{}.csv", figure.name()));
        write_atomic(&table, &bytes)?;
        let result = json!({ "svg": svg, "csv": table });
        cx.emit(&result, |_| format!("{} and {}\n", svg.display(), table.display()))
    }
}
