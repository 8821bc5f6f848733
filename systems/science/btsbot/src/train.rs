//! What networks learn, and what they say of alerts.

use burn::tensor::{Tensor, TensorData};
use kiln_core::{Context, Error, Result};
use kiln_nn::{Task, TrainConfig};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::augment::Dihedral;
use crate::dataset::Dataset;
use crate::model::MmCnn;

/// The paper's learning rate,
pub const LEARNING_RATE: f64 = 1e-4;
/// how much of the running means of gradients and their squares each step keeps,
pub const BETAS: (f64, f64) = (0.99, 0.99);
/// alerts of a step,
pub const BATCH: usize = 64;
/// the most alerts of a source,
pub const MOST_ALERTS: usize = 100;
/// and shares of the sources to train on, to validate with and to test.
pub const SHARES: [f64; 3] = [0.81, 0.09, 0.10];

/// Learning from alerts: binary cross-entropy, in which alerts of bright transients weigh as much as all others.
pub struct AlertTask<'a> {
    /// Stamps and features.
    pub data: &'a Dataset,
    /// Alerts to learn from,
    pub train: &'a [usize],
    /// and to validate with.
    pub valid: &'a [usize],
    /// Alerts of a step.
    pub batch: usize,
    /// The weight of an alert of a bright transient; others weigh 1.
    pub positive_weight: f64,
    /// Device and random streams.
    pub cx: &'a Context,
    /// How often a score of 0.5 decides rightly, at every validation.
    pub accuracies: Vec<Accuracy>,
    /// Alerts seen since the last one, and those of them that were decided rightly.
    seen: [usize; 2],
    /// Steps so far.
    steps: usize,
    /// The epoch, and the order of its alerts.
    order: Option<(usize, Vec<usize>)>,
}

/// Shares of alerts that are decided rightly at a score of 0.5.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// After which step.
    pub step: usize,
    /// Of the alerts learned from since the validation before, with dropout.
    pub accuracy: f64,
    /// Of those to validate with.
    pub val_accuracy: f64,
}

impl<'a> AlertTask<'a> {
    /// A task in which classes are balanced.
    ///
    /// # Errors
    /// When a class or the alerts to validate with are missing.
    pub fn new(
        data: &'a Dataset,
        train: &'a [usize],
        valid: &'a [usize],
        batch: usize,
        cx: &'a Context,
    ) -> Result<Self> {
        let positives = train.iter().filter(|&&alert| data.about[alert].label == Some(true)).count();
        let negatives = train.len() - positives;
        if positives == 0 || negatives == 0 {
            return Err(Error::usage(format!(
                "of the alerts to learn from, {positives} are of bright transients and {negatives} of others"
            ))
            .hint("both classes are needed"));
        }
        if valid.is_empty() {
            return Err(Error::usage("no alerts are left to validate with")
                .hint("give more sources, or --val-triplets and --val-candidates"));
        }
        let positive_weight = negatives as f64 / positives as f64;
        let (accuracies, seen) = (Vec::new(), [0; 2]);
        Ok(Self { data, train, valid, batch, positive_weight, cx, accuracies, seen, steps: 0, order: None })
    }

    /// Steps that go through all alerts once; those that fill no batch are left out.
    pub fn steps_per_epoch(&self) -> usize {
        (self.train.len() / self.batch).max(1)
    }

    /// The alerts of a step: every epoch goes through all in an order of its own.
    fn chosen(&mut self, step: usize) -> Vec<usize> {
        let per_epoch = self.steps_per_epoch();
        let epoch = step / per_epoch;
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let mut order = self.train.to_vec();
            order.shuffle(&mut self.cx.rng("epoch", epoch as u64));
            self.order = Some((epoch, order));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        let from = step % per_epoch * self.batch;
        order[from..order.len().min(from + self.batch)].to_vec()
    }

    fn labels(&self, chosen: &[usize]) -> Vec<bool> {
        chosen.iter().map(|&alert| self.data.about[alert].label == Some(true)).collect()
    }
}

/// How many logits are above 0 where the label says so, and not where it does not.
fn decided_rightly(logits: Tensor<2>, labels: &[bool]) -> usize {
    let logits: Vec<f32> = logits.into_data().iter().collect();
    logits.iter().zip(labels).filter(|(logit, label)| (**logit > 0.0) == **label).count()
}

/// The mean over alerts of `−w y log σ(z) − (1 − y) log(1 − σ(z))`.
///
/// # Shapes
/// - logits, z: `[batch, 1]`
pub fn weighted_loss(logits: Tensor<2>, labels: &[bool], positive_weight: f64) -> Tensor<1> {
    let device = logits.device();
    let column = |of: [f32; 2]| {
        let values: Vec<f32> = labels.iter().map(|&label| of[usize::from(label)]).collect();
        Tensor::<2>::from_data(TensorData::new(values, [labels.len(), 1]), &device)
    };
    // −log σ(±z) = max(∓z, 0) + log(1 + exp(−|z|)) never overflows.
    let turned = logits * column([1.0, -1.0]);
    let loss = turned.clone().clamp_min(0.0) + (-turned.abs()).exp().log1p();
    (loss * column([1.0, positive_weight as f32])).mean()
}

impl Task<MmCnn> for AlertTask<'_> {
    fn loss(&mut self, model: &MmCnn, step: usize) -> Result<(Tensor<1>, usize)> {
        let chosen = self.chosen(step);
        let mut rng = self.cx.rng("augment", step as u64);
        let transforms: Vec<Dihedral> = chosen.iter().map(|_| Dihedral::draw(&mut rng)).collect();
        // The batch norm takes the statistics of a batch that is on an autodiff device.
        let (images, features) = self.data.tensors(&chosen, transforms, &self.cx.device.clone().autodiff());
        let (logits, labels) = (model.forward(images, features), self.labels(&chosen));
        self.seen[0] += chosen.len();
        self.seen[1] += decided_rightly(logits.clone(), &labels);
        self.steps = step + 1;
        Ok((weighted_loss(logits, &labels, self.positive_weight), chosen.len()))
    }

    fn validate(&mut self, model: &MmCnn) -> Result<f64> {
        let (mut sum, mut right) = (0.0, 0);
        for chosen in self.valid.chunks(AT_ONCE) {
            let (images, features) = self.data.tensors(chosen, plain(), &self.cx.device);
            let (logits, labels) = (model.forward(images, features), self.labels(chosen));
            right += decided_rightly(logits.clone(), &labels);
            let loss = weighted_loss(logits, &labels, self.positive_weight);
            sum += f64::from(loss.into_scalar::<f32>()) * chosen.len() as f64;
        }
        let [seen, well] = std::mem::take(&mut self.seen);
        self.accuracies.push(Accuracy {
            step: self.steps,
            accuracy: well as f64 / seen.max(1) as f64,
            val_accuracy: right as f64 / self.valid.len() as f64,
        });
        Ok(sum / self.valid.len() as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = Map::new();
        settings.insert("batch".into(), self.batch.into());
        settings.insert("alerts".into(), self.train.len().into());
        settings.insert("positive_weight".into(), self.positive_weight.into());
        settings
    }
}

/// Alerts that pass through a network at once where nothing is learned.
const AT_ONCE: usize = 256;

/// No transform.
fn plain() -> impl Iterator<Item = Dihedral> {
    std::iter::repeat(Dihedral::default())
}

/// The paper's training for so many steps, but for the schedule: the learning rate stays.
pub fn training(steps: usize, lr: f64) -> TrainConfig {
    TrainConfig {
        steps,
        lr,
        warmup: 0,
        min_lr_ratio: 1.0,
        betas: BETAS,
        weight_decay: 0.0,
        clip_norm: 0.0,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    }
}

/// The score of every chosen alert. `temperature` divides logits; 1 leaves them.
///
/// # Errors
/// When a score is no number, or the user stopped.
pub fn predict(
    model: &MmCnn,
    data: &Dataset,
    chosen: &[usize],
    temperature: f64,
    cx: &Context,
) -> Result<Vec<f64>> {
    let mut scores = Vec::with_capacity(chosen.len());
    let bar = cx.progress(chosen.len() as u64, "scoring alerts");
    for part in chosen.chunks(AT_ONCE) {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before all alerts were scored"));
        }
        let (images, features) = data.tensors(part, plain(), &cx.device);
        let logits: Vec<f32> = model.forward(images, features).into_data().iter().collect();
        for (logit, &alert) in logits.into_iter().zip(part) {
            if !logit.is_finite() {
                let about = &data.about[alert];
                return Err(Error::work(format!(
                    "the network's output for alert {} is {logit}",
                    about.candid
                ))
                .hint("are the weights damaged, or a feature far beyond what they were trained on?"));
            }
            scores.push(1.0 / (1.0 + (-f64::from(logit) / temperature).exp()));
        }
        bar.inc(part.len() as u64);
    }
    Ok(scores)
}

/// What the last layer sees of every chosen alert.
pub fn embed(model: &MmCnn, data: &Dataset, chosen: &[usize], cx: &Context) -> Vec<Vec<f32>> {
    let mut rows = Vec::with_capacity(chosen.len());
    for part in chosen.chunks(AT_ONCE) {
        let (images, features) = data.tensors(part, plain(), &cx.device);
        let embedded = model.embed(Some(images), Some(features));
        let [_, width] = embedded.dims();
        let values: Vec<f32> = embedded.into_data().iter().collect();
        rows.extend(values.chunks(width).map(<[f32]>::to_vec));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Module;
    use burn::tensor::Device;
    use kiln_core::{HostTensor, TensorFile};
    use rand::RngExt;

    use crate::checkpoint::new_model;
    use crate::model::MmCnnConfig;

    #[test]
    fn the_weighted_loss_equals_a_computation_by_hand_also_far_from_zero() {
        let logits = [0.3f32, -1.2, 80.0, -90.0];
        let labels = [true, false, false, true];
        let by_hand = |z: f64, label: bool| {
            let p = 1.0 / (1.0 + (-z).exp());
            if label { -3.0 * p.ln() } else { -(1.0 - p).ln() }
        };
        let expected = (by_hand(0.3f32.into(), true) + by_hand((-1.2f32).into(), false) + 80.0 + 270.0) / 4.0;
        let tensor = Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [4, 1]), &Device::flex());
        let found = f64::from(weighted_loss(tensor, &labels, 3.0).into_scalar::<f32>());
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        // Small, so that few maxima and signs change on the way.
        const STEP: f32 = 2e-3;
        let cx = Context::for_tests("unused");
        let config = MmCnnConfig { kernel: 3, ..MmCnnConfig::new().with_channels([2, 8]).with_side(9) };
        let plain = MmCnnConfig {
            conv_dropout: [0.0; 2],
            meta_dropout: 0.0,
            head_dropout: 0.0,
            meta_hidden: [4, 4],
            head_hidden: vec![16],
            ..config
        };
        let model = new_model(&plain, &cx);
        let mut rng = cx.rng("input", 0);
        let mut random =
            |count: usize| (0..count).map(|_| rng.random_range(-2.0..2.0f32)).collect::<Vec<_>>();
        let images = TensorData::new(random(2 * 3 * 81), [2, 3, 9, 9]);
        let meta = TensorData::new(random(50), [2, 25]);
        let labels = [true, false];
        // Constants of the graph: statistics are the running ones, in both.
        let loss = |model: &MmCnn| {
            let images = Tensor::from_data(images.clone(), &cx.device);
            let meta = Tensor::from_data(meta.clone(), &cx.device);
            weighted_loss(model.forward(images, meta), &labels, 2.0)
        };
        let training = model.clone().train();
        let gradients = loss(&training).backward();
        let weight = |model: &MmCnn| model.conv1.as_ref().map(|conv| conv.weight.val());
        let gradient: Vec<f32> = weight(&training)
            .and_then(|w| w.grad(&gradients))
            .map(|g| g.into_data().iter().collect())
            .unwrap_or_default();
        let weights: Vec<f32> = weight(&model).map(|w| w.into_data().iter().collect()).unwrap_or_default();
        assert!(gradient.iter().any(|g| g.abs() > 1e-4), "{gradient:?}");
        let scale = gradient.iter().fold(0.0f32, |most, g| most.max(g.abs()));
        let with = |at: usize, step: f32| {
            let mut weights = weights.clone();
            weights[at] += step;
            let mut file = TensorFile::from_module(&model);
            file.insert("conv1.weight", HostTensor::float([2, 3, 3, 3], weights));
            let moved = file.into_module(model.clone()).unwrap();
            loss(&moved).into_scalar::<f32>()
        };
        for (at, &expected) in gradient.iter().enumerate() {
            let found = (with(at, STEP) - with(at, -STEP)) / (2.0 * STEP);
            assert!((found - expected).abs() < 0.05 * scale, "{at}: {found}, not {expected}");
        }
    }
}
