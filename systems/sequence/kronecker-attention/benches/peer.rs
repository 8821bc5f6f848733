//! The figures that `peer.py` measures in PyTorch, measured here, and those of the near-linear algorithm, which has no peer;
//! `cargo xtask bench kronecker-attention` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use kiln_core::MemoryGauge;
use kiln_kronecker_attention::attention::{AttentionOptions, tensor_attention};
use kiln_kronecker_attention::plan::score_bound;
use kiln_kronecker_attention::polynomial::{Basis, ExpPolynomial, tensor_attention_poly};

const WIDTH: usize = 32;

/// Query, two key and two value matrices of one head.
fn operands(n: usize, width: usize, distribution: Distribution) -> [Tensor<4>; 5] {
    std::array::from_fn(|_| Tensor::random([1, 1, n, width], distribution, &Device::flex()))
}

fn median_milliseconds(repetitions: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..repetitions)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    1e3 * seconds[repetitions / 2]
}

fn attend([q, k1, k2, v1, v2]: [Tensor<4>; 5]) -> Tensor<4> {
    tensor_attention(q, &[k1, k2], &[v1, v2], &AttentionOptions::new(1.0 / WIDTH as f64))
}

fn forward(n: usize, repetitions: usize) -> f64 {
    let inputs = operands(n, WIDTH, Distribution::Normal(0.0, 1.0));
    median_milliseconds(repetitions, || {
        black_box(attend(inputs.clone()));
    })
}

fn forward_backward(n: usize, repetitions: usize) -> f64 {
    let inputs =
        operands(n, WIDTH, Distribution::Normal(0.0, 1.0)).map(|x| Tensor::from_inner(x).require_grad());
    median_milliseconds(repetitions, || {
        black_box(attend(inputs.clone()).sum().backward());
    })
}

/// Memory above the inputs of the exact algorithm, forward and backward; not a number where the system does not tell.
fn peak_mib(n: usize) -> f64 {
    let inputs =
        operands(n, WIDTH, Distribution::Normal(0.0, 1.0)).map(|x| Tensor::from_inner(x).require_grad());
    let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(|| attend(inputs).sum().backward()).1);
    peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
}

/// The near-linear algorithm with 4 columns and degree 6.
fn polynomial(n: usize) -> f64 {
    let [q, k1, k2, v1, v2] = operands(n, 4, Distribution::Uniform(-1.0, 1.0));
    let (keys, values, options) = ([k1, k2], [v1, v2], AttentionOptions::new(0.25));
    let range = score_bound(&q, &keys, options.scale);
    let polynomial = ExpPolynomial::new(Basis::Chebyshev, 6, range).expect("degree 6 has coefficients");
    median_milliseconds(3, || {
        black_box(tensor_attention_poly(q.clone(), &keys, &values, &options, &polynomial));
    })
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let show = |name: String, unit: &str, measure: &dyn Fn() -> f64| {
        if name.contains(&only) {
            println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
        }
    };
    show("memory of pairs fwd+bwd n=512".into(), "MiB", &|| peak_mib(512));
    for (n, repetitions) in [(64, 15), (128, 9), (256, 5), (512, 3)] {
        show(format!("pairs fwd n={n}"), "ms", &|| forward(n, repetitions));
        show(format!("pairs fwd+bwd n={n}"), "ms", &|| forward_backward(n, repetitions));
    }
    for n in [1000, 10_000, 100_000] {
        show(format!("polynomial fwd n={n}"), "ms", &|| polynomial(n));
    }
}
