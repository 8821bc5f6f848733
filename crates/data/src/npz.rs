//! NumPy's archives of named arrays.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Write};
use std::path::Path;

use kiln_core::{Error, HostTensor, Result, TensorFile, Values, write_atomic};
use npyz::{NpyFile, Order, WriterBuilder};
use zip::write::SimpleFileOptions;
use zip::{ZipArchive, ZipWriter};

/// Reads every array of an `.npz` file; floats become f32, integers and booleans i64.
///
/// # Errors
/// When the file is missing or malformed, or an array has a type that Kiln does not read.
pub fn read_npz(path: &Path) -> Result<TensorFile> {
    let mut tensors = TensorFile::from_source(path);
    for (name, tensor) in read_npz_as(path, decode)? {
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// Reads the array of an `.npy` file; floats become f32, integers and booleans i64.
///
/// # Errors
/// When the file is missing or malformed, or has a type that Kiln does not read.
pub fn read_npy(path: &Path) -> Result<HostTensor> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    decode(&bytes).map_err(|found| {
        Error::input(path.display(), found).hint("is it a complete file as numpy.save writes it?")
    })
}

/// Reads every array of an `.npz` file as `decode` makes it from the bytes of a `.npy` file, or says what is wrong with
/// them.
///
/// # Errors
/// When the file is missing or malformed, or an array cannot be decoded.
pub fn read_npz_as<T>(
    path: &Path,
    decode: impl Fn(&[u8]) -> Result<T, String>,
) -> Result<BTreeMap<String, T>> {
    let malformed = |found: &str| {
        Error::input(path.display(), found).hint("is it a complete file as numpy.savez writes it?")
    };
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut archive = ZipArchive::new(BufReader::new(file))
        .map_err(|e| malformed("is no zip archive").caused_by(e.to_string()))?;
    let mut arrays = BTreeMap::new();
    for index in 0..archive.len() {
        let mut entry =
            archive.by_index(index).map_err(|e| malformed("cannot be unpacked").caused_by(e.to_string()))?;
        let file_name =
            entry.name().map_err(|e| malformed("has an entry without a name").caused_by(e.to_string()))?;
        let Some(name) = npyz::npz::array_name_from_file_name(&file_name).map(str::to_string) else {
            continue;
        };
        // Memory grows with what is there, not with what the archive claims.
        let mut bytes = Vec::new();
        entry
            .read_to_end(&mut bytes)
            .map_err(|e| malformed(&format!("array \"{name}\" cannot be unpacked")).caused_by(e))?;
        let array = decode(&bytes).map_err(|found| malformed(&format!("array \"{name}\" {found}")))?;
        arrays.insert(name, array);
    }
    Ok(arrays)
}

/// Writes every tensor into an `.npz` file, atomically.
///
/// # Errors
/// When the file cannot be written.
pub fn write_npz(path: &Path, tensors: &TensorFile) -> Result<()> {
    let arrays = tensors.names().filter_map(|name| Some((name, tensors.get(name)?)));
    write_npz_as(path, arrays, encode)
}

/// Writes every array into an `.npz` file, atomically; `encode` makes the bytes of its `.npy` file.
///
/// # Errors
/// When the file cannot be written.
pub fn write_npz_as<'a, T>(
    path: &Path,
    arrays: impl IntoIterator<Item = (&'a str, T)>,
    encode: impl Fn(T) -> std::io::Result<Vec<u8>>,
) -> Result<()> {
    let failed = |e: std::io::Error| Error::work(format!("cannot lay out {}", path.display())).caused_by(e);
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, array) in arrays {
        archive
            .start_file(npyz::npz::file_name_from_array_name(name), SimpleFileOptions::default())
            .map_err(std::io::Error::other)
            .and_then(|()| archive.write_all(&encode(array)?))
            .map_err(failed)?;
    }
    let bytes = archive.finish().map_err(|e| failed(std::io::Error::other(e)))?.into_inner();
    write_atomic(path, &bytes)
}

/// The array of one `.npy` file, or what is wrong with it.
fn decode(bytes: &[u8]) -> Result<HostTensor, String> {
    let file = NpyFile::new(bytes).map_err(|e| format!("has a malformed header: {e}"))?;
    let header = file.header().clone();
    let shape: Option<Vec<usize>> = header.shape().iter().map(|&n| usize::try_from(n).ok()).collect();
    let elements = shape.as_ref().and_then(|shape| shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)));
    let (Some(shape), Some(elements)) = (shape, elements) else {
        return Err(format!("claims the shape {:?}", header.shape()));
    };
    let item = header.dtype().num_bytes().unwrap_or(0);
    if elements.checked_mul(item).is_none_or(|needed| needed > bytes.len()) {
        return Err(format!("claims the shape {shape:?}, more than its {} bytes hold", bytes.len()));
    }
    let values = values(file).ok_or_else(|| {
        format!("has the type {}; Kiln reads floats, integers and booleans", header.dtype().descr())
    })?;
    let values = values.map_err(|e| format!("ends too early: {e}"))?;
    Ok(match header.order() {
        Order::C => HostTensor { shape, values },
        Order::Fortran => from_fortran(shape, values),
    })
}

/// The elements in the order of the file; `None` for a type that is not read.
fn values(file: NpyFile<&[u8]>) -> Option<std::io::Result<Values>> {
    let file = match file.try_data::<f32>() {
        Ok(data) => return Some(data.collect::<Result<_, _>>().map(Values::Float)),
        Err(file) => file,
    };
    let file = match file.try_data::<f64>() {
        Ok(data) => {
            return Some(data.map(|x| x.map(|x| x as f32)).collect::<Result<_, _>>().map(Values::Float));
        }
        Err(file) => file,
    };
    /// Tries one integer type after another.
    macro_rules! integers {
        ($file:expr, $($integer:ty),+) => {{
            let file = $file;
            $(let file = match file.try_data::<$integer>() {
                Ok(data) => {
                    let widened = data.map(|x| x.map(i64::from));
                    return Some(widened.collect::<Result<_, _>>().map(Values::Int));
                }
                Err(file) => file,
            };)+
            file
        }};
    }
    integers!(file, i64, i32, i16, i8, u8, u16, u32, bool);
    None
}

/// Row-major from column-major order.
fn from_fortran(shape: Vec<usize>, values: Values) -> HostTensor {
    fn turned<T: Copy>(shape: &[usize], values: &[T]) -> Vec<T> {
        let mut index = vec![0; shape.len()];
        let mut turned = Vec::with_capacity(values.len());
        for _ in 0..values.len() {
            let mut at = 0;
            for axis in (0..shape.len()).rev() {
                at = at * shape[axis] + index[axis];
            }
            turned.push(values[at]);
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        turned
    }
    let values = match &values {
        Values::Float(values) => Values::Float(turned(&shape, values)),
        Values::Int(values) => Values::Int(turned(&shape, values)),
    };
    HostTensor { shape, values }
}

/// A `.npy` file.
fn encode(tensor: &HostTensor) -> std::io::Result<Vec<u8>> {
    let shape: Vec<u64> = tensor.shape.iter().map(|&n| n as u64).collect();
    let mut bytes = Vec::new();
    match &tensor.values {
        Values::Float(values) => {
            let options = npyz::WriteOptions::new().default_dtype().shape(&shape);
            let mut writer = options.writer(&mut bytes).begin_nd()?;
            writer.extend(values.iter().copied())?;
            writer.finish()?;
        }
        Values::Int(values) => {
            let options = npyz::WriteOptions::new().default_dtype().shape(&shape);
            let mut writer = options.writer(&mut bytes).begin_nd()?;
            writer.extend(values.iter().copied())?;
            writer.finish()?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> TensorFile {
        let mut tensors = TensorFile::new();
        tensors.insert("x", HostTensor::float([2, 3], vec![1.0, -2.5, 3.0, 0.0, 5.0, 6.0]));
        tensors.insert("ids", HostTensor::int([2], vec![-1, 1 << 40]));
        tensors
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npz");
        write_npz(&path, &sample()).unwrap();
        let back = read_npz(&path).unwrap();
        assert_eq!(back.names().collect::<Vec<_>>(), ["ids", "x"]);
        assert_eq!(back.get("x"), sample().get("x"));
        assert_eq!(back.get("ids"), sample().get("ids"));
    }

    #[test]
    fn column_major_arrays_are_turned() {
        let values = Values::Int(vec![1, 4, 2, 5, 3, 6]);
        let turned = from_fortran(vec![2, 3], values);
        assert_eq!(turned.as_ints().unwrap(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn damaged_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npz");
        write_npz(&path, &sample()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 10, whole.len() / 2, whole.len() - 5] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = read_npz(&path).unwrap_err().to_string();
            assert!(error.contains("a.npz"), "{error}");
        }
        // A shape that no file could fill, in a header of the same length: the padding gives way.
        let mut header = encode(&HostTensor::float([2], vec![0.0; 2])).unwrap();
        let at = header.windows(2).position(|w| w == b"(2").unwrap();
        header.splice(at..at + 2, *b"(2999999999");
        let end = header.iter().position(|&b| b == b'\n').unwrap();
        header.drain(end - 9..end);
        let error = decode(&header).unwrap_err();
        assert!(error.contains("[2999999999], more than"), "{error}");
    }
}
