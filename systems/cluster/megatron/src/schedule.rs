//! Pipeline schedules: in which order a rank computes forward and backward passes of micro-batches.
//!
//! With `p` pipeline ranks, `m` micro-batches and `v` chunks of layers a rank, the stage of chunk `c` on rank `r` is
//! `c p + r`. All schedules flush at the end of a batch, so that the optimiser sees what it would on one device. Idle
//! time over the time of a rank's own work, the bubble, is `(p - 1) / (v m)` (paper §2.2).

use std::fmt;

use clap::ValueEnum;
use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// One pass of a micro-batch through a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Operation {
    /// Forward or backward.
    pub pass: Pass,
    /// Which micro-batch.
    pub micro: usize,
    /// Which of the rank's own chunks.
    pub chunk: usize,
}

/// The direction of an [`Operation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// From the tokens to the loss.
    Forward,
    /// From the loss back.
    Backward,
}

/// `F<micro>.<chunk>` or `B<micro>.<chunk>`.
impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = if self.pass == Pass::Forward { 'F' } else { 'B' };
        write!(f, "{letter}{}.{}", self.micro, self.chunk)
    }
}

/// The order in which passes follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// All forward passes, then all backward passes (Huang et al., "GPipe", arXiv 1811.06965)
    Gpipe,
    /// One forward, one backward pass in turn (Narayanan et al., "PipeDream-2BW", arXiv 2006.09503)
    #[value(name = "1f1b")]
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// The same over several chunks of layers a rank
    Interleaved,
}

impl Kind {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpipe => "GPipe",
            Self::OneForwardOneBackward => "1F1B",
            Self::Interleaved => "interleaved 1F1B",
        }
    }
}

/// `1F1B: 2 ranks, 4 micro-batches, 1 chunk`
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted =
            |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        let parts = [(self.pipeline, "rank"), (self.micro_batches, "micro-batch"), (self.chunks, "chunk")];
        let [ranks, micro_batches, chunks] = parts.map(|(count, what)| counted(count, what));
        write!(f, "{}: {ranks}, {}, {chunks}", self.kind.name(), micro_batches.replace("batchs", "batches"))
    }
}

/// A schedule for every rank of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// The order.
    pub kind: Kind,
    /// p: ranks of the pipeline.
    pub pipeline: usize,
    /// m: micro-batches a batch.
    pub micro_batches: usize,
    /// v: chunks a rank.
    pub chunks: usize,
}

impl Schedule {
    /// All forward passes, then all backward passes.
    ///
    /// # Errors
    /// When a number is 0, or chunks are more than 1 (which only an interleaved schedule knows how to order).
    pub fn gpipe(pipeline: usize, micro_batches: usize, chunks: usize) -> Result<Self> {
        Self::new(Kind::Gpipe, pipeline, micro_batches, chunks)
    }

    /// One forward, one backward pass in turn.
    ///
    /// # Errors
    /// As [`gpipe`](Self::gpipe).
    pub fn one_f_one_b(pipeline: usize, micro_batches: usize, chunks: usize) -> Result<Self> {
        Self::new(Kind::OneForwardOneBackward, pipeline, micro_batches, chunks)
    }

    /// One forward, one backward pass in turn, over several chunks a rank.
    ///
    /// # Errors
    /// When a number is 0 or the micro-batches are not a multiple of the ranks.
    pub fn interleaved(pipeline: usize, micro_batches: usize, chunks: usize) -> Result<Self> {
        Self::new(Kind::Interleaved, pipeline, micro_batches, chunks)
    }

    /// A schedule of some kind.
    ///
    /// # Errors
    /// When a number is 0 or the kind cannot order such a pipeline.
    pub fn new(kind: Kind, pipeline: usize, micro_batches: usize, chunks: usize) -> Result<Self> {
        for (what, count) in
            [("pipeline ranks", pipeline), ("micro-batches", micro_batches), ("chunks a rank", chunks)]
        {
            if count == 0 {
                return Err(Error::usage(format!("the number of {what} is 0, but must be at least 1")));
            }
        }
        if kind != Kind::Interleaved && chunks > 1 {
            return Err(Error::usage(format!("{chunks} chunks a rank need the interleaved schedule"))
                .hint("use --schedule interleaved, or --chunks 1"));
        }
        if kind == Kind::Interleaved && !micro_batches.is_multiple_of(pipeline) {
            let below = micro_batches / pipeline * pipeline;
            let legal =
                if below == 0 { format!("{pipeline}") } else { format!("{below} or {}", below + pipeline) };
            return Err(Error::usage(format!(
                "the interleaved schedule passes micro-batches on in groups of {pipeline}, the pipeline ranks, which \
                 do not divide {micro_batches} micro-batches"
            ))
            .hint(format!("use {legal} micro-batches, or --schedule 1f1b with --chunks 1")));
        }
        Ok(Self { kind, pipeline, micro_batches, chunks })
    }

    /// What rank `rank` of the pipeline computes, in order.
    pub fn operations(&self, rank: usize) -> Vec<Operation> {
        let (p, m, v) = (self.pipeline, self.micro_batches, self.chunks);
        let total = m * v;
        // The k-th forward pass: groups of p micro-batches go through chunk after chunk, so that the one that comes back
        // from the last rank finds the first rank ready for it.
        let at = |k: usize, pass: Pass| {
            let group = k / (p * v);
            let chunk = match pass {
                Pass::Forward => k / p % v,
                Pass::Backward => v - 1 - k / p % v,
            };
            Operation { pass, micro: group * p + k % p, chunk }
        };
        let in_turn = |k: usize, pass: Pass| match self.kind {
            Kind::Interleaved => at(k, pass),
            Kind::Gpipe | Kind::OneForwardOneBackward => Operation { pass, micro: k, chunk: 0 },
        };
        let warm_up = match self.kind {
            Kind::Gpipe => total,
            Kind::OneForwardOneBackward => total.min(p - rank - 1),
            // With one chunk there is nothing to interleave, and the shorter warm-up of 1F1B does.
            Kind::Interleaved if v == 1 => total.min(p - rank - 1),
            Kind::Interleaved => total.min(2 * (p - rank - 1) + (v - 1) * p),
        };
        let mut operations: Vec<Operation> = (0..warm_up).map(|k| in_turn(k, Pass::Forward)).collect();
        for k in warm_up..total {
            operations.push(in_turn(k, Pass::Forward));
            operations.push(in_turn(k - warm_up, Pass::Backward));
        }
        operations.extend((total - warm_up..total).map(|k| in_turn(k, Pass::Backward)));
        operations
    }

    /// `(p - 1) / (v m)`: idle time over the time of a rank's own work, when communication is free.
    pub fn bubble(&self) -> f64 {
        (self.pipeline - 1) as f64 / (self.chunks * self.micro_batches) as f64
    }

    /// The most activations that a rank holds at once: passes of a micro-batch through a chunk that went forward and not
    /// yet backward.
    pub fn peak_in_flight(&self, rank: usize) -> usize {
        let mut live = 0usize;
        let mut peak = 0;
        for operation in self.operations(rank) {
            match operation.pass {
                Pass::Forward => live += 1,
                Pass::Backward => live -= 1,
            }
            peak = peak.max(live);
        }
        peak
    }

    /// The last stage, which computes the loss.
    pub fn last_stage(&self) -> usize {
        self.pipeline * self.chunks - 1
    }
}
