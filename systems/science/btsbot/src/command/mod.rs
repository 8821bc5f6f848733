//! The verbs of `kiln btsbot`.

mod check;
mod follow;
mod forward;
mod judge;
mod learn;
mod look;
mod score;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kiln_core::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::features::{DrbMissing, FeatureOptions, HistorySource};
use crate::fields::Names;
use crate::packet::AlertReader;

/// `kiln btsbot …`
#[derive(Debug, Parser)]
#[command(
    name = "btsbot",
    about = "Bright transients in a survey's alert stream, identified and followed up"
)]
#[command(after_help = "Examples:
  kiln btsbot extract --packets night/ --out night-arrays/
  kiln btsbot train --triplets triplets.npy --candidates candidates.csv --out m/
  kiln btsbot predict --model m/ --packets night.tar.gz --out scores.csv
  kiln btsbot policy --scores scores.csv --policy bts_p1")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a network on labelled alerts
    #[command(after_help = "Examples:
  kiln btsbot train --triplets triplets.npy --candidates candidates.csv --out m/
  kiln btsbot train --triplets t.npz --candidates t.csv --val-triplets v.npz --val-candidates v.csv --out m/
  kiln btsbot train --triplets t.npy --candidates t.csv --model um_nn --epochs 50 --batch 32 --out baseline/
  kiln btsbot train --triplets t.npy --candidates t.csv --resume m/      after Ctrl-C or a crash
The table has a row for every alert, with objectId, candid, jd, label (1: bright transient, 0: not) and the 25 features.")]
    Train(learn::TrainArgs),
    /// Score alerts
    #[command(after_help = "Examples:
  kiln btsbot predict --model m/ --packets night/ --out scores.csv
  kiln btsbot predict --model m/ --packets ztf_public_20231001.tar.gz --no-stars --min-drb 0.5 --out scores.csv
  kiln btsbot predict --model m/ --triplets t.npy --candidates t.csv --out scores.csv
The table has a row for every alert, with status scored or rejected and, for the latter, the reason.")]
    Predict(score::PredictArgs),
    /// Turn packets into arrays and a table, as training takes them
    #[command(after_help = "Examples:
  kiln btsbot extract --packets night/ --out night-arrays/
  kiln btsbot extract --packets archive/ --labels labels.csv --out training/
The folder gets candidates.csv (all fields of candidate, and the derived features), triplets.npy [alerts, 63, 63, 3] and
rejected.csv.")]
    Extract(look::ExtractArgs),
    /// What a packet holds, with a picture of its stamps
    #[command(after_help = "Examples:
  kiln btsbot show --packet 2475433850015010009.avro --out alert.png")]
    Show(look::ShowArgs),
    /// Judge scores, or a network on labelled alerts: metrics, policies, and a page to look at
    #[command(after_help = "Examples:
  kiln btsbot eval --model m/ --triplets test.npy --candidates test.csv --out e/
  kiln btsbot eval --scores scored.csv --scanner-times scanners.csv --exclude ids.txt --out e/
The folder gets metrics.json, policies.json and report.html.")]
    Eval(judge::EvalArgs),
    /// Turn scores of labelled alerts into targets, and judge the policies
    #[command(after_help = "Examples:
  kiln btsbot policy --scores scored_alerts.csv --out policies.json
  kiln btsbot policy --scores scored_alerts.csv --policy bts_p1 --policy n=3,score=0.7,mag=18.8,peak=18.5
The table has the columns objectId, jd, label, magpsf and score.")]
    Policy(judge::PolicyArgs),
    /// Whether alerts of today are like those that a network was judged by
    #[command(after_help = "Examples:
  kiln btsbot shift --a test-scores.csv --b recent-scores.csv --out shift/
Both tables have objectId, jd, label, magpsf and score; those of the 25 features that are columns of both are compared, too.")]
    Shift(check::ShiftArgs),
    /// Make a network's scores mean what they say
    #[command(after_help = "Examples:
  kiln btsbot calibrate --model m/ --triplets val.npy --candidates val.csv --out calibrated/")]
    Calibrate(check::CalibrateArgs),
    /// Answer packets with scores over HTTP
    #[command(after_help = "Examples:
  kiln btsbot serve --model m/ --port 8080
  curl --data-binary @2475433850015010009.avro http://127.0.0.1:8080/score
The source's history is that of the packet.")]
    Serve(score::ServeArgs),
    /// Follow a folder of packets, and request spectra of the sources that a policy picks
    #[command(after_help = "Examples:
  kiln btsbot watch --model m/ --packets incoming/                          dry run: says what it would request
  kiln btsbot watch --model m/ --packets night/ --once --out w/
  kiln btsbot watch --model m/ --packets incoming/ --policy bts_p1 --live --base https://fritz.science --allocation 17 \\
    --source-groups 41 --max-requests-per-night 20
Every source gets one request, however often the watch is stopped, killed or restarted on the same --store. The token comes from
the environment variable SKYPORTAL_TOKEN or from --token-file. Priority: 3, one more below magnitude 18 and another below 17,
one less for sources known for 30 days.")]
    Watch(Box<follow::WatchArgs>),
    /// Append packets to a log that a watch follows
    #[command(after_help = "Examples:
  kiln btsbot feed --packets night.tar.gz --stream alerts/
  kiln btsbot feed --packets archive/ --rate 50 --stream alerts/        as a survey would send them
  kiln btsbot watch --model m/ --stream alerts/")]
    Feed(follow::FeedArgs),
    /// Write the alerts of a simulated survey, as packets
    #[command(after_help = "Examples:
  kiln btsbot simulate --sources 120 --out survey/
  kiln btsbot extract --packets survey/packets --labels survey/sources.csv --out arrays/")]
    Simulate(follow::SimulateArgs),
    /// Make a model of weights of the public PyTorch package
    #[command(after_help = "Examples:
  kiln btsbot import --weights best_model.pth --out m/
  kiln btsbot import --weights um_nn.safetensors --model um_nn --out m/
The file holds the state dictionary, with names such as conv_layers.0.weight; sizes of layers are taken from it.")]
    Import(forward::ImportArgs),
    /// Run a network on prepared tensors
    #[command(after_help = "Examples:
  kiln btsbot forward --weights w.safetensors --input io.safetensors --out logits.safetensors
The input has input_triplet [batch, 3, side, side] and input_meta [batch, 25]. Weights may have the names of the public PyTorch
package (conv_layers.0.weight, …).")]
    Forward(forward::ForwardArgs),
}

impl Command {
    /// Runs the verb.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => learn::train(args, cx),
            Verb::Predict(args) => score::predict(&args, cx),
            Verb::Extract(args) => look::extract(&args, cx),
            Verb::Show(args) => look::show(&args, cx),
            Verb::Eval(args) => judge::eval(&args, cx),
            Verb::Policy(args) => judge::policy(&args, cx),
            Verb::Shift(args) => check::shift(&args, cx),
            Verb::Calibrate(args) => check::calibrate(&args, cx),
            Verb::Serve(args) => score::serve(&args, cx),
            Verb::Watch(args) => follow::watch(&args, cx),
            Verb::Feed(args) => follow::feed(&args, cx),
            Verb::Simulate(args) => follow::simulate(&args, cx),
            Verb::Import(args) => forward::import(&args, cx),
            Verb::Forward(args) => forward::run(&args, cx),
        }
    }
}

/// How packets are read.
#[derive(Debug, Clone, Args)]
struct ReadArgs {
    /// Where a source's history is taken from [default: the model's, or both]
    #[arg(long, value_enum)]
    history: Option<HistorySource>,
    /// What to do with alerts that have no drb [default: the model's, or reject]
    #[arg(long, value_enum)]
    drb_missing: Option<DrbMissing>,
    /// JSON file that says what another survey or broker calls the fields of packets
    #[arg(long, value_name = "FILE")]
    fields: Option<PathBuf>,
}

impl ReadArgs {
    fn reader(&self) -> Result<AlertReader> {
        Ok(match &self.fields {
            Some(path) => AlertReader::with_names(Names::read(path)?),
            None => AlertReader::new(),
        })
    }

    /// What is said here, and else what the model has.
    fn options(&self, model: FeatureOptions) -> FeatureOptions {
        FeatureOptions {
            history: self.history.unwrap_or(model.history),
            drb_missing: self.drb_missing.unwrap_or(model.drb_missing),
        }
    }
}

/// Stamps and table of the same alerts.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
struct ArrayArgs {
    /// Stamps as .npy or .npz, [alerts, 63, 63, 3]
    #[arg(long, requires = "candidates")]
    triplets: Option<PathBuf>,
    /// Table of the same alerts as .csv
    #[arg(long, requires = "triplets")]
    candidates: Option<PathBuf>,
}

/// A figure with three decimals, or a dash where there is none.
fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.3}"))
}
