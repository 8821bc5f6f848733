//! From a recording as it comes to what networks see, the same for every site.
//!
//! In this order: crop; pick channels; microvolts; band-pass; average reference; clip; resample; artefact-subspace
//! reconstruction; normalise. Only crop, clip, resample and normalise are on by default, as in the paper. The first minute of a clinical recording is dirty,
//! and is left out.

use std::path::Path;

use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_data::edf::{EdfReader, Stretch};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::asr::reconstruct;
use crate::channels::Channels;
use crate::filter::BandPass;
use crate::resample::Resampler;

/// Deviations from the mean beyond which [`Normalise::Zclip2`] cuts.
const CLIP_DEVIATIONS: f64 = 2.0;
/// Weight of a sample in the running statistics of [`Normalise::Exponential`].
const EXPONENTIAL_WEIGHT: f64 = 1e-3;
/// Samples whose statistics begin the running ones.
const EXPONENTIAL_BLOCK: usize = 1000;
/// A running deviation counts as at least this.
const EXPONENTIAL_FLOOR: f64 = 1e-4;

/// How the amplitude of each channel is made comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    /// Cut at two deviations from the mean, then mean 0 and deviation 1
    Zclip2,
    /// By running mean and deviation
    Exponential,
    /// Leave microvolts
    None,
}

/// What is done to every recording.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pipeline {
    /// Seconds that are left out at the beginning.
    pub tmin: f64,
    /// Seconds after which nothing is used; recordings may be shorter.
    pub tmax: f64,
    /// Samples a second.
    pub rate: f64,
    /// Microvolts beyond which amplitudes are cut.
    pub clip: f64,
    /// How amplitudes are made comparable.
    pub normalise: Normalise,
    /// Which channels.
    pub channels: Channels,
    /// Pass only frequencies between these, in hertz.
    pub band: Option<[f64; 2]>,
    /// Subtract the mean of all channels.
    pub average_reference: bool,
    /// Deviations from which artefacts are reconstructed, see [`reconstruct`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asr: Option<f64>,
}

impl Default for Pipeline {
    /// The paper's: minutes 1 to 6, 21 channels, 800 µV, 100 Hz, clipped z-scores.
    fn default() -> Self {
        Self {
            tmin: 60.0,
            tmax: 360.0,
            rate: 100.0,
            clip: 800.0,
            normalise: Normalise::Zclip2,
            channels: Channels::default(),
            band: None,
            average_reference: false,
            asr: None,
        }
    }
}

/// A recording that networks can see.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// Names in order.
    pub channels: Vec<String>,
    /// `[channels, samples]`, row by row.
    pub eeg: Vec<f32>,
    /// What is odd about the recording.
    pub warnings: Vec<String>,
}

impl Prepared {
    /// Samples of a channel.
    pub fn samples(&self) -> usize {
        self.eeg.len() / self.channels.len()
    }
}

impl Pipeline {
    /// Makes sure that the settings make sense.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<()> {
        let refused = |message: String| Err(Error::usage(message));
        if !(self.tmin >= 0.0 && self.tmax > self.tmin) {
            return refused(format!("the crop from {} to {} seconds is empty", self.tmin, self.tmax));
        }
        if !(self.rate.is_finite() && self.rate > 0.0) {
            return refused(format!("--rate {} is no number of samples a second", self.rate));
        }
        if self.clip.is_nan() || self.clip <= 0.0 {
            return refused(format!("--clip {} leaves nothing", self.clip));
        }
        if let Some([low, high]) = self.band
            && !(low > 0.0 && high > low && high.is_finite())
        {
            return refused(format!("the band from {low} to {high} Hz is empty"));
        }
        if let Some(cutoff) = self.asr
            && !(cutoff >= 1.0 && cutoff.is_finite())
        {
            return refused(format!(
                "--asr {cutoff} would take the recording itself for an artefact; 5 to 20 are usual"
            ));
        }
        Ok(())
    }

    /// Reads an EDF or BDF recording and prepares it. Only the records within the crop are read.
    ///
    /// # Errors
    /// When the file is damaged, lacks a channel, or is shorter than what is left out at its beginning.
    pub fn read(&self, path: &Path) -> Result<Prepared> {
        self.check()?;
        let mut reader = EdfReader::open(path)?;
        let here = |found: String| Error::input(path.display(), found);
        let signals: Vec<usize> = (0..reader.header().signals.len())
            .filter(|&s| !reader.header().signals[s].is_annotation())
            .collect();
        let labels: Vec<&str> = signals.iter().map(|&s| reader.header().signals[s].label.as_str()).collect();
        let found = self.channels.find(&labels).map_err(|found| {
            let short: Vec<&str> = labels.iter().copied().take(40).collect();
            here(found).hint(format!("it has {}; name others with --channels", short.join(", ")))
        })?;
        let chosen: Vec<usize> = found.iter().map(|&(place, _)| signals[place]).collect();
        let rates: Vec<f64> = chosen.iter().map(|&s| reader.header().rate(s)).collect();
        if let Some(at) = rates.iter().position(|&rate| rate == 0.0) {
            return Err(here(format!("channel {} has no samples", found[at].1)));
        }

        let mut warnings = Vec::new();
        let stretches = reader.stretches()?;
        let stretch = longest(&stretches, &mut warnings);
        let record = reader.header().record_seconds;
        // Records that overlap the crop.
        let length = stretch.records.len();
        let records_until = |seconds: f64| (seconds - stretch.start).max(0.0) / record;
        let first = (records_until(self.tmin).floor() as usize).min(length);
        let last = (records_until(self.tmax).ceil() as usize).clamp(first, length);
        let begin = stretch.start + first as f64 * record;
        let records = stretch.records.start + first..stretch.records.start + last;
        let mut signals = reader.read(&chosen, records)?;
        warnings.extend(reader.warnings().iter().cloned());

        for ((signal, &rate), &index) in signals.iter_mut().zip(&rates).zip(&chosen) {
            crop(signal, rate, self.tmin - begin, self.tmax - begin);
            if signal.is_empty() {
                let found =
                    format!("lasts {:.1} s, and the first {} s are left out", reader.seconds(), self.tmin);
                return Err(here(found).hint("use a smaller --tmin"));
            }
            let unit = &reader.header().signals[index].unit;
            let factor = microvolts(unit).unwrap_or_else(|| {
                warnings.push(format!("unit \"{unit}\" is taken for µV"));
                1.0
            });
            if factor != 1.0 {
                signal.iter_mut().for_each(|x| *x *= factor);
            }
        }
        let names: Vec<String> = found.into_iter().map(|(_, name)| name).collect();
        Resampler::of_all(&rates, self.rate)
            .and_then(|resamplers| self.apply(names, signals, &resamplers, warnings))
            .map_err(|e| here(e.to_string()))
    }

    /// Prepares signals in microvolts that are cropped, each with its own way from its sample rate to the pipeline's.
    ///
    /// # Errors
    /// When a value is not a number, or channels of several rates are to have an average reference.
    pub fn apply(
        &self,
        channels: Vec<String>,
        mut signals: Vec<Vec<f64>>,
        resamplers: &[Resampler],
        mut warnings: Vec<String>,
    ) -> Result<Prepared> {
        if let Some(at) = signals.iter().position(|signal| signal.iter().any(|x| !x.is_finite())) {
            return Err(Error::usage(format!("channel {} has values that are no numbers", channels[at])));
        }
        if let Some([low, high]) = self.band {
            signals.par_iter_mut().zip(resamplers).for_each(|(signal, resampler)| {
                *signal = BandPass::new(low, high, resampler.rate).apply(signal);
            });
        }
        if self.average_reference {
            subtract_mean(&mut signals, resamplers)?;
        }
        signals.par_iter_mut().zip(resamplers).for_each(|(signal, resampler)| {
            signal.iter_mut().for_each(|x| *x = x.clamp(-self.clip, self.clip));
            *signal = resampler.apply(signal);
        });
        let length = signals.iter().map(Vec::len).min().unwrap_or(0);
        signals.iter_mut().for_each(|signal| signal.truncate(length));
        if let Some(cutoff) = self.asr
            && reconstruct(&mut signals, self.rate, cutoff).is_none()
        {
            warnings.push("has too few quiet windows to tell artefacts; nothing is reconstructed".into());
        }
        let mut eeg = Vec::with_capacity(length * signals.len());
        for (signal, name) in signals.iter_mut().zip(&channels) {
            let flat = match self.normalise {
                Normalise::None => false,
                Normalise::Zclip2 => zclip(signal, CLIP_DEVIATIONS),
                Normalise::Exponential => exponential(signal),
            };
            if flat {
                warnings.push(format!("channel {name} is flat"));
            }
            eeg.extend(signal.iter().map(|&x| x as f32));
        }
        warnings.sort();
        warnings.dedup();
        Ok(Prepared { channels, eeg, warnings })
    }
}

/// The longest stretch without a gap.
fn longest(stretches: &[Stretch], warnings: &mut Vec<String>) -> Stretch {
    // Of equally long ones the first.
    let longest = stretches.iter().rev().max_by_key(|stretch| stretch.records.len()).cloned();
    if stretches.len() > 1 {
        warnings.push(format!("has {} stretches with gaps between; the longest is used", stretches.len()));
    }
    longest.unwrap_or(Stretch { start: 0.0, records: 0..0 })
}

/// Keeps what lies between two times, in seconds from the first sample.
fn crop(signal: &mut Vec<f64>, rate: f64, from: f64, to: f64) {
    let place = |seconds: f64| ((seconds * rate).round().max(0.0) as usize).min(signal.len());
    let (from, to) = (place(from), place(to));
    signal.truncate(to);
    signal.drain(..from.min(to));
}

/// How many microvolts a unit is.
fn microvolts(unit: &str) -> Option<f64> {
    match unit.trim() {
        "uV" | "UV" | "µV" | "μV" | "uv" => Some(1.0),
        "mV" | "MV" | "mv" => Some(1e3),
        "nV" => Some(1e-3),
        "V" => Some(1e6),
        _ => None,
    }
}

/// Subtracts the mean over channels from each.
fn subtract_mean(signals: &mut [Vec<f64>], resamplers: &[Resampler]) -> Result<()> {
    if resamplers.windows(2).any(|pair| pair[0].rate != pair[1].rate) {
        return Err(Error::usage("channels of different sample rates have no average reference"));
    }
    let length = signals.iter().map(Vec::len).min().unwrap_or(0);
    for at in 0..length {
        let mean = signals.iter().map(|signal| signal[at]).sum::<f64>() / signals.len() as f64;
        signals.iter_mut().for_each(|signal| signal[at] -= mean);
    }
    Ok(())
}

/// Mean and deviation.
fn moments(signal: &[f64]) -> (f64, f64) {
    let count = signal.len().max(1) as f64;
    let mean = signal.iter().sum::<f64>() / count;
    let variance = signal.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

/// Cuts at so many deviations from the mean, then makes the mean 0 and the deviation 1. Whether the signal is flat, and
/// became zeros.
fn zclip(signal: &mut [f64], deviations: f64) -> bool {
    let (mean, deviation) = moments(signal);
    let (low, high) = (mean - deviations * deviation, mean + deviations * deviation);
    signal.iter_mut().for_each(|x| *x = x.clamp(low, high));
    let (mean, deviation) = moments(signal);
    // Rounding leaves a constant signal a deviation of some 1e-16 of its value.
    let flat = deviation <= 1e-12 * mean.abs().max(f64::MIN_POSITIVE);
    signal.iter_mut().for_each(|x| *x = if flat { 0.0 } else { (*x - mean) / deviation });
    flat
}

/// Exponential moving standardisation (Schirrmeister et al. 2017): the running mean and variance take a thousandth of
/// each sample; the first block is standardised by its own. Whether the signal is flat.
fn exponential(signal: &mut [f64]) -> bool {
    let block = signal.len().min(EXPONENTIAL_BLOCK);
    let (mut mean, deviation) = moments(&signal[..block]);
    let (first_mean, first_deviation) = (mean, deviation.max(EXPONENTIAL_FLOOR));
    let mut variance = deviation * deviation;
    let flat = moments(signal).1 == 0.0;
    for (at, x) in signal.iter_mut().enumerate() {
        if at < block {
            *x = (*x - first_mean) / first_deviation;
            continue;
        }
        mean += EXPONENTIAL_WEIGHT * (*x - mean);
        variance += EXPONENTIAL_WEIGHT * ((*x - mean).powi(2) - variance);
        *x = (*x - mean) / variance.sqrt().max(EXPONENTIAL_FLOOR);
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(channels: usize) -> Vec<Resampler> {
        Resampler::of_all(&vec![100.0; channels], 100.0).unwrap()
    }

    #[test]
    fn a_flat_channel_becomes_zeros_with_a_warning() {
        let names = vec!["C3".to_string(), "C4".to_string()];
        let signals = vec![vec![3.3; 500], (0..500).map(|i| f64::from(i % 7)).collect()];
        let prepared = Pipeline::default().apply(names, signals, &same(2), Vec::new()).unwrap();
        assert_eq!(prepared.warnings, ["channel C3 is flat"]);
        assert!(prepared.eeg[..500].iter().all(|&x| x == 0.0));
        assert!((prepared.eeg[500..].iter().map(|x| x * x).sum::<f32>() / 500.0 - 1.0).abs() < 1e-5);
    }

    #[test]
    fn the_average_reference_leaves_channels_that_sum_to_zero() {
        let pipeline =
            Pipeline { average_reference: true, normalise: Normalise::None, ..Pipeline::default() };
        let names: Vec<String> = ["A", "B", "C"].map(String::from).into();
        let signals = vec![vec![1.0, 2.0], vec![4.0, -3.0], vec![0.0, 7.0]];
        let eeg = pipeline.apply(names, signals, &same(3), Vec::new()).unwrap().eeg;
        assert!((0..2).all(|t| (eeg[t] + eeg[2 + t] + eeg[4 + t]).abs() < 1e-6), "{eeg:?}");
    }

    #[test]
    fn exponential_standardisation_follows_a_drift() {
        let mut signal: Vec<f64> = (0..20_000).map(|i| f64::from(i) * 1e-3 + f64::from(i % 2)).collect();
        assert!(!exponential(&mut signal));
        let (mean, deviation) = moments(&signal[10_000..]);
        assert!(mean.abs() < 2.0 && (0.3..1.5).contains(&deviation), "{mean} {deviation}");
        assert!(exponential(&mut vec![2.0; 3000]));
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        for bad in [
            Pipeline { tmin: 5.0, tmax: 5.0, ..Pipeline::default() },
            Pipeline { rate: 0.0, ..Pipeline::default() },
            Pipeline { clip: f64::NAN, ..Pipeline::default() },
            Pipeline { band: Some([4.0, 4.0]), ..Pipeline::default() },
        ] {
            assert!(bad.check().is_err());
        }
        Pipeline::default().check().unwrap();
    }
}
