//! Waiting for another thread without sleeping at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// How often a waiting rank looks again before it sleeps: some 20 µs on an idle machine. Being woken takes the system
/// about as long, and most waits in the midst of a collective are shorter.
const LOOKS: u32 = 150;

/// Counts changes that others wait for.
#[derive(Debug, Default)]
pub(crate) struct Changes(AtomicU64);

impl Changes {
    /// So many there were up to now.
    pub fn seen(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Something has changed.
    pub fn tell(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// What is left of a rank's patience in one call.
pub(crate) struct Patience(u32);

impl Patience {
    pub fn new() -> Self {
        Self(LOOKS)
    }

    /// Whether something has changed since `seen`, after looking for as long as there is patience. Between looks other
    /// threads run, of which there may be more than cores.
    pub fn look(&mut self, changes: &Changes, seen: u64) -> bool {
        while self.0 > 0 {
            self.0 -= 1;
            if changes.seen() != seen {
                return true;
            }
            thread::yield_now();
        }
        false
    }
}
