//! The verb `eval`: a family over widths, depths and kernels, beside pruning and networks of their own.

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use serde::Serialize;
use serde_json::json;

use super::apply::{SizeArgs, is_plain, numel, score};
use super::{DataArgs, numbers, widths};
use crate::arch::Size;
use crate::checkpoint;
use crate::data::Samples;
use crate::family::Family;
use crate::network::Trainable;
use crate::objective::Goal;
use crate::prune::{Importance, cut, prune};
use crate::training::Recipe;

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
    /// Kernel sizes, as 1,3,5: each gets lines of its own; all of those that are trained
    #[arg(long, value_name = "KERNELS", conflicts_with = "kernel")]
    kernels: Option<String>,
    /// Depths, as 1,2,3: likewise
    #[arg(long, value_name = "DEPTHS", conflicts_with = "depth")]
    depths: Option<String>,
    /// Draws, and width, depth or kernel where there is but one
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

/// What lines of the family's own networks are called.
const FAMILY: &str = "family";

/// Scores of one line of the table, in the order of the widths.
#[derive(Serialize)]
struct Line {
    name: String,
    /// Blocks of each stage; none where all are there.
    #[serde(skip_serializing_if = "Option::is_none")]
    depth: Option<usize>,
    /// Extent that kernels are cut down to; none where they are whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<usize>,
    /// None where there is no such network.
    scores: Vec<Option<f64>>,
}

impl Line {
    fn is_family(&self) -> bool {
        self.name.starts_with(FAMILY)
    }
}

/// Networks of all widths with one depth and one kernel.
#[derive(Clone, Copy)]
struct Variant {
    depth: Option<usize>,
    kernel: Option<usize>,
}

impl Variant {
    fn size(self, width: usize) -> Size {
        Size { width, depth: self.depth, kernel: self.kernel }
    }

    fn line(self, name: &str, scores: Vec<Option<f64>>) -> Line {
        let Self { depth, kernel } = self;
        let mut name = name.to_string();
        name += &depth.map_or(String::new(), |depth| format!(" depth {depth}"));
        name += &kernel.map_or(String::new(), |kernel| format!(" kernel {kernel}"));
        Line { name, depth, kernel, scores }
    }
}

impl EvalArgs {
    /// Every depth with every kernel that was asked for.
    fn variants(&self, family: &Family) -> Result<Vec<Variant>> {
        let chosen = |text: Option<&str>, one: Option<usize>, trained: &[usize], what: &str| {
            let found = match text {
                None => return Ok(vec![one]),
                Some("all") if trained.is_empty() => {
                    return Err(Error::usage(format!("the family was trained at its own {what} only"))
                        .hint(format!("name them, as --{what} 1,3")));
                }
                Some("all") => trained.to_vec(),
                Some(text) => numbers(text, what).map_err(Error::usage)?,
            };
            Ok(found.into_iter().map(Some).collect())
        };
        let config = &family.config;
        let depths = chosen(self.depths.as_deref(), self.size.depth, &config.depths, "depths")?;
        let kernels = chosen(self.kernels.as_deref(), self.size.kernel, &config.kernels, "kernels")?;
        let with = |&depth: &Option<usize>| {
            kernels.iter().map(move |&kernel| Variant { depth, kernel }).collect::<Vec<_>>()
        };
        Ok(depths.iter().flat_map(with).collect())
    }
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
    let variants = args.variants(&family)?;
    for variant in &variants {
        net.build(variant.size(family.config.full))?;
    }
    for &width in &chosen {
        family.check(variants[0].size(width), cx)?;
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
    let bar = cx.progress((variants.len() * chosen.len()) as u64, "measuring");
    let mut lines = Vec::new();
    for &variant in &variants {
        let mut ours = Vec::new();
        for &width in &chosen {
            let size =
                SizeArgs { width: Some(width), depth: variant.depth, kernel: variant.kernel, ..args.size };
            ours.push(Some(score(&size.sample(&family, &inr, width, cx)?, &samples, cx)?));
            bar.inc(1);
        }
        lines.push(variant.line(FAMILY, ours));
    }
    if args.baselines || training.is_some() {
        for &variant in &variants {
            lines.extend(baselines(args, &family, &chosen, variant, (&samples, training.as_ref()), cx)?);
        }
    }
    if let Some(out) = &args.out {
        write_lines(out, net.goal, &chosen, &family.config.widths, &lines)?;
        if variants.iter().filter_map(|variant| variant.kernel).count() > 1 && args.depths.is_none() {
            plot_kernels(&kernels_beside(out), net.goal, &chosen, &lines)?;
        }
    }
    let full_score = score(&family.base, &samples, cx)?;
    let result = json!({
        "metric": net.goal.metric(), "pictures": samples.len(), "full_network": full_score, "widths": chosen,
        "trained_widths": family.config.widths, "trained_kernels": family.config.kernels,
        "trained_depths": family.config.depths, "lines": lines,
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
    variant: Variant,
    (samples, training): (&Samples, Option<&Samples>),
    cx: &Context,
) -> Result<Vec<Line>> {
    let net = &family.config.net;
    let recipe = |steps, lr| Recipe { steps, lr, batch: 64 };
    let within = |width: &usize| *width <= family.config.full;
    let mut lines = Vec::new();
    // Pruning takes channels, and cutting the borders of kernels; whole blocks are left out by neither.
    let pruned = if variant.depth.is_none() { &Importance::ALL[..] } else { &[] };
    for &importance in pruned {
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
            let small = variant.kernel.map_or(Ok(small.clone()), |kernel| cut(&small, kernel))?;
            pruned.push(Some(score(&small, samples, cx)?));
            if let (Some(steps), Some(training)) = (args.tune_steps, training) {
                let model = Trainable::from_plain(&small, &cx.device);
                let data = (training, training);
                let small = recipe(steps, args.lr).continue_from(model, net, small.size, data, cx)?;
                tuned.push(Some(score(&small, samples, cx)?));
            }
        }
        lines.push(variant.line(&format!("pruned by {}", importance.name()), pruned));
        if args.tune_steps.is_some() && training.is_some() {
            lines.push(variant.line(&format!("pruned by {} and tuned", importance.name()), tuned));
        }
    }
    if let (Some(steps), Some(training)) = (args.own_steps, training) {
        let own = |&width: &usize| {
            let data = (training, training);
            let size = net.plainly(variant.size(width));
            let plain = recipe(steps, 3.0 * args.lr).train(net, size, data, cx)?;
            score(&plain, samples, cx).map(Some)
        };
        let scores = chosen.iter().map(own).collect::<Result<_>>()?;
        lines.push(variant.line("trained for its width", scores));
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
    let families = lines.iter().filter(|line| line.is_family()).count();
    let drawn = lines.iter().filter(|line| match families {
        1 => !["L2", "random"].iter().any(|word| line.name.contains(word)),
        _ => line.is_family(),
    });
    let plot = drawn.fold(plot, |plot, line| plot.series(line.name.clone(), points(line)));
    plot.save(&out.with_extension("svg"))
}

/// Where the plot over kernels goes: `widths-kernels.svg` beside `widths.csv`.
fn kernels_beside(out: &Path) -> PathBuf {
    let stem = out.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    out.with_file_name(format!("{stem}-kernels.svg"))
}

/// The family over the extent of its kernels, a line for each of at most six widths.
fn plot_kernels(path: &Path, goal: Goal, chosen: &[usize], lines: &[Line]) -> Result<()> {
    const MOST: usize = 6;
    let title = format!("{} over the kernel", goal.metric());
    let mut plot = Plot::lines(title, "extent of kernels", goal.metric());
    let places = 0..chosen.len();
    for place in places.step_by(chosen.len().div_ceil(MOST)) {
        let point = |line: &Line| Some((line.kernel? as f64, line.scores[place]?));
        let ours = lines.iter().filter(|line| line.is_family());
        plot = plot.series(format!("width {}", chosen[place]), ours.filter_map(point).collect());
    }
    plot.save(path)
}
