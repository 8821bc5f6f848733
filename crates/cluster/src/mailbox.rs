//! Where a rank's messages wait until it asks for them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::ClusterError;
use crate::transport::{Channel, Message};

/// Messages for one rank, by the group, the sender and the channel.
#[derive(Default)]
pub(crate) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queues: HashMap<Address, Queue>,
    /// Ranks that will send nothing more.
    finished: BTreeSet<usize>,
    failure: Option<ClusterError>,
}

/// Which stream of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Address {
    pub group: u64,
    pub from: usize,
    pub channel: Channel,
}

/// Messages of one stream, numbered from zero; whoever wants one draws the next number.
#[derive(Default)]
struct Queue {
    /// Number of the first of `messages`.
    first: u64,
    messages: VecDeque<Option<Message>>,
    /// The number to be drawn next.
    next: u64,
    /// Numbers that nobody waits for any more.
    abandoned: BTreeSet<u64>,
}

/// The number of a message that is to come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    address: Address,
    number: u64,
}

/// Why a message did not come.
#[derive(Debug)]
pub(crate) enum Absent {
    Failed(ClusterError),
    /// The sender has ended its work.
    Finished,
    Late,
}

impl Mailbox {
    /// Puts a message at the end of its stream.
    pub fn deliver(&self, from: usize, message: Message) {
        let address = Address { group: message.header.group, from, channel: message.header.channel() };
        let mut state = self.lock();
        let queue = state.queues.entry(address).or_default();
        let number = queue.first + queue.messages.len() as u64;
        let wanted = !queue.abandoned.remove(&number);
        queue.messages.push_back(wanted.then_some(message));
        if !wanted {
            state.tidy(address);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Draws the number of the next message of a stream.
    pub fn expect(&self, address: Address) -> Ticket {
        let mut state = self.lock();
        let queue = state.queues.entry(address).or_default();
        let number = queue.next;
        queue.next += 1;
        Ticket { address, number }
    }

    /// Waits for a message. On an error the ticket is used up.
    pub fn take(&self, ticket: Ticket, deadline: Instant) -> Result<Message, Absent> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.remove(ticket) {
                return Ok(message);
            }
            let absent = match &state.failure {
                Some(failure) => Absent::Failed(failure.clone()),
                None if state.finished.contains(&ticket.address.from) => Absent::Finished,
                None => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => {
                        let waited = self.changed.wait_timeout(state, left);
                        state = waited.unwrap_or_else(PoisonError::into_inner).0;
                        continue;
                    }
                    _ => Absent::Late,
                },
            };
            state.abandon(ticket);
            return Err(absent);
        }
    }

    /// When the message is there: whether it is, and its arrival on an emulated link.
    pub fn arrived(&self, ticket: Ticket) -> Option<u64> {
        self.lock().find(ticket).and_then(|message| message.as_ref()).map(|message| message.header.due)
    }

    /// Gives up a ticket; the message is thrown away when it comes.
    pub fn abandon(&self, ticket: Ticket) {
        self.lock().abandon(ticket);
    }

    /// A rank will send nothing more.
    pub fn finish(&self, rank: usize) {
        self.lock().finished.insert(rank);
        self.changed.notify_all();
    }

    /// Whether a rank will send nothing more.
    pub fn finished(&self, rank: usize) -> bool {
        self.lock().finished.contains(&rank)
    }

    /// Everything fails from here on. The first reason stays; whether this is it.
    pub fn fail(&self, error: ClusterError) -> bool {
        let mut state = self.lock();
        let first = state.failure.is_none();
        state.failure.get_or_insert(error);
        drop(state);
        self.changed.notify_all();
        first
    }

    /// Waits until these ranks will send nothing more.
    pub fn wait_for_end(&self, of: &BTreeSet<usize>) -> Result<(), ClusterError> {
        let going_on = |state: &mut State| state.failure.is_none() && !state.finished.is_superset(of);
        let state = self.changed.wait_while(self.lock(), going_on).unwrap_or_else(PoisonError::into_inner);
        state.failure.clone().map_or(Ok(()), Err)
    }

    /// The failure, when there is one within this time.
    pub fn wait_for_failure(&self, time: Duration) -> Option<ClusterError> {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |state| state.failure.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.failure.clone()
    }

    /// Why nothing works any more.
    pub fn failure(&self) -> Option<ClusterError> {
        self.lock().failure.clone()
    }

    /// What lies unread from a rank, for error messages.
    pub fn unread(&self, from: usize) -> Option<String> {
        let state = self.lock();
        let of_rank = state.queues.iter().filter(|(address, _)| address.from == from);
        let mut unread = of_rank.filter_map(|(_, queue)| queue.messages.iter().flatten().next());
        unread.next().map(|message| message.header.call.to_string())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn find(&mut self, ticket: Ticket) -> Option<&mut Option<Message>> {
        let queue = self.queues.get_mut(&ticket.address)?;
        let index = ticket.number.checked_sub(queue.first)?;
        queue.messages.get_mut(index as usize)
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Message> {
        let message = self.find(ticket)?.take()?;
        self.tidy(ticket.address);
        Some(message)
    }

    fn abandon(&mut self, ticket: Ticket) {
        if self.remove(ticket).is_none()
            && let Some(queue) = self.queues.get_mut(&ticket.address)
        {
            queue.abandoned.insert(ticket.number);
        }
    }

    /// Drops what has been read at the front, and a stream in which nothing is expected or unread.
    fn tidy(&mut self, address: Address) {
        let Some(queue) = self.queues.get_mut(&address) else { return };
        while queue.messages.front().is_some_and(Option::is_none) {
            queue.messages.pop_front();
            queue.first += 1;
        }
        if queue.messages.is_empty() && queue.first == queue.next {
            self.queues.remove(&address);
        }
    }
}
