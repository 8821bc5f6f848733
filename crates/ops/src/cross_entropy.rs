//! Cross-entropy of logits against class indices, without the probabilities in memory.

use std::sync::Arc;

use burn::tensor::{Bool, Int, Tensor, activation as burn_activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::{floats, ints, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;
use crate::softmax::{exp_below, max, overwrite_rows, sum, sum_of_exp};
use crate::vector::dot;

/// Elements of logits that one task reads, at least.
const BLOCK: usize = 8192;

/// What may be added to a plain [`cross_entropy`].
#[derive(Debug, Clone, Default)]
pub struct CrossEntropyOptions {
    /// The share `α` of the target's probability that is spread over all classes evenly.
    pub label_smoothing: f32,
    /// What an error in each class counts, `[classes]`; constant.
    pub weights: Option<Tensor<1>>,
    /// Rows with one of these targets, which need not be classes, have no loss.
    pub ignored: Vec<i64>,
}

/// The loss of every row, `Σ_c w_c y_c (ln Σ_j e^x_j - x_c)` with the smoothed target
/// `y_c = (1 - α) [c = target] + α / classes`; 0 where the target is ignored.
///
/// The loss that [`burn::nn::loss::CrossEntropyLoss`] and PyTorch call the mean is the sum of these over
/// the sum of the targets' weights.
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - targets: `[rows]`
/// - output: `[rows]`
///
/// # Panics
/// When there is not one target for every row, or not one weight for every class; on the CPU when a target
/// is neither a class nor ignored.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>, options: &CrossEntropyOptions) -> Tensor<1> {
    let ([rows, classes], [given]) = (logits.dims(), targets.dims());
    assert_eq!(given, rows, "{rows} rows of logits need as many targets, not {given}");
    if let Some(weights) = &options.weights {
        let [given] = weights.dims();
        assert_eq!(given, classes, "{classes} classes need as many weights, not {given}");
    }
    if !runs_natively(&logits) {
        return composed(logits, targets, options);
    }
    let targets = ints(targets).into_iter().map(|target| match usize::try_from(target) {
        _ if options.ignored.contains(&target) => None,
        Ok(class) if class < classes => Some(class),
        _ => panic!("the target {target} is none of the {classes} classes"),
    });
    let weights = options.weights.clone().map(|weights| {
        let weights = weights.into_data().try_to_vec::<f32>();
        weights.expect("weights are 32-bit floats like the logits").into()
    });
    let function =
        CrossEntropy { targets: targets.collect(), weights, label_smoothing: options.label_smoothing };
    Tensor::from_dispatch(apply(&function, [logits.into_dispatch()]))
}

/// The same out of Burn's operations.
fn composed(logits: Tensor<2>, targets: Tensor<1, Int>, options: &CrossEntropyOptions) -> Tensor<1> {
    let [rows, classes] = logits.dims();
    let ignored: Option<Tensor<1, Bool>> =
        options.ignored.iter().map(|&id| targets.clone().equal_scalar(id)).reduce(Tensor::bool_or);
    let targets = match &ignored {
        Some(ignored) => targets.mask_fill(ignored.clone(), 0),
        None => targets,
    };
    let mut surprise = burn_activation::log_softmax(logits, 1).neg();
    if let Some(weights) = &options.weights {
        surprise = surprise * weights.clone().reshape([1, classes]);
    }
    let share = options.label_smoothing;
    let evenly = surprise.clone().mean_dim(1).mul_scalar(share);
    let on_target = surprise.gather(1, targets.reshape([rows, 1])).mul_scalar(1.0 - share);
    let losses = (on_target + evenly).reshape([rows]);
    match ignored {
        Some(ignored) => losses.mask_fill(ignored, 0),
        None => losses,
    }
}

/// A function of logits `[rows, classes]` with the losses `[rows]`.
#[derive(Debug, Clone)]
struct CrossEntropy {
    /// The class of every row; none where the row is ignored.
    targets: Arc<[Option<usize>]>,
    weights: Option<Arc<[f32]>>,
    label_smoothing: f32,
}

/// What the backward pass of [`CrossEntropy`] needs.
#[derive(Clone)]
struct Saved {
    logits: FlexTensor,
    statistics: Vec<Statistics>,
}

/// From these and the logits the probabilities follow: `e^(x - largest) / sum`.
#[derive(Debug, Clone, Copy, Default)]
struct Statistics {
    /// The largest logit of a row.
    largest: f32,
    /// `Σ_j e^(x_j - largest)`
    sum: f32,
}

impl Function<1> for CrossEntropy {
    type Saved = Saved;

    fn forward(&self, [logits]: [FlexTensor; 1]) -> (FlexTensor, Saved) {
        let [rows, classes] = [logits.layout().shape()[0], logits.layout().shape()[1]];
        let mut losses = vec![0.0; rows];
        let mut statistics = vec![Statistics::default(); rows];
        let values = floats(&logits);
        let work = |first: usize, losses: &mut [f32], statistics: &mut [Statistics]| {
            let rows = first..first + losses.len();
            let values = &values[rows.start * classes..rows.end * classes];
            self.losses(&self.targets[rows], values, losses, statistics);
        };
        let block = BLOCK.div_ceil(classes.max(1));
        if rows <= block {
            work(0, &mut losses, &mut statistics);
        } else {
            let tasks = losses.par_chunks_mut(block).zip(statistics.par_chunks_mut(block)).enumerate();
            tasks.for_each(|(task, (losses, statistics))| work(task * block, losses, statistics));
        }
        drop(values);
        (tensor(losses, [rows]), Saved { logits, statistics })
    }

    fn backward(
        &self,
        Saved { logits, statistics }: Saved,
        upstream: FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let classes = logits.layout().shape()[1];
        let upstream = floats(&upstream);
        let gradient = overwrite_rows(logits, classes, |first, logits| {
            let rows = first..first + logits.len() / classes;
            let targets = &self.targets[rows.clone()];
            self.gradients(targets, &statistics[rows.clone()], &upstream[rows], logits);
        });
        [Some(gradient)]
    }
}

impl CrossEntropy {
    /// The weight of the target and the sum of all weights times what smoothing gives each class.
    fn shares(&self, target: usize, classes: usize) -> (f32, f32) {
        let weight = self.weights.as_ref().map_or(1.0, |weights| weights[target]);
        let evenly = match &self.weights {
            Some(weights) => self.label_smoothing * sum(weights) / classes as f32,
            None => self.label_smoothing,
        };
        (weight * (1.0 - self.label_smoothing), evenly)
    }

    fn losses(
        &self,
        targets: &[Option<usize>],
        logits: &[f32],
        losses: &mut [f32],
        statistics: &mut [Statistics],
    ) {
        let Some(classes) = logits.len().checked_div(targets.len()).filter(|&classes| classes > 0) else {
            return;
        };
        simd(
            #[inline(always)]
            || {
                for (row, (target, x)) in targets.iter().zip(logits.chunks_exact(classes)).enumerate() {
                    let Some(target) = *target else { continue };
                    let largest = max(x);
                    let sum_of_exp = sum_of_exp(x, largest);
                    statistics[row] = Statistics { largest, sum: sum_of_exp };
                    let (on_target, evenly) = self.shares(target, classes);
                    let log_sum = sum_of_exp.ln();
                    let mut loss = on_target * (largest - x[target] + log_sum);
                    if evenly != 0.0 {
                        let mean = match &self.weights {
                            Some(weights) => dot(x, weights) / sum(weights),
                            None => sum(x) / classes as f32,
                        };
                        loss += evenly * (largest - mean + log_sum);
                    }
                    losses[row] = loss;
                }
            },
        );
    }

    /// Replaces logits by their gradients `g ((v + s) p - v [c = target] - s w_c / Σ w)`, where `v` and `s`
    /// are the target's and the smoothing's share.
    fn gradients(
        &self,
        targets: &[Option<usize>],
        statistics: &[Statistics],
        upstream: &[f32],
        logits: &mut [f32],
    ) {
        let classes = logits.len() / targets.len();
        simd(
            #[inline(always)]
            || {
                for (row, x) in logits.chunks_exact_mut(classes).enumerate() {
                    let Some(target) = targets[row] else {
                        x.fill(0.0);
                        continue;
                    };
                    let Statistics { largest, sum: sum_of_exp } = statistics[row];
                    let (on_target, evenly) = self.shares(target, classes);
                    let factor = upstream[row] * (on_target + evenly) / sum_of_exp;
                    let even = upstream[row] * evenly;
                    match &self.weights {
                        Some(weights) => {
                            let even = even / sum(weights);
                            for (x, weight) in x.iter_mut().zip(weights.iter()) {
                                *x = factor * exp_below(*x - largest) - even * weight;
                            }
                        }
                        None => {
                            let even = even / classes as f32;
                            for x in x.iter_mut() {
                                *x = factor * exp_below(*x - largest) - even;
                            }
                        }
                    }
                    x[target] -= upstream[row] * on_target;
                }
            },
        );
    }
}
