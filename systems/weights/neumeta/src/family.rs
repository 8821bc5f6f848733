//! A family of networks: the implicit function beside the network that it was made from.

use burn::tensor::{Device, Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::arch::{NetConfig, Size};
use crate::coords::{NoiseOn, WeightCoords};
use crate::graph::TensorSpec;
use crate::inr::{Inr, InrConfig, crop};
use crate::network::{Plain, vector};

/// Widths up to so many times the full one are written, with a warning.
const BEYOND: f64 = 1.5;

/// What the implicit function is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseTerm {
    /// Nothing: it writes all of a weight, as published
    None,
    /// The ordered weights of the full network, averaged over the same place
    Interp,
    /// The ordered weights of the full network, the nearest to the same place
    Nearest,
}

/// Which of the numbers that the function writes at a coordinate a smaller kernel takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelCrop {
    /// The middle of the row of them, as published: a 3 x 3 kernel the numbers 8 to 16 of 25
    #[default]
    Flat,
    /// Those that lie in the middle of the full kernel, so that a number means the same place in all kernels
    Middle,
    /// Those in the middle, and added to each all that lie nearest to it beyond: on a picture without detail the same
    Fold,
}

/// Configuration of a [`Family`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FamilyConfig {
    /// What its networks are for, and how they are built.
    #[serde(flatten)]
    pub net: NetConfig,
    /// Width of the network that it was made from.
    pub full: usize,
    /// Widths that are trained.
    pub widths: Vec<usize>,
    /// Depths that are trained; none where the network has none to choose, or only its own.
    pub depths: Vec<usize>,
    /// Extents of kernels that are trained; none where only whole kernels are.
    #[serde(default)]
    pub kernels: Vec<usize>,
    /// What a kernel smaller than the full network's takes of what is written.
    #[serde(default)]
    pub kernel_crop: KernelCrop,
    /// The implicit function.
    pub inr: InrConfig,
    /// What it is added to.
    pub base: BaseTerm,
    /// Whether its output is multiplied by the spread of the full network's tensors.
    pub output_scale: bool,
    /// How far coordinates are moved, at most half of it in each direction.
    pub noise: f64,
    /// Which of their numbers are.
    pub noise_on: NoiseOn,
}

/// Where a tensor comes from while a family is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From the implicit function, which learns from it.
    Learned,
    /// From the implicit function as it is.
    Written,
    /// From the base alone.
    Base,
}

/// A family of networks.
#[derive(Debug, Clone)]
pub struct Family {
    /// Its configuration.
    pub config: FamilyConfig,
    /// The full network, with its channels in order.
    pub base: Plain,
    specs: Vec<TensorSpec>,
    /// For each tensor of the base, the spread of `W C_in`.
    spreads: Vec<f32>,
}

impl Family {
    /// A family around the full network `base`.
    ///
    /// # Errors
    /// When the configuration does not fit it.
    pub fn new(config: FamilyConfig, base: Plain) -> Result<Self> {
        config.inr.check()?;
        if !(config.noise.is_finite() && config.noise >= 0.0) {
            return Err(Error::usage(format!("--noise {} is no number of at least 0", config.noise)));
        }
        let specs = config.net.build(Size::new(config.full))?.graph.tensors();
        if base.config != config.net
            || base.size != Size::new(config.full)
            || config.inr.tensors != specs.len()
        {
            return Err(Error::usage("the base is not the full network of this family"));
        }
        let spread = |(spec, values): (&TensorSpec, &Vec<f32>)| {
            let [_, inputs, _] = spec.extents();
            let count = values.len() as f64;
            let mean = values.iter().map(|&w| f64::from(w)).sum::<f64>() / count;
            let variance = values.iter().map(|&w| (f64::from(w) - mean).powi(2)).sum::<f64>() / count;
            (variance.sqrt() * inputs as f64) as f32
        };
        let spreads = specs.iter().zip(&base.tensors).map(spread).collect();
        Ok(Self { config, base, specs, spreads })
    }

    /// The configuration of an implicit function for this kind of network, of the paper's size.
    ///
    /// # Errors
    /// When there is no such network.
    pub fn inr_config(net: &NetConfig, full: usize) -> Result<InrConfig> {
        let graph = net.build(Size::new(full))?.graph;
        let taps = graph.layers().iter().map(crate::graph::Layer::taps).max().unwrap_or(1);
        Ok(InrConfig::new(graph.tensors().len(), taps, full as f64))
    }

    /// An untrained implicit function; added to a base, it writes 0.
    pub fn draw(&self, device: &Device, rng: &mut impl Rng) -> Inr {
        self.config.inr.init(self.config.base != BaseTerm::None, device, rng)
    }

    /// The full network's size.
    pub fn full(&self) -> Size {
        Size::new(self.config.full)
    }

    /// The sizes by which a function is judged: the narrowest, one in the middle and the full width, and where depths or
    /// kernels are trained, the full width with the fewest blocks and with the smallest kernels.
    pub fn judged(&self) -> Vec<Size> {
        let FamilyConfig { net, full, widths, depths, kernels, .. } = &self.config;
        let mut sizes = [widths[0], widths[widths.len() / 2], *full].map(Size::new).to_vec();
        let least = |numbers: &[usize]| numbers.iter().min().copied();
        let shallow = least(depths).map(|depth| Size { depth: Some(depth), ..self.full() });
        let small = least(kernels).map(|kernel| Size { kernel: Some(kernel), ..self.full() });
        let ends = [shallow, small].into_iter().flatten().map(|size| net.plainly(size));
        sizes.extend(ends.filter(|&size| size != self.full()));
        sizes
    }

    /// Checks that a network of this size can be written; warns when it is larger than any seen.
    ///
    /// # Errors
    /// When it is more than half as wide again as the full one, or there is none of that size.
    pub fn check(&self, size: Size, cx: &Context) -> Result<()> {
        let most = (self.config.full as f64 * BEYOND) as usize;
        if size.width > most {
            return Err(Error::usage(format!("width {} is too far beyond the full network's", size.width))
                .hint(format!("widths are 1 to {most}, and {} is the full one", self.config.full)));
        }
        self.config.net.build(size)?;
        if size.width > self.config.full {
            cx.note(format!("width {} is larger than the full network: expect less of it", size.width));
        }
        Ok(())
    }

    /// The tensors of a network of this size; `noise` moves the coordinates, and gradients flow where `source` says.
    ///
    /// # Errors
    /// When there is no network of that size.
    pub fn write(
        &self,
        inr: &Inr,
        size: Size,
        mut noise: Option<&mut dyn Rng>,
        source: impl Fn(usize) -> Source,
        device: &Device,
    ) -> Result<Vec<Tensor<1>>> {
        let specs = self.config.net.build(size)?.graph.tensors();
        let count = specs.len();
        let mut tensors = Vec::with_capacity(count);
        for spec in &specs {
            let index = self.index(spec)?;
            let mut coords = WeightCoords::of(index, count, spec);
            if let Some(rng) = &mut noise {
                coords.jitter(self.config.noise, self.config.noise_on, rng);
            }
            tensors.push(match source(index) {
                Source::Base => vector(&self.sampled_base(index, spec), device),
                Source::Written => self.tensor(inr, index, spec, &coords, device).detach(),
                Source::Learned => self.tensor(inr, index, spec, &coords, device),
            });
        }
        Ok(tensors)
    }

    /// The number that a tensor has in the full network.
    fn index(&self, spec: &TensorSpec) -> Result<usize> {
        let found = self.specs.iter().position(|full| full.name == spec.name);
        found.ok_or_else(|| Error::work(format!("the full network has no tensor \"{}\"", spec.name)))
    }

    fn tensor(
        &self,
        inr: &Inr,
        index: usize,
        spec: &TensorSpec,
        coords: &WeightCoords,
        device: &Device,
    ) -> Tensor<1> {
        let written = self.kernel_of(inr.raw(index, coords, &self.config.inr, device), index, spec);
        let written = written.reshape([spec.numel()]);
        let written = if self.config.output_scale { written * self.spreads[index] } else { written };
        match self.config.base {
            BaseTerm::None => written,
            BaseTerm::Interp | BaseTerm::Nearest => written + vector(&self.sampled_base(index, spec), device),
        }
    }

    /// The kernels of a tensor among all numbers that are written for it, `[kernels, taps]`.
    fn kernel_of(&self, raw: Tensor<2>, index: usize, spec: &TensorSpec) -> Tensor<2> {
        let full = &self.specs[index];
        if self.config.kernel_crop == KernelCrop::Flat || spec.shape.get(2..) == full.shape.get(2..) {
            return crop(raw, spec);
        }
        let places = self.places(spec, full);
        let ([.., taps], [.., all]) = (spec.extents(), full.extents());
        let mut shares = vec![0.0f32; all * taps];
        for (tap, sources) in places.iter().enumerate() {
            sources.iter().for_each(|source| shares[source * taps + tap] = 1.0);
        }
        let device = raw.device();
        crop(raw, full).matmul(Tensor::from_data(TensorData::new(shares, [all, taps]), &device))
    }

    /// For each number of a kernel those of the full network's kernel that it is the sum of.
    fn places(&self, spec: &TensorSpec, full: &TensorSpec) -> Vec<Vec<usize>> {
        match (self.config.kernel_crop, &spec.shape[..], &full.shape[..]) {
            (KernelCrop::Fold, &[_, _, height, width], &[_, _, all_rows, all_columns]) => {
                let mut places = vec![Vec::new(); height * width];
                for (y, x) in (0..all_rows).flat_map(|y| (0..all_columns).map(move |x| (y, x))) {
                    let nearest = |at: usize, all: usize, count: usize| {
                        at.saturating_sub((all - count) / 2).min(count - 1)
                    };
                    let (row, column) = (nearest(y, all_rows, height), nearest(x, all_columns, width));
                    places[row * width + column].push(y * all_columns + x);
                }
                places
            }
            _ => middle(&spec.shape, &full.shape).into_iter().map(|tap| vec![tap]).collect(),
        }
    }

    /// The full network's tensor where the channels of a smaller one lie, times how many more inputs are summed there;
    /// of a kernel its middle, or all of it folded into that.
    ///
    /// A channel of the smaller network stands for the channels `o C/C_out` to `(o + 1) C/C_out` of the full one. Their
    /// mean is what takes their place as an output, and what follows sums as many inputs of that mean: where neighbours
    /// are alike, the function stays the same.
    fn sampled_base(&self, index: usize, spec: &TensorSpec) -> Vec<f32> {
        let (full, values) = (&self.specs[index], &self.base.tensors[index]);
        let ([outputs, inputs, taps], [all_outputs, all_inputs, all_taps]) = (spec.extents(), full.extents());
        let shares = match self.config.base {
            BaseTerm::Nearest => nearest,
            BaseTerm::None | BaseTerm::Interp => overlaps,
        };
        let (rows, columns) = (shares(outputs, all_outputs), shares(inputs, all_inputs));
        let places = self.places(spec, full);
        let gain = all_inputs as f32 / inputs as f32;
        let mut sampled = vec![0.0; outputs * inputs * taps];
        for (o, row) in rows.iter().enumerate() {
            for (c, column) in columns.iter().enumerate() {
                let kernel = &mut sampled[(o * inputs + c) * taps..][..taps];
                for (&(source, share), &(input, part)) in
                    row.iter().flat_map(|r| column.iter().map(move |c| (r, c)))
                {
                    let given = &values[(source * all_inputs + input) * all_taps..][..all_taps];
                    for (w, sources) in kernel.iter_mut().zip(&places) {
                        *w += sources.iter().map(|&tap| gain * share * part * given[tap]).sum::<f32>();
                    }
                }
            }
        }
        sampled
    }

    /// A network of this size: the mean of `draws` sets of weights, the first at the coordinates themselves and the
    /// others moved by noise. One set and the mean are in memory at a time.
    ///
    /// # Errors
    /// When there is no network of that size, or the function writes numbers that are not finite.
    pub fn sample(&self, inr: &Inr, size: Size, draws: usize, cx: &Context) -> Result<Plain> {
        if draws == 0 {
            return Err(Error::usage("--draws 0 writes no network").hint("ask for at least one"));
        }
        self.check(size, cx)?;
        let size = self.config.net.plainly(size);
        let bar = cx.progress(draws as u64, "writing weights");
        let mut mean: Vec<Vec<f64>> = Vec::new();
        for draw in 0..draws {
            let mut rng = cx.rng("sample", draw as u64);
            let noise = (draw > 0 && self.config.noise > 0.0).then_some(&mut rng as &mut dyn Rng);
            for (index, tensor) in
                self.write(inr, size, noise, |_| Source::Written, &cx.device)?.into_iter().enumerate()
            {
                let values =
                    tensor.into_data().try_to_vec::<f32>().expect("networks are in single precision");
                if mean.len() == index {
                    mean.push(vec![0.0; values.len()]);
                }
                for (mean, value) in mean[index].iter_mut().zip(values) {
                    *mean += (f64::from(value) - *mean) / (draw + 1) as f64;
                }
            }
            bar.inc(1);
            if cx.interrupted() {
                return Err(Error::interrupted("stopped while weights were written"));
            }
        }
        if mean.iter().flatten().any(|w| !w.is_finite()) {
            return Err(Error::work(format!(
                "the function writes numbers that are not finite for width {}",
                size.width
            )));
        }
        let tensors = mean.into_iter().map(|tensor| tensor.into_iter().map(|w| w as f32).collect()).collect();
        Ok(Plain { config: self.config.net.clone(), size, tensors })
    }

    /// The largest width up to the full one whose network has at most so many parameters.
    ///
    /// # Errors
    /// When even the narrowest has more.
    pub fn width_within(&self, most: usize, depth: Option<usize>, kernel: Option<usize>) -> Result<usize> {
        let numel = |width| Ok(self.config.net.build(Size { width, depth, kernel })?.graph.numel());
        let mut found = None;
        let mut least = 0;
        for width in (1..=self.config.full).rev() {
            least = numel(width)?;
            if least <= most {
                found = Some(width);
                break;
            }
        }
        found.ok_or_else(|| {
            Error::usage(format!("no network of this family has {most} parameters or fewer"))
                .hint(format!("the narrowest has {least}"))
        })
    }
}

/// For each of `count` channels the one of `all` that lies nearest, which counts in full.
fn nearest(count: usize, all: usize) -> Vec<Vec<(usize, f32)>> {
    (0..count).map(|i| vec![((2 * i + 1) * all / (2 * count), 1.0)]).collect()
}

/// For each of `count` channels those of `all` that lie where it does, and what share of its place each has.
fn overlaps(count: usize, all: usize) -> Vec<Vec<(usize, f32)>> {
    // In units of which a channel of the smaller network is `all` long and one of the full network `count`.
    let of = |i: usize| {
        let (start, end) = (i * all, (i + 1) * all);
        let share = |source: usize| end.min((source + 1) * count) - start.max(source * count);
        (start / count..end.div_ceil(count))
            .map(|source| (source, share(source) as f32 / all as f32))
            .collect()
    };
    (0..count).map(of).collect()
}

/// Which taps of a full kernel a smaller one has: those in its middle.
pub(crate) fn middle(shape: &[usize], full: &[usize]) -> Vec<usize> {
    match (shape, full) {
        (&[_, _, height, width], &[_, _, all_rows, all_columns]) => {
            let (top, left) = ((all_rows - height) / 2, (all_columns - width) / 2);
            (0..height).flat_map(|r| (0..width).map(move |c| (top + r) * all_columns + left + c)).collect()
        }
        _ => vec![0],
    }
}

/// The mean over tensors of the squared differences from given weights, each weighed by how large the given one is:
/// `mean((w - w*)² a)` with `a = (|w*| + 1e-6) / max(|w*| + 1e-6)` (§3.5).
///
/// # Shapes
/// - written: a flat vector a tensor, as many numbers as `given`
pub fn reconstruction(written: &[Tensor<1>], given: &[Vec<f32>], device: &Device) -> Tensor<1> {
    const LEAST: f32 = 1e-6;
    let of = |(written, given): (&Tensor<1>, &Vec<f32>)| {
        let largest = given.iter().fold(0.0f32, |a, w| a.max(w.abs())) + LEAST;
        let weights: Vec<f32> = given.iter().map(|w| (w.abs() + LEAST) / largest).collect();
        let weights = Tensor::from_data(TensorData::new(weights, [given.len()]), device);
        ((written.clone() - vector(given, device)).powi_scalar(2) * weights).mean()
    };
    let losses: Vec<Tensor<1>> = written.iter().zip(given).map(of).collect();
    Tensor::cat(losses, 0).mean()
}

/// The sum over tensors of their norms, `Σ_l ||W_l||₂`.
pub fn norms(written: &[Tensor<1>]) -> Tensor<1> {
    /// Keeps the gradient finite where a tensor is 0.
    const LEAST: f64 = 1e-24;
    let norm = |w: &Tensor<1>| (w.clone().powi_scalar(2).sum() + LEAST).sqrt();
    Tensor::cat(written.iter().map(norm).collect(), 0).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_lie_where_as_large_a_part_of_the_full_network_does() {
        assert_eq!(overlaps(2, 4), [vec![(0, 0.5), (1, 0.5)], vec![(2, 0.5), (3, 0.5)]]);
        let third = overlaps(3, 4);
        assert_eq!(third[1], [(1, 0.5), (2, 0.5)]);
        assert_eq!(third[0], [(0, 0.75), (1, 0.25)]);
        assert_eq!(overlaps(3, 3), nearest(3, 3));
        assert_eq!(overlaps(4, 2)[1], [(0, 1.0)]);
        assert_eq!(nearest(2, 8), [[(2, 1.0)], [(6, 1.0)]]);
    }
}
