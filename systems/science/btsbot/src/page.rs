//! Pages to look at: what an astronomer wants to see before trusting a network with a telescope, and after a season.

use std::path::Path;

use kiln_core::{Plot, Report, Result, System, Table};
use kiln_data::roc_curve;

use crate::Btsbot;
use crate::metrics::{AlertMetrics, PeakBin, ScannerTimes, by_peak, delay, labelled};
use crate::policy::{Policy, apply};
use crate::scores::{Scored, Source};
use crate::shift::{Compared, Sample, Shift};
use crate::tables::CsvTable;
use crate::train::Accuracy;

/// Magnitudes of the histograms,
const BRIGHTEST: f64 = 15.0;
/// their bins,
const BIN: f64 = 0.5;
/// and how many, up to 21.
const BINS: usize = 12;
/// Bins of scores.
const SCORE_BINS: usize = 20;

/// Figures and plots of scored, labelled alerts; `log` is the log of the training, where there is one.
///
/// # Errors
/// When the log cannot be read.
pub fn diagnostics(
    alerts: &[Scored],
    sources: &[Source<'_>],
    policies: &[Policy],
    times: Option<&ScannerTimes>,
    log: Option<&Path>,
) -> Result<Report> {
    let mut report = Report::on_data(Btsbot.card());
    let metrics = AlertMetrics::of(alerts);
    report.tables.push(figures(&metrics));
    report.tables.push(confusion(&metrics));
    report.tables.push(policy_table(sources, policies));
    if let Some(log) = log.filter(|log| log.exists()) {
        report.plots.push(learning(log)?);
        let beside = log.with_file_name(ACCURACY);
        if beside.exists() {
            report.plots.push(accuracy(&read_accuracies(&beside)?));
        }
    }
    if metrics.auc.is_some() {
        let chance = vec![(0.0, 0.0), (1.0, 1.0)];
        let title = "Alerts: receiver operating characteristic";
        report.plots.push(
            Plot::lines(
                title,
                "share of other alerts above the score",
                "share of bright transients' above it",
            )
            .series(
                format!("network, AUC {:.4}", metrics.auc.unwrap_or_default()),
                roc_curve(labelled(alerts)),
            )
            .series("chance", chance),
        );
    }
    report.plots.push(scores_and_magnitudes(alerts));
    report.plots.push(by_class(
        "Alerts by class",
        "score",
        alerts,
        |alert| alert.score,
        [0.0, 1.0],
        SCORE_BINS / 2,
    ));
    let end = BRIGHTEST + BIN * BINS as f64;
    report.plots.push(by_class(
        "Alerts by class",
        "magnitude",
        alerts,
        |alert| alert.magpsf,
        [BRIGHTEST, end],
        BINS,
    ));
    if let Some(policy) = policies.first() {
        report.tables.push(completeness_table(policy, sources));
        report.plots.push(completeness(policy, sources));
        if let Some(times) = times {
            for (which, word) in ["saved it", "asked for its spectrum"].into_iter().enumerate() {
                let delay = delay(policy, sources, times, which);
                let title = format!("{policy}: trigger after people {word}, {} sources", delay.sources);
                report.plots.push(Plot::histogram(title, "hours (negative: before them)", &delay.hours, 24));
            }
        }
    }
    report.notes.push(format!(
        "{} labelled alerts of {} judged sources. Sources with a single alert are not judged, nor bright transients whose \
         alerts here never reach magnitude 18.5.",
        metrics.alerts,
        sources.len()
    ));
    Ok(report)
}

fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.4}"))
}

fn figures(metrics: &AlertMetrics) -> Table {
    let mut table = Table::new("Alerts", &["figure", "value"]);
    for (name, value) in [
        ("area under the ROC curve", metrics.auc),
        ("accuracy", metrics.accuracy),
        ("accuracy on bright transients", metrics.bts_acc),
        ("accuracy on others", metrics.notbts_acc),
        ("balanced accuracy", metrics.balanced_accuracy),
        ("precision", metrics.precision),
        ("recall", metrics.recall),
        ("F1", metrics.f1),
    ] {
        table.row([name.to_string(), shown(value)]);
    }
    table
}

fn confusion(metrics: &AlertMetrics) -> Table {
    let mut table =
        Table::new("Alerts: confusion at a score of 0.5", &["", "score above 0.5", "score up to 0.5"]);
    table.row(["bright transients".into(), metrics.tp.to_string(), metrics.missed.to_string()]);
    table.row(["others".into(), metrics.fp.to_string(), metrics.tn.to_string()]);
    table
}

fn policy_table(sources: &[Source<'_>], policies: &[Policy]) -> Table {
    let columns = ["policy", "found", "missed", "false", "completeness", "purity"];
    let mut table = Table::new(format!("Policies on {} sources", sources.len()), &columns);
    for policy in policies {
        let found = apply(policy, sources);
        let counts = [found.tp, found.missed, found.fp].map(|count| count.to_string());
        let figures = [shown(found.completeness), shown(found.purity)];
        table.row([policy.name.clone()].into_iter().chain(counts).chain(figures));
    }
    table
}

/// Losses over steps; the training's as the mean between two validations.
fn learning(log: &Path) -> Result<Plot> {
    let mut table = CsvTable::open(log, &["step", "loss", "val_loss"])?;
    let at = ["step", "loss", "val_loss"].map(|name| table.column(name).unwrap_or_default());
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    let (mut sum, mut count) = (0.0, 0.0);
    while table.advance()? {
        sum += table.required(at[1])?;
        count += 1.0;
        if let Some(loss) = table.number(at[2])? {
            let step = table.required(at[0])?;
            training.push((step, sum / count));
            validation.push((step, loss));
            (sum, count) = (0.0, 0.0);
        }
    }
    Ok(Plot::lines("Learning", "step", "weighted cross-entropy")
        .series("training, with dropout", training)
        .series("validation", validation))
}

/// The file of a model folder that holds [`Accuracy`] at every validation.
pub const ACCURACY: &str = "accuracy.csv";

/// Reads such a file.
///
/// # Errors
/// When it is none.
pub fn read_accuracies(path: &Path) -> Result<Vec<Accuracy>> {
    const COLUMNS: [&str; 3] = ["step", "accuracy", "val_accuracy"];
    let mut table = CsvTable::open(path, &COLUMNS)?;
    let at = COLUMNS.map(|name| table.column(name).unwrap_or_default());
    let mut rows = Vec::new();
    while table.advance()? {
        rows.push(Accuracy {
            step: table.required(at[0])? as usize,
            accuracy: table.required(at[1])?,
            val_accuracy: table.required(at[2])?,
        });
    }
    Ok(rows)
}

/// How often a score of 0.5 decides rightly, over steps.
fn accuracy(rows: &[Accuracy]) -> Plot {
    let points = |of: fn(&Accuracy) -> f64| rows.iter().map(move |row| (row.step as f64, of(row)));
    Plot::lines("Learning: decisions at a score of 0.5", "step", "share that is right")
        .series("training, with dropout", points(|row| row.accuracy).collect())
        .series("validation", points(|row| row.val_accuracy).collect())
}

/// How many alerts have a score and a magnitude; the colour shows the logarithm.
fn scores_and_magnitudes(alerts: &[Scored]) -> Plot {
    let columns = BINS * 2;
    let mut counts = vec![0.0f64; columns * SCORE_BINS];
    for alert in alerts {
        let column = ((alert.magpsf - BRIGHTEST) / (BIN / 2.0)).floor();
        let row = ((alert.score * SCORE_BINS as f64) as usize).min(SCORE_BINS - 1);
        if (0.0..columns as f64).contains(&column) {
            counts[row * columns + column as usize] += 1.0;
        }
    }
    Plot::heat_map(
        "Scores and magnitudes, log10 (1 + alerts)",
        format!("magnitude: {BRIGHTEST} + cell / 4"),
        format!("score: cell / {SCORE_BINS}"),
        columns,
        counts.into_iter().map(|count| (1.0 + count).log10()).collect(),
    )
}

/// Alerts of both classes by some figure of theirs.
fn by_class(
    title: &str,
    name: &str,
    alerts: &[Scored],
    figure: fn(&Scored) -> f64,
    [from, to]: [f64; 2],
    bins: usize,
) -> Plot {
    let width = (to - from) / bins as f64;
    let count = |label: bool| {
        let mut counts = vec![0.0; bins];
        for alert in alerts.iter().filter(|alert| alert.label == Some(label)) {
            let bin = ((figure(alert) - from) / width).floor();
            if bin >= 0.0 {
                counts[(bin as usize).min(bins - 1)] += 1.0;
            }
        }
        counts
    };
    let categories = (0..bins).map(|bin| format!("{:.1}", from + width * bin as f64));
    Plot::bars(
        format!("{title} ({name} from …)"),
        "alerts",
        categories,
        [("bright transients", count(true)), ("others", count(false))],
    )
}

/// Completeness and purity of a policy by peak magnitude.
pub fn completeness(policy: &Policy, sources: &[Source<'_>]) -> Plot {
    let bins = by_peak(policy, sources);
    let bars = |of: fn(&PeakBin) -> Option<f64>| bins.iter().map(|bin| of(bin).unwrap_or(f64::NAN)).collect();
    Plot::bars(
        format!("{policy} by peak magnitude (from …)"),
        "share of sources",
        bins.iter().map(|bin| format!("{:.2}", bin.from)),
        [("completeness", bars(|bin| bin.completeness)), ("purity", bars(|bin| bin.purity))],
    )
}

/// The same as figures, with how many sources they are of.
pub fn completeness_table(policy: &Policy, sources: &[Source<'_>]) -> Table {
    let columns = ["peak magnitude", "bright transients", "targets", "completeness", "purity"];
    let mut table = Table::new(format!("{policy} by peak magnitude"), &columns);
    for bin in by_peak(policy, sources) {
        table.row([
            format!("{:.2} to {:.2}", bin.from, bin.to),
            bin.transients.to_string(),
            bin.targets.to_string(),
            shown(bin.completeness),
            shown(bin.purity),
        ]);
    }
    table
}

/// Features that are shown of a shift.
const SHOWN: usize = 10;

/// In what alerts of today differ from those of before.
pub fn shift(before: &Sample, today: &Sample, found: &Shift) -> Report {
    let mut report = Report::on_data(Btsbot.card());
    let title = format!(
        "{} alerts of before, {} of today: {}",
        before.alerts.len(),
        today.alerts.len(),
        found.verdict
    );
    let mut table = Table::new(title, &["figure", "before", "today", "difference", "95 % over sources"]);
    for (name, compared) in
        [("AUC over alerts", found.auc), ("completeness", found.completeness), ("purity", found.purity)]
    {
        let Compared { a, b, difference, interval } = compared;
        let interval = interval.map_or("-".into(), |[low, high]| format!("{low:.4} to {high:.4}"));
        table.row([name.into(), shown(a), shown(b), shown(difference), interval]);
    }
    report.tables.push(table);
    let columns = ["feature", "distance of distributions (KS)", "stability index"];
    let mut table = Table::new("Scores, and the features that differ most", &columns);
    table.row(["score".to_string(), format!("{:.3}", found.score_ks), "-".into()]);
    let features = || found.features.iter().take(SHOWN);
    for feature in features() {
        table.row([feature.name.clone(), format!("{:.3}", feature.ks), format!("{:.3}", feature.psi)]);
    }
    report.tables.push(table);
    let bins = SCORE_BINS / 2;
    let shares = |sample: &Sample| {
        let mut shares = vec![0.0; bins];
        for alert in &sample.alerts {
            shares[((alert.score * bins as f64) as usize).min(bins - 1)] += 1.0 / sample.alerts.len() as f64;
        }
        shares
    };
    let names = (0..bins).map(|bin| format!("{:.1}", bin as f64 / bins as f64));
    let bars = [("before", shares(before)), ("today", shares(today))];
    report.plots.push(Plot::bars("Scores (from …)", "share of alerts", names, bars));
    if !found.features.is_empty() {
        let bars = [("KS", features().map(|f| f.ks).collect::<Vec<_>>())];
        let names = features().take(SHOWN).map(|f| f.name.clone());
        report.plots.push(Plot::bars("Features that differ most", "distance of distributions", names, bars));
    }
    report.notes.push(
        "No significant shift: the 95 % interval of the difference of AUC contains 0, and the difference is at most 0.02 \
         either way. Intervals are over draws of sources, each class for itself."
            .into(),
    );
    report
}
