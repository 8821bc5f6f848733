//! Every row of the table is sound: computed on parts and put together, an operation gives what it gives on the whole.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod samples;

use std::collections::BTreeSet;

use burn::tensor::TensorData;
use kiln_core::random_stream;
use kiln_oneflow::signature::{NdSignature, TABLE, on_mesh, signatures};
use kiln_oneflow::soundness::{on_parts, on_whole};

use samples::{Sample, samples};

fn close(found: &TensorData, expected: &TensorData, place: &str) {
    assert_eq!(found.shape(), expected.shape(), "{place}");
    for (at, (a, b)) in found.iter::<f64>().zip(expected.iter::<f64>()).enumerate() {
        let same = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-5 + 1e-4 * b.abs();
        assert!(same, "{place}: element {at} is {a}, must be {b}");
    }
}

fn check(sample: &Sample, signature: &NdSignature, mesh: &[usize], number: u64) {
    let place = format!("{} {:?} {signature} on {mesh:?}", sample.kind, sample.operation);
    let mut rng = random_stream(11, "signature", number);
    let expected = on_whole(&sample.operation, &sample.inputs).unwrap();
    let found = on_parts(&sample.operation, signature, mesh, &sample.inputs, &mut rng)
        .unwrap_or_else(|e| panic!("{place}: {e}"));
    for (found, expected) in found.iter().zip(&expected) {
        close(found, expected, &place);
    }
}

#[test]
fn every_row_is_sound_on_two_and_three_devices() {
    let mut seen = BTreeSet::new();
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
                    check(&sample, &signature, &[devices], number);
                }
            }
        }
    }
    let missing: Vec<&str> = TABLE.iter().map(|row| row.kind).filter(|kind| !seen.contains(kind)).collect();
    assert!(missing.is_empty(), "rows without a sample: {missing:?}");
}

#[test]
fn signatures_of_both_axes_of_a_mesh_are_sound_together() {
    let mut number = 1 << 20;
    for sample in samples() {
        for signature in on_mesh(&sample.operation, &[2, 2]).unwrap() {
            number += 1;
            if signature.0.iter().all(|one| !one.in_parts) {
                check(&sample, &signature, &[2, 2], number);
            }
        }
    }
}
