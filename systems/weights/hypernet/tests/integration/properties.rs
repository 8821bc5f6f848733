//! What holds for every hypernetwork.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use kiln_core::{TensorFile, random_stream};
use kiln_hypernet::{
    Arch, Condition, Conditioning, HyperNet, HyperNetConfig, Init, Layer, NoiseLaw, OutputScheme, Share,
    Target,
};
use kiln_nn::{LinearConfig, WeightSpec, initialise};

fn target() -> Target {
    Target::mlp(&[6, 5, 3])
}

fn config() -> HyperNetConfig {
    HyperNetConfig::new(target().spec().unwrap()).with_arch(Arch::Mlp(vec![8]))
}

fn init(config: &HyperNetConfig, seed: u64) -> HyperNet {
    initialise(&Device::flex(), &mut random_stream(seed, "init", 0), |device| {
        config.init(None, device).unwrap()
    })
}

/// Normal values, the same in every run.
fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let mut rng = random_stream(0, "x", shape.iter().product::<usize>() as u64);
    let values = TensorData::random::<f32, _, _>(shape, Distribution::Normal(0.0, 1.0), &mut rng);
    Tensor::from_data(values, &Device::flex())
}

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().unwrap()
}

fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>, tolerance: f32) {
    for (i, (a, b)) in floats(found).iter().zip(floats(expected)).enumerate() {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{i}: {a}, should be {b}");
    }
}

#[test]
fn parameter_counts_are_those_of_the_review() {
    // N = 6·5 + 5 + 5·3 + 3 = 53; features of width 8; every output layer has a bias.
    let heads = |scheme| -> usize {
        init(&config().with_scheme(scheme), 0).makers[0].heads.iter().map(|h| h.num_params()).sum()
    };
    assert_eq!(heads(OutputScheme::Once), 8 * 53 + 53);
    assert_eq!(heads(OutputScheme::Heads { by_layer: false }), 8 * 53 + 53);
    assert_eq!(heads(OutputScheme::Component { emb_dim: 2 }), 8 * 30 + 30);
    assert_eq!(heads(OutputScheme::Chunk { chunk: 10, emb_dim: 2 }), 8 * 10 + 10);
    let hyper = init(&config().with_scheme(OutputScheme::Chunk { chunk: 10, emb_dim: 2 }), 0);
    assert_eq!(hyper.makers[0].embeddings.clone().unwrap().val().dims(), [6, 2]); // ⌈53 / 10⌉
    assert_eq!(
        init(&config().with_scheme(OutputScheme::Heads { by_layer: true }), 0).makers[0].heads.len(),
        2
    );
}

#[test]
fn one_chunk_of_n_is_all_at_once() {
    let chunk = init(
        &config().with_init(Init::Kaiming).with_scheme(OutputScheme::Chunk { chunk: 53, emb_dim: 2 }),
        0,
    );
    let noise = random([4, 8]);
    let from_chunk = chunk.generate(&Condition::noise(noise.clone())).unwrap().flat;
    // The constant embedding is as good as a bias of the first layer.
    let once = init(&config().with_init(Init::Kaiming), 0);
    let mut weights = TensorFile::from_module(&chunk);
    let embedding = weights.take("makers.0.embeddings").unwrap();
    let first = weights.take("makers.0.generator.layers.0.weight").unwrap(); // [8, 2 + 8]
    let bias = weights.take("makers.0.generator.layers.0.bias").unwrap();
    let rows = first.as_floats().unwrap().chunks(10);
    let embedding = embedding.as_floats().unwrap();
    let folded = rows.clone().zip(bias.as_floats().unwrap());
    let folded = folded.map(|(row, bias)| bias + row[0] * embedding[0] + row[1] * embedding[1]);
    weights.insert("makers.0.generator.layers.0.bias", kiln_core::HostTensor::float([8], folded.collect()));
    let rest = rows.flat_map(|row| row[2..].to_vec()).collect();
    weights.insert("makers.0.generator.layers.0.weight", kiln_core::HostTensor::float([8, 8], rest));
    let once = weights.into_module(once).unwrap();
    assert_close(once.generate(&Condition::noise(noise)).unwrap().flat, from_chunk, 1e-5);
}

#[test]
fn one_set_of_weights_a_sample_equals_a_loop() {
    let image = Target {
        input: vec![1, 6, 6],
        layers: vec![
            Layer::Conv { channels: 2, kernel: 3, padding: 1 },
            Layer::Relu,
            Layer::Pool,
            Layer::Linear { outputs: 4 },
            Layer::Norm,
            Layer::Tanh,
            Layer::Linear { outputs: 3 },
        ],
    };
    for target in [target(), image] {
        let hyper = init(&HyperNetConfig::new(target.spec().unwrap()), 0);
        let (noise, x) = (random([5, 8]), random([5, 2, target.inputs()]));
        let batched =
            target.forward(hyper.generate(&Condition::noise(noise.clone())).unwrap().flat, x.clone());
        for i in 0..5 {
            let theta = hyper.generate(&Condition::noise(noise.clone().narrow(0, i, 1))).unwrap().flat;
            let one = target.forward(theta, x.clone().narrow(0, i, 1));
            assert_close(batched.clone().narrow(0, i, 1), one, 1e-5);
        }
    }
}

#[test]
fn a_support_set_has_no_order_and_equal_noise_gives_equal_weights() {
    let data = config().with_conditioning([Conditioning::Data { inputs: 6, dim: 4 }]);
    let support: Tensor<3> = random([1, 7, 6]);
    for arch in [Arch::Mlp(vec![8]), Arch::Cnn(8), Arch::Rnn(8), Arch::Attention(8)] {
        let hyper = init(&data.clone().with_arch(arch), 0);
        let theta = |support: Tensor<3>| hyper.generate(&Condition::support(support)).unwrap().flat;
        assert_close(theta(support.clone().flip([1])), theta(support.clone()), 1e-5);
    }
    let hyper = init(&config(), 3);
    let noise = random([2, 8]);
    let draw = || floats(hyper.generate(&Condition::noise(noise.clone())).unwrap().flat);
    assert_eq!(draw(), draw());
}

#[test]
fn gradients_of_every_scheme_and_architecture_equal_finite_differences() {
    let schemes = [
        OutputScheme::Once,
        OutputScheme::Heads { by_layer: true },
        OutputScheme::Component { emb_dim: 3 },
        OutputScheme::Chunk { chunk: 10, emb_dim: 3 },
    ];
    let archs = [Arch::Mlp(vec![6]), Arch::Cnn(6), Arch::Rnn(6), Arch::Attention(8)];
    let conditionings = [
        Conditioning::Task { tasks: 2, dim: 4 },
        Conditioning::Data { inputs: 6, dim: 4 },
        Conditioning::Noise { dim: 4, law: NoiseLaw::Normal },
        Conditioning::Given { dim: 4 },
    ];
    // Smooth: at the corners of ReLU differences mean nothing.
    let target = Target { input: vec![6], layers: vec![Layer::Linear { outputs: 3 }, Layer::Tanh] };
    let (x, support, code) = (random([2, 4, 6]), random([2, 3, 6]), random([2, 4]));
    let condition = Condition {
        tasks: Some(vec![0, 1]),
        support: Some(support),
        noise: Some(code.clone()),
        given: Some(code),
    };
    let mut cells = 0;
    for scheme in schemes {
        for arch in &archs {
            for conditioning in &conditionings {
                let config = HyperNetConfig::new(target.spec().unwrap())
                    .with_scheme(scheme)
                    .with_arch(arch.clone())
                    .with_conditioning([conditioning.clone()]);
                let hyper = init(&config, 1);
                let spec = WeightSpec::of(&hyper);
                let phi = spec.read(&hyper).unwrap();
                let loss = |phi: Tensor<1>| {
                    let hyper = spec.split(phi).unwrap().fill(&hyper).unwrap();
                    let y = target.forward(hyper.generate(&condition).unwrap().flat, x.clone());
                    (y - 0.3).square().sum()
                };
                let leaf = Tensor::from_inner(phi.clone()).require_grad();
                let gradient = leaf.grad(&loss(leaf.clone()).backward()).unwrap();
                // Along the gradient itself the derivative is its norm.
                let norm = gradient.clone().square().sum().sqrt();
                let direction = gradient / norm.clone();
                let at =
                    |step: f64| f64::from(loss(phi.clone() + direction.clone() * step).into_scalar::<f32>());
                let (found, expected) = (f64::from(norm.into_scalar::<f32>()), (at(1e-3) - at(-1e-3)) / 2e-3);
                assert!(
                    found > 0.0 && (found - expected).abs() < 0.02 * found.max(0.1),
                    "{scheme:?} {arch:?} {conditioning:?}: {found}, should be {expected}"
                );
                cells += 1;
            }
        }
    }
    assert_eq!(cells, 64);
}

#[test]
fn magnitude_invariant_inputs_have_one_norm_and_keep_apart() {
    let parts = [
        Conditioning::Task { tasks: 2, dim: 4 },
        Conditioning::Data { inputs: 6, dim: 4 },
        Conditioning::Noise { dim: 4, law: NoiseLaw::Normal },
        Conditioning::Given { dim: 4 },
    ];
    let (support, code) = (random([2, 3, 6]), random([2, 4]));
    for part in parts {
        let config = config().with_conditioning([part.clone()]).with_init(Init::Mip);
        let hyper = init(&config, 0);
        let at = |scale: f64| Condition {
            tasks: Some(vec![0, 1]),
            support: Some(support.clone() * scale),
            noise: Some(code.clone() * scale),
            given: Some(code.clone() * scale),
        };
        for scale in [0.1, 10.0] {
            let code = &hyper.conditioner.encode(&at(scale)).unwrap().0[0];
            let squares = floats(code.clone().square().sum_dim(2));
            assert!(squares.iter().all(|square| (square - 4.0).abs() < 1e-3), "{part:?}: {squares:?}");
        }
        let theta = hyper.generate(&at(1.0)).unwrap().flat;
        assert_ne!(floats(theta.clone().narrow(0, 0, 1)), floats(theta.clone().narrow(0, 1, 1)), "{part:?}");
        // What is made is small beside the target's own weights.
        let base = hyper.base.as_ref().unwrap().val().unsqueeze::<2>();
        let size = |x: Tensor<2>| x.square().mean().sqrt().into_scalar::<f32>();
        assert!(size(theta - base.clone()) < 0.5 * size(base), "{part:?}");
    }
}

#[test]
fn hyperfan_gives_the_weights_the_variance_that_the_target_wants() {
    for scheme in [
        OutputScheme::Once,
        OutputScheme::Heads { by_layer: false },
        OutputScheme::Chunk { chunk: 16, emb_dim: 4 },
    ] {
        let target = Target::mlp(&[24, 16, 4]);
        let config =
            HyperNetConfig::new(target.spec().unwrap()).with_scheme(scheme).with_arch(Arch::Mlp(vec![32]));
        let (mut squares, mut count) = ([0.0f64; 2], 0.0);
        for seed in 0..50 {
            let hyper = init(&config, seed);
            let theta = hyper.generate(&Condition::noise(random([16, 8]))).unwrap();
            for (sum, name) in squares.iter_mut().zip(["fc1.weight", "fc2.weight"]) {
                *sum += f64::from(theta.tensor::<3>(name).unwrap().square().mean().into_scalar::<f32>());
            }
            if scheme == OutputScheme::Once {
                assert!(floats(theta.tensor::<2>("fc1.bias").unwrap()).iter().all(|&b| b == 0.0));
            }
            count += 1.0;
        }
        for (sum, fan_in) in squares.iter().zip([24.0, 16.0]) {
            let (found, wanted) = (sum / count, 2.0 / fan_in);
            assert!((found / wanted - 1.0).abs() < 0.1, "{scheme:?}: {found}, should be {wanted}");
        }
    }
}

#[test]
fn tensors_that_are_not_made_are_learned_directly() {
    let config = config().with_predict(&["fc2.*"]);
    let hyper = init(&config, 0).train();
    let x = Tensor::from_inner(random([2, 4, 6]));
    let theta = hyper.generate(&Condition::noise(random([2, 8]))).unwrap();
    let first: Tensor<3> = theta.tensor("fc1.weight").unwrap();
    assert_close(first.clone().narrow(0, 0, 1), first.narrow(0, 1, 1), 0.0);
    let second: Tensor<3> = theta.tensor("fc2.weight").unwrap();
    assert_ne!(floats(second.clone().narrow(0, 0, 1)), floats(second.narrow(0, 1, 1)));
    let gradients = target().forward(theta.flat, x).square().sum().backward();
    assert!(hyper.base.unwrap().val().grad(&gradients).is_some());
    assert_eq!(hyper.makers[0].heads[0].weight.val().dims(), [8, 18]);
}

#[test]
fn changes_of_a_low_rank_leave_the_weights_that_they_are_added_to() {
    let device = Device::flex();
    let spec = target().spec().unwrap();
    let base = random::<1>([spec.numel()]);
    for scheme in [
        OutputScheme::Once,
        OutputScheme::Heads { by_layer: true },
        OutputScheme::Component { emb_dim: 3 },
        OutputScheme::Chunk { chunk: 10, emb_dim: 3 },
    ] {
        let config = config().with_scheme(scheme).with_lora(1).with_spectral_norm();
        let hyper = config.init(Some(base.clone()), &device).unwrap().train();
        let theta = hyper.generate(&Condition::noise(random([2, 8]))).unwrap();
        let change = theta.flat.clone() - base.clone().unsqueeze::<2>();
        // A matrix of rank 1: all of its 2 x 2 minors are 0.
        let w: Vec<f32> = floats(change.clone().narrow(0, 1, 1).narrow(1, 0, 30).inner());
        assert!(w.iter().any(|x| x.abs() > 1e-4), "{scheme:?}");
        for row in 0..4 {
            for column in 0..5 {
                let at = |down: usize, right: usize| w[(row + down) * 6 + column + right];
                assert!((at(0, 0) * at(1, 1) - at(0, 1) * at(1, 0)).abs() < 1e-5, "{scheme:?}");
            }
        }
        let gradients = theta.flat.square().sum().backward();
        assert!(hyper.base.as_ref().unwrap().val().grad(&gradients).is_none());
        assert!(hyper.makers[0].heads[0].weight.val().grad(&gradients).is_some());
    }
    assert!(config().with_lora(0).init(None, &device).unwrap_err().to_string().contains("rank 0"));
}

#[test]
fn a_generator_of_its_own_makes_every_layer_or_every_tensor() {
    let expected = [(Share::All, vec![53]), (Share::Layer, vec![35, 18]), (Share::None, vec![30, 5, 15, 3])];
    for (share, counts) in expected {
        for scheme in [OutputScheme::Once, OutputScheme::Chunk { chunk: 10, emb_dim: 2 }] {
            let hyper = init(&config().with_scheme(scheme).with_share(share), 0).train();
            let made: Vec<usize> = counts.clone();
            let pieces = |count: usize| match scheme {
                OutputScheme::Chunk { chunk, .. } => count.div_ceil(chunk),
                _ => count,
            };
            let sizes = hyper.makers.iter().map(|maker| match &maker.embeddings {
                Some(embeddings) => embeddings.val().dims()[0],
                None => maker.heads[0].weight.val().dims()[1],
            });
            assert_eq!(sizes.collect::<Vec<_>>(), made.iter().map(|&n| pieces(n)).collect::<Vec<_>>());
            // Weights of a tensor move only the generator that makes it.
            let theta = hyper.generate(&Condition::noise(random([2, 8]))).unwrap();
            let gradients = theta.tensor::<3>("fc2.weight").unwrap().square().sum().backward();
            for (number, maker) in hyper.makers.iter().enumerate() {
                let moved = maker.heads[0]
                    .weight
                    .val()
                    .grad(&gradients)
                    .is_some_and(|gradient| floats(gradient).iter().any(|&x| x != 0.0));
                let its = match share {
                    Share::All => 0,
                    Share::Layer => 1,
                    Share::None => 2,
                };
                assert_eq!(moved, number == its, "{share:?}, {scheme:?}, {number}");
            }
        }
    }
}

#[test]
fn any_module_becomes_a_target() {
    let device = Device::flex();
    let net = LinearConfig::new(3, 2).init(&device);
    let spec = WeightSpec::of(&net);
    let config = HyperNetConfig::new(spec.clone()).with_init(Init::Base);
    let hyper = config.init(Some(spec.read(&net).unwrap()), &device).unwrap().train();
    let theta = hyper.generate(&Condition::noise(random([1, 8]))).unwrap();
    let y = theta.weights(0).unwrap().fill(&net).unwrap().forward(random::<2>([4, 3]));
    assert!(hyper.makers[0].heads[0].weight.val().grad(&y.sum().backward()).is_some());
}

#[test]
fn a_new_task_leaves_the_others_as_they_are() {
    let hyper = init(&config().with_conditioning([Conditioning::Task { tasks: 2, dim: 4 }]), 0);
    let before = floats(hyper.generate(&Condition::tasks([0, 1])).unwrap().flat);
    let more = hyper.add_task().unwrap();
    assert_eq!(floats(more.generate(&Condition::tasks([0, 1])).unwrap().flat), before);
    assert_eq!(more.generate(&Condition::tasks([2])).unwrap().flat.dims(), [1, 53]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let device = Device::flex();
    let refused = |config: HyperNetConfig| config.init(None, &device).unwrap_err().to_string();
    let chunk = |chunk, emb_dim| OutputScheme::Chunk { chunk, emb_dim };
    assert!(refused(config().with_scheme(chunk(0, 2))).contains("at least one number"));
    assert!(refused(config().with_scheme(chunk(9, 0))).contains("embeddings of at least one"));
    assert!(refused(config().with_arch(Arch::Mlp(vec![0]))).contains("width 0"));
    assert!(refused(config().with_conditioning([])).contains("at least one conditioning"));
    let twice = [
        Conditioning::Noise { dim: 2, law: NoiseLaw::Normal },
        Conditioning::Noise { dim: 3, law: NoiseLaw::Normal },
    ];
    assert!(refused(config().with_conditioning(twice)).contains("occurs twice"));
    assert!(refused(config().with_predict(&["fc3.*"])).contains("no parameter matches \"fc3.*\""));
    // Larger than the target: allowed, and cropped.
    config().with_scheme(chunk(1000, 2)).init(None, &device).unwrap();

    let hyper = init(&config().with_conditioning([Conditioning::Task { tasks: 2, dim: 4 }]), 0);
    let error = hyper.generate(&Condition::tasks([2])).unwrap_err();
    assert!(error.to_string().contains("no task 2") && error.hint_text().unwrap().contains("there are 2"));
    assert!(
        hyper
            .generate(&Condition::noise(random([1, 8])))
            .unwrap_err()
            .to_string()
            .contains("conditioned on tasks")
    );
    for (text, words) in [
        ("mlp:64", "no layer with weights"),
        ("mlp:6x4", "no list of widths"),
        ("mlp:0-3", "without zeros"),
        ("resnet", "unknown"),
    ] {
        let error = Target::parse(text).unwrap_err();
        let error = format!("{error}; {}", error.hint_text().unwrap_or(""));
        assert!(error.contains(words), "{error}");
    }
}
