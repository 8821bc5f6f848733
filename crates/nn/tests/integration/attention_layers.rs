//! Attention, embedding and loss give Burn's results and gradients with Burn's parameters, under the same names.

use burn::module::Module;
use burn::nn::attention as burn_attention;
use burn::nn::loss as burn_loss;
use burn::tensor::{Bool, Device, Gradients, Int, Tensor, TensorData, Tolerance};
use kiln_core::{TensorFile, random_stream};
use kiln_nn::{
    CrossEntropyLossConfig, EmbeddingConfig, MhaCache, MhaInput, MultiHeadAttentionConfig, initialise,
};

use crate::random;

/// Burn's module and Kiln's with the same parameters, by way of a file, both in training.
fn same_parameters<B: Module, K: Module>(
    burn: impl FnOnce(&Device) -> B,
    kiln: impl FnOnce(&Device) -> K,
) -> (B, K) {
    let device = Device::flex();
    let burn = initialise(&device, &mut random_stream(1, "burn", 0), burn);
    let kiln = initialise(&device, &mut random_stream(2, "kiln", 0), kiln);
    let file = TensorFile::from_module(&burn);
    assert_eq!(file.names().collect::<Vec<_>>(), TensorFile::from_module(&kiln).names().collect::<Vec<_>>());
    (burn.train(), file.into_module(kiln).expect("the layers have the same parameters").train())
}

fn assert_same<const D: usize>(a: Tensor<D>, b: Tensor<D>) {
    a.inner().into_data().assert_approx_eq::<f32>(&b.inner().into_data(), Tolerance::absolute(5e-5));
}

/// Makes sure that two tensors have the same gradient.
fn assert_same_gradient<const D: usize>(x: &Tensor<D>, [a, b]: [&Gradients; 2]) {
    let [a, b] = [a, b].map(|gradients| x.grad(gradients).expect("a leaf has a gradient"));
    assert_same(Tensor::from_inner(a), Tensor::from_inner(b));
}

#[test]
fn an_embedding() {
    let (burn, kiln) = same_parameters(
        |device| burn::nn::EmbeddingConfig::new(9, 4).init(device),
        |device| EmbeddingConfig::new(9, 4).init(device),
    );
    let ids = Tensor::<2, Int>::from_ints([[3, 0, 3], [8, 3, 1]], &Device::flex().autodiff());
    let (y, y_burn) = (kiln.forward(ids.clone()), burn.forward(ids));
    let (gradients, gradients_burn) =
        (y.clone().square().sum().backward(), y_burn.clone().square().sum().backward());
    assert_same(y, y_burn);
    let gradient = kiln.weight.grad(&gradients).unwrap();
    assert_same(gradient, burn.weight.grad(&gradients_burn).unwrap());
}

/// Hides no query's keys altogether, where the layers would differ.
fn pad_mask() -> Tensor<2, Bool> {
    let mask = [[false, true, false, false, true], [false; 5], [true, false, false, true, false]];
    Tensor::from_data(mask, &Device::flex().autodiff())
}

fn causal_mask(time: usize, source: usize) -> Tensor<3, Bool> {
    let hidden: Vec<bool> = (0..3 * time * source).map(|i| i % source > i / source % time).collect();
    Tensor::from_data(TensorData::new(hidden, [3, time, source]), &Device::flex().autodiff())
}

#[test]
fn multi_head_attention_with_and_without_masks() {
    for (quiet, with_pad, with_attn) in
        [(false, false, false), (false, true, false), (false, false, true), (true, true, true)]
    {
        let (burn, kiln) = same_parameters(
            |device| {
                let config = burn_attention::MultiHeadAttentionConfig::new(12, 3).with_dropout(0.0);
                config.with_quiet_softmax(quiet).with_key_bias(false).init(device)
            },
            |device| {
                let config = MultiHeadAttentionConfig::new(12, 3).with_dropout(0.0);
                config.with_quiet_softmax(quiet).with_key_bias(false).init(device)
            },
        );
        let q = Tensor::from_inner(random("q", [3, 4, 12], &Device::flex())).require_grad();
        let kv = Tensor::from_inner(random("kv", [3, 5, 12], &Device::flex())).require_grad();
        let mut input = MhaInput::new(q.clone(), kv.clone(), kv.clone());
        let mut burn_input = burn_attention::MhaInput::new(q.clone(), kv.clone(), kv.clone());
        if with_pad {
            input = input.mask_pad(pad_mask());
            burn_input = burn_input.mask_pad(pad_mask());
        }
        if with_attn {
            input = input.mask_attn(causal_mask(4, 5));
            burn_input = burn_input.mask_attn(causal_mask(4, 5));
        }
        let (y, y_burn) = (kiln.forward(input), burn.forward(burn_input));
        assert_same(y.weights(), y_burn.weights.clone());
        let gradients = y.context.clone().square().sum().backward();
        let gradients_burn = y_burn.context.clone().square().sum().backward();
        assert_same(y.context, y_burn.context);
        assert_same_gradient(&q, [&gradients, &gradients_burn]);
        assert_same_gradient(&kv, [&gradients, &gradients_burn]);
        let of = |weight: &Tensor<2>, gradients| Tensor::from_inner(weight.grad(gradients).unwrap());
        assert_same(of(&kiln.key.weight.val(), &gradients), of(&burn.key.weight.val(), &gradients_burn));
    }
}

#[test]
fn dropout_drops_weights_in_training_alone() {
    let device = Device::flex();
    let layer = initialise(&device, &mut random_stream(0, "init", 0), |device| {
        MultiHeadAttentionConfig::new(8, 2).with_dropout(0.5).init(device)
    });
    let x = random("x", [2, 6, 8], &Device::flex());
    let dropped = |weights: Tensor<4>| {
        let weights = weights.inner().into_data().try_to_vec::<f32>().unwrap();
        weights.iter().filter(|&&w| w == 0.0).count()
    };
    assert_eq!(dropped(layer.forward(MhaInput::self_attn(x.clone())).weights()), 0);
    let training = layer.train().forward(MhaInput::self_attn(Tensor::from_inner(x)));
    assert!(dropped(training.weights()) > 20);
}

#[test]
fn a_cache_gives_what_the_whole_sequence_gives() {
    let device = Device::flex();
    let layer = initialise(&device, &mut random_stream(0, "init", 0), |device| {
        MultiHeadAttentionConfig::new(12, 3).init(device)
    });
    let mask = |time, source| causal_mask(time, source).inner();
    let x = random("x", [3, 5, 12], &Device::flex());
    let whole = layer.forward(MhaInput::self_attn(x.clone()).mask_attn(mask(5, 5))).context;
    let mut cache = MhaCache::autoregressive();
    for time in 2..=5 {
        let input = MhaInput::self_attn(x.clone().narrow(1, 0, time)).mask_attn(mask(time, time));
        let context = layer.forward_cache(input, &mut cache).context;
        context.into_data().assert_approx_eq::<f32>(
            &whole.clone().narrow(1, 0, time).into_data(),
            Tolerance::absolute(1e-5),
        );
    }

    let memory = random("memory", [3, 7, 12], &Device::flex());
    let across = |x: Tensor<3>| MhaInput::new(x, memory.clone(), memory.clone());
    let whole = layer.forward(across(x.clone())).context;
    let mut cache = MhaCache::autoregressive_cross_attention();
    layer.forward_cache(across(x.clone().narrow(1, 0, 4)), &mut cache);
    let context = layer.forward_cache(across(x), &mut cache).context;
    context.into_data().assert_approx_eq::<f32>(&whole.into_data(), Tolerance::absolute(1e-5));
}

#[test]
fn the_cross_entropy_loss_with_every_option() {
    let device = Device::flex().autodiff();
    let targets = Tensor::<1, Int>::from_ints([2, 0, 3, 1, 2, 2], &device);
    for case in 0..16 {
        let chosen = |bit: usize| case >> bit & 1 == 1;
        let weights = chosen(0).then(|| vec![0.5, 2.0, 1.0, 0.25]);
        let smoothing = chosen(1).then_some(0.2);
        let pads = chosen(2).then(|| vec![0, 3]);
        let logits = !chosen(3);
        let kiln = CrossEntropyLossConfig::new()
            .with_weights(weights.clone())
            .with_smoothing(smoothing)
            .with_pad_tokens(pads.clone())
            .with_logits(logits)
            .init(&device);
        let burn = burn_loss::CrossEntropyLossConfig::new()
            .with_weights(weights)
            .with_smoothing(smoothing)
            .with_pad_tokens(pads)
            .with_logits(logits)
            .init(&device);
        let x = random("x", [6, 4], &Device::flex());
        let x = Tensor::from_inner(if logits { x } else { burn::tensor::activation::softmax(x, 1) })
            .require_grad();
        let (loss, loss_burn) =
            (kiln.forward(x.clone(), targets.clone()), burn.forward(x.clone(), targets.clone()));
        let gradients = [&loss.backward(), &loss_burn.backward()];
        assert_same(loss, loss_burn);
        assert_same_gradient(&x, gradients);
    }
}
