//! Policies, §5: which sources become targets, once their alerts have come.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use kiln_core::{Error, Result};
use serde::Serialize;

use crate::scores::{Scored, Source};

/// Magnitude of the survey's limit for spectra.
pub const LIMIT: f64 = 18.5;
/// Alerts that a source must have to be judged.
const LEAST_ALERTS: usize = 2;

/// A source becomes a target with its `n`-th alert of a score above `score` and a magnitude below `mag`, once it has been
/// as bright as `peak`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Policy {
    /// What it is called.
    pub name: String,
    /// How many such alerts,
    pub n: usize,
    /// above which score,
    pub score: f64,
    /// below which magnitude,
    pub mag: f64,
    /// and how bright the source must have been.
    pub peak: Option<f64>,
}

impl Policy {
    /// The four of the paper.
    pub fn standard() -> [Self; 4] {
        let policy = |name: &str, n, score, peak| Self { name: name.into(), n, score, mag: 19.0, peak };
        [
            policy("bts_p1", 2, 0.5, None),
            policy("bts_p2", 2, 0.5, Some(LIMIT)),
            policy("prod_p1", 1, 0.85, None),
            policy("prod_p2", 1, 0.85, Some(LIMIT)),
        ]
    }

    /// A policy of the paper by its name, or one's own, as `n=2,score=0.5,mag=19,peak=18.5`; `peak` may be missing.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(policy) = Self::standard().into_iter().find(|policy| policy.name == text) {
            return Ok(policy);
        }
        let wrong = |found: String| {
            Error::usage(format!("policy \"{text}\" {found}"))
                .hint("bts_p1, bts_p2, prod_p1, prod_p2, or one's own such as n=2,score=0.5,mag=19,peak=18.5")
        };
        let mut policy = Self { name: text.into(), n: 0, score: f64::NAN, mag: f64::NAN, peak: None };
        for part in text.split(',') {
            let (key, value) =
                part.split_once('=').ok_or_else(|| wrong(format!("has the part \"{part}\"")))?;
            let number = value.trim().parse::<f64>().ok().filter(|value| value.is_finite());
            let number = number.ok_or_else(|| wrong(format!("has {value:?} for {key}")))?;
            match key.trim() {
                "n" if number >= 1.0 && number.fract() == 0.0 => policy.n = number as usize,
                "score" => policy.score = number,
                "mag" => policy.mag = number,
                "peak" => policy.peak = Some(number),
                _ => return Err(wrong(format!("has {value} for {key}"))),
            }
        }
        if policy.n == 0 || policy.score.is_nan() || policy.mag.is_nan() {
            return Err(wrong("does not say n, score and mag".into()));
        }
        Ok(policy)
    }

    /// The first of a source's alerts, in order of time, with which it becomes a target.
    pub fn trigger<'a>(&self, alerts: &[&'a Scored]) -> Option<&'a Scored> {
        let (mut good, mut brightest) = (0, f64::INFINITY);
        alerts.iter().copied().find(|alert| {
            good += usize::from(alert.score > self.score && alert.magpsf < self.mag);
            brightest = brightest.min(alert.magpsf);
            good >= self.n && self.peak.is_none_or(|peak| brightest <= peak)
        })
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// What a policy comes to on labelled sources.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyResult {
    /// Bright transients that became targets,
    pub tp: usize,
    /// other targets,
    pub fp: usize,
    /// bright transients that did not,
    #[serde(rename = "fn")]
    pub missed: usize,
    /// and other sources.
    pub tn: usize,
    /// Share of the bright transients that became targets.
    pub completeness: Option<f64>,
    /// Share of the targets that are bright transients.
    pub purity: Option<f64>,
    /// When each target became one, and how bright it was then.
    pub first_trigger: BTreeMap<String, (f64, f64)>,
}

/// The sources that policies are judged by: those with two alerts, without bright transients of which no alert is left
/// that is as bright as the limit, and without those that are `excluded`.
pub fn judged<'a>(sources: &[Source<'a>], excluded: &[String]) -> Vec<Source<'a>> {
    let is_judged = |source: &&Source<'a>| {
        let lost_its_peak = source.label == Some(true) && source.peak() > LIMIT;
        let is_excluded = excluded.iter().any(|id| id == source.id);
        source.label.is_some() && source.alerts.len() >= LEAST_ALERTS && !lost_its_peak && !is_excluded
    };
    sources.iter().filter(is_judged).cloned().collect()
}

/// Judges a policy by labelled sources.
pub fn apply(policy: &Policy, sources: &[Source<'_>]) -> PolicyResult {
    let mut counts = [[0; 2]; 2]; // [label][target]
    let mut first_trigger = BTreeMap::new();
    for source in sources {
        let trigger = policy.trigger(&source.alerts);
        counts[usize::from(source.label == Some(true))][usize::from(trigger.is_some())] += 1;
        if let Some(alert) = trigger {
            first_trigger.insert(source.id.to_string(), (alert.jd, alert.magpsf));
        }
    }
    let [[tn, fp], [missed, tp]] = counts;
    PolicyResult {
        tp,
        fp,
        missed,
        tn,
        completeness: share(tp, tp + missed),
        purity: share(tp, tp + fp),
        first_trigger,
    }
}

/// A part of a whole that may be empty.
pub fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_and_nonsense_is_refused() {
        let own = Policy::parse("n=2,score=0.5,mag=19,peak=18.5").unwrap();
        let standard = Policy::parse("bts_p2").unwrap();
        assert_eq!(
            (own.n, own.score, own.mag, own.peak),
            (standard.n, standard.score, standard.mag, standard.peak)
        );
        for text in [
            "",
            "bts",
            "n=0,score=1,mag=2",
            "n=1.5,score=1,mag=2",
            "n=1,score=x,mag=3",
            "n=1,mag=3",
            "n=1,score=0,mag=1,x=2",
        ] {
            assert!(Policy::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_trigger_waits_for_the_peak() {
        let alert = |jd: f64, magpsf: f64, score: f64| Scored {
            object_id: "a".into(),
            candid: String::new(),
            jd,
            label: None,
            magpsf,
            score,
        };
        let alerts =
            [alert(1.0, 18.9, 0.9), alert(2.0, 19.2, 0.9), alert(3.0, 18.8, 0.6), alert(4.0, 18.4, 0.1)];
        let alerts: Vec<&Scored> = alerts.iter().collect();
        let when = |name: &str| Policy::parse(name).unwrap().trigger(&alerts).map(|alert| alert.jd);
        assert_eq!(
            ["bts_p1", "bts_p2", "prod_p1", "prod_p2"].map(when),
            [Some(3.0), Some(4.0), Some(1.0), Some(4.0)]
        );
    }
}
