//! Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167).

use burn::config::Config;
use burn::module::{Flag, Module, Param, RunningState};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use kiln_ops::{batch_norm, batch_norm_train};

/// Configuration of a [`BatchNorm`].
#[derive(Config, Debug)]
pub struct BatchNormConfig {
    /// Number of channels.
    pub num_features: usize,
    /// Added to the variance.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// Weight of a batch in the running statistics, between 0 and 1.
    #[config(default = 0.1)]
    pub momentum: f64,
}

/// `(x - mean) / √(variance + ε) γ + β` for every channel.
///
/// On an autodiff device the statistics are the batch's and update the running ones, unless the layer is
/// frozen; elsewhere they are the running ones.
#[derive(Module, Debug)]
pub struct BatchNorm {
    /// γ, `[num_features]`
    pub gamma: Param<Tensor<1>>,
    /// β, `[num_features]`
    pub beta: Param<Tensor<1>>,
    /// Whether the layer takes part in training.
    pub training: Param<Flag>,
    /// `[num_features]`
    pub running_mean: RunningState<Tensor<1>>,
    /// `[num_features]`
    pub running_var: RunningState<Tensor<1>>,
    /// Weight of a batch in the running statistics.
    pub momentum: f64,
    /// Added to the variance.
    pub epsilon: f64,
}

impl BatchNormConfig {
    /// The layer with γ = 1, β = 0, and zero and one as running mean and variance.
    ///
    /// # Panics
    /// When there are no channels, `epsilon` is not positive or `momentum` not between 0 and 1.
    pub fn init(&self, device: &Device) -> BatchNorm {
        assert!(self.num_features > 0, "a batch norm must have channels");
        assert!(
            self.epsilon.is_finite() && self.epsilon > 0.0,
            "a batch norm's epsilon must be positive, not {}",
            self.epsilon
        );
        assert!(
            (0.0..=1.0).contains(&self.momentum),
            "a batch norm's momentum must lie between 0 and 1, not be {}",
            self.momentum
        );
        BatchNorm {
            gamma: Initializer::Ones.init([self.num_features], device),
            beta: Initializer::Zeros.init([self.num_features], device),
            training: Param::from_bool(true),
            running_mean: RunningState::new(Tensor::zeros([self.num_features], device)),
            running_var: RunningState::new(Tensor::ones([self.num_features], device)),
            momentum: self.momentum,
            epsilon: self.epsilon,
        }
    }
}

impl BatchNorm {
    /// Applies the layer.
    ///
    /// # Shapes
    /// - x, output: `[batch, num_features, ...]`
    ///
    /// # Panics
    /// When the input has other channels.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match x.device().is_autodiff() && self.training.is_enabled() {
            true => self.forward_training(x),
            false => self.forward_inference(x),
        }
    }

    fn forward_inference<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let device = x.device();
        let mean = self.running_mean.value().to_device(&device);
        let variance = self.running_var.value().to_device(&device);
        batch_norm(x, self.gamma.val(), self.beta.val(), mean, variance, self.epsilon)
    }

    fn forward_training<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let device = x.device();
        let batch = batch_norm_train(x, self.gamma.val(), self.beta.val(), self.epsilon);
        let update = |running: &RunningState<Tensor<1>>, new: Tensor<1>| {
            let old = running.value_sync().to_device(&device);
            running.update((old * (1.0 - self.momentum) + new.detach() * self.momentum).detach());
        };
        update(&self.running_mean, batch.mean);
        update(&self.running_var, batch.variance);
        batch.output
    }
}
