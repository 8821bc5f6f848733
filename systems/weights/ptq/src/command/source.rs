//! What is quantised, and examples for it.

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_compiler::{Graph, OnnxOptions, capture};
use kiln_core::{Context, Error, ModelFolder, Result};
use kiln_data::read_tensors;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::arch::Input;
use crate::checkpoint::{self, KIND, Trained};
use crate::data::{self, Examples};
use crate::foreign::{Extents, Foreign};
use crate::program::Program;
use crate::quantise::{Granularity, QuantConfig, Quantiser, check_labels, sample};
use crate::quantiser::Calibrator;
use crate::sensitivity::Sensitivities;
use crate::store::{self, Quantised};
use crate::unit::Scales;

/// A trained network.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// Folder of a network that `kiln ptq train` or `kiln export` wrote, an ONNX file, or weights with --arch
    #[arg(long, value_name = "DIR|FILE.onnx|FILE.safetensors|FILE.pth")]
    pub model: PathBuf,
    #[command(flatten)]
    pub foreign: ForeignArgs,
}

/// What a file of weights does not say itself.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
pub(super) struct ForeignArgs {
    /// The network whose weights a .safetensors, .pt or .pth file holds, under the names of torchvision or Hugging Face
    #[arg(long, value_enum)]
    pub arch: Option<Foreign>,
    /// Height and width of its images
    #[arg(long, default_value_t = 224, requires = "arch")]
    pub image: usize,
    /// Tokens of its texts
    #[arg(long, default_value_t = 128, requires = "arch")]
    pub length: usize,
    /// Attention heads of bert [default: one for every 64 of its width]
    #[arg(long, requires = "arch")]
    pub heads: Option<usize>,
}

/// How activations and weights get their ranges.
#[derive(Debug, Args)]
pub(super) struct CalibArgs {
    /// Examples to calibrate with, and, where they have labels, to measure sensitivities on
    #[arg(long = "calib", alias = "calibration", value_name = "DATA")]
    pub calib: PathBuf,
    /// How many of them calibrate
    #[arg(long, default_value_t = 256)]
    pub calib_count: usize,
    /// How ranges are chosen
    #[arg(long, value_enum, default_value = "mse")]
    pub calibrator: Calibrator,
    /// Labelled examples on which sensitivities are measured
    #[arg(long, default_value_t = 256)]
    pub examples: usize,
    /// Random directions for the curvature of each unit at most: fewer where its standard error is below 5 % before
    #[arg(long, default_value_t = 64)]
    pub probes: usize,
    /// Leave out the losses of pairs of units, which take the most time
    #[arg(long)]
    pub no_pairs: bool,
    /// What gets bits of its own
    #[arg(long, value_enum, default_value = "layer")]
    pub granularity: Granularity,
    /// Which weights share a scale
    #[arg(long, value_enum, default_value = "row")]
    pub scales: Scales,
    /// Round weights of 4 bits in linear layers alone, with a scale for so many neighbours; their inputs stay floats
    #[arg(long, value_name = "32|64", value_parser = group)]
    pub group: Option<usize>,
    /// Equalise the channels of layers that follow each other first
    #[arg(long)]
    pub equalize: bool,
    /// Let biases make up for the mean error of the rounding
    #[arg(long)]
    pub bias_correct: bool,
    /// Learn to which side weights of 4 bits are rounded
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "500")]
    pub adaround: Option<usize>,
}

/// 32 or 64.
fn group(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size @ (32 | 64)) => Ok(size),
        _ => Err("must be 32 or 64".into()),
    }
}

impl CalibArgs {
    /// Calibrates, and measures sensitivities on labelled examples.
    pub fn measure(
        &self,
        source: &Source,
        other: Option<&Examples>,
        cx: &Context,
    ) -> Result<(Quantiser, Sensitivities)> {
        let all = match source.read(&self.calib, true) {
            Ok(all) => all,
            // Calibration needs no labels, where there are others to measure sensitivities on.
            Err(error) => match other {
                Some(_) => source.read(&self.calib, false).map_err(|_| error)?,
                None => return Err(error),
            },
        };
        let calibration = all.select(&sample(all.len(), self.calib_count, "calibration", cx));
        let labelled = if all.labels.is_empty() { other.unwrap_or(&all) } else { &all };
        let chosen = labelled.select(&sample(labelled.len(), self.examples, "sensitivity", cx));
        let quantiser = Quantiser::calibrate(source.program.clone(), &calibration, self.config(), cx)?;
        let sensitivities = quantiser.sensitivities(&chosen, self.probes, !self.no_pairs, cx)?;
        Ok((quantiser, sensitivities))
    }

    /// How the network is quantised, apart from the bits.
    pub fn config(&self) -> QuantConfig {
        QuantConfig {
            calibrator: self.calibrator,
            granularity: self.granularity,
            scales: self.scales,
            group: self.group,
            equalise: self.equalize,
            bias_correct: self.bias_correct,
            adaround: self.adaround,
        }
    }

    pub fn check(&self) -> Result<()> {
        if self.adaround == Some(0) {
            return Err(Error::usage("--adaround 0 learns nothing").hint("500 steps are usual"));
        }
        if self.calib_count == 0 || self.examples == 0 {
            return Err(Error::usage("--calib-count and --examples must be at least 1"));
        }
        Ok(())
    }
}

/// A network that is about to be quantised, and how its examples are read.
pub(super) struct Source {
    pub program: Program,
    pub graph: Graph,
    pub input: Option<Input>,
    pub classes: Vec<String>,
    pub white: f64,
    pub tokenizer: Option<Tokenizer>,
    pub folder: PathBuf,
}

impl Source {
    pub fn open(args: &ModelArgs, cx: &Context) -> Result<Self> {
        let path = &args.model;
        if store::is_quantised(path) {
            return Err(Error::input(path.display(), "holds a network that is quantised already")
                .hint("quantise the network that it was made from"));
        }
        let ends_in = |wanted: &str| path.extension().is_some_and(|extension| extension == wanted);
        let is_weights = ["safetensors", "pt", "pth"].into_iter().any(ends_in);
        if args.foreign.arch.is_some() != is_weights {
            return Err(Error::usage(format!(
                "--arch belongs to weights in a .safetensors, .pt or .pth file, and these to --arch: {}",
                path.display()
            ))
            .hint("kiln ptq quantize --model resnet18.safetensors --arch resnet18 ..."));
        }
        let (graph, input, classes, white) = if let Some(arch) = args.foreign.arch {
            let ForeignArgs { image, length, heads, .. } = args.foreign;
            (arch.graph(read_tensors(path)?, Extents { image, length, heads })?, None, Vec::new(), 1.0)
        } else if ends_in("onnx") {
            (Graph::from_onnx(path, &OnnxOptions::default())?, None, Vec::new(), 1.0)
        } else if path.join("graph.json").exists() {
            (Graph::load(path)?, None, Vec::new(), 1.0)
        } else {
            let kind = ModelFolder::new(path).kind()?;
            if kind != KIND {
                return Err(Error::input(path.display(), format!("holds a model of {kind}")).hint(format!(
                    "make a graph of it first: kiln export --model {} --out graph/",
                    path.display()
                )));
            }
            let (config, net) = checkpoint::open(path, cx)?;
            let graph = capture(Box::new(Trained::new(config.network, net)))?;
            (graph, Some(config.network.input), config.classes, config.white)
        };
        if graph.inputs.len() != 1 || graph.inputs[0].port.shape.first() != Some(&1) {
            let ports: Vec<String> = graph
                .inputs
                .iter()
                .map(|input| format!("{} {:?}", input.port.name, input.port.shape))
                .collect();
            return Err(Error::input(path.display(), format!("the network reads {}", ports.join(", ")))
                .hint("networks with one input, for one example at a time, can be quantised"));
        }
        let output = &graph.outputs[0].port;
        if output.shape.len() != 2 || output.shape[0] != 1 {
            return Err(Error::input(path.display(), format!("the network's output is {:?}", output.shape))
                .hint("classifiers, whose output is [1, classes], can be quantised"));
        }
        let tokenizer = match input {
            Some(input) => tokenizer_of(path, input)?,
            None => None,
        };
        Ok(Self {
            program: Program::new(graph.clone())?,
            graph,
            input,
            classes,
            white,
            tokenizer,
            folder: path.clone(),
        })
    }

    pub fn read(&self, path: &Path, labelled: bool) -> Result<Examples> {
        let examples = match self.input {
            Some(input) => {
                data::read(path, input, &self.classes, self.white, self.tokenizer.as_ref(), labelled)?
            }
            None => {
                let port = &self.graph.inputs[0].port;
                data::read_for_port(path, &port.shape[1..], port.kind, labelled)?
            }
        };
        if labelled {
            check_labels(&examples, self.class_count(), path)?;
        }
        Ok(examples)
    }

    pub fn class_count(&self) -> usize {
        self.graph.outputs[0].port.shape[1]
    }
}

/// The tokenizer in a folder, for texts.
pub(super) fn tokenizer_of(folder: &Path, input: Input) -> Result<Option<Tokenizer>> {
    match input {
        Input::Text { .. } => data::open_tokenizer(&folder.join("tokenizer.json")).map(Some),
        Input::Image(_) => Ok(None),
    }
}

/// Reads examples for a quantised network.
pub(super) fn read_for(model: &Quantised, folder: &Path, path: &Path, labelled: bool) -> Result<Examples> {
    let examples = match model.config.input {
        Some(input) => {
            let tokenizer = tokenizer_of(folder, input)?;
            data::read(path, input, &model.config.classes, model.config.white, tokenizer.as_ref(), labelled)?
        }
        None => {
            let port = &model.program.inputs[0].port;
            data::read_for_port(path, &port.shape[1..], port.kind, labelled)?
        }
    };
    if labelled {
        check_labels(&examples, model.program.outputs[0].port.shape.get(1).copied().unwrap_or(0), path)?;
    }
    Ok(examples)
}
