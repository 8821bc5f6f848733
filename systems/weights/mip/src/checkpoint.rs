//! Trained models on disk.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor};
use clap::ValueEnum;
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result, TensorFile};
use kiln_nn::initialise;
use serde::{Deserialize, Serialize};

use crate::arch::{Classifier, ClassifierConfig};
use crate::classify::{Control, Sampling};
use crate::convert::{MipConfig, MipHyper};
use crate::encoding::Range;
use crate::hypernet::HyperNetConfig;
use crate::unet::{UNet, UNetConfig};

/// The slug, and the kind of model folders.
pub const KIND: &str = "mip";

/// What a model was trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskKind {
    /// To classify images
    Classify,
    /// To deform one image into another
    Register,
    /// To tell what belongs to an object, at a scale of one's choice
    Scale,
}

/// What the model in a folder was trained for.
///
/// # Errors
/// When the folder holds no such model, or a network for one condition.
pub fn task(path: &Path) -> Result<TaskKind> {
    let value = ModelFolder::new(path).config_value()?;
    if value.get("gamma").is_some() {
        return Err(Error::input(path.display(), "holds a network for one condition")
            .hint("a hypernetwork is needed, as `kiln mip train` or `kiln mip convert` writes it"));
    }
    serde_json::from_value(value.get("task").cloned().unwrap_or_default()).map_err(|e| {
        Error::input(path.display(), "names no task that Kiln knows")
            .caused_by(e)
            .hint("was it written by `kiln mip`?")
    })
}

/// What `config.json` holds of a classifier whose weights depend on a condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// [`TaskKind::Classify`]
    pub task: TaskKind,
    /// The network.
    pub network: ClassifierConfig,
    /// How its weights depend on the condition.
    pub mip: MipConfig,
    /// What the condition means.
    pub control: Control,
    /// How it was drawn in training.
    pub sampling: Sampling,
    /// The condition in the user's own units.
    pub ranges: Vec<Range>,
    /// What the classes are called.
    pub classes: Vec<String>,
    /// The value of white in tables of pixels.
    pub white: f64,
}

impl Config {
    /// A condition in the user's own words: categories by name, numbers by their value.
    pub fn describe(&self, gamma: &[f32]) -> String {
        let words: Vec<String> = self.ranges.iter().zip(gamma).map(|(range, &x)| range.word(x)).collect();
        words.join(";")
    }

    /// Draws an untrained model; its network has the weights of `base`, where there is one.
    ///
    /// # Errors
    /// When the settings do not fit.
    pub fn draw(&self, base: Option<TensorFile>, cx: &Context) -> Result<MipHyper<Classifier>> {
        self.network.check()?;
        let net = initialise(&cx.device, &mut cx.rng("init", 0), |device| self.network.init(device));
        let net = match base {
            Some(weights) => weights.into_module(net)?,
            None => net,
        };
        self.mip.draw(net, &mut cx.rng("init", 1), &cx.device)
    }
}

/// The numbers of categories that [`HyperNetConfig::categories`] wants of components.
pub fn numbers_of_categories(ranges: &[Range]) -> Vec<usize> {
    match ranges.iter().all(Range::is_number) {
        true => Vec::new(),
        false => ranges.iter().map(|range| range.categories.len()).collect(),
    }
}

/// What `config.json` holds of a network that registers images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RegisterConfig {
    /// [`TaskKind::Register`]
    pub task: TaskKind,
    /// The network.
    pub network: UNetConfig,
    /// How its weights depend on the condition.
    pub mip: MipConfig,
    /// How the condition was drawn in training.
    pub sampling: Sampling,
    /// Height and width of the images.
    pub image: [usize; 2],
    /// The value of white in tables of pixels.
    pub white: f64,
}

impl RegisterConfig {
    /// Draws an untrained model; its network has the weights of `base`, where there are any.
    ///
    /// # Errors
    /// When the settings do not fit.
    pub fn draw(&self, base: Option<TensorFile>, cx: &Context) -> Result<MipHyper<UNet>> {
        draw_unet(self.network, &self.mip, base, cx)
    }
}

/// Draws an untrained hypernetwork for a U-Net.
fn draw_unet(
    network: UNetConfig,
    mip: &MipConfig,
    base: Option<TensorFile>,
    cx: &Context,
) -> Result<MipHyper<UNet>> {
    network.check()?;
    let net = initialise(&cx.device, &mut cx.rng("init", 0), |device| network.init(device));
    let net = match base {
        Some(weights) => weights.into_module(net)?,
        None => net,
    };
    mip.draw(net, &mut cx.rng("init", 1), &cx.device)
}

/// Reads the folder of a model that registers images.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open_register(path: &Path, cx: &Context) -> Result<(RegisterConfig, MipHyper<UNet>)> {
    let folder = ModelFolder::new(path);
    let config: RegisterConfig = folder.config(KIND)?;
    let model = folder.weights()?.into_module(config.draw(None, cx)?)?;
    Ok((config, model))
}

/// What `config.json` holds of a network that segments images at any scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScaleConfig {
    /// [`TaskKind::Scale`]
    pub task: TaskKind,
    /// The network.
    pub network: UNetConfig,
    /// How its weights depend on the scale.
    pub mip: MipConfig,
    /// How the scale was drawn in training.
    pub sampling: Sampling,
    /// Channels, height and width of the images.
    pub image: [usize; 3],
}

impl ScaleConfig {
    /// Draws an untrained model; its network has the weights of `base`, where there are any.
    ///
    /// # Errors
    /// When the settings do not fit.
    pub fn draw(&self, base: Option<TensorFile>, cx: &Context) -> Result<MipHyper<UNet>> {
        draw_unet(self.network, &self.mip, base, cx)
    }
}

/// Reads the folder of a model that segments images.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open_scale(path: &Path, cx: &Context) -> Result<(ScaleConfig, MipHyper<UNet>)> {
    let folder = ModelFolder::new(path);
    let config: ScaleConfig = folder.config(KIND)?;
    let model = folder.weights()?.into_module(config.draw(None, cx)?)?;
    Ok((config, model))
}

/// What `config.json` holds of a network for one condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlainConfig {
    /// The network.
    pub network: ClassifierConfig,
    /// The condition, between 0 and 1.
    pub gamma: Vec<f32>,
    /// What the classes are called.
    pub classes: Vec<String>,
}

/// Reads a model folder.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<(Config, MipHyper<Classifier>)> {
    if task(path)? != TaskKind::Classify {
        return Err(Error::input(path.display(), "holds a model that registers or segments images")
            .hint("this verb is about classifiers"));
    }
    let folder = ModelFolder::new(path);
    let config: Config = folder.config(KIND)?;
    let HyperNetConfig { gamma_dim, categories, .. } = &config.mip.hypernet;
    if config.ranges.len() != *gamma_dim
        || *categories != numbers_of_categories(&config.ranges)
        || config.classes.len() != config.network.classes
    {
        return Err(Error::input(
            folder.file("config.json").display(),
            "\"ranges\" or \"classes\" do not fit the rest",
        )
        .hint("was it edited by hand? train the model again"));
    }
    let model = folder.weights()?.into_module(config.draw(None, cx)?)?;
    Ok((config, model))
}

/// What `config.json` holds of a U-Net for one condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlainUNetConfig {
    /// [`TaskKind::Register`] or [`TaskKind::Scale`]
    pub task: TaskKind,
    /// The network.
    pub network: UNetConfig,
    /// The condition, between 0 and 1.
    pub gamma: Vec<f32>,
    /// Height and width of the images.
    pub image: [usize; 2],
}

impl PlainUNetConfig {
    /// What the network makes of images: displacements in pixels, or logits at the factor of its condition.
    fn forward(&self, net: &UNet, x: Tensor<4>) -> Tensor<4> {
        match (self.task, self.gamma.first()) {
            (TaskKind::Scale, Some(&factor)) => net.forward_at(x, factor.into()),
            _ => net.forward(x),
        }
    }
}

/// A network for one condition, for capture.
#[allow(clippy::large_enum_variant, reason = "one is opened at a time")]
pub(crate) enum Plain {
    /// From images to logits of classes.
    Classifier(PlainConfig, Classifier),
    /// From images to a value or two for each pixel.
    UNet(PlainUNetConfig, UNet),
}

impl Plain {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        let folder = ModelFolder::new(path);
        let value = folder.config_value()?;
        if value.get("gamma").is_none() {
            return Err(Error::input(
                path.display(),
                "holds a hypernetwork, whose weights depend on a condition",
            )
            .hint(
                "write the network for one condition first: kiln mip export --model DIR --gamma 0.5 --to DIR",
            ));
        }
        if value.get("task").is_some() {
            let config: PlainUNetConfig = folder.config(KIND)?;
            config.network.check()?;
            let net = folder.weights()?.into_module(config.network.init(&cx.device))?;
            return Ok(Self::UNet(config, net));
        }
        let config: PlainConfig = folder.config(KIND)?;
        config.network.check()?;
        let net = folder.weights()?.into_module(config.network.init(&cx.device))?;
        Ok(Self::Classifier(config, net))
    }
}

impl Network for Plain {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let [channels, height, width] = match self {
            Self::Classifier(config, _) => config.network.image,
            Self::UNet(config, _) => [config.network.inputs, config.image[0], config.image[1]],
        };
        vec![Port { name: "images".into(), kind: PortKind::Float, shape: vec![1, channels, height, width] }]
    }

    fn outputs(&self) -> Vec<Port> {
        let port = |name: &str, shape| vec![Port { name: name.into(), kind: PortKind::Float, shape }];
        match self {
            Self::Classifier(config, _) => port("logits", vec![1, config.network.classes]),
            Self::UNet(config, _) => {
                let name = if config.task == TaskKind::Register { "displacements" } else { "logits" };
                port(name, vec![1, config.network.outputs, config.image[0], config.image[1]])
            }
        }
    }

    fn move_to(&mut self, device: &Device) {
        match self {
            Self::Classifier(_, net) => *net = net.clone().to_device(device),
            Self::UNet(_, net) => *net = net.clone().to_device(device),
        }
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let run = |x| match self {
            Self::Classifier(_, net) => net.forward(Tensor::from_dispatch(x)).into_dispatch(),
            Self::UNet(config, net) => config.forward(net, Tensor::from_dispatch(x)).into_dispatch(),
        };
        inputs.into_iter().map(run).collect()
    }
}
