//! Stimuli and behaviour: `start,end,label` spans, or series `time_s,…`; a column `animal` tells whose they are.

use std::path::Path;

use kiln_core::{Error, Result};
use kiln_data::{Column, Table, TableOptions};

use super::csv::{TIME, numbers};

/// What happened during the recordings, on their own clocks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Events {
    /// Spans with a beginning, an end and a name.
    pub spans: Vec<Event>,
    /// Times and numbers of every series.
    pub series: Vec<Series>,
}

/// One span.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Whose it is; of all animals where none is named.
    pub animal: Option<String>,
    /// Seconds.
    pub start: f64,
    /// Seconds.
    pub end: f64,
    /// What it was.
    pub label: String,
}

/// One series of a behaviour.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What was measured.
    pub name: String,
    /// Seconds, rising.
    pub time_s: Vec<f64>,
    /// One number a time.
    pub values: Vec<f64>,
}

impl Events {
    /// Reads one table of events.
    ///
    /// # Errors
    /// When it has neither form, a cell is no number, a span ends before it starts, or times do not rise.
    pub fn read(path: &Path) -> Result<Self> {
        let table = Table::read(path, TableOptions::default())?;
        match (table.column("start"), table.column(TIME)) {
            (Some(start), _) => Self::spans(&table, start),
            (None, Some(time)) => Self::series(&table, time),
            (None, None) => {
                Err(Error::input(table.source(), "has neither a column \"start\" nor \"time_s\"")
                    .hint("spans are start,end,label; series are time_s and one column a behaviour"))
            }
        }
    }

    /// Adds what another table holds.
    pub fn extend(&mut self, other: Self) {
        self.spans.extend(other.spans);
        self.series.extend(other.series);
    }

    fn spans(table: &Table, start: &Column) -> Result<Self> {
        let end = table.column("end").ok_or_else(|| table.no_column("end"))?;
        let (start, end) = (numbers(table, start)?, numbers(table, end)?);
        let text = |name: &str, row: usize| table.column(name).and_then(|column| column.text(row));
        let spans = (0..table.rows()).map(|row| {
            let (start, end) = (start[row], end[row]);
            if !(start.is_finite() && end >= start && end.is_finite()) {
                return Err(Error::input(
                    format!("{}: row {}", table.source(), row + 1),
                    format!("a span from {start} to {end} s"),
                )
                .hint("a span has a start and an end that is not before it"));
            }
            let label = text("label", row).unwrap_or_else(|| "event".into());
            Ok(Event { animal: text("animal", row), start, end, label })
        });
        Ok(Self { spans: spans.collect::<Result<_>>()?, series: Vec::new() })
    }

    fn series(table: &Table, time: &Column) -> Result<Self> {
        let time_s = numbers(table, time)?;
        if let Some(at) =
            time_s.windows(2).position(|pair| pair[1].partial_cmp(&pair[0]).is_none_or(|o| o.is_le()))
        {
            return Err(Error::input(table.source(), format!("time does not rise at row {}", at + 2)));
        }
        let others = table.columns().iter().filter(|column| column.name != TIME);
        let series = others.map(|column| {
            let values = numbers(table, column)?;
            match values.iter().position(|v| v.is_nan()) {
                Some(at) => Err(Error::input(
                    format!("{}: column \"{}\", row {}", table.source(), column.name, at + 1),
                    "is empty",
                )
                .hint("a behaviour has a number at every time")),
                None => Ok(Series { name: column.name.clone(), time_s: time_s.clone(), values }),
            }
        });
        Ok(Self { spans: Vec::new(), series: series.collect::<Result<_>>()? })
    }

    /// When an animal's first own span starts.
    pub fn onset(&self, animal: &str) -> Option<f64> {
        let own = self.spans.iter().filter(|event| event.animal.as_deref() == Some(animal));
        own.map(|event| event.start).min_by(f64::total_cmp)
    }
}
