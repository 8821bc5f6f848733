//! The verbs of `kiln eeg`.

mod check;
mod compare;
mod files;
mod follow;
mod forward;
mod judge;
mod learn;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kiln_core::{Context, Error, Result};

use crate::channels::Channels;
use crate::dataset::Dataset;
use crate::layout::{self, Layout};
use crate::pipeline::{Normalise, Pipeline};
use crate::prepare::{Skipped, from_arrays, in_memory};

/// `kiln eeg …`
#[derive(Debug, Parser)]
#[command(name = "eeg", about = "Pathology in EEG recordings, with transfer between sites")]
#[command(after_help = "Examples:
  kiln eeg prepare --in tuab/ --layout tuab --out prepared/
  kiln eeg train --data prepared/ --model shallow --out m/
  kiln eeg transfer --source m/ --data ours/ --protocol fine-tune --subset 20 --out t/
  kiln eeg predict --model t/fine-tune/seed-0 --in new.edf --out p/")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Prepare a folder of EDF or BDF recordings for training
    #[command(after_help = "Examples:
  kiln eeg prepare --in tuab/ --layout tuab --out prepared/
  kiln eeg prepare --in nmt/ --layout nmt --unique-subjects --out prepared/
  kiln eeg prepare --in ours/ --layout csv --labels labels.csv --tmin 0 --out prepared/
The table has the columns path and label (normal or abnormal), and may have subject, age, sex and split (train or eval).
What cannot be prepared is listed in skipped.csv.")]
    Prepare(files::PrepareArgs),
    /// What a recording holds: header, signals, annotations, mean and deviation
    #[command(after_help = "Examples:
  kiln eeg info --in a.edf
  kiln --json eeg info --in a.bdf")]
    Info(files::InfoArgs),
    /// Prepare one recording and write it as .npz
    #[command(after_help = "Examples:
  kiln eeg convert --in a.edf --tmin 60 --tmax 360 --out a.npz
  kiln eeg convert --in a.edf --tmin 0 --channels C3,C4 --normalise none --out a.npz
The arrays are eeg [channels, samples] and channels (their names).")]
    Convert(files::ConvertArgs),
    /// Write simulated recordings of one of two sites, as EDF with a table of labels
    #[command(after_help = "Examples:
  kiln eeg simulate --site a --recordings 60 --out a/
  kiln eeg prepare --in a/ --layout csv --labels a/labels.csv --tmin 0 --out pa/")]
    Simulate(files::SimulateArgs),
    /// Train a network on labelled recordings
    #[command(after_help = "Examples:
  kiln eeg train --data prepared/ --model shallow --out m/
  kiln eeg train --data prepared/ --model tcn --window 3000 --epochs 35 --augment sign-flip,noise:0.5:0.1 --out m/
  kiln eeg train --data bonn.npz --array Z,S --rate 173.61 --normalise none --labels l.csv --out m/
  kiln eeg train --data prepared/ --resume m/      after Ctrl-C or a crash")]
    Train(learn::TrainArgs),
    /// Carry a network to another site, beside networks that learn there from scratch
    #[command(after_help = "Examples:
  kiln eeg transfer --source m/ --data ours/ --protocol fine-tune --subset 20 --out t/
  kiln eeg transfer --source m/ --data ours/ --protocol fine-tune,linear-probe,freeze:1 --subset 5,10,20 --seeds 3 --out t/
  kiln eeg transfer --source m/ --data ours/ --protocol joint --source-data prepared/ --out t/
With --source-data, what the network forgets of its source is measured too.")]
    Transfer(compare::TransferArgs),
    /// Probability of pathology for recordings
    #[command(after_help = "Examples:
  kiln eeg predict --model m/ --in a.edf b.edf --out p/
  kiln eeg predict --model m/ --in folder/ --out p/
The folder gets predictions.csv (one row a recording) and windows.csv (one a window).")]
    Predict(judge::PredictArgs),
    /// Judge a recording again and again while it is made
    #[command(after_help = "Example:
  kiln eeg follow --model m/ --in recording.edf --every 30 --out course/
It ends when the header says that all records are there, with Ctrl-C, or when nothing has come for --patience seconds.
The folder gets timeline.csv and timeline.svg.")]
    Follow(follow::FollowArgs),
    /// Judge a network on labelled recordings, or probabilities that are already there
    #[command(after_help = "Examples:
  kiln eeg eval --model m/ --data prepared/ --out metrics.json
  kiln eeg eval --windows windows.csv --out metrics.json
The table of windows has the columns recording, window, label (0 or 1) and p_pathological.")]
    Eval(judge::EvalArgs),
    /// How error falls with the number of recordings
    #[command(after_help = "Examples:
  kiln eeg scale --data prepared/ --subsets 5,10,20,50 --models shallow,tcn --out s/")]
    Scale(compare::ScaleArgs),
    /// How alike the layers of two networks are
    #[command(after_help = "Examples:
  kiln eeg cka --a m/ --b t/fine-tune/seed-0 --data prepared/ --out cka.svg")]
    Cka(compare::CkaArgs),
    /// Make a network's probabilities mean what they say at a site
    #[command(after_help = "Examples:
  kiln eeg calibrate --model t/fine-tune/seed-0 --data ours/ --out calibrated/")]
    Calibrate(check::CalibrateArgs),
    /// In what two sites differ: power of frequency bands, and whether a network gives the site away
    #[command(after_help = "Examples:
  kiln eeg shift --a tuab-100hz/ --b ours/ --model m/ --out shift.svg")]
    Shift(check::ShiftArgs),
    /// Run a network on prepared tensors
    #[command(after_help = "Examples:
  kiln eeg forward --model shallow --config c.json --weights w.safetensors --input io.safetensors --out out.safetensors
Weights have the names of braindecode; input0, input1, … [batch, channels, samples] become output0, output1, ….")]
    Forward(forward::ForwardArgs),
}

impl Command {
    /// Runs the verb.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Prepare(args) => files::prepare(&args, cx),
            Verb::Info(args) => files::info(&args, cx),
            Verb::Convert(args) => files::convert(&args, cx),
            Verb::Simulate(args) => files::simulate(&args, cx),
            Verb::Train(args) => learn::train(args, cx),
            Verb::Transfer(args) => compare::transfer(&args, cx),
            Verb::Predict(args) => judge::predict(&args, cx),
            Verb::Follow(args) => follow::follow(&args, cx),
            Verb::Eval(args) => judge::eval(&args, cx),
            Verb::Scale(args) => compare::scale(&args, cx),
            Verb::Cka(args) => compare::cka(&args, cx),
            Verb::Calibrate(args) => check::calibrate(&args, cx),
            Verb::Shift(args) => check::shift(&args, cx),
            Verb::Forward(args) => forward::run(&args, cx),
        }
    }
}

/// What is done to recordings.
#[derive(Debug, Clone, PartialEq, Args)]
struct PipelineArgs {
    /// Seconds that are left out at the beginning [default: 60; 0 for arrays]
    #[arg(long)]
    tmin: Option<f64>,
    /// Seconds after which nothing is used [default: 360]
    #[arg(long)]
    tmax: Option<f64>,
    /// Samples a second to resample to [default: 100]; for an .npz file, those that it has
    #[arg(long)]
    rate: Option<f64>,
    /// Microvolts beyond which amplitudes are cut [default: 800]
    #[arg(long)]
    clip: Option<f64>,
    /// How amplitudes are made comparable [default: zclip2]
    #[arg(long, value_enum)]
    normalise: Option<Normalise>,
    /// 21 (those of the paper), any (all that there are), or names between commas [default: 21]
    #[arg(long)]
    channels: Option<Channels>,
    /// Pass only frequencies between these, in hertz, such as 1,75
    #[arg(long, value_delimiter = ',', num_args = 2)]
    band: Option<Vec<f64>>,
    /// Subtract the mean of all channels
    #[arg(long)]
    average_reference: bool,
    /// Fill in directions of the channels that are louder than so many deviations, from the others (artefact-subspace
    /// reconstruction); 5 to 20 are usual
    #[arg(long, value_name = "DEVIATIONS")]
    asr: Option<f64>,
}

impl PipelineArgs {
    /// For recordings in files.
    fn pipeline(&self) -> Result<Pipeline> {
        let default = Pipeline::default();
        let pipeline = Pipeline {
            tmin: self.tmin.unwrap_or(default.tmin),
            tmax: self.tmax.unwrap_or(default.tmax),
            rate: self.rate.unwrap_or(default.rate),
            clip: self.clip.unwrap_or(default.clip),
            normalise: self.normalise.unwrap_or(default.normalise),
            channels: self.channels.clone().unwrap_or(default.channels),
            band: self.band.as_ref().map(|band| [band[0], band[1]]),
            average_reference: self.average_reference,
            asr: self.asr,
        };
        pipeline.check()?;
        Ok(pipeline)
    }

    /// Whether nothing is said.
    fn is_silent(&self) -> bool {
        let Self { tmin, tmax, rate, clip, normalise, channels, band, average_reference, asr } = self;
        let numbers = [tmin, tmax, rate, clip, asr];
        numbers.iter().all(|number| number.is_none())
            && normalise.is_none()
            && channels.is_none()
            && band.is_none()
            && !average_reference
    }
}

/// Recordings to work on.
#[derive(Debug, Clone, Args)]
struct DataArgs {
    /// A folder that `prepare` wrote, a folder of EDF files (with --labels or --layout), or an .npz file (with --array)
    #[arg(long)]
    data: PathBuf,
    /// Arrays of the .npz file, segments x samples or segments x channels x samples
    #[arg(long, value_delimiter = ',')]
    array: Vec<String>,
    /// Samples a second that networks see of an .npz file
    #[arg(long, default_value_t = 100.0)]
    resample: f64,
    /// Table of labels: path, label, and optionally subject, age, sex, split
    #[arg(long)]
    labels: Option<PathBuf>,
    /// How a folder of EDF files is laid out
    #[arg(long, value_enum, default_value = "csv")]
    layout: Layout,
    /// The label that counts as pathological; all others are normal
    #[arg(long, value_name = "LABEL")]
    positive: Option<String>,
    #[command(flatten)]
    pipeline: PipelineArgs,
}

impl DataArgs {
    /// Reads and prepares what is not prepared yet.
    fn open(&self, cx: &Context) -> Result<Dataset> {
        let path = &self.data;
        if path.extension().is_some_and(|ending| ending == "npz") {
            return self.open_arrays();
        }
        if !self.array.is_empty() {
            return Err(Error::usage(format!("--array needs an .npz file, which {} is not", path.display())));
        }
        if Dataset::is_prepared(path) {
            if !self.pipeline.is_silent() || self.labels.is_some() {
                return Err(Error::usage(format!("{} is prepared already", path.display()))
                    .hint("give labels and options of preparation to `kiln eeg prepare`"));
            }
            return Dataset::open(path);
        }
        if !path.is_dir() {
            return Err(Error::input(path.display(), "is neither a folder nor an .npz file"));
        }
        let (found, absent) =
            layout::find(path, self.layout, self.labels.as_deref(), self.positive.as_deref())?;
        let (data, mut skipped) = in_memory(&found, &self.pipeline.pipeline()?, path, cx)?;
        skipped.extend(absent.iter().map(Skipped::from));
        if !skipped.is_empty() {
            cx.note(format!("{} recordings are left out; prepare the folder to see why", skipped.len()));
        }
        Ok(data)
    }

    fn open_arrays(&self) -> Result<Dataset> {
        let (path, args) = (&self.data, &self.pipeline);
        let Some(rate) = args.rate else {
            return Err(Error::usage(format!("{} does not say how fast it was recorded", path.display()))
                .hint("give its samples a second with --rate"));
        };
        if self.array.is_empty() {
            return Err(Error::usage(format!("which arrays of {} are segments?", path.display()))
                .hint("name them with --array"));
        }
        let pipeline = PipelineArgs {
            tmin: args.tmin.or(Some(0.0)),
            tmax: args.tmax.or(Some(1e9)),
            rate: Some(self.resample),
            channels: Some(Channels::Any),
            ..args.clone()
        };
        let labels = self.labels.as_deref().map(|labels| (labels, self.positive.as_deref()));
        from_arrays(path, &self.array, rate, labels, &pipeline.pipeline()?)
    }

    /// How the data were given, for hints.
    fn words(&self) -> String {
        format!("--data {}", self.data.display())
    }
}

/// A figure with three decimals, or a dash where there is none.
fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.3}"))
}
