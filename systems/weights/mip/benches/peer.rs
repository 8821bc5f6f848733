//! The figures that `peer.py` measures in PyTorch, measured here; `cargo xtask bench mip` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. Memory is how far the resident set of a process that does nothing else rises above
//! where it was before the networks were made. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Int, Tensor};
use kiln_core::{MemoryGauge, random_stream};
use kiln_mip::arch::{Arch, Classifier, ClassifierConfig};
use kiln_mip::hypernet::Nonlinearity;
use kiln_mip::{MipConfig, MipHyper};
use kiln_nn::AdamW;
use kiln_ops::cross_entropy;

const REPETITIONS: usize = 9;
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

/// A network for images of 28 x 28 pixels, all of whose weights depend on one number.
fn model(arch: Arch) -> MipHyper<Classifier> {
    let device = Device::flex();
    let config = ClassifierConfig {
        arch,
        image: [1, 28, 28],
        classes: 10,
        activation: Nonlinearity::LeakyRelu,
        batch_norm: false,
    };
    let net = config.init(&device);
    MipConfig::new(1)
        .draw(net, &mut random_stream(0, "bench", 0), &device)
        .expect("the defaults fit any network")
}

fn gamma() -> Tensor<1> {
    Tensor::from_floats([0.3], &Device::flex())
}

/// One step of training LeNet on 64 images: 107 786 weights are made, both networks run forward and backward, and Adam.
fn step() -> f64 {
    let device = Device::flex();
    let x = Tensor::<4>::random([64, 1, 28, 28], Distribution::Default, &device);
    let y = Tensor::<1, Int>::zeros([64], &device);
    let mut model = Some(model(Arch::Lenet).train());
    let mut adam = AdamW::new(0.0, 0.0);
    median_milliseconds(|| {
        let hyper = model.take().expect("put back below");
        let net = hyper.instantiate(gamma()).expect("the network is the one that was converted");
        let loss = cross_entropy(net.forward(x.clone()), y.clone(), &Default::default()).mean();
        model = Some(adam.step(hyper, loss.backward(), 3e-4).0);
    })
}

/// A million weights from one condition: 784-1000-200-10.
fn million() -> f64 {
    let model = model(Arch::Mlp(vec![1000, 200]));
    median_milliseconds(|| {
        black_box(model.instantiate(gamma()).expect("the network is the one that was converted"));
    })
}

/// Milliseconds.
type Measure = fn() -> f64;

const FIGURES: [(&str, Measure); 3] = [
    ("training step, LeNet, 64 images", step),
    ("training step, LeNet, 64 images, hyperlight", step),
    ("a network of 987210 weights for one condition", million),
];

/// Of these the memory is measured as well.
const MEMORY: [&str; 2] = ["training step, LeNet, 64 images", "training step, LeNet, 64 images, hyperlight"];

/// Not a number where the system does not tell, which the comparison leaves out.
fn peak_mebibytes(measure: Measure) -> f64 {
    // Threads are there before the count begins.
    let square = || Tensor::<2>::random([64, 64], Distribution::Default, &Device::flex());
    square().matmul(square()).into_data();
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
