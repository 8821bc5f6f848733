//! Where recordings and their labels are found: in the folders of the corpora TUAB and NMT, or in a table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_data::{Table, TableOptions};
use serde::{Deserialize, Serialize};

use crate::dataset::{About, Split};

/// How recordings lie in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// {train,eval}/{normal,abnormal}/**/<subject>_s00x_t00y.edf
    Tuab,
    /// {normal,abnormal}/{train,eval}/*.edf with Labels.csv (recordname, label, age, gender, loc)
    Nmt,
    /// Any folder, with a table of labels (path, label, and optionally subject, age, sex, split)
    Csv,
}

/// A recording that is yet to be read.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// What is known of it.
    pub about: About,
}

/// Finds the recordings of a folder.
///
/// # Errors
/// When there are none, a label is unknown, or the table is malformed. Rows that name absent files are returned apart.
pub fn find(
    folder: &Path,
    layout: Layout,
    labels: Option<&Path>,
    positive: Option<&str>,
) -> Result<(Vec<Found>, Vec<Absent>)> {
    let (mut found, absent) = match layout {
        Layout::Tuab => (tuab(folder)?, Vec::new()),
        Layout::Nmt => (nmt(folder, labels)?, Vec::new()),
        Layout::Csv => {
            let labels = labels.ok_or_else(|| {
                Error::usage("recordings in a folder of one's own need a table of labels")
                    .hint("give --labels F.csv with the columns path and label")
            })?;
            table(folder, labels, positive)?
        }
    };
    if found.is_empty() {
        return Err(Error::input(folder.display(), "holds no recordings in this layout")
            .hint("check --layout; recordings end in .edf or .bdf"));
    }
    found.sort_by(|a, b| a.about.id.cmp(&b.about.id));
    if let Some(pair) = found.windows(2).find(|pair| pair[0].about.id == pair[1].about.id) {
        let (a, b) = (pair[0].path.display(), pair[1].path.display());
        return Err(Error::input(folder.display(), format!("{a} and {b} would have the same name")));
    }
    Ok((found, absent))
}

/// A row of a table that names a file which is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absent {
    /// The name.
    pub path: PathBuf,
    /// The row, counted from 1.
    pub row: usize,
}

/// Keeps the first recording of every subject.
pub fn unique_subjects(found: Vec<Found>) -> Vec<Found> {
    let mut seen = BTreeSet::new();
    found.into_iter().filter(|f| f.about.subject.clone().is_none_or(|subject| seen.insert(subject))).collect()
}

/// Drops subjects of whom one recording is normal and another is not.
pub fn drop_contradictory(found: Vec<Found>) -> Vec<Found> {
    let mut labels: BTreeMap<String, BTreeSet<Option<bool>>> = BTreeMap::new();
    for f in &found {
        if let Some(subject) = &f.about.subject {
            labels.entry(subject.clone()).or_default().insert(f.about.label);
        }
    }
    found
        .into_iter()
        .filter(|f| f.about.subject.as_ref().is_none_or(|subject| labels[subject].len() == 1))
        .collect()
}

/// Every file below a folder that ends as recordings do, in the order of their names.
pub fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io("read", &folder))? {
            let entry = entry.map_err(Error::io("read", &folder))?;
            let kind = entry.file_type().map_err(Error::io("read", entry.path()))?;
            // Links to folders are not followed: they may lead in a circle.
            if kind.is_dir() {
                folders.push(entry.path());
            } else if is_recording(&entry.path()) {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a name ends as those of recordings do.
pub fn is_recording(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str()).map(str::to_lowercase);
    matches!(ending.as_deref(), Some("edf" | "bdf" | "rec"))
}

/// The name of a recording: its path below `folder` without the ending, on one level.
pub fn id_of(path: &Path, folder: &Path) -> String {
    let below = path.strip_prefix(folder).unwrap_or(path).with_extension("");
    let parts: Vec<String> = below.iter().map(|part| part.to_string_lossy().into()).collect();
    parts.join("_").replace(['/', '\\'], "_")
}

/// `true` for a pathological, `false` for a normal recording.
fn label_of(text: &str, positive: Option<&str>) -> Option<bool> {
    if let Some(positive) = positive {
        return Some(text.trim() == positive);
    }
    match text.trim().to_lowercase().as_str() {
        "normal" | "0" | "false" | "healthy" => Some(false),
        "abnormal" | "pathological" | "1" | "true" => Some(true),
        _ => None,
    }
}

fn tuab(folder: &Path) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for (split, name) in [(Split::Train, "train"), (Split::Eval, "eval")] {
        for (label, kind) in [(false, "normal"), (true, "abnormal")] {
            let part = folder.join(name).join(kind);
            if !part.is_dir() {
                continue;
            }
            for path in files_below(&part)? {
                let id = path.file_stem().map(|s| s.to_string_lossy().to_string()).unwrap_or_default();
                let subject = id.split("_s").next().unwrap_or(&id).to_string();
                let about = About {
                    id,
                    label: Some(label),
                    subject: Some(subject),
                    age: None,
                    sex: None,
                    split: Some(split),
                };
                found.push(Found { path, about });
            }
        }
    }
    Ok(found)
}

fn nmt(folder: &Path, labels: Option<&Path>) -> Result<Vec<Found>> {
    let table = labels.map_or_else(|| folder.join("Labels.csv"), Path::to_path_buf);
    let about = match table.is_file() {
        true => Some(Sheet::read(&table)?),
        false => None,
    };
    let mut found = Vec::new();
    for (label, kind) in [(false, "normal"), (true, "abnormal")] {
        for (split, name) in [(Split::Train, "train"), (Split::Eval, "eval")] {
            let part = folder.join(kind).join(name);
            if !part.is_dir() {
                continue;
            }
            for path in files_below(&part)? {
                let id = path.file_stem().map(|s| s.to_string_lossy().to_string()).unwrap_or_default();
                let row = about.as_ref().and_then(|sheet| sheet.row_of("recordname", &id));
                let cell =
                    |name: &str| about.as_ref().zip(row).and_then(|(sheet, row)| sheet.cell(name, row));
                let about = About {
                    label: Some(label),
                    subject: Some(id.clone()),
                    age: cell("age").and_then(|age| age.parse().ok()),
                    sex: cell("gender"),
                    split: Some(split),
                    id,
                };
                found.push(Found { path, about });
            }
        }
    }
    Ok(found)
}

fn table(folder: &Path, labels: &Path, positive: Option<&str>) -> Result<(Vec<Found>, Vec<Absent>)> {
    let sheet = Sheet::read(labels)?;
    let (mut found, mut absent) = (Vec::new(), Vec::new());
    for row in 0..sheet.rows() {
        let name = sheet.required("path", row)?;
        let about = sheet.about(row, id_of(Path::new(&name), folder), positive)?;
        // As it stands, below the folder, or beside the table.
        let beside = labels.parent().unwrap_or(Path::new("."));
        let places = [folder.join(&name), beside.join(&name), PathBuf::from(&name)];
        match places.iter().find(|path| path.is_file()) {
            Some(path) => found.push(Found { path: path.clone(), about }),
            None => absent.push(Absent { path: name.into(), row: row + 1 }),
        }
    }
    if found.is_empty() && !absent.is_empty() {
        let found = format!("names {} files, none of which is in {}", absent.len(), folder.display());
        return Err(Error::input(labels.display(), found)
            .hint(format!("the first is {}; paths count from that folder", absent[0].path.display())));
    }
    Ok((found, absent))
}

/// A table of labels.
pub struct Sheet {
    table: Table,
    path: PathBuf,
}

impl Sheet {
    /// Reads a table.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self { table: Table::read(path, TableOptions::default())?, path: path.into() })
    }

    /// Rows below the head.
    pub fn rows(&self) -> usize {
        self.table.rows()
    }

    /// A cell, where there is such a column and the cell is not empty.
    pub fn cell(&self, column: &str, row: usize) -> Option<String> {
        self.table.columns().iter().find(|c| c.name.trim().eq_ignore_ascii_case(column))?.text(row)
    }

    /// A cell that must be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn required(&self, column: &str, row: usize) -> Result<String> {
        self.cell(column, row).ok_or_else(|| {
            let names: Vec<&str> = self.table.columns().iter().map(|c| c.name.as_str()).collect();
            Error::input(format!("{}: row {}", self.path.display(), row + 1), format!("has no {column}"))
                .hint(format!("the columns are {}", names.join(", ")))
        })
    }

    fn row_of(&self, column: &str, value: &str) -> Option<usize> {
        (0..self.rows()).find(|&row| {
            self.cell(column, row).is_some_and(|cell| Path::new(&cell).with_extension("") == Path::new(value))
        })
    }

    /// What a row says of a recording with this name.
    ///
    /// # Errors
    /// When the label or split is unknown.
    pub fn about(&self, row: usize, id: String, positive: Option<&str>) -> Result<About> {
        let place = || format!("{}: row {}", self.path.display(), row + 1);
        let label = match self.cell("label", row) {
            None => None,
            Some(text) => Some(label_of(&text, positive).ok_or_else(|| {
                Error::input(place(), format!("the label \"{text}\" is unknown")).hint(
                    "write normal or abnormal, 0 or 1, or name what counts as pathological with --positive",
                )
            })?),
        };
        let split = match self.cell("split", row) {
            None => None,
            Some(text) => Some(Split::of(&text).ok_or_else(|| {
                Error::input(place(), format!("the split \"{text}\" is unknown")).hint("write train or eval")
            })?),
        };
        let age = match self.cell("age", row) {
            None => None,
            Some(text) => Some(
                text.parse()
                    .map_err(|_| Error::input(place(), format!("the age \"{text}\" is no number")))?,
            ),
        };
        Ok(About { id, label, subject: self.cell("subject", row), age, sex: self.cell("sex", row), split })
    }
}
