//! How much went over the links.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use crate::call::Operation;

/// Bytes of payload and messages that one rank exchanged, by operation and peer.
///
/// Ranks that share memory ([`Algorithm::Direct`](crate::Algorithm::Direct)) send no messages; what they read of
/// each other counts as received, what they write for each other as sent, one message a pair and direction. Reductions
/// and all-gathers send what is longer than 512 KiB in pieces of that, each a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    entries: BTreeMap<(Operation, usize), Exchange>,
}

/// What went to and fro.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Bytes of payload sent.
    pub bytes_sent: u64,
    /// Bytes of payload received.
    pub bytes_received: u64,
    /// Messages sent.
    pub messages_sent: u64,
    /// Messages received.
    pub messages_received: u64,
}

impl Traffic {
    /// Everything together.
    pub fn total(&self) -> Exchange {
        self.sum(|_, _| true)
    }

    /// What one kind of operation caused.
    pub fn of(&self, operation: Operation) -> Exchange {
        self.sum(|entry, _| entry == operation)
    }

    /// What was exchanged with one peer.
    pub fn with(&self, peer: usize) -> Exchange {
        self.sum(|_, entry| entry == peer)
    }

    /// Operation, peer and exchange, in order.
    pub fn entries(&self) -> impl Iterator<Item = (Operation, usize, Exchange)> + '_ {
        self.entries.iter().map(|(&(operation, peer), &exchange)| (operation, peer, exchange))
    }

    pub(crate) fn sent(&mut self, operation: Operation, peer: usize, bytes: usize) {
        let entry = self.entries.entry((operation, peer)).or_default();
        entry.bytes_sent += bytes as u64;
        entry.messages_sent += 1;
    }

    pub(crate) fn received(&mut self, operation: Operation, peer: usize, bytes: usize) {
        let entry = self.entries.entry((operation, peer)).or_default();
        entry.bytes_received += bytes as u64;
        entry.messages_received += 1;
    }

    fn sum(&self, belongs: impl Fn(Operation, usize) -> bool) -> Exchange {
        let mut total = Exchange::default();
        for (_, _, exchange) in self.entries().filter(|&(operation, peer, _)| belongs(operation, peer)) {
            total += exchange;
        }
        total
    }
}

impl AddAssign for Exchange {
    fn add_assign(&mut self, other: Self) {
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.messages_sent += other.messages_sent;
        self.messages_received += other.messages_received;
    }
}
