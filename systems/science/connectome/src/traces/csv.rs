//! Traces as a table: `time_s,<neuron>,…`, one file an animal.

use std::path::Path;

use kiln_core::{Error, Result};
use kiln_data::{Cells, Table, TableOptions};

use super::{Recording, animal_name};

/// The column that holds the time.
pub const TIME: &str = "time_s";

pub fn read(path: &Path) -> Result<Recording> {
    let mut table = Table::read(path, TableOptions::default())?;
    let time = numbers(&table, table.column(TIME).ok_or_else(|| table.no_column(TIME))?)?;
    table.take(TIME)?;
    let neurons = table.columns().iter().map(|column| column.name.clone()).collect();
    let traces = table.columns().iter().map(|column| numbers(&table, column)).collect::<Result<_>>()?;
    Ok(Recording {
        animal: animal_name(path),
        source: path.display().to_string(),
        neurons,
        time_s: time,
        traces,
        behaviours: Vec::new(),
    })
}

/// The numbers of a column.
pub fn numbers(table: &Table, column: &kiln_data::Column) -> Result<Vec<f64>> {
    match &column.cells {
        Cells::Numbers(numbers) => Ok(numbers.clone()),
        Cells::Words { words, codes } if words.is_empty() => Ok(vec![f64::NAN; codes.len()]),
        Cells::Words { words, codes } => {
            let word = words.iter().find(|word| word.parse::<f64>().is_err()).unwrap_or(&words[0]);
            let is_it = |code: &Option<u32>| code.is_some_and(|code| words[code as usize] == *word);
            let row = codes.iter().position(is_it).unwrap_or(0) + 1;
            let place = format!("{}: column \"{}\", row {row}", table.source(), column.name);
            Err(Error::input(place, format!("\"{word}\" is no number"))
                .hint("every column but time_s is one neuron's trace; leave missing samples empty"))
        }
    }
}
