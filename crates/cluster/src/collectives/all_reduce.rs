//! All-reduce by its algorithms.

use crate::call::Algorithm;
use crate::collectives::{all_gather_direct, chunk, direct, pass, reduce_chunk, ring_all_gather, rooted};
use crate::communicator::{Step, lock};
use crate::element::{Element, Op, accumulate, combine, combine_before, finish, finish_wide};
use crate::error::ClusterError;

pub(crate) fn all_reduce<T: Element>(
    step: &Step<'_>,
    buffer: &mut [T],
    op: Op,
    algorithm: Algorithm,
) -> Result<(), ClusterError> {
    if step.size() == 1 {
        return Ok(()); // the average of one is itself
    }
    if algorithm == Algorithm::Auto && step.reduce_natively(buffer, op)? {
        return Ok(());
    }
    match resolve(step, algorithm, size_of_val(buffer)) {
        Algorithm::Ring => ring(step, buffer, op),
        Algorithm::Tree => tree(step, buffer, op),
        Algorithm::HalvingDoubling => halving_doubling(step, buffer, op),
        Algorithm::Direct => direct::all_reduce(step, buffer, op),
        Algorithm::Canonical => canonical(step, buffer, op),
        Algorithm::Auto | Algorithm::Star => star(step, buffer, op),
    }
}

/// What stands behind `Auto` and `Direct`. Whichever it is adds in rank order, so that the choice, which may come
/// from a measurement, does not show in the result.
fn resolve(step: &Step<'_>, algorithm: Algorithm, bytes: usize) -> Algorithm {
    let shared = step.comm.meeting().is_some();
    match algorithm {
        Algorithm::Auto | Algorithm::Direct if shared => Algorithm::Direct,
        Algorithm::Direct => Algorithm::Star,
        Algorithm::Auto => {
            let link = *lock(&step.comm.endpoint().link);
            let faster = cost(Algorithm::Canonical, step.size(), bytes, link)
                < cost(Algorithm::Star, step.size(), bytes, link);
            if faster { Algorithm::Canonical } else { Algorithm::Star }
        }
        other => other,
    }
}

/// Seconds that an all-reduce of so many bytes takes on links of that latency (s) and bandwidth (bytes/s); see
/// [`Algorithm`].
pub fn cost(algorithm: Algorithm, ranks: usize, bytes: usize, (latency, bandwidth): (f64, f64)) -> f64 {
    let n = ranks as f64;
    let whole = bytes as f64 / bandwidth;
    let rounds = n.log2().ceil();
    match algorithm {
        _ if ranks == 1 => 0.0,
        Algorithm::Ring | Algorithm::Canonical => 2.0 * (n - 1.0) * latency + 2.0 * (n - 1.0) / n * whole,
        Algorithm::Tree => 2.0 * rounds * (latency + whole),
        Algorithm::HalvingDoubling => 2.0 * rounds * latency + 2.0 * (n - 1.0) / n * whole,
        Algorithm::Star => 2.0 * latency + 2.0 * (n - 1.0) * whole,
        Algorithm::Direct => 2.0 * whole,
        Algorithm::Auto => cost(Algorithm::Star, ranks, bytes, (latency, bandwidth)).min(cost(
            Algorithm::Canonical,
            ranks,
            bytes,
            (latency, bandwidth),
        )),
    }
}

/// Each chunk goes around the ring once to be reduced, ending at the rank of its number, and once more to be known.
fn ring<T: Element>(step: &Step<'_>, buffer: &mut [T], op: Op) -> Result<(), ClusterError> {
    let (rank, ranks, len) = (step.rank(), step.size(), buffer.len());
    let (left, right) = ((rank + ranks - 1) % ranks, (rank + 1) % ranks);
    let part = |index: usize| chunk(len, ranks, index);
    for round in 1..ranks {
        let leaving = part((rank + ranks - round) % ranks);
        let coming = part((rank + 2 * ranks - round - 1) % ranks);
        pass(step, buffer, (right, leaving), (left, coming), |own, partial| {
            combine_before(own, partial, op)
        })?;
    }
    finish(&mut buffer[part(rank)], op, ranks);
    ring_all_gather(step, buffer, part)
}

/// Binomial reduction to rank 0, and back.
fn tree<T: Element>(step: &Step<'_>, buffer: &mut [T], op: Op) -> Result<(), ClusterError> {
    rooted::reduce(step, buffer, op, 0)?;
    rooted::broadcast(step, buffer, 0)
}

/// Rank 0 adds everyone's buffer in rank order and sends everyone the sum.
fn star<T: Element>(step: &Step<'_>, buffer: &mut [T], op: Op) -> Result<(), ClusterError> {
    if step.rank() > 0 {
        step.send(0, buffer)?;
        return step.recv(0, buffer);
    }
    let mut sum: Vec<T::Wide> = buffer.iter().map(|x| x.widen()).collect();
    for from in 1..step.size() {
        step.recv_with(from, buffer.len(), |part: &[T]| accumulate(&mut sum, part, op))?;
    }
    finish_wide(&sum, buffer, op, step.size());
    (1..step.size()).try_for_each(|to| step.send(to, buffer))
}

/// Every rank adds its chunk of everyone's buffer in rank order and sends everyone the sum.
fn canonical<T: Element>(step: &Step<'_>, buffer: &mut [T], op: Op) -> Result<(), ClusterError> {
    let (rank, ranks, len) = (step.rank(), step.size(), buffer.len());
    let part = chunk(len, ranks, rank);
    let mut own = buffer[part.clone()].to_vec();
    reduce_chunk(step, buffer, &mut own, op)?;
    buffer[part].copy_from_slice(&own);
    all_gather_direct(step, buffer, |rank| chunk(len, ranks, rank))
}

/// Rabenseifner's algorithm: partners at distance n/2, n/4, … exchange halves of what they still reduce, and then the
/// same way back.
fn halving_doubling<T: Element>(step: &Step<'_>, buffer: &mut [T], op: Op) -> Result<(), ClusterError> {
    let (rank, ranks, len) = (step.rank(), step.size(), buffer.len());
    if !ranks.is_power_of_two() {
        let what = format!("{}: needs a number of ranks that is a power of two, not {ranks}", step.call);
        return Err(ClusterError::Invalid(what));
    }
    // Chunks of ranks `first..first + count` side by side.
    let part =
        |first: usize, count: usize| chunk(len, ranks, first).start..chunk(len, ranks, first + count - 1).end;
    let mut distance = ranks / 2;
    while distance > 0 {
        let partner = rank ^ distance;
        // The half with this rank's chunk stays here, the partner's goes there.
        let mine = part(rank & !(distance - 1), distance);
        let theirs = part(partner & !(distance - 1), distance);
        // The lower rank's partial sum comes first on both sides.
        pass(step, buffer, (partner, theirs), (partner, mine), |kept, partial| match partner < rank {
            true => combine_before(kept, partial, op),
            false => combine(kept, partial, op),
        })?;
        distance /= 2;
    }
    finish(&mut buffer[chunk(len, ranks, rank)], op, ranks);
    distance = 1;
    while distance < ranks {
        let partner = rank ^ distance;
        let leaving = part(rank & !(distance - 1), distance);
        let coming = part(partner & !(distance - 1), distance);
        pass(step, buffer, (partner, leaving), (partner, coming), |into, values| {
            into.copy_from_slice(values);
        })?;
        distance *= 2;
    }
    Ok(())
}
