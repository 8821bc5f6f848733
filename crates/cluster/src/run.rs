//! Starting ranks.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::communicator::{Communicator, Endpoint, lock};
use crate::emulate::EmulatedLink;
use crate::error::ClusterError;
use crate::options::parse_duration;
use crate::threads::{ThreadTransport, ThreadWorld};

/// What ranks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Backend {
    /// Threads of this process
    #[default]
    Threads,
}

/// Where the ranks of a command live and how they talk to each other.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Ranks")]
pub struct ClusterArgs {
    /// What ranks are
    #[arg(long, value_enum, default_value_t)]
    pub backend: Backend,
    /// How long a rank waits for another before it gives up
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Slow links between ranks: `latency=1ms,bandwidth=300Mbit,jitter=0.1ms,seed=1`
    #[arg(long, value_name = "LINK")]
    pub emulate: Option<EmulatedLink>,
}

impl Default for ClusterArgs {
    fn default() -> Self {
        Self { backend: Backend::default(), timeout: Duration::from_secs(30), emulate: None }
    }
}

impl ClusterArgs {
    /// Runs `body` on `ranks` ranks and returns the results of those that live in this process, in rank order:
    /// all threads; otherwise this process's one.
    ///
    /// # Errors
    /// The first error of any rank; the other ranks have then been stopped.
    pub fn run<R: Send>(
        &self,
        ranks: usize,
        cx: &Context,
        body: impl Fn(Communicator) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        match self.backend {
            Backend::Threads => on_threads(ranks, self, cx.threads, body),
        }
    }
}

/// Runs `body` on ranks that are threads, and returns their results in order. Each rank has its share of the
/// processor's cores for `rayon`, at least one.
///
/// # Errors
/// The first error of any rank, or its panic; the other ranks have then been stopped.
pub fn run_threads<R: Send>(ranks: usize, body: impl Fn(Communicator) -> Result<R> + Sync) -> Result<Vec<R>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    on_threads(ranks, &ClusterArgs::default(), cores, body)
}

fn on_threads<R: Send>(
    ranks: usize,
    options: &ClusterArgs,
    cores: usize,
    body: impl Fn(Communicator) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if ranks == 0 {
        return Err(Error::usage("there must be at least one rank"));
    }
    let world = ThreadWorld::new(ranks);
    let errors: Mutex<Vec<Error>> = Mutex::default();
    let results: Vec<Mutex<Option<R>>> = (0..ranks).map(|_| Mutex::default()).collect();
    let work = |rank: usize| {
        let transport = Arc::new(ThreadTransport { world: world.clone(), rank });
        let comm = Communicator::world(Endpoint::new(transport, options.timeout, options.emulate.as_ref()));
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| body(comm)));
        let outcome = outcome.unwrap_or_else(|panicked| {
            Err(Error::work(format!("rank {rank} panicked: {}", panic_message(&*panicked))))
        });
        match outcome {
            Ok(result) => *lock(&results[rank]) = Some(result),
            Err(error) => {
                // Told to the others, unless it is what they have told this rank.
                world.fail(&ClusterError::of(&error).cloned().unwrap_or_else(|| ClusterError::PeerLost {
                    rank,
                    during: String::new(),
                    after: Duration::ZERO,
                    cause: error.to_string(),
                }));
                lock(&errors).push(error);
            }
        }
        world.finish(rank);
    };
    let pools = (0..ranks).map(|_| pool((cores / ranks).max(1))).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        for (rank, pool) in pools.iter().enumerate() {
            let work = &work;
            scope.spawn(move || pool.install(|| work(rank)));
        }
    });
    let mut errors = errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    // The cause is the first error that is not about another rank's.
    let cause = errors.iter().position(|error| ClusterError::of(error).is_none()).unwrap_or(0);
    if !errors.is_empty() {
        return Err(errors.swap_remove(cause));
    }
    Ok(results.into_iter().filter_map(|result| lock(&result).take()).collect())
}

/// As much as the main thread usually has.
const STACK: usize = 8 << 20;

/// The threads of a rank for `rayon`.
fn pool(threads: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK)
        .build()
        .map_err(|e| Error::work("cannot start the threads of a rank").caused_by(e))
}

fn panic_message(panicked: &(dyn Any + Send)) -> &str {
    let text = panicked.downcast_ref::<&str>().copied();
    text.or_else(|| panicked.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown cause")
}
