//! The arrays that programs work on, and NumPy files of them.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use kiln_core::{Error, Result};
use kiln_data::{read_npz_as, write_npz_as};
use npyz::{NpyFile, Order, WriterBuilder};

use super::program::ScalarType;
use super::value::Value;

/// An array, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    /// Extents.
    pub shape: Vec<usize>,
    /// Elements.
    pub elements: Elements,
}

/// Elements of one type.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each is named after its type")]
pub enum Elements {
    F32(Vec<f32>),
    F64(Vec<f64>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    Bool(Vec<bool>),
}

/// Does the same with the elements, whatever their type is.
macro_rules! each_type {
    ($elements:expr, $values:ident, $variant:ident => $do:expr) => {
        match $elements {
            Elements::F32($values) => {
                use Value::F32 as $variant;
                $do
            }
            Elements::F64($values) => {
                use Value::F64 as $variant;
                $do
            }
            Elements::I32($values) => {
                use Value::I32 as $variant;
                $do
            }
            Elements::I64($values) => {
                use Value::I64 as $variant;
                $do
            }
            Elements::Bool($values) => {
                use Value::Bool as $variant;
                $do
            }
        }
    };
}

impl Buffer {
    /// Zeros.
    pub fn zeros(dtype: ScalarType, shape: &[usize]) -> Self {
        let count = shape.iter().product();
        let elements = match dtype {
            ScalarType::F32 => Elements::F32(vec![0.0; count]),
            ScalarType::F64 => Elements::F64(vec![0.0; count]),
            ScalarType::I32 => Elements::I32(vec![0; count]),
            ScalarType::I64 => Elements::I64(vec![0; count]),
            ScalarType::Bool => Elements::Bool(vec![false; count]),
        };
        Self { shape: shape.to_vec(), elements }
    }

    /// A tensor as an array; `None` when it holds other elements than f32, f64, i32, i64 or truth values.
    pub fn from_tensor(data: &TensorData) -> Option<Self> {
        let elements = match data.dtype() {
            DType::F32 => Elements::F32(data.try_to_vec().ok()?),
            DType::F64 => Elements::F64(data.try_to_vec().ok()?),
            DType::I32 => Elements::I32(data.try_to_vec().ok()?),
            DType::I64 => Elements::I64(data.try_to_vec().ok()?),
            DType::Bool(_) => Elements::Bool(data.iter::<bool>().collect()),
            _ => return None,
        };
        Some(Self { shape: data.shape().to_vec(), elements })
    }

    /// The array as a tensor.
    pub fn to_tensor(&self) -> TensorData {
        each_type!(&self.elements, values, V => {
            let _ = V;
            TensorData::new(values.clone(), self.shape.clone())
        })
    }

    /// Type of the elements.
    pub fn dtype(&self) -> ScalarType {
        match self.elements {
            Elements::F32(_) => ScalarType::F32,
            Elements::F64(_) => ScalarType::F64,
            Elements::I32(_) => ScalarType::I32,
            Elements::I64(_) => ScalarType::I64,
            Elements::Bool(_) => ScalarType::Bool,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each_type!(&self.elements, values, V => {
            let _ = V;
            values.len()
        })
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element at a place in row-major order.
    ///
    /// # Panics
    /// When there is none.
    pub fn get(&self, at: usize) -> Value {
        each_type!(&self.elements, values, V => V(values[at]))
    }

    /// Changes the element at a place in row-major order.
    ///
    /// # Panics
    /// When there is none, or the value is of another type.
    pub fn set(&mut self, at: usize, value: Value) {
        each_type!(&mut self.elements, values, V => match value {
            V(value) => values[at] = value,
            other => panic!("an element of type {} cannot be {other:?}", self.dtype()),
        });
    }

    /// Makes every element 0.
    pub fn clear(&mut self) {
        each_type!(&mut self.elements, values, V => {
            let _ = V;
            values.fill(Default::default());
        });
    }

    /// Whether both hold the same values bit for bit, where any NaN is as good as another.
    pub fn same(&self, other: &Self) -> bool {
        self.shape == other.shape
            && self.dtype() == other.dtype()
            && (0..self.len()).all(|at| self.get(at).same(other.get(at)))
    }
}

/// Reads every array of an `.npz` file; integers of fewer bits become i64.
///
/// # Errors
/// When the file is missing or malformed, or an array holds neither floats of 32 or 64 bits, integers nor truth values.
pub fn read_buffers(path: &Path) -> Result<BTreeMap<String, Buffer>> {
    read_npz_as(path, decode)
}

/// Reads the array of an `.npy` file.
///
/// # Errors
/// As [`read_buffers`].
pub fn read_buffer(path: &Path) -> Result<Buffer> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    decode(&bytes).map_err(|found| Error::input(path.display(), found))
}

/// Writes arrays into an `.npz` file.
///
/// # Errors
/// When it cannot be written.
pub fn write_buffers(path: &Path, buffers: &BTreeMap<String, Buffer>) -> Result<()> {
    write_npz_as(path, buffers.iter().map(|(name, buffer)| (name.as_str(), buffer)), encode)
}

/// The array of a `.npy` file, or what is wrong with it.
fn decode(bytes: &[u8]) -> Result<Buffer, String> {
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
    /// Tries one type after another, and makes elements of those that programs work on.
    macro_rules! first_of {
        ($file:expr, $($element:ty => $variant:ident($wide:ty)),+) => {{
            let file = $file;
            $(let file = match file.try_data::<$element>() {
                Ok(data) => {
                    let elements = data.map(|x| x.map(<$wide>::from)).collect::<Result<_, _>>();
                    return Ok(Buffer { shape, elements: Elements::$variant(elements.map_err(short)?) });
                }
                Err(file) => file,
            };)+
            drop(file);
        }};
    }
    first_of!(
        file, f32 => F32(f32), f64 => F64(f64), i32 => I32(i32), i64 => I64(i64), bool => Bool(bool),
        i8 => I64(i64), i16 => I64(i64), u8 => I64(i64), u16 => I64(i64), u32 => I64(i64)
    );
    Err(format!("has the type {}; Kiln reads floats, integers and truth values", header.dtype().descr()))
}

/// A `.npy` file.
fn encode(buffer: &Buffer) -> std::io::Result<Vec<u8>> {
    let shape: Vec<u64> = buffer.shape.iter().map(|&n| n as u64).collect();
    let mut bytes = Vec::new();
    each_type!(&buffer.elements, values, V => {
        let _ = V;
        let options = npyz::WriteOptions::new().default_dtype().shape(&shape);
        let mut writer = options.writer(&mut bytes).begin_nd()?;
        writer.extend(values.iter().copied())?;
        writer.finish()?;
    });
    Ok(bytes)
}

/// The buffers of a program's parameters among named arrays: those it reads must be there and fit.
///
/// # Errors
/// Names the array that is missing or does not fit.
pub(super) fn fit(found: Option<&Buffer>, name: &str, dtype: ScalarType, shape: &[usize]) -> Result<Buffer> {
    match found {
        Some(buffer) if buffer.dtype() == dtype && buffer.shape == shape => Ok(buffer.clone()),
        Some(buffer) => {
            let found =
                format!("is {}{:?}, the program needs {dtype}{shape:?}", buffer.dtype(), buffer.shape);
            Err(Error::input(format!("input \"{name}\""), found))
        }
        None => Err(Error::input(format!("input \"{name}\""), format!("is missing; it is {dtype}{shape:?}"))),
    }
}
