//! Images as networks take them.

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Context, Error, Result};
use kiln_data::{Images, digits, shared_dir};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

/// What is subtracted from the brightness of each channel, and what it is divided by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    /// Mean of each channel.
    pub mean: Vec<f32>,
    /// Deviation of each channel.
    pub std: Vec<f32>,
}

impl Scaling {
    /// That makes these images' channels have mean 0 and deviation 1. A constant channel is only shifted.
    pub fn of(images: &Images) -> Self {
        let [channels, height, width] = images.shape;
        let plane = height * width;
        let count = (images.len() * plane) as f64;
        let sum = |channel: usize, value: &dyn Fn(f32) -> f64| -> f64 {
            let planes = images.pixels.chunks(plane).skip(channel).step_by(channels);
            planes.flatten().map(|&x| value(x)).sum::<f64>() / count
        };
        let mean: Vec<f64> = (0..channels).map(|channel| sum(channel, &|x| x.into())).collect();
        let deviation = |channel: usize| {
            let variance = sum(channel, &|x| (f64::from(x) - mean[channel]).powi(2));
            if variance > 0.0 { variance.sqrt() as f32 } else { 1.0 }
        };
        Self {
            std: (0..channels).map(deviation).collect(),
            mean: mean.into_iter().map(|mean| mean as f32).collect(),
        }
    }

    /// Checks that there is a finite mean and a positive deviation for each channel.
    ///
    /// # Errors
    /// Tells what there is instead.
    pub fn check(&self, channels: usize) -> Result<()> {
        let fits = self.mean.len() == channels && self.std.len() == channels;
        if !fits
            || !self.mean.iter().chain(&self.std).all(|x| x.is_finite())
            || self.std.iter().any(|&x| x <= 0.0)
        {
            return Err(Error::usage(format!(
                "means {:?} and deviations {:?} do not scale {channels} channels",
                self.mean, self.std
            ))
            .hint("give one number for each channel; deviations are positive"));
        }
        Ok(())
    }

    /// Some of the images, scaled, `[images, channels, height, width]`.
    pub fn tensor(&self, images: &Images, indices: &[usize], device: &Device) -> Tensor<4> {
        let [channels, height, width] = images.shape;
        let mut pixels = Vec::with_capacity(indices.len() * images.numel());
        for &index in indices {
            for (channel, plane) in images.image(index).chunks(height * width).enumerate() {
                let (mean, scale) = (self.mean[channel], 1.0 / self.std[channel]);
                pixels.extend(plane.iter().map(|x| (x - mean) * scale));
            }
        }
        Tensor::from_data(TensorData::new(pixels, [indices.len(), channels, height, width]), device)
    }
}

/// The images of each step, in an order of its own in every epoch.
pub struct Batches<'a> {
    images: &'a Images,
    scaling: &'a Scaling,
    size: usize,
    cx: &'a Context,
    /// The number of an epoch, and its order.
    epoch: Option<(usize, Vec<usize>)>,
}

impl<'a> Batches<'a> {
    /// Batches of `size` images, or of all where there are fewer.
    ///
    /// # Panics
    /// When there are no images or `size` is 0.
    pub fn new(images: &'a Images, scaling: &'a Scaling, size: usize, cx: &'a Context) -> Self {
        assert!(!images.is_empty() && size > 0, "a batch has images");
        Self { images, scaling, size: size.min(images.len()), cx, epoch: None }
    }

    /// Images of a batch.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Images to choose from.
    pub fn images(&self) -> &Images {
        self.images
    }

    /// Whole batches of an epoch; images that do not fill one wait for another epoch.
    pub fn per_epoch(&self) -> usize {
        self.images.len() / self.size
    }

    /// Images `[size, channels, height, width]` and classes `[size]` of a step.
    pub fn step(&mut self, step: usize) -> (Tensor<4>, Tensor<1, Int>) {
        let (epoch, place) = (step / self.per_epoch(), step % self.per_epoch());
        if self.epoch.as_ref().is_none_or(|(number, _)| *number != epoch) {
            let mut order: Vec<usize> = (0..self.images.len()).collect();
            order.shuffle(&mut self.cx.rng("epoch", epoch as u64));
            self.epoch = Some((epoch, order));
        }
        let order = self.epoch.as_ref().map_or(&[][..], |(_, order)| &order[..]);
        let chosen = &order[place * self.size..(place + 1) * self.size];
        let labels: Vec<i64> = chosen.iter().map(|&index| self.images.labels[index] as i64).collect();
        let labels = Tensor::from_data(TensorData::new(labels, [self.size]), &self.cx.device);
        (self.scaling.tensor(self.images, chosen, &self.cx.device), labels)
    }
}

/// Holds out a share of the images at random: the others, and those held out.
///
/// # Errors
/// When there are fewer than two, or the share is not between 0 and 1.
pub fn split(images: &Images, share: f64, cx: &Context) -> Result<(Images, Images)> {
    if !(share > 0.0 && share < 1.0) {
        return Err(Error::usage(format!("--val-fraction {share} is not between 0 and 1")));
    }
    if images.len() < 2 {
        return Err(Error::usage("one image is too few")
            .hint("one is held out for validation, others are learned from"));
    }
    let mut order: Vec<usize> = (0..images.len()).collect();
    order.shuffle(&mut cx.rng("split", 0));
    let held_out = ((images.len() as f64 * share).round() as usize).clamp(1, images.len() - 1);
    let (valid, train) = order.split_at(held_out);
    Ok((images.select(train), images.select(valid)))
}

/// The first images, or all where there are fewer.
pub fn first(images: &Images, count: usize) -> Images {
    images.select(&(0..images.len().min(count)).collect::<Vec<_>>())
}

/// Some of the images, chosen at random, or all where there are fewer: files often list one class after another.
pub fn sample(images: &Images, count: usize, rng: &mut impl Rng) -> Images {
    let mut order: Vec<usize> = (0..images.len()).collect();
    order.shuffle(rng);
    order.truncate(count);
    images.select(&order)
}

/// The embedded digits of 8 x 8 pixels: those that are trained on by custom, and the others.
pub(crate) fn embedded_digits() -> (Images, Images) {
    let images = |part: digits::Digits| Images {
        shape: [1, 8, 8],
        pixels: part.pixels.to_vec(),
        labels: part.labels.iter().map(|&label| label.into()).collect(),
        classes: (0..10).map(|digit| digit.to_string()).collect(),
        white: 16.0,
    };
    (images(digits::train()), images(digits::test()))
}

/// 16,000 training and 10,000 test images of Fashion-MNIST, where the shared data are at hand.
///
/// # Errors
/// When a file is there but damaged.
pub(crate) fn fashion() -> Result<Option<(Images, Images)>> {
    let Some(folder) = shared_dir().map(|dir| dir.join("data/fashion-mnist")).filter(|dir| dir.is_dir())
    else {
        return Ok(None);
    };
    let read = |name: &str| Images::read(&folder.join(name), &Default::default());
    Ok(Some((read("train16k-images-idx3-ubyte.gz")?, read("t10k-images-idx3-ubyte.gz")?)))
}
