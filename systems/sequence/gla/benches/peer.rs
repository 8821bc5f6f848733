//! The figures that `peer.py` measures in PyTorch, measured here; `cargo xtask bench gla` runs both in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::time::Instant;

use burn::module::Module;
use burn::tensor::activation::log_sigmoid;
use burn::tensor::{Distribution, Int, Tensor, TensorData};
use kiln_core::{Context, MemoryGauge};
use kiln_gla::lm::LmState;
use kiln_gla::op::{GlaOpConfig, gla_chunk, gla_recurrent};
use kiln_gla::{Arch, GlaLmConfig, Lm, LmConfig};
use kiln_nn::{AdamW, LanguageModel, next_token_loss};
use rand::RngExt;

const VOCAB: usize = 256;

fn model(arch: Arch, cx: &Context) -> Lm {
    let config = LmConfig::like(arch, &GlaLmConfig::new(VOCAB, 256, 6, 4)).expect("the sizes fit");
    config.init(cx)
}

/// The median over `repetitions` after one warm-up.
fn median_seconds(repetitions: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..repetitions)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[repetitions / 2]
}

/// Forward and backward of the operator, batch 1, 4 heads, keys 64, values 128.
fn op_milliseconds(chunked: bool, time: usize, repetitions: usize, cx: &Context) -> f64 {
    let device = cx.device.clone().autodiff();
    let normal = |width| Tensor::<4>::random([1, 4, time, width], Distribution::Normal(0.0, 1.0), &device);
    let inputs = [normal(64), normal(64), normal(128), log_sigmoid(normal(64)).div_scalar(16.0)];
    let [q, k, v, g] = inputs.map(|x| x.detach().require_grad());
    let weight = normal(128).detach();
    1e3 * median_seconds(repetitions, || {
        let inputs = [q.clone(), k.clone(), v.clone(), g.clone()];
        let [q_in, k_in, v_in, g_in] = inputs;
        let o = match chunked {
            true => gla_chunk(q_in, k_in, v_in, g_in, None, GlaOpConfig::default()),
            false => gla_recurrent(q_in, k_in, v_in, g_in, None).0,
        };
        let gradients = (o * weight.clone()).sum().backward();
        assert!([&q, &k, &v, &g].iter().all(|x| x.grad(&gradients).is_some()));
    })
}

/// Forward, backward and one step of AdamW on random bytes.
fn train_tokens_per_second(arch: Arch, cx: &Context) -> f64 {
    let (batch, time) = (4, 1024);
    let device = cx.device.clone().autodiff();
    let mut model = Some(model(arch, cx).to_device(&device).train());
    let mut optimiser = AdamW::new(0.01, 1.0);
    let mut rng = cx.rng("ids", 0);
    let mut ids = || -> Tensor<2, Int> {
        let ids: Vec<i64> = (0..batch * time).map(|_| rng.random_range(0..VOCAB as i64)).collect();
        Tensor::from_data(TensorData::new(ids, [batch, time]), &device)
    };
    let (inputs, targets) = (ids(), ids());
    let seconds = median_seconds(3, || {
        let before = model.take().expect("put back after every step");
        let loss = next_token_loss(before.forward(inputs.clone()), targets.clone());
        model = Some(optimiser.step(before, loss.backward(), 3e-4).0);
    });
    (batch * time) as f64 / seconds
}

/// A model that has read `read` random tokens, piece by piece, and the token to go on from.
fn after_reading(read: usize, cx: &Context) -> (Lm, Tensor<2, Int>, LmState) {
    let model = model(Arch::Gla, cx);
    let mut rng = cx.rng("ids", 1);
    let ids: Vec<u32> = (0..read).map(|_| rng.random_range(0..VOCAB as u32)).collect();
    let mut state = model.initial_state(1, &cx.device);
    for piece in ids.chunks(1024) {
        state = model.forward_with_state(kiln_nn::ids_to_tensor(piece, &cx.device), state).1;
    }
    (model, kiln_nn::ids_to_tensor(&ids[read - 1..], &cx.device), state)
}

/// Greedy generation, one token at a time.
fn generate(
    model: &Lm,
    mut token: Tensor<2, Int>,
    mut state: LmState,
    tokens: usize,
) -> (Tensor<2, Int>, LmState) {
    for _ in 0..tokens {
        let (logits, next) = model.forward_with_state(token, state);
        token = logits.argmax(2).reshape([1, 1]);
        state = next;
    }
    (token, state)
}

/// Speed of greedy generation after `read` tokens.
fn generate_tokens_per_second(read: usize, cx: &Context) -> f64 {
    let tokens = 64;
    let (model, token, state) = after_reading(read, cx);
    let mut position = Some((token, state));
    let seconds = median_seconds(5, || {
        let (token, state) = position.take().expect("put back after every run");
        position = Some(generate(&model, token, state, tokens));
    });
    tokens as f64 / seconds
}

/// How much longer a token takes after `late` tokens than after `early` ones: the median of many runs, which alternate
/// so that what else the machine does meets both alike.
fn generation_slowdown(early: usize, late: usize, cx: &Context) -> f64 {
    let mut positions = [early, late].map(|read| after_reading(read, cx));
    let mut seconds = || {
        positions.each_mut().map(|(model, token, state)| {
            let begun = Instant::now();
            (*token, *state) = generate(model, token.clone(), state.clone(), 32);
            begun.elapsed().as_secs_f64()
        })
    };
    seconds();
    let mut ratios: Vec<f64> = (0..41).map(|_| seconds()).map(|[early, late]| late / early).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

/// How far memory rises while 256 tokens are generated after `read`; not a number where the system does not
/// tell, which the comparison leaves out.
fn generate_peak_mib(read: usize, cx: &Context) -> f64 {
    let (model, token, state) = after_reading(read, cx);
    let (token, state) = generate(&model, token, state, 8);
    let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(|| generate(&model, token, state, 256)).1);
    peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let cx = Context::new();
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let show = |name: &str, unit: &str, measure: &dyn Fn() -> f64| {
        if name.contains(&only) {
            println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
        }
    };
    for (time, repetitions) in [(512, 9), (2048, 7), (8192, 5), (32_768, 3)] {
        let measure = || op_milliseconds(true, time, repetitions, &cx);
        show(&format!("op fwd+bwd chunk T={time}"), "ms", &measure);
    }
    for (time, repetitions) in [(512, 5), (2048, 3)] {
        let measure = || op_milliseconds(false, time, repetitions, &cx);
        show(&format!("op fwd+bwd recurrent T={time}"), "ms", &measure);
    }
    show("lm train tokens/s T=1024", "tokens/s", &|| train_tokens_per_second(Arch::Gla, &cx));
    show("llama train tokens/s T=1024", "tokens/s", &|| train_tokens_per_second(Arch::Llama, &cx));
    for read in [100, 1000, 10_000, 32_000] {
        let measure = || generate_tokens_per_second(read, &cx);
        show(&format!("generate tokens/s after {read}"), "tokens/s", &measure);
    }
    show("generate time after 32000 / after 100", "x", &|| generation_slowdown(100, 32_000, &cx));
    for read in [100, 32_000] {
        show(&format!("generate peak MiB after {read}"), "MiB", &|| generate_peak_mib(read, &cx));
    }
}
