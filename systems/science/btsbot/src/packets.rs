//! Many packets: in files, folders and nightly archives, without having them in memory.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use kiln_core::{Context, Error, Result};
use rayon::prelude::*;

use crate::dataset::Rejected;
use crate::features::{Derived, FeatureHistory, FeatureOptions, features};
use crate::filter::Filter;
use crate::packet::{Alert, AlertReader, Fault, Stamp};
use crate::triplet::Triplet;

/// Bytes of the largest packet.
const LARGEST_PACKET: u64 = 64 << 20;
/// Packets that are in memory at once.
const AT_ONCE: usize = 128;

/// Whether a path is that of a packet, or of an archive of packets.
pub fn is_packets(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    name.ends_with(".avro") || is_archive(&name)
}

fn is_archive(name: &str) -> bool {
    [".tar", ".tar.gz", ".tgz"].iter().any(|ending| name.ends_with(ending))
}

/// The packets and archives among these paths and in these folders, in order of their names.
///
/// # Errors
/// When a path is missing, or there are none.
pub fn find(inputs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for input in inputs {
        if input.is_dir() {
            let entries = fs::read_dir(input).map_err(Error::io("read", input))?;
            let mut inside = Vec::new();
            for entry in entries {
                let path = entry.map_err(Error::io("read", input))?.path();
                if path.is_file() && is_packets(&path) {
                    inside.push(path);
                }
            }
            inside.sort();
            paths.extend(inside);
        } else if input.exists() {
            paths.push(input.clone());
        } else {
            return Err(Error::input(input.display(), "is not there"));
        }
    }
    if paths.is_empty() {
        let names: Vec<String> = inputs.iter().map(|input| input.display().to_string()).collect();
        return Err(Error::input(names.join(", "), "holds no packets")
            .hint("packets end in .avro, archives of them in .tar or .tar.gz"));
    }
    Ok(paths)
}

/// The bytes of a packet, or why they cannot be read, by the packet's name.
pub type Packet = (String, Result<Vec<u8>, String>);

/// Shows all packets in turn, those of archives by their place in them.
///
/// # Errors
/// What `see` fails with.
pub fn visit(paths: &[PathBuf], mut see: impl FnMut(Packet) -> Result<()>) -> Result<()> {
    for path in paths {
        let name = path.display().to_string();
        if is_archive(&name.to_lowercase()) {
            if let Err(reason) = visit_archive(path, &mut see)? {
                see((name, Err(reason)))?;
            }
        } else {
            see((name, read_at_most(path, LARGEST_PACKET)))?;
        }
    }
    Ok(())
}

fn read_at_most(path: &Path, limit: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| format!("cannot be read: {e}"))?;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    if bytes.len() as u64 > limit {
        return Err(format!("has more than {limit} bytes"));
    }
    Ok(bytes)
}

/// The inner result is why the archive cannot be read on.
fn visit_archive(path: &Path, see: &mut impl FnMut(Packet) -> Result<()>) -> Result<Result<(), String>> {
    let file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(e) => return Ok(Err(format!("cannot be read: {e}"))),
    };
    let is_plain = path.extension().is_some_and(|ending| ending == "tar");
    let bytes: Box<dyn Read> = if is_plain { Box::new(file) } else { Box::new(GzDecoder::new(file)) };
    let mut archive = tar::Archive::new(bytes);
    let entries = match archive.entries() {
        Ok(entries) => entries,
        Err(e) => return Ok(Err(format!("is no archive: {e}"))),
    };
    for entry in entries {
        let mut entry = match entry {
            Ok(entry) => entry,
            Err(e) => return Ok(Err(format!("is damaged: {e}"))),
        };
        let inner = entry.path().map(|path| path.display().to_string()).unwrap_or_default();
        if !inner.ends_with(".avro") {
            continue;
        }
        let mut bytes = Vec::new();
        let read = (&mut entry).take(LARGEST_PACKET + 1).read_to_end(&mut bytes);
        let bytes = match read {
            Err(e) => return Ok(Err(format!("is damaged in {inner}: {e}"))),
            Ok(_) if bytes.len() as u64 > LARGEST_PACKET => {
                Err(format!("has more than {LARGEST_PACKET} bytes"))
            }
            Ok(_) => Ok(bytes),
        };
        see((format!("{}/{inner}", path.display()), bytes))?;
    }
    Ok(Ok(()))
}

/// Where an alert came from: the packet's number and name, and the alert's place in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    packet: usize,
    place: usize,
    /// The file.
    pub file: String,
}

/// An alert without its stamps, whose features are known.
#[derive(Debug, Clone)]
pub struct Ready {
    /// Where its stamps are.
    pub origin: Origin,
    /// The alert.
    pub alert: Alert,
    /// Its source's history until then.
    pub derived: Derived,
    /// What networks see of it besides the stamps.
    pub features: [f32; 25],
}

/// What became of all packets, before their stamps were looked at.
#[derive(Debug, Clone, Default)]
pub struct Ingested {
    /// Alerts to be scored, in the order of the files.
    pub ready: Vec<Ready>,
    /// Those that cannot be.
    pub rejected: Vec<Rejected>,
}

/// Reads all packets but for their stamps. Histories grow by time, whatever the order of the files.
///
/// # Errors
/// When the user stopped.
pub fn ingest(
    paths: &[PathBuf],
    reader: &AlertReader,
    options: FeatureOptions,
    filter: &Filter,
    cx: &Context,
) -> Result<Ingested> {
    let mut found: Vec<(Origin, Result<Alert, Fault>)> = Vec::new();
    let bar = cx.progress(paths.len() as u64, "reading packets");
    each_chunk(paths, cx, |number, chunk| {
        let read: Vec<Vec<(Origin, Result<Alert, Fault>)>> = chunk
            .into_par_iter()
            .enumerate()
            .map(|(at, (file, bytes))| {
                let origin = |place| Origin { packet: number + at, place, file: file.clone() };
                match bytes {
                    Ok(bytes) => {
                        let alerts = reader.read(&bytes).into_iter().enumerate();
                        alerts.map(|(place, alert)| (origin(place), alert.map(without_stamps))).collect()
                    }
                    Err(reason) => vec![(origin(0), Err(Fault { object_id: None, candid: None, reason }))],
                }
            })
            .collect();
        bar.inc(read.len() as u64);
        found.extend(read.into_iter().flatten());
        Ok(())
    })?;
    let mut ingested = Ingested::default();
    let mut seen: HashMap<i64, String> = HashMap::new();
    let mut alerts: Vec<(Origin, Alert)> = Vec::new();
    for (origin, alert) in found {
        let (object_id, candid, reason) = match alert {
            Err(fault) => (fault.object_id, fault.candid, fault.reason),
            Ok(alert) => match (seen.get(&alert.candid), filter.refusal(&alert)) {
                (Some(first), _) => (
                    Some(alert.object_id),
                    Some(alert.candid),
                    format!("has the candid of an alert in {first}"),
                ),
                (None, Some(reason)) => (Some(alert.object_id), Some(alert.candid), reason),
                (None, None) => {
                    seen.insert(alert.candid, origin.file.clone());
                    alerts.push((origin, alert));
                    continue;
                }
            },
        };
        ingested.rejected.push(rejected(origin.file, object_id, candid, reason));
    }
    alerts.sort_by(|(_, a), (_, b)| a.jd.total_cmp(&b.jd).then(a.candid.cmp(&b.candid)));
    let mut history = FeatureHistory::new(options);
    for (origin, alert) in alerts {
        let derived = history.derived(&alert);
        match features(&alert, &derived, options.drb_missing) {
            Ok(features) => ingested.ready.push(Ready { origin, alert, derived, features }),
            Err(reason) => ingested.rejected.push(rejected(
                origin.file,
                Some(alert.object_id),
                Some(alert.candid),
                reason,
            )),
        }
    }
    ingested.ready.sort_by_key(|ready| (ready.origin.packet, ready.origin.place));
    Ok(ingested)
}

/// A row about an alert that is lost.
pub fn rejected(file: String, object_id: Option<String>, candid: Option<i64>, reason: String) -> Rejected {
    let candid = candid.map(|candid| candid.to_string()).unwrap_or_default();
    Rejected { file, object_id: object_id.unwrap_or_default(), candid, reason }
}

fn without_stamps(alert: Alert) -> Alert {
    Alert { stamps: [Stamp::Absent, Stamp::Absent, Stamp::Absent], ..alert }
}

/// Reads the packets again and shows the stamps of the alerts that are ready, in their order.
///
/// # Errors
/// When the user stopped, or `see` fails.
pub fn visit_stamps<'a>(
    paths: &[PathBuf],
    reader: &AlertReader,
    ready: &'a [Ready],
    cx: &Context,
    mut see: impl FnMut(&'a Ready, Result<Triplet, String>) -> Result<()>,
) -> Result<()> {
    let wanted: HashSet<usize> = ready.iter().map(|ready| ready.origin.packet).collect();
    let bar = cx.progress(paths.len() as u64, "reading stamps");
    let mut next = ready.iter().peekable();
    each_chunk(paths, cx, |number, chunk| {
        let count = chunk.len() as u64;
        let stamps: Vec<Vec<Result<Triplet, String>>> = chunk
            .into_par_iter()
            .enumerate()
            .map(|(at, (_, bytes))| match bytes {
                Ok(bytes) if wanted.contains(&(number + at)) => reader
                    .read(&bytes)
                    .into_iter()
                    .map(|alert| triplet(&alert.map_err(|f| f.reason)?))
                    .collect(),
                _ => Vec::new(),
            })
            .collect();
        for (at, stamps) in stamps.into_iter().enumerate() {
            let mut stamps: Vec<Option<Result<Triplet, String>>> = stamps.into_iter().map(Some).collect();
            while let Some(ready) = next.next_if(|ready| ready.origin.packet == number + at) {
                let stamp = stamps.get_mut(ready.origin.place).and_then(Option::take);
                see(ready, stamp.unwrap_or_else(|| Err("was changed while it was read".into())))?;
            }
        }
        bar.inc(count);
        Ok(())
    })
}

/// The stamps of an alert, normalised.
///
/// # Errors
/// When one is missing or corrupted.
pub fn triplet(alert: &Alert) -> Result<Triplet, String> {
    Triplet::from_stamps(alert.images()?.each_ref())
}

/// Packets in parts that are in memory at once, with the number of the first.
fn each_chunk(
    paths: &[PathBuf],
    cx: &Context,
    mut see: impl FnMut(usize, Vec<Packet>) -> Result<()>,
) -> Result<()> {
    let (mut chunk, mut number) = (Vec::new(), 0);
    visit(paths, |packet| {
        chunk.push(packet);
        if chunk.len() == AT_ONCE {
            if cx.interrupted() {
                return Err(Error::interrupted("stopped before all packets were read"));
            }
            see(number, std::mem::take(&mut chunk))?;
            number += AT_ONCE;
        }
        Ok(())
    })?;
    if chunk.is_empty() { Ok(()) } else { see(number, chunk) }
}
