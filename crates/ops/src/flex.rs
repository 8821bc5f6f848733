//! Between Burn's CPU tensors and slices.

use std::borrow::Cow;

use burn::backend::{Bytes, DType, DispatchDevice, Shape};
use burn::tensor::Device;
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
