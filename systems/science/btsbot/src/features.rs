//! The 25 numbers beside the stamps: most are an alert's own, others sum up its source's history so far.

use std::collections::HashMap;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::packet::{Alert, Detection};

/// The features, in the order in which networks see them.
pub const FEATURES: [&str; 25] = [
    "sgscore1",
    "distpsnr1",
    "sgscore2",
    "distpsnr2",
    "fwhm",
    "magpsf",
    "sigmapsf",
    "chipsf",
    "ra",
    "dec",
    "diffmaglim",
    "ndethist",
    "nmtchps",
    "age",
    "days_since_peak",
    "days_to_peak",
    "peakmag_so_far",
    "new_drb",
    "ncovhist",
    "nnotdet",
    "chinr",
    "sharpnr",
    "scorr",
    "sky",
    "maxmag_so_far",
];

/// Features that are not an alert's own.
pub const DERIVED: [&str; 7] =
    ["age", "days_since_peak", "days_to_peak", "peakmag_so_far", "maxmag_so_far", "nnotdet", "new_drb"];

/// Where a source's history is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HistorySource {
    /// Alerts of the source that were seen before
    Alerts,
    /// What the packet tells of the last 30 days
    Packet,
    /// Both
    #[default]
    Both,
}

/// What to do with an alert that has no `drb`, as those of schema 3.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DrbMissing {
    /// Reject it
    #[default]
    Reject,
    /// Take rb in its place
    UseRb,
}

/// How features are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FeatureOptions {
    /// Where the history comes from.
    pub history: HistorySource,
    /// What stands in for a missing `drb`.
    pub drb_missing: DrbMissing,
}

/// What a source's history comes to at the time of an alert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Derived {
    /// Days since the first detection.
    pub age: f64,
    /// Days since the brightest detection,
    pub days_since_peak: f64,
    /// and from the first to it.
    pub days_to_peak: f64,
    /// The brightest
    pub peakmag_so_far: f64,
    /// and the faintest magnitude.
    pub maxmag_so_far: f64,
}

impl Derived {
    /// Sums up the detections until `alert`, which is one of them; those after it count for nothing.
    pub fn of(alert: &Alert, detections: &[Detection]) -> Self {
        let own = alert.detection();
        let until = || detections.iter().filter(|d| d.jd <= alert.jd).chain([&own]);
        let earliest = until().map(|d| d.jd).fold(f64::INFINITY, f64::min);
        let first = alert.number("jdstarthist").map_or(earliest, |start| start.min(earliest));
        let peakmag = until().map(|d| d.magpsf).fold(f64::INFINITY, f64::min);
        let maxmag = until().map(|d| d.magpsf).fold(f64::NEG_INFINITY, f64::max);
        // The first time that it was as bright as that.
        let peak = until().filter(|d| d.magpsf == peakmag).map(|d| d.jd).fold(f64::INFINITY, f64::min);
        Self {
            age: alert.jd - first,
            days_since_peak: alert.jd - peak,
            days_to_peak: peak - first,
            peakmag_so_far: peakmag,
            maxmag_so_far: maxmag,
        }
    }
}

/// The features of an alert whose source has this history.
///
/// # Errors
/// Names the first field that is missing or no number.
pub fn features(alert: &Alert, derived: &Derived, drb_missing: DrbMissing) -> Result<[f32; 25], String> {
    let own = |name: &str| alert.number(name).ok_or_else(|| format!("has no {name}"));
    let mut features = [0.0; 25];
    for (feature, name) in features.iter_mut().zip(FEATURES) {
        let value = match name {
            "magpsf" => alert.magpsf,
            "age" => derived.age,
            "days_since_peak" => derived.days_since_peak,
            "days_to_peak" => derived.days_to_peak,
            "peakmag_so_far" => derived.peakmag_so_far,
            "maxmag_so_far" => derived.maxmag_so_far,
            "nnotdet" => own("ncovhist")? - own("ndethist")?,
            "new_drb" => match (own("drb"), drb_missing) {
                (Ok(drb), _) => drb,
                (Err(_), DrbMissing::UseRb) => own("rb")?,
                (Err(reason), DrbMissing::Reject) => return Err(reason),
            },
            name => own(name)?,
        };
        *feature = value as f32;
        if !feature.is_finite() {
            return Err(format!("has {value} for {name}"));
        }
    }
    Ok(features)
}

/// Detections of one source, each once, in order of time.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SourceHistory {
    detections: Vec<Detection>,
}

impl SourceHistory {
    /// From detections that were kept.
    pub fn new(detections: Vec<Detection>) -> Self {
        let mut history = Self::default();
        detections.into_iter().for_each(|detection| history.add(detection));
        history
    }

    /// The detections.
    pub fn detections(&self) -> &[Detection] {
        &self.detections
    }

    fn add(&mut self, detection: Detection) {
        let at = self.detections.partition_point(|d| d.jd < detection.jd);
        let same = self.detections[at..].iter().take_while(|d| d.jd == detection.jd);
        if !same.into_iter().any(|d| d.fid == detection.fid) {
            self.detections.insert(at, detection);
        }
    }

    /// Takes an alert in and sums up the history until then. An alert of a source that became fainter is no detection
    /// for those that follow.
    pub fn push(&mut self, alert: &Alert, source: HistorySource) -> Derived {
        if source == HistorySource::Packet {
            return Derived::of(alert, &alert.prior);
        }
        if source == HistorySource::Both {
            alert.prior.iter().for_each(|&detection| self.add(detection));
        }
        if alert.is_positive() {
            self.add(alert.detection());
        }
        Derived::of(alert, &self.detections)
    }
}

/// Histories of all sources so far. Alerts are to be taken in by time.
#[derive(Debug, Clone, Default)]
pub struct FeatureHistory {
    /// How features are made.
    pub options: FeatureOptions,
    sources: HashMap<String, SourceHistory>,
}

impl FeatureHistory {
    /// Without any history.
    pub fn new(options: FeatureOptions) -> Self {
        Self { options, sources: HashMap::new() }
    }

    /// Takes an alert in and gives its features.
    ///
    /// # Errors
    /// As [`features`].
    pub fn push(&mut self, alert: &Alert) -> Result<[f32; 25], String> {
        let derived = self.derived(alert);
        features(alert, &derived, self.options.drb_missing)
    }

    /// Takes an alert in and sums up its source's history.
    pub fn derived(&mut self, alert: &Alert) -> Derived {
        if self.options.history == HistorySource::Packet {
            return Derived::of(alert, &alert.prior);
        }
        // Looked for first, so that a known source needs no name of its own.
        match self.sources.get_mut(&alert.object_id) {
            Some(history) => history.push(alert, self.options.history),
            None => {
                self.sources.entry(alert.object_id.clone()).or_default().push(alert, self.options.history)
            }
        }
    }
}
