//! The verbs of `kiln ptq`.

mod apply;
mod quantize;
mod report;
mod sensitivity;
mod source;
mod tools;
mod train;

use std::path::Path;

use clap::{Parser, Subcommand};
use kiln_core::{Context, Error, Result, write_atomic};
use serde::Serialize;

use apply::{BenchArgs, CompareArgs, EvalArgs, ExportArgs, PredictArgs};
use quantize::QuantizeArgs;
use sensitivity::{MlpArgs, SensitivityArgs};
use tools::{ProfileArgs, QuantArrayArgs};
use train::TrainArgs;

/// `kiln ptq …`
#[derive(Debug, Parser)]
#[command(
    name = "ptq",
    about = "Trained networks in 16, 8 and 4 bits, as fast as the accuracy that you ask for allows"
)]
#[command(after_help = "Examples:
  kiln ptq train --arch mobilenetv2-s --data fashion/ --out m/
  kiln ptq quantize --model m/ --calib fashion/ --valid t10k-images-idx3-ubyte.gz --max-drop 0.1% --out q/
  kiln ptq eval --model q/ --data t10k-images-idx3-ubyte.gz
  kiln ptq bench --model q/ --data t10k-images-idx3-ubyte.gz")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a network of images or texts
    #[command(after_help = "Examples:
  kiln ptq train --arch resnet-s --data photos/ --epochs 8 --out m/
  kiln ptq train --arch bert-s --data reviews.csv --out m/         columns label and text
  kiln ptq train --data photos/ --resume m/                        after Ctrl-C or a crash")]
    Train(TrainArgs),
    /// Decide the bits of every unit and write the quantised network
    #[command(after_help = "Examples:
  kiln ptq quantize --model m/ --calib photos/ --valid more/ --target 0.999 --out q/
  kiln ptq quantize --model m/ --calib x.npz --valid xy.npz --max-drop 0.5% --order hessian --out q/
  kiln ptq quantize --model m/ --calib photos/ --valid more/ --granularity tensor --per-gain --out q/
  kiln ptq quantize --model m/ --calib photos/ --valid more/ --max-bytes 400k --out q/      a budget instead of a target
  kiln ptq quantize --model m/ --calib photos/ --valid more/ --equalize --bias-correct --adaround --out q/
  kiln ptq quantize --model m/ --calib a.csv --valid b.csv --bits 16,4 --group 32 --out q/  weights alone, in groups
  kiln ptq quantize --model resnet18.safetensors --arch resnet18 --calib x.npz --valid xy.npz --out q/
  kiln ptq quantize --model bert.safetensors --arch bert --length 64 --calib x.npz --valid xy.npz --out q/
  kiln export --model any/ --out graph/ && kiln ptq quantize --model graph/ --calib xy.npz --valid xy.npz --out q/
Files of weights are read under the names of torchvision (resnet18 to resnet152, mobilenet_v2) and Hugging Face (bert), with
inputs as these networks read them: an array x [n, 3, 224, 224] of scaled pixels, or x [n, length] of token numbers, 0 for padding.
The search goes on where it was interrupted when the same command is given again.")]
    Quantize(QuantizeArgs),
    /// Classify examples with a quantised network, in whole numbers
    #[command(after_help = "Examples:
  kiln ptq predict --model q/ --input photos/ --out p.csv
  kiln ptq predict --model q/ --input x.npz --out y.npz        logits, as an array y")]
    Predict(PredictArgs),
    /// Accuracy of a quantised or a trained network
    #[command(after_help = "Examples:
  kiln ptq eval --model q/ --data test/
  kiln ptq eval --model resnet18.safetensors --arch resnet18 --data xy.npz")]
    Eval(EvalArgs),
    /// Latency and size of a quantised network beside sixteen bits
    #[command(after_help = "Example:
  kiln ptq bench --model q/ --data test/ --batch 1 --runs 50")]
    Bench(BenchArgs),
    /// Write a quantised network as an ONNX file, or as a graph for Kiln's compiler
    #[command(after_help = "Examples:
  kiln ptq export --model q/ --to q.onnx              QuantizeLinear and DequantizeLinear around every unit
  kiln ptq export --model q/ --opset 21 --to q.onnx   weights of 4 bits in as many, for ONNX Runtime 1.18 and later
  kiln ptq export --model q/ --batch 32 --to graph/   for `kiln graph run` and `kiln compile`
On x86 processors without VNNI, ONNX Runtime's integer kernels overflow unless the session is given
session.x64quantprecision=1.")]
    Export(ExportArgs),
    /// Measure how sensitive every unit is
    #[command(after_help = "Example:
  kiln ptq sensitivity --model m/ --calib photos/ --examples 256 --out s/")]
    Sensitivity(SensitivityArgs),
    /// Measure the constants of the latency model on this machine
    #[command(after_help = "Example:
  kiln ptq profile --out profile.json")]
    Profile(ProfileArgs),
    /// Compare a quantised network with another, unit by unit: which layer rounds coarsely, cuts off, or costs accuracy
    #[command(after_help = "Examples:
  kiln ptq compare m/ q/ --data test/
  kiln ptq compare m/ q/ --data test/ --out report/   layers.csv, layers.json and report.html
  kiln ptq compare resnet18.safetensors q/ --arch resnet18 --data xy.npz
`alone` is what the loss rises by when one unit alone is quantised, `at 16 bits` what it falls by when one unit alone is not:
the units to --pin.")]
    Compare(CompareArgs),
    /// Quantise an array
    #[command(after_help = "Example:
  kiln ptq quant-array --input w.npy --bits 8 --scheme sym --calibrator minmax --axis 0 --out q.npz")]
    QuantArray(QuantArrayArgs),
    /// Sensitivities of a small perceptron, exactly
    #[command(after_help = "Example:
  kiln ptq sensitivity-mlp --input mlp.json --bits 4 --exact-trace
The file holds W (a list of matrices [out, in]), B, X and Y.")]
    SensitivityMlp(MlpArgs),
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => train::run(args, cx),
            Verb::Quantize(args) => quantize::run(&args, cx),
            Verb::Predict(args) => apply::predict(&args, cx),
            Verb::Eval(args) => apply::eval(&args, cx),
            Verb::Bench(args) => apply::bench(&args, cx),
            Verb::Export(args) => apply::export(&args, cx),
            Verb::Sensitivity(args) => sensitivity::run(&args, cx),
            Verb::Profile(args) => tools::profile(&args, cx),
            Verb::Compare(args) => apply::compare(&args, cx),
            Verb::QuantArray(args) => tools::quant_array(&args, cx),
            Verb::SensitivityMlp(args) => sensitivity::perceptron(&args, cx),
        }
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path, what: &str) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::input(path.display(), format!("does not hold {what}")).caused_by(e))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e))?;
    write_atomic(path, &text)
}
