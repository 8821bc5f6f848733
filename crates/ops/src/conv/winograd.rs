//! 3×3 convolutions at stride 1 by a quarter of the products (Lavin and Gray, "Fast Algorithms for
//! Convolutional Neural Networks", arXiv 1509.09308): `F(4×4, 3×3)`.
//!
//! A tile of 4×4 outputs is `Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A` of the 6×6 inputs that it sees. Summed over input
//! channels, the elementwise product is one matrix product for each of the 36 points. The gradient of the
//! input is the convolution of the output's gradient with the weight turned round; that of the weight is
//! the adjoint `Gᵀ [Σ (A dy Aᵀ) ⊙ (Bᵀ x B)] G`.

use std::borrow::Cow;

use rayon::prelude::*;

use super::Finish;
use super::columns::total_of;
use super::geometry::{Block, Blocks, Geometry, by_channel};
use crate::gemm::{Mat, Out, gemm};
use crate::packed::{LeftFactor, LeftFactors, RightFactor};
use crate::simd;

/// Outputs of a tile along each axis.
const TILE: usize = 4;
/// Taps of the kernel along each axis.
const TAPS: usize = 3;
/// Inputs that a tile sees along each axis.
const PATCH: usize = TILE + TAPS - 1;
/// Products of a tile and a pair of channels.
const POINTS: usize = PATCH * PATCH;

/// Tiles, or pairs of channels, that are transformed together.
const LANES: usize = 16;
type Lanes = [f32; LANES];

/// Fewest channels and tiles for which it is faster; few tiles do not pay for the weight's transform.
const CHANNELS: usize = 16;
const TILES: usize = 24;
/// Transformed elements of a block, about; they should stay in a core's second-level cache.
const BLOCK: usize = 1 << 18;
/// Partial sums of the weight's gradient.
const RUNS: usize = 4;

/// Whether this way is faster than a matrix product with the kernel as it is.
pub(super) fn pays(geometry: &Geometry) -> bool {
    let [_, height, width] = geometry.output;
    let tiles = height.div_ceil(TILE) * width.div_ceil(TILE);
    geometry.kernel == [1, TAPS, TAPS]
        && geometry.stride == [1; 3]
        && geometry.dilation == [1; 3]
        && geometry.groups == 1
        && geometry.output[0] == 1
        && geometry.before[0] == 0
        && geometry.before[1..].iter().all(|&before| before < TAPS)
        && geometry.inputs.min(geometry.outputs) >= CHANNELS
        && geometry.batch * tiles >= TILES
        // Tiles that reach beyond the output are wasted in part.
        && tiles * POINTS * 2 <= height * width * TAPS * TAPS
}

/// The weight as [`forward`] takes it: a left factor for each point, packed if it is `fixed`.
pub(super) fn factors(geometry: &Geometry, weight: &[f32], fixed: bool) -> LeftFactors<'static> {
    let (outputs, inputs) = (geometry.outputs, geometry.inputs);
    let transformed = transformed_weight(outputs, inputs, |output, input, row, column| {
        weight[((output * inputs + input) * TAPS + row) * TAPS + column]
    });
    if !fixed {
        return LeftFactors::Plain(Cow::Owned(transformed));
    }
    let factor = |point| LeftFactor::new(&transformed[point * inputs..], outputs, inputs, POINTS * inputs);
    LeftFactors::Packed((0..POINTS).into_par_iter().map(factor).collect())
}

/// `y = w ∗ x + b`, given the [`factors`] of `w`.
pub(super) fn forward(
    geometry: &Geometry,
    x: &[f32],
    weight: &LeftFactors<'_>,
    bias: &[f32],
    y: &mut [f32],
    finish: &impl Finish,
) {
    let (inputs, outputs) = (geometry.inputs, geometry.outputs);
    let blocks = blocks(geometry);
    let pieces = blocks.split(y, outputs);
    let work = |(patches, products): &mut (Vec<f32>, Vec<f32>), (block, pieces): (Block, Vec<&mut [f32]>)| {
        let tiles = Tiles::of(geometry, &block);
        let len = tiles.len();
        tiles.transform_inputs(geometry, x, patches);
        products.resize(POINTS * outputs * len, 0.0);
        let points = products.par_chunks_mut(outputs * len).enumerate();
        points.for_each_init(RightFactor::default, |columns, (point, products)| {
            let patches = &patches[point * len..];
            match weight {
                LeftFactors::Plain(weight) => {
                    let weight = Mat::strided(&weight[point * inputs..], outputs, inputs, POINTS * inputs);
                    gemm(products, len, Out::Set, weight, Mat::strided(patches, inputs, len, POINTS * len));
                }
                LeftFactors::Packed(factors) => {
                    columns.pack(patches, [inputs, len], POINTS * len);
                    let mut rows: Vec<&mut [f32]> = products.chunks_exact_mut(len).collect();
                    factors[point].multiply(0, columns, &[], &mut rows);
                }
            }
        });
        by_channel(pieces, outputs).into_par_iter().enumerate().for_each(|(output, mut planes)| {
            let bias = bias.get(output).copied().unwrap_or(0.0);
            let mut patch = [[[0.0; LANES]; PATCH]; PATCH];
            let mut tile = [[[0.0; LANES]; TILE]; TILE];
            for group in 0..len / LANES {
                let at = output * len + group * LANES;
                simd(
                    #[inline(always)]
                    || {
                        for (point, lanes) in patch.as_flattened_mut().iter_mut().enumerate() {
                            lanes.copy_from_slice(&products[point * outputs * len + at..][..LANES]);
                        }
                        both_sides(&patch, output_transform, &mut tile);
                    },
                );
                tiles.put(group, &tile, bias, &mut planes);
            }
            for (image, plane) in block.images.clone().zip(&mut planes) {
                finish.call(geometry.output_at(image, output, &block), plane);
            }
        });
    };
    blocks.list().into_par_iter().zip(pieces).for_each_init(Default::default, work);
}

/// The gradient of the input.
pub(super) fn input_gradient(geometry: &Geometry, d_output: &[f32], weight: &[f32]) -> Vec<f32> {
    let (inputs, outputs) = (geometry.inputs, geometry.outputs);
    let weight = transformed_weight(inputs, outputs, |input, output, row, column| {
        weight[((output * inputs + input) * TAPS + TAPS - 1 - row) * TAPS + TAPS - 1 - column]
    });
    let [_, top, left] = geometry.before;
    let adjoint = Geometry {
        inputs: outputs,
        outputs: inputs,
        input: geometry.output,
        output: geometry.input,
        before: [0, TAPS - 1 - top, TAPS - 1 - left],
        ..*geometry
    };
    let mut d_input = vec![0.0; adjoint.output_len()];
    let weight = LeftFactors::Plain(Cow::Owned(weight));
    forward(&adjoint, d_output, &weight, &[], &mut d_input, &());
    d_input
}

/// The gradient of the weight.
pub(super) fn weight_gradient(geometry: &Geometry, x: &[f32], d_output: &[f32]) -> Vec<f32> {
    let (inputs, outputs) = (geometry.inputs, geometry.outputs);
    let list = blocks(geometry).list();
    let sum = |blocks: &[Block]| {
        let (mut patches, mut d_patches) = (Vec::new(), Vec::new());
        let mut total = vec![0.0; POINTS * outputs * inputs];
        for block in blocks {
            let tiles = Tiles::of(geometry, block);
            let len = tiles.len();
            tiles.transform_inputs(geometry, x, &mut patches);
            tiles.transform_gradients(geometry, d_output, &mut d_patches);
            total.par_chunks_mut(outputs * inputs).enumerate().for_each(|(point, total)| {
                let d_patches = Mat::strided(&d_patches[point * len..], outputs, len, POINTS * len);
                let patches = Mat::strided(&patches[point * len..], inputs, len, POINTS * len);
                gemm(total, inputs, Out::Add, d_patches, patches.t());
            });
        }
        total
    };
    let total = total_of(list.par_chunks(list.len().div_ceil(RUNS)).map(sum).collect());

    let mut d_weight = vec![0.0; outputs * inputs * TAPS * TAPS];
    d_weight.par_chunks_mut(inputs * TAPS * TAPS).enumerate().for_each(|(output, d_weight)| {
        for (group, d_weight) in d_weight.chunks_mut(LANES * TAPS * TAPS).enumerate() {
            let at = output * inputs + group * LANES;
            let lanes = d_weight.len() / (TAPS * TAPS);
            let mut patch = [[[0.0; LANES]; PATCH]; PATCH];
            for (point, values) in patch.as_flattened_mut().iter_mut().enumerate() {
                values[..lanes].copy_from_slice(&total[point * outputs * inputs + at..][..lanes]);
            }
            let mut kernel = [[[0.0; LANES]; TAPS]; TAPS];
            simd(
                #[inline(always)]
                || both_sides(&patch, weight_adjoint, &mut kernel),
            );
            for (lane, d_weight) in d_weight.chunks_mut(TAPS * TAPS).enumerate() {
                for (d_weight, values) in d_weight.iter_mut().zip(kernel.as_flattened()) {
                    *d_weight = values[lane];
                }
            }
        }
    });
    d_weight
}

/// Blocks of whole rows of tiles.
fn blocks(geometry: &Geometry) -> Blocks {
    let tiles = BLOCK / (POINTS * (geometry.inputs + geometry.outputs));
    let columns = tiles.max(2 * LANES) * TILE * TILE;
    Blocks::new(geometry.batch, geometry.output_plane(), TILE * geometry.output[2], columns)
}

/// `G w Gᵀ` of all pairs of channels, `[rows, POINTS, columns]`; `weight` gives the tap of a row's and a
/// column's channel.
fn transformed_weight(
    rows: usize,
    columns: usize,
    weight: impl Fn(usize, usize, usize, usize) -> f32 + Sync,
) -> Vec<f32> {
    let mut transformed = vec![0.0; rows * POINTS * columns];
    transformed.par_chunks_mut(POINTS * columns).enumerate().for_each(|(row, transformed)| {
        for first in (0..columns).step_by(LANES) {
            let lanes = LANES.min(columns - first);
            let mut kernel = [[[0.0; LANES]; TAPS]; TAPS];
            for lane in 0..lanes {
                for (i, values) in kernel.iter_mut().enumerate() {
                    for (j, values) in values.iter_mut().enumerate() {
                        values[lane] = weight(row, first + lane, i, j);
                    }
                }
            }
            let mut patch = [[[0.0; LANES]; PATCH]; PATCH];
            simd(
                #[inline(always)]
                || both_sides(&kernel, weight_transform, &mut patch),
            );
            for (values, transformed) in patch.as_flattened().iter().zip(transformed.chunks_mut(columns)) {
                transformed[first..first + lanes].copy_from_slice(&values[..lanes]);
            }
        }
    });
    transformed
}

/// The tiles of a block, in groups of `LANES`.
struct Tiles {
    block: Block,
    /// Tiles of one image in the block.
    rows: usize,
    columns: usize,
    /// The first row of outputs.
    first: usize,
    /// Height and width of the output.
    extents: [usize; 2],
    /// Image, row and column of every tile.
    places: Vec<[usize; 3]>,
}

impl Tiles {
    fn of(geometry: &Geometry, block: &Block) -> Self {
        let [_, height, width] = geometry.output;
        let rows = (block.positions.len() / width).div_ceil(TILE);
        let columns = width.div_ceil(TILE);
        let first = block.positions.start / width;
        let mut places = Vec::new();
        for image in 0..block.images.len() {
            for row in 0..rows {
                places.extend((0..columns).map(|column| [image, row, column]));
            }
        }
        Self { block: block.clone(), rows, columns, first, extents: [height, width], places }
    }

    /// The number of tiles, with those that fill the last group.
    fn len(&self) -> usize {
        self.places.len().next_multiple_of(LANES)
    }

    /// `Bᵀ x B` of all tiles, `[inputs, POINTS, len]`.
    fn transform_inputs(&self, geometry: &Geometry, x: &[f32], patches: &mut Vec<f32>) {
        let [_, top, left] = geometry.before;
        let [_, height, width] = geometry.input;
        let origin = [self.first as isize - top as isize, -(left as isize)];
        self.transform::<PATCH>(x, geometry.inputs, [height, width], origin, input_transform, patches);
    }

    /// `A dy Aᵀ` of all tiles, `[outputs, POINTS, len]`.
    fn transform_gradients(&self, geometry: &Geometry, d_output: &[f32], patches: &mut Vec<f32>) {
        let origin = [self.first as isize, 0];
        self.transform::<TILE>(d_output, geometry.outputs, self.extents, origin, output_adjoint, patches);
    }

    /// Transforms the `N × N` values from each tile's corner on, in every channel's planes with the first
    /// tile's corner at `origin` and zeros around.
    fn transform<const N: usize>(
        &self,
        values: &[f32],
        channels: usize,
        [height, width]: [usize; 2],
        origin: [isize; 2],
        f: impl Fn([f32; N]) -> [f32; PATCH] + Sync,
        patches: &mut Vec<f32>,
    ) {
        let len = self.len();
        let stride = (self.columns - 1) * TILE + N;
        let padded_plane = ((self.rows - 1) * TILE + N) * stride;
        let corner =
            |&[image, row, column]: &[usize; 3]| image * padded_plane + row * TILE * stride + column * TILE;
        let corners: Vec<usize> = self.places.iter().map(corner).collect();
        patches.resize(channels * POINTS * len, 0.0);
        patches.par_chunks_mut(POINTS * len).enumerate().for_each_init(
            || vec![0.0; self.block.images.len() * padded_plane],
            |padded, (channel, patches)| {
                let mut seen = [[[0.0; LANES]; N]; N];
                let mut patch = [[[0.0; LANES]; PATCH]; PATCH];
                for (image, padded) in self.block.images.clone().zip(padded.chunks_mut(padded_plane)) {
                    let plane = &values[(image * channels + channel) * height * width..][..height * width];
                    pad(plane, width, origin, padded, stride);
                }
                for (group, corners) in corners.chunks(LANES).enumerate() {
                    if corners.len() < LANES {
                        seen = [[[0.0; LANES]; N]; N];
                    }
                    for (lane, corner) in corners.iter().enumerate() {
                        let values = &padded[*corner..][..(N - 1) * stride + N];
                        for i in 0..N {
                            let values = &values[i * stride..][..N];
                            for j in 0..N {
                                seen[i][j][lane] = values[j];
                            }
                        }
                    }
                    simd(
                        #[inline(always)]
                        || {
                            both_sides(&seen, &f, &mut patch);
                            for (point, lanes) in patch.as_flattened().iter().enumerate() {
                                patches[point * len + group * LANES..][..LANES].copy_from_slice(lanes);
                            }
                        },
                    );
                }
            },
        );
    }

    /// Puts a group's tiles where they belong in their images' pieces of one channel.
    fn put(&self, group: usize, tile: &[[Lanes; TILE]; TILE], bias: f32, planes: &mut [&mut [f32]]) {
        let width = self.extents[1];
        for (lane, &[image, row, column]) in self.places[group * LANES..].iter().take(LANES).enumerate() {
            let plane = &mut planes[image][row * TILE * width..];
            let columns = TILE.min(width - column * TILE);
            for (lanes, y) in tile.iter().zip(plane.chunks_mut(width)) {
                let y = &mut y[column * TILE..][..columns];
                if let Ok(y) = <&mut [f32; TILE]>::try_from(&mut *y) {
                    for j in 0..TILE {
                        y[j] = lanes[j][lane] + bias;
                    }
                } else {
                    y.iter_mut().zip(lanes).for_each(|(y, lanes)| *y = lanes[lane] + bias);
                }
            }
        }
    }
}

/// Copies a plane's part from `origin` on, with zeros around it.
fn pad(plane: &[f32], width: usize, [top, left]: [isize; 2], padded: &mut [f32], stride: usize) {
    let height = (plane.len() / width) as isize;
    let start = (-left).max(0) as usize;
    let skip = left.max(0) as usize;
    for (row, padded) in (top..).zip(padded.chunks_mut(stride)) {
        if !(0..height).contains(&row) {
            padded.fill(0.0);
            continue;
        }
        let row = &plane[row as usize * width..][..width][skip..];
        let len = row.len().min(stride - start);
        padded[..start].fill(0.0);
        padded[start..start + len].copy_from_slice(&row[..len]);
        padded[start + len..].fill(0.0);
    }
}

/// A transform along both axes of all lanes, into `y`: results this large are not returned without a copy.
#[inline(always)]
fn both_sides<const N: usize, const M: usize>(
    x: &[[Lanes; N]; N],
    f: impl Fn([f32; N]) -> [f32; M],
    y: &mut [[Lanes; M]; M],
) {
    let mut half = [[[0.0; LANES]; N]; M];
    for j in 0..N {
        for lane in 0..LANES {
            let mut values = [0.0; N];
            for i in 0..N {
                values[i] = x[i][j][lane];
            }
            let values = f(values);
            for i in 0..M {
                half[i][j][lane] = values[i];
            }
        }
    }
    for i in 0..M {
        for lane in 0..LANES {
            let mut values = [0.0; N];
            for j in 0..N {
                values[j] = half[i][j][lane];
            }
            let values = f(values);
            for j in 0..M {
                y[i][j][lane] = values[j];
            }
        }
    }
}

/// `Bᵀ x`
#[inline(always)]
fn input_transform([a, b, c, d, e, f]: [f32; PATCH]) -> [f32; PATCH] {
    let (even, odd) = (e - 4.0 * c, d - 4.0 * b);
    let (near, far) = (e - c, 2.0 * (d - b));
    [4.0 * a - 5.0 * c + e, even + odd, even - odd, near + far, near - far, 4.0 * b - 5.0 * d + f]
}

/// `Aᵀ x`
#[inline(always)]
fn output_transform([a, b, c, d, e, f]: [f32; PATCH]) -> [f32; TILE] {
    let (near, near_odd, far, far_odd) = (b + c, b - c, d + e, d - e);
    [a + near + far, near_odd + 2.0 * far_odd, near + 4.0 * far, near_odd + 8.0 * far_odd + f]
}

/// `A y`
#[inline(always)]
fn output_adjoint([a, b, c, d]: [f32; TILE]) -> [f32; PATCH] {
    let (even, odd) = (a + c, b + d);
    let (far, far_odd) = (a + 4.0 * c, 2.0 * b + 8.0 * d);
    [a, even + odd, even - odd, far + far_odd, far - far_odd, d]
}

/// `G w`
#[inline(always)]
fn weight_transform([a, b, c]: [f32; TAPS]) -> [f32; PATCH] {
    let near = -(a + c) / 6.0;
    let (far, far_odd) = (a / 24.0 + c / 6.0, b / 12.0);
    [a / 4.0, near - b / 6.0, near + b / 6.0, far + far_odd, far - far_odd, c]
}

/// `Gᵀ u`
#[inline(always)]
fn weight_adjoint([a, b, c, d, e, f]: [f32; PATCH]) -> [f32; TAPS] {
    let (near, far) = (-(b + c) / 6.0, d + e);
    [a / 4.0 + near + far / 24.0, (c - b) / 6.0 + (d - e) / 12.0, near + far / 6.0 + f]
}
