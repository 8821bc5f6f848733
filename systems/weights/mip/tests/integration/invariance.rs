//! What the parametrisation promises of any network.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::{Module, Param};
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Int, Tensor};
use kiln_core::random_stream;
use kiln_mip::hypernet::OutputInit;
use kiln_mip::{MipConfig, MipHyper, Parametrisation};
use kiln_nn::{
    BatchNorm, BatchNormConfig, Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig, Embedding,
    EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, initialise,
};

/// One of each layer with parameters.
#[derive(Module, Debug)]
struct Net {
    symbols: Embedding,
    conv: Conv2d,
    batch: BatchNorm,
    up: ConvTranspose2d,
    norm: LayerNorm,
    fc: Linear,
}

impl Net {
    fn new() -> Self {
        initialise(&Device::flex(), &mut random_stream(0, "net", 0), |device| Self {
            symbols: EmbeddingConfig::new(5, 16).init(device),
            conv: Conv2dConfig::new([1, 2], [3, 3]).with_padding(PaddingConfig2d::Same).init(device),
            batch: BatchNormConfig::new(2).init(device),
            up: ConvTranspose2dConfig::new([2, 1], [2, 2]).with_stride([2, 2]).init(device),
            norm: LayerNormConfig::new(64).init(device),
            fc: LinearConfig::new(64, 3).init(device),
        })
    }

    /// `[3, 3]`
    fn forward(&self) -> Tensor<2> {
        let ids = Tensor::<1, Int>::from_ints([0, 3, 1], &Device::flex()).unsqueeze::<2>();
        let x = self.symbols.forward(ids).reshape([3, 1, 4, 4]);
        let x = self.up.forward(self.batch.forward(self.conv.forward(x)).tanh());
        self.fc.forward(self.norm.forward(x.reshape([3, 64])))
    }
}

/// Where a parameter stands in a model.
type Place = fn(&mut MipHyper<Net>) -> &mut Param<Tensor<2>>;

fn model(config: &MipConfig) -> MipHyper<Net> {
    config.draw(Net::new(), &mut random_stream(0, "hyper", 0), &Device::flex()).unwrap()
}

fn condition(gamma: f32) -> Tensor<1> {
    Tensor::from_floats([gamma], &Device::flex())
}

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().iter().collect()
}

#[test]
fn a_hypernetwork_that_makes_zeros_leaves_the_network_as_it_was_bit_for_bit() {
    let mut model = model(&MipConfig::new(1));
    let zeros = model.hyper.output.weight.val().zeros_like();
    model.hyper.output.weight = Param::from_tensor(zeros);
    assert_eq!(floats(model.instantiate(condition(0.7)).unwrap().forward()), floats(Net::new().forward()));
}

#[test]
fn making_a_network_does_not_alter_the_one_it_stands_on() {
    let model = model(&MipConfig::new(1));
    let before = floats(model.base.forward());
    let (one, other) =
        (model.instantiate(condition(0.1)).unwrap(), model.instantiate(condition(0.9)).unwrap());
    assert_ne!(floats(one.forward()), floats(other.forward()));
    assert_eq!(floats(model.base.forward()), before);
    assert_eq!(floats(model.instantiate(condition(0.1)).unwrap().forward()), floats(one.forward()));
}

#[test]
fn conditions_of_a_batch_make_the_weights_that_each_makes_alone() {
    let model = model(&MipConfig::new(1).with_hidden(&[8, 12]));
    let gammas = Tensor::<2>::from_floats([[0.2], [0.5], [1.0]], &Device::flex());
    let together = model.generate(gammas.clone()).unwrap();
    for row in 0..3 {
        let alone = model.generate(gammas.clone().narrow(0, row, 1)).unwrap();
        let difference = (alone - together.clone().narrow(0, row, 1)).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-6, "{difference}");
    }
}

#[test]
fn blocks_of_the_output_layer_have_the_deviation_of_their_tensor() {
    let model = model(&MipConfig::new(1));
    let weights = model.hyper.output.weight.val();
    let gain = (2.0f64 / (1.0 + 1e-4)).sqrt();
    let mut start = 0;
    for param in model.spec().params() {
        let block = floats(weights.clone().narrow(1, start, param.len()));
        let square = block.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / block.len() as f64;
        let expected = gain / (param.len() as f64).sqrt();
        // 128 numbers for each of a tensor's elements; a few elements leave some noise.
        let tolerance = 4.0 / (2.0 * block.len() as f64).sqrt();
        assert!(
            (square.sqrt() / expected - 1.0).abs() < tolerance,
            "{}: {} {expected}",
            param.name,
            square.sqrt()
        );
        start += param.len();
    }
}

#[test]
fn gradients_of_the_hypernetwork_and_of_the_own_weights_are_slopes() {
    let objective =
        |model: &MipHyper<Net>| model.instantiate(condition(0.4)).unwrap().forward().powi_scalar(2).mean();
    for parametrisation in [Parametrisation::Mip, Parametrisation::Residual] {
        let drawn = model(&MipConfig::new(1).with_hidden(&[6]).with_parametrisation(parametrisation));
        let trained = drawn.clone().train();
        let gradients = objective(&trained).backward();
        let places: [Place; 4] = [
            |m| &mut m.hyper.hidden[0].weight,
            |m| &mut m.hyper.output.weight,
            |m| &mut m.base.fc.weight,
            |m| &mut m.base.symbols.weight,
        ];
        for (number, place) in places.into_iter().enumerate() {
            let gradient = place(&mut trained.clone()).val().grad(&gradients).unwrap();
            let norm = gradient.clone().powi_scalar(2).sum().sqrt().into_scalar::<f32>();
            assert!(norm > 0.0, "{number}");
            let at = |step: f32| {
                let mut moved = drawn.clone();
                let parameter = place(&mut moved);
                *parameter = Param::from_tensor(parameter.val() + gradient.clone() * (step / norm));
                // In training mode, as the gradient was: batch norm computes something else outside of it.
                objective(&moved.train()).into_scalar::<f32>()
            };
            let slope = (at(0.01) - at(-0.01)) / 0.02;
            assert!((slope - norm).abs() < 0.01 * norm, "{number}: {slope} against {norm}");
        }
    }
}

#[test]
fn hyperfan_makes_weights_that_keep_the_variance_of_what_a_layer_sees() {
    // Chang et al.: of a layer's output half the variance comes from its weights, half from its bias. For weights that is
    // a variance of gain² / (2 fan-in), over draws of the hypernetwork and conditions.
    let gain_squared = 2.0 / (1.0 + 1e-4);
    let net = LinearConfig::new(24, 40).init(&Device::flex());
    let mut config = MipConfig::new(1).with_parametrisation(Parametrisation::Encode);
    config.hypernet.output_init = OutputInit::Hyperfan;
    let (mut squares, mut count) = ([0.0f64; 2], 0.0);
    for seed in 0..50 {
        let model = config.draw(net.clone(), &mut random_stream(seed, "hyper", 0), &Device::flex()).unwrap();
        for gamma in [0.1, 0.5, 0.9] {
            let weights = model.weights(condition(gamma)).unwrap();
            let (weight, bias): (Tensor<2>, Tensor<1>) =
                (weights.get("weight").unwrap(), weights.get("bias").unwrap());
            squares[0] += f64::from(weight.powi_scalar(2).mean().into_scalar::<f32>());
            squares[1] += f64::from(bias.powi_scalar(2).mean().into_scalar::<f32>());
            count += 1.0;
        }
    }
    for (square, expected) in squares.iter().zip([gain_squared / (2.0 * 24.0), gain_squared / 2.0]) {
        let found = square / count;
        assert!((found / expected - 1.0).abs() < 0.1, "{found}, should be {expected}");
    }
}

#[test]
fn a_network_under_one_condition_is_run_and_written_by_itself() {
    let model = model(&MipConfig::new(1));
    let direct = floats(model.instantiate(condition(0.3)).unwrap().forward());
    assert_eq!(model.forward_with(condition(0.3), |net| floats(net.forward())).unwrap(), direct);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net.safetensors");
    model.export(condition(0.3), &path).unwrap();
    let written = kiln_core::TensorFile::read(&path).unwrap().into_module(Net::new()).unwrap();
    assert_eq!(floats(written.forward()), direct);
    // Saved and read again, the model makes the same weights.
    let file = kiln_core::TensorFile::from_module(&model);
    let again = file.into_module(self::model(&MipConfig::new(1))).unwrap();
    let theta = |model: &MipHyper<Net>| floats(model.generate(condition(0.8).unsqueeze::<2>()).unwrap());
    assert_eq!(theta(&again), theta(&model));
}

#[test]
fn the_order_of_patterns_and_their_kind_change_no_tensor() {
    let names = ["fc.weight", "conv.weight"];
    let deviations = |patterns: &[&str]| {
        let model = model(&MipConfig::new(1).with_select(patterns));
        let params: Vec<String> = model.spec().params().iter().map(|param| param.name.clone()).collect();
        (params, floats(model.hyper.output.weight.val()))
    };
    let expected = deviations(&names);
    assert_eq!(deviations(&[names[1], names[0]]), expected);
    assert_eq!(deviations(&["re:^(fc|conv)\\.weight$"]), expected);
    let linear = model(&MipConfig::new(1).with_select(&["type:Linear"]));
    assert_eq!(
        linear.spec().params().iter().map(|param| &param.name).collect::<Vec<_>>(),
        ["fc.weight", "fc.bias"]
    );
}

#[test]
fn a_hypernetwork_is_a_module_whose_own_weights_another_can_make() {
    let inner = MipConfig::new(1).with_hidden(&[4]).init(Net::new(), &Device::flex()).unwrap();
    let config = MipConfig::new(2).with_select(&["hyper.output.weight"]).with_hidden(&[3]);
    let outer = config.init(inner, &Device::flex()).unwrap().train();
    let made = outer.instantiate(Tensor::from_floats([0.2, 0.9], &Device::flex())).unwrap();
    let loss = made.instantiate(condition(0.4)).unwrap().forward().powi_scalar(2).sum();
    let gradients = loss.backward();
    for weight in [outer.hyper.output.weight.val(), outer.base.base.fc.weight.val()] {
        assert!(floats(weight.grad(&gradients).unwrap()).iter().any(|&x| x != 0.0));
    }
}

/// A recurrent layer: `h ← tanh(x W + h U)`.
#[derive(Module, Debug)]
struct Recurrent {
    input: Linear,
    state: Linear,
}

#[test]
fn a_recurrent_network_is_made_once_and_run_for_many_steps() {
    let device = Device::flex();
    let net = Recurrent {
        input: LinearConfig::new(2, 3).init(&device),
        state: LinearConfig::new(3, 3).with_bias(false).init(&device),
    };
    let model = MipConfig::new(1).with_hidden(&[4]).init(net, &device).unwrap().train();
    let x = Tensor::<2>::ones([1, 2], &device);
    let run = |net: &Recurrent| {
        let start = Tensor::<2>::zeros([1, 3], &Device::flex());
        let step = |h: Tensor<2>, _| (net.input.forward(x.clone()) + net.state.forward(h)).tanh();
        (0..20).fold(start, step)
    };
    let once = model.forward_with(condition(0.6), run).unwrap();
    let gradient = model.hyper.output.weight.val().grad(&once.clone().sum().backward()).unwrap();
    assert!(floats(gradient).iter().all(|x| x.is_finite()));
    let again = model.forward_with(condition(0.6), run).unwrap();
    assert_eq!(floats(once.inner()), floats(again.inner()));
}
