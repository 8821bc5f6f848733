//! The network whose weights are made: a chain of layers, described by its list of tensors.
//!
//! Its weights are one vector of N numbers: every tensor row-major, in the order of the layers, the weight of a layer
//! before its bias. They have PyTorch's layout, so that what is exported runs elsewhere: a linear weight is `[out, in]`.

use std::fs;
use std::path::Path;

use burn::tensor::Tensor;
use burn::tensor::ops::ConvOptions;
use kiln_core::{Error, Result};
use kiln_nn::{MaxPool2dConfig, ParamSpec, WeightSpec, functional};
use kiln_ops::{Activation, activate, dropout};
use serde::{Deserialize, Serialize};

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// `x Wᵀ + b`; an image is flattened before.
    Linear {
        /// Width of the output.
        outputs: usize,
    },
    /// Convolution over an image, with a square kernel and step 1.
    Conv {
        /// Channels of the output.
        channels: usize,
        /// Size of the kernel.
        kernel: usize,
        /// Zeros around the image.
        #[serde(default)]
        padding: usize,
    },
    /// Layer norm over the last axis.
    Norm,
    /// The largest of 2 × 2 pixels.
    Pool,
    /// `max(x, 0)`
    Relu,
    /// `tanh x`
    Tanh,
    /// Sets elements to 0 at random where [`Target::forward_dropping`] runs the network
    Dropout {
        /// The probability of an element.
        prob: f64,
    },
}

/// A chain of layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Shape of one input: `[width]`, or `[channels, height, width]`.
    pub input: Vec<usize>,
    /// From input to output.
    pub layers: Vec<Layer>,
}

/// Activations on their way through the layers, `[sets, rows, ...]`.
enum Signal {
    Vectors(Tensor<3>),
    Images(Tensor<5>),
}

impl Target {
    /// Linear layers of these widths with ReLU between them.
    pub fn mlp(widths: &[usize]) -> Self {
        let mut layers = Vec::new();
        for &outputs in widths.iter().skip(1) {
            if !layers.is_empty() {
                layers.push(Layer::Relu);
            }
            layers.push(Layer::Linear { outputs });
        }
        Self { input: widths.iter().take(1).copied().collect(), layers }
    }

    /// LeNet-5 with ReLU and maxima, for images of 28 × 28 pixels and ten classes.
    pub fn lenet() -> Self {
        let conv =
            |channels, padding| [Layer::Conv { channels, kernel: 5, padding }, Layer::Relu, Layer::Pool];
        let mut layers: Vec<Layer> = conv(6, 2).into_iter().chain(conv(16, 0)).collect();
        layers.extend(Self::mlp(&[400, 120, 84, 10]).layers);
        Self { input: vec![1, 28, 28], layers }
    }

    /// From `mlp:64-32-10`, `lenet`, or a JSON file that holds a [`Target`].
    ///
    /// # Errors
    /// When it is none of these, or the layers do not fit together.
    pub fn parse(text: &str) -> Result<Self> {
        let target = if let Some(widths) = text.strip_prefix("mlp:") {
            let widths: Vec<usize> =
                widths.split('-').map(str::parse).collect::<Result<_, _>>().map_err(|_| {
                    Error::usage(format!("\"{text}\" is no list of widths")).hint("write mlp:64-32-10")
                })?;
            Self::mlp(&widths)
        } else if text == "lenet" {
            Self::lenet()
        } else if text.ends_with(".json") {
            let path = Path::new(text);
            let json = fs::read_to_string(path).map_err(Error::io("read", path))?;
            serde_json::from_str(&json)
                .map_err(|e| Error::input(text, "does not describe a target network").caused_by(e).hint(
                    "write {\"input\": [1, 8, 8], \"layers\": [{\"conv\": {\"channels\": 4, \"kernel\": 3}}, \"relu\", \
                     {\"linear\": {\"outputs\": 10}}]}",
                ))?
        } else {
            return Err(Error::usage(format!("the target \"{text}\" is unknown"))
                .hint("use mlp:64-32-10, lenet, or a .json file"));
        };
        target.spec()?;
        Ok(target)
    }

    /// Width of one input, flattened.
    pub fn inputs(&self) -> usize {
        self.input.iter().product()
    }

    /// Width of the output.
    ///
    /// # Errors
    /// When the layers do not fit together.
    pub fn outputs(&self) -> Result<usize> {
        Ok(self.trace()?.1.iter().product())
    }

    /// Names and shapes of all tensors, in order.
    ///
    /// # Errors
    /// When the layers do not fit together; the first that does not is named.
    pub fn spec(&self) -> Result<WeightSpec> {
        WeightSpec::new(self.trace()?.0)
    }

    /// The tensors of all layers, and the shape of the output.
    fn trace(&self) -> Result<(Vec<ParamSpec>, Vec<usize>)> {
        if !matches!(self.input.len(), 1 | 3) || self.input.contains(&0) {
            return Err(Error::usage(format!("the target's input has the shape {:?}", self.input))
                .hint("it is [width] or [channels, height, width], without zeros"));
        }
        let (mut params, mut shape) = (Vec::new(), self.input.clone());
        let (mut linears, mut convs, mut norms) = (0, 0, 0);
        for (number, layer) in self.layers.iter().enumerate() {
            let misfit = |found: String| {
                Error::usage(format!("layer {} of the target, {layer:?}, {found}", number + 1))
            };
            let mut tensors = |name: String, weight: Vec<usize>, holder: &str| {
                let param = |part: &str, shape| ParamSpec {
                    name: format!("{name}.{part}"),
                    shape,
                    holder: holder.into(),
                };
                params.push(param("weight", weight.clone()));
                params.push(param("bias", vec![weight[0]]));
            };
            match *layer {
                Layer::Linear { outputs } => {
                    linears += 1;
                    tensors(format!("fc{linears}"), vec![outputs, shape.iter().product()], "fc");
                    shape = vec![outputs];
                }
                Layer::Conv { channels, kernel, padding } => {
                    let [inputs, height, width] = shape[..] else {
                        return Err(misfit(format!("needs an image, not the shape {shape:?}")));
                    };
                    let size =
                        |extent: usize| (extent + 2 * padding + 1).checked_sub(kernel).filter(|&n| n > 0);
                    let (Some(height), Some(width)) = (size(height), size(width)) else {
                        return Err(misfit(format!("is larger than the image, {height} x {width}")));
                    };
                    convs += 1;
                    tensors(format!("conv{convs}"), vec![channels, inputs, kernel, kernel], "conv");
                    shape = vec![channels, height, width];
                }
                Layer::Norm => {
                    norms += 1;
                    let &[width] = &shape[..] else {
                        return Err(misfit(format!("needs vectors, not {shape:?}")));
                    };
                    tensors(format!("norm{norms}"), vec![width], "norm");
                }
                Layer::Pool => {
                    let [channels, height, width] = shape[..] else {
                        return Err(misfit(format!("needs an image, not the shape {shape:?}")));
                    };
                    if height < 2 || width < 2 {
                        return Err(misfit(format!("needs 2 x 2 pixels, not {height} x {width}")));
                    }
                    shape = vec![channels, height / 2, width / 2];
                }
                Layer::Dropout { prob } if !(0.0..1.0).contains(&prob) => {
                    return Err(misfit("needs a probability in [0, 1)".into()));
                }
                Layer::Relu | Layer::Tanh | Layer::Dropout { .. } => {}
            }
        }
        if params.is_empty() {
            return Err(Error::usage("the target has no layer with weights")
                .hint("an MLP needs two widths, as mlp:64-10"));
        }
        Ok((params, shape))
    }

    /// Runs the network with one set of weights for each set of rows.
    ///
    /// # Shapes
    /// - theta: `[sets, N]`
    /// - x: `[sets, rows, inputs]`
    /// - output: `[sets, rows, outputs]`
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn forward(&self, theta: Tensor<2>, x: Tensor<3>) -> Tensor<3> {
        self.run(theta, x, None)
    }

    /// As [`forward`](Self::forward), with dropout; the same seed drops the same elements.
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn forward_dropping(&self, theta: Tensor<2>, x: Tensor<3>, seed: u64) -> Tensor<3> {
        self.run(theta, x, Some(seed))
    }

    fn run(&self, theta: Tensor<2>, x: Tensor<3>, seed: Option<u64>) -> Tensor<3> {
        let [sets, rows, inputs] = x.dims();
        assert_eq!(inputs, self.inputs(), "inputs must be {:?}", self.input);
        let mut weights = Weights { theta, at: 0 };
        let mut signal = match self.input[..] {
            [channels, height, width] => Signal::Images(x.reshape([sets, rows, channels, height, width])),
            _ => Signal::Vectors(x),
        };
        for layer in &self.layers {
            signal = match (layer, signal) {
                (Layer::Linear { outputs }, signal) => {
                    let x = signal.flatten();
                    let inputs = x.dims()[2];
                    let weight = weights.next([sets, *outputs, inputs]).swap_dims(1, 2);
                    Signal::Vectors(functional::linear(x, weight, Some(weights.next([sets, *outputs]))))
                }
                (Layer::Conv { channels, kernel, padding }, Signal::Images(x)) => {
                    let inputs = x.dims()[2];
                    let weight = weights.next([sets, *channels, inputs, *kernel, *kernel]);
                    let options = ConvOptions::new([1, 1], [*padding; 2], [1, 1], 1);
                    Signal::Images(functional::conv2d(
                        x,
                        weight,
                        Some(weights.next([sets, *channels])),
                        options,
                    ))
                }
                (Layer::Norm, Signal::Vectors(x)) => {
                    let width = x.dims()[2];
                    let (weight, bias) = (weights.next([sets, width]), weights.next([sets, width]));
                    Signal::Vectors(functional::layer_norm(x, weight, Some(bias), 1e-5))
                }
                (Layer::Pool, Signal::Images(x)) => {
                    let [sets, rows, channels, height, width] = x.dims();
                    let x = MaxPool2dConfig::new([2, 2]).init().forward(x.reshape([
                        sets * rows,
                        channels,
                        height,
                        width,
                    ]));
                    Signal::Images(x.reshape([sets, rows, channels, height / 2, width / 2]))
                }
                (Layer::Dropout { prob }, signal) => match seed {
                    Some(seed) => signal.dropped(*prob, seed),
                    None => signal,
                },
                (Layer::Relu, signal) => signal.activate(Activation::Relu),
                (Layer::Tanh, signal) => signal.activate(Activation::Tanh),
                (layer, _) => panic!("{layer:?} was given activations that trace() would have refused"),
            };
        }
        signal.flatten()
    }
}

impl Signal {
    fn flatten(self) -> Tensor<3> {
        match self {
            Self::Vectors(x) => x,
            Self::Images(x) => {
                let [sets, rows, ..] = x.dims();
                x.reshape([sets as isize, rows as isize, -1])
            }
        }
    }

    fn dropped(self, prob: f64, seed: u64) -> Self {
        match self {
            Self::Vectors(x) => Self::Vectors(dropout(x, prob, seed)),
            Self::Images(x) => Self::Images(dropout(x, prob, seed)),
        }
    }

    fn activate(self, activation: Activation) -> Self {
        match self {
            Self::Vectors(x) => Self::Vectors(activate(x, activation)),
            Self::Images(x) => Self::Images(activate(x, activation)),
        }
    }
}

/// Takes tensors off the front of the weights.
struct Weights {
    theta: Tensor<2>,
    at: usize,
}

impl Weights {
    fn next<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let count = shape[1..].iter().product();
        let part = self.theta.clone().narrow(1, self.at, count);
        self.at += count;
        part.reshape(shape)
    }
}
