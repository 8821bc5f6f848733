//! The operators: what each of them is in Burn's operations.

use std::f64::consts::PI;

use burn::backend::ir::{
    ActivationOperationIr, AvgPool1dOpIr, AvgPool2dOpIr, BaseOperationIr, BatchNormOpIr, BinaryOpIr,
    BoolOperationIr, Conv1dOpIr, Conv1dOptionsIr, Conv2dOpIr, Conv2dOptionsIr, ConvTranspose1dOpIr,
    ConvTranspose1dOptionsIr, ConvTranspose2dOpIr, ConvTranspose2dOptionsIr, DimOpIr, FloatOperationIr,
    HardSigmoidOpIr, LayerNormOpIr, LinearOpIr, MaxPool1dOpIr, MaxPool2dOpIr, ModuleOperationIr,
    NumericOperationIr, OperationIr, PadModeIr, PadOpIr, ReduceDimOpIr, RepeatDimOpIr, ScalarIr, ScalarOpIr,
    TensorIr, UnaryOpIr,
};
use burn::tensor::{DType, Slice, TensorData};

use super::import::{Importer, find};
use super::proto::{NodeProto, data_type};
use super::tensor::graph_type;
use crate::builder::{Fit, base, broadcast};

/// Adds a node's operations to the graph; its results.
pub type Rule = fn(&mut Importer, &NodeProto) -> Fit<Vec<TensorIr>>;

/// What is done with an operator.
pub fn rule(domain: &str, operator: &str) -> Option<Rule> {
    let standard = domain.is_empty() || domain == "ai.onnx";
    TABLE.iter().find(|(name, _)| standard && *name == operator).map(|(_, rule)| *rule)
}

/// The names of all operators that are read.
pub fn known_operators() -> Vec<&'static str> {
    TABLE.iter().map(|(name, _)| *name).collect()
}

const TABLE: &[(&str, Rule)] = &[
    ("Abs", |c, n| unary(c, n, NumericOperationIr::Abs)),
    ("Acos", |c, n| float(c, n, FloatOperationIr::ArcCos)),
    ("Acosh", |c, n| float(c, n, FloatOperationIr::ArcCosh)),
    ("Add", |c, n| arithmetic(c, n, NumericOperationIr::Add, NumericOperationIr::AddScalar, true)),
    ("And", |c, n| logic(c, n, BoolOperationIr::And)),
    ("ArgMax", |c, n| arg_reduce(c, n, NumericOperationIr::ArgMax)),
    ("ArgMin", |c, n| arg_reduce(c, n, NumericOperationIr::ArgMin)),
    ("Asin", |c, n| float(c, n, FloatOperationIr::ArcSin)),
    ("Asinh", |c, n| float(c, n, FloatOperationIr::ArcSinh)),
    ("Atan", |c, n| float(c, n, FloatOperationIr::ArcTan)),
    ("Atanh", |c, n| float(c, n, FloatOperationIr::ArcTanh)),
    ("AveragePool", average_pool),
    ("BatchNormalization", batch_norm),
    ("Cast", cast),
    ("CastLike", cast_like),
    ("Ceil", |c, n| float(c, n, FloatOperationIr::Ceil)),
    ("Clip", clip),
    ("Concat", concat),
    ("Constant", constant),
    ("ConstantOfShape", constant_of_shape),
    ("Conv", conv),
    ("ConvTranspose", conv_transpose),
    ("Cos", |c, n| float(c, n, FloatOperationIr::Cos)),
    ("Cosh", |c, n| float(c, n, FloatOperationIr::Cosh)),
    ("CumSum", cum_sum),
    ("DequantizeLinear", dequantize),
    ("Div", |c, n| arithmetic(c, n, NumericOperationIr::Div, NumericOperationIr::DivScalar, false)),
    ("Dropout", dropout),
    ("Elu", elu),
    ("Equal", equal),
    ("Erf", |c, n| float(c, n, FloatOperationIr::Erf)),
    ("Exp", |c, n| float(c, n, FloatOperationIr::Exp)),
    ("Expand", expand),
    ("Flatten", flatten),
    ("Floor", |c, n| float(c, n, FloatOperationIr::Floor)),
    ("Gather", gather),
    ("GatherElements", gather_elements),
    ("Gelu", gelu),
    ("Gemm", gemm),
    ("GlobalAveragePool", |c, n| global_pool(c, n, NumericOperationIr::MeanDim)),
    ("GlobalMaxPool", |c, n| global_pool(c, n, NumericOperationIr::MaxDim)),
    ("Greater", |c, n| compare(c, n, NumericOperationIr::Greater, NumericOperationIr::GreaterElem)),
    ("GreaterOrEqual", |c, n| {
        compare(c, n, NumericOperationIr::GreaterEqual, NumericOperationIr::GreaterEqualElem)
    }),
    ("HardSigmoid", |c, n| hard_sigmoid(c, n).map(|y| vec![y])),
    ("HardSwish", hard_swish),
    ("Identity", |c, n| Ok(vec![c.input(n, 0)?])),
    ("LayerNormalization", layer_norm),
    ("LeakyRelu", leaky_relu),
    ("Less", |c, n| compare(c, n, NumericOperationIr::Lower, NumericOperationIr::LowerElem)),
    ("LessOrEqual", |c, n| compare(c, n, NumericOperationIr::LowerEqual, NumericOperationIr::LowerEqualElem)),
    ("Log", |c, n| float(c, n, FloatOperationIr::Log)),
    ("LogSoftmax", |c, n| softmax(c, n, ActivationOperationIr::LogSoftmax)),
    ("MatMul", mat_mul),
    ("Max", |c, n| extreme(c, n, NumericOperationIr::Greater, NumericOperationIr::ClampMin)),
    ("MaxPool", max_pool),
    ("Mean", mean),
    ("Min", |c, n| extreme(c, n, NumericOperationIr::Lower, NumericOperationIr::ClampMax)),
    ("Mod", modulo),
    ("Mul", |c, n| arithmetic(c, n, NumericOperationIr::Mul, NumericOperationIr::MulScalar, true)),
    ("Neg", |c, n| unary(c, n, NumericOperationIr::Neg)),
    ("Not", not),
    ("Or", |c, n| logic(c, n, BoolOperationIr::Or)),
    ("PRelu", p_relu),
    ("Pad", pad),
    ("Pow", pow),
    ("QuantizeLinear", quantize),
    ("Range", range),
    ("Reciprocal", |c, n| float(c, n, FloatOperationIr::Recip)),
    ("ReduceL2", reduce_l2),
    ("ReduceMax", |c, n| reduce(c, n, NumericOperationIr::MaxDim, 18)),
    ("ReduceMean", |c, n| reduce(c, n, NumericOperationIr::MeanDim, 18)),
    ("ReduceMin", |c, n| reduce(c, n, NumericOperationIr::MinDim, 18)),
    ("ReduceProd", |c, n| reduce(c, n, NumericOperationIr::ProdDim, 18)),
    ("ReduceSum", |c, n| reduce(c, n, NumericOperationIr::SumDim, 13)),
    ("Relu", |c, n| activation(c, n, ActivationOperationIr::Relu)),
    ("Reshape", reshape),
    ("Round", |c, n| float(c, n, FloatOperationIr::Round)),
    ("Shape", shape),
    ("Sigmoid", |c, n| activation(c, n, ActivationOperationIr::Sigmoid)),
    ("Sign", |c, n| unary(c, n, NumericOperationIr::Sign)),
    ("Sin", |c, n| float(c, n, FloatOperationIr::Sin)),
    ("Sinh", |c, n| float(c, n, FloatOperationIr::Sinh)),
    ("Size", size),
    ("Slice", slice),
    ("Softmax", |c, n| softmax(c, n, ActivationOperationIr::Softmax)),
    ("Softplus", softplus),
    ("Split", split),
    ("Sqrt", |c, n| float(c, n, FloatOperationIr::Sqrt)),
    ("Squeeze", squeeze),
    ("Sub", |c, n| arithmetic(c, n, NumericOperationIr::Sub, NumericOperationIr::SubScalar, false)),
    ("Sum", |c, n| Ok(vec![sum(c, n)?])),
    ("Tan", |c, n| float(c, n, FloatOperationIr::Tan)),
    ("Tanh", |c, n| float(c, n, FloatOperationIr::Tanh)),
    ("Tile", tile),
    ("Transpose", transpose),
    ("Trilu", trilu),
    ("Unsqueeze", unsqueeze),
    ("Where", choose),
    ("Xor", |c, n| logic(c, n, BoolOperationIr::Xor)),
];

// Attributes.

fn int(node: &NodeProto, name: &str, default: i64) -> i64 {
    find(node, name).map_or(default, |attribute| attribute.i)
}

fn real(node: &NodeProto, name: &str, default: f32) -> f64 {
    find(node, name).map_or(default, |attribute| attribute.f).into()
}

fn text<'n>(node: &'n NodeProto, name: &str, default: &'n str) -> &'n str {
    find(node, name).and_then(|attribute| std::str::from_utf8(&attribute.s).ok()).unwrap_or(default)
}

/// Whole numbers that are not negative, of which there have to be `count`.
fn sizes(node: &NodeProto, name: &str, count: usize, default: usize) -> Fit<Vec<usize>> {
    let Some(found) = find(node, name) else { return Ok(vec![default; count]) };
    let sizes: Option<Vec<usize>> = found.ints.iter().map(|&n| usize::try_from(n).ok()).collect();
    sizes.filter(|sizes| sizes.len() == count).ok_or_else(|| format!("has {name} {:?}", found.ints))
}

/// An axis counted from the front; `rank` itself is allowed where `end` is.
fn axis_within(axis: i64, rank: usize) -> Fit<usize> {
    let from_front = if axis < 0 { axis.checked_add(rank as i64) } else { Some(axis) };
    from_front
        .and_then(|axis| usize::try_from(axis).ok())
        .filter(|&axis| axis < rank)
        .ok_or_else(|| format!("there is no axis {axis} of {rank}"))
}

fn axis_of(node: &NodeProto, default: i64, x: &TensorIr) -> Fit<usize> {
    axis_within(int(node, "axis", default), x.shape.rank())
}

// Element by element.

fn unary(c: &mut Importer, n: &NodeProto, kind: fn(UnaryOpIr) -> NumericOperationIr) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    Ok(vec![c.builder.unary(&x, kind)?])
}

fn float(c: &mut Importer, n: &NodeProto, kind: fn(UnaryOpIr) -> FloatOperationIr) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    Ok(vec![c.builder.float(&x, kind)?])
}

fn activation(
    c: &mut Importer,
    n: &NodeProto,
    kind: fn(UnaryOpIr) -> ActivationOperationIr,
) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    Ok(vec![c.builder.activation(&x, kind)?])
}

/// The number of an operand, where it is one that is known and does not enlarge the other.
fn lone_number(c: &Importer, operand: &TensorIr, other: &TensorIr) -> Option<f64> {
    // A pair of constants is computed at once either way.
    c.number(operand)
        .filter(|_| operand.shape.rank() <= other.shape.rank() && c.builder.value(other).is_none())
}

fn arithmetic(
    c: &mut Importer,
    n: &NodeProto,
    kind: fn(BinaryOpIr) -> NumericOperationIr,
    by_number: fn(ScalarOpIr) -> NumericOperationIr,
    commutes: bool,
) -> Fit<Vec<TensorIr>> {
    let (x, y) = (c.input(n, 0)?, c.input(n, 1)?);
    let result = if let Some(number) = lone_number(c, &y, &x) {
        c.builder.scalar(&x, number, by_number)
    } else if let Some(number) = lone_number(c, &x, &y).filter(|_| commutes) {
        c.builder.scalar(&y, number, by_number)
    } else {
        c.builder.binary(&x, &y, kind)
    };
    Ok(vec![result?])
}

fn pow(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, y) = (c.input(n, 0)?, c.input(n, 1)?);
    if !x.dtype.is_float() {
        let y = c.builder.cast(&y, x.dtype)?;
        return Ok(vec![c.builder.binary(&x, &y, NumericOperationIr::Powi)?]);
    }
    if let Some(number) = lone_number(c, &y, &x) {
        return Ok(vec![c.builder.pow_scalar(&x, number)?]);
    }
    let shape = broadcast(&x.shape, &y.shape)?;
    let y = c.builder.cast(&y, x.dtype)?;
    let (x, y) = (c.builder.expand(&x, &shape)?, c.builder.expand(&y, &shape)?);
    let dtype = x.dtype;
    let power = |id| OperationIr::Float(dtype, FloatOperationIr::Powf(BinaryOpIr::create(x, y, || id)));
    Ok(vec![c.builder.other(power)?])
}

fn modulo(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    if int(n, "fmod", 0) != 0 {
        return Err("remainders with the sign of the dividend (fmod) are not known".into());
    }
    arithmetic(c, n, NumericOperationIr::Rem, NumericOperationIr::RemScalar, false)
}

/// `Max` (`better` is greater) or `Min` of any number of tensors.
fn extreme(
    c: &mut Importer,
    n: &NodeProto,
    better: fn(BinaryOpIr) -> NumericOperationIr,
    by_number: fn(ScalarOpIr) -> NumericOperationIr,
) -> Fit<Vec<TensorIr>> {
    let operands = c.all(n)?;
    let (first, others) = operands.split_first().ok_or("lacks inputs")?;
    let mut best = first.clone();
    for other in others {
        best = match lone_number(c, other, &best) {
            Some(number) => c.builder.scalar(&best, number, by_number)?,
            None => {
                let is_better = c.builder.compare(&best, other, better)?;
                c.builder.choose(&is_better, &best, other)?
            }
        };
    }
    Ok(vec![best])
}

fn sum(c: &mut Importer, n: &NodeProto) -> Fit<TensorIr> {
    let operands = c.all(n)?;
    let (first, others) = operands.split_first().ok_or("lacks inputs")?;
    others.iter().try_fold(first.clone(), |sum, other| c.builder.add(&sum, other))
}

fn mean(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let sum = sum(c, n)?;
    Ok(vec![c.builder.scalar(&sum, n.input.len() as f64, NumericOperationIr::DivScalar)?])
}

fn clip(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let bound = |c: &mut Importer, name: &str, at: usize| -> Fit<Option<f64>> {
        match (find(n, name), c.maybe(n, at)?) {
            (Some(attribute), _) => Ok(Some(attribute.f.into())),
            (None, Some(tensor)) => {
                c.number(&tensor).map(Some).ok_or_else(|| format!("its {name} depends on the inputs"))
            }
            (None, None) => Ok(None),
        }
    };
    let result = match (bound(c, "min", 1)?, bound(c, "max", 2)?) {
        (Some(min), Some(max)) => c.builder.clamp(&x, min, max)?,
        (Some(min), None) => c.builder.scalar(&x, min, NumericOperationIr::ClampMin)?,
        (None, Some(max)) => c.builder.scalar(&x, max, NumericOperationIr::ClampMax)?,
        (None, None) => x,
    };
    Ok(vec![result])
}

fn leaky_relu(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, slope) = (c.input(n, 0)?, real(n, "alpha", 0.01));
    let leak = |id| {
        let operation = ScalarOpIr::create(x, ScalarIr::Float(slope), || id);
        OperationIr::Activation(ActivationOperationIr::LeakyRelu(operation))
    };
    Ok(vec![c.builder.other(leak)?])
}

fn p_relu(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, slope) = (c.input(n, 0)?, c.input(n, 1)?);
    let negative = c.builder.compare_scalar(&x, 0.0, NumericOperationIr::LowerElem)?;
    let scaled = c.builder.mul(&x, &slope)?;
    Ok(vec![c.builder.choose(&negative, &scaled, &x)?])
}

fn elu(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let positive = c.builder.compare_scalar(&x, 0.0, NumericOperationIr::GreaterElem)?;
    let power = c.builder.float(&x, FloatOperationIr::Exp)?;
    let below = c.builder.add_scalar(&power, -1.0)?;
    let below = c.builder.mul_scalar(&below, real(n, "alpha", 1.0))?;
    Ok(vec![c.builder.choose(&positive, &x, &below)?])
}

/// `log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))`
fn softplus(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let positive = c.builder.activation(&x, ActivationOperationIr::Relu)?;
    let size = c.builder.unary(&x, NumericOperationIr::Abs)?;
    let minus = c.builder.unary(&size, NumericOperationIr::Neg)?;
    let power = c.builder.float(&minus, FloatOperationIr::Exp)?;
    let rest = c.builder.float(&power, FloatOperationIr::Log1p)?;
    Ok(vec![c.builder.add(&positive, &rest)?])
}

fn hard_sigmoid(c: &mut Importer, n: &NodeProto) -> Fit<TensorIr> {
    let x = c.input(n, 0)?;
    hard_sigmoid_of(c, &x, real(n, "alpha", 0.2), real(n, "beta", 0.5))
}

fn hard_sigmoid_of(c: &mut Importer, x: &TensorIr, alpha: f64, beta: f64) -> Fit<TensorIr> {
    let [alpha, beta] = [alpha, beta].map(ScalarIr::Float);
    c.builder.other(|id| {
        let operation = HardSigmoidOpIr::create(x.clone(), alpha, beta, || id);
        OperationIr::Activation(ActivationOperationIr::HardSigmoid(operation))
    })
}

fn hard_swish(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let gate = hard_sigmoid_of(c, &x, 1.0 / 6.0, 0.5)?;
    Ok(vec![c.builder.mul(&x, &gate)?])
}

fn gelu(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    if text(n, "approximate", "none") == "none" {
        return Ok(vec![c.builder.activation(&x, ActivationOperationIr::Gelu)?]);
    }
    // x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
    let cube = c.builder.pow_scalar(&x, 3.0)?;
    let bent = c.builder.mul_scalar(&cube, 0.044715)?;
    let bent = c.builder.add(&x, &bent)?;
    let bent = c.builder.mul_scalar(&bent, (2.0 / PI).sqrt())?;
    let gate = c.builder.float(&bent, FloatOperationIr::Tanh)?;
    let gate = c.builder.add_scalar(&gate, 1.0)?;
    let half = c.builder.mul_scalar(&x, 0.5)?;
    Ok(vec![c.builder.mul(&half, &gate)?])
}

// Truth values.

fn compare(
    c: &mut Importer,
    n: &NodeProto,
    kind: fn(BinaryOpIr) -> NumericOperationIr,
    by_number: fn(ScalarOpIr) -> NumericOperationIr,
) -> Fit<Vec<TensorIr>> {
    let (x, y) = (c.input(n, 0)?, c.input(n, 1)?);
    Ok(vec![match lone_number(c, &y, &x) {
        Some(number) => c.builder.compare_scalar(&x, number, by_number)?,
        None => c.builder.compare(&x, &y, kind)?,
    }])
}

fn equal(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, y) = (c.input(n, 0)?, c.input(n, 1)?);
    Ok(vec![c.builder.equal(&x, &y)?])
}

fn logic(c: &mut Importer, n: &NodeProto, kind: fn(BinaryOpIr) -> BoolOperationIr) -> Fit<Vec<TensorIr>> {
    let (x, y) = (c.input(n, 0)?, c.input(n, 1)?);
    Ok(vec![c.builder.logic(&x, &y, kind)?])
}

fn not(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    Ok(vec![c.builder.not(&x)?])
}

fn choose(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (mask, yes, no) = (c.input(n, 0)?, c.input(n, 1)?, c.input(n, 2)?);
    Ok(vec![c.builder.choose(&mask, &yes, &no)?])
}

/// One triangle of the last two axes; zeros elsewhere.
fn trilu(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    const MOST: usize = 1 << 26;
    let x = c.input(n, 0)?;
    let shift = match c.maybe(n, 1)? {
        Some(k) => c.number(&k).ok_or("its k depends on the inputs")? as i64,
        None => 0,
    };
    let [.., rows, columns] = x.shape.as_slice() else { return Err("needs a matrix".into()) };
    let (rows, columns) = (*rows, *columns);
    if rows.saturating_mul(columns) > MOST {
        return Err("its matrix is too large".into());
    }
    let upper = int(n, "upper", 1) != 0;
    let kept = |at: usize| {
        let right = (at % columns) as i64 - (at / columns) as i64;
        if upper { right >= shift } else { right <= shift }
    };
    let mask: Vec<bool> = (0..rows * columns).map(kept).collect();
    let mask = c.builder.constant(TensorData::new(mask, [rows, columns]));
    let zero = c.builder.full(0.0, &[1, 1], x.dtype)?;
    Ok(vec![c.builder.choose(&mask, &x, &zero)?])
}

// Types and constants.

fn cast(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, to) = (c.input(n, 0)?, int(n, "to", 0));
    let dtype = i32::try_from(to).ok().and_then(graph_type).ok_or_else(|| format!("casts to type {to}"))?;
    Ok(vec![c.builder.cast(&x, dtype)?])
}

fn cast_like(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, like) = (c.input(n, 0)?, c.input(n, 1)?);
    Ok(vec![c.builder.cast(&x, like.dtype)?])
}

fn constant(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let attribute = n.attribute.first().ok_or("has no value")?;
    let scalar: [usize; 0] = [];
    let data = match (attribute.name.as_str(), &attribute.t) {
        ("value", Some(_)) => return Ok(vec![c.value(&n.output[0])?.ok_or("has no value")?]),
        ("value_int", _) => TensorData::new(vec![attribute.i], scalar),
        ("value_ints", _) => TensorData::new(attribute.ints.clone(), [attribute.ints.len()]),
        ("value_float", _) => TensorData::new(vec![attribute.f], scalar),
        ("value_floats", _) => TensorData::new(attribute.floats.clone(), [attribute.floats.len()]),
        (other, _) => return Err(format!("has a value of the kind \"{other}\"")),
    };
    Ok(vec![c.builder.constant(data)])
}

fn constant_of_shape(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let shape = c.input(n, 0)?;
    let shape = counts(&c.known(&shape)?)?;
    let value = match find(n, "value").and_then(|attribute| attribute.t.as_ref()) {
        Some(tensor) => c.tensor_of(tensor)?,
        None => c.builder.constant(TensorData::new(vec![0f32], [1])),
    };
    Ok(vec![filled(c, &value, &shape)?])
}

/// A tensor of one value.
fn filled(c: &mut Importer, value: &TensorIr, shape: &[usize]) -> Fit<TensorIr> {
    let number = c.number(value).ok_or("needs one value")?;
    if value.dtype.is_bool() {
        let number = c.builder.full(number, shape, DType::I64)?;
        return c.builder.cast(&number, value.dtype);
    }
    c.builder.full(number, shape, value.dtype)
}

fn counts(numbers: &[i64]) -> Fit<Vec<usize>> {
    let counts: Option<_> = numbers.iter().map(|&number| usize::try_from(number).ok()).collect();
    counts.ok_or_else(|| format!("{numbers:?} is no shape"))
}

fn range(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    const MOST: f64 = (1 << 26) as f64;
    let (start, limit, step) = (c.input(n, 0)?, c.input(n, 1)?, c.input(n, 2)?);
    let dtype = start.dtype;
    let [start, limit, step] = [start, limit, step].map(|bound| c.number(&bound));
    let (Some(start), Some(limit), Some(step)) = (start, limit, step) else {
        return Err("its bounds depend on the inputs".into());
    };
    let count = ((limit - start) / step).ceil().max(0.0);
    if count.is_nan() || count > MOST {
        return Err(format!("from {start} to {limit} by {step} is too long"));
    }
    let numbers: Vec<f64> = (0..count as usize).map(|at| start + at as f64 * step).collect();
    let count = numbers.len();
    Ok(vec![c.builder.constant(TensorData::new(numbers, [count]).convert_dtype(dtype))])
}

fn dropout(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let all = c.builder.full(1.0, &x.shape.to_vec(), DType::I64)?;
    Ok(vec![x, c.builder.cast(&all, crate::builder::BOOL)?])
}

// Shapes.

fn shape(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let rank = x.shape.rank() as i64;
    let bound = |at: i64| (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize;
    let (start, end) = (bound(int(n, "start", 0)), bound(int(n, "end", rank)));
    let sizes = x.shape.iter().take(end).skip(start).map(|&size| size as i64).collect();
    Ok(vec![c.builder.ints(sizes)])
}

fn size(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let scalar: [usize; 0] = [];
    Ok(vec![c.builder.constant(TensorData::new(vec![x.shape.num_elements() as i64], scalar))])
}

fn reshape(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let wanted = c.ints_of(n, "shape", 1)?.ok_or("lacks its shape")?;
    let copies = int(n, "allowzero", 0) == 0;
    let mut shape = Vec::new();
    for (at, &size) in wanted.iter().enumerate() {
        shape.push(match size {
            -1 => 1,
            0 if copies => *x.shape.as_slice().get(at).ok_or_else(|| format!("has no axis {at} to copy"))?,
            size => usize::try_from(size).map_err(|_| format!("{wanted:?} is no shape"))?,
        });
    }
    let mut open = wanted.iter().enumerate().filter(|(_, size)| **size == -1).map(|(at, _)| at);
    if let Some(at) = open.next() {
        let others = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let count = others.filter(|&others| others > 0 && x.shape.num_elements() % others == 0);
        let others =
            count.ok_or_else(|| format!("{:?} cannot be reshaped to {wanted:?}", x.shape.to_vec()))?;
        shape[at] = x.shape.num_elements() / others;
    }
    Ok(vec![c.builder.reshape(&x, &shape)?])
}

fn flatten(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let axis = axis_within(int(n, "axis", 1), x.shape.rank() + 1)?;
    let (before, after) = x.shape.as_slice().split_at(axis);
    Ok(vec![c.builder.reshape(&x, &[before.iter().product(), after.iter().product()])?])
}

fn squeeze(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let axes = match c.ints_of(n, "axes", 1)? {
        Some(axes) => axes.iter().map(|&axis| axis_within(axis, x.shape.rank())).collect::<Fit<Vec<_>>>()?,
        None => (0..x.shape.rank()).filter(|&axis| x.shape[axis] == 1).collect(),
    };
    let kept = x.shape.iter().enumerate().filter(|(axis, _)| !axes.contains(axis)).map(|(_, &size)| size);
    let kept: Vec<usize> = kept.collect();
    Ok(vec![c.builder.reshape(&x, &kept)?])
}

fn unsqueeze(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let axes = c.ints_of(n, "axes", 1)?.ok_or("lacks its axes")?;
    let rank = x.shape.rank() + axes.len();
    let axes = axes.iter().map(|&axis| axis_within(axis, rank)).collect::<Fit<Vec<_>>>()?;
    let mut old = x.shape.iter().copied();
    let shape: Vec<usize> =
        (0..rank).map(|axis| if axes.contains(&axis) { 1 } else { old.next().unwrap_or(1) }).collect();
    Ok(vec![c.builder.reshape(&x, &shape)?])
}

fn transpose(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let rank = x.shape.rank();
    let axes = if find(n, "perm").is_some() { sizes(n, "perm", rank, 0)? } else { (0..rank).rev().collect() };
    Ok(vec![c.builder.permute(&x, &axes)?])
}

fn expand(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, shape) = (c.input(n, 0)?, c.input(n, 1)?);
    let shape = broadcast(&x.shape, &counts(&c.known(&shape)?)?)?;
    Ok(vec![c.builder.expand(&x, &shape)?])
}

fn tile(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (mut x, repeats) = (c.input(n, 0)?, c.input(n, 1)?);
    let repeats = counts(&c.known(&repeats)?)?;
    if repeats.len() != x.shape.rank() {
        return Err(format!("{repeats:?} has not a number for every axis of {:?}", x.shape.to_vec()));
    }
    for (dim, times) in repeats.into_iter().enumerate().filter(|(_, times)| *times != 1) {
        let dtype = x.dtype;
        let repeat =
            |id| base(dtype, BaseOperationIr::RepeatDim(RepeatDimOpIr::create(x.clone(), dim, times, || id)));
        x = c.builder.other(repeat)?;
    }
    Ok(vec![x])
}

fn concat(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let tensors = c.all(n)?;
    let first = tensors.first().ok_or("lacks inputs")?;
    let axis = axis_of(n, 0, first)?;
    Ok(vec![c.builder.cat(&tensors, axis)?])
}

fn split(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let axis = axis_of(n, 0, &x)?;
    let sizes = match c.ints_of(n, "split", 1)? {
        Some(sizes) => counts(&sizes)?,
        None => {
            let parts = n.output.len().max(1);
            let each = x.shape[axis].div_ceil(parts);
            (0..parts).map(|part| each.min(x.shape[axis].saturating_sub(part * each))).collect()
        }
    };
    if sizes.len() != n.output.len() || sizes.iter().sum::<usize>() != x.shape[axis] {
        return Err(format!("{sizes:?} does not divide axis {axis} of {:?}", x.shape.to_vec()));
    }
    let mut start = 0;
    let mut part = |size| {
        start += size;
        c.builder.narrow(&x, axis, start - size, start)
    };
    sizes.into_iter().map(&mut part).collect()
}

fn slice(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let starts = c.ints_of(n, "starts", 1)?.ok_or("lacks its starts")?;
    let ends = c.ints_of(n, "ends", 2)?.ok_or("lacks its ends")?;
    let axes = c.ints_of(n, "axes", 3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = c.ints_of(n, "steps", 4)?.unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
        return Err("has not as many starts as ends, axes and steps".into());
    }
    let mut x = x;
    for (((start, end), axis), step) in starts.into_iter().zip(ends).zip(axes).zip(steps) {
        let axis = axis_within(axis, x.shape.rank())?;
        let size = x.shape[axis] as i64;
        let from_front = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
        if step == 0 {
            return Err("has a step of 0".into());
        }
        if step > 0 {
            let (start, end) = (from_front(start).clamp(0, size), from_front(end).clamp(0, size));
            if (start, end, step) != (0, size, 1) {
                let mut ranges: Vec<Slice> = x.shape.iter().map(|&size| Slice::from(0..size)).collect();
                ranges[axis] = Slice::with_step(start as isize, Some(end.max(start) as isize), step as isize);
                x = c.builder.slice(&x, &ranges)?;
            }
        } else {
            let (start, end) = (from_front(start).clamp(-1, size - 1), from_front(end).clamp(-1, size - 1));
            let count = ((start - end).max(0) as usize).div_ceil(step.unsigned_abs() as usize);
            let places = c.builder.ints((0..count as i64).map(|at| start + at * step).collect());
            x = c.builder.select(&x, axis, &places)?;
        }
    }
    Ok(vec![x])
}

/// Indices counted from the front and within an axis, as far as they are known.
fn indices(c: &mut Importer, indices: &TensorIr, size: usize) -> Fit<TensorIr> {
    let Some(data) = c.builder.value(indices) else { return Ok(indices.clone()) };
    let mut places: Vec<i64> = data.iter::<i64>().collect();
    for place in &mut places {
        let stated = *place;
        *place = if stated < 0 { stated.saturating_add(size as i64) } else { stated };
        if !(0..size as i64).contains(place) {
            return Err(format!("index {stated} is outside an axis of {size}"));
        }
    }
    Ok(c.builder.constant(TensorData::new(places, indices.shape.clone())))
}

fn gather(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, places) = (c.input(n, 0)?, c.input(n, 1)?);
    let axis = axis_of(n, 0, &x)?;
    let places = indices(c, &places, x.shape[axis])?;
    Ok(vec![c.builder.select(&x, axis, &places)?])
}

fn gather_elements(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, places) = (c.input(n, 0)?, c.input(n, 1)?);
    let axis = axis_of(n, 0, &x)?;
    let places = indices(c, &places, x.shape[axis])?;
    Ok(vec![c.builder.gather(&x, axis, &places)?])
}

fn pad(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let rank = x.shape.rank();
    let stated = c.ints_of(n, "pads", 1)?.ok_or("lacks its pads")?;
    let axes = match c.maybe(n, 3)? {
        Some(axes) => c.known(&axes)?.iter().map(|&axis| axis_within(axis, rank)).collect::<Fit<Vec<_>>>()?,
        None => (0..rank).collect(),
    };
    if stated.len() != 2 * axes.len() {
        return Err(format!("has pads {stated:?} for {} axes", axes.len()));
    }
    let mut pads = vec![(0, 0); rank];
    for (at, &axis) in axes.iter().enumerate() {
        let both = counts(&[stated[at], stated[at + axes.len()]]);
        let both = both.map_err(|_| format!("has negative pads {stated:?}, which are not known"))?;
        pads[axis] = (both[0], both[1]);
    }
    let value = match c.maybe(n, 2)? {
        Some(value) => c.number(&value).ok_or("its value depends on the inputs")?,
        None => real(n, "value", 0.0),
    };
    let mode = match text(n, "mode", "constant") {
        "constant" => PadModeIr::Constant(ScalarIr::Float(value)),
        "reflect" => PadModeIr::Reflect,
        "edge" => PadModeIr::Edge,
        other => return Err(format!("pads by \"{other}\"")),
    };
    Ok(vec![padded(c, &x, pads, mode)?])
}

fn padded(c: &mut Importer, x: &TensorIr, pads: Vec<(usize, usize)>, mode: PadModeIr) -> Fit<TensorIr> {
    let dtype = x.dtype;
    c.builder.other(|id| {
        let operation = PadOpIr::create(x.clone(), pads, mode, || id);
        crate::builder::numeric(dtype, NumericOperationIr::Pad(operation))
    })
}

// Along axes.

fn softmax(
    c: &mut Importer,
    n: &NodeProto,
    kind: fn(DimOpIr) -> ActivationOperationIr,
) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    if c.opset >= 13 {
        let axis = axis_of(n, -1, &x)?;
        return Ok(vec![c.builder.along(&x, axis, kind)?]);
    }
    // Before, everything from the axis on was one axis.
    let axis = axis_of(n, 1, &x)?;
    let (before, after) = x.shape.as_slice().split_at(axis);
    let matrix = c.builder.reshape(&x, &[before.iter().product(), after.iter().product()])?;
    let result = c.builder.along(&matrix, 1, kind)?;
    Ok(vec![c.builder.reshape(&result, &x.shape.to_vec())?])
}

/// `since`: the set of operators from which on the axes are an input.
fn reduce(
    c: &mut Importer,
    n: &NodeProto,
    kind: fn(ReduceDimOpIr) -> NumericOperationIr,
    since: i64,
) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let stated =
        if c.opset < since { find(n, "axes").map(|a| a.ints.clone()) } else { c.ints_of(n, "axes", 1)? };
    reduced(c, n, &x, stated, kind)
}

fn reduced(
    c: &mut Importer,
    n: &NodeProto,
    x: &TensorIr,
    stated: Option<Vec<i64>>,
    kind: fn(ReduceDimOpIr) -> NumericOperationIr,
) -> Fit<Vec<TensorIr>> {
    let rank = x.shape.rank();
    let axes: Vec<usize> = match stated {
        Some(axes) if !axes.is_empty() => {
            axes.iter().map(|&axis| axis_within(axis, rank)).collect::<Fit<_>>()?
        }
        _ if int(n, "noop_with_empty_axes", 0) != 0 => return Ok(vec![x.clone()]),
        _ => (0..rank).collect(),
    };
    let mut result = x.clone();
    for &axis in &axes {
        result = c.builder.reduce(&result, axis, kind)?;
    }
    Ok(vec![without_axes(c, n, &result, &axes)?])
}

/// Takes reduced axes away, unless the node keeps them.
fn without_axes(c: &mut Importer, n: &NodeProto, x: &TensorIr, axes: &[usize]) -> Fit<TensorIr> {
    if int(n, "keepdims", 1) != 0 {
        return Ok(x.clone());
    }
    let kept = x.shape.iter().enumerate().filter(|(axis, _)| !axes.contains(axis)).map(|(_, &size)| size);
    let kept: Vec<usize> = kept.collect();
    c.builder.reshape(x, &kept)
}

fn reduce_l2(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let stated = c.ints_of(n, "axes", 1)?;
    let square = c.builder.mul(&x, &x)?;
    let sum = reduced(c, n, &square, stated, NumericOperationIr::SumDim)?.remove(0);
    Ok(vec![c.builder.float(&sum, FloatOperationIr::Sqrt)?])
}

fn arg_reduce(
    c: &mut Importer,
    n: &NodeProto,
    kind: fn(ReduceDimOpIr) -> NumericOperationIr,
) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    if int(n, "select_last_index", 0) != 0 {
        return Err("the last of equal elements is not known how to find".into());
    }
    let axis = axis_of(n, 0, &x)?;
    let place = c.builder.arg_reduce(&x, axis, kind)?;
    Ok(vec![without_axes(c, n, &place, &[axis])?])
}

fn cum_sum(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, axis) = (c.input(n, 0)?, c.input(n, 1)?);
    if int(n, "exclusive", 0) != 0 || int(n, "reverse", 0) != 0 {
        return Err("exclusive and reversed sums are not known".into());
    }
    let axis = axis_within(c.number(&axis).ok_or("its axis depends on the inputs")? as i64, x.shape.rank())?;
    let dtype = x.dtype;
    let sum =
        |id| crate::builder::numeric(dtype, NumericOperationIr::CumSum(DimOpIr::create(x, axis, || id)));
    Ok(vec![c.builder.other(sum)?])
}

fn layer_norm(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, scale, bias) = (c.input(n, 0)?, c.input(n, 1)?, c.maybe(n, 2)?);
    let axis = axis_of(n, -1, &x)?;
    let (before, after) = x.shape.as_slice().split_at(axis);
    let width = after.iter().product();
    let flat = [before, &[width]].concat();
    let rows = c.builder.reshape(&x, &flat)?;
    let whole = |c: &mut Importer, parameter: &TensorIr| {
        let parameter = c.builder.expand(parameter, &x.shape.as_slice()[axis..])?;
        c.builder.reshape(&parameter, &[width])
    };
    let scale = whole(c, &scale)?;
    let bias = bias.map(|bias| whole(c, &bias)).transpose()?;
    let epsilon = real(n, "epsilon", 1e-5);
    let result = c.builder.module(|id| {
        ModuleOperationIr::LayerNorm(LayerNormOpIr::create(rows, scale, bias, epsilon, || id))
    })?;
    Ok(vec![c.builder.reshape(&result, &x.shape.to_vec())?])
}

fn batch_norm(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    if int(n, "training_mode", 0) != 0 {
        return Err("normalises by the batch (training_mode); export the model for inference".into());
    }
    let parts = c.all(n)?;
    let [x, gamma, beta, mean, variance] = parts.as_slice() else { return Err("needs 5 inputs".into()) };
    let channels = x.shape.as_slice().get(1).copied().unwrap_or(0);
    if parts[1..].iter().any(|part| part.shape.to_vec() != [channels]) {
        return Err(format!("its parameters are not [{channels}]"));
    }
    let epsilon = ScalarIr::Float(real(n, "epsilon", 1e-5));
    let [x, gamma, beta, mean, variance] = [x, gamma, beta, mean, variance].map(Clone::clone);
    Ok(vec![c.builder.module(|id| {
        ModuleOperationIr::BatchNorm(BatchNormOpIr::create(x, gamma, beta, mean, variance, epsilon, || id))
    })?])
}

// Products.

fn mat_mul(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, y) = (c.input(n, 0)?, c.input(n, 1)?);
    let is_weight = y.shape.rank() == 2 && c.builder.value(&y).is_some();
    if is_weight && x.shape.rank() >= 2 && x.shape[x.shape.rank() - 1] == y.shape[0] {
        return Ok(vec![linear(c, x, y, None)?]);
    }
    // A vector on either side is a matrix of one row or column.
    let row = if x.shape.rank() == 1 { c.builder.reshape(&x, &[1, x.shape[0]])? } else { x.clone() };
    let column = if y.shape.rank() == 1 { c.builder.reshape(&y, &[y.shape[0], 1])? } else { y.clone() };
    if row.shape.rank() < 2 || column.shape.rank() < 2 {
        return Err("needs matrices".into());
    }
    let product = c.builder.matmul(&row, &column)?;
    let mut shape = product.shape.to_vec();
    if y.shape.rank() == 1 {
        shape.pop();
    }
    if x.shape.rank() == 1 {
        shape.remove(product.shape.rank() - 2);
    }
    Ok(vec![c.builder.reshape(&product, &shape)?])
}

fn linear(c: &mut Importer, x: TensorIr, weight: TensorIr, bias: Option<TensorIr>) -> Fit<TensorIr> {
    c.builder.module(|id| ModuleOperationIr::Linear(LinearOpIr::create(x, weight, bias, || id)))
}

fn gemm(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (mut x, mut y, bias) = (c.input(n, 0)?, c.input(n, 1)?, c.maybe(n, 2)?);
    if x.shape.rank() != 2 || y.shape.rank() != 2 {
        return Err("needs matrices".into());
    }
    if int(n, "transA", 0) != 0 {
        x = c.builder.transpose(&x)?;
    }
    if int(n, "transB", 0) != 0 {
        y = c.builder.transpose(&y)?;
    }
    if x.shape[1] != y.shape[0] {
        return Err(format!("{:?} and {:?} have no matrix product", x.shape.to_vec(), y.shape.to_vec()));
    }
    let (alpha, beta) = (real(n, "alpha", 1.0), real(n, "beta", 1.0));
    let columns = y.shape[1];
    if let Some(bias) =
        bias.as_ref().filter(|bias| bias.shape.num_elements() == columns && bias.shape.rank() <= 2)
        && (alpha, beta) == (1.0, 1.0)
        && bias.shape.as_slice().last() == Some(&columns)
    {
        let bias = c.builder.reshape(bias, &[columns])?;
        return Ok(vec![linear(c, x, y, Some(bias))?]);
    }
    let mut result = linear(c, x, y, None)?;
    if alpha != 1.0 {
        result = c.builder.mul_scalar(&result, alpha)?;
    }
    if let Some(mut bias) = bias {
        if beta != 1.0 {
            bias = c.builder.mul_scalar(&bias, beta)?;
        }
        let shape = result.shape.to_vec();
        bias = c.builder.expand(&bias, &shape)?;
        result = c.builder.add(&result, &bias)?;
    }
    Ok(vec![result])
}

// Windows.

/// What a window over the axes after the second does.
struct Window {
    kernel: Vec<usize>,
    stride: Vec<usize>,
    dilation: Vec<usize>,
    /// Zeros before and after each axis.
    pads: Vec<(usize, usize)>,
}

impl Window {
    fn new(n: &NodeProto, x: &TensorIr, kernel: Option<&[usize]>) -> Fit<Self> {
        let space = x.shape.as_slice().get(2..).filter(|space| !space.is_empty());
        let space = space.ok_or_else(|| format!("has no axes to slide over in {:?}", x.shape.to_vec()))?;
        let axes = space.len();
        let kernel = match kernel {
            Some(kernel) => kernel.to_vec(),
            None => sizes(n, "kernel_shape", axes, 0)?,
        };
        let (stride, dilation) = (sizes(n, "strides", axes, 1)?, sizes(n, "dilations", axes, 1)?);
        if kernel.len() != axes || [&kernel, &stride, &dilation].iter().any(|sizes| sizes.contains(&0)) {
            return Err(format!(
                "has a window of {kernel:?} by strides {stride:?} and dilations {dilation:?}"
            ));
        }
        let stated = sizes(n, "pads", 2 * axes, 0)?;
        let reach = |axis: usize| dilation[axis].saturating_mul(kernel[axis] - 1).saturating_add(1);
        let pads = (0..axes).map(|axis| match text(n, "auto_pad", "NOTSET") {
            "NOTSET" => Ok((stated[axis], stated[axis + axes])),
            "VALID" => Ok((0, 0)),
            same @ ("SAME_UPPER" | "SAME_LOWER") => {
                let steps = space[axis].div_ceil(stride[axis]).max(1) - 1;
                let pad = steps
                    .saturating_mul(stride[axis])
                    .saturating_add(reach(axis))
                    .saturating_sub(space[axis]);
                let (less, more) = (pad / 2, pad.div_ceil(2));
                Ok(if same == "SAME_UPPER" { (less, more) } else { (more, less) })
            }
            other => Err(format!("has the padding \"{other}\"")),
        });
        let pads = pads.collect::<Fit<Vec<_>>>()?;
        for axis in 0..axes {
            let room = space[axis].saturating_add(pads[axis].0).saturating_add(pads[axis].1);
            if reach(axis) > room {
                return Err(format!(
                    "its window of {} does not fit into {room} along axis {}",
                    reach(axis),
                    axis + 2
                ));
            }
        }
        Ok(Self { kernel, stride, dilation, pads })
    }

    /// Pads `x` by a value where the two sides differ; what remains for the operation itself.
    fn even_pads(&self, c: &mut Importer, x: TensorIr, value: f64) -> Fit<(TensorIr, Vec<usize>)> {
        if self.pads.iter().all(|(before, after)| before == after) {
            return Ok((x, self.pads.iter().map(|(before, _)| *before).collect()));
        }
        let pads = [&[(0, 0), (0, 0)], self.pads.as_slice()].concat();
        let x = padded(c, &x, pads, PadModeIr::Constant(ScalarIr::Float(value)))?;
        Ok((x, vec![0; self.pads.len()]))
    }
}

fn one(sizes: &[usize]) -> [usize; 1] {
    [sizes[0]]
}

fn two(sizes: &[usize]) -> [usize; 2] {
    [sizes[0], sizes[1]]
}

fn conv(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, weight, bias) = (c.input(n, 0)?, c.input(n, 1)?, c.maybe(n, 2)?);
    let groups = usize::try_from(int(n, "group", 1)).unwrap_or(0);
    if weight.shape.rank() != x.shape.rank() || x.shape.rank() < 3 {
        return Err(format!(
            "its weight {:?} has another rank than {:?}",
            weight.shape.to_vec(),
            x.shape.to_vec()
        ));
    }
    let window = Window::new(n, &x, Some(&weight.shape.as_slice()[2..]))?;
    let fits = groups > 0 && weight.shape[0] % groups == 0 && x.shape[1] == weight.shape[1] * groups;
    if !fits || bias.as_ref().is_some_and(|bias| bias.shape.to_vec() != [weight.shape[0]]) {
        return Err(format!(
            "its weight {:?} in {groups} groups does not fit {:?}",
            weight.shape.to_vec(),
            x.shape.to_vec()
        ));
    }
    let Window { stride, dilation, pads, .. } = &window;
    let result = match pads.as_slice() {
        [pad] => {
            let options =
                Conv1dOptionsIr { stride: one(stride), padding: [*pad], dilation: one(dilation), groups };
            c.builder
                .module(|id| ModuleOperationIr::Conv1d(Conv1dOpIr::create(x, weight, bias, options, || id)))
        }
        [high, wide] => {
            let padding = [*high, *wide];
            let options = Conv2dOptionsIr { stride: two(stride), padding, dilation: two(dilation), groups };
            c.builder
                .module(|id| ModuleOperationIr::Conv2d(Conv2dOpIr::create(x, weight, bias, options, || id)))
        }
        more => return Err(format!("slides over {} axes; 1 and 2 are known", more.len())),
    };
    Ok(vec![result?])
}

fn conv_transpose(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, weight, bias) = (c.input(n, 0)?, c.input(n, 1)?, c.maybe(n, 2)?);
    let groups = usize::try_from(int(n, "group", 1)).unwrap_or(0);
    let axes = x.shape.rank().saturating_sub(2);
    if weight.shape.rank() != x.shape.rank() || groups == 0 || x.shape[1] != weight.shape[0] {
        return Err(format!("its weight {:?} does not fit {:?}", weight.shape.to_vec(), x.shape.to_vec()));
    }
    if find(n, "output_shape").is_some() || text(n, "auto_pad", "NOTSET") != "NOTSET" {
        return Err("its padding is not stated (pads)".into());
    }
    let stated = sizes(n, "pads", 2 * axes, 0)?;
    let (before, after) = stated.split_at(axes);
    if before != after {
        return Err(format!("its pads {stated:?} differ before and after"));
    }
    let (stride, dilation) = (sizes(n, "strides", axes, 1)?, sizes(n, "dilations", axes, 1)?);
    let extra = sizes(n, "output_padding", axes, 0)?;
    let result = match axes {
        1 => {
            let (padding, padding_out) = (one(before), one(&extra));
            let (stride, dilation) = (one(&stride), one(&dilation));
            let options = ConvTranspose1dOptionsIr { stride, padding, padding_out, dilation, groups };
            c.builder.module(|id| {
                ModuleOperationIr::ConvTranspose1d(ConvTranspose1dOpIr::create(
                    x,
                    weight,
                    bias,
                    options,
                    || id,
                ))
            })
        }
        2 => {
            let (padding, padding_out) = (two(before), two(&extra));
            let (stride, dilation) = (two(&stride), two(&dilation));
            let options = ConvTranspose2dOptionsIr { stride, padding, padding_out, dilation, groups };
            c.builder.module(|id| {
                ModuleOperationIr::ConvTranspose2d(ConvTranspose2dOpIr::create(
                    x,
                    weight,
                    bias,
                    options,
                    || id,
                ))
            })
        }
        more => return Err(format!("slides over {more} axes; 1 and 2 are known")),
    };
    Ok(vec![result?])
}

fn max_pool(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    if n.output.get(1).is_some_and(|name| !name.is_empty()) {
        return Err("the places of its maxima are not known".into());
    }
    let x = c.input(n, 0)?;
    let window = Window::new(n, &x, None)?;
    let (x, pads) = window.even_pads(c, x, f64::NEG_INFINITY)?;
    let Window { kernel, stride, dilation, .. } = &window;
    let ceil = int(n, "ceil_mode", 0) != 0;
    let result = match pads.len() {
        1 => c.builder.module(|id| {
            let operation = MaxPool1dOpIr::create(x, kernel[0], stride[0], pads[0], dilation[0], ceil, || id);
            ModuleOperationIr::MaxPool1d(operation)
        }),
        2 => c.builder.module(|id| {
            let operation =
                MaxPool2dOpIr::create(x, two(kernel), two(stride), two(&pads), two(dilation), ceil, || id);
            ModuleOperationIr::MaxPool2d(operation)
        }),
        more => return Err(format!("slides over {more} axes; 1 and 2 are known")),
    };
    Ok(vec![result?])
}

fn average_pool(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let x = c.input(n, 0)?;
    let window = Window::new(n, &x, None)?;
    let counts_pads = int(n, "count_include_pad", 0) != 0;
    let even = window.pads.iter().all(|(before, after)| before == after);
    if window.dilation.iter().any(|&dilation| dilation != 1) || !(even || counts_pads) {
        return Err(
            "dilations, and paddings that differ before and after and are not counted, are not known".into(),
        );
    }
    let (x, pads) = window.even_pads(c, x, 0.0)?;
    let Window { kernel, stride, .. } = &window;
    let ceil = int(n, "ceil_mode", 0) != 0;
    let result = match pads.len() {
        1 => c.builder.module(|id| {
            let operation = AvgPool1dOpIr::create(x, kernel[0], stride[0], pads[0], counts_pads, ceil, || id);
            ModuleOperationIr::AvgPool1d(operation)
        }),
        2 => c.builder.module(|id| {
            let operation =
                AvgPool2dOpIr::create(x, two(kernel), two(stride), two(&pads), counts_pads, ceil, || id);
            ModuleOperationIr::AvgPool2d(operation)
        }),
        more => return Err(format!("slides over {more} axes; 1 and 2 are known")),
    };
    Ok(vec![result?])
}

fn global_pool(
    c: &mut Importer,
    n: &NodeProto,
    kind: fn(ReduceDimOpIr) -> NumericOperationIr,
) -> Fit<Vec<TensorIr>> {
    let mut x = c.input(n, 0)?;
    for axis in 2..x.shape.rank() {
        x = c.builder.reduce(&x, axis, kind)?;
    }
    Ok(vec![x])
}

// Quantised numbers.

/// Scale or zero point as it is applied to every element of `x`.
fn spread(c: &mut Importer, n: &NodeProto, parameter: &TensorIr, x: &TensorIr) -> Fit<TensorIr> {
    let rank = x.shape.rank();
    if parameter.shape.num_elements() == 1 {
        return c.builder.reshape(parameter, &vec![1; rank]);
    }
    let axis = axis_of(n, 1, x)?;
    let block = usize::try_from(int(n, "block_size", 0)).unwrap_or(0);
    if block > 0 {
        // One number for every `block` elements along the axis.
        if parameter.shape.rank() != rank || parameter.shape[axis].checked_mul(block) != Some(x.shape[axis]) {
            return Err(format!("blocks of {block} do not divide {:?}", x.shape.to_vec()));
        }
        let (before, after) = parameter.shape.as_slice().split_at(axis + 1);
        let apart = c.builder.reshape(parameter, &[before, &[1], after].concat())?;
        let repeated = c.builder.expand(&apart, &[before, &[block], after].concat())?;
        return c.builder.reshape(&repeated, &x.shape.to_vec());
    }
    if parameter.shape.to_vec() != [x.shape[axis]] {
        return Err(format!(
            "{:?} numbers for axis {axis} of {:?}",
            parameter.shape.to_vec(),
            x.shape.to_vec()
        ));
    }
    let shape: Vec<usize> = (0..rank).map(|at| if at == axis { x.shape[axis] } else { 1 }).collect();
    c.builder.reshape(parameter, &shape)
}

/// A zero point among floats.
fn as_float(c: &mut Importer, zero: &TensorIr) -> Fit<TensorIr> {
    match c.builder.value(zero).cloned() {
        Some(data) => Ok(c.builder.constant(data.convert_dtype(DType::F32))),
        None => c.builder.cast(zero, DType::F32),
    }
}

/// `(x - zero) · scale`
fn dequantize(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, scale, zero) = (c.narrow(n, 0)?, c.input(n, 1)?, c.maybe(n, 2)?);
    let mut value = c.builder.cast(&x, DType::F32)?;
    if let Some(zero) = zero {
        let zero = as_float(c, &zero)?;
        if c.builder.value(&zero).is_none_or(|zero| zero.iter::<f32>().any(|zero| zero != 0.0)) {
            let zero = spread(c, n, &zero, &x)?;
            value = c.builder.sub(&value, &zero)?;
        }
    }
    let scale = spread(c, n, &scale, &x)?;
    Ok(vec![c.builder.mul(&value, &scale)?])
}

/// `round(x / scale) + zero`, halves to the even side, within the range of the zero point's type.
fn quantize(c: &mut Importer, n: &NodeProto) -> Fit<Vec<TensorIr>> {
    let (x, scale, zero) = (c.input(n, 0)?, c.input(n, 1)?, c.maybe(n, 2)?);
    let stated = i32::try_from(int(n, "output_dtype", 0)).ok().filter(|&kind| kind != 0);
    let kind = match (stated, &zero) {
        (Some(kind), _) => kind,
        (None, Some(_)) => c.file_type(n, 2).ok_or("the type of its zero point is not known")?,
        (None, None) => data_type::UINT8,
    };
    let (least, most) = match kind {
        data_type::UINT8 => (0.0, 255.0),
        data_type::INT8 => (-128.0, 127.0),
        data_type::UINT16 => (0.0, 65_535.0),
        data_type::INT16 => (-32_768.0, 32_767.0),
        data_type::UINT4 => (0.0, 15.0),
        data_type::INT4 => (-8.0, 7.0),
        other => return Err(format!("quantises to type {other}")),
    };
    let scale = spread(c, n, &scale, &x)?;
    let steps = c.builder.div(&x, &scale)?;
    let mut steps = c.builder.float(&steps, FloatOperationIr::Round)?;
    if let Some(zero) = zero {
        let zero = as_float(c, &zero)?;
        let zero = spread(c, n, &zero, &x)?;
        steps = c.builder.add(&steps, &zero)?;
    }
    let within = c.builder.clamp(&steps, least, most)?;
    Ok(vec![c.builder.cast(&within, DType::I64)?])
}
