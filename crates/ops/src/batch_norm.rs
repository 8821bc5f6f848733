//! Batch and group normalisation.
//!
//! Both give every row, the plane of one image and channel, a mean and a variance: batch norm those of its
//! channel over all images, group norm those of its group of channels in its image. What follows is the
//! same, so that there is one kernel.

use burn::tensor::{Tensor, module};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;
use crate::vector::fma;

/// Output and statistics of [`batch_norm_train`].
#[derive(Debug, Clone)]
pub struct BatchNormOutput<const D: usize> {
    /// The normalised input.
    pub output: Tensor<D>,
    /// The mean of every channel, off the autodiff graph.
    pub mean: Tensor<1>,
    /// The variance of every channel, divided by the number of elements; off the autodiff graph.
    pub variance: Tensor<1>,
}

/// `(x - mean) / √(variance + ε) γ + β` with the statistics of each channel over all other axes.
///
/// # Shapes
/// - x, output: `[batch, channels, ...]`
/// - gamma, beta, mean, variance: `[channels]`
///
/// # Panics
/// When `gamma` or `beta` does not have the input's channels.
pub fn batch_norm_train<const D: usize>(
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    epsilon: f64,
) -> BatchNormOutput<D> {
    if !runs_natively(&x) || !runs_natively(&gamma) {
        let result = module::batch_norm_train(x, gamma, beta, epsilon);
        return BatchNormOutput { output: result.output, mean: result.mean, variance: result.variance };
    }
    let channels = channels(&x, &gamma, &beta);
    let autodiff = x.device().is_autodiff();
    // Not `detach`, which leaves a leaf on the graph.
    let off_graph = x.clone().without_autodiff().into_dispatch();
    let statistics = Tensor::<2>::from_dispatch(apply(&Statistics, [off_graph]));
    let statistic = |row| {
        let statistic = statistics.clone().narrow(0, row, 1).reshape([channels]);
        if autodiff { Tensor::from_inner(statistic) } else { statistic }
    };
    let (mean, variance) = (statistic(0), statistic(1));
    let function = Normalise { sets: Sets::Channels { given: false }, epsilon: epsilon as f32 };
    let inputs = [x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch(), statistics.into_dispatch()];
    BatchNormOutput { output: Tensor::from_dispatch(apply(&function, inputs)), mean, variance }
}

/// `(x - mean) / √(variance + ε) γ + β` with given statistics, which are constants to the gradient.
///
/// # Shapes
/// - x, output: `[batch, channels, ...]`
/// - gamma, beta, mean, variance: `[channels]`
///
/// # Panics
/// When `gamma` or `beta` does not have the input's channels.
pub fn batch_norm<const D: usize>(
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    mean: Tensor<1>,
    variance: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    if !runs_natively(&x) || !runs_natively(&gamma) {
        return module::batch_norm(x, gamma, beta, mean, variance, epsilon);
    }
    channels(&x, &gamma, &beta);
    let statistics = Tensor::stack::<2>(vec![mean.without_autodiff(), variance.without_autodiff()], 0);
    let function = Normalise { sets: Sets::Channels { given: true }, epsilon: epsilon as f32 };
    let inputs = [x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch(), statistics.into_dispatch()];
    Tensor::from_dispatch(apply(&function, inputs))
}

/// `(x - mean) / √(variance + ε) γ + β` with the statistics of each image's groups of channels; without
/// `γ` and `β` where they are not given.
///
/// # Shapes
/// - x, output: `[batch, channels, ...]`
/// - gamma, beta: `[channels]`
///
/// # Panics
/// When `groups` does not divide the channels, or `gamma` or `beta` does not have the input's channels.
pub fn group_norm<const D: usize>(
    x: Tensor<D>,
    gamma: Option<Tensor<1>>,
    beta: Option<Tensor<1>>,
    groups: usize,
    epsilon: f64,
) -> Tensor<D> {
    let channels = x.dims()[1];
    assert!(
        groups > 0 && channels.is_multiple_of(groups),
        "{groups} groups must divide the channels of {:?}",
        x.dims()
    );
    if !runs_natively(&x) {
        return composed_group_norm(x, gamma, beta, groups, epsilon);
    }
    let device = x.device();
    let gamma = gamma.unwrap_or_else(|| Tensor::ones([channels], &device));
    let beta = beta.unwrap_or_else(|| Tensor::zeros([channels], &device));
    self::channels(&x, &gamma, &beta);
    let none = Tensor::<1>::empty([0], &device);
    let function = Normalise { sets: Sets::Groups(groups), epsilon: epsilon as f32 };
    let inputs = [x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch(), none.into_dispatch()];
    Tensor::from_dispatch(apply(&function, inputs))
}

/// The same out of Burn's operations.
fn composed_group_norm<const D: usize>(
    x: Tensor<D>,
    gamma: Option<Tensor<1>>,
    beta: Option<Tensor<1>>,
    groups: usize,
    epsilon: f64,
) -> Tensor<D> {
    let shape = x.dims();
    let x = x.reshape([shape[0] as isize, groups as isize, -1]);
    let (variance, mean) = x.clone().var_mean_bias(2);
    let mut y = ((x - mean) / (variance + epsilon).sqrt()).reshape(shape);
    let mut per_channel = [1; D];
    per_channel[1] = shape[1];
    if let Some(gamma) = gamma {
        y = y * gamma.reshape(per_channel);
    }
    match beta {
        Some(beta) => y + beta.reshape(per_channel),
        None => y,
    }
}

/// The number of channels, which `gamma` and `beta` must have too.
fn channels<const D: usize>(x: &Tensor<D>, gamma: &Tensor<1>, beta: &Tensor<1>) -> usize {
    let channels = x.dims()[1];
    assert!(
        gamma.dims() == [channels] && beta.dims() == [channels],
        "a norm's scale {:?} and shift {:?} must have the channels of the input {:?}",
        gamma.dims(),
        beta.dims(),
        x.dims()
    );
    channels
}

/// Which rows share their statistics.
#[derive(Debug, Clone, Copy)]
enum Sets {
    /// Those of a channel; the statistics may be given as constants.
    Channels { given: bool },
    /// Those of a group of channels in one image; the number of groups.
    Groups(usize),
}

/// Rows, planes of one image and channel each, and the sets in which they share statistics.
#[derive(Debug, Clone, Copy)]
struct Rows {
    sets: Sets,
    batch: usize,
    channels: usize,
    plane: usize,
}

impl Rows {
    fn of(sets: Sets, x: &FlexTensor) -> Self {
        let shape = x.layout().shape();
        let plane = shape.iter().skip(2).product();
        Self { sets, batch: shape[0], channels: shape[1], plane }
    }

    /// The number of sets.
    fn sets(&self) -> usize {
        match self.sets {
            Sets::Channels { .. } => self.channels,
            Sets::Groups(groups) => self.batch * groups,
        }
    }

    /// The set that a row belongs to.
    fn set_of(&self, row: usize) -> usize {
        match self.sets {
            Sets::Channels { .. } => row % self.channels,
            Sets::Groups(groups) => row / (self.channels / groups),
        }
    }

    /// Elements of one set.
    fn set_len(&self) -> f64 {
        let elements = self.batch * self.channels * self.plane;
        elements as f64 / self.sets() as f64
    }

    /// The mean over every set of what `sum` gives for its rows.
    fn means(&self, x: &[f32], sum: impl Fn(usize, &[f32]) -> f32 + Sync) -> Vec<f32> {
        let rows = self.each(x, sum);
        let mut totals = vec![0.0; self.sets()];
        for (row, sum) in rows.into_iter().enumerate() {
            totals[self.set_of(row)] += f64::from(sum);
        }
        let len = self.set_len();
        totals.into_iter().map(|total| (total / len) as f32).collect()
    }

    /// What `sum` gives for every row.
    fn each<R: Send + Default + Clone>(&self, x: &[f32], sum: impl Fn(usize, &[f32]) -> R + Sync) -> Vec<R> {
        if self.plane == 0 {
            return vec![R::default(); self.batch * self.channels];
        }
        x.par_chunks(self.plane)
            .with_min_len(self.min_len())
            .enumerate()
            .map(|(row, x)| sum(row, x))
            .collect()
    }

    /// Rows that make a task.
    fn min_len(&self) -> usize {
        const TASK: usize = 1 << 12;
        (TASK / self.plane.max(1)).max(1)
    }

    /// The mean and the variance of every set.
    fn statistics(&self, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mean = self.means(x, |_, x| {
            sum(
                x,
                #[inline(always)]
                |x| x,
            )
        });
        let variance = self.means(x, |row, x| {
            let mean = mean[self.set_of(row)];
            sum(
                x,
                #[inline(always)]
                |x| (x - mean) * (x - mean),
            )
        });
        (mean, variance)
    }
}

/// `Σ f(x)`.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    sum2(
        x,
        x,
        #[inline(always)]
        |x, _| f(x),
    )
}

/// `Σ f(x, y)`, in lanes that are added up at the end.
#[inline(always)]
fn sum2(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 32;
    simd(
        #[inline(always)]
        || {
            let (x_body, x_tail) = x.as_chunks::<LANES>();
            let (y_body, y_tail) = y.as_chunks::<LANES>();
            let mut sums = [0.0; LANES];
            for (x, y) in x_body.iter().zip(y_body) {
                for lane in 0..LANES {
                    sums[lane] += f(x[lane], y[lane]);
                }
            }
            let mut width = LANES / 2;
            while width > 0 {
                for lane in 0..width {
                    sums[lane] += sums[lane + width];
                }
                width /= 2;
            }
            x_tail.iter().zip(y_tail).fold(sums[0], |sum, (&x, &y)| sum + f(x, y))
        },
    )
}

/// Mean and variance of every channel, `[2, channels]`; of a tensor off the graph.
#[derive(Debug, Clone)]
struct Statistics;

impl Function<1> for Statistics {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        let rows = Rows::of(Sets::Channels { given: false }, &x);
        let (mean, variance) = rows.statistics(&floats(&x));
        (tensor([mean, variance].concat(), [2, rows.channels]), ())
    }

    fn backward(&self, (): (), _: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [None]
    }
}

/// Normalises `[x, gamma, beta, statistics]`; the last are mean and variance, `[2, channels]`, of sets of
/// channels and empty for sets of groups.
#[derive(Debug, Clone)]
struct Normalise {
    sets: Sets,
    epsilon: f32,
}

/// What the backward pass of [`Normalise`] needs.
#[derive(Clone)]
struct Saved {
    x: FlexTensor,
    gamma: FlexTensor,
    mean: Vec<f32>,
    /// `1 / √(variance + ε)` of every set.
    scale: Vec<f32>,
}

impl Function<4> for Normalise {
    type Saved = Saved;

    fn forward(&self, [x, gamma, beta, statistics]: [FlexTensor; 4]) -> (FlexTensor, Saved) {
        let rows = Rows::of(self.sets, &x);
        let values = floats(&x);
        let (mean, variance) = match self.sets {
            Sets::Groups(_) => rows.statistics(&values),
            Sets::Channels { .. } => {
                let statistics = floats(&statistics);
                let (mean, variance) = statistics.split_at(rows.channels);
                (mean.to_vec(), variance.to_vec())
            }
        };
        let scale: Vec<f32> =
            variance.iter().map(|variance| 1.0 / (variance + self.epsilon).sqrt()).collect();
        let (gammas, betas) = (floats(&gamma), floats(&beta));
        let mut y = vec![0.0; values.len()];
        if !y.is_empty() {
            let out = y.par_chunks_mut(rows.plane).zip(values.par_chunks(rows.plane));
            out.with_min_len(rows.min_len()).enumerate().for_each(|(row, (y, x))| {
                let (set, channel) = (rows.set_of(row), row % rows.channels);
                let (mean, factor, beta) = (mean[set], gammas[channel] * scale[set], betas[channel]);
                simd(
                    #[inline(always)]
                    || y.iter_mut().zip(x).for_each(|(y, x)| *y = fma(x - mean, factor, beta)),
                );
            });
        }
        let y = tensor(y, x.layout().shape().clone());
        drop((values, gammas));
        (y, Saved { x, gamma, mean, scale })
    }

    fn backward(
        &self,
        Saved { x, gamma, mean, scale }: Saved,
        upstream: FlexTensor,
        [wants_x, ..]: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        let rows = Rows::of(self.sets, &x);
        let (values, gammas, upstream) = (floats(&x), floats(&gamma), floats(&upstream));
        // Of every row Σ dy and Σ dy x̂.
        let sums = rows.each(&values, |row, x| {
            let dy = &upstream[row * rows.plane..][..rows.plane];
            let (mean, scale) = (mean[rows.set_of(row)], scale[rows.set_of(row)]);
            let along = sum2(
                x,
                dy,
                #[inline(always)]
                |x, dy| (x - mean) * dy,
            );
            [
                sum(
                    dy,
                    #[inline(always)]
                    |dy| dy,
                ),
                along * scale,
            ]
        });
        let mut d_gamma = vec![0.0; rows.channels];
        let mut d_beta = vec![0.0; rows.channels];
        let mut set_sums = vec![[0.0; 2]; rows.sets()];
        for (row, [plain, along]) in sums.into_iter().enumerate() {
            let (channel, set) = (row % rows.channels, rows.set_of(row));
            d_beta[channel] += plain;
            d_gamma[channel] += along;
            set_sums[set][0] += gammas[channel] * plain;
            set_sums[set][1] += gammas[channel] * along;
        }

        let d_x = wants_x.then(|| {
            let mut d_x = vec![0.0; values.len()];
            if !d_x.is_empty() {
                let len = rows.set_len() as f32;
                let inputs = values.par_chunks(rows.plane).zip(upstream.par_chunks(rows.plane));
                let out = d_x.par_chunks_mut(rows.plane).zip(inputs).with_min_len(rows.min_len());
                out.enumerate().for_each(|(row, (d_x, (x, dy)))| {
                    let set = rows.set_of(row);
                    let (mean, scale, gamma) = (mean[set], scale[set], gammas[row % rows.channels]);
                    // Statistics that are constants do not pull back.
                    let [plain, along] = match self.sets {
                        Sets::Channels { given: true } => [0.0; 2],
                        _ => set_sums[set].map(|sum| sum / len * scale),
                    };
                    let (factor, along) = (gamma * scale, along * scale);
                    simd(
                        #[inline(always)]
                        || {
                            for ((d_x, x), dy) in d_x.iter_mut().zip(x).zip(dy) {
                                *d_x = fma(*dy, factor, -fma(x - mean, along, plain));
                            }
                        },
                    );
                });
            }
            tensor(d_x, x.layout().shape().clone())
        });
        let per_channel = |values: Vec<f32>| Some(tensor(values, [rows.channels]));
        [d_x, per_channel(d_gamma), per_channel(d_beta), None]
    }
}
