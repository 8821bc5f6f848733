//! Writing graphs operation by operation, with shapes checked on the way.
//!
//! ```
//! use burn::tensor::{DType, TensorData};
//! use kiln_compiler::builder::Builder;
//!
//! let mut builder = Builder::new(0);
//! let x = builder.provided(&[2, 3], DType::F32);
//! let scale = builder.constant(TensorData::from([1.0f32, 2.0, 3.0]));
//! let y = builder.mul(&x, &scale)?; // [2, 3]
//! assert_eq!(y.shape.to_vec(), [2, 3]);
//! assert!(builder.matmul(&x, &y).is_err());
//! # Ok::<(), String>(())
//! ```

use std::collections::BTreeMap;

use burn::backend::ir::{
    ActivationOperationIr, BaseOperationIr, BinaryOpIr, BoolOperationIr, CastOpIr, CatOpIr, ClampOpIr,
    DimOpIr, FloatOperationIr, FullOpIr, GatherOpIr, IntOperationIr, MaskWhereOpIr, MatmulOpIr,
    ModuleOperationIr, NumericOperationIr, OperationIr, PermuteOpIr, ReduceDimOpIr, ScalarIr, ScalarOpIr,
    SelectOpIr, ShapeOpIr, SliceOpIr, TensorId, TensorIr, TensorStatus, UnaryOpIr,
};
use burn::tensor::{BoolStore, DType, Shape, Slice, TensorData};

use crate::Graph;

/// A result, or how operands do not fit.
pub type Fit<T> = Result<T, String>;

/// Truth values.
pub(crate) const BOOL: DType = DType::Bool(BoolStore::Native);

/// Most elements of a tensor: what is larger no machine holds.
const MOST_ELEMENTS: u64 = 1 << 40;
/// Most elements of whole numbers or truth values that are computed at once where they depend on constants alone.
const MOST_KNOWN: u64 = 1 << 16;

/// A graph in the making. Every function adds an operation and returns its result, or says how its operands do not fit.
pub struct Builder {
    /// What was added so far.
    pub operations: Vec<OperationIr>,
    /// Numbers that are known.
    pub constants: BTreeMap<TensorId, TensorData>,
    next: u64,
    /// Whether arithmetic of shapes is done at once.
    pub(crate) known: bool,
}

impl Builder {
    /// Numbers its tensors from `next` on.
    pub fn new(next: u64) -> Self {
        Self { operations: Vec::new(), constants: BTreeMap::new(), next, known: false }
    }

    /// A tensor that something outside provides.
    pub fn provided(&mut self, shape: &[usize], dtype: DType) -> TensorIr {
        TensorIr {
            id: self.fresh(),
            shape: Shape::from(shape.to_vec()),
            status: TensorStatus::ReadOnly,
            dtype,
        }
    }

    fn fresh(&mut self) -> TensorId {
        self.next += 1;
        TensorId::new(self.next - 1)
    }

    /// Numbers that are known.
    pub fn constant(&mut self, data: TensorData) -> TensorIr {
        let tensor = self.provided(&data.shape().to_vec(), data.dtype());
        self.constants.insert(tensor.id, data);
        tensor
    }

    /// Whole numbers `[len]`.
    pub fn ints(&mut self, values: Vec<i64>) -> TensorIr {
        let len = values.len();
        self.constant(TensorData::new(values, [len]))
    }

    /// The value of a constant.
    pub fn value(&self, tensor: &TensorIr) -> Option<&TensorData> {
        self.constants.get(&tensor.id)
    }

    /// Adds an operation; its first result.
    pub fn push(&mut self, operation: OperationIr) -> Fit<TensorIr> {
        let mut first = None;
        for out in operation.outputs() {
            let count = out.shape.iter().try_fold(1u64, |n, &size| n.checked_mul(size as u64));
            if count.is_none_or(|count| count > MOST_ELEMENTS) {
                return Err(format!("a result of shape {:?} is too large", out.shape.to_vec()));
            }
            first.get_or_insert((out.clone(), count.unwrap_or(0)));
        }
        let (out, count) = first.ok_or("an operation without a result")?;
        let out = TensorIr { status: TensorStatus::ReadOnly, ..out };
        // Other floats are parameters: their computation stays visible, except for how they are laid out.
        let laid_out = matches!(
            operation,
            OperationIr::BaseFloat(BaseOperationIr::Permute(_) | BaseOperationIr::Reshape(_))
        );
        let most = if laid_out {
            u64::MAX
        } else if out.dtype.is_float() {
            1
        } else {
            MOST_KNOWN
        };
        let computable =
            || count <= most && operation.inputs().all(|tensor| self.constants.contains_key(&tensor.id));
        let known = if self.known && computable() { self.compute(&operation, out.id) } else { None };
        match known {
            Some(data) => _ = self.constants.insert(out.id, data),
            None => self.operations.push(operation),
        }
        Ok(out)
    }

    /// The result of an operation on constants, where it fits them.
    fn compute(&self, operation: &OperationIr, out: TensorId) -> Option<TensorData> {
        let constants =
            operation.inputs().map(|tensor| (tensor.id, self.constants[&tensor.id].clone())).collect();
        let (kind, inputs, outputs) = (String::new(), Vec::new(), Vec::new());
        let graph = Graph { kind, inputs, outputs, operations: vec![operation.clone()], constants };
        graph.interpret(std::iter::empty(), std::iter::once(out)).ok()?.pop()
    }

    // Shapes.

    /// The same numbers in order under another shape.
    pub fn reshape(&mut self, x: &TensorIr, shape: &[usize]) -> Fit<TensorIr> {
        if x.shape.to_vec() == shape {
            return Ok(x.clone());
        }
        if x.shape.num_elements() as u128 != shape.iter().map(|&size| size as u128).product::<u128>() {
            return Err(format!("{:?} cannot be reshaped to {shape:?}", x.shape.to_vec()));
        }
        let id = self.fresh();
        let operation = ShapeOpIr::reshape(x.clone(), Shape::from(shape.to_vec()), || id);
        self.push(base(x.dtype, BaseOperationIr::Reshape(operation)))
    }

    /// Repeats axes of size 1, and adds some in front.
    pub fn expand(&mut self, x: &TensorIr, shape: &[usize]) -> Fit<TensorIr> {
        let x = self.of_rank(x, shape.len())?;
        if x.shape.to_vec() == shape {
            return Ok(x);
        }
        if x.shape.iter().zip(shape).any(|(&from, &to)| from != to && from != 1) {
            return Err(format!("{:?} cannot be expanded to {shape:?}", x.shape.to_vec()));
        }
        let id = self.fresh();
        let operation = ShapeOpIr::expand(x.clone(), Shape::from(shape.to_vec()), || id);
        self.push(base(x.dtype, BaseOperationIr::Expand(operation)))
    }

    /// Axes of size 1 in front until there are `rank`.
    pub fn of_rank(&mut self, x: &TensorIr, rank: usize) -> Fit<TensorIr> {
        let missing = rank
            .checked_sub(x.shape.rank())
            .ok_or_else(|| format!("{:?} has more axes than {rank}", x.shape.to_vec()))?;
        let shape: Vec<usize> = std::iter::repeat_n(1, missing).chain(x.shape.iter().copied()).collect();
        self.reshape(x, &shape)
    }

    /// Operands of one rank, and the shape that they have together.
    fn aligned(&mut self, x: &TensorIr, y: &TensorIr) -> Fit<(TensorIr, TensorIr, Vec<usize>)> {
        let shape = broadcast(&x.shape, &y.shape)?;
        Ok((self.of_rank(x, shape.len())?, self.of_rank(y, shape.len())?, shape))
    }

    /// The axes in another order.
    pub fn permute(&mut self, x: &TensorIr, axes: &[usize]) -> Fit<TensorIr> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..x.shape.rank()) {
            return Err(format!("{axes:?} is no order of the axes of {:?}", x.shape.to_vec()));
        }
        if axes.is_sorted() {
            return Ok(x.clone());
        }
        let id = self.fresh();
        let operation = PermuteOpIr::create(x.clone(), axes.to_vec(), || id);
        self.push(base(x.dtype, BaseOperationIr::Permute(operation)))
    }

    /// Swaps the last two axes.
    pub fn transpose(&mut self, x: &TensorIr) -> Fit<TensorIr> {
        let rank = x.shape.rank();
        let mut axes: Vec<usize> = (0..rank).collect();
        axes.swap(rank - 1, rank - 2);
        self.permute(x, &axes)
    }

    /// `ranges`: start, end and step of every axis, resolved.
    pub fn slice(&mut self, x: &TensorIr, ranges: &[Slice]) -> Fit<TensorIr> {
        let id = self.fresh();
        let operation = SliceOpIr::create(x.clone(), ranges.to_vec(), || id);
        self.push(base(x.dtype, BaseOperationIr::Slice(operation)))
    }

    /// `x[.., start..end, ..]` of one axis.
    pub fn narrow(&mut self, x: &TensorIr, axis: usize, start: usize, end: usize) -> Fit<TensorIr> {
        let mut ranges: Vec<Slice> = x.shape.iter().map(|&size| Slice::from(0..size)).collect();
        ranges[axis] = Slice::from(start..end);
        self.slice(x, &ranges)
    }

    /// Tensors behind one another along an axis.
    pub fn cat(&mut self, tensors: &[TensorIr], axis: usize) -> Fit<TensorIr> {
        let [first, others @ ..] = tensors else { return Err("nothing to join".into()) };
        let fits = |other: &TensorIr| {
            let same = |(at, (a, b)): (usize, (&usize, &usize))| at == axis || a == b;
            other.shape.rank() == first.shape.rank()
                && other.dtype == first.dtype
                && other.shape.iter().zip(first.shape.iter()).enumerate().all(same)
        };
        if let Some(other) = others.iter().find(|other| !fits(other)) {
            return Err(format!(
                "{:?} and {:?} cannot be joined along axis {axis}",
                first.shape.to_vec(),
                other.shape.to_vec()
            ));
        }
        if others.is_empty() {
            return Ok(first.clone());
        }
        let id = self.fresh();
        let operation = CatOpIr::create(tensors.to_vec(), axis, || id);
        self.push(base(first.dtype, BaseOperationIr::Cat(operation)))
    }

    /// Rows of `x` along an axis by whole numbers of any shape, which takes the place of the axis.
    pub fn select(&mut self, x: &TensorIr, axis: usize, indices: &TensorIr) -> Fit<TensorIr> {
        let flat = self.reshape(indices, &[indices.shape.num_elements()])?;
        let id = self.fresh();
        let operation = SelectOpIr::create(x.clone(), axis, flat, || id);
        let rows = self.push(base(x.dtype, BaseOperationIr::Select(operation)))?;
        let before = &x.shape.as_slice()[..axis];
        let after = &x.shape.as_slice()[axis + 1..];
        let shape = [before, indices.shape.as_slice(), after].concat();
        self.reshape(&rows, &shape)
    }

    /// An element of `x` along an axis for every index.
    pub fn gather(&mut self, x: &TensorIr, axis: usize, indices: &TensorIr) -> Fit<TensorIr> {
        let id = self.fresh();
        let operation = GatherOpIr::create(x.clone(), axis, indices.clone(), || id);
        self.push(base(x.dtype, BaseOperationIr::Gather(operation)))
    }

    // Numbers.

    /// One value everywhere.
    pub fn full(&mut self, value: f64, shape: &[usize], dtype: DType) -> Fit<TensorIr> {
        let id = self.fresh();
        let operation = FullOpIr::create(Shape::from(shape.to_vec()), dtype, scalar(value, dtype), || id);
        self.push(numeric(dtype, NumericOperationIr::Full(operation)))
    }

    /// An operation on the elements of two tensors, each repeated along axes of size 1 where the other is longer.
    pub fn binary(
        &mut self,
        x: &TensorIr,
        y: &TensorIr,
        kind: fn(BinaryOpIr) -> NumericOperationIr,
    ) -> Fit<TensorIr> {
        same_type(x, y)?;
        let (x, y, _) = self.aligned(x, y)?;
        let (id, dtype) = (self.fresh(), x.dtype);
        self.push(numeric(dtype, kind(BinaryOpIr::create(x, y, || id))))
    }

    /// `x + y`
    pub fn add(&mut self, x: &TensorIr, y: &TensorIr) -> Fit<TensorIr> {
        self.binary(x, y, NumericOperationIr::Add)
    }

    /// `x - y`
    pub fn sub(&mut self, x: &TensorIr, y: &TensorIr) -> Fit<TensorIr> {
        self.binary(x, y, NumericOperationIr::Sub)
    }

    /// `x · y`, element by element.
    pub fn mul(&mut self, x: &TensorIr, y: &TensorIr) -> Fit<TensorIr> {
        self.binary(x, y, NumericOperationIr::Mul)
    }

    /// `x / y`, element by element.
    pub fn div(&mut self, x: &TensorIr, y: &TensorIr) -> Fit<TensorIr> {
        self.binary(x, y, NumericOperationIr::Div)
    }

    /// An operation on each element and a number.
    pub fn scalar(
        &mut self,
        x: &TensorIr,
        y: f64,
        kind: fn(ScalarOpIr) -> NumericOperationIr,
    ) -> Fit<TensorIr> {
        let id = self.fresh();
        let operation = ScalarOpIr::create(x.clone(), scalar(y, x.dtype), || id);
        self.push(numeric(x.dtype, kind(operation)))
    }

    /// `x + y`
    pub fn add_scalar(&mut self, x: &TensorIr, y: f64) -> Fit<TensorIr> {
        self.scalar(x, y, NumericOperationIr::AddScalar)
    }

    /// `x · y`
    pub fn mul_scalar(&mut self, x: &TensorIr, y: f64) -> Fit<TensorIr> {
        self.scalar(x, y, NumericOperationIr::MulScalar)
    }

    /// `x^y` for floats.
    pub fn pow_scalar(&mut self, x: &TensorIr, y: f64) -> Fit<TensorIr> {
        let id = self.fresh();
        let operation = ScalarOpIr::create(x.clone(), ScalarIr::Float(y), || id);
        self.push(OperationIr::Float(x.dtype, FloatOperationIr::PowfScalar(operation)))
    }

    /// A function of each element of floats.
    pub fn float(&mut self, x: &TensorIr, kind: fn(UnaryOpIr) -> FloatOperationIr) -> Fit<TensorIr> {
        floats(x)?;
        let id = self.fresh();
        self.push(OperationIr::Float(x.dtype, kind(UnaryOpIr::create(x.clone(), || id))))
    }

    /// A function of each element.
    pub fn unary(&mut self, x: &TensorIr, kind: fn(UnaryOpIr) -> NumericOperationIr) -> Fit<TensorIr> {
        let id = self.fresh();
        self.push(numeric(x.dtype, kind(UnaryOpIr::create(x.clone(), || id))))
    }

    /// An activation of each element.
    pub fn activation(
        &mut self,
        x: &TensorIr,
        kind: fn(UnaryOpIr) -> ActivationOperationIr,
    ) -> Fit<TensorIr> {
        floats(x)?;
        let id = self.fresh();
        self.push(OperationIr::Activation(kind(UnaryOpIr::create(x.clone(), || id))))
    }

    /// An activation along an axis, such as softmax.
    pub fn along(
        &mut self,
        x: &TensorIr,
        axis: usize,
        kind: fn(DimOpIr) -> ActivationOperationIr,
    ) -> Fit<TensorIr> {
        floats(x)?;
        let id = self.fresh();
        self.push(OperationIr::Activation(kind(DimOpIr::create(x.clone(), axis, || id))))
    }

    /// Each element brought within `min` and `max`.
    pub fn clamp(&mut self, x: &TensorIr, min: f64, max: f64) -> Fit<TensorIr> {
        let (id, [min, max]) = (self.fresh(), [min, max].map(|bound| scalar(bound, x.dtype)));
        let operation = ClampOpIr::create(x.clone(), min, max, || id);
        self.push(numeric(x.dtype, NumericOperationIr::Clamp(operation)))
    }

    /// Reduces an axis to size 1.
    pub fn reduce(
        &mut self,
        x: &TensorIr,
        axis: usize,
        kind: fn(ReduceDimOpIr) -> NumericOperationIr,
    ) -> Fit<TensorIr> {
        let id = self.fresh();
        self.push(numeric(x.dtype, kind(ReduceDimOpIr::create(x.clone(), axis, 1, || id))))
    }

    /// The place of the largest or smallest element of an axis, which is reduced to size 1.
    pub fn arg_reduce(
        &mut self,
        x: &TensorIr,
        axis: usize,
        kind: fn(ReduceDimOpIr) -> NumericOperationIr,
    ) -> Fit<TensorIr> {
        let id = self.fresh();
        self.push(numeric(x.dtype, kind(ReduceDimOpIr::create_arg(x.clone(), axis, 1, DType::I64, || id))))
    }

    /// Matrix products over the last two axes, the others broadcast.
    pub fn matmul(&mut self, x: &TensorIr, y: &TensorIr) -> Fit<TensorIr> {
        same_type(x, y)?;
        floats(x)?;
        let rank = x.shape.rank().max(y.shape.rank());
        let (x, y) = (self.of_rank(x, rank)?, self.of_rank(y, rank)?);
        let (batch_x, inner_x) = x.shape.as_slice().split_at(rank - 2);
        let (batch_y, inner_y) = y.shape.as_slice().split_at(rank - 2);
        let no_product =
            || format!("{:?} and {:?} have no matrix product", x.shape.to_vec(), y.shape.to_vec());
        if inner_x[1] != inner_y[0] {
            return Err(no_product());
        }
        broadcast(batch_x, batch_y).map_err(|_| no_product())?;
        let (id, dtype) = (self.fresh(), x.dtype);
        self.push(OperationIr::Float(dtype, FloatOperationIr::Matmul(MatmulOpIr::create(x, y, || id))))
    }

    /// An operation of which the caller makes the description, such as a convolution, for a number of its result.
    pub fn module(&mut self, make: impl FnOnce(TensorId) -> ModuleOperationIr) -> Fit<TensorIr> {
        let id = self.fresh();
        self.push(OperationIr::Module(make(id)))
    }

    /// An operation of which the caller makes the description, for a number of its result.
    pub fn other(&mut self, make: impl FnOnce(TensorId) -> OperationIr) -> Fit<TensorIr> {
        let id = self.fresh();
        self.push(make(id))
    }

    // Truth values.

    /// A comparison of the elements of two tensors, as truth values.
    pub fn compare(
        &mut self,
        x: &TensorIr,
        y: &TensorIr,
        kind: fn(BinaryOpIr) -> NumericOperationIr,
    ) -> Fit<TensorIr> {
        same_type(x, y)?;
        let (x, y, shape) = self.aligned(x, y)?;
        let (x, y) = (self.expand(&x, &shape)?, self.expand(&y, &shape)?);
        let (id, dtype) = (self.fresh(), x.dtype);
        self.push(numeric(dtype, kind(BinaryOpIr::create_comparison(x, y, BOOL, || id))))
    }

    /// A comparison of each element with a number, as truth values.
    pub fn compare_scalar(
        &mut self,
        x: &TensorIr,
        y: f64,
        kind: fn(ScalarOpIr) -> NumericOperationIr,
    ) -> Fit<TensorIr> {
        let id = self.fresh();
        let operation = ScalarOpIr::create_comparison(x.clone(), scalar(y, x.dtype), BOOL, || id);
        self.push(numeric(x.dtype, kind(operation)))
    }

    /// `x = y`, as truth values.
    pub fn equal(&mut self, x: &TensorIr, y: &TensorIr) -> Fit<TensorIr> {
        same_type(x, y)?;
        let (x, y, shape) = self.aligned(x, y)?;
        let (x, y) = (self.expand(&x, &shape)?, self.expand(&y, &shape)?);
        let (id, dtype) = (self.fresh(), x.dtype);
        self.push(base(dtype, BaseOperationIr::Equal(BinaryOpIr::create_comparison(x, y, BOOL, || id))))
    }

    /// An operation on truth values.
    pub fn logic(
        &mut self,
        x: &TensorIr,
        y: &TensorIr,
        kind: fn(BinaryOpIr) -> BoolOperationIr,
    ) -> Fit<TensorIr> {
        same_type(x, y)?;
        let (x, y, shape) = self.aligned(x, y)?;
        let (x, y) = (self.expand(&x, &shape)?, self.expand(&y, &shape)?);
        let id = self.fresh();
        self.push(OperationIr::Bool(kind(BinaryOpIr::create(x, y, || id))))
    }

    /// The opposite of truth values.
    pub fn not(&mut self, x: &TensorIr) -> Fit<TensorIr> {
        let id = self.fresh();
        self.push(OperationIr::Bool(BoolOperationIr::Not(UnaryOpIr::create(x.clone(), || id))))
    }

    /// `yes` where `mask` holds, `no` elsewhere.
    pub fn choose(&mut self, mask: &TensorIr, yes: &TensorIr, no: &TensorIr) -> Fit<TensorIr> {
        same_type(yes, no)?;
        let shape = broadcast(&broadcast(&yes.shape, &no.shape)?, &mask.shape)?;
        let (mask, yes, no) =
            (self.expand(mask, &shape)?, self.expand(yes, &shape)?, self.expand(no, &shape)?);
        let (id, dtype) = (self.fresh(), no.dtype);
        self.push(base(dtype, BaseOperationIr::MaskWhere(MaskWhereOpIr::create(no, mask, yes, || id))))
    }

    /// The same values as elements of another type; floats to whole numbers drop the fraction.
    pub fn cast(&mut self, x: &TensorIr, dtype: DType) -> Fit<TensorIr> {
        if x.dtype == dtype {
            return Ok(x.clone());
        }
        if dtype.is_bool() {
            let id = self.fresh();
            let operation = ScalarOpIr::create_comparison(x.clone(), scalar(0.0, x.dtype), BOOL, || id);
            return self.push(base(x.dtype, BaseOperationIr::NotEqualElem(operation)));
        }
        let id = self.fresh();
        let operation = CastOpIr::create(x.clone(), dtype, || id);
        self.push(match (x.dtype, dtype) {
            (DType::Bool(_), to) if to.is_float() => OperationIr::Bool(BoolOperationIr::IntoFloat(operation)),
            (DType::Bool(_), _) => OperationIr::Bool(BoolOperationIr::IntoInt(operation)),
            (from, to) if from.is_float() && !to.is_float() => {
                OperationIr::Float(from, FloatOperationIr::IntoInt(operation))
            }
            (from, to) if !from.is_float() && to.is_float() => {
                OperationIr::Int(IntOperationIr::IntoFloat(operation))
            }
            (from, _) => base(from, BaseOperationIr::Cast(operation)),
        })
    }
}

/// An operation that moves elements of a type.
pub(crate) fn base(dtype: DType, operation: BaseOperationIr) -> OperationIr {
    match dtype {
        DType::Bool(_) => OperationIr::BaseBool(operation),
        float if float.is_float() => OperationIr::BaseFloat(operation),
        _ => OperationIr::BaseInt(operation),
    }
}

/// An operation that computes with elements of a type.
pub(crate) fn numeric(dtype: DType, operation: NumericOperationIr) -> OperationIr {
    if dtype.is_float() {
        OperationIr::NumericFloat(dtype, operation)
    } else {
        OperationIr::NumericInt(dtype, operation)
    }
}

fn scalar(value: f64, dtype: DType) -> ScalarIr {
    if dtype.is_float() { ScalarIr::Float(value) } else { ScalarIr::Int(value as i64) }
}

/// The shape that two shapes have together: axes from the last on are equal, or one of them is 1.
pub(crate) fn broadcast(x: &[usize], y: &[usize]) -> Fit<Vec<usize>> {
    let rank = x.len().max(y.len());
    let size = |shape: &[usize], at: usize| (at + shape.len()).checked_sub(rank).map_or(1, |at| shape[at]);
    let together = (0..rank).map(|at| match (size(x, at), size(y, at)) {
        (a, b) if a == b => Ok(a),
        (1, b) => Ok(b),
        (a, 1) => Ok(a),
        _ => Err(format!("{x:?} and {y:?} do not fit each other")),
    });
    together.collect()
}

fn same_type(x: &TensorIr, y: &TensorIr) -> Fit<()> {
    if x.dtype == y.dtype { Ok(()) } else { Err(format!("{:?} meets {:?}", x.dtype, y.dtype)) }
}

fn floats(x: &TensorIr) -> Fit<()> {
    if x.dtype.is_float() { Ok(()) } else { Err(format!("floats are needed, not {:?}", x.dtype)) }
}
