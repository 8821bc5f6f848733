//! The cross-entropy loss of a classifier.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor};
use kiln_ops::{CrossEntropyOptions, cross_entropy};

/// Configuration of a [`CrossEntropyLoss`].
#[derive(Config, Debug)]
pub struct CrossEntropyLossConfig {
    /// Targets that stand for padding, whose rows do not count. Without any other row the loss is NaN.
    pub pad_tokens: Option<Vec<usize>>,
    /// What an error in each class counts; positive.
    pub weights: Option<Vec<f32>>,
    /// The share of the target's probability that is spread over all classes evenly.
    pub smoothing: Option<f32>,
    /// Whether the input is logits; else it is probabilities.
    #[config(default = true)]
    pub logits: bool,
}

/// The mean of `-w_target ln p_target` over the rows, weighted by `w_target`; a replacement of
/// [`burn::nn::loss::CrossEntropyLoss`].
///
/// Unlike Burn's, it refuses targets that are neither classes nor padding, and padding need not be a class.
#[derive(Module, Debug)]
pub struct CrossEntropyLoss {
    /// Targets that stand for padding.
    pub pad_tokens: Option<Vec<usize>>,
    /// `[classes]`
    pub weights: Option<Tensor<1>>,
    /// The share of the target's probability that is spread over all classes.
    pub smoothing: Option<f32>,
    /// Whether the input is logits.
    pub logits: bool,
}

impl CrossEntropyLossConfig {
    /// Makes the loss.
    ///
    /// # Panics
    /// When the smoothing is not between 0 and 1 or a weight is not positive.
    pub fn init(&self, device: &Device) -> CrossEntropyLoss {
        if let Some(share) = self.smoothing {
            assert!((0.0..=1.0).contains(&share), "label smoothing must lie in [0, 1]; {share} does not");
        }
        let positive = self.weights.iter().flatten().all(|&weight| weight > 0.0);
        assert!(positive, "the weights of classes must be positive: {:?}", self.weights);
        CrossEntropyLoss {
            pad_tokens: self.pad_tokens.clone(),
            weights: self.weights.as_deref().map(|weights| Tensor::from_floats(weights, device)),
            smoothing: self.smoothing,
            logits: self.logits,
        }
    }
}

impl CrossEntropyLoss {
    /// A loss without weights and smoothing.
    pub fn new(pad_index: Option<usize>, device: &Device) -> Self {
        CrossEntropyLossConfig::new().with_pad_tokens(pad_index.map(|id| vec![id])).init(device)
    }

    /// Computes the loss.
    ///
    /// # Shapes
    /// - logits: `[rows, classes]`
    /// - targets: `[rows]`
    /// - output: `[1]`
    ///
    /// # Panics
    /// When there is not one target for every row; on the CPU when a target is neither a class nor padding.
    pub fn forward(&self, logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        if !self.logits {
            return self.of_probabilities(logits, targets);
        }
        let pads = self.pad_tokens.iter().flatten();
        let options = CrossEntropyOptions {
            label_smoothing: self.smoothing.unwrap_or(0.0),
            weights: self.weights.clone(),
            ignored: pads.map(|&id| id as i64).collect(),
        };
        let losses = cross_entropy(logits, targets.clone(), &options);
        let padding: Option<Tensor<1, Bool>> =
            options.ignored.iter().map(|&id| targets.clone().equal_scalar(id)).reduce(Tensor::bool_or);
        let counts = match (&self.weights, &padding) {
            (None, None) => return losses.mean(),
            (None, Some(_)) => losses.ones_like().detach(),
            (Some(weights), None) => weights.clone().gather(0, targets),
            (Some(weights), Some(padding)) => {
                weights.clone().gather(0, targets.mask_fill(padding.clone(), 0))
            }
        };
        let counts = match padding {
            Some(padding) => counts.mask_fill(padding, 0),
            None => counts,
        };
        losses.sum() / counts.sum()
    }

    /// Burn's loss, where nothing can be fused.
    fn of_probabilities(&self, probabilities: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        let burn = burn::nn::loss::CrossEntropyLoss {
            pad_tokens: self.pad_tokens.clone(),
            weights: self.weights.clone(),
            smoothing: self.smoothing,
            logits: false,
        };
        burn.forward(probabilities, targets)
    }
}
