//! `log.csv`: one row a step, on disk at once.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result, write_atomic};
use serde::{Deserialize, Serialize};

/// One step of training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LogRow {
    /// Steps made, this one included.
    pub step: usize,
    /// Mean loss of the batch, nats a token.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens a second, of all ranks together.
    pub tokens_per_s: f64,
    /// 10¹² useful operations a second and rank.
    pub tflops: f64,
    /// Idle time of the ranks over their work.
    pub bubble: f64,
}

/// The file, open for more.
pub(crate) struct Log {
    path: PathBuf,
    writer: csv::Writer<File>,
}

const COLUMNS: [&str; 7] = ["step", "loss", "lr", "grad_norm", "tokens_per_s", "tflops", "bubble"];

impl Log {
    /// Begins after the first `steps` rows of the file that is there; later ones will be written again.
    pub fn begin(path: &Path, steps: usize) -> Result<Self> {
        let failed = |e: csv::Error| Error::work(format!("cannot write {}", path.display())).caused_by(e);
        let kept = if steps > 0 { read(path)? } else { Vec::new() };
        let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
        writer.write_record(COLUMNS).map_err(failed)?;
        for row in kept.into_iter().filter(|row| row.step <= steps) {
            writer.serialize(row).map_err(failed)?;
        }
        let bytes = writer
            .into_inner()
            .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e.into_error()))?;
        write_atomic(path, &bytes)?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("write", path))?;
        Ok(Self { path: path.into(), writer: csv::WriterBuilder::new().has_headers(false).from_writer(file) })
    }

    /// Adds a row.
    pub fn push(&mut self, row: LogRow) -> Result<()> {
        let path = &self.path;
        self.writer
            .serialize(row)
            .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e))?;
        self.writer.flush().map_err(Error::io("write", path))
    }
}

/// All rows of a log.
///
/// # Errors
/// When the file is missing or malformed.
pub fn read(path: &Path) -> Result<Vec<LogRow>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let rows = csv::Reader::from_reader(file).into_deserialize();
    let row = |(number, row): (usize, csv::Result<LogRow>)| {
        row.map_err(|e| Error::input(path.display(), format!("row {} is malformed", number + 1)).caused_by(e))
    };
    rows.enumerate().map(row).collect()
}
