//! The GPT that is trained, whole on one device: what `eval`, `generate` and the capture of graphs use.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Int, Tensor};
use kiln_core::{Error, HostTensor, Result, TensorFile};
use kiln_nn::{LanguageModel, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use kiln_ops::{Activation, AttentionOptions, attention, embedding, matmul};
use serde::{Deserialize, Serialize};

use crate::parameters::initial_values;

/// Extents of a [`Gpt`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GptConfig {
    /// L: layers.
    pub layers: usize,
    /// h: width, a multiple of `heads`.
    pub hidden: usize,
    /// a: attention heads.
    pub heads: usize,
    /// V: token ids.
    pub vocab: usize,
    /// Longest text, for which there are learned positions.
    pub max_seq: usize,
    /// Probability that an activation is dropped in training.
    pub dropout: f64,
    /// How texts are cut: `bytes`, `char` or `tokenizer.json`, a file beside the configuration.
    pub tokenizer: String,
    /// Rows of the word embedding are padded to a multiple of this and of the tensor ranks.
    #[serde(default = "default_vocab_multiple")]
    pub vocab_multiple: usize,
}

fn default_vocab_multiple() -> usize {
    128
}

impl GptConfig {
    /// For texts of up to 1024 tokens, without dropout.
    pub fn new(layers: usize, hidden: usize, heads: usize, vocab: usize) -> Self {
        Self {
            layers,
            hidden,
            heads,
            vocab,
            max_seq: 1024,
            dropout: 0.0,
            tokenizer: "bytes".into(),
            vocab_multiple: default_vocab_multiple(),
        }
    }

    /// For texts of up to `max_seq` tokens.
    pub fn with_max_seq(self, max_seq: usize) -> Self {
        Self { max_seq, ..self }
    }

    /// With dropout in training.
    pub fn with_dropout(self, dropout: f64) -> Self {
        Self { dropout, ..self }
    }

    /// V': rows of the word embedding that `tensor` ranks share.
    pub fn padded_vocab(&self, tensor: usize) -> usize {
        self.vocab.next_multiple_of(self.vocab_multiple * tensor)
    }

    /// Number of parameters, without padding.
    pub fn parameters(&self) -> usize {
        let h = self.hidden;
        self.layers * (12 * h * h + 13 * h) + (self.vocab + self.max_seq) * h + 2 * h
    }

    /// Useful operations for `tokens` tokens in sequences of `seq`, forward and backward, without recomputation
    /// (paper, Appendix).
    pub fn operations(&self, tokens: usize, seq: usize) -> f64 {
        let shape = crate::perf::GptShape {
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            vocab: self.vocab,
            seq,
        };
        shape.operations(tokens as f64 / seq as f64, false)
    }

    /// Makes sure that the numbers fit together.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("vocab", self.vocab),
            ("max_seq", self.max_seq),
            ("layers", self.layers),
            ("vocab_multiple", self.vocab_multiple),
        ] {
            if value == 0 {
                return Err(Error::usage(format!("{name} is 0, but must be at least 1")));
            }
        }
        if !self.hidden.is_multiple_of(self.heads) {
            let (below, above) =
                (self.hidden / self.heads * self.heads, self.hidden.next_multiple_of(self.heads));
            return Err(Error::usage(format!(
                "{} heads do not divide the hidden size {}",
                self.heads, self.hidden
            ))
            .hint(format!(
                "use a hidden size of {}",
                if below == 0 { above } else { below }.max(self.heads)
            )));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::usage(format!(
                "the dropout is {}, but must be at least 0 and below 1",
                self.dropout
            )));
        }
        const LARGEST: usize = 1 << 34;
        let needed =
            [self.layers, 12, self.hidden, self.hidden].iter().try_fold(1usize, |n, &m| n.checked_mul(m));
        let table = self.vocab.checked_add(self.max_seq).and_then(|rows| rows.checked_mul(self.hidden));
        if needed.is_none_or(|n| n > LARGEST) || table.is_none_or(|n| n > LARGEST) {
            return Err(Error::usage("the network has more parameters than a machine holds")
                .hint("is one of layers, hidden, vocab or max_seq too large?"));
        }
        Ok(())
    }

    /// The network with its initial parameters of seed 0.
    pub fn init(&self, device: &Device) -> Gpt {
        let parameters = self.initial(0);
        parameters.into_module(self.empty(device)).expect("the initial parameters are the network's")
    }

    /// Name and shape, in the folder's order, of every parameter of the whole network.
    pub fn names(&self) -> Vec<(String, Vec<usize>)> {
        let whole = crate::layout::ParallelLayout::new(1, 1, 1);
        crate::parameters::specs(self, &whole, 0, 0).into_iter().map(|spec| (spec.name, spec.whole)).collect()
    }

    /// Initial parameters of a seed.
    pub fn initial(&self, seed: u64) -> TensorFile {
        let mut file = TensorFile::new();
        for (name, shape) in self.names() {
            let values = initial_values(self, &name, &shape, seed);
            file.insert(name, HostTensor::float(shape, values));
        }
        file
    }

    /// The network with zeros for parameters, to be filled.
    pub fn empty(&self, device: &Device) -> Gpt {
        let linear = |inputs, outputs| {
            LinearConfig::new(inputs, outputs).with_initializer(Initializer::Zeros).init(device)
        };
        let (h, norm) = (self.hidden, || LayerNormConfig::new(self.hidden).init(device));
        let block = || GptBlock {
            ln1: norm(),
            attention: GptAttention { qkv: linear(h, 3 * h), dense: linear(h, h), heads: self.heads },
            ln2: norm(),
            mlp: GptMlp { fc1: linear(h, 4 * h), fc2: linear(4 * h, h) },
        };
        let table = |rows| Initializer::Zeros.init([rows, h], device);
        Gpt {
            embedding: GptEmbedding { word: table(self.vocab), position: table(self.max_seq) },
            layers: (0..self.layers).map(|_| block()).collect(),
            final_ln: norm(),
        }
    }
}

/// Word and position embeddings.
#[derive(Module, Debug)]
pub struct GptEmbedding {
    /// `[vocab, hidden]`, also the weight of the output.
    pub word: Param<Tensor<2>>,
    /// `[max_seq, hidden]`
    pub position: Param<Tensor<2>>,
}

/// Causal self-attention; the outputs of `qkv` are each head's query, key and value, head after head.
#[derive(Module, Debug)]
pub struct GptAttention {
    /// `[hidden, 3 hidden]`
    pub qkv: Linear,
    /// `[hidden, hidden]`
    pub dense: Linear,
    heads: usize,
}

/// Two linear layers with a GELU between.
#[derive(Module, Debug)]
pub struct GptMlp {
    /// `[hidden, 4 hidden]`
    pub fc1: Linear,
    /// `[4 hidden, hidden]`
    pub fc2: Linear,
}

/// A layer with the norms before attention and perceptron.
#[derive(Module, Debug)]
pub struct GptBlock {
    /// Before attention.
    pub ln1: LayerNorm,
    /// Attention.
    pub attention: GptAttention,
    /// Before the perceptron.
    pub ln2: LayerNorm,
    /// The perceptron.
    pub mlp: GptMlp,
}

/// The network in inference.
#[derive(Module, Debug)]
pub struct Gpt {
    /// Tables of word and position vectors.
    pub embedding: GptEmbedding,
    /// The layers.
    pub layers: Vec<GptBlock>,
    /// The last norm, before the output.
    pub final_ln: LayerNorm,
}

/// The tokens read so far, and their keys and values, each `[batch, heads, time, head_dim]`, one pair a layer.
#[derive(Debug, Clone)]
pub struct GptState {
    ids: Option<Tensor<2, Int>>,
    layers: Vec<Option<[Tensor<4>; 2]>>,
}

impl GptState {
    /// Tokens that are in view.
    fn position(&self) -> usize {
        self.ids.as_ref().map_or(0, |ids| ids.dims()[1])
    }
}

impl GptAttention {
    /// # Shapes
    /// - x, output: `[batch, time, hidden]`
    fn forward(&self, x: Tensor<3>, cache: &mut Option<[Tensor<4>; 2]>) -> Tensor<3> {
        let [batch, time, hidden] = x.dims();
        let dim = hidden / self.heads;
        let qkv = self.qkv.forward(x).reshape([batch, time, self.heads, 3 * dim]);
        let [q, k, v] = [0, 1, 2].map(|part| qkv.clone().narrow(3, part * dim, dim).swap_dims(1, 2));
        let [k, v] = match cache.take() {
            Some([keys, values]) => [Tensor::cat(vec![keys, k], 2), Tensor::cat(vec![values, v], 2)],
            None => [k, v],
        };
        *cache = Some([k.clone(), v.clone()]);
        // The causal mask ends at the last key, so that new queries see the whole cache.
        let causal = AttentionOptions { causal: true, ..AttentionOptions::default() };
        let context = attention(q, k, v, causal);
        self.dense.forward(context.swap_dims(1, 2).reshape([batch, time, hidden]))
    }
}

impl Gpt {
    /// Longest text.
    pub fn max_seq(&self) -> usize {
        self.embedding.position.dims()[0]
    }
}

impl LanguageModel for Gpt {
    type State = GptState;

    fn vocab_size(&self) -> usize {
        self.embedding.word.dims()[0]
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let state = self.initial_state(ids.dims()[0], &ids.device());
        self.forward_with_state(ids, state).0
    }

    fn initial_state(&self, _: usize, _: &Device) -> GptState {
        GptState { ids: None, layers: vec![None; self.layers.len()] }
    }

    /// Where a text grows beyond the positions that the network has learned, the later half of what it has read is read
    /// again from the first position, and what was before is forgotten.
    fn forward_with_state(&self, ids: Tensor<2, Int>, mut state: GptState) -> (Tensor<3>, GptState) {
        let time = ids.dims()[1];
        let mut logits = Vec::new();
        let mut at = 0;
        while at < time {
            if state.position() == self.max_seq() {
                state = self.forget(state);
            }
            let piece = (self.max_seq() - state.position()).min(time - at);
            let read = if piece == time { ids.clone() } else { ids.clone().narrow(1, at, piece) };
            logits.push(self.read(read, &mut state));
            at += piece;
        }
        let logits = if logits.len() == 1 { logits.remove(0) } else { Tensor::cat(logits, 1) };
        (logits, state)
    }
}

impl Gpt {
    /// The state after the later half of what a full one has read.
    fn forget(&self, state: GptState) -> GptState {
        let mut fresh = GptState { ids: None, layers: vec![None; self.layers.len()] };
        let keep = self.max_seq() / 2;
        if let Some(ids) = state.ids.filter(|_| keep > 0) {
            let time = ids.dims()[1];
            self.read(ids.narrow(1, time - keep, keep), &mut fresh);
        }
        fresh
    }

    /// Reads tokens for which there are positions.
    fn read(&self, ids: Tensor<2, Int>, state: &mut GptState) -> Tensor<3> {
        let [batch, time] = ids.dims();
        let hidden = self.embedding.word.dims()[1];
        let word = self.embedding.word.val();
        let positions = self.embedding.position.val().narrow(0, state.position(), time);
        let mut x = embedding(word.clone(), ids.clone()) + positions.unsqueeze::<3>();
        for (layer, cache) in self.layers.iter().zip(&mut state.layers) {
            x = x.clone() + layer.attention.forward(layer.ln1.forward(x), cache);
            let inner = layer.mlp.fc1.forward_activated(layer.ln2.forward(x.clone()), Activation::GeluTanh);
            x = x + layer.mlp.fc2.forward(inner);
        }
        state.ids = Some(match state.ids.take() {
            Some(before) => Tensor::cat(vec![before, ids], 1),
            None => ids,
        });
        let x = self.final_ln.forward(x).reshape([batch * time, hidden]);
        let rows = word.dims()[0];
        matmul(x, word.transpose()).reshape([batch, time, rows])
    }
}
