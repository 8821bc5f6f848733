//! Trained networks on disk.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, ModelFolder, Network, Port, PortKind, Result};
use serde::{Deserialize, Serialize};

use crate::arch::{Batch, Classifier, ClassifierConfig, Input};

/// The slug, and the kind of model folders.
pub const KIND: &str = "ptq";

/// What `config.json` holds of a trained network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The network.
    pub network: ClassifierConfig,
    /// What the classes are called.
    pub classes: Vec<String>,
    /// The value of white in tables of pixels.
    pub white: f64,
}

/// Reads the folder of a trained network.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<(Config, Classifier)> {
    let folder = ModelFolder::new(path);
    let config: Config = folder.config(KIND)?;
    config.network.check()?;
    let model = folder.weights()?.into_module(config.network.init(&cx.device))?;
    Ok((config, model))
}

/// A network for capture, one example at a time.
pub struct Trained {
    config: ClassifierConfig,
    net: Classifier,
}

impl Trained {
    /// A network in memory.
    pub fn new(config: ClassifierConfig, net: Classifier) -> Self {
        Self { config, net }
    }

    /// The network of a folder.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        let (config, net) = open(path, cx)?;
        Ok(Self { config: config.network, net })
    }
}

impl Network for Trained {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let (name, kind, shape) = match self.config.input {
            Input::Image([channels, height, width]) => {
                ("images", PortKind::Float, vec![1, channels, height, width])
            }
            Input::Text { length, .. } => ("tokens", PortKind::Int, vec![1, length]),
        };
        vec![Port { name: name.into(), kind, shape }]
    }

    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape: vec![1, self.config.classes] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.net = self.net.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let batch = |x| match self.config.input {
            Input::Image(_) => Batch::Images(Tensor::from_dispatch(x)),
            Input::Text { .. } => Batch::Tokens(Tensor::from_dispatch(x)),
        };
        inputs.into_iter().map(|x| self.net.forward(batch(x)).into_dispatch()).collect()
    }
}
