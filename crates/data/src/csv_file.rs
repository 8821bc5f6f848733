use std::path::Path;

use kiln_core::{Error, Result, write_atomic};
use serde::Serialize;

/// Writes rows as a CSV file, at once and whole. Structs give the header with their fields' names; rows of cells, such as
/// `Vec<String>`, have none, so the first of them is the header.
///
/// ```
/// # fn main() -> kiln_core::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("kiln-write-csv-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder).unwrap();
/// # let path = folder.join("scores.csv");
/// #[derive(serde::Serialize)]
/// struct Score {
///     name: &'static str,
///     accuracy: Option<f64>,
/// }
/// kiln_data::write_csv(&path, [Score { name: "a, b", accuracy: Some(0.5) }, Score { name: "c", accuracy: None }])?;
/// assert_eq!(std::fs::read_to_string(&path).unwrap(), "name,accuracy\n\"a, b\",0.5\nc,\n");
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// When rows differ in length, or the file cannot be written.
pub fn write_csv<R: Serialize>(path: &Path, rows: impl IntoIterator<Item = R>) -> Result<()> {
    let failed = |e: csv::Error| Error::work(format!("cannot write {}", path.display())).caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.serialize(row).map_err(failed)?;
    }
    let text = writer.into_inner().map_err(|e| failed(e.into_error().into()))?;
    write_atomic(path, &text)
}
