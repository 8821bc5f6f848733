//! Against hyperlight, the paper's own library: encoding, weights, logits, loss and every gradient.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Int, Tensor};
use kiln_core::{HostTensor, TensorFile};
use kiln_mip::hypernet::Nonlinearity;
use kiln_mip::{Encoding, MipConfig, MipHyper, Parametrisation};
use kiln_nn::{Conv2d, Conv2dConfig, Linear, LinearConfig, token_nll};

/// The vectors' primary network.
#[derive(Module, Debug)]
struct Primary {
    conv1: Conv2d,
    fc1: Linear,
    fc2: Linear,
}

impl Primary {
    fn new(device: &Device) -> Self {
        let padding = PaddingConfig2d::Same;
        Self {
            conv1: Conv2dConfig::new([1, 4], [3, 3]).with_padding(padding).init(device),
            fc1: LinearConfig::new(4, 5).init(device),
            fc2: LinearConfig::new(5, 3).init(device),
        }
    }

    /// `[images, 1, height, width]` to `[images, 3]`
    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let leaky = Nonlinearity::LeakyRelu;
        let maps = leaky.apply(self.conv1.forward(x));
        let [images, channels, ..] = maps.dims();
        let means = maps.reshape([images as i64, channels as i64, -1]).mean_dim(2).squeeze_dim::<2>(2);
        self.fc2.forward(leaky.apply(self.fc1.forward(means)))
    }
}

fn golden() -> TensorFile {
    TensorFile::read("tests/data/mip_forward.safetensors".as_ref()).unwrap()
}

/// The layout of linear weights in the vectors is PyTorch's, `[out, in]`: rows of θ are put into that order here.
fn theta_order(spec: &kiln_nn::WeightSpec) -> Vec<usize> {
    let mut order = Vec::new();
    let mut start = 0;
    for param in spec.params() {
        match (&param.shape[..], param.name.ends_with("weight")) {
            (&[inputs, outputs], true) => {
                order.extend((0..outputs).flat_map(|o| (0..inputs).map(move |i| start + i * outputs + o)));
            }
            _ => order.extend(start..start + param.len()),
        }
        start += param.len();
    }
    order
}

/// Elements of the vectors' order in that of the network, along rows of `width`.
fn to_own_order(values: &[f32], order: &[usize], width: usize) -> Vec<f32> {
    let mut own = vec![0.0; values.len()];
    for (row, &place) in order.iter().enumerate() {
        own[place * width..][..width].copy_from_slice(&values[row * width..][..width]);
    }
    own
}

/// The vectors' hypernetwork over the primary network.
fn model(device: &Device) -> MipHyper<Primary> {
    let mut golden = golden();
    let config = MipConfig::new(3).with_hidden(&hidden_widths(&golden));
    let model = config.init(Primary::new(device), device).unwrap();
    let order = theta_order(model.spec());
    let mut file = TensorFile::new();
    for index in 0..hidden_widths(&golden).len() {
        for part in ["weight", "bias"] {
            let name = format!("hyper.hidden{index}.{part}");
            file.insert(format!("hyper.hidden.{index}.{part}"), golden.take(&name).unwrap());
        }
    }
    let output = golden.take("hyper.output.weight").unwrap();
    let values = to_own_order(output.as_floats().unwrap(), &order, output.shape[1]);
    file.insert("hyper.output.weight", HostTensor::float(output.shape, values));
    let own = to_own_order(golden.take("hyper.output.bias").unwrap().as_floats().unwrap(), &order, 1);
    let base =
        model.spec().split(Tensor::from_floats(own.as_slice(), device)).unwrap().fill(&model.base).unwrap();
    file.insert_section("base.", TensorFile::from_module(&base));
    file.into_module(model).unwrap()
}

fn hidden_widths(golden: &TensorFile) -> Vec<usize> {
    (0..).map_while(|i| golden.get(&format!("hyper.hidden{i}.bias"))).map(|bias| bias.shape[0]).collect()
}

fn assert_close(name: &str, found: &[f32], expected: &[f32], relative: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= relative * b.abs() + 1e-6, "{name}[{at}]: {a}, expected {b}");
    }
}

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().iter().collect()
}

#[test]
fn encoding_and_weights_are_those_of_the_reference() {
    let (device, mut golden) = (Device::flex(), golden());
    let gamma = golden.take_float::<2>("gamma", &device).unwrap();
    let encoded = golden.take("encoded").unwrap();
    assert_close(
        "encoded",
        &floats(Encoding::CosSin.encode(gamma.clone())),
        encoded.as_floats().unwrap(),
        1e-5,
    );

    let model = model(&device);
    let order = theta_order(model.spec());
    let theta = golden.take("theta").unwrap();
    let found = floats(model.generate(gamma).unwrap());
    for (found, expected) in found.chunks(order.len()).zip(theta.as_floats().unwrap().chunks(order.len())) {
        assert_close("theta", found, &to_own_order(expected, &order, 1), 1e-5);
    }
}

#[test]
fn logits_loss_and_gradients_are_those_of_the_reference() {
    let (device, mut golden) = (Device::flex(), golden());
    let model = model(&device).train();
    let gammas = golden.take_float::<2>("gamma", &device).unwrap();
    let x = golden.take_float::<5>("x", &device).unwrap();
    let targets = golden.take_int::<2>("target", &device).unwrap();
    let mut losses = Vec::new();
    let mut logits = Vec::new();
    for row in 0..gammas.dims()[0] {
        let primary = model.instantiate(gammas.clone().narrow(0, row, 1).squeeze_dim::<1>(0)).unwrap();
        let y = primary.forward(x.clone().narrow(0, row, 1).squeeze_dim::<4>(0));
        logits.extend(floats(y.clone()));
        let target: Tensor<2, Int> = targets.clone().narrow(0, row, 1);
        losses.push(token_nll(y.unsqueeze_dim::<3>(0), target).mean());
    }
    assert_close("logits", &logits, golden.take("logits").unwrap().as_floats().unwrap(), 1e-5);
    let loss = Tensor::cat(losses, 0).mean();
    assert_close("loss", &floats(loss.clone()), golden.take("loss").unwrap().as_floats().unwrap(), 1e-5);

    let gradients = loss.backward();
    let expected = |golden: &mut TensorFile, name: &str| golden.take(&format!("grad.hyper.{name}")).unwrap();
    for (index, layer) in model.hyper.hidden.iter().enumerate() {
        let weight = layer.weight.val().grad(&gradients).unwrap().transpose();
        let bias = layer.bias.as_ref().unwrap().val().grad(&gradients).unwrap();
        let name = |part: &str| format!("hidden{index}.{part}");
        let (w, b) = (expected(&mut golden, &name("weight")), expected(&mut golden, &name("bias")));
        assert_close(&name("weight"), &floats(weight), w.as_floats().unwrap(), 1e-4);
        assert_close(&name("bias"), &floats(bias), b.as_floats().unwrap(), 1e-4);
    }
    let order = theta_order(model.spec());
    let output = expected(&mut golden, "output.weight");
    let found = floats(model.hyper.output.weight.val().grad(&gradients).unwrap().transpose());
    assert_close("output", &found, &to_own_order(output.as_floats().unwrap(), &order, output.shape[1]), 1e-4);
    let own = to_own_order(expected(&mut golden, "output.bias").as_floats().unwrap(), &order, 1);
    let base = &model.base;
    let found = [
        floats(base.conv1.weight.val().grad(&gradients).unwrap()),
        floats(base.conv1.bias.as_ref().unwrap().val().grad(&gradients).unwrap()),
        floats(base.fc1.weight.val().grad(&gradients).unwrap()),
        floats(base.fc1.bias.as_ref().unwrap().val().grad(&gradients).unwrap()),
        floats(base.fc2.weight.val().grad(&gradients).unwrap()),
        floats(base.fc2.bias.as_ref().unwrap().val().grad(&gradients).unwrap()),
    ];
    assert_close("theta_0", &found.concat(), &own, 1e-4);
}

#[test]
fn without_the_parametrisation_weights_scale_with_the_condition() {
    let device = Device::flex();
    let config = MipConfig::new(3).with_parametrisation(Parametrisation::Default);
    let model = config.init(Primary::new(&device), &device).unwrap();
    let gamma = Tensor::<2>::from_floats([[0.2, 0.5, 0.9]], &device);
    let (once, twice) = (model.generate(gamma.clone()).unwrap(), model.generate(gamma * 2.0).unwrap());
    let twice: Vec<f32> = floats(twice).iter().map(|x| x / 2.0).collect();
    assert_close("theta", &floats(once), &twice, 1e-5);
}
