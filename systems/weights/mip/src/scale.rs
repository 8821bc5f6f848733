//! Segmentation at a scale of one's choice (Ortiz, Guttag, Dalca, "Scale-Space Hypernetworks for Efficient Biomedical Image
//! Segmentation", arXiv 2304.05448): γ is the factor by which a U-Net shrinks its images on each way down. One hypernetwork
//! makes the weights for all factors, and a user picks how much accuracy a task needs and what it may cost.
//!
//! The loss is the cross-entropy of the pixels plus `1 - Dice`, with the sums of Dice over soft predictions.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData, activation};
use kiln_core::{Context, Error, Result};
use kiln_data::{ImageOptions, Images, read_npz};
use kiln_nn::Task;
use rand::{Rng, RngExt};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::classify::Sampling;
use crate::convert::MipHyper;
use crate::proportionality::Probe;
use crate::unet::UNet;

/// Images that pass through a network at once when nothing is learned.
const AT_ONCE: usize = 64;
/// Conditions that validation looks at.
const CONDITIONS: [f32; 5] = [0.1, 0.25, 0.5, 0.75, 1.0];

/// Images with what belongs to an object in each.
#[derive(Debug, Clone)]
pub struct Scans {
    /// The images.
    pub images: Images,
    /// 1 where there is an object, `[images, height, width]`
    pub masks: Vec<f32>,
    /// Names of the images' files, where they are files.
    pub names: Vec<String>,
}

impl Scans {
    /// Reads images with masks: a folder with the folders `images` and `masks`, in which files have the same names, or an
    /// `.npz` with `x` as [`Images::read`] has it and `mask [n, height, width]`. More than half of white is an object.
    ///
    /// # Errors
    /// When a file cannot be read, a mask is missing or has another size.
    pub fn read(path: &Path) -> Result<Self> {
        let unlabelled = ImageOptions { unlabelled: true, ..ImageOptions::default() };
        if !path.is_dir() {
            let images = Images::read(path, &unlabelled)?;
            let mask = read_npz(path)?.take("mask")?;
            let [_, height, width] = images.shape;
            if mask.shape != [images.len(), height, width] {
                let found = format!("\"mask\" has the shape {:?}", mask.shape);
                return Err(Error::input(path.display(), found)
                    .hint(format!("expected [{}, {height}, {width}]", images.len())));
            }
            let masks = match mask.as_floats() {
                Some(values) => halved(values.iter().map(|&x| f64::from(x))),
                None => halved(mask.as_ints().unwrap_or_default().iter().map(|&x| x as f64)),
            };
            return Ok(Self { names: Vec::new(), images, masks });
        }
        let folder = |name: &str| {
            let folder = path.join(name);
            folder.is_dir().then_some(folder).ok_or_else(|| {
                Error::input(path.display(), format!("has no folder \"{name}\""))
                    .hint("expected the folders images and masks, with files of the same names")
            })
        };
        let (pictures, drawings) = (folder("images")?, folder("masks")?);
        let (names, mask_names) = (stems(&pictures)?, stems(&drawings)?);
        if let Some(name) = names.iter().find(|name| !mask_names.contains(name)) {
            return Err(Error::input(drawings.display(), format!("has no mask for \"{name}\"")));
        }
        if let Some(name) = mask_names.iter().find(|name| !names.contains(name)) {
            return Err(Error::input(pictures.display(), format!("has no image for the mask \"{name}\"")));
        }
        let images = Images::read(&pictures, &unlabelled)?;
        let drawn = Images::read(&drawings, &unlabelled)?;
        if images.shape[1..] != drawn.shape[1..] || images.len() != drawn.len() {
            let found = format!("{} masks of {:?}", drawn.len(), &drawn.shape[1..]);
            return Err(Error::input(drawings.display(), found).hint(format!(
                "there are {} images of {:?}, height first",
                images.len(),
                &images.shape[1..]
            )));
        }
        let plane = drawn.shape[1] * drawn.shape[2];
        let first = (0..drawn.len()).flat_map(|i| drawn.image(i)[..plane].to_vec());
        let masks = halved(first.map(f64::from));
        Ok(Self { images, masks, names })
    }

    /// Bright discs on a noisy ground, among bars that are as bright but no objects, 32 × 32 pixels.
    pub fn discs(count: usize, rng: &mut impl Rng) -> Self {
        const SIZE: usize = 32;
        let (mut pixels, mut masks) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let mut discs = Vec::new();
            for _ in 0..rng.random_range(1..=3) {
                let radius: f32 = rng.random_range(2.0..6.0);
                let mut place = || rng.random_range(radius..SIZE as f32 - radius);
                discs.push((place(), place(), radius));
            }
            let bar = (rng.random_range(0..SIZE), rng.random_range(1..4), rng.random_bool(0.5));
            for row in 0..SIZE {
                for column in 0..SIZE {
                    let inside = |&(x, y, radius): &(f32, f32, f32)| {
                        (column as f32 - x).hypot(row as f32 - y) <= radius
                    };
                    let object = discs.iter().any(inside);
                    let across = if bar.2 { row } else { column };
                    let bright = object || (bar.0..bar.0 + bar.1).contains(&across);
                    let level = if bright { 0.6 } else { 0.3 };
                    pixels.push((level + 0.3 * (rng.random::<f32>() - 0.5)).clamp(0.0, 1.0));
                    masks.push(f32::from(u8::from(object)));
                }
            }
        }
        let images =
            Images { shape: [1, SIZE, SIZE], pixels, labels: Vec::new(), classes: Vec::new(), white: 1.0 };
        Self { images, masks, names: Vec::new() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// These images, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let plane = self.images.shape[1] * self.images.shape[2];
        Self {
            images: self.images.select(indices),
            masks: indices.iter().flat_map(|&i| self.masks[i * plane..(i + 1) * plane].to_vec()).collect(),
            names: if self.names.is_empty() {
                Vec::new()
            } else {
                indices.iter().map(|&i| self.names[i].clone()).collect()
            },
        }
    }

    /// `[images, 1, height, width]`
    fn mask_tensor(&self, device: &Device) -> Tensor<4> {
        let [_, height, width] = self.images.shape;
        Tensor::from_data(TensorData::new(self.masks.clone(), [self.len(), 1, height, width]), device)
    }
}

/// Images as a tensor, `[images, channels, height, width]`.
pub fn tensor(images: &Images, device: &Device) -> Tensor<4> {
    let [channels, height, width] = images.shape;
    Tensor::from_data(TensorData::new(images.pixels.clone(), [images.len(), channels, height, width]), device)
}

/// 1 for what exceeds half of the largest value.
fn halved(values: impl Iterator<Item = f64> + Clone) -> Vec<f32> {
    let half = values.clone().fold(0.0, f64::max) / 2.0;
    values.map(|x| f32::from(u8::from(x > half))).collect()
}

/// Names of the files of a folder without their endings, in order.
pub fn stems(folder: &Path) -> Result<Vec<String>> {
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        if matches!(ending.as_deref(), Some("png" | "jpg" | "jpeg")) {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            if let Some(other) = names.insert(stem, path.clone()) {
                return Err(Error::input(path.display(), format!("has the name of {}", other.display())));
            }
        }
    }
    Ok(names.into_keys().collect())
}

/// Checks that images can be segmented.
///
/// # Errors
/// When there are too few, they are too small, or no pixel or every pixel is an object.
pub fn check(scans: &Scans) -> Result<()> {
    let [_, height, width] = scans.images.shape;
    if height < 4 || width < 4 {
        return Err(Error::usage(format!("images of {width} x {height} pixels cannot be segmented"))
            .hint("they need at least 4 x 4 pixels"));
    }
    if scans.len() < 2 {
        return Err(Error::usage("one image is too few")
            .hint("one is held out for validation, others are learned from"));
    }
    let marked = scans.masks.iter().filter(|&&x| x > 0.5).count();
    if marked == 0 || marked == scans.masks.len() {
        let found = if marked == 0 { "no pixel" } else { "every pixel" };
        return Err(
            Error::usage(format!("{found} of the masks is an object")).hint("there is nothing to learn")
        );
    }
    Ok(())
}

/// Images to segment under a factor that is drawn in every step.
pub struct ScaleTask<'a> {
    /// Training images.
    pub train: &'a Scans,
    /// Held out.
    pub valid: &'a Scans,
    /// How factors are drawn.
    pub sampling: Sampling,
    /// Images of a step, which share a factor.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
}

/// Cross-entropy of the pixels plus one minus the Dice of soft predictions.
fn objective(logits: Tensor<4>, mask: Tensor<4>) -> Tensor<1> {
    // -log σ(x) for objects, -log(1 - σ(x)) elsewhere, without overflow.
    let entropy = activation::relu(logits.clone()) - logits.clone() * mask.clone()
        + logits.clone().abs().neg().exp().log1p();
    let soft = activation::sigmoid(logits);
    let both = (soft.clone() * mask.clone()).sum() * 2.0 + 1.0;
    entropy.mean() + 1.0 - both / (soft.sum() + mask.sum() + 1.0)
}

impl ScaleTask<'_> {
    /// The factor and the images of a step.
    fn draw(&self, step: usize) -> (f32, Scans) {
        let mut rng = self.cx.rng("step", step as u64);
        let gamma = self.sampling.draw(1, &mut rng)[0];
        let chosen: Vec<usize> = (0..self.batch).map(|_| rng.random_range(0..self.train.len())).collect();
        (gamma, self.train.select(&chosen))
    }

    /// The loss of a network on images that shrink to a factor.
    fn loss_at(&self, net: &UNet, scans: &Scans, gamma: f32) -> Tensor<1> {
        let logits = net.forward_at(tensor(&scans.images, &self.cx.device), gamma.into());
        objective(logits, scans.mask_tensor(&self.cx.device))
    }

    /// The mean loss of the images held out.
    fn held_out(&self, net: &UNet, gamma: f32) -> f64 {
        let all: Vec<usize> = (0..self.valid.len()).collect();
        let of = |chunk: &[usize]| {
            let loss = self.loss_at(net, &self.valid.select(chunk), gamma).into_scalar::<f32>();
            f64::from(loss) * chunk.len() as f64 / all.len() as f64
        };
        all.chunks(AT_ONCE).map(of).sum()
    }
}

/// Runs a network on images at half their size: what does not depend on the condition itself.
pub fn probe(net: &UNet, scans: &Scans, cx: &Context) -> Probe {
    let (logits, activations) = net.traced(tensor(&scans.images, &cx.device), Some(0.5));
    Probe { activations, loss: objective(logits, scans.mask_tensor(&cx.device)) }
}

impl Task<MipHyper<UNet>> for ScaleTask<'_> {
    fn loss(&mut self, model: &MipHyper<UNet>, step: usize) -> Result<(Tensor<1>, usize)> {
        let (gamma, scans) = self.draw(step);
        let net = model.instantiate(Tensor::<1>::from_floats([gamma], &self.cx.device))?;
        Ok((self.loss_at(&net, &scans, gamma), self.batch))
    }

    fn validate(&mut self, model: &MipHyper<UNet>) -> Result<f64> {
        let losses = CONDITIONS.iter().map(|&gamma| {
            let net = model.instantiate(Tensor::<1>::from_floats([gamma], &self.cx.device))?;
            Ok(self.held_out(&net, gamma))
        });
        Ok(losses.collect::<Result<Vec<f64>>>()?.iter().sum::<f64>() / CONDITIONS.len() as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let settings = json!({ "batch": self.batch, "images": self.train.len(), "sampling": self.sampling });
        settings.as_object().cloned().unwrap_or_default()
    }
}

/// The same training without a hypernetwork, what a conditioned network is compared with.
pub struct PlainScaleTask<'a> {
    /// Images, and how those of a step are drawn; the factors too.
    pub images: ScaleTask<'a>,
    /// The factor of every step, where it is always the same.
    pub factor: Option<f32>,
}

impl Task<UNet> for PlainScaleTask<'_> {
    fn loss(&mut self, net: &UNet, step: usize) -> Result<(Tensor<1>, usize)> {
        let (drawn, scans) = self.images.draw(step);
        Ok((self.images.loss_at(net, &scans, self.factor.unwrap_or(drawn)), self.images.batch))
    }

    fn validate(&mut self, net: &UNet) -> Result<f64> {
        let factors = self.factor.map_or(CONDITIONS.to_vec(), |factor| vec![factor]);
        let losses: f64 = factors.iter().map(|&gamma| self.images.held_out(net, gamma)).sum();
        Ok(losses / factors.len() as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        Task::<MipHyper<UNet>>::settings(&self.images)
    }
}

/// How well images were segmented at one factor, and what it cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quality {
    /// Twice the pixels in both masks over the pixels of both, over all images.
    pub dice: f64,
    /// The pixels in both masks over those in either.
    pub iou: f64,
    /// Multiplications and additions of the convolutions for an image.
    pub operations: u64,
}

/// Masks of images at one factor: 1 where an object is likelier than not, `[images, height, width]`.
///
/// # Errors
/// As [`MipHyper::instantiate`].
pub fn segment(model: &MipHyper<UNet>, images: &Images, gamma: f32, cx: &Context) -> Result<Vec<bool>> {
    let net = model.instantiate(Tensor::<1>::from_floats([gamma], &cx.device))?;
    Ok(segment_plainly(&net, images, gamma, cx))
}

/// Masks of images by a network without a hypernetwork.
fn segment_plainly(net: &UNet, images: &Images, gamma: f32, cx: &Context) -> Vec<bool> {
    let all: Vec<usize> = (0..images.len()).collect();
    let mut masks = Vec::new();
    for chunk in all.chunks(AT_ONCE) {
        let logits = net.forward_at(tensor(&images.select(chunk), &cx.device), gamma.into());
        masks.extend(logits.into_data().iter::<f32>().map(|x| x > 0.0));
    }
    masks
}

/// Segments images with masks at one factor, and measures how well.
///
/// # Errors
/// As [`segment`].
pub fn quality(model: &MipHyper<UNet>, scans: &Scans, gamma: f32, cx: &Context) -> Result<Quality> {
    let net = model.instantiate(Tensor::<1>::from_floats([gamma], &cx.device))?;
    Ok(quality_plainly(&net, scans, gamma, cx))
}

/// The same of a network without a hypernetwork.
pub fn quality_plainly(net: &UNet, scans: &Scans, gamma: f32, cx: &Context) -> Quality {
    let found = segment_plainly(net, &scans.images, gamma, cx);
    let [_, height, width] = scans.images.shape;
    let (dice, iou) = overlap(&found, &scans.masks);
    Quality { dice, iou, operations: net.operations([height, width], gamma.into()) }
}

/// Dice and intersection over union of two masks; 1 where both are empty.
fn overlap(found: &[bool], masks: &[f32]) -> (f64, f64) {
    let (mut both, mut sum) = (0.0, 0.0);
    for (&found, &mask) in found.iter().zip(masks) {
        let mask = mask > 0.5;
        both += f64::from(u8::from(found && mask));
        sum += f64::from(u8::from(found)) + f64::from(u8::from(mask));
    }
    if sum == 0.0 { (1.0, 1.0) } else { (2.0 * both / sum, both / (sum - both)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_by_hand() {
        let (dice, iou) = overlap(&[true, true, false, false], &[1.0, 0.0, 1.0, 0.0]);
        assert_eq!((dice, iou), (0.5, 1.0 / 3.0));
        assert_eq!(overlap(&[false], &[0.0]), (1.0, 1.0));
    }

    #[test]
    fn sure_and_right_costs_nothing_and_doubt_log_two() {
        let device = Device::flex();
        let mask = Tensor::<1>::from_floats([1.0, 0.0, 0.0, 1.0], &device).reshape([1, 1, 2, 2]);
        let sure = (mask.clone() - 0.5) * 200.0;
        assert!(objective(sure, mask.clone()).into_scalar::<f32>() < 1e-4);
        let doubt = objective(mask.zeros_like(), mask).into_scalar::<f32>();
        // Dice of halves: (2·1 + 1) / (2 + 2 + 1).
        assert!((doubt - (2f32.ln() + 1.0 - 0.6)).abs() < 1e-5, "{doubt}");
    }

    #[test]
    fn discs_are_marked_and_bars_are_not() {
        let scans = Scans::discs(20, &mut kiln_core::random_stream(0, "test", 0));
        check(&scans).unwrap();
        let share = scans.masks.iter().sum::<f32>() / scans.masks.len() as f32;
        let bright = scans.images.pixels.iter().filter(|&&x| x > 0.5).count() as f32;
        assert!(share > 0.02 && share < bright / scans.masks.len() as f32);
    }
}
