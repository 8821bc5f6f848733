//! Slow links on a fast machine.
//!
//! A message's arrival is worked out when it is sent and travels with it; the receiver waits until then. The
//! sender's link is busy while a message leaves it, the receiver's while one comes in, so that a root of a star
//! has its bandwidth once for all its peers. All ranks must be on one machine, since they share its clock.

use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::options::{parse_bandwidth, parse_duration};

/// A link as `--emulate` describes it: `latency=1ms,bandwidth=300Mbit,jitter=0.1ms,seed=1`.
#[derive(Debug, Clone, PartialEq)]
pub struct EmulatedLink {
    /// Time from sending a byte to its arrival.
    pub latency: Duration,
    /// Bytes per second into and out of a rank; unlimited where there is none.
    pub bandwidth: Option<f64>,
    /// Up to so much is added to the latency of each message, evenly distributed.
    pub jitter: Duration,
    /// Seed of the jitter.
    pub seed: u64,
}

impl FromStr for EmulatedLink {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut link = Self { latency: Duration::ZERO, bandwidth: None, jitter: Duration::ZERO, seed: 0 };
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) =
                part.split_once('=').ok_or_else(|| format!("`{part}` is not of the form name=value"))?;
            match name {
                "latency" => link.latency = parse_duration(value)?,
                "jitter" => link.jitter = parse_duration(value)?,
                "bandwidth" => link.bandwidth = Some(parse_bandwidth(value)?),
                "seed" => link.seed = value.parse().map_err(|_| format!("`{value}` is not a seed"))?,
                _ => return Err(format!("`{name}` is none of latency, bandwidth, jitter, seed")),
            }
        }
        Ok(link)
    }
}

/// One rank's end of the emulated links.
pub(crate) struct Emulator {
    link: EmulatedLink,
    state: Mutex<LinkState>,
}

struct LinkState {
    /// When the last byte on its way out has left.
    out_free: u64,
    /// When the last byte on its way in has come.
    in_free: u64,
    rng: ChaCha8Rng,
}

impl Emulator {
    pub fn new(link: EmulatedLink, rank: usize) -> Self {
        let rng = kiln_core::random_stream(link.seed, "emulated link", rank as u64);
        Self { link, state: Mutex::new(LinkState { out_free: 0, in_free: 0, rng }) }
    }

    pub fn link(&self) -> &EmulatedLink {
        &self.link
    }

    /// A message leaves now; gives its arrival.
    pub fn depart(&self, bytes: usize) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.out_free = now().max(state.out_free) + self.span(bytes);
        let jitter = self.link.jitter.mul_f64(state.rng.random::<f64>());
        state.out_free + nanos(self.link.latency + jitter)
    }

    /// Waits until a message that is due then has come in.
    pub fn arrive(&self, due: u64, bytes: usize) {
        let there = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.in_free = due.max(state.in_free + self.span(bytes));
            state.in_free
        };
        // The system wakes sleepers some 50 µs late.
        let early = nanos(Duration::from_micros(80));
        if let Some(left) = there.checked_sub(now() + early) {
            std::thread::sleep(Duration::from_nanos(left));
        }
        while now() < there {
            std::thread::yield_now();
        }
    }

    /// Nanoseconds that so many bytes occupy the link.
    fn span(&self, bytes: usize) -> u64 {
        self.link.bandwidth.map_or(0, |bandwidth| (bytes as f64 / bandwidth * 1e9) as u64)
    }
}

/// Nanoseconds of the system clock.
pub(crate) fn now() -> u64 {
    nanos(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}
