//! Labelled radiographs, and their division into folds.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use kiln_core::{Context, Error, Result};
use rand::Rng;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use regex::Regex;

use crate::image::{Cxr, Radiograph, find};

/// Images that a fold must have.
const LEAST_PER_FOLD: usize = 5;
/// Share of what is not tested on that is kept for validation, one of so many.
const VALIDATION: usize = 10;
/// The highest number of a stored pixel.
const WHITE: f32 = u16::MAX as f32;

/// An image on disk and what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// Its name in tables: the path below the folder.
    pub name: String,
    /// Whether it shows tuberculosis, where that is known.
    pub is_tb: Option<bool>,
    /// The patient, where known.
    pub patient: Option<String>,
}

/// Where labels and patients come from.
#[derive(Debug, Clone, Default)]
pub struct Labels<'a> {
    /// A CSV file with the columns image and label, and optionally patient.
    pub table: Option<&'a Path>,
    /// A regular expression whose first group, or whole match, in a file's name is the patient.
    pub patient: Option<&'a Regex>,
}

/// The two classes by the names that people give them.
pub fn class_of(label: &str) -> Option<bool> {
    match label.trim().to_lowercase().as_str() {
        "tb" | "tuberculosis" | "positive" | "1" => Some(true),
        "normal" | "negative" | "healthy" | "0" => Some(false),
        _ => None,
    }
}

/// The images of a folder, with labels from a table or from the names of the folders in it; without either they are
/// unlabelled.
///
/// # Errors
/// When the folder or the table cannot be read, or the table names a class or an image that is not there.
pub fn list(folder: &Path, labels: &Labels) -> Result<Vec<Entry>> {
    let mut entries = match labels.table {
        Some(table) => from_table(folder, table)?,
        None => find(folder)?
            .into_iter()
            .map(|path| {
                let below = path.strip_prefix(folder).unwrap_or(&path);
                let class = below.parent().and_then(|parent| parent.components().next());
                let is_tb = class.and_then(|class| class_of(&class.as_os_str().to_string_lossy()));
                let name =
                    if below.as_os_str().is_empty() { path.file_name().map(PathBuf::from) } else { None };
                let name = name.unwrap_or_else(|| below.into()).display().to_string();
                Entry { name, path, is_tb, patient: None }
            })
            .collect(),
    };
    if let Some(pattern) = labels.patient {
        for entry in &mut entries {
            let name =
                entry.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let Some(found) = pattern.captures(&name) else {
                return Err(Error::input(
                    entry.path.display(),
                    format!("the pattern \"{pattern}\" finds no patient in the file's name"),
                )
                .hint("every name must match --patient-regex; its first group is the patient"));
            };
            let patient = found.get(1).or(found.get(0)).map(|part| part.as_str().to_string());
            entry.patient = entry.patient.take().or(patient);
        }
    }
    Ok(entries)
}

fn from_table(folder: &Path, table: &Path) -> Result<Vec<Entry>> {
    let unreadable = |e: csv::Error| Error::input(table.display(), "cannot be read as CSV").caused_by(e);
    let mut reader = csv::Reader::from_path(table).map_err(unreadable)?;
    let heads = reader.headers().map_err(unreadable)?.clone();
    let column =
        |names: &[&str]| heads.iter().position(|head| names.contains(&head.trim().to_lowercase().as_str()));
    let (Some(image), Some(label)) = (column(&["image", "path", "file"]), column(&["label", "class"])) else {
        let found = format!("has the columns {}", heads.iter().collect::<Vec<_>>().join(", "));
        return Err(
            Error::input(table.display(), found).hint("expected image and label, and optionally patient")
        );
    };
    let patient = column(&["patient", "patient_id", "subject"]);
    let mut entries = Vec::new();
    for (row, record) in reader.records().enumerate() {
        let record = record.map_err(unreadable)?;
        let place = || format!("{}: row {}", table.display(), row + 1);
        let name = record.get(image).unwrap_or_default().to_string();
        let said = record.get(label).unwrap_or_default();
        let Some(is_tb) = class_of(said) else {
            return Err(
                Error::input(place(), format!("the label is \"{said}\"")).hint("labels are TB and Normal")
            );
        };
        let path = folder.join(&name);
        if !path.is_file() {
            return Err(Error::input(place(), format!("there is no {}", path.display()))
                .hint("images are named relative to --images"));
        }
        let patient = patient.and_then(|at| record.get(at)).filter(|text| !text.is_empty()).map(String::from);
        entries.push(Entry { path, name, is_tb: Some(is_tb), patient });
    }
    if entries.is_empty() {
        return Err(Error::input(table.display(), "has no rows"));
    }
    Ok(entries)
}

/// Images in main memory as a network takes them.
#[derive(Debug, Clone)]
pub struct Images {
    /// What was done to them.
    pub cxr: Cxr,
    /// What is known of each.
    pub entries: Vec<Entry>,
    /// Rows and columns on disk.
    pub shapes: Vec<[usize; 2]>,
    /// What is unusual about each.
    pub warnings: Vec<Vec<String>>,
    /// Of the pixels of each; copies have the same.
    pub hashes: Vec<String>,
    /// Planes of `[size, size]`, at sixteen bits.
    planes: Vec<Vec<u16>>,
}

/// A plane at sixteen bits.
pub fn pack(plane: &[f32]) -> Vec<u16> {
    plane.iter().map(|&x| (x.clamp(0.0, 1.0) * WHITE).round() as u16).collect()
}

fn unpack(plane: &[u16]) -> Vec<f32> {
    plane.iter().map(|&x| f32::from(x) / WHITE).collect()
}

impl Images {
    /// Reads all.
    ///
    /// # Errors
    /// When one cannot be read, or the user stopped.
    pub fn read(entries: Vec<Entry>, cxr: Cxr, cx: &Context) -> Result<Self> {
        let bar = cx.progress(entries.len() as u64, "reading images");
        let read = |entry: &Entry| {
            if cx.interrupted() {
                return Err(Error::interrupted("stopped before all images were read"));
            }
            let image = Radiograph::read(&entry.path)?;
            bar.inc(1);
            Ok((pack(&cxr.plane(&image)), image))
        };
        // The first error by the order of images, whichever thread is first.
        let found =
            entries.par_iter().map(read).collect::<Vec<_>>().into_iter().collect::<Result<Vec<_>>>()?;
        let mut images = Self {
            cxr,
            shapes: found.iter().map(|(_, image)| [image.height, image.width]).collect(),
            warnings: Vec::new(),
            hashes: Vec::new(),
            planes: Vec::new(),
            entries,
        };
        for ((plane, image), entry) in found.into_iter().zip(&mut images.entries) {
            images.planes.push(plane);
            images.warnings.push(image.warnings);
            images.hashes.push(image.hash);
            entry.patient = entry.patient.take().or(image.patient);
        }
        Ok(images)
    }

    /// Of planes that are in memory already.
    pub fn of(planes: Vec<Vec<f32>>, labels: &[bool], cxr: Cxr) -> Self {
        let entry = |(number, &is_tb): (usize, &bool)| Entry {
            path: PathBuf::new(),
            name: number.to_string(),
            is_tb: Some(is_tb),
            patient: None,
        };
        Self {
            cxr,
            entries: labels.iter().enumerate().map(entry).collect(),
            shapes: vec![[cxr.size; 2]; labels.len()],
            warnings: vec![Vec::new(); labels.len()],
            hashes: (0..labels.len()).map(|number| number.to_string()).collect(),
            planes: planes.iter().map(|plane| pack(plane)).collect(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.planes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.planes.is_empty()
    }

    /// One image, `[size, size]`, from 0 to 1.
    pub fn plane(&self, index: usize) -> Vec<f32> {
        unpack(&self.planes[index])
    }

    /// Puts other pixels in its place.
    pub fn set_plane(&mut self, index: usize, plane: &[f32]) {
        self.planes[index] = pack(plane);
    }

    /// Whether an image shows tuberculosis; unlabelled ones count as normal.
    pub fn is_tb(&self, index: usize) -> bool {
        self.entries[index].is_tb == Some(true)
    }

    /// Makes sure that every image has a label and both classes have some.
    ///
    /// # Errors
    /// Names the first without, or the class that is empty.
    pub fn require_labels(&self, place: &Path) -> Result<()> {
        if let Some(entry) = self.entries.iter().find(|entry| entry.is_tb.is_none()) {
            return Err(Error::input(place.display(), format!("{} has no label", entry.name))
                .hint("expected the folders TB and Normal, or a table with --labels"));
        }
        let tb = (0..self.len()).filter(|&index| self.is_tb(index)).count();
        if tb == 0 || tb == self.len() {
            let class = if tb == 0 { "TB" } else { "Normal" };
            return Err(Error::input(place.display(), format!("has no images of the class {class}"))
                .hint("both classes are needed"));
        }
        Ok(())
    }

    /// Pairs of images with the same pixels.
    pub fn duplicates(&self) -> Vec<[usize; 2]> {
        let mut first = HashMap::new();
        let mut pairs = Vec::new();
        for (index, hash) in self.hashes.iter().enumerate() {
            match first.get(hash) {
                Some(&other) => pairs.push([other, index]),
                None => {
                    first.insert(hash, index);
                }
            }
        }
        pairs
    }

    /// What must stay together: a number for each image, the same for images of one patient and for copies.
    pub fn groups(&self) -> Vec<usize> {
        let mut root: Vec<usize> = (0..self.len()).collect();
        fn find(root: &mut [usize], mut at: usize) -> usize {
            while root[at] != at {
                root[at] = root[root[at]];
                at = root[at];
            }
            at
        }
        let mut first: HashMap<(&str, &str), usize> = HashMap::new();
        for (index, entry) in self.entries.iter().enumerate() {
            let keys = [
                Some(("hash", self.hashes[index].as_str())),
                entry.patient.as_deref().map(|p| ("patient", p)),
            ];
            for key in keys.into_iter().flatten() {
                let other = *first.entry(key).or_insert(index);
                let (a, b) = (find(&mut root, index), find(&mut root, other));
                root[a.max(b)] = a.min(b);
            }
        }
        (0..self.len()).map(|index| find(&mut root, index)).collect()
    }

    /// Divides the images into `count` folds with the same share of both classes; a patient, and an image with its copies,
    /// is in one fold alone. Returns the fold of each.
    ///
    /// # Errors
    /// When there are too few images, or copies have different labels.
    pub fn folds(&self, count: usize, rng: &mut impl Rng) -> Result<Vec<usize>> {
        for [a, b] in self.duplicates() {
            if self.is_tb(a) != self.is_tb(b) {
                let [a, b] = [a, b].map(|index| &self.entries[index].name);
                return Err(Error::usage(format!("{a} and {b} have the same pixels and different labels"))
                    .hint("remove one of them"));
            }
        }
        let all: Vec<usize> = (0..self.len()).collect();
        if count < 2 || self.len() < LEAST_PER_FOLD * count {
            return Err(Error::usage(format!("{} images cannot be divided into {count} folds", self.len()))
                .hint(format!(
                    "there must be at least two folds, of {LEAST_PER_FOLD} images each; a single one is one of five"
                )));
        }
        self.divide(&all, count, rng)
    }

    fn divide(&self, chosen: &[usize], count: usize, rng: &mut impl Rng) -> Result<Vec<usize>> {
        let group_of = self.groups();
        let mut members: HashMap<usize, Vec<usize>> = HashMap::new();
        for &index in chosen {
            members.entry(group_of[index]).or_default().push(index);
        }
        let mut groups: Vec<Vec<usize>> = members.into_values().collect();
        groups.sort();
        groups.shuffle(rng);
        // The large ones first, while there is room to balance them.
        groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
        let class = |index: usize| usize::from(self.is_tb(index));
        for (number, name) in ["Normal", "TB"].iter().enumerate() {
            let patients =
                groups.iter().filter(|group| group.iter().any(|&index| class(index) == number)).count();
            if patients < count {
                return Err(Error::usage(format!(
                    "the class {name} has {patients} patients for {count} folds"
                ))
                .hint("use fewer folds, or more images"));
            }
        }
        let mut counts = vec![[0usize; 2]; count];
        let mut folds = vec![usize::MAX; self.len()];
        for group in groups {
            let mut own = [0; 2];
            group.iter().for_each(|&index| own[class(index)] += 1);
            // Where the group's classes are rarest.
            let load = |fold: &usize| {
                let counts: &[usize; 2] = &counts[*fold];
                (own[0] * counts[0] + own[1] * counts[1], counts[0] + counts[1])
            };
            let fold = (0..count).min_by_key(load).unwrap_or(0);
            (0..2).for_each(|class| counts[fold][class] += own[class]);
            group.into_iter().for_each(|index| folds[index] = fold);
        }
        Ok(folds)
    }

    /// What to train on, to validate with and to test on when `fold` is held out.
    ///
    /// # Errors
    /// As [`folds`](Self::folds).
    pub fn split(&self, folds: &[usize], fold: usize, rng: &mut impl Rng) -> Result<[Vec<usize>; 3]> {
        let (test, rest): (Vec<usize>, Vec<usize>) = (0..self.len()).partition(|&index| folds[index] == fold);
        let parts = VALIDATION.min(self.rarest(&rest)).max(2);
        let inner = self.divide(&rest, parts, rng)?;
        let (valid, train) = rest.into_iter().partition(|&index| inner[index] == 0);
        Ok([train, valid, test])
    }

    /// Images of the rarer class.
    fn rarest(&self, chosen: &[usize]) -> usize {
        let groups = self.groups();
        let mut seen = [std::collections::HashSet::new(), std::collections::HashSet::new()];
        for &index in chosen {
            seen[usize::from(self.is_tb(index))].insert(groups[index]);
        }
        seen[0].len().min(seen[1].len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Fit, Norm};
    use kiln_core::random_stream;

    fn images(count: usize) -> Images {
        let cxr = Cxr { size: 2, fit: Fit::Stretch, norm: Norm::Zscore };
        let labels: Vec<bool> = (0..count).map(|number| number % 5 == 0).collect();
        let mut images = Images::of(vec![vec![0.0; 4]; count], &labels, cxr);
        // Pairs of one patient, across the classes too.
        for (number, entry) in images.entries.iter_mut().enumerate() {
            entry.patient = Some(format!("p{}", number / 2));
        }
        images.hashes[7] = images.hashes[20].clone();
        images
    }

    #[test]
    fn no_patient_and_no_copy_is_in_two_folds_and_classes_are_shared_out() {
        let mut images = images(100);
        images.entries[7].is_tb = images.entries[20].is_tb;
        let folds = images.folds(5, &mut random_stream(0, "folds", 0)).unwrap();
        for pair in folds.chunks(2) {
            assert_eq!(pair[0], pair[1]);
        }
        assert_eq!(folds[7], folds[20]);
        for fold in 0..5 {
            let members: Vec<usize> = (0..100).filter(|&index| folds[index] == fold).collect();
            let tb = members.iter().filter(|&&index| images.is_tb(index)).count();
            assert!((16..=24).contains(&members.len()) && (3..=6).contains(&tb), "{} {tb}", members.len());
            let [train, valid, test] = images.split(&folds, fold, &mut random_stream(0, "split", 0)).unwrap();
            let mut all: Vec<usize> = [train.clone(), valid.clone(), test].concat();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
            let patients =
                |part: &[usize]| part.iter().map(|index| index / 2).collect::<std::collections::HashSet<_>>();
            assert!(patients(&train).is_disjoint(&patients(&valid)) && !valid.is_empty());
        }
    }

    #[test]
    fn what_cannot_be_divided_is_refused() {
        let error = images(100).folds(5, &mut random_stream(0, "folds", 0)).unwrap_err();
        assert!(error.to_string().contains("7 and 20 have the same pixels"), "{error}");
        let mut few = images(30);
        few.entries.iter_mut().for_each(|entry| entry.is_tb = Some(entry.name == "3"));
        few.hashes[7] = "7".into();
        let error = few.folds(5, &mut random_stream(0, "folds", 0)).unwrap_err();
        assert!(error.to_string().contains("TB has 1 patients"), "{error}");
        let error = few.folds(9, &mut random_stream(0, "folds", 0)).unwrap_err();
        assert!(error.to_string().contains("30 images"), "{error}");
    }
}
