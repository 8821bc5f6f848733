//! Discrete Fourier transforms of any length, by `rustfft`.
//!
//! A spectrum is a pair of tensors, its real and its imaginary part. Forward transforms are plain sums,
//! inverse ones have the factor `1/n`. On other devices and in double precision a transform is a product with
//! its matrix, at quadratic cost.

use std::f64::consts::TAU;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use burn::backend::DispatchTensor;
use burn::tensor::{Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;
use realfft::RealFftPlanner;
use rustfft::num_complex::Complex32;
use rustfft::{FftDirection, FftPlanner};

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;

/// Elements that one task transforms, where a single row does not have more.
const BLOCK: usize = 16 * 1024;

/// The spectrum of real numbers along an axis: `X_k = Σ_t x_t e^(-2πi kt/n)` for `k = 0, …, ⌊n/2⌋`, which
/// determine the others.
///
/// # Shapes
/// - x: `[..., n, ...]`, `n` on axis `dim`
/// - output, real and imaginary part: `[..., ⌊n/2⌋ + 1, ...]`
///
/// # Panics
/// When there is no axis `dim` or it is empty.
pub fn rfft<const D: usize>(x: Tensor<D>, dim: usize) -> (Tensor<D>, Tensor<D>) {
    let n = extent(x.dims(), dim);
    let x = swap_with_last(x, dim);
    let spectrum = if runs_natively(&x) {
        pair(|results| apply(&RealForward { n, results }, [x.into_dispatch()]))
    } else {
        let [cos, sin] = waves(&x, n, bins(n), |_, _| 1.0);
        [times(x.clone(), cos), -times(x, sin)]
    };
    spectrum.map(|part| swap_with_last(part, dim)).into()
}

/// The real numbers with the given spectrum along an axis, the inverse of [`rfft`]. The imaginary part of bin
/// 0, and of bin `n/2` for even `n`, is that of no real numbers and does not count.
///
/// # Shapes
/// - re, im: `[..., ⌊n/2⌋ + 1, ...]`, on axis `dim`
/// - output: `[..., n, ...]`
///
/// # Panics
/// When there is no axis `dim`, when `n` is 0 or when the spectrum is not one of `n` numbers.
pub fn irfft<const D: usize>(re: Tensor<D>, im: Tensor<D>, n: usize, dim: usize) -> Tensor<D> {
    let found = same_extent(&re, &im, dim);
    assert!(
        n > 0 && found == bins(n),
        "a spectrum of {n} real numbers has {} bins, not {found} as in {:?}",
        bins(n),
        re.dims()
    );
    let [re, im] = [re, im].map(|part| swap_with_last(part, dim));
    let x = if runs_natively(&re) && runs_natively(&im) {
        Tensor::from_dispatch(apply(&RealInverse { n }, [re.into_dispatch(), im.into_dispatch()]))
    } else {
        let [cos, sin] = waves(&re, bins(n), n, |bin, _| weight(bin, n) / n as f64);
        times(re, cos) - times(im, sin)
    };
    swap_with_last(x, dim)
}

/// The spectrum of complex numbers along an axis: `X_k = Σ_t x_t e^(-2πi kt/n)` for `k = 0, …, n - 1`.
///
/// # Shapes
/// - re, im, output, real and imaginary part: the same, with `n` on axis `dim`
///
/// # Panics
/// When the parts differ in shape, when there is no axis `dim` or it is empty.
pub fn fft<const D: usize>(re: Tensor<D>, im: Tensor<D>, dim: usize) -> (Tensor<D>, Tensor<D>) {
    complex(re, im, dim, FftDirection::Forward)
}

/// The complex numbers with the given spectrum along an axis, the inverse of [`fft`].
///
/// # Shapes
/// - re, im, output, real and imaginary part: the same, with `n` on axis `dim`
///
/// # Panics
/// When the parts differ in shape, when there is no axis `dim` or it is empty.
pub fn ifft<const D: usize>(re: Tensor<D>, im: Tensor<D>, dim: usize) -> (Tensor<D>, Tensor<D>) {
    complex(re, im, dim, FftDirection::Inverse)
}

/// The spectrum of real numbers along the last two axes: [`rfft`] along the last, then [`fft`] along the one
/// before.
///
/// # Shapes
/// - x: `[..., m, n]`
/// - output, real and imaginary part: `[..., m, ⌊n/2⌋ + 1]`
///
/// # Panics
/// When there are no two axes or one is empty.
pub fn rfft2<const D: usize>(x: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
    assert!(D >= 2, "a two-dimensional transform needs two axes, not those of {:?}", x.dims());
    let (re, im) = rfft(x, D - 1);
    fft(re, im, D - 2)
}

/// The real numbers with the given spectrum along the last two axes, the inverse of [`rfft2`].
///
/// # Shapes
/// - re, im: `[..., m, ⌊n/2⌋ + 1]`
/// - output: `[..., m, n]`
///
/// # Panics
/// When there are no two axes, one is empty, or the spectrum is not one of `n` numbers in a row.
pub fn irfft2<const D: usize>(re: Tensor<D>, im: Tensor<D>, n: usize) -> Tensor<D> {
    assert!(D >= 2, "a two-dimensional transform needs two axes, not those of {:?}", re.dims());
    let (re, im) = ifft(re, im, D - 2);
    irfft(re, im, n, D - 1)
}

fn complex<const D: usize>(
    re: Tensor<D>,
    im: Tensor<D>,
    dim: usize,
    direction: FftDirection,
) -> (Tensor<D>, Tensor<D>) {
    let n = same_extent(&re, &im, dim);
    let [re, im] = [re, im].map(|part| swap_with_last(part, dim));
    let scale = if direction == FftDirection::Forward { 1.0 } else { 1.0 / n as f64 };
    let numbers = if runs_natively(&re) && runs_natively(&im) {
        let scale = scale as f32;
        pair(|results| {
            apply(&Complex { direction, scale, results }, [re.into_dispatch(), im.into_dispatch()])
        })
    } else {
        let [cos, sin] = waves(&re, n, n, |_, _| scale);
        let sin = if direction == FftDirection::Forward { -sin } else { sin };
        [times(re.clone(), cos.clone()) - times(im.clone(), sin.clone()), times(re, sin) + times(im, cos)]
    };
    numbers.map(|part| swap_with_last(part, dim)).into()
}

/// How many bins the spectrum of `n` real numbers has.
fn bins(n: usize) -> usize {
    n / 2 + 1
}

/// How often a bin stands in the whole spectrum of `n` real numbers: those at the ends once, others also as
/// their conjugate.
fn weight(bin: usize, n: usize) -> f64 {
    if bin == 0 || 2 * bin == n { 1.0 } else { 2.0 }
}

/// The number of elements on axis `dim`, which must be there and have some.
fn extent<const D: usize>(shape: [usize; D], dim: usize) -> usize {
    assert!(dim < D && shape[dim] > 0, "nothing to transform along axis {dim} of {shape:?}");
    shape[dim]
}

fn same_extent<const D: usize>(re: &Tensor<D>, im: &Tensor<D>, dim: usize) -> usize {
    let (re, im) = (re.dims(), im.dims());
    assert!(re == im, "the parts of complex numbers have different shapes, {re:?} and {im:?}");
    extent(re, dim)
}

fn swap_with_last<const D: usize>(x: Tensor<D>, dim: usize) -> Tensor<D> {
    if dim + 1 == D { x } else { x.swap_dims(dim, D - 1) }
}

/// `cos` and `sin` of `2π ij/n`, times a factor, in matrices `[rows, columns]` where the longer extent is `n`,
/// with the precision and on the device of `like`.
fn waves<const D: usize>(
    like: &Tensor<D>,
    rows: usize,
    columns: usize,
    factor: impl Fn(usize, usize) -> f64,
) -> [Tensor<2>; 2] {
    let n = rows.max(columns);
    [f64::cos, f64::sin].map(|wave| {
        let entry = |i: usize, j: usize| factor(i, j) * wave(TAU * (i * j % n) as f64 / n as f64);
        let values: Vec<f64> =
            (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect();
        Tensor::from_data(TensorData::new(values, [rows, columns]), (&like.device(), like.dtype()))
    })
}

/// Every row of `x` times a matrix.
fn times<const D: usize>(x: Tensor<D>, matrix: Tensor<2>) -> Tensor<D> {
    let [inner, columns] = matrix.dims();
    let mut shape = x.dims();
    let rows = shape[..D - 1].iter().product();
    shape[D - 1] = columns;
    x.reshape([rows, inner]).matmul(matrix).reshape(shape)
}

/// Real and imaginary part on their way into the autodiff graph, and their gradients on the way back.
///
/// Burn's graph has functions with one result. Here a transform has none to speak of: its result is an empty
/// tensor on which two nodes depend, one a part. They hand on what lies here, and leave their gradients here
/// for the transform, which comes after both on the way back.
#[derive(Debug, Clone, Default)]
struct Parts(Arc<Mutex<[Option<FlexTensor>; 2]>>);

impl Parts {
    fn put(&self, which: usize, part: FlexTensor) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[which] = Some(part);
    }

    fn take(&self, which: usize) -> Option<FlexTensor> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[which].take()
    }

    /// Leaves both parts for their nodes and gives the transform's own result.
    fn leave(&self, parts: [FlexTensor; 2]) -> FlexTensor {
        for (which, part) in parts.into_iter().enumerate() {
            self.put(which, part);
        }
        nothing()
    }

    /// The gradients of both parts; zeros for a part that the loss does not depend on.
    fn gradients(&self) -> [FlexTensor; 2] {
        match [self.take(0), self.take(1)] {
            [Some(re), Some(im)] => [re, im],
            [Some(re), None] => [re.clone(), zeros_like(&re)],
            [None, Some(im)] => [zeros_like(&im), im],
            [None, None] => unreachable!("a backward pass comes through one of the parts"),
        }
    }
}

fn nothing() -> FlexTensor {
    tensor(Vec::new(), [0])
}

fn zeros_like(x: &FlexTensor) -> FlexTensor {
    FlexTensor::zeros(x.layout().shape().clone(), x.dtype())
}

/// Both results of a transform, which leaves them in the [`Parts`] that it is given.
fn pair<const D: usize>(transform: impl FnOnce(Parts) -> DispatchTensor) -> [Tensor<D>; 2] {
    let results = Parts::default();
    let transform = transform(results.clone());
    [0, 1].map(|which| {
        let part = Part { which, results: results.clone() };
        Tensor::from_dispatch(apply(&part, [transform.clone()]))
    })
}

/// One of two results.
#[derive(Debug, Clone)]
struct Part {
    which: usize,
    results: Parts,
}

impl Function<1> for Part {
    type Saved = ();

    fn forward(&self, _: [FlexTensor; 1]) -> (FlexTensor, ()) {
        (self.results.take(self.which).expect("the transform left it"), ())
    }

    fn backward(&self, (): (), upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        self.results.put(self.which, upstream);
        [Some(nothing())]
    }
}

/// [`rfft`] of rows.
#[derive(Debug, Clone)]
struct RealForward {
    n: usize,
    results: Parts,
}

impl Function<1> for RealForward {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        (self.results.leave(spectrum(&x, Weights { ends: 1.0, others: 1.0 })), ())
    }

    fn backward(&self, (): (), _: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        // The adjoint sums over the given bins alone, where the inverse counts most of them twice.
        let [re, im] = self.results.gradients();
        [Some(from_spectrum([&re, &im], self.n, Weights { ends: 1.0, others: 0.5 }))]
    }
}

/// [`irfft`] of rows.
#[derive(Debug, Clone)]
struct RealInverse {
    n: usize,
}

impl Function<2> for RealInverse {
    type Saved = ();

    fn forward(&self, [re, im]: [FlexTensor; 2]) -> (FlexTensor, ()) {
        let scale = 1.0 / self.n as f32;
        (from_spectrum([&re, &im], self.n, Weights { ends: scale, others: scale }), ())
    }

    fn backward(&self, (): (), upstream: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let scale = 1.0 / self.n as f32;
        spectrum(&upstream, Weights { ends: scale, others: 2.0 * scale }).map(Some)
    }
}

/// [`fft`] or [`ifft`] of rows.
#[derive(Debug, Clone)]
struct Complex {
    direction: FftDirection,
    scale: f32,
    results: Parts,
}

impl Function<2> for Complex {
    type Saved = ();

    fn forward(&self, [re, im]: [FlexTensor; 2]) -> (FlexTensor, ()) {
        (self.results.leave(transform([&re, &im], self.direction, self.scale)), ())
    }

    fn backward(&self, (): (), _: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let [re, im] = self.results.gradients();
        transform([&re, &im], self.direction.opposite_direction(), self.scale).map(Some)
    }
}

/// What bins are multiplied by: 0 and, for even `n`, `n/2`; and the others.
#[derive(Clone, Copy)]
struct Weights {
    ends: f32,
    others: f32,
}

/// The bins of `n` real numbers that stand in their spectrum once.
fn ends(n: usize) -> impl Iterator<Item = usize> {
    [Some(0), n.is_multiple_of(2).then_some(n / 2)].into_iter().flatten()
}

/// Plans of transforms, which every length needs to be made once.
static REAL_PLANS: LazyLock<Mutex<RealFftPlanner<f32>>> = LazyLock::new(|| Mutex::new(RealFftPlanner::new()));
static COMPLEX_PLANS: LazyLock<Mutex<FftPlanner<f32>>> = LazyLock::new(|| Mutex::new(FftPlanner::new()));

/// The spectrum of every row of real numbers, times `weights`.
fn spectrum(x: &FlexTensor, weights: Weights) -> [FlexTensor; 2] {
    let mut shape = x.layout().shape().clone();
    let last = shape.num_dims() - 1;
    let n = shape[last];
    let bins = bins(n);
    let plan = REAL_PLANS.lock().unwrap_or_else(PoisonError::into_inner).plan_fft_forward(n);
    let x = floats(x);
    let rows = x.len() / n;
    let (mut re, mut im) = (vec![0.0; rows * bins], vec![0.0; rows * bins]);
    let block = (BLOCK / n).max(1);
    let work = |((re, im), x): ((&mut [f32], &mut [f32]), &[f32])| {
        let (mut row, mut output) = (plan.make_input_vec(), plan.make_output_vec());
        let mut scratch = plan.make_scratch_vec();
        let parts = re.chunks_exact_mut(bins).zip(im.chunks_exact_mut(bins));
        for ((re, im), x) in parts.zip(x.chunks_exact(n)) {
            row.copy_from_slice(x);
            plan.process_with_scratch(&mut row, &mut output, &mut scratch).expect("lengths fit");
            unpack(&output, [re, im], weights.others);
            for end in ends(n) {
                (re[end], im[end]) = (output[end].re * weights.ends, output[end].im * weights.ends);
            }
        }
    };
    let parts = re.chunks_mut(block * bins).zip(im.chunks_mut(block * bins));
    for_each(parts.zip(x.chunks(block * n)), work);
    shape[last] = bins;
    [tensor(re, shape.clone()), tensor(im, shape)]
}

/// The `n` real numbers in a row that have the given spectrum, times `weights` and `n`.
fn from_spectrum([re, im]: [&FlexTensor; 2], n: usize, weights: Weights) -> FlexTensor {
    let mut shape = re.layout().shape().clone();
    let last = shape.num_dims() - 1;
    let bins = shape[last];
    let plan = REAL_PLANS.lock().unwrap_or_else(PoisonError::into_inner).plan_fft_inverse(n);
    let (re, im) = (floats(re), floats(im));
    let mut x = vec![0.0; re.len() / bins * n];
    let block = (BLOCK / n).max(1);
    let work = |(x, (re, im)): (&mut [f32], (&[f32], &[f32]))| {
        let (mut input, mut scratch) = (plan.make_input_vec(), plan.make_scratch_vec());
        for (x, (re, im)) in x.chunks_exact_mut(n).zip(re.chunks_exact(bins).zip(im.chunks_exact(bins))) {
            pack([re, im], &mut input, weights.others);
            for end in ends(n) {
                input[end] = Complex32::new(re[end] * weights.ends, 0.0);
            }
            plan.process_with_scratch(&mut input, x, &mut scratch).expect("lengths fit, ends are real");
        }
    };
    let parts = re.chunks(block * bins).zip(im.chunks(block * bins));
    for_each(x.chunks_mut(block * n).zip(parts), work);
    shape[last] = n;
    tensor(x, shape)
}

/// The transform of every row of complex numbers, times `scale`.
fn transform([re, im]: [&FlexTensor; 2], direction: FftDirection, scale: f32) -> [FlexTensor; 2] {
    let shape = re.layout().shape().clone();
    let n = shape[shape.num_dims() - 1];
    let plan = COMPLEX_PLANS.lock().unwrap_or_else(PoisonError::into_inner).plan_fft(n, direction);
    let (mut re, mut im) = (floats(re).into_owned(), floats(im).into_owned());
    let block = (BLOCK / n).max(1) * n;
    let work = |(re, im): (&mut [f32], &mut [f32])| {
        let mut row = vec![Complex32::default(); n];
        let mut scratch = vec![Complex32::default(); plan.get_inplace_scratch_len()];
        for (re, im) in re.chunks_exact_mut(n).zip(im.chunks_exact_mut(n)) {
            pack([re, im], &mut row, scale);
            plan.process_with_scratch(&mut row, &mut scratch);
            unpack(&row, [re, im], 1.0);
        }
    };
    for_each(re.chunks_mut(block).zip(im.chunks_mut(block)), work);
    [tensor(re, shape.clone()), tensor(im, shape)]
}

/// Hands every block to `work`; a single one on the calling thread.
fn for_each<T: Send>(blocks: impl Iterator<Item = T>, work: impl Fn(T) + Sync + Send) {
    let blocks: Vec<T> = blocks.collect();
    match blocks.len() {
        0..=1 => blocks.into_iter().for_each(work),
        _ => blocks.into_par_iter().for_each(work),
    }
}

fn pack([re, im]: [&[f32]; 2], numbers: &mut [Complex32], scale: f32) {
    simd(
        #[inline(always)]
        || {
            for ((number, &re), &im) in numbers.iter_mut().zip(re).zip(im) {
                *number = Complex32::new(re * scale, im * scale);
            }
        },
    );
}

fn unpack(numbers: &[Complex32], [re, im]: [&mut [f32]; 2], scale: f32) {
    simd(
        #[inline(always)]
        || {
            for ((number, re), im) in numbers.iter().zip(re).zip(im) {
                (*re, *im) = (number.re * scale, number.im * scale);
            }
        },
    );
}
