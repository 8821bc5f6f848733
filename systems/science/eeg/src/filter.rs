//! Band-pass filters of a finite, symmetric response, which delay nothing.

use std::f64::consts::PI;

/// A windowed sinc between two frequencies; transitions are a quarter of an edge wide, at least 2 Hz, and no wider than the
/// lower edge or the room below the Nyquist rate.
#[derive(Debug, Clone)]
pub struct BandPass {
    /// Odd in number; the middle one weighs the sample itself.
    taps: Vec<f64>,
}

impl BandPass {
    /// Passes what lies between `low` and `high` hertz; where `high` reaches the Nyquist rate, all above `low`.
    pub fn new(low: f64, high: f64, rate: f64) -> Self {
        let nyquist = rate / 2.0;
        let lower = (0.25 * low).max(2.0).min(low);
        let room = nyquist - high;
        let upper = if room > 0.0 { (0.25 * high).max(2.0).min(room) } else { f64::INFINITY };
        // A Hamming window falls over 3.3 / length of the sample rate.
        let half = (1.65 * rate / lower.min(upper)).ceil() as usize;
        let cut_off = |edge: f64| sinc(half, edge.min(nyquist) / rate);
        let (below_high, below_low) = (
            if room > 0.0 { cut_off(high + upper / 2.0) } else { impulse(half) },
            cut_off((low - lower / 2.0).max(0.0)),
        );
        Self { taps: below_high.into_iter().zip(below_low).map(|(a, b)| a - b).collect() }
    }

    /// The signal without what lies outside; it is mirrored at its ends.
    pub fn apply(&self, signal: &[f64]) -> Vec<f64> {
        let half = (self.taps.len() / 2) as isize;
        let last = signal.len() as isize - 1;
        if last < 1 {
            return vec![0.0; signal.len()];
        }
        let mirrored = |at: isize| {
            let at = at.rem_euclid(2 * last);
            signal[if at > last { 2 * last - at } else { at } as usize]
        };
        let output = |at: isize| {
            let inner = at >= half && at + half <= last;
            match inner {
                true => {
                    let from = (at - half) as usize;
                    signal[from..from + self.taps.len()].iter().zip(&self.taps).map(|(x, tap)| x * tap).sum()
                }
                false => self.taps.iter().zip(at - half..).map(|(tap, at)| tap * mirrored(at)).sum(),
            }
        };
        (0..=last).map(output).collect()
    }
}

/// A low-pass filter with its cut-off at so many cycles a sample, whose taps sum to 1.
fn sinc(half: usize, cut_off: f64) -> Vec<f64> {
    if cut_off <= 0.0 {
        return vec![0.0; 2 * half + 1];
    }
    let tap = |place: usize| {
        let x = place as f64 - half as f64;
        let window = 0.54 + 0.46 * (PI * x / half as f64).cos();
        let angle = 2.0 * PI * cut_off * x;
        window * if x == 0.0 { 1.0 } else { angle.sin() / angle }
    };
    let taps: Vec<f64> = (0..=2 * half).map(tap).collect();
    let sum: f64 = taps.iter().sum();
    taps.into_iter().map(|tap| tap / sum).collect()
}

/// The filter that changes nothing.
fn impulse(half: usize) -> Vec<f64> {
    let mut taps = vec![0.0; 2 * half + 1];
    taps[half] = 1.0;
    taps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gain(filter: &BandPass, frequency: f64, rate: f64) -> f64 {
        let signal: Vec<f64> = (0..6000).map(|i| (2.0 * PI * frequency * i as f64 / rate).cos()).collect();
        let filtered = filter.apply(&signal);
        let power = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        (power(&filtered[1500..4500]) / power(&signal[1500..4500])).sqrt()
    }

    #[test]
    fn what_lies_in_the_band_passes_and_nothing_else() {
        let filter = BandPass::new(1.0, 40.0, 250.0);
        for (frequency, passes) in [(0.1, 0.0), (2.0, 1.0), (10.0, 1.0), (38.0, 1.0), (60.0, 0.0)] {
            let gain = gain(&filter, frequency, 250.0);
            assert!((gain - passes).abs() < 0.02, "{frequency} Hz: {gain}");
        }
        // The upper edge lies beyond the Nyquist rate: a high-pass filter.
        let filter = BandPass::new(1.0, 75.0, 100.0);
        assert!((gain(&filter, 45.0, 100.0) - 1.0).abs() < 0.02 && gain(&filter, 0.1, 100.0) < 0.02);
    }

    #[test]
    fn short_signals_are_filtered_too() {
        let filter = BandPass::new(1.0, 40.0, 250.0);
        for length in [0, 1, 2, 10] {
            assert_eq!(filter.apply(&vec![1.0; length]).len(), length);
        }
        assert!(filter.apply(&[5.0; 10]).iter().all(|x| x.abs() < 0.2));
    }
}
