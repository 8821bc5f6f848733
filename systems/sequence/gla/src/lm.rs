//! The language models that `kiln gla` trains: GLA, its two ablations and two baselines, behind one type.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use kiln_core::{Context, Error, Result, TensorFile};
use kiln_nn::{LanguageModel, Llama, LlamaConfig, LlamaState, initialise};
use serde::{Deserialize, Serialize};

use crate::layer::Gate;
use crate::mamba::{MambaConfig, MambaLm, MambaState};
use crate::model::{GlaLm, GlaLmConfig, GlaState, check_epsilon};

/// A network with more parameters than any machine holds is a slip of the pen.
const MAX_PARAMETERS: f64 = 1e11;

/// What a `config.json` of this system describes; the tag is `model_type`, as in public checkpoints.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "model_type", rename_all = "lowercase")]
pub enum LmConfig {
    /// Gated linear attention.
    Gla(GlaLmConfig),
    /// The same layer with a fixed decay per head (retention).
    Retnet(GlaLmConfig),
    /// The same layer without decay (linear attention).
    Linear(GlaLmConfig),
    /// The Transformer baseline.
    Llama(LlamaConfig),
    /// The selective state-space baseline.
    Mamba(MambaConfig),
}

/// The architecture of an [`LmConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// Gated linear attention.
    Gla,
    /// A Transformer with softmax attention, rotary positions and SwiGLU.
    Llama,
    /// A selective state-space model.
    Mamba,
    /// The GLA layer with a fixed decay per head.
    Retnet,
    /// The GLA layer without decay.
    Linear,
}

impl Arch {
    /// The name on the command line and in `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gla => "gla",
            Self::Llama => "llama",
            Self::Mamba => "mamba",
            Self::Retnet => "retnet",
            Self::Linear => "linear",
        }
    }
}

impl LmConfig {
    /// A model of `arch` with as many parameters as `gla`, as near as its shape allows.
    ///
    /// # Errors
    /// When the sizes do not fit the architecture.
    pub fn like(arch: Arch, gla: &GlaLmConfig) -> Result<Self> {
        check_sizes(gla.vocab_size, gla.hidden_size, gla.num_hidden_layers, gla.mlp_width())?;
        let config = match arch {
            Arch::Gla => Self::Gla(gla.clone()),
            Arch::Retnet => Self::Retnet(gla.clone()),
            Arch::Linear => Self::Linear(gla.clone()),
            Arch::Llama => Self::Llama(
                LlamaConfig::new(gla.vocab_size, gla.hidden_size, gla.num_hidden_layers, gla.num_heads)
                    .with_intermediate_size(Some(gla.mlp_width())),
            ),
            Arch::Mamba => Self::Mamba(mamba_like(gla)),
        };
        config.check()?;
        Ok(config)
    }

    /// The architecture.
    pub fn arch(&self) -> Arch {
        match self {
            Self::Gla(_) => Arch::Gla,
            Self::Retnet(_) => Arch::Retnet,
            Self::Linear(_) => Arch::Linear,
            Self::Llama(_) => Arch::Llama,
            Self::Mamba(_) => Arch::Mamba,
        }
    }

    /// The configuration of the GLA layers, where there are any.
    pub fn gla(&self) -> Option<&GlaLmConfig> {
        match self {
            Self::Gla(config) | Self::Retnet(config) | Self::Linear(config) => Some(config),
            Self::Llama(_) | Self::Mamba(_) => None,
        }
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Gla(config) | Self::Retnet(config) | Self::Linear(config) => {
                let mlp = config.mlp_width();
                check_sizes(config.vocab_size, config.hidden_size, config.num_hidden_layers, mlp)?;
                config.check()
            }
            Self::Llama(config) => {
                let (width, heads) = (config.hidden_size, config.num_attention_heads);
                let mlp = config.intermediate_size.unwrap_or(width);
                check_sizes(config.vocab_size, width, config.num_hidden_layers, mlp)?;
                check_epsilon(config.rms_norm_eps)?;
                if heads == 0 || !width.is_multiple_of(2 * heads) {
                    return Err(Error::usage(format!("{heads} heads do not divide width {width} evenly"))
                        .hint("rotary positions need an even width a head"));
                }
                Ok(())
            }
            Self::Mamba(config) => {
                let inner = config.expand.saturating_mul(config.hidden_size);
                check_sizes(config.vocab_size, config.hidden_size, config.num_hidden_layers, inner)?;
                check_epsilon(config.layer_norm_epsilon)
            }
        }
    }

    /// A model with parameters drawn from the context's seed.
    pub fn init(&self, cx: &Context) -> Lm {
        initialise(&cx.device, &mut cx.rng("init", 0), |device| self.build(device))
    }

    /// A model whose parameters are not drawn before they are used, to load others into.
    pub fn build(&self, device: &Device) -> Lm {
        match self {
            Self::Gla(config) => Lm::Gla(config.init(Gate::Data, device)),
            Self::Retnet(config) => Lm::Gla(config.init(Gate::Fixed, device)),
            Self::Linear(config) => Lm::Gla(config.init(Gate::Open, device)),
            Self::Llama(config) => Lm::Llama(config.init(device)),
            Self::Mamba(config) => Lm::Mamba(config.init(device)),
        }
    }
}

/// Checks that nothing is 0 and the whole no larger than any machine; `inner` is the width inside the blocks.
fn check_sizes(vocab: usize, width: usize, layers: usize, inner: usize) -> Result<()> {
    if [vocab, width, layers, inner].contains(&0) {
        return Err(Error::usage(
            "vocabulary, width, layers and the width inside them must all be at least 1",
        ));
    }
    let [vocab, width, layers, inner] = [vocab, width, layers, inner].map(|size| size as f64);
    let parameters = vocab * width + layers * width * (width + inner);
    if parameters > MAX_PARAMETERS {
        return Err(Error::usage(format!("the model would have more than {parameters:.0e} parameters"))
            .hint("check vocabulary, width and layers"));
    }
    Ok(())
}

/// Mamba with the width of `gla` and the number of layers, then the expansion, nearest to its parameters.
fn mamba_like(gla: &GlaLmConfig) -> MambaConfig {
    let (d, vocab) = (gla.hidden_size, gla.vocab_size);
    let block = |expand: usize| {
        let (inner, state, rank) = (expand * d, 16, d.div_ceil(16));
        d + 2 * d * inner
            + 5 * inner
            + inner * (rank + 2 * state)
            + rank * inner
            + inner
            + inner * state
            + inner
            + inner * d
    };
    let layer = gla.layer(Gate::Data);
    let (key, value) = (layer.key_width(), layer.value_width());
    let wanted =
        gla.num_hidden_layers * (2 * d * key + 3 * d * value + d * 16 + 17 * key + 3 * d * gla.mlp_width());
    let nearest = (1..=4)
        .map(|expand| (expand, (wanted as f64 / block(expand) as f64).round().max(1.0) as usize))
        .min_by_key(|&(expand, layers)| ((layers * block(expand)).abs_diff(wanted), expand.abs_diff(2)));
    let (expand, layers) = nearest.unwrap_or((2, gla.num_hidden_layers));
    MambaConfig::new(vocab, d, layers).with_expand(expand)
}

/// One of the language models.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Lm {
    /// GLA, retention or linear attention.
    Gla(GlaLm),
    /// The Transformer.
    Llama(Llama),
    /// The state-space model.
    Mamba(MambaLm),
}

/// The memory of one of the language models.
#[derive(Debug, Clone)]
pub enum LmState {
    /// Constant size.
    Gla(GlaState),
    /// Keys and values of everything seen.
    Llama(LlamaState),
    /// Constant size.
    Mamba(MambaState),
}

const OWN_STATE: &str = "a state belongs to the architecture that made it";

impl LanguageModel for Lm {
    type State = LmState;

    fn vocab_size(&self) -> usize {
        match self {
            Self::Gla(model) => model.vocab_size(),
            Self::Llama(model) => model.vocab_size(),
            Self::Mamba(model) => model.vocab_size(),
        }
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        match self {
            Self::Gla(model) => model.forward(ids),
            Self::Llama(model) => model.forward(ids),
            Self::Mamba(model) => model.forward(ids),
        }
    }

    fn initial_state(&self, batch: usize, device: &Device) -> LmState {
        match self {
            Self::Gla(model) => LmState::Gla(model.initial_state(batch, device)),
            Self::Llama(model) => LmState::Llama(model.initial_state(batch, device)),
            Self::Mamba(model) => LmState::Mamba(model.initial_state(batch, device)),
        }
    }

    fn forward_with_state(&self, ids: Tensor<2, Int>, state: LmState) -> (Tensor<3>, LmState) {
        match (self, state) {
            (Self::Gla(model), LmState::Gla(state)) => {
                let (logits, state) = model.forward_with_state(ids, state);
                (logits, LmState::Gla(state))
            }
            (Self::Llama(model), LmState::Llama(state)) => {
                let (logits, state) = model.forward_with_state(ids, state);
                (logits, LmState::Llama(state))
            }
            (Self::Mamba(model), LmState::Mamba(state)) => {
                let (logits, state) = model.forward_with_state(ids, state);
                (logits, LmState::Mamba(state))
            }
            _ => panic!("{OWN_STATE}"),
        }
    }

    fn state_to_tensors(&self, state: LmState) -> Result<TensorFile> {
        match (self, state) {
            (Self::Gla(model), LmState::Gla(state)) => model.state_to_tensors(state),
            (Self::Llama(model), LmState::Llama(state)) => model.state_to_tensors(state),
            (Self::Mamba(model), LmState::Mamba(state)) => model.state_to_tensors(state),
            _ => panic!("{OWN_STATE}"),
        }
    }

    fn state_from_tensors(&self, file: &mut TensorFile, device: &Device) -> Result<LmState> {
        match self {
            Self::Gla(model) => model.state_from_tensors(file, device).map(LmState::Gla),
            Self::Llama(model) => model.state_from_tensors(file, device).map(LmState::Llama),
            Self::Mamba(model) => model.state_from_tensors(file, device).map(LmState::Mamba),
        }
    }
}
