//! Training on many ranks: one [`Trainer`] a rank, all making the same steps.

use std::ops::Range;
use std::sync::mpsc::channel;
use std::time::Instant;

use kiln_cluster::Op;
use kiln_core::{Context, Error, Result};
use serde::{Deserialize, Serialize};

use crate::dropout::DropoutKey;
use crate::executor::{BatchResult, PipelineExecutor};
use crate::layout::ParallelLayout;
use crate::model::GptConfig;
use crate::optimiser::{AdamW, Moments, gradient_norm, reduce_gradients};
use crate::parameters::{Finished, Parameters, initial_values, specs};
use crate::ranks::Ranks;
use crate::real::Real;
use crate::schedule::{Kind, Schedule};
use crate::stage::{MicroBatch, Recompute, StageOptions};
use crate::trace::Trace;

/// Bytes of gradients that are averaged together.
pub const BUCKET_BYTES: usize = 25 << 20;

/// Everything that decides a training step besides the network, its layout and the samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// B: samples of a step.
    pub batch: usize,
    /// b: samples that go through the pipeline together.
    pub micro_batch: usize,
    /// s: tokens of a sample.
    pub seq: usize,
    /// The order of passes.
    pub schedule: Kind,
    /// What is computed again instead of kept.
    pub recompute: Recompute,
    /// Whether activations are sent in shares.
    pub scatter_gather: bool,
    /// Whether the optimiser's state is divided over the data-parallel ranks.
    pub distributed_optimiser: bool,
    /// Bytes of gradients that are averaged together.
    pub bucket_bytes: usize,
    /// Share of a target's probability that is spread over all tokens.
    pub label_smoothing: f64,
    /// The optimiser.
    pub optimiser: AdamW,
    /// Seed of initial values, samples and dropout.
    pub seed: u64,
}

impl TrainOptions {
    /// Settings for batches of `batch` samples of `seq` tokens, `micro_batch` at a time.
    pub fn new(batch: usize, micro_batch: usize, seq: usize) -> Self {
        Self {
            batch,
            micro_batch,
            seq,
            schedule: Kind::OneForwardOneBackward,
            recompute: Recompute::None,
            scatter_gather: true,
            distributed_optimiser: false,
            bucket_bytes: BUCKET_BYTES,
            label_smoothing: 0.0,
            optimiser: AdamW::default(),
            seed: 0,
        }
    }

    /// The schedule that a layout takes, after everything is checked.
    ///
    /// # Errors
    /// Names the first number that does not fit the others.
    pub fn check(&self, config: &GptConfig, layout: &ParallelLayout) -> Result<Schedule> {
        config.check()?;
        layout.check(config)?;
        if self.seq == 0 || self.seq > config.max_seq {
            return Err(Error::usage(format!(
                "--seq {} is not between 1 and the {} positions that the network has",
                self.seq, config.max_seq
            ))
            .hint("use a shorter --seq, or a network with more positions"));
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return Err(Error::usage(format!(
                "the label smoothing is {}, but must be at least 0 and below 1",
                self.label_smoothing
            )));
        }
        self.optimiser.check()?;
        layout.schedule(self.schedule, self.batch, self.micro_batch)
    }
}

/// One step, as every rank knows it.
#[derive(Debug, Clone)]
pub struct StepResult {
    /// Mean loss of the batch before the update, nats a token.
    pub loss: f64,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Idle time of the pipeline's ranks over their work.
    pub bubble: f64,
    /// Seconds.
    pub seconds: f64,
    /// What this rank did when.
    pub trace: Trace,
}

/// One rank of a training run.
pub struct Trainer<T: Real> {
    /// The network.
    pub config: GptConfig,
    /// What decides a step.
    pub options: TrainOptions,
    /// The rank's groups.
    pub ranks: Ranks,
    /// The rank's part of the network.
    pub parameters: Parameters<T>,
    /// The rank's part of the optimiser's state.
    pub moments: Moments<T>,
    /// Steps made.
    pub step: usize,
    executor: PipelineExecutor,
}

impl<T: Real> Trainer<T> {
    /// A trainer whose parameters are parts of whole ones given by name, each in the order of a model folder; those that
    /// `whole` does not know are drawn from the seed.
    ///
    /// # Errors
    /// When the numbers do not fit together, or a rank is lost.
    pub fn new(
        config: &GptConfig,
        options: &TrainOptions,
        ranks: Ranks,
        whole: impl Fn(&str) -> Option<Vec<T>>,
        cx: &Context,
    ) -> Result<Self> {
        let schedule = options.check(config, &ranks.layout)?;
        let (at, t) = (ranks.at, ranks.layout.tensor);
        let specs = specs(config, &ranks.layout, at.pipe, at.tensor);
        let mut values = Vec::with_capacity(specs.last().map_or(0, |spec| spec.range.end));
        for spec in &specs {
            let part = match whole(&spec.name) {
                Some(whole) => spec.cut(&whole, at.tensor, t),
                None => {
                    let drawn = initial_values(config, &spec.name, &spec.whole, options.seed);
                    spec.cut(&drawn.into_iter().map(|x| T::of(x.into())).collect::<Vec<T>>(), at.tensor, t)
                }
            };
            values.extend(part);
        }
        let parameters = Parameters::new(specs, values, &cx.device);
        let moments = Moments::new(parameters.values.len(), options.distributed_optimiser, &ranks);
        let executor = PipelineExecutor::new(config, schedule, &ranks, options.scatter_gather, &parameters);
        Ok(Self {
            config: config.clone(),
            options: options.clone(),
            ranks,
            parameters,
            moments,
            step: 0,
            executor,
        })
    }

    /// The samples of this rank's pipeline, in micro-batches; `rows` are those of the whole batch, `[batch, seq + 1]`.
    fn micro_batches(&self, rows: &[u32]) -> Vec<MicroBatch> {
        let TrainOptions { batch, micro_batch: b, seq, seed, .. } = self.options;
        let each = batch / self.ranks.layout.data;
        let first = self.ranks.at.data * each;
        let rows = |from: usize| rows[from * (seq + 1)..(from + b) * (seq + 1)].chunks_exact(seq + 1);
        let micro_batch = |sample: usize| MicroBatch {
            inputs: rows(sample).flat_map(|row| &row[..seq]).copied().collect(),
            targets: rows(sample).flat_map(|row| &row[1..]).copied().collect(),
            samples: b,
            dropout: DropoutKey {
                probability: self.config.dropout,
                seed,
                step: self.step,
                first_sample: sample,
            },
        };
        (first..first + each).step_by(b).map(micro_batch).collect()
    }

    /// Forward and backward passes of a batch `[batch, seq + 1]`, and the reduced gradients; without an update.
    ///
    /// # Errors
    /// When a rank is lost, or the loss is not a number: names the step and the first layer where that begins.
    pub fn gradients(&mut self, rows: &[u32]) -> Result<StepResult> {
        let begun = Instant::now();
        self.parameters.clear_gradients();
        let options = StageOptions {
            recompute: self.options.recompute,
            label_smoothing: self.options.label_smoothing,
            count: (self.options.batch * self.options.seq) as f64,
            is_last: false,
        };
        let micro_batches = self.micro_batches(rows);
        let (batch, passes, reduced) = self.passes(&micro_batches, options)?;

        // Every rank of a tensor group has computed the same loss: the first one's counts.
        let mine = if self.ranks.at.tensor == 0 { batch.loss } else { 0.0 };
        let mut sums = [mine, batch.trace.busy(self.ranks.at.pipe)];
        let mut longest = [passes];
        if self.ranks.world.size() > 1 {
            self.ranks.world.all_reduce(&mut sums, Op::Sum)?;
            self.ranks.world.all_reduce(&mut longest, Op::Max)?;
        }
        let loss = sums[0];
        if !loss.is_finite() {
            return Err(self.broken(loss, batch.broken_layer)?);
        }
        let options = &self.options;
        reduce_gradients(
            &mut self.parameters,
            options.distributed_optimiser,
            options.bucket_bytes,
            &reduced,
            &self.ranks,
        )?;
        let grad_norm =
            gradient_norm(&self.parameters, &self.moments, options.distributed_optimiser, &self.ranks)?;
        if !grad_norm.is_finite() {
            return Err(Error::work(format!(
                "the gradient of step {} is {grad_norm}, though the loss is {loss:.4}",
                self.step + 1
            ))
            .hint("use a lower --lr, and go on from the last checkpoint with --resume"));
        }
        let bubble = longest[0] * self.ranks.world.size() as f64 / sums[1] - 1.0;
        Ok(StepResult { loss, grad_norm, bubble, seconds: begun.elapsed().as_secs_f64(), trace: batch.trace })
    }

    /// Forward and backward passes, and their seconds. Beside the backward pass of the last micro-batch the gradients of every
    /// layer that is done are added up over the data-parallel ranks; where these lie.
    fn passes(
        &mut self,
        micro_batches: &[MicroBatch],
        options: StageOptions,
    ) -> Result<(BatchResult, f64, Vec<Range<usize>>)> {
        let Self { executor, ranks, parameters, .. } = self;
        let begun = Instant::now();
        if ranks.data.size() == 1 || self.options.distributed_optimiser {
            let batch = executor.run(micro_batches, options, ranks, parameters)?;
            return Ok((batch, begun.elapsed().as_secs_f64(), Vec::new()));
        }
        let (finished, layers) = channel::<Finished<T>>();
        let (bucket, data) = ((self.options.bucket_bytes / size_of::<T>()).max(1), &ranks.data);
        parameters.finished = Some(finished);
        std::thread::scope(|scope| {
            let reducer = scope.spawn(move || {
                let reduce = |(range, mut sums): Finished<T>| {
                    sums.chunks_mut(bucket).try_for_each(|part| data.all_reduce(part, Op::Sum))?;
                    Ok((range, sums))
                };
                layers.into_iter().map(reduce).collect::<Result<Vec<Finished<T>>>>()
            });
            let batch = executor.run(micro_batches, options, ranks, parameters);
            let passes = begun.elapsed().as_secs_f64();
            // The reducer ends when nothing more can come.
            parameters.finished = None;
            let sums = reducer.join().map_err(|_| Error::work("the reducer of gradients panicked"))?;
            let (batch, mut reduced) = (batch?, Vec::new());
            for (range, sums) in sums? {
                parameters.gradients[range.clone()].copy_from_slice(&sums);
                reduced.push(range);
            }
            Ok((batch, passes, reduced))
        })
    }

    /// The error of a loss that is not a number, with the first layer where that shows.
    fn broken(&self, loss: f64, layer: Option<usize>) -> Result<Error> {
        let mut first = [layer.map_or(i64::MAX, |layer| layer as i64)];
        if self.ranks.world.size() > 1 {
            self.ranks.world.all_reduce(&mut first, Op::Min)?;
        }
        let place = match usize::try_from(first[0]) {
            Ok(layer) if layer < self.config.layers => {
                format!("layer {layer} is the first that gives no numbers")
            }
            _ => "the layers still give numbers, the output layer does not".to_string(),
        };
        Ok(Error::work(format!("the loss of step {} is {loss}: {place}", self.step + 1))
            .hint("use a lower --lr, and go on from the last checkpoint with --resume"))
    }

    /// One step on a batch `[batch, seq + 1]`.
    ///
    /// # Errors
    /// As [`gradients`](Self::gradients).
    pub fn train_step(&mut self, rows: &[u32], lr: f64) -> Result<StepResult> {
        let begun = Instant::now();
        let mut result = self.gradients(rows)?;
        let scale = self.options.optimiser.clip_factor(result.grad_norm);
        self.step += 1;
        let optimiser = self.options.optimiser;
        optimiser.step(&mut self.parameters, &mut self.moments, (self.step, lr, scale), &self.ranks)?;
        result.seconds = begun.elapsed().as_secs_f64();
        Ok(result)
    }

    /// The order of passes.
    pub fn schedule(&self) -> &Schedule {
        self.executor.schedule()
    }

    /// The traces of all pipeline ranks, on every one of them.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn gather_trace(&self, trace: &Trace) -> Result<Trace> {
        let pipe = &self.ranks.pipe;
        if pipe.size() == 1 {
            return Ok(trace.clone());
        }
        let times: Vec<f64> = trace.spans.iter().flat_map(|span| [span.start, span.end]).collect();
        let mut all = vec![0.0; times.len() * pipe.size()];
        pipe.all_gather(&times, &mut all)?;
        let mut whole = Trace::default();
        for (rank, times) in all.chunks_exact(times.len()).enumerate() {
            for (operation, time) in self.schedule().operations(rank).into_iter().zip(times.chunks_exact(2)) {
                whole.spans.push(crate::trace::Span { rank, operation, start: time[0], end: time[1] });
            }
        }
        Ok(whole)
    }
}
