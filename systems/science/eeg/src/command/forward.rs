//! `kiln eeg forward`

use std::fs;
use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::{read_tensors, write_tensors};
use serde_json::{Map, Value, json};

use crate::model::{Arch, ModelConfig, from_braindecode};

/// Settings that any of the networks has; those that the one at hand lacks are passed over.
const KEYS: [&str; 13] = [
    "n_chans",
    "n_outputs",
    "n_times",
    "final_conv_length",
    "n_filters_time",
    "n_filters_spat",
    "n_filters_2",
    "n_filters_3",
    "n_filters_4",
    "n_blocks",
    "n_filters",
    "kernel_size",
    "drop_prob",
];

#[derive(Debug, Args)]
pub(super) struct ForwardArgs {
    /// Which network
    #[arg(long, value_enum)]
    model: Arch,
    /// JSON file with n_chans, n_outputs, n_times and the network's own settings; what is missing is the paper's
    #[arg(long)]
    config: PathBuf,
    /// .safetensors or .npz file with the weights, named as in braindecode
    #[arg(long)]
    weights: PathBuf,
    /// .safetensors or .npz file with input0, input1, … [batch, channels, samples]
    #[arg(long)]
    input: PathBuf,
    /// .safetensors or .npz file to write: output0, output1, …
    #[arg(long, default_value = "outputs.safetensors")]
    out: PathBuf,
}

/// Runs a network on prepared tensors.
pub(super) fn run(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let mut inputs = read_tensors(&args.input)?;
    let mut weights = read_tensors(&args.weights)?;
    let first = inputs.get("input0").and_then(|x| x.shape.last().copied());
    let config = read_config(args, first)?;
    config.check()?;
    from_braindecode(&mut weights);
    let model = weights.into_module(config.init(&cx.device))?;
    let mut outputs = TensorFile::new();
    for number in 0.. {
        let name = format!("input{number}");
        if inputs.get(&name).is_none() && number > 0 {
            break;
        }
        let x = inputs.take_float::<3>(&name, &cx.device)?;
        let [_, channels, samples] = x.dims();
        if channels != config.n_chans() || config.predictions(samples) == 0 {
            let found = format!("{name} has {channels} channels of {samples} samples");
            return Err(Error::input(args.input.display(), found).hint(format!(
                "the network takes {} channels of at least {} samples",
                config.n_chans(),
                config.receptive()
            )));
        }
        let mut y = HostTensor::from_tensor(model.forward(x));
        // One prediction is a matter of the whole window, as braindecode has it.
        if y.shape[2] == 1 {
            y.shape.pop();
        }
        outputs.insert(format!("output{number}"), y);
    }
    write_tensors(&args.out, &outputs)?;
    let shapes: Map<String, Value> = outputs
        .names()
        .filter_map(|name| Some((name.to_string(), json!(outputs.get(name)?.shape))))
        .collect();
    cx.emit(&json!({ "out": args.out, "outputs": shapes }), |_| {
        format!("{} outputs in {}\n", shapes.len(), args.out.display())
    })
}

fn read_config(args: &ForwardArgs, samples: Option<usize>) -> Result<ModelConfig> {
    let path = &args.config;
    let malformed = |e: serde_json::Error| {
        Error::input(path.display(), "does not describe this network")
            .caused_by(e)
            .hint("write a JSON object such as {\"n_chans\": 21, \"n_outputs\": 2, \"n_times\": 600}")
    };
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let mut given: Map<String, Value> = serde_json::from_str(&text).map_err(malformed)?;
    let known = serde_json::to_value(ModelConfig::new(args.model, 1, 1, 1)).map_err(malformed)?;
    given.retain(|key, _| known.get(key).is_some() || !KEYS.contains(&key.as_str()));
    if let Some(samples) = samples {
        given.entry("n_times").or_insert(samples.into());
    }
    given.insert("model".into(), known["model"].clone());
    serde_json::from_value(given.into()).map_err(malformed)
}
