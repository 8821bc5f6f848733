//! Signals at another sample rate, by polyphase filtering.
//!
//! Between the samples stand `up - 1` zeros; a low-pass filter with its cut-off at the lower of the two Nyquist rates,
//! a sinc under a Kaiser window (β = 5) of `20 max(up, down) + 1` taps, fills them; every `down`-th value is kept. Only
//! products that count are computed. Beyond its ends a signal is zero, as `scipy.signal.resample_poly` has it.

use std::f64::consts::PI;
use std::sync::Arc;

use kiln_core::{Error, Result};

/// Shape of the Kaiser window.
const BETA: f64 = 5.0;
/// Zero crossings of the sinc on either side, at the lower rate.
const HALF_LENGTH: usize = 10;
/// Largest factor: beyond it the rates have no simple ratio.
const MAX_FACTOR: u64 = 1 << 20;
/// How exactly the ratio of two rates is met.
const RATIO_TOLERANCE: f64 = 1e-9;

/// A filter from one sample rate to another; clones share its taps.
#[derive(Debug, Clone)]
pub struct Resampler {
    /// Samples a second before.
    pub rate: f64,
    up: usize,
    down: usize,
    /// The taps times `up`; none where the rates are equal.
    taps: Arc<[f64]>,
}

impl Resampler {
    /// From `rate` to `target` samples a second.
    ///
    /// # Errors
    /// When a rate is not positive, or their ratio is not one of two whole numbers below a million.
    pub fn new(rate: f64, target: f64) -> Result<Self> {
        let positive = |rate: f64| rate.is_finite() && rate > 0.0;
        let ratio = if positive(rate) && positive(target) { fraction(target / rate) } else { None };
        let (up, down) = ratio.ok_or_else(|| {
            Error::usage(format!("{rate} samples a second cannot become {target}"))
                .hint("both rates must be positive, and in a ratio of whole numbers")
        })?;
        let taps = if up == down { Vec::new() } else { low_pass(up.max(down), up as f64) };
        Ok(Self { rate, up, down, taps: taps.into() })
    }

    /// One for each of these rates; equal ones share their taps.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_all(rates: &[f64], target: f64) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::with_capacity(rates.len());
        for &rate in rates {
            let known = all.iter().find(|other| other.rate == rate).cloned();
            all.push(match known {
                Some(known) => known,
                None => Self::new(rate, target)?,
            });
        }
        Ok(all)
    }

    /// How many samples become of `length`.
    pub fn length(&self, length: usize) -> usize {
        (length * self.up).div_ceil(self.down)
    }

    /// The signal at the other rate.
    pub fn apply(&self, signal: &[f64]) -> Vec<f64> {
        if self.taps.is_empty() {
            return signal.to_vec();
        }
        let half = self.taps.len() / 2;
        let output = |m: usize| {
            // y[m] = Σ_k h[m down + half - k up] x[k], over taps that exist and samples that exist.
            let centre = m * self.down + half;
            let first = (centre + 1).saturating_sub(self.taps.len()).div_ceil(self.up);
            let last = (centre / self.up + 1).min(signal.len());
            let samples = signal.get(first..last).unwrap_or_default().iter();
            samples.enumerate().map(|(i, x)| self.taps[centre - (first + i) * self.up] * x).sum()
        };
        (0..self.length(signal.len())).map(output).collect()
    }
}

/// A ratio in lowest terms, by continued fractions.
fn fraction(ratio: f64) -> Option<(usize, usize)> {
    let (mut numerators, mut denominators) = ([0u64, 1], [1u64, 0]);
    let mut rest = ratio;
    for _ in 0..40 {
        let whole = rest.floor();
        let next = |[before, last]: [u64; 2]| {
            let value = whole * last as f64 + before as f64;
            (value <= MAX_FACTOR as f64).then_some([last, value as u64])
        };
        numerators = next(numerators)?;
        denominators = next(denominators)?;
        let (up, down) = (numerators[1], denominators[1]);
        if up > 0 && (up as f64 / down as f64 / ratio - 1.0).abs() < RATIO_TOLERANCE {
            return Some((up as usize, down as usize));
        }
        rest = 1.0 / (rest - whole);
    }
    None
}

/// A sinc with its cut-off at `1 / factor` of the Nyquist rate, under a Kaiser window, whose taps sum to `gain`.
fn low_pass(factor: usize, gain: f64) -> Vec<f64> {
    let half = (HALF_LENGTH * factor) as f64;
    let tap = |place: usize| {
        let x = place as f64 - half;
        let sinc = if x == 0.0 { 1.0 } else { (PI * x / factor as f64).sin() / (PI * x / factor as f64) };
        sinc * bessel_i0(BETA * (1.0 - (x / half).powi(2)).max(0.0).sqrt())
    };
    let taps: Vec<f64> = (0..=2 * HALF_LENGTH * factor).map(tap).collect();
    let scale = gain / taps.iter().sum::<f64>();
    taps.into_iter().map(|tap| tap * scale).collect()
}

/// The modified Bessel function of order 0, by its power series.
fn bessel_i0(x: f64) -> f64 {
    let mut term = 1.0;
    let mut sum = 1.0;
    for k in 1..50 {
        term *= (x / (2.0 * f64::from(k))).powi(2);
        sum += term;
        if term < 1e-17 * sum {
            break;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_become_ratios_in_lowest_terms() {
        for (ratio, terms) in [
            (100.0 / 250.0, Some((2, 5))),
            (100.0 / 200.0, Some((1, 2))),
            (100.0 / 173.61, Some((10000, 17361))),
            (1.0, Some((1, 1))),
            (100.0 / 256.0, Some((25, 64))),
            (PI / 1e7, None),
        ] {
            assert_eq!(fraction(ratio), terms, "{ratio}");
        }
        for (rate, target) in [(0.0, 100.0), (f64::NAN, 100.0), (100.0, -1.0), (f64::INFINITY, 1.0)] {
            assert!(Resampler::new(rate, target).is_err());
        }
    }

    #[test]
    fn a_sine_keeps_its_amplitude() {
        for (rate, target) in [(250.0, 100.0), (173.61, 100.0), (100.0, 256.0)] {
            let resampler = Resampler::new(rate, target).unwrap();
            let sine = |rate: f64, length: usize| -> Vec<f64> {
                (0..length).map(|i| (2.0 * PI * 10.0 * i as f64 / rate).sin()).collect()
            };
            let found = resampler.apply(&sine(rate, 2000));
            let expected = sine(target, found.len());
            let inner = found.len() / 5..found.len() * 4 / 5;
            let worst = inner.map(|i| (found[i] - expected[i]).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-3, "{rate}: {worst}");
        }
    }

    #[test]
    fn lengths_round_up_and_equal_rates_change_nothing() {
        let resampler = Resampler::new(250.0, 100.0).unwrap();
        for length in [0, 1, 2, 3, 7, 2250] {
            assert_eq!(resampler.apply(&vec![1.0; length]).len(), (length * 2).div_ceil(5));
        }
        let signal = [1.0, -2.0, 3.0];
        assert_eq!(Resampler::new(100.0, 100.0).unwrap().apply(&signal), signal);
    }
}
