//! One rank's view of one group.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_core::Result;

use crate::call::{Call, Operation};
use crate::element::Element;
use crate::emulate::{self, EmulatedLink, Emulator};
use crate::error::ClusterError;
use crate::mailbox::{Absent, Address, Ticket};
use crate::threads::{Meeting, Missed, Present};
use crate::traffic::Traffic;
use crate::transport::{Channel, Header, Message, Payload, Transport};

/// One rank's view of one group of ranks: what it needs to talk to the others.
///
/// Collective operations are called by all ranks of the group, in the same order and with the same lengths; when
/// they are not, every rank gets an error that lists what was called. The first error ends the work of all ranks:
/// from then on every call fails on every rank.
pub struct Communicator {
    endpoint: Arc<Endpoint>,
    /// The same on all members of this group, and on no other group.
    group: u64,
    /// Ranks in the world, by rank in the group.
    members: Arc<[usize]>,
    rank: usize,
    /// Collective calls so far.
    sequence: Arc<AtomicU64>,
    traffic: Arc<Mutex<Traffic>>,
    meeting: Option<Arc<Meeting>>,
}

/// What all groups of a rank have in common.
pub(crate) struct Endpoint {
    pub transport: Arc<dyn Transport>,
    pub timeout: Duration,
    pub emulator: Option<Emulator>,
    /// Latency in seconds and bandwidth in bytes per second, by which `Algorithm::Auto` chooses.
    pub link: Mutex<(f64, f64)>,
    /// Of all groups together; peers are ranks in the world.
    pub traffic: Mutex<Traffic>,
}

impl Endpoint {
    pub fn new(transport: Arc<dyn Transport>, timeout: Duration, emulate: Option<&EmulatedLink>) -> Self {
        let emulator = emulate.map(|link| Emulator::new(link.clone(), transport.rank()));
        let (latency, bandwidth) = transport.assumed_link();
        let link = match emulate {
            None => (latency, bandwidth),
            Some(link) => (
                latency + link.latency.as_secs_f64(),
                link.bandwidth.map_or(bandwidth, |slow| slow.min(bandwidth)),
            ),
        };
        Self { transport, timeout, emulator, link: Mutex::new(link), traffic: Mutex::default() }
    }
}

/// The group of all ranks.
const WORLD: u64 = 0;

impl Communicator {
    pub(crate) fn world(endpoint: Endpoint) -> Self {
        let members = (0..endpoint.transport.size()).collect();
        let rank = endpoint.transport.rank();
        Self::new(Arc::new(endpoint), WORLD, members, rank)
    }

    fn new(endpoint: Arc<Endpoint>, group: u64, members: Arc<[usize]>, rank: usize) -> Self {
        let meeting = endpoint.transport.meetings().map(|meetings| meetings.of(group, members.len()));
        Self { endpoint, group, members, rank, sequence: Arc::default(), traffic: Arc::default(), meeting }
    }

    /// This rank in the group, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// The group's ranks as they are numbered in the world.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// What went over the links in this group's operations; peers are ranks of the group. Groups made of this one
    /// count for themselves.
    pub fn traffic(&self) -> Traffic {
        lock(&self.traffic).clone()
    }

    /// What this rank exchanged in all its groups; peers are ranks in the world.
    pub fn rank_traffic(&self) -> Traffic {
        lock(&self.endpoint.traffic).clone()
    }

    /// Ends the work of all ranks: each of their calls fails with this reason from now on.
    pub fn abort(&self, reason: &str) {
        let rank = self.members[self.rank];
        self.endpoint.transport.fail(ClusterError::Aborted { rank, reason: reason.into() });
    }

    /// Fails when the work of all ranks has ended; for ranks that compute for long without talking to others.
    ///
    /// # Errors
    /// The reason for which it ended.
    pub fn check(&self) -> Result<()> {
        match self.endpoint.transport.mailbox().failure() {
            Some(failure) => Err(failure.seen("its own work", Duration::ZERO).into()),
            None => Ok(()),
        }
    }

    // ---- point to point ----

    /// Sends to a rank; returns when `data` may be used again. Messages of one pair and tag keep their order.
    ///
    /// # Errors
    /// When the rank is gone.
    pub fn send<T: Element>(&self, to: usize, tag: u32, data: &[T]) -> Result<()> {
        let step = self.exchange::<T>(tag, data.len());
        step.end(step.send(to, data))
    }

    /// Receives from a rank as many elements as `into` has.
    ///
    /// # Errors
    /// When the rank is gone, does not answer in time, or has sent something else.
    pub fn recv<T: Element>(&self, from: usize, tag: u32, into: &mut [T]) -> Result<()> {
        let step = self.exchange::<T>(tag, into.len());
        step.end(step.recv(from, into))
    }

    /// Sends to a rank without waiting for it.
    ///
    /// # Errors
    /// When the rank is gone.
    pub fn isend<T: Element>(&self, to: usize, tag: u32, data: Vec<T>) -> Result<Sending> {
        let step = self.exchange::<T>(tag, data.len());
        step.end(step.send_owned(to, data))?;
        Ok(Sending { _done: () })
    }

    /// Asks for `len` elements from a rank, to be waited for later. Of several requests with one tag, the first
    /// made gets the first message.
    ///
    /// # Errors
    /// When there is no such rank.
    pub fn irecv<T: Element>(&self, from: usize, tag: u32, len: usize) -> Result<Receiving<T>> {
        let step = self.exchange::<T>(tag, len);
        let ticket = step.end(step.expect(from))?;
        Ok(Receiving {
            comm: self.again(),
            from,
            tag,
            len,
            ticket: Some(ticket),
            element: std::marker::PhantomData,
        })
    }

    /// Sends to one rank and receives from another at the same time.
    ///
    /// # Errors
    /// As [`send`](Self::send) and [`recv`](Self::recv).
    pub fn send_recv<T: Element>(&self, to: usize, send: &[T], from: usize, into: &mut [T]) -> Result<()> {
        self.send(to, SEND_RECV, send)?;
        self.recv(from, SEND_RECV, into)
    }

    /// The same view, for a request that outlives the call.
    fn again(&self) -> Self {
        Self {
            endpoint: self.endpoint.clone(),
            group: self.group,
            members: self.members.clone(),
            rank: self.rank,
            sequence: self.sequence.clone(),
            traffic: self.traffic.clone(),
            meeting: self.meeting.clone(),
        }
    }

    fn exchange<T: Element>(&self, tag: u32, len: usize) -> Step<'_> {
        let call = Call::new(Operation::Send, T::KIND, len).rooted(tag);
        Step { comm: self, call, sequence: 0, started: Instant::now() }
    }

    // ---- collective calls ----

    /// Begins a collective call and does its work.
    pub(crate) fn collective<R>(
        &self,
        call: Call,
        work: impl FnOnce(&Step<'_>) -> Result<R, ClusterError>,
    ) -> Result<R> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let step = Step { comm: self, call, sequence, started: Instant::now() };
        step.end(work(&step))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn meeting(&self) -> Option<&Meeting> {
        // On emulated links everything must be sent.
        self.meeting.as_deref().filter(|_| self.endpoint.emulator.is_none())
    }

    /// The group of those members, of which this rank is one. `salt` tells apart groups made by one call.
    pub(crate) fn subgroup(&self, members: Arc<[usize]>, rank: usize, salt: u64) -> Self {
        let made_by = self.sequence.load(Ordering::Relaxed);
        let group = [self.group, made_by, salt].into_iter().fold(0x9e37_79b9_7f4a_7c15, mix);
        Self::new(self.endpoint.clone(), group, members, rank)
    }

    pub(crate) fn count(&self, record: impl Fn(&mut Traffic, &dyn Fn(usize) -> usize)) {
        record(&mut lock(&self.traffic), &|peer| peer);
        record(&mut lock(&self.endpoint.traffic), &|peer| self.members[peer]);
    }
}

/// A call for an error message, with its number in the group where the numbers differ.
fn told(call: &Call, sequence: u64, numbered: bool) -> String {
    if numbered { format!("{call} as call {} of the group", sequence + 1) } else { call.to_string() }
}

/// The tag of [`Communicator::send_recv`].
const SEND_RECV: u32 = u32::MAX;

/// One round of SplitMix64's finaliser: numbers that depend on all bits of both.
fn mix(hash: u64, value: u64) -> u64 {
    let mut z = (hash ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A message on its way; see [`Communicator::isend`].
#[must_use = "waiting shows whether it was sent"]
#[derive(Debug)]
pub struct Sending {
    _done: (),
}

impl Sending {
    /// Waits until the message has left.
    ///
    /// # Errors
    /// When it could not be sent.
    pub fn wait(self) -> Result<()> {
        Ok(())
    }
}

/// A message that is expected; see [`Communicator::irecv`].
#[must_use = "a message that nobody waits for is thrown away"]
pub struct Receiving<T: Element> {
    comm: Communicator,
    from: usize,
    tag: u32,
    len: usize,
    ticket: Option<Ticket>,
    element: std::marker::PhantomData<T>,
}

impl<T: Element> Receiving<T> {
    /// Whether the message is there, so that [`wait`](Self::wait) returns at once.
    pub fn test(&self) -> bool {
        let transport = &self.comm.endpoint.transport;
        transport.progress();
        self.ticket
            .and_then(|ticket| transport.mailbox().arrived(ticket))
            .is_some_and(|due| due <= emulate::now())
    }

    /// Waits for the message.
    ///
    /// # Errors
    /// When the sender is gone, does not answer in time, or has sent something else.
    pub fn wait(mut self) -> Result<Vec<T>> {
        let step = self.comm.exchange::<T>(self.tag, self.len);
        let Some(ticket) = self.ticket.take() else { return Ok(Vec::new()) };
        step.end(step.take(self.from, ticket).and_then(|message| {
            step.check_length(self.from, &message, self.len * size_of::<T>())?;
            Ok(match message.payload.into_any().downcast::<Vec<T>>() {
                Ok(vector) => *vector,
                Err(other) => match other.downcast::<Vec<u8>>() {
                    Ok(bytes) => bytemuck::pod_collect_to_vec(&bytes),
                    Err(_) => return Err(ClusterError::Invalid("a message of another type".into())),
                },
            })
        }))
    }
}

impl<T: Element> Drop for Receiving<T> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.comm.endpoint.transport.mailbox().abandon(ticket);
        }
    }
}

/// One call of an operation: the messages it sends and receives.
pub(crate) struct Step<'a> {
    pub comm: &'a Communicator,
    pub call: Call,
    sequence: u64,
    started: Instant,
}

impl Step<'_> {
    pub fn rank(&self) -> usize {
        self.comm.rank
    }

    pub fn size(&self) -> usize {
        self.comm.members.len()
    }

    pub fn send<T: Element>(&self, to: usize, data: &[T]) -> Result<(), ClusterError> {
        self.post(to, Payload::Borrowed(bytemuck::cast_slice(data)))
    }

    pub fn send_owned<T: Element>(&self, to: usize, data: Vec<T>) -> Result<(), ClusterError> {
        self.post(to, Payload::Owned(Box::new(data)))
    }

    fn post(&self, to: usize, payload: Payload<'_>) -> Result<(), ClusterError> {
        let endpoint = &self.comm.endpoint;
        let transport = &endpoint.transport;
        if let Some(failure) = transport.mailbox().failure() {
            return Err(failure);
        }
        let world_rank = self.world_rank(to)?;
        transport.announce(Some(self.call));
        let bytes = payload.bytes().len();
        let header = Header {
            group: self.comm.group,
            sequence: self.sequence,
            call: self.call,
            length: bytes as u64,
            due: endpoint.emulator.as_ref().map_or(0, |emulator| emulator.depart(bytes)),
        };
        if world_rank == transport.rank() {
            transport.mailbox().deliver(world_rank, Message { header, payload: payload.into_owned() });
        } else {
            transport.send(world_rank, header, payload)?;
        }
        let operation = self.call.operation;
        self.comm.count(|traffic, name| traffic.sent(operation, name(to), bytes));
        Ok(())
    }

    /// Receives as many elements as `into` has.
    pub fn recv<T: Element>(&self, from: usize, into: &mut [T]) -> Result<(), ClusterError> {
        let message = self.next(from)?;
        self.check_length(from, &message, size_of_val(into))?;
        bytemuck::cast_slice_mut(into).copy_from_slice(message.payload.bytes());
        Ok(())
    }

    /// Receives `len` elements and hands them to `read`.
    pub fn recv_with<T: Element>(
        &self,
        from: usize,
        len: usize,
        read: impl FnOnce(&[T]),
    ) -> Result<(), ClusterError> {
        let message = self.next(from)?;
        self.check_length(from, &message, len * size_of::<T>())?;
        match bytemuck::try_cast_slice(message.payload.bytes()) {
            Ok(values) => read(values),
            Err(_) => read(&bytemuck::pod_collect_to_vec(message.payload.bytes())), // not aligned for T
        }
        Ok(())
    }

    fn next(&self, from: usize) -> Result<Message, ClusterError> {
        self.take(from, self.expect(from)?)
    }

    fn expect(&self, from: usize) -> Result<Ticket, ClusterError> {
        let channel = match (self.call.operation, self.call.root) {
            (Operation::Send, Some(tag)) => Channel::Tag(tag),
            _ => Channel::Collective,
        };
        let address = Address { group: self.comm.group, from: self.world_rank(from)?, channel };
        Ok(self.comm.endpoint.transport.mailbox().expect(address))
    }

    fn take(&self, from: usize, ticket: Ticket) -> Result<Message, ClusterError> {
        let endpoint = &self.comm.endpoint;
        let transport = &endpoint.transport;
        let sender = self.world_rank(from)?;
        transport.announce(Some(self.call));
        let waiting = Instant::now();
        let message = transport.mailbox().take(ticket, waiting + endpoint.timeout);
        let message = message.map_err(|absent| match absent {
            Absent::Failed(failure) => failure,
            Absent::Finished => self.finished(sender),
            Absent::Late => self.late(Some(sender), waiting.elapsed()),
        })?;
        let theirs = message.header;
        if (theirs.sequence, theirs.call) != (self.sequence, self.call) {
            // The length of a point-to-point message is told apart below.
            let of_length = Call { count: self.call.count, ..theirs.call } == self.call;
            if self.call.operation != Operation::Send || !of_length {
                return Err(self.mismatch(sender, &theirs));
            }
        }
        let bytes = message.payload.bytes().len();
        if let Some(emulator) = &endpoint.emulator {
            emulator.arrive(theirs.due, bytes);
        }
        let operation = self.call.operation;
        self.comm.count(|traffic, name| traffic.received(operation, name(from), bytes));
        Ok(message)
    }

    fn check_length(&self, from: usize, message: &Message, expected: usize) -> Result<(), ClusterError> {
        let found = message.payload.bytes().len();
        if found == expected { Ok(()) } else { Err(self.wrong_length(from, found, expected)) }
    }

    /// A rank has sent another length than this one expected, in bytes or elements.
    pub fn wrong_length(&self, from: usize, found: usize, expected: usize) -> ClusterError {
        let members = &self.comm.members;
        let sent = format!("{} sends {found}", self.call);
        let wanted = format!("{} expects {expected}", self.call);
        ClusterError::Mismatch { calls: vec![(members[from], sent), (members[self.comm.rank], wanted)] }
    }

    fn finished(&self, rank: usize) -> ClusterError {
        ClusterError::PeerLost {
            rank,
            during: self.call.to_string(),
            after: self.started.elapsed(),
            cause: "it has ended its work".into(),
        }
    }

    pub fn late(&self, rank: Option<usize>, after: Duration) -> ClusterError {
        let transport = &self.comm.endpoint.transport;
        let mut calls = transport.calls();
        if let Some(rank) = rank
            && let Some(unread) = transport.mailbox().unread(rank)
        {
            calls.push((rank, format!("unread {unread}")));
        }
        ClusterError::Timeout { rank, during: self.call.to_string(), after, calls }
    }

    fn mismatch(&self, sender: usize, theirs: &Header) -> ClusterError {
        let own = self.comm.members[self.comm.rank];
        let numbered = theirs.sequence != self.sequence;
        let mut calls = vec![
            (own, told(&self.call, self.sequence, numbered)),
            (sender, told(&theirs.call, theirs.sequence, numbered)),
        ];
        calls.extend(
            self.comm
                .endpoint
                .transport
                .calls()
                .into_iter()
                .filter(|(rank, _)| ![own, sender].contains(rank)),
        );
        calls.sort();
        ClusterError::Mismatch { calls }
    }

    fn world_rank(&self, rank: usize) -> Result<usize, ClusterError> {
        self.comm.members.get(rank).copied().ok_or_else(|| {
            ClusterError::Invalid(format!(
                "{}: there is no rank {rank} in a group of {}",
                self.call,
                self.size()
            ))
        })
    }

    /// Brings two buffers to the group's meeting in shared memory and does this rank's part there.
    pub fn meet_at<T: Element, R>(
        &self,
        meeting: &Meeting,
        send: &[T],
        into: &mut [T],
        part: impl FnOnce(&Present<'_, T>) -> R,
    ) -> Result<R, ClusterError> {
        let endpoint = &self.comm.endpoint;
        let mailbox = endpoint.transport.mailbox();
        endpoint.transport.announce(Some(self.call));
        let members = &self.comm.members;
        let lost = |absent: &dyn Fn(usize) -> bool| {
            let finished = || (0..self.size()).find(|&rank| absent(rank) && mailbox.finished(members[rank]));
            mailbox.failure().map(Missed::Failed).or_else(|| finished().map(Missed::Finished))
        };
        let deadline = Instant::now() + endpoint.timeout;
        let called = (self.call, self.sequence);
        meeting.meet(self.rank(), called, send, into, deadline, lost, part).map_err(|missed| match missed {
            Missed::Failed(failure) => failure,
            Missed::Late(rank) => self.late(rank.map(|rank| members[rank]), self.started.elapsed()),
            Missed::Finished(rank) => self.finished(members[rank]),
            Missed::Mismatch(calls) => {
                let numbered = calls.iter().any(|(_, _, sequence)| *sequence != self.sequence);
                let calls = calls
                    .iter()
                    .map(|(rank, call, sequence)| (members[*rank], told(call, *sequence, numbered)));
                ClusterError::Mismatch { calls: calls.collect() }
            }
        })
    }

    /// Counts what went through shared memory to and from a peer.
    pub fn count_shared(
        &self,
        peer: usize,
        sent: impl Into<Option<usize>>,
        received: impl Into<Option<usize>>,
    ) {
        let (sent, received) = (sent.into(), received.into());
        self.comm.count(|traffic, name| {
            if let Some(bytes) = sent {
                traffic.sent(self.call.operation, name(peer), bytes);
            }
            if let Some(bytes) = received {
                traffic.received(self.call.operation, name(peer), bytes);
            }
        });
    }

    /// The end of a call: an error becomes everyone's.
    fn end<R>(&self, result: Result<R, ClusterError>) -> Result<R> {
        result.map_err(|error| {
            let error = error.seen(&self.call.to_string(), self.started.elapsed());
            self.comm.endpoint.transport.fail(error.clone());
            error.into()
        })
    }
}
