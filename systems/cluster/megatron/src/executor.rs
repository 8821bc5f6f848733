//! One batch through the pipeline: every rank goes through its list of operations, hands activations on and gradients back.

use std::collections::HashMap;
use std::time::Instant;

use burn::tensor::Tensor;
use kiln_cluster::{Receiving, Sending};
use kiln_core::Result;

use crate::model::GptConfig;
use crate::parameters::Parameters;
use crate::ranks::Ranks;
use crate::real::{self, Real};
use crate::schedule::{Operation, Pass, Schedule};
use crate::stage::{Flow, MicroBatch, Stage, StageOptions, StageSaved};
use crate::trace::{Span, Trace};

/// The chunks of one rank, and how their passes follow one another.
pub struct PipelineExecutor {
    schedule: Schedule,
    stages: Vec<Stage>,
    /// Whether each tensor rank sends only its share of an activation, which the receivers gather among themselves
    /// (paper §4.1).
    pub scatter_gather: bool,
    hidden: usize,
}

/// What a batch gave on one rank.
#[derive(Debug, Clone)]
pub struct BatchResult {
    /// The share of the mean loss that this rank computed; 0 where it has not the last stage.
    pub loss: f64,
    /// What this rank computed, and when.
    pub trace: Trace,
    /// The first layer of this rank whose activations were not all numbers.
    pub broken_layer: Option<usize>,
}

/// Operations ahead for which receives are posted.
const AHEAD: usize = 2;

impl PipelineExecutor {
    /// The chunks that a rank has of a network.
    pub fn new<T: Real>(
        config: &GptConfig,
        schedule: Schedule,
        ranks: &Ranks,
        scatter_gather: bool,
        parameters: &Parameters<T>,
    ) -> Self {
        let stages = (0..schedule.chunks).map(|chunk| Stage::new(config, ranks, chunk, parameters)).collect();
        Self { schedule, stages, scatter_gather, hidden: config.hidden }
    }

    /// The order of passes.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Takes all micro-batches forward and backward; gradients are added to those that are there.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn run<T: Real>(
        &self,
        micro_batches: &[MicroBatch],
        options: StageOptions,
        ranks: &Ranks,
        parameters: &mut Parameters<T>,
    ) -> Result<BatchResult> {
        let order = self.schedule.operations(ranks.at.pipe);
        let begun = Instant::now();
        let mut links = Links::<T>::new(self, ranks);
        let mut saved: HashMap<(usize, usize), StageSaved> = HashMap::new();
        let mut result = BatchResult { loss: 0.0, trace: Trace::default(), broken_layer: None };
        for (at, &operation) in order.iter().enumerate() {
            for &next in &order[at..order.len().min(at + 1 + AHEAD)] {
                links.expect(next, micro_batches)?;
            }
            let Operation { pass, micro, chunk } = operation;
            let (stage, batch) = (&self.stages[chunk], &micro_batches[micro]);
            let input = links.take(operation, batch, parameters)?;
            let start = begun.elapsed().as_secs_f64();
            let output = match pass {
                Pass::Forward => {
                    let flow = input.map_or(Flow::Tokens, Flow::Activations);
                    let forward = stage.forward(flow, batch, options, ranks, parameters)?;
                    saved.insert((micro, chunk), forward.saved);
                    result.loss += forward.loss.unwrap_or(0.0);
                    result.broken_layer = result.broken_layer.or(forward.broken_layer);
                    forward.output
                }
                Pass::Backward => {
                    let kept =
                        saved.remove(&(micro, chunk)).expect("a schedule goes backward only after forward");
                    let goes_back = |later: &Operation| later.pass == Pass::Backward && later.chunk == chunk;
                    let is_last = !order[at + 1..].iter().any(goes_back);
                    stage.backward(
                        kept,
                        input,
                        batch,
                        StageOptions { is_last, ..options },
                        ranks,
                        parameters,
                    )?
                }
            };
            let end = begun.elapsed().as_secs_f64();
            result.trace.spans.push(Span { rank: ranks.at.pipe, operation, start, end });
            if let Some(output) = output {
                links.send(operation, output)?;
            }
        }
        links.finish()?;
        Ok(result)
    }
}

/// The ways between neighbouring stages.
struct Links<'a, T: Real> {
    executor: &'a PipelineExecutor,
    ranks: &'a Ranks,
    receiving: HashMap<Operation, Receiving<T>>,
    sending: Vec<Sending>,
    /// From one chunk of this rank to another, where the pipeline is one rank long.
    own: HashMap<Operation, Tensor<2>>,
}

impl<'a, T: Real> Links<'a, T> {
    fn new(executor: &'a PipelineExecutor, ranks: &'a Ranks) -> Self {
        Self { executor, ranks, receiving: HashMap::new(), sending: Vec::new(), own: HashMap::new() }
    }

    /// The operation that is given what `operation` puts out: its rank and, as that rank has it, the operation.
    fn after(&self, operation: Operation) -> Option<(usize, Operation)> {
        let stage = self.ranks.stage(operation.chunk);
        let next = match operation.pass {
            Pass::Forward => stage + 1,
            Pass::Backward => stage.checked_sub(1)?,
        };
        let pipeline = self.executor.schedule.pipeline;
        let known = next <= self.executor.schedule.last_stage();
        known.then(|| (next % pipeline, Operation { chunk: next / pipeline, ..operation }))
    }

    /// The rank from which an operation gets its input.
    fn source(&self, operation: Operation) -> Option<usize> {
        let stage = self.ranks.stage(operation.chunk);
        let before = match operation.pass {
            Pass::Forward => stage.checked_sub(1)?,
            Pass::Backward => stage + 1,
        };
        (before <= self.executor.schedule.last_stage()).then(|| before % self.executor.schedule.pipeline)
    }

    /// A number for every message of a batch: with two ranks, forward and backward messages and those of different chunks
    /// run between the same pair.
    fn tag(&self, at: Operation, rank: usize) -> u32 {
        let stage = at.chunk * self.executor.schedule.pipeline + rank;
        let stages = self.executor.schedule.last_stage() + 1;
        (2 * (at.micro * stages + stage) + usize::from(at.pass == Pass::Backward)) as u32
    }

    /// Whether activations of `len` elements are sent in shares.
    fn in_shares(&self, len: usize) -> bool {
        let t = self.ranks.layout.tensor;
        self.executor.scatter_gather && t > 1 && len.is_multiple_of(t)
    }

    /// Elements of a message about a micro-batch.
    fn message_len(&self, batch: &MicroBatch) -> usize {
        let whole = batch.inputs.len() * self.executor.hidden;
        if self.in_shares(whole) { whole / self.ranks.layout.tensor } else { whole }
    }

    /// Posts the receive for an operation's input.
    fn expect(&mut self, operation: Operation, micro_batches: &[MicroBatch]) -> Result<()> {
        let Some(from) = self.source(operation).filter(|&from| from != self.ranks.at.pipe) else {
            return Ok(());
        };
        if self.receiving.contains_key(&operation) {
            return Ok(());
        }
        let len = self.message_len(&micro_batches[operation.micro]);
        let tag = self.tag(operation, self.ranks.at.pipe);
        self.receiving.insert(operation, self.ranks.pipe.irecv(from, tag, len)?);
        Ok(())
    }

    /// Waits for an operation's input; none for tokens and where the loss is.
    fn take(
        &mut self,
        operation: Operation,
        batch: &MicroBatch,
        parameters: &Parameters<T>,
    ) -> Result<Option<Tensor<2>>> {
        if let Some(own) = self.own.remove(&operation) {
            return Ok(Some(own));
        }
        let Some(receiving) = self.receiving.remove(&operation) else { return Ok(None) };
        let mut values = receiving.wait()?;
        let dims = [batch.inputs.len(), self.executor.hidden];
        if self.in_shares(dims[0] * dims[1]) {
            let mut whole = vec![T::ZERO; dims[0] * dims[1]];
            self.ranks.tensor.all_gather(&values, &mut whole)?;
            values = whole;
        }
        Ok(Some(real::tensor(values, dims, parameters.device())))
    }

    /// Sends an operation's output on its way.
    fn send(&mut self, operation: Operation, output: Tensor<2>) -> Result<()> {
        let Some((rank, next)) = self.after(operation) else { return Ok(()) };
        if rank == self.ranks.at.pipe {
            self.own.insert(next, output);
            return Ok(());
        }
        let mut values: Vec<T> = real::into_vec(output);
        if self.in_shares(values.len()) {
            let share = values.len() / self.ranks.layout.tensor;
            let first = self.ranks.at.tensor * share;
            values = values[first..first + share].to_vec();
        }
        self.sending.push(self.ranks.pipe.isend(rank, self.tag(next, rank), values)?);
        Ok(())
    }

    /// Waits until everything is sent.
    fn finish(self) -> Result<()> {
        self.sending.into_iter().try_for_each(Sending::wait)
    }
}
