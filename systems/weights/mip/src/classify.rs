//! Classification under a condition: one network for every rotation, smoothing or decay, or a distribution of networks.

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use clap::ValueEnum;
use kiln_core::{Context, Result};
use kiln_data::Images;
use kiln_nn::{Task, likeliest};
use kiln_ops::{CrossEntropyOptions, cross_entropy, log_softmax};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::arch::Classifier;
use crate::batched;
use crate::convert::MipHyper;

/// Images that pass through a network at once when nothing is learned.
const AT_ONCE: usize = 256;

/// What a condition means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Control {
    /// The image is turned by 90 γ degrees
    Rotation,
    /// Labels are smoothed by γ / 2
    Smoothing,
    /// Hidden units are dropped in training with a probability of γ / 2
    Dropout,
    /// Weights decay with a strength of 10^(4 γ - 6), from 1e-6 to 1e-2
    WeightDecay,
    /// Nothing: networks are drawn with γ, and a prior on their weights keeps them apart from certainty
    Noise,
    /// What a table says of each image, such as where it was taken
    #[value(skip)]
    Given,
}

/// How conditions are drawn in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Sampling {
    /// Evenly between 0 and 1
    Uniform,
    /// So that small ones are as frequent as large ones: their logarithms evenly from 0.001 to 1
    Log,
    /// Evenly, but every fourth component is 0 or 1
    Edges,
    /// Tenths
    Grid,
}

impl Sampling {
    /// Draws a condition of `k` components.
    pub fn draw(self, k: usize, rng: &mut impl Rng) -> Vec<f32> {
        let mut component = || match self {
            Self::Uniform => rng.random(),
            Self::Log => 10f32.powf(-3.0 * rng.random::<f32>()),
            Self::Edges if rng.random_range(0..4) == 0 => rng.random_range(0..=1) as f32,
            Self::Edges => rng.random(),
            Self::Grid => rng.random_range(0..=10) as f32 / 10.0,
        };
        (0..k).map(|_| component()).collect()
    }
}

/// Deviation of the prior on weights under [`Control::Noise`].
const PRIOR_STD: f64 = 1.0;

/// What is trained on, and how.
pub struct ClassifyTask<'a> {
    /// Training images.
    pub train: &'a Images,
    /// Held out.
    pub valid: &'a Images,
    /// What a condition means.
    pub control: Control,
    /// How it is drawn.
    pub sampling: Sampling,
    /// Its components.
    pub gamma_dim: usize,
    /// Images of a step.
    pub batch: usize,
    /// Whether every image has a condition of its own; otherwise those of a step share one.
    pub per_sample: bool,
    /// Under [`Control::Given`], the conditions of the images: every image has its own.
    pub given: Option<Given>,
    /// Device and random streams.
    pub cx: &'a Context,
}

/// Conditions of images, `[image][component]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Given {
    /// Of the training images.
    pub train: Vec<Vec<f32>>,
    /// Of those held out.
    pub valid: Vec<Vec<f32>>,
}

impl ClassifyTask<'_> {
    /// The loss of one network on images under the condition that made it.
    fn objective(&self, theta: &Tensor<2>, net: &Classifier, images: &Images, gamma: f32) -> Tensor<1> {
        let labels = labels(images, &self.cx.device);
        let mut options = CrossEntropyOptions::default();
        if self.control == Control::Smoothing {
            options.label_smoothing = gamma / 2.0;
        }
        let input = self.control.input(images, gamma, &self.cx.device);
        let logits = match self.control {
            Control::Dropout => net.forward_dropping(input, f64::from(gamma) / 2.0),
            _ => net.forward(input),
        };
        let loss = cross_entropy(logits, labels, &options).mean();
        let penalty = |strength: f64| theta.clone().powi_scalar(2).sum() * strength;
        match self.control {
            Control::WeightDecay | Control::Noise => loss + penalty(f64::from(self.decay(gamma))),
            Control::Rotation | Control::Smoothing | Control::Dropout | Control::Given => loss,
        }
    }

    /// What the squares of the weights count under a condition.
    fn decay(&self, gamma: f32) -> f32 {
        match self.control {
            Control::WeightDecay => 10f32.powf(4.0 * gamma - 6.0),
            Control::Noise => (0.5 / (PRIOR_STD * PRIOR_STD * self.train.len() as f64)) as f32,
            Control::Rotation | Control::Smoothing | Control::Dropout | Control::Given => 0.0,
        }
    }

    /// The mean loss of images, each by a network under a condition of its own; as [`objective`](Self::objective) for each.
    fn objective_each(
        &self,
        model: &MipHyper<Classifier>,
        images: &Images,
        gammas: &[Vec<f32>],
    ) -> Result<Tensor<1>> {
        let device = &self.cx.device;
        let count = gammas.len();
        let values: Vec<f32> = gammas.iter().flatten().copied().collect();
        let conditions = Tensor::from_data(TensorData::new(values, [count, self.gamma_dim]), device);
        let theta = model.generate(conditions)?;
        let inputs =
            (0..count).map(|i| self.control.input(&images.select(&[i]), gammas[i][0], device)).collect();
        let log = log_softmax(batched::forward(model, &theta, Tensor::cat(inputs, 0))?, 1);
        let share = |value: &dyn Fn(f32) -> f32| {
            let values: Vec<f32> = gammas.iter().map(|gamma| value(gamma[0])).collect();
            Tensor::<2>::from_data(TensorData::new(values, [count, 1]), device)
        };
        let smoothing = share(&|gamma| if self.control == Control::Smoothing { gamma / 2.0 } else { 0.0 });
        let right = log.clone().gather(1, labels(images, device).unsqueeze_dim::<2>(1));
        let nll = right * (smoothing.clone() - 1.0) - log.mean_dim(1) * smoothing;
        let loss = nll.mean();
        Ok(match self.control {
            Control::WeightDecay | Control::Noise => {
                loss + (theta.powi_scalar(2).sum_dim(1) * share(&|gamma| self.decay(gamma))).mean()
            }
            Control::Rotation | Control::Smoothing | Control::Dropout | Control::Given => loss,
        })
    }
}

impl Control {
    /// Images as the network sees them, `[images, channels, height, width]`.
    pub fn input(self, images: &Images, gamma: f32, device: &Device) -> Tensor<4> {
        let [channels, height, width] = images.shape;
        let pixels = match self {
            Self::Rotation => rotated(images, gamma),
            _ => images.pixels.clone(),
        };
        Tensor::from_data(TensorData::new(pixels, [images.len(), channels, height, width]), device)
    }
}

/// Classes as a tensor, `[images]`.
pub fn labels(images: &Images, device: &Device) -> Tensor<1, Int> {
    let labels: Vec<i64> = images.labels.iter().map(|&label| label as i64).collect();
    Tensor::from_data(TensorData::new(labels, [images.len()]), device)
}

/// Images turned by 90 γ degrees about their centre, bilinearly; beyond the border they are black.
pub fn rotated(images: &Images, gamma: f32) -> Vec<f32> {
    let [_, height, width] = images.shape;
    let (sin, cos) = (gamma * std::f32::consts::FRAC_PI_2).sin_cos();
    let (cx, cy) = ((width as f32 - 1.0) / 2.0, (height as f32 - 1.0) / 2.0);
    let mut turned = Vec::with_capacity(images.pixels.len());
    for plane in images.pixels.chunks(height * width) {
        let at = |x: f32, y: f32| {
            let inside = x >= 0.0 && y >= 0.0 && x < width as f32 && y < height as f32;
            if inside { plane[y as usize * width + x as usize] } else { 0.0 }
        };
        for row in 0..height {
            for column in 0..width {
                let (dx, dy) = (column as f32 - cx, row as f32 - cy);
                let (x, y) = (cos * dx + sin * dy + cx, -sin * dx + cos * dy + cy);
                let (left, top) = (x.floor(), y.floor());
                let (right_share, low_share) = (x - left, y - top);
                let above = at(left, top) * (1.0 - right_share) + at(left + 1.0, top) * right_share;
                let below =
                    at(left, top + 1.0) * (1.0 - right_share) + at(left + 1.0, top + 1.0) * right_share;
                turned.push(above * (1.0 - low_share) + below * low_share);
            }
        }
    }
    turned
}

impl Task<MipHyper<Classifier>> for ClassifyTask<'_> {
    fn loss(&mut self, model: &MipHyper<Classifier>, step: usize) -> Result<(Tensor<1>, usize)> {
        let mut rng = self.cx.rng("step", step as u64);
        let gamma = self.sampling.draw(self.gamma_dim, &mut rng);
        let chosen: Vec<usize> = (0..self.batch).map(|_| rng.random_range(0..self.train.len())).collect();
        let images = self.train.select(&chosen);
        if let Some(given) = &self.given {
            let gammas: Vec<Vec<f32>> = chosen.iter().map(|&image| given.train[image].clone()).collect();
            return Ok((self.objective_each(model, &images, &gammas)?, self.batch));
        }
        if self.per_sample {
            let gammas: Vec<Vec<f32>> =
                (0..self.batch).map(|_| self.sampling.draw(self.gamma_dim, &mut rng)).collect();
            return Ok((self.objective_each(model, &images, &gammas)?, self.batch));
        }
        let condition = Tensor::<1>::from_floats(gamma.as_slice(), &self.cx.device);
        let theta = model.generate(condition.unsqueeze_dim::<2>(0))?;
        let net = model.spec().split(theta.clone().squeeze_dim::<1>(0))?.fill(&model.base)?;
        Ok((self.objective(&theta, &net, &images, gamma[0]), self.batch))
    }

    fn validate(&mut self, model: &MipHyper<Classifier>) -> Result<f64> {
        if let Some(given) = &self.given {
            let probabilities = predict_each(model, self.control, self.valid, &given.valid, self.cx)?;
            return Ok(scores(&probabilities, &self.valid.labels).nll);
        }
        let mut sum = 0.0;
        let conditions = [0.0, 0.25, 0.5, 0.75, 1.0];
        for gamma in conditions {
            let probabilities =
                predict(model, self.control, self.valid, &vec![gamma; self.gamma_dim], self.cx)?;
            sum += scores(&probabilities, &self.valid.labels).nll / conditions.len() as f64;
        }
        Ok(sum)
    }

    fn settings(&self) -> Map<String, Value> {
        let settings = json!({
            "batch": self.batch, "images": self.train.len(), "control": self.control, "sampling": self.sampling,
        });
        let mut settings = settings.as_object().cloned().unwrap_or_default();
        if self.per_sample {
            settings.insert("per_sample".into(), true.into());
        }
        if self.given.is_some() {
            settings.insert("given".into(), true.into());
        }
        settings
    }
}

/// Class probabilities of images under one condition, `[image][class]`.
///
/// # Errors
/// As [`MipHyper::instantiate`].
pub fn predict(
    model: &MipHyper<Classifier>,
    control: Control,
    images: &Images,
    gamma: &[f32],
    cx: &Context,
) -> Result<Vec<Vec<f32>>> {
    let net = model.instantiate(Tensor::<1>::from_floats(gamma, &cx.device))?;
    let mut all = Vec::with_capacity(images.len());
    let indices: Vec<usize> = (0..images.len()).collect();
    for chunk in indices.chunks(AT_ONCE) {
        let logits = net.forward(control.input(&images.select(chunk), gamma[0], &cx.device));
        let classes = logits.dims()[1];
        let values: Vec<f32> = activation::softmax(logits, 1).into_data().iter().collect();
        all.extend(values.chunks(classes).map(<[f32]>::to_vec));
    }
    Ok(all)
}

/// Class probabilities of images, each under a condition of its own; images with the same condition share a network.
///
/// # Errors
/// As [`MipHyper::instantiate`].
pub fn predict_each(
    model: &MipHyper<Classifier>,
    control: Control,
    images: &Images,
    gammas: &[Vec<f32>],
    cx: &Context,
) -> Result<Vec<Vec<f32>>> {
    let mut groups: BTreeMap<Vec<u32>, Vec<usize>> = BTreeMap::new();
    for (image, gamma) in gammas.iter().enumerate() {
        groups.entry(gamma.iter().map(|x| x.to_bits()).collect()).or_default().push(image);
    }
    let mut all = vec![Vec::new(); images.len()];
    let bar = cx.progress(groups.len() as u64, "predicting");
    for places in groups.values() {
        let found = predict(model, control, &images.select(places), &gammas[places[0]], cx)?;
        for (&place, row) in places.iter().zip(found) {
            all[place] = row;
        }
        bar.inc(1);
    }
    Ok(all)
}

/// Mean class probabilities over `draws` networks: the predictive distribution under [`Control::Noise`].
///
/// # Errors
/// As [`predict`].
pub fn predict_mean(
    model: &MipHyper<Classifier>,
    images: &Images,
    gamma_dim: usize,
    draws: usize,
    cx: &Context,
) -> Result<Vec<Vec<f32>>> {
    let mut rng = cx.rng("networks", 0);
    let mut mean: Vec<Vec<f32>> = Vec::new();
    for _ in 0..draws {
        let gamma = Sampling::Uniform.draw(gamma_dim, &mut rng);
        let one = predict(model, Control::Noise, images, &gamma, cx)?;
        mean.resize(one.len(), vec![0.0; one.first().map_or(0, Vec::len)]);
        for (sum, row) in mean.iter_mut().zip(&one) {
            sum.iter_mut().zip(row).for_each(|(sum, p)| *sum += p / draws as f32);
        }
    }
    Ok(mean)
}

/// How well probabilities agree with labels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    /// Share of images whose likeliest class is right.
    pub accuracy: f64,
    /// Mean negative log-likelihood of the labels, in nats.
    pub nll: f64,
    /// Expected calibration error over 15 bins of confidence.
    pub ece: f64,
    /// Mean entropy of the probabilities, in nats.
    pub entropy: f64,
}

/// Compares probabilities with labels.
pub fn scores(probabilities: &[Vec<f32>], labels: &[usize]) -> Scores {
    let count = labels.len() as f64;
    let mut bins = [(0.0, 0.0); 15];
    let (mut right, mut nll, mut entropy) = (0.0, 0.0, 0.0);
    for (row, &label) in probabilities.iter().zip(labels) {
        let best = likeliest(row);
        let (confidence, hit) = (f64::from(row[best]), f64::from(u8::from(best == label)));
        right += hit;
        nll -= f64::from(row[label]).max(f64::MIN_POSITIVE).ln();
        entropy -= row.iter().map(|&p| f64::from(p)).filter(|p| *p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        let bin = &mut bins[((confidence * 15.0) as usize).min(14)];
        bin.0 += confidence;
        bin.1 += hit;
    }
    let ece = bins.iter().map(|(confidence, hits)| (confidence - hits).abs()).sum::<f64>() / count;
    Scores { accuracy: right / count, nll: nll / count, ece, entropy: entropy / count }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(pixels: &[f32], side: usize) -> Images {
        Images {
            shape: [1, side, side],
            pixels: pixels.to_vec(),
            labels: vec![0],
            classes: vec!["a".into()],
            white: 1.0,
        }
    }

    #[test]
    fn a_quarter_turn_moves_pixels_and_no_turn_leaves_them() {
        let pixels = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
        let close = |found: Vec<f32>, expected: [f32; 9]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?}");
        };
        close(rotated(&image(&pixels, 3), 0.0), pixels);
        close(rotated(&image(&pixels, 3), 1.0), [7.0, 4.0, 1.0, 8.0, 5.0, 2.0, 9.0, 6.0, 3.0]);
    }

    #[test]
    fn one_condition_for_all_images_is_the_same_condition_for_each() {
        use crate::arch::{Arch, ClassifierConfig};
        use crate::hypernet::Nonlinearity;
        let cx = Context::for_tests("unused");
        let pixels: Vec<f32> = (0..27).map(|i| (i % 7) as f32 / 7.0).collect();
        let images = Images { labels: vec![0, 1, 0], ..image(&pixels, 3) };
        let config = ClassifierConfig {
            arch: Arch::Mlp(vec![4]),
            image: [1, 3, 3],
            classes: 2,
            activation: Nonlinearity::LeakyRelu,
            batch_norm: false,
        };
        let hyper = crate::MipConfig::new(1);
        let model = hyper.draw(config.init(&cx.device), &mut cx.rng("init", 0), &cx.device).unwrap();
        for control in [Control::Rotation, Control::Smoothing, Control::WeightDecay, Control::Noise] {
            let task = ClassifyTask {
                train: &images,
                valid: &images,
                control,
                sampling: Sampling::Uniform,
                gamma_dim: 1,
                batch: 3,
                per_sample: true,
                given: None,
                cx: &cx,
            };
            let each = task.objective_each(&model, &images, &vec![vec![0.7]; 3]).unwrap();
            let theta = model.generate(Tensor::from_floats([[0.7]], &cx.device)).unwrap();
            let net = model.instantiate(Tensor::from_floats([0.7], &cx.device)).unwrap();
            let shared = task.objective(&theta, &net, &images, 0.7);
            let (each, shared) = (each.into_scalar::<f32>(), shared.into_scalar::<f32>());
            assert!((each - shared).abs() < 1e-4, "{control:?}: {each} {shared}");
        }
    }

    #[test]
    fn images_under_conditions_of_their_own_are_predicted_as_each_alone() {
        use crate::arch::{Arch, ClassifierConfig};
        use crate::hypernet::Nonlinearity;
        let cx = Context::for_tests("unused");
        let pixels: Vec<f32> = (0..36).map(|i| (i % 7) as f32 / 7.0).collect();
        let images = Images { labels: vec![0, 1, 0, 1], ..image(&pixels, 3) };
        let config = ClassifierConfig {
            arch: Arch::Mlp(vec![4]),
            image: [1, 3, 3],
            classes: 2,
            activation: Nonlinearity::LeakyRelu,
            batch_norm: false,
        };
        let mut hyper = crate::MipConfig::new(2);
        hyper.hypernet.categories = vec![3, 0];
        let model = hyper.draw(config.init(&cx.device), &mut cx.rng("init", 0), &cx.device).unwrap();
        let gammas = [vec![0.0, 0.3], vec![2.0, 0.3], vec![0.0, 0.3], vec![1.0, 0.9]];
        let together = predict_each(&model, Control::Given, &images, &gammas, &cx).unwrap();
        for (place, gamma) in gammas.iter().enumerate() {
            let alone = predict(&model, Control::Given, &images.select(&[place]), gamma, &cx).unwrap();
            let apart = alone[0].iter().zip(&together[place]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-6, "{place}: {apart}");
        }
        assert_ne!(together[0], together[1]);
    }

    #[test]
    fn scores_by_hand() {
        let found = scores(&[vec![0.8, 0.2], vec![0.4, 0.6]], &[0, 0]);
        assert_eq!(found.accuracy, 0.5);
        assert!((found.nll + (0.8f64.ln() + 0.4f64.ln()) / 2.0).abs() < 1e-6);
        // Confidences 0.8 (right) and 0.6 (wrong) are in bins of their own.
        assert!((found.ece - (0.2 + 0.6) / 2.0).abs() < 1e-6);
        assert_eq!(scores(&[vec![1.0, 0.0]], &[0]).entropy, 0.0);
    }

    #[test]
    fn conditions_stay_within_their_cube() {
        let mut rng = kiln_core::random_stream(0, "test", 0);
        for sampling in [Sampling::Uniform, Sampling::Log, Sampling::Edges, Sampling::Grid] {
            let draws = sampling.draw(1000, &mut rng);
            assert!(draws.iter().all(|g| (0.0..=1.0).contains(g)), "{sampling:?}");
        }
    }
}
