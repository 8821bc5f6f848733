//! The figures that `peer.py` measures with tensorly, measured here; `cargo xtask bench connectome` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use kiln_connectome::NtfConfig;
use kiln_connectome::blockmodel::BlockModelConfig;
use kiln_connectome::generate::LfrConfig;
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
    let tensor = AffinityTensor { frames, animals, pairs, values, mask: None };
    let config = NtfConfig { tolerance: 0.0, ..NtfConfig::new(8).with_sweeps(50) };
    let cx = Context::for_tests("");
    let start = config.draw(&tensor, 0, &cx);
    median_seconds(|| {
        black_box(config.fit_from(&tensor, start.clone(), &cx, &|_| ()).expect("the start fits the tensor"));
    })
}

/// The nested block model of a benchmark graph with 125 nodes and about 1500 edges.
fn communities() -> f64 {
    let cx = Context::for_tests("");
    let drawn = LfrConfig::table(0.5, 0.5, 1.0)
        .draw(&mut random_stream(0, "bench", 1))
        .expect("the table's graphs exist");
    let (graph, _) = drawn.graph.without_isolated();
    median_seconds(|| {
        black_box(BlockModelConfig::default().infer(&graph, &cx).expect("every node has an edge"));
    })
}

/// Seconds.
type Measure = fn() -> f64;

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, Measure); 2] = [
        ("50 sweeps of HALS, 800 x 6 x 4465, rank 8", hals),
        ("nested block model, 125 nodes, 1500 edges", communities),
    ];
    for (name, measure) in figures.into_iter().filter(|(name, _)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": "s", "value": measure() }));
    }
}
