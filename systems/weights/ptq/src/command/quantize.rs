//! `kiln ptq quantize`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, ModelFolder, Plot, Result, write_atomic};
use serde::{Deserialize, Serialize};

use super::apply::{Opset, write};
use super::report;
use super::sensitivity::plots;
use super::source::{CalibArgs, ForeignArgs, ModelArgs, Source};
use super::{read_json, write_json};
use crate::latency::{Profile, measure};
use crate::layers::{Layer, Layers};
use crate::program::Program;
use crate::quantise::{Granularity, Metric, Part, QuantConfig, Quantiser, SearchPlan, sample, score};
use crate::ready::Ready;
use crate::search::{Augment, Bits, Order, Trials, Tried, pareto};
use crate::store::{self, Quantised};

/// Validation examples on which layers are compared in the end.
const EXPLAINED: usize = 64;

#[derive(Debug, Args)]
pub(super) struct QuantizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    calib: CalibArgs,
    /// Labelled examples on which the search is judged
    #[arg(long, value_name = "DATA")]
    valid: PathBuf,
    /// How many of them at most
    #[arg(long, default_value_t = 2000)]
    valid_count: usize,
    /// Least share of the metric that must remain
    #[arg(long, default_value_t = 0.999, conflicts_with = "max_drop")]
    target: f64,
    /// How much of the metric may be lost, in points: 0.1% or 0.001
    #[arg(long, value_parser = share)]
    max_drop: Option<f64>,
    /// Most bytes of the weights, instead: fewer bits for as few units as that needs, whatever the metric becomes
    #[arg(long, value_name = "BYTES", value_parser = bytes, conflicts_with_all = ["target", "max_drop"])]
    max_bytes: Option<usize>,
    /// What is measured
    #[arg(long, value_enum, default_value = "accuracy")]
    metric: Metric,
    /// Precisions that may be used
    #[arg(long, value_delimiter = ',', default_value = "16,8,4")]
    bits: Vec<u8>,
    /// By what units are ordered
    #[arg(long, value_enum, default_value = "augmented")]
    order: Order,
    /// Weight of the dependencies between units; 0 leaves curvature alone
    #[arg(long, default_value_t = 1.0)]
    lambda: f64,
    /// Which dependencies
    #[arg(long, value_enum, default_value = "pair+single")]
    augment: Augment,
    /// Divide scores by the time that fewer bits save, by the latency model
    #[arg(long)]
    per_gain: bool,
    /// A unit that must have so many bits: conv0=16, or one of its tensors: conv0.weight=8
    #[arg(long, value_name = "NAME=BITS")]
    pin: Vec<String>,
    /// Try the refused units one by one afterwards
    #[arg(long)]
    refine: bool,
    /// Constants of the latency model, as `profile` writes them; measured anew by default
    #[arg(long)]
    profile: Option<PathBuf>,
    /// Whether the network is also timed in the end, or only by the latency model
    #[arg(long, value_enum, default_value = "measured")]
    latency: Latency,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Write the quantised network as an .onnx file as well, or as a folder with a graph
    #[arg(long, value_name = "FILE.onnx|DIR")]
    export: Option<PathBuf>,
}

/// Where the time of one example comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Latency {
    /// Fifty runs, and the model
    Measured,
    /// The model alone
    Model,
}

/// `500000`, `500k` or `1.5M`.
fn bytes(text: &str) -> Result<usize, String> {
    let (number, unit) = match text.strip_suffix(['k', 'M', 'G']) {
        Some(number) => (number, [1e3, 1e6, 1e9]["kMG".find(&text[number.len()..]).unwrap_or(0)]),
        None => (text, 1.0),
    };
    match number.trim().parse::<f64>() {
        Ok(x) if x > 0.0 && x * unit < 1e15 => Ok((x * unit) as usize),
        _ => Err("must be a number of bytes such as 500000, 500k or 1.5M".into()),
    }
}

/// `0.1%` or `0.001`.
fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = match text.strip_suffix('%') {
        Some(number) => (number, 100.0),
        None => (text, 1.0),
    };
    match number.trim().parse::<f64>() {
        Ok(x) if (0.0..=1.0).contains(&(x / unit)) => Ok(x / unit),
        _ => Err("must be a share such as 0.1% or 0.001".into()),
    }
}

/// What decides a search, kept beside it so that it goes on only if nothing has changed.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct SearchRecipe {
    model: PathBuf,
    calib: PathBuf,
    valid: PathBuf,
    counts: [usize; 4],
    foreign: ForeignArgs,
    rounding: QuantConfig,
    pairs: bool,
    seed: u64,
    plan: SearchPlan,
}

pub(super) fn run(args: &QuantizeArgs, cx: &Context) -> Result<()> {
    let begun = Instant::now();
    args.calib.check()?;
    if !(args.target > 0.0 && args.target <= 1.0) {
        return Err(Error::usage(format!("--target {} is not above 0 and at most 1", args.target)));
    }
    if let Some(bits) = args.bits.iter().find(|bits| ![16, 8, 4].contains(*bits)) {
        return Err(Error::usage(format!("--bits {bits} is not one of 16, 8 and 4")));
    }
    let source = Source::open(&args.model, cx)?;
    let plan = SearchPlan {
        metric: args.metric,
        target: args.target,
        max_drop: args.max_drop,
        max_bytes: args.max_bytes,
        bits: args.bits.clone(),
        order: args.order,
        lambda: args.lambda,
        augment: args.augment,
        per_gain: args.per_gain,
        pinned: pinned(&args.pin, &source.program, args.calib.granularity)?,
        refine: args.refine,
        ..SearchPlan::default()
    };
    let recipe = SearchRecipe {
        model: args.model.model.clone(),
        calib: args.calib.calib.clone(),
        valid: args.valid.clone(),
        counts: [args.calib.calib_count, args.calib.examples, args.calib.probes, args.valid_count],
        foreign: args.model.foreign.clone(),
        rounding: args.calib.config(),
        pairs: !args.calib.no_pairs,
        seed: cx.seed,
        plan: plan.clone(),
    };
    let folder = ModelFolder::new(&args.out);
    let earlier = resumed(&folder, &recipe)?;
    let profile = match &args.profile {
        Some(path) => read_json(path, "the constants of a latency model")?,
        None => Profile::measure(),
    };
    let valid = source.read(&args.valid, true)?;
    let valid = valid.select(&sample(valid.len(), args.valid_count, "validation", cx));
    let (mut quantiser, sensitivities) = args.calib.measure(&source, Some(&valid), cx)?;
    quantiser.profile = Some(profile);
    quantiser.check_budget(&plan)?;
    folder.create()?;
    write_json(&folder.file("search.json"), &recipe)?;
    write_json(&folder.file("sensitivity.json"), &sensitivities)?;

    let mut log = String::from("bits,metric\n");
    earlier.iter().for_each(|tried| log += &trial_line(tried));
    let mut trials = Trials::resumed(earlier);
    let found = quantiser.search(&sensitivities, &valid, &plan, &mut trials, cx, |tried| {
        log += &trial_line(tried);
        write_atomic(&folder.file("search.csv"), log.as_bytes())
    })?;
    let metric = score(&quantiser.real_logits(&found.bits, &valid)?, &valid.labels, plan.metric);
    let config = store::config(
        &quantiser,
        &found,
        &plan,
        metric,
        (source.input, source.classes.clone(), source.white),
    );
    store::save(&folder, &quantiser, &found.bits, &config)?;
    if source.tokenizer.is_some() {
        let tokenizer = source.folder.join("tokenizer.json");
        let bytes = std::fs::read(&tokenizer).map_err(Error::io("read", &tokenizer))?;
        write_atomic(&folder.file("tokenizer.json"), &bytes)?;
    }
    let quantised = Quantised::open(&args.out)?;
    if let Some(to) = &args.export {
        write(&quantised, 1, Opset::Twenty, to)?;
    }
    let (shares, pairs) = plots(&sensitivities);
    shares.save(&folder.file("sensitivity.svg"))?;
    pairs.iter().try_for_each(|pairs| pairs.save(&folder.file("pairs.svg")))?;
    let front = write_front(&folder, &quantiser, &trials, &profile)?;
    // The network as equalised, so that both read the same in between.
    let ready: Vec<Ready> = quantiser.program.units.iter().map(Ready::float).collect();
    let some = valid.select(&(0..valid.len().min(EXPLAINED)).collect::<Vec<_>>());
    let layers = Layers::compare(&quantiser.program, &ready, &quantised, &some, cx)?;
    let drawn = [front, shares].into_iter().chain(pairs).collect();
    report::write(&args.out, &layers, drawn, begun.elapsed().as_secs_f64(), cx)?;

    let sixteen: Bits = vec![16; found.bits.len()];
    let timed = |bits: &Bits| measure(&quantiser.program, &quantiser.real(bits), &valid, 50);
    let measured_seconds = match args.latency {
        Latency::Measured => Some([timed(&sixteen)?.median, timed(&found.bits)?.median]),
        Latency::Model => None,
    };
    let (bytes, bytes_of_16) = quantiser.bytes(&found.bits);
    let result = QuantizeResult {
        out: args.out.clone(),
        units: found.bits.len(),
        by_tensor: args.calib.granularity == Granularity::Tensor,
        at_8_bits: found.bits.iter().filter(|&&bits| bits == 8).count(),
        at_4_bits: found.bits.iter().filter(|&&bits| bits == 4).count(),
        baseline: found.baseline,
        target: found.target,
        metric,
        evaluations: trials.tried.len(),
        measured_seconds,
        modelled_seconds: [&sixteen, &found.bits].map(|bits| quantiser.latency(&profile, bits)),
        bytes: [bytes_of_16, bytes],
        worst: layers.worst(3).into_iter().cloned().collect(),
        negative_traces: sensitivities.traces.iter().filter(|trace| trace.mean < 0.0).count(),
    };
    cx.emit(&result, QuantizeResult::to_text)
}

/// What `quantize` prints.
#[derive(Serialize)]
struct QuantizeResult {
    out: PathBuf,
    /// Units, or tensors where these have bits of their own.
    units: usize,
    by_tensor: bool,
    at_8_bits: usize,
    at_4_bits: usize,
    /// The metric of the network as it was.
    baseline: f64,
    /// What had to be reached; nothing within a budget of bytes.
    target: Option<f64>,
    /// The quantised network's, computed in whole numbers.
    metric: f64,
    evaluations: usize,
    /// Median of fifty runs with one example, at sixteen bits and quantised.
    measured_seconds: Option<[f64; 2]>,
    /// The same by the latency model.
    modelled_seconds: [f64; 2],
    /// At sixteen bits and quantised.
    bytes: [usize; 2],
    /// The units whose bits cost the most.
    worst: Vec<Layer>,
    /// Estimates of traces that were below 0 and count as 0.
    negative_traces: usize,
}

impl QuantizeResult {
    fn to_text(&self) -> String {
        let less = |[before, after]: [f64; 2]| 100.0 * (1.0 - after / before);
        let none = if self.at_8_bits + self.at_4_bits == 0 {
            "nothing needs fewer bits, or nothing can do with them: the network stays at 16 bits\n"
        } else {
            ""
        };
        let wanted = self.target.map_or(String::new(), |target| format!(", at least {target:.4}"));
        let time = match self.measured_seconds {
            Some([before, after]) => format!(
                "one example takes {:.3} ms instead of {:.3} ms at 16 bits ({:.1} % less; {:.1} % by the latency model)\n",
                1e3 * after,
                1e3 * before,
                less([before, after]),
                less(self.modelled_seconds)
            ),
            None => {
                format!("one example takes {:.1} % less by the latency model\n", less(self.modelled_seconds))
            }
        };
        format!(
            "{none}{} {}: {} at 8 bits, {} at 4, {} at 16, after {} evaluations\n\
             metric {:.4} (as it was {:.4}{wanted})\n{time}\
             weights {} bytes instead of {} ({:.1} % less)\n{}\
             quantised network in {}, with report.html\n",
            self.units,
            if self.by_tensor { "tensors" } else { "units" },
            self.at_8_bits,
            self.at_4_bits,
            self.units - self.at_8_bits - self.at_4_bits,
            self.evaluations,
            self.metric,
            self.baseline,
            self.bytes[1],
            self.bytes[0],
            less(self.bytes.map(|bytes| bytes as f64)),
            report::worst(&self.worst),
            self.out.display()
        )
    }
}

/// `conv0=16`, or `conv0.weight=8`.
fn pinned(pins: &[String], program: &Program, granularity: Granularity) -> Result<BTreeMap<usize, u8>> {
    let parts = Part::of(program, granularity);
    let mut pinned = BTreeMap::new();
    for pin in pins {
        let (name, bits) = pin
            .split_once('=')
            .and_then(|(name, bits)| {
                Some((name, bits.parse::<u8>().ok().filter(|b| [16, 8, 4].contains(b))?))
            })
            .ok_or_else(|| Error::usage(format!("--pin {pin} is not NAME=BITS with 16, 8 or 4 bits")))?;
        let named = |part: &Part| part.name == name || program.units[part.unit].name == name;
        pinned.extend(parts.iter().enumerate().filter(|(_, part)| named(part)).map(|(at, _)| (at, bits)));
        if !parts.iter().any(named) {
            let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
            return Err(Error::usage(format!("there is no unit \"{name}\""))
                .hint(format!("there are: {}", names.join(", "))));
        }
    }
    Ok(pinned)
}

/// One line of `search.csv`.
fn trial_line(tried: &Tried) -> String {
    let bits: Vec<String> = tried.bits.iter().map(u8::to_string).collect();
    format!("{},{}\n", bits.join(" "), tried.metric)
}

/// What an earlier search of the same kind has tried; an error where the folder holds another.
fn resumed(folder: &ModelFolder, recipe: &SearchRecipe) -> Result<Vec<Tried>> {
    if !folder.file("search.json").exists() {
        return Ok(Vec::new());
    }
    let earlier: SearchRecipe = read_json(&folder.file("search.json"), "the settings of a search")?;
    if earlier != *recipe {
        return Err(Error::usage(format!("{} holds a search with other settings", folder.path().display()))
            .hint("give the same options to go on with it, or choose another --out"));
    }
    let path = folder.file("search.csv");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(Vec::new()) };
    let line = |(number, line): (usize, &str)| {
        let parsed = line.split_once(',').and_then(|(bits, metric)| {
            let bits = bits.split(' ').map(|b| b.parse::<u8>().ok()).collect::<Option<Bits>>()?;
            Some(Tried { bits, metric: metric.trim().parse().ok()? })
        });
        parsed.ok_or_else(|| {
            Error::input(format!("{}, line {}", path.display(), number + 1), "is not bits and a metric")
                .hint("remove the file to search anew")
        })
    };
    text.lines().enumerate().skip(1).map(line).collect()
}

/// `pareto.csv` and its plot: every configuration that was tried, and those that no other beats.
fn write_front(
    folder: &ModelFolder,
    quantiser: &Quantiser,
    trials: &Trials,
    profile: &Profile,
) -> Result<Plot> {
    let points: Vec<(f64, f64)> =
        trials.tried.iter().map(|tried| (tried.metric, quantiser.latency(profile, &tried.bits))).collect();
    let front = pareto(&points);
    let mut text = String::from("metric,modelled_ms,bytes,on_front,bits\n");
    for (at, tried) in trials.tried.iter().enumerate() {
        let bits: Vec<String> = tried.bits.iter().map(u8::to_string).collect();
        let on = u8::from(front.contains(&at));
        let (bytes, _) = quantiser.bytes(&tried.bits);
        text += &format!("{},{},{bytes},{on},{}\n", tried.metric, 1e3 * points[at].1, bits.join(" "));
    }
    write_atomic(&folder.file("pareto.csv"), text.as_bytes())?;
    let milliseconds = |at: usize| (1e3 * points[at].1, points[at].0);
    let plot = Plot::points("Configurations that were tried", "modelled latency, ms", "metric")
        .series("tried", (0..points.len()).map(milliseconds).collect())
        .series("not beaten", front.into_iter().map(milliseconds).collect());
    plot.save(&folder.file("pareto.svg"))?;
    Ok(plot)
}
