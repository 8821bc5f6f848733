//! Training: anchors alone, and all networks of a space together.

use burn::module::ModuleDisplay;
use burn::tensor::{Int, Tensor};
use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use kiln_data::Images;
use kiln_nn::Task;
use kiln_ops::{CrossEntropyOptions, cross_entropy, log_softmax, softmax};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::anchor::Anchor;
use crate::data::{Batches, Scaling, sample};
use crate::evaluate::{predict, scores};
use crate::norms::Statistics;
use crate::snnet::SnNet;

/// Images that judge a joint training at most: every network of the space classifies them.
const JUDGES: usize = 256;

/// Which networks a step trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// One, any of the space
    Uniform,
    /// The cheapest, the dearest and one of the others
    Sandwich,
}

/// What a teacher adds to the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Distill {
    /// Nothing
    None,
    /// Half of the loss is the cross-entropy of the class that it finds likeliest
    Hard,
    /// Half of the loss is the divergence from its probabilities
    Soft,
}

/// A trained network whose answers others learn from.
#[derive(Debug, Clone)]
pub struct Teacher<A> {
    /// The network, which does not change.
    pub net: A,
    /// How its answers are used.
    pub distill: Distill,
    /// What logits are divided by before they become probabilities, in a soft distillation.
    pub temperature: f64,
}

impl<A: Anchor> Teacher<A> {
    /// What is learned from the teacher about images: classes or probabilities.
    fn answers(&self, images: Tensor<4>) -> Answers {
        match self.distill {
            Distill::None => Answers::None,
            Distill::Hard => Answers::Classes(self.net.forward(images).argmax(1).squeeze_dim::<1>(1)),
            Distill::Soft => {
                let logits = self.net.forward(images) / self.temperature;
                Answers::Soft { probabilities: softmax(logits, 1), temperature: self.temperature }
            }
        }
    }
}

enum Answers {
    None,
    Classes(Tensor<1, Int>),
    Soft { probabilities: Tensor<2>, temperature: f64 },
}

impl Answers {
    /// The loss of logits `[batch, classes]`: `CE(y)`, or with a teacher `½ CE(y) + ½ CE(its class)` or
    /// `½ CE(y) + ½ T² KL(teacher ‖ student)`.
    fn loss(&self, logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
        let hard = |logits, classes| cross_entropy(logits, classes, &CrossEntropyOptions::default()).mean();
        let own = hard(logits.clone(), labels);
        match self {
            Self::None => own,
            Self::Classes(classes) => (own + hard(logits, classes.clone())) * 0.5,
            Self::Soft { probabilities, temperature } => {
                let batch = logits.dims()[0] as f64;
                let student = log_softmax(logits / *temperature, 1);
                // Where the teacher is certain, p ln p is 0.
                let teacher = probabilities.clone().clamp_min(f32::MIN_POSITIVE).log();
                let divergence = (probabilities.clone() * (teacher - student)).sum() / batch;
                (own + divergence * (temperature * temperature)) * 0.5
            }
        }
    }
}

/// One network on its own, with or without a teacher.
pub struct SingleTask<'a, A> {
    /// Training images.
    pub batches: Batches<'a>,
    /// Held out.
    pub valid: &'a Images,
    /// How pixels are scaled.
    pub scaling: &'a Scaling,
    /// Whom it learns from.
    pub teacher: Option<Teacher<A>>,
    /// The device.
    pub cx: &'a Context,
}

impl<A: Anchor> Task<A> for SingleTask<'_, A> {
    fn loss(&mut self, model: &A, step: usize) -> Result<(Tensor<1>, usize)> {
        let (images, labels) = self.batches.step(step);
        let answers = self.teacher.as_ref().map_or(Answers::None, |teacher| teacher.answers(images.clone()));
        Ok((answers.loss(model.forward(images), labels), self.batches.size()))
    }

    fn validate(&mut self, model: &A) -> Result<f64> {
        let logits = predict(self.valid, self.scaling, self.cx, |images| Ok(model.forward(images)))?;
        Ok(scores(&logits, &self.valid.labels).nll)
    }

    fn settings(&self) -> Map<String, Value> {
        settings(&self.batches, self.teacher.as_ref(), Map::new())
    }
}

/// All networks of a space, a few at a time.
pub struct JointTask<'a, A> {
    /// Training images.
    pub batches: Batches<'a>,
    /// Held out; the first of them judge.
    pub valid: &'a Images,
    /// How pixels are scaled.
    pub scaling: &'a Scaling,
    /// Which networks a step trains.
    pub sampling: Sampling,
    /// Whether the anchors stay as they are, so that there is nothing to learn from running one alone.
    pub frozen: bool,
    /// Whom they learn from.
    pub teacher: Option<Teacher<A>>,
    /// Device and random streams.
    pub cx: &'a Context,
}

impl<A: Anchor + ModuleDisplay> JointTask<'_, A> {
    /// The networks of a step.
    fn sample(&self, model: &SnNet<A>, step: usize) -> Vec<usize> {
        let mut rng = self.cx.rng("configuration", step as u64);
        let first = if self.frozen { model.anchors.len() } else { 0 };
        let any = rng.random_range(first..model.space().len());
        match self.sampling {
            Sampling::Uniform => vec![any],
            Sampling::Sandwich if self.frozen => vec![any],
            Sampling::Sandwich => vec![0, model.anchors.len() - 1, any],
        }
    }
}

impl<A: Anchor + ModuleDisplay> Task<SnNet<A>> for JointTask<'_, A> {
    fn loss(&mut self, model: &SnNet<A>, step: usize) -> Result<(Tensor<1>, usize)> {
        if self.frozen && model.stitches.is_empty() {
            return Err(Error::usage("without stitches and with frozen anchors there is nothing to train"));
        }
        let (images, labels) = self.batches.step(step);
        let answers = self.teacher.as_ref().map_or(Answers::None, |teacher| teacher.answers(images.clone()));
        let ids = self.sample(model, step);
        let losses = ids
            .iter()
            .map(|&id| Ok(answers.loss(model.forward_with(id, images.clone())?, labels.clone())))
            .collect::<Result<Vec<_>>>()?;
        let count = losses.len() as f64;
        let sum = losses.into_iter().reduce(|sum, loss| sum + loss);
        Ok((sum.expect("a step trains a network") / count, self.batches.size()))
    }

    /// The mean over all networks, each with running statistics of its own, as it will have them after the training.
    fn validate(&mut self, model: &SnNet<A>) -> Result<f64> {
        let valid = crate::data::first(self.valid, JUDGES);
        let seen = model
            .has_batch_norms()
            .then(|| sample(self.batches.images(), JUDGES, &mut self.cx.rng("validation", 0)));
        let mut sum = 0.0;
        for id in 0..model.space().len() {
            let mut net = model.export(id)?;
            if let Some(images) = &seen {
                net = Statistics::compute(net.clone(), images, self.scaling, self.cx)?.put_into(net);
            }
            let logits = predict(&valid, self.scaling, self.cx, |images| Ok(net.forward(images)))?;
            sum += scores(&logits, &valid.labels).nll;
        }
        Ok(sum / model.space().len() as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let own = json!({ "sampling": self.sampling, "frozen_anchors": self.frozen });
        settings(&self.batches, self.teacher.as_ref(), own.as_object().cloned().unwrap_or_default())
    }
}

/// What a resumed run must have in common with the one that it continues.
fn settings<A>(
    batches: &Batches,
    teacher: Option<&Teacher<A>>,
    mut own: Map<String, Value>,
) -> Map<String, Value> {
    own.insert("batch".into(), batches.size().into());
    own.insert("images".into(), batches.images().len().into());
    if let Some(teacher) = teacher {
        own.insert("distill".into(), json!(teacher.distill));
        own.insert("temperature".into(), teacher.temperature.into());
    }
    own
}
