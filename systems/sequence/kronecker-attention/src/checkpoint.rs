//! Trained models on disk.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Int, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result};
use serde::{Deserialize, Serialize};

use crate::data::Coding;
use crate::model::{Input, KroneckerTransformer, KroneckerTransformerConfig, Target, Tokens};

/// The slug, and the kind of model folders.
pub const KIND: &str = "kronecker-attention";

/// What `config.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The network.
    pub network: KroneckerTransformerConfig,
    /// From tokens and labels to numbers.
    pub coding: Coding,
}

impl Config {
    /// Makes sure that network and coding speak of the same inputs, labels and classes.
    fn check(&self, folder: &ModelFolder) -> Result<()> {
        let Self { network, coding } = self;
        let symbols = match coding.input {
            Input::Embed(symbols) => symbols,
            _ => coding.vocabulary.len(),
        };
        let fit = network.input == coding.input
            && network.target == coding.target
            && network.classes == coding.classes.len()
            && symbols == coding.vocabulary.len();
        if fit {
            return Ok(());
        }
        let found = "\"network\" and \"coding\" differ in input, target, vocabulary or classes";
        Err(Error::input(folder.file("config.json").display(), found)
            .hint("was it edited by hand? train the model again"))
    }
}

/// Reads a model folder.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<(Config, KroneckerTransformer)> {
    let folder = ModelFolder::new(path);
    let config: Config = folder.config(KIND)?;
    config.network.check()?;
    config.check(&folder)?;
    let model = folder.weights()?.into_module(config.network.init(&cx.device))?;
    Ok((config, model))
}

/// Length of the example input; a captured graph has it fixed.
const EXAMPLE_LENGTH: usize = 8;

/// A trained model from tokens to logits, for capture.
pub(crate) struct Classifier {
    model: KroneckerTransformer,
}

impl Classifier {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        Ok(Self { model: open(path, cx)?.1 })
    }
}

impl Network for Classifier {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let (kind, shape) = match self.model.config().input {
            Input::Numeric(width) => (PortKind::Float, vec![1, EXAMPLE_LENGTH, width]),
            _ => (PortKind::Int, vec![1, EXAMPLE_LENGTH]),
        };
        vec![Port { name: "tokens".into(), kind, shape }]
    }

    fn outputs(&self) -> Vec<Port> {
        let config = self.model.config();
        let labels = match config.target {
            Target::Token => EXAMPLE_LENGTH,
            Target::Sequence => 1,
        };
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape: vec![1, labels, config.classes] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.model = self.model.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let tokens = |x: DispatchTensor| match self.model.config().input {
            Input::Numeric(_) => Tokens::Vectors(Tensor::from_dispatch(x)),
            _ => Tokens::Ids(Tensor::<2, Int>::from_dispatch(x)),
        };
        inputs.into_iter().map(|x| self.model.forward(tokens(x), None).into_dispatch()).collect()
    }
}
