//! Graphs from ONNX files.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::tensor::TensorData;
use kiln_compiler::loops::read_buffers;
use kiln_compiler::{Graph, GraphPass, OnnxOptions};

fn data(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn dims(pairs: &[(&str, usize)]) -> OnnxOptions {
    OnnxOptions { dims: pairs.iter().map(|(name, size)| (name.to_string(), *size)).collect() }
}

#[test]
fn a_convolutional_network_computes_its_recorded_outputs_before_and_after_passes() {
    let io = read_buffers(&data("tiny_io.npz")).unwrap();
    let (x, y) = (io["x"].to_tensor(), io["y"].to_tensor());
    let mut graph = Graph::from_onnx(&data("tiny.onnx"), &dims(&[("x.0", io["x"].shape[0])])).unwrap();
    for passes in [&[][..], &GraphPass::ALL] {
        passes.iter().for_each(|pass| pass.apply(&mut graph).unwrap());
        let found = graph.run(std::slice::from_ref(&x)).unwrap();
        for (a, b) in floats(&found[0]).iter().zip(floats(&y)) {
            assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a}, should be {b}");
        }
    }
}

/// Writes a graph, reads it back, and compares what both compute.
fn assert_survives(graph: &Graph, inputs: &[TensorData], what: &str) {
    let again = Graph::from_onnx_bytes(&graph.to_onnx_bytes().unwrap(), &OnnxOptions::default()).unwrap();
    let names = |graph: &Graph| {
        let ports = graph.inputs.iter().chain(&graph.outputs);
        ports.map(|boundary| boundary.port.clone()).collect::<Vec<_>>()
    };
    assert_eq!((names(&again), &again.kind), (names(graph), &graph.kind), "{what}");
    for (a, b) in again.run(inputs).unwrap().iter().zip(graph.run(inputs).unwrap()) {
        for (a, b) in floats(a).iter().zip(floats(&b)) {
            assert!(
                (a - b).abs() <= 1e-5 * (1.0 + b.abs()) || a.is_nan() && b.is_nan(),
                "{what}: {a}, should be {b}"
            );
        }
    }
}
