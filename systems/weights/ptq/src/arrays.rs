//! Arrays of any element type from NumPy's files, as doubles: they hold every number of up to 32 bits exactly.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_core::{Error, Result};
use kiln_data::{read_npz_as, write_npz_as};
use npyz::{NpyFile, Order, WriterBuilder};

/// An array, row after row.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Extents.
    pub shape: Vec<usize>,
    /// Elements.
    pub values: Vec<f64>,
}

/// Reads every array of an `.npz` file.
///
/// # Errors
/// When the file is missing or malformed, or an array is neither of whole numbers nor of floats.
pub fn read(path: &Path) -> Result<BTreeMap<String, Array>> {
    read_npz_as(path, decode)
}

/// Reads a single array: a `.npy` file, or the only array of an `.npz` file.
///
/// # Errors
/// As [`read`], when there is not exactly one array, and when a number is not finite.
pub fn read_one(path: &Path) -> Result<Array> {
    let array = if path.extension().is_some_and(|extension| extension == "npy") {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        decode(&bytes).map_err(|found| Error::input(path.display(), found))?
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

fn decode(bytes: &[u8]) -> Result<Array, String> {
    let file = NpyFile::new(bytes).map_err(|e| format!("has a malformed header: {e}"))?;
    let header = file.header().clone();
    if header.order() != Order::C {
        return Err("is stored by columns; numpy.ascontiguousarray stores it by rows".into());
    }
    let shape: Option<Vec<usize>> = header.shape().iter().map(|&n| usize::try_from(n).ok()).collect();
    let elements = shape.as_ref().and_then(|shape| shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)));
    let (Some(shape), Some(count)) = (shape, elements) else {
        return Err(format!("claims the shape {:?}", header.shape()));
    };
    let size = header.dtype().num_bytes().unwrap_or(0);
    if count.checked_mul(size).is_none_or(|needed| needed > bytes.len()) {
        return Err(format!("claims the shape {shape:?}, more than its {} bytes hold", bytes.len()));
    }
    let short = |e: std::io::Error| format!("ends too early: {e}");
    /// Tries one type after another.
    macro_rules! first_of {
        ($file:expr, $($element:ty),+) => {{
            let file = $file;
            $(let file = match file.try_data::<$element>() {
                Ok(data) => {
                    let values: Result<Vec<$element>, _> = data.collect();
                    let values = values.map_err(short)?.into_iter().map(|x| x as f64).collect();
                    return Ok(Array { shape, values });
                }
                Err(file) => file,
            };)+
            drop(file);
        }};
    }
    first_of!(file, f64, f32, i64, i32, i16, i8, u8, u16, u32);
    Err(format!("has the type {}; Kiln reads whole numbers and floats", header.dtype().descr()))
}

/// An array to be written.
#[derive(Debug, Clone, PartialEq)]
pub enum Column {
    /// Doubles
    F64(Vec<usize>, Vec<f64>),
    /// Whole numbers
    I32(Vec<usize>, Vec<i32>),
}

/// Writes arrays by name.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, arrays: &[(&str, Column)]) -> Result<()> {
    write_npz_as(path, arrays.iter().map(|(name, array)| (*name, array)), |array| {
        let mut bytes = Vec::new();
        /// One arm a type.
        macro_rules! encode {
            ($shape:expr, $values:expr) => {{
                let shape: Vec<u64> = $shape.iter().map(|&n| n as u64).collect();
                let mut writer =
                    npyz::WriteOptions::new().default_dtype().shape(&shape).writer(&mut bytes).begin_nd()?;
                writer.extend($values.iter().copied())?;
                writer.finish()?;
            }};
        }
        match array {
            Column::F64(shape, values) => encode!(shape, values),
            Column::I32(shape, values) => encode!(shape, values),
        }
        Ok(bytes)
    })
}
