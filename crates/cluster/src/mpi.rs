//! Ranks as processes of MPI.
//!
//! Messages go from `MPI_Send` to a thread of the receiver that matches whatever comes and brings it to the mailbox,
//! so that tags, groups and failures work as on the other back ends. An all-reduce by `Auto` is MPI's own.
#![allow(unsafe_code, reason = "handles of MPI are used by several threads")]

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kiln_core::{Error, Result};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::point_to_point::Status;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{
    Communicator as _, CommunicatorCollectives as _, Destination as _, Equivalence, Group as _, Source as _,
};

use crate::ElementKind;
use crate::communicator::lock;
use crate::element::Op;
use crate::error::ClusterError;
use crate::mailbox::Mailbox;
use crate::transport::{Header, Message, Payload, Transport};
use crate::wire::{Frame, HEADER};

/// The tag of all of Kiln's messages.
const TAG: i32 = 0x4b4c;

/// MPI counts in 32 bits.
const LARGEST: usize = i32::MAX as usize - HEADER;

/// One rank's link to the other processes of `mpirun`.
pub(crate) struct MpiTransport {
    shared: Arc<Shared>,
    receiver: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    world: Handle,
    rank: usize,
    size: usize,
    mailbox: Mailbox,
    /// MPI's communicator of each group that has reduced something.
    groups: Mutex<HashMap<u64, Arc<Handle>>>,
    closing: AtomicBool,
}

/// A communicator of MPI, for any thread.
struct Handle(SimpleCommunicator);

// SAFETY: `join` insists on `MPI_THREAD_MULTIPLE`, under which any thread may use a communicator at any time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Joins the other processes; MPI ends when the universe is dropped, which must be the last thing that is.
pub(crate) fn join() -> Result<(Universe, MpiTransport)> {
    let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Multiple) else {
        return Err(Error::work("MPI cannot be started twice in one process"));
    };
    if threading != Threading::Multiple {
        return Err(Error::work(format!("this MPI grants {threading:?} threads only"))
            .hint("Kiln needs one that was built with MPI_THREAD_MULTIPLE"));
    }
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    let shared = Arc::new(Shared {
        world: Handle(world),
        rank,
        size,
        mailbox: Mailbox::default(),
        groups: Mutex::default(),
        closing: AtomicBool::new(false),
    });
    let listening = shared.clone();
    let receiver = thread::spawn(move || listening.receive());
    Ok((universe, MpiTransport { shared, receiver: Mutex::new(Some(receiver)) }))
}

impl MpiTransport {
    /// Ranks that share this machine's cores.
    pub fn local(&self) -> usize {
        self.shared.world.0.split_shared(self.shared.rank as i32).size() as usize
    }

    /// This rank has ended its work: says so and waits until all have.
    pub fn finish(&self) -> Result<(), ClusterError> {
        let Shared { world, rank, size, mailbox, .. } = &*self.shared;
        let others: BTreeSet<usize> = (0..*size).filter(|other| other != rank).collect();
        for &other in &others {
            world.0.process_at_rank(other as i32).send_with_tag(&Frame::Goodbye.encode()[..], TAG);
        }
        mailbox.wait_for_end(&others)
    }
}

impl Drop for MpiTransport {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        if let Some(receiver) = lock(&self.receiver).take() {
            _ = receiver.join();
        }
        lock(&self.shared.groups).clear();
    }
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.shared.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn send(&self, to: usize, header: Header, payload: Payload<'_>) -> Result<(), ClusterError> {
        let bytes = payload.bytes();
        if bytes.len() > LARGEST {
            let what = format!("{}: {} bytes are more than a message of MPI has", header.call, bytes.len());
            return Err(ClusterError::Invalid(what));
        }
        // The header comes last, so that the receiver only has to cut it off.
        let message = [bytes, &Frame::Message(header).encode()[..]].concat();
        self.shared.world.0.process_at_rank(to as i32).send_with_tag(&message[..], TAG);
        Ok(())
    }

    fn mailbox(&self) -> &Mailbox {
        &self.shared.mailbox
    }

    /// Ends all processes: MPI has no other way.
    fn fail(&self, error: ClusterError) {
        if self.shared.mailbox.fail(error.clone()) {
            eprintln!("error: rank {}: the ranks cannot go on: {error}", self.shared.rank);
            self.shared.world.0.abort(1);
        }
    }

    fn reduces(&self, element: ElementKind, op: Op) -> bool {
        let half = matches!(element, ElementKind::F16 | ElementKind::Bf16);
        let float = matches!(element, ElementKind::F32 | ElementKind::F64);
        // MPI does not say what becomes of a NaN in a maximum, and has no average.
        match op {
            Op::Sum | Op::Prod => !half,
            Op::Max | Op::Min => !half && !float,
            Op::Avg => false,
        }
    }

    fn all_reduce(&self, group: u64, members: &[usize], element: ElementKind, op: Op, bytes: &mut [u8]) {
        let comm = self.shared.of_group(group, members);
        let reduce = match element {
            ElementKind::F32 => reduce::<f32>,
            ElementKind::F64 => reduce::<f64>,
            ElementKind::I32 => reduce::<i32>,
            ElementKind::I64 => reduce::<i64>,
            ElementKind::U8 => reduce::<u8>,
            ElementKind::U32 => reduce::<u32>,
            ElementKind::U64 => reduce::<u64>,
            ElementKind::F16 | ElementKind::Bf16 => unreachable!("`reduces` says no"),
        };
        reduce(&comm.0, op, bytes);
    }

    fn assumed_link(&self) -> (f64, f64) {
        (50e-6, 2e9)
    }
}

/// `MPI_Allreduce` in parts that MPI can count.
fn reduce<T: bytemuck::Pod + Equivalence>(comm: &SimpleCommunicator, op: Op, bytes: &mut [u8]) {
    let operation = || match op {
        Op::Max => SystemOperation::max(),
        Op::Min => SystemOperation::min(),
        Op::Prod => SystemOperation::product(),
        Op::Sum | Op::Avg => SystemOperation::sum(),
    };
    let values: &mut [T] = bytemuck::cast_slice_mut(bytes);
    for part in values.chunks_mut(1 << 28) {
        let own = part.to_vec();
        comm.all_reduce_into(&own[..], part, operation());
    }
}

impl Shared {
    /// Brings what others send to the mailbox until the work has ended.
    fn receive(&self) {
        let mut idle = 0u32;
        while !self.closing.load(Ordering::Relaxed) {
            match self.world.0.any_process().immediate_matched_probe_with_tag(TAG) {
                Some((message, status)) => {
                    idle = 0;
                    let mut bytes = vec![0u8; length(&status)];
                    message.matched_receive_into(&mut bytes[..]);
                    self.deliver(status.source_rank() as usize, bytes);
                }
                // A rank that waits needs its core, and so do its neighbours.
                None if idle < 200 => {
                    idle += 1;
                    thread::yield_now();
                }
                None => thread::sleep(Duration::from_micros(20)),
            }
        }
    }

    fn deliver(&self, from: usize, mut bytes: Vec<u8>) {
        let rest = bytes.len().saturating_sub(HEADER);
        let frame = match bytes[rest..].first_chunk() {
            Some(header) => Frame::decode(header),
            None => Err(format!("a message of {} bytes", bytes.len())),
        };
        match frame {
            Ok(Frame::Goodbye) => self.mailbox.finish(from),
            Ok(Frame::Message(header)) if header.length == rest as u64 => {
                bytes.truncate(rest);
                self.mailbox.deliver(from, Message { header, payload: Box::new(bytes) });
            }
            Ok(Frame::Message(header)) => {
                self.garbage(from, &format!("{} bytes announced, {rest} sent", header.length));
            }
            Err(why) => self.garbage(from, &why),
        }
    }

    fn garbage(&self, from: usize, why: &str) {
        eprintln!("error: rank {}: rank {from} sent garbage: {why}", self.rank);
        self.world.0.abort(1);
    }

    /// MPI's communicator of a group, all of whose members call this.
    fn of_group(&self, group: u64, members: &[usize]) -> Arc<Handle> {
        if let Some(known) = lock(&self.groups).get(&group) {
            return known.clone();
        }
        let ranks: Vec<i32> = members.iter().map(|&rank| rank as i32).collect();
        let of_members = self.world.0.group().include(&ranks);
        let made = self.world.0.split_by_subgroup_with_tag(&of_members, (group % 32_768) as i32);
        let made = Arc::new(Handle(made.expect("this rank is a member")));
        lock(&self.groups).entry(group).or_insert(made).clone()
    }
}

fn length(status: &Status) -> usize {
    status.count(u8::equivalent_datatype()) as usize
}
