//! The networks against `braindecode`, and what must hold for any weights.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use kiln_core::{HostTensor, TensorFile, random_stream};
use kiln_eeg::model::{
    Arch, Deep4Config, EegNetConfig, FinalConv, Model, ModelConfig, ShallowNetConfig, TcnConfig,
    from_braindecode, to_braindecode,
};
use kiln_nn::initialise;

const TOLERANCE: f32 = 1e-4;

fn tiny() -> [ModelConfig; 5] {
    [
        ShallowNetConfig {
            n_filters_time: 4,
            n_filters_spat: 5,
            filter_time_length: 7,
            pool_time_length: 10,
            pool_time_stride: 3,
            ..ShallowNetConfig::new(3, 2, 120)
        }
        .into(),
        Deep4Config {
            n_filters_time: 3,
            n_filters_spat: 4,
            n_filters_2: 5,
            n_filters_3: 6,
            n_filters_4: 7,
            filter_time_length: 4,
            ..Deep4Config::new(3, 2, 300)
        }
        .into(),
        Deep4Config {
            n_filters_time: 3,
            n_filters_spat: 4,
            n_filters_2: 5,
            n_filters_3: 6,
            n_filters_4: 7,
            filter_time_length: 4,
            stride_before_pool: true,
            ..Deep4Config::new(3, 2, 500)
        }
        .into(),
        TcnConfig { n_blocks: 3, n_filters: 5, kernel_size: 3, ..TcnConfig::new(3, 2, 60) }.into(),
        EegNetConfig {
            f1: 2,
            f2: 4,
            kernel_length: 8,
            depthwise_kernel_length: 4,
            ..EegNetConfig::new(3, 2, 150)
        }
        .into(),
    ]
}

fn draw(config: &ModelConfig, seed: u64) -> Model {
    config.check().unwrap();
    initialise(&Device::flex(), &mut random_stream(seed, "test", 0), |device| config.init(device))
}

/// Normal values, the same in every run.
fn random(shape: [usize; 3]) -> Tensor<3> {
    let mut rng = random_stream(7, "x", 0);
    let values = TensorData::random::<f32, _, _>(shape, Distribution::Normal(0.0, 1.0), &mut rng);
    Tensor::from_data(values, &Device::flex())
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= TOLERANCE, "{what}: {a}, should be {b}");
    }
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

fn golden(name: &str, config: ModelConfig, io: &Path) {
    let mut file = TensorFile::read(format!("tests/data/{name}_weights.safetensors").as_ref()).unwrap();
    let theirs: Vec<String> = file.names().map(String::from).collect();
    from_braindecode(&mut file);
    let model = file.into_module(draw(&config, 0)).unwrap();
    let mut io = TensorFile::read(io).unwrap();
    for number in 0..2 {
        let x = io.take_float::<3>(&format!("input{number}"), &Device::flex()).unwrap();
        let [_, _, samples] = x.dims();
        let expected = io.take(&format!("output{number}")).unwrap();
        let found = model.forward(x);
        assert_eq!(found.dims()[2], config.predictions(samples), "{name}");
        assert_close(&values(found), expected.as_floats().unwrap(), name);
    }
    let mut file = TensorFile::from_module(&model);
    to_braindecode(&mut file);
    assert_eq!(file.names().collect::<Vec<_>>(), theirs);
}

#[test]
fn outputs_are_those_of_braindecode() {
    let shallow =
        ShallowNetConfig { final_conv_length: FinalConv::Steps(17), ..ShallowNetConfig::new(5, 2, 400) };
    let deep = Deep4Config {
        n_filters_time: 8,
        n_filters_spat: 8,
        n_filters_2: 12,
        n_filters_3: 16,
        n_filters_4: 20,
        ..Deep4Config::new(6, 2, 600)
    };
    let tcn = TcnConfig { n_filters: 11, kernel_size: 4, ..TcnConfig::new(7, 2, 190) };
    for (name, config) in [
        ("shallow_cropped", shallow.into()),
        ("deep4_trial", deep.into()),
        ("tcn", tcn.into()),
        ("eegnet", EegNetConfig::new(9, 2, 333).into()),
    ] {
        golden(name, config, format!("tests/data/{name}_io.safetensors").as_ref());
    }
    match kiln_data::shared_dir() {
        Some(shared) => golden(
            "shallow_trial",
            ShallowNetConfig::new(21, 2, 600).into(),
            &shared.join("golden/eeg/shallow_trial_io.safetensors"),
        ),
        None => eprintln!("skipped: no shared data"),
    }
}

#[test]
fn both_namings_of_weight_norm_are_read() {
    let config: ModelConfig = TcnConfig { n_filters: 11, kernel_size: 4, ..TcnConfig::new(7, 2, 190) }.into();
    let mut file = TensorFile::read("tests/data/tcn_weights.safetensors".as_ref()).unwrap();
    for name in file.names().map(String::from).collect::<Vec<_>>() {
        let old = name.replace("parametrizations.weight.original0", "weight_g");
        file.rename(&name, old.replace("parametrizations.weight.original1", "weight_v"));
    }
    file.insert("bnorm.num_batches_tracked", HostTensor::int([], vec![3]));
    from_braindecode(&mut file);
    file.into_module(draw(&config, 0)).unwrap();
}

#[test]
fn networks_have_as_many_parameters_as_in_braindecode() {
    for (config, expected) in [
        (ModelConfig::new(Arch::Shallow, 21, 2, 600), 37_442),
        (
            ShallowNetConfig {
                final_conv_length: FinalConv::Steps(25),
                ..ShallowNetConfig::new(21, 2, 6000)
            }
            .into(),
            36_722,
        ),
        (ModelConfig::new(Arch::Deep4, 21, 2, 600), 277_452),
        (ModelConfig::new(Arch::Deep4, 21, 2, 6000).dense(None), 277_052),
        (ModelConfig::new(Arch::Tcn, 21, 2, 6000), 456_502),
        (
            TcnConfig { n_blocks: 3, n_filters: 30, kernel_size: 5, ..TcnConfig::new(21, 2, 600) }.into(),
            26_732,
        ),
        (ModelConfig::new(Arch::EegNet, 21, 2, 600), 2018),
    ] {
        let model = draw(&config, 0);
        let statistics: usize = TensorFile::from_module(&model)
            .names()
            .filter(|name| name.contains(".running_"))
            .map(|name| TensorFile::from_module(&model).get(name).unwrap().as_floats().unwrap().len())
            .sum();
        assert_eq!(model.num_params() - statistics, expected, "{config:?}");
    }
    let strided: ModelConfig =
        ShallowNetConfig { final_conv_length: FinalConv::Steps(25), ..ShallowNetConfig::new(21, 2, 6000) }
            .into();
    assert_eq!(strided.predictions(6000), 370);
}

#[test]
fn predictions_of_a_dense_network_are_those_of_sliding_windows() {
    for config in tiny() {
        for final_conv in [None, Some(2)] {
            let dense = config.clone().dense(final_conv);
            let (network, receptive) = (draw(&dense, 3), dense.receptive());
            let length = dense.n_times();
            let x = random([2, 3, length]);
            let all = network.forward(x.clone());
            let [_, _, count] = all.dims();
            assert_eq!((count, count), (dense.predictions(length), length - receptive + 1), "{dense:?}");
            // The same weights, trial-wise, on every window.
            let mut trial = serde_json::to_value(&dense).unwrap();
            if trial["model"] != "tcn" {
                trial["dense"] = false.into();
            }
            let trial: ModelConfig = serde_json::from_value(trial).unwrap();
            let network = TensorFile::from_module(&network).into_module(draw(&trial, 4)).unwrap();
            for at in [0, 1, count / 2, count - 1] {
                let one = network.forward(x.clone().narrow(2, at, receptive));
                assert_eq!(one.dims()[2], 1, "{trial:?}");
                assert_close(
                    &values(one),
                    &values(all.clone().narrow(2, at, 1)),
                    &format!("{dense:?}, {at}"),
                );
            }
        }
    }
}

#[test]
fn what_comes_later_never_changes_an_output_of_the_tcn() {
    let config = &tiny()[3];
    let network = draw(config, 0);
    let x = random([1, 3, 60]);
    let before = network.forward(x.clone());
    let [_, _, count] = before.dims();
    let changed = Tensor::cat(vec![x.narrow(2, 0, 50), random([1, 3, 10]) * 9.0], 2);
    let after = network.forward(changed);
    let kept = count - 10;
    assert_eq!(values(before.clone().narrow(2, 0, kept)), values(after.clone().narrow(2, 0, kept)));
    assert_ne!(values(before.narrow(2, kept, 1)), values(after.narrow(2, kept, 1)));
}

#[test]
fn channels_may_change_places_with_their_weights() {
    let order = [2usize, 0, 1];
    for config in tiny() {
        let network = draw(&config, 0);
        let mut file = TensorFile::from_module(&network);
        // The weights that see channels, and which of their axes does.
        let (name, axis) = match &config {
            ModelConfig::Shallow(_) | ModelConfig::Deep4(_) => ("conv_time_spat.conv_spat.weight", 3),
            ModelConfig::Tcn(_) => ("temporal_blocks.0.conv1.weight_v", 1),
            ModelConfig::EegNet(_) => ("conv_spatial.weight", 2),
        };
        let mut permute = |name: &str, axis: usize| {
            let tensor = file.take(name).unwrap();
            let inner: usize = tensor.shape[axis + 1..].iter().product();
            let values = tensor.as_floats().unwrap();
            let permuted =
                values.chunks(3 * inner).flat_map(|c| order.iter().flat_map(|&o| &c[o * inner..][..inner]));
            let permuted = permuted.copied().collect();
            file.insert(name, HostTensor::float(tensor.shape.clone(), permuted));
        };
        permute(name, axis);
        if matches!(config, ModelConfig::Tcn(_)) {
            permute("temporal_blocks.0.downsample.weight", 1);
        }
        let permuted = file.into_module(draw(&config, 1)).unwrap();
        let x = random([2, 3, config.n_times()]);
        let mixed = Tensor::cat(order.iter().map(|&o| x.clone().narrow(1, o, 1)).collect(), 1);
        assert_close(&values(permuted.forward(mixed)), &values(network.forward(x)), name);
    }
}

#[test]
fn gradients_pass_finite_differences() {
    for config in tiny() {
        let config = match config {
            // Whether a maximum changes place within the step is a matter of luck; short windows make that rare.
            ModelConfig::Deep4(c) => Deep4Config { drop_prob: 0.0, ..c }.into(),
            ModelConfig::Shallow(c) => ShallowNetConfig { drop_prob: 0.0, ..c }.into(),
            ModelConfig::Tcn(c) => TcnConfig { drop_prob: 0.0, ..c }.into(),
            ModelConfig::EegNet(c) => EegNetConfig { drop_prob: 0.0, ..c }.into(),
        };
        let network = draw(&config, 5);
        let x = random([2, 3, config.n_times()]);
        let weigh = |logits: Tensor<3>| {
            let [batch, classes, count] = logits.dims();
            (logits * random([batch, classes, count])).sum()
        };
        let spec = kiln_nn::WeightSpec::of(&network);
        let theta = spec.read(&network).unwrap();
        // Frozen norms use their running statistics in both passes.
        let trained = kiln_eeg::model::freeze(network.clone(), |name| name.contains("norm")).train();
        let loss = weigh(trained.forward(x.clone()));
        let gradients = loss.backward();
        let mut directional = Collect { gradients, values: Vec::new() };
        trained.visit(&mut directional);
        let length = directional.values.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(length > 1e-3, "{config:?}");
        let names: Vec<String> = spec.params().iter().map(|p| p.name.clone()).collect();
        let free = spec
            .select(&names.iter().map(String::as_str).filter(|n| !n.contains("norm")).collect::<Vec<_>>());
        let free = free.unwrap();
        let start = free.read(&network).unwrap();
        drop(theta);
        let direction: Vec<f32> =
            directional.values.iter().map(|g| (f64::from(*g) / length) as f32).collect();
        let direction = Tensor::<1>::from_floats(direction.as_slice(), &Device::flex());
        let at = |step: f64| {
            let moved = free.split(start.clone() + direction.clone() * step).unwrap().fill(&network).unwrap();
            f64::from(weigh(moved.forward(x.clone())).into_scalar::<f32>())
        };
        let step = 1e-3;
        let slope = (at(step) - at(-step)) / (2.0 * step);
        assert!((slope / length - 1.0).abs() < 0.02, "{config:?}: {slope} {length}");
    }
}

/// Gradients of parameters that are not norms, in the order of the fields.
struct Collect {
    gradients: burn::tensor::Gradients,
    values: Vec<f32>,
}

impl burn::module::ModuleVisitor for Collect {
    fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(&self.gradients) {
            self.values.extend(gradient.into_data().iter::<f32>());
        }
    }
}

#[test]
fn windows_that_are_too_short_and_sizes_of_nothing_are_refused() {
    for config in [
        ModelConfig::new(Arch::Shallow, 21, 2, 80),
        ModelConfig::new(Arch::Deep4, 21, 2, 400),
        ModelConfig::new(Arch::Tcn, 21, 2, 900),
        ModelConfig::new(Arch::EegNet, 21, 2, 20),
        ModelConfig::new(Arch::Shallow, 0, 2, 600),
        TcnConfig { n_filters: 0, ..TcnConfig::default() }.into(),
        ShallowNetConfig { drop_prob: 1.0, ..ShallowNetConfig::default() }.into(),
    ] {
        assert!(config.check().is_err(), "{config:?}");
    }
    let error = ModelConfig::new(Arch::Tcn, 21, 2, 900).check().unwrap_err();
    assert!(error.hint_text().unwrap().contains("at least 931"), "{error:?}");
}
