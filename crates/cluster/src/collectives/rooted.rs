//! Operations with a root.

use crate::communicator::Step;
use crate::element::{Element, Op, combine, finish};
use crate::error::ClusterError;

/// Binomial tree: those who have the buffer, at distance 2^k, give it to the next as many.
pub(crate) fn broadcast<T: Element>(
    step: &Step<'_>,
    buffer: &mut [T],
    root: usize,
) -> Result<(), ClusterError> {
    let ranks = step.size();
    let place = (step.rank() + ranks - root) % ranks; // the root's is 0
    let rank_of = |place: usize| (place + root) % ranks;
    // The lowest set bit of a place says who gives it the buffer; below it lie those to give it to.
    let mut bit = if place == 0 { ranks.next_power_of_two() } else { 1 << place.trailing_zeros() };
    if place > 0 {
        step.recv(rank_of(place - bit), buffer)?;
    }
    while bit > 1 {
        bit /= 2;
        if place + bit < ranks {
            step.send(rank_of(place + bit), buffer)?;
        }
    }
    Ok(())
}

/// The same tree from its leaves.
pub(crate) fn reduce<T: Element>(
    step: &Step<'_>,
    buffer: &mut [T],
    op: Op,
    root: usize,
) -> Result<(), ClusterError> {
    let ranks = step.size();
    let place = (step.rank() + ranks - root) % ranks;
    let rank_of = |place: usize| (place + root) % ranks;
    let mut bit = 1;
    while bit < ranks {
        if place & bit > 0 {
            return step.send(rank_of(place - bit), buffer);
        }
        if place + bit < ranks {
            step.recv_with(rank_of(place + bit), buffer.len(), |part| combine(buffer, part, op))?;
        }
        bit *= 2;
    }
    finish(buffer, op, ranks);
    Ok(())
}

pub(crate) fn gather<T: Element>(
    step: &Step<'_>,
    send: &[T],
    into: &mut [T],
    root: usize,
) -> Result<(), ClusterError> {
    if step.rank() != root {
        return step.send(root, send);
    }
    let len = send.len();
    for from in 0..step.size() {
        let part = &mut into[from * len..(from + 1) * len];
        if from == root {
            part.copy_from_slice(send);
        } else {
            step.recv(from, part)?;
        }
    }
    Ok(())
}

pub(crate) fn scatter<T: Element>(
    step: &Step<'_>,
    send: &[T],
    into: &mut [T],
    root: usize,
) -> Result<(), ClusterError> {
    if step.rank() != root {
        return step.recv(root, into);
    }
    let len = into.len();
    for to in 0..step.size() {
        let part = &send[to * len..(to + 1) * len];
        if to == root {
            into.copy_from_slice(part);
        } else {
            step.send(to, part)?;
        }
    }
    Ok(())
}
