//! The figures that `peer.py` measures in PyTorch, measured here; `cargo xtask bench mip` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Int, Tensor};
use kiln_core::random_stream;
use kiln_mip::arch::{Arch, Classifier, ClassifierConfig};
use kiln_mip::hypernet::Nonlinearity;
use kiln_mip::{MipConfig, MipHyper};
use kiln_nn::AdamW;
use kiln_ops::cross_entropy;

const REPETITIONS: usize = 9;

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

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, Measure); 2] = [
        ("training step, LeNet, 64 images", step),
        ("a network of 987210 weights for one condition", million),
    ];
    for (name, measure) in figures.into_iter().filter(|(name, _)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": "ms", "value": measure() }));
    }
}
