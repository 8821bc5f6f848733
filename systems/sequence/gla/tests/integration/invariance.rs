//! What must hold for any input: pieces equal the whole, rows and documents do not see each other, the future
//! does not reach the past, and the special cases are the known ones.

use burn::tensor::{Bool, Device, Tensor, TensorData};
use kiln_core::{Context, random_stream};
use kiln_gla::op::{
    GlaOpConfig, gla_chunk, gla_chunk_packed, gla_chunk_with_state, gla_parallel, gla_recurrent,
};
use kiln_gla::{Arch, GatedLinearAttentionConfig, GlaLmConfig, Lm, LmConfig};
use kiln_nn::{LanguageModel, ids_to_tensor, initialise};
use rand::RngExt;

/// Uniform numbers in [low, high), the same for the same stream.
fn uniform<const D: usize>(
    stream: &str,
    shape: [usize; D],
    low: f32,
    high: f32,
    device: &Device,
) -> Tensor<D> {
    let mut rng = random_stream(0, stream, 0);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(low..high)).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn inputs([batch, heads, time, key, value]: [usize; 5], device: &Device) -> [Tensor<4>; 4] {
    [
        uniform("q", [batch, heads, time, key], -1.0, 1.0, device),
        uniform("k", [batch, heads, time, key], -1.0, 1.0, device),
        uniform("v", [batch, heads, time, value], -1.0, 1.0, device),
        uniform("g", [batch, heads, time, key], -1.5, 0.0, device),
    ]
}

fn assert_close<const D: usize>(a: Tensor<D>, b: Tensor<D>, tolerance: f32) {
    let scale = b.clone().abs().max().into_scalar::<f32>().max(1.0);
    let worst = (a - b).abs().max().into_scalar::<f32>();
    assert!(worst <= tolerance * scale, "differs by {worst}, at most {} allowed", tolerance * scale);
}

#[test]
fn any_split_with_carried_state_equals_the_whole() {
    let device = Device::flex();
    let [q, k, v, g] = inputs([2, 3, 150, 8, 5], &device);
    let config = GlaOpConfig::default();
    let (whole, end) = gla_chunk_with_state(q.clone(), k.clone(), v.clone(), g.clone(), None, config);
    for cuts in [vec![0, 150], vec![0, 1, 150], vec![0, 64, 128, 150], vec![0, 3, 70, 149, 150]] {
        let mut state = None;
        let mut pieces = Vec::new();
        for cut in cuts.windows(2) {
            let part = |x: &Tensor<4>| x.clone().slice_dim(2, cut[0]..cut[1]);
            let (o, next) = gla_chunk_with_state(part(&q), part(&k), part(&v), part(&g), state, config);
            pieces.push(o);
            state = Some(next);
        }
        assert_close(Tensor::cat(pieces, 2), whole.clone(), 1e-5);
        assert_close(state.unwrap(), end.clone(), 1e-5);
    }
}

#[test]
fn batch_rows_do_not_see_each_other() {
    let device = Device::flex();
    let [q, k, v, g] = inputs([3, 2, 70, 4, 6], &device);
    let config = GlaOpConfig::default();
    let together = gla_chunk(q.clone(), k.clone(), v.clone(), g.clone(), None, config);
    for row in 0..3 {
        let one = |x: &Tensor<4>| x.clone().slice_dim(0, row..row + 1);
        let alone = gla_chunk(one(&q), one(&k), one(&v), one(&g), None, config);
        assert_eq!(alone.into_data(), one(&together).into_data());
    }
}

#[test]
fn a_changed_token_leaves_earlier_outputs_bit_for_bit() {
    let device = Device::flex();
    let [q, k, v, g] = inputs([1, 2, 100, 4, 3], &device);
    let config = GlaOpConfig::default();
    let before = gla_chunk(q.clone(), k.clone(), v.clone(), g.clone(), None, config);
    for t in [0, 17, 64, 99] {
        let change = |x: &Tensor<4>, to: f32| {
            let [batch, heads, _, width] = x.dims();
            let row = Tensor::full([batch, heads, 1, width], to, &device);
            x.clone().slice_assign([0..batch, 0..heads, t..t + 1, 0..width], row)
        };
        let after =
            gla_chunk(change(&q, 0.7), change(&k, -0.3), change(&v, 2.0), change(&g, -0.2), None, config);
        let past = |x: &Tensor<4>| x.clone().slice_dim(2, 0..t).into_data();
        if t > 0 {
            assert_eq!(past(&before), past(&after), "token {t}");
        }
        let row = |x: &Tensor<4>| x.clone().slice_dim(2, t..t + 1).into_data();
        assert_ne!(row(&before), row(&after), "token {t}");
    }
}

#[test]
fn without_decay_it_is_cumulative_linear_attention() {
    let device = Device::flex();
    let [q, k, v, g] = inputs([1, 2, 90, 4, 3], &device);
    let o = gla_chunk(q.clone(), k.clone(), v.clone(), g.zeros_like(), None, GlaOpConfig::default());
    let above = Tensor::<2, Bool>::tril_mask([90, 90], 0, &device).unsqueeze::<4>().expand([1, 2, 90, 90]);
    let scores = q.matmul(k.transpose()).div_scalar(2.0).mask_fill(above, 0.0);
    assert_close(o, scores.matmul(v), 1e-5);
}

#[test]
fn with_one_decay_for_all_channels_it_is_retention() {
    let device = Device::flex();
    let [q, k, v, g] = inputs([1, 2, 90, 4, 3], &device);
    let g = g.slice_dim(3, 0..1); // [batch, heads, time, 1]
    let o = gla_chunk(
        q.clone(),
        k.clone(),
        v.clone(),
        g.clone().expand([1, 2, 90, 4]),
        None,
        GlaOpConfig::default(),
    );
    let b = g.cumsum(2);
    let above = Tensor::<2, Bool>::tril_mask([90, 90], 0, &device).unsqueeze::<4>().expand([1, 2, 90, 90]);
    let decay = (b.clone() - b.transpose()).mask_fill(above, f32::NEG_INFINITY).exp();
    assert_close(o, (q.matmul(k.transpose()).div_scalar(2.0) * decay).matmul(v), 1e-5);
}

#[test]
fn all_forms_agree_for_one_key_channel_and_odd_lengths() {
    let device = Device::flex();
    for time in [1, 2, 15, 16, 17, 63, 64, 65] {
        let [q, k, v, g] = inputs([1, 1, time, 1, 2], &device);
        let config = GlaOpConfig { chunk: 32, sub_chunk: 8, recompute: false };
        let (recurrent, end) = gla_recurrent(q.clone(), k.clone(), v.clone(), g.clone(), None);
        let (parallel, _) = gla_parallel(q.clone(), k.clone(), v.clone(), g.clone(), None);
        let (chunk, chunk_end) = gla_chunk_with_state(q, k, v, g, None, config);
        assert_close(parallel, recurrent.clone(), 1e-5);
        assert_close(chunk, recurrent, 1e-5);
        assert_close(chunk_end, end, 1e-5);
    }
}

#[test]
fn packed_documents_equal_documents_alone_forward_and_backward() {
    let device = Device::flex().autodiff();
    let [q, k, v, g] = inputs([1, 2, 100, 4, 3], &device).map(Tensor::require_grad);
    let weight = uniform("weight", [1, 2, 100, 3], -1.0, 1.0, &device);
    let config = GlaOpConfig { chunk: 16, sub_chunk: 8, recompute: true };
    let offsets = [0, 1, 40, 41, 100];
    let packed = gla_chunk_packed(q.clone(), k.clone(), v.clone(), g.clone(), &offsets, config);
    let alone = offsets.windows(2).map(|at| {
        let part = |x: &Tensor<4>| x.clone().slice_dim(2, at[0]..at[1]);
        gla_recurrent(part(&q), part(&k), part(&v), part(&g), None).0
    });
    let alone = Tensor::cat(alone.collect(), 2);
    assert_close(packed.clone().inner(), alone.clone().inner(), 1e-5);
    let found = (packed * weight.clone()).sum().backward();
    let expected = (alone * weight).sum().backward();
    for input in [&q, &k, &v, &g] {
        assert_close(input.grad(&found).unwrap(), input.grad(&expected).unwrap(), 1e-4);
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let device = Device::flex().autodiff();
    let shape = [2, 1, 9, 3, 2];
    let weight = uniform("weight", [2, 1, 9, 2], -1.0, 1.0, &device);
    let config = GlaOpConfig { chunk: 4, sub_chunk: 2, recompute: false };
    let loss = |inputs: [Tensor<4>; 4]| {
        let [q, k, v, g] = inputs;
        (gla_chunk(q, k, v, g, None, config) * weight.clone()).sum()
    };
    let leaves = inputs(shape, &device).map(Tensor::require_grad);
    let gradients = loss(leaves.clone()).backward();
    let step = 1e-2f32;
    for (which, leaf) in leaves.iter().enumerate() {
        let found: Vec<f32> = leaf.grad(&gradients).unwrap().into_data().iter().collect();
        for (at, &found) in found.iter().enumerate() {
            let shifted = |by: f32| {
                let mut inputs = inputs(shape, &device);
                let mut values: Vec<f32> = inputs[which].clone().into_data().iter().collect();
                values[at] += by;
                inputs[which] = Tensor::from_data(TensorData::new(values, leaf.dims()), &device);
                loss(inputs).into_scalar::<f32>()
            };
            // Fourth order, so that a step large enough for f32 is accurate.
            let numeric = (8.0 * (shifted(step) - shifted(-step))
                - (shifted(2.0 * step) - shifted(-2.0 * step)))
                / (12.0 * step);
            assert!(
                (numeric - found).abs() <= 1e-3,
                "input {which}, element {at}: {found} against {numeric}"
            );
        }
    }
}

#[test]
fn a_left_padded_row_gives_exactly_the_unpadded_result() {
    let device = Device::flex();
    let config = GatedLinearAttentionConfig { short_conv: Some(4), ..GatedLinearAttentionConfig::new(16, 2) };
    let layer = initialise(&device, &mut random_stream(0, "init", 0), |device| config.init(device));
    let x = uniform("x", [1, 20, 16], -1.0, 1.0, &device);
    let padding = 11;
    let garbage = uniform("garbage", [1, padding, 16], -5.0, 5.0, &device);
    let mask: Vec<bool> = (0..padding + 20).map(|t| t >= padding).collect();
    let mask = Tensor::<2, Bool>::from_data(TensorData::new(mask, [1, padding + 20]), &device);
    let padded = layer.forward_masked(Tensor::cat(vec![garbage, x.clone()], 1), mask);
    assert_close(padded.slice_dim(1, padding..padding + 20), layer.forward(x), 1e-6);
}

#[test]
fn every_architecture_steps_as_it_reads() {
    let cx = Context::new();
    let mut gla = GlaLmConfig::new(17, 16, 2, 4);
    gla.num_kv_heads = Some(2);
    gla.use_short_conv = true;
    gla.tie_word_embeddings = true;
    let ids: Vec<u32> = (0..30).map(|i| i * 7 % 17).collect();
    for arch in [Arch::Gla, Arch::Retnet, Arch::Linear, Arch::Llama, Arch::Mamba] {
        let model: Lm = LmConfig::like(arch, &gla).unwrap().init(&cx);
        let whole = model.forward(ids_to_tensor(&ids, &cx.device));
        let mut state = model.initial_state(1, &cx.device);
        let mut rows = Vec::new();
        for piece in [&ids[..13], &ids[13..14], &ids[14..]] {
            let (logits, next) = model.forward_with_state(ids_to_tensor(piece, &cx.device), state);
            rows.push(logits);
            state = next;
        }
        assert_close(Tensor::cat(rows, 1), whole, 1e-4);
    }
}

#[test]
fn parameter_counts_of_the_architectures_are_within_three_percent() {
    use burn::module::Module;
    let cx = Context::new();
    for gla in [GlaLmConfig::new(256, 128, 4, 4), GlaLmConfig::new(256, 256, 6, 4)] {
        let count = |arch| LmConfig::like(arch, &gla).unwrap().init(&cx).num_params() as f64;
        for arch in [Arch::Retnet, Arch::Linear, Arch::Llama, Arch::Mamba] {
            let ratio = count(arch) / count(Arch::Gla);
            assert!((ratio - 1.0).abs() <= 0.03, "{arch:?} has {ratio} of the parameters of GLA");
        }
    }
}
