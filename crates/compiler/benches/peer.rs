//! The networks that `peer.py` measures in onnxruntime and PyTorch, compiled and measured here; `cargo xtask bench compiler` runs
//! both in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`. `KILN_BENCH_ONLY=substring` runs only the figures whose name
//! contains it; `KILN_BENCH_REFERENCE=1` also measures the graphs run operation by operation.

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use burn::tensor::TensorData;
use kiln_compiler::{Executor, Graph, capture};
use kiln_core::MemoryGauge;
use kiln_ops::keep_freed_memory;
use networks::{Example, Frozen};

mod networks;

/// Set for a process whose memory is measured: the folder with its graph.
const MEMORY_VARIABLE: &str = "KILN_BENCH_MEMORY";

const BERT: Example = Example::Bert { layers: 12, heads: 12 };
const BLOCK: Example = Example::Bert { layers: 1, heads: 4 };
const LLAMA: Example = Example::Llama { layers: 4, heads: 4 };
const GLA: Example = Example::Gla { layers: 4, heads: 4 };

const WORKLOADS: &[(&str, Example, &[usize])] = &[
    ("resnet18 1x3x224x224", Example::ResNet18, &[1, 3, 224, 224]),
    ("resnet18 8x3x224x224", Example::ResNet18, &[8, 3, 224, 224]),
    ("mobilenet v2 1x3x224x224", Example::MobileNetV2, &[1, 3, 224, 224]),
    ("mobilenet v2 8x3x224x224", Example::MobileNetV2, &[8, 3, 224, 224]),
    ("bert-base layers 1x128", BERT, &[1, 128, 768]),
    ("bert-base layers 8x128", BERT, &[8, 128, 768]),
    ("bert block 8x128x256", BLOCK, &[8, 128, 256]),
    ("llama layers 1x256", LLAMA, &[1, 256, 256]),
    ("llama layers 8x256", LLAMA, &[8, 256, 256]),
    ("gla layers 1x256", GLA, &[1, 256, 256]),
    ("gla layers 8x256", GLA, &[8, 256, 256]),
];

fn graph_of(example: Example, shape: &[usize]) -> Graph {
    capture(Box::new(Frozen { example, input: shape.to_vec() })).expect("the network can be captured")
}

fn input(shape: &[usize]) -> TensorData {
    let count: usize = shape.iter().product();
    TensorData::new(
        (0..count).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect::<Vec<_>>(),
        shape.to_vec(),
    )
}

/// The median of at least 7 repetitions that together take at least a second, after two more.
fn median_milliseconds(mut work: impl FnMut()) -> f64 {
    work();
    work();
    let mut seconds = Vec::new();
    let begun = Instant::now();
    while seconds.len() < 7 || begun.elapsed().as_secs_f64() < 1.0 {
        let begun = Instant::now();
        work();
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    1e3 * seconds[seconds.len() / 2]
}

/// How far memory rises while a network is read from its folder, compiled and run three times.
fn peak_mebibytes(folder: &Path) -> f64 {
    let run = || {
        let graph = Graph::load(folder).expect("the graph was saved");
        let x = [input(&graph.inputs[0].port.shape)];
        let mut executor = Executor::new(graph).expect("the graph can be compiled");
        (0..3).for_each(|_| drop(executor.run(&x)));
    };
    let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(run).1);
    peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    keep_freed_memory(); // as the kiln binary does
    if let Some(folder) = std::env::var_os(MEMORY_VARIABLE) {
        return println!("{}", peak_mebibytes(folder.as_ref()));
    }
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let show = |name: String, unit: &str, value: f64| {
        println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": value }));
    };
    for (name, example, shape) in WORKLOADS.iter().filter(|(name, ..)| name.contains(&only)) {
        let graph = graph_of(*example, shape);
        let x = [input(shape)];
        let folder = tempfile::tempdir().expect("there is room for the graph");
        graph.save(folder.path()).expect("the graph can be saved");
        if std::env::var_os("KILN_BENCH_REFERENCE").is_some() {
            let reference = median_milliseconds(|| drop(black_box(graph.run(&x))));
            show(format!("{name}, operation by operation"), "ms", reference);
        }
        let begun = Instant::now();
        let mut executor = Executor::new(graph).expect("the graph can be compiled");
        show(format!("{name}, compiling"), "ms", 1e3 * begun.elapsed().as_secs_f64());
        let compiled = median_milliseconds(|| drop(black_box(executor.run(&x))));
        show(format!("{name}, beside onnxruntime"), "ms", compiled);
        show(format!("{name}, beside tract"), "ms", compiled);
        show(format!("{name}, beside PyTorch"), "ms", compiled);
        let program = std::env::current_exe().expect("the system knows the program");
        let output =
            Command::new(program).env(MEMORY_VARIABLE, folder.path()).output().expect("it starts again");
        let peak = String::from_utf8_lossy(&output.stdout).trim().parse().expect("it prints one number");
        show(format!("memory of {name}, beside onnxruntime"), "MiB", peak);
    }
}
