//! The units whose precision is decided, and how each is computed: in floats, in floats rounded as if quantised, or in
//! whole numbers.

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

/// Whole-number weights of a unit with their scales, as they are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// 8 or 4.
    pub bits: u8,
    /// By rows of outputs.
    pub q: Vec<i8>,
    /// One a row.
    pub scales: Vec<f32>,
}

impl Weights {
    /// Rounds a unit's weights.
    pub fn of(unit: &Unit, bits: u8, calibrator: Calibrator) -> Self {
        let rows = unit.rows();
        let wide: Vec<f64> = unit.weight.iter().map(|&w| f64::from(w)).collect();
        let Rows { q, scales } = Rows::of(&wide, rows.max(1), bits.into(), calibrator);
        Self {
            bits,
            q: q.iter().map(|&q| q as i8).collect(),
            scales: scales.iter().map(|&s| s as f32).collect(),
        }
    }

    /// What the whole numbers stand for.
    pub fn values(&self) -> Vec<f32> {
        let width = (self.q.len() / self.scales.len().max(1)).max(1);
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

    fn width(&self) -> usize {
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

/// A unit's whole numbers: weights, and how its operands are rounded.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers {
    /// The weights, of 8 or 4 bits.
    pub weights: Weights,
    /// What calibration found.
    pub ranges: Ranges,
}

impl Numbers {
    fn at(&self) -> usize {
        usize::from(self.weights.bits == 4)
    }

    /// How the input is rounded.
    pub fn input(&self) -> Affine {
        self.ranges.input[self.at()].affine()
    }

    /// How the second operand of a product is rounded.
    pub fn second(&self) -> Option<Symmetric> {
        self.ranges.second.map(|second| second[self.at()])
    }

    /// Scale of the input times that of each row: what one step of a sum is worth.
    pub fn scales(&self) -> Vec<f32> {
        let input = self.input();
        self.weights.scales.iter().map(|scale| scale * input.scale).collect()
    }

    /// The bias in such steps; `None` where they are too many for 32 bits.
    pub fn bias_steps(&self, bias: &[f32]) -> Option<Vec<i32>> {
        let steps: Vec<f32> =
            bias.iter().zip(self.scales()).map(|(b, s)| (b / s).round_ties_even()).collect();
        let fits = steps.iter().all(|steps| steps.abs() <= MOST_BIAS);
        fits.then(|| steps.iter().map(|&steps| steps as i32).collect())
    }
}

impl Unit {
    /// Rows of the weights, each with a scale of its own.
    pub fn rows(&self) -> usize {
        if self.weight.is_empty() { 0 } else { self.shape[0] }
    }

    /// Bytes of the weights at so many bits, with scales and bias.
    pub fn bytes(&self, bits: u8) -> usize {
        let rows = self.rows();
        let width = self.weight.len() / rows.max(1);
        let extra = 4 * (rows + self.bias.len());
        match bits {
            16 => 2 * self.weight.len() + 4 * self.bias.len(),
            4 => rows * width.div_ceil(2) + extra,
            _ => self.weight.len() + extra,
        }
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
        /// Whether the bias is too large for that, and is added in floats.
        late_bias: bool,
        /// How the second operand of a product is rounded.
        second: Option<Symmetric>,
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
    /// Of a table: rows and their scales.
    Table(Weights),
    /// A product has none.
    None,
}

impl Ready {
    /// With float weights.
    pub fn float(unit: &Unit) -> Self {
        Self::Float(FloatWeights::of(unit, &unit.weight))
    }

    /// With float weights that fit sixteen bits.
    pub fn half(unit: &Unit) -> Self {
        Self::Float(FloatWeights::of(unit, &half_precision(&unit.weight)))
    }

    /// In floats that are rounded as the integers would be.
    pub fn rounded(unit: &Unit, numbers: &Numbers) -> Self {
        Self::Rounded {
            weights: FloatWeights::of(unit, &numbers.weights.values()),
            input: (unit.work != Work::Table).then(|| numbers.input()),
            second: numbers.second(),
        }
    }

    /// In whole numbers.
    pub fn whole(unit: &Unit, numbers: &Numbers) -> Self {
        let Numbers { weights, .. } = numbers;
        let steps = numbers.bias_steps(&unit.bias);
        let whole = match unit.work {
            Work::Linear => {
                let panels = Panels::from_rows(&weights.q, unit.shape[0], unit.shape[1]);
                WholeWeights::Panels(if weights.bits == 4 { panels.with_nibbles() } else { panels })
            }
            Work::Conv(window) => {
                WholeWeights::Conv(Box::new(Conv::new(unit.conv_shape(&window), &weights.q)))
            }
            Work::Table => WholeWeights::Table(weights.clone()),
            Work::Product => WholeWeights::None,
        };
        Self::Whole {
            weights: whole,
            input: numbers.input(),
            scales: numbers.scales(),
            late_bias: steps.is_none(),
            bias: steps.unwrap_or_else(|| vec![0; unit.bias.len()]),
            second: numbers.second(),
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
            Self::Whole { weights, input, scales, bias, late_bias, second: how } => {
                let ends = if *late_bias { Ends::OPEN } else { unit.ends };
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
                    WholeWeights::Table(rows) => look_up(rows, unit.shape[1], &x),
                    WholeWeights::None => {
                        let (second, how) = second.zip(*how).expect("a product has two operands with ranges");
                        whole_product(unit, &x, &second, input, &how)
                    }
                };
                if *late_bias { cut_off(with_bias(unit, &y), unit.ends) } else { y }
            }
        }
    }
}

/// Half of what 32 bits hold: the other half is for the products.
const MOST_BIAS: f32 = (1 << 30) as f32;

/// The result of a unit, of rows or of images, with its bias.
fn with_bias(unit: &Unit, y: &FlexTensor) -> FlexTensor {
    let shape = y.layout().shape().to_vec();
    let width = if matches!(unit.work, Work::Conv(_)) { shape[2] * shape[3] } else { 1 };
    let mut values = flex::floats(y).into_owned();
    for (at, part) in values.chunks_mut(width.max(1)).enumerate() {
        let bias = unit.bias[at % unit.bias.len()];
        part.iter_mut().for_each(|x| *x += bias);
    }
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
    fn of(unit: &Unit, weight: &[f32]) -> Self {
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
        Self { weight, bias: flex::tensor(unit.bias.clone(), [unit.bias.len()]) }
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
        cut_off(y, unit.ends)
    }
}

/// Cuts numbers off, in place where nothing else reads them.
fn cut_off(mut y: FlexTensor, ends: Ends) -> FlexTensor {
    if ends == Ends::OPEN {
        return y;
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
        return y;
    }
    let shape = y.layout().shape().clone();
    let mut values = flex::floats(&y).into_owned();
    cut(&mut values);
    flex::tensor(values, shape)
}

/// The nearest numbers of sixteen bits, halves to even.
pub fn half_precision(x: &[f32]) -> Vec<f32> {
    let data = TensorData::new(x.to_vec(), [x.len()]);
    data.convert_dtype(DType::F16).convert_dtype(DType::F32).iter::<f32>().collect()
}
