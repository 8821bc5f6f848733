//! Trained models on disk.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result, TensorFile};
use kiln_nn::initialise;
use serde::{Deserialize, Serialize};

use crate::features::{FEATURES, FeatureOptions};
use crate::model::{MmCnn, MmCnnConfig};
use crate::names::from_elsewhere;

/// The slug, and the kind of model folders.
pub const KIND: &str = "btsbot";

/// What `config.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The network.
    pub network: MmCnnConfig,
    /// How features of packets are made.
    #[serde(default)]
    pub features: FeatureOptions,
    /// Divides logits: 1, or what calibration found.
    #[serde(default = "one")]
    pub temperature: f64,
}

fn one() -> f64 {
    1.0
}

impl Config {
    /// Of a network that is not calibrated.
    pub fn new(network: MmCnnConfig, features: FeatureOptions) -> Self {
        Self { network, features, temperature: 1.0 }
    }
}

/// An untrained network, drawn from the context's own stream.
pub fn new_model(config: &MmCnnConfig, cx: &Context) -> MmCnn {
    initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device))
}

/// Reads the folder of a model. Weights may have the names of the public PyTorch package.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<(Config, MmCnn)> {
    let folder = ModelFolder::new(path);
    let config: Config = folder.config(KIND)?;
    let place = folder.file("config.json");
    config.network.check().map_err(|e| Error::input(place.display(), e.to_string()))?;
    if !(config.temperature.is_finite() && config.temperature > 0.0) {
        return Err(Error::input(place.display(), format!("the temperature is {}", config.temperature)));
    }
    let mut weights = folder.weights()?;
    from_elsewhere(&mut weights, config.network.mode);
    let model = weights.into_module(config.network.init(&cx.device))?;
    Ok((config, model))
}

/// Writes the folder of a model.
///
/// # Errors
/// When a file cannot be written.
pub fn save(path: &Path, config: &Config, model: &MmCnn) -> Result<()> {
    let folder = ModelFolder::new(path);
    folder.create()?;
    folder.save_config(KIND, config)?;
    folder.save_weights(&TensorFile::from_module(model))
}

/// A trained model for other systems.
pub struct Trained {
    config: Config,
    model: MmCnn,
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
        let (mode, side) = (self.config.network.mode, self.config.network.side);
        let port = |name: &str, shape| Port { name: name.into(), kind: PortKind::Float, shape };
        let mut ports = Vec::new();
        if mode.sees_images() {
            ports.push(port("triplet", vec![1, 3, side, side]));
        }
        if mode.sees_metadata() {
            ports.push(port("metadata", vec![1, FEATURES.len()]));
        }
        ports
    }

    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape: vec![1, 1] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.model = self.model.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let mode = self.config.network.mode;
        let mut inputs = inputs.into_iter();
        let images = if mode.sees_images() { inputs.next().map(Tensor::<4>::from_dispatch) } else { None };
        let meta = if mode.sees_metadata() { inputs.next().map(Tensor::<2>::from_dispatch) } else { None };
        vec![self.model.forward_parts(images, meta).into_dispatch()]
    }
}
