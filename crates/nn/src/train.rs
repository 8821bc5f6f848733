//! The training loop.
//!
//! A module is built on a device without autodiff. [`train()`] turns it into a training module with
//! [`Module::train`], which makes every parameter a root of the autodiff graph; inputs and constants may stay
//! off autodiff, because Burn then treats them as constants of that graph. Validation and files see
//! [`Module::valid`], a snapshot without autodiff.
//!
//! With a folder, a run keeps there:
//! - `model.safetensors`: the weights with the lowest validation loss so far;
//! - `checkpoint.safetensors`: everything needed to go on exactly where it was written;
//! - `train_log.csv`: one [`LogRow`] a step.
//!
//! All randomness of step `n` comes from streams numbered `n`, so that an interrupted and resumed run ends
//! with the same weights, bit for bit, as one that was never interrupted.

use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Gradients, Tensor};
use kiln_core::{Context, Error, ModelFolder, Result, TensorFile};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::{self, Position};
use crate::init::StepDraws;
use crate::plateau::Course;
use crate::train_log::{LogRow, TrainLog};
use crate::{AdamW, Decay, Plateau, Schedule, Sgd};

const LOG_FILE: &str = "train_log.csv";

/// What makes a step of a gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// AdamW
    #[default]
    AdamW,
    /// Gradient descent
    Sgd {
        /// How much of the earlier steps each step keeps.
        momentum: f64,
    },
}

impl Method {
    /// Whether it is AdamW, which settings of runs do not mention.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How to train, whatever the network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Steps of the whole run.
    pub steps: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Steps over which the learning rate rises to it.
    pub warmup: usize,
    /// Final learning rate as a fraction of the highest.
    pub min_lr_ratio: f64,
    /// How the learning rate falls after the warm-up.
    pub decay: Decay,
    /// How much of the running means of gradients and of their squares each step keeps.
    pub betas: (f64, f64),
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradients; 0 leaves them unclipped.
    pub clip_norm: f64,
    /// Largest size of each number of the gradients, before their norm is clipped; 0 leaves them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub clip_value: f64,
    /// Steps between evaluations; the last step is always evaluated. 0: only the last.
    pub eval_every: usize,
    /// Steps between checkpoints; the end of a run always writes one. 0: only the end.
    pub checkpoint_every: usize,
    /// Evaluations without improvement after which the run stops.
    pub patience: Option<usize>,
    /// By what share the validation loss must fall to count as improved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub min_improvement: f64,
    /// How the learning rate falls besides its schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plateau: Option<Plateau>,
    /// What makes a step; gradient descent knows no betas, and weight decay is part of its gradient.
    #[serde(default, skip_serializing_if = "Method::is_default")]
    pub method: Method,
    /// Factors of the learning rate of parameters whose names begin so, as [`AdamW::rates`]; gradient descent has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rates: Vec<(String, f64)>,
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            lr: 1e-3,
            warmup: 100,
            min_lr_ratio: 0.1,
            decay: Decay::Cosine,
            betas: (0.9, 0.999),
            weight_decay: 0.01,
            clip_norm: 1.0,
            clip_value: 0.0,
            eval_every: 200,
            checkpoint_every: 200,
            patience: None,
            min_improvement: 0.0,
            plateau: None,
            method: Method::AdamW,
            rates: Vec::new(),
        }
    }
}

impl TrainConfig {
    /// Makes sure that the settings make sense.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<()> {
        let not_negative = [
            ("weight decay", self.weight_decay),
            ("clip norm", self.clip_norm),
            ("clip value", self.clip_value),
            ("minimum learning rate ratio", self.min_lr_ratio),
            ("least improvement", self.min_improvement),
        ];
        if let Some((name, value)) = not_negative.into_iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return Err(Error::usage(format!("the {name} is {value}, but must be a number of at least 0")));
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(Error::usage(format!("the learning rate is {}, but must be above 0", self.lr)));
        }
        let (first, second) = self.betas;
        if !(0.0..1.0).contains(&first) || !(0.0..1.0).contains(&second) {
            return Err(Error::usage(format!("the betas are {first} and {second}, but must be in [0, 1)")));
        }
        if let Some((name, rate)) = self.rates.iter().find(|(_, rate)| !(rate.is_finite() && *rate >= 0.0)) {
            return Err(Error::usage(format!(
                "the learning rate of {name} is {rate} times the others', but must be a number of at least 0"
            )));
        }
        if !self.rates.is_empty() && self.method != Method::AdamW {
            return Err(Error::usage("gradient descent has one learning rate")
                .hint("learning rates of their own are for AdamW"));
        }
        if self.steps == 0 {
            return Err(Error::usage("there are 0 steps to train").hint("ask for at least one"));
        }
        Ok(())
    }
}

/// What a run minimises and how it is judged.
pub trait Task<M> {
    /// The loss of the batch of step `step` (from 0) and the number of tokens or samples in it. Random
    /// choices come from streams numbered `step`.
    ///
    /// # Errors
    /// When the batch cannot be made; training stops.
    fn loss(&mut self, model: &M, step: usize) -> Result<(Tensor<1>, usize)>;

    /// The validation loss of a snapshot without autodiff; lower is better.
    ///
    /// # Errors
    /// When it cannot be measured; training stops.
    fn validate(&mut self, model: &M) -> Result<f64>;

    /// What besides [`TrainConfig`] and the seed decides the outcome, such as the batch size. A resumed run
    /// must have the same.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// The validation loss stopped falling.
    EarlyStopped,
    /// The user asked to stop; the folder holds a checkpoint to resume from.
    Interrupted,
}

/// A run that ended well.
#[derive(Debug, Clone)]
pub struct Trained<M> {
    /// The weights with the lowest validation loss, without autodiff; the last where none was measured.
    pub model: M,
    /// The weights after the last step, without autodiff.
    pub last: M,
    /// One row a step, those before a resume included.
    pub log: Vec<LogRow>,
    /// The lowest validation loss; infinite where none was measured.
    pub best_loss: f64,
    /// The step after which it was measured.
    pub best_step: usize,
    /// Why the run ended.
    pub outcome: Outcome,
}

/// Trains `model` with AdamW, or another [`Method`], on a [`Schedule`].
///
/// With `resume`, goes on from the checkpoint in `folder`; the settings must be those the run began with,
/// except that `steps` may grow (the schedule is then that of the longer run), and `checkpoint_every` and
/// `patience` may change. Ctrl-C ends the run with a checkpoint and [`Outcome::Interrupted`].
///
/// # Errors
/// When the settings make no sense, the folder already holds a run and `resume` is not asked for, the
/// checkpoint does not fit, a file cannot be written, the task fails, or a loss or gradient norm is not
/// finite. The last good checkpoint is then still in the folder.
pub fn train<M: Module>(
    model: M,
    task: &mut impl Task<M>,
    config: &TrainConfig,
    folder: Option<&ModelFolder>,
    resume: bool,
    cx: &Context,
) -> Result<Trained<M>> {
    config.check()?;
    let settings = settings(config, task, cx)?;
    let mut run = match (folder, resume) {
        (Some(folder), true) => Run::resume(model, config, folder, settings)?,
        (None, true) => return Err(Error::usage("there is no folder to resume from")),
        (folder, false) => Run::begin(model, config, folder, settings)?,
    };
    let bar = cx.progress(config.steps as u64, "training");
    bar.set(run.position.step as u64);
    let begun = (Instant::now(), run.position.tokens);
    let outcome = loop {
        if run.position.step >= config.steps {
            break Outcome::Finished;
        }
        if config.patience.is_some_and(|patience| run.course.stale >= patience) {
            break Outcome::EarlyStopped;
        }
        if cx.interrupted() {
            break Outcome::Interrupted;
        }
        let loss = run.step(task, config, cx)?;
        bar.inc(1);
        let rate = (run.position.tokens - begun.1) as f64 / begun.0.elapsed().as_secs_f64();
        bar.message(format!("loss {loss:.4}, {rate:.0}/s"));
    };
    run.finish(outcome)
}

/// Everything that a resumed run is compared by.
fn settings<M>(config: &TrainConfig, task: &impl Task<M>, cx: &Context) -> Result<Map<String, Value>> {
    let config = serde_json::to_value(config)
        .map_err(|e| Error::work("cannot write the settings as JSON").caused_by(e))?;
    let mut settings = task.settings();
    settings.extend(config.as_object().cloned().unwrap_or_default());
    settings.insert("seed".into(), cx.seed.into());
    Ok(settings)
}

const IN_PLACE: &str = "the model is put back after every step";

/// A run under way.
struct Run<'a, M> {
    /// In training mode; out of here only while it makes a step, which works in place on what it owns alone.
    model: Option<M>,
    best: Option<M>,
    optimiser: Optimiser,
    schedule: Schedule,
    position: Position,
    course: Course,
    log: TrainLog,
    folder: Option<&'a ModelFolder>,
    settings: Map<String, Value>,
    started: Instant,
    /// Seconds spent before this process.
    seconds_before: f64,
    /// The step of the checkpoint on disk.
    saved_step: Option<usize>,
}

impl<'a, M: Module> Run<'a, M> {
    fn begin(
        model: M,
        config: &TrainConfig,
        folder: Option<&'a ModelFolder>,
        settings: Map<String, Value>,
    ) -> Result<Self> {
        let log = match folder {
            Some(folder) => {
                if folder.file(checkpoint::FILE_NAME).exists() {
                    return Err(Error::usage(format!("{} already holds a run", folder.path().display()))
                        .hint("resume it, or choose another folder"));
                }
                folder.create()?;
                TrainLog::create(&folder.file(LOG_FILE), Vec::new())?
            }
            None => TrainLog::in_memory(),
        };
        Ok(Self {
            model: Some(model.train()),
            best: None,
            optimiser: Optimiser::new(config),
            schedule: schedule(config),
            position: Position::default(),
            course: Course::default(),
            log,
            folder,
            settings,
            started: Instant::now(),
            seconds_before: 0.0,
            saved_step: None,
        })
    }

    fn resume(
        model: M,
        config: &TrainConfig,
        folder: &'a ModelFolder,
        settings: Map<String, Value>,
    ) -> Result<Self> {
        let restored = checkpoint::load(folder, &model, Optimiser::new(config), &settings)?;
        let log = TrainLog::resume(&folder.file(LOG_FILE), restored.position.step)?;
        if let Some(best) = &restored.best {
            // What was written after the checkpoint belongs to steps that are yet to come again.
            folder.save_weights(&TensorFile::from_module(best))?;
        }
        let mut course = Course::default();
        for loss in log.rows.iter().filter_map(|row| row.val_loss) {
            course.see(loss, config.min_improvement, config.plateau.as_ref());
        }
        Ok(Self {
            course,
            model: Some(restored.model.train()),
            best: restored.best,
            optimiser: restored.optimiser,
            schedule: schedule(config),
            seconds_before: restored.position.seconds,
            saved_step: Some(restored.position.step),
            position: restored.position,
            log,
            folder: Some(folder),
            settings,
            started: Instant::now(),
        })
    }

    fn model(&self) -> &M {
        self.model.as_ref().expect(IN_PLACE)
    }

    /// One step, with evaluation and checkpoint where they are due; returns the loss.
    fn step(&mut self, task: &mut impl Task<M>, config: &TrainConfig, cx: &Context) -> Result<f64> {
        let index = self.position.step;
        // For layers that draw at random, such as dropout.
        let _draws = StepDraws::seeded(&cx.device, &mut cx.rng("train", index as u64));
        let (loss, tokens) = task.loss(self.model(), index)?;
        if !loss.is_tracked() {
            return Err(Error::work("the loss does not depend on any trainable parameter"));
        }
        let loss_value = f64::from(loss.clone().into_scalar::<f32>());
        self.require_finite("loss", loss_value)?;
        let lr = self.course.reduced(self.schedule.at(index), config.plateau.as_ref());
        let gradients = loss.backward();
        let model = self.model.take().expect(IN_PLACE);
        let (model, grad_norm) = self.optimiser.step(model, gradients, lr);
        self.model = Some(model);
        self.require_finite("gradient norm", grad_norm)?;
        self.position.step += 1;
        self.position.tokens += tokens;
        self.position.seconds = self.seconds_before + self.started.elapsed().as_secs_f64();

        let step = self.position.step;
        let is_last = step == config.steps;
        let val_loss = if is_last || is_due(step, config.eval_every) {
            Some(self.evaluate(task, config)?)
        } else {
            None
        };
        self.log.push(LogRow {
            step,
            tokens: self.position.tokens,
            loss: loss_value,
            val_loss,
            lr,
            grad_norm,
            seconds: self.position.seconds,
        })?;
        if is_due(step, config.checkpoint_every) {
            self.save_checkpoint()?;
        }
        Ok(loss_value)
    }

    fn require_finite(&self, what: &str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let error = Error::work(format!("the {what} of step {} is {value}", self.position.step + 1));
        Err(match self.saved_step {
            Some(step) => error.hint(format!(
                "the checkpoint of step {step} is kept; a lower learning rate or a smaller clip norm may help"
            )),
            None => error.hint("a lower learning rate or a smaller clip norm may help"),
        })
    }

    /// Measures the validation loss and keeps the weights when it is the lowest yet.
    fn evaluate(&mut self, task: &mut impl Task<M>, config: &TrainConfig) -> Result<f64> {
        let snapshot = self.model().valid();
        let loss = task.validate(&snapshot)?;
        if !loss.is_finite() {
            return Err(Error::work(format!(
                "the validation loss after step {} is {loss}",
                self.position.step
            )));
        }
        self.course.see(loss, config.min_improvement, config.plateau.as_ref());
        if self.position.best.is_some_and(|(best, _)| loss >= best) {
            self.position.stale += 1;
            return Ok(loss);
        }
        if let Some(folder) = self.folder {
            folder.save_weights(&TensorFile::from_module(&snapshot))?;
        }
        self.position.best = Some((loss, self.position.step));
        self.position.stale = 0;
        self.best = Some(snapshot);
        Ok(loss)
    }

    fn save_checkpoint(&mut self) -> Result<()> {
        let Some(folder) = self.folder else { return Ok(()) };
        checkpoint::save(
            folder,
            &self.model().valid(),
            self.best.as_ref(),
            &self.optimiser,
            &self.position,
            &self.settings,
        )?;
        self.saved_step = Some(self.position.step);
        Ok(())
    }

    fn finish(mut self, outcome: Outcome) -> Result<Trained<M>> {
        if self.saved_step != Some(self.position.step) {
            self.save_checkpoint()?;
        }
        let last = self.model().valid();
        if let (None, Some(folder)) = (&self.best, self.folder) {
            folder.save_weights(&TensorFile::from_module(&last))?;
        }
        let (best_loss, best_step) = self.position.best.unwrap_or((f64::INFINITY, self.position.step));
        Ok(Trained {
            model: self.best.unwrap_or_else(|| last.clone()),
            last,
            log: self.log.rows,
            best_loss,
            best_step,
            outcome,
        })
    }
}

fn schedule(config: &TrainConfig) -> Schedule {
    Schedule {
        peak: config.lr,
        warmup: config.warmup,
        steps: config.steps,
        min_ratio: config.min_lr_ratio,
        decay: config.decay,
    }
}

/// The optimiser of a run.
pub(crate) enum Optimiser {
    AdamW(AdamW),
    Sgd(Sgd),
}

impl Optimiser {
    fn new(config: &TrainConfig) -> Self {
        match config.method {
            Method::AdamW => {
                let mut adam = AdamW::new(config.weight_decay, config.clip_norm);
                (adam.betas, adam.clip_value) = (config.betas, config.clip_value);
                adam.rates = config.rates.clone();
                Self::AdamW(adam)
            }
            Method::Sgd { momentum } => {
                let mut sgd = Sgd::new(momentum);
                sgd.weight_decay = config.weight_decay;
                (sgd.clip_norm, sgd.clip_value) = (config.clip_norm, config.clip_value);
                Self::Sgd(sgd)
            }
        }
    }

    fn step<M: Module>(&mut self, module: M, gradients: Gradients, lr: f64) -> (M, f64) {
        match self {
            Self::AdamW(adam) => adam.step(module, gradients, lr),
            Self::Sgd(sgd) => sgd.step_and_norm(module, gradients, lr),
        }
    }

    pub(crate) fn export<M: Module>(&self, module: &M, file: &mut TensorFile) {
        match self {
            Self::AdamW(adam) => adam.export(module, file),
            Self::Sgd(sgd) => sgd.export(module, file),
        }
    }

    pub(crate) fn import<M: Module>(
        &mut self,
        module: &M,
        file: &mut TensorFile,
        steps: usize,
    ) -> Result<()> {
        match self {
            Self::AdamW(adam) => adam.import(module, file, steps),
            Self::Sgd(sgd) => sgd.import(module, file),
        }
    }
}

/// Whether something that happens every `every` steps (0: never) happens after `step`.
fn is_due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::initialise;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Device, TensorData};
    use rand::{Rng, RngExt};
    use std::path::Path;
    use std::sync::atomic::Ordering;

    /// Fits a linear map to samples of another; can be told to misbehave after some steps.
    #[derive(Default)]
    struct Fit {
        cx: Context,
        batch: usize,
        interrupt_after: Option<usize>,
        not_a_number_at: Option<usize>,
        /// Validation losses to report instead of measuring.
        scripted: Vec<f64>,
    }

    impl Fit {
        fn new(cx: &Context) -> Self {
            Self { cx: cx.clone(), batch: 4, ..Self::default() }
        }
    }

    fn samples(rng: &mut impl Rng, batch: usize) -> (Tensor<2>, Tensor<2>) {
        let device = Device::flex();
        let values: Vec<f32> = (0..batch * 3).map(|_| rng.random_range(-1.0..1.0)).collect();
        let x = Tensor::<2>::from_data(TensorData::new(values, [batch, 3]), &device);
        let y = x.clone().sum_dim(1).repeat_dim(1, 2);
        (x, y)
    }

    impl Task<Linear> for Fit {
        fn loss(&mut self, model: &Linear, step: usize) -> Result<(Tensor<1>, usize)> {
            let (x, y) = samples(&mut self.cx.rng("batch", step as u64), self.batch);
            let loss = (model.forward(x) - y).square().mean();
            if self.interrupt_after == Some(step + 1) {
                self.cx.interrupt_flag().store(true, Ordering::Relaxed);
            }
            let factor = if self.not_a_number_at == Some(step + 1) { f64::NAN } else { 1.0 };
            Ok((loss * factor, self.batch))
        }

        fn validate(&mut self, model: &Linear) -> Result<f64> {
            if !self.scripted.is_empty() {
                return Ok(self.scripted.remove(0));
            }
            let (x, y) = samples(&mut self.cx.rng("validation", 0), 16);
            Ok((model.forward(x) - y).square().mean().into_scalar::<f32>().into())
        }

        fn settings(&self) -> Map<String, Value> {
            [("batch".to_string(), Value::from(self.batch))].into_iter().collect()
        }
    }

    fn config() -> TrainConfig {
        TrainConfig {
            steps: 12,
            lr: 0.05,
            warmup: 2,
            eval_every: 4,
            checkpoint_every: 5,
            ..Default::default()
        }
    }

    fn model(cx: &Context) -> Linear {
        initialise(&cx.device, &mut cx.rng("init", 0), |device| LinearConfig::new(3, 2).init(device))
    }

    fn bits(model: &Linear) -> Vec<u32> {
        let file = TensorFile::from_module(model);
        let names: Vec<String> = file.names().map(str::to_string).collect();
        names
            .iter()
            .flat_map(|n| file.get(n).unwrap().as_floats().unwrap().to_vec())
            .map(f32::to_bits)
            .collect()
    }

    /// The log's lines without their last column, the seconds.
    fn log_without_seconds(folder: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(folder.join(LOG_FILE)).unwrap();
        text.lines().map(|line| line.rsplit_once(',').unwrap().0.to_string()).collect()
    }

    #[test]
    fn an_interrupted_and_resumed_run_equals_an_uninterrupted_one() {
        for method in [Method::AdamW, Method::Sgd { momentum: 0.9 }] {
            assert_resumed_equals_uninterrupted(&TrainConfig { method, ..config() });
        }
    }

    fn assert_resumed_equals_uninterrupted(config: &TrainConfig) {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let cx = Context::for_tests("unused");
        let folder = ModelFolder::new(whole.path());
        let expected = train(model(&cx), &mut Fit::new(&cx), config, Some(&folder), false, &cx).unwrap();
        assert_eq!(expected.outcome, Outcome::Finished);
        assert!(expected.best_loss < expected.log[0].loss);

        let folder = ModelFolder::new(parts.path());
        let cx = Context::for_tests("unused");
        let mut task = Fit { interrupt_after: Some(6), ..Fit::new(&cx) };
        let first = train(model(&cx), &mut task, config, Some(&folder), false, &cx).unwrap();
        assert_eq!((first.outcome, first.log.len()), (Outcome::Interrupted, 6));

        let cx = Context::for_tests("unused");
        let found = train(model(&cx), &mut Fit::new(&cx), config, Some(&folder), true, &cx).unwrap();
        assert_eq!(found.outcome, Outcome::Finished);
        assert_eq!(bits(&found.last), bits(&expected.last));
        assert_eq!(bits(&found.model), bits(&expected.model));
        assert_eq!((found.best_loss, found.best_step), (expected.best_loss, expected.best_step));
        assert_eq!(log_without_seconds(parts.path()), log_without_seconds(whole.path()));
        let on_disk = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        assert_eq!(on_disk(parts.path()), on_disk(whole.path()));
    }

    #[test]
    fn a_killed_run_goes_on_from_its_last_checkpoint() {
        let cx = Context::for_tests("unused");
        let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let whole_folder = ModelFolder::new(whole.path());
        let expected =
            train(model(&cx), &mut Fit::new(&cx), &config(), Some(&whole_folder), false, &cx).unwrap();
        // Dies in step 9: checkpoint of step 5, log up to step 8 with half a row after it, best of step 8.
        let folder = ModelFolder::new(killed.path());
        let mut task = Fit { not_a_number_at: Some(9), ..Fit::new(&cx) };
        let error = train(model(&cx), &mut task, &config(), Some(&folder), false, &cx).unwrap_err();
        assert!(error.to_string().contains("loss of step 9 is NaN"), "{error}");
        assert!(error.hint_text().unwrap().contains("checkpoint of step 5"));
        let log = killed.path().join(LOG_FILE);
        std::fs::write(&log, std::fs::read_to_string(&log).unwrap() + "9,3").unwrap();

        let found = train(model(&cx), &mut Fit::new(&cx), &config(), Some(&folder), true, &cx).unwrap();
        assert_eq!(bits(&found.last), bits(&expected.last));
        assert_eq!(log_without_seconds(killed.path()), log_without_seconds(whole.path()));
    }

    #[test]
    fn training_stops_when_validation_no_longer_improves_and_keeps_the_best() {
        let cx = Context::for_tests("unused");
        let mut task = Fit { scripted: vec![3.0, 2.0, 2.0, 2.5, 1.0], ..Fit::new(&cx) };
        let config = TrainConfig { eval_every: 1, patience: Some(2), ..config() };
        let trained = train(model(&cx), &mut task, &config, None, false, &cx).unwrap();
        assert_eq!((trained.outcome, trained.log.len()), (Outcome::EarlyStopped, 4));
        assert_eq!((trained.best_loss, trained.best_step), (2.0, 2));
        assert_ne!(bits(&trained.model), bits(&trained.last));
    }

    #[test]
    fn a_resumed_run_must_have_the_same_settings_but_may_be_longer() {
        let cx = Context::for_tests("unused");
        let dir = tempfile::tempdir().unwrap();
        let folder = ModelFolder::new(dir.path());
        let go = |task: &mut Fit, config: &TrainConfig, resume, cx: &Context| {
            train(model(cx), task, config, Some(&folder), resume, cx)
        };
        let error = go(&mut Fit::new(&cx), &config(), true, &cx).unwrap_err().to_string();
        assert!(error.contains("no run to resume"), "{error}");
        go(&mut Fit::new(&cx), &config(), false, &cx).unwrap();
        let error = go(&mut Fit::new(&cx), &config(), false, &cx).unwrap_err().to_string();
        assert!(error.contains("already holds a run"), "{error}");

        let other_lr = TrainConfig { lr: 0.06, ..config() };
        let error = go(&mut Fit::new(&cx), &other_lr, true, &cx).unwrap_err().to_string();
        assert!(error.contains("lr = 0.05, not 0.06"), "{error}");
        let mut other_batch = Fit { batch: 5, ..Fit::new(&cx) };
        let error = go(&mut other_batch, &config(), true, &cx).unwrap_err().to_string();
        assert!(error.contains("batch = 4, not 5"), "{error}");
        let mut other_seed = cx.clone();
        other_seed.seed = 9;
        let error = go(&mut Fit::new(&cx), &config(), true, &other_seed).unwrap_err().to_string();
        assert!(error.contains("seed = 0, not 9"), "{error}");
        let shorter = TrainConfig { steps: 11, ..config() };
        let error = go(&mut Fit::new(&cx), &shorter, true, &cx).unwrap_err().to_string();
        assert!(error.contains("has done 12 steps"), "{error}");

        let longer = TrainConfig { steps: 14, ..config() };
        assert_eq!(go(&mut Fit::new(&cx), &longer, true, &cx).unwrap().log.len(), 14);
    }

    #[test]
    fn a_write_that_fails_is_an_error() {
        let cx = Context::for_tests("unused");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let folder = ModelFolder::new(file.join("run"));
        let error = train(model(&cx), &mut Fit::new(&cx), &config(), Some(&folder), false, &cx).unwrap_err();
        assert!(error.to_string().contains("cannot create"), "{error}");
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let bad = [
            TrainConfig { steps: 0, ..config() },
            TrainConfig { lr: 0.0, ..config() },
            TrainConfig { lr: f64::NAN, ..config() },
            TrainConfig { clip_norm: -1.0, ..config() },
        ];
        assert!(bad.iter().all(|config| config.check().is_err()));
        config().check().unwrap();
    }
}
