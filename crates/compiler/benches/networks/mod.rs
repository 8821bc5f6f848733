//! Networks with random weights that are measured, and in small compared with the reference.

use burn::backend::DispatchTensor;
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Network, Port, PortKind, random_stream};
use kiln_ops::{
    Activation, AttentionOptions, activate, adaptive_avg_pool2d, attention, batch_norm, conv2d, layer_norm,
    linear, max_pool2d, rms_norm,
};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// A network of images `[batch, 3, height, width]`, or of embedded text `[batch, time, width]`.
#[derive(Debug, Clone, Copy)]
pub enum Example {
    /// He et al., arXiv 1512.03385, table 1, with a width of 64.
    ResNet18,
    /// Sandler et al., arXiv 1801.04381, table 2.
    MobileNetV2,
    /// Devlin et al., arXiv 1810.04805: a stack of layers.
    Bert { layers: usize, heads: usize },
    /// Touvron et al., arXiv 2302.13971: a stack of layers with RMS norm and SwiGLU.
    Llama { layers: usize, heads: usize },
    /// Yang et al., arXiv 2312.06635: a stack of layers with gated linear attention by chunks of 64 steps, and SwiGLU.
    Gla { layers: usize, heads: usize },
}

/// A network for inputs of one shape.
pub struct Frozen {
    pub example: Example,
    pub input: Vec<usize>,
}

impl Network for Frozen {
    fn kind(&self) -> &str {
        "example"
    }

    fn inputs(&self) -> Vec<Port> {
        vec![Port { name: "x".into(), kind: PortKind::Float, shape: self.input.clone() }]
    }

    fn outputs(&self) -> Vec<Port> {
        let shape = match self.example {
            Example::ResNet18 | Example::MobileNetV2 => vec![self.input[0], 1000],
            Example::Bert { .. } | Example::Llama { .. } | Example::Gla { .. } => self.input.clone(),
        };
        vec![Port { name: "y".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, _: &Device) {}

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let x = inputs.into_iter().next().expect("there is one input");
        let mut weights = Weights(random_stream(0, "weights", 0));
        vec![match self.example {
            Example::ResNet18 => resnet18(Tensor::from_dispatch(x), &mut weights).into_dispatch(),
            Example::MobileNetV2 => mobilenet_v2(Tensor::from_dispatch(x), &mut weights).into_dispatch(),
            Example::Bert { layers, heads, .. } => (0..layers)
                .fold(Tensor::from_dispatch(x), |x, _| bert_layer(x, heads, &mut weights))
                .into_dispatch(),
            Example::Llama { layers, heads, .. } => (0..layers)
                .fold(Tensor::from_dispatch(x), |x, _| llama_layer(x, heads, &mut weights))
                .into_dispatch(),
            Example::Gla { layers, heads, .. } => (0..layers)
                .fold(Tensor::from_dispatch(x), |x, _| gla_layer(x, heads, &mut weights))
                .into_dispatch(),
        }]
    }
}

/// Random numbers, on the device of the input: the same whenever the network runs.
struct Weights(ChaCha8Rng);

impl Weights {
    fn normal<const D: usize>(
        &mut self,
        shape: [usize; D],
        mean: f32,
        deviation: f32,
        device: &Device,
    ) -> Tensor<D> {
        let mut draw = || {
            let z: f32 = StandardNormal.sample(&mut self.0);
            mean + deviation * z
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw()).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    /// A convolution with batch norm.
    fn conv(
        &mut self,
        x: Tensor<4>,
        outputs: usize,
        kernel: usize,
        stride: usize,
        groups: usize,
    ) -> Tensor<4> {
        let (device, inputs) = (x.device(), x.dims()[1] / groups);
        let deviation = (2.0 / (inputs * kernel * kernel) as f32).sqrt();
        let weight = self.normal([outputs, inputs, kernel, kernel], 0.0, deviation, &device);
        let padding = [kernel / 2; 2];
        let options = ConvOptions::new([stride; 2], padding, [1; 2], groups);
        let x = conv2d(x, weight, None, options);
        let [gamma, variance] = [1.0, 1.0].map(|mean| self.normal([outputs], mean, 0.1, &device));
        let [beta, mean] = [0.0, 0.0].map(|mean| self.normal([outputs], mean, 0.1, &device));
        batch_norm(x, gamma, beta, mean, variance.abs(), 1e-5)
    }

    fn linear<const D: usize>(&mut self, x: Tensor<D>, outputs: usize) -> Tensor<D> {
        let (device, inputs) = (x.device(), x.dims()[D - 1]);
        let weight = self.normal([inputs, outputs], 0.0, (inputs as f32).powf(-0.5), &device);
        let bias = self.normal([outputs], 0.0, 0.1, &device);
        linear(x, weight, Some(bias), Activation::Identity)
    }

    fn layer_norm(&mut self, x: Tensor<3>) -> Tensor<3> {
        let (device, width) = (x.device(), x.dims()[2]);
        let weight = self.normal([width], 1.0, 0.1, &device);
        let bias = self.normal([width], 0.0, 0.1, &device);
        layer_norm(x, weight, Some(bias), 1e-12)
    }

    fn rms_norm<const D: usize>(&mut self, x: Tensor<D>) -> Tensor<D> {
        let (device, width) = (x.device(), x.dims()[D - 1]);
        let weight = self.normal([width], 1.0, 0.1, &device);
        rms_norm(x, weight, 1e-6)
    }
}

fn relu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(x, Activation::Relu)
}

fn classify(x: Tensor<4>, weights: &mut Weights) -> Tensor<2> {
    let [batch, channels, _, _] = x.dims();
    weights.linear(adaptive_avg_pool2d(x, [1, 1]).reshape([batch, channels]), 1000)
}

fn resnet18(x: Tensor<4>, weights: &mut Weights) -> Tensor<2> {
    let x = relu(weights.conv(x, 64, 7, 2, 1));
    let mut x = max_pool2d(x, MaxPoolOptions::new([3; 2]).with_stride([2; 2]).with_padding([1; 2]));
    for (outputs, stride) in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)] {
        let mut shortcut = x.clone();
        if x.dims()[1] != outputs {
            shortcut = weights.conv(shortcut, outputs, 1, stride, 1);
        }
        let inner = relu(weights.conv(x, outputs, 3, stride, 1));
        x = relu(weights.conv(inner, outputs, 3, 1, 1) + shortcut);
    }
    classify(x, weights)
}

fn mobilenet_v2(x: Tensor<4>, weights: &mut Weights) -> Tensor<2> {
    let relu6 = |x: Tensor<4>| x.clamp(0.0, 6.0);
    let mut x = relu6(weights.conv(x, 32, 3, 2, 1));
    let settings = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ];
    for (expansion, outputs, repeats, first_stride) in settings {
        for repeat in 0..repeats {
            let inputs = x.dims()[1];
            let hidden = inputs * expansion;
            let stride = if repeat == 0 { first_stride } else { 1 };
            let mut y = x.clone();
            if expansion > 1 {
                y = relu6(weights.conv(y, hidden, 1, 1, 1));
            }
            y = relu6(weights.conv(y, hidden, 3, stride, hidden));
            y = weights.conv(y, outputs, 1, 1, 1);
            x = if stride == 1 && inputs == outputs { x + y } else { y };
        }
    }
    let x = relu6(weights.conv(x, 1280, 1, 1, 1));
    classify(x, weights)
}

fn heads_of(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, time, width] = x.dims();
    x.reshape([batch, time, heads, width / heads]).swap_dims(1, 2)
}

fn self_attention(x: Tensor<3>, heads: usize, causal: bool, weights: &mut Weights) -> Tensor<3> {
    let [batch, time, width] = x.dims();
    let [q, k, v] = [0, 1, 2].map(|_| heads_of(weights.linear(x.clone(), width), heads));
    let mixed = attention(q, k, v, AttentionOptions { causal, ..AttentionOptions::default() });
    weights.linear(mixed.swap_dims(1, 2).reshape([batch, time, width]), width)
}

fn bert_layer(x: Tensor<3>, heads: usize, weights: &mut Weights) -> Tensor<3> {
    let width = x.dims()[2];
    let mixed = self_attention(x.clone(), heads, false, weights);
    let x = weights.layer_norm(x + mixed);
    let hidden = activate(weights.linear(x.clone(), 4 * width), Activation::Gelu);
    let y = weights.linear(hidden, width);
    weights.layer_norm(x + y)
}

fn llama_layer(x: Tensor<3>, heads: usize, weights: &mut Weights) -> Tensor<3> {
    let width = x.dims()[2];
    let normed = weights.rms_norm(x.clone());
    let x = x + self_attention(normed, heads, true, weights);
    swiglu(x, 2 * width, weights)
}

fn swiglu(x: Tensor<3>, hidden: usize, weights: &mut Weights) -> Tensor<3> {
    let width = x.dims()[2];
    let normed = weights.rms_norm(x.clone());
    let gate = activate(weights.linear(normed.clone(), hidden), Activation::Silu);
    let up = weights.linear(normed, hidden);
    x + weights.linear(gate * up, width)
}

/// Steps of a chunk,
const CHUNK: usize = 64;
/// and of the blocks on its diagonal.
const BLOCK: usize = 16;
/// Width between the two maps that gates are made of,
const GATE_RANK: usize = 16;
/// and what their logarithms are divided by.
const GATE_TEMPERATURE: f64 = 16.0;

fn gla_layer(x: Tensor<3>, heads: usize, weights: &mut Weights) -> Tensor<3> {
    let [batch, time, width] = x.dims();
    let normed = weights.rms_norm(x.clone());
    let [q, k] = [0, 1].map(|_| heads_of(weights.linear(normed.clone(), width / 2), heads));
    let v = heads_of(weights.linear(normed.clone(), width), heads);
    let narrow = weights.linear(normed.clone(), GATE_RANK);
    let gates = activate(weights.linear(narrow, width / 2), Activation::LogSigmoid) / GATE_TEMPERATURE;
    let mixed = gated_attention([q, k, v, heads_of(gates, heads)]);
    let mixed = weights.rms_norm(mixed).swap_dims(1, 2).reshape([batch, time, width]);
    let gate = activate(weights.linear(normed, width), Activation::Silu);
    let x = x + weights.linear(mixed * gate, width);
    swiglu(x, 2 * width, weights)
}

/// `S_t = e^g_t S_{t-1} + k_t v_tᵀ`, `o_t = q_t S_t / √K` for q, k, g `[batch, heads, time, K]` and v `[.., V]`, by whole chunks:
/// what comes from before a chunk through its state, what lies in it as attention.
fn gated_attention([q, k, v, g]: [Tensor<4>; 4]) -> Tensor<4> {
    let ([batch, heads, time, key], value) = (q.dims(), v.dims()[3]);
    let (sequences, chunks) = (batch * heads, time / CHUNK);
    let count = sequences * chunks;
    let q = (q / (key as f64).sqrt()).reshape([count, CHUNK, key]);
    let [k, v, g] = [(k, key), (v, value), (g, key)].map(|(x, width)| x.reshape([count, CHUNK, width]));
    let b = g.cumsum(1);
    let total = b.clone().narrow(1, CHUNK - 1, 1); // [count, 1, K]

    // From chunk to chunk: the state before each.
    let written = (k.clone() * (total.clone() - b.clone()).exp()).swap_dims(1, 2).matmul(v.clone());
    let written = written.reshape([sequences, chunks, key, value]);
    let decay = total.exp().reshape([sequences, chunks, key, 1]);
    let mut state = Tensor::<4>::zeros([sequences, 1, key, value], &q.device());
    let mut before = Vec::new();
    for chunk in 0..chunks {
        before.push(state.clone());
        state = decay.clone().narrow(1, chunk, 1) * state + written.clone().narrow(1, chunk, 1);
    }
    let before = Tensor::cat(before, 1).reshape([count, key, value]);
    let carried = (q.clone() * b.clone().exp()).matmul(before);

    // On the diagonal, element by element: [count · blocks, row, column, K]
    let blocks = count * CHUNK / BLOCK;
    let rows = |x: &Tensor<3>| x.clone().reshape([blocks, BLOCK, 1, key]);
    let columns = |x: &Tensor<3>| x.clone().reshape([blocks, 1, BLOCK, key]);
    let future = (0..BLOCK * BLOCK).map(|at| if at % BLOCK > at / BLOCK { f32::NEG_INFINITY } else { 0.0 });
    let future = TensorData::new(future.collect::<Vec<f32>>(), [1, BLOCK, BLOCK, 1]);
    let exponent = rows(&b) - columns(&b) + Tensor::from_data(future, &q.device());
    let scores = (rows(&q) * exponent.exp() * columns(&k)).sum_dim(3).reshape([blocks, BLOCK, BLOCK]);
    let inside = scores.matmul(v.clone().reshape([blocks, BLOCK, value])).reshape([count, CHUNK, value]);

    // Below it as products, around the first row of each block: no exponent is above 0.
    let mut parts = vec![inside.clone().narrow(1, 0, BLOCK)];
    for start in (BLOCK..CHUNK).step_by(BLOCK) {
        let reference = b.clone().narrow(1, start, 1);
        let queries =
            q.clone().narrow(1, start, BLOCK) * (b.clone().narrow(1, start, BLOCK) - reference.clone()).exp();
        let keys = k.clone().narrow(1, 0, start) * (reference - b.clone().narrow(1, 0, start)).exp();
        let below = queries.matmul(keys.swap_dims(1, 2)).matmul(v.clone().narrow(1, 0, start));
        parts.push(inside.clone().narrow(1, start, BLOCK) + below);
    }
    (carried + Tensor::cat(parts, 1)).reshape([batch, heads, time, value])
}
