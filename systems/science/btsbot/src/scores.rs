//! Alerts with their scores, and the sources that they belong to.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::tables::CsvTable;

/// An alert with its score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The source.
    #[serde(rename = "objectId")]
    pub object_id: String,
    /// The alert's number, as it was written.
    pub candid: String,
    /// When it was observed.
    pub jd: f64,
    /// 1 for bright transients, where that is known.
    pub label: Option<bool>,
    /// Its magnitude.
    pub magpsf: f64,
    /// That the source is a bright transient, between 0 and 1.
    pub score: f64,
}

/// Reads a table with the columns objectId, jd, magpsf and score, and maybe label, candid and status. Rows of alerts that
/// were not scored are passed over.
///
/// # Errors
/// Names the row and column that is wrong.
pub fn read_scores(path: &Path) -> Result<Vec<Scored>> {
    let mut table = CsvTable::open(path, &["objectId", "jd", "magpsf", "score"])?;
    let column = |table: &CsvTable<'_>, name: &str| table.column(name);
    let at = ["objectId", "jd", "magpsf", "score"].map(|name| column(&table, name).unwrap_or_default());
    let (label, candid, status) =
        (column(&table, "label"), column(&table, "candid"), column(&table, "status"));
    let mut alerts = Vec::new();
    while table.advance()? {
        if status.is_some_and(|status| table.text(status) == "rejected") {
            continue;
        }
        let score = table.required(at[3])?;
        if !(0.0..=1.0).contains(&score) {
            return Err(Error::input(table.place(), format!("the score is {score}"))
                .hint("scores lie between 0 and 1"));
        }
        alerts.push(Scored {
            object_id: table.text(at[0]).into(),
            candid: candid.map(|at| table.text(at).to_string()).unwrap_or_default(),
            jd: table.required(at[1])?,
            label: label.map(|at| table.label(at)).transpose()?.flatten(),
            magpsf: table.required(at[2])?,
            score,
        });
    }
    if alerts.is_empty() {
        return Err(Error::input(path.display(), "holds no scored alerts"));
    }
    Ok(alerts)
}

/// A source and its alerts in order of time.
#[derive(Debug, Clone)]
pub struct Source<'a> {
    /// Its name.
    pub id: &'a str,
    /// 1 for bright transients, where that is known.
    pub label: Option<bool>,
    /// Its alerts.
    pub alerts: Vec<&'a Scored>,
}

impl Source<'_> {
    /// Its brightest magnitude.
    pub fn peak(&self) -> f64 {
        self.alerts.iter().map(|alert| alert.magpsf).fold(f64::INFINITY, f64::min)
    }
}

/// The sources, by name.
///
/// # Errors
/// When a source has alerts of both labels.
pub fn sources(alerts: &[Scored]) -> Result<Vec<Source<'_>>> {
    let mut by_id: BTreeMap<&str, Vec<&Scored>> = BTreeMap::new();
    for alert in alerts {
        by_id.entry(&alert.object_id).or_default().push(alert);
    }
    let mut sources = Vec::with_capacity(by_id.len());
    for (id, mut alerts) in by_id {
        alerts.sort_by(|a, b| a.jd.total_cmp(&b.jd).then_with(|| a.candid.cmp(&b.candid)));
        let label = alerts[0].label;
        if alerts.iter().any(|alert| alert.label != label) {
            return Err(Error::input(format!("source {id}"), "has alerts of different labels")
                .hint("a label belongs to a source"));
        }
        sources.push(Source { id, label, alerts });
    }
    Ok(sources)
}
