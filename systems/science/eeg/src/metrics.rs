//! From windows to recordings, and how good the decisions are.

use std::collections::HashMap;

use kiln_data::{roc_auc, roc_curve};
use rand::{Rng, RngExt};
use serde::Serialize;

/// Probability from which a recording counts as pathological.
pub const DECISION: f64 = 0.5;
/// Draws of a bootstrap.
pub const DRAWS: usize = 1000;
/// What the interval leaves out on each side.
const TAIL: f64 = 0.025;

/// What a network says of one window.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WindowOutcome {
    /// The recording that it is of.
    pub recording: String,
    /// Its number in the recording.
    pub window: usize,
    /// Whether the recording is pathological, where that is known.
    pub label: Option<bool>,
    /// The probability that it is.
    pub p_pathological: f64,
}

/// What the windows of one recording say together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The recording.
    pub recording: String,
    /// Whether it is pathological, where that is known.
    pub label: Option<bool>,
    /// The mean of its windows' probabilities.
    pub p_pathological: f64,
    /// How many windows it has.
    pub windows: usize,
}

impl Outcome {
    /// The decision; a tie counts as pathological.
    pub fn decision(&self) -> bool {
        self.p_pathological >= DECISION
    }
}

/// The mean over every recording's windows, in the order in which recordings first appear.
pub fn by_recording(windows: &[WindowOutcome]) -> Vec<Outcome> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for window in windows {
        let place = *places.entry(&window.recording).or_insert(outcomes.len());
        if place == outcomes.len() {
            outcomes.push(Outcome {
                recording: window.recording.clone(),
                label: window.label,
                p_pathological: 0.0,
                windows: 0,
            });
        }
        outcomes[place].p_pathological += window.p_pathological;
        outcomes[place].windows += 1;
    }
    for outcome in &mut outcomes {
        outcome.p_pathological /= outcome.windows as f64;
    }
    outcomes
}

/// How good decisions about recordings are. What is undefined, as a sensitivity where nothing is pathological, is absent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Metrics {
    /// Recordings with a label.
    pub n: usize,
    /// Pathological ones that were found.
    pub tp: usize,
    /// Normal ones that were called normal.
    pub tn: usize,
    /// Normal ones that were called pathological.
    pub fp: usize,
    /// Pathological ones that were missed.
    #[serde(rename = "fn")]
    pub missed: usize,
    /// Share of right decisions.
    pub accuracy: Option<f64>,
    /// Share of the pathological that were found.
    pub sensitivity: Option<f64>,
    /// Share of the normal that were called normal.
    pub specificity: Option<f64>,
    /// Mean of the two.
    pub balanced_accuracy: Option<f64>,
    /// Harmonic mean of precision and sensitivity.
    pub f1: Option<f64>,
    /// Matthews' correlation coefficient.
    pub mcc: Option<f64>,
    /// Area under the ROC curve: how often a pathological recording has a higher probability than a normal one.
    pub auc: Option<f64>,
}

impl Metrics {
    /// Over the recordings that have a label.
    pub fn of<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> Self {
        let labelled: Vec<(bool, f64)> =
            outcomes.into_iter().filter_map(|o| Some((o.label?, o.p_pathological))).collect();
        let count = |label: bool, decision: bool| {
            labelled.iter().filter(|&&(l, p)| l == label && (p >= DECISION) == decision).count()
        };
        let (tp, tn, fp, missed) =
            (count(true, true), count(false, false), count(false, true), count(true, false));
        let ratio = |a: usize, b: usize| (b > 0).then(|| a as f64 / b as f64);
        let (sensitivity, specificity) = (ratio(tp, tp + missed), ratio(tn, tn + fp));
        let product = [tp + fp, tp + missed, tn + fp, tn + missed].map(|x| x as f64).iter().product::<f64>();
        let covariance = tp as f64 * tn as f64 - fp as f64 * missed as f64;
        Self {
            n: labelled.len(),
            tp,
            tn,
            fp,
            missed,
            accuracy: ratio(tp + tn, labelled.len()),
            sensitivity,
            specificity,
            balanced_accuracy: sensitivity.zip(specificity).map(|(a, b)| (a + b) / 2.0),
            f1: ratio(2 * tp, 2 * tp + fp + missed),
            mcc: (product > 0.0).then(|| covariance / product.sqrt()),
            auc: roc_auc(labelled),
        }
    }
}

/// The ROC curve of the labelled: (1 - specificity, sensitivity) at every threshold.
pub fn roc(outcomes: &[Outcome]) -> Vec<(f64, f64)> {
    roc_curve(outcomes.iter().filter_map(|o| Some((o.label?, o.p_pathological))))
}

/// A 95 % interval of a figure over recordings drawn anew, as many of each class as there are. Absent where the figure is.
pub fn interval(
    outcomes: &[Outcome],
    figure: impl Fn(&Metrics) -> Option<f64>,
    rng: &mut impl Rng,
) -> Option<[f64; 2]> {
    let draws = resamples(outcomes, rng);
    percentiles(
        draws.iter().filter_map(|draw| figure(&Metrics::of(draw.iter().map(|&at| &outcomes[at])))).collect(),
    )
}

/// How much better method than baseline are in balanced accuracy, in the mean over seeds, with a 95 % interval over
/// recordings: both are judged on the same ones in every draw.
///
/// # Panics
/// When runs do not judge the same recordings.
pub fn paired_difference(
    method: &[Vec<Outcome>],
    baseline: &[Vec<Outcome>],
    rng: &mut impl Rng,
) -> Option<(f64, [f64; 2])> {
    let first = method.first()?;
    assert!(method.iter().chain(baseline).all(|run| run.len() == first.len()), "runs over other recordings");
    let mean = |runs: &[Vec<Outcome>], draw: &[usize]| {
        let scores = runs.iter().map(|run| Metrics::of(draw.iter().map(|&at| &run[at])).balanced_accuracy);
        Some(scores.sum::<Option<f64>>()? / runs.len() as f64)
    };
    let difference = |draw: &[usize]| Some(mean(method, draw)? - mean(baseline, draw)?);
    let all: Vec<usize> = (0..first.len()).collect();
    let draws = resamples(first, rng).iter().filter_map(|draw| difference(draw)).collect();
    Some((difference(&all)?, percentiles(draws)?))
}

/// Places of recordings drawn with replacement within each class.
fn resamples(outcomes: &[Outcome], rng: &mut impl Rng) -> Vec<Vec<usize>> {
    let of = |label| (0..outcomes.len()).filter(|&at| outcomes[at].label == Some(label)).collect::<Vec<_>>();
    let classes = [of(false), of(true)];
    let mut draw = || {
        let classes = classes.iter().filter(|class| !class.is_empty());
        classes
            .flat_map(|class| {
                class.iter().map(|_| class[rng.random_range(0..class.len())]).collect::<Vec<_>>()
            })
            .collect()
    };
    (0..DRAWS).map(|_| draw()).collect()
}

/// The middle 95 %.
pub fn percentiles(mut values: Vec<f64>) -> Option<[f64; 2]> {
    if values.is_empty() {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    Some([at(TAIL), at(1.0 - TAIL)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(label: bool, p: f64) -> Outcome {
        Outcome { recording: String::new(), label: Some(label), p_pathological: p, windows: 1 }
    }

    #[test]
    fn undefined_figures_are_absent() {
        let metrics = Metrics::of(&[outcome(false, 0.2), outcome(false, 0.7)]);
        assert_eq!((metrics.specificity, metrics.accuracy), (Some(0.5), Some(0.5)));
        assert!(metrics.sensitivity.is_none() && metrics.auc.is_none() && metrics.mcc.is_none());
        assert_eq!(Metrics::of(&[]).accuracy, None);
    }

    #[test]
    fn the_area_under_the_curve_counts_ties_by_half() {
        let outcomes = [outcome(true, 0.5), outcome(false, 0.5), outcome(true, 0.9), outcome(false, 0.1)];
        assert_eq!(Metrics::of(&outcomes).auc, Some(0.875));
        assert!(outcomes[0].decision(), "a tie counts as pathological");
        let curve = roc(&outcomes);
        assert_eq!(curve, [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]);
    }

    #[test]
    fn intervals_hold_the_figure_and_differences_are_paired() {
        let mut rng = kiln_core::random_stream(0, "bootstrap", 0);
        let outcomes: Vec<Outcome> = (0..60)
            .map(|i| outcome(i % 2 == 0, if i % 10 < 7 { 0.9 - 0.8 * f64::from(i % 2) } else { 0.5 }))
            .collect();
        let found = Metrics::of(&outcomes).balanced_accuracy.unwrap();
        let [low, high] = interval(&outcomes, |m| m.balanced_accuracy, &mut rng).unwrap();
        assert!(low < found && found < high && high - low < 0.3, "{low} {found} {high}");
        let same = std::slice::from_ref(&outcomes);
        let (difference, interval) = paired_difference(same, same, &mut rng).unwrap();
        assert_eq!((difference, interval), (0.0, [0.0, 0.0]));
    }
}
