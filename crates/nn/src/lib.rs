//! Layers, reference networks and the training loop that the systems share.
//!
//! Layers follow Burn's idiom: a `Config` with documented fields, `init(&device)`, a struct of
//! parameters, a `forward` whose documentation gives the shapes. Those that Burn has too bear the same
//! names, as do their parameters, and compute with [`kiln_ops`] instead of Burn's own operations: an import
//! from [`burn::nn`] becomes one from here, and nothing else changes.
//!
//! [`train()`] is the one training loop: a system describes its objective as a [`Task`], and checkpoints,
//! resume, early stopping, the log and Ctrl-C come with it. A command keeps its options and its results beside
//! them with a [`TrainRun`]. [`WeightSpec`] and [`Weights`] run any module with weights that another network makes,
//! [`functional`] has layers with one set of weights a sample. Networks over token ids implement [`LanguageModel`] and get [`generate()`], the
//! options of a command that continues a text ([`ContinueText`]) and the scores in [`evaluate`].

mod attention;
mod batch_norm;
mod checkpoint;
mod confusion;
mod continue_text;
mod conv;
mod conv_transpose;
mod cross_entropy;
mod dropout;
mod embedding;
pub mod evaluate;
pub mod functional;
mod generate;
mod group_norm;
mod init;
mod linear;
mod llama;
mod lm;
mod loss;
mod lr_share;
mod mha;
mod norm;
mod optim;
mod padding;
mod plateau;
mod pool;
mod rotary;
mod schedule;
mod swiglu;
mod train;
mod train_log;
mod train_run;
mod weights;

pub use attention::{CausalSelfAttention, CausalSelfAttentionConfig, KvCache};
pub use batch_norm::{BatchNorm, BatchNormConfig};
pub use confusion::{Confusion, likeliest};
pub use continue_text::ContinueText;
pub use conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Conv3d, Conv3dConfig};
pub use conv_transpose::{
    ConvTranspose1d, ConvTranspose1dConfig, ConvTranspose2d, ConvTranspose2dConfig, ConvTranspose3d,
    ConvTranspose3dConfig,
};
pub use cross_entropy::{CrossEntropyLoss, CrossEntropyLossConfig};
pub use dropout::{Dropout, DropoutConfig};
pub use embedding::{Embedding, EmbeddingConfig};
pub use evaluate::{ContextScore, Score, score_carried, score_context_lengths, score_windows};
pub use generate::{Sampling, generate};
pub use group_norm::{GroupNorm, GroupNormConfig, InstanceNorm, InstanceNormConfig};
pub use init::initialise;
pub use linear::{Linear, LinearConfig};
pub use llama::{Llama, LlamaConfig, LlamaState};
pub use lm::{LanguageModel, ids_to_tensor};
pub use loss::{next_token_loss, token_nll};
pub use lr_share::LrShare;
pub use mha::{MhaCache, MhaInput, MhaOutput, MultiHeadAttention, MultiHeadAttentionConfig};
pub use norm::{LayerNorm, LayerNormConfig, RmsNorm, RmsNormConfig};
pub use optim::{Adagrad, AdamW, Sgd};
pub use plateau::Plateau;
pub use pool::{
    AdaptiveAvgPool1d, AdaptiveAvgPool1dConfig, AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig, AvgPool1d,
    AvgPool1dConfig, AvgPool2d, AvgPool2dConfig, MaxPool1d, MaxPool1dConfig, MaxPool2d, MaxPool2dConfig,
};
pub use rotary::{Rotary, RotaryTable};
pub use schedule::{Decay, Schedule};
pub use swiglu::{SwiGlu, SwiGluConfig, swiglu_hidden};
pub use train::{Method, Outcome, Task, TrainConfig, Trained, train};
pub use train_log::LogRow;
pub use train_run::{TrainRun, TrainSummary};
pub use weights::{ParamSpec, WeightSpec, Weights};
