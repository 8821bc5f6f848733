//! Smoothness within a network: channels in an order in which neighbours are alike (§3.3).

use std::collections::BTreeMap;

use kiln_core::{Context, Error, Result};
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::graph::{ChannelGraph, Segment, TensorSpec};
use crate::network::Plain;
use crate::objective::normal;
use crate::shp::{Distances, Metric, ShpSolver};

/// For some groups, which of their channels to take, and in which order.
pub type Choice = BTreeMap<usize, Vec<usize>>;

/// The tensors with the channels of every axis chosen.
///
/// # Panics
/// When tensors or choice do not fit the graph.
pub fn choose(graph: &ChannelGraph, tensors: &[Vec<f32>], choice: &Choice) -> Vec<Vec<f32>> {
    let specs = graph.tensors();
    let parts = specs.iter().zip(graph.axes()).zip(tensors);
    parts
        .map(|((spec, [outputs, inputs]), values)| {
            let [_, width, taps] = spec.extents();
            let columns = if inputs.is_empty() { vec![0] } else { chosen(&inputs, choice) };
            let kernel = |o: usize, c: usize| &values[(o * width + c) * taps..][..taps];
            chosen(&outputs, choice)
                .iter()
                .flat_map(|&o| columns.iter().flat_map(move |&c| kernel(o, c)))
                .copied()
                .collect()
        })
        .collect()
}

/// Places on an axis, in the order of the choice.
fn chosen(axis: &[Segment], choice: &Choice) -> Vec<usize> {
    let mut start = 0;
    let mut places = Vec::new();
    for segment in axis {
        match choice.get(&segment.group) {
            Some(order) => places.extend(order.iter().map(|channel| start + channel)),
            None => places.extend(start..start + segment.channels),
        }
        start += segment.channels;
    }
    places
}

/// Everything that belongs to each channel of a clique, a row a channel: output rows, biases and input columns of all
/// its tensors.
///
/// # Shapes
/// - output: `[channels, width]`, and `width`
pub fn features(graph: &ChannelGraph, tensors: &[Vec<f32>], clique: Segment) -> (Vec<f32>, usize) {
    let mut rows: Vec<Vec<f32>> = vec![Vec::new(); clique.channels];
    for ((spec, [outputs, inputs]), values) in graph.tensors().iter().zip(graph.axes()).zip(tensors) {
        let [height, width, taps] = spec.extents();
        for (start, segment) in starts(&outputs).filter(|(_, segment)| segment.group == clique.group) {
            for (channel, row) in rows.iter_mut().enumerate().take(segment.channels) {
                row.extend(&values[(start + channel) * width * taps..][..width * taps]);
            }
        }
        for (start, segment) in starts(&inputs).filter(|(_, segment)| segment.group == clique.group) {
            for (channel, row) in rows.iter_mut().enumerate().take(segment.channels) {
                for o in 0..height {
                    row.extend(&values[(o * width + start + channel) * taps..][..taps]);
                }
            }
        }
    }
    let width = rows.first().map_or(0, Vec::len);
    (rows.concat(), width)
}

/// Segments with the places where they begin.
fn starts(axis: &[Segment]) -> impl Iterator<Item = (usize, Segment)> + '_ {
    axis.iter().scan(0, |start, segment| {
        let place = *start;
        *start += segment.channels;
        Some((place, *segment))
    })
}

/// How much neighbours differ: `Σ |w[o + 1] - w[o]| + Σ |w[:, c + 1] - w[:, c]|` of a tensor.
pub fn total_variation(spec: &TensorSpec, values: &[f32]) -> f64 {
    let [outputs, inputs, taps] = spec.extents();
    let row = inputs * taps;
    let differ = |a: usize, b: usize| f64::from((values[a] - values[b]).abs());
    let along_outputs: f64 = (0..(outputs - 1) * row).map(|i| differ(i + row, i)).sum();
    let along_inputs: f64 = (0..outputs)
        .flat_map(|o| (0..(inputs - 1) * taps).map(move |i| o * row + i))
        .map(|i| differ(i + taps, i))
        .sum();
    along_outputs + along_inputs
}

/// The mean over tensors of their total variation.
pub fn mean_variation(graph: &ChannelGraph, tensors: &[Vec<f32>]) -> f64 {
    let specs = graph.tensors();
    let sum: f64 = specs.iter().zip(tensors).map(|(spec, values)| total_variation(spec, values)).sum();
    sum / specs.len() as f64
}

/// How channels are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By the shortest path.
    Shortest,
    /// At random: an ablation.
    Random,
}

/// What ordering the channels of one clique came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CliqueReport {
    /// The first tensor that carries the clique on its outputs.
    pub name: String,
    /// Its channels.
    pub channels: usize,
    /// Length of the path in the order found.
    pub before: f64,
    /// Length of the path in the order given.
    pub after: f64,
}

/// What ordering all channels came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SmoothReport {
    /// Mean total variation of the tensors as found.
    pub variation_before: f64,
    /// And as ordered.
    pub variation_after: f64,
    /// Largest difference between the outputs of the two networks, over the largest output.
    pub output_change: f64,
    /// Cliques in the order of the layers.
    pub cliques: Vec<CliqueReport>,
}

/// Orders the channels of every clique of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CliquePermuter {
    /// Finds the paths.
    pub solver: ShpSolver,
    /// Which order.
    pub order: Order,
}

impl Default for CliquePermuter {
    fn default() -> Self {
        Self { solver: ShpSolver::default(), order: Order::Shortest }
    }
}

impl CliquePermuter {
    /// The same function with its channels in order, checked on pictures of noise.
    ///
    /// # Errors
    /// When a weight is not finite, the outputs do change, or the user stops the search.
    pub fn permute(&self, plain: &Plain, cx: &Context) -> Result<(Plain, SmoothReport)> {
        let graph = plain.config.build(plain.size)?.graph;
        let mut choice = Choice::new();
        let mut cliques = Vec::new();
        let found = graph.cliques();
        let bar = cx.progress(found.len() as u64, "ordering channels");
        for (number, clique) in found.into_iter().enumerate() {
            let (rows, width) = features(&graph, &plain.tensors, clique);
            let distances = Distances::of_points(&rows, width, Metric::L1)?;
            let given: Vec<usize> = (0..clique.channels).collect();
            let path = match self.order {
                Order::Shortest => self.solver.solve(&distances, cx)?.path,
                Order::Random => {
                    let mut path = given.clone();
                    path.shuffle(&mut cx.rng("random order", number as u64));
                    path
                }
            };
            let layer = graph.axes().iter().position(|[outputs, _]| outputs[0].group == clique.group);
            cliques.push(CliqueReport {
                name: layer.map_or_else(String::new, |tensor| graph.tensors()[tensor].name.clone()),
                channels: clique.channels,
                before: distances.length(&given),
                after: distances.length(&path),
            });
            choice.insert(clique.group, path);
            bar.inc(1);
        }
        let ordered = Plain { tensors: choose(&graph, &plain.tensors, &choice), ..plain.clone() };
        let report = SmoothReport {
            variation_before: mean_variation(&graph, &plain.tensors),
            variation_after: mean_variation(&graph, &ordered.tensors),
            output_change: output_change(plain, &ordered, cx)?,
            cliques,
        };
        if report.output_change.is_nan() || report.output_change > 1e-3 {
            return Err(Error::work(format!(
                "the outputs of the ordered network differ by {}",
                report.output_change
            ))
            .hint("do the weights belong to this network?"));
        }
        Ok((ordered, report))
    }
}

/// Largest difference between what two networks put out for pictures of noise, over the largest output.
fn output_change(a: &Plain, b: &Plain, cx: &Context) -> Result<f64> {
    const PICTURES: usize = 8;
    let built = a.config.build(a.size)?;
    let [channels, height, width] = a.config.image;
    let images = normal([PICTURES, channels, height, width], &cx.device, &mut cx.rng("check", 0));
    let output = |plain: &Plain| {
        let parameters = plain.parameters(&cx.device);
        let run =
            crate::objective::Run { goal: a.config.goal, built: &built, parameters: &parameters, norms: &[] };
        run.output(images.clone())
    };
    let (a, b) = (output(a)?, output(b)?);
    let largest = a.clone().abs().max().into_scalar::<f32>();
    let difference = (a - b).abs().max().into_scalar::<f32>();
    Ok(f64::from(difference / largest.max(f32::MIN_POSITIVE)))
}
