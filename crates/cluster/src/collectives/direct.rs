//! The collectives over shared memory: ranks meet, each works on its part of everyone's buffers, and all leave.
#![allow(unsafe_code, reason = "shared memory between ranks")]

use crate::collectives::{chunk, parts_of};
use crate::communicator::Step;
use crate::element::{Element, Op, accumulate, finish_wide};
use crate::error::ClusterError;
use crate::threads::Present;

/// Elements that a sum is kept of at a time, so that it stays in the cache.
const BLOCK: usize = 2048;

/// Brings two buffers to the group's meeting and does this rank's part there.
pub(crate) fn meet<T: Element, R>(
    step: &Step<'_>,
    send: &[T],
    into: &mut [T],
    part: impl FnOnce(&Present<'_, T>) -> R,
) -> Result<R, ClusterError> {
    let Some(meeting) = step.comm.meeting() else {
        return Err(ClusterError::Invalid(format!("{}: ranks share no memory", step.call)));
    };
    step.meet_at(meeting, send, into, part)
}

/// Every rank reduces its chunk in rank order and writes it to everyone.
pub(crate) fn all_reduce<T: Element>(step: &Step<'_>, buffer: &mut [T], op: Op) -> Result<(), ClusterError> {
    let (rank, ranks, len) = (step.rank(), step.size(), buffer.len());
    let own = chunk(len, ranks, rank);
    meet(step, &[], buffer, |present: &Present<'_, T>| {
        let mut sum = Vec::with_capacity(BLOCK.min(own.len()));
        let mut reduced = vec![T::zeroed(); BLOCK.min(own.len())];
        for start in own.clone().step_by(BLOCK) {
            let block = start..own.end.min(start + BLOCK);
            sum.clear();
            for from in 0..ranks {
                // SAFETY: chunk `rank` of all buffers is read and written by this rank alone, and this borrow ends
                // before the one below begins.
                let part = unsafe { present.into(from, block.clone()) };
                match from {
                    0 => sum.extend(part.iter().map(|x| x.widen())),
                    _ => accumulate(&mut sum, part, op),
                }
            }
            let reduced = &mut reduced[..block.len()];
            finish_wide(&sum, reduced, op, ranks);
            for to in 0..ranks {
                // SAFETY: as above.
                unsafe { present.into(to, block.clone()) }.copy_from_slice(reduced);
            }
        }
    })?;
    for peer in (0..ranks).filter(|&peer| peer != rank) {
        // The chunk of each as it was, and as it has become.
        step.count_shared(peer, size_of::<T>() * chunk(len, ranks, peer).len(), size_of::<T>() * own.len());
        step.count_shared(peer, size_of::<T>() * own.len(), size_of::<T>() * chunk(len, ranks, peer).len());
    }
    Ok(())
}

/// Every rank reduces its chunk in rank order.
pub(crate) fn reduce_scatter<T: Element>(
    step: &Step<'_>,
    send: &[T],
    into: &mut [T],
    op: Op,
) -> Result<(), ClusterError> {
    let (rank, ranks, len) = (step.rank(), step.size(), send.len());
    let own = chunk(len, ranks, rank);
    meet(step, send, &mut [], |present: &Present<'_, T>| {
        let mut sum = Vec::with_capacity(BLOCK.min(own.len()));
        for start in own.clone().step_by(BLOCK) {
            let block = start..own.end.min(start + BLOCK);
            sum.clear();
            for from in 0..ranks {
                // SAFETY: nobody writes to what is sent.
                let part = unsafe { present.send(from, block.clone()) };
                match from {
                    0 => sum.extend(part.iter().map(|x| x.widen())),
                    _ => accumulate(&mut sum, part, op),
                }
            }
            finish_wide(&sum, &mut into[start - own.start..block.end - own.start], op, ranks);
        }
    })?;
    for peer in (0..ranks).filter(|&peer| peer != rank) {
        step.count_shared(peer, size_of::<T>() * chunk(len, ranks, peer).len(), size_of::<T>() * own.len());
    }
    Ok(())
}

/// Every rank copies everyone's part.
pub(crate) fn all_gather<T: Element>(
    step: &Step<'_>,
    send: &[T],
    counts: &[usize],
    into: &mut [T],
) -> Result<(), ClusterError> {
    meet(step, send, &mut [], |present: &Present<'_, T>| {
        for (from, part) in parts_of(counts).into_iter().enumerate() {
            if present.send_len(from) != counts[from] {
                return Err(step.wrong_length(from, present.send_len(from), counts[from]));
            }
            // SAFETY: nobody writes to what is sent.
            into[part].copy_from_slice(unsafe { present.send(from, 0..counts[from]) });
        }
        Ok(())
    })??;
    for peer in (0..step.size()).filter(|&peer| peer != step.rank()) {
        step.count_shared(peer, size_of_val(send), size_of::<T>() * counts[peer]);
    }
    Ok(())
}

/// Every rank copies the root's buffer.
pub(crate) fn broadcast<T: Element>(
    step: &Step<'_>,
    buffer: &mut [T],
    root: usize,
) -> Result<(), ClusterError> {
    let bytes = size_of_val(buffer);
    if step.rank() == root {
        meet(step, buffer, &mut [], |_: &Present<'_, T>| ())?;
        for peer in (0..step.size()).filter(|&peer| peer != root) {
            step.count_shared(peer, bytes, None);
        }
        return Ok(());
    }
    meet(step, &[], &mut [], |present: &Present<'_, T>| {
        // SAFETY: nobody writes to what is sent. All called with the same length.
        buffer.copy_from_slice(unsafe { present.send(root, 0..buffer.len()) });
    })?;
    step.count_shared(root, None, bytes);
    Ok(())
}
