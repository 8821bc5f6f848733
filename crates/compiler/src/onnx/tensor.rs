//! Tensors of a file: their numbers, wherever they stand.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path};

use burn::tensor::{BoolStore, DType, TensorData};

use super::proto::{TensorProto, data_type};

/// Bits of an element of a type, and the type that holds its elements; 4-bit integers are unpacked into bytes.
fn layout(kind: i32) -> Option<(u64, DType)> {
    Some(match kind {
        data_type::FLOAT => (32, DType::F32),
        data_type::DOUBLE => (64, DType::F64),
        data_type::FLOAT16 => (16, DType::F16),
        data_type::BFLOAT16 => (16, DType::BF16),
        data_type::INT64 => (64, DType::I64),
        data_type::INT32 => (32, DType::I32),
        data_type::INT16 => (16, DType::I16),
        data_type::INT8 => (8, DType::I8),
        data_type::UINT64 => (64, DType::U64),
        data_type::UINT32 => (32, DType::U32),
        data_type::UINT16 => (16, DType::U16),
        data_type::UINT8 => (8, DType::U8),
        data_type::BOOL => (8, DType::Bool(BoolStore::Native)),
        data_type::INT4 => (4, DType::I8),
        data_type::UINT4 => (4, DType::U8),
        _ => return None,
    })
}

/// The type that elements have in a graph: 32-bit floats, 64-bit integers, truth values.
pub fn graph_type(kind: i32) -> Option<DType> {
    layout(kind).map(|(_, dtype)| widened(dtype))
}

fn widened(dtype: DType) -> DType {
    match dtype {
        DType::Bool(_) => dtype,
        float if float.is_float() => DType::F32,
        _ => DType::I64,
    }
}

/// A tensor as a graph computes with it.
///
/// # Errors
/// Says what is wrong with it.
pub fn read(tensor: &TensorProto, folder: Option<&Path>) -> Result<TensorData, String> {
    let data = read_narrow(tensor, folder)?;
    let wide = widened(data.dtype());
    Ok(data.convert_dtype(wide))
}

/// A tensor with the elements that the file has; those of 4 bits are bytes.
///
/// # Errors
/// As [`read`].
pub fn read_narrow(tensor: &TensorProto, folder: Option<&Path>) -> Result<TensorData, String> {
    let (bits, dtype) = layout(tensor.data_type)
        .ok_or_else(|| format!("has elements of type {}, which are not read", tensor.data_type))?;
    let dims: Option<Vec<usize>> = tensor.dims.iter().map(|&size| size.try_into().ok()).collect();
    let count = dims.as_ref().and_then(|dims| dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)));
    let (Some(dims), Some(length)) = (dims, count.and_then(|n| n.checked_mul(bits)).map(|n| n.div_ceil(8)))
    else {
        return Err(format!("has the impossible shape {:?}", tensor.dims));
    };
    let bytes = if tensor.data_location == 1 {
        external(tensor, folder, length)?
    } else if tensor.raw_data.is_empty() {
        typed_bytes(tensor, bits)
    } else {
        tensor.raw_data.clone()
    };
    if bytes.len() as u64 != length {
        let found = bytes.len();
        return Err(format!("has {found} bytes of elements; the shape {:?} needs {length}", tensor.dims));
    }
    let count: usize = dims.iter().product();
    let bytes = match tensor.data_type {
        data_type::INT4 => halves(&bytes, count).map(|half| ((half << 4) as i8 >> 4) as u8).collect(),
        data_type::UINT4 => halves(&bytes, count).collect(),
        data_type::BOOL => bytes.into_iter().map(|byte| u8::from(byte != 0)).collect(),
        _ => bytes,
    };
    TensorData::try_from_bytes_vec(bytes, dims, dtype).map_err(|e| format!("is malformed: {e:?}"))
}

/// 4-bit elements, the lower half of a byte first.
fn halves(bytes: &[u8], count: usize) -> impl Iterator<Item = u8> + '_ {
    bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]).take(count)
}

/// The elements of the field for the tensor's type, as bytes.
fn typed_bytes(tensor: &TensorProto, bits: u64) -> Vec<u8> {
    match tensor.data_type {
        data_type::FLOAT => tensor.float_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        data_type::DOUBLE => tensor.double_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        data_type::INT64 => tensor.int64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        data_type::UINT64 => tensor.uint64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        data_type::UINT32 => tensor.uint64_data.iter().flat_map(|&x| (x as u32).to_le_bytes()).collect(),
        // Everything smaller shares a field, of which the lower bytes count.
        _ => {
            let size = bits.div_ceil(8) as usize;
            tensor.int32_data.iter().flat_map(|x| x.to_le_bytes().into_iter().take(size)).collect()
        }
    }
}

/// Elements in another file of the model's folder.
fn external(tensor: &TensorProto, folder: Option<&Path>, length: u64) -> Result<Vec<u8>, String> {
    let entry =
        |key: &str| tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| &entry.value);
    let location = entry("location").ok_or("stands in another file that is not named")?;
    let number = |key: &str| match entry(key) {
        None => Ok(None),
        Some(text) => text.parse::<u64>().map(Some).map_err(|_| format!("has \"{text}\" as its {key}")),
    };
    let (offset, stated) = (number("offset")?.unwrap_or(0), number("length")?);
    if stated.is_some_and(|stated| stated != length) {
        return Err(format!("has another length in \"{location}\" than its shape {:?} needs", tensor.dims));
    }
    let inside =
        Path::new(location).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !inside {
        return Err(format!("stands in \"{location}\", which is not in the model's folder"));
    }
    let folder = folder
        .ok_or_else(|| format!("stands in the file \"{location}\", but there is no folder to look in"))?;
    let path = folder.join(location);
    let cannot = |e: std::io::Error| format!("stands in {}, which cannot be read: {e}", path.display());
    let mut file = File::open(&path).map_err(cannot)?;
    let size = file.metadata().map_err(cannot)?.len();
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(format!(
            "takes {length} bytes from byte {offset} of {}, which has {size}",
            path.display()
        ));
    }
    file.seek(SeekFrom::Start(offset)).map_err(cannot)?;
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes).map_err(cannot)?;
    Ok(bytes)
}
