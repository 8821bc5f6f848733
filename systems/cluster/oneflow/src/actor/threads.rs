//! Actors on threads: one a hardware queue, and messages between them.
//!
//! Every queue's thread owns the counters of its actors, so that nothing is locked: a `req` carries the value and raises the
//! reader's counter of filled registers, an `ack` raises the writer's counter of free ones. The network is at rest when no
//! message is under way and every thread waits; if actors are left then, they wait for each other.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_core::{Error, Result};

use super::{Clock, Network, Trace, Worked, deadlock};

/// What the actors of one queue do. `inputs` are the registers that the actor reads, in the order of the network's channels;
/// what is returned goes into those that it writes.
pub struct Queue<'a, V> {
    /// For people.
    pub name: String,
    /// Does one act: actor, piece, registers.
    #[allow(clippy::type_complexity, reason = "a name for a closure's type would say no more")]
    pub act: Box<dyn FnMut(usize, usize, &[V]) -> Result<Vec<V>> + Send + 'a>,
    /// Whether actors act strictly by piece and number, whatever is ready first: collectives must meet in one order.
    pub ordered: bool,
}

/// How a run went.
#[derive(Debug, Clone)]
pub struct Course {
    /// Who did what when.
    pub trace: Trace,
    /// The most registers of every channel that were in use at once.
    pub peak_registers: Vec<usize>,
}

thread_local! {
    /// How long the act of this thread first waited for another rank.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Notes that the act which is under way has waited for another rank since `begun`, and begins now.
pub(crate) fn begins_now(begun: Instant) {
    WAITED.set(begun.elapsed());
}

enum Message<V> {
    /// A register of a channel holds a piece for the reader at `slot`.
    Req { channel: usize, slot: usize, value: V },
    /// A reader is done with its oldest piece of a channel.
    Ack { channel: usize, slot: usize },
    /// There is nothing more to do, or something went wrong.
    Stop,
}

/// Runs `pieces` pieces through a network; `start` gives what the channels with filled registers begin with. The first queue
/// runs on the calling thread.
///
/// # Errors
/// When the network is malformed, an act fails (the error of the first), or actors wait for each other.
pub fn run<V: Clone + Send>(
    network: &Network,
    pieces: usize,
    queues: Vec<Queue<V>>,
    start: impl Fn(usize) -> V,
    rank: usize,
    traced: bool,
) -> Result<Course> {
    network.check()?;
    if let Some(actor) = network.actors.iter().find(|actor| actor.queue >= queues.len()) {
        return Err(Error::work(format!("{} is on queue {}, of {}", actor.name, actor.queue, queues.len())));
    }
    let shared = Shared {
        network,
        pieces,
        rank,
        begun: Instant::now(),
        pending: AtomicUsize::new(queues.len()),
        left: AtomicUsize::new(network.actors.len() * pieces),
        failure: Mutex::new(None),
        traced,
    };
    let names: Vec<String> = queues.iter().map(|queue| queue.name.clone()).collect();
    let (senders, receivers): (Vec<_>, Vec<_>) = queues.iter().map(|_| channel::<Message<V>>()).unzip();
    let mut lanes: Vec<Lane<V>> = queues
        .into_iter()
        .zip(receivers)
        .enumerate()
        .map(|(number, (queue, receiver))| {
            Lane::new(number, queue, receiver, senders.clone(), &shared, &start)
        })
        .collect();
    drop(senders);
    let ends: Vec<End> = std::thread::scope(|scope| {
        let others = lanes.split_off(1.min(lanes.len()));
        let handles: Vec<_> = others.into_iter().map(|lane| scope.spawn(|| lane.run())).collect();
        let mut ends: Vec<End> = lanes.into_iter().map(Lane::run).collect();
        ends.extend(handles.into_iter().map(|handle| handle.join().unwrap_or_default()));
        ends
    });
    if let Some(failure) = shared.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(failure);
    }
    if shared.left.load(Ordering::SeqCst) > 0 {
        return Err(deadlock(&ends.iter().flat_map(|end| end.blocked.clone()).collect::<Vec<_>>()));
    }
    let mut peak_registers = vec![0; network.channels.len()];
    for (channel, peak) in ends.iter().flat_map(|end| &end.peaks) {
        peak_registers[*channel] = *peak;
    }
    let acts = ends.into_iter().flat_map(|end| end.acts).collect();
    Ok(Course { trace: Trace { acts, queues: names, clock: Clock::Measured }, peak_registers })
}

struct Shared<'a> {
    network: &'a Network,
    pieces: usize,
    rank: usize,
    begun: Instant,
    /// Messages under way and threads at work.
    pending: AtomicUsize,
    /// Acts that are left.
    left: AtomicUsize,
    failure: Mutex<Option<Error>>,
    traced: bool,
}

/// What a thread leaves behind.
#[derive(Default)]
struct End {
    acts: Vec<Worked>,
    peaks: Vec<(usize, usize)>,
    blocked: Vec<String>,
}

/// A channel seen from an actor that reads it.
struct Inlet<V> {
    channel: usize,
    slot: usize,
    waiting: VecDeque<V>,
}

/// A channel seen from the actor that writes it.
struct Outlet {
    channel: usize,
    free: usize,
    peak: usize,
    /// Readers that are not done, of every filled register, oldest first.
    readers: VecDeque<usize>,
    freed: usize,
    done: Vec<usize>,
}

struct Player<V> {
    actor: usize,
    inlets: Vec<Inlet<V>>,
    outlets: Vec<Outlet>,
    done: usize,
    queued: bool,
}

impl<V> Player<V> {
    fn is_ready(&self, pieces: usize) -> bool {
        self.done < pieces
            && self.inlets.iter().all(|inlet| !inlet.waiting.is_empty())
            && self.outlets.iter().all(|outlet| outlet.free > 0)
    }
}

/// A queue on its thread.
struct Lane<'a, V> {
    number: usize,
    queue: Queue<'a, V>,
    receiver: Receiver<Message<V>>,
    senders: Vec<Sender<Message<V>>>,
    shared: &'a Shared<'a>,
    players: Vec<Player<V>>,
    /// Where an actor stands among the players.
    places: Vec<Option<usize>>,
    ready: BinaryHeap<Reverse<(usize, usize)>>,
    /// In a queue with an order: the time, in pieces, and the player whose turn it is.
    turn: (usize, usize),
    end: End,
}

impl<'a, V: Clone + Send> Lane<'a, V> {
    fn new(
        number: usize,
        queue: Queue<'a, V>,
        receiver: Receiver<Message<V>>,
        senders: Vec<Sender<Message<V>>>,
        shared: &'a Shared<'a>,
        start: impl Fn(usize) -> V,
    ) -> Self {
        let network = shared.network;
        let mut places = vec![None; network.actors.len()];
        let mut players = Vec::new();
        for (actor, _) in network.actors.iter().enumerate().filter(|(_, actor)| actor.queue == number) {
            places[actor] = Some(players.len());
            let channels = || network.channels.iter().enumerate();
            let inlets = channels().flat_map(|(number, channel)| {
                let slots = channel.to.iter().enumerate().filter(|(_, to)| **to == actor);
                slots.map(|(slot, _)| (number, slot, channel.filled)).collect::<Vec<_>>()
            });
            let inlets = inlets.map(|(channel, slot, filled)| Inlet {
                channel,
                slot,
                waiting: (0..filled).map(|_| start(channel)).collect(),
            });
            let outlets =
                channels().filter(|(_, channel)| channel.from == actor).map(|(number, channel)| Outlet {
                    channel: number,
                    free: channel.registers - channel.filled,
                    peak: channel.filled,
                    readers: vec![channel.to.len(); channel.filled].into(),
                    freed: 0,
                    done: vec![0; channel.to.len()],
                });
            let (inlets, outlets) = (inlets.collect(), outlets.collect());
            players.push(Player { actor, inlets, outlets, done: 0, queued: false });
        }
        let mut lane = Self {
            number,
            queue,
            receiver,
            senders,
            shared,
            players,
            places,
            ready: BinaryHeap::new(),
            turn: (0, 0),
            end: End::default(),
        };
        (0..lane.players.len()).for_each(|player| lane.consider(player));
        lane
    }

    /// Notes a player that can act now.
    fn consider(&mut self, player: usize) {
        let state = &mut self.players[player];
        if !state.queued && state.is_ready(self.shared.pieces) {
            state.queued = true;
            self.ready.push(Reverse((state.done, player)));
        }
    }

    /// The player that acts next.
    fn next(&mut self) -> Option<usize> {
        if !self.queue.ordered {
            let Reverse((_, player)) = self.ready.pop()?;
            self.players[player].queued = false;
            return Some(player);
        }
        // Turns in which an actor has no piece yet, or no more, are passed over.
        loop {
            let (time, player) = self.turn;
            let state = self.players.get(player)?;
            let piece = time.checked_sub(self.shared.network.actors[state.actor].lag);
            if piece.is_some_and(|piece| piece < self.shared.pieces) {
                if !state.is_ready(self.shared.pieces) {
                    return None;
                }
                self.pass_turn();
                return Some(player);
            }
            if self.players.iter().all(|state| state.done == self.shared.pieces) {
                return None;
            }
            self.pass_turn();
        }
    }

    fn pass_turn(&mut self) {
        let (time, player) = self.turn;
        self.turn = if player + 1 < self.players.len() { (time, player + 1) } else { (time + 1, 0) };
    }

    fn run(mut self) -> End {
        loop {
            while let Some(player) = self.next() {
                if let Err(error) = self.act(player) {
                    let mut failure = self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner);
                    failure.get_or_insert(error);
                    drop(failure);
                    self.stop_all();
                    return self.finish();
                }
                // What has come in meanwhile, without waiting.
                while let Ok(message) = self.receiver.try_recv() {
                    if !self.take(message) {
                        return self.finish();
                    }
                    self.shared.pending.fetch_sub(1, Ordering::SeqCst);
                }
            }
            // At rest: if everybody is, nothing will ever come.
            if self.shared.pending.fetch_sub(1, Ordering::SeqCst) == 1 {
                self.stop_all();
                return self.finish();
            }
            // A message counted while it was under way; now this thread does.
            let goes_on = self.receiver.recv().is_ok_and(|message| self.take(message));
            if !goes_on {
                return self.finish();
            }
        }
    }

    fn stop_all(&self) {
        // A thread that has gone needs no message.
        self.senders.iter().for_each(|sender| drop(sender.send(Message::Stop)));
    }

    /// Takes a message in; `false` when it says to stop.
    fn take(&mut self, message: Message<V>) -> bool {
        match message {
            Message::Req { channel, slot, value } => {
                let actor = self.shared.network.channels[channel].to[slot];
                let Some(player) = self.places[actor] else { return true };
                let inlets = &mut self.players[player].inlets;
                if let Some(inlet) =
                    inlets.iter_mut().find(|inlet| inlet.channel == channel && inlet.slot == slot)
                {
                    inlet.waiting.push_back(value);
                }
                self.consider(player);
            }
            Message::Ack { channel, slot } => {
                let Some(player) = self.places[self.shared.network.channels[channel].from] else {
                    return true;
                };
                if let Some(outlet) =
                    self.players[player].outlets.iter_mut().find(|outlet| outlet.channel == channel)
                {
                    outlet.acknowledge(slot);
                }
                self.consider(player);
            }
            Message::Stop => return false,
        }
        true
    }

    fn act(&mut self, player: usize) -> Result<()> {
        let state = &mut self.players[player];
        let (actor, piece) = (state.actor, state.done);
        let inputs: Vec<V> = state.inlets.iter_mut().filter_map(|inlet| inlet.waiting.pop_front()).collect();
        for outlet in &mut state.outlets {
            outlet.free -= 1;
            let registers = self.shared.network.channels[outlet.channel].registers;
            outlet.peak = outlet.peak.max(registers - outlet.free);
        }
        let begin = self.shared.begun.elapsed();
        WAITED.set(Duration::ZERO);
        let outputs = (self.queue.act)(actor, piece, &inputs)?;
        if self.shared.traced {
            self.end.acts.push(Worked {
                rank: self.shared.rank,
                queue: self.number,
                name: self.shared.network.actors[actor].name.clone(),
                piece,
                begin: (begin + WAITED.get()).as_secs_f64() * 1e6,
                end: self.shared.begun.elapsed().as_secs_f64() * 1e6,
            });
        }
        // The registers are read no more, so what they hold can go with the acknowledgement.
        drop(inputs);
        let state = &mut self.players[player];
        if outputs.len() != state.outlets.len() {
            let name = &self.shared.network.actors[actor].name;
            return Err(Error::work(format!(
                "{name} wrote {} registers of {}",
                outputs.len(),
                state.outlets.len()
            )));
        }
        state.done += 1;
        self.shared.left.fetch_sub(1, Ordering::SeqCst);
        let mut messages = Vec::new();
        for (outlet, value) in state.outlets.iter_mut().zip(outputs) {
            let readers = &self.shared.network.channels[outlet.channel].to;
            outlet.readers.push_back(readers.len());
            outlet.release();
            for (slot, &reader) in readers.iter().enumerate() {
                messages.push((reader, Message::Req { channel: outlet.channel, slot, value: value.clone() }));
            }
        }
        for inlet in &state.inlets {
            let writer = self.shared.network.channels[inlet.channel].from;
            messages.push((writer, Message::Ack { channel: inlet.channel, slot: inlet.slot }));
        }
        for (actor, message) in messages {
            let queue = self.shared.network.actors[actor].queue;
            if queue == self.number {
                self.take(message);
            } else {
                self.shared.pending.fetch_add(1, Ordering::SeqCst);
                // Who has gone was told to stop; so will this thread be.
                drop(self.senders[queue].send(message));
            }
        }
        self.consider(player);
        Ok(())
    }

    fn finish(mut self) -> End {
        let network = self.shared.network;
        for state in &self.players {
            self.end.peaks.extend(state.outlets.iter().map(|outlet| (outlet.channel, outlet.peak)));
            if state.done < self.shared.pieces {
                let empty = state.inlets.iter().filter(|inlet| inlet.waiting.is_empty());
                let full = state.outlets.iter().filter(|outlet| outlet.free == 0);
                let waits: Vec<String> = empty
                    .map(|inlet| {
                        format!("a piece of {}", network.actors[network.channels[inlet.channel].from].name)
                    })
                    .chain(full.map(|outlet| {
                        format!("one of {} registers of its own", network.channels[outlet.channel].registers)
                    }))
                    .collect();
                self.end.blocked.push(network.blocked(state.actor, state.done, self.shared.pieces, &waits));
            }
        }
        self.end
    }
}

impl Outlet {
    fn acknowledge(&mut self, slot: usize) {
        let at = self.done[slot] - self.freed;
        self.done[slot] += 1;
        self.readers[at] -= 1;
        self.release();
    }

    fn release(&mut self) {
        while self.readers.front() == Some(&0) {
            self.readers.pop_front();
            self.freed += 1;
            self.free += 1;
        }
    }
}
