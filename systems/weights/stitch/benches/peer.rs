//! The figures that `peer.py` measures in PyTorch, measured here; `cargo xtask bench stitch` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use kiln_core::random_stream;
use kiln_stitch::family::{Vit, VitConfig};
use kiln_stitch::{SnNet, SnNetConfig};

const REPETITIONS: usize = 9;
/// Switches of one repetition.
const SWITCHES: usize = 100_000;
/// Bytes of a number.
const BYTES: f64 = 4.0;

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn median_milliseconds(mut work: impl FnMut()) -> f64 {
    work();
    let timed = (0..REPETITIONS).map(|_| {
        let begun = Instant::now();
        work();
        1e3 * begun.elapsed().as_secs_f64()
    });
    median(timed.collect())
}

/// DeiT-Ti and DeiT-S for images of 96 x 96 pixels, stitched.
fn net() -> SnNet<Vit> {
    let device = Device::flex();
    let vit = |width, heads| {
        VitConfig { image: [3, 96, 96], patch: 16, width, depth: 12, heads, classes: 1000 }.init(&device)
    };
    SnNetConfig::new(vec![vit(192, 3), vit(384, 6)])
        .draw(&mut random_stream(0, "bench", 0), &device)
        .expect("both anchors have twelve blocks")
}

/// One forward pass through six blocks of each.
fn forward(batch: usize) -> f64 {
    let net = net();
    let id = net.space().find("s0>s1@5>6").expect("blocks 5 and 6 share a window");
    let images = Tensor::<4>::random([batch, 3, 96, 96], Distribution::Default, &Device::flex());
    median_milliseconds(|| {
        black_box(net.forward_with(id, images.clone()).expect("the id is that of a network").into_data());
    })
}

/// What all networks of the space take in memory.
fn memory() -> f64 {
    net().num_params() as f64 * BYTES / 1e6
}

/// Nanoseconds to choose another network.
fn switch() -> f64 {
    let mut net = net();
    let count = net.space().len();
    let milliseconds = median_milliseconds(|| {
        for id in 0..SWITCHES {
            net.set_config(black_box(id % count)).expect("ids end with the count");
        }
        black_box(net.config());
    });
    1e6 * milliseconds / SWITCHES as f64
}

/// A name, a unit and how to measure it.
type Figure = (&'static str, &'static str, fn() -> f64);

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [Figure; 4] = [
        ("stitch of six blocks each of DeiT-Ti and DeiT-S, 96 x 96 pixels, batch 1", "ms", || forward(1)),
        ("stitch of six blocks each of DeiT-Ti and DeiT-S, 96 x 96 pixels, batch 64", "ms", || forward(64)),
        ("memory of the 34 networks, here one and there separate", "MB", memory),
        ("switch to another network", "ns", switch),
    ];
    for (name, unit, measure) in figures.into_iter().filter(|(name, ..)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
    }
}
