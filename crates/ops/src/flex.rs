//! Between Burn's CPU tensors and slices.

use std::borrow::Cow;

use burn::backend::{BackendTensor, Bytes, DType, DispatchDevice, DispatchTensorKind, Shape};
use burn::tensor::{Device, Int, Tensor};
use burn_flex::{FlexTensor, Layout};

/// Whether tensors on `device` (or on the device that its autodiff wraps) are this crate's to compute.
pub fn is_cpu(device: &Device) -> bool {
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::Flex(_))
}

/// The elements of an f32 tensor in row-major order, copied only when it is a strided view.
pub fn floats(tensor: &FlexTensor) -> Cow<'_, [f32]> {
    match tensor.as_slice::<f32>() {
        Some(slice) => Cow::Borrowed(slice),
        None => Cow::Owned(tensor.to_contiguous().storage::<f32>().to_vec()),
    }
}

/// A tensor of `shape` that takes over `values`.
///
/// # Panics
/// When the number of values does not fill the shape.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    let shape = shape.into();
    assert_eq!(values.len(), shape.num_elements(), "values must fill the shape {shape:?}");
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

/// The elements of an integer tensor on the CPU in row-major order.
///
/// # Panics
/// When the tensor is not the CPU's.
pub fn ints<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i64> {
    let tensor = match tensor.into_dispatch().kind {
        DispatchTensorKind::Flex(BackendTensor::Int(tensor)) => tensor.to_contiguous(),
        other => panic!("a CPU kernel was given another backend's integers: {other:?}"),
    };
    match tensor.dtype() {
        DType::I64 => tensor.as_slice::<i64>().map(<[i64]>::to_vec),
        DType::I32 => tensor.as_slice::<i32>().map(|ids| ids.iter().map(|&id| id.into()).collect()),
        _ => Some(tensor.into_data().iter::<i64>().collect()),
    }
    .expect("a contiguous tensor is one slice")
}
