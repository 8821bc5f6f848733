//! What an experiment found: claims, tables and plots, as JSON and as one self-contained page.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::plot::Plot;
use crate::{Card, Error, Result, Scale, write_atomic};

/// On which side of its threshold a measured figure must lie.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "must", content = "value", rename_all = "snake_case")]
pub enum Threshold {
    /// Measured ≥ value.
    AtLeast(f64),
    /// Measured ≤ value.
    AtMost(f64),
}

/// One claim of the paper, with what was measured here.
#[derive(Debug, Clone, Serialize)]
pub struct Claim {
    /// The claim in one sentence.
    pub name: String,
    /// The paper's own figure, in words.
    pub paper: String,
    /// The figure measured in this run.
    pub measured: f64,
    /// The unit of `measured` and of the threshold.
    pub unit: String,
    /// What the figure must satisfy.
    pub threshold: Threshold,
    /// Whether it does: computed, never set. A figure that is not a number does not hold.
    held: bool,
}

impl Claim {
    /// A claim about `measured`; whether it holds is computed here.
    pub fn new(
        name: impl Into<String>,
        paper: impl Into<String>,
        measured: f64,
        unit: impl Into<String>,
        threshold: Threshold,
    ) -> Self {
        let held = match threshold {
            Threshold::AtLeast(limit) => measured >= limit,
            Threshold::AtMost(limit) => measured <= limit,
        };
        Self { name: name.into(), paper: paper.into(), measured, unit: unit.into(), threshold, held }
    }

    /// Whether the measured figure satisfies the threshold.
    pub fn held(&self) -> bool {
        self.held
    }
}

/// A table of results; every row has one cell a column.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// What the table shows.
    pub title: String,
    /// Column heads, with units.
    pub columns: Vec<String>,
    /// Cells as they are to be printed.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        Self {
            title: title.into(),
            columns: columns.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// When the number of cells is not the number of columns.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Self {
        let row: Vec<String> = cells.into_iter().map(Into::into).collect();
        assert_eq!(row.len(), self.columns.len(), "a row of table \"{}\" has the wrong length", self.title);
        self.rows.push(row);
        self
    }
}

/// The outcome of a reference experiment, or what a command found in data of one's own.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The system.
    pub system: Card,
    /// At which scale the experiment ran; `None` for data of one's own.
    pub scale: Option<Scale>,
    /// The seed that repeats it.
    pub seed: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// The paper's claims against what was measured.
    pub claims: Vec<Claim>,
    /// Tables, in reading order.
    pub tables: Vec<Table>,
    /// Plots, in reading order.
    pub plots: Vec<Plot>,
    /// What the reader must know to judge the figures.
    pub notes: Vec<String>,
}

impl Report {
    /// An empty report of a reference experiment.
    pub fn new(system: Card, scale: Scale, seed: u64) -> Self {
        Self { scale: Some(scale), seed, ..Self::on_data(system) }
    }

    /// An empty report on data of one's own.
    pub fn on_data(system: Card) -> Self {
        Self {
            system,
            scale: None,
            seed: 0,
            seconds: 0.0,
            claims: Vec::new(),
            tables: Vec::new(),
            plots: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Whether every claim holds.
    pub fn all_held(&self) -> bool {
        self.claims.iter().all(Claim::held)
    }

    /// Writes `report.json`, `report.html` and every plot as SVG and PNG into `folder`.
    ///
    /// # Errors
    /// When the folder or a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let json = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::work("cannot write the report as JSON").caused_by(e))?;
        write_atomic(&folder.join("report.json"), &json)?;
        for (number, plot) in self.plots.iter().enumerate() {
            let stem = format!("{:02}-{}", number + 1, plot.file_stem());
            plot.save(&folder.join(&stem).with_extension("svg"))?;
            plot.save(&folder.join(&stem).with_extension("png"))?;
        }
        let page = folder.join("report.html");
        write_atomic(&page, crate::html::page(self.system.title, std::slice::from_ref(self))?.as_bytes())?;
        Ok(page)
    }
}
