//! The Mamba language model (Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
//! arXiv 2312.00752), with the parameter names of its published checkpoints.
//!
//! A block is `x + mixer(norm(x))`; the mixer (Fig. 3 of the paper) computes
//!
//! ```text
//! u, z    = in_proj(x)
//! u       = silu(conv1d(u))
//! dt, B, C = x_proj(u)
//! Δ       = softplus(dt_proj(dt))
//! out     = out_proj( selective_scan(u, Δ, -exp(A_log), B, C, D) * silu(z) )
//! ```
#![allow(non_snake_case, reason = "parameters are named as in published checkpoints")]

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer};
use burn::tensor::{Device, Int, Tensor};
use kiln_core::{HostTensor, Result, TensorFile};
use kiln_nn::{LanguageModel, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use kiln_ops::{Activation, activate, gated};

use crate::selective_scan::selective_scan_with_state;
use crate::short_conv::{ShortConv, ShortConvConfig};

/// Step sizes that the layers start with: Δ is drawn log-uniformly between these.
const TIME_STEP: [f64; 2] = [1e-3, 1e-1];

/// Configuration of a [`MambaLm`].
#[derive(Config, Debug)]
pub struct MambaConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Width inside the mixers, in multiples of `hidden_size`.
    #[config(default = 2)]
    pub expand: usize,
    /// Numbers that every channel remembers.
    #[config(default = 16)]
    pub state_size: usize,
    /// Steps that the short convolutions see.
    #[config(default = 4)]
    pub conv_kernel: usize,
    /// Rank of the projection that gives the step sizes; by default a sixteenth of `hidden_size`, rounded up.
    pub time_step_rank: Option<usize>,
    /// Added to the mean square in the norms.
    #[config(default = 1e-5)]
    pub layer_norm_epsilon: f64,
}

/// A selective state-space model over token ids.
#[derive(Module, Debug)]
pub struct MambaLm {
    /// Embedding, blocks and final norm.
    pub backbone: MambaBackbone,
    /// `[hidden, vocab]`
    pub lm_head: Linear,
}

/// Everything but the output projection.
#[derive(Module, Debug)]
pub struct MambaBackbone {
    /// `[vocab, hidden]`
    pub embeddings: Embedding,
    /// The blocks.
    pub layers: Vec<MambaBlock>,
    /// Norm before the output projection.
    pub norm_f: RmsNorm,
}

/// `x + mixer(norm(x))`.
#[derive(Module, Debug)]
pub struct MambaBlock {
    /// Norm before the mixer.
    pub norm: RmsNorm,
    /// The selective state-space layer.
    pub mixer: MambaMixer,
}

/// The selective state-space layer; `inner` is `expand * hidden`.
#[derive(Module, Debug)]
pub struct MambaMixer {
    /// `[hidden, 2 inner]`, the scan's input and the gate
    pub in_proj: Linear,
    /// Over `inner` channels.
    pub conv1d: ShortConv,
    /// `[inner, rank + 2 state]`, what Δ, B and C depend on
    pub x_proj: Linear,
    /// `[rank, inner]`
    pub dt_proj: Linear,
    /// `[inner, state]`, `ln(-A)`
    pub A_log: Param<Tensor<2>>,
    /// `[inner]`
    pub D: Param<Tensor<1>>,
    /// `[inner, hidden]`
    pub out_proj: Linear,
}

/// What the blocks remember; its size does not depend on the number of tokens read.
#[derive(Debug, Clone)]
pub struct MambaState {
    layers: Vec<MixerState>,
}

/// What a mixer remembers.
#[derive(Debug, Clone)]
struct MixerState {
    /// The convolution's last inputs, `[batch, conv_kernel - 1, inner]`
    tail: Tensor<3>,
    /// `[batch, inner, state]`
    h: Tensor<3>,
}

impl MambaConfig {
    /// Draws the parameters as the authors' implementation does.
    pub fn init(&self, device: &Device) -> MambaLm {
        let norm = RmsNormConfig::new(self.hidden_size).with_epsilon(self.layer_norm_epsilon);
        let normal = Initializer::Normal { mean: 0.0, std: 0.02 };
        let block = || MambaBlock { norm: norm.init(device), mixer: self.init_mixer(device) };
        MambaLm {
            backbone: MambaBackbone {
                embeddings: EmbeddingConfig::new(self.vocab_size, self.hidden_size)
                    .with_initializer(normal.clone())
                    .init(device),
                layers: (0..self.num_hidden_layers).map(|_| block()).collect(),
                norm_f: norm.init(device),
            },
            lm_head: LinearConfig::new(self.hidden_size, self.vocab_size)
                .with_bias(false)
                .with_initializer(normal)
                .init(device),
        }
    }

    fn init_mixer(&self, device: &Device) -> MambaMixer {
        let inner = self.expand * self.hidden_size;
        let state = self.state_size;
        let rank = self.time_step_rank.unwrap_or_else(|| self.hidden_size.div_ceil(16));
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).with_bias(false).init(device);

        // A_n = -(n + 1)
        let a_log = Initializer::Zeros.init([inner, state], device).init_mapper(|zeros: Tensor<2>| {
            let [_, state] = zeros.dims();
            let rates = Tensor::<1, Int>::arange(1..state as i64 + 1, &zeros.device()).float();
            zeros + rates.log().unsqueeze::<2>()
        });
        let bound = (rank as f64).sqrt().recip();
        let [shortest, longest] = TIME_STEP.map(f64::ln);
        let dt_proj = Linear {
            weight: Initializer::Uniform { min: -bound, max: bound }.init([rank, inner], device),
            bias: Some(
                Initializer::Uniform { min: shortest, max: longest }
                    .init([inner], device)
                    .init_mapper(|log_step: Tensor<1>| inverse_softplus(log_step.exp())),
            ),
        };
        // Smaller by the root of the number of blocks, so that the residual stream's variance does not grow.
        let residual_gain = (3.0 * self.num_hidden_layers as f64).sqrt().recip();
        let out_proj = LinearConfig::new(inner, self.hidden_size)
            .with_bias(false)
            .with_initializer(Initializer::KaimingUniform { gain: residual_gain, fan_out_only: false })
            .init(device);
        MambaMixer {
            in_proj: linear(self.hidden_size, 2 * inner),
            conv1d: ShortConvConfig::new(inner, self.conv_kernel).init(device),
            x_proj: linear(inner, rank + 2 * state),
            dt_proj,
            A_log: a_log,
            D: Initializer::Ones.init([inner], device),
            out_proj,
        }
    }
}

/// `x` with `softplus(x) = y`, for `y > 0`.
fn inverse_softplus(y: Tensor<1>) -> Tensor<1> {
    y.clone() + y.neg().exp().neg().log1p()
}

impl MambaMixer {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x, output: `[batch, time, hidden]`
    fn forward(&self, x: Tensor<3>, state: MixerState) -> (Tensor<3>, MixerState) {
        let [inner, state_size] = self.A_log.lazy_shape().dims();
        let [rank, _] = self.dt_proj.weight.lazy_shape().dims();

        let projected = self.in_proj.forward(x);
        let (u, z) = (projected.clone().narrow(2, 0, inner), projected.narrow(2, inner, inner));
        let (u, tail) = self.conv1d.forward_with_tail(u, state.tail);
        let u = activate(u, Activation::Silu);

        let selected = self.x_proj.forward(u.clone());
        let dt = selected.clone().narrow(2, 0, rank);
        let delta = self.dt_proj.forward_activated(dt, Activation::Softplus);
        let b = selected.clone().narrow(2, rank, state_size);
        let c = selected.narrow(2, rank + state_size, state_size);
        let a = self.A_log.val().exp().neg();
        let (y, h) = selective_scan_with_state(u, delta, a, b, c, self.D.val(), state.h);
        (self.out_proj.forward(gated(z, y, Activation::Silu)), MixerState { tail, h })
    }

    fn initial_state(&self, batch: usize, device: &Device) -> MixerState {
        let [inner, state] = self.A_log.lazy_shape().dims();
        MixerState {
            tail: self.conv1d.initial_tail(batch, device),
            h: Tensor::zeros([batch, inner, state], device),
        }
    }
}

impl LanguageModel for MambaLm {
    type State = MambaState;

    fn vocab_size(&self) -> usize {
        self.backbone.embeddings.weight.lazy_shape()[0]
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let state = self.initial_state(ids.dims()[0], &ids.device());
        self.forward_with_state(ids, state).0
    }

    fn initial_state(&self, batch: usize, device: &Device) -> MambaState {
        let layers = &self.backbone.layers;
        MambaState { layers: layers.iter().map(|layer| layer.mixer.initial_state(batch, device)).collect() }
    }

    fn forward_with_state(&self, ids: Tensor<2, Int>, state: MambaState) -> (Tensor<3>, MambaState) {
        let mut x = self.backbone.embeddings.forward(ids);
        let mut layers = Vec::with_capacity(state.layers.len());
        for (block, state) in self.backbone.layers.iter().zip(state.layers) {
            let (mixed, state) = block.mixer.forward(block.norm.forward(x.clone()), state);
            x = x + mixed;
            layers.push(state);
        }
        let logits = self.lm_head.forward(self.backbone.norm_f.forward(x));
        (logits, MambaState { layers })
    }

    fn state_to_tensors(&self, state: MambaState) -> Result<TensorFile> {
        let mut file = TensorFile::new();
        for (layer, MixerState { tail, h }) in state.layers.into_iter().enumerate() {
            file.insert(format!("layers.{layer}.tail"), HostTensor::from_tensor(tail));
            file.insert(format!("layers.{layer}.state"), HostTensor::from_tensor(h));
        }
        Ok(file)
    }

    fn state_from_tensors(&self, file: &mut TensorFile, device: &Device) -> Result<MambaState> {
        let mut state = self.initial_state(1, device);
        for (layer, MixerState { tail, h }) in state.layers.iter_mut().enumerate() {
            *tail = file.take_shaped(&format!("layers.{layer}.tail"), tail.dims(), device)?;
            *h = file.take_shaped(&format!("layers.{layer}.state"), h.dims(), device)?;
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Gradients, Tolerance};
    use kiln_core::{TensorFile, random_stream};
    use kiln_nn::{ids_to_tensor, initialise};

    fn drawn(config: &MambaConfig, device: &Device) -> MambaLm {
        initialise(device, &mut random_stream(7, "mamba", 0), |device| config.init(device))
    }

    fn tiny(device: &Device) -> MambaLm {
        drawn(&MambaConfig::new(11, 8, 2).with_state_size(3), device)
    }

    #[test]
    fn a_text_read_token_by_token_gives_the_logits_of_the_whole() {
        let device = Device::flex();
        let model = tiny(&device);
        let ids = [1, 5, 2, 10, 0, 3, 3, 7];
        let whole = model.forward(ids_to_tensor(&ids, &device));
        let mut state = model.initial_state(1, &device);
        let mut pieces = Vec::new();
        for piece in ids.chunks(1) {
            let (logits, next) = model.forward_with_state(ids_to_tensor(piece, &device), state);
            pieces.push(logits);
            state = next;
        }
        let pieces = Tensor::cat(pieces, 1);
        whole.into_data().assert_approx_eq::<f32>(&pieces.into_data(), Tolerance::absolute(1e-4));
    }

    #[test]
    fn every_parameter_has_a_gradient() {
        let device = Device::flex().autodiff();
        let model = tiny(&device);
        let grads = model.forward(ids_to_tensor(&[1, 5, 2, 10, 0], &device)).powi_scalar(2).sum().backward();
        let mixer = &model.backbone.layers[0].mixer;
        fn largest<const D: usize>(param: &Param<Tensor<D>>, grads: &Gradients) -> f32 {
            let gradient = param.val().grad(grads).expect("the parameter takes part");
            gradient.abs().max().into_scalar()
        }
        let gradients = [
            largest(&mixer.in_proj.weight, &grads),
            largest(&mixer.conv1d.weight, &grads),
            largest(&mixer.x_proj.weight, &grads),
            largest(&mixer.dt_proj.weight, &grads),
            largest(&mixer.A_log, &grads),
            largest(&mixer.D, &grads),
            largest(&mixer.out_proj.weight, &grads),
        ];
        assert!(gradients.iter().all(|&x| x.is_finite() && x > 0.0), "{gradients:?}");
    }

    #[test]
    fn layers_start_with_the_papers_rates_and_step_sizes() {
        let device = Device::flex();
        let model = drawn(&MambaConfig::new(11, 32, 1), &device);
        let mixer = &model.backbone.layers[0].mixer;
        let rates = mixer.A_log.val().exp().into_data().try_to_vec::<f32>().unwrap();
        for (i, rate) in rates.into_iter().enumerate() {
            assert!((rate - (i % 16 + 1) as f32).abs() < 1e-4);
        }
        let steps = activate(mixer.dt_proj.bias.as_ref().unwrap().val(), Activation::Softplus);
        let steps = steps.into_data().try_to_vec::<f32>().unwrap();
        assert!(steps.iter().all(|&step| (0.99e-3..1.01e-1).contains(&step)), "{steps:?}");
        let short = steps.iter().filter(|&&step| step < 1e-2).count();
        assert!((16..48).contains(&short), "half of {} steps should be below 0.01, not {short}", steps.len());
    }

    #[test]
    fn parameters_are_named_as_in_published_checkpoints() {
        let file = TensorFile::from_module(&tiny(&Device::flex()));
        let names: Vec<&str> = file.names().filter(|name| !name.contains("layers.1.")).collect();
        assert_eq!(
            names,
            [
                "backbone.embeddings.weight",
                "backbone.layers.0.mixer.A_log",
                "backbone.layers.0.mixer.D",
                "backbone.layers.0.mixer.conv1d.bias",
                "backbone.layers.0.mixer.conv1d.weight",
                "backbone.layers.0.mixer.dt_proj.bias",
                "backbone.layers.0.mixer.dt_proj.weight",
                "backbone.layers.0.mixer.in_proj.weight",
                "backbone.layers.0.mixer.out_proj.weight",
                "backbone.layers.0.mixer.x_proj.weight",
                "backbone.layers.0.norm.weight",
                "backbone.norm_f.weight",
                "lm_head.weight",
            ]
        );
        assert_eq!(file.get("backbone.layers.0.mixer.conv1d.weight").unwrap().shape, [16, 1, 4]);
        assert_eq!(file.get("backbone.layers.0.mixer.x_proj.weight").unwrap().shape, [1 + 2 * 3, 16]);
    }
}
