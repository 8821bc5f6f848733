//! Traces in NWB, which is HDF5: a `RoiResponseSeries` under `processing/`, its clock, and the names of its regions of
//! interest from the plane segmentation.

use std::path::Path;

use hdf5_reader::group::Group;
use hdf5_reader::{Attribute, Dataset, Hdf5File, OpenOptions};
use kiln_core::{Error, Result};

use super::{Recording, animal_name};

/// Most bytes of one array.
const MAX_BYTES: usize = 2 << 30;
/// Deepest nesting of groups that is searched.
const MAX_DEPTH: usize = 8;
/// Columns of the plane segmentation that hold names, the likeliest first.
const NAME_COLUMNS: [&str; 6] = ["neuron_name", "ID_labels", "labels", "label", "name", "roi_name"];

pub fn read(path: &Path) -> Result<Recording> {
    let place = path.display().to_string();
    let malformed = |e: hdf5_reader::error::Error| {
        Error::input(&place, "cannot be read as HDF5").caused_by(e.to_string()).hint("is it a complete NWB file?")
    };
    let options = OpenOptions::default().with_max_read_bytes(MAX_BYTES);
    let file = Hdf5File::open_with_options(path, options).map_err(malformed)?;
    let root = file.root_group().map_err(malformed)?;
    let processing = root.group("processing").map_err(|_| {
        Error::input(&place, "has no group \"processing\"").hint("traces are expected in processing/*/*/RoiResponseSeries")
    })?;
    let mut series = Vec::new();
    find(&processing, "RoiResponseSeries", MAX_DEPTH, &mut series);
    let series = series.into_iter().next().ok_or_else(|| {
        Error::input(&place, "has no RoiResponseSeries below \"processing\"").hint("export dF/F traces as one")
    })?;
    let data = series.dataset("data").map_err(malformed)?;
    let (shape, values) = numbers(&data).map_err(malformed)?;
    let &[frames, count] = &shape[..] else {
        return Err(Error::input(&place, format!("the traces have the shape {shape:?}, not [time, regions]")));
    };
    let traces = (0..count).map(|i| (0..frames).map(|t| values[t * count + i]).collect()).collect();
    let time_s = clock(&series, frames).ok_or_else(|| {
        Error::input(&place, format!("the traces have neither {frames} timestamps nor a starting_time with a rate"))
    })?;
    let neurons = names(&processing, count).ok_or_else(|| {
        Error::input(&place, format!("no plane segmentation has {count} regions with names or numbers"))
            .hint(format!("names are looked for in its columns {}", NAME_COLUMNS.join(", ")))
    })?;
    Ok(Recording { animal: animal_name(path), source: place, neurons, time_s, traces, behaviours: Vec::new() })
}

/// Every group of an NWB type, in the order of the file.
fn find(group: &Group, kind: &str, depth: usize, found: &mut Vec<Group>) {
    let Ok(groups) = group.groups() else { return };
    for inner in groups {
        let is_it = inner.attribute("neurodata_type").and_then(|attribute| text(&attribute)).is_ok_and(|t| t == kind);
        if is_it {
            found.push(inner);
        } else if depth > 0 {
            find(&inner, kind, depth - 1, found);
        }
    }
}

fn text(attribute: &Attribute) -> Result<String, hdf5_reader::error::Error> {
    attribute.read_string()
}

/// Numbers of any width.
fn numbers(dataset: &Dataset) -> Result<(Vec<usize>, Vec<f64>), hdf5_reader::error::Error> {
    let shape = dataset.shape().iter().map(|&n| n as usize).collect();
    let values = match dataset.read_array::<f32>() {
        Ok(values) => values.iter().map(|&x| x.into()).collect(),
        Err(_) => match dataset.read_array::<f64>() {
            Ok(values) => values.iter().copied().collect(),
            Err(_) => dataset.read_array::<i64>()?.iter().map(|&x| x as f64).collect(),
        },
    };
    Ok((shape, values))
}

fn clock(series: &Group, frames: usize) -> Option<Vec<f64>> {
    if let Ok((_, times)) = series.dataset("timestamps").and_then(|dataset| numbers(&dataset)) {
        return (times.len() == frames).then_some(times);
    }
    let start = series.dataset("starting_time").ok()?;
    let rate = start.attribute("rate").ok()?.read_as_f64().ok().filter(|rate| *rate > 0.0)?;
    let (_, first) = numbers(&start).ok()?;
    Some((0..frames).map(|t| first.first().copied().unwrap_or(0.0) + t as f64 / rate).collect())
}

/// The names of so many regions of interest, or their numbers.
fn names(processing: &Group, count: usize) -> Option<Vec<String>> {
    let mut tables = Vec::new();
    find(processing, "PlaneSegmentation", MAX_DEPTH, &mut tables);
    tables.iter().find_map(|table| {
        let words = |column: &&str| table.dataset(column).ok()?.read_strings().ok();
        let named = NAME_COLUMNS.iter().filter_map(words).find(|words| words.len() == count);
        named.or_else(|| {
            let (_, ids) = numbers(&table.dataset("id").ok()?).ok()?;
            (ids.len() == count).then(|| ids.iter().map(|id| format!("roi{id}")).collect())
        })
    })
}
