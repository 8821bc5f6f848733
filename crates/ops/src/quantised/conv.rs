//! Convolutions of images of bytes.

use rayon::prelude::*;

use super::kernel::{Block, GROUP, Kind, Level, PANEL, level, multiply};
use super::{Affine, Requantise};
use crate::simd;

/// Extents of a convolution of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvShape {
    /// Channels of the input.
    pub channels: usize,
    /// Height and width of the input.
    pub image: [usize; 2],
    /// Channels of the output.
    pub outputs: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Step along each axis.
    pub stride: [usize; 2],
    /// Rows and columns before and after the image.
    pub padding: [usize; 2],
    /// Distance of the kernel's taps.
    pub dilation: [usize; 2],
    /// Groups of channels that do not see each other.
    pub groups: usize,
}

impl ConvShape {
    /// Height and width of the output.
    pub fn output(&self) -> [usize; 2] {
        std::array::from_fn(|axis| {
            let reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1;
            let room = self.image[axis] + 2 * self.padding[axis];
            if room < reach { 0 } else { (room - reach) / self.stride[axis] + 1 }
        })
    }

    /// Multiplications for one image.
    pub fn multiplications(&self) -> usize {
        let [height, width] = self.output();
        height * width * self.outputs * self.inner()
    }

    /// Weights of an output channel.
    fn inner(&self) -> usize {
        self.channels / self.groups.max(1) * self.kernel[0] * self.kernel[1]
    }

    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Which outputs `from..to` of row `row` see an input through tap `tap`, and where in the plane of the input the first of
    /// them looks; none where the tap's row is outside.
    fn seen(&self, row: usize, tap: usize) -> Option<(usize, usize, usize)> {
        let ([_, out_width], [tap_y, tap_x]) = (self.output(), [tap / self.kernel[1], tap % self.kernel[1]]);
        let y = (row * self.stride[0] + tap_y * self.dilation[0]).checked_sub(self.padding[0])?;
        if y >= self.image[0] {
            return None;
        }
        let shift = tap_x * self.dilation[1];
        let from = self.padding[1].saturating_sub(shift).div_ceil(self.stride[1]);
        let end =
            (self.image[1] + self.padding[1]).saturating_sub(shift).div_ceil(self.stride[1]).min(out_width);
        (from < end).then(|| (from, end, y * self.image[1] + from * self.stride[1] + shift - self.padding[1]))
    }
}

/// Pixels that are gathered at once.
const PIXELS: usize = 4 * PANEL;

/// A convolution with weights of eight bits, `[outputs, channels / groups, height, width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conv {
    shape: ConvShape,
    /// Every output's weights, filled up to whole groups.
    rows: Vec<u8>,
    /// Their sums.
    sums: Vec<i32>,
    level: Level,
}

impl Conv {
    /// Lays out the weights.
    ///
    /// # Panics
    /// When the weights do not fill their shape, or channels are not divided evenly.
    pub fn new(shape: ConvShape, weights: &[i8]) -> Self {
        let ConvShape { channels, outputs, groups, .. } = shape;
        assert!(groups > 0 && channels.is_multiple_of(groups) && outputs.is_multiple_of(groups));
        let inner = shape.inner();
        assert_eq!(weights.len(), outputs * inner, "weights must fill their shape");
        let stride = inner.next_multiple_of(GROUP);
        let mut rows = vec![0; outputs * stride];
        for (row, weights) in rows.chunks_mut(stride).zip(weights.chunks(inner)) {
            row.iter_mut().zip(weights).for_each(|(to, &from)| *to = from as u8);
        }
        let sums = weights.chunks(inner).map(|row| row.iter().map(|&w| i32::from(w)).sum()).collect();
        Self { shape, rows, sums, level: level() }
    }

    /// With other instructions than the fastest.
    pub fn with_level(self, level: Level) -> Self {
        Self { level, ..self }
    }

    /// Its extents.
    pub fn shape(&self) -> &ConvShape {
        &self.shape
    }

    /// Exact sums `Σ (x - zero) w`, `[batch, outputs, height, width]`; beyond the edge `x` is `zero`.
    ///
    /// # Panics
    /// When `x` is not whole images.
    pub fn sums(&self, x: &[u8], zero: u8) -> Vec<i32> {
        self.compute(x, zero, 0, |_, sums, out| out.copy_from_slice(&sums[..out.len()]))
    }

    /// `scale (sum + bias)`, within the ends.
    ///
    /// # Panics
    /// When `x` is not whole images, or there is not one scale and one bias an output.
    pub fn floats(&self, x: &[u8], zero: u8, requantise: &Requantise<'_>) -> Vec<f32> {
        self.compute(x, zero, 0.0, |channel, sums, out| {
            simd(
                #[inline(always)]
                || requantise.row(channel, sums, out),
            );
        })
    }

    /// The same as bytes.
    ///
    /// # Panics
    /// When `x` is not whole images, or there is not one scale and one bias an output.
    pub fn bytes(&self, x: &[u8], zero: u8, requantise: &Requantise<'_>, to: &Affine) -> Vec<u8> {
        self.compute(x, zero, 0, |channel, sums, out: &mut [u8]| {
            for (sums, out) in sums.chunks(PIXELS).zip(out.chunks_mut(PIXELS)) {
                let mut floats = [0.0; PIXELS];
                let floats = &mut floats[..out.len()];
                simd(
                    #[inline(always)]
                    || {
                        requantise.row(channel, sums, floats);
                        to.bytes(floats, out);
                    },
                );
            }
        })
    }

    /// Lets `write` turn sums of an output channel into results.
    fn compute<T: Copy + Send + Sync>(
        &self,
        x: &[u8],
        zero: u8,
        empty: T,
        write: impl Fn(usize, &[i32], &mut [T]) + Sync,
    ) -> Vec<T> {
        let [height, width] = self.shape.output();
        let image = self.shape.channels * self.shape.image[0] * self.shape.image[1];
        assert!(image > 0 && x.len().is_multiple_of(image), "the input must be whole images");
        let mut out = vec![empty; x.len() / image * self.shape.outputs * height * width];
        if out.is_empty() {
            return out;
        }
        if self.shape.channels == self.shape.groups && self.shape.outputs == self.shape.groups {
            self.by_channel(x, zero, &mut out, write);
        } else {
            self.by_product(x, zero, &mut out, write);
        }
        out
    }

    /// One input channel for each output: no product, but a sum of shifted planes.
    fn by_channel<T: Send>(
        &self,
        x: &[u8],
        zero: u8,
        out: &mut [T],
        write: impl Fn(usize, &[i32], &mut [T]) + Sync,
    ) {
        let shape = &self.shape;
        let ([height, width], plane) = (shape.output(), shape.image[0] * shape.image[1]);
        let at_once = (WORTH_SHARING / (height * width * shape.taps())).max(1);
        let planes = out.par_chunks_mut(height * width).zip(x.par_chunks(plane)).enumerate();
        planes.with_min_len(at_once).for_each_init(Scratch::default, |scratch, (at, (out, x))| {
            let channel = at % shape.channels;
            self.sum_of_shifts(channel, x, zero, scratch);
            write(channel, &scratch.sums, out);
        });
    }

    /// The sums of one channel. The plane is laid out with its padding, so that a tap sees all of it at one distance.
    fn sum_of_shifts(&self, channel: usize, x: &[u8], zero: u8, scratch: &mut Scratch) {
        let shape = &self.shape;
        let ([height, width], [stride_y, stride_x]) = (shape.output(), shape.stride);
        let padded = shape.image[1] + 2 * shape.padding[1];
        let Scratch { plane, line, sums } = scratch;
        plane.clear();
        plane.resize(padded * (shape.image[0] + 2 * shape.padding[0]), 0);
        for (row, x) in x.chunks(shape.image[1]).enumerate() {
            let to = &mut plane[(row + shape.padding[0]) * padded + shape.padding[1]..][..x.len()];
            to.iter_mut().zip(x).for_each(|(to, &x)| *to = i16::from(x) - i16::from(zero));
        }
        // All rows in one line where they follow each other, else a line a row.
        let rows_of_line = if shape.stride == [1, 1] { height } else { 1 };
        let span = (rows_of_line - 1) * padded + (width - 1) * stride_x + 1;
        let weights = &self.rows[channel * shape.inner().next_multiple_of(GROUP)..][..shape.taps()];
        sums.clear();
        for first in (0..height).step_by(rows_of_line) {
            line.clear();
            line.resize(span, 0);
            simd(
                #[inline(always)]
                || {
                    for (tap_y, weights) in weights.chunks(shape.kernel[1]).enumerate() {
                        let x = &plane[(first * stride_y + tap_y * shape.dilation[0]) * padded..];
                        let (step, weight) = (shape.dilation[1], |tap: usize| i16::from(weights[tap] as i8));
                        if let [_, _, _] = weights {
                            let x = [0, step, 2 * step].map(|at| &x[at..][..span]);
                            add_three([weight(0), weight(1), weight(2)], x, line);
                            continue;
                        }
                        for tap in 0..weights.len() {
                            add(weight(tap), &x[tap * step..][..span], line);
                        }
                    }
                },
            );
            for row in line.chunks(padded) {
                match stride_x {
                    1 => sums.extend_from_slice(&row[..width]),
                    _ => sums.extend(row.iter().step_by(stride_x).take(width)),
                }
            }
        }
    }

    /// As a product of weights and gathered pixels, some pixels at a time.
    fn by_product<T: Send + Sync>(
        &self,
        x: &[u8],
        zero: u8,
        out: &mut [T],
        write: impl Fn(usize, &[i32], &mut [T]) + Sync,
    ) {
        let shape = &self.shape;
        let [height, width] = shape.output();
        let (plane, image) = (height * width, shape.channels * shape.image[0] * shape.image[1]);
        let (inner, outputs) = (shape.inner(), shape.outputs / shape.groups);
        let stride = inner.next_multiple_of(GROUP);
        let blocks = plane.div_ceil(PIXELS);
        let tasks = x.len() / image * shape.groups * blocks;
        let at_once = (WORTH_SHARING / (PIXELS * outputs * inner)).max(1);
        let target = Target::new(out);
        (0..tasks).into_par_iter().with_min_len(at_once).for_each_init(Vec::new, |panels, task| {
            let (of_batch, block) = (task / blocks, task % blocks);
            let (batch, group) = (of_batch / shape.groups, of_batch % shape.groups);
            let first = block * PIXELS;
            let pixels = PIXELS.min(plane - first);
            let channels = shape.channels / shape.groups * shape.image[0] * shape.image[1];
            let x = &x[batch * image + group * channels..][..channels];
            self.gather(x, zero, first, pixels, panels);
            let block = Block {
                kind: Kind::Unsigned,
                rows: &self.rows[group * outputs * stride..],
                row_count: outputs,
                stride,
                groups: stride / GROUP,
                panels,
                panel_count: pixels.div_ceil(PANEL),
            };
            multiply(self.level, &block, |row, column, sums| {
                let channel = group * outputs + row;
                let length = sums.len().min(pixels - column);
                let at = (batch * shape.outputs + channel) * plane + first + column;
                #[allow(unsafe_code)]
                // SAFETY: every image, channel and pixel belongs to one task, and `multiply` hands out every one of its
                // rows and columns once, so that no two parts overlap.
                let out = unsafe { target.part(at, length) };
                let mut corrected = [0; PIXELS];
                let correction = i32::from(zero) * self.sums[channel];
                corrected.iter_mut().zip(sums).for_each(|(to, &sum)| *to = sum.wrapping_sub(correction));
                write(channel, &corrected[..length], out);
            });
        });
    }

    /// The inputs that `pixels` outputs from `first` on see, as panels.
    fn gather(&self, x: &[u8], zero: u8, first: usize, pixels: usize, panels: &mut Vec<u8>) {
        let shape = &self.shape;
        let ([_, width], plane) = (shape.output(), shape.image[0] * shape.image[1]);
        let (inner, taps) = (shape.inner(), shape.taps());
        let groups = inner.div_ceil(GROUP);
        let panel_count = pixels.div_ceil(PANEL);
        panels.clear();
        panels.resize(panel_count * groups * PANEL * GROUP, 0);
        let pointwise = taps == 1 && shape.stride == [1, 1] && shape.padding == [0, 0];
        let rows = first / width..=(first + pixels - 1) / width;
        for group in 0..groups {
            let mut gathered = [[0u8; PIXELS]; GROUP];
            for (k, gathered) in (group * GROUP..inner).zip(&mut gathered) {
                let (plane, tap) = (&x[k / taps * plane..][..plane], k % taps);
                if pointwise {
                    gathered[..pixels].copy_from_slice(&plane[first..first + pixels]);
                    continue;
                }
                gathered.fill(zero);
                for row in rows.clone() {
                    let Some((from, end, seen)) = shape.seen(row, tap) else { continue };
                    // The part of the row's outputs that lies within the block.
                    let (begin, stop) =
                        ((row * width + from).max(first), (row * width + end).min(first + pixels));
                    if begin >= stop {
                        continue;
                    }
                    let seen = seen + (begin - row * width - from) * shape.stride[1];
                    let to = &mut gathered[begin - first..stop - first];
                    match shape.stride[1] {
                        1 => to.copy_from_slice(&plane[seen..][..to.len()]),
                        stride => {
                            to.iter_mut().zip(plane[seen..].iter().step_by(stride)).for_each(|(t, &f)| *t = f)
                        }
                    }
                }
            }
            simd(
                #[inline(always)]
                || {
                    for panel in 0..panel_count {
                        let to = &mut panels[(panel * groups + group) * PANEL * GROUP..][..PANEL * GROUP];
                        let from = gathered.each_ref().map(|row| &row[panel * PANEL..][..PANEL]);
                        for pixel in 0..PANEL {
                            for (k, from) in from.iter().enumerate() {
                                to[pixel * GROUP + k] = from[pixel];
                            }
                        }
                    }
                },
            );
        }
    }
}

/// Multiplications that outweigh handing a task to another thread.
const WORTH_SHARING: usize = 1 << 18;

/// Memory of a task.
#[derive(Default)]
struct Scratch {
    /// A plane with its padding, without its zero.
    plane: Vec<i16>,
    /// Sums of a line, with what lies between its rows.
    line: Vec<i32>,
    sums: Vec<i32>,
}

/// `sums += weight x`: a weight of eight bits times a difference of nine fits sixteen.
#[inline(always)]
fn add(weight: i16, x: &[i16], sums: &mut [i32]) {
    sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += i32::from(x.wrapping_mul(weight)));
}

/// The same for the three taps of a row, which are the most usual.
#[inline(always)]
fn add_three(weights: [i16; 3], [a, b, c]: [&[i16]; 3], sums: &mut [i32]) {
    for (((sum, &a), &b), &c) in sums.iter_mut().zip(a).zip(b).zip(c) {
        let product = |x: i16, weight: i16| i32::from(x.wrapping_mul(weight));
        *sum += product(a, weights[0]) + product(b, weights[1]) + product(c, weights[2]);
    }
}

/// A slice that tasks write parts of, each its own.
struct Target<T> {
    start: *mut T,
    length: usize,
}

#[allow(unsafe_code)]
// SAFETY: parts are handed out under the promise that no two overlap, so that each element has one thread.
unsafe impl<T: Send> Sync for Target<T> {}

impl<T> Target<T> {
    fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len() }
    }

    /// Elements `first..first + length`.
    ///
    /// # Safety
    /// No two parts that are in use may overlap, and the slice must outlive them.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    unsafe fn part(&self, first: usize, length: usize) -> &mut [T] {
        assert!(first + length <= self.length);
        // SAFETY: the range is inside the slice, and the caller promises that nothing else refers to it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), length) }
    }
}
