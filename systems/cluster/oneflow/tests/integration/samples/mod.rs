//! One operation or more of every kind in the table, with operands.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::backend::ir::{OperationIr, TensorId, TensorIr, TensorStatus};
use burn::tensor::{BoolStore, DType, TensorData};
use kiln_core::random_stream;
use rand::RngExt;
use serde_json::{Value, json};

pub struct Sample {
    pub kind: &'static str,
    pub operation: OperationIr,
    pub inputs: Vec<TensorData>,
}

const F: DType = DType::F32;
const I: DType = DType::I64;
const T: DType = DType::Bool(BoolStore::Native);

/// A tensor of an operation.
fn t(id: u64, shape: &[usize], dtype: DType) -> Value {
    let (id, shape, status) = (TensorId::new(id), shape.to_vec().into(), TensorStatus::ReadOnly);
    serde_json::to_value(TensorIr { id, shape, dtype, status }).unwrap()
}

#[derive(Default)]
struct Samples {
    all: Vec<Sample>,
}

impl Samples {
    /// `below` bounds whole numbers; floats lie between 0.1 and 0.9.
    fn add(&mut self, kind: &'static str, family: &str, fields: Value, below: i64) {
        let inner = json!({ kind: fields });
        let value = match family {
            "Float" | "NumericFloat" => json!({ family: ["F32", inner] }),
            "NumericInt" => json!({ family: ["I64", inner] }),
            _ => json!({ family: inner }),
        };
        let operation: OperationIr = serde_json::from_value(value).unwrap_or_else(|e| panic!("{kind}: {e}"));
        let mut rng = random_stream(3, kind, self.all.len() as u64);
        let inputs = operation.inputs().map(|tensor| {
            let (count, shape) = (tensor.shape.num_elements(), tensor.shape.clone());
            match tensor.dtype {
                DType::Bool(_) => {
                    TensorData::new((0..count).map(|_| rng.random::<bool>()).collect::<Vec<_>>(), shape)
                }
                dtype if dtype.is_float() => TensorData::new(
                    (0..count).map(|_| rng.random_range(0.1..0.9f32)).collect::<Vec<_>>(),
                    shape,
                ),
                _ => {
                    TensorData::new((0..count).map(|_| rng.random_range(0..below)).collect::<Vec<_>>(), shape)
                }
            }
        });
        let inputs = inputs.collect();
        self.all.push(Sample { kind, operation, inputs });
    }
}

pub fn samples() -> Vec<Sample> {
    let mut s = Samples::default();
    elementwise(&mut s);
    reductions(&mut s);
    moves(&mut s);
    rows(&mut s);
    products(&mut s);
    layers(&mut s);
    s.all
}

fn elementwise(s: &mut Samples) {
    let x = [5, 3];
    let unary = |from: DType, to: DType| json!({"input": t(0, &x, from), "out": t(1, &x, to)});
    for kind in [
        "Exp", "Log", "Log1p", "Erf", "Sqrt", "Cos", "Cosh", "Sin", "Sinh", "Tan", "Tanh", "ArcCos",
        "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTanh", "Round", "Floor", "Ceil", "Trunc", "Recip",
    ] {
        s.add(kind, "Float", unary(F, F), 1);
    }
    s.add("IsNan", "Float", unary(F, T), 1);
    s.add("IsInf", "Float", unary(F, T), 1);
    s.add("IntoInt", "Float", unary(F, I), 1);
    s.add("IntoFloat", "Int", unary(I, F), 9);
    s.add("IntoFloat", "Bool", unary(T, F), 9);
    s.add("Cast", "BaseFloat", unary(F, DType::F64), 9);
    s.add("BitwiseNot", "Int", unary(I, I), 9);
    s.add("Not", "Bool", unary(T, T), 9);
    for kind in ["Abs", "Sign", "Neg"] {
        s.add(kind, "NumericFloat", unary(F, F), 1);
    }
    for kind in ["Relu", "Gelu", "Sigmoid", "LogSigmoid"] {
        s.add(kind, "Activation", unary(F, F), 1);
    }
    let scalar = |from: DType, value: Value, to: DType| json!({"lhs": t(0, &x, from), "rhs": value, "out": t(1, &x, to)});
    let half = json!({"Float": 0.5});
    s.add("PowfScalar", "Float", scalar(F, half.clone(), F), 1);
    s.add("LeakyRelu", "Activation", scalar(F, half.clone(), F), 1);
    for kind in ["AddScalar", "SubScalar", "RemScalar", "MulScalar", "DivScalar", "ClampMin", "ClampMax"] {
        s.add(kind, "NumericFloat", scalar(F, half.clone(), F), 1);
    }
    s.add("PowiScalar", "NumericFloat", scalar(F, json!({"Int": 2}), F), 1);
    s.add("DivScalar", "NumericInt", scalar(I, json!({"Int": 2}), I), 9);
    for kind in ["GreaterElem", "GreaterEqualElem", "LowerElem", "LowerEqualElem"] {
        s.add(kind, "NumericFloat", scalar(F, half.clone(), T), 1);
    }
    for kind in ["EqualElem", "NotEqualElem"] {
        s.add(kind, "BaseInt", scalar(I, json!({"Int": 1}), T), 3);
    }
    for kind in [
        "BitwiseAndScalar",
        "BitwiseOrScalar",
        "BitwiseXorScalar",
        "BitwiseLeftShiftScalar",
        "BitwiseRightShiftScalar",
    ] {
        s.add(kind, "Int", scalar(I, json!({"Int": 1}), I), 9);
    }
    let clamp =
        json!({"tensor": t(0, &x, F), "min": {"Float": 0.3}, "max": {"Float": 0.6}, "out": t(1, &x, F)});
    s.add("Clamp", "NumericFloat", clamp, 1);
    let hard =
        json!({"tensor": t(0, &x, F), "alpha": {"Float": 0.2}, "beta": {"Float": 0.5}, "out": t(1, &x, F)});
    s.add("HardSigmoid", "Activation", hard, 1);

    let pair = |a: &[usize], b: &[usize], from: DType, to: DType| json!({"lhs": t(0, a, from), "rhs": t(1, b, from), "out": t(2, &x, to)});
    for kind in ["Add", "Sub", "Mul", "Div", "Rem"] {
        s.add(kind, "NumericFloat", pair(&x, &x, F, F), 1);
        s.add(kind, "NumericFloat", pair(&x, &[1, 3], F, F), 1);
        s.add(kind, "NumericFloat", pair(&[5, 1], &[1, 3], F, F), 1);
    }
    let powers = json!({"lhs": t(0, &x, F), "rhs": t(1, &x, I), "out": t(2, &x, F)});
    s.add("Powi", "NumericFloat", powers, 4);
    for kind in ["Powf", "Hypot", "ArcTan2"] {
        s.add(kind, "Float", pair(&x, &x, F, F), 1);
    }
    for kind in ["Greater", "GreaterEqual", "Lower", "LowerEqual"] {
        s.add(kind, "NumericFloat", pair(&x, &x, F, T), 1);
    }
    for kind in ["Equal", "NotEqual"] {
        s.add(kind, "BaseInt", pair(&x, &x, I, T), 3);
    }
    for kind in ["And", "Or", "Xor"] {
        s.add(kind, "Bool", pair(&x, &x, T, T), 3);
    }
    for kind in ["BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseLeftShift", "BitwiseRightShift"] {
        s.add(kind, "Int", pair(&x, &x, I, I), 9);
    }
    for kind in ["ReluBackward", "GeluBackward", "SigmoidBackward", "LogSigmoidBackward"] {
        s.add(kind, "Activation", pair(&x, &x, F, F), 1);
    }
    let choose =
        json!({"tensor": t(0, &x, F), "mask": t(1, &x, T), "value": t(2, &x, F), "out": t(3, &x, F)});
    s.add("MaskWhere", "BaseFloat", choose, 1);
    for value in [0.0, 2.0] {
        let fill = json!({"tensor": t(0, &x, F), "mask": t(1, &x, T), "value": {"Float": value}, "out": t(2, &x, F)});
        s.add("MaskFill", "BaseFloat", fill, 1);
    }
}

fn reductions(s: &mut Samples) {
    let x = [5, 4, 3];
    for (kind, axis) in [("SumDim", 1), ("MeanDim", 1), ("MaxDim", 0), ("MinDim", 2)] {
        let mut out = x;
        out[axis] = 1;
        let fields = json!({"input": t(0, &x, F), "out": t(1, &out, F), "axis": axis, "accumulator_len": 1});
        s.add(kind, "NumericFloat", fields, 1);
    }
    for (kind, to) in [("ProdDim", F), ("MaxAbsDim", F), ("ArgMax", I), ("ArgMin", I)] {
        let fields =
            json!({"input": t(0, &x, F), "out": t(1, &[5, 1, 3], to), "axis": 1, "accumulator_len": 1});
        s.add(kind, "NumericFloat", fields, 1);
    }
    for (kind, to) in [("ArgTopK", I), ("TopK", F)] {
        let fields =
            json!({"input": t(0, &x, F), "out": t(1, &[5, 2, 3], to), "axis": 1, "accumulator_len": 2});
        s.add(kind, "NumericFloat", fields, 1);
    }
    let top = json!({"tensor": t(0, &x, F), "dim": 1, "k": 2, "out": t(1, &[5, 2, 3], F), "out_indices": t(2, &[5, 2, 3], I)});
    s.add("TopKWithIndices", "NumericFloat", top, 1);
    for kind in ["AllDim", "AnyDim"] {
        let fields =
            json!({"input": t(0, &x, T), "out": t(1, &[5, 1, 3], T), "axis": 1, "accumulator_len": 1});
        s.add(kind, "BaseBool", fields, 1);
    }
    let sums = json!({"input": t(0, &x, F), "out": t(1, &[5, 1, 1], F), "axes": [1, 2]});
    s.add("SumDims", "NumericFloat", sums, 1);
    for kind in ["Sum", "Mean", "Max", "Min"] {
        s.add(kind, "NumericFloat", json!({"input": t(0, &x, F), "out": t(1, &[1], F)}), 1);
    }
    let along = |axis: usize| json!({"input": t(0, &x, F), "out": t(1, &x, F), "axis": axis});
    for kind in ["Softmax", "LogSoftmax", "Softmin"] {
        s.add(kind, "Activation", along(2), 1);
        s.add(kind, "Activation", along(1), 1);
    }
    for kind in ["CumSum", "CumProd", "CumMin", "CumMax"] {
        s.add(kind, "NumericFloat", along(1), 1);
    }
    for kind in ["MaxDimWithIndices", "MinDimWithIndices"] {
        let fields = json!({"tensor": t(0, &x, F), "dim": 1, "out": t(1, &[5, 1, 3], F), "out_indices": t(2, &[5, 1, 3], I)});
        s.add(kind, "NumericFloat", fields, 1);
    }
    for (kind, to) in [("Sort", F), ("ArgSort", I)] {
        let fields = json!({"input": t(0, &x, F), "dim": 1, "descending": false, "out": t(1, &x, to)});
        s.add(kind, "NumericFloat", fields, 1);
    }
    let sorted = json!({"input": t(0, &x, F), "dim": 1, "descending": true, "out": t(1, &x, F), "out_indices": t(2, &x, I)});
    s.add("SortWithIndices", "NumericFloat", sorted, 1);
    let cross = json!({"lhs": t(0, &[5, 3], F), "rhs": t(1, &[5, 3], F), "out": t(2, &[5, 3], F), "dim": 1});
    s.add("Cross", "Float", cross, 1);
}

fn moves(s: &mut Samples) {
    let x = [6, 4, 3];
    let shaped = |from: &[usize], to: &[usize]| json!({"input": t(0, from, F), "out": t(1, to, F)});
    for (from, to) in
        [(&x[..], &[24, 3][..]), (&[24, 3], &x), (&x, &[6, 12]), (&[5, 1, 3], &[5, 3]), (&[12], &[3, 4])]
    {
        s.add("Reshape", "BaseFloat", shaped(from, to), 1);
    }
    s.add("Expand", "BaseFloat", shaped(&[1, 3], &[5, 3]), 1);
    s.add("Expand", "BaseFloat", shaped(&[3], &[5, 3]), 1);
    s.add(
        "SwapDims",
        "BaseFloat",
        json!({"input": t(0, &x, F), "out": t(1, &[3, 4, 6], F), "dim1": 0, "dim2": 2}),
        1,
    );
    s.add(
        "Permute",
        "BaseFloat",
        json!({"input": t(0, &x, F), "out": t(1, &[3, 6, 4], F), "axes": [2, 0, 1]}),
        1,
    );
    s.add(
        "Permute",
        "BaseInt",
        json!({"input": t(0, &x, I), "out": t(1, &[3, 6, 4], I), "axes": [2, 0, 1]}),
        9,
    );
    s.add("Flip", "BaseFloat", json!({"input": t(0, &x, F), "out": t(1, &x, F), "axes": [1]}), 1);
    let slice = |start: i64, end: i64| json!({"start": start, "end": end, "step": 1});
    let ranges = json!([slice(0, 6), slice(1, 3), slice(0, 3)]);
    let cut = json!({"tensor": t(0, &x, F), "ranges": ranges, "out": t(1, &[6, 2, 3], F)});
    s.add("Slice", "BaseFloat", cut, 1);
    let assign =
        json!({"tensor": t(0, &x, F), "ranges": ranges, "value": t(1, &[6, 2, 3], F), "out": t(2, &x, F)});
    s.add("SliceAssign", "BaseFloat", assign, 1);
    s.add(
        "RepeatDim",
        "BaseFloat",
        json!({"tensor": t(0, &x, F), "dim": 1, "times": 2, "out": t(1, &[6, 8, 3], F)}),
        1,
    );
    let cat = json!({"tensors": [t(0, &x, F), t(1, &[6, 2, 3], F)], "dim": 1, "out": t(2, &[6, 6, 3], F)});
    s.add("Cat", "BaseFloat", cat, 1);
    let unfold = json!({"input": t(0, &x, F), "out": t(1, &[6, 3, 3, 2], F), "dim": 1, "size": 2, "step": 1});
    s.add("Unfold", "BaseFloat", unfold, 1);
    for value in [0.0, 1.0] {
        let pad = json!({"input": t(0, &x, F), "out": t(1, &[6, 7, 3], F), "padding": [[0, 0], [1, 2], [0, 0]],
                         "mode": {"Constant": {"Float": value}}});
        s.add("Pad", "NumericFloat", pad, 1);
    }
    s.add("Full", "NumericFloat", json!({"out": t(0, &[5, 3], F), "value": {"Float": 2.5}}), 1);
    s.add("Zeros", "BaseFloat", json!({"out": t(0, &[5, 3], F)}), 1);
    s.add("Ones", "BaseFloat", json!({"out": t(0, &[5, 3], F)}), 1);
    s.add("Random", "Float", json!({"out": t(0, &[5, 3], F), "distribution": {"Normal": [0.5, 2.0]}}), 1);
    s.add("Random", "Float", json!({"out": t(0, &[5, 3], F), "distribution": {"Bernoulli": 0.5}}), 1);
    s.add(
        "IntRandom",
        "NumericInt",
        json!({"out": t(0, &[5, 3], I), "distribution": {"Uniform": [0.0, 9.0]}}),
        1,
    );
}

fn rows(s: &mut Samples) {
    let table = [7, 5];
    let select = |family: &str, s: &mut Samples, dtype| {
        let fields = json!({"tensor": t(0, &table, dtype), "dim": 0, "indices": t(1, &[4], I), "out": t(2, &[4, 5], dtype)});
        s.add("Select", family, fields, 7);
    };
    select("BaseFloat", s, F);
    select("BaseInt", s, I);
    let columns =
        json!({"tensor": t(0, &table, F), "dim": 1, "indices": t(1, &[4], I), "out": t(2, &[7, 4], F)});
    s.add("Select", "BaseFloat", columns, 5);
    let gather =
        json!({"tensor": t(0, &table, F), "dim": 1, "indices": t(1, &[7, 3], I), "out": t(2, &[7, 3], F)});
    s.add("Gather", "BaseFloat", gather, 5);
    let put = json!({"tensor": t(0, &table, F), "dim": 0, "indices": t(1, &[4], I), "value": t(2, &[4, 5], F), "update": "Add",
                     "out": t(3, &table, F)});
    s.add("SelectAssign", "BaseFloat", put, 7);
    let scatter = json!({"tensor": t(0, &table, F), "dim": 1, "indices": t(1, &[7, 3], I), "value": t(2, &[7, 3], F),
                         "update": "Add", "out": t(3, &table, F)});
    s.add("Scatter", "BaseFloat", scatter, 5);
    let embed = json!({"weights": t(0, &table, F), "indices": t(1, &[2, 3], I), "out": t(2, &[2, 3, 5], F)});
    s.add("Embedding", "Module", embed, 7);
    let back = json!({"weights": t(0, &table, F), "out_grad": t(1, &[2, 3, 5], F), "indices": t(2, &[2, 3], I),
                      "out": t(3, &table, F)});
    s.add("EmbeddingBackward", "Module", back, 7);
}

fn products(s: &mut Samples) {
    let matmul = |a: &[usize], b: &[usize], c: &[usize]| json!({"lhs": t(0, a, F), "rhs": t(1, b, F), "out": t(2, c, F)});
    s.add("Matmul", "Float", matmul(&[5, 4], &[4, 3], &[5, 3]), 1);
    s.add("Matmul", "Float", matmul(&[3, 5, 4], &[1, 4, 6], &[3, 5, 6]), 1);
    s.add("Matmul", "Float", matmul(&[2, 3, 5, 4], &[2, 3, 4, 6], &[2, 3, 5, 6]), 1);
    for bias in [t(2, &[6], F), Value::Null] {
        let fields = json!({"x": t(0, &[2, 5, 4], F), "weight": t(1, &[4, 6], F), "bias": bias, "out": t(3, &[2, 5, 6], F)});
        s.add("Linear", "Module", fields, 1);
    }
    let back =
        json!({"weight": t(0, &[4, 6], F), "output_grad": t(1, &[2, 5, 6], F), "out": t(2, &[2, 5, 4], F)});
    s.add("LinearXBackward", "Module", back, 1);
    let back = json!({"x": t(0, &[2, 5, 4], F), "output_grad": t(1, &[2, 5, 6], F), "out": t(2, &[4, 6], F)});
    s.add("LinearWeightBackward", "Module", back, 1);
    s.add(
        "LinearBiasBackward",
        "Module",
        json!({"output_grad": t(0, &[2, 5, 6], F), "out": t(1, &[6], F)}),
        1,
    );

    for groups in [1, 2] {
        let (x, w, y) = ([3, 4, 6], [6, 4 / groups, 3], [3, 6, 6]);
        let options = json!({"stride": [1], "padding": [[1, 1]], "dilation": [1], "groups": groups});
        let fields = json!({"x": t(0, &x, F), "weight": t(1, &w, F), "bias": t(2, &[6], F), "options": options, "out": t(3, &y, F)});
        s.add("Conv1d", "Module", fields, 1);
        let fields = json!({"x": t(0, &x, F), "weight": t(1, &w, F), "output_grad": t(2, &y, F), "options": options, "out": t(3, &x, F)});
        s.add("Conv1dXBackward", "Module", fields, 1);
        let fields = json!({"x": t(0, &x, F), "weight": t(1, &w, F), "output_grad": t(2, &y, F), "options": options, "out": t(3, &w, F)});
        s.add("Conv1dWeightBackward", "Module", fields, 1);
    }
    let fields = json!({"x": t(0, &[3, 4, 6], F), "bias": t(1, &[6], F), "output_grad": t(2, &[3, 6, 6], F), "out": t(3, &[6], F)});
    s.add("Conv1dBiasBackward", "Module", fields, 1);
    let (x, w, y) = ([3, 4, 5, 5], [6, 4, 3, 3], [3, 6, 5, 5]);
    let options = json!({"stride": [1, 1], "padding": [[1, 1], [1, 1]], "dilation": [1, 1], "groups": 1});
    for bias in [t(2, &[6], F), Value::Null] {
        let fields = json!({"x": t(0, &x, F), "weight": t(1, &w, F), "bias": bias, "options": options, "out": t(3, &y, F)});
        s.add("Conv2d", "Module", fields, 1);
    }
    let fields = json!({"x": t(0, &x, F), "weight": t(1, &w, F), "output_grad": t(2, &y, F), "options": options, "out": t(3, &x, F)});
    s.add("Conv2dXBackward", "Module", fields, 1);
    let fields = json!({"x": t(0, &x, F), "weight": t(1, &w, F), "output_grad": t(2, &y, F), "options": options, "out": t(3, &w, F)});
    s.add("Conv2dWeightBackward", "Module", fields, 1);
    let fields =
        json!({"x": t(0, &x, F), "bias": t(1, &[6], F), "output_grad": t(2, &y, F), "out": t(3, &[6], F)});
    s.add("Conv2dBiasBackward", "Module", fields, 1);
    let options = json!({"stride": [1], "padding": [1], "padding_out": [0], "dilation": [1], "groups": 1});
    let fields = json!({"x": t(0, &[3, 4, 6], F), "weight": t(1, &[4, 6, 3], F), "bias": t(2, &[6], F), "options": options,
                        "out": t(3, &[3, 6, 6], F)});
    s.add("ConvTranspose1d", "Module", fields, 1);
    let options =
        json!({"stride": [1, 1], "padding": [1, 1], "padding_out": [0, 0], "dilation": [1, 1], "groups": 1});
    let fields = json!({"x": t(0, &x, F), "weight": t(1, &[4, 6, 3, 3], F), "bias": t(2, &[6], F), "options": options, "out": t(3, &y, F)});
    s.add("ConvTranspose2d", "Module", fields, 1);
    let heads = [2, 3, 5, 4];
    let options = json!({"scale": null, "softcap": null, "is_causal": true});
    let fields = json!({"query": t(0, &heads, F), "key": t(1, &heads, F), "value": t(2, &heads, F), "mask": null,
                        "attn_bias": null, "options": options, "out": t(3, &heads, F)});
    s.add("Attention", "Module", fields, 1);
}

fn layers(s: &mut Samples) {
    let norm = json!({"input": t(0, &[2, 5, 4], F), "gamma": t(1, &[4], F), "beta": t(2, &[4], F), "epsilon": {"Float": 1e-5},
                      "out": t(3, &[2, 5, 4], F)});
    s.add("LayerNorm", "Module", norm, 1);
    let x = [3, 4, 6, 6];
    let c = |id: u64| t(id, &[4], F);
    let norm = json!({"x": t(0, &x, F), "gamma": c(1), "beta": c(2), "mean": c(3), "variance": c(4), "epsilon": {"Float": 1e-5},
                      "out": t(5, &x, F)});
    s.add("BatchNorm", "Module", norm, 1);
    s.add(
        "PRelu",
        "Activation",
        json!({"lhs": t(0, &x, F), "rhs": t(1, &[1, 4, 1, 1], F), "out": t(2, &x, F)}),
        1,
    );
    let (y, line, half) = ([3, 4, 3, 3], [3, 4, 6], [3, 4, 3]);
    let one = json!({"kernel_size": 2, "stride": 2, "padding": 0});
    let two = json!({"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0]});
    let with = |base: &Value, more: Value| {
        let mut all = base.as_object().unwrap().clone();
        all.extend(more.as_object().unwrap().clone());
        Value::Object(all)
    };
    let average = json!({"count_include_pad": true, "ceil_mode": false});
    let largest = |dilation: Value| json!({"dilation": dilation, "ceil_mode": false});
    for (suffix, x, y, options, dilation) in
        [(1, &line[..], &half[..], &one, json!(1)), (2, &x[..], &y[..], &two, json!([1, 1]))]
    {
        let size = if suffix == 1 { json!(3) } else { json!([3, 3]) };
        let name = |one: &'static str, two: &'static str| if suffix == 1 { one } else { two };
        let options_a = with(options, average.clone());
        let options_m = with(options, largest(dilation));
        s.add(
            name("AvgPool1d", "AvgPool2d"),
            "Module",
            with(&options_a, json!({"x": t(0, x, F), "out": t(1, y, F)})),
            1,
        );
        let fields = with(&options_a, json!({"x": t(0, x, F), "grad": t(1, y, F), "out": t(2, x, F)}));
        s.add(name("AvgPool1dBackward", "AvgPool2dBackward"), "Module", fields, 1);
        s.add(
            name("AdaptiveAvgPool1d", "AdaptiveAvgPool2d"),
            "Module",
            json!({"x": t(0, x, F), "output_size": size, "out": t(1, y, F)}),
            1,
        );
        let fields = json!({"x": t(0, x, F), "grad": t(1, y, F), "out": t(2, x, F)});
        s.add(name("AdaptiveAvgPool1dBackward", "AdaptiveAvgPool2dBackward"), "Module", fields, 1);
        s.add(
            name("MaxPool1d", "MaxPool2d"),
            "Module",
            with(&options_m, json!({"x": t(0, x, F), "out": t(1, y, F)})),
            1,
        );
        let fields = with(&options_m, json!({"x": t(0, x, F), "out": t(1, y, F), "out_indices": t(2, y, I)}));
        s.add(name("MaxPool1dWithIndices", "MaxPool2dWithIndices"), "Module", fields, 1);
        // Places within a channel: the first of every window.
        let fields = with(
            &options_m,
            json!({"x": t(0, x, F), "indices": t(1, y, I), "grad": t(2, y, F), "out": t(3, x, F)}),
        );
        s.add(name("MaxPool1dWithIndicesBackward", "MaxPool2dWithIndicesBackward"), "Module", fields, 6);
    }
    let fields = json!({"x": t(0, &x, F), "output_size": [9, 9], "options": {"mode": "Nearest", "align_corners": false},
                        "out": t(1, &[3, 4, 9, 9], F)});
    s.add("Interpolate", "Module", fields, 1);
}
