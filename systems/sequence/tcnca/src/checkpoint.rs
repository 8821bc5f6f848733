//! Trained models on disk.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Int, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result};
use kiln_nn::{LanguageModel, initialise};
use serde::{Deserialize, Serialize};

use crate::data::Coding;
use crate::model::{Input, Steps, TcncaClassifier, TcncaClassifierConfig, TcncaLm, TcncaLmConfig};
use crate::recall::Recall;

/// The slug, and the kind of model folders.
pub const KIND: &str = "tcnca";

/// Bytes of a text.
pub const BYTES: usize = 256;

/// What `config.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "lowercase")]
pub enum Config {
    /// A language model.
    Lm(TcncaLmConfig),
    /// A language model that has learned recall.
    Recall(RecallConfig),
    /// A classifier of sequences.
    Classify(ClassifyConfig),
}

/// Network and task of a model for recall.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecallConfig {
    /// The network.
    #[serde(flatten)]
    pub network: TcncaLmConfig,
    /// The task.
    pub recall: Recall,
}

/// Network and coding of a classifier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassifyConfig {
    /// The network.
    #[serde(flatten)]
    pub network: TcncaClassifierConfig,
    /// From sequences and labels to numbers.
    pub coding: Coding,
}

impl Config {
    /// Reads the configuration of a model folder; one of the reference networks need not name its kind.
    ///
    /// # Errors
    /// When it is missing, of another kind, or its numbers do not fit.
    pub fn read(folder: &ModelFolder) -> Result<Self> {
        let value = folder.config_value()?;
        let place = folder.file("config.json").display().to_string();
        let config: Self = match value.get("kind") {
            Some(_) => folder.config(KIND)?,
            None => serde_json::from_value(value)
                .map_err(|e| Error::input(&place, "does not describe a TCNCA network").caused_by(e))?,
        };
        config.check(&place)?;
        Ok(config)
    }

    fn check(&self, place: &str) -> Result<()> {
        let named = |e: Error| {
            let error = Error::input(place, &e);
            match e.hint_text() {
                Some(hint) => error.hint(hint),
                None => error,
            }
        };
        match self {
            Self::Lm(network) => network.check().map_err(named),
            Self::Recall(RecallConfig { network, recall }) => {
                network.check().and_then(|()| recall.check()).map_err(named)?;
                must_fit(place, network.vocab == recall.vocab(), "vocabulary and recall")
            }
            Self::Classify(ClassifyConfig { network, coding }) => {
                network.check().map_err(named)?;
                let fit = network.input == coding.input() && network.classes == coding.classes.len();
                must_fit(place, fit && coding.max_len > 0, "network and coding")
            }
        }
    }
}

fn must_fit(place: &str, fit: bool, what: &str) -> Result<()> {
    if fit {
        return Ok(());
    }
    Err(Error::input(place, format!("{what} do not fit together"))
        .hint("was it edited by hand? train the model again"))
}

/// A model with its configuration.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)]
pub enum Trained {
    /// A language model, with the recall task where it has learned that.
    Lm(Box<TcncaLm>, Option<Recall>),
    /// A classifier and its coding.
    Classifier(Box<TcncaClassifier>, TcncaClassifierConfig, Coding),
}

/// Reads a model folder.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<Trained> {
    let folder = ModelFolder::new(path);
    let config = Config::read(&folder)?;
    let weights = folder.weights()?;
    let lm = |network: &TcncaLmConfig, weights: kiln_core::TensorFile| {
        weights.into_module(network.init(&cx.device)).map(Box::new)
    };
    Ok(match config {
        Config::Lm(network) => Trained::Lm(lm(&network, weights)?, None),
        Config::Recall(RecallConfig { network, recall }) => Trained::Lm(lm(&network, weights)?, Some(recall)),
        Config::Classify(ClassifyConfig { network, coding }) => {
            let model = weights.into_module(network.init(&cx.device))?;
            Trained::Classifier(Box::new(model), network, coding)
        }
    })
}

/// Reads a language model.
///
/// # Errors
/// As [`open`], and when it is a classifier.
pub fn open_lm(path: &Path, cx: &Context) -> Result<TcncaLm> {
    match open(path, cx)? {
        Trained::Lm(model, _) => Ok(*model),
        Trained::Classifier(..) => Err(Error::input(path.display(), "is a classifier, not a language model")
            .hint("`kiln tcnca predict` and `eval --data` use it")),
    }
}

/// A network with parameters drawn from the context's seed.
pub fn draw_lm(config: &TcncaLmConfig, cx: &Context) -> TcncaLm {
    initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device))
}

/// A network with parameters drawn from the context's seed.
pub fn draw_classifier(config: &TcncaClassifierConfig, cx: &Context) -> TcncaClassifier {
    initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device))
}

/// Length of the example input; a captured graph has it fixed.
const EXAMPLE_LENGTH: usize = 64;

/// A trained model as a [`Network`], for capture.
pub(crate) struct TcncaNetwork(Trained);

impl TcncaNetwork {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        Ok(Self(open(path, cx)?))
    }
}

impl Network for TcncaNetwork {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let (kind, shape) = match &self.0 {
            Trained::Classifier(_, TcncaClassifierConfig { input: Input::Numbers(width), .. }, _) => {
                (PortKind::Float, vec![1, EXAMPLE_LENGTH, *width])
            }
            _ => (PortKind::Int, vec![1, EXAMPLE_LENGTH]),
        };
        vec![Port { name: "steps".into(), kind, shape }]
    }

    fn outputs(&self) -> Vec<Port> {
        let shape = match &self.0 {
            Trained::Lm(model, _) => vec![1, EXAMPLE_LENGTH, model.vocab_size()],
            Trained::Classifier(_, config, _) => vec![1, config.classes],
        };
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        match &mut self.0 {
            Trained::Lm(model, _) => **model = model.clone().to_device(device),
            Trained::Classifier(model, ..) => **model = model.clone().to_device(device),
        }
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let forward = |x: DispatchTensor| match &self.0 {
            Trained::Lm(model, _) => model.forward(Tensor::<2, Int>::from_dispatch(x)).into_dispatch(),
            Trained::Classifier(model, config, _) => {
                let steps = match config.input {
                    Input::Numbers(_) => Steps::Numbers(Tensor::from_dispatch(x)),
                    Input::Symbols(_) => Steps::Ids(Tensor::from_dispatch(x)),
                };
                model.forward(steps, None).into_dispatch()
            }
        };
        inputs.into_iter().map(forward).collect()
    }
}
