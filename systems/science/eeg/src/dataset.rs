//! Labelled recordings: where they are found, and prepared folders of them.
//!
//! A prepared folder holds `prepare.json` (channels and the [`Pipeline`]), `index.csv` (one row a recording) and
//! `recordings/<id>.safetensors` with one tensor `eeg [channels, samples]` each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_core::{Error, HostTensor, Result, TensorFile, write_atomic};
use kiln_data::write_csv;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::pipeline::Pipeline;

/// Bytes of samples up to which a prepared folder is kept in memory; beyond, recordings are read when they are needed.
const MAX_IN_MEMORY: usize = 2 << 30;
const EEG: &str = "eeg";

/// What a recording is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// To learn from
    Train,
    /// To judge by
    Eval,
}

impl Split {
    /// The split of that name, in words that data sets use.
    pub fn of(name: &str) -> Option<Self> {
        match name.trim().to_lowercase().as_str() {
            "train" | "training" => Some(Self::Train),
            "eval" | "test" | "evaluation" => Some(Self::Eval),
            _ => None,
        }
    }
}

/// What is known of a recording besides its samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Its name, unique among the recordings.
    pub id: String,
    /// Whether it is pathological, where that is known.
    pub label: Option<bool>,
    /// Who was recorded, where that is known.
    pub subject: Option<String>,
    /// Years.
    pub age: Option<f64>,
    /// As the data set has it.
    pub sex: Option<String>,
    /// What it is for, where the data set says so.
    pub split: Option<Split>,
}

/// A recording of a data set.
#[derive(Debug, Clone)]
pub struct Recording {
    /// What is known of it.
    pub about: About,
    /// Whether it is pathological, where that is known.
    pub label: Option<bool>,
    /// Samples of a channel.
    pub samples: usize,
    /// `[channels, samples]`, or the file that has them.
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Memory(Arc<Vec<f32>>),
    File { path: PathBuf, shape: [usize; 2] },
}

impl Recording {
    /// A recording in memory; `eeg` is `[channels, samples]`.
    pub fn new(about: About, eeg: Vec<f32>, channels: usize) -> Self {
        Self {
            label: about.label,
            about,
            samples: eeg.len() / channels,
            source: Source::Memory(Arc::new(eeg)),
        }
    }

    /// The samples, `[channels, samples]`.
    ///
    /// # Errors
    /// When they must be read and cannot be.
    pub fn eeg(&self) -> Result<Arc<Vec<f32>>> {
        match &self.source {
            Source::Memory(eeg) => Ok(eeg.clone()),
            Source::File { path, shape } => Ok(Arc::new(read_eeg(path, *shape)?)),
        }
    }
}

/// The one tensor of a prepared recording.
fn read_eeg(path: &Path, [channels, samples]: [usize; 2]) -> Result<Vec<f32>> {
    let tensor = TensorFile::read(path)?.take(EEG)?;
    let values = match tensor.as_floats() {
        Some(values) if tensor.shape == [channels, samples] => values,
        _ => {
            let found = format!(
                "\"{EEG}\" has the shape {:?}, expected floats of {channels} x {samples}",
                tensor.shape
            );
            return Err(Error::input(path.display(), found).hint("prepare the recordings again"));
        }
    };
    if values.iter().any(|x| !x.is_finite()) {
        return Err(Error::input(path.display(), "holds values that are no numbers").hint("prepare it again"));
    }
    Ok(values.to_vec())
}

/// Recordings that were prepared in the same way.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Names of the channels, in order.
    pub channels: Vec<String>,
    /// What was done to every recording.
    pub pipeline: Pipeline,
    /// The recordings.
    pub recordings: Vec<Arc<Recording>>,
}

/// What `prepare.json` holds.
#[derive(Serialize, Deserialize)]
struct Preparation {
    channels: Vec<String>,
    pipeline: Pipeline,
}

/// A row of `index.csv`.
#[derive(Serialize, Deserialize)]
struct Row {
    id: String,
    label: Option<u8>,
    subject: Option<String>,
    age: Option<f64>,
    sex: Option<String>,
    split: Option<Split>,
    samples: usize,
}

impl Dataset {
    /// Whether a folder holds prepared recordings.
    pub fn is_prepared(folder: &Path) -> bool {
        folder.join("prepare.json").is_file()
    }

    /// Opens a prepared folder.
    ///
    /// # Errors
    /// When a file is missing or malformed, or one subject is in both splits.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("prepare.json");
        let text = fs::read_to_string(&path).map_err(|e| {
            Error::io("read", &path)(e)
                .hint("prepare the recordings with `kiln eeg prepare --in DIR --out DIR`")
        })?;
        let preparation: Preparation = serde_json::from_str(&text).map_err(|e| {
            Error::input(path.display(), "does not describe prepared recordings").caused_by(e)
        })?;
        preparation.pipeline.check()?;
        if preparation.channels.is_empty() {
            return Err(Error::input(path.display(), "names no channels"));
        }
        let index = folder.join("index.csv");
        let reader = csv::Reader::from_path(&index).map_err(|e| Error::input(index.display(), e))?;
        let rows: Vec<Row> = reader
            .into_deserialize()
            .enumerate()
            .map(|(number, row)| {
                row.map_err(|e| Error::input(format!("{}: row {}", index.display(), number + 1), e))
            })
            .collect::<Result<_>>()?;
        let channels = preparation.channels.len();
        let bytes =
            rows.iter().fold(0usize, |sum, row| sum.saturating_add(row.samples.saturating_mul(4 * channels)));
        let mut recordings = Vec::new();
        for row in rows {
            if !is_plain(&row.id) {
                return Err(Error::input(
                    index.display(),
                    format!("\"{}\" is no name of a recording", row.id),
                ));
            }
            let path = folder.join("recordings").join(format!("{}.safetensors", row.id));
            let shape = [channels, row.samples];
            let source = match bytes <= MAX_IN_MEMORY {
                true => Source::Memory(Arc::new(read_eeg(&path, shape)?)),
                false => Source::File { path, shape },
            };
            let label = row.label.map(|label| label != 0);
            let about = About {
                id: row.id,
                label,
                subject: row.subject,
                age: row.age,
                sex: row.sex,
                split: row.split,
            };
            recordings.push(Arc::new(Recording { about, label, samples: row.samples, source }));
        }
        let data = Self { channels: preparation.channels, pipeline: preparation.pipeline, recordings };
        data.check(folder)?;
        Ok(data)
    }

    /// Makes sure that there are recordings, and that no subject is learned from and judged by.
    ///
    /// # Errors
    /// Names the subjects that are.
    pub fn check(&self, source: &Path) -> Result<()> {
        if self.recordings.is_empty() {
            return Err(Error::input(source.display(), "holds no recordings"));
        }
        check_subjects(self.recordings.iter().map(|r| &r.about), source)
    }

    /// Writes one recording of a prepared folder.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_recording(folder: &Path, id: &str, eeg: Vec<f32>, channels: usize) -> Result<()> {
        let mut file = TensorFile::new();
        let samples = eeg.len() / channels;
        file.insert(EEG, HostTensor::float([channels, samples], eeg));
        file.write(&folder.join("recordings").join(format!("{id}.safetensors")))
    }

    /// Writes what a prepared folder holds besides its recordings, given what is known of each and its samples.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_index(
        folder: &Path,
        channels: &[String],
        pipeline: &Pipeline,
        recordings: &[(About, usize)],
    ) -> Result<()> {
        let row = |(about, samples): &(About, usize)| {
            let About { id, label, subject, age, sex, split } = about.clone();
            Row { id, label: label.map(u8::from), subject, age, sex, split, samples: *samples }
        };
        write_csv(&folder.join("index.csv"), recordings.iter().map(row))?;
        let preparation = Preparation { channels: channels.to_vec(), pipeline: pipeline.clone() };
        let json = serde_json::to_vec_pretty(&preparation)
            .map_err(|e| Error::work("cannot write prepare.json").caused_by(e))?;
        write_atomic(&folder.join("prepare.json"), &json)
    }

    /// The labelled recordings to learn from: those of the training split, or all where none is marked.
    pub fn training(&self) -> Vec<usize> {
        self.chosen(Split::Train)
    }

    /// The labelled recordings to judge by: those of the evaluation split, or all where none is marked.
    pub fn evaluation(&self) -> Vec<usize> {
        self.chosen(Split::Eval)
    }

    fn chosen(&self, split: Split) -> Vec<usize> {
        let marked = self.recordings.iter().any(|r| r.about.split.is_some());
        (0..self.recordings.len())
            .filter(|&at| self.recordings[at].label.is_some())
            .filter(|&at| !marked || self.recordings[at].about.split == Some(split))
            .collect()
    }

    /// The samples of the shortest of these recordings.
    pub fn shortest(&self, chosen: &[usize]) -> usize {
        chosen.iter().map(|&at| self.recordings[at].samples).min().unwrap_or(0)
    }

    /// The same recordings in an order drawn at random in which classes take turns, so that the first `n` of them hold
    /// both, whatever `n`, and fewer are part of more.
    pub fn nested(&self, chosen: &[usize], rng: &mut impl Rng) -> Vec<usize> {
        let mut classes = [false, true].map(|label| {
            let of: Vec<usize> =
                chosen.iter().copied().filter(|&at| self.recordings[at].label == Some(label)).collect();
            of
        });
        classes.iter_mut().for_each(|class| class.shuffle(rng));
        // Each recording's place among its class, as a share of the class, decides: classes are mixed as they are in all.
        let mut placed: Vec<(f64, usize, usize)> = classes
            .iter()
            .enumerate()
            .flat_map(|(number, class)| {
                class
                    .iter()
                    .enumerate()
                    .map(move |(i, &at)| ((i as f64 + 0.5) / class.len() as f64, number, at))
            })
            .collect();
        placed.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        placed.into_iter().map(|(_, _, at)| at).collect()
    }

    /// Splits recordings into those to learn from and a share to validate with, of both classes; all recordings of a subject
    /// go the same way.
    ///
    /// # Errors
    /// When one part would lack a class.
    pub fn split(
        &self,
        chosen: &[usize],
        share: f64,
        rng: &mut impl Rng,
    ) -> Result<(Vec<usize>, Vec<usize>)> {
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::usage(format!("--val-fraction {share} must lie between 0 and 1")));
        }
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for &at in chosen {
            let about = &self.recordings[at].about;
            // Recordings of unknown subjects are alone.
            let group = about.subject.as_ref().map_or(format!("\0{}", about.id), Clone::clone);
            groups.entry(group).or_default().push(at);
        }
        let (mut train, mut valid) = (Vec::new(), Vec::new());
        for label in [false, true] {
            let mut of: Vec<&Vec<usize>> =
                groups.values().filter(|group| self.recordings[group[0]].label == Some(label)).collect();
            of.shuffle(rng);
            let held_out = ((of.len() as f64 * share).round() as usize).max(1);
            if of.len() < 2 {
                let name = if label { "pathological" } else { "normal" };
                return Err(Error::usage(format!(
                    "{} of {} subjects to train on are {name}",
                    of.len(),
                    groups.len()
                ))
                .hint("at least two of each class are needed, one to learn from and one to validate with"));
            }
            let held_out = held_out.min(of.len() - 1);
            valid.extend(of[..held_out].iter().flat_map(|group| group.iter().copied()));
            train.extend(of[held_out..].iter().flat_map(|group| group.iter().copied()));
        }
        train.sort_unstable();
        valid.sort_unstable();
        Ok((train, valid))
    }
}

/// Makes sure that no subject is in both splits.
///
/// # Errors
/// Names the first that are.
pub fn check_subjects<'a>(recordings: impl Iterator<Item = &'a About>, source: &Path) -> Result<()> {
    let mut splits: BTreeMap<&str, BTreeSet<Split>> = BTreeMap::new();
    for about in recordings {
        if let (Some(subject), Some(split)) = (&about.subject, about.split) {
            splits.entry(subject).or_default().insert(split);
        }
    }
    let leaked: Vec<&str> = splits.iter().filter(|(_, splits)| splits.len() > 1).map(|(s, _)| *s).collect();
    if leaked.is_empty() {
        return Ok(());
    }
    let shown = leaked[..leaked.len().min(5)].join(", ");
    Err(Error::input(
        source.display(),
        format!("{} subjects are in training and evaluation: {shown}", leaked.len()),
    )
    .hint("a network would be judged by whom it learned from; give every subject one split"))
}

/// Whether a name is one of a file in a folder, not of one elsewhere.
fn is_plain(id: &str) -> bool {
    Path::new(id).file_name().is_some_and(|file| file == id) && !id.contains('\\')
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    fn about(id: usize, label: bool, subject: &str, split: Option<Split>) -> About {
        About {
            id: format!("r{id}"),
            label: Some(label),
            subject: Some(subject.into()),
            age: None,
            sex: None,
            split,
        }
    }

    fn data(abouts: Vec<About>) -> Dataset {
        let recordings =
            abouts.into_iter().map(|about| Arc::new(Recording::new(about, vec![0.0; 8], 2))).collect();
        Dataset { channels: vec!["A".into(), "B".into()], pipeline: Pipeline::default(), recordings }
    }

    #[test]
    fn a_subject_in_both_splits_is_refused() {
        let leaked =
            data(vec![about(0, true, "s1", Some(Split::Train)), about(1, true, "s1", Some(Split::Eval))]);
        let error = leaked.check(Path::new("d")).unwrap_err();
        assert!(error.to_string().contains("1 subjects are in training and evaluation: s1"), "{error}");
        data(vec![about(0, true, "s1", None), about(1, true, "s1", None)]).check(Path::new("d")).unwrap();
    }

    #[test]
    fn subjects_stay_together_when_a_part_is_held_out() {
        let abouts =
            (0..24).map(|i| about(i, i % 2 == 0, &format!("s{}", i / 4 * 2 + i % 2), None)).collect();
        let data = data(abouts);
        let all: Vec<usize> = (0..24).collect();
        let (train, valid) = data.split(&all, 0.25, &mut random_stream(0, "split", 0)).unwrap();
        assert_eq!(train.len() + valid.len(), 24);
        let subjects = |part: &[usize]| -> BTreeSet<String> {
            part.iter().filter_map(|&at| data.recordings[at].about.subject.clone()).collect()
        };
        assert!(subjects(&train).is_disjoint(&subjects(&valid)));
        for part in [&train, &valid] {
            let pathological = part.iter().filter(|&&at| data.recordings[at].label == Some(true)).count();
            assert!(pathological > 0 && pathological < part.len());
        }
        assert!(data.split(&[0, 1, 2], 0.2, &mut random_stream(0, "split", 0)).is_err());
    }

    #[test]
    fn smaller_subsets_are_part_of_larger_ones_and_hold_both_classes() {
        let data = data((0..20).map(|i| about(i, i < 5, &format!("s{i}"), None)).collect());
        let all: Vec<usize> = (0..20).collect();
        let order = data.nested(&all, &mut random_stream(0, "nested", 0));
        assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), all.iter().copied().collect());
        let pathological = order[..8].iter().filter(|&&at| at < 5).count();
        assert_eq!(pathological, 2, "a quarter, as of all");
    }
}
