//! Reference values: exact and polynomial outputs, the heaviest tuples, Match3 labels.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use kiln_core::TensorFile;
use kiln_data::read_npz;
use kiln_kronecker_attention::attention::{
    AttentionOptions, tensor_attention, tensor_attention_direct, tuple_scores,
};
use kiln_kronecker_attention::match3::{Convention, Instance, MatchConstruction};
use kiln_kronecker_attention::polynomial::{Basis, ExpPolynomial, tensor_attention_poly};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

const FILES: [(&str, usize); 5] = [
    ("order1_n17_d8.npz", 1),
    ("order2_n1_d3.npz", 2),
    ("order2_n9_d4.npz", 2),
    ("order2_n23_d6_B2.npz", 2),
    ("order3_n7_d3.npz", 3),
];

/// A matrix of a file as one head `[1, 1, rows, width]`.
fn head(file: &TensorFile, name: &str) -> Tensor<4> {
    let matrix: Tensor<2> = file.get(name).unwrap().to_tensor(&Device::flex()).unwrap();
    matrix.unsqueeze::<4>()
}

fn heads(file: &TensorFile, letter: char, order: usize) -> Vec<Tensor<4>> {
    (1..=order).map(|l| head(file, &format!("{letter}{l}"))).collect()
}

fn assert_close(what: &str, found: Tensor<4>, file: &TensorFile, name: &str, absolute: f32) {
    let expected = file.get(name).unwrap().as_floats().unwrap();
    let found = found.into_data().try_to_vec::<f32>().unwrap();
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let tolerance = absolute + 1e-4 * expected.abs();
        assert!((found - expected).abs() <= tolerance, "{what}, {name}[{i}]: {found}, should be {expected}");
    }
}

#[test]
fn exact_outputs_match_blockwise_and_directly() {
    for (name, order) in FILES {
        let file = read_npz(&data(name)).unwrap();
        let (q, keys, values) = (head(&file, "Q"), heads(&file, 'K', order), heads(&file, 'V', order));
        for (causal, expected) in [(false, "O"), (true, "O_causal")] {
            let options = AttentionOptions::new(1.0 / q.dims()[3] as f64).causal(causal);
            let blockwise = tensor_attention(q.clone(), &keys, &values, &options);
            assert_close(name, blockwise, &file, expected, 1e-5);
            let direct = tensor_attention_direct(q.clone(), &keys, &values, &options);
            assert_close(name, direct, &file, expected, 1e-5);
        }
    }
}

#[test]
fn every_query_finds_the_same_heaviest_tuple() {
    for (name, order) in FILES {
        let file = read_npz(&data(name)).unwrap();
        let q = head(&file, "Q");
        let scale = 1.0 / q.dims()[3] as f64;
        let heaviest = tuple_scores(q, &heads(&file, 'K', order), scale).argmax(3);
        let heaviest: Vec<i64> = heaviest.into_data().iter::<i64>().collect();
        assert_eq!(heaviest, file.get("row_argmax").unwrap().as_ints().unwrap(), "{name}");
    }
}

#[test]
fn polynomial_outputs_match_at_the_degrees_of_the_files() {
    let mut compared = 0;
    for (name, order) in FILES {
        let file = read_npz(&data(name)).unwrap();
        let (q, keys, values) = (head(&file, "Q"), heads(&file, 'K', order), heads(&file, 'V', order));
        for output in file.names().filter(|name| name.starts_with("O_poly_")) {
            let degree = output["O_poly_".len()..].parse().unwrap();
            let polynomial = ExpPolynomial::new(Basis::Taylor, degree, 1.0).unwrap();
            let options = AttentionOptions::new(1.0 / q.dims()[3] as f64);
            let found = tensor_attention_poly(q.clone(), &keys, &values, &options, &polynomial);
            assert_close(name, found, &file, output, 1e-5);
            compared += 1;
        }
    }
    assert!(compared >= 6, "only {compared} polynomial outputs were compared");
}

#[test]
fn match3_labels_are_those_of_both_conventions_and_the_construction_gives_them() {
    let text = std::fs::read_to_string(data("match3_cases.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    for case in cases.as_array().unwrap() {
        let instance: Instance = serde_json::from_value(case.clone()).unwrap();
        let labels = |name: &str| -> Vec<bool> {
            case[name].as_array().unwrap().iter().map(|label| label == 1).collect()
        };
        assert_eq!(instance.labels(Convention::Any), labels("match_any_indices"));
        assert_eq!(instance.labels(Convention::Distinct), labels("match_distinct"));
        let construction = MatchConstruction { modulus: instance.modulus };
        let found = construction.solve(&instance.x, &Device::flex());
        for (found, label) in found.iter().zip(labels("match_any_indices")) {
            let expected = f32::from(u8::from(label));
            assert!((found - expected).abs() < 1e-3, "M {}: {found}, should be {expected}", instance.modulus);
        }
    }
}
