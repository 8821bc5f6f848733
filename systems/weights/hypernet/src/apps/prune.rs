//! Smaller networks: a hypernetwork makes the weights of a network and, from the same descriptors of its layers, which of
//! the hidden units stay.
//!
//! The descriptors are the learned embeddings of the tensors; the masks are two tensors more. A unit stays where its score
//! is positive; backwards the step counts as a sigmoid (straight-through), and a penalty draws the share of units that
//! stay to the one wanted. What stays is cut out as a smaller network and fine-tuned. Baseline: units with the smallest
//! weights go (magnitude pruning), with the same steps of training and fine-tuning.
//!
//! MetaPruning (Liu et al., arXiv 1903.10258) goes the other way: a hypernetwork makes the weights of a network of any
//! widths, which are its input and are drawn at random in training. Then widths are evolved by the accuracy on rows held
//! out, among those that cost no more than the pruned network does.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use burn::module::Param;
use burn::tensor::{Tensor, TensorData, activation};
use kiln_core::{Context, Error, Result, Table};
use kiln_nn::{ParamSpec, WeightSpec};
use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};

use crate::apps::{Findings, Parts, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, OutputScheme, Theta};
use crate::target::Target;
use crate::training::{Fit, Labelled, Plain, accuracy_of, cross_entropy, fit};

/// All digits.
pub const DIGITS: [u8; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
/// Hidden units of each of the two hidden layers.
const UNITS: usize = 64;
/// Networks of a generation of the evolution, and generations.
const POPULATION: usize = 24;
const GENERATIONS: usize = 12;
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
pub fn run(config: &Config, parts: &Parts, cx: &Context) -> Result<(Findings, [f64; 2])> {
    if let Some(share) = config.removed.iter().find(|share| !(**share > 0.0 && **share < 1.0)) {
        return Err(Error::usage(format!("the share {share} of units to remove is not between 0 and 1")));
    }
    if config.removed.is_empty() {
        return Err(Error::usage("there is no share of units to remove"));
    }
    let Parts { train, test, classes, .. } = parts;
    let widths = [train.width, UNITS, UNITS, *classes];
    let mut whole = Vec::new();
    let mut pruned = vec![[Vec::new(), Vec::new(), Vec::new()]; config.removed.len()];
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("pruning, seed {}", cx.seed));
        let batch = |step: usize| train.draw(64, &mut cx.rng("batch", step as u64)).tensors(&cx.device);
        let target = Target::mlp(&widths);
        let plain = Plain::new(&target, 1, cx, "plain")?;
        let plain = fit(plain, Fit::new(config.steps[0], 2e-3), cx, |net, step| {
            let (x, y) = batch(step);
            Ok(cross_entropy(target.forward(net.theta.val(), x), y))
        })?;
        whole.push(accuracy_of(&target, plain.theta.val(), test, cx));
        let plain = floats(plain.theta.val());
        let plain = Net::read(&plain, widths);
        let meta = Meta::train(config, widths, train, cx)?;
        for (&removed, [hyper, magnitude, evolved]) in config.removed.iter().zip(&mut pruned) {
            // As many of both layers, whose scores are not of one kind.
            let count = (((1.0 - removed) * UNITS as f64).round() as usize).max(1);
            let (net, scores) = train_masked(config, &target, widths, 1.0 - removed, &batch, cx)?;
            let magnitudes = [0, 1].map(|layer| plain.magnitudes(layer));
            let kept = |scores: [Vec<f32>; 2]| scores.map(|scores| highest(&scores, count));
            let budget = operations(&[train.width, count, count, *classes]);
            let found = meta.evolve(budget, cx)?;
            for (net, kept, accuracies) in [
                (&net, kept(scores), hyper),
                (&plain, kept(magnitudes), magnitude),
                (&meta.net(found)?, found.map(|width| (0..width).collect()), evolved),
            ] {
                let (small, theta) = net.cut(&kept);
                let theta = Tensor::from_data(TensorData::new(theta.clone(), [1, theta.len()]), &cx.device);
                let start = Plain { theta: Param::from_tensor(theta) };
                let tuned = fit(start, Fit::new(config.steps[1], 1e-3), cx, |net, step| {
                    let (x, y) = batch(config.steps[0] + step);
                    Ok(cross_entropy(small.forward(net.theta.val(), x), y))
                })?;
                accuracies.push(accuracy_of(&small, tuned.theta.val(), test, cx));
            }
        }
    }
    let mut table = Table::new(
        format!("Hidden units removed from {}-{UNITS}-{UNITS}-{classes}: {}", train.width, parts.name),
        &["removed", "hypernetwork with masks", "magnitude pruning", "evolved widths", "nothing removed"],
    );
    for (removed, [hyper, magnitude, evolved]) in config.removed.iter().zip(&pruned) {
        table.row([
            format!("{:.0} %", 100.0 * removed),
            Spread::of(hyper).text(),
            Spread::of(magnitude).text(),
            Spread::of(evolved).text(),
            Spread::of(&whole).text(),
        ]);
    }
    let notes = vec![format!(
        "Pruning: {} steps of training, {} of fine-tuning what stays; as many units of both hidden layers are removed. Evolved \
         widths cost no more multiplications than that.",
        config.steps[0], config.steps[1]
    )];
    let [hyper, magnitude, _] = pruned[0].each_ref().map(|accuracies| Spread::of(accuracies).mean);
    Ok((Findings { table, plots: Vec::new(), notes }, [hyper, magnitude]))
}

fn floats(x: Tensor<2>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

type Batch = (Tensor<3>, Tensor<2, burn::tensor::Int>);

/// Trains a hypernetwork that makes weights and masks; the network it ends with, and the scores of its units.
fn train_masked(
    config: &Config,
    target: &Target,
    widths: [usize; 4],
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
    Ok((Net::read(&floats(theta.flat)[..count], widths), scores))
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

/// Multiplications of linear layers of these widths.
fn operations(widths: &[usize]) -> usize {
    widths.windows(2).map(|pair| pair[0] * pair[1]).sum()
}

/// A hypernetwork that makes the weights of a network of any widths.
struct Meta<'a> {
    hyper: HyperNet,
    target: Target,
    widths: [usize; 4],
    /// What it is trained on, and what widths are judged by.
    rows: [Labelled; 2],
    cx: &'a Context,
}

/// Widths of the two hidden layers.
type Widths = [usize; 2];

impl<'a> Meta<'a> {
    fn train(config: &Config, widths: [usize; 4], rows: &Labelled, cx: &'a Context) -> Result<Self> {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.shuffle(&mut cx.rng("evolution split", 0));
        let (valid, train) = order.split_at((rows.len() / 5).max(1));
        let target = Target::mlp(&widths);
        let hyper = HyperNetConfig::new(target.spec()?)
            .with_conditioning([Conditioning::Given { dim: 2 }])
            .with_scheme(OutputScheme::Chunk { chunk: 256, emb_dim: 8 })
            .with_arch(Arch::Mlp(vec![32]))
            .draw(cx, "meta")?;
        let rows = [rows.select(train), rows.select(valid)];
        let mut meta = Self { hyper, target, widths, rows, cx };
        meta.hyper = fit(meta.hyper.clone(), Fit::new(config.steps[0], 2e-3), cx, |hyper, step| {
            let mut rng = cx.rng("widths", step as u64);
            let (x, y) = meta.rows[0].draw(64, &mut rng).tensors(&cx.device);
            let widths = [0; 2].map(|_| rng.random_range(1..=UNITS));
            let theta = meta.theta(hyper, widths)?;
            Ok(cross_entropy(meta.target.forward(theta, x), y))
        })?;
        Ok(meta)
    }

    /// Weights of the whole network, `[1, N]`, with those of units beyond the widths at 0.
    fn theta(&self, hyper: &HyperNet, widths: Widths) -> Result<Tensor<2>> {
        let given = widths.map(|width| width as f32 / UNITS as f32);
        let given = Tensor::<2>::from_data(TensorData::new(given.to_vec(), [1, 2]), &self.cx.device);
        let masks = widths.map(|width| {
            let mask: Vec<f32> = (0..UNITS).map(|unit| f32::from(u8::from(unit < width))).collect();
            Tensor::from_data(TensorData::new(mask, [1, UNITS]), &self.cx.device)
        });
        masked(&hyper.generate(&Condition::given(given))?, masks)
    }

    /// The network with these widths, the units beyond them still there.
    fn net(&self, widths: Widths) -> Result<Net> {
        Ok(Net::read(&floats(self.theta(&self.hyper, widths)?), self.widths))
    }

    /// The widths within a budget of multiplications with the highest accuracy on the rows held out.
    fn evolve(&self, budget: usize, cx: &Context) -> Result<Widths> {
        let mut rng = cx.rng("evolution", budget as u64);
        let affordable = |[a, b]: &Widths| operations(&[self.widths[0], *a, *b, self.widths[3]]) <= budget;
        let draw = |rng: &mut _| [0; 2].map(|_| RngExt::random_range(rng, 1..=UNITS));
        let mut judged: BTreeMap<Widths, f64> = BTreeMap::new();
        let mut population: Vec<Widths> = Vec::new();
        for _ in 0..GENERATIONS {
            while population.len() < POPULATION {
                let parents: Vec<Widths> = best(&judged, POPULATION / 3);
                let child = match parents.choose(&mut rng) {
                    // A third are strangers, a third have one width of either parent, a third a width moved a little.
                    None => draw(&mut rng),
                    Some(&parent) => match rng.random_range(0..3) {
                        0 => draw(&mut rng),
                        1 => [parent[0], parents.choose(&mut rng).map_or(parent[1], |other| other[1])],
                        _ => parent
                            .map(|width| (width + rng.random_range(0..9)).saturating_sub(4).clamp(1, UNITS)),
                    },
                };
                if affordable(&child) {
                    population.push(child);
                }
            }
            for widths in population.drain(..) {
                if let Entry::Vacant(entry) = judged.entry(widths) {
                    let theta = self.theta(&self.hyper, widths)?;
                    entry.insert(accuracy_of(&self.target, theta, &self.rows[1], cx));
                }
            }
        }
        Ok(best(&judged, 1).first().copied().unwrap_or([1, 1]))
    }
}

/// The widths with the highest accuracies.
fn best(judged: &BTreeMap<Widths, f64>, count: usize) -> Vec<Widths> {
    let mut order: Vec<(&Widths, &f64)> = judged.iter().collect();
    order.sort_by(|a, b| b.1.total_cmp(a.1));
    order.into_iter().take(count).map(|(widths, _)| *widths).collect()
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
    fn evolved_widths_keep_within_their_budget_and_nothing_lies_beyond_them() {
        let cx = Context::for_tests("unused");
        let rows = Labelled { width: 3, x: (0..60).map(|i| (i % 7) as f32).collect(), y: [0, 1].repeat(10) };
        let config = Config { steps: [2, 0], ..Config::default() };
        let meta = Meta::train(&config, [3, UNITS, UNITS, 2], &rows, &cx).unwrap();
        let budget = operations(&[3, 8, 8, 2]);
        let [a, b] = meta.evolve(budget, &cx).unwrap();
        assert!(operations(&[3, a, b, 2]) <= budget);
        let net = meta.net([a, b]).unwrap();
        assert!(net.magnitudes(0)[a..].iter().chain(&net.magnitudes(1)[b..]).all(|&m| m == 0.0));
        assert_eq!(meta.evolve(budget, &cx).unwrap(), [a, b]);
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
