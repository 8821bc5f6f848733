//! How alike two neurons are at every moment: affinities between rates of change.
//!
//! For a trace `x_i(t)`, z-scored over time, `g_i` is its derivative smoothed with a Gaussian of width σ, divided by the
//! 95 % quantile of `|g_i|` and clipped to [−1, 1]. With `s_i(t)` the distance from `g_i(t)` to its k-th nearest neighbour
//! among the other neurons, plus 1e-3,
//!
//! ```text
//! a_ij(t) = exp(−(g_i − g_j)² / (s_i s_j)) · min(|g_i|, |g_j|) · 1[g_i g_j > 0]
//! ```
//!
//! is symmetric, lies in [0, 1], and is 0 where either neuron is at rest or one rises while the other falls.

use std::path::Path;

use clap::ValueEnum;
use kiln_core::{Error, HostTensor, Result, TensorFile};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::tensor::{AffinityTensor, Layout, as_matrices, pair_count, pair_index};
use crate::traces::Traces;

/// Added to every bandwidth, so that neurons that move in step do not divide by zero.
const LEAST_BANDWIDTH: f64 = 1e-3;
/// A derivative at this quantile of its absolute values counts as 1.
const FULL_RATE_QUANTILE: f64 = 0.95;
/// Frames that are computed before they are written.
const FRAMES_AT_ONCE: usize = 64;
/// The filter ends at so many σ.
const TRUNCATE: f64 = 4.0;

/// What is compared between two neurons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Affinity {
    /// Rates of change: alike when both rise or both fall at a similar rate
    #[default]
    Differential,
    /// Levels: alike when both are equally far above or below their means
    GaussianLevel,
    /// Pearson's correlation in a moving window, where it is positive
    CorrelationWindow,
}

/// How affinities are computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AffinityConfig {
    /// What is compared.
    pub affinity: Affinity,
    /// Width of the derivative filter in frames; half the width of a correlation window is 4σ.
    pub sigma: f64,
    /// Which nearest neighbour sets the bandwidth; ⌈√N⌉ for an animal with N neurons where none is given.
    pub knn: Option<usize>,
}

impl Default for AffinityConfig {
    fn default() -> Self {
        Self { affinity: Affinity::default(), sigma: 2.0, knn: None }
    }
}

impl AffinityConfig {
    /// Rates of change with σ = 2 frames and k = ⌈√N⌉.
    pub fn new() -> Self {
        Self::default()
    }

    /// With another width of the derivative filter, in frames.
    pub fn with_sigma(mut self, sigma: f64) -> Self {
        self.sigma = sigma;
        self
    }

    /// With the bandwidth from the k-th nearest neighbour.
    pub fn with_knn(mut self, knn: usize) -> Self {
        self.knn = Some(knn);
        self
    }

    /// Frames on either side that the filter looks at.
    pub fn radius(&self) -> usize {
        (TRUNCATE * self.sigma + 0.5) as usize
    }

    /// The affinities of all pairs of neurons in all animals over time, `[T, W, P]`.
    ///
    /// # Errors
    /// When σ or k makes no filter, the recording is shorter than the filter, or no animal has two neurons.
    pub fn compute(&self, traces: &Traces) -> Result<AffinityTensor> {
        let comparison = self.comparison(traces)?;
        let [frames, animals, pairs] = comparison.shape;
        let mut values = vec![0.0; frames * animals * pairs];
        comparison.fill(0, &mut values);
        Ok(AffinityTensor::new(comparison.shape, values, Some(comparison.mask)))
    }

    /// The same, written to a safetensors file a few frames at a time: `tensor`, `mask` [W, P], and the names in the metadata.
    /// [`AffinityTensor::open`] reads it where pairs are laid out as such. Returns the shape of the tensor.
    ///
    /// # Errors
    /// As [`compute`](Self::compute), when the file cannot be written, or those of `written`, which hears how many frames are.
    pub fn write(
        &self,
        traces: &Traces,
        layout: Layout,
        path: &Path,
        written: &dyn Fn(usize) -> Result<()>,
    ) -> Result<Vec<usize>> {
        let comparison = self.comparison(traces)?;
        let [frames, animals, pairs] = comparison.shape;
        let neurons = traces.neurons.len();
        let shape = match layout {
            Layout::Pairs => comparison.shape.to_vec(),
            Layout::Matrix => vec![frames, animals, neurons, neurons],
        };
        comparison.about(traces).write_with_stream(path, "tensor", &shape, |take| {
            let mut values = Vec::new();
            for first in (0..frames).step_by(FRAMES_AT_ONCE) {
                let count = FRAMES_AT_ONCE.min(frames - first);
                values.clear();
                values.resize(count * animals * pairs, 0.0);
                comparison.fill(first, &mut values);
                match layout {
                    Layout::Pairs => take(&values)?,
                    Layout::Matrix => take(&as_matrices(&values, neurons))?,
                }
                written(first + count)?;
            }
            Ok(())
        })?;
        Ok(shape)
    }

    fn comparison(&self, traces: &Traces) -> Result<Comparison<'_>> {
        self.check(traces.frames)?;
        let shape = [traces.frames, traces.animals.len(), pair_count(traces.neurons.len())];
        if traces.animals.iter().all(|animal| animal.neurons.len() < 2) {
            return Err(Error::work("no animal has two neurons: there is no pair to compare")
                .hint("check the neurons that were left out, and the names in the header"));
        }
        let signals = traces.animals.iter().map(|animal| self.signals(&animal.traces)).collect();
        let mut mask = vec![false; shape[1] * shape[2]];
        let places = (traces.animals.iter().enumerate())
            .map(|(w, animal)| {
                let present = &animal.neurons;
                let each = present.iter().enumerate().flat_map(|(a, &i)| {
                    present[a + 1..].iter().map(move |&j| pair_index(i, j, traces.neurons.len()))
                });
                let places: Vec<usize> = each.collect();
                places.iter().for_each(|&p| mask[w * shape[2] + p] = true);
                places
            })
            .collect();
        Ok(Comparison { config: self, shape, signals, places, mask })
    }

    /// The affinities of one animal, `[T, n (n − 1) / 2]`; `traces` has one series of T numbers a neuron.
    ///
    /// # Errors
    /// When σ or k makes no filter, or the series are shorter than the filter.
    pub fn of_animal(&self, traces: &[Vec<f64>]) -> Result<Vec<Vec<f64>>> {
        let frames = traces.first().map_or(0, Vec::len);
        self.check(frames)?;
        let signals = self.signals(traces);
        let frame = |t| {
            let mut of_pairs = vec![0.0; pair_count(traces.len())];
            self.frame(&signals, t, &mut of_pairs);
            of_pairs
        };
        Ok((0..frames).map(frame).collect())
    }

    fn check(&self, frames: usize) -> Result<()> {
        if !(self.sigma.is_finite() && self.sigma > 0.0 && self.radius() >= 1) {
            return Err(Error::usage(format!("--sigma {} makes no filter", self.sigma))
                .hint("give the width of the derivative filter in frames, 2 for example"));
        }
        if self.knn == Some(0) {
            return Err(Error::usage("--knn 0 names no neighbour").hint("give 1 or more, or auto"));
        }
        let filter = 2 * self.radius() + 1;
        if frames < filter {
            return Err(Error::work(format!(
                "the recording has {frames} frames, fewer than the {filter} of the derivative filter"
            ))
            .hint("record longer, or take a smaller --sigma"));
        }
        Ok(())
    }

    fn signals(&self, traces: &[Vec<f64>]) -> Signals {
        let standard: Vec<Vec<f64>> = traces.iter().map(|trace| standardised(trace)).collect();
        let series = match self.affinity {
            Affinity::Differential => standard.iter().map(|z| rate_of_change(z, self.sigma)).collect(),
            Affinity::GaussianLevel => standard,
            Affinity::CorrelationWindow => {
                return Signals { frames: windows(&standard, self.radius()), neurons: traces.len(), k: 0 };
            }
        };
        let frames = (0..series.first().map_or(0, Vec::len)).map(|t| series.iter().map(|s| s[t]).collect());
        let k = self.knn.unwrap_or((traces.len() as f64).sqrt().ceil() as usize);
        Signals { frames: frames.collect(), neurons: traces.len(), k: k.min(traces.len().saturating_sub(1)) }
    }

    /// The affinities of all pairs at time `t`, upper triangle row by row.
    fn frame(&self, signals: &Signals, t: usize, of_pairs: &mut [f64]) {
        let g = &signals.frames[t];
        match self.affinity {
            Affinity::Differential => {
                kernel(g, &bandwidths(g, signals.k), of_pairs, |a, b| {
                    if a * b > 0.0 { a.abs().min(b.abs()) } else { 0.0 }
                });
            }
            Affinity::GaussianLevel => kernel(g, &bandwidths(g, signals.k), of_pairs, |_, _| 1.0),
            Affinity::CorrelationWindow => {
                let length = g.len() / signals.neurons.max(1);
                let unit = |i: usize| &g[i * length..(i + 1) * length];
                let pairs = (0..signals.neurons).flat_map(|i| (i + 1..signals.neurons).map(move |j| (i, j)));
                for ((i, j), out) in pairs.zip(of_pairs) {
                    *out = unit(i).iter().zip(unit(j)).map(|(a, b)| a * b).sum::<f64>().clamp(0.0, 1.0);
                }
            }
        }
    }
}

/// Everything that the affinities of any frame follow from.
struct Comparison<'a> {
    config: &'a AffinityConfig,
    /// T, W, P.
    shape: [usize; 3],
    /// Of every animal.
    signals: Vec<Signals>,
    /// Where the pairs of every animal stand among those of all neurons.
    places: Vec<Vec<usize>>,
    /// `[W, P]`
    mask: Vec<bool>,
}

impl Comparison<'_> {
    /// The frames from `first` on, as many as `values` has room for; `values` holds zeros.
    fn fill(&self, first: usize, values: &mut [f32]) {
        let [_, animals, pairs] = self.shape;
        values.par_chunks_mut(animals * pairs).enumerate().for_each(|(t, frame)| {
            let mut of_pairs = Vec::new();
            for ((signals, places), row) in self.signals.iter().zip(&self.places).zip(frame.chunks_mut(pairs))
            {
                of_pairs.resize(places.len(), 0.0);
                self.config.frame(signals, first + t, &mut of_pairs);
                for (&place, &affinity) in places.iter().zip(&of_pairs) {
                    row[place] = affinity as f32;
                }
            }
        });
    }

    /// What a file says beside the affinities: the mask and the names.
    fn about(&self, traces: &Traces) -> TensorFile {
        let [_, animals, pairs] = self.shape;
        let mut file = TensorFile::new();
        let mask = self.mask.iter().map(|&there| i64::from(there)).collect();
        file.insert("mask", HostTensor::int([animals, pairs], mask));
        let names: Vec<&str> = traces.animals.iter().map(|animal| animal.name.as_str()).collect();
        file.metadata.insert("neurons".into(), traces.neurons.join(","));
        file.metadata.insert("animals".into(), names.join(","));
        file
    }
}

/// What is compared, frame by frame.
struct Signals {
    /// One number a neuron; for windows, one vector of norm 1 a neuron, end to end.
    frames: Vec<Vec<f64>>,
    neurons: usize,
    k: usize,
}

/// `exp(−(g_i − g_j)² / (s_i s_j)) · weight(g_i, g_j)` for all pairs.
fn kernel(g: &[f64], s: &[f64], of_pairs: &mut [f64], weight: impl Fn(f64, f64) -> f64) {
    let mut out = of_pairs.iter_mut();
    for i in 0..g.len() {
        for (j, out) in (i + 1..g.len()).zip(&mut out) {
            let weight = weight(g[i], g[j]);
            *out = if weight > 0.0 { (-(g[i] - g[j]).powi(2) / (s[i] * s[j])).exp() * weight } else { 0.0 };
        }
    }
}

/// The distance of every number to its k-th nearest among the others, plus 1e-3.
fn bandwidths(g: &[f64], k: usize) -> Vec<f64> {
    let mut order: Vec<usize> = (0..g.len()).collect();
    order.sort_by(|&a, &b| g[a].total_cmp(&g[b]));
    let mut s = vec![LEAST_BANDWIDTH; g.len()];
    for (rank, &i) in order.iter().enumerate() {
        let (mut below, mut above) = (rank, rank + 1);
        for _ in 0..k {
            let down = below.checked_sub(1).map_or(f64::INFINITY, |b| g[i] - g[order[b]]);
            let up = order.get(above).map_or(f64::INFINITY, |&j| g[j] - g[i]);
            if down <= up {
                below -= 1;
            } else {
                above += 1;
            }
            s[i] = LEAST_BANDWIDTH + down.min(up);
        }
    }
    s
}

/// Mean 0 and standard deviation 1 over time; zeros for a constant.
pub fn standardised(trace: &[f64]) -> Vec<f64> {
    let mean = trace.iter().sum::<f64>() / trace.len() as f64;
    let variance = trace.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / trace.len() as f64;
    let scale = if variance > 0.0 { variance.sqrt().recip() } else { 0.0 };
    trace.iter().map(|x| (x - mean) * scale).collect()
}

/// `g`: the derivative smoothed over `sigma` frames, 1 at the 95 % quantile of its size, clipped to [−1, 1].
///
/// A trace that rests in more than 95 % of the frames has no such quantile; its largest rate then counts as 1.
pub fn rate_of_change(trace: &[f64], sigma: f64) -> Vec<f64> {
    let g = derivative(trace, sigma);
    let mut sizes: Vec<f64> = g.iter().map(|x| x.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    let full = match quantile(&sizes, FULL_RATE_QUANTILE) {
        0.0 => sizes.last().copied().unwrap_or(0.0),
        full => full,
    };
    if full == 0.0 {
        return vec![0.0; g.len()];
    }
    g.iter().map(|x| (x / full).clamp(-1.0, 1.0)).collect()
}

/// The series filtered with the derivative of a Gaussian; its ends go on as constants.
fn derivative(trace: &[f64], sigma: f64) -> Vec<f64> {
    let radius = (TRUNCATE * sigma + 0.5) as isize;
    let gauss: Vec<f64> =
        (-radius..=radius).map(|x| (-0.5 * (x * x) as f64 / (sigma * sigma)).exp()).collect();
    let mass: f64 = gauss.iter().sum();
    let last = trace.len() as isize - 1;
    let at = |t: isize| trace[t.clamp(0, last) as usize];
    let weigh = |(x, gauss): (isize, &f64)| x as f64 / (sigma * sigma) * gauss / mass;
    let weights: Vec<f64> = (-radius..=radius).zip(&gauss).map(weigh).collect();
    (0..=last).map(|t| (-radius..=radius).zip(&weights).map(|(x, w)| w * at(t + x)).sum()).collect()
}

/// A quantile of sorted numbers, between two of them by their distance.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = q * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (place - below as f64) * (sorted[above] - sorted[below])
}

/// The window around every frame, per neuron with mean 0 and norm 1: dot products are correlations.
fn windows(traces: &[Vec<f64>], radius: usize) -> Vec<Vec<f64>> {
    let frames = traces.first().map_or(0, Vec::len);
    let window = |t: usize| {
        let span = t.saturating_sub(radius)..(t + radius + 1).min(frames);
        traces.iter().flat_map(move |trace| {
            let z = standardised(&trace[span.clone()]);
            let norm = z.iter().map(|x| x * x).sum::<f64>().sqrt();
            z.into_iter().map(move |x| if norm > 0.0 { x / norm } else { 0.0 })
        })
    };
    (0..frames).map(|t| window(t).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_the_distance_to_the_kth_nearest() {
        let s = bandwidths(&[0.0, 1.0, 3.0, -0.5], 2);
        let expected = [1.0, 1.5, 3.0, 1.5].map(|d| d + LEAST_BANDWIDTH);
        assert!(s.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{s:?}");
    }

    #[test]
    fn windows_of_the_same_course_correlate_fully() {
        let rising: Vec<f64> = (0..40).map(|t| f64::from(t) * f64::from(t)).collect();
        let traces = vec![
            rising.clone(),
            rising.iter().map(|x| 2.0 * x + 1.0).collect(),
            rising.iter().map(|x| -x).collect(),
        ];
        let config = AffinityConfig { affinity: Affinity::CorrelationWindow, ..AffinityConfig::new() };
        for frame in config.of_animal(&traces).unwrap() {
            assert!((frame[0] - 1.0).abs() < 1e-9 && frame[1] == 0.0, "{frame:?}");
        }
    }
}
