//! The nine classifiers, as `torchvision` has them to the last name, and the two U-Nets.
//!
//! A classifier has two halves: its convolutions make *activations* `[batch, channels, rows, columns]`, and a *head* makes
//! logits of them. What [`cam`](crate::cam) shows are the activations.

mod densenet;
mod freeze;
mod inception;
mod mobilenet;
mod names;
mod parts;
mod resnet;
mod squeezenet;
mod unet;
mod vgg;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use clap::ValueEnum;
use kiln_core::{Error, Result, TensorFile};
use serde::{Deserialize, Serialize};

pub use densenet::{DenseNet, DenseNetConfig};
pub use freeze::{Freeze, freeze};
pub use inception::{Inception, InceptionConfig};
pub use mobilenet::{MobileNet, MobileNetConfig};
pub use names::{Transfer, fill, formula, state, torchvision_name};
pub use resnet::{ResNet, ResNetConfig};
pub use squeezenet::{SqueezeNet, SqueezeNetConfig};
pub use unet::{DIVISOR, Segmenter, UNet, UNetConfig};
pub use vgg::{Vgg, VggConfig};

/// Which classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Net {
    /// ResNet-18
    #[value(name = "resnet18")]
    Resnet18,
    /// ResNet-50
    #[value(name = "resnet50")]
    Resnet50,
    /// ResNet-101
    #[value(name = "resnet101")]
    Resnet101,
    /// CheXNet, which is DenseNet-121
    #[value(name = "chexnet", alias = "densenet121")]
    Chexnet,
    /// Inception v3
    #[value(name = "inception", alias = "inception_v3")]
    Inception,
    /// VGG-19
    #[value(name = "vgg19")]
    Vgg19,
    /// DenseNet-201
    #[value(name = "densenet201")]
    Densenet201,
    /// SqueezeNet 1.0
    #[value(name = "squeezenet", alias = "squeezenet1_0")]
    Squeezenet,
    /// SqueezeNet 1.1
    #[value(name = "squeezenet1_1")]
    #[serde(rename = "squeezenet1_1")]
    Squeezenet11,
    /// MobileNetV2
    #[value(name = "mobilenet", alias = "mobilenet_v2")]
    Mobilenet,
}

impl Net {
    /// The nine of the paper.
    pub const PAPER: [Self; 9] = [
        Self::Resnet18,
        Self::Resnet50,
        Self::Resnet101,
        Self::Chexnet,
        Self::Inception,
        Self::Vgg19,
        Self::Densenet201,
        Self::Squeezenet,
        Self::Mobilenet,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resnet18 => "resnet18",
            Self::Resnet50 => "resnet50",
            Self::Resnet101 => "resnet101",
            Self::Chexnet => "chexnet",
            Self::Inception => "inception",
            Self::Vgg19 => "vgg19",
            Self::Densenet201 => "densenet201",
            Self::Squeezenet => "squeezenet",
            Self::Squeezenet11 => "squeezenet1_1",
            Self::Mobilenet => "mobilenet",
        }
    }

    /// Rows and columns of the images that its weights were made for.
    pub fn size(self) -> usize {
        match self {
            Self::Inception => 299,
            Self::Squeezenet | Self::Squeezenet11 => 227,
            _ => 224,
        }
    }

    /// Rows and columns below which nothing is left of an image.
    fn least_size(self) -> usize {
        match self {
            Self::Inception => 75,
            Self::Squeezenet | Self::Squeezenet11 => 21,
            _ => 32,
        }
    }

    /// Where the names of the classifier's parameters begin.
    pub fn head(self) -> &'static [&'static str] {
        match self {
            Self::Resnet18 | Self::Resnet50 | Self::Resnet101 => &["fc."],
            Self::Inception => &["fc.", "AuxLogits.fc."],
            Self::Chexnet | Self::Densenet201 => &["classifier."],
            Self::Vgg19 => &["classifier.6."],
            Self::Squeezenet | Self::Squeezenet11 | Self::Mobilenet => &["classifier.1."],
        }
    }
}

/// Configuration of a [`Classifier`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClassifierConfig {
    /// Which network.
    pub net: Net,
    /// Number of classes.
    pub classes: usize,
    /// Factor of all widths; 1 is the published network.
    pub width: f64,
    /// Rows and columns of images.
    pub size: usize,
}

impl ClassifierConfig {
    /// The published network.
    pub fn new(net: Net, classes: usize) -> Self {
        Self { net, classes, width: 1.0, size: net.size() }
    }

    /// Makes sure that the network can be built and sees something.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn check(&self) -> Result<()> {
        if !(1..=1 << 16).contains(&self.classes) {
            return Err(Error::usage(format!("a network of {} classes", self.classes)));
        }
        if !(self.width.is_finite() && (0.01..=4.0).contains(&self.width)) {
            return Err(Error::usage(format!("--width {} must lie between 0.01 and 4", self.width)));
        }
        let least = self.net.least_size();
        if self.size < least || self.size > 4096 {
            return Err(Error::usage(format!("--size {} does not suit {}", self.size, self.net.name()))
                .hint(format!("images must have {least} to 4096 pixels on a side")));
        }
        Ok(())
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Classifier {
        let (classes, width) = (self.classes, self.width);
        let resnet = |config: ResNetConfig| Classifier::ResNet(ResNetConfig { width, ..config }.init(device));
        let dense =
            |config: DenseNetConfig| Classifier::DenseNet(DenseNetConfig { width, ..config }.init(device));
        let squeeze = |config: SqueezeNetConfig| {
            Classifier::SqueezeNet(SqueezeNetConfig { width, ..config }.init(device))
        };
        match self.net {
            Net::Resnet18 => resnet(ResNetConfig::resnet18(classes)),
            Net::Resnet50 => resnet(ResNetConfig::resnet50(classes)),
            Net::Resnet101 => resnet(ResNetConfig::resnet101(classes)),
            Net::Chexnet => dense(DenseNetConfig::densenet121(classes)),
            Net::Densenet201 => dense(DenseNetConfig::densenet201(classes)),
            Net::Squeezenet => squeeze(SqueezeNetConfig::squeezenet1_0(classes)),
            Net::Squeezenet11 => squeeze(SqueezeNetConfig::squeezenet1_1(classes)),
            Net::Vgg19 => Classifier::Vgg(VggConfig { width, classes }.init(device)),
            Net::Inception => Classifier::Inception(InceptionConfig { width, classes }.init(device)),
            Net::Mobilenet => Classifier::MobileNet(MobileNetConfig { width, classes }.init(device)),
        }
    }

    /// Puts weights of `torchvision` into a network that was just drawn; its classifier stays as drawn where it has other
    /// classes.
    ///
    /// # Errors
    /// Names the first tensor that does not fit.
    pub fn transfer(&self, network: Classifier, weights: TensorFile) -> Result<(Classifier, Transfer)> {
        names::transfer(network, weights, self.net.head())
    }
}

/// One of the classifiers.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there are few networks at a time")]
pub enum Classifier {
    /// ResNet
    ResNet(ResNet),
    /// DenseNet, CheXNet
    DenseNet(DenseNet),
    /// Inception v3
    Inception(Inception),
    /// VGG
    Vgg(Vgg),
    /// SqueezeNet
    SqueezeNet(SqueezeNet),
    /// MobileNetV2
    MobileNet(MobileNet),
}

/// Calls the same method of whichever network it is.
macro_rules! each {
    ($value:expr, $network:ident => $call:expr) => {
        match $value {
            Classifier::ResNet($network) => $call,
            Classifier::DenseNet($network) => $call,
            Classifier::Inception($network) => $call,
            Classifier::Vgg($network) => $call,
            Classifier::SqueezeNet($network) => $call,
            Classifier::MobileNet($network) => $call,
        }
    };
}

impl Classifier {
    /// Logits.
    ///
    /// # Shapes
    /// - x: `[batch, 3, height, width]`
    /// - output: `[batch, classes]`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        self.head(self.activations(x))
    }

    /// Logits, and those of an auxiliary classifier where the network trains with one.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    pub fn forward_with_aux(&self, x: Tensor<4>) -> (Tensor<2>, Option<Tensor<2>>) {
        match self {
            Self::Inception(network) => network.forward_with_aux(x),
            _ => (self.forward(x), None),
        }
    }

    /// What the last convolutions put out, `[batch, channels, rows, columns]`.
    pub fn activations(&self, x: Tensor<4>) -> Tensor<4> {
        each!(self, network => network.activations(x))
    }

    /// What the middle of the network puts out, about an eighth of the image in rows and columns: for maps of images so
    /// small that hardly anything is left of them at the end.
    pub fn middle(&self, x: Tensor<4>) -> Tensor<4> {
        each!(self, network => network.middle(x))
    }

    /// Logits of activations, `[batch, classes]`.
    pub fn head(&self, activations: Tensor<4>) -> Tensor<2> {
        each!(self, network => network.head(activations))
    }

    /// Mean activations of every channel, `[batch, channels]`: what an image is to the classifier.
    pub fn embed(&self, activations: Tensor<4>) -> Tensor<2> {
        parts::global_mean(parts::relu(activations))
    }
}
