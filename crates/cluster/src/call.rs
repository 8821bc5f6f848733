//! What a rank is doing, as every message says it.

use std::fmt;

use clap::ValueEnum;

use crate::element::{ElementKind, Op};

/// Which exchange between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Operation {
    /// One rank to another.
    Send = 1,
    /// All to all, reduced.
    AllReduce,
    /// All to all, reduced, each rank keeping its chunk.
    ReduceScatter,
    /// All to all, side by side.
    AllGather,
    /// A part of its own from each to each.
    AllToAll,
    /// One to all.
    Broadcast,
    /// All to one, reduced.
    Reduce,
    /// All to one, side by side.
    Gather,
    /// A part from one to each.
    Scatter,
    /// Nobody goes on before everyone has come.
    Barrier,
    /// Making a group of some ranks.
    Split,
    /// Measuring the link.
    Probe,
}

impl Operation {
    pub(crate) const ALL: [Self; 12] = [
        Self::Send,
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::AllToAll,
        Self::Broadcast,
        Self::Reduce,
        Self::Gather,
        Self::Scatter,
        Self::Barrier,
        Self::Split,
        Self::Probe,
    ];
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Send => "send",
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::AllToAll => "all_to_all",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::Barrier => "barrier",
            Self::Split => "split",
            Self::Probe => "probe",
        })
    }
}

/// How an all-reduce is done. `B` bytes over `n` ranks on links of latency `α` and bandwidth `β`:
///
/// | algorithm | time | order of the sum |
/// |---|---|---|
/// | `Ring` | `2(n−1)·α + 2(n−1)/n·B/β` | along the ring, another start for every chunk |
/// | `Tree` | `2⌈log₂ n⌉·(α + B/β)` | by halves |
/// | `HalvingDoubling` | `2 log₂ n·α + 2(n−1)/n·B/β` | by halves |
/// | `Star` | `2α + 2(n−1)·B/β` at the root | ranks 0, 1, … |
/// | `Canonical` | `2(n−1)·α + 2(n−1)/n·B/β` or less | ranks 0, 1, … |
/// | `Direct` | shared memory: `B` reads and writes, no messages | ranks 0, 1, … |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
#[repr(u8)]
pub enum Algorithm {
    /// The fastest of those that add in rank order: `Direct` in shared memory, elsewhere `Star` or `Canonical` by
    /// their costs; MPI's own over MPI.
    Auto = 1,
    /// Reduce-scatter and all-gather between neighbours on a ring.
    Ring,
    /// Binomial reduction to rank 0 and broadcast.
    Tree,
    /// All to rank 0, which adds, and back.
    Star,
    /// Recursive halving and doubling; the number of ranks must be a power of two.
    HalvingDoubling,
    /// Every rank reduces its chunk of everyone's buffer in place; `Star` where memory is not shared.
    Direct,
    /// Every rank gets its chunk from everyone, adds in rank order, and sends the sum to everyone: the same bits on
    /// every back end, for any number of messages between.
    Canonical,
}

impl Algorithm {
    pub(crate) const ALL: [Self; 7] = [
        Self::Auto,
        Self::Ring,
        Self::Tree,
        Self::Star,
        Self::HalvingDoubling,
        Self::Direct,
        Self::Canonical,
    ];
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ring => "ring",
            Self::Tree => "tree",
            Self::Star => "star",
            Self::HalvingDoubling => "halving-doubling",
            Self::Direct => "direct",
            Self::Canonical => "canonical",
        })
    }
}

/// What a rank called. In a collective call this must be the same on every rank of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Call {
    pub operation: Operation,
    pub element: ElementKind,
    pub reduction: Option<Op>,
    pub algorithm: Option<Algorithm>,
    /// The root of the operation; for a point-to-point message its tag.
    pub root: Option<u32>,
    /// Elements; zero where they may differ between ranks.
    pub count: u64,
}

impl Call {
    pub fn new(operation: Operation, element: ElementKind, count: usize) -> Self {
        Self { operation, element, reduction: None, algorithm: None, root: None, count: count as u64 }
    }

    pub fn reducing(self, op: Op) -> Self {
        Self { reduction: Some(op), ..self }
    }

    pub fn by(self, algorithm: Algorithm) -> Self {
        Self { algorithm: Some(algorithm), ..self }
    }

    pub fn rooted(self, root: u32) -> Self {
        Self { root: Some(root), ..self }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, element, reduction, algorithm, root, count } = self;
        if matches!(operation, Operation::Barrier | Operation::Split | Operation::Probe) {
            return write!(f, "{operation}");
        }
        write!(f, "{operation}(")?;
        match count {
            0 => write!(f, "{element}")?,
            count => write!(f, "{count} × {element}")?,
        }
        if let Some(reduction) = reduction {
            write!(f, ", {reduction}")?;
        }
        if let Some(algorithm) = algorithm {
            write!(f, ", {algorithm}")?;
        }
        match (operation, root) {
            (_, None) => {}
            (Operation::Send, Some(tag)) => write!(f, ", tag {tag}")?,
            (_, Some(root)) => write!(f, ", root {root}")?,
        }
        f.write_str(")")
    }
}
