//! Tables as matrices, in the terms of the table that a model has learned from.

use std::collections::HashMap;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{Cells, Column, Table};
use crate::Matrix;

/// A column as a model knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodedColumn {
    /// Its name.
    pub name: String,
    /// Its words, the first being number 0; `None` for a column of numbers.
    pub words: Option<Vec<String>>,
}

/// How the columns of a reference table become those of a matrix: numbers as they are, words by their number in the order
/// of first appearance. Other tables are brought into the same form, columns being matched by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encoder {
    /// The columns of the matrix.
    pub columns: Vec<EncodedColumn>,
}

/// A table as a matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// One column for each of the encoder; NaN where a value is missing.
    pub matrix: Matrix,
    /// What the person should know: missing values, unknown words, columns that were left out.
    pub notices: Vec<String>,
}

impl Encoder {
    /// The encoding that a reference table defines.
    pub fn fit(table: &Table) -> Self {
        let column = |column: &Column| EncodedColumn {
            name: column.name.clone(),
            words: match &column.cells {
                Cells::Numbers(_) => None,
                Cells::Words { words, .. } => Some(words.clone()),
            },
        };
        Self { columns: table.columns().iter().map(column).collect() }
    }

    /// Columns of numbers with these names.
    pub fn numeric(names: impl IntoIterator<Item = String>) -> Self {
        Self { columns: names.into_iter().map(|name| EncodedColumn { name, words: None }).collect() }
    }

    /// The table as a matrix.
    ///
    /// # Errors
    /// When a column is lacking, or holds words where the reference holds numbers.
    pub fn encode(&self, table: &Table) -> Result<Encoded> {
        let mut notices = Vec::new();
        let missing: Vec<&str> = self
            .columns
            .iter()
            .filter(|column| table.column(&column.name).is_none())
            .map(|column| column.name.as_str())
            .collect();
        if let Some(first) = missing.first() {
            return Err(match missing.len() {
                1 => table.no_column(first),
                count => {
                    Error::input(table.source(), format!("lacks {count} columns: {}", missing.join(", ")))
                        .hint("columns are matched by name with those of the training table")
                }
            });
        }
        let mut columns = Vec::with_capacity(self.columns.len());
        for wanted in &self.columns {
            let Some(column) = table.column(&wanted.name) else { continue };
            columns.push(wanted.encode(column, table.source(), &mut notices)?);
        }
        let surplus: Vec<&str> = table
            .columns()
            .iter()
            .map(|column| column.name.as_str())
            .filter(|name| self.columns.iter().all(|column| column.name != *name))
            .collect();
        if !surplus.is_empty() {
            let source = table.source();
            notices.push(format!("{source}: not in the training table, left out: {}", surplus.join(", ")));
        }
        Ok(Encoded { matrix: Matrix::from_columns(table.rows(), &columns), notices })
    }
}

impl EncodedColumn {
    fn encode(&self, column: &Column, source: &str, notices: &mut Vec<String>) -> Result<Vec<f64>> {
        let missing = column.missing();
        if missing > 0 {
            notices.push(format!("{source}: column \"{}\" has {missing} missing values", self.name));
        }
        match (&self.words, &column.cells) {
            (None, Cells::Numbers(numbers)) => Ok(numbers.clone()),
            // A column without any value reads as words or numbers alike.
            (None, Cells::Words { .. }) if missing == column.len() => Ok(vec![f64::NAN; column.len()]),
            (None, Cells::Words { words, codes }) => {
                let is_word = |code: &Option<u32>| {
                    code.is_some_and(|code| words[code as usize].parse::<f64>().is_err())
                };
                let row = codes.iter().position(is_word).unwrap_or_default();
                let word = column.text(row).unwrap_or_default();
                let place = format!("{source}, row {}, column \"{}\"", row + 1, self.name);
                Err(Error::input(place, format!("is \"{word}\", where the training table has numbers"))
                    .hint("write a number, or leave the cell empty where it is missing"))
            }
            (Some(known), _) => {
                let numbers: HashMap<&str, usize> =
                    known.iter().enumerate().map(|(number, word)| (word.as_str(), number)).collect();
                let mut unknown: Vec<String> = Vec::new();
                let number = |row: usize| {
                    let Some(word) = column.text(row) else { return f64::NAN };
                    let number = numbers.get(word.as_str());
                    if number.is_none() && !unknown.contains(&word) {
                        unknown.push(word);
                    }
                    number.map_or(f64::NAN, |&number| number as f64)
                };
                let encoded = (0..column.len()).map(number).collect();
                if !unknown.is_empty() {
                    notices.push(format!(
                        "{source}: column \"{}\" has words that the training table lacks, taken as missing: {}",
                        self.name,
                        unknown.join(", ")
                    ));
                }
                Ok(encoded)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::TableOptions;
    use super::*;

    fn table(name: &str, text: &str) -> Table {
        Table::from_text(name, text.as_bytes(), TableOptions::default()).unwrap()
    }

    #[test]
    fn columns_are_matched_by_name_and_words_numbered_as_in_the_reference() {
        let encoder = Encoder::fit(&table("train", "size,colour\n1,red\n2,blue\n3,red\n"));
        let encoded = encoder.encode(&table("test", "colour,extra,size\nblue,9,5\ngreen,9,\n")).unwrap();
        assert_eq!(encoded.matrix.row(0), [5.0, 1.0]);
        assert!(encoded.matrix.row(1).iter().all(|x| x.is_nan()));
        let notices = encoded.notices.join("\n");
        for words in ["\"size\" has 1 missing", "taken as missing: green", "left out: extra"] {
            assert!(notices.contains(words), "{notices}");
        }
    }

    #[test]
    fn numbers_that_are_words_in_the_reference_are_matched_as_written() {
        let encoder = Encoder::fit(&table("train", "code\n1\nA\n"));
        assert_eq!(encoder.encode(&table("test", "code\n1\n1\n")).unwrap().matrix.values, [0.0, 0.0]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let encoder = Encoder::fit(&table("train", "a,b\n1,2\n"));
        let refusal = |text: &str| encoder.encode(&table("test", text)).unwrap_err().to_string();
        assert_eq!(refusal("a\n1\n"), "test: has no column \"b\"");
        assert_eq!(refusal("c\n1\n"), "test: lacks 2 columns: a, b");
        assert_eq!(
            refusal("a,b\n1,2\n1,x\n"),
            "test, row 2, column \"b\": is \"x\", where the training table has numbers"
        );
    }
}
