//! Trained models on disk.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result};
use serde::{Deserialize, Serialize};

use crate::image::Cxr;
use crate::metrics::{DECISION, calibrated};
use crate::networks::{Classifier, ClassifierConfig, DIVISOR, UNet, UNetConfig};
use crate::train::probability;

/// The slug, and the kind of model folders.
pub const KIND: &str = "chest-xray";

/// What `config.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "lowercase")]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Config {
    /// A classifier
    Classify(ClassifyConfig),
    /// A U-Net
    Segment(SegmentConfig),
}

/// Of a classifier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassifyConfig {
    /// The network.
    pub network: ClassifierConfig,
    /// What is done to images.
    pub cxr: Cxr,
    /// Whether it saw lungs alone.
    pub segmented: bool,
    /// Whether images were cut to the lungs.
    pub crop: bool,
    /// Probability from which an image is called tuberculosis.
    pub threshold: f64,
    /// Slope and shift that make probabilities what they say.
    pub platt: Option<[f64; 2]>,
}

/// Of a U-Net.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SegmentConfig {
    /// The network.
    pub network: UNetConfig,
    /// What is done to images.
    pub cxr: Cxr,
}

impl ClassifyConfig {
    /// Without calibration.
    pub fn new(network: ClassifierConfig, cxr: Cxr, segmented: bool, crop: bool) -> Self {
        Self { network, cxr, segmented, crop, threshold: DECISION, platt: None }
    }

    /// The probability that the margin between the logits of an image means.
    pub fn probability(&self, margin: f64) -> f64 {
        let p = probability(margin);
        self.platt.map_or(p, |platt| calibrated(p, platt))
    }

    fn check(&self) -> Result<()> {
        self.network.check()?;
        let finite = self.platt.iter().flatten().all(|x| x.is_finite());
        if self.network.classes != 2 || self.cxr.size != self.network.size {
            return Err(Error::usage(format!(
                "a network of {} classes for images of {} pixels, prepared with {}",
                self.network.classes, self.network.size, self.cxr.size
            )));
        }
        if !(0.0..=1.0).contains(&self.threshold) || !finite {
            return Err(Error::usage(format!(
                "the threshold is {}, the calibration {:?}",
                self.threshold, self.platt
            )));
        }
        Ok(())
    }
}

impl SegmentConfig {
    /// Makes sure that the network can be built for its images.
    ///
    /// # Errors
    /// Names what does not fit.
    pub fn check(&self) -> Result<()> {
        if !(1..=512).contains(&self.network.width) {
            return Err(Error::usage(format!("--width {} must lie between 1 and 512", self.network.width)));
        }
        let size = self.cxr.size;
        if size == 0 || size > 4096 || !size.is_multiple_of(DIVISOR) {
            return Err(Error::usage(format!(
                "--size {size} must be divisible by {DIVISOR}, and at most 4096"
            )));
        }
        Ok(())
    }
}

fn config(folder: &ModelFolder) -> Result<Config> {
    let config: Config = folder.config(KIND)?;
    let checked = match &config {
        Config::Classify(config) => config.check(),
        Config::Segment(config) => config.check(),
    };
    checked.map_err(|e| Error::input(folder.file("config.json").display(), e.to_string()))?;
    Ok(config)
}

/// The folders of the models at a path: the path itself, or its folds.
///
/// # Errors
/// When there is none.
pub fn model_folders(path: &Path) -> Result<Vec<PathBuf>> {
    if path.join("config.json").exists() {
        return Ok(vec![path.into()]);
    }
    let folds: Vec<PathBuf> = (1..)
        .map(|fold| path.join(fold_name(fold)))
        .take_while(|fold| fold.join("config.json").exists())
        .collect();
    if folds.is_empty() {
        return Err(Error::input(path.display(), "holds neither a model nor the folds of one")
            .hint("`kiln chest-xray train` writes models"));
    }
    Ok(folds)
}

/// The folder of a fold, counted from 1.
pub fn fold_name(fold: usize) -> String {
    format!("fold-{fold}")
}

/// Reads a classifier.
///
/// # Errors
/// When the folder is missing, damaged or of another kind.
pub fn open_classifier(path: &Path, cx: &Context) -> Result<(ClassifyConfig, Classifier)> {
    let folder = ModelFolder::new(path);
    match config(&folder)? {
        Config::Classify(config) => {
            let model = folder.weights()?.into_module(config.network.init(&cx.device))?;
            Ok((config, model))
        }
        Config::Segment(_) => Err(Error::input(path.display(), "finds lungs and does not classify")
            .hint("give it as --seg, and a model that `train` wrote as --model")),
    }
}

/// Reads a U-Net.
///
/// # Errors
/// As [`open_classifier`].
pub fn open_segmenter(path: &Path, cx: &Context) -> Result<(SegmentConfig, UNet)> {
    let folder = ModelFolder::new(path);
    match config(&folder)? {
        Config::Segment(config) => {
            let model = folder.weights()?.into_module(config.network.init(&cx.device))?;
            Ok((config, model))
        }
        Config::Classify(_) => Err(Error::input(path.display(), "classifies and does not find lungs")
            .hint("give a model that `train-seg` wrote")),
    }
}

/// A trained model for other systems.
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Trained {
    /// A classifier
    Classify(ClassifyConfig, Classifier),
    /// A U-Net
    Segment(SegmentConfig, UNet),
}

impl Trained {
    /// Reads the folder of a model.
    ///
    /// # Errors
    /// As [`open_classifier`].
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        match config(&ModelFolder::new(path))? {
            Config::Classify(_) => {
                open_classifier(path, cx).map(|(config, model)| Self::Classify(config, model))
            }
            Config::Segment(_) => {
                open_segmenter(path, cx).map(|(config, model)| Self::Segment(config, model))
            }
        }
    }
}

impl Network for Trained {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let (channels, size) = match self {
            Self::Classify(config, _) => (3, config.cxr.size),
            Self::Segment(config, _) => (1, config.cxr.size),
        };
        vec![Port { name: "image".into(), kind: PortKind::Float, shape: vec![1, channels, size, size] }]
    }

    fn outputs(&self) -> Vec<Port> {
        let shape = match self {
            Self::Classify(config, _) => vec![1, config.network.classes],
            Self::Segment(config, _) => vec![1, 1, config.cxr.size, config.cxr.size],
        };
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        match self {
            Self::Classify(_, model) => *model = model.clone().to_device(device),
            Self::Segment(_, model) => *model = model.clone().to_device(device),
        }
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let inputs = inputs.into_iter().map(Tensor::<4>::from_dispatch);
        match self {
            Self::Classify(_, model) => inputs.map(|x| model.forward(x).into_dispatch()).collect(),
            Self::Segment(_, model) => inputs.map(|x| model.forward(x).into_dispatch()).collect(),
        }
    }
}
