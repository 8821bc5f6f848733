//! Arrays of any element type from NumPy's files, as doubles: they hold every number of up to 32 bits exactly.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_compiler::loops::{Buffer, Elements, read_buffer, read_buffers};
use kiln_core::{Error, Result};

/// An array, row after row.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Extents.
    pub shape: Vec<usize>,
    /// Elements.
    pub values: Vec<f64>,
}

impl From<Buffer> for Array {
    fn from(buffer: Buffer) -> Self {
        let values = match buffer.elements {
            Elements::F32(values) => values.into_iter().map(f64::from).collect(),
            Elements::F64(values) => values,
            Elements::I32(values) => values.into_iter().map(f64::from).collect(),
            Elements::I64(values) => values.into_iter().map(|x| x as f64).collect(),
            Elements::Bool(values) => values.into_iter().map(f64::from).collect(),
        };
        Self { shape: buffer.shape, values }
    }
}

/// Reads every array of an `.npz` file.
///
/// # Errors
/// When the file is missing or malformed.
pub fn read(path: &Path) -> Result<BTreeMap<String, Array>> {
    Ok(read_buffers(path)?.into_iter().map(|(name, buffer)| (name, buffer.into())).collect())
}

/// Reads a single array: a `.npy` file, or the only array of an `.npz` file.
///
/// # Errors
/// As [`read`], when there is not exactly one array, and when a number is not finite.
pub fn read_one(path: &Path) -> Result<Array> {
    let array: Array = if path.extension().is_some_and(|extension| extension == "npy") {
        read_buffer(path)?.into()
    } else {
        let mut all = read(path)?;
        match (all.pop_first(), all.len()) {
            (Some((_, array)), 0) => array,
            (None, _) => return Err(Error::input(path.display(), "holds no array")),
            (Some(_), more) => {
                return Err(Error::input(
                    path.display(),
                    format!("holds {} arrays, must hold one", more + 1),
                )
                .hint("a .npy file, as numpy.save writes it, holds one"));
            }
        }
    };
    match array.values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(Error::input(
            path.display(),
            format!("element {at} is {}, not a finite number", array.values[at]),
        )),
        None => Ok(array),
    }
}
