//! Bare hypernetworks from prepared tensors, and the convolutional network of the reference vectors, for comparison with
//! other implementations.
//!
//! The hypernetwork is `hyper.hidden0`, `hyper.hidden1`, …, `hyper.output`, each a `weight [out, in]` and a `bias`; the
//! output's bias is θ0. The network that it makes is a convolution of 3 × 3 with a border of zeros, LeakyReLU, the mean
//! over the image, and two linear layers with LeakyReLU between them.

use burn::tensor::ops::ConvOptions;
use burn::tensor::{Int, Tensor};
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_nn::{functional, token_nll};
use serde::Deserialize;

use crate::encoding::Encoding;
use crate::hypernet::Nonlinearity;

/// What `layout.json` holds: the tensors that are made, in their order.
#[derive(Debug, Clone, Deserialize)]
pub struct Layout {
    /// Names and shapes.
    pub output_order: Vec<(String, Vec<usize>)>,
}

/// A layer of the file, its tensors as leaves whose gradients are wanted.
struct Layer {
    name: String,
    /// `[out, in]`
    weight: Tensor<2>,
    /// `[out]`
    bias: Tensor<1>,
}

/// A hypernetwork from tensors.
pub struct Bare {
    layers: Vec<Layer>,
    place: String,
}

impl Bare {
    /// Takes the layers out of a file.
    ///
    /// # Errors
    /// When one is missing, or does not fit the one before.
    pub fn read(file: &mut TensorFile, inputs: usize, cx: &Context) -> Result<Self> {
        let place = file.source().display().to_string();
        let hidden = (0..).take_while(|i| file.get(&format!("hyper.hidden{i}.weight")).is_some()).count();
        let names = (0..hidden).map(|i| format!("hyper.hidden{i}")).chain(["hyper.output".into()]);
        let (mut layers, mut width) = (Vec::new(), inputs);
        for name in names {
            let weight = file.take_float::<2>(&format!("{name}.weight"), &cx.device)?;
            let bias = file.take_float::<1>(&format!("{name}.bias"), &cx.device)?;
            let [outputs, inputs] = weight.dims();
            if inputs != width || bias.dims() != [outputs] {
                let found = format!("{name}.weight is [{outputs}, {inputs}] and its bias {:?}", bias.dims());
                return Err(Error::input(&place, found)
                    .hint(format!("it must take {width} numbers and have a bias for each output")));
            }
            width = outputs;
            let (weight, bias) =
                (Tensor::from_inner(weight).require_grad(), Tensor::from_inner(bias).require_grad());
            layers.push(Layer { name, weight, bias });
        }
        Ok(Self { layers, place })
    }

    /// Weights for encoded conditions, `[batch, weights]`.
    pub fn forward(&self, encoded: Tensor<2>) -> Tensor<2> {
        let last = self.layers.len() - 1;
        self.layers.iter().enumerate().fold(encoded, |a, (index, layer)| {
            let a = a.matmul(layer.weight.clone().transpose()) + layer.bias.clone().unsqueeze_dim::<2>(0);
            if index < last { Nonlinearity::LeakyRelu.apply(a) } else { a }
        })
    }
}

/// Images and classes for every condition, `[batch, images, channels, height, width]` and `[batch, images]`.
pub struct Examples {
    /// Images.
    pub x: Tensor<5>,
    /// Classes.
    pub target: Tensor<2, Int>,
}

/// Runs the hypernetwork; with examples also the network that it makes, its loss and the gradients of the hypernetwork.
///
/// # Errors
/// When a tensor is missing or does not fit.
pub fn forward(
    file: &mut TensorFile,
    gamma: Tensor<2>,
    encoding: Encoding,
    examples: Option<(Examples, Layout)>,
    cx: &Context,
) -> Result<TensorFile> {
    let encoded = encoding.encode(gamma);
    let hyper = Bare::read(file, encoded.dims()[1], cx)?;
    let theta = hyper.forward(encoded.clone());
    let mut output = TensorFile::new();
    output.insert("encoded", HostTensor::from_tensor(encoded));
    output.insert("theta", HostTensor::from_tensor(theta.clone().inner()));
    let Some((Examples { x, target }, layout)) = examples else { return Ok(output) };
    let logits = primary(theta, &layout, x, &hyper.place)?;
    let ([batch, images, classes], [sets, labelled]) = (logits.dims(), target.dims());
    if [sets, labelled] != [batch, images] {
        return Err(Error::input(&hyper.place, format!("\"target\" is [{sets}, {labelled}]"))
            .hint(format!("it needs a class for each of [{batch}, {images}] images")));
    }
    let largest: i64 = target.clone().max().into_scalar();
    let least: i64 = target.clone().min().into_scalar();
    if least < 0 || largest >= classes as i64 {
        return Err(Error::input(
            &hyper.place,
            format!("\"target\" holds classes from {least} to {largest}"),
        )
        .hint(format!("the network has {classes}, numbered from 0")));
    }
    let loss = token_nll(logits.clone(), target).mean();
    let gradients = loss.backward();
    output.insert("logits", HostTensor::from_tensor(logits.inner()));
    output.insert("loss", HostTensor::from_tensor(loss.inner()));
    for Layer { name, weight, bias } in &hyper.layers {
        let (weight, bias) = (weight.grad(&gradients), bias.grad(&gradients));
        if let (Some(weight), Some(bias)) = (weight, bias) {
            output.insert(format!("grad.{name}.weight"), HostTensor::from_tensor(weight));
            output.insert(format!("grad.{name}.bias"), HostTensor::from_tensor(bias));
        }
    }
    Ok(output)
}

/// The network of the vectors, one set of weights for each condition: `[batch, images, classes]`.
fn primary(theta: Tensor<2>, layout: &Layout, x: Tensor<5>, place: &str) -> Result<Tensor<3>> {
    let ([sets, weights], [batch, images, channels, ..]) = (theta.dims(), x.dims());
    let shape = |name: &str, axes: usize| -> Result<(usize, Vec<usize>)> {
        let mut start = 0;
        for (found, shape) in &layout.output_order {
            let count: usize = shape.iter().product();
            if found == name && shape.len() == axes && start + count <= weights {
                return Ok((start, shape.clone()));
            }
            start = start.saturating_add(count);
        }
        Err(Error::input(place, format!("the layout has no \"{name}\" of {axes} axes in {weights} weights"))
            .hint("the network has conv1, fc1 and fc2, each with weight and bias"))
    };
    let part = |name: &str, axes: usize| -> Result<(Tensor<2>, Vec<usize>)> {
        let (start, shape) = shape(name, axes)?;
        Ok((theta.clone().narrow(1, start, shape.iter().product()), shape))
    };
    let (conv, conv_shape) = part("conv1.weight", 4)?;
    let (fc1, fc1_shape) = part("fc1.weight", 2)?;
    let (fc2, fc2_shape) = part("fc2.weight", 2)?;
    let [conv_bias, fc1_bias, fc2_bias] =
        [part("conv1.bias", 1)?.0, part("fc1.bias", 1)?.0, part("fc2.bias", 1)?.0];
    let fits = sets == batch
        && conv_shape[1..] == [channels, 3, 3]
        && fc1_shape[1] == conv_shape[0]
        && fc2_shape[1] == fc1_shape[0]
        && [&conv_bias, &fc1_bias, &fc2_bias].map(|bias| bias.dims()[1])
            == [conv_shape[0], fc1_shape[0], fc2_shape[0]];
    if !fits {
        let found = format!(
            "{sets} conditions, images {:?}, layers of {conv_shape:?}, {fc1_shape:?}, {fc2_shape:?}",
            x.dims()
        );
        return Err(Error::input(place, format!("conditions, images and layers do not fit: {found}")));
    }
    let leaky = |x: Tensor<3>| Nonlinearity::LeakyRelu.apply(x);
    let linear = |x: Tensor<3>, weight: Tensor<2>, shape: &[usize], bias: Tensor<2>| {
        let weight = weight.reshape([sets, shape[0], shape[1]]).swap_dims(1, 2);
        functional::linear(x, weight, Some(bias))
    };
    let kernel = conv.reshape([sets, conv_shape[0], channels, 3, 3]);
    let maps = functional::conv2d(x, kernel, Some(conv_bias), ConvOptions::new([1, 1], [1, 1], [1, 1], 1));
    let maps =
        Nonlinearity::LeakyRelu.apply(maps.reshape([(sets * images) as i64, conv_shape[0] as i64, -1]));
    let means = maps.mean_dim(2).reshape([sets, images, conv_shape[0]]);
    let x = leaky(linear(means, fc1, &fc1_shape, fc1_bias));
    Ok(linear(x, fc2, &fc2_shape, fc2_bias))
}
