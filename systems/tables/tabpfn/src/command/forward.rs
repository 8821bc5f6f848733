//! `kiln tabpfn forward` and `kiln tabpfn import`

use std::path::PathBuf;

use burn::module::Module;
use clap::Args;
use kiln_core::{Context, Error, HostTensor, ModelFolder, Result, TensorFile};
use kiln_data::{read_tensors, write_tensors};
use serde_json::json;

use super::ModelArgs;
use crate::checkpoint;

#[derive(Debug, Args)]
pub(super) struct ForwardArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// .safetensors or .npz file with x [rows, batch, features], y [rows, batch] and single_eval_pos
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// .safetensors or .npz file to write, with logits [rows - single_eval_pos, batch, classes]
    #[arg(long)]
    out: PathBuf,
}

/// Runs the network on prepared tensors, laid out as the reference implementation has them: rows first.
pub(super) fn forward(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let model = args.model.open(cx)?;
    let mut file = read_tensors(&args.input)?;
    let refused = |found: String, hint: String| Err(Error::input(args.input.display(), found).hint(hint));
    let position = file.take("single_eval_pos")?;
    let labelled = match position.as_ints() {
        Some(&[labelled]) if labelled >= 1 => labelled as usize,
        _ => {
            return refused(
                "single_eval_pos is not one whole number of at least 1".into(),
                "write it as int64".into(),
            );
        }
    };
    let x = file.take_float::<3>("x", &cx.device)?;
    let y = file.take_float::<2>("y", &cx.device)?;
    let ([rows, batch, features], [labels, columns]) = (x.dims(), y.dims());
    if features != model.config().max_features {
        let found = format!("x has {features} features, the network takes {}", model.config().max_features);
        return refused(found, "pad narrower tables with zeros".into());
    }
    if labelled >= rows || labels < labelled || columns != batch {
        let found = format!("{labelled} labelled rows do not fit x {:?} and y {:?}", x.dims(), y.dims());
        return refused(found, "x is [rows, batch, features] with rows to classify, y [rows, batch]".into());
    }
    let y = y.narrow(0, 0, labelled);
    let classes = model.config().max_classes;
    let values: Vec<f32> = y.to_data().iter::<f32>().collect();
    if let Some(at) = values.iter().position(|y| !(0.0..classes as f32).contains(y) || y.fract() != 0.0) {
        let found = format!("the label of row {}, table {} is {}", at / batch, at % batch, values[at]);
        return refused(found, format!("labels are whole numbers from 0 to {}", classes - 1));
    }
    let logits = model.forward(x.swap_dims(0, 1), y.swap_dims(0, 1)).swap_dims(0, 1);
    let mut output = TensorFile::new();
    output.insert("logits", HostTensor::from_tensor(logits));
    write_tensors(&args.out, &output)?;
    let result = json!({ "out": args.out, "shape": [rows - labelled, batch, classes] });
    cx.emit(&result, |_| format!("logits of {} rows in {}\n", rows - labelled, args.out.display()))
}

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// Published weights as .safetensors
    #[arg(long)]
    checkpoint: PathBuf,
    /// JSON file with num_features, emsize, nhead, nhid, nlayers and max_num_classes; needed unless there are 4 heads
    #[arg(long)]
    config: Option<PathBuf>,
    /// Write numbers with half precision: half the size, as the shipped network is kept
    #[arg(long)]
    half: bool,
    /// Model folder to write
    #[arg(long)]
    out: PathBuf,
}

/// Makes a model folder of a published checkpoint.
pub(super) fn import(args: &ImportArgs, cx: &Context) -> Result<()> {
    let model = checkpoint::import(&args.checkpoint, args.config.as_deref(), cx)?;
    let folder = ModelFolder::new(&args.out);
    checkpoint::save(&model, &folder)?;
    if args.half {
        TensorFile::from_module(&model).write_half(&folder.file("model.safetensors"))?;
    }
    let (config, parameters) = (model.config(), model.num_params());
    let result = json!({ "model": args.out, "parameters": parameters, "network": config });
    cx.emit(&result, |_| {
        format!(
            "{parameters} parameters: {} layers of width {} with {} heads, up to {} columns and {} classes\n\
             model in {}\n",
            config.layers,
            config.emsize,
            config.heads,
            config.max_features,
            config.max_classes,
            args.out.display()
        )
    })
}
