//! `kiln btsbot extract` and `kiln btsbot show`

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use kiln_core::{Context, Error, Result, Table, write_atomic};
use kiln_data::write_csv;
use serde_json::{Map, Value, json};

use super::ReadArgs;
use crate::features::{DERIVED, Derived, FEATURES, features};
use crate::filter::Filter;
use crate::packet::{Alert, Field};
use crate::packets::{Ready, find, ingest, rejected, triplet, visit_stamps};
use crate::picture;
use crate::tables::CsvTable;
use crate::triplet::{SIDE, STAMPS, Triplet};

#[derive(Debug, Args)]
pub(super) struct ExtractArgs {
    /// Packets (.avro), archives of them (.tar.gz), or folders of both
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    packets: Vec<PathBuf>,
    #[command(flatten)]
    reading: ReadArgs,
    /// Table with objectId and label (1: bright transient, 0: not), from which the alerts get theirs
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Folder to write: candidates.csv, triplets.npy and rejected.csv
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn extract(args: &ExtractArgs, cx: &Context) -> Result<()> {
    let labels = args.labels.as_deref().map(read_labels).transpose()?;
    let paths = find(&args.packets)?;
    let reader = args.reading.reader()?;
    let filter = Filter { negative: true, ..Filter::default() };
    let mut ingested = ingest(&paths, &reader, args.reading.options(Default::default()), &filter, cx)?;
    let out = &args.out;
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let mut stamps = NpyWriter::create(&out.join("triplets.npy"))?;
    let mut kept: Vec<&Ready> = Vec::new();
    visit_stamps(&paths, &reader, &ingested.ready, cx, |ready, triplet| {
        match triplet {
            Ok(triplet) => {
                stamps.push(&triplet)?;
                kept.push(ready);
            }
            Err(reason) => {
                let alert = &ready.alert;
                let (object, candid) = (Some(alert.object_id.clone()), Some(alert.candid));
                ingested.rejected.push(rejected(ready.origin.file.clone(), object, candid, reason));
            }
        }
        Ok(())
    })?;
    write_candidates(&out.join("candidates.csv"), &kept, labels.as_ref())?;
    write_csv(&out.join("rejected.csv"), &ingested.rejected)?;
    stamps.finish()?;
    let (count, lost) = (kept.len(), &ingested.rejected);
    cx.emit(&json!({ "out": out, "alerts": count, "rejected": lost }), |_| {
        let mut text = format!("{count} alerts in {}\n", out.display());
        for one in lost.iter().take(20) {
            text += &format!("rejected: {} {}: {}\n", one.file, one.object_id, one.reason);
        }
        if lost.len() > 20 {
            text += &format!("and {} more: see rejected.csv\n", lost.len() - 20);
        }
        text
    })
}

/// Labels of sources.
type Labels = HashMap<String, bool>;

fn read_labels(path: &Path) -> Result<Labels> {
    let mut table = CsvTable::open(path, &["objectId", "label"])?;
    let [object, label] = ["objectId", "label"].map(|name| table.column(name).unwrap_or_default());
    let mut labels = Labels::new();
    while table.advance()? {
        if let Some(label) = table.label(label)? {
            labels.insert(table.text(object).into(), label);
        }
    }
    Ok(labels)
}

/// All fields of candidate in the order in which they first occur, then the features that come of a source's history.
fn write_candidates(path: &Path, alerts: &[&Ready], labels: Option<&Labels>) -> Result<()> {
    let failed = |e: csv::Error| Error::work(format!("cannot write {}", path.display())).caused_by(e);
    let mut names: Vec<Arc<str>> = Vec::new();
    let mut known = HashSet::new();
    for (name, _) in alerts.iter().flat_map(|ready| &ready.alert.candidate) {
        if known.insert(name.clone()) && &**name != "candid" && !DERIVED.contains(&&**name) {
            names.push(name.clone());
        }
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    let label = labels.map(|_| "label");
    let header = ["objectId", "candid"]
        .into_iter()
        .chain(label)
        .chain(names.iter().map(|name| &**name))
        .chain(DERIVED);
    writer.write_record(header).map_err(failed)?;
    for ready in alerts {
        let mut row = vec![ready.alert.object_id.clone(), ready.alert.candid.to_string()];
        if let Some(labels) = labels {
            let label = labels.get(&ready.alert.object_id).map(|&label| u8::from(label).to_string());
            row.push(label.unwrap_or_default());
        }
        row.extend(
            names.iter().map(|name| ready.alert.field(name).map(Field::to_string).unwrap_or_default()),
        );
        row.extend(DERIVED.map(|name| derived(ready, name).to_string()));
        writer.write_record(row).map_err(failed)?;
    }
    let text = writer.into_inner().map_err(|e| failed(e.into_error().into()))?;
    write_atomic(path, &text)
}

/// A derived feature in full precision.
fn derived(ready: &Ready, name: &str) -> f64 {
    let Derived { age, days_since_peak, days_to_peak, peakmag_so_far, maxmag_so_far } = ready.derived;
    match name {
        "age" => age,
        "days_since_peak" => days_since_peak,
        "days_to_peak" => days_to_peak,
        "peakmag_so_far" => peakmag_so_far,
        "maxmag_so_far" => maxmag_so_far,
        name => FEATURES
            .iter()
            .position(|feature| *feature == name)
            .map_or(f64::NAN, |at| ready.features[at].into()),
    }
}

/// Stamps `[alerts, 63, 63, 3]` as `.npy`, written while they come; the file has its name once it is whole.
struct NpyWriter {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    count: usize,
    is_finished: bool,
}

/// Bytes of the header, which leaves room for any number of alerts.
const NPY_HEADER: usize = 128;

impl NpyWriter {
    fn create(path: &Path) -> Result<Self> {
        let partial = path.with_extension("npy.partial");
        let file = File::create(&partial).map_err(Error::io("create", &partial))?;
        let mut writer =
            Self { path: path.into(), partial, file: BufWriter::new(file), count: 0, is_finished: false };
        writer.write(&[b' '; NPY_HEADER])?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.partial))
    }

    fn push(&mut self, triplet: &Triplet) -> Result<()> {
        let size = SIDE * SIDE;
        let pixels = (0..size).flat_map(|pixel| (0..3).map(move |channel| channel * size + pixel));
        let bytes: Vec<u8> = pixels.flat_map(|at| triplet.pixels[at].to_le_bytes()).collect();
        self.count += 1;
        self.write(&bytes)
    }

    fn finish(mut self) -> Result<()> {
        let shape = format!("({}, {SIDE}, {SIDE}, 3)", self.count);
        let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
        let mut header = b"\x93NUMPY\x01\x00".to_vec();
        header.extend((NPY_HEADER as u16 - 10).to_le_bytes());
        header.extend(format!("{text:<width$}\n", width = NPY_HEADER - 11).bytes());
        let failed = |action| Error::io(action, &self.partial);
        self.file.seek(SeekFrom::Start(0)).map_err(failed("write"))?;
        self.file.write_all(&header).and_then(|()| self.file.flush()).map_err(failed("write"))?;
        self.file.get_ref().sync_all().map_err(failed("write"))?;
        fs::rename(&self.partial, &self.path).map_err(failed("rename"))?;
        self.is_finished = true;
        Ok(())
    }
}

impl Drop for NpyWriter {
    fn drop(&mut self) {
        if !self.is_finished {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The packet
    #[arg(long, value_name = "FILE")]
    packet: PathBuf,
    #[command(flatten)]
    reading: ReadArgs,
    /// PNG file to write: science, template and difference
    #[arg(long, default_value = "alert.png")]
    out: PathBuf,
}

pub(super) fn show(args: &ShowArgs, cx: &Context) -> Result<()> {
    let path = &args.packet;
    let reader = args.reading.reader()?;
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let alert = reader.read(&bytes).into_iter().next();
    let alert: Alert = match alert {
        Some(Ok(alert)) => alert,
        Some(Err(fault)) => return Err(Error::input(path.display(), fault.reason)),
        None => return Err(Error::input(path.display(), "holds no alert")),
    };
    let options = args.reading.options(Default::default());
    // One packet alone has no other history than its own.
    let derived = Derived::of(&alert, &alert.prior);
    let features = features(&alert, &derived, options.drb_missing);
    let stamps = alert.images();
    if let Ok(stamps) = &stamps {
        write_atomic(&args.out, &picture::png(stamps)?)?;
    }
    let usable = triplet(&alert).map(|_| ());
    let named: Map<String, Value> = match &features {
        Ok(features) => {
            FEATURES.iter().zip(features).map(|(name, x)| ((*name).to_string(), json!(x))).collect()
        }
        Err(_) => Map::new(),
    };
    let shapes: Vec<Value> = match &stamps {
        Ok(stamps) => stamps.iter().map(|s| json!([s.height, s.width])).collect(),
        Err(_) => Vec::new(),
    };
    let problems: Vec<&String> =
        [usable.as_ref().err(), features.as_ref().err()].into_iter().flatten().collect();
    let picture = stamps.is_ok().then_some(&args.out);
    let result = json!({
        "file": path,
        "schemavsn": alert.version,
        "objectId": alert.object_id,
        "candid": alert.candid,
        "jd": alert.jd,
        "magpsf": alert.magpsf,
        "history": { "entries": alert.prior_entries, "detections": alert.prior.len() },
        "stamps": shapes,
        "features": named,
        "problems": problems,
        "picture": picture,
    });
    cx.emit(&result, |_| {
        let mut text = format!(
            "{}, alert {}, schema {}\njd {:.5}, magnitude {:.2}; {} detections among {} entries of history\n",
            alert.object_id,
            alert.candid,
            alert.version,
            alert.jd,
            alert.magpsf,
            alert.prior.len(),
            alert.prior_entries
        );
        if let Ok(features) = &features {
            let mut table = Table::new("", &["feature", "value", "feature", "value"]);
            let half = FEATURES.len().div_ceil(2);
            let cell = |at: usize| match FEATURES.get(at) {
                Some(name) => [
                    (*name).to_string(),
                    format!("{:.6}", features[at]).trim_end_matches('0').trim_end_matches('.').into(),
                ],
                None => [String::new(), String::new()],
            };
            for at in 0..half {
                table.row(cell(at).into_iter().chain(cell(at + half)));
            }
            text += &table.to_text();
        }
        for problem in &problems {
            text += &format!("a network would not see it: {problem}\n");
        }
        match picture {
            Some(out) => text + &format!("{} in {}\n", STAMPS.join(", "), out.display()),
            None => text,
        }
    })
}
