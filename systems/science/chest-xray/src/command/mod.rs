//! The verbs of `kiln chest-xray`.

mod classify;
mod explain;
mod files;
mod forward;
mod judge;
mod lungs;

use std::fs;
use std::path::{Component, Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use kiln_core::{Context, Error, Result, write_atomic};
use regex::Regex;
use serde::Serialize;

use crate::dataset::{Entry, Labels, list};

/// `kiln chest-xray …`
#[derive(Debug, Parser)]
#[command(
    name = "chest-xray",
    about = "Tuberculosis in chest X-rays; for research use, not a medical device"
)]
#[command(after_help = "Examples:
  kiln chest-xray train-seg --images lungs/images --masks lungs/masks --out seg/
  kiln chest-xray train --images study/ --net resnet18 --weights resnet18.safetensors --seg seg/ --out m/
  kiln chest-xray predict --model m/ --seg seg/ --images new/ --out p/
  kiln chest-xray explain --model m/ --seg seg/ --images new/ --method score-cam --out e/")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Draw radiographs whose lungs and diagnosis are known
    #[command(after_help = "Examples:
  kiln chest-xray phantom --n 200 --out d/
  kiln chest-xray phantom --n 200 --shortcut 0.9 --size 128 --out d/
The folder gets images/TB, images/Normal, masks and labels.csv.")]
    Phantom(files::PhantomArgs),
    /// Train a U-Net to find lungs
    #[command(
        name = "train-seg",
        after_help = "Examples:
  kiln chest-xray train-seg --images d/images --masks d/masks --out seg/
  kiln chest-xray train-seg --images d/images --masks d/masks --net unet-modified --width 16 --size 128 --out seg/
  kiln chest-xray train-seg --images d/images --masks d/masks --resume seg/      after Ctrl-C
A mask has the name of its image, also with -mask or _mask behind it."
    )]
    TrainSeg(lungs::TrainSegArgs),
    /// Find the lungs in radiographs
    #[command(after_help = "Examples:
  kiln chest-xray segment --model seg/ --images new/ --out s/
The folder gets masks, segmented images, pictures with outlines and quality.csv.")]
    Segment(lungs::SegmentArgs),
    /// Compare masks with the truth
    #[command(
        name = "mask-eval",
        after_help = "Examples:
  kiln chest-xray mask-eval --pred s/masks --truth d/masks"
    )]
    MaskEval(lungs::MaskEvalArgs),
    /// Train a classifier, in folds
    #[command(after_help = "Examples:
  kiln chest-xray train --images d/images --net squeezenet --folds 5 --out m/
  kiln chest-xray train --images d/images --net resnet18 --weights resnet18.safetensors --seg seg/ --out m/
  kiln chest-xray train --images d/images --net chexnet --weights densenet121.pth --lr 1e-5 --head-lr 1e-3 --out m/
  kiln chest-xray train --images all/ --labels labels.csv --net mobilenet --freeze backbone --folds 1 --out m/
  kiln chest-xray train --images d/images --seg seg/ --resume m/                   after Ctrl-C
Without a table, images lie in the folders TB and Normal. The table has the columns image and label, and may have patient.")]
    Train(classify::TrainArgs),
    /// The probability of tuberculosis for radiographs
    #[command(after_help = "Examples:
  kiln chest-xray predict --model m/ --images new/ --out p/
  kiln chest-xray predict --model m/ other/ --seg seg/ --images new/ --overlays --out p/
The folder gets predictions.csv and worklist.html. Several models, and the folds of one, vote with their mean probability.")]
    Predict(judge::PredictArgs),
    /// Judge a model on labelled radiographs, or probabilities that are already there
    #[command(after_help = "Examples:
  kiln chest-xray eval --model m/ --images d/images --out metrics.json
  kiln chest-xray eval --scores scores.csv --out metrics.json
The table of scores has the columns image, label (TB or Normal) and p_tb.")]
    Eval(judge::EvalArgs),
    /// Make a model's probabilities mean what they say, and choose its threshold
    #[command(after_help = "Examples:
  kiln chest-xray calibrate --model m/fold-1 --images ours/ --sensitivity 0.9 --out calibrated/")]
    Calibrate(judge::CalibrateArgs),
    /// Show on what decisions rest
    #[command(after_help = "Examples:
  kiln chest-xray explain --model m/ --images new/ --method score-cam --out e/
  kiln chest-xray explain --model m/ --seg seg/ --images d/images --method grad-cam --curves --out e/
  kiln chest-xray explain --model m/ --images d/images --method tsne --out e/
The folder gets overlays, explain.csv and explain.html, or tsne.svg and tsne.csv. Several models, and the folds of one, are explained
together: by the mean of their maps, or by the features of all.")]
    Explain(explain::ExplainArgs),
    /// Find copies and near copies of images, as merged databases have them
    #[command(after_help = "Examples:
  kiln chest-xray duplicates --images all/ --out duplicates.csv")]
    Duplicates(files::DuplicatesArgs),
    /// Write images as a model's network takes them, for `kiln ptq` and whatever else runs its graph
    #[command(after_help = "Examples:
  kiln chest-xray arrays --model m/fold-1 --images d/images --out xy.npz
  kiln export --model m/fold-1 --out graph/
  kiln ptq quantize --model graph/ --calib xy.npz --valid xy.npz --out q/
The file has x [images, 3, rows, columns] and, of labelled images, y [images]: 1 for TB.")]
    Arrays(files::ArraysArgs),
    /// How many parameters a network has
    #[command(after_help = "Examples:
  kiln chest-xray params --net chexnet --classes 2
  kiln chest-xray params --net resnet18 --names")]
    Params(forward::ParamsArgs),
    /// Run a network on tensors of a formula
    #[command(after_help = "Examples:
  kiln chest-xray forward --net unet --width 8 --fill golden --input-shape 2,1,48,80 --out logits.safetensors")]
    Forward(forward::ForwardArgs),
}

impl Command {
    /// Runs the verb.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Phantom(args) => files::phantom(&args, cx),
            Verb::TrainSeg(args) => lungs::train(args, cx),
            Verb::Segment(args) => lungs::segment(&args, cx),
            Verb::MaskEval(args) => lungs::eval(&args, cx),
            Verb::Train(args) => classify::train(args, cx),
            Verb::Predict(args) => judge::predict(&args, cx),
            Verb::Eval(args) => judge::eval(&args, cx),
            Verb::Calibrate(args) => judge::calibrate(&args, cx),
            Verb::Explain(args) => explain::run(&args, cx),
            Verb::Duplicates(args) => files::duplicates(&args, cx),
            Verb::Arrays(args) => files::arrays(&args, cx),
            Verb::Params(args) => forward::params(&args, cx),
            Verb::Forward(args) => forward::forward(&args, cx),
        }
    }
}

/// Radiographs to work on.
#[derive(Debug, Clone, Args)]
struct ImagesArgs {
    /// A folder of PNG, JPEG or DICOM files, or one of them; labels are the folders TB and Normal in it
    #[arg(long)]
    images: PathBuf,
    /// Table of labels: image, label, and optionally patient
    #[arg(long)]
    labels: Option<PathBuf>,
    /// Regular expression that finds the patient in a file's name: its first group, or the whole
    #[arg(long)]
    patient_regex: Option<Regex>,
}

impl ImagesArgs {
    fn list(&self) -> Result<Vec<Entry>> {
        list(&self.images, &Labels { table: self.labels.as_deref(), patient: self.patient_regex.as_ref() })
    }
}

/// Writes a value as JSON.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e))?;
    write_atomic(path, &json)
}

/// Makes a folder and those above it.
fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// Where below `folder` a picture of an image goes: under the image's own name, never outside of the folder.
fn picture_path(folder: &Path, image: &str) -> Result<PathBuf> {
    let below: PathBuf =
        Path::new(image).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let path = folder.join(below).with_extension("png");
    make_folder(path.parent().unwrap_or(folder))?;
    Ok(path)
}

/// A figure with three decimals, or a dash where there is none.
fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.3}"))
}

/// Text that is safe in a page.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A page with a table, in the manner of the reports.
fn page(title: &str, lead: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>{}</style>\n\
         </head>\n<body>\n<main>\n<h1>{title}</h1>\n<p class=\"notice\">{}</p>\n<p>{lead}</p>\n{body}</main>\n</body>\n</html>\n",
        include_str!("page.css"),
        crate::NOTICE_SENTENCE,
    )
}
