//! Recordings of several animals on one clock.

mod align;
mod csv;
mod events;
mod npz;
mod nwb;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

pub use align::{AlignConfig, align};
pub use events::Events;
pub use npz::write_npz;

/// One animal as it was recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// The animal's name.
    pub animal: String,
    /// Where it comes from, for messages.
    pub source: String,
    /// Names of neurons or regions.
    pub neurons: Vec<String>,
    /// Seconds, rising.
    pub time_s: Vec<f64>,
    /// One series a neuron; NaN where a sample is missing.
    pub traces: Vec<Vec<f64>>,
    /// What the animal did, by name: one number a sample.
    pub behaviours: Vec<(String, Vec<f64>)>,
}

/// Animals on a common clock, with the union of their neurons.
#[derive(Debug, Clone, PartialEq)]
pub struct Traces {
    /// Samples a second.
    pub rate: f64,
    /// T, the same for all animals.
    pub frames: usize,
    /// N names in order.
    pub neurons: Vec<String>,
    /// W animals.
    pub animals: Vec<Animal>,
    /// Stimuli and other spans, in seconds of the common clock.
    pub spans: Vec<Span>,
    /// What was left out or filled in, for the user.
    pub warnings: Vec<String>,
}

/// One animal on the common clock.
#[derive(Debug, Clone, PartialEq)]
pub struct Animal {
    /// Its name.
    pub name: String,
    /// Which of the union's neurons it has, rising.
    pub neurons: Vec<usize>,
    /// One series of T numbers for each of them.
    pub traces: Vec<Vec<f64>>,
    /// What it did: one number a frame.
    pub behaviours: Vec<(String, Vec<f64>)>,
}

/// Something that went on for a while.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What it was.
    pub label: String,
    /// Seconds of the common clock.
    pub start: f64,
    /// Seconds of the common clock.
    pub end: f64,
}

impl Traces {
    /// Whether some two animals share a pair of neurons (true for a single animal).
    pub fn share_a_pair(&self) -> bool {
        let shared =
            |a: &Animal, b: &Animal| a.neurons.iter().filter(|i| b.neurons.contains(i)).take(2).count();
        self.animals.len() == 1
            || (self.animals.iter().enumerate())
                .any(|(w, a)| self.animals[w + 1..].iter().any(|b| shared(a, b) == 2))
    }

    /// Seconds of a frame.
    pub fn seconds(&self, frame: usize) -> f64 {
        frame as f64 / self.rate
    }
}

/// Reads recordings: CSV files (one an animal), `.npz`, `.nwb`, or folders of such.
///
/// # Errors
/// When a file cannot be read or holds no recording, or two animals have one name.
pub fn read_recordings(paths: &[PathBuf]) -> Result<Vec<Recording>> {
    let mut recordings = Vec::new();
    for path in paths {
        if path.is_dir() {
            let found = files_in(path)?;
            for file in found {
                recordings.extend(read_file(&file)?);
            }
        } else {
            recordings.extend(read_file(path)?);
        }
    }
    let mut names = BTreeSet::new();
    for recording in &recordings {
        recording.check()?;
        if !names.insert(&recording.animal) {
            return Err(Error::input(
                &recording.source,
                format!("a second animal is called \"{}\"", recording.animal),
            )
            .hint("animals are told apart by the names of their files: rename one"));
        }
    }
    if recordings.is_empty() {
        return Err(Error::usage("there is no recording").hint("give .csv, .npz or .nwb files with --traces"));
    }
    Ok(recordings)
}

/// The recordings in a folder, by name; tables of events are not among them.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io("read", folder)));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.retain(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
        let known = [".csv", ".csv.gz", ".npz", ".nwb"].iter().any(|end| name.ends_with(end));
        known && !name.starts_with("events") && !name.starts_with('.')
    });
    paths.sort();
    if paths.is_empty() {
        return Err(Error::input(folder.display(), "holds no .csv, .npz or .nwb file")
            .hint("files whose names begin with \"events\" are not taken for recordings"));
    }
    Ok(paths)
}

fn read_file(path: &Path) -> Result<Vec<Recording>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("npz") => npz::read(path),
        Some("nwb" | "h5" | "hdf5") => nwb::read(path).map(|recording| vec![recording]),
        _ => csv::read(path).map(|recording| vec![recording]),
    }
}

/// The name of an animal from that of its file.
fn animal_name(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.split('.').next().unwrap_or_default().to_string()
}

impl Recording {
    /// The file and animal, for messages.
    fn place(&self) -> String {
        match self.source.contains(&self.animal) {
            true => self.source.clone(),
            false => format!("{}, animal {}", self.source, self.animal),
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |found: String| Error::input(self.place(), found);
        if self.time_s.len() < 2 || self.neurons.is_empty() {
            let found = format!("holds {} samples of {} neurons", self.time_s.len(), self.neurons.len());
            return Err(wrong(found).hint("a recording has at least two samples and one neuron"));
        }
        if let Some(at) = self.time_s.iter().position(|t| !t.is_finite()) {
            return Err(wrong(format!("sample {} has no time", at + 1)));
        }
        if let Some(at) = self.time_s.windows(2).position(|pair| pair[1] <= pair[0]) {
            let (before, after) = (self.time_s[at], self.time_s[at + 1]);
            return Err(wrong(format!("time goes from {before} to {after} s at sample {}", at + 2))
                .hint("times must rise; sort the rows and drop repeated ones"));
        }
        let mut seen = BTreeSet::new();
        for (name, trace) in self.neurons.iter().zip(&self.traces) {
            if name.trim().is_empty() {
                return Err(wrong("a neuron has no name".into()).hint("give every column a name"));
            }
            if !seen.insert(name) {
                return Err(wrong(format!("two neurons are called \"{name}\"")).hint("rename or drop one"));
            }
            if let Some(at) = trace.iter().position(|x| x.is_infinite()) {
                return Err(wrong(format!("neuron {name} is {} at sample {}", trace[at], at + 1)));
            }
        }
        Ok(())
    }
}
