//! Maximum and mean over windows of the last one or two axes.
//!
//! A window is a product of one set of positions per axis; rows of a window are combined first, for all
//! columns at once, and columns after.

use burn::tensor::ops::{AvgPoolOptions, MaxPoolOptions};
use burn::tensor::{Tensor, module};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;
use crate::vector::axpy;

/// The maximum over windows of the last axis. NaN counts as the greatest number.
///
/// # Shapes
/// - x: `[batch, channels, length]`
/// - output: `[batch, channels, (length + left + right - dilation (kernel - 1) - 1) / stride + 1]`; rounded
///   up in ceiling mode, without windows that would begin in the padding on the right
///
/// # Panics
/// When a window exceeds the padded input.
pub fn max_pool1d(x: Tensor<3>, options: MaxPoolOptions<1>) -> Tensor<3> {
    if !runs_natively(&x) {
        return module::max_pool1d(x, options);
    }
    let [_, _, length] = x.dims();
    let columns = axis(
        length,
        options.kernel_size[0],
        options.stride[0],
        options.padding[0],
        options.dilation[0],
        options.ceil_mode,
    );
    pool(x, MaxPool(Windows { rows: Axis::unit(), columns }))
}

/// The maximum over windows of the last two axes. NaN counts as the greatest number.
///
/// # Shapes
/// - x: `[batch, channels, height, width]`
/// - output: `[batch, channels, height', width']`, each as in [`max_pool1d`]
///
/// # Panics
/// When a window exceeds the padded input.
pub fn max_pool2d(x: Tensor<4>, options: MaxPoolOptions<2>) -> Tensor<4> {
    if !runs_natively(&x) {
        return module::max_pool2d(x, options);
    }
    let [_, _, height, width] = x.dims();
    let [rows, columns] = [(0, height), (1, width)].map(|(i, extent)| {
        axis(
            extent,
            options.kernel_size[i],
            options.stride[i],
            options.padding[i],
            options.dilation[i],
            options.ceil_mode,
        )
    });
    pool(x, MaxPool(Windows { rows, columns }))
}

/// The mean over windows of the last axis; zeros of the padding count where the options say so.
///
/// # Shapes
/// - x: `[batch, channels, length]`
/// - output: `[batch, channels, length']`, as in [`max_pool1d`] without dilation
///
/// # Panics
/// When a window exceeds the padded input.
pub fn avg_pool1d(x: Tensor<3>, options: AvgPoolOptions<1>) -> Tensor<3> {
    if !runs_natively(&x) {
        return module::avg_pool1d(x, options);
    }
    let [_, _, length] = x.dims();
    let columns =
        axis(length, options.kernel_size[0], options.stride[0], options.padding[0], 1, options.ceil_mode);
    let windows = Windows { rows: Axis::unit(), columns };
    pool(x, MeanPool { windows, padding_counts: options.count_include_pad })
}

/// The mean over windows of the last two axes; zeros of the padding count where the options say so.
///
/// # Shapes
/// - x: `[batch, channels, height, width]`
/// - output: `[batch, channels, height', width']`, each as in [`max_pool1d`] without dilation
///
/// # Panics
/// When a window exceeds the padded input.
pub fn avg_pool2d(x: Tensor<4>, options: AvgPoolOptions<2>) -> Tensor<4> {
    if !runs_natively(&x) {
        return module::avg_pool2d(x, options);
    }
    let [_, _, height, width] = x.dims();
    let [rows, columns] = [(0, height), (1, width)].map(|(i, extent)| {
        axis(extent, options.kernel_size[i], options.stride[i], options.padding[i], 1, options.ceil_mode)
    });
    pool(x, MeanPool { windows: Windows { rows, columns }, padding_counts: options.count_include_pad })
}

/// The mean over `output` windows that cover the last axis evenly: window `i` reaches from
/// `⌊i length / output⌋` to `⌈(i + 1) length / output⌉`.
///
/// # Shapes
/// - x: `[batch, channels, length]`
/// - output: `[batch, channels, output]`
///
/// # Panics
/// When the axis is empty.
pub fn adaptive_avg_pool1d(x: Tensor<3>, output: usize) -> Tensor<3> {
    if !runs_natively(&x) {
        return module::adaptive_avg_pool1d(x, output);
    }
    let [_, _, length] = x.dims();
    let windows = Windows { rows: Axis::unit(), columns: Axis::even(length, output) };
    pool(x, MeanPool { windows, padding_counts: false })
}

/// The mean over windows that cover the last two axes evenly, as in [`adaptive_avg_pool1d`].
///
/// # Shapes
/// - x: `[batch, channels, height, width]`
/// - output: `[batch, channels, output[0], output[1]]`
///
/// # Panics
/// When one of the axes is empty.
pub fn adaptive_avg_pool2d(x: Tensor<4>, output: [usize; 2]) -> Tensor<4> {
    if !runs_natively(&x) {
        return module::adaptive_avg_pool2d(x, output);
    }
    let [_, _, height, width] = x.dims();
    let windows = Windows { rows: Axis::even(height, output[0]), columns: Axis::even(width, output[1]) };
    pool(x, MeanPool { windows, padding_counts: false })
}

fn pool<const D: usize>(x: Tensor<D>, function: impl Function<1>) -> Tensor<D> {
    Tensor::from_dispatch(apply(&function, [x.into_dispatch()]))
}

/// The windows of one axis.
#[derive(Debug, Clone)]
struct Axis {
    extent: usize,
    /// Distance of neighbouring positions in a window.
    dilation: usize,
    windows: Vec<Window>,
}

/// A window of one axis.
#[derive(Debug, Clone, Copy)]
struct Window {
    /// The first position inside the axis.
    start: usize,
    /// Positions inside the axis.
    len: usize,
    /// Positions inside the axis and its padding.
    padded: usize,
}

/// The windows of two axes.
#[derive(Debug, Clone)]
struct Windows {
    rows: Axis,
    columns: Axis,
}

fn axis(
    extent: usize,
    kernel: usize,
    stride: usize,
    (before, after): (usize, usize),
    dilation: usize,
    ceil_mode: bool,
) -> Axis {
    let reach = dilation * (kernel - 1) + 1;
    let padded = before + extent + after;
    let slack = if ceil_mode { stride - 1 } else { 0 };
    assert!(
        padded + slack >= reach,
        "a pooling window of {kernel}, dilated by {dilation}, exceeds an axis of {extent} padded to {padded}"
    );
    let mut outputs = (padded + slack - reach) / stride + 1;
    if ceil_mode && (outputs - 1) * stride >= before + extent {
        outputs -= 1;
    }
    let window = |output: usize| {
        let first = output * stride;
        let inside = |&tap: &usize| (before..before + extent).contains(&(first + tap * dilation));
        let len = (0..kernel).filter(inside).count();
        let start = (0..kernel).find(inside).map_or(0, |tap| first + tap * dilation - before);
        let padded = (0..kernel).filter(|tap| first + tap * dilation < padded).count();
        Window { start, len, padded }
    };
    Axis { extent, dilation, windows: (0..outputs).map(window).collect() }
}

impl Axis {
    /// One position, which is its own window.
    fn unit() -> Self {
        Self::even(1, 1)
    }

    /// Windows that cover the axis evenly.
    fn even(extent: usize, outputs: usize) -> Self {
        assert!(extent > 0 || outputs == 0, "an empty axis has no {outputs} windows");
        let window = |output: usize| {
            let start = output * extent / outputs;
            let len = ((output + 1) * extent).div_ceil(outputs) - start;
            Window { start, len, padded: len }
        };
        Self { extent, dilation: 1, windows: (0..outputs).map(window).collect() }
    }

    fn outputs(&self) -> usize {
        self.windows.len()
    }

    /// The positions of a window.
    fn of(&self, window: &Window) -> impl Iterator<Item = usize> + use<> {
        let (start, dilation) = (window.start, self.dilation);
        (0..window.len).map(move |tap| start + tap * dilation)
    }
}

impl Windows {
    fn input_plane(&self) -> usize {
        self.rows.extent * self.columns.extent
    }

    fn output_plane(&self) -> usize {
        self.rows.outputs() * self.columns.outputs()
    }

    /// The shape of the output: that of the input with the last axes replaced.
    fn output_shape(&self, input: &[usize]) -> Vec<usize> {
        let mut shape = input.to_vec();
        let last = shape.len() - 1;
        shape[last] = self.columns.outputs();
        if last == 3 {
            shape[2] = self.rows.outputs();
        }
        shape
    }
}

/// Windows over the planes of one shape, pooled from slice to slice.
pub struct FixedPool(Pooling);

enum Pooling {
    Max(Windows),
    Mean(MeanPool),
}

impl FixedPool {
    /// Maxima; `dilation` is the distance of neighbouring positions in a window.
    ///
    /// # Panics
    /// When the padded plane is smaller than the kernel.
    pub fn max(extents: [usize; 2], dilation: [usize; 2], options: &PoolOptions) -> Self {
        Self(Pooling::Max(options.windows(extents, dilation)))
    }

    /// Means, of windows with or without their padding.
    ///
    /// # Panics
    /// When the padded plane is smaller than the kernel.
    pub fn mean(extents: [usize; 2], padding_counts: bool, options: &PoolOptions) -> Self {
        Self(Pooling::Mean(MeanPool { windows: options.windows(extents, [1; 2]), padding_counts }))
    }

    /// Means over windows that cover the plane evenly.
    ///
    /// # Panics
    /// When the plane is empty.
    pub fn even([height, width]: [usize; 2], [rows, columns]: [usize; 2]) -> Self {
        let windows = Windows { rows: Axis::even(height, rows), columns: Axis::even(width, columns) };
        Self(Pooling::Mean(MeanPool { windows, padding_counts: false }))
    }

    /// Pools all planes of `x`.
    pub fn run(&self, x: &[f32], output: &mut [f32]) {
        match &self.0 {
            Pooling::Max(windows) => windows.maxima(x, output),
            Pooling::Mean(mean) => mean.average(x, output),
        }
    }
}

/// The windows of a plane.
#[derive(Debug, Clone, Copy)]
pub struct PoolOptions {
    /// Height and width of a window.
    pub kernel: [usize; 2],
    /// Distance of windows along both axes.
    pub stride: [usize; 2],
    /// Padding on either side of both axes.
    pub padding: [usize; 2],
    /// Whether windows may reach beyond the padding.
    pub ceil_mode: bool,
}

impl PoolOptions {
    fn windows(&self, extents: [usize; 2], dilation: [usize; 2]) -> Windows {
        let [rows, columns] = [0, 1].map(|i| {
            let padding = (self.padding[i], self.padding[i]);
            axis(extents[i], self.kernel[i], self.stride[i], padding, dilation[i], self.ceil_mode)
        });
        Windows { rows, columns }
    }
}

/// Elements below which a plane does not make a task of its own.
const TASK: usize = 1 << 13;

/// Planes of one task.
fn planes(plane: usize) -> usize {
    (TASK / plane.max(1)).max(1)
}

#[derive(Debug, Clone)]
struct MaxPool(Windows);

/// Marks outputs whose window lies in the padding altogether.
const NOWHERE: u32 = u32::MAX;

impl Function<1> for MaxPool {
    /// The input's shape, and where in its plane each output comes from.
    type Saved = (Vec<usize>, Vec<u32>);

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Self::Saved) {
        let windows = &self.0;
        let (input_plane, output_plane) = (windows.input_plane(), windows.output_plane());
        let shape = x.layout().shape().to_vec();
        let output_shape = windows.output_shape(&shape);
        let x = floats(&x);
        let len = output_shape.iter().product();
        let mut output = vec![f32::NEG_INFINITY; len];
        let mut origins = vec![NOWHERE; len];
        if len > 0 && input_plane > 0 {
            let min = planes(input_plane);
            x.par_chunks(input_plane)
                .zip(output.par_chunks_mut(output_plane).zip(origins.par_chunks_mut(output_plane)))
                .with_min_len(min)
                .for_each_init(
                    || (vec![0.0; windows.columns.extent], vec![0; windows.columns.extent]),
                    |(best, rows), (x, (output, origins))| windows.max(x, best, rows, output, origins),
                );
        }
        (tensor(output, output_shape), (shape, origins))
    }

    fn backward(
        &self,
        (shape, origins): Self::Saved,
        upstream: FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let (input_plane, output_plane) = (self.0.input_plane(), self.0.output_plane());
        let upstream = floats(&upstream);
        let mut d_x = vec![0.0; shape.iter().product()];
        if !d_x.is_empty() && output_plane > 0 {
            let outputs = upstream.par_chunks(output_plane).zip(origins.par_chunks(output_plane));
            d_x.par_chunks_mut(input_plane).zip(outputs).with_min_len(planes(input_plane)).for_each(
                |(d_x, (upstream, origins))| {
                    for (upstream, &origin) in upstream.iter().zip(origins) {
                        if let Some(d_x) = d_x.get_mut(origin as usize) {
                            *d_x += upstream;
                        }
                    }
                },
            );
        }
        [Some(tensor(d_x, shape))]
    }
}

impl Windows {
    /// The maxima over the windows of all planes.
    fn maxima(&self, x: &[f32], output: &mut [f32]) {
        if output.is_empty() || x.is_empty() {
            return;
        }
        let (width, outputs) = (self.columns.extent, self.columns.outputs());
        let (input_plane, output_plane) = (self.input_plane(), self.output_plane());
        let work = |best: &mut Vec<f32>, (x, output): (&[f32], &mut [f32])| {
            for (window, output) in self.rows.windows.iter().zip(output.chunks_mut(outputs)) {
                best.fill(f32::NEG_INFINITY);
                for row in self.rows.of(window) {
                    let x = &x[row * width..][..width];
                    simd(
                        #[inline(always)]
                        || best.iter_mut().zip(x).for_each(|(best, &x)| *best = greater(*best, x)),
                    );
                }
                for (window, output) in self.columns.windows.iter().zip(output) {
                    *output =
                        self.columns.of(window).fold(f32::NEG_INFINITY, |most, at| greater(most, best[at]));
                }
            }
        };
        x.par_chunks(input_plane)
            .zip(output.par_chunks_mut(output_plane))
            .with_min_len(planes(input_plane))
            .for_each_init(|| vec![0.0; width], work);
    }

    /// The maxima of one plane and where they are, given room for one row: of equal elements the first.
    fn max(&self, x: &[f32], best: &mut [f32], rows: &mut [u32], output: &mut [f32], origins: &mut [u32]) {
        let (width, outputs) = (self.columns.extent, self.columns.outputs());
        let out = output.chunks_mut(outputs).zip(origins.chunks_mut(outputs));
        for (window, (output, origins)) in self.rows.windows.iter().zip(out) {
            if window.len == 0 {
                continue;
            }
            best.fill(f32::NEG_INFINITY);
            rows.fill(window.start as u32);
            for row in self.rows.of(window) {
                let x = &x[row * width..][..width];
                simd(
                    #[inline(always)]
                    || {
                        for ((best, at), &x) in best.iter_mut().zip(rows.iter_mut()).zip(x) {
                            let greater = x > *best || x.is_nan();
                            *best = if greater { x } else { *best };
                            *at = if greater { row as u32 } else { *at };
                        }
                    },
                );
            }
            for ((window, output), origin) in self.columns.windows.iter().zip(output).zip(origins) {
                let (mut greatest, mut row, mut column) = (f32::NEG_INFINITY, u32::MAX, 0);
                for at in self.columns.of(window) {
                    let x = best[at];
                    if x > greatest || x.is_nan() || (x == greatest && rows[at] < row) {
                        (greatest, row, column) = (x, rows[at], at);
                    }
                }
                if window.len > 0 {
                    *output = greatest;
                    *origin = row * width as u32 + column as u32;
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
struct MeanPool {
    windows: Windows,
    padding_counts: bool,
}

impl MeanPool {
    /// The means over the windows of all planes.
    fn average(&self, x: &[f32], output: &mut [f32]) {
        if output.is_empty() || x.is_empty() {
            return;
        }
        let Windows { rows, columns } = &self.windows;
        let (width, outputs) = (columns.extent, columns.outputs());
        let (input_plane, output_plane) = (self.windows.input_plane(), self.windows.output_plane());
        let work = |sums: &mut Vec<f32>, (x, output): (&[f32], &mut [f32])| {
            for (window, output) in rows.windows.iter().zip(output.chunks_mut(outputs)) {
                sums.fill(0.0);
                for row in rows.of(window) {
                    add(1.0, &x[row * width..][..width], sums);
                }
                let share = self.share(window);
                for (window, output) in columns.windows.iter().zip(output) {
                    let sum: f32 = columns.of(window).map(|at| sums[at]).sum();
                    *output = sum * share * self.share(window);
                }
            }
        };
        x.par_chunks(input_plane)
            .zip(output.par_chunks_mut(output_plane))
            .with_min_len(planes(input_plane))
            .for_each_init(|| vec![0.0; width], work);
    }

    /// The share of one element in the mean over a window of one axis.
    fn share(&self, window: &Window) -> f32 {
        let count = if self.padding_counts { window.padded } else { window.len };
        1.0 / count.max(1) as f32
    }
}

impl Function<1> for MeanPool {
    /// The input's shape.
    type Saved = Vec<usize>;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Vec<usize>) {
        let shape = x.layout().shape().to_vec();
        let output_shape = self.windows.output_shape(&shape);
        let x = floats(&x);
        let mut output = vec![0.0; output_shape.iter().product()];
        self.average(&x, &mut output);
        (tensor(output, output_shape), shape)
    }

    fn backward(&self, shape: Vec<usize>, upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let Windows { rows, columns } = &self.windows;
        let (width, outputs) = (columns.extent, columns.outputs());
        let (input_plane, output_plane) = (self.windows.input_plane(), self.windows.output_plane());
        let upstream = floats(&upstream);
        let mut d_x = vec![0.0; shape.iter().product()];
        if !d_x.is_empty() && output_plane > 0 {
            let work = |spread: &mut Vec<f32>, (d_x, upstream): (&mut [f32], &[f32])| {
                for (window, upstream) in rows.windows.iter().zip(upstream.chunks(outputs)) {
                    spread.fill(0.0);
                    for (window, upstream) in columns.windows.iter().zip(upstream) {
                        let part = upstream * self.share(window);
                        columns.of(window).for_each(|at| spread[at] += part);
                    }
                    for row in rows.of(window) {
                        add(self.share(window), spread, &mut d_x[row * width..][..width]);
                    }
                }
            };
            d_x.par_chunks_mut(input_plane)
                .zip(upstream.par_chunks(output_plane))
                .with_min_len(planes(input_plane))
                .for_each_init(|| vec![0.0; width], work);
        }
        [Some(tensor(d_x, shape))]
    }
}

/// The greater of two numbers; not a number where one is not.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// `y += a x`.
fn add(a: f32, x: &[f32], y: &mut [f32]) {
    simd(
        #[inline(always)]
        || axpy(a, x, y),
    );
}
