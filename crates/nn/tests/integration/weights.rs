//! A module with weights from outside computes as if they were its own, and whatever made them gets its gradients.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::random_stream;
use kiln_nn::{
    BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig,
    Linear, LinearConfig, WeightSpec, Weights, initialise,
};
use rand::{Rng, RngExt};

/// One of each layer with parameters of a different kind.
#[derive(Module, Debug)]
struct Net {
    symbols: Embedding,
    conv: Conv2d,
    batch: BatchNorm,
    norm: LayerNorm,
    layers: Vec<Linear>,
}

impl Net {
    fn new() -> Self {
        initialise(&Device::flex(), &mut random_stream(1, "net", 0), |device| Self {
            symbols: EmbeddingConfig::new(5, 9).init(device),
            conv: Conv2dConfig::new([1, 2], [2, 2]).init(device),
            batch: BatchNormConfig::new(2).init(device),
            norm: LayerNormConfig::new(8).init(device),
            layers: vec![LinearConfig::new(8, 4).init(device), LinearConfig::new(4, 3).init(device)],
        })
    }

    /// `[6, 3]`
    fn forward(&self) -> Tensor<2> {
        let ids = Tensor::<1, Int>::from_ints([0, 3, 1, 4, 2, 3], &Device::flex()).unsqueeze::<2>();
        let x = self.symbols.forward(ids).reshape([6, 1, 3, 3]);
        let x = self.batch.forward(self.conv.forward(x)).reshape([6, 8]);
        let x = self.layers[0].forward(self.norm.forward(x)).tanh();
        self.layers[1].forward(x)
    }
}

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().unwrap()
}

fn draw(count: usize, largest: f32, rng: &mut impl Rng) -> Tensor<1> {
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-largest..=largest)).collect();
    Tensor::from_data(TensorData::new(values, [count]), &Device::flex())
}

#[test]
fn the_specification_lists_every_trainable_parameter_in_the_names_of_files() {
    let spec = WeightSpec::of(&Net::new());
    let found: Vec<_> =
        spec.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice(), p.fan_in())).collect();
    assert_eq!(
        found,
        [
            ("symbols.weight", &[5, 9][..], Some(1)),
            ("conv.weight", &[2, 1, 2, 2], Some(4)),
            ("conv.bias", &[2], None),
            ("batch.weight", &[2], None),
            ("batch.bias", &[2], None),
            ("norm.weight", &[8], None),
            ("norm.bias", &[8], None),
            ("layers.0.weight", &[8, 4], Some(8)),
            ("layers.0.bias", &[4], None),
            ("layers.1.weight", &[4, 3], Some(4)),
            ("layers.1.bias", &[3], None),
        ]
    );
    assert_eq!(spec, WeightSpec::of(&Net::new().train()));
    let frozen = Net { norm: Net::new().norm.no_grad(), ..Net::new() };
    assert_eq!(WeightSpec::of(&frozen).numel(), spec.numel() - 16);
}

#[test]
fn a_modules_own_values_change_nothing_and_others_do_not_reach_it() {
    let net = Net::new();
    let spec = WeightSpec::of(&net);
    let before = floats(net.forward());
    let own = spec.read(&net).unwrap();
    assert_eq!(floats(spec.split(own.clone()).unwrap().fill(&net).unwrap().forward()), before);
    let other = spec.split(own.clone() * 1.5).unwrap().fill(&net).unwrap();
    assert_ne!(floats(other.forward()), before);
    assert_eq!(floats(spec.read(&other).unwrap()), floats(own * 1.5));
    assert_eq!(floats(net.forward()), before);
}

#[test]
fn gradients_through_all_weights_equal_finite_differences() {
    let mut rng = random_stream(2, "test", 0);
    for training in [false, true] {
        let net = if training { Net::new().train() } else { Net::new() };
        let spec = WeightSpec::of(&net);
        let upstream = draw(18, 1.0, &mut rng).reshape([6, 3]);
        let loss = |theta: Tensor<1>| {
            let net = spec.split(theta).unwrap().fill(&net).unwrap();
            (net.forward() * upstream.clone()).sum()
        };
        // A linear generator in front, so that the weights are no leaves of the graph.
        let base = spec.read(&net.valid()).unwrap();
        let matrix = draw(3 * spec.numel(), 0.3, &mut rng).reshape([3, spec.numel()]);
        let generate = |c: Tensor<1>| {
            let base = base.clone();
            base + c.unsqueeze::<2>().matmul(matrix.clone()).squeeze_dim::<1>(0)
        };
        let c = Tensor::<1>::from_floats([0.3, -0.7, 0.5], &Device::flex());
        let leaf = Tensor::from_inner(c.clone()).require_grad();
        let gradients = loss(generate(leaf.clone())).backward();
        let found = floats(leaf.grad(&gradients).unwrap());
        for (i, found) in found.into_iter().enumerate() {
            let at = |step: f32| {
                let mut values = [0.0; 3];
                values[i] = step;
                let moved = c.clone() + Tensor::from_floats(values, &Device::flex());
                // On an autodiff device too, where batch norm goes by the batch's statistics.
                floats(loss(generate(Tensor::from_inner(moved))))[0]
            };
            let expected = (at(5e-3) - at(-5e-3)) / 1e-2;
            assert!(
                (found - expected).abs() < 2e-2 * expected.abs().max(0.5),
                "{i}: {found}, not {expected}"
            );
        }
    }
}

#[test]
fn every_parameter_passes_its_gradient_on() {
    let net = Net::new();
    let spec = WeightSpec::of(&net);
    let theta = Tensor::from_inner(spec.read(&net).unwrap()).require_grad();
    let filled = spec.split(theta.clone()).unwrap().fill(&net).unwrap();
    let gradients = filled.forward().square().sum().backward();
    let theta = theta.grad(&gradients).unwrap();
    let gradients = spec.split(theta).unwrap();
    for param in spec.params() {
        let norm: f32 = match param.shape.len() {
            1 => floats(gradients.get::<1>(&param.name).unwrap()),
            2 => floats(gradients.get::<2>(&param.name).unwrap()),
            _ => floats(gradients.get::<4>(&param.name).unwrap()),
        }
        .iter()
        .map(|g| g * g)
        .sum();
        assert!(norm > 0.0, "{}", param.name);
    }
}

#[test]
fn some_parameters_are_replaced_by_pattern_and_the_others_train_on() {
    let net = Net::new().train();
    let spec = WeightSpec::of(&net).select(&["conv.*", "layers.*.weight"]).unwrap();
    let names: Vec<&str> = spec.params().iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["conv.weight", "conv.bias", "layers.0.weight", "layers.1.weight"]);
    let theta = Tensor::from_inner(draw(spec.numel(), 0.5, &mut random_stream(3, "test", 0))).require_grad();
    let gradients =
        spec.split(theta.clone()).unwrap().fill(&net).unwrap().forward().square().sum().backward();
    assert!(theta.grad(&gradients).is_some());
    assert!(net.layers[0].bias.as_ref().unwrap().val().grad(&gradients).is_some());
    assert!(net.symbols.weight.val().grad(&gradients).is_some());
    assert!(net.layers[0].weight.val().grad(&gradients).is_none());
}

#[test]
fn names_and_shapes_that_do_not_fit_are_named() {
    let net = Net::new();
    let spec = WeightSpec::of(&net);
    let device = Device::flex();
    let message = |error: kiln_core::Error| format!("{error}; {}", error.hint_text().unwrap_or(""));
    let filled = |name: &str, shape: [usize; 2]| {
        let mut weights = Weights::new();
        weights.insert(name, Tensor::<2>::zeros(shape, &device));
        message(weights.fill(&net).unwrap_err())
    };
    let found = filled("layers.2.weight", [4, 3]);
    assert!(
        found.contains("no parameter \"layers.2.weight\"") && found.contains("layers.1.weight"),
        "{found}"
    );
    let found = filled("layers.1.weight", [3, 4]);
    assert!(found.contains("\"layers.1.weight\" has the shape [3, 4], expected [4, 3]"), "{found}");
    let mut weights = Weights::new();
    weights.insert("batch.running_mean", Tensor::<1>::zeros([2], &device));
    let found = message(weights.fill(&net).unwrap_err());
    assert!(found.contains("\"batch.running_mean\" is a running statistic or frozen"), "{found}");

    let found = message(spec.select(&["conv.*", "dense.*"]).unwrap_err());
    assert!(found.contains("no parameter matches \"dense.*\"") && found.contains("conv.weight"), "{found}");
    let found = message(spec.select(&["batch.running_*"]).unwrap_err());
    assert!(found.contains("\"batch.running_mean\" is a running statistic"), "{found}");
    let found = message(spec.split(Tensor::zeros([7], &device)).unwrap_err());
    assert!(found.contains("7 weights cannot fill the 126 elements of 11 parameters"), "{found}");

    let twice = [spec.params()[0].clone(), spec.params()[0].clone()].to_vec();
    assert!(message(WeightSpec::new(twice).unwrap_err()).contains("two parameters are called"));
    let mut empty = spec.params()[0].clone();
    empty.shape = vec![3, 0];
    assert!(message(WeightSpec::new(vec![empty]).unwrap_err()).contains("[3, 0]"));
}
