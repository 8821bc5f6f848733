//! Starting ranks.

use std::any::Any;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::communicator::{Communicator, Endpoint, lock};
use crate::emulate::EmulatedLink;
use crate::error::ClusterError;
use crate::launch::{self, Appointed, Output, Supervisor};
use crate::options::parse_duration;
use crate::tcp::keeper::{Keeper, Terms};
use crate::tcp::{Place, TcpTransport};
use crate::threads::{ThreadTransport, ThreadWorld};
use crate::transport::Transport;

/// What ranks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Backend {
    /// Threads of this process
    #[default]
    Threads,
    /// Processes joined by TCP: those of `kiln launch`, or as many as needed on this machine
    Tcp,
    /// Processes of `mpirun`; needs a kiln that was built with `--features mpi`
    Mpi,
}

/// Where the ranks of a command live and how they talk to each other.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Ranks")]
pub struct ClusterArgs {
    /// What ranks are; processes of `kiln launch` are joined by TCP in any case
    #[arg(long, value_enum, default_value_t)]
    pub backend: Backend,
    /// Where ranks of `--backend tcp` meet [default: a free port of this machine]
    #[arg(long, value_name = "HOST:PORT")]
    pub rendezvous: Option<String>,
    /// How long a rank waits for another before it gives up
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub timeout: Duration,
    /// A secret that ranks prove to each other [default: $KILN_CLUSTER_TOKEN]
    #[arg(long, value_name = "SECRET")]
    pub cluster_token: Option<String>,
    /// Slow links between the ranks of one machine: latency=1ms,bandwidth=300Mbit,jitter=0.1ms,seed=1
    #[arg(long, value_name = "LINK")]
    pub emulate: Option<EmulatedLink>,
}

impl Default for ClusterArgs {
    fn default() -> Self {
        Self {
            backend: Backend::default(),
            rendezvous: None,
            timeout: Duration::from_secs(30),
            cluster_token: None,
            emulate: None,
        }
    }
}

impl ClusterArgs {
    /// Runs `body` on `ranks` ranks and returns the results of those that live in this process, in rank order:
    /// all of them for threads, otherwise one.
    ///
    /// Over TCP, a process of `kiln launch` is the rank that it was started as. Any other process becomes rank 0 and
    /// starts the others on this machine with its own command line; what these print on stdout is lost, and what they
    /// print on stderr appears with their rank before it. It can do so once.
    ///
    /// When a rank fails, the others notice at their next call. A rank that makes none for two seconds more is
    /// stuck, and the process ends with exit code 1.
    ///
    /// # Errors
    /// The first error of any rank; the other ranks have then been stopped.
    pub fn run<R: Send>(
        &self,
        ranks: usize,
        cx: &Context,
        body: impl Fn(Communicator) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        if ranks == 0 {
            return Err(Error::usage("there must be at least one rank"));
        }
        let appointed = launch::appointed()?;
        match (self.backend, appointed) {
            (_, Some(appointed)) => self.as_appointed(&appointed, ranks, cx, &body),
            (Backend::Threads, None) => on_threads(ranks, self, cx.threads, Stuck::EndProcess, &body),
            (Backend::Tcp, None) => self.with_processes(ranks, cx, &body),
            (Backend::Mpi, None) => self.over_mpi(ranks, cx, &body),
        }
    }

    /// As the rank that whoever started this process made it.
    fn as_appointed<R: Send>(
        &self,
        appointed: &Appointed,
        ranks: usize,
        cx: &Context,
        body: &(impl Fn(Communicator) -> Result<R> + Sync),
    ) -> Result<Vec<R>> {
        launch::only_once()?;
        if appointed.ranks != ranks {
            let found = appointed.ranks;
            return Err(Error::usage(format!("the command runs on {ranks} ranks, but {found} were started"))
                .hint(format!("start it with `kiln launch -n {ranks} -- …`")));
        }
        let place = Place {
            rank: appointed.rank,
            ranks,
            rendezvous: resolve(&appointed.rendezvous)?,
            run: appointed.run.clone(),
            token: self.token(),
            timeout: self.timeout,
        };
        let pool = pool((cx.threads / appointed.local).max(1))?;
        Ok(vec![self.as_process(place, &pool, body)?])
    }

    /// As rank 0, with the others as processes of this machine.
    fn with_processes<R: Send>(
        &self,
        ranks: usize,
        cx: &Context,
        body: &(impl Fn(Communicator) -> Result<R> + Sync),
    ) -> Result<Vec<R>> {
        launch::only_once()?;
        let listener = listen(self.rendezvous.as_deref().unwrap_or("127.0.0.1:0"))?;
        let token = match self.token() {
            given if !given.is_empty() => given,
            _ => launch::random_word()?,
        };
        let terms = Terms { ranks, run: launch::random_word()?, token: token.clone(), timeout: self.timeout };
        let run = terms.run.clone();
        let keeper = Keeper::start(listener, terms).map_err(|e| Error::work("cannot listen").caused_by(e))?;
        let rendezvous = keeper.address();
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        let others: Vec<_> = (1..ranks)
            .map(|rank| Appointed {
                rank,
                ranks,
                rendezvous: rendezvous.to_string(),
                run: Some(run.clone()),
                local: ranks,
            })
            .collect();
        let supervisor = Supervisor::start(
            &others,
            &arguments,
            &token,
            Output::Errors,
            Some(keeper),
            cx.interrupt_flag(),
        )?;
        let place = Place { rank: 0, ranks, rendezvous, run: Some(run), token, timeout: self.timeout };
        let result = pool((cx.threads / ranks).max(1)).and_then(|pool| self.as_process(place, &pool, body));
        let ended = supervisor.finish(result.is_err());
        let result = result?;
        ended?;
        Ok(vec![result])
    }

    /// Does a rank's work in this process.
    fn as_process<R: Send>(
        &self,
        place: Place,
        pool: &ThreadPool,
        body: &(impl Fn(Communicator) -> Result<R> + Sync),
    ) -> Result<R> {
        pool.install(|| self.over_tcp(place, Stuck::EndProcess, body))
    }

    fn over_tcp<R>(
        &self,
        place: Place,
        stuck: Stuck,
        body: &impl Fn(Communicator) -> Result<R>,
    ) -> Result<R> {
        let rank = place.rank;
        let transport = Arc::new(TcpTransport::join(place)?);
        let comm = Communicator::world(Endpoint::new(transport.clone(), self.timeout, self.emulate.as_ref()));
        let watched = transport.clone();
        let _watch =
            (stuck == Stuck::EndProcess).then(|| Watchdog::start(move || watched.mailbox().failure()));
        match guarded(rank, || body(comm)) {
            Ok(result) => {
                transport.finish()?;
                Ok(result)
            }
            Err(error) => {
                transport.fail(as_seen_by_others(rank, &error));
                Err(error)
            }
        }
    }

    /// As the rank that `mpirun` made this process.
    #[cfg(feature = "mpi")]
    fn over_mpi<R: Send>(
        &self,
        ranks: usize,
        cx: &Context,
        body: &(impl Fn(Communicator) -> Result<R> + Sync),
    ) -> Result<Vec<R>> {
        launch::only_once()?;
        let (_universe, transport) = crate::mpi::join()?; // dropped in reverse order: the universe last
        if transport.size() != ranks {
            let found = transport.size();
            return Err(Error::usage(format!(
                "the command runs on {ranks} ranks, but MPI has started {found}"
            ))
            .hint(format!("start it with `mpirun -n {ranks} kiln …`")));
        }
        let pool = pool((cx.threads / transport.local()).max(1))?;
        let transport = Arc::new(transport);
        let endpoint = Endpoint::new(transport.clone(), self.timeout, self.emulate.as_ref());
        let result = pool.install(|| guarded(transport.rank(), || body(Communicator::world(endpoint))));
        if let Err(error) = &result {
            transport.fail(as_seen_by_others(transport.rank(), error));
        }
        transport.finish()?;
        Ok(vec![result?])
    }

    #[cfg(not(feature = "mpi"))]
    fn over_mpi<R: Send>(
        &self,
        _ranks: usize,
        _cx: &Context,
        _body: &(impl Fn(Communicator) -> Result<R> + Sync),
    ) -> Result<Vec<R>> {
        Err(Error::usage("this kiln was built without MPI")
            .hint("build it with `cargo build --release --features mpi`, which needs libopenmpi-dev and libclang-dev"))
    }

    fn token(&self) -> String {
        let token = self.cluster_token.clone();
        token.or_else(|| std::env::var(launch::TOKEN).ok()).unwrap_or_default()
    }
}

/// Runs `body` on ranks that are threads, and returns their results in order. Each rank has its share of the
/// processor's cores for `rayon`, at least one.
///
/// # Errors
/// The first error of any rank, or its panic; the other ranks have then been stopped.
pub fn run_threads<R: Send>(ranks: usize, body: impl Fn(Communicator) -> Result<R> + Sync) -> Result<Vec<R>> {
    if ranks == 0 {
        return Err(Error::usage("there must be at least one rank"));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    on_threads(ranks, &ClusterArgs::default(), cores, Stuck::Wait, &body)
}

/// The same with ranks that talk over TCP, each through its own sockets, though all live in this process: what tests
/// and measurements of the TCP back end stand on.
///
/// # Errors
/// As [`run_threads`].
pub fn run_over_loopback<R: Send>(
    ranks: usize,
    options: &ClusterArgs,
    body: impl Fn(Communicator) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let listener = listen("127.0.0.1:0")?;
    let (run, token) = (launch::random_word()?, launch::random_word()?);
    let terms = Terms { ranks, run: run.clone(), token: token.clone(), timeout: options.timeout };
    let keeper = Keeper::start(listener, terms).map_err(|e| Error::work("cannot listen").caused_by(e))?;
    let work = &|rank| {
        let (run, token) = (Some(run.clone()), token.clone());
        let place = Place { rank, ranks, rendezvous: keeper.address(), run, token, timeout: options.timeout };
        options.over_tcp(place, Stuck::Wait, &body)
    };
    let outcomes: Vec<Result<R>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || work(rank))).collect();
        let joined = ranks.into_iter().map(|rank| rank.join());
        joined.map(|outcome| outcome.unwrap_or_else(|panicked| panic::resume_unwind(panicked))).collect()
    });
    let (results, mut errors) = outcomes.into_iter().fold((Vec::new(), Vec::new()), |mut both, outcome| {
        match outcome {
            Ok(result) => both.0.push(result),
            Err(error) => both.1.push(error),
        }
        both
    });
    match cause_of(&mut errors) {
        Some(error) => Err(error),
        None => Ok(results),
    }
}

/// Of the errors of several ranks the first that is not about another rank's.
fn cause_of(errors: &mut Vec<Error>) -> Option<Error> {
    let cause = errors.iter().position(|error| ClusterError::of(error).is_none()).unwrap_or(0);
    (!errors.is_empty()).then(|| errors.swap_remove(cause))
}

/// What to do about a rank that does not end when the others have failed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stuck {
    Wait,
    EndProcess,
}

fn on_threads<R: Send>(
    ranks: usize,
    options: &ClusterArgs,
    cores: usize,
    stuck: Stuck,
    body: &(impl Fn(Communicator) -> Result<R> + Sync),
) -> Result<Vec<R>> {
    if ranks > MOST_THREADS {
        return Err(Error::usage(format!(
            "{ranks} ranks are too many for one process; it has at most {MOST_THREADS} threads"
        ))
        .hint("take fewer ranks, or processes on several machines (`kiln launch`)"));
    }
    let world = ThreadWorld::new(ranks);
    let errors: Mutex<Vec<Error>> = Mutex::default();
    let results: Vec<Mutex<Option<R>>> = (0..ranks).map(|_| Mutex::default()).collect();
    let work = |rank: usize| {
        let transport = Arc::new(ThreadTransport { world: world.clone(), rank });
        let comm = Communicator::world(Endpoint::new(transport, options.timeout, options.emulate.as_ref()));
        match guarded(rank, || body(comm)) {
            Ok(result) => *lock(&results[rank]) = Some(result),
            Err(error) => {
                world.fail(&as_seen_by_others(rank, &error));
                lock(&errors).push(error);
            }
        }
        world.finish(rank);
    };
    let pools = (0..ranks).map(|_| pool((cores / ranks).max(1))).collect::<Result<Vec<_>>>()?;
    let watched = world.clone();
    let _watch = (stuck == Stuck::EndProcess).then(|| Watchdog::start(move || watched.failure()));
    std::thread::scope(|scope| {
        for (rank, pool) in pools.iter().enumerate() {
            let work = &work;
            scope.spawn(move || pool.install(|| work(rank)));
        }
    });
    let mut errors = errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = cause_of(&mut errors) {
        return Err(error);
    }
    Ok(results.into_iter().filter_map(|result| lock(&result).take()).collect())
}

/// Does a rank's work, and makes a panic an error.
fn guarded<R>(rank: usize, work: impl FnOnce() -> Result<R>) -> Result<R> {
    panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panicked| {
        Err(Error::work(format!("rank {rank} panicked: {}", panic_message(&*panicked))))
    })
}

fn panic_message(panicked: &(dyn Any + Send)) -> &str {
    let text = panicked.downcast_ref::<&str>().copied();
    text.or_else(|| panicked.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown cause")
}

/// What a rank's error is to the others: what they know already, or the loss of the rank.
fn as_seen_by_others(rank: usize, error: &Error) -> ClusterError {
    ClusterError::of(error).cloned().unwrap_or_else(|| ClusterError::PeerLost {
        rank,
        during: String::new(),
        after: Duration::ZERO,
        cause: error.to_string(),
    })
}

/// Ranks that one process may have; each has a thread pool of its own.
const MOST_THREADS: usize = 1024;

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

pub(crate) fn resolve(address: &str) -> Result<SocketAddr> {
    let wrong = |why: String| Error::usage(format!("`{address}` is no address to meet at: {why}"));
    let mut found = address.to_socket_addrs().map_err(|e| wrong(e.to_string()).hint("it is HOST:PORT"))?;
    found.next().ok_or_else(|| wrong("no such host".into()))
}

pub(crate) fn listen(address: &str) -> Result<TcpListener> {
    let address = resolve(address)?;
    TcpListener::bind(address).map_err(|e| {
        let hint =
            format!("port {} may be another program's (`ss -ltnp` names it); choose another", address.port());
        Error::work(format!("cannot listen at {address}")).hint(hint).caused_by(e)
    })
}

/// Ends the process when a rank goes on for too long after the work of all has failed.
struct Watchdog {
    over: Arc<Mutex<bool>>,
}

/// How long a rank may take to notice that the work has failed.
const GRACE: Duration = Duration::from_secs(2);

impl Watchdog {
    fn start(failure: impl Fn() -> Option<ClusterError> + Send + 'static) -> Self {
        let over = Arc::new(Mutex::new(false));
        let watched = over.clone();
        std::thread::spawn(move || {
            let mut failed: Option<Instant> = None;
            loop {
                std::thread::sleep(GRACE / 40);
                let over = lock(&watched);
                if *over {
                    return;
                }
                let Some(failure) = failure() else { continue };
                if failed.get_or_insert_with(Instant::now).elapsed() > GRACE {
                    eprintln!("error: the ranks cannot go on: {failure}");
                    eprintln!("note: a rank of this process did not stop and was ended");
                    launch::end_children();
                    std::process::exit(1);
                }
            }
        });
        Self { over }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *lock(&self.over) = true;
    }
}
