//! Training of the networks.

use burn::tensor::{Int, Tensor, TensorData};
use kiln_core::{Context, Result};
use kiln_nn::Task;
use kiln_ops::{CrossEntropyOptions, cross_entropy};
use rand::seq::SliceRandom;
use serde_json::{Map, Value, json};

use crate::arch::{Batch, Classifier};
use crate::data::Examples;

/// Examples that are validated at once.
const AT_ONCE: usize = 64;

/// Classification by cross-entropy; every epoch goes through all examples in an order of its own.
pub struct ClassifyTask<'a> {
    /// To learn from.
    pub train: &'a Examples,
    /// To judge by.
    pub valid: &'a Examples,
    /// Examples of a step.
    pub batch: usize,
    /// The context whose streams are drawn from.
    pub cx: &'a Context,
}

impl ClassifyTask<'_> {
    /// Steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        (self.train.len() / self.batch.max(1)).max(1)
    }
}

/// Classes as a tensor.
fn labels(examples: &Examples, indices: &[usize], cx: &Context) -> Tensor<1, Int> {
    let labels: Vec<i64> = indices.iter().map(|&i| examples.labels[i] as i64).collect();
    Tensor::from_data(TensorData::new(labels, [indices.len()]), &cx.device)
}

impl Task<Classifier> for ClassifyTask<'_> {
    fn loss(&mut self, model: &Classifier, step: usize) -> Result<(Tensor<1>, usize)> {
        let per_epoch = self.steps_per_epoch();
        let mut order: Vec<usize> = (0..self.train.len()).collect();
        order.shuffle(&mut self.cx.rng("epoch", (step / per_epoch) as u64));
        let first = step % per_epoch * self.batch;
        let chosen = &order[first..(first + self.batch).min(order.len())];
        // On the autodiff device, where norms use the statistics of the batch.
        let batch = match self.train.tensors(chosen, &self.cx.device) {
            Batch::Images(x) => Batch::Images(Tensor::from_inner(x)),
            Batch::Tokens(ids) => Batch::Tokens(Tensor::from_inner(ids)),
        };
        let logits = model.forward(batch);
        let targets = Tensor::from_inner(labels(self.train, chosen, self.cx));
        Ok((cross_entropy(logits, targets, &CrossEntropyOptions::default()).mean(), chosen.len()))
    }

    fn validate(&mut self, model: &Classifier) -> Result<f64> {
        let mut sum = 0.0;
        for first in (0..self.valid.len()).step_by(AT_ONCE) {
            let chosen: Vec<usize> = (first..(first + AT_ONCE).min(self.valid.len())).collect();
            let logits = model.forward(self.valid.tensors(&chosen, &self.cx.device));
            let loss =
                cross_entropy(logits, labels(self.valid, &chosen, self.cx), &CrossEntropyOptions::default());
            sum += f64::from(loss.sum().into_scalar::<f32>());
        }
        Ok(sum / self.valid.len() as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let settings = json!({ "batch": self.batch, "examples": self.train.len() });
        settings.as_object().cloned().unwrap_or_default()
    }
}
