//! Ranks as threads of one process: messages are vectors handed over, and ranks can meet to read each other's memory.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::call::Call;
use crate::communicator::lock;
use crate::error::ClusterError;
use crate::mailbox::Mailbox;
use crate::transport::{Header, Message, Payload, Transport};

/// What the ranks of one process have in common.
pub(crate) struct ThreadWorld {
    mailboxes: Vec<Mailbox>,
    meetings: Arc<Meetings>,
    /// What each rank called last.
    calls: Vec<Mutex<Option<Call>>>,
}

impl ThreadWorld {
    pub fn new(ranks: usize) -> Arc<Self> {
        Arc::new(Self {
            mailboxes: (0..ranks).map(|_| Mailbox::default()).collect(),
            meetings: Arc::default(),
            calls: (0..ranks).map(|_| Mutex::default()).collect(),
        })
    }

    /// A rank has ended its work and will take part in nothing more.
    pub fn finish(&self, rank: usize) {
        for mailbox in &self.mailboxes {
            mailbox.finish(rank);
        }
        self.meetings.wake();
    }

    pub fn fail(&self, error: &ClusterError) {
        for mailbox in &self.mailboxes {
            mailbox.fail(error.clone());
        }
        self.meetings.wake();
    }

    /// Why the work of all ranks has ended.
    pub fn failure(&self) -> Option<ClusterError> {
        self.mailboxes[0].failure()
    }
}

/// One rank's link to the other threads.
pub(crate) struct ThreadTransport {
    pub world: Arc<ThreadWorld>,
    pub rank: usize,
}

impl Transport for ThreadTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.world.mailboxes.len()
    }

    fn send(&self, to: usize, header: Header, payload: Payload<'_>) -> Result<(), ClusterError> {
        self.world.mailboxes[to].deliver(self.rank, Message { header, payload: payload.into_owned() });
        Ok(())
    }

    fn mailbox(&self) -> &Mailbox {
        &self.world.mailboxes[self.rank]
    }

    fn announce(&self, call: Option<Call>) {
        *lock(&self.world.calls[self.rank]) = call;
    }

    fn calls(&self) -> Vec<(usize, String)> {
        let calls = self.world.calls.iter().enumerate();
        let told = calls.map(|(rank, call)| {
            (rank, lock(call).map_or("its own work".to_string(), |call| call.to_string()))
        });
        told.filter(|(rank, _)| *rank != self.rank).collect()
    }

    fn fail(&self, error: ClusterError) {
        self.world.fail(&error);
    }

    fn meetings(&self) -> Option<&Arc<Meetings>> {
        Some(&self.world.meetings)
    }

    fn assumed_link(&self) -> (f64, f64) {
        (5e-6, 4e9)
    }
}

/// The meeting of every group.
#[derive(Default)]
pub(crate) struct Meetings {
    of_groups: Mutex<HashMap<u64, Arc<Meeting>>>,
}

impl Meetings {
    pub fn of(&self, group: u64, size: usize) -> Arc<Meeting> {
        let mut meetings = lock(&self.of_groups);
        if let Some(meeting) = meetings.get(&group) {
            return meeting.clone();
        }
        meetings.retain(|_, meeting| Arc::strong_count(meeting) > 1); // groups that are no longer in use
        meetings.entry(group).or_insert(Arc::new(Meeting::new(size))).clone()
    }

    /// Lets every waiting rank look again whether it still has something to wait for.
    fn wake(&self) {
        for meeting in lock(&self.of_groups).values() {
            drop(lock(&meeting.state));
            meeting.changed.notify_all();
        }
    }
}

/// Where the ranks of one group come together: each brings its buffers, all work on all of them, and nobody leaves
/// before the last has finished.
pub(crate) struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    seats: Vec<Option<Seat>>,
    /// How many have finished their part since all had come; none while some are still to come.
    finished: usize,
    /// Meetings held so far.
    held: u64,
}

/// What a rank has brought.
#[derive(Clone, Copy)]
struct Seat {
    call: Call,
    sequence: u64,
    send: *const u8,
    send_len: usize,
    into: *mut u8,
    into_len: usize,
}

#[allow(unsafe_code, reason = "shared memory between ranks")]
// SAFETY: a seat's pointers are used by other threads only through `Present`, whose contract keeps accesses apart,
// and only while their owner is inside `Meeting::meet`, where it keeps the buffers borrowed.
unsafe impl Send for Seat {}

/// Why a meeting did not take place.
pub(crate) enum Missed {
    Failed(ClusterError),
    /// This rank has not come in time, and neither have perhaps others.
    Late(Option<usize>),
    /// A rank has ended its work.
    Finished(usize),
    /// What each rank called, where not all called the same.
    Mismatch(Vec<(usize, Call, u64)>),
}

impl Meeting {
    fn new(size: usize) -> Self {
        let state = State { seats: vec![None; size], finished: 0, held: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Brings `send` and `into`, waits for all others, and does this rank's part of the work.
    ///
    /// `lost` says whether waiting has become useless. `part` must not wait for other ranks.
    #[allow(clippy::too_many_arguments, reason = "a call with its two buffers")]
    pub fn meet<T: bytemuck::Pod, R>(
        &self,
        rank: usize,
        (call, sequence): (Call, u64),
        send: &[T],
        into: &mut [T],
        deadline: Instant,
        lost: impl Fn(&dyn Fn(usize) -> bool) -> Option<Missed>,
        part: impl FnOnce(&Present<T>) -> R,
    ) -> Result<R, Missed> {
        let seat = Seat {
            call,
            sequence,
            send: send.as_ptr().cast(),
            send_len: send.len(),
            into: into.as_mut_ptr().cast(),
            into_len: into.len(),
        };
        let mut state = lock(&self.state);
        let held = state.held;
        state.seats[rank] = Some(seat);
        if state.seats.iter().all(Option::is_some) {
            self.changed.notify_all();
        }
        // Until all have come a rank may still leave, and take its buffers with it.
        while !state.seats.iter().all(Option::is_some) {
            let absent = |rank: usize| state.seats[rank].is_none();
            let missed = lost(&absent).or_else(|| {
                (deadline <= Instant::now())
                    .then(|| Missed::Late(state.seats.iter().position(Option::is_none)))
            });
            if let Some(missed) = missed {
                state.seats[rank] = None;
                return Err(missed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let seats: Vec<Seat> = state.seats.iter().flatten().copied().collect();
        drop(state);

        let agreed = seats.iter().all(|seat| (seat.call, seat.sequence) == (call, sequence));
        let result = if agreed {
            let present = Present { seats: &seats, element: PhantomData };
            // Caught, since nobody may leave early, not even by unwinding.
            Ok(panic::catch_unwind(AssertUnwindSafe(|| part(&present))))
        } else {
            let calls = seats.iter().enumerate().map(|(rank, seat)| (rank, seat.call, seat.sequence));
            Err(Missed::Mismatch(calls.collect()))
        };

        // Now nobody may leave before all have finished, for they use our buffers. They do not wait for anything
        // in between, so that this needs no deadline.
        let mut state = lock(&self.state);
        state.finished += 1;
        if state.finished == seats.len() {
            state.seats.fill(None);
            state.finished = 0;
            state.held += 1;
            drop(state);
            self.changed.notify_all();
        } else {
            while state.held == held {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        result.map(|done| done.unwrap_or_else(|panicked| panic::resume_unwind(panicked)))
    }
}

/// The buffers of all ranks in a meeting, all of the same call and therefore of the same element type.
pub(crate) struct Present<'a, T> {
    seats: &'a [Seat],
    element: PhantomData<T>,
}

impl<T> Present<'_, T> {
    /// Length of what a rank sends.
    pub fn send_len(&self, rank: usize) -> usize {
        self.seats[rank].send_len
    }

    /// Length of what a rank receives into.
    pub fn into_len(&self, rank: usize) -> usize {
        self.seats[rank].into_len
    }

    /// A part of what a rank sends.
    ///
    /// # Safety
    /// No rank writes to this part during this meeting.
    #[allow(unsafe_code, reason = "shared memory between ranks")]
    pub unsafe fn send(&self, rank: usize, part: Range<usize>) -> &[T] {
        let seat = &self.seats[rank];
        assert!(part.start <= part.end && part.end <= seat.send_len);
        // SAFETY: the part lies in a slice of `T` that its owner keeps borrowed until the meeting is over, and which
        // nobody writes to by this function's contract.
        unsafe { std::slice::from_raw_parts(seat.send.cast::<T>().add(part.start), part.len()) }
    }

    /// A part of what a rank receives into.
    ///
    /// # Safety
    /// No other rank reads or writes this part during this meeting, and no other borrow of it is in use.
    #[allow(unsafe_code, clippy::mut_from_ref, reason = "shared memory between ranks")]
    pub unsafe fn into(&self, rank: usize, part: Range<usize>) -> &mut [T] {
        let seat = &self.seats[rank];
        assert!(part.start <= part.end && part.end <= seat.into_len);
        // SAFETY: as above, and the part is this rank's alone by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(seat.into.cast::<T>().add(part.start), part.len()) }
    }
}
