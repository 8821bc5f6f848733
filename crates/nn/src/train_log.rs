//! `train_log.csv`: one row a step, written as training goes.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result, write_atomic};
use serde::{Deserialize, Serialize};

/// One step of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogRow {
    /// Steps done, this one included.
    pub step: usize,
    /// Tokens or samples seen so far.
    pub tokens: usize,
    /// Loss of the step's batch.
    pub loss: f64,
    /// Validation loss, where it was measured after this step.
    pub val_loss: Option<f64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Euclidean norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Seconds of training so far, over all resumed parts.
    pub seconds: f64,
}

/// The names of a row's fields, in order.
const COLUMNS: [&str; 7] = ["step", "tokens", "loss", "val_loss", "lr", "grad_norm", "seconds"];

/// All rows so far, and the file that gets every new one at once.
pub(crate) struct TrainLog {
    pub rows: Vec<LogRow>,
    file: Option<(PathBuf, csv::Writer<File>)>,
}

impl TrainLog {
    /// A log that is kept in memory only.
    pub fn in_memory() -> Self {
        Self { rows: Vec::new(), file: None }
    }

    /// A log at `path` that begins with `rows`; whatever the file held is replaced.
    pub fn create(path: &Path, rows: Vec<LogRow>) -> Result<Self> {
        let failed = |e: csv::Error| Error::work(format!("cannot write {}", path.display())).caused_by(e);
        let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
        writer.write_record(COLUMNS).map_err(failed)?;
        for row in &rows {
            writer.serialize(row).map_err(failed)?;
        }
        let bytes = writer
            .into_inner()
            .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e.into_error()))?;
        write_atomic(path, &bytes)?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("write", path))?;
        let writer = csv::WriterBuilder::new().has_headers(false).from_writer(file);
        Ok(Self { rows, file: Some((path.into(), writer)) })
    }

    /// Goes on with the first `steps` rows of the log at `path`; later ones were written after the
    /// checkpoint and will be written again.
    pub fn resume(path: &Path, steps: usize) -> Result<Self> {
        let malformed = |found: String| {
            Error::input(path.display(), found)
                .hint("the log must be the one that the checkpoint's run wrote")
        };
        let file = File::open(path).map_err(Error::io("read", path))?;
        let mut rows = Vec::with_capacity(steps);
        for (number, row) in csv::Reader::from_reader(file).deserialize().take(steps).enumerate() {
            let row: LogRow =
                row.map_err(|e| malformed(format!("row {} is malformed", number + 1)).caused_by(e))?;
            if row.step != number + 1 {
                return Err(malformed(format!("row {} is of step {}", number + 1, row.step)));
            }
            rows.push(row);
        }
        if rows.len() < steps {
            return Err(malformed(format!("has {} rows, but the checkpoint is of step {steps}", rows.len())));
        }
        Self::create(path, rows)
    }

    /// Adds a row, on disk at once.
    pub fn push(&mut self, row: LogRow) -> Result<()> {
        if let Some((path, writer)) = &mut self.file {
            writer
                .serialize(&row)
                .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e))?;
            writer.flush().map_err(Error::io("write", path))?;
        }
        self.rows.push(row);
        Ok(())
    }
}
