//! Graphs from ONNX files.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use kiln_compiler::loops::read_buffers;
use kiln_compiler::{Graph, GraphPass, OnnxOptions, capture, onnx_operators};

use crate::cases::{Case, FUNCTIONS, input};

fn data(name: &str) -> PathBuf {
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

/// What ONNX has nothing like.
const NOT_IN_ONNX: [(&str, &str); 6] = [
    ("remainder of numbers", "RemScalar"),
    ("atan2", "ArcTan2"),
    ("slices", "SliceAssign"),
    ("select assign", "SelectAssign"),
    ("gather scatter", "Scatter"),
    ("bilinear interpolation", "Interpolate"),
];

#[test]
fn every_operation_that_onnx_has_survives_being_written_and_read() {
    let inputs = [input([4, 6]).into_data(), input([6, 4]).into_data()];
    for (name, function) in FUNCTIONS {
        let graph = capture(Box::new(Case(*function))).unwrap();
        match NOT_IN_ONNX.iter().find(|(missing, _)| missing == name) {
            Some((_, operation)) => {
                let said = graph.to_onnx_bytes().unwrap_err().to_string();
                assert!(said.contains(&format!("{operation} (operations [")), "{name}: {said}");
            }
            None => assert_survives(&graph, &inputs, name),
        }
    }
}

fn refusal(bytes: &[u8], options: &OnnxOptions) -> String {
    let error = Graph::from_onnx_bytes(bytes, options).unwrap_err();
    format!("{error}\n{}", error.hint_text().unwrap_or(""))
}

#[test]
fn damaged_files_are_refused_wherever_they_are_cut_or_changed() {
    let whole = std::fs::read(data("tiny.onnx")).unwrap();
    let none = OnnxOptions::default();
    for length in 0..whole.len() {
        if let Ok(graph) = Graph::from_onnx_bytes(&whole[..length], &none) {
            assert!(graph.verify().is_ok(), "{length}");
        }
    }
    for at in 0..whole.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            if let Ok(graph) = Graph::from_onnx_bytes(&bytes, &none) {
                assert!(graph.verify().is_ok(), "{at}");
            }
        }
    }
    assert!(refusal(b"", &none).contains("holds no graph"));
    assert!(refusal(b"GIF89a", &none).contains("not a complete ONNX file"));
}

#[test]
fn sizes_that_are_not_open_are_refused_with_those_that_are() {
    let whole = std::fs::read(data("tiny.onnx")).unwrap();
    let said = refusal(&whole, &dims(&[("sequence", 8)]));
    assert!(said.contains("no open size \"sequence\"") && said.contains("x.0"), "{said}");
    assert!(onnx_operators().is_sorted());
}
