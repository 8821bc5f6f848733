//! `kiln hypernet generate`

use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData};
use clap::Args;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use serde_json::json;

use crate::conditioning::{Condition, Conditioning};
use crate::model;

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// The task whose weights to write
    #[arg(long)]
    task: Option<String>,
    /// The descriptor whose weights to write, in the table's units
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    given: Vec<f32>,
    /// .safetensors file to write
    #[arg(long)]
    to: PathBuf,
}

/// Writes the weights of the target for a task or descriptor.
pub(super) fn run(args: &GenerateArgs, cx: &Context) -> Result<()> {
    let (config, hyper) = model::open(&args.model, cx)?;
    let mut condition = Condition::default();
    for part in &config.hyper.conditioning {
        match *part {
            Conditioning::Task { .. } => {
                let names = config.coding.tasks.join(", ");
                let task = args.task.as_ref().ok_or_else(|| {
                    Error::usage("--task is needed").hint(format!("the model knows {names}"))
                })?;
                let number = config.coding.tasks.iter().position(|name| name == task).ok_or_else(|| {
                    Error::usage(format!("there is no task \"{task}\""))
                        .hint(format!("the model knows {names}"))
                })?;
                condition.tasks = Some(vec![number]);
            }
            Conditioning::Given { dim } => {
                if args.given.len() != dim || args.given.iter().any(|value| !value.is_finite()) {
                    return Err(Error::usage(format!(
                        "--given has {} numbers, needs {dim}",
                        args.given.len()
                    ))
                    .hint(format!("they are {}", config.coding.columns.given.join(", "))));
                }
                let scaled = args
                    .given
                    .iter()
                    .zip(&config.coding.given_scale)
                    .map(|(v, [mean, std])| (v - mean) / std);
                let scaled = TensorData::new(scaled.collect::<Vec<f32>>(), [1, dim]);
                condition.given = Some(Tensor::from_data(scaled, &cx.device));
            }
            Conditioning::Noise { dim, law } => {
                condition.noise = Some(law.draw(1, dim, &mut cx.rng("predict", 0), &cx.device));
            }
            Conditioning::Data { .. } => {
                return Err(Error::usage("the model's weights depend on each row")
                    .hint("only weights for tasks, descriptors or noise can be written down"));
            }
        }
    }
    let weights = hyper.generate(&condition)?.flat.into_data().iter::<f32>().collect::<Vec<_>>();
    let mut file = TensorFile::new();
    let mut at = 0;
    for param in config.hyper.target.params() {
        file.insert(
            param.name.clone(),
            HostTensor::float(param.shape.clone(), weights[at..at + param.len()].to_vec()),
        );
        at += param.len();
    }
    // What a user of the weights must do to its inputs, and what the outputs are.
    let column = |which: usize| config.coding.scale.iter().map(|scale| scale[which]).collect::<Vec<f32>>();
    for (name, value) in [
        ("features", json!(config.coding.features)),
        ("mean", json!(column(0))),
        ("deviation", json!(column(1))),
        ("classes", json!(config.coding.classes)),
    ] {
        file.metadata.insert(name.into(), value.to_string());
    }
    file.write(&args.to)?;
    let names: Vec<&str> = file.names().collect();
    cx.emit(&json!({ "weights": at, "tensors": names, "file": args.to }), |_| {
        format!("{at} weights in {}: {}\n", args.to.display(), names.join(", "))
    })
}
