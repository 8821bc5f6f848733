//! The figures that `peer.py` measures with btsbot, fastavro and astropy, measured here; `cargo xtask bench btsbot` runs both
//! sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several repetitions after a
//! warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it. Packets are those of the shared data;
//! without them, those figures are left out.

use std::fs;
use std::hint::black_box;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use kiln_btsbot::features::{Derived, DrbMissing, features};
use kiln_btsbot::packets::triplet;
use kiln_btsbot::train::weighted_loss;
use kiln_btsbot::{AlertReader, MmCnnConfig};
use kiln_data::shared_dir;
use kiln_nn::AdamW;

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

fn inputs(batch: usize, device: &Device) -> (Tensor<4>, Tensor<2>) {
    let normal = Distribution::Normal(0.0, 1.0);
    (Tensor::random([batch, 3, 63, 63], normal, device), Tensor::random([batch, 25], normal, device))
}

/// 1,024 alerts, 64 at a time.
fn forward() -> Option<f64> {
    let device = Device::flex();
    let model = MmCnnConfig::new().init(&device);
    let (images, meta) = inputs(64, &device);
    Some(median_milliseconds(|| {
        for _ in 0..16 {
            black_box(model.forward(images.clone(), meta.clone()).into_data());
        }
    }))
}

/// One step on 64 alerts: an epoch of 4,096 has 64 of them.
fn step() -> Option<f64> {
    let device = Device::flex().autodiff();
    let mut model = Some(MmCnnConfig::new().init(&Device::flex()).train());
    let (images, meta) = inputs(64, &device);
    let labels: Vec<bool> = (0..64).map(|i| i % 2 == 0).collect();
    let mut adam = AdamW::new(0.0, 0.0);
    Some(median_milliseconds(|| {
        let network = model.take().expect("put back below");
        let loss = weighted_loss(network.forward(images.clone(), meta.clone()), &labels, 1.0);
        model = Some(adam.step(network, loss.backward(), 1e-4).0);
    }))
}

fn packets() -> Option<Vec<Vec<u8>>> {
    let folder = shared_dir()?.join("data/ztf-alerts/packets");
    let files = fs::read_dir(folder).ok()?;
    Some(files.filter_map(|file| fs::read(file.ok()?.path()).ok()).collect())
}

/// Milliseconds of a packet, from its bytes to stamps and features, on one core.
fn decode() -> Option<f64> {
    let packets = packets()?;
    let reader = AlertReader::new();
    let all = median_milliseconds(|| {
        for _ in 0..10 {
            for packet in &packets {
                for alert in reader.read(packet).into_iter().flatten() {
                    let derived = Derived::of(&alert, &alert.prior);
                    let _ = black_box((triplet(&alert), features(&alert, &derived, DrbMissing::UseRb)));
                }
            }
        }
    });
    Some(all / (10 * packets.len()) as f64)
}

/// From the bytes of one packet to its score.
fn latency() -> Option<f64> {
    let packets = packets()?;
    let (reader, device) = (AlertReader::new(), Device::flex());
    let model = MmCnnConfig::new().init(&device);
    let mut at = 0;
    Some(median_milliseconds(|| {
        at = (at + 1) % packets.len();
        for alert in reader.read(&packets[at]).into_iter().flatten() {
            let derived = Derived::of(&alert, &alert.prior);
            let (Ok(triplet), Ok(features)) =
                (triplet(&alert), features(&alert, &derived, DrbMissing::UseRb))
            else {
                continue;
            };
            let images = Tensor::from_data(TensorData::new(triplet.pixels, [1, 3, 63, 63]), &device);
            let meta = Tensor::from_data(TensorData::new(features.to_vec(), [1, 25]), &device);
            black_box(model.forward(images, meta).into_data());
        }
    }))
}

/// Milliseconds, where they can be measured.
type Measure = fn() -> Option<f64>;

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, Measure); 4] = [
        ("forward, 1024 alerts", forward),
        ("training step, 64 alerts", step),
        ("packet to stamps and features, one core", decode),
        ("packet to score", latency),
    ];
    for (name, measure) in figures.into_iter().filter(|(name, _)| name.contains(&only)) {
        if let Some(value) = measure() {
            println!("{}", serde_json::json!({ "name": name, "unit": "ms", "value": value }));
        }
    }
}
