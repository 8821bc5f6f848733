//! The two precisions that ranks compute in, and the way between tensors and slices.

use std::borrow::Cow;
use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_flex::FlexTensor;
use kiln_ops::simd;
use kiln_ops::vector::exp;

/// f32, or f64 for tests of exactness.
pub trait Real:
    kiln_cluster::Element
    + burn::tensor::Element
    + Default
    + Debug
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + Sum
{
    /// The type of tensors.
    const DTYPE: DType;
    /// 0
    const ZERO: Self;
    /// -∞
    const LOWEST: Self;

    /// Nearest to a number.
    fn of(value: f64) -> Self;

    /// The same number.
    fn wide(self) -> f64;

    /// Whether it is a number.
    fn is_number(self) -> bool;

    /// √x
    fn root(self) -> Self;

    /// Replaces every element by `e^(x - shift)` and returns their sum.
    fn exp_all(row: &mut [Self], shift: Self) -> Self;
}

impl Real for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: Self = 0.0;
    const LOWEST: Self = f32::NEG_INFINITY;

    fn of(value: f64) -> Self {
        value as f32
    }

    fn wide(self) -> f64 {
        self.into()
    }

    fn is_number(self) -> bool {
        self.is_finite()
    }

    fn root(self) -> Self {
        self.sqrt()
    }

    fn exp_all(row: &mut [Self], shift: Self) -> Self {
        simd(
            #[inline(always)]
            || {
                for x in row.iter_mut() {
                    *x = exp(*x - shift);
                }
            },
        );
        let mut sum = 0.0;
        simd(
            #[inline(always)]
            || {
                sum = kiln_ops::vector::sum_of(
                    row,
                    #[inline(always)]
                    |x| x,
                );
            },
        );
        sum
    }
}

impl Real for f64 {
    const DTYPE: DType = DType::F64;
    const ZERO: Self = 0.0;
    const LOWEST: Self = f64::NEG_INFINITY;

    fn of(value: f64) -> Self {
        value
    }

    fn wide(self) -> f64 {
        self
    }

    fn is_number(self) -> bool {
        self.is_finite()
    }

    fn root(self) -> Self {
        self.sqrt()
    }

    fn exp_all(row: &mut [Self], shift: Self) -> Self {
        row.iter_mut()
            .map(|x| {
                *x = (*x - shift).exp();
                *x
            })
            .sum()
    }
}

/// A tensor that takes over `values`.
pub(crate) fn tensor<T: Real, const D: usize>(
    values: Vec<T>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, T::DTYPE))
}

/// The elements of a tensor without autodiff, in memory that the caller may change.
pub(crate) fn into_vec<T: Real, const D: usize>(x: Tensor<D>) -> Vec<T> {
    x.into_data().try_into_vec().expect("tensors of a stage have its precision")
}

/// Reads the elements of a tensor without autodiff where they lie.
pub(crate) fn read<T: Real, const D: usize, R>(x: &Tensor<D>, f: impl FnOnce(&[T]) -> R) -> R {
    let on_cpu = match x.clone().into_dispatch().kind {
        DispatchTensorKind::Flex(BackendTensor::Float(x)) => Some(x),
        _ => None,
    };
    match &on_cpu {
        Some(x) => f(&elements(x)),
        None => f(&into_vec::<T, D>(x.clone())),
    }
}

fn elements<T: Real>(x: &FlexTensor) -> Cow<'_, [T]> {
    match x.as_slice::<T>() {
        Some(slice) => Cow::Borrowed(slice),
        None => Cow::Owned(x.to_contiguous().as_slice::<T>().expect("it was made contiguous").to_vec()),
    }
}
