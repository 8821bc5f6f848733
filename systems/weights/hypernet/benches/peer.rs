//! The figures that `peer.py` measures in PyTorch, measured here; `cargo xtask bench hypernet` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. Memory is how far the resident set of a process that does nothing else rises above
//! where it was before the networks were made. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Distribution, Int, Tensor};
use kiln_core::MemoryGauge;
use kiln_hypernet::training::cross_entropy;
use kiln_hypernet::{Arch, Condition, Conditioning, HyperNet, HyperNetConfig, OutputScheme, Target};
use kiln_nn::{AdamW, functional};

const REPETITIONS: usize = 21;
/// Set for a process whose memory is measured: the name of its figure.
const MEMORY_VARIABLE: &str = "KILN_BENCH_MEMORY";

fn median_milliseconds(mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..REPETITIONS)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    1e3 * seconds[REPETITIONS / 2]
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

/// N = 100 180.
fn target() -> Target {
    Target::mlp(&[784, 126, 10])
}

/// 101 chunks of 1000, all in one call.
fn hypernet() -> HyperNet {
    let spec = target().spec().expect("the widths fit");
    let config = HyperNetConfig::new(spec)
        .with_conditioning([Conditioning::Task { tasks: 5, dim: 8 }])
        .with_scheme(OutputScheme::Chunk { chunk: 1000, emb_dim: 8 })
        .with_arch(Arch::Mlp(vec![64]));
    config.init(None, &Device::flex()).expect("the configuration makes sense")
}

fn theta(hyper: &HyperNet) -> Tensor<2> {
    hyper.generate(&Condition::tasks([2])).expect("there are five tasks").flat
}

fn generate() -> f64 {
    let hyper = hypernet();
    median_milliseconds(|| {
        black_box(theta(&hyper));
    })
}

/// One step of training on 64 rows: both networks forward and backward, and Adam.
fn step() -> f64 {
    let target = target();
    let (x, y) = (random([1, 64, 784]), Tensor::<2, Int>::zeros([1, 64], &Device::flex()));
    let mut hyper = Some(hypernet().train());
    let mut adam = AdamW::new(0.0, 0.0);
    median_milliseconds(|| {
        let net = hyper.take().expect("put back below");
        let loss = cross_entropy(target.forward(theta(&net), x.clone()), y.clone());
        hyper = Some(adam.step(net, loss.backward(), 1e-3).0);
    })
}

/// The target alone, with weights that were made before.
fn cached() -> f64 {
    let (target, theta, x) = (target(), theta(&hypernet()), random([1, 64, 784]));
    median_milliseconds(|| {
        black_box(target.forward(theta.clone(), x.clone()));
    })
}

/// 64 images, each with a convolution of its own from 8 to 16 channels.
fn own_convolutions() -> f64 {
    let inputs = |x: Tensor<5>| Tensor::from_inner(x).require_grad();
    let (x, w) = (inputs(random([64, 1, 8, 28, 28])), inputs(random([64, 16, 8, 3, 3])));
    median_milliseconds(|| {
        let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
        black_box(functional::conv2d(x.clone(), w.clone(), None, options).sum().backward());
    })
}

/// 64 sets of 32 rows, each with a linear layer of its own.
fn own_linears() -> f64 {
    let inputs = |x: Tensor<3>| Tensor::from_inner(x).require_grad();
    let (x, w) = (inputs(random([64, 32, 128])), inputs(random([64, 128, 128])));
    median_milliseconds(|| {
        black_box(functional::linear(x.clone(), w.clone(), None).sum().backward());
    })
}

/// Milliseconds.
type Measure = fn() -> f64;

const FIGURES: [(&str, Measure); 7] = [
    ("generate 100180 weights in chunks", generate),
    ("training step, 100180 weights in chunks", step),
    ("generate 100180 weights in chunks, hypnettorch", generate),
    ("training step, 100180 weights in chunks, hypnettorch", step),
    ("target forward, weights made before", cached),
    ("a convolution of its own for each of 64 images, fwd+bwd", own_convolutions),
    ("a linear layer of its own for each of 64 sets, fwd+bwd", own_linears),
];

/// Of these the memory is measured as well.
const MEMORY: [&str; 4] = [
    "training step, 100180 weights in chunks",
    "training step, 100180 weights in chunks, hypnettorch",
    "a convolution of its own for each of 64 images, fwd+bwd",
    "a linear layer of its own for each of 64 sets, fwd+bwd",
];

/// Not a number where the system does not tell, which the comparison leaves out.
fn peak_mebibytes(measure: Measure) -> f64 {
    // Threads are there before the count begins.
    functional::linear(random([2, 64, 64]), random([2, 64, 64]), None).into_data();
    let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(measure).1);
    peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
}

fn peak_mebibytes_of_a_process(name: &str) -> f64 {
    let program = std::env::current_exe().expect("the system knows the program");
    let output = Command::new(program).env(MEMORY_VARIABLE, name).output().expect("it starts again");
    String::from_utf8_lossy(&output.stdout).trim().parse().expect("it prints one number")
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    if let Ok(name) = std::env::var(MEMORY_VARIABLE) {
        let figure = FIGURES.iter().find(|(other, _)| *other == name);
        return println!("{}", peak_mebibytes(figure.expect("memory is measured of a figure").1));
    }
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let show = |name: &str, unit: &str, measure: &dyn Fn() -> f64| {
        if name.contains(&only) {
            println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
        }
    };
    for (name, measure) in FIGURES {
        show(name, "ms", &measure);
    }
    for name in MEMORY {
        show(&format!("memory of {name}"), "MiB", &|| peak_mebibytes_of_a_process(name));
    }
}
