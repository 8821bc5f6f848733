//! The figures that `peer.py` measures, measured here; `cargo xtask bench neumeta` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every time is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use kiln_core::{Context, OutputMode};
use kiln_data::Images;
use kiln_neumeta::data::Samples;
use kiln_neumeta::family::Source;
use kiln_neumeta::prune::{Importance, prune};
use kiln_neumeta::shp::Metric;
use kiln_neumeta::{
    BaseTerm, Distances, Family, FamilyConfig, FamilyTask, Goal, KernelCrop, NetConfig, NoiseOn, Objective,
    Plain, ShpSolver, Size, Trainable,
};
use kiln_nn::{AdamW, Task};

const REPETITIONS: usize = 9;
const WIDTH: usize = 32;

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

fn cx() -> Context {
    Context { output: OutputMode::Quiet, ..Context::new() }
}

/// Points that the peer draws too: a linear congruential generator, eight numbers a city.
fn cities(count: usize) -> Distances {
    let mut state = 1u32;
    let mut draw = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (f64::from(state) / 4_294_967_296.0) as f32
    };
    let points: Vec<f32> = (0..8 * count).map(&mut draw).collect();
    Distances::of_points(&points, 8, Metric::L1).expect("the points are finite")
}

fn path_length(count: usize) -> f64 {
    ShpSolver::default().solve(&cities(count), &cx()).expect("nobody stops it").length
}

fn path_time(count: usize) -> f64 {
    let distances = cities(count);
    median_milliseconds(|| {
        black_box(ShpSolver::default().solve(&distances, &cx()).expect("nobody stops it"));
    })
}

fn plain() -> Plain {
    let arch = "lenet".parse().expect("lenet is a network");
    let net = NetConfig { goal: Goal::Classify, arch, image: [1, 28, 28], classes: 10 };
    let graph = net.build(Size::new(WIDTH)).expect("it fits the pictures").graph;
    let model = Trainable::draw(&graph, &Device::flex(), &mut cx().rng("bench", 0));
    model.to_plain(&net, Size::new(WIDTH)).expect("it is of that size")
}

/// As published: no base, noise on all coordinates, hidden width 256, sixteen frequencies.
fn family() -> Family {
    let plain = plain();
    let config = FamilyConfig {
        inr: Family::inr_config(&plain.config, WIDTH).expect("the network exists"),
        net: plain.config.clone(),
        full: WIDTH,
        widths: vec![WIDTH],
        depths: vec![],
        kernels: vec![],
        kernel_crop: KernelCrop::Flat,
        base: BaseTerm::None,
        output_scale: false,
        noise: 1.0,
        noise_on: NoiseOn::All,
    };
    Family::new(config, plain).expect("the base is the full network")
}

fn samples() -> Samples {
    let images = Images {
        shape: [1, 28, 28],
        pixels: vec![0.5; 64 * 784],
        labels: vec![0; 64],
        classes: (0..10).map(|class| class.to_string()).collect(),
        white: 1.0,
    };
    Samples { images, masks: vec![] }
}

fn pruning() -> f64 {
    let (plain, samples) = (plain(), samples());
    median_milliseconds(|| {
        black_box(prune(&plain, WIDTH / 2, Importance::L1, &samples, &cx()).expect("half is there"));
    })
}

fn generation() -> f64 {
    let (family, cx) = (family(), cx());
    let inr = family.draw(&cx.device, &mut cx.rng("inr", 0));
    let mut rng = cx.rng("noise", 0);
    median_milliseconds(|| {
        let written = family.write(&inr, family.full(), Some(&mut rng), |_| Source::Written, &cx.device);
        black_box(written.expect("the network exists"));
    })
}

fn step() -> f64 {
    let (family, samples, cx) = (family(), samples(), cx());
    let objective = Objective { recon: 0.0, ..Objective::default() };
    let mut task = FamilyTask {
        family: &family,
        objective: &objective,
        steps: 100,
        train: &samples,
        valid: &samples,
        cx: &cx,
    };
    let mut inr = Some(family.draw(&cx.device, &mut cx.rng("inr", 0)).train());
    let mut adam = AdamW::new(0.0, 0.0);
    median_milliseconds(|| {
        let model = inr.take().expect("put back below");
        let (loss, _) = task.loss(&model, 0).expect("the network exists");
        inr = Some(adam.step(model, loss.backward(), 1e-3).0);
    })
}

/// A figure.
type Measure = fn() -> f64;

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let figures: [(&str, &str, Measure); 7] = [
        ("path through 96 cities", "length", || path_length(96)),
        ("time for the path through 96 cities", "ms", || path_time(96)),
        ("path through 512 cities", "length", || path_length(512)),
        ("time for the path through 512 cities", "ms", || path_time(512)),
        ("pruning lenet to half of its channels by L1", "ms", pruning),
        ("weights of lenet, width 32", "ms", generation),
        ("training step of a family of lenet, 64 pictures", "ms", step),
    ];
    for (name, unit, measure) in figures.into_iter().filter(|(name, ..)| name.contains(&only)) {
        println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
    }
}
