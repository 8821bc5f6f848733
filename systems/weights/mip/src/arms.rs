//! The comparison: the same network trained under each parametrisation, and how fast and how evenly it learns.

use burn::module::{Module, ModuleDisplay};
use clap::ValueEnum;
use kiln_core::{Context, Result};
use kiln_nn::{AdamW, Sgd, Task, initialise};
use serde::{Deserialize, Serialize};

use crate::arch::{Classifier, ClassifierConfig};
use crate::classify::ClassifyTask;
use crate::convert::{MipConfig, MipHyper};

/// Steps over which a loss is averaged before it is judged.
pub const SMOOTHING: usize = 50;
/// A run has diverged when any of its losses exceeds the first by this factor, even if it comes back.
const DIVERGED: f64 = 10.0;

/// What makes a step of a gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimiser {
    /// Adam
    #[default]
    Adam,
    /// Gradient descent with a momentum of 0.9
    Sgd,
}

/// A network under one parametrisation, and how it is trained.
#[derive(Debug, Clone)]
pub struct Arm {
    /// The network.
    pub network: ClassifierConfig,
    /// Its parametrisation.
    pub mip: MipConfig,
    /// The optimiser.
    pub optimiser: Optimiser,
    /// The learning rate, the same in every step.
    pub lr: f64,
    /// Steps.
    pub steps: usize,
}

/// What training an arm gave.
pub struct Course<M: Module = Classifier> {
    /// Loss of every step, as far as the run came.
    pub losses: Vec<f64>,
    /// Norm of the gradient in every step.
    pub gradient_norms: Vec<f64>,
    /// Whether any loss was infinite, no number, or more than ten times the first.
    pub diverged: bool,
    /// The trained model.
    pub model: MipHyper<M>,
}

impl Arm {
    /// Trains it.
    ///
    /// # Errors
    /// When the settings do not fit.
    pub fn train(&self, task: &mut ClassifyTask, cx: &Context) -> Result<Course> {
        let mut rng = cx.rng("arm", 0);
        let net = initialise(&cx.device, &mut rng, |device| self.network.init(device));
        let model = self.mip.draw(net, &mut rng, &cx.device)?;
        follow(model, task, (self.optimiser, self.lr, 0.0), self.steps, cx)
    }
}

/// Trains a model with an optimiser, its learning rate and, for Adam, the largest norm of a gradient (0 leaves them), and
/// keeps what happened on the way.
///
/// # Errors
/// When the task fails.
pub fn follow<M: Module + ModuleDisplay>(
    model: MipHyper<M>,
    task: &mut impl Task<MipHyper<M>>,
    (optimiser, lr, clip): (Optimiser, f64, f64),
    steps: usize,
    cx: &Context,
) -> Result<Course<M>> {
    let mut model = model.train();
    let (mut adam, mut sgd) = (AdamW::new(0.0, clip), Sgd::new(0.9));
    let (mut losses, mut gradient_norms, mut diverged) = (Vec::<f64>::new(), Vec::new(), false);
    for step in 0..steps {
        let (loss, _) = task.loss(&model, step)?;
        let gradients = loss.backward();
        let loss = f64::from(loss.into_scalar::<f32>());
        losses.push(loss);
        // A loss may shoot up and come back: it is told, and the run goes on while there are numbers.
        diverged |= !loss.is_finite() || loss > DIVERGED * losses[0];
        if !loss.is_finite() || cx.interrupted() {
            break;
        }
        let (next, norm) = match optimiser {
            Optimiser::Adam => adam.step(model, gradients, lr),
            Optimiser::Sgd => sgd.step_and_norm(model, gradients, lr),
        };
        model = next;
        gradient_norms.push(norm);
    }
    Ok(Course { losses, gradient_norms, diverged, model: model.valid() })
}

impl<M: Module> Course<M> {
    /// Losses averaged over the last [`SMOOTHING`] steps, from the first step that has so many before it.
    pub fn smoothed(&self) -> Vec<f64> {
        self.losses.windows(SMOOTHING).map(|window| window.iter().sum::<f64>() / SMOOTHING as f64).collect()
    }

    /// Steps until the smoothed loss is below a target; `None` if it never is.
    pub fn steps_to(&self, target: f64) -> Option<usize> {
        self.smoothed().iter().position(|&loss| loss < target).map(|step| step + SMOOTHING)
    }

    /// Standard deviation of the gradient's norm over its mean.
    pub fn gradient_variation(&self) -> f64 {
        let count = self.gradient_norms.len() as f64;
        let mean = self.gradient_norms.iter().sum::<f64>() / count;
        let variance = self.gradient_norms.iter().map(|norm| (norm - mean).powi(2)).sum::<f64>() / count;
        variance.sqrt() / mean
    }
}

/// The middle value, or the mean of the middle two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}
