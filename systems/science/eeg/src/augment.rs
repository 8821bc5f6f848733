//! Windows changed at random in ways that should not change what they say.

use std::fmt;
use std::str::FromStr;

use kiln_core::{Error, Result};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rand_distr::{Distribution, StandardNormal};
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;
use serde::{Deserialize, Serialize};

/// How often a change is made unless it is said otherwise.
const PROBABILITY: f64 = 0.5;

/// A change, how often it is made, and how strongly.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Augmentation {
    /// What changes.
    pub change: Change,
    /// How often.
    pub probability: f64,
    /// How strongly, in the change's own unit.
    pub strength: f64,
}

/// What changes in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Time runs backwards.
    TimeReverse,
    /// All signs turn.
    SignFlip,
    /// Phases of all frequencies are turned, by at most `strength` of a circle, the same for all channels.
    FtSurrogate,
    /// Every channel becomes zero with the probability `strength`.
    ChannelDropout,
    /// A share `strength` of the channels changes places.
    ChannelShuffle,
    /// Noise with the deviation `strength` is added.
    Noise,
    /// A band of the width `strength` is taken out, as a share of all frequencies.
    BandStop,
    /// A share `strength` of the time becomes zero, with smooth edges.
    TimeMask,
    /// The window is moved around, by at most `strength` of its length.
    TimeShift,
}

/// Names and default strengths.
const CHANGES: [(Change, &str, f64); 9] = [
    (Change::TimeReverse, "time-reverse", 0.0),
    (Change::SignFlip, "sign-flip", 0.0),
    (Change::FtSurrogate, "ft-surrogate", 0.5),
    (Change::ChannelDropout, "channel-dropout", 0.2),
    (Change::ChannelShuffle, "channel-shuffle", 0.2),
    (Change::Noise, "noise", 0.1),
    (Change::BandStop, "band-stop", 0.05),
    (Change::TimeMask, "time-mask", 0.1),
    (Change::TimeShift, "time-shift", 0.1),
];

impl Change {
    fn name(self) -> &'static str {
        CHANGES.iter().find(|(change, _, _)| *change == self).map_or("", |(_, name, _)| name)
    }
}

impl FromStr for Augmentation {
    type Err = Error;

    /// `NAME[:PROBABILITY[:STRENGTH]]`
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let Some((change, _, strength)) = CHANGES.into_iter().find(|(_, known, _)| *known == name) else {
            let known: Vec<&str> = CHANGES.iter().map(|(_, name, _)| *name).collect();
            return Err(Error::usage(format!("there is no augmentation \"{name}\""))
                .hint(format!("there are {}", known.join(", "))));
        };
        let mut number = |default: f64| match parts.next() {
            None => Ok(default),
            Some(text) => text.parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.0).ok_or_else(|| {
                Error::usage(format!("\"{text}\" in an augmentation is no number of at least 0"))
                    .hint("write NAME:PROBABILITY:STRENGTH, such as noise:0.5:0.1")
            }),
        };
        let augmentation = Self { change, probability: number(PROBABILITY)?, strength: number(strength)? };
        let is_share = change != Change::Noise;
        if augmentation.probability > 1.0
            || (is_share && augmentation.strength > 1.0)
            || parts.next().is_some()
        {
            return Err(Error::usage(format!("the augmentation \"{text}\" is out of range"))
                .hint("probabilities and shares are at most 1"));
        }
        Ok(augmentation)
    }
}

impl fmt::Display for Augmentation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.change.name(), self.probability, self.strength)
    }
}

impl From<Augmentation> for String {
    fn from(augmentation: Augmentation) -> Self {
        augmentation.to_string()
    }
}

impl TryFrom<String> for Augmentation {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl Augmentation {
    /// Changes a window `[channels, length]`, or leaves it.
    pub fn apply(&self, window: &mut [f32], length: usize, rng: &mut impl Rng) {
        if rng.random::<f64>() >= self.probability {
            return;
        }
        let strength = self.strength;
        match self.change {
            Change::TimeReverse => window.chunks_mut(length).for_each(<[f32]>::reverse),
            Change::SignFlip => window.iter_mut().for_each(|x| *x = -*x),
            Change::FtSurrogate => turn_phases(window, length, strength, rng),
            Change::ChannelDropout => {
                window
                    .chunks_mut(length)
                    .filter(|_| rng.random::<f64>() < strength)
                    .for_each(|c| c.fill(0.0));
            }
            Change::ChannelShuffle => shuffle_channels(window, length, strength, rng),
            Change::Noise => {
                let noise = |rng: &mut _| -> f32 { StandardNormal.sample(rng) };
                window.iter_mut().for_each(|x| *x += strength as f32 * noise(rng));
            }
            Change::BandStop => stop_band(window, length, strength, rng),
            Change::TimeMask => mask_time(window, length, strength, rng),
            Change::TimeShift => {
                let by = (rng.random::<f64>() * strength * length as f64) as usize % length;
                window.chunks_mut(length).for_each(|channel| channel.rotate_right(by));
            }
        }
    }
}

/// Lets `change` work on the spectrum of each channel: it is given the numbers of all positive frequencies in turn and the
/// factor that it returns is applied.
fn in_spectrum(window: &mut [f32], length: usize, factors: &[Complex<f32>]) {
    let mut planner = FftPlanner::new();
    let (forward, inverse) = (planner.plan_fft_forward(length), planner.plan_fft_inverse(length));
    let mut buffer = vec![Complex::default(); length];
    for channel in window.chunks_mut(length) {
        buffer.iter_mut().zip(channel.iter()).for_each(|(b, &x)| *b = Complex::new(x, 0.0));
        forward.process(&mut buffer);
        for (at, factor) in factors.iter().enumerate() {
            // Negative frequencies are the conjugates of positive ones.
            buffer[at + 1] *= factor;
            if length - at - 1 != at + 1 {
                buffer[length - at - 1] *= factor.conj();
            }
        }
        inverse.process(&mut buffer);
        channel.iter_mut().zip(&buffer).for_each(|(x, b)| *x = b.re / length as f32);
    }
}

/// Positive frequencies below that of half the sample rate.
fn frequencies(length: usize) -> usize {
    length.saturating_sub(1) / 2
}

fn turn_phases(window: &mut [f32], length: usize, strength: f64, rng: &mut impl Rng) {
    let turn = |_| Complex::from_polar(1.0, (rng.random::<f64>() * strength * std::f64::consts::TAU) as f32);
    let factors: Vec<Complex<f32>> = (0..frequencies(length)).map(turn).collect();
    in_spectrum(window, length, &factors);
}

fn stop_band(window: &mut [f32], length: usize, strength: f64, rng: &mut impl Rng) {
    let count = frequencies(length);
    let width = (strength * count as f64).round() as usize;
    let from = rng.random_range(0..=count - width.min(count));
    let keep = |at: usize| if (from..from + width).contains(&at) { 0.0 } else { 1.0 };
    let factors: Vec<Complex<f32>> = (0..count).map(|at| Complex::new(keep(at), 0.0)).collect();
    in_spectrum(window, length, &factors);
}

fn shuffle_channels(window: &mut [f32], length: usize, strength: f64, rng: &mut impl Rng) {
    let channels = window.len() / length;
    let mut all: Vec<usize> = (0..channels).collect();
    all.shuffle(rng);
    let moving = &all[..((strength * channels as f64).round() as usize).min(channels)];
    let before: Vec<f32> = moving.iter().flat_map(|&c| window[c * length..][..length].to_vec()).collect();
    // Each takes the place of the next: as the order is random, so is where a channel goes.
    for (number, content) in before.chunks(length).enumerate() {
        let to = moving[(number + 1) % moving.len()];
        window[to * length..][..length].copy_from_slice(content);
    }
}

fn mask_time(window: &mut [f32], length: usize, strength: f64, rng: &mut impl Rng) {
    let width = strength * length as f64;
    let from = rng.random::<f64>() * (length as f64 - width);
    // Each edge falls over a tenth of the mask.
    let edge = (width / 10.0).max(1.0);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for channel in window.chunks_mut(length) {
        for (at, x) in channel.iter_mut().enumerate() {
            let (after, before) = ((at as f64 - from) / edge, (from + width - at as f64) / edge);
            *x *= (1.0 - sigmoid(5.0 * after) * sigmoid(5.0 * before)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    const LENGTH: usize = 50;

    fn window() -> Vec<f32> {
        let mut rng = random_stream(0, "window", 0);
        (0..4 * LENGTH).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    fn changed(text: &str) -> Vec<f32> {
        let mut window = window();
        let augmentation: Augmentation = text.parse().unwrap();
        augmentation.apply(&mut window, LENGTH, &mut random_stream(0, "augment", 1));
        window
    }

    fn energy(x: &[f32]) -> f32 {
        x.iter().map(|x| x * x).sum()
    }

    #[test]
    fn every_change_changes_and_a_probability_of_none_does_not() {
        for (_, name, _) in CHANGES {
            let found = changed(&format!("{name}:1:0.5"));
            assert!(found != window() && found.iter().all(|x| x.is_finite()), "{name}");
            assert_eq!(changed(&format!("{name}:0")), window());
        }
    }

    #[test]
    fn changes_keep_what_they_should() {
        let before = window();
        let mut twice = changed("time-reverse:1");
        twice.chunks_mut(LENGTH).for_each(<[f32]>::reverse);
        assert_eq!(twice, before);
        assert!(changed("sign-flip:1").iter().zip(&before).all(|(a, b)| *a == -b));
        // The spectrum's power stays, channel by channel.
        let surrogate = changed("ft-surrogate:1:1");
        for (a, b) in surrogate.chunks(LENGTH).zip(before.chunks(LENGTH)) {
            assert!((energy(a) / energy(b) - 1.0).abs() < 1e-3);
        }
        let mut sorted = [changed("channel-shuffle:1:1"), changed("time-shift:1:0.5"), before.clone()];
        sorted.iter_mut().for_each(|x| x.sort_by(f32::total_cmp));
        assert!(sorted[0] == sorted[2] && sorted[1] == sorted[2]);
        assert!(energy(&changed("band-stop:1:0.3")) < 0.9 * energy(&before));
        assert!(energy(&changed("time-mask:1:0.4")) < 0.8 * energy(&before));
        let dropped = changed("channel-dropout:1:1");
        assert!(dropped.iter().all(|&x| x == 0.0));
    }

    #[test]
    fn a_text_becomes_an_augmentation_and_back_or_is_refused() {
        let augmentation: Augmentation = "noise:0.25:2".parse().unwrap();
        assert_eq!(augmentation.to_string(), "noise:0.25:2");
        for text in ["blur", "noise:2", "noise:0.5:-1", "band-stop:0.5:1.5", "noise:0.5:1:1", "noise:x"] {
            assert!(text.parse::<Augmentation>().is_err(), "{text}");
        }
    }
}
