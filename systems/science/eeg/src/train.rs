//! What networks learn, and what they say of windows.

use burn::module::Module;
use burn::tensor::{Tensor, activation};
use kiln_core::{Context, Error, Result};
use kiln_nn::{Task, TrainConfig};
use kiln_ops::log_softmax;
use rand::seq::SliceRandom;
use serde_json::{Map, Value, json};

use crate::augment::Augmentation;
use crate::metrics::WindowOutcome;
use crate::model::Model;
use crate::windows::WindowSet;

/// The paper's learning rate,
pub const LEARNING_RATE: f64 = 6.25e-4;
/// and weight decay.
pub const WEIGHT_DECAY: f64 = 5e-4;

/// A module that can be judged as the network that it makes.
pub trait Classifier: Module {
    /// What the module settled when it was made.
    type Setting;

    /// The network.
    ///
    /// # Errors
    /// When the parts do not fit.
    fn network(&self, setting: &Self::Setting) -> Result<Model>;
}

impl Classifier for Model {
    type Setting = ();

    fn network(&self, (): &()) -> Result<Model> {
        Ok(self.clone())
    }
}

/// Learning from windows: the negative log-likelihood of the mean log-probability over a window's predictions.
pub struct EegTask<'a, M: Classifier = Model> {
    /// To learn from.
    pub train: &'a WindowSet,
    /// To validate with.
    pub valid: &'a WindowSet,
    /// Windows of a step.
    pub batch: usize,
    /// What is done to windows in training.
    pub augment: &'a [Augmentation],
    /// How much a window of each class counts, in the mean 1.
    pub class_weights: [f32; 2],
    /// What makes the network of what is trained.
    pub setting: M::Setting,
    /// Device and random streams.
    pub cx: &'a Context,
    /// The epoch, and the order of its windows.
    order: Option<(usize, Vec<usize>)>,
}

impl<'a, M: Classifier> EegTask<'a, M> {
    /// A task without augmentation, in which all windows count the same.
    pub fn new(
        train: &'a WindowSet,
        valid: &'a WindowSet,
        batch: usize,
        setting: M::Setting,
        cx: &'a Context,
    ) -> Self {
        Self { train, valid, batch, augment: &[], class_weights: [1.0; 2], setting, cx, order: None }
    }

    /// The windows of a step: every epoch goes through all in an order of its own.
    fn chosen(&mut self, step: usize) -> Vec<usize> {
        let per_epoch = steps_per_epoch(self.train.len(), self.batch);
        let epoch = step / per_epoch;
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let mut order: Vec<usize> = (0..self.train.len()).collect();
            order.shuffle(&mut self.cx.rng("epoch", epoch as u64));
            self.order = Some((epoch, order));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        let from = step % per_epoch * self.batch;
        order[from..order.len().min(from + self.batch)].to_vec()
    }
}

/// Steps that go through all windows once.
pub fn steps_per_epoch(windows: usize, batch: usize) -> usize {
    windows.div_ceil(batch).max(1)
}

/// The paper's way to train for `steps`: AdamW, the learning rate falling as half a cosine to 0.
pub fn training(steps: usize, lr: f64) -> TrainConfig {
    TrainConfig {
        steps,
        lr,
        warmup: 0,
        min_lr_ratio: 0.0,
        weight_decay: WEIGHT_DECAY,
        clip_norm: 0.0,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    }
}

/// Weights of the classes by which both count the same.
///
/// # Errors
/// When one has no windows.
pub fn balancing_weights(windows: &WindowSet) -> Result<[f32; 2]> {
    let counts = windows.class_counts();
    if counts.contains(&0) {
        return Err(Error::usage(format!(
            "of the windows to learn from, {counts:?} are normal and pathological"
        ))
        .hint("both classes are needed"));
    }
    Ok(counts.map(|count| windows.len() as f32 / (2 * count) as f32))
}

/// The log-probability of each class, `[batch, classes]`: the mean over a window's predictions.
fn log_probabilities(logits: Tensor<3>) -> Tensor<2> {
    log_softmax(logits, 1).mean_dim(2).squeeze_dim(2)
}

/// The summed, weighted loss of windows and the sum of their weights.
fn loss_of(logits: Tensor<3>, windows: &WindowSet, chosen: &[usize], weights: [f32; 2]) -> (Tensor<1>, f32) {
    let device = logits.device();
    let labels = windows.labels(chosen, &device);
    let each: Vec<f32> = chosen.iter().map(|&window| weights[windows.label(window)]).collect();
    let right: Tensor<1> = log_probabilities(logits).gather(1, labels.unsqueeze_dim(1)).squeeze_dim(1);
    let total = each.iter().sum();
    ((right * Tensor::from_floats(each.as_slice(), &device)).sum().neg(), total)
}

impl<M: Classifier> Task<M> for EegTask<'_, M> {
    fn loss(&mut self, model: &M, step: usize) -> Result<(Tensor<1>, usize)> {
        let chosen = self.chosen(step);
        let mut samples = self.train.samples(&chosen)?;
        if !self.augment.is_empty() {
            let mut rng = self.cx.rng("augment", step as u64);
            for window in samples.chunks_mut(self.train.channels() * self.train.length) {
                for augmentation in self.augment {
                    augmentation.apply(window, self.train.length, &mut rng);
                }
            }
        }
        let x = self.train.to_tensor(samples, &self.cx.device);
        let logits = model.network(&self.setting)?.forward(x);
        let (sum, total) = loss_of(logits, self.train, &chosen, self.class_weights);
        Ok((sum / total, chosen.len()))
    }

    fn validate(&mut self, model: &M) -> Result<f64> {
        let network = model.network(&self.setting)?;
        let (mut sum, mut total) = (0.0, 0.0);
        let all: Vec<usize> = (0..self.valid.len()).collect();
        for chosen in all.chunks(self.batch) {
            let logits = network.forward(self.valid.tensor(chosen, &self.cx.device)?);
            let (part, weight) = loss_of(logits, self.valid, chosen, self.class_weights);
            sum += f64::from(part.into_scalar::<f32>());
            total += f64::from(weight);
        }
        Ok(sum / total)
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = Map::new();
        settings.insert("batch".into(), self.batch.into());
        settings.insert("windows".into(), self.train.len().into());
        settings.insert("class_weights".into(), json!(self.class_weights));
        settings.insert(
            "augment".into(),
            json!(self.augment.iter().map(ToString::to_string).collect::<Vec<_>>()),
        );
        settings
    }
}

/// What a network says of every window, in order. `temperature` divides log-probabilities; 1 leaves them.
///
/// # Errors
/// When a recording cannot be read, or the user stopped.
pub fn predict(
    model: &Model,
    windows: &WindowSet,
    batch: usize,
    temperature: f64,
    cx: &Context,
) -> Result<Vec<WindowOutcome>> {
    let all: Vec<usize> = (0..windows.len()).collect();
    let mut outcomes = Vec::with_capacity(all.len());
    let bar = cx.progress(all.len() as u64, "judging windows");
    for chosen in all.chunks(batch) {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before all windows were judged"));
        }
        let logits = model.forward(windows.tensor(chosen, &cx.device)?);
        let p = activation::softmax(log_probabilities(logits) / temperature, 1);
        let values: Vec<f32> = p.narrow(1, 1, 1).into_data().iter().collect();
        for (&window, p) in chosen.iter().zip(values) {
            if !p.is_finite() {
                return Err(Error::work("the network's output is not a number")
                    .hint("its weights or the window's samples are too large"));
            }
            let (recording, number) = windows.origin(window);
            outcomes.push(WindowOutcome {
                recording: recording.about.id.clone(),
                window: number,
                label: recording.label,
                p_pathological: p.into(),
            });
        }
        bar.inc(chosen.len() as u64);
    }
    Ok(outcomes)
}
