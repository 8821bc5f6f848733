//! Probabilities that mean what they say: one temperature for all log-probabilities (Guo et al. 2017, arXiv 1706.04599).

use serde::Serialize;

use crate::metrics::WindowOutcome;

/// Natural logarithms of the temperatures between which one is sought.
const RANGE: [f64; 2] = [-4.0, 4.0];
/// Steps of the search, each of which narrows it by the golden ratio.
const STEPS: usize = 60;
/// Probabilities nearer to 0 or 1 than this count as this.
const LEAST: f64 = 1e-7;
/// Bins of the calibration error.
const BINS: usize = 10;

/// How well probabilities of windows fit what is true.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Calibration {
    /// Mean negative log-likelihood.
    pub nll: f64,
    /// Expected calibration error: how far the share of pathological windows lies from their mean probability, over ten bins.
    pub ece: f64,
}

/// The labelled windows: whether pathological, and log-odds.
fn labelled(windows: &[WindowOutcome]) -> Vec<(bool, f64)> {
    let log_odds = |p: f64| {
        let p = p.clamp(LEAST, 1.0 - LEAST);
        (p / (1.0 - p)).ln()
    };
    windows.iter().filter_map(|w| Some((w.label?, log_odds(w.p_pathological)))).collect()
}

fn nll(windows: &[(bool, f64)], temperature: f64) -> f64 {
    // -log σ(z) = log(1 + exp(-z)), with the sign of the class that is true.
    let loss = |&(label, odds): &(bool, f64)| {
        let z = if label { odds } else { -odds } / temperature;
        (-z.abs()).exp().ln_1p() + (-z).max(0.0)
    };
    windows.iter().map(loss).sum::<f64>() / windows.len() as f64
}

/// The temperature that makes labelled windows most likely, by golden-section search; absent without labels of both classes.
pub fn temperature(windows: &[WindowOutcome]) -> Option<f64> {
    let windows = labelled(windows);
    let pathological = windows.iter().filter(|(label, _)| *label).count();
    if pathological == 0 || pathological == windows.len() {
        return None;
    }
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let [mut low, mut high] = RANGE;
    for _ in 0..STEPS {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if nll(&windows, a.exp()) < nll(&windows, b.exp()) { high = b } else { low = a }
    }
    Some(f64::midpoint(low, high).exp())
}

/// How well the windows' probabilities fit once log-odds are divided by a temperature.
pub fn calibration(windows: &[WindowOutcome], temperature: f64) -> Option<Calibration> {
    let windows = labelled(windows);
    if windows.is_empty() {
        return None;
    }
    let mut bins = [(0.0, 0.0); BINS]; // sums of probability and of truth
    for &(label, odds) in &windows {
        let p = 1.0 / (1.0 + (-odds / temperature).exp());
        let bin = &mut bins[((p * BINS as f64) as usize).min(BINS - 1)];
        bin.0 += p;
        bin.1 += f64::from(u8::from(label));
    }
    let ece = bins.iter().map(|(p, truth)| (p - truth).abs()).sum::<f64>() / windows.len() as f64;
    Some(Calibration { nll: nll(&windows, temperature), ece })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows of which a share `right` is on the side that log-odds of ±`odds` say.
    fn windows(odds: f64, right: f64) -> Vec<WindowOutcome> {
        (0..200)
            .map(|i| {
                let says = i % 2 == 0;
                let label = if f64::from(i / 2) < 100.0 * right { says } else { !says };
                let p = 1.0 / (1.0 + (if says { -odds } else { odds }).exp());
                WindowOutcome { recording: String::new(), window: 0, label: Some(label), p_pathological: p }
            })
            .collect()
    }

    #[test]
    fn overconfident_probabilities_are_cooled_to_what_they_are_right_in() {
        // Right in three of four, but says log-odds of 4: T = 4 / ln 3.
        let windows = windows(4.0, 0.75);
        let found = temperature(&windows).unwrap();
        assert!((found - 4.0 / 3f64.ln()).abs() < 1e-3, "{found}");
        let (before, after) = (calibration(&windows, 1.0).unwrap(), calibration(&windows, found).unwrap());
        assert!(after.nll < before.nll && after.ece < 1e-3 && before.ece > 0.2, "{before:?} {after:?}");
    }

    #[test]
    fn one_class_says_nothing_about_temperature() {
        let mut windows = windows(1.0, 1.0);
        windows.retain(|w| w.label == Some(true));
        assert!(temperature(&windows).is_none());
    }
}
