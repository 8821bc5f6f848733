//! Products of bytes that `peer.py` measures in onnxruntime, measured here; `cargo xtask bench ptq` runs both in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`: the median of several repetitions after a warm-up, on one
//! thread and on two.

use std::hint::black_box;
use std::time::Instant;

use kiln_core::random_stream;
use kiln_ops::keep_freed_memory;
use kiln_ops::quantised::{Affine, Bytes, Panels, Product};
use rand::RngExt;

/// Rows, inner extent and columns.
const PRODUCTS: [[usize; 3]; 3] = [[512, 512, 512], [128, 768, 3072], [1, 768, 3072]];

fn median_milliseconds(mut work: impl FnMut()) -> f64 {
    work();
    work();
    let mut seconds = Vec::new();
    let begun = Instant::now();
    while seconds.len() < 20 || begun.elapsed().as_secs_f64() < 0.5 {
        let begun = Instant::now();
        work();
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    1e3 * seconds[seconds.len() / 2]
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    keep_freed_memory(); // as the kiln binary does
    let mut rng = random_stream(0, "bench", 0);
    for [rows, inner, columns] in PRODUCTS {
        let weights: Vec<i8> = (0..inner * columns).map(|_| rng.random_range(-127..=127)).collect();
        let panels = Panels::from_rows(&weights, columns, inner);
        let x: Vec<f32> = (0..rows * inner).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let x = Bytes::quantise(&x, inner, &Affine { scale: 2.0 / 255.0, zero: 128, most: 255 });
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
            let value =
                pool.install(|| median_milliseconds(|| drop(black_box(Product::new(&x, &panels).sums()))));
            let name = format!("bytes {rows}x{inner}x{columns}, threads {threads}");
            println!("{}", serde_json::json!({ "name": name, "unit": "ms", "value": value }));
        }
    }
}
