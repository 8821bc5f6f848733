//! A table of learned vectors.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Int, Tensor};
use kiln_ops::embedding;

/// Configuration of an [`Embedding`].
#[derive(Config, Debug)]
pub struct EmbeddingConfig {
    /// Number of vectors.
    pub n_embedding: usize,
    /// Width of a vector.
    pub d_model: usize,
    /// How the vectors are drawn.
    #[config(default = "Initializer::Normal{mean: 0.0, std: 1.0}")]
    pub initializer: Initializer,
}

/// The vectors with given ids; a replacement of [`burn::nn::Embedding`] with the same parameters.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[n_embedding, d_model]`
    pub weight: Param<Tensor<2>>,
}

impl EmbeddingConfig {
    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Embedding {
        Embedding { weight: self.initializer.init([self.n_embedding, self.d_model], device) }
    }
}

impl Embedding {
    /// Looks the vectors up.
    ///
    /// # Shapes
    /// - ids: `[batch, time]`
    /// - output: `[batch, time, d_model]`
    ///
    /// # Panics
    /// On the CPU when an id is not below `n_embedding`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        embedding(self.weight.val(), ids)
    }
}
