//! What a watch remembers: alerts seen, sources with their histories and scores, requests. It survives being killed.

use std::path::Path;

use kiln_core::{Error, Result};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::dataset::Rejected;
use crate::features::SourceHistory;
use crate::follow_up::Request;
use crate::packet::Detection;
use crate::scores::Scored;

const FILES: TableDefinition<'_, &str, u64> = TableDefinition::new("files");
const ALERTS: TableDefinition<'_, i64, ()> = TableDefinition::new("alerts");
const SOURCES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sources");
const REQUESTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("requests");
const REJECTED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("rejected");
const SENT: TableDefinition<'_, i64, u64> = TableDefinition::new("sent by night");
const SETTINGS: TableDefinition<'_, &str, &str> = TableDefinition::new("settings");

/// Bytes of the store that are in memory, however large it is.
const CACHE: usize = 64 << 20;

/// A source so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceState {
    /// Detections: Julian date, filter, magnitude.
    pub detections: Vec<(f64, i64, f64)>,
    /// Scored alerts.
    pub alerts: Vec<Scored>,
}

impl SourceState {
    /// The history of the source.
    pub fn history(&self) -> SourceHistory {
        let detection = |&(jd, fid, magpsf): &(f64, i64, f64)| Detection { jd, fid, magpsf };
        SourceHistory::new(self.detections.iter().map(detection).collect())
    }

    /// Keeps the history of the source.
    pub fn keep(&mut self, history: &SourceHistory) {
        self.detections = history.detections().iter().map(|d| (d.jd, d.fid, d.magpsf)).collect();
    }
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequestState {
    /// To be sent.
    Pending,
    /// It may have been sent.
    Sent,
    /// It stands.
    Acknowledged,
    /// The other side does not want it.
    Refused,
    /// It was only said that it would be sent.
    Dry,
}

/// A request and how far it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeptRequest {
    /// The request.
    pub request: Request,
    /// How far it is.
    pub state: RequestState,
    /// What the other side last said.
    pub answer: String,
}

/// The store of a watch.
pub struct Store {
    database: Database,
    place: String,
}

impl Store {
    /// Opens a store, or makes one. A store belongs to one way of working, which `mode` names.
    ///
    /// # Errors
    /// When the file is no store, another program has it open, or it belongs to another mode.
    pub fn open(path: &Path, mode: &str) -> Result<Self> {
        let place = path.display().to_string();
        let database = Database::builder().set_cache_size(CACHE).create(path).map_err(|e| {
            Error::input(&place, "cannot be opened as a store")
                .caused_by(e)
                .hint("is another watch running on it? A damaged store must be moved away")
        })?;
        let store = Self { database, place };
        let write = store.begin()?;
        // Tables are made where they are not there, so that reading needs not ask.
        store.check(write.open_table(FILES).map(drop))?;
        store.check(write.open_table(ALERTS).map(drop))?;
        store.check(write.open_table(SOURCES).map(drop))?;
        store.check(write.open_table(REQUESTS).map(drop))?;
        store.check(write.open_table(REJECTED).map(drop))?;
        store.check(write.open_table(SENT).map(drop))?;
        {
            let mut settings = store.check(write.open_table(SETTINGS))?;
            let known = store.check(settings.get("mode"))?.map(|mode| mode.value().to_string());
            match known {
                Some(known) if known != mode => {
                    return Err(Error::usage(format!(
                        "{} belongs to a watch in mode {known}, not {mode}",
                        store.place
                    ))
                    .hint("use another --store, so that what was only tried is not taken for sent"));
                }
                _ => store.check(settings.insert("mode", mode)).map(drop)?,
            }
        }
        store.check(write.commit())?;
        Ok(store)
    }

    fn check<T, E: Into<redb::Error>>(&self, result: std::result::Result<T, E>) -> Result<T> {
        result.map_err(|e| Error::work(format!("the store {} has failed", self.place)).caused_by(e.into()))
    }

    fn begin(&self) -> Result<WriteTransaction> {
        self.check(self.database.begin_write())
    }

    fn value<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        serde_json::from_slice(bytes)
            .map_err(|e| Error::input(&self.place, "holds a damaged entry").caused_by(e))
    }

    /// The size that a file had when it was read.
    pub fn file_size(&self, name: &str) -> Result<Option<u64>> {
        let read = self.check(self.database.begin_read())?;
        let table = self.check(read.open_table(FILES))?;
        Ok(self.check(table.get(name))?.map(|size| size.value()))
    }

    /// Whether an alert was seen.
    pub fn has_alert(&self, candid: i64) -> Result<bool> {
        let read = self.check(self.database.begin_read())?;
        let table = self.check(read.open_table(ALERTS))?;
        Ok(self.check(table.get(candid))?.is_some())
    }

    /// A source so far.
    pub fn source(&self, object_id: &str) -> Result<Option<SourceState>> {
        let read = self.check(self.database.begin_read())?;
        let table = self.check(read.open_table(SOURCES))?;
        let bytes = self.check(table.get(object_id))?;
        bytes.map(|bytes| self.value(bytes.value())).transpose()
    }

    /// The request for a source.
    pub fn request(&self, object_id: &str) -> Result<Option<KeptRequest>> {
        let read = self.check(self.database.begin_read())?;
        let table = self.check(read.open_table(REQUESTS))?;
        let bytes = self.check(table.get(object_id))?;
        bytes.map(|bytes| self.value(bytes.value())).transpose()
    }

    /// The requests that are not settled.
    pub fn open_requests(&self) -> Result<Vec<KeptRequest>> {
        let mut open = Vec::new();
        self.each_request(|kept| {
            if matches!(kept.state, RequestState::Pending | RequestState::Sent) {
                open.push(kept);
            }
            Ok(())
        })?;
        Ok(open)
    }

    /// Shows all requests.
    pub fn each_request(&self, mut see: impl FnMut(KeptRequest) -> Result<()>) -> Result<()> {
        let read = self.check(self.database.begin_read())?;
        let table = self.check(read.open_table(REQUESTS))?;
        for entry in self.check(table.iter())? {
            let (_, bytes) = self.check(entry)?;
            see(self.value(bytes.value())?)?;
        }
        Ok(())
    }

    /// Shows all sources.
    pub fn each_source(&self, mut see: impl FnMut(&str, SourceState) -> Result<()>) -> Result<()> {
        let read = self.check(self.database.begin_read())?;
        let table = self.check(read.open_table(SOURCES))?;
        for entry in self.check(table.iter())? {
            let (name, bytes) = self.check(entry)?;
            see(name.value(), self.value(bytes.value())?)?;
        }
        Ok(())
    }

    /// Shows all alerts that could not be used.
    pub fn each_rejected(&self, mut see: impl FnMut(Rejected) -> Result<()>) -> Result<()> {
        let read = self.check(self.database.begin_read())?;
        let table = self.check(read.open_table(REJECTED))?;
        for entry in self.check(table.iter())? {
            let (_, bytes) = self.check(entry)?;
            see(self.value(bytes.value())?)?;
        }
        Ok(())
    }

    /// Keeps all of a batch or nothing.
    pub fn keep(&self, batch: &Batch) -> Result<()> {
        let write = self.begin()?;
        {
            let mut files = self.check(write.open_table(FILES))?;
            for (name, size) in &batch.files {
                self.check(files.insert(name.as_str(), size)).map(drop)?;
            }
            let mut alerts = self.check(write.open_table(ALERTS))?;
            for candid in &batch.alerts {
                self.check(alerts.insert(candid, ())).map(drop)?;
            }
            let mut sources = self.check(write.open_table(SOURCES))?;
            for (name, state) in &batch.sources {
                self.check(sources.insert(name.as_str(), bytes(state)?.as_slice())).map(drop)?;
            }
            let mut requests = self.check(write.open_table(REQUESTS))?;
            for kept in &batch.requests {
                self.check(requests.insert(kept.request.object_id.as_str(), bytes(kept)?.as_slice()))
                    .map(drop)?;
            }
            let mut rejected = self.check(write.open_table(REJECTED))?;
            for one in &batch.rejected {
                let key = format!("{} {}", one.file, one.candid);
                self.check(rejected.insert(key.as_str(), bytes(one)?.as_slice())).map(drop)?;
            }
        }
        self.check(write.commit())
    }

    /// Notes that a request is about to be sent, unless the night has had its share.
    pub fn take_turn(&self, kept: &KeptRequest, night: i64, most: Option<u64>) -> Result<bool> {
        let write = self.begin()?;
        let is_ours = {
            let mut sent = self.check(write.open_table(SENT))?;
            let before = self.check(sent.get(night))?.map_or(0, |count| count.value());
            let is_ours = most.is_none_or(|most| before < most);
            if is_ours {
                self.check(sent.insert(night, before + 1)).map(drop)?;
                let mut requests = self.check(write.open_table(REQUESTS))?;
                let kept = KeptRequest { state: RequestState::Sent, ..kept.clone() };
                let name = kept.request.object_id.as_str();
                self.check(requests.insert(name, bytes(&kept)?.as_slice())).map(drop)?;
            }
            is_ours
        };
        self.check(write.commit())?;
        Ok(is_ours)
    }

    /// Keeps how far a request is.
    pub fn keep_request(&self, kept: &KeptRequest) -> Result<()> {
        self.keep(&Batch { requests: vec![kept.clone()], ..Batch::default() })
    }
}

fn bytes<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::work("cannot write an entry of the store").caused_by(e))
}

/// What a few packets come to.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Files that were read to their end, with their sizes.
    pub files: Vec<(String, u64)>,
    /// Alerts that were seen.
    pub alerts: Vec<i64>,
    /// Sources as they are now.
    pub sources: Vec<(String, SourceState)>,
    /// Requests that come of it.
    pub requests: Vec<KeptRequest>,
    /// Alerts that could not be used.
    pub rejected: Vec<Rejected>,
}
