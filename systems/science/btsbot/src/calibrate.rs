//! Scores that mean what they say: one temperature for all logits (Guo et al. 2017, arXiv 1706.04599).

use serde::Serialize;

/// Natural logarithms of the temperatures between which one is sought.
const RANGE: [f64; 2] = [-4.0, 4.0];
/// Steps of the search, each of which narrows it by the golden ratio.
const STEPS: usize = 60;
/// Scores nearer to 0 or 1 than this count as this.
const LEAST: f64 = 1e-9;
/// Bins of the reliability.
const BINS: usize = 10;

/// How well scores fit what is true.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Calibration {
    /// Mean negative log-likelihood.
    pub nll: f64,
    /// Expected calibration error: how far the share of bright transients lies from the mean score, over ten bins.
    pub ece: f64,
}

/// Log-odds of a score.
fn log_odds(score: f64) -> f64 {
    let score = score.clamp(LEAST, 1.0 - LEAST);
    (score / (1.0 - score)).ln()
}

/// A score after its log-odds are divided by a temperature.
pub fn cooled(score: f64, temperature: f64) -> f64 {
    1.0 / (1.0 + (-log_odds(score) / temperature).exp())
}

fn nll(labelled: &[(bool, f64)], temperature: f64) -> f64 {
    // −log σ(z) = log(1 + exp(−z)), with the sign of the class that is true.
    let loss = |&(label, score): &(bool, f64)| {
        let z = log_odds(score) * if label { 1.0 } else { -1.0 } / temperature;
        (-z.abs()).exp().ln_1p() + (-z).max(0.0)
    };
    labelled.iter().map(loss).sum::<f64>() / labelled.len() as f64
}

/// The temperature that makes the labels most likely, by golden-section search; absent where a class is.
pub fn temperature(labelled: &[(bool, f64)]) -> Option<f64> {
    let positives = labelled.iter().filter(|(label, _)| *label).count();
    if positives == 0 || positives == labelled.len() {
        return None;
    }
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let [mut low, mut high] = RANGE;
    for _ in 0..STEPS {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if nll(labelled, a.exp()) < nll(labelled, b.exp()) { high = b } else { low = a }
    }
    Some(f64::midpoint(low, high).exp())
}

/// Mean score and share of bright transients of every bin that is not empty.
pub fn reliability(labelled: &[(bool, f64)], temperature: f64) -> Vec<(f64, f64)> {
    let mut bins = [(0.0, 0.0, 0.0); BINS];
    for &(label, score) in labelled {
        let score = cooled(score, temperature);
        let bin = &mut bins[((score * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + score, bin.1 + f64::from(u8::from(label)), bin.2 + 1.0);
    }
    bins.into_iter()
        .filter(|bin| bin.2 > 0.0)
        .map(|(score, truth, count)| (score / count, truth / count))
        .collect()
}

/// How well scores fit once log-odds are divided by a temperature.
///
/// # Panics
/// When there are no scores.
pub fn calibration(labelled: &[(bool, f64)], temperature: f64) -> Calibration {
    assert!(!labelled.is_empty(), "no scores to judge");
    let mut bins = [(0.0, 0.0); BINS]; // sums of score and of truth
    for &(label, score) in labelled {
        let score = cooled(score, temperature);
        let bin = &mut bins[((score * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + score, bin.1 + f64::from(u8::from(label)));
    }
    let ece = bins.iter().map(|(score, truth)| (score - truth).abs()).sum::<f64>() / labelled.len() as f64;
    Calibration { nll: nll(labelled, temperature), ece }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overconfident_scores_are_cooled_to_what_they_are_right_in() {
        // Right in three of four, but says log-odds of 4: T = 4 / ln 3.
        let score = |says: bool| 1.0 / (1.0 + (if says { -4.0f64 } else { 4.0 }).exp());
        let labelled: Vec<(bool, f64)> = (0..200)
            .map(|i| (if i / 2 % 4 < 3 { i % 2 == 0 } else { i % 2 == 1 }, score(i % 2 == 0)))
            .collect();
        let found = temperature(&labelled).unwrap();
        assert!((found - 4.0 / 3f64.ln()).abs() < 1e-3, "{found}");
        let (before, after) = (calibration(&labelled, 1.0), calibration(&labelled, found));
        assert!(after.nll < before.nll && after.ece < 1e-3 && before.ece > 0.2, "{before:?} {after:?}");
        assert!(temperature(&labelled[..1]).is_none());
    }
}
