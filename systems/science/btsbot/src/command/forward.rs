//! `kiln btsbot forward` and `import`

use std::path::PathBuf;

use burn::tensor::activation::sigmoid;
use clap::Args;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::{read_tensors, write_tensors};
use serde_json::json;

use crate::checkpoint::{Config, save};
use crate::features::{FEATURES, FeatureOptions};
use crate::model::{MmCnnConfig, Mode};
use crate::names::from_elsewhere;
use crate::triplet::SIDE;

#[derive(Debug, Args)]
pub(super) struct ForwardArgs {
    /// .safetensors or .npz file with the weights
    #[arg(long)]
    weights: PathBuf,
    /// .safetensors or .npz file with input_triplet and input_meta
    #[arg(long)]
    input: PathBuf,
    /// Which network
    #[arg(long, value_enum, default_value = "mm_cnn")]
    model: Mode,
    /// .safetensors or .npz file to write: logit and score [batch, 1]
    #[arg(long, default_value = "logits.safetensors")]
    out: PathBuf,
}

pub(super) fn run(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let mut inputs = read_tensors(&args.input)?;
    let mut weights = read_tensors(&args.weights)?;
    from_elsewhere(&mut weights, args.model);
    let triplet = match args.model.sees_images() {
        true => Some(inputs.take_float::<4>("input_triplet", &cx.device)?),
        false => None,
    };
    let meta = match args.model.sees_metadata() {
        true => Some(inputs.take_float::<2>("input_meta", &cx.device)?),
        false => None,
    };
    let refused = |found: String, hint: &str| Err(Error::input(args.input.display(), found).hint(hint));
    let shape = triplet.as_ref().map(|x| x.dims());
    if let Some(shape) = shape
        && (shape[1] != 3 || shape[2] != shape[3])
    {
        return refused(
            format!("input_triplet has the shape {shape:?}"),
            "it must be [batch, 3, side, side]",
        );
    }
    if let Some([batch, width]) = meta.as_ref().map(|x| x.dims())
        && (width != FEATURES.len() || shape.is_some_and(|shape| shape[0] != batch))
    {
        return refused(format!("input_meta has the shape [{batch}, {width}]"), "it must be [batch, 25]");
    }
    let config = config_of(&weights, args.model, shape.map(|shape| shape[2]));
    config.check()?;
    let model = weights.into_module(config.init(&cx.device))?;
    let logits = model.forward_parts(triplet, meta);
    let mut outputs = TensorFile::new();
    outputs.insert("score", HostTensor::from_tensor(sigmoid(logits.clone())));
    outputs.insert("logit", HostTensor::from_tensor(logits));
    write_tensors(&args.out, &outputs)?;
    let logits = outputs.get("logit").and_then(HostTensor::as_floats).unwrap_or_default().to_vec();
    cx.emit(&json!({ "out": args.out, "logits": logits }), |_| {
        format!("{} logits and scores in {}\n", logits.len(), args.out.display())
    })
}

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// Weights of the public PyTorch package: .pth, .pt, .safetensors or .npz
    #[arg(long)]
    weights: PathBuf,
    /// Which network
    #[arg(long, value_enum, default_value = "mm_cnn")]
    model: Mode,
    /// Rows and columns of the stamps that it sees
    #[arg(long, default_value_t = SIDE)]
    crop: usize,
    /// Model folder to write
    #[arg(long)]
    out: PathBuf,
}

/// Makes a model folder of weights from elsewhere.
pub(super) fn import(args: &ImportArgs, cx: &Context) -> Result<()> {
    if args.out.join("config.json").exists() {
        return Err(Error::usage(format!("{} already holds a model", args.out.display()))
            .hint("choose another --out"));
    }
    let mut weights = read_tensors(&args.weights)?;
    from_elsewhere(&mut weights, args.model);
    let network = config_of(&weights, args.model, Some(args.crop));
    network.check()?;
    let model = weights.into_module(network.init(&cx.device))?;
    let parameters = model.parameters();
    save(&args.out, &Config::new(network, FeatureOptions::default()), &model)?;
    cx.emit(&json!({ "out": args.out, "parameters": parameters }), |_| {
        format!("{parameters} parameters in {}\n", args.out.display())
    })
}

/// The network that weights are of, by their shapes; what cannot be told is the production network's.
fn config_of(weights: &TensorFile, mode: Mode, side: Option<usize>) -> MmCnnConfig {
    let mut config = MmCnnConfig::new().with_mode(mode);
    let shape = |name: &str| weights.get(name).map(|tensor| tensor.shape.clone()).unwrap_or_default();
    let first = |name: &str, default: usize| shape(name).first().copied().unwrap_or(default);
    config.side = side.unwrap_or(config.side);
    config.channels = [first("conv1.weight", config.channels[0]), first("conv3.weight", config.channels[1])];
    config.kernel = shape("conv1.weight").get(2).copied().unwrap_or(config.kernel);
    config.meta_hidden = [first("meta_fc1.weight", 128), first("meta_fc2.weight", 128)];
    config.head_hidden =
        (0..).map_while(|at| shape(&format!("comb_fc.{at}.weight")).first().copied()).collect();
    config
}
