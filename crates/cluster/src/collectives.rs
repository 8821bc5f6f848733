//! Operations of all ranks of a group, over messages and over shared memory.
//!
//! Whatever the back end, a sum has a fixed order. [`Communicator::reduce_scatter`], and [`Communicator::all_reduce`]
//! by `Auto`, `Direct`, `Star` or `Canonical`, add in rank order, so that threads and processes give the same bits.

mod all_reduce;
mod direct;
mod rooted;

pub use all_reduce::cost;

use std::ops::Range;

use kiln_core::Result;

use crate::call::{Algorithm, Call, Operation};
use crate::communicator::{Communicator, Step};
use crate::element::{Element, Op, accumulate, finish_wide};
use crate::error::ClusterError;

/// The part of `len` elements that belongs to rank `index` of `ranks`: the first `len mod ranks` ranks have one
/// element more.
pub fn chunk(len: usize, ranks: usize, index: usize) -> Range<usize> {
    let start = |index: usize| index * (len / ranks) + index.min(len % ranks);
    start(index)..start(index + 1)
}

impl Communicator {
    /// Reduces `buffer` over all ranks, in place, by [`Algorithm::Auto`].
    ///
    /// # Errors
    /// When a rank is lost or late, or the ranks' calls differ.
    pub fn all_reduce<T: Element>(&self, buffer: &mut [T], op: Op) -> Result<()> {
        self.all_reduce_by(buffer, op, Algorithm::Auto)
    }

    /// Reduces `buffer` over all ranks, in place.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce), and when the algorithm does not suit the number of ranks.
    pub fn all_reduce_by<T: Element>(&self, buffer: &mut [T], op: Op, algorithm: Algorithm) -> Result<()> {
        let call = Call::new(Operation::AllReduce, T::KIND, buffer.len()).reducing(op).by(algorithm);
        self.collective(call, |step| all_reduce::all_reduce(step, buffer, op, algorithm))
    }

    /// Reduces `send` over all ranks and keeps this rank's [`chunk`] of the result.
    ///
    /// # Errors
    /// When `into` is not as long as the chunk, a rank is lost or late, or the ranks' calls differ.
    pub fn reduce_scatter<T: Element>(&self, send: &[T], into: &mut [T], op: Op) -> Result<()> {
        let call = Call::new(Operation::ReduceScatter, T::KIND, send.len()).reducing(op);
        self.collective(call, |step| {
            let own = chunk(send.len(), step.size(), step.rank()).len();
            step.require("into", into.len(), own)?;
            if step.shares_memory() {
                return direct::reduce_scatter(step, send, into, op);
            }
            reduce_chunk(step, send, into, op)
        })
    }

    /// Puts the `send` of all ranks side by side into `into` on every rank; all are of one length.
    ///
    /// # Errors
    /// When the lengths do not fit, a rank is lost or late, or the ranks' calls differ.
    pub fn all_gather<T: Element>(&self, send: &[T], into: &mut [T]) -> Result<()> {
        self.gather_all(send, &vec![send.len(); self.size()], into)
    }

    /// Puts the `send` of all ranks side by side into `into` on every rank; `counts` has their lengths.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn all_gather_v<T: Element>(&self, send: &[T], counts: &[usize], into: &mut [T]) -> Result<()> {
        self.gather_all(send, counts, into)
    }

    fn gather_all<T: Element>(&self, send: &[T], counts: &[usize], into: &mut [T]) -> Result<()> {
        let call = Call::new(Operation::AllGather, T::KIND, counts.iter().sum());
        self.collective(call, |step| {
            step.require("counts", counts.len(), step.size())?;
            step.require("send", send.len(), counts[step.rank()])?;
            step.require("into", into.len(), counts.iter().sum())?;
            if step.shares_memory() {
                return direct::all_gather(step, send, counts, into);
            }
            let parts = parts_of(counts);
            into[parts[step.rank()].clone()].copy_from_slice(send);
            ring_all_gather(step, into, |rank| parts[rank].clone())
        })
    }

    /// Sends a part of `send` to every rank and receives one from each; all parts are of one length.
    ///
    /// # Errors
    /// When the lengths do not fit, a rank is lost or late, or the ranks' calls differ.
    pub fn all_to_all<T: Element>(&self, send: &[T], into: &mut [T]) -> Result<()> {
        let call = Call::new(Operation::AllToAll, T::KIND, send.len());
        self.collective(call, |step| {
            let ranks = step.size();
            if !send.len().is_multiple_of(ranks) {
                let what = format!("{}: {} elements have no {ranks} equal parts", step.call, send.len());
                return Err(ClusterError::Invalid(what));
            }
            step.require("into", into.len(), send.len())?;
            let counts = vec![send.len() / ranks; ranks];
            exchange_all(step, send, &counts, into, &counts)
        })
    }

    /// Sends `send_counts[k]` elements to rank `k` and receives `receive_counts[k]` from it, in the order of ranks.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all), and when a rank expects another length than is sent to it.
    pub fn all_to_all_v<T: Element>(
        &self,
        send: &[T],
        send_counts: &[usize],
        into: &mut [T],
        receive_counts: &[usize],
    ) -> Result<()> {
        let call = Call::new(Operation::AllToAll, T::KIND, 0);
        self.collective(call, |step| {
            step.require("send_counts", send_counts.len(), step.size())?;
            step.require("receive_counts", receive_counts.len(), step.size())?;
            step.require("send", send.len(), send_counts.iter().sum())?;
            step.require("into", into.len(), receive_counts.iter().sum())?;
            exchange_all(step, send, send_counts, into, receive_counts)
        })
    }

    /// Copies the root's `buffer` to all ranks.
    ///
    /// # Errors
    /// When a rank is lost or late, or the ranks' calls differ.
    pub fn broadcast<T: Element>(&self, buffer: &mut [T], root: usize) -> Result<()> {
        let call = Call::new(Operation::Broadcast, T::KIND, buffer.len()).rooted(root as u32);
        self.collective(call, |step| {
            step.require_rank(root)?;
            if step.shares_memory() {
                return direct::broadcast(step, buffer, root);
            }
            rooted::broadcast(step, buffer, root)
        })
    }

    /// Reduces the buffers of all ranks into the root's, by halves; the others' buffers are left with partial
    /// results.
    ///
    /// # Errors
    /// When a rank is lost or late, or the ranks' calls differ.
    pub fn reduce<T: Element>(&self, buffer: &mut [T], op: Op, root: usize) -> Result<()> {
        let call = Call::new(Operation::Reduce, T::KIND, buffer.len()).reducing(op).rooted(root as u32);
        self.collective(call, |step| {
            step.require_rank(root)?;
            rooted::reduce(step, buffer, op, root)
        })
    }

    /// Puts the `send` of all ranks, of one length, side by side into the root's `into`, which is empty elsewhere.
    ///
    /// # Errors
    /// When the lengths do not fit, a rank is lost or late, or the ranks' calls differ.
    pub fn gather<T: Element>(&self, send: &[T], into: &mut [T], root: usize) -> Result<()> {
        let call = Call::new(Operation::Gather, T::KIND, send.len()).rooted(root as u32);
        self.collective(call, |step| {
            step.require_rank(root)?;
            let expected = if step.rank() == root { send.len() * step.size() } else { 0 };
            step.require("into", into.len(), expected)?;
            rooted::gather(step, send, into, root)
        })
    }

    /// Sends each rank its part of the root's `send`, which is empty elsewhere; all parts are of one length.
    ///
    /// # Errors
    /// When the lengths do not fit, a rank is lost or late, or the ranks' calls differ.
    pub fn scatter<T: Element>(&self, send: &[T], into: &mut [T], root: usize) -> Result<()> {
        let call = Call::new(Operation::Scatter, T::KIND, into.len()).rooted(root as u32);
        self.collective(call, |step| {
            step.require_rank(root)?;
            let expected = if step.rank() == root { into.len() * step.size() } else { 0 };
            step.require("send", send.len(), expected)?;
            rooted::scatter(step, send, into, root)
        })
    }

    /// Waits until all ranks have come here.
    ///
    /// # Errors
    /// When a rank is lost or late, or the ranks' calls differ.
    pub fn barrier(&self) -> Result<()> {
        let call = Call::new(Operation::Barrier, crate::ElementKind::U8, 0);
        self.collective(call, |step| {
            if step.shares_memory() {
                return direct::meet::<u8, ()>(step, &[], &mut [], |_| ());
            }
            step.meet_by_messages()
        })
    }
}

impl Step<'_> {
    /// Whether to go by shared memory.
    fn shares_memory(&self) -> bool {
        self.size() > 1 && self.comm.meeting().is_some()
    }

    fn require(&self, what: &str, found: usize, expected: usize) -> Result<(), ClusterError> {
        if found == expected {
            return Ok(());
        }
        let message = format!("{}: `{what}` has {found} elements, expected {expected}", self.call);
        Err(ClusterError::Invalid(message))
    }

    fn require_rank(&self, rank: usize) -> Result<(), ClusterError> {
        if rank < self.size() {
            return Ok(());
        }
        let message = format!("{}: there is no rank {rank} in a group of {}", self.call, self.size());
        Err(ClusterError::Invalid(message))
    }
}

/// Where parts of those lengths lie side by side.
fn parts_of(counts: &[usize]) -> Vec<Range<usize>> {
    let ends = counts.iter().scan(0, |end, &count| {
        *end += count;
        Some(*end)
    });
    ends.zip(counts).map(|(end, &count)| end - count..end).collect()
}

/// Bytes of a piece of a long message: few enough that a piece is worked on in the cache while the next ones come.
pub(crate) const PIECE: usize = 1 << 19;
/// Pieces that are sent before the first one is awaited.
const AHEAD: usize = 2;

/// Piece `index` of a part of a buffer, as long as there are more. A part without elements is one piece.
fn piece<T>(part: &Range<usize>, index: usize) -> Option<Range<usize>> {
    let len = (PIECE / size_of::<T>()).max(1);
    let start = part.start + index * len;
    (index == 0 || start < part.end).then(|| start..part.end.min(start + len))
}

/// Sends one part of a buffer to a rank, and does `work` on another part with what comes from a rank.
fn pass<T: Element>(
    step: &Step<'_>,
    buffer: &mut [T],
    (to, leaving): (usize, Range<usize>),
    (from, coming): (usize, Range<usize>),
    mut work: impl FnMut(&mut [T], &[T]),
) -> Result<(), ClusterError> {
    for index in 0.. {
        let out = piece::<T>(&leaving, index);
        let awaited = index.checked_sub(AHEAD).and_then(|index| piece::<T>(&coming, index));
        if out.is_none() && awaited.is_none() && index >= AHEAD {
            break;
        }
        if let Some(out) = out {
            step.send(to, &buffer[out])?;
        }
        if let Some(awaited) = awaited {
            let into = &mut buffer[awaited];
            step.recv_with(from, into.len(), |values| work(into, values))?;
        }
    }
    Ok(())
}

/// Reduces this rank's chunk of everyone's `send` in rank order: each sends each its chunk.
fn reduce_chunk<T: Element>(step: &Step<'_>, send: &[T], into: &mut [T], op: Op) -> Result<(), ClusterError> {
    let (rank, ranks) = (step.rank(), step.size());
    let part = |rank: usize| chunk(send.len(), ranks, rank);
    let send_piece = |index: usize| {
        (1..ranks).map(|distance| (rank + distance) % ranks).try_for_each(|to| {
            piece::<T>(&part(to), index).map_or(Ok(()), |piece| step.send(to, &send[piece]))
        })
    };
    (0..AHEAD).try_for_each(send_piece)?;
    let mut sum: Vec<T::Wide> = Vec::new();
    // The first chunk is the longest.
    for index in (0..).take_while(|&index| piece::<T>(&part(0), index).is_some()) {
        send_piece(index + AHEAD)?;
        let Some(own) = piece::<T>(&part(rank), index) else { continue };
        sum.clear();
        let mut add = |values: &[T]| match sum.is_empty() {
            true => sum.extend(values.iter().map(|x| x.widen())),
            false => accumulate(&mut sum, values, op),
        };
        for from in 0..ranks {
            if from == rank {
                add(&send[own.clone()]);
            } else {
                step.recv_with(from, own.len(), &mut add)?;
            }
        }
        let start = own.start - part(rank).start;
        finish_wide(&sum, &mut into[start..start + own.len()], op, ranks);
    }
    Ok(())
}

/// Completes `buffer`, of which each rank has its part: every part goes once around the ring.
fn ring_all_gather<T: Element>(
    step: &Step<'_>,
    buffer: &mut [T],
    part: impl Fn(usize) -> Range<usize>,
) -> Result<(), ClusterError> {
    let (rank, ranks) = (step.rank(), step.size());
    let (left, right) = ((rank + ranks - 1) % ranks, (rank + 1) % ranks);
    for round in 1..ranks {
        let leaving = part((rank + ranks + 1 - round) % ranks);
        let coming = part((rank + ranks - round) % ranks);
        pass(step, buffer, (right, leaving), (left, coming), |into, values| into.copy_from_slice(values))?;
    }
    Ok(())
}

/// Completes `buffer`, of which each rank has its part, by messages from each to each.
fn all_gather_direct<T: Element>(
    step: &Step<'_>,
    buffer: &mut [T],
    part: impl Fn(usize) -> Range<usize>,
) -> Result<(), ClusterError> {
    let (rank, ranks) = (step.rank(), step.size());
    // The first part is the longest.
    let count = (0..).take_while(|&index| piece::<T>(&part(0), index).is_some()).count();
    for index in 0..count + AHEAD {
        if let Some(own) = piece::<T>(&part(rank), index) {
            for distance in 1..ranks {
                step.send((rank + distance) % ranks, &buffer[own.clone()])?;
            }
        }
        let Some(index) = index.checked_sub(AHEAD) else { continue };
        for from in (1..ranks).map(|distance| (rank + ranks - distance) % ranks) {
            if let Some(coming) = piece::<T>(&part(from), index) {
                step.recv(from, &mut buffer[coming])?;
            }
        }
    }
    Ok(())
}

/// Every rank sends every other its part.
fn exchange_all<T: Element>(
    step: &Step<'_>,
    send: &[T],
    send_counts: &[usize],
    into: &mut [T],
    receive_counts: &[usize],
) -> Result<(), ClusterError> {
    let (rank, ranks) = (step.rank(), step.size());
    let (sends, receives) = (parts_of(send_counts), parts_of(receive_counts));
    step.require("the part for itself", receives[rank].len(), sends[rank].len())?;
    into[receives[rank].clone()].copy_from_slice(&send[sends[rank].clone()]);
    for distance in 1..ranks {
        let to = (rank + distance) % ranks;
        step.send(to, &send[sends[to].clone()])?;
    }
    for distance in 1..ranks {
        let from = (rank + ranks - distance) % ranks;
        step.recv(from, &mut into[receives[from].clone()])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_everything_and_the_first_are_longer() {
        let chunks: Vec<_> = (0..4).map(|index| chunk(10, 4, index)).collect();
        assert_eq!(chunks, [0..3, 3..6, 6..8, 8..10]);
        assert_eq!(chunk(2, 5, 4), 2..2);
        assert_eq!(parts_of(&[2, 0, 3]), [0..2, 2..2, 2..5]);
    }

    #[test]
    fn pieces_cover_a_part_in_order() {
        let len = PIECE / 8;
        let part = 3..3 + 2 * len + 1;
        let pieces: Vec<_> = (0..).map_while(|index| piece::<f64>(&part, index)).collect();
        assert_eq!(pieces, [3..3 + len, 3 + len..3 + 2 * len, 3 + 2 * len..3 + 2 * len + 1]);
        assert_eq!([0, 1].map(|index| piece::<f64>(&(5..5), index)), [Some(5..5), None]);
    }
}
