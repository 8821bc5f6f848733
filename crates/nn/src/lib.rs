//! Layers, reference networks and the training loop that the systems share.
//!
//! Layers follow Burn's idiom: a `Config` with documented fields, `init(&device)`, a struct of
//! parameters, a `forward` whose documentation gives the shapes. Linear layers and norms that Burn
//! already has ([`burn::nn::Linear`], [`burn::nn::RmsNorm`]) are used as they are.
//!
//! [`train()`] is the one training loop: a system describes its objective as a [`Task`], and checkpoints,
//! resume, early stopping, the log and Ctrl-C come with it. Networks over token ids implement
//! [`LanguageModel`] and get [`generate()`] and the scores in [`evaluate`].

mod attention;
mod checkpoint;
mod cross_entropy;
mod embedding;
pub mod evaluate;
mod generate;
mod init;
mod llama;
mod lm;
mod loss;
mod mha;
mod optim;
mod rotary;
mod schedule;
mod swiglu;
mod train;
mod train_log;

pub use attention::{CausalSelfAttention, CausalSelfAttentionConfig, KvCache};
pub use cross_entropy::{CrossEntropyLoss, CrossEntropyLossConfig};
pub use embedding::{Embedding, EmbeddingConfig};
pub use evaluate::{ContextScore, Score, score_carried, score_context_lengths, score_windows};
pub use generate::{Sampling, generate};
pub use init::initialise;
pub use llama::{Llama, LlamaConfig, LlamaState};
pub use lm::{LanguageModel, ids_to_tensor};
pub use loss::{next_token_loss, token_nll};
pub use mha::{MhaCache, MhaInput, MhaOutput, MultiHeadAttention, MultiHeadAttentionConfig};
pub use optim::AdamW;
pub use rotary::{Rotary, RotaryTable};
pub use schedule::Schedule;
pub use swiglu::{SwiGlu, SwiGluConfig, swiglu_hidden};
pub use train::{Outcome, Task, TrainConfig, Trained, train};
pub use train_log::LogRow;
