//! A layer of BERT-base (Devlin et al., arXiv 1810.04805): self-attention and a feed-forward layer, each
//! followed by a sum with its input and layer normalisation.

use burn::tensor::{Device, Distribution, Tensor};
use kiln_ops::{Activation, AttentionOptions, attention, layer_norm, linear};

use super::ParameterMut;

const WIDTH: usize = 768;
const HEADS: usize = 12;
const HIDDEN: usize = 3072;
const EPSILON: f64 = 1e-12;

/// The parameters of one layer.
#[derive(Debug, Clone)]
pub struct BertLayer {
    query: Affine,
    key: Affine,
    value: Affine,
    output: Affine,
    attention_norm: Norm,
    inner: Affine,
    outer: Affine,
    output_norm: Norm,
}

/// `x W + b`
#[derive(Debug, Clone)]
struct Affine {
    /// `[inputs, outputs]`
    weight: Tensor<2>,
    /// `[outputs]`
    bias: Tensor<1>,
}

/// Scale and shift of a layer normalisation, `[width]`.
#[derive(Debug, Clone)]
struct Norm {
    weight: Tensor<1>,
    bias: Tensor<1>,
}

impl BertLayer {
    /// Draws the parameters; on an autodiff device they have gradients.
    pub fn new(device: &Device) -> Self {
        let affine = |inputs, outputs| Affine {
            weight: parameter(Tensor::random([inputs, outputs], Distribution::Normal(0.0, 0.02), device)),
            bias: parameter(Tensor::zeros([outputs], device)),
        };
        let norm = || Norm {
            weight: parameter(Tensor::ones([WIDTH], device)),
            bias: parameter(Tensor::zeros([WIDTH], device)),
        };
        Self {
            query: affine(WIDTH, WIDTH),
            key: affine(WIDTH, WIDTH),
            value: affine(WIDTH, WIDTH),
            output: affine(WIDTH, WIDTH),
            attention_norm: norm(),
            inner: affine(WIDTH, HIDDEN),
            outer: affine(HIDDEN, WIDTH),
            output_norm: norm(),
        }
    }

    /// Applies the layer, without dropout.
    ///
    /// # Shapes
    /// - x, output: `[batch, time, 768]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, time, _] = x.dims();
        let heads = |affine: &Affine| {
            let y = affine.forward(x.clone(), Activation::Identity);
            y.reshape([batch, time, HEADS, WIDTH / HEADS]).swap_dims(1, 2)
        };
        let (q, k, v) = (heads(&self.query), heads(&self.key), heads(&self.value));
        let context = attention(q, k, v, AttentionOptions::default());
        let context = context.swap_dims(1, 2).reshape([batch, time, WIDTH]);
        let x = self.attention_norm.forward(x + self.output.forward(context, Activation::Identity));
        let inner = self.inner.forward(x.clone(), Activation::Gelu);
        self.output_norm.forward(x + self.outer.forward(inner, Activation::Identity))
    }

    /// The parameters, in the order of the fields.
    pub fn parameters(&mut self) -> Vec<ParameterMut<'_>> {
        let affine = [
            &mut self.query,
            &mut self.key,
            &mut self.value,
            &mut self.output,
            &mut self.inner,
            &mut self.outer,
        ];
        let norms = [&mut self.attention_norm, &mut self.output_norm];
        let norms = norms.into_iter().flat_map(|norm| [&mut norm.weight, &mut norm.bias]);
        let affine = affine.into_iter().flat_map(|affine| {
            [ParameterMut::Matrix(&mut affine.weight), ParameterMut::Vector(&mut affine.bias)]
        });
        affine.chain(norms.map(ParameterMut::Vector)).collect()
    }
}

impl Affine {
    fn forward(&self, x: Tensor<3>, activation: Activation) -> Tensor<3> {
        linear(x, self.weight.clone(), Some(self.bias.clone()), activation)
    }
}

impl Norm {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        layer_norm(x, self.weight.clone(), Some(self.bias.clone()), EPSILON)
    }
}

/// A leaf of the autodiff graph, where there is one.
fn parameter<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.is_autodiff() { x.require_grad() } else { x }
}
