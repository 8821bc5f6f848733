//! Smaller networks: a hypernetwork makes the weights of a network and, from the same descriptors of its layers, which of
//! the hidden units stay.
//!
//! The descriptors are the learned embeddings of the tensors; the masks are two tensors more. A unit stays where its score
//! is positive; backwards the step counts as a sigmoid (straight-through), and a penalty draws the share of units that
//! stay to the one wanted. What stays is cut out as a smaller network and fine-tuned. Baseline: units with the smallest
//! weights go (magnitude pruning), with the same steps of training and fine-tuning.

use burn::module::Param;
use burn::tensor::{Tensor, TensorData, activation};
use kiln_core::{Context, Error, Result, Table};
use kiln_data::digits;
use kiln_nn::{ParamSpec, WeightSpec};

use crate::apps::{Findings, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::generator::Arch;
use crate::hypernet::{HyperNetConfig, OutputScheme, Theta};
use crate::target::Target;
use crate::training::{Fit, Labelled, Plain, accuracy_of, cross_entropy, fit};

/// Hidden units of each of the two hidden layers.
const UNITS: usize = 64;
const INPUTS: usize = digits::PIXELS;
const CLASSES: usize = 10;
/// Added to every score, so that nearly all units stay at first.
const OPEN: f64 = 2.0;
/// Factor of the penalty for keeping another share than wanted.
const PENALTY: f64 = 2.0;

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Shares of the hidden units that are removed.
    pub removed: Vec<f64>,
    /// Steps of training, and of fine-tuning what stays.
    pub steps: [usize; 2],
    /// Repetitions.
    pub seeds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { removed: vec![0.5, 0.75], steps: [1500, 300], seeds: 1 }
    }
}

/// A network of two hidden layers in host memory, weights `[out, in]`.
struct Net {
    widths: [usize; 4],
    weights: [Vec<f32>; 3],
    biases: [Vec<f32>; 3],
}

impl Net {
    /// From weights laid out as [`Target`] has them.
    fn read(theta: &[f32], widths: [usize; 4]) -> Self {
        let mut rest = theta;
        let mut take = |count: usize| {
            let (part, more) = rest.split_at(count);
            rest = more;
            part.to_vec()
        };
        let layers: [(Vec<f32>, Vec<f32>); 3] =
            std::array::from_fn(|l| (take(widths[l] * widths[l + 1]), take(widths[l + 1])));
        let [a, b, c] = layers;
        Self { widths, weights: [a.0, b.0, c.0], biases: [a.1, b.1, c.1] }
    }

    /// The Euclidean norm of what comes into each unit of a hidden layer.
    fn magnitudes(&self, layer: usize) -> Vec<f32> {
        let rows = self.weights[layer].chunks(self.widths[layer]).zip(&self.biases[layer]);
        rows.map(|(row, bias)| (row.iter().map(|w| w * w).sum::<f32>() + bias * bias).sqrt()).collect()
    }

    /// Only these units of the two hidden layers, and the target of that size.
    fn cut(&self, kept: &[Vec<usize>; 2]) -> (Target, Vec<f32>) {
        let all = |count: usize| (0..count).collect::<Vec<_>>();
        let units = [all(self.widths[0]), kept[0].clone(), kept[1].clone(), all(self.widths[3])];
        let mut theta = Vec::new();
        for layer in 0..3 {
            let width = self.widths[layer];
            for &row in &units[layer + 1] {
                theta.extend(units[layer].iter().map(|&column| self.weights[layer][row * width + column]));
            }
            theta.extend(units[layer + 1].iter().map(|&row| self.biases[layer][row]));
        }
        (Target::mlp(&units.map(|units| units.len())), theta)
    }
}

/// The units with the highest scores.
fn highest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Compares both ways to prune; returns the accuracies at the first share that is removed.
///
/// # Errors
/// When a share makes no sense, or a training fails or is stopped.
pub fn run(config: &Config, cx: &Context) -> Result<(Findings, [f64; 2])> {
    if let Some(share) = config.removed.iter().find(|share| !(**share > 0.0 && **share < 1.0)) {
        return Err(Error::usage(format!("the share {share} of units to remove is not between 0 and 1")));
    }
    if config.removed.is_empty() {
        return Err(Error::usage("there is no share of units to remove"));
    }
    let classes: Vec<u8> = (0..CLASSES as u8).collect();
    let (train, test) =
        (Labelled::digits(digits::train(), &classes), Labelled::digits(digits::test(), &classes));
    let mut whole = Vec::new();
    let mut pruned = vec![[Vec::new(), Vec::new()]; config.removed.len()];
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("pruning, seed {}", cx.seed));
        let batch = |step: usize| train.draw(64, &mut cx.rng("batch", step as u64)).tensors(&cx.device);
        let target = Target::mlp(&[INPUTS, UNITS, UNITS, CLASSES]);
        let plain = Plain::new(&target, 1, cx, "plain")?;
        let plain = fit(plain, Fit::new(config.steps[0], 2e-3), cx, |net, step| {
            let (x, y) = batch(step);
            Ok(cross_entropy(target.forward(net.theta.val(), x), y))
        })?;
        whole.push(accuracy_of(&target, plain.theta.val(), &test, cx));
        let plain = floats(plain.theta.val());
        let plain = Net::read(&plain, [INPUTS, UNITS, UNITS, CLASSES]);
        for (&removed, [hyper, magnitude]) in config.removed.iter().zip(&mut pruned) {
            // As many of both layers, whose scores are not of one kind.
            let count = (((1.0 - removed) * UNITS as f64).round() as usize).max(1);
            let (net, scores) = train_masked(config, &target, 1.0 - removed, &batch, cx)?;
            let magnitudes = [0, 1].map(|layer| plain.magnitudes(layer));
            for (net, scores, accuracies) in [(&net, scores, hyper), (&plain, magnitudes, magnitude)] {
                let kept = scores.map(|scores| highest(&scores, count));
                let (small, theta) = net.cut(&kept);
                let theta = Tensor::from_data(TensorData::new(theta.clone(), [1, theta.len()]), &cx.device);
                let start = Plain { theta: Param::from_tensor(theta) };
                let tuned = fit(start, Fit::new(config.steps[1], 1e-3), cx, |net, step| {
                    let (x, y) = batch(config.steps[0] + step);
                    Ok(cross_entropy(small.forward(net.theta.val(), x), y))
                })?;
                accuracies.push(accuracy_of(&small, tuned.theta.val(), &test, cx));
            }
        }
    }
    let mut table = Table::new(
        format!("Digits with a target {INPUTS}-{UNITS}-{UNITS}-{CLASSES}, hidden units removed"),
        &["removed", "hypernetwork with masks", "magnitude pruning", "nothing removed"],
    );
    for (removed, [hyper, magnitude]) in config.removed.iter().zip(&pruned) {
        table.row([
            format!("{:.0} %", 100.0 * removed),
            Spread::of(hyper).text(),
            Spread::of(magnitude).text(),
            Spread::of(&whole).text(),
        ]);
    }
    let notes = vec![format!(
        "Pruning: {} steps of training, {} of fine-tuning what stays; as many units of both hidden layers are removed.",
        config.steps[0], config.steps[1]
    )];
    let first = pruned[0].each_ref().map(|accuracies| Spread::of(accuracies).mean);
    Ok((Findings { table, plots: Vec::new(), notes }, first))
}

fn floats(x: Tensor<2>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

type Batch = (Tensor<3>, Tensor<2, burn::tensor::Int>);

/// Trains a hypernetwork that makes weights and masks; the network it ends with, and the scores of its units.
fn train_masked(
    config: &Config,
    target: &Target,
    keep: f64,
    batch: &impl Fn(usize) -> Batch,
    cx: &Context,
) -> Result<(Net, [Vec<f32>; 2])> {
    let mut params = target.spec()?.params().to_vec();
    let scores = |layer: usize| ParamSpec {
        name: format!("scores{layer}"),
        shape: vec![UNITS],
        holder: "mask".into(),
    };
    params.extend([scores(1), scores(2)]);
    let hyper = HyperNetConfig::new(WeightSpec::new(params)?)
        .with_conditioning([Conditioning::Task { tasks: 1, dim: 4 }])
        .with_scheme(OutputScheme::Component { emb_dim: 8 })
        .with_arch(Arch::Mlp(vec![32]));
    let hyper = fit(hyper.draw(cx, "hypernet")?, Fit::new(config.steps[0], 2e-3), cx, |hyper, step| {
        let (x, y) = batch(step);
        let theta = hyper.generate(&Condition::tasks([0]))?;
        let masks = [1, 2].map(|layer| mask(open_scores(&theta, layer)));
        let off = masks.each_ref().map(|mask| (mask.clone().mean() - keep).abs());
        let [first, second] = off;
        let loss = cross_entropy(target.forward(masked(&theta, masks)?, x), y);
        Ok(loss + (first + second) * PENALTY)
    })?;
    let theta = hyper.generate(&Condition::tasks([0]))?;
    let scores = [1, 2].map(|layer| floats(open_scores(&theta, layer)));
    let count = target.spec()?.numel();
    Ok((Net::read(&floats(theta.flat)[..count], [INPUTS, UNITS, UNITS, CLASSES]), scores))
}

/// `[1, units]`
fn open_scores(theta: &Theta, layer: usize) -> Tensor<2> {
    theta.tensor::<2>(&format!("scores{layer}")).expect("the target has scores for both layers") + OPEN
}

/// 1 for positive scores and 0 for others; backwards the sigmoid.
fn mask(scores: Tensor<2>) -> Tensor<2> {
    let soft = activation::sigmoid(scores);
    let hard = soft.clone().detach().greater_elem(0.5).float();
    hard + soft.clone() - soft.detach()
}

/// The target's weights `[1, N]` without those of units whose mask is 0.
fn masked(theta: &Theta, masks: [Tensor<2>; 2]) -> Result<Tensor<2>> {
    let mut parts = Vec::new();
    for layer in 1..=3 {
        let weight: Tensor<3> = theta.tensor(&format!("fc{layer}.weight"))?;
        let bias: Tensor<2> = theta.tensor(&format!("fc{layer}.bias"))?;
        let (weight, bias) = match masks.get(layer - 1) {
            Some(mask) => (weight * mask.clone().unsqueeze_dim::<3>(2), bias * mask.clone()),
            None => (weight, bias),
        };
        let count = weight.dims().iter().product();
        parts.extend([weight.reshape([1, count]), bias]);
    }
    Ok(Tensor::cat(parts, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_out_computes_what_the_whole_does_with_the_others_at_zero() {
        let cx = Context::for_tests("unused");
        let widths = [3, 4, 5, 2];
        let target = Target::mlp(&widths);
        let theta = floats(Plain::new(&target, 1, &cx, "plain").unwrap().theta.val());
        let mut net = Net::read(&theta, widths);
        let kept = [vec![0, 3], vec![1, 2, 4]];
        let (small, cut) = net.cut(&kept);
        for layer in 0..2 {
            for unit in (0..widths[layer + 1]).filter(|unit| !kept[layer].contains(unit)) {
                net.weights[layer][unit * widths[layer]..(unit + 1) * widths[layer]].fill(0.0);
                net.biases[layer][unit] = 0.0;
            }
        }
        let everything = [0, 1].map(|layer: usize| (0..widths[layer + 1]).collect::<Vec<_>>());
        let (_, zeroed) = net.cut(&everything);
        let tensor =
            |v: Vec<f32>| Tensor::<2>::from_data(TensorData::new(v.clone(), [1, v.len()]), &cx.device);
        let x = Tensor::<1>::from_floats([0.3, -1.0, 0.7], &cx.device).reshape([1, 1, 3]);
        let found = small.forward(tensor(cut), x.clone()).into_data();
        found.assert_approx_eq::<f32>(
            &target.forward(tensor(zeroed), x).into_data(),
            burn::tensor::Tolerance::default(),
        );
    }

    #[test]
    fn the_highest_scores_stay_in_their_order() {
        assert_eq!(highest(&[5.0, 1.0, 4.0, 3.0], 2), [0, 2]);
    }

    #[test]
    fn a_mask_is_hard_forwards_and_soft_backwards() {
        let device = burn::tensor::Device::flex();
        let scores = Tensor::from_inner(Tensor::<2>::from_floats([[-1.0, 2.0]], &device)).require_grad();
        let mask = mask(scores.clone());
        assert_eq!(floats(mask.clone()), [0.0, 1.0]);
        let gradient = floats(scores.grad(&mask.sum().backward()).unwrap());
        assert!((gradient[0] - 0.196_612).abs() < 1e-5 && (gradient[1] - 0.104_994).abs() < 1e-5);
    }
}
