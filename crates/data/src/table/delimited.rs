//! Lines of cells between commas, semicolons or tabs.

use kiln_core::{Error, Result};

use super::{Cells, Column, Distinct, TableOptions, is_missing};

/// The columns of a text whose first line is the header.
pub fn parse(source: &str, text: &str, options: TableOptions) -> Result<Vec<Column>> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(separator(text))
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    let malformed = |e: csv::Error| Error::input(source, "is not a table").caused_by(e);
    let header = reader.headers().map_err(malformed)?.clone();
    check_header(source, &header)?;
    let spans_lines = |record: &csv::StringRecord| record.iter().any(|cell| cell.contains('\n'));
    if spans_lines(&header) {
        return Err(Error::input(
            format!("{source}, line 1"),
            "has a column name that goes on in the next line",
        )
        .hint("a double quote is not closed"));
    }
    let mut columns: Vec<Texts> = header.iter().map(|_| Texts::default()).collect();
    let mut lines = Vec::new();
    for record in reader.records() {
        let record = record.map_err(malformed)?;
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != header.len() {
            let cells = if record.len() == 1 { "cell" } else { "cells" };
            let found = format!("has {} {cells}, the header has {}", record.len(), header.len());
            return Err(Error::input(format!("{source}, line {line}"), found).hint(
                match spans_lines(&record) {
                    true => "a cell goes on in the next line: is a double quote not closed?",
                    false => "a cell that holds the separator must stand in double quotes",
                },
            ));
        }
        lines.push(line);
        for (column, cell) in columns.iter_mut().zip(&record) {
            column.push(cell);
        }
    }
    let named = header.iter().enumerate().zip(columns);
    named
        .map(|((number, name), texts)| {
            let name = match name {
                "" => format!("column {}", number + 1),
                name => name.to_string(),
            };
            let place = |row: usize| format!("{source}, line {}, column \"{name}\"", lines[row]);
            let cells = texts.cells(options, &place)?;
            Ok(Column { name, cells })
        })
        .collect()
}

/// The separator that the first line holds most often outside quotes.
fn separator(text: &str) -> u8 {
    let mut counts = [(b',', 0), (b';', 0), (b'\t', 0)];
    let mut quoted = false;
    for byte in text.trim_start().lines().next().unwrap_or_default().bytes() {
        quoted ^= byte == b'"';
        if let Some((_, count)) = counts.iter_mut().find(|(separator, _)| *separator == byte && !quoted) {
            *count += 1;
        }
    }
    // The first of equals: a comma.
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    counts.iter().find(|(_, count)| *count == most).map_or(b',', |(separator, _)| *separator)
}

/// A first line of numbers is a row, unless it numbers the columns.
fn check_header(source: &str, header: &csv::StringRecord) -> Result<()> {
    let numbers: Option<Vec<f64>> = header.iter().map(|name| name.parse().ok()).collect();
    let Some(numbers) = numbers else { return Ok(()) };
    let counts = |from: f64| numbers.iter().enumerate().all(|(i, &number)| number == from + i as f64);
    if counts(0.0) || counts(1.0) {
        return Ok(());
    }
    Err(Error::input(format!("{source}, line 1"), "holds only numbers, where the column names should be")
        .hint("write a first line with a name for every column"))
}

/// The cells of a column as they stand in the file, one behind another.
#[derive(Default)]
struct Texts {
    text: String,
    ends: Vec<usize>,
}

impl Texts {
    fn push(&mut self, cell: &str) {
        self.text.push_str(cell);
        self.ends.push(self.text.len());
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(&0).chain(&self.ends);
        starts.zip(&self.ends).map(|(&start, &end)| &self.text[start..end])
    }

    /// Numbers if all are, otherwise words; `place` names a row.
    fn cells(&self, options: TableOptions, place: &dyn Fn(usize) -> String) -> Result<Cells> {
        let numbers: Option<Vec<f64>> = self.iter().map(|cell| number(cell, options)).collect();
        if let Some(numbers) = numbers {
            return match numbers.iter().position(|number| number.is_infinite()) {
                None => Ok(Cells::Numbers(numbers)),
                Some(row) => Err(Error::input(place(row), "is infinite")
                    .hint("write a finite number, or leave the cell empty where it is missing")),
            };
        }
        let commas = TableOptions { decimal_comma: true };
        if !options.decimal_comma
            && self.iter().all(|cell| number(cell, commas).is_some())
            && let Some((row, cell)) = self.iter().enumerate().find(|(_, cell)| cell.contains(','))
        {
            return Err(Error::input(place(row), format!("\"{cell}\" has a decimal comma"))
                .hint("write decimal points, or say --decimal-comma"));
        }
        let mut distinct = Distinct::default();
        let code = |cell| if is_missing(cell) { None } else { Some(distinct.number(cell)) };
        let codes = self.iter().map(code).collect();
        Ok(Cells::Words { words: distinct.words, codes })
    }
}

/// The number in a cell, NaN if it is missing, `None` if it is a word.
fn number(cell: &str, options: TableOptions) -> Option<f64> {
    if is_missing(cell) {
        return Some(f64::NAN);
    }
    match options.decimal_comma && !cell.contains('.') {
        true => cell.replacen(',', ".", 1).parse().ok(),
        false => cell.parse().ok(),
    }
}
