//! The figures that `peer.py` measures in PyTorch, measured here; `cargo xtask bench megatron` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several steps after a
//! warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use kiln_cluster::run_threads;
use kiln_core::Context;
use kiln_megatron::data::random_samples;
use kiln_megatron::{GptConfig, ParallelLayout, Ranks, TrainOptions, Trainer};

const STEPS: usize = 9;
const SEQ: usize = 128;
const VOCAB: usize = 256;

/// Milliseconds of a training step of a GPT of 4 layers and width 256, with Adam and clipping.
fn step((tensor, pipeline, data): (usize, usize, usize), batch: usize, micro_batch: usize) -> f64 {
    let layout = ParallelLayout::new(tensor, pipeline, data);
    let config = GptConfig::new(4, 256, 8, VOCAB).with_max_seq(SEQ);
    let options = TrainOptions::new(batch, micro_batch, SEQ);
    let tokens = random_samples([1, batch, SEQ + 1], VOCAB, 0);
    let rows = tokens.batch(0, (batch, SEQ), 0);
    let milliseconds = run_threads(layout.ranks(), |comm| {
        let ranks = Ranks::new(&layout, comm)?;
        let mut trainer = Trainer::<f32>::new(&config, &options, ranks, |_| None, &Context::new())?;
        let mut seconds = (0..=STEPS)
            .map(|_| Ok(trainer.train_step(&rows, 3e-4)?.seconds))
            .collect::<kiln_core::Result<Vec<f64>>>()?;
        let mut seconds = seconds.split_off(1);
        seconds.sort_by(f64::total_cmp);
        Ok(1e3 * seconds[STEPS / 2])
    });
    milliseconds.expect("the layouts fit the network")[0]
}

/// Milliseconds.
type Measure = fn() -> f64;

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, Measure); 4] = [
        ("one rank, 4 x 128 tokens", || step((1, 1, 1), 4, 4)),
        ("t = 2, 4 x 128 tokens", || step((2, 1, 1), 4, 4)),
        ("p = 2, 8 micro-batches of 4 x 128 tokens", || step((1, 2, 1), 32, 4)),
        ("d = 2, 4 x 128 tokens on each", || step((1, 1, 2), 8, 4)),
    ];
    for (name, measure) in figures.into_iter().filter(|(name, _)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": "ms", "value": measure() }));
    }
}
