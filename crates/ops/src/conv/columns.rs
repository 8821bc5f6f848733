//! Convolutions as matrix products with the inputs of every output gathered in the columns of a panel.
//!
//! A panel has a row for each input channel and tap and a column for each output position of a block.
//! Blocks are small enough for their panel to stay in a core's cache.

use std::borrow::Cow;

use rayon::prelude::*;

use super::Finish;
use super::geometry::{Block, Blocks, Geometry, Run, by_channel};
use crate::gemm::{Mat, Out, gemm};
use crate::packed::{DEPTH, LeftFactor, LeftFactors, ROWS, RightFactor};
use crate::simd;

/// Elements of a panel, about: half of a core's second-level cache.
const PANEL: usize = 1 << 17;
/// Elements of a panel that are read at once where weights are packed.
const PACKED_PANEL: usize = 1 << 16;
/// Fewest and most columns of a panel.
const COLUMNS: [usize; 2] = [256, 2048];
/// Panels of the weight that one task multiplies with.
const PANELS: usize = 4;
/// Rows of a gradient's product that one task computes.
const PART: usize = 64;
/// Partial sums of the weight's gradient.
const RUNS: usize = 8;

fn blocks(geometry: &Geometry) -> Blocks {
    blocks_of(geometry, PANEL / geometry.depth().max(1))
}

fn blocks_of(geometry: &Geometry, columns: usize) -> Blocks {
    Blocks::new(geometry.batch, geometry.output_plane(), 1, columns.clamp(COLUMNS[0], COLUMNS[1]))
}

/// The weight as [`forward`] takes it: a left factor for each group, packed if it is `fixed`.
pub(super) fn factors<'a>(geometry: &Geometry, weight: Cow<'a, [f32]>, fixed: bool) -> LeftFactors<'a> {
    if !fixed {
        return LeftFactors::Plain(weight);
    }
    let (outputs, depth) = (geometry.outputs, geometry.depth());
    let factor = |group| LeftFactor::new(&weight[geometry.weight_of(group)], outputs, depth, depth);
    LeftFactors::Packed((0..geometry.groups).map(factor).collect())
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
    let outputs = geometry.outputs;
    let channels = geometry.groups * outputs;
    if y.is_empty() {
        return;
    }
    let blocks = match weight {
        LeftFactors::Plain(_) => blocks(geometry),
        LeftFactors::Packed(_) => blocks_of(geometry, PACKED_PANEL / geometry.depth().clamp(1, DEPTH)),
    };
    let pieces = blocks.split(y, channels);
    let work = |scratch: &mut Scratch, (block, pieces): (Block, Vec<&mut [f32]>)| {
        let mut planes = by_channel(pieces, channels);
        for (group, planes) in planes.chunks_mut(outputs).enumerate() {
            let panel = panel(geometry, x, &block, group, &mut scratch.panel);
            let bias = bias.get(group * outputs..).unwrap_or_default();
            let finish = |number: usize, planes: &mut [&mut [f32]]| {
                let channel = group * outputs + number;
                for (image, piece) in block.images.clone().zip(planes) {
                    finish.call(geometry.output_at(image, channel, &block), piece);
                }
            };
            match weight {
                LeftFactors::Plain(weight) => {
                    let weight = &weight[geometry.weight_of(group)];
                    multiply(geometry, weight, panel, bias, &block, planes, &mut scratch.product);
                    planes.iter_mut().enumerate().for_each(|(number, planes)| finish(number, planes));
                }
                LeftFactors::Packed(factors) => {
                    let columns = &mut scratch.columns;
                    columns.pack(panel.values, [geometry.depth(), panel.columns], panel.stride);
                    multiply_packed(&factors[group], columns, bias, &block, planes, &finish);
                }
            }
        }
    };
    blocks.list().into_par_iter().zip(pieces).for_each_init(Scratch::default, work);
}

/// The product of a group's weight and panel, plus a bias if there is any, to its channels' planes.
fn multiply(
    geometry: &Geometry,
    weight: &[f32],
    panel: View<'_>,
    bias: &[f32],
    block: &Block,
    planes: &mut [Vec<&mut [f32]>],
    buffer: &mut Vec<f32>,
) {
    let (depth, columns) = (geometry.depth(), panel.columns);
    let product = sized(buffer, planes.len() * columns);
    product.par_chunks_mut(PART * columns).enumerate().for_each(|(part, product)| {
        let weight = Mat::new(&weight[part * PART * depth..], product.len() / columns, depth);
        gemm(product, columns, Out::Set, weight, panel.rows(0..depth));
    });
    for (number, (planes, row)) in planes.iter_mut().zip(product.chunks(columns)).enumerate() {
        for (piece, row) in planes.iter_mut().zip(row.chunks(block.positions.len())) {
            match bias.get(number) {
                Some(bias) => piece.iter_mut().zip(row).for_each(|(y, row)| *y = row + bias),
                None => piece.copy_from_slice(row),
            }
        }
    }
}

/// The same with a packed weight; every task hands its channels, by number, to `finish`.
fn multiply_packed(
    weight: &LeftFactor,
    columns: &RightFactor,
    bias: &[f32],
    block: &Block,
    planes: &mut [Vec<&mut [f32]>],
    finish: &(impl Fn(usize, &mut [&mut [f32]]) + Sync),
) {
    let tasks = planes.par_chunks_mut(PANELS * ROWS).enumerate();
    tasks.for_each_init(Vec::new, |product, (task, planes)| {
        let first = task * PANELS * ROWS;
        let bias = bias.get(first..).unwrap_or_default();
        if block.images.len() == 1 {
            let mut rows: Vec<&mut [f32]> = planes.iter_mut().flatten().map(|piece| &mut **piece).collect();
            weight.multiply(task * PANELS, columns, bias, &mut rows);
        } else {
            let width = columns.width();
            let product = sized(product, planes.len() * width);
            let mut rows: Vec<&mut [f32]> = product.chunks_exact_mut(width).collect();
            weight.multiply(task * PANELS, columns, bias, &mut rows);
            for (planes, row) in planes.iter_mut().zip(rows) {
                let images = row.chunks(block.positions.len());
                planes.iter_mut().zip(images).for_each(|(piece, row)| piece.copy_from_slice(row));
            }
        }
        (first..).zip(planes).for_each(|(number, planes)| finish(number, planes));
    });
}

/// The gradient of the input.
pub(super) fn input_gradient(geometry: &Geometry, d_output: &[f32], weight: &[f32]) -> Vec<f32> {
    let (inputs, outputs, depth) = (geometry.inputs, geometry.outputs, geometry.depth());
    let (plane, taps) = (geometry.input_plane(), geometry.taps());
    let image = geometry.groups * inputs * plane;
    let mut d_input = vec![0.0; geometry.batch * image];
    let blocks = blocks(geometry);
    let list = blocks.list();
    if d_input.is_empty() || list.is_empty() {
        return d_input;
    }
    let channels = PART.div_ceil(taps);
    // Blocks of one image add to the same elements: they follow one another.
    let work = |scratch: &mut Scratch, (blocks, d_input): (&[Block], &mut [f32])| {
        for (block, group) in blocks.iter().flat_map(|block| (0..geometry.groups).map(move |g| (block, g))) {
            let columns = block.columns();
            let d_output = outputs_of(geometry, d_output, block, group, &mut scratch.panel);
            let weight = &weight[geometry.weight_of(group)];
            let panel = sized(&mut scratch.product, depth * columns);
            panel.par_chunks_mut(channels * taps * columns).enumerate().for_each(|(part, panel)| {
                let rows = panel.len() / columns;
                let weight = Mat::strided(&weight[part * channels * taps..], outputs, rows, depth);
                gemm(panel, columns, Out::Set, weight.t(), d_output.rows(0..outputs));
            });
            let runs = geometry.runs(&block.positions);
            let panel = &*panel;
            d_input.par_chunks_mut(image).enumerate().for_each(|(image, d_input)| {
                let planes = &mut d_input[group * inputs * plane..][..inputs * plane];
                let rows = panel.par_chunks(taps * columns);
                planes.par_chunks_mut(plane).zip(rows).for_each(|(d_plane, rows)| {
                    for (runs, row) in runs.iter().zip(rows.chunks(columns)) {
                        let row = &row[image * block.positions.len()..];
                        scatter(runs, geometry.stride[2], row, d_plane);
                    }
                });
            });
        }
    };
    let per_image = geometry.output_plane().div_ceil(blocks.positions);
    list.par_chunks(per_image)
        .zip(d_input.par_chunks_mut(blocks.images * image))
        .for_each_init(Scratch::default, work);
    d_input
}

/// The gradient of the weight.
pub(super) fn weight_gradient(geometry: &Geometry, x: &[f32], d_output: &[f32]) -> Vec<f32> {
    let depth = geometry.depth();
    let len = geometry.groups * geometry.outputs * depth;
    let list = blocks(geometry).list();
    if list.is_empty() || len == 0 {
        return vec![0.0; len];
    }
    let sum = |blocks: &[Block]| {
        let mut scratch = Scratch::default();
        let mut total = vec![0.0; len];
        for (block, group) in blocks.iter().flat_map(|block| (0..geometry.groups).map(move |g| (block, g))) {
            let panel = panel(geometry, x, block, group, &mut scratch.panel);
            let d_output = outputs_of(geometry, d_output, block, group, &mut scratch.product);
            let total = &mut total[geometry.weight_of(group)];
            total.par_chunks_mut(PART * depth).enumerate().for_each(|(part, total)| {
                let first = part * PART;
                let d_output = d_output.rows(first..first + total.len() / depth);
                gemm(total, depth, Out::Add, d_output, panel.rows(0..depth).t());
            });
        }
        total
    };
    total_of(list.par_chunks(list.len().div_ceil(RUNS)).map(sum).collect())
}

/// The sum of lists of equal length.
pub(super) fn total_of(parts: Vec<Vec<f32>>) -> Vec<f32> {
    const BLOCK: usize = 1 << 14;
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    let rest: Vec<Vec<f32>> = parts.collect();
    if !rest.is_empty() {
        total.par_chunks_mut(BLOCK).enumerate().for_each(|(block, total)| {
            for part in &rest {
                let part = &part[block * BLOCK..][..total.len()];
                total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
            }
        });
    }
    total
}

/// Buffers that one task uses again from block to block.
#[derive(Default)]
struct Scratch {
    panel: Vec<f32>,
    product: Vec<f32>,
    columns: RightFactor,
}

/// The first `len` elements of a buffer, whatever they hold.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// A matrix whose columns are those of a block.
#[derive(Clone, Copy)]
struct View<'a> {
    values: &'a [f32],
    columns: usize,
    stride: usize,
}

impl<'a> View<'a> {
    fn rows(&self, rows: std::ops::Range<usize>) -> Mat<'a> {
        Mat::strided(
            &self.values[(rows.start * self.stride).min(self.values.len())..],
            rows.len(),
            self.columns,
            self.stride,
        )
    }
}

/// The panel of one group, `[inputs taps, columns]`; in `buffer` where the input itself is not it.
fn panel<'a>(
    geometry: &Geometry,
    x: &'a [f32],
    block: &Block,
    group: usize,
    buffer: &'a mut Vec<f32>,
) -> View<'a> {
    let (inputs, plane, columns) = (geometry.inputs, geometry.input_plane(), block.columns());
    if geometry.is_pointwise() {
        return channels_of(x, geometry.groups, inputs, plane, block, group, buffer);
    }
    let taps = geometry.taps();
    let runs = geometry.runs(&block.positions);
    let values = sized(buffer, inputs * taps * columns);
    values.par_chunks_mut(taps * columns).enumerate().for_each(|(channel, rows)| {
        rows.fill(0.0);
        for (image, at) in block.images.clone().zip((0..).step_by(block.positions.len())) {
            let x = &x[geometry.input_of(image, group)][channel * plane..][..plane];
            for (runs, row) in runs.iter().zip(rows.chunks_mut(columns)) {
                gather(runs, geometry.stride[2], x, &mut row[at..]);
            }
        }
    });
    View { values, columns, stride: columns }
}

/// One group's channels of a gradient of the output, `[outputs, columns]`.
fn outputs_of<'a>(
    geometry: &Geometry,
    d_output: &'a [f32],
    block: &Block,
    group: usize,
    buffer: &'a mut Vec<f32>,
) -> View<'a> {
    let (outputs, plane) = (geometry.outputs, geometry.output_plane());
    channels_of(d_output, geometry.groups, outputs, plane, block, group, buffer)
}

/// The values of one group's channels at a block's positions; gathered in `buffer` where the block has
/// several images.
fn channels_of<'a>(
    values: &'a [f32],
    groups: usize,
    channels: usize,
    plane: usize,
    block: &Block,
    group: usize,
    buffer: &'a mut Vec<f32>,
) -> View<'a> {
    let columns = block.columns();
    let of = |image: usize| &values[(image * groups + group) * channels * plane..][..channels * plane];
    if block.images.len() == 1 {
        let values = &of(block.images.start)[block.positions.start.min(channels * plane)..];
        return View { values, columns, stride: plane };
    }
    let gathered = sized(buffer, channels * columns);
    for (image, at) in block.images.clone().zip((0..).step_by(plane)) {
        for (row, values) in gathered.chunks_mut(columns).zip(of(image).chunks(plane)) {
            row[at..at + plane].copy_from_slice(values);
        }
    }
    View { values: gathered, columns, stride: columns }
}

/// Fills `row`, which holds zeros, with what its outputs see of a plane through one tap.
fn gather(runs: &[Run], stride: usize, plane: &[f32], row: &mut [f32]) {
    for Run { seeing, start } in runs {
        let row = &mut row[seeing.clone()];
        let plane = &plane[*start..];
        if stride == 1 {
            row.copy_from_slice(&plane[..row.len()]);
        } else {
            row.iter_mut().zip(plane.chunks(stride)).for_each(|(value, plane)| *value = plane[0]);
        }
    }
}

/// Adds the values in `row` to the elements of a plane that its outputs see through one tap.
fn scatter(runs: &[Run], stride: usize, row: &[f32], plane: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for Run { seeing, start } in runs {
                let row = &row[seeing.clone()];
                let plane = &mut plane[*start..];
                if stride == 1 {
                    plane.iter_mut().zip(row).for_each(|(plane, value)| *plane += value);
                } else {
                    plane.chunks_mut(stride).zip(row).for_each(|(plane, value)| plane[0] += value);
                }
            }
        },
    );
}
