//! `kiln eeg predict` and `kiln eeg eval`

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use kiln_data::{Table, TableOptions, write_csv};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{DataArgs, PipelineArgs, shown};
use crate::checkpoint::{Config, open, stride};
use crate::dataset::{About, Dataset, Recording};
use crate::layout::{files_below, id_of};
use crate::metrics::{Metrics, Outcome, WindowOutcome, by_recording, interval, roc};
use crate::model::Model;
use crate::prepare::Skipped;
use crate::relevance::relevance;
use crate::shift::BANDS;
use crate::train;
use crate::windows::WindowSet;

/// Years at which the age groups of a report begin.
const AGE_GROUPS: [f64; 2] = [40.0, 65.0];

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// EDF or BDF files, or folders of them
    #[arg(long = "in", value_name = "FILE", num_args = 1.., required_unless_present = "data")]
    input: Vec<PathBuf>,
    /// A folder that `prepare` wrote, in place of files
    #[arg(long, conflicts_with = "input")]
    data: Option<PathBuf>,
    /// Windows that pass through the network at once
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Also draw what channels and bands contribute to each recording's evidence, as relevance/<recording>.png and .csv
    #[arg(long)]
    relevance: bool,
    /// Folder to write: predictions.csv and windows.csv
    #[arg(long)]
    out: PathBuf,
}

/// A row of predictions.
#[derive(Serialize)]
struct PredictionRow {
    recording: String,
    p_pathological: f64,
    label: &'static str,
    windows: usize,
}

pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    check_batch(args.batch)?;
    let (config, model) = open(&args.model, cx)?;
    let mut skipped = Vec::new();
    let mut windows = Vec::new();
    match &args.data {
        Some(folder) => {
            let data = Dataset::open(folder)?;
            config.check_data(&data, folder)?;
            let all: Vec<usize> = (0..data.recordings.len()).collect();
            windows = judge(&config, &model, &data, &all, args.batch, &mut skipped, cx)?;
            if args.relevance {
                all.iter().try_for_each(|&at| draw_relevance(args, &config, &model, &data, at, cx))?;
            }
        }
        None => {
            let files = files(&args.input)?;
            let bar = cx.progress(files.len() as u64, "judging recordings");
            for (path, id) in files {
                if cx.interrupted() {
                    return Err(Error::interrupted("stopped before all recordings were judged"));
                }
                // One recording is in memory at a time.
                match read_one(&config, &path, &id) {
                    Ok(data) => {
                        windows.extend(judge(&config, &model, &data, &[0], args.batch, &mut skipped, cx)?);
                        if args.relevance {
                            draw_relevance(args, &config, &model, &data, 0, cx)?;
                        }
                    }
                    Err(error) => {
                        cx.note(format!("left out: {error}"));
                        skipped.push(Skipped { recording: id, reason: error.to_string() });
                    }
                }
                bar.inc(1);
            }
        }
    }
    if windows.is_empty() {
        let reason = skipped.first().map_or("there are none".into(), |s| s.reason.clone());
        return Err(Error::work(format!("no recording can be judged; the first: {reason}")));
    }
    let outcomes = by_recording(&windows);
    fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    let name = |pathological: bool| if pathological { "pathological" } else { "normal" };
    let rows: Vec<PredictionRow> = outcomes
        .iter()
        .map(|o| PredictionRow {
            recording: o.recording.clone(),
            p_pathological: o.p_pathological,
            label: name(o.decision()),
            windows: o.windows,
        })
        .collect();
    write_csv(&args.out.join("predictions.csv"), &rows)?;
    write_windows(&args.out.join("windows.csv"), &windows)?;
    if !skipped.is_empty() {
        write_csv(&args.out.join("skipped.csv"), &skipped)?;
    }
    let result = json!({ "out": args.out, "predictions": rows, "skipped": skipped });
    cx.emit(&result, |_| {
        let mut text = String::from("recording                       p_pathological  label\n");
        for row in &rows {
            text += &format!("{:<31} {:<15.3} {}\n", row.recording, row.p_pathological, row.label);
        }
        for one in &skipped {
            text += &format!("{:<31} left out: {}\n", one.recording, one.reason);
        }
        text + &format!("tables in {}\n", args.out.display())
    })
}

/// A row of a relevance table.
#[derive(Serialize)]
struct RelevanceRow<'a> {
    channel: &'a str,
    band: &'static str,
    evidence: f64,
}

/// Draws what speaks for and against pathology in one recording.
fn draw_relevance(
    args: &PredictArgs,
    config: &Config,
    model: &Model,
    data: &Dataset,
    at: usize,
    cx: &Context,
) -> Result<()> {
    let windows = WindowSet::for_evaluation(data, &[at], config.network.n_times(), stride(&config.network));
    if windows.is_empty() {
        return Ok(()); // listed among those that were left out
    }
    let evidence = relevance(model, &windows, config.pipeline.rate, cx)?;
    let folder = args.out.join("relevance");
    fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    let id = &data.recordings[at].about.id;
    let rows = data.channels.iter().zip(&evidence).flat_map(|(channel, row)| {
        row.iter().zip(BANDS).map(move |(&evidence, (band, _))| RelevanceRow { channel, band, evidence })
    });
    write_csv(&folder.join(format!("{id}.csv")), rows)?;
    Plot::heat_map(
        format!("Evidence by channel and band, {id}"),
        "band: delta, theta, alpha, beta, gamma",
        "channel",
        BANDS.len(),
        evidence.iter().flatten().map(|x| x.abs()).collect(),
    )
    .save(&folder.join(format!("{id}.png")))
}

pub(super) fn check_batch(batch: usize) -> Result<()> {
    if batch == 0 {
        return Err(Error::usage("--batch must be at least 1"));
    }
    Ok(())
}

/// Files to judge with their names.
fn files(inputs: &[PathBuf]) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for input in inputs {
        match input.is_dir() {
            true => files.extend(files_below(input)?.into_iter().map(|path| {
                let id = id_of(&path, input);
                (path, id)
            })),
            false => {
                let id = input.file_stem().map(|s| s.to_string_lossy().to_string()).unwrap_or_default();
                files.push((input.clone(), id));
            }
        }
    }
    if files.is_empty() {
        return Err(Error::usage("the folders hold no recordings").hint("recordings end in .edf or .bdf"));
    }
    Ok(files)
}

/// One recording, prepared as the model needs it.
pub(super) fn read_one(config: &Config, path: &Path, id: &str) -> Result<Dataset> {
    let prepared = config.pipeline.read(path)?;
    let count = prepared.channels.len();
    let about = About { id: id.into(), label: None, subject: None, age: None, sex: None, split: None };
    let data = Dataset {
        channels: prepared.channels,
        pipeline: config.pipeline.clone(),
        recordings: vec![Arc::new(Recording::new(about, prepared.eeg, count))],
    };
    config.check_data(&data, path)?;
    Ok(data)
}

/// What the model says of every window of these recordings; those shorter than a window are left out.
pub(super) fn judge(
    config: &Config,
    model: &Model,
    data: &Dataset,
    chosen: &[usize],
    batch: usize,
    skipped: &mut Vec<Skipped>,
    cx: &Context,
) -> Result<Vec<WindowOutcome>> {
    let length = config.network.n_times();
    for recording in chosen.iter().map(|&at| &data.recordings[at]).filter(|r| r.samples < length) {
        let reason = format!("has {} samples, fewer than a window of {length}", recording.samples);
        skipped.push(Skipped { recording: recording.about.id.clone(), reason });
    }
    let windows = WindowSet::for_evaluation(data, chosen, length, stride(&config.network));
    train::predict(model, &windows, batch, config.temperature, cx)
}

/// A row of windows.csv, which `eval --windows` reads.
#[derive(Serialize)]
struct WindowRow {
    recording: String,
    window: usize,
    label: Option<u8>,
    p_pathological: f64,
}

fn write_windows(path: &Path, windows: &[WindowOutcome]) -> Result<()> {
    let row = |w: &WindowOutcome| WindowRow {
        recording: w.recording.clone(),
        window: w.window,
        label: w.label.map(u8::from),
        p_pathological: w.p_pathological,
    };
    write_csv(path, windows.iter().map(row))
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Model folder
    #[arg(long, required_unless_present = "windows", requires = "data")]
    model: Option<PathBuf>,
    /// Table with the columns recording, window, label and p_pathological, in place of a model
    #[arg(long, conflicts_with = "model")]
    windows: Option<PathBuf>,
    /// Labelled recordings: a folder that `prepare` wrote, a folder of EDF files, or an .npz file
    #[arg(long, conflicts_with = "windows")]
    data: Option<PathBuf>,
    /// Arrays of the .npz file
    #[arg(long, value_delimiter = ',')]
    array: Vec<String>,
    /// Table of labels
    #[arg(long)]
    labels: Option<PathBuf>,
    /// The label that counts as pathological
    #[arg(long, value_name = "LABEL")]
    positive: Option<String>,
    /// Samples a second of the .npz file
    #[arg(long)]
    rate: Option<f64>,
    /// Judge all recordings, not only those that are marked for it
    #[arg(long)]
    all: bool,
    /// Windows that pass through the network at once
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// JSON file to write; the ROC curve goes beside it, as .svg
    #[arg(long, default_value = "metrics.json")]
    out: PathBuf,
}

impl EvalArgs {
    /// The recordings, prepared as the model's were.
    fn data(&self, path: &Path, config: &Config, cx: &Context) -> Result<Dataset> {
        let trained = &config.pipeline;
        let is_array = path.extension().is_some_and(|ending| ending == "npz");
        let is_prepared = Dataset::is_prepared(path);
        let pipeline = PipelineArgs {
            tmin: (!is_prepared).then_some(trained.tmin),
            tmax: (!is_prepared).then_some(trained.tmax),
            rate: if is_array { self.rate } else { (!is_prepared).then_some(trained.rate) },
            clip: (!is_prepared).then_some(trained.clip),
            normalise: (!is_prepared).then_some(trained.normalise),
            channels: (!is_prepared).then(|| trained.channels.clone()),
            band: trained.band.filter(|_| !is_prepared).map(Vec::from),
            average_reference: !is_prepared && trained.average_reference,
            asr: trained.asr.filter(|_| !is_prepared),
        };
        let args = DataArgs {
            data: path.into(),
            array: self.array.clone(),
            resample: trained.rate,
            labels: self.labels.clone(),
            layout: crate::layout::Layout::Csv,
            positive: self.positive.clone(),
            pipeline,
        };
        let data = args.open(cx)?;
        config.check_data(&data, path)?;
        Ok(data)
    }
}

pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    check_batch(args.batch)?;
    let mut skipped = Vec::new();
    let mut groups = Vec::new();
    let outcomes = match (&args.windows, &args.model, &args.data) {
        (Some(windows), _, _) => by_recording(&read_windows(windows)?),
        (None, Some(model), Some(path)) => {
            let (config, model) = open(model, cx)?;
            let data = args.data(path, &config, cx)?;
            let chosen = match args.all {
                true => {
                    (0..data.recordings.len()).filter(|&at| data.recordings[at].label.is_some()).collect()
                }
                false => data.evaluation(),
            };
            let outcomes =
                by_recording(&judge(&config, &model, &data, &chosen, args.batch, &mut skipped, cx)?);
            groups = subgroups(&data, &outcomes);
            outcomes
        }
        _ => return Err(Error::usage("give --model and --data, or --windows")),
    };
    let metrics = Metrics::of(&outcomes);
    if metrics.n == 0 {
        return Err(Error::work("no labelled recording can be judged")
            .hint("are there labels, and a window's length?"));
    }
    let mut result: Map<String, Value> = match serde_json::to_value(metrics) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let mut intervals = Map::new();
    for (name, figure) in FIGURES {
        intervals.insert(name.into(), json!(interval(&outcomes, figure, &mut cx.rng("bootstrap", 0))));
    }
    result.insert("intervals_95".into(), intervals.into());
    let groups: Vec<Value> =
        groups.iter().map(|(name, metrics)| json!({ "group": name, "metrics": metrics })).collect();
    result.insert("groups".into(), groups.clone().into());
    result.insert("skipped".into(), json!(skipped));
    let text = serde_json::to_vec_pretty(&result)
        .map_err(|e| Error::work("cannot write the metrics as JSON").caused_by(e))?;
    write_atomic(&args.out, &text)?;
    if metrics.auc.is_some() {
        Plot::lines("ROC curve", "1 - specificity", "sensitivity")
            .series(format!("area {:.3}", metrics.auc.unwrap_or_default()), roc(&outcomes))
            .series("chance", vec![(0.0, 0.0), (1.0, 1.0)])
            .save(&args.out.with_extension("svg"))?;
    }
    cx.emit(&result, |result| {
        let mut text = format!("{} recordings, {} left out\n", metrics.n, skipped.len());
        for (name, figure) in FIGURES {
            let interval = result["intervals_95"][name].as_array().map_or(String::new(), |pair| {
                format!(
                    "  95 %: {:.3} to {:.3}",
                    pair[0].as_f64().unwrap_or(0.0),
                    pair[1].as_f64().unwrap_or(0.0)
                )
            });
            text += &format!("{:<18} {}{interval}\n", name.replace('_', " "), shown(figure(&metrics)));
        }
        for group in &groups {
            let name = group["group"].as_str().unwrap_or_default();
            let (n, accuracy) = (&group["metrics"]["n"], group["metrics"]["balanced_accuracy"].as_f64());
            text += &format!("{name:<18} balanced accuracy {} of {n}\n", shown(accuracy));
        }
        text + &format!("figures in {}\n", args.out.display())
    })
}

/// A figure of the metrics.
type Figure = fn(&Metrics) -> Option<f64>;

const FIGURES: [(&str, Figure); 7] = [
    ("accuracy", |m| m.accuracy),
    ("balanced_accuracy", |m| m.balanced_accuracy),
    ("sensitivity", |m| m.sensitivity),
    ("specificity", |m| m.specificity),
    ("f1", |m| m.f1),
    ("mcc", |m| m.mcc),
    ("auc", |m| m.auc),
];

/// Figures by sex and age, where they are known.
fn subgroups(data: &Dataset, outcomes: &[Outcome]) -> Vec<(String, Metrics)> {
    let group = |recording: &Recording| {
        let sex = recording.about.sex.as_ref().map(|sex| format!("sex {sex}"));
        let age = recording.about.age.map(|age| match AGE_GROUPS {
            [young, _] if age < young => format!("age below {young}"),
            [young, old] if age < old => format!("age {young} to {old}"),
            [_, old] => format!("age from {old}"),
        });
        [sex, age]
    };
    let mut groups: std::collections::BTreeMap<String, Vec<&Outcome>> = Default::default();
    for outcome in outcomes {
        let recording = data.recordings.iter().find(|r| r.about.id == outcome.recording);
        for name in recording.map(|r| group(r)).into_iter().flatten().flatten() {
            groups.entry(name).or_default().push(outcome);
        }
    }
    groups.into_iter().map(|(name, outcomes)| (name, Metrics::of(outcomes))).collect()
}

/// Reads probabilities of windows.
fn read_windows(path: &Path) -> Result<Vec<WindowOutcome>> {
    let table = Table::read(path, TableOptions::default())?;
    let column = |name: &str| table.column(name).ok_or_else(|| table.no_column(name));
    let (recordings, labels) = (column("recording")?, column("label")?);
    let (numbers, probabilities) = (column("window")?, column("p_pathological")?);
    let row = |row: usize| {
        let place = |found: String| Error::input(format!("{}: row {}", path.display(), row + 1), found);
        let recording = recordings.text(row).ok_or_else(|| place("names no recording".into()))?;
        let text = probabilities.text(row).unwrap_or_default();
        let p: f64 = text.parse().ok().filter(|p| (0.0..=1.0).contains(p)).ok_or_else(|| {
            place(format!("the probability is \"{text}\"")).hint("p_pathological lies between 0 and 1")
        })?;
        let label = match labels.text(row).as_deref() {
            None => None,
            Some("0") => Some(false),
            Some("1") => Some(true),
            Some(other) => return Err(place(format!("the label is \"{other}\"")).hint("labels are 0 or 1")),
        };
        let window = numbers.text(row).and_then(|n| n.parse().ok()).unwrap_or(row);
        Ok(WindowOutcome { recording, window, label, p_pathological: p })
    };
    let windows = (0..table.rows()).map(row).collect::<Result<Vec<_>>>()?;
    let mut labels: std::collections::BTreeMap<&str, Option<bool>> = Default::default();
    for (number, window) in windows.iter().enumerate() {
        if *labels.entry(&window.recording).or_insert(window.label) != window.label {
            let place = format!("{}: row {}", path.display(), number + 1);
            return Err(Error::input(place, format!("{} has two labels", window.recording)));
        }
    }
    Ok(windows)
}
