//! Ranks as processes joined by TCP.
//!
//! Every rank listens. A pair of ranks is connected when one of them first has something to say to the other; the
//! connection serves both directions. A thread for each connection brings what arrives into the mailbox, so that a
//! sender never waits for its receiver to ask. Joining, signs of life and bad news go through the [`keeper`].

mod greeting;
pub(crate) mod keeper;
mod wire;

use std::collections::BTreeSet;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::greeting::{End, greet, hear, say};
use self::keeper::{BEAT, ToKeeper, ToRank, reachable};
use self::wire::{Frame, HEADER};
use crate::call::Call;
use crate::communicator::lock;
use crate::error::ClusterError;
use crate::mailbox::Mailbox;
use crate::transport::{Header, Message, Payload, Transport};

/// Which rank of which world a process is.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub rank: usize,
    pub ranks: usize,
    /// Where the keeper listens.
    pub rendezvous: SocketAddr,
    /// The run that the rank belongs to, where it knows.
    pub run: Option<String>,
    pub token: String,
    pub timeout: Duration,
}

/// One rank's link to the other processes.
pub(crate) struct TcpTransport {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    place: Place,
    run: String,
    /// Where the ranks listen.
    addresses: Vec<SocketAddr>,
    mailbox: Mailbox,
    /// The connection on which to send to each rank, once there is one.
    outgoing: Vec<Mutex<Option<TcpStream>>>,
    /// Every connection, to be closed in the end.
    connections: Mutex<Vec<TcpStream>>,
    keeper: Mutex<TcpStream>,
    call: Mutex<Option<Call>>,
    /// What the others called last, as the keeper tells it.
    calls: Mutex<Vec<(usize, String)>>,
    closing: AtomicBool,
}

/// The first words on a data connection.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    run: String,
    from: usize,
    to: usize,
}

impl TcpTransport {
    /// Joins the others.
    pub fn join(place: Place) -> Result<Self, ClusterError> {
        let rendezvous = place.rendezvous;
        let failed = |doing: &str, e: &dyn std::fmt::Display| {
            ClusterError::Rendezvous(format!("rank {} cannot {doing}: {e}", place.rank))
        };
        let deadline = Instant::now() + place.timeout;
        let mut keeper = connect_until(rendezvous, deadline)
            .map_err(|e| failed(&format!("reach the rendezvous at {rendezvous}"), &e))?;
        greet(&mut keeper, End::Caller, &place.token)
            .map_err(|e| failed(&format!("join at {rendezvous}"), &e))?;

        // Others reach this rank at the address from which it reached the keeper.
        let own = keeper.local_addr().map_err(|e| failed("listen", &e))?.ip();
        let any = match own {
            own if own.is_loopback() => own,
            own if own.is_ipv4() => Ipv4Addr::UNSPECIFIED.into(),
            _ => Ipv6Addr::UNSPECIFIED.into(),
        };
        let listener = TcpListener::bind((any, 0)).map_err(|e| failed("listen", &e))?;
        let listening = listener.local_addr().map_err(|e| failed("listen", &e))?;
        let address = SocketAddr::new(own, listening.port());

        let Place { rank, ranks, .. } = place;
        say(&mut keeper, &ToKeeper::Join { rank, ranks, run: place.run.clone(), address })
            .map_err(|e| failed("join", &e))?;
        // The keeper gives up after the same time, and knows better who is missing.
        _ = keeper.set_read_timeout(Some(place.timeout + 2 * BEAT));
        let (run, addresses) = match hear(&mut keeper) {
            Ok(ToRank::Table { run, addresses }) if addresses.len() == ranks => (run, addresses),
            Ok(ToRank::Refused(why)) => return Err(failed("join", &why)),
            Ok(ToRank::Failed(error)) => return Err(error),
            Ok(other) => return Err(failed("join", &format!("the rendezvous said {other:?}"))),
            Err(e) => return Err(failed(&format!("learn of the other ranks from {rendezvous}"), &e)),
        };
        _ = keeper.set_write_timeout(Some(place.timeout));
        let reader = keeper.try_clone().map_err(|e| failed("join", &e))?;
        let shared = Arc::new(Shared {
            run,
            addresses,
            mailbox: Mailbox::default(),
            outgoing: (0..ranks).map(|_| Mutex::default()).collect(),
            connections: Mutex::default(),
            keeper: Mutex::new(keeper),
            call: Mutex::default(),
            calls: Mutex::default(),
            closing: AtomicBool::new(false),
            place,
        });
        let (news, beats, visits) = (shared.clone(), shared.clone(), shared.clone());
        let threads = Mutex::new(vec![
            thread::spawn(move || news.listen_to_keeper(reader)),
            thread::spawn(move || beats.give_signs_of_life()),
            thread::spawn(move || visits.let_in(&listener)),
        ]);
        Ok(Self { shared, threads })
    }

    /// This rank has ended its work: says so and waits until all have.
    pub fn finish(&self) -> Result<(), ClusterError> {
        let shared = &self.shared;
        let mut connected = Vec::new();
        for (peer, outgoing) in shared.outgoing.iter().enumerate() {
            if let Some(stream) = &mut *lock(outgoing) {
                connected.push(peer);
                _ = stream.write_all(&Frame::Goodbye.encode());
            }
        }
        let told = say(&mut lock(&shared.keeper), &ToKeeper::Finished { connected });
        told.map_err(|e| shared.lost_keeper(&e))?;
        let others: BTreeSet<usize> =
            (0..shared.place.ranks).filter(|&rank| rank != shared.place.rank).collect();
        shared.mailbox.wait_for_end(&others)
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.closing.store(true, Ordering::Relaxed);
        _ = lock(&shared.keeper).shutdown(Shutdown::Both);
        for stream in lock(&shared.connections).iter() {
            _ = stream.shutdown(Shutdown::Both);
        }
        // A last visitor, so that the listener looks up.
        _ = TcpStream::connect_timeout(&shared.addresses[shared.place.rank], BEAT);
        for thread in lock(&self.threads).drain(..) {
            _ = thread.join();
        }
    }
}

impl Transport for TcpTransport {
    fn rank(&self) -> usize {
        self.shared.place.rank
    }

    fn size(&self) -> usize {
        self.shared.place.ranks
    }

    fn send(&self, to: usize, header: Header, payload: Payload<'_>) -> Result<(), ClusterError> {
        let shared = &self.shared;
        let mut outgoing = lock(&shared.outgoing[to]);
        let stream = match &mut *outgoing {
            Some(stream) => stream,
            none => none.insert(shared.connect(to)?),
        };
        let written = write_message(stream, &Frame::Message(header).encode(), payload.bytes());
        written.map_err(|e| shared.lost(to, &e.to_string()))
    }

    fn mailbox(&self) -> &Mailbox {
        &self.shared.mailbox
    }

    fn announce(&self, call: Option<Call>) {
        *lock(&self.shared.call) = call;
    }

    fn calls(&self) -> Vec<(usize, String)> {
        let mut calls = lock(&self.shared.calls).clone();
        calls.retain(|(rank, _)| *rank != self.shared.place.rank);
        calls
    }

    fn fail(&self, error: ClusterError) {
        self.shared.fail(error);
    }

    fn assumed_link(&self) -> (f64, f64) {
        (25e-6, 2e9)
    }
}

impl Shared {
    /// Opens the connection to a rank.
    fn connect(self: &Arc<Self>, to: usize) -> Result<TcpStream, ClusterError> {
        let call = || -> Result<TcpStream, String> {
            let mut stream = connect_until(self.addresses[to], Instant::now() + self.place.timeout)
                .map_err(|e| e.to_string())?;
            greet(&mut stream, End::Caller, &self.place.token)?;
            let hello = Hello { run: self.run.clone(), from: self.place.rank, to };
            say(&mut stream, &hello).map_err(|e| e.to_string())?;
            self.attend(&stream, to)?;
            Ok(stream)
        };
        call().map_err(|why| self.lost(to, &format!("cannot connect to {}: {why}", self.addresses[to])))
    }

    /// Begins to read from a connection.
    fn attend(self: &Arc<Self>, stream: &TcpStream, peer: usize) -> Result<(), String> {
        stream.set_write_timeout(Some(self.place.timeout)).map_err(|e| e.to_string())?;
        let again = || stream.try_clone().map_err(|e| e.to_string());
        lock(&self.connections).push(again()?);
        let (shared, reader) = (self.clone(), again()?);
        thread::spawn(move || shared.read_from(reader, peer));
        Ok(())
    }

    /// Lets other ranks in.
    fn let_in(self: &Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            if self.closing.load(Ordering::Relaxed) {
                break;
            }
            let Ok(stream) = stream else { continue };
            let shared = self.clone();
            thread::spawn(move || {
                let from = stream.peer_addr().map_or("somewhere".into(), |from| from.to_string());
                if let Err(why) = shared.admit(stream)
                    && !shared.closing.load(Ordering::Relaxed)
                {
                    eprintln!("note: rank {} closed a connection from {from}: {why}", shared.place.rank);
                }
            });
        }
    }

    fn admit(self: &Arc<Self>, mut stream: TcpStream) -> Result<(), String> {
        if self.place.token.is_empty() && !stream.peer_addr().is_ok_and(|from| from.ip().is_loopback()) {
            return Err("other machines need a --cluster-token".into());
        }
        greet(&mut stream, End::Listener, &self.place.token)?;
        let hello: Hello = hear(&mut stream).map_err(|e| format!("it did not say who it is: {e}"))?;
        if hello.run != self.run {
            return Err(format!("it belongs to run `{}`, this is run `{}`", hello.run, self.run));
        }
        if hello.to != self.place.rank || hello.from >= self.place.ranks {
            return Err(format!("it is rank {} and wants rank {}", hello.from, hello.to));
        }
        let answer = stream.try_clone().map_err(|e| e.to_string())?;
        // When both have called each other at once, each keeps to the connection it opened.
        lock(&self.outgoing[hello.from]).get_or_insert(answer);
        self.attend(&stream, hello.from)
    }

    /// Brings what a rank sends into the mailbox.
    fn read_from(&self, mut stream: TcpStream, peer: usize) {
        let mut header = [0u8; HEADER];
        // A connection that ends without a goodbye is the keeper's to judge.
        while stream.read_exact(&mut header).is_ok() {
            match Frame::decode(&header) {
                Ok(Frame::Goodbye) => self.mailbox.finish(peer),
                Ok(Frame::Message(header)) => {
                    let mut payload = Vec::with_capacity((header.length as usize).min(FIRST_ROOM));
                    let read = Read::take(&mut stream, header.length).read_to_end(&mut payload);
                    if read.is_err() || payload.len() as u64 != header.length {
                        return;
                    }
                    self.mailbox.deliver(peer, Message { header, payload: Box::new(payload) });
                }
                Err(why) => {
                    self.fail(lost_rank(peer, &format!("it sent garbage: {why}")));
                    return;
                }
            }
        }
    }

    fn listen_to_keeper(&self, mut stream: TcpStream) {
        _ = stream.set_read_timeout(Some(self.place.timeout.max(3 * BEAT)));
        let mut finished = BTreeSet::from([self.place.rank]);
        loop {
            match hear(&mut stream) {
                Ok(ToRank::Beat { calls }) => *lock(&self.calls) = calls,
                Ok(ToRank::Finished { rank, connected }) => {
                    finished.insert(rank);
                    if !connected.contains(&self.place.rank) {
                        self.mailbox.finish(rank);
                    }
                }
                Ok(ToRank::Failed(error)) => _ = self.mailbox.fail(error),
                Ok(ToRank::Refused(why)) => _ = self.mailbox.fail(ClusterError::Rendezvous(why)),
                Ok(ToRank::Table { .. }) => {}
                Err(error) => {
                    if finished.len() < self.place.ranks && !self.closing.load(Ordering::Relaxed) {
                        self.mailbox.fail(self.lost_keeper(&error));
                    }
                    return;
                }
            }
        }
    }

    fn give_signs_of_life(&self) {
        let mut beaten = Instant::now();
        while !self.closing.load(Ordering::Relaxed) {
            thread::sleep(BEAT / 50);
            if beaten.elapsed() >= BEAT {
                beaten = Instant::now();
                let call = lock(&self.call).map(|call| call.to_string());
                _ = say(&mut lock(&self.keeper), &ToKeeper::Beat { call });
            }
        }
    }

    fn fail(&self, error: ClusterError) {
        if self.mailbox.fail(error.clone()) {
            _ = say(&mut lock(&self.keeper), &ToKeeper::Failed(error));
        }
    }

    /// The link to a rank does not work: the reason is perhaps another rank's failure, of which news is on its way.
    fn lost(&self, rank: usize, cause: &str) -> ClusterError {
        self.mailbox.wait_for_failure(BEAT).unwrap_or_else(|| lost_rank(rank, cause))
    }

    fn lost_keeper(&self, error: &io::Error) -> ClusterError {
        let text = format!("rank {} has lost the process that started the ranks: {error}", self.place.rank);
        ClusterError::Rendezvous(text)
    }
}

/// What a reader makes room for before any of a message has come.
const FIRST_ROOM: usize = 16 << 20;

/// Writes header and payload together, as often as it takes.
fn write_message(stream: &mut TcpStream, header: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut parts = [IoSlice::new(header), IoSlice::new(payload)];
    let mut parts = &mut parts[..];
    while !parts.is_empty() {
        match stream.write_vectored(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut parts, written),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Connects to something that may not be there yet.
fn connect_until(address: SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
    loop {
        let connected = TcpStream::connect_timeout(&reachable(address), BEAT);
        if connected.is_ok() || Instant::now() >= deadline {
            return connected;
        }
        thread::sleep(BEAT / 20);
    }
}

fn lost_rank(rank: usize, cause: &str) -> ClusterError {
    ClusterError::PeerLost { rank, during: String::new(), after: Duration::ZERO, cause: cause.into() }
}
