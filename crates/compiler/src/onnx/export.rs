//! From a graph to a file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use burn::backend::ir::{
    ActivationOperationIr as Activation, AttentionOpIr, BaseOperationIr as Base, BinaryOpIr,
    BoolOperationIr as Bool, FloatOperationIr as Float, IntOperationIr as Int, ModuleOperationIr as Module,
    NumericOperationIr as Numeric, OperationIr, PadModeIr, ReduceDimOpIr, ScalarIr, ScalarOpIr, TensorId,
    TensorIr, UnaryOpIr,
};
use burn::tensor::{DType, Slice, TensorData};
use kiln_core::{Error, PortKind, Result, write_atomic};
use prost::Message;

use super::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto, attribute, data_type,
};
use super::quantised::{self, Quantised};
use crate::graph::name_and_attributes;
use crate::{Boundary, Graph, quiet};

/// A set of operators, and the version of the file format that came with it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Standard {
    operators: i64,
    format: i64,
}

/// The first with `Gelu`.
const USUAL: Standard = Standard { operators: 20, format: 9 };

/// The first with weights of 4 bits.
const FOUR_BITS: Standard = Standard { operators: 21, format: 10 };

impl Graph {
    /// Writes the graph as an ONNX file with operators of set 20. Inputs and outputs are called as their ports.
    ///
    /// # Errors
    /// When the graph has operations that ONNX has not (all are named), or the file cannot be written.
    pub fn to_onnx(&self, path: &Path) -> Result<()> {
        write_atomic(path, &self.to_onnx_bytes()?)
    }

    /// The bytes of such a file.
    ///
    /// # Errors
    /// When the graph has operations that ONNX has not.
    pub fn to_onnx_bytes(&self) -> Result<Vec<u8>> {
        self.write_onnx(USUAL)
    }

    /// The bytes of a file with operators of set 21, in which quantised weights that 4 bits hold take no more.
    ///
    /// # Errors
    /// As [`to_onnx_bytes`](Self::to_onnx_bytes).
    pub fn to_onnx_bytes_in_four_bits(&self) -> Result<Vec<u8>> {
        self.write_onnx(FOUR_BITS)
    }

    fn write_onnx(&self, standard: Standard) -> Result<Vec<u8>> {
        self.verify()?;
        let mut writer = Writer::new(self, standard);
        let mut missing = BTreeMap::<String, Vec<usize>>::new();
        let (quantised, replaced) = quantised::find(self);
        for (at, operation) in self.operations.iter().enumerate().filter(|(at, _)| !replaced.contains(at)) {
            // A damaged graph may have operands that no operation takes.
            let written = quiet::catch_panic(|| match quantised.get(&at) {
                Some(quantised) => writer.quantised(quantised, operation),
                None => writer.write(operation),
            });
            let written = written.map_err(|found| {
                Error::work(format!(
                    "operation {at} of the {} graph does not fit its operands: {found}",
                    self.kind
                ))
            })?;
            if !written {
                missing.entry(name_and_attributes(operation)?.0).or_default().push(at);
            }
        }
        if !missing.is_empty() {
            let told = missing.into_iter().map(|(name, places)| format!("{name} (operations {places:?})"));
            let told = told.collect::<Vec<_>>().join("; ");
            return Err(Error::work(format!("the {} graph cannot be written as ONNX: {told}", self.kind))
                .hint("ONNX has no such operations; `kiln graph show` prints their places"));
        }
        let graph = writer.finish()?;
        if graph.encoded_len() >= 2 << 30 {
            return Err(Error::work(format!(
                "the {} graph is larger than the 2 GiB of an ONNX file",
                self.kind
            )));
        }
        let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: standard.operators }];
        let model = ModelProto {
            ir_version: standard.format,
            producer_name: "kiln".into(),
            graph: Some(graph),
            opset_import,
        };
        Ok(model.encode_to_vec())
    }
}

struct Writer<'a> {
    graph: &'a Graph,
    names: HashMap<TensorId, String>,
    nodes: Vec<NodeProto>,
    /// Numbers that operations bring along, by their name.
    numbers: BTreeMap<String, TensorData>,
    temporaries: usize,
    standard: Standard,
    /// Names of the constants that are written with 4 bits.
    halves: BTreeSet<String>,
}

impl<'a> Writer<'a> {
    fn new(graph: &'a Graph, standard: Standard) -> Self {
        let names = graph.inputs.iter().map(|input| (input.tensor, input.port.name.clone())).collect();
        let (numbers, halves) = (BTreeMap::new(), BTreeSet::new());
        Self { graph, names, nodes: Vec::new(), numbers, temporaries: 0, standard, halves }
    }

    /// Inputs are called as their ports, everything else by its number.
    fn name(&self, id: TensorId) -> String {
        self.names.get(&id).cloned().unwrap_or_else(|| format!("%{}", id.value()))
    }

    /// Adds a node; the name of its result.
    fn node<const N: usize>(
        &mut self,
        operator: &str,
        inputs: [&str; N],
        attributes: Vec<AttributeProto>,
    ) -> String {
        self.node_of(operator, inputs.map(str::to_string).to_vec(), attributes)
    }

    fn node_of(&mut self, operator: &str, inputs: Vec<String>, attributes: Vec<AttributeProto>) -> String {
        let result = format!("%step{}", self.temporaries);
        self.temporaries += 1;
        self.nodes.push(NodeProto {
            input: inputs,
            output: vec![result.clone()],
            name: String::new(),
            op_type: operator.into(),
            attribute: attributes,
            domain: String::new(),
        });
        result
    }

    /// A number of a tensor's type.
    fn number(&mut self, value: ScalarIr, dtype: DType) -> String {
        let number: f64 = value.elem();
        let scalar: [usize; 0] = [];
        let data = match dtype {
            DType::Bool(_) => TensorData::new(vec![number != 0.0], scalar),
            dtype if dtype.is_float() => TensorData::new(vec![number], scalar).convert_dtype(dtype),
            dtype => TensorData::new(vec![value.elem::<i64>()], scalar).convert_dtype(dtype),
        };
        self.kept(format!("%{}_{number:?}", type_name(dtype)), data)
    }

    fn float(&mut self, value: f64) -> String {
        self.number(ScalarIr::Float(value), DType::F32)
    }

    fn ints(&mut self, values: Vec<i64>) -> String {
        let words: Vec<String> = values.iter().map(i64::to_string).collect();
        let len = values.len();
        self.kept(format!("%[{}]", words.join(",")), TensorData::new(values, [len]))
    }

    fn kept(&mut self, name: String, data: TensorData) -> String {
        self.numbers.entry(name.clone()).or_insert(data);
        name
    }

    fn sizes(&mut self, sizes: &[usize]) -> String {
        self.ints(sizes.iter().map(|&size| size as i64).collect())
    }

    /// Writes an operation; `false` where ONNX has nothing like it.
    fn write(&mut self, operation: &OperationIr) -> bool {
        if matches!(operation, OperationIr::Drop(_)) {
            return true;
        }
        let written = match operation {
            OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op) => {
                self.base(op)
            }
            OperationIr::NumericFloat(_, Numeric::MaxDimWithIndices(op))
            | OperationIr::NumericInt(_, Numeric::MaxDimWithIndices(op)) => {
                self.reduce("ReduceMax", &op.tensor, &[op.dim]);
                self.called(&op.out);
                self.arg("ArgMax", &op.tensor, op.dim);
                return self.called(&op.out_indices);
            }
            OperationIr::NumericFloat(_, Numeric::MinDimWithIndices(op))
            | OperationIr::NumericInt(_, Numeric::MinDimWithIndices(op)) => {
                self.reduce("ReduceMin", &op.tensor, &[op.dim]);
                self.called(&op.out);
                self.arg("ArgMin", &op.tensor, op.dim);
                return self.called(&op.out_indices);
            }
            OperationIr::NumericFloat(_, op) | OperationIr::NumericInt(_, op) => self.numeric(op),
            OperationIr::Float(_, op) => self.floating(op),
            OperationIr::Int(Int::IntoFloat(op)) => self.cast(&op.input, op.out.dtype),
            OperationIr::Bool(op) => match op {
                Bool::IntoFloat(op) | Bool::IntoInt(op) => self.cast(&op.input, op.out.dtype),
                Bool::Not(op) => self.unary("Not", op),
                Bool::And(op) => self.binary("And", op),
                Bool::Or(op) => self.binary("Or", op),
                Bool::Xor(op) => self.binary("Xor", op),
            },
            OperationIr::Activation(op) => self.activation(op),
            OperationIr::Module(op) => self.module(op),
            _ => None,
        };
        let out = operation.outputs().next();
        written.is_some() && out.is_some_and(|out| self.called(out))
    }

    /// `QuantizeLinear` and `DequantizeLinear` in the place of their elementary operations, which `last` ends.
    fn quantised(&mut self, found: &Quantised<'_>, last: &OperationIr) -> bool {
        let count = found.scale.len();
        let shape = if found.axis.is_some() { vec![count] } else { vec![] };
        let name = format!("%quantised{}", self.temporaries);
        let scale = self.kept(format!("{name}_scale"), TensorData::new(found.scale.clone(), shape.clone()));
        let mut how = vec![scale];
        let halves = self.standard == FOUR_BITS && self.fits_four_bits(found);
        if halves {
            self.halves.insert(self.name(found.x.id));
        }
        // The standard knows no zero point of 32 bits; without one it is 0.
        if found.dtype != DType::I32 && !halves {
            let zero = TensorData::new(found.zero.clone(), shape).convert_dtype(found.dtype);
            how.push(self.kept(format!("{name}_zero"), zero));
        }
        let axis: Vec<_> = found.axis.map(|axis| int("axis", axis as i64)).into_iter().collect();
        let with = |x: String| std::iter::once(x).chain(how.iter().cloned()).collect();
        let mut x = self.name(found.x.id);
        if found.rounds {
            x = self.node_of("QuantizeLinear", with(x), axis.clone());
        }
        self.node_of("DequantizeLinear", with(x), axis);
        last.outputs().next().is_some_and(|out| self.called(out))
    }

    /// Whether these are stored integers around 0 that 4 bits hold.
    fn fits_four_bits(&self, found: &Quantised<'_>) -> bool {
        let small = |data: &TensorData| data.iter::<i64>().all(|q| (-8..8).contains(&q));
        let stored = || self.graph.constants.get(&found.x.id).is_some_and(small);
        !found.rounds && found.dtype == DType::I8 && found.zero.iter().all(|&zero| zero == 0) && stored()
    }

    /// Lets the last node's result have the name of a tensor.
    fn called(&mut self, tensor: &TensorIr) -> bool {
        let name = self.name(tensor.id);
        self.nodes.last_mut().is_some_and(|node| {
            node.output[0] = name;
            true
        })
    }

    fn unary(&mut self, operator: &str, op: &UnaryOpIr) -> Option<String> {
        let x = self.name(op.input.id);
        Some(self.node(operator, [&x], vec![]))
    }

    fn binary(&mut self, operator: &str, op: &BinaryOpIr) -> Option<String> {
        let (x, y) = (self.name(op.lhs.id), self.name(op.rhs.id));
        Some(self.node(operator, [&x, &y], vec![]))
    }

    fn scalar(&mut self, operator: &str, op: &ScalarOpIr) -> Option<String> {
        let (x, y) = (self.name(op.lhs.id), self.number(op.rhs, op.lhs.dtype));
        Some(self.node(operator, [&x, &y], vec![]))
    }

    fn cast(&mut self, x: &TensorIr, to: DType) -> Option<String> {
        let (x, to) = (self.name(x.id), file_type(to)?);
        Some(self.node("Cast", [&x], vec![int("to", to.into())]))
    }

    fn reshape(&mut self, x: &str, shape: &[usize]) -> String {
        let shape = self.sizes(shape);
        self.node("Reshape", [x, &shape], vec![int("allowzero", 1)])
    }

    fn transpose(&mut self, x: &str, axes: &[usize]) -> String {
        self.node("Transpose", [x], vec![ints("perm", axes.iter().map(|&axis| axis as i64))])
    }

    fn reduce(&mut self, operator: &str, x: &TensorIr, axes: &[usize]) -> String {
        let (x, axes) = (self.name(x.id), self.sizes(axes));
        self.node(operator, [&x, &axes], vec![int("keepdims", 1)])
    }

    /// Over all axes, to one element.
    fn reduce_all(&mut self, operator: &str, x: &TensorIr) -> Option<String> {
        let axes: Vec<usize> = (0..x.shape.rank()).collect();
        let reduced = self.reduce(operator, x, &axes);
        Some(self.reshape(&reduced, &[1]))
    }

    fn reduce_dim(&mut self, operator: &str, op: &ReduceDimOpIr) -> Option<String> {
        (op.accumulator_len == 1).then(|| self.reduce(operator, &op.input, &[op.axis]))
    }

    fn arg(&mut self, operator: &str, x: &TensorIr, axis: usize) -> String {
        let x = self.name(x.id);
        self.node(operator, [&x], vec![int("axis", axis as i64), int("keepdims", 1)])
    }

    /// One value everywhere.
    fn filled(&mut self, value: ScalarIr, out: &TensorIr) -> Option<String> {
        let (number, shape) = (self.number(value, out.dtype), self.sizes(&out.shape));
        Some(self.node("Expand", [&number, &shape], vec![]))
    }

    fn base(&mut self, op: &Base) -> Option<String> {
        Some(match op {
            Base::Reshape(op) => {
                let x = self.name(op.input.id);
                self.reshape(&x, &op.out.shape)
            }
            Base::SwapDims(op) => {
                let mut axes: Vec<usize> = (0..op.input.shape.rank()).collect();
                axes.swap(op.dim1, op.dim2);
                let x = self.name(op.input.id);
                self.transpose(&x, &axes)
            }
            Base::Permute(op) => {
                let x = self.name(op.input.id);
                self.transpose(&x, &op.axes)
            }
            Base::Flip(op) => {
                let reversed: Vec<(usize, [i64; 3])> =
                    op.axes.iter().map(|&axis| (axis, [-1, i64::MIN, -1])).collect();
                self.slice(&op.input, &reversed)
            }
            Base::Expand(op) => {
                let (x, shape) = (self.name(op.input.id), self.sizes(&op.out.shape));
                self.node("Expand", [&x, &shape], vec![])
            }
            Base::Slice(op) => {
                let ranges = op
                    .ranges
                    .iter()
                    .enumerate()
                    .map(|(axis, range)| (axis, start_end_step(range, op.tensor.shape[axis] as i64)));
                let ranges: Vec<_> = ranges.collect();
                self.slice(&op.tensor, &ranges)
            }
            Base::Select(op) => {
                let (x, indices) = (self.name(op.tensor.id), self.name(op.indices.id));
                self.node("Gather", [&x, &indices], vec![int("axis", op.dim as i64)])
            }
            Base::Gather(op) => {
                let (x, indices) = (self.name(op.tensor.id), self.name(op.indices.id));
                self.node("GatherElements", [&x, &indices], vec![int("axis", op.dim as i64)])
            }
            Base::MaskWhere(op) => {
                let [x, mask, value] = [&op.tensor, &op.mask, &op.value].map(|tensor| self.name(tensor.id));
                self.node("Where", [&mask, &value, &x], vec![])
            }
            Base::MaskFill(op) => {
                let (x, mask) = (self.name(op.tensor.id), self.name(op.mask.id));
                let value = self.number(op.value, op.tensor.dtype);
                self.node("Where", [&mask, &value, &x], vec![])
            }
            Base::Equal(op) => self.binary("Equal", op)?,
            Base::EqualElem(op) => self.scalar("Equal", op)?,
            Base::NotEqual(op) => {
                let equal = self.binary("Equal", op)?;
                self.node("Not", [&equal], vec![])
            }
            Base::NotEqualElem(op) => {
                let equal = self.scalar("Equal", op)?;
                self.node("Not", [&equal], vec![])
            }
            Base::RepeatDim(op) => {
                let mut times = vec![1; op.tensor.shape.rank()];
                times[op.dim] = op.times;
                let (x, times) = (self.name(op.tensor.id), self.sizes(&times));
                self.node("Tile", [&x, &times], vec![])
            }
            Base::Cat(op) => {
                let names = op.tensors.iter().map(|tensor| self.name(tensor.id)).collect();
                self.node_of("Concat", names, vec![int("axis", op.dim as i64)])
            }
            Base::Cast(op) => self.cast(&op.input, op.out.dtype)?,
            Base::Ones(op) => self.filled(ScalarIr::Int(1), &op.out)?,
            Base::Zeros(op) | Base::Empty(op) => self.filled(ScalarIr::Int(0), &op.out)?,
            _ => return None,
        })
    }

    /// Start, end and step of some axes.
    fn slice(&mut self, x: &TensorIr, ranges: &[(usize, [i64; 3])]) -> String {
        let part = |at: usize| ranges.iter().map(|(_, range)| range[at]).collect::<Vec<i64>>();
        let x = self.name(x.id);
        let [starts, ends, steps] = [0, 1, 2].map(|at| self.ints(part(at)));
        let axes = self.ints(ranges.iter().map(|(axis, _)| *axis as i64).collect());
        self.node("Slice", [&x, &starts, &ends, &axes, &steps], vec![])
    }

    fn numeric(&mut self, op: &Numeric) -> Option<String> {
        match op {
            Numeric::Add(op) => self.binary("Add", op),
            Numeric::AddScalar(op) => self.scalar("Add", op),
            Numeric::Sub(op) => self.binary("Sub", op),
            Numeric::SubScalar(op) => self.scalar("Sub", op),
            Numeric::Mul(op) => self.binary("Mul", op),
            Numeric::MulScalar(op) => self.scalar("Mul", op),
            Numeric::Div(op) => self.binary("Div", op),
            Numeric::DivScalar(op) => self.scalar("Div", op),
            // The remainder of floats has the dividend's sign in ONNX, the divisor's here.
            Numeric::Rem(op) if !op.lhs.dtype.is_float() => self.binary("Mod", op),
            Numeric::RemScalar(op) if !op.lhs.dtype.is_float() => self.scalar("Mod", op),
            Numeric::Powi(op) => self.binary("Pow", op),
            Numeric::PowiScalar(op) => self.scalar("Pow", op),
            Numeric::Abs(op) => self.unary("Abs", op),
            Numeric::Neg(op) => self.unary("Neg", op),
            Numeric::Sign(op) => self.unary("Sign", op),
            Numeric::Full(op) => self.filled(op.value, &op.out),
            Numeric::Mean(op) => self.reduce_all("ReduceMean", &op.input),
            Numeric::Sum(op) => self.reduce_all("ReduceSum", &op.input),
            Numeric::Prod(op) => self.reduce_all("ReduceProd", &op.input),
            Numeric::Max(op) => self.reduce_all("ReduceMax", &op.input),
            Numeric::Min(op) => self.reduce_all("ReduceMin", &op.input),
            Numeric::MeanDim(op) => self.reduce_dim("ReduceMean", op),
            Numeric::SumDim(op) => self.reduce_dim("ReduceSum", op),
            Numeric::ProdDim(op) => self.reduce_dim("ReduceProd", op),
            Numeric::MaxDim(op) => self.reduce_dim("ReduceMax", op),
            Numeric::MinDim(op) => self.reduce_dim("ReduceMin", op),
            Numeric::SumDims(op) => Some(self.reduce("ReduceSum", &op.input, &op.axes)),
            Numeric::ArgMax(op) => Some(self.arg("ArgMax", &op.input, op.axis)),
            Numeric::ArgMin(op) => Some(self.arg("ArgMin", &op.input, op.axis)),
            Numeric::Greater(op) => self.binary("Greater", op),
            Numeric::GreaterElem(op) => self.scalar("Greater", op),
            Numeric::GreaterEqual(op) => self.binary("GreaterOrEqual", op),
            Numeric::GreaterEqualElem(op) => self.scalar("GreaterOrEqual", op),
            Numeric::Lower(op) => self.binary("Less", op),
            Numeric::LowerElem(op) => self.scalar("Less", op),
            Numeric::LowerEqual(op) => self.binary("LessOrEqual", op),
            Numeric::LowerEqualElem(op) => self.scalar("LessOrEqual", op),
            Numeric::Clamp(op) => {
                let x = self.name(op.tensor.id);
                let [min, max] = [op.min, op.max].map(|bound| self.number(bound, op.tensor.dtype));
                Some(self.node("Clip", [&x, &min, &max], vec![]))
            }
            Numeric::ClampMin(op) => self.scalar("Max", op),
            Numeric::ClampMax(op) => self.scalar("Min", op),
            Numeric::CumSum(op) => {
                let (x, axis) = (self.name(op.input.id), self.ints(vec![op.axis as i64]));
                Some(self.node("CumSum", [&x, &axis], vec![]))
            }
            Numeric::Pad(op) => {
                let x = self.name(op.input.id);
                let (before, after): (Vec<i64>, Vec<i64>) =
                    op.padding.iter().map(|&(before, after)| (before as i64, after as i64)).unzip();
                let pads = self.ints([before, after].concat());
                Some(match op.mode {
                    PadModeIr::Constant(value) => {
                        let value = self.number(value, op.input.dtype);
                        self.node("Pad", [&x, &pads, &value], vec![])
                    }
                    PadModeIr::Reflect => self.node("Pad", [&x, &pads], vec![text("mode", "reflect")]),
                    PadModeIr::Edge => self.node("Pad", [&x, &pads], vec![text("mode", "edge")]),
                })
            }
            _ => None,
        }
    }

    fn floating(&mut self, op: &Float) -> Option<String> {
        match op {
            Float::Exp(op) => self.unary("Exp", op),
            Float::Log(op) => self.unary("Log", op),
            Float::Log1p(op) => {
                let (x, one) = (self.name(op.input.id), self.float(1.0));
                let more = self.node("Add", [&x, &one], vec![]);
                Some(self.node("Log", [&more], vec![]))
            }
            Float::Erf(op) => self.unary("Erf", op),
            Float::PowfScalar(op) => self.scalar("Pow", op),
            Float::Powf(op) => self.binary("Pow", op),
            Float::Sqrt(op) => self.unary("Sqrt", op),
            Float::Cos(op) => self.unary("Cos", op),
            Float::Cosh(op) => self.unary("Cosh", op),
            Float::Sin(op) => self.unary("Sin", op),
            Float::Sinh(op) => self.unary("Sinh", op),
            Float::Tan(op) => self.unary("Tan", op),
            Float::Tanh(op) => self.unary("Tanh", op),
            Float::ArcCos(op) => self.unary("Acos", op),
            Float::ArcCosh(op) => self.unary("Acosh", op),
            Float::ArcSin(op) => self.unary("Asin", op),
            Float::ArcSinh(op) => self.unary("Asinh", op),
            Float::ArcTan(op) => self.unary("Atan", op),
            Float::ArcTanh(op) => self.unary("Atanh", op),
            Float::Round(op) => self.unary("Round", op),
            Float::Floor(op) => self.unary("Floor", op),
            Float::Ceil(op) => self.unary("Ceil", op),
            Float::Recip(op) => self.unary("Reciprocal", op),
            Float::IntoInt(op) => self.cast(&op.input, op.out.dtype),
            Float::Matmul(op) => {
                let (x, y) = (self.name(op.lhs.id), self.name(op.rhs.id));
                Some(self.node("MatMul", [&x, &y], vec![]))
            }
            _ => None,
        }
    }

    fn activation(&mut self, op: &Activation) -> Option<String> {
        match op {
            Activation::Relu(op) => self.unary("Relu", op),
            Activation::Gelu(op) => self.unary("Gelu", op),
            Activation::Sigmoid(op) => self.unary("Sigmoid", op),
            Activation::LeakyRelu(op) => {
                let x = self.name(op.lhs.id);
                Some(self.node("LeakyRelu", [&x], vec![real("alpha", op.rhs)]))
            }
            Activation::PRelu(op) => {
                let (x, mut slope) = (self.name(op.lhs.id), self.name(op.rhs.id));
                // One slope a channel, the second axis.
                let channels = op.rhs.shape.num_elements();
                if channels > 1 {
                    let mut shape = vec![channels];
                    shape.extend((2..op.lhs.shape.rank()).map(|_| 1));
                    slope = self.reshape(&slope, &shape);
                }
                Some(self.node("PRelu", [&x, &slope], vec![]))
            }
            Activation::HardSigmoid(op) => {
                let x = self.name(op.tensor.id);
                Some(self.node("HardSigmoid", [&x], vec![real("alpha", op.alpha), real("beta", op.beta)]))
            }
            // log(sigmoid(x)) = -softplus(-x)
            Activation::LogSigmoid(op) => {
                let minus = self.unary("Neg", op)?;
                let soft = self.node("Softplus", [&minus], vec![]);
                Some(self.node("Neg", [&soft], vec![]))
            }
            Activation::Softmax(op) => Some(self.softmax("Softmax", &op.input, op.axis)),
            Activation::Softmin(op) => {
                let x = self.name(op.input.id);
                let minus = self.node("Neg", [&x], vec![]);
                Some(self.node("Softmax", [&minus], vec![int("axis", op.axis as i64)]))
            }
            Activation::LogSoftmax(op) => Some(self.softmax("LogSoftmax", &op.input, op.axis)),
            _ => None,
        }
    }

    fn softmax(&mut self, operator: &str, x: &TensorIr, axis: usize) -> String {
        let x = self.name(x.id);
        self.node(operator, [&x], vec![int("axis", axis as i64)])
    }

    fn module(&mut self, op: &Module) -> Option<String> {
        Some(match op {
            Module::BatchNorm(op) => {
                let parts =
                    [&op.x, &op.gamma, &op.beta, &op.mean, &op.variance].map(|part| self.name(part.id));
                self.node_of("BatchNormalization", parts.to_vec(), vec![real("epsilon", op.epsilon)])
            }
            Module::LayerNorm(op) => {
                let parts = [Some(&op.input), Some(&op.gamma), op.beta.as_ref()];
                let parts = parts.into_iter().flatten().map(|part| self.name(part.id)).collect();
                self.node_of("LayerNormalization", parts, vec![int("axis", -1), real("epsilon", op.epsilon)])
            }
            Module::Embedding(op) => {
                let (table, indices) = (self.name(op.weights.id), self.name(op.indices.id));
                self.node("Gather", [&table, &indices], vec![int("axis", 0)])
            }
            Module::Linear(op) => {
                let (x, weight) = (self.name(op.x.id), self.name(op.weight.id));
                let product = self.node("MatMul", [&x, &weight], vec![]);
                match &op.bias {
                    Some(bias) => {
                        let bias = self.name(bias.id);
                        self.node("Add", [&product, &bias], vec![])
                    }
                    None => product,
                }
            }
            Module::Conv1d(op) => {
                let o = &op.options;
                let window =
                    Window::new(&o.stride, &o.dilation, &o.padding, &op.weight.shape.as_slice()[2..]);
                self.conv("Conv", [Some(&op.x), Some(&op.weight), op.bias.as_ref()], window, o.groups)
            }
            Module::Conv2d(op) => {
                let o = &op.options;
                let window =
                    Window::new(&o.stride, &o.dilation, &o.padding, &op.weight.shape.as_slice()[2..]);
                self.conv("Conv", [Some(&op.x), Some(&op.weight), op.bias.as_ref()], window, o.groups)
            }
            Module::ConvTranspose1d(op) => {
                let o = &op.options;
                let pads = o.padding.map(|pad| (pad, pad));
                let mut window = Window::new(&o.stride, &o.dilation, &pads, &op.weight.shape.as_slice()[2..]);
                window.attributes.push(ints("output_padding", o.padding_out.iter().map(|&pad| pad as i64)));
                self.conv(
                    "ConvTranspose",
                    [Some(&op.x), Some(&op.weight), op.bias.as_ref()],
                    window,
                    o.groups,
                )
            }
            Module::ConvTranspose2d(op) => {
                let o = &op.options;
                let pads = o.padding.map(|pad| (pad, pad));
                let mut window = Window::new(&o.stride, &o.dilation, &pads, &op.weight.shape.as_slice()[2..]);
                window.attributes.push(ints("output_padding", o.padding_out.iter().map(|&pad| pad as i64)));
                self.conv(
                    "ConvTranspose",
                    [Some(&op.x), Some(&op.weight), op.bias.as_ref()],
                    window,
                    o.groups,
                )
            }
            Module::AvgPool1d(op) => {
                let window = Window::new(&[op.stride], &[1], &[(op.padding, op.padding)], &[op.kernel_size]);
                self.pool("AveragePool", &op.x, window, op.ceil_mode, Some(op.count_include_pad))
            }
            Module::AvgPool2d(op) => {
                let pads = op.padding.map(|pad| (pad, pad));
                let window = Window::new(&op.stride, &[1, 1], &pads, &op.kernel_size);
                self.pool("AveragePool", &op.x, window, op.ceil_mode, Some(op.count_include_pad))
            }
            Module::MaxPool1d(op) => {
                let pads = [(op.padding, op.padding)];
                let window = Window::new(&[op.stride], &[op.dilation], &pads, &[op.kernel_size]);
                self.pool("MaxPool", &op.x, window, op.ceil_mode, None)
            }
            Module::MaxPool2d(op) => {
                let pads = op.padding.map(|pad| (pad, pad));
                let window = Window::new(&op.stride, &op.dilation, &pads, &op.kernel_size);
                self.pool("MaxPool", &op.x, window, op.ceil_mode, None)
            }
            Module::AdaptiveAvgPool1d(op) => self.even_pool(&op.x, &[op.output_size])?,
            Module::AdaptiveAvgPool2d(op) => self.even_pool(&op.x, &op.output_size)?,
            Module::Attention(op) => self.attention(op),
            _ => return None,
        })
    }

    fn conv(
        &mut self,
        operator: &str,
        parts: [Option<&TensorIr>; 3],
        window: Window,
        groups: usize,
    ) -> String {
        let parts = parts.into_iter().flatten().map(|part| self.name(part.id)).collect();
        let mut attributes = window.attributes;
        attributes.push(int("group", groups as i64));
        self.node_of(operator, parts, attributes)
    }

    fn pool(
        &mut self,
        operator: &str,
        x: &TensorIr,
        window: Window,
        ceil: bool,
        counts_pads: Option<bool>,
    ) -> String {
        let mut attributes = window.attributes;
        attributes.push(int("ceil_mode", ceil.into()));
        if let Some(counts) = counts_pads {
            attributes.retain(|attribute| attribute.name != "dilations");
            attributes.push(int("count_include_pad", counts.into()));
        }
        let x = self.name(x.id);
        self.node(operator, [&x], attributes)
    }

    /// A pool to a given size, where that divides the axes into windows of one size.
    fn even_pool(&mut self, x: &TensorIr, size: &[usize]) -> Option<String> {
        let space = &x.shape.as_slice()[2..];
        let fits = |(&space, &size): (&usize, &usize)| size > 0 && space % size == 0;
        if !space.iter().zip(size).all(fits) {
            return None;
        }
        let kernel: Vec<usize> = space.iter().zip(size).map(|(space, size)| space / size).collect();
        let ones = vec![1; size.len()];
        let window = Window::new(&kernel, &ones, &vec![(0, 0); size.len()], &kernel);
        Some(self.pool("AveragePool", x, window, false, Some(false)))
    }

    /// `softmax(q kᵀ · scale + bias) v`, masked.
    fn attention(&mut self, op: &AttentionOpIr) -> String {
        let [q, k, v] = [&op.query, &op.key, &op.value].map(|part| self.name(part.id));
        let k = self.transpose(&k, &[0, 1, 3, 2]);
        let scores = self.node("MatMul", [&q, &k], vec![]);
        let scale = op.options.scale.map_or(1.0 / (op.query.shape[3] as f64).sqrt(), |scale| scale.elem());
        let scale = self.float(scale);
        let mut scores = self.node("Mul", [&scores, &scale], vec![]);
        if let Some(cap) = op.options.softcap {
            let cap = self.number(cap, DType::F32);
            let bent = self.node("Div", [&scores, &cap], vec![]);
            let bent = self.node("Tanh", [&bent], vec![]);
            scores = self.node("Mul", [&bent, &cap], vec![]);
        }
        if let Some(bias) = &op.attn_bias {
            let bias = self.name(bias.id);
            scores = self.node("Add", [&scores, &bias], vec![]);
        }
        let hidden = self.float(f64::NEG_INFINITY);
        if let Some(mask) = &op.mask {
            let mask = self.name(mask.id);
            scores = self.node("Where", [&mask, &hidden, &scores], vec![]);
        }
        if op.options.is_causal {
            let (queries, keys) = (op.query.shape[2], op.key.shape[2]);
            let later = |at: usize| (at % keys) as i64 > (at / keys) as i64 + keys as i64 - queries as i64;
            let mask = TensorData::new((0..queries * keys).map(later).collect::<Vec<_>>(), [queries, keys]);
            let mask = self.kept(format!("%later_{queries}_{keys}"), mask);
            scores = self.node("Where", [&mask, &hidden, &scores], vec![]);
        }
        let weights = self.node("Softmax", [&scores], vec![int("axis", -1)]);
        self.node("MatMul", [&weights, &v], vec![])
    }

    fn finish(mut self) -> Result<GraphProto> {
        let inputs: BTreeSet<&str> = self.graph.inputs.iter().map(|input| input.port.name.as_str()).collect();
        let mut outputs = Vec::new();
        for output in &self.graph.outputs {
            let mut name = output.port.name.clone();
            if inputs.contains(name.as_str()) {
                name += "_out";
            }
            let from = self.name(output.tensor);
            self.node("Identity", [&from], vec![]);
            if let Some(node) = self.nodes.last_mut() {
                node.output[0].clone_from(&name);
            }
            outputs.push(described(&name, output));
        }
        // Numbers of operations that another stands for are read no more.
        let read: BTreeSet<&String> = self.nodes.iter().flat_map(|node| &node.input).collect();
        let constants = self.graph.constants.iter().map(|(id, data)| (self.name(*id), data));
        let numbers = self.numbers.iter().map(|(name, data)| (name.clone(), data));
        let initializer =
            constants.chain(numbers).filter(|(name, _)| read.contains(name)).map(|(name, data)| {
                let dims = data.shape().iter().map(|&size| size as i64).collect();
                let (data_type, raw_data) = if self.halves.contains(&name) {
                    // The lower half of a byte first; an odd last one is alone.
                    let byte = |pair: &[u8]| pair[0] & 15 | pair.get(1).map_or(0, |high| high << 4);
                    (data_type::INT4, data.as_bytes().chunks(2).map(byte).collect())
                } else {
                    let data_type = file_type(data.dtype()).ok_or_else(|| {
                        let dtype = data.dtype();
                        Error::work(format!("a constant of type {dtype:?} cannot be written as ONNX"))
                    })?;
                    (data_type, data.as_bytes().to_vec())
                };
                Ok(TensorProto { dims, data_type, name, raw_data, ..TensorProto::default() })
            });
        let initializer = initializer.collect::<Result<_>>()?;
        let input = self.graph.inputs.iter().map(|input| described(&input.port.name, input)).collect();
        Ok(GraphProto {
            node: self.nodes,
            name: self.graph.kind.clone(),
            initializer,
            input,
            output: outputs,
        })
    }
}

/// Attributes that windows share.
struct Window {
    attributes: Vec<AttributeProto>,
}

impl Window {
    fn new(stride: &[usize], dilation: &[usize], pads: &[(usize, usize)], kernel: &[usize]) -> Self {
        let sizes = |name: &str, sizes: &[usize]| ints(name, sizes.iter().map(|&size| size as i64));
        let pads = pads.iter().map(|pad| pad.0).chain(pads.iter().map(|pad| pad.1)).map(|pad| pad as i64);
        Self {
            attributes: vec![
                sizes("kernel_shape", kernel),
                sizes("strides", stride),
                sizes("dilations", dilation),
                ints("pads", pads),
            ],
        }
    }
}

/// A range of Burn's as ONNX has it. With a negative step Burn walks the range backwards.
fn start_end_step(range: &Slice, size: i64) -> [i64; 3] {
    let from_front = |at: isize| if at < 0 { at as i64 + size } else { at as i64 }.clamp(0, size);
    let (start, end) = (from_front(range.start), range.end.map_or(size, from_front));
    let step = range.step as i64;
    if step > 0 { [start, end, step] } else { [end - 1, if start == 0 { i64::MIN } else { start - 1 }, step] }
}

fn described(name: &str, Boundary { port, .. }: &Boundary) -> ValueInfoProto {
    let elem_type = if port.kind == PortKind::Float { data_type::FLOAT } else { data_type::INT64 };
    let dims =
        port.shape.iter().map(|&size| DimensionProto { dim_value: Some(size as i64), dim_param: None });
    let shape = Some(TensorShapeProto { dim: dims.collect() });
    let tensor_type = Some(TensorTypeProto { elem_type, shape });
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type }) }
}

fn file_type(dtype: DType) -> Option<i32> {
    Some(match dtype {
        DType::F32 => data_type::FLOAT,
        DType::F64 => data_type::DOUBLE,
        DType::F16 => data_type::FLOAT16,
        DType::BF16 => data_type::BFLOAT16,
        DType::I64 => data_type::INT64,
        DType::I32 => data_type::INT32,
        DType::I16 => data_type::INT16,
        DType::I8 => data_type::INT8,
        DType::U64 => data_type::UINT64,
        DType::U32 => data_type::UINT32,
        DType::U16 => data_type::UINT16,
        DType::U8 => data_type::UINT8,
        DType::Bool(_) => data_type::BOOL,
        _ => return None,
    })
}

fn type_name(dtype: DType) -> String {
    if dtype.is_bool() { "bool".into() } else { format!("{dtype:?}").to_lowercase() }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i: value, kind: attribute::INT, ..AttributeProto::default() }
}

fn ints(name: &str, values: impl Iterator<Item = i64>) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        ints: values.collect(),
        kind: attribute::INTS,
        ..AttributeProto::default()
    }
}

fn real(name: &str, value: ScalarIr) -> AttributeProto {
    AttributeProto { name: name.into(), f: value.elem(), kind: attribute::FLOAT, ..AttributeProto::default() }
}

fn text(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        s: value.into(),
        kind: attribute::STRING,
        ..AttributeProto::default()
    }
}
