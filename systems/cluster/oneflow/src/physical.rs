//! The physical graph: what every device does, with conversions between.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use burn::backend::ir::{OperationIr, TensorId};
use burn::tensor::DType;
use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::actor::{Actor, Channel, Network};
use crate::boxing::{Collective, Cost, Step};
use crate::sbp::{NdSbp, Placement, Region};
use crate::signature::NdSignature;

/// A tensor in one form.
#[derive(Debug, Clone)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Extents of the whole.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// Its form.
    pub sbp: NdSbp,
}

/// What a node does.
#[derive(Debug, Clone)]
pub enum Work {
    /// Takes its part of an input of the graph.
    Input(usize),
    /// Gives its part of a constant.
    Constant(TensorId),
    /// Gives a variable as it is now.
    Variable(usize),
    /// Computes an operation on its parts.
    Compute(Box<OperationIr>, NdSignature),
    /// Converts.
    Boxing(Vec<Step>),
    /// Changes a variable by its gradient.
    Update(usize),
    /// Hands out its part of an output of the graph.
    Output(usize),
}

/// The hardware queue of compute.
pub const COMPUTE: usize = 0;
/// The hardware queue of the network.
pub const NETWORK: usize = 1;
/// The hardware queue of inputs.
pub const LOADER: usize = 2;
/// What the queues are called.
pub const QUEUES: [&str; 3] = ["compute", "network", "loader"];

/// One operation of every device.
#[derive(Debug, Clone)]
pub struct Node {
    /// For people.
    pub name: String,
    /// What it does.
    pub work: Work,
    /// The values that it reads.
    pub inputs: Vec<usize>,
    /// The values that it writes.
    pub outputs: Vec<usize>,
    /// The hardware queue.
    pub queue: usize,
}

/// Why an operation is computed as it is.
#[derive(Debug, Clone, Serialize)]
pub struct Reason {
    /// The operation.
    pub node: String,
    /// What was chosen.
    pub chosen: String,
    /// The next best, everything else being as it is.
    pub second: Option<String>,
    /// What it would cost more: bytes or seconds.
    pub more: Option<f64>,
}

/// What all devices do, in an order in which everything is written before it is read.
#[derive(Debug, Clone)]
pub struct Physical {
    /// The devices.
    pub placement: Placement,
    /// Tensors in their forms.
    pub values: Vec<Value>,
    /// The operations.
    pub nodes: Vec<Node>,
    /// How every operation came to its signature.
    pub reasons: Vec<Reason>,
    /// Operations that no signature divides, with what it costs that everybody computes all of them.
    pub undivided: Vec<(String, f64)>,
    /// Gradients that are converted when they have been added up: of a variable, the value that is added up, and the path.
    pub deferred: BTreeMap<usize, (usize, Vec<Step>)>,
    /// What the queues are called: [`QUEUES`], and one for every edge to or from other devices.
    pub queues: Vec<String>,
}

impl Value {
    /// Bytes on the device at a coordinate.
    pub fn local_bytes(&self, mesh: &[usize], coordinate: &[usize]) -> usize {
        Region::local(&self.shape, mesh, &self.sbp, coordinate).elements() * self.dtype.size()
    }
}

impl Physical {
    /// Bytes that all devices together send for one piece.
    pub fn bytes(&self) -> u64 {
        self.conversions().map(|(_, path)| path.iter().map(|step| step.bytes).sum::<u64>()).sum()
    }

    /// What the conversions of one piece cost.
    pub fn cost(&self, cost: Cost) -> f64 {
        let steps = self.conversions().flat_map(|(_, path)| path);
        steps.map(|step| cost.of(step, &self.placement.mesh)).sum()
    }

    /// The conversions.
    pub fn conversions(&self) -> impl Iterator<Item = (&Node, &Vec<Step>)> {
        self.nodes.iter().filter_map(|node| match &node.work {
            Work::Boxing(path) => Some((node, path)),
            _ => None,
        })
    }

    /// The forms in which tensors are stored, by name: variables and inputs.
    pub fn stored(&self) -> Vec<(String, Vec<usize>, NdSbp)> {
        let stored = self.nodes.iter().filter(|node| matches!(node.work, Work::Variable(_) | Work::Input(_)));
        stored
            .map(|node| {
                let value = &self.values[node.outputs[0]];
                (value.name.clone(), value.shape.clone(), value.sbp.clone())
            })
            .collect()
    }

    /// How long every value is needed: the nodes that write it and that read it last.
    fn lifetimes(&self) -> Vec<(usize, usize)> {
        let mut lifetimes = vec![(0, 0); self.values.len()];
        for (at, node) in self.nodes.iter().enumerate() {
            node.outputs.iter().for_each(|&value| lifetimes[value] = (at, at));
            node.inputs.iter().for_each(|&value| lifetimes[value].1 = at);
        }
        lifetimes
    }

    /// Bytes that the first device, which has the longest parts, needs at most where every value has one register and
    /// registers of disjoint lifetimes share memory; and with `registers` of each value's own.
    pub fn memory(&self, registers: usize) -> Memory {
        let origin = vec![0; self.placement.mesh.len()];
        let bytes: Vec<usize> =
            self.values.iter().map(|value| value.local_bytes(&self.placement.mesh, &origin)).collect();
        let lasting = |node: &Node| matches!(node.work, Work::Variable(_) | Work::Constant(_));
        let stored: usize =
            self.nodes.iter().filter(|node| lasting(node)).map(|node| bytes[node.outputs[0]]).sum();
        let mut kept = vec![true; self.values.len()];
        self.nodes.iter().filter(|node| lasting(node)).for_each(|node| kept[node.outputs[0]] = false);
        let lifetimes = self.lifetimes();
        let alive = |at: usize| -> usize {
            let values = lifetimes.iter().zip(&bytes).zip(&kept);
            values
                .filter(|((life, _), kept)| **kept && life.0 <= at && at <= life.1)
                .map(|((_, bytes), _)| bytes)
                .sum()
        };
        let shared = (0..self.nodes.len()).map(alive).max().unwrap_or(0);
        let own =
            bytes.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(bytes, _)| bytes * registers).sum();
        let mut largest: Vec<(String, usize)> = self
            .values
            .iter()
            .zip(&bytes)
            .map(|(value, bytes)| (format!("{} [{}]", value.name, value.sbp), *bytes))
            .collect();
        largest.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        largest.truncate(5);
        Memory { stored, shared, own, largest }
    }

    /// Bytes that all devices together send for one step, whatever the number of its pieces.
    pub fn step_bytes(&self) -> u64 {
        self.deferred.values().flat_map(|(_, path)| path).map(|step| step.bytes).sum()
    }

    /// Lets gradients be added up over pieces in the form in which they are written, and converted once a step.
    pub fn defer_gradients(&mut self) {
        let mut dropped = Vec::new();
        for at in 0..self.nodes.len() {
            let Work::Update(variable) = self.nodes[at].work else { continue };
            let value = self.nodes[at].inputs[0];
            let readers = self.nodes.iter().filter(|node| node.inputs.contains(&value)).count();
            let writer = self.nodes.iter().position(|node| node.outputs.contains(&value));
            let Some(writer) = writer.filter(|_| readers == 1) else { continue };
            if let Work::Boxing(path) = &self.nodes[writer].work {
                let source = self.nodes[writer].inputs[0];
                self.deferred.insert(variable, (source, path.clone()));
                self.nodes[at].inputs[0] = source;
                dropped.push(writer);
            }
        }
        let mut number = 0;
        self.nodes.retain(|_| {
            number += 1;
            !dropped.contains(&(number - 1))
        });
        self.drop_unwritten();
    }

    /// Drops values that nobody writes any more.
    fn drop_unwritten(&mut self) {
        let written: BTreeSet<usize> =
            self.nodes.iter().flat_map(|node| node.outputs.iter().copied()).collect();
        let now: BTreeMap<usize, usize> =
            written.iter().enumerate().map(|(now, &before)| (before, now)).collect();
        let mut number = 0;
        self.values.retain(|_| {
            number += 1;
            written.contains(&(number - 1))
        });
        for node in &mut self.nodes {
            node.inputs.iter_mut().chain(&mut node.outputs).for_each(|value| *value = now[value]);
        }
        self.deferred.values_mut().for_each(|(value, _)| *value = now[value]);
    }

    /// Gives every input and output that other devices write or read a queue of its own, which waits for these.
    pub fn give_queues(&mut self, arrives: &[Option<usize>], departs: &[Option<usize>]) {
        for node in &mut self.nodes {
            let edge = match node.work {
                Work::Input(port) => arrives[port].map(|_| "from"),
                Work::Output(port) => departs[port].map(|_| "to"),
                _ => None,
            };
            if let Some(edge) = edge {
                node.queue = self.queues.len();
                self.queues.push(format!("{edge} others {}", self.queues.len() - QUEUES.len()));
            }
        }
    }

    /// The actors of one device. Every value is a channel of `registers` registers, and where variables are `updated` with
    /// every piece, an update lets the variable's next piece go.
    pub fn network(&self, registers: usize, updated: bool) -> Network {
        let actors = self.nodes.iter().map(|node| Actor {
            name: node.name.clone(),
            queue: node.queue,
            duration: 1.0,
            lag: 0,
        });
        let mut network = Network { actors: actors.collect(), channels: Vec::new() };
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); self.values.len()];
        let mut writer = vec![0; self.values.len()];
        let mut updates: BTreeMap<usize, (Option<usize>, Option<usize>)> = BTreeMap::new();
        for (at, node) in self.nodes.iter().enumerate() {
            node.outputs.iter().for_each(|&value| writer[value] = at);
            node.inputs.iter().for_each(|&value| readers[value].push(at));
            match node.work {
                Work::Variable(variable) => updates.entry(variable).or_default().0 = Some(at),
                Work::Update(variable) => updates.entry(variable).or_default().1 = Some(at),
                _ => {}
            }
        }
        for (value, to) in readers.into_iter().enumerate() {
            network.channels.push(Channel { from: writer[value], to, registers, filled: 0 });
        }
        for (variable, update) in updates.into_values().filter(|_| updated) {
            if let (Some(variable), Some(update)) = (variable, update) {
                network.channels.push(Channel { from: update, to: vec![variable], registers: 1, filled: 1 });
            }
        }
        network
    }

    /// The physical graph for people and other programs.
    pub fn to_json(&self) -> Json {
        let values = self.values.iter().enumerate().map(|(at, value)| {
            json!({"value": at, "tensor": value.name, "shape": value.shape, "dtype": format!("{:?}", value.dtype), "sbp": value.sbp})
        });
        let nodes = self.nodes.iter().map(|node| {
            let mut found = json!({"name": node.name, "queue": self.queues[node.queue], "reads": node.inputs, "writes": node.outputs});
            match &node.work {
                Work::Compute(_, signature) => found["signature"] = signature.to_string().into(),
                Work::Boxing(path) => {
                    found["bytes"] = path.iter().map(|step| step.bytes).sum::<u64>().into();
                    found["path"] = json!(path);
                }
                _ => {}
            }
            found
        });
        json!({
            "placement": self.placement,
            "bytes_per_piece": self.bytes(),
            "values": values.collect::<Vec<_>>(),
            "nodes": nodes.collect::<Vec<_>>(),
            "reasons": self.reasons,
        })
    }

    /// The physical graph for Graphviz.
    pub fn to_dot(&self) -> String {
        let mut dot = String::from(
            "digraph physical {\n  rankdir=TB; node [shape=box, fontname=\"sans-serif\", fontsize=10];\n",
        );
        let mut writer = vec![0; self.values.len()];
        for (at, node) in self.nodes.iter().enumerate() {
            let _ = writeln!(
                dot,
                "  n{at} [label=\"{}\", style=filled, fillcolor=\"{}\"];",
                quoted(&node.name),
                colour(node)
            );
            for &value in &node.inputs {
                let label = format!("{} {}", self.values[value].name, self.values[value].sbp);
                let _ = writeln!(
                    dot,
                    "  n{} -> n{at} [label=\"{}\", fontsize=8];",
                    writer[value],
                    quoted(&label)
                );
            }
            node.outputs.iter().for_each(|&value| writer[value] = at);
        }
        dot.push_str("}\n");
        dot
    }

    /// The physical graph as a picture: a row a depth, conversions with bytes in red.
    pub fn to_svg(&self) -> String {
        const BOX: (f64, f64) = (150.0, 34.0);
        const GAP: (f64, f64) = (14.0, 26.0);
        const MARGIN: f64 = 12.0;
        let mut row = vec![0usize; self.nodes.len()];
        let mut writer = vec![0; self.values.len()];
        for (at, node) in self.nodes.iter().enumerate() {
            row[at] = node.inputs.iter().map(|&value| row[writer[value]] + 1).max().unwrap_or(0);
            node.outputs.iter().for_each(|&value| writer[value] = at);
        }
        let rows = row.iter().map(|row| row + 1).max().unwrap_or(0);
        let mut filled = vec![0usize; rows];
        let column: Vec<usize> = row
            .iter()
            .map(|&row| {
                filled[row] += 1;
                filled[row] - 1
            })
            .collect();
        let widest = filled.iter().copied().max().unwrap_or(0);
        let step = (BOX.0 + GAP.0, BOX.1 + GAP.1);
        let (width, height) = (2.0 * MARGIN + widest as f64 * step.0, 2.0 * MARGIN + rows as f64 * step.1);
        let corner = |at: usize| {
            let indent = (widest - filled[row[at]]) as f64 * step.0 / 2.0;
            (MARGIN + indent + column[at] as f64 * step.0, MARGIN + row[at] as f64 * step.1)
        };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             font-family=\"sans-serif\" font-size=\"10\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
        );
        for (at, node) in self.nodes.iter().enumerate() {
            let (x, y) = corner(at);
            for &value in &node.inputs {
                let (from_x, from_y) = corner(writer[value]);
                let (x1, y1, x2) = (from_x + BOX.0 / 2.0, from_y + BOX.1, x + BOX.0 / 2.0);
                let bend = (y1 + y) / 2.0;
                let _ = writeln!(
                    svg,
                    "<path d=\"M{x1:.1} {y1:.1}C{x1:.1} {bend:.1} {x2:.1} {bend:.1} {x2:.1} {y:.1}\" fill=\"none\" stroke=\"#98a2ad\">\
                     <title>{}</title></path>",
                    quoted(&format!("{} {}", self.values[value].name, self.values[value].sbp))
                );
            }
        }
        for (at, node) in self.nodes.iter().enumerate() {
            let (x, y) = corner(at);
            let middle = x + BOX.0 / 2.0;
            let below = match &node.work {
                Work::Boxing(path) => {
                    let bytes: u64 = path.iter().map(|step| step.bytes).sum();
                    format!("{} B", bytes)
                }
                _ => node.outputs.first().map_or_else(String::new, |&value| {
                    format!("{:?} {}", self.values[value].shape, self.values[value].sbp)
                }),
            };
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{}\" height=\"{}\" rx=\"4\" fill=\"{}\" stroke=\"#5c6670\"/>\n\
                 <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n\
                 <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"8.5\" fill=\"#444\">{}</text>",
                BOX.0,
                BOX.1,
                colour(node),
                y + 14.0,
                quoted(&shortened(&node.name)),
                y + 27.0,
                quoted(&below)
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// What a device's memory holds, in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    /// Variables and constants.
    pub stored: usize,
    /// Registers, where those of disjoint lifetimes share memory.
    pub shared: usize,
    /// Registers, each with memory of its own, as actors have them.
    pub own: usize,
    /// The largest values.
    pub largest: Vec<(String, usize)>,
}

/// The collectives of a path, in words.
pub fn told(path: &[Step]) -> String {
    let one = |step: &Step| {
        let name = match step.collective() {
            Collective::Slice => "slice",
            Collective::Place => "place",
            Collective::AllToAll => "all-to-all",
            Collective::AllGather => "all-gather",
            Collective::ReduceScatter => "reduce-scatter",
            Collective::AllReduce => "all-reduce",
        };
        format!("{name} on axis {}", step.axis)
    };
    path.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn colour(node: &Node) -> &'static str {
    match &node.work {
        Work::Input(_) => "#d5ecd4",
        Work::Constant(_) | Work::Variable(_) => "#efe3f5",
        Work::Compute(..) => "#fdf1d8",
        Work::Boxing(path) if path.iter().all(|step| step.bytes == 0) => "#eceef0",
        Work::Boxing(_) => "#f6c9c2",
        Work::Update(_) => "#e2d0ef",
        Work::Output(_) => "#cfe3f7",
    }
}

fn shortened(name: &str) -> String {
    const MOST: usize = 26;
    if name.chars().count() <= MOST {
        name.into()
    } else {
        name.chars().take(MOST - 1).chain(['…']).collect()
    }
}

fn quoted(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "'")
}
