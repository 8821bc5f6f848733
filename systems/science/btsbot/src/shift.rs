//! Whether alerts of today are like those that a network was judged by, §6.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_core::Result;
use rand::{Rng, RngExt};
use serde::Serialize;

use crate::dataset::Dataset;
use crate::features::FEATURES;
use crate::policy::Policy;
use crate::scores::{Scored, Source, read_scores, sources};
use crate::tables::CsvTable;

/// Draws of sources.
const RESAMPLES: usize = 1000;
/// What lies beyond either end of an interval.
const TAIL: f64 = 0.025;
/// A difference of areas under the ROC curve that matters.
pub const LARGEST_DIFFERENCE: f64 = 0.02;
/// Bins of the stability index: tenths of the first sample.
const BINS: usize = 10;
/// A share that stands for an empty bin.
const LEAST_SHARE: f64 = 1e-4;

/// Scored alerts, and what is known of them besides.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// The alerts.
    pub alerts: Vec<Scored>,
    /// Features by name, where they are known.
    pub features: BTreeMap<String, Vec<f64>>,
}

impl Sample {
    /// Reads a table of scored alerts; those of the 25 features that are columns of it are compared, too.
    ///
    /// # Errors
    /// As [`read_scores`].
    pub fn read(path: &Path) -> Result<Self> {
        let alerts = read_scores(path)?;
        let mut table = CsvTable::open(path, &[])?;
        let columns: Vec<(&str, usize)> =
            FEATURES.iter().filter_map(|name| Some((*name, table.column(name)?))).collect();
        let mut features: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        while table.advance()? {
            for &(name, column) in &columns {
                features.entry(name.into()).or_default().extend(table.number(column)?);
            }
        }
        Ok(Self { alerts, features })
    }

    /// Of scored alerts of a data set.
    pub fn of(data: &Dataset, scores: &[f64]) -> Self {
        let all: Vec<usize> = (0..data.len()).collect();
        let column = |at: usize| data.features.iter().map(|row| f64::from(row[at])).collect();
        let features = FEATURES.iter().enumerate().map(|(at, name)| ((*name).to_string(), column(at)));
        Self { alerts: data.scored(&all, scores), features: features.collect() }
    }
}

/// A figure of both samples, and the second less the first with a 95 % interval over sources.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Compared {
    /// Of the first sample.
    pub a: Option<f64>,
    /// Of the second.
    pub b: Option<f64>,
    /// The second less the first.
    pub difference: Option<f64>,
    /// Between these in 95 of 100 draws of sources.
    pub interval: Option<[f64; 2]>,
}

/// How the distribution of a feature differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FeatureShift {
    /// The feature.
    pub name: String,
    /// The largest distance of the cumulative distributions (Kolmogorov and Smirnov).
    pub ks: f64,
    /// The population stability index: Σ (b − a) ln(b / a) over shares in tenths of the first sample.
    pub psi: f64,
}

/// In what two samples differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shift {
    /// Area under the ROC curve, over alerts.
    pub auc: Compared,
    /// Completeness of a policy, over sources,
    pub completeness: Compared,
    /// and its purity.
    pub purity: Compared,
    /// Distance of the scores' distributions.
    pub score_ks: f64,
    /// Features, those that differ most first.
    pub features: Vec<FeatureShift>,
    /// No significant shift: the interval of the areas' difference contains 0, and it is not above 0.02 either way.
    pub is_insignificant: bool,
    /// The same in words.
    pub verdict: &'static str,
}

/// Compares two samples.
///
/// # Errors
/// When a source has alerts of both labels.
pub fn compare(a: &Sample, b: &Sample, policy: &Policy, rng: &mut impl Rng) -> Result<Shift> {
    let (first, second) = (Figures::new(&a.alerts, policy)?, Figures::new(&b.alerts, policy)?);
    let mut draws: [Vec<f64>; 3] = Default::default();
    for _ in 0..RESAMPLES {
        let (before, after) = (first.of(&first.draw(rng)), second.of(&second.draw(rng)));
        for (draws, (before, after)) in draws.iter_mut().zip(before.into_iter().zip(after)) {
            draws.extend(before.zip(after).map(|(before, after)| after - before));
        }
    }
    let (before, after) = (first.of(&first.once()), second.of(&second.once()));
    let mut compared = before.into_iter().zip(after).zip(draws).map(|((a, b), draws)| Compared {
        a,
        b,
        difference: a.zip(b).map(|(a, b)| b - a),
        interval: percentiles(draws),
    });
    let mut next =
        || compared.next().unwrap_or(Compared { a: None, b: None, difference: None, interval: None });
    let (auc, completeness, purity) = (next(), next(), next());
    let mut features: Vec<FeatureShift> = Vec::new();
    for (name, before) in &a.features {
        if let Some(after) = b.features.get(name).filter(|after| !after.is_empty() && !before.is_empty()) {
            features.push(FeatureShift {
                name: name.clone(),
                ks: ks(before, after),
                psi: psi(before, after),
            });
        }
    }
    features.sort_by(|x, y| y.ks.total_cmp(&x.ks));
    let scores = |sample: &Sample| sample.alerts.iter().map(|alert| alert.score).collect::<Vec<_>>();
    let is_insignificant = auc.difference.is_some_and(|difference| difference.abs() <= LARGEST_DIFFERENCE)
        && auc.interval.is_some_and(|[low, high]| low <= 0.0 && high >= 0.0);
    let verdict = match (auc.difference, is_insignificant) {
        (None, _) => "not to be said: a sample lacks a class",
        (_, true) => "no significant shift",
        (_, false) => "the samples differ",
    };
    let score_ks = ks(&scores(a), &scores(b));
    Ok(Shift { auc, completeness, purity, score_ks, features, is_insignificant, verdict })
}

/// What figures of a sample need, so that draws of sources are only weights.
struct Figures {
    /// Alerts by score: label, score and the number of their source.
    alerts: Vec<(bool, f64, usize)>,
    /// Of every source: whether it is a bright transient, whether it is judged by policies, and whether it became a target.
    sources: Vec<(bool, bool, bool)>,
}

impl Figures {
    fn new(alerts: &[Scored], policy: &Policy) -> Result<Self> {
        let sources = sources(alerts)?;
        let sources: Vec<&Source<'_>> = sources.iter().filter(|source| source.label.is_some()).collect();
        let judged =
            |source: &Source<'_>| !crate::policy::judged(std::slice::from_ref(source), &[]).is_empty();
        let mut by_score: Vec<(bool, f64, usize)> = Vec::new();
        for (number, source) in sources.iter().enumerate() {
            let label = source.label == Some(true);
            by_score.extend(source.alerts.iter().map(|alert| (label, alert.score, number)));
        }
        by_score.sort_by(|a, b| a.1.total_cmp(&b.1));
        let sources = sources.iter().map(|source| {
            (source.label == Some(true), judged(source), policy.trigger(&source.alerts).is_some())
        });
        Ok(Self { alerts: by_score, sources: sources.collect() })
    }

    /// Every source once.
    fn once(&self) -> Vec<f64> {
        vec![1.0; self.sources.len()]
    }

    /// How often each source is drawn, with replacement within each class.
    fn draw(&self, rng: &mut impl Rng) -> Vec<f64> {
        let mut weights = vec![0.0; self.sources.len()];
        for class in [false, true] {
            let of: Vec<usize> = (0..self.sources.len()).filter(|&at| self.sources[at].0 == class).collect();
            for _ in &of {
                weights[of[rng.random_range(0..of.len())]] += 1.0;
            }
        }
        weights
    }

    /// Area under the ROC curve, completeness and purity, with sources that weigh so much.
    fn of(&self, weights: &[f64]) -> [Option<f64>; 3] {
        let (mut wins, mut below, mut positives) = (0.0, 0.0, 0.0);
        for tied in self.alerts.chunk_by(|a, b| a.1 == b.1) {
            let weight = |class: bool| -> f64 {
                tied.iter()
                    .filter(|(label, _, _)| *label == class)
                    .map(|&(_, _, source)| weights[source])
                    .sum()
            };
            let (positive, negative) = (weight(true), weight(false));
            wins += positive * (below + 0.5 * negative);
            below += negative;
            positives += positive;
        }
        let ratio = |part: f64, whole: f64| (whole > 0.0).then(|| part / whole);
        let (mut found, mut transients, mut targets) = (0.0, 0.0, 0.0);
        for (&(is_transient, is_judged, is_target), weight) in self.sources.iter().zip(weights) {
            if is_judged {
                found += if is_transient && is_target { *weight } else { 0.0 };
                transients += if is_transient { *weight } else { 0.0 };
                targets += if is_target { *weight } else { 0.0 };
            }
        }
        [ratio(wins, positives * below), ratio(found, transients), ratio(found, targets)]
    }
}

/// The middle 95 %.
fn percentiles(mut values: Vec<f64>) -> Option<[f64; 2]> {
    if values.is_empty() {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    Some([at(TAIL), at(1.0 - TAIL)])
}

/// The largest distance between two cumulative distributions.
pub fn ks(a: &[f64], b: &[f64]) -> f64 {
    let sorted = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values
    };
    let (a, b) = (sorted(a), sorted(b));
    let share =
        |values: &[f64], x: f64| values.partition_point(|&value| value <= x) as f64 / values.len() as f64;
    a.iter().chain(&b).map(|&x| (share(&a, x) - share(&b, x)).abs()).fold(0.0, f64::max)
}

/// The population stability index over tenths of the first sample.
pub fn psi(a: &[f64], b: &[f64]) -> f64 {
    let mut sorted = a.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut edges: Vec<f64> = (1..BINS).map(|bin| sorted[(sorted.len() - 1) * bin / BINS]).collect();
    edges.dedup();
    let shares = |values: &[f64]| {
        let mut counts = vec![0.0; edges.len() + 1];
        values.iter().for_each(|&x| counts[edges.partition_point(|&edge| edge < x)] += 1.0);
        counts
            .into_iter()
            .map(|count: f64| (count / values.len() as f64).max(LEAST_SHARE))
            .collect::<Vec<_>>()
    };
    shares(a).iter().zip(shares(b)).map(|(a, b)| (b - a) * (b / a).ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_of_distributions() {
        let a: Vec<f64> = (0..100).map(f64::from).collect();
        let b: Vec<f64> = (0..100).map(|x| f64::from(x) + 30.0).collect();
        assert!((ks(&a, &b) - 0.3).abs() < 1e-9 && ks(&a, &a) == 0.0);
        assert!(psi(&a, &a) == 0.0 && psi(&a, &b) > 0.5);
        assert_eq!(psi(&[1.0; 5], &[1.0; 9]), 0.0);
    }

    #[test]
    fn the_same_sample_is_no_shift_and_a_worse_one_is() {
        let sample = |wrong: usize| {
            let alert = |i: usize| Scored {
                object_id: format!("s{i:03}"),
                candid: String::new(),
                jd: 0.0,
                label: Some(i.is_multiple_of(2)),
                magpsf: 18.0,
                score: if i.is_multiple_of(2) == (i % 20 >= wrong) {
                    0.9
                } else {
                    0.1 + 0.001 * (i % 7) as f64
                },
            };
            Sample { alerts: (0..200).map(alert).collect(), features: BTreeMap::new() }
        };
        let policy = Policy::parse("bts_p1").unwrap();
        let mut rng = kiln_core::random_stream(0, "shift", 0);
        let same = compare(&sample(2), &sample(2), &policy, &mut rng).unwrap();
        assert!(same.is_insignificant && same.auc.difference == Some(0.0));
        let worse = compare(&sample(2), &sample(6), &policy, &mut rng).unwrap();
        assert!(!worse.is_insignificant && worse.auc.difference.unwrap() < -0.1);
    }
}
