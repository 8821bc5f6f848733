//! Artefact-subspace reconstruction (Mullen et al. 2015, IEEE TBME 62): where a recording is louder along some direction of
//! its channels than its own quiet parts allow, that direction is filled in from the others.
//!
//! The quiet windows give a covariance `C` (their geometric median) and, along each of its eigenvectors, a threshold: mean plus
//! `cutoff` deviations of the amplitude. In every window, directions `u` of its own covariance that exceed the thresholds are
//! dropped, and what is kept, `U`, predicts the whole:
//!
//! ```text
//! x' = C U (Uᵀ C U)⁻¹ Uᵀ x
//! ```
//!
//! Means and deviations are a median and a median of distances, and amplitudes are not weighted by frequency first; both differ
//! from the authors' own program.

use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use rayon::prelude::*;

/// Seconds of a window.
const WINDOW: f64 = 0.5;
/// Share of the directions that may be dropped in a window.
const MOST_DROPPED: f64 = 0.66;
/// A window is quiet where its amplitude lies between these, in deviations from the channel's median,
const QUIET: [f64; 2] = [-3.5, 5.0];
/// in all but this share of the channels.
const MOST_LOUD: f64 = 0.2;
/// Fewest quiet windows to learn from.
const FEWEST: usize = 20;
/// Steps of Weiszfeld's algorithm.
const MEDIAN_STEPS: usize = 50;
/// From a median of distances to a deviation of normal values.
const MAD: f64 = 1.4826;

/// Reconstructs what exceeds `cutoff` deviations in `signals`, of so many samples a second each. Returns the share of the
/// windows that were changed; `None`, and nothing is changed, where too few windows are quiet.
///
/// # Panics
/// When signals differ in length.
pub fn reconstruct(signals: &mut [Vec<f64>], rate: f64, cutoff: f64) -> Option<f64> {
    let samples = signals.first().map_or(0, Vec::len);
    assert!(signals.iter().all(|signal| signal.len() == samples), "signals must have one length");
    // Even, so that windows at half its length overlap evenly.
    let half = ((WINDOW * rate / 2.0).round() as usize).max(1);
    if samples < 2 * half {
        return None;
    }
    let starts: Vec<usize> = (0..=samples - 2 * half).step_by(half).collect();
    let quiet = quiet_windows(signals, &starts, 2 * half);
    if quiet.len() < FEWEST {
        return None;
    }
    let calm = Calm::learn(signals, &quiet, 2 * half, cutoff)?;
    let maps: Vec<Option<Mat<f64>>> =
        starts.par_iter().map(|&start| calm.reconstruction(&covariance(signals, start, 2 * half))).collect();
    let changed = maps.iter().flatten().count() as f64 / maps.len() as f64;
    blend(signals, &starts, &maps, half);
    Some(changed)
}

/// Where windows begin in which most channels are about as loud as usual.
fn quiet_windows(signals: &[Vec<f64>], starts: &[usize], length: usize) -> Vec<usize> {
    let mut loud = vec![0; starts.len()];
    for signal in signals {
        let of_window = |&start: &usize| root_mean_square(&signal[start..start + length]);
        let amplitudes: Vec<f64> = starts.iter().map(of_window).collect();
        let (middle, deviation) = robust(&amplitudes);
        let limits = QUIET.map(|limit| middle + limit * deviation);
        for (loud, amplitude) in loud.iter_mut().zip(&amplitudes) {
            *loud += usize::from(!(limits[0]..=limits[1]).contains(amplitude));
        }
    }
    let most = MOST_LOUD * signals.len() as f64;
    starts.iter().zip(loud).filter(|(_, loud)| *loud as f64 <= most).map(|(&start, _)| start).collect()
}

/// What quiet windows are like.
struct Calm {
    covariance: Mat<f64>,
    /// Its eigenvectors as rows, each times the amplitude that is allowed along it.
    thresholds: Mat<f64>,
}

impl Calm {
    fn learn(signals: &[Vec<f64>], windows: &[usize], length: usize, cutoff: f64) -> Option<Self> {
        let channels = signals.len();
        let covariances: Vec<Mat<f64>> =
            windows.par_iter().map(|&start| covariance(signals, start, length)).collect();
        let covariance = geometric_median(&covariances);
        let eigen = covariance.self_adjoint_eigen(Side::Lower).ok()?;
        let vectors = eigen.U();
        let mut thresholds = Mat::zeros(channels, channels);
        for k in 0..channels {
            let v = vectors.col(k);
            // The mean square along v is vᵀ C v.
            let amplitudes: Vec<f64> =
                covariances.iter().map(|c| (v.transpose() * c * v).max(0.0).sqrt()).collect();
            let (middle, deviation) = robust(&amplitudes);
            for channel in 0..channels {
                thresholds[(k, channel)] = (middle + cutoff * deviation) * v[channel];
            }
        }
        Some(Self { covariance, thresholds })
    }

    /// The map `x → x'` for a window with this covariance; `None` where nothing is too loud.
    fn reconstruction(&self, window: &Mat<f64>) -> Option<Mat<f64>> {
        let channels = window.nrows();
        let always = channels - (MOST_DROPPED * channels as f64) as usize;
        let eigen = window.self_adjoint_eigen(Side::Lower).ok()?;
        let (vectors, values) = (eigen.U(), eigen.S().column_vector());
        let allowed = &self.thresholds * vectors;
        let kept: Vec<usize> =
            (0..channels) // by rising amplitude
                .filter(|&j| j < always || values[j] < allowed.col(j).squared_norm_l2())
                .collect();
        if kept.len() == channels {
            return None;
        }
        let u = Mat::from_fn(channels, kept.len(), |channel, j| vectors[(channel, kept[j])]);
        let spread = &self.covariance * &u;
        let mut inner = u.transpose() * &spread;
        // Channels that are sums of others leave directions without any amplitude.
        let floor = 1e-9 * (0..kept.len()).map(|j| inner[(j, j)]).fold(f64::MIN_POSITIVE, f64::max);
        (0..kept.len()).for_each(|j| inner[(j, j)] += floor);
        Some(spread * inner.llt(Side::Lower).ok()?.solve(u.transpose()))
    }
}

/// Applies the map of every window; windows overlap by half, and pass into each other as half a cosine.
fn blend(signals: &mut [Vec<f64>], starts: &[usize], maps: &[Option<Mat<f64>>], half: usize) {
    let original: Vec<Vec<f64>> = signals.to_vec();
    let weight = |at: usize| 0.5 - 0.5 * (std::f64::consts::PI * (at as f64 + 0.5) / half as f64).cos();
    for (number, (&start, map)) in starts.iter().zip(maps).enumerate() {
        let Some(map) = map else { continue };
        let (is_first, is_last) = (number == 0, number + 1 == starts.len());
        let end = if is_last { original[0].len() } else { start + 2 * half };
        for at in 0..end - start {
            let weight = match at < half {
                true if is_first => 1.0,
                false if is_last => 1.0,
                _ => weight(at),
            };
            let sample = start + at;
            for (channel, signal) in signals.iter_mut().enumerate() {
                let mapped: f64 =
                    original.iter().enumerate().map(|(other, x)| map[(channel, other)] * x[sample]).sum();
                signal[sample] += weight * (mapped - original[channel][sample]);
            }
        }
    }
}

/// `Σ x xᵀ / n` of a window; means are left in, since recordings have been filtered or vary slowly.
fn covariance(signals: &[Vec<f64>], start: usize, length: usize) -> Mat<f64> {
    let window = |channel: usize| &signals[channel][start..start + length];
    let product = |i: usize, j: usize| window(i).iter().zip(window(j)).map(|(a, b)| a * b).sum::<f64>();
    let mut matrix = Mat::zeros(signals.len(), signals.len());
    for i in 0..signals.len() {
        for j in 0..=i {
            let value = product(i, j) / length as f64;
            (matrix[(i, j)], matrix[(j, i)]) = (value, value);
        }
    }
    matrix
}

/// The matrix with the least sum of distances to all (Weiszfeld), which a few outliers hardly move.
fn geometric_median(matrices: &[Mat<f64>]) -> Mat<f64> {
    let size = matrices[0].nrows();
    let mean = |weights: &[f64]| {
        let total: f64 = weights.iter().sum();
        let entry = |i, j| matrices.iter().zip(weights).map(|(m, w)| w * m[(i, j)]).sum::<f64>() / total;
        Mat::from_fn(size, size, entry)
    };
    let mut median = mean(&vec![1.0; matrices.len()]);
    for _ in 0..MEDIAN_STEPS {
        let scale = median.norm_l2();
        let weights: Vec<f64> = matrices
            .iter()
            .map(|m| 1.0 / (m - &median).norm_l2().max(1e-9 * scale).max(f64::MIN_POSITIVE))
            .collect();
        let next = mean(&weights);
        let moved = (&next - &median).norm_l2();
        median = next;
        if moved <= 1e-6 * scale {
            break;
        }
    }
    median
}

fn root_mean_square(values: &[f64]) -> f64 {
    (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt()
}

/// The median, and the deviation that normal values with this median of distances have.
fn robust(values: &[f64]) -> (f64, f64) {
    let middle = median(values.to_vec());
    (middle, MAD * median(values.iter().map(|x| (x - middle).abs()).collect()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;
    use rand_distr::{Distribution, Normal};

    const RATE: f64 = 100.0;
    const CHANNELS: usize = 8;

    /// A minute of eight channels that four sources and a little noise make up.
    fn recording() -> Vec<Vec<f64>> {
        let mut rng = kiln_core::random_stream(0, "asr", 0);
        let normal = Normal::new(0.0, 1.0).unwrap();
        let mixing: Vec<f64> = (0..CHANNELS * 4).map(|_| normal.sample(&mut rng)).collect();
        let mut signals = vec![Vec::new(); CHANNELS];
        for _ in 0..6000 {
            let sources: Vec<f64> = (0..4).map(|_| 10.0 * normal.sample(&mut rng)).collect();
            for (channel, signal) in signals.iter_mut().enumerate() {
                let mixed: f64 = sources.iter().zip(&mixing[4 * channel..]).map(|(s, m)| s * m).sum();
                signal.push(mixed + rng.random_range(-1.0..1.0));
            }
        }
        signals
    }

    /// Root of the mean square difference from sample `from` to `to`, over all channels.
    fn distance(a: &[Vec<f64>], b: &[Vec<f64>], [from, to]: [usize; 2]) -> f64 {
        let squares = a.iter().zip(b).flat_map(|(a, b)| a[from..to].iter().zip(&b[from..to]));
        (squares.map(|(a, b)| (a - b).powi(2)).sum::<f64>() / (CHANNELS * (to - from)) as f64).sqrt()
    }

    #[test]
    fn a_burst_is_removed_and_the_rest_is_left() {
        let clean = recording();
        let mut signals = clean.clone();
        for (channel, signal) in signals.iter_mut().enumerate().take(3) {
            for (at, x) in signal[3000..3200].iter_mut().enumerate() {
                *x += 400.0 * (channel + 1) as f64 * (at as f64 * 0.3).sin();
            }
        }
        let before = distance(&signals, &clean, [3000, 3200]);
        let changed = reconstruct(&mut signals, RATE, 5.0).unwrap();
        let after = distance(&signals, &clean, [3000, 3200]);
        assert!(after < 0.05 * before, "{before} to {after}");
        assert!((0.02..0.1).contains(&changed), "{changed} of the windows");
        assert_eq!(distance(&signals, &clean, [0, 2900]), 0.0);
        assert_eq!(distance(&signals, &clean, [3300, 6000]), 0.0);
    }

    #[test]
    fn a_clean_recording_stays_and_one_without_quiet_windows_is_not_touched() {
        let clean = recording();
        let mut signals = clean.clone();
        assert_eq!(reconstruct(&mut signals, RATE, 20.0), Some(0.0));
        assert_eq!(signals, clean);
        let mut short: Vec<Vec<f64>> = clean.iter().map(|signal| signal[..300].to_vec()).collect();
        assert_eq!(reconstruct(&mut short, RATE, 5.0), None);
        short.iter_mut().for_each(|signal| signal.truncate(10));
        assert_eq!(reconstruct(&mut short, RATE, 5.0), None);
        assert_eq!(reconstruct(&mut [], RATE, 5.0), None);
    }

    #[test]
    fn flat_channels_and_channels_that_are_sums_of_others_do_no_harm() {
        let mut signals = recording();
        signals[6].fill(0.0);
        signals[7] = signals[0].iter().zip(&signals[1]).map(|(a, b)| -(a + b)).collect();
        signals[2][1000..1100].iter_mut().for_each(|x| *x += 900.0);
        assert!(reconstruct(&mut signals, RATE, 5.0).unwrap() > 0.0);
        assert!(signals.iter().flatten().all(|x| x.is_finite() && x.abs() < 900.0));
    }
}
