//! The shape of a convolution, and which inputs a row of outputs sees.

use std::ops::Range;

use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};

/// The extents of a convolution over three axes; one over fewer axes has unit extents in front.
///
/// A transposed convolution is described by the convolution that it is the adjoint of: its input is
/// that convolution's output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub batch: usize,
    pub groups: usize,
    /// Input channels of one group.
    pub inputs: usize,
    /// Output channels of one group.
    pub outputs: usize,
    pub input: [usize; 3],
    pub output: [usize; 3],
    pub kernel: [usize; 3],
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
    /// Zeros before the first element of each axis; those after the last follow from `output`.
    pub before: [usize; 3],
}

/// The columns of a panel: outputs of one image, or whole planes of several.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub images: Range<usize>,
    pub positions: Range<usize>,
}

/// Outputs of one row that see the input through one tap of the kernel; the others see padding.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub seeing: Range<usize>,
    /// Where the first of them finds its input in the plane; the others are a stride further each.
    pub start: usize,
}

impl Geometry {
    /// # Panics
    /// When the shapes do not fit.
    pub fn of_conv<const D: usize, const N: usize>(
        x: [usize; D],
        weight: [usize; D],
        options: &ConvOptions<N>,
    ) -> Self {
        let groups = options.groups;
        assert!(
            x[1] == weight[1] * groups && weight[0].is_multiple_of(groups),
            "a convolution's weight {weight:?} in {groups} groups does not fit the input {x:?}"
        );
        let [input, kernel] = [&x[2..], &weight[2..]].map(|extents| axes(extents, 1));
        let [stride, dilation] = [options.stride, options.dilation].map(|extents| axes(&extents, 1));
        let [before, after] =
            [options.padding_begin(), options.padding_end()].map(|extents| axes(&extents, 0));
        let output = std::array::from_fn(|axis| {
            let padded = input[axis] + before[axis] + after[axis];
            let reach = dilation[axis] * (kernel[axis].max(1) - 1) + 1;
            assert!(
                kernel[axis] > 0 && padded >= reach,
                "a convolution's kernel {kernel:?}, dilated by {dilation:?}, exceeds the padded input {x:?}"
            );
            (padded - reach) / stride[axis] + 1
        });
        let [batch, inputs, outputs] = [x[0], weight[1], weight[0] / groups];
        Self { batch, groups, inputs, outputs, input, output, kernel, stride, dilation, before }
    }

    /// # Panics
    /// When the shapes do not fit.
    pub fn of_transposed<const D: usize, const N: usize>(
        x: [usize; D],
        weight: [usize; D],
        options: &ConvTransposeOptions<N>,
    ) -> Self {
        let groups = options.groups;
        assert!(
            x[1] == weight[0] && x[1].is_multiple_of(groups),
            "a transposed convolution's weight {weight:?} in {groups} groups does not fit the input {x:?}"
        );
        let [output, kernel] = [&x[2..], &weight[2..]].map(|extents| axes(extents, 1));
        let [stride, dilation] = [options.stride, options.dilation].map(|extents| axes(&extents, 1));
        let [before, extra] = [options.padding, options.padding_out].map(|extents| axes(&extents, 0));
        let input = std::array::from_fn(|axis| {
            assert!(
                kernel[axis] > 0 && output[axis] > 0,
                "a transposed convolution's kernel {kernel:?} and input {x:?} must not be empty"
            );
            let reach = (output[axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1;
            (reach + extra[axis]).checked_sub(2 * before[axis]).unwrap_or_else(|| {
                panic!("a transposed convolution's padding {before:?} leaves nothing of the input {x:?}")
            })
        });
        let [batch, inputs, outputs] = [x[0], weight[1], x[1] / groups];
        Self { batch, groups, inputs, outputs, input, output, kernel, stride, dilation, before }
    }

    /// Elements of one input channel.
    pub fn input_plane(&self) -> usize {
        self.input.iter().product()
    }

    /// Elements of one output channel.
    pub fn output_plane(&self) -> usize {
        self.output.iter().product()
    }

    /// Taps of the kernel.
    pub fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Products that one output sums up.
    pub fn depth(&self) -> usize {
        self.inputs * self.taps()
    }

    /// The elements of all input channels of group `group` of `image`, in the input.
    pub fn input_of(&self, image: usize, group: usize) -> Range<usize> {
        let len = self.inputs * self.input_plane();
        let start = (image * self.groups + group) * len;
        start..start + len
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.groups * self.outputs * self.output_plane()
    }

    /// Where in the output an image's channel has the first position of a block.
    pub fn output_at(&self, image: usize, channel: usize, block: &Block) -> usize {
        (image * self.groups * self.outputs + channel) * self.output_plane() + block.positions.start
    }

    /// Whether every output sees one input position, its own.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == [1; 3] && self.stride == [1; 3] && self.before == [0; 3] && self.input == self.output
    }

    /// The elements of group `group` in the weight.
    pub fn weight_of(&self, group: usize) -> Range<usize> {
        let len = self.outputs * self.depth();
        group * len..(group + 1) * len
    }

    /// For every tap of the kernel, in the order of the weight, what the rows of `positions` see through it;
    /// outputs count from the first position on.
    pub fn runs(&self, positions: &Range<usize>) -> Vec<Vec<Run>> {
        let [_, rows, columns] = self.kernel;
        let tap = |tap: usize| {
            let tap = [tap / (rows * columns), tap / columns % rows, tap % columns];
            let mut runs = Vec::new();
            let mut next = positions.start;
            while next < positions.end {
                let column = next % self.output[2];
                let len = (self.output[2] - column).min(positions.end - next);
                let columns = column..column + len;
                runs.extend(self.run(tap, next / self.output[2], columns, next - positions.start));
                next += len;
            }
            runs
        };
        (0..self.taps()).map(tap).collect()
    }

    /// What the outputs in `columns` of one row, the first of them at `at`, see through `tap`.
    fn run(&self, tap: [usize; 3], row: usize, columns: Range<usize>, at: usize) -> Option<Run> {
        let from = |axis: usize, output: usize| {
            (output * self.stride[axis] + tap[axis] * self.dilation[axis])
                .checked_sub(self.before[axis])
                .filter(|&input| input < self.input[axis])
        };
        let line = from(0, row / self.output[1])? * self.input[1] + from(1, row % self.output[1])?;
        let stride = self.stride[2];
        let offset = tap[2] * self.dilation[2];
        // The outputs `o` with 0 ≤ o stride + offset - before < extent.
        let first = self.before[2].saturating_sub(offset).div_ceil(stride).max(columns.start);
        let last = (self.input[2] + self.before[2]).saturating_sub(offset).div_ceil(stride);
        let last = last.min(columns.end);
        (first < last).then(|| Run {
            seeing: at + first - columns.start..at + last - columns.start,
            start: line * self.input[2] + first * stride + offset - self.before[2],
        })
    }
}

impl Block {
    pub fn columns(&self) -> usize {
        self.images.len() * self.positions.len()
    }
}

/// How images and their planes are divided into [`Block`]s.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    batch: usize,
    plane: usize,
    /// Images of a block; 1 where a plane has several blocks.
    pub images: usize,
    /// Positions of a block; the whole plane where a block has several images.
    pub positions: usize,
}

impl Blocks {
    /// Blocks of about `columns` columns, in a plane a multiple of `unit` long.
    pub fn new(batch: usize, plane: usize, unit: usize, columns: usize) -> Self {
        if 2 * plane <= columns {
            let images = (columns / plane.max(1)).clamp(1, batch.max(1));
            // Evenly, so that the last block is not a small rest.
            let images = batch.max(1).div_ceil(batch.max(1).div_ceil(images));
            return Self { batch, plane, images, positions: plane.max(1) };
        }
        let units = plane.div_ceil(unit);
        let parts = plane.div_ceil(columns).min(units);
        Self { batch, plane, images: 1, positions: units.div_ceil(parts) * unit }
    }

    /// The blocks in the order of the output.
    pub fn list(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        for image in (0..self.batch).step_by(self.images) {
            for position in (0..self.plane).step_by(self.positions) {
                blocks.push(Block {
                    images: image..(image + self.images).min(self.batch),
                    positions: position..(position + self.positions).min(self.plane),
                });
            }
        }
        blocks
    }

    /// For every block its pieces of all rows of `values`, `[batch, channels, plane]`; in a block image by
    /// image, channel by channel.
    pub fn split<'a>(&self, values: &'a mut [f32], channels: usize) -> Vec<Vec<&'a mut [f32]>> {
        let per_plane = self.plane.div_ceil(self.positions);
        let blocks = self.batch.div_ceil(self.images) * per_plane;
        let mut pieces: Vec<Vec<&mut [f32]>> = Vec::new();
        pieces.resize_with(blocks, || Vec::with_capacity(channels * self.images));
        if self.plane == 0 {
            return pieces;
        }
        for (row, values) in values.chunks_mut(self.plane).enumerate() {
            let first = row / channels / self.images * per_plane;
            for (block, piece) in values.chunks_mut(self.positions).enumerate() {
                pieces[first + block].push(piece);
            }
        }
        pieces
    }
}

/// A block's pieces by channel, image by image.
pub(super) fn by_channel(pieces: Vec<&mut [f32]>, channels: usize) -> Vec<Vec<&mut [f32]>> {
    let mut planes: Vec<Vec<&mut [f32]>> = Vec::new();
    planes.resize_with(channels, || Vec::with_capacity(pieces.len() / channels));
    for (piece, channel) in pieces.into_iter().zip((0..channels).cycle()) {
        planes[channel].push(piece);
    }
    planes
}

/// Extents of up to three axes, with `unit` for those that are not there.
fn axes(extents: &[usize], unit: usize) -> [usize; 3] {
    let mut all = [unit; 3];
    all[3 - extents.len()..].copy_from_slice(extents);
    all
}
