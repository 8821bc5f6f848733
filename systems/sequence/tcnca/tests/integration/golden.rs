//! Reference values: MEGA's moving average and relative biases, dilated convolutions, and two whole models.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use kiln_core::{Context, System, TensorFile};
use kiln_nn::{LanguageModel, score_carried};
use kiln_ops::{DilatedConvOptions, dilated_conv};
use kiln_tcnca::checkpoint;
use kiln_tcnca::{MultiHeadEma, MultiHeadEmaConfig, RelativeBias, Tcnca};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn read<const D: usize>(file: &TensorFile, name: &str) -> Tensor<D> {
    file.get(name).unwrap().to_tensor(&Device::flex()).unwrap()
}

/// Compares with an array of a file, relative to its largest value.
fn assert_close<const D: usize>(what: &str, found: Tensor<D>, file: &TensorFile, name: &str, tolerance: f32) {
    let expected = file.get(name).unwrap().as_floats().unwrap();
    let found = found.into_data().try_to_vec::<f32>().unwrap();
    assert_eq!(found.len(), expected.len(), "{what}, {name}");
    let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let apart = (found - expected).abs();
        assert!(apart <= tolerance * largest, "{what}, {name}[{i}]: {found}, should be {expected}");
    }
}

fn ema_of(file: &TensorFile, bidirectional: bool) -> MultiHeadEma {
    let [channels] = read::<1>(file, "omega").dims();
    let [_, states] = read::<2>(file, "gamma").dims();
    let config = MultiHeadEmaConfig { states, bidirectional, ..MultiHeadEmaConfig::new(channels) };
    let mut ema = config.init(&Device::flex());
    ema.delta = Param::from_tensor(read(file, "delta"));
    ema.alpha = Param::from_tensor(read(file, "alpha"));
    ema.beta = Param::from_tensor(read(file, "beta"));
    ema.gamma = Param::from_tensor(read(file, "gamma"));
    ema.omega = Param::from_tensor(read(file, "omega"));
    ema
}

#[test]
fn the_moving_average_matches_mega_forward_and_backward() {
    for (name, bidirectional) in [
        ("mega_ema_causal_d1n1_l1.safetensors", false),
        ("mega_ema_causal_d6n4_l45.safetensors", false),
        ("mega_ema_bidir_d5n2_l33.safetensors", true),
    ] {
        let file = TensorFile::read(&data(name)).unwrap();
        let ema = ema_of(&file, bidirectional);
        let x = read::<3>(&file, "x");
        assert_close(name, ema.kernel(x.dims()[1]), &file, "kernel", 1e-4);
        assert_close(name, ema.forward(x.clone(), None), &file, "y", 1e-4);
        let leaf = Tensor::from_inner(x.clone()).require_grad();
        let upstream = Tensor::from_inner(read::<3>(&file, "dy"));
        let gradients = (ema.clone().train().forward(leaf.clone(), None) * upstream).sum().backward();
        assert_close(name, leaf.grad(&gradients).unwrap(), &file, "dx", 1e-4);
        if !bidirectional {
            let state = ema.initial_state(x.dims()[0], &Device::flex());
            let (y, state) = ema.forward_with_state(x, state);
            assert_close(name, y, &file, "y", 1e-4);
            assert_close(name, state.h, &file, "h_last", 1e-4);
        }
    }
}

#[test]
fn relative_biases_match_mega_at_and_below_the_length_of_the_table() {
    let file = TensorFile::read(&data("relative_bias.safetensors")).unwrap();
    let simple = RelativeBias::Simple(read(&file, "simple_param"));
    let rotary =
        RelativeBias::Rotary { alpha: read(&file, "rotary_alpha"), beta: read(&file, "rotary_beta") };
    for len in [16, 11] {
        assert_close("simple", simple.matrix(0..len, 0..len), &file, &format!("simple_bias_len{len}"), 1e-5);
        assert_close("rotary", rotary.matrix(0..len, 0..len), &file, &format!("rotary_bias_len{len}"), 1e-5);
    }
}

#[test]
fn dilated_convolutions_match() {
    let file = TensorFile::read(&data("dilated_conv.safetensors")).unwrap();
    for dilation in [1, 2, 9, 27, 64] {
        let weight = read::<3>(&file, "weight").squeeze_dim::<2>(1);
        let options = DilatedConvOptions::causal(4, dilation);
        let y = dilated_conv(read(&file, "x"), weight, Some(read(&file, "bias")), options);
        assert_close("causal", y, &file, &format!("y_dil{dilation}"), 1e-5);
    }
}

#[test]
fn whole_models_load_as_they_are_and_match_in_logits_and_likelihood() {
    let cx = Context::new();
    for name in ["model_full", "model_simplified"] {
        let model = checkpoint::open_lm(&data(name), &cx).unwrap();
        let mut io = TensorFile::read(&data(name).join("io.safetensors")).unwrap();
        let ids = io.take_int::<2>("input_ids", &cx.device).unwrap();
        assert_close(name, model.forward(ids.clone()), &io, "logits", 1e-3);

        let [rows, time] = ids.dims();
        let ids: Vec<u32> = ids.into_data().iter::<i64>().map(|id| id as u32).collect();
        let nats: f64 = ids.chunks(time).map(|row| score_carried(&model, row, 7).unwrap().nll_nats).sum();
        let text = std::fs::read_to_string(data(name).join("expected.json")).unwrap();
        let expected = serde_json::from_str::<serde_json::Value>(&text).unwrap();
        let expected = expected["mean_nll_nats"].as_f64().unwrap();
        assert!((nats / rows as f64 - expected).abs() <= 1e-3, "{name}: {}, {expected}", nats / rows as f64);
    }
}

#[test]
fn a_model_as_a_network_is_the_model() {
    let cx = Context::new();
    let network = Tcnca.network(&data("model_full"), &cx).unwrap();
    let [port] = &network.inputs()[..] else { panic!("one input") };
    let time = port.shape[1] as i64;
    let ids = Tensor::<1, Int>::arange(0..time, &cx.device).reshape([1, time]);
    let logits = Tensor::<3>::from_dispatch(network.forward(vec![ids.clone().into_dispatch()]).remove(0));
    assert_eq!(logits.dims().to_vec(), network.outputs()[0].shape);
    let model = checkpoint::open_lm(&data("model_full"), &cx).unwrap();
    assert_eq!(logits.into_data(), model.forward(ids).into_data());
}
