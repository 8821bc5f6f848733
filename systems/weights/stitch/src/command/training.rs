//! Options and results that all training has.

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Error, Result};
use kiln_data::{ImageOptions, Images};
use kiln_nn::{TrainConfig, TrainSummary};
use serde::{Deserialize, Serialize};

use crate::checkpoint::Interface;

/// How to train, for one network and for many.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub(super) struct TrainingArgs {
    /// Images of a step
    #[arg(long, default_value_t = 64)]
    pub batch: usize,
    /// Final learning rate as a fraction of the highest
    #[arg(long, default_value_t = 0.02)]
    min_lr_ratio: f64,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 50)]
    warmup: usize,
    /// Decay of the weights
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f64,
    /// Largest norm of the gradients; 0 leaves them
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Share of the images that is held out for validation
    #[arg(long, default_value_t = 0.1)]
    pub val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 200)]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 200)]
    checkpoint_every: usize,
}

impl TrainingArgs {
    pub fn config(&self, steps: usize, lr: f64) -> Result<TrainConfig> {
        if self.batch == 0 {
            return Err(Error::usage("--batch must be at least 1"));
        }
        let config = TrainConfig {
            steps,
            lr,
            warmup: self.warmup.min(steps / 2),
            min_lr_ratio: self.min_lr_ratio,
            weight_decay: self.weight_decay,
            clip_norm: self.clip,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            ..TrainConfig::default()
        };
        config.check()?;
        Ok(config)
    }
}

/// Images that are only classified at the end.
#[derive(Debug, Args)]
pub(super) struct TestArgs {
    /// Test images, classified at the end
    #[arg(long)]
    test: Option<PathBuf>,
    /// IDX file of their labels, where it is not beside them
    #[arg(long, requires = "test")]
    test_labels: Option<PathBuf>,
}

impl TestArgs {
    pub fn read(
        &self,
        interface: &Interface,
        shape: [usize; 3],
        target: Option<&String>,
    ) -> Result<Option<Images>> {
        let Some(path) = &self.test else { return Ok(None) };
        let options = ImageOptions {
            labels: self.test_labels.clone(),
            target: target.cloned(),
            white: Some(interface.white),
            unlabelled: false,
        };
        interface.fit(Images::read(path, &options)?, shape, path).map(Some)
    }
}

/// What training prints.
#[derive(Serialize)]
pub(super) struct TrainResult {
    #[serde(flatten)]
    pub summary: TrainSummary,
    /// On the images held out.
    pub accuracy: f64,
    /// On the test images, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test_accuracy: Option<f64>,
}
