//! The verbs of `kiln neumeta`.

mod apply;
mod eval;
mod learn;
mod plot;
mod tools;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kiln_core::{Context, Error, Result};
use kiln_data::{ImageOptions, Images};

use crate::arch::NetConfig;
use crate::checkpoint::Labels;
use crate::data::Samples;
use crate::objective::Goal;

/// `kiln neumeta …`
#[derive(Debug, Parser)]
#[command(name = "neumeta", about = "One implicit function that writes a network of any width")]
#[command(after_help = "Examples:
  kiln neumeta pretrain --data digits.csv --arch small --width 16 --out full/
  kiln neumeta train --base full/ --data digits.csv --widths 4-16 --hidden 64 --num-freqs 4 --out family/
  kiln neumeta eval --model family/ --data test.csv --widths all --out widths.csv
  kiln neumeta sample --model family/ --width 9 --to small/")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train the full network
    #[command(after_help = "Examples:
  kiln neumeta pretrain --data digits.csv --arch small --width 16 --out full/
  kiln neumeta pretrain --data photos/ --arch resnet20 --width 64 --out full/
  kiln neumeta pretrain --task segment --data pictures/ --masks masks/ --width 16 --out full/
  kiln neumeta pretrain --task generate --data t10k-images-idx3-ubyte.gz --out full/
  kiln neumeta pretrain --data digits.csv --resume full/      after Ctrl-C or a crash
Batch norms are folded into the weights at the end.")]
    Pretrain(learn::PretrainArgs),
    /// Put a network's channels into an order in which neighbours are alike; its outputs stay the same
    #[command(after_help = "Examples:
  kiln neumeta smooth --weights full/ --to ordered/
  kiln neumeta smooth --weights l.safetensors --arch lenet --width 32 --image 1x28x28 --classes 10 --to o.safetensors
Tensors are called as `kiln neumeta pretrain` calls them; a batch norm after a layer is <layer>.norm.weight, .bias,
.running_mean and .running_var, and is folded.")]
    Smooth(learn::SmoothArgs),
    /// Train the implicit function of a family around a trained network
    #[command(after_help = "Examples:
  kiln neumeta train --base full/ --data digits.csv --widths 4-16 --hidden 64 --num-freqs 4 --out family/
  kiln neumeta train --base full/ --data d.csv --widths 4-16 --base-term none --warm-steps 2000 --steps 9000 --out f/
  kiln neumeta train --base full/ --data d.csv --widths 4-16 --kernels 1,3,5 --hidden 64 --num-freqs 4 --out f/
  kiln neumeta train --data digits.csv --resume family/      after Ctrl-C or a crash")]
    Train(learn::TrainArgs),
    /// Write the network of one size, or a ladder of sizes, as ordinary model folders
    #[command(after_help = "Examples:
  kiln neumeta sample --model family/ --width 9 --to small/
  kiln neumeta sample --model family/ --max-params 20000 --to small.safetensors
  kiln neumeta sample --model family/ --ladder 4,8,12,16 --data test.csv --to ladder/")]
    Sample(apply::SampleArgs),
    /// Measure a family over its widths, beside pruning and networks of their own
    #[command(after_help = "Examples:
  kiln neumeta eval --model family/ --data test.csv --widths all --out widths.csv
  kiln neumeta eval --model family/ --data test.csv --widths 4,8,16 --baselines --train-data train.csv --tune-steps 50
  kiln neumeta eval --model family/ --data test.csv --widths 4,8,16 --kernels 1,3,5 --out sizes.csv
  kiln neumeta eval --model small/ --data test.csv
The plot is written beside the table, as .svg; with several kernels a second one over them, as -kernels.svg.")]
    Eval(eval::EvalArgs),
    /// Classify, segment or reconstruct pictures
    #[command(after_help = "Examples:
  kiln neumeta predict --model family/ --width 9 --data new.csv --out classes.csv
  kiln neumeta predict --model family/ --width 9 --data pictures/ --out masks/        for segmentation
  kiln neumeta predict --model small/ --data new.csv --out classes.csv")]
    Predict(apply::PredictArgs),
    /// Draw new pictures
    #[command(after_help = "Examples:
  kiln neumeta generate --model family/ --width 9 --n 64 --to sheet.png")]
    Generate(apply::GenerateArgs),
    /// Show the weights of a tensor over widths, and how smooth they are
    #[command(after_help = "Examples:
  kiln neumeta plot --model family/ --tensor conv2.weight --widths 4,8,12,16 --to plots/
  kiln neumeta plot --model family/ --tensor conv2.weight --widths 4,8 --kernels 1,3,5 --to plots/")]
    Plot(plot::PlotArgs),
    /// Find the shortest path through cities
    #[command(after_help = "Examples:
  kiln neumeta shp --cities cities.csv --metric l1 --to path.csv
  kiln neumeta shp --cities weights.safetensors:conv1.weight
  kiln neumeta shp --cities distances.csv --metric table")]
    Shp(tools::ShpArgs),
    /// Run an implicit function on prepared tensors
    #[command(after_help = "Examples:
  kiln neumeta forward --weights inr.safetensors --config config.json --to out.safetensors
The weights are inr.L.in, inr.L.res0, .. and inr.L.out, each .weight [out, in] and .bias, inr.L.res0.scale, .. and x.")]
    Forward(tools::ForwardArgs),
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Pretrain(args) => learn::pretrain(args, cx),
            Verb::Smooth(args) => learn::smooth(&args, cx),
            Verb::Train(args) => learn::train(args, cx),
            Verb::Sample(args) => apply::sample(&args, cx),
            Verb::Eval(args) => eval::eval(&args, cx),
            Verb::Predict(args) => apply::predict(&args, cx),
            Verb::Generate(args) => apply::generate(&args, cx),
            Verb::Plot(args) => plot::plot(&args, cx),
            Verb::Shp(args) => tools::shp(&args, cx),
            Verb::Forward(args) => tools::forward(&args, cx),
        }
    }
}

/// The pictures to work on.
#[derive(Debug, Args)]
struct DataArgs {
    /// Pictures: a folder with one folder a class, IDX, .npz, .npy or .csv; a plain folder where no classes are needed
    #[arg(long)]
    data: PathBuf,
    /// File of labels of IDX or .npy pictures, where it is not beside them
    #[arg(long)]
    labels: Option<PathBuf>,
    /// CSV column of labels; by default the last
    #[arg(long)]
    target: Option<String>,
    /// Folder of masks to segment with: PNG files called as the pictures, each pixel the number of its class
    #[arg(long)]
    masks: Option<PathBuf>,
}

impl DataArgs {
    /// Pictures with what the goal needs to know about them; `known` are the classes of a trained model, and `blind`
    /// says that truth is not needed.
    fn read(&self, goal: Goal, known: Option<(&NetConfig, &Labels)>, blind: bool) -> Result<Samples> {
        let unlabelled = blind || goal != Goal::Classify;
        let options = ImageOptions {
            labels: self.labels.clone(),
            target: self.target.clone(),
            white: known.map(|(_, labels)| labels.white),
            unlabelled,
        };
        let mut images = Images::read(&self.data, &options)?;
        if let Some((net, labels)) = known {
            if images.shape != net.image {
                let found = format!("the pictures are {:?}, channels first", images.shape);
                return Err(Error::input(self.data.display(), found)
                    .hint(format!("the model was trained on {:?}", net.image)));
            }
            if goal == Goal::Classify && !blind {
                images = images.with_classes(&labels.class_names, &self.data)?;
            }
        }
        match (&self.masks, goal) {
            (Some(masks), Goal::Segment) => {
                Samples::with_masks(images, &self.data, masks, known.map(|(net, _)| net.classes))
            }
            (None, Goal::Segment) if !blind => Err(Error::usage("to segment, masks are needed")
                .hint("name their folder with --masks: a PNG for each picture, of the same name")),
            _ => Ok(Samples { images, masks: Vec::new() }),
        }
    }

    /// How the command was given its data, for the hint how to go on.
    fn words(&self) -> String {
        let masks = self.masks.iter().map(|masks| format!(" --masks {}", masks.display()));
        format!("--data {}{}", self.data.display(), masks.collect::<String>())
    }
}

/// Widths in order, as `8-32` or `8,12,16`.
fn widths(text: &str) -> std::result::Result<Vec<usize>, String> {
    numbers(text, "widths")
}

/// Numbers in order, each once; `what` they are.
fn numbers(text: &str, what: &str) -> std::result::Result<Vec<usize>, String> {
    let example = if what == "widths" { "8-32 or 8,12,16" } else { "1,3" };
    let wrong = || format!("\"{text}\" is no list of {what}: write {example}");
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|&n| (1..=4096).contains(&n));
    let mut found = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            None => found.push(number(part).ok_or_else(wrong)?),
            Some((low, high)) => {
                let (low, high) =
                    number(low).zip(number(high)).filter(|(low, high)| low <= high).ok_or_else(wrong)?;
                found.extend(low..=high);
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}
