//! The networks that users train: a language model and a classifier of sequences.

use std::fmt;
use std::str::FromStr;

use burn::module::Module;
use burn::nn::Initializer;
use burn::tensor::{Device, Int, Tensor};
use kiln_core::{Error, Result, TensorFile};
use kiln_nn::{Embedding, EmbeddingConfig, LanguageModel, LayerNorm, LayerNormConfig, Linear};
use kiln_ops::Activation;
use serde::{Deserialize, Serialize};

use crate::chunked::{AttentionFunction, BiasKind, ChunkedAttentionConfig};
use crate::ema::MultiHeadEmaConfig;
use crate::layer::{Kept, LayerState, MixerKind, TcncaLayer, TcncaLayerConfig, Variant};
use crate::tcn::{TcnConfig, TcnConv, linear};

/// More parameters are a slip of the pen.
const MAX_PARAMETERS: f64 = 2e9;

/// The mixer of every layer: one for all, or one a layer, as `tcn` or `tcn,ema,tcn`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mixers(Vec<MixerKind>);

impl Mixers {
    /// The same for all layers.
    pub fn all(mixer: MixerKind) -> Self {
        Self(vec![mixer])
    }

    /// The mixer of layer `layer`.
    fn of(&self, layer: usize) -> MixerKind {
        self.0[layer % self.0.len()]
    }
}

impl Default for Mixers {
    fn default() -> Self {
        Self::all(MixerKind::Tcn)
    }
}

impl FromStr for Mixers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = |word: &str| match word.trim() {
            "tcn" => Ok(MixerKind::Tcn),
            "ema" => Ok(MixerKind::Ema),
            other => Err(format!("\"{other}\" is neither tcn nor ema")),
        };
        text.split(',').map(kind).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Mixers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.0.iter().map(|mixer| match mixer {
            MixerKind::Tcn => "tcn",
            MixerKind::Ema => "ema",
        });
        f.write_str(&names.collect::<Vec<_>>().join(","))
    }
}

impl TryFrom<String> for Mixers {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mixers> for String {
    fn from(mixers: Mixers) -> Self {
        mixers.to_string()
    }
}

/// The layers of a network, whatever it is used for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TcncaConfig {
    /// Width of the residual stream, D.
    pub dim: usize,
    /// Width of queries and keys, z.
    pub z_dim: usize,
    /// Width of values, h.
    pub h_dim: usize,
    /// Width inside the feed-forward maps.
    pub ffn_dim: usize,
    /// Number of layers.
    pub layers: usize,
    /// How mixers' outputs are used.
    #[serde(default)]
    pub variant: Variant,
    /// What mixes the steps.
    #[serde(default)]
    pub mixer: Mixers,
    /// Taps of a TCN's filters, K.
    pub kernel: usize,
    /// Factor by which their dilation grows, f.
    pub dilation_factor: usize,
    /// Blocks of a TCN.
    pub tcn_blocks: usize,
    /// Which channels a filter sees.
    #[serde(default)]
    pub tcn_conv: TcnConv,
    /// States a channel of an EMA, N.
    #[serde(default = "ema_states")]
    pub ema_states: usize,
    /// Steps after which an EMA's kernel is cut off, if at all.
    #[serde(default)]
    pub ema_truncation: Option<usize>,
    /// Steps of a chunk; 0 takes the whole sequence as one.
    pub chunk: usize,
    /// How attention's scores become weights.
    #[serde(default)]
    pub attention: AttentionFunction,
    /// How attention's bias depends on the distance.
    #[serde(default)]
    pub bias: BiasKind,
    /// Share of elements that training drops.
    #[serde(default)]
    pub dropout: f64,
}

fn ema_states() -> usize {
    16
}

impl TcncaConfig {
    /// Full layers with the TCN of 337 steps and chunks of 128; z is half, h and the feed-forward width twice D.
    pub fn new(dim: usize, layers: usize) -> Self {
        Self {
            dim,
            z_dim: dim / 2,
            h_dim: 2 * dim,
            ffn_dim: 2 * dim,
            layers,
            variant: Variant::Full,
            mixer: Mixers::default(),
            kernel: 17,
            dilation_factor: 4,
            tcn_blocks: 3,
            tcn_conv: TcnConv::Depthwise,
            ema_states: ema_states(),
            ema_truncation: None,
            chunk: 128,
            attention: AttentionFunction::Softmax,
            bias: BiasKind::Rotary,
            dropout: 0.0,
        }
    }

    /// The configuration of layer `layer` in a network that looks back only, or both ways.
    pub fn layer(&self, layer: usize, causal: bool) -> TcncaLayerConfig {
        let bidirectional = !causal;
        TcncaLayerConfig {
            dim: self.dim,
            z_dim: self.z_dim,
            h_dim: self.h_dim,
            ffn_dim: self.ffn_dim,
            variant: self.variant,
            mixer: self.mixer.of(layer),
            tcn: TcnConfig {
                channels: self.dim,
                kernel: self.kernel,
                dilation: self.dilation_factor,
                blocks: self.tcn_blocks,
                conv: self.tcn_conv,
                bidirectional,
            },
            ema: MultiHeadEmaConfig {
                channels: self.dim,
                states: self.ema_states,
                bidirectional,
                truncation: self.ema_truncation,
            },
            attention: ChunkedAttentionConfig { chunk: self.chunk, causal, function: self.attention },
            bias: self.bias,
            dropout: self.dropout,
        }
    }

    /// Checks that the numbers fit.
    fn check(&self, causal: bool) -> Result<()> {
        if self.layers == 0 {
            return Err(Error::usage("a network needs at least one layer"));
        }
        let mixers = self.mixer.0.len();
        if mixers != 1 && mixers != self.layers {
            let message = format!("{mixers} mixers do not fit {} layers", self.layers);
            return Err(Error::usage(message).hint("name one mixer for all layers, or one a layer"));
        }
        let [dim, z, h, ffn, layers] =
            [self.dim, self.z_dim, self.h_dim, self.ffn_dim, self.layers].map(|size| size as f64);
        let seen = if self.tcn_conv == TcnConv::Full { dim } else { 1.0 };
        let filters = self.tcn_blocks as f64 * (dim + seen * self.kernel as f64);
        let table = if self.bias == BiasKind::Simple { 2.0 * self.chunk as f64 } else { 0.0 };
        let wide = dim * (2.0 * dim + z + 3.0 * h + 2.0 * ffn + filters + 5.0 * self.ema_states as f64);
        if layers * (wide + table) > MAX_PARAMETERS || self.chunk > u32::MAX as usize {
            return Err(Error::usage(format!(
                "the network would have more than {MAX_PARAMETERS:.0e} parameters"
            ))
            .hint("check the widths, layers, kernel, blocks and chunk"));
        }
        (0..mixers).try_for_each(|layer| self.layer(layer, causal).check())
    }

    /// Draws the parameters.
    fn init(&self, causal: bool, device: &Device) -> Vec<TcncaLayer> {
        (0..self.layers).map(|layer| self.layer(layer, causal).init(device)).collect()
    }
}

/// Configuration of a [`TcncaLm`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TcncaLmConfig {
    /// The layers.
    #[serde(flatten)]
    pub network: TcncaConfig,
    /// Number of token ids.
    pub vocab: usize,
}

impl TcncaLmConfig {
    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.vocab == 0 || self.vocab as f64 * self.network.dim as f64 > MAX_PARAMETERS {
            return Err(Error::usage(format!("a vocabulary of {} makes no sense", self.vocab)));
        }
        self.network.check(true)
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> TcncaLm {
        let dim = self.network.dim;
        TcncaLm {
            embed: embedding(self.vocab, dim, device),
            layers: self.network.init(true, device),
            norm: LayerNormConfig::new(dim).init(device),
            head: linear(dim, self.vocab, device),
        }
    }
}

/// Vectors of about length 1, as in MEGA.
fn embedding(symbols: usize, dim: usize, device: &Device) -> Embedding {
    let normal = Initializer::Normal { mean: 0.0, std: (dim as f64).sqrt().recip() };
    EmbeddingConfig::new(symbols, dim).with_initializer(normal).init(device)
}

/// The language model: embedding, layers that look back only, norm and output projection.
#[derive(Module, Debug)]
pub struct TcncaLm {
    /// `[vocab, D]`
    pub embed: Embedding,
    /// The layers.
    pub layers: Vec<TcncaLayer>,
    /// The last norm.
    pub norm: LayerNorm,
    /// D to the vocabulary.
    pub head: Linear,
}

/// What a network that looks back only remembers, one state a layer: its size depends on kernels and chunk alone.
#[derive(Debug, Clone)]
pub struct TcncaState(Vec<LayerState>);

impl TcncaState {
    fn new(layers: &[TcncaLayer], batch: usize, device: &Device) -> Self {
        Self(layers.iter().map(|layer| layer.initial_state(batch, device)).collect())
    }

    /// All layers, continuing from this state.
    fn through(self, layers: &[TcncaLayer], x: Tensor<3>) -> (Tensor<3>, Self) {
        let mut x = x;
        let mut states = Vec::with_capacity(self.0.len());
        for (layer, state) in layers.iter().zip(self.0) {
            let (y, state) = layer.forward_with_state(x, state);
            x = y;
            states.push(state);
        }
        (x, Self(states))
    }
}

impl TcncaLm {
    /// Logits of one further token a row: [`LanguageModel::forward_with_state`] with ids `[batch, 1]`.
    pub fn forward_step(&self, ids: Tensor<2, Int>, state: TcncaState) -> (Tensor<3>, TcncaState) {
        self.forward_with_state(ids, state)
    }
}

impl LanguageModel for TcncaLm {
    type State = TcncaState;

    fn vocab_size(&self) -> usize {
        self.embed.weight.lazy_shape()[0]
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let x = self.layers.iter().fold(self.embed.forward(ids), |x, layer| layer.forward(x, None));
        self.head.forward(self.norm.forward(x))
    }

    fn initial_state(&self, batch: usize, device: &Device) -> TcncaState {
        TcncaState::new(&self.layers, batch, device)
    }

    fn forward_with_state(&self, ids: Tensor<2, Int>, state: TcncaState) -> (Tensor<3>, TcncaState) {
        let (x, state) = state.through(&self.layers, self.embed.forward(ids));
        (self.head.forward(self.norm.forward(x)), state)
    }

    fn state_to_tensors(&self, state: TcncaState) -> Result<TensorFile> {
        let mut file = TensorFile::new();
        for (layer, state) in state.0.into_iter().enumerate() {
            file.insert_section(&format!("layers.{layer}."), TcncaLayer::state_to_tensors(state));
        }
        Ok(file)
    }

    fn state_from_tensors(&self, file: &mut TensorFile, device: &Device) -> Result<TcncaState> {
        let states = self.layers.iter().enumerate().map(|(layer, network)| {
            let prefix = format!("layers.{layer}.");
            let mut section = file.take_section(&prefix);
            let state = network.state_from_tensors(&mut section, device)?;
            file.insert_section(&prefix, section);
            Ok(state)
        });
        states.collect::<Result<_>>().map(TcncaState)
    }
}

/// How the steps of a sequence become vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// A learned vector for every one of so many symbols.
    Symbols(usize),
    /// A linear map of so many numbers.
    Numbers(usize),
}

/// The steps of a batch.
#[derive(Debug, Clone)]
pub enum Steps {
    /// Symbols, `[batch, time]`
    Ids(Tensor<2, Int>),
    /// Numbers, `[batch, time, width]`
    Numbers(Tensor<3>),
}

/// Configuration of a [`TcncaClassifier`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TcncaClassifierConfig {
    /// The layers.
    #[serde(flatten)]
    pub network: TcncaConfig,
    /// How steps become vectors.
    pub input: Input,
    /// Number of classes.
    pub classes: usize,
    /// Whether layers look back only, so that a sequence can be read as it comes.
    #[serde(default)]
    pub causal: bool,
}

impl TcncaClassifierConfig {
    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.classes < 2 {
            let message = format!("there must be at least two classes, not {}", self.classes);
            return Err(Error::usage(message).hint("with a single label there is nothing to learn"));
        }
        let (Input::Symbols(width) | Input::Numbers(width)) = self.input;
        if width == 0 || width as f64 * self.network.dim as f64 > MAX_PARAMETERS {
            return Err(Error::usage(format!("{width} symbols or numbers a step make no sense")));
        }
        self.network.check(self.causal)
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> TcncaClassifier {
        let dim = self.network.dim;
        let (embed, input) = match self.input {
            Input::Symbols(symbols) => (Some(embedding(symbols, dim, device)), None),
            Input::Numbers(width) => (None, Some(kiln_nn::LinearConfig::new(width, dim).init(device))),
        };
        TcncaClassifier {
            embed,
            input,
            layers: self.network.init(self.causal, device),
            norm: LayerNormConfig::new(dim).init(device),
            hidden: kiln_nn::LinearConfig::new(dim, dim).init(device),
            head: kiln_nn::LinearConfig::new(dim, self.classes).init(device),
        }
    }
}

/// The classifier of sequences: layers, the mean over the steps, and a head of two linear maps.
#[derive(Module, Debug)]
pub struct TcncaClassifier {
    /// `[symbols, D]`, for symbols
    pub embed: Option<Embedding>,
    /// Numbers to D.
    pub input: Option<Linear>,
    /// The layers.
    pub layers: Vec<TcncaLayer>,
    /// Before the mean.
    pub norm: LayerNorm,
    /// D to D.
    pub hidden: Linear,
    /// D to classes.
    pub head: Linear,
}

/// What a classifier that looks back only remembers.
#[derive(Debug, Clone)]
pub struct ClassifierState {
    layers: TcncaState,
    /// Sum of the steps' vectors, `[batch, 1, D]`, and how many there were.
    sum: Option<Tensor<3>>,
    steps: usize,
}

impl TcncaClassifier {
    /// Logits `[batch, classes]` of whole sequences; `kept` says which steps are no padding.
    pub fn forward(&self, steps: Steps, kept: Option<&Kept>) -> Tensor<2> {
        let x = self.layers.iter().fold(self.embedded(steps), |x, layer| layer.forward(x, kept));
        let x = self.norm.forward(x);
        let mean = match kept {
            Some(Kept { factor, .. }) => (x * factor.clone()).sum_dim(1) / factor.clone().sum_dim(1),
            None => x.mean_dim(1),
        };
        self.logits(mean)
    }

    /// The state before a sequence.
    pub fn initial_state(&self, batch: usize, device: &Device) -> ClassifierState {
        ClassifierState { layers: TcncaState::new(&self.layers, batch, device), sum: None, steps: 0 }
    }

    /// Logits `[batch, classes]` of everything read so far, with memory that does not grow; only for networks that look
    /// back only.
    pub fn forward_with_state(&self, steps: Steps, state: ClassifierState) -> (Tensor<2>, ClassifierState) {
        let (x, layers) = state.layers.through(&self.layers, self.embedded(steps));
        let x = self.norm.forward(x);
        let steps = state.steps + x.dims()[1];
        let here = x.sum_dim(1);
        let sum = match state.sum {
            Some(before) => before + here,
            None => here,
        };
        let logits = self.logits(sum.clone() / steps as f64);
        (logits, ClassifierState { layers, sum: Some(sum), steps })
    }

    /// As [`forward_with_state`](Self::forward_with_state), for one further step.
    pub fn forward_step(&self, step: Steps, state: ClassifierState) -> (Tensor<2>, ClassifierState) {
        self.forward_with_state(step, state)
    }

    fn embedded(&self, steps: Steps) -> Tensor<3> {
        match (steps, &self.embed, &self.input) {
            (Steps::Ids(ids), Some(embed), _) => embed.forward(ids),
            (Steps::Numbers(x), _, Some(input)) => input.forward(x),
            _ => panic!("a classifier takes the kind of steps that it was made for"),
        }
    }

    fn logits(&self, mean: Tensor<3>) -> Tensor<2> {
        self.head.forward(self.hidden.forward_activated(mean, Activation::Silu)).squeeze_dim(1)
    }
}
