//! From packets to requests: a folder, a log or a subject of NATS is followed, its alerts are scored, and sources that a policy picks get a request.
//!
//! A batch of packets is kept as a whole with all that comes of it, the requests included, before anything is sent; each
//! request is marked as sent before it is. Killed at any moment, a watch goes on where it was: what may have been sent is
//! looked for on the other side first, so that every source gets exactly one request.

use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use kiln_core::{Context, Error, Result};
use kiln_stream::LogReader;
#[cfg(feature = "nats")]
use kiln_stream::NatsReader;
use serde::Serialize;

use crate::checkpoint::Config;
use crate::dataset::{About, Dataset, Rejected};
use crate::features::{FeatureOptions, features};
use crate::filter::Filter;
use crate::follow_up::{FollowUp, Outcome, Request};
use crate::model::MmCnn;
use crate::packet::{Alert, AlertReader};
use crate::packets::{Packet, is_packets, rejected, triplet, visit};
use crate::policy::Policy;
use crate::scores::Scored;
use crate::store::{Batch, KeptRequest, RequestState, SourceState, Store};
use crate::train;

/// Packets that are kept together,
const BATCH: usize = 64;
/// and files whose names are in memory.
const MOST_NAMES: usize = 4096;

/// How a watch works.
#[derive(Debug, Clone)]
pub struct Watch {
    /// Which sources become targets.
    pub policy: Policy,
    /// Which alerts are scored.
    pub filter: Filter,
    /// How features are made.
    pub features: FeatureOptions,
    /// The most requests of a night.
    pub most_requests: Option<u64>,
    /// The time now, as a Julian date: what night it is.
    pub now: fn() -> f64,
}

/// Where packets come from.
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Packets {
    /// A folder into which they are put.
    Folder(PathBuf),
    /// A log to which they are appended, a packet a record; see [`kiln_stream`].
    Stream(PathBuf),
    /// A subject of NATS JetStream, a packet a message.
    #[cfg(feature = "nats")]
    Nats(NatsReader),
}

/// What a round came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Round {
    /// Packets that were new.
    pub packets: usize,
    /// Alerts with a score,
    pub scored: usize,
    /// without,
    pub rejected: usize,
    /// and those seen before.
    pub repeated: usize,
    /// Sources that became targets.
    pub triggered: usize,
    /// Requests that stand now, or would be sent,
    pub requested: usize,
    /// that were refused,
    pub refused: usize,
    /// and that wait for a better moment.
    pub waiting: usize,
}

impl Round {
    /// Both together; what waits is what waits after the later one.
    pub fn then(self, later: Self) -> Self {
        Self {
            packets: self.packets + later.packets,
            scored: self.scored + later.scored,
            rejected: self.rejected + later.rejected,
            repeated: self.repeated + later.repeated,
            triggered: self.triggered + later.triggered,
            requested: self.requested + later.requested,
            refused: self.refused + later.refused,
            waiting: later.waiting,
        }
    }
}

/// A watch under way.
pub struct Watcher<'a> {
    /// How it works.
    pub watch: &'a Watch,
    /// The network and its settings.
    pub config: &'a Config,
    /// See `config`.
    pub model: &'a MmCnn,
    /// Reads packets.
    pub reader: &'a AlertReader,
    /// What it remembers.
    pub store: &'a Store,
    /// Where requests go.
    pub follow_up: &'a dyn FollowUp,
    /// Device, and the request to stop.
    pub cx: &'a Context,
}

impl Watcher<'_> {
    /// Takes in what is new, and sends what there is to send.
    ///
    /// # Errors
    /// When the packets cannot be read, the store fails, or the user stopped; whatever was done is kept.
    pub fn round(&self, packets: &Packets) -> Result<Round> {
        // First what an earlier run left.
        let round = self.send()?;
        match packets {
            Packets::Folder(folder) => self.round_of_folder(folder, round),
            Packets::Stream(log) => self.round_of_stream(log, round),
            #[cfg(feature = "nats")]
            Packets::Nats(subject) => self.round_of_subject(subject, round),
        }
    }

    /// Records are taken in from where the store says that they were last read, so that none is lost; what was read twice,
    /// the store knows by its candid.
    fn round_of_stream(&self, log: &Path, mut round: Round) -> Result<Round> {
        // A log is known by where it is, however it was called.
        let place = log.canonicalize().map_err(Error::io("read", log))?.display().to_string();
        let mut reader = LogReader::open(log, self.store.file_size(&place)?.unwrap_or(0))?;
        loop {
            let mut packets: Vec<Packet> = Vec::new();
            while packets.len() < BATCH
                && let Some(record) = reader.next_record()?
            {
                packets.push((format!("{place}, record {}", record.offset), Ok(record.payload)));
            }
            if packets.is_empty() {
                return Ok(round);
            }
            round = round.then(self.score(packets, vec![(place.clone(), reader.offset())])?);
            round = round.then(self.send()?);
            if self.cx.interrupted() {
                return Err(Error::interrupted("stopped; what was done is kept"));
            }
        }
    }

    /// Messages are acknowledged once all that comes of them is kept, so that none is lost; one that comes twice, the store
    /// knows by its candid.
    #[cfg(feature = "nats")]
    fn round_of_subject(&self, subject: &NatsReader, mut round: Round) -> Result<Round> {
        loop {
            let (records, receipts) = subject.take(BATCH)?;
            if records.is_empty() {
                if !subject.is_connected() {
                    self.cx.note(format!("{}: no connection; it is tried again", subject.place()));
                }
                return Ok(round);
            }
            let name = |offset: u64| format!("{}, message {offset}", subject.place());
            let packets =
                records.into_iter().map(|record| (name(record.offset), Ok(record.payload))).collect();
            round = round.then(self.score(packets, Vec::new())?);
            subject.acknowledge(receipts);
            round = round.then(self.send()?);
            if self.cx.interrupted() {
                return Err(Error::interrupted("stopped; what was done is kept"));
            }
        }
    }

    fn round_of_folder(&self, folder: &Path, mut round: Round) -> Result<Round> {
        loop {
            let files = self.new_files(folder)?;
            if files.is_empty() {
                return Ok(round);
            }
            for part in files.chunks(BATCH) {
                round = round.then(self.take_in(part)?);
                round = round.then(self.send()?);
                if self.cx.interrupted() {
                    return Err(Error::interrupted("stopped; what was done is kept"));
                }
            }
        }
    }

    /// Files that are new, or have another size than when they were read, the first by name.
    fn new_files(&self, folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
        let mut first: BinaryHeap<(PathBuf, u64)> = BinaryHeap::new();
        for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            if !is_packets(&path) {
                continue;
            }
            // A file that is gone by now is none.
            let Ok(about) = fs::metadata(&path) else { continue };
            if about.is_file() && self.store.file_size(&path.display().to_string())? != Some(about.len()) {
                first.push((path, about.len()));
                if first.len() > MOST_NAMES {
                    first.pop();
                }
            }
        }
        Ok(first.into_sorted_vec())
    }

    /// Reads some files and keeps what comes of them.
    fn take_in(&self, files: &[(PathBuf, u64)]) -> Result<Round> {
        let mut round = Round::default();
        let mut packets = Vec::new();
        let paths: Vec<PathBuf> = files.iter().map(|(path, _)| path.clone()).collect();
        visit(&paths, |packet| {
            packets.push(packet);
            if packets.len() == BATCH {
                // Part of an archive: the file itself counts as read when all of it is.
                round = round.then(self.score(std::mem::take(&mut packets), Vec::new())?);
                if self.cx.interrupted() {
                    return Err(Error::interrupted("stopped; what was done is kept"));
                }
            }
            Ok(())
        })?;
        let read = files.iter().map(|(path, size)| (path.display().to_string(), *size)).collect();
        Ok(round.then(self.score(packets, read)?))
    }

    /// Scores the alerts of some packets, and keeps them with `files` as read.
    fn score(&self, packets: Vec<Packet>, files: Vec<(String, u64)>) -> Result<Round> {
        let mut round = Round { packets: packets.len(), ..Round::default() };
        let mut batch = Batch { files, ..Batch::default() };
        let mut alerts: Vec<(String, Alert)> = Vec::new();
        let mut here = HashSet::new();
        for (file, bytes) in packets {
            let read = match bytes {
                Ok(bytes) => self.reader.read(&bytes),
                Err(reason) => {
                    batch.rejected.push(rejected(file, None, None, reason));
                    continue;
                }
            };
            for alert in read {
                match alert {
                    Err(fault) => {
                        batch.rejected.push(rejected(
                            file.clone(),
                            fault.object_id,
                            fault.candid,
                            fault.reason,
                        ));
                    }
                    Ok(alert) if self.store.has_alert(alert.candid)? || !here.insert(alert.candid) => {
                        round.repeated += 1;
                    }
                    Ok(alert) => alerts.push((file.clone(), alert)),
                }
            }
        }
        alerts.sort_by(|(_, a), (_, b)| a.jd.total_cmp(&b.jd).then(a.candid.cmp(&b.candid)));
        batch.alerts = alerts.iter().map(|(_, alert)| alert.candid).collect();
        let mut sources: HashMap<String, SourceState> = HashMap::new();
        let mut data = Dataset::empty(self.config.network.side);
        let mut places: Vec<Place> = Vec::new();
        for (file, alert) in alerts {
            let object = alert.object_id.clone();
            if let Some(reason) = self.watch.filter.refusal(&alert) {
                batch.rejected.push(rejected(file, Some(object), Some(alert.candid), reason));
                continue;
            }
            let state = match sources.get_mut(&object) {
                Some(state) => state,
                None => {
                    let known = self.store.source(&object)?.unwrap_or_default();
                    sources.entry(object.clone()).or_insert(known)
                }
            };
            let mut history = state.history();
            let derived = history.push(&alert, self.watch.features.history);
            state.keep(&history);
            let input = features(&alert, &derived, self.watch.features.drb_missing)
                .and_then(|features| Ok((triplet(&alert)?, features)));
            match input {
                Ok((triplet, features)) => {
                    places.push(Place {
                        ra: alert.number("ra").unwrap_or(f64::NAN),
                        dec: alert.number("dec").unwrap_or(f64::NAN),
                        age: derived.age,
                    });
                    let (jd, magpsf) = (alert.jd, alert.magpsf);
                    let about = About {
                        object_id: object,
                        candid: alert.candid.to_string(),
                        jd,
                        magpsf,
                        label: None,
                    };
                    data.push(&triplet, features, about);
                }
                Err(reason) => batch.rejected.push(rejected(file, Some(object), Some(alert.candid), reason)),
            }
        }
        let all: Vec<usize> = (0..data.len()).collect();
        let quiet = Context { output: kiln_core::OutputMode::Quiet, ..self.cx.clone() };
        let scores = train::predict(self.model, &data, &all, self.config.temperature, &quiet)?;
        let mut triggered: BTreeMap<String, KeptRequest> = BTreeMap::new();
        for (scored, place) in data.scored(&all, &scores).into_iter().zip(places) {
            let Some(state) = sources.get_mut(&scored.object_id) else { continue };
            let at = state.alerts.partition_point(|alert| alert.jd <= scored.jd);
            state.alerts.insert(at, scored.clone());
            let so_far: Vec<&Scored> = state.alerts.iter().collect();
            if self.watch.policy.trigger(&so_far).is_none()
                || triggered.contains_key(&scored.object_id)
                || self.store.request(&scored.object_id)?.is_some()
            {
                continue;
            }
            let request = Request {
                object_id: scored.object_id.clone(),
                ra: place.ra,
                dec: place.dec,
                jd: scored.jd,
                magpsf: scored.magpsf,
                score: scored.score,
                age: place.age,
                policy: self.watch.policy.name.clone(),
            };
            self.cx.note(format!(
                "{}: target by alert {} of magnitude {:.2}, score {:.3}",
                scored.object_id, scored.candid, scored.magpsf, scored.score
            ));
            let kept = KeptRequest { request, state: RequestState::Pending, answer: String::new() };
            triggered.insert(scored.object_id, kept);
        }
        (round.scored, round.rejected, round.triggered) = (data.len(), batch.rejected.len(), triggered.len());
        batch.sources = sources.into_iter().collect();
        batch.requests = triggered.into_values().collect();
        self.store.keep(&batch)?;
        Ok(round)
    }

    /// Sends what is to be sent.
    fn send(&self) -> Result<Round> {
        let mut round = Round::default();
        let night = ((self.watch.now)()).floor() as i64;
        for mut kept in self.store.open_requests()? {
            if self.cx.interrupted() {
                return Err(Error::interrupted("stopped; what was done is kept"));
            }
            if !self.follow_up.is_live() {
                kept.state = RequestState::Dry;
                self.store.keep_request(&kept)?;
                round.requested += 1;
                continue;
            }
            let outcome = if kept.state == RequestState::Sent {
                match self.follow_up.stands(&kept.request)? {
                    Ok(true) => Outcome::Acknowledged,
                    Ok(false) => self.follow_up.send(&kept.request)?,
                    Err(reason) => Outcome::Unknown(reason),
                }
            } else if self.store.take_turn(&kept, night, self.watch.most_requests)? {
                self.follow_up.send(&kept.request)?
            } else {
                round.waiting += 1;
                continue;
            };
            (kept.state, kept.answer) = match outcome {
                Outcome::Acknowledged => (RequestState::Acknowledged, String::new()),
                Outcome::Dry => (RequestState::Dry, String::new()),
                Outcome::Refused(reason) => (RequestState::Refused, reason),
                Outcome::Unknown(reason) => (RequestState::Sent, reason),
            };
            let name = &kept.request.object_id;
            match kept.state {
                RequestState::Acknowledged | RequestState::Dry => round.requested += 1,
                RequestState::Refused => {
                    round.refused += 1;
                    self.cx.note(format!("{name}: refused with {}", kept.answer));
                }
                RequestState::Pending | RequestState::Sent => {
                    round.waiting += 1;
                    self.cx.note(format!("{name}: not yet requested, the server {}", kept.answer));
                }
            }
            self.store.keep_request(&kept)?;
        }
        Ok(round)
    }
}

/// Where a source is, and how old.
struct Place {
    ra: f64,
    dec: f64,
    age: f64,
}

/// The time by this machine's clock, as a Julian date.
pub fn julian_date_now() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    2_440_587.5 + since.as_secs_f64() / 86_400.0
}

/// Writes the requests and the alerts that could not be used, and the scores, as tables.
///
/// # Errors
/// When the store fails or a file cannot be written.
pub fn export(store: &Store, out: &Path) -> Result<()> {
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let mut scores = Rows::create(out.join("scores.csv"))?;
    store.each_source(|_, state| state.alerts.iter().try_for_each(|alert| scores.push(alert)))?;
    scores.finish()?;
    let mut requests = Rows::create(out.join("requests.csv"))?;
    store.each_request(|kept| requests.push(RequestRow::of(&kept)))?;
    requests.finish()?;
    let mut lost = Rows::create(out.join("rejected.csv"))?;
    store.each_rejected(|rejected: Rejected| lost.push(rejected))?;
    lost.finish()
}

/// A row of requests.csv.
#[derive(Serialize)]
struct RequestRow {
    #[serde(rename = "objectId")]
    object_id: String,
    state: RequestState,
    jd: f64,
    magpsf: f64,
    score: f64,
    age: f64,
    priority: u8,
    policy: String,
    answer: String,
}

impl RequestRow {
    fn of(kept: &KeptRequest) -> Self {
        let request = &kept.request;
        Self {
            object_id: request.object_id.clone(),
            state: kept.state,
            jd: request.jd,
            magpsf: request.magpsf,
            score: request.score,
            age: request.age,
            priority: request.priority(),
            policy: request.policy.clone(),
            answer: kept.answer.clone(),
        }
    }
}

/// A table that is written row by row and has its name once it is whole.
struct Rows {
    path: PathBuf,
    partial: PathBuf,
    writer: csv::Writer<fs::File>,
}

impl Rows {
    fn create(path: PathBuf) -> Result<Self> {
        let partial = path.with_extension("csv.partial");
        let file = fs::File::create(&partial).map_err(Error::io("create", &partial))?;
        Ok(Self { writer: csv::Writer::from_writer(file), path, partial })
    }

    fn push(&mut self, row: impl Serialize) -> Result<()> {
        let failed =
            |e: csv::Error| Error::work(format!("cannot write {}", self.partial.display())).caused_by(e);
        self.writer.serialize(row).map_err(failed)
    }

    fn finish(mut self) -> Result<()> {
        self.writer.flush().map_err(Error::io("write", &self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(Error::io("rename", &self.partial))
    }
}
