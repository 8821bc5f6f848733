//! What networks are trained for, and how they are judged.

use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use clap::ValueEnum;
use kiln_core::{Context, Result};
use kiln_nn::{BatchNorm, Confusion, likeliest};
use kiln_ops::{CrossEntropyOptions, cross_entropy};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::arch::{Built, LATENT};
use crate::data::Samples;

/// Pictures that pass through a network at once when nothing is learned.
const AT_ONCE: usize = 256;

/// What a network is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// To tell what is in a picture
    Classify,
    /// To tell what each pixel belongs to
    Segment,
    /// To draw pictures like those seen
    Generate,
}

impl Goal {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Classify => "classify",
            Self::Segment => "segment",
            Self::Generate => "generate",
        }
    }

    /// What [`score`] measures.
    pub fn metric(self) -> &'static str {
        match self {
            Self::Classify => "accuracy",
            Self::Segment => "mean IoU",
            Self::Generate => "squared error of the reconstruction",
        }
    }

    /// Whether more of it is better.
    pub fn more_is_better(self) -> bool {
        self != Self::Generate
    }
}

/// Pictures as a tensor `[images, channels, height, width]`.
pub fn pictures(samples: &Samples, device: &Device) -> Tensor<4> {
    let [channels, height, width] = samples.images.shape;
    let shape = [samples.len(), channels, height, width];
    Tensor::from_data(TensorData::new(samples.images.pixels.clone(), shape), device)
}

/// Targets of the cross-entropy: a class for each picture or pixel, row by row.
fn targets(goal: Goal, samples: &Samples, device: &Device) -> Tensor<1, Int> {
    let classes: Vec<i64> = match goal {
        Goal::Classify => samples.images.labels.iter().map(|&label| label as i64).collect(),
        Goal::Segment | Goal::Generate => samples.masks.iter().map(|&class| class.into()).collect(),
    };
    let count = classes.len();
    Tensor::from_data(TensorData::new(classes, [count]), device)
}

/// `[images, classes, height, width]` to one row a pixel.
fn rows(logits: Tensor<4>) -> Tensor<2> {
    let [images, classes, height, width] = logits.dims();
    logits.permute([0, 2, 3, 1]).reshape([images * height * width, classes])
}

/// A network with its weights, ready to compute.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// What it is for.
    pub goal: Goal,
    /// The network.
    pub built: &'a Built,
    /// Its tensors, flat.
    pub parameters: &'a [Tensor<1>],
    /// Its batch norms; none once they are folded.
    pub norms: &'a [BatchNorm],
}

/// What a step of training gives.
#[derive(Debug, Clone)]
pub struct Loss {
    /// Nats a picture or pixel.
    pub task: Tensor<1>,
    /// What the network put out.
    pub output: Tensor<4>,
}

impl Run<'_> {
    /// The loss of samples: cross-entropy, or the negative evidence lower bound for each number of a picture.
    ///
    /// # Errors
    /// When the network cannot be run.
    pub fn loss(&self, samples: &Samples, device: &Device, rng: &mut impl rand::Rng) -> Result<Loss> {
        let images = pictures(samples, device);
        let Some(latent) = self.built.latent else {
            let output = self.output(images)?;
            let targets = targets(self.goal, samples, device);
            let task = cross_entropy(rows(output.clone()), targets, &CrossEntropyOptions::default()).mean();
            return Ok(Loss { task, output });
        };
        let noise = normal([samples.len(), LATENT, 1, 1], device, rng);
        let feeds = [(self.built.image, images.clone()), (latent.noise, noise)];
        let targets = [self.built.output, latent.statistics];
        let found = self.built.graph.run(self.parameters, self.norms, &feeds, &targets)?;
        let [output, statistics]: [Tensor<4>; 2] = found.try_into().expect("as many results as targets");
        // Bernoulli: -ln p(x | z) = softplus(y) - x y
        let misfit = activation::softplus(output.clone(), 1.0) - output.clone() * images;
        let [mean, log_variance]: [Tensor<4>; 2] =
            statistics.chunk(2, 1).try_into().expect("means and variances");
        let divergence = (log_variance.clone().exp() + mean.powi_scalar(2) - log_variance - 1.0).sum() * 0.5;
        let numbers = samples.images.pixels.len() as f64;
        Ok(Loss { task: (misfit.sum() + divergence) / numbers, output })
    }

    /// Logits of pictures; an autoencoder's code is its mean.
    ///
    /// # Errors
    /// When the network cannot be run.
    pub fn output(&self, images: Tensor<4>) -> Result<Tensor<4>> {
        let mut feeds = vec![(self.built.image, images.clone())];
        if let Some(latent) = self.built.latent {
            feeds.push((latent.noise, Tensor::zeros([images.dims()[0], LATENT, 1, 1], &images.device())));
        }
        let found = self.built.graph.run(self.parameters, self.norms, &feeds, &[self.built.output])?;
        Ok(found.into_iter().next().expect("one result for one target"))
    }

    /// What the network makes of every sample, a row each: probabilities of classes (for each pixel in turn), or the
    /// picture as it comes back.
    ///
    /// # Errors
    /// When the network cannot be run.
    pub fn predict(&self, samples: &Samples, cx: &Context) -> Result<Vec<Vec<f32>>> {
        let order: Vec<usize> = (0..samples.len()).collect();
        let bar = cx.progress(order.len() as u64, "predicting");
        let mut found = Vec::with_capacity(order.len());
        for chunk in order.chunks(AT_ONCE) {
            let output = self.output(pictures(&samples.select(chunk), &cx.device))?;
            let (values, width) = match self.goal {
                Goal::Generate => (activation::sigmoid(output.clone()), output.dims()[1..].iter().product()),
                _ => {
                    let [_, classes, height, width] = output.dims();
                    let probabilities = activation::softmax(output.permute([0, 2, 3, 1]), 3);
                    (probabilities, classes * height * width)
                }
            };
            let values: Vec<f32> =
                values.into_data().try_to_vec().expect("networks compute in single precision");
            found.extend(values.chunks(width).map(<[f32]>::to_vec));
            bar.inc(chunk.len() as u64);
        }
        Ok(found)
    }

    /// Accuracy, mean intersection over union of the classes that occur, or mean squared error of the reconstruction.
    ///
    /// # Errors
    /// When the network cannot be run.
    pub fn score(&self, samples: &Samples, cx: &Context) -> Result<f64> {
        let found = self.predict(samples, cx)?;
        Ok(match self.goal {
            Goal::Classify => {
                let right =
                    found.iter().zip(&samples.images.labels).filter(|(row, label)| likeliest(row) == **label);
                right.count() as f64 / samples.len() as f64
            }
            Goal::Segment => {
                let classes = self.built.graph.layers().last().map_or(1, |layer| layer.outputs.channels);
                let given = found.iter().flat_map(|row| row.chunks(classes).map(likeliest));
                mean_iou(&Confusion::new(classes, samples.masks.iter().map(|&mask| mask.into()).zip(given)))
            }
            Goal::Generate => {
                let squares =
                    found.iter().flatten().zip(&samples.images.pixels).map(|(a, b)| f64::from(a - b).powi(2));
                squares.sum::<f64>() / samples.images.pixels.len() as f64
            }
        })
    }

    /// New pictures of an autoencoder, `[count][channels * height * width]`.
    ///
    /// # Errors
    /// When the network is no autoencoder.
    pub fn generate(&self, count: usize, device: &Device, rng: &mut impl rand::Rng) -> Result<Vec<Vec<f32>>> {
        let latent = self.built.latent.ok_or_else(|| {
            kiln_core::Error::usage(format!("a network to {} draws no pictures", self.goal.name()))
        })?;
        let code = normal([count, LATENT, 1, 1], device, rng);
        let found = self.built.graph.run(
            self.parameters,
            self.norms,
            &[(latent.code, code)],
            &[self.built.output],
        )?;
        let output = found.into_iter().next().expect("one result for one target");
        let width: usize = output.dims()[1..].iter().product();
        let values: Vec<f32> = activation::sigmoid(output)
            .into_data()
            .try_to_vec()
            .expect("networks compute in single precision");
        Ok(values.chunks(width).map(<[f32]>::to_vec).collect())
    }
}

/// Intersection over union of each class that occurs or was given, averaged.
fn mean_iou(confusion: &Confusion) -> f64 {
    let counts = confusion.counts();
    let of = |class: usize| {
        let labelled: usize = counts[class].iter().sum();
        let given: usize = counts.iter().map(|row| row[class]).sum();
        let union = labelled + given - counts[class][class];
        (union > 0).then(|| counts[class][class] as f64 / union as f64)
    };
    let ious: Vec<f64> = (0..counts.len()).filter_map(of).collect();
    ious.iter().sum::<f64>() / ious.len() as f64
}

/// Standard normal numbers (Box and Muller).
pub(crate) fn normal(shape: [usize; 4], device: &Device, rng: &mut impl rand::Rng) -> Tensor<4> {
    let draw = |_| {
        let (radius, angle) = (1.0 - rng.random::<f32>(), rng.random::<f32>());
        (-2.0 * radius.ln()).sqrt() * (std::f32::consts::TAU * angle).cos()
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(draw).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Kullback-Leibler divergence from a teacher's classes to a student's, the mean over rows; for pictures the squared
/// difference of logits.
pub fn distillation(goal: Goal, student: Tensor<4>, teacher: Tensor<4>) -> Tensor<1> {
    if goal == Goal::Generate {
        return (student - teacher).powi_scalar(2).mean();
    }
    let (student, teacher) = (rows(student), rows(teacher));
    let count = student.dims()[0] as f64;
    let log_p = kiln_ops::log_softmax(teacher, 1);
    let difference = log_p.clone() - kiln_ops::log_softmax(student, 1);
    (log_p.exp() * difference).sum() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iou_by_hand() {
        // Class 0: 2 right of a union of 3; class 1: 1 of 2; class 2 never occurs.
        let confusion = Confusion::new(3, [(0, 0), (0, 0), (0, 1), (1, 1)]);
        assert!((mean_iou(&confusion) - (2.0 / 3.0 + 0.5) / 2.0).abs() < 1e-12);
    }
}
