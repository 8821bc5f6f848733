//! How well alerts and sources are told apart.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_core::Result;
use kiln_data::roc_auc;
use serde::Serialize;

use crate::policy::{Policy, apply, share};
use crate::scores::{Scored, Source};
use crate::tables::CsvTable;

/// Score above which an alert counts as one of a bright transient.
const THRESHOLD: f64 = 0.5;
/// Edges of the first bin of peak magnitudes,
const FIRST_BIN: f64 = 17.0;
/// its width,
pub const BIN: f64 = 0.25;
/// and how many bins there are, up to 18.5.
const BINS: usize = 6;

/// Figures over alerts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AlertMetrics {
    /// Alerts with a label.
    pub alerts: usize,
    /// Area under the ROC curve.
    pub auc: Option<f64>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auc_reason: Option<&'static str>,
    /// Alerts of bright transients with a score above a half,
    pub tp: usize,
    /// other alerts with one,
    pub fp: usize,
    /// alerts of bright transients without,
    #[serde(rename = "fn")]
    pub missed: usize,
    /// and other alerts without.
    pub tn: usize,
    /// Accuracy over both classes.
    pub accuracy: Option<f64>,
    /// Accuracy on bright transients,
    pub bts_acc: Option<f64>,
    /// on others,
    pub notbts_acc: Option<f64>,
    /// and their mean.
    pub balanced_accuracy: Option<f64>,
    /// Share of bright transients among those above a half.
    pub precision: Option<f64>,
    /// Share of bright transients that are above a half.
    pub recall: Option<f64>,
    /// Harmonic mean of both.
    pub f1: Option<f64>,
}

impl AlertMetrics {
    /// Of all labelled alerts.
    pub fn of(alerts: &[Scored]) -> Self {
        let labelled = labelled(alerts);
        let mut counts = [[0; 2]; 2]; // [label][decision]
        for &(label, score) in &labelled {
            counts[usize::from(label)][usize::from(score > THRESHOLD)] += 1;
        }
        let [[tn, fp], [missed, tp]] = counts;
        let (bts_acc, notbts_acc) = (share(tp, tp + missed), share(tn, tn + fp));
        let auc = roc_auc(labelled.iter().copied());
        Self {
            alerts: labelled.len(),
            auc,
            auc_reason: auc.is_none().then_some("the alerts are of one class"),
            tp,
            fp,
            missed,
            tn,
            accuracy: share(tp + tn, labelled.len()),
            bts_acc,
            notbts_acc,
            balanced_accuracy: bts_acc.zip(notbts_acc).map(|(a, b)| f64::midpoint(a, b)),
            precision: share(tp, tp + fp),
            recall: bts_acc,
            f1: share(2 * tp, 2 * tp + fp + missed),
        }
    }
}

/// Label and score of the alerts that have a label.
pub fn labelled(alerts: &[Scored]) -> Vec<(bool, f64)> {
    alerts.iter().filter_map(|alert| Some((alert.label?, alert.score))).collect()
}

/// Completeness and purity of sources with a peak in one bin.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PeakBin {
    /// The brighter edge, in magnitudes.
    pub from: f64,
    /// The fainter edge.
    pub to: f64,
    /// Bright transients in it.
    pub transients: usize,
    /// Targets in it.
    pub targets: usize,
    /// Share of the bright transients that became targets.
    pub completeness: Option<f64>,
    /// Share of the targets that are bright transients.
    pub purity: Option<f64>,
}

/// Completeness and purity by peak magnitude, between 17 and 18.5.
pub fn by_peak(policy: &Policy, sources: &[Source<'_>]) -> Vec<PeakBin> {
    let bin = |number: usize| {
        let from = FIRST_BIN + BIN * number as f64;
        let to = from + BIN;
        let inside: Vec<Source<'_>> =
            sources.iter().filter(|source| (from..to).contains(&source.peak())).cloned().collect();
        let found = apply(policy, &inside);
        PeakBin {
            from,
            to,
            transients: found.tp + found.missed,
            targets: found.tp + found.fp,
            completeness: found.completeness,
            purity: found.purity,
        }
    };
    (0..BINS).map(bin).collect()
}

/// When people saved a source and asked for its spectrum, as Julian dates.
pub type ScannerTimes = BTreeMap<String, [Option<f64>; 2]>;

/// Reads objectId, save_jd and trigger_jd.
///
/// # Errors
/// Names the row and column that is wrong.
pub fn read_scanner_times(path: &Path) -> Result<ScannerTimes> {
    let mut table = CsvTable::open(path, &["objectId", "save_jd", "trigger_jd"])?;
    let at = ["objectId", "save_jd", "trigger_jd"].map(|name| table.column(name).unwrap_or_default());
    let mut times = ScannerTimes::new();
    while table.advance()? {
        times.insert(table.text(at[0]).into(), [table.number(at[1])?, table.number(at[2])?]);
    }
    Ok(times)
}

/// How much later than people a policy is, in hours; negative where it is quicker.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Delay {
    /// Bright transients that both found.
    pub sources: usize,
    /// Median,
    pub median_hours: Option<f64>,
    /// and mean.
    pub mean_hours: Option<f64>,
    /// Of every source.
    #[serde(skip)]
    pub hours: Vec<f64>,
}

/// Time from people's saving (0) or asking for a spectrum (1) to the trigger, over the bright transients that both found.
pub fn delay(policy: &Policy, sources: &[Source<'_>], times: &ScannerTimes, which: usize) -> Delay {
    let transients = sources.iter().filter(|source| source.label == Some(true));
    let mut hours: Vec<f64> = transients
        .filter_map(|source| {
            let theirs = times.get(source.id)?[which]?;
            Some((policy.trigger(&source.alerts)?.jd - theirs) * 24.0)
        })
        .collect();
    hours.sort_by(f64::total_cmp);
    let count = hours.len();
    let median = (count > 0).then(|| f64::midpoint(hours[(count - 1) / 2], hours[count / 2]));
    let mean = (count > 0).then(|| hours.iter().sum::<f64>() / count as f64);
    Delay { sources: count, median_hours: median, mean_hours: mean, hours }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_of_one_class_have_no_area_and_say_why() {
        let one = Scored {
            object_id: "a".into(),
            candid: String::new(),
            jd: 0.0,
            label: Some(true),
            magpsf: 18.0,
            score: 0.7,
        };
        let metrics = AlertMetrics::of(&[one]);
        assert!(
            metrics.auc_reason.is_some() && metrics.balanced_accuracy.is_none() && metrics.f1 == Some(1.0)
        );
    }
}
