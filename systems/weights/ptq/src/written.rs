//! A quantised network with its rounding written out: as a graph of Burn's operations, which any part of Kiln takes, and as an
//! ONNX file with `QuantizeLinear` and `DequantizeLinear` around every unit, which other runtimes turn into integer kernels.
//!
//! ```text
//! x ── ÷ s ── round ── + z ── clamp ── to integer ── to float ── − z ── · s ──┐
//! q of 8 bits ── to float ── · one scale a row ──────────────────────────────unit ── clamp ── y
//! bias in 32 bits ── to float ── · s · one scale a row ───────────────────────┘
//! ```
//!
//! Units of 4 bits are written with 8-bit integers that use 16 values only, their operands clamped beforehand; ONNX files of operator
//! set 21 hold their weights in 4 bits. Weights in groups are rows that are put together after they have become floats.

use std::collections::BTreeMap;
use std::path::Path;

use burn::backend::ir::{
    ActivationOperationIr, Conv2dOpIr, Conv2dOptionsIr, FloatOperationIr, IrVisitorMut, ModuleOperationIr,
    TensorId, TensorIr, TensorStatus,
};
use burn::tensor::{DType, Shape, TensorData};
use kiln_compiler::Graph;
use kiln_compiler::builder::{Builder, Fit};
use kiln_core::{Error, PortKind, Result, write_atomic};
use kiln_ops::quantised::{Affine, Ends};

use crate::program::Program;
use crate::quantise::Side;
use crate::quantiser::{Symmetric, largest};
use crate::store::Quantised;
use crate::unit::{Numbers, Unit, Window, Work, step_sizes};

impl Quantised {
    /// The network for `batch` examples at once as a graph in which every rounding is an operation.
    ///
    /// # Errors
    /// When the network cannot take so many examples at once.
    pub fn to_graph(&self, batch: usize) -> Result<Graph> {
        if batch == 0 {
            return Err(Error::usage("a network for 0 examples at once").hint("it takes at least one"));
        }
        let program = self.program.with_batch(batch, &self.ready).ok_or_else(|| {
            Error::usage(format!("the network does not mean the same for {batch} examples at once"))
                .hint("write it for one")
        })?;
        let writer = Writer::of(&program, Vec::new(), |at| &self.numbers[at])?;
        let Builder { operations, constants, .. } = writer.builder;
        let (inputs, outputs) = (program.inputs.clone(), program.outputs.clone());
        let graph = Graph { kind: program.kind.clone(), inputs, outputs, operations, constants };
        graph.verify()?;
        Ok(graph)
    }

    /// Writes the network for `batch` examples at once as an ONNX file: with operators of set 20, or of set 21, which stores
    /// weights of 4 bits in as many.
    ///
    /// # Errors
    /// As [`to_graph`](Self::to_graph), when an operation between units has no like in ONNX, or the file cannot be written.
    pub fn to_onnx(&self, batch: usize, four_bits: bool, path: &Path) -> Result<()> {
        let graph = self.to_graph(batch)?;
        let bytes = if four_bits { graph.to_onnx_bytes_in_four_bits()? } else { graph.to_onnx_bytes()? };
        write_atomic(path, &bytes)
    }
}

/// Weights, or an operand, that a graph reads as a further input.
#[derive(Debug, Clone)]
pub(crate) struct Free {
    /// The unit's name.
    pub unit: String,
    /// Its weights; an operand where that is an activation, to which the input is added.
    pub side: Side,
    /// The input, as soon as the unit is written.
    pub tensor: Option<TensorIr>,
}

/// A graph in the making, and the tensors that it has so far.
pub(crate) struct Writer {
    pub builder: Builder,
    /// What is no constant.
    pub free: Vec<Free>,
    there: BTreeMap<TensorId, TensorIr>,
}

impl Writer {
    /// Writes a program whose units are rounded as `numbers` says.
    ///
    /// # Errors
    /// When a unit does not fit its operands.
    pub fn of<'a>(
        program: &Program,
        free: Vec<Free>,
        numbers: impl Fn(usize) -> &'a Numbers,
    ) -> Result<Self> {
        let (skeleton, order) = program.skeleton();
        let mut builder = Builder::new(program.tensors() as u64);
        builder.constants = skeleton.constants.clone();
        let tensor = |id, shape: &[usize], dtype| {
            let shape = Shape::from(shape.to_vec());
            (id, TensorIr { id, shape, status: TensorStatus::ReadOnly, dtype })
        };
        let inputs = program.inputs.iter().map(|input| {
            let dtype = if input.port.kind == PortKind::Float { DType::F32 } else { DType::I64 };
            tensor(input.tensor, &input.port.shape, dtype)
        });
        let constants = skeleton.constants.iter();
        let constants = constants.map(|(id, data)| tensor(*id, &data.shape().to_vec(), data.dtype()));
        let mut writer = Self { there: inputs.chain(constants).collect(), free, builder };
        let mut operations = skeleton.operations.into_iter();
        for place in order {
            match place {
                None => operations.next().into_iter().for_each(|operation| writer.plain(operation)),
                Some(at) => {
                    let unit = &program.units[at];
                    writer.unit(unit, numbers(at)).map_err(|found| {
                        Error::work(format!("unit \"{}\" cannot be written out: {found}", unit.name))
                    })?;
                }
            }
        }
        Ok(writer)
    }

    /// A tensor that has been written.
    ///
    /// # Errors
    /// When there is none of this number.
    pub fn operand(&self, id: TensorId) -> Fit<TensorIr> {
        self.there.get(&id).cloned().ok_or_else(|| format!("tensor {} is not there", id.value()))
    }

    /// The input that takes the place of a unit's weights or is added to its operand, where that is free.
    fn freed(&mut self, unit: &Unit, side: Side, shape: &[usize]) -> Option<TensorIr> {
        let free = self.free.iter_mut().find(|free| free.unit == unit.name && free.side == side)?;
        Some(free.tensor.insert(self.builder.provided(shape, DType::F32)).clone())
    }

    fn moved(&mut self, unit: &Unit, side: Side, x: TensorIr) -> Fit<TensorIr> {
        match self.freed(unit, side, &x.shape.to_vec()) {
            Some(by) => self.builder.add(&x, &by),
            None => Ok(x),
        }
    }

    /// An operation between units, as it is.
    fn plain(&mut self, operation: burn::backend::ir::OperationIr) {
        for out in operation.outputs() {
            self.there.insert(out.id, TensorIr { status: TensorStatus::ReadOnly, ..out.clone() });
        }
        self.builder.operations.push(operation);
    }

    /// A unit with its roundings.
    fn unit(&mut self, unit: &Unit, numbers: &Numbers) -> Fit<()> {
        let first = self.builder.operations.len();
        let x = self.operand(unit.input)?;
        let mut x = self.moved(unit, Side::Input, x)?;
        if let Some(input) = &numbers.input {
            x = self.rounded(&x, &input.affine())?;
        }
        let y = match unit.work {
            Work::Conv(window) => self.conv(unit, &window, x, numbers)?,
            Work::Linear => {
                let weight = self.weight(unit, numbers)?;
                let y = self.rows_times(&x, &weight)?;
                let bias = self.bias(unit, numbers)?;
                self.builder.add(&y, &bias)?
            }
            Work::Product => {
                let second = self.operand(unit.second.ok_or("a product has two operands")?)?;
                let mut second = self.moved(unit, Side::Weight, second)?;
                if let Some(how) = &numbers.second {
                    second = self.rounded_evenly(&second, how)?;
                }
                self.builder.matmul(&x, &second)?
            }
            Work::Table => {
                let rows = self.weight(unit, numbers)?;
                self.builder.select(&rows, 0, &x)?
            }
        };
        let y = self.cut_off(&y, unit.ends)?;
        let y = self.capped(y, unit)?;
        // What comes after knows the result by the number that it had.
        let mut rename = Rename { from: y.id, to: unit.output };
        self.builder.operations[first..].iter_mut().for_each(|operation| operation.visit_mut(&mut rename));
        self.there.insert(unit.output, TensorIr { id: unit.output, ..y });
        Ok(())
    }

    /// `x [.., inner]` times `weight [inner, outputs]`: as one matrix where the weight is free, whose gradient is then one too.
    fn rows_times(&mut self, x: &TensorIr, weight: &TensorIr) -> Fit<TensorIr> {
        let rank = x.shape.rank();
        if rank == 2 || self.free.is_empty() {
            return self.builder.matmul(x, weight);
        }
        let mut shape = x.shape.to_vec();
        let rows = shape[..rank - 1].iter().product();
        let flat = self.builder.reshape(x, &[rows, shape[rank - 1]])?;
        let y = self.builder.matmul(&flat, weight)?;
        shape[rank - 1] = weight.shape[1];
        self.builder.reshape(&y, &shape)
    }

    fn conv(&mut self, unit: &Unit, window: &Window, x: TensorIr, numbers: &Numbers) -> Fit<TensorIr> {
        let (weight, bias) = (self.weight(unit, numbers)?, self.bias(unit, numbers)?);
        let options = Conv2dOptionsIr {
            stride: window.stride,
            padding: window.padding.map(|side| (side, side)),
            dilation: window.dilation,
            groups: window.groups,
        };
        self.builder
            .module(|id| ModuleOperationIr::Conv2d(Conv2dOpIr::create(x, weight, Some(bias), options, || id)))
    }

    /// `clamp(round(x / scale) + zero, 0, most)` and back.
    fn rounded(&mut self, x: &TensorIr, affine: &Affine) -> Fit<TensorIr> {
        let (scale, zero) = (f64::from(affine.scale), f64::from(affine.zero));
        let mut x = x.clone();
        if affine.most < u8::MAX {
            x = self.builder.clamp(&x, -zero * scale, (f64::from(affine.most) - zero) * scale)?;
        }
        self.round_trip(&x, affine.scale, affine.zero, (0.0, 255.0))
    }

    /// `clamp(round(x / scale), -Q, Q)` and back.
    fn rounded_evenly(&mut self, x: &TensorIr, how: &Symmetric) -> Fit<TensorIr> {
        let most = f64::from(largest(how.bits)) * how.scale;
        let x = self.builder.clamp(x, -most, most)?;
        self.round_trip(&x, how.scale as f32, 0, (-128.0, 127.0))
    }

    fn round_trip(&mut self, x: &TensorIr, scale: f32, zero: u8, (least, most): (f64, f64)) -> Fit<TensorIr> {
        let one = |value: f32| TensorData::new(vec![value], vec![1; x.shape.rank()]);
        let scale = self.builder.constant(one(scale));
        let zero = (zero != 0).then(|| self.builder.constant(one(zero.into())));
        let steps = self.builder.div(x, &scale)?;
        let mut steps = self.builder.float(&steps, FloatOperationIr::Round)?;
        if let Some(zero) = &zero {
            steps = self.builder.add(&steps, zero)?;
        }
        let steps = self.builder.clamp(&steps, least, most)?;
        let whole = self.builder.cast(&steps, DType::I64)?;
        let mut steps = self.builder.cast(&whole, DType::F32)?;
        if let Some(zero) = &zero {
            steps = self.builder.sub(&steps, zero)?;
        }
        self.builder.mul(&steps, &scale)
    }

    /// Weights as the operation reads them: of a convolution and a table in rows of outputs, of a matrix in columns.
    fn weight(&mut self, unit: &Unit, numbers: &Numbers) -> Fit<TensorIr> {
        let linear = unit.work == Work::Linear;
        if let Some(free) = self.freed(unit, Side::Weight, &unit.shape) {
            return if linear { self.builder.transpose(&free) } else { Ok(free) };
        }
        let (rows, width) = (unit.shape[0], unit.weight.len() / unit.shape[0].max(1));
        let shape = if linear { vec![width, rows] } else { unit.shape.clone() };
        let place = |at: usize| if linear { at % rows * width + at / rows } else { at };
        let Some(weights) = &numbers.weights else {
            let values = (0..unit.weight.len()).map(|at| unit.weight[place(at)]).collect::<Vec<f32>>();
            return Ok(self.builder.constant(TensorData::new(values, shape)));
        };
        if weights.scales.len() > rows {
            // Every group is a row with a scale of its own, until the rows are put together again.
            let q = TensorData::new(weights.q.clone(), [weights.scales.len(), weights.width()]);
            let groups = self.stored(q, &weights.scales, 0)?;
            let whole = self.builder.reshape(&groups, &[rows, width])?;
            return self.builder.transpose(&whole);
        }
        let q = (0..weights.q.len()).map(|at| weights.q[place(at)]).collect::<Vec<i8>>();
        let axis = usize::from(linear);
        self.stored(TensorData::new(q, shape), &weights.scales, axis)
    }

    /// The bias: in the steps in which the kernels add it, or in floats where there are none or too many.
    fn bias(&mut self, unit: &Unit, numbers: &Numbers) -> Fit<TensorIr> {
        let bias = numbers.bias(unit);
        let steps = numbers.whole().and_then(|(weights, input)| {
            let scales = step_sizes(weights, &input);
            Some((Numbers::bias_steps(&bias, &scales)?, scales))
        });
        match steps {
            Some((steps, scales)) => {
                let count = steps.len();
                self.stored(TensorData::new(steps, [count]), &scales, 0)
            }
            None => {
                let count = bias.len();
                Ok(self.builder.constant(TensorData::new(bias, [count])))
            }
        }
    }

    /// Whole numbers with a scale for every place along an axis.
    fn stored(&mut self, q: TensorData, scales: &[f32], axis: usize) -> Fit<TensorIr> {
        let mut shape = vec![1; q.shape().to_vec().len()];
        shape[axis] = scales.len();
        let q = self.builder.constant(q);
        let scales = self.builder.constant(TensorData::new(scales.to_vec(), shape));
        let q = self.builder.cast(&q, DType::F32)?;
        self.builder.mul(&q, &scales)
    }

    /// `min(y, t) = y - max(y - t, 0)` with an end `t` for every channel.
    fn capped(&mut self, y: TensorIr, unit: &Unit) -> Fit<TensorIr> {
        if unit.tops.is_empty() {
            return Ok(y);
        }
        let mut shape = vec![1; y.shape.rank()];
        let channel = if matches!(unit.work, Work::Conv(_)) { 1 } else { shape.len() - 1 };
        shape[channel] = unit.tops.len();
        let tops = self.builder.constant(TensorData::new(unit.tops.clone(), shape));
        let above = self.builder.sub(&y, &tops)?;
        let above = self.builder.activation(&above, ActivationOperationIr::Relu)?;
        self.builder.sub(&y, &above)
    }

    fn cut_off(&mut self, y: &TensorIr, ends: Ends) -> Fit<TensorIr> {
        match (ends.least, ends.most) {
            (f32::NEG_INFINITY, f32::INFINITY) => Ok(y.clone()),
            (0.0, f32::INFINITY) => self.builder.activation(y, ActivationOperationIr::Relu),
            (least, most) => self.builder.clamp(y, least.max(f32::MIN).into(), most.min(f32::MAX).into()),
        }
    }
}

/// Gives a tensor another number.
struct Rename {
    from: TensorId,
    to: TensorId,
}

impl IrVisitorMut for Rename {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if tensor.id == self.from {
            tensor.id = self.to;
        }
    }
}
