//! The GLA language model: embedding, blocks of GLA and SwiGLU with RMSNorm before each, output projection.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Initializer};
use burn::tensor::{Device, Int, Tensor};
use kiln_core::{Error, HostTensor, Result, TensorFile};
use kiln_nn::{
    LanguageModel, Linear, LinearConfig, RmsNorm, RmsNormConfig, SwiGlu, SwiGluConfig, swiglu_hidden,
};
use serde::{Deserialize, Serialize};

use crate::layer::{FeatureMap, Gate, GatedLinearAttention, GatedLinearAttentionConfig, GlaLayerState};
use crate::op::GlaOpConfig;

/// Standard deviation of embeddings, as in the reference implementation.
const EMBEDDING_STD: f64 = 0.02;

/// Configuration of a [`GlaLm`], with the field names of the public checkpoints' `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GlaLmConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream, d.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Heads of each layer.
    pub num_heads: usize,
    /// Heads of keys, values and gates; as many as `num_heads` when absent.
    #[serde(default)]
    pub num_kv_heads: Option<usize>,
    /// Width of all keys together over d.
    #[serde(default = "defaults::expand_k")]
    pub expand_k: f64,
    /// Width of all values together over d.
    #[serde(default = "defaults::expand_v")]
    pub expand_v: f64,
    /// Hidden width of the MLP over d, before rounding up.
    #[serde(default)]
    pub hidden_ratio: Option<f64>,
    /// Hidden width of the MLP, if set.
    #[serde(default)]
    pub intermediate_size: Option<usize>,
    /// Map of queries and keys.
    #[serde(default)]
    pub feature_map: Option<FeatureMap>,
    /// Whether q, k and v pass through short convolutions.
    #[serde(default)]
    pub use_short_conv: bool,
    /// Their kernel size.
    #[serde(default = "defaults::conv_size")]
    pub conv_size: usize,
    /// Whether the layer's output is gated.
    #[serde(default = "defaults::yes")]
    pub use_output_gate: bool,
    /// Least log decay, if bounded.
    #[serde(default)]
    pub clamp_min: Option<f64>,
    /// ε of all norms.
    #[serde(default = "defaults::norm_eps")]
    pub norm_eps: f64,
    /// Whether the output projection is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Only decides how public checkpoints name the norm per head.
    #[serde(default = "defaults::yes")]
    pub fuse_norm: bool,
    /// Layers with softmax attention in public hybrid checkpoints, which Kiln does not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attn: Option<serde_json::Value>,
    /// Gate temperature τ.
    #[serde(default = "defaults::tau")]
    pub gate_logit_normalizer: f64,
    /// Rows per chunk.
    #[serde(default = "defaults::chunk")]
    pub chunk: usize,
    /// Rows per sub-block.
    #[serde(default = "defaults::sub_chunk")]
    pub sub_chunk: usize,
    /// Whether the backward pass recomputes the chunk states.
    #[serde(default)]
    pub recompute: bool,
}

/// Values of fields that a `config.json` may leave out.
mod defaults {
    pub fn expand_k() -> f64 {
        0.5
    }
    pub fn expand_v() -> f64 {
        1.0
    }
    pub fn conv_size() -> usize {
        4
    }
    pub fn yes() -> bool {
        true
    }
    pub fn norm_eps() -> f64 {
        1e-6
    }
    pub fn tau() -> f64 {
        16.0
    }
    pub fn chunk() -> usize {
        64
    }
    pub fn sub_chunk() -> usize {
        16
    }
}

impl GlaLmConfig {
    /// The paper's proportions at any size.
    pub fn new(vocab_size: usize, hidden_size: usize, layers: usize, heads: usize) -> Self {
        Self {
            vocab_size,
            hidden_size,
            num_hidden_layers: layers,
            num_heads: heads,
            num_kv_heads: None,
            expand_k: defaults::expand_k(),
            expand_v: defaults::expand_v(),
            hidden_ratio: Some(4.0),
            intermediate_size: None,
            feature_map: None,
            use_short_conv: false,
            conv_size: defaults::conv_size(),
            use_output_gate: true,
            clamp_min: None,
            norm_eps: defaults::norm_eps(),
            tie_word_embeddings: false,
            fuse_norm: true,
            attn: None,
            gate_logit_normalizer: defaults::tau(),
            chunk: defaults::chunk(),
            sub_chunk: defaults::sub_chunk(),
            recompute: false,
        }
    }

    /// The configuration of every layer.
    pub fn layer(&self, gate: Gate) -> GatedLinearAttentionConfig {
        GatedLinearAttentionConfig {
            kv_heads: self.num_kv_heads.unwrap_or(self.num_heads),
            expand_k: self.expand_k,
            expand_v: self.expand_v,
            gate,
            tau: self.gate_logit_normalizer,
            clamp_min: self.clamp_min,
            feature_map: self.feature_map.unwrap_or(FeatureMap::None),
            short_conv: self.use_short_conv.then_some(self.conv_size),
            output_gate: self.use_output_gate,
            norm_eps: self.norm_eps,
            op: GlaOpConfig { chunk: self.chunk, sub_chunk: self.sub_chunk, recompute: self.recompute },
            ..GatedLinearAttentionConfig::new(self.hidden_size, self.num_heads)
        }
    }

    /// Hidden width of the MLP.
    pub fn mlp_width(&self) -> usize {
        let ratio = self.hidden_ratio.unwrap_or(4.0);
        self.intermediate_size.unwrap_or_else(|| swiglu_hidden(self.hidden_size, ratio))
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if let Some(attn) = self.attn.as_ref().filter(|attn| !attn.is_null()) {
            let message = format!("\"attn\" asks for layers with softmax attention: {attn}");
            return Err(Error::usage(message).hint("Kiln reads checkpoints whose layers are all GLA"));
        }
        if self.use_short_conv && self.conv_size == 0 {
            return Err(Error::usage("the kernel of the short convolutions must be at least 1"));
        }
        check_epsilon(self.norm_eps)?;
        self.layer(Gate::Data).check()
    }

    /// Initialises the model on `device`.
    pub fn init(&self, gate: Gate, device: &Device) -> GlaLm {
        let d = self.hidden_size;
        let normal = Initializer::Normal { mean: 0.0, std: EMBEDDING_STD };
        let norm = || RmsNormConfig::new(d).with_epsilon(self.norm_eps).init(device);
        let layers = (0..self.num_hidden_layers)
            .map(|_| GlaBlock {
                attn_norm: norm(),
                attn: self.layer(gate).init(device),
                mlp_norm: norm(),
                mlp: SwiGluConfig::new(d, self.mlp_width()).init(device),
            })
            .collect();
        let embeddings =
            EmbeddingConfig::new(self.vocab_size, d).with_initializer(normal.clone()).init(device);
        let head = LinearConfig::new(d, self.vocab_size).with_bias(false).with_initializer(normal);
        GlaLm {
            model: GlaBody { embeddings, layers, norm: norm() },
            lm_head: (!self.tie_word_embeddings).then(|| head.init(device)),
        }
    }
}

/// Norms divide by zero without it.
pub(crate) fn check_epsilon(epsilon: f64) -> Result<()> {
    if epsilon > 0.0 && epsilon.is_finite() {
        return Ok(());
    }
    Err(Error::usage(format!("the epsilon of the norms is {epsilon}, must be above 0")))
}

/// One block: `x + GLA(RMSNorm(x))`, then `x + SwiGLU(RMSNorm(x))`.
#[derive(Module, Debug)]
pub struct GlaBlock {
    /// Before the attention.
    pub attn_norm: RmsNorm,
    /// Gated linear attention.
    pub attn: GatedLinearAttention,
    /// Before the MLP.
    pub mlp_norm: RmsNorm,
    /// The MLP.
    pub mlp: SwiGlu,
}

impl GlaBlock {
    fn forward(
        &self,
        x: Tensor<3>,
        attend: impl FnOnce(&GatedLinearAttention, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let x = x.clone() + attend(&self.attn, self.attn_norm.forward(x));
        x.clone() + self.mlp.forward(self.mlp_norm.forward(x))
    }
}

/// Everything below the output projection.
#[derive(Module, Debug)]
pub struct GlaBody {
    /// Token embeddings, `[vocab, d]`.
    pub embeddings: Embedding,
    /// The blocks.
    pub layers: Vec<GlaBlock>,
    /// The last norm.
    pub norm: RmsNorm,
}

/// The language model; no positional encoding, since the recurrence knows the order.
#[derive(Module, Debug)]
pub struct GlaLm {
    /// Embedding, blocks and norm.
    pub model: GlaBody,
    /// The output projection; the embedding when absent.
    pub lm_head: Option<Linear>,
}

/// What the model remembers: one state a layer, of constant size.
#[derive(Debug, Clone)]
pub struct GlaState {
    /// First layer first.
    pub layers: Vec<GlaLayerState>,
}

impl GlaLm {
    /// As [`LanguageModel::forward`] for documents packed into one row (`ids [1, time]`): each starts from
    /// an empty state. `offsets` are the starts of the documents and the length of the row.
    pub fn forward_packed(&self, ids: Tensor<2, Int>, offsets: &[usize]) -> Tensor<3> {
        let mut x = self.model.embeddings.forward(ids);
        for block in &self.model.layers {
            x = block.forward(x, |attn, x| attn.forward_packed(x, offsets));
        }
        self.head(x)
    }

    /// Log decays of every layer on a text, `[batch, heads, time, key]` each.
    pub fn log_decays(&self, ids: Tensor<2, Int>) -> Vec<Tensor<4>> {
        let mut x = self.model.embeddings.forward(ids);
        let mut decays = Vec::with_capacity(self.model.layers.len());
        for block in &self.model.layers {
            x = block.forward(x, |attn, x| {
                decays.push(attn.log_decays(x.clone()));
                attn.forward(x)
            });
        }
        decays
    }

    fn head(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.model.norm.forward(x);
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => x.matmul(self.model.embeddings.weight.val().transpose().unsqueeze()),
        }
    }
}

/// Names of the short convolutions' tails in a state file.
const TAILS: [&str; 3] = ["q_tail", "k_tail", "v_tail"];

impl LanguageModel for GlaLm {
    type State = GlaState;

    fn vocab_size(&self) -> usize {
        self.model.embeddings.weight.dims()[0]
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let mut x = self.model.embeddings.forward(ids);
        for block in &self.model.layers {
            x = block.forward(x, GatedLinearAttention::forward);
        }
        self.head(x)
    }

    fn initial_state(&self, batch: usize, device: &Device) -> GlaState {
        let layers = self.model.layers.iter().map(|block| block.attn.initial_state(batch, device)).collect();
        GlaState { layers }
    }

    fn forward_with_state(&self, ids: Tensor<2, Int>, state: GlaState) -> (Tensor<3>, GlaState) {
        let mut x = self.model.embeddings.forward(ids);
        let mut layers = Vec::with_capacity(state.layers.len());
        for (block, state) in self.model.layers.iter().zip(state.layers) {
            x = block.forward(x, |attn, x| {
                let (y, state) = attn.forward_with_state(x, state);
                layers.push(state);
                y
            });
        }
        (self.head(x), GlaState { layers })
    }

    fn state_to_tensors(&self, state: GlaState) -> Result<TensorFile> {
        let mut file = TensorFile::new();
        for (layer, GlaLayerState { state, tails }) in state.layers.into_iter().enumerate() {
            file.insert(format!("layers.{layer}.state"), HostTensor::from_tensor(state));
            for (name, tail) in TAILS.iter().zip(tails.into_iter().flatten()) {
                file.insert(format!("layers.{layer}.{name}"), HostTensor::from_tensor(tail));
            }
        }
        Ok(file)
    }

    fn state_from_tensors(&self, file: &mut TensorFile, device: &Device) -> Result<GlaState> {
        let mut state = self.initial_state(1, device);
        for (layer, GlaLayerState { state, tails }) in state.layers.iter_mut().enumerate() {
            *state = file.take_shaped(&format!("layers.{layer}.state"), state.dims(), device)?;
            for (name, tail) in TAILS.iter().zip(tails.iter_mut().flatten()) {
                *tail = file.take_shaped(&format!("layers.{layer}.{name}"), tail.dims(), device)?;
            }
        }
        Ok(state)
    }
}
