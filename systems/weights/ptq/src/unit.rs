//! The units whose precision is decided, and how each is computed: in floats, in floats rounded as if quantised, or in
//! whole numbers.

use std::sync::Arc;

use burn::backend::ir::TensorId;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, TensorData};
use burn_flex::FlexTensor;
use kiln_ops::flex;
use kiln_ops::quantised::{
    Affine, Bytes, Conv, ConvShape, Ends, Panels, Product, Requantise, pack_nibbles, unpack_nibbles,
};
use kiln_ops::{conv2d, linear, matmul};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::grouped::Grouped;
use crate::program::{of_rank, primitive};
use crate::quantiser::{Asymmetric, Calibrator, Observer, Rows, Symmetric};

/// The window of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Height and width.
    pub kernel: [usize; 2],
    /// Step along each axis.
    pub stride: [usize; 2],
    /// Rows and columns before and after the image.
    pub padding: [usize; 2],
    /// Distance of its taps.
    pub dilation: [usize; 2],
    /// Groups of channels that do not see each other.
    pub groups: usize,
    /// Height and width of the input.
    pub image: [usize; 2],
}

/// What a unit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Convolves images with weights `[outputs, channels / groups, height, width]`.
    Conv(Window),
    /// Multiplies by weights `[outputs, inputs]`.
    Linear,
    /// Multiplies two activations, as attention does.
    Product,
    /// Looks rows up; only its weights are quantised.
    Table,
}

/// An operator with its weights, and what was folded into it.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Kind and number.
    pub name: String,
    /// What it does.
    pub work: Work,
    /// What it reads.
    pub input: TensorId,
    /// The second operand of a product.
    pub second: Option<TensorId>,
    /// What it makes.
    pub output: TensorId,
    /// Extents of the weights; of a product the inner and the last extent.
    pub shape: Vec<usize>,
    /// Weights by rows of outputs; empty for a product.
    pub weight: Vec<f32>,
    /// One a row.
    pub bias: Vec<f32>,
    /// Where results are cut off.
    pub ends: Ends,
    /// The largest result of each row, where these differ: equalisation scales a common end with its channel. Empty otherwise.
    pub tops: Vec<f32>,
    /// Multiplications for one example.
    pub multiplications: usize,
    /// Numbers that it reads and writes for one example, without its weights.
    pub elements: usize,
}

/// What calibration found for a unit's operands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ranges {
    /// The input at 8 and at 4 bits.
    pub input: [Asymmetric; 2],
    /// The second operand of a product at 8 and at 4 bits.
    pub second: Option<[Symmetric; 2]>,
}

impl Ranges {
    /// From what was observed.
    pub fn of(input: &Observer, second: Option<&Observer>, calibrator: Calibrator) -> Self {
        let symmetric = |observer: &Observer, bits| {
            let quantiser = observer.quantiser(bits, calibrator);
            let most = f64::from((1u32 << bits) - 1);
            let (low, high) = (f64::from(quantiser.zero) * quantiser.scale, 0.0);
            let high = (most * quantiser.scale - low).max(high);
            Symmetric::of_range(low.max(high), bits)
        };
        Self {
            input: [8, 4].map(|bits| input.quantiser(bits, calibrator)),
            second: second.map(|observer| [8, 4].map(|bits| symmetric(observer, bits))),
        }
    }
}

/// Bits of a unit's weights and of its input; of a product, those of its second and of its first operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pair {
    /// 16, 8 or 4.
    pub weight: u8,
    /// 16, 8 or 4.
    pub input: u8,
}

impl Pair {
    /// The same for both.
    pub fn of(bits: u8) -> Self {
        Self { weight: bits, input: bits }
    }

    /// The bits with which the unit is computed: the more of the two.
    pub fn wider(self) -> u8 {
        self.weight.max(self.input)
    }
}

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scales {
    /// Those of a row, that is of an output channel
    #[default]
    Row,
    /// All of a unit
    Tensor,
}

/// Whole-number weights of a unit with their scales, as they are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// 8 or 4.
    pub bits: u8,
    /// By rows of outputs.
    pub q: Vec<i8>,
    /// One a row, or one for each group of neighbours in a row.
    pub scales: Vec<f32>,
}

impl Weights {
    /// Rounds a unit's weights.
    pub fn of(unit: &Unit, bits: u8, calibrator: Calibrator, scales: Scales) -> Self {
        match scales {
            Scales::Row => Self::with_scales(unit, unit.rows(), bits, calibrator),
            Scales::Tensor => {
                let one = Self::with_scales(unit, 1, bits, calibrator);
                Self { scales: vec![one.scales[0]; unit.rows()], ..one }
            }
        }
    }

    /// Rounds a unit's weights with a scale for every `group` of them; a row must be whole groups.
    pub fn grouped(unit: &Unit, bits: u8, group: usize, calibrator: Calibrator) -> Self {
        Self::with_scales(unit, unit.weight.len() / group, bits, calibrator)
    }

    fn with_scales(unit: &Unit, count: usize, bits: u8, calibrator: Calibrator) -> Self {
        let wide: Vec<f64> = unit.weight.iter().map(|&w| f64::from(w)).collect();
        let Rows { q, scales } = Rows::of(&wide, count.max(1), bits.into(), calibrator);
        Self {
            bits,
            q: q.iter().map(|&q| q as i8).collect(),
            scales: scales.iter().map(|&s| s as f32).collect(),
        }
    }

    /// What the whole numbers stand for.
    pub fn values(&self) -> Vec<f32> {
        let width = self.width();
        let row = |(row, s): (&[i8], &f32)| row.iter().map(|&q| f32::from(q) * s).collect::<Vec<f32>>();
        self.q.chunks(width).zip(&self.scales).flat_map(row).collect()
    }

    /// As stored: bytes, or two numbers of four bits in each.
    pub fn stored(&self) -> Vec<u8> {
        match self.bits {
            4 => pack_nibbles(&self.q, self.width()),
            _ => self.q.iter().map(|&q| q as u8).collect(),
        }
    }

    /// Neighbours that share a scale.
    pub fn width(&self) -> usize {
        (self.q.len() / self.scales.len().max(1)).max(1)
    }

    /// From what [`stored`](Self::stored) gave; `None` when there are not so many.
    pub fn from_stored(bits: u8, bytes: &[u8], scales: Vec<f32>, width: usize) -> Option<Self> {
        let row_bytes = if bits == 4 { width.div_ceil(2) } else { width };
        if width == 0 || bytes.len() != scales.len() * row_bytes {
            return None;
        }
        let q = match bits {
            4 => unpack_nibbles(bytes, width),
            _ => bytes.iter().map(|&byte| byte as i8).collect(),
        };
        Some(Self { bits, q, scales })
    }
}

/// How a unit's weights and operands are rounded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Numbers {
    /// The weights, where they have 8 or 4 bits.
    pub weights: Option<Arc<Weights>>,
    /// The input, where it has 8 or 4 bits.
    pub input: Option<Asymmetric>,
    /// The second operand of a product, where it has 8 or 4 bits.
    pub second: Option<Symmetric>,
    /// What is added to the bias for the mean error of the rounding; empty where nothing is.
    pub shift: Vec<f32>,
}

impl Numbers {
    /// Whether nothing is rounded to 8 or 4 bits.
    pub fn is_float(&self) -> bool {
        self.weights.is_none() && self.input.is_none() && self.second.is_none()
    }

    /// Weights and input of an operator that computes in whole numbers.
    pub fn whole(&self) -> Option<(&Weights, Affine)> {
        Some((self.weights.as_deref()?, self.input?.affine()))
    }

    /// The bias, corrected.
    pub fn bias(&self, unit: &Unit) -> Vec<f32> {
        let shifts = self.shift.iter().copied().chain(std::iter::repeat(0.0));
        unit.bias.iter().zip(shifts).map(|(bias, shift)| bias + shift).collect()
    }

    /// The bias in steps of the sums, whose sizes are `scales`; `None` where they are too many for 32 bits.
    pub fn bias_steps(bias: &[f32], scales: &[f32]) -> Option<Vec<i32>> {
        let steps: Vec<f32> = bias.iter().zip(scales).map(|(b, s)| (b / s).round_ties_even()).collect();
        let fits = steps.iter().all(|steps| steps.abs() <= MOST_BIAS);
        fits.then(|| steps.iter().map(|&steps| steps as i32).collect())
    }
}

/// Scale of the input times that of each row: what one step of a sum is worth.
pub fn step_sizes(weights: &Weights, input: &Affine) -> Vec<f32> {
    weights.scales.iter().map(|scale| scale * input.scale).collect()
}

impl Unit {
    /// Rows of the weights, each with a scale of its own.
    pub fn rows(&self) -> usize {
        if self.weight.is_empty() { 0 } else { self.shape[0] }
    }

    /// Bytes of the weights at so many bits, with a scale a row and the bias.
    pub fn bytes(&self, bits: u8) -> usize {
        let rows = self.rows();
        let width = self.weight.len() / rows.max(1);
        let extra = 4 * (rows + self.bias.len() + self.tops.len());
        match bits {
            16 => 2 * self.weight.len() + extra - 4 * rows,
            4 => rows * width.div_ceil(2) + extra,
            _ => self.weight.len() + extra,
        }
    }

    /// The same without anything after the sums: what a correction of the bias compares.
    pub fn open(&self) -> Self {
        Self { ends: Ends::OPEN, tops: Vec::new(), ..self.clone() }
    }

    fn options(&self, window: &Window) -> ConvOptions<2> {
        ConvOptions::new_with_padding(
            window.stride,
            window.padding.map(|side| (side, side)),
            window.dilation,
            window.groups,
        )
    }

    fn conv_shape(&self, window: &Window) -> ConvShape {
        ConvShape {
            channels: self.shape[1] * window.groups,
            image: window.image,
            outputs: self.shape[0],
            kernel: window.kernel,
            stride: window.stride,
            padding: window.padding,
            dilation: window.dilation,
            groups: window.groups,
        }
    }
}

/// A unit's weights, ready to be used.
#[derive(Debug, Clone)]
pub enum Ready {
    /// In floats.
    Float(FloatWeights),
    /// In floats, weights and operands rounded as if quantised: the reference for whole numbers.
    Rounded {
        /// The rounded weights.
        weights: FloatWeights,
        /// How the input is rounded.
        input: Option<Affine>,
        /// How the second operand of a product is rounded.
        second: Option<Symmetric>,
    },
    /// In whole numbers.
    Whole {
        /// Weights, laid out for the kernels.
        weights: WholeWeights,
        /// How the input is rounded.
        input: Affine,
        /// Scale of the input times that of each row.
        scales: Vec<f32>,
        /// Bias in units of the scales.
        bias: Vec<i32>,
        /// A bias that is too large for that, and is added in floats.
        late_bias: Option<Vec<f32>>,
        /// How the second operand of a product is rounded.
        second: Option<Symmetric>,
    },
    /// With rows of a table in whole numbers.
    Table(Arc<Weights>),
    /// A linear layer on floats, with weights of 4 bits in groups.
    Grouped(Grouped),
    /// In floats, with something added to an operand.
    Moved {
        /// The weights.
        weights: FloatWeights,
        /// What is added.
        by: Vec<f32>,
        /// Whether to the second operand of a product.
        second: bool,
    },
}

/// Weights and bias as tensors.
#[derive(Debug, Clone)]
pub struct FloatWeights {
    weight: FlexTensor,
    bias: FlexTensor,
}

/// Whole-number weights as the kernels read them.
#[derive(Debug, Clone)]
pub enum WholeWeights {
    /// Of a linear layer.
    Panels(Panels),
    /// Of a convolution.
    Conv(Box<Conv>),
    /// A product has none.
    None,
}

impl Ready {
    /// With float weights.
    pub fn float(unit: &Unit) -> Self {
        Self::Float(FloatWeights::of(unit, &unit.weight, &unit.bias))
    }

    /// With float weights that fit sixteen bits.
    pub fn half(unit: &Unit) -> Self {
        Self::Float(FloatWeights::of(unit, &half_precision(&unit.weight), &unit.bias))
    }

    /// With float weights, and something added to the input, or to the second operand of a product.
    pub fn moved(unit: &Unit, by: Vec<f32>, second: bool) -> Self {
        Self::Moved { weights: FloatWeights::of(unit, &unit.weight, &unit.bias), by, second }
    }

    /// In floats that are rounded as the integers would be.
    pub fn rounded(unit: &Unit, numbers: &Numbers) -> Self {
        let weight = match &numbers.weights {
            Some(weights) => weights.values(),
            None => half_precision(&unit.weight),
        };
        Self::Rounded {
            weights: FloatWeights::of(unit, &weight, &numbers.bias(unit)),
            input: numbers.input.map(|input| input.affine()),
            second: numbers.second,
        }
    }

    /// In whole numbers, where both operands are; else as [`rounded`](Self::rounded).
    pub fn whole(unit: &Unit, numbers: &Numbers) -> Self {
        match (unit.work, &numbers.weights, numbers.input, numbers.second) {
            (Work::Table, Some(weights), ..) => Self::Table(weights.clone()),
            (Work::Product, _, Some(input), Some(second)) => Self::Whole {
                weights: WholeWeights::None,
                input: input.affine(),
                scales: Vec::new(),
                bias: Vec::new(),
                late_bias: None,
                second: Some(second),
            },
            (Work::Linear, Some(weights), None, _) if weights.bits == 4 => {
                Self::Grouped(Grouped::new(unit, weights, numbers.bias(unit)))
            }
            (Work::Linear | Work::Conv(_), Some(weights), Some(input), _) => {
                Self::of_operator(unit, weights, input.affine(), numbers.bias(unit))
            }
            _ => Self::rounded(unit, numbers),
        }
    }

    fn of_operator(unit: &Unit, weights: &Weights, input: Affine, bias: Vec<f32>) -> Self {
        let scales = step_sizes(weights, &input);
        let steps = Numbers::bias_steps(&bias, &scales);
        let whole = match unit.work {
            Work::Conv(window) => {
                WholeWeights::Conv(Box::new(Conv::new(unit.conv_shape(&window), &weights.q)))
            }
            _ => {
                let panels = Panels::from_rows(&weights.q, unit.shape[0], unit.shape[1]);
                WholeWeights::Panels(if weights.bits == 4 { panels.with_nibbles() } else { panels })
            }
        };
        Self::Whole {
            weights: whole,
            input,
            scales,
            bias: steps.clone().unwrap_or_else(|| vec![0; bias.len()]),
            late_bias: steps.is_none().then_some(bias),
            second: None,
        }
    }

    /// The unit's result.
    pub fn compute(&self, unit: &Unit, x: FlexTensor, second: Option<FlexTensor>) -> FlexTensor {
        match self {
            Self::Float(weights) => weights.compute(unit, x, second),
            Self::Rounded { weights, input, second: how } => {
                let x = match input {
                    Some(affine) => changed(&x, |values| affine.floats(&affine.quantise(values))),
                    None => x,
                };
                let second = match (second, how) {
                    (Some(second), Some(how)) => {
                        Some(changed(&second, |values| values.iter().map(|&v| rounded(how, v)).collect()))
                    }
                    (second, _) => second,
                };
                weights.compute(unit, x, second)
            }
            Self::Moved { weights, by, second: moves_second } => {
                let moved = |x: &FlexTensor| {
                    let shape = x.layout().shape().clone();
                    flex::tensor(flex::floats(x).iter().zip(by).map(|(x, by)| x + by).collect(), shape)
                };
                match (moves_second, second) {
                    (true, Some(second)) => weights.compute(unit, x, Some(moved(&second))),
                    (_, second) => weights.compute(unit, moved(&x), second),
                }
            }
            Self::Grouped(weights) => {
                let mut shape = x.layout().shape().to_vec();
                let y = weights.multiply(&flex::floats(&x));
                if let Some(last) = shape.last_mut() {
                    *last = unit.shape[0];
                }
                cut_off(flex::tensor(y, shape), unit)
            }
            Self::Table(rows) => look_up(rows, unit.shape[1], &x),
            Self::Whole { weights, input, scales, bias, late_bias, second: how } => {
                let ends = if late_bias.is_some() { Ends::OPEN } else { unit.ends };
                let requantise = Requantise { scales, bias, ends };
                let y = match weights {
                    WholeWeights::Panels(panels) => {
                        let mut shape = x.layout().shape().to_vec();
                        let bytes = Bytes::quantise(&flex::floats(&x), panels.inner(), input);
                        let y = Product::new(&bytes, panels).floats(&requantise);
                        if let Some(last) = shape.last_mut() {
                            *last = panels.columns();
                        }
                        flex::tensor(y, shape)
                    }
                    WholeWeights::Conv(conv) => {
                        let batch = x.layout().shape().to_vec()[0];
                        let y = conv.floats(&quantise(&flex::floats(&x), input), input.zero, &requantise);
                        let [height, width] = conv.shape().output();
                        flex::tensor(y, [batch, unit.shape[0], height, width])
                    }
                    WholeWeights::None => {
                        let (second, how) = second.zip(*how).expect("a product has two operands with ranges");
                        whole_product(unit, &x, &second, input, &how)
                    }
                };
                match late_bias {
                    Some(bias) => cut_off(with_bias(unit, &y, bias), unit),
                    None => capped(y, unit),
                }
            }
        }
    }
}

/// Half of what 32 bits hold: the other half is for the products.
const MOST_BIAS: f32 = (1 << 30) as f32;

/// How many neighbours of a unit's result, of rows or of images, belong to the same channel.
pub fn channel_width(unit: &Unit, shape: &[usize]) -> usize {
    if matches!(unit.work, Work::Conv(_)) { (shape[2] * shape[3]).max(1) } else { 1 }
}

/// The result of a unit with its bias.
fn with_bias(unit: &Unit, y: &FlexTensor, bias: &[f32]) -> FlexTensor {
    let shape = y.layout().shape().to_vec();
    let mut values = flex::floats(y).into_owned();
    for (at, part) in values.chunks_mut(channel_width(unit, &shape)).enumerate() {
        let bias = bias[at % bias.len()];
        part.iter_mut().for_each(|x| *x += bias);
    }
    flex::tensor(values, shape)
}

/// The result of a unit, each channel no larger than its own end.
fn capped(y: FlexTensor, unit: &Unit) -> FlexTensor {
    if unit.tops.is_empty() {
        return y;
    }
    let shape = y.layout().shape().to_vec();
    let mut values = flex::floats(&y).into_owned();
    values.par_chunks_mut(channel_width(unit, &shape)).enumerate().for_each(|(at, part)| {
        let top = unit.tops[at % unit.tops.len()];
        kiln_ops::simd(
            #[inline(always)]
            || part.iter_mut().for_each(|x| *x = x.min(top)),
        );
    });
    flex::tensor(values, shape)
}

/// A number as it is after rounding.
fn rounded(how: &Symmetric, x: f32) -> f32 {
    how.value(how.quantise(x.into())) as f32
}

/// Elements of a task.
const PIECE: usize = 1 << 15;

fn quantise(x: &[f32], affine: &Affine) -> Vec<u8> {
    let mut q = vec![0; x.len()];
    q.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(q, x)| affine.quantise_into(x, q));
    q
}

/// The tensor with other numbers, some at a time.
fn changed(x: &FlexTensor, change: impl Fn(&[f32]) -> Vec<f32> + Send + Sync) -> FlexTensor {
    let shape = x.layout().shape().clone();
    let values: Vec<Vec<f32>> = flex::floats(x).par_chunks(PIECE).map(change).collect();
    flex::tensor(values.concat(), shape)
}

/// Two activations multiplied in whole numbers, matrix by matrix.
fn whole_product(
    unit: &Unit,
    x: &FlexTensor,
    second: &FlexTensor,
    input: &Affine,
    how: &Symmetric,
) -> FlexTensor {
    let [inner, columns] = [unit.shape[0], unit.shape[1]];
    let mut shape = x.layout().shape().to_vec();
    let rows = shape[shape.len() - 2];
    if let Some(last) = shape.last_mut() {
        *last = columns;
    }
    let (x, second) = (flex::floats(x), flex::floats(second));
    let scales = vec![input.scale * how.scale as f32; columns];
    let (bias, inverse, most) =
        (vec![0; columns], (1.0 / how.scale) as f32, if how.bits == 4 { 7.0 } else { 127.0 });
    let requantise = Requantise { scales: &scales, bias: &bias, ends: unit.ends };
    let matrices: Vec<Vec<f32>> = x
        .par_chunks((rows * inner).max(1))
        .zip(second.par_chunks((inner * columns).max(1)))
        .map(|(x, second)| {
            let q: Vec<i8> =
                second.iter().map(|&v| (v * inverse).round_ties_even().clamp(-most, most) as i8).collect();
            let panels = Panels::from_columns(&q, inner, columns);
            Product::new(&Bytes::quantise(x, inner, input), &panels).floats(&requantise)
        })
        .collect();
    flex::tensor(matrices.concat(), shape)
}

/// Rows of a table by their numbers.
fn look_up(rows: &Weights, width: usize, ids: &FlexTensor) -> FlexTensor {
    let ids = ids.to_contiguous();
    let ids: &[i64] = ids.storage();
    let mut y = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        let row = (id.max(0) as usize).min(rows.scales.len().saturating_sub(1));
        let scale = rows.scales[row];
        y.extend(rows.q[row * width..][..width].iter().map(|&q| f32::from(q) * scale));
    }
    flex::tensor(y, [ids.len(), width])
}

impl FloatWeights {
    fn of(unit: &Unit, weight: &[f32], bias: &[f32]) -> Self {
        let weight = match unit.work {
            // As Burn's linear layers have them.
            Work::Linear => {
                let [outputs, inner] = [unit.shape[0], unit.shape[1]];
                let turned =
                    (0..weight.len()).map(|at| weight[at % outputs * inner + at / outputs]).collect();
                flex::tensor(turned, [inner, outputs])
            }
            Work::Product => flex::tensor(Vec::new(), [0]),
            _ => flex::tensor(weight.to_vec(), unit.shape.clone()),
        };
        Self { weight, bias: flex::tensor(bias.to_vec(), [bias.len()]) }
    }

    fn compute(&self, unit: &Unit, x: FlexTensor, second: Option<FlexTensor>) -> FlexTensor {
        let (weight, bias) = (self.weight.clone(), of_rank::<1>(self.bias.clone()));
        let y = match unit.work {
            Work::Conv(window) => {
                primitive(conv2d(of_rank(x), of_rank(weight), Some(bias), unit.options(&window)))
            }
            Work::Linear => {
                let mut shape = x.layout().shape().to_vec();
                let rows = shape.iter().rev().skip(1).product::<usize>();
                let flat = of_rank::<2>(x.to_contiguous().reshape([rows, unit.shape[1]].into()));
                let y = primitive(linear(flat, of_rank(weight), Some(bias), kiln_ops::Activation::Identity));
                if let Some(last) = shape.last_mut() {
                    *last = unit.shape[0];
                }
                y.reshape(shape.into())
            }
            Work::Product => {
                let second = second.expect("a product has two operands");
                match x.layout().shape().num_dims() {
                    2 => primitive(matmul(of_rank::<2>(x), of_rank::<2>(second))),
                    3 => primitive(matmul(of_rank::<3>(x), of_rank::<3>(second))),
                    _ => primitive(matmul(of_rank::<4>(x), of_rank::<4>(second))),
                }
            }
            Work::Table => {
                let ids: Vec<i64> = x.to_contiguous().storage::<i64>().to_vec();
                let width = unit.shape[1];
                let rows: &[f32] = weight.storage();
                let row = |&id: &i64| {
                    let row = (id.max(0) as usize).min((unit.shape[0]).saturating_sub(1));
                    &rows[row * width..][..width]
                };
                return flex::tensor(ids.iter().flat_map(row).copied().collect(), [ids.len(), width]);
            }
        };
        cut_off(y, unit)
    }
}

/// Cuts a unit's results off, in place where nothing else reads them.
fn cut_off(mut y: FlexTensor, unit: &Unit) -> FlexTensor {
    let ends = unit.ends;
    if ends == Ends::OPEN {
        return capped(y, unit);
    }
    debug_assert_eq!(y.dtype(), DType::F32);
    let cut = |values: &mut [f32]| {
        values.par_chunks_mut(PIECE).for_each(|piece| {
            kiln_ops::simd(
                #[inline(always)]
                || piece.iter_mut().for_each(|x| *x = x.max(ends.least).min(ends.most)),
            );
        });
    };
    if let Some(values) = y.try_storage_mut::<f32>() {
        cut(values);
        return capped(y, unit);
    }
    let shape = y.layout().shape().clone();
    let mut values = flex::floats(&y).into_owned();
    cut(&mut values);
    capped(flex::tensor(values, shape), unit)
}

/// The nearest numbers of sixteen bits, halves to even.
pub fn half_precision(x: &[f32]) -> Vec<f32> {
    let data = TensorData::new(x.to_vec(), [x.len()]);
    data.convert_dtype(DType::F16).convert_dtype(DType::F32).iter::<f32>().collect()
}
