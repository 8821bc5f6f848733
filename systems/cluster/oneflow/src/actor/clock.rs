//! Actors on a virtual clock: who begins when, for given durations.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use kiln_core::{Error, Result};
use serde::Serialize;

use super::{Actor, Channel, Network, deadlock};

/// When everything happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Timetable {
    /// When the last actor was done.
    pub makespan: f64,
    /// When every actor began every piece.
    pub starts: Vec<Vec<f64>>,
    /// The most registers of every channel that were in use at once.
    pub peak_registers: Vec<usize>,
}

/// A line of actors, each on a queue of its own, with registers between neighbours.
///
/// # Errors
/// When there is not one channel between every two neighbours, or a duration is not a time.
pub fn chain(durations: &[f64], registers: &[usize]) -> Result<Network> {
    if durations.is_empty() || registers.len() + 1 != durations.len() {
        let found = format!("{} durations with {} channels between them", durations.len(), registers.len());
        return Err(
            Error::usage(found).hint("--durations 2,1,3 needs --registers of two numbers, such as 2,2")
        );
    }
    if let Some(duration) = durations.iter().find(|duration| !(duration.is_finite() && **duration >= 0.0)) {
        return Err(Error::usage(format!("{duration} is no duration")));
    }
    let actors = durations.iter().enumerate();
    let network = Network {
        actors: actors
            .map(|(at, &duration)| Actor { name: format!("actor {at}"), queue: at, duration, lag: 0 })
            .collect(),
        channels: registers
            .iter()
            .enumerate()
            .map(|(at, &registers)| Channel { from: at, to: vec![at + 1], registers, filled: 0 })
            .collect(),
    };
    network.check()?;
    Ok(network)
}

/// The counters of a channel.
#[derive(Debug, Clone, Default)]
struct Counters {
    /// Filled registers that each reader has not begun with.
    available: Vec<usize>,
    /// Registers that nobody holds.
    free: usize,
    /// Readers that are not done, of every filled register, oldest first, and how many pieces were freed before.
    readers: VecDeque<usize>,
    freed: usize,
    /// How many pieces each reader is done with.
    done: Vec<usize>,
}

/// A time on the clock, which is never NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Time(f64);

impl Eq for Time {}

impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Time {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Runs `pieces` pieces through a network. Of the actors of a queue that can act, that with the oldest piece does.
///
/// # Errors
/// When the network is malformed, or its actors wait for each other.
pub fn simulate(network: &Network, pieces: usize) -> Result<Timetable> {
    network.check()?;
    let (reads, writes) = (network.reads(), network.writes());
    let mut channels: Vec<Counters> = network
        .channels
        .iter()
        .map(|channel| Counters {
            available: vec![channel.filled; channel.to.len()],
            free: channel.registers - channel.filled,
            readers: vec![channel.to.len(); channel.filled].into(),
            freed: 0,
            done: vec![0; channel.to.len()],
        })
        .collect();
    let mut peak: Vec<usize> = network.channels.iter().map(|channel| channel.filled).collect();
    let mut starts: Vec<Vec<f64>> = vec![Vec::with_capacity(pieces); network.actors.len()];
    let mut finished = vec![0; network.actors.len()];
    let queues = network.actors.iter().map(|actor| actor.queue + 1).max().unwrap_or(0);
    let mut busy = vec![false; queues];
    let mut events: BinaryHeap<Reverse<(Time, usize)>> = BinaryHeap::new();
    let mut now = 0.0;
    // Where each reader stands in each channel that it reads, the same actor twice where it reads twice.
    let slots: Vec<Vec<(usize, usize)>> = reads
        .iter()
        .enumerate()
        .map(|(actor, read)| {
            let mut seen = vec![0; network.channels.len()];
            read.iter()
                .map(|&channel| {
                    let places =
                        network.channels[channel].to.iter().enumerate().filter(|(_, to)| **to == actor);
                    let slot = places.map(|(slot, _)| slot).nth(seen[channel]).unwrap_or(0);
                    seen[channel] += 1;
                    (channel, slot)
                })
                .collect()
        })
        .collect();
    loop {
        let ready = |actor: usize, channels: &[Counters], busy: &[bool], starts: &[Vec<f64>]| {
            starts[actor].len() < pieces
                && starts[actor].len() == finished[actor]
                && !busy[network.actors[actor].queue]
                && slots[actor].iter().all(|&(channel, slot)| channels[channel].available[slot] > 0)
                && writes[actor].iter().all(|&channel| channels[channel].free > 0)
        };
        while let Some(actor) = (0..network.actors.len())
            .filter(|&actor| ready(actor, &channels, &busy, &starts))
            .min_by_key(|&actor| starts[actor].len())
        {
            for &(channel, slot) in &slots[actor] {
                channels[channel].available[slot] -= 1;
            }
            for &channel in &writes[actor] {
                channels[channel].free -= 1;
                peak[channel] =
                    peak[channel].max(network.channels[channel].registers - channels[channel].free);
            }
            starts[actor].push(now);
            busy[network.actors[actor].queue] = true;
            events.push(Reverse((Time(now + network.actors[actor].duration), actor)));
        }
        let Some(Reverse((time, actor))) = events.pop() else { break };
        now = time.0;
        let mut ended = vec![actor];
        while let Some(Reverse((other, actor))) = events.peek().copied() {
            if other != time {
                break;
            }
            events.pop();
            ended.push(actor);
        }
        for actor in ended {
            finished[actor] += 1;
            busy[network.actors[actor].queue] = false;
            for &channel in &writes[actor] {
                let counters = &mut channels[channel];
                counters.available.iter_mut().for_each(|available| *available += 1);
                counters.readers.push_back(counters.available.len());
                release(counters);
            }
            for &(channel, slot) in &slots[actor] {
                let counters = &mut channels[channel];
                let at = counters.done[slot] - counters.freed;
                counters.done[slot] += 1;
                counters.readers[at] -= 1;
                release(counters);
            }
        }
    }
    if finished.iter().all(|&done| done == pieces) {
        return Ok(Timetable { makespan: now, starts, peak_registers: peak });
    }
    let blocked = (0..network.actors.len()).filter(|&actor| finished[actor] < pieces).map(|actor| {
        let empty = slots[actor].iter().filter(|&&(channel, slot)| channels[channel].available[slot] == 0);
        let full = writes[actor].iter().filter(|&&channel| channels[channel].free == 0);
        let waits: Vec<String> = empty
            .map(|&(channel, _)| {
                format!("a piece of {}", network.actors[network.channels[channel].from].name)
            })
            .chain(full.map(|&channel| {
                format!("one of {} registers of its own", network.channels[channel].registers)
            }))
            .collect();
        network.blocked(actor, finished[actor], pieces, &waits)
    });
    Err(deadlock(&blocked.collect::<Vec<_>>()))
}

/// Registers whose readers are all done are free.
fn release(counters: &mut Counters) {
    while counters.readers.front() == Some(&0) {
        counters.readers.pop_front();
        counters.freed += 1;
        counters.free += 1;
    }
}
