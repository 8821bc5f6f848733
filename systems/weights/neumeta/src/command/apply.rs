//! Verbs that use a family or a network: `sample`, `eval`, `predict`, `generate` and `plot`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};
use kiln_core::{Context, Error, ModelFolder, Plot, Result, write_atomic};
use kiln_nn::likeliest;
use serde::Serialize;
use serde_json::json;

use super::{DataArgs, widths};
use crate::arch::Size;
use crate::checkpoint::{self, Labels, PlainConfig};
use crate::data::Samples;
use crate::family::Family;
use crate::inr::Inr;
use crate::network::{Plain, Trainable};
use crate::objective::{Goal, Run};
use crate::prune::{Importance, prune};
use crate::smooth::total_variation;
use crate::training::Recipe;

/// Most draws that weights are averaged over.
const MAX_DRAWS: usize = 100_000;

/// Which network of a family.
#[derive(Debug, Args)]
struct SizeArgs {
    /// Width of the network
    #[arg(long)]
    width: Option<usize>,
    /// Blocks of each stage of a residual network
    #[arg(long)]
    depth: Option<usize>,
    /// Cut larger kernels down to this extent
    #[arg(long)]
    kernel: Option<usize>,
    /// Sets of weights that are averaged, all but the first at coordinates moved by noise
    #[arg(long, default_value_t = 50)]
    draws: usize,
}

impl SizeArgs {
    fn size(&self, width: usize) -> Size {
        Size { width, depth: self.depth, kernel: self.kernel }
    }

    /// The network: of a family the one of this size, else the one in the folder.
    fn open(&self, model: &Path, cx: &Context) -> Result<(Plain, Labels)> {
        if is_plain(model)? {
            if self.width.is_some() || self.depth.is_some() || self.kernel.is_some() {
                return Err(Error::usage(format!(
                    "{} holds one network, whose size is its own",
                    model.display()
                ))
                .hint("leave --width, --depth and --kernel out, or name a family"));
            }
            return checkpoint::open_plain(model);
        }
        let width = self.width.ok_or_else(|| {
            Error::usage(format!("{} holds a family", model.display()))
                .hint("choose a network of it with --width")
        })?;
        let (family, inr, labels) = checkpoint::open_family(model, cx)?;
        Ok((self.sample(&family, &inr, width, cx)?, labels))
    }

    fn sample(&self, family: &Family, inr: &Inr, width: usize, cx: &Context) -> Result<Plain> {
        if self.draws > MAX_DRAWS {
            return Err(Error::usage(format!("--draws {} is beyond reason", self.draws))
                .hint(format!("at most {MAX_DRAWS}; 50 to 100 are enough")));
        }
        family.sample(inr, self.size(width), self.draws, cx)
    }
}

fn is_plain(model: &Path) -> Result<bool> {
    Ok(ModelFolder::new(model).config_value()?.get("inr").is_none())
}

fn score(plain: &Plain, samples: &Samples, cx: &Context) -> Result<f64> {
    let (built, parameters) = (plain.config.build(plain.size)?, plain.parameters(&cx.device));
    Run { goal: plain.config.goal, built: &built, parameters: &parameters, norms: &[] }.score(samples, cx)
}

fn numel(plain: &Plain) -> usize {
    plain.tensors.iter().map(Vec::len).sum()
}

#[derive(Debug, Args)]
pub(super) struct SampleArgs {
    /// Model folder of a family
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    size: SizeArgs,
    /// Choose the largest width whose network has at most so many parameters
    #[arg(long, conflicts_with = "width")]
    max_params: Option<usize>,
    /// Write a network for each of these widths, and a table of them
    #[arg(long, value_name = "WIDTHS", conflicts_with_all = ["width", "max_params"])]
    ladder: Option<String>,
    /// Pictures to measure a ladder with
    #[arg(long, requires = "ladder")]
    data: Option<PathBuf>,
    /// IDX file of their labels
    #[arg(long, requires = "data")]
    labels: Option<PathBuf>,
    /// CSV column of their labels
    #[arg(long, requires = "data")]
    target: Option<String>,
    /// Folder of their masks
    #[arg(long, requires = "data")]
    masks: Option<PathBuf>,
    /// Model folder to write, or a .safetensors, which gets its configuration beside it
    #[arg(long)]
    to: PathBuf,
}

/// One rung of a ladder.
#[derive(Serialize)]
struct Rung {
    width: usize,
    parameters: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
}

pub(super) fn sample(args: &SampleArgs, cx: &Context) -> Result<()> {
    let (family, inr, labels) = checkpoint::open_family(&args.model, cx)?;
    if let Some(ladder) = &args.ladder {
        return sample_ladder(args, &widths(ladder).map_err(Error::usage)?, (&family, &inr, &labels), cx);
    }
    let width = match (args.size.width, args.max_params) {
        (Some(width), _) => width,
        (None, Some(most)) => family.width_within(most, args.size.depth, args.size.kernel)?,
        (None, None) => {
            return Err(
                Error::usage("which network is not said").hint("give --width, --max-params or --ladder")
            );
        }
    };
    let plain = args.size.sample(&family, &inr, width, cx)?;
    match args.to.extension().is_some_and(|extension| extension == "safetensors") {
        false => checkpoint::save_plain(&args.to, &plain, &labels)?,
        true => {
            plain.to_file()?.write(&args.to)?;
            let config = PlainConfig { net: plain.config.clone(), size: plain.size, labels };
            let text = serde_json::to_vec_pretty(&config)
                .map_err(|e| Error::work("cannot write the configuration as JSON").caused_by(e))?;
            write_atomic(&args.to.with_extension("json"), &text)?;
        }
    }
    let result = json!({ "model": args.to, "width": width, "parameters": numel(&plain) });
    cx.emit(&result, |_| {
        format!("{} parameters, width {}, in {}\n", numel(&plain), plain.size, args.to.display())
    })
}

fn sample_ladder(
    args: &SampleArgs,
    ladder: &[usize],
    (family, inr, labels): (&Family, &Inr, &Labels),
    cx: &Context,
) -> Result<()> {
    let net = &family.config.net;
    let samples = match &args.data {
        None => None,
        Some(data) => {
            let data = DataArgs {
                data: data.clone(),
                labels: args.labels.clone(),
                target: args.target.clone(),
                masks: args.masks.clone(),
            };
            Some(data.read(net.goal, Some((net, labels)), false)?)
        }
    };
    for &width in ladder {
        family.check(args.size.size(width), cx)?;
    }
    let mut rungs = Vec::new();
    let mut table = format!("width,parameters,{}\n", net.goal.metric());
    for &width in ladder {
        let plain = args.size.sample(family, inr, width, cx)?;
        checkpoint::save_plain(&args.to.join(format!("w{width}")), &plain, labels)?;
        let score = samples.as_ref().map(|samples| score(&plain, samples, cx)).transpose()?;
        let rung = Rung { width, parameters: numel(&plain), score };
        table += &format!("{width},{},{}\n", rung.parameters, score.map_or(String::new(), |s| s.to_string()));
        rungs.push(rung);
    }
    write_atomic(&args.to.join("ladder.csv"), table.as_bytes())?;
    cx.emit(&rungs, |rungs| {
        let mut text = format!("width  parameters  {}\n", net.goal.metric());
        for rung in rungs {
            let score = rung.score.map_or("–".into(), |score| format!("{score:.4}"));
            text += &format!("{:>5}  {:>10}  {score}\n", rung.width, rung.parameters);
        }
        text + &format!("networks and table in {}\n", args.to.display())
    })
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Model folder of a family or of a plain network
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Widths, as 8,12,16 or 8-16; all of those that are trained and those between [default: all]
    #[arg(long, value_name = "WIDTHS")]
    widths: Option<String>,
    /// Depth, kernel and draws, and a width where there is but one
    #[command(flatten)]
    size: SizeArgs,
    /// Also prune the full network to each width: by L1, L2 and at random, and by Taylor with --train-data
    #[arg(long)]
    baselines: bool,
    /// Pictures that baselines may learn from, in the format of --data
    #[arg(long)]
    train_data: Option<PathBuf>,
    /// Their masks
    #[arg(long, requires = "train_data")]
    train_masks: Option<PathBuf>,
    /// Also tune pruned networks for so many steps
    #[arg(long, requires = "train_data")]
    tune_steps: Option<usize>,
    /// Also train a network of each width on its own, for so many steps
    #[arg(long, requires = "train_data")]
    own_steps: Option<usize>,
    /// Learning rate of tuning; networks of their own take three times as much
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// CSV file to write; a plot goes beside it
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Scores of one line of the table, in the order of the widths.
#[derive(Serialize)]
struct Line {
    name: String,
    /// None where there is no such network.
    scores: Vec<Option<f64>>,
}

pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    if is_plain(&args.model)? {
        return eval_plain(args, cx);
    }
    let (family, inr, labels) = checkpoint::open_family(&args.model, cx)?;
    let net = &family.config.net;
    let (least, full) = (family.config.widths[0], family.config.full);
    let chosen = match (args.widths.as_deref(), args.size.width) {
        (Some("all") | None, None) => (least..=full).collect(),
        (Some(text), _) => widths(text).map_err(Error::usage)?,
        (None, Some(width)) => vec![width],
    };
    for &width in &chosen {
        family.check(args.size.size(width), cx)?;
    }
    let samples = args.data.read(net.goal, Some((net, &labels)), false)?;
    let training = match &args.train_data {
        None => None,
        Some(data) => {
            let data = DataArgs {
                data: data.clone(),
                labels: None,
                target: args.data.target.clone(),
                masks: args.train_masks.clone(),
            };
            Some(data.read(net.goal, Some((net, &labels)), false)?)
        }
    };
    let bar = cx.progress(chosen.len() as u64, "measuring");
    let mut ours = Vec::new();
    for &width in &chosen {
        ours.push(Some(score(&args.size.sample(&family, &inr, width, cx)?, &samples, cx)?));
        bar.inc(1);
    }
    let mut lines = vec![Line { name: "family".into(), scores: ours }];
    if args.baselines || training.is_some() {
        lines.extend(baselines(args, &family, &chosen, &samples, training.as_ref(), cx)?);
    }
    if let Some(out) = &args.out {
        write_lines(out, net.goal, &chosen, &family.config.widths, &lines)?;
    }
    let full_score = score(&family.base, &samples, cx)?;
    let result = json!({
        "metric": net.goal.metric(), "pictures": samples.len(), "full_network": full_score, "widths": chosen,
        "trained_widths": family.config.widths, "lines": lines,
    });
    cx.emit(&result, |_| {
        let mut text =
            format!("{}; of the network it was made from {full_score:.4}\nwidth", net.goal.metric());
        lines.iter().for_each(|line| text += &format!("  {}", line.name));
        for (place, &width) in chosen.iter().enumerate() {
            let seen = if family.config.widths.contains(&width) { "" } else { "  (never trained)" };
            text += &format!("\n{width:>5}");
            for line in &lines {
                let cell = line.scores[place].map_or("–".into(), |score| format!("{score:.4}"));
                text += &format!("  {cell:>0$}", line.name.len().max(6));
            }
            text += seen;
        }
        text + "\n"
    })
}

fn eval_plain(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (plain, labels) = args.size.open(&args.model, cx)?;
    let samples = args.data.read(plain.config.goal, Some((&plain.config, &labels)), false)?;
    let score = score(&plain, &samples, cx)?;
    let metric = plain.config.goal.metric();
    let result =
        json!({ "metric": metric, "pictures": samples.len(), "parameters": numel(&plain), "score": score });
    cx.emit(&result, |_| {
        format!("{metric} {score:.4} on {} pictures, {} parameters\n", samples.len(), numel(&plain))
    })
}

/// Pruned networks, and those trained for their width.
fn baselines(
    args: &EvalArgs,
    family: &Family,
    chosen: &[usize],
    samples: &Samples,
    training: Option<&Samples>,
    cx: &Context,
) -> Result<Vec<Line>> {
    let net = &family.config.net;
    let recipe = |steps, lr| Recipe { steps, lr, batch: 64 };
    let within = |width: &usize| *width <= family.config.full;
    let mut lines = Vec::new();
    for importance in Importance::ALL {
        if importance == Importance::Taylor && training.is_none() {
            continue;
        }
        let (mut pruned, mut tuned) = (Vec::new(), Vec::new());
        for &width in chosen {
            if !within(&width) {
                pruned.push(None);
                tuned.push(None);
                continue;
            }
            let small = prune(&family.base, width, importance, training.unwrap_or(samples), cx)?;
            pruned.push(Some(score(&small, samples, cx)?));
            if let (Some(steps), Some(training)) = (args.tune_steps, training) {
                let model = Trainable::from_plain(&small, &cx.device);
                let data = (training, training);
                let small = recipe(steps, args.lr).continue_from(model, net, small.size, data, cx)?;
                tuned.push(Some(score(&small, samples, cx)?));
            }
        }
        lines.push(Line { name: format!("pruned by {}", importance.name()), scores: pruned });
        if args.tune_steps.is_some() && training.is_some() {
            lines.push(Line { name: format!("pruned by {} and tuned", importance.name()), scores: tuned });
        }
    }
    if let (Some(steps), Some(training)) = (args.own_steps, training) {
        let own = |&width: &usize| {
            let data = (training, training);
            let plain = recipe(steps, 3.0 * args.lr).train(net, Size::new(width), data, cx)?;
            score(&plain, samples, cx).map(Some)
        };
        let scores = chosen.iter().map(own).collect::<Result<_>>()?;
        lines.push(Line { name: "trained for its width".into(), scores });
    }
    Ok(lines)
}

fn write_lines(out: &Path, goal: Goal, chosen: &[usize], trained: &[usize], lines: &[Line]) -> Result<()> {
    let names: Vec<&str> = lines.iter().map(|line| line.name.as_str()).collect();
    let mut text = format!("width,trained,{}\n", names.join(","));
    for (place, width) in chosen.iter().enumerate() {
        let cells: Vec<String> = lines
            .iter()
            .map(|line| line.scores[place].map_or(String::new(), |score| score.to_string()))
            .collect();
        text += &format!("{width},{},{}\n", trained.contains(width), cells.join(","));
    }
    write_atomic(out, text.as_bytes())?;
    let plot = Plot::lines(format!("{} over the width", goal.metric()), "width", goal.metric());
    let points = |line: &Line| {
        chosen.iter().zip(&line.scores).filter_map(|(&w, score)| Some((w as f64, (*score)?))).collect()
    };
    // Six lines can be told apart; all of them are in the table.
    let drawn = lines.iter().filter(|line| !["L2", "random"].iter().any(|word| line.name.contains(word)));
    let plot = drawn.fold(plot, |plot, line| plot.series(line.name.clone(), points(line)));
    plot.save(&out.with_extension("svg"))
}

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Model folder of a family or of a plain network
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    size: SizeArgs,
    #[command(flatten)]
    data: DataArgs,
    /// CSV file to write: row, pred, and a probability for each class; otherwise a folder of PNG files
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (plain, labels) = args.size.open(&args.model, cx)?;
    let net = &plain.config;
    let samples = args.data.read(net.goal, Some((net, &labels)), true)?;
    let (built, parameters) = (net.build(plain.size)?, plain.parameters(&cx.device));
    let run = Run { goal: net.goal, built: &built, parameters: &parameters, norms: &[] };
    let found = run.predict(&samples, cx)?;
    match net.goal {
        Goal::Classify => write_classes(&args.out, &found, &labels.class_names)?,
        Goal::Segment => {
            let mask = |row: &Vec<f32>| {
                row.chunks(net.classes).map(|pixel| likeliest(pixel) as f32 / 255.0).collect()
            };
            let masks: Vec<Vec<f32>> = found.iter().map(mask).collect();
            write_pictures(&args.out, &masks, [1, net.image[1], net.image[2]])?;
        }
        Goal::Generate => write_pictures(&args.out, &found, net.image)?,
    }
    let result = json!({ "out": args.out, "rows": found.len() });
    cx.emit(&result, |_| format!("{} predictions in {}\n", found.len(), args.out.display()))
}

fn write_classes(out: &Path, rows: &[Vec<f32>], classes: &[String]) -> Result<()> {
    let failed = |e: csv::Error| Error::work(format!("cannot write {}", out.display())).caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let head = ["row".to_string(), "pred".to_string()];
    writer
        .write_record(head.into_iter().chain(classes.iter().map(|class| format!("p_{class}"))))
        .map_err(failed)?;
    for (number, row) in rows.iter().enumerate() {
        let first = [(number + 1).to_string(), classes[likeliest(row)].clone()];
        writer.write_record(first.into_iter().chain(row.iter().map(f32::to_string))).map_err(failed)?;
    }
    let text = writer
        .into_inner()
        .map_err(|e| Error::work(format!("cannot write {}", out.display())).caused_by(e.into_error()))?;
    write_atomic(out, &text)
}

/// Writes pictures as `0001.png`, `0002.png`, …
fn write_pictures(folder: &Path, pictures: &[Vec<f32>], shape: [usize; 3]) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for (number, picture) in pictures.iter().enumerate() {
        write_atomic(&folder.join(format!("{:04}.png", number + 1)), &png(picture, shape)?)?;
    }
    Ok(())
}

/// A picture `[channels, height, width]` of brightness 0 to 1 as a PNG file.
fn png(picture: &[f32], [channels, height, width]: [usize; 3]) -> Result<Vec<u8>> {
    let byte = |x: f32| (x.clamp(0.0, 1.0) * 255.0).round() as u8;
    let at =
        |channel: usize, x: u32, y: u32| byte(picture[(channel * height + y as usize) * width + x as usize]);
    let (wide, tall) = (width as u32, height as u32);
    let picture: DynamicImage = match channels {
        3 => RgbImage::from_fn(wide, tall, |x, y| image::Rgb([0, 1, 2].map(|channel| at(channel, x, y))))
            .into(),
        _ => GrayImage::from_fn(wide, tall, |x, y| image::Luma([at(0, x, y)])).into(),
    };
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|e| Error::work("cannot write a picture as PNG").caused_by(e))?;
    Ok(bytes.into_inner())
}

/// Pictures side by side in rows of `columns`, with a line of black between them.
fn sheet(
    pictures: &[Vec<f32>],
    [channels, height, width]: [usize; 3],
    columns: usize,
) -> (Vec<f32>, [usize; 3]) {
    let rows = pictures.len().div_ceil(columns);
    let (tall, wide) = (rows * (height + 1) + 1, columns * (width + 1) + 1);
    let mut sheet = vec![0.0; channels * tall * wide];
    for (number, picture) in pictures.iter().enumerate() {
        let (top, left) = (1 + number / columns * (height + 1), 1 + number % columns * (width + 1));
        for (line, row) in picture.chunks(width).enumerate() {
            let (channel, y) = (line / height, line % height);
            sheet[(channel * tall + top + y) * wide + left..][..width].copy_from_slice(row);
        }
    }
    (sheet, [channels, tall, wide])
}

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// Model folder of a family or of a plain network that generates
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    size: SizeArgs,
    /// Pictures to draw
    #[arg(long, default_value_t = 64)]
    n: usize,
    /// PNG file to write
    #[arg(long)]
    to: PathBuf,
}

pub(super) fn generate(args: &GenerateArgs, cx: &Context) -> Result<()> {
    /// Most pictures of a sheet.
    const MOST: usize = 4096;
    if !(1..=MOST).contains(&args.n) {
        return Err(
            Error::usage(format!("--n {} makes no sheet", args.n)).hint(format!("ask for 1 to {MOST}"))
        );
    }
    let (plain, _) = args.size.open(&args.model, cx)?;
    let (built, parameters) = (plain.config.build(plain.size)?, plain.parameters(&cx.device));
    let run = Run { goal: plain.config.goal, built: &built, parameters: &parameters, norms: &[] };
    let pictures = run.generate(args.n, &cx.device, &mut cx.rng("generate", 0))?;
    let columns = (args.n as f64).sqrt().ceil() as usize;
    let (sheet, shape) = sheet(&pictures, plain.config.image, columns);
    write_atomic(&args.to, &png(&sheet, shape)?)?;
    let result = json!({ "to": args.to, "pictures": args.n });
    cx.emit(&result, |_| format!("{} pictures in {}\n", args.n, args.to.display()))
}

#[derive(Debug, Args)]
pub(super) struct PlotArgs {
    /// Model folder of a family
    #[arg(long)]
    model: PathBuf,
    /// Tensor to show
    #[arg(long)]
    tensor: String,
    /// Widths, as 8,12,16 or 8-16 [default: those that are trained]
    #[arg(long, value_name = "WIDTHS")]
    widths: Option<String>,
    /// Sets of weights that are averaged
    #[arg(long, default_value_t = 1)]
    draws: usize,
    /// Folder to write
    #[arg(long)]
    to: PathBuf,
}

/// What `plot` prints.
#[derive(Serialize)]
struct PlotResult {
    to: PathBuf,
    widths: Vec<usize>,
    /// Total variation of the tensor for each number of its weights, at each width.
    variation: Vec<f64>,
}

pub(super) fn plot(args: &PlotArgs, cx: &Context) -> Result<()> {
    let (family, inr, _) = checkpoint::open_family(&args.model, cx)?;
    let net = &family.config.net;
    let chosen = match &args.widths {
        Some(text) => widths(text).map_err(Error::usage)?,
        None => family.config.widths.clone(),
    };
    let names: Vec<String> =
        net.build(family.full())?.graph.tensors().into_iter().map(|spec| spec.name).collect();
    let index = names.iter().position(|name| *name == args.tensor).ok_or_else(|| {
        Error::usage(format!("the network has no tensor \"{}\"", args.tensor))
            .hint(format!("it has {}", names.join(", ")))
    })?;
    let mut panels = Vec::new();
    let mut variation = Vec::new();
    for &width in &chosen {
        let plain = family.sample(&inr, Size::new(width), args.draws, cx)?;
        let spec = net.build(plain.size)?.graph.tensors().swap_remove(index);
        let values = &plain.tensors[index];
        variation.push(total_variation(&spec, values) / values.len() as f64);
        panels.push((spec.extents(), values.clone()));
    }
    fs::create_dir_all(&args.to).map_err(Error::io("create", &args.to))?;
    let (picture, shape) = weight_panels(&panels);
    let stem = args.tensor.replace(['.', '/'], "-");
    write_atomic(&args.to.join(format!("{stem}.png")), &png(&picture, shape)?)?;
    Plot::lines(format!("Smoothness of {}", args.tensor), "width", "total variation a weight")
        .series(
            args.tensor.clone(),
            chosen.iter().zip(&variation).map(|(&width, &variation)| (width as f64, variation)).collect(),
        )
        .save(&args.to.join(format!("{stem}-variation.svg")))?;
    let result = PlotResult { to: args.to.clone(), widths: chosen, variation };
    cx.emit(&result, |PlotResult { to, widths, variation }| {
        let mut text = String::from("width  total variation a weight\n");
        for (width, variation) in widths.iter().zip(variation) {
            text += &format!("{width:>5}  {variation:.5}\n");
        }
        text + &format!("weights, widths from left to right, in {}\n", to.display())
    })
}

/// One panel a width, outputs down and inputs across, the kernel's middle as brightness: grey is 0, white the largest
/// weight and black its opposite. Weights are squares of several pixels.
fn weight_panels(panels: &[([usize; 3], Vec<f32>)]) -> (Vec<f32>, [usize; 3]) {
    const SQUARE: usize = 6;
    const GAP: usize = 8;
    let middle = |([_, _, taps], values): &([usize; 3], Vec<f32>)| -> Vec<f32> {
        values.iter().skip(taps / 2).step_by(*taps).copied().collect()
    };
    let largest = panels.iter().flat_map(&middle).fold(f32::MIN_POSITIVE, |a, w| a.max(w.abs()));
    let tall = GAP * 2 + SQUARE * panels.iter().map(|(extents, _)| extents[0]).max().unwrap_or(0);
    let wide = GAP + panels.iter().map(|(extents, _)| extents[1] * SQUARE + GAP).sum::<usize>();
    let mut picture = vec![0.25; tall * wide];
    let mut left = GAP;
    for panel in panels {
        let [outputs, inputs, _] = panel.0;
        let weights = middle(panel);
        for y in 0..outputs * SQUARE {
            for x in 0..inputs * SQUARE {
                let weight = weights[y / SQUARE * inputs + x / SQUARE];
                picture[(GAP + y) * wide + left + x] = 0.5 + 0.5 * weight / largest;
            }
        }
        left += inputs * SQUARE + GAP;
    }
    (picture, [1, tall, wide])
}
