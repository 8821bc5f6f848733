//! What the networks learn.

use burn::tensor::{Int, Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use kiln_nn::{CrossEntropyLoss, CrossEntropyLossConfig, Decay, Plateau, Task, TrainConfig};
use kiln_ops::{Activation, activate};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::augment::Transform;
use crate::dataset::Images;
use crate::image::zscore;
use crate::masks::Mask;
use crate::networks::{Classifier, UNet};

/// What the loss of an auxiliary classifier counts.
const AUX_WEIGHT: f32 = 0.4;
/// Keeps the Dice loss defined where nothing is lung.
const SMOOTHING: f32 = 1e-6;
/// Images that a network judges at once.
pub const JUDGED: usize = 16;

/// Which images are transformed in training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Augment {
    /// Copies of the rarer class, until both have as many
    #[default]
    Balance,
    /// All, with as many of both classes
    All,
    /// None
    None,
}

/// An image of an epoch, and whether it is transformed.
type Draw = (usize, bool);

/// The images of an epoch.
fn epoch(images: &Images, train: &[usize], augment: Augment) -> Vec<Draw> {
    let mut draws: Vec<Draw> = train.iter().map(|&index| (index, augment == Augment::All)).collect();
    let (tb, normal): (Vec<usize>, Vec<usize>) = train.iter().partition(|&&index| images.is_tb(index));
    let (rare, missing) = if tb.len() < normal.len() {
        (&tb, normal.len() - tb.len())
    } else {
        (&normal, tb.len() - normal.len())
    };
    if augment != Augment::None && !rare.is_empty() {
        draws.extend(rare.iter().cycle().take(missing).map(|&index| (index, true)));
    }
    draws
}

/// Steps that go through all images of an epoch once.
pub fn steps_per_epoch(images: usize, batch: usize) -> usize {
    images.div_ceil(batch).max(1)
}

/// The part of an epoch's order that a step sees; every epoch has an order of its own.
fn step_of<T: Copy>(
    all: &[T],
    step: usize,
    batch: usize,
    kept: &mut Option<(usize, Vec<T>)>,
    cx: &Context,
) -> Vec<T> {
    let per_epoch = steps_per_epoch(all.len(), batch);
    let epoch = step / per_epoch;
    if kept.as_ref().is_none_or(|(of, _)| *of != epoch) {
        let mut order = all.to_vec();
        order.shuffle(&mut cx.rng("epoch", epoch as u64));
        *kept = Some((epoch, order));
    }
    let order = kept.as_ref().map_or(&[][..], |(_, order)| order);
    let from = step % per_epoch * batch;
    order[from..order.len().min(from + batch)].to_vec()
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fall {
    /// Not at all.
    None,
    /// As half a cosine, to a hundredth.
    Cosine,
    /// To a tenth whenever so many validations have not found a lower loss, at most three times.
    OnPlateaus(usize),
}

/// Adam with a learning rate that falls so.
pub fn training(steps: usize, lr: f64, fall: Fall) -> TrainConfig {
    let plateau = match fall {
        Fall::OnPlateaus(patience) => Some(Plateau { factor: 0.1, patience, least: 1e-3 * lr }),
        Fall::None | Fall::Cosine => None,
    };
    TrainConfig {
        steps,
        lr,
        warmup: 0,
        min_lr_ratio: if fall == Fall::Cosine { 0.01 } else { 1.0 },
        plateau,
        decay: Decay::Cosine,
        weight_decay: 0.0,
        clip_norm: 0.0,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    }
}

/// Learning to tell tuberculosis from normal: the cross-entropy of the labels.
pub struct ClassifyTask<'a> {
    images: &'a Images,
    draws: Vec<Draw>,
    valid: &'a [usize],
    batch: usize,
    loss: CrossEntropyLoss,
    augment: Augment,
    class_weights: Option<[f32; 2]>,
    cx: &'a Context,
    order: Option<(usize, Vec<Draw>)>,
}

impl<'a> ClassifyTask<'a> {
    /// Learns from the images `train` and is judged by `valid`. With `weighted`, both classes count the same in the loss.
    pub fn new(
        images: &'a Images,
        [train, valid]: [&'a [usize]; 2],
        batch: usize,
        augment: Augment,
        weighted: bool,
        cx: &'a Context,
    ) -> Self {
        let draws = epoch(images, train, augment);
        let tb = draws.iter().filter(|(index, _)| images.is_tb(*index)).count();
        let share = |count: usize| draws.len() as f32 / (2 * count.max(1)) as f32;
        let class_weights = weighted.then(|| [share(draws.len() - tb), share(tb)]);
        let loss = CrossEntropyLossConfig::new().with_weights(class_weights.map(Vec::from)).init(&cx.device);
        Self { images, draws, valid, batch, loss, augment, class_weights, cx, order: None }
    }

    /// Steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        steps_per_epoch(self.draws.len(), self.batch)
    }

    fn labels(&self, chosen: impl Iterator<Item = usize>) -> Tensor<1, Int> {
        let labels: Vec<i64> = chosen.map(|index| self.images.is_tb(index).into()).collect();
        Tensor::from_data(TensorData::new(labels.clone(), [labels.len()]), &self.cx.device)
    }
}

impl Task<Classifier> for ClassifyTask<'_> {
    fn loss(&mut self, model: &Classifier, step: usize) -> Result<(Tensor<1>, usize)> {
        let chosen = step_of(&self.draws, step, self.batch, &mut self.order, self.cx);
        let mut rng = self.cx.rng("augment", step as u64);
        let planes: Vec<Vec<f32>> = chosen
            .iter()
            .map(|&(index, transformed)| {
                let plane = self.images.plane(index);
                if transformed {
                    Transform::draw(&mut rng).image(&plane, self.images.cxr.size)
                } else {
                    plane
                }
            })
            .collect();
        let x = self.images.cxr.to_tensor(planes.iter().map(Vec::as_slice), &self.cx.device);
        let y = self.labels(chosen.iter().map(|(index, _)| *index));
        let (logits, aux) = model.forward_with_aux(x);
        let mut loss = self.loss.forward(logits, y.clone());
        if let Some(aux) = aux {
            loss = loss + self.loss.forward(aux, y) * AUX_WEIGHT;
        }
        Ok((loss, chosen.len()))
    }

    fn validate(&mut self, model: &Classifier) -> Result<f64> {
        let mut sum = 0.0;
        for chosen in self.valid.chunks(JUDGED) {
            let logits = logits(model, self.images, chosen, self.cx);
            let loss = self.loss.forward(logits, self.labels(chosen.iter().copied()));
            sum += f64::from(loss.into_scalar::<f32>()) * chosen.len() as f64;
        }
        Ok(sum / self.valid.len().max(1) as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = Map::new();
        settings.insert("batch".into(), self.batch.into());
        settings.insert("images".into(), self.draws.len().into());
        settings.insert("augment".into(), json!(self.augment));
        settings.insert("class_weights".into(), json!(self.class_weights));
        settings
    }
}

/// Logits of images, `[chosen, classes]`.
fn logits(model: &Classifier, images: &Images, chosen: &[usize], cx: &Context) -> Tensor<2> {
    let planes: Vec<Vec<f32>> = chosen.iter().map(|&index| images.plane(index)).collect();
    model.forward(images.cxr.to_tensor(planes.iter().map(Vec::as_slice), &cx.device))
}

/// Logits of tuberculosis above those of normal.
///
/// # Errors
/// When the network's output is not a number, or the user stopped.
pub fn judge(model: &Classifier, images: &Images, chosen: &[usize], cx: &Context) -> Result<Vec<f64>> {
    let bar = cx.progress(chosen.len() as u64, "judging images");
    let mut found = Vec::with_capacity(chosen.len());
    for part in chosen.chunks(JUDGED) {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before all images were judged"));
        }
        let rows: Vec<f32> = logits(model, images, part, cx).into_data().iter().collect();
        for row in rows.chunks(2) {
            let margin = f64::from(row[1]) - f64::from(row[0]);
            if !margin.is_finite() {
                return Err(Error::work("the network's output is not a number")
                    .hint("the training that wrote it went wrong"));
            }
            found.push(margin);
        }
        bar.inc(part.len() as u64);
    }
    Ok(found)
}

/// `1 / (1 + e^-margin)`: the probability that a margin between two logits means.
pub fn probability(margin: f64) -> f64 {
    1.0 / (1.0 + (-margin).exp())
}

/// Learning to find lungs: binary cross-entropy and soft Dice.
pub struct SegmentTask<'a> {
    images: &'a Images,
    masks: &'a [Vec<f32>],
    train: &'a [usize],
    valid: &'a [usize],
    batch: usize,
    augment: bool,
    cx: &'a Context,
    order: Option<(usize, Vec<usize>)>,
}

impl<'a> SegmentTask<'a> {
    /// Learns from the images `train` with their masks and is judged by `valid`.
    pub fn new(
        images: &'a Images,
        masks: &'a [Vec<f32>],
        [train, valid]: [&'a [usize]; 2],
        batch: usize,
        augment: bool,
        cx: &'a Context,
    ) -> Self {
        Self { images, masks, train, valid, batch, augment, cx, order: None }
    }

    /// Steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        steps_per_epoch(self.train.len(), self.batch)
    }

    fn tensor(&self, planes: &[Vec<f32>]) -> Tensor<4> {
        let size = self.images.cxr.size;
        Tensor::from_data(TensorData::new(planes.concat(), [planes.len(), 1, size, size]), &self.cx.device)
    }
}

/// `mean(softplus(z) - z y) + 1 - (2 Σ p y + ε) / (Σ p + Σ y + ε)`, `p = σ(z)`.
///
/// # Shapes
/// - logits, truth: `[batch, 1, height, width]`
/// - output: `[1]`
pub fn mask_loss(logits: Tensor<4>, truth: Tensor<4>) -> Tensor<1> {
    let entropy = (activate(logits.clone(), Activation::Softplus) - logits.clone() * truth.clone()).mean();
    let p = activate(logits, Activation::Sigmoid);
    let both = (p.clone() * truth.clone()).sum() * 2.0 + SMOOTHING;
    let dice = both / (p.sum() + truth.sum() + SMOOTHING);
    entropy - dice + 1.0
}

impl Task<UNet> for SegmentTask<'_> {
    fn loss(&mut self, model: &UNet, step: usize) -> Result<(Tensor<1>, usize)> {
        let chosen = step_of(self.train, step, self.batch, &mut self.order, self.cx);
        let mut rng = self.cx.rng("augment", step as u64);
        let size = self.images.cxr.size;
        let (mut planes, mut masks) = (Vec::new(), Vec::new());
        for &index in &chosen {
            let transform = if self.augment { Transform::draw(&mut rng) } else { Transform::NONE };
            planes.push(zscore(&transform.image(&self.images.plane(index), size)));
            masks.push(transform.mask(&self.masks[index], size));
        }
        Ok((mask_loss(model.forward(self.tensor(&planes)), self.tensor(&masks)), chosen.len()))
    }

    fn validate(&mut self, model: &UNet) -> Result<f64> {
        let mut sum = 0.0;
        for chosen in self.valid.chunks(JUDGED) {
            let planes: Vec<Vec<f32>> =
                chosen.iter().map(|&index| zscore(&self.images.plane(index))).collect();
            let masks: Vec<Vec<f32>> = chosen.iter().map(|&index| self.masks[index].clone()).collect();
            let loss = mask_loss(model.forward(self.tensor(&planes)), self.tensor(&masks));
            sum += f64::from(loss.into_scalar::<f32>()) * chosen.len() as f64;
        }
        Ok(sum / self.valid.len().max(1) as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = Map::new();
        settings.insert("batch".into(), self.batch.into());
        settings.insert("images".into(), self.train.len().into());
        settings.insert("augment".into(), self.augment.into());
        settings
    }
}

/// The lungs of images, cleaned up; in the images' square.
///
/// # Errors
/// When the user stopped.
pub fn find_lungs(model: &UNet, images: &Images, chosen: &[usize], cx: &Context) -> Result<Vec<Mask>> {
    let bar = cx.progress(chosen.len() as u64, "finding lungs");
    let size = images.cxr.size;
    let mut found = Vec::with_capacity(chosen.len());
    for part in chosen.chunks(JUDGED) {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before the lungs of all images were found"));
        }
        let planes: Vec<Vec<f32>> = part.iter().map(|&index| zscore(&images.plane(index))).collect();
        let x =
            Tensor::<4>::from_data(TensorData::new(planes.concat(), [part.len(), 1, size, size]), &cx.device);
        let p: Vec<f32> = activate(model.forward(x), Activation::Sigmoid).into_data().iter().collect();
        found.extend(p.chunks(size * size).map(|p| Mask::of(p, [size, size]).cleaned()));
        bar.inc(part.len() as u64);
    }
    Ok(found)
}
