//! Traces in NWB, which is HDF5: a `RoiResponseSeries` under `processing/`, its clock, and the names of its regions of
//! interest from the plane segmentation.

use std::path::Path;

use hdf5_pure::{AttrValue, Dataset, File, Group};
use kiln_core::{Error, Result};

use super::{Recording, animal_name};

/// Most numbers of one array.
const MOST_VALUES: u64 = 1 << 28;
/// Deepest nesting of groups that is searched.
const MAX_DEPTH: usize = 8;
/// Columns of the plane segmentation that hold names, the likeliest first.
const NAME_COLUMNS: [&str; 6] = ["neuron_name", "ID_labels", "labels", "label", "name", "roi_name"];

pub fn read(path: &Path) -> Result<Recording> {
    let place = path.display().to_string();
    let malformed = |found: String| {
        Error::input(&place, "cannot be read as HDF5").caused_by(found).hint("is it a complete NWB file?")
    };
    std::fs::File::open(path).map_err(Error::io("read", path))?;
    let file = File::open(path).map_err(|e| malformed(e.to_string()))?;
    let processing = file.group("processing").map_err(|_| {
        Error::input(&place, "has no group \"processing\"")
            .hint("traces are expected in processing/*/*/RoiResponseSeries")
    })?;
    let series = find(&processing, "RoiResponseSeries", MAX_DEPTH);
    let series = series.first().ok_or_else(|| {
        Error::input(&place, "has no RoiResponseSeries below \"processing\"")
            .hint("export dF/F traces as one")
    })?;
    let data = series.dataset("data").map_err(|e| malformed(e.to_string()))?;
    let (shape, values) = numbers(&data).map_err(malformed)?;
    let [frames, count] = shape[..] else {
        return Err(Error::input(
            &place,
            format!("the traces have the shape {shape:?}, not [time, regions]"),
        ));
    };
    let traces = (0..count).map(|i| (0..frames).map(|t| values[t * count + i]).collect()).collect();
    let time_s = clock(series, frames).ok_or_else(|| {
        Error::input(
            &place,
            format!("the traces have neither {frames} timestamps nor a starting_time with a rate"),
        )
    })?;
    let neurons = names(&processing, count).ok_or_else(|| {
        Error::input(&place, format!("no plane segmentation has {count} regions with names or numbers"))
            .hint(format!("names are looked for in its columns {}", NAME_COLUMNS.join(", ")))
    })?;
    Ok(Recording {
        animal: animal_name(path),
        source: place,
        neurons,
        time_s,
        traces,
        behaviours: Vec::new(),
    })
}

/// Every group of an NWB type below a group.
fn find(group: &Group, kind: &str, depth: usize) -> Vec<Group> {
    let names = group.groups().unwrap_or_default();
    let inner = names.iter().filter_map(|name| group.group(name).ok());
    let found = inner.flat_map(|inner| {
        let is_it = inner
            .attrs()
            .is_ok_and(|attrs| attrs.get("neurodata_type").is_some_and(|a| text(a) == Some(kind)));
        match is_it {
            true => vec![inner],
            false if depth > 0 => find(&inner, kind, depth - 1),
            false => Vec::new(),
        }
    });
    found.collect()
}

fn text(attribute: &AttrValue) -> Option<&str> {
    match attribute {
        AttrValue::String(text)
        | AttrValue::AsciiString(text)
        | AttrValue::VarLenString(text)
        | AttrValue::VarLenAsciiString(text) => Some(text),
        AttrValue::StringSized { value, .. } | AttrValue::AsciiStringSized { value, .. } => Some(value),
        _ => None,
    }
}

/// The shape and the numbers of an array, whatever their width.
fn numbers(dataset: &Dataset) -> Result<(Vec<usize>, Vec<f64>), String> {
    let shape = dataset.shape().map_err(|e| e.to_string())?;
    let count = shape.iter().try_fold(1u64, |n, &m| n.checked_mul(m)).filter(|&n| n <= MOST_VALUES);
    let count = count.ok_or_else(|| format!("an array claims the shape {shape:?}"))?;
    let values = dataset.read_f64().map_err(|e| e.to_string())?;
    if values.len() as u64 != count {
        return Err(format!("an array of the shape {shape:?} holds {} numbers", values.len()));
    }
    Ok((shape.iter().map(|&n| n as usize).collect(), values))
}

fn clock(series: &Group, frames: usize) -> Option<Vec<f64>> {
    if let Ok(times) = series.dataset("timestamps") {
        return numbers(&times).ok().map(|(_, times)| times).filter(|times| times.len() == frames);
    }
    let start = series.dataset("starting_time").ok()?;
    let rate = match start.attrs().ok()?.get("rate")? {
        AttrValue::F64(rate) => *rate,
        AttrValue::F32(rate) => f64::from(*rate),
        AttrValue::I64(rate) => *rate as f64,
        _ => return None,
    };
    let first = numbers(&start).ok()?.1.first().copied()?;
    (rate > 0.0).then(|| (0..frames).map(|t| first + t as f64 / rate).collect())
}

/// The names of so many regions of interest, or their numbers.
fn names(processing: &Group, count: usize) -> Option<Vec<String>> {
    find(processing, "PlaneSegmentation", MAX_DEPTH).iter().find_map(|table| {
        let words = |column: &&str| table.dataset(column).ok()?.read_string().ok();
        let named = NAME_COLUMNS.iter().filter_map(words).find(|words| words.len() == count);
        named.or_else(|| {
            let (_, ids) = numbers(&table.dataset("id").ok()?).ok()?;
            (ids.len() == count).then(|| ids.iter().map(|id| format!("roi{id}")).collect())
        })
    })
}
