//! How ranks share a network: which of them holds which layers, and what must divide what.

use std::ops::Range;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::model::GptConfig;
use crate::schedule::{Kind, Schedule};

/// t · p · d ranks: tensor-parallel within a layer, pipeline-parallel over layers, data-parallel over the batch.
///
/// Ranks are numbered with the tensor group fastest, so that it stays within a node, then data, then pipeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParallelLayout {
    /// t
    pub tensor: usize,
    /// p
    pub pipeline: usize,
    /// d
    pub data: usize,
    /// v: chunks of layers on each pipeline rank.
    pub chunks: usize,
    /// Layers of each of the `p v` stages, where they are not all alike.
    pub stage_layers: Option<Vec<usize>>,
}

/// Where a rank stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is a coordinate")]
pub struct Coordinate {
    pub pipe: usize,
    pub data: usize,
    pub tensor: usize,
}

impl ParallelLayout {
    /// One chunk a rank, all stages alike.
    pub fn new(tensor: usize, pipeline: usize, data: usize) -> Self {
        Self { tensor, pipeline, data, chunks: 1, stage_layers: None }
    }

    /// With `chunks` chunks on each pipeline rank.
    pub fn with_chunks(self, chunks: usize) -> Self {
        Self { chunks, ..self }
    }

    /// With so many layers on each stage; stage `c p + r` is chunk `c` of rank `r`.
    pub fn with_stage_layers(self, layers: Vec<usize>) -> Self {
        Self { stage_layers: Some(layers), ..self }
    }

    /// t · p · d
    pub fn ranks(&self) -> usize {
        self.tensor * self.pipeline * self.data
    }

    /// p · v
    pub fn stages(&self) -> usize {
        self.pipeline * self.chunks
    }

    /// Where rank `rank` stands.
    pub fn coordinate(&self, rank: usize) -> Coordinate {
        Coordinate {
            tensor: rank % self.tensor,
            data: rank / self.tensor % self.data,
            pipe: rank / self.tensor / self.data,
        }
    }

    /// The layers of a stage, of `layers` in all.
    pub fn layers_of(&self, stage: usize, layers: usize) -> Range<usize> {
        match &self.stage_layers {
            Some(counts) => {
                let first = counts[..stage].iter().sum();
                first..first + counts[stage]
            }
            None => {
                let each = layers / self.stages();
                stage * each..(stage + 1) * each
            }
        }
    }

    /// Makes sure that a network can be shared in this way.
    ///
    /// # Errors
    /// Names the first quantity that does not divide, both numbers, and the nearest ones that would.
    pub fn check(&self, config: &GptConfig) -> Result<()> {
        for (name, value) in [
            ("--tensor", self.tensor),
            ("--pipeline", self.pipeline),
            ("--data-parallel", self.data),
            ("--chunks", self.chunks),
        ] {
            if value == 0 {
                return Err(Error::usage(format!("{name} is 0, but must be at least 1")));
            }
        }
        must_divide("--tensor", self.tensor, "heads", config.heads)?;
        must_divide("--tensor", self.tensor, "hidden", config.hidden)?;
        let stages = self.stages();
        match &self.stage_layers {
            Some(counts) => {
                if counts.len() != stages {
                    return Err(Error::usage(format!(
                        "--stage-layers names {} stages, but {} pipeline ranks with {} chunks are {stages}",
                        counts.len(),
                        self.pipeline,
                        self.chunks
                    )));
                }
                let total: usize = counts.iter().sum();
                if total != config.layers {
                    return Err(Error::usage(format!(
                        "--stage-layers adds up to {total} layers, but the network has {}",
                        config.layers
                    )));
                }
            }
            None if !config.layers.is_multiple_of(stages) => {
                let legal = nearest(&divisors(config.layers), stages);
                return Err(Error::usage(format!(
                    "{} layers are not divisible by the {stages} stages of {} pipeline ranks with {} chunks",
                    config.layers, self.pipeline, self.chunks
                ))
                .hint(format!(
                    "use --pipeline times --chunks of {legal}, or say with --stage-layers how many layers each stage has"
                )));
            }
            None => {}
        }
        Ok(())
    }

    /// The schedule of a batch.
    ///
    /// # Errors
    /// When the batch does not divide into micro-batches, or these not into what the schedule needs.
    pub fn schedule(&self, kind: Kind, batch: usize, micro_batch: usize) -> Result<Schedule> {
        if micro_batch == 0 || batch == 0 {
            return Err(Error::usage("--batch and --micro-batch must be at least 1"));
        }
        let together = self.data * micro_batch;
        if !batch.is_multiple_of(together) {
            let below = batch / together * together;
            let legal =
                if below == 0 { together.to_string() } else { format!("{below} or {}", below + together) };
            return Err(Error::usage(format!(
                "the batch of {batch} is not divisible by {together}: {} data-parallel ranks times micro-batches of \
                 {micro_batch}",
                self.data
            ))
            .hint(format!("use --batch {legal}")));
        }
        Schedule::new(kind, self.pipeline, batch / together, self.chunks)
    }
}

fn must_divide(option: &str, divisor: usize, what: &str, value: usize) -> Result<()> {
    if value.is_multiple_of(divisor) {
        return Ok(());
    }
    let legal = nearest(&divisors(value), divisor);
    Err(Error::usage(format!("{option} {divisor} does not divide {what} {value}"))
        .hint(format!("use {option} {legal}")))
}

/// All divisors of `n`, in order.
pub(crate) fn divisors(n: usize) -> Vec<usize> {
    (1..=n).filter(|d| n.is_multiple_of(*d)).collect()
}

/// The nearest of some numbers below and above `wanted`, in words.
fn nearest(legal: &[usize], wanted: usize) -> String {
    let below = legal.iter().rev().find(|&&n| n < wanted);
    let above = legal.iter().find(|&&n| n > wanted);
    let both: Vec<String> = below.into_iter().chain(above).map(usize::to_string).collect();
    both.join(" or ")
}
