//! The figures that `peer.py` measures with PyTorch's DTensor, measured here; `cargo xtask bench oneflow` runs both sides in
//! turn. Those without a counterpart are the compiler's and the actors' own.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several repetitions after a
//! warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::TensorData;
use burn_flex::FlexTensor;
use kiln_cluster::run_threads;
use kiln_core::{Context, Result};
use kiln_oneflow::actor::{self, Queue, chain};
use kiln_oneflow::boxing::Router;
use kiln_oneflow::case::Examples;
use kiln_oneflow::exchange::Lines;
use kiln_oneflow::optimiser::{Kind, Optimiser};
use kiln_oneflow::sbp::Region;
use kiln_oneflow::train::train;
use kiln_oneflow::{Case, Compiler, NdSbp, Placement, Run};

const RANKS: usize = 2;
const REPETITIONS: usize = 9;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Milliseconds in which a tensor of 4096 x 4096 floats changes its form on two ranks.
fn redistribute(from: &str, to: &str) -> Result<f64> {
    let (shape, mesh) = ([4096, 4096], [RANKS]);
    let (from, to): (NdSbp, NdSbp) = (from.parse()?, to.parse()?);
    let path = Router::new(&mesh).path(&shape, 4, &from, &to)?;
    let ranks = run_threads(RANKS, |world| {
        let lines = Lines::new(&world, &mesh)?;
        let region = Region::local(&shape, &mesh, &from, lines.coordinate());
        let local = FlexTensor::from_data(TensorData::new(vec![1f32; region.elements()], region.size));
        let mut milliseconds = Vec::with_capacity(REPETITIONS);
        for repetition in 0..=REPETITIONS {
            world.barrier()?;
            let begun = Instant::now();
            black_box(lines.convert(local.clone(), &shape, &from, &path)?);
            world.barrier()?;
            if repetition > 0 {
                milliseconds.push(1e3 * begun.elapsed().as_secs_f64());
            }
        }
        Ok(median(milliseconds))
    })?;
    Ok(ranks.into_iter().fold(0.0, f64::max))
}

/// Milliseconds of a training step of a head of 100 000 classes, its weight split by classes, with gradient descent.
fn softmax_head() -> Result<f64> {
    const STEPS: usize = 10;
    let case = Case::SoftmaxHead { inputs: 128, embedding: 128, classes: 100_000 };
    let placement = Placement::mesh(&[RANKS])?;
    let logical = case.logical(64, &case.initial(0))?;
    let physical = Compiler::new(logical.clone()).hint("head.weight", "S1".parse()?).compile(&placement)?;
    let examples = Examples::generated(&case);
    let batches: Vec<Vec<TensorData>> =
        (0..STEPS).map(|step| examples.batch(&case, 64, 0, step as u64)).collect();
    let run = Run { pieces: STEPS, optimiser: Optimiser { kind: Kind::Sgd, lr: 0.01 }, ..Run::default() };
    let cx = Context::new();
    let ranks = run_threads(RANKS, |world| {
        let trained = train(
            &physical,
            &logical,
            &world,
            &run,
            &|step| Ok(batches[step % STEPS].clone()),
            &cx,
            &|_| {},
        )?;
        Ok(1e3 * trained.seconds / STEPS as f64)
    })?;
    Ok(ranks.into_iter().fold(0.0, f64::max))
}

/// Milliseconds in which a training graph of more than a thousand operations is compiled for four devices.
fn compile() -> Result<f64> {
    let case = Case::HybridGpt { vocab: 256, seq: 32, hidden: 64, heads: 4, layers: 8 };
    let logical = case.logical(8, &case.initial(0))?;
    assert!(logical.graph.operations.len() > 1000, "{} operations", logical.graph.operations.len());
    let compiler = Compiler::new(logical);
    let placement = Placement::mesh(&[4])?;
    let begun = Instant::now();
    black_box(compiler.compile(&placement)?);
    Ok(1e3 * begun.elapsed().as_secs_f64())
}

/// Microseconds that the runtime takes for an act that does nothing.
fn act() -> Result<f64> {
    const PIECES: usize = 20_000;
    let mut network = chain(&[1.0; 4], &[2; 3])?;
    network.actors.iter_mut().for_each(|actor| actor.queue = 0);
    let queue = Queue {
        name: "all".into(),
        act: Box::new(|actor: usize, _: usize, _: &[()]| Ok(if actor < 3 { vec![()] } else { Vec::new() })),
        ordered: false,
    };
    let begun = Instant::now();
    actor::run(&network, PIECES, vec![queue], |_| (), 0, false)?;
    Ok(1e6 * begun.elapsed().as_secs_f64() / (4 * PIECES) as f64)
}

/// A figure's value.
type Measure = fn() -> Result<f64>;

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() -> Result<()> {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, &str, Measure); 6] = [
        ("4096 x 4096 floats on two ranks, S0 to S1", "ms", || redistribute("S0", "S1")),
        ("4096 x 4096 floats on two ranks, P to B", "ms", || redistribute("P", "B")),
        ("4096 x 4096 floats on two ranks, S0 to B", "ms", || redistribute("S0", "B")),
        ("training step, 100000 classes split over two ranks", "ms", softmax_head),
        ("compiling a training graph of 1000 operations for four devices", "ms", compile),
        ("an act of an actor that does nothing", "us", act),
    ];
    for (name, unit, measure) in figures.into_iter().filter(|(name, ..)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure()? }));
    }
    Ok(())
}
