//! `kiln btsbot watch`, `feed` and `simulate`

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use kiln_core::{Context, Error, ErrorKind, Result, write_atomic};
use kiln_data::write_csv;
use kiln_stream::{LogOptions, LogWriter};
#[cfg(feature = "nats")]
use kiln_stream::{NatsReader, NatsWriter, Subject};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::ReadArgs;
use crate::checkpoint::open;
use crate::filter::Filter;
use crate::follow_up::{DryRun, FollowUp, SkyPortal, Target, read_token};
use crate::packets::{find, visit};
use crate::policy::Policy;
use crate::simulate::{self, Season};
use crate::store::Store;
use crate::watch::{Packets, Round, Watch, Watcher, export, julian_date_now};

#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// Folder of packets to follow
    #[arg(long, value_name = "DIR")]
    #[cfg_attr(feature = "nats", arg(conflicts_with = "nats"))]
    packets: Option<PathBuf>,
    /// Log of packets to follow, in place of a folder: what `feed` appends to
    #[arg(long, value_name = "DIR", conflicts_with = "packets")]
    stream: Option<PathBuf>,
    #[cfg(feature = "nats")]
    #[command(flatten)]
    nats: NatsArgs,
    /// The name under which the server remembers how far this watch is
    #[cfg(feature = "nats")]
    #[arg(long, default_value = "kiln-btsbot", requires = "nats")]
    durable: String,
    /// Which sources become targets
    #[arg(long, default_value = "bts_p1")]
    policy: Policy,
    #[command(flatten)]
    reading: ReadArgs,
    #[command(flatten)]
    filter: Filter,
    /// File in which the watch remembers what it did
    #[arg(long, default_value = "watch.redb")]
    store: PathBuf,
    /// Take in what is there and end
    #[arg(long)]
    once: bool,
    /// Seconds between looks for packets
    #[arg(long, default_value_t = 5.0)]
    interval: f64,
    #[command(flatten)]
    request: RequestArgs,
    /// Folder to write at the end: scores.csv, requests.csv and rejected.csv
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A subject on a server of NATS.
#[cfg(feature = "nats")]
#[derive(Debug, Clone, Args)]
struct NatsArgs {
    /// NATS server with a stream of packets, in place of a folder or log, such as nats://localhost:4222
    #[arg(long, value_name = "URL", conflicts_with = "stream", requires = "subject")]
    nats: Option<String>,
    /// Subject of the packets
    #[arg(long, requires = "nats")]
    subject: Option<String>,
    /// File that holds the server's token
    #[arg(long, value_name = "FILE", requires = "nats")]
    nats_token_file: Option<PathBuf>,
}

#[cfg(feature = "nats")]
impl NatsArgs {
    fn subject(&self) -> Result<Option<Subject>> {
        let (Some(url), Some(name)) = (&self.nats, &self.subject) else { return Ok(None) };
        let token = self.nats_token_file.as_deref().map(|path| {
            fs::read_to_string(path).map(|token| token.trim().to_string()).map_err(Error::io("read", path))
        });
        Ok(Some(Subject { url: url.clone(), name: name.clone(), token: token.transpose()? }))
    }
}

/// Seconds after which the server sends a packet again that the watch has not kept.
#[cfg(feature = "nats")]
const AGAIN: Duration = Duration::from_secs(60);

/// Where requests go.
#[derive(Debug, Clone, Args)]
struct RequestArgs {
    /// Really send requests; without, the watch only says which it would send
    #[arg(long, requires_all = ["base", "allocation"])]
    live: bool,
    /// Address of the SkyPortal server
    #[arg(long, value_name = "URL")]
    base: Option<String>,
    /// Allocation of telescope time
    #[arg(long)]
    allocation: Option<u64>,
    /// Groups that see requests
    #[arg(long, value_delimiter = ',')]
    target_groups: Vec<u64>,
    /// Groups that see sources
    #[arg(long, value_delimiter = ',')]
    source_groups: Vec<u64>,
    /// What is to be observed
    #[arg(long, default_value = "IFU")]
    observation_type: String,
    /// More fields of the instrument's form, as a JSON object
    #[arg(long, value_name = "JSON")]
    payload: Option<String>,
    /// File that holds the token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Environment variable that holds it, in place of a file
    #[arg(long, default_value = "SKYPORTAL_TOKEN", value_name = "NAME")]
    token_env: String,
    /// The most requests of a night; the others wait
    #[arg(long, value_name = "N")]
    max_requests_per_night: Option<u64>,
    /// Seconds before a second attempt; twice as long before each that follows
    #[arg(long, default_value_t = 1.0)]
    first_wait: f64,
}

impl RequestArgs {
    fn follow_up(&self, cx: &Context) -> Result<Box<dyn FollowUp>> {
        let (true, Some(base), Some(allocation)) = (self.live, &self.base, self.allocation) else {
            return Ok(Box::new(DryRun));
        };
        let payload = self.payload.as_deref().unwrap_or("{}");
        let payload: Map<String, Value> = serde_json::from_str(payload).map_err(|e| {
            Error::usage("--payload is no JSON object").caused_by(e).hint("such as {\"exposure_time\": 1800}")
        })?;
        let target = Target {
            allocation,
            target_groups: self.target_groups.clone(),
            source_groups: self.source_groups.clone(),
            observation: self.observation_type.clone(),
            payload,
        };
        let token = read_token(self.token_file.as_deref(), &self.token_env)?;
        Ok(Box::new(SkyPortal::new(base, token, target, seconds("--first-wait", self.first_wait)?, cx)?))
    }

    fn mode(&self) -> String {
        match (&self.base, self.live) {
            (Some(base), true) => format!("live, {base}"),
            _ => "dry run".into(),
        }
    }
}

fn seconds(option: &str, value: f64) -> Result<Duration> {
    match Duration::try_from_secs_f64(value) {
        Ok(duration) if value <= 86_400.0 => Ok(duration),
        _ => Err(Error::usage(format!("{option} {value}")).hint("seconds, from 0 to 86400")),
    }
}

impl WatchArgs {
    fn source(&self) -> Result<Packets> {
        #[cfg(feature = "nats")]
        if let Some(subject) = self.nats.subject()? {
            return Ok(Packets::Nats(NatsReader::open(&subject, &self.durable, AGAIN)?));
        }
        let (folder, packets) = match (&self.packets, &self.stream) {
            (_, Some(log)) => (log, Packets::Stream(log.clone())),
            (Some(folder), None) => (folder, Packets::Folder(folder.clone())),
            (None, None) => {
                return Err(Error::usage("there is nothing to follow")
                    .hint("give --packets or --stream, or --nats where Kiln was built with it"));
            }
        };
        match folder.is_dir() {
            true => Ok(packets),
            false => Err(Error::input(folder.display(), "is no folder")),
        }
    }
}

pub(super) fn watch(args: &WatchArgs, cx: &Context) -> Result<()> {
    let (config, model) = open(&args.model, cx)?;
    let packets = args.source()?;
    let interval = seconds("--interval", args.interval)?;
    let follow_up = args.request.follow_up(cx)?;
    let watch = Watch {
        policy: args.policy.clone(),
        filter: args.filter.clone(),
        features: args.reading.options(config.features),
        most_requests: args.request.max_requests_per_night,
        now: julian_date_now,
    };
    let store = Store::open(&args.store, &args.request.mode())?;
    let reader = args.reading.reader()?;
    let watcher = Watcher {
        watch: &watch,
        config: &config,
        model: &model,
        reader: &reader,
        store: &store,
        follow_up: &*follow_up,
        cx,
    };
    if !follow_up.is_live() {
        cx.note("dry run: nothing is sent");
    }
    let mut round = Round::default();
    loop {
        match watcher.round(&packets) {
            Ok(next) => round = round.then(next),
            // To be stopped is how a watch ends.
            Err(error) if error.kind() == ErrorKind::Interrupted && !args.once => break,
            Err(error) => return Err(error),
        }
        if args.once || !wait(interval, cx) {
            break;
        }
    }
    if let Some(out) = &args.out {
        export(&store, out)?;
    }
    cx.emit(&json!({ "mode": args.request.mode(), "policy": watch.policy, "round": round }), |_| {
        summary(&round)
    })
}

fn summary(round: &Round) -> String {
    format!(
        "{} packets: {} alerts scored, {} rejected, {} seen before\n{} sources became targets; {} requested, {} refused, {} waiting\n",
        round.packets,
        round.scored,
        round.rejected,
        round.repeated,
        round.triggered,
        round.requested,
        round.refused,
        round.waiting
    )
}

#[derive(Debug, Args)]
pub(super) struct FeedArgs {
    /// Packets, archives of them, or folders of both
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    packets: Vec<PathBuf>,
    /// Log to append to; made where there is none
    #[arg(long, value_name = "DIR")]
    stream: Option<PathBuf>,
    #[cfg(feature = "nats")]
    #[command(flatten)]
    nats: NatsArgs,
    /// Packets a second at most, as a survey would send them [default: as fast as they go]
    #[arg(long)]
    rate: Option<f64>,
}

/// What packets are appended to.
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
enum Sink {
    Log(LogWriter),
    #[cfg(feature = "nats")]
    Subject(NatsWriter),
}

impl Sink {
    fn open(args: &FeedArgs, cx: &Context) -> Result<(Self, String)> {
        #[cfg(feature = "nats")]
        if let Some(subject) = args.nats.subject()? {
            return Ok((Self::Subject(NatsWriter::open(&subject)?), format!("subject {}", subject.name)));
        }
        let Some(folder) = &args.stream else {
            return Err(Error::usage("there is nothing to append to")
                .hint("give --stream, or --nats where Kiln was built with it"));
        };
        // Packets are still where they came from if the machine fails, so that the disk need not confirm each.
        let log = LogWriter::open(folder, LogOptions { sync_every: None, ..LogOptions::default() })?;
        if log.cut_off() > 0 {
            cx.note(format!("{} bytes of a record that was not whole were cut off", log.cut_off()));
        }
        Ok((Self::Log(log), folder.display().to_string()))
    }

    /// Appends a packet and returns its number.
    fn append(&mut self, packet: Vec<u8>) -> Result<u64> {
        match self {
            Self::Log(log) => log.append(&packet),
            #[cfg(feature = "nats")]
            Self::Subject(subject) => subject.append(packet),
        }
    }

    fn sync(&mut self) -> Result<()> {
        match self {
            Self::Log(log) => log.sync(),
            // A packet is the server's once it has a number.
            #[cfg(feature = "nats")]
            Self::Subject(_) => Ok(()),
        }
    }
}

/// Appends packets to a log or a subject, one a record.
pub(super) fn feed(args: &FeedArgs, cx: &Context) -> Result<()> {
    let pause = match args.rate {
        Some(rate) if rate.is_finite() && rate > 0.0 => seconds("--rate", rate.recip())?,
        Some(rate) => return Err(Error::usage(format!("--rate {rate}")).hint("packets a second, above 0")),
        None => Duration::ZERO,
    };
    let paths = find(&args.packets)?;
    let (mut sink, name) = Sink::open(args, cx)?;
    let (mut count, mut unreadable, mut end) = (0, 0, None);
    visit(&paths, |(name, bytes)| {
        match bytes {
            Ok(bytes) => {
                end = Some(sink.append(bytes)? + 1);
                count += 1;
            }
            Err(reason) => {
                unreadable += 1;
                cx.note(format!("left out: {name} {reason}"));
            }
        }
        match wait(pause, cx) {
            true => Ok(()),
            false => Err(Error::interrupted(format!("stopped after {count} packets"))),
        }
    })?;
    sink.sync()?;
    let result = json!({ "stream": name, "packets": count, "unreadable": unreadable, "end": end });
    cx.emit(&result, |_| format!("{count} packets appended to {name}\n"))
}

/// False when the user stopped.
fn wait(interval: Duration, cx: &Context) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < interval && !cx.interrupted() {
        thread::sleep(Duration::from_millis(20).min(interval));
    }
    !cx.interrupted()
}

#[derive(Debug, Args)]
pub(super) struct SimulateArgs {
    /// How many sources, of six kinds
    #[arg(long)]
    sources: usize,
    /// Mean limiting magnitude
    #[arg(long, default_value_t = Season::default().limit)]
    limit: f64,
    /// Median width of a star's image, in pixels
    #[arg(long, default_value_t = Season::default().fwhm)]
    fwhm: f64,
    /// Folder to write: packets/ and sources.csv
    #[arg(long)]
    out: PathBuf,
}

/// A row of sources.csv.
#[derive(Serialize)]
struct SourceRow {
    #[serde(rename = "objectId")]
    object_id: String,
    label: u8,
    kind: &'static str,
    alerts: usize,
    brightest: f64,
}

pub(super) fn simulate(args: &SimulateArgs, cx: &Context) -> Result<()> {
    if args.sources == 0 || args.sources > 1_000_000 {
        return Err(Error::usage(format!("--sources {}", args.sources)).hint("from 1 to 1000000"));
    }
    if !((15.0..25.0).contains(&args.limit) && (1.0..10.0).contains(&args.fwhm)) {
        return Err(Error::usage("--limit must lie between 15 and 25, --fwhm between 1 and 10"));
    }
    let packets = args.out.join("packets");
    if args.out.join("sources.csv").exists() {
        return Err(Error::usage(format!("{} already holds a simulation", args.out.display())));
    }
    fs::create_dir_all(&packets).map_err(Error::io("create", &packets))?;
    let season = Season { limit: args.limit, fwhm: args.fwhm };
    let bar = cx.progress(args.sources as u64, "observing");
    let numbers: Vec<usize> = (0..args.sources).collect();
    let (mut rows, mut count) = (Vec::new(), 0);
    for part in numbers.chunks(64) {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before all sources were observed"));
        }
        let observed: Vec<Option<SourceRow>> = part
            .par_iter()
            .map(|&number| -> Result<Option<SourceRow>> {
                let source = simulate::source(number, &season, "survey", cx);
                for at in 0..source.alerts.len() {
                    let alert = source.with_stamps(at, cx);
                    write_atomic(&packets.join(format!("{}.avro", alert.candid)), &alert.to_avro())?;
                }
                Ok((!source.alerts.is_empty()).then(|| SourceRow {
                    label: u8::from(source.label()),
                    kind: source.kind.name(),
                    alerts: source.alerts.len(),
                    brightest: source.alerts.iter().map(|alert| alert.magpsf).fold(f64::INFINITY, f64::min),
                    object_id: source.object_id,
                }))
            })
            .collect::<Result<_>>()?;
        rows.extend(observed.into_iter().flatten());
        bar.inc(part.len() as u64);
    }
    rows.iter().for_each(|row: &SourceRow| count += row.alerts);
    write_csv(&args.out.join("sources.csv"), &rows)?;
    let bright = rows.iter().filter(|row| row.label == 1).count();
    let result =
        json!({ "out": args.out, "sources": rows.len(), "bright_transients": bright, "alerts": count });
    cx.emit(&result, |_| {
        format!(
            "{count} alerts of {} sources, {bright} of them bright transients, in {}\n",
            rows.len(),
            args.out.display()
        )
    })
}
