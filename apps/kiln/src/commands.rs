//! Kiln's own verbs. Each takes the systems it may use, prints its result and returns.

use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap_complete::Shell;
use kiln::compiler::Graph;
use kiln::core::{
    Card, Context, Error, ModelFolder, Network, Report, Result, Scale, System, Table, html, write_atomic,
};
use serde::Serialize;

pub type Systems<'a> = &'a [&'a dyn System];

/// The system with this slug.
pub fn find<'a>(systems: Systems<'a>, slug: &str) -> Option<&'a dyn System> {
    systems.iter().copied().find(|system| system.card().slug == slug)
}

/// The system with this slug, or an error that says where to look.
pub fn known<'a>(systems: Systems<'a>, slug: &str) -> Result<&'a dyn System> {
    find(systems, slug).ok_or_else(|| {
        Error::usage(format!("there is no system \"{slug}\"")).hint("`kiln list` names them all")
    })
}

pub fn list(systems: Systems, cx: &Context) -> Result<()> {
    let cards: Vec<Card> = systems.iter().map(|system| system.card()).collect();
    cx.emit(&cards, |cards| {
        let mut table = Table::new("Systems", &["system", "family", "year", "what you do with it"]);
        for card in cards {
            table.row([card.slug, card.family, &card.year.to_string(), card.purpose]);
        }
        table.to_text()
    })
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    card: Card,
    verbs: Vec<Verb>,
}

#[derive(Serialize)]
struct Verb {
    name: String,
    about: String,
}

pub fn show(system: &dyn System, cx: &Context) -> Result<()> {
    let command = system.command();
    let verbs = command.get_subcommands().map(|verb| Verb {
        name: verb.get_name().into(),
        about: verb.get_about().map(ToString::to_string).unwrap_or_default(),
    });
    let shown = Shown { card: system.card(), verbs: verbs.collect() };
    cx.emit(&shown, |Shown { card, verbs }| {
        let mut table = Table::new("Verbs", &["verb", "what it does"]);
        for verb in verbs {
            table.row([format!("kiln {} {}", card.slug, verb.name), verb.about.clone()]);
        }
        format!(
            "{} ({}, {})\n{}\n\nPaper: {}\nClaim: {}\n\n{}",
            card.title,
            card.family,
            card.year,
            card.purpose,
            card.paper,
            card.claim,
            table.to_text()
        )
    })
}

pub fn run(system: &dyn System, scale: Scale, out: Option<PathBuf>, cx: &Context) -> Result<()> {
    let out = out.unwrap_or_else(|| cx.out.join(system.card().slug));
    let report = experiment(system, scale, &out, cx)?;
    let page = report.save(&out)?;
    cx.emit(&report, Report::to_text)?;
    cx.note(format!("\nReport: {}", page.display()));
    Ok(())
}

/// Runs and times an experiment that writes under `out`.
fn experiment(system: &dyn System, scale: Scale, out: &Path, cx: &Context) -> Result<Report> {
    let mut cx = cx.clone();
    cx.out = out.into();
    let start = Instant::now();
    let mut report = system.experiment(scale, &cx)?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

#[derive(Serialize)]
struct Tour {
    page: PathBuf,
    reports: Vec<Report>,
    failed: Vec<&'static str>,
}

/// Every experiment in turn. One that fails is reported, on the page too, and the others still run.
pub fn tour(systems: Systems, scale: Scale, out: &Path, cx: &Context) -> Result<()> {
    let mut reports = Vec::new();
    let mut failed = Vec::new();
    for (number, system) in systems.iter().enumerate() {
        if cx.interrupted() {
            return Err(Error::interrupted("the tour was interrupted"));
        }
        let card = system.card();
        cx.note(format!("[{}/{}] {}", number + 1, systems.len(), card.title));
        let folder = out.join(card.slug);
        let work = || {
            let report = experiment(*system, scale, &folder, cx)?;
            report.save(&folder)?;
            Ok(report)
        };
        let result = panic::catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|_| Err(Error::work("internal error (see above)")));
        reports.push(result.unwrap_or_else(|error| {
            eprintln!("error: {}: {error}", card.slug);
            failed.push(card.slug);
            let mut report = Report::new(card, scale, cx.seed);
            report.notes.push(format!("The experiment failed: {error}"));
            report
        }));
    }
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let page = out.join("index.html");
    write_atomic(&page, html::page("Kiln tour", &reports)?.as_bytes())?;
    let tour = Tour { page, reports, failed };
    cx.emit(&tour, |tour| tour.reports.iter().map(summary).collect::<Vec<_>>().join("\n"))?;
    cx.note(format!("\nPage: {}", tour.page.display()));
    match tour.failed[..] {
        [] => Ok(()),
        ref failed => Err(Error::work(format!(
            "{} of {} experiments failed: {}",
            failed.len(),
            systems.len(),
            failed.join(", ")
        ))),
    }
}

fn summary(report: &Report) -> String {
    let mut text = format!("{}\n{}", report.system.title, report.claims_text());
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    text
}

#[derive(Serialize)]
struct Exported {
    kind: String,
    out: PathBuf,
    operations: usize,
    constants: usize,
    constant_bytes: usize,
}

/// The computation of a trained model, whatever system it belongs to.
pub fn captured(systems: Systems, model: &Path, cx: &Context) -> Result<Graph> {
    kiln::compiler::capture(network(systems, model, cx)?)
}

/// A trained model, whatever system it belongs to.
pub fn network(systems: Systems, model: &Path, cx: &Context) -> Result<Box<dyn Network>> {
    let folder = ModelFolder::new(model);
    let kind = folder.kind()?;
    let system = find(systems, &kind).ok_or_else(|| {
        let config = folder.file("config.json");
        Error::input(config.display(), format!("there is no system of kind \"{kind}\""))
            .hint("`kiln list` names them all")
    })?;
    system.network(folder.path(), cx)
}

pub fn export(systems: Systems, model: &Path, out: &Path, cx: &Context) -> Result<()> {
    let graph = captured(systems, model, cx)?;
    graph.save(out)?;
    let exported = Exported {
        kind: graph.kind.clone(),
        out: out.into(),
        operations: graph.operations.len(),
        constants: graph.constants.len(),
        constant_bytes: graph.constants.values().map(|data| data.as_bytes().len()).sum(),
    };
    cx.emit(&exported, |exported| {
        format!(
            "{}: {} operations, {} constants ({:.1} MB)\n",
            exported.out.display(),
            exported.operations,
            exported.constants,
            exported.constant_bytes as f64 / 1e6
        )
    })
}

pub fn completions(shell: Shell, cx: &Context) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::cli::command(), "kiln", &mut script);
    cx.print(&String::from_utf8_lossy(&script))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln::core::{Claim, Threshold};

    struct Fake {
        slug: &'static str,
        outcome: fn(Report) -> Result<Report>,
    }

    impl System for Fake {
        fn card(&self) -> Card {
            Card {
                slug: self.slug,
                family: "test",
                title: self.slug,
                paper: "Nobody",
                year: 2000,
                claim: "None.",
                purpose: "Tests the tour.",
            }
        }

        fn command(&self) -> clap::Command {
            clap::Command::new(self.slug)
        }

        fn execute(&self, _: &clap::ArgMatches, _: &Context) -> Result<()> {
            Ok(())
        }

        fn experiment(&self, scale: Scale, cx: &Context) -> Result<Report> {
            (self.outcome)(Report::new(self.card(), scale, cx.seed))
        }
    }

    fn claim_not_held(mut report: Report) -> Result<Report> {
        report.claims.push(Claim::new("larger", "1", 0.0, "", Threshold::AtLeast(1.0)));
        Ok(report)
    }

    #[test]
    fn the_tour_goes_on_after_an_error_and_after_a_panic_and_reports_both() {
        let dir = tempfile::tempdir().unwrap();
        let cx = Context::for_tests(dir.path());
        let error = Fake { slug: "failing", outcome: |_| Err(Error::work("diverged")) };
        let panic = Fake { slug: "panicking", outcome: |_| panic!("impossible") };
        let good = Fake { slug: "good", outcome: claim_not_held };
        let result = tour(&[&error, &panic, &good], Scale::Smoke, dir.path(), &cx).unwrap_err();
        assert_eq!(result.exit_code(), 1);
        assert!(result.to_string().contains("2 of 3 experiments failed: failing, panicking"), "{result}");
        let page = std::fs::read_to_string(dir.path().join("index.html")).unwrap();
        assert!(page.contains("The experiment failed: diverged") && page.contains("✗ not held"));
        assert!(dir.path().join("good/report.json").exists());
    }

    #[test]
    fn a_claim_that_does_not_hold_is_no_error_and_the_report_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let cx = Context::for_tests(dir.path());
        let system = Fake { slug: "good", outcome: claim_not_held };
        run(&system, Scale::Smoke, None, &cx).unwrap();
        let json = std::fs::read_to_string(dir.path().join("good/report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(report["claims"][0]["held"], false);
    }

    #[test]
    fn export_names_an_unknown_kind() {
        let dir = tempfile::tempdir().unwrap();
        let cx = Context::for_tests(dir.path());
        std::fs::write(dir.path().join("config.json"), r#"{"kind": "other"}"#).unwrap();
        let out = dir.path().join("graph");
        let error = export(&[], dir.path(), &out, &cx).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("\"other\""), "{error}");
        assert!(!out.exists());
    }
}
