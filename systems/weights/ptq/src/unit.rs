//! The units whose precision is decided, and how their weights and operands are rounded.

use std::sync::Arc;

use burn::backend::ir::TensorId;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, TensorData};
use kiln_ops::quantised::{Affine, ConvShape, Ends, pack_nibbles, unpack_nibbles};
use serde::{Deserialize, Serialize};

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

    pub(crate) fn options(&self, window: &Window) -> ConvOptions<2> {
        ConvOptions::new_with_padding(
            window.stride,
            window.padding.map(|side| (side, side)),
            window.dilation,
            window.groups,
        )
    }

    pub(crate) fn conv_shape(&self, window: &Window) -> ConvShape {
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

/// Half of what 32 bits hold: the other half is for the products.
const MOST_BIAS: f32 = (1 << 30) as f32;

/// How many neighbours of a unit's result, of rows or of images, belong to the same channel.
pub fn channel_width(unit: &Unit, shape: &[usize]) -> usize {
    if matches!(unit.work, Work::Conv(_)) { (shape[2] * shape[3]).max(1) } else { 1 }
}

/// The nearest numbers of sixteen bits, halves to even.
pub fn half_precision(x: &[f32]) -> Vec<f32> {
    let data = TensorData::new(x.to_vec(), [x.len()]);
    data.convert_dtype(DType::F16).convert_dtype(DType::F32).iter::<f32>().collect()
}
