//! Deformable registration under a condition: γ weighs how smooth the deformation is against how alike the images become
//! (§6 of the paper; Hoopes et al., HyperMorph, IPMI 2021). One network serves every trade-off.
//!
//! A U-Net sees a moving and a fixed image and makes a displacement `u` for every pixel; the loss is
//! `(1 - γ) mean (moving(x + u) - fixed(x))² + γ mean |∇u|²`.

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Context, Error, HostTensor, Result, TensorFile, Values};
use kiln_data::{ImageOptions, Images, read_npz};
use kiln_nn::Task;
use rand::{Rng, RngExt};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::classify::Sampling;
use crate::convert::MipHyper;
use crate::label_maps::LabelMaps;
use crate::proportionality::Probe;
use crate::scale::stems;
use crate::unet::UNet;

/// Pairs that pass through a network at once when nothing is learned.
const AT_ONCE: usize = 64;
/// Pairs that validation looks at.
const VALIDATION_PAIRS: usize = 128;

/// Two images, by their places.
pub type Pair = (usize, usize);

/// Pairs of images of one class, of one channel.
pub struct RegisterTask<'a> {
    /// Training images.
    pub train: &'a Images,
    /// Held out.
    pub valid: &'a Images,
    /// How conditions are drawn.
    pub sampling: Sampling,
    /// Pairs of a step, which share a condition.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
}

/// Checks that images can be registered.
///
/// # Errors
/// When they have several channels, are too small, or no class has two.
pub fn check(images: &Images) -> Result<()> {
    let [channels, height, width] = images.shape;
    if channels != 1 || height < 4 || width < 4 {
        let found =
            format!("images of {width} x {height} pixels with {channels} channels cannot be registered");
        return Err(Error::usage(found).hint("they need one channel and at least 4 x 4 pixels"));
    }
    let count = |class: usize| images.labels.iter().filter(|&&label| label == class).count();
    if !(0..images.classes.len()).any(|class| count(class) >= 2) {
        return Err(Error::usage("no class has two images").hint("pairs are drawn within a class"));
    }
    Ok(())
}

/// Images in pairs of one's own, the moving ones first: a folder with the folders `moving` and `fixed`, in which files have the
/// same names, or an `.npz` with arrays of these names. Every pair is a class, so that pairs drawn within classes are these.
/// `None` for other images.
///
/// # Errors
/// When a file cannot be read, an image has no partner, or partners differ in size.
pub fn read_pairs(path: &Path) -> Result<Option<Images>> {
    let parts = ["moving", "fixed"];
    let unlabelled = ImageOptions { unlabelled: true, ..ImageOptions::default() };
    let folders = parts.map(|part| path.join(part));
    let (images, names) = if folders.iter().all(|folder| folder.is_dir()) {
        let [names, others] = [stems(&folders[0])?, stems(&folders[1])?];
        if let Some(name) = names.iter().find(|name| !others.contains(name)) {
            return Err(Error::input(folders[1].display(), format!("has no partner for \"{name}\"")));
        }
        if let Some(name) = others.iter().find(|name| !names.contains(name)) {
            return Err(Error::input(folders[0].display(), format!("has no partner for \"{name}\"")));
        }
        ([Images::read(&folders[0], &unlabelled)?, Images::read(&folders[1], &unlabelled)?], names)
    } else if path.extension().is_some_and(|ending| ending == "npz") {
        let mut file = read_npz(path)?;
        if parts.iter().any(|part| file.get(part).is_none()) {
            return Ok(None);
        }
        let images = [array(&mut file, "moving", path)?, array(&mut file, "fixed", path)?];
        let names = (1..=images[0].len()).map(|number| number.to_string()).collect();
        (images, names)
    } else {
        return Ok(None);
    };
    let [moving, fixed] = images;
    if moving.shape != fixed.shape || moving.len() != fixed.len() {
        let found = format!(
            "{} moving images of {:?}, {} fixed ones of {:?}",
            moving.len(),
            moving.shape,
            fixed.len(),
            fixed.shape
        );
        return Err(Error::input(path.display(), found).hint("pairs need images of the same size"));
    }
    let count = moving.len();
    let pixels = [moving.pixels, fixed.pixels].concat();
    let labels = (0..count).chain(0..count).collect();
    Ok(Some(Images { pixels, labels, classes: names, shape: moving.shape, white: moving.white }))
}

/// Images of an array `[n, height, width]`, whole numbers from 0 to 255 or brightness from 0 to 1.
fn array(file: &mut TensorFile, name: &str, path: &Path) -> Result<Images> {
    let HostTensor { shape, values } = file.take(name)?;
    let refused = |found: String| Err(Error::input(path.display(), format!("\"{name}\" {found}")));
    let [_, height, width] = shape[..] else {
        return refused(format!("has the shape {shape:?}, expected [n, height, width]"));
    };
    let (pixels, white) = match values {
        Values::Float(pixels) => (pixels, 1.0),
        Values::Int(pixels) => (pixels.iter().map(|&x| x as f32 / 255.0).collect(), 255.0),
    };
    if pixels.is_empty() || !pixels.iter().all(|x| x.is_finite()) {
        return refused("is empty, or has a pixel that is no number".into());
    }
    Ok(Images { shape: [1, height, width], pixels, labels: Vec::new(), classes: Vec::new(), white })
}

/// The pairs of [`read_pairs`], moving before fixed.
pub fn own_pairs(images: &Images) -> Vec<Pair> {
    let count = images.classes.len();
    (0..count).map(|pair| (pair, count + pair)).collect()
}

/// Draws pairs of different images of one class.
pub fn draw_pairs(images: &Images, count: usize, rng: &mut impl Rng) -> Vec<Pair> {
    let draw = |rng: &mut _| loop {
        let (a, b) = (RngExt::random_range(rng, 0..images.len()), RngExt::random_range(rng, 0..images.len()));
        if a != b && images.labels[a] == images.labels[b] {
            return (a, b);
        }
    };
    (0..count).map(|_| draw(rng)).collect()
}

/// Moving and fixed images of pairs, each `[pairs, 1, height, width]`.
pub fn tensors(images: &Images, pairs: &[Pair], device: &Device) -> [Tensor<4>; 2] {
    let [channels, height, width] = images.shape;
    let take = |places: Vec<usize>| {
        let pixels = images.select(&places).pixels;
        Tensor::from_data(TensorData::new(pixels, [pairs.len(), channels, height, width]), device)
    };
    [take(pairs.iter().map(|pair| pair.0).collect()), take(pairs.iter().map(|pair| pair.1).collect())]
}

/// What a network makes of pairs.
pub struct Registered {
    /// `moving(x + u)`, `[pairs, 1, height, width]`
    pub moved: Tensor<4>,
    /// u in pixels, `[pairs, 2, height, width]`: along the width, then along the height
    pub field: Tensor<4>,
}

/// Registers pairs.
pub fn register(net: &UNet, moving: Tensor<4>, fixed: Tensor<4>) -> Registered {
    let field = net.forward(Tensor::cat(vec![moving.clone(), fixed], 1));
    Registered { moved: warped(moving, field.clone()), field }
}

/// `image(x + u)`, bilinearly; beyond the border it goes on as at the border. Gradients reach u, not the image.
///
/// # Shapes
/// - image, output: `[images, 1, height, width]`
/// - field: `[images, 2, height, width]`, in pixels
pub fn warped(image: Tensor<4>, field: Tensor<4>) -> Tensor<4> {
    let [images, _, height, width] = image.dims();
    let device = image.device();
    let axis = |extent: usize| Tensor::<1, Int>::arange(0..extent as i64, &device).float();
    let x = field.clone().narrow(1, 0, 1) + axis(width).reshape([1, 1, 1, width]);
    let y = field.narrow(1, 1, 1) + axis(height).reshape([1, 1, height, 1]);
    let (x, y) = (x.clamp(0.0, width as f32 - 1.0), y.clamp(0.0, height as f32 - 1.0));
    let (left, top) = (x.clone().floor().without_autodiff(), y.clone().floor().without_autodiff());
    let flat = image.reshape([images, height * width]);
    let corner = |dx: f32, dy: f32| {
        let column = (left.clone() + dx).clamp_max(width as f32 - 1.0);
        let row = (top.clone() + dy).clamp_max(height as f32 - 1.0);
        let place = (row * width as f32 + column).int().reshape([images, height * width]);
        flat.clone().gather(1, place).reshape([images, 1, height, width])
    };
    let (right_share, low_share) = (x - left.clone(), y - top.clone());
    let across = |a: Tensor<4>, b: Tensor<4>| a.clone() + (b - a) * right_share.clone();
    let above = across(corner(0.0, 0.0), corner(1.0, 0.0));
    let below = across(corner(0.0, 1.0), corner(1.0, 1.0));
    above.clone() + (below - above) * low_share
}

/// Mean squared difference of neighbours in a field, along both axes.
pub fn roughness(field: Tensor<4>) -> Tensor<1> {
    let [.., height, width] = field.dims();
    let along = |axis: usize, extent: usize| {
        let ahead = field.clone().narrow(axis, 1, extent - 1) - field.clone().narrow(axis, 0, extent - 1);
        ahead.powi_scalar(2).mean()
    };
    along(2, height) + along(3, width)
}

/// The loss of a condition.
fn objective(net: &UNet, [moving, fixed]: [Tensor<4>; 2], gamma: f32) -> Tensor<1> {
    let Registered { moved, field } = register(net, moving, fixed.clone());
    (moved - fixed).powi_scalar(2).mean() * (1.0 - gamma) + roughness(field) * gamma
}

/// Runs a network on pairs, with likeness alone for a loss: what does not depend on the condition itself.
pub fn probe(net: &UNet, images: &Images, pairs: &[Pair], cx: &Context) -> Probe {
    let [moving, fixed] = tensors(images, pairs, &cx.device);
    let (field, activations) = net.traced(Tensor::cat(vec![moving.clone(), fixed.clone()], 1), None);
    let loss = (warped(moving, field) - fixed).powi_scalar(2).mean();
    Probe { activations, loss }
}

impl Task<MipHyper<UNet>> for RegisterTask<'_> {
    fn loss(&mut self, model: &MipHyper<UNet>, step: usize) -> Result<(Tensor<1>, usize)> {
        let mut rng = self.cx.rng("step", step as u64);
        let gamma = self.sampling.draw(1, &mut rng);
        let pairs = draw_pairs(self.train, self.batch, &mut rng);
        let net = model.instantiate(Tensor::<1>::from_floats(gamma.as_slice(), &self.cx.device))?;
        Ok((objective(&net, tensors(self.train, &pairs, &self.cx.device), gamma[0]), self.batch))
    }

    fn validate(&mut self, model: &MipHyper<UNet>) -> Result<f64> {
        let pairs = draw_pairs(self.valid, VALIDATION_PAIRS, &mut self.cx.rng("validation pairs", 0));
        let mut sum = 0.0;
        let conditions = [0.0, 0.25, 0.5, 0.75, 1.0];
        for gamma in conditions {
            let net = model.instantiate(Tensor::<1>::from_floats([gamma], &self.cx.device))?;
            let loss = objective(&net, tensors(self.valid, &pairs, &self.cx.device), gamma);
            sum += f64::from(loss.into_scalar::<f32>()) / conditions.len() as f64;
        }
        Ok(sum)
    }

    fn settings(&self) -> Map<String, Value> {
        let settings = json!({ "batch": self.batch, "images": self.train.len(), "sampling": self.sampling });
        settings.as_object().cloned().unwrap_or_default()
    }
}

/// How well pairs were registered.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quality {
    /// Mean squared difference of moved and fixed images.
    pub difference: f64,
    /// The same before registration.
    pub difference_before: f64,
    /// Mean squared difference of neighbouring displacements.
    pub roughness: f64,
    /// Share of pixels at which space is folded: the determinant of the deformation's Jacobian is not positive.
    pub folded: f64,
    /// Dice of moved and fixed label maps, the mean over labels and pairs, where there are maps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dice: Option<f64>,
    /// The same before registration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dice_before: Option<f64>,
}

/// Registers pairs under one condition, and measures how well; with label maps also how their labels come to overlap.
///
/// # Errors
/// As [`MipHyper::instantiate`].
pub fn quality(
    model: &MipHyper<UNet>,
    images: &Images,
    pairs: &[Pair],
    maps: Option<&LabelMaps>,
    gamma: f32,
    cx: &Context,
) -> Result<Quality> {
    let net = model.instantiate(Tensor::<1>::from_floats([gamma], &cx.device))?;
    let mut sums = [0.0f64; 6];
    for chunk in pairs.chunks(AT_ONCE) {
        let [moving, fixed] = tensors(images, chunk, &cx.device);
        let Registered { moved, field } = register(&net, moving.clone(), fixed.clone());
        let square = |a: Tensor<4>| f64::from((a - fixed.clone()).powi_scalar(2).mean().into_scalar::<f32>());
        let overlaps = maps.map_or([0.0; 2], |maps| {
            let displacements: Vec<f32> = field.clone().into_data().iter().collect();
            let still = vec![0.0; displacements.len()];
            [&displacements, &still].map(|field| maps.overlap(chunk, field))
        });
        let found = [
            square(moved),
            square(moving),
            roughness(field.clone()).into_scalar::<f32>().into(),
            folded(field),
            overlaps[0],
            overlaps[1],
        ];
        sums.iter_mut().zip(found).for_each(|(sum, x)| *sum += x * chunk.len() as f64 / pairs.len() as f64);
    }
    let [difference, difference_before, roughness, folded, dice, dice_before] = sums;
    let [dice, dice_before] = [dice, dice_before].map(|dice| maps.map(|_| dice));
    Ok(Quality { difference, difference_before, roughness, folded, dice, dice_before })
}

/// Share of pixels, the last row and column left out, whose Jacobian `∂(x + u)` has a determinant of at most 0.
fn folded(field: Tensor<4>) -> f64 {
    let [pairs, _, height, width] = field.dims();
    let values: Vec<f32> = field.into_data().iter().collect();
    let at = |pair: usize, axis: usize, row: usize, column: usize| {
        values[((pair * 2 + axis) * height + row) * width + column]
    };
    let mut count = 0usize;
    for pair in 0..pairs {
        for row in 0..height - 1 {
            for column in 0..width - 1 {
                let slope = |axis, down, right| {
                    at(pair, axis, row + down, column + right) - at(pair, axis, row, column)
                };
                let (xx, xy) = (1.0 + slope(0, 0, 1), slope(0, 1, 0));
                let (yx, yy) = (slope(1, 0, 1), 1.0 + slope(1, 1, 0));
                count += usize::from(xx * yy - xy * yx <= 0.0);
            }
        }
    }
    count as f64 / (pairs * (height - 1) * (width - 1)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Tensor<4> {
        let values: Vec<f32> = (0..20).map(|i| ((i * 7) % 11) as f32).collect();
        Tensor::from_data(TensorData::new(values, [1, 1, 4, 5]), &Device::flex())
    }

    fn values(x: Tensor<4>) -> Vec<f32> {
        x.into_data().iter().collect()
    }

    #[test]
    fn no_displacement_leaves_an_image_and_a_whole_one_shifts_it() {
        let (image, device) = (image(), Device::flex());
        let still = Tensor::zeros([1, 2, 4, 5], &device);
        assert_eq!(values(warped(image.clone(), still.clone())), values(image.clone()));
        let right =
            Tensor::cat(vec![Tensor::ones([1, 1, 4, 5], &device), Tensor::zeros([1, 1, 4, 5], &device)], 1);
        let shifted = values(warped(image.clone(), right));
        let original = values(image);
        for row in 0..4 {
            assert_eq!(shifted[row * 5..row * 5 + 4], original[row * 5 + 1..row * 5 + 5]);
            assert_eq!(shifted[row * 5 + 4], original[row * 5 + 4]); // the border goes on
        }
        assert_eq!(roughness(still.clone()).into_scalar::<f32>(), 0.0);
        assert_eq!(folded(still), 0.0);
    }

    #[test]
    fn the_gradient_of_the_displacement_is_the_slope() {
        let device = Device::flex();
        let field = Tensor::<4>::full([1, 2, 4, 5], 0.3, &device);
        let objective = |field: Tensor<4>| warped(image(), field).powi_scalar(2).sum();
        let parameter = Tensor::<4>::full([1, 2, 4, 5], 0.3, &Device::flex().autodiff()).require_grad();
        let gradient = parameter.grad(&objective(parameter.clone()).backward()).unwrap();
        let slope = |step: f32| objective(field.clone() + gradient.clone() * step).into_scalar::<f32>();
        let norm = gradient.clone().powi_scalar(2).sum().into_scalar::<f32>();
        let step = 1e-4;
        let measured = (slope(step) - slope(-step)) / (2.0 * step);
        assert!((measured - norm).abs() < 0.02 * norm, "{measured} against {norm}");
    }

    #[test]
    fn a_mirrored_field_is_folded_everywhere() {
        // x + u = -x
        let device = Device::flex();
        let x =
            Tensor::<1, Int>::arange(0..5, &device).float().reshape([1, 1, 1, 5]).expand([1, 1, 4, 5]) * -2.0;
        let field = Tensor::cat(vec![x, Tensor::zeros([1, 1, 4, 5], &device)], 1);
        assert_eq!(folded(field), 1.0);
    }
}
