//! From a graph to steps.
//!
//! A tensor is lowered to an [`Expression`] over buffers. Operations that move elements about change the
//! expression's views, element-wise ones grow it, and it becomes a step of its own only where something needs its
//! elements in memory: so element-wise chains fuse, into each other and into the step before or behind.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::backend::ir::{
    ActivationOperationIr, AttentionOpIr, BaseOperationIr, BinaryOpIr, BoolOperationIr, Conv2dOptionsIr,
    FloatOperationIr, IntOperationIr, LinearOpIr, MatmulOpIr, ModuleOperationIr, NumericOperationIr,
    OperationIr, ReduceDimOpIr, ScalarIr, ScalarOpIr, TensorId, TensorIr, UnaryOpIr,
};
use burn::tensor::DType;
use burn::tensor::ops::ConvOptions;
use kiln_core::{Error, PortKind, Result};
use kiln_ops::kernels::{AttentionExtents, FixedPool, PoolOptions, RightFactor};

use super::expression::{Binary, Expression, Unary};
use super::memory::{Kind, Values};
use super::recover;
use super::view::{BufferId, View};
use crate::Graph;

/// Most tensors that one expression reads.
const MOST_LOADS: usize = 8;
/// Operations an element up to which a result with several readers is computed by each of them.
const CHEAP: usize = 4;

/// A buffer before it has a place.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub kind: Kind,
    pub len: usize,
    pub origin: Origin,
}

/// Where a buffer's contents come from.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    Input(usize),
    Constant(Arc<Values>),
    Step(usize),
}

/// Something to do, and the buffers that it fills.
pub(super) struct Step {
    pub work: Work,
    /// One buffer, or for an operation of Burn's one for each of its results.
    pub outputs: Vec<BufferId>,
    /// What becomes of every element of the output, which it reads under the output's own number.
    pub epilogue: Option<Expression>,
    /// The operation that it began with, for people.
    pub name: &'static str,
}

/// How rows are reduced to one number each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reduction {
    Sum,
    Mean,
    Product,
    Max,
    Min,
}

/// How rows are accumulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowWork {
    Softmax,
    LogSoftmax,
    CumulativeSum,
}

/// The kinds of work.
pub(super) enum Work {
    /// One expression, element by element.
    Map(Expression),
    /// Expressions one after another, again and again: each gives as many elements as stand beside it.
    Concatenate(Vec<(Expression, usize)>),
    /// `[batch, m, k] × [batch, k, n]`
    Product {
        a: View,
        b: View,
        /// The same as they were, where they have two axes of batches.
        operands: Option<[View; 2]>,
    },
    /// `[1, m, k] × [k, n]` with a weight that is packed: what a product with a constant becomes for the CPU.
    FixedProduct {
        x: View,
        weight: RightFactor,
    },
    Convolution(Convolution),
    FreeConvolution(FreeConvolution),
    Pool {
        x: View,
        pooling: Pooling,
    },
    Attention(Attention),
    /// Rows that are replaced by others of the same length.
    Rows {
        x: Expression,
        width: usize,
        work: RowWork,
    },
    /// Layer norm of the rows.
    LayerNorm {
        x: Expression,
        weight: View,
        bias: Option<View>,
        epsilon: f32,
    },
    Reduce {
        x: Expression,
        width: usize,
        reduction: Reduction,
    },
    /// Rows of `[rows, width]` by their numbers.
    Gather {
        table: View,
        indices: View,
    },
    /// An operation that has no kernel here, by Burn.
    Burn {
        operation: Box<OperationIr>,
        inputs: Vec<(TensorIr, View)>,
    },
}

/// A convolution over three axes, before its weight is prepared.
pub(super) struct Convolution {
    pub x: View,
    pub extents: [usize; 5],
    pub shape: [usize; 5],
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub options: ConvOptions<3>,
}

impl Convolution {
    /// Depth, height and width of the output.
    pub fn output(&self) -> [usize; 3] {
        let Self { extents, shape, options, .. } = self;
        std::array::from_fn(|axis| {
            let (before, after) = options.padding[axis];
            let reach = options.dilation[axis] * (shape[2 + axis] - 1) + 1;
            (extents[2 + axis] + before + after - reach) / options.stride[axis] + 1
        })
    }
}

/// A convolution over three axes whose weight is no constant, or one of its gradients.
pub(super) struct FreeConvolution {
    pub gives: ConvResult,
    /// The input or the gradient of the output, and the weight; for the gradient of the weight both the former.
    pub operands: [View; 2],
    pub bias: Option<View>,
    pub extents: [usize; 5],
    pub shape: [usize; 5],
    pub options: ConvOptions<3>,
}

/// What a [`FreeConvolution`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConvResult {
    Output,
    InputGradient,
    WeightGradient,
}

impl ConvResult {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Output => "Conv",
            Self::InputGradient => "ConvInputGradient",
            Self::WeightGradient => "ConvWeightGradient",
        }
    }
}

/// A pooling of planes.
pub(super) struct Pooling {
    pub kind: PoolKind,
    /// Height and width of the input.
    pub extents: [usize; 2],
    /// Where windows cover the plane evenly, their numbers stand in the place of their extents.
    pub windows: PoolOptions,
}

/// What becomes of a window.
#[derive(Debug, Clone, Copy)]
pub(super) enum PoolKind {
    Max { dilation: [usize; 2] },
    Mean { padding_counts: bool },
    Even,
}

impl Pooling {
    /// Height and width of the output.
    pub fn outputs(&self) -> [usize; 2] {
        self.fixed().outputs()
    }

    /// Prepares it.
    pub fn fixed(&self) -> FixedPool {
        match self.kind {
            PoolKind::Max { dilation } => FixedPool::max(self.extents, dilation, &self.windows),
            PoolKind::Mean { padding_counts } => FixedPool::mean(self.extents, padding_counts, &self.windows),
            PoolKind::Even => FixedPool::even(self.extents, self.windows.kernel),
        }
    }
}

pub(super) struct Attention {
    pub q: View,
    pub k: View,
    pub v: View,
    /// `[batch, heads, time, source]`
    pub bias: Option<View>,
    /// `[batch, heads, time, source]`; true hides.
    pub mask: Option<View>,
    pub causal: bool,
    pub scale: f32,
}

impl Attention {
    pub fn extents(&self) -> AttentionExtents {
        let ([q, k, v], [batch, heads]) =
            ([&self.q, &self.k, &self.v].map(|view| &view.shape), [self.q.shape[0], self.q.shape[1]]);
        AttentionExtents {
            batch,
            heads,
            kv_heads: k[1],
            time: q[2],
            source: k[2],
            dim: q[3],
            value_dim: v[3],
        }
    }
}

impl Work {
    /// The buffers that it reads, each once.
    pub fn reads(&self) -> Vec<BufferId> {
        let views: Vec<&View> = match self {
            Self::Map(x) | Self::Rows { x, .. } | Self::Reduce { x, .. } => x.loads(),
            Self::LayerNorm { x, weight, bias, .. } => {
                x.loads().into_iter().chain([weight]).chain(bias).collect()
            }
            Self::Concatenate(parts) => parts.iter().flat_map(|(part, _)| part.loads()).collect(),
            Self::Product { a, b, .. } => vec![a, b],
            Self::FixedProduct { x, .. }
            | Self::Convolution(Convolution { x, .. })
            | Self::Pool { x, .. } => vec![x],
            Self::FreeConvolution(FreeConvolution { operands, bias, .. }) => {
                operands.iter().chain(bias).collect()
            }
            Self::Attention(Attention { q, k, v, bias, mask, .. }) => {
                [q, k, v].into_iter().chain(bias).chain(mask).collect()
            }
            Self::Gather { table, indices } => vec![table, indices],
            Self::Burn { inputs, .. } => inputs.iter().map(|(_, view)| view).collect(),
        };
        let mut buffers: Vec<BufferId> = views.into_iter().map(|view| view.buffer).collect();
        buffers.sort_unstable();
        buffers.dedup();
        buffers
    }
}

impl Step {
    /// The buffers that it reads, its own output not among them.
    pub fn reads(&self) -> Vec<BufferId> {
        let mut buffers = self.work.reads();
        let epilogue = self.epilogue.iter().flat_map(|epilogue| epilogue.loads());
        buffers.extend(epilogue.map(|view| view.buffer));
        buffers.sort_unstable();
        buffers.dedup();
        buffers.retain(|buffer| !self.outputs.contains(buffer));
        buffers
    }
}

/// A tensor of the graph.
#[derive(Debug, Clone)]
struct Value {
    kind: Kind,
    shape: Vec<usize>,
    expression: Expression,
}

/// The steps of a graph.
pub(super) struct Lowering {
    pub drafts: Vec<Draft>,
    pub steps: Vec<Step>,
    values: HashMap<TensorId, Value>,
    /// How often a tensor is still to be read.
    pending: HashMap<TensorId, usize>,
    /// The operands of the operation at hand that have not been taken off `pending`.
    operands: Vec<TensorId>,
    /// The tensors whose expressions read a buffer.
    readers: HashMap<BufferId, Vec<TensorId>>,
    /// Buffers that a step reads as they are.
    fixed: HashSet<BufferId>,
}

/// Lowers a graph, whose constants it takes; the steps and, for each output, where it lies.
pub(super) fn lower(graph: &mut Graph) -> Result<(Lowering, Vec<View>)> {
    let mut lowering = Lowering {
        drafts: Vec::new(),
        steps: Vec::new(),
        values: HashMap::new(),
        pending: HashMap::new(),
        operands: Vec::new(),
        readers: HashMap::new(),
        fixed: HashSet::new(),
    };
    let read = graph.operations.iter().flat_map(|operation| operation.inputs().map(|tensor| tensor.id));
    for id in read.chain(graph.outputs.iter().map(|output| output.tensor)) {
        *lowering.pending.entry(id).or_default() += 1;
    }
    for (number, input) in graph.inputs.iter().enumerate() {
        let kind = match input.port.kind {
            PortKind::Float => Kind::Float,
            PortKind::Int => Kind::Int,
        };
        lowering.define(input.tensor, kind, &input.port.shape, Origin::Input(number));
    }
    for (id, data) in std::mem::take(&mut graph.constants) {
        let (dtype, shape) = (data.dtype(), data.shape().to_vec());
        let values = Values::of(data).ok_or_else(|| other_type(id, dtype))?;
        lowering.define(id, values.kind(), &shape, Origin::Constant(Arc::new(values)));
    }
    for operation in &graph.operations {
        if let Some(tensor) = operation.outputs().find(|tensor| Kind::of(tensor.dtype).is_none()) {
            return Err(other_type(tensor.id, tensor.dtype));
        }
        lowering.operands = operation.inputs().map(|tensor| tensor.id).collect();
        if lowering.operation(operation).is_none() {
            lowering.leave_to_burn(operation);
        }
    }
    let outputs = graph.outputs.iter().map(|output| lowering.in_memory_whole(output.tensor)).collect();
    Ok((lowering, outputs))
}

fn other_type(id: TensorId, dtype: DType) -> Error {
    Error::usage(format!("tensor %{} is {dtype:?}, and compiled graphs compute in f32", id.value()))
        .hint("run the graph with `--target interp`")
}

impl Lowering {
    fn define(&mut self, id: TensorId, kind: Kind, shape: &[usize], origin: Origin) {
        let view = self.buffer(kind, shape, origin);
        self.set(id, Value { kind, shape: shape.to_vec(), expression: Expression::Load(view) });
    }

    fn buffer(&mut self, kind: Kind, shape: &[usize], origin: Origin) -> View {
        self.drafts.push(Draft { kind, len: shape.iter().product(), origin });
        View::whole(self.drafts.len() - 1, shape)
    }

    fn value(&self, tensor: &TensorIr) -> &Value {
        &self.values[&tensor.id]
    }

    /// A tensor's expression, repeated along axes to fit `shape`; in memory first where repeating it would repeat work.
    fn expanded(&mut self, tensor: &TensorIr, shape: &[usize]) -> Expression {
        let value = self.value(tensor).clone();
        let larger = shape.iter().product::<usize>() > value.shape.iter().product();
        if larger && value.expression.cost() > 0 {
            let view = self.in_memory(tensor.id);
            return Expression::Load(view.expand(shape));
        }
        value.expression.map_loads(&|view| Some(view.expand(shape))).expect("every view can be expanded")
    }

    /// A constant tensor's elements, where it is one.
    fn constant(&self, tensor: &TensorIr) -> Option<Vec<f32>> {
        let view = self.value(tensor).expression.as_load()?.clone();
        let Origin::Constant(values) = &self.drafts[view.buffer].origin else { return None };
        match &**values {
            Values::Floats(values) if view.is_contiguous() => {
                Some(values[view.offset..view.offset + view.len()].to_vec())
            }
            _ => None,
        }
    }

    /// A tensor's elements in memory, wherever they lie there.
    fn in_memory(&mut self, id: TensorId) -> View {
        let value = self.values[&id].clone();
        if let Some(view) =
            value.expression.as_load().filter(|view| self.drafts[view.buffer].kind == value.kind)
        {
            return view.clone();
        }
        let view = self.append(id, &value).unwrap_or_else(|| self.store(&value));
        self.set(id, Value { expression: Expression::Load(view.clone()), ..value });
        view
    }

    /// Has a tensor computed by the step that it grew from while it still lies as that step's output does.
    fn settle(&mut self, id: TensorId) {
        let value = self.values[&id].clone();
        if value.expression.cost() > 0
            && let Some(view) = self.append(id, &value)
        {
            self.set(id, Value { expression: Expression::Load(view), ..value });
        }
    }

    /// A tensor's elements following one another in memory.
    fn in_memory_whole(&mut self, id: TensorId) -> View {
        let view = self.in_memory(id);
        if view.is_contiguous() {
            return view;
        }
        let value = self.values[&id].clone();
        self.store(&value)
    }

    /// Computes a tensor into a new buffer.
    fn store(&mut self, value: &Value) -> View {
        self.push(Work::Map(value.expression.clone()), value.kind, &value.shape, "Map")
    }

    /// Makes an expression the epilogue of the last step that it reads, if nothing else needs what that step gives.
    fn append(&mut self, id: TensorId, value: &Value) -> Option<View> {
        let loads = value.expression.loads();
        let step_of = |view: &&View| match self.drafts[view.buffer].origin {
            Origin::Step(step) => Some((step, view.buffer)),
            _ => None,
        };
        let (number, buffer) = loads.iter().filter_map(step_of).max()?;
        let step = &self.steps[number];
        let open = step.epilogue.is_none()
            && !matches!(step.work, Work::Map(_) | Work::Concatenate(_) | Work::Burn { .. });
        let own: Vec<&&View> = loads.iter().filter(|view| view.buffer == buffer).collect();
        let as_it_lies = own.len() == 1
            && own[0].is_contiguous()
            && own[0].len() == self.drafts[buffer].len
            && value.shape.iter().product::<usize>() == own[0].len();
        let others_wait = self
            .readers
            .get(&buffer)
            .into_iter()
            .flatten()
            .any(|reader| *reader != id && self.pending.get(reader).is_some_and(|&pending| pending > 0));
        if !open || !as_it_lies || others_wait || self.fixed.contains(&buffer) || value.kind != Kind::Float {
            return None;
        }
        let others = loads.iter().map(|view| view.buffer).filter(|&other| other != buffer);
        self.fixed.extend(others.collect::<Vec<_>>());
        self.steps[number].epilogue = Some(value.expression.clone());
        Some(View::whole(buffer, &value.shape))
    }

    /// A new step with one output.
    fn push(&mut self, work: Work, kind: Kind, shape: &[usize], name: &'static str) -> View {
        self.fixed.extend(work.reads());
        let view = self.buffer(kind, shape, Origin::Step(self.steps.len()));
        self.steps.push(Step { work, outputs: vec![view.buffer], epilogue: None, name });
        view
    }

    /// The operands of the operation at hand have been read.
    fn operands_read(&mut self) {
        for id in std::mem::take(&mut self.operands) {
            if let Some(pending) = self.pending.get_mut(&id) {
                *pending -= 1;
            }
        }
    }

    fn set(&mut self, id: TensorId, value: Value) {
        for view in value.expression.loads() {
            self.readers.entry(view.buffer).or_default().push(id);
        }
        self.values.insert(id, value);
    }

    /// Gives a result its expression; it is computed at once where several readers would repeat too much of it.
    fn bind(&mut self, out: &TensorIr, expression: Expression) -> Option<()> {
        self.operands_read();
        let value = Value { kind: Kind::of(out.dtype)?, shape: out.shape.to_vec(), expression };
        let many_loads = value.expression.loads().len() > MOST_LOADS;
        let shared = self.pending.get(&out.id).is_some_and(|&pending| pending > 1);
        let cost = value.expression.cost();
        self.set(out.id, value.clone());
        if shared
            && cost > 0
            && let Some(view) = self.append(out.id, &value)
        {
            self.set(out.id, Value { expression: Expression::Load(view), ..value });
        } else if many_loads || (shared && cost > CHEAP) {
            self.in_memory(out.id);
        }
        Some(())
    }

    /// Binds a result to the output of a step.
    fn bind_step(&mut self, out: &TensorIr, work: Work, name: &'static str) -> Option<()> {
        let kind = Kind::of(out.dtype)?;
        let view = self.push(work, kind, &out.shape, name);
        self.bind(out, Expression::Load(view))
    }

    /// A step that has Burn compute the operation.
    fn leave_to_burn(&mut self, operation: &OperationIr) {
        let inputs: Vec<(TensorIr, View)> =
            operation.inputs().map(|tensor| (tensor.clone(), self.in_memory(tensor.id))).collect();
        let work = Work::Burn { operation: Box::new(operation.clone()), inputs };
        self.fixed.extend(work.reads());
        let step = self.steps.len();
        let outputs: Vec<View> = operation
            .outputs()
            .map(|out| {
                self.buffer(Kind::of(out.dtype).unwrap_or(Kind::Float), &out.shape, Origin::Step(step))
            })
            .collect();
        let buffers = outputs.iter().map(|view| view.buffer).collect();
        self.steps.push(Step { work, outputs: buffers, epilogue: None, name: "Burn" });
        for (out, view) in operation.outputs().zip(outputs) {
            self.bind(out, Expression::Load(view));
        }
    }

    /// Lowers an operation that has a kernel; `None`, with nothing changed but the places of operands, for others.
    fn operation(&mut self, operation: &OperationIr) -> Option<()> {
        match operation {
            OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => {
                self.base(base)
            }
            OperationIr::NumericFloat(_, numeric) => self.numeric(numeric),
            OperationIr::Float(_, float) => self.float(float),
            OperationIr::Bool(bool) => self.bool(bool),
            OperationIr::Int(IntOperationIr::IntoFloat(cast)) => {
                let input = self.value(&cast.input).expression.clone();
                self.bind(&cast.out, input)
            }
            OperationIr::Activation(activation) => self.activation(activation),
            OperationIr::Module(module) => self.module(module),
            _ => None,
        }
    }

    fn base(&mut self, base: &BaseOperationIr) -> Option<()> {
        match base {
            BaseOperationIr::Reshape(op) => {
                let shape = &op.out.shape;
                let moved = self.value(&op.input).expression.map_loads(&|view| view.reshape(shape));
                match moved {
                    Some(expression) => self.bind(&op.out, expression),
                    None if self.value(&op.input).kind == Kind::Int => None,
                    None => {
                        let view = self.in_memory_whole(op.input.id);
                        self.bind(&op.out, Expression::Load(view.reshape(shape)?))
                    }
                }
            }
            BaseOperationIr::SwapDims(op) => {
                let mut axes: Vec<usize> = (0..op.input.shape.num_dims()).collect();
                axes.swap(op.dim1, op.dim2);
                self.moved(&op.input, &op.out, |view| view.permute(&axes))
            }
            BaseOperationIr::Permute(op) => self.moved(&op.input, &op.out, |view| view.permute(&op.axes)),
            BaseOperationIr::Flip(op) => self.moved(&op.input, &op.out, |view| view.flip(&op.axes)),
            BaseOperationIr::Slice(op) => self.moved(&op.tensor, &op.out, |view| view.slice(&op.ranges)),
            BaseOperationIr::Unfold(op) => {
                let view = self.in_memory(op.input.id);
                self.bind(&op.out, Expression::Load(view.unfold(op.dim, op.size, op.step)))
            }
            BaseOperationIr::Expand(op) => {
                let expression = self.expanded(&op.input, &op.out.shape);
                self.bind(&op.out, expression)
            }
            BaseOperationIr::RepeatDim(op) if self.value(&op.tensor).kind != Kind::Int => {
                let view = self.in_memory(op.tensor.id);
                let mut split = view.clone();
                split.shape.insert(op.dim, op.times);
                split.strides.insert(op.dim, 0);
                let view = split.reshape(&op.out.shape).or_else(|| {
                    let kind = Kind::of(op.out.dtype)?;
                    let shape = split.shape.clone();
                    let whole = self.push(Work::Map(Expression::Load(split)), kind, &shape, "RepeatDim");
                    whole.reshape(&op.out.shape)
                })?;
                self.bind(&op.out, Expression::Load(view))
            }
            BaseOperationIr::Cat(op) if Kind::of(op.out.dtype) != Some(Kind::Int) => {
                let inner = |tensor: &TensorIr| tensor.shape[op.dim..].iter().product::<usize>();
                let parts = op
                    .tensors
                    .iter()
                    .map(|tensor| (self.value(tensor).expression.clone(), inner(tensor)))
                    .collect();
                self.bind_step(&op.out, Work::Concatenate(parts), "Cat")
            }
            BaseOperationIr::MaskWhere(op) if self.is_float(&op.out) => {
                let shape = &op.out.shape;
                let [mask, value, tensor] =
                    [&op.mask, &op.value, &op.tensor].map(|tensor| self.expanded(tensor, shape));
                self.bind(&op.out, Expression::Select(Box::new(mask), Box::new(value), Box::new(tensor)))
            }
            BaseOperationIr::MaskFill(op) if self.is_float(&op.out) => {
                let [mask, tensor] =
                    [&op.mask, &op.tensor].map(|tensor| self.expanded(tensor, &op.out.shape));
                let value = Expression::Constant(op.value.elem());
                self.bind(&op.out, Expression::Select(Box::new(mask), Box::new(value), Box::new(tensor)))
            }
            BaseOperationIr::Select(op) if op.dim == 0 && self.is_float(&op.out) => {
                self.gather(&op.tensor, &op.indices, &op.out)
            }
            BaseOperationIr::Equal(op) if self.value(&op.lhs).kind != Kind::Int => {
                self.binary(op, Binary::Equal)
            }
            BaseOperationIr::NotEqual(op) if self.value(&op.lhs).kind != Kind::Int => {
                self.binary(op, Binary::NotEqual)
            }
            BaseOperationIr::EqualElem(op) if self.value(&op.lhs).kind != Kind::Int => {
                self.scalar(op, Binary::Equal)
            }
            BaseOperationIr::NotEqualElem(op) if self.value(&op.lhs).kind != Kind::Int => {
                self.scalar(op, Binary::NotEqual)
            }
            BaseOperationIr::Cast(op) if self.is_float(&op.out) => {
                let input = self.value(&op.input).expression.clone();
                self.bind(&op.out, input)
            }
            BaseOperationIr::Zeros(op) if self.is_float(&op.out) => {
                self.bind(&op.out, Expression::Constant(0.0))
            }
            BaseOperationIr::Ones(op) if self.is_float(&op.out) => {
                self.bind(&op.out, Expression::Constant(1.0))
            }
            _ => None,
        }
    }

    fn is_float(&self, tensor: &TensorIr) -> bool {
        Kind::of(tensor.dtype) == Some(Kind::Float)
    }

    /// Lowers an operation that only describes its operand anew.
    fn moved(&mut self, input: &TensorIr, out: &TensorIr, change: impl Fn(&View) -> View) -> Option<()> {
        self.settle(input.id);
        let expression = self.value(input).expression.map_loads(&|view| Some(change(view)))?;
        self.bind(out, expression)
    }

    fn binary(&mut self, op: &BinaryOpIr, operation: Binary) -> Option<()> {
        let [lhs, rhs] = [&op.lhs, &op.rhs].map(|tensor| self.expanded(tensor, &op.out.shape));
        self.bind(&op.out, lhs.binary(operation, rhs))
    }

    fn scalar(&mut self, op: &ScalarOpIr, operation: Binary) -> Option<()> {
        let lhs = self.value(&op.lhs).expression.clone();
        self.bind(&op.out, lhs.binary(operation, Expression::Constant(op.rhs.elem())))
    }

    fn unary(&mut self, op: &UnaryOpIr, operation: Unary) -> Option<()> {
        let input = self.value(&op.input).expression.clone();
        self.bind(&op.out, input.unary(operation))
    }

    fn numeric(&mut self, numeric: &NumericOperationIr) -> Option<()> {
        use NumericOperationIr as N;
        match numeric {
            N::Add(op) => self.binary(op, Binary::Add),
            N::AddScalar(op) => self.scalar(op, Binary::Add),
            N::Sub(op) => self.binary(op, Binary::Subtract),
            N::SubScalar(op) => self.scalar(op, Binary::Subtract),
            N::Mul(op) => self.binary(op, Binary::Multiply),
            N::MulScalar(op) => self.scalar(op, Binary::Multiply),
            N::Div(op) => self.binary(op, Binary::Divide),
            N::DivScalar(op) => self.scalar(op, Binary::Divide),
            N::Rem(op) => self.binary(op, Binary::Remainder),
            N::RemScalar(op) => self.scalar(op, Binary::Remainder),
            N::Abs(op) => self.unary(op, Unary::Abs),
            N::Neg(op) => self.unary(op, Unary::Negate),
            N::Sign(op) => self.unary(op, Unary::Sign),
            N::Full(op) => self.bind(&op.out, Expression::Constant(op.value.elem())),
            N::Greater(op) => self.binary(op, Binary::Greater),
            N::GreaterElem(op) => self.scalar(op, Binary::Greater),
            N::GreaterEqual(op) => self.binary(op, Binary::GreaterEqual),
            N::GreaterEqualElem(op) => self.scalar(op, Binary::GreaterEqual),
            N::Lower(op) => self.binary(op, Binary::Less),
            N::LowerElem(op) => self.scalar(op, Binary::Less),
            N::LowerEqual(op) => self.binary(op, Binary::LessEqual),
            N::LowerEqualElem(op) => self.scalar(op, Binary::LessEqual),
            N::ClampMin(op) => self.scalar(op, Binary::AtLeast),
            N::ClampMax(op) => self.scalar(op, Binary::AtMost),
            N::Clamp(op) => {
                let [min, max]: [f32; 2] = [op.min.elem(), op.max.elem()];
                let clamped = self
                    .value(&op.tensor)
                    .expression
                    .clone()
                    .binary(Binary::AtLeast, Expression::Constant(min))
                    .binary(Binary::AtMost, Expression::Constant(max));
                self.bind(&op.out, clamped)
            }
            N::PowiScalar(op) => self.power(op),
            N::Sum(op) => self.reduce_all(&op.input, &op.out, Reduction::Sum),
            N::Mean(op) => self.reduce_all(&op.input, &op.out, Reduction::Mean),
            N::Prod(op) => self.reduce_all(&op.input, &op.out, Reduction::Product),
            N::Max(op) => self.reduce_all(&op.input, &op.out, Reduction::Max),
            N::Min(op) => self.reduce_all(&op.input, &op.out, Reduction::Min),
            N::SumDim(op) => self.reduce(op, Reduction::Sum),
            N::MeanDim(op) => self.reduce(op, Reduction::Mean),
            N::ProdDim(op) => self.reduce(op, Reduction::Product),
            N::MaxDim(op) => self.reduce(op, Reduction::Max),
            N::MinDim(op) => self.reduce(op, Reduction::Min),
            N::SumDims(op) => self.reduce_axes(&op.input, &op.out, &op.axes, Reduction::Sum),
            N::CumSum(op) => self.rows(&op.input, &op.out, op.axis, RowWork::CumulativeSum),
            _ => None,
        }
    }

    /// Small whole powers are products.
    fn power(&mut self, op: &ScalarOpIr) -> Option<()> {
        let x = self.value(&op.lhs).expression.clone();
        let exponent: f64 = op.rhs.elem();
        let result = if exponent == 2.0 {
            x.clone().binary(Binary::Multiply, x)
        } else if exponent == 3.0 {
            x.clone().binary(Binary::Multiply, x.clone()).binary(Binary::Multiply, x)
        } else if exponent == 0.5 {
            x.unary(Unary::Sqrt)
        } else {
            x.binary(Binary::Power, Expression::Constant(exponent as f32))
        };
        self.bind(&op.out, result)
    }

    fn reduce(&mut self, op: &ReduceDimOpIr, reduction: Reduction) -> Option<()> {
        self.reduce_axes(&op.input, &op.out, &[op.axis], reduction)
    }

    fn reduce_all(&mut self, input: &TensorIr, out: &TensorIr, reduction: Reduction) -> Option<()> {
        let axes: Vec<usize> = (0..input.shape.num_dims()).collect();
        self.reduce_axes(input, out, &axes, reduction)
    }

    fn reduce_axes(
        &mut self,
        input: &TensorIr,
        out: &TensorIr,
        axes: &[usize],
        reduction: Reduction,
    ) -> Option<()> {
        let width: usize = axes.iter().map(|&axis| input.shape[axis]).product();
        if width == 0 {
            return None;
        }
        // Reduced axes last: rows are reduced.
        let kept = (0..input.shape.num_dims()).filter(|axis| !axes.contains(axis));
        let order: Vec<usize> = kept.chain(axes.iter().copied()).collect();
        let x = self.value(input).expression.map_loads(&|view| Some(view.permute(&order)))?;
        self.bind_step(out, Work::Reduce { x, width, reduction }, "Reduce")
    }

    /// Lowers work on rows along one axis.
    fn rows(&mut self, input: &TensorIr, out: &TensorIr, axis: usize, work: RowWork) -> Option<()> {
        let last = input.shape.num_dims() - 1;
        let mut order: Vec<usize> = (0..=last).collect();
        order.swap(axis, last);
        let x = self.value(input).expression.map_loads(&|view| Some(view.permute(&order)))?;
        let width = input.shape[axis];
        let mut shape = input.shape.to_vec();
        shape.swap(axis, last);
        let name = match work {
            RowWork::Softmax | RowWork::LogSoftmax => "Softmax",
            RowWork::CumulativeSum => "CumSum",
        };
        let view = self.push(Work::Rows { x, width, work }, Kind::Float, &shape, name);
        self.bind(out, Expression::Load(view.permute(&order)))
    }

    fn float(&mut self, float: &FloatOperationIr) -> Option<()> {
        use FloatOperationIr as F;
        match float {
            F::Exp(op) => self.unary(op, Unary::Exp),
            F::Log(op) => self.unary(op, Unary::Log),
            F::Log1p(op) => self.unary(op, Unary::Log1p),
            F::Erf(op) => self.unary(op, Unary::Erf),
            F::Sqrt(op) => self.unary(op, Unary::Sqrt),
            F::Cos(op) => self.unary(op, Unary::Cos),
            F::Cosh(op) => self.unary(op, Unary::Cosh),
            F::Sin(op) => self.unary(op, Unary::Sin),
            F::Sinh(op) => self.unary(op, Unary::Sinh),
            F::Tan(op) => self.unary(op, Unary::Tan),
            F::Tanh(op) => self.unary(op, Unary::Tanh),
            F::ArcCos(op) => self.unary(op, Unary::Arccos),
            F::ArcCosh(op) => self.unary(op, Unary::Arccosh),
            F::ArcSin(op) => self.unary(op, Unary::Arcsin),
            F::ArcSinh(op) => self.unary(op, Unary::Arcsinh),
            F::ArcTan(op) => self.unary(op, Unary::Arctan),
            F::ArcTanh(op) => self.unary(op, Unary::Arctanh),
            F::Round(op) => self.unary(op, Unary::Round),
            F::Floor(op) => self.unary(op, Unary::Floor),
            F::Ceil(op) => self.unary(op, Unary::Ceil),
            F::Trunc(op) => self.unary(op, Unary::Truncate),
            F::Recip(op) => self.unary(op, Unary::Reciprocal),
            F::IsNan(op) => self.unary(op, Unary::IsNan),
            F::IsInf(op) => self.unary(op, Unary::IsInfinite),
            F::ArcTan2(op) => self.binary(op, Binary::Arctan2),
            F::Hypot(op) => self.binary(op, Binary::Hypotenuse),
            F::Powf(op) => self.binary(op, Binary::Power),
            F::PowfScalar(op) => self.power(op),
            F::Matmul(op) => self.product(op),
            _ => None,
        }
    }

    fn bool(&mut self, bool: &BoolOperationIr) -> Option<()> {
        match bool {
            BoolOperationIr::IntoFloat(op) => {
                let input = self.value(&op.input).expression.clone();
                self.bind(&op.out, input)
            }
            BoolOperationIr::Not(op) => self.unary(op, Unary::Not),
            BoolOperationIr::And(op) => self.binary(op, Binary::And),
            BoolOperationIr::Or(op) => self.binary(op, Binary::Or),
            BoolOperationIr::Xor(op) => self.binary(op, Binary::Xor),
            BoolOperationIr::IntoInt(_) => None,
        }
    }

    fn activation(&mut self, activation: &ActivationOperationIr) -> Option<()> {
        use ActivationOperationIr as A;
        match activation {
            A::Relu(op) => self.unary(op, Unary::Relu),
            A::LeakyRelu(op) => {
                let x = self.value(&op.lhs).expression.clone();
                self.bind(&op.out, x.unary(Unary::LeakyRelu(op.rhs.elem())))
            }
            A::Gelu(op) => self.unary(op, Unary::Gelu),
            A::Sigmoid(op) => self.unary(op, Unary::Sigmoid),
            A::LogSigmoid(op) => self.unary(op, Unary::LogSigmoid),
            A::HardSigmoid(op) => {
                let [alpha, beta]: [f32; 2] = [op.alpha.elem(), op.beta.elem()];
                let x = self.value(&op.tensor).expression.clone();
                let hard = x
                    .binary(Binary::Multiply, Expression::Constant(alpha))
                    .binary(Binary::Add, Expression::Constant(beta))
                    .binary(Binary::AtLeast, Expression::Constant(0.0))
                    .binary(Binary::AtMost, Expression::Constant(1.0));
                self.bind(&op.out, hard)
            }
            A::ReluBackward(op) => {
                let [y, dy] = [&op.lhs, &op.rhs].map(|tensor| self.value(tensor).expression.clone());
                let flat = y.binary(Binary::LessEqual, Expression::Constant(0.0));
                let zero = Expression::Constant(0.0);
                self.bind(&op.out, Expression::Select(Box::new(flat), Box::new(zero), Box::new(dy)))
            }
            A::GeluBackward(op) => {
                let [x, dy] = [&op.lhs, &op.rhs].map(|tensor| self.value(tensor).expression.clone());
                self.bind(&op.out, gelu_slope(x).binary(Binary::Multiply, dy))
            }
            A::Softmax(op) => self.rows(&op.input, &op.out, op.axis, RowWork::Softmax),
            A::LogSoftmax(op) => self.rows(&op.input, &op.out, op.axis, RowWork::LogSoftmax),
            _ => None,
        }
    }

    /// `[..., m, k] × [..., k, n]`, batches repeated to fit.
    fn product(&mut self, op: &MatmulOpIr) -> Option<()> {
        let [mut a, mut b] = [&op.lhs, &op.rhs].map(|tensor| self.in_memory(tensor.id));
        let rank = op.out.shape.num_dims();
        let [m, k, n] = [a.shape[rank - 2], a.shape[rank - 1], b.shape[rank - 1]];
        let batch = &op.out.shape[..rank - 2];
        a = a.expand(&[batch, &[m, k]].concat());
        b = b.expand(&[batch, &[k, n]].concat());
        if self.pending.get(&op.lhs.id) == Some(&1)
            && let Some(attention) = recover::attention(&self.drafts, &self.steps, &a, &b)
        {
            return self.push_attention(attention, &op.out);
        }
        let batches = batch.iter().product::<usize>();
        let operands = (rank == 4).then(|| [a.clone(), b.clone()]);
        let same_b =
            b.strides[..rank - 2].iter().zip(batch).all(|(&stride, &extent)| stride == 0 || extent == 1);
        // One product where all batches multiply the same matrix and their rows follow evenly.
        let tall = same_b.then(|| a.reshape(&[1, batches * m, k])).flatten();
        let (a, b) = match tall {
            Some(a) => {
                (a, View { shape: vec![1, k, n], strides: [&[0], &b.strides[rank - 2..]].concat(), ..b })
            }
            None => (self.batched(a, [batches, m, k]), self.batched(b, [batches, k, n])),
        };
        let [a, b] = [a, b].map(|matrix| self.with_unit_stride(matrix));
        self.bind_step(&op.out, Work::Product { a, b, operands }, "Matmul")
    }

    /// `x W + b`: one product of all rows.
    fn linear(&mut self, op: &LinearOpIr) -> Option<()> {
        let [inputs, outputs] = [op.weight.shape[0], op.weight.shape[1]];
        let rows = op.x.shape.iter().product::<usize>().checked_div(inputs)?;
        let x = self.in_memory(op.x.id);
        let a = self.batched(x, [1, rows, inputs]);
        let weight = self.in_memory(op.weight.id);
        let b = self.batched(weight, [1, inputs, outputs]);
        let [a, b] = [a, b].map(|matrix| self.with_unit_stride(matrix));
        let bias = op.bias.as_ref().map(|bias| self.expanded(bias, &op.out.shape));
        let work = Work::Product { a, b, operands: None };
        let product = Expression::Load(self.push(work, Kind::of(op.out.dtype)?, &op.out.shape, "Linear"));
        let sum = match bias {
            Some(bias) => product.binary(Binary::Add, bias),
            None => product,
        };
        self.bind(&op.out, sum)
    }

    /// Batches along one axis.
    fn batched(&mut self, view: View, shape: [usize; 3]) -> View {
        view.reshape(&shape).unwrap_or_else(|| {
            let whole = view.shape.clone();
            let copied = self.push(Work::Map(Expression::Load(view)), Kind::Float, &whole, "Copy");
            View::whole(copied.buffer, &shape)
        })
    }

    /// With rows or columns whose elements follow one another, and no row or column backwards.
    fn with_unit_stride(&mut self, view: View) -> View {
        let [rows, columns] = [view.strides[1], view.strides[2]];
        let even = |stride: isize, other: isize, extent: usize, across: usize| {
            (stride == 1 || extent == 1) && (other >= extent as isize || across == 1)
        };
        let fits = view.strides[0] >= 0
            && (even(columns, rows, view.shape[2], view.shape[1])
                || even(rows, columns, view.shape[1], view.shape[2]));
        if fits {
            return view;
        }
        let shape = view.shape.clone();
        self.push(Work::Map(Expression::Load(view)), Kind::Float, &shape, "Copy")
    }

    fn gather(&mut self, table: &TensorIr, indices: &TensorIr, out: &TensorIr) -> Option<()> {
        let table_view = self.in_memory_whole(table.id);
        let rows = table.shape[0];
        let width = table.shape[1..].iter().product();
        let table = table_view.reshape(&[rows, width])?;
        let indices = self.in_memory(indices.id);
        if !indices.is_contiguous() {
            return None;
        }
        self.bind_step(out, Work::Gather { table, indices }, "Gather")
    }

    fn module(&mut self, module: &ModuleOperationIr) -> Option<()> {
        use ModuleOperationIr as M;
        match module {
            M::Embedding(op) => self.gather(&op.weights, &op.indices, &op.out),
            M::Linear(op) => self.linear(op),
            M::LayerNorm(op) => {
                let width = *op.input.shape.last()?;
                let x = self.value(&op.input).expression.clone();
                let weight = self.in_memory_whole(op.gamma.id);
                let bias = op.beta.as_ref().map(|beta| self.in_memory_whole(beta.id));
                if width == 0 {
                    return None;
                }
                let work = Work::LayerNorm { x, weight, bias, epsilon: op.epsilon.elem() };
                self.bind_step(&op.out, work, "LayerNorm")
            }
            M::BatchNorm(op) => {
                let constants =
                    [&op.gamma, &op.beta, &op.mean, &op.variance].map(|tensor| self.constant(tensor));
                let [Some(gamma), Some(beta), Some(mean), Some(variance)] = constants else { return None };
                let epsilon: f32 = op.epsilon.elem();
                let scale: Vec<f32> = gamma
                    .iter()
                    .zip(&variance)
                    .map(|(gamma, variance)| gamma / (variance + epsilon).sqrt())
                    .collect();
                let shift = beta
                    .iter()
                    .zip(&mean)
                    .zip(&scale)
                    .map(|((beta, mean), scale)| beta - mean * scale)
                    .collect();
                self.scale_channels(&op.x, &op.out, scale, shift)
            }
            M::Conv1d(op) => {
                let options = &op.options;
                let options = ConvOptions {
                    stride: [1, 1, options.stride[0]],
                    padding: [(0, 0), (0, 0), options.padding[0]],
                    dilation: [1, 1, options.dilation[0]],
                    groups: options.groups,
                };
                self.convolution([&op.x, &op.weight], op.bias.as_ref(), options, &op.out)
            }
            M::Conv2d(op) => {
                let options = over_three_axes(&op.options);
                self.convolution([&op.x, &op.weight], op.bias.as_ref(), options, &op.out)
            }
            M::Conv2dXBackward(op) => {
                let operands = [&op.output_grad, &op.weight];
                let shapes = [&op.x, &op.weight].map(|tensor| with_three_axes(&tensor.shape));
                let options = over_three_axes(&op.options);
                self.free_convolution(ConvResult::InputGradient, operands, None, shapes, options, &op.out)
            }
            M::Conv2dWeightBackward(op) => {
                let operands = [&op.x, &op.output_grad];
                let shapes = [&op.x, &op.weight].map(|tensor| with_three_axes(&tensor.shape));
                let options = over_three_axes(&op.options);
                self.free_convolution(ConvResult::WeightGradient, operands, None, shapes, options, &op.out)
            }
            M::MaxPool1d(op) => {
                let windows = PoolOptions {
                    kernel: [1, op.kernel_size],
                    stride: [1, op.stride],
                    padding: [0, op.padding],
                    ceil_mode: op.ceil_mode,
                };
                self.pool(&op.x, &op.out, PoolKind::Max { dilation: [1, op.dilation] }, windows)
            }
            M::AvgPool1d(op) => {
                let windows = PoolOptions {
                    kernel: [1, op.kernel_size],
                    stride: [1, op.stride],
                    padding: [0, op.padding],
                    ceil_mode: op.ceil_mode,
                };
                self.pool(&op.x, &op.out, PoolKind::Mean { padding_counts: op.count_include_pad }, windows)
            }
            M::AdaptiveAvgPool1d(op) => {
                let kernel = [1, op.output_size];
                let windows = PoolOptions { kernel, stride: [1; 2], padding: [0; 2], ceil_mode: false };
                self.pool(&op.x, &op.out, PoolKind::Even, windows)
            }
            M::MaxPool2d(op) => {
                let windows = PoolOptions {
                    kernel: op.kernel_size,
                    stride: op.stride,
                    padding: op.padding,
                    ceil_mode: op.ceil_mode,
                };
                self.pool(&op.x, &op.out, PoolKind::Max { dilation: op.dilation }, windows)
            }
            M::AvgPool2d(op) => {
                let windows = PoolOptions {
                    kernel: op.kernel_size,
                    stride: op.stride,
                    padding: op.padding,
                    ceil_mode: op.ceil_mode,
                };
                self.pool(&op.x, &op.out, PoolKind::Mean { padding_counts: op.count_include_pad }, windows)
            }
            M::AdaptiveAvgPool2d(op) => {
                let kernel = op.output_size;
                let windows = PoolOptions { kernel, stride: [1; 2], padding: [0; 2], ceil_mode: false };
                self.pool(&op.x, &op.out, PoolKind::Even, windows)
            }
            M::Attention(op) => self.attention(op),
            _ => None,
        }
    }

    /// `x scale + shift` for every channel: in the weight of the convolution that gives `x`, where that is all that
    /// reads it.
    fn scale_channels(
        &mut self,
        x: &TensorIr,
        out: &TensorIr,
        scale: Vec<f32>,
        shift: Vec<f32>,
    ) -> Option<()> {
        let channels = scale.len();
        let value = self.value(x).clone();
        if let Some(view) = value.expression.as_load()
            && let Origin::Step(step) = self.drafts[view.buffer].origin
            && self.pending.get(&x.id) == Some(&1)
            && !self.fixed.contains(&view.buffer)
            && let Step { work: Work::Convolution(convolution), epilogue: None, .. } = &mut self.steps[step]
            && view.is_contiguous()
            && view.shape.get(1) == Some(&channels)
            && convolution.shape[0] == channels
        {
            let each = convolution.weight.len() / channels;
            for (weight, scale) in convolution.weight.chunks_mut(each.max(1)).zip(&scale) {
                weight.iter_mut().for_each(|weight| *weight *= scale);
            }
            let old = std::mem::take(&mut convolution.bias);
            let old = old.into_iter().chain(std::iter::repeat(0.0));
            convolution.bias = old
                .zip(scale.iter().zip(&shift))
                .map(|(bias, (scale, shift))| bias * scale + shift)
                .collect();
            return self.bind(out, value.expression);
        }
        let mut axes = vec![1; value.shape.len()];
        axes[1] = channels;
        let [scale, shift] = [scale, shift].map(|values| {
            let view = self.buffer(Kind::Float, &axes, Origin::Constant(Arc::new(Values::Floats(values))));
            Expression::Load(view.expand(&value.shape))
        });
        self.bind(out, value.expression.binary(Binary::Multiply, scale).binary(Binary::Add, shift))
    }

    fn convolution(
        &mut self,
        [x, weight]: [&TensorIr; 2],
        bias: Option<&TensorIr>,
        options: ConvOptions<3>,
        out: &TensorIr,
    ) -> Option<()> {
        let [extents, shape] = [x, weight].map(|tensor| with_three_axes(&tensor.shape));
        let fixed = self.constant(weight).zip(match bias {
            Some(bias) => self.constant(bias),
            None => Some(Vec::new()),
        });
        let Some((weight_values, bias)) = fixed else {
            let shapes = [extents, shape];
            return self.free_convolution(ConvResult::Output, [x, weight], bias, shapes, options, out);
        };
        let x = self.in_memory_whole(x.id);
        let convolution = Convolution { x, extents, shape, weight: weight_values, bias, options };
        self.bind_step(out, Work::Convolution(convolution), "Conv")
    }

    /// `shapes`: those of the input and of the weight.
    fn free_convolution(
        &mut self,
        gives: ConvResult,
        operands: [&TensorIr; 2],
        bias: Option<&TensorIr>,
        [extents, shape]: [[usize; 5]; 2],
        options: ConvOptions<3>,
        out: &TensorIr,
    ) -> Option<()> {
        let operands = operands.map(|tensor| self.in_memory_whole(tensor.id));
        let bias = bias.map(|bias| self.in_memory_whole(bias.id));
        let convolution = FreeConvolution { gives, operands, bias, extents, shape, options };
        self.bind_step(out, Work::FreeConvolution(convolution), gives.name())
    }

    /// Pools `[batch, channels, height, width]`, or `[batch, channels, width]` as planes of one row.
    fn pool(&mut self, x: &TensorIr, out: &TensorIr, kind: PoolKind, windows: PoolOptions) -> Option<()> {
        let extents = match x.shape[2..] {
            [width] => [1, width],
            [height, width] => [height, width],
            _ => return None,
        };
        let pooling = Pooling { kind, extents, windows };
        let x = self.in_memory_whole(x.id);
        self.bind_step(out, Work::Pool { x, pooling }, "Pool")
    }

    fn attention(&mut self, op: &AttentionOpIr) -> Option<()> {
        if op.options.softcap.is_some() {
            return None;
        }
        let scores = [op.query.shape[0], op.query.shape[1], op.query.shape[2], op.key.shape[2]];
        let [q, k, v] = [&op.query, &op.key, &op.value].map(|tensor| self.in_memory(tensor.id));
        let [mask, bias] = [&op.mask, &op.attn_bias]
            .map(|tensor| tensor.as_ref().map(|tensor| self.in_memory(tensor.id).expand(&scores)));
        let scale = op.options.scale.map_or((q.shape[3] as f32).powf(-0.5), |scale: ScalarIr| scale.elem());
        self.push_attention(Attention { q, k, v, bias, mask, causal: op.options.is_causal, scale }, &op.out)
    }

    fn push_attention(&mut self, attention: Attention, out: &TensorIr) -> Option<()> {
        let Attention { q, k, v, bias, mask, causal, scale } = attention;
        let [q, k, v] = [q, k, v].map(|view| self.with_whole_rows(view));
        let [bias, mask] = [bias, mask].map(|view| view.map(|view| self.with_whole_rows(view)));
        let attention = Attention { q, k, v, bias, mask, causal, scale };
        let AttentionExtents { batch, heads, time, value_dim, .. } = attention.extents();
        let shape = [batch, time, heads, value_dim];
        let view = self.push(Work::Attention(attention), Kind::Float, &shape, "Attention");
        self.bind(out, Expression::Load(view.permute(&[0, 2, 1, 3])))
    }

    /// With the elements of every row side by side and nothing backwards.
    fn with_whole_rows(&mut self, view: View) -> View {
        let last = view.shape.len() - 1;
        let side_by_side = view.strides[last] == 1 || view.shape[last] == 1;
        if side_by_side && view.strides.iter().all(|&stride| stride >= 0) {
            return view;
        }
        let (kind, shape) = (self.drafts[view.buffer].kind, view.shape.clone());
        self.push(Work::Map(Expression::Load(view)), kind, &shape, "Copy")
    }
}

/// The shape of images or rows as that of volumes.
fn with_three_axes(shape: &[usize]) -> [usize; 5] {
    let mut extents = [1; 5];
    extents[..2].copy_from_slice(&shape[..2]);
    extents[5 - (shape.len() - 2)..].copy_from_slice(&shape[2..]);
    extents
}

/// The options of a convolution of images as those of one of volumes.
fn over_three_axes(options: &Conv2dOptionsIr) -> ConvOptions<3> {
    ConvOptions {
        stride: [1, options.stride[0], options.stride[1]],
        padding: [(0, 0), options.padding[0], options.padding[1]],
        dilation: [1, options.dilation[0], options.dilation[1]],
        groups: options.groups,
    }
}

/// `x φ(x) + Φ(x)`, with the normal distribution's density `φ` and distribution function `Φ`.
fn gelu_slope(x: Expression) -> Expression {
    use std::f32::consts::{FRAC_1_SQRT_2, PI};
    let times = |x: Expression, factor: f32| x.binary(Binary::Multiply, Expression::Constant(factor));
    let square = x.clone().binary(Binary::Multiply, x.clone());
    let bell = times(times(square, -0.5).unary(Unary::Exp), 1.0 / (2.0 * PI).sqrt());
    let share = times(x.clone(), FRAC_1_SQRT_2).unary(Unary::Erf);
    let share = times(share.binary(Binary::Add, Expression::Constant(1.0)), 0.5);
    x.binary(Binary::Multiply, bell).binary(Binary::Add, share)
}
