//! In what two sites differ besides their patients: power of frequency bands, and whether a network's embedding gives the
//! site away.

use burn::tensor::Tensor;
use kiln_core::{Context, Result};
use rand::seq::SliceRandom;
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;
use serde::Serialize;

use crate::model::Model;
use crate::windows::WindowSet;

/// The bands of clinical EEG, in hertz.
pub const BANDS: [(&str, [f64; 2]); 5] = [
    ("delta", [0.5, 4.0]),
    ("theta", [4.0, 8.0]),
    ("alpha", [8.0, 13.0]),
    ("beta", [13.0, 30.0]),
    ("gamma", [30.0, 45.0]),
];
/// Steps, step size and penalty of the site classifier, a logistic regression.
const STEPS: usize = 300;
const STEP_SIZE: f64 = 0.5;
const PENALTY: f64 = 1e-3;
/// Windows that pass through a network at once.
const AT_ONCE: usize = 64;

/// How a band of a channel differs between two sites.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BandDifference {
    /// The channel.
    pub channel: String,
    /// The band.
    pub band: &'static str,
    /// Mean log-power at the second site less that at the first, in pooled deviations (Cohen's d).
    pub difference: f64,
}

/// Differences of log-power between two sets of windows, channel by channel and band by band.
///
/// # Errors
/// When a recording cannot be read.
pub fn band_differences(
    a: &WindowSet,
    b: &WindowSet,
    channels: &[String],
    rate: f64,
) -> Result<Vec<BandDifference>> {
    let (a, b) = (log_powers(a, rate)?, log_powers(b, rate)?);
    let mut differences = Vec::new();
    for (place, channel) in channels.iter().enumerate() {
        for (number, (band, _)) in BANDS.iter().enumerate() {
            let of = |powers: &[Vec<f64>]| moments(powers.iter().map(|w| w[place * BANDS.len() + number]));
            let ((mean_a, variance_a), (mean_b, variance_b)) = (of(&a), of(&b));
            let pooled = f64::midpoint(variance_a, variance_b).sqrt();
            let difference = if pooled > 0.0 { (mean_b - mean_a) / pooled } else { 0.0 };
            differences.push(BandDifference { channel: channel.clone(), band, difference });
        }
    }
    Ok(differences)
}

fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / count;
    (mean, values.map(|x| (x - mean).powi(2)).sum::<f64>() / count)
}

/// Log-power of every channel and band, one list a window.
fn log_powers(windows: &WindowSet, rate: f64) -> Result<Vec<Vec<f64>>> {
    let length = windows.length;
    let forward = FftPlanner::new().plan_fft_forward(length);
    let mut all = Vec::with_capacity(windows.len());
    for window in 0..windows.len() {
        let samples = windows.samples(&[window])?;
        let mut powers = Vec::new();
        for channel in samples.chunks(length) {
            let mut spectrum: Vec<Complex<f64>> =
                channel.iter().map(|&x| Complex::new(x.into(), 0.0)).collect();
            forward.process(&mut spectrum);
            for (_, [low, high]) in BANDS {
                let band =
                    (1..length / 2).filter(|&at| (low..high).contains(&(at as f64 * rate / length as f64)));
                // A flat channel, or a band beyond the sample rate, has a power of next to nothing.
                powers
                    .push((band.map(|at| spectrum[at].norm_sqr()).sum::<f64>() / length as f64 + 1e-12).ln());
            }
        }
        all.push(powers);
    }
    Ok(all)
}

/// How often a logistic regression tells the site of a window that it has not seen from the network's last layer before the
/// classifier, averaged over time: balanced accuracy, a half where the embedding says nothing of the site. Half of each site's
/// windows are learned from.
///
/// # Errors
/// When a recording cannot be read.
pub fn site_accuracy(model: &Model, a: &WindowSet, b: &WindowSet, cx: &Context) -> Result<f64> {
    let mut rng = cx.rng("site", 0);
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for (windows, site) in [(a, 0.0), (b, 1.0)] {
        let mut rows: Vec<(Vec<f64>, f64)> =
            embeddings(model, windows, cx)?.into_iter().map(|x| (x, site)).collect();
        rows.shuffle(&mut rng);
        test.extend(rows.split_off(rows.len() / 2));
        train.extend(rows);
    }
    let width = train.first().map_or(0, |(x, _)| x.len());
    let scales: Vec<(f64, f64)> = (0..width).map(|i| moments(train.iter().map(|(x, _)| x[i]))).collect();
    let standard = |x: &[f64]| -> Vec<f64> {
        x.iter().zip(&scales).map(|(x, (mean, variance))| (x - mean) / (variance.sqrt() + 1e-9)).collect()
    };
    let train: Vec<(Vec<f64>, f64)> = train.iter().map(|(x, site)| (standard(x), *site)).collect();
    let counts = [0.0, 1.0].map(|site| train.iter().filter(|(_, s)| *s == site).count().max(1) as f64);
    let (mut weights, mut bias) = (vec![0.0; width], 0.0);
    let score =
        |weights: &[f64], bias: f64, x: &[f64]| bias + weights.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    for _ in 0..STEPS {
        let mut slope = vec![0.0; width];
        let mut bias_slope = 0.0;
        for (x, site) in &train {
            let error = 1.0 / (1.0 + (-score(&weights, bias, x)).exp()) - site;
            // Both sites count the same.
            let error = error / (2.0 * counts[usize::from(*site > 0.5)]);
            slope.iter_mut().zip(x).for_each(|(s, x)| *s += error * x);
            bias_slope += error;
        }
        weights.iter_mut().zip(&slope).for_each(|(w, s)| *w -= STEP_SIZE * (s + PENALTY * *w));
        bias -= STEP_SIZE * bias_slope;
    }
    let right = [0.0, 1.0].map(|site| {
        let of: Vec<_> = test.iter().filter(|(_, s)| *s == site).collect();
        let right = of.iter().filter(|(x, _)| (score(&weights, bias, &standard(x)) >= 0.0) == (site > 0.5));
        right.count() as f64 / of.len().max(1) as f64
    });
    Ok(f64::midpoint(right[0], right[1]))
}

/// The logarithm of the mean square of what the last block before the classifier puts out, one list a window.
fn embeddings(model: &Model, windows: &WindowSet, cx: &Context) -> Result<Vec<Vec<f64>>> {
    let all: Vec<usize> = (0..windows.len()).collect();
    let mut rows = Vec::new();
    for chunk in all.chunks(AT_ONCE) {
        let mut blocks: Vec<Tensor<2>> = Vec::new();
        model.trace(windows.tensor(chunk, &cx.device)?, &mut |x| {
            let power = (x.clone() * x.clone()).mean_dim(2).squeeze_dim::<2>(2);
            blocks.push((power + 1e-9).log());
        });
        // The last is the logits.
        if let [.., embedding, _] = &blocks[..] {
            let [_, width] = embedding.dims();
            let values: Vec<f64> = embedding.clone().into_data().iter::<f64>().collect();
            rows.extend(values.chunks(width).map(<[f64]>::to_vec));
        }
    }
    Ok(rows)
}
