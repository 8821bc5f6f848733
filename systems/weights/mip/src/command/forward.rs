//! `kiln mip forward`

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use clap::Args;
use kiln_core::{Context, Error, Result, TensorFile};
use kiln_data::{read_npy, read_tensors, write_tensors};
use serde_json::json;

use crate::encoding::Encoding;
use crate::golden::{self, Examples, Layout};

#[derive(Debug, Args)]
pub(super) struct ForwardArgs {
    /// .safetensors or .npz file with the hypernetwork's weights
    #[arg(long)]
    weights: PathBuf,
    /// Conditions [batch, k]: FILE.safetensors:NAME, FILE.npz:NAME or FILE.npy
    #[arg(long, value_name = "FILE:NAME")]
    gamma: String,
    /// How conditions enter
    #[arg(long, value_enum, default_value = "cos_sin")]
    encoding: Encoding,
    /// JSON file with names and shapes of the tensors that are made, in order
    #[arg(long)]
    layout: Option<PathBuf>,
    /// Also run the network on the tensor x [batch, images, channels, height, width] of the file of weights
    #[arg(long, requires = "layout", requires = "target")]
    x: bool,
    /// And compare with its tensor target [batch, images]
    #[arg(long, requires = "x")]
    target: bool,
    /// .safetensors or .npz file to write: encoded and theta; with --x and --target logits, loss and grad.*
    #[arg(long)]
    to: PathBuf,
}

/// Runs a bare hypernetwork on prepared tensors.
pub(super) fn run(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let gamma = conditions(&args.gamma, cx)?;
    let mut file = read_tensors(&args.weights)?;
    let examples = match &args.layout {
        Some(layout) if args.x => {
            let text = fs::read_to_string(layout).map_err(Error::io("read", layout))?;
            let layout: Layout = serde_json::from_str(&text).map_err(|e| {
                Error::input(layout.display(), "holds no layout")
                    .caused_by(e)
                    .hint("write {\"output_order\": [[\"conv1.weight\", [4, 1, 3, 3]], ..]}")
            })?;
            let (x, target) = (file.take_float("x", &cx.device)?, file.take_int("target", &cx.device)?);
            Some((Examples { x, target }, layout))
        }
        _ => None,
    };
    let output = golden::forward(&mut file, gamma, args.encoding, examples, cx)?;
    write_tensors(&args.to, &output)?;
    let names: Vec<&str> = output.names().collect();
    cx.emit(&json!({ "out": args.to, "tensors": names }), |_| {
        format!("{} in {}\n", names.join(", "), args.to.display())
    })
}

/// The conditions that `--gamma` names.
fn conditions(place: &str, cx: &Context) -> Result<Tensor<2>> {
    if place.ends_with(".npy") {
        let mut file = TensorFile::from_source(Path::new(place));
        file.insert("gamma", read_npy(Path::new(place))?);
        return file.take_float::<2>("gamma", &cx.device);
    }
    let (path, name) = place.rsplit_once(':').ok_or_else(|| {
        Error::usage(format!("--gamma {place} names no tensor"))
            .hint("write FILE.safetensors:NAME or FILE.npy")
    })?;
    read_tensors(Path::new(path))?.take_float::<2>(name, &cx.device)
}
