//! A perceptron, a convolutional network and a Transformer block, as in `peer.py`.

use burn::tensor::ops::ConvOptions;
use burn::tensor::{Distribution, Tensor};
use kiln_ops::{Activation, AttentionOptions, activate, attention, conv2d, layer_norm, linear};

use super::ParameterMut;

/// A leaf of the autodiff graph with values as small as those of a network.
fn parameter<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let values = Tensor::random(shape, Distribution::Normal(0.0, 0.05), &burn::tensor::Device::flex());
    Tensor::from_inner(values).require_grad()
}

struct Affine {
    weight: Tensor<2>,
    bias: Tensor<1>,
}

impl Affine {
    fn new(inputs: usize, outputs: usize) -> Self {
        Self { weight: parameter([inputs, outputs]), bias: parameter([outputs]) }
    }

    fn forward<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        linear(x, self.weight.clone(), Some(self.bias.clone()), activation)
    }

    fn parameters(&mut self) -> [ParameterMut<'_>; 2] {
        [ParameterMut::Matrix(&mut self.weight), ParameterMut::Vector(&mut self.bias)]
    }
}

/// 16 → 32 → 32 → 4 with ReLU.
pub struct Mlp([Affine; 3]);

impl Mlp {
    pub fn new() -> Self {
        Self([(16, 32), (32, 32), (32, 4)].map(|(inputs, outputs)| Affine::new(inputs, outputs)))
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let [first, second, third] = &self.0;
        let x = second.forward(first.forward(x, Activation::Relu), Activation::Relu);
        third.forward(x, Activation::Identity)
    }

    pub fn parameters(&mut self) -> Vec<ParameterMut<'_>> {
        self.0.iter_mut().flat_map(Affine::parameters).collect()
    }
}

/// Three 3×3 convolutions with ReLU, the mean over the image and a linear layer.
pub struct Cnn {
    convs: [(Tensor<4>, Tensor<1>); 3],
    head: Affine,
}

impl Cnn {
    pub fn new() -> Self {
        let conv = |(inputs, outputs)| (parameter([outputs, inputs, 3, 3]), parameter([outputs]));
        Self { convs: [(3, 32), (32, 64), (64, 64)].map(conv), head: Affine::new(64, 10) }
    }

    pub fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let x = self.convs.iter().fold(x, |x, (weight, bias)| {
            let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
            activate(conv2d(x, weight.clone(), Some(bias.clone()), options), Activation::Relu)
        });
        let [batch, channels, height, width] = x.dims();
        let mean = x.reshape([batch, channels, height * width]).mean_dim(2).reshape([batch, channels]);
        self.head.forward(mean, Activation::Identity)
    }

    pub fn parameters(&mut self) -> Vec<ParameterMut<'_>> {
        let convs = self.convs.iter_mut();
        let convs =
            convs.flat_map(|(weight, bias)| [ParameterMut::Kernel(weight), ParameterMut::Vector(bias)]);
        convs.chain(self.head.parameters()).collect()
    }
}

const WIDTH: usize = 256;
const HEADS: usize = 4;

/// Attention and feed-forward network, each after a norm.
pub struct TransformerBlock {
    norms: [(Tensor<1>, Tensor<1>); 2],
    qkv: Affine,
    output: Affine,
    up: Affine,
    down: Affine,
}

impl TransformerBlock {
    pub fn new() -> Self {
        Self {
            norms: [(); 2].map(|()| (parameter([WIDTH]), parameter([WIDTH]))),
            qkv: Affine::new(WIDTH, 3 * WIDTH),
            output: Affine::new(WIDTH, WIDTH),
            up: Affine::new(WIDTH, 4 * WIDTH),
            down: Affine::new(4 * WIDTH, WIDTH),
        }
    }

    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let norm = |x, (weight, bias): &(Tensor<1>, Tensor<1>)| {
            layer_norm(x, weight.clone(), Some(bias.clone()), 1e-5)
        };
        let qkv = self.qkv.forward(norm(x.clone(), &self.norms[0]), Activation::Identity);
        let heads = |i: usize| {
            let part = qkv.clone().narrow(2, i * WIDTH, WIDTH);
            part.reshape([batch, time, HEADS, WIDTH / HEADS]).swap_dims(1, 2)
        };
        let mixed = attention(heads(0), heads(1), heads(2), AttentionOptions::default());
        let mixed = mixed.swap_dims(1, 2).reshape([batch, time, WIDTH]);
        let x = x + self.output.forward(mixed, Activation::Identity);
        let hidden = self.up.forward(norm(x.clone(), &self.norms[1]), Activation::Gelu);
        x + self.down.forward(hidden, Activation::Identity)
    }

    pub fn parameters(&mut self) -> Vec<ParameterMut<'_>> {
        let norms = self.norms.iter_mut().flat_map(|(weight, bias)| [weight, bias]);
        let layers = [&mut self.qkv, &mut self.output, &mut self.up, &mut self.down];
        norms.map(ParameterMut::Vector).chain(layers.into_iter().flat_map(Affine::parameters)).collect()
    }
}
