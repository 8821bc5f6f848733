//! `kiln oneflow signatures`, `boxing`, `select` and `actors`

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{DType, TensorData};
use burn_flex::FlexTensor;
use clap::Args;
use kiln_cluster::run_threads;
use kiln_compiler::operation_name;
use kiln_core::{Context, Error, Result, Table, write_atomic};
use serde_json::json;

use super::{Source, parse_mesh, parse_shape, told_bytes};
use crate::actor::{Clock, Trace, Worked, chain, simulate};
use crate::boxing::Router;
use crate::compile::{Compiler, Parallel};
use crate::exchange::Lines;
use crate::graph::Logical;
use crate::linear::{Linear, Selected};
use crate::physical::{Physical, told};
use crate::sbp::{NdSbp, Placement};
use crate::signature::{Signature, TABLE, signatures};
use crate::soundness::{gather, scatter};

#[derive(Debug, Args)]
pub struct SignaturesArgs {
    /// Of these operations alone
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    #[command(flatten)]
    source: Source,
}

impl SignaturesArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let asked = |kind: &str| self.op.as_ref().is_none_or(|op| op.eq_ignore_ascii_case(kind));
        let Some(graph) = self.source.open(cx)? else {
            let rows: Vec<_> = TABLE.iter().filter(|row| asked(row.kind)).collect();
            if rows.is_empty() {
                return Err(Error::usage(format!(
                    "there is no row for \"{}\"",
                    self.op.as_deref().unwrap_or_default()
                ))
                .hint("what has no row is computed as copies; `kiln oneflow signatures` lists all rows"));
            }
            let shown: Vec<_> =
                rows.iter().map(|row| json!({"op": row.kind, "law": row.law.to_string()})).collect();
            return cx.emit(&shown, |_| {
                let title = "Operations and how they may be divided";
                let mut table = Table::new(title, &["operation", "law"]);
                for row in &rows {
                    table.row([row.kind.to_string(), row.law.to_string()]);
                }
                table.to_text()
            });
        };
        let mut found: Vec<(String, Vec<Vec<usize>>, Vec<Signature>)> = Vec::new();
        for operation in &graph.operations {
            let kind = operation_name(operation)?;
            let shapes = operation.inputs().map(|tensor| tensor.shape.to_vec()).collect();
            if asked(&kind) && !found.iter().any(|(known, of, _)| *known == kind && *of == shapes) {
                found.push((kind, shapes, signatures(operation)?));
            }
        }
        if found.is_empty() {
            return Err(Error::usage(format!(
                "the graph has no operation \"{}\"",
                self.op.as_deref().unwrap_or_default()
            )));
        }
        let shown: Vec<_> = found
            .iter()
            .map(|(kind, shapes, signatures)| json!({"op": kind, "shapes": shapes, "signatures": signatures}))
            .collect();
        cx.emit(&shown, |_| {
            let mut text = String::new();
            for (kind, shapes, signatures) in &found {
                text += &format!("{kind} {shapes:?}\n");
                signatures.iter().for_each(|signature| text += &format!("  {signature}\n"));
            }
            text
        })
    }
}

#[derive(Debug, Args)]
pub struct BoxingArgs {
    /// What it is: one of S0, S1, …, B, P, Pmax, Pmin an axis of the mesh
    #[arg(long)]
    from: NdSbp,
    /// What it becomes
    #[arg(long)]
    to: NdSbp,
    /// Shape of the tensor
    #[arg(long, value_parser = parse_shape_list)]
    shape: Shape,
    /// Devices
    #[arg(long, value_parser = parse_mesh)]
    mesh: Placement,
    /// Bytes of an element
    #[arg(long, default_value_t = 4)]
    element: usize,
    /// Convert a random tensor of f32 on thread ranks, and compare values and bytes
    #[arg(long)]
    check: bool,
}

/// Extents, in a type of its own, as clap takes vectors for repeated options.
#[derive(Debug, Clone)]
struct Shape(Vec<usize>);

fn parse_shape_list(text: &str) -> std::result::Result<Shape, String> {
    parse_shape(text).map(Shape)
}

impl BoxingArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let (shape, mesh) = (&self.shape.0, &self.mesh.mesh);
        self.from.check("--from", shape, mesh)?;
        self.to.check("--to", shape, mesh)?;
        let element = if self.check { 4 } else { self.element };
        let path = Router::new(mesh).path(shape, element, &self.from, &self.to)?;
        let bytes: u64 = path.iter().map(|step| step.bytes).sum();
        let mut state = self.from.clone();
        let states: Vec<String> = path
            .iter()
            .map(|step| {
                state.0[step.axis] = step.to;
                state.to_string()
            })
            .collect();
        let steps: Vec<_> = path
            .iter()
            .zip(&states)
            .map(|(step, state)| json!({"by": step.collective(), "axis": step.axis, "to": state, "bytes": step.bytes}))
            .collect();
        let sent = if self.check { Some(self.convert(&path, cx)?) } else { None };
        let shown = json!({"from": self.from, "to": self.to, "shape": shape, "mesh": mesh, "bytes": bytes, "path": steps, "bytes_sent": sent});
        cx.emit(&shown, |_| {
            let mut text = format!("{} {shape:?} on {}\n", self.from, self.mesh);
            for (step, state) in path.iter().zip(&states) {
                text += &format!("  {state}: {}, {}\n", told(&[*step]), told_bytes(step.bytes as f64));
            }
            text += &format!("{} in all\n", told_bytes(bytes as f64));
            match sent {
                Some(sent) => text + &format!("checked: the values are right, and {sent} bytes were sent\n"),
                None => text,
            }
        })
    }

    /// Bytes that thread ranks sent, after the values were compared.
    fn convert(&self, path: &[crate::boxing::Step], cx: &Context) -> Result<u64> {
        let (shape, mesh) = (&self.shape.0, &self.mesh.mesh);
        // Every device may hold all of it.
        const MOST_CHECKED: usize = 1 << 24;
        let count: usize = shape.iter().product();
        if count > MOST_CHECKED {
            return Err(Error::usage(format!(
                "--check moves a real tensor, of at most {MOST_CHECKED} elements"
            ))
            .hint("leave it out, or take a smaller --shape"));
        }
        let whole =
            TensorData::new((0..count).map(|at| (at % 1000) as i64).collect::<Vec<_>>(), shape.clone());
        let mut rng = cx.rng("boxing", 0);
        let parts: Vec<TensorData> = scatter(&whole, &self.from, mesh, &mut rng)?;
        let parts: Vec<TensorData> = parts.into_iter().map(|part| part.convert_dtype(DType::F32)).collect();
        let ranks = run_threads(self.mesh.len(), |world| {
            let lines = Lines::new(&world, mesh)?;
            let before = lines.bytes_sent();
            let local =
                lines.convert(FlexTensor::from_data(parts[world.rank()].clone()), shape, &self.from, path)?;
            Ok((local.into_data(), lines.bytes_sent() - before))
        })?;
        let sent = ranks.iter().map(|(_, sent)| sent).sum();
        let found = gather(shape, mesh, &self.to, ranks.into_iter().map(|(local, _)| local).collect())?;
        if found != whole.convert_dtype(DType::F32) {
            return Err(Error::work("the converted tensor has other values"));
        }
        Ok(sent)
    }
}

#[derive(Debug, Args)]
pub struct SelectArgs {
    /// Sizes of the classifier: batch=64,features=512,classes=100000
    #[arg(long, value_parser = parse_linear, conflicts_with_all = ["graph", "model"])]
    linear: Option<Linear>,
    #[command(flatten)]
    source: Source,
    /// Devices
    #[arg(long)]
    devices: usize,
}

fn parse_linear(text: &str) -> std::result::Result<Linear, String> {
    let (mut batch, mut features, mut classes) = (None, None, None);
    for part in text.split(',') {
        let (name, value) = part.split_once('=').ok_or("write batch=64,features=512,classes=1000")?;
        let value =
            value.trim().parse().map_err(|_| format!("{name} is \"{value}\", which is no whole number"))?;
        match name.trim() {
            "batch" => batch = Some(value),
            "features" => features = Some(value),
            "classes" => classes = Some(value),
            other => return Err(format!("\"{other}\" is none of batch, features and classes")),
        }
    }
    match (batch, features, classes) {
        (Some(batch), Some(features), Some(classes)) => Ok(Linear { batch, features, classes }),
        _ => Err("batch, features and classes are all needed".into()),
    }
}

impl SelectArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        match self.linear {
            Some(linear) => self.select_linear(linear, cx),
            None => self.select_graph(cx),
        }
    }

    /// A network in data parallel, in model parallel, and as the compiler divides it.
    fn select_graph(&self, cx: &Context) -> Result<()> {
        let graph = self.source.open(cx)?;
        let graph = graph.ok_or_else(|| Error::usage("one of --linear, --graph and --model is needed"))?;
        let (logical, mesh) = (Logical::of(graph)?, Placement::mesh(&[self.devices])?);
        let parallels = [Parallel::Auto, Parallel::Data, Parallel::Model];
        let plans = parallels
            .into_iter()
            .map(|parallel| {
                let compiler = Compiler::new(logical.clone()).parallel(parallel, &mesh);
                Ok((parallel.name(), compiler.compile(&mesh)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let described = |(name, physical): &(&str, Physical)| {
            let stored: BTreeMap<_, _> =
                physical.stored().into_iter().map(|(name, _, sbp)| (name, sbp)).collect();
            json!({"parallel": name, "bytes": physical.bytes(), "stored": stored})
        };
        let by_parallel: Vec<_> = plans.iter().map(described).collect();
        let shown = json!({"devices": self.devices, "best": by_parallel[0], "by_parallel": by_parallel});
        cx.emit(&shown, |_| {
            let columns: Vec<&str> =
                ["tensor"].into_iter().chain(plans.iter().map(|(name, _)| *name)).collect();
            let mut table = Table::new("Forms of what is stored", &columns);
            let forms: Vec<Vec<_>> = plans.iter().map(|(_, physical)| physical.stored()).collect();
            for (at, (name, ..)) in forms[0].iter().enumerate() {
                let row = forms.iter().map(|forms| forms[at].2.to_string());
                table.row([name.clone()].into_iter().chain(row).collect::<Vec<_>>());
            }
            let bytes = plans.iter().map(|(_, physical)| told_bytes(physical.bytes() as f64));
            table.row(["bytes moved".to_string()].into_iter().chain(bytes).collect::<Vec<_>>());
            table.to_text()
        })
    }

    fn select_linear(&self, linear: Linear, cx: &Context) -> Result<()> {
        let selection = linear.select(self.devices)?;
        let shown = json!({
            "batch": linear.batch, "features": linear.features, "classes": linear.classes,
            "devices": self.devices, "best": selection.best, "by_weight_sbp": selection.by_weight_sbp,
        });
        cx.emit(&shown, |_| {
            let title = "Bytes of a training step, by the form of the weight";
            let mut table =
                Table::new(title, &["W", "bytes", "y = x W", "loss reads", "dx = dy Wᵀ", "dW = xᵀ dy"]);
            for Selected { weight, bytes, forward, loss, dx, dw } in &selection.by_weight_sbp {
                let product = |(inputs, output): &(Vec<crate::sbp::Sbp>, crate::sbp::Sbp)| {
                    format!("{} {} -> {output}", inputs[0], inputs[1])
                };
                table.row([
                    weight.to_string(),
                    told_bytes(*bytes),
                    product(forward),
                    loss.to_string(),
                    product(dx),
                    product(dw),
                ]);
            }
            format!(
                "{}best: W as {}, {}\n",
                table.to_text(),
                selection.best.weight,
                told_bytes(selection.best.bytes)
            )
        })
    }
}

#[derive(Debug, Args)]
pub struct ActorsArgs {
    /// How long each actor acts
    #[arg(long, value_delimiter = ',', required = true)]
    durations: Vec<f64>,
    /// Registers between neighbours
    #[arg(long, value_delimiter = ',')]
    registers: Vec<usize>,
    /// Pieces that go through
    #[arg(long)]
    pieces: usize,
    /// SVG file to draw
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

impl ActorsArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        const MOST: usize = 1_000_000;
        if self.pieces.checked_mul(self.durations.len()).is_none_or(|acts| acts > MOST) {
            return Err(Error::usage(format!("that is more than {MOST} acts")).hint("take fewer --pieces"));
        }
        let network = chain(&self.durations, &self.registers)?;
        let found = simulate(&network, self.pieces)?;
        if let Some(path) = &self.svg {
            let acts = found.starts.iter().enumerate().flat_map(|(actor, starts)| {
                let duration = self.durations[actor];
                starts.iter().enumerate().map(move |(piece, &begin)| Worked {
                    rank: 0,
                    queue: actor,
                    name: format!("actor {actor}"),
                    piece,
                    begin,
                    end: begin + duration,
                })
            });
            let queues = (0..self.durations.len()).map(|actor| format!("actor {actor}")).collect();
            write_atomic(
                path,
                Trace { acts: acts.collect(), queues, clock: Clock::Virtual }.to_svg().as_bytes(),
            )?;
        }
        cx.emit(&found, |found| {
            let starts = found.starts.iter().enumerate();
            let lines = starts.map(|(actor, starts)| {
                let shown: Vec<String> = starts.iter().take(12).map(f64::to_string).collect();
                let more = if starts.len() > shown.len() { " …" } else { "" };
                format!("actor {actor} begins at {}{more}\n", shown.join(" "))
            });
            let lines: String = lines.collect();
            format!(
                "{lines}done at {}, registers in use at most: {:?}\n",
                found.makespan, found.peak_registers
            )
        })
    }
}
