//! Everything a run depends on besides its own options.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Device;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::progress::Progress;
use crate::{Error, Network, Result};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputMode {
    /// Sentences and tables for a person; progress bars when stderr is a terminal.
    Human,
    /// One JSON document on stdout, nothing else there.
    Json,
    /// Only what was asked for; no notes, no progress.
    Quiet,
}

/// Opens a trained model, whatever system it belongs to.
pub type OpenNetwork = fn(&Path, &Context) -> Result<Box<dyn Network>>;

/// Device, seed, threads, output folder, output mode and the request to stop.
#[derive(Debug, Clone)]
pub struct Context {
    /// Where tensors live. Training asks for `device.clone().autodiff()`.
    pub device: Device,
    /// The one seed from which all randomness of a run is derived.
    pub seed: u64,
    /// Worker threads in use.
    pub threads: usize,
    /// Where experiments put their files.
    pub out: PathBuf,
    /// How results are printed.
    pub output: OutputMode,
    /// Set when the user asks to stop.
    pub interrupted: Arc<AtomicBool>,
    /// Keeps what is printed instead of stdout, where there is one.
    pub printed: Option<Arc<Mutex<String>>>,
    /// Opens the models of all systems: known to the binary alone, as no system knows another.
    pub networks: Option<OpenNetwork>,
}

impl Context {
    /// A context on the CPU with seed 0, writing under `runs/`.
    pub fn new() -> Self {
        Self {
            device: Device::flex(),
            seed: 0,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            out: PathBuf::from("runs"),
            output: OutputMode::Human,
            interrupted: Arc::default(),
            printed: None,
            networks: None,
        }
    }

    /// A context for tests: quiet, and what a command prints is kept for [`take_printed`](Self::take_printed).
    pub fn for_tests(out: impl Into<PathBuf>) -> Self {
        Self { out: out.into(), output: OutputMode::Quiet, printed: Some(Arc::default()), ..Self::new() }
    }

    /// What was printed since the last call, where it is kept.
    pub fn take_printed(&self) -> String {
        let printed = self.printed.iter().map(|text| text.lock().unwrap_or_else(PoisonError::into_inner));
        printed.map(|mut text| std::mem::take(&mut *text)).collect()
    }

    /// An independent random stream with a name, the same in every run with the same seed.
    ///
    /// `index` numbers draws within the stream (a step, a repeat), so that a resumed run needs to
    /// remember nothing but how far it came.
    pub fn rng(&self, stream: &str, index: u64) -> ChaCha8Rng {
        random_stream(self.seed, stream, index)
    }

    /// The flag that Ctrl-C sets.
    pub fn interrupt_flag(&self) -> Arc<AtomicBool> {
        self.interrupted.clone()
    }

    /// Whether the user asked to stop; long loops save their work and leave.
    pub fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// The trained model in a folder, of any system.
    ///
    /// # Errors
    /// When it is of no known system or damaged, or nobody told this context which systems there are.
    pub fn network(&self, model: &Path) -> Result<Box<dyn Network>> {
        match self.networks {
            Some(open) => open(model, self),
            None => Err(Error::input(
                model.display(),
                "models of other systems are opened by the `kiln` program alone",
            )
            .hint("write its graph with `kiln export` first")),
        }
    }

    /// A bar with an ETA over `len` units of `what`, shown only to a person at a terminal.
    pub fn progress(&self, len: u64, what: &str) -> Progress {
        let visible = self.output == OutputMode::Human && std::io::stderr().is_terminal();
        Progress::new(len, what, visible)
    }

    /// A remark for the person on stderr; silent with `--quiet` and `--json`.
    pub fn note(&self, text: impl std::fmt::Display) {
        if self.output == OutputMode::Human {
            eprintln!("{text}");
        }
    }

    /// The result of a command on stdout: `value` with `--json`, `human` otherwise.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn emit<T: Serialize>(&self, value: &T, human: impl FnOnce(&T) -> String) -> Result<()> {
        let text = match self.output {
            OutputMode::Json => {
                serde_json::to_string_pretty(value)
                    .map_err(|e| Error::work("cannot write the result as JSON").caused_by(e))?
                    + "\n"
            }
            OutputMode::Human | OutputMode::Quiet => human(value),
        };
        self.print(&text)
    }

    /// Writes `text` to stdout at once; a reader that has gone away (`| head`) ends the program quietly.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn print(&self, text: &str) -> Result<()> {
        if let Some(printed) = &self.printed {
            printed.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
            return Ok(());
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
                Err(Error::interrupted("the reader of the output has gone away"))
            }
            result => result.map_err(Error::io("write", "standard output")),
        }
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::new()
    }
}

/// The random stream named `stream`, number `index`, of `seed`.
pub fn random_stream(seed: u64, stream: &str, index: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&fnv1a(stream.as_bytes()).to_le_bytes());
    key[16..24].copy_from_slice(&index.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Fowler–Noll–Vo hash, 64 bit: stable over versions and machines, unlike the standard hasher.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;

    #[test]
    fn streams_repeat_and_differ_by_seed_name_and_index() {
        let draw = |seed, stream: &str, index| random_stream(seed, stream, index).random::<u64>();
        assert_eq!(draw(1, "batch", 2), draw(1, "batch", 2));
        assert_ne!(draw(1, "batch", 2), draw(2, "batch", 2));
        assert_ne!(draw(1, "batch", 2), draw(1, "init", 2));
        assert_ne!(draw(1, "batch", 2), draw(1, "batch", 3));
    }
}
