//! Training on texts, labelled sequences and recall, and what a classifier says about other sequences.

use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor, TensorData};
use kiln_core::{Context, Plot, Result, Table};
use kiln_data::{Corpus, Windows};
use kiln_nn::{
    Confusion, CrossEntropyLossConfig, LanguageModel, Task, likeliest, next_token_loss, score_windows,
};
use rand::seq::SliceRandom;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::data::{Coding, Sequence};
use crate::model::{TcncaClassifier, TcncaLm};
use crate::recall::Recall;

/// Validation reads at most so many tokens of the held-out text, so that it stays short beside training.
const VALIDATION_TOKENS: usize = 16_384;
/// Steps, padding included, that go through a classifier at once when nothing is learned.
const STEPS_AT_ONCE: usize = 16_384;
/// Sequences of the recall task that a model is judged by.
const RECALL_TRIALS: usize = 256;

/// Next-token prediction on random windows of a text.
pub struct LanguageTask<'a> {
    /// What is trained on.
    pub train: &'a Corpus,
    /// What is validated on.
    pub valid: &'a Corpus,
    /// Tokens a window.
    pub seq_len: usize,
    /// Windows a batch.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
}

impl Task<TcncaLm> for LanguageTask<'_> {
    fn loss(&mut self, model: &TcncaLm, step: usize) -> Result<(Tensor<1>, usize)> {
        let windows = Windows { corpus: &self.train.ids, seq_len: self.seq_len, batch: self.batch };
        let (inputs, targets) = windows.batch(&mut self.cx.rng("batch", step as u64));
        let device = self.cx.device.clone().autodiff();
        let ids =
            |ids| Tensor::<2, Int>::from_data(TensorData::new(ids, [self.batch, self.seq_len]), &device);
        let loss = next_token_loss(model.forward(ids(inputs)), ids(targets));
        Ok((loss, self.batch * self.seq_len))
    }

    fn validate(&mut self, model: &TcncaLm) -> Result<f64> {
        let ids = &self.valid.ids[..self.valid.ids.len().min(VALIDATION_TOKENS + 1)];
        Ok(score_windows(model, ids, self.seq_len)?.nll_nats)
    }

    fn settings(&self) -> Map<String, Value> {
        settings([("seq_len", self.seq_len), ("batch", self.batch), ("train_tokens", self.train.ids.len())])
    }
}

/// Recall of fresh sequences; the loss is that of the answer alone.
pub struct RecallTask<'a> {
    /// Which sequences.
    pub recall: Recall,
    /// Sequences a batch.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
}

impl RecallTask<'_> {
    /// Logits of the answers to fresh sequences `[batch, 1, symbols]`, and the answers `[batch, 1]`.
    fn answers(
        &self,
        model: &TcncaLm,
        stream: &str,
        index: u64,
        batch: usize,
    ) -> (Tensor<3>, Tensor<2, Int>) {
        let mut rng = self.cx.rng(stream, index);
        let (symbols, answers): (Vec<Vec<u32>>, Vec<u32>) =
            (0..batch).map(|_| self.recall.draw(&mut rng)).unzip();
        let ids = |ids: Vec<u32>, width: usize| -> Tensor<2, Int> {
            let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
            Tensor::from_data(TensorData::new(ids, [batch, width]), &self.cx.device)
        };
        let length = self.recall.length;
        let logits = model.forward(ids(symbols.concat(), length + 1)).narrow(1, length, 1);
        (logits, ids(answers, 1))
    }

    /// The share of at least `trials` fresh sequences whose answer the model gives.
    pub fn accuracy(&self, model: &TcncaLm, trials: usize) -> f64 {
        let batches = trials.div_ceil(RECALL_TRIALS).max(1);
        let right = |batch: usize| {
            let (logits, answers) = self.answers(model, "recall test", batch as u64, RECALL_TRIALS);
            let right = logits.argmax(2).squeeze_dim::<2>(2).equal(answers).int().sum();
            right.into_scalar::<i64>() as f64
        };
        (0..batches).map(right).sum::<f64>() / (batches * RECALL_TRIALS) as f64
    }
}

impl Task<TcncaLm> for RecallTask<'_> {
    fn loss(&mut self, model: &TcncaLm, step: usize) -> Result<(Tensor<1>, usize)> {
        let (logits, answers) = self.answers(model, "recall train", step as u64, self.batch);
        Ok((next_token_loss(logits, answers), self.batch))
    }

    fn validate(&mut self, model: &TcncaLm) -> Result<f64> {
        let (logits, answers) = self.answers(model, "recall valid", 0, RECALL_TRIALS);
        Ok(next_token_loss(logits, answers).into_scalar::<f32>().into())
    }

    fn settings(&self) -> Map<String, Value> {
        settings([("batch", self.batch), ("length", self.recall.length), ("values", self.recall.values)])
    }
}

/// Classification of sequences; every epoch goes through them in an order of its own.
pub struct ClassificationTask<'a> {
    /// What is trained on.
    pub train: &'a [Sequence],
    /// What is validated on.
    pub valid: &'a [Sequence],
    /// From sequences and labels to numbers.
    pub coding: &'a Coding,
    /// What an error in each class counts, if not the same.
    pub class_weights: Option<Vec<f32>>,
    /// Sequences a batch.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
    /// An epoch and its order of the sequences.
    order: (usize, Vec<usize>),
}

impl<'a> ClassificationTask<'a> {
    /// A task before its first step; with `weighted`, rare classes count as much as common ones.
    pub fn new(
        [train, valid]: [&'a [Sequence]; 2],
        coding: &'a Coding,
        weighted: bool,
        batch: usize,
        cx: &'a Context,
    ) -> Self {
        let class_weights = weighted.then(|| balanced_weights(train, coding));
        Self { train, valid, coding, class_weights, batch, cx, order: (0, Vec::new()) }
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

    /// The mean loss of a batch, weighted by class.
    fn batch_loss(&self, model: &TcncaClassifier, batch: &[&Sequence]) -> Tensor<1> {
        let device = &self.cx.device;
        let (steps, kept) = self.coding.encode(batch, device);
        let classes: Vec<i64> = batch.iter().map(|sequence| self.coding.class(sequence) as i64).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(classes, [batch.len()]), device);
        let loss = CrossEntropyLossConfig::new().with_weights(self.class_weights.clone()).init(device);
        loss.forward(model.forward(steps, kept.as_ref()), targets)
    }
}

/// `sequences / (classes · sequences of the class)`; 1 for a class that does not occur.
fn balanced_weights(sequences: &[Sequence], coding: &Coding) -> Vec<f32> {
    let mut counts = vec![0usize; coding.classes.len()];
    sequences.iter().for_each(|sequence| counts[coding.class(sequence)] += 1);
    let share = sequences.len() as f32 / counts.len() as f32;
    counts.into_iter().map(|count| if count == 0 { 1.0 } else { share / count as f32 }).collect()
}

impl Task<TcncaClassifier> for ClassificationTask<'_> {
    fn loss(&mut self, model: &TcncaClassifier, step: usize) -> Result<(Tensor<1>, usize)> {
        let batch: Vec<&Sequence> =
            (step * self.batch..(step + 1) * self.batch).map(|number| self.draw(number)).collect();
        Ok((self.batch_loss(model, &batch), self.batch))
    }

    fn validate(&mut self, model: &TcncaClassifier) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for batch in batches(self.valid, self.coding) {
            let batch: Vec<&Sequence> = batch.iter().collect();
            sum += f64::from(self.batch_loss(model, &batch).into_scalar::<f32>()) * batch.len() as f64;
            count += batch.len();
        }
        Ok(sum / count as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        settings([("batch", self.batch), ("train_sequences", self.train.len())])
    }
}

fn settings<const N: usize>(settings: [(&str, usize); N]) -> Map<String, Value> {
    settings.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect()
}

/// Successive sequences whose steps, padding included, fit into memory together.
fn batches<'a>(sequences: &'a [Sequence], coding: &Coding) -> Vec<&'a [Sequence]> {
    let mut batches = Vec::new();
    let (mut start, mut longest) = (0, 0);
    for (at, sequence) in sequences.iter().enumerate() {
        longest = longest.max(coding.read_length(sequence));
        if at > start && longest * (at + 1 - start) > STEPS_AT_ONCE {
            batches.push(&sequences[start..at]);
            (start, longest) = (at, coding.read_length(sequence));
        }
    }
    batches.push(&sequences[start..]);
    batches
}

/// Probabilities of all classes for every sequence.
pub fn predict(
    model: &TcncaClassifier,
    coding: &Coding,
    sequences: &[Sequence],
    cx: &Context,
) -> Vec<Vec<f32>> {
    let bar = cx.progress(sequences.len() as u64, "predicting");
    let mut all = Vec::with_capacity(sequences.len());
    for batch in batches(sequences, coding) {
        let (steps, kept) = coding.encode(&batch.iter().collect::<Vec<_>>(), &cx.device);
        let probabilities = softmax(model.forward(steps, kept.as_ref()), 1);
        let values: Vec<f32> = probabilities.into_data().iter::<f32>().collect();
        all.extend(values.chunks(coding.classes.len()).map(<[f32]>::to_vec));
        bar.inc(batch.len() as u64);
    }
    all
}

/// How well predictions agree with labels.
#[derive(Debug, Clone, Serialize)]
pub struct Scores {
    /// Sequences scored.
    pub sequences: usize,
    /// Share whose likeliest class is right.
    pub accuracy: f64,
    /// Share of the commonest label, what always guessing it would reach.
    pub majority: f64,
    /// F1 of each class, averaged over the classes that occur.
    pub macro_f1: f64,
    /// The labels, in the order of rows and columns below.
    pub classes: Vec<String>,
    /// Sequences by their label (rows) and the label that they were given (columns).
    pub confusion: Vec<Vec<usize>>,
}

impl Scores {
    /// Compares probabilities with the labels of the same sequences.
    pub fn new(predictions: &[Vec<f32>], sequences: &[Sequence], coding: &Coding) -> Self {
        let classes = coding.classes.len();
        let pairs = predictions.iter().zip(sequences);
        let confusion =
            Confusion::new(classes, pairs.map(|(p, sequence)| (coding.class(sequence), likeliest(p))));
        Self {
            sequences: sequences.len(),
            accuracy: confusion.accuracy(),
            majority: confusion.majority(),
            macro_f1: confusion.macro_f1(),
            classes: coding.classes.clone(),
            confusion: confusion.counts().to_vec(),
        }
    }

    /// The confusion matrix as a table.
    pub fn table(&self) -> Table {
        let heads: Vec<&str> =
            std::iter::once("label \\ given").chain(self.classes.iter().map(String::as_str)).collect();
        let mut table = Table::new("Confusion", &heads);
        for (class, row) in self.classes.iter().zip(&self.confusion) {
            table.row(std::iter::once(class.clone()).chain(row.iter().map(usize::to_string)));
        }
        table
    }

    /// The confusion matrix as a picture; row 0 is at the bottom.
    pub fn plot(&self) -> Plot {
        let cells = self.confusion.iter().flatten().map(|&count| count as f64).collect();
        let names = self.classes.iter().take(12).cloned().collect::<Vec<_>>().join(", ");
        let axis = |what: &str| format!("{what} (in order: {names})");
        Plot::heat_map(
            "Sequences by label and given label",
            axis("given"),
            axis("label"),
            self.classes.len(),
            cells,
        )
    }
}

/// Splits off a share of the sequences for validation, at random: (training, validation).
pub fn split(mut sequences: Vec<Sequence>, share: f64, cx: &Context) -> (Vec<Sequence>, Vec<Sequence>) {
    sequences.shuffle(&mut cx.rng("split", 0));
    let valid = ((sequences.len() as f64 * share).round() as usize).clamp(1, sequences.len().max(2) - 1);
    let train = sequences.split_off(valid);
    (train, sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Content, StepCoding};

    fn coding() -> Coding {
        let classes = vec!["no".into(), "yes".into()];
        Coding { steps: StepCoding::Bytes, classes, max_len: 100_000, truncate: false }
    }

    fn sequence(length: usize, label: &str) -> Sequence {
        Sequence { content: Content::Text(vec![b'x'; length]), label: Some(label.into()) }
    }

    #[test]
    fn scores_by_hand() {
        let sequences = ["no", "yes", "yes", "no"].map(|label| sequence(3, label));
        let predictions = [0.1f32, 0.9, 0.4, 0.4].map(|yes| vec![1.0 - yes, yes]);
        let scores = Scores::new(&predictions, &sequences, &coding());
        assert_eq!((scores.sequences, scores.accuracy, scores.majority), (4, 0.75, 0.5));
        assert!((scores.macro_f1 - (4.0 / 5.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
        assert_eq!(scores.confusion, [[2, 0], [1, 1]]);
    }

    #[test]
    fn rare_classes_weigh_more() {
        let sequences = ["no", "no", "no", "yes"].map(|label| sequence(3, label));
        assert_eq!(balanced_weights(&sequences, &coding()), [4.0 / 6.0, 2.0]);
    }

    #[test]
    fn batches_hold_every_sequence_once_and_bound_memory() {
        let sequences: Vec<Sequence> =
            [10, 9000, 9000, 20_000, 1, 2].iter().map(|&length| sequence(length, "no")).collect();
        let sizes: Vec<usize> = batches(&sequences, &coding()).iter().map(|batch| batch.len()).collect();
        assert_eq!(sizes, [1, 1, 1, 1, 2]);
    }
}
