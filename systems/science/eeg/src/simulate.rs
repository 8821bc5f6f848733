//! Two sites that record alike and yet differently: the shift that transfer must bridge, with labels that are known.
//!
//! A recording is coloured noise with an alpha rhythm, strongest at the back of the head, and slow waves, each spread over the
//! electrodes in a way of its own. Pathology slows and weakens the alpha rhythm a little and strengthens slow waves, less
//! than people differ anyway. Site b has steeper noise, a larger gain and hum of the mains.

use clap::ValueEnum;
use rand::{Rng, RngExt};
use rand_distr::{Distribution, Normal, StandardNormal};
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;

/// Where alpha rhythms are strong: the electrodes of the back of the head.
const POSTERIOR: [&str; 7] = ["O1", "O2", "P3", "P4", "PZ", "T5", "T6"];
/// Strength of the alpha rhythm elsewhere.
const ANTERIOR_ALPHA: f64 = 0.5;
/// Hertz that the alpha rhythm lies between in the healthy.
const ALPHA: [f64; 2] = [8.5, 11.0];
/// What pathology takes from the rhythm's frequency,
const ALPHA_SLOWING: f64 = 0.3;
/// and what it leaves of its strength.
const ALPHA_LEFT: f64 = 0.85;
/// By how much it strengthens slow waves, around 3 Hz.
const SLOW_FACTOR: f64 = 1.6;
const SLOW: f64 = 3.0;
/// How much people differ in slow waves (deviation of the logarithm),
const SLOW_SPREAD: f64 = 0.6;
/// and recordings in gain.
const GAIN_SPREAD: f64 = 0.3;
/// Frequency below which noise grows no further.
const LOWEST: f64 = 0.5;
/// Hertz of the mains.
const MAINS: f64 = 50.0;
/// Deviation of a recording in microvolts, before its gain.
const MICROVOLTS: f64 = 25.0;

/// A place with machines and people of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Site {
    /// Noise of slope 1
    A,
    /// Noise of slope 1.25, a gain of 1.6, hum at 50 Hz
    B,
}

impl Site {
    /// The exponent of the noise, the gain, and the strength of the hum.
    fn machine(self) -> (f64, f64, f64) {
        match self {
            Self::A => (1.0, 1.0, 0.0),
            Self::B => (1.25, 1.6, 0.3),
        }
    }
}

/// Who is recorded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Subject {
    /// Whether the recording is pathological.
    pub pathological: bool,
    /// Hertz of the alpha rhythm.
    pub alpha: f64,
    /// Its strength.
    pub alpha_strength: f64,
    /// Strength of slow waves.
    pub slow_strength: f64,
    /// Of the amplifier.
    pub gain: f64,
}

impl Subject {
    /// Draws a subject.
    pub fn draw(pathological: bool, rng: &mut impl Rng) -> Self {
        let mut log_normal = |spread: f64| {
            let x: f64 = StandardNormal.sample(rng);
            (spread * x).exp()
        };
        let (slow, gain) = (log_normal(SLOW_SPREAD), log_normal(GAIN_SPREAD));
        let alpha = rng.random_range(ALPHA[0]..ALPHA[1]);
        match pathological {
            true => Self {
                pathological,
                alpha: alpha - ALPHA_SLOWING,
                alpha_strength: ALPHA_LEFT,
                slow_strength: SLOW_FACTOR * slow,
                gain,
            },
            false => Self { pathological, alpha, alpha_strength: 1.0, slow_strength: slow, gain },
        }
    }
}

/// A recording in microvolts, `[channels][samples]`.
pub fn record(
    site: Site,
    subject: &Subject,
    channels: &[String],
    samples: usize,
    rate: f64,
    rng: &mut impl Rng,
) -> Vec<Vec<f64>> {
    let inverse = FftPlanner::new().plan_fft_inverse(samples);
    let (tilt, site_gain, hum) = site.machine();
    let spread = Normal::new(1.0, 0.25).expect("a deviation that is positive");
    let mut channel = |name: &String| -> Vec<f64> {
        let mut topography = || f64::max(spread.sample(rng), 0.0);
        let back = if POSTERIOR.contains(&name.as_str()) { 1.0 } else { ANTERIOR_ALPHA };
        let alpha = subject.alpha_strength * back * topography();
        let slow = subject.slow_strength * topography();
        let amplitude = |hertz: f64| {
            let bump = |centre: f64, variance: f64| (-(hertz - centre).powi(2) / variance).exp();
            let mains = if (hertz - MAINS).abs() < rate / samples as f64 { hum } else { 0.0 };
            hertz.max(LOWEST).powf(-tilt)
                + 0.5 * alpha * bump(subject.alpha, 1.5)
                + 0.25 * slow * bump(SLOW, 3.0)
                + mains
        };
        let mut spectrum = vec![Complex::new(0.0, 0.0); samples];
        let mut power = 0.0;
        for at in 1..samples.div_ceil(2) {
            let size = amplitude(at as f64 * rate / samples as f64);
            let (re, im): (f64, f64) = (StandardNormal.sample(rng), StandardNormal.sample(rng));
            spectrum[at] = Complex::new(re, im) * size;
            spectrum[samples - at] = spectrum[at].conj();
            power += 4.0 * (at as f64 * rate / samples as f64).max(LOWEST).powf(-2.0 * tilt);
        }
        inverse.process(&mut spectrum);
        // The noise alone has this deviation, whatever the rhythms add.
        let scale = MICROVOLTS * subject.gain * site_gain / power.sqrt();
        spectrum.iter().map(|x| x.re * scale).collect()
    };
    channels.iter().map(&mut channel).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    /// Mean power of a band over channels.
    fn power(eeg: &[Vec<f64>], rate: f64, [low, high]: [f64; 2]) -> f64 {
        let samples = eeg[0].len();
        let forward = FftPlanner::new().plan_fft_forward(samples);
        let of = |channel: &Vec<f64>| {
            let mut spectrum: Vec<Complex<f64>> = channel.iter().map(|&x| Complex::new(x, 0.0)).collect();
            forward.process(&mut spectrum);
            let band =
                (1..samples / 2).filter(|&at| (low..high).contains(&(at as f64 * rate / samples as f64)));
            band.map(|at| spectrum[at].norm_sqr()).sum::<f64>()
        };
        eeg.iter().map(of).sum::<f64>() / eeg.len() as f64
    }

    #[test]
    fn sites_differ_in_noise_and_hum_and_subjects_in_slow_waves() {
        let channels: Vec<String> = ["C3", "O1"].map(String::from).into();
        let mean = |site, pathological, band, relative: bool| {
            let of = |index| {
                let mut rng = random_stream(1, "simulate", index);
                let subject = Subject::draw(pathological, &mut rng);
                let eeg = record(site, &subject, &channels, 2000, 250.0, &mut rng);
                let all = if relative { power(&eeg, 250.0, [0.5, 100.0]) } else { 1.0 };
                (power(&eeg, 250.0, band) / all).ln()
            };
            (0..60).map(of).sum::<f64>() / 60.0
        };
        assert!(mean(Site::B, false, [0.5, 100.0], false) > mean(Site::A, false, [0.5, 100.0], false));
        assert!(mean(Site::B, false, [49.0, 51.0], true) > mean(Site::A, false, [49.0, 51.0], true));
        assert!(mean(Site::A, true, [2.0, 4.0], true) > mean(Site::A, false, [2.0, 4.0], true) + 0.1);
    }
}
