//! On what a decision rests: class activation maps.
//!
//! Both methods weigh the last activations `A_k` of a network. Grad-CAM (Selvaraju et al. 2017) takes for weights how much
//! the class's logit grows with each; Score-CAM (Wang et al. 2020), the paper's method, how much the class's probability
//! grows when only what a map covers is left of the image.

use burn::tensor::{Device, Tensor, TensorData, activation};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use serde::Serialize;

use crate::bilinear::{resize, resize_plane};
use crate::masks::Mask;
use crate::networks::{Classifier, freeze};

/// Masked images that a network sees at once.
const BATCH: usize = 32;
/// Steps of deletion and insertion.
const STEPS: usize = 20;

/// Whose activations a map of Score-CAM is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// The last convolution's: a 32nd of the image in rows and columns
    #[default]
    Last,
    /// Those in the middle of the network: an eighth
    Middle,
}

/// A map over an image; higher is more important, 0 is not at all.
#[derive(Debug, Clone, PartialEq)]
pub struct Map {
    /// Rows and columns of the activations.
    pub shape: [usize; 2],
    /// `[rows, columns]`, at least 0.
    pub values: Vec<f32>,
}

impl Map {
    /// The positive part of a weighted sum of activations `[channels, rows, columns]`.
    fn weighted(activations: &[f32], weights: &[f32], shape: [usize; 2]) -> Self {
        let plane = shape[0] * shape[1];
        let mut values = vec![0.0; plane];
        for (map, &weight) in activations.chunks(plane).zip(weights) {
            values.iter_mut().zip(map).for_each(|(sum, a)| *sum += weight * a);
        }
        values.iter_mut().for_each(|value| *value = value.max(0.0));
        Self { shape, values }
    }

    /// The mean of maps over images of `size`, each as [`over`](Self::over) draws it; one alone stays as it is.
    ///
    /// # Panics
    /// When there are none.
    pub fn mean(mut maps: Vec<Self>, size: [usize; 2]) -> Self {
        assert!(!maps.is_empty(), "there is no map");
        if maps.len() == 1 {
            return maps.swap_remove(0);
        }
        let mut values = vec![0.0; size[0] * size[1]];
        for map in &maps {
            values.iter_mut().zip(map.over(size)).for_each(|(sum, value)| *sum += value / maps.len() as f32);
        }
        Self { shape: size, values }
    }

    /// Over an image of `size`, from 0 at the lowest to 1 at the highest as the methods' authors draw it; all 0 where the map
    /// is the same everywhere.
    pub fn over(&self, size: [usize; 2]) -> Vec<f32> {
        let mut plane = resize_plane(&self.values, self.shape, size);
        let (low, high) = plane.iter().fold((f32::INFINITY, 0.0f32), |(l, h), &x| (l.min(x), h.max(x)));
        let scale = if high > low { 1.0 / (high - low) } else { 0.0 };
        plane.iter_mut().for_each(|value| *value = (*value - low) * scale);
        plane
    }

    /// Share of the map, as [`over`](Self::over) draws it, inside the lungs; none where it is 0 everywhere.
    pub fn lung_fraction(&self, lungs: &Mask) -> Option<f64> {
        let plane = self.over([lungs.height, lungs.width]);
        let total: f64 = plane.iter().map(|&value| f64::from(value)).sum();
        let inside = plane.iter().zip(&lungs.lung).filter(|(_, lung)| **lung);
        let inside: f64 = inside.map(|(&value, _)| f64::from(value)).sum();
        (total > 0.0).then(|| inside / total)
    }
}

/// Whether an image is the same everywhere, as one is in which no lungs were found.
fn is_blank(x: &Tensor<4>) -> bool {
    let planes = x.clone().flatten::<3>(2, 3);
    (planes.clone().max_dim(2) - planes.min_dim(2)).max().into_scalar::<f32>() == 0.0
}

/// Grad-CAM of one image and class: `ReLU(Σ_k w_k A_k)`, `w_k` the mean of the logit's gradient over map `k`. An image that
/// is the same everywhere has the map 0.
///
/// # Shapes
/// - x: `[1, 3, height, width]`
///
/// # Errors
/// When the network does not depend on its activations.
pub fn grad_cam(network: &Classifier, x: Tensor<4>, class: usize) -> Result<Map> {
    let activations = network.activations(x.clone());
    let [_, channels, rows, columns] = activations.dims();
    // The head alone is differentiated, and computes as it does where nothing learns.
    let leaf = Tensor::<4>::from_data(activations.clone().into_data(), &activations.device().autodiff())
        .require_grad();
    let head = freeze(network.clone(), |_| true);
    let logit = head.head(leaf.clone()).narrow(1, class, 1).sum();
    let gradients = logit.backward();
    let gradient = leaf
        .grad(&gradients)
        .ok_or_else(|| Error::work("the network's output does not depend on its activations"))?;
    let mut weights: Vec<f32> =
        gradient.reshape([channels, rows * columns]).mean_dim(1).into_data().iter().collect();
    if is_blank(&x) {
        weights.fill(0.0);
    }
    let values: Vec<f32> = activations.into_data().iter().collect();
    Ok(Map::weighted(&values, &weights, [rows, columns]))
}

/// What Score-CAM found.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreCam {
    /// The map.
    pub map: Map,
    /// The activation maps that it is made of.
    pub channels: Vec<usize>,
    /// What each adds to the probability of the class.
    pub scores: Vec<f32>,
}

/// Score-CAM of one image and class, of all activation maps or the `most` that vary most over the image. An image that is the
/// same everywhere has the map 0.
///
/// # Shapes
/// - x: `[1, 3, height, width]`
pub fn score_cam(
    network: &Classifier,
    x: Tensor<4>,
    class: usize,
    layer: Layer,
    most: Option<usize>,
) -> ScoreCam {
    let activations = match layer {
        Layer::Last => network.activations(x.clone()),
        Layer::Middle => network.middle(x.clone()),
    };
    let [_, channels, rows, columns] = activations.dims();
    let mut chosen: Vec<usize> = (0..channels).collect();
    if let Some(most) = most.filter(|&most| most < channels) {
        let values: Vec<f32> = activations.clone().into_data().iter().collect();
        let spread = |channel: usize| variance(&values[channel * rows * columns..][..rows * columns]);
        chosen.sort_by(|&a, &b| spread(b).total_cmp(&spread(a)));
        chosen.truncate(most);
        chosen.sort_unstable();
    }
    score_cam_of(network, x, activations, class, chosen)
}

/// Score-CAM of the given maps of the activations.
///
/// # Shapes
/// - x: `[1, 3, height, width]`
/// - activations: `[1, channels, rows, columns]`
pub fn score_cam_of(
    network: &Classifier,
    x: Tensor<4>,
    activations: Tensor<4>,
    class: usize,
    channels: Vec<usize>,
) -> ScoreCam {
    let [_, all, rows, columns] = activations.dims();
    let [_, _, height, width] = x.dims();
    let plane = rows * columns;
    let device = x.device();
    let values: Vec<f32> = activations.into_data().iter().collect();
    let maps: Vec<f32> =
        channels.iter().flat_map(|&channel| values[channel * plane..][..plane].iter().copied()).collect();
    debug_assert!(channels.iter().all(|&channel| channel < all));
    let baseline = probabilities(network, x.zeros_like(), class)[0];
    let mut scores = Vec::with_capacity(channels.len());
    for maps in maps.chunks(BATCH * plane) {
        let count = maps.len() / plane;
        let maps = Tensor::<4>::from_data(TensorData::new(maps.to_vec(), [count, 1, rows, columns]), &device);
        let covered = x.clone() * unit_range(resize(maps, [height, width]));
        scores.extend(probabilities(network, covered, class).iter().map(|p| p - baseline));
    }
    let weights = if is_blank(&x) { vec![0.0; scores.len()] } else { softmax(&scores) };
    ScoreCam { map: Map::weighted(&maps, &weights, [rows, columns]), channels, scores }
}

/// Every map from 0 to 1; constant ones become 0.
///
/// # Shapes
/// - maps, output: `[count, 1, height, width]`
fn unit_range(maps: Tensor<4>) -> Tensor<4> {
    let [count, _, height, width] = maps.dims();
    let rows = maps.reshape([count, height * width]);
    let (low, high) = (rows.clone().min_dim(1), rows.clone().max_dim(1));
    let span = high - low.clone();
    let is_flat = span.clone().lower_equal_elem(0.0);
    let shown = (rows - low) / span.mask_fill(is_flat.clone(), 1.0);
    let shown = shown * is_flat.bool_not().float();
    shown.reshape([count, 1, height, width])
}

fn probabilities(network: &Classifier, x: Tensor<4>, class: usize) -> Vec<f32> {
    activation::softmax(network.forward(x), 1).narrow(1, class, 1).into_data().iter().collect()
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = scores.iter().map(|s| (s - highest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

fn variance(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / values.len() as f32
}

/// How a class's probability moves as pixels go or come in the order of a map.
#[derive(Debug, Clone, PartialEq)]
pub struct Faithfulness {
    /// Share of the pixels set to 0, most important first, and the probability; falls fast for a faithful map.
    pub deletion: Vec<(f64, f64)>,
    /// Share of the pixels put back into an empty image; rises fast.
    pub insertion: Vec<(f64, f64)>,
}

impl Faithfulness {
    /// Of one image.
    ///
    /// # Shapes
    /// - x: `[1, 3, height, width]`
    pub fn of(network: &Classifier, x: &Tensor<4>, class: usize, map: &Map) -> Self {
        let [_, _, height, width] = x.dims();
        let device: Device = x.device();
        let plane = map.over([height, width]);
        let mut order: Vec<usize> = (0..plane.len()).collect();
        order.sort_by(|&a, &b| plane[b].total_cmp(&plane[a]));
        let mut kept = Vec::new();
        for step in 0..=STEPS {
            let mut mask = vec![0.0f32; plane.len()];
            for &pixel in &order[..plane.len() * step / STEPS] {
                mask[pixel] = 1.0;
            }
            kept.extend(mask);
        }
        let first = Tensor::<4>::from_data(TensorData::new(kept, [STEPS + 1, 1, height, width]), &device);
        let curve = |masks: Tensor<4>| {
            let p = probabilities(network, x.clone() * masks, class);
            p.into_iter().enumerate().map(|(step, p)| (step as f64 / STEPS as f64, p.into())).collect()
        };
        Self { deletion: curve(first.clone().neg() + 1.0), insertion: curve(first) }
    }

    /// The means of curves, step by step.
    pub fn mean(all: &[Self]) -> Option<Self> {
        let first = all.first()?;
        let mean = |of: fn(&Self) -> &Vec<(f64, f64)>| {
            let sum = |step: usize| all.iter().map(|curves| of(curves)[step].1).sum::<f64>();
            let steps = of(first).iter().enumerate();
            steps.map(|(step, &(share, _))| (share, sum(step) / all.len() as f64)).collect()
        };
        Some(Self { deletion: mean(|curves| &curves.deletion), insertion: mean(|curves| &curves.insertion) })
    }

    /// Area under a curve.
    pub fn area(curve: &[(f64, f64)]) -> f64 {
        curve.windows(2).map(|pair| (pair[1].0 - pair[0].0) * (pair[0].1 + pair[1].1) / 2.0).sum()
    }
}
