//! The figures that `peer.py` measures in torchvision and PyTorch, measured here;
//! `cargo xtask bench chest-xray` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several repetitions after a
//! warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use kiln_chest_xray::cam::{Layer, score_cam};
use kiln_chest_xray::{ClassifierConfig, Net, UNetConfig};

const REPETITIONS: usize = 5;

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

fn noise(shape: [usize; 4]) -> Tensor<4> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

fn classify(net: Net) -> f64 {
    let network = ClassifierConfig::new(net, 2).init(&Device::flex());
    let x = noise([8, 3, 224, 224]);
    median_milliseconds(|| {
        black_box(network.forward(x.clone()).into_data());
    })
}

fn segment() -> f64 {
    let network = UNetConfig::new(64).init(&Device::flex());
    let x = noise([2, 1, 256, 256]);
    median_milliseconds(|| {
        black_box(network.forward(x.clone()).into_data());
    })
}

fn explain() -> f64 {
    let network = ClassifierConfig::new(Net::Resnet18, 2).init(&Device::flex());
    let x = noise([1, 3, 224, 224]);
    median_milliseconds(|| {
        black_box(score_cam(&network, x.clone(), 1, Layer::Last, None));
    })
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, &dyn Fn() -> f64); 5] = [
        ("resnet18 forward, 8 x 224 px", &|| classify(Net::Resnet18)),
        ("densenet121 forward, 8 x 224 px", &|| classify(Net::Chexnet)),
        ("mobilenet forward, 8 x 224 px", &|| classify(Net::Mobilenet)),
        ("U-Net forward, 2 x 256 px", &segment),
        ("Score-CAM of resnet18, 512 maps, 224 px", &explain),
    ];
    for (name, measure) in figures.into_iter().filter(|(name, _)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": "ms", "value": measure() }));
    }
}
