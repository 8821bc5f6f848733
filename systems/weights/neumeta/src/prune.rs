//! Structured pruning, what NeuMeta is measured against: whole channels of the full network are left out.

use burn::module::Module;
use clap::ValueEnum;
use kiln_core::{Context, Result};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::arch::Size;
use crate::data::Samples;
use crate::family::middle;
use crate::graph::{Segment, TensorSpec};
use crate::network::{Plain, Trainable};
use crate::objective::Run;
use crate::smooth::{Choice, choose, features};

/// Samples whose gradients weigh channels.
const TAYLOR_SAMPLES: usize = 512;

/// Which channels are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Importance {
    /// Those with the largest sums of absolute weights
    L1,
    /// Those with the largest norms
    L2,
    /// Any
    Random,
    /// Those whose absence changes the loss most, to first order: |Σ w ∂L/∂w| (Molchanov et al. 2019)
    Taylor,
}

impl Importance {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::L1, Self::L2, Self::Random, Self::Taylor];

    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::L1 => "L1",
            Self::L2 => "L2",
            Self::Random => "random",
            Self::Taylor => "Taylor",
        }
    }
}

/// The network with only its most important channels, as many as a network of that width has.
///
/// # Errors
/// When there is no network of that width.
pub fn prune(
    plain: &Plain,
    width: usize,
    importance: Importance,
    samples: &Samples,
    cx: &Context,
) -> Result<Plain> {
    let size = Size { width, ..plain.size };
    let (graph, target) = (plain.config.build(plain.size)?.graph, plain.config.build(size)?.graph);
    let gradients = match importance {
        Importance::Taylor => gradients(plain, samples, cx)?,
        _ => Vec::new(),
    };
    let kept: Vec<Segment> = target.axes().into_iter().flatten().flatten().collect();
    let mut choice = Choice::new();
    for (number, clique) in graph.cliques().into_iter().enumerate() {
        // Both graphs number their groups alike.
        let count = kept.iter().find(|segment| segment.group == clique.group).map_or(1, |s| s.channels);
        let (rows, row) = features(&graph, &plain.tensors, clique);
        let scores: Vec<f64> = match importance {
            Importance::L1 => sums(&rows, row, |w| w.abs()),
            Importance::L2 => sums(&rows, row, |w| w * w),
            Importance::Taylor => {
                let (slopes, _) = features(&graph, &gradients, clique);
                let products: Vec<f32> = rows.iter().zip(slopes).map(|(w, slope)| w * slope).collect();
                sums(&products, row, |product| product).iter().map(|sum| sum.abs()).collect()
            }
            Importance::Random => {
                let mut order: Vec<usize> = (0..clique.channels).collect();
                order.shuffle(&mut cx.rng("random pruning", number as u64));
                order.into_iter().map(|place| place as f64).collect()
            }
        };
        let mut order: Vec<usize> = (0..clique.channels).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(count);
        order.sort_unstable();
        choice.insert(clique.group, order);
    }
    Ok(Plain { size, tensors: choose(&graph, &plain.tensors, &choice), ..plain.clone() })
}

/// The network with the middle of each kernel that is larger than `kernel`.
///
/// # Errors
/// When there is no network with such kernels.
pub fn cut(plain: &Plain, kernel: usize) -> Result<Plain> {
    let size = plain.config.plainly(Size { kernel: Some(kernel), ..plain.size });
    let (full, target) = (plain.config.build(plain.size)?.graph, plain.config.build(size)?.graph);
    let of = |((full, spec), values): ((TensorSpec, TensorSpec), &Vec<f32>)| -> Vec<f32> {
        let (taps, [.., all]) = (middle(&spec.shape, &full.shape), full.extents());
        values.chunks(all).flat_map(|kernel| taps.iter().map(|&tap| kernel[tap])).collect()
    };
    let tensors = full.tensors().into_iter().zip(target.tensors()).zip(&plain.tensors).map(of).collect();
    Ok(Plain { size, tensors, ..plain.clone() })
}

fn sums(rows: &[f32], width: usize, term: impl Fn(f32) -> f32) -> Vec<f64> {
    rows.chunks(width).map(|row| row.iter().map(|&x| f64::from(term(x))).sum()).collect()
}

/// The gradient of the loss over each tensor.
fn gradients(plain: &Plain, samples: &Samples, cx: &Context) -> Result<Vec<Vec<f32>>> {
    let chosen: Vec<usize> = (0..samples.len().min(TAYLOR_SAMPLES)).collect();
    let built = plain.config.build(plain.size)?;
    let model = Trainable::from_plain(plain, &cx.device).train();
    let parameters = model.parameters();
    let run = Run { goal: plain.config.goal, built: &built, parameters: &parameters, norms: &[] };
    let loss = run.loss(&samples.select(&chosen), &cx.device, &mut cx.rng("taylor", 0))?.task;
    let gradients = loss.backward();
    let of = |parameter: &burn::tensor::Tensor<1>| match parameter.grad(&gradients) {
        Some(gradient) => gradient.into_data().try_to_vec().expect("gradients are in single precision"),
        None => vec![0.0; parameter.dims()[0]],
    };
    Ok(parameters.iter().map(of).collect())
}
