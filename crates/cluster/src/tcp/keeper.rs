//! Where processes find each other, and where one hears that another is gone.
//!
//! The keeper lives with whoever starts the ranks. Every rank keeps a connection to it: first to join and to learn
//! the addresses of all others, then for a sign of life each second, and for the news that a rank has ended its work
//! or that the work of all has failed. Nothing that ranks compute goes through the keeper.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::greeting::{End, greet, hear, say};
use crate::communicator::lock;
use crate::error::ClusterError;

/// How often everyone gives a sign of life.
pub const BEAT: Duration = Duration::from_secs(1);

/// Who has given no sign of life for longer is the reason when others wait for each other in vain.
const SILENCE: Duration = Duration::from_millis(1500);

/// What a rank says to the keeper.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToKeeper {
    Join {
        rank: usize,
        ranks: usize,
        run: Option<String>,
        address: SocketAddr,
    },
    /// A sign of life, and what the rank called last.
    Beat {
        call: Option<String>,
    },
    /// The rank has ended its work. On its connections to these ranks it says so itself, after its last message.
    Finished {
        connected: Vec<usize>,
    },
    Failed(ClusterError),
}

/// What the keeper says to a rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToRank {
    Refused(String),
    Table { run: String, addresses: Vec<SocketAddr> },
    Beat { calls: Vec<(usize, String)> },
    Finished { rank: usize, connected: Vec<usize> },
    Failed(ClusterError),
}

/// What has to be the same for all ranks.
#[derive(Debug, Clone)]
pub struct Terms {
    pub ranks: usize,
    pub run: String,
    pub token: String,
    pub timeout: Duration,
}

/// The keeper's threads; they end with it.
pub struct Keeper {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    terms: Terms,
    closing: AtomicBool,
    state: Mutex<State>,
}

struct State {
    seats: Vec<Option<Seat>>,
    failure: Option<ClusterError>,
}

/// A rank that has joined.
struct Seat {
    stream: TcpStream,
    from: SocketAddr,
    address: SocketAddr,
    heard: Instant,
    call: Option<String>,
    finished: bool,
}

impl Keeper {
    /// Waits for ranks at `listener`.
    pub fn start(listener: TcpListener, terms: Terms) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let seats = (0..terms.ranks).map(|_| None).collect();
        let state = Mutex::new(State { seats, failure: None });
        let shared = Arc::new(Shared { terms, closing: AtomicBool::new(false), state });
        let beats = shared.clone();
        let thread = thread::spawn(move || {
            let timer = thread::spawn({
                let shared = beats.clone();
                move || shared.watch(address)
            });
            for stream in listener.incoming() {
                if beats.closing.load(Ordering::Relaxed) {
                    break;
                }
                let shared = beats.clone();
                if let Ok(stream) = stream {
                    thread::spawn(move || shared.serve(stream));
                }
            }
            _ = timer.join();
        });
        Ok(Self { shared, address, thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Tells every rank that the work has failed.
    pub fn fail(&self, error: ClusterError) {
        self.shared.fail(error);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        for seat in lock(&self.shared.state).seats.iter().flatten() {
            _ = seat.stream.shutdown(Shutdown::Both);
        }
        // A last visitor, so that the listener looks up.
        _ = TcpStream::connect_timeout(&reachable(self.address), BEAT);
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// The address at which a listener on this machine is reached from it.
pub fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

impl Shared {
    /// One connection from its greeting to its end.
    fn serve(&self, mut stream: TcpStream) {
        let Ok(from) = stream.peer_addr() else { return };
        let joined = self.admit(&mut stream, from);
        let rank = match joined {
            Ok(Some(rank)) => rank,
            Ok(None) => return,
            Err(why) => return eprintln!("note: closed a connection from {from}: {why}"),
        };
        loop {
            let heard = hear::<ToKeeper>(&mut stream);
            let mut state = lock(&self.state);
            let Some(seat) = state.seats[rank].as_mut() else { return };
            seat.heard = Instant::now();
            match heard {
                Ok(ToKeeper::Beat { call }) => seat.call = call,
                Ok(ToKeeper::Finished { connected }) => {
                    seat.finished = true;
                    state.tell_all(&ToRank::Finished { rank, connected });
                }
                Ok(ToKeeper::Failed(error)) => {
                    drop(state);
                    self.fail(error);
                }
                Ok(ToKeeper::Join { .. }) | Err(_) => {
                    let lost =
                        !seat.finished && state.failure.is_none() && !self.closing.load(Ordering::Relaxed);
                    drop(state);
                    if lost {
                        self.fail(lost_rank(rank, "its process is gone"));
                    }
                    return;
                }
            }
        }
    }

    /// Lets a rank in: its number, or nothing when it was told why not, or an error when it is no rank at all.
    fn admit(&self, stream: &mut TcpStream, from: SocketAddr) -> Result<Option<usize>, String> {
        let Terms { ranks, run, token, .. } = &self.terms;
        if token.is_empty() && !from.ip().is_loopback() {
            return Err("other machines need a --cluster-token".into());
        }
        greet(stream, End::Listener, token)?;
        let ToKeeper::Join { rank, ranks: expected, run: theirs, address } =
            hear(stream).map_err(|e| format!("it did not join: {e}"))?
        else {
            return Err("it did not join first".into());
        };
        let mut state = lock(&self.state);
        let refusal = match state.seats.get(rank) {
            _ if expected != *ranks => {
                Some(format!("rank {rank} expects {expected} ranks, but here are {ranks}"))
            }
            _ if theirs.as_ref().is_some_and(|theirs| theirs != run) => Some(format!(
                "rank {rank} belongs to run `{}`, this is run `{run}`",
                theirs.unwrap_or_default()
            )),
            None => Some(format!("there is no rank {rank} among {ranks}")),
            Some(Some(seat)) => Some(format!("rank {rank} has already come, from {}", seat.from)),
            Some(None) => None,
        };
        if let Some(refusal) = refusal {
            _ = say(stream, &ToRank::Refused(refusal));
            return Ok(None);
        }
        let writer = stream.try_clone().map_err(|e| e.to_string())?;
        writer.set_write_timeout(Some(BEAT)).map_err(|e| e.to_string())?;
        state.seats[rank] =
            Some(Seat { stream: writer, from, address, heard: Instant::now(), call: None, finished: false });
        if let Some(failure) = state.failure.clone() {
            state.tell_all(&ToRank::Failed(failure));
        } else if state.seats.iter().all(Option::is_some) {
            let addresses = state.seats.iter().flatten().map(|seat| seat.address).collect();
            state.tell_all(&ToRank::Table { run: run.clone(), addresses });
        }
        Ok(Some(rank))
    }

    /// Gives signs of life, and misses those of others.
    fn watch(&self, address: SocketAddr) {
        let begun = Instant::now();
        let mut beaten = begun;
        while !self.closing.load(Ordering::Relaxed) {
            thread::sleep(BEAT / 50);
            if beaten.elapsed() < BEAT {
                continue;
            }
            beaten = Instant::now();
            let mut state = lock(&self.state);
            if state.failure.is_some() {
                continue;
            }
            let missing: Vec<usize> =
                (0..self.terms.ranks).filter(|&rank| state.seats[rank].is_none()).collect();
            if !missing.is_empty() {
                if begun.elapsed() > self.terms.timeout {
                    let text = format!(
                        "of {} ranks, {missing:?} did not come to {address} within {:.0?}",
                        self.terms.ranks, self.terms.timeout
                    );
                    eprintln!("error: {text}");
                    state.tell_all(&ToRank::Refused(text.clone()));
                    state.failure = Some(ClusterError::Rendezvous(text));
                }
                continue;
            }
            let silent = state.seats.iter().flatten();
            // One sign of life may come late on a busy machine.
            let patience = self.terms.timeout.max(3 * BEAT);
            let silent = silent.map(|seat| !seat.finished && seat.heard.elapsed() > patience);
            if let Some(rank) = silent.enumerate().find_map(|(rank, silent)| silent.then_some(rank)) {
                drop(state);
                self.fail(lost_rank(rank, "it gives no sign of life"));
                continue;
            }
            let calls = state.seats.iter().flatten().enumerate();
            let calls = calls.filter_map(|(rank, seat)| Some((rank, seat.call.clone()?))).collect();
            state.tell_all(&ToRank::Beat { calls });
        }
    }

    fn fail(&self, error: ClusterError) {
        let mut state = lock(&self.state);
        if state.failure.is_none() {
            let error = state.blame(error);
            state.failure = Some(error.clone());
            state.tell_all(&ToRank::Failed(error));
        }
    }
}

impl State {
    /// The error with the rank that everyone waits for in the end: where ranks wait in a row, the first to run out of patience
    /// names its neighbour, who waits as well.
    fn blame(&self, error: ClusterError) -> ClusterError {
        let silence = |(rank, seat): (usize, &Option<Seat>)| {
            let seat = seat.as_ref().filter(|seat| !seat.finished)?;
            Some((seat.heard.elapsed(), rank)).filter(|(silence, _)| *silence > SILENCE)
        };
        match (error, self.seats.iter().enumerate().filter_map(silence).max()) {
            (ClusterError::Timeout { rank: Some(_), during, after, calls }, Some((_, rank))) => {
                ClusterError::Timeout { rank: Some(rank), during, after, calls }
            }
            (error, _) => error,
        }
    }

    /// Says something to everyone who is there. Who cannot be told is noticed by whoever listens to it.
    fn tell_all(&mut self, message: &ToRank) {
        for seat in self.seats.iter_mut().flatten() {
            _ = say(&mut seat.stream, message);
        }
    }
}

fn lost_rank(rank: usize, cause: &str) -> ClusterError {
    ClusterError::PeerLost { rank, during: String::new(), after: Duration::ZERO, cause: cause.into() }
}
