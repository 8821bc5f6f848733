//! What must hold whatever the parameters: reach, causality, pieces and chunks, and gradients.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use kiln_core::random_stream;
use kiln_nn::{LanguageModel, initialise};
use kiln_tcnca::chunked::{AttentionFunction, BiasKind};
use kiln_tcnca::layer::Kept;
use kiln_tcnca::model::{Input, Mixers, Steps};
use kiln_tcnca::tcn::TcnConv;
use kiln_tcnca::*;
use rand::RngExt;

fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let mut rng = random_stream(seed, "values", 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn drawn<M: Module>(init: impl FnOnce(&Device) -> M) -> M {
    initialise(&Device::flex(), &mut random_stream(3, "init", 0), init)
}

fn apart<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).abs().max().into_scalar::<f32>()
}

fn tcn(config: TcnConfig) -> Tcn {
    // Larger maps of the channels than at the start of training, so that every path shows.
    let tcn = drawn(|device| config.init(device));
    let mut tcn = tcn;
    for block in &mut tcn.blocks {
        block.pw.weight = block.pw.weight.clone().map(|weight| weight * 20.0);
    }
    tcn
}

#[test]
fn a_tcn_sees_exactly_its_receptive_field_and_nothing_after_it() {
    for (conv, kernel, dilation, blocks) in
        [(TcnConv::Depthwise, 3, 2, 3), (TcnConv::Full, 3, 3, 2), (TcnConv::Depthwise, 4, 1, 2)]
    {
        let config = TcnConfig { conv, ..TcnConfig::new(5).with_filters(kernel, dilation, blocks) };
        let reach = config.receptive_field().unwrap();
        let tcn = tcn(config);
        let (time, at) = (2 * reach + 9, 6);
        let x = random([1, time, 5], 1);
        let change = Tensor::cat(
            vec![Tensor::zeros([1, at, 5], &Device::flex()), Tensor::ones([1, 1, 5], &Device::flex())],
            1,
        );
        let change = Tensor::cat(vec![change, Tensor::zeros([1, time - at - 1, 5], &Device::flex())], 1);
        let difference = (tcn.forward(x.clone() + change, None) - tcn.forward(x, None)).abs().max_dim(2);
        let changed: Vec<usize> = difference
            .into_data()
            .iter::<f32>()
            .enumerate()
            .filter(|(_, d)| *d > 0.0)
            .map(|(t, _)| t)
            .collect();
        assert_eq!((changed[0], *changed.last().unwrap()), (at, at + reach - 1), "{config:?}");
    }
    assert_eq!(TcnConfig::new(1).receptive_field().unwrap(), 337);
    assert_eq!(TcnConfig::new(1).with_filters(5, 1, 3).receptive_field().unwrap(), 13);
    assert_eq!(TcnConfig::new(1).with_receptive_field(338).unwrap().blocks, 4);
    assert!(TcnConfig::new(1).with_filters(17, 4, 30).receptive_field().is_err());
    assert!(TcnConfig::new(1).with_filters(1, 4, 3).with_receptive_field(2).is_err());
}

#[test]
fn a_tcn_moves_with_its_input_and_its_fused_block_is_the_composed_one() {
    let tcn = tcn(TcnConfig::new(18).with_filters(5, 3, 2));
    let reach = tcn.config().receptive_field().unwrap();
    let x = random([2, 300, 18], 2);
    let whole = tcn.forward(x.clone(), None);
    let late = tcn.forward(x.clone().slice_dim(1, 50..), None);
    assert!(apart(whole.clone().slice_dim(1, 50 + reach..), late.slice_dim(1, reach..)) < 1e-5);
    // With a state the block is made of single operations.
    let (pieces, _) = tcn.forward_with_state(x, tcn.initial_state(2, &Device::flex()));
    assert!(apart(whole, pieces) < 1e-5);
}

#[test]
fn the_moving_average_is_one_in_all_its_forms() {
    for (states, time) in [(1, 1), (3, 40), (16, 333)] {
        let ema = drawn(|device| MultiHeadEmaConfig { states, ..MultiHeadEmaConfig::new(4) }.init(device));
        let x = random([2, time, 4], 3);
        let by_fft = ema.forward(x.clone(), None);
        let start = || ema.initial_state(2, &Device::flex());
        let (by_recurrence, last) = ema.forward_with_state(x.clone(), start());
        assert!(apart(by_fft.clone(), by_recurrence) < 1e-4, "{states} states, {time} steps");

        // The sum over all earlier steps.
        let kernel: Vec<f32> = ema.kernel(time).into_data().iter::<f32>().collect();
        let values: Vec<f32> = x.clone().into_data().iter::<f32>().collect();
        let omega: Vec<f32> = ema.omega.val().into_data().iter::<f32>().collect();
        let (b, c, t) = (1, 2, time - 1);
        let at = |t: usize| f64::from(values[(b * time + t) * 4 + c]);
        let sum: f64 = (0..=t).map(|lag| f64::from(kernel[c * time + lag]) * at(t - lag)).sum();
        let sum = sum + f64::from(omega[c]) * at(t);
        let direct = (sum / (1.0 + (-sum).exp())) as f32;
        let found = by_fft.narrow(0, b, 1).narrow(1, t, 1).narrow(2, c, 1).into_scalar::<f32>();
        assert!((found - direct).abs() < 1e-4, "{found}, should be {direct}");

        // Step by step, from any prefix.
        let mut state = start();
        for t in 0..time {
            state = ema.step(x.clone().narrow(1, t, 1).squeeze_dim(1), state).1;
        }
        assert!(apart(state.h, last.h) < 1e-4);
    }
}

#[test]
fn the_kernel_of_one_state_has_its_closed_form_also_when_cut_off() {
    let ema = drawn(|device| MultiHeadEmaConfig { states: 1, ..MultiHeadEmaConfig::new(1) }.init(device));
    let value = |x: Tensor<1>| f64::from(x.into_scalar::<f32>());
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (p, a) =
        (sigmoid(value(ema.delta.val().flatten(0, 2))), sigmoid(value(ema.alpha.val().flatten(0, 2))));
    let scale = p * value(ema.beta.val().flatten(0, 2)) * value(ema.gamma.val().flatten(0, 1));
    for (lag, k) in ema.kernel(400).into_data().iter::<f32>().enumerate() {
        let expected = scale * (1.0 - p * a).powi(lag as i32);
        assert!((f64::from(k) - expected).abs() < 1e-5 * scale.abs(), "lag {lag}: {k}, should be {expected}");
    }
    let cut = MultiHeadEmaConfig { truncation: Some(7), ..MultiHeadEmaConfig::new(2) };
    let cut = drawn(|device| cut.init(device));
    let x = random([1, 40, 2], 5);
    let late = cut.forward(x.clone().slice_dim(1, 10..), None);
    let whole = cut.forward(x.clone(), None);
    assert!(apart(whole.clone().slice_dim(1, 20..), late.slice_dim(1, 10..)) < 1e-5);
    // Read in pieces it forgets the same steps.
    for pieces in [&[1usize; 40][..], &[3, 20, 17], &[40]] {
        let (mut state, mut start) = (cut.initial_state(1, &Device::flex()), 0);
        for &piece in pieces {
            let (y, next) = cut.forward_with_state(x.clone().narrow(1, start, piece), state);
            assert!(apart(y, whole.clone().narrow(1, start, piece)) < 1e-5, "{pieces:?} from {start}");
            (state, start) = (next, start + piece);
        }
    }
}

fn rotary(z: usize) -> RelativeBias {
    RelativeBias::Rotary { alpha: random([1, z], 11), beta: random([1, z], 12) }
}

#[test]
fn chunks_of_any_length_equal_attention_in_each_by_itself() {
    let chunk = 8;
    for function in [AttentionFunction::Softmax, AttentionFunction::Laplace] {
        for bias in [rotary(6), RelativeBias::Simple(random([2 * chunk - 1], 13))] {
            for causal in [true, false] {
                let config = ChunkedAttentionConfig { chunk, causal, function };
                for time in [1, chunk - 1, chunk, chunk + 1, 3 * chunk + 5] {
                    let [q, k, v] =
                        [(6, 1), (6, 2), (5, 3)].map(|(width, seed)| random([2, time, width], seed));
                    let found = config.forward(q.clone(), k.clone(), v.clone(), &bias, None);
                    let matrix = bias.matrix(0..chunk, 0..chunk);
                    let expected = (0..time).step_by(chunk).map(|start| {
                        let n = chunk.min(time - start);
                        let part = |x: &Tensor<3>| x.clone().narrow(1, start, n);
                        let bias = matrix.clone().narrow(0, 0, n).narrow(1, 0, n);
                        plain_attention(part(&q), part(&k), part(&v), bias, causal, function)
                    });
                    let expected = Tensor::cat(expected.collect(), 1);
                    assert!(apart(found, expected) < 1e-5, "{function:?}, causal {causal}, {time} steps");
                }
            }
        }
    }
}

/// Attention by its formula.
fn plain_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    bias: Tensor<2>,
    causal: bool,
    function: AttentionFunction,
) -> Tensor<3> {
    let [_, n, z] = q.dims();
    let device = Device::flex();
    let hidden = Tensor::<2, Bool>::tril_mask([n, n], 0, &device); // true above the diagonal
    let hidden =
        if causal { hidden } else { hidden.bool_and(Tensor::<2, Int>::zeros([n, n], &device).equal_elem(1)) };
    let products = q.matmul(k.transpose());
    let weights = match function {
        AttentionFunction::Softmax => {
            let scores = products / (z as f64).sqrt() + bias.unsqueeze::<3>();
            let scores = scores.mask_fill(hidden.unsqueeze::<3>(), f32::NEG_INFINITY);
            burn::tensor::activation::softmax(scores, 2)
        }
        AttentionFunction::Laplace => {
            let visible = hidden.clone().bool_not().float().sum_dim(1);
            let scores = products / visible.unsqueeze::<3>() + bias.unsqueeze::<3>();
            let weights =
                ((scores - std::f64::consts::FRAC_1_SQRT_2) / (0.282_095 * 2f64.sqrt())).erf() * 0.5 + 0.5;
            weights.mask_fill(hidden.unsqueeze::<3>(), 0.0)
        }
    };
    weights.matmul(v)
}

/// A network in which everything is small, with chunks of 6.
fn network(mixer: &str, variant: Variant) -> TcncaConfig {
    TcncaConfig {
        z_dim: 4,
        h_dim: 7,
        ffn_dim: 9,
        variant,
        mixer: mixer.parse::<Mixers>().unwrap(),
        kernel: 3,
        dilation_factor: 2,
        tcn_blocks: 2,
        ema_states: 3,
        chunk: 6,
        ..TcncaConfig::new(8, 2)
    }
}

const KINDS: [(&str, Variant); 5] = [
    ("tcn", Variant::Full),
    ("tcn", Variant::Simplified),
    ("ema", Variant::Full),
    ("ema", Variant::Simplified),
    ("tcn,ema", Variant::Full),
];

#[test]
fn a_stream_in_any_pieces_equals_the_whole() {
    for (mixer, variant) in KINDS {
        for (function, bias, chunk) in [
            (AttentionFunction::Softmax, BiasKind::Rotary, 6),
            (AttentionFunction::Softmax, BiasKind::Simple, 6),
            (AttentionFunction::Laplace, BiasKind::Rotary, 6),
            (AttentionFunction::Softmax, BiasKind::Rotary, 0),
        ] {
            let network = TcncaConfig { attention: function, bias, chunk, ..network(mixer, variant) };
            let lm = drawn(|device| TcncaLmConfig { network, vocab: 11 }.init(device));
            let ids = Tensor::<1, Int>::arange(0..46, &Device::flex()).remainder_scalar(11).reshape([2, 23]);
            let whole = lm.forward(ids.clone());
            for pieces in [&[1usize; 23][..], &[5, 1, 8, 9], &[23], &[13, 10]] {
                let mut state = lm.initial_state(2, &Device::flex());
                let (mut start, mut outputs) = (0, Vec::new());
                for &piece in pieces {
                    let (y, next) = lm.forward_with_state(ids.clone().narrow(1, start, piece), state);
                    state = next;
                    start += piece;
                    outputs.push(y);
                }
                let streamed = Tensor::cat(outputs, 1);
                assert!(
                    apart(whole.clone(), streamed) < 1e-5,
                    "{mixer}, {variant:?}, {function:?}, {pieces:?}"
                );
            }
        }
    }
}

#[test]
fn a_causal_classifier_reads_a_stream_as_it_reads_the_whole() {
    let config = TcncaClassifierConfig {
        network: network("tcn", Variant::Full),
        input: Input::Numbers(2),
        classes: 3,
        causal: true,
    };
    let model = drawn(|device| config.init(device));
    let x = random([1, 17, 2], 4);
    let whole = model.forward(Steps::Numbers(x.clone()), None);
    let mut state = model.initial_state(1, &Device::flex());
    let mut logits = whole.clone() * 0.0;
    for (start, steps) in [(0, 4), (4, 1), (5, 12)] {
        (logits, state) = model.forward_with_state(Steps::Numbers(x.clone().narrow(1, start, steps)), state);
    }
    assert!(apart(whole, logits) < 1e-5);
}

#[test]
fn padding_changes_nothing() {
    for (mixer, variant) in KINDS {
        for function in [AttentionFunction::Softmax, AttentionFunction::Laplace] {
            for causal in [true, false] {
                let network = TcncaConfig { attention: function, ..network(mixer, variant) };
                let config = TcncaClassifierConfig { network, input: Input::Symbols(9), classes: 2, causal };
                let model = drawn(|device| config.init(device));
                let ids =
                    Tensor::<1, Int>::arange(0..19, &Device::flex()).remainder_scalar(9).reshape([1, 19]);
                let alone = model.forward(Steps::Ids(ids.clone().narrow(1, 0, 8)), None);
                let kept: Vec<bool> = (0..19).map(|t| t < 8).collect();
                let kept = Kept::new(Tensor::from_data(TensorData::new(kept, [1, 19]), &Device::flex()));
                let padded = model.forward(Steps::Ids(ids), Some(&kept));
                assert!(apart(alone, padded) < 1e-5, "{mixer}, {variant:?}, {function:?}, causal {causal}");
            }
        }
    }
}

#[test]
fn chunks_are_connected_by_the_mixer_alone() {
    for causal in [true, false] {
        // Filters of one tap without a map of the channels pass every step on as it is.
        let narrow = TcncaLayerConfig {
            z_dim: 4,
            tcn: TcnConfig { bidirectional: !causal, ..TcnConfig::new(8).with_filters(1, 1, 1) },
            attention: ChunkedAttentionConfig { causal, ..ChunkedAttentionConfig::new(5) },
            ..TcncaLayerConfig::new(8)
        };
        let wide = TcncaLayerConfig {
            tcn: TcnConfig { bidirectional: !causal, ..TcnConfig::new(8).with_filters(3, 2, 2) },
            ..narrow
        };
        let x = random([1, 15, 8], 6);
        let changed = x.clone() + Tensor::cat(vec![random([1, 5, 8], 7), random([1, 10, 8], 7) * 0.0], 1);
        let reaches = |config: TcncaLayerConfig| {
            let layer = drawn(|device| config.init(device));
            let beyond = |x: &Tensor<3>| layer.forward(x.clone(), None).slice_dim(1, 5..);
            apart(beyond(&x), beyond(&changed)) > 0.0
        };
        assert!(!reaches(narrow), "attention crosses chunks");
        assert!(reaches(wide), "the mixer does not");
    }
}

/// Compares the gradient of a random projection of `f` at `x` with central differences, at some elements.
fn assert_gradient(what: &str, x: Tensor<3>, f: impl Fn(Tensor<3>) -> Tensor<3>) {
    let upstream = random(f(Tensor::from_inner(x.clone())).dims(), 21);
    let leaf = Tensor::from_inner(x.clone()).require_grad();
    let gradients = (f(leaf.clone()) * Tensor::from_inner(upstream.clone())).sum().backward();
    let gradient: Vec<f32> = leaf.grad(&gradients).unwrap().into_data().iter::<f32>().collect();
    let values: Vec<f32> = x.clone().into_data().iter::<f32>().collect();
    let loss = |at: usize, step: f32| {
        let mut values = values.clone();
        values[at] += step;
        let x = Tensor::<3>::from_data(TensorData::new(values, x.dims()), &Device::flex());
        let y = f(Tensor::from_inner(x)).inner() * upstream.clone();
        y.into_data().iter::<f64>().sum::<f64>()
    };
    let largest = gradient.iter().fold(0.0f32, |largest, d| largest.max(d.abs()));
    for at in (0..values.len()).step_by(values.len() / 12 + 1) {
        let h = 1e-2;
        let measured = ((loss(at, h) - loss(at, -h)) / (2.0 * f64::from(h))) as f32;
        let apart = (gradient[at] - measured).abs();
        assert!(
            apart <= 2e-3 * largest.max(1.0),
            "{what}, element {at}: {}, measured {measured}",
            gradient[at]
        );
    }
}

#[test]
fn gradients_of_inputs_are_those_of_finite_differences() {
    let x = random([2, 13, 8], 8);
    for bidirectional in [false, true] {
        let tcn = tcn(TcnConfig { bidirectional, ..TcnConfig::new(8).with_filters(3, 2, 2) }).train();
        assert_gradient("tcn", x.clone(), |x| tcn.forward(x, None));
        let ema = MultiHeadEmaConfig { states: 3, bidirectional, ..MultiHeadEmaConfig::new(8) };
        let ema = drawn(|device| ema.init(device)).train();
        assert_gradient("ema", x.clone(), |x| ema.forward(x, None));
    }
    for (mixer, variant) in KINDS {
        for function in [AttentionFunction::Softmax, AttentionFunction::Laplace] {
            let network = TcncaConfig { attention: function, ..network(mixer, variant) };
            let layer = drawn(|device| network.layer(0, true).init(device)).train();
            assert_gradient(&format!("{mixer} {variant:?} {function:?}"), x.clone(), |x| {
                layer.forward(x, None)
            });
        }
    }
}

/// The gradients of all parameters of a loss, by name.
fn parameter_gradients<M: Module>(module: &M, loss: Tensor<1>) -> Vec<Vec<f32>> {
    struct Visitor {
        gradients: burn::tensor::Gradients,
        all: Vec<Vec<f32>>,
    }
    impl burn::module::ModuleVisitor for Visitor {
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
            let gradient = param.val().grad(&self.gradients).unwrap();
            self.all.push(gradient.into_data().iter::<f32>().collect());
        }
    }
    let mut visitor = Visitor { gradients: loss.backward(), all: Vec::new() };
    module.visit(&mut visitor);
    visitor.all
}

#[test]
fn gradients_of_parameters_are_those_of_the_composed_forms() {
    let x = random([3, 150, 18], 9);
    let upstream = Tensor::from_inner(random([3, 150, 18], 10));
    let leaf = || Tensor::from_inner(x.clone());
    let tcn = tcn(TcnConfig::new(18).with_filters(5, 3, 2)).train();
    let fused = (tcn.forward(leaf(), None) * upstream.clone()).sum();
    let state = tcn.initial_state(3, &Device::flex().autodiff());
    let composed = (tcn.forward_with_state(leaf(), state).0 * upstream.clone()).sum();
    let ema =
        drawn(|device| MultiHeadEmaConfig { states: 3, ..MultiHeadEmaConfig::new(18) }.init(device)).train();
    let by_fft = (ema.forward(leaf(), None) * upstream.clone()).sum();
    let state = ema.initial_state(3, &Device::flex().autodiff());
    let recurrent = (ema.forward_with_state(leaf(), state).0 * upstream).sum();
    let pairs = [
        (parameter_gradients(&tcn, fused), parameter_gradients(&tcn, composed)),
        (parameter_gradients(&ema, by_fft), parameter_gradients(&ema, recurrent)),
    ];
    for (found, expected) in pairs {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            let largest = expected.iter().fold(1e-3f32, |largest, x| largest.max(x.abs()));
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-3 * largest, "gradients differ by {worst} of {largest}");
        }
    }
}
