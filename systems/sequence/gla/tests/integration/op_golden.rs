//! The operator against golden vectors, in all three forms and all chunk settings, forward and backward.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::tensor::{Device, Tensor};
use kiln_core::TensorFile;
use kiln_gla::op::{GlaOpConfig, gla_chunk_composed, gla_chunk_with_state, gla_parallel, gla_recurrent};

const CASES: [&str; 5] =
    ["op_b1h1t1", "op_b2h3t37", "op_b1h2t130", "op_b1h2t100_strong_decay", "op_b1h1t257_nodecay_like"];
const SETTINGS: [(usize, usize); 5] = [(16, 16), (32, 16), (64, 16), (64, 8), (128, 32)];
const INPUTS: [&str; 5] = ["q", "k", "v", "g", "h0"];

type Form<'a> = &'a dyn Fn([Tensor<4>; 5]) -> (Tensor<4>, Tensor<4>);

/// Largest difference in units of `max(1, max |reference|)`.
fn difference(found: Tensor<4>, reference: Tensor<4>) -> f32 {
    let scale = reference.clone().abs().max().into_scalar::<f32>().max(1.0);
    let worst = (found - reference).abs().max().into_scalar::<f32>();
    assert!(worst.is_finite());
    worst / scale
}

fn check(case: &str, label: &str, form: Form<'_>) {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(case).with_extension("safetensors");
    let mut golden = TensorFile::read(&path).unwrap();
    let device = Device::flex().autodiff();
    let inputs = INPUTS.map(|name| golden.take_float::<4>(name, &device).unwrap().require_grad());
    let mut reference = |name: &str| golden.take_float::<4>(name, &device).unwrap();
    let (d_o, d_ht) = (reference("do"), reference("dht"));

    let (o, ht) = form(inputs.clone());
    let forward = difference(o.clone(), reference("o")).max(difference(ht.clone(), reference("ht")));
    assert!(forward <= 2e-4, "{case}, {label}: forward differs by {forward}");

    let gradients = ((o * d_o).sum() + (ht * d_ht).sum()).backward();
    for (name, input) in INPUTS.iter().zip(&inputs) {
        let found = Tensor::from_inner(input.grad(&gradients).unwrap());
        let backward = difference(found, reference(&format!("d{name}")));
        assert!(backward <= 1e-3, "{case}, {label}: d{name} differs by {backward}");
    }
}

#[test]
fn the_recurrent_form_matches_golden_vectors() {
    for case in CASES {
        check(case, "recurrent", &|[q, k, v, g, h0]| gla_recurrent(q, k, v, g, Some(h0)));
    }
}

#[test]
fn the_parallel_form_matches_golden_vectors() {
    for case in CASES {
        check(case, "parallel", &|[q, k, v, g, h0]| gla_parallel(q, k, v, g, Some(h0)));
    }
}

#[test]
fn the_chunk_form_matches_golden_vectors_in_every_setting() {
    for case in CASES {
        for (chunk, sub_chunk) in SETTINGS {
            for recompute in [false, true] {
                let config = GlaOpConfig { chunk, sub_chunk, recompute };
                let form =
                    |[q, k, v, g, h0]: [Tensor<4>; 5]| gla_chunk_with_state(q, k, v, g, Some(h0), config);
                check(case, &format!("{config:?}"), &form);
            }
        }
    }
}

#[test]
fn the_composed_chunk_form_matches_golden_vectors() {
    for case in CASES {
        let config = GlaOpConfig::default();
        let form = |[q, k, v, g, h0]: [Tensor<4>; 5]| gla_chunk_composed(q, k, v, g, Some(h0), config);
        check(case, "composed", &form);
    }
}
