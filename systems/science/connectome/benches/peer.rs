//! The figures that `peer.py` measures with tensorly and graph-tool, measured here; `cargo xtask bench connectome` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use kiln_connectome::NtfConfig;
use kiln_connectome::blockmodel::BlockModelConfig;
use kiln_connectome::graph::Graph;
use kiln_connectome::tensor::AffinityTensor;
use kiln_core::{Context, random_stream};
use rand::RngExt;

const REPETITIONS: usize = 3;

fn median_seconds(mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..REPETITIONS)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[REPETITIONS / 2]
}

/// Fifty sweeps of HALS over six animals with 95 neurons and 800 frames, rank 8.
fn hals() -> f64 {
    let mut rng = random_stream(0, "bench", 0);
    let (frames, animals, pairs) = (800, 6, 4465);
    let values: Vec<f32> = (0..frames * animals * pairs).map(|_| rng.random::<f32>()).collect();
    let tensor = AffinityTensor::new([frames, animals, pairs], values, None);
    let config = NtfConfig { tolerance: 0.0, ..NtfConfig::new(8).with_sweeps(50) };
    let cx = Context::for_tests("");
    let start = config.draw(&tensor, 0, &cx);
    median_seconds(|| {
        black_box(config.fit_from(&tensor, start.clone(), &cx, &|_| ()).expect("the start fits the tensor"));
    })
}

/// A number from 0 to 1 that both sides draw alike (the permutation of PCG).
fn drawn(number: u32) -> f64 {
    let x = number.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let x = ((x >> ((x >> 28) + 4)) ^ x).wrapping_mul(277_803_737);
    f64::from((x >> 22) ^ x) / 2f64.powi(32)
}

/// A graph of 125 nodes in five groups with about 1500 edges.
fn planted() -> Graph {
    let pairs = (0..125u32).flat_map(|i| (0..i).map(move |j| (i, j)));
    let edges = pairs.filter(|&(i, j)| drawn(i * 125 + j) < if i % 5 == j % 5 { 0.5 } else { 0.12 });
    let edges = edges.map(|(i, j)| {
        let weight = -(1.0 - drawn(20_000 + i * 125 + j)).ln() * if i % 5 == j % 5 { 2.0 } else { 1.0 };
        (i as usize, j as usize, weight)
    });
    let nodes = (0..125).map(|node: u32| node.to_string()).collect();
    Graph::new(nodes, edges).expect("finite weights")
}

fn communities() -> f64 {
    let (cx, graph) = (Context::for_tests(""), planted());
    median_seconds(|| {
        black_box(BlockModelConfig::default().infer(&graph, &cx).expect("every node has an edge"));
    })
}

/// Nats.
fn description_length() -> f64 {
    let found = BlockModelConfig::default().infer(&planted(), &Context::for_tests(""));
    found.expect("every node has an edge").best.description_length
}

type Measure = fn() -> f64;

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, &str, Measure); 3] = [
        ("50 sweeps of HALS, 800 x 6 x 4465, rank 8", "s", hals),
        ("nested block model, 125 nodes, 1500 edges", "s", communities),
        ("its description length", "nats", description_length),
    ];
    for (name, unit, measure) in figures.into_iter().filter(|(name, ..)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
    }
}
