//! Kronecker (tensor) attention: each query looks at pairs, or r-tuples, of tokens at once.
//!
//! Source: Josh Alman, Zhao Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to
//! Kronecker Computation", ICLR 2024, arXiv 2310.04064. With queries `Q [n, d]`, keys `K1, K2 [n, d]` and values
//! `V1, V2 [n, dv]`, the output of query `i` is
//!
//! ```text
//! O_i = Σ_jk p_i(j, k) V1_j ⊙ V2_k        p_i = softmax over all pairs of s Σ_c Q_ic K1_jc K2_kc
//! ```
//!
//! and likewise for r key and value matrices; r = 1 is ordinary attention. [`attention`] computes it exactly without the
//! weights of all tuples in memory, [`polynomial`] in near-linear time for bounded entries, [`plan`](mod@plan) tells which of
//! the two suits given matrices, and [`match3`] solves a problem that one head of pairwise attention cannot.

pub mod attention;
mod kernel;
pub mod match3;
pub mod plan;
pub mod polynomial;

pub use attention::{AttentionOptions, tensor_attention};
pub use polynomial::tensor_attention_poly;
