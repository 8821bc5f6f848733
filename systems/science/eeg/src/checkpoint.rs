//! Trained models on disk.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result};
use serde::{Deserialize, Serialize};

use crate::dataset::Dataset;
use crate::model::{Model, ModelConfig};
use crate::pipeline::Pipeline;

/// The slug, and the kind of model folders.
pub const KIND: &str = "eeg";

/// What `config.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The network.
    pub network: ModelConfig,
    /// Names of its channels, in order.
    pub channels: Vec<String>,
    /// What was done to the recordings that it learned from, and must be done to others.
    pub pipeline: Pipeline,
    /// Divides log-probabilities: 1, or what calibration found.
    pub temperature: f64,
}

impl Config {
    /// Samples from one window to the next: as many as a window has predictions, so that predictions follow one another
    /// without gaps; trial-wise, the whole window.
    pub fn stride(&self) -> usize {
        stride(&self.network)
    }

    /// Makes sure that recordings were prepared as the network needs them.
    ///
    /// # Errors
    /// Names what differs.
    pub fn check_data(&self, data: &Dataset, source: &Path) -> Result<()> {
        if data.channels != self.channels {
            let found = format!("has the channels {}", data.channels.join(", "));
            return Err(Error::input(source.display(), found)
                .hint(format!("the model was trained on {}", self.channels.join(", "))));
        }
        if data.pipeline.rate != self.pipeline.rate || data.pipeline.normalise != self.pipeline.normalise {
            let (theirs, ours) = (&data.pipeline, &self.pipeline);
            let found = format!("has {} samples a second, normalised by {:?}", theirs.rate, theirs.normalise);
            return Err(Error::input(source.display(), found).hint(format!(
                "the model was trained on {} samples a second, normalised by {:?}; prepare the recordings so",
                ours.rate, ours.normalise
            )));
        }
        Ok(())
    }
}

/// See [`Config::stride`].
pub fn stride(network: &ModelConfig) -> usize {
    let is_dense = match network {
        ModelConfig::Shallow(config) => config.dense,
        ModelConfig::Deep4(config) => config.dense,
        ModelConfig::EegNet(config) => config.dense,
        ModelConfig::Tcn(_) => true,
    };
    if is_dense { network.predictions(network.n_times()) } else { network.n_times() }
}

/// Reads the folder of a model.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<(Config, Model)> {
    let folder = ModelFolder::new(path);
    let config: Config = folder.config(KIND)?;
    let place = folder.file("config.json");
    config.network.check().map_err(|e| Error::input(place.display(), e.to_string()))?;
    config.pipeline.check().map_err(|e| Error::input(place.display(), e.to_string()))?;
    if config.channels.len() != config.network.n_chans() {
        let found =
            format!("names {} channels for a network of {}", config.channels.len(), config.network.n_chans());
        return Err(Error::input(place.display(), found));
    }
    if !(config.temperature.is_finite() && config.temperature > 0.0) {
        return Err(Error::input(place.display(), format!("the temperature is {}", config.temperature)));
    }
    let model = folder.weights()?.into_module(config.network.init(&cx.device))?;
    Ok((config, model))
}

/// A trained model for other systems.
pub struct Trained {
    config: Config,
    model: Model,
}

impl Trained {
    /// Reads the folder of a model.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        let (config, model) = open(path, cx)?;
        Ok(Self { config, model })
    }
}

impl Network for Trained {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let network = &self.config.network;
        let shape = vec![1, network.n_chans(), network.n_times()];
        vec![Port { name: "eeg".into(), kind: PortKind::Float, shape }]
    }

    fn outputs(&self) -> Vec<Port> {
        let network = &self.config.network;
        let shape = vec![1, network.n_outputs(), network.predictions(network.n_times())];
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        self.model = self.model.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let outputs =
            inputs.into_iter().map(|x| self.model.forward(Tensor::<3>::from_dispatch(x)).into_dispatch());
        outputs.collect()
    }
}
