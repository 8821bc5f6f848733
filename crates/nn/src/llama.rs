//! The reference Transformer language model: RMSNorm, rotary positions, causal softmax attention and
//! SwiGLU (Touvron et al., "LLaMA", arXiv 2302.13971), with the parameter names of its published
//! checkpoints.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Initializer};
use burn::tensor::{Device, Int, Tensor};

use crate::{
    CausalSelfAttention, CausalSelfAttentionConfig, KvCache, LanguageModel, Linear, LinearConfig, RmsNorm,
    RmsNormConfig, Rotary, RotaryTable, SwiGlu, SwiGluConfig, swiglu_hidden,
};

/// Configuration of a [`Llama`].
#[derive(Config, Debug)]
pub struct LlamaConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Heads of every attention layer; divides `hidden_size` into even head widths.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward layers; by default [`swiglu_hidden`] at ratio 4.
    pub intermediate_size: Option<usize>,
    /// Base of the rotary frequencies.
    #[config(default = 10000.0)]
    pub rope_theta: f64,
    /// Added to the mean square in the norms.
    #[config(default = 1e-5)]
    pub rms_norm_eps: f64,
}

/// A decoder-only Transformer over token ids.
#[derive(Module, Debug)]
pub struct Llama {
    /// Embedding, blocks and final norm.
    pub model: LlamaBody,
    /// `[hidden, vocab]`
    pub lm_head: Linear,
}

/// Everything but the output projection.
#[derive(Module, Debug)]
pub struct LlamaBody {
    /// `[vocab, hidden]`
    pub embed_tokens: Embedding,
    /// The blocks.
    pub layers: Vec<LlamaBlock>,
    /// Norm before the output projection.
    pub norm: RmsNorm,
    #[module(skip)]
    rotary: Rotary,
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Module, Debug)]
pub struct LlamaBlock {
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: CausalSelfAttention,
    /// Norm before the feed-forward layer.
    pub post_attention_layernorm: RmsNorm,
    /// Feed-forward layer.
    pub mlp: SwiGlu,
}

/// Keys and values of every block; it grows by one entry a token.
#[derive(Debug, Clone)]
pub struct LlamaState {
    layers: Vec<Option<KvCache>>,
    position: usize,
}

impl LlamaConfig {
    /// Draws the parameters: normal with standard deviation 0.02, the projections that write into the
    /// residual stream smaller by the square root of their number, so that its variance does not grow
    /// with depth.
    ///
    /// # Panics
    /// When the heads do not divide the width into even head widths.
    pub fn init(&self, device: &Device) -> Llama {
        let head_dim = self.hidden_size / self.num_attention_heads;
        assert_eq!(head_dim % 2, 0, "rotary positions need an even head width, not {head_dim}");
        let residual_writers = 2 * self.num_hidden_layers;
        let normal = |std: f64| Initializer::Normal { mean: 0.0, std };
        let initializer = normal(0.02);
        let residual_initializer = normal(0.02 / (residual_writers as f64).sqrt());

        let norm = RmsNormConfig::new(self.hidden_size).with_epsilon(self.rms_norm_eps);
        let attention = CausalSelfAttentionConfig::new(self.hidden_size, self.num_attention_heads)
            .with_initializer(initializer.clone())
            .with_residual_initializer(residual_initializer.clone());
        let hidden = self.intermediate_size.unwrap_or_else(|| swiglu_hidden(self.hidden_size, 4.0));
        let mlp = SwiGluConfig::new(self.hidden_size, hidden)
            .with_initializer(initializer.clone())
            .with_residual_initializer(residual_initializer);
        let block = || LlamaBlock {
            input_layernorm: norm.init(device),
            self_attn: attention.init(device),
            post_attention_layernorm: norm.init(device),
            mlp: mlp.init(device),
        };
        Llama {
            model: LlamaBody {
                embed_tokens: EmbeddingConfig::new(self.vocab_size, self.hidden_size)
                    .with_initializer(initializer.clone())
                    .init(device),
                layers: (0..self.num_hidden_layers).map(|_| block()).collect(),
                norm: norm.init(device),
                rotary: Rotary { dim: head_dim, base: self.rope_theta },
            },
            lm_head: LinearConfig::new(self.hidden_size, self.vocab_size)
                .with_bias(false)
                .with_initializer(initializer)
                .init(device),
        }
    }
}

impl LlamaBlock {
    /// Applies the block to new positions, `[batch, time, hidden]`.
    fn forward(&self, x: Tensor<3>, positions: &RotaryTable, cache: Option<KvCache>) -> (Tensor<3>, KvCache) {
        let (mixed, cache) =
            self.self_attn.forward(self.input_layernorm.forward(x.clone()), positions, cache);
        let x = x + mixed;
        let fed = self.mlp.forward(self.post_attention_layernorm.forward(x.clone()));
        (x + fed, cache)
    }
}

impl LanguageModel for Llama {
    type State = LlamaState;

    fn vocab_size(&self) -> usize {
        self.model.embed_tokens.weight.lazy_shape()[0]
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let state = self.initial_state(ids.dims()[0], &ids.device());
        self.forward_with_state(ids, state).0
    }

    fn initial_state(&self, _batch: usize, _device: &Device) -> LlamaState {
        LlamaState { layers: vec![None; self.model.layers.len()], position: 0 }
    }

    fn forward_with_state(&self, ids: Tensor<2, Int>, state: LlamaState) -> (Tensor<3>, LlamaState) {
        let [_, time] = ids.dims();
        let positions = self.model.rotary.table(state.position, time, &ids.device());
        let mut x = self.model.embed_tokens.forward(ids);
        let mut layers = Vec::with_capacity(self.model.layers.len());
        for (block, cache) in self.model.layers.iter().zip(state.layers) {
            let (y, cache) = block.forward(x, &positions, cache);
            x = y;
            layers.push(Some(cache));
        }
        let logits = self.lm_head.forward(self.model.norm.forward(x));
        (logits, LlamaState { layers, position: state.position + time })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Task, TrainConfig, ids_to_tensor, next_token_loss, train};
    use burn::tensor::Tolerance;
    use kiln_core::{Context, Result, TensorFile};

    fn tiny() -> Llama {
        let config = LlamaConfig::new(11, 8, 2, 2).with_intermediate_size(Some(12));
        crate::init::test_module(|device| config.init(device))
    }

    #[test]
    fn a_text_read_in_pieces_gives_the_logits_of_the_whole() {
        let device = Device::flex();
        let model = tiny();
        let ids = [1, 5, 2, 10, 0, 3, 3];
        let whole = model.forward(ids_to_tensor(&ids, &device));
        let mut state = model.initial_state(1, &device);
        let mut pieces = Vec::new();
        for piece in [&ids[..3], &ids[3..4], &ids[4..5], &ids[5..]] {
            let (logits, next) = model.forward_with_state(ids_to_tensor(piece, &device), state);
            pieces.push(logits);
            state = next;
        }
        let pieces = Tensor::cat(pieces, 1);
        whole.into_data().assert_approx_eq::<f32>(&pieces.into_data(), Tolerance::absolute(1e-4));
    }

    /// Predicts the next digit of 0 1 2 0 1 2 ...
    struct Count;

    impl Task<Llama> for Count {
        fn loss(&mut self, model: &Llama, step: usize) -> Result<(Tensor<1>, usize)> {
            let text: Vec<u32> = (0..9).map(|at| ((step + at) % 3) as u32).collect();
            let device = Device::flex();
            let logits = model.forward(ids_to_tensor(&text[..8], &device));
            Ok((next_token_loss(logits, ids_to_tensor(&text[1..], &device)), 8))
        }

        fn validate(&mut self, model: &Llama) -> Result<f64> {
            Ok(self.loss(model, 0)?.0.into_scalar::<f32>().into())
        }
    }

    #[test]
    fn it_learns_to_count() {
        let config = TrainConfig { steps: 60, lr: 0.02, warmup: 3, ..TrainConfig::default() };
        let trained = train(tiny(), &mut Count, &config, None, false, &Context::for_tests("unused")).unwrap();
        let first = trained.log[0].loss;
        assert!((first - 11f64.ln()).abs() < 0.1, "untrained, every token is as likely: {first}");
        assert!(trained.best_loss < 0.1, "{}", trained.best_loss);
    }

    #[test]
    fn parameters_are_named_as_in_published_checkpoints() {
        let file = TensorFile::from_module(&tiny());
        let names: Vec<&str> = file.names().filter(|name| !name.contains("layers.1.")).collect();
        assert_eq!(
            names,
            [
                "lm_head.weight",
                "model.embed_tokens.weight",
                "model.layers.0.input_layernorm.weight",
                "model.layers.0.mlp.down_proj.weight",
                "model.layers.0.mlp.gate_proj.weight",
                "model.layers.0.mlp.up_proj.weight",
                "model.layers.0.post_attention_layernorm.weight",
                "model.layers.0.self_attn.k_proj.weight",
                "model.layers.0.self_attn.o_proj.weight",
                "model.layers.0.self_attn.q_proj.weight",
                "model.layers.0.self_attn.v_proj.weight",
                "model.norm.weight",
            ]
        );
    }
}
