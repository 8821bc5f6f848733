//! Weights that `torch.save` wrote, in any of its formats. Nothing in the file is executed.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use kiln_core::{Error, HostTensor, Result, TensorFile};
use pytorch_reader::{DType, PytorchReader, Tensor};

/// Where checkpoints keep the weights, beside the state of the optimiser and the like.
const PLACES: [&str; 4] = ["state_dict.", "model_state_dict.", "model.", "net."];
/// Tensors may share their numbers, so that together they are larger than the file, but not by more than this.
const LARGEST_RATIO: u64 = 8;

/// Reads every tensor of a `.pt` or `.pth` file under its name in the state dictionary. Of a checkpoint that keeps the weights
/// under a name of their own (`state_dict`, `model_state_dict`, `model` or `net`) only these are read, without that name.
///
/// # Errors
/// When the file is missing or malformed, holds no tensors, or tensors that are many times larger than the file.
pub(crate) fn read_pytorch(path: &Path) -> Result<TensorFile> {
    let malformed = |found: String| {
        Error::input(path.display(), found)
            .hint("is it a whole file that torch.save(model.state_dict(), …) wrote?")
    };
    let size = fs::metadata(path).map_err(Error::io("read", path))?.len();
    let reader = PytorchReader::new(path).map_err(|e| malformed(format!("cannot be read: {e}")))?;
    let mut tensors: Vec<Tensor> = reader.into_tensors().into_values().collect();
    if let Some(place) = PLACES.into_iter().find(|place| tensors.iter().any(|t| t.name.starts_with(place))) {
        tensors.retain_mut(|tensor| match tensor.name.strip_prefix(place) {
            Some(name) => {
                tensor.name = name.into();
                true
            }
            None => false,
        });
    }
    if tensors.is_empty() {
        return Err(malformed("holds no tensors".into()));
    }
    let unfolded: u64 = tensors.iter().map(|tensor| tensor.byte_len() as u64).sum();
    if unfolded > LARGEST_RATIO * size {
        return Err(malformed(format!("has {size} bytes, and its tensors would have {unfolded}")));
    }
    let mut file = TensorFile::from_source(path);
    for tensor in tensors {
        let bytes =
            tensor.read().map_err(|e| malformed(format!("has no whole tensor \"{}\": {e}", tensor.name)))?;
        let read = host(&tensor, &bytes)
            .ok_or_else(|| malformed(format!("tensor \"{}\" has a number above 2⁶³", tensor.name)))?;
        file.insert(tensor.name, read);
    }
    Ok(file)
}

/// A tensor's numbers; `None` where one is too large for 64 bits with a sign.
fn host(tensor: &Tensor, bytes: &[u8]) -> Option<HostTensor> {
    let floats = |values: Vec<f32>| Some(HostTensor::float(tensor.shape(), values));
    let ints = |values: Vec<i64>| Some(HostTensor::int(tensor.shape(), values));
    match tensor.dtype() {
        DType::F64 => floats(numbers(bytes, |b| f64::from_le_bytes(b) as f32)),
        DType::F32 => floats(numbers(bytes, f32::from_le_bytes)),
        DType::F16 => floats(numbers(bytes, |b| f16::from_le_bytes(b).to_f32())),
        DType::BF16 => floats(numbers(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        DType::I64 => ints(numbers(bytes, i64::from_le_bytes)),
        DType::I32 => ints(numbers(bytes, |b| i32::from_le_bytes(b).into())),
        DType::I16 => ints(numbers(bytes, |b| i16::from_le_bytes(b).into())),
        DType::I8 => ints(numbers(bytes, |b| i8::from_le_bytes(b).into())),
        DType::U32 => ints(numbers(bytes, |b| u32::from_le_bytes(b).into())),
        DType::U16 => ints(numbers(bytes, |b| u16::from_le_bytes(b).into())),
        DType::U8 | DType::Bool => ints(numbers(bytes, |[b]: [u8; 1]| b.into())),
        DType::U64 => {
            let values = numbers(bytes, |b| i64::try_from(u64::from_le_bytes(b)));
            ints(values.into_iter().collect::<std::result::Result<_, _>>().ok()?)
        }
    }
}

/// Every `N` bytes as a number.
fn numbers<const N: usize, T>(bytes: &[u8], number: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&bytes| number(bytes)).collect()
}
