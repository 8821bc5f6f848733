//! Ranks as processes of this machine: starting them, passing on what they print, and ending them together.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kiln_core::{Error, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::communicator::lock;
use crate::error::ClusterError;
use crate::run::{listen, resolve};
use crate::tcp::keeper::{Keeper, Terms, reachable};

/// The shared secret, in the environment of ranks and of who starts them.
pub(crate) const TOKEN: &str = "KILN_CLUSTER_TOKEN";
const RANK: &str = "KILN_RANK";
const RANKS: &str = "KILN_RANKS";
const RENDEZVOUS: &str = "KILN_RENDEZVOUS";
const RUN: &str = "KILN_RUN";
const LOCAL: &str = "KILN_LOCAL_RANKS";

/// What a process is told about the rank that it is, through its environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Appointed {
    pub rank: usize,
    pub ranks: usize,
    pub rendezvous: String,
    pub run: Option<String>,
    /// Ranks on this machine, which share its cores.
    pub local: usize,
}

/// What this process was told, when somebody started it as a rank.
pub(crate) fn appointed() -> Result<Option<Appointed>> {
    let Ok(rank) = std::env::var(RANK) else { return Ok(None) };
    let text = |name: &str| {
        std::env::var(name).map_err(|_| {
            Error::usage(format!("${RANK} is set, but ${name} is not"))
                .hint("ranks are started by `kiln launch`, which sets both")
        })
    };
    let number = |name: &str, text: String| {
        text.parse::<usize>().map_err(|_| Error::usage(format!("${name} is `{text}`, not a number")))
    };
    let ranks = number(RANKS, text(RANKS)?)?;
    let rank = number(RANK, rank)?;
    if rank >= ranks {
        return Err(Error::usage(format!("${RANK} is {rank}, but there are only {ranks} ranks")));
    }
    let local = std::env::var(LOCAL).map_or(Ok(ranks), |text| number(LOCAL, text))?;
    let rendezvous = text(RENDEZVOUS)?;
    Ok(Some(Appointed { rank, ranks, rendezvous, run: std::env::var(RUN).ok(), local: local.max(1) }))
}

/// How many ranks this process is one of, where `kiln launch` or Open MPI's `mpirun` has started it.
pub fn started_ranks() -> Option<usize> {
    let told = |name: &str| std::env::var(name).ok()?.parse().ok();
    told(RANKS).or_else(|| told("OMPI_COMM_WORLD_SIZE"))
}

/// Fails when this process has already run something on ranks that are processes.
pub(crate) fn only_once() -> Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) {
        return Err(Error::usage("a command can start ranks in processes only once")
            .hint("this one needs --backend threads"));
    }
    Ok(())
}

/// Sixteen random letters and digits.
pub(crate) fn random_word() -> Result<String> {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).map_err(|e| Error::work(format!("the system has no random numbers: {e}")))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What is passed on of what ranks print, each line with the rank before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Everything,
    /// Only stderr.
    Errors,
}

/// The processes of ranks, and a thread that looks after them.
pub(crate) struct Supervisor {
    state: Arc<Mutex<State>>,
    thread: JoinHandle<Option<Ended>>,
}

#[derive(Default)]
struct State {
    /// No rank has to wait for this process any more.
    own_part_done: bool,
    own_part_failed: bool,
}

/// How the first rank that failed has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub rank: usize,
    pub status: ExitStatus,
}

impl Ended {
    /// As a shell tells it: the exit code, or 128 and the signal.
    pub fn code(&self) -> u8 {
        let signal = self.status.signal().map(|signal| 128 + signal);
        self.status.code().or(signal).and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
    }

    fn told(&self) -> String {
        match self.status.signal() {
            Some(signal) => {
                let name = Signal::try_from(signal).map_or("signal", Signal::as_str);
                format!("its process was ended by {name} ({signal})")
            }
            None => format!("its process ended with exit code {}", self.code()),
        }
    }
}

/// Ranks to be started as processes of this machine.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Ranks in all, on whatever machines.
    pub ranks: usize,
    /// Those of this machine. Whoever starts rank 0 lets the others in.
    pub local: Range<usize>,
    /// Where the ranks meet, `HOST:PORT`; a free port of this machine when all ranks are its own.
    pub rendezvous: Option<String>,
    /// How long to wait for ranks that do not come or give no sign of life.
    pub timeout: Duration,
    /// The shared secret; one of its own when all ranks are this machine's.
    pub token: Option<String>,
}

/// Starts this program with `arguments` once for every rank of this machine, each line of their output with the rank
/// before it, and waits for their end; gives the first exit code that is not zero.
///
/// # Errors
/// When there are no such ranks, the meeting point cannot be had, or a process cannot be started.
pub fn launch(what: &Launch, arguments: &[OsString], interrupted: Arc<AtomicBool>) -> Result<u8> {
    let Launch { ranks, local, timeout, .. } = what;
    if local.is_empty() || local.end > *ranks {
        let found = format!("ranks {} to {} of {ranks} cannot be started", local.start, local.end);
        return Err(
            Error::usage(found).hint("there is at least one, and the last is one less than their number")
        );
    }
    let all_here = local.len() == *ranks;
    let address = match &what.rendezvous {
        Some(address) => address.as_str(),
        None if all_here => "127.0.0.1:0",
        None => return Err(Error::usage("ranks of several machines need a --rendezvous HOST:PORT")),
    };
    let token = match what.token.clone().or_else(|| std::env::var(TOKEN).ok()) {
        Some(token) => token,
        None if all_here => random_word()?,
        None => {
            return Err(Error::usage("ranks of several machines need a --cluster-token")
                .hint(format!("any text that is the same on all of them, also in ${TOKEN}")));
        }
    };
    let keeper = (local.start == 0)
        .then(|| -> Result<Keeper> {
            let terms = Terms { ranks: *ranks, run: random_word()?, token: token.clone(), timeout: *timeout };
            Keeper::start(listen(address)?, terms).map_err(|e| Error::work("cannot listen").caused_by(e))
        })
        .transpose()?;
    let rendezvous = match &keeper {
        Some(keeper) => reachable(keeper.address()),
        None => resolve(address)?,
    };
    let appointed = local.clone().map(|rank| Appointed {
        rank,
        ranks: *ranks,
        rendezvous: rendezvous.to_string(),
        run: None,
        local: local.len(),
    });
    let appointed: Vec<Appointed> = appointed.collect();
    let supervisor =
        Supervisor::start(&appointed, arguments, &token, Output::Everything, keeper, interrupted)?;
    Ok(supervisor.outcome(false).map_or(0, |ended| ended.code()))
}

/// How long ranks may take to end when one of them has failed.
const GRACE: Duration = Duration::from_secs(4);

/// Processes to be ended when this one ends in haste.
static CHILDREN: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Ends all processes that this one has started as ranks.
pub(crate) fn end_children() {
    for &child in lock(&CHILDREN).iter() {
        _ = kill(child, Signal::SIGKILL);
    }
}

impl Supervisor {
    /// Starts this program with `arguments` once for every rank.
    pub fn start(
        ranks: &[Appointed],
        arguments: &[OsString],
        token: &str,
        output: Output,
        keeper: Option<Keeper>,
        interrupted: Arc<AtomicBool>,
    ) -> Result<Self> {
        let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
        let mut children = Vec::new();
        for appointed in ranks {
            let mut command = Command::new(&program);
            command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
            command.stdout(if output == Output::Everything { Stdio::piped() } else { Stdio::null() });
            command.env(RANK, appointed.rank.to_string()).env(RANKS, appointed.ranks.to_string());
            command.env(RENDEZVOUS, &appointed.rendezvous).env(LOCAL, appointed.local.to_string());
            command.env(TOKEN, token);
            if let Some(run) = &appointed.run {
                command.env(RUN, run);
            }
            // Apart from the terminal's group: Ctrl-C reaches this process, which passes it on once.
            command.process_group(0);
            match command.spawn() {
                Ok(child) => children.push((appointed.rank, child)),
                Err(e) => {
                    end(&mut children);
                    let what = format!("cannot start {} as rank {}", program.display(), appointed.rank);
                    return Err(Error::work(what).caused_by(e));
                }
            }
        }
        let mut printing = Vec::new();
        for (rank, child) in &mut children {
            lock(&CHILDREN).push(pid(child));
            printing.extend(child.stdout.take().map(|stdout| pass_on(*rank, stdout, std::io::stdout)));
            printing.extend(child.stderr.take().map(|stderr| pass_on(*rank, stderr, std::io::stderr)));
        }
        let state = Arc::<Mutex<State>>::default();
        let watched = state.clone();
        let thread = thread::spawn(move || {
            let ended = watch(children, &watched, keeper.as_ref(), &interrupted);
            for printer in printing {
                _ = printer.join();
            }
            ended
        });
        Ok(Self { state, thread })
    }

    /// Waits for all ranks to end. When this process's own part has failed, they get a moment and are then ended.
    pub fn finish(self, failed: bool) -> Result<()> {
        match self.outcome(failed) {
            None => Ok(()),
            Some(ended) => Err(Error::work(format!("rank {}: {}", ended.rank, ended.told()))),
        }
    }

    /// The same, as it is told to who started this process.
    pub fn outcome(self, failed: bool) -> Option<Ended> {
        *lock(&self.state) = State { own_part_done: true, own_part_failed: failed };
        self.thread.join().unwrap_or_default()
    }
}

/// Looks after processes until all have ended; gives the first that failed, or before that one that was killed, since the
/// others fail for want of it and may be seen first.
fn watch(
    mut children: Vec<(usize, Child)>,
    state: &Mutex<State>,
    keeper: Option<&Keeper>,
    interrupted: &AtomicBool,
) -> Option<Ended> {
    let mut first: Option<Ended> = None;
    let mut ending: Option<Instant> = None;
    let mut passed_on = false;
    while !children.is_empty() || !lock(state).own_part_done {
        children.retain_mut(|(rank, child)| {
            let Ok(Some(status)) = child.try_wait() else { return true };
            lock(&CHILDREN).retain(|&other| other != pid(child));
            if !status.success() {
                let ended = Ended { rank: *rank, status };
                if let Some(keeper) = keeper {
                    keeper.fail(ClusterError::PeerLost {
                        rank: *rank,
                        during: String::new(),
                        after: Duration::ZERO,
                        cause: ended.told(),
                    });
                }
                let is_cause =
                    |known: &Ended| known.status.signal().is_none() && ended.status.signal().is_some();
                if first.as_ref().is_none_or(is_cause) {
                    first = Some(ended);
                }
            }
            false
        });
        if interrupted.load(Ordering::Relaxed) && !passed_on {
            passed_on = true;
            for (_, child) in &children {
                _ = kill(pid(child), Signal::SIGINT);
            }
        }
        let failed = first.is_some() || lock(state).own_part_failed;
        if failed && ending.get_or_insert_with(Instant::now).elapsed() > GRACE {
            end(&mut children);
        }
        thread::sleep(Duration::from_millis(10));
    }
    first
}

fn end(children: &mut [(usize, Child)]) {
    for (_, child) in children {
        _ = child.kill();
        _ = child.wait();
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

/// Writes every line of a rank's output with the rank before it.
fn pass_on<W: Write + 'static>(
    rank: usize,
    from: impl Read + Send + 'static,
    to: fn() -> W,
) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n') {
            let Ok(line) = line else { break };
            let mut prefixed = format!("[rank {rank}] ").into_bytes();
            prefixed.extend(line);
            prefixed.push(b'\n');
            _ = to().write_all(&prefixed);
        }
    })
}
