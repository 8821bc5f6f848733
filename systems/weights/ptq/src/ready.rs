//! How a unit is computed: in floats, in floats rounded as if quantised, or in whole numbers; from floats or bytes, to floats or
//! bytes.

use std::borrow::Cow;
use std::sync::Arc;

use burn::tensor::{DType, TensorData};
use burn_flex::FlexTensor;
use kiln_ops::flex;
use kiln_ops::quantised::{
    Affine, Bytes, Conv, Ends, Panels, Product, Requantise, rounded as rounded_to_whole,
};
use kiln_ops::{conv2d, linear, matmul};
use rayon::prelude::*;

use crate::grouped::Grouped;
use crate::program::{of_rank, primitive};
use crate::quantiser::Symmetric;
use crate::unit::{Numbers, Unit, Weights, Work, channel_width, half_precision, step_sizes};

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
        /// How the result is rounded at once, where only units that round it so read it: bytes pass between them.
        to: Option<Affine>,
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
                to: None,
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
            to: None,
        }
    }

    /// How it rounds its input, where it can read bytes.
    pub fn reads(&self) -> Option<Affine> {
        match self {
            Self::Whole { weights: WholeWeights::Panels(_) | WholeWeights::Conv(_), input, .. } => {
                Some(*input)
            }
            _ => None,
        }
    }

    /// With a result that is rounded at once, where it can be.
    pub fn rounding(mut self, unit: &Unit, how: Affine) -> Self {
        if let Self::Whole {
            weights: WholeWeights::Panels(_) | WholeWeights::Conv(_),
            late_bias: None,
            to,
            ..
        } = &mut self
            && unit.tops.is_empty()
        {
            *to = Some(how);
        }
        self
    }

    /// With a result in floats.
    pub fn apart(mut self) -> Self {
        if let Self::Whole { to, .. } = &mut self {
            *to = None;
        }
        self
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
            Self::Whole { weights, input, scales, bias, late_bias, second: how, to } => {
                let ends = if late_bias.is_some() { Ends::OPEN } else { unit.ends };
                let requantise = Requantise { scales, bias, ends };
                let mut shape = x.layout().shape().to_vec();
                let y = match weights {
                    WholeWeights::Panels(panels) => {
                        let rows = Bytes::unsigned(&bytes_of(&x, input), panels.inner(), input.zero);
                        let product = Product::new(&rows, panels);
                        if let Some(last) = shape.last_mut() {
                            *last = panels.columns();
                        }
                        match to {
                            Some(to) => return of_bytes(product.bytes(&requantise, to), shape),
                            None => flex::tensor(product.floats(&requantise), shape),
                        }
                    }
                    WholeWeights::Conv(conv) => {
                        let x = bytes_of(&x, input);
                        let [height, width] = conv.shape().output();
                        let shape = vec![shape[0], unit.shape[0], height, width];
                        match to {
                            Some(to) => return of_bytes(conv.bytes(&x, input.zero, &requantise, to), shape),
                            None => flex::tensor(conv.floats(&x, input.zero, &requantise), shape),
                        }
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

/// A unit's input as bytes: as the unit before has made them, or rounded.
fn bytes_of<'a>(x: &'a FlexTensor, affine: &Affine) -> Cow<'a, [u8]> {
    match x.dtype() {
        // No unit makes anything but whole tensors.
        DType::U8 => Cow::Borrowed(x.storage::<u8>()),
        _ => Cow::Owned(quantise(&flex::floats(x), affine)),
    }
}

fn of_bytes(bytes: Vec<u8>, shape: Vec<usize>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(bytes, shape))
}

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
            let q: Vec<i8> = kiln_ops::simd(
                #[inline(always)]
                || second.iter().map(|&v| rounded_to_whole((v * inverse).clamp(-most, most)) as i8).collect(),
            );
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
