//! Rules in double precision, against central differences.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::backend::ir::{
    ActivationOperationIr as Activation, FloatOperationIr as Float, IrVisitorMut, LayerNormOpIr,
    ModuleOperationIr, NumericOperationIr as Numeric, TensorId, TensorIr,
};
use burn::tensor::{DType, TensorData};
use kiln_core::{Port, PortKind};

use crate::builder::Builder;
use crate::{Boundary, Graph};

/// Lets a graph compute in double precision.
struct Double;

impl IrVisitorMut for Double {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if tensor.dtype.is_float() {
            tensor.dtype = DType::F64;
        }
    }
}

/// A small transformer block with its loss: attention, GELU, layer norm, and the cross entropy of the last axis.
fn block() -> Graph {
    let mut b = Builder::new(0);
    let f32 = DType::F32;
    let [x, w, v, gamma] = [&[2, 3, 4][..], &[4, 4], &[4, 5], &[4]].map(|shape| b.provided(shape, f32));
    let beta = b.constant(TensorData::new(vec![0.1f32, -0.2, 0.3, 0.0], [4]));
    let norm = |b: &mut Builder, x: &TensorIr| {
        let (x, gamma, beta) = (x.clone(), gamma.clone(), beta.clone());
        b.module(|id| ModuleOperationIr::LayerNorm(LayerNormOpIr::create(x, gamma, Some(beta), 1e-5, || id)))
            .unwrap()
    };
    let normed = norm(&mut b, &x);
    let q = b.matmul(&normed, &w).unwrap();
    let keys = b.transpose(&x).unwrap();
    let scores = b.matmul(&q, &keys).unwrap();
    let scores = b.mul_scalar(&scores, 0.5).unwrap();
    let weights = b.along(&scores, 2, Activation::Softmax).unwrap();
    let mixed = b.matmul(&weights, &x).unwrap();
    let sum = b.add(&x, &mixed).unwrap();
    let normed = norm(&mut b, &sum);
    let hidden = b.activation(&normed, Activation::Gelu).unwrap();
    let logits = b.matmul(&hidden, &v).unwrap();
    let bent = b.float(&logits, Float::Tanh).unwrap();
    let scores = b.along(&bent, 2, Activation::LogSoftmax).unwrap();
    let targets = b.constant(TensorData::new(vec![0i64, 4, 2, 1, 1, 3], [2, 3, 1]));
    let right = b.gather(&scores, 2, &targets).unwrap();
    let right = b.reshape(&right, &[6]).unwrap();
    let mean = b.reduce(&right, 0, Numeric::MeanDim).unwrap();
    let loss = b.unary(&mean, Numeric::Neg).unwrap();
    let boundary = |name: &str, tensor: &TensorIr| Boundary {
        port: Port { name: name.into(), kind: PortKind::Float, shape: tensor.shape.to_vec() },
        tensor: tensor.id,
    };
    let inputs = vec![boundary("x", &x), boundary("w", &w), boundary("v", &v), boundary("gamma", &gamma)];
    let outputs = vec![boundary("loss", &loss)];
    Graph { kind: "block".into(), inputs, outputs, operations: b.operations, constants: b.constants }
}

fn in_double(mut graph: Graph) -> Graph {
    graph.operations.iter_mut().for_each(|operation| operation.visit_mut(&mut Double));
    for data in graph.constants.values_mut().filter(|data| data.dtype().is_float()) {
        *data = data.clone().convert_dtype(DType::F64);
    }
    graph
}

fn run(graph: &Graph, inputs: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let provided = graph.inputs.iter().zip(inputs);
    let provided = provided
        .map(|(input, values)| (input.tensor, TensorData::new(values.clone(), input.port.shape.clone())));
    let wanted: Vec<TensorId> = graph.outputs.iter().map(|output| output.tensor).collect();
    let provided: Vec<_> = provided.collect();
    let outputs = graph.interpret(provided.into_iter(), wanted.into_iter()).unwrap();
    outputs.iter().map(|data| data.iter::<f64>().collect()).collect()
}

#[test]
fn the_gradient_of_a_transformer_block_passes_central_differences_in_double_precision() {
    let graph = block();
    let gradient = in_double(graph.gradient("loss", &["x", "w", "v", "gamma"]).unwrap());
    let graph = in_double(graph);
    let values = |count: usize, by: usize| (0..count).map(|at| ((at * by % 17) as f64 - 8.0) / 7.0).collect();
    let inputs: Vec<Vec<f64>> = graph
        .inputs
        .iter()
        .zip([5, 7, 11, 3])
        .map(|(input, by)| values(input.port.shape.iter().product(), by))
        .collect();
    let found = run(&gradient, &inputs);
    assert!((found[0][0] - run(&graph, &inputs)[0][0]).abs() < 1e-12);
    let step = 1e-5;
    for (which, gradient) in found[1..].iter().enumerate() {
        for (at, slope) in gradient.iter().enumerate() {
            let moved = |by: f64| {
                let mut inputs = inputs.clone();
                inputs[which][at] += by;
                run(&graph, &inputs)[0][0]
            };
            let expected = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((slope - expected).abs() <= 1e-8, "input {which}[{at}]: {slope}, should be {expected}");
        }
    }
}
