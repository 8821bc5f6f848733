//! Whole models against golden vectors: logits, greedy text and likelihood, in both public layouts.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use burn::tensor::{Int, Tensor};
use kiln_core::{Context, TensorFile};
use kiln_gla::checkpoint;
use kiln_nn::{LanguageModel, Sampling, generate, score_carried};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn logits_and_reference(name: &str) -> (Tensor<3>, Tensor<3>) {
    let cx = Context::new();
    let model = checkpoint::open(&golden(name), &cx).unwrap().model;
    let mut io = TensorFile::read(&golden(name).join("io.safetensors")).unwrap();
    let ids = io.take_int::<2>("input_ids", &cx.device).unwrap();
    (model.forward(ids), io.take_float("logits", &cx.device).unwrap())
}

#[test]
fn logits_match_in_both_mlp_layouts_which_are_the_same_model() {
    let (fused, reference) = logits_and_reference("model_fused_mlp");
    let (split, _) = logits_and_reference("model_split_mlp");
    let worst = (fused.clone() - reference).abs().max().into_scalar::<f32>();
    assert!(worst <= 2e-3, "logits differ by {worst}");
    assert_eq!(fused.into_data(), split.into_data());
}

#[test]
fn greedy_text_is_the_reference_one() {
    let cx = Context::new();
    let model = checkpoint::open(&golden("model_fused_mlp"), &cx).unwrap().model;
    let mut io = TensorFile::read(&golden("model_fused_mlp/io.safetensors")).unwrap();
    let expected: Vec<u32> = io
        .take_int::<2>("greedy_ids", &cx.device)
        .unwrap()
        .into_data()
        .iter::<i64>()
        .map(|id| id as u32)
        .collect();
    let (prompt, continuation) = expected.split_at(32);
    let sampling = Sampling { greedy: true, ..Sampling::default() };
    let state = model.initial_state(1, &cx.device);
    let mut rng = cx.rng("generate", 0);
    let keep_on = |_| std::ops::ControlFlow::Continue(());
    let (ids, _) = generate(&model, prompt, state, &sampling, continuation.len(), &mut rng, keep_on).unwrap();
    assert_eq!(ids, continuation);
}

#[test]
fn likelihood_is_the_reference_one() {
    let cx = Context::new();
    let model = checkpoint::open(&golden("model_fused_mlp"), &cx).unwrap().model;
    let mut io = TensorFile::read(&golden("model_fused_mlp/io.safetensors")).unwrap();
    let ids: Tensor<2, Int> = io.take_int("input_ids", &cx.device).unwrap();
    let [rows, time] = ids.dims();
    let ids: Vec<u32> = ids.into_data().iter::<i64>().map(|id| id as u32).collect();
    let nats: f64 = ids.chunks(time).map(|row| score_carried(&model, row, 7).unwrap().nll_nats).sum();
    let text = std::fs::read_to_string(golden("model_fused_mlp/expected.json")).unwrap();
    let expected = serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let expected = expected.as_object().unwrap().values().find_map(serde_json::Value::as_f64).unwrap();
    assert!((nats / rows as f64 - expected).abs() <= 1e-3, "{} against {expected}", nats / rows as f64);
}
