//! What links and collectives take, measured by the ranks themselves.

use std::time::Instant;

use kiln_core::{Error, Result};
use serde::Serialize;

use crate::ElementKind;
use crate::call::{Algorithm, Call, Operation};
use crate::communicator::{Communicator, Step, lock};
use crate::element::Op;
use crate::error::ClusterError;

/// How fast a message is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Link {
    /// Seconds until the first byte is there.
    pub latency: f64,
    /// Bytes per second from there on.
    pub bandwidth: f64,
}

/// Bytes of a message whose time is all latency, and of one whose time is nearly all transfer.
const SMALL: usize = 8;
const LARGE: usize = 1 << 20;

impl Communicator {
    /// Measures the link between the first two ranks, for [`Algorithm::Auto`] to choose by from now on.
    ///
    /// # Errors
    /// When a rank is lost or late.
    pub fn probe(&self) -> Result<Link> {
        let link =
            if self.size() > 1 { self.probe_pair(0, 1)? } else { Link { latency: 0.0, bandwidth: 1e12 } };
        *lock(&self.endpoint().link) = (link.latency, link.bandwidth);
        Ok(link)
    }

    /// Measures the link between two ranks while the others wait: half the time of a round trip of 8 bytes, and the
    /// bandwidth from what 1 MiB takes more.
    ///
    /// # Errors
    /// When there are no such ranks, or one is lost or late.
    pub fn probe_pair(&self, a: usize, b: usize) -> Result<Link> {
        let call = Call::new(Operation::Probe, ElementKind::U8, 0);
        let mut measured = self.collective(call, |step| {
            if a == b || a.max(b) >= step.size() {
                let what = format!("probe: no two ranks {a} and {b} in a group of {}", step.size());
                return Err(ClusterError::Invalid(what));
            }
            Ok([one_way(step, a, b, SMALL, 50)?, one_way(step, a, b, LARGE, 9)?])
        })?;
        self.broadcast(&mut measured, a)?;
        let [latency, whole] = measured;
        let transfer = (whole - latency).max(1e-9);
        Ok(Link { latency, bandwidth: (LARGE - SMALL) as f64 / transfer })
    }
}

/// The median time of a message from `a` to `b` or back, as `a` sees it.
fn one_way(step: &Step<'_>, a: usize, b: usize, bytes: usize, rounds: usize) -> Result<f64, ClusterError> {
    let mut buffer = vec![0u8; bytes];
    let mut times = Vec::with_capacity(rounds);
    // The first round opens the connection.
    for round in 0..=rounds {
        let started = Instant::now();
        if step.rank() == a {
            step.send(b, &buffer)?;
            step.recv(b, &mut buffer)?;
        } else if step.rank() == b {
            step.recv(a, &mut buffer)?;
            step.send(a, &buffer)?;
        }
        if round > 0 {
            times.push(started.elapsed().as_secs_f64() / 2.0);
        }
    }
    Ok(median(times))
}

/// What a collective takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Timing {
    /// The collective.
    pub operation: String,
    /// How an all-reduce was done; `auto` for the others.
    pub algorithm: String,
    /// Ranks that took part.
    pub ranks: usize,
    /// Bytes of the whole buffer.
    pub bytes: usize,
    /// Median time in seconds, of the slowest rank each time.
    pub seconds: f64,
    /// `bytes / seconds`
    pub algorithm_bandwidth: f64,
    /// Bytes per second over each rank's link of the best algorithm there is: for an all-reduce
    /// `2(n−1)/n · bytes / seconds`.
    pub bus_bandwidth: f64,
}

/// The collectives that [`time`] measures.
pub const MEASURED: [Operation; 5] = [
    Operation::AllReduce,
    Operation::ReduceScatter,
    Operation::AllGather,
    Operation::AllToAll,
    Operation::Broadcast,
];

/// Seconds spent on one measurement, about.
const BUDGET: f64 = 0.3;

/// Measures a collective on f32 buffers of so many bytes in all. All ranks call it.
///
/// # Errors
/// When the operation is none of [`MEASURED`], or a rank is lost or late.
pub fn time(comm: &Communicator, operation: Operation, algorithm: Algorithm, bytes: usize) -> Result<Timing> {
    let ranks = comm.size();
    let len = match operation {
        Operation::AllReduce | Operation::Broadcast => bytes / size_of::<f32>(),
        // A whole number of equal parts.
        _ => bytes / size_of::<f32>() / ranks * ranks,
    };
    let mut whole = vec![0f32; len];
    let mut part = vec![0f32; len / ranks];
    let mut turned = vec![0f32; len];
    let mut once = || -> Result<f64> {
        comm.barrier()?;
        let started = Instant::now();
        match operation {
            Operation::AllReduce => comm.all_reduce_by(&mut whole, Op::Sum, algorithm)?,
            Operation::ReduceScatter => comm.reduce_scatter(&whole, &mut part, Op::Sum)?,
            Operation::AllGather => comm.all_gather(&part, &mut whole)?,
            Operation::AllToAll => comm.all_to_all(&whole, &mut turned)?,
            Operation::Broadcast => comm.broadcast(&mut whole, 0)?,
            other => return Err(Error::usage(format!("{other} is not measured"))),
        }
        Ok(started.elapsed().as_secs_f64())
    };
    once()?; // connections, page faults
    let mut repeats = [((BUDGET / once()?) as u64).clamp(5, 2000)];
    comm.broadcast(&mut repeats, 0)?;
    let mut times = (0..repeats[0]).map(|_| once()).collect::<Result<Vec<f64>>>()?;
    comm.all_reduce(&mut times, Op::Max)?;
    let seconds = median(times);
    let n = ranks as f64;
    let factor = match operation {
        Operation::AllReduce => 2.0 * (n - 1.0) / n,
        Operation::Broadcast => 1.0,
        _ => (n - 1.0) / n,
    };
    let bytes = len * size_of::<f32>();
    let algorithm_bandwidth = bytes as f64 / seconds;
    Ok(Timing {
        operation: operation.to_string(),
        algorithm: if operation == Operation::AllReduce { algorithm } else { Algorithm::Auto }.to_string(),
        ranks,
        bytes,
        seconds,
        algorithm_bandwidth,
        bus_bandwidth: factor * algorithm_bandwidth,
    })
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}
