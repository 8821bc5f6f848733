//! What each operation does with the gradient of its result.

use std::f64::consts::PI;

use burn::backend::ir::{
    ActivationOperationIr as Activation, AdaptiveAvgPool1dBackwardOpIr, AdaptiveAvgPool2dBackwardOpIr,
    AttentionOpIr, AvgPool1dBackwardOpIr, AvgPool2dBackwardOpIr, BaseOperationIr as Base, BatchNormOpIr,
    BinaryOpIr, Conv1dBiasBackwardOpIr, Conv1dOpIr, Conv1dOptionsIr, Conv1dWeightBackwardOpIr,
    Conv1dXBackwardOpIr, Conv2dBiasBackwardOpIr, Conv2dOpIr, Conv2dOptionsIr, Conv2dWeightBackwardOpIr,
    Conv2dXBackwardOpIr, ConvTranspose1dBiasBackwardOpIr, ConvTranspose1dWeightBackwardOpIr,
    ConvTranspose2dBiasBackwardOpIr, ConvTranspose2dWeightBackwardOpIr, DimOpIr, EmbeddingBackwardOpIr,
    FlipOpIr, FloatOperationIr as Float, InterpolateBackwardOpIr, LayerNormOpIr, LinearBiasBackwardOpIr,
    LinearWeightBackwardOpIr, LinearXBackwardOpIr, MaxPool1dWithIndicesBackwardOpIr,
    MaxPool1dWithIndicesOpIr, MaxPool2dWithIndicesBackwardOpIr, MaxPool2dWithIndicesOpIr,
    ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr, PadModeIr, ScalarIr,
    ScatterOpIr, SelectAssignOpIr, SliceAssignOpIr, TensorId, TensorIr, TensorStatus, UnaryOpIr,
};
use burn::tensor::{DType, IndexingUpdateOp, Slice, TensorData};

use crate::builder::{Builder, Fit, base, numeric};

/// What an operand gets.
type Parts = Fit<Vec<(TensorId, TensorIr)>>;

/// The gradients of an operation's operands from that of its result; `None` where there is no rule. An operation whose
/// result does not change with small changes of its operands gives them nothing.
pub(super) fn gradients(b: &mut Builder, operation: &OperationIr, dy: &TensorIr) -> Option<Parts> {
    match operation {
        OperationIr::BaseFloat(op) => of_base(b, op, dy),
        OperationIr::NumericFloat(_, op) => of_numeric(b, op, dy),
        OperationIr::Float(_, op) => of_float(b, op, dy),
        OperationIr::Activation(op) => of_activation(b, op, dy),
        OperationIr::Module(op) => of_module(b, op, dy),
        _ => None,
    }
}

/// An operand as later operations read it.
fn read(tensor: &TensorIr) -> TensorIr {
    TensorIr { status: TensorStatus::ReadOnly, ..tensor.clone() }
}

fn one(operand: &TensorIr, part: Fit<TensorIr>) -> Parts {
    Ok(vec![(operand.id, part?)])
}

impl Builder {
    /// Sums what broadcasting repeated, so that the shape is `shape` again.
    fn sum_to(&mut self, x: &TensorIr, shape: &[usize]) -> Fit<TensorIr> {
        let mut x = x.clone();
        let extra = x.shape.rank() - shape.len();
        for axis in 0..x.shape.rank() {
            let size = axis.checked_sub(extra).map_or(1, |axis| shape[axis]);
            if size == 1 && x.shape[axis] != 1 {
                x = self.reduce(&x, axis, Numeric::SumDim)?;
            }
        }
        self.reshape(&x, shape)
    }

    fn zeros_like(&mut self, x: &TensorIr) -> Fit<TensorIr> {
        self.full(0.0, &x.shape.to_vec(), x.dtype)
    }

    fn neg(&mut self, x: &TensorIr) -> Fit<TensorIr> {
        self.unary(x, Numeric::Neg)
    }

    /// `x` where the mask does not hold, 0 where it does.
    fn outside(&mut self, mask: &TensorIr, x: &TensorIr) -> Fit<TensorIr> {
        let zero = self.full(0.0, &vec![1; x.shape.rank()], x.dtype)?;
        self.choose(mask, &zero, x)
    }

    /// `x` where the mask holds, 0 where it does not.
    fn inside(&mut self, mask: &TensorIr, x: &TensorIr) -> Fit<TensorIr> {
        let zero = self.full(0.0, &vec![1; x.shape.rank()], x.dtype)?;
        self.choose(mask, x, &zero)
    }

    fn flip(&mut self, x: &TensorIr, axes: &[usize]) -> Fit<TensorIr> {
        self.other(|id| base(x.dtype, Base::Flip(FlipOpIr::create(x.clone(), axes.to_vec(), || id))))
    }

    fn slice_assign(&mut self, x: &TensorIr, ranges: &[Slice], value: &TensorIr) -> Fit<TensorIr> {
        let (target, value) = (x.clone(), value.clone());
        self.other(|id| {
            base(x.dtype, Base::SliceAssign(SliceAssignOpIr::create(target, ranges.to_vec(), value, || id)))
        })
    }

    /// Adds rows to those of zeros that are like `x`.
    fn add_rows(&mut self, x: &TensorIr, axis: usize, indices: &TensorIr, rows: &TensorIr) -> Fit<TensorIr> {
        let zeros = self.zeros_like(x)?;
        let (indices, rows) = (read(indices), rows.clone());
        self.other(|id| {
            let add = IndexingUpdateOp::Add;
            base(
                x.dtype,
                Base::SelectAssign(SelectAssignOpIr::create(zeros, axis, indices, rows, add, || id)),
            )
        })
    }

    /// Adds elements to those of zeros that are like `x`.
    fn add_elements(
        &mut self,
        x: &TensorIr,
        axis: usize,
        indices: &TensorIr,
        values: &TensorIr,
    ) -> Fit<TensorIr> {
        let zeros = self.zeros_like(x)?;
        let (indices, values) = (read(indices), values.clone());
        self.other(|id| {
            let add = IndexingUpdateOp::Add;
            base(x.dtype, Base::Scatter(ScatterOpIr::create(zeros, axis, indices, values, add, || id)))
        })
    }

    /// An operation of two tensors, such as the backward of an activation.
    fn paired(&mut self, x: &TensorIr, y: &TensorIr, kind: fn(BinaryOpIr) -> Activation) -> Fit<TensorIr> {
        let (x, y) = (x.clone(), y.clone());
        self.other(|id| OperationIr::Activation(kind(BinaryOpIr::create(x, y, || id))))
    }

    /// `sign · x² + more`
    fn squared(&mut self, x: &TensorIr, sign: f64, more: f64) -> Fit<TensorIr> {
        let square = self.mul(x, x)?;
        let signed = self.mul_scalar(&square, sign)?;
        self.add_scalar(&signed, more)
    }
}

fn of_base(b: &mut Builder, op: &Base, dy: &TensorIr) -> Option<Parts> {
    Some(match op {
        Base::Reshape(op) => one(&op.input, b.reshape(dy, &op.input.shape)),
        Base::SwapDims(op) => {
            let mut axes: Vec<usize> = (0..dy.shape.rank()).collect();
            axes.swap(op.dim1, op.dim2);
            one(&op.input, b.permute(dy, &axes))
        }
        Base::Permute(op) => {
            let mut back = vec![0; op.axes.len()];
            op.axes.iter().enumerate().for_each(|(to, &from)| back[from] = to);
            one(&op.input, b.permute(dy, &back))
        }
        Base::Flip(op) => one(&op.input, b.flip(dy, &op.axes)),
        Base::Expand(op) => one(&op.input, b.sum_to(dy, &op.input.shape)),
        Base::Slice(op) => {
            let zeros = b.zeros_like(&op.tensor);
            one(&op.tensor, zeros.and_then(|zeros| b.slice_assign(&zeros, &op.ranges, dy)))
        }
        Base::SliceAssign(op) => slice_assign(b, &op.tensor, &op.ranges, &op.value, dy),
        Base::Select(op) => one(&op.tensor, b.add_rows(&op.tensor, op.dim, &op.indices, dy)),
        Base::SelectAssign(op) if op.update == IndexingUpdateOp::Add => {
            let rows = b.select(dy, op.dim, &read(&op.indices));
            rows.map(|rows| vec![(op.tensor.id, dy.clone()), (op.value.id, rows)])
        }
        Base::Gather(op) => one(&op.tensor, b.add_elements(&op.tensor, op.dim, &op.indices, dy)),
        Base::Scatter(op) if op.update == IndexingUpdateOp::Add => {
            let values = b.gather(dy, op.dim, &read(&op.indices));
            values.map(|values| vec![(op.tensor.id, dy.clone()), (op.value.id, values)])
        }
        Base::MaskWhere(op) => mask_where(b, &op.tensor, &op.mask, &op.value, dy),
        Base::MaskFill(op) => {
            let kept = b.outside(&read(&op.mask), dy);
            one(&op.tensor, kept.and_then(|kept| b.sum_to(&kept, &op.tensor.shape)))
        }
        Base::RepeatDim(op) => {
            let (before, after) = op.tensor.shape.as_slice().split_at(op.dim);
            let apart = b.reshape(dy, &[before, &[op.times], after].concat());
            let sum = apart.and_then(|apart| b.reduce(&apart, op.dim, Numeric::SumDim));
            one(&op.tensor, sum.and_then(|sum| b.reshape(&sum, &op.tensor.shape)))
        }
        Base::Cat(op) => {
            let mut start = 0;
            let parts = op.tensors.iter().map(|tensor| {
                let end = start + tensor.shape[op.dim];
                let part = b.narrow(dy, op.dim, start, end)?;
                start = end;
                Ok((tensor.id, part))
            });
            parts.collect()
        }
        Base::Cast(op) => one(&op.input, b.cast(dy, op.input.dtype)),
        _ => return None,
    })
}

fn slice_assign(b: &mut Builder, x: &TensorIr, ranges: &[Slice], value: &TensorIr, dy: &TensorIr) -> Parts {
    let zeros = b.zeros_like(value)?;
    let rest = b.slice_assign(dy, ranges, &zeros)?;
    let part = b.slice(dy, ranges)?;
    Ok(vec![(x.id, rest), (value.id, part)])
}

fn mask_where(b: &mut Builder, no: &TensorIr, mask: &TensorIr, yes: &TensorIr, dy: &TensorIr) -> Parts {
    let mask = read(mask);
    let (to_no, to_yes) = (b.outside(&mask, dy)?, b.inside(&mask, dy)?);
    Ok(vec![(no.id, b.sum_to(&to_no, &no.shape)?), (yes.id, b.sum_to(&to_yes, &yes.shape)?)])
}

fn of_numeric(b: &mut Builder, op: &Numeric, dy: &TensorIr) -> Option<Parts> {
    let number = |scalar: &ScalarIr| scalar.elem::<f64>();
    Some(match op {
        Numeric::Add(op) => both(b, op, |_, _, _, _| Ok((dy.clone(), dy.clone()))),
        Numeric::Sub(op) => both(b, op, |b, _, _, _| Ok((dy.clone(), b.neg(dy)?))),
        Numeric::Mul(op) => both(b, op, |b, x, y, _| Ok((b.mul(dy, y)?, b.mul(dy, x)?))),
        // d(x/y) = dx/y - x/y · dy/y
        Numeric::Div(op) => both(b, op, |b, _, y, quotient| {
            let to_x = b.div(dy, y)?;
            let to_y = b.mul(&to_x, quotient)?;
            Ok((to_x, b.neg(&to_y)?))
        }),
        Numeric::AddScalar(op) | Numeric::SubScalar(op) | Numeric::RemScalar(op) => {
            one(&op.lhs, Ok(dy.clone()))
        }
        Numeric::MulScalar(op) => one(&op.lhs, b.mul_scalar(dy, number(&op.rhs))),
        Numeric::DivScalar(op) => one(&op.lhs, b.scalar(dy, number(&op.rhs), Numeric::DivScalar)),
        Numeric::Neg(op) => one(&op.input, b.neg(dy)),
        Numeric::Abs(op) => {
            let sign = b.unary(&read(&op.input), Numeric::Sign);
            one(&op.input, sign.and_then(|sign| b.mul(dy, &sign)))
        }
        Numeric::Full(_) | Numeric::Sign(_) => Ok(vec![]),
        Numeric::Sum(op) => one(&op.input, spread(b, dy, &op.input)),
        Numeric::Mean(op) => {
            let part = b.scalar(dy, op.input.shape.num_elements() as f64, Numeric::DivScalar);
            one(&op.input, part.and_then(|part| spread(b, &part, &op.input)))
        }
        Numeric::SumDim(op) => one(&op.input, b.expand(dy, &op.input.shape)),
        Numeric::SumDims(op) => one(&op.input, b.expand(dy, &op.input.shape)),
        Numeric::MeanDim(op) => {
            let part = b.scalar(dy, op.input.shape[op.axis] as f64, Numeric::DivScalar);
            one(&op.input, part.and_then(|part| b.expand(&part, &op.input.shape)))
        }
        Numeric::MaxDim(op) if op.accumulator_len == 1 => {
            let place = b.arg_reduce(&read(&op.input), op.axis, Numeric::ArgMax);
            one(&op.input, place.and_then(|place| b.add_elements(&op.input, op.axis, &place, dy)))
        }
        Numeric::MinDim(op) if op.accumulator_len == 1 => {
            let place = b.arg_reduce(&read(&op.input), op.axis, Numeric::ArgMin);
            one(&op.input, place.and_then(|place| b.add_elements(&op.input, op.axis, &place, dy)))
        }
        Numeric::MaxDimWithIndices(op) | Numeric::MinDimWithIndices(op) => {
            one(&op.tensor, b.add_elements(&op.tensor, op.dim, &op.out_indices, dy))
        }
        Numeric::Max(op) => one(&op.input, extreme(b, &op.input, dy, true)),
        Numeric::Min(op) => one(&op.input, extreme(b, &op.input, dy, false)),
        Numeric::Clamp(op) => {
            let x = read(&op.tensor);
            let below = b.compare_scalar(&x, number(&op.min), Numeric::LowerElem);
            let kept = below.and_then(|below| b.outside(&below, dy));
            let above = b.compare_scalar(&x, number(&op.max), Numeric::GreaterElem);
            one(&op.tensor, above.and_then(|above| b.outside(&above, &kept?)))
        }
        Numeric::ClampMin(op) => {
            let below = b.compare_scalar(&read(&op.lhs), number(&op.rhs), Numeric::LowerElem);
            one(&op.lhs, below.and_then(|below| b.outside(&below, dy)))
        }
        Numeric::ClampMax(op) => {
            let above = b.compare_scalar(&read(&op.lhs), number(&op.rhs), Numeric::GreaterElem);
            one(&op.lhs, above.and_then(|above| b.outside(&above, dy)))
        }
        Numeric::PowiScalar(op) => one(&op.lhs, power(b, &op.lhs, number(&op.rhs), dy)),
        // The sum from the other end.
        Numeric::CumSum(op) => one(
            &op.input,
            b.flip(dy, &[op.axis]).and_then(|back| {
                let axis = op.axis;
                let sum = b.other(|id| {
                    numeric(back.dtype, Numeric::CumSum(DimOpIr::create(back.clone(), axis, || id)))
                })?;
                b.flip(&sum, &[axis])
            }),
        ),
        Numeric::Pad(op) if matches!(op.mode, PadModeIr::Constant(_)) => {
            let inner = op.padding.iter().zip(op.input.shape.iter());
            let inner: Vec<Slice> = inner.map(|(pad, size)| Slice::from(pad.0..pad.0 + size)).collect();
            one(&op.input, b.slice(dy, &inner))
        }
        _ => return None,
    })
}

/// The gradients of an operation that broadcasts two operands, from a rule that has `x`, `y` and the result.
fn both(
    b: &mut Builder,
    op: &BinaryOpIr,
    rule: impl FnOnce(&mut Builder, &TensorIr, &TensorIr, &TensorIr) -> Fit<(TensorIr, TensorIr)>,
) -> Parts {
    let (to_x, to_y) = rule(b, &read(&op.lhs), &read(&op.rhs), &read(&op.out))?;
    Ok(vec![(op.lhs.id, b.sum_to(&to_x, &op.lhs.shape)?), (op.rhs.id, b.sum_to(&to_y, &op.rhs.shape)?)])
}

/// One element to a whole tensor.
fn spread(b: &mut Builder, dy: &TensorIr, x: &TensorIr) -> Fit<TensorIr> {
    let point = b.reshape(dy, &vec![1; x.shape.rank()])?;
    b.expand(&point, &x.shape)
}

/// To the largest (or smallest) of all elements, the first of equal ones.
fn extreme(b: &mut Builder, x: &TensorIr, dy: &TensorIr, largest: bool) -> Fit<TensorIr> {
    let flat = b.reshape(&read(x), &[x.shape.num_elements()])?;
    let place = b.arg_reduce(&flat, 0, if largest { Numeric::ArgMax } else { Numeric::ArgMin })?;
    let part = b.add_elements(&flat, 0, &place, dy)?;
    b.reshape(&part, &x.shape)
}

/// `n x^(n-1) dy`
fn power(b: &mut Builder, x: &TensorIr, exponent: f64, dy: &TensorIr) -> Fit<TensorIr> {
    if exponent == 0.0 {
        return b.zeros_like(x);
    }
    let less = b.pow_scalar(&read(x), exponent - 1.0)?;
    let slope = b.mul_scalar(&less, exponent)?;
    b.mul(dy, &slope)
}

fn of_float(b: &mut Builder, op: &Float, dy: &TensorIr) -> Option<Parts> {
    Some(match op {
        Float::Exp(op) => one(&op.input, b.mul(dy, &read(&op.out))),
        Float::Log(op) => one(&op.input, b.div(dy, &read(&op.input))),
        Float::Log1p(op) => {
            let more = b.add_scalar(&read(&op.input), 1.0);
            one(&op.input, more.and_then(|more| b.div(dy, &more)))
        }
        // 2/√π · exp(-x²)
        Float::Erf(op) => slope(b, op, dy, |b, x, _| {
            let minus = b.squared(x, -1.0, 0.0)?;
            let bell = b.float(&minus, Float::Exp)?;
            b.mul_scalar(&bell, 2.0 / PI.sqrt())
        }),
        Float::PowfScalar(op) => one(&op.lhs, power(b, &op.lhs, op.rhs.elem(), dy)),
        // y x^(y-1) and x^y log(x)
        Float::Powf(op) => both(b, op, |b, x, y, power| {
            let less = b.add_scalar(y, -1.0)?;
            let (base, exponent) = (x.clone(), less);
            let dtype = x.dtype;
            let shape = dy.shape.to_vec();
            let (base, exponent) = (b.expand(&base, &shape)?, b.expand(&exponent, &shape)?);
            let lower = b.other(|id| {
                OperationIr::Float(dtype, Float::Powf(BinaryOpIr::create(base, exponent, || id)))
            })?;
            let to_x = b.mul(&lower, y)?;
            let log = b.float(x, Float::Log)?;
            let to_y = b.mul(power, &log)?;
            Ok((b.mul(dy, &to_x)?, b.mul(dy, &to_y)?))
        }),
        Float::Sqrt(op) => slope(b, op, dy, |b, _, y| {
            let twice = b.mul_scalar(y, 2.0)?;
            b.float(&twice, Float::Recip)
        }),
        Float::Recip(op) => slope(b, op, dy, |b, _, y| b.squared(y, -1.0, 0.0)),
        Float::Sin(op) => slope(b, op, dy, |b, x, _| b.float(x, Float::Cos)),
        Float::Cos(op) => slope(b, op, dy, |b, x, _| {
            let sine = b.float(x, Float::Sin)?;
            b.neg(&sine)
        }),
        Float::Tan(op) => slope(b, op, dy, |b, _, y| b.squared(y, 1.0, 1.0)),
        Float::Sinh(op) => slope(b, op, dy, |b, x, _| b.float(x, Float::Cosh)),
        Float::Cosh(op) => slope(b, op, dy, |b, x, _| b.float(x, Float::Sinh)),
        Float::Tanh(op) => slope(b, op, dy, |b, _, y| b.squared(y, -1.0, 1.0)),
        Float::ArcSin(op) => slope(b, op, dy, |b, x, _| root_of_square(b, x, -1.0, 1.0)),
        Float::ArcCos(op) => slope(b, op, dy, |b, x, _| {
            let slope = root_of_square(b, x, -1.0, 1.0)?;
            b.neg(&slope)
        }),
        Float::ArcSinh(op) => slope(b, op, dy, |b, x, _| root_of_square(b, x, 1.0, 1.0)),
        Float::ArcCosh(op) => slope(b, op, dy, |b, x, _| root_of_square(b, x, 1.0, -1.0)),
        Float::ArcTan(op) => slope(b, op, dy, |b, x, _| {
            let square = b.squared(x, 1.0, 1.0)?;
            b.float(&square, Float::Recip)
        }),
        Float::ArcTanh(op) => slope(b, op, dy, |b, x, _| {
            let square = b.squared(x, -1.0, 1.0)?;
            b.float(&square, Float::Recip)
        }),
        // atan2(x, y): y/(x² + y²) and -x/(x² + y²)
        Float::ArcTan2(op) => both(b, op, |b, x, y, _| {
            let (x2, y2) = (b.mul(x, x)?, b.mul(y, y)?);
            let radius = b.add(&x2, &y2)?;
            let part = b.div(dy, &radius)?;
            let to_y = b.mul(&part, x)?;
            Ok((b.mul(&part, y)?, b.neg(&to_y)?))
        }),
        Float::Hypot(op) => both(b, op, |b, x, y, length| {
            let part = b.div(dy, length)?;
            Ok((b.mul(&part, x)?, b.mul(&part, y)?))
        }),
        // Steps: flat where there is a slope.
        Float::Round(_) | Float::Floor(_) | Float::Ceil(_) | Float::Trunc(_) | Float::Random(_) => Ok(vec![]),
        Float::Matmul(op) => products(b, &read(&op.lhs), &read(&op.rhs), dy)
            .map(|(to_x, to_y)| vec![(op.lhs.id, to_x), (op.rhs.id, to_y)]),
        _ => return None,
    })
}

/// The gradient of `y = f(x)` element by element, from `f'`.
fn slope(
    b: &mut Builder,
    op: &UnaryOpIr,
    dy: &TensorIr,
    rule: impl FnOnce(&mut Builder, &TensorIr, &TensorIr) -> Fit<TensorIr>,
) -> Parts {
    let slope = rule(b, &read(&op.input), &read(&op.out))?;
    one(&op.input, b.mul(dy, &slope))
}

/// `1/√(sign·x² + more)`
fn root_of_square(b: &mut Builder, x: &TensorIr, sign: f64, more: f64) -> Fit<TensorIr> {
    let square = b.squared(x, sign, more)?;
    let root = b.float(&square, Float::Sqrt)?;
    b.float(&root, Float::Recip)
}

/// `dx = dz yᵀ` and `dy = xᵀ dz` of `z = x y`.
fn products(b: &mut Builder, x: &TensorIr, y: &TensorIr, dz: &TensorIr) -> Fit<(TensorIr, TensorIr)> {
    let (xt, yt) = (b.transpose(x)?, b.transpose(y)?);
    let (to_x, to_y) = (b.matmul(dz, &yt)?, b.matmul(&xt, dz)?);
    Ok((b.sum_to(&to_x, &x.shape)?, b.sum_to(&to_y, &y.shape)?))
}

fn of_activation(b: &mut Builder, op: &Activation, dy: &TensorIr) -> Option<Parts> {
    Some(match op {
        Activation::Relu(op) => one(&op.input, b.paired(&read(&op.out), dy, Activation::ReluBackward)),
        Activation::Gelu(op) => one(&op.input, b.paired(&read(&op.input), dy, Activation::GeluBackward)),
        Activation::Sigmoid(op) => one(&op.input, b.paired(&read(&op.out), dy, Activation::SigmoidBackward)),
        Activation::LogSigmoid(op) => {
            one(&op.input, b.paired(&read(&op.input), dy, Activation::LogSigmoidBackward))
        }
        Activation::LeakyRelu(op) => {
            let negative = b.compare_scalar(&read(&op.lhs), 0.0, Numeric::LowerElem);
            let leak = b.mul_scalar(dy, op.rhs.elem());
            one(&op.lhs, negative.and_then(|negative| b.choose(&negative, &leak?, dy)))
        }
        Activation::PRelu(op) => p_relu(b, op, dy),
        Activation::HardSigmoid(op) => {
            let (x, alpha) = (read(&op.tensor), op.alpha.elem::<f64>());
            let part = b.mul_scalar(dy, alpha);
            // Between the two ends the result is within 0 and 1.
            let low = b.compare_scalar(&read(&op.out), 0.0, Numeric::LowerEqualElem);
            let part = low.and_then(|low| b.outside(&low, &part?));
            let high = b.compare_scalar(&read(&op.out), 1.0, Numeric::GreaterEqualElem);
            one(&x, high.and_then(|high| b.outside(&high, &part?)))
        }
        // y (dy - Σ y dy)
        Activation::Softmax(op) => one(&op.input, softmax(b, &read(&op.out), op.axis, dy)),
        Activation::Softmin(op) => {
            one(&op.input, softmax(b, &read(&op.out), op.axis, dy).and_then(|part| b.neg(&part)))
        }
        // dy - softmax(x) Σ dy
        Activation::LogSoftmax(op) => one(&op.input, log_softmax(b, &read(&op.out), op.axis, dy)),
        _ => return None,
    })
}

fn softmax(b: &mut Builder, y: &TensorIr, axis: usize, dy: &TensorIr) -> Fit<TensorIr> {
    let product = b.mul(y, dy)?;
    let sum = b.reduce(&product, axis, Numeric::SumDim)?;
    let rest = b.sub(dy, &sum)?;
    b.mul(y, &rest)
}

fn log_softmax(b: &mut Builder, y: &TensorIr, axis: usize, dy: &TensorIr) -> Fit<TensorIr> {
    let probability = b.float(y, Float::Exp)?;
    let sum = b.reduce(dy, axis, Numeric::SumDim)?;
    let share = b.mul(&probability, &sum)?;
    b.sub(dy, &share)
}

/// `alpha` is one number or one a channel, the second axis.
fn p_relu(b: &mut Builder, op: &BinaryOpIr, dy: &TensorIr) -> Parts {
    let (x, alpha) = (read(&op.lhs), read(&op.rhs));
    let mut shape = vec![1; x.shape.rank()];
    if alpha.shape.num_elements() > 1 {
        shape[1] = alpha.shape.num_elements();
    }
    let slopes = b.reshape(&alpha, &shape)?;
    let negative = b.compare_scalar(&x, 0.0, Numeric::LowerElem)?;
    let leak = b.mul(dy, &slopes)?;
    let to_x = b.choose(&negative, &leak, dy)?;
    let product = b.mul(dy, &x)?;
    let to_alpha = b.inside(&negative, &product)?;
    let to_alpha = b.sum_to(&to_alpha, &shape)?;
    Ok(vec![(x.id, to_x), (alpha.id, b.reshape(&to_alpha, &alpha.shape)?)])
}

fn of_module(b: &mut Builder, op: &Module, dy: &TensorIr) -> Option<Parts> {
    Some(match op {
        Module::Linear(op) => {
            let (x, weight) = (read(&op.x), read(&op.weight));
            let mut parts = vec![
                (
                    x.id,
                    b.module(|id| {
                        Module::LinearXBackward(LinearXBackwardOpIr::create(
                            weight.clone(),
                            dy.clone(),
                            || id,
                        ))
                    }),
                ),
                (
                    weight.id,
                    b.module(|id| {
                        Module::LinearWeightBackward(LinearWeightBackwardOpIr::create(x, dy.clone(), || id))
                    }),
                ),
            ];
            parts.extend(op.bias.as_ref().map(|bias| {
                (
                    bias.id,
                    b.module(|id| {
                        Module::LinearBiasBackward(LinearBiasBackwardOpIr::create(dy.clone(), || id))
                    }),
                )
            }));
            collected(parts)
        }
        Module::Embedding(op) => {
            let (weights, indices) = (read(&op.weights), read(&op.indices));
            one(
                &op.weights,
                b.module(|id| {
                    Module::EmbeddingBackward(EmbeddingBackwardOpIr::create(
                        weights,
                        dy.clone(),
                        indices,
                        || id,
                    ))
                }),
            )
        }
        Module::LayerNorm(op) => layer_norm(b, op, dy),
        Module::BatchNorm(op) => batch_norm(b, op, dy),
        Module::Attention(op) => attention(b, op, dy),
        Module::Conv1d(op) => {
            let (x, weight, options) = (read(&op.x), read(&op.weight), &op.options);
            let to_x = b.module(|id| {
                Module::Conv1dXBackward(Conv1dXBackwardOpIr::create(
                    x.clone(),
                    weight.clone(),
                    dy.clone(),
                    options.clone(),
                    || id,
                ))
            });
            let to_weight = b.module(|id| {
                Module::Conv1dWeightBackward(Conv1dWeightBackwardOpIr::create(
                    x.clone(),
                    weight.clone(),
                    dy.clone(),
                    options.clone(),
                    || id,
                ))
            });
            let mut parts = vec![(x.id, to_x), (weight.id, to_weight)];
            parts.extend(op.bias.as_ref().map(|bias| {
                (
                    bias.id,
                    b.module(|id| {
                        Module::Conv1dBiasBackward(Conv1dBiasBackwardOpIr::create(
                            x.clone(),
                            read(bias),
                            dy.clone(),
                            || id,
                        ))
                    }),
                )
            }));
            collected(parts)
        }
        Module::Conv2d(op) => {
            let (x, weight, options) = (read(&op.x), read(&op.weight), &op.options);
            let to_x = b.module(|id| {
                Module::Conv2dXBackward(Conv2dXBackwardOpIr::create(
                    x.clone(),
                    weight.clone(),
                    dy.clone(),
                    options.clone(),
                    || id,
                ))
            });
            let to_weight = b.module(|id| {
                Module::Conv2dWeightBackward(Conv2dWeightBackwardOpIr::create(
                    x.clone(),
                    weight.clone(),
                    dy.clone(),
                    options.clone(),
                    || id,
                ))
            });
            let mut parts = vec![(x.id, to_x), (weight.id, to_weight)];
            parts.extend(op.bias.as_ref().map(|bias| {
                (
                    bias.id,
                    b.module(|id| {
                        Module::Conv2dBiasBackward(Conv2dBiasBackwardOpIr::create(
                            x.clone(),
                            read(bias),
                            dy.clone(),
                            || id,
                        ))
                    }),
                )
            }));
            collected(parts)
        }
        // The transpose of a transposed convolution is the convolution.
        Module::ConvTranspose1d(op) => {
            let (x, weight, o) = (read(&op.x), read(&op.weight), &op.options);
            let pads = o.padding.map(|pad| (pad, pad));
            let options =
                Conv1dOptionsIr { stride: o.stride, padding: pads, dilation: o.dilation, groups: o.groups };
            let to_x = b.module(|id| {
                Module::Conv1d(Conv1dOpIr::create(dy.clone(), weight.clone(), None, options, || id))
            });
            let to_weight = b.module(|id| {
                Module::ConvTranspose1dWeightBackward(ConvTranspose1dWeightBackwardOpIr::create(
                    x.clone(),
                    weight.clone(),
                    dy.clone(),
                    o.clone(),
                    || id,
                ))
            });
            let mut parts = vec![(x.id, to_x), (weight.id, to_weight)];
            parts.extend(op.bias.as_ref().map(|bias| {
                (
                    bias.id,
                    b.module(|id| {
                        Module::ConvTranspose1dBiasBackward(ConvTranspose1dBiasBackwardOpIr::create(
                            x.clone(),
                            read(bias),
                            dy.clone(),
                            || id,
                        ))
                    }),
                )
            }));
            collected(parts)
        }
        Module::ConvTranspose2d(op) => {
            let (x, weight, o) = (read(&op.x), read(&op.weight), &op.options);
            let pads = o.padding.map(|pad| (pad, pad));
            let options =
                Conv2dOptionsIr { stride: o.stride, padding: pads, dilation: o.dilation, groups: o.groups };
            let to_x = b.module(|id| {
                Module::Conv2d(Conv2dOpIr::create(dy.clone(), weight.clone(), None, options, || id))
            });
            let to_weight = b.module(|id| {
                Module::ConvTranspose2dWeightBackward(ConvTranspose2dWeightBackwardOpIr::create(
                    x.clone(),
                    weight.clone(),
                    dy.clone(),
                    o.clone(),
                    || id,
                ))
            });
            let mut parts = vec![(x.id, to_x), (weight.id, to_weight)];
            parts.extend(op.bias.as_ref().map(|bias| {
                (
                    bias.id,
                    b.module(|id| {
                        Module::ConvTranspose2dBiasBackward(ConvTranspose2dBiasBackwardOpIr::create(
                            x.clone(),
                            read(bias),
                            dy.clone(),
                            || id,
                        ))
                    }),
                )
            }));
            collected(parts)
        }
        Module::AvgPool1d(op) => one(
            &op.x,
            b.module(|id| {
                Module::AvgPool1dBackward(AvgPool1dBackwardOpIr::create(
                    read(&op.x),
                    dy.clone(),
                    op.kernel_size,
                    op.stride,
                    op.padding,
                    op.count_include_pad,
                    op.ceil_mode,
                    || id,
                ))
            }),
        ),
        Module::AvgPool2d(op) => one(
            &op.x,
            b.module(|id| {
                Module::AvgPool2dBackward(AvgPool2dBackwardOpIr::create(
                    read(&op.x),
                    dy.clone(),
                    op.kernel_size,
                    op.stride,
                    op.padding,
                    op.count_include_pad,
                    op.ceil_mode,
                    || id,
                ))
            }),
        ),
        Module::AdaptiveAvgPool1d(op) => one(
            &op.x,
            b.module(|id| {
                Module::AdaptiveAvgPool1dBackward(AdaptiveAvgPool1dBackwardOpIr::create(
                    read(&op.x),
                    dy.clone(),
                    || id,
                ))
            }),
        ),
        Module::AdaptiveAvgPool2d(op) => one(
            &op.x,
            b.module(|id| {
                Module::AdaptiveAvgPool2dBackward(AdaptiveAvgPool2dBackwardOpIr::create(
                    read(&op.x),
                    dy.clone(),
                    || id,
                ))
            }),
        ),
        // The places of the maxima, by pooling once more.
        Module::MaxPool1d(op) => {
            let (x, places) = (read(&op.x), b.provided(&op.out.shape, DType::I64));
            let again = b.provided(&op.out.shape, op.out.dtype);
            let mut ids = [again.id, places.id].into_iter();
            let pooled = MaxPool1dWithIndicesOpIr::create(
                x.clone(),
                op.kernel_size,
                op.stride,
                op.padding,
                op.dilation,
                op.ceil_mode,
                DType::I64,
                || ids.next().unwrap_or(again.id),
            );
            let added = b.push(OperationIr::Module(Module::MaxPool1dWithIndices(pooled)));
            one(
                &op.x,
                added.and_then(|_| {
                    b.module(|id| {
                        Module::MaxPool1dWithIndicesBackward(MaxPool1dWithIndicesBackwardOpIr::create(
                            x,
                            dy.clone(),
                            places,
                            op.kernel_size,
                            op.stride,
                            op.padding,
                            op.dilation,
                            op.ceil_mode,
                            || id,
                        ))
                    })
                }),
            )
        }
        Module::MaxPool2d(op) => {
            let (x, places) = (read(&op.x), b.provided(&op.out.shape, DType::I64));
            let again = b.provided(&op.out.shape, op.out.dtype);
            let mut ids = [again.id, places.id].into_iter();
            let pooled = MaxPool2dWithIndicesOpIr::create(
                x.clone(),
                op.kernel_size,
                op.stride,
                op.padding,
                op.dilation,
                op.ceil_mode,
                DType::I64,
                || ids.next().unwrap_or(again.id),
            );
            let added = b.push(OperationIr::Module(Module::MaxPool2dWithIndices(pooled)));
            one(
                &op.x,
                added.and_then(|_| {
                    b.module(|id| {
                        Module::MaxPool2dWithIndicesBackward(MaxPool2dWithIndicesBackwardOpIr::create(
                            x,
                            dy.clone(),
                            places,
                            op.kernel_size,
                            op.stride,
                            op.padding,
                            op.dilation,
                            op.ceil_mode,
                            || id,
                        ))
                    })
                }),
            )
        }
        Module::Interpolate(op) => one(
            &op.x,
            b.module(|id| {
                Module::InterpolateBackward(InterpolateBackwardOpIr::create(
                    read(&op.x),
                    dy.clone(),
                    op.output_size,
                    op.options.clone(),
                    || id,
                ))
            }),
        ),
        _ => return None,
    })
}

fn collected(parts: Vec<(TensorId, Fit<TensorIr>)>) -> Parts {
    parts.into_iter().map(|(operand, part)| Ok((operand, part?))).collect()
}

/// With `z = (x - mean)/σ` over the last axis: `dx = (dz - mean(dz) - z mean(dz z))/σ`.
fn layer_norm(b: &mut Builder, op: &LayerNormOpIr, dy: &TensorIr) -> Parts {
    let (x, gamma) = (read(&op.input), read(&op.gamma));
    let last = x.shape.rank() - 1;
    let mean = b.reduce(&x, last, Numeric::MeanDim)?;
    let centred = b.sub(&x, &mean)?;
    let square = b.mul(&centred, &centred)?;
    let variance = b.reduce(&square, last, Numeric::MeanDim)?;
    let variance = b.add_scalar(&variance, op.epsilon.elem())?;
    let deviation = b.float(&variance, Float::Sqrt)?;
    let z = b.div(&centred, &deviation)?;
    let dz = b.mul(dy, &gamma)?;
    let product = b.mul(&dz, &z)?;
    let (level, tilt) = (b.reduce(&dz, last, Numeric::MeanDim)?, b.reduce(&product, last, Numeric::MeanDim)?);
    let tilted = b.mul(&z, &tilt)?;
    let rest = b.sub(&dz, &level)?;
    let rest = b.sub(&rest, &tilted)?;
    let to_gamma = b.mul(dy, &z)?;
    let mut parts = vec![(x.id, b.div(&rest, &deviation)?), (gamma.id, b.sum_to(&to_gamma, &gamma.shape)?)];
    if let Some(beta) = &op.beta {
        parts.push((beta.id, b.sum_to(dy, &beta.shape)?));
    }
    Ok(parts)
}

/// By stored statistics: `y = (x - mean)/√(variance + ε) · gamma + beta` a channel, the second axis.
fn batch_norm(b: &mut Builder, op: &BatchNormOpIr, dy: &TensorIr) -> Parts {
    let x = read(&op.x);
    let mut shape = vec![1; x.shape.rank()];
    shape[1] = x.shape[1];
    let channels = |b: &mut Builder, part: &TensorIr| b.reshape(&read(part), &shape);
    let (gamma, mean) = (channels(b, &op.gamma)?, channels(b, &op.mean)?);
    let variance = channels(b, &op.variance)?;
    let variance = b.add_scalar(&variance, op.epsilon.elem())?;
    let deviation = b.float(&variance, Float::Sqrt)?;
    let centred = b.sub(&x, &mean)?;
    let z = b.div(&centred, &deviation)?;
    let scale = b.div(&gamma, &deviation)?;
    let to_x = b.mul(dy, &scale)?;
    let to_gamma = b.mul(dy, &z)?;
    let to_mean = b.neg(&to_x)?;
    // -(x - mean)/2 · (variance + ε)^(-3/2) · gamma
    let to_variance = b.mul(&to_x, &centred)?;
    let to_variance = b.div(&to_variance, &variance)?;
    let to_variance = b.mul_scalar(&to_variance, -0.5)?;
    let mut parts = vec![(x.id, to_x)];
    for (operand, part) in
        [(&op.gamma, &to_gamma), (&op.beta, dy), (&op.mean, &to_mean), (&op.variance, &to_variance)]
    {
        let sum = b.sum_to(part, &shape)?;
        parts.push((operand.id, b.reshape(&sum, &operand.shape)?));
    }
    Ok(parts)
}

/// Through `softmax(cap tanh(q kᵀ scale / cap) + bias) v`, whose weights are computed once more.
fn attention(b: &mut Builder, op: &AttentionOpIr, dy: &TensorIr) -> Parts {
    let (q, k, v) = (read(&op.query), read(&op.key), read(&op.value));
    let scale = op.options.scale.map_or(1.0 / (q.shape[3] as f64).sqrt(), |scale| scale.elem());
    let kt = b.transpose(&k)?;
    let products_of_rows = b.matmul(&q, &kt)?;
    let mut scores = b.mul_scalar(&products_of_rows, scale)?;
    let mut bent = None;
    if let Some(cap) = op.options.softcap {
        let cap: f64 = cap.elem();
        let inner = b.mul_scalar(&scores, 1.0 / cap)?;
        let tanh = b.float(&inner, Float::Tanh)?;
        scores = b.mul_scalar(&tanh, cap)?;
        bent = Some(tanh);
    }
    let lowest = b.full(f64::NEG_INFINITY, &[1, 1, 1, 1], scores.dtype)?;
    if let Some(mask) = &op.mask {
        scores = b.choose(&read(mask), &lowest, &scores)?;
    }
    if op.options.is_causal {
        let (queries, keys) = (q.shape[2], k.shape[2]);
        let later = |at: usize| (at % keys) as i64 > (at / keys) as i64 + keys as i64 - queries as i64;
        let mask = TensorData::new((0..queries * keys).map(later).collect::<Vec<_>>(), [1, 1, queries, keys]);
        let mask = b.constant(mask);
        scores = b.choose(&mask, &lowest, &scores)?;
    }
    if let Some(bias) = &op.attn_bias {
        scores = b.add(&scores, &read(bias))?;
    }
    let weights = b.along(&scores, 3, Activation::Softmax)?;
    let (to_weights, to_v) = products(b, &weights, &v, dy)?;
    let mut to_scores = softmax(b, &weights, 3, &to_weights)?;
    let mut parts = vec![(v.id, to_v)];
    if let Some(bias) = &op.attn_bias {
        parts.push((bias.id, b.sum_to(&to_scores, &bias.shape)?));
    }
    if let Some(tanh) = bent {
        let slope = b.squared(&tanh, -1.0, 1.0)?;
        to_scores = b.mul(&to_scores, &slope)?;
    }
    let to_products = b.mul_scalar(&to_scores, scale)?;
    let to_k = b.transpose(&to_products)?;
    parts.push((q.id, b.matmul(&to_products, &k)?));
    parts.push((k.id, b.matmul(&to_k, &q)?));
    Ok(parts)
}
