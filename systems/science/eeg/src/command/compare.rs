//! Verbs that compare networks: `transfer`, `scale`, `cka`.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, ModelFolder, Plot, Result, Table, TensorFile, write_atomic};
use kiln_data::write_csv;
use serde::Serialize;
use serde_json::json;

use super::judge::judge;
use super::learn::{ShapeArgs, chosen};
use super::{DataArgs, shown};
use crate::checkpoint::{Config, KIND, open, stride};
use crate::cka::{alignments, representations};
use crate::dataset::Dataset;
use crate::metrics::{Metrics, Outcome, by_recording, paired_difference, percentiles};
use crate::model::{Arch, Model, ModelConfig};
use crate::scaling::{PowerLaw, interval};
use crate::train::{LEARNING_RATE, predict};
use crate::transfer::{Protocol, Target, new_model};
use crate::windows::WindowSet;

/// Share of the subjects that is kept to judge by where the data mark none.
const HELD_OUT: f64 = 0.3;
/// Alignment from which a block counts as the same in both networks.
const ALIKE: f64 = 0.8;

#[derive(Debug, Args)]
pub(super) struct TransferArgs {
    /// Model folder of the source site
    #[arg(long)]
    source: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Ways to the target: zero-shot, linear-probe, fine-tune, freeze:K, discriminative, joint; scratch and zero-shot are run in any case
    #[arg(long, value_delimiter = ',', default_value = "fine-tune")]
    protocol: Vec<Protocol>,
    /// Numbers of target recordings to learn from [default: all]
    #[arg(long, value_delimiter = ',', value_name = "N")]
    subset: Vec<usize>,
    /// Repetitions, each with recordings and draws of its own
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Prepared recordings of the source site: for joint, and to measure what is forgotten
    #[arg(long, value_name = "DIR")]
    source_data: Option<PathBuf>,
    #[command(flatten)]
    course: CourseArgs,
    /// Folder to write: results.csv, transfer.svg, and a model folder for each protocol and seed
    #[arg(long)]
    out: PathBuf,
}

/// How networks learn.
#[derive(Debug, Clone, Args)]
struct CourseArgs {
    /// Passes through the windows
    #[arg(long, default_value_t = 20)]
    epochs: usize,
    /// Windows of a step
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Learning rate at the beginning
    #[arg(long, default_value_t = LEARNING_RATE)]
    lr: f64,
}

impl CourseArgs {
    fn target<'a>(&self, train: &'a WindowSet, source: Option<&'a WindowSet>) -> Target<'a> {
        Target { train, valid: None, source, batch: self.batch, epochs: self.epochs, lr: self.lr }
    }

    fn check(&self, seeds: u64) -> Result<()> {
        if self.epochs == 0 || self.batch == 0 || seeds == 0 {
            return Err(Error::usage("--epochs, --batch and --seeds must be at least 1"));
        }
        Ok(())
    }
}

/// One row of the results.
#[derive(Debug, Clone, Serialize)]
struct Row {
    protocol: String,
    recordings: usize,
    balanced_accuracy: Option<f64>,
    auc: Option<f64>,
    minus_scratch: Option<f64>,
    low: Option<f64>,
    high: Option<f64>,
    negative_transfer: bool,
    source_balanced_accuracy: Option<f64>,
}

pub(super) fn transfer(args: &TransferArgs, cx: &Context) -> Result<()> {
    args.course.check(args.seeds)?;
    let (config, source) = open(&args.source, cx)?;
    let data = args.data.open(cx)?;
    config.check_data(&data, &args.data.data)?;
    let (pool, test) = pool_and_test(&data, cx)?;
    let sizes = if args.subset.is_empty() { vec![pool.len()] } else { args.subset.clone() };
    check_sizes(&sizes, pool.len())?;
    let beside = args.source_data.as_ref().map(|folder| Dataset::open(folder)).transpose()?;
    if let (Some(beside), Some(folder)) = (&beside, &args.source_data) {
        config.check_data(beside, folder)?;
    }
    if args.protocol.contains(&Protocol::Joint) && beside.is_none() {
        return Err(
            Error::usage("joint needs the recordings of the source site").hint("give --source-data DIR")
        );
    }
    let mut protocols = vec![Protocol::Scratch, Protocol::ZeroShot];
    protocols.extend(args.protocol.iter().filter(|p| !matches!(p, Protocol::Scratch | Protocol::ZeroShot)));
    let (length, step) = (config.network.n_times(), stride(&config.network));
    let source_windows =
        beside.as_ref().map(|data| WindowSet::for_training(data, &data.training(), length, step));
    fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;

    let bar = cx.progress((protocols.len() * sizes.len()) as u64 * args.seeds, "transferring");
    let mut rows: Vec<Row> = Vec::new();
    for &size in &sizes {
        let mut baseline: Vec<Vec<Outcome>> = Vec::new();
        for &protocol in &protocols {
            let mut runs = Vec::new();
            let mut kept = Vec::new();
            for seed in 0..args.seeds {
                let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
                let order = data.nested(&pool, &mut cx.rng("subset", 0));
                let windows = WindowSet::for_training(&data, &order[..size], length, step);
                if windows.is_empty() {
                    return Err(Error::usage(format!(
                        "no recording is as long as a window of {length} samples"
                    )));
                }
                let target = args.course.target(&windows, source_windows.as_ref());
                let model = target.adapt(protocol, &source, &config.network, cx)?;
                let mut skipped = Vec::new();
                let judged = judge(&config, &model, &data, &test, args.course.batch, &mut skipped, cx)?;
                runs.push(by_recording(&judged));
                if let Some(beside) = &beside {
                    let chosen = beside.evaluation();
                    let judged =
                        judge(&config, &model, beside, &chosen, args.course.batch, &mut skipped, cx)?;
                    kept.push(Metrics::of(&by_recording(&judged)).balanced_accuracy);
                }
                if size == sizes.iter().copied().max().unwrap_or(size) {
                    let name = protocol.to_string().replace(':', "-");
                    save(&args.out.join(name).join(format!("seed-{}", cx.seed)), &config, &model)?;
                }
                bar.inc(1);
            }
            if protocol == Protocol::Scratch {
                baseline.clone_from(&runs);
            }
            rows.push(row(protocol, size, &runs, &baseline, &kept, cx));
        }
    }
    write_csv(&args.out.join("results.csv"), &rows)?;
    plot(&rows, &sizes)?.save(&args.out.join("transfer.svg"))?;
    cx.emit(&json!({ "out": args.out, "test_recordings": test.len(), "rows": rows }), |_| {
        let mut table = Table::new(
            format!(
                "Balanced accuracy on {} recordings of the target, mean of {} seeds",
                test.len(),
                args.seeds
            ),
            &[
                "recordings",
                "protocol",
                "balanced accuracy",
                "minus scratch",
                "95 %",
                "on the source",
                "negative",
            ],
        );
        for row in &rows {
            let interval =
                row.low.zip(row.high).map_or("-".into(), |(low, high)| format!("{low:.3} to {high:.3}"));
            table.row([
                row.recordings.to_string(),
                row.protocol.clone(),
                shown(row.balanced_accuracy),
                shown(row.minus_scratch),
                interval,
                shown(row.source_balanced_accuracy),
                if row.negative_transfer { "negative transfer".into() } else { String::new() },
            ]);
        }
        format!("{}\n{}models and tables in {}\n", table.title, table.to_text(), args.out.display())
    })
}

/// What a protocol's runs come to.
fn row(
    protocol: Protocol,
    recordings: usize,
    runs: &[Vec<Outcome>],
    baseline: &[Vec<Outcome>],
    kept: &[Option<f64>],
    cx: &Context,
) -> Row {
    let mean = |values: Vec<Option<f64>>| {
        let count = values.len();
        let sum: Option<f64> = values.into_iter().sum();
        sum.filter(|_| count > 0).map(|sum| sum / count as f64)
    };
    let figure =
        |of: fn(&Metrics) -> Option<f64>| mean(runs.iter().map(|run| of(&Metrics::of(run))).collect());
    let difference = match protocol {
        Protocol::Scratch => None,
        _ => paired_difference(runs, baseline, &mut cx.rng("bootstrap", 0)),
    };
    Row {
        protocol: protocol.to_string(),
        recordings,
        balanced_accuracy: figure(|m| m.balanced_accuracy),
        auc: figure(|m| m.auc),
        minus_scratch: difference.map(|(difference, _)| difference),
        low: difference.map(|(_, [low, _])| low),
        high: difference.map(|(_, [_, high])| high),
        negative_transfer: difference.is_some_and(|(_, [_, high])| high < 0.0),
        source_balanced_accuracy: mean(kept.to_vec()),
    }
}

/// The gain of each protocol over scratch with the ends of its interval; for several sizes as curves.
fn plot(rows: &[Row], sizes: &[usize]) -> Result<Plot> {
    let compared: Vec<&Row> = rows.iter().filter(|row| row.minus_scratch.is_some()).collect();
    if let [size] = sizes {
        let bars =
            |of: fn(&Row) -> Option<f64>| compared.iter().map(|row| of(row).unwrap_or(f64::NAN)).collect();
        return Ok(Plot::bars(
            format!("Gain over scratch with {size} recordings"),
            "balanced accuracy",
            compared.iter().map(|row| row.protocol.clone()),
            [
                ("2.5 %", bars(|row| row.low)),
                ("mean", bars(|row| row.minus_scratch)),
                ("97.5 %", bars(|row| row.high)),
            ],
        ));
    }
    let mut plot = Plot::lines("Transfer", "recordings of the target", "balanced accuracy").log_x();
    let mut names: Vec<&str> = rows.iter().map(|row| row.protocol.as_str()).collect();
    names.dedup();
    names.truncate(rows.len() / sizes.len());
    for name in names {
        let points = rows.iter().filter(|row| row.protocol == name);
        let points = points.map(|row| (row.recordings as f64, row.balanced_accuracy.unwrap_or(f64::NAN)));
        plot = plot.series(name, points.collect());
    }
    Ok(plot)
}

/// Recordings to learn from and to judge by: as they are marked, or a share of the subjects held out.
fn pool_and_test(data: &Dataset, cx: &Context) -> Result<(Vec<usize>, Vec<usize>)> {
    let marked = data.recordings.iter().any(|recording| recording.about.split.is_some());
    let (pool, test) = match marked {
        true => (data.training(), data.evaluation()),
        false => data.split(&data.training(), HELD_OUT, &mut cx.rng("held out", 0))?,
    };
    for (part, what) in [(&pool, "learn from"), (&test, "judge by")] {
        let pathological = part.iter().filter(|&&at| data.recordings[at].label == Some(true)).count();
        if pathological == 0 || pathological == part.len() {
            let found = format!("{pathological} of {} recordings to {what} are pathological", part.len());
            return Err(Error::usage(found).hint("both classes are needed"));
        }
    }
    Ok((pool, test))
}

fn check_sizes(sizes: &[usize], all: usize) -> Result<()> {
    match sizes.iter().find(|&&size| size == 0 || size > all) {
        Some(size) => Err(Error::usage(format!("a subset of {size} of {all} recordings"))),
        None => Ok(()),
    }
}

fn save(path: &std::path::Path, config: &Config, model: &Model) -> Result<()> {
    let folder = ModelFolder::new(path);
    folder.create()?;
    folder.save_config(KIND, config)?;
    folder.save_weights(&TensorFile::from_module(model))
}

#[derive(Debug, Args)]
pub(super) struct ScaleArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Numbers of recordings to learn from
    #[arg(long, value_delimiter = ',', required = true)]
    subsets: Vec<usize>,
    /// Networks
    #[arg(long, value_enum, value_delimiter = ',', default_value = "shallow")]
    models: Vec<Arch>,
    /// Repetitions, each with nested subsets of its own
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    #[command(flatten)]
    shape: WindowArgs,
    #[command(flatten)]
    course: CourseArgs,
    /// Folder to write: results.csv and scale.svg
    #[arg(long)]
    out: PathBuf,
}

/// The windows of networks that are compared.
#[derive(Debug, Clone, Args)]
struct WindowArgs {
    /// Samples of a window [default: 6000, or the shortest recording]
    #[arg(long)]
    window: Option<usize>,
    /// So many times the paper's filters
    #[arg(long, default_value_t = 1.0)]
    width: f64,
}

/// One run of the data scaling.
#[derive(Debug, Clone, Serialize)]
struct ScaleRow {
    model: Arch,
    recordings: usize,
    seed: u64,
    balanced_accuracy: Option<f64>,
}

pub(super) fn scale(args: &ScaleArgs, cx: &Context) -> Result<()> {
    args.course.check(args.seeds)?;
    let data = args.data.open(cx)?;
    let all = chosen(&data, None, &args.data, cx)?;
    let (pool, test) = pool_and_test(&data, cx)?;
    check_sizes(&args.subsets, pool.len())?;
    fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    let mut rows = Vec::new();
    let bar = cx.progress((args.models.len() * args.subsets.len()) as u64 * args.seeds, "training");
    for &arch in &args.models {
        let shape = ShapeArgs::of_windows(arch, args.shape.window, args.shape.width);
        let network = shape.network(&data, &all)?;
        for &size in &args.subsets {
            for seed in 0..args.seeds {
                let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
                let order = data.nested(&pool, &mut cx.rng("subset", 0));
                let outcomes = learn(&network, &data, &order[..size], &test, &args.course, cx)?;
                let balanced_accuracy = Metrics::of(&outcomes).balanced_accuracy;
                rows.push(ScaleRow { model: arch, recordings: size, seed: cx.seed, balanced_accuracy });
                bar.inc(1);
            }
        }
    }
    write_csv(&args.out.join("results.csv"), &rows)?;
    let mut plot = Plot::lines("Error over recordings", "recordings", "1 - balanced accuracy").log_x();
    let mut fits = Vec::new();
    for &arch in &args.models {
        let points: Vec<(f64, f64)> = rows
            .iter()
            .filter(|row| row.model == arch)
            .filter_map(|row| Some((row.recordings as f64, 1.0 - row.balanced_accuracy?)))
            .collect();
        let of = |size: usize| {
            let errors: Vec<f64> =
                points.iter().filter(|(n, _)| *n == size as f64).map(|(_, e)| *e).collect();
            (errors.iter().sum::<f64>() / errors.len().max(1) as f64, percentiles(errors))
        };
        let curve: Vec<(f64, f64)> = args.subsets.iter().map(|&size| (size as f64, of(size).0)).collect();
        let name = format!("{arch:?}").to_lowercase();
        plot = plot.series(name.clone(), curve.clone());
        let law = PowerLaw::fit(&points);
        if let Some(law) = law {
            let fitted = args.subsets.iter().map(|&size| (size as f64, law.at(size as f64))).collect();
            plot = plot.series(format!("{name}: {:.3} + {:.3} n^-{:.2}", law.a, law.b, law.c), fitted);
        }
        let tenfold = 10.0 * args.subsets.iter().copied().max().unwrap_or(1) as f64;
        let ahead = law.and_then(|_| interval(&points, tenfold, &mut cx.rng("bootstrap", 0)));
        let sizes: Vec<_> = args
            .subsets
            .iter()
            .map(|&size| json!({ "recordings": size, "error": of(size).0, "range_over_seeds": of(size).1 }))
            .collect();
        fits.push(json!({
            "model": arch,
            "errors": sizes,
            "power_law": law,
            "with_tenfold": { "recordings": tenfold, "error": law.map(|law| law.at(tenfold)), "interval_95": ahead },
        }));
    }
    plot.save(&args.out.join("scale.svg"))?;
    cx.emit(&json!({ "out": args.out, "test_recordings": test.len(), "models": fits }), |_| {
        let mut text = String::from("model      recordings   error    range over seeds\n");
        for fit in &fits {
            for size in fit["errors"].as_array().into_iter().flatten() {
                let number = |value: &serde_json::Value| shown(value.as_f64());
                text += &format!(
                    "{:<10} {:<12} {:<8} {} to {}\n",
                    fit["model"].as_str().unwrap_or_default(),
                    size["recordings"],
                    number(&size["error"]),
                    number(&size["range_over_seeds"][0]),
                    number(&size["range_over_seeds"][1])
                );
            }
            let ahead = &fit["with_tenfold"];
            if let Some(error) = ahead["error"].as_f64() {
                text += &format!(
                    "           with {} recordings, an error of {error:.3} by the power law\n",
                    ahead["recordings"]
                );
            }
        }
        text + &format!("curves in {}\n", args.out.display())
    })
}

/// Trains a network and judges it.
fn learn(
    network: &ModelConfig,
    data: &Dataset,
    train: &[usize],
    test: &[usize],
    course: &CourseArgs,
    cx: &Context,
) -> Result<Vec<Outcome>> {
    let (length, step) = (network.n_times(), stride(network));
    let windows = WindowSet::for_training(data, train, length, step);
    if windows.is_empty() {
        return Err(Error::usage(format!("no recording is as long as a window of {length} samples")));
    }
    let target = course.target(&windows, None);
    let model = target.adapt(Protocol::Scratch, &new_model(network, cx), network, cx)?;
    let judged = WindowSet::for_evaluation(data, test, length, step);
    Ok(by_recording(&predict(&model, &judged, course.batch, 1.0, cx)?))
}

#[derive(Debug, Args)]
pub(super) struct CkaArgs {
    /// A model folder
    #[arg(long)]
    a: PathBuf,
    /// Another, of a network for the same windows
    #[arg(long)]
    b: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Most windows to compare by
    #[arg(long, default_value_t = 256)]
    windows: usize,
    /// Heat map to write, .svg or .png; the numbers go beside it, as .json
    #[arg(long, default_value = "cka.svg")]
    out: PathBuf,
}

pub(super) fn cka(args: &CkaArgs, cx: &Context) -> Result<()> {
    let ((config_a, a), (config_b, b)) = (open(&args.a, cx)?, open(&args.b, cx)?);
    let data = args.data.open(cx)?;
    config_a.check_data(&data, &args.data.data)?;
    config_b.check_data(&data, &args.data.data)?;
    let length = config_a.network.n_times();
    if config_b.network.n_times() != length {
        let message = format!("windows of {length} and {} samples", config_b.network.n_times());
        return Err(Error::usage(message).hint("both networks must see the same windows"));
    }
    let all: Vec<usize> = (0..data.recordings.len()).collect();
    let windows = WindowSet::for_training(&data, &all, length, length).thinned(args.windows);
    if windows.len() < 2 {
        return Err(Error::usage(format!(
            "{} windows of {length} samples; at least two are needed",
            windows.len()
        )));
    }
    let (of_a, of_b) = (representations(&a, &windows, cx)?, representations(&b, &windows, cx)?);
    let matrix = alignments(&of_a, &of_b, windows.len());
    // Blocks from the input on that mean the same in both; the classifier is never frozen.
    let most = (of_a.len().min(of_b.len())) - 1;
    let alike = (0..most).take_while(|&block| matrix[block][block] >= ALIKE).count();
    let values: Vec<f64> = matrix.iter().flatten().copied().collect();
    Plot::heat_map("Alignment of blocks", "block of b", "block of a", of_b.len(), values).save(&args.out)?;
    let result = json!({ "windows": windows.len(), "cka": matrix, "suggested_freeze": alike });
    let text =
        serde_json::to_vec_pretty(&result).map_err(|e| Error::work("cannot write JSON").caused_by(e))?;
    write_atomic(&args.out.with_extension("json"), &text)?;
    cx.emit(&result, |_| {
        let mut text = format!("alignment of blocks (rows: a, columns: b) over {} windows\n", windows.len());
        for row in &matrix {
            text += &row.iter().map(|x| format!("{x:.3}")).collect::<Vec<_>>().join("  ");
            text.push('\n');
        }
        text + &format!(
            "the first {alike} blocks are alike: freeze:{alike} would keep them; heat map in {}\n",
            args.out.display()
        )
    })
}
