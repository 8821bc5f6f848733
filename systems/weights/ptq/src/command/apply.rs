//! Verbs of quantised networks: `predict`, `eval`, `bench`, `compare` and `export`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, HostTensor, ModelFolder, Result, TensorFile, write_atomic};
use kiln_data::write_npz;
use kiln_nn::likeliest;
use serde_json::json;

use super::report;
use super::source::{ForeignArgs, ModelArgs, Source, read_for};
use crate::latency::measure;
use crate::layers::Layers;
use crate::quantise::{Metric, logits, score};
use crate::ready::Ready;
use crate::store::{self, Quantised};

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Folder of a quantised network
    #[arg(long)]
    model: PathBuf,
    /// Examples; labels are not needed
    #[arg(long)]
    input: PathBuf,
    /// .csv with classes and probabilities, or .npz with logits `y`
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let model = Quantised::open(&args.model)?;
    let examples = read_for(&model, &args.model, &args.input, false)?;
    let rows = logits(&model.batched(64), &model.ready, &examples)?;
    let classes = rows.first().map_or(0, Vec::len);
    match args.out.extension().and_then(|extension| extension.to_str()) {
        Some("npz") => {
            let mut file = TensorFile::new();
            file.insert("y", HostTensor::float([rows.len(), classes], rows.concat()));
            write_npz(&args.out, &file)?;
        }
        Some("csv") => {
            let name = |class: usize| model.config.classes.get(class).cloned().unwrap_or(class.to_string());
            let failed = |e: csv::Error| Error::work("cannot lay out the predictions").caused_by(e);
            let mut writer = csv::Writer::from_writer(Vec::new());
            let heads = ["row".to_string(), "pred".to_string()];
            let heads = heads.into_iter().chain((0..classes).map(|class| format!("p_{}", name(class))));
            writer.write_record(heads).map_err(failed)?;
            for (number, row) in rows.iter().enumerate() {
                let wide: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                let total = crate::mlp::log_sum_exp(&wide);
                let cells = [(number + 1).to_string(), name(likeliest(row))];
                let shares = wide.iter().map(|x| format!("{:.6}", (x - total).exp()));
                writer.write_record(cells.into_iter().chain(shares)).map_err(failed)?;
            }
            let bytes = writer
                .into_inner()
                .map_err(|e| Error::work(format!("cannot lay out the predictions: {e}")))?;
            write_atomic(&args.out, &bytes)?;
        }
        _ => return Err(Error::usage(format!("{} ends neither in .csv nor in .npz", args.out.display()))),
    }
    let result = json!({ "examples": rows.len(), "out": args.out });
    cx.emit(&result, |_| format!("{} predictions in {}\n", rows.len(), args.out.display()))
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Labelled examples
    #[arg(long)]
    data: PathBuf,
}

pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let folder = &args.model.model;
    let (examples, rows) = if store::is_quantised(folder) {
        let model = Quantised::open(folder)?;
        let examples = read_for(&model, folder, &args.data, true)?;
        let rows = logits(&model.batched(64), &model.ready, &examples)?;
        (examples, rows)
    } else {
        let source = Source::open(&args.model, cx)?;
        let examples = source.read(&args.data, true)?;
        let ready: Vec<_> = source.program.units.iter().map(Ready::float).collect();
        let program = source.program.with_batch(64, &ready).unwrap_or(source.program);
        let rows = logits(&program, &ready, &examples)?;
        (examples, rows)
    };
    let [accuracy, f1, loss] =
        [Metric::Accuracy, Metric::F1, Metric::Loss].map(|metric| score(&rows, &examples.labels, metric));
    let result = json!({ "examples": rows.len(), "accuracy": accuracy, "f1": f1, "loss": -loss });
    cx.emit(&result, |_| {
        format!("accuracy {accuracy:.4}, F1 {f1:.4}, loss {:.4} on {} examples\n", -loss, rows.len())
    })
}

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Folder of a quantised network
    #[arg(long)]
    model: PathBuf,
    /// Examples to run
    #[arg(long)]
    data: PathBuf,
    /// Examples at once
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Runs that count, after five that do not
    #[arg(long, default_value_t = 50)]
    runs: usize,
}

pub(super) fn bench(args: &BenchArgs, cx: &Context) -> Result<()> {
    if args.batch == 0 || args.runs == 0 {
        return Err(Error::usage("--batch and --runs must be at least 1"));
    }
    let model = Quantised::open(&args.model)?;
    let examples = read_for(&model, &args.model, &args.data, false)?;
    let program = model.batched(args.batch);
    if program.batch() != args.batch {
        return Err(Error::usage(format!("the network computes one example at a time, not {}", args.batch)));
    }
    let floats: Vec<_> = program.units.iter().map(Ready::half).collect();
    let plain = measure(&program, &floats, &examples, args.runs)?;
    let quantised = measure(&program, &model.ready, &examples, args.runs)?;
    let bytes = store::weight_bytes(&ModelFolder::new(&args.model));
    let peak = kiln_core::MemoryGauge::start()
        .and_then(|gauge| gauge.peak(|| measure(&program, &model.ready, &examples, 1)).1);
    let result = json!({
        "batch": args.batch, "runs": args.runs, "threads": rayon::current_num_threads(),
        "sixteen_bits": plain, "quantised": quantised,
        "less": 1.0 - quantised.median / plain.median, "bytes": bytes, "peak_bytes": peak,
    });
    cx.emit(&result, |_| {
        format!(
            "{} examples at once, {} runs, {} threads\n\
             16 bits:   median {:.3} ms, nine of ten within {:.3} ms\n\
             quantised: median {:.3} ms, nine of ten within {:.3} ms ({:.1} % less)\n\
             weights {bytes} bytes\n",
            args.batch,
            args.runs,
            rayon::current_num_threads(),
            1e3 * plain.median,
            1e3 * plain.p90,
            1e3 * quantised.median,
            1e3 * quantised.p90,
            100.0 * (1.0 - quantised.median / plain.median)
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// The network as it was, or a quantised one
    first: PathBuf,
    /// Folder of a quantised network
    second: PathBuf,
    /// Examples to run; with labels, also what each unit costs
    #[arg(long)]
    data: PathBuf,
    /// How many of them
    #[arg(long, default_value_t = 64)]
    count: usize,
    /// Folder for the report: layers.csv, layers.json, report.html and its plots
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    foreign: ForeignArgs,
}

pub(super) fn compare(args: &CompareArgs, cx: &Context) -> Result<()> {
    let begun = Instant::now();
    let second = Quantised::open(&args.second)?;
    let labelled = read_for(&second, &args.second, &args.data, true);
    let examples = match labelled {
        Ok(examples) => examples,
        Err(_) => read_for(&second, &args.second, &args.data, false)?,
    };
    let examples = examples.select(&(0..args.count.clamp(1, examples.len())).collect::<Vec<_>>());
    let (program, ready) = if store::is_quantised(&args.first) {
        let first = Quantised::open(&args.first)?;
        let ready = first.apart();
        (first.program, ready)
    } else {
        let model = ModelArgs { model: args.first.clone(), foreign: args.foreign.clone() };
        let mut program = Source::open(&model, cx)?.program;
        if second.config.rounding.equalise {
            program.equalise();
        }
        let ready = program.units.iter().map(Ready::float).collect();
        (program, ready)
    };
    let layers = Layers::compare(&program, &ready, &second, &examples, cx)?;
    if let Some(out) = &args.out {
        report::write(out, &layers, Vec::new(), begun.elapsed().as_secs_f64(), cx)?;
    }
    cx.emit(&layers, |layers| {
        let mut text = report::text(layers);
        if let Some(out) = &args.out {
            text += &format!("report in {}\n", out.display());
        }
        text
    })
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Folder of a quantised network
    #[arg(long)]
    model: PathBuf,
    /// .onnx file, or folder for a graph
    #[arg(long)]
    to: PathBuf,
    /// Examples at once
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// ONNX's set of operators: 21 stores weights of 4 bits in as many, 20 in bytes
    #[arg(long, value_enum, default_value = "20")]
    opset: Opset,
}

/// ONNX's sets of operators that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Opset {
    /// Integers of eight bits and more
    #[value(name = "20")]
    Twenty,
    /// Those of four bits too
    #[value(name = "21")]
    TwentyOne,
}

pub(super) fn export(args: &ExportArgs, cx: &Context) -> Result<()> {
    let model = Quantised::open(&args.model)?;
    write(&model, args.batch, args.opset, &args.to)?;
    let at = |bits: u8| model.pairs.iter().filter(|pair| pair.weight == bits).count();
    let result = json!({
        "to": args.to, "batch": args.batch, "units": model.pairs.len(), "at_8_bits": at(8), "at_4_bits": at(4),
    });
    cx.emit(&result, |_| {
        let four = match (at(4), args.opset) {
            (0, _) => String::new(),
            (count, Opset::Twenty) => {
                format!(", {count} at 4 bits (stored in bytes; --opset 21 stores half of that)")
            }
            (count, Opset::TwentyOne) => format!(", {count} at 4 bits"),
        };
        format!("{}: {} units, {} at 8 bits{four}\n", args.to.display(), model.pairs.len(), at(8))
    })
}

/// Writes a quantised network as an ONNX file, or as the folder of a graph.
pub(super) fn write(model: &Quantised, batch: usize, opset: Opset, to: &Path) -> Result<()> {
    if to.extension().is_some_and(|extension| extension == "onnx") {
        model.to_onnx(batch, opset == Opset::TwentyOne, to)
    } else if opset == Opset::TwentyOne {
        Err(Error::usage(format!("--opset 21 is for .onnx files, not for a graph in {}", to.display())))
    } else {
        model.to_graph(batch)?.save(to)
    }
}
