//! `kiln chest-xray params` and `kiln chest-xray forward`

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::write_tensors;
use serde_json::json;

use crate::networks::{ClassifierConfig, DIVISOR, Net, Segmenter, UNetConfig, fill, formula, state};

/// Most numbers of an input.
const MOST: usize = 1 << 26;

/// Any of the networks.
#[derive(Debug, Clone, Copy)]
enum AnyNet {
    Classifier(Net),
    Segmenter(Segmenter),
}

fn any_net(text: &str) -> Result<AnyNet, String> {
    let segmenter = Segmenter::from_str(text, false).map(AnyNet::Segmenter);
    segmenter.or_else(|_| Net::from_str(text, false).map(AnyNet::Classifier)).map_err(|_| {
        let names: Vec<&str> = Net::value_variants().iter().map(|net| net.name()).collect();
        format!("there are {}, unet and unet-modified", names.join(", "))
    })
}

#[derive(Debug, Args)]
pub(super) struct ParamsArgs {
    /// Which network: one of the classifiers, unet or unet-modified
    #[arg(long, value_parser = any_net)]
    net: AnyNet,
    /// Number of classes
    #[arg(long, default_value_t = 2)]
    classes: usize,
    /// Channels of a U-Net's first level [default: 64]
    #[arg(long)]
    width: Option<usize>,
    /// List every tensor of the state dictionary
    #[arg(long)]
    names: bool,
}

#[derive(Debug, Args)]
pub(super) struct ForwardArgs {
    /// Which network: one of the classifiers, unet or unet-modified
    #[arg(long, value_parser = any_net)]
    net: AnyNet,
    /// Number of classes
    #[arg(long, default_value_t = 2)]
    classes: usize,
    /// Channels of a U-Net's first level
    #[arg(long, default_value_t = 64)]
    width: usize,
    /// Where the weights come from: the formula of the reference outputs
    #[arg(long, value_parser = ["golden"], default_value = "golden")]
    fill: String,
    /// Batch, channels, height, width
    #[arg(long, value_delimiter = ',')]
    input_shape: Vec<usize>,
    /// Which tensor of the formula the input is
    #[arg(long, default_value_t = 7)]
    input_index: u64,
    /// .safetensors or .npz file to write
    #[arg(long, default_value = "logits.safetensors")]
    out: PathBuf,
}

fn unet_config(net: Segmenter, width: usize) -> Result<UNetConfig> {
    if !(1..=512).contains(&width) {
        return Err(Error::usage(format!("--width {width} must lie between 1 and 512")));
    }
    Ok(UNetConfig { width, net })
}

pub(super) fn params(args: &ParamsArgs, cx: &Context) -> Result<()> {
    let (name, tensors) = match args.net {
        AnyNet::Classifier(net) => {
            let config = ClassifierConfig::new(net, args.classes);
            config.check()?;
            (net.name(), state(&config.init(&cx.device)))
        }
        AnyNet::Segmenter(net) => {
            let name = if net == Segmenter::Unet { "unet" } else { "unet-modified" };
            (name, state(&unet_config(net, args.width.unwrap_or(64))?.init(&cx.device)))
        }
    };
    let learnt = tensors.iter().filter(|(name, _)| !name.contains("running_"));
    let count: usize = learnt.map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let shown: Vec<_> = if args.names { tensors.clone() } else { Vec::new() };
    let result = json!({ "net": name, "parameters": count, "tensors": tensors.len(), "state": shown });
    cx.emit(&result, |_| {
        let listed = shown.iter().map(|(name, shape)| format!("{name} {shape:?}\n")).collect::<String>();
        format!("{listed}{name}: {count} parameters in {} tensors\n", tensors.len())
    })
}

pub(super) fn forward(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let wrong = |hint: &str| {
        Error::usage(format!("--input-shape {:?} does not suit the network", args.input_shape)).hint(hint)
    };
    let &[batch, channels, height, width] = &args.input_shape[..] else {
        return Err(wrong("give batch, channels, height and width, such as 2,3,64,64"));
    };
    let len = [batch, channels, height, width].into_iter().try_fold(1usize, usize::checked_mul);
    let Some(len) = len.filter(|&len| len > 0 && len <= MOST) else {
        return Err(wrong("no extent may be 0, and the whole not larger than 2^26"));
    };
    let values: Vec<f32> = formula(len, args.input_index % (1 << 32)).map(|s| s as f32).collect();
    let x = Tensor::<4>::from_data(TensorData::new(values, [batch, channels, height, width]), &cx.device);
    let logits = match args.net {
        AnyNet::Classifier(net) => {
            let config =
                ClassifierConfig { size: height.min(width), ..ClassifierConfig::new(net, args.classes) };
            config.check()?;
            if channels != 3 {
                return Err(wrong("classifiers take 3 channels"));
            }
            HostTensor::from_tensor(fill(config.init(&cx.device))?.forward(x))
        }
        AnyNet::Segmenter(net) => {
            let config = unet_config(net, args.width)?;
            if channels != 1 || height % DIVISOR != 0 || width % DIVISOR != 0 {
                return Err(wrong("U-Nets take 1 channel, and height and width divisible by 16"));
            }
            HostTensor::from_tensor(fill(config.init(&cx.device))?.forward(x))
        }
    };
    let shape = logits.shape.clone();
    let mut file = TensorFile::new();
    file.insert("logits", logits);
    write_tensors(&args.out, &file)?;
    cx.emit(&json!({ "out": args.out, "shape": shape }), |_| {
        format!("logits {shape:?} in {}\n", args.out.display())
    })
}
