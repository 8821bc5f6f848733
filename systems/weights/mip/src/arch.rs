//! The networks that come with the system: what a condition is put into.

use std::fmt;
use std::str::FromStr;

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{Device, Tensor};
use kiln_core::{Error, Result};
use kiln_nn::{
    BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, Dropout, DropoutConfig, Linear, LinearConfig,
};
use kiln_ops::max_pool2d;
use serde::{Deserialize, Serialize};

use crate::hypernet::Nonlinearity;

/// A classifier of images by its name: `mlp:32-32`, `lenet` or `resnet8`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Arch {
    /// A perceptron with these hidden widths.
    Mlp(Vec<usize>),
    /// Two convolutions and three linear layers (LeCun et al., 1998).
    Lenet,
    /// Three stages of one residual block each (He et al., 2016).
    Resnet8,
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let widths = |list: &str| -> Option<Vec<usize>> {
            list.split('-').map(|width| width.parse().ok().filter(|&w| w > 0)).collect()
        };
        match text.split_once(':') {
            None if text == "lenet" => Ok(Self::Lenet),
            None if text == "resnet8" => Ok(Self::Resnet8),
            None if text == "mlp" => Ok(Self::Mlp(Vec::new())),
            Some(("mlp", list)) => {
                widths(list).map(Self::Mlp).ok_or_else(|| format!("\"{list}\" is no list of widths"))
            }
            _ => Err(format!("there is no network \"{text}\": choose mlp:32-32, lenet or resnet8")),
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mlp(hidden) if hidden.is_empty() => f.write_str("mlp"),
            Self::Mlp(hidden) => {
                let widths: Vec<String> = hidden.iter().map(usize::to_string).collect();
                write!(f, "mlp:{}", widths.join("-"))
            }
            Self::Lenet => f.write_str("lenet"),
            Self::Resnet8 => f.write_str("resnet8"),
        }
    }
}

impl From<Arch> for String {
    fn from(arch: Arch) -> Self {
        arch.to_string()
    }
}

impl TryFrom<String> for Arch {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// Configuration of a [`Classifier`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassifierConfig {
    /// Which network.
    pub arch: Arch,
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Classes.
    pub classes: usize,
    /// What follows each layer.
    pub activation: Nonlinearity,
    /// Whether a batch norm comes before it.
    pub batch_norm: bool,
}

impl ClassifierConfig {
    /// Checks that the network suits the images.
    ///
    /// # Errors
    /// Tells what does not.
    pub fn check(&self) -> Result<()> {
        let [_, height, width] = self.image;
        if self.classes < 2 {
            return Err(Error::usage(format!("there must be at least two classes, not {}", self.classes))
                .hint("with a single class there is nothing to learn"));
        }
        if !matches!(self.arch, Arch::Mlp(_)) && (height < 8 || width < 8) {
            let message = format!("images of {width} x {height} pixels are too small for {}", self.arch);
            return Err(Error::usage(message).hint("convolutions need at least 8 x 8; take --arch mlp:32-32"));
        }
        Ok(())
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Classifier {
        let [channels, height, width] = self.image;
        let norm = |width: usize| self.batch_norm.then(|| BatchNormConfig::new(width).init(device));
        let conv = |from, to, kernel| {
            Conv2dConfig::new([from, to], [kernel, kernel]).with_padding(PaddingConfig2d::Same).init(device)
        };
        let perceptron = |widths: &[usize]| Perceptron {
            layers: widths.windows(2).map(|pair| LinearConfig::new(pair[0], pair[1]).init(device)).collect(),
            norms: widths[1..widths.len() - 1].iter().filter_map(|&width| norm(width)).collect(),
        };
        let net = match &self.arch {
            Arch::Mlp(hidden) => {
                let widths = [&[channels * height * width], &hidden[..], &[self.classes]].concat();
                Net::Mlp(perceptron(&widths))
            }
            Arch::Lenet => Net::Lenet(Lenet {
                conv1: conv(channels, 6, 5),
                norm1: norm(6),
                conv2: conv(6, 16, 5),
                norm2: norm(16),
                head: perceptron(&[16 * (height / 4) * (width / 4), 120, 84, self.classes]),
            }),
            Arch::Resnet8 => Net::Resnet8(Resnet {
                stem: conv(channels, 16, 3),
                norm: norm(16),
                blocks: [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
                    .map(|(from, to, stride)| Block {
                        conv1: Conv2dConfig::new([from, to], [3, 3])
                            .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                            .with_stride([stride, stride])
                            .init(device),
                        norm1: norm(to),
                        conv2: conv(to, to, 3),
                        norm2: norm(to),
                        shortcut: (stride > 1).then(|| {
                            Conv2dConfig::new([from, to], [1, 1]).with_stride([stride, stride]).init(device)
                        }),
                    })
                    .into(),
                fc: LinearConfig::new(64, self.classes).init(device),
            }),
        };
        Classifier { net, activation: self.activation }
    }
}

/// A classifier of images.
#[derive(Module, Debug)]
pub struct Classifier {
    /// The network.
    pub net: Net,
    #[module(skip)]
    activation: Nonlinearity,
}

/// One of the networks.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a classifier has one")]
pub enum Net {
    /// A perceptron.
    Mlp(Perceptron),
    /// LeNet.
    Lenet(Lenet),
    /// A small residual network.
    Resnet8(Resnet),
}

/// Linear layers, each but the last followed by the activation.
#[derive(Module, Debug)]
pub struct Perceptron {
    /// The layers.
    pub layers: Vec<Linear>,
    /// A batch norm after each but the last, or none.
    pub norms: Vec<BatchNorm>,
}

/// Two convolutions, each with a pooling by 2, and a perceptron.
#[derive(Module, Debug)]
pub struct Lenet {
    conv1: Conv2d,
    norm1: Option<BatchNorm>,
    conv2: Conv2d,
    norm2: Option<BatchNorm>,
    head: Perceptron,
}

/// A convolution, residual blocks, and a linear layer over the mean of each channel.
#[derive(Module, Debug)]
pub struct Resnet {
    stem: Conv2d,
    norm: Option<BatchNorm>,
    blocks: Vec<Block>,
    fc: Linear,
}

/// `f(x) + shortcut(x)` with two convolutions in f.
#[derive(Module, Debug)]
pub struct Block {
    conv1: Conv2d,
    norm1: Option<BatchNorm>,
    conv2: Conv2d,
    norm2: Option<BatchNorm>,
    shortcut: Option<Conv2d>,
}

/// What a network computed on the way.
struct Trace {
    activation: Nonlinearity,
    /// Mean square of what each layer put out, before the activation.
    squares: Vec<Tensor<1>>,
    /// What happens to hidden units after the activation.
    dropout: Option<Dropout>,
}

impl Trace {
    /// The activation of what a layer put out, normalised where there is a norm.
    fn activate<const D: usize>(&mut self, x: Tensor<D>, norm: Option<&BatchNorm>) -> Tensor<D> {
        self.squares.push(x.clone().powi_scalar(2).mean());
        let x = match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let x = self.activation.apply(x);
        match &self.dropout {
            Some(dropout) => dropout.forward(x),
            None => x,
        }
    }
}

impl Classifier {
    /// What follows each layer.
    pub(crate) fn activation(&self) -> Nonlinearity {
        self.activation
    }

    /// Logits of images.
    ///
    /// # Shapes
    /// - x: `[images, channels, height, width]`
    /// - output: `[images, classes]`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        self.traced(x).0
    }

    /// As [`forward`](Self::forward), with hidden units dropped at random in training.
    ///
    /// # Panics
    /// When the probability is not in `[0, 1)`.
    pub fn forward_dropping(&self, x: Tensor<4>, probability: f64) -> Tensor<2> {
        self.run(x, Some(DropoutConfig::new(probability).init())).0
    }

    /// Logits, and the root mean square of what each layer put out before its activation.
    pub fn traced(&self, x: Tensor<4>) -> (Tensor<2>, Vec<Tensor<1>>) {
        self.run(x, None)
    }

    fn run(&self, x: Tensor<4>, dropout: Option<Dropout>) -> (Tensor<2>, Vec<Tensor<1>>) {
        let mut trace = Trace { activation: self.activation, squares: Vec::new(), dropout };
        let logits = match &self.net {
            Net::Mlp(mlp) => mlp.forward(x.flatten::<2>(1, 3), &mut trace),
            Net::Lenet(lenet) => lenet.forward(x, &mut trace),
            Net::Resnet8(resnet) => resnet.forward(x, &mut trace),
        };
        trace.squares.push(logits.clone().powi_scalar(2).mean());
        (logits, trace.squares.into_iter().map(Tensor::sqrt).collect())
    }
}

impl Perceptron {
    fn forward(&self, mut x: Tensor<2>, trace: &mut Trace) -> Tensor<2> {
        let last = self.layers.len() - 1;
        for (index, layer) in self.layers[..last].iter().enumerate() {
            x = trace.activate(layer.forward(x), self.norms.get(index));
        }
        self.layers[last].forward(x)
    }
}

impl Lenet {
    /// Linear layers at the end.
    pub(crate) fn layers(&self) -> usize {
        self.head.layers.len()
    }

    fn forward(&self, x: Tensor<4>, trace: &mut Trace) -> Tensor<2> {
        let pool = |x| max_pool2d(x, MaxPoolOptions::new([2, 2]));
        let x = pool(trace.activate(self.conv1.forward(x), self.norm1.as_ref()));
        let x = pool(trace.activate(self.conv2.forward(x), self.norm2.as_ref()));
        self.head.forward(x.flatten::<2>(1, 3), trace)
    }
}

impl Resnet {
    /// The stride of every block.
    pub(crate) fn strides(&self) -> Vec<usize> {
        self.blocks.iter().map(|block| if block.shortcut.is_some() { 2 } else { 1 }).collect()
    }

    fn forward(&self, x: Tensor<4>, trace: &mut Trace) -> Tensor<2> {
        let mut x = trace.activate(self.stem.forward(x), self.norm.as_ref());
        for block in &self.blocks {
            x = block.forward(x, trace);
        }
        let means = x.flatten::<3>(2, 3).mean_dim(2).squeeze_dim::<2>(2);
        self.fc.forward(means)
    }
}

impl Block {
    fn forward(&self, x: Tensor<4>, trace: &mut Trace) -> Tensor<4> {
        let inner = trace.activate(self.conv1.forward(x.clone()), self.norm1.as_ref());
        let inner = self.conv2.forward(inner);
        let inner = match &self.norm2 {
            Some(norm) => norm.forward(inner),
            None => inner,
        };
        let shortcut = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x),
            None => x,
        };
        trace.activate(inner + shortcut, None)
    }
}
