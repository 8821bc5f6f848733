//! What all trainings here share: labelled rows, weights that are learned directly, and the loop.

use burn::module::{Module, Param};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Context, Error, Result};
use kiln_data::digits::{self, Digits};
use kiln_nn::{Outcome, Task, TrainConfig, WeightSpec, likeliest, token_nll, train};
use rand::{Rng, RngExt};

use crate::hypernet::draw_weights;
use crate::target::Target;

/// Rows of numbers with a class each.
#[derive(Debug, Clone, Default)]
pub struct Labelled {
    /// Width of a row.
    pub width: usize,
    /// `[rows, width]`
    pub x: Vec<f32>,
    /// `[rows]`
    pub y: Vec<usize>,
}

impl Labelled {
    /// The digits whose classes are listed; the first gets the label 0, and so on.
    pub fn digits(images: Digits, classes: &[u8]) -> Self {
        let mut rows = Self { width: digits::PIXELS, ..Self::default() };
        for (pixels, label) in images.pixels.chunks(digits::PIXELS).zip(images.labels) {
            if let Some(place) = classes.iter().position(|class| class == label) {
                rows.x.extend_from_slice(pixels);
                rows.y.push(place);
            }
        }
        rows
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.y.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.y.is_empty()
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.x[row * self.width..(row + 1) * self.width]
    }

    /// Some rows, in this order.
    pub fn select(&self, rows: &[usize]) -> Self {
        Self {
            width: self.width,
            x: rows.iter().flat_map(|&row| self.row(row).to_vec()).collect(),
            y: rows.iter().map(|&row| self.y[row]).collect(),
        }
    }

    /// The rows of these classes; the first gets the label 0, and so on.
    pub fn of_classes(&self, classes: &[usize]) -> Self {
        let place = |row: usize| classes.iter().position(|class| *class == self.y[row]);
        let rows: Vec<usize> = (0..self.len()).filter(|&row| place(row).is_some()).collect();
        let y = rows.iter().filter_map(|&row| place(row)).collect();
        Self { y, ..self.select(&rows) }
    }

    /// Rows drawn at random, any of them perhaps more than once.
    pub fn draw(&self, count: usize, rng: &mut impl Rng) -> Self {
        self.select(&(0..count).map(|_| rng.random_range(0..self.len())).collect::<Vec<_>>())
    }

    /// `count` rows of every class, drawn at random without repeats; all of a class that has fewer.
    pub fn few(&self, count: usize, rng: &mut impl Rng) -> Self {
        use rand::seq::SliceRandom;
        let classes = self.y.iter().max().map_or(0, |largest| largest + 1);
        let mut chosen = Vec::new();
        for class in 0..classes {
            let mut rows: Vec<usize> = (0..self.len()).filter(|&row| self.y[row] == class).collect();
            rows.shuffle(rng);
            chosen.extend(rows.into_iter().take(count));
        }
        self.select(&chosen)
    }

    /// All rows of several sets.
    pub fn join(sets: &[Self]) -> Self {
        Self {
            width: sets[0].width,
            x: sets.iter().flat_map(|set| set.x.iter().copied()).collect(),
            y: sets.iter().flat_map(|set| set.y.iter().copied()).collect(),
        }
    }

    /// The rows as one set, `[1, rows, width]`, and their classes, `[1, rows]`.
    pub fn tensors(&self, device: &Device) -> (Tensor<3>, Tensor<2, Int>) {
        stack(std::slice::from_ref(self), device)
    }
}

/// Sets of equally many rows side by side: `[sets, rows, width]` and classes `[sets, rows]`.
///
/// # Panics
/// When they have different numbers of rows.
pub fn stack(sets: &[Labelled], device: &Device) -> (Tensor<3>, Tensor<2, Int>) {
    let (rows, width) = (sets[0].len(), sets[0].width);
    assert!(sets.iter().all(|set| set.len() == rows), "sets must have equally many rows");
    let x: Vec<f32> = sets.iter().flat_map(|set| set.x.iter().copied()).collect();
    let y: Vec<i64> = sets.iter().flat_map(|set| set.y.iter().map(|&y| y as i64)).collect();
    (
        Tensor::from_data(TensorData::new(x, [sets.len(), rows, width]), device),
        Tensor::from_data(TensorData::new(y, [sets.len(), rows]), device),
    )
}

/// A number from N(0, 1), by Box and Muller.
pub fn normal(rng: &mut impl Rng) -> f64 {
    let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
}

/// Numbers from N(0, 1), `[rows, width]`.
pub fn normals(rows: usize, width: usize, rng: &mut impl Rng, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = (0..rows * width).map(|_| normal(rng) as f32).collect();
    Tensor::from_data(TensorData::new(values, [rows, width]), device)
}

/// Weights of a target that are learned directly, `[sets, N]`: the network that one would use without a hypernetwork.
/// Several sets are as many networks that know nothing of each other.
#[derive(Module, Debug)]
pub struct Plain {
    /// `[sets, N]`
    pub theta: Param<Tensor<2>>,
}

impl Plain {
    /// Networks before training.
    ///
    /// # Errors
    /// When the target makes no sense.
    pub fn new(target: &Target, sets: usize, cx: &Context, stream: &str) -> Result<Self> {
        Ok(Self::of_spec(&target.spec()?, sets, cx, stream))
    }

    /// As [`new`](Self::new), for weights of one's own.
    pub fn of_spec(spec: &WeightSpec, sets: usize, cx: &Context, stream: &str) -> Self {
        let draw = |set: usize| {
            // Seeds the device's generator; the weights are then drawn one after another.
            kiln_nn::initialise(&cx.device, &mut cx.rng(stream, set as u64), |device| Self {
                theta: Param::from_tensor(draw_weights(spec, device).unsqueeze()),
            })
        };
        let sets = (0..sets).map(|set| draw(set).theta.val()).collect();
        Self { theta: Param::from_tensor(Tensor::cat(sets, 0)) }
    }
}

/// How long and how fast to train.
#[derive(Debug, Clone, Copy)]
pub struct Fit {
    /// Steps.
    pub steps: usize,
    /// Learning rate of Adam, the same throughout.
    pub lr: f64,
    /// Steps between validations; the weights with the lowest loss are kept. 0 keeps the last.
    pub validate_every: usize,
}

impl Fit {
    /// So many steps, keeping the last weights.
    pub fn new(steps: usize, lr: f64) -> Self {
        Self { steps, lr, validate_every: 0 }
    }
}

/// A loss as a [`Task`].
struct Closure<L, V> {
    loss: L,
    validate: V,
}

impl<M, L, V> Task<M> for Closure<L, V>
where
    L: FnMut(&M, usize) -> Result<Tensor<1>>,
    V: FnMut(&M) -> Result<f64>,
{
    fn loss(&mut self, model: &M, step: usize) -> Result<(Tensor<1>, usize)> {
        Ok(((self.loss)(model, step)?, 1))
    }

    fn validate(&mut self, model: &M) -> Result<f64> {
        (self.validate)(model)
    }
}

/// Minimises a loss; gradients are clipped to norm 1.
///
/// # Errors
/// When the loss fails or is no number, or the user stops it.
pub fn fit<M: Module>(
    model: M,
    fit: Fit,
    cx: &Context,
    loss: impl FnMut(&M, usize) -> Result<Tensor<1>>,
) -> Result<M> {
    fit_best(model, fit, cx, loss, |_| Ok(0.0))
}

/// As [`fit`], but keeps the weights with the lowest validation loss.
///
/// # Errors
/// As [`fit`].
pub fn fit_best<M: Module>(
    model: M,
    fit: Fit,
    cx: &Context,
    loss: impl FnMut(&M, usize) -> Result<Tensor<1>>,
    validate: impl FnMut(&M) -> Result<f64>,
) -> Result<M> {
    let config = TrainConfig {
        steps: fit.steps,
        lr: fit.lr,
        warmup: 0,
        min_lr_ratio: 1.0,
        weight_decay: 0.0,
        clip_norm: 1.0,
        eval_every: fit.validate_every,
        checkpoint_every: 0,
        ..TrainConfig::default()
    };
    let trained = train(model, &mut Closure { loss, validate }, &config, None, false, cx)?;
    match trained.outcome {
        Outcome::Interrupted => Err(Error::interrupted("the training was stopped")),
        _ => Ok(trained.model),
    }
}

/// Mean negative log-likelihood of classes, in nats.
///
/// # Shapes
/// - logits: `[sets, rows, classes]`, classes: `[sets, rows]`
pub fn cross_entropy(logits: Tensor<3>, classes: Tensor<2, Int>) -> Tensor<1> {
    token_nll(logits, classes).mean()
}

/// Probabilities of classes, `[set][row][class]` one after another.
pub fn probabilities(logits: Tensor<3>) -> Vec<f32> {
    softmax(logits, 2).into_data().iter::<f32>().collect()
}

/// The share of rows whose likeliest class is right.
pub fn accuracy(probabilities: &[f32], classes: &[usize]) -> f64 {
    let width = probabilities.len() / classes.len();
    let right = probabilities.chunks(width).zip(classes).filter(|(row, class)| likeliest(row) == **class);
    right.count() as f64 / classes.len() as f64
}

/// Accuracy of one set of weights `[1, N]` on labelled rows.
pub fn accuracy_of(target: &Target, theta: Tensor<2>, rows: &Labelled, cx: &Context) -> f64 {
    let (x, _) = rows.tensors(&cx.device);
    accuracy(&probabilities(target.forward(theta, x)), &rows.y)
}
