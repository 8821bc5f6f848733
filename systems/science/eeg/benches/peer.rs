//! The figures that `peer.py` measures in braindecode and mne, measured here; `cargo xtask bench eeg` runs both sides in
//! turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several repetitions after a
//! warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it. `KILN_BENCH_MEMORY=1` prints the peak
//! memory of the preparation too.

use std::hint::black_box;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Int, Tensor};
use kiln_core::{MemoryGauge, random_stream};
use kiln_data::edf::{EdfFormat, EdfHeader, EdfKind, EdfSignal, write_edf};
use kiln_eeg::channels::TUAB;
use kiln_eeg::{Pipeline, ShallowNetConfig, TcnConfig};
use kiln_nn::AdamW;
use kiln_ops::cross_entropy;
use rand::RngExt;

const REPETITIONS: usize = 5;
const RATE: usize = 250;
const SECONDS: usize = 20 * 60;

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

/// One step of training the paper's network on the paper's batch.
fn step() -> f64 {
    let device = Device::flex();
    let x = Tensor::<3>::random([64, 21, 6000], Distribution::Normal(0.0, 1.0), &device);
    let y = Tensor::<1, Int>::zeros([64], &device);
    let mut model = Some(ShallowNetConfig::new(21, 2, 6000).init(&device).train());
    let mut adam = AdamW::new(5e-4, 0.0);
    median_milliseconds(|| {
        let network = model.take().expect("put back below");
        let logits: Tensor<2> = network.trace(x.clone(), &mut |_| {}).squeeze_dim(2);
        let loss = cross_entropy(logits, y.clone(), &Default::default()).mean();
        model = Some(adam.step(network, loss.backward(), 6.25e-4).0);
    })
}

fn tcn() -> f64 {
    let device = Device::flex();
    let x = Tensor::<3>::random([8, 21, 6000], Distribution::Normal(0.0, 1.0), &device);
    let model = TcnConfig::new(21, 2, 6000).init(&device);
    median_milliseconds(|| {
        black_box(model.trace(x.clone(), &mut |_| {}).into_data());
    })
}

fn prepare() -> f64 {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("a.edf");
    let signal = |name: &str| EdfSignal {
        label: format!("EEG {name}-REF"),
        transducer: String::new(),
        unit: "uV".into(),
        physical_min: -3276.8,
        physical_max: 3276.7,
        digital_min: -32768,
        digital_max: 32767,
        prefilter: String::new(),
        samples_per_record: RATE,
    };
    let header = EdfHeader {
        format: EdfFormat::Edf,
        kind: EdfKind::Plain,
        patient: "X".into(),
        recording: "X".into(),
        start_date: "01.01.00".into(),
        start_time: "00.00.00".into(),
        declared_records: None,
        record_seconds: 1.0,
        signals: TUAB.iter().map(|name| signal(name)).collect(),
    };
    let mut rng = random_stream(0, "bench", 0);
    let samples: Vec<Vec<i32>> =
        TUAB.iter().map(|_| (0..SECONDS * RATE).map(|_| rng.random_range(-1000..1000)).collect()).collect();
    write_edf(&path, &header, &samples, &[]).expect("samples in range");
    drop(samples);
    let pipeline = Pipeline::default();
    if std::env::var_os("KILN_BENCH_MEMORY").is_some()
        && let Some(gauge) = MemoryGauge::start()
    {
        let (_, peak) = gauge.peak(|| black_box(pipeline.read(&path)).expect("a whole recording"));
        let figure = serde_json::json!({ "name": "peak memory of that", "unit": "MB", "value": peak.map(|p| p as f64 / 1e6) });
        println!("{figure}");
    }
    median_milliseconds(|| {
        black_box(pipeline.read(&path)).expect("a whole recording");
    })
}

/// Milliseconds.
type Measure = fn() -> f64;

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, Measure); 3] = [
        ("training step, ShallowNet, 64 x 21 x 6000", step),
        ("TCN forward, 8 x 21 x 6000", tcn),
        ("EDF of 20 min x 21 channels, prepared", prepare),
    ];
    for (name, measure) in figures.into_iter().filter(|(name, _)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": "ms", "value": measure() }));
    }
}
