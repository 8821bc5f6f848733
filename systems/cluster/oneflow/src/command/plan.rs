//! `kiln oneflow compile`: what is fixed, and what the compiler makes of it

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use kiln_core::{Context, Error, Result, Table, write_atomic};
use serde_json::json;

use super::{
    CaseArgs, Source, logical, parse_bytes, parse_hint, parse_mesh, read_hints, read_link, told_bytes,
};
use crate::boxing::Cost;
use crate::compile::{Compiler, Parallel};
use crate::graph::{Logical, Variable};
use crate::physical::{Physical, told};
use crate::pipeline::{Pipeline, Stage, Stages, cut};
use crate::sbp::{NdSbp, Placement};

/// What is fixed, and on what the graph runs.
#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    /// Devices: 4, or 2x2
    #[arg(long, default_value = "2", value_parser = parse_mesh)]
    pub mesh: Placement,
    /// auto, data, model, or a TOML file with a line "tensor" = "S0" each
    #[arg(long, default_value = "auto")]
    sbp: String,
    /// The form of one tensor; may be repeated
    #[arg(long, value_name = "NAME=SBP", value_parser = parse_hint)]
    hint: Vec<(String, NdSbp)>,
    /// Most bytes of a device
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory: Option<u64>,
    /// What is kept small: bytes that are sent, or the time that this takes on the links of --links
    #[arg(long, value_enum, default_value_t = Aim::Bytes)]
    cost: Aim,
    /// Links that `kiln cluster probe --json` measured; the slowest counts
    #[arg(long, value_name = "FILE")]
    links: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Aim {
    Bytes,
    Time,
}

impl PlanArgs {
    pub fn cost(&self) -> Result<Cost> {
        match (self.cost, &self.links) {
            (Aim::Bytes, None) => Ok(Cost::Bytes),
            (Aim::Time, Some(path)) => read_link(path).map(Cost::Seconds),
            (Aim::Time, None) => Err(Error::usage("--cost time needs --links")
                .hint("measure them by `kiln cluster probe --ranks 4 --json > links.json`")),
            (Aim::Bytes, Some(_)) => {
                Err(Error::usage("--links has no use for --cost bytes").hint("add --cost time"))
            }
        }
    }

    /// Tells a compiler what is fixed: of hints, those whose tensors it knows, where it has a part of a network only.
    fn prepare(&self, compiler: Compiler, is_part: bool) -> Result<Compiler> {
        let mut compiler = compiler.memory(self.memory).cost(self.cost()?);
        compiler = match self.sbp.as_str() {
            "auto" => compiler,
            "data" => compiler.parallel(Parallel::Data, &self.mesh),
            "model" => compiler.parallel(Parallel::Model, &self.mesh),
            file if file.ends_with(".toml") => read_hints(Path::new(file))?
                .into_iter()
                .filter(|(name, _)| !is_part || compiler.knows(name))
                .collect::<Vec<_>>()
                .into_iter()
                .fold(compiler, |compiler, (name, form)| compiler.hint(name, form)),
            other => {
                return Err(Error::usage(format!("--sbp is \"{other}\""))
                    .hint("use auto, data, model, or the path of a .toml file"));
            }
        };
        for (name, form) in &self.hint {
            if !is_part || compiler.knows(name) {
                compiler = compiler.hint(name, form.clone());
            }
        }
        Ok(compiler)
    }

    pub fn compile(&self, logical: &Logical, explain: bool, cx: &Context) -> Result<Physical> {
        let compiler = Compiler::new(logical.clone()).explain(explain);
        let physical = self.prepare(compiler, false)?.compile(&self.mesh)?;
        tell_undivided(&physical, cx);
        Ok(physical)
    }

    /// Stages, each on a mesh of its own.
    pub fn compile_stages(&self, stages: Stages, cx: &Context) -> Result<Pipeline> {
        let known =
            |name: &str| stages.stages.iter().any(|stage| Compiler::new(stage.logical.clone()).knows(name));
        if let Some((name, _)) = self.hint.iter().find(|(name, _)| !known(name)) {
            return Err(Error::usage(format!("no stage has a tensor \"{name}\""))
                .hint("`kiln oneflow plan` lists the tensors"));
        }
        let pipeline = Pipeline::compile(stages, &self.mesh, |compiler, _| self.prepare(compiler, true))?;
        pipeline.physical.iter().for_each(|physical| tell_undivided(physical, cx));
        Ok(pipeline)
    }
}

fn tell_undivided(physical: &Physical, cx: &Context) {
    for (name, work) in &physical.undivided {
        // Small things are not worth a word.
        const NOTABLE: f64 = 1e6;
        if *work >= NOTABLE {
            cx.note(format!(
                "{name} cannot be divided: every device computes all of its {work:.1e} operations"
            ));
        }
    }
}

/// Consecutive stages of a network.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pipeline")]
pub(super) struct StageArgs {
    /// Consecutive stages, each on devices of its own: --mesh says how many a stage has
    #[arg(long, default_value_t = 1)]
    pub stages: usize,
    /// The stage, from 0 on, in which a tensor is made, or a weight is read; may be repeated
    #[arg(long = "stage", value_name = "NAME=K", value_parser = parse_pin)]
    pub pins: Vec<(String, usize)>,
    /// Registers of every value [default: 2, or as many as there are stages]; 0 runs one operation after another, without
    /// actors
    #[arg(long)]
    registers: Option<usize>,
}

fn parse_pin(text: &str) -> std::result::Result<(String, usize), String> {
    let (name, stage) = text.rsplit_once('=').ok_or("write NAME=K, such as head.weight=1")?;
    let stage = stage.parse().map_err(|_| format!("\"{stage}\" is no number of a stage"))?;
    Ok((name.to_string(), stage))
}

impl StageArgs {
    /// Registers of every value; none where there are no actors.
    pub fn registers(&self) -> Result<Option<usize>> {
        const MOST_STAGES: usize = 64;
        if !(1..=MOST_STAGES).contains(&self.stages) {
            return Err(Error::usage(format!(
                "--stages is {}, but must be between 1 and {MOST_STAGES}",
                self.stages
            )));
        }
        if self.stages == 1 && !self.pins.is_empty() {
            return Err(Error::usage("--stage has no use without --stages").hint("add --stages 2"));
        }
        match self.registers.unwrap_or(self.stages.max(2)) {
            0 if self.stages > 1 => {
                Err(Error::usage("stages run as actors, which need --registers of at least 1"))
            }
            0 => Ok(None),
            registers => Ok(Some(registers)),
        }
    }
}

#[derive(Debug, Args)]
pub struct CompileArgs {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    case: CaseArgs,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    stages: StageArgs,
    /// Tell for every operation why it is computed so
    #[arg(long)]
    explain: bool,
    /// Folder to write physical.json, .svg and .dot into
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl CompileArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let registers = self.stages.registers()?.unwrap_or(1);
        if self.stages.stages > 1 {
            return self.plan_stages(cx);
        }
        let logical = logical(&self.source, &self.case, cx)?;
        let begun = Instant::now();
        let physical = self.plan.compile(&logical, self.explain, cx)?;
        let seconds = begun.elapsed().as_secs_f64();
        if let Some(folder) = &self.out {
            write_physical(&physical, folder)?;
        }
        let memory = physical.memory(registers);
        let predicted = match self.plan.cost()? {
            Cost::Bytes => None,
            cost => Some(physical.cost(cost)),
        };
        let stored: Vec<_> = physical
            .stored()
            .into_iter()
            .map(|(name, shape, sbp)| json!({"tensor": name, "shape": shape, "sbp": sbp}))
            .collect();
        let conversions: Vec<_> = physical
            .conversions()
            .map(|(node, path)| {
                let bytes: u64 = path.iter().map(|step| step.bytes).sum();
                json!({"tensor": node.name, "by": told(path), "bytes": bytes})
            })
            .collect();
        let undivided: Vec<_> =
            physical.undivided.iter().map(|(name, work)| json!({"op": name, "work": work})).collect();
        let shown = json!({
            "placement": physical.placement, "operations": logical.graph.operations.len(), "nodes": physical.nodes.len(),
            "bytes": physical.bytes(), "stored": stored, "conversions": conversions, "undivided": undivided,
            "seconds_predicted": predicted, "memory": memory, "reasons": physical.reasons, "seconds": seconds, "out": self.out,
        });
        cx.emit(&shown, |_| {
            let mut table = Table::new("Stored tensors", &["tensor", "shape", "SBP"]);
            for (name, shape, sbp) in physical.stored() {
                table.row([name, format!("{shape:?}"), sbp.to_string()]);
            }
            let mut text = format!("Stored tensors\n{}", table.to_text());
            let mut table = Table::new("Conversions", &["tensor", "by", "bytes"]);
            let mut any = false;
            for (node, path) in physical.conversions() {
                let bytes: u64 = path.iter().map(|step| step.bytes).sum();
                if bytes > 0 {
                    any = true;
                    table.row([node.name.clone(), told(path), told_bytes(bytes as f64)]);
                }
            }
            if any {
                text += &format!("Conversions that move bytes\n{}", table.to_text());
            }
            if self.explain {
                let unit = if predicted.is_some() { "seconds more" } else { "bytes more" };
                let mut table = Table::new("Reasons", &["operation", "chosen", "next best", unit]);
                for reason in &physical.reasons {
                    let second = reason.second.clone().unwrap_or_else(|| "none".into());
                    let told = |more: f64| match predicted {
                        Some(_) => format!("{more:+.2e}"),
                        None => format!("{more:+.0}"),
                    };
                    let more = reason.more.map_or_else(String::new, told);
                    table.row([reason.node.clone(), reason.chosen.clone(), second, more]);
                }
                text += &format!("Why\n{}", table.to_text());
            }
            if let Some(seconds) = predicted {
                text += &format!("sending takes {seconds:.2e} s for one piece on these links\n");
            }
            text + &format!(
                "{} operations become {} on each device of {}; {} move for one piece\n{} of weights and {} of registers on \
                 the first device; compiled in {seconds:.2} s\n",
                logical.graph.operations.len(),
                physical.nodes.len(),
                physical.placement,
                told_bytes(physical.bytes() as f64),
                told_bytes(memory.stored as f64),
                told_bytes(memory.own as f64)
            )
        })
    }
}

impl CompileArgs {
    /// Every stage, and what goes between them.
    fn plan_stages(&self, cx: &Context) -> Result<()> {
        let (graph, variables) = match (self.source.open(cx)?, self.case.case()?) {
            (Some(graph), None) => (Logical::of(graph)?.graph, None),
            (None, Some(study)) => {
                let objective = study.objective(self.case.batch()?)?;
                let logical = Logical::training(&objective, "loss", &study.initial(cx.seed))?;
                (objective, Some(logical.variables))
            }
            _ => return Err(Error::usage("one of --graph, --model and --case is needed")),
        };
        let loss = variables.as_ref().map(|_| "loss");
        let variables = variables.unwrap_or_default();
        let stages = cut(&graph, &variables, loss, self.stages.stages, &self.stages.pins)?;
        let pipeline = self.plan.compile_stages(stages, cx)?;
        if let Some(folder) = &self.out {
            for (number, physical) in pipeline.physical.iter().enumerate() {
                write_physical(physical, &folder.join(format!("stage-{number}")))?;
            }
        }
        let stages: Vec<_> = pipeline
            .stages
            .stages
            .iter()
            .zip(&pipeline.physical)
            .map(|(stage, physical)| {
                let stored: Vec<_> = physical
                    .stored()
                    .into_iter()
                    .map(|(name, shape, sbp)| json!({"tensor": name, "shape": shape, "sbp": sbp}))
                    .collect();
                json!({"work": stage.work, "nodes": physical.nodes.len(), "bytes": physical.bytes(), "stored": stored})
            })
            .collect();
        let edges: Vec<_> = pipeline
            .stages
            .edges
            .iter()
            .zip(&pipeline.edge_bytes)
            .map(|(edge, bytes)| {
                json!({"tensor": edge.name, "shape": edge.shape, "from": edge.from, "to": edge.to, "bytes": bytes})
            })
            .collect();
        let shown = json!({
            "ranks": pipeline.ranks(), "bytes": pipeline.bytes(), "bytes_per_step": pipeline.step_bytes(), "stages": stages, "edges": edges, "out": self.out,
        });
        cx.emit(&shown, |_| {
            let mut table =
                Table::new("Stages", &["stage", "ranks", "work", "weights", "among them", "bytes within"]);
            let width = pipeline.width();
            for (number, (stage, physical)) in
                pipeline.stages.stages.iter().zip(&pipeline.physical).enumerate()
            {
                table.row([
                    number.to_string(),
                    format!("{} to {}", number * width, (number + 1) * width - 1),
                    format!("{:.2e}", stage.work),
                    stage.logical.variables.len().to_string(),
                    told_weights(stage),
                    told_bytes(physical.bytes() as f64),
                ]);
            }
            let mut between = Table::new("Between stages", &["tensor", "shape", "from", "to", "bytes"]);
            for (edge, bytes) in pipeline.stages.edges.iter().zip(&pipeline.edge_bytes) {
                between.row([
                    edge.name.clone(),
                    format!("{:?}", edge.shape),
                    edge.from.to_string(),
                    edge.to.to_string(),
                    told_bytes(*bytes as f64),
                ]);
            }
            let per_step = match pipeline.step_bytes() {
                0 => String::new(),
                bytes => format!(", and {} for a step: gradients", told_bytes(bytes as f64)),
            };
            format!(
                "{}Between stages, for one piece\n{}{} move for one piece on {} ranks{per_step}\n",
                table.to_text(),
                between.to_text(),
                told_bytes(pipeline.bytes() as f64),
                pipeline.ranks()
            )
        })
    }
}

/// The largest weights of a stage.
fn told_weights(stage: &Stage) -> String {
    const TOLD: usize = 3;
    let mut weights: Vec<&Variable> = stage.logical.variables.iter().collect();
    weights.sort_by_key(|weight| std::cmp::Reverse(weight.value.num_elements()));
    let names: Vec<&str> = weights.iter().take(TOLD).map(|weight| weight.name.as_str()).collect();
    names.join(" ")
}

/// Writes a physical graph as data and pictures.
fn write_physical(physical: &Physical, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let text = serde_json::to_vec_pretty(&physical.to_json())
        .map_err(|e| Error::work("cannot write the physical graph as JSON").caused_by(e))?;
    write_atomic(&folder.join("physical.svg"), physical.to_svg().as_bytes())?;
    write_atomic(&folder.join("physical.dot"), physical.to_dot().as_bytes())?;
    write_atomic(&folder.join("physical.json"), &text)
}
