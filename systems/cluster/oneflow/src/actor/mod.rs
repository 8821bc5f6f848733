//! The actor runtime (§4): operations as actors that own the registers they write, with credits that flow back.
//!
//! A channel leads from one actor to those that read what it writes, through a fixed number of registers, so that memory is
//! known before anything runs. An actor acts when every channel that it reads has a filled register for it and every channel
//! that it writes has a free one. When it has acted, it tells the readers (`req`) and gives the registers that it read back
//! (`ack`); a register is free again when its last reader has done so. Back-pressure and pipelining follow from the counters.

mod clock;
mod threads;
mod trace;

use kiln_core::{Error, Result};
use serde::Serialize;

pub use clock::{Timetable, chain, simulate};
pub(crate) use threads::begins_now;
pub use threads::{Course, Queue, run};
pub use trace::{Clock, Trace, Worked};

/// One operation of the physical graph on one device.
#[derive(Debug, Clone, Serialize)]
pub struct Actor {
    /// For people.
    pub name: String,
    /// The hardware queue whose thread it shares.
    pub queue: usize,
    /// How long it acts, on the virtual clock.
    pub duration: f64,
    /// In a queue with an order, by how many pieces it lets others go ahead.
    pub lag: usize,
}

/// Registers between an actor and those that read what it writes.
#[derive(Debug, Clone, Serialize)]
pub struct Channel {
    /// Who writes.
    pub from: usize,
    /// Who reads; nobody for a register that is dropped at once.
    pub to: Vec<usize>,
    /// How many registers there are.
    pub registers: usize,
    /// How many of them hold a piece at the start: what a loop begins with.
    pub filled: usize,
}

/// Actors and the channels between them.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Network {
    /// The actors.
    pub actors: Vec<Actor>,
    /// The channels.
    pub channels: Vec<Channel>,
}

impl Network {
    /// Makes sure that channels join actors and have registers.
    ///
    /// # Errors
    /// Names the first channel that does not.
    pub fn check(&self) -> Result<()> {
        for (number, channel) in self.channels.iter().enumerate() {
            let known = |actor: &usize| *actor < self.actors.len();
            if !known(&channel.from) || !channel.to.iter().all(known) {
                return Err(Error::work(format!("channel {number} joins actors that are not there")));
            }
            if channel.registers == 0 || channel.filled > channel.registers {
                let name = &self.actors[channel.from].name;
                return Err(Error::usage(format!(
                    "the channel behind {name} has {} registers, {} of them filled",
                    channel.registers, channel.filled
                ))
                .hint(
                    "a channel needs one register at least; two let writer and readers work at the same time",
                ));
            }
        }
        Ok(())
    }

    /// The channels that an actor reads, once for every time that it does.
    fn reads(&self) -> Vec<Vec<usize>> {
        let mut reads = vec![Vec::new(); self.actors.len()];
        for (number, channel) in self.channels.iter().enumerate() {
            channel.to.iter().for_each(|&actor| reads[actor].push(number));
        }
        reads
    }

    /// The channels that an actor writes.
    fn writes(&self) -> Vec<Vec<usize>> {
        let mut writes = vec![Vec::new(); self.actors.len()];
        self.channels.iter().enumerate().for_each(|(number, channel)| writes[channel.from].push(number));
        writes
    }

    /// What an actor that cannot act waits for.
    fn blocked(&self, actor: usize, done: usize, pieces: usize, waits: &[String]) -> String {
        let Actor { name, .. } = &self.actors[actor];
        format!("{name} has done {done} of {pieces} pieces and waits for {}", waits.join(", "))
    }
}

/// The error of a network in which nobody can act any more.
fn deadlock(blocked: &[String]) -> Error {
    Error::work(format!("the actors wait for each other:\n  {}", blocked.join("\n  ")))
        .hint("a loop of channels needs a filled register to begin with, and paths that join again as many registers as they are long")
}
