//! Many recordings, each prepared in the same way; what cannot be is left out with its reason.

use std::path::Path;
use std::sync::Arc;

use kiln_core::{Context, Error, ErrorKind, Result, Values};
use kiln_data::read_npz;
use serde::Serialize;

use crate::dataset::{About, Dataset, Recording};
use crate::layout::{Absent, Found, Sheet};
use crate::pipeline::{Pipeline, Prepared};
use crate::resample::Resampler;

/// A recording that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Its file.
    pub recording: String,
    /// Why.
    pub reason: String,
}

impl From<&Absent> for Skipped {
    fn from(absent: &Absent) -> Self {
        Self {
            recording: absent.path.display().to_string(),
            reason: format!("row {} of the labels names it, but there is no such file", absent.row),
        }
    }
}

/// Prepares recordings one after another and hands each to `keep`. Returns the names of the channels, which all share, and
/// what was left out.
///
/// # Errors
/// When every recording had to be left out, `keep` fails, or the user stopped.
pub fn prepare_all(
    found: &[Found],
    pipeline: &Pipeline,
    cx: &Context,
    mut keep: impl FnMut(&About, Prepared) -> Result<()>,
) -> Result<(Vec<String>, Vec<Skipped>)> {
    pipeline.check()?;
    let mut channels: Option<Vec<String>> = None;
    let mut skipped = Vec::new();
    let bar = cx.progress(found.len() as u64, "preparing");
    for Found { path, about } in found {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before all recordings were prepared"));
        }
        let prepared = pipeline.read(path).and_then(|prepared| match &channels {
            Some(channels) if *channels != prepared.channels => Err(Error::input(
                path.display(),
                format!("has the channels {}, others {}", prepared.channels.join(", "), channels.join(", ")),
            )),
            _ => Ok(prepared),
        });
        match prepared {
            Ok(prepared) => {
                for warning in &prepared.warnings {
                    cx.note(format!("{}: {warning}", path.display()));
                }
                channels.get_or_insert_with(|| prepared.channels.clone());
                keep(about, prepared)?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                cx.note(format!("left out: {error}"));
                skipped.push(Skipped { recording: path.display().to_string(), reason: error.to_string() });
            }
        }
        bar.inc(1);
    }
    match channels {
        Some(channels) => Ok((channels, skipped)),
        None => {
            let first = skipped.first().map_or("there are none".into(), |s| s.reason.clone());
            Err(Error::work(format!(
                "none of {} recordings can be prepared; the first: {first}",
                found.len()
            ))
            .hint("look into one of them with `kiln eeg info --in FILE`"))
        }
    }
}

/// Prepares recordings in memory.
///
/// # Errors
/// As [`prepare_all`], and when a subject is in both splits.
pub fn in_memory(
    found: &[Found],
    pipeline: &Pipeline,
    source: &Path,
    cx: &Context,
) -> Result<(Dataset, Vec<Skipped>)> {
    let mut recordings = Vec::new();
    let (channels, skipped) = prepare_all(found, pipeline, cx, |about, prepared| {
        let count = prepared.channels.len();
        recordings.push(Arc::new(Recording::new(about.clone(), prepared.eeg, count)));
        Ok(())
    })?;
    let data = Dataset { channels, pipeline: pipeline.clone(), recordings };
    data.check(source)?;
    Ok((data, skipped))
}

/// Segments in arrays of an `.npz` file, `[segments, samples]` or `[segments, channels, samples]`, in microvolts at `rate`
/// samples a second. They are called `ARRAY/NUMBER`, counted from 0; a table of labels names segments so, whole arrays, or,
/// where there is one array, numbers.
///
/// # Errors
/// When an array is missing or has another shape, or the labels name what is not there.
pub fn from_arrays(
    path: &Path,
    names: &[String],
    rate: f64,
    labels: Option<(&Path, Option<&str>)>,
    pipeline: &Pipeline,
) -> Result<Dataset> {
    pipeline.check()?;
    let mut file = read_npz(path)?;
    let resampler = Resampler::new(rate, pipeline.rate)?;
    let mut recordings: Vec<Recording> = Vec::new();
    let mut channels: Vec<String> = Vec::new();
    for name in names {
        let tensor = file.take(name)?;
        let (count, width, samples) = match tensor.shape[..] {
            [count, samples] => (count, 1, samples),
            [count, width, samples] => (count, width, samples),
            _ => {
                let found = format!("array \"{name}\" has the shape {:?}", tensor.shape);
                return Err(Error::input(path.display(), found)
                    .hint("it must be segments x samples or segments x channels x samples"));
            }
        };
        let values: Vec<f64> = match &tensor.values {
            Values::Float(values) => values.iter().map(|&x| x.into()).collect(),
            Values::Int(values) => values.iter().map(|&x| x as f64).collect(),
        };
        if width == 0 || samples == 0 {
            return Err(Error::input(path.display(), format!("array \"{name}\" is empty")));
        }
        let own: Vec<String> = (1..=width).map(|number| format!("CH{number:03}")).collect();
        if !channels.is_empty() && channels != own {
            return Err(Error::input(
                path.display(),
                format!("array \"{name}\" has {width} channels, others not"),
            ));
        }
        let resamplers = vec![resampler.clone(); width];
        for (number, segment) in values.chunks(width * samples).enumerate().take(count) {
            let id = format!("{name}/{number}");
            let place = |e: Error| Error::input(format!("{}: segment {id}", path.display()), e);
            let signals = segment.chunks(samples).map(|signal| crop(signal, rate, pipeline)).collect();
            let prepared = pipeline.apply(own.clone(), signals, &resamplers, Vec::new()).map_err(place)?;
            if prepared.eeg.is_empty() {
                return Err(place(Error::usage("nothing is left of it after the crop")));
            }
            let about = About { id, label: None, subject: None, age: None, sex: None, split: None };
            recordings.push(Recording::new(about, prepared.eeg, width));
        }
        channels = own;
    }
    if let Some((labels, positive)) = labels {
        label_segments(&mut recordings, names, labels, positive)?;
    }
    let data = Dataset {
        channels,
        pipeline: pipeline.clone(),
        recordings: recordings.into_iter().map(Arc::new).collect(),
    };
    data.check(path)?;
    Ok(data)
}

fn crop(signal: &[f64], rate: f64, pipeline: &Pipeline) -> Vec<f64> {
    let place = |seconds: f64| ((seconds * rate).round() as usize).min(signal.len());
    signal[place(pipeline.tmin)..place(pipeline.tmax)].to_vec()
}

/// Gives segments what a table says of them.
fn label_segments(
    recordings: &mut [Recording],
    arrays: &[String],
    labels: &Path,
    positive: Option<&str>,
) -> Result<()> {
    let sheet = Sheet::read(labels)?;
    for row in 0..sheet.rows() {
        let name = sheet.required("path", row)?;
        let full = if arrays.len() == 1 { format!("{}/{name}", arrays[0]) } else { name.clone() };
        let prefix = format!("{name}/");
        let mut named = 0;
        for recording in &mut *recordings {
            let id = &recording.about.id;
            if *id == name || *id == full || id.starts_with(&prefix) {
                recording.about = sheet.about(row, id.clone(), positive)?;
                recording.label = recording.about.label;
                named += 1;
            }
        }
        if named == 0 {
            return Err(Error::input(
                format!("{}: row {}", labels.display(), row + 1),
                format!("there is no \"{name}\""),
            )
            .hint(format!(
                "name arrays ({}) or segments such as {}/0",
                arrays.join(", "),
                arrays[0]
            )));
        }
    }
    Ok(())
}
