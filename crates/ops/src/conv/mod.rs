//! Convolutions and transposed convolutions over one to three axes.
//!
//! One [`Geometry`] describes both: the transposed convolution is the input gradient of the convolution
//! that has its weight, and its own input gradient is that convolution. So there are three kernels,
//! `forward`, `input_gradient` and `weight_gradient`, in each of the ways to compute them:
//!
//! - `depthwise`: plain loops, where every group has one input channel;
//! - `winograd`: 3×3 kernels at stride 1, with enough channels, by a quarter of the products;
//! - `columns`: everything else, as matrix products.

mod columns;
mod depthwise;
mod geometry;
mod winograd;

use std::borrow::Cow;

use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};
use burn::tensor::{Tensor, module};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::packed::LeftFactors;
use crate::simd;
use crate::vector::sum_of;
use geometry::Geometry;

/// A convolution over one axis: `y[n, o, t] = b[o] + Σ_{c, k} w[o, c, k] x[n, c, t stride + k dilation - left]`,
/// with zeros outside of `x`.
///
/// # Shapes
/// - x: `[batch, inputs, length]`
/// - weight: `[outputs, inputs / groups, kernel]`
/// - bias: `[outputs]`
/// - output: `[batch, outputs, (length + left + right - dilation (kernel - 1) - 1) / stride + 1]`
///
/// # Panics
/// When the weight does not fit the input, or the kernel exceeds the padded input.
pub fn conv1d(
    x: Tensor<3>,
    weight: Tensor<3>,
    bias: Option<Tensor<1>>,
    options: ConvOptions<1>,
) -> Tensor<3> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return module::conv1d(x, weight, bias, options);
    }
    let geometry = Geometry::of_conv(x.dims(), weight.dims(), &options);
    convolve(x, weight, bias, Direction::Forward, geometry)
}

/// A convolution over two axes; [`conv1d`] has the formula for one.
///
/// # Shapes
/// - x: `[batch, inputs, height, width]`
/// - weight: `[outputs, inputs / groups, kernel height, kernel width]`
/// - bias: `[outputs]`
/// - output: `[batch, outputs, height', width']`, each as in [`conv1d`]
///
/// # Panics
/// When the weight does not fit the input, or the kernel exceeds the padded input.
pub fn conv2d(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    options: ConvOptions<2>,
) -> Tensor<4> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return module::conv2d(x, weight, bias, options);
    }
    let geometry = Geometry::of_conv(x.dims(), weight.dims(), &options);
    convolve(x, weight, bias, Direction::Forward, geometry)
}

/// A convolution over three axes; [`conv1d`] has the formula for one.
///
/// # Shapes
/// - x: `[batch, inputs, depth, height, width]`
/// - weight: `[outputs, inputs / groups, kernel depth, kernel height, kernel width]`
/// - bias: `[outputs]`
/// - output: `[batch, outputs, depth', height', width']`, each as in [`conv1d`]
///
/// # Panics
/// When the weight does not fit the input, or the kernel exceeds the padded input.
pub fn conv3d(
    x: Tensor<5>,
    weight: Tensor<5>,
    bias: Option<Tensor<1>>,
    options: ConvOptions<3>,
) -> Tensor<5> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return module::conv3d(x, weight, bias, options);
    }
    let geometry = Geometry::of_conv(x.dims(), weight.dims(), &options);
    convolve(x, weight, bias, Direction::Forward, geometry)
}

/// A transposed convolution over one axis, the adjoint of [`conv1d`]: every `x[n, c, t]` adds
/// `w[c, o, k] x[n, c, t]` to `y[n, o, t stride + k dilation - padding]`; then the bias is added.
///
/// # Shapes
/// - x: `[batch, inputs, length]`
/// - weight: `[inputs, outputs / groups, kernel]`
/// - bias: `[outputs]`
/// - output: `[batch, outputs, (length - 1) stride + dilation (kernel - 1) + 1 + padding_out - 2 padding]`
///
/// # Panics
/// When the weight does not fit the input, or the padding leaves nothing.
pub fn conv_transpose1d(
    x: Tensor<3>,
    weight: Tensor<3>,
    bias: Option<Tensor<1>>,
    options: ConvTransposeOptions<1>,
) -> Tensor<3> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return module::conv_transpose1d(x, weight, bias, options);
    }
    let geometry = Geometry::of_transposed(x.dims(), weight.dims(), &options);
    convolve(x, weight, bias, Direction::Transposed, geometry)
}

/// A transposed convolution over two axes; [`conv_transpose1d`] has the formula for one.
///
/// # Shapes
/// - x: `[batch, inputs, height, width]`
/// - weight: `[inputs, outputs / groups, kernel height, kernel width]`
/// - bias: `[outputs]`
/// - output: `[batch, outputs, height', width']`, each as in [`conv_transpose1d`]
///
/// # Panics
/// When the weight does not fit the input, or the padding leaves nothing.
pub fn conv_transpose2d(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    options: ConvTransposeOptions<2>,
) -> Tensor<4> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return module::conv_transpose2d(x, weight, bias, options);
    }
    let geometry = Geometry::of_transposed(x.dims(), weight.dims(), &options);
    convolve(x, weight, bias, Direction::Transposed, geometry)
}

/// A transposed convolution over three axes; [`conv_transpose1d`] has the formula for one.
///
/// # Shapes
/// - x: `[batch, inputs, depth, height, width]`
/// - weight: `[inputs, outputs / groups, kernel depth, kernel height, kernel width]`
/// - bias: `[outputs]`
/// - output: `[batch, outputs, depth', height', width']`, each as in [`conv_transpose1d`]
///
/// # Panics
/// When the weight does not fit the input, or the padding leaves nothing.
pub fn conv_transpose3d(
    x: Tensor<5>,
    weight: Tensor<5>,
    bias: Option<Tensor<1>>,
    options: ConvTransposeOptions<3>,
) -> Tensor<5> {
    if !runs_natively(&x) || !runs_natively(&weight) {
        return module::conv_transpose3d(x, weight, bias, options);
    }
    let geometry = Geometry::of_transposed(x.dims(), weight.dims(), &options);
    convolve(x, weight, bias, Direction::Transposed, geometry)
}

fn convolve<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<D>,
    bias: Option<Tensor<1>>,
    direction: Direction,
    geometry: Geometry,
) -> Tensor<D> {
    let bias = bias.unwrap_or_else(|| Tensor::empty([0], &x.device()));
    let function = Convolution { direction, geometry, rank: D };
    let channels = function.output_channels();
    assert!(
        [0, channels].contains(&bias.dims()[0]),
        "a bias {:?} does not fit a convolution's {channels} outputs",
        bias.dims()
    );
    let inputs = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(apply(&function, inputs))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Transposed,
}

#[derive(Debug, Clone)]
struct Convolution {
    direction: Direction,
    geometry: Geometry,
    /// Number of axes of input and output, with batch and channels.
    rank: usize,
}

/// What the backward pass of [`Convolution`] needs.
#[derive(Clone)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// Whether there is a bias.
    bias: bool,
}

impl Convolution {
    fn output_channels(&self) -> usize {
        self.geometry.groups
            * match self.direction {
                Direction::Forward => self.geometry.outputs,
                Direction::Transposed => self.geometry.inputs,
            }
    }

    fn output_extents(&self) -> [usize; 3] {
        match self.direction {
            Direction::Forward => self.geometry.output,
            Direction::Transposed => self.geometry.input,
        }
    }
}

impl Function<3> for Convolution {
    type Saved = Saved;

    fn forward(&self, inputs: [FlexTensor; 3]) -> (FlexTensor, Saved) {
        let [x, weight, bias] = &inputs;
        let (x_values, weight_values, bias_values) = (floats(x), floats(weight), floats(bias));
        let y = match self.direction {
            Direction::Forward => forward(&self.geometry, &x_values, &weight_values, &bias_values),
            Direction::Transposed => {
                let mut y = input_gradient(&self.geometry, &x_values, &weight_values);
                add_bias(&mut y, &bias_values, self.geometry.input_plane());
                y
            }
        };
        let mut shape = vec![self.geometry.batch, self.output_channels()];
        shape.extend_from_slice(&self.output_extents()[5 - self.rank..]);
        let [x, weight, bias] = inputs;
        let bias = bias.layout().num_elements() > 0;
        (tensor(y, shape), Saved { x, weight, bias })
    }

    fn backward(
        &self,
        Saved { x, weight, bias }: Saved,
        upstream: FlexTensor,
        [wants_x, wants_weight, wants_bias]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let geometry = &self.geometry;
        let (x_shape, weight_shape) = (x.layout().shape().clone(), weight.layout().shape().clone());
        let (x, weight, d_output) = (floats(&x), floats(&weight), floats(&upstream));
        let d_x = wants_x.then(|| {
            let d_x = match self.direction {
                Direction::Forward => input_gradient(geometry, &d_output, &weight),
                Direction::Transposed => forward(geometry, &d_output, &weight, &[]),
            };
            tensor(d_x, x_shape)
        });
        let d_weight = wants_weight.then(|| {
            let d_weight = match self.direction {
                Direction::Forward => weight_gradient(geometry, &x, &d_output),
                Direction::Transposed => weight_gradient(geometry, &d_output, &x),
            };
            tensor(d_weight, weight_shape)
        });
        let d_bias = (wants_bias && bias).then(|| {
            let plane = self.output_extents().iter().product();
            let sums = sum_planes(&d_output, self.output_channels(), plane);
            tensor(sums, [self.output_channels()])
        });
        [d_x, d_weight, d_bias]
    }
}

/// How a convolution is computed.
enum Way {
    Depthwise,
    Winograd,
    Columns,
}

impl Way {
    fn of(geometry: &Geometry) -> Self {
        /// Output channels of one input channel from which on a matrix product is faster.
        const FEW: usize = 8;
        if geometry.inputs == 1 && geometry.outputs < FEW {
            Self::Depthwise
        } else if winograd::pays(geometry) {
            Self::Winograd
        } else {
            Self::Columns
        }
    }

    /// The weight as [`Weight::convolve`] reads it; packed if it is `fixed` for many inputs.
    fn prepared<'a>(&self, geometry: &Geometry, weight: Cow<'a, [f32]>, fixed: bool) -> Weight<'a> {
        match self {
            Self::Depthwise => Weight::Depthwise(weight),
            Self::Winograd => Weight::Winograd(winograd::factors(geometry, &weight, fixed)),
            Self::Columns => Weight::Columns(columns::factors(geometry, weight, fixed)),
        }
    }
}

/// A weight that is ready for one of the ways.
enum Weight<'a> {
    Depthwise(Cow<'a, [f32]>),
    /// A factor for each point.
    Winograd(LeftFactors<'a>),
    /// A factor for each group.
    Columns(LeftFactors<'a>),
}

impl Weight<'_> {
    fn convolve(&self, geometry: &Geometry, x: &[f32], bias: &[f32], y: &mut [f32], finish: &impl Finish) {
        match self {
            Self::Depthwise(weight) => depthwise::forward(geometry, x, weight, bias, y, finish),
            Self::Winograd(factors) => winograd::forward(geometry, x, factors, bias, y, finish),
            Self::Columns(factors) => columns::forward(geometry, x, factors, bias, y, finish),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Depthwise(weight) => size_of_val(&weight[..]),
            Self::Winograd(factors) | Self::Columns(factors) => factors.bytes(),
        }
    }
}

fn forward(geometry: &Geometry, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; geometry.output_len()];
    let weight = Way::of(geometry).prepared(geometry, Cow::Borrowed(weight), false);
    weight.convolve(geometry, x, bias, &mut y, &());
    y
}

/// What happens to outputs as soon as they are there: it is given the place of the first in the output, and some that
/// follow one another.
pub trait Finish: Sync {
    /// Changes some outputs.
    fn call(&self, at: usize, outputs: &mut [f32]);
}

/// Nothing happens to them.
impl Finish for () {
    fn call(&self, _: usize, _: &mut [f32]) {}
}

impl<F: Fn(usize, &mut [f32]) + Sync> Finish for F {
    fn call(&self, at: usize, outputs: &mut [f32]) {
        self(at, outputs);
    }
}

/// A convolution over three axes whose weight stays the same: what depends on the weight alone is computed once.
pub struct FixedConv {
    geometry: Geometry,
    weight: Weight<'static>,
    bias: Vec<f32>,
}

impl FixedConv {
    /// For inputs `[batch, inputs, depth, height, width]` and a weight `[outputs, inputs / groups, kernel depth, kernel height,
    /// kernel width]`; no `bias` is none.
    ///
    /// # Panics
    /// When the weight does not fit the input, or the kernel exceeds the padded input.
    pub fn new(
        x: [usize; 5],
        shape: [usize; 5],
        weight: Vec<f32>,
        bias: Vec<f32>,
        options: &ConvOptions<3>,
    ) -> Self {
        let geometry = Geometry::of_conv(x, shape, options);
        assert_eq!(
            weight.len(),
            shape.iter().product::<usize>(),
            "a convolution's weight must fill its shape {shape:?}"
        );
        assert!(
            bias.is_empty() || bias.len() == shape[0],
            "a bias must have an element for each output channel"
        );
        let weight = Way::of(&geometry).prepared(&geometry, Cow::Owned(weight), true);
        Self { geometry, weight, bias }
    }

    /// Bytes of the weight as it is kept.
    pub fn weight_bytes(&self) -> usize {
        self.weight.bytes() + size_of_val(&self.bias[..])
    }

    /// Convolves `x` into `y`, whose elements are finished as they come.
    ///
    /// # Panics
    /// When input or output are too short.
    pub fn run(&self, x: &[f32], y: &mut [f32], finish: &impl Finish) {
        let y = &mut y[..self.geometry.output_len()];
        self.weight.convolve(&self.geometry, x, &self.bias, y, finish);
    }
}

/// A convolution over three axes whose weight changes from one use to the next, and its gradients.
#[derive(Debug, Clone)]
pub struct FreeConv(Geometry);

impl FreeConv {
    /// For inputs `[batch, inputs, depth, height, width]` and weights `[outputs, inputs / groups, kernel depth, kernel height,
    /// kernel width]`.
    ///
    /// # Panics
    /// When the weight does not fit the input, or the kernel exceeds the padded input.
    pub fn new(x: [usize; 5], weight: [usize; 5], options: &ConvOptions<3>) -> Self {
        Self(Geometry::of_conv(x, weight, options))
    }

    /// Convolves `x` into `y`, whose elements are finished as they come; no `bias` is none.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn run(&self, x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32], finish: &impl Finish) {
        let weight = Way::of(&self.0).prepared(&self.0, Cow::Borrowed(weight), false);
        weight.convolve(&self.0, x, bias, &mut y[..self.0.output_len()], finish);
    }

    /// The gradient with respect to the input, from that of the output.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn input_gradient(&self, d_output: &[f32], weight: &[f32]) -> Vec<f32> {
        input_gradient(&self.0, d_output, weight)
    }

    /// The gradient with respect to the weight, from the input and the gradient of the output.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn weight_gradient(&self, x: &[f32], d_output: &[f32]) -> Vec<f32> {
        weight_gradient(&self.0, x, d_output)
    }
}

fn input_gradient(geometry: &Geometry, d_output: &[f32], weight: &[f32]) -> Vec<f32> {
    match Way::of(geometry) {
        Way::Depthwise => depthwise::input_gradient(geometry, d_output, weight),
        Way::Winograd => winograd::input_gradient(geometry, d_output, weight),
        Way::Columns => columns::input_gradient(geometry, d_output, weight),
    }
}

fn weight_gradient(geometry: &Geometry, x: &[f32], d_output: &[f32]) -> Vec<f32> {
    match Way::of(geometry) {
        Way::Depthwise => depthwise::weight_gradient(geometry, x, d_output),
        Way::Winograd => winograd::weight_gradient(geometry, x, d_output),
        Way::Columns => columns::weight_gradient(geometry, x, d_output),
    }
}

/// Adds every channel's bias to its planes in `[batch, channels, plane]`.
fn add_bias(values: &mut [f32], bias: &[f32], plane: usize) {
    if bias.is_empty() || values.is_empty() {
        return;
    }
    values.par_chunks_mut(plane).enumerate().for_each(|(row, values)| {
        let bias = bias[row % bias.len()];
        values.iter_mut().for_each(|value| *value += bias);
    });
}

/// The sum over every channel's planes in `[batch, channels, plane]`.
fn sum_planes(values: &[f32], channels: usize, plane: usize) -> Vec<f32> {
    let sum = |channel: usize| {
        let planes = values.chunks(plane.max(1)).skip(channel).step_by(channels);
        planes
            .map(|plane| {
                simd(
                    #[inline(always)]
                    || {
                        sum_of(
                            plane,
                            #[inline(always)]
                            |x| x,
                        )
                    },
                )
            })
            .sum()
    };
    (0..channels).into_par_iter().map(sum).collect()
}
