//! Every row of the table is sound: computed on parts and put together, an operation gives what it gives on the whole.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;

use burn::tensor::TensorData;
use kiln_core::random_stream;
use kiln_oneflow::signature::{NdSignature, TABLE, on_mesh, signatures};
use kiln_oneflow::soundness::{on_parts, on_whole};

use crate::samples::{Sample, samples};

/// The first element that is not as it must be.
fn difference(found: &TensorData, expected: &TensorData) -> Option<String> {
    if found.shape() != expected.shape() {
        return Some(format!("the shape is {:?}, must be {:?}", found.shape(), expected.shape()));
    }
    let same =
        |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-5 + 1e-4 * b.abs();
    let mut pairs = found.iter::<f64>().zip(expected.iter::<f64>()).enumerate();
    let (at, (a, b)) = pairs.find(|&(_, (a, b))| !same(a, b))?;
    Some(format!("element {at} is {a}, must be {b}"))
}

/// What is wrong with an operation computed on parts.
fn fault(sample: &Sample, signature: &NdSignature, mesh: &[usize], number: u64) -> Option<String> {
    let mut rng = random_stream(11, "signature", number);
    let computed = on_whole(&sample.operation, &sample.inputs).and_then(|whole| {
        Ok((whole, on_parts(&sample.operation, signature, mesh, &sample.inputs, &mut rng)?))
    });
    let why = match computed {
        Ok((whole, parts)) => {
            parts.iter().zip(&whole).find_map(|(found, expected)| difference(found, expected))
        }
        Err(error) => Some(error.to_string()),
    };
    why.map(|why| format!("{} {signature} on {mesh:?}: {why}; {:?}", sample.kind, sample.operation))
}

fn assert_none(faults: &[String]) {
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn every_row_is_sound_on_two_and_three_devices() {
    let (mut seen, mut faults) = (BTreeSet::new(), Vec::new());
    let mut number = 0;
    for sample in samples() {
        let all = signatures(&sample.operation).unwrap();
        assert!(all.len() > 1, "no signature divides {} {:?}", sample.kind, sample.operation);
        seen.insert(sample.kind);
        for devices in [2, 3] {
            for signature in on_mesh(&sample.operation, &[devices]).unwrap() {
                number += 1;
                // Operations in parts are several with conversions between: see `softmaxes_over_a_split_axis`.
                if !signature.0[0].in_parts {
                    faults.extend(fault(&sample, &signature, &[devices], number));
                }
            }
        }
    }
    assert_none(&faults);
    let missing: Vec<&str> = TABLE.iter().map(|row| row.kind).filter(|kind| !seen.contains(kind)).collect();
    assert!(missing.is_empty(), "rows without a sample: {missing:?}");
}

#[test]
fn signatures_of_both_axes_of_a_mesh_are_sound_together() {
    let mut faults = Vec::new();
    let mut number = 1 << 20;
    for sample in samples() {
        for signature in on_mesh(&sample.operation, &[2, 2]).unwrap() {
            number += 1;
            if signature.0.iter().all(|one| !one.in_parts) {
                faults.extend(fault(&sample, &signature, &[2, 2], number));
            }
        }
    }
    assert_none(&faults);
}
