//! `kiln btsbot eval` and `kiln btsbot policy`

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Result, Table, write_atomic};
use serde_json::{Map, Value, json};

use super::learn::read;
use super::{ArrayArgs, shown};
use crate::checkpoint::open;
use crate::metrics::{AlertMetrics, by_peak, delay, read_scanner_times};
use crate::page;
use crate::policy::{Policy, apply, judged};
use crate::scores::{Scored, Source, read_scores, sources};
use crate::train;

#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    /// Table of scored alerts with labels
    #[arg(long)]
    scores: PathBuf,
    /// Policies: bts_p1, bts_p2, prod_p1, prod_p2 or one's own, as n=2,score=0.5,mag=19,peak=18.5 [default: those four]
    #[arg(long = "policy", value_name = "POLICY")]
    policies: Vec<Policy>,
    /// File of source names that are left out, one a line
    #[arg(long, value_name = "FILE")]
    exclude: Option<PathBuf>,
    /// JSON file to write
    #[arg(long, default_value = "policies.json")]
    out: PathBuf,
}

pub(super) fn policy(args: &PolicyArgs, cx: &Context) -> Result<()> {
    let alerts = read_scores(&args.scores)?;
    let sources = sources(&alerts)?;
    let judged = labelled_sources(&sources, args.exclude.as_deref(), &args.scores)?;
    let results = results(&args.policies, &judged);
    write_json(&args.out, &json!(results))?;
    cx.emit(&results, |_| {
        format!("{}\npolicies in {}\n", table(&results, judged.len()).to_text(), args.out.display())
    })
}

/// The sources by which policies are judged.
fn labelled_sources<'a>(
    sources: &[Source<'a>],
    exclude: Option<&Path>,
    place: &Path,
) -> Result<Vec<Source<'a>>> {
    let excluded = match exclude {
        Some(path) => fs::read_to_string(path).map_err(Error::io("read", path))?,
        None => String::new(),
    };
    let excluded: Vec<String> = excluded.lines().map(|line| line.trim().to_string()).collect();
    let judged = judged(sources, &excluded);
    if judged.is_empty() {
        return Err(Error::input(place.display(), "has no labelled source with two alerts")
            .hint("policies are judged by sources; the table needs a column label with 0 or 1"));
    }
    Ok(judged)
}

fn results(policies: &[Policy], sources: &[Source<'_>]) -> Map<String, Value> {
    let standard = Policy::standard();
    let policies = if policies.is_empty() { &standard[..] } else { policies };
    policies.iter().map(|policy| (policy.name.clone(), json!(apply(policy, sources)))).collect()
}

/// One row a policy.
fn table(results: &Map<String, Value>, sources: usize) -> Table {
    let title = format!("{sources} sources");
    let mut table = Table::new(title, &["policy", "found", "missed", "false", "completeness", "purity"]);
    for (name, result) in results {
        let count = |key: &str| result[key].to_string();
        let figure = |key: &str| shown(result[key].as_f64());
        table.row([
            name.clone(),
            count("tp"),
            count("fn"),
            count("fp"),
            figure("completeness"),
            figure("purity"),
        ]);
    }
    table
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::work("cannot write JSON").caused_by(e))?;
    write_atomic(path, &text)
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Model folder
    #[arg(long, required_unless_present = "scores", requires = "triplets")]
    model: Option<PathBuf>,
    #[command(flatten)]
    arrays: ArrayArgs,
    /// Table of scored alerts with labels, in place of a model
    #[arg(long, conflicts_with = "model")]
    scores: Option<PathBuf>,
    /// Judge only the sources that are named in this file, one a line, such as a model's test_sources.txt
    #[arg(long, value_name = "FILE")]
    only: Option<PathBuf>,
    /// Table with objectId, save_jd and trigger_jd: when people saved a source and asked for its spectrum
    #[arg(long, value_name = "FILE")]
    scanner_times: Option<PathBuf>,
    /// File of source names that are left out of the policies, one a line
    #[arg(long, value_name = "FILE")]
    exclude: Option<PathBuf>,
    /// Policies of one's own beside the four of the paper
    #[arg(long = "policy", value_name = "POLICY")]
    policies: Vec<Policy>,
    /// Folder to write: metrics.json, policies.json, report.html and its plots
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (mut alerts, place) = scored(args, cx)?;
    if let Some(path) = &args.only {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let names: std::collections::HashSet<&str> = text.lines().map(str::trim).collect();
        alerts.retain(|alert| names.contains(alert.object_id.as_str()));
        if alerts.is_empty() {
            return Err(Error::input(
                place.display(),
                format!("has none of the sources in {}", path.display()),
            ));
        }
    }
    let metrics = AlertMetrics::of(&alerts);
    if metrics.alerts == 0 {
        return Err(Error::input(place.display(), "has no labelled alerts").hint("label is 0 or 1"));
    }
    let sources = sources(&alerts)?;
    let judged = labelled_sources(&sources, args.exclude.as_deref(), &place)?;
    let times = args.scanner_times.as_deref().map(read_scanner_times).transpose()?;
    let mut policies = Policy::standard().to_vec();
    policies.extend(args.policies.clone());
    let mut per_policy = Map::new();
    for policy in &policies {
        let mut figures = Map::new();
        figures.insert("by_peak".into(), json!(by_peak(policy, &judged)));
        if let Some(times) = &times {
            figures.insert("after_save".into(), json!(delay(policy, &judged, times, 0)));
            figures.insert("after_trigger".into(), json!(delay(policy, &judged, times, 1)));
        }
        per_policy.insert(policy.name.clone(), figures.into());
    }
    let results = results(&policies, &judged);
    let out = &args.out;
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let metrics_json = json!({ "alerts": metrics, "sources": judged.len(), "policies": per_policy });
    write_json(&out.join("metrics.json"), &metrics_json)?;
    write_json(&out.join("policies.json"), &json!(results))?;
    let log = args.model.as_ref().map(|model| model.join("train_log.csv"));
    let report = page::diagnostics(&alerts, &judged, &policies, times.as_ref(), log.as_deref())?;
    report.save(out)?;
    let result = json!({ "out": out, "metrics": metrics_json, "policies": results });
    cx.emit(&result, |_| {
        format!(
            "{} alerts: AUC {}, balanced accuracy {}, precision {}, recall {}\n{}\npage, plots and tables in {}\n",
            metrics.alerts,
            shown(metrics.auc),
            shown(metrics.balanced_accuracy),
            shown(metrics.precision),
            shown(metrics.recall),
            table(&results, judged.len()).to_text(),
            out.display()
        )
    })
}

/// The scored alerts, and where they come from.
fn scored(args: &EvalArgs, cx: &Context) -> Result<(Vec<Scored>, PathBuf)> {
    if let Some(path) = &args.scores {
        return Ok((read_scores(path)?, path.clone()));
    }
    let (Some(model), Some(triplets), Some(candidates)) =
        (&args.model, &args.arrays.triplets, &args.arrays.candidates)
    else {
        return Err(Error::usage("there is nothing to judge")
            .hint("give --scores, or --model with --triplets and --candidates"));
    };
    let (config, model) = open(model, cx)?;
    let data = read(triplets, candidates, config.network.side, cx)?;
    let labelled = data.labelled()?;
    let scores = train::predict(&model, &data, &labelled, config.temperature, cx)?;
    Ok((data.scored(&labelled, &scores), candidates.clone()))
}
