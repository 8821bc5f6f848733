//! What ends the work of many ranks.

use std::fmt;
use std::time::Duration;

use kiln_core::Error;
use serde::{Deserialize, Serialize};

/// Why ranks cannot go on. Ranks are those of the world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterError {
    /// A rank panicked, failed, was killed, or closed its connection.
    PeerLost {
        /// The rank that is gone.
        rank: usize,
        /// What this rank was doing.
        during: String,
        /// How long it had been doing that.
        after: Duration,
        /// What is known of the reason.
        cause: String,
    },
    /// A rank did not do its part in time.
    Timeout {
        /// The rank that was waited for, where it is one.
        rank: Option<usize>,
        /// What this rank was doing.
        during: String,
        /// How long it had been doing that.
        after: Duration,
        /// What each rank was last seen to do, where that is known.
        calls: Vec<(usize, String)>,
    },
    /// Ranks called different things.
    Mismatch {
        /// Ranks and what they called.
        calls: Vec<(usize, String)>,
    },
    /// A rank gave up on purpose.
    Aborted {
        /// The rank that did.
        rank: usize,
        /// The reason it gave.
        reason: String,
    },
    /// A call that cannot be: a length, a rank or an algorithm that does not fit.
    Invalid(String),
    /// The ranks did not find each other.
    Rendezvous(String),
}

impl ClusterError {
    /// The cluster's error beneath an error, where there is one.
    pub fn of(error: &Error) -> Option<&Self> {
        let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
        causes.into_iter().find_map(|cause| cause.downcast_ref())
    }

    /// The same failure as it looks to a rank that is doing something else.
    pub(crate) fn seen(self, doing: &str, since: Duration) -> Self {
        match self {
            Self::PeerLost { rank, cause, .. } => {
                Self::PeerLost { rank, cause, during: doing.into(), after: since }
            }
            other => other,
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::PeerLost { .. } => "look at what that rank printed; the other ranks have stopped",
            Self::Timeout { .. } => "a rank may be stuck or slow; `--timeout 2m` waits longer",
            Self::Mismatch { .. } => "all ranks of a group must make the same calls in the same order",
            Self::Aborted { .. } => "look at what that rank printed",
            Self::Invalid(_) => "this is a fault of the program that runs on the ranks",
            Self::Rendezvous(_) => {
                "every rank needs the same --rendezvous, number of ranks and --cluster-token"
            }
        }
    }
}

impl fmt::Display for ClusterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PeerLost { rank, during, after, cause } => {
                write!(f, "rank {rank} was lost during {during} (after {after:.1?}): {cause}")
            }
            Self::Timeout { rank, during, after, calls } => {
                match rank {
                    Some(rank) => write!(f, "rank {rank} did not answer within {after:.1?} during {during}")?,
                    None => write!(f, "not done within {after:.1?}: {during}")?,
                }
                list(f, "; last seen: ", calls)
            }
            Self::Mismatch { calls } => {
                f.write_str("ranks do not agree on what to do")?;
                list(f, ": ", calls)
            }
            Self::Aborted { rank, reason } => write!(f, "rank {rank} gave up: {reason}"),
            Self::Invalid(what) | Self::Rendezvous(what) => f.write_str(what),
        }
    }
}

fn list(f: &mut fmt::Formatter<'_>, before: &str, calls: &[(usize, String)]) -> fmt::Result {
    for (index, (rank, call)) in calls.iter().enumerate() {
        write!(f, "{}rank {rank}: {call}", if index == 0 { before } else { ", " })?;
    }
    Ok(())
}

impl std::error::Error for ClusterError {}

impl From<ClusterError> for Error {
    fn from(error: ClusterError) -> Self {
        let hint = error.hint();
        Error::work("the ranks cannot go on").hint(hint).caused_by(error)
    }
}
