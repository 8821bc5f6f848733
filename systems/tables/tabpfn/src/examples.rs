//! Small tables that come with the crate: what the quick experiment and the tests run on.

use kiln_core::{Error, Result};
use kiln_data::{Encoder, Matrix, Table, TableOptions};

use crate::classifier::classes;

/// Name and text of each table; the column `target` holds the classes.
const TABLES: [(&str, &str); 6] = [
    ("iris", include_str!("../data/iris.csv")),
    ("wine", include_str!("../data/wine.csv")),
    ("balance-scale", include_str!("../data/balance-scale.csv")),
    ("transfusion", include_str!("../data/transfusion.csv")),
    ("vehicle", include_str!("../data/vehicle.csv")),
    ("wdbc", include_str!("../data/wdbc.csv")),
];

/// The target column of the tables.
pub const TARGET: &str = "target";

/// The names of the tables.
pub fn names() -> impl Iterator<Item = &'static str> {
    TABLES.iter().map(|(name, _)| *name)
}

/// A table by name.
///
/// # Errors
/// When there is none of this name.
pub fn table(name: &str) -> Result<Table> {
    let (_, text) = TABLES
        .iter()
        .find(|(other, _)| *other == name)
        .ok_or_else(|| Error::usage(format!("there is no example table \"{name}\"")))?;
    Table::from_text(name, text.as_bytes(), TableOptions::default())
}

/// Measurements of 150 irises `[150, 4]` and their three species.
///
/// # Errors
/// None: the table is part of the crate.
pub fn iris() -> Result<(Matrix, Vec<usize>)> {
    let mut table = table("iris")?;
    let (_, labels) = classes(&table.take(TARGET)?, "iris")?;
    Ok((Encoder::fit(&table).encode(&table)?.matrix, labels))
}
