//! Reference values: the four schemes, the target's outputs and the regulariser.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use kiln_core::{HostTensor, TensorFile};
use kiln_hypernet::{
    Arch, Condition, Conditioning, HyperNet, HyperNetConfig, Init, OutputRegularizer, OutputScheme, Target,
};

fn golden() -> TensorFile {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hypernet_outputs.safetensors");
    TensorFile::read(&path).unwrap()
}

/// A hypernetwork over the target 5-7-3 for three tasks, with the weights of the file: tensors by their names there, and
/// the names of the module's parameters.
fn load(scheme: OutputScheme, hidden: &[usize], names: &[(&str, &str)]) -> HyperNet {
    let config = HyperNetConfig::new(Target::mlp(&[5, 7, 3]).spec().unwrap())
        .with_conditioning([Conditioning::Task { tasks: 3, dim: 4 }])
        .with_scheme(scheme)
        .with_arch(Arch::Mlp(hidden.to_vec()))
        .with_init(Init::Kaiming);
    let mut file = golden();
    let mut weights = TensorFile::new();
    for (from, to) in names.iter().chain(&[("task_emb", "conditioner.tables.0")]) {
        weights.insert(*to, file.take(from).unwrap());
    }
    weights.into_module(config.init(None, &Device::flex()).unwrap()).unwrap()
}

/// Names of linear layers, with weight and bias each.
fn layers<'a>(pairs: &[(&str, &str)], others: &[(&'a str, &'a str)]) -> Vec<(String, String)> {
    let both = pairs.iter().flat_map(|(from, to)| {
        ["weight", "bias"].map(|part| (format!("{from}.{part}"), format!("{to}.{part}")))
    });
    both.chain(others.iter().map(|(from, to)| (from.to_string(), to.to_string()))).collect()
}

fn assert_close<const D: usize>(found: Tensor<D>, name: &str) {
    let expected: HostTensor = golden().take(name).unwrap();
    assert_eq!(found.dims().to_vec(), expected.shape, "{name}");
    let found: Vec<f32> = found.into_data().try_to_vec().unwrap();
    for (i, (found, expected)) in found.iter().zip(expected.as_floats().unwrap()).enumerate() {
        let tolerance = 1e-6 + 1e-5 * expected.abs();
        assert!((found - expected).abs() <= tolerance, "{name}[{i}]: {found}, should be {expected}");
    }
}

fn theta(hyper: &HyperNet) -> Tensor<2> {
    hyper.generate(&Condition::tasks([0, 1, 2])).unwrap().flat
}

fn of(scheme: OutputScheme, hidden: &[usize], names: Vec<(String, String)>) -> HyperNet {
    let names: Vec<(&str, &str)> = names.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    load(scheme, hidden, &names)
}

fn chunked() -> HyperNet {
    let names = layers(
        &[
            ("chunk.layer0", "makers.0.generator.layers.0"),
            ("chunk.layer1", "makers.0.generator.layers.1"),
            ("chunk.layer2", "makers.0.heads.0"),
        ],
        &[("chunk_emb", "makers.0.embeddings")],
    );
    of(OutputScheme::Chunk { chunk: 11, emb_dim: 3 }, &[6, 5], names)
}

#[test]
fn all_weights_at_once() {
    let names =
        layers(&[("once.layer0", "makers.0.generator.layers.0"), ("once.layer1", "makers.0.heads.0")], &[]);
    assert_close(theta(&of(OutputScheme::Once, &[6], names)), "once.theta");
}

#[test]
fn a_head_for_every_tensor() {
    let names = layers(
        &[
            ("heads.trunk", "makers.0.generator.layers.0"),
            ("heads.head0", "makers.0.heads.0"),
            ("heads.head1", "makers.0.heads.1"),
            ("heads.head2", "makers.0.heads.2"),
            ("heads.head3", "makers.0.heads.3"),
        ],
        &[],
    );
    assert_close(theta(&of(OutputScheme::Heads { by_layer: false }, &[7], names)), "heads.theta");
}

#[test]
fn a_call_for_every_tensor() {
    let names = layers(
        &[("comp.layer0", "makers.0.generator.layers.0"), ("comp.layer1", "makers.0.heads.0")],
        &[("comp.emb", "makers.0.embeddings")],
    );
    assert_close(theta(&of(OutputScheme::Component { emb_dim: 3 }, &[6], names)), "comp.theta");
}

#[test]
fn a_call_for_every_chunk_and_what_the_target_makes_of_it() {
    let hyper = chunked();
    let theta = theta(&hyper);
    assert_close(theta.clone(), "chunk.theta");
    let x: Tensor<2> = golden().take("x").unwrap().to_tensor(&Device::flex()).unwrap();
    let y = Target::mlp(&[5, 7, 3]).forward(theta, x.unsqueeze::<3>().expand([3, 4, 5]));
    assert_close(y, "chunk.y");
}

#[test]
fn the_regulariser_and_its_gradient_at_the_snapshot() {
    let hyper = chunked();
    let old: Tensor<2> = golden().take("reg.old_theta").unwrap().to_tensor(&Device::flex()).unwrap();
    assert_close(OutputRegularizer { old }.value(&hyper).unwrap(), "reg.value");

    let hyper = hyper.train();
    let value = OutputRegularizer::snapshot(&hyper, 2).unwrap().value(&hyper).unwrap();
    assert_eq!(value.clone().into_scalar::<f32>(), 0.0);
    let gradients = value.backward();
    let gradient = hyper.makers[0].heads[0].weight.val().grad(&gradients).unwrap();
    assert_eq!(gradient.abs().max().into_scalar::<f32>(), 0.0);
}
