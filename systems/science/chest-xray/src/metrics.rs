//! How good decisions about images are.

use kiln_data::{roc_auc, roc_curve};
use rand::{Rng, RngExt};
use serde::Serialize;

/// Probability from which an image counts as tuberculosis.
pub const DECISION: f64 = 0.5;
/// Draws of a bootstrap.
const DRAWS: usize = 1000;
/// What an interval leaves out on each side.
const TAIL: f64 = 0.025;
/// Half the width of a 95 % interval in standard errors.
const NORMAL_95: f64 = 1.96;
/// The least sensitivity of a triage test in the target product profile of the WHO (2014).
pub const TRIAGE_SENSITIVITY: f64 = 0.90;
/// And its least specificity.
pub const TRIAGE_SPECIFICITY: f64 = 0.70;
/// Bins of a reliability curve.
const BINS: usize = 10;

/// What a network says of an image whose label is known.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// Its name.
    pub image: String,
    /// Whether it shows tuberculosis.
    pub is_tb: bool,
    /// The probability that it does.
    pub p_tb: f64,
}

/// Figures of one class, or of both weighted by their frequency. What is undefined, such as the precision of a class that
/// was never chosen, is absent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ClassMetrics {
    /// Share of the images put into the class that belong there.
    pub precision: Option<f64>,
    /// Share of the class's images that were found.
    pub sensitivity: Option<f64>,
    /// Harmonic mean of the two.
    pub f1: Option<f64>,
    /// Share of the other class's images that were not put into this one.
    pub specificity: Option<f64>,
}

/// Figures of decisions at one threshold, tuberculosis being what is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Metrics {
    /// Images.
    pub n: usize,
    /// Tuberculosis that was found.
    pub tp: usize,
    /// Normal images called tuberculosis.
    pub fp: usize,
    /// Tuberculosis that was missed.
    #[serde(rename = "fn")]
    pub missed: usize,
    /// Normal images called normal.
    pub tn: usize,
    /// Share of right decisions.
    pub accuracy: Option<f64>,
    /// Half of its 95 % interval, `1.96 √(m (1 - m) / n)` as the paper has it for every figure `m`.
    pub accuracy_ci95: Option<f64>,
    /// Precision, sensitivity, F1 and specificity for tuberculosis.
    #[serde(flatten)]
    pub tb: ClassMetrics,
    /// Area under the ROC curve: how often a tuberculous image has a higher probability than a normal one.
    pub auc: Option<f64>,
    /// Half of its 95 % interval.
    pub auc_ci95: Option<f64>,
    /// Halves of the 95 % intervals of precision, sensitivity, F1 and specificity.
    pub ci95: ClassMetrics,
    /// The same figures where normal is what is looked for.
    pub normal: ClassMetrics,
    /// Both classes, weighted by their frequency.
    pub weighted: ClassMetrics,
}

fn ratio(a: usize, b: usize) -> Option<f64> {
    (b > 0).then(|| a as f64 / b as f64)
}

/// `1.96 √(m (1 - m) / n)`
fn half_width(m: f64, n: usize) -> f64 {
    NORMAL_95 * (m * (1.0 - m) / n as f64).sqrt()
}

impl ClassMetrics {
    fn of(tp: usize, fp: usize, missed: usize, tn: usize) -> Self {
        Self {
            precision: ratio(tp, tp + fp),
            sensitivity: ratio(tp, tp + missed),
            f1: ratio(2 * tp, 2 * tp + fp + missed),
            specificity: ratio(tn, tn + fp),
        }
    }

    /// Halves of the 95 % intervals in the paper's form.
    fn half_widths(&self, n: usize) -> Self {
        let half = |m: Option<f64>| m.map(|m| half_width(m, n));
        Self {
            precision: half(self.precision),
            sensitivity: half(self.sensitivity),
            f1: half(self.f1),
            specificity: half(self.specificity),
        }
    }

    /// `Σ_c n_c m_c / n`
    fn weighted(classes: [(usize, Self); 2]) -> Self {
        let mean = |of: fn(&Self) -> Option<f64>| {
            let n = classes[0].0 + classes[1].0;
            let mut sum = 0.0;
            // A class without images has no weight, and need not have a figure.
            for (count, metrics) in classes.iter().filter(|(count, _)| *count > 0) {
                sum += *count as f64 * of(metrics)?;
            }
            (n > 0).then(|| sum / n as f64)
        };
        Self {
            precision: mean(|m| m.precision),
            sensitivity: mean(|m| m.sensitivity),
            f1: mean(|m| m.f1),
            specificity: mean(|m| m.specificity),
        }
    }
}

impl Metrics {
    /// Of decisions for tuberculosis from `threshold` on.
    pub fn of(scores: &[Scored], threshold: f64) -> Self {
        let count = |label: bool, decision: bool| {
            scores.iter().filter(|s| s.is_tb == label && (s.p_tb >= threshold) == decision).count()
        };
        let (tp, fp, missed, tn) =
            (count(true, true), count(false, true), count(true, false), count(false, false));
        let n = scores.len();
        let accuracy = ratio(tp + tn, n);
        let tb = ClassMetrics::of(tp, fp, missed, tn);
        let normal = ClassMetrics::of(tn, missed, fp, tp);
        let auc = auc(scores);
        Self {
            n,
            tp,
            fp,
            missed,
            tn,
            accuracy,
            accuracy_ci95: accuracy.map(|a| half_width(a, n)),
            tb,
            auc,
            auc_ci95: auc.map(|auc| half_width(auc, n)),
            ci95: tb.half_widths(n),
            normal,
            weighted: ClassMetrics::weighted([(tp + missed, tb), (tn + fp, normal)]),
        }
    }
}

/// Area under the ROC curve.
pub fn auc(scores: &[Scored]) -> Option<f64> {
    roc_auc(scores.iter().map(|s| (s.is_tb, s.p_tb)))
}

/// Points (1 - specificity, sensitivity) from the strictest threshold to the laxest.
pub fn roc(scores: &[Scored]) -> Vec<(f64, f64)> {
    roc_curve(scores.iter().map(|s| (s.is_tb, s.p_tb)))
}

/// 95 % intervals by drawing images anew with replacement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Intervals {
    /// Of the accuracy.
    pub accuracy: Option<[f64; 2]>,
    /// Of the precision.
    pub precision: Option<[f64; 2]>,
    /// Of the sensitivity.
    pub sensitivity: Option<[f64; 2]>,
    /// Of F1.
    pub f1: Option<[f64; 2]>,
    /// Of the specificity.
    pub specificity: Option<[f64; 2]>,
    /// Of the area under the ROC curve.
    pub auc: Option<[f64; 2]>,
}

/// See [`Intervals`].
pub fn intervals(scores: &[Scored], threshold: f64, rng: &mut impl Rng) -> Intervals {
    let mut draws: [Vec<f64>; 6] = Default::default();
    for _ in 0..DRAWS {
        let drawn: Vec<Scored> =
            scores.iter().map(|_| scores[rng.random_range(0..scores.len())].clone()).collect();
        let m = Metrics::of(&drawn, threshold);
        let figures = [m.accuracy, m.tb.precision, m.tb.sensitivity, m.tb.f1, m.tb.specificity, m.auc];
        draws.iter_mut().zip(figures).for_each(|(draws, figure)| draws.extend(figure));
    }
    let [accuracy, precision, sensitivity, f1, specificity, auc] = draws.map(|mut draws| {
        draws.sort_by(f64::total_cmp);
        let at =
            |share: f64| draws.get((share * draws.len().saturating_sub(1) as f64).round() as usize).copied();
        Some([at(TAIL)?, at(1.0 - TAIL)?])
    });
    Intervals { accuracy, precision, sensitivity, f1, specificity, auc }
}

/// A threshold and what it brings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct OperatingPoint {
    /// Probability from which an image is referred.
    pub threshold: f64,
    /// Share of tuberculosis that is found.
    pub sensitivity: f64,
    /// Share of normal images that are not referred.
    pub specificity: f64,
    /// Whether it satisfies the target profile of a triage test: sensitivity ≥ 0.90 and specificity ≥ 0.70.
    pub meets_triage_profile: bool,
}

/// The threshold with a sensitivity of at least `least` and the highest specificity; none without both classes.
pub fn operating_point(scores: &[Scored], least: f64) -> Option<OperatingPoint> {
    let mut tb: Vec<f64> = scores.iter().filter(|s| s.is_tb).map(|s| s.p_tb).collect();
    tb.sort_by(|a, b| b.total_cmp(a));
    let needed = (least * tb.len() as f64).ceil() as usize;
    let last = *tb.get(needed.max(1) - 1)?;
    // Half-way to the next image, so that rounding does not decide.
    let next = scores.iter().map(|s| s.p_tb).filter(|&p| p < last).fold(0.0, f64::max);
    let threshold = (last + next) / 2.0;
    let metrics = Metrics::of(scores, threshold);
    let (sensitivity, specificity) = (metrics.tb.sensitivity?, metrics.tb.specificity?);
    let meets_triage_profile = sensitivity >= TRIAGE_SENSITIVITY && specificity >= TRIAGE_SPECIFICITY;
    Some(OperatingPoint { threshold, sensitivity, specificity, meets_triage_profile })
}

/// How far probabilities are what they say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reliability {
    /// Mean probability and share of tuberculosis of every bin that has images.
    pub bins: Vec<(f64, f64)>,
    /// Expected calibration error: the mean distance of the two, weighted by images.
    pub ece: f64,
    /// Mean squared distance of probability and label.
    pub brier: f64,
}

/// See [`Reliability`].
pub fn reliability(scores: &[Scored]) -> Reliability {
    let mut bins = vec![(0.0, 0.0, 0.0); BINS];
    for s in scores {
        let bin = &mut bins[((s.p_tb * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + s.p_tb, bin.1 + f64::from(u8::from(s.is_tb)), bin.2 + 1.0);
    }
    bins.retain(|bin| bin.2 > 0.0);
    let n = scores.len().max(1) as f64;
    let ece = bins.iter().map(|(p, tb, _)| (p - tb).abs()).sum::<f64>() / n;
    let brier = scores.iter().map(|s| (s.p_tb - f64::from(u8::from(s.is_tb))).powi(2)).sum::<f64>() / n;
    Reliability { bins: bins.into_iter().map(|(p, tb, count)| (p / count, tb / count)).collect(), ece, brier }
}

/// Slope and shift of logits (Platt scaling) under which the labels are likeliest, by Newton's method.
///
/// The labels are pulled towards the middle as Platt does, so that separable scores have an answer.
pub fn platt(scores: &[Scored]) -> Option<[f64; 2]> {
    let tb = scores.iter().filter(|s| s.is_tb).count() as f64;
    let normal = scores.len() as f64 - tb;
    if tb == 0.0 || normal == 0.0 {
        return None;
    }
    let (high, low) = ((tb + 1.0) / (tb + 2.0), 1.0 / (normal + 2.0));
    let rows: Vec<(f64, f64)> =
        scores.iter().map(|s| (logit(s.p_tb), if s.is_tb { high } else { low })).collect();
    let (mut a, mut b) = (1.0, 0.0);
    for _ in 0..100 {
        // Gradient and a slightly regularised Hessian of the cross-entropy.
        let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (0.0, 0.0, 1e-6, 0.0, 1e-6);
        for &(x, t) in &rows {
            let p = sigmoid(a * x + b);
            let w = p * (1.0 - p);
            ga += (p - t) * x;
            gb += p - t;
            haa += w * x * x;
            hab += w * x;
            hbb += w;
        }
        let determinant = haa * hbb - hab * hab;
        let (da, db) = ((hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant);
        // Far from the answer a whole step can overshoot.
        let damp = 1.0f64.min(2.0 / (da.abs() + db.abs()).max(1e-12));
        (a, b) = (a - damp * da, b - damp * db);
        if da.abs() + db.abs() < 1e-10 {
            break;
        }
    }
    (a.is_finite() && b.is_finite()).then_some([a, b])
}

/// A probability after [`platt`].
pub fn calibrated(p: f64, [a, b]: [f64; 2]) -> f64 {
    sigmoid(a * logit(p) + b)
}

fn logit(p: f64) -> f64 {
    let p = p.clamp(1e-7, 1.0 - 1e-7);
    (p / (1.0 - p)).ln()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    fn scored(rows: &[(bool, f64)]) -> Vec<Scored> {
        rows.iter().map(|&(is_tb, p_tb)| Scored { image: String::new(), is_tb, p_tb }).collect()
    }

    #[test]
    fn figures_that_are_undefined_are_absent() {
        let one = Metrics::of(&scored(&[(true, 0.9), (true, 0.2)]), DECISION);
        assert_eq!((one.tb.sensitivity, one.tb.specificity, one.auc), (Some(0.5), None, None));
        assert_eq!(Metrics::of(&[], DECISION).accuracy, None);
        assert_eq!(operating_point(&scored(&[(false, 0.5)]), 0.9), None);
    }

    #[test]
    fn the_operating_point_finds_enough_and_no_more() {
        let scores =
            scored(&[(true, 0.9), (true, 0.7), (true, 0.3), (false, 0.8), (false, 0.4), (false, 0.1)]);
        let point = operating_point(&scores, 0.6).unwrap();
        assert_eq!((point.threshold, point.specificity), ((0.7 + 0.4) / 2.0, 2.0 / 3.0));
        let all = operating_point(&scores, 0.9).unwrap();
        assert_eq!(
            (all.threshold, all.sensitivity, all.meets_triage_profile),
            ((0.3 + 0.1) / 2.0, 1.0, false)
        );
        assert_eq!(roc(&scores).last(), Some(&(1.0, 1.0)));
    }

    #[test]
    fn calibration_undoes_logits_that_are_too_large() {
        let mut rng = random_stream(0, "platt", 0);
        let scores: Vec<Scored> = (0..4000)
            .map(|_| {
                let x: f64 = rng.random_range(-3.0..3.0);
                let is_tb = rng.random::<f64>() < sigmoid(x);
                Scored { image: String::new(), is_tb, p_tb: sigmoid(3.0 * x + 1.0) }
            })
            .collect();
        let [a, b] = platt(&scores).unwrap();
        assert!((a - 1.0 / 3.0).abs() < 0.03 && (b + 1.0 / 3.0).abs() < 0.1, "{a} {b}");
        let after: Vec<Scored> =
            scores.iter().map(|s| Scored { p_tb: calibrated(s.p_tb, [a, b]), ..s.clone() }).collect();
        assert!(reliability(&after).ece < 0.5 * reliability(&scores).ece);
    }
}
