//! Tables of alerts as CSV.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use csv::StringRecord;
use kiln_core::{Error, Result};

/// Numbers as surveys' tools write that there is none.
const NOTHING: [&str; 6] = ["", "nan", "NaN", "NA", "null", "None"];

/// A table whose columns are found by name.
pub struct CsvTable<'a> {
    path: &'a Path,
    header: StringRecord,
    reader: csv::Reader<BufReader<File>>,
    row: StringRecord,
    number: usize,
}

impl<'a> CsvTable<'a> {
    /// Opens a table that must have these columns.
    ///
    /// # Errors
    /// Names the first column that it lacks.
    pub fn open(path: &'a Path, required: &[&str]) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let mut reader = csv::Reader::from_reader(BufReader::new(file));
        let header =
            reader.headers().map_err(|e| Error::input(path.display(), "is no table").caused_by(e))?.clone();
        let table = Self { path, header, reader, row: StringRecord::new(), number: 0 };
        match required.iter().find(|name| table.column(name).is_none()) {
            None => Ok(table),
            Some(name) => {
                let columns: Vec<&str> = table.header.iter().take(12).collect();
                Err(Error::input(path.display(), format!("has no column {name}")).hint(format!(
                    "its columns are {}{}",
                    columns.join(", "),
                    if table.header.len() > 12 { ", …" } else { "" }
                )))
            }
        }
    }

    /// Where a column is.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|column| column.trim() == name)
    }

    /// Goes on to the next row; false at the end.
    ///
    /// # Errors
    /// When the row has other columns than the table, or is not UTF-8.
    pub fn advance(&mut self) -> Result<bool> {
        self.number += 1;
        let place = self.place();
        self.reader
            .read_record(&mut self.row)
            .map_err(|e| Error::input(place, "is no row of the table").caused_by(e))
    }

    /// The file and the row, for errors.
    pub fn place(&self) -> String {
        format!("{}, row {}", self.path.display(), self.number)
    }

    /// A cell of the row.
    pub fn text(&self, column: usize) -> &str {
        self.row.get(column).unwrap_or_default().trim()
    }

    /// A cell as a number; `None` where it is empty or says that there is none.
    ///
    /// # Errors
    /// When the cell holds something else.
    pub fn number(&self, column: usize) -> Result<Option<f64>> {
        let text = self.text(column);
        if NOTHING.contains(&text) {
            return Ok(None);
        }
        let value =
            text.parse::<f64>().map_err(|_| self.error(column, &format!("holds {text:?}, no number")))?;
        Ok(Some(value).filter(|value| !value.is_nan()))
    }

    /// A cell as a number that must be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn required(&self, column: usize) -> Result<f64> {
        let value = self.number(column)?.filter(|value| value.is_finite());
        value.ok_or_else(|| {
            self.error(column, &format!("holds {:?}, but a number is needed", self.text(column)))
        })
    }

    /// A cell as a label, 0 or 1; `None` where it is empty.
    ///
    /// # Errors
    /// When it holds something else.
    pub fn label(&self, column: usize) -> Result<Option<bool>> {
        match self.number(column)? {
            None => Ok(None),
            Some(0.0) => Ok(Some(false)),
            Some(1.0) => Ok(Some(true)),
            Some(other) => Err(self.error(column, &format!("holds {other}")).hint("labels are 0 or 1")),
        }
    }

    fn error(&self, column: usize, found: &str) -> Error {
        Error::input(self.place(), format!("column {} {found}", &self.header[column]))
    }
}
