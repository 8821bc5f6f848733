//! Training on labelled sequences, and what a model says about others.

use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Context, Result};
use kiln_data::roc_auc;
use kiln_nn::{Confusion, Task, likeliest, token_nll};
use rand::seq::SliceRandom;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::data::{Coding, Sequence};
use crate::model::{KroneckerTransformer, Target};

/// Sequences that go through the model at once when nothing is learned.
const AT_ONCE: usize = 64;

/// Classification of tokens or sequences; every epoch goes through the sequences in an order of its own.
pub struct ClassificationTask<'a> {
    /// What is trained on.
    pub train: &'a [Sequence],
    /// What is validated on.
    pub valid: &'a [Sequence],
    /// From tokens and labels to numbers.
    pub coding: &'a Coding,
    /// Sequences a batch.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
    /// An epoch and its order of the sequences.
    order: (usize, Vec<usize>),
}

impl<'a> ClassificationTask<'a> {
    /// A task before its first step.
    pub fn new(
        train: &'a [Sequence],
        valid: &'a [Sequence],
        coding: &'a Coding,
        batch: usize,
        cx: &'a Context,
    ) -> Self {
        Self { train, valid, coding, batch, cx, order: (0, Vec::new()) }
    }

    /// Sequence `number` of those that training goes through, epoch by epoch.
    fn draw(&mut self, number: usize) -> &'a Sequence {
        let (epoch, place) = (number / self.train.len(), number % self.train.len());
        if self.order.1.is_empty() || self.order.0 != epoch {
            let mut order: Vec<usize> = (0..self.train.len()).collect();
            order.shuffle(&mut self.cx.rng("epoch", epoch as u64));
            self.order = (epoch, order);
        }
        &self.train[self.order.1[place]]
    }
}

impl Task<KroneckerTransformer> for ClassificationTask<'_> {
    fn loss(&mut self, model: &KroneckerTransformer, step: usize) -> Result<(Tensor<1>, usize)> {
        let batch: Vec<&Sequence> =
            (step * self.batch..(step + 1) * self.batch).map(|number| self.draw(number)).collect();
        Ok((loss(model, self.coding, &batch, &self.cx.device), self.batch))
    }

    fn validate(&mut self, model: &KroneckerTransformer) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for batch in self.valid.chunks(AT_ONCE) {
            let batch: Vec<&Sequence> = batch.iter().collect();
            let labels: usize = batch.iter().map(|sequence| sequence.labels.len()).sum();
            let loss = loss(model, self.coding, &batch, &self.cx.device).into_scalar::<f32>();
            sum += f64::from(loss) * labels as f64;
            count += labels;
        }
        Ok(sum / count as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let settings = [("batch", self.batch), ("train_sequences", self.train.len())];
        settings.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect()
    }
}

/// Mean negative log-likelihood of a batch's labels.
fn loss(model: &KroneckerTransformer, coding: &Coding, batch: &[&Sequence], device: &Device) -> Tensor<1> {
    let (tokens, mask) = coding.encode(batch, device);
    let logits = model.forward(tokens, mask.clone());
    let [rows, n, _] = logits.dims();
    let labels: Vec<i64> = batch
        .iter()
        .flat_map(|sequence| {
            let mut labels = coding.label_ids(sequence);
            labels.resize(n, 0); // padding, masked below
            labels
        })
        .collect();
    let labels = Tensor::<2, Int>::from_data(TensorData::new(labels, [rows, n]), device);
    let nll = token_nll(logits, labels);
    match (coding.target, mask) {
        (Target::Token, Some(mask)) => {
            let kept = mask.float();
            (nll * kept.clone()).sum() / kept.sum()
        }
        _ => nll.mean(),
    }
}

/// Probabilities of all classes for every label of every sequence: `[sequence][label][class]`.
pub fn predict(
    model: &KroneckerTransformer,
    coding: &Coding,
    sequences: &[Sequence],
    cx: &Context,
) -> Vec<Vec<Vec<f32>>> {
    let bar = cx.progress(sequences.len() as u64, "predicting");
    let classes = coding.classes.len();
    let mut all = Vec::with_capacity(sequences.len());
    for batch in sequences.chunks(AT_ONCE) {
        let (tokens, mask) = coding.encode(&batch.iter().collect::<Vec<_>>(), &cx.device);
        let probabilities = softmax(model.forward(tokens, mask), 2);
        let n = probabilities.dims()[1];
        let values: Vec<f32> = probabilities.into_data().iter::<f32>().collect();
        for (sequence, values) in batch.iter().zip(values.chunks(n * classes)) {
            let labels = match coding.target {
                Target::Token => sequence.tokens.len(),
                Target::Sequence => 1,
            };
            all.push(values.chunks(classes).take(labels).map(<[f32]>::to_vec).collect());
        }
        bar.inc(batch.len() as u64);
    }
    all
}

/// How well predictions agree with labels.
#[derive(Debug, Clone, Serialize)]
pub struct Scores {
    /// Labels scored.
    pub labels: usize,
    /// Share of labels whose likeliest class is right.
    pub accuracy: f64,
    /// Share of the commonest label, what always guessing it would reach.
    pub majority: f64,
    /// F1 of each class, averaged over the classes that occur.
    pub macro_f1: f64,
    /// Area under the ROC curve of the second class, where there are two.
    pub auc: Option<f64>,
}

impl Scores {
    /// Compares probabilities with the labels of the same sequences.
    pub fn new(predictions: &[Vec<Vec<f32>>], sequences: &[Sequence], coding: &Coding) -> Self {
        let truth = sequences.iter().flat_map(|sequence| coding.label_ids(sequence));
        let pairs: Vec<(&Vec<f32>, usize)> =
            predictions.iter().flatten().zip(truth.map(|label| label as usize)).collect();
        let classes = coding.classes.len();
        let confusion = Confusion::new(classes, pairs.iter().map(|(p, label)| (*label, likeliest(p))));
        Self {
            labels: pairs.len(),
            accuracy: confusion.accuracy(),
            majority: confusion.majority(),
            macro_f1: confusion.macro_f1(),
            auc: (classes == 2)
                .then(|| roc_auc(pairs.iter().map(|(p, label)| (*label == 1, f64::from(p[1])))))
                .flatten(),
        }
    }
}

/// Splits off a share of the sequences for validation, at random.
pub fn split(mut sequences: Vec<Sequence>, share: f64, cx: &Context) -> (Vec<Sequence>, Vec<Sequence>) {
    sequences.shuffle(&mut cx.rng("split", 0));
    let valid = ((sequences.len() as f64 * share).round() as usize).clamp(1, sequences.len().max(2) - 1);
    let train = sequences.split_off(valid);
    (train, sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Token;
    use crate::model::Input;

    #[test]
    fn scores_by_hand() {
        let coding = Coding {
            input: Input::Embed(1),
            target: Target::Token,
            vocabulary: vec!["a".into()],
            classes: vec!["no".into(), "yes".into()],
        };
        let labels = ["no", "yes", "yes", "no"].map(String::from).to_vec();
        let sequence = Sequence { tokens: vec![Token::Symbol("a".into()); 4], labels };
        // Guesses: no, yes, no, no; of the four pairs yes > no three are in order and one is tied.
        let of_yes = [0.1f32, 0.9, 0.4, 0.4];
        let predictions = vec![of_yes.map(|p| vec![1.0 - p, p]).to_vec()];
        let scores = Scores::new(&predictions, &[sequence], &coding);
        assert_eq!((scores.labels, scores.accuracy, scores.majority), (4, 0.75, 0.5));
        assert!((scores.macro_f1 - (4.0 / 5.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
        assert_eq!(scores.auc, Some(3.5 / 4.0));
    }
}
