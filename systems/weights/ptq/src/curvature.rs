//! The trace of a Hessian, block by block, as the mean of `vᵀ H v` over random signs `v` (Hutchinson, 1989), from gradients on
//! either side:
//!
//! ```text
//! H v ≈ (∇L(W + ε v) - ∇L(W - ε v)) / 2ε,    ε = 1e-3 ‖W‖ / √n
//! ```
//!
//! Every fourth part of a network is moved at the same time, so that four gradients on each side serve all parts; what the
//! parts of a group do to each other has the mean 0, and adds to the spread. Probes look at the batches of the examples in turn,
//! so that the standard error of their mean holds the spread between examples too. A network one of whose operations has no
//! derivative is measured by second differences of its loss instead, part by part.

use std::fmt;

use burn::backend::ir::{ActivationOperationIr, NumericOperationIr, TensorIr};
use burn::tensor::{DType, TensorData};
use kiln_compiler::builder::{Builder, Fit};
use kiln_compiler::{Boundary, Executor, Graph};
use kiln_core::{Context, Error, Port, PortKind, Result};
use kiln_ops::flex;
use serde::{Deserialize, Serialize};

use crate::data::Examples;
use crate::mlp::orthogonal_signs;
use crate::program::{Program, Values};
use crate::quantise::{Quantiser, Side, batches, rows, total_loss};
use crate::ready::Ready;
use crate::unit::{Numbers, Unit, Work};
use crate::written::{Free, Writer};

/// Groups of parts that are moved one after another.
const GROUPS: usize = 4;

/// A step along random signs over the size of what is moved.
const GRADIENT_STEP: f64 = 1e-3;

/// The same for second differences of the loss, near a rounding error of four bits: below it single precision does not show
/// the curvature.
const LOSS_STEP: f64 = 0.05;

/// The size of what is moved, at least: zeros have none.
const LEAST_SIZE: f64 = 1e-6;

/// Probes before the standard error is believed.
const FEWEST: usize = 8;

/// Numbers that a gradient may keep of what the units read and write.
const MOST_NUMBERS: usize = 1 << 26;

/// How long a trace is probed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Probing {
    /// Probes at most.
    pub most: usize,
    /// The standard error over the mean at which it is enough.
    pub error: f64,
}

impl Probing {
    /// Until the standard error is below 5 %, or so many.
    pub fn at_most(most: usize) -> Self {
        Self { most, error: 0.05 }
    }
}

/// The trace of a part's Hessian, estimated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Mean of `vᵀ H v`; negative where noise or a saddle makes it so, and then counted as 0.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
    /// How many probes it is the mean of.
    pub probes: usize,
}

impl Trace {
    fn of(probes: &[f64]) -> Self {
        let n = probes.len() as f64;
        if probes.is_empty() {
            return Self::default();
        }
        let mean = probes.iter().sum::<f64>() / n;
        let variance = probes.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Self { mean, error: (variance / n).sqrt(), probes: probes.len() }
    }

    fn settled(&self, probing: &Probing) -> bool {
        self.probes >= FEWEST && self.error < probing.error * self.mean.abs()
    }
}

/// Estimates the traces of some blocks from `products`, which gives `vᵀ H v` of those blocks that still need it, for a probe.
///
/// # Errors
/// Those of `products`.
pub fn estimate(
    blocks: usize,
    probing: Probing,
    mut products: impl FnMut(&[usize], usize) -> Result<Vec<f64>>,
) -> Result<Vec<Trace>> {
    let mut found: Vec<Vec<f64>> = vec![Vec::new(); blocks];
    for probe in 0..probing.most {
        let open: Vec<usize> =
            (0..blocks).filter(|&block| !Trace::of(&found[block]).settled(&probing)).collect();
        if open.is_empty() {
            break;
        }
        for (&block, product) in open.iter().zip(products(&open, probe)?) {
            found[block].push(product);
        }
    }
    Ok(found.iter().map(|probes| Trace::of(probes)).collect())
}

/// Of what differences are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Differences {
    /// Of gradients: once.
    Gradients,
    /// Of losses: twice.
    Losses,
}

/// How curvature was estimated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Method {
    /// Of what.
    pub differences: Differences,
    /// Groups of parts that were moved one after another, every so many-th part in one.
    pub groups: usize,
    /// Why not of gradients.
    pub because: Option<String>,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.differences, &self.because) {
            (Differences::Gradients, _) => write!(
                f,
                "traces from differences of gradients, parts in {} interleaved groups moved together",
                self.groups
            ),
            (Differences::Losses, None) => {
                f.write_str("traces from second differences of the loss, part by part")
            }
            (Differences::Losses, Some(because)) => {
                write!(f, "traces from second differences of the loss, part by part: {because}")
            }
        }
    }
}

/// Curvature of all parts of a network, for the mean loss of some examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Curvature {
    /// In the order of the parts.
    pub traces: Vec<Trace>,
    /// How.
    pub method: Method,
}

/// What a part is moved along: numbers of its own, and the step.
#[derive(Debug, Clone)]
struct Moved {
    part: usize,
    unit: usize,
    side: Side,
    /// Weights as they are; of an activation zeros, to which nothing has been added yet.
    values: Vec<f32>,
    step: f64,
}

impl Quantiser {
    /// Estimates the traces of all parts on labelled examples; 0 for parts that have nothing to move.
    ///
    /// # Errors
    /// When the examples do not fit, or the user stops it.
    pub fn curvature(&self, examples: &Examples, probing: Probing, cx: &Context) -> Result<Curvature> {
        let program = self.for_gradients(examples.len());
        let moved = self.moves(&program, examples)?;
        let mut traces = vec![Trace::default(); self.parts.len()];
        let groups = GROUPS.min(moved.len()).max(1);
        let mut method = Method { differences: Differences::Gradients, groups, because: None };
        let bar = cx.progress((moved.len() * probing.most) as u64, "curvature");
        let advance = |found: &[Trace]| {
            let left: usize = found.iter().map(|trace| probing.most - trace.probes).sum();
            bar.inc(left as u64);
        };
        for group in 0..groups {
            let members: Vec<&Moved> = moved.iter().skip(group).step_by(groups).collect();
            if members.is_empty() || probing.most == 0 {
                continue;
            }
            let slopes = Slopes::new(&program, &members, examples);
            let mut slopes = match slopes {
                Ok(slopes) => slopes,
                Err(error) if group == 0 => {
                    cx.note(format!("curvature by second differences of the loss: {error}"));
                    method.because = Some(error.to_string());
                    break;
                }
                Err(error) => return Err(error),
            };
            let found = estimate(members.len(), probing, |open, probe| {
                interruptible(cx)?;
                bar.inc(open.len() as u64);
                slopes.products(open, probe, |moved| self.signs(moved, probe, cx))
            })?;
            advance(&found);
            members.iter().zip(found).for_each(|(moved, trace)| traces[moved.part] = trace);
        }
        if method.because.is_some() {
            (method.differences, method.groups) = (Differences::Losses, moved.len());
            for moved in &moved {
                let found = estimate(1, probing, |_, probe| {
                    interruptible(cx)?;
                    bar.inc(1);
                    let signs = self.signs(moved, probe, cx);
                    Ok(vec![self.second_difference(&program, moved, &signs, examples)?])
                })?;
                advance(&found);
                traces[moved.part] = found[0];
            }
        }
        let count = examples.len() as f64;
        let mean = |trace: &Trace| Trace { mean: trace.mean / count, error: trace.error / count, ..*trace };
        Ok(Curvature { traces: traces.iter().map(mean).collect(), method })
    }

    /// The program for as many examples at once as there are and as memory allows.
    fn for_gradients(&self, examples: usize) -> Program {
        let numbers: usize = self.program.units.iter().map(|unit| unit.elements).sum();
        let most = (MOST_NUMBERS / numbers.max(1)).max(1);
        self.in_batches(examples.min(most))
    }

    /// The random signs of a part in a probe.
    fn signs(&self, moved: &Moved, probe: usize, cx: &Context) -> Vec<f64> {
        let stream = format!("probe {}", self.parts[moved.part].name);
        orthogonal_signs(moved.values.len(), probe, |block| cx.rng(&stream, block as u64))
    }

    /// What there is to move: weights, and activations that are parts of their own.
    fn moves(&self, program: &Program, examples: &Examples) -> Result<Vec<Moved>> {
        let mut moved = Vec::new();
        let mut sizes: Vec<[(f64, usize); 2]> = vec![[(0.0, 0); 2]; program.units.len()];
        if self.parts.iter().any(|part| self.activation(part).is_some()) {
            for (inputs, _) in batches(examples, program.batch()) {
                let mut values = program.begin(&[inputs])?;
                program.run_from(0, &mut values, &self.floats, false, &mut |unit, x, second| {
                    if program.units[unit].work == Work::Table {
                        return;
                    }
                    for (at, operand) in [Some(x), second].into_iter().enumerate() {
                        let Some(operand) = operand else { continue };
                        let x = flex::floats(operand);
                        sizes[unit][at].0 += x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                        sizes[unit][at].1 += x.len();
                    }
                });
            }
        }
        let rounds = examples.len().div_ceil(program.batch()).max(1);
        for (at, part) in self.parts.iter().enumerate() {
            let weight = &program.units[part.unit].weight;
            let (values, square, side) = match self.activation(part) {
                Some(second) => {
                    let (square, count) = sizes[part.unit][usize::from(second)];
                    (vec![0.0; count / rounds], square / count.max(1) as f64, part.side)
                }
                None => {
                    let square: f64 = weight.iter().map(|&w| f64::from(w).powi(2)).sum();
                    (weight.clone(), square / weight.len().max(1) as f64, Side::Weight)
                }
            };
            if !values.is_empty() {
                let step = square.sqrt().max(LEAST_SIZE);
                moved.push(Moved { part: at, unit: part.unit, side, values, step });
            }
        }
        Ok(moved)
    }

    /// `vᵀ H v` by a second difference of the loss, summed up over the examples.
    fn second_difference(
        &self,
        program: &Program,
        moved: &Moved,
        signs: &[f64],
        examples: &Examples,
    ) -> Result<f64> {
        let unit = &program.units[moved.unit];
        let step = LOSS_STEP * moved.step;
        let sides = [1.0, -1.0].map(|side| {
            let by = |value: f32, sign: f64| value + (side * step * sign) as f32;
            let values = moved.values.iter().zip(signs).map(|(&value, &sign)| by(value, sign)).collect();
            match self.activation(&self.parts[moved.part]) {
                Some(second) => Ready::moved(unit, values, second),
                None => Ready::float(&Unit { weight: values, ..unit.clone() }),
            }
        });
        let first = program.step_of(moved.unit);
        let mut sum = 0.0;
        for (inputs, labels) in batches(examples, program.batch()) {
            let mut base = program.begin(&[inputs])?;
            program.run_from(0, &mut base, &self.floats, true, &mut |_, _, _| {});
            let loss_of = |values: &mut Values| {
                total_loss(&rows(&program.read_outputs(values)[0], program.batch()), &labels)
            };
            let before = loss_of(&mut base);
            for side in &sides {
                let mut ready = self.floats.clone();
                ready[moved.unit] = side.clone();
                let mut values = base.clone();
                program.run_from(first, &mut values, &ready, false, &mut |_, _, _| {});
                sum += loss_of(&mut values) - before;
            }
        }
        Ok(sum / (step * step))
    }
}

fn interruptible(cx: &Context) -> Result<()> {
    match cx.interrupted() {
        true => Err(Error::interrupted("stopped while curvature was measured")),
        false => Ok(()),
    }
}

/// The loss of some examples and its slopes in a group of parts, compiled.
struct Slopes<'a> {
    moved: Vec<&'a Moved>,
    /// The shapes in which they are fed in.
    shapes: Vec<Vec<usize>>,
    /// For either side.
    executors: [Executor; 2],
    /// What the network reads, rows that are 1 at the right class and 0 for examples that fill a batch up, and how many examples
    /// stand for one of the others.
    batches: Vec<([TensorData; 2], f64)>,
}

impl<'a> Slopes<'a> {
    fn new(program: &Program, moved: &[&'a Moved], examples: &Examples) -> Result<Self> {
        let (graph, shapes) = loss_graph(program, moved)?;
        let names: Vec<String> = (0..moved.len()).map(variable).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let gradient = graph.gradient("loss", &names)?;
        let executors = [Executor::new(gradient.clone())?, Executor::new(gradient)?];
        let classes = graph.inputs[1].port.shape.clone();
        let width: usize = classes[1..].iter().product();
        let target = |labels: Vec<usize>| {
            let mut rows = vec![0.0f32; classes.iter().product()];
            labels
                .iter()
                .enumerate()
                .for_each(|(row, label)| rows[row * width + label.min(&(width - 1))] = 1.0);
            TensorData::new(rows, classes.clone())
        };
        let batch = |(inputs, labels): (TensorData, Vec<usize>)| {
            let weight = examples.len() as f64 / labels.len() as f64;
            ([inputs, target(labels)], weight)
        };
        let batches = batches(examples, program.batch()).map(batch).collect();
        Ok(Self { moved: moved.to_vec(), shapes, executors, batches })
    }

    /// `vᵀ H v` of the open ones, estimated for all examples from a batch of them; `signs` gives `v`.
    fn products(
        &mut self,
        open: &[usize],
        probe: usize,
        signs: impl Fn(&Moved) -> Vec<f64>,
    ) -> Result<Vec<f64>> {
        let directions: Vec<Vec<f64>> = open.iter().map(|&at| signs(self.moved[at])).collect();
        let Self { moved, shapes, executors: [up, down], batches } = self;
        let (batch, weight) = &batches[probe % batches.len()];
        let slopes = |executor: &mut Executor, side: f64| -> Result<Vec<f64>> {
            let mut inputs = batch.to_vec();
            for (at, (moved, shape)) in moved.iter().zip(&*shapes).enumerate() {
                let mut values = moved.values.clone();
                if let Ok(place) = open.binary_search(&at) {
                    let step = side * GRADIENT_STEP * moved.step;
                    let by = directions[place].iter();
                    values.iter_mut().zip(by).for_each(|(value, sign)| *value += (step * sign) as f32);
                }
                inputs.push(TensorData::new(values, shape.clone()));
            }
            let outputs = executor.run(&inputs)?;
            let slope = |(&at, signs): (&usize, &Vec<f64>)| -> f64 {
                let gradient = outputs[1 + at].as_slice::<f32>().unwrap_or_default();
                gradient.iter().zip(signs).map(|(&g, sign)| f64::from(g) * sign).sum()
            };
            Ok(open.iter().zip(&directions).map(slope).collect())
        };
        let (up, down) = rayon::join(|| slopes(up, 1.0), || slopes(down, -1.0));
        let difference = |((up, down), &at): ((f64, f64), &usize)| {
            weight * (up - down) / (2.0 * GRADIENT_STEP * moved[at].step)
        };
        Ok(up?.into_iter().zip(down?).zip(open).map(difference).collect())
    }
}

/// The name of a part's numbers as an input.
fn variable(at: usize) -> String {
    format!("part{at}")
}

/// The sum of the cross-entropies as a graph of the network's input, the targets, and the numbers of the parts; and the shapes
/// of these.
fn loss_graph(program: &Program, moved: &[&Moved]) -> Result<(Graph, Vec<Vec<usize>>)> {
    let misfit = |found: String| Error::work(format!("the loss cannot be written as a graph: {found}"));
    let free = |moved: &&Moved| Free {
        unit: program.units[moved.unit].name.clone(),
        side: moved.side,
        tensor: None,
    };
    let floats = Numbers::default();
    let mut writer = Writer::of(program, moved.iter().map(free).collect(), |_| &floats)?;
    let logits = writer.operand(program.outputs[0].tensor).map_err(misfit)?;
    let (targets, loss) = cross_entropy(&mut writer.builder, &logits).map_err(misfit)?;
    let port = |name: String, tensor: &TensorIr| Boundary {
        port: Port { name, kind: PortKind::Float, shape: tensor.shape.to_vec() },
        tensor: tensor.id,
    };
    let free: Vec<TensorIr> = writer.free.into_iter().filter_map(|free| free.tensor).collect();
    let targets = port("targets".into(), &targets);
    let parts = free.iter().enumerate().map(|(at, tensor)| port(variable(at), tensor));
    let inputs = program.inputs.iter().cloned().chain([targets]).chain(parts).collect();
    let Builder { operations, constants, .. } = writer.builder;
    let outputs = vec![port("loss".into(), &loss)];
    let graph = Graph { kind: program.kind.clone(), inputs, outputs, operations, constants };
    graph.verify()?;
    Ok((graph, free.iter().map(|tensor| tensor.shape.to_vec()).collect()))
}

/// `-Σ targets · ln softmax(logits)`, and the targets.
fn cross_entropy(builder: &mut Builder, logits: &TensorIr) -> Fit<(TensorIr, TensorIr)> {
    let targets = builder.provided(&logits.shape.to_vec(), DType::F32);
    let log = builder.along(logits, logits.shape.rank() - 1, ActivationOperationIr::LogSoftmax)?;
    let product = builder.mul(&log, &targets)?;
    let flat = builder.reshape(&product, &[1, product.shape.num_elements()])?;
    let sum = builder.reduce(&flat, 1, NumericOperationIr::SumDim)?;
    Ok((targets, builder.mul_scalar(&sum, -1.0)?))
}
