//! `kiln mip convert`

use std::path::PathBuf;

use burn::module::{Module, ModuleDisplay};
use clap::Args;
use kiln_core::{Context, Error, ModelFolder, Result, TensorFile};
use kiln_data::read_tensors;
use serde::Serialize;
use serde_json::json;

use super::DataArgs;
use super::shape::ShapeArgs;
use super::train::TaskName;
use super::{register, scale};
use crate::checkpoint::{KIND, TaskKind};
use crate::classify::{Control, Sampling};
use crate::convert::MipHyper;

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Weights of the network: .safetensors, .npz, or PyTorch's .pt
    #[arg(long)]
    weights: PathBuf,
    /// What the network does
    #[arg(long, value_enum, default_value = "classify")]
    task: TaskName,
    #[command(flatten)]
    shape: ShapeArgs,
    /// What the condition will mean to a classifier
    #[arg(long, value_enum, default_value = "rotation")]
    control: Control,
    /// Model folder to write
    #[arg(long)]
    out: PathBuf,
}

/// Makes a conditioned network of a trained one.
pub(super) fn run(args: &ConvertArgs, cx: &Context) -> Result<()> {
    let weights = || read_tensors(&args.weights);
    match args.task.kind() {
        TaskKind::Classify => {
            args.shape.classifier()?;
            let images = args.data.read(None, false)?;
            let control = args.task.control(args.control);
            let config = args.shape.config(&images, control, Sampling::Uniform, None)?;
            must_be_additive(config.mip.additive)?;
            save(args, &config.draw(Some(weights()?), cx)?, &config, cx)
        }
        TaskKind::Register => {
            let config = register::configure(&args.data, &args.shape, Sampling::Uniform)?.0;
            must_be_additive(config.mip.additive)?;
            save(args, &config.draw(Some(weights()?), cx)?, &config, cx)
        }
        TaskKind::Scale => {
            let config = scale::configure(&args.data, &args.shape, Sampling::Uniform)?.0;
            must_be_additive(config.mip.additive)?;
            save(args, &config.draw(Some(weights()?), cx)?, &config, cx)
        }
    }
}

fn must_be_additive(additive: bool) -> Result<()> {
    match additive {
        true => Ok(()),
        false => Err(Error::usage("this parametrisation has no place for trained weights")
            .hint("convert with --param mip or --param residual")),
    }
}

fn save<M: Module + ModuleDisplay>(
    args: &ConvertArgs,
    model: &MipHyper<M>,
    config: &impl Serialize,
    cx: &Context,
) -> Result<()> {
    let folder = ModelFolder::new(&args.out);
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(model))?;
    folder.save_config(KIND, config)?;
    let names: Vec<&str> = model.spec().params().iter().map(|param| param.name.as_str()).collect();
    let result = json!({ "model": args.out, "weights": model.spec().numel(), "conditioned": names });
    cx.emit(&result, |_| {
        format!(
            "{} weights depend on the condition: {}\nmodel in {}\n",
            model.spec().numel(),
            names.join(", "),
            args.out.display()
        )
    })
}
