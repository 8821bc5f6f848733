//! Products of bytes and whole networks of 8 bits that `peer.py` measures in onnxruntime, measured here; `cargo xtask bench ptq`
//! runs both in turn. The networks are written as ONNX files to a folder for temporary files, where the other side finds them.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`: the median of several repetitions after a warm-up, on one
//! thread and on two; and how far memory rises while a network is read and run three times. `KILN_BENCH_ONLY=substring` measures
//! only what has it in its name.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use kiln_compiler::capture;
use kiln_core::{Context, MemoryGauge, ModelFolder, random_stream};
use kiln_nn::initialise;
use kiln_ops::keep_freed_memory;
use kiln_ops::quantised::{Affine, Bytes, Panels, Product};
use kiln_ptq::arch::{Arch, ClassifierConfig, Input};
use kiln_ptq::checkpoint::Trained;
use kiln_ptq::data::{Examples, Numbers};
use kiln_ptq::quantise::Found;
use kiln_ptq::{Program, QuantConfig, Quantised, Quantiser, SearchPlan, store};
use rand::RngExt;

/// Set for a process whose memory is measured: the network's folder, and how many examples at once.
const MEMORY_VARIABLE: &str = "KILN_BENCH_MEMORY";

/// The networks as they come: 28 x 28 pixels, or 32 words.
const NETWORKS: [(&str, Arch); 3] =
    [("resnet-s", Arch::Resnet), ("mobilenetv2-s", Arch::Mobilenet), ("bert-s", Arch::Bert)];

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

/// Random examples for a network: speed does not depend on what it has learnt.
fn examples(arch: Arch, count: usize) -> (Input, Examples) {
    let mut rng = random_stream(0, "examples", 0);
    let (input, shape, values) = match arch {
        Arch::Bert => {
            let ids = (0..count * 32).map(|_| rng.random_range(1..4000)).collect();
            (Input::Text { vocabulary: 4000, length: 32 }, vec![32], Numbers::Ints(ids))
        }
        _ => {
            let pixels = (0..count * 784).map(|_| rng.random()).collect();
            (Input::Image([1, 28, 28]), vec![1, 28, 28], Numbers::Floats(pixels))
        }
    };
    let labels = (0..count).map(|i| i % 10).collect();
    (input, Examples { shape, values, labels, classes: vec![String::new(); 10] })
}

/// Quantises an untrained network to 8 bits throughout, and writes it to a folder, with ONNX files for 1 and 32 examples.
fn write(arch: Arch, folder: &Path) -> kiln_core::Result<()> {
    let cx = Context::new();
    let (input, examples) = examples(arch, 64);
    let config = ClassifierConfig::new(arch, input, 10);
    let net = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device));
    let program = Program::new(capture(Box::new(Trained::new(config, net)))?)?;
    let quantiser = Quantiser::calibrate(program, &examples, QuantConfig::default(), &cx)?;
    let found = Found { bits: vec![8; quantiser.parts.len()], baseline: 1.0, target: None };
    let config = store::config(
        &quantiser,
        &found,
        &SearchPlan::default(),
        1.0,
        (Some(input), examples.classes.clone(), 1.0),
    );
    store::save(&ModelFolder::new(folder), &quantiser, &found.bits, &config)?;
    let quantised = Quantised::open(folder)?;
    for batch in [1, 32] {
        quantised.to_onnx(batch, false, &folder.with_extension(format!("{batch}.onnx")))?;
    }
    Ok(())
}

/// A network for so many examples at once, and these.
fn open(arch: Arch, folder: &Path, batch: usize) -> (Quantised, Program, burn::tensor::TensorData) {
    let quantised = Quantised::open(folder).expect("the network was written");
    let program = quantised.program.with_batch(batch, &quantised.ready).expect("examples do not mix");
    let inputs = examples(arch, batch).1.batch(&(0..batch).collect::<Vec<_>>());
    (quantised, program, inputs)
}

/// How far memory rises while a network is read from its folder and run three times.
fn peak_mebibytes(arch: Arch, folder: &Path, batch: usize) -> f64 {
    let run = || {
        let (quantised, program, inputs) = open(arch, folder, batch);
        (0..3).for_each(|_| drop(program.run(std::slice::from_ref(&inputs), &quantised.ready)));
    };
    let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(run).1);
    peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
}

fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
    pool.install(work)
}

fn show(name: &str, unit: &str, value: f64) {
    println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": value }));
}

fn networks(only: &str) {
    for (name, arch) in NETWORKS.iter().filter(|(name, _)| name.contains(only)) {
        let folder = network_folder(name);
        write(*arch, &folder).expect("there is room for the network");
        for batch in [1, 32] {
            let (quantised, program, inputs) = open(*arch, &folder, batch);
            for threads in [1, 2] {
                let run = || drop(black_box(program.run(std::slice::from_ref(&inputs), &quantised.ready)));
                let value = on_threads(threads, || median_milliseconds(run));
                let what = format!("{name}, batch {batch}, threads {threads}");
                show(&format!("{what}, beside exact products"), "ms", value);
                show(&format!("{what}, beside fast products"), "ms", value);
            }
            let program = std::env::current_exe().expect("the system knows the program");
            let child = Command::new(program).env(MEMORY_VARIABLE, format!("{name} {batch}")).output();
            let output = child.expect("it starts again").stdout;
            let peak = String::from_utf8_lossy(&output).trim().parse().expect("it prints one number");
            show(&format!("memory of {name}, batch {batch}"), "MiB", peak);
        }
    }
}

/// Where the networks are kept for the other side.
fn network_folder(name: &str) -> PathBuf {
    std::env::temp_dir().join("kiln-bench-ptq").join(name)
}

fn products(only: &str) {
    let mut rng = random_stream(0, "bench", 0);
    for [rows, inner, columns] in PRODUCTS {
        let name = format!("bytes {rows}x{inner}x{columns}");
        if !name.contains(only) {
            continue;
        }
        let weights: Vec<i8> = (0..inner * columns).map(|_| rng.random_range(-127..=127)).collect();
        let panels = Panels::from_rows(&weights, columns, inner);
        let x: Vec<f32> = (0..rows * inner).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let x = Bytes::quantise(&x, inner, &Affine { scale: 2.0 / 255.0, zero: 128, most: 255 });
        for threads in [1, 2] {
            let value = on_threads(threads, || {
                median_milliseconds(|| drop(black_box(Product::new(&x, &panels).sums())))
            });
            show(&format!("{name}, threads {threads}"), "ms", value);
        }
    }
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    keep_freed_memory(); // as the kiln binary does
    if let Ok(wanted) = std::env::var(MEMORY_VARIABLE) {
        let (name, batch) = wanted.split_once(' ').expect("a name and a number");
        let (_, arch) = NETWORKS.iter().find(|(known, _)| *known == name).expect("a network");
        let batch = batch.parse().expect("a number");
        return println!("{}", peak_mebibytes(*arch, &network_folder(name), batch));
    }
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    products(&only);
    networks(&only);
}
