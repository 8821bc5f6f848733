//! The architecture of a hypernetwork (the review's fifth criterion): from a code C and the embeddings of the pieces that
//! are to be made, to features of every piece.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor, TensorData, activation};
use kiln_nn::{
    ConvTranspose1d, ConvTranspose1dConfig, Linear, LinearConfig, MhaInput, MultiHeadAttention,
    MultiHeadAttentionConfig,
};
use kiln_ops::{Activation, linear};
use serde::{Deserialize, Serialize};

use crate::conditioning::Code;

/// How features of the pieces come about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// Linear layers with ReLU for every piece on its own, from its embedding and C to these widths
    Mlp(Vec<usize>),
    /// Transposed convolutions from a small grid to one place for every piece
    Cnn(usize),
    /// A GRU that makes one piece a step
    Rnn(usize),
    /// Learned queries, one for every piece, that attend to one another and to the tokens of C
    Attention(usize),
}

impl Arch {
    /// Width of the features.
    pub fn width(&self) -> usize {
        match self {
            Self::Mlp(widths) => widths.last().copied().unwrap_or(0),
            Self::Cnn(width) | Self::Rnn(width) | Self::Attention(width) => *width,
        }
    }
}

/// What the generator is asked for.
pub(crate) struct Pieces {
    /// Their number.
    pub count: usize,
    /// Width of their embeddings; 0 where there are none.
    pub embedding: usize,
}

/// A generator of features.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a hypernetwork has one")]
pub enum Generator {
    /// See [`Arch::Mlp`].
    Mlp(Mlp),
    /// See [`Arch::Cnn`].
    Cnn(Cnn),
    /// See [`Arch::Rnn`].
    Rnn(Rnn),
    /// See [`Arch::Attention`].
    Attention(CrossAttention),
}

impl Generator {
    pub(crate) fn new(
        arch: &Arch,
        code_dims: &[usize],
        pieces: &Pieces,
        spectral: bool,
        device: &Device,
    ) -> Self {
        let code: usize = code_dims.iter().sum();
        let inputs = pieces.embedding + code;
        match *arch {
            Arch::Mlp(ref widths) => Self::Mlp(Mlp::new(inputs, widths, spectral, device)),
            Arch::Cnn(width) => Self::Cnn(Cnn::new(code, width, pieces, device)),
            Arch::Rnn(width) => Self::Rnn(Rnn {
                start: LinearConfig::new(code, width).init(device),
                input: LinearConfig::new(inputs, 3 * width).init(device),
                hidden: LinearConfig::new(width, 3 * width).init(device),
                count: pieces.count,
                width,
            }),
            Arch::Attention(width) => Self::Attention(CrossAttention::new(code_dims, width, pieces, device)),
        }
    }

    /// Features of every piece.
    ///
    /// # Shapes
    /// - embeddings: `[pieces, embedding]`
    /// - output: `[batch, pieces, width]`
    pub fn forward(&self, code: &Code, embeddings: Option<Embeddings>) -> Tensor<3> {
        match self {
            Self::Mlp(mlp) => mlp.forward(beside(code, embeddings)),
            Self::Cnn(cnn) => cnn.forward(code, embeddings),
            Self::Rnn(rnn) => rnn.forward(code, embeddings),
            Self::Attention(attention) => attention.forward(code, embeddings),
        }
    }
}

/// Embeddings of pieces, `[pieces, embedding]`, on one of the sides of C.
#[derive(Debug, Clone)]
pub enum Embeddings {
    /// `[embedding, C]`
    Before(Tensor<2>),
    /// `[C, embedding]`
    After(Tensor<2>),
}

impl Embeddings {
    fn into_tensor(self) -> Tensor<2> {
        match self {
            Self::Before(embeddings) | Self::After(embeddings) => embeddings,
        }
    }
}

/// The embedding of every piece beside C: `[batch, pieces, embedding + code]`.
fn beside(code: &Code, embeddings: Option<Embeddings>) -> Tensor<3> {
    let code = code.pooled().unsqueeze_dim::<3>(1);
    let Some(embeddings) = embeddings else { return code };
    let before = matches!(embeddings, Embeddings::Before(_));
    let embeddings = embeddings.into_tensor();
    let ([batch, _, width], [pieces, dim]) = (code.dims(), embeddings.dims());
    let embeddings = embeddings.unsqueeze::<3>().expand([batch, pieces, dim]);
    let code = code.expand([batch, pieces, width]);
    Tensor::cat(if before { vec![embeddings, code] } else { vec![code, embeddings] }, 2)
}

/// Linear layers, each with ReLU.
#[derive(Module, Debug)]
pub struct Mlp {
    /// From the input to the features.
    pub layers: Vec<Linear>,
    spectral: bool,
}

impl Mlp {
    fn new(inputs: usize, widths: &[usize], spectral: bool, device: &Device) -> Self {
        let inputs = std::iter::once(inputs).chain(widths.iter().copied());
        let layers = inputs.zip(widths).map(|(i, &o)| LinearConfig::new(i, o).init(device)).collect();
        Self { layers, spectral }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.layers.iter().fold(x, |x, layer| match self.spectral {
            false => layer.forward_activated(x, Activation::Relu),
            true => {
                let weight = unstretched(layer.weight.val());
                linear(x, weight, layer.bias.as_ref().map(Param::val), Activation::Relu)
            }
        })
    }
}

/// A matrix over its largest singular value, which is found by power iteration; its vectors are constants of the gradient
/// (Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv 1802.05957, Eq. (8)).
fn unstretched(weight: Tensor<2>) -> Tensor<2> {
    const ITERATIONS: usize = 8;
    let unit = |x: Tensor<2>| {
        let norm = x.clone().square().sum().sqrt().clamp_min(1e-12).unsqueeze::<2>();
        x / norm
    };
    let constant = weight.clone().without_autodiff();
    let [_, outputs] = weight.dims();
    // Uneven, so that it is not orthogonal to the first vector of a matrix with equal columns of either sign.
    let start: Vec<f32> = (0..outputs).map(|i| 1.0 + (i % 7) as f32 / 7.0).collect();
    let mut right = unit(Tensor::from_data(TensorData::new(start, [outputs, 1]), &weight.device()));
    let mut left = unit(constant.clone().matmul(right.clone()));
    for _ in 0..ITERATIONS {
        right = unit(constant.clone().transpose().matmul(left));
        left = unit(constant.clone().matmul(right.clone()));
    }
    let largest = left.transpose().matmul(weight.clone()).matmul(right); // [1, 1]
    weight / largest.clamp_min(1e-12)
}

/// A grid of a quarter of the pieces, doubled twice.
#[derive(Module, Debug)]
pub struct Cnn {
    /// From C to the grid.
    pub seed: Linear,
    /// Embeddings to features, added to the grid's; where there are embeddings.
    pub embed: Option<Linear>,
    /// The two doublings.
    pub ups: [ConvTranspose1d; 2],
    grid: usize,
    count: usize,
}

impl Cnn {
    fn new(code: usize, width: usize, pieces: &Pieces, device: &Device) -> Self {
        let grid = pieces.count.div_ceil(4);
        let up = || ConvTranspose1dConfig::new([width, width], 4).with_stride(2).with_padding(1).init(device);
        Self {
            seed: LinearConfig::new(code, width * grid).init(device),
            embed: (pieces.embedding > 0).then(|| LinearConfig::new(pieces.embedding, width).init(device)),
            ups: [up(), up()],
            grid,
            count: pieces.count,
        }
    }

    fn forward(&self, code: &Code, embeddings: Option<Embeddings>) -> Tensor<3> {
        let x = self.seed.forward_activated(code.pooled(), Activation::Relu);
        let [batch, _] = x.dims();
        let x = x.reshape([batch as isize, -1, self.grid as isize]);
        let [first, second] = &self.ups;
        let x = second.forward(activation::relu(first.forward(x))); // [batch, width, 4 grid]
        let x = x.narrow(2, 0, self.count).swap_dims(1, 2);
        activation::relu(match (&self.embed, embeddings) {
            (Some(embed), Some(embeddings)) => x + embed.forward(embeddings.into_tensor()).unsqueeze::<3>(),
            _ => x,
        })
    }
}

/// A gated recurrent unit that runs over the pieces (Cho et al., arXiv 1406.1078).
#[derive(Module, Debug)]
pub struct Rnn {
    /// C to the first state.
    pub start: Linear,
    /// Inputs to the gates r, z, n.
    pub input: Linear,
    /// States to the gates r, z, n.
    pub hidden: Linear,
    count: usize,
    width: usize,
}

impl Rnn {
    fn forward(&self, code: &Code, embeddings: Option<Embeddings>) -> Tensor<3> {
        let mut h = self.start.forward_activated(code.pooled(), Activation::Tanh); // [batch, width]
        let inputs = self.input.forward(beside(code, embeddings)); // [batch, pieces, 3 width]
        let gate = |x: &Tensor<2>, number: usize| x.clone().narrow(1, number * self.width, self.width);
        let mut features = Vec::with_capacity(self.count);
        for piece in 0..self.count {
            let x = inputs.clone().narrow(1, piece, 1).squeeze_dim::<2>(1);
            let state = self.hidden.forward(h.clone());
            let r = activation::sigmoid(gate(&x, 0) + gate(&state, 0));
            let z = activation::sigmoid(gate(&x, 1) + gate(&state, 1));
            let n = activation::tanh(gate(&x, 2) + r * gate(&state, 2));
            h = n.clone() + z * (h - n);
            features.push(h.clone());
        }
        Tensor::stack(features, 1)
    }
}

/// One layer of self-attention among queries and cross-attention to C.
#[derive(Module, Debug)]
pub struct CrossAttention {
    /// One for every piece, `[pieces, width]`
    pub queries: Param<Tensor<2>>,
    /// Embeddings to queries, where there are embeddings.
    pub embed: Option<Linear>,
    /// Tokens of every conditioning to the width.
    pub tokens: Vec<Linear>,
    /// Among the queries.
    pub among: MultiHeadAttention,
    /// From the queries to the tokens.
    pub across: MultiHeadAttention,
    /// After the attention.
    pub output: Linear,
}

impl CrossAttention {
    fn new(code_dims: &[usize], width: usize, pieces: &Pieces, device: &Device) -> Self {
        let heads = if width.is_multiple_of(4) { 4 } else { 1 };
        let attention = || MultiHeadAttentionConfig::new(width, heads).with_dropout(0.0).init(device);
        Self {
            queries: Initializer::Normal { mean: 0.0, std: 1.0 }.init([pieces.count, width], device),
            embed: (pieces.embedding > 0).then(|| LinearConfig::new(pieces.embedding, width).init(device)),
            tokens: code_dims.iter().map(|&dim| LinearConfig::new(dim, width).init(device)).collect(),
            among: attention(),
            across: attention(),
            output: LinearConfig::new(width, width).init(device),
        }
    }

    fn forward(&self, code: &Code, embeddings: Option<Embeddings>) -> Tensor<3> {
        let tokens = code.0.iter().zip(&self.tokens).map(|(part, layer)| layer.forward(part.clone()));
        let tokens = Tensor::cat(tokens.collect(), 1); // [batch, tokens, width]
        let queries = match (&self.embed, embeddings) {
            (Some(embed), Some(embeddings)) => self.queries.val() + embed.forward(embeddings.into_tensor()),
            _ => self.queries.val(),
        };
        let [pieces, width] = queries.dims();
        let x = queries.unsqueeze::<3>().expand([tokens.dims()[0], pieces, width]);
        let x = x.clone() + self.across.forward(MhaInput::new(x, tokens.clone(), tokens)).context;
        let x = x.clone() + self.among.forward(MhaInput::self_attn(x)).context;
        self.output.forward_activated(x, Activation::Relu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unstretched_matrix_has_one_for_its_largest_singular_value() {
        let device = Device::flex();
        // Singular values 3 and 1: a rotation by 30°, scaled, and turned back.
        let (sin, cos) = 30f32.to_radians().sin_cos();
        let turn = Tensor::<2>::from_floats([[cos, -sin], [sin, cos]], &device);
        let stretch = Tensor::<2>::from_floats([[3.0, 0.0], [0.0, 1.0]], &device);
        let matrix = turn.clone().matmul(stretch.clone()).matmul(turn.clone().transpose());
        let expected = turn.clone().matmul(stretch / 3.0).matmul(turn.transpose());
        let apart = (unstretched(matrix) - expected).abs().max().into_scalar::<f32>();
        assert!(apart < 1e-4, "{apart}");
    }
}
